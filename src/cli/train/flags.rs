//! The flags that describe a run, and how they become its configuration.

use crate::optimizer::Rule;
use crate::train::TrainConfig;
use crate::{Error, Result};
use clap::ValueEnum;
use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;
use std::str::FromStr;
use toml::{Table, Value};

// No doc comment: clap would take it for the description of the whole command.
#[derive(Debug, clap::Args)]
#[command(mut_args(|flag| flag.conflicts_with("resume")))]
pub(super) struct RunFlags {
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
    /// The folder of the run [default: runs/MODEL-DATA-N].
    #[arg(long, value_name = "DIR")]
    pub(super) out: Option<PathBuf>,
    /// Start from the weights of this safetensors file (timm or torchvision names); a classifier for another number of
    /// classes starts afresh.
    #[arg(long, value_name = "FILE")]
    pub(super) init: Option<PathBuf>,
    /// The seed: the same one gives the same run, bit for bit [default: 0].
    #[arg(long, value_parser = seeds())]
    seed: Option<u64>,
    /// Write a checkpoint every so many steps, beside that of each epoch [default: 0, only each epoch].
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    checkpoint_every: Option<u64>,
    /// Stop at an image that cannot be decoded instead of passing over it.
    #[arg(long)]
    strict: bool,
    /// Passes over the training images; the recipe's warm-up and stages shrink to fit.
    #[arg(long, help_heading = RECIPE)]
    epochs: Option<u32>,
    /// Images a step, or `auto`: as many as fit the GPU's memory. The recipe's learning rate is scaled to it.
    #[arg(long, help_heading = RECIPE)]
    batch: Option<Batch>,
    /// Parts that a batch is cut into, to save memory: their gradients are added up, their batch norms see a part alone.
    #[arg(long, value_name = "PARTS", help_heading = RECIPE)]
    accumulate: Option<usize>,
    /// Side of the images in pixels: in training that of the last stage, and in evaluation unless --eval-size says
    /// otherwise.
    #[arg(long, value_name = "PIXELS", help_heading = RECIPE)]
    size: Option<usize>,
    /// Side of the images in evaluation.
    #[arg(long, value_name = "PIXELS", help_heading = RECIPE)]
    eval_size: Option<usize>,
    /// Stages of progressive learning, image size and regularisation growing from one to the next; 1 turns it off.
    #[arg(long, value_name = "STAGES", help_heading = RECIPE)]
    progressive: Option<usize>,
    /// Side of the images in the first stage.
    #[arg(long, value_name = "PIXELS", help_heading = RECIPE)]
    first_size: Option<usize>,
    /// The update rule.
    #[arg(long, help_heading = RECIPE)]
    optimizer: Option<OptimizerName>,
    /// Peak of the learning rate; a given one is not scaled to the batch.
    #[arg(long, value_name = "RATE", help_heading = RECIPE)]
    lr: Option<f64>,
    /// Epochs of warm-up.
    #[arg(long, value_name = "EPOCHS", help_heading = RECIPE)]
    warmup: Option<f64>,
    /// Weight decay of the kernels.
    #[arg(long, value_name = "DECAY", help_heading = RECIPE)]
    weight_decay: Option<f64>,
    /// Label smoothing.
    #[arg(long, value_name = "EPSILON", help_heading = RECIPE)]
    label_smoothing: Option<f64>,
    /// Dropout of the last stage.
    #[arg(long, value_name = "RATE", help_heading = RECIPE)]
    dropout: Option<f64>,
    /// Mixup's α in the last stage.
    #[arg(long, value_name = "ALPHA", help_heading = RECIPE)]
    mixup: Option<f64>,
    /// CutMix's α in the last stage.
    #[arg(long, value_name = "ALPHA", help_heading = RECIPE)]
    cutmix: Option<f64>,
    /// RandAugment's magnitude in the last stage.
    #[arg(long, value_name = "MAGNITUDE", help_heading = RECIPE)]
    randaugment: Option<f64>,
    /// Decay of the moving average of the weights.
    #[arg(long, value_name = "DECAY", help_heading = RECIPE)]
    ema: Option<f64>,
}

const RECIPE: &str = "Recipe [defaults: those of the model, see config.toml in the run folder]";

/// Seeds are what TOML can write down.
pub(in crate::cli) fn seeds() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(..=i64::MAX as u64)
}

