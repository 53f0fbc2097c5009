//! The network on a device: the fused operations of [`Backend`], each a launch or two.
//!
//! [`Accelerated`] is the twin of [`Reference`](crate::reference::Reference). Activations are blocks of an [`Arena`] in the
//! element type, everything that is summed, kept or learned is f32. A plan is made the first time an operation meets a
//! shape and kept; so is a step's launch sequence, as a CUDA graph. [`Planner`] goes through the same operations without
//! a device: it says how large the arena must be, and what would be launched.

mod buffer;
mod feed;
mod planner;
mod plans;
mod recorder;

pub use buffer::{Buffer, FusedElement};
pub use planner::{Convolution, ConvolutionPass, Footprint, Planner};

use super::RawView;
use super::batch_norm::{Merge, MergeGradient};
use super::head::Dropout;
use super::operand::{Arrival, Debt, GradientOutput, GradientView, Input, Output, Statistics};
use super::optimizer::{Buffers, Optimizer};
use super::squeeze_excite::{self, BackwardInput, Gradients, StateMut, Weights};
use super::tuning::Tuning;
use crate::backend::{
    self, Backend, Classifier, ConvNorm, DropPath, Gradient, Load, Memory, Mode, Normalisation, PassKind,
    Raw, SqueezeExcite, State, StepKey, Variables,
};
use crate::data::MixPlan;
use crate::device::cudarc::driver::{CudaView, CudaViewMut};
use crate::device::{self, Arena, Block, Device, Graph};
use crate::optimizer::{Rule, Scalars};
use crate::tensor::{ConvKind, Dtype, Shape};
use crate::{Error, Result};
use buffer::Fold;
use feed::Feeds;
use plans::{HeadKey, Plans, Scratch};
use recorder::{Known, Recorder};
use std::ops::Range;
use std::sync::Arc;

/// A tensor of a step: a block of the arena.
#[derive(Debug)]
pub struct Activation<T: FusedElement> {
    block: Block<T>,
    shape: Shape,
}

/// A normalisation, \[4, c\]: scale, shift, mean, rstd.
#[derive(Clone, Debug)]
pub struct Norm(Arc<Block<f32>>);

/// The gate of a squeeze-excitation, \[n, c\], and what made it.
#[derive(Debug)]
pub struct Gate {
    pooled: Block<f32>,
    hidden: Block<f32>,
    gate: Arc<Block<f32>>,
}

/// The coefficients of a batch-norm backward, \[3, c\], and how the gradient arrives.
#[derive(Debug)]
pub struct Owed {
    owed: Block<f32>,
    arrival: OwedArrival,
}

#[derive(Debug)]
enum OwedArrival {
    Alone,
    Factors(DropPath),
    Gated { norm: Norm, gate: Arc<Block<f32>>, dpool: Block<f32> },
}

/// Features and logits, and the logits' gradient once the loss is known.
#[derive(Debug)]
pub struct Head<T: FusedElement> {
    features: Block<T>,
    logits: Block<T>,
    dlogits: Option<Block<T>>,
    key: HeadKey,
}

/// Ranges of a buffer in ascending order, as views that can be written at the same time.
macro_rules! parts {
    ($buffer:expr; $($name:ident: $range:expr),+ $(,)?) => {
        let rest = &mut $buffer;
        let end = 0;
        $(
            let range: &Range<usize> = $range;
            let skip = range.start.checked_sub(end).ok_or_else(|| out_of_order(range))?;
            let (_, mut rest) = rest.try_split_at_mut(skip).ok_or_else(|| out_of_order(range))?;
            let (mut $name, mut rest) = rest.try_split_at_mut(range.len()).ok_or_else(|| out_of_order(range))?;
            let end = range.end;
        )+
        let _ = (&mut rest, end);
    };
}

fn out_of_order(range: &Range<usize>) -> Error {
    let problem = format!("{range:?} is not within its buffer and behind the range before it");
    Error::Shape { operation: "flat buffer", problem }
}

/// A device as a backend; `T` is the element type of activations and of what convolutions read.
#[derive(Debug)]
pub struct Accelerated<T: FusedElement> {
    // Before all that it replays: it goes first.
    recorder: Recorder,
    device: Device,
    dtype: Dtype,
    arena: Arena,
    scratch: Scratch,
    plans: Plans<T>,
    feeds: Feeds<T>,
    optimizer: Option<Planned>,
    loss_scale: f64,
    /// The head whose loss was taken last.
    head: Option<HeadKey>,
}

/// The optimizer, what it was planned for, and the scalars of its next update.
#[derive(Debug)]
struct Planned {
    rule: Rule,
    kernels: Vec<Range<usize>>,
    parameters: usize,
    scalars: Scalars,
    plan: Optimizer,
}

/// A device that waits to compute has nothing in the arena; this is what it begins with.
const SMALLEST_ARENA: usize = 1 << 20;

