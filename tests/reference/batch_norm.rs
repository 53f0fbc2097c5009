//! Batch normalisation of the reference: its moments survive large means and counts, its running statistics follow the
//! chosen estimator, and evaluation leaves them alone. Its gradients are differenced in every test of a convolution.

use crate::common::chain::{Chain, ChainSpec, Source};
use crate::common::convolution::Lone;
use crate::common::{assert_shape_error, f64s, pointwise, tensor, uniform};
use effnetv2::backend::{Activation, Backend, Gradient, Load, Mode, VarianceEstimator};
use effnetv2::tensor::{Real, Shape, Tensor};
use proptest::prelude::*;

/// 2⁻²⁴: what one rounding to f32 may lose.
const U: f64 = f32::EPSILON as f64 / 2.0;

/// A batch norm behind the identity convolution: its raw output is its input.
fn identity<F: Real>(channels: usize) -> Lone<F> {
    let mut weights = vec![F::zero(); channels * channels];
    weights.iter_mut().step_by(channels + 1).for_each(|w| *w = F::one());
    Lone::new(pointwise(channels, channels), &weights)
}

/// Mean and biased variance of each channel, in two passes in f64.
fn moments(values: &[f64], channels: usize) -> Vec<(f64, f64)> {
    let count = (values.len() / channels) as f64;
    let channel = |c| values.iter().skip(c).step_by(channels);
    let moment = |c| {
        let mean = channel(c).sum::<f64>() / count;
        (mean, channel(c).map(|v| (v - mean).powi(2)).sum::<f64>() / count)
    };
    (0..channels).map(moment).collect()
}

/// f32 values around means of 0, `ratio` and −`ratio` deviations, one a channel.
fn shifted(shape: Shape, ratio: f64) -> Tensor<f32> {
    let deviation = (1.0_f64 / 3.0).sqrt();
    let means = [0.0, ratio * deviation, -ratio * deviation];
    let values = uniform(8, 0, shape.elements()).into_iter().enumerate();
    tensor(shape, values.map(|(i, v)| (v + means[i % 3]) as f32).collect())
}

/// f32 statistics, output and gradient of `shape` against f64 ones of the very same f32 input.
fn assert_survives(shape: Shape, ratio: f64) {
    let x = shifted(shape, ratio);
    let (mut lone, epsilon) = (identity::<f32>(3), 1e-3);
    lone.layer.momentum = 1.0;
    lone.layer.epsilon = epsilon;
    lone.layer.variance = VarianceEstimator::Biased;
    let raw = lone.backend.conv_norm(&lone.layer, Load::Plain(&x), &mut lone.vars, Mode::Train).unwrap();
    let z = lone.backend.merge(&raw, Activation::Identity, None, None).unwrap();
    let dz = tensor(shape, uniform(8, 1, shape.elements()).into_iter().map(|v| v as f32).collect());
    let branch = (&lone.layer, &raw);
    let (_, owed) =
        lone.backend.merge_backward(branch, Activation::Identity, None, &dz, &mut lone.vars).unwrap();
    let grad = Gradient { gradient: &dz, raw: &raw, owed: &owed };
    let dx = lone.backend.conv_backward(&lone.layer, &x, grad, None, &mut lone.vars).unwrap();

    let (x, z, dz, dx) = (f64s(x.data()), f64s(z.data()), f64s(dz.data()), f64s(dx.data()));
    let count = shape.pixels() as f64;
    for (c, (mean, var)) in moments(&x, 3).into_iter().enumerate() {
        let stat = |range: &std::ops::Range<usize>| f64::from(lone.vars.stats[range.start + c]);
        // Sums of at most a few hundred values in f32, continued in f64: 256 roundings, far from all one way.
        let (off_mean, off_var) =
            ((stat(&lone.layer.running_mean) - mean).abs(), stat(&lone.layer.running_var) - var);
        assert!(off_mean <= U * mean.abs() + 16.0 * U, "channel {c}: mean {mean} is off by {off_mean:e}");
        assert!(off_var.abs() <= 64.0 * U * var, "channel {c}: variance {var} is off by {off_var:e}");

        let value = |range: &std::ops::Range<usize>| f64::from(lone.vars.params[range.start + c]);
        let (gamma, beta) = (value(&lone.layer.gamma), value(&lone.layer.beta));
        let rstd = 1.0 / (var + epsilon).sqrt();
        let channel = || (c..x.len()).step_by(3);
        let hat = |i: usize| (x[i] - mean) * rstd;
        let dbeta: f64 = channel().map(|i| dz[i]).sum();
        let dgamma: f64 = channel().map(|i| dz[i] * hat(i)).sum();
        for i in channel() {
            // scale·y + shift: the two are rounded, of the size of mean / deviation, and so are product and sum.
            let bound = 64.0 * U * (1.0 + gamma.abs() * rstd * x[i].abs() + beta.abs());
            let exact = gamma * hat(i) + beta;
            assert!((z[i] - exact).abs() <= bound, "value {i}: {} is not {exact} within {bound:e}", z[i]);
            // Likewise a·dz + b·y + c, where b·y is (mean / deviation)·γ·r·dγ/n.
            let share = (dbeta / count).abs() + (dgamma / count * rstd).abs() * x[i].abs();
            let bound =
                64.0 * U * gamma.abs() * rstd * (1.0 + share) + gamma.abs() * rstd * mean.abs() * rstd * U;
            let exact = gamma * rstd * (dz[i] - dbeta / count - hat(i) * dgamma / count);
            assert!(
                (dx[i] - exact).abs() <= bound,
                "gradient {i}: {} is not {exact} within {bound:e}",
                dx[i]
            );
        }
    }
}

