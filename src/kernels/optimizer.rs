//! The optimizer: every parameter in one launch. Formulas, shapes and bytes are in `kernels/optimizer.cu`, the rules in
//! [`crate::optimizer`].
//!
//! ```no_run
//! use effnetv2::device::{Device, cudarc::driver::CudaSlice};
//! use effnetv2::kernels::optimizer::{Buffers, Optimizer, Scalars, WorkingCopy};
//! use effnetv2::optimizer::{Rule, Step};
//!
//! # fn main() -> effnetv2::Result<()> {
//! let device = Device::cuda(0)?;
//! let stream = device.compute();
//! let mut w = device.upload(&[1.0_f32; 1000])?;
//! let g = device.upload(&[0.5_f32; 1000])?;
//! let mut optimizer = Optimizer::plan(&device, Rule::PAPER, 1000, &[0..900])?;
//! let mut slots = optimizer.initial_slots()?;
//! let step = Step { number: 0, learning_rate: 0.1, weight_decay: 1e-5, gradient_scale: 1.0 };
//! optimizer.begin_step(stream, &Scalars { max_norm: Some(5.0), ..Scalars::plain(step) })?;
//! optimizer.norm_and_clip(stream, &g.as_view())?;
//! let mut views: Vec<_> = slots.iter_mut().map(CudaSlice::as_view_mut).collect();
//! let (mut w, g) = (w.as_view_mut(), g.as_view());
//! let buffers =
//!     Buffers { parameters: &mut w, gradients: &g, slots: &mut views, average: None, copy: WorkingCopy::None };
//! optimizer.update(stream, buffers)?;
//! println!("the gradient's norm was {}", optimizer.read_norm(stream)?);
//! # Ok(())
//! # }
//! ```

use super::{Cost, RawElement, Work};
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
use crate::device::{self, Device, Entry, Family, Kernel, Launch, Module, Operands};
use crate::optimizer::Rule;
pub use crate::optimizer::Scalars;
use crate::tensor::{Dtype, MAX_ELEMENTS};
use crate::{Error, Result};
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;

const THREADS: u32 = 256;
/// Elements of a block, and of a block of the norm: as in the `.cu` file.
const TILE: u32 = 2048;
const NORM_TILE: u32 = 16_384;

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: THREADS }
}

/// The kernels of `kernels/optimizer.cu`.
pub const FAMILY: Family = Family {
    name: "optimizer",
    kernels: &[
        entry("optimizer_rmsprop_f32", "ppppppppIffff"),
        entry("optimizer_rmsprop_f16", "ppppppppIffff"),
        entry("optimizer_rmsprop_bf16", "ppppppppIffff"),
        entry("optimizer_sgd_f32", "pppppppIfi"),
        entry("optimizer_sgd_f16", "pppppppIfi"),
        entry("optimizer_sgd_bf16", "pppppppIfi"),
        entry("optimizer_adamw_f32", "ppppppppIfffff"),
        entry("optimizer_adamw_f16", "ppppppppIfffff"),
        entry("optimizer_adamw_bf16", "ppppppppIfffff"),
        entry("optimizer_norm_partial", "ppI"),
        entry("optimizer_norm_finish", "pppI"),
        entry("optimizer_average", "pppI"),
        entry("optimizer_cast_f16", "ppI"),
        entry("optimizer_cast_bf16", "ppI"),
    ],
};

/// An element of the working copy that convolutions read.
pub trait CopyElement: RawElement {
    /// The kernel that casts f32 to it.
    const CAST: &'static str;
}

impl CopyElement for f16 {
    const CAST: &'static str = "optimizer_cast_f16";
}

impl CopyElement for bf16 {
    const CAST: &'static str = "optimizer_cast_bf16";
}

/// A rule on a number of parameters: what its launches are and cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateShape {
    /// The rule.
    pub rule: Rule,
    /// How many values it updates.
    pub parameters: usize,
}