impl Accelerated<f32> {
    /// As [`new`](Self::new), but matrix products are in tf32: see [`Dtype::Tf32`].
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn in_tf32(device: &Device, graphs: bool) -> Result<Self> {
        Self::new_in(device, graphs, Dtype::Tf32)
    }
}

impl<T: FusedElement> Accelerated<T> {
    /// On `device`, with an arena of a megabyte until [`prepare`](Backend::prepare) makes a larger one. Passes of training
    /// are recorded and replayed as CUDA graphs if `graphs` says so; that changes no bit of what is computed.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn new(device: &Device, graphs: bool) -> Result<Self> {
        Self::new_in(device, graphs, T::DTYPE)
    }

    fn new_in(device: &Device, graphs: bool, dtype: Dtype) -> Result<Self> {
        Ok(Self {
            dtype,
            recorder: Recorder::new(graphs),
            arena: Arena::new(device, SMALLEST_ARENA)?,
            scratch: Scratch::new(device)?,
            device: device.clone(),
            plans: Plans::new(dtype),
            feeds: Feeds::default(),
            optimizer: None,
            loss_scale: 1.0,
            head: None,
        })
    }

    /// The same, with launches as a tuning chooses them. Before anything is computed.
    #[must_use]
    pub fn tuned(self, tuning: Option<Arc<Tuning>>) -> Self {
        Self { plans: self.plans.tuned(tuning), ..self }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The arena of its activations.
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    /// Passes that have been recorded and can be replayed.
    pub fn graphs(&self) -> usize {
        self.recorder.graphs()
    }

    fn rehearsed(&self, rehearse: &mut impl FnMut(&mut Planner) -> Result<()>) -> Result<Planner> {
        let mut planner = Planner::new(self.dtype);
        if let Some(tuning) = self.plans.tuning() {
            planner = planner.tuned(Arc::clone(tuning));
        }
        rehearse(&mut planner)?;
        Ok(planner)
    }

    /// Bytes for passes: what is free, and what the arena has.
    fn available(&self) -> Result<usize> {
        Ok(self.device.free_memory()? + self.arena.capacity())
    }

    fn activation(&self, shape: Shape) -> Result<Activation<T>> {
        Ok(Activation { block: self.arena.push(shape.elements())?, shape })
    }

    /// Brings the copy that convolutions read up to date.
    fn refresh(&mut self, params: &mut Buffer<T>) -> Result<()> {
        if params.is_stale() {
            let caster = self.plans.tool(&self.device, params.len())?;
            params.refresh(&self.device, caster)?;
        }
        Ok(())
    }

    /// Where everything lies that a pass on `state` uses.
    fn places(&self, state: &State<Self>) -> Vec<u64> {
        let stream = self.device.compute();
        let State { vars, average, slots } = state;
        let buffers = [&vars.params, &vars.grads, &vars.stats, &average.params, &average.stats];
        let buffers = buffers.into_iter().chain(slots).flat_map(|buffer| buffer.addresses(stream));
        buffers.chain([self.scratch.floats() as u64]).collect()
    }

    /// The gradients of a convolution's input and weights.
    fn backward(
        &mut self,
        layer: &ConvNorm,
        input: Input<'_, '_, T>,
        x: Shape,
        grad: &Gradient<'_, Self>,
        output: GradientOutput<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        dx: &mut Activation<T>,
    ) -> Result<()> {
        let Self { device, scratch, plans, feeds, .. } = self;
        let mut dx = dx.block.view_mut();
        with_gradient(grad, feeds, |gradient| {
            let conv = (&layer.conv, x);
            plans.backward((device, scratch), conv, input, gradient, weight, &mut dx, dweight, output)
        })
    }
}

/// Hands `work` the gradient of a raw output as kernels take it.
fn with_gradient<T: FusedElement>(
    grad: &Gradient<'_, Accelerated<T>>,
    feeds: &Feeds<T>,
    work: impl FnOnce(GradientView<'_, '_, T>) -> Result<()>,
) -> Result<()> {
    let (g, y, owed) = (grad.gradient.block.view(), grad.raw.y.block.view(), grad.owed.owed.view());
    let view = |arrival| GradientView { g: &g, y: &y, owed: &owed, arrival };
    match &grad.owed.arrival {
        OwedArrival::Alone => work(view(Arrival::Alone)),
        OwedArrival::Factors(drop) => {
            let factors = feeds.factors(*drop, grad.gradient.shape.n)?;
            work(view(Arrival::Factors(&factors)))
        }
        OwedArrival::Gated { norm, gate, dpool } => {
            let (norm, gate, dpool) = (norm.0.view(), gate.view(), dpool.view());
            work(view(Arrival::Gated { norm: &norm, gate: &gate, dpool: &dpool }))
        }
    }
}

/// The vectors of a normalisation, apart.
fn vectors<'a>(norm: &CudaView<'a, f32>, channels: usize) -> [CudaView<'a, f32>; 4] {
    [0, 1, 2, 3].map(|row| norm.slice(row * channels..(row + 1) * channels))
}

