//! The fused operations of [`Backend`], composed of the textbook ones.

use super::batch_norm::{self, Arrival, Moments, Norm, Owed};
use super::squeeze_excite::{self, Gate};
use super::{conv3x3, depthwise, head, input, optimizer, pointwise};
use crate::backend::{
    Activation, Backend, Classifier, ConvNorm, DropPath, Gradient, Load, Mode, Normalisation, Raw,
    SqueezeExcite, State, StepKey, Variables,
};
use crate::data::MixPlan;
use crate::optimizer::{Rule, Scalars, Step, gradient_scale};
use crate::pool::Pool;
use crate::random::{Purpose, Stream};
use crate::tensor::{ConvKind, Real, Shape, Tensor};
use crate::{Error, Result};
use ndarray::Array2;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;

/// The CPU reference as a backend; `F` is f32 or f64.
#[derive(Debug)]
pub struct Reference<F> {
    key: StepKey,
    /// Where the tensors of one step leave their memory to the next.
    pool: Pool<F>,
    /// Images and their side.
    sent: VecDeque<(Vec<u8>, usize)>,
    input: Option<Tensor<F>>,
    targets: Vec<f32>,
    loss_scale: f64,
    loss: f64,
    update: Option<Update>,
    gradient_norm: f64,
}

/// How the weights move next.
#[derive(Debug)]
struct Update {
    rule: Rule,
    scalars: Scalars,
    kernels: Vec<Range<usize>>,
}

/// Logits, and what made them.
#[derive(Clone, Debug)]
pub struct Head<F> {
    /// \[images, classes\].
    pub logits: Array2<F>,
    grad: Option<Array2<F>>,
    /// After dropout, \[images, features\].
    features: Array2<F>,
    dropout: Option<Array2<F>>,
}

impl<F: Real> Default for Reference<F> {
    fn default() -> Self {
        Self::new()
    }
}

impl<F: Real> Reference<F> {
    /// A backend on this machine's CPU.
    pub fn new() -> Self {
        Self {
            key: StepKey::default(),
            pool: Pool::default(),
            sent: VecDeque::new(),
            input: None,
            targets: Vec::new(),
            loss_scale: 1.0,
            loss: f64::NAN,
            update: None,
            gradient_norm: f64::NAN,
        }
    }

    /// 0 or 1 / (1 − rate) for each of `images` images.
    fn factors(&self, drop: Option<DropPath>, images: usize) -> Result<Option<Vec<F>>> {
        let Some(DropPath { rate, block }) = drop else { return Ok(None) };
        if self.key.images.len() != images {
            let problem = format!("the step was begun with {} images, not {images}", self.key.images.len());
            return Err(Error::Shape { operation: "stochastic depth", problem });
        }
        let keep = F::of(1.0 / (1.0 - rate));
        let factor = |&image: &u32| {
            let draw = Stream::new(self.key.seed, self.key.epoch, image, Purpose::DropPath(block)).uniform();
            if f64::from(draw) < rate { F::zero() } else { keep }
        };
        Ok(Some(self.key.images.iter().map(factor).collect()))
    }
}

