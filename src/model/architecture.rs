//! Every architecture of the paper and its baseline, as one table, and the rules that scale it.
//!
//! Sources: google/automl `efficientnetv2/effnetv2_configs.py` (V2), Tan & Le 2019 (V1). S, M, L and XL are written out;
//! B0–B3 and V1's B0–B7 are one template each, scaled in width and depth.

use crate::backend::Normalisation;
use crate::nn::{BatchNormSpec, BlockKind, BlockSpec, NetworkSpec, StageSpec};
use crate::tensor::Padding;
use crate::{Error, Result};
use BlockKind::{FusedMbConv, MbConv};
use serde::{Deserialize, Serialize};

/// Stochastic depth of every published network: a survival of 0.8 after the last block.
const DROP_PATH: f64 = 0.2;

/// A stage before scaling.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageTemplate {
    /// Fused-MBConv or MBConv.
    pub kind: BlockKind,
    /// Side of the dense or depthwise kernel.
    pub kernel: usize,
    /// Of the first block.
    pub stride: usize,
    /// Expanded channels over input channels.
    pub expansion: usize,
    /// Output channels.
    pub channels: usize,
    /// Blocks.
    pub repeats: usize,
    /// Squeezed channels over the block's input channels; 0 for no squeeze-excitation.
    pub squeeze_ratio: f64,
}

/// How a scaled width becomes a multiple of eight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WidthRounding {
    /// To the nearest multiple.
    Nearest,
    /// To the nearest, but up where that would lose more than a tenth (EfficientNet V1).
    AtLeastNineTenths,
}

impl WidthRounding {
    /// `channels` × `width` as a multiple of eight, at least eight.
    pub fn round(self, channels: usize, width: f64) -> usize {
        let exact = channels as f64 * width;
        let nearest = ((exact + 4.0) as usize / 8 * 8).max(8);
        match self {
            Self::AtLeastNineTenths if (nearest as f64) < 0.9 * exact => nearest + 8,
            _ => nearest,
        }
    }
}

/// An architecture: a template, the coefficients that scale it and the sizes it is used at.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    /// The short name, as the program takes it.
    pub name: String,
    /// Output channels of the stem, before scaling.
    pub stem: usize,
    /// The stages, before scaling.
    pub stages: Vec<StageTemplate>,
    /// Output channels of the last 1×1 convolution, before scaling.
    pub head: usize,
    /// Multiplies channels.
    pub width: f64,
    /// Multiplies repeats.
    pub depth: f64,
    /// How scaled channels are rounded.
    pub rounding: WidthRounding,
    /// The side of images in training.
    pub train_size: usize,
    /// The side of images in evaluation.
    pub eval_size: usize,
    /// Dropout before the classifier.
    pub dropout: f64,
    /// What stochastic depth would reach after the last block: block i of N is dropped with i/N of it.
    pub drop_path: f64,
    /// How strided convolutions meet the border.
    pub padding: Padding,
    /// Constants of batch normalisation.
    pub batch_norm: BatchNormSpec,
    /// How images become input.
    pub normalisation: Normalisation,
}

/// kind, kernel, stride, expansion, channels, repeats, squeeze ratio
type Row = (BlockKind, usize, usize, usize, usize, usize, f64);

const SMALL: &[Row] = &[
    (FusedMbConv, 3, 1, 1, 24, 2, 0.0),
    (FusedMbConv, 3, 2, 4, 48, 4, 0.0),
    (FusedMbConv, 3, 2, 4, 64, 4, 0.0),
    (MbConv, 3, 2, 4, 128, 6, 0.25),
    (MbConv, 3, 1, 6, 160, 9, 0.25),
    (MbConv, 3, 2, 6, 256, 15, 0.25),
];

const MEDIUM: &[Row] = &[
    (FusedMbConv, 3, 1, 1, 24, 3, 0.0),
    (FusedMbConv, 3, 2, 4, 48, 5, 0.0),
    (FusedMbConv, 3, 2, 4, 80, 5, 0.0),
    (MbConv, 3, 2, 4, 160, 7, 0.25),
    (MbConv, 3, 1, 6, 176, 14, 0.25),
    (MbConv, 3, 2, 6, 304, 18, 0.25),
    (MbConv, 3, 1, 6, 512, 5, 0.25),
];

const LARGE: &[Row] = &[
    (FusedMbConv, 3, 1, 1, 32, 4, 0.0),
    (FusedMbConv, 3, 2, 4, 64, 7, 0.0),
    (FusedMbConv, 3, 2, 4, 96, 7, 0.0),
    (MbConv, 3, 2, 4, 192, 10, 0.25),
    (MbConv, 3, 1, 6, 224, 19, 0.25),
    (MbConv, 3, 2, 6, 384, 25, 0.25),
    (MbConv, 3, 1, 6, 640, 7, 0.25),
];

