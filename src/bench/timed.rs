//! A backend that does what another does and times every operation, so that a training step shows where its time goes:
//! each operation on the shapes, and with the caches as cold, as the step has them.

use super::timing::Clock;
use crate::backend::{
    Activation, Backend, Classifier, ConvNorm, DropPath, Gradient, Load, Memory, Mode, Normalisation, Raw,
    SqueezeExcite, State, StepKey, Variables,
};
use crate::data::MixPlan;
use crate::optimizer::{Rule, Scalars};
use crate::tensor::{ConvKind, Dtype, Shape};
use crate::{Error, Result};
use std::fmt::{self, Debug, Formatter};
use std::ops::Range;
use std::rc::Rc;

/// One operation on one shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) operation: &'static str,
    /// The layer in words.
    pub(super) layer: String,
    /// What it reads first.
    pub(super) input: Shape,
    /// Multiply-adds times two.
    pub(super) operations: u64,
}

/// A tensor of the backend within, on its own or as part of a raw output.
pub(super) enum Held<B: Backend> {
    Own(B::Activation),
    OfRaw(Rc<Raw<B>>),
}

impl<B: Backend> Held<B> {
    fn get(&self) -> &B::Activation {
        match self {
            Self::Own(x) => x,
            Self::OfRaw(raw) => &raw.y,
        }
    }
}

impl<B: Backend> Debug for Held<B> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// A buffer of the backend within; that one's [`State`] is one value, so it is kept in [`Timed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Params,
    Grads,
    Stats,
    /// Of the averages or the optimizer, which only the update knows.
    Other,
}

/// Times every operation of the backend within.
#[derive(Debug)]
pub(super) struct Timed<'a, B: Backend, C: Clock> {
    inner: &'a mut B,
    clock: &'a C,
    state: State<B>,
    calls: Vec<(Call, C::Mark, C::Mark)>,
}

impl<'a, B: Backend, C: Clock> Timed<'a, B, C> {
    /// Around `inner`, whose state is `state`; gives also the names of what is in there.
    pub(super) fn new(inner: &'a mut B, clock: &'a C, state: State<B>) -> (Self, State<Self>) {
        let variables = |params, grads, stats| Variables { params, grads, stats };
        let names = State {
            vars: variables(Name::Params, Name::Grads, Name::Stats),
            average: variables(Name::Other, Name::Other, Name::Other),
            slots: vec![Name::Other; state.slots.len()],
        };
        (Self { inner, clock, state, calls: Vec::new() }, names)
    }

    /// The calls since the last time, in order, with their seconds.
    pub(super) fn take(&mut self) -> Result<Vec<(Call, f64)>> {
        let clock = self.clock;
        let timed = |(call, from, to)| Ok((call, clock.seconds(&from, &to)?));
        self.calls.drain(..).map(timed).collect()
    }

    fn buffer_of(&self, name: Name) -> Result<&B::Buffer> {
        match name {
            Name::Params => Ok(&self.state.vars.params),
            Name::Grads => Ok(&self.state.vars.grads),
            Name::Stats => Ok(&self.state.vars.stats),
            Name::Other => Err(unknown()),
        }
    }

    fn time<T>(&mut self, call: Call, work: impl FnOnce(&mut B, &mut State<B>) -> Result<T>) -> Result<T> {
        let from = self.clock.mark()?;
        let done = work(self.inner, &mut self.state)?;
        self.calls.push((call, from, self.clock.mark()?));
        Ok(done)
    }

    /// A call that has to do with a convolution; `passes` is how often its multiply-adds are done.
    fn convolution(
        &self,
        operation: &'static str,
        layer: &ConvNorm,
        x: Shape,
        reads: &str,
        passes: u64,
    ) -> Call {
        let conv = &layer.conv;
        let kind = match conv.kind {
            ConvKind::Dense => "dense",
            ConvKind::Depthwise => "depthwise",
            ConvKind::Pointwise => "pointwise",
        };
        let (k, stride) = (conv.kernel, conv.stride);
        let stride = if stride == 1 { String::new() } else { format!(" /{stride}") };
        let layer_words = format!("{kind} {k}×{k} {}→{}{stride}{reads}", conv.inputs, conv.outputs);
        let pixels = conv.output_side(x.h) * conv.output_side(x.w) * x.n;
        let operations = passes * 2 * (layer.weight.len() * pixels) as u64;
        Call { operation, layer: layer_words, input: x, operations }
    }

