//! Squeeze-excitation of the reference: the gate by its formula, and its gradients, through the product and through the
//! pool, those of finite differences.

use crate::common::chain::{Chain, ChainSpec, Source};
use crate::common::convolution::Lone;
use crate::common::{CASES, Table, assert_shape_error, cast, f64s, images, pointwise, tensor, uniform};
use effnetv2::backend::{Activation, Backend, Gradient, Load, Mode, SqueezeExcite, Variables};
use effnetv2::reference::Reference;
use effnetv2::tensor::{Real, Shape, Tensor};
use proptest::prelude::*;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// A producer, a squeeze-excitation of what it makes, and an identity convolution that reads the gated tensor.
struct Gated<F: Real> {
    producer: Lone<F>,
    squeeze: SqueezeExcite,
    values: Variables<Reference<F>>,
    reader: Lone<F>,
}

impl<F: Real> Gated<F> {
    fn new(channels: usize, reduced: usize) -> Self {
        let mut weights = vec![F::zero(); channels * channels];
        weights.iter_mut().step_by(channels + 1).for_each(|w| *w = F::one());
        let identity = || Lone::new(pointwise(channels, channels), &weights);
        let mut table = Table::default();
        let squeeze = table.squeeze_excite(channels, reduced);
        let params: Vec<F> = cast(&table.values(7));
        let values = Variables { grads: vec![F::zero(); params.len()], params, stats: Vec::new() };
        Self { producer: identity(), squeeze, values, reader: identity() }
    }

    /// What the producer makes of `x`, and the same times its gate.
    fn run(&mut self, x: &Tensor<F>) -> [Tensor<F>; 2] {
        let raw = self.producer.forward(x).unwrap();
        let gate = self.producer.backend.squeeze_excite(&self.squeeze, &raw, &mut self.values).unwrap();
        let Lone { layer, vars, backend } = &mut self.reader;
        let gated = backend.conv_norm(layer, Load::Gated(&raw, &gate), vars, Mode::Eval).unwrap();
        [backend.merge(&raw, Activation::Silu, None, None).unwrap(), gated.y]
    }
}

/// σ(W₂·SiLU(W₁·mean(x) + b₁) + b₂), channel by channel.
fn gate(layer: &SqueezeExcite, params: &[f64], x: &[f64], pixels: usize) -> Vec<f64> {
    let c = layer.channels;
    let mean = |channel: usize| x.iter().skip(channel).step_by(c).sum::<f64>() / pixels as f64;
    let pooled: Vec<f64> = (0..c).map(mean).collect();
    let hidden = |r: usize| {
        let row = &params[layer.reduce_weight.clone()][r * c..][..c];
        silu(row.iter().zip(&pooled).map(|(w, p)| w * p).sum::<f64>() + params[layer.reduce_bias.start + r])
    };
    let hidden: Vec<f64> = (0..layer.reduced).map(hidden).collect();
    let logit = |channel: usize| {
        let row = &params[layer.expand_weight.clone()][channel * layer.reduced..][..layer.reduced];
        row.iter().zip(&hidden).map(|(w, h)| w * h).sum::<f64>() + params[layer.expand_bias.start + channel]
    };
    (0..c).map(|channel| sigmoid(logit(channel))).collect()
}

#[test]
fn the_gate_is_its_formula() {
    for (n, h, w, channels, reduced) in
        [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (3, 5, 7, 17, 1), (2, 9, 4, 40, 10), (1, 60, 60, 16, 4)]
    {
        let shape = Shape::new(n, h, w, channels);
        let mut gated = Gated::<f64>::new(channels, reduced);
        let [x, found] = gated.run(&tensor(shape, uniform(1, 0, shape.elements())));
        let image = h * w * channels;
        for (x, found) in x.data().chunks(image).zip(found.data().chunks(image)) {
            let gate = gate(&gated.squeeze, &gated.values.params, x, h * w);
            for (i, (&x, &found)) in x.iter().zip(found).enumerate() {
                let off = (found - x * gate[i % channels]).abs();
                assert!(off < 1e-14 * h as f64 * w as f64, "{shape}, {reduced} reduced: off by {off:e}");
            }
        }
    }
}

