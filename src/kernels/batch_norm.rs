//! Batch normalisation where no convolution does it on the way: moments, the output of a block and its backward, the
//! normalisation of inference, and stochastic depth. Formulas, shapes and bytes are in `kernels/batch_norm.cu`.

use super::operand::{Debt, Statistics};
use super::raw::{RawElement, check_shape};
use super::step::{self, StepScalars};
use super::{Cost, Work, Workspace};
use crate::backend::{Activation, ConvNorm, DropPath};
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DeviceRepr};
use crate::device::{Argument, Device, Entry, Family, Kernel, Operands};
use crate::random::Purpose;
use crate::tensor::{Dtype, MAX_ELEMENTS, Shape};
use crate::{Error, Result};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: THREADS }
}

/// The kernels of `kernels/batch_norm.cu`.
pub const FAMILY: Family = Family {
    name: "batch_norm",
    kernels: &[
        entry("batch_norm_moments_f32", "ppp{16:4}{56:8}"),
        entry("batch_norm_moments_f16", "ppp{16:4}{56:8}"),
        entry("batch_norm_moments_bf16", "ppp{16:4}{56:8}"),
        entry("batch_norm_merge_f32", "ppppp{16:4}II"),
        entry("batch_norm_merge_f16", "ppppp{16:4}II"),
        entry("batch_norm_merge_bf16", "ppppp{16:4}II"),
        entry("batch_norm_backward_f32", "ppppp{16:4}I{40:8}"),
        entry("batch_norm_backward_f16", "ppppp{16:4}I{40:8}"),
        entry("batch_norm_backward_bf16", "ppppp{16:4}I{40:8}"),
        entry("batch_norm_backward_silu_f32", "pppppp{16:4}I{40:8}"),
        entry("batch_norm_backward_silu_f16", "pppppp{16:4}I{40:8}"),
        entry("batch_norm_backward_silu_bf16", "pppppp{16:4}I{40:8}"),
        entry("batch_norm_fold_f32", "pppII"),
        entry("batch_norm_fold_f16", "pppII"),
        entry("batch_norm_fold_bf16", "pppII"),
        entry("batch_norm_owe", "pII{40:8}"),
        entry("batch_norm_evaluate", "pppp"),
        entry("batch_norm_factors", "pppII"),
    ],
};

const THREADS: u32 = 256;
/// Groups of 8 channels of a block, at most.
const MOST_GROUPS: u32 = 16;
/// Runs of pixels that are added up by the last block, at most: it reads them all.
const MOST_RUNS: u32 = 512;
/// Blocks of a reduction, about: several for each multiprocessor of any GPU.
const REDUCTION_BLOCKS: u32 = 1024;
/// Channels of a block that only finishes.
const OWE_TILE: u32 = 32;
const OPERATION: &str = "batch normalisation";

/// `Tiling` of the `.cu` file.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiling {
    pixels: u32,
    channels: u32,
    run: u32,
    groups: u32,
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for Tiling {}

impl Argument for Tiling {
    const CODE: &'static str = "{16:4}";
}

impl Tiling {
    /// With `least` pixels for each thread, and as many more as keep to `runs` runs.
    fn new(shape: Shape, least: u32, runs: impl FnOnce(u32) -> u32) -> Self {
        let (pixels, channels) = (shape.pixels() as u32, shape.c as u32);
        let groups = channels / 8;
        let tiles = groups.div_ceil(MOST_GROUPS);
        // Even, so that a tile of 16-bit elements begins and ends with a sector of 32 bytes.
        let groups = if tiles == 1 { groups } else { groups.div_ceil(tiles).next_multiple_of(2) };
        let run = (THREADS / groups * least).max(pixels.div_ceil(runs(tiles)));
        Self { pixels, channels, run, groups }
    }

    fn grid(self) -> [u32; 3] {
        [self.pixels.div_ceil(self.run), self.channels.div_ceil(8 * self.groups), 1]
    }

    /// Partial results of a reduction, two of each run and channel.
    fn partial_floats(self) -> usize {
        2 * self.grid()[0] as usize * self.channels as usize
    }
}

