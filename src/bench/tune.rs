//! Every way to launch the convolutions of a training step, measured on the device: what a
//! [`Tuning`] chooses from.
//!
//! Each launch is timed as the network makes it, with what its input owes, with the epilogue that it has there, and on
//! buffers of which the last cache holds none when their turn comes. The rounds of all ways alternate. A way can only be
//! chosen if its results are those of the rule within the roundings of the type, and if its median is below the fastest
//! round of the rule.

use super::agreement::{bound, difference, random, values};
use super::noise;
use super::timing::{Effort, Milliseconds, alternate_all};
use crate::backend::VarianceEstimator;
use crate::device::cudarc::driver::CudaSlice;
use crate::device::{Device, Graph};
use crate::kernels::conv3x3::{Conv3x3, Conv3x3Shape};
use crate::kernels::depthwise::{BackwardKind, Depthwise, DepthwiseShape};
use crate::kernels::fused::{Convolution, ConvolutionPass, FusedElement};
use crate::kernels::pointwise::{Passes, Pointwise, PointwiseWork};
use crate::kernels::tuning::{Choice, Choices, Launch, Tuning, key};
use crate::kernels::{
    Arrival, Debt, GradientKind, GradientOutput, GradientView, Input, InputKind, Output, OutputKind,
    Statistics, Work, Workspace,
};
use crate::tensor::{ConvKind, Dtype};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::rc::Rc;

/// A launch that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// As the step has it.
    pub convolution: Convolution,
    /// Which of its launches.
    pub launch: Launch,
    /// How many launches of the step the choice is for.
    pub calls: usize,
}

/// What can be chosen of a step whose convolutions are `convolutions`, in their order.
pub fn candidates(convolutions: &[Convolution], dtype: Dtype) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    for convolution in convolutions {
        let Convolution { conv, x, pass, .. } = convolution;
        // Of the first layer, which reads images, there is one way.
        if conv.inputs == 3 {
            continue;
        }
        let launches: &[Launch] = match (pass, conv.kind) {
            (ConvolutionPass::Forward(_), _) => &[Launch::Fprop],
            (ConvolutionPass::Backward { output: Some(_), .. }, ConvKind::Dense) => {
                &[Launch::Dgrad, Launch::Wgrad]
            }
            (ConvolutionPass::Backward { output: None, .. }, ConvKind::Dense) => &[Launch::Wgrad],
            (ConvolutionPass::Backward { output: None, .. }, _) => &[],
            (ConvolutionPass::Backward { .. }, _) => &[Launch::Backward],
        };
        for &launch in launches {
            let words = key(conv, *x, dtype, launch);
            let same = |one: &&mut Candidate| {
                key(&one.convolution.conv, one.convolution.x, dtype, one.launch) == words
            };
            match found.iter_mut().find(same) {
                Some(one) => one.calls += 1,
                None => found.push(Candidate { convolution: *convolution, launch, calls: 1 }),
            }
        }
    }
    found
}

/// What can be chosen for it, beside the rule.
///
/// # Errors
/// [`Error::Shape`] for a convolution that there are no kernels for.
pub fn possible(candidate: &Candidate, dtype: Dtype) -> Result<Vec<Choice>> {
    let Candidate { convolution: Convolution { conv, x, .. }, launch, .. } = candidate;
    Ok(match conv.kind {
        ConvKind::Dense => Conv3x3Shape::new(conv, *x)?.choices(dtype, *launch),
        ConvKind::Depthwise => DepthwiseShape::new(conv, *x, dtype)?.choices(*launch),
        ConvKind::Pointwise => PointwiseWork::new(*x, conv.outputs, dtype)?.choices(*launch),
    })
}

/// One way to launch it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Way {
    /// The [`Choice`] in words; "rule" for what the rule chooses.
    pub choice: String,
    /// The kernel.
    pub kernel: String,
    /// Its blocks.
    pub blocks: u32,
    /// The time of a launch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Milliseconds>,
    /// Why it was not timed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A launch and all ways.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TuneResult {
    /// "tune".
    pub kind: String,
    /// The launch, by [`key`].
    pub launch: String,
    /// Launches of a step.
    pub calls: usize,
    /// The rule's way first, and then the others, each launch once.
    pub ways: Vec<Way>,
    /// The fastest by its index, if it is faster than the rule's beyond doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<usize>,
}

