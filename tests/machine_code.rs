//! What the compiler made of the kernels: the assembler's report and the disassembly of the images that are embedded.
//!
//! Spills, a stack or local memory in any kernel fail, and so does a kernel without the instructions that
//! `tests/machine_code.toml` asks of it, or one that touches memory before it has waited for its predecessors. A table shows
//! registers, shared memory (that of the kernel, and what training steps ask for on top) and occupancy.

#![cfg(feature = "cuda")]

mod devices;

use devices::{not_run, say};
use effnetv2::backend::PassKind;
use effnetv2::device::{Family, embedded_images, toolkit};
use effnetv2::kernels::FAMILIES;
use effnetv2::kernels::fused::Planner;
use effnetv2::model::Architecture;
use effnetv2::nn::Network;
use effnetv2::optimizer::Rule;
use effnetv2::report::table::{Column, Table};
use effnetv2::tensor::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

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
fn report_of(family: &Family) -> BTreeMap<String, BTreeMap<String, Assembled>> {
    let report = Path::new(env!("OUT_DIR")).join(format!("{}.ptxas", family.name));
    let report = fs::read_to_string(report).unwrap();
    // Products of warpgroups that do not go on by themselves: serialised, or waited for where the kernel does not.
    let waits: Vec<&str> = report.lines().filter(|line| line.contains("(C75")).collect();
    assert!(waits.is_empty(), "{}", waits.join("\n"));
    read_report(&report)
}

#[test]
fn the_fat_binaries_have_the_kernels_of_the_table_and_none_spills() {
    if toolkit().is_none() {
        return not_run("the check of the fat binaries: there was no nvcc when this was built");
    }
    for family in FAMILIES {
        let images = report_of(family);
        let expected: BTreeSet<String> =
            embedded_images().iter().filter(|image| !image.ptx).map(ToString::to_string).collect();
        assert_eq!(images.keys().cloned().collect::<BTreeSet<_>>(), expected, "{}", family.name);
        let names: BTreeSet<String> = family.kernels.iter().map(|entry| entry.name.into()).collect();
        for (arch, kernels) in &images {
            assert_eq!(kernels.keys().cloned().collect::<BTreeSet<_>>(), names, "{arch}");
            for (name, assembled) in kernels {
                assert_eq!(assembled.local, [0; 3], "{name} of {arch} has stack or spills");
                assert!(assembled.registers > 0, "{name} of {arch}: no register count in the report");
            }
        }
    }
}

/// What the instructions of one kernel are, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Instructions {
    tensor: usize,
    /// Of those, the ones of warpgroups.
    wgmma: usize,
    tma: usize,
    load128: usize,
    store128: usize,
    /// Loads and stores of local memory: spilled registers and arrays.
    local: usize,
    /// Waits for the grids before it, and calls that let the next one in.
    waits: usize,
    lets_in: usize,
    /// Accesses of global memory, and branches, in front of the first wait.
    early: usize,
}

/// What may not come before the wait for predecessors: whatever reads or writes memory that they may use (asynchronous
/// copies and generic addresses as well), and whatever leaves the straight line.
const TOO_EARLY: [&str; 21] = [
    "LD", "LDG", "LDGSTS", "ST", "STG", "ATOM", "ATOMG", "RED", "REDG", "UBLKCP", "UBLKRED", "UBLKPF",
    "UTMALDG", "UTMASTG", "UTMAREDG", "UTMAPF", "CCTL", "BRA", "BRX", "CALL", "EXIT",
];

/// Reads `cuobjdump -sass`: by kernel. An instruction is a line `/*0a10*/  @!P0 LDG.E.128 R4, [R2.64] ;`.
fn read_disassembly(text: &str) -> BTreeMap<String, Instructions> {
    let mut kernels = BTreeMap::<String, Instructions>::new();
    let mut current = None;
    for line in text.lines().map(str::trim_start) {
        if let Some(name) = line.strip_prefix("Function : ") {
            current = Some(name.trim().to_owned());
            kernels.insert(name.trim().into(), Instructions::default());
        }
        let Some(name) = &current else { continue };
        let instruction =
            line.strip_prefix("/*").and_then(|rest| rest.split_once("*/")).map(|(_, rest)| rest);
        let Some(opcode) =
            instruction.and_then(|rest| rest.split_whitespace().find(|word| !word.starts_with('@')))
        else {
            continue;
        };
        let conditional = instruction.is_some_and(|rest| rest.trim_start().starts_with('@'));
        let mut parts = opcode.split('.');
        let (base, wide) = (parts.next().unwrap_or_default(), parts.any(|part| part == "128"));
        let count = kernels.get_mut(name).unwrap();
        match base {
            "HMMA" => count.tensor += 1,
            "HGMMA" => {
                count.tensor += 1;
                count.wgmma += 1;
            }
            "UTMALDG" => count.tma += 1,
            "LDG" | "LDGSTS" if wide => count.load128 += 1,
            "STG" if wide => count.store128 += 1,
            "LDL" | "STL" => count.local += 1,
            "ACQBULK" if !conditional => count.waits += 1,
            "PREEXIT" if !conditional => count.lets_in += 1,
            _ => {}
        }
        if count.waits == 0 && TOO_EARLY.contains(&base) {
            count.early += 1;
        }
    }
    kernels
}

