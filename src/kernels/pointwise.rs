//! Pointwise (1×1) convolution in all three directions, and the classifier. Formulas, shapes and bytes are in
//! `kernels/pointwise.cu`.
//!
//! What a tensor still owes is paid while it is read ([`Input`], [`GradientView`]), and what batch norm needs of a tensor
//! is taken while it is written ([`Output`], [`GradientOutput`]).
//!
//! Tiles. A block computes 128 rows (pixels) and 128 or 64 columns (channels) at a time, or 64 rows and 256 columns. f32 and
//! tf32 have 64 columns; so have f16 and bf16 where there are no more, or where 128 would leave fewer than 132 blocks for the
//! GPU. Otherwise 128: the rows are then read, and what they owe is computed, half as often; or, where they owe something and
//! 256 columns are no more products than twice 128, 256. Weight gradients are computed in tiles of 64 outputs × 128 inputs, or
//! 256 by the same rule, the pixels being cut so that there are about 528 blocks, or 396 of the larger ones. All of it
//! follows from the shape, so results are the same on every GPU, unless a [tuning](super::tuning) chooses otherwise.
//!
//! Both gradients come of one launch. It reads what they are made of once ([`Passes::One`], `pointwise_one_pass`) where
//! channels are few enough and that moves clearly fewer bytes, partial results and what column groups read again included.
//! Otherwise each has blocks of its own: those of one gradient before those of the other ([`Passes::Two`]) or, where
//! the operands are more than a cache holds, so in each of several windows of the pixels ([`Passes::Interleaved`]).
//! These are as many bytes asked for, but the second time soon after the first, when a cache may still have them.

use super::gemm::{
    BLOCKS, ForwardArgument, GradientArgument, Grid, InputArgument, RUNS, THREADS, TargetArgument, Tile,
    WEIGHT_BLOCKS, WeightGrid, address, step_elements,
};
use super::operand::{
    Arrival, GradientKind, GradientOutput, GradientView, Input, InputKind, NormFinish, Output, OutputKind,
    OwedFinish,
};
use super::pointwise_one_pass::{self, BUSY, OnePass};
use super::raw::{RawElement, check_shape, check_storage};
use super::tuning::{Choice, Choices, Launch, Way};
use super::work::{Cost, Work};
use super::workspace::Workspace;
use crate::backend::Activation;
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr};
use crate::device::{Argument, Device, Entry, Family, Kernel, Operands, TensorMap};
use crate::tensor::{Dtype, MAX_ELEMENTS, Shape};
use crate::{Error, Result};
use std::marker::PhantomData;
use std::sync::Arc;

const FPROP: &str = "{48:8}p{32:8}I{12:4}{56:8}pp";
const TENSOR_FPROP: &str = "{128:128}{128:128}{32:8}III{12:4}{56:8}pp";
const DGRAD: &str = "{56:8}p{32:8}I{12:4}{40:8}pp";
const GATED: &str = "{56:8}p{32:8}I{12:4}p";
const WGRAD: &str = "{56:8}{48:8}p{16:4}pp";
const BACKWARD: &str = "{56:8}p{32:8}{48:8}p{12:4}{16:4}{12:4}{40:8}ppp";
const BIAS: &str = "pppIII";

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: THREADS }
}

/// The kernels of `kernels/pointwise.cu`.
pub const FAMILY: Family = Family {
    name: "pointwise",
    kernels: &[
        entry("pointwise_fprop_narrow_f32", FPROP),
        entry("pointwise_fprop_narrow_tf32", FPROP),
        entry("pointwise_fprop_narrow_f16", FPROP),
        entry("pointwise_fprop_narrow_bf16", FPROP),
        entry("pointwise_fprop_wide_f16", FPROP),
        entry("pointwise_fprop_wide_bf16", FPROP),
        entry("pointwise_fprop_broad_f16", FPROP),
        entry("pointwise_fprop_broad_bf16", FPROP),
        entry("pointwise_fprop_wgmma64_f16", FPROP),
        entry("pointwise_fprop_wgmma64_bf16", FPROP),
        entry("pointwise_fprop_wgmma128_f16", FPROP),
        entry("pointwise_fprop_wgmma128_bf16", FPROP),
        entry("pointwise_fprop_tma64_f16", TENSOR_FPROP),
        entry("pointwise_fprop_tma64_bf16", TENSOR_FPROP),
        entry("pointwise_fprop_tma128_f16", TENSOR_FPROP),
        entry("pointwise_fprop_tma128_bf16", TENSOR_FPROP),
        entry("pointwise_dgrad_narrow_f32", DGRAD),
        entry("pointwise_dgrad_narrow_tf32", DGRAD),
        entry("pointwise_dgrad_narrow_f16", DGRAD),
        entry("pointwise_dgrad_narrow_bf16", DGRAD),
        entry("pointwise_dgrad_wide_f16", DGRAD),
        entry("pointwise_dgrad_wide_bf16", DGRAD),
        entry("pointwise_dgrad_broad_f16", DGRAD),
        entry("pointwise_dgrad_broad_bf16", DGRAD),
        entry("pointwise_dgrad_wgmma64_f16", DGRAD),
        entry("pointwise_dgrad_wgmma64_bf16", DGRAD),
        entry("pointwise_dgrad_gated_f32", GATED),
        entry("pointwise_dgrad_gated_tf32", GATED),
        entry("pointwise_dgrad_gated_f16", GATED),
        entry("pointwise_dgrad_gated_bf16", GATED),
        entry("pointwise_wgrad_low_f32", WGRAD),
        entry("pointwise_wgrad_low_tf32", WGRAD),
        entry("pointwise_wgrad_low_f16", WGRAD),
        entry("pointwise_wgrad_low_bf16", WGRAD),
        entry("pointwise_wgrad_broad_f16", WGRAD),
        entry("pointwise_wgrad_broad_bf16", WGRAD),
        entry("pointwise_backward_narrow_f32", BACKWARD),
        entry("pointwise_backward_narrow_tf32", BACKWARD),
        entry("pointwise_backward_narrow_f16", BACKWARD),
        entry("pointwise_backward_narrow_bf16", BACKWARD),
        entry("pointwise_backward_wide_f16", BACKWARD),
        entry("pointwise_backward_wide_bf16", BACKWARD),
        entry("pointwise_backward_broad_f16", BACKWARD),
        entry("pointwise_backward_broad_bf16", BACKWARD),
        entry("pointwise_backward_wgmma64_f16", BACKWARD),
        entry("pointwise_backward_wgmma64_bf16", BACKWARD),
        entry("pointwise_backward_gated_f32", BACKWARD),
        entry("pointwise_backward_gated_tf32", BACKWARD),
        entry("pointwise_backward_gated_f16", BACKWARD),
        entry("pointwise_backward_gated_bf16", BACKWARD),
        entry("pointwise_backward_gated_broad_f16", BACKWARD),
        entry("pointwise_backward_gated_broad_bf16", BACKWARD),
        entry("pointwise_classifier_bias_f32", BIAS),
        entry("pointwise_classifier_bias_f16", BIAS),
        entry("pointwise_classifier_bias_bf16", BIAS),
    ],
};

const OPERATION: &str = "pointwise convolution";
const CLASSIFIER: &str = "classifier";

/// Classes of a block of the bias's gradient.
const BIAS_COLUMNS: u32 = 32;