    fn on(&self, operation: &'static str, x: &Held<B>, layer: String) -> Call {
        Call { operation, layer, input: self.inner.shape(x.get()), operations: 0 }
    }

    /// A call on flat buffers.
    fn flat(operation: &'static str) -> Call {
        Call { operation, layer: "all".into(), input: Shape::new(1, 1, 1, 1), operations: 0 }
    }
}

fn unknown() -> Error {
    let problem = "only weights, gradients and statistics are known to a timed backend".into();
    Error::Shape { operation: "timed buffer", problem }
}

fn raw<'b, B: Backend, C: Clock>(raw: &'b Raw<Timed<'_, B, C>>) -> &'b Raw<B> {
    &raw.norm
}

fn wrap<'a, B: Backend, C: Clock>(raw: Raw<B>) -> Raw<Timed<'a, B, C>> {
    let raw = Rc::new(raw);
    Raw { y: Held::OfRaw(raw.clone()), norm: raw }
}

fn gradient<'b, B: Backend, C: Clock>(grad: &Gradient<'b, Timed<'_, B, C>>) -> Gradient<'b, B> {
    Gradient { gradient: grad.gradient.get(), raw: &grad.raw.norm, owed: grad.owed }
}

fn words(act: Activation, skip: bool, drop: Option<DropPath>) -> String {
    let mut text = String::from(if act == Activation::Silu { "silu" } else { "norm" });
    if skip {
        text.push_str(", skip");
    }
    if drop.is_some() {
        text.push_str(", drop path");
    }
    text
}

fn squeeze(layer: &SqueezeExcite) -> String {
    format!("{}→{}→{}", layer.channels, layer.reduced, layer.channels)
}

fn dense(layer: &Classifier) -> String {
    format!("{}→{}", layer.features, layer.classes)
}

