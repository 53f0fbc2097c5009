//! Measuring: one block as Fused-MBConv and as MBConv, whole networks with more and fewer fused stages, training steps,
//! and the single operations of a step.
//!
//! Everything is generic over [`Backend`] and over the [`Clock`] that times
//! it: the CPU reference by the machine's clock, a GPU by events on its stream. A figure is the median of several rounds
//! after a warm-up, with its spread; the [`Report`](record::Report) says what it was measured on, and the PyTorch peer
//! in `benches/peers` writes the same format.

#![forbid(unsafe_code)]

#[cfg(feature = "cuda")]
mod agreement;
pub mod blocks;
pub mod floor;
pub mod fusion;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "peers")]
pub mod libraries;
pub mod machine;
pub mod operations;
pub mod record;
pub mod step;
mod timed;
pub mod timing;
#[cfg(feature = "cuda")]
pub mod tune;

use crate::Result;
use crate::backend::{Backend, Variables};
use crate::model::initial_values;
use crate::nn::Layout;
use crate::reference::Reference;
use crate::tensor::{Real, Shape};
use machine::Machine;
use timing::{Clock, Effort, HostClock};

/// A backend that can be measured.
pub trait Measured: Backend<Element = f32> {
    /// Times its work.
    type Clock: Clock;

    /// Its clock.
    fn clock(&self) -> Self::Clock;

    /// What it computes on.
    fn machine(&self) -> Machine;

    /// Bytes of the last cache before memory, beyond which inputs are rotated; 0 where one input will do.
    fn cache(&self) -> usize;

    /// How training passes were run so far: "graph" when they were replayed, "plain" else.
    fn mode(&self) -> &'static str;

    /// Whether kernels are set up while the ones before them still run.
    fn overlaps(&self) -> bool;
}

impl Measured for Reference<f32> {
    type Clock = HostClock;

    fn clock(&self) -> HostClock {
        HostClock
    }

    fn machine(&self) -> Machine {
        Machine::cpu()
    }

    fn cache(&self) -> usize {
        0
    }

    fn mode(&self) -> &'static str {
        "plain"
    }

    fn overlaps(&self) -> bool {
        false
    }
}

/// What a measurement needs: what computes, what times it, and how long to take.
#[derive(Debug)]
pub struct Bench<'a, B, C> {
    /// What computes.
    pub backend: &'a mut B,
    /// What times it.
    pub clock: &'a C,
    /// How long to take.
    pub effort: Effort,
    /// Bytes of the last cache before memory, beyond which inputs are rotated; 0 where one input will do.
    pub cache: usize,
}

impl<B: Backend, C: Clock> Bench<'_, B, C> {
    /// The buffers of a network or block, with initial values.
    fn variables(&self, layout: &Layout) -> Result<Variables<B>> {
        let (params, stats) = initial_values::<B::Element>(layout, 0);
        let grads = vec![B::Element::default(); params.len()];
        Ok(Variables {
            params: self.backend.buffer(params)?,
            grads: self.backend.buffer(grads)?,
            stats: self.backend.buffer(stats)?,
        })
    }

    /// How many tensors of `shape` it takes that none is found in the cache when its turn comes again.
    fn rotation(&self, shape: Shape) -> usize {
        const MOST: usize = 8;
        // Two bytes are the least that an element takes.
        (3 * self.cache).div_ceil(2 * shape.elements().max(1)).clamp(1, MOST)
    }

    /// As many tensors of noise.
    fn inputs(&self, shape: Shape, seed: u32) -> Result<Vec<B::Activation>> {
        let tensor = |i| self.backend.tensor(shape, noise(shape.elements(), seed + i as u32));
        (0..self.rotation(shape)).map(tensor).collect()
    }
}

/// Values spread evenly over (−√3, √3), so of variance 1: never zeros, which some hardware multiplies faster.
fn noise<F: Real>(length: usize, seed: u32) -> Vec<F> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        F::of((f64::from(state) / f64::from(u32::MAX) * 2.0 - 1.0) * 3.0_f64.sqrt())
    };
    (0..length).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_has_variance_one_and_depends_on_its_seed() {
        let values = noise::<f64>(100_000, 3);
        let mean = values.iter().sum::<f64>() / 1e5;
        let variance = values.iter().map(|v| v * v).sum::<f64>() / 1e5;
        // Both deviate by less than 5 standard errors of 1e5 values: 5·1/√1e5, and 5·√0.8/√1e5.
        assert!(mean.abs() < 0.016 && (variance - 1.0).abs() < 0.015, "{mean} {variance}");
        assert_ne!(values, noise::<f64>(100_000, 4));
    }
}
