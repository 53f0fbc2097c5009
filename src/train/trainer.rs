//! The training loop.

use super::checkpoint::{self, Checkpoint, Description, FORMAT_VERSION, Position, State};
use super::config::TrainConfig;
use super::evaluate::{Scores, evaluate};
use super::progressive::{Stage, stage_at};
use super::run::{CHECKPOINT, EpochRecord, METRICS, Record, RunFolder, StepRecord};
use super::schedule::Schedule;
use crate::backend::{Backend, Memory, Normalisation, PassKind, StepKey};
use crate::data::{BadImages, Batch, Loader, LoaderConfig, Pipeline, Splits};
use crate::model::weights::WeightFile;
use crate::model::{Architecture, initial_values, summarise};
use crate::nn::Network;
use crate::optimizer::{Scalars, Step, ema_decay};
use crate::report::metrics::MetricsWriter;
use crate::tensor::Dtype;
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
        let state = State::new(&backend, config.optimizer, params, stats)?;
        let (format_version, position) = (FORMAT_VERSION, Position::default());
        let description =
            Description { format_version, config, classes, position, dtype: None, loss_scale: None };
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

    fn assemble(backend: B, network: Network, mut description: Description, state: State<B>) -> Result<Self> {
        let normalisation = Architecture::find(&description.config.model)?.normalisation;
        description.dtype = Some(backend.dtype());
        description.loss_scale =
            (backend.dtype() == Dtype::F16).then(|| description.loss_scale.take().unwrap_or_default());
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

    /// Checks the configuration against the data, and takes the memory of the run, before anything is written.
    ///
    /// # Errors
    /// [`Error::Usage`] when they do not fit: other classes, too few images for a batch norm.
    /// [`Error::OutOfMemory`] when the batch is too large for the device; it says which one would fit.
    pub fn check(&mut self, splits: &Splits) -> Result<()> {
        self.plan(splits)?;
        let images = self.config().images_a_pass();
        let Err(mut error) = self.prepare(splits) else { return Ok(()) };
        if let Error::OutOfMemory { what, remedy, .. } = &mut error {
            let config = self.config();
            *what = format!("training {} with {images} images a pass", config.model);
            *remedy = match self.largest_batch()? {
                Some(largest) => format!(
                    "{largest} images a pass fit: use --batch {largest}, or cut the batch by --accumulate, or use \
                     smaller images"
                ),
                None => "not even a single image fits; use smaller images or a smaller model".into(),
            };
        }
        Err(error)
    }

    /// Makes room for the passes of every stage, and for evaluations.
    fn prepare(&mut self, splits: &Splits) -> Result<()> {
        let passes = Passes::new(&self.description.config, &self.network)?;
        let images = self.description.config.images_a_pass();
        let (train, validation) = (images.min(splits.train.len()), images.min(splits.validation.len()));
        self.backend.prepare(|backend| passes.rehearse(backend, train, validation))
    }

    /// The largest number of images a pass for which there is memory in every stage; none if not even one fits, or
    /// nothing limits it but the machine's memory.
    ///
    /// # Errors
    /// What the device says.
    pub fn largest_batch(&self) -> Result<Option<usize>> {
        largest_batch(&self.backend, &self.description.config, &self.network, true)
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
        // Devices work ahead: what failed in a step may show as late as in an evaluation or a checkpoint.
        self.epochs(splits, folder, observer).map_err(|error| with_checkpoint(error, folder))
    }

    fn epochs(&mut self, splits: &Splits, folder: &RunFolder, observer: &mut dyn Observer) -> Result<Scores> {
        self.check(splits)?;
        let plan = self.plan(splits)?;
        self.backend.discard_sent();
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
        let images = config.images_a_pass().min(splits.train.len());
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
        let passes = self.train_loader(splits, &stages[0])?.batches();
        let steps_per_epoch = (passes / config.accumulate).max(1);
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
        let (batch, seed, threads) = (config.images_a_pass(), config.seed, rayon::current_num_threads());
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
        observer.epoch_begins(epoch, done, plan.steps_per_epoch);
        let (start, mut images) = (Instant::now(), 0);
        let accumulate = self.config().accumulate;
        let passes = (plan.steps_per_epoch * accumulate).min(loader.batches());
        let left = passes.saturating_sub(done * accumulate);
        let mut ahead = Ahead::new(loader.epoch(epoch, done * accumulate), left, &mut self.backend);
        while ahead.left > 0 {
            let record = match self.step(&mut ahead, stage, &plan.schedule, folder) {
                Ok(record) => record,
                Err(StepError::Data(error)) => {
                    // The steps up to here are good: whoever mends the data goes on from them.
                    self.save(folder)?;
                    return Err(error);
                }
                Err(StepError::Other(error)) => return Err(error),
            };
            images = ahead.taken;
            metrics.write(&Record::Step(record))?;
            observer.step(&record);
            let every = self.config().checkpoint_every;
            let due = every > 0 && record.step.is_multiple_of(every);
            if observer.should_stop() {
                self.backend.discard_sent();
                return Err(self.stopped(folder));
            }
            if due {
                self.save(folder)?;
            }
        }
        Ok(images as f64 / start.elapsed().as_secs_f64())
    }

    /// A pass for each part of the batch, update, average.
    fn step<I: Iterator<Item = Result<Batch>>>(
        &mut self,
        ahead: &mut Ahead<I>,
        stage: &Stage,
        schedule: &Schedule,
        folder: &RunFolder,
    ) -> Result<StepRecord, StepError> {
        let Self { backend, network, normalisation, description, state } = self;
        let (config, position) = (&description.config, &mut description.position);
        let (number, dropout) = (position.step, stage.regularisation.dropout);
        let learning_rate = schedule.learning_rate(number);
        let scale = description.loss_scale.map_or(1.0, |loss_scale| loss_scale.scale);
        backend.set_loss_scale(scale);
        let (mut passes, mut loss, mut last) = (0_u32, 0.0, false);
        while !last {
            let batch = ahead.take()?;
            passes += 1;
            last = passes as usize == config.accumulate || ahead.left == 0;
            backend.begin_step(&StepKey {
                seed: config.seed,
                epoch: batch.epoch,
                images: batch.indices.clone(),
            })?;
            backend.begin_pass(normalisation, &batch.mix)?;
            let (classes, smoothing) = (network.spec().classes, config.label_smoothing as f32);
            backend.set_targets(&batch.mix.soft_targets(&batch.labels, classes, smoothing)?)?;
            if last {
                let weight_decay = config.weight_decay;
                let scalars = Scalars {
                    step: Step { number, learning_rate, weight_decay, gradient_scale: 1.0 },
                    ema_decay: ema_decay(config.ema_decay, number),
                    loss_scale: scale * f64::from(passes),
                    max_norm: config.max_gradient_norm,
                };
                let layout = network.layout();
                backend.begin_update(config.optimizer, &scalars, layout.param_buffer(), &layout.decayed())?;
            }
            let (images, side, first) = (batch.len(), batch.size, passes == 1);
            let kind = PassKind { images, side, dropout, first, last };
            backend.perform(kind, state, |backend, state| network.training_pass(backend, kind, state))?;
            // The device computes: time to fetch what it needs next.
            ahead.fetch(backend);
            loss += backend.loss()?;
        }
        loss /= f64::from(passes);
        let gradient_norm = backend.gradient_norm()?;
        let good = match &mut description.loss_scale {
            _ if !loss.is_finite() => false,
            Some(loss_scale) if gradient_norm.is_finite() => {
                loss_scale.keep();
                true
            }
            Some(loss_scale) => loss_scale.back_off(),
            None => gradient_norm.is_finite(),
        };
        if !good {
            let position = Position { step: position.step + 1, ..*position };
            let what = format!("loss {loss} and gradient norm {gradient_norm}");
            return Err(diverged(&position, &what, folder).into());
        }
        position.step += 1;
        position.batch += 1;
        position.loss_sum += loss;
        let (step, epoch, image_size) = (position.step, position.epoch, stage.image_size);
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

/// Batches, the next one fetched while the one before is computed with.
struct Ahead<I> {
    batches: I,
    next: Option<Result<Batch>>,
    /// Batches not yet handed out.
    left: usize,
    /// Images handed out.
    taken: usize,
}

impl<I: Iterator<Item = Result<Batch>>> Ahead<I> {
    fn new<B: Backend>(batches: I, left: usize, backend: &mut B) -> Self {
        let mut ahead = Self { batches, next: None, left, taken: 0 };
        ahead.fetch(backend);
        ahead
    }

    /// The batch that was fetched.
    fn take(&mut self) -> Result<Batch, StepError> {
        let none = || Error::Training("an epoch ended in the middle of a step".into());
        let batch = self.next.take().unwrap_or_else(|| Err(none())).map_err(StepError::Data)?;
        self.taken += batch.len();
        self.left -= 1;
        Ok(batch)
    }

    /// Fetches the next one, and sends its images on their way.
    fn fetch<B: Backend>(&mut self, backend: &mut B) {
        if self.left == 0 {
            return;
        }
        self.next = self.batches.next().map(|batch| {
            let batch = batch?;
            backend.send(&batch.images, batch.size)?;
            Ok(batch)
        });
    }
}

/// Why a step came to nothing.
enum StepError {
    /// Its images could not be had; the step before is good.
    Data(Error),
    Other(Error),
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// The passes that a run makes, for a backend to make room for.
struct Passes<'a> {
    config: &'a TrainConfig,
    network: &'a Network,
    stages: Vec<Stage>,
}

impl<'a> Passes<'a> {
    fn new(config: &'a TrainConfig, network: &'a Network) -> Result<Self> {
        let stages = config.progressive.stages(config.epochs.into())?;
        Ok(Self { config, network, stages })
    }

    /// Goes through all of them, with `images` images in training and `evaluated` in evaluation.
    fn rehearse<B: Backend>(&self, backend: &mut B, images: usize, evaluated: usize) -> Result<()> {
        for stage in &self.stages {
            let (side, dropout) = (stage.image_size, stage.regularisation.dropout);
            let kind = PassKind { images, side, dropout, first: true, last: true };
            self.network.rehearse_training(backend, kind, self.config.optimizer)?;
        }
        self.network.rehearse_evaluation(backend, evaluated, self.config.eval_size)
    }
}

/// The largest number of images a pass for which `backend` has memory, beside a [`State`] unless it `has_state` already;
/// none if not even one fits, or nothing limits it but the machine's memory.
///
/// # Errors
/// What the device says.
pub fn largest_batch<B: Backend>(
    backend: &B,
    config: &TrainConfig,
    network: &Network,
    has_state: bool,
) -> Result<Option<usize>> {
    let passes = Passes::new(config, network)?;
    let fits = |images: usize| {
        let memory = backend.memory(|backend| passes.rehearse(backend, images, images));
        match memory {
            Ok(memory) => Ok(memory.map(|Memory { needed, buffers, available }| {
                needed + if has_state { 0 } else { buffers } <= available
            })),
            // More elements than an index can count.
            Err(Error::Shape { .. }) => Ok(Some(false)),
            Err(error) => Err(error),
        }
    };
    let (mut low, mut high) = (0, 1);
    while fits(high)? == Some(true) {
        (low, high) = (high, 2 * high);
    }
    while high - low > 1 {
        let middle = usize::midpoint(low, high);
        if fits(middle)? == Some(true) {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok((low > 0).then_some(low))
}

/// What is left of a run that ends.
fn kept(folder: &RunFolder) -> String {
    let checkpoint = folder.file(CHECKPOINT);
    if checkpoint.exists() {
        format!("the last good checkpoint is {}", checkpoint.display())
    } else {
        "there was no checkpoint yet".to_owned()
    }
}

/// Says of a device that failed what is left.
fn with_checkpoint(error: Error, folder: &RunFolder) -> Error {
    match error {
        Error::Driver { .. } => Error::Training(format!("{error}; {}", kept(folder))),
        error => error,
    }
}

/// Training ends at this step because of `what`.
fn diverged(position: &Position, what: &str, folder: &RunFolder) -> Error {
    let kept = kept(folder);
    Error::Training(format!(
        "step {} in epoch {} has {what}; {kept}. Lower the learning rate, warm up longer or set max_gradient_norm",
        position.step,
        position.epoch + 1
    ))
}