impl TuneResult {
    /// Milliseconds by the rule and by what was chosen, if anything was.
    pub fn gain(&self) -> Option<[f64; 2]> {
        let time = |way: &Way| Some(way.time?.median);
        Some([time(&self.ways[0])?, time(&self.ways[self.chosen?])?])
    }
}

/// A plan of ours with its choices.
#[derive(Debug)]
enum Plan<T> {
    Dense(Conv3x3<T>),
    Depthwise(Depthwise<T>),
    Pointwise(Pointwise<T>),
}

impl<T: FusedElement> Plan<T> {
    fn new(device: &Device, convolution: &Convolution, dtype: Dtype, choices: Choices) -> Result<Self> {
        let Convolution { conv, x, .. } = convolution;
        Ok(match conv.kind {
            ConvKind::Dense => Self::Dense(Conv3x3::plan_with(device, conv, *x, dtype, choices)?),
            ConvKind::Depthwise => Self::Depthwise(Depthwise::plan_with(device, conv, *x, choices)?),
            ConvKind::Pointwise => {
                Self::Pointwise(Pointwise::plan_with(device, *x, conv.outputs, dtype, choices)?)
            }
        })
    }

    fn workspace_floats(&self) -> usize {
        match self {
            Self::Dense(plan) => plan.workspace_floats(),
            Self::Depthwise(plan) => plan.workspace_floats(),
            Self::Pointwise(plan) => plan.workspace_floats(),
        }
    }

    /// How a backward reads its operands, where one kernel may do so in several orders.
    fn passes(&self, candidate: &Candidate) -> Option<Passes> {
        let Convolution { input, pass, .. } = candidate.convolution;
        match (self, candidate.launch) {
            (Self::Pointwise(plan), Launch::Backward) => Some(plan.work().passes(input, kinds(pass).1)),
            _ => None,
        }
    }

    /// How a depthwise convolution is cut, which may be several ways for as many blocks.
    fn cut(&self, candidate: &Candidate) -> Option<[u32; 2]> {
        match self {
            Self::Depthwise(plan) => Some(plan.shape().cut(candidate.launch)),
            Self::Dense(_) | Self::Pointwise(_) => None,
        }
    }

    fn work(&self, candidate: &Candidate) -> Work {
        let Convolution { input, pass, .. } = candidate.convolution;
        let (output, gradient, gated) = kinds(pass);
        let skip = gradient == GradientKind::Plain { skip: true };
        match (self, candidate.launch) {
            (Self::Dense(plan), Launch::Fprop) => plan.shape().fprop_work(plan.dtype(), output),
            (Self::Dense(plan), Launch::Dgrad) => plan.shape().dgrad_work(plan.dtype(), skip),
            // What adds up its partial results is the same for all.
            (Self::Dense(plan), _) => plan.shape().wgrad_work(plan.dtype()).swap_remove(0),
            (Self::Depthwise(plan), Launch::Fprop) => {
                plan.shape().fprop_work(input == InputKind::Silu, output)
            }
            (Self::Depthwise(plan), _) => {
                let kind = match gradient {
                    GradientKind::Plain { skip } => BackwardKind::Plain { skip },
                    _ => BackwardKind::Silu,
                };
                plan.shape().backward_work(gated, kind)
            }
            (Self::Pointwise(plan), Launch::Fprop) => plan.work().fprop(input, output),
            (Self::Pointwise(plan), _) => plan.work().backward(input, gradient),
        }
    }
}

/// What a pass has of each, and what never occurs in the other.
const fn kinds(pass: ConvolutionPass) -> (OutputKind, GradientKind, bool) {
    match pass {
        ConvolutionPass::Forward(output) => (output, GradientKind::Plain { skip: false }, false),
        ConvolutionPass::Backward { gated, output } => {
            let output = match output {
                Some(output) => output,
                None => GradientKind::Plain { skip: false },
            };
            (OutputKind::Plain, output, gated)
        }
    }
}