/// A strong negative bias shuts the gate, a strong positive one opens it; neither overflows.
#[test]
fn a_saturated_gate_is_zero_or_one() {
    let shape = Shape::new(2, 3, 3, 5);
    for (bias, factor) in [(-1e4_f32, 0.0), (1e4, 1.0)] {
        let mut gated = Gated::<f32>::new(shape.c, 2);
        let range = gated.squeeze.expand_bias.clone();
        gated.values.params[range].fill(bias);
        let [x, found] = gated.run(&tensor(shape, cast(&uniform(1, 0, shape.elements()))));
        let expected: Vec<f64> = f64s(x.data()).iter().map(|x| x * factor).collect();
        for (found, expected) in f64s(found.data()).into_iter().zip(expected) {
            assert!((found - expected).abs() < 1e-30, "{found} is not {expected}");
        }
    }
}

#[test]
fn misfits_are_errors() {
    let (shape, n) = (Shape::new(2, 3, 3, 5), 2);
    let mut gated = Gated::<f64>::new(shape.c, 2);
    let x = tensor(shape, uniform(1, 0, shape.elements()));
    let raw = gated.producer.forward(&x).unwrap();
    let other = SqueezeExcite { channels: 6, ..gated.squeeze.clone() };
    let refused = gated.producer.backend.squeeze_excite(&other, &raw, &mut gated.values);
    assert_shape_error(refused, &["2×3×3×5", "2×3×3×6"]);

    // A gate of fewer images, and one of other channels.
    let one = tensor(Shape { n: 1, ..shape }, uniform(1, 1, shape.elements() / n));
    let mut wide = Gated::<f64>::new(6, 2);
    let sixth = tensor(shape.with_channels(6), uniform(1, 1, shape.with_channels(6).elements()));
    let few = gated.producer.forward(&one).unwrap();
    let few = gated.producer.backend.squeeze_excite(&gated.squeeze, &few, &mut gated.values).unwrap();
    let more = wide.producer.forward(&sixth).unwrap();
    let more = wide.producer.backend.squeeze_excite(&wide.squeeze, &more, &mut wide.values).unwrap();
    for (gate, found) in [(&few, "1×5"), (&more, "2×6")] {
        let Lone { layer, vars, backend } = &mut gated.reader;
        let refused = backend.conv_norm(layer, Load::Gated(&raw, gate), vars, Mode::Train);
        assert_shape_error(refused, &["2×5", found]);
        let y = backend.conv_norm(layer, Load::Silu(&raw), vars, Mode::Train).unwrap();
        let owed = crate::common::nothing_owed(shape.c);
        let grad = Gradient { gradient: &x, raw: &y, owed: &owed };
        let (producer, squeeze) = ((&gated.producer.layer, &raw), (&gated.squeeze, gate));
        let refused = backend.conv_backward_gated(layer, producer, squeeze, grad, vars);
        assert_shape_error(refused, &["2×5", found]);
        assert!(vars.grads.iter().all(|&g| g == 0.0), "a refused backward left something behind");
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let (conv, images) = (pointwise(67, 9), (3, 61, 41));
    let (source, act) = (Source::Gated(11), Activation::Identity);
    let chain = Chain::new(ChainSpec { source, conv, images, act, skip: true, drop: None, seed: 2 });
    chain.assert_same_on_any_number_of_threads();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn gradients_are_those_of_finite_differences(
        channels in 1..20_usize,
        reduced in 1..7_usize,
        outputs in 1..9_usize,
        images in images(),
        seed: u64,
    ) {
        prop_assume!(images.0 * images.1 * images.2 > 1);
        let (source, conv, act) = (Source::Gated(reduced), pointwise(channels, outputs), Activation::Identity);
        Chain::new(ChainSpec { source, conv, images, act, skip: false, drop: None, seed }).assert_gradients();
    }
}
