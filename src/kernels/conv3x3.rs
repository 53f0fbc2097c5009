//! The dense 3×3 convolution on tensor cores. Formulas, shapes and bytes are in `kernels/conv3x3.cu`. The first layer, which
//! has 3 inputs, is [`Stem`](super::stem::Stem).
//!
//! f16 and bf16 are computed on spatial tiles of images, whose halo is loaded once, but for the output of a convolution of
//! stride 2, and the gradient of weights down strips of images. That output, f32 and small images are an implicit product,
//! which loads a value once for each tap that it lies under. What is read is stored plainly, as block outputs are: padding
//! is zero after whatever is applied on load.

use super::conv_strips::{self, StripProblem, Strips};
use super::conv_tile::{self, BOUNDS, Bounds, CellStride, Columns, ConvTiles};
use super::gemm::{FastDivisor, Grid, RUNS, THREADS, Tile, WEIGHT_BLOCKS, WeightGrid, step_elements};
use super::operand::{Arrival, GradientOutput, GradientView, Input, NormFinish, Output, OutputKind};
use super::raw::{RawElement, check_storage};
use super::tuning::{Choice, Choices, Launch, Way};
use super::{Cost, Work, Workspace};
use crate::backend::Activation;
use crate::device::cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};
use crate::device::{Argument, Device, Entry, Family, Kernel, Operands};
use crate::tensor::{Conv, ConvKind, Dtype, MAX_ELEMENTS, Shape};
use crate::{Error, Result};
use std::marker::PhantomData;
use std::sync::Arc;

const FPROP: &str = "ppppppp{56:8}{60:4}III{12:4}";
const DGRAD: &str = "pppppp{344:4}";
const WGRAD: &str = "ppppppp{60:4}I{16:4}";
const STRIPS: &str = "ppppp{132:4}";
const FPROP_TILES: &str = "ppppppp{56:8}{64:4}IIII{12:4}";
const DGRAD_TILES: &str = "pppppp{64:4}II{12:4}";
const DGRAD_CELLS: &str = "pppppp{88:4}II{12:4}";

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: THREADS }
}

const fn strips(name: &'static str, fragments: u32) -> Entry {
    Entry { name, signature: STRIPS, threads: conv_strips::threads(fragments) }
}

const fn tiles(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: conv_tile::THREADS }
}

/// The kernels of `kernels/conv3x3.cu`.
pub const FAMILY: Family = Family {
    name: "conv3x3",
    kernels: &[
        entry("conv3x3_fprop_narrow_f32", FPROP),
        entry("conv3x3_fprop_narrow_tf32", FPROP),
        entry("conv3x3_fprop_narrow_f16", FPROP),
        entry("conv3x3_fprop_narrow_bf16", FPROP),
        entry("conv3x3_fprop_wide_f16", FPROP),
        entry("conv3x3_fprop_wide_bf16", FPROP),
        entry("conv3x3_dgrad_narrow_f32", DGRAD),
        entry("conv3x3_dgrad_narrow_tf32", DGRAD),
        entry("conv3x3_dgrad_narrow_f16", DGRAD),
        entry("conv3x3_dgrad_narrow_bf16", DGRAD),
        tiles("conv3x3_fprop_tiles32_f16", FPROP_TILES),
        tiles("conv3x3_fprop_tiles32_bf16", FPROP_TILES),
        tiles("conv3x3_fprop_tiles64_f16", FPROP_TILES),
        tiles("conv3x3_fprop_tiles64_bf16", FPROP_TILES),
        tiles("conv3x3_dgrad_tiles32_f16", DGRAD_TILES),
        tiles("conv3x3_dgrad_tiles32_bf16", DGRAD_TILES),
        tiles("conv3x3_dgrad_tiles48_f16", DGRAD_TILES),
        tiles("conv3x3_dgrad_tiles48_bf16", DGRAD_TILES),
        tiles("conv3x3_dgrad_tiles64_f16", DGRAD_TILES),
        tiles("conv3x3_dgrad_tiles64_bf16", DGRAD_TILES),
        tiles("conv3x3_fprop_wgmma32_f16", FPROP_TILES),
        tiles("conv3x3_fprop_wgmma32_bf16", FPROP_TILES),
        tiles("conv3x3_fprop_wgmma64_f16", FPROP_TILES),
        tiles("conv3x3_fprop_wgmma64_bf16", FPROP_TILES),
        tiles("conv3x3_dgrad_wgmma32_f16", DGRAD_TILES),
        tiles("conv3x3_dgrad_wgmma32_bf16", DGRAD_TILES),
        tiles("conv3x3_dgrad_wgmma48_f16", DGRAD_TILES),
        tiles("conv3x3_dgrad_wgmma48_bf16", DGRAD_TILES),
        tiles("conv3x3_dgrad_wgmma64_f16", DGRAD_TILES),
        tiles("conv3x3_dgrad_wgmma64_bf16", DGRAD_TILES),
        tiles("conv3x3_dgrad_cells32_f16", DGRAD_CELLS),
        tiles("conv3x3_dgrad_cells32_bf16", DGRAD_CELLS),
        tiles("conv3x3_dgrad_cells48_f16", DGRAD_CELLS),
        tiles("conv3x3_dgrad_cells48_bf16", DGRAD_CELLS),
        entry("conv3x3_wgrad_f32", WGRAD),
        entry("conv3x3_wgrad_tf32", WGRAD),
        strips("conv3x3_wgrad_24_s1_f16", 3),
        strips("conv3x3_wgrad_24_s2_f16", 3),
        strips("conv3x3_wgrad_32_s1_f16", 4),
        strips("conv3x3_wgrad_32_s2_f16", 4),
        strips("conv3x3_wgrad_40_s1_f16", 5),
        strips("conv3x3_wgrad_40_s2_f16", 5),
        strips("conv3x3_wgrad_24_s1_bf16", 3),
        strips("conv3x3_wgrad_24_s2_bf16", 3),
        strips("conv3x3_wgrad_32_s1_bf16", 4),
        strips("conv3x3_wgrad_32_s2_bf16", 4),
        strips("conv3x3_wgrad_40_s1_bf16", 5),
        strips("conv3x3_wgrad_40_s2_bf16", 5),
        entry("conv3x3_wgrad_sum", "pp{132:4}I"),
    ],
};

