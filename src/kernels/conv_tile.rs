//! `kernels/include/conv_tile.cuh` and `conv_halo.cuh` on this side: how images are cut into tiles for a 3×3 convolution, and
//! how large those are.

use super::gemm::FastDivisor;
use crate::device::Argument;
use crate::device::cudarc::driver::DeviceRepr;

/// What a kernel has room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Pixels of a tile: rows of the product, or steps along its sum.
    pub(super) pixels: u32,
    /// Pixels of a tile's halo, of which there is one on every side.
    pub(super) halo: u32,
}

/// A spatial tile by so many columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    /// The ending of its kernels' names, before that of the type.
    pub(super) name: &'static str,
    pub(super) columns: u32,
    /// Rows of the product, each a pixel of a tile or a cell, and what a kernel has a table for.
    pub(super) bounds: Bounds,
    /// Of the weights' pipeline.
    stages: u32,
}

/// Of tiles of pixels.
pub(super) const BOUNDS: Bounds = Bounds { pixels: 256, halo: 384 };
/// Pixels of the halo of a tile of cells.
const CELL_HALO: u32 = 192;
/// Threads of a block.
pub(super) const THREADS: u32 = 128;
const WARPS: u32 = THREADS / 32;
/// Stages of weights where each warp multiplies its own rows, and where a warpgroup does.
const STAGES: u32 = 3;
const WARPGROUP_STAGES: u32 = 4;
/// Bytes of a chunk of channels.
const CHUNK_BYTES: u32 = 64;

/// Steps of a tile: taps of chunks of so many channels.
pub(super) const fn steps(channels: u32) -> u32 {
    9 * channels.div_ceil(CHUNK_BYTES / 2)
}

impl Columns {
    const C32: Self = Self { name: "tiles32", columns: 32, bounds: BOUNDS, stages: STAGES };
    const C48: Self = Self { name: "tiles48", columns: 48, ..Self::C32 };
    const C64: Self = Self { name: "tiles64", columns: 64, ..Self::C32 };
    const W32: Self = Self { name: "wgmma32", stages: WARPGROUP_STAGES, ..Self::C32 };
    const W48: Self = Self { name: "wgmma48", stages: WARPGROUP_STAGES, ..Self::C48 };
    const W64: Self = Self { name: "wgmma64", stages: WARPGROUP_STAGES, ..Self::C64 };
    const CELLS32: Self =
        Self { name: "cells32", bounds: Bounds { pixels: 128, halo: CELL_HALO }, ..Self::C32 };
    const CELLS48: Self =
        Self { name: "cells48", bounds: Bounds { pixels: 64, halo: CELL_HALO }, ..Self::C48 };

    /// Those there are for fprop, whose sums over rows need a power of two.
    pub(super) const FORWARD: &[Self] = &[Self::C64, Self::C32];
    /// Those there are for dgrad.
    pub(super) const BACKWARD: &[Self] = &[Self::C64, Self::C48, Self::C32];
    /// The same, multiplied by warpgroups.
    pub(super) const FORWARD_WGMMA: &[Self] = &[Self::W64, Self::W32];
    pub(super) const BACKWARD_WGMMA: &[Self] = &[Self::W64, Self::W48, Self::W32];
    /// Those there are for dgrad with stride 2.
    pub(super) const CELLS: &[Self] = &[Self::CELLS32, Self::CELLS48];

    /// The one of `all` that has `chosen` columns, or else [`of`](Self::of).
    pub(super) fn chosen(chosen: Option<u32>, columns: u32, all: &[Self]) -> Self {
        let one = all.iter().find(|one| Some(one.columns) == chosen);
        one.copied().unwrap_or_else(|| Self::of(columns, all))
    }

    /// Of `all` the one that computes the fewest, the first of those that are equal.
    pub(super) fn of(columns: u32, all: &[Self]) -> Self {
        let computed = |tile: &&Self| columns.next_multiple_of(tile.columns);
        *all.iter().min_by_key(computed).unwrap_or(&Self::C64)
    }

    /// Bytes of `ConvMemory`, of weights whose rows in it have `row` bytes, and of `halo` pixels.
    const fn shared(&self, rows: u32, row: u32, halo: u32) -> u32 {
        let turn_rows = if self.columns < 64 { 16 } else { 8 };
        let turns = WARPS * turn_rows * (self.columns + 8) * 4;
        let pivots = WARPS * self.columns * 4;
        self.stages * rows * row + turns + pivots + 2 * 4 * self.bounds.halo + 2 * CHUNK_BYTES * halo
    }

