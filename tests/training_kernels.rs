//! Training runs on the device: the same bits as a graph, after an interruption, and again; the reference's losses; and
//! checkpoints that either goes on from.

#![cfg(feature = "cuda")]

mod devices;
mod small_runs;

use devices::{again_on_a_gpu, device_alone};
use effnetv2::Error;
use effnetv2::backend::Backend;
use effnetv2::data::Splits;
use effnetv2::device::Device;
use effnetv2::kernels::fused::{Accelerated, FusedElement};
use effnetv2::kernels::optimizer::FAMILY;
use effnetv2::optimizer::LossScale;
use effnetv2::reference::Reference;
use effnetv2::report::metrics;
use effnetv2::train::checkpoint::{self, Checkpoint};
use effnetv2::train::run::{CHECKPOINT, METRICS, Record, RunFolder, StepRecord};
use effnetv2::train::{Observer, Silent, TrainConfig, Trainer};
use half::{bf16, f16};
use small_runs::{Diary, few, plain, run_on};
use std::path::Path;

/// Two epochs of two steps of two passes, in two stages, with everything that is random.
fn config() -> TrainConfig {
    let mut config = plain(8, 2);
    (config.accumulate, config.network.drop_path) = (2, 0.3);
    (config.progressive.stages, config.progressive.image_size) = (2, [32, 40]);
    (config.progressive.dropout, config.progressive.cutmix_alpha) = ([0.2, 0.3], [0.5, 0.5]);
    config.max_gradient_norm = Some(3.0);
    config
}

/// 16 digits to train on, 3 to evaluate on.
fn splits() -> Splits {
    few(90)
}

fn backend<T: FusedElement>(device: &Device, graphs: bool) -> Accelerated<T> {
    Accelerated::new(device, graphs).unwrap()
}

fn checkpoint(path: &Path) -> Vec<u8> {
    std::fs::read(path.join(CHECKPOINT)).unwrap()
}

/// Goes on with the run in `path` to its end.
fn resume<B: Backend>(backend: B, path: &Path, splits: &Splits) -> Diary {
    let mut trainer = Trainer::resume(backend, &Checkpoint::read(path).unwrap()).unwrap();
    let run = RunFolder::reopen(path, trainer.position()).unwrap();
    let mut diary = Diary::default();
    trainer.run(splits, &run, &mut diary).unwrap();
    diary
}

/// As a graph and without, again, and stopped at every place and resumed: always the same checkpoint.
fn assert_same_end<T: FusedElement>(device: &Device, others: &[(&str, bool)], questions: &[usize]) {
    let folder = tempfile::tempdir().unwrap();
    let (splits, config) = (splits(), config());
    let whole = folder.path().join("whole");
    run_on(backend::<T>(device, true), &whole, config.clone(), &splits, None);
    for &(name, graphs) in others {
        let path = folder.path().join(name);
        run_on(backend::<T>(device, graphs), &path, config.clone(), &splits, None);
        assert!(checkpoint(&path) == checkpoint(&whole), "{name}");
    }
    for &patience in questions {
        let path = folder.path().join(patience.to_string());
        let run = RunFolder::create(&path, &config).unwrap();
        let classes = splits.train.classes().to_vec();
        let mut trainer = Trainer::new(backend::<T>(device, true), config.clone(), classes, None).unwrap();
        let mut diary = Diary { patience: Some(patience), ..Diary::default() };
        let error = trainer.run(&splits, &run, &mut diary).unwrap_err();
        assert_eq!(error.exit_code(), 130, "{error}");
        resume(backend::<T>(device, true), &path, &splits);
        assert!(checkpoint(&path) == checkpoint(&whole), "stopped at question {patience}");
    }
}

#[test]
fn a_run_ends_the_same_however_it_is_made() {
    let Some((device, _alone)) = device_alone() else { return };
    // Two epochs of two steps, each followed by two sets of weights on one batch.
    assert_same_end::<bf16>(&device, &[("again", true), ("plain", false)], &[1, 4, 7]);
    assert_same_end::<f16>(&device, &[], &[3]);
    assert_same_end::<f32>(&device, &[("plain", false)], &[]);
}