/// Layouts of strips that a tuning can choose from.
const RANKS: u32 = 12;
const SUM: &str = "conv3x3_wgrad_sum";

const SIDE: u32 = 3;
const TAPS: usize = 9;
const OPERATION: &str = "3×3 convolution";

/// Steps that a block of dgrad on spatial tiles has at least, and blocks below which it has fewer.
const TILED_STEPS: u32 = 64;
const TILED_BLOCKS: u32 = 1024;

/// `ConvShape` of the `.cu` file.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Geometry {
    pixels: u32,
    height: u32,
    width: u32,
    stride: u32,
    pad_top: u32,
    pad_left: u32,
    out_width: FastDivisor,
    out_height: FastDivisor,
    inputs: FastDivisor,
}

/// `GradientClass` of the `.cu` file.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct GradientClass {
    columns: FastDivisor,
    rows: FastDivisor,
    taps_across: FastDivisor,
    taps_down: u32,
    first_row: u32,
    first_column: u32,
    first_kernel_row: u32,
    first_kernel_column: u32,
    out_row: u32,
    out_column: u32,
    pixels: u32,
    tiles: u32,
    first_block: u32,
}

/// `GradientShape` of the `.cu` file.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct GradientShape {
    height: u32,
    width: u32,
    out_height: u32,
    out_width: u32,
    stride: u32,
    inputs: u32,
    outputs: FastDivisor,
    groups: u32,
    classes: [GradientClass; 4],
}

// SAFETY: plain structs of the layout that the kernels declare.
unsafe impl DeviceRepr for Geometry {}
// SAFETY: as above.
unsafe impl DeviceRepr for GradientShape {}

impl Argument for Geometry {
    const CODE: &'static str = "{60:4}";
}
impl Argument for GradientShape {
    const CODE: &'static str = "{344:4}";
}

/// Along one axis: the pixels that the same taps reach.
#[derive(Clone, Copy, Debug)]
struct AxisClass {
    /// The first of them, and how many.
    first: u32,
    count: u32,
    first_tap: u32,
    taps: u32,
    /// Where the first tap takes the first of them.
    out: u32,
}

/// All pixels of a side, or with stride 2 those of one parity and then those of the other; if they exist.
fn axis_classes(stride: u32, pad: u32, side: u32) -> impl Iterator<Item = AxisClass> {
    let classes = (0..stride).map(move |first_tap| {
        // first + pad and the taps are of one parity.
        let first = (first_tap + pad) % stride;
        AxisClass {
            first,
            count: (side + stride - 1).saturating_sub(first) / stride,
            first_tap,
            taps: (SIDE - first_tap).div_ceil(stride),
            out: (first + pad - first_tap) / stride,
        }
    });
    classes.filter(|class| class.count > 0)
}

/// How dgrad is computed: on spatial tiles of pixels or, with stride 2, of cells, in a grid; or as implicit products of
/// classes of pixels, in so many blocks.
#[derive(Clone, Debug)]
enum GradientWay {
    Tiles(Columns, ConvTiles, Grid),
    Cells(Columns, CellStride, Grid),
    Classes(Box<GradientShape>, u32),
}

/// A convolution of certain shapes: what its launches are and cost, without a device.
#[derive(Clone, Copy, Debug)]
pub struct Conv3x3Shape {
    x: Shape,
    y: Shape,
    geometry: Geometry,
    /// With stride 1, if tensor cores multiply.
    tiles: Option<ConvTiles>,
    choices: Choices,
}

