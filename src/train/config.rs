//! What a run is: everything that decides its result, in one value that is also a TOML file.
//!
//! A configuration starts from the recipe of its model ([`TrainConfig::recipe`]); a file and then the flags override it
//! key by key ([`TrainConfig::merged`]).

use super::progressive::{Interpolation, Progressive, Regularisation, Stage, check_side};
use super::schedule::{Decay, scaled_peak};
use crate::data::{EvalTransform, MixConfig, Operation, RandAugment, Source, TrainTransform};
use crate::model::Architecture;
use crate::nn::{BatchNormSpec, NetworkSpec};
use crate::optimizer::Rule;
use crate::tensor::Padding;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use toml::Table;

/// Everything that decides the result of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The architecture; see [`Architecture::names`].
    pub model: String,
    /// `digits`, or a folder of IDX files or of images.
    pub data: String,
    /// All randomness follows from it.
    pub seed: u64,
    /// Passes over the training images.
    pub epochs: u32,
    /// Images a step.
    pub batch: usize,
    /// Parts that a batch is cut into, one pass each: their gradients are added up, their batch norms see a part alone.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub accumulate: usize,
    /// Side of the images in evaluation, in pixels.
    pub eval_size: usize,
    /// Evaluate every so many epochs, and after the last.
    pub evaluate_every: u32,
    /// Write a checkpoint every so many steps, beside that of each epoch; 0 for none.
    pub checkpoint_every: u64,
    /// The peak of the learning rate, for this batch.
    pub learning_rate: f64,
    /// Epochs of linear warm-up.
    pub warmup_epochs: f64,
    /// Weight decay of the kernels.
    pub weight_decay: f64,
    /// Gradients longer than this are cut to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_gradient_norm: Option<f64>,
    /// ε of label smoothing.
    pub label_smoothing: f64,
    /// Decay of the moving average of weights and statistics.
    pub ema_decay: f64,
    /// Stop at an image that cannot be decoded instead of passing over it.
    pub strict: bool,
    /// How the learning rate falls.
    pub decay: Decay,
    /// The update rule.
    pub optimizer: Rule,
    /// Image size and regularisation, stage by stage.
    pub progressive: Progressive,
    /// What the network is, beside its architecture.
    pub network: NetworkConfig,
    /// What happens to an image in training; the progression sets the strength of RandAugment and of mixing.
    pub train_images: TrainTransform,
    /// What happens to an image in evaluation.
    pub eval_images: EvalTransform,
}

/// Choices that the architectures leave open.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// How strided convolutions meet the border.
    pub padding: Padding,
    /// What stochastic depth would reach after the last block.
    pub drop_path: f64,
    /// Constants of batch normalisation.
    pub batch_norm: BatchNormSpec,
}

const fn one() -> usize {
    1
}

const fn is_one(value: &usize) -> bool {
    *value == 1
}

impl TrainConfig {
    /// The recipe for `model` on `data`: the paper's as google/automl runs it, with sizes and epochs of the
    /// architecture. Small grey characters, and `nano`, get a short recipe instead.
    ///
    /// # Errors
    /// When there is no such model.
    pub fn recipe(model: &str, data: &str) -> Result<Self> {
        let architecture = Architecture::find(model)?;
        let network = NetworkConfig {
            padding: architecture.padding,
            drop_path: architecture.drop_path,
            batch_norm: architecture.batch_norm,
        };
        let characters = Source::parse(data)? == Source::Digits;
        if architecture.name == "nano" || characters {
            return Ok(Self::small(&architecture.name, data, network));
        }
        let last = architecture.train_size;
        let (stages, first) =
            if architecture.name.starts_with("v1") { (1, last) } else { (4, 128.min(last)) };
        let (magnitude, mix) = match architecture.name.as_str() {
            "m" => (15.0, 0.2),
            "l" | "xl" => (20.0, 0.5),
            _ => (10.0, 0.0),
        };
        Ok(Self {
            model: architecture.name.clone(),
            data: data.to_owned(),
            seed: 0,
            epochs: 350,
            batch: 256,
            accumulate: 1,
            eval_size: architecture.eval_size,
            evaluate_every: 1,
            checkpoint_every: 0,
            learning_rate: scaled_peak(0.016, 256),
            warmup_epochs: 5.0,
            weight_decay: 1e-5,
            max_gradient_norm: None,
            label_smoothing: 0.1,
            ema_decay: 0.9999,
            strict: false,
            decay: Decay::PAPER,
            optimizer: Rule::PAPER,
            progressive: Progressive {
                stages,
                interpolation: Interpolation::Automl,
                image_size: [first, last],
                multiple_of: None,
                dropout: [architecture.dropout; 2],
                randaugment: [5.0, magnitude],
                mixup_alpha: [0.0, mix],
                cutmix_alpha: [0.0, mix],
            },
            network,
            train_images: TrainTransform::default(),
            eval_images: EvalTransform::default(),
        })
    }

