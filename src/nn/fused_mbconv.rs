//! Fused-MBConv: conv k×k (expand) → BN → SiLU → conv 1×1 (project) → BN → + input. With expansion 1 there is one
//! convolution and its activation stays: conv k×k → BN → SiLU → + input.

use super::layout::Layout;
use super::spec::{BatchNormSpec, BlockSpec};
use crate::Result;
use crate::backend::{Activation, Backend, ConvNorm, DropPath, Gradient, Load, Mode, Raw, Variables};
use crate::tensor::{Conv, ConvKind, Padding};

/// A Fused-MBConv block.
#[derive(Clone, Debug, PartialEq)]
pub struct FusedMbConv {
    /// k×k, inputs → expanded; absent with expansion 1.
    pub expand: Option<ConvNorm>,
    /// 1×1, expanded → outputs; with expansion 1 the k×k convolution.
    pub project: ConvNorm,
    /// Whether the input is added.
    pub skip: bool,
    /// Stochastic depth.
    pub drop: Option<DropPath>,
}

/// What its backward needs.
#[derive(Debug)]
pub(super) struct Tape<B: Backend> {
    expanded: Option<Raw<B>>,
    projected: Raw<B>,
}

impl FusedMbConv {
    /// Lays out the block called `name`, which is the `index`-th of its network.
    pub(super) fn new(
        name: &str,
        index: usize,
        spec: &BlockSpec,
        padding: Padding,
        norm: &BatchNormSpec,
        layout: &mut Layout,
    ) -> Self {
        let &BlockSpec { kernel, stride, inputs, outputs, .. } = spec;
        let dense = |outputs| Conv { kind: ConvKind::Dense, kernel, stride, padding, inputs, outputs };
        let mut layer = |conv: &str, bn: &str, shape| {
            layout.conv_norm(&format!("{name}.{conv}"), &format!("{name}.{bn}"), shape, norm)
        };
        let (expand, project) = if spec.expansion == 1 {
            (None, layer("conv", "bn1", dense(outputs)))
        } else {
            let expanded = spec.expanded();
            let kind = ConvKind::Pointwise;
            let point = Conv { kind, kernel: 1, stride: 1, padding, inputs: expanded, outputs };
            (Some(layer("conv_exp", "bn1", dense(expanded))), layer("conv_pwl", "bn2", point))
        };
        Self { expand, project, skip: spec.has_skip(), drop: spec.drop_path(index) }
    }

    /// The activation of the last convolution.
    const fn last_activation(&self) -> Activation {
        match self.expand {
            Some(_) => Activation::Identity,
            None => Activation::Silu,
        }
    }

    pub(super) fn forward<B: Backend>(
        &self,
        backend: &mut B,
        x: &B::Activation,
        vars: &mut Variables<B>,
        mode: Mode,
    ) -> Result<(B::Activation, Tape<B>)> {
        let expanded = self
            .expand
            .as_ref()
            .map(|expand| backend.conv_norm(expand, Load::Plain(x), vars, mode))
            .transpose()?;
        let source = expanded.as_ref().map_or(Load::Plain(x), Load::Silu);
        let projected = backend.conv_norm(&self.project, source, vars, mode)?;
        let drop = if mode == Mode::Train { self.drop } else { None };
        let out = backend.merge(&projected, self.last_activation(), self.skip.then_some(x), drop)?;
        Ok((out, Tape { expanded, projected }))
    }

    /// The block's output in inference.
    pub(super) fn infer<B: Backend>(
        &self,
        backend: &mut B,
        x: &B::Activation,
        vars: &mut Variables<B>,
    ) -> Result<B::Activation> {
        let (act, skip) = (self.last_activation(), self.skip.then_some(x));
        let Some(expand) = &self.expand else {
            return backend.infer(&self.project, Load::Plain(x), act, skip, vars);
        };
        let expanded = backend.infer(expand, Load::Plain(x), Activation::Silu, None, vars)?;
        backend.infer(&self.project, Load::Plain(&expanded), act, skip, vars)
    }

    /// The gradient of the block's input `x`, given that of its output.
    pub(super) fn backward<B: Backend>(
        &self,
        backend: &mut B,
        x: &B::Activation,
        tape: Tape<B>,
        grad: &B::Activation,
        vars: &mut Variables<B>,
    ) -> Result<B::Activation> {
        let Tape { expanded, projected } = tape;
        let last = (&self.project, &projected);
        let (dz, owed) = backend.merge_backward(last, self.last_activation(), self.drop, grad, vars)?;
        let gradient = dz.as_ref().unwrap_or(grad);
        let projection = Gradient { gradient, raw: &projected, owed: &owed };
        let skip = self.skip.then_some(grad);
        match (&self.expand, &expanded) {
            (Some(expand), Some(expanded)) => {
                let (dz, owed) =
                    backend.conv_backward_silu(&self.project, (expand, expanded), projection, vars)?;
                drop(projected);
                let expansion = Gradient { gradient: &dz, raw: expanded, owed: &owed };
                backend.conv_backward(expand, x, expansion, skip, vars)
            }
            _ => backend.conv_backward(&self.project, x, projection, skip, vars),
        }
    }
}