impl Conv3x3Shape {
    /// The dense 3×3 convolution `conv` of images `x`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another convolution, for inputs or outputs that are no multiple of 8, and for an empty or too
    /// large tensor.
    pub fn new(conv: &Conv, x: Shape) -> Result<Self> {
        let y = conv.output(x)?;
        let wrong = |problem| Err(Error::Shape { operation: OPERATION, problem });
        let Conv { kind, kernel, stride, inputs, outputs, .. } = *conv;
        if (kind, kernel) != (ConvKind::Dense, 3) {
            return wrong(format!("{conv:?} is no dense 3×3 convolution"));
        }
        if inputs % 8 != 0 || outputs % 8 != 0 || outputs == 0 {
            return wrong(format!("{inputs} inputs and {outputs} outputs; multiples of 8 are needed"));
        }
        if inputs.checked_mul(TAPS * outputs).is_none_or(|weights| weights > MAX_ELEMENTS) {
            return wrong(format!(
                "{inputs} inputs and {outputs} outputs: {MAX_ELEMENTS} weights are possible"
            ));
        }
        let geometry = Geometry {
            pixels: y.pixels() as u32,
            height: x.h as u32,
            width: x.w as u32,
            stride: stride as u32,
            pad_top: conv.pad_before(x.h) as u32,
            pad_left: conv.pad_before(x.w) as u32,
            out_width: FastDivisor::new(y.w as u32),
            out_height: FastDivisor::new(y.h as u32),
            inputs: FastDivisor::new(inputs as u32),
        };
        // With stride 1 the padding is 1, and x and y are images of one size.
        let tiles = (stride == 1).then(|| ConvTiles::new(x.n as u32, x.h as u32, x.w as u32, BOUNDS));
        Ok(Self { x, y, geometry, tiles, choices: Choices::default() })
    }

    /// With launches as a tuning chooses them.
    ///
    /// # Errors
    /// [`Error::Shape`] for what is none of [`choices`](Self::choices).
    pub fn with(self, dtype: Dtype, choices: Choices) -> Result<Self> {
        choices.check(OPERATION, |launch| self.choices(dtype, launch))?;
        Ok(Self { choices, ..self })
    }