    /// A short run on small grey characters: no flips, whole images, gentle augmentation.
    fn small(model: &str, data: &str, network: NetworkConfig) -> Self {
        Self {
            model: model.to_owned(),
            data: data.to_owned(),
            seed: 0,
            epochs: 20,
            batch: 32,
            accumulate: 1,
            eval_size: 48,
            evaluate_every: 1,
            checkpoint_every: 0,
            learning_rate: 6e-3,
            warmup_epochs: 2.0,
            weight_decay: 0.05,
            max_gradient_norm: None,
            label_smoothing: 0.05,
            ema_decay: 0.998,
            strict: false,
            decay: Decay::Cosine { floor: 0.01 },
            optimizer: Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
            progressive: Progressive {
                stages: 3,
                interpolation: Interpolation::Paper,
                image_size: [32, 48],
                multiple_of: Some(8),
                dropout: [0.05, 0.2],
                randaugment: [2.0, 5.0],
                mixup_alpha: [0.0, 0.1],
                cutmix_alpha: [0.0, 0.0],
            },
            network,
            train_images: TrainTransform {
                randaugment: Some(RandAugment {
                    layers: 1,
                    operations: Operation::FOR_CHARACTERS.to_vec(),
                    ..RandAugment::default()
                }),
                ..TrainTransform::plain()
            },
            eval_images: EvalTransform::default(),
        }
    }

    /// Makes warm-up and stages fit a run of `epochs`.
    fn shorten(&mut self, epochs: u32) {
        self.epochs = epochs;
        self.warmup_epochs = self.warmup_epochs.min(f64::from(epochs) / 5.0);
        self.progressive.stages = self.progressive.stages.min(epochs.max(1) as usize);
    }

    /// The recipe of the model that `overrides` name, shortened to their epochs, with the keys they hold, the later ones
    /// winning. Without a learning rate of theirs the recipe's is scaled to the batch.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown key or a value of the wrong type. Whether the values work is for
    /// [`validate`](Self::validate).
    pub fn merged(default_model: &str, default_data: &str, overrides: &[(&str, Table)]) -> Result<Self> {
        let text = |key: &str, default: &str| -> Result<String> {
            let given =
                overrides.iter().rev().find_map(|(origin, table)| table.get(key).map(|v| (origin, v)));
            match given {
                None => Ok(default.to_owned()),
                Some((_, toml::Value::String(value))) => Ok(value.clone()),
                Some((origin, other)) => Err(Error::usage(key, other, format!("{origin}: expected a text"))),
            }
        };
        let mut recipe = Self::recipe(&text("model", default_model)?, &text("data", default_data)?)?;
        let epochs = overrides.iter().rev().find_map(|(_, table)| table.get("epochs"));
        if let Some(epochs) = epochs.and_then(|value| u32::try_from(value.as_integer()?).ok()) {
            recipe.shorten(epochs);
        }
        let recipe_batch = recipe.batch;
        let mut merged =
            Table::try_from(&recipe).map_err(|e| Error::Training(format!("the recipe is no TOML: {e}")))?;
        let mut scales = true;
        for (origin, table) in overrides {
            scales &= !table.contains_key("learning_rate");
            for (key, value) in table {
                overlay(&mut merged, &Table::from_iter([(key.clone(), value.clone())]));
                if let Err(error) = merged.clone().try_into::<Self>() {
                    return Err(Error::usage(
                        key,
                        value,
                        format!("{}; correct it in {origin}", plain(error.message())),
                    ));
                }
            }
        }
        let mut config: Self =
            merged.try_into().map_err(|e| Error::usage("configuration", "merged", e.to_string()))?;
        config.model.clone_from(&recipe.model);
        if scales {
            config.learning_rate *= config.batch as f64 / recipe_batch as f64;
        }
        Ok(config)
    }

