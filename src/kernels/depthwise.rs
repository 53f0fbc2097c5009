//! Depthwise convolution, 3×3 and 5×5, stride 1 and 2: forward, and the gradients of input and weights in one pass.
//! Formulas, shapes and bytes are in `kernels/depthwise.cu`.
//!
//! The input is read as stored or as SiLU(z), zero beyond the border. Forward, the output's moments become its
//! normalisation; backward, the batch norm that follows is paid on load, and what the producer of z is owed is found on
//! store. Each is one launch.

use super::operand::{NormFinish, OutputKind, OwedFinish};
use super::raw::{RawElement, check_shape};
use super::tuning::{Choice, Choices, Launch as Tuned};
use super::{Arrival, Cost, GradientOutput, GradientView, Input, Output, Work, Workspace};
use crate::backend::Activation;
use crate::device::cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtr, DeviceRepr};
use crate::device::{Argument, Device, Element, Entry, Family, Kernel, Launch, Operands};
use crate::tensor::{Conv, ConvKind, Dtype, Shape};
use crate::{Error, Result};
use std::marker::PhantomData;
use std::sync::Arc;

const fn fprop(name: &'static str) -> Entry {
    Entry { name, signature: "pppppIp{56:8}pp{52:4}", threads: THREADS }
}

const fn backward(name: &'static str) -> Entry {
    Entry { name, signature: "ppppppppppp{40:8}pp{52:4}", threads: THREADS }
}

/// The kernels of `kernels/depthwise.cu`.
pub const FAMILY: Family = Family {
    name: "depthwise",
    kernels: &[
        fprop("depthwise_fprop_3x3_s1_f32"),
        fprop("depthwise_fprop_3x3_s1_f16"),
        fprop("depthwise_fprop_3x3_s1_bf16"),
        fprop("depthwise_fprop_3x3_s2_f32"),
        fprop("depthwise_fprop_3x3_s2_f16"),
        fprop("depthwise_fprop_3x3_s2_bf16"),
        fprop("depthwise_fprop_5x5_s1_f32"),
        fprop("depthwise_fprop_5x5_s1_f16"),
        fprop("depthwise_fprop_5x5_s1_bf16"),
        fprop("depthwise_fprop_5x5_s2_f32"),
        fprop("depthwise_fprop_5x5_s2_f16"),
        fprop("depthwise_fprop_5x5_s2_bf16"),
        backward("depthwise_backward_3x3_s1_f32"),
        backward("depthwise_backward_3x3_s1_f16"),
        backward("depthwise_backward_3x3_s1_bf16"),
        backward("depthwise_backward_3x3_s1c5_f16"),
        backward("depthwise_backward_3x3_s1c5_bf16"),
        backward("depthwise_backward_3x3_s2_f32"),
        backward("depthwise_backward_3x3_s2_f16"),
        backward("depthwise_backward_3x3_s2_bf16"),
        backward("depthwise_backward_5x5_s1_f32"),
        backward("depthwise_backward_5x5_s1_f16"),
        backward("depthwise_backward_5x5_s1_bf16"),
        backward("depthwise_backward_5x5_s2_f32"),
        backward("depthwise_backward_5x5_s2_f16"),
        backward("depthwise_backward_5x5_s2_bf16"),
    ],
};

// As in the `.cu` file: threads and channels of a block.
const THREADS: u32 = 128;
const TILE: usize = 64;

/// What a thread has, as in the last lines of the `.cu` file: channels, and columns of a strip.
#[derive(Clone, Copy, Debug)]
struct Tiling {
    channels: usize,
    columns: usize,
}

impl Tiling {
    const fn fprop() -> Self {
        Self { channels: 4, columns: 4 }
    }

    /// Columns that there are kernels for, backward.
    const fn backward_columns(conv: &Conv, dtype: Dtype) -> &'static [u32] {
        match (conv.kernel, conv.stride, dtype) {
            (5, 1, _) => &[3],
            (5, 2, _) => &[2],
            (3, 1, Dtype::F16 | Dtype::Bf16) => &[4, 5],
            _ => &[4],
        }
    }

    /// For so many columns of steps, in strips of the columns that `choice` says. By the rule those of the fewest
    /// instructions: a row of a strip takes about 760 if it has four columns and 915 if it has five, and a strip that is not
    /// full takes as many as one that is.
    fn backward(conv: &Conv, dtype: Dtype, choice: Choice, across: usize) -> Self {
        let columns = match (choice.columns, Self::backward_columns(conv, dtype)) {
            (Some(chosen), _) => chosen,
            (None, [4, 5]) if across.div_ceil(5) * 915 < across.div_ceil(4) * 760 => 5,
            (None, columns) => columns[0],
        };
        Self { channels: 2, columns: columns as usize }
    }

    /// Strips that a block works on at a time.
    const fn slots(self) -> usize {
        THREADS as usize / (TILE / self.channels)
    }
}

