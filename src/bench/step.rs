//! A training step and an inference of a whole network.

use super::Bench;
use super::floor::{Ceiling, training_step};
use super::timing::{Clock, Milliseconds, measure};
use crate::Result;
use crate::backend::{Backend, Mode, Normalisation, StepKey, Variables};
use crate::data::MixPlan;
use crate::model::summarise;
use crate::nn::{Network, NetworkSpec};
use crate::optimizer::{Rule, Step};
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

/// A network with all that its step needs.
#[derive(Debug)]
pub(super) struct Stepper<B: Backend> {
    network: Network,
    pub(super) vars: Variables<B>,
    slots: Vec<B::Buffer>,
    decayed: Vec<std::ops::Range<usize>>,
    images: Vec<u8>,
    size: usize,
    mix: MixPlan,
    targets: Vec<f32>,
    key: StepKey,
    number: u64,
}

impl<B: Backend> Stepper<B> {
    pub(super) fn new(
        settings: &Settings,
        backend: &B,
        vars: Variables<B>,
        network: Network,
    ) -> Result<Self> {
        let slots = vec![backend.buffer(vec![B::Element::default(); network.layout().param_count()])?];
        Ok(Self::with_slots(settings, vars, slots, network))
    }

    /// With the optimizer's buffers.
    pub(super) fn with_slots(
        settings: &Settings,
        vars: Variables<B>,
        slots: Vec<B::Buffer>,
        network: Network,
    ) -> Self {
        let &Settings { size, batch, .. } = settings;
        let classes = network.spec().classes;
        let mut targets = vec![0.0; batch * classes];
        (0..batch).for_each(|image| targets[image * classes + image * 7 % classes] = 1.0);
        let byte = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9).to_le_bytes()[3];
        Self {
            decayed: network.layout().decayed(),
            images: (0..batch * size * size * 3).map(byte).collect(),
            mix: MixPlan::none(batch),
            key: StepKey { seed: 1, epoch: 0, images: (0..batch as u32).collect() },
            number: 0,
            network,
            vars,
            slots,
            size,
            targets,
        }
    }

    /// Forward, loss, backward, update; the gradients are cleared for the next.
    pub(super) fn train(&mut self, backend: &mut B) -> Result<()> {
        let Self { network, vars, .. } = self;
        self.key.epoch = self.number as u32;
        backend.begin_step(&self.key);
        let x = backend.input(&self.images, self.size, &Normalisation::HALF, &self.mix)?;
        let mut pass = network.forward(backend, x, vars, Mode::Train, DROPOUT)?;
        backend.cross_entropy(&mut pass.head, &self.targets)?;
        network.backward(backend, pass, vars)?;
        let step = Step { number: self.number, learning_rate: 1e-4, weight_decay: 1e-5, gradient_scale: 1.0 };
        backend.update(RULE, &step, &self.decayed, vars, &mut self.slots)?;
        self.number += 1;
        backend.clear(&mut vars.grads)
    }

    /// Logits of the images.
    pub(super) fn infer(&mut self, backend: &mut B) -> Result<()> {
        let x = backend.input(&self.images, self.size, &Normalisation::HALF, &self.mix)?;
        self.network.forward(backend, x, &mut self.vars, Mode::Eval, 0.0).map(drop)
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
    let network = Network::new(settings.network.clone());
    let vars = bench.variables(network.layout())?;
    let mut stepper = Stepper::new(settings, bench.backend, vars, network)?;
    let Bench { backend, clock, effort, .. } = bench;
    let time = measure(*clock, *effort, || match pass {
        Pass::Training => stepper.train(*backend),
        Pass::Inference => stepper.infer(*backend),
    })?;
    let &Settings { size, batch, dtype, ref network, ceiling } = settings;
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
        time,
        images_per_second: batch as f64 / (time.median / 1e3),
        parameters: total.parameters,
        macs: total.macs,
        peak_bytes: None,
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
        let settings = Settings { network, size: 32, batch: 2, dtype: Dtype::F32, ceiling };
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
        let settings = Settings { network, size: 32, batch: 2, dtype: Dtype::F32, ceiling: None };
        let mut backend = Reference::<f32>::new();
        let effort = Effort { rounds: 1, round_seconds: 0.0, warm_up_seconds: 0.0 };
        let bench = Bench { backend: &mut backend, clock: &HostClock, effort, cache: 0 };
        let network = Network::new(settings.network.clone());
        let vars = bench.variables(network.layout()).unwrap();
        let before = vars.params.clone();
        let mut stepper = Stepper::new(&settings, bench.backend, vars, network).unwrap();
        stepper.train(bench.backend).unwrap();
        assert_ne!(stepper.vars.params, before);
        assert!(stepper.vars.grads.iter().all(|&g| g == 0.0), "cleared for the next step");
    }
}
