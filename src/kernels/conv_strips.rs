//! The launches of `kernels/include/conv_strips.cuh`: the gradient of a dense 3×3 convolution's weights in f16 and bf16.

use super::gemm::FastDivisor;
use crate::device::Argument;
use crate::device::cudarc::driver::DeviceRepr;
use crate::tensor::Shape;

/// `StripShape`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StripShape {
    height: u32,
    width: u32,
    out_height: u32,
    out_width: u32,
    inputs: u32,
    outputs: u32,
    first_out: i32,
    first_row: i32,
    first_column: i32,
    end_out: i32,
    across: FastDivisor,
    down: FastDivisor,
    steps: u32,
    run: u32,
    pairs: u32,
    warps_m: u32,
    warps_n: u32,
    team_warps: u32,
    teams: u32,
    tiles: u32,
    column_tiles: u32,
    splits: u32,
    pieces: u32,
    x_rows: u32,
    y_pitch: u32,
    x_pitch: u32,
    y_source: u32,
    x_begin: u32,
    stage: u32,
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for StripShape {}

impl Argument for StripShape {
    const CODE: &'static str = "{132:4}";
}

/// Columns of y in a strip.
const COLUMNS: u32 = 8;
/// Pixels of a pair of rows: the k of a product on tensor cores.
const PAIR: u32 = 2 * COLUMNS;
/// Elements of 16 bytes.
const CHUNK: u32 = 8;
const TAPS: u32 = 9;
/// Steps in shared memory.
const STAGES: u32 = 3;
/// `StripKept`, of each thread.
const KEPT: u32 = 16;
/// One block for each multiprocessor of an H100 or H200, of which a block takes all registers.
const BLOCKS: u32 = 132;
/// Pixels of y that a team takes at least: for them it leaves a partial tile.
const LEAST_PIXELS: u32 = 256;
/// Bytes that every GPU since Ampere lends a block.
const SHARED: u32 = 99 << 10;
/// Warps that keep the tensor cores of a multiprocessor busy.
const BUSY: u32 = 8;

/// Threads of the kernels with so many fragments of eight inputs a warp: what the registers of their sums leave room for.
pub(super) const fn threads(fragments: u32) -> u32 {
    if fragments == 3 { 384 } else { 256 }
}

/// What a convolution's shapes are to this gradient.
#[derive(Clone, Copy, Debug)]
pub(super) struct StripProblem {
    pub(super) x: Shape,
    pub(super) y: Shape,
    pub(super) stride: u32,
    pub(super) pad_top: u32,
    pub(super) pad_left: u32,
}

/// How warps share a block: `teams` times `warps_m` × `warps_n`, each 16 outputs and 8 `fragments` inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Layout {
    // In the order in which they are tried: of two that promise the same the first is taken.
    fragments: u32,
    warps_n: u32,
    warps_m: u32,
    teams: u32,
    pairs: u32,
}

impl Layout {
    const fn team_warps(&self) -> u32 {
        self.warps_m * self.warps_n
    }

    /// Columns of x under a strip.
    const fn columns(stride: u32) -> u32 {
        COLUMNS * stride + 3 - stride
    }

    /// Pixels of x under a pair of rows of y.
    const fn window(stride: u32) -> u32 {
        2 * stride * Self::columns(stride)
    }

    /// Pieces of 16 bytes that a tile takes of a pixel of x.
    const fn pieces(&self) -> u32 {
        self.fragments * self.warps_n
    }

    /// Rows of x that a team fetches at once, a piece a thread.
    const fn x_rows(&self, stride: u32) -> u32 {
        32 * self.team_warps() / (Self::columns(stride) * self.pieces())
    }

    /// Elements from pixel to pixel of g and y: an odd number of chunks.
    const fn y_pitch(&self) -> u32 {
        ((2 * self.warps_m) | 1) * CHUNK
    }

    /// The same of x.
    const fn x_pitch(&self) -> u32 {
        (self.pieces() | 1) * CHUNK
    }

    /// Elements of g and y in a step.
    const fn x_begin(&self) -> u32 {
        2 * self.pairs * PAIR * self.y_pitch()
    }

    /// Elements of a step.
    const fn stage(&self, stride: u32) -> u32 {
        self.x_begin() + self.pairs * Self::window(stride) * self.x_pitch()
    }

    const fn shared(&self, stride: u32) -> u32 {
        2 * self.teams * STAGES * self.stage(stride) + KEPT * threads(self.fragments)
    }

