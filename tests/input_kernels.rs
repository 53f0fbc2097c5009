//! The input's kernels against `reference::input`, bit for bit.

#![cfg(feature = "cuda")]

mod devices;

use devices::{again_on_a_gpu, device};
use effnetv2::Error;
use effnetv2::backend::Normalisation;
use effnetv2::data::{MixConfig, MixPlan, PatchBox};
use effnetv2::device::Device;
use effnetv2::kernels::input::{Input, InputElement};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::input as reference;
use half::{bf16, f16};
use proptest::prelude::*;

/// A batch, and what becomes of it.
#[derive(Clone, Debug)]
struct Batch {
    side: usize,
    images: Vec<u8>,
    mix: MixPlan,
    flips: Option<Vec<bool>>,
}

/// Elements behind y that nothing may touch.
const MARGIN: usize = 16;
const UNTOUCHED: f32 = -123.5;

fn on_device<T: InputElement>(
    device: &Device,
    batch: &Batch,
    normalisation: &Normalisation,
    of: fn(f32) -> T,
) -> Vec<T> {
    let stream = device.compute();
    let mut plan = Input::<T>::plan(device, batch.mix.len(), batch.side, normalisation).unwrap();
    plan.begin_step(stream, &batch.mix, batch.flips.as_deref()).unwrap();
    let n = plan.elements();
    assert_eq!(n, batch.images.len());
    let images = device.upload(&batch.images).unwrap();
    let mut y = device.upload(&vec![of(UNTOUCHED); n + MARGIN]).unwrap();
    plan.forward(stream, &images.as_view(), &mut y.slice_mut(..n)).unwrap();
    device.read(&y).unwrap()
}

/// The reference knows nothing of flips: it gets the images flipped.
fn on_reference(batch: &Batch, normalisation: &Normalisation) -> Vec<f32> {
    let mut images = batch.images.clone();
    let side = batch.side;
    for (i, image) in images.chunks_mut(side * side * 3).enumerate() {
        if batch.flips.as_ref().is_some_and(|flips| flips[i]) {
            for row in image.chunks_mut(side * 3) {
                let flipped: Vec<u8> = row.chunks(3).rev().flatten().copied().collect();
                row.copy_from_slice(&flipped);
            }
        }
    }
    let mut y = reference::forward::<f32>(&images, side, normalisation, &batch.mix).unwrap().into_vec();
    y.extend([UNTOUCHED; MARGIN]);
    y
}

fn agree(device: &Device, batch: &Batch, normalisation: &Normalisation) {
    let expected = on_reference(batch, normalisation);
    assert_eq!(on_device::<f32>(device, batch, normalisation, |v| v), expected);
    let half: Vec<f16> = expected.iter().map(|&v| f16::from_f32(v)).collect();
    assert_eq!(on_device(device, batch, normalisation, f16::from_f32), half);
    let brain: Vec<bf16> = expected.iter().map(|&v| bf16::from_f32(v)).collect();
    assert_eq!(on_device(device, batch, normalisation, bf16::from_f32), brain);
}

fn random_images(n: usize, side: usize, seed: u64) -> Vec<u8> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Init);
    (0..n * side * side * 3).map(|_| stream.bits() as u8).collect()
}

/// Odd sides, so that images begin at any address; sides so small that eight elements span several images; and sizes
/// around a block's 8192 elements.
const SIZES: [(usize, usize); 9] =
    [(1, 1), (7, 1), (2, 2), (3, 3), (5, 5), (2, 16), (1, 52), (1, 53), (4, 33)];

fn any_size() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![prop::sample::select(SIZES.to_vec()), (1_usize..7, 1_usize..30)]
}

proptest! {
    #![proptest_config(devices::cases(64))]

    #[test]
    fn batches_are_the_reference_s(
        (n, side) in any_size(),
        mixup in prop_oneof![Just(0.0), 0.1_f64..2.0],
        cutmix in prop_oneof![Just(0.0), 0.1_f64..2.0],
        flips in prop::option::of(prop::collection::vec(any::<bool>(), 7)),
        imagenet in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let ids: Vec<u32> = (0..n as u32).collect();
        let batch = Batch {
            side,
            images: random_images(n, side, seed),
            mix: MixPlan::draw(MixConfig { mixup, cutmix }, seed, 0, &ids, side).unwrap(),
            flips: flips.map(|flips| flips[..n].to_vec()),
        };
        let normalisation = if imagenet { Normalisation::IMAGENET } else { Normalisation::HALF };
        agree(&device, &batch, &normalisation);
    }
}

