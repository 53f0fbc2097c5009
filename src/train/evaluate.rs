//! Evaluation of a set of weights on a dataset.

use crate::Result;
use crate::backend::{Backend, Normalisation, Variables};
use crate::data::Loader;
use crate::nn::Network;
use crate::report::confusion::ConfusionMatrix;
use crate::tensor::Real;
use serde::{Deserialize, Deserializer, Serialize};

/// How well a set of weights does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Images looked at.
    pub images: u64,
    /// Mean cross entropy, without label smoothing. NaN when the weights have diverged; JSON writes that as null.
    #[serde(deserialize_with = "number_or_nan")]
    pub loss: f64,
    /// Share of images whose class has the largest logit.
    pub top1: f64,
    /// Share of images whose class is among the five largest.
    pub top5: f64,
}

/// JSON has no word for what is not a number: null.
pub(super) fn number_or_nan<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// The classes of one image's logits, best first; equal ones in order of their number.
pub fn ranking<F: Real>(logits: &[F]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].f64().total_cmp(&logits[a].f64()));
    order
}

/// The probabilities of one image's logits: softmax, in f64.
pub fn softmax<F: Real>(logits: &[F]) -> Vec<f64> {
    let top = logits.iter().map(|l| l.f64()).fold(f64::NEG_INFINITY, f64::max);
    let powers: Vec<f64> = logits.iter().map(|l| (l.f64() - top).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.into_iter().map(|p| p / sum).collect()
}

/// Scores and confusion matrix over every image of `loader`; `on_batch` hears the number of images in each batch done, and
/// may end it with an error.
///
/// # Errors
/// What the loader, the backend or `on_batch` says.
pub fn evaluate<B: Backend>(
    backend: &mut B,
    network: &Network,
    vars: &mut Variables<B>,
    loader: &Loader,
    normalisation: &Normalisation,
    mut on_batch: impl FnMut(usize) -> Result<()>,
) -> Result<(Scores, ConfusionMatrix)> {
    let classes = network.spec().classes;
    let mut confusion = ConfusionMatrix::new(loader.dataset().classes().to_vec())?;
    let (mut loss, mut top5) = (0.0, 0);
    for batch in loader.epoch(0, 0) {
        let batch = batch?;
        let x = backend.load(&batch.images, batch.size, normalisation, &batch.mix)?;
        let mut head = network.infer(backend, x, vars)?;
        let targets = batch.mix.soft_targets(&batch.labels, classes, 0.0)?;
        loss += backend.cross_entropy(&mut head, &targets)? * batch.len() as f64;
        for (logits, &label) in backend.logits(&head)?.chunks(classes).zip(&batch.labels) {
            let ranking = ranking(logits);
            confusion.record(label as usize, ranking[0])?;
            top5 += u64::from(ranking.iter().take(5).any(|&class| class == label as usize));
        }
        on_batch(batch.len())?;
    }
    let images = confusion.total();
    let share = |count: u64| count as f64 / images as f64;
    let scores =
        Scores { images, loss: loss / images as f64, top1: share(confusion.correct()), top5: share(top5) };
    Ok((scores, confusion))
}
