//! The element types of kernels, what rounding to them costs, and raw tensors to try them on.

use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::kernels::RawElement;
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::batch_norm::Norm;
use effnetv2::tensor::{Shape, Tensor};
use half::{bf16, f16};
use ndarray::Array2;

/// An element type.
pub(crate) trait Sample: RawElement + PartialEq + std::fmt::Debug {
    /// Half the distance between 1 and the next number; rounding costs at most this share of a value.
    const UNIT: f64;
    /// Half the least positive number: what rounding may cost anyway.
    const TINY: f64;
    fn of(value: f32) -> Self;
    fn wide(self) -> f64;
}

impl Sample for f32 {
    const UNIT: f64 = 0.5 / 8_388_608.0;
    // The kernels' approximate functions take subnormals as zero.
    const TINY: f64 = f32::MIN_POSITIVE as f64;
    fn of(value: f32) -> Self {
        value
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Sample for f16 {
    const UNIT: f64 = 0.5 / 1024.0;
    const TINY: f64 = 0.5 / 16_777_216.0;
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Sample for bf16 {
    const UNIT: f64 = 0.5 / 128.0;
    const TINY: f64 = f32::MIN_POSITIVE as f64;
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

/// ε of f32.
pub(crate) const EPSILON: f64 = f32::EPSILON as f64;

/// Elements behind an output that nothing may touch.
pub(crate) const MARGIN: usize = 16;

/// An output of `length` elements that nobody has written, with its margin: all −123.
pub(crate) fn unwritten<T: Sample>(device: &Device, length: usize) -> CudaSlice<T> {
    device.upload(&vec![T::of(-123.0); length + MARGIN]).unwrap()
}

/// What was written there.
pub(crate) fn written<T: Sample>(device: &Device, output: &CudaSlice<T>) -> Vec<T> {
    let mut values = device.read(output).unwrap();
    let margin = values.split_off(values.len() - MARGIN);
    assert_eq!(margin, vec![T::of(-123.0); MARGIN], "the margin was written");
    values
}

/// `count` numbers from `low` to `high`.
pub(crate) fn draw<T: Sample>(stream: &mut Stream, count: usize, low: f64, high: f64) -> Vec<T> {
    (0..count).map(|_| T::of(stream.uniform_in(low, high) as f32)).collect()
}

pub(crate) fn wide<T: Sample>(values: &[T]) -> Vec<f64> {
    values.iter().map(|v| v.wide()).collect()
}

/// A raw tensor and what it owes, on the host.
#[derive(Clone, Debug)]
pub(crate) struct Raw<T> {
    pub(crate) shape: Shape,
    pub(crate) y: Vec<T>,
    pub(crate) scale: Vec<f32>,
    pub(crate) shift: Vec<f32>,
    pub(crate) mean: Vec<f32>,
    pub(crate) rstd: Vec<f32>,
}

impl<T: Sample> Raw<T> {
    /// z mostly between −8 and 8.
    pub(crate) fn random(shape: Shape, seed: u64) -> Self {
        let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
        let mut vector = |low, high| draw(&mut stream, shape.c, low, high);
        let (scale, shift) = (vector(-3.0, 3.0), vector(-2.0, 2.0));
        let (mean, rstd) = (vector(-1.0, 1.0), vector(0.5, 2.0));
        Self { shape, scale, shift, mean, rstd, y: draw(&mut stream, shape.elements(), -2.0, 2.0) }
    }

    /// z so large that SiLU(z) = z and SiLU'(z) = 1: nothing but sums, which are exact.
    pub(crate) fn integers(shape: Shape) -> Self {
        Self {
            shape,
            y: (0..shape.elements()).map(|i| T::of((i * 7 % 11) as f32)).collect(),
            scale: vec![2.0; shape.c],
            shift: (0..shape.c).map(|c| (40 + c % 5) as f32).collect(),
            mean: (0..shape.c).map(|c| (c % 3) as f32).collect(),
            rstd: vec![0.5; shape.c],
        }
    }

    pub(crate) fn tensor(&self) -> Tensor<f64> {
        Tensor::from_vec(self.shape, wide(&self.y)).unwrap()
    }

    pub(crate) fn norm(&self) -> Norm<f64> {
        Norm {
            scale: wide(&self.scale),
            shift: wide(&self.shift),
            mean: wide(&self.mean),
            rstd: wide(&self.rstd),
            count: self.shape.pixels(),
        }
    }

    /// For each image and channel the mean over pixels of |scale·y| + |shift| of `weight`: what rounding is a share of.
    pub(crate) fn magnitude(&self, weight: impl Fn(usize) -> f64) -> Vec<f64> {
        let Shape { n, h, w, c } = self.shape;
        let mut sums = vec![0.0; n * c];
        for (i, y) in self.y.iter().enumerate() {
            let channel = i % c;
            let z = (f64::from(self.scale[channel]) * y.wide()).abs() + f64::from(self.shift[channel]).abs();
            sums[i / (h * w * c) * c + channel] += z * weight(i) / (h * w) as f64;
        }
        sums
    }

    pub(crate) fn upload(&self, device: &Device) -> DeviceRaw<T> {
        let vector = |values: &[f32]| device.upload(values).unwrap();
        DeviceRaw {
            y: device.upload(&self.y).unwrap(),
            vectors: [&self.scale, &self.shift, &self.mean, &self.rstd].map(|v| vector(v)),
        }
    }
}

/// The same on the device.
#[derive(Debug)]
pub(crate) struct DeviceRaw<T> {
    pub(crate) y: CudaSlice<T>,
    pub(crate) vectors: [CudaSlice<f32>; 4],
}

/// Calls `$f` with the view of a [`DeviceRaw`], whose parts must live as long.
#[macro_export]
macro_rules! with_raw {
    ($raw:expr, $view:ident => $body:expr) => {{
        let y = $raw.y.as_view();
        let [scale, shift, mean, rstd] = $raw.vectors.each_ref().map(|v| v.as_view());
        let $view =
            effnetv2::kernels::RawView { y: &y, scale: &scale, shift: &shift, mean: &mean, rstd: &rstd };
        $body
    }};
}

/// SiLU(z) of every element.
pub(crate) fn activated<T: Sample>(raw: &Raw<T>) -> Tensor<f64> {
    use effnetv2::tensor::Real;
    let norm = raw.norm();
    let c = raw.shape.c;
    let values =
        raw.y.iter().enumerate().map(|(i, y)| (norm.scale[i % c] * y.wide() + norm.shift[i % c]).silu());
    Tensor::from_vec(raw.shape, values.collect()).unwrap()
}

/// The additions in a row that a sum over pixels takes.
pub(crate) fn additions(shape: Shape) -> f64 {
    ((shape.h * shape.w).div_ceil(32) + 10) as f64
}

#[track_caller]
pub(crate) fn close(actual: f64, expected: f64, tolerance: f64, what: impl std::fmt::Display) {
    let error = (actual - expected).abs();
    assert!(
        error <= tolerance,
        "{what}: {actual} instead of {expected}, {error:e} off, {tolerance:e} allowed"
    );
}

/// Σ over the pixels of each image of x·weight, \[images, channels\]; `weight` 1 where there is none.
pub(crate) fn pixel_sums(x: &Tensor<f64>, weight: Option<&Tensor<f64>>) -> Array2<f64> {
    let shape = x.shape();
    let mut sums = Array2::zeros((shape.n, shape.c));
    for (i, value) in x.data().iter().enumerate() {
        let factor = weight.map_or(1.0, |w| w.data()[i]);
        sums[[i / (shape.h * shape.w * shape.c), i % shape.c]] += value * factor;
    }
    sums
}
