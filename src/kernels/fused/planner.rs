//! The fused operations without a device: what they allocate and what they launch.
//!
//! Every operation asks for the blocks that its twin in [`Accelerated`](super::Accelerated) asks for, in the same order,
//! and drops them as the network does; a test holds the two to the same high-water mark.

use super::plans::{Kind, choices};
use crate::backend::{
    self, Backend, Classifier, ConvNorm, DropPath, Gradient, Load, Mode, Normalisation, Raw, SqueezeExcite,
    State, StepKey, Variables,
};
use crate::data::MixPlan;
use crate::device::Layout;
use crate::kernels::batch_norm::{self, BatchNormShape};
use crate::kernels::conv3x3::Conv3x3Shape;
use crate::kernels::depthwise::{BackwardKind, DepthwiseShape};
use crate::kernels::head::HeadShape;
use crate::kernels::input;
use crate::kernels::optimizer::{self, UpdateShape};
use crate::kernels::pointwise::{ClassifierWork, PointwiseWork};
use crate::kernels::squeeze_excite::SqueezeExciteShape;
use crate::kernels::stem::StemShape;
use crate::kernels::tuning::{Choices, Tuning};
use crate::kernels::{GradientKind, InputKind, OutputKind, Work};
use crate::optimizer::{Rule, Scalars};
use crate::tensor::{Conv, ConvKind, Dtype, Shape};
use crate::{Error, Result};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::iter;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

/// What the passes of a rehearsal take on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes of the arena: activations, gradients and what belongs to them.
    pub arena: usize,
    /// Floats of the workspace.
    pub workspace: usize,
    /// Bytes of images on their way, targets, and the working copies of the weights.
    pub feeds: usize,
    /// Bytes of the flat buffers: weights, gradients, statistics, averages, the optimizer's slots.
    pub buffers: usize,
}

impl Footprint {
    /// What is left for the small buffers of plans, and for the driver.
    pub const SPARE: usize = 32 << 20;

    /// All bytes but those of the flat buffers, which are there before a pass is; with [`SPARE`](Self::SPARE).
    pub fn passes(&self) -> usize {
        self.arena + self.workspace * size_of::<f32>() + self.feeds + Self::SPARE
    }
}

/// A block of an arena that there is only in thought.
#[derive(Debug)]
pub struct Span {
    offset: usize,
    layout: Rc<RefCell<Layout>>,
}

impl Drop for Span {
    fn drop(&mut self) {
        self.layout.borrow_mut().pop(self.offset);
    }
}

/// A flat buffer that there is only in thought.
#[derive(Debug)]
pub struct Flat {
    bytes: usize,
    tally: Rc<Cell<Tally>>,
}

/// Bytes of flat buffers.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    now: usize,
    most: usize,
}

impl Flat {
    fn new(length: usize, tally: &Rc<Cell<Tally>>) -> Self {
        let bytes = length * size_of::<f32>();
        let Tally { now, most } = tally.get();
        tally.set(Tally { now: now + bytes, most: most.max(now + bytes) });
        Self { bytes, tally: Rc::clone(tally) }
    }

    fn len(&self) -> usize {
        self.bytes / size_of::<f32>()
    }
}

impl Drop for Flat {
    fn drop(&mut self) {
        let tally = self.tally.get();
        self.tally.set(Tally { now: tally.now - self.bytes, ..tally });
    }
}

/// A tensor.
#[derive(Debug)]
pub struct Activation {
    _span: Span,
    shape: Shape,
}

/// A gate and what made it.
#[derive(Debug)]
pub struct Gate {
    _spans: [Span; 2],
    gate: Rc<Span>,
}

/// What is owed.
#[derive(Debug)]
pub struct Owed {
    _owed: Span,
    arrival: Arrival,
}

#[derive(Debug)]
enum Arrival {
    Alone,
    Factors,
    Gated { _norm: Rc<Span>, _gate: Rc<Span>, _dpool: Span },
}