/// What belongs to the channels of a raw output.
#[derive(Debug)]
struct Vectors {
    gamma: CudaSlice<f32>,
    beta: CudaSlice<f32>,
    running_mean: CudaSlice<f32>,
    running_var: CudaSlice<f32>,
    norm: CudaSlice<f32>,
    dgamma: CudaSlice<f32>,
    dbeta: CudaSlice<f32>,
    owed: CudaSlice<f32>,
}

impl Vectors {
    fn new(device: &Device, channels: usize, seed: u32) -> Result<Self> {
        // About 1 where values are multiplied, and about 0 where they are added.
        let vector = |count: usize, seed| device.upload(&noise::<f32>(count * channels, seed));
        let near = |about: &[f32], seed| {
            let values = noise::<f32>(about.len() * channels, seed);
            let of = |(i, value): (usize, f32)| about[i / channels] + 0.1 * value;
            device.upload(&values.into_iter().enumerate().map(of).collect::<Vec<_>>())
        };
        Ok(Self {
            gamma: near(&[1.0], seed)?,
            beta: vector(1, seed + 1)?,
            running_mean: device.zeros(channels)?,
            running_var: device.zeros(channels)?,
            norm: near(&[1.0, 0.0, 0.0, 1.0], seed + 2)?,
            dgamma: device.zeros(channels)?,
            dbeta: device.zeros(channels)?,
            owed: near(&[1.0, 0.0, 0.0], seed + 3)?,
        })
    }
}

/// Buffers of a convolution.
#[derive(Debug)]
struct Set<T> {
    x: CudaSlice<T>,
    dx: CudaSlice<T>,
    skip: CudaSlice<T>,
    y: CudaSlice<T>,
    g: CudaSlice<T>,
    weight: CudaSlice<T>,
    dweight: CudaSlice<f32>,
    input: Vectors,
    output: Vectors,
    /// Of the input, and of the output with the gradient that goes with it: \[n, c\].
    gates: [CudaSlice<f32>; 2],
    dpool: CudaSlice<f32>,
    sums: CudaSlice<f32>,
    workspace: Workspace,
}

impl<T: FusedElement> Set<T> {
    fn new(device: &Device, convolution: &Convolution, seed: u32, floats: usize) -> Result<Self> {
        let Convolution { conv, x, .. } = convolution;
        let y = conv.output(*x)?;
        let tensor = |length, seed| random(device, length, seed);
        let floats_of = |length, seed| device.upload(&noise::<f32>(length, seed));
        let seed = 64 * seed;
        Ok(Self {
            x: tensor(x.elements(), seed + 1)?,
            dx: device.zeros(x.elements())?,
            skip: tensor(x.elements(), seed + 2)?,
            y: tensor(y.elements(), seed + 3)?,
            g: tensor(y.elements(), seed + 4)?,
            weight: tensor(conv.weights(), seed + 5)?,
            dweight: device.zeros(conv.weights())?,
            input: Vectors::new(device, x.c, seed + 16)?,
            output: Vectors::new(device, y.c, seed + 32)?,
            gates: [floats_of(x.n * x.c, seed + 6)?, floats_of(y.n * y.c, seed + 7)?],
            dpool: floats_of(y.n * y.c, seed + 8)?,
            sums: device.zeros(5 * x.n * x.c)?,
            workspace: Workspace::new(device, floats)?,
        })
    }

