//! A block of either kind: what a network is a row of, and what can be run, and measured, on its own.

use super::layout::Layout;
use super::spec::{BatchNormSpec, BlockKind, BlockSpec};
use super::{FusedMbConv, MbConv, fused_mbconv, mbconv};
use crate::Result;
use crate::backend::{Backend, ConvNorm, Mode, Variables};
use crate::tensor::Padding;

/// One block of either kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Block {
    /// Fused-MBConv.
    Fused(Box<FusedMbConv>),
    /// MBConv.
    Mb(Box<MbConv>),
}

/// What the backward of a block needs; its forward made it.
#[derive(Debug)]
pub struct BlockTape<B: Backend>(Tape<B>);

#[derive(Debug)]
enum Tape<B: Backend> {
    Fused(fused_mbconv::Tape<B>),
    Mb(mbconv::Tape<B>),
}

impl Block {
    /// Lays out the block called `name`, which is the `index`-th of its network.
    pub fn new(
        name: &str,
        index: usize,
        spec: &BlockSpec,
        padding: Padding,
        norm: &BatchNormSpec,
        layout: &mut Layout,
    ) -> Self {
        match spec.kind {
            BlockKind::FusedMbConv => {
                Self::Fused(Box::new(FusedMbConv::new(name, index, spec, padding, norm, layout)))
            }
            BlockKind::MbConv => Self::Mb(Box::new(MbConv::new(name, index, spec, padding, norm, layout))),
        }
    }

    /// Its convolutions, in forward order.
    pub fn convolutions(&self) -> impl Iterator<Item = &ConvNorm> {
        let layers = match self {
            Self::Fused(b) => [b.expand.as_ref(), None, Some(&b.project)],
            Self::Mb(b) => [b.expand.as_ref(), Some(&b.depthwise), Some(&b.project)],
        };
        layers.into_iter().flatten()
    }

    /// The output for the input `x`, and what [`backward`](Self::backward) needs.
    ///
    /// # Errors
    /// What the backend says of shapes and memory.
    pub fn forward<B: Backend>(
        &self,
        backend: &mut B,
        x: &B::Activation,
        vars: &mut Variables<B>,
        mode: Mode,
    ) -> Result<(B::Activation, BlockTape<B>)> {
        Ok(match self {
            Self::Fused(block) => {
                let (out, tape) = block.forward(backend, x, vars, mode)?;
                (out, BlockTape(Tape::Fused(tape)))
            }
            Self::Mb(block) => {
                let (out, tape) = block.forward(backend, x, vars, mode)?;
                (out, BlockTape(Tape::Mb(tape)))
            }
        })
    }

    /// The gradient of the input `x`, given that of the output; the parameters' is added to `vars.grads`.
    ///
    /// # Errors
    /// What the backend says of shapes and memory.
    ///
    /// # Panics
    /// When the tape is of a block of the other kind.
    pub fn backward<B: Backend>(
        &self,
        backend: &mut B,
        x: &B::Activation,
        tape: BlockTape<B>,
        grad: &B::Activation,
        vars: &mut Variables<B>,
    ) -> Result<B::Activation> {
        match (self, tape.0) {
            (Self::Fused(block), Tape::Fused(tape)) => block.backward(backend, x, tape, grad, vars),
            (Self::Mb(block), Tape::Mb(tape)) => block.backward(backend, x, tape, grad, vars),
            _ => panic!("the tape is of a block of the other kind"),
        }
    }
}
