//! What the kernels on `kernels/include/gemm.cuh` share on this side: block tiles, grids, and their arguments by value.

use super::operand::{Arrival, GradientView, Input};
use super::raw::RawElement;
use crate::device::Argument;
use crate::device::cudarc::driver::{CudaStream, CudaView, DevicePtr, DeviceRepr};
use std::sync::Arc;

/// `GemmTile`: what a block computes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    /// The ending of its kernels' names, before that of the type.
    pub(super) name: &'static str,
    pub(super) rows: u32,
    pub(super) columns: u32,
    pub(super) warp_rows: u32,
    pub(super) threads: u32,
    /// Whether TMA brings both operands.
    by_tensors: bool,
}

/// Threads of a block.
pub(super) const THREADS: u32 = 256;
/// Bytes of a step along the sum, in every row of an operand.
const STEP_BYTES: u32 = 64;
const STAGES: u32 = 3;
/// Bytes of a barrier for each stage, to a multiple of 16.
const BARRIERS: u32 = STAGES.div_ceil(2) * 16;

impl Tile {
    /// 128 × 128, for f16 and bf16.
    pub(super) const WIDE: Self =
        Self { name: "wide", rows: 128, columns: 128, warp_rows: 2, threads: THREADS, by_tensors: false };
    /// 128 × 64.
    pub(super) const NARROW: Self =
        Self { name: "narrow", rows: 128, columns: 64, warp_rows: 4, threads: THREADS, by_tensors: false };
    /// 64 × 128.
    pub(super) const LOW: Self =
        Self { name: "low", rows: 64, columns: 128, warp_rows: 2, threads: THREADS, by_tensors: false };
    /// 64 × 256, for f16 and bf16.
    pub(super) const BROAD: Self =
        Self { name: "broad", rows: 64, columns: 256, warp_rows: 1, threads: THREADS, by_tensors: false };

    /// `WarpgroupTile`: 128 × 128 by wgmma.
    pub(super) const WGMMA128: Self =
        Self { name: "wgmma128", rows: 128, columns: 128, warp_rows: 8, threads: THREADS, by_tensors: false };
    /// 128 × 64 by wgmma.
    pub(super) const WGMMA64: Self =
        Self { name: "wgmma64", rows: 128, columns: 64, warp_rows: 8, threads: THREADS, by_tensors: false };

    /// `WGMMA128`, its operands brought by TMA.
    pub(super) const TMA128: Self = Self { name: "tma128", by_tensors: true, ..Self::WGMMA128 };
    /// `WGMMA64`, its operands brought by TMA.
    pub(super) const TMA64: Self = Self { name: "tma64", by_tensors: true, ..Self::WGMMA64 };

    /// That of fprop and dgrad with so many columns.
    pub(super) fn with_columns(columns: u32) -> Option<&'static Self> {
        [&Self::NARROW, &Self::WIDE, &Self::BROAD].into_iter().find(|tile| tile.columns == columns)
    }

    /// The same by wgmma.
    pub(super) fn by_wgmma(columns: u32) -> Option<&'static Self> {
        [&Self::WGMMA64, &Self::WGMMA128].into_iter().find(|tile| tile.columns == columns)
    }

    /// The same by wgmma and TMA.
    pub(super) fn by_tma(columns: u32) -> Option<&'static Self> {
        [&Self::TMA64, &Self::TMA128].into_iter().find(|tile| tile.columns == columns)
    }

    /// Tiles of so many columns next to each other.
    pub(super) const fn groups(&self, columns: u32) -> u32 {
        columns.div_ceil(self.columns)
    }

    /// Bytes of `GemmMemory` where A's values are made of `sources` tensors, and B's of one.
    pub(super) const fn shared(&self, sources: u32) -> u32 {
        let stage = (self.rows * sources + self.columns) * STEP_BYTES;
        let warps = self.threads / 32;
        let warp_columns = self.columns * self.warp_rows / warps;
        let turn_rows = if warp_columns < 64 { 16 } else { 8 };
        let barriers = if self.by_tensors { BARRIERS } else { 0 };
        STAGES * stage + warps * turn_rows * (warp_columns + 8) * 4 + barriers
    }

    /// The same with the pivots of `MomentsEpilogue`.
    pub(super) const fn shared_forward(&self) -> u32 {
        self.shared(1) + self.warp_rows * self.columns * 4
    }
}

/// Elements of a step along the sum.
pub(super) const fn step_elements(element_bytes: usize) -> u32 {
    STEP_BYTES / element_bytes as u32
}

/// `FastDivisor`: quotients by multiplication.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FastDivisor {
    pub(super) divisor: u32,
    multiplier: u32,
    shift: u32,
}

impl FastDivisor {
    /// For a divisor from 1 to 2³¹.
    pub(super) const fn new(divisor: u32) -> Self {
        if divisor == 1 {
            return Self { divisor, multiplier: 0, shift: 0 };
        }
        let log = 32 - (divisor - 1).leading_zeros();
        let multiplier = (1_u64 << (31 + log)).div_ceil(divisor as u64) as u32;
        Self { divisor, multiplier, shift: log - 1 }
    }
}

