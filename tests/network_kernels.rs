//! Whole networks on the device: against PyTorch, against the reference, and against themselves.

#![cfg(feature = "cuda")]

#[allow(unreachable_pub, reason = "it is shared by test programs")]
mod golden;

mod devices;

use devices::{again_on_a_gpu, device_alone};
use effnetv2::Result;
use effnetv2::backend::{
    Backend, Mode, Normalisation, PassKind, State, StepKey, Variables, VarianceEstimator,
};
use effnetv2::bench::tune::{Candidate, candidates, possible};
use effnetv2::data::MixPlan;
use effnetv2::device::Device;
use effnetv2::kernels::InputKind;
use effnetv2::kernels::fused::{Accelerated, Convolution, ConvolutionPass, FusedElement, Planner};
use effnetv2::kernels::pointwise::{Passes, PointwiseWork};
use effnetv2::kernels::tuning::{Choice, Choices, Launch, Tuning, key};
use effnetv2::model::{Architecture, Naming, initial_values};
use effnetv2::nn::{BatchNormSpec, BlockKind, BlockSpec, Network, NetworkSpec, Role, StageSpec};
use effnetv2::optimizer::{Rule, Scalars, Step};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::Reference;
use effnetv2::tensor::{ConvKind, Dtype, Padding, Real};
use half::{bf16, f16};
use std::collections::HashSet;
use std::sync::Arc;

/// A network, a batch, and all that a step depends on.
struct Problem {
    network: Network,
    images: Vec<u8>,
    count: usize,
    side: usize,
    dropout: f64,
    learning_rate: f64,
    targets: Vec<f32>,
    params: Vec<f32>,
    stats: Vec<f32>,
}