    /// What a tuning can choose from: an implicit product or, in f16 and bf16, spatial tiles, with columns of a tile; but
    /// fprop of stride 2 is always a product. With stride 1 tiles may be multiplied by wgmma, on a device that has it. Of the gradient of the weights how many blocks there are, or in f16 and bf16
    /// which of the layouts of strips that promise the most, from the second best on.
    pub fn choices(&self, dtype: Dtype, launch: Launch) -> Vec<Choice> {
        let ways = |channels: usize, products: &[Tile], tiles: fn(&Self, Way) -> &'static [Columns]| {
            if dtype.bytes() == 4 {
                return Vec::new();
            }
            // Of tiles that hold all channels the smallest.
            let most = (channels as u32).next_power_of_two().clamp(Tile::NARROW.columns, Tile::WIDE.columns);
            let products = products.iter().map(|tile| tile.columns).filter(|&columns| columns <= most);
            let products = products.map(|columns| Choice::by(Way::Product).columns(columns));
            let on_tiles =
                |way| tiles(self, way).iter().map(move |tile| Choice::by(way).columns(tile.columns));
            products.chain(on_tiles(Way::Spatial)).chain(on_tiles(Way::Wgmma)).collect()
        };
        match launch {
            Launch::Fprop => ways(self.y.c, &[Tile::NARROW, Tile::WIDE], Self::all_forward),
            Launch::Dgrad => ways(self.x.c, &[Tile::NARROW], Self::all_backward),
            Launch::Wgrad if dtype.bytes() == 4 => {
                [264, 528, 1056].map(|blocks| Choice::default().blocks(blocks)).to_vec()
            }
            Launch::Wgrad => (2..=RANKS).map(|rank| Choice::default().rank(rank)).collect(),
            Launch::Backward => Vec::new(),
        }
    }

    /// Of the input.
    pub const fn input(&self) -> Shape {
        self.x
    }

    /// Of the output.
    pub const fn output(&self) -> Shape {
        self.y
    }

    /// The number of weights.
    pub const fn weights(&self) -> usize {
        self.x.c * TAPS * self.y.c
    }

    /// Columns of the weights as a matrix \[outputs, (kh, kw, input)\].
    const fn columns(&self) -> u32 {
        (self.x.c * TAPS) as u32
    }

    /// Multiply-adds of any direction, zeros of the padding included.
    const fn products(&self) -> u64 {
        self.y.pixels() as u64 * self.weights() as u64
    }

    /// Of fprop as an implicit product with so many columns: the widest that computes no more than narrower ones.
    fn tile(dtype: Dtype, columns: usize, choice: Choice) -> Tile {
        if let Some(chosen) = choice.columns.and_then(Tile::with_columns) {
            return *chosen;
        }
        match dtype {
            Dtype::F32 | Dtype::Tf32 => Tile::NARROW,
            Dtype::F16 | Dtype::Bf16 if columns.next_multiple_of(128) == columns.next_multiple_of(64) => {
                Tile::WIDE
            }
            Dtype::F16 | Dtype::Bf16 => Tile::NARROW,
        }
    }

    /// The spatial tiles of fprop or of dgrad with stride 1, if that is how they are computed.
    fn tiles(&self, dtype: Dtype, choice: Choice) -> Option<ConvTiles> {
        self.tiles.filter(|tiles| Self::are_taken(tiles, BOUNDS, dtype, choice))
    }

    /// Whether tiles of pixels or cells are computed on.
    fn are_taken(tiles: &ConvTiles, bounds: Bounds, dtype: Dtype, choice: Choice) -> bool {
        let chosen = choice.way.map(|way| way != Way::Product);
        dtype.bytes() == 2 && chosen.unwrap_or_else(|| tiles.are_filled(bounds))
    }

    /// Of fprop on spatial tiles, those there are.
    fn all_forward(&self, way: Way) -> &'static [Columns] {
        match (self.geometry.stride, way) {
            (1, Way::Wgmma) => Columns::FORWARD_WGMMA,
            (1, _) => Columns::FORWARD,
            _ => &[],
        }
    }

    /// The same of dgrad.
    fn all_backward(&self, way: Way) -> &'static [Columns] {
        match (self.geometry.stride, way) {
            (1, Way::Wgmma) => Columns::BACKWARD_WGMMA,
            (1, _) => Columns::BACKWARD,
            (_, Way::Wgmma) => &[],
            _ => Columns::CELLS,
        }
    }

    fn forward_columns(&self) -> Columns {
        let choice = self.choices.fprop;
        Columns::chosen(choice.columns, self.y.c as u32, self.all_forward(choice.way.unwrap_or(Way::Spatial)))
    }

    fn backward_columns(&self) -> Columns {
        let choice = self.choices.dgrad;
        Columns::chosen(
            choice.columns,
            self.x.c as u32,
            self.all_backward(choice.way.unwrap_or(Way::Spatial)),
        )
    }

    /// Of fprop.
    fn grid(&self, dtype: Dtype) -> Grid {
        let (outputs, choice) = (self.y.c as u32, self.choices.fprop);
        match self.tiles(dtype, choice) {
            Some(tiles) => Grid::cut(tiles.count(), self.forward_columns().groups(outputs), RUNS),
            None => Grid::new(self.geometry.pixels, outputs, &Self::tile(dtype, self.y.c, choice)),
        }
    }

    /// How dgrad is computed.
    fn gradient_way(&self, dtype: Dtype) -> GradientWay {
        let (columns, choice) = (self.backward_columns(), self.choices.dgrad);
        if let Some(tiles) = self.tiles(dtype, choice) {
            return GradientWay::Tiles(columns, tiles, self.gradient_grid(&columns, &tiles));
        }
        let Geometry { stride, pad_top, pad_left, .. } = self.geometry;
        if stride == 2 {
            let size = |shape: Shape| [shape.h as u32, shape.w as u32];
            let (images, pad) = (self.x.n as u32, [pad_top, pad_left]);
            let cells = CellStride::new(images, size(self.x), size(self.y), pad, columns.bounds);
            if Self::are_taken(&cells.tiles, columns.bounds, dtype, choice) {
                return GradientWay::Cells(columns, cells, self.gradient_grid(&columns, &cells.tiles));
            }
        }
        let (classes, blocks) = self.gradient();
        GradientWay::Classes(Box::new(classes), blocks)
    }

    /// Of dgrad on spatial tiles. It has no sums over runs, so a block has just so many tiles that what it begins with, the
    /// first halo above all, takes little of its time; if there are enough for all multiprocessors.
    fn gradient_grid(&self, columns: &Columns, tiles: &ConvTiles) -> Grid {
        let groups = columns.groups(self.x.c as u32);
        let wanted = TILED_STEPS.div_ceil(conv_tile::steps(self.y.c as u32));
        let most = (tiles.count() * groups / TILED_BLOCKS).max(1);
        let of_block = wanted.min(most);
        Grid { tiles: of_block, runs: tiles.count().div_ceil(of_block), groups }
    }

    /// Of the gradient of the weights in f32 and tf32.
    fn weight_grid(&self) -> WeightGrid {
        let step = step_elements(Dtype::F32.bytes());
        let blocks = self.choices.wgrad.blocks.unwrap_or(WEIGHT_BLOCKS);
        WeightGrid::aiming(blocks, self.geometry.pixels, [self.y.c as u32, self.columns()], &Tile::LOW, step)
    }

    /// Of the same in f16 and bf16.
    fn strips(&self) -> Strips {
        let Geometry { stride, pad_top, pad_left, .. } = self.geometry;
        let problem = StripProblem { x: self.x, y: self.y, stride, pad_top, pad_left };
        Strips::new(&problem, self.choices.wgrad.rank.map_or(0, |rank| rank as usize - 1))
    }

    const fn cost(&self, bytes: usize) -> Cost {
        Cost { bytes: bytes as u64, tensor_operations: 2 * self.products(), operations: 0 }
    }

    /// The classes of dgrad as an implicit product, those of most taps first, and the blocks of all.
    fn gradient(&self) -> (GradientShape, u32) {
        let Geometry { height, width, stride, pad_top, pad_left, .. } = self.geometry;
        let tile = Tile::NARROW;
        let mut pairs: Vec<_> = axis_classes(stride, pad_top, height)
            .flat_map(|down| axis_classes(stride, pad_left, width).map(move |across| (down, across)))
            .collect();
        pairs.sort_by_key(|(down, across)| std::cmp::Reverse(down.taps * across.taps));
        let mut classes = [GradientClass::default(); 4];
        let mut blocks = 0;
        for (class, (down, across)) in classes.iter_mut().zip(&pairs) {
            let pixels = self.x.n as u32 * down.count * across.count;
            let grid = Grid::new(pixels, self.x.c as u32, &tile);
            *class = GradientClass {
                columns: FastDivisor::new(across.count),
                rows: FastDivisor::new(down.count),
                taps_across: FastDivisor::new(across.taps),
                taps_down: down.taps,
                first_row: down.first,
                first_column: across.first,
                first_kernel_row: down.first_tap,
                first_kernel_column: across.first_tap,
                out_row: down.out,
                out_column: across.out,
                pixels,
                tiles: grid.tiles,
                first_block: blocks,
            };
            blocks += grid.blocks();
        }
        for absent in &mut classes[pairs.len()..] {
            absent.first_block = blocks;
        }
        let shape = GradientShape {
            height,
            width,
            out_height: self.y.h as u32,
            out_width: self.y.w as u32,
            stride,
            inputs: self.x.c as u32,
            outputs: FastDivisor::new(self.y.c as u32),
            groups: (self.x.c as u32).div_ceil(tile.columns),
            classes,
        };
        (shape, blocks)
    }

    /// The launch of [`Conv3x3::fprop`].
    pub fn fprop_work(&self, dtype: Dtype, output: OutputKind) -> Work {
        let (grid, y) = (self.grid(dtype), self.y);
        let (name, shared) = match self.tiles(dtype, self.choices.fprop) {
            Some(tiles) => {
                let columns = self.forward_columns();
                (columns.name, columns.shared_forward(tiles.halo()))
            }
            None => {
                let tile = Self::tile(dtype, y.c, self.choices.fprop);
                (tile.name, tile.shared_forward())
            }
        };
        let size = dtype.bytes();
        let extra = match output {
            OutputKind::Plain => 0,
            // Partial moments, γ, β, the running statistics and the norm.
            OutputKind::Moments => 4 * moment_floats(&grid, y.c) + 4 * 10 * y.c,
            OutputKind::Folded { skip } => 4 * y.c + if skip { size * y.elements() } else { 0 },
        };
        let bytes = size * (self.x.elements() + self.weights() + y.elements()) + extra;
        Work {
            kernel: format!("conv3x3_fprop_{name}_{}", dtype.name()),
            grid: [grid.blocks(), 1, 1],
            shared,
            cost: self.cost(bytes),
        }
    }

    /// The launch of [`Conv3x3::dgrad`], with something to add or not.
    pub fn dgrad_work(&self, dtype: Dtype, skip: bool) -> Work {
        let (name, blocks, shared) = match self.gradient_way(dtype) {
            GradientWay::Tiles(columns, tiles, grid) => {
                (columns.name, grid.blocks(), columns.shared_backward(tiles.halo()))
            }
            GradientWay::Cells(columns, cells, grid) => {
                (columns.name, grid.blocks(), columns.shared_backward(cells.halo()))
            }
            GradientWay::Classes(_, blocks) => (Tile::NARROW.name, blocks, Tile::NARROW.shared(2)),
        };
        let elements = 2 * self.y.elements() + self.weights() + (1 + usize::from(skip)) * self.x.elements();
        Work {
            kernel: format!("conv3x3_dgrad_{name}_{}", dtype.name()),
            grid: [blocks, 1, 1],
            shared,
            cost: self.cost(dtype.bytes() * elements + 4 * 3 * self.y.c),
        }
    }

    /// The launches of [`Conv3x3::wgrad`]: in f32 and tf32 one, else another one that adds up.
    pub fn wgrad_work(&self, dtype: Dtype) -> Vec<Work> {
        let read = dtype.bytes() * (2 * self.y.elements() + self.x.elements()) + 4 * 3 * self.y.c;
        let dweight = 4 * 2 * self.weights();
        if dtype.storage() == Dtype::F32 {
            let grid = self.weight_grid();
            return vec![Work {
                kernel: format!("conv3x3_wgrad_{dtype}"),
                grid: [grid.blocks(), 1, 1],
                shared: Tile::LOW.shared(2),
                cost: self.cost(read + 4 * grid.partial(&Tile::LOW) + dweight),
            }];
        }
        let strips = self.strips();
        let partial = 4 * strips.partial();
        let sum = Cost {
            bytes: (partial + dweight) as u64,
            tensor_operations: 0,
            operations: strips.partial() as u64,
        };
        vec![
            Work {
                kernel: format!("conv3x3_wgrad_{}_{}", strips.name(), dtype.name()),
                grid: [strips.blocks(), 1, 1],
                shared: strips.shared,
                cost: self.cost(read + partial),
            },
            Work { kernel: SUM.into(), grid: [strips.pieces(), 1, 1], shared: 0, cost: sum },
        ]
    }

    /// Floats that the launches need in a [`Workspace`].
    pub fn workspace_floats(&self, dtype: Dtype) -> usize {
        let of_weights = if dtype.storage() == Dtype::F32 {
            self.weight_grid().partial(&Tile::LOW)
        } else {
            self.strips().partial()
        };
        moment_floats(&self.grid(dtype), self.y.c).max(of_weights)
    }
}

