//! What a figure was measured on, as far as it can be known.

#[cfg(feature = "cuda")]
use crate::device::Device;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::process::Command;

/// The device that computed, and what drives it. What is unknown is left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// "cpu", "cuda", or "host" for a GPU's kernels on the CPU.
    pub device: String,
    /// The processor's or the GPU's name.
    pub name: String,
    /// The driver's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// Clocks of multiprocessors and memory and the power limit, as nvidia-smi states them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clocks: Option<String>,
    /// Threads of the CPU in use.
    pub threads: usize,
    /// Processors that ran something on average over the last minute, before the measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
}

impl Machine {
    /// The CPU.
    pub fn cpu() -> Self {
        let (device, name) = ("cpu".into(), processor().unwrap_or_else(|| "unknown CPU".into()));
        Self { device, name, driver: None, clocks: None, threads: rayon::current_num_threads(), load: load() }
    }

    /// A GPU, or the host device, whose kernels run on the CPU: what they take there says nothing of a GPU.
    #[cfg(feature = "cuda")]
    pub fn of(device: &Device) -> Self {
        let gpu = device.gpu();
        if device.is_host() {
            return Self { device: "host".into(), ..Self::cpu() };
        }
        let driver = ask_nvidia_smi(gpu.ordinal, "driver_version");
        let clocks = ask_nvidia_smi(gpu.ordinal, "clocks.sm,clocks.mem,power.limit");
        Self { device: "cuda".into(), name: gpu.name.clone(), driver, clocks, ..Self::cpu() }
    }
}

/// What nvidia-smi says of GPU `ordinal`, words and numbers with their units; none without it.
#[cfg(feature = "cuda")]
fn ask_nvidia_smi(ordinal: usize, fields: &str) -> Option<String> {
    let output = Command::new("nvidia-smi")
        .args([&format!("--id={ordinal}"), &format!("--query-gpu={fields}"), "--format=csv,noheader"])
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

/// The CPU's name; only Linux tells it simply.
fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn load() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split(' ').next()?.parse().ok()
}

/// The commit that this program was built from: what `EFFNETV2_COMMIT` says, or said when it was compiled, or else that
/// of the repository which the program still lies in.
pub fn commit() -> String {
    let said = std::env::var("EFFNETV2_COMMIT").ok();
    let said = said.or_else(|| option_env!("EFFNETV2_COMMIT").map(str::to_owned));
    if let Some(commit) = said.filter(|commit| !commit.is_empty()) {
        return commit;
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let lies_within = std::env::current_exe().is_ok_and(|program| program.starts_with(repository));
    lies_within.then(|| described(repository)).flatten().unwrap_or_else(|| "unknown".into())
}

/// The newest commit of a repository, with a note when files differ from it.
fn described(repository: &Path) -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").arg("-C").arg(repository).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() { commit } else { format!("{commit} and changes") })
}

/// The most memory that this process has held at once, in bytes, since its start or [`forget_peak`]; Linux only.
pub fn peak_resident() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// Makes [`peak_resident`] start anew, where the system allows it.
pub fn forget_peak() {
    // If it is refused the peak is that of the whole process, as its name says.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peak_is_seen_and_forgotten() {
        if !cfg!(target_os = "linux") {
            return;
        }
        forget_peak();
        let before = peak_resident().unwrap();
        drop(std::hint::black_box(vec![1_u8; 256 << 20]));
        let after = peak_resident().unwrap();
        assert!(after > before + (200 << 20), "{before} {after}");
        forget_peak();
        assert!(peak_resident().unwrap() < after - (100 << 20));
    }

    #[test]
    fn the_commit_of_this_repository_is_found() {
        // Tests lie in target/ of the repository, unless cargo was told otherwise.
        let commit = commit();
        assert!(commit == "unknown" || commit.len() >= 7, "{commit}");
        assert!(described(Path::new("/nonexistent")).is_none());
    }
}
