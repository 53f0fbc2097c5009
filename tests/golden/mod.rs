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
use std::fmt::{self, Display, Formatter};
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
    reduced: HashMap<String, Reduced>,
}

/// The same step by PyTorch in bf16 or f16: its loss, and the cosines of its gradients with those in f64, of the tensors
/// whose norm matters.
#[derive(Deserialize)]
struct Reduced {
    loss: f64,
    cosines: HashMap<String, f64>,
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

/// A network with closed-form weights, a batch, and what PyTorch computes from them.
pub struct Case {
    name: &'static str,
    naming: Naming,
    golden: Golden,
    architecture: Architecture,
    network: Network,
}

impl Case {
    /// The case in the file of this name.
    pub fn read((name, model, naming): (&'static str, &str, Naming)) -> Self {
        // Elsewhere than where they were built, the tests are told where the files are.
        let folder = std::env::var("EFFNETV2_TEST_GOLDENS");
        let folder = folder.unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens").into());
        let path = Path::new(&folder).join(format!("{name}.json"));
        let golden: Golden = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let mut architecture = Architecture::find(model).unwrap();
        architecture.padding = if naming == Naming::Torchvision { Padding::Symmetric } else { Padding::Same };
        architecture.drop_path = 0.0;
        architecture.batch_norm.epsilon = golden.bn_eps;
        architecture.batch_norm.momentum = golden.bn_momentum;
        let network = Network::new(architecture.network(golden.classes));
        assert_eq!(network.layout().param_count(), golden.parameters);
        Self { name, naming, golden, architecture, network }
    }

    fn shape(&self) -> Shape {
        let Golden { batch, image_size, .. } = self.golden;
        Shape::new(batch, image_size, image_size, 3)
    }

    fn prepare<B: Backend>(&self, backend: &mut B) {
        backend.prepare(|backend| rehearse(backend, &self.network, self.shape())).unwrap();
    }

    fn name_of(&self, entry: &Entry) -> String {
        name_of(self.naming, self.network.spec(), entry)
    }

    /// A buffer with the closed-form values of these tensors.
    fn fill<B: Backend>(&self, backend: &B, entries: &[Entry], len: usize) -> B::Buffer {
        let mut values = vec![B::Element::of(0.0); len];
        for entry in entries {
            let formula = formula::<B::Element>(entry, &self.name_of(entry));
            entry.set_from_torch(formula.into_iter(), &mut values);
        }
        backend.buffer(values).unwrap()
    }

    fn running_statistics<B: Backend>(&self, backend: &B) -> B::Buffer {
        let layout = self.network.layout();
        self.fill(backend, &layout.stats, layout.stat_buffer())
    }

    fn variables<B: Backend>(&self, backend: &B) -> Variables<B> {
        let layout = self.network.layout();
        Variables {
            params: self.fill(backend, &layout.params, layout.param_buffer()),
            grads: backend.zeros(layout.param_buffer()).unwrap(),
            stats: self.running_statistics(backend),
        }
    }

    /// The batch, channels last.
    fn pixels<F: Real>(&self) -> Vec<F> {
        let (shape, area) = (self.shape(), self.shape().h * self.shape().w);
        let mut pixels = vec![F::of(0.0); shape.elements()];
        for i in 0..pixels.len() {
            let (image, channel, pixel) = (i / (3 * area), i / area % 3, i % area);
            pixels[(image * area + pixel) * 3 + channel] = F::of(2.0 * u("input", i));
        }
        pixels
    }

    /// One training step without an update; its gradients are left in `vars`.
    fn step<B: Backend>(&self, backend: &mut B, vars: &mut Variables<B>) -> TrainingStep<B> {
        let images = backend.tensor(self.shape(), self.pixels()).unwrap();
        let mut pass = self.network.forward(backend, images, vars, Mode::Train, 0.0).unwrap();
        let logits = f64s(backend.logits(&pass.head).unwrap());
        let Golden { batch, classes, .. } = self.golden;
        let mut targets = vec![0.0; batch * classes];
        (0..batch).for_each(|i| targets[i * classes + (7 * i + 3) % classes] = 1.0);
        let loss = backend.cross_entropy(&mut pass.head, &targets).unwrap();
        let input_grad = self.network.backward_to_images(backend, pass, vars).unwrap();
        TrainingStep { logits, loss, input_grad }
    }

    /// The loss of a training step, and its gradients.
    pub fn gradients<B: Backend>(&self, mut backend: B) -> (f64, Vec<f64>) {
        self.prepare(&mut backend);
        let mut vars = self.variables(&backend);
        let loss = self.step(&mut backend, &mut vars).loss;
        (loss, f64s(backend.read(&vars.grads).unwrap()))
    }

    /// How far a step in `dtype`, bf16 or f16, is from `exact`, the same in f64, and how far PyTorch's is.
    pub fn reduced(&self, dtype: &str, found: &(f64, Vec<f64>), exact: &(f64, Vec<f64>)) -> [Distance; 2] {
        let theirs = &self.golden.train.reduced[dtype];
        let mut cosines = Vec::new();
        for entry in &self.network.layout().params {
            if let Some(&their_cosine) = theirs.cosines.get(&self.name_of(entry)) {
                let (a, b) = (&found.1[entry.range.clone()], &exact.1[entry.range.clone()]);
                let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
                cosines.push([dot(a, b) / (dot(a, a) * dot(b, b)).sqrt(), their_cosine]);
            }
        }
        assert_eq!(cosines.len(), theirs.cosines.len());
        let [ours, theirs] = [(found.0, 0), (theirs.loss, 1)].map(|(loss, whose)| {
            let mut cosines: Vec<f64> = cosines.iter().map(|pair| pair[whose]).collect();
            cosines.sort_by(f64::total_cmp);
            Distance { loss: (loss - exact.0).abs() / exact.0, cosines }
        });
        [ours, theirs]
    }

    fn logits<B: Backend>(
        &self,
        backend: &mut B,
        network: &Network,
        vars: &mut Variables<B>,
        pixels: &[B::Element],
    ) -> Vec<f64> {
        let images = backend.tensor(self.shape(), pixels.to_vec()).unwrap();
        let pass = network.forward(backend, images, vars, Mode::Eval, 0.0).unwrap();
        f64s(backend.logits(&pass.head).unwrap())
    }
}

/// How far a step is from one in f64.
pub struct Distance {
    /// Relative.
    pub loss: f64,
    /// Of the gradients whose norm matters, ascending.
    cosines: Vec<f64>,
}

impl Distance {
    /// The mean of 1 − cosine.
    pub fn mean_loss_of_direction(&self) -> f64 {
        self.cosines.iter().map(|cosine| 1.0 - cosine).sum::<f64>() / self.cosines.len() as f64
    }
}

impl Display for Distance {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (lowest, median) = (self.cosines[0], self.cosines[self.cosines.len() / 2]);
        let mean = self.mean_loss_of_direction();
        write!(
            f,
            "loss off by {:.1e}, cosines {lowest:.4} and up, median {median:.4}, 1 − mean {mean:.1e}",
            self.loss
        )
    }
}

struct TrainingStep<B: Backend> {
    logits: Vec<f64>,
    loss: f64,
    input_grad: B::Activation,
}

fn f64s<F: Real>(values: Vec<F>) -> Vec<f64> {
    values.into_iter().map(Real::f64).collect()
}

/// Runs one case on `backend` and panics where anything is further from PyTorch than `tolerance`.
pub fn check<B: Backend>(
    mut backend: B,
    case: (&'static str, &str, Naming),
    evaluated: Evaluated,
    tolerance: f64,
) {
    let case = Case::read(case);
    let Case { name, golden, network, .. } = &case;
    case.prepare(&mut backend);
    let mut vars = case.variables(&backend);
    let pixels = case.pixels::<B::Element>();
    let assert_close = |what: &str, error: f64| {
        assert!(error <= tolerance, "{name}: {what} is off by {error:.2e}, allowed {tolerance:.0e}");
    };

    if evaluated == Evaluated::Both {
        // What rounding alone does to the logits: the same images, each value moved by its last bits.
        let logits = case.logits(&mut backend, network, &mut vars, &pixels);
        let mut nudged = pixels.clone();
        let nudge = B::Element::of(1.0) + B::Element::of(4.0) * <B::Element as num_traits::Float>::epsilon();
        nudged.iter_mut().step_by(2).for_each(|v| *v *= nudge);
        let moved = case.logits(&mut backend, network, &mut vars, &nudged);
        let noise = logit_error(&moved, std::slice::from_ref(&logits));
        let bound = if noise < tolerance {
            tolerance
        } else {
            println!(
                "{name}: rounding alone moves the eval logits by {noise:.1e}; the calibrated ones are exact"
            );
            10.0 * noise
        };
        let off = logit_error(&logits, &golden.eval.logits);
        assert!(off <= bound, "{name}: eval logits are off by {off:.2e}, allowed {bound:.0e}");
    }

    // One batch sets the running statistics.
    let mut architecture = case.architecture.clone();
    architecture.batch_norm.momentum = 1.0;
    let calibrating = Network::new(architecture.network(golden.classes));
    let images = backend.tensor(case.shape(), pixels.clone()).unwrap();
    drop(calibrating.forward(&mut backend, images, &mut vars, Mode::Train, 0.0).unwrap());
    let logits = case.logits(&mut backend, &calibrating, &mut vars, &pixels);
    assert_close("calibrated logits", logit_error(&logits, &golden.calibrated.logits));
    vars.stats = case.running_statistics(&backend);

    let step = case.step(&mut backend, &mut vars);
    assert_close("train logits", logit_error(&step.logits, &golden.train.logits));
    assert_close("loss", (step.loss - golden.train.loss).abs() / golden.train.loss);

    let nhwc = f64s(backend.values(&step.input_grad).unwrap());
    let area = golden.image_size * golden.image_size;
    let nchw: Vec<f64> = (0..nhwc.len())
        .map(|i| {
            let (image, channel, pixel) = (i / (3 * area), i / area % 3, i % area);
            nhwc[(image * area + pixel) * 3 + channel]
        })
        .collect();
    assert_close("input gradient", error(&nchw, "input", &golden.train.input_grad, 0.0));
    let layout = network.layout();
    for (entries, buffer, summaries) in [
        (&layout.params, &vars.grads, &golden.train.grads),
        (&layout.stats, &vars.stats, &golden.train.buffers),
    ] {
        assert_eq!(entries.len(), summaries.len());
        let (values, largest) = (f64s(backend.read(buffer).unwrap()), largest(summaries));
        for entry in entries {
            let name = case.name_of(entry);
            let found = entry.to_torch(&values);
            assert_close(&name, error(&found, &name, &summaries[&name], largest));
        }
    }
}