impl Problem {
    fn new(spec: NetworkSpec, count: usize, side: usize, dropout: f64) -> Self {
        let network = Network::new(spec);
        let mut stream = Stream::new(7, 0, 0, Purpose::Init);
        let images = (0..count * side * side * 3).map(|_| (stream.uniform() * 255.99) as u8).collect();
        let classes = network.spec().classes;
        let mut targets: Vec<f32> = (0..count * classes).map(|_| 0.1 * stream.uniform()).collect();
        for (image, row) in targets.chunks_mut(classes).enumerate() {
            row[image * 7 % classes] += 1.0;
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|t| *t /= sum);
        }
        let (mut params, stats) = initial_values::<f32>(network.layout(), 3);
        for entry in &network.layout().params {
            if !entry.role.is_kernel() {
                let centre = if entry.role == Role::Gamma { 1.0 } else { 0.0 };
                params[entry.range.clone()]
                    .iter_mut()
                    .for_each(|p| *p = centre + stream.uniform_in(-0.3, 0.3) as f32);
            }
        }
        Self { network, images, count, side, dropout, learning_rate: 0.02, targets, params, stats }
    }

    fn model(name: &str, classes: usize, count: usize, side: usize, dropout: f64) -> Self {
        Self::new(Architecture::find(name).unwrap().network(classes), count, side, dropout)
    }

    /// Of the step with this number.
    fn key(&self, number: u64) -> StepKey {
        let images = (0..self.count as u32).map(|i| i * 31 + number as u32).collect();
        StepKey { seed: 5, epoch: 2, images }
    }

    fn kind(&self) -> PassKind {
        let Self { count: images, side, dropout, .. } = *self;
        PassKind { images, side, dropout, first: true, last: true }
    }

    fn prepare<B: Backend>(&self, backend: &mut B) {
        backend.prepare(|backend| self.network.rehearse_training(backend, self.kind(), RULE)).unwrap();
        backend.prepare(|backend| self.through_images(backend).map(drop)).unwrap();
    }

    /// One step, and the gradient of the images.
    fn through_images<B: Backend>(&self, backend: &mut B) -> Result<Gradients<B>> {
        let cast = |values: &[f32]| values.iter().map(|&v| B::Element::of(v.into())).collect();
        let mut vars = Variables {
            params: backend.buffer(cast(&self.params))?,
            grads: backend.zeros(self.params.len())?,
            stats: backend.buffer(cast(&self.stats))?,
        };
        backend.begin_step(&self.key(0))?;
        let x = backend.load(&self.images, self.side, &Normalisation::HALF, &MixPlan::none(self.count))?;
        let mut pass = self.network.forward(backend, x, &mut vars, Mode::Train, self.dropout)?;
        backend.set_targets(&self.targets)?;
        backend.loss_gradient(&mut pass.head)?;
        let logits = backend.logits(&pass.head).unwrap_or_default();
        let dx = self.network.backward_to_images(backend, pass, &mut vars)?;
        Ok(Gradients { logits, dx, vars })
    }

    fn gradients<B: Backend>(&self, mut backend: B) -> Numbers {
        self.prepare(&mut backend);
        let Gradients { logits, dx, vars } = self.through_images(&mut backend).unwrap();
        let f64s = |values: Vec<B::Element>| values.into_iter().map(Real::f64).collect::<Vec<_>>();
        Numbers {
            loss: backend.loss().unwrap(),
            logits: f64s(logits),
            dx: f64s(backend.values(&dx).unwrap()),
            grads: f64s(backend.read(&vars.grads).unwrap()),
            stats: f64s(backend.read(&vars.stats).unwrap()),
        }
    }

    /// The losses of `steps` steps, and all buffers after them.
    fn train<B: Backend>(&self, backend: &mut B, steps: u64) -> (Vec<f64>, Vec<Vec<f64>>) {
        self.prepare(backend);
        let cast = |values: &[f32]| values.iter().map(|&v| B::Element::of(v.into())).collect();
        let mut state = State::new(backend, RULE, cast(&self.params), cast(&self.stats)).unwrap();
        let losses = (0..steps).map(|number| self.step(backend, &mut state, number, 1.0).0).collect();
        let State { vars, average, slots } = &state;
        let buffers = [&vars.params, &vars.stats, &average.params, &average.stats];
        let read = |buffer| backend.read(buffer).unwrap().into_iter().map(Real::f64).collect();
        (losses, buffers.into_iter().chain(slots).map(read).collect())
    }

    /// Loss and gradient norm of one step.
    fn step<B: Backend>(
        &self,
        backend: &mut B,
        state: &mut State<B>,
        number: u64,
        loss_scale: f64,
    ) -> (f64, f64) {
        let learning_rate = self.learning_rate;
        let step = Step { number, learning_rate, weight_decay: 1e-4, gradient_scale: 1.0 };
        let scalars = Scalars { step, ema_decay: 0.9, loss_scale, max_norm: Some(2.0) };
        let layout = self.network.layout();
        backend.set_loss_scale(loss_scale);
        backend.send(&self.images, self.side).unwrap();
        backend.begin_step(&self.key(number)).unwrap();
        backend.begin_pass(&Normalisation::HALF, &MixPlan::none(self.count)).unwrap();
        backend.set_targets(&self.targets).unwrap();
        backend.begin_update(RULE, &scalars, layout.param_buffer(), &layout.decayed()).unwrap();
        let kind = self.kind();
        let pass = |backend: &mut B, state: &mut State<B>| self.network.training_pass(backend, kind, state);
        backend.perform(kind, state, pass).unwrap();
        (backend.loss().unwrap(), backend.gradient_norm().unwrap())
    }
}

const RULE: Rule = Rule::Sgd { momentum: 0.9, nesterov: true };

struct Gradients<B: Backend> {
    logits: Vec<B::Element>,
    dx: B::Activation,
    vars: Variables<B>,
}

/// All that a step computes.
struct Numbers {
    loss: f64,
    logits: Vec<f64>,
    dx: Vec<f64>,
    grads: Vec<f64>,
    stats: Vec<f64>,
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

/// ‖a − b‖ over the larger of ‖b‖ and 10⁻³ of `largest`.
fn distance(a: &[f64], b: &[f64], largest: f64) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(b).max(1e-3 * largest)
}