    /// The launch as the step makes it.
    fn run(&mut self, device: &Device, plan: &Plan<T>, candidate: &Candidate) -> Result<()> {
        let stream = device.compute();
        let Convolution { input: input_kind, pass, .. } = candidate.convolution;
        let (output_kind, gradient_kind, gated) = kinds(pass);
        let Self { x, dx, skip, y, g, weight, dweight, input, output, gates, dpool, sums, workspace } = self;
        let (x, weight, norm, gate) =
            (x.as_view(), weight.as_view(), input.norm.as_view(), gates[0].as_view());
        let from = match input_kind {
            InputKind::Plain => Input::Plain(&x),
            InputKind::Silu => Input::Silu { y: &x, norm: &norm },
            InputKind::Gated => Input::Gated { y: &x, norm: &norm, gate: &gate },
        };
        if candidate.launch == Launch::Fprop {
            let (gamma, beta, mut y) = (output.gamma.as_view(), output.beta.as_view(), y.as_view_mut());
            let (mut mean, mut var) = (output.running_mean.as_view_mut(), output.running_var.as_view_mut());
            let mut norm = output.norm.as_view_mut();
            let to = match output_kind {
                OutputKind::Moments => Output::Moments(Statistics {
                    gamma: &gamma,
                    beta: &beta,
                    running_mean: &mut mean,
                    running_var: &mut var,
                    norm: &mut norm,
                    epsilon: 1e-3,
                    momentum: 0.1,
                    variance: VarianceEstimator::Unbiased,
                }),
                OutputKind::Plain | OutputKind::Folded { .. } => Output::Plain,
            };
            return match plan {
                Plan::Dense(plan) => plan.fprop(stream, from, &weight, &mut y, to, workspace),
                Plan::Depthwise(plan) => plan.fprop(stream, from, &weight, &mut y, to, workspace),
                Plan::Pointwise(plan) => plan.fprop(stream, from, &weight, &mut y, to, workspace),
            };
        }
        let (y, g, owed) = (y.as_view(), g.as_view(), output.owed.as_view());
        let (y_norm, y_gate, dpool) = (output.norm.as_view(), gates[1].as_view(), dpool.as_view());
        let arrival = match gated {
            true => Arrival::Gated { norm: &y_norm, gate: &y_gate, dpool: &dpool },
            false => Arrival::Alone,
        };
        let gradient = GradientView { g: &g, y: &y, owed: &owed, arrival };
        let (skip, mut dx, mut dweight) = (skip.as_view(), dx.as_view_mut(), dweight.as_view_mut());
        let (mut dgamma, mut dbeta) = (input.dgamma.as_view_mut(), input.dbeta.as_view_mut());
        let (mut owed, mut sums) = (input.owed.as_view_mut(), sums.as_view_mut());
        let to = match gradient_kind {
            GradientKind::Plain { skip: wanted } => GradientOutput::Plain { skip: wanted.then_some(&skip) },
            GradientKind::Silu => {
                let debt = Debt { norm: &norm, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed };
                GradientOutput::Silu { y: &x, debt }
            }
            GradientKind::Gated => GradientOutput::Gated { y: &x, norm: &norm, sums: &mut sums },
        };
        match (plan, candidate.launch) {
            (Plan::Dense(plan), Launch::Dgrad) => plan.dgrad(stream, gradient, &weight, &mut dx, to),
            (Plan::Dense(plan), _) => plan.wgrad(stream, from, gradient, &mut dweight, workspace),
            (Plan::Depthwise(plan), _) => {
                plan.backward(stream, from, gradient, &weight, &mut dx, &mut dweight, to, workspace)
            }
            (Plan::Pointwise(plan), _) => {
                plan.backward(stream, from, gradient, &weight, &mut dx, &mut dweight, to, workspace)
            }
        }
    }

    /// What the launch has written, after it was done once: tensors, as far as they are compared, and vectors.
    fn results(
        &mut self,
        device: &Device,
        plan: &Plan<T>,
        candidate: &Candidate,
    ) -> Result<Vec<(&'static str, Vec<f32>)>> {
        // What a launch leaves out must show.
        match candidate.launch {
            Launch::Fprop => device.clear(&mut self.y)?,
            Launch::Dgrad | Launch::Wgrad | Launch::Backward => device.clear(&mut self.dx)?,
        }
        device.clear(&mut self.dweight)?;
        self.run(device, plan, candidate)?;
        let wide = |buffer: &CudaSlice<T>| values(device, buffer);
        let weights = || values(device, &self.dweight);
        let (output, gradient, _) = kinds(candidate.convolution.pass);
        let mut results = Vec::new();
        match candidate.launch {
            Launch::Fprop => {
                results.push(("the output", wide(&self.y)?));
                if output == OutputKind::Moments {
                    results.push(("its normalisation", device.read(&self.output.norm)?));
                }
            }
            Launch::Dgrad => results.push(("the gradient of the input", wide(&self.dx)?)),
            Launch::Wgrad => results.push(("the gradient of the weights", weights()?)),
            Launch::Backward => {
                results.push(("the gradient of the input", wide(&self.dx)?));
                results.push(("the gradient of the weights", weights()?));
                match gradient {
                    GradientKind::Plain { .. } => {}
                    GradientKind::Silu => {
                        results.push(("what is owed to the producer", device.read(&self.input.owed)?));
                    }
                    GradientKind::Gated => results.push(("the sums", device.read(&self.sums)?)),
                }
            }
        }
        Ok(results)
    }
}