/// A plan that draws nothing: partners in a ring, any λ with a box at once, boxes at every border.
#[test]
fn any_plan_is_followed() {
    let Some(device) = device() else { return };
    let (n, side) = (6, 9);
    let patch = |left, top, right, bottom| PatchBox { left, top, right, bottom };
    let mix = MixPlan {
        partner: vec![1, 2, 3, 4, 5, 0],
        lambda: vec![0.7, 1.0, 0.3, 0.0, 0.6, 0.9],
        boxes: vec![
            patch(0, 0, 9, 9),
            patch(8, 8, 9, 9),
            patch(0, 0, 1, 1),
            patch(3, 0, 5, 9),
            patch(4, 2, 4, 7),
            patch(0, 4, 9, 5),
        ],
        label_weight: vec![0.5; 6],
    };
    for flips in [None, Some(vec![true, false, true, true, false, false])] {
        let batch = Batch { side, images: random_images(n, side, 3), mix: mix.clone(), flips };
        agree(&device, &batch, &Normalisation::IMAGENET);
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let (n, side) = (5, 43);
    let run = |seed| {
        if let Some(control) = device.host_control() {
            control.shuffle(seed);
        }
        let ids: Vec<u32> = (0..n as u32).collect();
        let mix = MixPlan::draw(MixConfig { mixup: 0.5, cutmix: 1.0 }, 1, 2, &ids, side).unwrap();
        let flips = Some(vec![true, false, false, true, true]);
        let batch = Batch { side, images: random_images(n, side, 9), mix, flips };
        on_device(&device, &batch, &Normalisation::HALF, bf16::from_f32)
    };
    let first = run(0);
    assert!(first == run(1));
    assert!(first == run(2));
}

#[test]
fn impossible_plans_are_refused() {
    let Some(device) = device() else { return };
    let plan = |n, side| Input::<f32>::plan(&device, n, side, &Normalisation::HALF);
    for (n, side) in [(0, 4), (4, 0), (1, 26_755), (715_827_883, 1), (usize::MAX, 1), (1, usize::MAX)] {
        assert!(matches!(plan(n, side), Err(Error::Shape { .. })), "{n} images, side {side}");
    }
    for deviation in [0.0, f64::NAN] {
        let normalisation = Normalisation { mean: [0.5; 3], deviation: [0.5, deviation, 0.5] };
        let refused = Input::<f32>::plan(&device, 1, 4, &normalisation);
        assert!(matches!(refused, Err(Error::Usage { .. })), "deviation {deviation}");
    }
}

#[test]
fn impossible_steps_are_refused_and_leave_the_last_one() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let mut input = Input::<f32>::plan(&device, 2, 4, &Normalisation::HALF).unwrap();
    let none = MixPlan::none(2);
    let patch = |left, top, right, bottom| PatchBox { left, top, right, bottom };
    let with = |change: &dyn Fn(&mut MixPlan)| {
        let mut plan = none.clone();
        change(&mut plan);
        plan
    };
    let wrong = [
        MixPlan::none(1),
        MixPlan::none(3),
        with(&|plan| plan.partner[1] = 2),
        with(&|plan| plan.partner.truncate(1)),
        with(&|plan| plan.lambda.push(1.0)),
        with(&|plan| plan.boxes.clear()),
        with(&|plan| plan.lambda[0] = 1.5),
        with(&|plan| plan.lambda[0] = f32::NAN),
        with(&|plan| plan.boxes[1] = patch(0, 0, 5, 4)),
        with(&|plan| plan.boxes[1] = patch(0, 0, 4, 5)),
        with(&|plan| plan.boxes[1] = patch(3, 0, 2, 4)),
        with(&|plan| plan.boxes[1] = patch(0, 3, 4, 2)),
    ];
    for plan in &wrong {
        assert!(matches!(input.begin_step(stream, plan, None), Err(Error::Shape { .. })), "{plan:?}");
    }
    assert!(matches!(input.begin_step(stream, &none, Some(&[true])), Err(Error::Shape { .. })));
    let images = device.upload(&[255_u8; 96]).unwrap();
    let mut y = device.zeros::<f32>(96).unwrap();
    input.forward(stream, &images.as_view(), &mut y.as_view_mut()).unwrap();
    assert_eq!(device.read(&y).unwrap(), vec![1.0; 96]);
}

#[test]
fn unfit_buffers_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let input = Input::<f32>::plan(&device, 2, 4, &Normalisation::HALF).unwrap();
    let images = device.upload(&[255_u8; 128]).unwrap();
    let mut y = device.zeros::<f32>(128).unwrap();
    for (images, y_range) in [
        (images.slice(..95), 0..96),
        (images.slice(..97), 0..96),
        (images.slice(..96), 0..95),
        (images.slice(..96), 0..128),
        (images.slice(1..97), 0..96),
        (images.slice(..96), 1..97),
    ] {
        let refused = input.forward(stream, &images, &mut y.slice_mut(y_range));
        assert!(matches!(refused, Err(Error::Shape { .. })), "{refused:?}");
    }
    assert_eq!(device.read(&y).unwrap(), vec![0.0; 128]);
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
