//! Both gradients of a pointwise convolution in one pass over its tensors: how a shape is cut for it. What it computes is in
//! `kernels/pointwise_one_pass.cu`; [`Pointwise::backward`](super::pointwise::Pointwise::backward) takes it where it moves
//! fewer bytes than the launch that reads them twice.
//!
//! A block keeps its part of the weights' gradient in registers and the weights in shared memory, so it is for f16 and bf16
//! with at most 128 outputs. The inputs are cut into the fewest groups that fit; each reads the gradient of the output
//! again. The pixels are cut into runs so long that partial results come to about a sixteenth of the rest, if that leaves a
//! GPU enough blocks. All of it follows from the shape, so results are the same on every GPU.

use super::gemm::THREADS;
use super::operand::{GradientKind, InputKind};
use crate::device::cudarc::driver::DeviceRepr;
use crate::device::{Argument, Entry, Family};
use crate::tensor::{Dtype, Shape};

const SIGNATURE: &str = "{56:8}p{32:8}{48:8}p{24:4}{40:8}ppp";

const fn entry(name: &'static str) -> Entry {
    Entry { name, signature: SIGNATURE, threads: THREADS }
}

/// The kernels of `kernels/pointwise_one_pass.cu`.
pub const FAMILY: Family = Family {
    name: "pointwise_one_pass",
    kernels: &[
        entry("pointwise_one_pass_n64_f16"),
        entry("pointwise_one_pass_n64_bf16"),
        entry("pointwise_one_pass_n128_f16"),
        entry("pointwise_one_pass_n128_bf16"),
        entry("pointwise_one_pass_gated_n64_f16"),
        entry("pointwise_one_pass_gated_n64_bf16"),
        entry("pointwise_one_pass_gated_n128_f16"),
        entry("pointwise_one_pass_gated_n128_bf16"),
    ],
};

/// `OnePassGrid`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OnePassGrid {
    rows: u32,
    units: u32,
    pub(super) runs: u32,
    pub(super) groups: u32,
    columns: u32,
    tile: u32,
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for OnePassGrid {}

impl Argument for OnePassGrid {
    const CODE: &'static str = "{24:4}";
}

/// Outputs that fit a block of the smaller kernels, and of the larger.
const OUTPUTS: [u32; 2] = [64, 128];
/// Inputs of a group: eight warps have 32 each.
const COLUMNS: u32 = 256;
const WARPS: u32 = THREADS / 32;
/// Pixels that a warp has at a time.
const WARP_ROWS: u32 = 16;
/// Pixels of a tile at least.
const TILE_ROWS: u32 = 32;
/// Dynamic shared memory of a block at most: what every GPU from sm_80 on has, less what the kernels declare.
pub(super) const SHARED: u32 = 97 * 1024;
/// Blocks of a launch at most: two rounds of two on 132 multiprocessors.
const BLOCKS: u32 = 528;
/// Blocks that a GPU should have at least.
pub(super) const BUSY: u32 = 132;
/// Runs that the last block of a group can add up in little time.
const RUNS: u32 = 512;
/// Partial results that one block adds up: `radix` of `kernels/include/gemm_weight.cuh`.
const RADIX: u32 = 16;

/// The launch for one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OnePass {
    pub(super) grid: OnePassGrid,
    pub(super) kernel: &'static str,
    pub(super) shared: u32,
    inputs: u32,
    outputs: u32,
    gated: bool,
}

impl OnePass {
    /// None if it is for another type, other operands, or more channels.
    pub(super) fn new(
        x: Shape,
        outputs: usize,
        dtype: Dtype,
        input: InputKind,
        output: GradientKind,
    ) -> Option<Self> {
        // One tensor has to be what is multiplied and what the gradient passes through.
        let (gated, skip) = match (input, output) {
            (InputKind::Plain, GradientKind::Plain { skip }) => (false, skip),
            (InputKind::Silu, GradientKind::Silu) => (false, false),
            (InputKind::Gated, GradientKind::Gated) => (true, false),
            _ => return None,
        };
        let (inputs, outputs) = (x.c as u32, u32::try_from(outputs).ok()?);
        let large = OUTPUTS.iter().position(|&most| outputs <= most)?;
        let kernel = match (dtype, gated, large) {
            (Dtype::F16, false, 0) => "pointwise_one_pass_n64_f16",
            (Dtype::F16, false, _) => "pointwise_one_pass_n128_f16",
            (Dtype::F16, true, 0) => "pointwise_one_pass_gated_n64_f16",
            (Dtype::F16, true, _) => "pointwise_one_pass_gated_n128_f16",
            (Dtype::Bf16, false, 0) => "pointwise_one_pass_n64_bf16",
            (Dtype::Bf16, false, _) => "pointwise_one_pass_n128_bf16",
            (Dtype::Bf16, true, 0) => "pointwise_one_pass_gated_n64_bf16",
            (Dtype::Bf16, true, _) => "pointwise_one_pass_gated_n128_bf16",
            (Dtype::F32 | Dtype::Tf32, ..) => return None,
        };
        let cuts = (1..=inputs.div_ceil(16)).map(|groups| inputs.div_ceil(groups).next_multiple_of(16));
        let (columns, tile, shared) = cuts.filter(|&columns| columns <= COLUMNS).find_map(|columns| {
            let tiles = [8, 4, 2].map(|warps| warps * WARP_ROWS);
            let most = (WARPS / warps_along(columns) * WARP_ROWS).max(TILE_ROWS);
            let fitting = tiles
                .into_iter()
                .filter(|&tile| tile <= most)
                .map(|tile| (columns, tile, shared(outputs, columns, tile, skip, gated)));
            fitting.into_iter().find(|&(.., shared)| shared <= SHARED)
        })?;
        let groups = inputs.div_ceil(columns);
        let (pixels, image) = (x.pixels() as u64, (x.h * x.w) as u64);
        // Of a run: 8 bytes for each weight, 4 and more for each pixel and channel.
        let (n, k) = (u64::from(outputs), u64::from(inputs));
        let worthwhile = (32 * n * k).div_ceil(n + k);
        let least = pixels.div_ceil(u64::from((BLOCKS / groups).clamp(1, RUNS)));
        let good = worthwhile.min(pixels / u64::from(BUSY.div_ceil(groups)));
        // Runs are of whole images or of whole tiles.
        let unit = if gated { image } else { tile.into() };
        let rows = least.next_multiple_of(unit).max(good / unit * unit);
        let (rows, units) = if gated { (image, rows / image) } else { (rows, 1) };
        let runs = pixels.div_ceil(rows * units);
        let [rows, units, runs] = [rows, units, runs].map(|count| count as u32);
        let grid = OnePassGrid { rows, units, runs, groups, columns, tile };
        Some(Self { grid, kernel, shared, inputs, outputs, gated })
    }

