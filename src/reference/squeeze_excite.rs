//! Squeeze-excitation (Hu et al. 2018): s = σ(W₂·SiLU(W₁·p + b₁) + b₂), where p is the mean of x over its pixels.

use super::batch_norm::Norm;
use super::parallel::{fold, for_pieces, matmul, pieces, product, repeat, simd};
use crate::backend::SqueezeExcite;
use crate::tensor::{Real, Tensor, matrix, matrix_mut};
use ndarray::{Array2, Axis};
use rayon::prelude::*;

/// Everything the forward pass knows of a gate; matrices have a row for each image.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate<F> {
    /// p, \[images, channels\].
    pub pooled: Array2<F>,
    /// W₁·p + b₁, \[images, reduced\].
    pub hidden: Array2<F>,
    /// s, \[images, channels\].
    pub gate: Array2<F>,
}

/// Σ over the pixels of each image of SiLU(norm(y))·weight, \[images, channels\]; `weight` 1 where there is none.
pub fn sum_pixels<F: Real>(y: &Tensor<F>, norm: &Norm<F>, weight: Option<&Tensor<F>>) -> Array2<F> {
    let shape = y.shape();
    let (scale, shift) = (repeat(&norm.scale), repeat(&norm.shift));
    let period = scale.len();
    let parts: Vec<(usize, Vec<f64>)> = pieces(shape)
        .into_par_iter()
        .map(|piece| {
            let y = &y.data()[piece.range.clone()];
            let weight = weight.map(|w| &w.data()[piece.range]);
            let sums = simd!({
                let mut sum = vec![F::zero(); period];
                for (i, y) in y.chunks(period).enumerate() {
                    let x = y.iter().zip(&scale).zip(&shift).map(|((&y, &a), &b)| (a * y + b).silu());
                    match weight {
                        None => sum.iter_mut().zip(x).for_each(|(s, x)| *s += x),
                        Some(w) => {
                            sum.iter_mut().zip(x).zip(&w[i * period..]).for_each(|((s, x), &w)| *s += x * w);
                        }
                    }
                }
                fold(&sum, shape.c)
            });
            (piece.image, sums)
        })
        .collect();
    let mut total = Array2::<f64>::zeros((shape.n, shape.c));
    for (image, sums) in parts {
        total.row_mut(image).iter_mut().zip(sums).for_each(|(t, s)| *t += s);
    }
    total.mapv(F::of)
}

/// The gate for x = SiLU(norm(y)); `params` is the flat parameter buffer.
pub fn forward<F: Real>(layer: &SqueezeExcite, y: &Tensor<F>, norm: &Norm<F>, params: &[F]) -> Gate<F> {
    let (channels, reduced) = (layer.channels, layer.reduced);
    let scale = F::one() / F::of((y.shape().h * y.shape().w) as f64);
    let pooled = sum_pixels(y, norm, None) * scale;
    let reduce = matrix(&params[layer.reduce_weight.clone()], reduced, channels);
    let expand = matrix(&params[layer.expand_weight.clone()], channels, reduced);
    let bias = |range: &std::ops::Range<usize>| ndarray::ArrayView1::from(&params[range.clone()]);
    let hidden = product(pooled.view(), reduce.t()) + bias(&layer.reduce_bias);
    let gate = (product(hidden.mapv(F::silu).view(), expand.t()) + bias(&layer.expand_bias)).mapv(F::sigmoid);
    Gate { pooled, hidden, gate }
}

/// From d(x·s) to what x still receives through the pool, dp / pixels \[images, channels\]; adds the gradients of the
/// layers' weights to `grads`. `dgate` is Σ over pixels of d(x·s)·x.
pub fn backward<F: Real>(
    layer: &SqueezeExcite,
    state: &Gate<F>,
    dgate: &Array2<F>,
    pixels: usize,
    params: &[F],
    grads: &mut [F],
) -> Array2<F> {
    let (channels, reduced) = (layer.channels, layer.reduced);
    let reduce = matrix(&params[layer.reduce_weight.clone()], reduced, channels);
    let expand = matrix(&params[layer.expand_weight.clone()], channels, reduced);
    let dlogit = dgate * &state.gate.mapv(|s| s * (F::one() - s));
    let dhidden = product(dlogit.view(), expand) * state.hidden.mapv(F::silu_grad);
    let mut weight = |range: &std::ops::Range<usize>, dy: &Array2<F>, x: &Array2<F>| {
        let grad = matrix_mut(&mut grads[range.clone()], dy.ncols(), x.ncols());
        matmul(dy.t(), x.view(), F::one(), grad);
    };
    weight(&layer.expand_weight, &dlogit, &state.hidden.mapv(F::silu));
    weight(&layer.reduce_weight, &dhidden, &state.pooled);
    for (range, dy) in [(&layer.expand_bias, &dlogit), (&layer.reduce_bias, &dhidden)] {
        let sums = dy.sum_axis(Axis(0));
        grads[range.clone()].iter_mut().zip(sums).for_each(|(g, s)| *g += s);
    }
    product(dhidden.view(), reduce) * (F::one() / F::of(pixels as f64))
}

/// One value per image and channel, spread over the pixels of `out`.
pub fn spread<F: Real>(values: &Array2<F>, out: &mut Tensor<F>) {
    let shape = out.shape();
    for_pieces(shape, out.data_mut(), |piece, out| {
        let row = values.row(piece.image);
        for pixel in out.chunks_mut(shape.c) {
            pixel.iter_mut().zip(row).for_each(|(o, &v)| *o = v);
        }
    });
}
