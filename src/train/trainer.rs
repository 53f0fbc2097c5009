//! The training loop.

use super::checkpoint::{self, Checkpoint, Description, FORMAT_VERSION, Position, State};
use super::config::TrainConfig;
use super::evaluate::{Scores, evaluate};
use super::progressive::{Stage, stage_at};
use super::run::{CHECKPOINT, EpochRecord, METRICS, Record, RunFolder, StepRecord};
use super::schedule::Schedule;
use crate::backend::{Backend, Mode, Normalisation, StepKey};
use crate::data::{BadImages, Batch, Loader, LoaderConfig, Pipeline, Splits};
use crate::model::weights::WeightFile;
use crate::model::{Architecture, initial_values, summarise};
use crate::nn::Network;
use crate::optimizer::{Step, ema_decay, gradient_scale};
use crate::report::metrics::MetricsWriter;
use crate::{Error, Result};
use std::path::Path;
use std::time::Instant;

/// Batches prepared ahead.
const PREFETCH: usize = 2;

/// Hears how a run goes, and may end it.
pub trait Observer {
    /// A stage begins, or goes on.
    fn stage(&mut self, _stage: &Stage, _stages: usize) {}
    /// An epoch begins at batch `done` of `batches`.
    fn epoch_begins(&mut self, _epoch: u32, _done: usize, _batches: usize) {}
    /// A step is done.
    fn step(&mut self, _record: &StepRecord) {}
    /// An epoch is done.
    fn epoch(&mut self, _record: &EpochRecord) {}
    /// Asked after every step and every batch of an evaluation: true saves a checkpoint and ends the run.
    fn should_stop(&self) -> bool {
        false
    }
}

/// Hears nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {}

/// A run in memory: network, values, position.
#[derive(Debug)]
pub struct Trainer<B: Backend> {
    backend: B,
    network: Network,
    normalisation: Normalisation,
    description: Description,
    state: State<B>,
}

/// The parts of a run that follow from its configuration and data.
struct Plan {
    stages: Vec<Stage>,
    schedule: Schedule,
    steps_per_epoch: usize,
    validation: Loader,
}

impl<B: Backend> Trainer<B> {
    /// A run before its first step. With `init`, weights and statistics come from that file (timm's or torchvision's names);
    /// a classifier for other classes is left at its initial values.
    ///
    /// # Errors
    /// A configuration that cannot work, or a file that does not fit the model.
    pub fn new(backend: B, config: TrainConfig, classes: Vec<String>, init: Option<&Path>) -> Result<Self> {
        config.validate()?;
        let network = Network::new(config.network(classes.len())?);
        let (mut params, mut stats) = initial_values::<B::Element>(network.layout(), config.seed);
        if let Some(path) = init {
            let file = WeightFile::read(path)?;
            let keep = !file.fits_classifier(&network)?;
            file.load_network(&network, &mut params, &mut stats, keep)?;
        }
        let state = State::new(&backend, &config, params, stats)?;
        let position = Position::default();
        let description = Description { format_version: FORMAT_VERSION, config, classes, position };
        Self::assemble(backend, network, description, state)
    }

    /// A run that goes on from a checkpoint.
    ///
    /// # Errors
    /// When the checkpoint does not hold all of it.
    pub fn resume(backend: B, checkpoint: &Checkpoint) -> Result<Self> {
        let network = checkpoint.network()?;
        let state = checkpoint.state(&backend, &network)?;
        Self::assemble(backend, network, checkpoint.description.clone(), state)
    }

    fn assemble(backend: B, network: Network, description: Description, state: State<B>) -> Result<Self> {
        let normalisation = Architecture::find(&description.config.model)?.normalisation;
        Ok(Self { backend, network, normalisation, description, state })
    }

    /// The network under training.
    pub const fn network(&self) -> &Network {
        &self.network
    }

    /// The configuration.
    pub const fn config(&self) -> &TrainConfig {
        &self.description.config
    }

    /// Where the run stands.
    pub const fn position(&self) -> Position {
        self.description.position
    }

    /// Checks the configuration against the data, before anything is written.
    ///
    /// # Errors
    /// [`Error::Usage`] when they do not fit: other classes, too few images for a batch norm.
    pub fn check(&self, splits: &Splits) -> Result<()> {
        self.plan(splits).map(drop)
    }

