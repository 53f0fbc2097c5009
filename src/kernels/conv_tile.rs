//! `kernels/include/conv_tile.cuh` on this side: how images are cut into tiles for a 3×3 convolution of stride 1, and how
//! large those are.

use super::gemm::FastDivisor;
use crate::device::Argument;
use crate::device::cudarc::driver::DeviceRepr;

/// What a kernel has room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Pixels of a tile: rows of the product, or steps along its sum.
    pub(super) pixels: u32,
    /// Pixels of a tile's halo, of which there is one on every side.
    pub(super) halo: u32,
}

/// `ConvTileOf`: a spatial tile by so many columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    /// The ending of its kernels' names, before that of the type.
    pub(super) name: &'static str,
    pub(super) columns: u32,
}

/// Rows of the product, each a pixel of a tile, and what a kernel has tables for.
pub(super) const BOUNDS: Bounds = Bounds { pixels: 256, halo: 384 };
/// Threads of a block.
pub(super) const THREADS: u32 = 128;
const WARPS: u32 = THREADS / 32;
const STAGES: u32 = 3;
/// Bytes of a chunk of channels.
const CHUNK_BYTES: u32 = 64;

/// Steps of a tile: taps of chunks of so many channels.
pub(super) const fn steps(channels: u32) -> u32 {
    9 * channels.div_ceil(CHUNK_BYTES / 2)
}

impl Columns {
    const C32: Self = Self { name: "tiles32", columns: 32 };
    const C48: Self = Self { name: "tiles48", columns: 48 };
    const C64: Self = Self { name: "tiles64", columns: 64 };

    /// Those there are for fprop, whose sums over rows need a power of two.
    pub(super) const FORWARD: &[Self] = &[Self::C64, Self::C32];
    /// Those there are for dgrad.
    pub(super) const BACKWARD: &[Self] = &[Self::C64, Self::C48, Self::C32];

    /// Of those for fprop the widest that computes the fewest.
    pub(super) fn forward(columns: u32) -> Self {
        Self::of(columns, Self::FORWARD)
    }

    /// The same of those for dgrad.
    pub(super) fn backward(columns: u32) -> Self {
        Self::of(columns, Self::BACKWARD)
    }

    /// The one of `all` that has so many columns.
    pub(super) fn with(columns: u32, all: &[Self]) -> Option<Self> {
        all.iter().copied().find(|one| one.columns == columns)
    }

    fn of(columns: u32, all: &[Self]) -> Self {
        let computed = |tile: &&Self| columns.next_multiple_of(tile.columns);
        // The first of those that are equal.
        *all.iter().min_by_key(computed).unwrap_or(&Self::C64)
    }

    /// Bytes of `ConvMemory`, of weights whose rows in it have `row` bytes.
    const fn shared(&self, rows: u32, row: u32, tiles: &ConvTiles) -> u32 {
        let turn_rows = if self.columns < 64 { 16 } else { 8 };
        let turns = WARPS * turn_rows * (self.columns + 8) * 4;
        let pivots = WARPS * self.columns * 4;
        STAGES * rows * row + turns + pivots + 2 * 4 * BOUNDS.halo + 2 * CHUNK_BYTES * tiles.halo()
    }

    /// The same of fprop.
    pub(super) const fn shared_forward(&self, tiles: &ConvTiles) -> u32 {
        self.shared(self.columns, CHUNK_BYTES, tiles)
    }

    /// The same of dgrad.
    pub(super) const fn shared_backward(&self, tiles: &ConvTiles) -> u32 {
        self.shared(CHUNK_BYTES / 2, if self.columns == 32 { 64 } else { 128 }, tiles)
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
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for ConvTiles {}

impl Argument for ConvTiles {
    const CODE: &'static str = "{64:4}";
}

#[cfg(test)]
mod tests {
    use super::{BOUNDS, Bounds, Columns, ConvTiles};

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
        let forward = |columns| Columns::forward(columns).columns;
        assert_eq!([16, 24, 64, 80, 192, 256].map(forward), [32, 32, 64, 32, 64, 64]);
        let backward = |columns| Columns::backward(columns).columns;
        assert_eq!([8, 24, 48, 64, 80, 96, 128, 200].map(backward), [32, 32, 48, 64, 48, 48, 64, 32]);
    }

    /// The least of all GPUs since sm_80: 99 KB.
    #[test]
    fn the_largest_halo_has_room() {
        let tiles = ConvTiles::new(1, 14, 22, Bounds { pixels: 14 * 22, halo: 384 });
        assert_eq!(tiles.halo(), BOUNDS.halo);
        for columns in [Columns::C32, Columns::C48, Columns::C64] {
            let most = columns.shared_forward(&tiles).max(columns.shared_backward(&tiles));
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
