//! A network resolved to numbers: what every block is, no coefficient left to apply.

use crate::backend::{DropPath, VarianceEstimator};
use crate::tensor::Padding;
use serde::{Deserialize, Serialize};

/// Which block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum BlockKind {
    /// One dense k×k convolution expands, one 1×1 convolution projects; with expansion 1 a single k×k convolution.
    #[serde(rename = "fused")]
    FusedMbConv,
    /// 1×1 expands, depthwise k×k filters, squeeze-excitation gates, 1×1 projects.
    #[serde(rename = "mbconv")]
    MbConv,
}

/// One block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockSpec {
    /// Fused-MBConv or MBConv.
    pub kind: BlockKind,
    /// Side of the dense or depthwise kernel.
    pub kernel: usize,
    /// Of that convolution.
    pub stride: usize,
    /// Expanded channels over input channels.
    pub expansion: usize,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Channels inside the squeeze-excitation, if there is one.
    pub squeeze: Option<usize>,
    /// The probability that stochastic depth drops the branch of an image.
    pub drop_path: f64,
}

impl BlockSpec {
    /// Channels between the first and the last convolution.
    pub const fn expanded(&self) -> usize {
        self.inputs * self.expansion
    }

    /// Whether the input is added to the output: same size, same channels.
    pub const fn has_skip(&self) -> bool {
        self.stride == 1 && self.inputs == self.outputs
    }

    /// Stochastic depth of the block with this index; it acts only where there is a skip connection.
    pub fn drop_path(&self, index: usize) -> Option<DropPath> {
        let block = u16::try_from(index).expect("a network has fewer than 65,536 blocks");
        (self.has_skip() && self.drop_path > 0.0).then_some(DropPath { rate: self.drop_path, block })
    }
}

/// Blocks in a row that share kind, kernel, expansion and output channels.
#[derive(Clone, Debug, PartialEq)]
pub struct StageSpec {
    /// The first one carries the stride.
    pub blocks: Vec<BlockSpec>,
}

/// Batch normalisation, the same in the whole network.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchNormSpec {
    /// Added to the variance.
    pub epsilon: f64,
    /// The weight of the new statistic in the running one (PyTorch's convention).
    pub momentum: f64,
    /// Which variance the running statistic keeps.
    pub variance: VarianceEstimator,
}

/// A whole network.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkSpec {
    /// Its name.
    pub name: String,
    /// Output channels of the stem, a 3×3 convolution of stride 2 on RGB.
    pub stem: usize,
    /// The stages.
    pub stages: Vec<StageSpec>,
    /// Output channels of the last 1×1 convolution.
    pub head: usize,
    /// Logits.
    pub classes: usize,
    /// How strided convolutions meet the border.
    pub padding: Padding,
    /// Constants of batch normalisation.
    pub batch_norm: BatchNormSpec,
}
