//! Tuning: every way to launch a convolution computes the same, and files of choices are written, used and refused.

#![cfg(feature = "cuda")]

mod devices;
mod runs;

use devices::{again_on_a_gpu, device, host_library};
use effnetv2::backend::PassKind;
use effnetv2::bench::timing::Effort;
use effnetv2::bench::tune::{Candidate, TuneResult, candidates, measure, possible};
use effnetv2::device::Device;
use effnetv2::kernels::depthwise::{BackwardKind, DepthwiseShape};
use effnetv2::kernels::fused::{Convolution, ConvolutionPass, FusedElement, Planner};
use effnetv2::kernels::tuning::{Choice, Choices, Launch, Tuning};
use effnetv2::kernels::{GradientKind, InputKind, OutputKind};
use effnetv2::model::Architecture;
use effnetv2::nn::Network;
use effnetv2::optimizer::Rule;
use effnetv2::tensor::{Conv, ConvKind, Dtype, Padding, Shape};
use half::{bf16, f16};
use runs::{ON_IMAGES, effnetv2, images, succeed};
use std::collections::BTreeSet;
use std::path::Path;

const QUICK: Effort = Effort { rounds: 1, round_seconds: 0.0, warm_up_seconds: 0.0 };

/// Measures everything of a step, which compares every way with the rule.
fn check<T: FusedElement>(
    device: &Device,
    model: &str,
    dtype: Dtype,
    images: usize,
    side: usize,
) -> Vec<TuneResult> {
    let network = Network::new(Architecture::find(model).unwrap().network(10));
    let results = check_all::<T>(device, &network, dtype, images, side);
    for launch in [Launch::Fprop, Launch::Dgrad, Launch::Wgrad, Launch::Backward] {
        assert!(results.iter().any(|result| result.launch.starts_with(launch.name())), "{launch:?}");
    }
    results
}

fn check_all<T: FusedElement>(
    device: &Device,
    network: &Network,
    dtype: Dtype,
    images: usize,
    side: usize,
) -> Vec<TuneResult> {
    let mut planner = Planner::new(dtype);
    let kind = PassKind { images, side, dropout: 0.0, first: true, last: true };
    network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
    let candidates = candidates(planner.convolutions(), dtype);
    let mut results = Vec::new();
    for candidate in &candidates {
        let result = measure::<T>(device, candidate, dtype, QUICK).unwrap();
        let most = possible(candidate, dtype).unwrap().len();
        assert!((1..=1 + most).contains(&result.ways.len()), "{result:?}");
        for way in &result.ways {
            assert_eq!(way.error, None, "{}: {way:?}", result.launch);
            assert!(way.time.is_some() && !way.kernel.is_empty() && way.blocks > 0, "{way:?}");
        }
        assert_eq!(result.ways[0].choice, "rule");
        check_distinct(candidate, dtype, &result);
        results.push(result);
    }
    results
}

/// Of a depthwise convolution no two ways are one launch, and none is left out.
fn check_distinct(candidate: &Candidate, dtype: Dtype, result: &TuneResult) {
    let Candidate { convolution: Convolution { conv, x, .. }, launch, .. } = candidate;
    let Ok(shape) = DepthwiseShape::new(conv, *x, dtype) else { return };
    let launched = |choice: &str| {
        let shape = shape.with(Choices::only(*launch, choice.parse().unwrap())).unwrap();
        let work = match launch {
            Launch::Fprop => shape.fprop_work(true, OutputKind::Moments),
            _ => shape.backward_work(false, BackwardKind::Silu),
        };
        (work.kernel, work.grid, shape.cut(*launch))
    };
    let tried: Vec<_> = result.ways.iter().map(|way| launched(&way.choice)).collect();
    let all = possible(candidate, dtype).unwrap().into_iter().chain([Choice::default()]);
    let all: BTreeSet<_> = all.map(|choice| launched(&choice.to_string())).collect();
    assert_eq!((tried.len(), tried.into_iter().collect()), (all.len(), all), "{result:?}");
}

fn several(results: &[TuneResult], launch: &str) -> bool {
    results.iter().any(|result| result.launch.starts_with(launch) && result.ways.len() > 1)
}

