//! The head's kernels against `reference::head`, `reference::squeeze_excite` and `reference::batch_norm`.

#![cfg(feature = "cuda")]

mod devices;
#[path = "devices/elements.rs"]
mod elements;

use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::StepKey;
use effnetv2::device::Device;
use effnetv2::kernels::StepScalars;
use effnetv2::kernels::head::{Dropout, Head};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::batch_norm::{self, Arrival};
use effnetv2::reference::{head as reference, squeeze_excite};
use effnetv2::tensor::{Shape, Tensor, matrix};
use elements::{
    EPSILON, Raw, Sample, activated, additions, close, draw, pixel_sums, unwritten, wide, written,
};
use half::{bf16, f16};
use proptest::prelude::*;

fn key(n: usize, seed: u64) -> StepKey {
    StepKey { seed, epoch: (seed % 91) as u32, images: (0..n as u32).map(|i| i * 40_507 + 3).collect() }
}

/// A step that has begun.
fn step(device: &Device, key: &StepKey, scale: f64) -> StepScalars {
    let mut step = StepScalars::new(device, key.images.len()).unwrap();
    step.begin_step(device.compute(), key, scale).unwrap();
    step
}

/// With dropout by `key`, or without.
fn pool<T: Sample>(device: &Device, raw: &Raw<T>, rate: f64, key: Option<&StepKey>) -> Vec<T> {
    let head = Head::<T>::plan(device, raw.shape, 3, rate).unwrap();
    let count = raw.shape.n * raw.shape.c;
    let mut features = unwritten::<T>(device, count);
    let on_device = raw.upload(device);
    let step = key.map(|key| step(device, key, 1.0));
    let dropout = step.as_ref().map_or(Dropout::Off, Dropout::On);
    with_raw!(on_device, view => {
        head.pool(device.compute(), view, dropout, &mut features.slice_mut(..count)).unwrap();
    });
    written(device, &features)
}

/// dz and its two sums.
fn pool_backward<T: Sample>(
    device: &Device,
    raw: &Raw<T>,
    dfeatures: &[T],
    rate: f64,
    key: &StepKey,
) -> (Vec<T>, Vec<f32>) {
    let head = Head::<T>::plan(device, raw.shape, 3, rate).unwrap();
    let step = step(device, key, 1.0);
    let (elements, count) = (raw.shape.elements(), 2 * raw.shape.n * raw.shape.c);
    let (mut dz, mut sums) = (unwritten::<T>(device, elements), unwritten::<f32>(device, count));
    let dfeatures = device.upload(dfeatures).unwrap();
    let on_device = raw.upload(device);
    with_raw!(on_device, view => {
        let (mut dz, mut sums) = (dz.slice_mut(..elements), sums.slice_mut(..count));
        let dfeatures = dfeatures.as_view();
        head.pool_backward(device.compute(), &dfeatures, view, Dropout::On(&step), &mut dz, &mut sums).unwrap();
    });
    (written(device, &dz), written(device, &sums))
}

/// The losses of the images, their mean, and dlogits.
fn cross_entropy<T: Sample>(
    device: &Device,
    (n, classes): (usize, usize),
    logits: &[T],
    targets: &[f32],
    scale: f64,
) -> (Vec<f32>, f32, Vec<T>) {
    let stream = device.compute();
    let mut head = Head::<T>::plan(device, Shape::new(n, 1, 1, 8), classes, 0.0).unwrap();
    let step = step(device, &key(n, 0), scale);
    let mut dlogits = unwritten::<T>(device, n * classes);
    let (logits, targets) = (device.upload(logits).unwrap(), device.upload(targets).unwrap());
    let mut view = dlogits.slice_mut(..n * classes);
    head.cross_entropy(stream, &step, &logits.as_view(), &targets.as_view(), &mut view).unwrap();
    (head.read_losses(stream).unwrap(), head.read_loss(stream).unwrap(), written(device, &dlogits))
}

