//! A backend that does what another does and times every operation, so that a training step shows where its time goes:
//! each operation on the shapes, and with the caches as cold, as the step has them.

use super::timing::Clock;
use crate::backend::{
    Activation, Backend, Classifier, ConvNorm, DropPath, Gradient, Load, Mode, Normalisation, Raw,
    SqueezeExcite, StepKey, Variables,
};
use crate::data::MixPlan;
use crate::optimizer::{Rule, Step};
use crate::tensor::{ConvKind, Shape};
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

/// A buffer of the backend within; that one's [`Variables`] are one value, so they are kept in [`Timed`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Params,
    Grads,
    Stats,
    Other(usize),
}

/// Times every operation of the backend within.
#[derive(Debug)]
pub(super) struct Timed<'a, B: Backend, C: Clock> {
    inner: &'a mut B,
    clock: &'a C,
    vars: Variables<B>,
    others: Vec<B::Buffer>,
    calls: Vec<(Call, C::Mark, C::Mark)>,
}

impl<'a, B: Backend, C: Clock> Timed<'a, B, C> {
    /// Around `inner`, whose variables are `vars` and whose optimizer's are `others`.
    pub(super) fn new(
        inner: &'a mut B,
        clock: &'a C,
        vars: Variables<B>,
        others: Vec<B::Buffer>,
    ) -> (Self, Variables<Self>, Vec<Name>) {
        let names = (0..others.len()).map(Name::Other).collect();
        let own = Variables { params: Name::Params, grads: Name::Grads, stats: Name::Stats };
        (Self { inner, clock, vars, others, calls: Vec::new() }, own, names)
    }

    /// The calls since the last time, in order, with their seconds.
    pub(super) fn take(&mut self) -> Result<Vec<(Call, f64)>> {
        let clock = self.clock;
        let timed = |(call, from, to)| Ok((call, clock.seconds(&from, &to)?));
        self.calls.drain(..).map(timed).collect()
    }

    fn buffer_of(&self, name: Name) -> &B::Buffer {
        match name {
            Name::Params => &self.vars.params,
            Name::Grads => &self.vars.grads,
            Name::Stats => &self.vars.stats,
            Name::Other(index) => &self.others[index],
        }
    }