/// Blocks of the weights' gradient that go through a window together: half of two on each of 132 multiprocessors, since both
/// gradients are as many products.
const TOGETHER: u32 = 132;
/// Blocks that a weight gradient in tiles of 256 inputs aims at unless a tuning says otherwise: three windows' blocks.
const BROAD_WEIGHT_BLOCKS: u32 = LEAST_WINDOWS * TOGETHER;
/// Bytes that the second level of an H100 or H200 holds.
const CACHE: u64 = 50 << 20;
/// Windows at least, of as many splits.
const LEAST_WINDOWS: u32 = 3;
/// Steps along the sum that a run of the input's gradient has at least, so that its pipeline is worth filling, where blocks
/// are to follow each other through the pixels.
const RUN_STEPS: u32 = 16;

/// How often both gradients read what they are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Passes {
    /// Once, for both.
    One,
    /// Once for each, one after the other.
    Two,
    /// Once for each, of the same pixels at about the same time.
    Interleaved,
}

/// `BackwardWindows`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Windows {
    runs: u32,
    splits: u32,
    together: u32,
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for Windows {}

impl Argument for Windows {
    const CODE: &'static str = "{12:4}";
}

/// How the blocks of both gradients are cut and ordered, where each has blocks of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BackwardGrids {
    input: Grid,
    weights: WeightGrid,
    windows: Windows,
}

impl BackwardGrids {
    const fn blocks(&self) -> u32 {
        self.input.blocks() + self.weights.blocks()
    }
}

/// The launches of one shape and element type, known without a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointwiseWork {
    x: Shape,
    outputs: usize,
    dtype: Dtype,
    choices: Choices,
}

impl PointwiseWork {
    /// For inputs of shape `x` and `outputs` channels.
    ///
    /// # Errors
    /// [`Error::Shape`] for an empty shape, channels that are no multiple of 8, or a tensor or weights of 2³¹ elements
    /// and more.
    pub fn new(x: Shape, outputs: usize, dtype: Dtype) -> Result<Self> {
        check_shape(OPERATION, x)?;
        check_shape(OPERATION, x.with_channels(outputs))?;
        if x.c.checked_mul(outputs).is_none_or(|weights| weights > MAX_ELEMENTS) {
            let problem = format!("{outputs}×{} weights; at most {MAX_ELEMENTS} are possible", x.c);
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        Ok(Self { x, outputs, dtype, choices: Choices::default() })
    }

    const fn rows(&self) -> u32 {
        self.x.pixels() as u32
    }

    /// Pixels of an image.
    const fn pixels(&self) -> u32 {
        (self.x.h * self.x.w) as u32
    }

    /// With launches as a tuning chooses them.
    ///
    /// # Errors
    /// [`Error::Shape`] for what is none of [`choices`](Self::choices).
    pub fn with(self, choices: Choices) -> Result<Self> {
        choices.check(OPERATION, |launch| self.choices(launch))?;
        Ok(Self { choices, ..self })
    }

    /// What a tuning can choose from: columns of a tile, how many blocks there are (of a backward by blocks of each gradient,
    /// for that of the weights), and how a backward reads its operands. One pass is taken where it is possible, and
    /// windows are where there are several. In f16 and bf16 fprop and the gradient of the input, but for one through a gate,
    /// may be multiplied by wgmma, by blocks of each gradient, on a device that has it; and TMA may bring what fprop multiplies,
    /// where the input is as it lies.
    pub fn choices(&self, launch: Launch) -> Vec<Choice> {
        let each = |way: Option<Way>, channels: usize, blocks: &[u32]| {
            let by_warpgroups = matches!(way, Some(Way::Wgmma | Way::Tma));
            let all = [64, 128, 256].into_iter().filter(move |&columns| match columns {
                64 => true,
                256 if by_warpgroups => false,
                _ => self.dtype.bytes() == 2 && 2 * channels > columns as usize,
            });
            let one = |columns, blocks| Choice { way, ..Choice::default() }.columns(columns).blocks(blocks);
            let cut = |columns| blocks.iter().map(move |&blocks| one(columns, blocks));
            all.flat_map(cut).collect::<Vec<_>>()
        };
        match launch {
            Launch::Fprop => {
                let mut all = each(None, self.outputs, &[264, 528, 1056, 4096]);
                if self.dtype.bytes() == 2 {
                    all.extend(each(Some(Way::Wgmma), self.outputs, &[528, 4096]));
                    all.extend(each(Some(Way::Tma), self.outputs, &[528, 4096]));
                }
                all
            }
            Launch::Backward => {
                let mut all = each(Some(Way::TwoPasses), self.x.c, &[264, 528, 1056]);
                if self.dtype.bytes() == 2 {
                    let narrow = Choice::by(Way::Wgmma).columns(Tile::WGMMA64.columns);
                    all.extend([264, 528].map(|blocks| narrow.blocks(blocks)));
                }
                all.extend(each(Some(Way::Interleaved), self.x.c, &[264, 528, 1056]).into_iter().filter(
                    |choice| {
                        let work = Self { choices: Choices::only(Launch::Backward, *choice), ..*self };
                        Self::KINDS.iter().any(|&(_, output)| work.interleaved(output).is_some())
                    },
                ));
                if Self::KINDS.iter().any(|&(input, output)| self.one_pass(input, output).is_some()) {
                    all.push(Choice::by(Way::OnePass));
                }
                all
            }
            Launch::Dgrad | Launch::Wgrad => Vec::new(),
        }
    }

    /// The tile for `columns` channels; whether the rows owe what is paid for each tile anew.
    fn tile(&self, columns: usize, owing: bool, choice: Choice) -> &'static Tile {
        let chosen = match choice.way {
            Some(Way::Wgmma) => choice.columns.and_then(Tile::by_wgmma),
            Some(Way::Tma) => choice.columns.and_then(Tile::by_tma),
            _ => choice.columns.and_then(Tile::with_columns),
        };
        if let Some(chosen) = chosen {
            return chosen;
        }
        let columns = columns as u32;
        if owing && self.fills(&Tile::BROAD, columns) && in_pairs(columns) {
            &Tile::BROAD
        } else if columns > Tile::NARROW.columns && self.fills(&Tile::WIDE, columns) {
            &Tile::WIDE
        } else {
            &Tile::NARROW
        }
    }

    /// Whether a tile of elements of 16 bits makes enough blocks.
    fn fills(&self, tile: &Tile, columns: u32) -> bool {
        self.dtype.bytes() == 2 && self.rows().div_ceil(tile.rows) * tile.groups(columns) >= BUSY
    }

