//! Dense 3×3 convolutions of EfficientNetV2-S at 300 px: `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, Layer, gradient};
use effnetv2::Result;
use effnetv2::kernels::conv3x3::{Conv3x3, Conv3x3Shape};
use effnetv2::kernels::{GradientOutput, Input, Output, OutputKind};
use effnetv2::tensor::{Conv, ConvKind, Dtype, Padding, Shape};
use half::bf16;
use std::process::ExitCode;

struct Set {
    plan: Conv3x3<bf16>,
    layer: Layer,
}

fn fprop(set: &mut Set) -> Result<()> {
    let Layer { device, x, y, weight, output, workspace, .. } = &mut set.layer;
    let (x, weight, mut y) = (x.as_view(), weight.as_view(), y.as_view_mut());
    output.moments(|statistics| {
        let output = Output::Moments(statistics);
        set.plan.fprop(device.compute(), Input::Plain(&x), &weight, &mut y, output, workspace)
    })
}

fn dgrad(set: &mut Set) -> Result<()> {
    let Layer { device, dx, y, g, weight, output, .. } = &mut set.layer;
    let (weight, mut dx) = (weight.as_view(), dx.as_view_mut());
    gradient((g, y, output), |gradient| {
        let output = GradientOutput::Plain { skip: None };
        set.plan.dgrad(device.compute(), gradient, &weight, &mut dx, output)
    })
}

fn wgrad(set: &mut Set) -> Result<()> {
    let Layer { device, x, y, g, dweight, output, workspace, .. } = &mut set.layer;
    let (x, mut dweight) = (x.as_view(), dweight.as_view_mut());
    gradient((g, y, output), |gradient| {
        set.plan.wgrad(device.compute(), Input::Plain(&x), gradient, &mut dweight, workspace)
    })
}

/// side, stride, inputs, outputs
const LAYERS: &[(usize, usize, usize, usize)] =
    &[(150, 1, 24, 24), (150, 2, 24, 96), (75, 1, 48, 192), (75, 2, 48, 192), (38, 1, 64, 256)];

fn benchmarks(bench: &mut Bench) -> Result<()> {
    for &(side, stride, inputs, outputs) in LAYERS {
        let (images, side) = bench.size((64, side), (1, side.min(16)));
        let padding = Padding::Same;
        let conv = Conv { kind: ConvKind::Dense, kernel: 3, stride, padding, inputs, outputs };
        let x = Shape::new(images, side, side, inputs);
        let shape = Conv3x3Shape::new(&conv, x)?;
        let floats = shape.workspace_floats(Dtype::Bf16);
        let name = format!("{x} to {outputs}, stride {stride}");
        let set = |device: &_| {
            let layer = Layer::new(device, x, shape.output(), conv.weights(), floats)?;
            Ok(Set { plan: Conv3x3::plan(device, &conv, x)?, layer })
        };
        bench.case(&name, &[shape.fprop_work(Dtype::Bf16, OutputKind::Moments)], set, fprop)?;
        bench.case(&name, &[shape.dgrad_work(Dtype::Bf16, false)], set, dgrad)?;
        bench.case(&name, &shape.wgrad_work(Dtype::Bf16), set, wgrad)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    devices::main("conv3x3", benchmarks)
}
