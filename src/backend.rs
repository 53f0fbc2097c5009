//! The one trait that the CPU reference and the device implement, so that `nn/` is written once.
//!
//! The operations are the fused ones of the training dataflow. Only *raw* convolution outputs and block outputs are
//! ever stored; a raw output is a tensor plus the batch normalisation still owed to it ([`Raw`]), and whoever reads it
//! applies that on load ([`Load`]). The same in reverse: a gradient tensor carries the batch-norm backward still owed to
//! it ([`Owed`](Backend::Owed)), which is affine per channel, a·g + b·y + c, and is paid by the convolution that reads
//! it. An implementation may do all of this in the prologues and epilogues of its kernels or in passes of its own.

#![forbid(unsafe_code)]

use crate::Result;
use crate::data::MixPlan;
use crate::optimizer::{Rule, Scalars};
use crate::tensor::{Conv, Dtype, Real, Shape};
use std::fmt::Debug;
use std::ops::Range;

/// A convolution with its batch normalisation: what it computes and where its values lie in the flat buffers.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvNorm {
    /// The convolution.
    pub conv: Conv,
    /// Its weights, in the parameter buffer.
    pub weight: Range<usize>,
    /// γ, in the parameter buffer.
    pub gamma: Range<usize>,
    /// β, in the parameter buffer.
    pub beta: Range<usize>,
    /// The running mean, in the statistics buffer.
    pub running_mean: Range<usize>,
    /// The running variance, in the statistics buffer.
    pub running_var: Range<usize>,
    /// Added to the variance.
    pub epsilon: f64,
    /// The weight of the *new* statistic in the running one (PyTorch's convention; TensorFlow's is one minus this).
    pub momentum: f64,
    /// Which estimate of the variance enters the running statistic.
    pub variance: VarianceEstimator,
}

/// The estimate of the variance that the running statistic keeps. The normalisation itself always uses the biased one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VarianceEstimator {
    /// Divided by n − 1 (PyTorch, TensorFlow's fused batch norm).
    #[default]
    Unbiased,
    /// Divided by n (google/automl on TPU).
    Biased,
}

/// Squeeze-excitation: gate = σ(W₂·SiLU(W₁·mean(x) + b₁) + b₂), one factor for each image and channel.
#[derive(Clone, Debug, PartialEq)]
pub struct SqueezeExcite {
    /// Channels of the gated tensor.
    pub channels: usize,
    /// Channels between the two layers.
    pub reduced: usize,
    /// W₁, \[reduced, channels\], in the parameter buffer.
    pub reduce_weight: Range<usize>,
    /// b₁.
    pub reduce_bias: Range<usize>,
    /// W₂, \[channels, reduced\].
    pub expand_weight: Range<usize>,
    /// b₂.
    pub expand_bias: Range<usize>,
}

/// The classifier: logits = W·dropout(pooled) + b.
#[derive(Clone, Debug, PartialEq)]
pub struct Classifier {
    /// Pooled features.
    pub features: usize,
    /// Logits.
    pub classes: usize,
    /// W, \[classes, features\], in the parameter buffer.
    pub weight: Range<usize>,
    /// b.
    pub bias: Range<usize>,
}

/// Stochastic depth of one block: a whole sample of the branch is dropped with probability `rate`, the others are
/// divided by 1 − rate (Huang et al. 2016).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DropPath {
    /// The probability to drop.
    pub rate: f64,
    /// The index of the block: part of the random stream.
    pub block: u16,
}

/// Where the statistics of a normalisation come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// From the batch; the running statistics move.
    Train,
    /// From the running statistics, which stay.
    Eval,
}

/// What follows a normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// Nothing.
    Identity,
    /// SiLU.
    Silu,
}

/// How 8-bit RGB becomes the network's input: (value/255 − mean) / deviation, a channel each.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Normalisation {
    /// Of R, G and B, on the scale 0 to 1.
    pub mean: [f64; 3],
    /// Likewise.
    pub deviation: [f64; 3],
}

impl Normalisation {
    /// To −1 … 1: S, M, L and XL as timm evaluates them.
    pub const HALF: Self = Self { mean: [0.5; 3], deviation: [0.5; 3] };
    /// The statistics of ImageNet: B0–B3 and V1.
    pub const IMAGENET: Self = Self { mean: [0.485, 0.456, 0.406], deviation: [0.229, 0.224, 0.225] };
}

