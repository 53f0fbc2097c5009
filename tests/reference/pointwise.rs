//! The 1×1 convolution of the reference: exact on integers, its directions adjoint, its gradients those of finite
//! differences in every use the blocks make of it.

use crate::common::chain::{Chain, ChainSpec, Source, chains};
use crate::common::convolution::{assert_adjoint, assert_all_exact, assert_errors};
use crate::common::{CASES, conv, images, pointwise};
use effnetv2::backend::Activation;
use effnetv2::tensor::ConvKind;
use proptest::prelude::*;

#[test]
fn integers_are_exact() {
    let channels = [(1, 1), (3, 8), (17, 17), (8, 1), (1, 9)];
    let images = [(1, 1, 1), (3, 1, 1), (1, 2, 2), (2, 1, 7), (2, 5, 4)];
    assert_all_exact(pointwise(1, 1), &[1], &[1], &channels, &images);
}

/// Products large enough to be cut, by rows and by columns.
#[test]
fn integers_are_exact_across_cuts() {
    let channels = [(17, 17), (8, 48), (48, 8)];
    assert_all_exact(pointwise(1, 1), &[1], &[1], &channels, &[(2, 41, 37), (37, 5, 7)]);
}

#[test]
fn misfits_are_errors() {
    assert_errors(pointwise(6, 9));
}

#[test]
fn threads_do_not_change_a_bit() {
    for source in [Source::Plain, Source::Silu, Source::Gated(5)] {
        for (inputs, outputs) in [(29, 67), (67, 29)] {
            let (conv, images, act) = (pointwise(inputs, outputs), (5, 23, 37), Activation::Identity);
            let spec = ChainSpec { source, conv, images, act, skip: true, drop: Some(0.3), seed: 4 };
            let chain = Chain::new(spec);
            chain.assert_same_on_any_number_of_threads();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn directions_are_adjoint(conv in conv(ConvKind::Pointwise, 20), images in images(), seed: u64) {
        assert_adjoint(conv, images, seed);
    }

    #[test]
    fn gradients_are_those_of_finite_differences(spec in chains(ConvKind::Pointwise)) {
        Chain::new(spec).assert_gradients();
    }
}
