//! The training loop through its public interface: what a step computes, what an epoch follows, what a run ends with.

mod small_runs;

use effnetv2::backend::{Backend, Mode, StepKey, Variables};
use effnetv2::data::{BadImages, Dataset, Loader, LoaderConfig, Pipeline, Splits};
use effnetv2::model::weights::{self, NamedTensor, WeightFile, named};
use effnetv2::model::{Architecture, initial_values, torchvision_name};
use effnetv2::nn::Network;
use effnetv2::optimizer::Rule;
use effnetv2::reference::Reference;
use effnetv2::report::metrics;
use effnetv2::train::checkpoint::{Checkpoint, WeightSet};
use effnetv2::train::evaluate::{Scores, evaluate};
use effnetv2::train::run::{CHECKPOINT, METRICS, Record, RunFolder};
use effnetv2::train::{Silent, TrainConfig, Trainer};
use small_runs::{Diary, few, plain, run_on};
use std::path::Path;
use std::sync::Arc;

/// A run on the CPU from start to end in `path`.
fn run(path: &Path, config: TrainConfig, splits: &Splits, init: Option<&Path>) -> (Diary, Scores) {
    run_on(Reference::<f32>::new(), path, config, splits, init)
}

fn nano(classes: usize) -> Network {
    Network::new(Architecture::find("nano").unwrap().network(classes))
}

/// Parameters and statistics of one set of a checkpoint.
fn values(path: &Path, set: WeightSet) -> (Vec<f32>, Vec<f32>) {
    let checkpoint = Checkpoint::read(path).unwrap();
    let backend = Reference::<f32>::new();
    let vars = checkpoint.weights(&backend, &checkpoint.network().unwrap(), set).unwrap();
    (backend.read(&vars.params).unwrap(), backend.read(&vars.stats).unwrap())
}

#[test]
fn ten_steps_lower_the_loss() {
    let folder = tempfile::tempdir().unwrap();
    let (diary, _) = run(folder.path(), plain(72, 1), &few(2), None);
    let losses = diary.losses();
    assert_eq!(losses.len(), 10);
    assert!(losses[0] > 2.0 && losses[9] < 0.75 * losses[0], "{losses:?}");
    let mean = losses.iter().sum::<f64>() / 10.0;
    assert!((diary.epochs[0].train_loss - mean).abs() < 1e-12);
}

/// After one step the average is d·initial + (1 − d)·new with d = min(0.998, 1/10), and so is that of the statistics.
#[test]
fn the_average_covers_weights_and_batch_norm_statistics() {
    let folder = tempfile::tempdir().unwrap();
    let config = plain(72, 1);
    let (params, stats) = initial_values::<f32>(nano(10).layout(), config.seed);
    let (diary, _) = run(folder.path(), config, &few(20), None);
    assert_eq!(diary.steps.len(), 1);
    let (new, average) = (values(folder.path(), WeightSet::Raw), values(folder.path(), WeightSet::Ema));
    for (initial, new, average) in [(params, new.0, average.0), (stats, new.1, average.1)] {
        let moved = initial.iter().zip(&new).filter(|(a, b)| a != b).count();
        assert!(moved * 10 > initial.len() * 9, "{moved} of {} values moved", initial.len());
        for ((&initial, &new), &average) in initial.iter().zip(&new).zip(&average) {
            let expected = 0.1 * f64::from(initial) + 0.9 * f64::from(new);
            let bound = 1e-6 * f64::from(initial.abs().max(new.abs()));
            assert!((f64::from(average) - expected).abs() <= bound, "{initial} {new} {average}");
        }
    }
}