#[test]
fn a_mean_of_a_hundred_deviations_costs_no_digits() {
    assert_survives(Shape::new(3, 37, 29, 3), 1e2);
}

#[test]
fn a_mean_of_ten_thousand_deviations_costs_no_digits() {
    assert_survives(Shape::new(3, 37, 29, 3), 1e4);
}

#[test]
fn a_million_values_a_channel_cost_no_digits() {
    assert_survives(Shape::new(4, 500, 500, 3), 0.0);
    assert_survives(Shape::new(4, 500, 500, 3), 1e2);
}

/// After k batches of the same data: running = (1 − m)ᵏ·start + (1 − (1 − m)ᵏ)·batch.
#[test]
fn running_statistics_follow_momentum_and_estimator() {
    let shape = Shape::new(2, 3, 1, 5);
    let values = uniform(3, 0, shape.elements());
    let batch = moments(&values, shape.c);
    let x = tensor(shape, values);
    for (estimator, correction) in
        [(VarianceEstimator::Biased, 1.0), (VarianceEstimator::Unbiased, 6.0 / 5.0)]
    {
        for momentum in [0.0, 0.01, 0.1, 1.0] {
            let mut lone = identity::<f64>(shape.c);
            lone.layer.momentum = momentum;
            lone.layer.variance = estimator;
            for step in 1..=3 {
                lone.backend.conv_norm(&lone.layer, Load::Plain(&x), &mut lone.vars, Mode::Train).unwrap();
                let old = (1.0_f64 - momentum).powi(step);
                for (c, (mean, var)) in batch.iter().enumerate() {
                    let expected = [old + (1.0 - old) * mean, old + (1.0 - old) * var * correction];
                    let places = [lone.layer.running_mean.start + c, lone.layer.running_var.start + c];
                    for (place, expected) in places.into_iter().zip(expected) {
                        let off = (lone.vars.stats[place] - expected).abs();
                        assert!(
                            off < 1e-14,
                            "{estimator:?}, momentum {momentum}, step {step}: off by {off:e}"
                        );
                    }
                }
            }
        }
    }
}

/// The normalisation itself uses the biased variance, whichever the running statistic keeps.
#[test]
fn a_normalised_batch_has_mean_beta_and_deviation_gamma() {
    let shape = Shape::new(2, 2, 1, 4);
    let x = tensor(shape, uniform(5, 0, shape.elements()));
    for estimator in [VarianceEstimator::Biased, VarianceEstimator::Unbiased] {
        let mut lone = identity::<f64>(shape.c);
        lone.layer.epsilon = 0.0;
        lone.layer.variance = estimator;
        let raw = lone.backend.conv_norm(&lone.layer, Load::Plain(&x), &mut lone.vars, Mode::Train).unwrap();
        let z = lone.backend.merge(&raw, Activation::Identity, None, None).unwrap();
        for (c, (mean, var)) in moments(z.data(), shape.c).into_iter().enumerate() {
            let (gamma, beta) =
                (lone.vars.params[lone.layer.gamma.start + c], lone.vars.params[lone.layer.beta.start + c]);
            assert!((mean - beta).abs() < 1e-13 && (var - gamma * gamma).abs() < 1e-13, "{mean} {var}");
        }
    }
}

