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
    first_row: i32,
    first_out: i32,
    first_column: i32,
    across: FastDivisor,
    down: FastDivisor,
    pieces: FastDivisor,
    steps: u32,
    run: u32,
    pairs: u32,
    stages: u32,
    warps_m: u32,
    warps_n: u32,
    team_warps: u32,
    teams: u32,
    tiles: u32,
    column_tiles: u32,
    splits: u32,
    y_pitch: u32,
    x_pitch: u32,
    y_source: u32,
    x_begin: u32,
    stage: u32,
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for StripShape {}

impl Argument for StripShape {
    const CODE: &'static str = "{136:4}";
}

/// Columns of y in a strip.
const COLUMNS: u32 = 8;
/// Pixels of a pair of rows: the k of a product on tensor cores.
const PAIR: u32 = 2 * COLUMNS;
/// Elements of 16 bytes.
const CHUNK: u32 = 8;
const TAPS: u32 = 9;
/// One block for each multiprocessor of an H100 or H200, of which a block takes all registers.
const BLOCKS: u32 = 132;
/// Pixels of y that a team takes at least: for them it leaves a partial tile.
const LEAST_PIXELS: u32 = 256;
/// What every GPU since Ampere lends a block.
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    fragments: u32,
    warps_m: u32,
    warps_n: u32,
    teams: u32,
    pairs: u32,
    stages: u32,
}

impl Layout {
    const fn team_warps(&self) -> u32 {
        self.warps_m * self.warps_n
    }

    /// Pixels of x under a pair of rows of y.
    const fn window(stride: u32) -> u32 {
        2 * stride * (COLUMNS * stride + 3 - stride)
    }

    /// Elements from pixel to pixel of g and y: an odd number of chunks.
    const fn y_pitch(&self) -> u32 {
        (2 * self.warps_m | 1) * CHUNK
    }

    /// The same of x.
    const fn x_pitch(&self) -> u32 {
        (self.fragments * self.warps_n | 1) * CHUNK
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
        2 * self.teams * self.stages * self.stage(stride)
    }

    /// Tiles along outputs and inputs.
    fn tiles(&self, problem: &StripProblem) -> [u32; 2] {
        let [outputs, inputs] = [problem.y.c as u32, problem.x.c as u32];
        [outputs.div_ceil(16 * self.warps_m), inputs.div_ceil(CHUNK * self.fragments * self.warps_n)]
    }

    /// What is compared: products with those of dead outputs and inputs, and more if warps are idle that are needed; then
    /// the bytes that are fetched for eight pixels of y; then partial sums.
    fn price(&self, problem: &StripProblem) -> [u64; 3] {
        let [row_tiles, column_tiles] = self.tiles(problem);
        let tile = 128 * self.team_warps() * self.fragments;
        let busy = (self.team_warps() * self.teams).min(BUSY);
        // 840 is a multiple of all numbers to 8.
        let products = u64::from(row_tiles * column_tiles * tile) * u64::from(840 / busy);
        let fetched = 16 * column_tiles * problem.y.c as u32
            + row_tiles * Self::window(problem.stride) * problem.x.c as u32;
        [products, fetched.into(), tile.into()]
    }

    /// The best one for a problem.
    fn of(problem: &StripProblem) -> Self {
        let mut best: Option<([u64; 3], Self)> = None;
        for fragments in 3..=5 {
            let warps = threads(fragments) / 32;
            for warps_n in 1..=warps {
                for warps_m in 1..=warps / warps_n {
                    let team = warps_m * warps_n;
                    let layouts = (1..=warps / team).rev().flat_map(|teams| {
                        [(2, 4), (2, 3), (1, 4), (1, 3)].map(|(pairs, stages)| Self {
                            fragments,
                            warps_m,
                            warps_n,
                            teams,
                            pairs,
                            stages,
                        })
                    });
                    for layout in layouts {
                        let price = layout.price(problem);
                        let fits = layout.shared(problem.stride) <= SHARED;
                        if fits && best.as_ref().is_none_or(|(least, _)| price < *least) {
                            best = Some((price, layout));
                        }
                    }
                }
            }
        }
        best.expect("a team of one warp fits").1
    }
}

/// A gradient's launches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strips {
    pub(super) shape: StripShape,
    pub(super) fragments: u32,
    stride: u32,
}

