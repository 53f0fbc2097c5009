//! The input's kernels against `reference::input` and the resize of the CPU pipeline, bit for bit.

#![cfg(feature = "cuda")]

mod devices;

use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::Normalisation;
use effnetv2::data::transform::{CropBox, Filter, RandomResizedCrop, Resampling, SampleId, Scratch};
use effnetv2::data::{Image, MixConfig, MixPlan, PatchBox, TrainTransform};
use effnetv2::device::Device;
use effnetv2::kernels::input::{Input, InputElement, Resize, Source};
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
    for seed in other_schedules() {
        assert!(first == run(seed), "schedule {seed}");
    }
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

/// Bytes between one image and the next that belong to none.
const GAP: usize = 5;

/// Of random bytes from `low` to `high`, each image after the other with a gap.
fn photos(sizes: &[(usize, usize)], (low, high): (f64, f64), seed: u64) -> Vec<Image> {
    let mut stream = Stream::new(seed, 0, 0, Purpose::Crop);
    let image = |&(width, height): &(usize, usize)| {
        let byte = |_| stream.uniform_in(low, high + 1.0).min(high) as u8;
        Image { width, height, pixels: (0..width * height * 3).map(byte).collect() }
    };
    sizes.iter().map(image).collect()
}

/// What becomes of the crops of the images on the device.
fn resized(
    device: &Device,
    images: &[Image],
    crops: &[CropBox],
    side: usize,
    resampling: Resampling,
) -> Vec<u8> {
    let stream = device.compute();
    let (mut bytes, mut sources) = (vec![0_u8; GAP], Vec::new());
    for (image, &crop) in images.iter().zip(crops) {
        sources.push(Source { offset: bytes.len(), width: image.width, height: image.height, crop });
        bytes.extend(&image.pixels);
        bytes.extend([0; GAP]);
    }
    let largest = images.iter().map(|image| image.width.max(image.height)).max().unwrap();
    let mut plan = Resize::plan(device, images.len(), side, largest, resampling).unwrap();
    plan.begin_step(stream, &sources, bytes.len()).unwrap();
    let count = images.len() * side * side * 3;
    let uploaded = device.upload(&bytes).unwrap();
    let mut out = device.upload(&vec![123_u8; count + MARGIN]).unwrap();
    plan.forward(stream, &uploaded.as_view(), &mut out.slice_mut(..count)).unwrap();
    let mut out = device.read(&out).unwrap();
    assert_eq!(out.split_off(count), vec![123; MARGIN], "the margin was written");
    out
}

fn any_resampling() -> impl Strategy<Value = Resampling> {
    let filter = prop_oneof![Just(Filter::Bilinear), Just(Filter::Bicubic)];
    (filter, any::<bool>()).prop_map(|(filter, antialias)| Resampling { filter, antialias })
}

/// Smaller, larger, of the same size and much larger than the output; thin ones.
fn any_photo_size() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![
        (1_usize..70, 1_usize..70),
        (1_usize..4, 1_usize..300),
        (100_usize..400, 1_usize..20),
        Just((24, 24))
    ]
}