fn check_pool<T: Sample>(device: &Device, shape: Shape, rate: f64, dropout: bool, seed: u64) {
    let raw = Raw::<T>::random(shape, seed);
    let key = key(shape.n, seed);
    let actual = pool(device, &raw, rate, dropout.then_some(&key));
    let rate = if dropout { rate } else { 0.0 };
    let factors = reference::dropout_factors::<f64>(&key, rate, shape.c);
    let expected = pixel_sums(&activated(&raw), None) / (shape.h * shape.w) as f64 * &factors;
    let magnitude = raw.magnitude(|_| 1.0);
    for (i, (actual, &expected)) in actual.iter().zip(&expected).enumerate() {
        // z: two roundings; the sigmoid: 2⁻²¹; the additions; the mean and the factor: two roundings each.
        let share = (additions(shape) + 8.0) * EPSILON / 2.0 + 4.0 * EPSILON;
        let tolerance = share * magnitude[i] / (1.0 - rate) + T::UNIT * expected.abs() + T::TINY;
        close(actual.wide(), expected, tolerance, format_args!("{shape}, feature {i}"));
        assert_eq!(actual.wide() == 0.0, expected == 0.0, "{shape}, feature {i}");
    }
}

fn check_pool_backward<T: Sample>(device: &Device, shape: Shape, rate: f64, seed: u64) {
    let raw = Raw::<T>::random(shape, seed);
    let key = key(shape.n, seed);
    let count = shape.n * shape.c;
    let dfeatures = draw::<T>(&mut Stream::new(seed, 1, 0, Purpose::Init), count, -2.0, 2.0);
    let (dz, sums) = pool_backward(device, &raw, &dfeatures, rate, &key);
    let pixels = (shape.h * shape.w) as f64;
    let factors = reference::dropout_factors::<f64>(&key, rate, shape.c);
    let arriving = matrix(&wide(&dfeatures), shape.n, shape.c).to_owned() * factors / pixels;
    let mut expected = Tensor::zeros(shape);
    squeeze_excite::spread(&arriving, &mut expected);
    batch_norm::backward(&mut expected, &raw.tensor(), &raw.norm(), Arrival::Alone);
    let mut normalised = raw.tensor();
    for (i, x) in normalised.data_mut().iter_mut().enumerate() {
        *x = (*x - f64::from(raw.mean[i % shape.c])) * f64::from(raw.rstd[i % shape.c]);
    }
    let magnitude = |i: usize| {
        let c = i % shape.c;
        1.0 + (f64::from(raw.scale[c]) * raw.y[i].wide()).abs() + f64::from(raw.shift[c]).abs()
    };
    let of_image = |i: usize| i / (shape.h * shape.w * shape.c) * shape.c + i % shape.c;
    let arriving = arriving.as_slice().unwrap();
    let (mut bound, mut bound_x) = (vec![0.0; count], vec![0.0; count]);
    for (i, (actual, &expected)) in dz.iter().zip(expected.data()).enumerate() {
        // As for the pool, times |z|, which the derivative multiplies the sigmoid with.
        let exact = 8.0 * EPSILON * magnitude(i) * arriving[of_image(i)].abs();
        close(
            actual.wide(),
            expected,
            exact + T::UNIT * expected.abs() + T::TINY,
            format_args!("{shape}, dz {i}"),
        );
        bound[of_image(i)] += exact;
        bound_x[of_image(i)] += exact
            * (raw.y[i].wide().abs() + f64::from(raw.mean[i % shape.c]).abs())
            * f64::from(raw.rstd[i % shape.c]);
    }
    let expected_sums = [pixel_sums(&expected, None), pixel_sums(&expected, Some(&normalised))];
    for (k, (expected, bound)) in expected_sums.iter().zip([bound, bound_x]).enumerate() {
        for (i, (&expected, bound)) in expected.iter().zip(bound).enumerate() {
            // The terms are at most an eighth of their errors over ε; each addition costs half an ε of them.
            let tolerance = bound * (2.0 + additions(shape) / 16.0);
            let actual = f64::from(sums[k * count + i]);
            close(actual, expected, tolerance, format_args!("{shape}, sum {k} of {i}"));
        }
    }
}

