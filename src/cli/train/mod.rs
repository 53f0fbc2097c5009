//! `train`: a run from flags and a configuration file, or the rest of an interrupted one.

mod flags;

pub(super) use flags::seeds;

use super::compute::{Compute, Work};
use super::interrupt::stop_flag;
use super::output::{note, say};
use super::progress::Terminal;
use crate::backend::Backend;
use crate::data::{BadImages, Source, Splits, open};
use crate::nn::Network;
use crate::report::table::{duration, percent, thousands};
use crate::train::checkpoint::Checkpoint;
use crate::train::run::{CHECKPOINT, CONFIG, CURVES, METRICS, RunFolder};
use crate::train::{TrainConfig, Trainer, largest_batch};
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
    compute: Compute,
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.resume {
        Some(path) => resume(path, &args.compute),
        None => begin(&args.run, &args.compute).map_err(|error| args.run.blame(error)),
    }
}

fn begin(flags: &RunFlags, compute: &Compute) -> Result<()> {
    let config = flags.configuration(None)?;
    let data = match Source::parse(&config.data)? {
        Source::Folder(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        _ => config.data.clone(),
    };
    let name = format!("{}-{data}", config.model);
    let start = Start {
        init: flags.init.as_deref(),
        batch: flags.auto_batch().then_some(flags),
        ..Start::new(config, flags.out.as_deref(), &name)
    };
    compute.run(None, false, start).map(drop)
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
pub(super) struct Start<'a> {
    config: TrainConfig,
    out: Option<&'a Path>,
    name: &'a str,
    init: Option<&'a Path>,
    /// Where the configuration comes from anew, once it is known how large a batch the device holds.
    batch: Option<&'a RunFlags>,
}

impl<'a> Start<'a> {
    pub(super) fn new(config: TrainConfig, out: Option<&'a Path>, name: &'a str) -> Self {
        Self { config, out, name, init: None, batch: None }
    }
}

impl Work for Start<'_> {
    type Output = RunFolder;

    fn on<B: Backend<Element = f32>>(self, backend: B) -> Result<RunFolder> {
        let Self { mut config, out, name, init, batch } = self;
        let splits = open_data(&config)?;
        let classes = splits.train.classes().to_vec();
        if let Some(flags) = batch {
            config = flags.configuration(Some(largest(&backend, &config, &splits)?))?;
        }
        let mut trainer = Trainer::new(backend, config, classes, init)?;
        trainer.check(&splits)?;
        let path = out.map_or_else(|| RunFolder::free(Path::new("runs"), name), Path::to_owned);
        let folder = RunFolder::create(&path, trainer.config())?;
        finish(&mut trainer, &splits, folder)
    }
}

/// The largest batch that fits the device, or the whole data set.
fn largest<B: Backend>(backend: &B, config: &TrainConfig, splits: &Splits) -> Result<usize> {
    let network = Network::new(config.network(splits.train.classes().len())?);
    let Some(images) = largest_batch(backend, config, &network, false)? else {
        let problem =
            "that is for a GPU, whose memory decides, and there not even one image fits; give a number";
        return Err(Error::usage("--batch", "auto", problem));
    };
    let batch = (images * config.accumulate).min(splits.train.len() / config.accumulate * config.accumulate);
    say!("batch: {batch} images a step, {images} a pass are the most that fit")?;
    Ok(batch)
}

fn resume(path: &Path, compute: &Compute) -> Result<()> {
    let checkpoint = Checkpoint::read(path)?;
    let dtype = checkpoint.description.dtype;
    compute.run(dtype, false, Resume(checkpoint))
}

struct Resume(Checkpoint);

impl Work for Resume {
    type Output = ();

    fn on<B: Backend<Element = f32>>(self, backend: B) -> Result<()> {
        let Self(checkpoint) = self;
        let folder = match checkpoint.path().parent() {
            Some(folder) if folder != Path::new("") => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let splits = open_data(&checkpoint.description.config)?;
        let mut trainer = Trainer::resume(backend, &checkpoint)?;
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
}

/// Trains to the end and says what there is to see.
fn finish<B: Backend<Element = f32>>(
    trainer: &mut Trainer<B>,
    splits: &Splits,
    folder: RunFolder,
) -> Result<RunFolder> {
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