/// Blocks that fill any GPU several times over; images are cut into rows until there are as many, if need be. With more than
/// twice as many each has more work instead: the last one has the partial sums of all to add up.
const ENOUGH_BLOCKS: usize = 1024;
/// What a tuning can choose instead.
const BLOCKS: [u32; 5] = [256, 512, 1024, 2048, 4096];
/// Runs of a channel tile.
const MAX_RUNS: usize = 512;
/// Rows that a strip has at least if the image has as many, and at most: the rows above it are read again.
const STRIP_ROWS: [usize; 2] = [4, 64];

/// `DepthwiseGeometry` of the `.cu` file.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Geometry {
    images: u32,
    height: u32,
    width: u32,
    out_height: u32,
    out_width: u32,
    channels: u32,
    top: u32,
    left: u32,
    strips: u32,
    cuts: u32,
    steps: u32,
    per_slot: u32,
    runs: u32,
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for Geometry {}

impl Argument for Geometry {
    const CODE: &'static str = "{52:4}";
}

/// What a backward launch does beside the two gradients, for a description of the launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackwardKind {
    /// [`Input::Plain`] and [`GradientOutput::Plain`].
    Plain {
        /// Whether there is one.
        skip: bool,
    },
    /// [`Input::Silu`] and [`GradientOutput::Silu`].
    Silu,
}

/// A convolution, its shapes and element type: what its launches follow from.
#[derive(Clone, Copy, Debug)]
pub struct DepthwiseShape {
    conv: Conv,
    x: Shape,
    y: Shape,
    dtype: Dtype,
    choices: Choices,
}

const OPERATION: &str = "depthwise convolution";

impl DepthwiseShape {
    /// For inputs of shape `x`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a convolution that is not depthwise 3×3 or 5×5, for one that does not fit `x`, for channels
    /// that are no multiple of 8 or more than 64 · [`Workspace::COUNTERS`], and for a tensor of 2³¹ elements and more.
    pub fn new(conv: &Conv, x: Shape, dtype: Dtype) -> Result<Self> {
        let wrong = |problem: String| Err(Error::Shape { operation: OPERATION, problem });
        if conv.kind != ConvKind::Depthwise || !matches!(conv.kernel, 3 | 5) {
            return wrong(format!("{conv:?}: there are kernels for depthwise 3×3 and 5×5"));
        }
        check_shape(OPERATION, x)?;
        if x.c > TILE * Workspace::COUNTERS {
            return wrong(format!("{x}: at most {} channels are possible", TILE * Workspace::COUNTERS));
        }
        Ok(Self { conv: *conv, x, y: conv.output(x)?, dtype, choices: Choices::default() })
    }

    /// With launches as a tuning chooses them.
    ///
    /// # Errors
    /// [`Error::Shape`] for what is none of [`choices`](Self::choices).
    pub fn with(self, choices: Choices) -> Result<Self> {
        choices.check(OPERATION, |launch| self.choices(launch))?;
        Ok(Self { choices, ..self })
    }

    /// What a tuning can choose from: how many blocks there are, so how far images are cut, and where a backward has kernels
    /// of several, the columns of a thread's strip.
    pub fn choices(&self, launch: Tuned) -> Vec<Choice> {
        let cut = |choice: Choice| BLOCKS.map(|blocks| choice.blocks(blocks));
        match (launch, Tiling::backward_columns(&self.conv, self.dtype)) {
            (Tuned::Backward, several @ [_, _, ..]) => {
                several.iter().flat_map(|&columns| cut(Choice::default().columns(columns))).collect()
            }
            (Tuned::Fprop | Tuned::Backward, _) => cut(Choice::default()).to_vec(),
            (Tuned::Dgrad | Tuned::Wgrad, _) => Vec::new(),
        }
    }

    /// The shape of the output.
    pub const fn output(&self) -> Shape {
        self.y
    }

    /// The forward launch; `silu` for [`Input::Silu`].
    pub fn fprop_work(&self, silu: bool, output: OutputKind) -> Work {
        let geometry = self.fprop_geometry();
        let (x, y, c) = (self.x.elements(), self.y.elements(), self.x.c);
        let partial = 2 * geometry.runs as usize * c;
        // γ, β, both running statistics twice, and the new vectors.
        let (skip, floats) = match output {
            OutputKind::Plain => (0, 0),
            OutputKind::Moments => (0, 2 * partial + 10 * c),
            OutputKind::Folded { skip } => (if skip { y } else { 0 }, c),
        };
        let floats = floats + if silu { 2 * c } else { 0 };
        self.work("fprop", "", &geometry, x + y + skip + self.conv.weights(), floats, 2)
    }

