//! Parameters, multiply-adds and activations, stage by stage.
//!
//! Multiply-adds are those of convolutions (squeeze-excitation included) and the classifier, which is what the papers call
//! FLOPs. Activation elements are the outputs of convolutions and of the classifier.

use crate::nn::{BlockKind, BlockSpec, NetworkSpec};

/// What one part of the network costs, for one image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerCount {
    /// Trainable values.
    pub parameters: usize,
    /// Running means and variances.
    pub statistics: usize,
    /// Multiply-adds.
    pub macs: usize,
    /// Elements of convolution outputs.
    pub activations: usize,
    /// Batch norms.
    pub batch_norms: usize,
}

impl std::ops::AddAssign for LayerCount {
    fn add_assign(&mut self, other: Self) {
        self.parameters += other.parameters;
        self.statistics += other.statistics;
        self.macs += other.macs;
        self.activations += other.activations;
        self.batch_norms += other.batch_norms;
    }
}

impl LayerCount {
    /// A convolution with `weights` weights and its batch norm, whose output has `outputs` channels on `pixels` pixels.
    const fn conv_norm(weights: usize, outputs: usize, pixels: usize) -> Self {
        Self {
            parameters: weights + 2 * outputs,
            statistics: 2 * outputs,
            macs: weights * pixels,
            activations: outputs * pixels,
            batch_norms: 1,
        }
    }

    /// A fully connected layer with bias.
    const fn linear(inputs: usize, outputs: usize) -> Self {
        Self {
            parameters: inputs * outputs + outputs,
            statistics: 0,
            macs: inputs * outputs,
            activations: outputs,
            batch_norms: 0,
        }
    }
}

/// One stage of a summary.
#[derive(Clone, Debug, PartialEq)]
pub struct StageCount {
    /// "stem", the stage's number or "head".
    pub name: String,
    /// The first block; none for stem and head.
    pub first: Option<BlockSpec>,
    /// Blocks, or 1.
    pub repeats: usize,
    /// Input channels.
    pub inputs: usize,
    /// Output channels.
    pub outputs: usize,
    /// Side of the output.
    pub side: usize,
    /// What it costs.
    pub count: LayerCount,
}

/// A network at one image size.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Stem, stages, head.
    pub stages: Vec<StageCount>,
    /// Their sum.
    pub total: LayerCount,
}

/// Counts one block whose input is `side` pixels wide; its output side follows.
fn count_block(block: &BlockSpec, side: usize) -> (LayerCount, usize) {
    let out = side.div_ceil(block.stride);
    let (input_pixels, pixels) = (side * side, out * out);
    let (inputs, mid, outputs) = (block.inputs, block.expanded(), block.outputs);
    let area = block.kernel * block.kernel;
    let mut count = LayerCount::default();
    match block.kind {
        BlockKind::FusedMbConv if block.expansion == 1 => {
            count += LayerCount::conv_norm(area * inputs * outputs, outputs, pixels);
        }
        BlockKind::FusedMbConv => {
            count += LayerCount::conv_norm(area * inputs * mid, mid, pixels);
            count += LayerCount::conv_norm(mid * outputs, outputs, pixels);
        }
        BlockKind::MbConv => {
            if block.expansion != 1 {
                count += LayerCount::conv_norm(inputs * mid, mid, input_pixels);
            }
            count += LayerCount::conv_norm(area * mid, mid, pixels);
            if let Some(squeeze) = block.squeeze {
                count += LayerCount::linear(mid, squeeze);
                count += LayerCount::linear(squeeze, mid);
            }
            count += LayerCount::conv_norm(mid * outputs, outputs, pixels);
        }
    }
    (count, out)
}

/// What one block costs on an image whose input to it is `side` pixels wide.
pub fn block_count(block: &BlockSpec, side: usize) -> LayerCount {
    count_block(block, side).0
}