    pub(super) const fn blocks(&self) -> u32 {
        self.grid.runs * self.grid.groups
    }

    /// Floats of partial sums.
    const fn sums(&self) -> usize {
        if self.gated { 0 } else { 2 * self.grid.runs as usize * self.inputs as usize }
    }

    /// Floats of partial results of the weights' gradient.
    pub(super) const fn partial(&self) -> usize {
        self.grid.runs as usize * (self.inputs * self.outputs) as usize
    }

    /// Floats of a workspace.
    pub(super) const fn floats(&self) -> usize {
        self.sums() + self.partial()
    }

    /// Counters: of each group for its sums, for every [`RADIX`] runs, and for those.
    pub(super) const fn counters(&self) -> usize {
        (self.grid.groups * (self.grid.runs.div_ceil(RADIX) + 2)) as usize
    }
}

/// Warps along the inputs of a group.
const fn warps_along(columns: u32) -> u32 {
    columns.div_ceil(32).next_power_of_two()
}

/// Bytes of `OnePassMemory`.
const fn shared(outputs: u32, columns: u32, tile: u32, skip: bool, gated: bool) -> u32 {
    let depth = outputs.next_multiple_of(16);
    let (dy_pitch, x_pitch) = (depth + 8, columns + 8);
    let stage = tile * (2 * dy_pitch + if skip { 2 } else { 1 } * x_pitch);
    let sums = if gated { 5 } else { 2 };
    2 * (2 * stage + depth * x_pitch) + 4 * (3 * columns + WARPS * sums * 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [(InputKind, GradientKind); 4] = [
        (InputKind::Plain, GradientKind::Plain { skip: false }),
        (InputKind::Plain, GradientKind::Plain { skip: true }),
        (InputKind::Silu, GradientKind::Silu),
        (InputKind::Gated, GradientKind::Gated),
    ];

    fn each(mut check: impl FnMut(Shape, &OnePass)) {
        for (n, side) in [(1, 1), (1, 7), (3, 19), (64, 10), (256, 75), (1000, 3)] {
            for inputs in (8..600).step_by(8).chain([1024, 3840]) {
                for outputs in (8..=128).step_by(8) {
                    for (input, output) in KINDS {
                        let x = Shape::new(n, side, side, inputs);
                        check(x, &OnePass::new(x, outputs, Dtype::Bf16, input, output).unwrap());
                    }
                }
            }
        }
    }

    #[test]
    fn runs_and_groups_cover_all_and_none_is_empty() {
        each(|x, pass| {
            let OnePassGrid { rows, units, runs, groups, columns, tile } = pass.grid;
            assert!(
                columns % 16 == 0 && columns <= COLUMNS && tile % 16 == 0 && THREADS.is_multiple_of(tile)
            );
            assert!(groups * columns >= pass.inputs && (groups - 1) * columns < pass.inputs);
            let (run, pixels) = (u64::from(rows) * u64::from(units), x.pixels() as u64);
            assert!(run * u64::from(runs) >= pixels && run * u64::from(runs - 1) < pixels);
            assert!(runs <= RUNS, "{x}: {pass:?}");
            assert!(!pass.gated || u64::from(rows) == (x.h * x.w) as u64);
            assert!(pass.gated || units == 1);
        });
    }

    /// The weights' gradient takes the place of the stages and of the weights.
    #[test]
    fn shared_memory_is_enough_for_the_gradient_of_the_weights() {
        each(|_, pass| {
            let columns = pass.grid.columns;
            let others = 4 * (3 * columns + WARPS * if pass.gated { 5 } else { 2 } * 32);
            assert!(4 * pass.outputs * columns <= pass.shared - others, "{pass:?}");
            assert!(pass.shared <= SHARED);
        });
    }

    #[test]
    fn other_operands_are_left_to_two_passes() {
        let x = Shape::new(8, 9, 9, 96);
        let of = |outputs, dtype, input, output| OnePass::new(x, outputs, dtype, input, output);
        let (plain, silu) = (GradientKind::Plain { skip: false }, GradientKind::Silu);
        assert!(of(128, Dtype::F16, InputKind::Silu, silu).is_some());
        assert!(of(128, Dtype::F32, InputKind::Silu, silu).is_none());
        assert!(of(136, Dtype::F16, InputKind::Silu, silu).is_none());
        assert!(of(128, Dtype::F16, InputKind::Plain, silu).is_none());
        assert!(of(128, Dtype::F16, InputKind::Silu, plain).is_none());
    }
}