impl Strips {
    pub(super) fn new(problem: &StripProblem) -> Self {
        let StripProblem { x, y, stride, pad_top, pad_left } = *problem;
        let layout = Layout::of(problem);
        let Layout { fragments, warps_m, warps_n, teams, pairs, stages } = layout;
        let [row_tiles, column_tiles] = layout.tiles(problem);
        let tiles = row_tiles * column_tiles;
        // With stride 1 the first rows of x are those of the image; with stride 2 those under the first two of y.
        let (first_row, first_out) = if stride == 1 { (0, pad_top as i32) } else { (-(pad_top as i32), 0) };
        let last_row = (x.h as i32 - 1).min(((y.h as u32 - 1) * stride + 2) as i32 - pad_top as i32);
        let down = (last_row - first_row + 1).unsigned_abs().div_ceil(2 * pairs * stride);
        let across = (y.w as u32).div_ceil(COLUMNS);
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
            first_row,
            first_out,
            first_column: -(pad_left as i32),
            across: FastDivisor::new(across),
            down: FastDivisor::new(down),
            pieces: FastDivisor::new(fragments * warps_n),
            steps,
            run,
            pairs,
            stages,
            warps_m,
            warps_n,
            team_warps: layout.team_warps(),
            teams,
            tiles,
            column_tiles,
            splits: steps.div_ceil(run * teams),
            y_pitch: layout.y_pitch(),
            x_pitch: layout.x_pitch(),
            y_source: layout.x_begin() / 2,
            x_begin: layout.x_begin(),
            stage: layout.stage(stride),
        };
        Self { shape, fragments, stride }
    }

    /// Inputs of a warp and the stride, as kernels are named.
    pub(super) fn name(&self) -> String {
        format!("{}_s{}", CHUNK * self.fragments, self.stride)
    }

    pub(super) const fn blocks(&self) -> u32 {
        self.shape.splits * self.shape.tiles
    }

    /// Of a block; at the end the sums of all teams but one lie there, tap by tap, which is less.
    pub(super) const fn shared(&self) -> u32 {
        2 * self.shape.teams * self.shape.stages * self.shape.stage
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
        assert_eq!(size_of::<StripShape>(), 136);
    }

    /// The convolutions of S, M, L and XL: no product with dead channels, and all multiprocessors at work.
    #[test]
    fn tiles_of_the_paper_s_networks_waste_nothing() {
        for (side, stride, inputs, outputs, expected) in [
            (150, 1, 24, 24, (3, 2, 1, 6)),
            (150, 2, 24, 96, (3, 6, 1, 2)),
            (75, 1, 48, 192, (3, 6, 2, 1)),
            (75, 2, 48, 192, (3, 6, 2, 1)),
            (38, 1, 64, 256, (4, 4, 2, 1)),
            (48, 1, 80, 320, (5, 4, 2, 1)),
            (192, 1, 32, 32, (4, 2, 1, 4)),
            (192, 2, 32, 128, (4, 8, 1, 1)),
            (96, 2, 64, 256, (4, 4, 2, 1)),
            (48, 1, 96, 384, (3, 3, 4, 1)),
        ] {
            let problem = problem(256, side, stride, inputs, outputs);
            let Layout { fragments, warps_m, warps_n, teams, .. } = Layout::of(&problem);
            assert_eq!(
                (fragments, warps_m, warps_n, teams),
                expected,
                "{inputs} to {outputs}, stride {stride}"
            );
            let strips = Strips::new(&problem);
            let shape = strips.shape;
            let outputs = (outputs as u32).next_multiple_of(16);
            assert_eq!(shape.tiles * shape.team_warps * 16 * CHUNK * fragments, outputs * inputs as u32);
            assert!((126..=132).contains(&strips.blocks()), "{shape:?}");
        }
    }

    /// Every step is of one team, no block is without any, and what a block asks for fits.
    #[test]
    fn teams_cover_all_steps() {
        for stride in [1, 2] {
            for (images, side) in [(1, 1), (1, 2), (3, 7), (2, 19), (1, 130), (64, 75), (256, 150)] {
                for (inputs, outputs) in [(8, 8), (24, 24), (200, 8), (8, 200), (48, 136), (512, 1024)] {
                    let strips = Strips::new(&problem(images, side, stride, inputs, outputs));
                    let StripShape { steps, run, splits, teams, team_warps, .. } = strips.shape;
                    let of_block = run * teams;
                    assert!(of_block * splits >= steps && of_block * (splits - 1) < steps, "{strips:?}");
                    assert!(
                        strips.shared() <= SHARED && team_warps * teams * 32 <= threads(strips.fragments)
                    );
                    let sums = (teams - 1) * team_warps * strips.fragments * 512;
                    assert!(sums <= strips.shared(), "{strips:?}");
                    assert!(splits == 1 || strips.blocks() <= BLOCKS, "{strips:?}");
                }
            }
        }
    }
}