/// What `network` costs on one image of `size` × `size` pixels.
pub fn summarise(network: &NetworkSpec, size: usize) -> Summary {
    let mut side = size.div_ceil(2);
    let stem = LayerCount::conv_norm(27 * network.stem, network.stem, side * side);
    let row = |name: String, first, repeats, inputs, outputs, side, count| StageCount {
        name,
        first,
        repeats,
        inputs,
        outputs,
        side,
        count,
    };
    let mut stages = vec![row("stem".into(), None, 1, 3, network.stem, side, stem)];
    let mut channels = network.stem;
    for (index, stage) in network.stages.iter().enumerate() {
        let mut count = LayerCount::default();
        for block in &stage.blocks {
            let (block, out) = count_block(block, side);
            count += block;
            side = out;
        }
        let (inputs, first) = (channels, stage.blocks.first().copied());
        channels = stage.blocks.last().map_or(channels, |b| b.outputs);
        stages.push(row(index.to_string(), first, stage.blocks.len(), inputs, channels, side, count));
    }
    let mut head = LayerCount::conv_norm(channels * network.head, network.head, side * side);
    head += LayerCount::linear(network.head, network.classes);
    stages.push(row("head".into(), None, 1, channels, network.classes, side, head));
    let mut total = LayerCount::default();
    stages.iter().for_each(|stage| total += stage.count);
    Summary { stages, total }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;
    use crate::nn::Network;

    /// name, parameters, batch-norm statistics, batch norms, [(side, GMAC)]
    type Oracle = (&'static str, usize, usize, usize, &'static [(usize, f64)]);

    /// Totals of timm, torchvision and google/automl.
    const V2: &[Oracle] = &[
        ("b0", 7_139_704, 60_608, 59, &[(224, 0.718), (192, 0.528)]),
        ("b1", 8_141_052, 71_072, 73, &[(240, 1.197), (192, 0.747)]),
        ("b2", 10_096_086, 82_288, 76, &[(260, 1.698), (208, 1.043)]),
        ("b3", 14_358_406, 109_216, 88, &[(300, 3.011), (240, 1.908)]),
        ("s", 21_458_488, 153_872, 110, &[(384, 8.366), (300, 5.308), (224, 2.850)]),
        ("m", 54_139_356, 292_032, 157, &[(480, 24.582), (384, 15.737)]),
        ("l", 118_515_272, 512_576, 217, &[(480, 56.080), (384, 35.899)]),
        ("xl", 208_119_808, 777_024, 278, &[(512, 93.353), (384, 52.529)]),
    ];

    /// name, parameters, with batch-norm statistics, side, GMAC
    const V1: &[(&str, usize, usize, usize, f64)] = &[
        ("v1-b0", 5_288_548, 5_330_564, 224, 0.386),
        ("v1-b1", 7_794_184, 7_856_232, 240, 0.687),
        ("v1-b2", 9_109_994, 9_177_562, 260, 0.994),
        ("v1-b3", 12_233_232, 12_320_528, 300, 1.827),
        ("v1-b4", 19_341_616, 19_466_816, 380, 4.394),
        ("v1-b5", 30_389_784, 30_562_520, 456, 10.266),
        ("v1-b6", 43_040_704, 43_265_136, 528, 19.068),
        ("v1-b7", 66_347_960, 66_658_680, 600, 37.746),
    ];

    fn check(
        name: &str,
        parameters: usize,
        statistics: usize,
        batch_norms: Option<usize>,
        macs: &[(usize, f64)],
    ) {
        let spec = Architecture::find(name).unwrap().network(1000);
        for &(size, gmac) in macs {
            let total = summarise(&spec, size).total;
            assert_eq!(total.parameters, parameters, "{name}: parameters");
            assert_eq!(total.statistics, statistics, "{name}: statistics");
            assert_eq!(
                format!("{:.3}", total.macs as f64 / 1e9),
                format!("{gmac:.3}"),
                "{name}@{size}: GMAC"
            );
            if let Some(expected) = batch_norms {
                assert_eq!(total.batch_norms, expected, "{name}: batch norms");
            }
        }
        let network = Network::new(spec);
        assert_eq!(network.layout().param_count(), parameters, "{name}: layout");
        assert_eq!(network.layout().stat_count(), statistics, "{name}: layout");
    }

    #[test]
    fn v2_totals_match_every_published_row() {
        for &(name, parameters, statistics, batch_norms, macs) in V2 {
            check(name, parameters, statistics, Some(batch_norms), macs);
        }
    }

    #[test]
    fn v1_totals_match_every_published_row() {
        for &(name, parameters, with_statistics, size, gmac) in V1 {
            check(name, parameters, with_statistics - parameters, None, &[(size, gmac)]);
        }
    }

    /// Elements of convolution outputs an image, in millions.
    #[test]
    fn activations_match_the_published_mix() {
        for (name, size, millions) in
            [("b0", 224, "4.77"), ("b3", 300, "15.74"), ("s", 300, "22.73"), ("v1-b7", 600, "289.94")]
        {
            let spec = Architecture::find(name).unwrap().network(1000);
            let count = summarise(&spec, size).total.activations;
            assert_eq!(format!("{:.2}", count as f64 / 1e6), millions, "{name}@{size}");
        }
    }
}
