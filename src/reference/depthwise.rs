//! Depthwise k×k convolution: one filter a channel, vectorised over channels. The weights are \[kh, kw, channel\].
//!
//! Each direction is a loop over rows of what it writes; inside, 16 channels at a time stay in registers while the
//! kernel slides along the row.

use super::parallel::{accumulate, accumulate_all, simd};
use crate::tensor::{Conv, Real, Shape, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Channels held in registers at a time.
const LANES: usize = 16;
/// The taps of the largest kernel.
const MAX_TAPS: usize = 25;

/// The pairs (position on the other side, tap) that one position of an axis meets.
type Meets = Vec<(usize, usize)>;

/// For every output of an axis: the inputs it reads.
fn reads(conv: &Conv, side: usize) -> Vec<Meets> {
    let meets = |out| {
        let (taps, first) = conv.taps(out, side);
        (first..).zip(taps).collect()
    };
    (0..conv.output_side(side)).map(meets).collect()
}

/// For every input of an axis: the outputs that read it.
fn readers(conv: &Conv, side: usize) -> Vec<Meets> {
    let mut readers = vec![Meets::new(); side];
    for (out, meets) in reads(conv, side).into_iter().enumerate() {
        for (input, tap) in meets {
            readers[input].push((out, tap));
        }
    }
    readers
}

/// `N` neighbouring channels at an offset.
#[inline(always)]
fn load<F: Real, const N: usize>(data: &[F], offset: usize) -> [F; N] {
    let mut lanes = [F::zero(); N];
    lanes.copy_from_slice(&data[offset..offset + N]);
    lanes
}

/// a + b·c in every lane.
#[inline(always)]
fn multiply_add<F: Real, const N: usize>(a: &mut [F; N], b: &[F; N], c: &[F; N]) {
    for lane in 0..N {
        a[lane] += b[lane] * c[lane];
    }
}

/// One row of what a direction writes, for some channels: at each column the sum over all it meets of filter × value.
#[inline(always)]
fn filter_row<F: Real, const N: usize>(
    channels: Range<usize>,
    (kernel, width, stride): (usize, usize, usize),
    (rows, columns): (&Meets, &[Meets]),
    (image, weight): (&[F], &[F]),
    out: &mut [F],
) {
    for first in channels.step_by(N) {
        let mut filters = [[F::zero(); N]; MAX_TAPS];
        for (tap, lanes) in filters[..kernel * kernel].iter_mut().enumerate() {
            *lanes = load(weight, tap * stride + first);
        }
        for (out, columns) in out.chunks_mut(stride).zip(columns) {
            let mut sum = [F::zero(); N];
            for &(row, kh) in rows {
                for &(column, kw) in columns {
                    let lanes = load(image, (row * width + column) * stride + first);
                    multiply_add(&mut sum, &filters[kh * kernel + kw], &lanes);
                }
            }
            out[first..first + N].copy_from_slice(&sum);
        }
    }
}

/// All rows of the tensor `out`, whose positions meet those of `source` as told.
fn filter<F: Real>(
    conv: &Conv,
    source: &Tensor<F>,
    weight: &[F],
    out: Shape,
    meets: [Vec<Meets>; 2],
) -> Tensor<F> {
    let shape = source.shape();
    let image = shape.h * shape.w * shape.c;
    let whole = out.c / LANES * LANES;
    let geometry = (conv.kernel, shape.w, shape.c);
    let [rows, columns] = meets;
    let mut result = source.sibling(out);
    result.data_mut().par_chunks_mut(out.w * out.c).enumerate().for_each(|(row, target)| {
        let meets = (&rows[row % out.h], &columns[..]);
        let data = (&source.data()[row / out.h * image..][..image], weight);
        simd!({
            filter_row::<F, LANES>(0..whole, geometry, meets, data, target);
            filter_row::<F, 1>(whole..out.c, geometry, meets, data, target);
        });
    });
    result
}

/// The output; `y` is the shape [`Conv::output`] gives for `x`.
pub fn forward<F: Real>(conv: &Conv, x: &Tensor<F>, weight: &[F], y: Shape) -> Tensor<F> {
    filter(conv, x, weight, y, [reads(conv, x.shape().h), reads(conv, x.shape().w)])
}

/// The gradient of the input, of shape `x`.
pub fn backward_input<F: Real>(conv: &Conv, dy: &Tensor<F>, weight: &[F], x: Shape) -> Tensor<F> {
    filter(conv, dy, weight, x, [readers(conv, x.h), readers(conv, x.w)])
}

/// Adds one output row's part of the weight gradient of some channels.
#[inline(always)]
fn weight_row<F: Real, const N: usize>(
    channels: Range<usize>,
    (kernel, width, stride): (usize, usize, usize),
    (rows, columns): (&Meets, &[Meets]),
    (image, dy): (&[F], &[F]),
    grad: &mut [F],
) {
    for first in channels.step_by(N) {
        let mut sums = [[F::zero(); N]; MAX_TAPS];
        for (dy, columns) in dy.chunks(stride).zip(columns) {
            let dy = load(dy, first);
            for &(row, kh) in rows {
                for &(column, kw) in columns {
                    let lanes = load(image, (row * width + column) * stride + first);
                    multiply_add(&mut sums[kh * kernel + kw], &dy, &lanes);
                }
            }
        }
        for (tap, sum) in sums[..kernel * kernel].iter().enumerate() {
            accumulate(&mut grad[tap * stride + first..][..N], sum);
        }
    }
}

/// Adds the gradient of the weights to `grad`: one partial sum an image, added in order.
pub fn backward_weight<F: Real>(conv: &Conv, x: &Tensor<F>, dy: &Tensor<F>, grad: &mut [F]) {
    let (shape, y) = (x.shape(), dy.shape());
    let whole = shape.c / LANES * LANES;
    let geometry = (conv.kernel, shape.w, shape.c);
    let (rows, columns) = (reads(conv, shape.h), reads(conv, shape.w));
    let images = x.data().par_chunks(shape.h * shape.w * shape.c).zip(dy.data().par_chunks(y.h * y.w * y.c));
    let partial: Vec<Vec<F>> = images
        .map(|(image, dy)| {
            let mut sum = vec![F::zero(); grad.len()];
            for (dy, rows) in dy.chunks(y.w * y.c).zip(&rows) {
                simd!({
                    weight_row::<F, LANES>(0..whole, geometry, (rows, &columns), (image, dy), &mut sum);
                    weight_row::<F, 1>(whole..shape.c, geometry, (rows, &columns), (image, dy), &mut sum);
                });
            }
            sum
        })
        .collect();
    accumulate_all(grad, &partial);
}
