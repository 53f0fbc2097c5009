//! Shapes, element types and the plain host tensor.
//!
//! Everything is NHWC, channels innermost. A convolution is described by [`Conv`]; its output side and its padding
//! follow from the input side by one of the two conventions of [`Padding`].

#![forbid(unsafe_code)]

use crate::pool::Pool;
use crate::{Error, Result};
use ndarray::{ArrayView2, ArrayViewMut2, LinalgScalar, ScalarOperand};
use std::fmt::{Debug, Display};
use std::iter::Sum;
use std::ops::{AddAssign, MulAssign, Range};

/// The largest number of elements of a tensor: indices must fit 32 bits on a device.
pub const MAX_ELEMENTS: usize = i32::MAX as usize;

/// An element of the CPU reference: f32 for use, f64 for proof.
pub trait Real:
    num_traits::Float
    + LinalgScalar
    + ScalarOperand
    + AddAssign
    + MulAssign
    + Sum
    + Default
    + Debug
    + Display
    + Send
    + Sync
    + 'static
{
    /// The nearest value to `x`.
    fn of(x: f64) -> Self;
    /// The value as f64.
    fn f64(self) -> f64;
    /// eˣ in a form the compiler can vectorise where the type allows; relative error below 2 ulp.
    fn exponential(self) -> Self;

    /// The logistic function 1 / (1 + e⁻ˣ).
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::one() / (Self::one() + (-self).exponential())
    }

    /// SiLU, x·σ(x) (Elfwing et al. 2017; also called swish).
    #[inline(always)]
    fn silu(self) -> Self {
        self * self.sigmoid()
    }

    /// The derivative of SiLU, σ(x)·(1 + x·(1 − σ(x))).
    #[inline(always)]
    fn silu_grad(self) -> Self {
        let s = self.sigmoid();
        s * (Self::one() + self * (Self::one() - s))
    }
}

impl Real for f32 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }

    #[inline(always)]
    fn f64(self) -> f64 {
        f64::from(self)
    }

    /// 2ⁿ·eʳ with n = round(x / ln 2) and a degree-6 Taylor-like polynomial on |r| ≤ ln 2 / 2. There is no branch and
    /// no library call, so loops over it vectorise.
    #[inline(always)]
    fn exponential(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        let x = self.clamp(-87.3, 88.7);
        let rounded = x * std::f32::consts::LOG2_E + ROUND;
        let n = rounded - ROUND;
        let r = (x - n * LN2_HIGH) - n * LN2_LOW;
        let mut p = 1.987_569_1e-4_f32;
        for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
            p = p * r + coefficient;
        }
        let fraction = p * r * r + r + 1.0;
        // 2ⁿ in two factors, so that n = 128 stays finite until the product.
        let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
        let half = n >> 1;
        let power = |k: i32| Self::from_bits(k.wrapping_add(127).cast_unsigned() << 23);
        fraction * power(half) * power(n.wrapping_sub(half))
    }
}

impl Real for f64 {
    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }

    #[inline(always)]
    fn f64(self) -> f64 {
        self
    }

    #[inline(always)]
    fn exponential(self) -> Self {
        self.exp()
    }
}

/// The element type of tensors on a device, and how they are multiplied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 32 bits.
    F32,
    /// 32 bits in memory. In matrix products, those of dense and pointwise convolutions and of the classifier, both factors
    /// are rounded to 11 significant bits, for the tensor cores; sums are in full.
    Tf32,
    /// IEEE half precision: 11 significant bits, from 6·10⁻⁸ to 65,504.
    F16,
    /// The upper half of an f32: 8 significant bits, all its range.
    #[default]
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::Tf32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// How elements lie in memory: not [`Tf32`](Self::Tf32).
    pub const fn storage(self) -> Self {
        match self {
            Self::F32 | Self::Tf32 => Self::F32,
            Self::F16 | Self::Bf16 => self,
        }
    }

    /// Its name, and the ending of the names of kernels that multiply matrices.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Tf32 => "tf32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The ending of the names of all other kernels: that of its [`storage`](Self::storage).
    pub const fn suffix(self) -> &'static str {
        self.storage().name()
    }
}