    /// Tiles along outputs and inputs.
    fn tiles(&self, problem: &StripProblem) -> [u32; 2] {
        let [outputs, inputs] = [problem.y.c as u32, problem.x.c as u32];
        [outputs.div_ceil(16 * self.warps_m), inputs.div_ceil(CHUNK * self.pieces())]
    }

    /// About how long a multiprocessor of an H100 is about 16 pixels of y and all tiles, in 1/2100 cycles: the longest
    /// of its three limits, and their sum. A product of a warp takes the tensor cores 1.6 cycles, dead outputs and inputs
    /// included; four instructions are issued a cycle, about 78 for two rows besides the products and 150 for a step; 24 bytes
    /// come from L2. Fewer warps than keep a multiprocessor busy take longer.
    fn price(&self, problem: &StripProblem) -> [u64; 2] {
        let [row_tiles, column_tiles] = self.tiles(problem);
        let warps = u64::from(row_tiles * column_tiles * self.team_warps());
        let busy = u64::from((self.team_warps() * self.teams).min(BUSY));
        let products = u64::from(TAPS * self.fragments);
        let instructions = products + 78 + 150 / u64::from(self.pairs);
        // 840 is a multiple of all numbers to 8, and 2100 = 840 * 20 / 8.
        let tensor = 840 / busy * warps * products * 32;
        let issue = 840 / busy * warps * instructions * 5;
        let bytes = 64 * u64::from(column_tiles) * problem.y.c as u64
            + 2 * u64::from(row_tiles * Self::window(problem.stride)) * problem.x.c as u64;
        let fetch = bytes * 2100 / 24;
        [tensor.max(issue).max(fetch), tensor + issue + fetch]
    }

    /// The one for a problem that is in this place, the best being 0; the last if there are not so many.
    fn of(problem: &StripProblem, place: usize) -> Self {
        let mut all = Vec::new();
        for fragments in 3..=5 {
            let warps = threads(fragments) / 32;
            for warps_n in 1..=warps {
                for warps_m in 1..=warps / warps_n {
                    let team = warps_m * warps_n;
                    let layouts = (1..=warps / team).flat_map(|teams| {
                        (1..=3).map(move |pairs| Self { fragments, warps_m, warps_n, teams, pairs })
                    });
                    let fits = |layout: &Self| {
                        layout.shared(problem.stride) <= SHARED && layout.x_rows(problem.stride) > 0
                    };
                    all.extend(layouts.filter(fits).map(|layout| (layout.price(problem), layout)));
                }
            }
        }
        // Of the same price the one of the fewest fragments, and so on.
        let place = place.min(all.len() - 1);
        all.select_nth_unstable_by_key(place, |&(price, layout)| (price, layout)).1.1
    }
}

/// A gradient's launches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strips {
    pub(super) shape: StripShape,
    pub(super) fragments: u32,
    stride: u32,
    /// Of a block, in bytes; at the end the sums of all teams but one lie there, tap by tap, which is less.
    pub(super) shared: u32,
}

impl Strips {
    pub(super) fn new(problem: &StripProblem, place: usize) -> Self {
        let StripProblem { x, y, stride, pad_top, pad_left } = *problem;
        let layout = Layout::of(problem, place);
        let Layout { fragments, warps_m, warps_n, teams, pairs } = layout;
        let [row_tiles, column_tiles] = layout.tiles(problem);
        let tiles = row_tiles * column_tiles;
        // With stride 1 the first rows of x are those of the image; with stride 2 those under the first row of y.
        let (above, stride_rows) = (pad_top as i32, stride as i32);
        let (first_out, top) = if stride == 1 { (above, 0) } else { (0, -above) };
        let last = (x.h as i32 - 1).min((y.h as i32 - 1) * stride_rows + 2 - above);
        let rows = (last - top + 1).unsigned_abs().div_ceil(stride);
        let (down, across) = (rows.div_ceil(2 * pairs), (y.w as u32).div_ceil(COLUMNS));
        let steps = y.n as u32 * across * down;
        let least = LEAST_PIXELS / (PAIR * pairs);
        let most = (BLOCKS / tiles).min(steps / (teams * least)).max(1);
        let run = steps.div_ceil(most * teams);
        let shape = StripShape {
            height: x.h as u32,
            width: x.w as u32,
            out_height: y.h as u32,
            out_width: y.w as u32,
            inputs: x.c as u32,
            outputs: y.c as u32,
            first_out,
            first_row: -above,
            first_column: -(pad_left as i32),
            end_out: first_out + rows as i32,
            across: FastDivisor::new(across),
            down: FastDivisor::new(down),
            steps,
            run,
            pairs,
            warps_m,
            warps_n,
            team_warps: layout.team_warps(),
            teams,
            tiles,
            column_tiles,
            splits: steps.div_ceil(run * teams),
            pieces: layout.pieces(),
            x_rows: layout.x_rows(stride),
            y_pitch: layout.y_pitch(),
            x_pitch: layout.x_pitch(),
            y_source: layout.x_begin() / 2,
            x_begin: layout.x_begin(),
            stage: layout.stage(stride),
        };
        Self { shape, fragments, stride, shared: layout.shared(stride) }
    }