/// `found` is within `tolerance` of `expected`, tensor by tensor.
fn assert_close(problem: &Problem, found: &Numbers, expected: &Numbers, tolerance: f64) {
    let layout = problem.network.layout();
    let mut parts = vec![
        ("loss".to_owned(), (found.loss - expected.loss).abs() / expected.loss),
        ("logits".to_owned(), distance(&found.logits, &expected.logits, 0.0)),
        ("the gradient of the images".to_owned(), distance(&found.dx, &expected.dx, 0.0)),
    ];
    for (entries, found, expected) in
        [(&layout.params, &found.grads, &expected.grads), (&layout.stats, &found.stats, &expected.stats)]
    {
        let largest = entries.iter().map(|e| norm(&expected[e.range.clone()])).fold(0.0, f64::max);
        parts.extend(entries.iter().map(|entry| {
            let range = entry.range.clone();
            (entry.name.clone(), distance(&found[range.clone()], &expected[range], largest))
        }));
    }
    let (worst, off) = parts.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    println!("{}: worst is {worst}, off by {off:.1e}", problem.network.spec().name);
    assert!(parts.iter().all(|(_, off)| *off <= tolerance), "{worst} is off by {off:.2e} > {tolerance:.0e}");
}

const BLOCK: BlockSpec = BlockSpec {
    kind: BlockKind::FusedMbConv,
    kernel: 3,
    stride: 1,
    expansion: 1,
    inputs: 16,
    outputs: 16,
    squeeze: None,
    drop_path: 0.0,
};

/// A network of these blocks, one a stage.
fn spec(name: &str, padding: Padding, blocks: &[BlockSpec]) -> NetworkSpec {
    NetworkSpec {
        name: name.into(),
        stem: blocks[0].inputs,
        stages: blocks.iter().map(|&block| StageSpec { blocks: vec![block] }).collect(),
        head: 40,
        classes: 5,
        padding,
        batch_norm: BatchNormSpec { epsilon: 1e-3, momentum: 0.1, variance: VarianceEstimator::Unbiased },
    }
}

/// Every kind of block, each with and without what it may have: stride, skip connection, gate, stochastic depth.
fn blocks() -> Vec<(&'static str, BlockSpec)> {
    let mb = BlockSpec { kind: BlockKind::MbConv, ..BLOCK };
    vec![
        ("fused without expansion", BlockSpec { drop_path: 0.4, ..BLOCK }),
        ("fused without expansion, stride 2", BlockSpec { stride: 2, outputs: 24, ..BLOCK }),
        ("fused", BlockSpec { expansion: 4, drop_path: 0.4, ..BLOCK }),
        ("fused, stride 2", BlockSpec { expansion: 4, stride: 2, outputs: 24, ..BLOCK }),
        ("mb without expansion", BlockSpec { drop_path: 0.4, ..mb }),
        ("mb without expansion, gated", BlockSpec { squeeze: Some(5), stride: 2, ..mb }),
        ("mb", BlockSpec { expansion: 4, kernel: 5, ..mb }),
        ("mb, gated", BlockSpec { expansion: 4, squeeze: Some(4), drop_path: 0.4, ..mb }),
        (
            "mb, gated, 5×5, stride 2",
            BlockSpec { expansion: 6, kernel: 5, squeeze: Some(4), stride: 2, outputs: 24, ..mb },
        ),
    ]
}

#[test]
fn each_kind_of_block_is_the_references() {
    let Some((device, _alone)) = device_alone() else { return };
    for (name, block) in blocks() {
        for padding in [Padding::Same, Padding::Symmetric] {
            // The paddings differ on even sides alone.
            let side = if padding == Padding::Same { 13 } else { 12 };
            let problem = Problem::new(spec(name, padding, &[block]), 3, side, 0.2);
            let expected = problem.gradients(Reference::<f64>::new());
            let found = problem.gradients(Accelerated::<f32>::new(&device, false).unwrap());
            assert_close(&problem, &found, &expected, 1e-4);
        }
    }
}

/// Memory is planned to the byte.
#[test]
fn a_rehearsal_foresees_the_memory_of_a_step() {
    let Some((device, _alone)) = device_alone() else { return };
    let problem = Problem::model("nano", 10, 4, 32, 0.2);
    let mut backend = Accelerated::<bf16>::new(&device, false).unwrap();
    let mut planner = Planner::new(Dtype::Bf16);
    problem.network.rehearse_training(&mut planner, problem.kind(), RULE).unwrap();
    backend.prepare(|backend| problem.network.rehearse_training(backend, problem.kind(), RULE)).unwrap();
    let mut state = State::new(&backend, RULE, problem.params.clone(), problem.stats.clone()).unwrap();
    problem.step(&mut backend, &mut state, 0, 1.0);
    assert_eq!(backend.arena().high_water(), planner.footprint().arena);
    assert_eq!(backend.arena().used(), 0);
}

