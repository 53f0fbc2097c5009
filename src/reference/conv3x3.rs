//! Dense k×k convolution (3×3 in these networks) as a lowered matrix product, strip by strip.
//!
//! A strip is a few output rows of one image. Its *lowered* matrix L has a row for each output pixel: the k×k×C inputs
//! under the kernel, zeros outside the image. Then y = L·Wᵀ, dW += dyᵀ·L, and dx is the transpose of lowering
//! applied to dy·W. The weights are \[out, kh, kw, in\].

use super::parallel::{accumulate, accumulate_all, simd};
use crate::tensor::{Conv, Real, Shape, Tensor, matrix, matrix_mut};
use ndarray::linalg::general_mat_mul;
use rayon::prelude::*;
use std::ops::Range;

/// Output pixels in a strip, at least: enough to make packing the weights worth it.
const STRIP_PIXELS: usize = 512;
/// Images are dealt into this many groups, each with its own sum of weight gradients.
const GROUPS: usize = 16;

/// Lowered columns: inputs under the kernel.
const fn columns(conv: &Conv) -> usize {
    conv.kernel * conv.kernel * conv.inputs
}

/// The strips of one image: ranges of output rows.
fn strips(y: Shape) -> impl Iterator<Item = Range<usize>> {
    let rows = STRIP_PIXELS.div_ceil(y.w);
    (0..y.h).step_by(rows).map(move |first| first..(first + rows).min(y.h))
}

/// Visits the runs that input and lowered matrix share: `visit(offset in the image, offset in L, length)`.
#[inline(always)]
fn for_runs(conv: &Conv, x: Shape, y: Shape, rows: Range<usize>, mut visit: impl FnMut(usize, usize, usize)) {
    let (channels, columns) = (conv.inputs, columns(conv));
    for (strip_row, oh) in rows.enumerate() {
        let (taps_h, first_h) = conv.taps(oh, x.h);
        for ow in 0..y.w {
            let (taps_w, first_w) = conv.taps(ow, x.w);
            let pixel = (strip_row * y.w + ow) * columns;
            for (ih, kh) in (first_h..).zip(taps_h.clone()) {
                // Neighbouring taps are neighbours in both: one run.
                let source = (ih * x.w + first_w) * channels;
                let target = pixel + (kh * conv.kernel + taps_w.start) * channels;
                visit(source, target, taps_w.len() * channels);
            }
        }
    }
}

/// L for some output rows of one image.
fn lower<F: Real>(conv: &Conv, x: Shape, y: Shape, rows: Range<usize>, image: &[F], lowered: &mut Vec<F>) {
    lowered.clear();
    lowered.resize(rows.len() * y.w * columns(conv), F::zero());
    for_runs(conv, x, y, rows, |source, target, len| {
        lowered[target..target + len].copy_from_slice(&image[source..source + len]);
    });
}

/// The output; `y` is the shape [`Conv::output`] gives for `x`.
pub fn forward<F: Real>(conv: &Conv, x: &Tensor<F>, weight: &[F], y: Shape) -> Tensor<F> {
    let shape = x.shape();
    let (image_in, image_out) = (shape.h * shape.w * shape.c, y.h * y.w * y.c);
    let weight = matrix(weight, conv.outputs, columns(conv));
    let mut out = x.sibling(y);
    let mut tasks = Vec::new();
    for (image, target) in x.data().chunks(image_in).zip(out.data_mut().chunks_mut(image_out)) {
        let mut rest = target;
        for rows in strips(y) {
            let (part, tail) = rest.split_at_mut(rows.len() * y.w * y.c);
            rest = tail;
            tasks.push((image, rows, part));
        }
    }
    tasks.into_par_iter().for_each_init(Vec::new, |lowered, (image, rows, part)| {
        let pixels = rows.len() * y.w;
        lower(conv, shape, y, rows, image, lowered);
        let lowered = matrix(lowered, pixels, columns(conv));
        general_mat_mul(F::one(), &lowered, &weight.t(), F::zero(), &mut matrix_mut(part, pixels, y.c));
    });
    out
}

/// The gradient of the input, of shape `x`.
pub fn backward_input<F: Real>(conv: &Conv, dy: &Tensor<F>, weight: &[F], x: Shape) -> Tensor<F> {
    let y = dy.shape();
    let weight = matrix(weight, conv.outputs, columns(conv));
    let mut dx = dy.sibling(x);
    let images = dx.data_mut().par_chunks_mut(x.h * x.w * x.c).zip(dy.data().par_chunks(y.h * y.w * y.c));
    images.for_each_init(Vec::new, |lowered: &mut Vec<F>, (dx, dy)| {
        dx.fill(F::zero());
        for rows in strips(y) {
            let pixels = rows.len() * y.w;
            lowered.resize(pixels * columns(conv), F::zero());
            let part = &dy[rows.start * y.w * y.c..][..pixels * y.c];
            let target = &mut matrix_mut(lowered, pixels, columns(conv));
            general_mat_mul(F::one(), &matrix(part, pixels, y.c), &weight, F::zero(), target);
            simd!({
                for_runs(conv, x, y, rows, |source, target, len| {
                    accumulate(&mut dx[source..source + len], &lowered[target..target + len]);
                });
            });
        }
    });
    dx
}

/// Adds the gradient of the weights to `grad`.
pub fn backward_weight<F: Real>(conv: &Conv, x: &Tensor<F>, dy: &Tensor<F>, grad: &mut [F]) {
    let (shape, y) = (x.shape(), dy.shape());
    let (image_in, image_out) = (shape.h * shape.w * shape.c, y.h * y.w * y.c);
    let group = shape.n.div_ceil(GROUPS);
    let groups = x.data().par_chunks(group * image_in).zip(dy.data().par_chunks(group * image_out));
    let partial: Vec<Vec<F>> = groups
        .map(|(x, dy)| {
            let mut sum = vec![F::zero(); grad.len()];
            let mut lowered = Vec::new();
            for (image, dy) in x.chunks(image_in).zip(dy.chunks(image_out)) {
                for rows in strips(y) {
                    let pixels = rows.len() * y.w;
                    let part = matrix(&dy[rows.start * y.w * y.c..][..pixels * y.c], pixels, y.c);
                    lower(conv, shape, y, rows, image, &mut lowered);
                    let lowered = matrix(&lowered, pixels, columns(conv));
                    let target = &mut matrix_mut(&mut sum, y.c, columns(conv));
                    general_mat_mul(F::one(), &part.t(), &lowered, F::one(), target);
                }
            }
            sum
        })
        .collect();
    accumulate_all(grad, &partial);
}
