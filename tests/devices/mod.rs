//! Where device tests run: on the host device, and once more on a GPU if there is one.
//!
//! A process has one driver, so the GPU gets a process of its own: [`again_on_a_gpu`] starts the test program again with
//! `EFFNETV2_TEST_DEVICE=cuda`. What cannot run says so in one line on standard error, past the test harness, which would
//! swallow it. `EFFNETV2_HOST_DEVICE` names a host device that is built already; `EFFNETV2_REQUIRE_GPU=1` makes a
//! missing GPU a failure. Test programs that were carried elsewhere (`benches/bundle.sh`) are told where their files are by
//! `EFFNETV2_TEST_GOLDENS` (tests/goldens) and `EFFNETV2_TEST_PROGRAM` (the program).

#![allow(dead_code, reason = "each test program uses a part")]

use effnetv2::Error;
use effnetv2::device::Device;
use proptest::prelude::ProptestConfig;
use std::env;
use std::fs::{self, File};
use std::io::{Write, stderr};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The device to test on; none, with a line that says why, where there is none. Launches on the host device overlap, so
/// that every test of a kernel proves that it waits for its predecessors.
pub(crate) fn device() -> Option<Device> {
    if on_gpu() {
        return gpu();
    }
    let device = Device::host(host_library()?).unwrap();
    device.set_overlapping(true).unwrap();
    Some(device)
}

/// The device, with no other test of this program on it: while one records a graph, a driver refuses much to all, and the
/// settings of the host device are everybody's.
pub(crate) fn device_alone() -> Option<(Device, MutexGuard<'static, ()>)> {
    static ALONE: Mutex<()> = Mutex::new(());
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    Some((device()?, alone))
}

fn on_gpu() -> bool {
    env::var("EFFNETV2_TEST_DEVICE").is_ok_and(|device| device == "cuda")
}

fn gpu() -> Option<Device> {
    match Device::cuda(0) {
        Ok(device) => Some(device),
        Err(
            error @ (Error::NoDriver(_)
            | Error::NoGpu { .. }
            | Error::NoKernels { .. }
            | Error::OldDriver { .. }
            | Error::OldGpu { .. }),
        ) if env::var_os("EFFNETV2_REQUIRE_GPU").is_none() => {
            not_run(&error.to_string());
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// The library of the host device, built when first asked for.
pub(crate) fn host_library() -> Option<&'static Path> {
    static LIBRARY: OnceLock<Option<PathBuf>> = OnceLock::new();
    LIBRARY.get_or_init(build_host_device).as_deref()
}

fn build_host_device() -> Option<PathBuf> {
    if let Some(path) = env::var_os("EFFNETV2_HOST_DEVICE") {
        return Some(path.into());
    }
    let compiler = env::var_os("CXX").unwrap_or_else(|| "c++".into());
    if !cfg!(target_os = "linux") || Command::new(&compiler).arg("--version").output().is_err() {
        not_run("the host device needs Linux and a C++ compiler (CXX, or c++ on the PATH)");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/host/build.sh");
    if !script.exists() {
        not_run(
            "the host device is built from sources that are not here (EFFNETV2_HOST_DEVICE names a built one)",
        );
        return None;
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("host-device");
    fs::create_dir_all(&folder).unwrap();
    // Other test programs may be about to build it, too.
    let lock = File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    let output = Command::new(script).arg("--out").arg(&folder).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(folder.join("libcuda.so.1"))
}

/// Runs every other test of this program on a GPU.
pub(crate) fn again_on_a_gpu(this_test: &str) {
    if on_gpu() {
        return;
    }
    let mut program = Command::new(env::current_exe().unwrap());
    program.args(["--test-threads=1", "--skip", this_test]).env("EFFNETV2_TEST_DEVICE", "cuda");
    let output = program.output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "on the GPU:\n{out}\n{err}");
    match err.lines().find_map(|line| line.strip_prefix("not run: ")) {
        Some(reason) => not_run(&format!("{} on a GPU: {reason}", env!("CARGO_CRATE_NAME"))),
        None => say(&format!("{}: all tests passed on a GPU, too", env!("CARGO_CRATE_NAME"))),
    }
}

/// How many random cases a property is tried on: `PROPTEST_CASES`, or `cases` where it is not set.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    let default = ProptestConfig::default();
    match env::var_os("PROPTEST_CASES") {
        Some(_) => default,
        None => ProptestConfig { cases, ..default },
    }
}

/// The schedules on which a test looks for what the first, 0, gave: `EFFNETV2_TEST_SCHEDULES` are all of them, three where it
/// is not set. Sanitizers get one, for to do the same again shows them no other access.
pub(crate) fn other_schedules() -> Range<u64> {
    let count =
        env::var("EFFNETV2_TEST_SCHEDULES").map(|count| count.parse().expect("a number of schedules"));
    1..count.unwrap_or(3)
}

/// Says why a test did not run.
pub(crate) fn not_run(reason: &str) {
    say(&format!("not run: {reason}"));
}

/// A line past the test harness.
pub(crate) fn say(line: &str) {
    stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}