/// The losses of `steps` steps on elements of f32 are those of the reference in f64.
fn assert_follows(problem: &Problem, steps: u64) {
    assert_follows_in(problem, steps, |device| Accelerated::<f32>::new(device, true));
}

fn assert_follows_in(
    problem: &Problem,
    steps: u64,
    backend: impl FnOnce(&Device) -> Result<Accelerated<f32>>,
) {
    let Some((device, _alone)) = device_alone() else { return };
    let (expected, _) = problem.train(&mut Reference::<f64>::new(), steps);
    let (found, _) = problem.train(&mut backend(&device).unwrap(), steps);
    println!("{expected:?}\n{found:?}");
    let (low, high) = expected.iter().fold((f64::MAX, 0.0_f64), |(low, high), &l| (low.min(l), high.max(l)));
    assert!(high - low > 0.1 * low, "there is something to follow");
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found - expected).abs() <= 1e-3 * expected, "{found}, not {expected}");
    }
}

#[test]
fn ten_steps_of_nano_follow_the_reference() {
    assert_follows(&Problem::model("nano", 10, 8, 32, 0.2), 10);
}

/// Factors of 11 bits are off by 2⁻¹¹, each in a direction of its own: the losses stay as near.
#[test]
fn ten_steps_of_nano_in_tf32_follow_the_reference() {
    let problem = Problem::model("nano", 10, 8, 32, 0.2);
    assert_follows_in(&problem, 10, |device| Accelerated::in_tf32(device, true));
}

#[test]
fn four_steps_of_b0_follow_the_reference() {
    let mut problem = Problem::model("b0", 10, 2, 64, 0.0);
    problem.learning_rate = 1e-3;
    assert_follows(&problem, 4);
}

/// Run twice, run as a graph, and with launches that overlap: the same bits, losses and every buffer.
fn assert_repeats<T: FusedElement>(device: &Device) {
    let problem = Problem::model("nano", 10, 4, 32, 0.2);
    let run = |graphs, overlapping| {
        device.set_overlapping(overlapping).unwrap();
        let mut backend = Accelerated::<T>::new(device, graphs).unwrap();
        let result = problem.train(&mut backend, 4);
        assert_eq!(backend.graphs(), usize::from(graphs), "passes recorded");
        result
    };
    let once = run(false, false);
    assert!(once.0.iter().all(|loss| loss.is_finite()));
    let Some(control) = device.host_control() else {
        assert!(once == run(false, false), "a second time");
        assert!(once == run(true, false), "as a graph");
        // Older GPUs cannot.
        if device.set_overlapping(true).is_ok() {
            assert!(once == run(false, true), "overlapping");
            assert!(once == run(true, true), "as a graph, overlapping");
        }
        return;
    };
    // As a graph, overlapping, in another order of blocks and warps, with work that waits as long as it may.
    let switch = |seed, deferred| {
        device.synchronize().unwrap();
        control.shuffle(seed);
        control.defer(deferred);
    };
    switch(77, true);
    let dependents = control.dependents();
    let again = run(true, true);
    let dependents = control.dependents() - dependents;
    switch(1, false);
    assert!(once == again, "as a graph, overlapping, in another order");
    // Launches of a step are the same four times, the last ones of them replayed.
    assert!(dependents > 4 * 50, "{dependents} launches of four steps overlapped");
}

#[test]
fn a_graph_computes_what_its_launches_do() {
    let Some((device, _alone)) = device_alone() else { return };
    assert_repeats::<f32>(&device);
    assert_repeats::<f16>(&device);
    assert_repeats::<bf16>(&device);
}

/// Loss within 2 %, and every gradient whose norm matters at a cosine above `least`.
fn assert_near(problem: &Problem, found: &Numbers, expected: &Numbers, least: f64, what: &str) {
    assert!((found.loss - expected.loss).abs() < 0.02 * expected.loss, "{} {}", found.loss, expected.loss);
    let layout = problem.network.layout();
    let largest = layout.params.iter().map(|e| norm(&expected.grads[e.range.clone()])).fold(0.0, f64::max);
    let mut lowest = (1.0, "none");
    for entry in &layout.params {
        let (a, b) = (&found.grads[entry.range.clone()], &expected.grads[entry.range.clone()]);
        if norm(b) < 1e-3 * largest {
            continue;
        }
        let dot: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
        let cosine = dot / (norm(a) * norm(b));
        if cosine < lowest.0 {
            lowest = (cosine, &entry.name);
        }
    }
    println!("{what}: the lowest cosine is {:.6}, of {}", lowest.0, lowest.1);
    assert!(lowest.0 > least, "{what}: {} has a cosine of {}", lowest.1, lowest.0);
}

