//! `train`: a run from flags and a configuration file, or the rest of an interrupted one.

mod flags;

pub(super) use flags::seeds;

use super::Threads;
use super::interrupt::stop_flag;
use super::output::{note, say};
use super::progress::Terminal;
use crate::data::{BadImages, Source, Splits, open};
use crate::reference::Reference;
use crate::report::table::{duration, percent, thousands};
use crate::train::checkpoint::Checkpoint;
use crate::train::run::{CHECKPOINT, CONFIG, CURVES, METRICS, RunFolder};
use crate::train::{TrainConfig, Trainer};
use crate::{Error, Result};
use flags::RunFlags;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Train a network.
///
/// Without flags: B0 on the embedded digits. A model brings its recipe; the configuration file overrides it key by key, and
/// flags override both. The run folder holds the effective configuration, metrics, curves and the checkpoint.
#[derive(Debug, clap::Args)]
#[command(allow_negative_numbers = true)]
#[command(after_help = "Examples:
  effnetv2 train --model b0 --data photos --size 192 --epochs 90 --batch 64
  effnetv2 train --data mnist --model nano --epochs 10 --out runs/mnist
  effnetv2 train --config my.toml --seed 3
  effnetv2 train --resume runs/b0-photos-1")]
pub(super) struct Args {
    // First, so that what it says of all flags is said of its own.
    #[command(flatten)]
    run: RunFlags,
    /// Go on with the run in this folder; its configuration stays.
    #[arg(long, value_name = "DIR")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    threads: Threads,
}

pub(super) fn run(args: &Args) -> Result<()> {
    args.threads.limit()?;
    match &args.resume {
        Some(path) => resume(path),
        None => begin(&args.run).map_err(|error| args.run.blame(error)),
    }
}

fn begin(flags: &RunFlags) -> Result<()> {
    let config = flags.configuration()?;
    let data = match Source::parse(&config.data)? {
        Source::Folder(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        _ => config.data.clone(),
    };
    let name = format!("{}-{data}", config.model);
    start(config, flags.out.as_deref(), &name, flags.init.as_deref()).map(drop)
}

fn open_data(config: &TrainConfig) -> Result<Splits> {
    let bad_images = if config.strict { BadImages::Fail } else { BadImages::Skip };
    let splits = open(&Source::parse(&config.data)?, bad_images)?;
    say!(
        "data: {}, {} classes, {} training and {} validation images",
        splits.train.name(),
        splits.train.classes().len(),
        thousands(splits.train.len() as u64),
        thousands(splits.validation.len() as u64)
    )?;
    Ok(splits)
}

/// Runs a configuration from its start in the folder `out`, or in a new one named after `name`.
pub(super) fn start(
    config: TrainConfig,
    out: Option<&Path>,
    name: &str,
    init: Option<&Path>,
) -> Result<RunFolder> {
    super::announce_device()?;
    let splits = open_data(&config)?;
    let classes = splits.train.classes().to_vec();
    let mut trainer = Trainer::new(Reference::<f32>::new(), config, classes, init)?;
    trainer.check(&splits)?;
    let path = out.map_or_else(|| RunFolder::free(Path::new("runs"), name), Path::to_owned);
    let folder = RunFolder::create(&path, trainer.config())?;
    finish(&mut trainer, &splits, folder)
}

fn resume(path: &Path) -> Result<()> {
    super::announce_device()?;
    let checkpoint = Checkpoint::read(path)?;
    let folder = match checkpoint.path().parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    let splits = open_data(&checkpoint.description.config)?;
    let mut trainer = Trainer::resume(Reference::<f32>::new(), &checkpoint)?;
    trainer.check(&splits)?;
    let position = trainer.position();
    let (step, epochs) = (thousands(position.step), trainer.config().epochs);
    match position.epoch < epochs {
        true => say!("going on after step {step}, in epoch {} of {epochs}", position.epoch + 1)?,
        false => say!("all {epochs} epochs are done, after step {step}; only measuring")?,
    }
    let folder = RunFolder::reopen(&folder, position)?;
    finish(&mut trainer, &splits, folder).map(drop)
}

/// Trains to the end and says what there is to see.
fn finish(trainer: &mut Trainer<Reference<f32>>, splits: &Splits, folder: RunFolder) -> Result<RunFolder> {
    let config = trainer.config();
    say!(
        "training {} ({} parameters), seed {}, in {}",
        config.model,
        thousands(trainer.network().layout().param_count() as u64),
        config.seed,
        folder.path().display()
    )?;
    let mut terminal = Terminal::new(stop_flag()?, config.epochs);
    let start = Instant::now();
    let outcome = trainer.run(splits, &folder, &mut terminal);
    drop(terminal);
    report_problems(splits);
    let scores = outcome.map_err(|error| how_to_go_on(error, &folder))?;
    say!(
        "held-out accuracy {} (top-5 {}), loss {:.4}, after {}",
        percent(scores.top1),
        percent(scores.top5),
        scores.loss,
        duration(start.elapsed().as_secs_f64())
    )?;
    say!("in {}: {CONFIG}, {METRICS}, {CURVES}, {CHECKPOINT}", folder.path().display())?;
    Ok(folder)
}

/// An error of data or disk that ended a run, with the way on from its last checkpoint.
fn how_to_go_on(error: Error, folder: &RunFolder) -> Error {
    match error {
        Error::Io { .. } | Error::File { .. } if folder.file(CHECKPOINT).exists() => {
            let path = folder.path().display();
            Error::Training(format!(
                "{error}; the last checkpoint is good: mend this and go on with `effnetv2 train --resume {path}`"
            ))
        }
        other => other,
    }
}

/// Names images that could not be used.
pub(super) fn report_problems(splits: &Splits) {
    const SHOWN: usize = 10;
    let problems = splits.problems();
    if problems.is_empty() {
        return;
    }
    note!("{} images could not be used:", problems.len());
    for problem in problems.iter().take(SHOWN) {
        note!("  {}: {}", problem.path.display(), problem.reason);
    }
    if problems.len() > SHOWN {
        note!("  and {} more", problems.len() - SHOWN);
    }
}