fn check_cross_entropy<T: Sample>(
    device: &Device,
    n: usize,
    classes: usize,
    spread: f64,
    scale: f64,
    seed: u64,
) {
    let mut stream = Stream::new(seed, 2, 0, Purpose::Init);
    let logits = draw::<T>(&mut stream, n * classes, -spread, spread);
    let targets: Vec<f32> = draw::<f32>(&mut stream, n * classes, 0.0, 2.0 / classes as f64);
    let (losses, loss, dlogits) = cross_entropy(device, (n, classes), &logits, &targets, scale);
    let (wide_logits, wide_targets) = (wide(&logits), wide(&targets));
    let wide_targets = matrix(&wide_targets, n, classes).to_owned();
    let wide_logits = matrix(&wide_logits, n, classes).to_owned();
    let (expected_loss, expected) = reference::cross_entropy(&wide_logits, &wide_targets);
    // Two roundings of l − top and its exponential, the additions of a sum, and a few operations.
    let roundings = (classes.div_ceil(256) + 13 + 8) as f64 * EPSILON;
    let mut total = 0.0;
    for i in 0..n {
        let row = wide_logits.row(i);
        let top = row.fold(f64::NEG_INFINITY, |a, &b| a.max(b));
        let range: f64 = row.iter().map(|l| top - l).fold(0.0, f64::max);
        let mass = wide_targets.row(i).sum();
        let tolerance = roundings * mass * (1.0 + (classes as f64).ln() + range);
        total += tolerance;
        let one = |m: &ndarray::Array2<f64>| m.row(i).insert_axis(ndarray::Axis(0)).to_owned();
        let (expected_loss, _) = reference::cross_entropy(&one(&wide_logits), &one(&wide_targets));
        close(losses[i].into(), expected_loss, tolerance, format_args!("{n}×{classes}, loss {i}"));
        for k in 0..classes {
            let expected = expected[[i, k]] * scale;
            let t = wide_targets[[i, k]];
            // p·m is expected + t.
            let share = (expected / scale * n as f64 + t) * (roundings + range * EPSILON) + 4.0 * EPSILON * t;
            let tolerance = share * scale / n as f64 + T::UNIT * expected.abs() + T::TINY;
            close(
                dlogits[i * classes + k].wide(),
                expected,
                tolerance,
                format_args!("{n}×{classes}, dlogit {i}, {k}"),
            );
        }
    }
    close(loss.into(), expected_loss, total / n as f64 + EPSILON * expected_loss.abs(), "mean loss");
}

/// Around a block's 64 channels and 32 pixels.
const SHAPES: [(usize, usize, usize, usize); 8] = [
    (1, 1, 1, 8),
    (3, 1, 1, 64),
    (2, 4, 8, 72),
    (2, 3, 11, 56),
    (1, 5, 13, 136),
    (5, 2, 2, 16),
    (2, 7, 7, 128),
    (1, 16, 17, 24),
];

fn any_shape() -> impl Strategy<Value = Shape> {
    let shapes = prop_oneof![
        prop::sample::select(SHAPES.to_vec()),
        (1_usize..4, 1_usize..10, 1_usize..10, 1_usize..20).prop_map(|(n, h, w, c)| (n, h, w, 8 * c))
    ];
    shapes.prop_map(|(n, h, w, c)| Shape::new(n, h, w, c))
}

fn any_rate() -> impl Strategy<Value = f64> {
    prop_oneof![Just(0.0), Just(0.5), 0.0_f64..0.99]
}