/// The first loss, put together by hand: the very batch, mixed, its labels mixed with the same weights and smoothed.
#[test]
fn mixed_and_smoothed_labels_reach_the_loss() {
    for (mixup, cutmix) in [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0), (0.0, 0.0)] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = plain(72, 1);
        config.label_smoothing = 0.2;
        (config.progressive.mixup_alpha, config.progressive.cutmix_alpha) = ([mixup; 2], [cutmix; 2]);
        let splits = few(20);
        let (diary, _) = run(folder.path(), config.clone(), &splits, None);

        let stage = &config.progressive.stages(1).unwrap()[0];
        let pipeline = Pipeline::Train(config.images_in(stage));
        let batch = first_batch(&splits.train, config.batch, config.seed, pipeline);
        let network = Network::new(config.network(10).unwrap());
        let mut backend = Reference::<f32>::new();
        let mut vars = variables(&backend, initial_values(network.layout(), config.seed));
        let key = StepKey { seed: config.seed, epoch: 0, images: batch.indices.clone() };
        backend.begin_step(&key).unwrap();
        let normalisation = Architecture::find("nano").unwrap().normalisation;
        let x = backend.load(&batch.images, batch.size, &normalisation, &batch.mix).unwrap();
        let pass = network.forward(&mut backend, x, &mut vars, Mode::Train, 0.0).unwrap();
        let logits = backend.logits(&pass.head).unwrap();
        let loss = |epsilon: f64, mixed: bool| {
            let image = |(n, row): (usize, &[f32])| {
                let row: Vec<f64> = row.iter().map(|&l| l.into()).collect();
                let log_sum = row.iter().map(|l| l.exp()).sum::<f64>().ln();
                let own = if mixed { f64::from(batch.mix.label_weight[n]) } else { 1.0 };
                let label = |sample: usize| batch.labels[sample] as usize;
                let mut cross = epsilon / 10.0 * row.iter().map(|l| log_sum - l).sum::<f64>();
                cross += (1.0 - epsilon) * own * (log_sum - row[label(n)]);
                cross + (1.0 - epsilon) * (1.0 - own) * (log_sum - row[label(batch.mix.partner[n] as usize)])
            };
            logits.chunks(10).enumerate().map(image).sum::<f64>() / batch.len() as f64
        };
        let is = |expected: f64| (diary.steps[0].loss - expected).abs() < 1e-5;
        assert!(is(loss(0.2, true)), "{} {}", diary.steps[0].loss, loss(0.2, true));
        assert!(!is(loss(0.0, true)), "smoothing makes a difference");
        assert_eq!(is(loss(0.2, false)), mixup + cutmix == 0.0, "mixing makes a difference");
    }
}

fn first_batch(
    dataset: &Arc<dyn Dataset>,
    batch: usize,
    seed: u64,
    pipeline: Pipeline,
) -> effnetv2::data::Batch {
    let (threads, prefetch) = (1, 0);
    let config =
        LoaderConfig { batch, size: 32, seed, threads, prefetch, bad_images: BadImages::Fail, pipeline };
    Loader::new(dataset.clone(), config).unwrap().epoch(0, 0).next().unwrap().unwrap()
}

fn variables(backend: &Reference<f32>, (params, stats): (Vec<f32>, Vec<f32>)) -> Variables<Reference<f32>> {
    let buffer = |values| backend.buffer(values).unwrap();
    Variables { grads: buffer(vec![0.0; params.len()]), params: buffer(params), stats: buffer(stats) }
}

/// Two runs of one step that differ in weight decay alone end with kernels that differ by learning rate × decay × the
/// initial kernel (SGD: the decay is part of the gradient), and with every other value the same.
#[test]
fn weight_decay_applies_to_kernels_alone() {
    let folder = tempfile::tempdir().unwrap();
    let ends = [0.0, 0.5].map(|decay| {
        let mut config = plain(72, 1);
        (config.weight_decay, config.learning_rate) = (decay, 0.1);
        config.optimizer = Rule::Sgd { momentum: 0.9, nesterov: false };
        let path = folder.path().join(decay.to_string());
        run(&path, config, &few(20), None);
        values(&path, WeightSet::Raw)
    });
    let network = nano(10);
    let (initial, _) = initial_values::<f32>(network.layout(), 0);
    assert_eq!(ends[0].1, ends[1].1, "statistics");
    for entry in &network.layout().params {
        let kernel = entry.shape.len() > 1;
        for at in entry.range.clone() {
            let shrunk = f64::from(ends[0].0[at]) - f64::from(ends[1].0[at]);
            let expected = if kernel { 0.1 * 0.5 * f64::from(initial[at]) } else { 0.0 };
            let bound = if kernel { 1e-6 } else { 0.0 };
            assert!((shrunk - expected).abs() <= bound, "{}: {shrunk}, not {expected}", entry.name);
        }
    }
}

