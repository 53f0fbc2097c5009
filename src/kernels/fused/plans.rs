//! Plans, made when an operation first meets a shape and kept: so that a step that has been made once makes none.

use super::FusedElement;
use crate::backend::ConvNorm;
use crate::device::Device;
use crate::device::cudarc::driver::{CudaView, CudaViewMut};
use crate::kernels::Workspace;
use crate::kernels::batch_norm::{BatchNorm, Evaluation, Fold};
use crate::kernels::conv3x3::Conv3x3;
use crate::kernels::depthwise::Depthwise;
use crate::kernels::head::Head;
use crate::kernels::operand::{GradientOutput, GradientView, Input, Output};
use crate::kernels::optimizer::Optimizer;
use crate::kernels::pointwise::{Classifier, Pointwise};
use crate::kernels::squeeze_excite::SqueezeExcite;
use crate::kernels::stem::{Stem, StemInput};
use crate::kernels::tuning::{Choices, Tuning};
use crate::optimizer::Rule;
use crate::tensor::{Conv, ConvKind, Dtype, Shape};
use crate::{Error, Result};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::sync::Arc;

/// Plans of one kind.
#[derive(Debug)]
pub(super) struct Cache<K, P>(HashMap<K, P>);

impl<K, P> Default for Cache<K, P> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash, P> Cache<K, P> {
    /// The plan for `key`, made by `plan` if there is none yet.
    pub(super) fn get(&mut self, key: K, plan: impl FnOnce() -> Result<P>) -> Result<&mut P> {
        Ok(match self.0.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(plan()?),
        })
    }

    /// The plan for `key`, if there is one.
    pub(super) fn existing_mut(&mut self, key: &K) -> Option<&mut P> {
        self.0.get_mut(key)
    }

    /// The plan for `key`, if there is one.
    pub(super) fn existing(&self, key: &K) -> Option<&P> {
        self.0.get(key)
    }
}

/// The workspace of all plans, which grows to what the hungriest of them needs.
#[derive(Debug)]
pub(super) struct Scratch {
    workspace: Workspace,
}

impl Scratch {
    pub(super) fn new(device: &Device) -> Result<Self> {
        Ok(Self { workspace: Workspace::new(device, 1)? })
    }

    /// The workspace, with room for `floats` partial results.
    pub(super) fn with(&mut self, device: &Device, floats: usize) -> Result<&mut Workspace> {
        if self.workspace.floats() < floats {
            self.workspace = Workspace::new(device, floats)?;
        }
        Ok(&mut self.workspace)
    }

    /// Partial results that there is room for: what has grown is another one.
    pub(super) fn floats(&self) -> usize {
        self.workspace.floats()
    }
}

/// What tells heads apart: shape, classes, and the bits of the dropout rate.
pub(super) type HeadKey = (Shape, usize, u64);

/// All plans of a device.
#[derive(Debug)]
pub(super) struct Plans<T> {
    /// How matrices are multiplied.
    dtype: Dtype,
    stems: Cache<(Conv, Shape), Stem<T>>,
    dense: Cache<(Conv, Shape), Conv3x3<T>>,
    depthwise: Cache<(Conv, Shape), Depthwise<T>>,
    pointwise: Cache<(Conv, Shape), Pointwise<T>>,
    classifiers: Cache<[usize; 3], Classifier<T>>,
    norms: Cache<Shape, BatchNorm<T>>,
    squeezes: Cache<(Shape, usize), SqueezeExcite<T>>,
    heads: Cache<HeadKey, Head<T>>,
    /// By where γ, β and both statistics begin, and the lengths of the buffers.
    evaluations: Cache<[usize; 6], Evaluation>,
    /// By weights and channels.
    folds: Cache<[usize; 2], Fold<T>>,
    /// Optimizers that only take norms and cast, by the length of the buffer.
    tools: Cache<usize, Optimizer>,
    tuning: Option<Arc<Tuning>>,
}

