//! Batch normalisation where no convolution does it on the way, at shapes of EfficientNetV2-S at 300 px:
//! `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, Layer, numbers};
use effnetv2::Result;
use effnetv2::backend::Activation;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::kernels::batch_norm::{BatchNorm, BatchNormShape, Fold, Merge, MergeGradient};
use effnetv2::tensor::{Dtype, Shape};
use half::bf16;
use std::process::ExitCode;

struct Set {
    plan: BatchNorm<bf16>,
    layer: Layer,
    factors: CudaSlice<f32>,
}

fn moments(set: &mut Set) -> Result<()> {
    let Layer { device, y, output, workspace, .. } = &mut set.layer;
    let y = y.as_view();
    output.moments(|statistics| set.plan.moments(device.compute(), &y, statistics, workspace))
}

fn merge(set: &mut Set) -> Result<()> {
    let Layer { device, x, dx, y, output, .. } = &mut set.layer;
    let (y, norm, skip, mut out) = (y.as_view(), output.norm.as_view(), x.as_view(), dx.as_view_mut());
    let (act, factors) = (Activation::Identity, set.factors.as_view());
    let merge = Merge { y: &y, norm: &norm, act, skip: Some(&skip), factors: Some(&factors) };
    set.plan.merge(device.compute(), merge, &mut out)
}

fn backward(set: &mut Set) -> Result<()> {
    let Layer { device, y, g, output, workspace, .. } = &mut set.layer;
    let (g, y, factors) = (g.as_view(), y.as_view(), set.factors.as_view());
    let gradient = MergeGradient { g: &g, y: &y, factors: Some(&factors) };
    output.debt(|_, debt| set.plan.merge_backward_identity(device.compute(), gradient, debt, workspace))
}

fn backward_silu(set: &mut Set) -> Result<()> {
    let Layer { device, dx, y, g, output, workspace, .. } = &mut set.layer;
    let (g, y, mut dz) = (g.as_view(), y.as_view(), dx.as_view_mut());
    let gradient = MergeGradient { g: &g, y: &y, factors: None };
    output.debt(|_, debt| set.plan.merge_backward_silu(device.compute(), gradient, &mut dz, debt, workspace))
}

/// The weights of a convolution, for inference.
struct Folding {
    device: Device,
    plan: Fold<bf16>,
    weights: CudaSlice<f32>,
    scale: CudaSlice<f32>,
    folded: CudaSlice<bf16>,
}

fn fold(set: &mut Folding) -> Result<()> {
    let Folding { device, plan, weights, scale, folded } = set;
    plan.fold(device.compute(), &weights.as_view(), &scale.as_view(), &mut folded.as_view_mut())
}

/// columns, outputs: the largest of each kind in the network
const WEIGHTS: &[(usize, usize)] = &[(9 * 64, 256), (1536, 256)];

/// side, channels: block outputs
const LAYERS: &[(usize, usize)] = &[(150, 24), (75, 48), (38, 64), (19, 160), (10, 256)];

fn benchmarks(bench: &mut Bench) -> Result<()> {
    for &(side, channels) in LAYERS {
        let (images, side) = bench.size((64, side), (2, side.min(9)));
        let x = Shape::new(images, side, side, channels);
        let shape = BatchNormShape::new(x, Dtype::Bf16)?;
        let name = x.to_string();
        let set = |device: &_| {
            let layer = Layer::new(device, x, x, 8, shape.workspace_floats())?;
            Ok(Set { plan: BatchNorm::plan(device, x)?, layer, factors: numbers(device, images, |f| f)? })
        };
        bench.case(&name, &[shape.moments_work()], set, moments)?;
        bench.case(&name, &[shape.merge_work(Activation::Identity, true, true)], set, merge)?;
        bench.case(&name, &[shape.merge_backward_work(Activation::Identity, true)], set, backward)?;
        bench.case(&name, &[shape.merge_backward_work(Activation::Silu, false)], set, backward_silu)?;
    }
    for &(columns, channels) in WEIGHTS {
        let weights = bench.size(columns, 16) * channels;
        let set = |device: &Device| {
            Ok(Folding {
                device: device.clone(),
                plan: Fold::plan(device, weights, channels)?,
                weights: numbers(device, weights, |value| value)?,
                scale: numbers(device, channels, |value| value)?,
                folded: device.zeros(weights)?,
            })
        };
        let work = set(&bench.device)?.plan.work().clone();
        bench.case(&format!("{weights} weights of {channels} channels"), &[work], set, fold)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    devices::main("batch_norm", benchmarks)
}
