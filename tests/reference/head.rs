//! The head of the reference: pooling, dropout, classifier and softmax cross entropy with soft targets.

use crate::common::differences::{Loss, assert_gradient};
use crate::common::{
    CASES, Table, assert_same_on_any_number_of_threads, assert_shape_error, cast, f64s, images, pointwise,
    tensor, uniform,
};
use effnetv2::Result;
use effnetv2::backend::{Backend, Classifier, ConvNorm, Gradient, Load, Mode, Raw, StepKey, Variables};
use effnetv2::reference::Reference;
use effnetv2::tensor::{Real, Shape};
use proptest::prelude::*;
use std::ops::Range;

/// A 1×1 convolution, the head behind it, and one buffer of everything a gradient exists for.
struct Tail {
    conv: ConvNorm,
    classifier: Classifier,
    input: (Shape, Range<usize>),
    table: Table,
    dropout: f64,
    key: StepKey,
    seed: u64,
}

struct Run<F> {
    logits: Vec<F>,
    loss: f64,
    grads: Vec<F>,
}

impl Tail {
    fn new(
        (n, h, w): (usize, usize, usize),
        [features, classes]: [usize; 2],
        dropout: f64,
        seed: u64,
    ) -> Self {
        let mut table = Table::default();
        let conv = table.conv_norm("conv", pointwise(4, features));
        let classifier = table.classifier(features, classes);
        let shape = Shape::new(n, h, w, 4);
        let input = (shape, table.tensor("input".into(), shape.elements(), 1.0, 0.0));
        let key = StepKey { seed, epoch: 3, images: (0..n as u32).collect() };
        Self { conv, classifier, input, table, dropout, key, seed }
    }

    fn values(&self) -> Vec<f64> {
        self.table.values(self.seed)
    }

    /// Positive; not of sum one, as the loss allows.
    fn targets(&self) -> Vec<f32> {
        let targets = uniform(self.seed, 3000, self.input.0.n * self.classifier.classes);
        targets.into_iter().map(|t| (t * t) as f32).collect()
    }

    fn begin<F: Real>(&self, values: &[F]) -> (Reference<F>, Variables<Reference<F>>) {
        let mut backend = Reference::new();
        backend.begin_step(&self.key).unwrap();
        let grads = vec![F::zero(); values.len()];
        (backend, Variables { params: values.to_vec(), grads, stats: vec![F::one(); self.table.stats] })
    }

    fn features<F: Real>(
        &self,
        backend: &mut Reference<F>,
        vars: &mut Variables<Reference<F>>,
    ) -> Result<Raw<Reference<F>>> {
        let x = tensor(self.input.0, vars.params[self.input.1.clone()].to_vec());
        backend.conv_norm(&self.conv, Load::Plain(&x), vars, Mode::Train)
    }

    fn run<F: Real>(&self, values: &[F]) -> Result<Run<F>> {
        let (mut backend, mut vars) = self.begin(values);
        let x = tensor(self.input.0, values[self.input.1.clone()].to_vec());
        let raw = self.features(&mut backend, &mut vars)?;
        let mut head = backend.head(&self.classifier, &raw, self.dropout, &mut vars)?;
        let loss = backend.cross_entropy(&mut head, &self.targets())?;
        let (dz, owed) = backend.head_backward(&self.classifier, (&self.conv, &raw), &head, &mut vars)?;
        let grad = Gradient { gradient: &dz, raw: &raw, owed: &owed };
        let dx = backend.conv_backward(&self.conv, &x, grad, None, &mut vars)?;
        vars.grads[self.input.1.clone()].copy_from_slice(dx.data());
        Ok(Run { logits: backend.logits(&head)?, loss, grads: vars.grads })
    }

    /// Everything computed in `F`.
    fn results<F: Real>(&self) -> Vec<Vec<f64>> {
        let run = self.run(&cast::<F>(&self.values())).unwrap();
        vec![vec![run.loss], f64s(&run.logits), f64s(&run.grads)]
    }
}

