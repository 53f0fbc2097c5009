//! Whether two launches have computed the same, and what they are given.

use super::noise;
use crate::Result;
use crate::device::Device;
use crate::device::cudarc::driver::CudaSlice;
use crate::kernels::fused::FusedElement;
use crate::tensor::Dtype;

/// Elements after which random numbers repeat, a prime: memory does not look at what it moves.
const PATTERN: usize = 1_048_573;
/// Results are compared on this many elements at most.
const COMPARED: usize = 1 << 20;

/// A buffer of random numbers.
pub(super) fn random<T: FusedElement>(device: &Device, length: usize, seed: u32) -> Result<CudaSlice<T>> {
    let pattern: Vec<T> = noise::<f32>(length.min(PATTERN), seed).into_iter().map(T::narrow).collect();
    device.repeat(&pattern, length)
}

/// The elements of a buffer that are compared.
pub(super) fn values<T: FusedElement>(device: &Device, buffer: &CudaSlice<T>) -> Result<Vec<f32>> {
    let values = device.read(&buffer.slice(..buffer.len().min(COMPARED)))?;
    Ok(values.into_iter().map(T::wide).collect())
}

/// ‖a − b‖ / ‖b‖; infinite where one is not a number.
pub(super) fn difference(a: &[f32], b: &[f32]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (&a, &b) in a.iter().zip(b) {
        error += (f64::from(a) - f64::from(b)).powi(2);
        norm += f64::from(b).powi(2);
    }
    let ratio = (error / norm).sqrt();
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}

/// How far two correct results may lie apart: both are made of values rounded to the type, and the roundings of a sum of `terms`
/// in f32 are a random walk of as many steps.
pub(super) fn bound(dtype: Dtype, terms: usize) -> f64 {
    let unit = |bits: i32| 2.0_f64.powi(-bits);
    let rounding = match dtype {
        Dtype::F32 => unit(24),
        Dtype::Tf32 | Dtype::F16 => unit(11),
        Dtype::Bf16 => unit(8),
    };
    2.0 * rounding + 4.0 * unit(24) * (terms as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_relative() {
        assert_eq!(difference(&[1.0, 2.0], &[1.0, 2.0]), 0.0);
        assert!((difference(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        for wrong in [f32::NAN, f32::INFINITY] {
            assert_eq!(difference(&[wrong], &[1.0]), f64::INFINITY);
        }
        assert_eq!(difference(&[0.0], &[0.0]), f64::INFINITY, "nothing was written");
    }

    #[test]
    fn bounds_grow_with_the_type_and_the_sum() {
        assert!(bound(Dtype::F32, 1000) < 1e-5 && bound(Dtype::F32, 1) > f64::from(f32::EPSILON));
        assert!(bound(Dtype::F16, 1000) < bound(Dtype::Bf16, 1000));
        assert!((bound(Dtype::Bf16, 1) - 2.0 / 256.0).abs() < 1e-6);
    }
}