#[test]
fn half_precision_is_near_f64() {
    let Some((device, _alone)) = device_alone() else { return };
    let problem = Problem::model("nano", 10, 16, 32, 0.2);
    let expected = problem.gradients(Reference::<f64>::new());
    let found = problem.gradients(Accelerated::<bf16>::new(&device, false).unwrap());
    assert_near(&problem, &found, &expected, 0.99, "bf16");
    let found = problem.gradients(Accelerated::<f16>::new(&device, false).unwrap());
    assert_near(&problem, &found, &expected, 0.99, "f16");
}

/// A step in f16 as a tuning makes it, or the rules.
fn planned(problem: &Problem, tuning: Option<&Arc<Tuning>>) -> Planner {
    let mut planner = Planner::new(Dtype::F16);
    if let Some(tuning) = tuning {
        planner = planner.tuned(Arc::clone(tuning));
    }
    problem.network.rehearse_training(&mut planner, problem.kind(), RULE).unwrap();
    planner
}

/// What a tuning can choose for a launch: of every algorithm and number of columns the first.
fn choices(device: &Device, candidate: &Candidate) -> Vec<Choice> {
    let mut choices = possible(candidate, Dtype::F16).unwrap();
    let mut seen = HashSet::new();
    choices.retain(|choice| {
        (!choice.needs_wgmma() || device.has_wgmma()) && seen.insert((choice.way, choice.columns))
    });
    choices
}

/// How a backward of a pointwise convolution reads its operands with this choice.
fn passes(candidate: &Candidate, choice: Choice) -> Option<Passes> {
    let Convolution { conv, x, input, pass } = candidate.convolution;
    match (conv.kind, pass) {
        (ConvKind::Pointwise, ConvolutionPass::Backward { output: Some(output), .. }) => {
            let work = PointwiseWork::new(x, conv.outputs, Dtype::F16).unwrap();
            Some(work.with(Choices::only(Launch::Backward, choice)).unwrap().passes(input, output))
        }
        _ => None,
    }
}

