//! The least a block must move and compute, and how long a GPU needs for that at least.
//!
//! The dataflow counted is the one of this crate ([`crate::backend`]): only raw convolution outputs and block outputs are
//! stored, batch norm, SiLU and gate are applied on load, batch-norm sums come out of epilogues, the backward of batch norm is
//! applied on load. Every tensor counts once for each launch that needs it; halos of tiles, caches between launches and
//! the gaps between them do not count. So it is a floor and no forecast: real code stays above it.

use crate::nn::{BlockKind, BlockSpec, NetworkSpec};
use crate::tensor::{Conv, ConvKind, Dtype, Shape};
use serde::Serialize;

/// What one launch moves and computes at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Least {
    /// Bytes to and from memory.
    pub bytes: u64,
    /// Operations of dense products: a multiply-add counts two.
    pub dense: u64,
    /// Other multiply-adds, also counted two each.
    pub other: u64,
}

/// What a GPU reaches at best.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ceiling {
    /// Bytes a second, read and written.
    pub bandwidth: f64,
    /// Operations a second of dense products on tensor cores in f16 and bf16.
    pub tensor: f64,
    /// Operations a second in f32.
    pub plain: f64,
}

/// Words that the driver's name of a GPU holds, and what it reaches: its data sheet less what copies and large matrix
/// products are known to lose.
const CEILINGS: &[(&[&str], Ceiling)] = &[
    (&["H200"], Ceiling { bandwidth: 4.30e12, tensor: 790e12, plain: 55e12 }),
    (&["H100", "HBM3"], Ceiling { bandwidth: 3.00e12, tensor: 750e12, plain: 55e12 }),
    (&["A100", "80GB"], Ceiling { bandwidth: 1.75e12, tensor: 255e12, plain: 17e12 }),
    (&["RTX 3090"], Ceiling { bandwidth: 0.83e12, tensor: 66e12, plain: 28e12 }),
    (&["RTX 4090"], Ceiling { bandwidth: 0.92e12, tensor: 155e12, plain: 66e12 }),
];

impl Ceiling {
    /// Of the GPU that the driver calls `name`; none when it is not known.
    pub fn of(name: &str) -> Option<Self> {
        let known = |(words, _): &&(&[&str], Self)| words.iter().all(|word| name.contains(word));
        CEILINGS.iter().find(known).map(|(_, ceiling)| *ceiling)
    }

    /// The least seconds for `launches` one after the other.
    pub fn seconds(&self, launches: &[Least], dtype: Dtype) -> f64 {
        let dense = match dtype {
            Dtype::F32 => self.plain,
            // Twice as wide as f16, half as many at a time.
            Dtype::Tf32 => self.tensor / 2.0,
            Dtype::F16 | Dtype::Bf16 => self.tensor,
        };
        let one = |least: &Least| {
            (least.bytes as f64 / self.bandwidth)
                .max(least.dense as f64 / dense)
                .max(least.other as f64 / self.plain)
        };
        launches.iter().map(one).sum()
    }
}

/// One convolution, for one image.
pub(super) struct Layer {
    /// Elements read.
    input: usize,
    /// Elements written.
    output: usize,
    weights: usize,
    macs: usize,
    depthwise: bool,
    /// Whether what it reads is a raw output that owes batch norm and SiLU.
    from_raw: bool,
}

impl Layer {
    /// `conv` with `weights` weights on an input of `x`'s rows, columns and channels.
    pub(super) fn of(conv: &Conv, weights: usize, x: Shape, from_raw: bool) -> Self {
        let pixels = conv.output_side(x.h) * conv.output_side(x.w);
        Self {
            input: x.h * x.w * conv.inputs,
            output: pixels * conv.outputs,
            weights,
            macs: weights * pixels,
            depthwise: conv.kind == ConvKind::Depthwise,
            from_raw,
        }
    }

    fn least(
        &self,
        tensors: usize,
        weight_bytes: usize,
        macs: usize,
        images: usize,
        element: usize,
    ) -> Least {
        let operations = 2 * macs as u64 * images as u64;
        let bytes = (tensors * images * element + weight_bytes) as u64;
        match self.depthwise {
            true => Least { bytes, dense: 0, other: operations },
            false => Least { bytes, dense: operations, other: 0 },
        }
    }

    pub(super) fn forward(&self, images: usize, element: usize) -> Least {
        self.least(self.input + self.output, self.weights * element, self.macs, images, element)
    }

    /// Gradients of input and weights; `skip` elements are added to the former. A gradient arrives as g and the raw
    /// output that it belongs to.
    pub(super) fn backward(&self, skip: usize, images: usize, element: usize) -> Vec<Least> {
        let Self { input, output, weights, macs, .. } = *self;
        let gradient = 2 * output;
        if self.depthwise {
            let (tensors, accumulated) = (gradient + 2 * input + skip, 8 * weights);
            return vec![self.least(tensors, weights * element + accumulated, 2 * macs, images, element)];
        }
        let producer = if self.from_raw { input } else { 0 };
        vec![
            self.least(gradient + input + producer + skip, weights * element, macs, images, element),
            self.backward_weights(images, element),
        ]
    }