    /// Trains to the end: an epoch at a time, each followed by an evaluation and a checkpoint. Returns the last scores of
    /// the moving average.
    ///
    /// # Errors
    /// [`Error::Interrupted`] when the observer asked to stop, [`Error::Training`] when loss or gradient is not finite, and
    /// whatever data, backend or disk say. The last checkpoint is good in every case.
    pub fn run(
        &mut self,
        splits: &Splits,
        folder: &RunFolder,
        observer: &mut dyn Observer,
    ) -> Result<Scores> {
        let plan = self.plan(splits)?;
        let mut metrics = MetricsWriter::append(&folder.file(METRICS))?;
        let mut last = None;
        while self.description.position.epoch < self.config().epochs {
            let epoch = self.description.position.epoch;
            let stage = stage_at(&plan.stages, epoch.into())
                .ok_or_else(|| Error::Training(format!("epoch {epoch} belongs to no stage")))?;
            observer.stage(stage, plan.stages.len());
            let images_per_second = self.epoch(splits, stage, &plan, folder, &mut metrics, observer)?;
            let evaluates =
                (epoch + 1).is_multiple_of(self.config().evaluate_every) || epoch + 1 == self.config().epochs;
            let (weights, average) = if evaluates {
                match self.evaluate(&plan.validation, observer) {
                    Err(Error::Interrupted(_)) => return Err(self.stopped(folder)),
                    scores => scores.map(|(weights, average)| (Some(weights), Some(average)))?,
                }
            } else {
                (None, None)
            };
            let position = self.description.position;
            let train_loss = position.loss_sum / position.batch as f64;
            let step = position.step;
            let record = EpochRecord { step, epoch, train_loss, weights, average, images_per_second };
            metrics.write(&Record::Epoch(record))?;
            self.description.position = Position { step, epoch: epoch + 1, ..Position::default() };
            self.save(folder)?;
            folder.draw_curves(&self.title(splits), plan.steps_per_epoch, &plan.stages)?;
            observer.epoch(&record);
            last = average;
        }
        match last {
            Some(scores) => Ok(scores),
            None => Ok(self.evaluate(&plan.validation, observer)?.1),
        }
    }

    fn title(&self, splits: &Splits) -> String {
        format!("{} on {}", self.config().model, splits.train.name())
    }

    fn plan(&self, splits: &Splits) -> Result<Plan> {
        let config = self.config();
        if splits.train.classes() != self.description.classes {
            let (found, known) = (splits.train.classes().len(), self.description.classes.len());
            let problem = format!("its {found} classes are not the {known} that the run began with");
            return Err(Error::usage("data", splits.train.name(), problem));
        }
        if splits.train.classes().len() < 2 {
            let problem = "it has a single class; there is nothing to tell apart with fewer than two";
            return Err(Error::usage("data", splits.train.name(), problem));
        }
        let stages = config.progressive.stages(config.epochs.into())?;
        let images = config.batch.min(splits.train.len());
        for stage in &stages {
            let side = summarise(self.network.spec(), stage.image_size).stages.last().map_or(1, |s| s.side);
            if images * side * side == 1 {
                let problem = format!(
                    "one image of {} px leaves batch normalisation a single value per channel; use a batch of 2 or more",
                    stage.image_size
                );
                return Err(Error::usage("batch", images, problem));
            }
        }
        let validation = self.loader_config(config.eval_size, Pipeline::Eval(config.eval_images));
        let validation = Loader::new(splits.validation.clone(), validation)?;
        let steps_per_epoch = self.train_loader(splits, &stages[0])?.batches();
        let schedule = Schedule::new(
            config.learning_rate,
            config.decay,
            config.warmup_epochs,
            config.epochs.into(),
            steps_per_epoch as f64,
        )?;
        Ok(Plan { stages, schedule, steps_per_epoch, validation })
    }

    fn loader_config(&self, size: usize, pipeline: Pipeline) -> LoaderConfig {
        let config = self.config();
        let bad_images = if config.strict { BadImages::Fail } else { BadImages::Skip };
        let (batch, seed, threads) = (config.batch, config.seed, rayon::current_num_threads());
        LoaderConfig { batch, size, seed, threads, prefetch: PREFETCH, bad_images, pipeline }
    }

    fn train_loader(&self, splits: &Splits, stage: &Stage) -> Result<Loader> {
        let pipeline = Pipeline::Train(self.config().images_in(stage));
        Loader::new(splits.train.clone(), self.loader_config(stage.image_size, pipeline))
    }

    /// The rest of the epoch under way; returns images a second.
    fn epoch(
        &mut self,
        splits: &Splits,
        stage: &Stage,
        plan: &Plan,
        folder: &RunFolder,
        metrics: &mut MetricsWriter,
        observer: &mut dyn Observer,
    ) -> Result<f64> {
        let loader = self.train_loader(splits, stage)?;
        let Position { epoch, batch: done, .. } = self.description.position;
        observer.epoch_begins(epoch, done, loader.batches());
        let (start, mut images) = (Instant::now(), 0);
        for batch in loader.epoch(epoch, done) {
            let batch = match batch {
                Ok(batch) => batch,
                Err(error) => {
                    // The steps up to here are good: whoever mends the data goes on from them.
                    self.save(folder)?;
                    return Err(error);
                }
            };
            images += batch.len();
            let record = self.step(&batch, stage, &plan.schedule, folder)?;
            metrics.write(&Record::Step(record))?;
            observer.step(&record);
            let every = self.config().checkpoint_every;
            let due = every > 0 && record.step.is_multiple_of(every);
            if observer.should_stop() {
                return Err(self.stopped(folder));
            }
            if due {
                self.save(folder)?;
            }
        }
        Ok(images as f64 / start.elapsed().as_secs_f64())
    }