    fn time<T>(
        &mut self,
        call: Call,
        work: impl FnOnce(&mut B, &mut Variables<B>, &mut Vec<B::Buffer>) -> Result<T>,
    ) -> Result<T> {
        let from = self.clock.mark()?;
        let done = work(self.inner, &mut self.vars, &mut self.others)?;
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

    fn buffer(&self, _: Vec<B::Element>) -> Result<Name> {
        let problem = "buffers are made before the operations are timed".into();
        Err(Error::Shape { operation: "timed buffer", problem })
    }

    fn read(&self, buffer: &Name) -> Result<Vec<B::Element>> {
        self.inner.read(self.buffer_of(*buffer))
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

    fn input(
        &mut self,
        images: &[u8],
        side: usize,
        normalisation: &Normalisation,
        mix: &MixPlan,
    ) -> Result<Held<B>> {
        let input = Shape::new(images.len() / (side * side * 3).max(1), side, side, 3);
        let call = Call { operation: "input", layer: "normalise, mix".into(), input, operations: 0 };
        self.time(call, |inner, _, _| inner.input(images, side, normalisation, mix)).map(Held::Own)
    }

    fn begin_step(&mut self, key: &StepKey) {
        self.inner.begin_step(key);
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
        self.time(call, |inner, vars, _| inner.conv_norm(layer, load, vars, mode)).map(wrap)
    }

    fn squeeze_excite(
        &mut self,
        layer: &SqueezeExcite,
        x: &Raw<Self>,
        _: &Variables<Self>,
    ) -> Result<B::Gate> {
        let call = self.on("squeeze_excite", &x.y, squeeze(layer));
        self.time(call, |inner, vars, _| inner.squeeze_excite(layer, raw(x), vars))
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
        self.time(call, |inner, _, _| inner.merge(raw(branch), act, skip, drop)).map(Held::Own)
    }

    fn head(
        &mut self,
        layer: &Classifier,
        x: &Raw<Self>,
        dropout: f64,
        _: &Variables<Self>,
    ) -> Result<B::Head> {
        let call = self.on("head", &x.y, dense(layer));
        self.time(call, |inner, vars, _| inner.head(layer, raw(x), dropout, vars))
    }

    fn logits(&self, head: &B::Head) -> Result<Vec<B::Element>> {
        self.inner.logits(head)
    }

    fn cross_entropy(&mut self, head: &mut B::Head, targets: &[f32]) -> Result<f64> {
        self.time(Self::flat("cross_entropy"), |inner, _, _| inner.cross_entropy(head, targets))
    }

    fn head_backward(
        &mut self,
        layer: &Classifier,
        x: (&ConvNorm, &Raw<Self>),
        head: &B::Head,
        _: &mut Variables<Self>,
    ) -> Result<(Held<B>, B::Owed)> {
        let call = self.on("head_backward", &x.1.y, dense(layer));
        let work = |inner: &mut B, vars: &mut Variables<B>, _: &mut Vec<B::Buffer>| {
            inner.head_backward(layer, (x.0, raw(x.1)), head, vars)
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
        let work = |inner: &mut B, vars: &mut Variables<B>, _: &mut Vec<B::Buffer>| {
            inner.merge_backward((branch.0, raw(branch.1)), act, drop, grad.get(), vars)
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
        self.time(call, |inner, vars, _| inner.conv_backward(layer, x.get(), grad, skip, vars)).map(Held::Own)
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
        self.time(call, |inner, vars, _| inner.conv_backward_weights(layer, x.get(), grad, vars))
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
        let work = |inner: &mut B, vars: &mut Variables<B>, _: &mut Vec<B::Buffer>| {
            inner.conv_backward_silu(layer, producer, grad, vars)
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
        let work = |inner: &mut B, vars: &mut Variables<B>, _: &mut Vec<B::Buffer>| {
            inner.conv_backward_gated(layer, producer, gate, grad, vars)
        };
        self.time(call, work).map(|(dz, owed)| (Held::Own(dz), owed))
    }

    fn clear(&mut self, buffer: &mut Name) -> Result<()> {
        let name = *buffer;
        self.time(Self::flat("clear"), |inner, vars, others| {
            inner.clear(match name {
                Name::Params => &mut vars.params,
                Name::Grads => &mut vars.grads,
                Name::Stats => &mut vars.stats,
                Name::Other(index) => &mut others[index],
            })
        })
    }

    fn norm(&mut self, buffer: &Name) -> Result<f64> {
        let name = *buffer;
        self.time(Self::flat("norm"), |inner, vars, others| {
            inner.norm(match name {
                Name::Params => &vars.params,
                Name::Grads => &vars.grads,
                Name::Stats => &vars.stats,
                Name::Other(index) => &others[index],
            })
        })
    }

    /// All of the optimizer's buffers, whichever are named.
    fn update(
        &mut self,
        rule: Rule,
        step: &Step,
        kernels: &[Range<usize>],
        _: &mut Variables<Self>,
        _: &mut [Name],
    ) -> Result<()> {
        self.time(Self::flat("update"), |inner, vars, others| inner.update(rule, step, kernels, vars, others))
    }

    fn update_average(&mut self, average: &mut Name, values: &Name, decay: f64) -> Result<()> {
        let (Name::Other(index), values) = (*average, *values) else {
            let problem = "an average is none of the variables".into();
            return Err(Error::Shape { operation: "timed average", problem });
        };
        self.time(Self::flat("update_average"), |inner, vars, others| {
            let values = match values {
                Name::Params => &vars.params,
                Name::Stats => &vars.stats,
                _ => {
                    let problem = "an average is of parameters or statistics".into();
                    return Err(Error::Shape { operation: "timed average", problem });
                }
            };
            inner.update_average(&mut others[index], values, decay)
        })
    }
}
