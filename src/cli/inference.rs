//! What `eval` and `predict` share: a checkpoint, made ready to compute.

use super::compute::Compute;
use crate::backend::{Backend, Normalisation, Variables};
use crate::model::Architecture;
use crate::nn::Network;
use crate::tensor::Dtype;
use crate::train::checkpoint::{Checkpoint, WeightSet};
use crate::train::progressive::check_side;
use crate::{Error, Result};
use clap::ValueEnum;
use std::path::PathBuf;

// No doc comment: clap would take it for the description of the whole command.
#[derive(Debug, clap::Args)]
pub(super) struct Inference {
    /// The checkpoint, or the folder of its run.
    checkpoint: PathBuf,
    /// Side of the images in pixels [default: as in training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Which weights.
    #[arg(long, value_enum, default_value_t)]
    weights: Weights,
    #[command(flatten)]
    pub(super) compute: Compute,
}

/// Which weights of a checkpoint to use.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Weights {
    /// The moving average: usually the better ones.
    #[default]
    Ema,
    /// The weights as they are trained.
    Raw,
}

impl From<Weights> for WeightSet {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Ema => Self::Ema,
            Weights::Raw => Self::Raw,
        }
    }
}

/// A checkpoint ready to compute.
pub(super) struct Model<B: Backend> {
    pub(super) checkpoint: Checkpoint,
    pub(super) backend: B,
    pub(super) network: Network,
    pub(super) vars: Variables<B>,
    pub(super) normalisation: Normalisation,
    /// Side of the images in pixels.
    pub(super) size: usize,
}

impl Inference {
    /// The checkpoint, with the type that it was trained in.
    pub(super) fn checkpoint(&self) -> Result<(Checkpoint, Option<Dtype>)> {
        if let Some(size) = self.size {
            check_side("--size", size)?;
        }
        let checkpoint = Checkpoint::read(&self.checkpoint)?;
        let dtype = checkpoint.description.dtype;
        Ok((checkpoint, dtype))
    }

    /// The model of `checkpoint` on `backend`, for up to `images` images at a time.
    pub(super) fn model<B: Backend>(
        &self,
        checkpoint: Checkpoint,
        mut backend: B,
        images: usize,
    ) -> Result<Model<B>> {
        let config = &checkpoint.description.config;
        let size = self.size.unwrap_or(config.eval_size);
        let normalisation = Architecture::find(&config.model)?.normalisation;
        let network = checkpoint.network()?;
        backend.prepare(|backend| network.rehearse_evaluation(backend, images, size))?;
        let vars = checkpoint.weights(&backend, &network, self.weights.into())?;
        Ok(Model { checkpoint, backend, network, vars, normalisation, size })
    }
}

impl<B: Backend> Model<B> {
    /// The names of the classes, in the order of the logits.
    pub(super) fn classes(&self) -> &[String] {
        &self.checkpoint.description.classes
    }

    /// Checks that a dataset called `name` has the classes of the checkpoint.
    pub(super) fn check_classes(&self, name: &str, found: &[String]) -> Result<()> {
        let known = self.classes();
        if found == known {
            return Ok(());
        }
        let problem = format!(
            "its {} classes are not the {} of {}; use data with the same classes",
            found.len(),
            known.len(),
            self.checkpoint.path().display()
        );
        Err(Error::usage("--data", name, problem))
    }
}
