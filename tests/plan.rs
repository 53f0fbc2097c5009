//! What a training step is planned to launch, move and take, which needs no device; and that it launches what was planned.

#![cfg(feature = "cuda")]

mod devices;

use devices::{again_on_a_gpu, device};
use effnetv2::backend::{Backend, Normalisation, PassKind, State, StepKey};
use effnetv2::bench::tune::{candidates, possible};
use effnetv2::data::MixPlan;
use effnetv2::device::{Device, Launched};
use effnetv2::kernels::fused::{Accelerated, Convolution, FusedElement, Planner};
use effnetv2::kernels::tuning::{Tuning, key};
use effnetv2::kernels::{Cost, Work};
use effnetv2::model::{Architecture, Dataflow, initial_values, traffic};
use effnetv2::nn::Network;
use effnetv2::optimizer::{Rule, Scalars, Step};
use effnetv2::tensor::{ConvKind, Dtype};
use half::{bf16, f16};
use std::sync::Arc;

const BATCH: usize = 256;

fn plan(model: &str, images: usize, side: usize, dtype: Dtype) -> (Network, Planner) {
    let architecture = Architecture::find(model).unwrap();
    let network = Network::new(architecture.network(1000));
    let mut planner = Planner::new(dtype);
    let kind = PassKind { images, side, dropout: architecture.dropout, first: true, last: true };
    network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
    (network, planner)
}

/// V2-S at 300 px in bf16: bytes within 10 % of the fused dataflow, and half of what PyTorch keeps.
#[test]
fn a_step_of_s_moves_and_keeps_little() {
    let (network, planner) = plan("s", BATCH, 300, Dtype::Bf16);
    let moved = planner.launches().iter().map(|work| work.cost).sum::<Cost>().bytes / BATCH as u64;
    let fused = traffic(network.spec(), 300, 2, Dataflow::Fused).moved;
    let eager = traffic(network.spec(), 300, 2, Dataflow::Eager).kept;
    let kept = planner.footprint().passes() / BATCH;
    println!("{moved} bytes of {fused} an image, {kept} kept of {eager}");
    assert!(moved as f64 <= 1.10 * fused as f64, "{moved} bytes moved, {fused} by the dataflow");
    assert!(kept <= eager as usize / 2, "{kept} bytes kept, {eager} in PyTorch");
}

#[test]
fn a_step_of_s_takes_few_launches() {
    let (_, planner) = plan("s", BATCH, 300, Dtype::Bf16);
    let launches = planner.launches().len() + planner.draw().iter().len();
    assert!(launches <= 450, "{launches} launches");
}