/// What a convolution reads, with everything owed to it applied.
fn loaded<F: Real>(x: Load<'_, Reference<F>>) -> Cow<'_, Tensor<F>> {
    match x {
        Load::Plain(x) => Cow::Borrowed(x),
        Load::Silu(raw) => Cow::Owned(batch_norm::apply(&raw.y, &raw.norm, Activation::Silu, None)),
        Load::Gated(raw, gate) => {
            let gate = gate.gate.as_slice().expect("a gate is in standard layout");
            Cow::Owned(batch_norm::apply(&raw.y, &raw.norm, Activation::Silu, Some(gate)))
        }
    }
}

fn convolve<F: Real>(layer: &ConvNorm, x: &Tensor<F>, params: &[F], y: Shape) -> Tensor<F> {
    let weight = &params[layer.weight.clone()];
    match layer.conv.kind {
        ConvKind::Dense => conv3x3::forward(&layer.conv, x, weight, y),
        ConvKind::Depthwise => depthwise::forward(&layer.conv, x, weight, y),
        ConvKind::Pointwise => pointwise::forward(x, weight, layer.conv.outputs),
    }
}

fn input_gradient<F: Real>(layer: &ConvNorm, dy: &Tensor<F>, params: &[F], x: Shape) -> Tensor<F> {
    let weight = &params[layer.weight.clone()];
    match layer.conv.kind {
        ConvKind::Dense => conv3x3::backward_input(&layer.conv, dy, weight, x),
        ConvKind::Depthwise => depthwise::backward_input(&layer.conv, dy, weight, x),
        ConvKind::Pointwise => pointwise::backward_input(dy, weight, layer.conv.inputs),
    }
}

fn weight_gradient<F: Real>(layer: &ConvNorm, x: &Tensor<F>, dy: &Tensor<F>, grads: &mut [F]) {
    let grad = &mut grads[layer.weight.clone()];
    match layer.conv.kind {
        ConvKind::Dense => conv3x3::backward_weight(&layer.conv, x, dy, grad),
        ConvKind::Depthwise => depthwise::backward_weight(&layer.conv, x, dy, grad),
        ConvKind::Pointwise => pointwise::backward_weight(x, dy, grad),
    }
}

/// Adds dγ and dβ to the gradients and keeps what the raw output is owed.
fn owe<F: Real>(
    layer: &ConvNorm,
    norm: &Norm<F>,
    (dbeta, dgamma): (Vec<f64>, Vec<f64>),
    factors: Option<Vec<F>>,
    grads: &mut [F],
) -> Owed<F> {
    for (range, sums) in [(&layer.beta, &dbeta), (&layer.gamma, &dgamma)] {
        grads[range.clone()].iter_mut().zip(sums).for_each(|(g, &s)| *g += F::of(s));
    }
    Owed::new(norm, &dbeta, &dgamma, factors)
}

fn check_shapes(operation: &'static str, found: Shape, expected: Shape) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape { operation, problem: format!("expected a tensor {expected}, found {found}") })
}

/// `found` are the sides of a matrix with a row for each image.
fn check_rows(
    operation: &'static str,
    found: (usize, usize),
    (images, columns): (usize, usize),
) -> Result<()> {
    if found == (images, columns) {
        return Ok(());
    }
    let problem = format!("expected a matrix {images}×{columns}, found {}×{}", found.0, found.1);
    Err(Error::Shape { operation, problem })
}

/// A gate belongs to tensors of `shape`.
fn check_gate<F>(gate: &Gate<F>, shape: Shape) -> Result<()> {
    check_rows("gate", gate.gate.dim(), (shape.n, shape.c))
}

/// What a convolution's backward is given fits the input `x`.
fn check_backward<F: Real>(layer: &ConvNorm, x: Shape, grad: &Gradient<'_, Reference<F>>) -> Result<()> {
    let y = layer.conv.output(x)?;
    check_shapes("convolution backward", grad.gradient.shape(), y)?;
    check_shapes("output of a convolution in its backward", grad.raw.y.shape(), y)
}

impl<F: Real> Backend for Reference<F> {
    type Element = F;
    type Activation = Tensor<F>;
    type Buffer = Vec<F>;
    type Norm = Norm<F>;
    type Gate = Gate<F>;
    type Owed = Owed<F>;
    type Head = Head<F>;
    type Rehearsal = Self;

    fn buffer(&self, values: Vec<F>) -> Result<Vec<F>> {
        Ok(values)
    }

    fn read(&self, buffer: &Vec<F>) -> Result<Vec<F>> {
        Ok(buffer.clone())
    }

    fn tensor(&self, shape: Shape, values: Vec<F>) -> Result<Tensor<F>> {
        Ok(Tensor::from_vec(shape, values)?.with_pool(&self.pool))
    }

    fn values(&self, x: &Tensor<F>) -> Result<Vec<F>> {
        Ok(x.data().to_vec())
    }

    fn shape(&self, x: &Tensor<F>) -> Shape {
        x.shape()
    }

    fn send(&mut self, images: &[u8], side: usize) -> Result<()> {
        if self.sent.len() == 2 {
            let problem = "two batches are on their way: begin a pass before sending a third".into();
            return Err(Error::Shape { operation: "input", problem });
        }
        self.sent.push_back((images.to_vec(), side));
        Ok(())
    }

    fn discard_sent(&mut self) {
        self.sent.clear();
    }

    fn begin_pass(&mut self, normalisation: &Normalisation, mix: &MixPlan) -> Result<()> {
        let Some((images, side)) = self.sent.pop_front() else {
            let problem = "no batch is on its way: send one first".into();
            return Err(Error::Shape { operation: "input", problem });
        };
        self.input = Some(input::forward(&images, side, normalisation, mix)?.with_pool(&self.pool));
        Ok(())
    }

    fn set_targets(&mut self, targets: &[f32]) -> Result<()> {
        self.targets = targets.to_vec();
        Ok(())
    }

    fn begin_step(&mut self, key: &StepKey) -> Result<()> {
        self.key.clone_from(key);
        self.pool.trim();
        Ok(())
    }

    fn set_loss_scale(&mut self, scale: f64) {
        self.loss_scale = scale;
    }

    fn begin_update(
        &mut self,
        rule: Rule,
        scalars: &Scalars,
        _parameters: usize,
        kernels: &[Range<usize>],
    ) -> Result<()> {
        rule.validate()?;
        self.update = Some(Update { rule, scalars: *scalars, kernels: kernels.to_vec() });
        Ok(())
    }

    fn input(&mut self) -> Result<Tensor<F>> {
        self.input.take().ok_or_else(|| Error::Shape {
            operation: "input",
            problem: "no pass was begun, or its input was taken already".into(),
        })
    }

    fn conv_norm(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        vars: &mut Variables<Self>,
        mode: Mode,
    ) -> Result<Raw<Self>> {
        let shape = match x {
            Load::Plain(x) => x.shape(),
            Load::Silu(raw) | Load::Gated(raw, _) => raw.y.shape(),
        };
        let out = layer.conv.output(shape)?;
        if let Load::Gated(_, gate) = x {
            check_gate(gate, shape)?;
        }
        let y = convolve(layer, &loaded(x), &vars.params, out);
        let (mean, var) = (layer.running_mean.clone(), layer.running_var.clone());
        let moments = match mode {
            Mode::Train => {
                if out.pixels() == 1 {
                    let problem = "one value per channel has no variance; use a larger batch or image".into();
                    return Err(Error::Shape { operation: "batch normalisation", problem });
                }
                let moments = batch_norm::moments(&y);
                let mut running_var = vars.stats[var.clone()].to_vec();
                let (momentum, estimator) = (layer.momentum, layer.variance);
                batch_norm::update_running(
                    &mut vars.stats[mean],
                    &mut running_var,
                    &moments,
                    momentum,
                    estimator,
                );
                vars.stats[var].copy_from_slice(&running_var);
                moments
            }
            Mode::Eval => {
                let running = |range: Range<usize>| vars.stats[range].iter().map(|s: &F| s.f64()).collect();
                Moments { count: out.pixels(), mean: running(mean), var: running(var) }
            }
        };
        let (gamma, beta) = (&vars.params[layer.gamma.clone()], &vars.params[layer.beta.clone()]);
        let norm = Norm::new(gamma, beta, &moments, layer.epsilon);
        Ok(Raw { y, norm })
    }

    fn squeeze_excite(
        &mut self,
        layer: &SqueezeExcite,
        x: &Raw<Self>,
        vars: &mut Variables<Self>,
    ) -> Result<Gate<F>> {
        check_shapes("squeeze-excitation", x.y.shape(), x.y.shape().with_channels(layer.channels))?;
        Ok(squeeze_excite::forward(layer, &x.y, &x.norm, &vars.params))
    }

    fn merge(
        &mut self,
        branch: &Raw<Self>,
        act: Activation,
        skip: Option<&Tensor<F>>,
        drop: Option<DropPath>,
    ) -> Result<Tensor<F>> {
        if let Some(skip) = skip {
            check_shapes("skip connection", skip.shape(), branch.y.shape())?;
        }
        let factors = self.factors(drop, branch.y.shape().n)?;
        Ok(batch_norm::merge(&branch.y, &branch.norm, act, skip, factors.as_deref()))
    }

    fn head(
        &mut self,
        layer: &Classifier,
        x: &Raw<Self>,
        dropout: f64,
        vars: &mut Variables<Self>,
    ) -> Result<Head<F>> {
        let shape = x.y.shape();
        check_shapes("classifier", shape, shape.with_channels(layer.features))?;
        let scale = F::one() / F::of((shape.h * shape.w) as f64);
        let mut features = squeeze_excite::sum_pixels(&x.y, &x.norm, None) * scale;
        let dropout = (dropout > 0.0).then(|| head::dropout_factors(&self.key, dropout, layer.features));
        if let Some(factors) = &dropout {
            if factors.nrows() != shape.n {
                let problem = format!("the step was begun with {} images, not {}", factors.nrows(), shape.n);
                return Err(Error::Shape { operation: "dropout", problem });
            }
            features *= factors;
        }
        let logits = head::classify(layer, &features, &vars.params);
        Ok(Head { logits, grad: None, features, dropout })
    }

    fn logits(&self, head: &Head<F>) -> Result<Vec<F>> {
        Ok(head.logits.iter().copied().collect())
    }

    fn loss_gradient(&mut self, head: &mut Head<F>) -> Result<()> {
        let (images, classes) = head.logits.dim();
        let count = self.targets.len();
        let targets = self.targets.iter().map(|&t| F::of(t.into())).collect();
        let targets = Array2::from_shape_vec((images, classes), targets).map_err(|_| {
            let problem = format!("{count} targets do not match logits {images}×{classes}");
            Error::Shape { operation: "cross entropy", problem }
        })?;
        let (loss, mut grad) = head::cross_entropy(&head.logits, &targets);
        if self.loss_scale != 1.0 {
            grad *= F::of(self.loss_scale);
        }
        head.grad = Some(grad);
        self.loss = loss;
        Ok(())
    }

    fn loss(&mut self) -> Result<f64> {
        Ok(self.loss)
    }

    fn head_backward(
        &mut self,
        layer: &Classifier,
        (producer, x): (&ConvNorm, &Raw<Self>),
        head: &Head<F>,
        vars: &mut Variables<Self>,
    ) -> Result<(Tensor<F>, Owed<F>)> {
        let Some(dlogits) = &head.grad else {
            let problem = "the loss comes before its gradient".into();
            return Err(Error::Shape { operation: "head backward", problem });
        };
        let shape = x.y.shape();
        check_shapes("classifier backward", shape, shape.with_channels(layer.features))?;
        check_rows("classifier backward", head.features.dim(), (shape.n, layer.features))?;
        check_rows("classifier backward", dlogits.dim(), (shape.n, layer.classes))?;
        let mut dpooled =
            head::classify_backward(layer, &head.features, dlogits, &vars.params, &mut vars.grads);
        if let Some(factors) = &head.dropout {
            dpooled *= factors;
        }
        dpooled.mapv_inplace(|d| d / F::of((shape.h * shape.w) as f64));
        let mut grad = x.y.sibling(shape);
        squeeze_excite::spread(&dpooled, &mut grad);
        let sums = batch_norm::backward(&mut grad, &x.y, &x.norm, Arrival::Alone);
        let owed = owe(producer, &x.norm, sums, None, &mut vars.grads);
        Ok((grad, owed))
    }

    fn merge_backward(
        &mut self,
        (layer, branch): (&ConvNorm, &Raw<Self>),
        act: Activation,
        drop: Option<DropPath>,
        grad: &Tensor<F>,
        vars: &mut Variables<Self>,
    ) -> Result<(Option<Tensor<F>>, Owed<F>)> {
        check_shapes("gradient of a block", grad.shape(), branch.y.shape())?;
        let factors = self.factors(drop, grad.shape().n)?;
        match act {
            Activation::Identity => {
                let sums = batch_norm::backward_identity(grad, &branch.y, &branch.norm, factors.as_deref());
                Ok((None, owe(layer, &branch.norm, sums, factors, &mut vars.grads)))
            }
            Activation::Silu => {
                let mut grad = grad.clone();
                let arrival = factors.as_deref().map_or(Arrival::Alone, Arrival::Factors);
                let sums = batch_norm::backward(&mut grad, &branch.y, &branch.norm, arrival);
                let owed = owe(layer, &branch.norm, sums, None, &mut vars.grads);
                Ok((Some(grad), owed))
            }
        }
    }

    fn conv_backward(
        &mut self,
        layer: &ConvNorm,
        x: &Tensor<F>,
        grad: Gradient<'_, Self>,
        skip: Option<&Tensor<F>>,
        vars: &mut Variables<Self>,
    ) -> Result<Tensor<F>> {
        check_backward(layer, x.shape(), &grad)?;
        if let Some(skip) = skip {
            check_shapes("skip connection backward", skip.shape(), x.shape())?;
        }
        let dy = grad.owed.pay(grad.gradient, &grad.raw.y);
        weight_gradient(layer, x, &dy, &mut vars.grads);
        let mut dx = input_gradient(layer, &dy, &vars.params, x.shape());
        if let Some(skip) = skip {
            super::parallel::add(&mut dx, skip);
        }
        Ok(dx)
    }

    fn conv_backward_weights(
        &mut self,
        layer: &ConvNorm,
        x: &Tensor<F>,
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<()> {
        check_backward(layer, x.shape(), &grad)?;
        let dy = grad.owed.pay(grad.gradient, &grad.raw.y);
        weight_gradient(layer, x, &dy, &mut vars.grads);
        Ok(())
    }

    fn conv_backward_silu(
        &mut self,
        layer: &ConvNorm,
        (producer, raw): (&ConvNorm, &Raw<Self>),
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<(Tensor<F>, Owed<F>)> {
        let mut dx = self.conv_backward(layer, &loaded(Load::Silu(raw)), grad, None, vars)?;
        let sums = batch_norm::backward(&mut dx, &raw.y, &raw.norm, Arrival::Alone);
        let owed = owe(producer, &raw.norm, sums, None, &mut vars.grads);
        Ok((dx, owed))
    }

    fn conv_backward_gated(
        &mut self,
        layer: &ConvNorm,
        (producer, raw): (&ConvNorm, &Raw<Self>),
        (squeeze, gate): (&SqueezeExcite, &Gate<F>),
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<(Tensor<F>, Owed<F>)> {
        let shape = raw.y.shape();
        check_gate(gate, shape)?;
        check_shapes("squeeze-excitation backward", shape, shape.with_channels(squeeze.channels))?;
        let mut dx = self.conv_backward(layer, &loaded(Load::Gated(raw, gate)), grad, None, vars)?;
        let dgate = squeeze_excite::sum_pixels(&raw.y, &raw.norm, Some(&dx));
        let pixels = shape.h * shape.w;
        let dpool = squeeze_excite::backward(squeeze, gate, &dgate, pixels, &vars.params, &mut vars.grads);
        let (gate, dpool) = (gate.gate.as_slice(), dpool.as_slice());
        let (Some(gate), Some(dpool)) = (gate, dpool) else {
            unreachable!("both are made in standard layout");
        };
        let sums = batch_norm::backward(&mut dx, &raw.y, &raw.norm, Arrival::Gated(gate, dpool));
        let owed = owe(producer, &raw.norm, sums, None, &mut vars.grads);
        Ok((dx, owed))
    }

    fn clear(&mut self, buffer: &mut Vec<F>) -> Result<()> {
        buffer.fill(F::zero());
        Ok(())
    }

    fn norm(&mut self, buffer: &Vec<F>) -> Result<f64> {
        Ok(optimizer::gradient_norm(buffer))
    }

    fn update(&mut self, state: &mut State<Self>) -> Result<()> {
        let Some(Update { rule, scalars, kernels }) = &self.update else {
            let problem = "no update was begun".into();
            return Err(Error::Shape { operation: "update", problem });
        };
        let State { vars, average, slots } = state;
        let norm = optimizer::gradient_norm(&vars.grads);
        self.gradient_norm = norm / scalars.loss_scale;
        let Some(scale) = gradient_scale(norm, scalars.loss_scale, scalars.max_norm) else { return Ok(()) };
        let step = Step { gradient_scale: scale, ..scalars.step };
        optimizer::update(*rule, &step, kernels, &mut vars.params, &vars.grads, slots)?;
        optimizer::update_average(&mut average.params, &vars.params, scalars.ema_decay)?;
        optimizer::update_average(&mut average.stats, &vars.stats, scalars.ema_decay)
    }

    fn gradient_norm(&mut self) -> Result<f64> {
        Ok(self.gradient_norm)
    }
}
