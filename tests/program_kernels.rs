//! The program on a device: what it says it computes on, runs that change devices, and memory that does not suffice.

#![cfg(feature = "cuda")]

mod devices;
mod runs;

use devices::host_library;
use effnetv2::backend::PassKind;
use effnetv2::kernels::fused::Planner;
use effnetv2::model::Architecture;
use effnetv2::nn::Network;
use effnetv2::optimizer::Rule;
use effnetv2::tensor::Dtype;
use runs::{ON_IMAGES, Outcome, effnetv2, images, program, succeed};
use std::path::Path;
use tempfile::TempDir;

fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    images(&folder.path().join("data"));
    folder
}

/// `--device host=LIBRARY`.
fn host() -> Option<String> {
    Some(format!("--device=host={}", host_library()?.display()))
}

/// Runs the program, which must end with `code` and say all of `says` on standard error.
fn fail(folder: &Path, args: &[&str], code: i32, says: &[&str]) {
    let Outcome { code: found, err, .. } = effnetv2(folder, args);
    assert_eq!(found, Some(code), "{args:?}: {err}");
    for text in says {
        assert!(err.contains(text), "{args:?} should say {text:?}: {err}");
    }
}

#[test]
fn the_first_line_says_what_computes_and_why() {
    let folder = folder();
    let here = folder.path();
    let first = |more: &[&str]| {
        let out = succeed(here, &[&ON_IMAGES[..], more].concat());
        std::fs::remove_dir_all(here.join("run")).unwrap();
        out.lines().next().unwrap().to_owned()
    };
    let cpu = first(&["--device", "cpu", "--threads", "2"]);
    assert_eq!(cpu, "device: CPU reference, 2 threads, f32; --device cpu");
    let Some(host) = host() else { return };
    for dtype in ["f32", "tf32", "f16", "bf16"] {
        let line = first(&[&host, "--dtype", dtype]);
        assert_eq!(
            line,
            format!("device: host device, the GPU's kernels on the CPU, {dtype}; --device host")
        );
    }
    assert!(first(&[&host]).contains(", bf16;"), "the default of a device");
    assert!(first(&[&host, "--overlap", "on"]).ends_with("; --device host; kernels overlap"));
}

/// A machine without a GPU computes on the CPU when nothing is asked of it, and says why.
#[test]
fn without_a_gpu_there_is_the_cpu() {
    let folder = folder();
    let here = folder.path();
    let on_gpu = effnetv2(here, &[&ON_IMAGES[..], &["--device", "cuda"]].concat());
    if on_gpu.code == Some(0) {
        devices::not_run("there is a GPU here");
        return;
    }
    assert!(on_gpu.err.starts_with("error: no "), "{}", on_gpu.err);
    let out = succeed(here, &[&ON_IMAGES[..], &["--device", "auto"]].concat());
    let line = out.lines().next().unwrap();
    assert!(line.contains(", f32; no GPU can be used: "), "{line}");
}

#[test]
fn a_wrong_device_is_told_what_would_work() {
    let folder = folder();
    let here = folder.path();
    let train = |more: &[&'static str]| [&ON_IMAGES[..], more].concat();
    fail(here, &train(&["--device", "gpu"]), 2, &["--device", "cuda:N", "host=LIBRARY"]);
    fail(here, &train(&["--device", "cpu", "--dtype", "bf16"]), 2, &["--dtype = bf16", "f32 alone"]);
    fail(here, &train(&["--device", "cpu", "--overlap", "on"]), 2, &["--overlap = on", "no kernels"]);
    fail(here, &train(&["--device", "host=no/such.so"]), 1, &["no/such.so", "kernels/host/build.sh"]);
    fail(
        here,
        &[&ON_IMAGES[..7], &["--batch", "auto", "--device", "cpu"]].concat(),
        2,
        &["--batch", "auto", "GPU"],
    );
    let mut command = program(here, &train(&["--device", "host"]));
    let outcome = Outcome::from(command.env_remove("EFFNETV2_HOST_DEVICE").output().unwrap());
    assert_eq!(outcome.code, Some(2), "{}", outcome.err);
    for text in ["--device = host", "kernels/host/build.sh", "EFFNETV2_HOST_DEVICE"] {
        assert!(outcome.err.contains(text), "{}", outcome.err);
    }
}

/// Begun on the device, gone on with on the CPU, evaluated and asked on either.
#[test]
fn a_run_changes_devices() {
    let Some(host) = host() else { return };
    let folder = folder();
    let here = folder.path();
    succeed(here, &[&ON_IMAGES[..], &[&host, "--dtype", "f32", "--checkpoint-every", "1"]].concat());
    let resumed = succeed(here, &["train", "--resume", "run", "--device", "cpu"]);
    assert!(resumed.contains("epochs are done"), "{resumed}");
    let resumed = succeed(here, &["train", "--resume", "run", &host]);
    assert!(resumed.lines().next().unwrap().contains(", f32;"), "the type of the checkpoint: {resumed}");
    let score = |device: &str| {
        let out = succeed(here, &["eval", "run", device]);
        out.lines().find(|line| line.starts_with("top-1")).unwrap().to_owned()
    };
    assert_eq!(score("--device=cpu"), score(&host));
    let predict = |device: &str, more: &[&str]| {
        let args = [&["predict", "run", "data/val/red/0.png", device], more].concat();
        succeed(here, &args)
    };
    assert_eq!(predict("--device=cpu", &[]), predict(&host, &[]));
    assert!(predict(&host, &["--dtype", "f16"]).starts_with("data/val/red/0.png\n"));
}

/// Memory for five images a pass: eight are refused with what is needed, what is free and what would fit; `--batch auto`
/// takes the largest batch, and that trains.
#[test]
fn too_large_a_batch_is_told_what_fits() {
    let Some(host) = host() else { return };
    let folder = folder();
    let here = folder.path();
    let network = Network::new(Architecture::find("nano").unwrap().network(2));
    let needed = |images| {
        let mut planner = Planner::new(Dtype::Bf16);
        let kind = PassKind { images, side: 256, dropout: 0.2, first: true, last: true };
        network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
        network.rehearse_evaluation(&mut planner, images, 256).unwrap();
        let footprint = planner.footprint();
        footprint.passes() + footprint.buffers
    };
    let memory = (needed(5) + needed(6)) / 2;
    let train = |batch: &'static str| {
        let mut command = program(
            here,
            &[
                "train",
                "--model",
                "nano",
                "--data",
                "data",
                "--size",
                "256",
                "--first-size",
                "256",
                "--batch",
                batch,
                "--epochs",
                "1",
                "--out",
                batch,
                &host,
            ],
        );
        Outcome::from(command.env("EFFNETV2_HOST_MEMORY", memory.to_string()).output().unwrap())
    };
    let refused = train("8");
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for text in ["8 images a pass", "GiB", "are free", "5 images a pass fit", "--batch 5", "--accumulate"] {
        assert!(refused.err.contains(text), "{text}: {}", refused.err);
    }
    assert!(!here.join("8").exists(), "nothing was written");
    let auto = train("auto");
    assert_eq!(auto.code, Some(0), "{auto:?}");
    assert!(auto.out.contains("batch: 5 images a step, 5 a pass are the most that fit"), "{}", auto.out);
}
