//! The table of kernels in Rust, the kernels of the host device and those that nvcc sees are the same, with the same
//! argument types. `tests/machine_code.rs` looks into the fat binaries.

#![cfg(feature = "cuda")]

mod devices;

use devices::{device, not_run};
use effnetv2::device::{Family, HostKernel};
use effnetv2::kernels::FAMILIES;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

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
    let ptx = |family: &Family| Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}.ptx", family.name));
    let compile = |family: &&Family| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("kernels/{}.cu", family.name));
        let mut command = Command::new(nvcc);
        // Without optimisation: a parameter is what it is, and the compiler is done in a fraction of the time.
        command.args(["-ptx", "-G", "-std=c++17", "-arch=compute_80", "-o"]).arg(ptx(family)).arg(source);
        command.stderr(Stdio::piped()).spawn().unwrap()
    };
    let compilers: Vec<Child> = FAMILIES.iter().map(compile).collect();
    for (family, compiler) in FAMILIES.iter().zip(compilers) {
        let result = compiler.wait_with_output().unwrap();
        assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
        let actual = ptx_signatures(&fs::read_to_string(ptx(family)).unwrap());
        let expected: BTreeMap<_, _> =
            family.kernels.iter().map(|entry| (entry.name.to_owned(), as_in_ptx(entry.signature))).collect();
        assert_eq!(actual, expected);
    }
}