    /// Of the output. TMA cannot pay what an input owes.
    fn forward_tile(&self, input: InputKind) -> &'static Tile {
        let mut choice = self.choices.fprop;
        if choice.way == Some(Way::Tma) && !self.comes_by_tma(input) {
            choice.way = Some(Way::Wgmma);
        }
        self.tile(self.outputs, input != InputKind::Plain, choice)
    }

    /// Whether TMA brings what fprop multiplies.
    fn comes_by_tma(&self, input: InputKind) -> bool {
        self.choices.fprop.way == Some(Way::Tma) && input == InputKind::Plain
    }

    /// Of the gradient of the input.
    fn input_tile(&self) -> &'static Tile {
        // Those of 256 columns are for both gradients.
        let owing = self.weight_tile() == &Tile::BROAD;
        self.tile(self.x.c, owing, self.choices.backward)
    }

    /// Of the same through a gate, whose five sums leave fewer registers.
    fn gated_tile(&self) -> &'static Tile {
        if self.dtype.bytes() == 2 { &Tile::LOW } else { &Tile::NARROW }
    }

    /// Of the gradient of the weights.
    fn weight_tile(&self) -> &'static Tile {
        let by_rule = || {
            let inputs = self.x.c as u32;
            let blocks = self.weight_grid_of(&Tile::BROAD, BROAD_WEIGHT_BLOCKS).blocks();
            in_pairs(inputs) && self.fills(&Tile::BROAD, inputs) && blocks >= BUSY
        };
        match self.choices.backward.columns {
            Some(columns) if columns == Tile::BROAD.columns => &Tile::BROAD,
            None if by_rule() => &Tile::BROAD,
            _ => &Tile::LOW,
        }
    }

    /// Of the output.
    fn forward_grid(&self, input: InputKind) -> Grid {
        let (tile, columns) = (self.forward_tile(input), self.outputs as u32);
        let blocks = self.choices.fprop.blocks.unwrap_or(BLOCKS);
        Grid::aiming(blocks, self.rows().div_ceil(tile.rows), tile.groups(columns), RUNS)
    }

    /// Of the gradient of the input.
    fn input_grid(&self) -> Grid {
        Grid::new(self.rows(), self.x.c as u32, self.input_tile())
    }

    fn weight_grid(&self) -> WeightGrid {
        let tile = self.weight_tile();
        let by_rule = if tile == &Tile::BROAD { BROAD_WEIGHT_BLOCKS } else { WEIGHT_BLOCKS };
        self.weight_grid_of(tile, self.choices.backward.blocks.unwrap_or(by_rule))
    }

    fn weight_grid_of(&self, tile: &Tile, blocks: u32) -> WeightGrid {
        let step = step_elements(self.dtype.bytes());
        WeightGrid::aiming(blocks, self.rows(), [self.outputs as u32, self.x.c as u32], tile, step)
    }

    fn kernel(&self, operation: &str, tile: &Tile) -> String {
        let parts = ["pointwise", operation, tile.name, self.dtype.name()];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("_")
    }

    /// Bytes of a tensor with `channels`.
    fn tensor(&self, channels: usize) -> u64 {
        (self.x.with_channels(channels).elements() * self.dtype.bytes()) as u64
    }

    fn weights(&self) -> u64 {
        (self.x.c * self.outputs * self.dtype.bytes()) as u64
    }

    fn tensor_operations(&self) -> u64 {
        2 * self.x.pixels() as u64 * (self.x.c * self.outputs) as u64
    }

    /// Bytes that both gradients read.
    fn operands(&self) -> u64 {
        2 * self.tensor(self.outputs) + self.tensor(self.x.c)
    }

    /// Bytes beside x of what it owes, and operations to pay it.
    fn owed(&self, input: InputKind) -> (u64, u64) {
        let (c, elements) = (self.x.c as u64, self.x.elements() as u64);
        match input {
            InputKind::Plain => (0, 0),
            InputKind::Silu => (8 * c, 6 * elements),
            InputKind::Gated => (8 * c + 4 * self.x.n as u64 * c, 7 * elements),
        }
    }

    /// Bytes of a gradient of y with what it owes, and operations to pay it.
    fn gradient(&self) -> (u64, u64) {
        let o = self.outputs;
        (2 * self.tensor(o) + 12 * o as u64, 4 * self.x.with_channels(o).elements() as u64)
    }

    /// The launch of [`Pointwise::fprop`].
    pub fn fprop(&self, input: InputKind, output: OutputKind) -> Work {
        let (tile, grid) = (self.forward_tile(input), self.forward_grid(input));
        let (y, elements) = (self.tensor(self.outputs), self.x.with_channels(self.outputs).elements() as u64);
        let (owed, pay) = self.owed(input);
        let (extra, operations) = match output {
            OutputKind::Plain => (0, 0),
            OutputKind::Moments => (sums(&grid, self.outputs), 3 * elements),
            OutputKind::Folded { skip } => {
                (4 * self.outputs as u64 + if skip { y } else { 0 }, (5 + u64::from(skip)) * elements)
            }
        };
        Work {
            kernel: self.kernel("fprop", tile),
            grid: [grid.blocks(), 1, 1],
            shared: tile.shared_forward(),
            cost: Cost {
                bytes: self.tensor(self.x.c) + owed + self.weights() + y + extra,
                tensor_operations: self.tensor_operations(),
                operations: pay + operations,
            },
        }
    }

    /// The launch of [`Pointwise::dgrad`].
    pub fn dgrad(&self, output: GradientKind) -> Work {
        self.dgrad_on(&self.gradient_grid(output), output)
    }

    fn dgrad_on(&self, grid: &Grid, output: GradientKind) -> Work {
        let c = self.x.c;
        let (dx, elements) = (self.tensor(c), self.x.elements() as u64);
        let (gradient, pay) = self.gradient();
        let gated = output == GradientKind::Gated;
        let tile = if gated { self.gated_tile() } else { self.input_tile() };
        let operations = output_operations(output) * elements;
        let extra = match output {
            GradientKind::Plain { skip } => {
                if skip {
                    dx
                } else {
                    0
                }
            }
            GradientKind::Silu => dx + 16 * c as u64 + sums(grid, c),
            GradientKind::Gated => dx + 16 * c as u64 + 20 * (self.x.n * c) as u64,
        };
        Work {
            kernel: match output {
                GradientKind::Gated => format!("pointwise_dgrad_gated_{}", self.dtype),
                GradientKind::Plain { .. } | GradientKind::Silu => self.kernel("dgrad", tile),
            },
            grid: [grid.blocks(), 1, 1],
            shared: tile.shared(2),
            cost: Cost {
                bytes: gradient + self.weights() + dx + extra,
                tensor_operations: self.tensor_operations(),
                operations: pay + operations,
            },
        }
    }

    fn backward_kernel(&self, output: GradientKind) -> String {
        match (output, self.weight_tile()) {
            (GradientKind::Gated, &Tile::BROAD) => format!("pointwise_backward_gated_broad_{}", self.dtype),
            (GradientKind::Gated, _) => format!("pointwise_backward_gated_{}", self.dtype),
            _ => self.kernel("backward", self.input_tile()),
        }
    }

    /// Through a gate a run is an image.
    fn gradient_grid(&self, output: GradientKind) -> Grid {
        match output {
            GradientKind::Gated => Grid {
                tiles: self.pixels().div_ceil(self.gated_tile().rows),
                runs: self.x.n as u32,
                groups: self.gated_tile().groups(self.x.c as u32),
            },
            GradientKind::Plain { .. } | GradientKind::Silu => self.input_grid(),
        }
    }

    /// Floats of partial sums of the gradient of the input, and counters.
    fn gradient_workspace(&self, grid: &Grid, output: GradientKind) -> (usize, usize) {
        let Grid { runs, groups, .. } = *grid;
        let floats = if output == GradientKind::Gated { 0 } else { 2 * runs as usize * self.x.c };
        (floats, groups as usize)
    }

    /// One gradient after the other, that of the weights first.
    fn one_after_the_other(&self, output: GradientKind) -> BackwardGrids {
        let (input, weights) = (self.gradient_grid(output), self.weight_grid());
        let windows = Windows { runs: input.runs, splits: weights.splits(), together: 1 };
        BackwardGrids { input, weights, windows }
    }

    /// In windows: their number is that of the splits that there would be anyhow, by those that go through a window together.
    /// None if that is not several.
    fn interleaved(&self, output: GradientKind) -> Option<BackwardGrids> {
        let whole = self.weight_grid();
        let step = step_elements(self.dtype.bytes());
        // To the nearest, at a half to the lower.
        let together = (2 * TOGETHER + whole.tiles() - 1) / (2 * whole.tiles());
        let together = together.clamp(1, (whole.splits() / LEAST_WINDOWS).max(1));
        let (input, rows) = match output {
            GradientKind::Gated => (self.gradient_grid(output), self.pixels()),
            GradientKind::Plain { .. } | GradientKind::Silu => {
                let Grid { groups, .. } = self.input_grid();
                let (tile, steps) = (self.input_tile(), (self.outputs as u32).div_ceil(step));
                let row_tiles = self.rows().div_ceil(tile.rows);
                let least = if output == GradientKind::Silu { row_tiles.div_ceil(RUNS) } else { 1 };
                let tiles = RUN_STEPS.div_ceil(steps).max(least);
                (Grid { tiles, runs: row_tiles.div_ceil(tiles), groups }, tiles * tile.rows)
            }
        };
        let runs = input.runs.div_ceil(whole.splits() / together);
        let windows = input.runs.div_ceil(runs);
        // A window's splits have all pixels of its runs.
        let steps = (u64::from(runs) * u64::from(rows)).div_ceil(u64::from(together * step)) as u32;
        (windows > 1).then(|| BackwardGrids {
            input,
            weights: whole.cut(windows * together, steps),
            windows: Windows { runs, splits: together, together },
        })
    }

    /// The launch of [`Pointwise::wgrad`].
    pub fn wgrad(&self, input: InputKind) -> Work {
        self.wgrad_on(&self.weight_grid(), input)
    }

    fn wgrad_on(&self, grid: &WeightGrid, input: InputKind) -> Work {
        let ((gradient, pay), (owed, pay_input)) = (self.gradient(), self.owed(input));
        let weights = 8 * (self.x.c * self.outputs) as u64;
        let partial = grid.partial(self.weight_tile()) as u64;
        Work {
            kernel: self.kernel("wgrad", self.weight_tile()),
            grid: [grid.blocks(), 1, 1],
            shared: self.weight_tile().shared(2),
            cost: Cost {
                bytes: gradient + self.tensor(self.x.c) + owed + weights + 8 * partial,
                tensor_operations: self.tensor_operations(),
                operations: pay + pay_input,
            },
        }
    }

    /// How [`Pointwise::backward`] reads its operands: once if that moves fewer bytes by an eighth at least, and gives a GPU
    /// enough blocks. One that keeps weights and their gradient leaves little of a multiprocessor to others, which a smaller
    /// gain would not pay for. Else in windows, if there are several and the operands are more than a cache holds.
    pub fn passes(&self, input: InputKind, output: GradientKind) -> Passes {
        let one = self.one_pass(input, output);
        let way = self.choices.backward.way;
        match way {
            // That is how dx is multiplied, not in which order.
            None | Some(Way::Wgmma) => {}
            Some(Way::OnePass) if one.is_some() => return Passes::One,
            Some(Way::Interleaved) if self.interleaved(output).is_some() => return Passes::Interleaved,
            Some(_) => return Passes::Two,
        }
        let two = self.two_passes(input, output).cost.bytes;
        let pays =
            |one: &OnePass| one.blocks() >= BUSY && self.one_pass_cost(one, output).bytes <= two - two / 8;
        if way.is_none() && one.is_some_and(|one| pays(&one)) {
            Passes::One
        } else if self.operands() > CACHE && self.interleaved(output).is_some() {
            Passes::Interleaved
        } else {
            Passes::Two
        }
    }

    /// The launch of [`Pointwise::backward`].
    pub fn backward(&self, input: InputKind, output: GradientKind) -> Work {
        let passes = self.passes(input, output);
        self.backward_in(passes, input, output).unwrap_or_else(|| self.two_passes(input, output))
    }

    /// The launch of [`Pointwise::backward_in`]; none if the shape, the type or the operands are not for one pass, or there
    /// would be one window alone.
    pub fn backward_in(&self, passes: Passes, input: InputKind, output: GradientKind) -> Option<Work> {
        match passes {
            Passes::Two => Some(self.two_passes(input, output)),
            Passes::Interleaved => {
                self.interleaved(output).map(|grids| self.by_blocks_of_each(&grids, input, output))
            }
            Passes::One => self.one_pass(input, output).map(|one| Work {
                kernel: one.kernel.into(),
                grid: [one.blocks(), 1, 1],
                shared: one.shared,
                cost: self.one_pass_cost(&one, output),
            }),
        }
    }

    fn one_pass(&self, input: InputKind, output: GradientKind) -> Option<OnePass> {
        OnePass::new(self.x, self.outputs, self.dtype, input, output)
    }

    fn one_pass_cost(&self, one: &OnePass, output: GradientKind) -> Cost {
        let (n, c, o) = (self.x.n, self.x.c as u64, self.outputs as u64);
        let (runs, groups) = (u64::from(one.grid.runs), u64::from(one.grid.groups));
        let (x, dy, elements) = (self.tensor(self.x.c), self.tensor(self.outputs), self.x.elements() as u64);
        let (extra, input_operations) = match output {
            GradientKind::Plain { skip } => (if skip { x } else { 0 }, 0),
            GradientKind::Silu => (16 * c + 16 * runs * c, 1),
            GradientKind::Gated => (16 * c + 24 * n as u64 * c, 2),
        };
        Cost {
            bytes: 2 * dy * groups
                + 12 * o
                + 2 * x
                + extra
                + self.weights()
                + 8 * c * o
                + 8 * one.partial() as u64,
            tensor_operations: 2 * self.tensor_operations(),
            operations: self.gradient().1 + (output_operations(output) + input_operations) * elements,
        }
    }

    fn two_passes(&self, input: InputKind, output: GradientKind) -> Work {
        self.by_blocks_of_each(&self.one_after_the_other(output), input, output)
    }

    fn by_blocks_of_each(&self, grids: &BackwardGrids, input: InputKind, output: GradientKind) -> Work {
        let (dgrad, wgrad) = (self.dgrad_on(&grids.input, output), self.wgrad_on(&grids.weights, input));
        Work {
            kernel: self.backward_kernel(output),
            grid: [grids.blocks(), 1, 1],
            shared: dgrad.shared.max(wgrad.shared),
            cost: dgrad.cost + wgrad.cost,
        }
    }

    /// Operands of both gradients that may come in one pass.
    const KINDS: [(InputKind, GradientKind); 4] = [
        (InputKind::Plain, GradientKind::Plain { skip: false }),
        (InputKind::Plain, GradientKind::Plain { skip: true }),
        (InputKind::Silu, GradientKind::Silu),
        (InputKind::Gated, GradientKind::Gated),
    ];

    /// Floats of a [`Workspace`] that every launch does with, a backward in two passes or in those that are the better.
    pub fn workspace_floats(&self) -> usize {
        let inputs = [InputKind::Plain, InputKind::Silu];
        let runs = inputs.map(|input| self.forward_grid(input).runs as usize).into_iter().fold(0, usize::max);
        let forward = 2 * runs * self.outputs;
        let chosen =
            Self::KINDS.map(|(input, output)| self.floats(self.passes(input, output), input, output));
        chosen.into_iter().fold(forward.max(self.floats_in(Passes::Two)), usize::max)
    }

    /// Floats of a [`Workspace`] that a backward in these `passes` does with wherever it is possible.
    pub fn floats_in(&self, passes: Passes) -> usize {
        let each = Self::KINDS.map(|(input, output)| self.floats(passes, input, output));
        each.into_iter().fold(0, usize::max)
    }

    fn floats(&self, passes: Passes, input: InputKind, output: GradientKind) -> usize {
        let grids = match passes {
            Passes::One => return self.one_pass(input, output).map_or(0, |one| one.floats()),
            Passes::Two => Some(self.one_after_the_other(output)),
            Passes::Interleaved => self.interleaved(output),
        };
        grids.map_or(0, |grids| self.backward_workspace(&grids, output).0)
    }

    /// Floats of partial results of both gradients, and counters.
    fn backward_workspace(&self, grids: &BackwardGrids, output: GradientKind) -> (usize, usize) {
        let (floats, groups) = self.gradient_workspace(&grids.input, output);
        (floats + grids.weights.partial(self.weight_tile()), groups + grids.weights.counters())
    }
}