/// Features, logits and their gradient.
#[derive(Debug)]
pub struct Head {
    _spans: [Span; 2],
    dlogits: Option<Span>,
    shape: HeadShape,
    logits: usize,
}

/// Goes through passes and notes what they take.
#[derive(Debug)]
pub struct Planner {
    dtype: Dtype,
    layout: Rc<RefCell<Layout>>,
    workspace: usize,
    largest_batch: usize,
    targets: usize,
    parameters: usize,
    rule: Option<Rule>,
    images: usize,
    buffers: Rc<Cell<Tally>>,
    /// Where the weights begin that have been folded, and how many they are.
    folded: HashMap<usize, usize>,
    drops: Vec<DropPath>,
    launches: Vec<Work>,
    side: usize,
    begun: Option<(usize, usize)>,
    tuning: Option<Arc<Tuning>>,
    convolutions: Vec<Convolution>,
}

/// A convolution that passes meet, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// The convolution.
    pub conv: Conv,
    /// The shape of its input.
    pub x: Shape,
    /// What the input owes.
    pub input: InputKind,
    /// What is computed of it.
    pub pass: ConvolutionPass,
}

/// What is computed of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvolutionPass {
    /// The output.
    Forward(OutputKind),
    /// The gradients.
    Backward {
        /// Whether the gradient of the output arrives through a gate.
        gated: bool,
        /// What becomes of the gradient of the input; none where that is not needed.
        output: Option<GradientKind>,
    },
}

impl Planner {
    /// For activations of type `dtype`.
    pub fn new(dtype: Dtype) -> Self {
        Self {
            dtype,
            layout: Rc::default(),
            workspace: 1,
            largest_batch: 0,
            targets: 0,
            parameters: 0,
            rule: None,
            images: 0,
            buffers: Rc::default(),
            folded: HashMap::new(),
            drops: Vec::new(),
            launches: Vec::new(),
            side: 0,
            begun: None,
            tuning: None,
            convolutions: Vec::new(),
        }
    }

    /// With launches as `tuning` chooses them.
    pub fn tuned(self, tuning: Arc<Tuning>) -> Self {
        Self { tuning: Some(tuning), ..self }
    }

    /// The convolutions of the passes so far, in order.
    pub fn convolutions(&self) -> &[Convolution] {
        &self.convolutions
    }

    fn choices(&self, conv: &Conv, x: Shape) -> Choices {
        choices(self.tuning.as_deref(), conv, x, self.dtype)
    }

    /// What the passes so far take.
    pub fn footprint(&self) -> Footprint {
        // Two batches wait on the device while a third is computed with; the weights and their average are copied for
        // training and folded for inference.
        let copies =
            if self.dtype.storage() == Dtype::F32 { 0 } else { 2 * self.parameters * self.dtype.bytes() };
        let folded = 2 * self.folded.values().sum::<usize>() * self.dtype.bytes();
        Footprint {
            arena: self.layout.borrow().high_water(),
            workspace: self.workspace,
            feeds: 3 * self.largest_batch + self.targets * size_of::<f32>() + copies + folded,
            buffers: self.buffers.get().most,
        }
    }

    /// The blocks whose branches are dropped, in order.
    pub fn drops(&self) -> &[DropPath] {
        &self.drops
    }

    /// Every launch of the training passes so far, but for [`draw`](Self::draw).
    pub fn launches(&self) -> &[Work] {
        &self.launches
    }

    /// What each step launches before its first pass, if any block's branch is dropped.
    pub fn draw(&self) -> Option<Work> {
        (!self.drops.is_empty()).then(|| batch_norm::factors_work(self.images, self.drops.len()))
    }

    fn push(&self, elements: usize, bytes: usize) -> Span {
        let layout = Rc::clone(&self.layout);
        let offset = layout.borrow_mut().push(elements * bytes);
        Span { offset, layout }
    }