/// `GemmInput`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct InputArgument {
    data: u64,
    norm: u64,
    gate: u64,
    rows: u32,
    columns: u32,
    pixels: FastDivisor,
    _pad: u32,
}

impl InputArgument {
    /// `rows` of `columns` elements, `pixels` to an image.
    pub(super) fn new<T: RawElement>(
        input: &Input<'_, '_, T>,
        stream: &Arc<CudaStream>,
        rows: u32,
        columns: u32,
        pixels: u32,
    ) -> Self {
        let (data, norm, gate) = match *input {
            Input::Plain(x) => (address(x, stream), 0, 0),
            Input::Silu { y, norm } => (address(y, stream), address(norm, stream), 0),
            Input::Gated { y, norm, gate } => {
                (address(y, stream), address(norm, stream), address(gate, stream))
            }
        };
        Self { data, norm, gate, rows, columns, pixels: FastDivisor::new(pixels), _pad: 0 }
    }
}

/// `GemmGradient`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct GradientArgument {
    g: u64,
    y: u64,
    owed: u64,
    factors: u64,
    rows: u32,
    columns: u32,
    pitch: u32,
    pixels: FastDivisor,
}

impl GradientArgument {
    /// As [`InputArgument::new`]; an arrival through a gate is not known to these kernels.
    pub(super) fn new<T: RawElement>(
        gradient: &GradientView<'_, '_, T>,
        stream: &Arc<CudaStream>,
        rows: u32,
        columns: u32,
        pixels: u32,
    ) -> Self {
        let factors = match gradient.arrival {
            Arrival::Factors(factors) => address(factors, stream),
            Arrival::Alone | Arrival::Gated { .. } => 0,
        };
        let (g, y, owed) =
            (address(gradient.g, stream), address(gradient.y, stream), address(gradient.owed, stream));
        Self { g, y, owed, factors, rows, columns, pitch: columns, pixels: FastDivisor::new(pixels) }
    }

    /// A gradient that owes nothing; `pitch` elements from row to row.
    pub(super) fn plain<T: RawElement>(
        g: &CudaView<'_, T>,
        stream: &Arc<CudaStream>,
        rows: u32,
        columns: u32,
        pitch: u32,
    ) -> Self {
        let g = address(g, stream);
        Self { g, y: g, owed: 0, factors: 0, rows, columns, pitch, pixels: FastDivisor::new(1) }
    }
}

/// `ForwardOutput`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct ForwardArgument {
    pub(super) y: u64,
    pub(super) bias: u64,
    pub(super) skip: u64,
    pub(super) silu: u32,
    pub(super) moments: u32,
}

/// `GradientTarget`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct TargetArgument {
    pub(super) dx: u64,
    pub(super) skip: u64,
    pub(super) y: u64,
    pub(super) norm: u64,
}

/// `GemmGrid`: runs of row tiles, and groups of columns.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grid {
    pub(super) tiles: u32,
    pub(super) runs: u32,
    pub(super) groups: u32,
}

/// Blocks that a grid aims at: several rounds on any GPU.
pub(super) const BLOCKS: u32 = 2048;
/// Runs that the last block of a group can add up in little time.
pub(super) const RUNS: u32 = 512;

impl Grid {
    /// For `rows` × `columns`.
    pub(super) fn new(rows: u32, columns: u32, tile: &Tile) -> Self {
        Self::cut(rows.div_ceil(tile.rows), columns.div_ceil(tile.columns), RUNS)
    }

    /// For so many row tiles and groups of columns.
    pub(super) fn cut(row_tiles: u32, groups: u32, most_runs: u32) -> Self {
        Self::aiming(BLOCKS, row_tiles, groups, most_runs)
    }

    /// The same for about so many blocks.
    pub(super) fn aiming(blocks: u32, row_tiles: u32, groups: u32, most_runs: u32) -> Self {
        let tiles = row_tiles.div_ceil((blocks / groups).clamp(1, most_runs));
        Self { tiles, runs: row_tiles.div_ceil(tiles), groups }
    }

    pub(super) const fn blocks(&self) -> u32 {
        self.runs * self.groups
    }
}

/// `WeightGrid`: how pixels and the weights' gradient are cut.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WeightGrid {
    steps: u32,
    splits: u32,
    row_tiles: u32,
    column_tiles: u32,
}

/// Blocks that a weight gradient aims at unless a tuning says otherwise: two rounds of two on 132 multiprocessors.
pub(super) const WEIGHT_BLOCKS: u32 = 528;
/// Fewest steps of a split, which writes and reads a partial tile for them.
const WEIGHT_STEPS: u32 = 8;
/// Partial tiles that a block adds up: `radix` of the header.
const RADIX: u32 = 16;

