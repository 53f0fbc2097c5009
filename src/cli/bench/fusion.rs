//! `bench fusion`: whole networks with more and more stages fused.

use super::{Common, Job, Site, milliseconds, rate, spread, table};
use crate::bench::fusion::{FusedKernel, FusionResult, PUBLISHED, fuse, rows, run};
use crate::bench::{Bench, Measured};
use crate::cli::output::say;
use crate::cli::progress::bar;
use crate::model::Architecture;
use crate::report::bars::{Bars, Group};
use crate::report::table::{Column, si, thousands};
use crate::train::progressive::check_side;
use crate::{Error, Result};
use clap::ValueEnum;

/// A training step with no stage fused, with the first three, the first five, and all: the paper's table 3.
///
/// A fused stage is made of Fused-MBConv without squeeze-excitation, every other of MBConv with it. The paper's network is
/// EfficientNet-B4 (v1-b4).
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The network: one of those that `summary` knows.
    #[arg(long, default_value = "v1-b4")]
    model: String,
    /// Side of the images in pixels [default: 64 on the CPU, on a GPU that of the network's training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Side of the kernels of fused stages.
    #[arg(long, value_enum, default_value_t)]
    kernel: Kernel,
    #[command(flatten)]
    pub(super) common: Common,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Kernel {
    /// 3×3 in the first three stages, as in the network elsewhere: the reading of the paper that meets its figures.
    #[default]
    Paper,
    /// 3×3 everywhere.
    #[value(name = "3")]
    Three,
}

impl Job for Args {
    fn check(&self) -> Result<()> {
        Architecture::find(&self.model)?;
        self.size.map_or(Ok(()), |size| check_side("--size", size))
    }

    fn run<B: Measured>(&self, bench: &mut Bench<'_, B, B::Clock>, site: &Site) -> Result<()> {
        let architecture = Architecture::find(&self.model)?;
        let kernel = match self.kernel {
            Kernel::Paper => FusedKernel::Paper,
            Kernel::Three => FusedKernel::Three,
        };
        let size = self.size.unwrap_or(if site.on_gpu { architecture.train_size } else { 64 });
        let batch = self.common.batch(if site.on_gpu { 64 } else { 2 });
        say!("{}, {size} px, batch {batch}, {}\n", architecture.name, site.dtype)?;
        let stages = architecture.stages.len();
        let fused_stages = rows(stages);
        let bar = bar(fused_stages.len(), "networks");
        let (mut results, mut missing) = (Vec::new(), Vec::new());
        for fused in fused_stages {
            let network = fuse(&architecture, fused, kernel).network(1000);
            let settings = site.settings(network, size, batch);
            match run(bench, &settings, fused) {
                Ok(result) => results.push(result),
                Err(Error::Shape { problem, .. }) => {
                    missing.push(format!("{}: {problem}; --kernel 3 is", label(fused)));
                }
                Err(error) => return Err(error),
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        missing.iter().try_for_each(|text| say!("not on this device: {text}"))?;
        print(&results, site)?;
        if architecture.name == "v1-b4" {
            say!("{}", published())?;
        }
        let chart = chart(&results, site);
        site.leave(results, &chart)
    }
}

/// The stages in words.
fn label(fused: usize) -> String {
    match fused {
        0 => "none".into(),
        1 => "stage 1".into(),
        n => format!("stages 1–{n}"),
    }
}

/// How the speeds of the paper's rows relate.
fn published() -> String {
    let base = PUBLISHED[0].1;
    let row = |(fused, row): &(usize, crate::bench::fusion::Published)| {
        format!("{} {:.2} (TPUv3 {:.2})", label(*fused), row.v100 / base.v100, row.tpu / base.tpu)
    };
    format!("published, on a V100, over none: {}", PUBLISHED.each_ref().map(row).join(", "))
}

fn print(results: &[FusionResult], site: &Site) -> Result<()> {
    let mut columns = vec![
        Column::left("fused"),
        Column::right("parameters"),
        Column::right("MACs"),
        Column::right("step ms"),
        Column::right("spread"),
        Column::right("images/s"),
        Column::right("over none"),
    ];
    let base = results.first().map_or(1.0, |first| first.step.images_per_second);
    let row = |FusionResult { fused_stages, step }: &FusionResult| {
        let mut cells = vec![
            label(*fused_stages),
            thousands(step.parameters as u64),
            si(step.macs as f64, "MAC"),
            milliseconds(step.time.median),
            spread(&step.time),
            rate(step.images_per_second),
            format!("{:.2}", step.images_per_second / base),
        ];
        if site.on_gpu {
            cells.push(step.of_floor.map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)));
        }
        cells
    };
    let rows = results.iter().map(row).collect();
    match site.on_gpu {
        true => {
            columns.push(Column::right("of floor"));
            say!("{}", table::<8>(columns, rows)?)
        }
        false => say!("{}", table::<7>(columns, rows)?),
    }
}

fn chart(results: &[FusionResult], site: &Site) -> Bars {
    let group = |result: &FusionResult| Group {
        label: label(result.fused_stages),
        values: vec![Some(result.step.images_per_second)],
    };
    Bars {
        title: site.title("Fused stages"),
        x_label: "images a second of a training step".into(),
        series: vec!["training".into()],
        groups: results.iter().map(group).collect(),
    }
}
