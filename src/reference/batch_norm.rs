//! Batch normalisation (Ioffe & Szegedy 2015) over an NHWC tensor, with what the blocks put around it.
//!
//! Forward: z = γ·(y − μ)·r + β with r = 1/√(σ² + ε), held as one scale and one shift a channel.
//! Backward: with x̂ = (y − μ)·r and n values a channel,
//!
//! ```text
//! dβ = Σ dz      dγ = Σ dz·x̂      dy = γ·r·(dz − dβ/n − x̂·dγ/n) = a·dz + b·y + c
//! ```
//!
//! so the gradient of y is affine in dz and y, channel by channel: [`Owed`] holds a, b and c.

use super::parallel::{Piece, fold, for_pieces, pieces, repeat, simd};
use crate::backend::{Activation, VarianceEstimator};
use crate::tensor::{Real, Shape, Tensor};
use rayon::prelude::*;

/// Mean and biased variance of each channel, in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Moments {
    /// Values a channel.
    pub count: usize,
    /// The mean.
    pub mean: Vec<f64>,
    /// The variance, divided by `count`.
    pub var: Vec<f64>,
}

/// A normalisation ready to apply: z = scale·y + shift.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm<F> {
    /// γ·r.
    pub scale: Vec<F>,
    /// β − γ·r·μ.
    pub shift: Vec<F>,
    /// μ.
    pub mean: Vec<F>,
    /// r = 1/√(σ² + ε).
    pub rstd: Vec<F>,
    /// Values a channel that μ and σ² were taken over.
    pub count: usize,
}

/// The gradient of a raw output, as coefficients: dy = a·(factor·g) + b·y + c, `factor` being one for each image.
#[derive(Clone, Debug, PartialEq)]
pub struct Owed<F> {
    /// γ·r.
    pub a: Vec<F>,
    /// −γ·r²·dγ/n.
    pub b: Vec<F>,
    /// −γ·r·dβ/n − b·μ.
    pub c: Vec<F>,
    /// The factors of stochastic depth, if any.
    pub factors: Option<Vec<F>>,
}

/// What else reaches the gradient of act(z) beside the tensor g: factor\[n\]·g, or g·gate\[n, c\] + pool\[n, c\].
#[derive(Clone, Copy, Debug)]
pub enum Arrival<'a, F> {
    /// g alone.
    Alone,
    /// One factor an image: stochastic depth.
    Factors(&'a [F]),
    /// Squeeze-excitation: the gate, and the gradient that came through the pool, both \[images, channels\].
    Gated(&'a [F], &'a [F]),
}

/// The moments of every channel: each piece of the tensor in two passes, merged in order by Chan's formula, so a mean
/// far larger than the deviation costs no digits.
pub fn moments<F: Real>(y: &Tensor<F>) -> Moments {
    let channels = y.shape().c;
    let parts: Vec<(usize, Vec<f64>, Vec<f64>)> = pieces(y.shape())
        .into_par_iter()
        .map(|piece| {
            let data = &y.data()[piece.range];
            let count = data.len() / channels;
            let sum = simd!(sums(data, channels));
            let mean: Vec<f64> = sum.iter().map(|s| s / count as f64).collect();
            let center: Vec<F> = mean.iter().map(|&m| F::of(m)).collect();
            let (offset, squares) = simd!(centred_sums(data, &center));
            // The centre was rounded to F: what is left of the mean corrects both.
            let rest = |c: usize| offset[c] / count as f64;
            let exact = (0..channels).map(|c| center[c].f64() + rest(c)).collect();
            let squares = (0..channels).map(|c| squares[c] - rest(c) * offset[c]).collect();
            (count, exact, squares)
        })
        .collect();
    let mut total = 0;
    let (mut mean, mut squares) = (vec![0.0; channels], vec![0.0; channels]);
    for (count, part_mean, part_squares) in parts {
        let share = count as f64 / (total + count) as f64;
        for c in 0..channels {
            let delta = part_mean[c] - mean[c];
            mean[c] += delta * share;
            squares[c] += part_squares[c] + delta * delta * share * total as f64;
        }
        total += count;
    }
    let var = squares.into_iter().map(|s| s / total as f64).collect();
    Moments { count: total, mean, var }
}

