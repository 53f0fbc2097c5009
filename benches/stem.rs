//! The stem of EfficientNetV2-S at 300 px: `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, Layer, gradient};
use effnetv2::Result;
use effnetv2::kernels::stem::{Stem, StemInput, StemShape};
use effnetv2::kernels::{Output, OutputKind};
use effnetv2::tensor::{Conv, ConvKind, Dtype, Padding, Shape};
use half::bf16;
use std::process::ExitCode;

struct Set {
    plan: Stem<bf16>,
    layer: Layer,
}

fn fprop(set: &mut Set) -> Result<()> {
    let Layer { device, x, y, weight, output, workspace, .. } = &mut set.layer;
    let (x, weight, mut y) = (x.as_view(), weight.as_view(), y.as_view_mut());
    output.moments(|statistics| {
        let output = Output::Moments(statistics);
        set.plan.fprop(device.compute(), StemInput::Elements(&x), &weight, &mut y, output, workspace)
    })
}

fn wgrad(set: &mut Set) -> Result<()> {
    let Layer { device, x, y, g, dweight, output, workspace, .. } = &mut set.layer;
    let (x, mut dweight) = (x.as_view(), dweight.as_view_mut());
    gradient((g, y, output), |gradient| {
        set.plan.wgrad(device.compute(), StemInput::Elements(&x), gradient, &mut dweight, workspace)
    })
}

fn benchmarks(bench: &mut Bench) -> Result<()> {
    let (images, side) = bench.size((64, 300), (1, 11));
    let (kind, padding) = (ConvKind::Dense, Padding::Same);
    let conv = Conv { kind, kernel: 3, stride: 2, padding, inputs: 3, outputs: 24 };
    let x = Shape::new(images, side, side, 3);
    let shape = StemShape::new(&conv, x)?;
    let name = format!("{x} to 24");
    let set = |device: &_| {
        let layer = Layer::new(device, x, shape.output(), conv.weights(), shape.workspace_floats())?;
        Ok(Set { plan: Stem::plan(device, &conv, x)?, layer })
    };
    bench.case(&name, &[shape.fprop_work(Dtype::Bf16, false, OutputKind::Moments)], set, fprop)?;
    bench.case(&name, &[shape.wgrad_work(Dtype::Bf16, false)], set, wgrad)
}

fn main() -> ExitCode {
    devices::main("stem", benchmarks)
}
