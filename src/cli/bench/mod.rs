//! `bench`: how fast it is here.

mod blocks;
mod fusion;
#[cfg(feature = "peers")]
mod libraries;
mod ops;
mod step;
#[cfg(feature = "cuda")]
mod tune;

use super::compute::{Compute, Work};
use super::output::say;
use crate::bench::floor::Ceiling;
use crate::bench::machine::{Machine, commit};
use crate::bench::record::Report;
use crate::bench::step::Settings;
use crate::bench::timing::{Effort, Milliseconds};
use crate::bench::{Bench, Measured};
use crate::nn::NetworkSpec;
use crate::report::bars::Bars;
use crate::report::table::{Column, Table};
use crate::tensor::Dtype;
use crate::train::run::RunFolder;
use crate::{Error, Result};
use clap::Subcommand;
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Measure blocks, networks, training steps and operations on this machine.
///
/// Each prints a table and leaves its figures as JSON and as a chart. A figure is the median of several rounds after a
/// warm-up; the spread is what lies between the slowest and the fastest round, in percent of it. Without a GPU the CPU
/// reference is measured, on small images.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Blocks(blocks::Args),
    Fusion(fusion::Args),
    Step(step::Args),
    Ops(ops::Args),
    #[cfg(feature = "cuda")]
    Tune(tune::Args),
    #[cfg(feature = "peers")]
    Libraries(libraries::Args),
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Blocks(args) => measure(&args.common, "blocks", args),
        What::Fusion(args) => measure(&args.common, "fusion", args),
        What::Step(args) => measure(&args.common, "step", args),
        What::Ops(args) => measure(&args.common, "ops", args),
        #[cfg(feature = "cuda")]
        What::Tune(args) => tune::run(args),
        #[cfg(feature = "peers")]
        What::Libraries(args) => libraries::run(args),
    }
}

// No doc comment: clap would take it for the description of the whole command.
#[derive(Debug, clap::Args)]
struct Common {
    /// Images at once [default: few on the CPU].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: Option<u32>,
    /// Rounds; their median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Seconds that a round lasts at least: short work is repeated.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.05)]
    round_seconds: f64,
    /// Seconds to warm up for, one call at least.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2)]
    warm_up: f64,
    /// The folder for figures and chart, where files of their names are replaced [default: runs/bench-WHAT-N].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// What this GPU reaches at best, for the share of the floor: GB/s of copies and TFLOP/s of matrix products, as 4300,790
    /// [default: known for H200, H100 SXM, A100 80 GB, RTX 3090 and RTX 4090].
    #[arg(long, value_name = "GB/S,TFLOP/S")]
    ceiling: Option<Limits>,
    #[command(flatten)]
    compute: Compute,
}

/// A ceiling as `--ceiling` gives it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Limits(Ceiling);

impl FromStr for Limits {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |word: &str| word.trim().parse().ok().filter(|n: &f64| n.is_finite() && *n > 0.0);
        match text.split_once(',').map(|(bytes, operations)| (number(bytes), number(operations))) {
            Some((Some(gigabytes), Some(teraflops))) => {
                let rate = teraflops * 1e12;
                Ok(Self(Ceiling { bandwidth: gigabytes * 1e9, tensor: rate, plain: rate }))
            }
            _ => Err("expected two positive numbers: GB/s,TFLOP/s".into()),
        }
    }
}

impl Common {
    fn effort(&self) -> Result<Effort> {
        effort(self.rounds, self.round_seconds, self.warm_up)
    }

    fn batch(&self, default: usize) -> usize {
        self.batch.map_or(default, |batch| batch as usize)
    }
}

/// As the flags say.
fn effort(rounds: u32, round_seconds: f64, warm_up: f64) -> Result<Effort> {
    let check = |name, seconds: f64| match (0.0..=600.0).contains(&seconds) {
        true => Ok(seconds),
        false => Err(Error::usage(name, seconds, "must be from 0 to 600")),
    };
    Ok(Effort {
        rounds,
        round_seconds: check("--round-seconds", round_seconds)?,
        warm_up_seconds: check("--warm-up", warm_up)?,
    })
}

/// What is measured on, and where the figures go.
struct Site {
    machine: Machine,
    dtype: Dtype,
    on_gpu: bool,
    ceiling: Option<Ceiling>,
    /// "blocks", "fusion", ...: also the name of the files.
    name: &'static str,
    folder: PathBuf,
}

/// One of the measurements, on whatever backend.
trait Job {
    /// Checks all flags that can be wrong, before anything is said or done.
    fn check(&self) -> Result<()>;

