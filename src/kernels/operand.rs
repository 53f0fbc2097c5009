//! What convolutions read and what they leave: the tensors of the training dataflow as views of device memory.

use super::raw::RawElement;
use crate::Result;
use crate::backend::{Activation, VarianceEstimator};
use crate::device::cudarc::driver::{CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr};
use crate::device::{Argument, Operands};
use crate::tensor::Shape;
use std::sync::Arc;

/// How a convolution reads its input of shape \[n, h, w, c\].
#[derive(Clone, Copy, Debug)]
pub enum Input<'a, 'b, T> {
    /// As stored.
    Plain(&'a CudaView<'b, T>),
    /// SiLU(z), z = scale·y + shift.
    Silu {
        /// A raw output.
        y: &'a CudaView<'b, T>,
        /// Its normalisation, \[4, c\]: scale, shift, mean, rstd.
        norm: &'a CudaView<'b, f32>,
    },
    /// SiLU(z)·gate.
    Gated {
        /// A raw output.
        y: &'a CudaView<'b, T>,
        /// Its normalisation, \[4, c\].
        norm: &'a CudaView<'b, f32>,
        /// The gate, \[n, c\].
        gate: &'a CudaView<'b, f32>,
    },
}

/// The variant of an [`Input`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InputKind {
    /// [`Input::Plain`].
    Plain,
    /// [`Input::Silu`].
    Silu,
    /// [`Input::Gated`].
    Gated,
}

impl<T: RawElement> Input<'_, '_, T> {
    /// Its variant.
    pub fn kind(&self) -> InputKind {
        match self {
            Self::Plain(_) => InputKind::Plain,
            Self::Silu { .. } => InputKind::Silu,
            Self::Gated { .. } => InputKind::Gated,
        }
    }

    /// Adds its buffers to the operands of an operation.
    pub(super) fn check(&self, operands: &mut Operands<'_>, shape: Shape) -> Result<()> {
        match self {
            Self::Plain(x) => operands.read("x", *x, shape.elements()),
            Self::Silu { y, norm } => {
                operands.read("the input's y", *y, shape.elements())?;
                operands.read("the input's norm", *norm, 4 * shape.c)
            }
            Self::Gated { y, norm, gate } => {
                operands.read("the input's y", *y, shape.elements())?;
                operands.read("the input's norm", *norm, 4 * shape.c)?;
                operands.read("the input's gate", *gate, shape.n * shape.c)
            }
        }
    }
}

/// The gradient of a raw output y \[n, h, w, c\]: dy = a·dz + b·y + c, dz being what [`Arrival`] makes of `g`.
#[derive(Clone, Copy, Debug)]
pub struct GradientView<'a, 'b, T> {
    /// \[n, h, w, c\].
    pub g: &'a CudaView<'b, T>,
    /// The raw output.
    pub y: &'a CudaView<'b, T>,
    /// What batch norm's backward owes, \[3, c\]: a, b, c.
    pub owed: &'a CudaView<'b, f32>,
    /// How g becomes dz.
    pub arrival: Arrival<'a, 'b>,
}

/// How a stored gradient g becomes that of z.
#[derive(Clone, Copy, Debug)]
pub enum Arrival<'a, 'b> {
    /// dz = g.
    Alone,
    /// dz = factor\[n\]·g: stochastic depth.
    Factors(&'a CudaView<'b, f32>),
    /// dz = (gate\[n, c\]·g + dpool\[n, c\])·SiLU'(scale·y + shift): squeeze-excitation.
    Gated {
        /// y's normalisation, \[4, c\].
        norm: &'a CudaView<'b, f32>,
        /// \[n, c\].
        gate: &'a CudaView<'b, f32>,
        /// \[n, c\].
        dpool: &'a CudaView<'b, f32>,
    },
}

impl<T: RawElement> GradientView<'_, '_, T> {
    /// Adds its buffers to the operands of an operation.
    pub(super) fn check(&self, operands: &mut Operands<'_>, shape: Shape) -> Result<()> {
        operands.read("g", self.g, shape.elements())?;
        operands.read("the gradient's y", self.y, shape.elements())?;
        operands.read("owed", self.owed, 3 * shape.c)?;
        match self.arrival {
            Arrival::Alone => Ok(()),
            Arrival::Factors(factors) => operands.read("the gradient's factors", factors, shape.n),
            Arrival::Gated { norm, gate, dpool } => {
                operands.read("the gradient's norm", norm, 4 * shape.c)?;
                operands.read("the gradient's gate", gate, shape.n * shape.c)?;
                operands.read("dpool", dpool, shape.n * shape.c)
            }
        }
    }
}