/// Σ over pixels, a channel each.
#[inline(always)]
fn sums<F: Real>(data: &[F], channels: usize) -> Vec<f64> {
    let mut sum = repeat(&vec![F::zero(); channels]);
    for run in data.chunks(sum.len()) {
        for (s, &v) in sum.iter_mut().zip(run) {
            *s += v;
        }
    }
    fold(&sum, channels)
}

/// Σ (v − centre) and Σ (v − centre)² over pixels, a channel each.
#[inline(always)]
fn centred_sums<F: Real>(data: &[F], center: &[F]) -> (Vec<f64>, Vec<f64>) {
    let centers = repeat(center);
    let (mut first, mut second) = (vec![F::zero(); centers.len()], vec![F::zero(); centers.len()]);
    for run in data.chunks(centers.len()) {
        for (((s, q), &v), &m) in first.iter_mut().zip(&mut second).zip(run).zip(&centers) {
            let d = v - m;
            *s += d;
            *q += d * d;
        }
    }
    (fold(&first, center.len()), fold(&second, center.len()))
}

impl<F: Real> Norm<F> {
    /// From the statistics of a batch, or the running ones.
    pub fn new(gamma: &[F], beta: &[F], moments: &Moments, epsilon: f64) -> Self {
        let rstd: Vec<f64> = moments.var.iter().map(|v| 1.0 / (v + epsilon).sqrt()).collect();
        let scale: Vec<f64> = gamma.iter().zip(&rstd).map(|(g, r)| g.f64() * r).collect();
        let shift = beta.iter().zip(&scale).zip(&moments.mean).map(|((b, s), m)| F::of(b.f64() - s * m));
        Self {
            shift: shift.collect(),
            scale: scale.iter().map(|&s| F::of(s)).collect(),
            mean: moments.mean.iter().map(|&m| F::of(m)).collect(),
            rstd: rstd.iter().map(|&r| F::of(r)).collect(),
            count: moments.count,
        }
    }
}

/// Moves a running statistic: running ← (1 − momentum)·running + momentum·batch.
pub fn update_running<F: Real>(
    mean: &mut [F],
    var: &mut [F],
    moments: &Moments,
    momentum: f64,
    estimator: VarianceEstimator,
) {
    let correction = match estimator {
        VarianceEstimator::Unbiased => moments.count as f64 / (moments.count as f64 - 1.0),
        VarianceEstimator::Biased => 1.0,
    };
    let blend = |old: &mut F, new: f64| *old = F::of((1.0 - momentum) * old.f64() + momentum * new);
    mean.iter_mut().zip(&moments.mean).for_each(|(old, &new)| blend(old, new));
    var.iter_mut().zip(&moments.var).for_each(|(old, &new)| blend(old, new * correction));
}

/// The values at `[image, channel]` of a small matrix, one image's row.
fn row<F>(matrix: &[F], image: usize, channels: usize) -> &[F] {
    &matrix[image * channels..][..channels]
}

/// act(norm(y))·gate.
pub fn apply<F: Real>(y: &Tensor<F>, norm: &Norm<F>, act: Activation, gate: Option<&[F]>) -> Tensor<F> {
    let shape = y.shape();
    let (scale, shift) = (repeat(&norm.scale), repeat(&norm.shift));
    let mut out = y.sibling(shape);
    for_pieces(shape, out.data_mut(), |piece, out| {
        let y = &y.data()[piece.range.clone()];
        let gate = gate.map(|g| repeat(row(g, piece.image, shape.c)));
        simd!({
            for (y, out) in y.chunks(scale.len()).zip(out.chunks_mut(scale.len())) {
                let normalised = y.iter().zip(&scale).zip(&shift).map(|((&y, &a), &b)| a * y + b);
                match (act, &gate) {
                    (Activation::Identity, _) => out.iter_mut().zip(normalised).for_each(|(o, z)| *o = z),
                    (Activation::Silu, None) => {
                        out.iter_mut().zip(normalised).for_each(|(o, z)| *o = z.silu());
                    }
                    (Activation::Silu, Some(gate)) => {
                        out.iter_mut().zip(normalised).zip(gate).for_each(|((o, z), &g)| *o = z.silu() * g);
                    }
                }
            }
        });
    });
    out
}

