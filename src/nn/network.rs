//! Stem, blocks, head: the whole network.

use super::layout::Layout;
use super::spec::NetworkSpec;
use super::{Block, BlockTape};
use crate::Result;
use crate::backend::{
    Activation, Backend, Classifier, ConvNorm, Gradient, Load, Mode, Normalisation, PassKind, Raw, State,
    StepKey, Variables,
};
use crate::data::MixPlan;
use crate::optimizer::{Rule, Scalars, Step};
use crate::tensor::{Conv, ConvKind};

/// A network: its layers and where their values lie.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    spec: NetworkSpec,
    layout: Layout,
    stem: ConvNorm,
    blocks: Vec<Block>,
    head: ConvNorm,
    classifier: Classifier,
}

/// A forward pass: the head's result, and in training everything backward needs.
#[derive(Debug)]
pub struct Pass<B: Backend> {
    /// Logits; [`Backend::cross_entropy`] leaves their gradient here.
    pub head: B::Head,
    features: Raw<B>,
    stem: Option<Raw<B>>,
    tapes: Vec<BlockTape<B>>,
    /// The image, then each block's input, then the head's.
    inputs: Vec<B::Activation>,
}

/// The gradient of the stem's raw output, and what the stem's convolution read.
struct StemGradient<B: Backend> {
    images: B::Activation,
    stem: Raw<B>,
    gradient: B::Activation,
    owed: B::Owed,
}

impl Network {
    /// Lays out the network that `spec` describes.
    pub fn new(spec: NetworkSpec) -> Self {
        let mut layout = Layout::default();
        let (padding, norm) = (spec.padding, spec.batch_norm);
        let stem =
            Conv { kind: ConvKind::Dense, kernel: 3, stride: 2, padding, inputs: 3, outputs: spec.stem };
        let stem = layout.conv_norm("conv_stem", "bn1", stem, &norm);
        let mut blocks = Vec::new();
        for (i, stage) in spec.stages.iter().enumerate() {
            for (j, block) in stage.blocks.iter().enumerate() {
                let name = format!("blocks.{i}.{j}");
                blocks.push(Block::new(&name, blocks.len(), block, padding, &norm, &mut layout));
            }
        }
        let last = spec.stages.last().and_then(|s| s.blocks.last()).map_or(spec.stem, |b| b.outputs);
        let head = Conv {
            kind: ConvKind::Pointwise,
            kernel: 1,
            stride: 1,
            padding,
            inputs: last,
            outputs: spec.head,
        };
        let head = layout.conv_norm("conv_head", "bn2", head, &norm);
        let classifier = layout.classifier(spec.head, spec.classes);
        Self { spec, layout, stem, blocks, head, classifier }
    }

    /// What it was built from.
    pub const fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// Where its values lie.
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Every convolution, in forward order.
    pub fn convolutions(&self) -> impl Iterator<Item = &ConvNorm> {
        let blocks = self.blocks.iter().flat_map(Block::convolutions);
        std::iter::once(&self.stem).chain(blocks).chain(std::iter::once(&self.head))
    }

    /// Logits of the images `x` (n × side × side × 3, normalised). [`Mode::Train`] keeps what
    /// [`backward`](Self::backward) needs and applies `dropout` before the classifier; [`Mode::Eval`] keeps nothing.
    ///
    /// # Errors
    /// What the backend says of shapes and memory.
    pub fn forward<B: Backend>(
        &self,
        backend: &mut B,
        x: B::Activation,
        vars: &mut Variables<B>,
        mode: Mode,
        dropout: f64,
    ) -> Result<Pass<B>> {
        let keep = mode == Mode::Train;
        let stem = backend.conv_norm(&self.stem, Load::Plain(&x), vars, mode)?;
        let mut current = backend.merge(&stem, Activation::Silu, None, None)?;
        let mut inputs = if keep { vec![x] } else { Vec::new() };
        let stem = keep.then_some(stem);
        let mut tapes = Vec::new();
        for block in &self.blocks {
            let (out, tape) = block.forward(backend, &current, vars, mode)?;
            let input = std::mem::replace(&mut current, out);
            if keep {
                inputs.push(input);
                tapes.push(tape);
            }
        }
        let features = backend.conv_norm(&self.head, Load::Plain(&current), vars, mode)?;
        if keep {
            inputs.push(current);
        }
        let dropout = if keep { dropout } else { 0.0 };
        let head = backend.head(&self.classifier, &features, dropout, vars)?;
        Ok(Pass { head, features, stem, tapes, inputs })
    }

    /// Logits of the images `x` in inference: those of [`forward`](Self::forward) in [`Mode::Eval`], but for rounding where
    /// the backend folds normalisations into weights.
    ///
    /// # Errors
    /// What the backend says of shapes and memory.
    pub fn infer<B: Backend>(
        &self,
        backend: &mut B,
        x: B::Activation,
        vars: &mut Variables<B>,
    ) -> Result<B::Head> {
        let mut current = backend.infer(&self.stem, Load::Plain(&x), Activation::Silu, None, vars)?;
        drop(x);
        for block in &self.blocks {
            current = match block {
                Block::Fused(block) => block.infer(backend, &current, vars)?,
                Block::Mb(block) => block.infer(backend, &current, vars)?,
            };
        }
        let features = backend.conv_norm(&self.head, Load::Plain(&current), vars, Mode::Eval)?;
        backend.head(&self.classifier, &features, 0.0, vars)
    }

