//! Pointwise convolutions of EfficientNetV2-S at 300 px: `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, Layer, gradient};
use effnetv2::Result;
use effnetv2::kernels::pointwise::{Passes, Pointwise, PointwiseWork};
use effnetv2::kernels::{GradientKind, GradientOutput, Input, InputKind, Output, OutputKind};
use effnetv2::tensor::{Dtype, Shape};
use half::bf16;
use std::process::ExitCode;

struct Set {
    plan: Pointwise<bf16>,
    kind: InputKind,
    passes: Passes,
    layer: Layer,
}

fn fprop(set: &mut Set) -> Result<()> {
    let Layer { device, x, y, weight, input, output, gate, workspace, .. } = &mut set.layer;
    let (x, norm, gate) = (x.as_view(), input.norm.as_view(), gate.as_view());
    let (weight, mut y) = (weight.as_view(), y.as_view_mut());
    let input = match set.kind {
        InputKind::Plain => Input::Plain(&x),
        InputKind::Silu => Input::Silu { y: &x, norm: &norm },
        InputKind::Gated => Input::Gated { y: &x, norm: &norm, gate: &gate },
    };
    output.moments(|statistics| {
        let output = Output::Moments(statistics);
        set.plan.fprop(device.compute(), input, &weight, &mut y, output, workspace)
    })
}

fn dgrad(set: &mut Set) -> Result<()> {
    let Layer { device, x, dx, y, g, weight, input, output, sums, workspace, .. } = &mut set.layer;
    let (x, weight, mut dx) = (x.as_view(), weight.as_view(), dx.as_view_mut());
    let (plan, stream) = (&set.plan, device.compute());
    gradient((g, y, output), |gradient| match set.kind {
        InputKind::Plain => {
            let output = GradientOutput::Plain { skip: None };
            plan.dgrad(stream, gradient, &weight, &mut dx, output, workspace)
        }
        InputKind::Silu => input.debt(|_, debt| {
            let output = GradientOutput::Silu { y: &x, debt };
            plan.dgrad(stream, gradient, &weight, &mut dx, output, workspace)
        }),
        InputKind::Gated => {
            let (norm, mut sums) = (input.norm.as_view(), sums.as_view_mut());
            let output = GradientOutput::Gated { y: &x, norm: &norm, sums: &mut sums };
            plan.dgrad(stream, gradient, &weight, &mut dx, output, workspace)
        }
    })
}

fn wgrad(set: &mut Set) -> Result<()> {
    let Layer { device, x, y, g, dweight, input, output, gate, workspace, .. } = &mut set.layer;
    let (x, norm, gate) = (x.as_view(), input.norm.as_view(), gate.as_view());
    let mut dweight = dweight.as_view_mut();
    let input = match set.kind {
        InputKind::Plain => Input::Plain(&x),
        InputKind::Silu => Input::Silu { y: &x, norm: &norm },
        InputKind::Gated => Input::Gated { y: &x, norm: &norm, gate: &gate },
    };
    gradient((g, y, output), |gradient| {
        set.plan.wgrad(device.compute(), input, gradient, &mut dweight, workspace)
    })
}

fn backward(set: &mut Set) -> Result<()> {
    let Layer { device, x, dx, y, g, weight, dweight, input, output, gate, sums, workspace } = &mut set.layer;
    let (x, weight, gate) = (x.as_view(), weight.as_view(), gate.as_view());
    let (mut dx, mut dweight) = (dx.as_view_mut(), dweight.as_view_mut());
    let (plan, passes, stream) = (&set.plan, set.passes, device.compute());
    gradient((g, y, output), |gradient| {
        let mut run = |input: Input<'_, '_, bf16>, output: GradientOutput<'_, '_, bf16>| {
            plan.backward_in(
                passes,
                stream,
                input,
                gradient,
                &weight,
                &mut dx,
                &mut dweight,
                output,
                workspace,
            )
        };
        match set.kind {
            InputKind::Plain => run(Input::Plain(&x), GradientOutput::Plain { skip: None }),
            InputKind::Silu => input
                .debt(|norm, debt| run(Input::Silu { y: &x, norm }, GradientOutput::Silu { y: &x, debt })),
            InputKind::Gated => {
                let (norm, mut sums) = (input.norm.as_view(), sums.as_view_mut());
                let output = GradientOutput::Gated { y: &x, norm: &norm, sums: &mut sums };
                run(Input::Gated { y: &x, norm: &norm, gate: &gate }, output)
            }
        }
    })
}

/// side, inputs, outputs, and how the input is read: the projections of both kinds of block, expansions, and the head.
const LAYERS: &[(usize, usize, usize, InputKind)] = &[
    (75, 192, 48, InputKind::Silu),
    (75, 96, 48, InputKind::Silu),
    (38, 256, 64, InputKind::Silu),
    (19, 128, 512, InputKind::Plain),
    (19, 512, 128, InputKind::Gated),
    (19, 960, 160, InputKind::Gated),
    (10, 256, 1536, InputKind::Plain),
    (10, 1536, 256, InputKind::Gated),
    (10, 256, 1280, InputKind::Plain),
];

fn benchmarks(bench: &mut Bench) -> Result<()> {
    for &(side, inputs, outputs, kind) in LAYERS {
        let (images, side, inputs, outputs) = bench.size((64, side, inputs, outputs), (2, 3, 64, 40));
        let x = Shape::new(images, side, side, inputs);
        let work = PointwiseWork::new(x, outputs, Dtype::Bf16)?;
        let name = format!("{x} to {outputs}, {kind:?}");
        let set = |device: &_| {
            let y = x.with_channels(outputs);
            let floats = [Passes::One, Passes::Interleaved].map(|passes| work.floats_in(passes));
            let floats = work.workspace_floats().max(floats[0]).max(floats[1]);
            let layer = Layer::new(device, x, y, inputs * outputs, floats)?;
            Ok(Set { plan: Pointwise::plan(device, x, outputs)?, kind, passes: Passes::Two, layer })
        };
        let gradient = match kind {
            InputKind::Plain => GradientKind::Plain { skip: false },
            InputKind::Silu => GradientKind::Silu,
            InputKind::Gated => GradientKind::Gated,
        };
        bench.case(&name, &[work.fprop(kind, OutputKind::Moments)], set, fprop)?;
        bench.case(&name, &[work.dgrad(gradient)], set, dgrad)?;
        bench.case(&name, &[work.wgrad(kind)], set, wgrad)?;
        for passes in [Passes::Two, Passes::Interleaved, Passes::One] {
            if let Some(work) = work.backward_in(passes, kind, gradient) {
                bench.case(&name, &[work], |device| Ok(Set { passes, ..set(device)? }), backward)?;
            }
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    devices::main("pointwise", benchmarks)
}