    fn floats(&self, count: usize) -> Span {
        self.push(count, size_of::<f32>())
    }

    fn elements(&self, count: usize) -> Span {
        self.push(count, self.dtype.bytes())
    }

    fn activation(&self, shape: Shape) -> Activation {
        Activation { _span: self.elements(shape.elements()), shape }
    }

    fn launch(&mut self, work: Work) {
        self.launches.push(work);
    }

    fn needs(&mut self, floats: usize) {
        self.workspace = self.workspace.max(floats);
    }

    fn norm_shape(&mut self, shape: Shape) -> Result<BatchNormShape> {
        let norm = BatchNormShape::new(shape, self.dtype)?;
        self.needs(norm.workspace_floats());
        Ok(norm)
    }

    fn squeeze_shape(&mut self, shape: Shape, reduced: usize) -> Result<SqueezeExciteShape> {
        let squeeze = SqueezeExciteShape::new(shape, reduced, self.dtype)?;
        self.needs(squeeze.workspace_floats());
        Ok(squeeze)
    }

    fn fprop(&mut self, layer: &ConvNorm, x: Shape, input: InputKind, output: OutputKind) -> Result<()> {
        let (conv, dtype) = (&layer.conv, self.dtype);
        let pass = ConvolutionPass::Forward(output);
        self.convolutions.push(Convolution { conv: *conv, x, input, pass });
        let choices = self.choices(conv, x);
        let (work, floats) = match Kind::of(conv) {
            Kind::Stem => {
                let shape = StemShape::new(conv, x)?;
                (shape.fprop_work(dtype, false, output), shape.workspace_floats())
            }
            Kind::Dense => {
                let shape = Conv3x3Shape::new(conv, x)?.with(dtype, choices)?;
                (shape.fprop_work(dtype, output), shape.workspace_floats(dtype))
            }
            Kind::Depthwise => {
                let shape = DepthwiseShape::new(conv, x, dtype)?.with(choices)?;
                (shape.fprop_work(input == InputKind::Silu, output), shape.workspace_floats())
            }
            Kind::Pointwise => {
                let shape = PointwiseWork::new(x, conv.outputs, dtype)?.with(choices)?;
                (shape.fprop(input, output), shape.workspace_floats())
            }
        };
        self.needs(floats);
        self.launch(work);
        Ok(())
    }

    fn backward(
        &mut self,
        layer: &ConvNorm,
        x: Shape,
        input: InputKind,
        owed: &Owed,
        output: Option<GradientKind>,
    ) -> Result<()> {
        let (conv, dtype) = (&layer.conv, self.dtype);
        let pass = ConvolutionPass::Backward { gated: matches!(owed.arrival, Arrival::Gated { .. }), output };
        self.convolutions.push(Convolution { conv: *conv, x, input, pass });
        let choices = self.choices(conv, x);
        let (works, floats) = match Kind::of(conv) {
            Kind::Stem => {
                let shape = StemShape::new(conv, x)?;
                let dgrad = output.map(|_| shape.dgrad_work(dtype, false));
                (vec![dgrad, Some(shape.wgrad_work(dtype, false))], shape.workspace_floats())
            }
            Kind::Dense => {
                let shape = Conv3x3Shape::new(conv, x)?.with(dtype, choices)?;
                let skip = matches!(output, Some(GradientKind::Plain { skip: true }));
                let dgrad = output.map(|_| shape.dgrad_work(dtype, skip));
                let wgrad = shape.wgrad_work(dtype).into_iter().map(Some);
                (iter::once(dgrad).chain(wgrad).collect(), shape.workspace_floats(dtype))
            }
            Kind::Depthwise => {
                let shape = DepthwiseShape::new(conv, x, dtype)?.with(choices)?;
                let gated = matches!(owed.arrival, Arrival::Gated { .. });
                let kind = match output {
                    Some(GradientKind::Plain { skip }) => BackwardKind::Plain { skip },
                    _ => BackwardKind::Silu,
                };
                (vec![Some(shape.backward_work(gated, kind))], shape.workspace_floats())
            }
            Kind::Pointwise => {
                let shape = PointwiseWork::new(x, conv.outputs, dtype)?.with(choices)?;
                let work = match output {
                    Some(output) => shape.backward(input, output),
                    None => shape.wgrad(input),
                };
                (vec![Some(work)], shape.workspace_floats())
            }
        };
        self.needs(floats);
        works.into_iter().flatten().for_each(|work| self.launch(work));
        Ok(())
    }
}