/// The rules take one pass and windows for larger networks alone, and wgmma for none. Each of these steps has another choice
/// for each launch: as near to f64 as half precision is, and a hundred times nearer to the step by the rules, from which it
/// may differ by the order of sums alone.
#[test]
fn steps_in_every_way_that_a_tuning_can_choose_agree() {
    let Some((device, _alone)) = device_alone() else { return };
    // So many pixels that there are several windows, whatever the input still owes.
    let (images, side) = (4, 38);
    let fused = BlockSpec { expansion: 4, inputs: 8, outputs: 40, ..BLOCK };
    let gated = BlockSpec { kind: BlockKind::MbConv, squeeze: Some(4), inputs: 40, outputs: 40, ..BLOCK };
    let wide = BlockSpec { kernel: 5, stride: 2, expansion: 2, outputs: 24, squeeze: None, ..gated };
    let problem = Problem::new(spec("every way", Padding::Same, &[fused, gated, wide]), images, side, 0.2);
    let exact = problem.gradients(Reference::<f64>::new());
    let by_rule = problem.gradients(Accelerated::<f16>::new(&device, false).unwrap());
    let candidates = candidates(planned(&problem, None).convolutions(), Dtype::F16);
    let launches: Vec<_> = candidates.iter().map(|one| (one, choices(&device, one))).collect();
    let steps = launches.iter().map(|(_, choices)| choices.len()).max().unwrap();
    let (mut orders, mut kernels) = (HashSet::new(), HashSet::new());
    for step in 0..steps {
        let mut tuning = Tuning::of(&device, "test".into()).unwrap();
        for (candidate, choices) in &launches {
            let Some(&choice) = choices.get(step % choices.len().max(1)) else { continue };
            let Convolution { conv, x, .. } = candidate.convolution;
            tuning.add(key(&conv, x, Dtype::F16, candidate.launch), choice, [1.0, 1.0]);
            orders.extend(passes(candidate, choice).map(|passes| (passes, candidate.convolution.input)));
        }
        let tuning = Some(Arc::new(tuning));
        kernels.extend(planned(&problem, tuning.as_ref()).launches().iter().map(|work| work.kernel.clone()));
        let found = problem.gradients(Accelerated::<f16>::new(&device, false).unwrap().tuned(tuning));
        assert!(found.grads != by_rule.grads, "step {step} is that of the rules");
        assert_near(&problem, &found, &exact, 0.99, &format!("step {step} against f64"));
        assert_near(&problem, &found, &by_rule, 0.9999, &format!("step {step} against the rules"));
    }
    for passes in [Passes::One, Passes::Two, Passes::Interleaved] {
        for input in [InputKind::Plain, InputKind::Silu, InputKind::Gated] {
            assert!(orders.contains(&(passes, input)), "{passes:?} of {input:?}");
        }
    }
    let mut expected = vec![
        "conv3x3_fprop_narrow_f16",
        "conv3x3_fprop_tiles32_f16",
        "conv3x3_dgrad_tiles48_f16",
        "depthwise_backward_3x3_s1_f16",
        "depthwise_backward_3x3_s1c5_f16",
        "pointwise_fprop_wide_f16",
        "pointwise_backward_wide_f16",
    ];
    if device.has_wgmma() {
        expected.extend([
            "conv3x3_fprop_wgmma32_f16",
            "conv3x3_dgrad_wgmma48_f16",
            "pointwise_fprop_wgmma64_f16",
            "pointwise_fprop_wgmma128_f16",
            "pointwise_fprop_tma64_f16",
            "pointwise_backward_wgmma64_f16",
        ]);
    }
    for kernel in expected {
        assert!(kernels.contains(kernel), "{kernel} in {kernels:?}");
    }
}

/// A gradient that overflows f16: the step changes nothing but the running statistics, and the norm says so.
#[test]
fn an_overflow_of_f16_skips_the_step() {
    let Some((device, _alone)) = device_alone() else { return };
    let problem = Problem::model("nano", 10, 4, 32, 0.0);
    let mut backend = Accelerated::<f16>::new(&device, false).unwrap();
    problem.prepare(&mut backend);
    let mut state = State::new(&backend, RULE, problem.params.clone(), problem.stats.clone()).unwrap();
    let (loss, norm) = problem.step(&mut backend, &mut state, 0, 2.0_f64.powi(40));
    assert!(loss.is_finite() && !norm.is_finite(), "{loss} {norm}");
    assert_eq!(backend.read(&state.vars.params).unwrap(), problem.params);
    assert_eq!(backend.read(&state.average.params).unwrap(), problem.params);
    let (again, norm) = problem.step(&mut backend, &mut state, 0, 256.0);
    assert_eq!(again, loss, "the same weights");
    assert!(norm.is_finite());
    assert_ne!(backend.read(&state.vars.params).unwrap(), problem.params);
}

/// Logits of inference, with normalisations applied after the convolutions and folded into them.
fn assert_folds<T: FusedElement>(device: &Device, problem: &Problem, tolerance: f64) {
    let mut backend = Accelerated::<T>::new(device, false).unwrap();
    problem.prepare(&mut backend);
    let mut stream = Stream::new(9, 0, 0, Purpose::Init);
    let mut stats = problem.stats.clone();
    for entry in &problem.network.layout().stats {
        let (low, high) = if entry.role == Role::RunningVar { (0.5, 1.5) } else { (-0.3, 0.3) };
        stats[entry.range.clone()].iter_mut().for_each(|s| *s = stream.uniform_in(low, high) as f32);
    }
    let (params, stats) = (backend.buffer(problem.params.clone()).unwrap(), backend.buffer(stats).unwrap());
    let mut vars = Variables { params, grads: backend.zeros(0).unwrap(), stats };
    let load = |backend: &mut Accelerated<T>| {
        let mix = MixPlan::none(problem.count);
        backend.load(&problem.images, problem.side, &Normalisation::HALF, &mix).unwrap()
    };
    let wide = |logits: Vec<f32>| logits.into_iter().map(f64::from).collect::<Vec<_>>();
    let x = load(&mut backend);
    let pass = problem.network.forward(&mut backend, x, &mut vars, Mode::Eval, 0.0).unwrap();
    let unfolded = wide(backend.logits(&pass.head).unwrap());
    drop(pass);
    let infer = |backend: &mut Accelerated<T>, vars: &mut Variables<_>| {
        let x = load(backend);
        let head = problem.network.infer(backend, x, vars).unwrap();
        wide(backend.logits(&head).unwrap())
    };
    let folded = infer(&mut backend, &mut vars);
    let off = distance(&folded, &unfolded, 0.0);
    println!("{} {}: folding moves the logits by {off:.1e}", problem.network.spec().name, T::SUFFIX);
    assert!(off <= tolerance, "{} {}: {off:.2e}", problem.network.spec().name, T::SUFFIX);
    // What is folded follows the weights and the statistics.
    vars.stats = backend.buffer(problem.stats.clone()).unwrap();
    assert!(distance(&infer(&mut backend, &mut vars), &folded, 0.0) > 10.0 * tolerance);
}