/// What becomes of the moments of a convolution's output: `NormFinish` of `kernels/include/batch_norm.cuh`.
#[derive(Debug)]
pub struct Statistics<'a, 'b> {
    /// \[c\].
    pub gamma: &'a CudaView<'b, f32>,
    /// \[c\].
    pub beta: &'a CudaView<'b, f32>,
    /// \[c\], moved towards the batch.
    pub running_mean: &'a mut CudaViewMut<'b, f32>,
    /// \[c\], likewise.
    pub running_var: &'a mut CudaViewMut<'b, f32>,
    /// \[4, c\], written: scale, shift, mean, rstd.
    pub norm: &'a mut CudaViewMut<'b, f32>,
    /// Added to the variance.
    pub epsilon: f64,
    /// The weight of the new statistic in the running one.
    pub momentum: f64,
    /// Which variance the running statistic keeps.
    pub variance: VarianceEstimator,
}

impl Statistics<'_, '_> {
    /// Adds its buffers to the operands of an operation.
    pub(super) fn check(&self, operands: &mut Operands<'_>, channels: usize) -> Result<()> {
        operands.read("gamma", self.gamma, channels)?;
        operands.read("beta", self.beta, channels)?;
        operands.write("running mean", &*self.running_mean, channels)?;
        operands.write("running variance", &*self.running_var, channels)?;
        operands.write("norm", &*self.norm, 4 * channels)
    }

    /// As the kernels take it; `count` are the pixels of the batch.
    pub(super) fn finish(&mut self, stream: &Arc<CudaStream>, count: usize) -> NormFinish {
        let correction = match self.variance {
            VarianceEstimator::Unbiased => count as f64 / (count as f64 - 1.0),
            VarianceEstimator::Biased => 1.0,
        };
        NormFinish {
            gamma: self.gamma.device_ptr(stream).0,
            beta: self.beta.device_ptr(stream).0,
            running_mean: self.running_mean.device_ptr_mut(stream).0,
            running_var: self.running_var.device_ptr_mut(stream).0,
            norm: self.norm.device_ptr_mut(stream).0,
            epsilon: self.epsilon as f32,
            momentum: self.momentum as f32,
            correction: correction as f32,
            _pad: 0.0,
        }
    }
}

/// What becomes of the two sums of a batch-norm backward: `OwedFinish` of the same header.
#[derive(Debug)]
pub struct Debt<'a, 'b> {
    /// Of the layer whose output was normalised, \[4, c\].
    pub norm: &'a CudaView<'b, f32>,
    /// \[c\], added to.
    pub dgamma: &'a mut CudaViewMut<'b, f32>,
    /// \[c\], added to.
    pub dbeta: &'a mut CudaViewMut<'b, f32>,
    /// \[3, c\], written: a, b, c.
    pub owed: &'a mut CudaViewMut<'b, f32>,
}

impl Debt<'_, '_> {
    /// Adds its buffers to the operands of an operation.
    pub(super) fn check(&self, operands: &mut Operands<'_>, channels: usize) -> Result<()> {
        operands.read("the producer's norm", self.norm, 4 * channels)?;
        operands.write("dgamma", &*self.dgamma, channels)?;
        operands.write("dbeta", &*self.dbeta, channels)?;
        operands.write("owed to the producer", &*self.owed, 3 * channels)
    }

    /// As the kernels take it; `count` are the pixels of the batch.
    pub(super) fn finish(&mut self, stream: &Arc<CudaStream>, count: usize) -> OwedFinish {
        OwedFinish {
            norm: self.norm.device_ptr(stream).0,
            dgamma: self.dgamma.device_ptr_mut(stream).0,
            dbeta: self.dbeta.device_ptr_mut(stream).0,
            owed: self.owed.device_ptr_mut(stream).0,
            reciprocal_count: (1.0 / count as f64) as f32,
            _pad: 0.0,
        }
    }
}

/// What a convolution does with its output before it is stored.
#[derive(Debug)]
pub enum Output<'a, 'b, T> {
    /// Nothing.
    Plain,
    /// Nothing, and takes the moments of what is stored.
    Moments(Statistics<'a, 'b>),
    /// Inference: act(y + bias\[c\]) + skip, the normalisation being folded into weights and bias.
    Folded {
        /// \[c\].
        bias: &'a CudaView<'b, f32>,
        /// What follows the bias.
        act: Activation,
        /// Of the output's shape, added last.
        skip: Option<&'a CudaView<'b, T>>,
    },
}