impl Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The sides of an NHWC tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Images.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

impl Shape {
    /// `n` images of `h` × `w` pixels with `c` channels.
    pub const fn new(n: usize, h: usize, w: usize, c: usize) -> Self {
        Self { n, h, w, c }
    }

    /// n·h·w: the values of one channel.
    pub const fn pixels(self) -> usize {
        self.n * self.h * self.w
    }

    /// n·h·w·c.
    pub const fn elements(self) -> usize {
        self.pixels() * self.c
    }

    /// The same pixels with another number of channels.
    pub const fn with_channels(self, c: usize) -> Self {
        Self { c, ..self }
    }
}

impl Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}×{}×{}×{}", self.n, self.h, self.w, self.c)
    }
}

/// How a strided convolution meets the border.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Padding {
    /// TensorFlow's "SAME": as little as possible, the odd pixel at the bottom and right.
    #[default]
    Same,
    /// (k − 1) / 2 on every side, as PyTorch models pad.
    Symmetric,
}

/// Which of the three convolutions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConvKind {
    /// Every output channel sees every input channel; 3×3 in these networks. Kernel layout \[out, kh, kw, in\].
    Dense,
    /// One filter a channel, 3×3 or 5×5. Kernel layout \[kh, kw, channel\].
    Depthwise,
    /// 1×1: a matrix product over channels. Kernel layout \[out, in\].
    Pointwise,
}

/// A convolution without its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conv {
    /// Dense, depthwise or pointwise.
    pub kind: ConvKind,
    /// Side of the square kernel.
    pub kernel: usize,
    /// 1 or 2.
    pub stride: usize,
    /// The border rule.
    pub padding: Padding,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
}

impl Conv {
    /// The output side for an input side: ceil(side / stride) under both conventions.
    pub const fn output_side(&self, side: usize) -> usize {
        side.div_ceil(self.stride)
    }

    /// Zeros before the first pixel of a side; what follows the last is whatever the kernel reaches.
    pub fn pad_before(&self, side: usize) -> usize {
        match self.padding {
            Padding::Symmetric => (self.kernel - 1) / 2,
            Padding::Same => {
                ((self.output_side(side) - 1) * self.stride + self.kernel).saturating_sub(side) / 2
            }
        }
    }

    /// The shape of the output for an input of shape `x`.
    ///
    /// # Errors
    /// When `x` has other channels than the convolution, a side of zero, the output is too large, or the convolution is
    /// none that there is.
    pub fn output(&self, x: Shape) -> Result<Shape> {
        let wrong = |problem: String| Err(Error::Shape { operation: "convolution", problem });
        let exists = match self.kind {
            ConvKind::Dense => self.kernel % 2 == 1 && matches!(self.stride, 1 | 2),
            ConvKind::Depthwise => {
                matches!(self.kernel, 1 | 3 | 5)
                    && matches!(self.stride, 1 | 2)
                    && self.inputs == self.outputs
            }
            ConvKind::Pointwise => self.kernel == 1 && self.stride == 1,
        };
        if !exists {
            let rule = "kernels are odd, depthwise ones at most 5 with as many outputs as inputs, pointwise ones 1 \
                        with stride 1; strides are 1 or 2";
            return wrong(format!("{self:?} does not exist: {rule}"));
        }
        if x.c != self.inputs {
            return wrong(format!("input {x} has {} channels, the weights expect {}", x.c, self.inputs));
        }
        if x.elements() == 0 {
            return wrong(format!("input {x} is empty"));
        }
        let y = Shape::new(x.n, self.output_side(x.h), self.output_side(x.w), self.outputs);
        if x.elements().max(y.elements()) > MAX_ELEMENTS {
            return wrong(format!("{x} to {y} exceeds {MAX_ELEMENTS} elements; use a smaller batch"));
        }
        Ok(y)
    }