/// Images a step as `--batch` names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batch {
    Auto,
    Images(u32),
}

impl FromStr for Batch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => text.parse().map(Self::Images).map_err(|e| format!("expected a number or auto: {e}")),
        }
    }
}

impl Display for Batch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Images(count) => count.fmt(f),
        }
    }
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

impl OptimizerName {
    const fn rule(self) -> Rule {
        match self {
            Self::Rmsprop => Rule::PAPER,
            Self::Sgd => Rule::Sgd { momentum: 0.9, nesterov: false },
            Self::Adamw => Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        }
    }
}

impl RunFlags {
    /// Whether the device's memory decides how many images a step has.
    pub(super) fn auto_batch(&self) -> bool {
        self.batch == Some(Batch::Auto)
    }

    /// Recipe, file and flags; `batch` stands for `--batch auto`, once it is known.
    pub(super) fn configuration(&self, batch: Option<usize>) -> Result<TrainConfig> {
        let mut overrides = Vec::new();
        let path = self.config.as_ref().map(|path| path.display().to_string());
        if let (Some(file), Some(path)) = (&self.config, &path) {
            overrides.push((path.as_str(), TrainConfig::read_table(file)?));
        }
        overrides.push(("flags", self.recipe_flags(batch)));
        let mut config = TrainConfig::merged("b0", "digits", &overrides)?;
        self.apply(&mut config);
        config.validate()?;
        Ok(config)
    }

    /// The flags that the recipe and its scaling depend on.
    fn recipe_flags(&self, batch: Option<usize>) -> Table {
        let batch = match self.batch {
            Some(Batch::Images(count)) => Some(count.into()),
            _ => batch.and_then(|count| i64::try_from(count).ok()),
        };
        let flags = [
            ("model", self.model.clone().map(Value::String)),
            ("data", self.data.clone().map(Value::String)),
            ("epochs", self.epochs.map(|n| Value::Integer(n.into()))),
            ("batch", batch.map(Value::Integer)),
            ("learning_rate", self.lr.map(Value::Float)),
        ];
        flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect()
    }

    /// All other flags.
    fn apply(&self, config: &mut TrainConfig) {
        fn set<T: Copy>(target: &mut T, flag: Option<T>) {
            *target = flag.unwrap_or(*target);
        }
        set(&mut config.warmup_epochs, self.warmup);
        set(&mut config.accumulate, self.accumulate);
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

    /// An error about a key of the configuration, told of the flag that gave the value, if one did.
    pub(super) fn blame(&self, error: Error) -> Error {
        fn text<T: ToString>(flag: &Option<T>) -> Option<String> {
            flag.as_ref().map(T::to_string)
        }
        let Error::Usage { name, value, problem } = error else { return error };
        let flags = [
            ("--model", "model", text(&self.model)),
            ("--data", "data", text(&self.data)),
            ("--epochs", "epochs", text(&self.epochs)),
            ("--batch", "batch", text(&self.batch)),
            ("--accumulate", "accumulate", text(&self.accumulate)),
            ("--eval-size", "eval_size", text(&self.eval_size)),
            ("--size", "eval_size", text(&self.size)),
            ("--size", "progressive.image_size", text(&self.size)),
            ("--first-size", "progressive.image_size", text(&self.first_size)),
            ("--progressive", "progressive.stages", text(&self.progressive)),
            ("--lr", "learning_rate", text(&self.lr)),
            ("--warmup", "warmup_epochs", text(&self.warmup)),
            ("--weight-decay", "weight_decay", text(&self.weight_decay)),
            ("--label-smoothing", "label_smoothing", text(&self.label_smoothing)),
            ("--dropout", "progressive.dropout", text(&self.dropout)),
            ("--mixup", "progressive.mixup_alpha", text(&self.mixup)),
            ("--cutmix", "progressive.cutmix_alpha", text(&self.cutmix)),
            ("--randaugment", "progressive.randaugment", text(&self.randaugment)),
            ("--ema", "ema_decay", text(&self.ema)),
        ];
        let given = flags.iter().find(|(_, key, given)| *key == name && given.as_ref() == Some(&value));
        Error::Usage { name: given.map_or(name, |(flag, ..)| (*flag).to_owned()), value, problem }
    }
}