#[test]
fn the_disassembly_is_understood() {
    let text = "\tcode for sm_80\n\t\tFunction : a\n\t.headerflags\t@\"EF_CUDA_SM80\"\n\
        \x20       /*0000*/                   MOV R1, c[0x0][0x28] ;       /* 0x00000a0000017a02 */\n\
        \x20                                                               /* 0x000fe40000000f00 */\n\
        \x20       /*0010*/                   LDG.E.128.CONSTANT R4, [R2.64] ; /* 0x0000000000007919 */\n\
        \x20       /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R4], [R2.64] ; /* 0x0 */\n\
        \x20       /*0030*/                   LDG.E.64 R4, [R2.64] ;       /* 0x0 */\n\
        \x20       /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ; /* 0x0 */\n\
        \x20       /*0050*/                   HFMA2.MMA R27, -RZ, RZ, 0, 0 ; /* 0x0 */\n\
        \x20       /*0050*/                   UTMALDG.2D [UR4], [UR10] ;   /* 0x0 */\n\
        \x20       /*0060*/                   HGMMA.64x48x16.F32.BF16 R24, R120, gdesc[UR12], R24, gsb0 ; /* 0x0 */\n\
        \t\tFunction : b\n\
        \x20       /*0000*/               @P1 STG.E.EF.128 [R2.64], R4 ;   /* 0x0 */\n\
        \x20       /*0010*/                   STL.128 [R1], R4 ;           /* 0x0 */\n\
        \x20      /*10000*/                   LDL R4, [R1] ;               /* 0x0 */\n\
        \x20      /*10010*/                   LDS.128 R4, [R1] ;           /* 0x0 */\n\
        \t\tFunction : c\n\
        \x20       /*0000*/                   LDC.64 R2, c[0x0][0x210] ;   /* 0x0 */\n\
        \x20       /*0010*/                   ACQBULK ;                    /* 0x0 */\n\
        \x20       /*0020*/                   PREEXIT ;                    /* 0x0 */\n\
        \x20       /*0030*/                   LDG.E R4, [R2.64] ;          /* 0x0 */\n\
        \t\tFunction : d\n\
        \x20       /*0000*/              @!P0 EXIT ;                       /* 0x0 */\n\
        \x20       /*0010*/                   LDGSTS.E [R4], [R2.64] ;     /* 0x0 */\n\
        \x20       /*0020*/               @P1 ACQBULK ;                    /* 0x0 */\n\
        \x20       /*0030*/                   EXIT ;                       /* 0x0 */\n";
    let kernels = read_disassembly(text);
    let none = Instructions::default();
    assert_eq!(kernels["a"], Instructions { tensor: 2, wgmma: 1, tma: 1, load128: 2, early: 4, ..none });
    assert_eq!(kernels["b"], Instructions { store128: 1, local: 2, early: 1, ..none });
    assert_eq!(kernels["c"], Instructions { waits: 1, lets_in: 1, ..none });
    assert_eq!(kernels["d"], Instructions { early: 3, ..none });
}

/// What a kernel's machine code must contain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Needs {
    Tensor,
    Wgmma,
    Tma,
    Load128,
    Store128,
}

/// By family, by pattern of kernel names.
type Expectations = BTreeMap<String, BTreeMap<String, Vec<Needs>>>;

fn expectations() -> Expectations {
    toml::from_str(include_str!("machine_code.toml")).unwrap()
}

/// `*` in a pattern stands for one or more letters and digits.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else { return pattern == name };
    let Some(rest) = name.strip_prefix(before) else { return false };
    let word = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
    (1..=word).any(|end| matches(after, &rest[end..]))
}