/// What a batch normalisation is of; its launches, without a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchNormShape {
    shape: Shape,
    dtype: Dtype,
}

impl BatchNormShape {
    /// Of tensors of `shape` and `dtype`.
    ///
    /// # Errors
    /// [`Error::Shape`] for an empty shape, channels that are no multiple of 8, or a tensor of 2³¹ elements and more.
    pub fn new(shape: Shape, dtype: Dtype) -> Result<Self> {
        check_shape(OPERATION, shape)?;
        Ok(Self { shape, dtype })
    }

    /// A reduction over pixels.
    fn reduction(&self) -> Tiling {
        Tiling::new(self.shape, 4, |tiles| MOST_RUNS.min(REDUCTION_BLOCKS.div_ceil(tiles)))
    }

    /// One tensor in, another out.
    fn pass(&self) -> Tiling {
        Tiling::new(self.shape, 8, |_| u32::MAX)
    }

    fn work(&self, name: &str, tiling: Tiling, bytes: usize, operations: usize) -> Work {
        let cost = Cost { bytes: bytes as u64, tensor_operations: 0, operations: operations as u64 };
        let kernel = format!("batch_norm_{name}_{}", self.dtype.suffix());
        Work { kernel, grid: tiling.grid(), shared: 0, cost }
    }

    /// Bytes of `count` tensors.
    fn tensors(&self, count: usize) -> usize {
        count * self.shape.elements() * self.dtype.bytes()
    }

    /// The launch of [`BatchNorm::moments`].
    pub fn moments_work(&self) -> Work {
        let tiling = self.reduction();
        let bytes = self.tensors(1) + 4 * (tiling.partial_floats() + 10 * self.shape.c);
        self.work("moments", tiling, bytes, 4 * self.shape.elements())
    }

    /// The launch of [`BatchNorm::merge`], with a skip connection and the factors of stochastic depth or without.
    pub fn merge_work(&self, act: Activation, skip: bool, factors: bool) -> Work {
        let Shape { n, c, .. } = self.shape;
        let bytes = self.tensors(2 + usize::from(skip)) + 4 * (2 * c + if factors { n } else { 0 });
        let operations = match act {
            Activation::Identity => 4,
            Activation::Silu => 8,
        };
        self.work("merge", self.pass(), bytes, operations * self.shape.elements())
    }

    /// The launch of [`BatchNorm::merge_backward_identity`] or [`BatchNorm::merge_backward_silu`].
    pub fn merge_backward_work(&self, act: Activation, factors: bool) -> Work {
        let Shape { n, c, .. } = self.shape;
        let tiling = self.reduction();
        let (name, tensors, operations) = match act {
            Activation::Identity => ("backward", 2, 5),
            Activation::Silu => ("backward_silu", 3, 15),
        };
        let floats = tiling.partial_floats() + 11 * c + if factors { n } else { 0 };
        self.work(name, tiling, self.tensors(tensors) + 4 * floats, operations * self.shape.elements())
    }

    /// The launch of [`BatchNorm::owe`] for sums of `rows` rows.
    pub fn owe_work(&self, rows: usize) -> Work {
        let c = self.shape.c;
        let cost = Cost {
            bytes: 4 * (2 * rows * c + 11 * c) as u64,
            tensor_operations: 0,
            operations: (2 * rows * c) as u64,
        };
        let grid = [(c as u32).div_ceil(OWE_TILE), 1, 1];
        Work { kernel: "batch_norm_owe".into(), grid, shared: 0, cost }
    }

    /// Floats of a [`Workspace`] that the reductions need.
    pub fn workspace_floats(&self) -> usize {
        self.reduction().partial_floats()
    }
}

/// The output of a block before it is made: act(z), dropped or kept for each image, and the skip connection.
#[derive(Clone, Copy, Debug)]
pub struct Merge<'a, 'b, T> {
    /// The raw output of the block's last convolution.
    pub y: &'a CudaView<'b, T>,
    /// Its normalisation, \[4, c\].
    pub norm: &'a CudaView<'b, f32>,
    /// What follows the normalisation.
    pub act: Activation,
    /// Of y's shape.
    pub skip: Option<&'a CudaView<'b, T>>,
    /// The factors of stochastic depth, \[n\].
    pub factors: Option<&'a CudaView<'b, f32>>,
}

