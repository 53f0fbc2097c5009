//! Squeeze-excitation at shapes of EfficientNetV2-S at 300 px: `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, Layer, numbers};
use effnetv2::Result;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::{CudaSlice, CudaView};
use effnetv2::kernels::RawView;
use effnetv2::kernels::squeeze_excite::{
    BackwardInput, Gradients, SqueezeExcite, SqueezeExciteShape, State, StateMut, Weights,
};
use effnetv2::tensor::{Dtype, Shape};
use half::bf16;
use std::process::ExitCode;

struct Set {
    plan: SqueezeExcite<bf16>,
    /// x is the gated tensor as it was stored, dx the gradient of SiLU(z)·gate.
    layer: Layer,
    channels: usize,
    expand: CudaSlice<bf16>,
    biases: [CudaSlice<f32>; 2],
    dweights: [CudaSlice<f32>; 2],
    dbiases: [CudaSlice<f32>; 2],
    pooled: CudaSlice<f32>,
    hidden: CudaSlice<f32>,
    dpool: CudaSlice<f32>,
}

fn make(device: &Device, x: Shape, reduced: usize, floats: usize) -> Result<Set> {
    let (n, c) = (x.n, x.c);
    let vector = |length: usize| numbers(device, length, |value| value);
    Ok(Set {
        plan: SqueezeExcite::plan(device, x, reduced)?,
        layer: Layer::new(device, x, x.with_channels(8), c * reduced, floats)?,
        channels: c,
        expand: numbers(device, c * reduced, bf16::from_f32)?,
        biases: [vector(reduced)?, vector(c)?],
        dweights: [vector(c * reduced)?, vector(c * reduced)?],
        dbiases: [vector(reduced)?, vector(c)?],
        pooled: vector(n * c)?,
        hidden: vector(n * reduced)?,
        dpool: vector(n * c)?,
    })
}

/// The vectors of a normalisation \[4, c\], apart.
fn vectors<'a>(norm: &CudaView<'a, f32>, channels: usize) -> [CudaView<'a, f32>; 4] {
    [0, 1, 2, 3].map(|row| norm.slice(row * channels..(row + 1) * channels))
}

fn forward(set: &mut Set) -> Result<()> {
    let Layer { device, x, weight, input, gate, workspace, .. } = &mut set.layer;
    let [scale, shift, mean, rstd] = vectors(&input.norm.as_view(), set.channels);
    let (y, reduce, expand) = (x.as_view(), weight.as_view(), set.expand.as_view());
    let raw = RawView { y: &y, scale: &scale, shift: &shift, mean: &mean, rstd: &rstd };
    let [reduce_bias, expand_bias] = set.biases.each_ref().map(CudaSlice::as_view);
    let weights =
        Weights { reduce: &reduce, reduce_bias: &reduce_bias, expand: &expand, expand_bias: &expand_bias };
    let state = StateMut {
        pooled: &mut set.pooled.as_view_mut(),
        hidden: &mut set.hidden.as_view_mut(),
        gate: &mut gate.as_view_mut(),
    };
    set.plan.forward(device.compute(), raw, weights, state, workspace)
}

fn sums(set: &mut Set) -> Result<()> {
    let Layer { device, x, dx, input, sums, .. } = &mut set.layer;
    let [scale, shift, mean, rstd] = vectors(&input.norm.as_view(), set.channels);
    let (y, dx) = (x.as_view(), dx.as_view());
    let raw = RawView { y: &y, scale: &scale, shift: &shift, mean: &mean, rstd: &rstd };
    set.plan.backward_sums(device.compute(), &dx, raw, &mut sums.as_view_mut())
}

fn backward(set: &mut Set) -> Result<()> {
    let Layer { device, weight, input, gate, sums, workspace, .. } = &mut set.layer;
    let (reduce, expand, sums) = (weight.as_view(), set.expand.as_view(), sums.as_view());
    let [reduce_bias, expand_bias] = set.biases.each_ref().map(CudaSlice::as_view);
    let weights =
        Weights { reduce: &reduce, reduce_bias: &reduce_bias, expand: &expand, expand_bias: &expand_bias };
    let (pooled, hidden, gate) = (set.pooled.as_view(), set.hidden.as_view(), gate.as_view());
    let state = State { pooled: &pooled, hidden: &hidden, gate: &gate };
    let [mut dreduce, mut dexpand] = set.dweights.each_mut().map(CudaSlice::as_view_mut);
    let [mut dreduce_bias, mut dexpand_bias] = set.dbiases.each_mut().map(CudaSlice::as_view_mut);
    let gradients = Gradients {
        reduce: &mut dreduce,
        reduce_bias: &mut dreduce_bias,
        expand: &mut dexpand,
        expand_bias: &mut dexpand_bias,
    };
    let (plan, mut dpool) = (&mut set.plan, set.dpool.as_view_mut());
    let from = BackwardInput { sums: &sums, state, weights };
    input.debt(|_, debt| plan.backward(device.compute(), from, gradients, &mut dpool, debt, workspace))
}

/// side, channels, hidden units
const LAYERS: &[(usize, usize, usize)] =
    &[(19, 256, 16), (19, 512, 32), (19, 960, 40), (10, 960, 40), (10, 1536, 64)];

fn benchmarks(bench: &mut Bench) -> Result<()> {
    for &(side, channels, reduced) in LAYERS {
        let (images, side, channels) = bench.size((64, side, channels), (2, 3, 72));
        let x = Shape::new(images, side, side, channels);
        let shape = SqueezeExciteShape::new(x, reduced, Dtype::Bf16)?;
        let name = format!("{x}, {reduced} hidden");
        let set = |device: &_| make(device, x, reduced, shape.workspace_floats());
        bench.case(&name, &[shape.forward_work()], set, forward)?;
        bench.case(&name, &[shape.backward_sums_work()], set, sums)?;
        bench.case(&name, &shape.backward_works(), set, backward)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    devices::main("squeeze_excite", benchmarks)
}
