//! `bench libraries` on the host device, with libraries that `tests/fake_libraries` computes by loops.

mod devices;
mod runs;

use devices::{host_library, not_run};
use effnetv2::bench::libraries::{LibraryResult, Pass};
use effnetv2::bench::record::Report;
use runs::{Outcome, program};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;

/// The folder with both libraries; none without a compiler.
fn fakes() -> Option<&'static Path> {
    static FOLDER: OnceLock<Option<TempDir>> = OnceLock::new();
    let build = || {
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let folder = tempfile::tempdir().unwrap();
        for (source, library) in [("cublaslt", "libcublasLt.so"), ("cudnn", "libcudnn.so")] {
            let source = format!("{}/tests/fake_libraries/{source}.cpp", env!("CARGO_MANIFEST_DIR"));
            let mut command = Command::new(&compiler);
            command.args(["-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", &source, "-o"]);
            let Ok(output) = command.arg(folder.path().join(library)).output() else {
                not_run("the fake libraries need a C++ compiler (CXX, or c++ on the PATH)");
                return None;
            };
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        Some(folder)
    };
    FOLDER.get_or_init(build).as_ref().map(TempDir::path)
}

/// As little as a measurement can be, with `libraries` to be found and `mode` for them.
fn bench(here: &Path, libraries: &Path, mode: &str, args: &[&str]) -> Option<Outcome> {
    let device = format!("--device=host={}", host_library()?.display());
    let shared =
        ["bench", "libraries", "--rounds", "2", "--round-seconds", "0", "--warm-up", "0", "--out", "out"];
    let small = ["--model", "nano", "--size", "32", "--batch", "2", &device];
    let mut program = program(here, &[&shared[..], &small, args].concat());
    program.env("LD_LIBRARY_PATH", libraries).env("FAKE_LIBRARIES", mode);
    let outcome = Outcome::from(program.output().unwrap());
    assert!(!outcome.err.contains("panicked"), "{}", outcome.err);
    Some(outcome)
}

fn report(here: &Path) -> Report<LibraryResult> {
    let text = std::fs::read_to_string(here.join("out/libraries.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn every_pass_agrees_with_ours_and_is_timed() {
    let Some(fakes) = fakes() else { return };
    for dtype in ["f32", "tf32", "bf16"] {
        let folder = tempfile::tempdir().unwrap();
        let Some(Outcome { code, out, err }) = bench(folder.path(), fakes, "", &["--dtype", dtype]) else {
            return;
        };
        assert_eq!(code, Some(0), "{err}");
        let results = report(folder.path()).results;
        for pass in [Pass::Forward, Pass::Data, Pass::Weights, Pass::Backward] {
            assert!(results.iter().any(|result| result.pass == pass), "{pass:?}");
        }
        for kind in ["dense", "depthwise", "pointwise"] {
            assert!(results.iter().any(|result| result.layer.starts_with(kind)), "{kind}");
        }
        for result in &results {
            assert_eq!(result.error, None, "{result:?}");
            assert!(result.ratio().unwrap() > 0.0 && result.time.unwrap().rounds == 2, "{result:?}");
            let (library, algorithm) = (result.library.as_ref().unwrap(), result.algorithm.as_ref().unwrap());
            let expected = match result.layer.starts_with("pointwise") {
                true => ("cuBLASLt 13.2", "heuristic"),
                false => {
                    ("cuDNN 9.13", if result.pass == Pass::Forward { "implicit_precomp_gemm" } else { "1" })
                }
            };
            assert!(library == expected.0 && algorithm.contains(expected.1), "{result:?}");
        }
        assert!(out.contains("all calls of what both computed: ours") && out.contains("; 0 failed"), "{out}");
    }
}

/// An algorithm that computes something else is passed over; where all do there are no figures, and the rest goes on.
#[test]
fn what_computes_something_else_is_not_timed() {
    let Some(fakes) = fakes() else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some(outcome) = bench(folder.path(), fakes, "wrong", &[]) else { return };
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    for result in &report(folder.path()).results {
        let algorithm = result.algorithm.as_ref().unwrap();
        let second =
            algorithm.contains("heuristic 3") || algorithm.ends_with("gemm") || algorithm.contains('0');
        assert!(second && !algorithm.contains("precomp"), "{result:?}");
    }
    let outcome = bench(folder.path(), fakes, "all", &[]).unwrap();
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    for result in &report(folder.path()).results {
        assert!(result.error.as_ref().unwrap().contains("cannot agree with our kernels"), "{result:?}");
        assert_eq!((result.time, result.library_time), (None, None));
    }
    assert!(!outcome.out.contains("; 0 failed"), "{}", outcome.out);
}

#[test]
fn a_library_that_is_missing_is_told_in_a_line() {
    let Some(fakes) = fakes() else { return };
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path();
    let missing = |name: &str| format!("{name} cannot be opened: there is no lib");
    let Some(outcome) = bench(here, here, "", &[]) else { return };
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    for line in [missing("cuBLASLt"), missing("cuDNN"), "nothing can be measured".into()] {
        assert!(outcome.out.contains(&line), "{line}: {}", outcome.out);
    }
    assert!(!here.join("out").exists());
    std::fs::copy(fakes.join("libcublasLt.so"), here.join("libcublasLt.so")).unwrap();
    let outcome = bench(here, here, "", &[]).unwrap();
    assert!(outcome.out.contains(&missing("cuDNN")) && !outcome.out.contains(&missing("cuBLASLt")));
    assert!(report(here).results.iter().all(|result| result.layer.starts_with("pointwise")));
}

#[test]
fn a_limit_leaves_what_was_measured() {
    let Some(fakes) = fakes() else { return };
    let folder = tempfile::tempdir().unwrap();
    let Some(outcome) = bench(folder.path(), fakes, "", &["--limit", "0"]) else { return };
    assert_eq!(outcome.code, Some(0), "{}", outcome.err);
    assert!(outcome.out.contains("convolutions: the time was over"), "{}", outcome.out);
    // Whether a nanosecond has passed before the first or not.
    assert!(report(folder.path()).results.len() <= 4);
}

#[test]
fn the_cpu_runs_no_kernels() {
    let folder = tempfile::tempdir().unwrap();
    let outcome =
        Outcome::from(program(folder.path(), &["bench", "libraries", "--device", "cpu"]).output().unwrap());
    assert_eq!((outcome.code, outcome.out.as_str()), (Some(2), ""));
    assert!(outcome.err.contains("the CPU reference runs no kernels"), "{}", outcome.err);
}