#[test]
fn evaluation_reads_running_statistics_and_leaves_them() {
    let shape = Shape::new(2, 3, 2, 4);
    let x = tensor(shape, uniform(6, 0, shape.elements()));
    let mut lone = identity::<f64>(shape.c);
    lone.vars.stats = (0..lone.vars.stats.len() as u32).map(|i| 0.5 + f64::from(i)).collect();
    let stats = lone.vars.stats.clone();
    let raw = lone.forward(&x).unwrap();
    let z = lone.backend.merge(&raw, Activation::Identity, None, None).unwrap();
    assert_eq!(lone.vars.stats, stats);
    for (i, (&x, &z)) in x.data().iter().zip(z.data()).enumerate() {
        let (layer, c) = (&lone.layer, i % shape.c);
        let (gamma, beta) = (lone.vars.params[layer.gamma.start + c], lone.vars.params[layer.beta.start + c]);
        let (mean, var) = (stats[layer.running_mean.start + c], stats[layer.running_var.start + c]);
        let exact = gamma * (x - mean) / (var + layer.epsilon).sqrt() + beta;
        assert!((z - exact).abs() < 1e-13, "value {i}: {z} is not {exact}");
    }
    // Another batch changes nothing for this one.
    let one = tensor(Shape { n: 1, ..shape }, x.data()[..shape.elements() / 2].to_vec());
    let raw = lone.forward(&one).unwrap();
    let alone = lone.backend.merge(&raw, Activation::Identity, None, None).unwrap();
    assert_eq!(alone.data(), &z.data()[..one.data().len()]);
}

#[test]
fn one_value_a_channel_is_refused_in_training_alone() {
    let x = tensor(Shape::new(1, 1, 1, 3), vec![1.0, 2.0, 3.0]);
    let mut lone = identity::<f64>(3);
    let stats = lone.vars.stats.clone();
    let train = lone.backend.conv_norm(&lone.layer, Load::Plain(&x), &mut lone.vars, Mode::Train);
    assert_shape_error(train, &["one value per channel", "larger"]);
    assert_eq!(lone.vars.stats, stats);
    lone.forward(&x).unwrap();
}

#[test]
fn threads_do_not_change_a_bit() {
    let (conv, images) = (pointwise(3, 3), (3, 150, 151));
    for act in [Activation::Identity, Activation::Silu] {
        let spec = ChainSpec { source: Source::Silu, conv, images, act, skip: false, drop: None, seed: 9 };
        let chain = Chain::new(spec);
        chain.assert_same_on_any_number_of_threads();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(crate::common::CASES))]

    /// Without ε a batch norm ignores shift and scale of its input, so the gradient of its input is orthogonal to both.
    #[test]
    fn gradients_ignore_shift_and_scale(n in 2..4_usize, side in 2..6_usize, c in 1..9_usize, seed: u64) {
        let shape = Shape::new(n, side, side, c);
        let x = tensor(shape, uniform(seed, 0, shape.elements()));
        let dz = tensor(shape, uniform(seed, 1, shape.elements()));
        let mut lone = identity::<f64>(c);
        lone.layer.epsilon = 0.0;
        let raw = lone.backend.conv_norm(&lone.layer, Load::Plain(&x), &mut lone.vars, Mode::Train).unwrap();
        let branch = (&lone.layer, &raw);
        let (_, owed) = lone.backend.merge_backward(branch, Activation::Identity, None, &dz, &mut lone.vars).unwrap();
        let grad = Gradient { gradient: &dz, raw: &raw, owed: &owed };
        let dx = lone.backend.conv_backward(&lone.layer, &x, grad, None, &mut lone.vars).unwrap();
        for channel in 0..c {
            let values = || (channel..shape.elements()).step_by(c);
            let along = |v: &dyn Fn(usize) -> f64| values().map(|i| dx.data()[i] * v(i)).sum::<f64>();
            let (shift, scale) = (along(&|_| 1.0), along(&|i| x.data()[i]));
            prop_assert!(shift.abs() < 1e-11 && scale.abs() < 1e-11, "{shift:e} {scale:e}");
        }
    }
}