impl WeightGrid {
    /// For dW \[height, width\] in tiles of `tile`, summed over `pixels`, `step` of which make a step, in about so many
    /// blocks.
    pub(super) fn aiming(
        blocks: u32,
        pixels: u32,
        [height, width]: [u32; 2],
        tile: &Tile,
        step: u32,
    ) -> Self {
        let (row_tiles, column_tiles) = (height.div_ceil(tile.rows), tile.groups(width));
        let all = pixels.div_ceil(step);
        let steps = all.div_ceil((blocks / (row_tiles * column_tiles)).max(1)).max(WEIGHT_STEPS);
        Self { steps, splits: all.div_ceil(steps), row_tiles, column_tiles }
    }

    /// The same, with `splits` of so many steps.
    pub(super) const fn cut(self, splits: u32, steps: u32) -> Self {
        Self { steps, splits, ..self }
    }

    pub(super) const fn splits(&self) -> u32 {
        self.splits
    }

    /// Of a split.
    #[cfg(test)]
    pub(super) const fn steps(&self) -> u32 {
        self.steps
    }

    pub(super) const fn tiles(&self) -> u32 {
        self.row_tiles * self.column_tiles
    }

    pub(super) const fn blocks(&self) -> u32 {
        self.splits * self.tiles()
    }

    /// Floats of partial tiles, which are those of `tile`.
    pub(super) const fn partial(&self, tile: &Tile) -> usize {
        let of_tile = (tile.rows * tile.columns) as usize;
        if self.splits == 1 { 0 } else { self.blocks() as usize * of_tile }
    }

    pub(super) const fn counters(&self) -> usize {
        if self.splits == 1 { 0 } else { (self.tiles() * (self.splits.div_ceil(RADIX) + 1)) as usize }
    }
}

/// Where a buffer begins on the device.
pub(super) fn address<T>(buffer: &impl DevicePtr<T>, stream: &Arc<CudaStream>) -> u64 {
    buffer.device_ptr(stream).0
}

// SAFETY: these are plain structs of the layout that the kernels declare.
unsafe impl DeviceRepr for InputArgument {}
// SAFETY: as above.
unsafe impl DeviceRepr for GradientArgument {}
// SAFETY: as above.
unsafe impl DeviceRepr for ForwardArgument {}
// SAFETY: as above.
unsafe impl DeviceRepr for TargetArgument {}
// SAFETY: as above.
unsafe impl DeviceRepr for Grid {}
// SAFETY: as above.
unsafe impl DeviceRepr for WeightGrid {}

impl Argument for InputArgument {
    const CODE: &'static str = "{48:8}";
}
impl Argument for GradientArgument {
    const CODE: &'static str = "{56:8}";
}
impl Argument for ForwardArgument {
    const CODE: &'static str = "{32:8}";
}
impl Argument for TargetArgument {
    const CODE: &'static str = "{32:8}";
}
impl Argument for Grid {
    const CODE: &'static str = "{12:4}";
}
impl Argument for WeightGrid {
    const CODE: &'static str = "{16:4}";
}

#[cfg(test)]
mod tests {
    use super::{FastDivisor, Grid, Tile};

    /// As the kernel divides.
    fn quotient(by: FastDivisor, x: u32) -> u32 {
        match by.multiplier {
            0 => x,
            m => ((u64::from(x) * u64::from(m)) >> 32) as u32 >> by.shift,
        }
    }

    #[test]
    fn quotients_are_exact() {
        let divisors = (1..2000).chain((1..31).flat_map(|bit| [(1 << bit) - 1, 1 << bit, (1 << bit) + 1]));
        for divisor in divisors.chain([(1 << 31) - 1, 1 << 31]) {
            let by = FastDivisor::new(divisor);
            let multiples = [1, 2, 3, 1000, (1 << 31) / divisor.max(1)].map(|k: u32| k.wrapping_mul(divisor));
            for x in multiples.into_iter().flat_map(|m| [m.wrapping_sub(1), m, m.wrapping_add(1)]) {
                if x < 1 << 31 {
                    assert_eq!(quotient(by, x), x / divisor, "{x} / {divisor}");
                }
            }
            assert_eq!(quotient(by, (1 << 31) - 1), ((1 << 31) - 1) / divisor, "{divisor}");
        }
    }

    #[test]
    fn runs_cover_all_rows_and_none_is_empty() {
        for rows in (1..3000).chain([65_535, 65_536, 65_537, 1_440_000, 1 << 30]) {
            for columns in [8, 64, 72, 128, 136, 960, 3840] {
                for tile in [Tile::WIDE, Tile::NARROW, Tile::BROAD] {
                    let Grid { tiles, runs, groups } = Grid::new(rows, columns, &tile);
                    assert!((1..=512).contains(&runs), "{rows}");
                    let run = u64::from(tiles * tile.rows);
                    assert!(run * u64::from(runs) >= rows.into(), "{rows}");
                    assert!(run * u64::from(runs - 1) < rows.into(), "{rows}");
                    assert!(groups * tile.columns >= columns && (groups - 1) * tile.columns < columns);
                }
            }
        }
    }
}