/// Whether tiles of 256 columns are no more products than those of 128.
const fn in_pairs(columns: u32) -> bool {
    Tile::WIDE.groups(columns) == 2 * Tile::BROAD.groups(columns)
}

/// Bytes of the two partial sums of each run and column, written and read.
const fn sums(grid: &Grid, columns: usize) -> u64 {
    16 * (grid.runs as usize * columns) as u64
}

/// Operations for each element of dx.
const fn output_operations(output: GradientKind) -> u64 {
    match output {
        GradientKind::Plain { skip } => skip as u64,
        GradientKind::Silu => 14,
        GradientKind::Gated => 20,
    }
}

/// The plan for one shape, number of outputs and element type. The same calls give the same bits.
#[derive(Debug)]
pub struct Pointwise<T> {
    device: Device,
    work: PointwiseWork,
    /// Of an input as it lies, and of one that owes something.
    fprop: [Kernel; 2],
    dgrad: Kernel,
    gated: Kernel,
    wgrad: Kernel,
    backward: Kernel,
    backward_gated: Kernel,
    one_pass: Option<Kernel>,
    one_pass_gated: Option<Kernel>,
    element: PhantomData<fn() -> T>,
}

/// A work's kernel, allowed its shared memory.
fn load(device: &Device, work: &Work) -> Result<Kernel> {
    let kernel = device.module(&FAMILY)?.kernel(&work.kernel)?;
    kernel.allow_shared(work.shared)?;
    Ok(kernel)
}