fn assert_near(found: &Diary, expected: &Diary) {
    assert_eq!(found.steps.len(), expected.steps.len());
    for (found, expected) in found.steps.iter().zip(&expected.steps) {
        assert_eq!(
            (found.step, found.epoch, found.image_size),
            (expected.step, expected.epoch, expected.image_size)
        );
        assert_eq!(found.learning_rate, expected.learning_rate);
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-3 * b.abs();
        assert!(close(found.loss, expected.loss), "{found:?}, not {expected:?}");
        assert!(close(found.gradient_norm, expected.gradient_norm), "{found:?}, not {expected:?}");
    }
}

/// The device's f32 follows the reference, and either goes on from the other's checkpoint.
#[test]
fn runs_and_checkpoints_are_those_of_the_cpu() {
    let Some((device, _alone)) = device_alone() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (splits, config) = (splits(), config());
    let path = |name: &str| folder.path().join(name);
    let (cpu, _) = run_on(Reference::<f32>::new(), &path("cpu"), config.clone(), &splits, None);
    let (gpu, scores) = run_on(backend::<f32>(&device, true), &path("gpu"), config.clone(), &splits, None);
    assert_near(&gpu, &cpu);
    assert_eq!(scores.images, 3);
    for (name, other) in [("cpu", false), ("gpu", true)] {
        let path = path(&format!("half-{name}"));
        let run = RunFolder::create(&path, &config).unwrap();
        let classes = splits.train.classes().to_vec();
        // After the two steps and the evaluation of the first epoch: the third step is the last before the stop.
        let mut stopped = Diary { patience: Some(5), ..Diary::default() };
        let rest = if other {
            let mut trainer =
                Trainer::new(backend::<f32>(&device, true), config.clone(), classes, None).unwrap();
            trainer.run(&splits, &run, &mut stopped).unwrap_err();
            resume(Reference::<f32>::new(), &path, &splits)
        } else {
            let mut trainer = Trainer::new(Reference::<f32>::new(), config.clone(), classes, None).unwrap();
            trainer.run(&splits, &run, &mut stopped).unwrap_err();
            resume(backend::<f32>(&device, true), &path, &splits)
        };
        let steps = stopped.steps.into_iter().chain(rest.steps).collect();
        assert_near(&Diary { steps, ..Diary::default() }, &cpu);
    }
}

/// A loss scale that overflows f16 is halved, step by step, until a step is made; the checkpoint keeps it.
#[test]
fn an_overflow_lowers_the_loss_scale() {
    let Some((device, _alone)) = device_alone() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (splits, mut config) = (splits(), plain(6, 2));
    config.learning_rate = 1e-3;
    let run = RunFolder::create(folder.path(), &config).unwrap();
    let network = effnetv2::nn::Network::new(config.network(10).unwrap());
    let (params, stats) = effnetv2::model::initial_values(network.layout(), 0);
    let state =
        effnetv2::backend::State::new(&Reference::<f32>::new(), config.optimizer, params, stats).unwrap();
    let description = checkpoint::Description {
        format_version: checkpoint::FORMAT_VERSION,
        config,
        classes: splits.train.classes().to_vec(),
        position: checkpoint::Position::default(),
        dtype: None,
        loss_scale: Some(LossScale { scale: 2.0_f64.powi(40), good_steps: 7 }),
    };
    let file = run.file(CHECKPOINT);
    let reference = Reference::<f32>::new();
    checkpoint::write(&file, &reference, network.layout(), &state, &description).unwrap();
    let diary = resume(backend::<f16>(&device, true), folder.path(), &splits);
    let finite: Vec<bool> = diary.steps.iter().map(|step| step.gradient_norm.is_finite()).collect();
    assert_eq!(finite, [false; 4], "the scale is still too large after four steps");
    assert!(diary.steps.iter().all(|step| step.loss.is_finite()));
    let end = Checkpoint::read(folder.path()).unwrap();
    let scale = end.description.loss_scale.unwrap();
    assert_eq!(scale, LossScale { scale: 2.0_f64.powi(36), good_steps: 0 });
    let weights = end.weights(&reference, &network, checkpoint::WeightSet::Raw).unwrap();
    assert_eq!(weights.params, state.vars.params, "no step was made");
    // What JSON has no word for comes back as what it was.
    let records: Vec<Record> = metrics::read(&run.file(METRICS)).unwrap();
    let skipped = records.iter().filter(|r| matches!(r, Record::Step(step) if step.gradient_norm.is_nan()));
    assert_eq!(skipped.count(), 4);
}

