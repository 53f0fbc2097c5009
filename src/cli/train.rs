//! `train`: a run from flags and a configuration file, or the rest of an interrupted one.

use super::interrupt::stop_flag;
use super::progress::Terminal;
use crate::Result;
use crate::data::{BadImages, Source, Splits, open};
use crate::optimizer::Rule;
use crate::reference::Reference;
use crate::report::table::{duration, percent, thousands};
use crate::train::checkpoint::Checkpoint;
use crate::train::run::{CHECKPOINT, CONFIG, CURVES, METRICS, RunFolder};
use crate::train::{TrainConfig, Trainer};
use clap::ValueEnum;
use std::path::{Path, PathBuf};
use std::time::Instant;
use toml::{Table, Value};

/// Trains a network. Without flags: B0 on the embedded digits. A model brings its recipe; the configuration file overrides it
/// key by key, and flags override both. The run folder holds the effective configuration, metrics, curves and the
/// checkpoint.
#[derive(Debug, Default, clap::Args)]
#[command(after_help = "Examples:
  effnetv2 train --model b0 --data photos --size 192 --epochs 90 --batch 64
  effnetv2 train --data mnist --model nano --epochs 10 --out runs/mnist
  effnetv2 train --config my.toml --seed 3
  effnetv2 train --resume runs/b0-photos-1")]
pub(super) struct Args {
    /// A TOML file with keys of config.toml; flags win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Architecture: b0 to b3, s, m, l, xl, v1-b0 to v1-b7, nano [default: b0].
    #[arg(long)]
    model: Option<String>,
    /// `digits` (embedded), a folder of IDX files (MNIST), or an image folder with train/<class>/* and val/<class>/*
    /// [default: digits].
    #[arg(long, value_name = "DATA")]
    data: Option<String>,
    /// Passes over the training images; a recipe's warm-up and stages shrink to fit.
    #[arg(long)]
    epochs: Option<u32>,
    /// Images a step; the recipe's learning rate is scaled to it.
    #[arg(long)]
    batch: Option<u32>,
    /// Side of the images in pixels: in training that of the last stage, and in evaluation unless --eval-size says
    /// otherwise.
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Side of the images in evaluation.
    #[arg(long, value_name = "PIXELS")]
    eval_size: Option<usize>,
    /// Stages of progressive learning, image size and regularisation growing from one to the next; 1 turns it off.
    #[arg(long, value_name = "STAGES")]
    progressive: Option<usize>,
    /// Side of the images in the first stage.
    #[arg(long, value_name = "PIXELS")]
    first_size: Option<usize>,
    /// The update rule.
    #[arg(long)]
    optimizer: Option<OptimizerName>,
    /// Peak of the learning rate; a given one is not scaled to the batch.
    #[arg(long, value_name = "RATE")]
    lr: Option<f64>,
    /// Epochs of warm-up.
    #[arg(long, value_name = "EPOCHS")]
    warmup: Option<f64>,
    /// Weight decay of the kernels.
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Label smoothing.
    #[arg(long)]
    label_smoothing: Option<f64>,
    /// Dropout of the last stage.
    #[arg(long)]
    dropout: Option<f64>,
    /// Mixup's α in the last stage.
    #[arg(long, value_name = "ALPHA")]
    mixup: Option<f64>,
    /// CutMix's α in the last stage.
    #[arg(long, value_name = "ALPHA")]
    cutmix: Option<f64>,
    /// RandAugment's magnitude in the last stage.
    #[arg(long, value_name = "MAGNITUDE")]
    randaugment: Option<f64>,
    /// Decay of the moving average of the weights.
    #[arg(long, value_name = "DECAY")]
    ema: Option<f64>,
    /// The seed: the same one gives the same run, bit for bit.
    #[arg(long, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    seed: Option<u64>,
    /// Write a checkpoint every so many steps, beside that of each epoch.
    #[arg(long, value_name = "STEPS")]
    checkpoint_every: Option<u64>,
    /// Stop at an image that cannot be decoded instead of passing over it.
    #[arg(long)]
    strict: bool,
    /// The folder of the run [default: runs/MODEL-DATA-N].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Start from the weights of this safetensors file (timm or torchvision names); a classifier for another number of
    /// classes starts afresh.
    #[arg(long, value_name = "FILE")]
    init: Option<PathBuf>,
    /// Go on with the run in this folder; its configuration stays.
    #[arg(long, value_name = "DIR", exclusive = true)]
    resume: Option<PathBuf>,
    /// Threads; 0 for one per processor.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OptimizerName {
    /// As TensorFlow 1 defines it: the paper's.
    Rmsprop,
    /// With momentum 0.9.
    Sgd,
    /// Adam with decoupled weight decay.
    Adamw,
}