    /// The gradient of the weights alone, which is f32 and added to what is there.
    pub(super) fn backward_weights(&self, images: usize, element: usize) -> Least {
        self.least(2 * self.output + self.input, 8 * self.weights, self.macs, images, element)
    }
}

/// The convolutions of a block whose input is `side` pixels wide.
fn layers(block: &BlockSpec, side: usize) -> Vec<Layer> {
    let out = side.div_ceil(block.stride);
    let (before, after) = (side * side, out * out);
    let (inputs, middle, outputs) = (block.inputs, block.expanded(), block.outputs);
    let area = block.kernel * block.kernel;
    let dense = |weights: usize, input, output, pixels: usize, from_raw| Layer {
        input,
        output,
        weights,
        macs: weights * pixels,
        depthwise: false,
        from_raw,
    };
    match block.kind {
        BlockKind::FusedMbConv if block.expansion == 1 => {
            vec![dense(area * inputs * outputs, inputs * before, outputs * after, after, false)]
        }
        BlockKind::FusedMbConv => vec![
            dense(area * inputs * middle, inputs * before, middle * after, after, false),
            dense(middle * outputs, middle * after, outputs * after, after, true),
        ],
        BlockKind::MbConv => {
            let expands = block.expansion != 1;
            let expand = dense(inputs * middle, inputs * before, middle * before, before, false);
            let filter = Layer {
                input: middle * before,
                output: middle * after,
                weights: area * middle,
                macs: area * middle * after,
                depthwise: true,
                from_raw: expands,
            };
            let project = dense(middle * outputs, middle * after, outputs * after, after, true);
            expands.then_some(expand).into_iter().chain([filter, project]).collect()
        }
    }
}

/// So many elements an image, read or written once.
pub(super) const fn moved(elements: usize, images: usize, element: usize) -> Least {
    Least { bytes: (elements * images * element) as u64, dense: 0, other: 0 }
}

/// The launches of a block's forward in training, input `side` pixels wide.
pub fn block_forward(block: &BlockSpec, side: usize, images: usize, dtype: Dtype) -> Vec<Least> {
    let layers = layers(block, side);
    let element = dtype.bytes();
    let mut launches: Vec<Least> = layers.iter().map(|layer| layer.forward(images, element)).collect();
    if block.squeeze.is_some() {
        // The pool of the squeeze-excitation reads what it gates once more.
        let gated = layers.last().map_or(0, |project| project.input);
        launches.push(moved(gated, images, element));
    }
    let output = layers.last().map_or(0, |layer| layer.output);
    let skip = if block.has_skip() { output } else { 0 };
    launches.push(moved(2 * output + skip, images, element));
    launches
}

/// The launches of its backward.
pub fn block_backward(block: &BlockSpec, side: usize, images: usize, dtype: Dtype) -> Vec<Least> {
    let layers = layers(block, side);
    let element = dtype.bytes();
    let output = layers.last().map_or(0, |layer| layer.output);
    // The sums of the last batch norm; behind an activation also the gradient before it.
    let activated = block.kind == BlockKind::FusedMbConv && block.expansion == 1;
    let mut launches = vec![moved(if activated { 3 } else { 2 } * output, images, element)];
    for (i, layer) in layers.iter().enumerate().rev() {
        let skip = if i == 0 && block.has_skip() { output } else { 0 };
        launches.extend(layer.backward(skip, images, element));
    }
    launches
}

