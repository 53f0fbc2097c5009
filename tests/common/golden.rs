//! PyTorch's figures for whole networks with closed-form weights, and a backend held to them.
//!
//! `goldens/generate.py` wrote the files (timm and torchvision, float64) and documents the formula of the weights.

use effnetv2::Result;
use effnetv2::backend::{Backend, Mode, Variables};
use effnetv2::model::{Architecture, Naming, torchvision_name};
use effnetv2::nn::{Entry, Network, NetworkSpec, Role};
use effnetv2::tensor::{Padding, Real, Shape};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::Path;

#[derive(Deserialize)]
struct Golden {
    batch: usize,
    image_size: usize,
    classes: usize,
    parameters: usize,
    bn_eps: f64,
    bn_momentum: f64,
    eval: Eval,
    calibrated: Eval,
    train: Train,
}

#[derive(Deserialize)]
struct Eval {
    logits: Vec<Vec<f64>>,
}

#[derive(Deserialize)]
struct Train {
    logits: Vec<Vec<f64>>,
    loss: f64,
    grads: HashMap<String, Summary>,
    input_grad: Summary,
    buffers: HashMap<String, Summary>,
}

/// What the file keeps of a tensor: its norm, its product with a pseudo-random probe, its first values.
#[derive(Deserialize)]
struct Summary {
    norm: f64,
    dot: f64,
    head: Vec<f64>,
}

fn fnv1a64(name: &str) -> u64 {
    name.bytes().fold(0xCBF2_9CE4_8422_2325, |h, byte| (h ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3))
}

/// The `index`-th pseudo-random value of a name, in [-1, 1).
fn u(name: &str, index: usize) -> f64 {
    let mut z = fnv1a64(name).wrapping_add(index as u64).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    (z >> 40) as f64 / f64::from(1 << 23) - 1.0
}

/// The closed-form values of a tensor called `name`, in PyTorch's order.
fn formula<F: Real>(entry: &Entry, name: &str) -> Vec<F> {
    let value = |i| {
        let u = u(name, i);
        match entry.role {
            Role::Bias | Role::Beta | Role::RunningMean => 0.1 * u,
            Role::RunningVar => 1.0 + 0.3 * u,
            Role::Gamma => 1.0 + 0.2 * u,
            _ => u * (6.0 / (entry.range.len() / entry.shape[0]) as f64).sqrt(),
        }
    };
    (0..entry.range.len()).map(|i| F::of(value(i))).collect()
}

fn name_of(naming: Naming, spec: &NetworkSpec, entry: &Entry) -> String {
    match naming {
        Naming::Timm => entry.name.clone(),
        Naming::Torchvision => torchvision_name(spec, &entry.name).expect("a torchvision name"),
    }
}

/// Largest |Δ| of norm, dot and head over max(norm, 1e-3 · the largest norm of its kind).
fn error(found: &[f64], name: &str, expected: &Summary, largest: f64) -> f64 {
    let norm = found.iter().map(|v| v * v).sum::<f64>().sqrt();
    let dot: f64 = found.iter().enumerate().map(|(i, v)| v * u(&format!("probe/{name}"), i)).sum();
    let heads = found.iter().zip(&expected.head).map(|(a, b)| (a - b).abs());
    let worst = heads.fold((norm - expected.norm).abs().max((dot - expected.dot).abs()), f64::max);
    worst / expected.norm.max(1e-3 * largest)
}

fn logit_error(found: &[f64], expected: &[Vec<f64>]) -> f64 {
    let expected: Vec<f64> = expected.concat();
    let norm = expected.iter().map(|v| v * v).sum::<f64>().sqrt();
    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) / norm
}

fn largest(summaries: &HashMap<String, Summary>) -> f64 {
    summaries.values().map(|s| s.norm).fold(0.0, f64::max)
}

/// A whole step on images that are there already, for its memory.
fn rehearse<B: Backend>(backend: &mut B, network: &Network, shape: Shape) -> Result<()> {
    let layout = network.layout();
    let (params, stats) = (backend.zeros(layout.param_buffer())?, backend.zeros(layout.stat_buffer())?);
    let mut vars = Variables { params, grads: backend.zeros(layout.param_buffer())?, stats };
    let images = backend.tensor(shape, Vec::new())?;
    let mut pass = network.forward(backend, images, &mut vars, Mode::Train, 0.0)?;
    backend.loss_gradient(&mut pass.head)?;
    network.backward_to_images(backend, pass, &mut vars).map(drop)
}

/// Which logits in evaluation are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evaluated {
    /// Those with the formula's running statistics, too, where rounding alone may change them.
    Both,
    /// Only those with the statistics of a batch.
    Calibrated,
}

