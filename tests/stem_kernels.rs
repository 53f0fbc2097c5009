//! The stem's kernels against `reference::conv3x3`.

#![cfg(feature = "cuda")]

#[path = "devices/dense.rs"]
mod dense;
mod devices;
#[path = "devices/elements.rs"]
#[allow(dead_code, reason = "raw tensors with a normalisation to apply are not read by a stem")]
mod elements;

use dense::{Case, Norm, all_close, all_exact, dense, dot, roundings};
use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::{Activation, Normalisation};
use effnetv2::data::MixPlan;
use effnetv2::device::Device;
use effnetv2::kernels::input::{self, Input};
use effnetv2::kernels::stem::{Stem, StemInput, StemShape};
use effnetv2::kernels::{Arrival, GradientOutput, GradientView, Output, OutputKind, Workspace};
use effnetv2::random::{Purpose, Stream};
use effnetv2::tensor::{Conv, Dtype, Padding, Real, Shape};
use elements::{EPSILON, Sample, unwritten, wide, written};
use half::{bf16, f16};
use proptest::prelude::*;

/// Everything the device computes.
#[derive(Clone, Debug, PartialEq)]
struct Outcome<T> {
    plain: Vec<T>,
    moments: Vec<T>,
    norm: Vec<f32>,
    folded: Vec<T>,
    dx: Vec<T>,
    dweight: Vec<f32>,
}

/// With what is added to outputs or not.
fn on_device<T: Sample>(
    device: &Device,
    case: &Case<T>,
    act: Activation,
    skips: bool,
    seed: u64,
) -> Outcome<T> {
    let stream = device.compute();
    let plan = Stem::<T>::plan(device, &case.conv, case.x_shape).unwrap();
    let mut workspace = Workspace::new(device, plan.workspace_floats()).unwrap();
    let (x, weight) = (device.upload(&case.x).unwrap(), device.upload(&case.weight).unwrap());
    let (bias, skip) = (device.upload(&case.bias).unwrap(), device.upload(&case.skip).unwrap());
    let input_skip = device.upload(&case.input_skip).unwrap();
    let (x, weight, bias) = (x.as_view(), weight.as_view(), bias.as_view());
    let (skip, input_skip) = (skip.as_view(), input_skip.as_view());
    let length = case.y_shape.elements();
    let mut fprop = |output: Output<'_, '_, T>| {
        let mut y = unwritten::<T>(device, length);
        let x = StemInput::Elements(&x);
        plan.fprop(stream, x, &weight, &mut y.slice_mut(..length), output, &mut workspace).unwrap();
        written(device, &y)
    };
    let plain = fprop(Output::Plain);
    let folded = fprop(Output::Folded { bias: &bias, act, skip: skips.then_some(&skip) });
    let (moments, norm) = if case.y_shape.pixels() > 1 {
        let mut norm = Norm::random(device, case.conv.outputs, seed);
        let y = norm.with(|statistics| fprop(Output::Moments(statistics)));
        norm.check(device, &y);
        (y, norm.outcome(device))
    } else {
        (plain.clone(), Vec::new())
    };

    let (g, raw) = (device.upload(&case.g).unwrap(), device.upload(&case.raw).unwrap());
    let owed = device.upload(&case.owed).unwrap();
    let (g, raw, owed) = (g.as_view(), raw.as_view(), owed.as_view());
    let gradient = GradientView { g: &g, y: &raw, owed: &owed, arrival: Arrival::Alone };
    let length = case.x_shape.elements();
    let mut dx = unwritten::<T>(device, length);
    let output = GradientOutput::Plain { skip: skips.then_some(&input_skip) };
    plan.dgrad(stream, gradient, &weight, &mut dx.slice_mut(..length), output).unwrap();
    let mut dweight = unwritten::<f32>(device, case.before.len());
    let mut view = dweight.slice_mut(..case.before.len());
    effnetv2::device::write(stream, &case.before, &mut view).unwrap();
    plan.wgrad(stream, StemInput::Elements(&x), gradient, &mut view, &mut workspace).unwrap();
    Outcome { plain, moments, norm, folded, dx: written(device, &dx), dweight: written(device, &dweight) }
}

