//! `effnetv2 bench` as its users meet it, on networks small enough for a test.

mod runs;

use effnetv2::bench::blocks::BlockResult;
use effnetv2::bench::fusion::FusionResult;
use effnetv2::bench::operations::OperationResult;
use effnetv2::bench::record::{Report, SCHEMA};
use effnetv2::bench::step::{Pass, StepResult};
use effnetv2::nn::BlockKind;
use runs::{effnetv2, succeed};
use serde::de::DeserializeOwned;
use std::fs;
use std::path::Path;

/// As little as a measurement can be.
const QUICK: [&str; 12] = [
    "--device",
    "cpu",
    "--rounds",
    "2",
    "--round-seconds",
    "0",
    "--warm-up",
    "0",
    "--threads",
    "1",
    "--out",
    "out",
];

/// What `bench` with `args` prints and records; the chart must be there too.
fn bench<R: DeserializeOwned>(args: &[&str]) -> (String, Report<R>) {
    let folder = tempfile::tempdir().unwrap();
    let text = succeed(folder.path(), &[&["bench"], args, &QUICK].concat());
    assert!(text.starts_with("device: CPU reference, 1 thread"), "{text}");
    // Columns that only a GPU fills must not be there.
    assert!(!text.contains("of floor") && !text.contains(" memory  "), "{text}");
    let out = folder.path().join("out");
    let svg = fs::read_to_string(out.join(format!("{}.svg", args[0]))).unwrap();
    assert!(svg.contains("</svg>") && svg.contains("<rect"));
    let json = fs::read_to_string(out.join(format!("{}.json", args[0]))).unwrap();
    assert!(!json.contains("of_floor") && !json.contains("bytes_per_second"), "{json}");
    let report: Report<R> = serde_json::from_str(&json).unwrap();
    assert_eq!((report.schema, report.machine.device.as_str(), report.machine.threads), (SCHEMA, "cpu", 1));
    assert_eq!(report.command[0], "bench");
    (text, report)
}

#[test]
fn blocks_are_measured_in_both_forms_and_the_crossover_is_told() {
    let (text, report) = bench::<BlockResult>(&[
        "blocks",
        "--models",
        "nano",
        "--size",
        "32",
        "--batch",
        "2",
        "--block",
        "8,16,4,5,2,6",
    ]);
    let results = report.results;
    // Six shapes of nano and the given one.
    assert_eq!(results.len(), 14);
    for pair in results.chunks(2) {
        assert_eq!(pair[0].place, pair[1].place);
        assert_eq!((pair[0].form, pair[1].form), (BlockKind::FusedMbConv, BlockKind::MbConv));
        assert!(pair.iter().all(|r| r.forward.median > 0.0 && r.forward.rounds == 2 && r.batch == 2));
    }
    assert_eq!(results[12].place.model, "given");
    for network in ["nano: ", "given: "] {
        let line = text.lines().find(|line| line.starts_with(network)).unwrap();
        assert!(line.contains("is the faster"), "{line}");
    }
    assert!(text.contains("8→16 ×4 k5 s2 @6") && text.contains("Fused-MBConv *"), "{text}");
}

#[test]
fn more_and_more_stages_are_fused() {
    let (text, report) = bench::<FusionResult>(&[
        "fusion", "--model", "nano", "--size", "32", "--batch", "2", "--kernel", "3",
    ]);
    assert_eq!(report.results.iter().map(|r| r.fused_stages).collect::<Vec<_>>(), [0, 3, 4]);
    let parameters: Vec<_> = report.results.iter().map(|r| r.step.parameters).collect();
    assert!(parameters.is_sorted(), "dense kernels are larger: {parameters:?}");
    assert!(text.contains("stages 1–3") && text.contains("over none"), "{text}");
    assert!(!text.contains("published"), "only B4 is the paper's");
}