/// Two numbers for each run and channel.
const fn moment_floats(grid: &Grid, channels: usize) -> usize {
    2 * grid.runs as usize * channels
}

/// The plan for one convolution, batch and element type. The same calls give the same bits.
#[derive(Debug)]
pub struct Conv3x3<T> {
    device: Device,
    dtype: Dtype,
    shape: Conv3x3Shape,
    fprop: Kernel,
    dgrad: Kernel,
    wgrad: Kernel,
    sum: Kernel,
    element: PhantomData<fn() -> T>,
}

impl<T: RawElement> Conv3x3<T> {
    /// For the convolution `conv` of images `x`.
    ///
    /// # Errors
    /// Those of [`Conv3x3Shape::new`] and of [`Device::module`]; [`Error::Driver`] on a GPU with too little shared memory.
    pub fn plan(device: &Device, conv: &Conv, x: Shape) -> Result<Self> {
        Self::plan_with(device, conv, x, T::DTYPE, Choices::default())
    }

    /// The same, multiplying as `dtype` says, with launches as a tuning chooses them.
    ///
    /// # Errors
    /// Those of [`plan`](Self::plan) and of [`Conv3x3Shape::with`]; [`Error::Shape`] if elements of `dtype` are no `T`, and for
    /// [`Way::Wgmma`] on a device without it.
    pub fn plan_with(device: &Device, conv: &Conv, x: Shape, dtype: Dtype, choices: Choices) -> Result<Self> {
        check_storage::<T>(OPERATION, dtype)?;
        let shape = Conv3x3Shape::new(conv, x)?.with(dtype, choices)?;
        choices.check_device(OPERATION, device)?;
        let module = device.module(&FAMILY)?;
        let kernel = |work: Work| {
            let kernel = module.kernel(&work.kernel)?;
            kernel.allow_shared(work.shared)?;
            Ok::<_, Error>(kernel)
        };
        Ok(Self {
            device: device.clone(),
            dtype,
            shape,
            fprop: kernel(shape.fprop_work(dtype, OutputKind::Plain))?,
            dgrad: kernel(shape.dgrad_work(dtype, false))?,
            wgrad: kernel(shape.wgrad_work(dtype).swap_remove(0))?,
            sum: module.kernel(SUM)?,
            element: PhantomData,
        })
    }