/// The gradient of a block's output as it reaches the raw output y.
#[derive(Clone, Copy, Debug)]
pub struct MergeGradient<'a, 'b, T> {
    /// The gradient of the block's output, of y's shape.
    pub g: &'a CudaView<'b, T>,
    /// The raw output of the block's last convolution.
    pub y: &'a CudaView<'b, T>,
    /// The factors of stochastic depth, \[n\].
    pub factors: Option<&'a CudaView<'b, f32>>,
}

impl<T: RawElement> MergeGradient<'_, '_, T> {
    fn check(&self, operands: &mut Operands<'_>, shape: Shape) -> Result<()> {
        operands.read("g", self.g, shape.elements())?;
        operands.read("y", self.y, shape.elements())?;
        self.factors.map_or(Ok(()), |factors| operands.read("factors", factors, shape.n))
    }
}

/// The plan for one shape and element type. The same calls give the same bits.
#[derive(Debug)]
pub struct BatchNorm<T> {
    device: Device,
    shape: BatchNormShape,
    moments: Kernel,
    merge: Kernel,
    backward: Kernel,
    backward_silu: Kernel,
    owe: Kernel,
    element: PhantomData<fn() -> T>,
}

impl<T: RawElement> BatchNorm<T> {
    /// For raw outputs of `shape`.
    ///
    /// # Errors
    /// Those of [`BatchNormShape::new`] and [`Device::module`].
    pub fn plan(device: &Device, shape: Shape) -> Result<Self> {
        let shape = BatchNormShape::new(shape, T::DTYPE)?;
        let module = device.module(&FAMILY)?;
        let kernel = |name: &str| module.kernel(&format!("batch_norm_{name}_{}", T::SUFFIX));
        Ok(Self {
            device: device.clone(),
            shape,
            moments: kernel("moments")?,
            merge: kernel("merge")?,
            backward: kernel("backward")?,
            backward_silu: kernel("backward_silu")?,
            owe: module.kernel("batch_norm_owe")?,
            element: PhantomData,
        })
    }

    /// What it launches.
    pub fn shape(&self) -> BatchNormShape {
        self.shape
    }

    /// Floats of the [`Workspace`] that its operations share.
    pub fn workspace_floats(&self) -> usize {
        self.shape.workspace_floats()
    }