    /// The backward launch; `gated` for [`Arrival::Gated`].
    pub fn backward_work(&self, gated: bool, output: BackwardKind) -> Work {
        let geometry = self.backward_geometry();
        let (x, y, c, n) = (self.x.elements(), self.y.elements(), self.x.c, self.x.n);
        let sums = |count: usize| 2 * count * geometry.runs as usize * c;
        // a, b, c, the gradient of the weights twice, and its partial sums.
        let mut floats = 3 * c + 2 * self.conv.weights() + sums(self.conv.kernel * self.conv.kernel);
        if gated {
            floats += 2 * n * c + 2 * c;
        }
        let skip = match output {
            BackwardKind::Plain { skip } => usize::from(skip) * x,
            BackwardKind::Silu => {
                // The norm, dγ and dβ twice, and the new vectors.
                floats += sums(2) + 11 * c;
                0
            }
        };
        let cut = if self.backward_tiling().columns == 5 { "c5" } else { "" };
        self.work("backward", cut, &geometry, 2 * x + 2 * y + skip + self.conv.weights(), floats, 4)
    }

    /// What the number of its blocks does not tell of a launch: rows of a strip, and strips that a slot of a block works on one
    /// after the other.
    pub fn cut(&self, launch: Tuned) -> [u32; 2] {
        let Geometry { steps, per_slot, .. } = match launch {
            Tuned::Fprop => self.fprop_geometry(),
            Tuned::Dgrad | Tuned::Wgrad | Tuned::Backward => self.backward_geometry(),
        };
        [steps, per_slot]
    }

    /// Floats of a [`Workspace`] that the launches need.
    pub fn workspace_floats(&self) -> usize {
        let (fprop, backward) = (self.fprop_geometry(), self.backward_geometry());
        let taps = self.conv.kernel * self.conv.kernel;
        (2 * fprop.runs as usize).max((2 + taps) * backward.runs as usize) * self.x.c
    }

    fn work(
        &self,
        direction: &str,
        cut: &str,
        geometry: &Geometry,
        elements: usize,
        floats: usize,
        per_tap: u64,
    ) -> Work {
        let Conv { kernel, stride, .. } = self.conv;
        let taps = (kernel * kernel) as u64;
        Work {
            kernel: format!("depthwise_{direction}_{kernel}x{kernel}_s{stride}{cut}_{}", self.dtype.suffix()),
            grid: [geometry.runs * self.tiles() as u32, 1, 1],
            shared: 0,
            cost: Cost {
                bytes: (elements * self.dtype.bytes() + floats * size_of::<f32>()) as u64,
                tensor_operations: 0,
                operations: per_tap * taps * self.y.elements() as u64,
            },
        }
    }

    fn tiles(&self) -> usize {
        self.x.c.div_ceil(TILE)
    }

    fn fprop_geometry(&self) -> Geometry {
        self.geometry(self.choices.fprop, Tiling::fprop(), [self.y.h, self.y.w])
    }

    /// Steps of one side backward: they begin at the first that has a row of the input.
    fn backward_steps(&self, side: usize) -> usize {
        let (pad, stride) = (self.conv.pad_before(side), self.conv.stride);
        (side + pad - 1) / stride + 1 - pad / stride
    }

    fn backward_tiling(&self) -> Tiling {
        Tiling::backward(&self.conv, self.dtype, self.choices.backward, self.backward_steps(self.x.w))
    }

    fn backward_geometry(&self) -> Geometry {
        let sides = [self.backward_steps(self.x.h), self.backward_steps(self.x.w)];
        self.geometry(self.choices.backward, self.backward_tiling(), sides)
    }