    /// How it multiplies.
    pub const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The shapes, and what the launches cost.
    pub const fn shape(&self) -> &Conv3x3Shape {
        &self.shape
    }

    /// Floats that the launches need in a [`Workspace`].
    pub fn workspace_floats(&self) -> usize {
        self.shape.workspace_floats(self.dtype)
    }

    /// y ← the convolution of x, finished as `output` says. `weight` is \[out, 3, 3, in\].
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap, too small a workspace, an input
    /// that is not [plain](Input::Plain), or the moments of a single value per channel. Nothing has been changed then.
    /// [`Error::Driver`].
    pub fn fprop(
        &self,
        stream: &Arc<CudaStream>,
        x: Input<'_, '_, T>,
        weight: &CudaView<'_, T>,
        y: &mut CudaViewMut<'_, T>,
        mut output: Output<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let shape = &self.shape;
        let work = shape.fprop_work(self.dtype, output.kind());
        let grid = shape.grid(self.dtype);
        let outputs = shape.y.c as u32;
        let x = plain(x)?;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("x", x, shape.x.elements())?;
        operands.read("weights", weight, shape.weights())?;
        operands.write("y", y, shape.y.elements())?;
        output.check(&mut operands, shape.y)?;
        let mut finish = NormFinish::default();
        let (mut silu, mut moments) = (0_u32, 0_u32);
        match &mut output {
            Output::Plain => {}
            Output::Moments(statistics) => {
                if shape.y.pixels() == 1 {
                    let problem = format!("{} has one value per channel, and that has no variance", shape.y);
                    return Err(Error::Shape { operation: OPERATION, problem });
                }
                workspace.check(OPERATION, moment_floats(&grid, shape.y.c), grid.groups as usize)?;
                finish = statistics.finish(stream, shape.y.pixels());
                moments = 1;
            }
            Output::Folded { act, .. } => silu = u32::from(*act == Activation::Silu),
        }
        let mut partial = workspace.partial.as_view_mut();
        let mut counters = workspace.counters.as_view_mut();
        let mut launch = self.fprop.on(stream);
        launch.input(x).input(weight).output(y);
        match &output {
            Output::Folded { bias, skip: Some(skip), .. } => launch.input(bias).input(skip),
            Output::Folded { bias, skip: None, .. } => launch.input(bias).null(),
            _ => launch.null().null(),
        };
        launch.output(&mut partial).output(&mut counters).value(&finish);
        let tiles = shape.tiles(self.dtype, shape.choices.fprop);
        let inputs = shape.x.c as u32;
        match &tiles {
            Some(tiles) => launch.value(tiles).value(&inputs),
            None => launch.value(&shape.geometry),
        };
        launch.value(&outputs).value(&silu).value(&moments).value(&grid);
        // SAFETY: all buffers have their shapes and what is written overlaps nothing else. The geometry is theirs: a block
        // reads pixels of x within the image alone, and writes the pixels of y of its run, those that exist, its partial
        // moments, for which there is room, and as the last block of its group the norm and the running statistics.
        unsafe { launch.run(work.grid, work.shared, format_args!("{} to {}", shape.x, shape.y)) }
    }

