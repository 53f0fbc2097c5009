//! The table of kernels in Rust, the kernels of the host device and those in the fat binaries are the same, with the same
//! argument types; and none of them spills.

#![cfg(feature = "cuda")]

mod common;

use common::{device, not_run, say};
use effnetv2::device::{Family, HostKernel, embedded_images, toolkit};
use effnetv2::kernels::FAMILIES;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

fn names(family: &Family) -> BTreeSet<String> {
    family.kernels.iter().map(|entry| entry.name.to_owned()).collect()
}

#[test]
fn every_kernel_file_has_its_family() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let files: BTreeSet<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let families: BTreeSet<_> = FAMILIES.iter().map(|family| family.name.to_owned()).collect();
    assert_eq!(files, families);
    assert_eq!(families.len(), FAMILIES.len(), "a family is listed twice");
}

#[test]
fn the_host_device_has_the_kernels_of_the_table() {
    let Some(control) = device().and_then(|device| device.host_control()) else { return };
    let actual: BTreeSet<HostKernel> = control.kernels().into_iter().collect();
    let expected: BTreeSet<HostKernel> = FAMILIES
        .iter()
        .flat_map(|family| {
            family.kernels.iter().map(|entry| HostKernel {
                family: family.name.into(),
                name: entry.name.into(),
                signature: entry.signature.into(),
            })
        })
        .collect();
    assert_eq!(actual, expected);
}

/// What the assembler says about one kernel of one image.
#[derive(Debug, Default, PartialEq)]
struct Assembled {
    registers: u32,
    shared: u32,
    /// Bytes of stack, of spill stores and of spill loads.
    local: [u32; 3],
}

/// Reads `ptxas -v`: by architecture, by kernel.
fn read_report(report: &str) -> BTreeMap<String, BTreeMap<String, Assembled>> {
    let number_before = |line: &str, unit: &str| -> u32 {
        let number = line.split(unit).next().filter(|before| before.len() < line.len());
        number.and_then(|before| before.rsplit([' ', ',']).find(|word| !word.is_empty())).map_or(0, |word| {
            word.parse().unwrap_or_else(|_| panic!("no number before {unit:?} in {line:?}"))
        })
    };
    let mut images = BTreeMap::<String, BTreeMap<String, Assembled>>::new();
    let mut current = None;
    for line in report.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut parts = rest.split('\'');
            let (name, arch) = (parts.next().unwrap(), parts.nth(1).unwrap());
            current = Some((arch.to_owned(), name.to_owned()));
            images.entry(arch.into()).or_default().insert(name.into(), Assembled::default());
        }
        let Some((arch, name)) = &current else { continue };
        let kernel = images.get_mut(arch).unwrap().get_mut(name).unwrap();
        if line.contains("bytes stack frame") {
            kernel.local = [" bytes stack frame", " bytes spill stores", " bytes spill loads"]
                .map(|unit| number_before(line, unit));
        } else if line.contains("Used ") {
            kernel.registers = number_before(line, " registers");
            kernel.shared = number_before(line, " bytes smem");
            current = None;
        }
    }
    images
}

#[test]
fn the_assembler_s_report_is_understood() {
    let report = "ptxas info    : Compiling entry function 'a' for 'sm_80'\n\
                  ptxas info    : Function properties for a\n    \
                  16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
                  ptxas info    : Used 29 registers, used 1 barriers, 64 bytes smem, 380 bytes cmem[0]\n\
                  ptxas info    : Compiling entry function 'b' for 'sm_90a'\n\
                  ptxas info    : Function properties for b\n    \
                  0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                  ptxas info    : Used 255 registers, used 0 barriers\n";
    let images = read_report(report);
    assert_eq!(images["sm_80"]["a"], Assembled { registers: 29, shared: 64, local: [16, 8, 4] });
    assert_eq!(images["sm_90a"]["b"], Assembled { registers: 255, shared: 0, local: [0; 3] });
}