    /// The keys of a TOML file.
    ///
    /// # Errors
    /// When it cannot be read or is not TOML.
    pub fn read_table(path: &Path) -> Result<Table> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        text.parse().map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.matches('\n').count() + 1;
            Error::file(
                path,
                format!("line {line} is not valid TOML: {}", error.message().replace('\n', ", ")),
            )
        })
    }

    /// The configuration as a TOML file.
    ///
    /// # Errors
    /// Never for values that [`validate`](Self::validate) accepts.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self)
            .map_err(|e| Error::Training(format!("cannot express the configuration: {e}")))
    }

    /// Checks every value that does not depend on the data.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the key, its value and what would work.
    pub fn validate(&self) -> Result<()> {
        Architecture::find(&self.model)?;
        let at_least_one = [("epochs", u64::from(self.epochs)), ("batch", self.batch as u64)];
        for (key, value) in
            at_least_one.into_iter().chain([("evaluate_every", u64::from(self.evaluate_every))])
        {
            if value == 0 {
                return Err(Error::usage(key, 0, "must be at least 1"));
            }
        }
        if self.accumulate == 0 || !self.batch.is_multiple_of(self.accumulate) {
            let problem = format!("must divide the batch of {}", self.batch);
            return Err(Error::usage("accumulate", self.accumulate, problem));
        }
        check_side("eval_size", self.eval_size)?;
        let shares = [
            ("label_smoothing", self.label_smoothing),
            ("ema_decay", self.ema_decay),
            ("network.drop_path", self.network.drop_path),
            ("network.batch_norm.momentum", 1.0 - self.network.batch_norm.momentum),
        ];
        for (key, share) in shares {
            if !(0.0..1.0).contains(&share) {
                return Err(Error::usage(key, share, "must lie in [0, 1)"));
            }
        }
        let positive = [
            ("learning_rate", self.learning_rate),
            ("network.batch_norm.epsilon", self.network.batch_norm.epsilon),
        ];
        for (key, value) in
            positive.into_iter().chain(self.max_gradient_norm.map(|v| ("max_gradient_norm", v)))
        {
            if !(value > 0.0 && value.is_finite()) {
                return Err(Error::usage(key, value, "must be a positive number"));
            }
        }
        if !(self.weight_decay >= 0.0 && self.weight_decay.is_finite()) {
            return Err(Error::usage("weight_decay", self.weight_decay, "must be a number of at least 0"));
        }
        if self.train_images.mix != MixConfig::default() {
            let problem =
                "mixing follows the stages; set progressive.mixup_alpha and progressive.cutmix_alpha";
            return Err(Error::usage("train_images.mix", format!("{:?}", self.train_images.mix), problem));
        }
        self.optimizer.validate()?;
        // The last stage first: its strengths are those that somebody wrote.
        for stage in self.progressive.stages(self.epochs.into())?.into_iter().rev() {
            self.images_in(&stage).validate().map_err(of_the_progression)?;
        }
        self.eval_images.validate()
    }

    /// Images a pass.
    pub const fn images_a_pass(&self) -> usize {
        self.batch / self.accumulate
    }

    /// What happens to a training image in `stage`.
    pub fn images_in(&self, stage: &Stage) -> TrainTransform {
        let Regularisation { randaugment, mixup_alpha, cutmix_alpha, .. } = stage.regularisation;
        let augment = |base: &RandAugment| RandAugment { magnitude: randaugment as f32, ..base.clone() };
        TrainTransform {
            randaugment: self.train_images.randaugment.as_ref().map(augment),
            mix: MixConfig { mixup: mixup_alpha, cutmix: cutmix_alpha },
            ..self.train_images.clone()
        }
    }

    /// The network for `classes` classes.
    ///
    /// # Errors
    /// When there is no such model.
    pub fn network(&self, classes: usize) -> Result<NetworkSpec> {
        let mut architecture = Architecture::find(&self.model)?;
        architecture.padding = self.network.padding;
        architecture.drop_path = self.network.drop_path;
        architecture.batch_norm = self.network.batch_norm;
        Ok(architecture.network(classes))
    }
}

/// Names the key of the progression that a strength comes from.
fn of_the_progression(error: Error) -> Error {
    const KEYS: [(&str, &str); 3] = [
        ("mixup", "progressive.mixup_alpha"),
        ("cutmix", "progressive.cutmix_alpha"),
        ("randaugment.magnitude", "progressive.randaugment"),
    ];
    match error {
        Error::Usage { name, value, problem } => {
            let key = KEYS.iter().find(|(inner, _)| *inner == name).map(|(_, key)| (*key).to_owned());
            Error::Usage { name: key.unwrap_or(name), value, problem }
        }
        other => other,
    }
}