    /// The moments of y: its normalisation, and the running statistics a step on.
    ///
    /// # Errors
    /// [`Error::Shape`] for a shape of one pixel, which has no variance, for buffers of another length, device or
    /// alignment, or that overlap, and for a workspace that is too small. Nothing has been changed then. [`Error::Driver`].
    pub fn moments(
        &self,
        stream: &Arc<CudaStream>,
        y: &CudaView<'_, T>,
        mut statistics: Statistics<'_, '_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let BatchNormShape { shape, .. } = self.shape;
        if shape.pixels() == 1 {
            let problem = "one value per channel has no variance; use a larger batch or image".into();
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("y", y, shape.elements())?;
        statistics.check(&mut operands, shape.c)?;
        let (tiling, work) = (self.shape.reduction(), self.shape.moments_work());
        workspace.check(OPERATION, tiling.partial_floats(), work.grid[1] as usize)?;
        let finish = statistics.finish(stream, shape.pixels());
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut launch = self.moments.on(stream);
        launch.input(y).output(&mut partial).output(&mut counters).value(&tiling).value(&finish);
        // SAFETY: y has `shape`, the workspace two floats of each run and channel and a counter of each tile, and the
        // statistics are vectors of the channels. A block reads its pixels and channels, those that exist, and leaves
        // its numbers; the last one of a tile reads those of the tile and writes its channels of the statistics. Nothing
        // that is written overlaps anything.
        unsafe { launch.run(work.grid, work.shared, shape) }
    }

    /// out ← factor\[n\]·act(z) + skip.
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap. Nothing has been changed
    /// then. [`Error::Driver`].
    pub fn merge(
        &self,
        stream: &Arc<CudaStream>,
        merge: Merge<'_, '_, T>,
        out: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let BatchNormShape { shape, .. } = self.shape;
        let Merge { y, norm, act, skip, factors } = merge;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("y", y, shape.elements())?;
        operands.read("norm", norm, 4 * shape.c)?;
        skip.map_or(Ok(()), |skip| operands.read("skip", skip, shape.elements()))?;
        factors.map_or(Ok(()), |factors| operands.read("factors", factors, shape.n))?;
        operands.write("out", out, shape.elements())?;
        let (tiling, pixels) = (self.shape.pass(), (shape.h * shape.w) as u32);
        let work = self.shape.merge_work(act, skip.is_some(), factors.is_some());
        let silu = u32::from(act == Activation::Silu);
        let mut launch = self.merge.on(stream);
        launch.input(y).input(norm);
        match skip {
            Some(skip) => launch.input(skip),
            None => launch.null(),
        };
        match factors {
            Some(factors) => launch.input(factors),
            None => launch.null(),
        };
        launch.output(out).value(&tiling).value(&pixels).value(&silu);
        // SAFETY: y, skip and out have `shape`, norm four vectors of its channels, and factors one of its images, which
        // a pixel's number divided by `pixels` is. A block reads and writes its pixels and channels, those that exist.
        unsafe { launch.run(work.grid, work.shared, shape) }
    }

    /// Backward of [`merge`](Self::merge) without an activation: what is owed for dz = factor\[n\]·g, which is left to
    /// whoever reads g next.
    ///
    /// # Errors
    /// As for [`merge`](Self::merge), and for a workspace that is too small.
    pub fn merge_backward_identity(
        &self,
        stream: &Arc<CudaStream>,
        gradient: MergeGradient<'_, '_, T>,
        mut debt: Debt<'_, '_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let BatchNormShape { shape, .. } = self.shape;
        let MergeGradient { g, y, factors } = gradient;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        gradient.check(&mut operands, shape)?;
        debt.check(&mut operands, shape.c)?;
        let (tiling, pixels) = (self.shape.reduction(), (shape.h * shape.w) as u32);
        let work = self.shape.merge_backward_work(Activation::Identity, factors.is_some());
        workspace.check(OPERATION, tiling.partial_floats(), work.grid[1] as usize)?;
        let finish = debt.finish(stream, shape.pixels());
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut launch = self.backward.on(stream);
        launch.input(g).input(y);
        match factors {
            Some(factors) => launch.input(factors),
            None => launch.null(),
        };
        launch.output(&mut partial).output(&mut counters).value(&tiling).value(&pixels).value(&finish);
        // SAFETY: as in `moments` and `merge`; g is read where y is.
        unsafe { launch.run(work.grid, work.shared, shape) }
    }

    /// Backward of [`merge`](Self::merge) with SiLU: dz ← factor\[n\]·g·SiLU'(z), and what is owed for it.
    ///
    /// # Errors
    /// As for [`merge_backward_identity`](Self::merge_backward_identity).
    pub fn merge_backward_silu(
        &self,
        stream: &Arc<CudaStream>,
        gradient: MergeGradient<'_, '_, T>,
        dz: &mut CudaViewMut<'_, T>,
        mut debt: Debt<'_, '_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let BatchNormShape { shape, .. } = self.shape;
        let MergeGradient { g, y, factors } = gradient;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        gradient.check(&mut operands, shape)?;
        operands.write("dz", dz, shape.elements())?;
        debt.check(&mut operands, shape.c)?;
        let (tiling, pixels) = (self.shape.reduction(), (shape.h * shape.w) as u32);
        let work = self.shape.merge_backward_work(Activation::Silu, factors.is_some());
        workspace.check(OPERATION, tiling.partial_floats(), work.grid[1] as usize)?;
        let finish = debt.finish(stream, shape.pixels());
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut launch = self.backward_silu.on(stream);
        launch.input(g).input(y);
        match factors {
            Some(factors) => launch.input(factors),
            None => launch.null(),
        };
        launch.output(dz).output(&mut partial).output(&mut counters);
        launch.value(&tiling).value(&pixels).value(&finish);
        // SAFETY: as in `merge_backward_identity`; dz is written where g is read, and they do not overlap.
        unsafe { launch.run(work.grid, work.shared, shape) }
    }

    /// What is owed for a gradient of z whose sums somebody else has taken: `sums` \[2, rows, c\], Σ dz and Σ dz·x̂, to be
    /// added up over rows.
    ///
    /// # Errors
    /// As for [`merge`](Self::merge), and for no rows.
    pub fn owe(
        &self,
        stream: &Arc<CudaStream>,
        sums: &CudaView<'_, f32>,
        rows: usize,
        mut debt: Debt<'_, '_>,
    ) -> Result<()> {
        let BatchNormShape { shape, .. } = self.shape;
        let floats = rows.checked_mul(2 * shape.c).filter(|floats| (1..=MAX_ELEMENTS).contains(floats));
        let Some(floats) = floats else {
            let problem = format!("{rows} rows of sums for {} channels", shape.c);
            return Err(Error::Shape { operation: OPERATION, problem });
        };
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("sums", sums, floats)?;
        debt.check(&mut operands, shape.c)?;
        let work = self.shape.owe_work(rows);
        let finish = debt.finish(stream, shape.pixels());
        let (rows, channels) = (rows as u32, shape.c as u32);
        let mut launch = self.owe.on(stream);
        launch.input(sums).value(&rows).value(&channels).value(&finish);
        // SAFETY: `sums` has 2 · rows · c floats, and the debt's are vectors of the channels. A block reads the sums of
        // its 32 channels, those that exist, and writes those of the debt.
        unsafe { launch.run(work.grid, work.shared, shape) }
    }
}

/// The normalisations of inference, of all layers of a network in one launch.
#[derive(Debug)]
pub struct Evaluation {
    device: Device,
    kernel: Kernel,
    parameters: usize,
    statistics: usize,
    /// Where each layer's norm lies.
    norms: Vec<Range<usize>>,
    /// The kernel's `EvaluatePart`s.
    parts: CudaSlice<u32>,
    work: Work,
}

impl Evaluation {
    /// For layers whose vectors lie in a parameter buffer of `parameters` and a statistics buffer of `statistics` floats.
    ///
    /// # Errors
    /// [`Error::Shape`] for no layers, or one whose ranges are not of the same length, a multiple of 4, and within the
    /// buffers; those of [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, layers: &[&ConvNorm], parameters: usize, statistics: usize) -> Result<Self> {
        let wrong = |problem| Err(Error::Shape { operation: OPERATION, problem });
        if layers.is_empty() {
            return wrong("no layers to evaluate".into());
        }
        let (mut norms, mut words, mut end) = (Vec::with_capacity(layers.len()), Vec::new(), 0);
        for (i, layer) in layers.iter().enumerate() {
            let ConvNorm { gamma, beta, running_mean, running_var, .. } = layer;
            let channels = gamma.len();
            let fits = |range: &Range<usize>, length| range.len() == channels && range.end <= length;
            let right = fits(gamma, parameters)
                && fits(beta, parameters)
                && fits(running_mean, statistics)
                && fits(running_var, statistics);
            let possible = channels > 0 && channels % 4 == 0 && end + 4 * channels <= MAX_ELEMENTS;
            if !right || !possible {
                return wrong(format!(
                    "layer {i}: γ {gamma:?}, β {beta:?}, mean {running_mean:?}, variance {running_var:?} in buffers \
                     of {parameters} and {statistics}"
                ));
            }
            for first in (0..channels).step_by(THREADS as usize) {
                let at = |range: &Range<usize>| (range.start + first) as u32;
                words.extend([at(gamma), at(beta), at(running_mean), at(running_var), (end + first) as u32]);
                words.extend([channels as u32, (channels - first).min(THREADS as usize) as u32]);
                words.push((layer.epsilon as f32).to_bits());
            }
            norms.push(end..end + 4 * channels);
            end += 4 * channels;
        }
        let cost = Cost { bytes: 8 * end as u64, tensor_operations: 0, operations: 6 * end as u64 / 4 };
        let grid = [(words.len() / PART_WORDS) as u32, 1, 1];
        let work = Work { kernel: "batch_norm_evaluate".into(), grid, shared: 0, cost };
        Ok(Self {
            device: device.clone(),
            kernel: device.module(&FAMILY)?.kernel(&work.kernel)?,
            parameters,
            statistics,
            norms,
            parts: device.upload(&words)?,
            work,
        })
    }