fn check_shapes(operation: &'static str, found: Shape, expected: Shape) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape { operation, problem: format!("expected a tensor {expected}, found {found}") })
}

/// What a convolution's backward is given fits the input `x`.
fn check_backward<T: FusedElement>(
    layer: &ConvNorm,
    x: Shape,
    grad: &Gradient<'_, Accelerated<T>>,
) -> Result<()> {
    let y = layer.conv.output(x)?;
    check_shapes("convolution backward", grad.gradient.shape, y)?;
    check_shapes("output of a convolution in its backward", grad.raw.y.shape, y)
}

fn wide<T: FusedElement>(values: Vec<T>) -> Vec<f32> {
    values.into_iter().map(T::wide).collect()
}

impl<T: FusedElement> Backend for Accelerated<T> {
    type Element = f32;
    type Activation = Activation<T>;
    type Buffer = Buffer<T>;
    type Norm = Norm;
    type Gate = Gate;
    type Owed = Owed;
    type Head = Head<T>;
    type Rehearsal = Planner;

    fn buffer(&self, values: Vec<f32>) -> Result<Buffer<T>> {
        Buffer::upload(&self.device, &values)
    }

    fn zeros(&self, length: usize) -> Result<Buffer<T>> {
        Buffer::zeros(&self.device, length)
    }

    fn read(&self, buffer: &Buffer<T>) -> Result<Vec<f32>> {
        match &buffer.values {
            Some(values) => self.device.read(values),
            None => Ok(Vec::new()),
        }
    }

    fn tensor(&self, shape: Shape, values: Vec<f32>) -> Result<Activation<T>> {
        if values.len() != shape.elements() {
            let problem = format!("{} values cannot fill {shape}", values.len());
            return Err(Error::Shape { operation: "tensor", problem });
        }
        let mut x = self.activation(shape)?;
        let values: Vec<T> = values.into_iter().map(T::narrow).collect();
        device::write(self.device.compute(), &values, &mut x.block.view_mut())?;
        Ok(x)
    }

    fn values(&self, x: &Activation<T>) -> Result<Vec<f32>> {
        Ok(wide(self.device.read(&x.block.view())?))
    }

    fn shape(&self, x: &Activation<T>) -> Shape {
        x.shape
    }

    fn prepare(&mut self, mut rehearse: impl FnMut(&mut Planner) -> Result<()>) -> Result<()> {
        let planner = self.rehearsed(&mut rehearse)?;
        let mut changed = self.feeds.add_drops(planner.drops());
        let footprint = planner.footprint();
        if footprint.arena > self.arena.capacity() {
            if self.arena.used() > 0 {
                let problem = "an arena that is in use cannot be replaced by a larger one".into();
                return Err(Error::Shape { operation: "device memory", problem });
            }
            let (needed, free) = (footprint.passes(), self.available()?);
            if needed > free {
                let (what, remedy) = ("the pass".into(), "use a smaller batch or smaller images".into());
                return Err(Error::OutOfMemory { what, needed, free, remedy });
            }
            // The old one goes first.
            self.recorder.clear();
            self.arena = Arena::new(&self.device, SMALLEST_ARENA)?;
            self.arena = Arena::new(&self.device, footprint.arena)?;
            changed = true;
        }
        self.scratch.with(&self.device, footprint.workspace)?;
        if changed {
            self.recorder.clear();
        }
        Ok(())
    }

    fn memory(&self, mut rehearse: impl FnMut(&mut Planner) -> Result<()>) -> Result<Option<Memory>> {
        let footprint = self.rehearsed(&mut rehearse)?.footprint();
        let (needed, buffers) = (footprint.passes(), footprint.buffers);
        Ok(Some(Memory { needed, buffers, available: self.available()? }))
    }

    fn send(&mut self, images: &[u8], side: usize) -> Result<()> {
        self.feeds.send(&self.device, images, side)
    }

    fn discard_sent(&mut self) {
        self.feeds.discard_sent();
    }

    fn begin_pass(&mut self, normalisation: &Normalisation, mix: &MixPlan) -> Result<()> {
        self.feeds.begin_pass(&self.device, normalisation, mix)
    }

    fn set_targets(&mut self, targets: &[f32]) -> Result<()> {
        self.feeds.set_targets(&self.device, targets)
    }