proptest! {
    #![proptest_config(devices::cases(32))]

    #[test]
    fn pools_are_the_reference_s(shape in any_shape(), rate in any_rate(), on in any::<bool>(), seed in any::<u64>()) {
        let Some(device) = device() else { return Ok(()) };
        check_pool::<f32>(&device, shape, rate, on, seed);
        check_pool::<f16>(&device, shape, rate, on, seed);
        check_pool::<bf16>(&device, shape, rate, on, seed);
    }

    #[test]
    fn their_backward_is_the_reference_s(shape in any_shape(), rate in any_rate(), seed in any::<u64>()) {
        let Some(device) = device() else { return Ok(()) };
        check_pool_backward::<f32>(&device, shape, rate, seed);
        check_pool_backward::<f16>(&device, shape, rate, seed);
        check_pool_backward::<bf16>(&device, shape, rate, seed);
    }

    #[test]
    fn losses_are_the_reference_s(
        n in prop_oneof![1_usize..5, 250_usize..260],
        classes in prop_oneof![1_usize..20, 250_usize..260, 990_usize..1030],
        spread in 0.0_f64..30.0,
        scale in prop::sample::select(vec![1.0, 1024.0]),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let n = if classes > 20 { n.min(4) } else { n };
        check_cross_entropy::<f32>(&device, n, classes, spread, scale, seed);
        check_cross_entropy::<f16>(&device, n, classes, spread, scale, seed);
        check_cross_entropy::<bf16>(&device, n, classes, spread, scale, seed);
    }

    /// Where the mean is one the features are the factors, bit for bit.
    #[test]
    fn dropout_has_the_bits_of_the_stream(
        rate in prop_oneof![any_rate(), (0_u32..1 << 24).prop_map(|k| f64::from(k) / 16_777_216.0)],
        channels in 1_usize..30, seed in any::<u64>(), epoch in any::<u32>(),
        images in prop::collection::vec(any::<u32>(), 1..5),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let shape = Shape::new(images.len(), 1, 1, 8 * channels);
        let mut raw = Raw::<f32>::integers(shape);
        raw.y.fill(0.0);
        raw.shift.fill(64.0);
        let key = StepKey { seed, epoch, images };
        let features = pool(&device, &raw, rate, Some(&key));
        let factors = reference::dropout_factors::<f32>(&key, rate, shape.c);
        let expected: Vec<f32> = factors.iter().map(|f| 64.0 * f).collect();
        prop_assert_eq!(features, expected);
    }
}

/// A number equal to the rate is not below it.
#[test]
fn dropout_keeps_what_is_drawn_at_the_rate() {
    let Some(device) = device() else { return };
    let mut raw = Raw::<f32>::integers(Shape::new(1, 1, 1, 8));
    raw.y.fill(0.0);
    raw.shift.fill(64.0);
    let key = key(1, 12);
    let mut stream = Stream::new(key.seed, key.epoch, key.images[0], Purpose::Dropout);
    for place in 0..8 {
        let rate = f64::from(stream.uniform());
        assert!(pool(&device, &raw, rate, Some(&key))[place] > 0.0, "{place}, rate {rate}");
        let above = rate + 0.5 / 16_777_216.0;
        assert_eq!(pool(&device, &raw, above, Some(&key))[place], 0.0, "{place}, rate {above}");
    }
}

