//! Dense convolutions to try kernels on: data on the host, what the reference makes of it, and how far from that rounding may
//! lead.

use super::elements::{EPSILON, Sample, close, draw, unwritten, wide, written};
use effnetv2::backend::VarianceEstimator;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::kernels::Statistics;
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::conv3x3 as reference;
use effnetv2::tensor::{Conv, ConvKind, Padding, Shape, Tensor};

/// A dense 3×3 convolution.
pub(crate) const fn dense(stride: usize, padding: Padding, inputs: usize, outputs: usize) -> Conv {
    Conv { kind: ConvKind::Dense, kernel: 3, stride, padding, inputs, outputs }
}

/// A convolution with everything it reads in any direction.
#[derive(Clone, Debug)]
pub(crate) struct Case<T> {
    pub(crate) conv: Conv,
    pub(crate) x_shape: Shape,
    pub(crate) y_shape: Shape,
    pub(crate) x: Vec<T>,
    pub(crate) weight: Vec<T>,
    /// The gradient dy = a·g + b·raw + c, and a, b, c.
    pub(crate) g: Vec<T>,
    pub(crate) raw: Vec<T>,
    pub(crate) owed: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    /// Added to the output; to the gradient of the input.
    pub(crate) skip: Vec<T>,
    pub(crate) input_skip: Vec<T>,
    /// What the weights' gradient is added to.
    pub(crate) before: Vec<f32>,
}

impl<T: Sample> Case<T> {
    fn new(
        conv: Conv,
        (n, h, w): (usize, usize, usize),
        mut draw: impl FnMut(usize, Kind) -> Vec<f32>,
    ) -> Self {
        let x_shape = Shape::new(n, h, w, conv.inputs);
        let y_shape = conv.output(x_shape).unwrap();
        let (x, y) = (x_shape.elements(), y_shape.elements());
        let mut elements = |count, kind| draw(count, kind).into_iter().map(T::of).collect();
        Self {
            conv,
            x_shape,
            y_shape,
            x: elements(x, Kind::Activation),
            weight: elements(conv.weights(), Kind::Weight),
            g: elements(y, Kind::Activation),
            raw: elements(y, Kind::Activation),
            skip: elements(y, Kind::Activation),
            input_skip: elements(x, Kind::Activation),
            owed: draw(3 * conv.outputs, Kind::Vector),
            bias: draw(conv.outputs, Kind::Vector),
            before: draw(conv.weights(), Kind::Vector),
        }
    }

    /// Outputs mostly between −3 and 3.
    pub(crate) fn random(conv: Conv, images: (usize, usize, usize), seed: u64) -> Self {
        let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
        let deviation = (1.0 / (3 * conv.inputs) as f64).sqrt();
        Self::new(conv, images, |count, kind| match kind {
            Kind::Weight => draw_f32(&mut stream, count, deviation),
            Kind::Activation => draw_f32(&mut stream, count, 2.0),
            Kind::Vector => draw_f32(&mut stream, count, 1.0),
        })
    }

    /// Numbers of which every sum is an integer that f32 holds exactly, and dy one that every type does.
    pub(crate) fn integers(conv: Conv, images: (usize, usize, usize), seed: u64) -> Self {
        let mut stream = Stream::new(seed, 1, 0, Purpose::Init);
        let mut integers = |count, most: u32| -> Vec<f32> {
            (0..count).map(|_| (stream.bits() % (2 * most + 1)) as f32 - most as f32).collect()
        };
        Self::new(conv, images, |count, kind| match kind {
            Kind::Weight | Kind::Vector => integers(count, 2),
            Kind::Activation => integers(count, 3),
        })
    }

    pub(crate) fn x_tensor(&self) -> Tensor<f64> {
        Tensor::from_vec(self.x_shape, wide(&self.x)).unwrap()
    }

    /// dy, and |a·g| + |b·raw| + |c|.
    pub(crate) fn dy(&self) -> (Tensor<f64>, Tensor<f64>) {
        let c = self.conv.outputs;
        let term = |i: usize| {
            let at = |k: usize| f64::from(self.owed[k * c + i % c]);
            [at(0) * self.g[i].wide(), at(1) * self.raw[i].wide(), at(2)]
        };
        let tensor = |f: &dyn Fn([f64; 3]) -> f64| {
            let values = (0..self.g.len()).map(|i| f(term(i))).collect();
            Tensor::from_vec(self.y_shape, values).unwrap()
        };
        (tensor(&|t| t.iter().sum()), tensor(&|t| t.iter().map(|v| v.abs()).sum()))
    }

