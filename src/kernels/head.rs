//! The head around its classifier: global average pool with dropout, softmax cross entropy with soft targets, and the
//! pool's backward. Formulas, shapes and bytes are in `kernels/head.cu`.
//!
//! A training step is [`StepScalars::begin_step`], [`pool`](Head::pool), the classifier,
//! [`cross_entropy`](Head::cross_entropy), the classifier's backward, and [`pool_backward`](Head::pool_backward).

use super::raw::{RawElement, RawView, channel_blocks, check_shape};
use super::step::{self, StepScalars};
use super::{Cost, Work};
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
use crate::device::{self, Device, Entry, Family, Kernel, Operands};
use crate::tensor::{Dtype, MAX_ELEMENTS, Shape};
use crate::{Error, Result};
use std::marker::PhantomData;
use std::sync::Arc;

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: 256 }
}

/// The kernels of `kernels/head.cu`.
pub const FAMILY: Family = Family {
    name: "head",
    kernels: &[
        entry("head_pool_f32", "pppppIIIf"),
        entry("head_pool_f16", "pppppIIIf"),
        entry("head_pool_bf16", "pppppIIIf"),
        entry("head_pool_backward_f32", "pppppppppIIIIf"),
        entry("head_pool_backward_f16", "pppppppppIIIIf"),
        entry("head_pool_backward_bf16", "pppppppppIIIIf"),
        entry("head_cross_entropy_f32", "pppppII"),
        entry("head_cross_entropy_f16", "pppppII"),
        entry("head_cross_entropy_bf16", "pppppII"),
        entry("head_mean_loss", "ppI"),
    ],
};

/// Whether the pool drops features.
#[derive(Clone, Copy, Debug)]
pub enum Dropout<'a> {
    /// It does, with the plan's rate and by the random numbers of this step.
    On(&'a StepScalars),
    /// It does not: evaluation.
    Off,
}

/// What a head is of; its launches, without a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    shape: Shape,
    classes: usize,
    dtype: Dtype,
}

impl HeadShape {
    /// Of raw outputs of `shape` and `dtype`, and `classes` logits.
    ///
    /// # Errors
    /// [`Error::Shape`] for an empty shape, channels that are no multiple of 8, no classes, or 2³¹ elements and more.
    pub fn new(shape: Shape, classes: usize, dtype: Dtype) -> Result<Self> {
        check_shape(OPERATION, shape)?;
        if !classes.checked_mul(shape.n).is_some_and(|logits| (1..=MAX_ELEMENTS).contains(&logits)) {
            let problem =
                format!("{} images of {classes} classes; 1 to {MAX_ELEMENTS} logits are possible", shape.n);
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        Ok(Self { shape, classes, dtype })
    }

    fn work(&self, name: &str, blocks: u32, bytes: usize, operations: usize) -> Work {
        let cost = Cost { bytes: bytes as u64, tensor_operations: 0, operations: operations as u64 };
        Work { kernel: format!("head_{name}_{}", self.dtype.suffix()), grid: [blocks, 1, 1], shared: 0, cost }
    }

    /// The launch of [`Head::pool`].
    pub fn pool_work(&self) -> Work {
        let Shape { n, c, .. } = self.shape;
        let elements = self.shape.elements();
        let bytes = (elements + n * c) * self.dtype.bytes() + 4 * (2 * c + n);
        self.work("pool", channel_blocks(self.shape), bytes, 6 * elements)
    }

    /// The launches of [`Head::cross_entropy`].
    pub fn cross_entropy_works(&self) -> [Work; 2] {
        let n = self.shape.n;
        let logits = n * self.classes;
        let bytes = logits * (4 + 2 * self.dtype.bytes()) + 8 * n;
        let cost = Cost { bytes: 4 * n as u64 + 4, tensor_operations: 0, operations: n as u64 };
        [
            self.work("cross_entropy", n as u32, bytes, 9 * logits),
            Work { kernel: "head_mean_loss".into(), grid: [1, 1, 1], shared: 0, cost },
        ]
    }

    /// The launch of [`Head::pool_backward`].
    pub fn pool_backward_work(&self) -> Work {
        let Shape { n, c, .. } = self.shape;
        let elements = self.shape.elements();
        let bytes = (2 * elements + n * c) * self.dtype.bytes() + 4 * (4 * c + n + 2 * n * c);
        self.work("pool_backward", channel_blocks(self.shape), bytes, 14 * elements)
    }
}

/// The plan for one shape, number of classes and element type. The same calls give the same bits.
#[derive(Debug)]
pub struct Head<T> {
    device: Device,
    shape: HeadShape,
    rate: f64,
    pool: Kernel,
    pool_backward: Kernel,
    cross_entropy: Kernel,
    mean_loss: Kernel,
    losses: CudaSlice<f32>,
    loss: CudaSlice<f32>,
    element: PhantomData<fn() -> T>,
}

const OPERATION: &str = "head";

impl<T: RawElement> Head<T> {
    /// For raw outputs of `shape`, `classes` logits, and dropout with probability `rate`.
    ///
    /// # Errors
    /// Those of [`HeadShape::new`]; [`Error::Usage`] for a rate outside \[0, 1); those of [`Device::module`];
    /// [`Error::Driver`].
    pub fn plan(device: &Device, shape: Shape, classes: usize, rate: f64) -> Result<Self> {
        let head = HeadShape::new(shape, classes, T::DTYPE)?;
        if !(0.0..1.0).contains(&rate) {
            return Err(Error::usage("dropout", rate, "expected a number from 0 to below 1"));
        }
        let module = device.module(&FAMILY)?;
        let kernel = |name: &str| module.kernel(&format!("head_{name}_{}", T::SUFFIX));
        Ok(Self {
            device: device.clone(),
            shape: head,
            rate,
            pool: kernel("pool")?,
            pool_backward: kernel("pool_backward")?,
            cross_entropy: kernel("cross_entropy")?,
            mean_loss: module.kernel("head_mean_loss")?,
            losses: device.zeros(shape.n)?,
            loss: device.zeros(1)?,
            element: PhantomData,
        })
    }

