//! The input of a batch of 300 px: `benches/devices` says what is measured and how.

mod devices;

use devices::Bench;
use effnetv2::Result;
use effnetv2::backend::Normalisation;
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::kernels::input::{Input, forward_work};
use effnetv2::tensor::Dtype;
use half::bf16;
use std::process::ExitCode;

struct Set {
    device: Device,
    plan: Input<bf16>,
    images: CudaSlice<u8>,
    y: CudaSlice<bf16>,
}

fn make(device: &Device, images: usize, side: usize) -> Result<Set> {
    let plan = Input::plan(device, images, side, &Normalisation::HALF)?;
    let bytes: Vec<u8> = (0..plan.elements()).map(|i| (i * 7 % 251) as u8).collect();
    Ok(Set {
        device: device.clone(),
        images: device.upload(&bytes)?,
        y: device.zeros(plan.elements())?,
        plan,
    })
}

fn forward(set: &mut Set) -> Result<()> {
    set.plan.forward(set.device.compute(), &set.images.as_view(), &mut set.y.as_view_mut())
}

fn benchmarks(bench: &mut Bench) -> Result<()> {
    let (images, side) = bench.size((64, 300), (2, 7));
    let work = forward_work(images, side, Dtype::Bf16);
    bench.case(&format!("{images}×{side}×{side}×3"), &[work], |device| make(device, images, side), forward)
}

fn main() -> ExitCode {
    devices::main("input", benchmarks)
}