    /// Its launch.
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// Floats of all normalisations together.
    pub fn floats(&self) -> usize {
        self.norms.last().map_or(0, |last| last.end)
    }

    /// Where the normalisation \[4, c\] of each layer lies among them.
    pub fn norms(&self) -> &[Range<usize>] {
        &self.norms
    }

    /// norms ← those of the running statistics.
    ///
    /// # Errors
    /// As for [`BatchNorm::merge`].
    pub fn evaluate(
        &self,
        stream: &Arc<CudaStream>,
        params: &CudaView<'_, f32>,
        stats: &CudaView<'_, f32>,
        norms: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("parameters", params, self.parameters)?;
        operands.read("running statistics", stats, self.statistics)?;
        operands.write("norms", norms, self.floats())?;
        let parts = self.parts.as_view();
        let mut launch = self.kernel.on(stream);
        launch.input(&parts).input(params).input(stats).output(norms);
        // SAFETY: the ranges of all parts are within the buffers, as `plan` has checked; the norms overlap nothing, and
        // not one another.
        unsafe { launch.run(self.work.grid, self.work.shared, format_args!("{} layers", self.norms.len())) }
    }
}

/// The weights of one convolution with the normalisation of inference in them.
#[derive(Debug)]
pub struct Fold<T> {
    device: Device,
    kernel: Kernel,
    channels: usize,
    weights: usize,
    work: Work,
    element: PhantomData<fn() -> T>,
}

