//! Whole blocks and networks on the reference: every gradient against finite differences with batch statistics,
//! stochastic depth, and a training step that no number of threads can change.

use crate::common::convolution::Lone;
use crate::common::whole::{Whole, spec};
use crate::common::{
    CASES, assert_same_on_any_number_of_threads, assert_shape_error, pointwise, tensor, uniform,
};
use effnetv2::backend::{Activation, Backend, DropPath, Mode, StepKey, VarianceEstimator};
use effnetv2::model::Architecture;
use effnetv2::nn::{BlockKind, BlockSpec};
use effnetv2::reference::Reference;
use effnetv2::tensor::{Padding, Shape};
use proptest::prelude::*;

const FUSED: BlockSpec = BlockSpec {
    kind: BlockKind::FusedMbConv,
    kernel: 3,
    stride: 1,
    expansion: 1,
    inputs: 5,
    outputs: 5,
    squeeze: None,
    drop_path: 0.0,
};
const MB: BlockSpec = BlockSpec { kind: BlockKind::MbConv, ..FUSED };

fn padding() -> impl Strategy<Value = Padding> {
    prop_oneof![Just(Padding::Same), Just(Padding::Symmetric)]
}

/// Stride and output channels with and without a skip connection, kernels, and rates of stochastic depth.
fn block(base: BlockSpec, squeeze: bool) -> impl Strategy<Value = BlockSpec> {
    let kernel = prop_oneof![Just(3), Just(5)];
    let drop = prop_oneof![Just(0.0), 0.1..0.6];
    let expansion = if base.expansion == 1 { 1..2_usize } else { 2..4 };
    let sides = prop_oneof![Just((1, true)), Just((1, false)), Just((2, true))];
    (kernel, drop, expansion, sides, 1..7_usize, 1..5_usize).prop_map(
        move |(kernel, drop_path, expansion, (stride, same), inputs, reduced)| BlockSpec {
            kernel,
            stride,
            expansion,
            inputs,
            outputs: if same { inputs } else { inputs + 2 },
            squeeze: squeeze.then_some(reduced),
            drop_path,
            ..base
        },
    )
}

/// Batches whose last feature map has two pixels or more, even behind a stem and a block of stride 2.
fn images() -> impl Strategy<Value = (usize, usize, usize)> {
    (1..=3_usize, 1..=9_usize, 1..=9_usize)
        .prop_filter("one value has no variance", |&(n, h, w)| n * h.div_ceil(4) * w.div_ceil(4) > 1)
}

macro_rules! blocks {
    ($($name:ident: $base:expr, $squeeze:literal;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig::with_cases(CASES / 2))]
            $(
                #[test]
                fn $name(block in block($base, $squeeze), padding in padding(), images in images(), seed: u64) {
                    Whole::new(spec(padding, block.inputs, &[block], 6, 4), images, 0.0, seed).assert_gradients();
                }
            )*

            #[test]
            fn stem_and_head(
                stem in 1..9_usize,
                head in 1..9_usize,
                padding in padding(),
                images in images(),
                dropout in prop_oneof![Just(0.0), 0.1..0.6],
                seed: u64,
            ) {
                Whole::new(spec(padding, stem, &[], head, 3), images, dropout, seed).assert_gradients();
            }
        }
    };
}

blocks! {
    fused_mbconv_without_expansion: FUSED, false;
    fused_mbconv: BlockSpec { expansion: 2, ..FUSED }, false;
    mbconv_without_expansion: MB, false;
    mbconv_without_expansion_gated: MB, true;
    mbconv: BlockSpec { expansion: 2, ..MB }, false;
    mbconv_gated: BlockSpec { expansion: 2, ..MB }, true;
}

/// Every kind of block in a row, with dropout and stochastic depth.
fn all_kinds(drop_path: f64) -> Vec<BlockSpec> {
    let last = BlockSpec { inputs: 7, outputs: 7, drop_path, ..MB };
    vec![
        BlockSpec { drop_path, ..FUSED },
        BlockSpec { stride: 2, expansion: 3, outputs: 7, ..FUSED },
        BlockSpec { expansion: 2, kernel: 5, squeeze: Some(2), ..last },
        BlockSpec { expansion: 2, ..last },
        last,
    ]
}