/// A head whose logits are its bias, whatever the features.
fn biased(images: usize, logits: &[f64]) -> (Tail, Vec<f64>) {
    let tail = Tail::new((images, 2, 1), [3, logits.len()], 0.0, 1);
    let mut values = tail.values();
    values[tail.classifier.weight.clone()].fill(0.0);
    values[tail.classifier.bias.clone()].copy_from_slice(logits);
    (tail, values)
}

/// Loss and the gradient of the bias, which is the sum of the logits' gradients.
fn loss_of(images: usize, logits: &[f64], targets: &[f32]) -> (f64, Vec<f64>) {
    let (tail, values) = biased(images, logits);
    let (mut backend, mut vars) = tail.begin(&values);
    let raw = tail.features(&mut backend, &mut vars).unwrap();
    let mut head = backend.head(&tail.classifier, &raw, 0.0, &mut vars).unwrap();
    let loss = backend.cross_entropy(&mut head, targets).unwrap();
    backend.head_backward(&tail.classifier, (&tail.conv, &raw), &head, &mut vars).unwrap();
    (loss, vars.grads[tail.classifier.bias.clone()].to_vec())
}

fn assert_close(found: f64, expected: f64, bound: f64) {
    assert!((found - expected).abs() <= bound, "{found} is not {expected} within {bound:e}");
}

/// TensorFlow's label-smoothed cross entropy of logits (1, 2, 3), class 1, smoothing 0.1, and its gradient p − t.
#[test]
fn smoothed_labels_give_tensorflows_loss() {
    let targets = [0.1 / 3.0, 0.9 + 0.1 / 3.0, 0.1 / 3.0_f64];
    for images in 1..4 {
        let (loss, gradient) = loss_of(images, &[1.0, 2.0, 3.0], &targets.map(|t| t as f32).repeat(images));
        assert_close(loss, 1.407_606, 1e-6);
        let exp = [1.0, 2.0, 3.0].map(f64::exp);
        for class in 0..3 {
            assert_close(gradient[class], exp[class] / exp.iter().sum::<f64>() - targets[class], 1e-7);
        }
    }
}

#[test]
fn equal_logits_cost_the_logarithm_of_the_classes() {
    let (loss, gradient) = loss_of(2, &[-7.0; 10], &[[0.1; 10], [0.1; 10]].concat());
    assert_close(loss, 10.0_f64.ln(), 1e-6);
    gradient.iter().for_each(|&g| assert_close(g, 0.0, 1e-8));
}

#[test]
fn large_logits_do_not_overflow() {
    let (loss, gradient) = loss_of(1, &[1e4, -1e4, 0.0], &[0.0, 1.0, 0.0]);
    assert_close(loss, 2e4, 1e-9);
    for (found, expected) in gradient.into_iter().zip([1.0, -1.0, 0.0]) {
        assert_close(found, expected, 1e-12);
    }
}

/// One feature, weight one, no bias: the logit is the mean of SiLU(norm(y)), and dropout multiplies it.
#[test]
fn dropout_drops_its_share_and_keeps_the_mean() {
    let (images, features, rate) = (64, 256, 0.3);
    let run = |key: StepKey, rate: f64| {
        let mut tail = Tail::new((images, 1, 1), [features, features], rate, 1);
        tail.key = key;
        let mut values = tail.values();
        let (weight, bias) = (tail.classifier.weight.clone(), tail.classifier.bias.clone());
        values[weight.clone()].fill(0.0);
        values[weight].iter_mut().step_by(features + 1).for_each(|w| *w = 1.0);
        values[bias].fill(0.0);
        tail.run(&values).unwrap().logits
    };
    let key = StepKey { seed: 5, epoch: 6, images: (100..100 + images as u32).collect() };
    let (whole, dropped) = (run(key.clone(), 0.0), run(key.clone(), rate));
    for (whole, dropped) in whole.iter().zip(&dropped) {
        assert!(*dropped == 0.0 || (dropped - whole / (1.0 - rate)).abs() < 1e-14, "{dropped} of {whole}");
    }
    // Five deviations of a binomial share.
    let count = dropped.len() as f64;
    let share = dropped.iter().filter(|d| **d == 0.0).count() as f64 / count;
    assert_close(share, rate, 5.0 * (rate * (1.0 - rate) / count).sqrt());

    // A function of seed, epoch and image: not of the place in the batch.
    let mask = |logits: Vec<f64>| {
        logits.chunks(features).map(|row| row.iter().map(|&l| l == 0.0).collect()).collect::<Vec<Vec<bool>>>()
    };
    let masks = mask(dropped);
    let reversed = StepKey { images: key.images.iter().rev().copied().collect(), ..key.clone() };
    assert_eq!(mask(run(reversed, rate)).into_iter().rev().collect::<Vec<_>>(), masks);
    assert_ne!(mask(run(StepKey { seed: 6, ..key.clone() }, rate)), masks);
    assert_ne!(mask(run(StepKey { epoch: 7, ..key }, rate)), masks);
    assert!(masks.windows(2).all(|pair| pair[0] != pair[1]), "two images share a mask");
}

