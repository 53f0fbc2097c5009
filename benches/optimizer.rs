//! The optimizer over the parameters of EfficientNetV2-S: `benches/devices` says what is measured and how.

mod devices;

use devices::{Bench, numbers};
use effnetv2::Result;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::kernels::optimizer::{
    Buffers, Optimizer, Scalars, UpdateShape, WorkingCopy, average_work, cast_work,
};
use effnetv2::optimizer::{Rule, Step};
use effnetv2::tensor::Dtype;
use half::bf16;
use std::process::ExitCode;
use std::slice;

/// Of EfficientNetV2-S with 1000 classes.
const PARAMETERS: usize = 21_458_488;

struct Set {
    device: Device,
    plan: Optimizer,
    parameters: CudaSlice<f32>,
    gradients: CudaSlice<f32>,
    slots: Vec<CudaSlice<f32>>,
    average: CudaSlice<f32>,
    copy: CudaSlice<bf16>,
}

fn set(device: &Device, rule: Rule, length: usize) -> Result<Set> {
    let mut plan = Optimizer::plan(device, rule, length, slice::from_ref(&(0..length / 10 * 9)))?;
    let step = Step { number: 0, learning_rate: 1e-9, weight_decay: 1e-5, gradient_scale: 1.0 };
    plan.begin_step(
        device.compute(),
        &Scalars { ema_decay: 0.9999, max_norm: Some(1.0), ..Scalars::plain(step) },
    )?;
    Ok(Set {
        device: device.clone(),
        parameters: numbers(device, length, |x| x)?,
        gradients: numbers(device, length, |x| x)?,
        slots: plan.initial_slots()?,
        average: numbers(device, length, |x| x)?,
        copy: device.zeros(length)?,
        plan,
    })
}

fn update(set: &mut Set) -> Result<()> {
    let buffers = Buffers {
        parameters: &mut set.parameters.as_view_mut(),
        gradients: &set.gradients.as_view(),
        slots: &mut set.slots.iter_mut().map(CudaSlice::as_view_mut).collect::<Vec<_>>(),
        average: Some(&mut set.average.as_view_mut()),
        copy: WorkingCopy::Bf16(&mut set.copy.as_view_mut()),
    };
    set.plan.update(set.device.compute(), buffers)
}

fn norm(set: &mut Set) -> Result<()> {
    set.plan.norm_and_clip(set.device.compute(), &set.gradients.as_view())
}

fn average(set: &mut Set) -> Result<()> {
    set.plan.update_average(set.device.compute(), &mut set.average.as_view_mut(), &set.parameters.as_view())
}

fn cast(set: &mut Set) -> Result<()> {
    set.plan.cast(set.device.compute(), &set.parameters.as_view(), &mut set.copy.as_view_mut())
}

fn benchmarks(bench: &mut Bench) -> Result<()> {
    let length = bench.size(PARAMETERS, 3000);
    let shape = format!("{length} parameters");
    let rules = [
        Rule::PAPER,
        Rule::Sgd { momentum: 0.9, nesterov: true },
        Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
    ];
    for rule in rules {
        let work = UpdateShape { rule, parameters: length }.update_work(true, Dtype::Bf16);
        bench.case(&shape, &[work], |device| set(device, rule, length), update)?;
    }
    let make = |device: &Device| set(device, Rule::PAPER, length);
    let norm_work = UpdateShape { rule: Rule::PAPER, parameters: length }.norm_work();
    bench.case(&shape, &norm_work, make, norm)?;
    bench.case(&shape, &[average_work(length)], make, average)?;
    bench.case(&shape, &[cast_work(length, Dtype::Bf16)], make, cast)
}

fn main() -> ExitCode {
    devices::main("optimizer", benchmarks)
}