/// What all random numbers of a step depend on, beside their purpose.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepKey {
    /// The seed of the run.
    pub seed: u64,
    /// The epoch.
    pub epoch: u32,
    /// The index of each image in its dataset.
    pub images: Vec<u32>,
}

/// A raw convolution output and the normalisation owed to it.
pub struct Raw<B: Backend> {
    /// The convolution's output, as it is.
    pub y: B::Activation,
    /// What a reader must apply first.
    pub norm: B::Norm,
}

impl<B: Backend> Debug for Raw<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Raw").finish_non_exhaustive()
    }
}

/// How a convolution reads its input.
pub enum Load<'a, B: Backend> {
    /// As stored.
    Plain(&'a B::Activation),
    /// SiLU(norm(y)).
    Silu(&'a Raw<B>),
    /// SiLU(norm(y)) · gate.
    Gated(&'a Raw<B>, &'a B::Gate),
}

impl<B: Backend> Debug for Load<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Silu(_) => "Silu",
            Self::Gated(..) => "Gated",
        })
    }
}

impl<B: Backend> Clone for Load<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Load<'_, B> {}

/// The gradient of a raw convolution output, in the form a·g + b·y + c.
pub struct Gradient<'a, B: Backend> {
    /// g: the gradient of the normalised output, of the shape of `raw.y`.
    pub gradient: &'a B::Activation,
    /// The output it belongs to.
    pub raw: &'a Raw<B>,
    /// The coefficients.
    pub owed: &'a B::Owed,
}

impl<B: Backend> Debug for Gradient<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gradient").finish_non_exhaustive()
    }
}

/// The flat buffers of a network on one backend.
#[derive(Debug)]
pub struct Variables<B: Backend> {
    /// Every trainable value.
    pub params: B::Buffer,
    /// Its gradient, at the same place. Backward operations add to it.
    pub grads: B::Buffer,
    /// Running means and variances.
    pub stats: B::Buffer,
}

/// All that training keeps: what a step reads and changes.
#[derive(Debug)]
pub struct State<B: Backend> {
    /// Weights, gradients, statistics.
    pub vars: Variables<B>,
    /// The moving average of weights and statistics; its gradients are empty.
    pub average: Variables<B>,
    /// The optimizer's, in the order of [`Rule::slots`].
    pub slots: Vec<B::Buffer>,
}

impl<B: Backend> State<B> {
    /// The state before the first step: the average is at the values, the slots are as the rule wants them.
    ///
    /// # Errors
    /// When the backend has no memory for it.
    pub fn new(backend: &B, rule: Rule, params: Vec<B::Element>, stats: Vec<B::Element>) -> Result<Self> {
        let slot = |initial: f32| backend.buffer(vec![B::Element::of(initial.into()); params.len()]);
        let slots = rule.slots().iter().map(|s| slot(s.initial)).collect::<Result<_>>()?;
        let average = Variables {
            params: backend.buffer(params.clone())?,
            grads: backend.buffer(Vec::new())?,
            stats: backend.buffer(stats.clone())?,
        };
        let grads = slot(0.0)?;
        let vars = Variables { params: backend.buffer(params)?, grads, stats: backend.buffer(stats)? };
        Ok(Self { vars, average, slots })
    }

    /// A state of zeros for buffers of `params` and `stats` values: for rehearsals.
    ///
    /// # Errors
    /// When the backend has no memory for it.
    pub fn blank(backend: &B, rule: Rule, params: usize, stats: usize) -> Result<Self> {
        let variables = |grads| {
            let (params, stats) = (backend.zeros(params)?, backend.zeros(stats)?);
            Ok::<_, crate::Error>(Variables { params, grads: backend.zeros(grads)?, stats })
        };
        let slots = rule.slots().iter().map(|_| backend.zeros(params)).collect::<Result<_>>()?;
        Ok(Self { vars: variables(params)?, average: variables(0)?, slots })
    }
}

/// What tells one kind of training pass from another: two of the same kind ask the same of a backend, in the same order,
/// and differ in values alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PassKind {
    /// Images of the batch.
    pub images: usize,
    /// Their side in pixels.
    pub side: usize,
    /// The probability of dropping a feature before the classifier.
    pub dropout: f64,
    /// Whether it is the first of its step: gradients start from zero.
    pub first: bool,
    /// Whether it is the last of its step: the weights move.
    pub last: bool,
}

