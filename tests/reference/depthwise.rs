//! The depthwise convolution of the reference: exact on integers, its directions adjoint, its gradients those of finite
//! differences in every use the blocks make of it.

use crate::common::chain::{Chain, ChainSpec, Source, chains};
use crate::common::convolution::{assert_adjoint, assert_all_exact, assert_errors};
use crate::common::{CASES, conv, images};
use effnetv2::backend::Activation;
use effnetv2::tensor::{Conv, ConvKind, Padding};
use proptest::prelude::*;

const BASE: Conv =
    Conv { kind: ConvKind::Depthwise, kernel: 3, stride: 1, padding: Padding::Same, inputs: 8, outputs: 8 };

#[test]
fn integers_are_exact() {
    let channels = [(1, 1), (3, 3), (8, 8), (16, 16), (17, 17), (40, 40)];
    // One pixel; sides below the kernel; two pixels; one row; odd and even.
    let images = [(1, 1, 1), (3, 1, 1), (1, 2, 2), (2, 2, 1), (1, 1, 7), (2, 5, 4), (1, 9, 8)];
    assert_all_exact(BASE, &[3, 5], &[1, 2], &channels, &images);
}

/// Shapes that the reference cuts: many images, many rows.
#[test]
fn integers_are_exact_across_cuts() {
    assert_all_exact(BASE, &[3, 5], &[1, 2], &[(5, 5)], &[(35, 3, 2), (1, 61, 47), (2, 2, 1100)]);
}

#[test]
fn misfits_are_errors() {
    assert_errors(BASE);
    assert_errors(Conv { stride: 2, ..BASE });
}

#[test]
fn threads_do_not_change_a_bit() {
    for (stride, source) in [(1, Source::Silu), (2, Source::Gated(5))] {
        let conv = Conv { stride, inputs: 21, outputs: 21, ..BASE };
        let (images, act) = ((19, 23, 37), Activation::Silu);
        let spec = ChainSpec { source, conv, images, act, skip: true, drop: Some(0.3), seed: 4 };
        let chain = Chain::new(spec);
        chain.assert_same_on_any_number_of_threads();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn directions_are_adjoint(conv in conv(ConvKind::Depthwise, 37), images in images(), seed: u64) {
        assert_adjoint(conv, images, seed);
    }

    #[test]
    fn gradients_are_those_of_finite_differences(spec in chains(ConvKind::Depthwise)) {
        Chain::new(spec).assert_gradients();
    }
}