/// The launches of a training step of a whole network, without loss and optimizer.
pub fn training_step(network: &NetworkSpec, size: usize, images: usize, dtype: Dtype) -> Vec<Least> {
    let element = dtype.bytes();
    let mut side = size.div_ceil(2);
    let pixels = side * side;
    let dense = |inputs: usize, outputs: usize, weights: usize, read: usize, pixels: usize| Layer {
        input: inputs * read,
        output: outputs * pixels,
        weights,
        macs: weights * pixels,
        depthwise: false,
        from_raw: false,
    };
    let stem = dense(3, network.stem, 27 * network.stem, size * size, pixels);
    let mut launches = vec![stem.forward(images, element), moved(2 * stem.output, images, element)];
    let (mut backward, mut channels) = (Vec::new(), network.stem);
    backward.push(stem.backward_weights(images, element));
    backward.push(moved(3 * stem.output, images, element));
    for block in network.stages.iter().flat_map(|stage| &stage.blocks) {
        launches.extend(block_forward(block, side, images, dtype));
        backward.extend(block_backward(block, side, images, dtype));
        side = side.div_ceil(block.stride);
        channels = block.outputs;
    }
    let pixels = side * side;
    let head = dense(channels, network.head, channels * network.head, pixels, pixels);
    launches.extend([head.forward(images, element), moved(head.output, images, element)]);
    backward.push(moved(2 * head.output, images, element));
    backward.extend(head.backward(0, images, element));
    launches.extend(backward);
    launches
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Architecture, summarise};

    fn block(kind: BlockKind, expansion: usize, stride: usize, outputs: usize) -> BlockSpec {
        let squeeze = (kind == BlockKind::MbConv).then_some(2);
        BlockSpec { kind, kernel: 3, stride, expansion, inputs: 8, outputs, squeeze, drop_path: 0.0 }
    }

    fn bytes(launches: &[Least]) -> u64 {
        launches.iter().map(|l| l.bytes).sum()
    }

    #[test]
    fn bytes_of_small_blocks_by_hand() {
        // 4 × 4 pixels of 8 channels are 128 elements; expanded by 4, 512.
        let fused = block(BlockKind::FusedMbConv, 4, 1, 8);
        let (dense, point) = (9 * 8 * 32, 32 * 8);
        let forward = (128 + 512) + (512 + 128) + 3 * 128;
        let found = block_forward(&fused, 4, 3, Dtype::Bf16);
        assert_eq!(bytes(&found), 2 * (3 * forward + dense + point));
        // Sums; 1×1: dgrad with the producer, wgrad; 3×3: dgrad with the skip, wgrad.
        let backward =
            2 * 128 + (2 * 128 + 2 * 512) + (2 * 128 + 512) + (2 * 512 + 2 * 128) + (2 * 512 + 128);
        let weights = 2 * (dense + point) + 8 * (dense + point);
        assert_eq!(bytes(&block_backward(&fused, 4, 3, Dtype::Bf16)), 2 * 3 * backward + weights);
        // Stride 2 leaves 2 × 2 pixels; no skip; 16 outputs are 64 elements.
        let mb = block(BlockKind::MbConv, 4, 2, 16);
        let forward = (128 + 512) + (512 + 128) + (128 + 64) + 128 + 2 * 64;
        let weights = 8 * 32 + 9 * 32 + 32 * 16;
        assert_eq!(bytes(&block_forward(&mb, 4, 1, Dtype::F32)), 4 * (forward + weights));
        let backward = 2 * 64
            + (2 * 64 + 2 * 128)
            + (2 * 64 + 128)
            + (2 * 128 + 2 * 512)
            + (2 * 512 + 128)
            + (2 * 512 + 128);
        assert_eq!(bytes(&block_backward(&mb, 4, 1, Dtype::F32)), 4 * backward + 12 * weights);
    }

    #[test]
    fn operations_are_those_of_the_summary() {
        for name in ["s", "b0", "nano", "v1-b0"] {
            let network = Architecture::find(name).unwrap().network(10);
            let side = 64;
            let macs = summarise(&network, side).total.macs;
            // Squeeze-excitation and classifier are left out, and are small; the stem has no gradient of its input.
            let launches = training_step(&network, side, 2, Dtype::Bf16);
            let operations: u64 = launches.iter().map(|l| l.dense + l.other).sum();
            let expected = 2 * 3 * 2 * macs as u64;
            assert!(operations < expected && operations as f64 > 0.93 * expected as f64, "{name}");
        }
    }

    /// An independent count of this dataflow: 399.5 MB an image of 300 px at batch 256 for V2-S, and 8.4 MB for block
    /// outputs written by launches of their own; 96.6 and 2.0 µs on an H200.
    #[test]
    fn the_floor_of_s_is_the_known_one() {
        let network = Architecture::find("s").unwrap().network(1000);
        let launches = training_step(&network, 300, 256, Dtype::Bf16);
        let megabytes = bytes(&launches) as f64 / 256.0 / 1e6;
        assert!((megabytes / 407.9 - 1.0).abs() < 0.05, "{megabytes}");
        let seconds = Ceiling::of("NVIDIA H200").unwrap().seconds(&launches, Dtype::Bf16) / 256.0;
        assert!((seconds / 98.6e-6 - 1.0).abs() < 0.05, "{seconds}");
    }

    #[test]
    fn gpus_are_known_by_name_or_not_at_all() {
        assert_eq!(Ceiling::of("NVIDIA H100 80GB HBM3").unwrap().bandwidth, 3.0e12);
        for unknown in ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "Tesla T4", ""] {
            assert_eq!(Ceiling::of(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn the_slowest_of_three_limits_counts() {
        let ceiling = Ceiling { bandwidth: 10.0, tensor: 100.0, plain: 20.0 };
        let launches = [
            Least { bytes: 20, dense: 100, other: 20 },
            Least { bytes: 0, dense: 400, other: 20 },
            Least { bytes: 0, dense: 0, other: 100 },
        ];
        assert_eq!(ceiling.seconds(&launches, Dtype::Bf16), 2.0 + 4.0 + 5.0);
        assert_eq!(ceiling.seconds(&launches, Dtype::F32), 5.0 + 20.0 + 5.0);
    }
}
