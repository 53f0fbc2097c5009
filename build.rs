//! Compiles each `kernels/*.cu` to one fat binary and embeds it.
//!
//! Only the standard library, no network, and no look at the GPUs of this machine: what is built depends on the sources,
//! the toolkit and `EFFNETV2_CUDA_ARCHS` alone. Without nvcc the crate still builds, without embedded kernels; then
//! `src/device` says so when a GPU is asked for. `embedded.rs` in `OUT_DIR` is what the crate includes; beside
//! it `<family>.ptxas` holds the assembler's report (registers, spills) of the very images that are embedded.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;
use std::{env, fs, thread};

/// The images of every fat binary: one for each generation of GPUs since Ampere, and PTX for those to come. `90a` fits
/// sm_90 alone, which is what Hopper's own matrix instructions ask for.
const ARCHS: &str = "80,86,89,90a,100,120,80+ptx";

const VARIABLES: [&str; 8] = [
    "NVCC",
    "CUDA_HOME",
    "CUDA_PATH",
    "PATH",
    "VIRTUAL_ENV",
    "EFFNETV2_CUDA_ARCHS",
    "EFFNETV2_REQUIRE_CUDA",
    "DOCS_RS",
];

const REMEDY: &str = "install the CUDA toolkit 12.8 or later, or, in a Python virtual environment, `pip install \
                      nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
                      nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85`";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            for line in message.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    // A new kernel family is listed there.
    println!("cargo::rerun-if-changed=src/kernels/mod.rs");
    for variable in VARIABLES {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set: run this through cargo")?);
    let required = env::var("EFFNETV2_REQUIRE_CUDA").is_ok_and(|value| !value.is_empty() && value != "0");
    if env::var_os("DOCS_RS").is_some() {
        return embed_nothing(&out);
    }
    let mut searched = Vec::new();
    let Some(nvcc) = find_nvcc(&mut searched)? else {
        if required {
            let places: Vec<_> = searched.iter().map(|place| format!("  {place}")).collect();
            let places = places.join("\n");
            return Err(format!(
                "EFFNETV2_REQUIRE_CUDA is set, but there is no nvcc in\n{places}\nTo mend it, {REMEDY}."
            ));
        }
        println!(
            "cargo::warning=no nvcc found: built without GPU kernels, everything else works. For the GPU, {REMEDY}; \
             to be asked no more, build without the feature `cuda`."
        );
        return embed_nothing(&out);
    };
    let sources = sources()?;
    for source in &sources {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    let toolkit = Toolkit::of(nvcc)?;
    // For the tests, which ask the same compiler about argument types.
    println!("cargo::rustc-env=EFFNETV2_NVCC={}", toolkit.nvcc.display());
    let archs = toolkit.architectures()?;
    compile_all(&toolkit, &archs, &sources, &out)?;
    embed(&out, &toolkit, &archs, &sources)
}

/// `kernels/*.cu`, sorted; none is fine.
fn sources() -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir("kernels").map_err(|e| format!("kernels: cannot read the folder: {e}"))?;
    let mut sources: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.sort();
    Ok(sources)
}

/// The first nvcc, in the order of the documentation; `searched` names every place that was looked at.
fn find_nvcc(searched: &mut Vec<String>) -> Result<Option<PathBuf>, String> {
    let file = if cfg!(windows) { "nvcc.exe" } else { "nvcc" };
    if let Some(path) = env::var_os("NVCC").filter(|path| !path.is_empty()) {
        let path = PathBuf::from(path);
        let shown = path.display();
        return match path.is_file() {
            true => Ok(Some(path)),
            false => Err(format!("NVCC = {shown}: there is no such file; correct it or unset it")),
        };
    }
    let variables = ["NVCC", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV"];
    let unset = variables.into_iter().filter(|variable| env::var_os(variable).is_none());
    searched.extend(unset.map(|variable| format!("{variable}, which is not set")));
    let mut look_in = |from: &str, folder: PathBuf| {
        let path = folder.join(file);
        searched.push(format!("{} ({from})", path.display()));
        path.is_file().then_some(path)
    };
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = env::var_os(variable)
            && let Some(nvcc) = look_in(variable, PathBuf::from(root).join("bin"))
        {
            return Ok(Some(nvcc));
        }
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let wheels = env::var_os("VIRTUAL_ENV").map(|root| wheels(Path::new(&root))).unwrap_or_default();
    let usual = ["/usr/local/cuda", "/opt/cuda"].map(|root| Path::new(root).join("bin"));
    let folders = env::split_paths(&path)
        .map(|folder| ("PATH", folder))
        .chain(wheels.into_iter().map(|folder| ("VIRTUAL_ENV", folder)))
        .chain(usual.into_iter().map(|folder| ("the usual place", folder)));
    for (from, folder) in folders {
        if let Some(nvcc) = look_in(from, folder) {
            return Ok(Some(nvcc));
        }
    }
    Ok(None)
}

/// Where the wheel nvidia-cuda-nvcc puts its programs in a Python environment: by CUDA's major version since 13, under
/// its own name before.
fn wheels(environment: &Path) -> Vec<PathBuf> {
    let pythons = fs::read_dir(environment.join("lib")).into_iter().flatten();
    let mut folders: Vec<PathBuf> = pythons
        .flatten()
        .filter_map(|python| fs::read_dir(python.path().join("site-packages/nvidia")).ok())
        .flat_map(|packages| packages.flatten())
        .filter(|package| {
            let name = package.file_name();
            let name = name.to_string_lossy();
            name == "cuda_nvcc" || name.strip_prefix("cu").is_some_and(|n| n.parse::<u32>().is_ok())
        })
        .map(|package| package.path().join("bin"))
        .collect();
    folders.sort();
    folders.reverse();
    if folders.is_empty() {
        // Not there, and named among the places searched.
        folders.push(environment.join("lib/python3/site-packages/nvidia/cu13/bin"));
    }
    folders
}

/// One image of a fat binary.
struct Architecture {
    /// As in `EFFNETV2_CUDA_ARCHS`: `80`, `90a`, `80+ptx`.
    name: String,
    /// nvcc's flag.
    gencode: String,
}

struct Toolkit {
    nvcc: PathBuf,
    major: u32,
    minor: u32,
}

impl Toolkit {
    fn of(nvcc: PathBuf) -> Result<Self, String> {
        let text = output(Command::new(&nvcc).arg("--version"))?;
        let version = text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
        let numbers = version.and_then(|version| version.trim().split_once('.'));
        match numbers.map(|(major, minor)| (major.parse(), minor.parse())) {
            Some((Ok(major), Ok(minor))) => Ok(Self { nvcc, major, minor }),
            _ => Err(format!("{} --version: no release number in\n{text}", nvcc.display())),
        }
    }

    /// The images to build. What the toolkit is too old for is left out of the default list, with a warning, and an
    /// error where the list was asked for.
    fn architectures(&self) -> Result<Vec<Architecture>, String> {
        let asked = env::var("EFFNETV2_CUDA_ARCHS").ok().filter(|list| !list.trim().is_empty());
        let codes = output(Command::new(&self.nvcc).arg("--list-gpu-code"))?;
        let virtuals = output(Command::new(&self.nvcc).arg("--list-gpu-arch"))?;
        let known: BTreeSet<&str> = codes.lines().chain(virtuals.lines()).map(str::trim).collect();
        let mut archs = Vec::new();
        let mut left_out = Vec::new();
        for name in asked.as_deref().unwrap_or(ARCHS).split(',').map(str::trim) {
            let (capability, ptx) = name.strip_suffix("+ptx").map_or((name, false), |base| (base, true));
            let number = capability.strip_suffix(['a', 'f']).unwrap_or(capability);
            if number.len() < 2 || number.parse::<u32>().is_err() {
                return Err(format!(
                    "EFFNETV2_CUDA_ARCHS: `{name}` is none of 80, 90a, 80+ptx and the like; \
                     separate them by commas"
                ));
            }
            let code = if ptx { format!("compute_{capability}") } else { format!("sm_{capability}") };
            // The lists name sm_90a on some toolkits and only sm_90 on others.
            let base = if ptx { format!("compute_{number}") } else { format!("sm_{number}") };
            if known.contains(code.as_str()) || known.contains(base.as_str()) {
                let gencode = format!("-gencode=arch=compute_{capability},code={code}");
                archs.push(Architecture { name: name.into(), gencode });
            } else {
                left_out.push(code);
            }
        }
        let version = format!("{} of CUDA {}.{}", self.nvcc.display(), self.major, self.minor);
        if !left_out.is_empty() {
            let left_out = left_out.join(", ");
            if asked.is_some() {
                return Err(format!("EFFNETV2_CUDA_ARCHS: {version} does not know {left_out}"));
            }
            println!("cargo::warning={version} does not know {left_out}: left out");
        }
        Ok(archs)
    }

    /// The command that makes `binary` from `source`.
    fn compile(&self, archs: &[Architecture], source: &Path, binary: &Path, dependencies: &Path) -> Command {
        let mut command = Command::new(&self.nvcc);
        command.args(["-fatbin", "-std=c++17", "-O3", "-lineinfo", "-Xptxas=-v"]);
        // Smaller by a factor of four; such images need a driver of CUDA 12.4 or later.
        if (self.major, self.minor) >= (12, 8) {
            command.arg("--compress-mode=size");
        }
        command.args(archs.iter().map(|arch| &arch.gencode));
        command.args(["-MD", "-MF"]).arg(dependencies).arg("-o").arg(binary).arg(source);
        command
    }
}

/// Compiles what is out of date, as many at once as cargo allows; all failures are reported.
fn compile_all(
    toolkit: &Toolkit,
    archs: &[Architecture],
    sources: &[PathBuf],
    out: &Path,
) -> Result<(), String> {
    let jobs = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1_usize);
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs.min(sources.len()) {
            scope.spawn(|| {
                while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(failure) = compile(toolkit, archs, source, out) {
                        failures.lock().unwrap_or_else(PoisonError::into_inner).push(failure);
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

fn compile(toolkit: &Toolkit, archs: &[Architecture], source: &Path, out: &Path) -> Result<(), String> {
    let stem = stem(source)?;
    let file = |suffix: &str| out.join(format!("{stem}.{suffix}"));
    let [binary, dependencies, record] = ["fatbin", "d", "command"].map(file);
    let mut command = toolkit.compile(archs, source, &binary, &dependencies);
    // The version is part of it: a toolkit may be replaced in its place.
    let key = format!("{}.{} {command:?}", toolkit.major, toolkit.minor);
    let unchanged = fs::read_to_string(&record).is_ok_and(|recorded| recorded == key);
    if !(unchanged && is_newer(&binary, &dependencies_of(&dependencies))) {
        // Only a finished image has a record.
        let _ = fs::remove_file(&record);
        let report = output(&mut command)?;
        write(&file("ptxas"), &report)?;
        write(&record, &key)?;
    }
    for dependency in dependencies_of(&dependencies).iter().filter(|path| path.is_relative()) {
        println!("cargo::rerun-if-changed={}", dependency.display());
    }
    Ok(())
}

/// The files of a makefile rule; empty if there is none.
fn dependencies_of(makefile: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(makefile).unwrap_or_default();
    let list = text.split_once(": ").map_or("", |(_, list)| list);
    list.split_whitespace().filter(|word| *word != "\\").map(PathBuf::from).collect()
}

fn is_newer(file: &Path, than: &[PathBuf]) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|data| data.modified()).ok();
    let age = |path: &PathBuf| modified(path).unwrap_or_else(SystemTime::now);
    modified(file).is_some_and(|made| !than.is_empty() && than.iter().all(|path| age(path) <= made))
}

fn embed(out: &Path, toolkit: &Toolkit, archs: &[Architecture], sources: &[PathBuf]) -> Result<(), String> {
    let names: Vec<&str> = archs.iter().map(|arch| arch.name.as_str()).collect();
    let mut images = String::new();
    for source in sources {
        let stem = stem(source)?;
        images +=
            &format!("    ({stem:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{stem}.fatbin\"))),\n");
    }
    let (major, minor) = (toolkit.major, toolkit.minor);
    write_embedded(out, &format!("Some(({major}, {minor}))"), &format!("{names:?}"), &format!("[\n{images}]"))
}

fn embed_nothing(out: &Path) -> Result<(), String> {
    write_embedded(out, "None", "[]", "[]")
}

fn write_embedded(out: &Path, toolkit: &str, archs: &str, images: &str) -> Result<(), String> {
    write(
        &out.join("embedded.rs"),
        &format!(
            "pub(crate) static TOOLKIT: Option<(u32, u32)> = {toolkit};\n\
             pub(crate) static ARCHS: &[&str] = &{archs};\n\
             pub(crate) static IMAGES: &[(&str, &[u8])] = &{images};\n"
        ),
    )
}

fn stem(source: &Path) -> Result<&str, String> {
    let stem = source.file_stem().and_then(|stem| stem.to_str());
    stem.ok_or_else(|| format!("{}: the name must be UTF-8", source.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: cannot write: {e}", path.display()))
}

/// What the command prints, on both channels; an error quotes the command as it can be repeated.
fn output(command: &mut Command) -> Result<String, String> {
    let quoted = || {
        let words: Vec<OsString> =
            [command.get_program()].into_iter().chain(command.get_args()).map(Into::into).collect();
        let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    };
    let shown = quoted();
    let advice = "to build without GPU kernels, leave out the feature `cuda`";
    let result = command.output().map_err(|e| format!("cannot run `{shown}`: {e}; {advice}"))?;
    let text =
        String::from_utf8_lossy(&result.stdout).into_owned() + &String::from_utf8_lossy(&result.stderr);
    match result.status.success() {
        true => Ok(text),
        false => Err(format!("`{shown}` failed ({}):\n{text}{advice}", result.status)),
    }
}