fn missing(operation: &'static str) -> Error {
    Error::Shape { operation, problem: "a rehearsal computes nothing that could be read".into() }
}

impl Backend for Planner {
    type Element = f32;
    type Activation = Activation;
    type Buffer = Flat;
    type Norm = Rc<Span>;
    type Gate = Gate;
    type Owed = Owed;
    type Head = Head;
    type Rehearsal = Self;

    fn buffer(&self, values: Vec<f32>) -> Result<Flat> {
        self.zeros(values.len())
    }

    fn zeros(&self, length: usize) -> Result<Flat> {
        Ok(Flat::new(length, &self.buffers))
    }

    fn read(&self, _: &Flat) -> Result<Vec<f32>> {
        Err(missing("read"))
    }

    fn tensor(&self, shape: Shape, _: Vec<f32>) -> Result<Activation> {
        Ok(self.activation(shape))
    }

    fn values(&self, _: &Activation) -> Result<Vec<f32>> {
        Err(missing("values"))
    }

    fn shape(&self, x: &Activation) -> Shape {
        x.shape
    }

    /// The images themselves are of no interest: [`begin_pass`](Backend::begin_pass) says how many there are.
    fn send(&mut self, _: &[u8], side: usize) -> Result<()> {
        self.side = side;
        Ok(())
    }

    fn discard_sent(&mut self) {}

    fn begin_pass(&mut self, _: &Normalisation, mix: &MixPlan) -> Result<()> {
        self.begun = Some((mix.len(), self.side));
        Ok(())
    }

    fn set_targets(&mut self, targets: &[f32]) -> Result<()> {
        self.targets = self.targets.max(targets.len());
        Ok(())
    }

    fn begin_step(&mut self, key: &StepKey) -> Result<()> {
        self.images = key.images.len();
        Ok(())
    }

    fn set_loss_scale(&mut self, _: f64) {}

    fn begin_update(&mut self, rule: Rule, _: &Scalars, parameters: usize, _: &[Range<usize>]) -> Result<()> {
        (self.rule, self.parameters) = (Some(rule), parameters);
        Ok(())
    }

    fn input(&mut self) -> Result<Activation> {
        let (images, side) = self.begun.take().ok_or_else(|| missing("input"))?;
        let shape = Shape::new(images, side, side, 3);
        self.largest_batch = self.largest_batch.max(shape.elements());
        let x = self.activation(shape);
        self.launch(input::forward_work(images, side, self.dtype));
        Ok(x)
    }

    fn conv_norm(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        _: &mut Variables<Self>,
        mode: Mode,
    ) -> Result<Raw<Self>> {
        let (shape, input) = match x {
            Load::Plain(x) => (x.shape, InputKind::Plain),
            Load::Silu(raw) => (raw.y.shape, InputKind::Silu),
            Load::Gated(raw, _) => (raw.y.shape, InputKind::Gated),
        };
        let out = layer.conv.output(shape)?;
        let (y, norm) = (self.activation(out), self.floats(4 * out.c));
        let output = match mode {
            Mode::Train => OutputKind::Moments,
            Mode::Eval => OutputKind::Plain,
        };
        self.fprop(layer, shape, input, output)?;
        Ok(Raw { y, norm: Rc::new(norm) })
    }