#[test]
fn every_way_computes_what_the_rule_does() {
    let Some(device) = device() else { return };
    let results = check::<bf16>(&device, "nano", Dtype::Bf16, 2, 32);
    for launch in ["fprop", "dgrad", "backward"] {
        assert!(several(&results, &format!("{launch} bf16")), "{launch} has one way");
    }
    let mut kernels = vec!["depthwise_backward_3x3_s1_bf16", "depthwise_backward_3x3_s1c5_bf16"];
    if device.has_wgmma() {
        kernels.extend(["pointwise_fprop_wgmma", "pointwise_fprop_tma", "pointwise_backward_wgmma"]);
    }
    for kernel in kernels {
        let tried = results.iter().flat_map(|result| &result.ways).any(|way| way.kernel.starts_with(kernel));
        assert!(tried, "{kernel} was not tried");
    }
    check::<f16>(&device, "nano", Dtype::F16, 3, 36);
    check::<f32>(&device, "nano", Dtype::F32, 2, 32);
    check::<f32>(&device, "nano", Dtype::Tf32, 2, 32);
}

/// With many pixels grids are cut in several ways.
#[test]
fn every_cut_computes_what_the_rule_does() {
    let Some(device) = device() else { return };
    let conv = |kind, inputs| Conv {
        kind,
        kernel: if kind == ConvKind::Pointwise { 1 } else { 3 },
        stride: 1,
        padding: Padding::Same,
        inputs,
        outputs: inputs,
    };
    let forward = ConvolutionPass::Forward(OutputKind::Moments);
    let backward = |output| ConvolutionPass::Backward { gated: false, output: Some(output) };
    let plain = GradientKind::Plain { skip: true };
    let (dense, depthwise) = (conv(ConvKind::Dense, 8), conv(ConvKind::Depthwise, 64));
    let pointwise = conv(ConvKind::Pointwise, 8);
    let (small, large) = (Shape::new(16, 64, 64, 64), Shape::new(4, 96, 96, 8));
    // As many blocks for strips of four rows, two a slot, as for strips of eight, one a slot.
    let (few, flat) = (conv(ConvKind::Depthwise, 8), Shape::new(64, 24, 24, 8));
    for (conv, x, input, pass, launch) in [
        (depthwise, small, InputKind::Silu, forward, Launch::Fprop),
        (depthwise, small, InputKind::Silu, backward(GradientKind::Silu), Launch::Backward),
        (few, flat, InputKind::Silu, backward(GradientKind::Silu), Launch::Backward),
        (dense, Shape::new(2, 32, 32, 8), InputKind::Plain, backward(plain), Launch::Wgrad),
        (pointwise, large, InputKind::Plain, forward, Launch::Fprop),
        (pointwise, large, InputKind::Plain, backward(plain), Launch::Backward),
    ] {
        let convolution = Convolution { conv, x, input, pass };
        let candidate = Candidate { convolution, launch, calls: 1 };
        let result = measure::<bf16>(&device, &candidate, Dtype::Bf16, QUICK).unwrap();
        check_distinct(&candidate, Dtype::Bf16, &result);
        let blocks: BTreeSet<u32> = result.ways.iter().map(|way| way.blocks).collect();
        assert!(blocks.len() > 1, "{result:?}");
        assert!(result.ways.len() > 3 || launch != Launch::Wgrad, "{result:?}");
        assert!(result.ways.iter().all(|way| way.error.is_none()), "{result:?}");
    }
}

#[test]
fn what_is_none_of_the_ways_is_refused() {
    let network = Network::new(Architecture::find("nano").unwrap().network(10));
    let mut planner = Planner::new(Dtype::Bf16);
    let kind = PassKind { images: 2, side: 32, dropout: 0.0, first: true, last: true };
    network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tuning.json");
    let Some(device) = device() else { return };
    let mut tuning = Tuning::of(&device, "test".into()).unwrap();
    let key = "fprop bf16: pointwise 1×1 32→16, 2 of 8×8";
    tuning.add(key.into(), Choice::default().columns(96), [1.0, 1.0]);
    tuning.write(&path).unwrap();
    let mut planner = Planner::new(Dtype::Bf16).tuned(Tuning::read(&path).unwrap());
    let message = network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap_err().to_string();
    assert!(message.contains("a tuning chooses `columns=96` for fprop, which can only be"), "{message}");
}

/// `--device host=LIBRARY`.
fn host() -> Option<String> {
    Some(format!("--device=host={}", host_library()?.display()))
}

const QUICKLY: [&str; 6] = ["--rounds", "1", "--round-seconds", "0", "--warm-up", "0"];

fn tune(here: &Path, host: &str, size: &str) -> String {
    let args = ["bench", "tune", "nano", "--size", size, "--batch", "2", "--record", "all.json", host];
    succeed(here, &[&args[..], &QUICKLY].concat())
}