fn check<T: Sample>(device: &Device, conv: Conv, images: (usize, usize, usize), seed: u64) {
    let case = Case::<T>::random(conv, images, seed);
    let (skips, silu) = (!seed.is_multiple_of(3), seed.is_multiple_of(2));
    let act = if silu { Activation::Silu } else { Activation::Identity };
    let actual = on_device(device, &case, act, skips, seed);

    let (y, size) = case.fprop();
    let share = roundings(27);
    all_close(&actual.plain, y.data(), size.data(), share, "y");
    assert_eq!(actual.moments, actual.plain);
    let bias = |i: usize| f64::from(case.bias[i % conv.outputs]);
    let added = |i: usize| if skips { case.skip[i].wide() } else { 0.0 };
    let apply = |v: f64| if silu { v.silu() } else { v };
    let folded: Vec<f64> = y.data().iter().enumerate().map(|(i, y)| apply(y + bias(i)) + added(i)).collect();
    // SiLU's slope is at most 1.1, its own error a share of what it is taken of.
    let size: Vec<f64> =
        size.data().iter().enumerate().map(|(i, s)| 1.1 * (s + bias(i).abs()) + added(i).abs()).collect();
    all_close(&actual.folded, &folded, &size, share + 8.0 * EPSILON, "folded");

    let (dx, size) = case.dgrad();
    let added = |i: usize| if skips { case.input_skip[i].wide() } else { 0.0 };
    let dx: Vec<f64> = dx.data().iter().enumerate().map(|(i, v)| v + added(i)).collect();
    let size: Vec<f64> = size.data().iter().enumerate().map(|(i, v)| v + added(i).abs()).collect();
    let of_dy = 4.0 * EPSILON;
    all_close(&actual.dx, &dx, &size, roundings(4 * conv.outputs) + of_dy, "dx");
    let (dweight, size) = case.wgrad();
    all_close(&actual.dweight, &dweight, &size, roundings(case.y_shape.pixels()) + of_dy, "dweight");
}

/// One pixel, sides below the kernel, one row, one column; tiles cut anywhere; images that begin at any address; more tiles
/// than blocks; 8 to 64 outputs.
const IMAGES: [((usize, usize, usize), usize); 12] = [
    ((1, 1, 1), 8),
    ((3, 1, 1), 24),
    ((2, 2, 2), 16),
    ((3, 3, 5), 32),
    ((2, 1, 40), 64),
    ((2, 41, 1), 24),
    ((1, 7, 259), 8),
    ((2, 9, 174), 24),
    ((1, 140, 6), 40),
    ((5, 13, 11), 56),
    ((1, 32, 32), 48),
    ((520, 3, 3), 8),
];

fn any_case() -> impl Strategy<Value = (Conv, (usize, usize, usize))> {
    let images = prop_oneof![
        prop::sample::select(IMAGES.to_vec()),
        ((1_usize..5, 1_usize..24, 1_usize..24), (1_usize..9).prop_map(|c| 8 * c)),
    ];
    (images, prop::sample::select(vec![Padding::Same, Padding::Symmetric]))
        .prop_map(|((images, outputs), padding)| (dense(2, padding, 3, outputs), images))
}

proptest! {
    #![proptest_config(devices::cases(24))]

    #[test]
    fn all_directions_are_the_reference_s((conv, images) in any_case(), seed in any::<u64>()) {
        let Some(device) = device() else { return Ok(()) };
        check::<f32>(&device, conv, images, seed);
        check::<f16>(&device, conv, images, seed);
        check::<bf16>(&device, conv, images, seed);
    }
}

fn exact<T: Sample>(device: &Device, conv: Conv, images: (usize, usize, usize)) {
    for skips in [false, true] {
        let case = Case::<T>::integers(conv, images, 7);
        let actual = on_device(device, &case, Activation::Identity, skips, 0);
        let what = format_args!("{conv:?} of {images:?}").to_string();
        let y = case.fprop().0.into_vec();
        all_exact(&actual.plain, &y, format_args!("{what}: y"));
        all_exact(&actual.moments, &y, format_args!("{what}: y with moments"));
        let added = |skip: &[T], i: usize| if skips { skip[i].wide() } else { 0.0 };
        let bias = |i: usize| f64::from(case.bias[i % conv.outputs]);
        let folded: Vec<f64> =
            y.iter().enumerate().map(|(i, y)| y + bias(i) + added(&case.skip, i)).collect();
        all_exact(&actual.folded, &folded, format_args!("{what}: folded"));
        let dx = case.dgrad().0.into_vec();
        let dx: Vec<f64> = dx.iter().enumerate().map(|(i, v)| v + added(&case.input_skip, i)).collect();
        all_exact(&actual.dx, &dx, format_args!("{what}: dx"));
        all_exact(&actual.dweight, &case.wgrad().0, format_args!("{what}: dweight"));
    }
}