    fn squeeze_excite(
        &mut self,
        layer: &SqueezeExcite,
        x: &Raw<Self>,
        _: &mut Variables<Self>,
    ) -> Result<Gate> {
        let Shape { n, c, .. } = x.y.shape;
        let spans = [self.floats(n * c), self.floats(n * layer.reduced)];
        let work = self.squeeze_shape(x.y.shape, layer.reduced)?.forward_work();
        self.launch(work);
        Ok(Gate { _spans: spans, gate: Rc::new(self.floats(n * c)) })
    }

    fn merge(
        &mut self,
        branch: &Raw<Self>,
        act: backend::Activation,
        skip: Option<&Activation>,
        drop: Option<DropPath>,
    ) -> Result<Activation> {
        let shape = branch.y.shape;
        if let Some(drop) = drop.filter(|drop| !self.drops.contains(drop)) {
            self.drops.push(drop);
        }
        let out = self.activation(shape);
        let work = self.norm_shape(shape)?.merge_work(act, skip.is_some(), drop.is_some());
        self.launch(work);
        Ok(out)
    }

    fn infer(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        act: backend::Activation,
        skip: Option<&Activation>,
        vars: &mut Variables<Self>,
    ) -> Result<Activation> {
        if layer.conv.kind == ConvKind::Depthwise {
            let raw = self.conv_norm(layer, x, vars, Mode::Eval)?;
            return self.merge(&raw, act, skip, None);
        }
        let (shape, input) = match x {
            Load::Plain(x) => (x.shape, InputKind::Plain),
            Load::Silu(raw) => (raw.y.shape, InputKind::Silu),
            Load::Gated(raw, _) => (raw.y.shape, InputKind::Gated),
        };
        let y = self.activation(layer.conv.output(shape)?);
        self.folded.insert(layer.weight.start, layer.weight.len());
        self.fprop(layer, shape, input, OutputKind::Folded { skip: skip.is_some() })?;
        Ok(y)
    }

    fn head(&mut self, layer: &Classifier, x: &Raw<Self>, _: f64, _: &mut Variables<Self>) -> Result<Head> {
        let (shape, classes) = (x.y.shape, layer.classes);
        let spans = [self.elements(shape.n * layer.features), self.elements(shape.n * classes)];
        let head = HeadShape::new(shape, classes, self.dtype)?;
        let classifier = ClassifierWork::new(shape.n, layer.features, classes, self.dtype)?;
        self.needs(classifier.workspace_floats());
        self.launch(head.pool_work());
        self.launch(classifier.fprop());
        Ok(Head { _spans: spans, dlogits: None, shape: head, logits: shape.n * classes })
    }

    fn logits(&self, _: &Head) -> Result<Vec<f32>> {
        Err(missing("logits"))
    }

    fn loss_gradient(&mut self, head: &mut Head) -> Result<()> {
        head.dlogits = Some(self.elements(head.logits));
        head.shape.cross_entropy_works().into_iter().for_each(|work| self.launch(work));
        Ok(())
    }

    fn loss(&mut self) -> Result<f64> {
        Err(missing("loss"))
    }

    fn head_backward(
        &mut self,
        layer: &Classifier,
        (_, x): (&ConvNorm, &Raw<Self>),
        head: &Head,
        _: &mut Variables<Self>,
    ) -> Result<(Activation, Owed)> {
        let shape = x.y.shape;
        let (dz, owed) = (self.activation(shape), self.floats(3 * shape.c));
        let _temporary = [self.elements(shape.n * layer.features), self.floats(2 * shape.n * shape.c)];
        let classifier = ClassifierWork::new(shape.n, layer.features, layer.classes, self.dtype)?;
        classifier.backward().into_iter().for_each(|work| self.launch(work));
        self.launch(head.shape.pool_backward_work());
        let work = self.norm_shape(shape)?.owe_work(shape.n);
        self.launch(work);
        Ok((dz, Owed { _owed: owed, arrival: Arrival::Alone }))
    }

