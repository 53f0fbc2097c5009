//! Gradients against finite differences.
//!
//! The central difference D(h) = (L(v + h·d) − L(v − h·d)) / 2h errs by h²/6·L‴; Richardson's (4·D(h) − D(2h)) / 3
//! errs by h⁴/30·4·L⁽⁵⁾. With h = 1e-4 and an L that bends over distances of ε^½ = 0.3 that is below 1e-9 of the
//! gradient. Rounding errs by 1.5·δ/h, where δ is the error of one L: a sum of terms of total magnitude M, each from
//! about a hundred rounded operations, so 100·2⁻⁵³·M.

use super::{Slot, uniform};

const STEP: f64 = 1e-4;
/// Of the derivative, or of what a direction of its kind has on average.
const RELATIVE: f64 = 1e-6;
const ROUNDINGS: f64 = 100.0;

/// A loss and the sum of the magnitudes of its terms.
#[derive(Clone, Copy, Debug)]
pub struct Loss {
    pub value: f64,
    pub magnitude: f64,
}

impl Loss {
    /// Σ probe·out: a loss whose gradient with respect to `out` is `probe`.
    pub fn probe(out: &[f64], probe: &[f64]) -> Self {
        assert_eq!(out.len(), probe.len());
        let terms = || out.iter().zip(probe).map(|(o, p)| o * p);
        Self { value: terms().sum(), magnitude: terms().map(f64::abs).sum() }
    }
}

/// Compares `gradient` with differences of `loss` at `values`: for every tensor of `slots` along a random direction and
/// three axes, and along a random direction through all of them.
pub fn assert_gradient(
    slots: &[Slot],
    values: &[f64],
    gradient: &[f64],
    seed: u64,
    loss: impl Fn(&[f64]) -> Loss,
) {
    assert_eq!(values.len(), gradient.len());
    let magnitude = loss(values).magnitude;
    let at = |direction: &[f64], step: f64| {
        loss(&values.iter().zip(direction).map(|(v, d)| v + step * d).collect::<Vec<_>>()).value
    };
    let central = |direction: &[f64], step: f64| (at(direction, step) - at(direction, -step)) / (2.0 * step);
    let check = |name: &str, range: std::ops::Range<usize>, part: &[f64]| {
        let length = part.iter().map(|d| d * d).sum::<f64>().sqrt();
        let mut direction = vec![0.0; values.len()];
        direction[range.clone()].iter_mut().zip(part).for_each(|(d, p)| *d = p / length);
        let found: f64 = direction.iter().zip(gradient).map(|(d, g)| d * g).sum();
        let expected = (4.0 * central(&direction, STEP) - central(&direction, 2.0 * STEP)) / 3.0;
        let mean_square = gradient[range.clone()].iter().map(|g| g * g).sum::<f64>() / range.len() as f64;
        let rounding = 1.5 * ROUNDINGS * f64::EPSILON / 2.0 * magnitude / STEP;
        let bound = RELATIVE * expected.abs().max(mean_square.sqrt()) + rounding;
        let off = (found - expected).abs();
        assert!(
            off <= bound,
            "{name}: derivative {found:e}, difference {expected:e}, off by {off:.1e} > {bound:.1e}"
        );
    };
    for (index, slot) in slots.iter().enumerate() {
        let len = slot.range.len();
        check(&slot.name, slot.range.clone(), &uniform(!seed, index as u32, len));
        for draw in uniform(!seed, 1000 + index as u32, 3) {
            let axis = ((draw + 1.0) / 2.0 * len as f64) as usize;
            let mut part = vec![0.0; len];
            part[axis] = 1.0;
            check(&format!("{}[{axis}]", slot.name), slot.range.clone(), &part);
        }
    }
    check("all tensors", 0..values.len(), &uniform(!seed, 2000, values.len()));
}
