//! MBConv: conv 1×1 (expand) → BN → SiLU → depthwise k×k → BN → SiLU → squeeze-excitation → conv 1×1 (project) → BN →
//! + input. With expansion 1 the first convolution is absent.

use super::layout::Layout;
use super::spec::{BatchNormSpec, BlockSpec};
use crate::Result;
use crate::backend::{
    Activation, Backend, ConvNorm, DropPath, Gradient, Load, Mode, Raw, SqueezeExcite, Variables,
};
use crate::tensor::{Conv, ConvKind, Padding};

/// An MBConv block.
#[derive(Clone, Debug, PartialEq)]
pub struct MbConv {
    /// 1×1, inputs → expanded; absent with expansion 1.
    pub expand: Option<ConvNorm>,
    /// Depthwise k×k.
    pub depthwise: ConvNorm,
    /// The gate, if the block has one.
    pub squeeze: Option<SqueezeExcite>,
    /// 1×1, expanded → outputs.
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
    filtered: Raw<B>,
    gate: Option<B::Gate>,
    projected: Raw<B>,
}

impl MbConv {
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
        let expanded = spec.expanded();
        let point = |inputs, outputs| Conv {
            kind: ConvKind::Pointwise,
            kernel: 1,
            stride: 1,
            padding,
            inputs,
            outputs,
        };
        let filter =
            Conv { kind: ConvKind::Depthwise, kernel, stride, padding, inputs: expanded, outputs: expanded };
        // timm counts batch norms from 1 and calls the projection of a block without expansion `conv_pw`.
        let (first, projection) = if spec.expansion == 1 { (1, "conv_pw") } else { (2, "conv_pwl") };
        let layer = |layout: &mut Layout, conv: &str, bn: usize, shape| {
            layout.conv_norm(&format!("{name}.{conv}"), &format!("{name}.bn{bn}"), shape, norm)
        };
        let expand = (spec.expansion != 1).then(|| layer(layout, "conv_pw", 1, point(inputs, expanded)));
        let depthwise = layer(layout, "conv_dw", first, filter);
        let squeeze =
            spec.squeeze.map(|reduced| layout.squeeze_excite(&format!("{name}.se"), expanded, reduced));
        let project = layer(layout, projection, first + 1, point(expanded, outputs));
        Self { expand, depthwise, squeeze, project, skip: spec.has_skip(), drop: spec.drop_path(index) }
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
        let filtered = backend.conv_norm(&self.depthwise, source, vars, mode)?;
        let gate = self.squeeze.as_ref().map(|se| backend.squeeze_excite(se, &filtered, vars)).transpose()?;
        let gated = gate.as_ref().map_or(Load::Silu(&filtered), |gate| Load::Gated(&filtered, gate));
        let projected = backend.conv_norm(&self.project, gated, vars, mode)?;
        let drop = if mode == Mode::Train { self.drop } else { None };
        let out = backend.merge(&projected, Activation::Identity, self.skip.then_some(x), drop)?;
        Ok((out, Tape { expanded, filtered, gate, projected }))
    }

    /// The block's output in inference. The filtered tensor stays raw: whether there is a gate to wait for or not, the
    /// projection normalises it on load.
    pub(super) fn infer<B: Backend>(
        &self,
        backend: &mut B,
        x: &B::Activation,
        vars: &mut Variables<B>,
    ) -> Result<B::Activation> {
        let expanded = self
            .expand
            .as_ref()
            .map(|expand| backend.infer(expand, Load::Plain(x), Activation::Silu, None, vars))
            .transpose()?;
        let source = Load::Plain(expanded.as_ref().unwrap_or(x));
        let filtered = backend.conv_norm(&self.depthwise, source, vars, Mode::Eval)?;
        drop(expanded);
        let gate = self.squeeze.as_ref().map(|se| backend.squeeze_excite(se, &filtered, vars)).transpose()?;
        let gated = gate.as_ref().map_or(Load::Silu(&filtered), |gate| Load::Gated(&filtered, gate));
        backend.infer(&self.project, gated, Activation::Identity, self.skip.then_some(x), vars)
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
        let Tape { expanded, filtered, gate, projected } = tape;
        let last = (&self.project, &projected);
        let (_, owed) = backend.merge_backward(last, Activation::Identity, self.drop, grad, vars)?;
        let projection = Gradient { gradient: grad, raw: &projected, owed: &owed };
        let producer = (&self.depthwise, &filtered);
        let (dz, owed) = match (&self.squeeze, &gate) {
            (Some(squeeze), Some(gate)) => {
                backend.conv_backward_gated(&self.project, producer, (squeeze, gate), projection, vars)?
            }
            _ => backend.conv_backward_silu(&self.project, producer, projection, vars)?,
        };
        drop(projected);
        let skip = self.skip.then_some(grad);
        let filter = Gradient { gradient: &dz, raw: &filtered, owed: &owed };
        let (Some(expand), Some(expanded)) = (&self.expand, &expanded) else {
            return backend.conv_backward(&self.depthwise, x, filter, skip, vars);
        };
        let producer = (expand, expanded);
        let (expansion, owed) = backend.conv_backward_silu(&self.depthwise, producer, filter, vars)?;
        drop((filtered, dz));
        let expansion = Gradient { gradient: &expansion, raw: expanded, owed: &owed };
        backend.conv_backward(expand, x, expansion, skip, vars)
    }
}