const EXTRA_LARGE: &[Row] = &[
    (FusedMbConv, 3, 1, 1, 32, 4, 0.0),
    (FusedMbConv, 3, 2, 4, 64, 8, 0.0),
    (FusedMbConv, 3, 2, 4, 96, 8, 0.0),
    (MbConv, 3, 2, 4, 192, 16, 0.25),
    (MbConv, 3, 1, 6, 256, 24, 0.25),
    (MbConv, 3, 2, 6, 512, 32, 0.25),
    (MbConv, 3, 1, 6, 640, 8, 0.25),
];

/// V2's B0, the template of B0–B3.
const BASE: &[Row] = &[
    (FusedMbConv, 3, 1, 1, 16, 1, 0.0),
    (FusedMbConv, 3, 2, 4, 32, 2, 0.0),
    (FusedMbConv, 3, 2, 4, 48, 2, 0.0),
    (MbConv, 3, 2, 4, 96, 3, 0.25),
    (MbConv, 3, 1, 6, 112, 5, 0.25),
    (MbConv, 3, 2, 6, 192, 8, 0.25),
];

/// V1's B0, the template of the baseline B0–B7.
const BASELINE: &[Row] = &[
    (MbConv, 3, 1, 1, 16, 1, 0.25),
    (MbConv, 3, 2, 6, 24, 2, 0.25),
    (MbConv, 5, 2, 6, 40, 2, 0.25),
    (MbConv, 3, 2, 6, 80, 3, 0.25),
    (MbConv, 5, 1, 6, 112, 3, 0.25),
    (MbConv, 5, 2, 6, 192, 4, 0.25),
    (MbConv, 3, 1, 6, 320, 1, 0.25),
];

/// A toy with every kind of block, for small images and exhaustive checks.
const NANO: &[Row] = &[
    (FusedMbConv, 3, 1, 1, 8, 1, 0.0),
    (FusedMbConv, 3, 2, 4, 16, 2, 0.0),
    (MbConv, 3, 2, 4, 24, 2, 0.25),
    (MbConv, 5, 1, 6, 32, 1, 0.25),
];

use WidthRounding::{AtLeastNineTenths, Nearest};

const HALF: Normalisation = Normalisation::HALF;
const IMAGENET: Normalisation = Normalisation::IMAGENET;

/// name, stem, stages, head, width, depth, rounding, train side, eval side, dropout, normalisation
type Entry =
    (&'static str, usize, &'static [Row], usize, f64, f64, WidthRounding, usize, usize, f64, Normalisation);

const TABLE: &[Entry] = &[
    ("b0", 32, BASE, 1280, 1.0, 1.0, Nearest, 192, 224, 0.2, IMAGENET),
    ("b1", 32, BASE, 1280, 1.0, 1.1, Nearest, 192, 240, 0.2, IMAGENET),
    ("b2", 32, BASE, 1280, 1.1, 1.2, Nearest, 208, 260, 0.3, IMAGENET),
    ("b3", 32, BASE, 1280, 1.2, 1.4, Nearest, 240, 300, 0.3, IMAGENET),
    ("s", 24, SMALL, 1280, 1.0, 1.0, Nearest, 300, 384, 0.2, HALF),
    ("m", 24, MEDIUM, 1280, 1.0, 1.0, Nearest, 384, 480, 0.3, HALF),
    ("l", 32, LARGE, 1280, 1.0, 1.0, Nearest, 384, 480, 0.4, HALF),
    ("xl", 32, EXTRA_LARGE, 1280, 1.0, 1.0, Nearest, 384, 512, 0.4, HALF),
    ("v1-b0", 32, BASELINE, 1280, 1.0, 1.0, AtLeastNineTenths, 176, 224, 0.2, IMAGENET),
    ("v1-b1", 32, BASELINE, 1280, 1.0, 1.1, AtLeastNineTenths, 192, 240, 0.2, IMAGENET),
    ("v1-b2", 32, BASELINE, 1280, 1.1, 1.2, AtLeastNineTenths, 208, 260, 0.3, IMAGENET),
    ("v1-b3", 32, BASELINE, 1280, 1.2, 1.4, AtLeastNineTenths, 240, 300, 0.3, IMAGENET),
    ("v1-b4", 32, BASELINE, 1280, 1.4, 1.8, AtLeastNineTenths, 304, 380, 0.4, IMAGENET),
    ("v1-b5", 32, BASELINE, 1280, 1.6, 2.2, AtLeastNineTenths, 352, 456, 0.4, IMAGENET),
    ("v1-b6", 32, BASELINE, 1280, 1.8, 2.6, AtLeastNineTenths, 416, 528, 0.5, IMAGENET),
    ("v1-b7", 32, BASELINE, 1280, 2.0, 3.1, AtLeastNineTenths, 480, 600, 0.5, IMAGENET),
    ("nano", 8, NANO, 64, 1.0, 1.0, Nearest, 32, 32, 0.1, HALF),
];