impl UpdateShape {
    /// The launch of [`Optimizer::update`], with a moving average or without one, and with a working copy in `copy`;
    /// [`Dtype::F32`] is none.
    pub fn update_work(self, average: bool, copy: Dtype) -> Work {
        let n = self.parameters as u64;
        let (name, operations) = match self.rule {
            Rule::RmsPropTf { .. } => ("rmsprop", 13),
            Rule::Sgd { .. } => ("sgd", 7),
            Rule::AdamW { .. } => ("adamw", 17),
        };
        let copied = if copy == Dtype::F32 { 0 } else { copy.bytes() as u64 };
        let averaged = if average { 8 } else { 0 };
        let bytes = n * (12 + 8 * self.rule.slots().len() as u64 + averaged + copied) + n.div_ceil(8);
        let operations = n * (operations + if average { 3 } else { 0 });
        elementwise(format!("optimizer_{name}_{copy}"), self.parameters, bytes, operations)
    }

    /// The launches of [`Optimizer::norm`] and [`Optimizer::norm_and_clip`].
    pub fn norm_work(self) -> [Work; 2] {
        let n = self.parameters as u64;
        let blocks = n.div_ceil(NORM_TILE.into());
        let work = |kernel: &str, blocks: u64, bytes, operations| Work {
            kernel: kernel.into(),
            grid: [blocks as u32, 1, 1],
            shared: 0,
            cost: Cost { bytes, operations, ..Cost::default() },
        };
        [
            work("optimizer_norm_partial", blocks, 4 * n + 8 * blocks, 2 * n),
            work("optimizer_norm_finish", 1, 8 * blocks, blocks),
        ]
    }
}

/// The launch of [`Optimizer::update_average`] on `values` values.
pub fn average_work(values: usize) -> Work {
    let n = values as u64;
    elementwise("optimizer_average".into(), values, 12 * n, 3 * n)
}

/// The launch of [`Optimizer::cast`] on `values` values; `copy` is a half type.
pub fn cast_work(values: usize, copy: Dtype) -> Work {
    elementwise(format!("optimizer_cast_{copy}"), values, ((4 + copy.bytes()) * values) as u64, 0)
}

/// A launch of blocks of [`TILE`] elements each.
fn elementwise(kernel: String, elements: usize, bytes: u64, operations: u64) -> Work {
    let grid = [elements.div_ceil(TILE as usize) as u32, 1, 1];
    Work { kernel, grid, shared: 0, cost: Cost { bytes, operations, ..Cost::default() } }
}

/// The buffers of an update: each as long as the parameters, aligned to 16 bytes, none overlapping another.
#[derive(Debug)]
pub struct Buffers<'a, 'b> {
    /// The weights, moved by the step.
    pub parameters: &'a mut CudaViewMut<'b, f32>,
    /// Their gradient, before `gradient_scale`.
    pub gradients: &'a CudaView<'b, f32>,
    /// The rule's slots, in the order of [`Rule::slots`].
    pub slots: &'a mut [CudaViewMut<'b, f32>],
    /// The moving average, moved towards the new weights.
    pub average: Option<&'a mut CudaViewMut<'b, f32>>,
    /// Where the new weights go rounded.
    pub copy: WorkingCopy<'a, 'b>,
}

/// The working copy of an update.
#[derive(Debug)]
pub enum WorkingCopy<'a, 'b> {
    /// There is none: the weights are used as they are.
    None,
    /// In f16.
    F16(&'a mut CudaViewMut<'b, f16>),
    /// In bf16.
    Bf16(&'a mut CudaViewMut<'b, bf16>),
}

/// The plan for one flat buffer of parameters under one rule. The same calls give the same bits.
#[derive(Debug)]
pub struct Optimizer {
    device: Device,
    shape: UpdateShape,
    kernels: Kernels,
    /// Bit i % 8 of byte i / 8: whether weight decay applies to element i.
    decay_bits: CudaSlice<u8>,
    scalars: CudaSlice<f32>,
    partial: CudaSlice<f64>,
    norm: CudaSlice<f64>,
}

/// Looked up once. Updates are by type of working copy: none, f16, bf16.
#[derive(Debug)]
struct Kernels {
    update: [Kernel; 3],
    norm_partial: Kernel,
    norm_finish: Kernel,
    average: Kernel,
    module: Arc<Module>,
}