impl<T> Plans<T> {
    pub(super) fn new(dtype: Dtype) -> Self {
        Self {
            dtype,
            stems: Cache::default(),
            dense: Cache::default(),
            depthwise: Cache::default(),
            pointwise: Cache::default(),
            classifiers: Cache::default(),
            norms: Cache::default(),
            squeezes: Cache::default(),
            heads: Cache::default(),
            evaluations: Cache::default(),
            folds: Cache::default(),
            tools: Cache::default(),
            tuning: None,
        }
    }
}

impl<T: FusedElement> Plans<T> {
    /// The same, with launches as `tuning` chooses them.
    pub(super) fn tuned(self, tuning: Option<Arc<Tuning>>) -> Self {
        Self { tuning, ..self }
    }

    pub(super) fn tuning(&self) -> Option<&Arc<Tuning>> {
        self.tuning.as_ref()
    }

    pub(super) fn norm(&mut self, device: &Device, shape: Shape) -> Result<&BatchNorm<T>> {
        Ok(self.norms.get(shape, || BatchNorm::plan(device, shape))?)
    }

    pub(super) fn squeeze(
        &mut self,
        device: &Device,
        shape: Shape,
        reduced: usize,
    ) -> Result<&mut SqueezeExcite<T>> {
        self.squeezes.get((shape, reduced), || SqueezeExcite::plan(device, shape, reduced))
    }

    pub(super) fn head(&mut self, device: &Device, key: HeadKey) -> Result<&mut Head<T>> {
        let (shape, classes, rate) = key;
        self.heads.get(key, || Head::plan(device, shape, classes, f64::from_bits(rate)))
    }

    pub(super) fn existing_head(&self, key: &HeadKey) -> Option<&Head<T>> {
        self.heads.existing(key)
    }

    pub(super) fn classifier(
        &mut self,
        device: &Device,
        images: usize,
        features: usize,
        classes: usize,
    ) -> Result<&mut Classifier<T>> {
        let (key, dtype) = ([images, features, classes], self.dtype);
        self.classifiers.get(key, || Classifier::plan_in(device, images, features, classes, dtype))
    }

    /// The normalisation of inference of one layer.
    pub(super) fn evaluation(
        &mut self,
        device: &Device,
        layer: &ConvNorm,
        params: usize,
        stats: usize,
    ) -> Result<&Evaluation> {
        let starts = [&layer.gamma, &layer.beta, &layer.running_mean, &layer.running_var].map(|r| r.start);
        let [gamma, beta, mean, var] = starts;
        let key = [gamma, beta, mean, var, params, stats];
        Ok(self.evaluations.get(key, || Evaluation::plan(device, &[layer], params, stats))?)
    }

    pub(super) fn fold(&mut self, device: &Device, weights: usize, channels: usize) -> Result<&Fold<T>> {
        Ok(self.folds.get([weights, channels], || Fold::plan(device, weights, channels))?)
    }

    /// For buffers of `length` values that no rule updates.
    pub(super) fn tool(&mut self, device: &Device, length: usize) -> Result<&mut Optimizer> {
        self.tools.get(length, || Optimizer::plan(device, Rule::PAPER, length, &[]))
    }