impl<B: Backend, C: Clock> Backend for Timed<'_, B, C> {
    type Element = B::Element;
    type Activation = Held<B>;
    type Buffer = Name;
    type Norm = Rc<Raw<B>>;
    type Gate = B::Gate;
    type Owed = B::Owed;
    type Head = B::Head;
    type Rehearsal = B::Rehearsal;

    fn buffer(&self, _: Vec<B::Element>) -> Result<Name> {
        Err(unknown())
    }

    fn read(&self, buffer: &Name) -> Result<Vec<B::Element>> {
        self.inner.read(self.buffer_of(*buffer)?)
    }

    fn tensor(&self, shape: Shape, values: Vec<B::Element>) -> Result<Held<B>> {
        self.inner.tensor(shape, values).map(Held::Own)
    }

    fn values(&self, x: &Held<B>) -> Result<Vec<B::Element>> {
        self.inner.values(x.get())
    }

    fn shape(&self, x: &Held<B>) -> Shape {
        self.inner.shape(x.get())
    }

    fn prepare(&mut self, rehearse: impl FnMut(&mut B::Rehearsal) -> Result<()>) -> Result<()> {
        self.inner.prepare(rehearse)
    }

    fn memory(&self, rehearse: impl FnMut(&mut B::Rehearsal) -> Result<()>) -> Result<Option<Memory>> {
        self.inner.memory(rehearse)
    }

    fn send(&mut self, images: &[u8], side: usize) -> Result<()> {
        self.inner.send(images, side)
    }

    fn discard_sent(&mut self) {
        self.inner.discard_sent();
    }

    fn begin_pass(&mut self, normalisation: &Normalisation, mix: &MixPlan) -> Result<()> {
        self.inner.begin_pass(normalisation, mix)
    }

    fn set_targets(&mut self, targets: &[f32]) -> Result<()> {
        self.inner.set_targets(targets)
    }

    fn begin_step(&mut self, key: &StepKey) -> Result<()> {
        self.inner.begin_step(key)
    }

    fn dtype(&self) -> Dtype {
        self.inner.dtype()
    }

    fn set_loss_scale(&mut self, scale: f64) {
        self.inner.set_loss_scale(scale);
    }

    fn begin_update(
        &mut self,
        rule: Rule,
        scalars: &Scalars,
        parameters: usize,
        kernels: &[Range<usize>],
    ) -> Result<()> {
        self.inner.begin_update(rule, scalars, parameters, kernels)
    }

    fn input(&mut self) -> Result<Held<B>> {
        let from = self.clock.mark()?;
        let x = self.inner.input()?;
        let input = self.inner.shape(&x);
        let call = Call { operation: "input", layer: "normalise, mix".into(), input, operations: 0 };
        self.calls.push((call, from, self.clock.mark()?));
        Ok(Held::Own(x))
    }

    fn conv_norm(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        _: &mut Variables<Self>,
        mode: Mode,
    ) -> Result<Raw<Self>> {
        let (load, shape, reads) = match x {
            Load::Plain(x) => (Load::Plain(x.get()), self.shape(x), ""),
            Load::Silu(y) => (Load::Silu(raw(y)), self.shape(&y.y), ", silu"),
            Load::Gated(y, gate) => (Load::Gated(raw(y), gate), self.shape(&y.y), ", gated"),
        };
        let call = self.convolution("conv", layer, shape, reads, 1);
        self.time(call, |inner, state| inner.conv_norm(layer, load, &mut state.vars, mode)).map(wrap)
    }

    fn squeeze_excite(
        &mut self,
        layer: &SqueezeExcite,
        x: &Raw<Self>,
        _: &mut Variables<Self>,
    ) -> Result<B::Gate> {
        let call = self.on("squeeze_excite", &x.y, squeeze(layer));
        self.time(call, |inner, state| inner.squeeze_excite(layer, raw(x), &mut state.vars))
    }

    fn merge(
        &mut self,
        branch: &Raw<Self>,
        act: Activation,
        skip: Option<&Held<B>>,
        drop: Option<DropPath>,
    ) -> Result<Held<B>> {
        let call = self.on("merge", &branch.y, words(act, skip.is_some(), drop));
        let skip = skip.map(Held::get);
        self.time(call, |inner, _| inner.merge(raw(branch), act, skip, drop)).map(Held::Own)
    }

    fn head(
        &mut self,
        layer: &Classifier,
        x: &Raw<Self>,
        dropout: f64,
        _: &mut Variables<Self>,
    ) -> Result<B::Head> {
        let call = self.on("head", &x.y, dense(layer));
        self.time(call, |inner, state| inner.head(layer, raw(x), dropout, &mut state.vars))
    }

    fn logits(&self, head: &B::Head) -> Result<Vec<B::Element>> {
        self.inner.logits(head)
    }

    fn loss_gradient(&mut self, head: &mut B::Head) -> Result<()> {
        self.time(Self::flat("loss_gradient"), |inner, _| inner.loss_gradient(head))
    }

    fn loss(&mut self) -> Result<f64> {
        self.inner.loss()
    }

    fn head_backward(
        &mut self,
        layer: &Classifier,
        x: (&ConvNorm, &Raw<Self>),
        head: &B::Head,
        _: &mut Variables<Self>,
    ) -> Result<(Held<B>, B::Owed)> {
        let call = self.on("head_backward", &x.1.y, dense(layer));
        let work = |inner: &mut B, state: &mut State<B>| {
            inner.head_backward(layer, (x.0, raw(x.1)), head, &mut state.vars)
        };
        self.time(call, work).map(|(dz, owed)| (Held::Own(dz), owed))
    }

    fn merge_backward(
        &mut self,
        branch: (&ConvNorm, &Raw<Self>),
        act: Activation,
        drop: Option<DropPath>,
        grad: &Held<B>,
        _: &mut Variables<Self>,
    ) -> Result<(Option<Held<B>>, B::Owed)> {
        let call = self.on("merge_backward", grad, words(act, false, drop));
        let work = |inner: &mut B, state: &mut State<B>| {
            inner.merge_backward((branch.0, raw(branch.1)), act, drop, grad.get(), &mut state.vars)
        };
        self.time(call, work).map(|(dz, owed)| (dz.map(Held::Own), owed))
    }

    fn conv_backward(
        &mut self,
        layer: &ConvNorm,
        x: &Held<B>,
        grad: Gradient<'_, Self>,
        skip: Option<&Held<B>>,
        _: &mut Variables<Self>,
    ) -> Result<Held<B>> {
        let reads = if skip.is_some() { ", skip" } else { "" };
        let call = self.convolution("conv_backward", layer, self.shape(x), reads, 2);
        let (grad, skip) = (gradient(&grad), skip.map(Held::get));
        self.time(call, |inner, state| inner.conv_backward(layer, x.get(), grad, skip, &mut state.vars))
            .map(Held::Own)
    }

    fn conv_backward_weights(
        &mut self,
        layer: &ConvNorm,
        x: &Held<B>,
        grad: Gradient<'_, Self>,
        _: &mut Variables<Self>,
    ) -> Result<()> {
        let call = self.convolution("conv_backward_weights", layer, self.shape(x), "", 1);
        let grad = gradient(&grad);
        self.time(call, |inner, state| inner.conv_backward_weights(layer, x.get(), grad, &mut state.vars))
    }

    fn conv_backward_silu(
        &mut self,
        layer: &ConvNorm,
        producer: (&ConvNorm, &Raw<Self>),
        grad: Gradient<'_, Self>,
        _: &mut Variables<Self>,
    ) -> Result<(Held<B>, B::Owed)> {
        let shape = self.shape(&producer.1.y);
        let call = self.convolution("conv_backward", layer, shape, ", silu", 2);
        let (producer, grad) = ((producer.0, raw(producer.1)), gradient(&grad));
        let work = |inner: &mut B, state: &mut State<B>| {
            inner.conv_backward_silu(layer, producer, grad, &mut state.vars)
        };
        self.time(call, work).map(|(dz, owed)| (Held::Own(dz), owed))
    }

    fn conv_backward_gated(
        &mut self,
        layer: &ConvNorm,
        producer: (&ConvNorm, &Raw<Self>),
        gate: (&SqueezeExcite, &B::Gate),
        grad: Gradient<'_, Self>,
        _: &mut Variables<Self>,
    ) -> Result<(Held<B>, B::Owed)> {
        let shape = self.shape(&producer.1.y);
        let call = self.convolution("conv_backward", layer, shape, ", gated", 2);
        let (producer, grad) = ((producer.0, raw(producer.1)), gradient(&grad));
        let work = |inner: &mut B, state: &mut State<B>| {
            inner.conv_backward_gated(layer, producer, gate, grad, &mut state.vars)
        };
        self.time(call, work).map(|(dz, owed)| (Held::Own(dz), owed))
    }

    fn clear(&mut self, buffer: &mut Name) -> Result<()> {
        let name = *buffer;
        self.time(Self::flat("clear"), |inner, state| match name {
            Name::Params => inner.clear(&mut state.vars.params),
            Name::Grads => inner.clear(&mut state.vars.grads),
            Name::Stats => inner.clear(&mut state.vars.stats),
            Name::Other => Err(unknown()),
        })
    }

    fn norm(&mut self, buffer: &Name) -> Result<f64> {
        let name = *buffer;
        self.time(Self::flat("norm"), |inner, state| match name {
            Name::Params => inner.norm(&state.vars.params),
            Name::Grads => inner.norm(&state.vars.grads),
            Name::Stats => inner.norm(&state.vars.stats),
            Name::Other => Err(unknown()),
        })
    }

    fn update(&mut self, _: &mut State<Self>) -> Result<()> {
        self.time(Self::flat("update"), |inner, state| inner.update(state))
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        self.inner.gradient_norm()
    }
}
