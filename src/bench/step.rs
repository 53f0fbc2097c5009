//! A training step and an inference of a whole network.

use super::Bench;
use super::floor::{Ceiling, training_step};
use super::timing::{Clock, Milliseconds, measure};
use crate::Result;
use crate::backend::{Backend, Mode, Normalisation, PassKind, State, StepKey};
use crate::data::MixPlan;
use crate::model::{initial_values, summarise};
use crate::nn::{Network, NetworkSpec};
use crate::optimizer::{Rule, Scalars, Step};
use crate::tensor::Dtype;
use serde::{Deserialize, Serialize};

/// What a pass does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pass {
    /// Forward, loss, backward and update.
    Training,
    /// Forward with running statistics.
    Inference,
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The network.
    pub network: NetworkSpec,
    /// Side of the images in pixels.
    pub size: usize,
    /// Images at once.
    pub batch: usize,
    /// The element type of tensors.
    pub dtype: Dtype,
    /// Whether bytes are counted: only for the dataflow of the kernels does the count hold.
    pub count_bytes: bool,
    /// What the GPU reaches, if known.
    pub ceiling: Option<Ceiling>,
}

/// A training step or an inference, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepResult {
    /// "step".
    pub kind: String,
    /// The network.
    pub model: String,
    /// Training or inference.
    pub pass: Pass,
    /// Side of the images in pixels.
    pub size: usize,
    /// Images at once.
    pub batch: usize,
    /// The element type of tensors.
    pub dtype: Dtype,
    /// How it was run: "plain", "graph", or a mode of a peer.
    pub mode: String,
    /// Whether kernels were set up while the ones before them still ran.
    #[serde(default)]
    pub overlap: bool,
    /// The time of a step.
    pub time: Milliseconds,
    /// Images a second.
    pub images_per_second: f64,
    /// Trainable values.
    pub parameters: usize,
    /// Multiply-adds of a forward, for one image.
    pub macs: usize,
    /// The most memory held: of the process on a CPU, of the device on a GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// On a GPU whose ceiling is known: the least time for a training step, over the time it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of_floor: Option<f64>,
}

/// SGD with momentum, which every peer has in a fused form.
const RULE: Rule = Rule::Sgd { momentum: 0.9, nesterov: false };
/// Dropout before the classifier; stochastic depth is the network's own.
const DROPOUT: f64 = 0.2;
/// For f16: what the loss is multiplied with.
const LOSS_SCALE: f64 = 1024.0;

/// A network with all that its step needs.
#[derive(Debug)]
pub(super) struct Stepper<B: Backend> {
    pub(super) network: Network,
    pub(super) state: State<B>,
    images: Vec<u8>,
    mix: MixPlan,
    targets: Vec<f32>,
    key: StepKey,
    kind: PassKind,
    number: u64,
    sent: bool,
}

impl<B: Backend> Stepper<B> {
    pub(super) fn new(settings: &Settings, network: Network, state: State<B>) -> Self {
        let &Settings { size, batch, .. } = settings;
        let classes = network.spec().classes;
        let mut targets = vec![0.0; batch * classes];
        (0..batch).for_each(|image| targets[image * classes + image * 7 % classes] = 1.0);
        let byte = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9).to_le_bytes()[3];
        Self {
            images: (0..batch * size * size * 3).map(byte).collect(),
            mix: MixPlan::none(batch),
            key: StepKey { seed: 1, epoch: 0, images: (0..batch as u32).collect() },
            kind: PassKind { images: batch, side: size, dropout: DROPOUT, first: true, last: true },
            number: 0,
            sent: false,
            network,
            state,
            targets,
        }
    }

    /// Makes room for a training step or an inference.
    pub(super) fn prepare(&self, backend: &mut B, pass: Pass) -> Result<()> {
        backend.prepare(|rehearsal| rehearse(rehearsal, &self.network, self.kind, pass))
    }

    /// What either takes on the device, where that is counted: passes and flat buffers.
    fn memory(&self, backend: &B, pass: Pass) -> Result<Option<u64>> {
        let memory = backend.memory(|rehearsal| rehearse(rehearsal, &self.network, self.kind, pass))?;
        Ok(memory.map(|memory| (memory.needed + memory.buffers) as u64))
    }

    /// The images of a pass; the next ones go on their way while this one is computed.
    fn images(&mut self, backend: &mut B) -> Result<()> {
        if !self.sent {
            backend.send(&self.images, self.kind.side)?;
            self.sent = true;
        }
        backend.begin_pass(&Normalisation::HALF, &self.mix)
    }

    /// Forward, loss, backward, update; nothing is read back.
    pub(super) fn train(&mut self, backend: &mut B) -> Result<()> {
        self.key.epoch = self.number as u32;
        let loss_scale = if backend.dtype() == Dtype::F16 { LOSS_SCALE } else { 1.0 };
        backend.set_loss_scale(loss_scale);
        backend.begin_step(&self.key)?;
        self.images(backend)?;
        backend.set_targets(&self.targets)?;
        let step = Step { number: self.number, learning_rate: 1e-4, weight_decay: 1e-5, gradient_scale: 1.0 };
        let scalars = Scalars { loss_scale, ..Scalars::plain(step) };
        let (network, kind) = (&self.network, self.kind);
        let layout = network.layout();
        backend.begin_update(RULE, &scalars, layout.param_buffer(), &layout.decayed())?;
        backend
            .perform(kind, &mut self.state, |backend, state| network.training_pass(backend, kind, state))?;
        self.number += 1;
        backend.send(&self.images, kind.side)
    }

    /// Logits of the images.
    pub(super) fn infer(&mut self, backend: &mut B) -> Result<()> {
        self.images(backend)?;
        let x = backend.input()?;
        self.network.forward(backend, x, &mut self.state.vars, Mode::Eval, 0.0)?;
        backend.send(&self.images, self.kind.side)
    }
}