    /// Cut for `sides` steps down and across.
    fn geometry(&self, choice: Choice, tiling: Tiling, [down, across]: [usize; 2]) -> Geometry {
        let (tiles, slots) = (self.tiles(), tiling.slots());
        let strips = across.div_ceil(tiling.columns);
        let blocks = (self.x.n * strips).div_ceil(slots) * tiles;
        let [fewest, most] = STRIP_ROWS;
        let enough = choice.blocks.map_or(ENOUGH_BLOCKS, |blocks| blocks as usize);
        let cuts = enough.div_ceil(blocks).min(down.div_ceil(fewest)).max(down.div_ceil(most));
        let steps = down.div_ceil(cuts);
        let cuts = down.div_ceil(steps);
        let blocks = (self.x.n * strips * cuts).div_ceil(slots);
        let per_slot = blocks.div_ceil((2 * enough / tiles).clamp(1, MAX_RUNS));
        let number = |count: usize| count as u32;
        Geometry {
            images: number(self.x.n),
            height: number(self.x.h),
            width: number(self.x.w),
            out_height: number(self.y.h),
            out_width: number(self.y.w),
            channels: number(self.x.c),
            top: number(self.conv.pad_before(self.x.h)),
            left: number(self.conv.pad_before(self.x.w)),
            strips: number(strips),
            cuts: number(cuts),
            steps: number(steps),
            per_slot: number(per_slot),
            runs: number(blocks.div_ceil(per_slot)),
        }
    }
}

/// The plan for one convolution, input shape and element type. The same calls give the same bits, on any GPU unless a
/// [tuning](super::tuning) chooses otherwise.
#[derive(Debug)]
pub struct Depthwise<T> {
    device: Device,
    shape: DepthwiseShape,
    fprop: Kernel,
    backward: Kernel,
    element: PhantomData<fn() -> T>,
}

impl<T: RawElement> Depthwise<T> {
    /// For inputs of shape `x`.
    ///
    /// # Errors
    /// Those of [`DepthwiseShape::new`] and of [`Device::module`].
    pub fn plan(device: &Device, conv: &Conv, x: Shape) -> Result<Self> {
        Self::plan_with(device, conv, x, Choices::default())
    }

    /// As [`plan`](Self::plan), with launches as a tuning chooses them.
    ///
    /// # Errors
    /// As there, and those of [`DepthwiseShape::with`].
    pub fn plan_with(device: &Device, conv: &Conv, x: Shape, choices: Choices) -> Result<Self> {
        let shape = DepthwiseShape::new(conv, x, T::DTYPE)?.with(choices)?;
        let module = device.module(&FAMILY)?;
        Ok(Self {
            device: device.clone(),
            shape,
            fprop: module.kernel(&shape.fprop_work(false, OutputKind::Plain).kernel)?,
            backward: module.kernel(&shape.backward_work(false, BackwardKind::Silu).kernel)?,
            element: PhantomData,
        })
    }

    /// Its shapes, from which its launches follow.
    pub const fn shape(&self) -> DepthwiseShape {
        self.shape
    }

    /// Floats that the workspace must have.
    pub fn workspace_floats(&self) -> usize {
        self.shape.workspace_floats()
    }

    /// y ← the convolution of the input with the weights \[k, k, c\], and what `output` says.
    ///
    /// # Errors
    /// [`Error::Shape`] for a gated input, for buffers of another length, device or alignment, or that overlap where one is
    /// written, for moments of a single value a channel, and for a workspace that is too small. Nothing has been changed
    /// then. [`Error::Driver`].
    pub fn fprop(
        &self,
        stream: &Arc<CudaStream>,
        input: Input<'_, '_, T>,
        weight: &CudaView<'_, T>,
        y: &mut CudaViewMut<'_, T>,
        mut output: Output<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let DepthwiseShape { conv, x, y: out, .. } = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        input.check(&mut operands, x)?;
        let (x_view, norm) = stored(&input)?;
        operands.read("the weights", weight, conv.weights())?;
        operands.write("y", y, out.elements())?;
        let (mut bias, mut skip, mut silu, mut finish) = (None, None, 0_u32, NormFinish::default());
        match &mut output {
            Output::Plain => {}
            Output::Moments(statistics) => {
                if out.pixels() < 2 {
                    let problem = format!("{out} has one value a channel; moments need two");
                    return Err(Error::Shape { operation: OPERATION, problem });
                }
                statistics.check(&mut operands, x.c)?;
                finish = statistics.finish(stream, out.pixels());
            }
            Output::Folded { bias: offset, act, skip: other } => {
                operands.read("the bias", *offset, x.c)?;
                if let Some(other) = other {
                    operands.read("skip", *other, out.elements())?;
                }
                (bias, skip, silu) = (Some(*offset), *other, u32::from(*act == Activation::Silu));
            }
        }
        let work = self.shape.fprop_work(norm.is_some(), output.kind());
        workspace.check(OPERATION, self.shape.workspace_floats(), self.shape.tiles())?;
        let geometry = self.shape.fprop_geometry();
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut launch = self.fprop.on(stream);
        launch.input(x_view);
        or_null(&mut launch, norm);
        launch.input(weight).output(y);
        or_null(&mut launch, bias);
        launch.value(&silu);
        or_null(&mut launch, skip);
        launch.value(&finish).output(&mut partial).output(&mut counters).value(&geometry);
        // SAFETY: all buffers have their shapes, the channels being a multiple of 8, and those that are written overlap no
        // other; `finish` holds addresses of buffers that were checked with them and that `output` borrows until here. The
        // geometry is that of the shapes: strips within the tensors, of which each is one slot's; two floats for each
        // channel of a run, for which the workspace has room, and a counter for each channel tile.
        unsafe { launch.run(work.grid, work.shared, format_args!("{x} → {out}")) }
    }

