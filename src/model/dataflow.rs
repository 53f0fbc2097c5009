//! What a training step must move to and from device memory, by how much of it is fused: the yardsticks beside which
//! `plan` sets what the kernels of this crate move.
//!
//! Every pass over a tensor of one convolution's input or output is counted once, reads and writes alike. Not counted:
//! weights, vectors of channels, pixels that tiles read twice, and what a cache still holds.

use crate::nn::{BlockKind, NetworkSpec};

/// How a training step is cut into passes over its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dataflow {
    /// A kernel for every operation, as PyTorch computes eagerly: convolution, statistics and normalisation, SiLU (and
    /// the copy that its in-place form leaves for the backward pass), squeeze-excitation, stochastic depth, residual.
    Eager,
    /// What a compiler makes of it: pointwise operations and reductions fused with each other, not with convolutions.
    Compiled,
    /// Convolutions take batch norm's sums on store and pay what is owed on load; only raw outputs and block outputs are
    /// stored; a depthwise convolution's two gradients come of one pass, and squeeze-excitation's of none.
    Fused,
    /// That, both gradients of pointwise convolutions in one pass, and the expansion of MBConv computed anew instead of
    /// stored.
    Recomputed,
}

impl Dataflow {
    /// All, from the most bytes to the least.
    pub const ALL: [Self; 4] = [Self::Eager, Self::Compiled, Self::Fused, Self::Recomputed];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eager => "eager",
            Self::Compiled => "compiled",
            Self::Fused => "fused",
            Self::Recomputed => "fused, expansions recomputed",
        }
    }
}

/// Bytes of a training step for one image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Read and written.
    pub moved: u64,
    /// Kept from the forward to the backward pass.
    pub kept: u64,
}

/// A convolution, as far as passes over its tensors go.
#[derive(Clone, Copy, Debug)]
struct Unit {
    role: Role,
    /// Bytes of the input and of the output.
    x: u64,
    y: u64,
    /// Whether SiLU follows, squeeze-excitation, or the addition of the block's input.
    silu: bool,
    squeeze: bool,
    skip: bool,
    /// Whether its input is the input of a block that is added to its output.
    forks: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Stem,
    Dense,
    /// The first convolution of an MBConv block.
    Expand,
    Depthwise,
    Project,
    Head,
}

impl Role {
    const fn is_pointwise(self) -> bool {
        matches!(self, Self::Expand | Self::Project)
    }
}

/// The convolutions of `network` in order, for an image of `size` × `size` pixels.
fn units(network: &NetworkSpec, size: usize, element: usize) -> Vec<Unit> {
    let bytes = |side: usize, channels: usize| (side * side * channels * element) as u64;
    let mut side = size.div_ceil(2);
    let plain = |role, x, y| Unit { role, x, y, silu: true, squeeze: false, skip: false, forks: false };
    let mut units = vec![plain(Role::Stem, bytes(size, 3), bytes(side, network.stem))];
    let mut channels = network.stem;
    for block in network.stages.iter().flat_map(|stage| &stage.blocks) {
        let out = side.div_ceil(block.stride);
        let (input, output) = (bytes(side, block.inputs), bytes(out, block.outputs));
        let (wide, filtered) = (bytes(side, block.expanded()), bytes(out, block.expanded()));
        let first = units.len();
        let project = |x| Unit { silu: false, ..plain(Role::Project, x, output) };
        match block.kind {
            BlockKind::FusedMbConv if block.expansion == 1 => units.push(plain(Role::Dense, input, output)),
            BlockKind::FusedMbConv => {
                units.extend([plain(Role::Dense, input, filtered), project(filtered)]);
            }
            BlockKind::MbConv => {
                if block.expansion != 1 {
                    units.push(plain(Role::Expand, input, wide));
                }
                let depthwise = plain(Role::Depthwise, wide, filtered);
                units.extend([Unit { squeeze: block.squeeze.is_some(), ..depthwise }, project(filtered)]);
            }
        }
        if block.has_skip() {
            units[first].forks = true;
            if let Some(last) = units.last_mut() {
                last.skip = true;
            }
        }
        (side, channels) = (out, block.outputs);
    }
    units.push(plain(Role::Head, bytes(side, channels), bytes(side, network.head)));
    units
}

const fn when(condition: bool, bytes: u64) -> u64 {
    if condition { bytes } else { 0 }
}

/// What a training step of `network` moves and keeps for an image of `size` × `size` pixels in elements of `element`
/// bytes.
pub fn traffic(network: &NetworkSpec, size: usize, element: usize, flow: Dataflow) -> Traffic {
    let units = units(network, size, element);
    let mut traffic = Traffic::default();
    for (i, unit) in units.iter().enumerate() {
        let before = i.checked_sub(1).map(|i| &units[i]);
        let moved = match flow {
            Dataflow::Eager => eager(unit),
            Dataflow::Compiled => compiled(unit),
            Dataflow::Fused => fused(unit, before, false),
            Dataflow::Recomputed => fused(unit, before, true),
        };
        let &Unit { role, x, y, silu, squeeze, skip, .. } = unit;
        let kept = match flow {
            // What the convolution read, the normalisation, SiLU, and the gate.
            Dataflow::Eager => x + y + when(silu, y) + when(squeeze, y),
            Dataflow::Compiled => x + y,
            Dataflow::Fused => y + when(skip, y),
            Dataflow::Recomputed => when(role != Role::Expand, y) + when(skip, y),
        };
        traffic.moved += moved;
        traffic.kept += kept;
    }
    traffic
}