impl Architecture {
    /// The names of the table, in its order.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().map(|row| row.0)
    }

    /// The architecture called `name`: a name of the table, also behind `efficientnetv2-` or as timm and torchvision
    /// spell it (`tf_efficientnetv2_s`, `efficientnet_v2_s`, `efficientnet_b0` for V1).
    ///
    /// # Errors
    /// An [`Error::Usage`] that lists the names when there is none such.
    pub fn find(name: &str) -> Result<Self> {
        let lower = name.to_lowercase().replace('_', "-");
        let plain = lower.strip_prefix("tf-").unwrap_or(&lower);
        let short = ["efficientnetv2-", "efficientnet-v2-", "v2-"]
            .iter()
            .find_map(|prefix| plain.strip_prefix(prefix).map(str::to_owned))
            .or_else(|| plain.strip_prefix("efficientnet-").map(|rest| format!("v1-{rest}")))
            .unwrap_or_else(|| plain.to_owned());
        let Some(&(
            name,
            stem,
            rows,
            head,
            width,
            depth,
            rounding,
            train_size,
            eval_size,
            dropout,
            normalisation,
        )) = TABLE.iter().find(|row| row.0 == short)
        else {
            let names: Vec<_> = Self::names().collect();
            return Err(Error::usage(
                "model",
                name,
                format!("unknown model; use one of {}", names.join(", ")),
            ));
        };
        let stage = |&(kind, kernel, stride, expansion, channels, repeats, squeeze_ratio): &Row| {
            StageTemplate { kind, kernel, stride, expansion, channels, repeats, squeeze_ratio }
        };
        Ok(Self {
            name: name.into(),
            stem,
            stages: rows.iter().map(stage).collect(),
            head,
            width,
            depth,
            rounding,
            train_size,
            eval_size,
            dropout,
            drop_path: DROP_PATH,
            padding: Padding::Same,
            normalisation,
            batch_norm: BatchNormSpec { epsilon: 1e-3, momentum: 0.1, variance: Default::default() },
        })
    }

    /// The network with `classes` logits: widths and depths scaled, strides, squeeze widths and drop rates dealt out.
    pub fn network(&self, classes: usize) -> NetworkSpec {
        let width = |channels| self.rounding.round(channels, self.width);
        let repeats = |n: usize| (self.depth * n as f64).ceil() as usize;
        let total: usize = self.stages.iter().map(|s| repeats(s.repeats)).sum();
        let (mut inputs, mut index) = (width(self.stem), 0_u32);
        let mut stages = Vec::new();
        for stage in &self.stages {
            let mut blocks = Vec::new();
            for position in 0..repeats(stage.repeats) {
                let squeezed = (inputs as f64 * stage.squeeze_ratio) as usize;
                blocks.push(BlockSpec {
                    kind: stage.kind,
                    kernel: stage.kernel,
                    stride: if position == 0 { stage.stride } else { 1 },
                    expansion: stage.expansion,
                    inputs,
                    outputs: width(stage.channels),
                    squeeze: (stage.squeeze_ratio > 0.0).then_some(squeezed.max(1)),
                    drop_path: self.drop_path * f64::from(index) / total as f64,
                });
                inputs = width(stage.channels);
                index += 1;
            }
            stages.push(StageSpec { blocks });
        }
        NetworkSpec {
            name: self.name.clone(),
            stem: width(self.stem),
            stages,
            head: width(self.head),
            classes,
            padding: self.padding,
            batch_norm: self.batch_norm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_other_libraries_are_understood() {
        for (theirs, ours) in [
            ("tf_efficientnetv2_b0", "b0"),
            ("efficientnet_v2_s", "s"),
            ("EfficientNetV2-XL", "xl"),
            ("efficientnet_b7", "v1-b7"),
            ("nano", "nano"),
        ] {
            assert_eq!(Architecture::find(theirs).unwrap().name, ours);
        }
        let error = Architecture::find("huge").unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("huge") && error.to_string().contains("nano"), "{error}");
    }

    #[test]
    fn the_nine_tenths_rule_separates_the_families() {
        assert_eq!(Nearest.round(16, 1.2), 16);
        assert_eq!(AtLeastNineTenths.round(16, 1.2), 24);
    }

    /// Stage tables of the paper's released code: widths, repeats and squeeze widths of first and later blocks.
    #[test]
    fn b3_resolves_to_the_released_network() {
        let b3 = Architecture::find("b3").unwrap().network(1000);
        let widths: Vec<_> = b3.stages.iter().map(|s| s.blocks[0].outputs).collect();
        let repeats: Vec<_> = b3.stages.iter().map(|s| s.blocks.len()).collect();
        assert_eq!((b3.stem, b3.head), (40, 1536));
        assert_eq!(widths, [16, 40, 56, 112, 136, 232]);
        assert_eq!(repeats, [2, 3, 3, 5, 7, 12]);
        assert_eq!(b3.stages[5].blocks[0].squeeze, Some(34));
        assert_eq!(b3.stages[5].blocks[1].squeeze, Some(58));
        let last = b3.stages[5].blocks[11].drop_path;
        assert!((last - 0.19375).abs() < 1e-12, "{last}");
    }
}