    /// The number of weights.
    pub const fn weights(&self) -> usize {
        match self.kind {
            ConvKind::Dense => self.outputs * self.kernel * self.kernel * self.inputs,
            ConvKind::Depthwise => self.kernel * self.kernel * self.outputs,
            ConvKind::Pointwise => self.outputs * self.inputs,
        }
    }

    /// Multiply-adds for one output pixel; equal to the number of weights for all three kinds.
    pub const fn macs_per_pixel(&self) -> usize {
        self.weights()
    }

    /// Along one axis: the taps of output `out` that fall on a side of `side` pixels, and the input of the first.
    pub fn taps(&self, out: usize, side: usize) -> (Range<usize>, usize) {
        let (origin, pad) = (out * self.stride, self.pad_before(side));
        let first = pad.saturating_sub(origin);
        let last = (side + pad).saturating_sub(origin).min(self.kernel);
        (first..last.max(first), (origin + first).saturating_sub(pad))
    }
}

/// A dense NHWC tensor in host memory. Its buffer goes back to the pool it came from, if any.
#[derive(Debug)]
pub struct Tensor<F> {
    shape: Shape,
    data: Vec<F>,
    pool: Pool<F>,
}

impl<F: Real> Tensor<F> {
    /// Zeros.
    pub fn zeros(shape: Shape) -> Self {
        Self { shape, data: vec![F::zero(); shape.elements()], pool: Pool::default() }
    }

    /// The same tensor, whose [siblings](Self::sibling) shall come from `pool`.
    pub(crate) fn with_pool(mut self, pool: &Pool<F>) -> Self {
        self.pool = pool.clone();
        self
    }

    /// A tensor of another shape from the same pool. Its values are whatever they were: write before you read.
    pub fn sibling(&self, shape: Shape) -> Self {
        Self { shape, data: self.pool.take(shape.elements()), pool: self.pool.clone() }
    }

    /// A tensor around `data`, row-major NHWC.
    ///
    /// # Errors
    /// When the length is not that of the shape.
    pub fn from_vec(shape: Shape, data: Vec<F>) -> Result<Self> {
        if data.len() != shape.elements() {
            let problem = format!("{} values cannot fill {shape}", data.len());
            return Err(Error::Shape { operation: "tensor", problem });
        }
        Ok(Self { shape, data, pool: Pool::default() })
    }

    /// The sides.
    pub const fn shape(&self) -> Shape {
        self.shape
    }

    /// All values, channels innermost.
    pub fn data(&self) -> &[F] {
        &self.data
    }

    /// All values, channels innermost.
    pub fn data_mut(&mut self) -> &mut [F] {
        &mut self.data
    }

    /// The values themselves, the shape forgotten.
    pub fn into_vec(mut self) -> Vec<F> {
        std::mem::take(&mut self.data)
    }

    /// The tensor as a matrix \[pixels, channels\].
    pub fn matrix(&self) -> ArrayView2<'_, F> {
        matrix(&self.data, self.shape.pixels(), self.shape.c)
    }

    /// The tensor as a mutable matrix \[pixels, channels\].
    pub fn matrix_mut(&mut self) -> ArrayViewMut2<'_, F> {
        matrix_mut(&mut self.data, self.shape.pixels(), self.shape.c)
    }
}

impl<F> Drop for Tensor<F> {
    fn drop(&mut self) {
        self.pool.give(std::mem::take(&mut self.data));
    }
}

impl<F: Real> Clone for Tensor<F> {
    fn clone(&self) -> Self {
        let mut copy = self.sibling(self.shape);
        copy.data.copy_from_slice(&self.data);
        copy
    }
}

impl<F: PartialEq> PartialEq for Tensor<F> {
    fn eq(&self, other: &Self) -> bool {
        (self.shape, &self.data) == (other.shape, &other.data)
    }
}