    /// The same of fprop.
    pub(super) const fn shared_forward(&self, halo: u32) -> u32 {
        self.shared(self.columns, CHUNK_BYTES, halo)
    }

    /// The same of dgrad.
    pub(super) const fn shared_backward(&self, halo: u32) -> u32 {
        self.shared(CHUNK_BYTES / 2, if self.columns == 32 { 64 } else { 128 }, halo)
    }

    /// Groups of so many columns.
    pub(super) const fn groups(&self, columns: u32) -> u32 {
        columns.div_ceil(self.columns)
    }
}

/// `ConvTiles`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConvTiles {
    images: u32,
    height: u32,
    width: u32,
    tile_height: u32,
    tile_width: FastDivisor,
    halo_width: FastDivisor,
    across: FastDivisor,
    down: FastDivisor,
}

impl ConvTiles {
    /// For `images` of `height` × `width`, none of which is 0: of all tiles within `bounds`, which allow a single pixel, the
    /// fewest, since a kernel computes the bound's pixels whatever a tile has; of those, what fetches the smallest halo;
    /// and then the widest.
    pub(super) fn new(images: u32, height: u32, width: u32, bounds: Bounds) -> Self {
        let mut best: Option<((u32, u32), [u32; 2])> = None;
        for across in (1..=width.min(bounds.pixels)).rev() {
            let most = (bounds.pixels / across).min((bounds.halo / (across + 2)).saturating_sub(2));
            for down in 1..=most.min(height) {
                let count = height.div_ceil(down) * width.div_ceil(across);
                let cost = (count, (down + 2) * (across + 2));
                if best.is_none_or(|(least, _)| cost < least) {
                    best = Some((cost, [down, across]));
                }
            }
        }
        let [tile_height, tile_width] = best.map_or([1, 1], |(_, sides)| sides);
        Self {
            images,
            height,
            width,
            tile_height,
            tile_width: FastDivisor::new(tile_width),
            halo_width: FastDivisor::new(tile_width + 2),
            across: FastDivisor::new(width.div_ceil(tile_width)),
            down: FastDivisor::new(height.div_ceil(tile_height)),
        }
    }

    /// Tiles of all images.
    pub(super) const fn count(&self) -> u32 {
        self.images * self.down.divisor * self.across.divisor
    }

    /// Pixels of all images.
    pub(super) const fn pixels(&self) -> u32 {
        self.images * self.height * self.width
    }

    /// Pixels of a tile's halo.
    pub(super) const fn halo(&self) -> u32 {
        (self.tile_height + 2) * self.halo_width.divisor
    }

    /// Whether at least half of the rows that are computed are alive: else, in small images, an implicit product takes less
    /// time, though it fetches more.
    pub(super) fn are_filled(&self, bounds: Bounds) -> bool {
        u64::from(self.count()) * u64::from(bounds.pixels) <= 2 * u64::from(self.pixels())
    }
}

/// `CellStride`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CellStride {
    pub(super) tiles: ConvTiles,
    out_height: u32,
    out_width: u32,
    height: u32,
    width: u32,
    pad_top: u32,
    pad_left: u32,
}

impl CellStride {
    /// For images `x` of [height, width] and `y`, and padding above and on the left.
    pub(super) fn new(images: u32, x: [u32; 2], y: [u32; 2], pad: [u32; 2], bounds: Bounds) -> Self {
        let cells = |axis: usize| (x[axis] - 1 + pad[axis]) / 2 + 1;
        Self {
            tiles: ConvTiles::new(images, cells(0), cells(1), bounds),
            out_height: y[0],
            out_width: y[1],
            height: x[0],
            width: x[1],
            pad_top: pad[0],
            pad_left: pad[1],
        }
    }

    /// Pixels of a tile's halo, as they lie in memory.
    pub(super) const fn halo(&self) -> u32 {
        (self.tiles.tile_height + 1) * self.tiles.halo_width.divisor
    }
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for ConvTiles {}

// SAFETY: as above.
unsafe impl DeviceRepr for CellStride {}

impl Argument for ConvTiles {
    const CODE: &'static str = "{64:4}";
}
impl Argument for CellStride {
    const CODE: &'static str = "{88:4}";
}

#[cfg(test)]
mod tests {
    use super::{BOUNDS, Bounds, CellStride, Columns, ConvTiles};

