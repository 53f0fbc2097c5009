//! The input of a batch of 300 px, and the resize to that of photographs: `benches/devices` says what is measured and how.

mod devices;

use devices::Bench;
use effnetv2::Result;
use effnetv2::backend::Normalisation;
use effnetv2::data::transform::{CropBox, Resampling};
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::kernels::input::{Input, Resize, Source, forward_work};
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

struct Photographs {
    device: Device,
    plan: Resize,
    images: CudaSlice<u8>,
    out: CudaSlice<u8>,
}

/// `images` photographs of `width` × `height` pixels, of each the middle square, to `side` × `side`.
fn photographs(
    device: &Device,
    images: usize,
    [width, height]: [usize; 2],
    side: usize,
) -> Result<Photographs> {
    let length = images * width * height * 3;
    let crop = CropBox { left: (width - height) / 2, top: 0, width: height, height };
    let source = |i| Source { offset: i * width * height * 3, width, height, crop };
    let mut plan = Resize::plan(device, images, side, width, Resampling::default())?;
    plan.begin_step(device.compute(), &(0..images).map(source).collect::<Vec<_>>(), length)?;
    let bytes: Vec<u8> = (0..length).map(|i| (i * 7 % 251) as u8).collect();
    Ok(Photographs {
        device: device.clone(),
        plan,
        images: device.upload(&bytes)?,
        out: device.zeros(images * side * side * 3)?,
    })
}

fn resize(set: &mut Photographs) -> Result<()> {
    set.plan.forward(set.device.compute(), &set.images.as_view(), &mut set.out.as_view_mut())
}

fn benchmarks(bench: &mut Bench) -> Result<()> {
    let (images, side) = bench.size((64, 300), (2, 7));
    let work = forward_work(images, side, Dtype::Bf16);
    bench.case(
        &format!("{images}×{side}×{side}×3"),
        &[work],
        |device| make(device, images, side),
        forward,
    )?;
    let (images, size, side) = bench.size((64, [500, 375], 300), (2, [20, 15], 9));
    let make = |device: &_| photographs(device, images, size, side);
    // What it reads depends on the images.
    let work = make(&bench.device)?.plan.work().cloned();
    let name = format!("{images} of {}×{} to {side}×{side}", size[0], size[1]);
    bench.case(&name, work.as_slice(), make, resize)
}

fn main() -> ExitCode {
    devices::main("input", benchmarks)
}