/// A block's output: factor\[n\]·act(norm(y)) + skip.
pub fn merge<F: Real>(
    y: &Tensor<F>,
    norm: &Norm<F>,
    act: Activation,
    skip: Option<&Tensor<F>>,
    factors: Option<&[F]>,
) -> Tensor<F> {
    let mut out = apply(y, norm, act, None);
    if skip.is_none() && factors.is_none() {
        return out;
    }
    for_pieces(y.shape(), out.data_mut(), |piece, out| {
        let factor = factors.map_or(F::one(), |f| f[piece.image]);
        match skip {
            Some(skip) => simd!({
                for (o, &s) in out.iter_mut().zip(&skip.data()[piece.range.clone()]) {
                    *o = factor * *o + s;
                }
            }),
            None => out.iter_mut().for_each(|o| *o = factor * *o),
        }
    });
    out
}

/// The gradient of z = norm(y) where g is that of act(z), written over g, with dβ and dγ. [`Activation::Identity`]
/// leaves g as it is: the factors then stay owed.
pub fn backward<F: Real>(
    grad: &mut Tensor<F>,
    y: &Tensor<F>,
    norm: &Norm<F>,
    arrival: Arrival<'_, F>,
) -> (Vec<f64>, Vec<f64>) {
    let shape = y.shape();
    let pass = Pass::new(norm);
    let parts = for_pieces(shape, grad.data_mut(), |piece, grad| {
        let y = &y.data()[piece.range.clone()];
        simd!(pass.silu(piece, y, grad, arrival))
    });
    total(parts, shape)
}

/// dβ and dγ where factor\[n\]·g is the gradient of z itself.
pub fn backward_identity<F: Real>(
    grad: &Tensor<F>,
    y: &Tensor<F>,
    norm: &Norm<F>,
    factors: Option<&[F]>,
) -> (Vec<f64>, Vec<f64>) {
    let shape = y.shape();
    let pass = Pass::new(norm);
    let parts = pieces(shape).into_par_iter().map(|piece| {
        let (y, grad) = (&y.data()[piece.range.clone()], &grad.data()[piece.range.clone()]);
        let factor = factors.map_or(F::one(), |f| f[piece.image]);
        simd!(pass.identity(y, grad, factor))
    });
    total(parts.collect(), shape)
}

/// Per-channel vectors of a backward pass, repeated.
struct Pass<F> {
    channels: usize,
    scale: Vec<F>,
    shift: Vec<F>,
    mean: Vec<F>,
    rstd: Vec<F>,
}

impl<F: Real> Pass<F> {
    fn new(norm: &Norm<F>) -> Self {
        let [scale, shift, mean, rstd] =
            [&norm.scale, &norm.shift, &norm.mean, &norm.rstd].map(|v| repeat(v));
        Self { channels: norm.mean.len(), scale, shift, mean, rstd }
    }