    fn run<B: Measured>(&self, bench: &mut Bench<'_, B, B::Clock>, site: &Site) -> Result<()>;
}

/// A job and all that is known of it before there is a backend.
struct Measurement<'a, J> {
    common: &'a Common,
    effort: Effort,
    name: &'static str,
    job: &'a J,
}

fn measure(common: &Common, name: &'static str, job: &impl Job) -> Result<()> {
    let effort = common.effort()?;
    job.check()?;
    common.compute.run(None, false, Measurement { common, effort, name, job })
}

impl<J: Job> Work for Measurement<'_, J> {
    type Output = ();

    fn on<B: Measured>(self, mut backend: B) -> Result<()> {
        let Self { common, effort, name, job } = self;
        let site = Site::new(common, name, backend.machine(), backend.dtype())?;
        let (clock, cache) = (backend.clock(), backend.cache());
        job.run(&mut Bench { backend: &mut backend, clock: &clock, effort, cache }, &site)
    }
}

impl Site {
    /// Says what is measured on, and makes the folder.
    fn new(common: &Common, name: &'static str, machine: Machine, dtype: Dtype) -> Result<Self> {
        let on_gpu = machine.device == "cuda";
        let known =
            [machine.driver.as_ref().map(|driver| format!("driver {driver}")), machine.clocks.clone()];
        let known: String = known.into_iter().flatten().map(|word| format!(", {word}")).collect();
        let version = env!("CARGO_PKG_VERSION");
        say!("{}{known}; effnetv2 {version} ({})", machine.name, commit())?;
        let folder = common.out.clone();
        let folder = folder.unwrap_or_else(|| RunFolder::free(Path::new("runs"), &format!("bench-{name}")));
        fs::create_dir_all(&folder).map_err(Error::io(&folder, "create"))?;
        let ceiling = common.ceiling.map(|limits| limits.0).or_else(|| Ceiling::of(&machine.name));
        let ceiling = ceiling.filter(|_| on_gpu);
        Ok(Self { machine, dtype, on_gpu, ceiling, name, folder })
    }

    /// Those of a step here.
    fn settings(&self, network: NetworkSpec, size: usize, batch: usize) -> Settings {
        let &Self { dtype, ceiling, on_gpu: count_bytes, .. } = self;
        Settings { network, size, batch, dtype, count_bytes, ceiling }
    }

    /// Writes figures and chart, and says where they are.
    fn leave<R: Serialize>(&self, results: Vec<R>, bars: &Bars) -> Result<()> {
        let [json, svg] = ["json", "svg"].map(|ending| self.folder.join(format!("{}.{ending}", self.name)));
        Report::new(self.machine.clone(), results).write(&json)?;
        bars.write(&svg)?;
        say!("in {}: {}.json, {}.svg", self.folder.display(), self.name, self.name)
    }

    /// The heading of the chart.
    fn title(&self, what: &str) -> String {
        format!("{what}: {}, {}", self.machine.name, self.dtype)
    }
}

/// A table whose columns are not all there on every device.
fn table<const N: usize>(columns: Vec<Column>, rows: Vec<Vec<String>>) -> Result<Table<N>> {
    let wrong = |_| Error::Shape { operation: "table", problem: format!("rows of other than {N} cells") };
    let columns = columns.try_into().map_err(|_| wrong(Vec::<String>::new()))?;
    let mut table = Table::new(columns);
    for row in rows {
        table.row(row.try_into().map_err(wrong)?);
    }
    Ok(table)
}

fn milliseconds(value: f64) -> String {
    let places = if value < 10.0 { 3 } else { 1 };
    format!("{value:.places$}")
}

fn spread(time: &Milliseconds) -> String {
    format!("{:.0} %", 100.0 * time.spread())
}

/// Images a second.
fn rate(value: f64) -> String {
    let places = if value < 100.0 { 1 } else { 0 };
    format!("{value:.places$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_must_have_as_many_cells_as_there_are_columns() {
        let columns = || vec![Column::left("a"), Column::right("b")];
        let row = |n: usize| vec![vec![String::from("x"); n]];
        assert!(table::<2>(columns(), row(2)).is_ok());
        assert!(table::<2>(columns(), row(3)).is_err() && table::<3>(columns(), row(3)).is_err());
    }

    #[test]
    fn a_ceiling_is_two_positive_numbers() {
        let ceiling = Ceiling { bandwidth: 4.3e12, tensor: 7.9e14, plain: 7.9e14 };
        assert_eq!("4300, 790".parse(), Ok(Limits(ceiling)));
        for wrong in ["4300", "4300,0", "-1,790", "nan,1", "inf,1", "a,b", ""] {
            assert!(wrong.parse::<Limits>().is_err(), "{wrong}");
        }
    }
}