/// Every dense and pointwise convolution is a matrix product three times, for its output and both gradients; the classifier
/// likewise. The stem and depthwise convolutions are none.
#[test]
fn matrix_products_are_those_of_the_architecture() {
    let (images, side) = (8, 65);
    for model in ["nano", "b0", "s", "v1-b0"] {
        for dtype in [Dtype::F32, Dtype::Tf32, Dtype::F16, Dtype::Bf16] {
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

/// What the second step launches. The first makes the copy of the weights that convolutions read; later the optimizer
/// keeps it.
fn launched<T: FusedElement>(
    mut backend: Accelerated<T>,
    network: &Network,
    kind: PassKind,
) -> Vec<Launched> {
    let (device, layout) = (backend.device().clone(), network.layout());
    backend.prepare(|backend| network.rehearse_training(backend, kind, Rule::PAPER)).unwrap();
    let (params, stats) = initial_values::<f32>(layout, 0);
    let mut state = State::new(&backend, Rule::PAPER, params, stats).unwrap();
    let images = vec![100; kind.images * kind.side * kind.side * 3];
    let targets = vec![1.0 / network.spec().classes as f32; kind.images * network.spec().classes];
    for number in 0..2 {
        let step = Step { number, learning_rate: 1e-3, weight_decay: 1e-5, gradient_scale: 1.0 };
        device.log_launches();
        backend.send(&images, kind.side).unwrap();
        backend.begin_step(&StepKey { images: vec![0; kind.images], ..StepKey::default() }).unwrap();
        backend.begin_pass(&Normalisation::HALF, &MixPlan::none(kind.images)).unwrap();
        backend.set_targets(&targets).unwrap();
        let scalars = Scalars::plain(step);
        backend.begin_update(Rule::PAPER, &scalars, layout.param_buffer(), &layout.decayed()).unwrap();
        backend
            .perform(kind, &mut state, |backend, state| network.training_pass(backend, kind, state))
            .unwrap();
    }
    device.take_launches()
}

/// What a step launches by plan.
fn planned(
    network: &Network,
    kind: PassKind,
    dtype: Dtype,
    tuning: Option<&Arc<Tuning>>,
) -> (Planner, Vec<Work>) {
    let mut planner = Planner::new(dtype);
    if let Some(tuning) = tuning {
        planner = planner.tuned(Arc::clone(tuning));
    }
    network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
    let works = planner.draw().into_iter().chain(planner.launches().iter().cloned()).collect();
    (planner, works)
}

/// A step launches what was planned, in that order, and nothing else.
fn check_launches<T: FusedElement>(device: &Device, model: &str, images: usize) {
    check_launches_of(Accelerated::<T>::new(device, false).unwrap(), model, images);
}

fn check_launches_of<T: FusedElement>(backend: Accelerated<T>, model: &str, images: usize) {
    let dtype = backend.dtype();
    let network = Network::new(Architecture::find(model).unwrap().network(10));
    let kind = PassKind { images, side: 32, dropout: 0.2, first: true, last: true };
    let (_, by_rule) = planned(&network, kind, dtype, None);
    compare(model, dtype, &by_rule, &launched(backend, &network, kind));
}

/// The same with everything chosen that can be: once all first choices, once all last.
fn check_choices<T: FusedElement>(device: &Device, model: &str, images: usize) {
    let network = Network::new(Architecture::find(model).unwrap().network(10));
    let kind = PassKind { images, side: 32, dropout: 0.2, first: true, last: true };
    let (planner, by_rule) = planned(&network, kind, T::DTYPE, None);
    for last in [false, true] {
        let mut tuning = Tuning::of(device, "test".into()).unwrap();
        for candidate in candidates(planner.convolutions(), T::DTYPE) {
            let possible = possible(&candidate, T::DTYPE).unwrap();
            let Some(choice) = (if last { possible.last() } else { possible.first() }) else { continue };
            let Convolution { conv, x, .. } = candidate.convolution;
            tuning.add(key(&conv, x, T::DTYPE, candidate.launch), *choice, [1.0, 1.0]);
        }
        assert!(!tuning.launches.is_empty());
        let tuning = Arc::new(tuning);
        let (_, chosen) = planned(&network, kind, T::DTYPE, Some(&tuning));
        // In f32 there is one kernel for each, and cut as by the rule where there is so little work.
        assert!(chosen != by_rule || T::DTYPE == Dtype::F32, "{model}: nothing was chosen");
        let backend = Accelerated::<T>::new(device, false).unwrap().tuned(Some(tuning));
        compare(model, T::DTYPE, &chosen, &launched(backend, &network, kind));
    }
}

fn compare(model: &str, dtype: Dtype, planned: &[Work], launched: &[Launched]) {
    for (i, (work, launched)) in planned.iter().zip(launched).enumerate() {
        assert!(work.is(launched), "{model}, {dtype} {i}: {work:?} was planned, {launched} launched");
    }
    assert_eq!(planned.len(), launched.len(), "{model}, {dtype}");
}

#[test]
fn what_is_planned_is_launched() {
    let Some(device) = device() else { return };
    check_launches::<f32>(&device, "nano", 3);
    check_launches_of(Accelerated::in_tf32(&device, false).unwrap(), "nano", 3);
    check_launches::<f16>(&device, "nano", 3);
    check_launches::<bf16>(&device, "nano", 4);
    // Every kind of block there is, with kernels of 5×5 among them.
    check_launches::<bf16>(&device, "v1-b0", 2);
    check_launches::<bf16>(&device, "b0", 2);
}

#[test]
fn what_is_chosen_is_launched() {
    let Some(device) = device() else { return };
    check_choices::<f32>(&device, "nano", 3);
    check_choices::<f16>(&device, "nano", 3);
    check_choices::<bf16>(&device, "nano", 4);
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
