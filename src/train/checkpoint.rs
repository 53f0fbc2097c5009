//! Checkpoints: everything a run needs to go on bit for bit, in one safetensors file.
//!
//! Weights and statistics carry timm's names, so other programs can read them; `ema.` and `optimizer.<slot>.` stand before
//! those of the moving average and of the optimizer. The metadata holds a [`Description`] as JSON.

use super::config::TrainConfig;
use super::run::{CHECKPOINT, CONFIG};
pub use crate::backend::State;
use crate::backend::{Backend, Variables};
use crate::model::weights::{self, METADATA_KEY, WeightFile, named};
use crate::nn::{Layout, Network};
use crate::optimizer::LossScale;
use crate::tensor::{Dtype, Real};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The version of the format that this crate writes, and the newest it reads.
pub const FORMAT_VERSION: u32 = 1;

/// Where a run stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Steps made.
    pub step: u64,
    /// The epoch under way, from 0.
    pub epoch: u32,
    /// Batches of it done.
    pub batch: usize,
    /// The sum of their losses.
    pub loss_sum: f64,
}

/// What a checkpoint says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// [`FORMAT_VERSION`] of the writer.
    pub format_version: u32,
    /// The whole configuration.
    pub config: TrainConfig,
    /// The names of the classes.
    pub classes: Vec<String>,
    /// Where the run stands.
    pub position: Position,
    /// The type of activations that it is computed in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// Where the loss scale stands, if the run is in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

/// Which of the two sets of weights in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WeightSet {
    /// The moving average: what is evaluated.
    #[default]
    Ema,
    /// The weights as they are trained.
    Raw,
}

impl WeightSet {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Ema => "ema.",
            Self::Raw => "",
        }
    }
}

/// Writes a checkpoint; `path` is at every moment either the old one or the new one.
///
/// # Errors
/// When it cannot be written; the old one is then still there.
pub fn write<B: Backend>(
    path: &Path,
    backend: &B,
    layout: &Layout,
    state: &State<B>,
    description: &Description,
) -> Result<()> {
    let mut tensors = Vec::new();
    for (set, vars) in [(WeightSet::Raw, &state.vars), (WeightSet::Ema, &state.average)] {
        tensors.extend(named(set.prefix(), &layout.params, &backend.read(&vars.params)?));
        tensors.extend(named(set.prefix(), &layout.stats, &backend.read(&vars.stats)?));
    }
    for (slot, buffer) in description.config.optimizer.slots().iter().zip(&state.slots) {
        tensors.extend(named(&slot_prefix(slot.name), &layout.params, &backend.read(buffer)?));
    }
    let text = serde_json::to_string(description).map_err(|e| Error::file(path, e.to_string()))?;
    weights::write(path, &tensors, text)
}

fn slot_prefix(slot: &str) -> String {
    format!("optimizer.{slot}.")
}

/// Why a folder has nothing to go on from, and what to do.
fn without_checkpoint(folder: &Path) -> String {
    let config = folder.join(CONFIG);
    match config.exists() {
        true => format!(
            "this run ended before its first checkpoint; begin it again with `effnetv2 train --config {} --out DIR`",
            config.display()
        ),
        false => format!("no {CHECKPOINT} in this folder; name the folder of a run, or a checkpoint"),
    }
}

/// A checkpoint read from a file.
#[derive(Debug)]
pub struct Checkpoint {
    file: WeightFile,
    /// What it says of itself.
    pub description: Description,
}

impl Checkpoint {
    /// Reads a checkpoint; `path` may also be the folder of its run.
    ///
    /// # Errors
    /// When the file cannot be read, is damaged, is no checkpoint, or was written by a newer version.
    pub fn read(path: &Path) -> Result<Self> {
        let inside = path.join(CHECKPOINT);
        if path.is_dir() && !inside.exists() {
            return Err(Error::file(path, without_checkpoint(path)));
        }
        let file = WeightFile::read(if path.is_dir() { &inside } else { path })?;
        let wrong = |problem: String| Error::file(file.path(), problem);
        let text = file.description().ok_or_else(|| {
            let problem = format!("no checkpoint of this program: its metadata has no `{METADATA_KEY}`");
            wrong(format!("{problem}; to start from weights of timm or torchvision use --init"))
        })?;
        #[derive(Deserialize)]
        struct Version {
            format_version: u32,
        }
        let broken =
            |e: serde_json::Error| wrong(format!("its description is damaged ({e}); use an intact copy"));
        let Version { format_version } = serde_json::from_str(text).map_err(broken)?;
        if format_version > FORMAT_VERSION {
            let problem = format!(
                "format version {format_version}, newer than the {FORMAT_VERSION} this program reads; update it"
            );
            return Err(wrong(problem));
        }
        let description: Description = serde_json::from_str(text).map_err(broken)?;
        description
            .config
            .validate()
            .map_err(|e| wrong(format!("its configuration cannot work ({e}); use an intact copy")))?;
        Ok(Self { file, description })
    }

    /// The file itself.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The network that the checkpoint describes.
    ///
    /// # Errors
    /// When its model is unknown.
    pub fn network(&self) -> Result<Network> {
        Ok(Network::new(self.description.config.network(self.description.classes.len())?))
    }

    fn buffers<F: Real>(&self, layout: &Layout, set: WeightSet) -> Result<(Vec<F>, Vec<F>)> {
        let name = |prefix: &str, name: &str| Some(format!("{prefix}{name}"));
        let mut params = vec![F::zero(); layout.param_buffer()];
        let mut stats = vec![F::zero(); layout.stat_buffer()];
        self.file.load(&layout.params, &mut params, |e| name(set.prefix(), &e.name))?;
        self.file.load(&layout.stats, &mut stats, |e| name(set.prefix(), &e.name))?;
        Ok((params, stats))
    }

    /// One set of weights and statistics, for inference.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit the model.
    pub fn weights<B: Backend>(
        &self,
        backend: &B,
        network: &Network,
        set: WeightSet,
    ) -> Result<Variables<B>> {
        let (params, stats) = self.buffers(network.layout(), set)?;
        let grads = backend.buffer(Vec::new())?;
        Ok(Variables { params: backend.buffer(params)?, grads, stats: backend.buffer(stats)? })
    }

    /// Everything, to go on training.
    ///
    /// # Errors
    /// When a tensor is missing or does not fit the model.
    pub fn state<B: Backend>(&self, backend: &B, network: &Network) -> Result<State<B>> {
        let layout = network.layout();
        let mut vars = self.weights(backend, network, WeightSet::Raw)?;
        vars.grads = backend.zeros(layout.param_buffer())?;
        let average = self.weights(backend, network, WeightSet::Ema)?;
        let slot = |slot: &crate::optimizer::Slot| {
            let mut values = vec![B::Element::of(0.0); layout.param_buffer()];
            let prefix = slot_prefix(slot.name);
            self.file.load(&layout.params, &mut values, |e| Some(format!("{prefix}{}", e.name)))?;
            backend.buffer(values)
        };
        let slots = self.description.config.optimizer.slots().iter().map(slot).collect::<Result<_>>()?;
        Ok(State { vars, average, slots })
    }
}