/// `data` as a row-major matrix.
///
/// # Panics
/// When the length is not rows × columns: the caller's mistake.
pub fn matrix<F>(data: &[F], rows: usize, columns: usize) -> ArrayView2<'_, F> {
    ArrayView2::from_shape((rows, columns), data).expect("the length is rows × columns")
}

/// `data` as a mutable row-major matrix.
///
/// # Panics
/// When the length is not rows × columns: the caller's mistake.
pub fn matrix_mut<F>(data: &mut [F], rows: usize, columns: usize) -> ArrayViewMut2<'_, F> {
    ArrayViewMut2::from_shape((rows, columns), data).expect("the length is rows × columns")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponential_is_accurate_to_two_ulp() {
        let mut worst = 0.0_f64;
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3 + 1.234e-4;
            let exact = f64::from(x).exp();
            worst = worst.max(((f64::from(x.exponential()) - exact) / exact).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "relative error {worst:e}");
        assert!((-200.0_f32).silu().abs() < 1e-30);
        assert_eq!(200.0_f32.silu(), 200.0);
        assert!(f32::NAN.silu().is_nan());
    }

    /// The 1-D oracle of TensorFlow's SAME convolution: kernel (1, 10, 100), stride 2.
    #[test]
    fn same_padding_matches_tensorflow() {
        let conv = Conv {
            kind: ConvKind::Depthwise,
            kernel: 3,
            stride: 2,
            padding: Padding::Same,
            inputs: 1,
            outputs: 1,
        };
        for (side, expected) in [(6, [210, 432, 54]), (5, [100, 321, 43])] {
            for (out, value) in expected.into_iter().enumerate() {
                let (taps, first) = conv.taps(out, side);
                let sum: usize =
                    taps.clone().map(|t| (first + t - taps.start) * 10_usize.pow(t as u32)).sum();
                assert_eq!(sum, value, "side {side}, output {out}");
            }
        }
    }

    #[test]
    fn convolutions_that_do_not_exist_are_refused() {
        let conv = |kind, kernel, stride, outputs| {
            let conv = Conv { kind, kernel, stride, padding: Padding::Same, inputs: 8, outputs };
            conv.output(Shape::new(1, 9, 9, 8))
        };
        assert_eq!(conv(ConvKind::Dense, 3, 2, 24).unwrap(), Shape::new(1, 5, 5, 24));
        assert_eq!(conv(ConvKind::Depthwise, 5, 1, 8).unwrap(), Shape::new(1, 9, 9, 8));
        assert_eq!(conv(ConvKind::Pointwise, 1, 1, 3).unwrap(), Shape::new(1, 9, 9, 3));
        for (kind, kernel, stride, outputs) in [
            (ConvKind::Dense, 4, 1, 8),
            (ConvKind::Dense, 3, 3, 8),
            (ConvKind::Depthwise, 7, 1, 8),
            (ConvKind::Depthwise, 3, 1, 16),
            (ConvKind::Pointwise, 1, 2, 8),
            (ConvKind::Pointwise, 3, 1, 8),
        ] {
            let message = conv(kind, kernel, stride, outputs).unwrap_err().to_string();
            assert!(message.contains("does not exist"), "{message}");
        }
    }

    #[test]
    fn padding_conventions_differ_only_on_even_sides() {
        for kernel in [3, 5] {
            let conv = |padding| Conv {
                kind: ConvKind::Depthwise,
                kernel,
                stride: 2,
                padding,
                inputs: 8,
                outputs: 8,
            };
            for side in 1..40 {
                let same = conv(Padding::Same).pad_before(side);
                let symmetric = conv(Padding::Symmetric).pad_before(side);
                if side >= kernel {
                    assert_eq!(same == symmetric, side % 2 == 1, "kernel {kernel}, side {side}");
                }
            }
        }
    }
}
