//! The folder of a run: effective configuration, metrics, curves, checkpoint.

use super::checkpoint::Position;
use super::config::TrainConfig;
use super::evaluate::{Scores, number_or_nan};
use super::progressive::Stage;
use crate::report::curves::{Figure, History, Mark};
use crate::report::metrics;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// The effective configuration, TOML.
pub const CONFIG: &str = "config.toml";
/// One [`Record`] a line, JSON.
pub const METRICS: &str = "metrics.jsonl";
/// Loss, accuracy, learning rate and image size.
pub const CURVES: &str = "curves.svg";
/// Everything to go on from.
pub const CHECKPOINT: &str = "checkpoint.safetensors";

/// One line of the metrics.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A training step.
    Step(StepRecord),
    /// The end of an epoch.
    Epoch(EpochRecord),
}

/// A training step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps made, this one included.
    pub step: u64,
    /// Its epoch, from 0.
    pub epoch: u32,
    /// Its loss, smoothed and mixed labels included.
    pub loss: f64,
    /// Its learning rate.
    pub learning_rate: f64,
    /// Norm of all gradients, before clipping. Not finite where a gradient overflowed f16 and the step was skipped; JSON
    /// writes that as null.
    #[serde(deserialize_with = "number_or_nan")]
    pub gradient_norm: f64,
    /// Side of its images in pixels.
    pub image_size: usize,
}

/// The end of an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Steps made.
    pub step: u64,
    /// The epoch, from 0.
    pub epoch: u32,
    /// Mean loss of its steps.
    pub train_loss: f64,
    /// The weights on the validation images, in epochs that evaluate.
    pub weights: Option<Scores>,
    /// Their moving average.
    pub average: Option<Scores>,
    /// Training images a second, evaluation excluded; counted from the last start.
    pub images_per_second: f64,
}

/// A run's folder.
#[derive(Clone, Debug)]
pub struct RunFolder(PathBuf);

impl RunFolder {
    /// Makes the folder and writes the configuration into it.
    ///
    /// # Errors
    /// When it already holds a run, or cannot be written.
    pub fn create(path: &Path, config: &TrainConfig) -> Result<Self> {
        if path.join(CHECKPOINT).exists() {
            let problem = "already holds a run; go on with it by --resume, or choose another folder by --out";
            return Err(Error::file(path, problem));
        }
        if path.join(CONFIG).exists() {
            let problem = "holds a run that ended before its first checkpoint; remove the folder, or choose another by --out";
            return Err(Error::file(path, problem));
        }
        fs::create_dir_all(path).map_err(Error::io(path, "create"))?;
        let file = path.join(CONFIG);
        fs::write(&file, config.to_toml()?).map_err(Error::io(&file, "write"))?;
        Ok(Self(path.to_owned()))
    }

    /// A folder that holds a run whose checkpoint stands at `position`; metrics of what comes later are dropped.
    ///
    /// # Errors
    /// When the metrics cannot be rewritten.
    pub fn reopen(path: &Path, position: Position) -> Result<Self> {
        metrics::retain(&path.join(METRICS), |record| match record {
            Record::Step(step) => step.step <= position.step,
            // An epoch is over only when its evaluation is: the last step of one does not suffice.
            Record::Epoch(epoch) => epoch.epoch < position.epoch,
        })?;
        Ok(Self(path.to_owned()))
    }

    /// The first folder `root/<name>-<n>` that does not exist.
    pub fn free(root: &Path, name: &str) -> PathBuf {
        let candidates = (1_u32..).map(|n| root.join(format!("{name}-{n}")));
        candidates.into_iter().find(|path| !path.exists()).unwrap_or_else(|| root.join(name))
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// One of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Draws the curves of all metrics so far.
    ///
    /// # Errors
    /// When the metrics cannot be read or the picture not written.
    pub fn draw_curves(&self, title: &str, steps_per_epoch: usize, stages: &[Stage]) -> Result<()> {
        let mut history = History::default();
        for record in metrics::read(&self.file(METRICS))? {
            match record {
                Record::Step(step) => {
                    let at = step.step as f64 / steps_per_epoch as f64;
                    history.loss.push((at, step.loss));
                    history.learning_rate.push((at, step.learning_rate));
                    history.image_size.push((at, step.image_size as f64));
                }
                Record::Epoch(epoch) => {
                    let at = f64::from(epoch.epoch + 1);
                    history.accuracy.extend(epoch.weights.map(|s| (at, s.top1)));
                    history.ema_accuracy.extend(epoch.average.map(|s| (at, s.top1)));
                }
            }
        }
        let mark =
            |stage: &Stage| Mark { at: stage.range.start as f64, label: format!("{} px", stage.image_size) };
        let marks = stages.iter().skip(1).map(mark).collect();
        Figure::training(title, "epoch", history, marks).write(&self.file(CURVES))
    }
}
