//! `bench step`: a training step and an inference.

use super::{Common, Job, Site, milliseconds, rate, spread, table};
use crate::Result;
use crate::bench::machine::{forget_peak, peak_resident};
use crate::bench::step::{Pass, StepResult, run};
use crate::bench::{Bench, Measured};
use crate::cli::output::say;
use crate::cli::progress::bar;
use crate::model::Architecture;
use crate::report::bars::{Bars, Group};
use crate::report::table::{Column, bytes, si};
use crate::train::progressive::check_side;
use clap::ValueEnum;

/// A training step (forward, loss, backward, SGD with momentum) and an inference: images a second and memory.
///
/// The memory is the most that the process (on a GPU: the device) held, weights and optimizer included. Reading and
/// augmenting images is not part of it; bringing them to the device is.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The network: one of those that `summary` knows.
    #[arg(long, default_value = "s")]
    model: String,
    /// Sides of the images in pixels, one row each [default: 128 on the CPU, on a GPU that of the network's training].
    #[arg(long, value_name = "PIXELS", value_delimiter = ',')]
    size: Vec<usize>,
    /// Number of classes.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    classes: u32,
    /// What to measure.
    #[arg(long, value_enum, default_value_t)]
    pass: Passes,
    #[command(flatten)]
    pub(super) common: Common,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Passes {
    /// Training and inference.
    #[default]
    Both,
    /// The training step.
    Training,
    /// The forward with running statistics.
    Inference,
}

impl Job for Args {
    fn check(&self) -> Result<()> {
        Architecture::find(&self.model)?;
        self.size.iter().try_for_each(|&size| check_side("--size", size))
    }

    fn run<B: Measured>(&self, bench: &mut Bench<'_, B, B::Clock>, site: &Site) -> Result<()> {
        let architecture = Architecture::find(&self.model)?;
        let batch = self.common.batch(if site.on_gpu { 256 } else { 8 });
        let default = if site.on_gpu { architecture.train_size } else { 128 };
        let sizes = if self.size.is_empty() { vec![default] } else { self.size.clone() };
        let passes: &[Pass] = match self.pass {
            Passes::Both => &[Pass::Training, Pass::Inference],
            Passes::Training => &[Pass::Training],
            Passes::Inference => &[Pass::Inference],
        };
        say!("{}, batch {batch}, {}, {} rounds\n", architecture.name, site.dtype, bench.effort.rounds)?;
        let bar = bar(sizes.len() * passes.len(), "measurements");
        let mut results = Vec::new();
        for &size in &sizes {
            for &pass in passes {
                let network = architecture.network(self.classes as usize);
                let settings = site.settings(network, size, batch);
                forget_peak();
                let mut result = run(bench, &settings, pass)?;
                if pass == Pass::Training {
                    result.mode = bench.backend.mode().into();
                }
                result.overlap = bench.backend.overlaps();
                result.peak_bytes = result.peak_bytes.or_else(peak_resident);
                results.push(result);
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        print(&results, site)?;
        let chart = chart(&results, site);
        site.leave(results, &chart)
    }
}

const fn name(pass: Pass) -> &'static str {
    match pass {
        Pass::Training => "training",
        Pass::Inference => "inference",
    }
}

fn print(results: &[StepResult], site: &Site) -> Result<()> {
    let mut columns = vec![
        Column::left("pass"),
        Column::right("size"),
        Column::right("ms"),
        Column::right("spread"),
        Column::right("images/s"),
        Column::right("rate"),
        Column::right("peak memory"),
    ];
    let row = |result: &StepResult| {
        // A backward costs two forwards.
        let passes = if result.pass == Pass::Training { 3.0 } else { 1.0 };
        let operations = 2.0 * passes * result.macs as f64 * result.images_per_second;
        let mut cells = vec![
            name(result.pass).into(),
            result.size.to_string(),
            milliseconds(result.time.median),
            spread(&result.time),
            rate(result.images_per_second),
            si(operations, "FLOP/s"),
            result.peak_bytes.map_or_else(|| "unknown".into(), bytes),
        ];
        if site.on_gpu {
            cells.push(result.of_floor.map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)));
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

fn chart(results: &[StepResult], site: &Site) -> Bars {
    let group = |result: &StepResult| Group {
        label: format!("{}, {} px", name(result.pass), result.size),
        values: vec![Some(result.images_per_second)],
    };
    Bars {
        title: site.title(results.first().map_or("", |first| &first.model)),
        x_label: "images a second".into(),
        series: vec!["effnetv2".into()],
        groups: results.iter().map(group).collect(),
    }
}