#[test]
fn folded_inference_is_unfolded_within_rounding() {
    let Some((device, _alone)) = device_alone() else { return };
    for (name, block) in blocks() {
        let problem = Problem::new(spec(name, Padding::Same, &[block]), 3, 12, 0.0);
        // A few roundings of f32 a layer; of bf16 with 8 significant bits.
        assert_folds::<f32>(&device, &problem, 5e-6);
        assert_folds::<bf16>(&device, &problem, 2e-2);
    }
    assert_folds::<f16>(&device, &Problem::model("nano", 10, 4, 32, 0.0), 4e-3);
}

macro_rules! goldens {
    ($($case:ident: $model:literal, $naming:ident, $evaluated:ident;)*) => {
        mod goldens {
            $(
                #[test]
                fn $case() {
                    let Some((device, _alone)) = super::device_alone() else { return };
                    let backend = super::Accelerated::<f32>::new(&device, false).unwrap();
                    let case = (stringify!($case), $model, super::Naming::$naming);
                    super::golden::check(backend, case, super::golden::Evaluated::$evaluated, 1e-3);
                }
            )*
        }
    };
}

goldens! {
    nano_24: "nano", Timm, Both;
    nano_odd_37: "nano", Timm, Both;
    tf_b0_64: "b0", Timm, Both;
    tf_s_96: "s", Timm, Calibrated;
    torchvision_s_64: "s", Torchvision, Calibrated;
}

/// The error of a type's gradients against PyTorch's in the same type, both measured against f64: the ratio of their mean
/// of 1 − cosine.
fn against_pytorch<T: FusedElement>(device: &Device, case: &golden::Case, exact: &(f64, Vec<f64>)) -> f64 {
    let found = case.gradients(Accelerated::<T>::new(device, false).unwrap());
    let [ours, theirs] = case.reduced(T::SUFFIX, &found, exact);
    println!("{}: ours {ours}; PyTorch's {theirs}", T::SUFFIX);
    assert!(ours.loss < 0.02);
    ours.mean_loss_of_direction() / theirs.mean_loss_of_direction()
}

/// The networks are small and their batches, too: batch norm over a handful of pixels makes rounding matter as it never
/// does in training, to PyTorch as well. How an error falls out is chance, of which one network says little.
#[test]
fn half_precision_is_no_worse_than_pytorchs() {
    let Some((device, _alone)) = device_alone() else { return };
    let cases = [("nano_24", "nano"), ("nano_odd_37", "nano"), ("tf_b0_64", "b0"), ("tf_s_96", "s")];
    let ratios = cases.map(|(name, model)| {
        let case = golden::Case::read((name, model, Naming::Timm));
        let exact = case.gradients(Reference::<f64>::new());
        [against_pytorch::<bf16>(&device, &case, &exact), against_pytorch::<f16>(&device, &case, &exact)]
    });
    println!("{ratios:.2?}");
    for dtype in 0..2 {
        let ratios = ratios.map(|of| of[dtype]);
        assert!(ratios.iter().all(|&ratio| ratio < 1.5), "{ratios:?}");
        assert!(ratios.iter().product::<f64>() <= 1.0, "{ratios:?}");
    }
}

#[test]
fn gpu() {
    again_on_a_gpu("gpu");
}
