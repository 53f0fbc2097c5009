//! Squeeze-excitation (Hu et al. 2018): s = σ(W₂·SiLU(W₁·p + b₁) + b₂), where p is the mean of x over its pixels.

use super::parallel::{accumulate, fold, for_pieces, pieces, repeat, simd};
use crate::backend::SqueezeExcite;
use crate::tensor::{Real, Tensor, matrix, matrix_mut};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, Axis};
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

/// Σ over the pixels of each image of x·weight, \[images, channels\]; `weight` 1 where there is none.
pub fn sum_pixels<F: Real>(x: &Tensor<F>, weight: Option<&Tensor<F>>) -> Array2<F> {
    let shape = x.shape();
    let parts: Vec<(usize, Vec<f64>)> = pieces(shape)
        .into_par_iter()
        .map(|piece| {
            let data = &x.data()[piece.range.clone()];
            let weight = weight.map(|w| &w.data()[piece.range.clone()]);
            let sums = simd(|| {
                let mut sum = repeat(&vec![F::zero(); shape.c]);
                let period = sum.len();
                match weight {
                    None => data.chunks(period).for_each(|run| accumulate(&mut sum, run)),
                    Some(weight) => {
                        for (run, weight) in data.chunks(period).zip(weight.chunks(period)) {
                            for ((s, &v), &w) in sum.iter_mut().zip(run).zip(weight) {
                                *s += v * w;
                            }
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

/// A·B in standard layout, which `dot` does not promise: with one reduced channel it answers column by column.
fn product<F: Real>(a: &Array2<F>, b: ArrayView2<'_, F>) -> Array2<F> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    general_mat_mul(F::one(), a, &b, F::zero(), &mut c);
    c
}

/// The gate for x = SiLU(norm(y)); `params` is the flat parameter buffer.
pub fn forward<F: Real>(layer: &SqueezeExcite, x: &Tensor<F>, params: &[F]) -> Gate<F> {
    let (channels, reduced) = (layer.channels, layer.reduced);
    let scale = F::one() / F::of((x.shape().h * x.shape().w) as f64);
    let pooled = sum_pixels(x, None) * scale;
    let reduce = matrix(&params[layer.reduce_weight.clone()], reduced, channels);
    let expand = matrix(&params[layer.expand_weight.clone()], channels, reduced);
    let bias = |range: &std::ops::Range<usize>| ndarray::ArrayView1::from(&params[range.clone()]);
    let hidden = product(&pooled, reduce.t()) + bias(&layer.reduce_bias);
    let gate = (product(&hidden.mapv(F::silu), expand.t()) + bias(&layer.expand_bias)).mapv(F::sigmoid);
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
    let dhidden = product(&dlogit, expand) * state.hidden.mapv(F::silu_grad);
    let mut weight = |range: &std::ops::Range<usize>, dy: &Array2<F>, x: &Array2<F>| {
        let mut grad = matrix_mut(&mut grads[range.clone()], dy.ncols(), x.ncols());
        general_mat_mul(F::one(), &dy.t(), x, F::one(), &mut grad);
    };
    weight(&layer.expand_weight, &dlogit, &state.hidden.mapv(F::silu));
    weight(&layer.reduce_weight, &dhidden, &state.pooled);
    for (range, dy) in [(&layer.expand_bias, &dlogit), (&layer.reduce_bias, &dhidden)] {
        let sums = dy.sum_axis(Axis(0));
        grads[range.clone()].iter_mut().zip(sums).for_each(|(g, s)| *g += s);
    }
    product(&dhidden, reduce) * (F::one() / F::of(pixels as f64))
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