    /// Adds the gradient of every parameter to `vars.grads`.
    ///
    /// # Errors
    /// What the backend says; a pass made in [`Mode::Eval`] or without a loss has nothing to go back through.
    pub fn backward<B: Backend>(
        &self,
        backend: &mut B,
        pass: Pass<B>,
        vars: &mut Variables<B>,
    ) -> Result<()> {
        let StemGradient { images, stem, gradient, owed } = self.backward_to_stem(backend, pass, vars)?;
        let gradient = Gradient { gradient: &gradient, raw: &stem, owed: &owed };
        backend.conv_backward_weights(&self.stem, &images, gradient, vars)
    }

    /// [`backward`](Self::backward), with the gradient of the images.
    ///
    /// # Errors
    /// As there.
    pub fn backward_to_images<B: Backend>(
        &self,
        backend: &mut B,
        pass: Pass<B>,
        vars: &mut Variables<B>,
    ) -> Result<B::Activation> {
        let StemGradient { images, stem, gradient, owed } = self.backward_to_stem(backend, pass, vars)?;
        let gradient = Gradient { gradient: &gradient, raw: &stem, owed: &owed };
        backend.conv_backward(&self.stem, &images, gradient, None, vars)
    }

    /// What a device does in one training pass, between what it is given and what it is asked: forward, loss, backward;
    /// before the first pass of a step the gradients are cleared, after the last one the weights move.
    ///
    /// # Errors
    /// What the backend says.
    pub fn training_pass<B: Backend>(
        &self,
        backend: &mut B,
        kind: PassKind,
        state: &mut State<B>,
    ) -> Result<()> {
        let x = backend.input()?;
        let mut pass = self.forward(backend, x, &mut state.vars, Mode::Train, kind.dropout)?;
        backend.loss_gradient(&mut pass.head)?;
        if kind.first {
            backend.clear(&mut state.vars.grads)?;
        }
        self.backward(backend, pass, &mut state.vars)?;
        if kind.last { backend.update(state) } else { Ok(()) }
    }

    /// Lets `backend` go through a training pass of `kind` under `rule`, for its memory and its launches.
    ///
    /// # Errors
    /// What the backend says.
    pub fn rehearse_training<B: Backend>(&self, backend: &mut B, kind: PassKind, rule: Rule) -> Result<()> {
        let PassKind { images, side, .. } = kind;
        let layout = &self.layout;
        let mut state = State::blank(backend, rule, layout.param_buffer(), layout.stat_buffer())?;
        backend.begin_step(&StepKey { images: vec![0; images], ..StepKey::default() })?;
        backend.send(&[], side)?;
        backend.begin_pass(&Normalisation::HALF, &MixPlan::none(images))?;
        backend.set_targets(&vec![0.0; images * self.spec.classes])?;
        let step = Step { number: 0, learning_rate: 0.0, weight_decay: 0.0, gradient_scale: 1.0 };
        backend.begin_update(rule, &Scalars::plain(step), layout.param_buffer(), &layout.decayed())?;
        self.training_pass(backend, kind, &mut state)
    }

    /// Lets `backend` go through the evaluation of `images` images of `side` × `side` pixels.
    ///
    /// # Errors
    /// What the backend says.
    pub fn rehearse_evaluation<B: Backend>(&self, backend: &mut B, images: usize, side: usize) -> Result<()> {
        let (params, stats) = (self.layout.param_buffer(), self.layout.stat_buffer());
        let (params, stats) = (backend.zeros(params)?, backend.zeros(stats)?);
        let mut vars = Variables { params, grads: backend.zeros(0)?, stats };
        let x = backend.load(&[], side, &Normalisation::HALF, &MixPlan::none(images))?;
        let mut head = self.infer(backend, x, &mut vars)?;
        backend.set_targets(&vec![0.0; images * self.spec.classes])?;
        backend.loss_gradient(&mut head)
    }

    /// Back through head, blocks and the stem's activation.
    fn backward_to_stem<B: Backend>(
        &self,
        backend: &mut B,
        pass: Pass<B>,
        vars: &mut Variables<B>,
    ) -> Result<StemGradient<B>> {
        let Pass { head, features, stem, tapes, mut inputs } = pass;
        let (Some(stem), Some(input)) = (stem, inputs.pop()) else {
            let problem = "a pass in evaluation mode keeps nothing to go back through".into();
            return Err(crate::Error::Shape { operation: "backward", problem });
        };
        let (dz, owed) = backend.head_backward(&self.classifier, (&self.head, &features), &head, vars)?;
        let gradient = Gradient { gradient: &dz, raw: &features, owed: &owed };
        let mut grad = backend.conv_backward(&self.head, &input, gradient, None, vars)?;
        drop((features, dz, input));
        for (block, tape) in self.blocks.iter().zip(tapes).rev() {
            let x = inputs.pop().expect("each block's input was kept");
            grad = block.backward(backend, &x, tape, &grad, vars)?;
        }
        let images = inputs.pop().expect("the images were kept");
        let (dz, owed) = backend.merge_backward((&self.stem, &stem), Activation::Silu, None, &grad, vars)?;
        Ok(StemGradient { images, stem, gradient: dz.unwrap_or(grad), owed })
    }
}