    /// features ← dropout of the mean over pixels of SiLU(z), \[n, c\].
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap. Nothing has been changed
    /// then. [`Error::Driver`].
    pub fn pool(
        &self,
        stream: &Arc<CudaStream>,
        raw: RawView<'_, '_, T>,
        dropout: Dropout<'_>,
        features: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let HeadShape { shape, .. } = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        raw.check(&mut operands, shape)?;
        operands.write("features", features, shape.n * shape.c)?;
        let (step, threshold, keep) = self.dropout(dropout, &mut operands)?;
        let (pixels, channels) = ((shape.h * shape.w) as u32, shape.c as u32);
        let mut launch = self.pool.on(stream);
        launch.input(raw.y).input(raw.scale).input(raw.shift);
        match &step {
            Some(step) => launch.input(step),
            None => launch.null(),
        };
        launch.output(features);
        launch.value(&pixels).value(&channels).value(&threshold).value(&keep);
        // SAFETY: y has `shape`, whose channels are a multiple of 8, the vectors its channels; `step` is of as many images,
        // and not read where there is none. A block reads one image's tile of 64 channels, those that exist, and writes
        // their features, which overlap nothing.
        unsafe { launch.run(self.shape.pool_work().grid, 0, shape) }
    }

    /// Of the classifier's logits \[n, classes\] and soft `targets` of that shape: the mean loss, for
    /// [`read_loss`](Self::read_loss), and dlogits, its gradient times the loss scale.
    ///
    /// # Errors
    /// As for [`pool`](Self::pool).
    pub fn cross_entropy(
        &mut self,
        stream: &Arc<CudaStream>,
        step: &StepScalars,
        logits: &CudaView<'_, T>,
        targets: &CudaView<'_, f32>,
        dlogits: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let HeadShape { shape, classes, .. } = self.shape;
        let (count, [entropy_work, mean_work]) = (shape.n * classes, self.shape.cross_entropy_works());
        let (n, classes) = (shape.n as u32, classes as u32);
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("logits", logits, count)?;
        operands.read("targets", targets, count)?;
        operands.write("dlogits", dlogits, count)?;
        let step = step.view(&mut operands, shape.n)?;
        let shapes = format_args!("{n} images, {classes} classes");
        let mut losses = self.losses.as_view_mut();
        let mut launch = self.cross_entropy.on(stream);
        launch.input(logits).input(targets).input(&step).output(&mut losses).output(dlogits);
        launch.value(&classes).value(&n);
        // SAFETY: block b reads row b of logits and targets and writes row b of dlogits, `classes` elements each, and
        // element b of `losses`, which has one for each image. None overlap.
        unsafe { launch.run(entropy_work.grid, 0, shapes) }?;
        let (losses, mut loss) = (self.losses.as_view(), self.loss.as_view_mut());
        let mut launch = self.mean_loss.on(stream);
        launch.input(&losses).output(&mut loss).value(&n);
        // SAFETY: one block reads the n losses and writes the one mean; both are this plan's own.
        unsafe { launch.run(mean_work.grid, 0, shapes) }
    }