/// A kernel for one pass, allowed all the shared memory that any shape needs.
fn load_one_pass(device: &Device, one: Option<OnePass>) -> Result<Option<Kernel>> {
    let Some(one) = one else { return Ok(None) };
    let kernel = device.module(&pointwise_one_pass::FAMILY)?.kernel(one.kernel)?;
    kernel.allow_shared(pointwise_one_pass::SHARED)?;
    Ok(Some(kernel))
}

impl<T: RawElement> Pointwise<T> {
    /// For inputs of shape `x` and `outputs` channels.
    ///
    /// # Errors
    /// Those of [`PointwiseWork::new`] and [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, x: Shape, outputs: usize) -> Result<Self> {
        Self::plan_with(device, x, outputs, T::DTYPE, Choices::default())
    }

    /// The same, multiplying as `dtype` says, with launches as a tuning chooses them.
    ///
    /// # Errors
    /// Those of [`plan`](Self::plan) and of [`PointwiseWork::with`]; [`Error::Shape`] if elements of `dtype` are no `T`.
    pub fn plan_with(
        device: &Device,
        x: Shape,
        outputs: usize,
        dtype: Dtype,
        choices: Choices,
    ) -> Result<Self> {
        check_storage::<T>(OPERATION, dtype)?;
        let work = PointwiseWork::new(x, outputs, dtype)?.with(choices)?;
        choices.check_device(OPERATION, device)?;
        Ok(Self {
            device: device.clone(),
            work,
            fprop: [
                load(device, &work.fprop(InputKind::Plain, OutputKind::Plain))?,
                load(device, &work.fprop(InputKind::Silu, OutputKind::Plain))?,
            ],
            dgrad: load(device, &work.dgrad(GradientKind::Plain { skip: false }))?,
            gated: load(device, &work.dgrad(GradientKind::Gated))?,
            wgrad: load(device, &work.wgrad(InputKind::Plain))?,
            backward: load(device, &work.two_passes(InputKind::Plain, GradientKind::Plain { skip: false }))?,
            backward_gated: load(device, &work.two_passes(InputKind::Gated, GradientKind::Gated))?,
            one_pass: load_one_pass(device, work.one_pass(InputKind::Silu, GradientKind::Silu))?,
            one_pass_gated: load_one_pass(device, work.one_pass(InputKind::Gated, GradientKind::Gated))?,
            element: PhantomData,
        })
    }

    /// What it launches.
    pub fn work(&self) -> &PointwiseWork {
        &self.work
    }

    /// Floats of a [`Workspace`] that every operation does with.
    pub fn workspace_floats(&self) -> usize {
        self.work.workspace_floats()
    }

    fn sizes(&self) -> (Shape, Shape, usize) {
        let PointwiseWork { x, outputs, .. } = self.work;
        (x, x.with_channels(outputs), x.c * outputs)
    }

    /// y ← x·Wᵀ \[n, h, w, outputs\] as `output` says, x being what `input` says and `weight` \[outputs, inputs\].
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap, and for a workspace that is
    /// too small. Nothing has been changed then. [`Error::Driver`].
    pub fn fprop(
        &self,
        stream: &Arc<CudaStream>,
        input: Input<'_, '_, T>,
        weight: &CudaView<'_, T>,
        y: &mut CudaViewMut<'_, T>,
        mut output: Output<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (x, y_shape, weights) = self.sizes();
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        input.check(&mut operands, x)?;
        operands.read("weight", weight, weights)?;
        operands.write("y", y, y_shape.elements())?;
        output.check(&mut operands, y_shape)?;
        let work = self.work.fprop(input.kind(), output.kind());
        let grid = self.work.forward_grid(input.kind());
        workspace.check(OPERATION, 2 * grid.runs as usize * y_shape.c, grid.groups as usize)?;

        let to = ForwardArgument { y: address(y, stream), bias: 0, skip: 0, silu: 0, moments: 0 };
        let (to, norm) = match &mut output {
            Output::Plain => (to, NormFinish::default()),
            Output::Moments(statistics) => {
                (ForwardArgument { moments: 1, ..to }, statistics.finish(stream, x.pixels()))
            }
            Output::Folded { bias, act, skip } => {
                let skip = skip.map_or(0, |skip| address(skip, stream));
                let silu = u32::from(*act == Activation::Silu);
                (ForwardArgument { bias: address(*bias, stream), skip, silu, ..to }, NormFinish::default())
            }
        };
        let outputs = y_shape.c as u32;
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let [as_it_lies, owing] = &self.fprop;
        if let (Input::Plain(matrix), true) = (input, self.work.comes_by_tma(input.kind())) {
            let tile = self.work.forward_tile(InputKind::Plain);
            let (pixels, inputs) = (self.work.rows(), x.c as u32);
            let map = TensorMap::rows_of_64_bytes(stream, matrix, [x.pixels(), x.c], tile.rows)?;
            let weights = TensorMap::rows_of_64_bytes(stream, weight, [y_shape.c, x.c], tile.columns)?;
            let mut launch = as_it_lies.on(stream);
            launch.value(&map).value(&weights).value(&to).value(&pixels).value(&inputs).value(&outputs);
            launch.value(&grid).value(&norm).output(&mut partial).output(&mut counters);
            // SAFETY: as below; the maps are of x and the weights, with the boxes of the kernel's tile.
            return unsafe { launch.run(work.grid, work.shared, format_args!("{x} to {outputs} channels")) };
        }
        let kernel = if input.kind() == InputKind::Plain { as_it_lies } else { owing };
        let input = InputArgument::new(&input, stream, self.work.rows(), x.c as u32, self.work.pixels());
        let mut launch = kernel.on(stream);
        launch.value(&input).input(weight).value(&to).value(&outputs).value(&grid).value(&norm);
        launch.output(&mut partial).output(&mut counters);
        // SAFETY: all buffers have their shapes, whose channels are multiples of 8, and what is written overlaps nothing.
        // A block writes the rows of its run and the columns of its group, those that exist, and its own partial
        // moments; there are 2 for each run and column, and a counter for each group.
        unsafe { launch.run(work.grid, work.shared, format_args!("{x} to {outputs} channels")) }
    }

    /// dx ← dy·W \[n, h, w, inputs\] as `output` says, dy being what `gradient` says.
    ///
    /// # Errors
    /// As for [`fprop`](Self::fprop), and for a gradient that arrives through a gate.
    pub fn dgrad(
        &self,
        stream: &Arc<CudaStream>,
        gradient: GradientView<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dx: &mut CudaViewMut<'_, T>,
        mut output: GradientOutput<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (x, y_shape, weights) = self.sizes();
        refuse_gate(&gradient)?;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        gradient.check(&mut operands, y_shape)?;
        operands.read("weight", weight, weights)?;
        operands.write("dx", dx, x.elements())?;
        output.check(&mut operands, x)?;
        self.check_sums(output.kind())?;
        let (work, grid) = (self.work.dgrad(output.kind()), self.work.gradient_grid(output.kind()));
        let (floats, groups) = self.work.gradient_workspace(&grid, output.kind());
        workspace.check(OPERATION, floats, groups)?;
        let dy = self.gradient_argument(&gradient, stream);
        let inputs = x.c as u32;
        let shapes = format_args!("{x} from {} channels", y_shape.c);
        let (to, owed, sums) = self.target(stream, dx, &mut output);
        if let Some(sums) = sums {
            let mut launch = self.gated.on(stream);
            launch.value(&dy).input(weight).value(&to).value(&inputs).value(&grid).output(sums);
            // SAFETY: all buffers have their shapes and what is written overlaps nothing. A block writes the rows of its
            // image and the columns of its group, those that exist, and their five sums.
            return unsafe { launch.run(work.grid, work.shared, shapes) };
        }
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut launch = self.dgrad.on(stream);
        launch.value(&dy).input(weight).value(&to).value(&inputs).value(&grid).value(&owed);
        launch.output(&mut partial).output(&mut counters);
        // SAFETY: as in `fprop`, with the partial sums in place of moments.
        unsafe { launch.run(work.grid, work.shared, shapes) }
    }

    /// Refuses five sums that no index reaches.
    fn check_sums(&self, output: GradientKind) -> Result<()> {
        let x = self.work.x;
        if output != GradientKind::Gated || 5 * x.n * x.c <= MAX_ELEMENTS {
            return Ok(());
        }
        let problem =
            format!("{x} with 5 sums for each image and channel; at most {MAX_ELEMENTS} are possible");
        Err(Error::Shape { operation: OPERATION, problem })
    }

    fn gradient_argument(
        &self,
        gradient: &GradientView<'_, '_, T>,
        stream: &Arc<CudaStream>,
    ) -> GradientArgument {
        let work = &self.work;
        GradientArgument::new(gradient, stream, work.rows(), work.outputs as u32, work.pixels())
    }

    /// Where dx goes, what becomes of its two sums, and where its five sums go.
    fn target<'a, 'b>(
        &self,
        stream: &Arc<CudaStream>,
        dx: &CudaViewMut<'_, T>,
        output: &'a mut GradientOutput<'_, 'b, T>,
    ) -> (TargetArgument, OwedFinish, Option<&'a mut CudaViewMut<'b, f32>>) {
        let to = TargetArgument { dx: address(dx, stream), skip: 0, y: 0, norm: 0 };
        match output {
            GradientOutput::Plain { skip } => {
                let skip = skip.map_or(0, |skip| address(skip, stream));
                (TargetArgument { skip, ..to }, OwedFinish::default(), None)
            }
            GradientOutput::Silu { y, debt } => {
                let (y, norm) = (address(*y, stream), address(debt.norm, stream));
                (TargetArgument { y, norm, ..to }, debt.finish(stream, self.work.x.pixels()), None)
            }
            GradientOutput::Gated { y, norm, sums } => {
                let to = TargetArgument { y: address(*y, stream), norm: address(*norm, stream), ..to };
                (to, OwedFinish::default(), Some(sums))
            }
        }
    }

    /// dweight \[outputs, inputs\] += dyᵀ·x.
    ///
    /// # Errors
    /// As for [`dgrad`](Self::dgrad).
    pub fn wgrad(
        &self,
        stream: &Arc<CudaStream>,
        input: Input<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (x, y_shape, weights) = self.sizes();
        refuse_gate(&gradient)?;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        input.check(&mut operands, x)?;
        gradient.check(&mut operands, y_shape)?;
        operands.write("dweight", dweight, weights)?;
        let input_argument =
            InputArgument::new(&input, stream, self.work.rows(), x.c as u32, self.work.pixels());
        let dy = self.gradient_argument(&gradient, stream);
        launch_wgrad(
            &self.wgrad,
            &self.work,
            input.kind(),
            stream,
            (&dy, &input_argument),
            dweight,
            workspace,
        )
    }

    /// Both gradients, [`dgrad`](Self::dgrad) and [`wgrad`](Self::wgrad), in one launch. It reads its operands as
    /// [`PointwiseWork::passes`] says.
    ///
    /// # Errors
    /// As for [`dgrad`](Self::dgrad), and for an input that owes SiLU of another tensor or normalisation than `output`
    /// does.
    pub fn backward(
        &self,
        stream: &Arc<CudaStream>,
        input: Input<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dx: &mut CudaViewMut<'_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        output: GradientOutput<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let passes = self.work.passes(input.kind(), output.kind());
        self.backward_in(passes, stream, input, gradient, weight, dx, dweight, output, workspace)
    }

    /// [`backward`](Self::backward) in these passes. The results differ by roundings: sums are taken in another order.
    ///
    /// # Errors
    /// As for [`backward`](Self::backward), and where [`PointwiseWork::backward_in`] knows no launch.
    pub fn backward_in(
        &self,
        passes: Passes,
        stream: &Arc<CudaStream>,
        input: Input<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dx: &mut CudaViewMut<'_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        mut output: GradientOutput<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let (x, y_shape, weights) = self.sizes();
        refuse_gate(&gradient)?;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        input.check(&mut operands, x)?;
        gradient.check(&mut operands, y_shape)?;
        operands.read("weight", weight, weights)?;
        operands.write("dx", dx, x.elements())?;
        operands.write("dweight", dweight, weights)?;
        output.check(&mut operands, x)?;
        self.check_sums(output.kind())?;
        check_same_input(stream, &input, &output)?;
        let work =
            self.work.backward_in(passes, input.kind(), output.kind()).ok_or_else(|| Error::Shape {
                operation: OPERATION,
                problem: format!(
                    "there is no backward in {} for {x} from {} channels in {}",
                    if passes == Passes::One { "a single pass" } else { "several windows" },
                    y_shape.c,
                    self.work.dtype
                ),
            })?;
        let one = self.work.one_pass(input.kind(), output.kind()).filter(|_| passes == Passes::One);
        let windows = self.work.interleaved(output.kind()).filter(|_| passes == Passes::Interleaved);
        let grids = windows.unwrap_or_else(|| self.work.one_after_the_other(output.kind()));
        let (floats, counters) = match &one {
            Some(one) => (one.floats(), one.counters()),
            None => self.work.backward_workspace(&grids, output.kind()),
        };
        workspace.check(OPERATION, floats, counters)?;
        let dy = self.gradient_argument(&gradient, stream);
        let input = InputArgument::new(&input, stream, self.work.rows(), x.c as u32, self.work.pixels());
        let (to, owed, sums) = self.target(stream, dx, &mut output);
        let (kernel, of_one_pass) = match sums {
            Some(_) => (&self.backward_gated, &self.one_pass_gated),
            None => (&self.backward, &self.one_pass),
        };
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let shapes = format_args!("{x} from {} channels", y_shape.c);
        if let (Some(one), Some(kernel)) = (one, of_one_pass) {
            let mut launch = kernel.on(stream);
            launch
                .value(&dy)
                .input(weight)
                .value(&to)
                .value(&input)
                .output(dweight)
                .value(&one.grid)
                .value(&owed);
            launch.optional(sums).output(&mut partial).output(&mut counters);
            // SAFETY: all buffers have their shapes, whose channels are multiples of 8, and what is written overlaps nothing;
            // the input is what the target's sums are of. A block writes the rows of its run and the columns of its group,
            // those that exist, their sums or partial sums, and its own partial results, or those elements of dweight that
            // are its group's alone: the last block of the group. There are as many of each, and counters, as were checked.
            return unsafe { launch.run(work.grid, work.shared, shapes) };
        }
        let mut launch = kernel.on(stream);
        launch.value(&dy).input(weight).value(&to).value(&input).output(dweight);
        launch.value(&grids.input).value(&grids.weights).value(&grids.windows).value(&owed).optional(sums);
        launch.output(&mut partial).output(&mut counters);
        // SAFETY: as in `wgrad` for a window's first blocks and in `dgrad` for the others; partial tiles and counters of the
        // first lie behind partial sums and counters of the others. There are as many blocks of each as their grids
        // have: all windows have as many splits, and all but the last as many runs.
        unsafe { launch.run(work.grid, work.shared, shapes) }
    }
}