#[test]
fn stages_change_image_size_and_dropout() {
    let folder = tempfile::tempdir().unwrap();
    let staged = |name: &str, change: fn(&mut TrainConfig)| {
        let mut config = plain(36, 4);
        (config.progressive.stages, config.progressive.image_size) = (2, [32, 48]);
        config.progressive.dropout = [0.0, 0.5];
        change(&mut config);
        run(&folder.path().join(name), config, &few(20), None).0
    };
    let diary = staged("both", |_| {});
    assert_eq!(diary.stages, [(0, 32, 0.0), (1, 32, 0.0), (2, 48, 0.5), (3, 48, 0.5)]);
    let sizes: Vec<_> = diary.steps.iter().map(|step| (step.epoch, step.image_size)).collect();
    assert_eq!(sizes, [(0, 32), (0, 32), (1, 32), (1, 32), (2, 48), (2, 48), (3, 48), (3, 48)]);
    let records: Vec<Record> = metrics::read(&folder.path().join("both").join(METRICS)).unwrap();
    let steps = records.iter().filter_map(|r| if let Record::Step(step) = r { Some(*step) } else { None });
    assert_eq!(steps.collect::<Vec<_>>(), diary.steps);
    // The first stage is the same without what the second one brings; its first loss already is not.
    let changes: [fn(&mut TrainConfig); 4] = [
        |config: &mut TrainConfig| config.progressive.image_size = [32, 32],
        |config: &mut TrainConfig| config.progressive.dropout = [0.0, 0.0],
        |config: &mut TrainConfig| config.progressive.mixup_alpha = [0.0, 0.5],
        |config: &mut TrainConfig| config.progressive.randaugment = [1.0, 20.0],
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let other = staged(&number.to_string(), change);
        assert_eq!(diary.losses()[..4], other.losses()[..4]);
        assert_ne!(diary.losses()[4], other.losses()[4]);
    }
}

/// With batch statistics the scores would depend on who shares a batch with whom.
#[test]
fn evaluation_uses_running_statistics_and_leaves_them() {
    let folder = tempfile::tempdir().unwrap();
    let splits = few(8);
    let (_, last) = run(folder.path(), plain(36, 2), &splits, None);
    let mut backend = Reference::<f32>::new();
    let checkpoint = Checkpoint::read(folder.path()).unwrap();
    let network = checkpoint.network().unwrap();
    let mut vars = checkpoint.weights(&backend, &network, WeightSet::Ema).unwrap();
    let before = backend.read(&vars.stats).unwrap();
    let normalisation = Architecture::find("nano").unwrap().normalisation;
    let mut scores = |batch: usize, vars: &mut Variables<_>| {
        let pipeline = Pipeline::Eval(checkpoint.description.config.eval_images);
        let (threads, prefetch, bad_images) = (1, 0, BadImages::Fail);
        let config = LoaderConfig { batch, size: 32, seed: 0, threads, prefetch, bad_images, pipeline };
        let loader = Loader::new(splits.validation.clone(), config).unwrap();
        evaluate(&mut backend, &network, vars, &loader, &normalisation, |_| Ok(())).unwrap().0
    };
    for batch in [1, 7, 44] {
        let Scores { images, loss, top1, top5 } = scores(batch, &mut vars);
        assert_eq!((images, top1, top5), (44, last.top1, last.top5));
        assert!((loss - last.loss).abs() < 1e-5, "{loss}, not {}", last.loss);
    }
    let backend = Reference::<f32>::new();
    assert_eq!(backend.read(&vars.stats).unwrap(), before);
    vars.stats = backend.buffer(before.iter().map(|s| s * 4.0).collect()).unwrap();
    assert!((scores(7, &mut vars).loss - last.loss).abs() > 1e-3, "other statistics, other scores");
}