    /// dz ← dropout of `dfeatures` \[n, c\], spread over the pixels, times SiLU'(z); and `sums` \[2, n, c\] ← what batch
    /// norm's backward needs, for each image: Σ dz and Σ dz·x̂. `dropout` as it was in [`pool`](Self::pool).
    ///
    /// # Errors
    /// As for [`pool`](Self::pool).
    pub fn pool_backward(
        &self,
        stream: &Arc<CudaStream>,
        dfeatures: &CudaView<'_, T>,
        raw: RawView<'_, '_, T>,
        dropout: Dropout<'_>,
        dz: &mut CudaViewMut<'_, T>,
        sums: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let HeadShape { shape, .. } = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("dfeatures", dfeatures, shape.n * shape.c)?;
        raw.check(&mut operands, shape)?;
        operands.write("dz", dz, shape.elements())?;
        operands.write("sums", sums, 2 * shape.n * shape.c)?;
        let (step, threshold, keep) = self.dropout(dropout, &mut operands)?;
        let (n, pixels, channels) = (shape.n as u32, (shape.h * shape.w) as u32, shape.c as u32);
        let mut launch = self.pool_backward.on(stream);
        launch
            .input(dfeatures)
            .input(raw.y)
            .input(raw.scale)
            .input(raw.shift)
            .input(raw.mean)
            .input(raw.rstd);
        match &step {
            Some(step) => launch.input(step),
            None => launch.null(),
        };
        launch.output(dz).output(sums).value(&pixels).value(&channels).value(&n);
        launch.value(&threshold).value(&keep);
        // SAFETY: as in `pool`; a block writes dz where it reads y, and two sums for each of its channels. None overlap.
        unsafe { launch.run(self.shape.pool_backward_work().grid, 0, shape) }
    }

    /// Waits for the last [`cross_entropy`](Self::cross_entropy) and fetches the mean loss, without the loss scale.
    ///
    /// # Errors
    /// [`Error::Shape`] for a stream of another device, [`Error::Driver`] for what went wrong before.
    pub fn read_loss(&self, stream: &Arc<CudaStream>) -> Result<f32> {
        Operands::new(OPERATION, &self.device, stream)?;
        Ok(device::read(stream, &self.loss)?[0])
    }

    /// The loss of each image likewise.
    ///
    /// # Errors
    /// As for [`read_loss`](Self::read_loss).
    pub fn read_losses(&self, stream: &Arc<CudaStream>) -> Result<Vec<f32>> {
        Operands::new(OPERATION, &self.device, stream)?;
        device::read(stream, &self.losses)
    }

    /// The step, the 24 random bits below which a feature is dropped, and the factor of the others.
    fn dropout<'a>(
        &self,
        dropout: Dropout<'a>,
        operands: &mut Operands<'_>,
    ) -> Result<(Option<CudaView<'a, u32>>, u32, f32)> {
        Ok(match dropout {
            Dropout::Off => (None, 0, 1.0),
            Dropout::On(step) => (
                Some(step.view(operands, self.shape.shape.n)?),
                step::threshold(self.rate),
                step::keep(self.rate),
            ),
        })
    }
}