/// Refuses an input made of another tensor than the one that its gradient passes through.
fn check_same_input<T: RawElement>(
    stream: &Arc<CudaStream>,
    input: &Input<'_, '_, T>,
    output: &GradientOutput<'_, '_, T>,
) -> Result<()> {
    let owed = match input {
        Input::Plain(_) => None,
        Input::Silu { y, norm } | Input::Gated { y, norm, .. } => {
            Some((address(*y, stream), address(*norm, stream)))
        }
    };
    let passed = match output {
        GradientOutput::Plain { .. } => None,
        GradientOutput::Silu { y, debt } => Some((address(*y, stream), address(debt.norm, stream))),
        GradientOutput::Gated { y, norm, .. } => Some((address(*y, stream), address(*norm, stream))),
    };
    match (owed, passed) {
        (Some(owed), Some(passed)) if owed != passed => {
            let problem = "the input and its gradient's epilogue name different tensors or normalisations, but dx is of \
                           what the input was made of";
            Err(Error::Shape { operation: OPERATION, problem: problem.into() })
        }
        _ => Ok(()),
    }
}

fn refuse_gate<T>(gradient: &GradientView<'_, '_, T>) -> Result<()> {
    match gradient.arrival {
        Arrival::Alone | Arrival::Factors(_) => Ok(()),
        Arrival::Gated { .. } => {
            let problem = "the gradient of its output cannot arrive through a gate: no block has squeeze-excitation \
                           behind a pointwise convolution";
            Err(Error::Shape { operation: OPERATION, problem: problem.into() })
        }
    }
}