#[test]
fn steps_are_measured_at_every_size() {
    let (text, report) = bench::<StepResult>(&[
        "step",
        "--model",
        "nano",
        "--size",
        "32,40",
        "--batch",
        "2",
        "--classes",
        "10",
        "--graph",
        "off",
    ]);
    let cases: Vec<_> = report.results.iter().map(|r| (r.size, r.pass)).collect();
    assert_eq!(
        cases,
        [(32, Pass::Training), (32, Pass::Inference), (40, Pass::Training), (40, Pass::Inference)]
    );
    for result in &report.results {
        assert!(result.images_per_second > 0.0 && result.parameters == 42_322, "{result:?}");
        assert!(!result.overlap, "nothing overlaps on the CPU");
        assert_eq!(result.peak_bytes.is_some(), cfg!(target_os = "linux"));
    }
    assert!(text.contains("peak memory") && text.contains("inference"), "{text}");
    let (_, report) = bench::<StepResult>(&[
        "step",
        "--model",
        "nano",
        "--size",
        "32",
        "--batch",
        "2",
        "--pass",
        "inference",
    ]);
    assert_eq!(report.results.len(), 1);
}

#[test]
fn operations_are_listed_by_their_share() {
    let (text, report) =
        bench::<OperationResult>(&["ops", "--model", "nano", "--size", "32", "--batch", "2", "--top", "3"]);
    assert!(report.results.len() > 20, "the JSON has all of them");
    assert!(text.contains("; --top shows more") && text.contains("ms a step in all"), "{text}");
    // Heading, rule and three rows between two empty lines.
    let table: Vec<_> = text.split("\n\n").nth(1).unwrap().lines().collect();
    assert_eq!(table.len(), 5, "{text}");
}

#[test]
fn wrong_requests_are_refused_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    for (args, says) in [
        (&["blocks", "--models", "huge"][..], &["model = huge", "nano"][..]),
        (&["blocks", "--size", "31"], &["--size = 31", "at least 32"]),
        (&["blocks", "--block", "8,8"], &["--block", "six whole numbers"]),
        (&["blocks", "--block", "8,12,4,3,1,8"], &["--block", "multiples of 8"]),
        (&["blocks", "--batch", "0"], &["--batch", "1..=65536"]),
        (&["blocks", "--rounds", "0"], &["--rounds"]),
        (&["step", "--round-seconds", "nan"], &["--round-seconds = NaN", "from 0 to 600"]),
        (&["step", "--warm-up", "601"], &["--warm-up = 601", "from 0 to 600"]),
        (&["step", "--ceiling", "4300"], &["--ceiling", "two positive numbers"]),
        (&["step", "--size", "32,8"], &["--size = 8", "at least 32"]),
        (&["step", "--pass", "backward"], &["'backward'", "training", "inference"]),
        (&["fusion", "--kernel", "5"], &["--kernel", "paper", "3"]),
        (&["fusion", "--model", "huge"], &["model = huge"]),
        (&["ops", "--model", "huge"], &["model = huge"]),
        (&["ops", "--top", "x"], &["--top"]),
        (&["nothing"], &["unrecognized subcommand", "nothing"]),
    ] {
        let outcome = effnetv2(folder.path(), &[&["bench"], args].concat());
        assert_eq!((outcome.code, outcome.out.as_str()), (Some(2), ""), "{args:?}: {}", outcome.err);
        for text in says {
            assert!(outcome.err.contains(text), "{args:?} should say {text:?}: {}", outcome.err);
        }
    }
    assert!(is_empty(folder.path()), "a refused request leaves no folder");
}

#[test]
fn a_folder_that_cannot_be_made_is_named() {
    let folder = tempfile::tempdir().unwrap();
    runs::write(folder.path(), "out", "a file");
    let args = ["bench", "step", "--model", "nano", "--out", "out/deeper"];
    let outcome = effnetv2(folder.path(), &args);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.err.contains("out/deeper: cannot create"), "{}", outcome.err);
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}