    /// dx ← the gradient of the input, plus what is to be added.
    ///
    /// # Errors
    /// As for [`fprop`](Self::fprop), and for a gradient that does not arrive [alone](Arrival::Alone) or another output than
    /// [`GradientOutput::Plain`].
    pub fn dgrad(
        &self,
        stream: &Arc<CudaStream>,
        gradient: GradientView<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dx: &mut CudaViewMut<'_, T>,
        output: GradientOutput<'_, '_, T>,
    ) -> Result<()> {
        let shape = &self.shape;
        let GradientOutput::Plain { skip } = output else {
            let problem = "its input is stored plainly: no activation lies before a dense convolution".into();
            return Err(Error::Shape { operation: OPERATION, problem });
        };
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        check_gradient(&gradient, &mut operands, shape.y)?;
        operands.read("weights", weight, shape.weights())?;
        if let Some(skip) = skip {
            operands.read("skip", skip, shape.x.elements())?;
        }
        operands.write("dx", dx, shape.x.elements())?;
        let work = shape.dgrad_work(self.dtype, skip.is_some());
        let (inputs, outputs) = (shape.x.c as u32, shape.y.c as u32);
        let way = shape.gradient_way(self.dtype);
        let mut launch = self.dgrad.on(stream);
        launch.input(gradient.g).input(gradient.y).input(gradient.owed).input(weight);
        match skip {
            Some(skip) => launch.input(skip),
            None => launch.null(),
        };
        launch.output(dx);
        match &way {
            GradientWay::Tiles(_, tiles, grid) => {
                launch.value(tiles).value(&inputs).value(&outputs).value(grid);
            }
            GradientWay::Cells(_, cells, grid) => {
                launch.value(cells).value(&inputs).value(&outputs).value(grid);
            }
            GradientWay::Classes(classes, _) => {
                launch.value(&**classes);
            }
        }
        // SAFETY: all buffers have their shapes and dx overlaps none. A block reads the pixels of y that those of its run
        // are reached from, within the image alone, and writes its run's pixels of dx, those that exist; each pixel is in
        // one class.
        unsafe { launch.run(work.grid, work.shared, format_args!("{} to {}", shape.x, shape.y)) }
    }

