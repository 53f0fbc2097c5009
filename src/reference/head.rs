//! The head: dropout on the pooled features, the classifier, and softmax cross entropy with soft targets.

use super::parallel::{matmul, product};
use crate::backend::{Classifier, StepKey};
use crate::random::{Purpose, Stream};
use crate::tensor::{Real, matrix, matrix_mut};
use ndarray::{Array2, ArrayView1, Axis, Zip};

/// The factors of inverted dropout, \[images, features\]: 0 with probability `rate`, else 1 / (1 − rate).
pub fn dropout_factors<F: Real>(key: &StepKey, rate: f64, features: usize) -> Array2<F> {
    let keep = F::of(1.0 / (1.0 - rate));
    let mut factors = Array2::zeros((key.images.len(), features));
    for (mut row, &image) in factors.rows_mut().into_iter().zip(&key.images) {
        let mut stream = Stream::new(key.seed, key.epoch, image, Purpose::Dropout);
        row.iter_mut().for_each(|f| *f = if f64::from(stream.uniform()) < rate { F::zero() } else { keep });
    }
    factors
}

/// logits\[n, k\] = W\[k, ·\]·features\[n, ·\] + b\[k\]; `params` is the flat parameter buffer.
pub fn classify<F: Real>(layer: &Classifier, features: &Array2<F>, params: &[F]) -> Array2<F> {
    let weight = matrix(&params[layer.weight.clone()], layer.classes, layer.features);
    product(features.view(), weight.t()) + ArrayView1::from(&params[layer.bias.clone()])
}

/// The gradient of the features; adds those of W and b to `grads`.
pub fn classify_backward<F: Real>(
    layer: &Classifier,
    features: &Array2<F>,
    dlogits: &Array2<F>,
    params: &[F],
    grads: &mut [F],
) -> Array2<F> {
    let weight = matrix(&params[layer.weight.clone()], layer.classes, layer.features);
    let grad = matrix_mut(&mut grads[layer.weight.clone()], layer.classes, layer.features);
    matmul(dlogits.t(), features.view(), F::one(), grad);
    let sums = dlogits.sum_axis(Axis(0));
    grads[layer.bias.clone()].iter_mut().zip(sums).for_each(|(g, s)| *g += s);
    product(dlogits.view(), weight)
}

/// softmax over the classes, \[images, classes\].
pub fn softmax<F: Real>(logits: &Array2<F>) -> Array2<F> {
    let mut p = logits.clone();
    for mut row in p.rows_mut() {
        let top = row.fold(F::neg_infinity(), |a, &b| a.max(b));
        row.mapv_inplace(|l| (l - top).exp());
        let sum = row.sum();
        row.mapv_inplace(|e| e / sum);
    }
    p
}

/// Mean over the images of −Σ t·log p, and its gradient (p·Σt − t) / images. The targets of an image sum to one.
pub fn cross_entropy<F: Real>(logits: &Array2<F>, targets: &Array2<F>) -> (f64, Array2<F>) {
    let images = logits.nrows() as f64;
    let mut grad = softmax(logits);
    let mut loss = 0.0;
    for ((logits, targets), mut p) in logits.rows().into_iter().zip(targets.rows()).zip(grad.rows_mut()) {
        let top = logits.fold(F::neg_infinity(), |a, &b| a.max(b)).f64();
        let log_sum = top + logits.iter().map(|l| (l.f64() - top).exp()).sum::<f64>().ln();
        loss += logits.iter().zip(targets).map(|(l, t)| t.f64() * (log_sum - l.f64())).sum::<f64>();
        let mass = targets.sum();
        Zip::from(&mut p).and(targets).for_each(|p, &t| *p = (*p * mass - t) / F::of(images));
    }
    (loss / images, grad)
}