/// Runs one case on `backend` and panics where anything is further from PyTorch than `tolerance`.
pub fn check<B: Backend>(
    mut backend: B,
    (case, model, naming): (&str, &str, Naming),
    evaluated: Evaluated,
    tolerance: f64,
) {
    // Elsewhere than where they were built, the tests are told where the files are.
    let folder = std::env::var("EFFNETV2_TEST_GOLDENS");
    let folder = folder.unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens").into());
    let path = Path::new(&folder).join(format!("{case}.json"));
    let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut architecture = Architecture::find(model).unwrap();
    architecture.padding = if naming == Naming::Torchvision { Padding::Symmetric } else { Padding::Same };
    architecture.drop_path = 0.0;
    architecture.batch_norm.epsilon = golden.bn_eps;
    architecture.batch_norm.momentum = golden.bn_momentum;
    let network = Network::new(architecture.network(golden.classes));
    let (spec, layout) = (network.spec(), network.layout());
    assert_eq!(layout.param_count(), golden.parameters);
    let (n, side) = (golden.batch, golden.image_size);
    let shape = Shape::new(n, side, side, 3);
    backend.prepare(|backend| rehearse(backend, &network, shape)).unwrap();

    let fill = |backend: &B, entries: &[Entry], len| {
        let mut values = vec![B::Element::of(0.0); len];
        for entry in entries {
            let formula = formula::<B::Element>(entry, &name_of(naming, spec, entry));
            entry.set_from_torch(formula.into_iter(), &mut values);
        }
        backend.buffer(values).unwrap()
    };
    let mut vars: Variables<B> = Variables {
        params: fill(&backend, &layout.params, layout.param_buffer()),
        grads: backend.zeros(layout.param_buffer()).unwrap(),
        stats: fill(&backend, &layout.stats, layout.stat_buffer()),
    };

    let mut pixels = vec![B::Element::of(0.0); shape.elements()];
    for (i, value) in (0..pixels.len()).map(|i| (i, 2.0 * u("input", i))) {
        let (image, channel, pixel) = (i / (3 * side * side), i / (side * side) % 3, i % (side * side));
        pixels[(image * side * side + pixel) * 3 + channel] = B::Element::of(value);
    }
    let f64s = |values: Vec<B::Element>| -> Vec<f64> { values.into_iter().map(Real::f64).collect() };
    let assert_close = |what: &str, error: f64| {
        assert!(error <= tolerance, "{case}: {what} is off by {error:.2e}, allowed {tolerance:.0e}");
    };

    let eval = |backend: &mut B, network: &Network, vars: &mut Variables<B>, pixels: &[B::Element]| {
        let images = backend.tensor(shape, pixels.to_vec()).unwrap();
        let pass = network.forward(backend, images, vars, Mode::Eval, 0.0).unwrap();
        f64s(backend.logits(&pass.head).unwrap())
    };
    if evaluated == Evaluated::Both {
        // What rounding alone does to the logits: the same images, each value moved by its last bits.
        let logits = eval(&mut backend, &network, &mut vars, &pixels);
        let mut nudged = pixels.clone();
        let nudge = B::Element::of(1.0) + B::Element::of(4.0) * <B::Element as num_traits::Float>::epsilon();
        nudged.iter_mut().step_by(2).for_each(|v| *v *= nudge);
        let noise =
            logit_error(&eval(&mut backend, &network, &mut vars, &nudged), std::slice::from_ref(&logits));
        let bound = if noise < tolerance {
            tolerance
        } else {
            println!(
                "{case}: rounding alone moves the eval logits by {noise:.1e}; the calibrated ones are exact"
            );
            10.0 * noise
        };
        let off = logit_error(&logits, &golden.eval.logits);
        assert!(off <= bound, "{case}: eval logits are off by {off:.2e}, allowed {bound:.0e}");
    }

    // One batch sets the running statistics.
    architecture.batch_norm.momentum = 1.0;
    let calibrating = Network::new(architecture.network(golden.classes));
    let images = backend.tensor(shape, pixels.clone()).unwrap();
    drop(calibrating.forward(&mut backend, images, &mut vars, Mode::Train, 0.0).unwrap());
    let logits = eval(&mut backend, &calibrating, &mut vars, &pixels);
    assert_close("calibrated logits", logit_error(&logits, &golden.calibrated.logits));
    vars.stats = fill(&backend, &layout.stats, layout.stat_buffer());

    let images = backend.tensor(shape, pixels).unwrap();
    let mut pass = network.forward(&mut backend, images, &mut vars, Mode::Train, 0.0).unwrap();
    let logits = f64s(backend.logits(&pass.head).unwrap());
    assert_close("train logits", logit_error(&logits, &golden.train.logits));
    let mut targets = vec![0.0; n * golden.classes];
    (0..n).for_each(|i| targets[i * golden.classes + (7 * i + 3) % golden.classes] = 1.0);
    let loss = backend.cross_entropy(&mut pass.head, &targets).unwrap();
    assert_close("loss", (loss - golden.train.loss).abs() / golden.train.loss);
    let input_grad = network.backward_to_images(&mut backend, pass, &mut vars).unwrap();

    let nhwc = f64s(backend.values(&input_grad).unwrap());
    let nchw: Vec<f64> = (0..nhwc.len())
        .map(|i| {
            let (image, channel, pixel) = (i / (3 * side * side), i / (side * side) % 3, i % (side * side));
            nhwc[(image * side * side + pixel) * 3 + channel]
        })
        .collect();
    assert_close("input gradient", error(&nchw, "input", &golden.train.input_grad, 0.0));
    for (entries, buffer, summaries) in [
        (&layout.params, &vars.grads, &golden.train.grads),
        (&layout.stats, &vars.stats, &golden.train.buffers),
    ] {
        assert_eq!(entries.len(), summaries.len());
        let (values, largest) = (f64s(backend.read(buffer).unwrap()), largest(summaries));
        for entry in entries {
            let name = name_of(naming, spec, entry);
            let found = entry.to_torch(&values);
            assert_close(&name, error(&found, &name, &summaries[&name], largest));
        }
    }
}