/// With z this large SiLU is the identity; with numbers of pixels that are powers of two every step is exact.
fn check_integers<T: Sample>(device: &Device) {
    for (n, h, w, c) in [(1, 1, 1, 8), (3, 4, 4, 72), (2, 8, 16, 64), (5, 2, 1, 200)] {
        let shape = Shape::new(n, h, w, c);
        let (raw, key) = (Raw::<T>::integers(shape), key(n, 77));
        let (pixels, count) = ((h * w) as f64, n * c);
        let factors = reference::dropout_factors::<f64>(&key, 0.5, c);
        let mut z = raw.tensor();
        z.data_mut().iter_mut().enumerate().for_each(|(i, y)| *y = 2.0 * *y + f64::from(raw.shift[i % c]));
        let expected = pixel_sums(&z, None) / pixels * &factors;
        let expected: Vec<T> = expected.iter().map(|&v| T::of(v as f32)).collect();
        assert_eq!(pool(device, &raw, 0.5, Some(&key)), expected, "{shape}");

        let dfeatures: Vec<T> = (0..count).map(|i| T::of((i % 9) as f32 - 4.0)).collect();
        let (dz, sums) = pool_backward(device, &raw, &dfeatures, 0.5, &key);
        let arriving = matrix(&wide(&dfeatures), n, c).to_owned() * factors / pixels;
        let mut expected = Tensor::zeros(shape);
        squeeze_excite::spread(&arriving, &mut expected);
        assert_eq!(wide(&dz), expected.data(), "{shape}");
        let mut normalised = raw.tensor();
        normalised
            .data_mut()
            .iter_mut()
            .enumerate()
            .for_each(|(i, y)| *y = (*y - f64::from(raw.mean[i % c])) * 0.5);
        let plain = pixel_sums(&expected, None);
        let weighted = pixel_sums(&expected, Some(&normalised));
        assert_eq!(wide(&sums), plain.iter().chain(&weighted).copied().collect::<Vec<_>>(), "{shape}");
    }
}

#[test]
fn integers_are_exact() {
    let Some(device) = device() else { return };
    check_integers::<f32>(&device);
    check_integers::<f16>(&device);
    check_integers::<bf16>(&device);
}

/// Equal logits of K = 2^k classes: p = 1/K, and a one-hot target costs ln K.
#[test]
fn equal_logits_cost_the_logarithm_of_their_number() {
    let Some(device) = device() else { return };
    for (n, classes) in [(1, 1), (4, 2), (2, 1024), (8, 64), (512, 2)] {
        let mut targets = vec![0.0_f32; n * classes];
        (0..n).for_each(|i| targets[i * classes + i % classes] = 1.0);
        let (losses, mean, dlogits) =
            cross_entropy(&device, (n, classes), &vec![3.0_f32; n * classes], &targets, 8.0);
        let expected = (classes as f64).ln();
        losses
            .iter()
            .chain([&mean])
            .for_each(|&loss| close(loss.into(), expected, EPSILON * expected, classes));
        let gradient =
            targets.iter().map(|t| (1.0 / classes as f32 - t) * 8.0 / n as f32).collect::<Vec<_>>();
        assert_eq!(dlogits, gradient);
    }
}

#[test]
fn bad_logits_are_not_hidden() {
    let Some(device) = device() else { return };
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = vec![0.0_f32; 2 * 300];
        logits[299] = bad;
        let (losses, mean, _) = cross_entropy(&device, (2, 300), &logits, &vec![1.0 / 300.0; 600], 1.0);
        assert!(losses[0].is_nan() && losses[1].is_finite() && mean.is_nan(), "{losses:?}");
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let (shape, n, classes) = (Shape::new(3, 9, 10, 200), 300, 77);
    let run = |seed| {
        if let Some(control) = device.host_control() {
            control.shuffle(seed);
        }
        let (raw, key) = (Raw::<bf16>::random(shape, 4), key(3, 5));
        let mut stream = Stream::new(6, 0, 0, Purpose::Init);
        let dfeatures = draw::<bf16>(&mut stream, shape.n * shape.c, -1.0, 1.0);
        let logits = draw::<bf16>(&mut stream, n * classes, -5.0, 5.0);
        let targets = draw::<f32>(&mut stream, n * classes, 0.0, 0.1);
        (
            pool(&device, &raw, 0.3, Some(&key)),
            pool_backward(&device, &raw, &dfeatures, 0.3, &key),
            cross_entropy(&device, (n, classes), &logits, &targets, 1.0),
        )
    };
    let first = run(0);
    for seed in other_schedules() {
        assert!(first == run(seed), "schedule {seed}");
    }
}