impl Optimizer {
    /// For `parameters` weights; `kernels` are the ranges that weight decay applies to, sorted and disjoint.
    ///
    /// # Errors
    /// [`Error::Usage`] for constants of the rule out of range, [`Error::Shape`] for no parameters, more than 2³¹ − 1, or
    /// ranges that are not sorted, overlap or reach beyond them; those of [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, rule: Rule, parameters: usize, kernels: &[Range<usize>]) -> Result<Self> {
        rule.validate()?;
        elements("parameters", parameters)?;
        let shape = UpdateShape { rule, parameters };
        let bits = decay_bits(parameters, kernels)?;
        let module = device.module(&FAMILY)?;
        let update = |copy| module.kernel(&shape.update_work(false, copy).kernel);
        Ok(Self {
            device: device.clone(),
            shape,
            kernels: Kernels {
                update: [update(Dtype::F32)?, update(Dtype::F16)?, update(Dtype::Bf16)?],
                norm_partial: module.kernel("optimizer_norm_partial")?,
                norm_finish: module.kernel("optimizer_norm_finish")?,
                average: module.kernel("optimizer_average")?,
                module,
            },
            decay_bits: device.upload(&bits)?,
            scalars: device.zeros(SCALARS)?,
            partial: device.zeros(parameters.div_ceil(NORM_TILE as usize))?,
            norm: device.zeros(1)?,
        })
    }

    /// The rule's slots before the first step, in the order of [`Rule::slots`].
    ///
    /// # Errors
    /// [`Error::Driver`], out of memory for one.
    pub fn initial_slots(&self) -> Result<Vec<CudaSlice<f32>>> {
        let slots = self.shape.rule.slots().iter();
        slots.map(|slot| self.device.upload(&vec![slot.initial; self.shape.parameters])).collect()
    }

    /// Sends the scalars of the next step to the device. Outside of captured graphs: what follows may be captured, and
    /// reads them there.
    ///
    /// # Errors
    /// [`Error::Shape`] for a stream of another device, [`Error::Driver`].
    pub fn begin_step(&mut self, stream: &Arc<CudaStream>, scalars: &Scalars) -> Result<()> {
        Operands::new(OPERATION, &self.device, stream)?;
        let values = to_device(self.shape.rule, scalars);
        device::write(stream, &values, &mut self.scalars)
    }

    /// √Σ g², summed in f64 in a fixed order; [`read_norm`](Self::read_norm) fetches it. Not finite if and only if an
    /// element is not.
    ///
    /// # Errors
    /// [`Error::Shape`] for a buffer that does not fit, [`Error::Driver`].
    pub fn norm(&mut self, stream: &Arc<CudaStream>, gradients: &CudaView<'_, f32>) -> Result<()> {
        self.reduce(stream, gradients, false)
    }

    /// The same, and sets `gradient_scale` of this step on the device to what undoes the loss scale and clips, as
    /// [`gradient_scale`](crate::optimizer::gradient_scale). If the norm is not finite, the step's
    /// [`update`](Self::update) and [`update_average`](Self::update_average) change nothing.
    ///
    /// # Errors
    /// As for [`norm`](Self::norm).
    pub fn norm_and_clip(&mut self, stream: &Arc<CudaStream>, gradients: &CudaView<'_, f32>) -> Result<()> {
        self.reduce(stream, gradients, true)
    }

    fn reduce(&mut self, stream: &Arc<CudaStream>, gradients: &CudaView<'_, f32>, clip: bool) -> Result<()> {
        let UpdateShape { parameters, .. } = self.shape;
        Operands::new(OPERATION, &self.device, stream)?.read("gradients", gradients, parameters)?;
        let (n, [partial_work, finish_work]) = (parameters as u32, self.shape.norm_work());
        let blocks = partial_work.grid[0];
        let shapes = format_args!("{n} gradients");
        let (mut partial, mut norm) = (self.partial.as_view_mut(), self.norm.as_view_mut());
        let mut launch = self.kernels.norm_partial.on(stream);
        launch.input(gradients).output(&mut partial).value(&n);
        // SAFETY: block b reads elements below n of the NORM_TILE from b · NORM_TILE on and writes element b of
        // `partial`, which has one for each block and is this plan's own.
        unsafe { launch.run(partial_work.grid, 0, shapes) }?;
        let (partial, mut scalars) = (self.partial.as_view(), self.scalars.as_view_mut());
        let mut launch = self.kernels.norm_finish.on(stream);
        launch.input(&partial).output(&mut norm).optional(clip.then_some(&mut scalars)).value(&blocks);
        // SAFETY: one block reads the `blocks` elements of `partial`, writes the one of `norm` and the third of the
        // SCALARS; all are this plan's own.
        unsafe { launch.run(finish_work.grid, 0, shapes) }
    }

    /// Waits for the last norm and fetches it.
    ///
    /// # Errors
    /// [`Error::Shape`] for a stream of another device, [`Error::Driver`] for what went wrong before.
    pub fn read_norm(&self, stream: &Arc<CudaStream>) -> Result<f64> {
        Operands::new(OPERATION, &self.device, stream)?;
        Ok(device::read(stream, &self.norm)?[0])
    }

    /// One step: the parameters, the slots, the average and the working copy, in one launch.
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, number, device or alignment, and for those that overlap. Nothing has
    /// been changed then. [`Error::Driver`].
    pub fn update(&mut self, stream: &Arc<CudaStream>, buffers: Buffers<'_, '_>) -> Result<()> {
        self.check(stream, &buffers)?;
        let Buffers { parameters, gradients, slots, average, copy } = buffers;
        let n = self.shape.parameters as u32;
        let (kernel, dtype) = match copy {
            WorkingCopy::None => (0, Dtype::F32),
            WorkingCopy::F16(_) => (1, Dtype::F16),
            WorkingCopy::Bf16(_) => (2, Dtype::Bf16),
        };
        let (kernel, work) = (&self.kernels.update[kernel], self.shape.update_work(average.is_some(), dtype));
        let (decay_bits, scalars) = (self.decay_bits.as_view(), self.scalars.as_view());
        let constants = Constants::of(self.shape.rule);
        let mut launch = kernel.on(stream);
        launch.output(parameters).input(gradients);
        for slot in slots {
            launch.output(slot);
        }
        launch.optional(average);
        match copy {
            WorkingCopy::None => launch.null(),
            WorkingCopy::F16(copy) => launch.output(copy),
            WorkingCopy::Bf16(copy) => launch.output(copy),
        };
        launch.input(&decay_bits).input(&scalars).value(&n);
        constants.add_to(&mut launch);
        // SAFETY: the buffers have n elements and do not overlap, `decay_bits` has a bit for each, `scalars` SCALARS.
        // Block b touches only elements below n of the TILE from b · TILE on.
        unsafe { launch.run(work.grid, 0, format_args!("{n} parameters")) }
    }

    fn check(&self, stream: &Arc<CudaStream>, buffers: &Buffers<'_, '_>) -> Result<()> {
        let n = self.shape.parameters;
        let expected = self.shape.rule.slots().len();
        if buffers.slots.len() != expected {
            let problem = format!("the rule keeps {expected} slots, {} were given", buffers.slots.len());
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.write("parameters", buffers.parameters, n)?;
        operands.read("gradients", buffers.gradients, n)?;
        for (slot, view) in self.shape.rule.slots().iter().zip(buffers.slots.iter()) {
            operands.write(slot.name, view, n)?;
        }
        if let Some(average) = &buffers.average {
            operands.write("average", &**average, n)?;
        }
        match &buffers.copy {
            WorkingCopy::None => Ok(()),
            WorkingCopy::F16(copy) => operands.write("copy", &**copy, n),
            WorkingCopy::Bf16(copy) => operands.write("copy", &**copy, n),
        }
    }

    /// average ← average + (1 − ema_decay)·(values − average), for buffers of any length that no rule updates: the
    /// running statistics of batch norm.
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers that do not fit each other, [`Error::Driver`].
    pub fn update_average(
        &self,
        stream: &Arc<CudaStream>,
        average: &mut CudaViewMut<'_, f32>,
        values: &CudaView<'_, f32>,
    ) -> Result<()> {
        let n = elements("values", values.len())?;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.write("average", average, values.len())?;
        operands.read("values", values, values.len())?;
        let scalars = self.scalars.as_view();
        let mut launch = self.kernels.average.on(stream);
        launch.output(average).input(values).input(&scalars).value(&n);
        // SAFETY: both buffers have n elements and do not overlap; block b touches only elements below n of the TILE
        // from b · TILE on.
        unsafe { launch.run(average_work(values.len()).grid, 0, format_args!("{n} values")) }
    }

    /// copy ← values, rounded to nearest, ties to even: the working copy of weights that no step has made.
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers that do not fit each other, [`Error::Driver`].
    pub fn cast<T: CopyElement>(
        &self,
        stream: &Arc<CudaStream>,
        values: &CudaView<'_, f32>,
        copy: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let n = elements("values", values.len())?;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("values", values, values.len())?;
        operands.write("copy", copy, values.len())?;
        let kernel = self.kernels.module.kernel(T::CAST)?;
        let mut launch = kernel.on(stream);
        launch.input(values).output(copy).value(&n);
        // SAFETY: both buffers have n elements and do not overlap; block b touches only elements below n of the TILE
        // from b · TILE on.
        unsafe { launch.run(cast_work(values.len(), T::DTYPE).grid, 0, format_args!("{n} values")) }
    }
}