/// A way on all sets.
#[derive(Debug)]
struct Run<T> {
    device: Device,
    plan: Plan<T>,
    candidate: Candidate,
    sets: Rc<RefCell<Vec<Set<T>>>>,
}

impl<T: FusedElement> Run<T> {
    fn all(&mut self) -> Result<()> {
        let mut sets = self.sets.borrow_mut();
        sets.iter_mut().try_for_each(|set| set.run(&self.device, &self.plan, &self.candidate))
    }
}

/// What is timed: recorded on a GPU, launch by launch on the host device.
enum Timed<T> {
    Graph(Graph<Run<T>>),
    Plain(Run<T>),
}

/// Measures every way of one launch of a step in `dtype`, whose elements are `T`.
///
/// # Errors
/// [`Error::Shape`] if they are not;
/// [`Error::Driver`] where the device has failed: no other figure would be right. A way that cannot be launched says so in
/// its result.
pub fn measure<T: FusedElement>(
    device: &Device,
    candidate: &Candidate,
    dtype: Dtype,
    effort: Effort,
) -> Result<TuneResult> {
    let Candidate { convolution, launch, calls } = *candidate;
    let Convolution { conv, x, .. } = convolution;
    let rule = Plan::<T>::new(device, &convolution, dtype, Choices::default())?;
    let mut plans = vec![(Choice::default(), Ok(rule))];
    let can_run = |choice: &Choice| !choice.needs_wgmma() || device.has_wgmma();
    for choice in possible(candidate, dtype)?.into_iter().filter(can_run) {
        plans.push((choice, Plan::new(device, &convolution, dtype, Choices::only(launch, choice))));
    }
    // Choices that come to the same launch are one way; layouts of other ranks, other cuts and other orders of the same blocks
    // are others, whatever they take.
    let mut seen = Vec::new();
    plans.retain(|(choice, plan)| match plan {
        Err(_) => true,
        Ok(plan) => {
            let Work { kernel, grid, shared, .. } = plan.work(candidate);
            let way = (kernel, grid, shared, choice.rank, plan.passes(candidate), plan.cut(candidate));
            let new = !seen.contains(&way);
            if new {
                seen.push(way);
            }
            new
        }
    });
    let floats = plans.iter().filter_map(|(_, plan)| Some(plan.as_ref().ok()?.workspace_floats())).max();
    let y = conv.output(x)?;
    let bytes = dtype.bytes() * (x.elements() + y.elements());
    let cache = if device.is_host() { 0 } else { device.gpu().cache };
    let count = (3 * cache).div_ceil(bytes).clamp(1, 8);
    let sets = (0..count)
        .map(|i| Set::new(device, &convolution, i as u32, floats.unwrap_or(1)))
        .collect::<Result<Vec<_>>>()?;
    let sets = Rc::new(RefCell::new(sets));
    let terms = (y.pixels()).max(conv.weights() / y.c);
    let bound = bound(dtype, terms);
    let (mut ways, mut timed, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for (choice, plan) in plans {
        let name = choice.to_string();
        let mut way = Way { choice: name, kernel: String::new(), blocks: 0, time: None, error: None };
        let tried = plan.and_then(|plan| {
            let work = plan.work(candidate);
            (way.kernel, way.blocks) = (work.kernel, work.grid[0]);
            let results = sets.borrow_mut()[0].results(device, &plan, candidate)?;
            if expected.is_empty() {
                expected = results;
            } else {
                agree(&results, &expected, bound)?;
            }
            let mut run = Run { device: device.clone(), plan, candidate: *candidate, sets: Rc::clone(&sets) };
            // Whatever is set up on first use cannot be recorded.
            run.all()?;
            match device.is_host() {
                true => Ok(Timed::Plain(run)),
                false => Graph::record(device, run, Run::all).map(Timed::Graph),
            }
        });
        match tried {
            Ok(run) => timed.push((ways.len(), run)),
            // Without it there is nothing to compare with.
            Err(error) if ways.is_empty() => return Err(error),
            Err(error) => {
                device.synchronize()?;
                way.error = Some(error.to_string());
            }
        }
        ways.push(way);
    }
    let rounds = alternate_all(device, effort, timed.len(), |i| match &mut timed[i].1 {
        Timed::Graph(graph) => graph.launch(),
        Timed::Plain(run) => run.all(),
    })?;
    for ((i, _), rounds) in timed.iter().zip(rounds) {
        let seconds: Vec<f64> = rounds.iter().map(|seconds| seconds / count as f64).collect();
        ways[*i].time = Some(Milliseconds::of(&seconds));
    }
    let chosen = choose(&ways);
    let launch = key(&conv, x, dtype, launch);
    Ok(TuneResult { kind: "tune".into(), launch, calls, ways, chosen })
}

/// Refuses results that are not those of the rule.
fn agree(
    found: &[(&'static str, Vec<f32>)],
    expected: &[(&'static str, Vec<f32>)],
    bound: f64,
) -> Result<()> {
    for ((what, found), (_, expected)) in found.iter().zip(expected) {
        let error = difference(found, expected);
        if error > bound {
            let problem =
                format!("{what} differs from that by the rule by {error:.1e}, allowed are {bound:.1e}");
            return Err(Error::Shape { operation: "tuning", problem });
        }
    }
    Ok(())
}

/// The fastest, if its median is below every round of the rule.
fn choose(ways: &[Way]) -> Option<usize> {
    let rule = ways.first()?.time?;
    let median = |i: &usize| ways[*i].time.map_or(f64::INFINITY, |time| time.median);
    let fastest = (1..ways.len()).min_by(|a, b| median(a).total_cmp(&median(b)))?;
    (median(&fastest) < rule.min).then_some(fastest)
}

/// Enters what was chosen into a tuning.
pub fn enter(tuning: &mut Tuning, results: &[TuneResult]) {
    for result in results {
        let (Some(chosen), Some(gain)) = (result.chosen, result.gain()) else { continue };
        if let Ok(choice) = result.ways[chosen].choice.parse() {
            tuning.add(result.launch.clone(), choice, gain);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(median: f64, min: f64) -> Way {
        let time = Some(Milliseconds { median, min, max: 9.0, rounds: 3 });
        Way { choice: "columns=64".into(), kernel: "k".into(), blocks: 1, time, error: None }
    }

    #[test]
    fn only_what_is_faster_beyond_doubt_is_chosen() {
        let failed = Way { time: None, error: Some("no".into()), ..way(0.0, 0.0) };
        assert_eq!(choose(&[way(2.0, 1.9), way(1.8, 1.0), way(1.5, 1.4), failed.clone()]), Some(2));
        assert_eq!(choose(&[way(2.0, 1.9), way(1.95, 1.0)]), None, "within the rounds of the rule");
        assert_eq!(choose(&[way(2.0, 1.9), failed.clone()]), None);
        assert_eq!(choose(&[failed, way(1.0, 1.0)]), None, "the rule must have been measured");
        assert_eq!(choose(&[way(2.0, 1.9)]), None);
    }

    #[test]
    fn results_must_be_those_of_the_rule() {
        let result = |value: f32| vec![("the output", vec![1.0, value])];
        assert!(agree(&result(1.0), &result(1.001), 1e-2).is_ok());
        for wrong in [1.1, f32::NAN, f32::INFINITY] {
            let message = agree(&result(wrong), &result(1.0), 1e-2).unwrap_err().to_string();
            assert!(message.contains("the output differs from that by the rule"), "{message}");
        }
        let nothing = vec![("the output", vec![0.0, 0.0])];
        assert!(agree(&nothing, &nothing, 1e-2).is_err(), "nothing was written");
    }
}