/// Random weights of a network, as a file under the names that `rename` gives.
fn weight_file(path: &Path, network: &Network, rename: impl Fn(&str) -> String) -> (Vec<f32>, Vec<f32>) {
    let (params, mut stats) = initial_values::<f32>(network.layout(), 77);
    stats.iter_mut().enumerate().for_each(|(i, s)| *s += i as f32 / 1024.0);
    let mut tensors = named("", &network.layout().params, &params);
    tensors.extend(named("", &network.layout().stats, &stats));
    let renamed = |t: NamedTensor| NamedTensor { name: rename(&t.name), ..t };
    let tensors: Vec<_> = tensors.into_iter().map(renamed).collect();
    weights::write(path, &tensors, "{}".into()).unwrap();
    (params, stats)
}

#[test]
fn a_run_starts_from_weights_under_either_librarys_names() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("weights.safetensors");
    let config = plain(72, 1);
    for torchvision in [false, true] {
        for known in [10, 7] {
            let theirs = nano(known);
            let rename = |name: &str| match torchvision {
                true => torchvision_name(theirs.spec(), name).unwrap(),
                false => name.to_owned(),
            };
            let (params, stats) = weight_file(&file, &theirs, rename);
            let path = folder.path().join(format!("run-{torchvision}-{known}"));
            let run = RunFolder::create(&path, &config).unwrap();
            let classes: Vec<String> = (0..10).map(|digit| digit.to_string()).collect();
            let backend = Reference::<f32>::new();
            Trainer::new(backend, config.clone(), classes, Some(&file)).unwrap().save(&run).unwrap();
            let network = nano(10);
            let (fresh, _) = initial_values::<f32>(network.layout(), config.seed);
            for set in [WeightSet::Raw, WeightSet::Ema] {
                let (found, found_stats) = values(&path, set);
                assert_eq!(found_stats, stats);
                for (ours, theirs) in network.layout().params.iter().zip(&theirs.layout().params) {
                    let expected = match known != 10 && ours.name.starts_with("classifier.") {
                        true => &fresh[ours.range.clone()],
                        false => &params[theirs.range.clone()],
                    };
                    assert_eq!(&found[ours.range.clone()], expected, "{}", ours.name);
                }
            }
        }
    }
}

#[test]
fn a_checkpoint_is_a_file_of_weights_under_timms_names() {
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), plain(72, 1), &few(20), None);
    let file = WeightFile::read(&folder.path().join(CHECKPOINT)).unwrap();
    let network = nano(10);
    let (mut params, mut stats) = initial_values::<f32>(network.layout(), 5);
    file.load_network(&network, &mut params, &mut stats, false).unwrap();
    assert_eq!((params, stats), values(folder.path(), WeightSet::Raw));
    let stem = file
        .load(&network.layout().params[..1], &mut vec![0.0_f32; 216], |_| Some("conv_stem.weight".into()));
    assert!(stem.is_ok(), "the name that timm gives");
}