const OPERATION: &str = "optimizer";

/// Floats in the kernels' `Step`.
const SCALARS: usize = 8;

/// The kernels' `Step`, in its order.
fn to_device(rule: Rule, scalars: &Scalars) -> [f32; SCALARS] {
    let Scalars { step, ema_decay, loss_scale, max_norm } = scalars;
    let corrections = rule.bias_corrections(step.number);
    [
        step.learning_rate,
        step.weight_decay,
        step.gradient_scale,
        1.0 / corrections[0],
        1.0 / corrections[1],
        1.0 - ema_decay,
        *loss_scale,
        max_norm.unwrap_or(f64::INFINITY),
    ]
    .map(|value| value as f32)
}

/// The constants of a rule as the kernels take them.
enum Constants {
    Floats([f32; 5], usize),
    Sgd(f32, i32),
}

impl Constants {
    fn of(rule: Rule) -> Self {
        match rule {
            Rule::RmsPropTf { rho, momentum, epsilon } => {
                Self::Floats([rho, 1.0 - rho, momentum, epsilon, 0.0].map(|value| value as f32), 4)
            }
            Rule::AdamW { beta1, beta2, epsilon } => {
                Self::Floats([beta1, 1.0 - beta1, beta2, 1.0 - beta2, epsilon].map(|value| value as f32), 5)
            }
            Rule::Sgd { momentum, nesterov } => Self::Sgd(momentum as f32, nesterov.into()),
        }
    }