    pub(super) fn fprop(
        &mut self,
        (device, scratch): (&Device, &mut Scratch),
        (conv, x): (&Conv, Shape),
        input: Input<'_, '_, T>,
        weight: &CudaView<'_, T>,
        y: &mut CudaViewMut<'_, T>,
        output: Output<'_, '_, T>,
    ) -> Result<()> {
        let (stream, key, dtype) = (device.compute(), (*conv, x), self.dtype);
        let choices = || choices(self.tuning.as_deref(), conv, x, dtype);
        match Kind::of(conv) {
            Kind::Stem => {
                let plan = self.stems.get(key, || Stem::plan(device, conv, x))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.fprop(stream, images(&input)?, weight, y, output, workspace)
            }
            Kind::Dense => {
                let plan = self.dense.get(key, || Conv3x3::plan_with(device, conv, x, dtype, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.fprop(stream, input, weight, y, output, workspace)
            }
            Kind::Depthwise => {
                let plan = self.depthwise.get(key, || Depthwise::plan_with(device, conv, x, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.fprop(stream, input, weight, y, output, workspace)
            }
            Kind::Pointwise => {
                let plan = self
                    .pointwise
                    .get(key, || Pointwise::plan_with(device, x, conv.outputs, dtype, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.fprop(stream, input, weight, y, output, workspace)
            }
        }
    }

    /// The gradients of the input, into dx, and of the weights, added to `dweight`.
    pub(super) fn backward(
        &mut self,
        (device, scratch): (&Device, &mut Scratch),
        (conv, x): (&Conv, Shape),
        input: Input<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dx: &mut CudaViewMut<'_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        output: GradientOutput<'_, '_, T>,
    ) -> Result<()> {
        let (stream, key, dtype) = (device.compute(), (*conv, x), self.dtype);
        let choices = || choices(self.tuning.as_deref(), conv, x, dtype);
        match Kind::of(conv) {
            Kind::Stem => {
                let plan = self.stems.get(key, || Stem::plan(device, conv, x))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.dgrad(stream, gradient, weight, dx, output)?;
                plan.wgrad(stream, images(&input)?, gradient, dweight, workspace)
            }
            Kind::Dense => {
                let plan = self.dense.get(key, || Conv3x3::plan_with(device, conv, x, dtype, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.dgrad(stream, gradient, weight, dx, output)?;
                plan.wgrad(stream, input, gradient, dweight, workspace)
            }
            Kind::Depthwise => {
                let plan = self.depthwise.get(key, || Depthwise::plan_with(device, conv, x, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.backward(stream, input, gradient, weight, dx, dweight, output, workspace)
            }
            Kind::Pointwise => {
                let plan = self
                    .pointwise
                    .get(key, || Pointwise::plan_with(device, x, conv.outputs, dtype, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.backward(stream, input, gradient, weight, dx, dweight, output, workspace)
            }
        }
    }

    /// The gradient of the weights of the first layer, added to `dweight`.
    pub(super) fn weight_gradient(
        &mut self,
        (device, scratch): (&Device, &mut Scratch),
        (conv, x): (&Conv, Shape),
        input: Input<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (stream, key, dtype) = (device.compute(), (*conv, x), self.dtype);
        let choices = || choices(self.tuning.as_deref(), conv, x, dtype);
        match Kind::of(conv) {
            Kind::Stem => {
                let plan = self.stems.get(key, || Stem::plan(device, conv, x))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.wgrad(stream, images(&input)?, gradient, dweight, workspace)
            }
            Kind::Dense => {
                let plan = self.dense.get(key, || Conv3x3::plan_with(device, conv, x, dtype, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.wgrad(stream, input, gradient, dweight, workspace)
            }
            Kind::Depthwise => {
                let problem = "the gradient of its weights comes with that of its input".into();
                Err(Error::Shape { operation: "depthwise convolution", problem })
            }
            Kind::Pointwise => {
                let plan = self
                    .pointwise
                    .get(key, || Pointwise::plan_with(device, x, conv.outputs, dtype, choices()))?;
                let workspace = scratch.with(device, plan.workspace_floats())?;
                plan.wgrad(stream, input, gradient, dweight, workspace)
            }
        }
    }
}

/// What `tuning` chooses; the rules without one.
pub(super) fn choices(tuning: Option<&Tuning>, conv: &Conv, x: Shape, dtype: Dtype) -> Choices {
    tuning.map_or_else(Choices::default, |tuning| tuning.choices(conv, x, dtype))
}

/// Which family computes a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Dense, on images.
    Stem,
    /// Dense, on activations.
    Dense,
    Depthwise,
    Pointwise,
}

impl Kind {
    pub(super) fn of(conv: &Conv) -> Self {
        match conv.kind {
            ConvKind::Dense if conv.inputs == 3 => Self::Stem,
            ConvKind::Dense => Self::Dense,
            ConvKind::Depthwise => Self::Depthwise,
            ConvKind::Pointwise => Self::Pointwise,
        }
    }
}

/// What the stem reads.
fn images<'a, 'b, T>(input: &Input<'a, 'b, T>) -> Result<StemInput<'a, 'b, T>> {
    match input {
        Input::Plain(x) => Ok(StemInput::Elements(x)),
        Input::Silu { .. } | Input::Gated { .. } => {
            Err(Error::Shape { operation: "stem", problem: "it reads images, which owe nothing".into() })
        }
    }
}