    fn tile(height: u32, width: u32, bounds: Bounds) -> [u32; 3] {
        let tiles = ConvTiles::new(1, height, width, bounds);
        [tiles.tile_height, tiles.tile_width.divisor, tiles.count()]
    }

    #[test]
    fn images_of_the_networks_are_cut_well() {
        assert_eq!(size_of::<ConvTiles>(), 64);
        for (side, expected) in
            [(150, [15, 17, 90]), (75, [13, 19, 24]), (64, [16, 16, 16]), (38, [13, 19, 6]), (1, [1, 1, 1])]
        {
            assert_eq!(tile(side, side, BOUNDS), expected, "{side}");
        }
        let small = Bounds { pixels: 128, halo: 200 };
        assert_eq!(tile(75, 75, small), [5, 25, 45]);
        assert_eq!(tile(38, 38, small), [3, 38, 13]);
        // A single row, a single column, and sides of which nothing divides.
        assert_eq!(tile(1, 1000, BOUNDS), [1, 125, 8]);
        assert_eq!(tile(1000, 1, BOUNDS), [125, 1, 8]);
    }

    #[test]
    fn columns_fit_layers() {
        let forward = |columns| Columns::of(columns, Columns::FORWARD).columns;
        assert_eq!([16, 24, 64, 80, 192, 256].map(forward), [32, 32, 64, 32, 64, 64]);
        let backward = |columns| Columns::of(columns, Columns::BACKWARD).columns;
        assert_eq!([8, 24, 48, 64, 80, 96, 128, 200].map(backward), [32, 32, 48, 64, 48, 48, 64, 32]);
        let cells = |columns| Columns::of(columns, Columns::CELLS).columns;
        assert_eq!([8, 24, 48, 64, 80].map(cells), [32, 32, 48, 32, 32]);
    }

    /// Every pixel of x is in one cell, and of the pixels of y that it reaches none is before its cell's neighbours or after.
    #[test]
    fn cells_hold_every_pixel() {
        assert_eq!(size_of::<CellStride>(), 88);
        for side in 1..20 {
            for pad in 0..2 {
                let out = u32::div_ceil(side, 2);
                let cells = CellStride::new(1, [side, side], [out, out], [pad, pad], BOUNDS);
                let count = cells.tiles.height;
                let held: Vec<u32> =
                    (0..2 * count).filter(|at| (pad..side + pad).contains(at)).map(|at| at - pad).collect();
                assert_eq!(held, (0..side).collect::<Vec<_>>(), "{side}, padding {pad}");
                assert!(count == out || count == out + 1);
                assert!(cells.halo() <= cells.tiles.halo());
            }
        }
    }

    /// The least of all GPUs since sm_80: 99 KB.
    #[test]
    fn the_largest_halo_has_room() {
        let tiles = ConvTiles::new(1, 14, 22, Bounds { pixels: 14 * 22, halo: 384 });
        assert_eq!(tiles.halo(), BOUNDS.halo);
        for columns in
            [Columns::FORWARD, Columns::BACKWARD, Columns::FORWARD_WGMMA, Columns::BACKWARD_WGMMA].concat()
        {
            let most = columns.shared_forward(tiles.halo()).max(columns.shared_backward(tiles.halo()));
            assert!(most <= 99 * 1024, "{columns:?}: {most}");
        }
    }

    #[test]
    fn tiles_are_within_bounds_and_cover_images() {
        for height in 1..90 {
            for width in 1..90 {
                for bounds in [BOUNDS, Bounds { pixels: 128, halo: 200 }, Bounds { pixels: 1, halo: 9 }] {
                    let tiles = ConvTiles::new(3, height, width, bounds);
                    let [down, across] = [tiles.tile_height, tiles.tile_width.divisor];
                    assert!(down * across <= bounds.pixels && tiles.halo() <= bounds.halo, "{tiles:?}");
                    assert_eq!(tiles.halo(), (down + 2) * (across + 2));
                    assert!(tiles.down.divisor * down >= height && (tiles.down.divisor - 1) * down < height);
                    assert!(tiles.across.divisor * across >= width);
                    assert!((tiles.across.divisor - 1) * across < width);
                    assert_eq!(tiles.count(), 3 * tiles.down.divisor * tiles.across.divisor);
                    assert_eq!(tiles.pixels(), 3 * height * width);
                }
            }
        }
    }
}