    #[inline(always)]
    fn silu(&self, piece: &Piece, y: &[F], grad: &mut [F], arrival: Arrival<'_, F>) -> [Vec<f64>; 2] {
        let period = self.scale.len();
        let (mut first, mut second) = (vec![F::zero(); period], vec![F::zero(); period]);
        let factors = match arrival {
            Arrival::Alone => vec![F::one(); period],
            Arrival::Factors(factors) => vec![factors[piece.image]; period],
            Arrival::Gated(gate, _) => repeat(row(gate, piece.image, self.channels)),
        };
        let offsets = match arrival {
            Arrival::Gated(_, pool) => repeat(row(pool, piece.image, self.channels)),
            _ => vec![F::zero(); period],
        };
        for (y, grad) in y.chunks(period).zip(grad.chunks_mut(period)) {
            let n = y.len();
            let (scale, shift, mean, rstd) =
                (&self.scale[..n], &self.shift[..n], &self.mean[..n], &self.rstd[..n]);
            let (factors, offsets) = (&factors[..n], &offsets[..n]);
            let (first, second, grad) = (&mut first[..n], &mut second[..n], &mut grad[..n]);
            for i in 0..n {
                let dz = (factors[i] * grad[i] + offsets[i]) * (scale[i] * y[i] + shift[i]).silu_grad();
                grad[i] = dz;
                first[i] += dz;
                second[i] += dz * ((y[i] - mean[i]) * rstd[i]);
            }
        }
        [fold(&first, self.channels), fold(&second, self.channels)]
    }

    #[inline(always)]
    fn identity(&self, y: &[F], grad: &[F], factor: F) -> [Vec<f64>; 2] {
        let period = self.scale.len();
        let (mut first, mut second) = (vec![F::zero(); period], vec![F::zero(); period]);
        for (y, grad) in y.chunks(period).zip(grad.chunks(period)) {
            let n = y.len();
            let (mean, rstd, grad) = (&self.mean[..n], &self.rstd[..n], &grad[..n]);
            let (first, second) = (&mut first[..n], &mut second[..n]);
            for i in 0..n {
                let dz = factor * grad[i];
                first[i] += dz;
                second[i] += dz * ((y[i] - mean[i]) * rstd[i]);
            }
        }
        [fold(&first, self.channels), fold(&second, self.channels)]
    }
}

/// The sums over all pieces, in order.
fn total(parts: Vec<[Vec<f64>; 2]>, shape: Shape) -> (Vec<f64>, Vec<f64>) {
    let (mut beta, mut gamma) = (vec![0.0; shape.c], vec![0.0; shape.c]);
    for [first, second] in parts {
        super::parallel::accumulate(&mut beta, &first);
        super::parallel::accumulate(&mut gamma, &second);
    }
    (beta, gamma)
}

impl<F: Real> Owed<F> {
    /// The coefficients for the sums dβ and dγ of a batch.
    pub fn new(norm: &Norm<F>, dbeta: &[f64], dgamma: &[f64], factors: Option<Vec<F>>) -> Self {
        let n = norm.count as f64;
        let (mut b, mut c) = (Vec::with_capacity(dbeta.len()), Vec::with_capacity(dbeta.len()));
        for channel in 0..dbeta.len() {
            let scale = norm.scale[channel].f64();
            let slope = -scale * norm.rstd[channel].f64() * dgamma[channel] / n;
            b.push(F::of(slope));
            c.push(F::of(-scale * dbeta[channel] / n - slope * norm.mean[channel].f64()));
        }
        Self { a: norm.scale.clone(), b, c, factors }
    }

    /// dy = a·(factor·g) + b·y + c.
    pub fn pay(&self, grad: &Tensor<F>, y: &Tensor<F>) -> Tensor<F> {
        let shape = y.shape();
        let (b, c) = (repeat(&self.b), repeat(&self.c));
        let a = repeat(&self.a);
        let mut out = y.sibling(shape);
        for_pieces(shape, out.data_mut(), |piece, out| {
            let (grad, y) = (&grad.data()[piece.range.clone()], &y.data()[piece.range.clone()]);
            let factor = self.factors.as_ref().map_or(F::one(), |f| f[piece.image]);
            simd!({
                for ((out, grad), y) in
                    out.chunks_mut(a.len()).zip(grad.chunks(a.len())).zip(y.chunks(a.len()))
                {
                    let n = out.len();
                    let (grad, y, a, b, c) = (&grad[..n], &y[..n], &a[..n], &b[..n], &c[..n]);
                    for i in 0..n {
                        out[i] = a[i] * (factor * grad[i]) + b[i] * y[i] + c[i];
                    }
                }
            });
        });
        out
    }
}