    /// The gradient of the input into `dx`, as `output` says, and that of the weights, added to `dweight` \[k, k, c\].
    ///
    /// # Errors
    /// As for [`fprop`](Self::fprop), and [`Error::Shape`] for an arrival with factors, for [`GradientOutput::Gated`], and
    /// unless both `input` and `output` are plain or both are SiLU of the same y and norm.
    pub fn backward(
        &self,
        stream: &Arc<CudaStream>,
        input: Input<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dx: &mut CudaViewMut<'_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        mut output: GradientOutput<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let wrong = |problem: &str| Err(Error::Shape { operation: OPERATION, problem: problem.into() });
        let DepthwiseShape { conv, x, y: out, .. } = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        input.check(&mut operands, x)?;
        let (x_view, norm) = stored(&input)?;
        gradient.check(&mut operands, out)?;
        let (raw_norm, gate, dpool) = match gradient.arrival {
            Arrival::Alone => (None, None, None),
            Arrival::Gated { norm, gate, dpool } => (Some(norm), Some(gate), Some(dpool)),
            Arrival::Factors(_) => {
                return wrong("a depthwise convolution's gradient has no factors of its own");
            }
        };
        operands.read("the weights", weight, conv.weights())?;
        operands.write("dx", dx, x.elements())?;
        operands.write("the gradient of the weights", dweight, conv.weights())?;
        let address = |view: &CudaView<'_, T>| view.device_ptr(stream).0;
        let (kind, skip, finish) = match (&mut output, norm) {
            (GradientOutput::Plain { skip }, None) => {
                if let Some(skip) = skip {
                    operands.read("skip", *skip, x.elements())?;
                }
                (BackwardKind::Plain { skip: skip.is_some() }, *skip, OwedFinish::default())
            }
            (GradientOutput::Silu { y, debt }, Some(norm)) => {
                let same_norm = norm.device_ptr(stream).0 == debt.norm.device_ptr(stream).0;
                if y.len() != x_view.len() || address(y) != address(x_view) || !same_norm {
                    return wrong("the input and the gradient's output are of different y or norm");
                }
                debt.check(&mut operands, x.c)?;
                (BackwardKind::Silu, None, debt.finish(stream, x.pixels()))
            }
            (GradientOutput::Gated { .. }, _) => {
                return wrong("the input of a depthwise convolution has no gate");
            }
            _ => return wrong("the input and the gradient's output must both be plain, or both of SiLU"),
        };
        let work = self.shape.backward_work(raw_norm.is_some(), kind);
        workspace.check(OPERATION, self.shape.workspace_floats(), self.shape.tiles())?;
        let geometry = self.shape.backward_geometry();
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut launch = self.backward.on(stream);
        launch.input(x_view).input(gradient.g).input(gradient.y).input(gradient.owed);
        or_null(&mut launch, raw_norm);
        or_null(&mut launch, gate);
        or_null(&mut launch, dpool);
        launch.input(weight).output(dx).output(dweight);
        or_null(&mut launch, skip);
        launch.value(&finish).output(&mut partial).output(&mut counters).value(&geometry);
        // SAFETY: as in `fprop`; a run has two floats and one for each tap for each channel.
        unsafe { launch.run(work.grid, work.shared, format_args!("{x} → {out}")) }
    }
}

/// The tensor that an input is stored in, and the normalisation to apply.
fn stored<'a, 'b, T>(
    input: &Input<'a, 'b, T>,
) -> Result<(&'a CudaView<'b, T>, Option<&'a CudaView<'b, f32>>)> {
    match *input {
        Input::Plain(x) => Ok((x, None)),
        Input::Silu { y, norm } => Ok((y, Some(norm))),
        Input::Gated { .. } => {
            let problem = "the input of a depthwise convolution has no gate".into();
            Err(Error::Shape { operation: OPERATION, problem })
        }
    }
}

/// The buffer as the next argument, or a null pointer.
fn or_null<'a, 'b: 'a, 'c: 'b, E: Element>(launch: &mut Launch<'a>, view: Option<&'b CudaView<'c, E>>) {
    match view {
        Some(view) => launch.input(view),
        None => launch.null(),
    };
}