fn rehearse<B: Backend>(backend: &mut B, network: &Network, kind: PassKind, pass: Pass) -> Result<()> {
    match pass {
        Pass::Training => network.rehearse_training(backend, kind, RULE),
        Pass::Inference => network.rehearse_evaluation(backend, kind.images, kind.side),
    }
}

impl<B: Backend, C> Bench<'_, B, C> {
    /// A network with initial weights, and room for its passes.
    pub(super) fn stepper(&mut self, settings: &Settings, pass: Pass) -> Result<Stepper<B>> {
        let network = Network::new(settings.network.clone());
        let (params, stats) = initial_values(network.layout(), 0);
        let state = State::new(self.backend, RULE, params, stats)?;
        let stepper = Stepper::new(settings, network, state);
        stepper.prepare(self.backend, pass)?;
        Ok(stepper)
    }
}

/// Measures a pass of a network.
///
/// # Errors
/// What backend and clock say, of memory above all.
pub fn run<B: Backend, C: Clock>(
    bench: &mut Bench<'_, B, C>,
    settings: &Settings,
    pass: Pass,
) -> Result<StepResult> {
    let mut stepper = bench.stepper(settings, pass)?;
    let Bench { backend, clock, effort, .. } = bench;
    let time = measure(*clock, *effort, || match pass {
        Pass::Training => stepper.train(*backend),
        Pass::Inference => stepper.infer(*backend),
    });
    backend.discard_sent();
    let time = time?;
    let &Settings { size, batch, dtype, ref network, ceiling, .. } = settings;
    let total = summarise(network, size).total;
    let floor = |ceiling: Ceiling| ceiling.seconds(&training_step(network, size, batch, dtype), dtype);
    let of_floor = |seconds: f64| seconds / (time.median / 1e3);
    Ok(StepResult {
        kind: "step".into(),
        model: network.name.clone(),
        pass,
        size,
        batch,
        dtype,
        mode: "plain".into(),
        overlap: false,
        time,
        images_per_second: batch as f64 / (time.median / 1e3),
        parameters: total.parameters,
        macs: total.macs,
        peak_bytes: stepper.memory(backend, pass)?,
        of_floor: ceiling.filter(|_| pass == Pass::Training).map(floor).map(of_floor),
    })
}

#[cfg(test)]
mod tests {
    use super::super::timing::{Effort, HostClock};
    use super::*;
    use crate::model::Architecture;
    use crate::reference::Reference;

    #[test]
    fn both_passes_are_measured() {
        let network = Architecture::find("nano").unwrap().network(10);
        let ceiling = Some(Ceiling { bandwidth: 1e12, tensor: 1e14, plain: 1e13 });
        let settings =
            Settings { network, size: 32, batch: 2, dtype: Dtype::F32, count_bytes: false, ceiling };
        let mut backend = Reference::<f32>::new();
        let effort = Effort { rounds: 2, round_seconds: 0.0, warm_up_seconds: 0.0 };
        let mut bench = Bench { backend: &mut backend, clock: &HostClock, effort, cache: 0 };
        for pass in [Pass::Training, Pass::Inference] {
            let found = run(&mut bench, &settings, pass).unwrap();
            assert_eq!((found.model.as_str(), found.parameters, found.time.rounds), ("nano", 42_322, 2));
            assert!((found.images_per_second * found.time.median - 2000.0).abs() < 1e-6);
            assert_eq!(found.of_floor.is_some(), pass == Pass::Training);
        }
    }

    #[test]
    fn a_step_trains() {
        let network = Architecture::find("nano").unwrap().network(10);
        let settings =
            Settings { network, size: 32, batch: 2, dtype: Dtype::F32, count_bytes: false, ceiling: None };
        let mut backend = Reference::<f32>::new();
        let effort = Effort { rounds: 1, round_seconds: 0.0, warm_up_seconds: 0.0 };
        let mut bench = Bench { backend: &mut backend, clock: &HostClock, effort, cache: 0 };
        let mut stepper = bench.stepper(&settings, Pass::Training).unwrap();
        let before = stepper.state.vars.params.clone();
        let losses: Vec<f64> = (0..20)
            .map(|_| {
                stepper.train(bench.backend).unwrap();
                bench.backend.loss().unwrap()
            })
            .collect();
        assert_ne!(stepper.state.vars.params, before);
        assert!(losses[19] < losses[0], "{losses:?}");
    }
}