#[test]
fn integers_are_exact() {
    let Some(device) = device() else { return };
    for padding in [Padding::Same, Padding::Symmetric] {
        for (images, outputs) in IMAGES {
            let conv = dense(2, padding, 3, outputs);
            exact::<f32>(&device, conv, images);
            exact::<bf16>(&device, conv, images);
        }
        exact::<f16>(&device, dense(2, padding, 3, 24), (3, 10, 17));
    }
}

/// A mean a thousand times the deviation: what `Norm::check` allows depends on the range of values alone.
#[test]
fn moments_survive_a_large_mean() {
    let Some(device) = device() else { return };
    let conv = dense(2, Padding::Same, 3, 24);
    let mut case = Case::<f32>::random(conv, (4, 33, 40), 5);
    // The middle tap alone, which is never outside.
    for (i, w) in case.weight.iter_mut().enumerate() {
        *w = if i % 27 == 12 { 1.0 } else { 0.0 };
    }
    case.x.iter_mut().for_each(|x| *x = 1000.0 + *x / 2.0);
    on_device(&device, &case, Activation::Identity, false, 3);
}

/// ⟨conv x, y⟩ = ⟨x, dgrad y⟩ = ⟨w, wgrad⟩, to the rounding of those sums.
#[test]
fn directions_are_adjoint() {
    let Some(device) = device() else { return };
    for padding in [Padding::Same, Padding::Symmetric] {
        let conv = dense(2, padding, 3, 40);
        let mut case = Case::<f32>::random(conv, (3, 18, 23), 11);
        case.before.fill(0.0);
        let actual = on_device(&device, &case, Activation::Identity, false, 0);
        let product = dot(&wide(&actual.plain), case.dy().0.data());
        // Every term of the three sums is the same product of three.
        let size = dot(case.fprop().1.data(), case.dy().1.data());
        let bound = size * (roundings(case.y_shape.pixels() + 4 * conv.outputs) + 4.0 * EPSILON);
        for (name, other) in [
            ("dgrad", dot(&wide(&case.x), &wide(&actual.dx))),
            ("wgrad", dot(&wide(&case.weight), &wide(&actual.dweight))),
        ] {
            assert!(
                (product - other).abs() <= bound,
                "{name}: {other} instead of {product}, {bound:e} allowed"
            );
        }
    }
}

fn from_bytes<T: Sample + input::InputElement>(device: &Device, side: usize, outputs: usize) {
    let (stream, images) = (device.compute(), 3);
    let conv = dense(2, Padding::Same, 3, outputs);
    let case = Case::<T>::random(conv, (images, side, side), 3);
    let mut random = Stream::new(side as u64, 0, 0, Purpose::Init);
    let bytes: Vec<u8> = (0..case.x.len()).map(|_| random.bits() as u8).collect();
    let bytes = device.upload(&bytes).unwrap();
    let mut normalise = Input::<T>::plan(device, images, side, &Normalisation::IMAGENET).unwrap();
    normalise.begin_step(stream, &MixPlan::none(images), None).unwrap();
    let mut x = device.zeros::<T>(case.x.len()).unwrap();
    normalise.forward(stream, &bytes.as_view(), &mut x.as_view_mut()).unwrap();

    let plan = Stem::<T>::plan(device, &conv, case.x_shape).unwrap();
    let mut workspace = Workspace::new(device, plan.workspace_floats()).unwrap();
    let table = device.upload(&input::table(&Normalisation::IMAGENET).unwrap()).unwrap();
    let (weight, owed) = (device.upload(&case.weight).unwrap(), device.upload(&case.owed).unwrap());
    let (g, raw) = (device.upload(&case.g).unwrap(), device.upload(&case.raw).unwrap());
    let (weight, owed, g, raw) = (weight.as_view(), owed.as_view(), g.as_view(), raw.as_view());
    let gradient = GradientView { g: &g, y: &raw, owed: &owed, arrival: Arrival::Alone };
    let (x, bytes, table) = (x.as_view(), bytes.as_view(), table.as_view());
    let mut run = |input: StemInput<'_, '_, T>| {
        let mut y = unwritten::<T>(device, case.g.len());
        let mut dweight = device.zeros::<f32>(case.weight.len()).unwrap();
        let view = &mut y.slice_mut(..case.g.len());
        plan.fprop(stream, input, &weight, view, Output::Plain, &mut workspace).unwrap();
        plan.wgrad(stream, input, gradient, &mut dweight.as_view_mut(), &mut workspace).unwrap();
        (written(device, &y), device.read(&dweight).unwrap())
    };
    let stored = run(StemInput::Elements(&x));
    assert!(stored == run(StemInput::Bytes { images: &bytes, table: &table }), "side {side}");
}