/// The weight gradient; operands are checked but for the workspace.
fn launch_wgrad(
    kernel: &Kernel,
    work: &PointwiseWork,
    input: InputKind,
    stream: &Arc<CudaStream>,
    (dy, x): (&GradientArgument, &InputArgument),
    dweight: &mut CudaViewMut<'_, f32>,
    workspace: &mut Workspace,
) -> Result<()> {
    let grid = work.weight_grid();
    workspace.check(OPERATION, grid.partial(work.weight_tile()), grid.counters())?;
    let launched = work.wgrad(input);
    let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
    let mut launch = kernel.on(stream);
    launch.value(dy).value(x).output(dweight).value(&grid).output(&mut partial).output(&mut counters);
    let shapes = format_args!("{} to {} channels", work.x, work.outputs);
    // SAFETY: all buffers have their shapes and dweight overlaps none. A block reads the pixels of its split and the
    // channels of its tile, those that exist, and writes its own partial tile, or those elements of dweight that are
    // its alone: the last of a tile's blocks, or the only one. There are a partial tile for each block, and for each tile
    // a counter and one for every RADIX splits.
    unsafe { launch.run(launched.grid, launched.shared, shapes) }
}

/// The launches of a classifier, known without a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClassifierWork {
    /// With classes rounded up to a multiple of 8.
    products: PointwiseWork,
    classes: usize,
}

impl ClassifierWork {
    /// For `features` \[images, features\], a multiple of 8, and any number of classes.
    ///
    /// # Errors
    /// [`Error::Shape`] for no images or classes, features that are no multiple of 8, or 2³¹ elements and more.
    pub fn new(images: usize, features: usize, classes: usize, dtype: Dtype) -> Result<Self> {
        let pitch =
            classes.checked_next_multiple_of(8).filter(|&pitch| pitch > 0).ok_or_else(|| Error::Shape {
                operation: CLASSIFIER,
                problem: format!("{classes} classes; 1 and more are possible"),
            })?;
        Ok(Self { products: PointwiseWork::new(Shape::new(images, 1, 1, features), pitch, dtype)?, classes })
    }

    /// The launch of [`Classifier::fprop`].
    pub fn fprop(&self) -> Work {
        self.products.fprop(InputKind::Plain, OutputKind::Folded { skip: false })
    }

    /// The launches of [`Classifier::backward`]: the bias, dfeatures, the weights.
    pub fn backward(&self) -> [Work; 3] {
        let PointwiseWork { x, outputs: pitch, dtype, .. } = self.products;
        let (n, c) = (x.n, self.classes);
        let copy = if self.is_padded() { n * pitch } else { 0 };
        let bias = Work {
            kernel: format!("pointwise_classifier_bias_{}", dtype.suffix()),
            grid: [(pitch as u32).div_ceil(BIAS_COLUMNS), 1, 1],
            shared: 0,
            cost: Cost {
                bytes: ((n * c + copy) * dtype.bytes() + 8 * c) as u64,
                tensor_operations: 0,
                operations: (n * c) as u64,
            },
        };
        let dgrad = self.products.dgrad(GradientKind::Plain { skip: false });
        [bias, dgrad, self.products.wgrad(InputKind::Plain)]
    }

    /// Floats of a [`Workspace`] that every operation does with.
    pub fn workspace_floats(&self) -> usize {
        self.products.workspace_floats()
    }

    const fn is_padded(&self) -> bool {
        self.products.outputs != self.classes
    }
}

/// The classifier of a number of images, features and classes: logits = features·Wᵀ + bias.
#[derive(Debug)]
pub struct Classifier<T> {
    device: Device,
    work: ClassifierWork,
    fprop: Kernel,
    dgrad: Kernel,
    wgrad: Kernel,
    bias: Kernel,
    /// dlogits with rows of `pitch` elements, where `classes` is no multiple of 8.
    padded: Option<CudaSlice<T>>,
}