    /// y, and the same of magnitudes.
    pub(crate) fn fprop(&self) -> (Tensor<f64>, Tensor<f64>) {
        let (x, weight) = (self.x_tensor(), wide(&self.weight));
        let y = |x: &Tensor<f64>, weight: &[f64]| reference::forward(&self.conv, x, weight, self.y_shape);
        (y(&x, &weight), y(&magnitudes(&x), &absolute(&weight)))
    }

    /// dx without anything added, and the same of magnitudes.
    pub(crate) fn dgrad(&self) -> (Tensor<f64>, Tensor<f64>) {
        let ((dy, size), weight) = (self.dy(), wide(&self.weight));
        let dx = |dy: &Tensor<f64>, weight: &[f64]| {
            reference::backward_input(&self.conv, dy, weight, self.x_shape)
        };
        (dx(&dy, &weight), dx(&size, &absolute(&weight)))
    }

    /// The gradient of the weights, added to what was before, and the same of magnitudes.
    pub(crate) fn wgrad(&self) -> (Vec<f64>, Vec<f64>) {
        let ((dy, size), x) = (self.dy(), self.x_tensor());
        let mut sums = wide(&self.before);
        reference::backward_weight(&self.conv, &x, &dy, &mut sums);
        let mut bounds = absolute(&wide(&self.before));
        reference::backward_weight(&self.conv, &magnitudes(&x), &size, &mut bounds);
        (sums, bounds)
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Activation,
    Weight,
    Vector,
}

fn draw_f32(stream: &mut Stream, count: usize, most: f64) -> Vec<f32> {
    draw(stream, count, -most, most)
}

fn absolute(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| v.abs()).collect()
}

fn magnitudes(x: &Tensor<f64>) -> Tensor<f64> {
    Tensor::from_vec(x.shape(), absolute(x.data())).unwrap()
}

/// Σ a·b.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// What `count` products added in any order, with tensor cores that truncate, may lose of the sum of their magnitudes.
pub(crate) fn roundings(count: usize) -> f64 {
    (count + 8) as f64 * EPSILON
}

/// Each of `actual` is what `expected` rounds to, but for `share` of its magnitude.
#[track_caller]
pub(crate) fn all_close<T: Sample>(
    actual: &[T],
    expected: &[f64],
    magnitude: &[f64],
    share: f64,
    what: &str,
) {
    assert_eq!((actual.len(), expected.len()), (magnitude.len(), magnitude.len()), "{what}");
    for (i, actual) in actual.iter().enumerate() {
        let error = share * magnitude[i];
        let tolerance = error + T::UNIT * (expected[i].abs() + error) + T::TINY;
        close(actual.wide(), expected[i], tolerance, format_args!("{what} {i}"));
    }
}

/// Each of `actual` is `expected`, rounded to its type.
#[track_caller]
pub(crate) fn all_exact<T: Sample>(actual: &[T], expected: &[f64], what: std::fmt::Arguments<'_>) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (i, (&actual, &expected)) in actual.iter().zip(expected).enumerate() {
        assert!(actual == T::of(expected as f32), "{what} {i}: {actual:?} instead of {expected}");
    }
}

/// A batch norm on the host and on the device.
#[derive(Debug)]
pub(crate) struct Norm {
    gamma: Vec<f32>,
    beta: Vec<f32>,
    running: [Vec<f32>; 2],
    variance: VarianceEstimator,
    device_gamma: CudaSlice<f32>,
    device_beta: CudaSlice<f32>,
    device_running: [CudaSlice<f32>; 2],
    device_norm: CudaSlice<f32>,
}

const NORM_EPSILON: f64 = 1e-3;
const MOMENTUM: f64 = 0.1;