#[test]
fn misfits_are_errors() {
    let tail = Tail::new((2, 3, 3), [5, 4], 0.0, 1);
    let (mut backend, mut vars) = tail.begin(&tail.values());
    let raw = tail.features(&mut backend, &mut vars).unwrap();
    let wide = Classifier { features: 6, ..tail.classifier.clone() };
    assert_shape_error(backend.head(&wide, &raw, 0.0, &mut vars), &["2×3×3×5", "2×3×3×6"]);

    let mut head = backend.head(&tail.classifier, &raw, 0.0, &mut vars).unwrap();
    let layer = (&tail.conv, &raw);
    assert_shape_error(backend.head_backward(&tail.classifier, layer, &head, &mut vars), &["loss"]);
    for count in [0, 7, 9] {
        let refused = backend.cross_entropy(&mut head, &vec![0.25; count]);
        assert_shape_error(refused, &[&format!("{count} targets"), "2×4"]);
    }
    // A refused loss leaves no gradient.
    assert_shape_error(backend.head_backward(&tail.classifier, layer, &head, &mut vars), &["loss"]);

    // The gradient of another batch, and that of another classifier.
    backend.cross_entropy(&mut head, &[0.25; 8]).unwrap();
    let other = Tail::new((3, 3, 3), [5, 4], 0.0, 1);
    let (mut third, mut others) = other.begin(&other.values());
    let more = other.features(&mut third, &mut others).unwrap();
    let refused = backend.head_backward(&tail.classifier, (&tail.conv, &more), &head, &mut vars);
    assert_shape_error(refused, &["3×5", "2×5"]);
    let few = Classifier { classes: 3, ..tail.classifier.clone() };
    assert_shape_error(backend.head_backward(&few, layer, &head, &mut vars), &["2×3", "2×4"]);
    assert!(vars.grads.iter().all(|&g| g == 0.0), "a refused backward left something behind");

    backend.begin_step(&StepKey { images: vec![1, 2, 3], ..tail.key.clone() }).unwrap();
    assert_shape_error(backend.head(&tail.classifier, &raw, 0.5, &mut vars), &["3 images", "2"]);
}

#[test]
fn threads_do_not_change_a_bit() {
    let tail = Tail::new((3, 71, 59), [45, 100], 0.2, 1);
    assert_same_on_any_number_of_threads(|| tail.results::<f32>());
    assert_same_on_any_number_of_threads(|| tail.results::<f64>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn gradients_are_those_of_finite_differences(
        images in images(),
        features in 1..20_usize,
        classes in 1..9_usize,
        dropout in prop_oneof![Just(0.0), 0.1..0.7],
        seed: u64,
    ) {
        prop_assume!(images.0 * images.1 * images.2 > 1);
        let tail = Tail::new(images, [features, classes], dropout, seed);
        let values = tail.values();
        let gradient = tail.run(&values).unwrap().grads;
        assert_gradient(&tail.table.slots, &values, &gradient, seed, |values| {
            let run = tail.run(values).unwrap();
            let largest = run.logits.iter().fold(1.0, |m: f64, l| m.max(l.abs()));
            let targets: f32 = tail.targets().iter().sum();
            Loss { value: run.loss, magnitude: largest * (1.0 + f64::from(targets)) }
        });
    }
}