    fn begin_step(&mut self, key: &StepKey) -> Result<()> {
        self.feeds.begin_step(&self.device, key, self.loss_scale)
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn set_loss_scale(&mut self, scale: f64) {
        self.loss_scale = scale;
    }

    fn begin_update(
        &mut self,
        rule: Rule,
        scalars: &Scalars,
        parameters: usize,
        kernels: &[Range<usize>],
    ) -> Result<()> {
        let known = self.optimizer.as_ref().is_some_and(|planned| {
            planned.rule == rule && planned.parameters == parameters && planned.kernels == kernels
        });
        if !known {
            self.recorder.clear();
            let plan = Optimizer::plan(&self.device, rule, parameters, kernels)?;
            let kernels = kernels.to_vec();
            self.optimizer = Some(Planned { rule, kernels, parameters, scalars: *scalars, plan });
        }
        let Some(planned) = &mut self.optimizer else { return Err(no_update()) };
        planned.scalars = *scalars;
        planned.plan.begin_step(self.device.compute(), scalars)
    }

    fn perform(
        &mut self,
        kind: PassKind,
        state: &mut State<Self>,
        work: impl FnOnce(&mut Self, &mut State<Self>) -> Result<()>,
    ) -> Result<()> {
        self.refresh(&mut state.vars.params)?;
        // A block that lives longer than the pass would shift the others.
        if !self.recorder.enabled() || self.arena.used() > 0 {
            return work(self, state);
        }
        let places = self.places(state);
        match self.recorder.find(kind, &places) {
            Known::Nothing => {
                work(self, state)?;
                // Plans and memory that the pass brought into being.
                let places = self.places(state);
                self.recorder.keep(kind, places, None, self.head);
            }
            Known::Made => {
                let device = self.device.clone();
                // SAFETY: what a pass uses are the buffers of `state`, which the caller lends whenever the graph is
                // launched, in the same places; and what is in this backend: the arena, which has nothing else in it then,
                // workspace, plans and feeds. These are replaced only together with the recorder's entries, or, the
                // workspace, by one of another size, which is one of the places. Everything runs on one stream.
                let mut graph = unsafe { Graph::record_borrowed(&device, || work(self, state)) }?;
                graph.launch()?;
                self.recorder.keep(kind, places, Some(graph), self.head);
            }
            Known::Recorded(graph, head) => {
                graph.launch()?;
                self.head = head;
                self.feeds.pass_done();
                state.vars.stats.touch();
                if kind.last {
                    state.vars.params.touch_with_copy();
                    state.average.params.touch();
                    state.average.stats.touch();
                }
            }
        }
        Ok(())
    }

    fn input(&mut self) -> Result<Activation<T>> {
        let (images, side) = self.feeds.begun()?;
        let mut x = self.activation(Shape::new(images, side, side, 3))?;
        self.feeds.input(&self.device, &mut x.block.view_mut())?;
        Ok(x)
    }

    fn conv_norm(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        vars: &mut Variables<Self>,
        mode: Mode,
    ) -> Result<Raw<Self>> {
        let shape = match x {
            Load::Plain(x) => x.shape,
            Load::Silu(raw) | Load::Gated(raw, _) => raw.y.shape,
        };
        let out = layer.conv.output(shape)?;
        self.refresh(&mut vars.params)?;
        let mut y = self.activation(out)?;
        let mut norm = self.arena.push::<f32>(4 * out.c)?;
        let Self { device, scratch, plans, .. } = self;
        let Variables { params, stats, .. } = vars;
        let weight = params.working(&layer.weight)?;
        let mut convolve = |output: Output<'_, '_, T>| {
            let (run, conv, mut y) = ((&*device, &mut *scratch), (&layer.conv, shape), y.block.view_mut());
            match x {
                Load::Plain(x) => {
                    plans.fprop(run, conv, Input::Plain(&x.block.view()), &weight, &mut y, output)
                }
                Load::Silu(raw) => {
                    let (x, norm) = (raw.y.block.view(), raw.norm.0.view());
                    plans.fprop(run, conv, Input::Silu { y: &x, norm: &norm }, &weight, &mut y, output)
                }
                Load::Gated(raw, gate) => {
                    let (x, norm, gate) = (raw.y.block.view(), raw.norm.0.view(), gate.gate.view());
                    let input = Input::Gated { y: &x, norm: &norm, gate: &gate };
                    plans.fprop(run, conv, input, &weight, &mut y, output)
                }
            }
        };
        match mode {
            Mode::Train => {
                let (gamma, beta) = (params.part(&layer.gamma)?, params.part(&layer.beta)?);
                let mut stats = stats.all_mut()?;
                parts!(stats; mean: &layer.running_mean, var: &layer.running_var);
                convolve(Output::Moments(Statistics {
                    gamma: &gamma,
                    beta: &beta,
                    running_mean: &mut mean,
                    running_var: &mut var,
                    norm: &mut norm.view_mut(),
                    epsilon: layer.epsilon,
                    momentum: layer.momentum,
                    variance: layer.variance,
                }))?;
            }
            Mode::Eval => {
                convolve(Output::Plain)?;
                let plan = plans.evaluation(device, layer, params.len(), stats.len())?;
                plan.evaluate(device.compute(), &params.all()?, &stats.all()?, &mut norm.view_mut())?;
            }
        }
        Ok(Raw { y, norm: Norm(Arc::new(norm)) })
    }

    fn squeeze_excite(
        &mut self,
        layer: &SqueezeExcite,
        x: &Raw<Self>,
        vars: &mut Variables<Self>,
    ) -> Result<Gate> {
        let shape = x.y.shape;
        check_shapes("squeeze-excitation", shape, shape.with_channels(layer.channels))?;
        self.refresh(&mut vars.params)?;
        let (n, c) = (shape.n, shape.c);
        let (mut pooled, mut hidden) = (self.arena.push(n * c)?, self.arena.push(n * layer.reduced)?);
        let mut gate = self.arena.push(n * c)?;
        let Self { device, scratch, plans, .. } = self;
        let plan = plans.squeeze(device, shape, layer.reduced)?;
        let workspace = scratch.with(device, plan.workspace_floats())?;
        let norm = x.norm.0.view();
        let (y, [scale, shift, mean, rstd]) = (x.y.block.view(), vectors(&norm, c));
        let raw = RawView { y: &y, scale: &scale, shift: &shift, mean: &mean, rstd: &rstd };
        let params = &vars.params;
        let (reduce, expand) = (params.working(&layer.reduce_weight)?, params.working(&layer.expand_weight)?);
        let (reduce_bias, expand_bias) = (params.part(&layer.reduce_bias)?, params.part(&layer.expand_bias)?);
        let weights = Weights {
            reduce: &reduce,
            reduce_bias: &reduce_bias,
            expand: &expand,
            expand_bias: &expand_bias,
        };
        let made = StateMut {
            pooled: &mut pooled.view_mut(),
            hidden: &mut hidden.view_mut(),
            gate: &mut gate.view_mut(),
        };
        plan.forward(device.compute(), raw, weights, made, workspace)?;
        Ok(Gate { pooled, hidden, gate: Arc::new(gate) })
    }

    fn merge(
        &mut self,
        branch: &Raw<Self>,
        act: backend::Activation,
        skip: Option<&Activation<T>>,
        drop: Option<DropPath>,
    ) -> Result<Activation<T>> {
        let shape = branch.y.shape;
        if let Some(skip) = skip {
            check_shapes("skip connection", skip.shape, shape)?;
        }
        let mut out = self.activation(shape)?;
        let factors = drop.map(|drop| self.feeds.factors(drop, shape.n)).transpose()?;
        let (y, norm, skip) = (branch.y.block.view(), branch.norm.0.view(), skip.map(|s| s.block.view()));
        let merge = Merge { y: &y, norm: &norm, act, skip: skip.as_ref(), factors: factors.as_ref() };
        let plan = self.plans.norm(&self.device, shape)?;
        plan.merge(self.device.compute(), merge, &mut out.block.view_mut())?;
        Ok(out)
    }

    fn infer(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        act: backend::Activation,
        skip: Option<&Activation<T>>,
        vars: &mut Variables<Self>,
    ) -> Result<Activation<T>> {
        if layer.conv.kind == ConvKind::Depthwise {
            let raw = self.conv_norm(layer, x, vars, Mode::Eval)?;
            return self.merge(&raw, act, skip, None);
        }
        let shape = match x {
            Load::Plain(x) => x.shape,
            Load::Silu(raw) | Load::Gated(raw, _) => raw.y.shape,
        };
        let out = layer.conv.output(shape)?;
        if let Some(skip) = skip {
            check_shapes("skip connection", skip.shape, out)?;
        }
        let mut y = self.activation(out)?;
        let Self { device, scratch, plans, .. } = self;
        let Variables { params, stats, .. } = vars;
        let fold = params.folded(layer.weight.start, stats, |params| {
            let stream = device.compute();
            let (mut weights, mut norm) = (device.zeros(layer.weight.len())?, device.zeros(4 * out.c)?);
            let plan = plans.evaluation(device, layer, params.len(), stats.len())?;
            plan.evaluate(stream, &params.all()?, &stats.all()?, &mut norm.as_view_mut())?;
            let masters = params.part(&layer.weight)?;
            let plan = plans.fold(device, layer.weight.len(), out.c)?;
            plan.fold(stream, &masters, &norm.slice(..out.c), &mut weights.as_view_mut())?;
            Ok(Fold { weights, norm })
        })?;
        let (weight, bias) = (fold.weights.as_view(), fold.norm.slice(out.c..2 * out.c));
        let skip = skip.map(|skip| skip.block.view());
        let output = Output::Folded { bias: &bias, act, skip: skip.as_ref() };
        let (run, conv, mut y_view) = ((&*device, scratch), (&layer.conv, shape), y.block.view_mut());
        match x {
            Load::Plain(x) => {
                plans.fprop(run, conv, Input::Plain(&x.block.view()), &weight, &mut y_view, output)?;
            }
            Load::Silu(raw) => {
                let (x, norm) = (raw.y.block.view(), raw.norm.0.view());
                plans.fprop(run, conv, Input::Silu { y: &x, norm: &norm }, &weight, &mut y_view, output)?;
            }
            Load::Gated(raw, gate) => {
                let (x, norm, gate) = (raw.y.block.view(), raw.norm.0.view(), gate.gate.view());
                let input = Input::Gated { y: &x, norm: &norm, gate: &gate };
                plans.fprop(run, conv, input, &weight, &mut y_view, output)?;
            }
        }
        Ok(y)
    }

    fn head(
        &mut self,
        layer: &Classifier,
        x: &Raw<Self>,
        dropout: f64,
        vars: &mut Variables<Self>,
    ) -> Result<Head<T>> {
        let shape = x.y.shape;
        check_shapes("classifier", shape, shape.with_channels(layer.features))?;
        self.refresh(&mut vars.params)?;
        let (n, features, classes) = (shape.n, layer.features, layer.classes);
        let mut head = Head {
            features: self.arena.push(n * features)?,
            logits: self.arena.push(n * classes)?,
            dlogits: None,
            key: (shape, classes, dropout.to_bits()),
        };
        let Self { device, plans, feeds, .. } = self;
        let (stream, norm) = (device.compute(), x.norm.0.view());
        let (y, [scale, shift, mean, rstd]) = (x.y.block.view(), vectors(&norm, shape.c));
        let raw = RawView { y: &y, scale: &scale, shift: &shift, mean: &mean, rstd: &rstd };
        let dropout = if dropout > 0.0 { Dropout::On(feeds.scalars(device, n)?) } else { Dropout::Off };
        plans.head(device, head.key)?.pool(stream, raw, dropout, &mut head.features.view_mut())?;
        let (weight, bias) = (vars.params.working(&layer.weight)?, vars.params.part(&layer.bias)?);
        let plan = plans.classifier(device, n, features, classes)?;
        plan.fprop(stream, &head.features.view(), &weight, &bias, &mut head.logits.view_mut())?;
        Ok(head)
    }

    fn logits(&self, head: &Head<T>) -> Result<Vec<f32>> {
        Ok(wide(self.device.read(&head.logits.view())?))
    }

    fn loss_gradient(&mut self, head: &mut Head<T>) -> Result<()> {
        let count = head.logits.len();
        let mut dlogits = self.arena.push(count)?;
        let Self { device, plans, feeds, .. } = self;
        let (scalars, targets) = feeds.scalars_and_targets(device, head.key.0.n, count)?;
        let plan = plans.head(device, head.key)?;
        let logits = head.logits.view();
        plan.cross_entropy(device.compute(), scalars, &logits, &targets, &mut dlogits.view_mut())?;
        (head.dlogits, self.head) = (Some(dlogits), Some(head.key));
        Ok(())
    }

    fn loss(&mut self) -> Result<f64> {
        let head = self.head.as_ref().and_then(|key| self.plans.existing_head(key));
        let head =
            head.ok_or_else(|| Error::Shape { operation: "loss", problem: "no loss has been taken".into() })?;
        Ok(head.read_loss(self.device.compute())?.into())
    }

    fn head_backward(
        &mut self,
        layer: &Classifier,
        (producer, x): (&ConvNorm, &Raw<Self>),
        head: &Head<T>,
        vars: &mut Variables<Self>,
    ) -> Result<(Activation<T>, Owed)> {
        let Some(dlogits) = &head.dlogits else {
            let problem = "the loss comes before its gradient".into();
            return Err(Error::Shape { operation: "head backward", problem });
        };
        let shape = x.y.shape;
        let (n, features, classes) = (shape.n, layer.features, layer.classes);
        check_shapes("classifier backward", shape, shape.with_channels(features))?;
        let (mut dz, mut owed) = (self.activation(shape)?, self.arena.push(3 * shape.c)?);
        let mut dfeatures = self.arena.push(n * features)?;
        let mut sums = self.arena.push(2 * n * shape.c)?;
        let Self { device, scratch, plans, feeds, .. } = self;
        let stream = device.compute();
        let Variables { params, grads, .. } = vars;
        let mut grads = grads.all_mut()?;
        {
            let weight = params.working(&layer.weight)?;
            let plan = plans.classifier(device, n, features, classes)?;
            let workspace = scratch.with(device, plan.workspace_floats())?;
            let (inputs, dlogits) = (head.features.view(), dlogits.view());
            parts!(grads; dweight: &layer.weight, dbias: &layer.bias);
            let mut dfeatures = dfeatures.view_mut();
            plan.backward(
                stream,
                &inputs,
                &dlogits,
                &weight,
                &mut dfeatures,
                &mut dweight,
                &mut dbias,
                workspace,
            )?;
        }
        let norm = x.norm.0.view();
        let (y, [scale, shift, mean, rstd]) = (x.y.block.view(), vectors(&norm, shape.c));
        let raw = RawView { y: &y, scale: &scale, shift: &shift, mean: &mean, rstd: &rstd };
        let (_, _, rate) = head.key;
        let dropout =
            if f64::from_bits(rate) > 0.0 { Dropout::On(feeds.scalars(device, n)?) } else { Dropout::Off };
        let (mut dz_view, mut sums_view) = (dz.block.view_mut(), sums.view_mut());
        plans.head(device, head.key)?.pool_backward(
            stream,
            &dfeatures.view(),
            raw,
            dropout,
            &mut dz_view,
            &mut sums_view,
        )?;
        parts!(grads; dgamma: &producer.gamma, dbeta: &producer.beta);
        let mut owed_view = owed.view_mut();
        let debt = Debt { norm: &norm, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed_view };
        plans.norm(device, shape)?.owe(stream, &sums.view(), n, debt)?;
        Ok((dz, Owed { owed, arrival: OwedArrival::Alone }))
    }

    fn merge_backward(
        &mut self,
        (layer, branch): (&ConvNorm, &Raw<Self>),
        act: backend::Activation,
        drop: Option<DropPath>,
        grad: &Activation<T>,
        vars: &mut Variables<Self>,
    ) -> Result<(Option<Activation<T>>, Owed)> {
        let shape = branch.y.shape;
        check_shapes("gradient of a block", grad.shape, shape)?;
        let mut owed = self.arena.push(3 * shape.c)?;
        let mut dz = match act {
            backend::Activation::Identity => None,
            backend::Activation::Silu => Some(self.activation(shape)?),
        };
        let Self { device, scratch, plans, feeds, .. } = self;
        let stream = device.compute();
        let factors = drop.map(|drop| feeds.factors(drop, shape.n)).transpose()?;
        let (g, y, norm) = (grad.block.view(), branch.y.block.view(), branch.norm.0.view());
        let gradient = MergeGradient { g: &g, y: &y, factors: factors.as_ref() };
        let mut grads = vars.grads.all_mut()?;
        parts!(grads; dgamma: &layer.gamma, dbeta: &layer.beta);
        let mut owed_view = owed.view_mut();
        let debt = Debt { norm: &norm, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed_view };
        let plan = plans.norm(device, shape)?;
        let workspace = scratch.with(device, plan.workspace_floats())?;
        let arrival = match &mut dz {
            None => {
                plan.merge_backward_identity(stream, gradient, debt, workspace)?;
                drop.map_or(OwedArrival::Alone, OwedArrival::Factors)
            }
            Some(dz) => {
                plan.merge_backward_silu(stream, gradient, &mut dz.block.view_mut(), debt, workspace)?;
                OwedArrival::Alone
            }
        };
        Ok((dz, Owed { owed, arrival }))
    }

    fn conv_backward(
        &mut self,
        layer: &ConvNorm,
        x: &Activation<T>,
        grad: Gradient<'_, Self>,
        skip: Option<&Activation<T>>,
        vars: &mut Variables<Self>,
    ) -> Result<Activation<T>> {
        check_backward(layer, x.shape, &grad)?;
        if let Some(skip) = skip {
            check_shapes("skip connection backward", skip.shape, x.shape)?;
        }
        let mut dx = self.activation(x.shape)?;
        let Variables { params, grads, .. } = vars;
        let weight = params.working(&layer.weight)?;
        let mut grads = grads.all_mut()?;
        parts!(grads; dweight: &layer.weight);
        let (input, skip) = (x.block.view(), skip.map(|skip| skip.block.view()));
        let (input, output) = (Input::Plain(&input), GradientOutput::Plain { skip: skip.as_ref() });
        self.backward(layer, input, x.shape, &grad, output, &weight, &mut dweight, &mut dx)?;
        Ok(dx)
    }

    fn conv_backward_weights(
        &mut self,
        layer: &ConvNorm,
        x: &Activation<T>,
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<()> {
        check_backward(layer, x.shape, &grad)?;
        let Self { device, scratch, plans, feeds, .. } = self;
        let mut grads = vars.grads.all_mut()?;
        parts!(grads; dweight: &layer.weight);
        let input = x.block.view();
        with_gradient(&grad, feeds, |gradient| {
            let conv = (&layer.conv, x.shape);
            plans.weight_gradient((device, scratch), conv, Input::Plain(&input), gradient, &mut dweight)
        })
    }

    fn conv_backward_silu(
        &mut self,
        layer: &ConvNorm,
        (producer, raw): (&ConvNorm, &Raw<Self>),
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<(Activation<T>, Owed)> {
        let shape = raw.y.shape;
        check_backward(layer, shape, &grad)?;
        let (mut dz, mut owed) = (self.activation(shape)?, self.arena.push(3 * shape.c)?);
        let Variables { params, grads, .. } = vars;
        let weight = params.working(&layer.weight)?;
        let mut grads = grads.all_mut()?;
        parts!(grads; dgamma: &producer.gamma, dbeta: &producer.beta, dweight: &layer.weight);
        let (y, norm, mut owed_view) = (raw.y.block.view(), raw.norm.0.view(), owed.view_mut());
        let debt = Debt { norm: &norm, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed_view };
        let (input, output) = (Input::Silu { y: &y, norm: &norm }, GradientOutput::Silu { y: &y, debt });
        self.backward(layer, input, shape, &grad, output, &weight, &mut dweight, &mut dz)?;
        Ok((dz, Owed { owed, arrival: OwedArrival::Alone }))
    }

    fn conv_backward_gated(
        &mut self,
        layer: &ConvNorm,
        (producer, raw): (&ConvNorm, &Raw<Self>),
        (squeeze, gate): (&SqueezeExcite, &Gate),
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<(Activation<T>, Owed)> {
        let shape = raw.y.shape;
        let (n, c) = (shape.n, shape.c);
        check_backward(layer, shape, &grad)?;
        check_shapes("squeeze-excitation backward", shape, shape.with_channels(squeeze.channels))?;
        let (mut dx, mut owed) = (self.activation(shape)?, self.arena.push(3 * c)?);
        let mut dpool = self.arena.push(n * c)?;
        let mut sums = self.arena.push(5 * n * c)?;
        let Variables { params, grads, .. } = vars;
        let mut grads = grads.all_mut()?;
        let (y, norm, factors) = (raw.y.block.view(), raw.norm.0.view(), gate.gate.view());
        {
            let weight = params.working(&layer.weight)?;
            parts!(grads; dweight: &layer.weight);
            let input = Input::Gated { y: &y, norm: &norm, gate: &factors };
            let mut sums = sums.view_mut();
            let output = GradientOutput::Gated { y: &y, norm: &norm, sums: &mut sums };
            self.backward(layer, input, shape, &grad, output, &weight, &mut dweight, &mut dx)?;
        }
        let Self { device, scratch, plans, .. } = self;
        let (reduce, expand) =
            (params.working(&squeeze.reduce_weight)?, params.working(&squeeze.expand_weight)?);
        let (reduce_bias, expand_bias) =
            (params.part(&squeeze.reduce_bias)?, params.part(&squeeze.expand_bias)?);
        let weights = Weights {
            reduce: &reduce,
            reduce_bias: &reduce_bias,
            expand: &expand,
            expand_bias: &expand_bias,
        };
        parts!(
            grads;
            dgamma: &producer.gamma,
            dbeta: &producer.beta,
            dreduce: &squeeze.reduce_weight,
            dreduce_bias: &squeeze.reduce_bias,
            dexpand: &squeeze.expand_weight,
            dexpand_bias: &squeeze.expand_bias,
        );
        let gradients = Gradients {
            reduce: &mut dreduce,
            reduce_bias: &mut dreduce_bias,
            expand: &mut dexpand,
            expand_bias: &mut dexpand_bias,
        };
        let mut owed_view = owed.view_mut();
        let debt = Debt { norm: &norm, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed_view };
        let (sums, pooled, hidden) = (sums.view(), gate.pooled.view(), gate.hidden.view());
        let made = squeeze_excite::State { pooled: &pooled, hidden: &hidden, gate: &factors };
        let plan = plans.squeeze(device, shape, squeeze.reduced)?;
        let workspace = scratch.with(device, plan.workspace_floats())?;
        let input = BackwardInput { sums: &sums, state: made, weights };
        plan.backward(device.compute(), input, gradients, &mut dpool.view_mut(), debt, workspace)?;
        let arrival = OwedArrival::Gated { norm: raw.norm.clone(), gate: gate.gate.clone(), dpool };
        Ok((dx, Owed { owed, arrival }))
    }

    fn clear(&mut self, buffer: &mut Buffer<T>) -> Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        self.device.clear(&mut buffer.all_mut()?)
    }

    fn norm(&mut self, buffer: &Buffer<T>) -> Result<f64> {
        if buffer.is_empty() {
            return Ok(0.0);
        }
        let tool = self.plans.tool(&self.device, buffer.len())?;
        tool.norm(self.device.compute(), &buffer.all()?)?;
        tool.read_norm(self.device.compute())
    }

    fn update(&mut self, state: &mut State<Self>) -> Result<()> {
        let Some(Planned { plan, .. }) = &mut self.optimizer else { return Err(no_update()) };
        let stream = self.device.compute();
        let State { vars, average, slots } = state;
        let gradients = vars.grads.all()?;
        plan.norm_and_clip(stream, &gradients)?;
        let (mut parameters, mut copy) = vars.params.masters_and_copy()?;
        let mut slots = slots.iter_mut().map(Buffer::all_mut).collect::<Result<Vec<_>>>()?;
        let mut averaged = average.params.all_mut()?;
        plan.update(
            stream,
            Buffers {
                parameters: &mut parameters,
                gradients: &gradients,
                slots: &mut slots,
                average: Some(&mut averaged),
                copy: T::working_copy(copy.as_mut()),
            },
        )?;
        plan.update_average(stream, &mut average.stats.all_mut()?, &vars.stats.all()?)
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        let Some(Planned { plan, scalars, .. }) = &self.optimizer else { return Err(no_update()) };
        Ok(plan.read_norm(self.device.compute())? / scalars.loss_scale)
    }
}

fn no_update() -> Error {
    Error::Shape { operation: "update", problem: "no update was begun".into() }
}