#[test]
fn impossible_plans_are_refused() {
    let Some(device) = device() else { return };
    let good = Shape::new(2, 3, 3, 16);
    for shape in [
        Shape { n: 0, ..good },
        Shape { h: 0, ..good },
        Shape { w: 0, ..good },
        Shape { c: 0, ..good },
        Shape { c: 12, ..good },
        Shape { n: 1 << 27, h: 1, w: 1, ..good },
        Shape { n: usize::MAX, h: 2, ..good },
    ] {
        assert!(matches!(Head::<f32>::plan(&device, shape, 5, 0.0), Err(Error::Shape { .. })), "{shape}");
    }
    for classes in [0, 1 << 30, usize::MAX] {
        assert!(
            matches!(Head::<f32>::plan(&device, good, classes, 0.0), Err(Error::Shape { .. })),
            "{classes}"
        );
    }
    for rate in [-0.1, 1.0, f64::NAN] {
        assert!(matches!(Head::<f32>::plan(&device, good, 5, rate), Err(Error::Usage { .. })), "{rate}");
    }
    for images in [0, usize::MAX] {
        assert!(matches!(StepScalars::new(&device, images), Err(Error::Shape { .. })), "{images}");
    }
    let mut step = StepScalars::new(&device, 2).unwrap();
    assert!(matches!(step.begin_step(device.compute(), &key(3, 0), 1.0), Err(Error::Shape { .. })));
    for scale in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e300] {
        assert!(
            matches!(step.begin_step(device.compute(), &key(2, 0), scale), Err(Error::Usage { .. })),
            "{scale}"
        );
    }
}

#[test]
fn unfit_buffers_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let shape = Shape::new(2, 3, 3, 16);
    let mut head = Head::<f32>::plan(&device, shape, 5, 0.0).unwrap();
    let raw = Raw::<f32>::integers(shape).upload(&device);
    let small = Raw::<f32>::integers(Shape { n: 1, ..shape }).upload(&device);
    let thin = Raw::<f32>::integers(Shape { c: 8, ..shape }).upload(&device);
    let refused =
        |result: effnetv2::Result<()>| assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    let (step, longer) = (StepScalars::new(&device, 2).unwrap(), StepScalars::new(&device, 3).unwrap());
    let on = Dropout::On(&step);
    let mut out = device.zeros::<f32>(400).unwrap();
    let input = device.zeros::<f32>(400).unwrap();
    with_raw!(raw, view => {
        for range in [0..31, 0..33, 1..33] {
            refused(head.pool(stream, view, on, &mut out.slice_mut(range)));
        }
        refused(head.pool(stream, view, Dropout::On(&longer), &mut out.slice_mut(..32)));
        let (mut dz, mut sums) = out.split_at_mut(288);
        for (dfeatures, dz_end, sums_end) in [(31, 288, 64), (32, 287, 64), (32, 288, 65)] {
            let (mut dz, mut sums) = (dz.slice_mut(..dz_end), sums.slice_mut(..sums_end));
            refused(head.pool_backward(stream, &input.slice(..dfeatures), view, on, &mut dz, &mut sums));
        }
    });
    for wrong in [&small, &thin] {
        with_raw!(wrong, view => refused(head.pool(stream, view, on, &mut out.slice_mut(..32))));
    }
    for (logits, targets, dlogits) in [(9, 10, 10), (10, 9, 10), (10, 10, 11)] {
        let (logits, targets) = (input.slice(..logits), input.slice(..targets));
        refused(head.cross_entropy(stream, &step, &logits, &targets, &mut out.slice_mut(..dlogits)));
    }
    let (logits, targets) = (input.slice(..10), input.slice(..10));
    refused(head.cross_entropy(stream, &longer, &logits, &targets, &mut out.slice_mut(..10)));
    assert_eq!(device.read(&out).unwrap(), vec![0.0; 400]);
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
