//! The buffers of one layer in bf16.

use super::numbers;
use effnetv2::Result;
use effnetv2::backend::VarianceEstimator;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::{CudaSlice, CudaView};
use effnetv2::kernels::{Arrival, Debt, GradientView, Statistics, Workspace};
use effnetv2::tensor::Shape;
use half::bf16;

/// What a convolution reads and leaves.
pub(crate) struct Layer {
    pub(crate) device: Device,
    /// The input, its gradient, the output, and the gradient that arrives there.
    pub(crate) x: CudaSlice<bf16>,
    pub(crate) dx: CudaSlice<bf16>,
    pub(crate) y: CudaSlice<bf16>,
    pub(crate) g: CudaSlice<bf16>,
    pub(crate) weight: CudaSlice<bf16>,
    pub(crate) dweight: CudaSlice<f32>,
    pub(crate) input: Vectors,
    pub(crate) output: Vectors,
    /// Of the input, \[n, c\], and five sums of each.
    pub(crate) gate: CudaSlice<f32>,
    pub(crate) sums: CudaSlice<f32>,
    pub(crate) workspace: Workspace,
}

impl Layer {
    pub(crate) fn new(device: &Device, x: Shape, y: Shape, weights: usize, floats: usize) -> Result<Self> {
        let tensor = |shape: Shape| numbers(device, shape.elements(), bf16::from_f32);
        Ok(Self {
            device: device.clone(),
            x: tensor(x)?,
            dx: tensor(x)?,
            y: tensor(y)?,
            g: tensor(y)?,
            weight: numbers(device, weights, bf16::from_f32)?,
            dweight: device.zeros(weights)?,
            input: Vectors::new(device, x.c)?,
            output: Vectors::new(device, y.c)?,
            gate: numbers(device, x.n * x.c, |value| value)?,
            sums: device.zeros(5 * x.n * x.c)?,
            workspace: Workspace::new(device, floats)?,
        })
    }
}

/// Hands `work` the gradient of the output `y`.
pub(crate) fn gradient<R>(
    (g, y, output): (&CudaSlice<bf16>, &CudaSlice<bf16>, &Vectors),
    work: impl FnOnce(GradientView<'_, '_, bf16>) -> R,
) -> R {
    let (g, y, owed) = (g.as_view(), y.as_view(), output.owed.as_view());
    work(GradientView { g: &g, y: &y, owed: &owed, arrival: Arrival::Alone })
}

/// What belongs to the channels of a raw output.
pub(crate) struct Vectors {
    pub(crate) gamma: CudaSlice<f32>,
    pub(crate) beta: CudaSlice<f32>,
    pub(crate) running_mean: CudaSlice<f32>,
    pub(crate) running_var: CudaSlice<f32>,
    pub(crate) norm: CudaSlice<f32>,
    pub(crate) dgamma: CudaSlice<f32>,
    pub(crate) dbeta: CudaSlice<f32>,
    pub(crate) owed: CudaSlice<f32>,
}

impl Vectors {
    pub(crate) fn new(device: &Device, channels: usize) -> Result<Self> {
        let vector = |count: usize| numbers(device, count * channels, |value| value);
        Ok(Self {
            gamma: vector(1)?,
            beta: vector(1)?,
            running_mean: vector(1)?,
            running_var: vector(1)?,
            norm: vector(4)?,
            dgamma: vector(1)?,
            dbeta: vector(1)?,
            owed: vector(3)?,
        })
    }

    /// Hands `work` what becomes of the moments of the output.
    pub(crate) fn moments<R>(&mut self, work: impl FnOnce(Statistics<'_, '_>) -> R) -> R {
        let (gamma, beta) = (self.gamma.as_view(), self.beta.as_view());
        let (mut mean, mut var) = (self.running_mean.as_view_mut(), self.running_var.as_view_mut());
        let mut norm = self.norm.as_view_mut();
        work(Statistics {
            gamma: &gamma,
            beta: &beta,
            running_mean: &mut mean,
            running_var: &mut var,
            norm: &mut norm,
            epsilon: 1e-3,
            momentum: 0.1,
            variance: VarianceEstimator::Unbiased,
        })
    }

    /// Hands `work` the normalisation, and what becomes of the sums of its gradient.
    pub(crate) fn debt<'a, R>(&'a mut self, work: impl FnOnce(&CudaView<'a, f32>, Debt<'_, 'a>) -> R) -> R {
        let norm = self.norm.as_view();
        let (mut dgamma, mut dbeta) = (self.dgamma.as_view_mut(), self.dbeta.as_view_mut());
        let mut owed = self.owed.as_view_mut();
        work(&norm, Debt { norm: &norm, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed })
    }
}