    /// Forward, loss, backward, update, average.
    fn step(
        &mut self,
        batch: &Batch,
        stage: &Stage,
        schedule: &Schedule,
        folder: &RunFolder,
    ) -> Result<StepRecord> {
        let Self { backend, network, normalisation, description, state } = self;
        let (config, position) = (&description.config, &mut description.position);
        let key = StepKey { seed: config.seed, epoch: batch.epoch, images: batch.indices.clone() };
        backend.begin_step(&key);
        let x = backend.input(&batch.images, batch.size, normalisation, &batch.mix)?;
        let mut pass =
            network.forward(backend, x, &mut state.vars, Mode::Train, stage.regularisation.dropout)?;
        let smoothing = config.label_smoothing as f32;
        let targets = batch.mix.soft_targets(&batch.labels, network.spec().classes, smoothing)?;
        let loss = backend.cross_entropy(&mut pass.head, &targets)?;
        backend.clear(&mut state.vars.grads)?;
        network.backward(backend, pass, &mut state.vars)?;
        let gradient_norm = backend.norm(&state.vars.grads)?;
        let scale = gradient_scale(gradient_norm, 1.0, config.max_gradient_norm);
        let (Some(gradient_scale), true) = (scale, loss.is_finite()) else {
            let position = Position { step: position.step + 1, ..*position };
            let what = format!("loss {loss} and gradient norm {gradient_norm}");
            return Err(diverged(&position, &what, folder));
        };
        let number = position.step;
        let learning_rate = schedule.learning_rate(number);
        let step = Step { number, learning_rate, weight_decay: config.weight_decay, gradient_scale };
        backend.update(
            config.optimizer,
            &step,
            &network.layout().decayed(),
            &mut state.vars,
            &mut state.slots,
        )?;
        let decay = ema_decay(config.ema_decay, number);
        backend.update_average(&mut state.average.params, &state.vars.params, decay)?;
        backend.update_average(&mut state.average.stats, &state.vars.stats, decay)?;
        position.step += 1;
        position.batch += 1;
        position.loss_sum += loss;
        let (step, epoch, image_size) = (position.step, position.epoch, batch.size);
        Ok(StepRecord { step, epoch, loss, learning_rate, gradient_norm, image_size })
    }

    /// Scores of the weights and of their average; [`Error::Interrupted`] when the observer does not want them any more.
    fn evaluate(&mut self, loader: &Loader, observer: &dyn Observer) -> Result<(Scores, Scores)> {
        let Self { backend, network, normalisation, state, .. } = self;
        let go_on = |_| match observer.should_stop() {
            true => Err(Error::Interrupted("stopped while evaluating".to_owned())),
            false => Ok(()),
        };
        let mut scores = |vars| evaluate(backend, network, vars, loader, normalisation, go_on).map(|s| s.0);
        Ok((scores(&mut state.vars)?, scores(&mut state.average)?))
    }

    /// Saves, and gives the error that ends the run.
    fn stopped(&mut self, folder: &RunFolder) -> Error {
        let (step, path) = (self.position().step, folder.path().display());
        match self.save(folder) {
            Ok(()) => Error::Interrupted(format!(
                "stopped after step {step}; go on with `effnetv2 train --resume {path}`"
            )),
            Err(error) => error,
        }
    }

    /// Writes the checkpoint of the run.
    ///
    /// # Errors
    /// When a value of it is not finite, or it cannot be written; the one before is then still there.
    pub fn save(&mut self, folder: &RunFolder) -> Result<()> {
        let State { vars, average, slots } = &self.state;
        let buffers = [&vars.params, &vars.stats, &average.params, &average.stats];
        for buffer in buffers.into_iter().chain(slots) {
            if !self.backend.norm(buffer)?.is_finite() {
                return Err(diverged(&self.position(), "weights that are not finite", folder));
            }
        }
        let path = folder.file(CHECKPOINT);
        checkpoint::write(&path, &self.backend, self.network.layout(), &self.state, &self.description)
    }
}

/// Training ends at this step because of `what`.
fn diverged(position: &Position, what: &str, folder: &RunFolder) -> Error {
    let checkpoint = folder.file(CHECKPOINT);
    let kept = if checkpoint.exists() {
        format!("the last good checkpoint is {}", checkpoint.display())
    } else {
        "there was no checkpoint yet".to_owned()
    };
    Error::Training(format!(
        "step {} in epoch {} has {what}; {kept}. Lower the learning rate, warm up longer or set max_gradient_norm",
        position.step,
        position.epoch + 1
    ))
}
