//! How the reference cuts its work: pieces of an image over threads, and matrix products by rows.

use crate::tensor::{Real, Shape, Tensor};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;
use std::ops::Range;

/// The values a piece should hold: small enough for the second-level cache, large enough to be worth a task.
const PIECE: usize = 1 << 15;
/// Below this many multiply-adds a matrix product stays on one thread.
const SMALL_PRODUCT: usize = 1 << 18;
/// The width to which per-channel vectors are repeated, so that few channels still fill the vector registers.
const PERIOD: usize = 256;

/// Evaluates an expression compiled for the widest vector instructions this machine has. It is a macro because the
/// closure must be inlined into the dispatcher, and so must what it calls (`#[inline(always)]`): a function that stays
/// one of its own is compiled for the narrowest.
macro_rules! simd {
    ($body:expr) => {
        $crate::reference::parallel::widest(
            #[inline(always)]
            || $body,
        )
    };
}
pub(super) use simd;

/// What [`simd!`] calls.
#[inline(always)]
pub(super) fn widest<R>(f: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(f)
}

/// A run of whole pixels inside one image of a tensor.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// The image.
    pub image: usize,
    /// The elements.
    pub range: Range<usize>,
}

/// Cuts a tensor into pieces, by shape alone, in order.
pub(super) fn pieces(shape: Shape) -> Vec<Piece> {
    let image = shape.h * shape.w * shape.c;
    let step = (PIECE / shape.c).max(1) * shape.c;
    (0..shape.n)
        .flat_map(|n| {
            (0..image).step_by(step).map(move |start| Piece {
                image: n,
                range: n * image + start..n * image + (start + step).min(image),
            })
        })
        .collect()
}

/// Runs `f(piece, its part of out)` over all pieces on all threads; the results come in order.
pub(super) fn for_pieces<F: Send, R: Send>(
    shape: Shape,
    out: &mut [F],
    f: impl Fn(&Piece, &mut [F]) -> R + Sync,
) -> Vec<R> {
    let mut rest = out;
    let mut tasks = Vec::new();
    for piece in pieces(shape) {
        let (part, tail) = rest.split_at_mut(piece.range.len());
        rest = tail;
        tasks.push((piece, part));
    }
    tasks.into_par_iter().map(|(piece, part)| f(&piece, part)).collect()
}

/// A per-channel vector repeated to a period that fills the vector registers.
pub(super) fn repeat<F: Copy>(channel: &[F]) -> Vec<F> {
    channel.repeat(PERIOD.div_ceil(channel.len()))
}

/// The sums over the repeats of a vector made by [`repeat`]: one value a channel.
pub(super) fn fold<F: Real>(repeated: &[F], channels: usize) -> Vec<f64> {
    let mut sums = vec![0.0; channels];
    for period in repeated.chunks(channels) {
        for (sum, value) in sums.iter_mut().zip(period) {
            *sum += value.f64();
        }
    }
    sums
}

/// Adds `part` to `sum`, element by element.
#[inline(always)]
pub(super) fn accumulate<F: Real>(sum: &mut [F], part: &[F]) {
    for (s, &p) in sum.iter_mut().zip(part) {
        *s += p;
    }
}

/// Adds all of `parts` to `sum`, in order.
pub(super) fn accumulate_all<F: Real>(sum: &mut [F], parts: &[Vec<F>]) {
    sum.par_chunks_mut(PIECE).enumerate().for_each(|(i, sum)| {
        for part in parts {
            let part = &part[i * PIECE..][..sum.len()];
            simd!(accumulate(sum, part));
        }
    });
}

/// A·B.
pub(super) fn product<F: Real>(a: ArrayView2<'_, F>, b: ArrayView2<'_, F>) -> Array2<F> {
    let mut c = Array2::zeros((a.nrows(), b.ncols()));
    matmul(a, b, F::zero(), c.view_mut());
    c
}

/// C ← A·B + β·C, cut by rows or by columns of C, whichever are more.
pub(super) fn matmul<F: Real>(
    a: ArrayView2<'_, F>,
    b: ArrayView2<'_, F>,
    beta: F,
    mut c: ArrayViewMut2<'_, F>,
) {
    let (rows, columns) = c.dim();
    let threads = rayon::current_num_threads();
    if threads == 1 || rows * columns * a.ncols() < SMALL_PRODUCT {
        general_mat_mul(F::one(), &a, &b, beta, &mut c);
    } else if rows >= columns {
        let step = rows.div_ceil(threads);
        let parts: Vec<_> =
            c.axis_chunks_iter_mut(Axis(0), step).zip(a.axis_chunks_iter(Axis(0), step)).collect();
        parts.into_par_iter().for_each(|(mut c, a)| general_mat_mul(F::one(), &a, &b, beta, &mut c));
    } else {
        let step = columns.div_ceil(threads);
        let parts: Vec<_> =
            c.axis_chunks_iter_mut(Axis(1), step).zip(b.axis_chunks_iter(Axis(1), step)).collect();
        parts.into_par_iter().for_each(|(mut c, b)| general_mat_mul(F::one(), &a, &b, beta, &mut c));
    }
}

/// x += y.
pub(super) fn add<F: Real>(x: &mut Tensor<F>, y: &Tensor<F>) {
    for_pieces(y.shape(), x.data_mut(), |piece, part| {
        simd!(accumulate(part, &y.data()[piece.range.clone()]));
    });
}
