//! `bench tune`: which launches are the fastest on this GPU.

use super::{effort, milliseconds};
use crate::backend::PassKind;
use crate::bench::machine::{Machine, commit};
use crate::bench::record::Report;
use crate::bench::tune::{TuneResult, candidates, enter, measure};
use crate::cli::compute::Compute;
use crate::cli::output::say;
use crate::cli::progress::bar;
use crate::kernels::fused::Planner;
use crate::kernels::tuning::Tuning;
use crate::model::Architecture;
use crate::nn::Network;
use crate::optimizer::Rule;
use crate::report::table::{Column, Table, percent};
use crate::tensor::Dtype;
use crate::train::progressive::check_side;
use crate::{Error, Result};
use half::{bf16, f16};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// Measure every way to launch the convolutions of a training step, and write down which are the fastest on this GPU.
///
/// By default launches follow from shapes alone, the same on every GPU. With the file that this writes, `--tuning FILE` of
/// other commands launches what was the fastest here: for this model, size, batch and type, and for this GPU and driver
/// alone. A way is chosen only if it computes what the rule does within the roundings of the type, and if it is faster than
/// every round of the rule. Choices are added to those that the file has.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The network: one of those that `summary` knows.
    #[arg(default_value = "s")]
    model: String,
    /// Sides of the images in pixels [default: that of the network's training].
    #[arg(long, value_name = "PIXELS", value_delimiter = ',')]
    size: Vec<usize>,
    /// Images at once.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    batch: u32,
    /// The file to write.
    #[arg(long, value_name = "FILE", default_value = "tuning.json")]
    out: PathBuf,
    /// Also write all figures there, as JSON.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Seconds after which no launch is begun [default: none].
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u32>,
    /// Rounds; their median counts.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Seconds that a round lasts at least: short work is repeated.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.02)]
    round_seconds: f64,
    /// Seconds to warm up for, one call at least.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.02)]
    warm_up: f64,
    #[command(flatten)]
    compute: Compute,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let effort = effort(args.rounds, args.round_seconds, args.warm_up)?;
    let architecture = Architecture::find(&args.model)?;
    let sizes = if args.size.is_empty() { vec![architecture.train_size] } else { args.size.clone() };
    sizes.iter().try_for_each(|&size| check_side("--size", size))?;
    let known = if args.out.exists() { Some(Tuning::read(&args.out)?) } else { None };
    let (device, dtype) = args.compute.device()?;
    let command: Vec<String> = std::env::args().skip(1).collect();
    let mut tuning = match known {
        Some(known) => {
            known.check(&device, &args.out)?;
            Arc::unwrap_or_clone(known)
        }
        None => Tuning::of(&device, format!("effnetv2 {} at {}", command.join(" "), commit()))?,
    };
    let network = Network::new(architecture.network(1000));
    let machine = Machine::of(&device);
    let mut results: Vec<TuneResult> = Vec::new();
    let start = Instant::now();
    let is_over = || args.limit.is_some_and(|limit| start.elapsed().as_secs() >= limit.into());
    for size in sizes {
        let mut planner = Planner::new(dtype);
        let (images, dropout) = (args.batch as usize, architecture.dropout);
        let kind = PassKind { images, side: size, dropout, first: true, last: true };
        network.rehearse_training(&mut planner, kind, Rule::PAPER).map_err(|error| match error {
            Error::Shape { problem, .. } => Error::usage("--batch", images, problem),
            error => error,
        })?;
        let candidates = candidates(planner.convolutions(), dtype);
        let (name, count) = (&architecture.name, candidates.len());
        say!(
            "{name}, {size} px, batch {images}, {dtype}: {count} launches, {} rounds each\n",
            effort.rounds
        )?;
        let bar = bar(count, "launches");
        let mut measured = Vec::new();
        for candidate in &candidates {
            if is_over() {
                break;
            }
            measured.push(match dtype {
                Dtype::F32 | Dtype::Tf32 => measure::<f32>(&device, candidate, dtype, effort),
                Dtype::F16 => measure::<f16>(&device, candidate, dtype, effort),
                Dtype::Bf16 => measure::<bf16>(&device, candidate, dtype, effort),
            }?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        print(&measured)?;
        if measured.len() < count {
            say!("only {} of {count} launches: the time was over", measured.len())?;
        }
        enter(&mut tuning, &measured);
        // After each size, so that whoever stops this has what was measured until then.
        tuning.write(&args.out)?;
        results.extend(measured);
    }
    if let Some(path) = &args.record {
        Report::new(machine, results).write(path)?;
    }
    say!("{} choices in {}", tuning.launches.len(), args.out.display())
}

fn print(results: &[TuneResult]) -> Result<()> {
    let mut table = Table::new([
        Column::left("launch"),
        Column::right("calls"),
        Column::right("ways"),
        Column::left("by the rule"),
        Column::right("ms"),
        Column::left("chosen"),
        Column::right("ms"),
        Column::right("gain"),
    ]);
    let (mut before, mut after) = (0.0, 0.0);
    for result in results {
        let rule = &result.ways[0];
        let Some(time) = rule.time.map(|time| time.median) else { continue };
        let chosen = result.chosen.map(|i| &result.ways[i]);
        let gain = result.gain();
        let calls = result.calls as f64;
        before += calls * time;
        after += calls * gain.map_or(time, |[_, chosen]| chosen);
        table.row([
            result.launch.clone(),
            result.calls.to_string(),
            result.ways.len().to_string(),
            format!("{}, {} blocks", rule.kernel, rule.blocks),
            milliseconds(time),
            chosen.map_or_else(String::new, |way| format!("{}, {} blocks", way.kernel, way.blocks)),
            gain.map_or_else(String::new, |[_, chosen]| milliseconds(chosen)),
            gain.map_or_else(String::new, |[rule, chosen]| percent(1.0 - chosen / rule)),
        ]);
    }
    say!("{table}")?;
    for result in results {
        for way in result.ways.iter().filter(|way| way.error.is_some()) {
            let error = way.error.as_deref().unwrap_or_default();
            say!("not chosen: {}, {}: {error}", result.launch, way.choice)?;
        }
    }
    let (gain, before, after) = (percent(1.0 - after / before), milliseconds(before), milliseconds(after));
    say!("all of a step: {before} ms by the rules, {after} ms as chosen, {gain} less")
}