/// Elements of a block that folds.
const FOLD_TILE: usize = 2048;

impl<T: RawElement> Fold<T> {
    /// For a dense or pointwise convolution with `weights` weights and `channels` outputs.
    ///
    /// # Errors
    /// [`Error::Shape`] for channels that are no multiple of 8 or do not divide the weights, or 2³¹ weights and more; those
    /// of [`Device::module`].
    pub fn plan(device: &Device, weights: usize, channels: usize) -> Result<Self> {
        let possible = channels > 0
            && channels.is_multiple_of(8)
            && weights.is_multiple_of(channels)
            && (1..=MAX_ELEMENTS).contains(&weights);
        if !possible {
            let problem = format!("{weights} weights of {channels} channels cannot be folded");
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        let cost = Cost {
            bytes: (weights * (4 + T::DTYPE.bytes()) + 4 * channels) as u64,
            tensor_operations: 0,
            operations: weights as u64,
        };
        let kernel = format!("batch_norm_fold_{}", T::SUFFIX);
        let work = Work { kernel, grid: [weights.div_ceil(FOLD_TILE) as u32, 1, 1], shared: 0, cost };
        let kernel = device.module(&FAMILY)?.kernel(&work.kernel)?;
        Ok(Self { device: device.clone(), kernel, channels, weights, work, element: PhantomData })
    }

    /// Its launch.
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// folded ← scale\[o\]·weights\[o, …\] of every output channel o. The shift is what remains to be added: the bias of
    /// [`Output::Folded`](super::Output::Folded).
    ///
    /// # Errors
    /// As for [`BatchNorm::merge`].
    pub fn fold(
        &self,
        stream: &Arc<CudaStream>,
        weights: &CudaView<'_, f32>,
        scale: &CudaView<'_, f32>,
        folded: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("weights", weights, self.weights)?;
        operands.read("scale", scale, self.channels)?;
        operands.write("folded", folded, self.weights)?;
        let (count, row) = (self.weights as u32, (self.weights / self.channels) as u32);
        let mut launch = self.kernel.on(stream);
        launch.input(weights).input(scale).output(folded).value(&count).value(&row);
        // SAFETY: both buffers have `count` elements, a multiple of 8, and do not overlap; `scale` has one for each `row` of
        // them. A thread reads and writes 8 elements below `count`.
        unsafe { launch.run(self.work.grid, self.work.shared, format_args!("{count} weights")) }
    }
}

/// Words of the kernels' `EvaluatePart`.
const PART_WORDS: usize = 8;

/// The launch of [`StochasticDepth::draw`] for batches of `images` images and `blocks` blocks that drop.
pub fn factors_work(images: usize, blocks: usize) -> Work {
    let bytes = 4 * (DROP_WORDS * blocks + images + images * blocks) as u64;
    let cost = Cost { bytes, tensor_operations: 0, operations: 0 };
    let grid = [blocks as u32, (images as u32).div_ceil(THREADS), 1];
    Work { kernel: "batch_norm_factors".into(), grid, shared: 0, cost }
}

/// Words of the kernels' `Drop`.
const DROP_WORDS: usize = 3;

/// The factors of stochastic depth of all blocks, drawn in one launch for each step.
#[derive(Debug)]
pub struct StochasticDepth {
    device: Device,
    kernel: Kernel,
    images: usize,
    /// From one block's factors to the next one's: a multiple of 16 bytes.
    stride: usize,
    /// The kernel's `Drop`s.
    drops: CudaSlice<u32>,
    factors: CudaSlice<f32>,
    work: Work,
}

impl StochasticDepth {
    /// For batches of `images` images, and the blocks that drop.
    ///
    /// # Errors
    /// [`Error::Shape`] for no images or no blocks, or 2³¹ factors and more; [`Error::Usage`] for a rate outside \[0, 1);
    /// those of [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, images: usize, blocks: &[DropPath]) -> Result<Self> {
        let stride = images.checked_next_multiple_of(4);
        let count = stride.and_then(|stride| stride.checked_mul(blocks.len()));
        let (Some(stride), Some(count @ 1..=MAX_ELEMENTS)) = (stride, count) else {
            let problem = format!(
                "{} blocks of {images} images; 1 to {MAX_ELEMENTS} factors are possible",
                blocks.len()
            );
            return Err(Error::Shape { operation: DEPTH, problem });
        };
        let mut words = Vec::with_capacity(DROP_WORDS * blocks.len());
        for &DropPath { rate, block } in blocks {
            if !(0.0..1.0).contains(&rate) {
                return Err(Error::usage("drop_path", rate, "expected a number from 0 to below 1"));
            }
            words.extend([
                step::threshold(rate),
                step::keep(rate).to_bits(),
                Purpose::DropPath(block).code(),
            ]);
        }
        let work = factors_work(images, blocks.len());
        Ok(Self {
            device: device.clone(),
            kernel: device.module(&FAMILY)?.kernel(&work.kernel)?,
            images,
            stride,
            drops: device.upload(&words)?,
            factors: device.zeros(count)?,
            work,
        })
    }

