//! `bench libraries`: our kernels beside cuBLASLt's and cuDNN's.

use super::{Common, Site, milliseconds, spread, table};
use crate::Result;
use crate::bench::libraries::{LibraryResult, Settings, layers, run as measure};
use crate::bench::machine::Machine;
use crate::cli::output::say;
use crate::cli::progress::bar;
use crate::model::Architecture;
use crate::peers::Libraries;
use crate::report::bars::{Bars, Group};
use crate::report::table::Column;
use crate::tensor::Dtype;
use crate::train::progressive::check_side;
use half::{bf16, f16};
use std::cell::Cell;
use std::time::Duration;

/// Single convolutions of a network by our kernels and by NVIDIA's libraries, in turns: pointwise ones by cuBLASLt, dense
/// and depthwise ones by cuDNN, each by the fastest of its algorithms that computes the same.
///
/// What is compared is the bare convolution; ours pays, on load, the batch norm's backward as well. The libraries are opened as
/// libcublasLt.so and libcudnn.so: `benches/peers/libraries.sh` makes these names from what pip installed. Without a
/// GPU nothing can be measured.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The network: one of those that `summary` knows.
    #[arg(long, default_value = "s")]
    model: String,
    /// Side of the images in pixels [default: that of the network's training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Seconds after which no convolution is begun [default: none].
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u32>,
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let effort = args.common.effort()?;
    let architecture = Architecture::find(&args.model)?;
    let size = args.size.unwrap_or(architecture.train_size);
    check_side("--size", size)?;
    let (device, dtype) = args.common.compute.device()?;
    let (libraries, missing) = Libraries::open(&device);
    for error in &missing {
        say!("{error}; benches/peers/libraries.sh looks for it")?;
    }
    let batch = args.common.batch(if device.is_host() { 2 } else { 128 });
    let mut layers = layers(&architecture.network(1000), size, batch);
    layers.retain(|layer| libraries.has(layer.conv.kind));
    if layers.is_empty() {
        return say!("nothing can be measured");
    }
    let site = Site::new(&args.common, "libraries", Machine::of(&device), dtype)?;
    let name = &architecture.name;
    say!(
        "{name}, {size} px, batch {batch}, {dtype}, {} rounds; ratios above 1: ours is faster\n",
        effort.rounds
    )?;
    let bar = bar(layers.len(), "convolutions");
    let limit = args.limit.map_or(Duration::MAX, |seconds| Duration::from_secs(seconds.into()));
    let count = layers.len();
    let settings = Settings { model: name.clone(), size, layers, dtype, effort, limit };
    let measured = Cell::new(0);
    let done = || {
        measured.set(measured.get() + 1);
        bar.inc(1);
    };
    let results = match dtype {
        Dtype::F32 | Dtype::Tf32 => measure::<f32>(&device, &libraries, &settings, done),
        Dtype::F16 => measure::<f16>(&device, &libraries, &settings, done),
        Dtype::Bf16 => measure::<bf16>(&device, &libraries, &settings, done),
    }?;
    bar.finish_and_clear();
    print(&results)?;
    if measured.get() < count {
        say!("only {} of {count} convolutions: the time was over", measured.get())?;
    }
    let chart = chart(&results, &site);
    site.leave(results, &chart)
}

fn print(results: &[LibraryResult]) -> Result<()> {
    let columns = vec![
        Column::left("layer"),
        Column::right("input"),
        Column::right("calls"),
        Column::left("pass"),
        Column::right("ours ms"),
        Column::right("spread"),
        Column::right("theirs ms"),
        Column::right("spread"),
        Column::right("ratio"),
        Column::left("by"),
    ];
    let row = |result: &LibraryResult| {
        let [n, h, w, c] = result.input;
        let by = match &result.error {
            Some(error) => error.clone(),
            None => {
                [&result.library, &result.algorithm].map(|text| text.clone().unwrap_or_default()).join(", ")
            }
        };
        let mut cells = vec![
            result.layer.clone(),
            format!("{n}×{h}×{w}×{c}"),
            result.calls.to_string(),
            result.pass.name().into(),
        ];
        for time in [result.time, result.library_time] {
            cells.push(time.map_or_else(String::new, |time| milliseconds(time.median)));
            cells.push(time.map_or_else(String::new, |time| spread(&time)));
        }
        cells.push(result.ratio().map_or_else(String::new, |ratio| format!("{ratio:.2}")));
        cells.push(by);
        cells
    };
    say!("{}", table::<10>(columns, results.iter().map(row).collect())?)?;
    let both = |result: &LibraryResult| {
        let calls = result.calls as f64;
        Some([result.time?.median * calls, result.library_time?.median * calls])
    };
    let sums =
        results.iter().filter_map(both).fold([0.0; 2], |sums, one| [sums[0] + one[0], sums[1] + one[1]]);
    let missing = results.iter().filter(|result| result.error.is_some()).count();
    let ours = milliseconds(sums[0]);
    say!(
        "all calls of what both computed: ours {ours} ms, theirs {} ms; {missing} failed",
        milliseconds(sums[1])
    )
}

fn chart(results: &[LibraryResult], site: &Site) -> Bars {
    let group = |result: &LibraryResult| Group {
        label: format!("{} {} @{}", result.pass.name(), result.layer, result.input[1]),
        values: vec![result.time.map(|time| time.median), result.library_time.map(|time| time.median)],
    };
    Bars {
        title: site.title("Single convolutions"),
        x_label: "milliseconds".into(),
        series: vec!["effnetv2".into(), "cuBLASLt, cuDNN".into()],
        groups: results.iter().map(group).collect(),
    }
}