#[test]
fn a_file_is_written_extended_and_used() {
    let Some(host) = host() else { return };
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    images(&here.join("data"));
    let out = tune(here, &host, "32");
    assert!(out.contains("choices in tuning.json") && out.contains("ms by the rules"), "{out}");
    let path = here.join("tuning.json");
    let first = Tuning::read(&path).unwrap();
    let out = succeed(
        here,
        &["bench", "tune", "nano", "--size", "32", "--limit", "0", "--out", "none.json", &host],
    );
    assert!(out.contains("only 0 of ") && out.contains("0 choices in none.json"), "{out}");
    let out = tune(here, &host, "32,40");
    let both = Tuning::read(&path).unwrap();
    assert!(first.launches.keys().all(|key| both.launches.contains_key(key)), "{out}");
    assert!(std::fs::read_to_string(here.join("all.json")).unwrap().contains("\"ways\""));

    // Whatever was the fastest here: with one pass in every backward the launches are certainly others.
    let changed = both.launches.keys().find(|key| key.starts_with("backward bf16: pointwise")).cloned();
    let key = changed.unwrap_or_else(|| "backward bf16: pointwise 1×1 32→64, 2 of 4×4".into());
    let mut chosen = (*both).clone();
    chosen.add(key, "one-pass".parse().unwrap(), [2.0, 1.0]);
    chosen.write(&path).unwrap();
    let plan = |more: &[&str]| {
        let args = ["plan", "nano", "--batch", "2", "--size", "32", "--classes", "10"];
        succeed(here, &[&args[..], more].concat())
    };
    let (by_rule, tuned) = (plan(&[]), plan(&["--tuning", "tuning.json"]));
    assert!(tuned.contains("launches tuned for effnetv2 host device by tuning.json"), "{tuned}");
    assert_ne!(by_rule, tuned.split_once('\n').unwrap().1);

    let train = |more: &[&str]| {
        let out = succeed(here, &[&ON_IMAGES[..], &[&host], more].concat());
        std::fs::remove_dir_all(here.join("run")).unwrap();
        out
    };
    let line = train(&["--tuning", "tuning.json"]).lines().next().unwrap().to_owned();
    assert!(line.contains("launches tuned by tuning.json, so the last bits are its own"), "{line}");
    assert!(!train(&[]).contains("tuned"));
    let step = ["bench", "step", "--model", "nano", "--size", "32", "--batch", "2", &host, "--out", "step"];
    let out = succeed(here, &[&step[..], &QUICKLY, &["--tuning", "tuning.json"]].concat());
    assert!(out.contains("tuned by tuning.json"), "{out}");
}

#[test]
fn a_file_for_something_else_is_refused() {
    let Some(host) = host() else { return };
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    tune(here, &host, "32");
    let text = std::fs::read_to_string(here.join("tuning.json")).unwrap();
    let step = ["bench", "step", "--model", "nano", "--size", "32", "--batch", "2", "--out", "step"];
    let refuse = |from: &str, to: &str, device: &str, says: &str| {
        assert!(text.contains(from), "{text}");
        runs::write(here, "other.json", &text.replacen(from, to, 1));
        let outcome = effnetv2(here, &[&step[..], &[device, "--tuning", "other.json"]].concat());
        assert!(outcome.code != Some(0) && outcome.err.contains(says), "{}", outcome.err);
    };
    refuse("effnetv2 host device", "NVIDIA H200", &host, "other.json: was measured on NVIDIA H200");
    refuse("\"driver\": \"", "\"driver\": \"9", &host, "with a driver of CUDA 9");
    refuse("\"schema\": 1", "\"schema\": 2", &host, "other.json: is a tuning of effnetv2");
    refuse("{", "[", &host, "other.json: is no tuning");
    refuse("{", "{", "--device=cpu", "the CPU reference launches no kernels that could be tuned");
    // Nothing is overwritten that is no tuning, or one for another GPU.
    runs::write(here, "tuning.json", &text.replacen("effnetv2 host device", "NVIDIA H200", 1));
    let args = ["bench", "tune", "nano", "--size", "32", "--batch", "2", &host];
    let outcome = effnetv2(here, &args);
    assert!(outcome.code == Some(1) && outcome.err.contains("NVIDIA H200"), "{}", outcome.err);
    let outcome = effnetv2(here, &[&args[..], &["--tuning", "tuning.json"]].concat());
    assert!(outcome.err.contains("this measures launches by the rules"), "{}", outcome.err);
    let outcome = effnetv2(here, &["bench", "tune", "nano", "--device", "cpu", "--out", "new.json"]);
    assert!(outcome.code == Some(2) && outcome.err.contains("runs no kernels"), "{}", outcome.err);
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