    /// Its launch.
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// Draws the factors of a step: 0 or 1/(1 − rate), by the same random numbers as the
    /// [reference](crate::reference::Reference).
    ///
    /// # Errors
    /// [`Error::Shape`] for a step of another number of images, or a step or stream of another device; [`Error::Driver`].
    pub fn draw(&mut self, stream: &Arc<CudaStream>, step: &StepScalars) -> Result<()> {
        let mut operands = Operands::new(DEPTH, &self.device, stream)?;
        let step = step.view(&mut operands, self.images)?;
        let (drops, mut factors) = (self.drops.as_view(), self.factors.as_view_mut());
        let (images, stride) = (self.images as u32, self.stride as u32);
        let mut launch = self.kernel.on(stream);
        launch.input(&step).input(&drops).output(&mut factors).value(&images).value(&stride);
        // SAFETY: `step` has a word of each image, `drops` a `Drop` of each row of the grid, and `factors`, this plan's
        // own, `stride` floats of each, which is `images` and more.
        unsafe { launch.run(self.work.grid, self.work.shared, format_args!("{images} images")) }
    }

    /// Those of block number `i` of the plan, \[images\].
    ///
    /// # Panics
    /// If the plan has fewer blocks.
    pub fn factors(&self, i: usize) -> CudaView<'_, f32> {
        self.factors.slice(i * self.stride..i * self.stride + self.images)
    }
}

const DEPTH: &str = "stochastic depth";
