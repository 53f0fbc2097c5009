//! The head of EfficientNetV2-S at 300 px, its classifier among the rest: `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, Layer, numbers};
use effnetv2::Result;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::{CudaSlice, CudaView};
use effnetv2::kernels::head::{Dropout, Head, HeadShape};
use effnetv2::kernels::pointwise::{Classifier, ClassifierWork};
use effnetv2::kernels::{RawView, StepScalars, Workspace};
use effnetv2::tensor::{Dtype, Shape};
use half::bf16;
use std::process::ExitCode;

struct Set {
    plan: Head<bf16>,
    classifier: Classifier<bf16>,
    workspace: Workspace,
    step: StepScalars,
    /// x is the raw output, dx its gradient.
    layer: Layer,
    channels: usize,
    features: CudaSlice<bf16>,
    dfeatures: CudaSlice<bf16>,
    logits: CudaSlice<bf16>,
    dlogits: CudaSlice<bf16>,
    targets: CudaSlice<f32>,
    bias: CudaSlice<f32>,
    dbias: CudaSlice<f32>,
}

fn make(device: &Device, x: Shape, classes: usize, work: &ClassifierWork) -> Result<Set> {
    let (n, c) = (x.n, x.c);
    let elements = |length: usize| numbers(device, length, bf16::from_f32);
    Ok(Set {
        plan: Head::plan(device, x, classes, 0.2)?,
        classifier: Classifier::plan(device, n, c, classes)?,
        workspace: Workspace::new(device, work.workspace_floats())?,
        step: StepScalars::new(device, n)?,
        layer: Layer::new(device, x, x.with_channels(8), c * classes, 1)?,
        channels: c,
        features: elements(n * c)?,
        dfeatures: elements(n * c)?,
        logits: elements(n * classes)?,
        dlogits: elements(n * classes)?,
        targets: device.upload(&vec![1.0 / classes as f32; n * classes])?,
        bias: device.zeros(classes)?,
        dbias: device.zeros(classes)?,
    })
}

/// Hands `$work` the raw output and its normalisation.
fn with_raw<R>(
    (y, norm, channels): (&CudaView<'_, bf16>, &CudaView<'_, f32>, usize),
    work: impl FnOnce(RawView<'_, '_, bf16>) -> R,
) -> R {
    let [scale, shift, mean, rstd] = [0, 1, 2, 3].map(|row| norm.slice(row * channels..(row + 1) * channels));
    work(RawView { y, scale: &scale, shift: &shift, mean: &mean, rstd: &rstd })
}

fn pool(set: &mut Set) -> Result<()> {
    let Layer { device, x, input, .. } = &set.layer;
    let (dropout, mut features) = (Dropout::On(&set.step), set.features.as_view_mut());
    with_raw((&x.as_view(), &input.norm.as_view(), set.channels), |raw| {
        set.plan.pool(device.compute(), raw, dropout, &mut features)
    })
}

fn pool_backward(set: &mut Set) -> Result<()> {
    let Layer { device, x, dx, input, sums, .. } = &mut set.layer;
    let (dropout, dfeatures) = (Dropout::On(&set.step), set.dfeatures.as_view());
    let (mut dz, mut sums) = (dx.as_view_mut(), sums.slice_mut(..2 * set.features.len()));
    with_raw((&x.as_view(), &input.norm.as_view(), set.channels), |raw| {
        set.plan.pool_backward(device.compute(), &dfeatures, raw, dropout, &mut dz, &mut sums)
    })
}

fn cross_entropy(set: &mut Set) -> Result<()> {
    let (stream, mut dlogits) = (set.layer.device.compute(), set.dlogits.as_view_mut());
    set.plan.cross_entropy(stream, &set.step, &set.logits.as_view(), &set.targets.as_view(), &mut dlogits)
}

fn classifier(set: &mut Set) -> Result<()> {
    let (features, weight, bias) = (set.features.as_view(), set.layer.weight.as_view(), set.bias.as_view());
    let stream = set.layer.device.compute();
    set.classifier.fprop(stream, &features, &weight, &bias, &mut set.logits.as_view_mut())
}

fn classifier_backward(set: &mut Set) -> Result<()> {
    let Layer { device, weight, dweight, .. } = &mut set.layer;
    let (features, dlogits, weight) = (set.features.as_view(), set.dlogits.as_view(), weight.as_view());
    set.classifier.backward(
        device.compute(),
        &features,
        &dlogits,
        &weight,
        &mut set.dfeatures.as_view_mut(),
        &mut dweight.as_view_mut(),
        &mut set.dbias.as_view_mut(),
        &mut set.workspace,
    )
}

fn benchmarks(bench: &mut Bench) -> Result<()> {
    let (images, side, channels, classes) = bench.size((64, 10, 1280, 1000), (2, 3, 40, 12));
    let x = Shape::new(images, side, side, channels);
    let shape = HeadShape::new(x, classes, Dtype::Bf16)?;
    let work = ClassifierWork::new(images, channels, classes, Dtype::Bf16)?;
    let (tensor, logits) = (x.to_string(), format!("{images}×{classes}"));
    let set = |device: &_| make(device, x, classes, &work);
    bench.case(&tensor, &[shape.pool_work()], set, pool)?;
    bench.case(&tensor, &[shape.pool_backward_work()], set, pool_backward)?;
    bench.case(&logits, &shape.cross_entropy_works(), set, cross_entropy)?;
    bench.case(&logits, &[work.fprop()], set, classifier)?;
    bench.case(&logits, &work.backward(), set, classifier_backward)
}

fn main() -> ExitCode {
    devices::main("head", benchmarks)
}