#[test]
fn patterns_stop_at_underscores() {
    assert!(
        matches("a_*", "a_bf16")
            && matches("a_*_*", "a_b1_c")
            && matches("a", "a")
            && matches("a*c", "abbcc")
    );
    assert!(
        !matches("a_*", "a_b_bf16")
            && !matches("a_*", "a_")
            && !matches("a_*_c", "a_b_d")
            && !matches("a", "ab")
    );
}

/// Every kernel stands in exactly one line, and no line stands for nothing.
#[test]
fn every_kernel_is_expected_something_of() {
    let expectations = expectations();
    let listed: BTreeSet<&str> = expectations.keys().map(String::as_str).collect();
    assert_eq!(listed, FAMILIES.iter().map(|family| family.name).collect());
    for family in FAMILIES {
        let patterns = &expectations[family.name];
        for entry in family.kernels {
            let lines = patterns.keys().filter(|pattern| matches(pattern, entry.name)).count();
            assert_eq!(lines, 1, "{} stands in that many lines of machine_code.toml", entry.name);
        }
        for pattern in patterns.keys() {
            let found = family.kernels.iter().any(|entry| matches(pattern, entry.name));
            assert!(found, "machine_code.toml: [{}] {pattern}: there is no such kernel", family.name);
        }
    }
}

/// What a multiprocessor has, by compute capability: CUDA Programming Guide, "Technical Specifications per Compute
/// Capability". Registers are given to warps in units of 256, and a quarter of them to a quarter of the warps; shared
/// memory in units of 128 bytes, of which the system takes 1 KB for each block.
struct Multiprocessor {
    arch: &'static str,
    warps: u32,
    blocks: u32,
    registers: u32,
    shared: u32,
    /// Whether a grid may begin before the one ahead has ended.
    overlaps: bool,
}

const MULTIPROCESSORS: [Multiprocessor; 2] = [
    Multiprocessor {
        arch: "sm_80",
        warps: 64,
        blocks: 32,
        registers: 65_536,
        shared: 164 * 1024,
        overlaps: false,
    },
    Multiprocessor {
        arch: "sm_90a",
        warps: 64,
        blocks: 32,
        registers: 65_536,
        shared: 228 * 1024,
        overlaps: true,
    },
];

impl Multiprocessor {
    /// Blocks that it holds at once.
    fn resident(&self, threads: u32, registers: u32, shared: u32) -> u32 {
        let warps = threads.div_ceil(32);
        let by_registers = self.registers / 4 / (registers * 32).next_multiple_of(256) * 4 / warps;
        let by_shared = self.shared / (shared + 1024).next_multiple_of(128);
        self.blocks.min(self.warps / warps).min(by_registers).min(by_shared)
    }
}

/// Worked out by hand from those limits.
#[test]
fn occupancy_follows_from_the_scarcest_of_four() {
    let [ampere, hopper] = MULTIPROCESSORS;
    for (threads, registers, shared, on_ampere, on_hopper) in [
        (256, 32, 0, 8, 8),
        (256, 33, 0, 6, 6),
        (256, 128, 0, 2, 2),
        (256, 255, 0, 1, 1),
        (128, 168, 0, 3, 3),
        (32, 16, 0, 32, 32),
        (256, 64, 40 * 1024, 4, 4),
        (256, 64, 53 * 1024, 3, 4),
        (128, 64, 100 * 1024, 1, 2),
    ] {
        let blocks = [&ampere, &hopper].map(|sm| sm.resident(threads, registers, shared));
        assert_eq!(
            blocks,
            [on_ampere, on_hopper],
            "{threads} threads, {registers} registers, {shared} bytes"
        );
    }
}

/// The most dynamic shared memory that training steps ask for, by kernel.
fn dynamic_shared() -> BTreeMap<String, u32> {
    let mut most = BTreeMap::new();
    // With kernels of 3×3 alone, and of 5×5 as well.
    for model in ["s", "v1-b0"] {
        let architecture = Architecture::find(model).unwrap();
        let network = Network::new(architecture.network(1000));
        let side = architecture.train_size;
        let kind = PassKind { images: 64, side, dropout: 0.2, first: true, last: true };
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let mut planner = Planner::new(dtype);
            network.rehearse_training(&mut planner, kind, Rule::PAPER).unwrap();
            for work in planner.launches() {
                let bytes: &mut u32 = most.entry(work.kernel.clone()).or_default();
                *bytes = work.shared.max(*bytes);
            }
        }
    }
    most
}