pub(super) fn run(args: &Args) -> Result<()> {
    super::limit_threads(args.threads)?;
    if let Some(path) = &args.resume {
        return resume(path);
    }
    let config = args.configuration()?;
    let data = match Source::parse(&config.data)? {
        Source::Folder(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        _ => config.data.clone(),
    };
    let name = format!("{}-{data}", config.model);
    start(config, args.out.as_deref(), &name, args.init.as_deref()).map(drop)
}

impl Args {
    /// Recipe, file and flags.
    fn configuration(&self) -> Result<TrainConfig> {
        let mut overrides = Vec::new();
        let path = self.config.as_ref().map(|path| path.display().to_string());
        if let (Some(file), Some(path)) = (&self.config, &path) {
            overrides.push((path.as_str(), TrainConfig::read_table(file)?));
        }
        overrides.push(("flags", self.recipe_flags()));
        let mut config = TrainConfig::merged("b0", "digits", &overrides)?;
        self.apply(&mut config);
        config.validate()?;
        Ok(config)
    }

    /// The flags that the recipe and its scaling depend on.
    fn recipe_flags(&self) -> Table {
        let batch = self.batch.map(|b| Value::Integer(b.into()));
        let flags = [
            ("model", self.model.clone().map(Value::String)),
            ("data", self.data.clone().map(Value::String)),
            ("batch", batch),
            ("learning_rate", self.lr.map(Value::Float)),
        ];
        flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// All other flags.
    fn apply(&self, config: &mut TrainConfig) {
        fn set<T: Copy>(target: &mut T, flag: Option<T>) {
            *target = flag.unwrap_or(*target);
        }
        if let Some(epochs) = self.epochs {
            config.epochs = epochs;
            config.warmup_epochs = config.warmup_epochs.min(f64::from(epochs) / 5.0);
            config.progressive.stages = config.progressive.stages.min(epochs.max(1) as usize);
        }
        set(&mut config.warmup_epochs, self.warmup);
        set(&mut config.weight_decay, self.weight_decay);
        set(&mut config.label_smoothing, self.label_smoothing);
        set(&mut config.ema_decay, self.ema);
        set(&mut config.seed, self.seed);
        set(&mut config.checkpoint_every, self.checkpoint_every);
        set(&mut config.eval_size, self.eval_size.or(self.size));
        config.strict |= self.strict;
        set(&mut config.optimizer, self.optimizer.map(OptimizerName::rule));
        let progressive = &mut config.progressive;
        set(&mut progressive.stages, self.progressive);
        if let Some(size) = self.size {
            progressive.image_size = [progressive.image_size[0].min(size), size];
        }
        set(&mut progressive.image_size[0], self.first_size);
        for (range, flag) in [
            (&mut progressive.dropout, self.dropout),
            (&mut progressive.mixup_alpha, self.mixup),
            (&mut progressive.cutmix_alpha, self.cutmix),
            (&mut progressive.randaugment, self.randaugment),
        ] {
            if let Some(last) = flag {
                *range = [range[0].min(last), last];
            }
        }
    }
}

impl OptimizerName {
    const fn rule(self) -> Rule {
        match self {
            Self::Rmsprop => Rule::PAPER,
            Self::Sgd => Rule::Sgd { momentum: 0.9, nesterov: false },
            Self::Adamw => Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        }
    }
}

fn open_data(config: &TrainConfig) -> Result<Splits> {
    let bad_images = if config.strict { BadImages::Fail } else { BadImages::Skip };
    let splits = open(&Source::parse(&config.data)?, bad_images)?;
    println!(
        "data: {}, {} classes, {} training and {} validation images",
        splits.train.name(),
        splits.train.classes().len(),
        thousands(splits.train.len() as u64),
        thousands(splits.validation.len() as u64)
    );
    Ok(splits)
}

/// Runs a configuration from its start in the folder `out`, or in a new one named after `name`.
pub(super) fn start(
    config: TrainConfig,
    out: Option<&Path>,
    name: &str,
    init: Option<&Path>,
) -> Result<RunFolder> {
    super::announce_device();
    let splits = open_data(&config)?;
    let classes = splits.train.classes().to_vec();
    let mut trainer = Trainer::new(Reference::<f32>::new(), config, classes, init)?;
    trainer.check(&splits)?;
    let path = out.map_or_else(|| RunFolder::free(Path::new("runs"), name), Path::to_owned);
    let folder = RunFolder::create(&path, trainer.config())?;
    finish(&mut trainer, &splits, folder)
}

fn resume(path: &Path) -> Result<()> {
    super::announce_device();
    let checkpoint = Checkpoint::read(path)?;
    let folder = checkpoint.path().parent().unwrap_or(path).to_owned();
    let splits = open_data(&checkpoint.description.config)?;
    let mut trainer = Trainer::resume(Reference::<f32>::new(), &checkpoint)?;
    trainer.check(&splits)?;
    let position = trainer.position();
    println!("going on after step {} (epoch {})", thousands(position.step), position.epoch + 1);
    let folder = RunFolder::reopen(&folder, position.step)?;
    finish(&mut trainer, &splits, folder).map(drop)
}

/// Trains to the end and says what there is to see.
fn finish(trainer: &mut Trainer<Reference<f32>>, splits: &Splits, folder: RunFolder) -> Result<RunFolder> {
    let config = trainer.config();
    println!(
        "training {} ({} parameters), seed {}, in {}",
        config.model,
        thousands(trainer.network().layout().param_count() as u64),
        config.seed,
        folder.path().display()
    );
    let mut terminal = Terminal::new(stop_flag()?, config.epochs);
    let start = Instant::now();
    let outcome = trainer.run(splits, &folder, &mut terminal);
    drop(terminal);
    report_problems(splits);
    let scores = outcome?;
    println!(
        "held-out accuracy {} (top-5 {}), loss {:.4}, after {}",
        percent(scores.top1),
        percent(scores.top5),
        scores.loss,
        duration(start.elapsed().as_secs_f64())
    );
    println!("in {}: {CONFIG}, {METRICS}, {CURVES}, {CHECKPOINT}", folder.path().display());
    Ok(folder)
}

/// Names images that could not be used.
pub(super) fn report_problems(splits: &Splits) {
    const SHOWN: usize = 10;
    let problems = splits.problems();
    if problems.is_empty() {
        return;
    }
    eprintln!("{} images could not be used:", problems.len());
    for problem in problems.iter().take(SHOWN) {
        eprintln!("  {}: {}", problem.path.display(), problem.reason);
    }
    if problems.len() > SHOWN {
        eprintln!("  and {} more", problems.len() - SHOWN);
    }
}