/// What a pass takes beside the buffers of its network, known without computing it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Bytes it needs at most.
    pub needed: usize,
    /// Bytes of the flat buffers that it works on.
    pub buffers: usize,
    /// Bytes there are.
    pub available: usize,
}

/// The fused operations of a training step.
///
/// Shapes are NHWC. Every operation checks that its arguments fit before it computes anything and answers
/// [`Error::Shape`](crate::Error::Shape) otherwise. Gradients of parameters are *added* to `vars.grads`.
///
/// A pass has three parts. What comes from outside is handed over first: [`send`](Self::send),
/// [`begin_step`](Self::begin_step), [`begin_pass`](Self::begin_pass) and, before the weights move,
/// [`begin_update`](Self::begin_update). Then it is computed, from [`input`](Self::input) to [`update`](Self::update),
/// without a word to or from outside, so that a device can record it and replay it ([`perform`](Self::perform)). What
/// came of it is asked afterwards: [`loss`](Self::loss), [`logits`](Self::logits),
/// [`gradient_norm`](Self::gradient_norm).
pub trait Backend: Sized {
    /// The type of parameters, statistics and gradients.
    type Element: Real;
    /// A stored NHWC tensor.
    type Activation: Debug;
    /// A flat buffer of parameters, gradients or statistics.
    type Buffer: Debug;
    /// Per channel: scale, shift, mean and reciprocal deviation.
    type Norm: Debug;
    /// The gate of a squeeze-excitation and what its backward needs.
    type Gate: Debug;
    /// Per channel: the coefficients of a batch-norm backward.
    type Owed: Debug;
    /// The head's logits, their gradient once the loss is known, and what its backward needs.
    type Head: Debug;
    /// Counts what passes take without computing them.
    type Rehearsal: Backend<Element = Self::Element>;

    /// A flat buffer holding `values`.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn buffer(&self, values: Vec<Self::Element>) -> Result<Self::Buffer>;

    /// A flat buffer of `length` zeros.
    ///
    /// # Errors
    /// When there is no memory for it.
    fn zeros(&self, length: usize) -> Result<Self::Buffer> {
        self.buffer(vec![Self::Element::of(0.0); length])
    }

    /// The values of a flat buffer.
    ///
    /// # Errors
    /// When they cannot be read back.
    fn read(&self, buffer: &Self::Buffer) -> Result<Vec<Self::Element>>;

    /// A tensor holding `values`, NHWC.
    ///
    /// # Errors
    /// When the length is not that of the shape, or there is no memory for it.
    fn tensor(&self, shape: Shape, values: Vec<Self::Element>) -> Result<Self::Activation>;

    /// The values of a tensor, NHWC.
    ///
    /// # Errors
    /// When they cannot be read back.
    fn values(&self, x: &Self::Activation) -> Result<Vec<Self::Element>>;

    /// The shape of a tensor.
    fn shape(&self, x: &Self::Activation) -> Shape;