/// cuobjdump, beside the nvcc of the build or on the PATH.
fn cuobjdump(nvcc: &str) -> Option<PathBuf> {
    let beside = fs::canonicalize(nvcc).ok().and_then(|nvcc| Some(nvcc.parent()?.to_owned()));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = beside.into_iter().chain(env::split_paths(&path));
    folders.find_map(|folder| {
        let program = folder.join(format!("cuobjdump{}", env::consts::EXE_SUFFIX));
        program.is_file().then_some(program)
    })
}

fn disassemble(program: &Path, family: &Family, arch: &str) -> BTreeMap<String, Instructions> {
    let binary = Path::new(env!("OUT_DIR")).join(format!("{}.fatbin", family.name));
    let output = Command::new(program).args(["-sass", "-arch", arch]).arg(binary).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{}: {errors}", program.display());
    read_disassembly(&String::from_utf8_lossy(&output.stdout))
}

#[test]
fn the_machine_code_has_what_it_should() {
    let Some(nvcc) = option_env!("EFFNETV2_NVCC") else {
        return not_run("the check of the machine code: there was no nvcc when this was built");
    };
    let Some(cuobjdump) = cuobjdump(nvcc) else {
        let required = env::var("EFFNETV2_REQUIRE_CUDA").is_ok_and(|value| !value.is_empty() && value != "0");
        assert!(!required, "there is no cuobjdump beside {nvcc} or on the PATH");
        return not_run(
            "the check of the machine code: there is no cuobjdump (wheels nvidia-cuda-cuobjdump and -nvdisasm)",
        );
    };
    let (expectations, dynamic) = (expectations(), dynamic_shared());
    let embedded: BTreeSet<String> = embedded_images().iter().map(ToString::to_string).collect();
    let mut problems = Vec::new();
    for sm in MULTIPROCESSORS.iter().filter(|sm| embedded.contains(sm.arch)) {
        let mut table = Table::new([
            Column::left(format!("kernel on {}", sm.arch)),
            Column::right("threads"),
            Column::right("registers"),
            Column::right("shared"),
            Column::right("dynamic"),
            Column::right("blocks"),
            Column::right("occupancy"),
            Column::right("HMMA"),
            Column::right("loads of 16 B"),
            Column::right("stores of 16 B"),
        ]);
        for family in FAMILIES {
            let (report, code) = (&report_of(family)[sm.arch], disassemble(&cuobjdump, family, sm.arch));
            for entry in family.kernels {
                let (assembled, count) = (&report[entry.name], code[entry.name]);
                let extra = dynamic.get(entry.name).copied().unwrap_or_default();
                let blocks = sm.resident(entry.threads, assembled.registers, assembled.shared + extra);
                let occupancy = 100 * blocks * entry.threads.div_ceil(32) / sm.warps;
                table.row([
                    entry.name.into(),
                    entry.threads.to_string(),
                    assembled.registers.to_string(),
                    format!("{} B", assembled.shared),
                    format!("{extra} B"),
                    blocks.to_string(),
                    format!("{occupancy} %"),
                    count.tensor.to_string(),
                    count.load128.to_string(),
                    count.store128.to_string(),
                ]);
                let mut problem =
                    |what: String| problems.push(format!("{} of {}: {what}", entry.name, sm.arch));
                if count.local > 0 {
                    problem(format!("{} instructions of local memory", count.local));
                }
                if sm.overlaps && (count.waits == 0 || count.early > 0 || count.lets_in == 0) {
                    problem(format!(
                        "must begin with after_predecessors(): {} waits, {} accesses and branches before the first, \
                         lets its dependents in {} times",
                        count.waits, count.early, count.lets_in
                    ));
                }
                if blocks == 0 {
                    problem("a multiprocessor cannot hold a single block".into());
                }
                let needs =
                    expectations[family.name].iter().find(|(pattern, _)| matches(pattern, entry.name));
                let needs = needs.unwrap().1;
                if needs.contains(&Needs::Wgmma) && sm.arch != "sm_90a" {
                    continue;
                }
                for need in needs {
                    let found = match need {
                        Needs::Tensor => count.tensor,
                        Needs::Wgmma => count.wgmma,
                        Needs::Tma => count.tma,
                        Needs::Load128 => count.load128,
                        Needs::Store128 => count.store128,
                    };
                    if found == 0 {
                        problem(format!("no instruction of the kind {need:?}"));
                    }
                }
            }
        }
        say(&format!("\n{table}"));
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}