    fn add_to<'a>(&'a self, launch: &mut Launch<'a>) {
        match self {
            Self::Floats(values, count) => values[..*count].iter().for_each(|value| {
                launch.value(value);
            }),
            Self::Sgd(momentum, nesterov) => {
                launch.value(momentum).value(nesterov);
            }
        }
    }
}

fn elements(name: &str, count: usize) -> Result<u32> {
    match u32::try_from(count) {
        Ok(count32) if count > 0 && count <= MAX_ELEMENTS => Ok(count32),
        _ => Err(shape(format!("{count} {name}; 1 to {MAX_ELEMENTS} are possible"))),
    }
}

/// A bit for each parameter: set within `kernels`.
fn decay_bits(parameters: usize, kernels: &[Range<usize>]) -> Result<Vec<u8>> {
    let mut bits = vec![0_u8; parameters.div_ceil(8)];
    let mut free_from = 0;
    for kernel in kernels {
        if kernel.start < free_from || kernel.end < kernel.start || kernel.end > parameters {
            return Err(shape(format!(
                "the kernel {kernel:?} must begin at {free_from} or later and end by {parameters}: sort the ranges \
                 and merge those that overlap"
            )));
        }
        for i in kernel.clone() {
            bits[i / 8] |= 1 << (i % 8);
        }
        free_from = kernel.end;
    }
    Ok(bits)
}

fn shape(problem: String) -> Error {
    Error::Shape { operation: OPERATION, problem }
}