/// The weights of an output pixel by the formula, in f64: what the filter is at each source pixel, divided by their sum.
fn exact_weights(
    o: usize,
    (first, length): (usize, usize),
    whole: usize,
    side: usize,
    by: Resampling,
) -> Vec<f64> {
    let scale = length as f64 / side as f64;
    let stretch = if by.antialias { scale.max(1.0) } else { 1.0 };
    let centre = first as f64 + (o as f64 + 0.5) * scale;
    let weights: Vec<f64> = (0..whole)
        .map(|pixel| {
            let x = ((pixel as f64 + 0.5 - centre) / stretch).abs();
            match by.filter {
                Filter::Bilinear => (1.0 - x).max(0.0),
                Filter::Bicubic if x < 1.0 => 1.5 * x.powi(3) - 2.5 * x.powi(2) + 1.0,
                Filter::Bicubic if x < 2.0 => -0.5 * x.powi(3) + 2.5 * x.powi(2) - 4.0 * x + 2.0,
                Filter::Bicubic => 0.0,
            }
        })
        .collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn resizes_are_those_of_the_cpu_pipeline(
        sizes in prop::collection::vec(any_photo_size(), 1..4),
        side in prop_oneof![1_usize..40, Just(24), Just(300)],
        resampling in any_resampling(),
        cropped in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let images = photos(&sizes, (0.0, 255.0), seed);
        let crop = cropped.then_some(RandomResizedCrop { area: (0.1, 1.0), aspect: (0.4, 2.5) });
        let transform = TrainTransform { crop, resampling, ..TrainTransform::plain() };
        let (mut crops, mut expected) = (Vec::new(), Vec::new());
        for (i, image) in images.iter().enumerate() {
            let sample = SampleId { seed, epoch: 0, image: i as u32 };
            crops.push(match &crop {
                Some(crop) => crop.draw(image.width, image.height, &mut sample.stream(Purpose::Crop)),
                None => CropBox { left: 0, top: 0, width: image.width, height: image.height },
            });
            let mut out = vec![0; side * side * 3];
            transform.apply(image, side, sample, &mut Scratch::default(), &mut out).unwrap();
            expected.extend(out);
        }
        prop_assert!(resized(&device, &images, &crops, side, resampling) == expected, "{crops:?}");
    }

    /// The formula itself, without rounding in between. An integer weight is half a unit of its last place off, at most, and
    /// the largest, which is 1/taps at least, has 14 places and more; what the columns' pass gets is rounded to whole numbers,
    /// and so is what it gives. The values leave room for a cubic to overshoot.
    #[test]
    fn resizes_are_within_a_rounding_of_the_formula(
        size in any_photo_size(),
        side in 1_usize..30,
        resampling in any_resampling(),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let images = photos(&[size], (70.0, 185.0), seed);
        let (width, height) = size;
        let crop = CropBox { left: 0, top: 0, width, height };
        let actual = resized(&device, &images, &[crop], side, resampling);
        let weights = |length: usize| -> Vec<Vec<f64>> {
            (0..side).map(|o| exact_weights(o, (0, length), length, side, resampling)).collect()
        };
        let (rows, columns) = (weights(height), weights(width));
        let off = |axis: &[Vec<f64>]| {
            let largest = axis.iter().flatten().copied().fold(0.0, f64::max);
            let places = (32_767.0 / largest).log2().floor().min(21.0);
            let taps = axis.iter().map(|w| w.iter().filter(|w| **w != 0.0).count()).max().unwrap();
            taps as f64 * 0.5 * (-places).exp2() * 255.0
        };
        let most = |axis: &[Vec<f64>]| {
            axis.iter().map(|w| w.iter().map(|w| w.abs()).sum::<f64>()).fold(0.0, f64::max)
        };
        let bound = 0.5 + off(&columns) + most(&columns) * (0.5 + off(&rows)) + 1e-9;
        for (y, row) in rows.iter().enumerate() {
            let mixed: Vec<f64> = (0..width * 3)
                .map(|b| row.iter().enumerate().map(|(k, w)| w * f64::from(images[0].pixels[k * width * 3 + b])).sum())
                .collect();
            for (x, column) in columns.iter().enumerate() {
                for c in 0..3 {
                    let exact: f64 = column.iter().enumerate().map(|(k, w)| w * mixed[k * 3 + c]).sum();
                    let actual = f64::from(actual[(y * side + x) * 3 + c]);
                    prop_assert!((actual - exact).abs() <= bound, "{actual} instead of {exact} ± {bound}");
                }
            }
        }
    }
}