impl Norm {
    pub(crate) fn random(device: &Device, channels: usize, seed: u64) -> Self {
        let mut stream = Stream::new(seed, 2, 0, Purpose::Init);
        let mut vector = |low, high| draw::<f32>(&mut stream, channels, low, high);
        let (gamma, beta) = (vector(0.5, 1.5), vector(-1.0, 1.0));
        let running = [vector(-1.0, 1.0), vector(0.5, 2.0)];
        let upload = |values: &[f32]| device.upload(values).unwrap();
        Self {
            device_gamma: upload(&gamma),
            device_beta: upload(&beta),
            device_running: running.each_ref().map(|values| upload(values)),
            device_norm: unwritten(device, 4 * channels),
            variance: if seed.is_multiple_of(2) {
                VarianceEstimator::Biased
            } else {
                VarianceEstimator::Unbiased
            },
            gamma,
            beta,
            running,
        }
    }

    /// Calls `f` with what a kernel needs of it.
    pub(crate) fn with<R>(&mut self, f: impl FnOnce(Statistics<'_, '_>) -> R) -> R {
        let channels = self.gamma.len();
        let [running_mean, running_var] = &mut self.device_running;
        f(Statistics {
            gamma: &self.device_gamma.as_view(),
            beta: &self.device_beta.as_view(),
            running_mean: &mut running_mean.as_view_mut(),
            running_var: &mut running_var.as_view_mut(),
            norm: &mut self.device_norm.slice_mut(..4 * channels),
            epsilon: NORM_EPSILON,
            momentum: MOMENTUM,
            variance: self.variance,
        })
    }

    /// What the kernel has written: the norm, the running mean and variance.
    pub(crate) fn outcome(&self, device: &Device) -> Vec<f32> {
        let running = self.device_running.iter().flat_map(|values| device.read(values).unwrap());
        written(device, &self.device_norm).into_iter().chain(running).collect()
    }

    /// The outcome is that of `y` as it was stored, if a sum takes at most as many additions in a row as there are pixels.
    #[track_caller]
    pub(crate) fn check<T: Sample>(&self, device: &Device, y: &[T]) {
        let channels = self.gamma.len();
        let (outcome, count) = (self.outcome(device), y.len() / channels);
        let at = |row: usize, channel: usize| f64::from(outcome[row * channels + channel]);
        for channel in 0..channels {
            let values: Vec<f64> = y.iter().skip(channel).step_by(channels).map(|v| v.wide()).collect();
            let mean = values.iter().sum::<f64>() / count as f64;
            let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count as f64;
            // The kernels sum what is left of a pivot among the values, so this is the most that a summand is.
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            let range = values.iter().copied().fold(f64::NEG_INFINITY, f64::max) - low;
            let lost = (count + 16) as f64 * EPSILON;
            let mean_error = lost * range + 4.0 * EPSILON * mean.abs();
            // Means of runs are rounded, too: their squared distances from the whole one are part of the variance.
            let variance_error =
                4.0 * lost * range * range + mean_error * mean_error + 8.0 * EPSILON * mean.abs() * range;
            let rstd = 1.0 / (variance + NORM_EPSILON).sqrt();
            let rstd_error = rstd * (variance_error / (variance + NORM_EPSILON) + 8.0 * EPSILON);
            let (gamma, beta) = (f64::from(self.gamma[channel]), f64::from(self.beta[channel]));
            let scale_error = gamma * rstd_error + EPSILON * gamma * rstd;
            let shift_error = scale_error * mean.abs()
                + gamma * rstd * mean_error
                + 4.0 * EPSILON * (beta.abs() + gamma * rstd * mean.abs());
            let correction = match self.variance {
                VarianceEstimator::Biased => 1.0,
                VarianceEstimator::Unbiased => count as f64 / (count as f64 - 1.0),
            };
            let moved = |k: usize, to: f64| {
                let from = f64::from(self.running[k][channel]);
                (from + MOMENTUM * (to - from), 4.0 * EPSILON * (from.abs() + to.abs()))
            };
            let (running_mean, mean_rounding) = moved(0, mean);
            let (running_var, var_rounding) = moved(1, variance * correction);
            for (row, name, expected, tolerance) in [
                (0, "scale", gamma * rstd, scale_error),
                (1, "shift", beta - gamma * rstd * mean, shift_error),
                (2, "mean", mean, mean_error),
                (3, "rstd", rstd, rstd_error),
                (4, "running mean", running_mean, MOMENTUM * mean_error + mean_rounding),
                (5, "running variance", running_var, MOMENTUM * correction * variance_error + var_rounding),
            ] {
                close(at(row, channel), expected, tolerance, format_args!("{name} of channel {channel}"));
            }
        }
    }
}