    /// Inputs of a warp and the stride, as kernels are named.
    pub(super) fn name(&self) -> String {
        format!("{}_s{}", CHUNK * self.fragments, self.stride)
    }

    pub(super) const fn blocks(&self) -> u32 {
        self.shape.splits * self.shape.tiles
    }

    /// Fragments of all tiles: the blocks that add up.
    pub(super) const fn pieces(&self) -> u32 {
        self.shape.tiles * self.shape.team_warps * TAPS * self.fragments
    }

    /// Floats of partial tiles.
    pub(super) const fn partial(&self) -> usize {
        self.shape.splits as usize * self.pieces() as usize * 128
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(images: usize, side: usize, stride: usize, inputs: usize, outputs: usize) -> StripProblem {
        let out = side.div_ceil(stride);
        let pad = (((out - 1) * stride + 3).saturating_sub(side) / 2) as u32;
        StripProblem {
            x: Shape::new(images, side, side, inputs),
            y: Shape::new(images, out, out, outputs),
            stride: stride as u32,
            pad_top: pad,
            pad_left: pad,
        }
    }

    #[test]
    fn the_struct_is_as_large_as_its_code_says() {
        assert_eq!(size_of::<StripShape>(), 132);
    }

    /// The convolutions of S, M, L and XL: no product with dead inputs or more dead outputs than fill 16, and nearly all
    /// multiprocessors at work.
    #[test]
    fn tiles_of_the_paper_s_networks_waste_nothing() {
        for (side, stride, inputs, outputs, [fragments, warps_m, warps_n, teams, pairs]) in [
            (150, 1, 24, 24, [3, 2, 1, 4, 2]),
            (150, 2, 24, 96, [3, 6, 1, 2, 1]),
            (75, 1, 48, 192, [3, 6, 2, 1, 3]),
            (75, 2, 48, 192, [3, 6, 2, 1, 2]),
            (38, 1, 64, 256, [4, 4, 2, 1, 3]),
            (48, 1, 80, 320, [5, 4, 2, 1, 3]),
            (192, 1, 32, 32, [4, 2, 1, 4, 1]),
            (192, 2, 32, 128, [4, 8, 1, 1, 2]),
            (96, 2, 64, 256, [4, 8, 1, 1, 2]),
            (48, 1, 96, 384, [3, 3, 4, 1, 3]),
        ] {
            let problem = problem(256, side, stride, inputs, outputs);
            let what = format!("{inputs} to {outputs}, stride {stride}");
            assert_eq!(
                Layout::of(&problem, 0),
                Layout { fragments, warps_m, warps_n, teams, pairs },
                "{what}"
            );
            let strips = Strips::new(&problem, 0);
            let tiles = strips.shape.tiles * strips.shape.team_warps;
            assert_eq!(
                tiles * 16 * CHUNK * fragments,
                (outputs.next_multiple_of(16) * inputs) as u32,
                "{what}"
            );
            assert!((126..=132).contains(&strips.blocks()), "{what}: {strips:?}");
        }
    }

    /// Every step is of one team, no block is without any, and what a block asks for fits.
    #[test]
    fn teams_cover_all_steps() {
        for stride in [1, 2] {
            for (images, side) in [(1, 1), (1, 2), (3, 7), (2, 19), (1, 130), (64, 75), (256, 150)] {
                for (inputs, outputs) in [(8, 8), (24, 24), (200, 8), (8, 200), (48, 136), (512, 1024)] {
                    let strips = Strips::new(&problem(images, side, stride, inputs, outputs), 0);
                    let StripShape { steps, run, splits, teams, team_warps, .. } = strips.shape;
                    let of_block = run * teams;
                    assert!(of_block * splits >= steps && of_block * (splits - 1) < steps, "{strips:?}");
                    assert!(strips.shared <= SHARED && team_warps * teams * 32 <= threads(strips.fragments));
                    let sums = (teams - 1) * team_warps * strips.fragments * 512;
                    assert!(sums <= strips.shared, "{strips:?}");
                    assert!(splits == 1 || strips.blocks() <= BLOCKS, "{strips:?}");
                }
            }
        }
    }
}
