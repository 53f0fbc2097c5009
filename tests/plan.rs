//! What a training step is planned to launch, move and take; no device is needed.

#![cfg(feature = "cuda")]

use effnetv2::backend::PassKind;
use effnetv2::kernels::Cost;
use effnetv2::kernels::fused::Planner;
use effnetv2::model::{Architecture, Dataflow, traffic};
use effnetv2::nn::Network;
use effnetv2::optimizer::Rule;
use effnetv2::tensor::{ConvKind, Dtype};

const BATCH: usize = 256;

fn plan(model: &str, images: usize, side: usize, dtype: Dtype) -> (Network, Planner) {
    let architecture = Architecture::find(model).unwrap();
    let network = Network::new(architecture.network(1000));
    let mut planner = Planner::new(dtype);
    let kind = PassKind { images, side, dropout: architecture.dropout, first: true, last: true };
    network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
    (network, planner)
}

/// V2-S at 300 px in bf16: bytes within 15 % of the fused dataflow, half of what PyTorch keeps, and few launches.
#[test]
fn a_step_of_s_moves_keeps_and_launches_little() {
    let (network, planner) = plan("s", BATCH, 300, Dtype::Bf16);
    let launches = planner.launches().len() + 1;
    let moved = planner.launches().iter().map(|work| work.cost).sum::<Cost>().bytes / BATCH as u64;
    let fused = traffic(network.spec(), 300, 2, Dataflow::Fused).moved;
    let eager = traffic(network.spec(), 300, 2, Dataflow::Eager).kept;
    let kept = planner.footprint().passes() / BATCH;
    println!("{launches} launches, {moved} bytes of {fused} an image, {kept} kept of {eager}");
    assert!(planner.draw().is_some(), "stochastic depth is drawn");
    assert!(launches <= 450, "{launches} launches");
    assert!(moved as f64 <= 1.15 * fused as f64, "{moved} bytes moved, {fused} by the dataflow");
    assert!(kept <= eager as usize / 2, "{kept} bytes kept, {eager} in PyTorch");
}

/// Every dense and pointwise convolution is a matrix product three times, for its output and both gradients; the classifier
/// likewise. The stem and depthwise convolutions are none.
#[test]
fn matrix_products_are_those_of_the_architecture() {
    let (images, side) = (8, 65);
    for model in ["nano", "b0", "s", "v1-b0"] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let (network, planner) = plan(model, images, side, dtype);
            let (mut side, mut macs) = (side, network.spec().head * network.spec().classes);
            for layer in network.convolutions() {
                let conv = &layer.conv;
                side = conv.output_side(side);
                if conv.kind != ConvKind::Depthwise && conv.inputs != 3 {
                    macs += side * side * conv.macs_per_pixel();
                }
            }
            let planned: Cost = planner.launches().iter().map(|work| work.cost).sum();
            assert_eq!(planned.tensor_operations, (3 * 2 * images * macs) as u64, "{model}, {dtype}");
        }
    }
}

/// A step of two passes: the weights move in the second alone.
#[test]
fn only_the_last_pass_of_a_step_moves_the_weights() {
    let network = Network::new(Architecture::find("nano").unwrap().network(10));
    let launches = |last| {
        let mut planner = Planner::new(Dtype::Bf16);
        let kind = PassKind { images: 4, side: 32, dropout: 0.0, first: true, last };
        network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
        planner.launches().iter().map(|work| work.kernel.clone()).collect::<Vec<_>>()
    };
    let (without, with) = (launches(false), launches(true));
    let update =
        ["optimizer_norm_partial", "optimizer_norm_finish", "optimizer_rmsprop_bf16", "optimizer_average"];
    assert_eq!(with, [without, update.map(String::from).into()].concat());
}