fn eager(unit: &Unit) -> u64 {
    let &Unit { role, x, y, silu, squeeze, skip, forks } = unit;
    let (stem, head) = (role == Role::Stem, role == Role::Head);
    // Convolution; statistics and normalisation; the copy and SiLU; pool and gate; stochastic depth and residual; pool.
    let forward =
        x + y + 3 * y + when(silu, 4 * y) + when(squeeze, 3 * y) + when(skip, 5 * y) + when(head, y);
    // Pool; stochastic depth; the gate's two gradients, their sum, and what the pool gives back; SiLU; batch norm's sums
    // and its gradient; the gradients of input and weights; the sum where a block's input forks.
    let backward = when(head, y) + when(skip, 2 * y) + when(squeeze, 10 * y) + when(silu, 3 * y) + 5 * y;
    forward + backward + when(!stem, y + x) + y + x + when(forks, 3 * x)
}

fn compiled(unit: &Unit) -> u64 {
    let &Unit { role, x, y, squeeze, skip, forks, .. } = unit;
    let (stem, head) = (role == Role::Stem, role == Role::Head);
    // The gradient that arrives at the head is one of the pool's outputs.
    let gradient = when(!head, y);
    // Convolution; statistics; pool; everything pointwise, which the head's pool takes with it.
    let forward = x + y + y + when(squeeze, y) + if head { y } else { 2 * y + when(skip, y) };
    // The gate's gradient; batch norm's sums and its gradient; the gradients of input and weights.
    let backward = when(squeeze, gradient + y) + 2 * (gradient + y) + y;
    forward + backward + when(!stem, y + x + when(forks, 2 * x)) + y + x
}

fn fused(unit: &Unit, before: Option<&Unit>, recomputed: bool) -> u64 {
    let &Unit { role, x, y, squeeze, forks, .. } = unit;
    let head = role == Role::Head;
    // A block's output is made on load and written on the way.
    let merged = when(before.is_some_and(|before| before.skip), x);
    let expansion = before.filter(|before| recomputed && before.role == Role::Expand);
    let convolution = match (role, expansion) {
        (Role::Expand, _) if recomputed => x + 2 * merged,
        (Role::Depthwise, Some(expansion)) => expansion.x + y,
        _ => x + y + 2 * merged,
    };
    let forward = convolution + when(squeeze, y) + when(head, y);
    // The gradient and the raw output, from which batch norm's backward is computed on load.
    let (gradient, sums) = if head { (y, y) } else { (2 * y, 0) };
    // The raw output below, for SiLU' and its sums, and the gradient of the skip connection.
    let store = 2 * x + when(forks, x);
    let backward = match (role, expansion) {
        (Role::Stem, _) => gradient + x,
        // The expansion and its gradients are computed by the depthwise convolution's two passes.
        (Role::Expand, _) if recomputed => 0,
        (Role::Depthwise, Some(expansion)) => {
            2 * gradient + 3 * expansion.x + when(expansion.forks, expansion.x)
        }
        // One pass: what SiLU' needs is what the weights' gradient reads.
        (Role::Depthwise, None) => gradient + store,
        _ if recomputed && role.is_pointwise() => gradient + store,
        _ => gradient + store + gradient + x,
    };
    forward + sums + backward
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;

    /// In the order of [`Dataflow::ALL`], as an independent model of the same passes, kernel by kernel, counts them.
    const MOVED: &[(&str, usize, [u64; 4], [u64; 4])] = &[
        (
            "s",
            300,
            [1_144_743_872, 691_202_656, 399_469_920, 284_287_456],
            [143_837_152, 91_076_832, 51_833_952, 38_152_928],
        ),
        (
            "s",
            128,
            [199_749_632, 120_838_144, 70_029_312, 50_083_840],
            [25_108_480, 15_937_536, 9_086_976, 6_735_872],
        ),
        (
            "m",
            384,
            [2_940_244_992, 1_759_919_616, 1_007_285_760, 704_595_456],
            [367_534_080, 230_326_272, 131_046_912, 94_017_024],
        ),
        (
            "l",
            380,
            [5_151_969_472, 3_082_779_072, 1_767_560_512, 1_244_055_872],
            [642_413_920, 402_535_264, 230_241_408, 166_540_416],
        ),
        (
            "xl",
            512,
            [12_792_365_056, 7_602_765_824, 4_303_945_728, 2_955_804_672],
            [1_594_753_024, 989_462_528, 559_611_904, 390_922_240],
        ),
        (
            "b0",
            224,
            [231_543_424, 141_806_784, 80_683_008, 56_476_224],
            [30_205_952, 19_211_136, 10_176_320, 7_241_024],
        ),
    ];

    #[test]
    fn every_dataflow_moves_and_keeps_what_it_should() {
        for &(name, size, moved, kept) in MOVED {
            let network = Architecture::find(name).unwrap().network(1000);
            let traffic = Dataflow::ALL.map(|flow| traffic(&network, size, 2, flow));
            assert_eq!(traffic.map(|traffic| traffic.moved), moved, "{name}@{size}: moved");
            assert_eq!(traffic.map(|traffic| traffic.kept), kept, "{name}@{size}: kept");
        }
    }

    /// Blocks without an expansion, without squeeze-excitation or with other kernels have no figures to compare with.
    #[test]
    fn more_fusion_never_moves_more() {
        for name in Architecture::names() {
            let network = Architecture::find(name).unwrap().network(10);
            let moved = Dataflow::ALL.map(|flow| traffic(&network, 65, 4, flow).moved);
            assert!(moved.is_sorted_by(|a, b| a > b), "{name}: {moved:?}");
        }
    }
}