    /// dweight += the gradient of the weights, \[out, 3, 3, in\] in f32.
    ///
    /// # Errors
    /// As for [`fprop`](Self::fprop), and for a gradient that does not arrive [alone](Arrival::Alone).
    pub fn wgrad(
        &self,
        stream: &Arc<CudaStream>,
        x: Input<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let shape = &self.shape;
        let works = shape.wgrad_work(self.dtype);
        let x = plain(x)?;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("x", x, shape.x.elements())?;
        check_gradient(&gradient, &mut operands, shape.y)?;
        operands.write("the gradient of the weights", dweight, shape.weights())?;
        let shapes = format_args!("{} to {}", shape.x, shape.y);
        let [work, sum] = works.as_slice() else {
            let (work, grid, outputs) = (&works[0], shape.weight_grid(), shape.y.c as u32);
            workspace.check(OPERATION, grid.partial(&Tile::LOW), grid.counters())?;
            let mut partial = workspace.partial.as_view_mut();
            let mut counters = workspace.counters.as_view_mut();
            let mut launch = self.wgrad.on(stream);
            launch.input(gradient.g).input(gradient.y).input(gradient.owed).input(x).output(dweight);
            launch.output(&mut partial).output(&mut counters);
            launch.value(&shape.geometry).value(&outputs).value(&grid);
            // SAFETY: all buffers have their shapes and what is written overlaps nothing else. A block reads pixels of its
            // split and what lies under the kernel there, within the image alone, and writes its partial tile; the last
            // block of each tile writes its weights, those that exist.
            return unsafe { launch.run(work.grid, work.shared, shapes) };
        };
        let strips = shape.strips();
        workspace.check(OPERATION, strips.partial(), 0)?;
        let mut partial = workspace.partial.as_view_mut();
        let mut launch = self.wgrad.on(stream);
        launch.input(gradient.g).input(gradient.y).input(gradient.owed).input(x);
        launch.output(&mut partial).value(&strips.shape);
        // SAFETY: all buffers have their shapes and what is written overlaps nothing else. A block reads rows of its strips
        // and what lies under the kernel there, within the image alone, and writes its partial tile, for which there is room.
        unsafe { launch.run(work.grid, work.shared, shapes)? };
        let partial = workspace.partial.as_view();
        let mut launch = self.sum.on(stream);
        launch.input(&partial).output(dweight).value(&strips.shape).value(&strips.fragments);
        // SAFETY: each block reads one fragment of all partial tiles, which the launch before has written, and writes its
        // weights, those that exist.
        unsafe { launch.run(sum.grid, sum.shared, shapes) }
    }
}

/// The tensor of a plain input.
fn plain<'a, 'b, T>(x: Input<'a, 'b, T>) -> Result<&'a CudaView<'b, T>> {
    match x {
        Input::Plain(x) => Ok(x),
        Input::Silu { .. } | Input::Gated { .. } => {
            let problem = "its input must be stored plainly: it would be transformed for each tap".into();
            Err(Error::Shape { operation: OPERATION, problem })
        }
    }
}

fn check_gradient<T: RawElement>(
    gradient: &GradientView<'_, '_, T>,
    operands: &mut Operands<'_>,
    y: Shape,
) -> Result<()> {
    if !matches!(gradient.arrival, Arrival::Alone) {
        let problem =
            "the gradient of its output must arrive alone: neither stochastic depth nor a gate follows it";
        return Err(Error::Shape { operation: OPERATION, problem: problem.into() });
    }
    gradient.check(operands, y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Padding;

    /// Each pixel of a side is in one class, and a class has just the taps that reach its pixels, if the border is far.
    #[test]
    fn classes_have_every_pixel_and_tap() {
        for (stride, pad) in [(1, 0), (1, 1), (2, 0), (2, 1)] {
            for side in 1..9 {
                let mut seen = vec![0; side as usize];
                for class in axis_classes(stride, pad, side) {
                    for r in 0..class.count {
                        let pixel = class.first + stride * r;
                        seen[pixel as usize] += 1;
                        let taps: Vec<u32> = (0..class.taps).map(|t| class.first_tap + stride * t).collect();
                        let reach: Vec<u32> =
                            (0..SIDE).filter(|tap| (pixel + pad + 6 - tap) % stride == 0).collect();
                        assert_eq!(taps, reach, "stride {stride}, padding {pad}, pixel {pixel}");
                        for (t, tap) in (0_u32..).zip(taps) {
                            let out = i64::from(class.out + r) - i64::from(t);
                            let from = i64::from(pixel + pad) - i64::from(tap);
                            assert_eq!(out * i64::from(stride), from);
                        }
                    }
                }
                assert_eq!(seen, vec![1; side as usize], "stride {stride}, padding {pad}");
            }
        }
    }

    #[test]
    fn structs_are_as_large_as_their_codes_say() {
        assert_eq!(size_of::<Geometry>(), 60);
        assert_eq!(size_of::<GradientShape>(), 344);
        let conv = Conv {
            kind: ConvKind::Dense,
            kernel: 3,
            stride: 2,
            padding: Padding::Same,
            inputs: 48,
            outputs: 256,
        };
        let shape = Conv3x3Shape::new(&conv, Shape::new(256, 75, 75, 48)).unwrap();
        let (gradient, blocks) = shape.gradient();
        let taps = gradient.classes.map(|class| class.taps_down * class.taps_across.divisor);
        assert_eq!((taps, shape.dgrad_work(Dtype::F32, true).grid[0]), ([4, 2, 2, 1], blocks));
    }
}