impl<T: RawElement> Classifier<T> {
    /// For `features` \[images, features\], a multiple of 8, and any number of classes.
    ///
    /// # Errors
    /// Those of [`ClassifierWork::new`] and [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, images: usize, features: usize, classes: usize) -> Result<Self> {
        Self::plan_in(device, images, features, classes, T::DTYPE)
    }

    /// The same, multiplying as `dtype` says.
    ///
    /// # Errors
    /// Those of [`plan`](Self::plan); [`Error::Shape`] if elements of `dtype` are no `T`.
    pub fn plan_in(
        device: &Device,
        images: usize,
        features: usize,
        classes: usize,
        dtype: Dtype,
    ) -> Result<Self> {
        check_storage::<T>(CLASSIFIER, dtype)?;
        let work = ClassifierWork::new(images, features, classes, dtype)?;
        let [bias, dgrad, wgrad] = work.backward();
        let padded =
            if work.is_padded() { Some(device.zeros(images * work.products.outputs)?) } else { None };
        Ok(Self {
            device: device.clone(),
            fprop: load(device, &work.fprop())?,
            dgrad: load(device, &dgrad)?,
            wgrad: load(device, &wgrad)?,
            bias: load(device, &bias)?,
            work,
            padded,
        })
    }

    /// Floats of a [`Workspace`] that every operation does with.
    pub fn workspace_floats(&self) -> usize {
        self.work.workspace_floats()
    }

    /// What it launches.
    pub fn work(&self) -> &ClassifierWork {
        &self.work
    }

    /// logits \[images, classes\] ← features·Wᵀ + bias, `weight` being \[classes, features\].
    ///
    /// # Errors
    /// As for [`Pointwise::fprop`].
    pub fn fprop(
        &self,
        stream: &Arc<CudaStream>,
        features: &CudaView<'_, T>,
        weight: &CudaView<'_, T>,
        bias: &CudaView<'_, f32>,
        logits: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let ClassifierWork { products, classes } = self.work;
        let x = products.x;
        let mut operands = Operands::new(CLASSIFIER, &self.device, stream)?;
        operands.read("features", features, x.elements())?;
        operands.read("weight", weight, classes * x.c)?;
        operands.read("bias", bias, classes)?;
        operands.write("logits", logits, x.n * classes)?;
        let input = InputArgument::new(&Input::Plain(features), stream, products.rows(), x.c as u32, 1);
        let (y, bias) = (address(logits, stream), address(bias, stream));
        let to = ForwardArgument { y, bias, skip: 0, silu: 0, moments: 0 };
        let work = self.work.fprop();
        let (grid, columns) = (products.forward_grid(InputKind::Plain), classes as u32);
        let norm = NormFinish::default();
        let mut launch = self.fprop.on(stream);
        launch.value(&input).input(weight).value(&to).value(&columns).value(&grid).value(&norm).null().null();
        // SAFETY: all buffers have their shapes and logits overlaps none. A block writes the rows of its run and the
        // columns of its group, those that exist; rows that are not aligned it writes element by element. Without
        // moments it uses no partial results.
        unsafe { launch.run(work.grid, work.shared, format_args!("{} images, {classes} classes", x.n)) }
    }

    /// From dlogits \[images, classes\]: dfeatures \[images, features\] ← dlogits·W, dweight \[classes, features\] +=
    /// dlogitsᵀ·features, and dbias \[classes\] += its sums over images.
    ///
    /// # Errors
    /// As for [`Pointwise::fprop`].
    pub fn backward(
        &mut self,
        stream: &Arc<CudaStream>,
        features: &CudaView<'_, T>,
        dlogits: &CudaView<'_, T>,
        weight: &CudaView<'_, T>,
        dfeatures: &mut CudaViewMut<'_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        dbias: &mut CudaViewMut<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let ClassifierWork { products, classes } = self.work;
        let (x, pitch) = (products.x, products.outputs as u32);
        let mut operands = Operands::new(CLASSIFIER, &self.device, stream)?;
        operands.read("features", features, x.elements())?;
        operands.read("dlogits", dlogits, x.n * classes)?;
        operands.read("weight", weight, classes * x.c)?;
        operands.write("dfeatures", dfeatures, x.elements())?;
        operands.write("dweight", dweight, classes * x.c)?;
        operands.write("dbias", dbias, classes)?;
        workspace.check(CLASSIFIER, self.workspace_floats(), products.weight_grid().counters())?;
        let shapes = format_args!("{} images, {classes} classes", x.n);
        let (images, columns, inputs) = (x.n as u32, classes as u32, x.c as u32);
        {
            let mut copy = self.padded.as_mut().map(CudaSlice::as_view_mut);
            let mut launch = self.bias.on(stream);
            launch.input(dlogits).optional(copy.as_mut()).output(dbias);
            launch.value(&images).value(&columns).value(&pitch);
            // SAFETY: dlogits is [images, classes] and dbias [classes], which overlaps nothing; the copy, this plan's
            // own, is [images, pitch], and where there is none the pitch is the number of classes. A block reads and
            // writes 32 columns, those that exist.
            unsafe { launch.run([pitch.div_ceil(BIAS_COLUMNS), 1, 1], 0, shapes) }?;
        }
        let padded = self.padded.as_ref().map(CudaSlice::as_view);
        let dy = GradientArgument::plain(padded.as_ref().unwrap_or(dlogits), stream, images, columns, pitch);
        let work = products.dgrad(GradientKind::Plain { skip: false });
        let to = TargetArgument { dx: address(dfeatures, stream), skip: 0, y: 0, norm: 0 };
        let (grid, owed) = (products.input_grid(), OwedFinish::default());
        let mut launch = self.dgrad.on(stream);
        launch.value(&dy).input(weight).value(&to).value(&inputs).value(&grid).value(&owed).null().null();
        // SAFETY: all buffers have their shapes, rows of dlogits or its copy begin at multiples of 16 bytes, and dfeatures
        // overlaps nothing. A block writes the rows of its run and the columns of its group, those that exist; without
        // sums it uses no partial results.
        unsafe { launch.run(work.grid, work.shared, shapes) }?;
        let input = InputArgument::new(&Input::Plain(features), stream, images, inputs, 1);
        launch_wgrad(&self.wgrad, &products, InputKind::Plain, stream, (&dy, &input), dweight, workspace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows have all pixels once, no more partial results than two passes, and begin for both gradients where they do for
    /// one of them, but for what its last steps are too long.
    #[test]
    fn windows_are_at_the_same_pixels() {
        for (n, side) in [(1, 1), (1, 40), (3, 19), (64, 10), (256, 38), (1000, 3)] {
            for (inputs, outputs) in [(8, 8), (64, 256), (160, 960), (960, 160), (640, 3840), (1536, 256)] {
                for dtype in [Dtype::F32, Dtype::Bf16] {
                    let work = PointwiseWork::new(Shape::new(n, side, side, inputs), outputs, dtype).unwrap();
                    for (_, output) in PointwiseWork::KINDS {
                        let two = work.one_after_the_other(output);
                        assert_eq!(two.windows.together, 1);
                        let Some(BackwardGrids { input, weights, windows }) = work.interleaved(output) else {
                            continue;
                        };
                        let what = format!("{work:?} {output:?} {input:?} {weights:?} {windows:?}");
                        let count = input.runs.div_ceil(windows.runs);
                        assert!(count > 1 && windows.splits == windows.together, "{what}");
                        assert_eq!(weights.splits(), count * windows.splits, "{what}");
                        assert!(weights.splits() <= two.weights.splits(), "{what}");
                        let rows = if output == GradientKind::Gated {
                            work.pixels()
                        } else {
                            input.tiles * work.input_tile().rows
                        };
                        let [all, run, last] = [work.rows(), input.runs * rows, (input.runs - 1) * rows];
                        assert!(run >= all && last < all, "{what}");
                        let step = windows.together * step_elements(dtype.bytes());
                        let [window, of_runs] = [weights.steps() * step, windows.runs * rows];
                        assert!((of_runs..of_runs + step).contains(&window), "{what}");
                    }
                }
            }
        }
    }
}