/// Asked to stop after each step, and after each batch of an evaluation, and then resumed: always the same end.
#[test]
fn a_run_stopped_anywhere_ends_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let splits = few(20);
    let mut config = plain(36, 2);
    config.progressive.dropout = [0.2; 2];
    let whole = folder.path().join("whole");
    let questions = run(&whole, config.clone(), &splits, None).0.asked.get();
    // Two epochs of two steps, each followed by two sets of weights on one batch.
    assert_eq!(questions, 2 * (2 + 2));
    for patience in 1..=questions {
        let path = folder.path().join(patience.to_string());
        let run = RunFolder::create(&path, &config).unwrap();
        let classes = splits.train.classes().to_vec();
        let mut trainer = Trainer::new(Reference::<f32>::new(), config.clone(), classes, None).unwrap();
        let mut diary = Diary { patience: Some(patience), ..Diary::default() };
        let error = trainer.run(&splits, &run, &mut diary).unwrap_err();
        assert_eq!(error.exit_code(), 130, "{error}");
        let checkpoint = Checkpoint::read(&path).unwrap();
        let mut resumed = Trainer::resume(Reference::<f32>::new(), &checkpoint).unwrap();
        let run = RunFolder::reopen(&path, resumed.position()).unwrap();
        resumed.run(&splits, &run, &mut Silent).unwrap();
        let [ours, theirs] = [&path, &whole].map(|p| std::fs::read(p.join(CHECKPOINT)).unwrap());
        assert!(ours == theirs, "stopped at question {patience}");
        let [ours, theirs] = [&path, &whole].map(|p| metrics::read::<Record>(&p.join(METRICS)).unwrap());
        assert_eq!(ours.len(), theirs.len(), "stopped at question {patience}");
    }
}

/// A batch in two parts: the loss is the mean of theirs, the statistics see one after the other, and a step is made of both.
#[test]
fn accumulated_gradients_are_those_of_the_parts() {
    let folder = tempfile::tempdir().unwrap();
    let splits = few(20);
    let mut config = plain(72, 1);
    (config.accumulate, config.optimizer) = (2, Rule::Sgd { momentum: 0.0, nesterov: false });
    config.learning_rate = 0.5;
    let (diary, _) = run(folder.path(), config.clone(), &splits, None);
    assert_eq!(diary.steps.len(), 1);
    let (params, stats) = values(folder.path(), WeightSet::Raw);

    let stage = &config.progressive.stages(1).unwrap()[0];
    let batch = |number| {
        let pipeline = Pipeline::Train(config.images_in(stage));
        let (seed, threads, prefetch, bad_images) = (config.seed, 1, 0, BadImages::Fail);
        let loader = LoaderConfig { batch: 36, size: 32, seed, threads, prefetch, bad_images, pipeline };
        Loader::new(splits.train.clone(), loader).unwrap().epoch(0, number).next().unwrap().unwrap()
    };
    let network = Network::new(config.network(10).unwrap());
    let mut backend = Reference::<f32>::new();
    let mut vars = variables(&backend, initial_values(network.layout(), config.seed));
    let normalisation = Architecture::find("nano").unwrap().normalisation;
    let losses = [0, 1].map(|number| {
        let batch = batch(number);
        backend.begin_step(&StepKey { seed: config.seed, epoch: 0, images: batch.indices.clone() }).unwrap();
        let x = backend.load(&batch.images, batch.size, &normalisation, &batch.mix).unwrap();
        let mut pass = network.forward(&mut backend, x, &mut vars, Mode::Train, 0.0).unwrap();
        let targets = batch.mix.soft_targets(&batch.labels, 10, 0.1).unwrap();
        let loss = backend.cross_entropy(&mut pass.head, &targets).unwrap();
        network.backward(&mut backend, pass, &mut vars).unwrap();
        loss
    });
    assert_eq!(diary.steps[0].loss, (losses[0] + losses[1]) / 2.0);
    let norm = vars.grads.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt() / 2.0;
    assert!((diary.steps[0].gradient_norm - norm).abs() < 1e-9 * norm);
    assert_eq!(stats, vars.stats);
    for ((new, old), gradient) in params.iter().zip(&vars.params).zip(&vars.grads) {
        let expected = f64::from(*old) - 0.5 * f64::from(*gradient) / 2.0;
        assert!((f64::from(*new) - expected).abs() < 1e-6, "{new}, not {expected}");
    }
}