/// The report is of the very command that made the embedded images.
#[test]
fn the_fat_binaries_have_the_kernels_of_the_table_and_none_spills() {
    if toolkit().is_none() {
        return not_run("the check of the fat binaries: there was no nvcc when this was built");
    }
    for family in FAMILIES {
        let report = Path::new(env!("OUT_DIR")).join(format!("{}.ptxas", family.name));
        let images = read_report(&fs::read_to_string(report).unwrap());
        let expected: BTreeSet<String> =
            embedded_images().iter().filter(|image| !image.ptx).map(ToString::to_string).collect();
        assert_eq!(images.keys().cloned().collect::<BTreeSet<_>>(), expected, "{}", family.name);
        for (arch, kernels) in &images {
            assert_eq!(kernels.keys().cloned().collect::<BTreeSet<_>>(), names(family), "{arch}");
            for (name, assembled) in kernels {
                if ["sm_80", "sm_90a"].contains(&arch.as_str()) {
                    let Assembled { registers, shared, .. } = assembled;
                    say(&format!(
                        "{arch:7} {name:24} {registers:3} registers {shared:6} bytes of shared memory"
                    ));
                }
                assert_eq!(assembled.local, [0; 3], "{name} of {arch} has stack or spills");
                assert!(assembled.registers > 0, "{name} of {arch}: no register count in the report");
            }
        }
    }
}

/// The types of the parameters of each kernel in PTX, in the codes of `Entry::signature` but for signs and for what
/// pointers and integers share: `.u64` is `p`, `.u32` is `i`.
fn ptx_signatures(ptx: &str) -> BTreeMap<String, String> {
    let entries = ptx.split(".entry ").skip(1);
    entries
        .map(|entry| {
            let (name, rest) = entry.split_once('(').unwrap();
            let (parameters, _) = rest.split_once(')').unwrap();
            let codes = parameters.split(".param ").skip(1).map(|parameter| {
                let words: Vec<&str> = parameter.split_whitespace().collect();
                match words[0] {
                    ".u64" | ".s64" | ".b64" => "p".into(),
                    ".u32" | ".s32" | ".b32" => "i".into(),
                    ".u16" | ".s16" | ".b16" => "s".into(),
                    ".u8" | ".s8" | ".b8" => "c".into(),
                    ".f32" => "f".into(),
                    ".f64" => "d".into(),
                    ".align" => {
                        let size = words.iter().find_map(|word| word.split_once('[')).unwrap().1;
                        format!("{{{}:{}}}", size.trim_end_matches([']', ',']), words[1])
                    }
                    other => panic!("{name}: a parameter of type {other}"),
                }
            });
            (name.trim().to_owned(), codes.collect::<String>())
        })
        .collect()
}

fn as_in_ptx(signature: &str) -> String {
    let code = |c| match c {
        'l' | 'L' => 'p',
        'I' => 'i',
        'S' => 's',
        'C' => 'c',
        c => c,
    };
    signature.chars().map(code).collect::<String>().replace(['h', 'b'], "{2:2}")
}

#[test]
fn nvcc_sees_the_argument_types_of_the_table() {
    let Some(nvcc) = option_env!("EFFNETV2_NVCC") else {
        return not_run("the check of argument types in PTX: there was no nvcc when this was built");
    };
    for family in FAMILIES {
        let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.ptx", family.name));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("kernels/{}.cu", family.name));
        let mut command = Command::new(nvcc);
        command.args(["-ptx", "-std=c++17", "-arch=compute_80", "-o"]).arg(&output).arg(source);
        let result = command.output().unwrap();
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let actual = ptx_signatures(&fs::read_to_string(&output).unwrap());
        let expected: BTreeMap<_, _> =
            family.kernels.iter().map(|entry| (entry.name.to_owned(), as_in_ptx(entry.signature))).collect();
        assert_eq!(actual, expected);
    }
}
