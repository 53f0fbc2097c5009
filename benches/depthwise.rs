//! Depthwise convolutions of EfficientNetV2-S at 300 px: `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, Layer, gradient};
use effnetv2::Result;
use effnetv2::kernels::depthwise::{BackwardKind, Depthwise, DepthwiseShape};
use effnetv2::kernels::{GradientOutput, Input, Output, OutputKind};
use effnetv2::tensor::{Conv, ConvKind, Dtype, Padding, Shape};
use half::bf16;
use std::process::ExitCode;

struct Set {
    plan: Depthwise<bf16>,
    layer: Layer,
}

fn fprop(set: &mut Set) -> Result<()> {
    let Layer { device, x, y, weight, input, output, workspace, .. } = &mut set.layer;
    let (x, norm, weight, mut y) = (x.as_view(), input.norm.as_view(), weight.as_view(), y.as_view_mut());
    output.moments(|statistics| {
        let (input, output) = (Input::Silu { y: &x, norm: &norm }, Output::Moments(statistics));
        set.plan.fprop(device.compute(), input, &weight, &mut y, output, workspace)
    })
}

fn backward(set: &mut Set) -> Result<()> {
    let Layer { device, x, dx, y, g, weight, dweight, input, output, workspace, .. } = &mut set.layer;
    let (x, weight, mut dx) = (x.as_view(), weight.as_view(), dx.as_view_mut());
    let mut dweight = dweight.as_view_mut();
    gradient((g, y, output), |gradient| {
        input.debt(|norm, debt| {
            let input = Input::Silu { y: &x, norm };
            let output = GradientOutput::Silu { y: &x, debt };
            let stream = device.compute();
            set.plan.backward(stream, input, gradient, &weight, &mut dx, &mut dweight, output, workspace)
        })
    })
}

/// side, kernel, stride, channels
const LAYERS: &[(usize, usize, usize, usize)] =
    &[(38, 3, 2, 256), (19, 3, 1, 512), (19, 3, 1, 960), (19, 3, 2, 960), (10, 3, 1, 1536)];

fn benchmarks(bench: &mut Bench) -> Result<()> {
    for &(side, kernel, stride, channels) in LAYERS {
        let (images, side, channels) = bench.size((64, side, channels), (1, side.min(9), 64));
        let (kind, padding) = (ConvKind::Depthwise, Padding::Same);
        let conv = Conv { kind, kernel, stride, padding, inputs: channels, outputs: channels };
        let x = Shape::new(images, side, side, channels);
        let shape = DepthwiseShape::new(&conv, x, Dtype::Bf16)?;
        let name = format!("{x}, stride {stride}");
        let set = |device: &_| {
            let layer = Layer::new(device, x, shape.output(), conv.weights(), shape.workspace_floats())?;
            Ok(Set { plan: Depthwise::plan(device, &conv, x)?, layer })
        };
        bench.case(&name, &[shape.fprop_work(true, OutputKind::Moments)], set, fprop)?;
        bench.case(&name, &[shape.backward_work(false, BackwardKind::Silu)], set, backward)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    devices::main("depthwise", benchmarks)
}