#[test]
fn bytes_are_normalised_on_load_bit_for_bit() {
    let Some(device) = device() else { return };
    for (side, outputs) in [(1, 8), (2, 8), (7, 24), (32, 32), (45, 24)] {
        from_bytes::<f32>(&device, side, outputs);
        from_bytes::<f16>(&device, side, outputs);
        from_bytes::<bf16>(&device, side, outputs);
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let run = |seed| {
        if let Some(control) = device.host_control() {
            control.shuffle(seed);
        }
        let case = Case::<bf16>::random(dense(2, Padding::Same, 3, 24), (9, 38, 45), 4);
        on_device(&device, &case, Activation::Silu, true, 1)
    };
    let first = run(0);
    for seed in other_schedules() {
        assert!(first == run(seed), "schedule {seed}");
    }
}

#[test]
fn impossible_plans_are_refused() {
    let good = dense(2, Padding::Same, 3, 24);
    let x = Shape::new(2, 5, 4, 3);
    assert_eq!(StemShape::new(&good, x).unwrap().output(), Shape::new(2, 3, 2, 24));
    for (conv, x) in [
        (Conv { stride: 1, ..good }, x),
        (Conv { kernel: 5, ..good }, x),
        (Conv { inputs: 8, ..good }, Shape { c: 8, ..x }),
        (Conv { outputs: 0, ..good }, x),
        (Conv { outputs: 20, ..good }, x),
        (Conv { outputs: 72, ..good }, x),
        (good, Shape { c: 4, ..x }),
        (good, Shape { n: 0, ..x }),
        (good, Shape { n: 1 << 20, h: 300, w: 300, ..x }),
        (good, Shape::new(1, 1, 14_000_000, 3)),
    ] {
        let refused = StemShape::new(&conv, x);
        assert!(matches!(refused, Err(Error::Shape { .. })), "{conv:?} of {x}: {refused:?}");
    }
}

#[test]
fn unfit_buffers_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let conv = dense(2, Padding::Same, 3, 8);
    // 6000 elements of x, 216 weights, 4000 of y.
    let plan = Stem::<f32>::plan(&device, &conv, Shape::new(5, 20, 20, 3)).unwrap();
    let mut workspace = Workspace::new(&device, plan.workspace_floats()).unwrap();
    let mut small = Workspace::new(&device, 1).unwrap();
    let input = device.zeros::<f32>(8192).unwrap();
    let bytes = device.zeros::<u8>(8192).unwrap();
    let mut out = device.zeros::<f32>(8192).unwrap();
    let refused =
        |result: effnetv2::Result<()>| assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    let (bias, skip) = (input.slice(..8), input.slice(..4000));
    for (x, weight, y) in [
        (0..5999, 216, 0..4000),
        (1..6001, 216, 0..4000),
        (0..6000, 215, 0..4000),
        (0..6000, 216, 0..4001),
        (0..6000, 216, 1..4001),
    ] {
        let (x, weight) = (input.slice(x), input.slice(..weight));
        let (x, y) = (StemInput::Elements(&x), &mut out.slice_mut(y));
        refused(plan.fprop(stream, x, &weight, y, Output::Plain, &mut workspace));
    }
    let (x, weight) = (input.slice(..6000), input.slice(..216));
    let elements = StemInput::Elements(&x);
    for (images, table) in [(5999, 768), (6000, 767)] {
        let (images, table) = (bytes.slice(..images), input.slice(..table));
        let x = StemInput::Bytes { images: &images, table: &table };
        let y = &mut out.slice_mut(..4000);
        refused(plan.fprop(stream, x, &weight, y, Output::Plain, &mut workspace));
    }
    for (bias, skip) in [(7, 4000), (8, 3999)] {
        let (bias, skip) = (input.slice(..bias), input.slice(..skip));
        let output = Output::Folded { bias: &bias, act: Activation::Silu, skip: Some(&skip) };
        refused(plan.fprop(stream, elements, &weight, &mut out.slice_mut(..4000), output, &mut workspace));
    }
    for channels in [8, 16] {
        let mut norm = Norm::random(&device, channels, 1);
        let workspace = if channels == 8 { &mut small } else { &mut workspace };
        norm.with(|statistics| {
            let (y, output) = (&mut out.slice_mut(..4000), Output::Moments(statistics));
            refused(plan.fprop(stream, elements, &weight, y, output, workspace));
        });
    }
    let owed = input.slice(..24);
    let gradient = GradientView { g: &skip, y: &skip, owed: &owed, arrival: Arrival::Alone };
    let factors = input.slice(..5);
    let short = input.slice(..3999);
    for wrong in [
        GradientView { g: &short, ..gradient },
        GradientView { y: &short, ..gradient },
        GradientView { owed: &bias, ..gradient },
        GradientView { arrival: Arrival::Factors(&factors), ..gradient },
    ] {
        let plain = GradientOutput::Plain { skip: None };
        refused(plan.dgrad(stream, wrong, &weight, &mut out.slice_mut(..6000), plain));
        refused(plan.wgrad(stream, elements, wrong, &mut out.slice_mut(..216), &mut workspace));
    }
    for (skip, dx) in [(5999, 6000), (6000, 5999)] {
        let skip = input.slice(..skip);
        let output = GradientOutput::Plain { skip: Some(&skip) };
        refused(plan.dgrad(stream, gradient, &weight, &mut out.slice_mut(..dx), output));
    }
    let mut sums = device.zeros::<f32>(5 * 5 * 3).unwrap();
    let output = GradientOutput::Gated { y: &x, norm: &bias, sums: &mut sums.as_view_mut() };
    refused(plan.dgrad(stream, gradient, &weight, &mut out.slice_mut(..6000), output));
    refused(plan.wgrad(stream, elements, gradient, &mut out.slice_mut(..215), &mut workspace));
    refused(plan.wgrad(stream, elements, gradient, &mut out.slice_mut(..216), &mut small));
    assert_eq!(device.read(&out).unwrap(), vec![0.0; 8192]);

    // The moments of a single value are none.
    let plan = Stem::<f32>::plan(&device, &conv, Shape::new(1, 2, 2, 3)).unwrap();
    Norm::random(&device, 8, 1).with(|statistics| {
        let (x, y) = (input.slice(..12), &mut out.slice_mut(..8));
        let (x, output) = (StemInput::Elements(&x), Output::Moments(statistics));
        refused(plan.fprop(stream, x, &weight, y, output, &mut workspace));
    });
}

/// The stem of V2-S at 300 pixels: what it moves is what its tensors hold, and its blocks are few.
#[test]
fn costs_are_counted() {
    let shape = StemShape::new(&dense(2, Padding::Same, 3, 24), Shape::new(256, 300, 300, 3)).unwrap();
    let (x, y) = (256 * 90_000 * 3, 256 * 22_500 * 24);
    let work = shape.fprop_work(Dtype::Bf16, false, OutputKind::Plain);
    assert_eq!(work.cost.bytes, 2 * (x + y + 648));
    assert_eq!(work.cost.operations, 54 * y);
    let bytes = shape.fprop_work(Dtype::Bf16, true, OutputKind::Folded { skip: true });
    assert_eq!(bytes.cost.bytes, x + 3072 + 2 * (2 * y + 648) + 96);
    let moments = shape.fprop_work(Dtype::F32, false, OutputKind::Moments);
    assert!((256..=512).contains(&moments.grid[0]), "{moments:?}");
    assert!(moments.shared <= 44 * 1024, "{moments:?}");
    let wgrad = shape.wgrad_work(Dtype::F32, false);
    assert!((128..=256).contains(&wgrad.grid[0]) && wgrad.shared <= 44 * 1024, "{wgrad:?}");
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