/// The variant of an [`Output`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutputKind {
    /// [`Output::Plain`].
    Plain,
    /// [`Output::Moments`].
    Moments,
    /// [`Output::Folded`].
    Folded {
        /// Whether there is a skip.
        skip: bool,
    },
}

impl<T: RawElement> Output<'_, '_, T> {
    /// Its variant.
    pub fn kind(&self) -> OutputKind {
        match self {
            Self::Plain => OutputKind::Plain,
            Self::Moments(_) => OutputKind::Moments,
            Self::Folded { skip, .. } => OutputKind::Folded { skip: skip.is_some() },
        }
    }

    /// Adds its buffers to the operands of an operation whose output has `shape`.
    pub(super) fn check(&self, operands: &mut Operands<'_>, shape: Shape) -> Result<()> {
        match self {
            Self::Plain => Ok(()),
            Self::Moments(statistics) => statistics.check(operands, shape.c),
            Self::Folded { bias, skip, .. } => {
                operands.read("bias", *bias, shape.c)?;
                skip.map_or(Ok(()), |skip| operands.read("skip", skip, shape.elements()))
            }
        }
    }
}

/// What a convolution's backward does with the gradient of its input before it is stored.
#[derive(Debug)]
pub enum GradientOutput<'a, 'b, T> {
    /// dx + skip.
    Plain {
        /// Of the input's shape.
        skip: Option<&'a CudaView<'b, T>>,
    },
    /// The input was SiLU(z), z = norm(y): stores dz = dx·SiLU'(z), and takes the sums of dz (before it is rounded) and dz·x̂.
    Silu {
        /// The raw output that the input was made of.
        y: &'a CudaView<'b, T>,
        /// Its normalisation, and what becomes of the sums.
        debt: Debt<'a, 'b>,
    },
    /// The input was SiLU(z)·gate: stores dx, and takes for each image and channel the five sums of
    /// [`SqueezeExcite::backward_sums`](super::squeeze_excite::SqueezeExcite::backward_sums).
    Gated {
        /// The raw output that the input was made of.
        y: &'a CudaView<'b, T>,
        /// Its normalisation, \[4, c\].
        norm: &'a CudaView<'b, f32>,
        /// \[5, n, c\], written.
        sums: &'a mut CudaViewMut<'b, f32>,
    },
}

/// The variant of a [`GradientOutput`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GradientKind {
    /// [`GradientOutput::Plain`].
    Plain {
        /// Whether there is a skip.
        skip: bool,
    },
    /// [`GradientOutput::Silu`].
    Silu,
    /// [`GradientOutput::Gated`].
    Gated,
}

impl<T: RawElement> GradientOutput<'_, '_, T> {
    /// Its variant.
    pub fn kind(&self) -> GradientKind {
        match self {
            Self::Plain { skip } => GradientKind::Plain { skip: skip.is_some() },
            Self::Silu { .. } => GradientKind::Silu,
            Self::Gated { .. } => GradientKind::Gated,
        }
    }

    /// Adds its buffers to the operands of an operation whose input has `shape`.
    pub(super) fn check(&self, operands: &mut Operands<'_>, shape: Shape) -> Result<()> {
        match self {
            Self::Plain { skip } => skip.map_or(Ok(()), |skip| operands.read("skip", skip, shape.elements())),
            Self::Silu { y, debt } => {
                operands.read("the producer's y", *y, shape.elements())?;
                debt.check(operands, shape.c)
            }
            Self::Gated { y, norm, sums } => {
                operands.read("the producer's y", *y, shape.elements())?;
                operands.read("the producer's norm", *norm, 4 * shape.c)?;
                operands.write("sums", &**sums, 5 * shape.n * shape.c)
            }
        }
    }
}

/// `NormFinish` of `kernels/include/batch_norm.cuh`. Addresses of 0 are null pointers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct NormFinish {
    gamma: u64,
    beta: u64,
    running_mean: u64,
    running_var: u64,
    norm: u64,
    epsilon: f32,
    momentum: f32,
    correction: f32,
    _pad: f32,
}

/// `OwedFinish` of `kernels/include/batch_norm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OwedFinish {
    norm: u64,
    dgamma: u64,
    dbeta: u64,
    owed: u64,
    reciprocal_count: f32,
    _pad: f32,
}

// SAFETY: both are plain structs of the layout that the kernels declare.
unsafe impl DeviceRepr for NormFinish {}
// SAFETY: as above.
unsafe impl DeviceRepr for OwedFinish {}

impl Argument for NormFinish {
    const CODE: &'static str = "{56:8}";
}
impl Argument for OwedFinish {
    const CODE: &'static str = "{40:8}";
}