/// What a message of the parser means to someone who writes TOML.
fn plain(message: &str) -> String {
    let words = [
        ("usize", "a whole number"),
        ("u64", "a whole number"),
        ("u32", "a whole number"),
        ("f64", "a number"),
    ];
    let spelled = |text: String, (rust, plain): (&str, &str)| {
        text.replace(&format!("expected {rust}"), &format!("expected {plain}"))
    };
    words.into_iter().fold(message.replace('\n', " "), spelled)
}

/// Writes the keys of `over` over those of `under`, table by table. A table that names another kind of thing (another
/// optimizer, another decay) replaces the old one whole.
fn overlay(under: &mut Table, over: &Table) {
    const KINDS: [&str; 2] = ["rule", "kind"];
    for (key, value) in over {
        match (under.get_mut(key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new))
                if !KINDS.iter().any(|kind| new.contains_key(*kind) && new.get(*kind) != old.get(*kind)) =>
            {
                overlay(old, new);
            }
            _ => {
                under.insert(key.clone(), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        text.parse().unwrap()
    }

    #[test]
    fn a_recipe_survives_toml() {
        for model in Architecture::names() {
            for data in ["digits", "some/folder"] {
                let recipe = TrainConfig::recipe(model, data).unwrap();
                recipe.validate().unwrap();
                let text = recipe.to_toml().unwrap();
                assert_eq!(toml::from_str::<TrainConfig>(&text).unwrap(), recipe, "{text}");
            }
        }
    }

    #[test]
    fn later_keys_win_and_tables_merge() {
        let file = table(
            "model = 's'\nbatch = 64\n[progressive]\nimage_size = [96, 160]\n[optimizer]\nrule = 'sgd'",
        );
        let flags = table("batch = 128");
        let config = TrainConfig::merged("b0", "pictures", &[("run.toml", file), ("flags", flags)]).unwrap();
        assert_eq!((config.model.as_str(), config.data.as_str(), config.batch), ("s", "pictures", 128));
        assert_eq!(config.progressive.image_size, [96, 160]);
        assert_eq!(config.progressive.stages, 4, "other keys of the table stay");
        assert_eq!(config.optimizer, Rule::Sgd { momentum: 0.9, nesterov: false });
        assert!((config.learning_rate - 0.008).abs() < 1e-12, "scaled to the batch");
        let fixed = table("learning_rate = 0.5\nbatch = 1");
        assert_eq!(TrainConfig::merged("b0", "x", &[("flags", fixed)]).unwrap().learning_rate, 0.5);
    }

    #[test]
    fn wrong_values_are_named() {
        for (text, expected) in [
            ("modle = 's'", "modle"),
            ("model = 'x'", "unknown model"),
            ("model = 3", "expected a text"),
            ("[progressive]\nsize = 3", "size"),
            ("batch = 0", "batch = 0"),
            (
                "batch = -3",
                "batch = -3: invalid value: integer `-3`, expected a whole number; correct it in run.toml",
            ),
            ("batch = 12\naccumulate = 8", "accumulate = 8: must divide the batch of 12"),
            ("accumulate = 0", "accumulate = 0"),
            ("eval_size = 31", "at least 32"),
            ("[progressive]\nimage_size = [16, 64]", "image_size"),
            ("learning_rate = 0.0", "learning_rate"),
            ("learning_rate = nan", "learning_rate"),
            ("label_smoothing = 1.0", "label_smoothing"),
            ("[network]\ndrop_path = 1.5", "network.drop_path"),
            ("[optimizer]\nrule = 'lion'", "lion"),
            ("[train_images.mix]\nmixup = 0.5", "progressive.mixup_alpha"),
            ("epochs = 2\n[progressive]\nstages = 3", "progressive.stages = 3"),
            ("[progressive]\nmixup_alpha = [0.0, 1e-9]", "progressive.mixup_alpha"),
            ("[progressive]\nrandaugment = [5.0, 31.0]", "progressive.randaugment"),
            ("[progressive]\nimage_size = [128, 20000]", "at most 16384"),
            ("[eval_images.crop]\ncenter = 2.0", "center"),
        ] {
            let merged = TrainConfig::merged("s", "pictures", &[("run.toml", table(text))]);
            let error = merged.and_then(|config| config.validate()).unwrap_err();
            assert!(error.to_string().contains(expected), "{text}: {error}");
            assert_eq!(error.exit_code(), 2, "{text}");
        }
    }
}