    fn merge_backward(
        &mut self,
        (_, branch): (&ConvNorm, &Raw<Self>),
        act: backend::Activation,
        drop: Option<DropPath>,
        _: &Activation,
        _: &mut Variables<Self>,
    ) -> Result<(Option<Activation>, Owed)> {
        let shape = branch.y.shape;
        let owed = self.floats(3 * shape.c);
        let work = self.norm_shape(shape)?.merge_backward_work(act, drop.is_some());
        self.launch(work);
        let (dz, arrival) = match act {
            backend::Activation::Identity if drop.is_some() => (None, Arrival::Factors),
            backend::Activation::Identity => (None, Arrival::Alone),
            backend::Activation::Silu => (Some(self.activation(shape)), Arrival::Alone),
        };
        Ok((dz, Owed { _owed: owed, arrival }))
    }

    fn conv_backward(
        &mut self,
        layer: &ConvNorm,
        x: &Activation,
        grad: Gradient<'_, Self>,
        skip: Option<&Activation>,
        _: &mut Variables<Self>,
    ) -> Result<Activation> {
        let dx = self.activation(x.shape);
        let output = GradientKind::Plain { skip: skip.is_some() };
        self.backward(layer, x.shape, InputKind::Plain, grad.owed, Some(output))?;
        Ok(dx)
    }

    fn conv_backward_weights(
        &mut self,
        layer: &ConvNorm,
        x: &Activation,
        grad: Gradient<'_, Self>,
        _: &mut Variables<Self>,
    ) -> Result<()> {
        self.backward(layer, x.shape, InputKind::Plain, grad.owed, None)
    }

    fn conv_backward_silu(
        &mut self,
        layer: &ConvNorm,
        (_, raw): (&ConvNorm, &Raw<Self>),
        grad: Gradient<'_, Self>,
        _: &mut Variables<Self>,
    ) -> Result<(Activation, Owed)> {
        let shape = raw.y.shape;
        let (dz, owed) = (self.activation(shape), self.floats(3 * shape.c));
        self.backward(layer, shape, InputKind::Silu, grad.owed, Some(GradientKind::Silu))?;
        Ok((dz, Owed { _owed: owed, arrival: Arrival::Alone }))
    }

    fn conv_backward_gated(
        &mut self,
        layer: &ConvNorm,
        (_, raw): (&ConvNorm, &Raw<Self>),
        (squeeze, gate): (&SqueezeExcite, &Gate),
        grad: Gradient<'_, Self>,
        _: &mut Variables<Self>,
    ) -> Result<(Activation, Owed)> {
        let shape = raw.y.shape;
        let (n, c) = (shape.n, shape.c);
        let (dx, owed, dpool) = (self.activation(shape), self.floats(3 * c), self.floats(n * c));
        let _sums = self.floats(5 * n * c);
        self.backward(layer, shape, InputKind::Gated, grad.owed, Some(GradientKind::Gated))?;
        let squeeze = self.squeeze_shape(shape, squeeze.reduced)?;
        squeeze.backward_works().into_iter().for_each(|work| self.launch(work));
        let arrival = Arrival::Gated { _norm: raw.norm.clone(), _gate: gate.gate.clone(), _dpool: dpool };
        Ok((dx, Owed { _owed: owed, arrival }))
    }

    fn clear(&mut self, _: &mut Flat) -> Result<()> {
        Ok(())
    }

    fn norm(&mut self, _: &Flat) -> Result<f64> {
        Err(missing("norm"))
    }

    fn update(&mut self, state: &mut State<Self>) -> Result<()> {
        let rule = self.rule.ok_or_else(|| missing("update"))?;
        let shape = UpdateShape { rule, parameters: self.parameters };
        shape.norm_work().into_iter().for_each(|work| self.launch(work));
        self.launch(shape.update_work(true, self.dtype.storage()));
        self.launch(optimizer::average_work(state.average.stats.len()));
        Ok(())
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        Err(missing("gradient norm"))
    }
}