#[test]
fn a_whole_network() {
    for (seed, padding) in [(1, Padding::Same), (2, Padding::Symmetric)] {
        Whole::new(spec(padding, 5, &all_kinds(0.3), 9, 5), (3, 17, 14), 0.25, seed).assert_gradients();
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let nano = Architecture::find("nano").unwrap().network(10);
    let whole = Whole::new(nano, (19, 45, 45), 0.1, 3);
    assert_same_on_any_number_of_threads(|| whole.results::<f32>());
    assert_same_on_any_number_of_threads(|| whole.results::<f64>());
}

/// What each image of a batch of ones is multiplied by.
fn factors(key: &StepKey, drop: DropPath) -> Vec<f64> {
    let mut lone = Lone::<f64>::new(pointwise(1, 1), &[1.0]);
    // Running mean and variance are one, so a value of one is normalised to β.
    lone.vars.params[lone.layer.beta.clone()].fill(1.0);
    lone.backend.begin_step(key).unwrap();
    let shape = Shape::new(key.images.len(), 1, 1, 1);
    let raw = lone.forward(&tensor(shape, vec![1.0; shape.n])).unwrap();
    let (act, skip) = (Activation::Identity, tensor(shape, vec![7.0; shape.n]));
    let alone = lone.backend.merge(&raw, act, None, Some(drop)).unwrap();
    let added = lone.backend.merge(&raw, act, Some(&skip), Some(drop)).unwrap();
    assert!(alone.data().iter().zip(added.data()).all(|(a, b)| (a + 7.0 - b).abs() < 1e-14));
    alone.into_vec()
}

#[test]
fn stochastic_depth_drops_its_share_and_keeps_the_mean() {
    let key = StepKey { seed: 11, epoch: 1, images: (0..20_000).collect() };
    for rate in [0.05, 0.2, 0.8] {
        let factors = factors(&key, DropPath { rate, block: 2 });
        for factor in &factors {
            assert!(*factor == 0.0 || (factor - 1.0 / (1.0 - rate)).abs() < 1e-14, "{factor} at rate {rate}");
        }
        // Five deviations of a binomial share.
        let count = factors.len() as f64;
        let share = factors.iter().filter(|f| **f == 0.0).count() as f64 / count;
        assert!(
            (share - rate).abs() < 5.0 * (rate * (1.0 - rate) / count).sqrt(),
            "{share} dropped, not {rate}"
        );
    }
}

#[test]
fn stochastic_depth_depends_on_seed_epoch_image_and_block() {
    let key = StepKey { seed: 11, epoch: 1, images: (0..200).collect() };
    let drop = DropPath { rate: 0.5, block: 2 };
    let base = factors(&key, drop);
    let reversed = StepKey { images: key.images.iter().rev().copied().collect(), ..key.clone() };
    assert_eq!(factors(&reversed, drop).into_iter().rev().collect::<Vec<_>>(), base);
    let part = StepKey { images: vec![150, 3], ..key.clone() };
    assert_eq!(factors(&part, drop), [base[150], base[3]]);
    assert_ne!(factors(&StepKey { seed: 12, ..key.clone() }, drop), base);
    assert_ne!(factors(&StepKey { epoch: 2, ..key.clone() }, drop), base);
    assert_ne!(factors(&key, DropPath { block: 3, ..drop }), base);
}

fn dropping(rate: f64, dropout: f64) -> Whole {
    Whole::new(spec(Padding::Same, 5, &all_kinds(rate), 6, 4), (4, 16, 16), dropout, 21)
}

#[test]
fn evaluation_neither_drops_nor_moves_statistics() {
    let (whole, never) = (dropping(0.9, 0.5), dropping(0.0, 0.0));
    let values = whole.values();
    let mut vars = whole.variables(&values);
    let stats = vars.stats.clone();
    let logits = whole.logits(&values, &mut vars, Mode::Eval).unwrap();
    assert_eq!(logits, never.logits(&values, &mut vars, Mode::Eval).unwrap());
    assert_eq!(vars.stats, stats);
    assert_ne!(logits, whole.logits(&values, &mut vars, Mode::Train).unwrap());
    assert_ne!(vars.stats, stats);
}

/// What inference leaves out, the activation that nobody stores in training, changes no bit.
#[test]
fn inference_is_evaluation() {
    let whole = dropping(0.5, 0.5);
    let values = whole.values();
    let mut vars = whole.variables(&values);
    let logits = whole.logits(&values, &mut vars, Mode::Eval).unwrap();
    assert_eq!(whole.infer(&values, &mut vars).unwrap(), logits);
}

/// Statistics are taken before the mask: dropping a block's branch moves only those of what follows it.
#[test]
fn statistics_include_dropped_images() {
    let block = |drop_path| BlockSpec { expansion: 2, squeeze: Some(2), drop_path, ..MB };
    let run = |rate| {
        let whole = Whole::new(spec(Padding::Same, 5, &[block(rate)], 6, 4), (4, 16, 16), 0.0, 21);
        let stats = whole.run(&whole.values()).unwrap().stats;
        (whole, stats)
    };
    let ((whole, kept), (_, dropped)) = (run(0.0), run(0.999_999));
    for entry in &whole.network.layout().stats {
        let same = kept[entry.range.clone()] == dropped[entry.range.clone()];
        assert_eq!(same, entry.name.starts_with("blocks") || entry.name.starts_with("bn1"), "{}", entry.name);
    }
}

/// With every image dropped the branch has no gradient and the block is the identity, forward and backward.
#[test]
fn a_dropped_branch_gets_no_gradient() {
    for block in all_kinds(0.999_999).into_iter().filter(|block| block.has_skip()) {
        let block = BlockSpec { inputs: 5, outputs: 5, ..block };
        let with = Whole::new(spec(Padding::Same, 5, &[block], 6, 4), (4, 16, 16), 0.0, 21);
        let run = with.run(&with.values()).unwrap();
        let mut found = 0;
        for (name, grads) in with.part(&run.grads, "blocks") {
            found += 1;
            assert!(grads.iter().all(|&g| g == 0.0), "{name} has a gradient");
        }
        assert!(found >= 3);
        assert!(with.part(&run.grads, "conv_stem").iter().all(|(_, g)| g.iter().all(|&g| g != 0.0)));
    }
}

/// Image by image: the gradient a batch norm receives is zero for a dropped one, and β's is the sum over the kept.
#[test]
fn a_dropped_image_gets_no_gradient() {
    let (key, drop) =
        (StepKey { images: (0..40).collect(), ..StepKey::default() }, DropPath { rate: 0.5, block: 1 });
    let factors = factors(&key, drop);
    let shape = Shape::new(40, 2, 3, 4);
    let x = tensor(shape, uniform(1, 0, shape.elements()));
    let grad = tensor(shape, uniform(1, 1, shape.elements()));
    let mut lone = Lone::<f64>::new(pointwise(4, 4), &uniform(1, 2, 16));
    lone.layer.variance = VarianceEstimator::Biased;
    lone.backend.begin_step(&key).unwrap();
    let raw = lone.forward(&x).unwrap();

    let branch = (&lone.layer, &raw);
    let (dz, _) =
        lone.backend.merge_backward(branch, Activation::Silu, Some(drop), &grad, &mut lone.vars).unwrap();
    let dz = dz.expect("SiLU changes the gradient");
    for (dz, factor) in dz.data().chunks(24).zip(&factors) {
        assert!(dz.iter().all(|&d| (d == 0.0) == (*factor == 0.0)), "factor {factor}: {dz:?}");
    }

    lone.backend.clear(&mut lone.vars.grads).unwrap();
    let branch = (&lone.layer, &raw);
    lone.backend.merge_backward(branch, Activation::Identity, Some(drop), &grad, &mut lone.vars).unwrap();
    for (channel, found) in lone.vars.grads[lone.layer.beta.clone()].iter().enumerate() {
        let images = grad.data().chunks(24).zip(&factors);
        let sum = |g: &[f64]| g.iter().skip(channel).step_by(4).sum::<f64>();
        let expected: f64 = images.map(|(g, factor)| factor * sum(g)).sum();
        assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
    }
}

#[test]
fn an_evaluation_pass_has_no_backward() {
    let whole = dropping(0.0, 0.0);
    let values = whole.values();
    let mut vars = whole.variables(&values);
    let mut backend = Reference::new();
    let shape = Shape::new(4, 16, 16, 3);
    let mut pass = |mode| {
        let images = tensor(shape, uniform(0, 0, shape.elements()));
        whole.network.forward(&mut backend, images, &mut vars, mode, 0.0).unwrap()
    };
    let (mut evaluated, lossless) = (pass(Mode::Eval), pass(Mode::Train));
    backend.cross_entropy(&mut evaluated.head, &[0.25; 16]).unwrap();
    assert_shape_error(whole.network.backward(&mut backend, evaluated, &mut vars), &["evaluation"]);
    assert_shape_error(whole.network.backward(&mut backend, lossless, &mut vars), &["loss"]);
    assert!(vars.grads.iter().all(|&g| g == 0.0));
}

#[test]
fn images_of_other_channels_are_refused() {
    let whole = dropping(0.0, 0.0);
    let values = whole.values();
    let mut vars = whole.variables(&values);
    for (shape, words) in
        [(Shape::new(1, 8, 8, 4), ["1×8×8×4", "expect 3"]), (Shape::new(0, 8, 8, 3), ["0×8×8×3", "empty"])]
    {
        let images = tensor(shape, vec![0.0; shape.elements()]);
        let refused = whole.network.forward(&mut Reference::new(), images, &mut vars, Mode::Train, 0.0);
        assert_shape_error(refused, &words);
    }
}
