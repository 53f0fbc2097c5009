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
    use super::{Bounds, ConvTiles};

    const BOUNDS: Bounds = Bounds { pixels: 256, halo: 384 };

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