    /// Makes room for the passes that `rehearse` goes through, so that none of them has to ask for memory. A backend that
    /// takes its memory as it comes does nothing.
    ///
    /// # Errors
    /// Those of `rehearse`, and [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    fn prepare(&mut self, rehearse: impl FnMut(&mut Self::Rehearsal) -> Result<()>) -> Result<()> {
        let _ = rehearse;
        Ok(())
    }

    /// What those passes take, and what there is; none where nothing limits it but the machine's memory.
    ///
    /// # Errors
    /// Those of `rehearse`, and what the device says.
    fn memory(&self, rehearse: impl FnMut(&mut Self::Rehearsal) -> Result<()>) -> Result<Option<Memory>> {
        let _ = rehearse;
        Ok(None)
    }

    /// Starts 8-bit RGB images \[n, side, side, 3\] on their way to [`begin_pass`](Self::begin_pass). One batch can be
    /// sent while the one before is still on its way.
    ///
    /// # Errors
    /// When they are not of that side, two are on their way already, or there is no memory for them.
    fn send(&mut self, images: &[u8], side: usize) -> Result<()>;

    /// Forgets the batches that are on their way.
    fn discard_sent(&mut self);

    /// Takes the oldest batch that was sent, for [`input`](Self::input).
    ///
    /// # Errors
    /// When none is on its way, or `mix` is for another number of images.
    fn begin_pass(&mut self, normalisation: &Normalisation, mix: &MixPlan) -> Result<()>;

    /// Sets the soft targets \[images, classes\] of the pass.
    ///
    /// # Errors
    /// When there is no memory for them.
    fn set_targets(&mut self, targets: &[f32]) -> Result<()>;

    /// Sets what random numbers depend on, until the next call.
    ///
    /// # Errors
    /// What the device says.
    fn begin_step(&mut self, key: &StepKey) -> Result<()>;

    /// The type of activations, as far as a device knows it. In f16 the loss must be scaled.
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    /// Sets what the loss is multiplied with before its gradient is taken, until the next call; 1 at first. With a power
    /// of two, gradients that f16 would round to zero survive; the update undoes it.
    fn set_loss_scale(&mut self, scale: f64);

    /// Sets how the weights, a buffer of `parameters`, move in the next [`update`](Self::update); `kernels` are the ranges
    /// that weight decay applies to.
    ///
    /// # Errors
    /// When the rule's constants are out of range, or the ranges do not fit.
    fn begin_update(
        &mut self,
        rule: Rule,
        scalars: &Scalars,
        parameters: usize,
        kernels: &[Range<usize>],
    ) -> Result<()>;

    /// Does `work`, which must do the same for every state whenever `kind` is the same. A device may record it the first
    /// time, and from then on replay it.
    ///
    /// # Errors
    /// Those of `work`, and what the device says.
    fn perform(
        &mut self,
        kind: PassKind,
        state: &mut State<Self>,
        work: impl FnOnce(&mut Self, &mut State<Self>) -> Result<()>,
    ) -> Result<()> {
        let _ = kind;
        work(self, state)
    }

    /// The network's input: the images of the pass, normalised and then mixed.
    ///
    /// # Errors
    /// When no pass was begun.
    fn input(&mut self) -> Result<Self::Activation>;

    /// [`send`](Self::send), [`begin_pass`](Self::begin_pass) and [`input`](Self::input) at once.
    ///
    /// # Errors
    /// Theirs.
    fn load(
        &mut self,
        images: &[u8],
        side: usize,
        normalisation: &Normalisation,
        mix: &MixPlan,
    ) -> Result<Self::Activation> {
        self.send(images, side)?;
        self.begin_pass(normalisation, mix)?;
        self.input()
    }

    /// Convolution with `x` transformed on load; in [`Mode::Train`] also the batch statistics of the output, which
    /// move the running ones.
    ///
    /// # Errors
    /// Shapes that do not fit, or a batch with a single value per channel in [`Mode::Train`].
    fn conv_norm(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        vars: &mut Variables<Self>,
        mode: Mode,
    ) -> Result<Raw<Self>>;

    /// The gate for SiLU(norm(y)).
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn squeeze_excite(
        &mut self,
        layer: &SqueezeExcite,
        x: &Raw<Self>,
        vars: &mut Variables<Self>,
    ) -> Result<Self::Gate>;

    /// A block's output: act(norm(y)), dropped or kept per image, plus the skip connection.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn merge(
        &mut self,
        branch: &Raw<Self>,
        act: Activation,
        skip: Option<&Self::Activation>,
        drop: Option<DropPath>,
    ) -> Result<Self::Activation>;

    /// Inference: a convolution, its normalisation by the running statistics, `act`, and the skip connection. On a device
    /// one launch, with the normalisation folded into weights and bias.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn infer(
        &mut self,
        layer: &ConvNorm,
        x: Load<'_, Self>,
        act: Activation,
        skip: Option<&Self::Activation>,
        vars: &mut Variables<Self>,
    ) -> Result<Self::Activation> {
        let raw = self.conv_norm(layer, x, vars, Mode::Eval)?;
        self.merge(&raw, act, skip, None)
    }

    /// Global average pool of SiLU(norm(y)), dropout with probability `dropout`, and the classifier.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn head(
        &mut self,
        layer: &Classifier,
        x: &Raw<Self>,
        dropout: f64,
        vars: &mut Variables<Self>,
    ) -> Result<Self::Head>;

    /// The logits, \[images, classes\].
    ///
    /// # Errors
    /// When they cannot be read back.
    fn logits(&self, head: &Self::Head) -> Result<Vec<Self::Element>>;

    /// The softmax cross entropy of each image against the targets of the pass, and the gradient of their mean, which
    /// stays in `head`.
    ///
    /// # Errors
    /// When there are not images × classes targets.
    fn loss_gradient(&mut self, head: &mut Self::Head) -> Result<()>;

    /// The mean loss of the last [`loss_gradient`](Self::loss_gradient), without the loss scale.
    ///
    /// # Errors
    /// When it cannot be read back; on a device also for what went wrong before.
    fn loss(&mut self) -> Result<f64>;

    /// [`set_targets`](Self::set_targets), [`loss_gradient`](Self::loss_gradient) and [`loss`](Self::loss) at once.
    ///
    /// # Errors
    /// Theirs.
    fn cross_entropy(&mut self, head: &mut Self::Head, targets: &[f32]) -> Result<f64> {
        self.set_targets(targets)?;
        self.loss_gradient(head)?;
        self.loss()
    }

    /// Backward of [`head`](Self::head): the gradient of norm(y), with what its layer's batch norm owes.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn head_backward(
        &mut self,
        layer: &Classifier,
        x: (&ConvNorm, &Raw<Self>),
        head: &Self::Head,
        vars: &mut Variables<Self>,
    ) -> Result<(Self::Activation, Self::Owed)>;

    /// Backward of [`merge`](Self::merge) into its branch. With [`Activation::Identity`] the gradient of norm(y) is
    /// `grad` itself, up to the factors of `drop`, which `Owed` carries, and no tensor is made.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn merge_backward(
        &mut self,
        branch: (&ConvNorm, &Raw<Self>),
        act: Activation,
        drop: Option<DropPath>,
        grad: &Self::Activation,
        vars: &mut Variables<Self>,
    ) -> Result<(Option<Self::Activation>, Self::Owed)>;

    /// Gradients of a convolution's weights and of its input `x`, where `x` is stored plainly; `skip` is added to
    /// the latter.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn conv_backward(
        &mut self,
        layer: &ConvNorm,
        x: &Self::Activation,
        grad: Gradient<'_, Self>,
        skip: Option<&Self::Activation>,
        vars: &mut Variables<Self>,
    ) -> Result<Self::Activation>;

    /// Gradient of a convolution's weights alone: the first layer, whose input needs none.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn conv_backward_weights(
        &mut self,
        layer: &ConvNorm,
        x: &Self::Activation,
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<()>;

    /// The same for an input SiLU(norm(y)) made by the layer `producer`: the gradient of norm(y), with what the
    /// producer's batch norm owes.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn conv_backward_silu(
        &mut self,
        layer: &ConvNorm,
        producer: (&ConvNorm, &Raw<Self>),
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<(Self::Activation, Self::Owed)>;

    /// The same for an input SiLU(norm(y))·gate, through the squeeze-excitation that made the gate.
    ///
    /// # Errors
    /// Shapes that do not fit.
    fn conv_backward_gated(
        &mut self,
        layer: &ConvNorm,
        producer: (&ConvNorm, &Raw<Self>),
        gate: (&SqueezeExcite, &Self::Gate),
        grad: Gradient<'_, Self>,
        vars: &mut Variables<Self>,
    ) -> Result<(Self::Activation, Self::Owed)>;

    /// Sets every value to zero.
    ///
    /// # Errors
    /// What the device says.
    fn clear(&mut self, buffer: &mut Self::Buffer) -> Result<()>;

    /// √Σ g² over a flat buffer; not finite if any value is not.
    ///
    /// # Errors
    /// What the device says.
    fn norm(&mut self, buffer: &Self::Buffer) -> Result<f64>;

    /// One step of the optimizer over all parameters, and of the moving averages: as [`begin_update`](Self::begin_update)
    /// has said, with the gradient's norm, the loss scale and clipping. Where the norm is not finite, nothing changes.
    ///
    /// # Errors
    /// When no update was begun, or buffers do not fit.
    fn update(&mut self, state: &mut State<Self>) -> Result<()>;

    /// The norm of all gradients in the last [`update`](Self::update), without the loss scale and before clipping.
    ///
    /// # Errors
    /// When it cannot be read back.
    fn gradient_norm(&mut self) -> Result<f64>;
}
