//! Small runs on the embedded digits, and somebody who writes down how they go.
#![allow(dead_code, reason = "each test program uses a part")]

use effnetv2::Result;
use effnetv2::backend::Backend;
use effnetv2::data::{Dataset, Image, Problems, Splits, digits};
use effnetv2::train::evaluate::Scores;
use effnetv2::train::progressive::Stage;
use effnetv2::train::run::{EpochRecord, RunFolder, StepRecord};
use effnetv2::train::schedule::Decay;
use effnetv2::train::{Observer, TrainConfig, Trainer};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

/// Every `step`-th image of a dataset.
pub(crate) struct Few {
    all: Arc<dyn Dataset>,
    step: usize,
}

impl Dataset for Few {
    fn name(&self) -> &str {
        self.all.name()
    }
    fn len(&self) -> usize {
        self.all.len() / self.step
    }
    fn classes(&self) -> &[String] {
        self.all.classes()
    }
    fn label(&self, index: usize) -> u32 {
        self.all.label(index * self.step)
    }
    fn image(&self, index: usize) -> Result<Image> {
        self.all.image(index * self.step)
    }
    fn problems(&self) -> &Problems {
        self.all.problems()
    }
}

/// 1442/`step` digits to train on and 355/`step` to evaluate on.
pub(crate) fn few(step: usize) -> Splits {
    let Splits { train, validation } = digits::open();
    Splits { train: Arc::new(Few { all: train, step }), validation: Arc::new(Few { all: validation, step }) }
}

/// One stage of 32 pixels at a constant learning rate, nothing mixed, dropped or decayed.
pub(crate) fn plain(batch: usize, epochs: u32) -> TrainConfig {
    let mut config = TrainConfig::recipe("nano", "digits").unwrap();
    (config.batch, config.epochs, config.warmup_epochs, config.decay) = (batch, epochs, 0.0, Decay::Constant);
    (config.weight_decay, config.learning_rate, config.network.drop_path) = (0.0, 4e-3, 0.0);
    let progressive = &mut config.progressive;
    (progressive.stages, progressive.image_size, progressive.multiple_of) = (1, [32, 32], None);
    (progressive.dropout, progressive.mixup_alpha, progressive.cutmix_alpha) = ([0.0; 2], [0.0; 2], [0.0; 2]);
    progressive.randaugment = [1.0, 3.0];
    (config.eval_size, config.label_smoothing) = (32, 0.1);
    config
}

/// Keeps all it hears, and asks to stop when it is asked for the `patience`-th time.
#[derive(Default)]
pub(crate) struct Diary {
    pub(crate) stages: Vec<(u32, usize, f64)>,
    pub(crate) steps: Vec<StepRecord>,
    pub(crate) epochs: Vec<EpochRecord>,
    pub(crate) stage: Option<(usize, f64)>,
    pub(crate) patience: Option<usize>,
    pub(crate) asked: Cell<usize>,
}

impl Observer for Diary {
    fn stage(&mut self, stage: &Stage, _stages: usize) {
        self.stage = Some((stage.image_size, stage.regularisation.dropout));
    }
    fn epoch_begins(&mut self, epoch: u32, _done: usize, _batches: usize) {
        let (size, dropout) = self.stage.unwrap();
        self.stages.push((epoch, size, dropout));
    }
    fn step(&mut self, record: &StepRecord) {
        self.steps.push(*record);
    }
    fn epoch(&mut self, record: &EpochRecord) {
        self.epochs.push(*record);
    }
    fn should_stop(&self) -> bool {
        self.asked.set(self.asked.get() + 1);
        self.patience == Some(self.asked.get())
    }
}

/// A run on `backend` from start to end in `path`.
pub(crate) fn run_on<B: Backend>(
    backend: B,
    path: &Path,
    config: TrainConfig,
    splits: &Splits,
    init: Option<&Path>,
) -> (Diary, Scores) {
    let folder = RunFolder::create(path, &config).unwrap();
    let classes = splits.train.classes().to_vec();
    let mut trainer = Trainer::new(backend, config, classes, init).unwrap();
    let mut diary = Diary::default();
    let scores = trainer.run(splits, &folder, &mut diary).unwrap();
    (diary, scores)
}

impl Diary {
    pub(crate) fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|step| step.loss).collect()
    }
}
