//! 1×1 convolution: one matrix product over channels. y = x·Wᵀ, dx = dy·W, dW += dyᵀ·x.

use super::parallel::matmul;
use crate::tensor::{Real, Tensor, matrix, matrix_mut};

/// y\[pixel, o\] = Σᵢ x\[pixel, i\]·W\[o, i\]; `weight` is \[outputs, inputs\].
pub fn forward<F: Real>(x: &Tensor<F>, weight: &[F], outputs: usize) -> Tensor<F> {
    let mut y = x.sibling(x.shape().with_channels(outputs));
    matmul(x.matrix(), matrix(weight, outputs, x.shape().c).t(), F::zero(), y.matrix_mut());
    y
}

/// dx\[pixel, i\] = Σₒ dy\[pixel, o\]·W\[o, i\].
pub fn backward_input<F: Real>(dy: &Tensor<F>, weight: &[F], inputs: usize) -> Tensor<F> {
    let mut dx = dy.sibling(dy.shape().with_channels(inputs));
    matmul(dy.matrix(), matrix(weight, dy.shape().c, inputs), F::zero(), dx.matrix_mut());
    dx
}

/// dW\[o, i\] += Σ over pixels of dy\[pixel, o\]·x\[pixel, i\].
pub fn backward_weight<F: Real>(x: &Tensor<F>, dy: &Tensor<F>, grad: &mut [F]) {
    let grad = matrix_mut(grad, dy.shape().c, x.shape().c);
    matmul(dy.matrix().t(), x.matrix(), F::one(), grad);
}