/// Weights that diverge end the run; its last checkpoint is good.
#[test]
fn a_divergence_ends_the_run_and_spares_the_checkpoint() {
    let Some((device, _alone)) = device_alone() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (splits, mut config) = (splits(), plain(6, 2));
    config.optimizer = effnetv2::optimizer::Rule::Sgd { momentum: 0.9, nesterov: false };
    (config.learning_rate, config.checkpoint_every) = (1e-3, 1);
    run_on(backend::<bf16>(&device, true), &folder.path().join("good"), config.clone(), &splits, None);
    config.learning_rate = 1e38;
    let path = folder.path().join("bad");
    let run = RunFolder::create(&path, &config).unwrap();
    let classes = splits.train.classes().to_vec();
    let mut trainer = Trainer::new(backend::<bf16>(&device, true), config, classes, None).unwrap();
    let error = trainer.run(&splits, &run, &mut Silent).unwrap_err();
    assert!(matches!(&error, Error::Training(text) if text.contains("learning rate")), "{error}");
    if path.join(CHECKPOINT).exists() {
        let checkpoint = Checkpoint::read(&path).unwrap();
        let network = checkpoint.network().unwrap();
        let weights = checkpoint.weights(&Reference::<f32>::new(), &network, Default::default()).unwrap();
        assert!(weights.params.iter().chain(&weights.stats).all(|value| value.is_finite()));
    }
}

/// A run whose device fails after its third step.
struct Sabotage {
    device: Device,
    steps: usize,
}

impl Observer for Sabotage {
    fn step(&mut self, _record: &StepRecord) {
        self.steps += 1;
        if self.steps == 3 {
            let stream = self.device.compute();
            let kernel = self.device.module(&FAMILY).unwrap().kernel("optimizer_cast_bf16").unwrap();
            let values = self.device.zeros::<f32>(8).unwrap();
            let mut copy = self.device.zeros::<bf16>(8).unwrap();
            let (values, mut copy, too_many) = (values.as_view(), copy.as_view_mut(), 1_u32 << 20);
            let mut launch = kernel.on(stream);
            launch.input(&values).output(&mut copy).value(&too_many);
            self.device.host_control().unwrap().defer(true);
            // SAFETY: it is not: the host device must find the access beyond the buffers and refuse it.
            unsafe { launch.run([512, 1, 1], 0, "too many values") }.unwrap();
        }
    }
}

/// The error names the checkpoint that is left, and who resumes it ends as if nothing had been. Only the host device
/// survives the failure.
#[test]
fn a_device_that_fails_leaves_the_last_checkpoint() {
    let Some((device, _alone)) = device_alone() else { return };
    let Some(control) = device.host_control() else { return };
    let folder = tempfile::tempdir().unwrap();
    // In the second epoch, where the next to ask the device is a step, an evaluation, or a checkpoint.
    for (name, checkpoint_every) in [("step", 0), ("checkpoint", 3)] {
        let (splits, mut config) = (splits(), config());
        config.checkpoint_every = checkpoint_every;
        let whole = folder.path().join(format!("{name}-whole"));
        run_on(backend::<bf16>(&device, true), &whole, config.clone(), &splits, None);
        let path = folder.path().join(name);
        let run = RunFolder::create(&path, &config).unwrap();
        let classes = splits.train.classes().to_vec();
        let mut trainer = Trainer::new(backend::<bf16>(&device, true), config, classes, None).unwrap();
        let mut sabotage = Sabotage { device: device.clone(), steps: 0 };
        let message = trainer.run(&splits, &run, &mut sabotage).unwrap_err().to_string();
        control.defer(false);
        let left = path.join(CHECKPOINT).display().to_string();
        assert!(message.contains(&format!("the last good checkpoint is {left}")), "{name}: {message}");
        assert!(message.contains("CUDA_ERROR") && sabotage.steps == 3, "{name}: {message}");
        resume(backend::<bf16>(&device, true), &path, &splits);
        assert!(checkpoint(&path) == checkpoint(&whole), "{name}");
    }
}

#[test]
fn gpu() {
    again_on_a_gpu("gpu");
}