#[test]
fn one_colour_stays_and_one_size_is_a_copy() {
    let Some(device) = device() else { return };
    for (filter, antialias) in [(Filter::Bilinear, true), (Filter::Bicubic, true), (Filter::Bicubic, false)] {
        let resampling = Resampling { filter, antialias };
        let image = Image { width: 91, height: 40, pixels: vec![255; 91 * 40 * 3] };
        let crop = CropBox { left: 0, top: 0, width: 91, height: 40 };
        assert_eq!(resized(&device, &[image], &[crop], 17, resampling), vec![255; 17 * 17 * 3]);
        let images = photos(&[(33, 33)], (0.0, 255.0), 1);
        let crop = CropBox { left: 0, top: 0, width: 33, height: 33 };
        assert_eq!(resized(&device, &images, &[crop], 33, resampling), images[0].pixels);
    }
}

#[test]
fn resizes_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let images = photos(&[(120, 90), (31, 200)], (0.0, 255.0), 2);
    let crops = [(10, 5, 100, 80), (0, 50, 31, 120)];
    let crops = crops.map(|(left, top, width, height)| CropBox { left, top, width, height });
    let run = |seed| {
        if let Some(control) = device.host_control() {
            control.shuffle(seed);
        }
        resized(&device, &images, &crops, 64, Resampling::default())
    };
    let first = run(0);
    for seed in other_schedules() {
        assert!(first == run(seed), "schedule {seed}");
    }
}

#[test]
fn impossible_resizes_are_refused() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let plan = |images, side, largest| Resize::plan(&device, images, side, largest, Resampling::default());
    for (images, side, largest) in [
        (0, 8, 9),
        (1, 0, 9),
        (1, 8, 0),
        (1, 8, 16_385),
        (1 << 20, 1 << 10, 9),
        (usize::MAX, 8, 9),
        (1, usize::MAX, 9),
    ] {
        assert!(
            matches!(plan(images, side, largest), Err(Error::Shape { .. })),
            "{images}, {side}, {largest}"
        );
    }
    let mut resize = plan(1, 4, 10).unwrap();
    let images = device.upload(&[9_u8; 316]).unwrap();
    let mut out = device.zeros::<u8>(64).unwrap();
    let mut refused = |resize: &Resize, images, out_end| {
        let result = resize.forward(stream, &images, &mut out.slice_mut(..out_end));
        assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    };
    refused(&resize, images.slice(..300), 48);
    let crop = |left, top, width, height| CropBox { left, top, width, height };
    let good = Source { offset: 0, width: 10, height: 10, crop: crop(2, 3, 8, 7) };
    for source in [
        Source { offset: 1, ..good },
        Source { offset: usize::MAX, ..good },
        Source { width: 11, height: 9, ..good },
        Source { width: 9, height: 11, ..good },
        Source { crop: crop(3, 3, 8, 7), ..good },
        Source { crop: crop(2, 4, 8, 7), ..good },
        Source { crop: crop(usize::MAX, 3, 8, 7), ..good },
        Source { crop: crop(2, 3, 0, 7), ..good },
        Source { crop: crop(2, 3, 8, 0), ..good },
    ] {
        assert!(matches!(resize.begin_step(stream, &[source], 300), Err(Error::Shape { .. })), "{source:?}");
    }
    assert!(matches!(resize.begin_step(stream, &[good; 2], 300), Err(Error::Shape { .. })));
    assert!(matches!(resize.begin_step(stream, &[good], usize::MAX), Err(Error::Shape { .. })));
    assert_eq!(resize.work(), None);
    refused(&resize, images.slice(..300), 48);
    resize.begin_step(stream, &[good], 300).unwrap();
    // 8 columns of 7 rows to 4 of each; a triangle that is stretched by 2 and 7/4 reaches pixels beyond the crop.
    let work = resize.work().unwrap();
    assert_eq!((work.grid, work.shared), ([4, 1, 1], 3 * 9));
    refused(&resize, images.slice(..299), 48);
    refused(&resize, images.slice(..300), 47);
    refused(&resize, images.slice(1..301), 48);
    assert_eq!(device.read(&out).unwrap(), vec![0; 64]);
    resize.forward(stream, &images.slice(..300), &mut out.slice_mut(..48)).unwrap();
    assert_eq!(device.read(&out).unwrap()[..48], [9; 48]);
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
