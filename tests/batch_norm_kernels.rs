//! The kernels of batch normalisation against `reference::batch_norm` and the fused reference.

#![cfg(feature = "cuda")]

mod devices;
#[path = "devices/elements.rs"]
#[allow(dead_code, reason = "sums over the pixels of one image are other tests' matter")]
mod elements;

use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::{
    Activation, Backend, ConvNorm, DropPath, Raw as RawOutput, StepKey, VarianceEstimator,
};
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::device::{Device, Graph};
use effnetv2::kernels::batch_norm::{
    BatchNorm, BatchNormShape, Evaluation, Merge, MergeGradient, StochasticDepth,
};
use effnetv2::kernels::{Debt, RawElement, Statistics, StepScalars, Workspace};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::Reference;
use effnetv2::reference::batch_norm::{self as reference, Arrival, Moments, Norm, Owed};
use effnetv2::tensor::{Conv, ConvKind, Padding, Shape, Tensor};
use elements::{EPSILON, Raw, Sample, close, draw, unwritten, wide, written};
use half::{bf16, f16};
use proptest::prelude::*;

/// What one rounding to f32 may cost.
const U: f64 = EPSILON / 2.0;

/// The additions in a row that a sum over all pixels takes, at most: a thread's, those of 16 lanes and more, and the last
/// block's.
fn additions(shape: Shape) -> f64 {
    let pixels = shape.pixels();
    let runs = BatchNormShape::new(shape, f32::DTYPE).unwrap().moments_work().grid[0] as usize;
    let run = if runs == 1 { pixels } else { (pixels - 1) / (runs - 1) };
    (run.div_ceil(16) + 8 + runs.div_ceil(32) + 4 + 8) as f64
}

/// The four vectors of a raw tensor as one.
fn norm_of<T>(raw: &Raw<T>) -> Vec<f32> {
    [&raw.scale, &raw.shift, &raw.mean, &raw.rstd].into_iter().flatten().copied().collect()
}

fn factors(n: usize, seed: u64) -> Vec<f32> {
    let mut stream = Stream::new(seed, 5, 0, Purpose::Init);
    (0..n).map(|_| if stream.uniform() < 0.4 { 0.0 } else { 1.25 }).collect()
}

/// γ, β and the running statistics of a layer, and how they move.
#[derive(Clone, Debug)]
struct Layer {
    gamma: Vec<f32>,
    beta: Vec<f32>,
    running_mean: Vec<f32>,
    running_var: Vec<f32>,
    epsilon: f64,
    momentum: f64,
    variance: VarianceEstimator,
}

impl Layer {
    fn random(channels: usize, seed: u64) -> Self {
        let mut stream = Stream::new(seed, 6, 0, Purpose::Init);
        let mut vector = |low, high| draw(&mut stream, channels, low, high);
        Self {
            gamma: vector(-2.0, 2.0),
            beta: vector(-1.0, 1.0),
            running_mean: vector(-3.0, 3.0),
            running_var: vector(0.1, 3.0),
            epsilon: 1e-3,
            momentum: 0.1,
            variance: [VarianceEstimator::Biased, VarianceEstimator::Unbiased][(seed & 1) as usize],
        }
    }
}

/// The norm \[4, c\], the running mean and the running variance.
#[derive(Clone, Debug, PartialEq)]
struct Normalised {
    norm: Vec<f32>,
    running: [Vec<f32>; 2],
}

fn workspace<T: Sample>(device: &Device, plan: &BatchNorm<T>) -> Workspace {
    Workspace::new(device, plan.workspace_floats()).unwrap()
}

fn moments<T: Sample>(device: &Device, shape: Shape, y: &[T], layer: &Layer) -> Normalised {
    let stream = device.compute();
    let plan = BatchNorm::<T>::plan(device, shape).unwrap();
    let mut workspace = workspace(device, &plan);
    let y = device.upload(y).unwrap();
    let mut norm = unwritten::<f32>(device, 4 * shape.c);
    let [gamma, beta] = [&layer.gamma, &layer.beta].map(|v| device.upload(v).unwrap());
    let running = || [&layer.running_mean, &layer.running_var].map(|v| device.upload(v).unwrap());
    let mut run = |[mean, var]: [CudaSlice<f32>; 2]| {
        let (mut mean, mut var) = (mean, var);
        let statistics = Statistics {
            gamma: &gamma.as_view(),
            beta: &beta.as_view(),
            running_mean: &mut mean.as_view_mut(),
            running_var: &mut var.as_view_mut(),
            norm: &mut norm.slice_mut(..4 * shape.c),
            epsilon: layer.epsilon,
            momentum: layer.momentum,
            variance: layer.variance,
        };
        plan.moments(stream, &y.as_view(), statistics, &mut workspace).unwrap();
        let running = [device.read(&mean).unwrap(), device.read(&var).unwrap()];
        Normalised { norm: written(device, &norm), running }
    };
    let first = run(running());
    // The workspace is ready for the next launch.
    assert!(first == run(running()), "{shape}: a second launch differs");
    first
}

/// Mean, biased variance and range of each channel, in two passes in f64.
fn exact_moments<T: Sample>(y: &[T], channels: usize) -> Vec<(f64, f64, f64)> {
    let count = (y.len() / channels) as f64;
    (0..channels)
        .map(|c| {
            let values = || y.iter().skip(c).step_by(channels).map(|v| v.wide());
            let mean = values().sum::<f64>() / count;
            let var = values().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
            let (low, high) = values().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
            (mean, var, high - low)
        })
        .collect()
}

/// Against exact moments. Every number that the kernel adds is at most the range R of a channel, for it is the distance of
/// two of its values or of averages of them; a mean of a run is rounded to f32, which costs U·|mean|.
fn check_moments<T: Sample>(shape: Shape, y: &[T], layer: &Layer, actual: &Normalised) {
    let (c, adds) = (shape.c, additions(shape));
    let correction = match layer.variance {
        VarianceEstimator::Biased => 1.0,
        VarianceEstimator::Unbiased => shape.pixels() as f64 / (shape.pixels() as f64 - 1.0),
    };
    let norm = wide(&actual.norm);
    for (k, (mean, var, range)) in exact_moments(y, c).into_iter().enumerate() {
        let [scale, shift, m, rstd] = [0, 1, 2, 3].map(|row| norm[row * c + k]);
        let size = mean.abs() + range;
        let mean_bound = U * (adds * range + 4.0 * size);
        let var_bound = U * (4.0 * adds * range * range + 8.0 * range * size) + (4.0 * U * size).powi(2);
        let what = |name| format!("{shape}, channel {k}, {name}");
        close(m, mean, mean_bound, what("mean"));
        // The reciprocal deviation falls as the variance grows.
        let rstd_of = |var: f64| 1.0 / (var.max(0.0) + layer.epsilon).sqrt();
        let bound = (rstd_of(var - var_bound) - rstd_of(var + var_bound)) + 4.0 * U * rstd_of(var);
        close(rstd, rstd_of(var), bound, what("reciprocal deviation"));
        // From what was stored.
        let (gamma, beta) = (f64::from(layer.gamma[k]), f64::from(layer.beta[k]));
        close(scale, gamma * rstd, U * scale.abs(), what("scale"));
        close(shift, beta - scale * m, 2.0 * U * (beta.abs() + (scale * m).abs()), what("shift"));
        let moved = |old: f32, new: f64| f64::from(old) + layer.momentum * (new - f64::from(old));
        let (old_mean, old_var) = (layer.running_mean[k], layer.running_var[k]);
        let rounding = |old: f32, new: f64| 4.0 * U * (f64::from(old).abs() + new.abs());
        close(
            actual.running[0][k].into(),
            moved(old_mean, mean),
            layer.momentum * mean_bound + rounding(old_mean, mean),
            what("running mean"),
        );
        let new_var = var * correction;
        close(
            actual.running[1][k].into(),
            moved(old_var, new_var),
            layer.momentum * correction * var_bound + rounding(old_var, new_var),
            what("running variance"),
        );
    }
}

/// Values around means of up to 100 deviations.
fn shifted<T: Sample>(shape: Shape, seed: u64) -> Vec<T> {
    let mut stream = Stream::new(seed, 7, 0, Purpose::Init);
    let means: Vec<f64> = (0..shape.c).map(|_| stream.uniform_in(-58.0, 58.0)).collect();
    let value = |i: usize| T::of((means[i % shape.c] + stream.uniform_in(-1.0, 1.0)) as f32);
    (0..shape.elements()).map(value).collect()
}

fn merged<T: Sample>(
    device: &Device,
    raw: &Raw<T>,
    act: Activation,
    skip: Option<&[T]>,
    factors: Option<&[f32]>,
) -> Vec<T> {
    let shape = raw.shape;
    let plan = BatchNorm::<T>::plan(device, shape).unwrap();
    let (y, norm) = (device.upload(&raw.y).unwrap(), device.upload(&norm_of(raw)).unwrap());
    let skip = skip.map(|skip| device.upload(skip).unwrap());
    let factors = factors.map(|factors| device.upload(factors).unwrap());
    let mut out = unwritten::<T>(device, shape.elements());
    let (skip, factors) =
        (skip.as_ref().map(|skip| skip.as_view()), factors.as_ref().map(|factors| factors.as_view()));
    let merge =
        Merge { y: &y.as_view(), norm: &norm.as_view(), act, skip: skip.as_ref(), factors: factors.as_ref() };
    plan.merge(device.compute(), merge, &mut out.slice_mut(..shape.elements())).unwrap();
    written(device, &out)
}

/// dz where it is written, then dγ, dβ and what is owed.
#[derive(Clone, Debug, PartialEq)]
struct Backward<T> {
    dz: Vec<T>,
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
    owed: Vec<f32>,
}

/// What the gradients are added to.
const BEFORE: f32 = 0.5;

/// Runs `launch` with a debt, and reads it.
fn with_debt(
    device: &Device,
    norm: &CudaSlice<f32>,
    channels: usize,
    launch: impl FnOnce(Debt<'_, '_>),
) -> [Vec<f32>; 3] {
    let [mut dgamma, mut dbeta] = [(); 2].map(|()| device.upload(&vec![BEFORE; channels]).unwrap());
    let mut owed = unwritten::<f32>(device, 3 * channels);
    launch(Debt {
        norm: &norm.as_view(),
        dgamma: &mut dgamma.as_view_mut(),
        dbeta: &mut dbeta.as_view_mut(),
        owed: &mut owed.slice_mut(..3 * channels),
    });
    [device.read(&dgamma).unwrap(), device.read(&dbeta).unwrap(), written(device, &owed)]
}

fn merge_backward<T: Sample>(
    device: &Device,
    raw: &Raw<T>,
    act: Activation,
    g: &[T],
    factors: Option<&[f32]>,
) -> Backward<T> {
    let (shape, stream) = (raw.shape, device.compute());
    let plan = BatchNorm::<T>::plan(device, shape).unwrap();
    let mut workspace = workspace(device, &plan);
    let (y, g) = (device.upload(&raw.y).unwrap(), device.upload(g).unwrap());
    let norm = device.upload(&norm_of(raw)).unwrap();
    let factors = factors.map(|factors| device.upload(factors).unwrap());
    let factors = factors.as_ref().map(|factors| factors.as_view());
    let (g, y) = (g.as_view(), y.as_view());
    let gradient = MergeGradient { g: &g, y: &y, factors: factors.as_ref() };
    let mut dz = unwritten::<T>(device, shape.elements());
    let [dgamma, dbeta, owed] = with_debt(device, &norm, shape.c, |debt| match act {
        Activation::Identity => {
            plan.merge_backward_identity(stream, gradient, debt, &mut workspace).unwrap();
        }
        Activation::Silu => {
            let mut dz = dz.slice_mut(..shape.elements());
            plan.merge_backward_silu(stream, gradient, &mut dz, debt, &mut workspace).unwrap();
        }
    });
    let dz = if act == Activation::Silu { written(device, &dz) } else { Vec::new() };
    Backward { dz, dgamma, dbeta, owed }
}

/// |scale·y| + |shift| of an element.
fn size<T: Sample>(raw: &Raw<T>, i: usize) -> f64 {
    let c = i % raw.shape.c;
    (f64::from(raw.scale[c]) * raw.y[i].wide()).abs() + f64::from(raw.shift[c]).abs()
}

/// z costs two roundings of its terms; SiLU 2⁻²¹ of |z|, its own and what z's error becomes under a slope of at most 1.1; the
/// factor and the sum one rounding each.
fn check_merge<T: Sample>(
    device: &Device,
    shape: Shape,
    act: Activation,
    skip: bool,
    dropped: bool,
    seed: u64,
) {
    let raw = Raw::<T>::random(shape, seed);
    let skip =
        skip.then(|| draw::<T>(&mut Stream::new(seed, 8, 0, Purpose::Init), shape.elements(), -2.0, 2.0));
    let factors = dropped.then(|| factors(shape.n, seed));
    let actual = merged(device, &raw, act, skip.as_deref(), factors.as_deref());
    let tensor = |values: &[T]| Tensor::from_vec(shape, wide(values)).unwrap();
    let (wide_skip, wide_factors) = (skip.as_deref().map(tensor), factors.as_deref().map(wide));
    let expected =
        reference::merge(&raw.tensor(), &raw.norm(), act, wide_skip.as_ref(), wide_factors.as_deref());
    for (i, (actual, &expected)) in actual.iter().zip(expected.data()).enumerate() {
        let factor = wide_factors.as_ref().map_or(1.0, |f| f[i / (shape.h * shape.w * shape.c)]);
        let skipped = wide_skip.as_ref().map_or(0.0, |skip| skip.data()[i].abs());
        let tolerance = factor * size(&raw, i) * 8.0 * EPSILON
            + 2.0 * U * (factor * size(&raw, i) + skipped)
            + T::UNIT * expected.abs()
            + T::TINY;
        close(actual.wide(), expected, tolerance, format_args!("{shape}, {act:?}, element {i}"));
    }
}

fn check_backward<T: Sample>(device: &Device, shape: Shape, act: Activation, dropped: bool, seed: u64) {
    let raw = Raw::<T>::random(shape, seed);
    let g = draw::<T>(&mut Stream::new(seed, 9, 0, Purpose::Init), shape.elements(), -2.0, 2.0);
    let factors = dropped.then(|| factors(shape.n, seed));
    let actual = merge_backward(device, &raw, act, &g, factors.as_deref());

    let wide_factors = factors.as_deref().map(wide);
    let mut dz = Tensor::from_vec(shape, wide(&g)).unwrap();
    let (y, norm) = (raw.tensor(), raw.norm());
    let (dbeta, dgamma) = match act {
        Activation::Identity => reference::backward_identity(&dz, &y, &norm, wide_factors.as_deref()),
        Activation::Silu => {
            let arrival = wide_factors.as_deref().map_or(Arrival::Alone, Arrival::Factors);
            reference::backward(&mut dz, &y, &norm, arrival)
        }
    };

    // SiLU' costs 2⁻²¹·(1 + |z|) for the sigmoid, half as much for its own roundings and a little for those of z.
    let slope = if act == Activation::Silu { 8.0 * EPSILON } else { 0.0 };
    let (mut beta_size, mut gamma_size) = (vec![0.0; shape.c], vec![0.0; shape.c]);
    let image = shape.h * shape.w * shape.c;
    for i in 0..shape.elements() {
        let c = i % shape.c;
        let factor = wide_factors.as_ref().map_or(1.0, |f| f[i / image]);
        let term = (factor * g[i].wide()).abs() * (1.0 + size(&raw, i));
        if act == Activation::Silu {
            let expected = dz.data()[i];
            let tolerance = term * slope + T::UNIT * expected.abs() + T::TINY;
            close(actual.dz[i].wide(), expected, tolerance, format_args!("{shape}, dz {i}"));
        }
        beta_size[c] += term;
        gamma_size[c] += term * (y.data()[i].abs() + norm.mean[c].abs()) * norm.rstd[c];
    }
    let share = slope + (additions(shape) + 6.0) * U;
    check_debt(&norm, [&dgamma, &dbeta], [&gamma_size, &beta_size], share, &actual);
}

/// What is owed for sums that are known to a `share` of their sizes.
fn check_debt<T>(
    norm: &Norm<f64>,
    [dgamma, dbeta]: [&[f64]; 2],
    [gamma_size, beta_size]: [&[f64]; 2],
    share: f64,
    actual: &Backward<T>,
) {
    let (channels, count) = (dgamma.len(), norm.count as f64);
    let expected = Owed::new(norm, dbeta, dgamma, None);
    for c in 0..channels {
        let what = |name| format!("channel {c} of {channels}, {name}");
        let bounds = [share * gamma_size[c], share * beta_size[c]];
        let before = f64::from(BEFORE);
        for (actual, sum, bound, name) in
            [(actual.dgamma[c], dgamma[c], bounds[0], "dγ"), (actual.dbeta[c], dbeta[c], bounds[1], "dβ")]
        {
            let bound = bound + U * (before + sum.abs() + bound);
            close(actual.into(), before + sum, bound, what(name));
        }
        let owed = |row: usize| f64::from(actual.owed[row * channels + c]);
        assert_eq!(owed(0), norm.scale[c], "{}", what("a"));
        let (a, rstd, mean) = (norm.scale[c].abs(), norm.rstd[c], norm.mean[c].abs());
        let slope_bound = a * rstd / count * (bounds[0] + 5.0 * U * (dgamma[c].abs() + bounds[0]));
        close(owed(1), expected.b[c], slope_bound, what("b"));
        let offset = a / count * dbeta[c].abs();
        let bound = a / count * bounds[1] + slope_bound * mean;
        let sizes = offset + a / count * bounds[1] + (expected.b[c].abs() + slope_bound) * mean;
        close(owed(2), expected.c[c], bound + 5.0 * U * sizes, what("c"));
    }
}

/// Around the tiles: at most 128 channels, 16 to 256 lanes of pixels, several runs, uneven last tiles and runs, and images
/// whose borders lie within runs.
const SHAPES: [(usize, usize, usize, usize); 13] = [
    (2, 1, 1, 8),
    (1, 1, 2, 16),
    (3, 1, 1, 24),
    (1, 25, 41, 8),
    (2, 16, 33, 24),
    (5, 11, 10, 48),
    (1, 8, 16, 64),
    (33, 2, 3, 80),
    (7, 5, 7, 128),
    (2, 9, 8, 136),
    (3, 5, 13, 176),
    (9, 3, 5, 272),
    (70, 1, 2, 304),
];

fn any_shape() -> impl Strategy<Value = Shape> {
    let shapes = prop_oneof![
        prop::sample::select(SHAPES.to_vec()),
        (2_usize..7, 1_usize..12, 1_usize..12, 1_usize..24).prop_map(|(n, h, w, c)| (n, h, w, 8 * c))
    ];
    shapes.prop_map(|(n, h, w, c)| Shape::new(n, h, w, c))
}

fn any_act() -> impl Strategy<Value = Activation> {
    prop_oneof![Just(Activation::Identity), Just(Activation::Silu)]
}

proptest! {
    #![proptest_config(devices::cases(24))]

    #[test]
    fn moments_are_exact_ones_but_for_rounding(shape in any_shape(), seed in any::<u64>()) {
        let Some(device) = device() else { return Ok(()) };
        fn check<T: Sample>(device: &Device, shape: Shape, seed: u64) {
            let (y, layer) = (shifted::<T>(shape, seed), Layer::random(shape.c, seed));
            check_moments(shape, &y, &layer, &moments(device, shape, &y, &layer));
        }
        check::<f32>(&device, shape, seed);
        check::<f16>(&device, shape, seed);
        check::<bf16>(&device, shape, seed);
    }

    #[test]
    fn merges_are_the_reference_s(
        shape in any_shape(),
        act in any_act(),
        skip in any::<bool>(),
        dropped in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        check_merge::<f32>(&device, shape, act, skip, dropped, seed);
        check_merge::<f16>(&device, shape, act, skip, dropped, seed);
        check_merge::<bf16>(&device, shape, act, skip, dropped, seed);
    }

    #[test]
    fn backwards_are_the_reference_s(
        shape in any_shape(),
        act in any_act(),
        dropped in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        check_backward::<f32>(&device, shape, act, dropped, seed);
        check_backward::<f16>(&device, shape, act, dropped, seed);
        check_backward::<bf16>(&device, shape, act, dropped, seed);
    }

    #[test]
    fn factors_are_those_of_the_reference(
        images in 1_usize..300,
        rates in prop::collection::vec(prop_oneof![Just(0.0), Just(0.5), 0.0_f64..0.99], 1..6),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let key = key(images, seed);
        let drops: Vec<_> =
            rates.iter().enumerate().map(|(i, &rate)| DropPath { rate, block: 7 * i as u16 }).collect();
        let (mut depth, step) = (StochasticDepth::plan(&device, images, &drops).unwrap(), begun(&device, &key));
        depth.draw(device.compute(), &step).unwrap();
        for (i, &drop) in drops.iter().enumerate() {
            prop_assert_eq!(device.read(&depth.factors(i)).unwrap(), reference_factors(&key, drop));
        }
    }
}

fn key(images: usize, seed: u64) -> StepKey {
    let images = (0..images as u32).map(|i| i * 40_507 + 3).collect();
    StepKey { seed, epoch: (seed % 91) as u32, images }
}

fn begun(device: &Device, key: &StepKey) -> StepScalars {
    let mut step = StepScalars::new(device, key.images.len()).unwrap();
    step.begin_step(device.compute(), key, 1.0).unwrap();
    step
}

/// What the reference multiplies a block's output with: ones, merged.
fn reference_factors(key: &StepKey, drop: DropPath) -> Vec<f32> {
    let images = key.images.len();
    let mut backend = Reference::<f32>::new();
    backend.begin_step(key).unwrap();
    let y = Tensor::from_vec(Shape::new(images, 1, 1, 1), vec![1.0_f32; images]).unwrap();
    let norm = Norm { scale: vec![1.0], shift: vec![0.0], mean: vec![0.0], rstd: vec![1.0], count: images };
    let branch = RawOutput::<Reference<f32>> { y, norm };
    backend.merge(&branch, Activation::Identity, None, Some(drop)).unwrap().into_vec()
}

/// A rate that is one of the random numbers, and the next larger one.
#[test]
fn factors_fall_at_the_very_number_of_the_reference() {
    let Some(device) = device() else { return };
    let key = key(1, 11);
    let draw = |block| Stream::new(11, key.epoch, key.images[0], Purpose::DropPath(block)).uniform();
    let drops: Vec<_> = (0..40)
        .flat_map(|block| {
            [0.0, f64::EPSILON].map(|above| DropPath { rate: f64::from(draw(block)) + above, block })
        })
        .collect();
    let mut depth = StochasticDepth::plan(&device, 1, &drops).unwrap();
    depth.draw(device.compute(), &begun(&device, &key)).unwrap();
    for (i, &drop) in drops.iter().enumerate() {
        let factor = device.read(&depth.factors(i)).unwrap();
        assert_eq!(factor, reference_factors(&key, drop), "{drop:?}");
        assert_eq!(factor[0] == 0.0, i % 2 == 1, "{drop:?}");
    }
}

#[test]
fn a_captured_draw_sees_the_next_step() {
    let Some(device) = device() else { return };
    let (first, second) = (key(60, 1), key(60, 2));
    let drop = DropPath { rate: 0.5, block: 3 };
    let depth = StochasticDepth::plan(&device, 60, &[drop]).unwrap();
    type State = (Device, StochasticDepth, StepScalars);
    let work = |(device, depth, step): &mut State| depth.draw(device.compute(), step);
    let mut state = (device.clone(), depth, begun(&device, &first));
    work(&mut state).unwrap();
    let mut graph = Graph::record(&device, state, work).unwrap();
    for key in [&second, &first] {
        // SAFETY: the words of the step are written where they lie.
        unsafe { graph.state_mut() }.2.begin_step(device.compute(), key, 1.0).unwrap();
        graph.launch().unwrap();
        assert_eq!(device.read(&graph.state().1.factors(0)).unwrap(), reference_factors(key, drop));
    }
    assert_ne!(reference_factors(&first, drop), reference_factors(&second, drop));
}

/// Ten million values a channel, around means of ±100 and 0 deviations that drift by 4 deviations from the first pixel to the
/// last: what adding up squares in f32 makes of it is no variance at all. The values are exact in bf16, and their moments in
/// f64.
#[test]
fn moments_survive_ten_million_values_and_a_mean_of_a_hundred_deviations() {
    let Some(device) = device() else { return };
    let shape = Shape::new(10, 1000, 1000, 8);
    let pixels = shape.pixels();
    let mut stream = Stream::new(1, 0, 0, Purpose::Init);
    let mut y = Vec::with_capacity(shape.elements());
    for p in 0..pixels {
        let (bits, drift) = (stream.bits(), (p * 8 / pixels) as f32 / 2.0);
        // One of −1.5, −0.5, 0.5, 1.5 for each channel: a deviation of 1.1, and 1.6 with the drift.
        for c in 0..8 {
            let mean = [100.0, -110.0, 0.0, 120.0][c % 4];
            y.push(bf16::from_f32(mean + drift + (bits >> (4 * c) & 3) as f32 - 1.5));
        }
    }
    let naive = |c: usize| {
        let (mut sum, mut squares) = (0.0_f32, 0.0_f32);
        for v in y.iter().skip(c).step_by(8) {
            sum += v.to_f32();
            squares += v.to_f32() * v.to_f32();
        }
        let (mean, square) = (f64::from(sum) / pixels as f64, f64::from(squares) / pixels as f64);
        square - mean * mean
    };
    let layer = Layer::random(8, 3);
    let actual = moments(&device, shape, &y, &layer);
    check_moments(shape, &y, &layer, &actual);
    for (c, (mean, var, _)) in exact_moments(&y, 8).into_iter().enumerate() {
        let rstd = f64::from(actual.norm[24 + c]);
        close(
            1.0 / (rstd * rstd) - layer.epsilon,
            var,
            1e-5 * var,
            format_args!("the variance of channel {c}"),
        );
        close(actual.norm[16 + c].into(), mean, 1e-5, format_args!("the mean of channel {c}"));
    }
    assert!((naive(0) - 2.5).abs() > 1.0, "adding up squares gives {}", naive(0));
}

#[test]
fn awkward_shapes_are_the_reference_s() {
    let Some(device) = device() else { return };
    for (n, h, w, c) in SHAPES {
        let shape = Shape::new(n, h, w, c);
        let (y, layer) = (shifted::<bf16>(shape, 1), Layer::random(c, 1));
        check_moments(shape, &y, &layer, &moments(&device, shape, &y, &layer));
        for act in [Activation::Identity, Activation::Silu] {
            check_merge::<bf16>(&device, shape, act, true, true, 2);
            check_backward::<bf16>(&device, shape, act, true, 3);
        }
    }
}

/// Runs of one value but for a deviation of 1 that comes and goes: every sum and quotient is exact.
#[test]
fn integer_moments_are_exact() {
    let Some(device) = device() else { return };
    for (shape, run) in
        [(Shape::new(4, 32, 32, 8), 1024), (Shape::new(2, 32, 32, 64), 128), (Shape::new(1, 8, 16, 128), 64)]
    {
        let work = BatchNormShape::new(shape, f16::DTYPE).unwrap().moments_work();
        assert_eq!(work.grid[0] as usize, shape.pixels() / run, "{shape}: the runs are others");
        let value = |p: usize, c: usize| ((p / run * 5 + c) % 16) as f32 + (p % 2) as f32 * 2.0 - 1.0;
        let y: Vec<f16> =
            (0..shape.elements()).map(|i| f16::from_f32(value(i / shape.c, i % shape.c))).collect();
        let layer = Layer {
            epsilon: 0.25,
            variance: VarianceEstimator::Biased,
            momentum: 0.5,
            ..Layer::random(shape.c, 1)
        };
        let actual = moments(&device, shape, &y, &layer);
        for (c, (mean, var, _)) in exact_moments(&y, shape.c).into_iter().enumerate() {
            let rstd = 1.0 / (var as f32 + 0.25).sqrt();
            assert_eq!(f64::from(actual.norm[2 * shape.c + c]), mean, "{shape}, channel {c}");
            assert_eq!(actual.norm[3 * shape.c + c], rstd, "{shape}, channel {c}");
            assert_eq!(actual.norm[c], layer.gamma[c] * rstd, "{shape}, channel {c}");
        }
    }
}

/// Identity: products and sums of few bits. SiLU of z this large is the identity, and its slope 1.
#[test]
fn integers_are_exact() {
    let Some(device) = device() else { return };
    for (n, h, w, c) in SHAPES {
        let shape = Shape::new(n, h, w, c);
        let raw = Raw::<f32>::integers(shape);
        let skip: Vec<f32> = (0..shape.elements()).map(|i| (i % 13) as f32).collect();
        let factors: Vec<f32> = (0..n).map(|i| (i % 3) as f32).collect();
        let (wide_skip, wide_factors) = (Tensor::from_vec(shape, wide(&skip)).unwrap(), wide(&factors));
        let norm = raw.norm();
        for act in [Activation::Identity, Activation::Silu] {
            let expected = reference::merge(
                &raw.tensor(),
                &norm,
                Activation::Identity,
                Some(&wide_skip),
                Some(&wide_factors),
            );
            assert_eq!(
                wide(&merged(&device, &raw, act, Some(&skip), Some(&factors))),
                expected.data(),
                "{shape}"
            );
            let expected = reference::merge(&raw.tensor(), &norm, Activation::Identity, None, None);
            assert_eq!(wide(&merged(&device, &raw, act, None, None)), expected.data(), "{shape}");

            let g = skip.iter().map(|v| v - 6.0).collect::<Vec<_>>();
            let actual = merge_backward(&device, &raw, act, &g, Some(&factors));
            let mut dz = Tensor::from_vec(shape, wide(&g)).unwrap();
            let (dbeta, dgamma) =
                reference::backward_identity(&dz, &raw.tensor(), &norm, Some(&wide_factors));
            for (i, dz) in dz.data_mut().iter_mut().enumerate() {
                *dz *= wide_factors[i / (h * w * c)];
            }
            if act == Activation::Silu {
                assert_eq!(wide(&actual.dz), dz.data(), "{shape}");
            }
            let added = |sums: &[f64]| sums.iter().map(|s| s + f64::from(BEFORE)).collect::<Vec<_>>();
            assert_eq!(wide(&actual.dgamma), added(&dgamma), "{shape}");
            assert_eq!(wide(&actual.dbeta), added(&dbeta), "{shape}");
        }
    }
}

/// Sums that others have taken: of squeeze-excitation, one row, and of the head, a row for each image.
#[test]
fn what_is_owed_for_given_sums_is_the_reference_s() {
    let Some(device) = device() else { return };
    for (rows, c) in [(1, 8), (3, 24), (32, 72), (33, 32), (70, 136), (257, 8)] {
        let shape = Shape::new(2, 3, 4, c);
        let raw = Raw::<f16>::random(shape, rows as u64);
        let sums: Vec<f32> = (0..2 * rows * c).map(|i| (i * 7 % 23) as f32 - 11.0).collect();
        let total = |k: usize, c_: usize| {
            (0..rows).map(|row| f64::from(sums[(k * rows + row) * c + c_])).sum::<f64>()
        };
        let [dbeta, dgamma] = [0, 1].map(|k| (0..c).map(|channel| total(k, channel)).collect::<Vec<_>>());
        let plan = BatchNorm::<f16>::plan(&device, shape).unwrap();
        let (uploaded, norm) = (device.upload(&sums).unwrap(), device.upload(&norm_of(&raw)).unwrap());
        let [actual_dgamma, actual_dbeta, owed] = with_debt(&device, &norm, c, |debt| {
            plan.owe(device.compute(), &uploaded.as_view(), rows, debt).unwrap();
        });
        let actual = Backward::<f16> { dz: Vec::new(), dgamma: actual_dgamma, dbeta: actual_dbeta, owed };
        // Integers: their sums are exact.
        check_debt(&raw.norm(), [&dgamma, &dbeta], [&vec![0.0; c], &vec![0.0; c]], 0.0, &actual);
    }
}

fn layer_at(start: usize, statistics: usize, channels: usize, epsilon: f64) -> ConvNorm {
    let conv = Conv {
        kind: ConvKind::Pointwise,
        kernel: 1,
        stride: 1,
        padding: Padding::Same,
        inputs: 8,
        outputs: channels,
    };
    ConvNorm {
        conv,
        weight: 0..conv.weights(),
        gamma: start..start + channels,
        beta: start + channels..start + 2 * channels,
        running_mean: statistics..statistics + channels,
        running_var: statistics + channels..statistics + 2 * channels,
        epsilon,
        momentum: 0.1,
        variance: VarianceEstimator::Unbiased,
    }
}

#[test]
fn all_layers_are_evaluated_as_by_the_reference() {
    let Some(device) = device() else { return };
    let mut layers = Vec::new();
    let (mut parameters, mut statistics) = (5, 3);
    for (channels, epsilon) in [(8, 1e-3), (24, 1e-5), (256, 1e-3), (264, 1e-4), (1792, 1e-3), (16, 1.0)] {
        layers.push(layer_at(parameters, statistics, channels, epsilon));
        parameters += 2 * channels + 11;
        statistics += 2 * channels + 1;
    }
    let mut stream = Stream::new(4, 0, 0, Purpose::Init);
    let params = draw::<f32>(&mut stream, parameters, -2.0, 2.0);
    let stats = draw::<f32>(&mut stream, statistics, 0.01, 3.0);
    let plan = Evaluation::plan(&device, &layers.iter().collect::<Vec<_>>(), parameters, statistics).unwrap();
    let mut norms = unwritten::<f32>(&device, plan.floats());
    let (uploaded_params, uploaded_stats) = (device.upload(&params).unwrap(), device.upload(&stats).unwrap());
    plan.evaluate(
        device.compute(),
        &uploaded_params.as_view(),
        &uploaded_stats.as_view(),
        &mut norms.slice_mut(..plan.floats()),
    )
    .unwrap();
    let norms = written(&device, &norms);
    for (layer, range) in layers.iter().zip(plan.norms()) {
        let [gamma, beta] = [&layer.gamma, &layer.beta].map(|r| wide(&params[r.clone()]));
        let [mean, var] = [&layer.running_mean, &layer.running_var].map(|r| wide(&stats[r.clone()]));
        let expected = Norm::new(&gamma, &beta, &Moments { count: 1, mean, var }, layer.epsilon);
        let actual: Vec<_> = norms[range.clone()].chunks(layer.gamma.len()).map(wide).collect();
        for c in 0..layer.gamma.len() {
            let what = |name| format!("{name} of channel {c} of {}", layer.gamma.len());
            // The sum, the root, the quotient and the rounding of ε cost a rounding each, at most.
            close(actual[3][c], expected.rstd[c], 4.0 * U * expected.rstd[c], what("rstd"));
            close(actual[0][c], expected.scale[c], 5.0 * U * expected.scale[c].abs(), what("scale"));
            assert_eq!(actual[2][c], expected.mean[c], "{}", what("mean"));
            let sizes = beta[c].abs() + (expected.scale[c] * expected.mean[c]).abs();
            close(actual[1][c], expected.shift[c], 8.0 * U * sizes, what("shift"));
        }
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let shape = Shape::new(7, 19, 20, 200);
    let run = |seed| {
        if let Some(control) = device.host_control() {
            control.shuffle(seed);
        }
        let raw = Raw::<bf16>::random(shape, 4);
        let g = draw::<bf16>(&mut Stream::new(6, 0, 0, Purpose::Init), shape.elements(), -1.0, 1.0);
        let factors = factors(shape.n, 5);
        (
            moments(&device, shape, &raw.y, &Layer::random(shape.c, 6)),
            [Activation::Identity, Activation::Silu]
                .map(|act| merge_backward(&device, &raw, act, &g, Some(&factors))),
            merged(&device, &raw, Activation::Silu, Some(&g), Some(&factors)),
        )
    };
    let first = run(0);
    for seed in other_schedules() {
        assert!(first == run(seed), "schedule {seed}");
    }
}

#[test]
fn works_are_those_of_the_formulas() {
    let shape = BatchNormShape::new(Shape::new(2, 3, 4, 160), bf16::DTYPE).unwrap();
    // 160 channels are two tiles of 80, of which 25 pixels fit a block's threads.
    assert_eq!(shape.moments_work().grid, [1, 2, 1]);
    assert_eq!(shape.workspace_floats(), 2 * 160);
    let elements = 24 * 160_u64;
    assert_eq!(shape.moments_work().cost.bytes, 2 * elements + 4 * (2 + 10) * 160);
    let work = shape.merge_work(Activation::Silu, true, true);
    assert_eq!((work.kernel.as_str(), work.grid), ("batch_norm_merge_bf16", [1, 2, 1]));
    assert_eq!(work.cost.bytes, 3 * 2 * elements + 4 * (2 * 160 + 2));
    let work = shape.merge_backward_work(Activation::Silu, false);
    assert_eq!(work.kernel, "batch_norm_backward_silu_bf16");
    assert_eq!(work.cost.bytes, 3 * 2 * elements + 4 * (2 + 11) * 160);
    assert_eq!(shape.owe_work(2).cost.bytes, 4 * (4 + 11) * 160);
    // The runs of a reduction are limited, those of a pass are not.
    let large = BatchNormShape::new(Shape::new(64, 150, 150, 24), f16::DTYPE).unwrap();
    assert_eq!(large.moments_work().grid, [512, 1, 1]);
    assert!(large.merge_work(Activation::Identity, false, false).grid[0] > 2000);
}

#[test]
fn impossible_plans_are_refused() {
    let Some(device) = device() else { return };
    let good = Shape::new(2, 3, 3, 16);
    for shape in [
        Shape { n: 0, ..good },
        Shape { c: 12, ..good },
        Shape { w: usize::MAX, ..good },
        Shape { n: 1 << 28, h: 1, w: 1, ..good },
    ] {
        let plan = BatchNorm::<f32>::plan(&device, shape);
        assert!(matches!(plan, Err(Error::Shape { .. })), "{shape}");
    }
    let drop = DropPath { rate: 0.1, block: 0 };
    for (images, blocks) in [(0, 1), (4, 0), (usize::MAX, 1), (1 << 30, 2)] {
        let plan = StochasticDepth::plan(&device, images, &vec![drop; blocks]);
        assert!(matches!(plan, Err(Error::Shape { .. })), "{images} images, {blocks} blocks");
    }
    for rate in [-0.1, 1.0, f64::NAN] {
        let plan = StochasticDepth::plan(&device, 4, &[DropPath { rate, block: 0 }]);
        assert!(matches!(plan, Err(Error::Usage { .. })), "{rate}");
    }
    let layer = layer_at(0, 0, 16, 1e-3);
    let short = ConvNorm { beta: 16..31, ..layer.clone() };
    let odd = layer_at(0, 0, 6, 1e-3);
    for (layers, parameters, statistics) in [
        (vec![], 32, 32),
        (vec![&layer], 31, 32),
        (vec![&layer], 32, 31),
        (vec![&layer, &short], 32, 32),
        (vec![&odd], 32, 32),
    ] {
        let plan = Evaluation::plan(&device, &layers, parameters, statistics);
        assert!(matches!(plan, Err(Error::Shape { .. })), "{layers:?}");
    }
}

#[test]
fn unfit_buffers_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let (c, shape) = (16, Shape::new(2, 3, 3, 16));
    let plan = BatchNorm::<f32>::plan(&device, shape).unwrap();
    let mut workspace = workspace(&device, &plan);
    let mut small = Workspace::new(&device, plan.workspace_floats() - 1).unwrap();
    let input = device.zeros::<f32>(512).unwrap();
    let refused =
        |result: effnetv2::Result<()>| assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    // Lengths of what is read and of what is written, one wrong in turn; in the last round the workspace is.
    for wrong in 0..=7 {
        let length = |right: usize, i: usize| right + usize::from(i == wrong);
        let mut outputs: Vec<_> = (0..3).map(|_| device.zeros::<f32>(400).unwrap()).collect();
        let workspace = if wrong == 7 { &mut small } else { &mut workspace };
        {
            let [mean, var, norm] = &mut outputs[..] else { unreachable!() };
            let statistics = Statistics {
                gamma: &input.slice(..length(c, 0)),
                beta: &input.slice(..length(c, 1)),
                running_mean: &mut mean.slice_mut(..length(c, 2)),
                running_var: &mut var.slice_mut(..length(c, 3)),
                norm: &mut norm.slice_mut(..length(4 * c, 4)),
                epsilon: 1e-3,
                momentum: 0.1,
                variance: VarianceEstimator::Biased,
            };
            let y = if wrong == 6 { 1..289 } else { 0..length(288, 5) };
            refused(plan.moments(stream, &input.slice(y), statistics, workspace));
        }
        {
            let [dgamma, dbeta, owed] = &mut outputs[..] else { unreachable!() };
            let mut dz = device.zeros::<f32>(400).unwrap();
            for silu in [false, true] {
                let debt = Debt {
                    norm: &input.slice(..length(4 * c, 0)),
                    dgamma: &mut dgamma.slice_mut(..length(c, 1)),
                    dbeta: &mut dbeta.slice_mut(..length(c, 2)),
                    owed: &mut owed.slice_mut(..length(3 * c, 3)),
                };
                let (g, y) = (input.slice(..length(288, 4)), input.slice(..length(288, 5)));
                let factors = input.slice(..length(2, 6));
                let gradient = MergeGradient { g: &g, y: &y, factors: Some(&factors) };
                let workspace = &mut *workspace;
                refused(match silu {
                    false => plan.merge_backward_identity(stream, gradient, debt, workspace),
                    true => {
                        let mut dz = dz.slice_mut(..288);
                        plan.merge_backward_silu(stream, gradient, &mut dz, debt, workspace)
                    }
                });
            }
            let debt = Debt {
                norm: &input.slice(..length(4 * c, 0)),
                dgamma: &mut dgamma.slice_mut(..length(c, 1)),
                dbeta: &mut dbeta.slice_mut(..length(c, 2)),
                owed: &mut owed.slice_mut(..length(3 * c, 3)),
            };
            let rows = if wrong == 5 { 0 } else { 3 + usize::from(wrong == 6) };
            refused(plan.owe(stream, &input.slice(..length(96, 4) + usize::from(wrong == 7)), rows, debt));
            assert_eq!(device.read(&dz).unwrap(), vec![0.0; 400]);
        }
        for output in &outputs {
            assert_eq!(device.read(output).unwrap(), vec![0.0; 400]);
        }
    }
    let mut out = device.zeros::<f32>(400).unwrap();
    for wrong in 0..5 {
        let length = |right: usize, i: usize| right + usize::from(i == wrong);
        let merge = Merge {
            y: &input.slice(..length(288, 0)),
            norm: &input.slice(..length(64, 1)),
            act: Activation::Identity,
            skip: Some(&input.slice(..length(288, 2))),
            factors: Some(&input.slice(..length(2, 3))),
        };
        refused(plan.merge(stream, merge, &mut out.slice_mut(..length(288, 4))));
    }
    let (params, stats) = (input.slice(..32), input.slice(..32));
    let evaluation = Evaluation::plan(&device, &[&layer_at(0, 0, c, 1e-3)], 32, 32).unwrap();
    refused(evaluation.evaluate(stream, &input.slice(..31), &stats, &mut out.slice_mut(..64)));
    refused(evaluation.evaluate(stream, &params, &input.slice(..33), &mut out.slice_mut(..64)));
    refused(evaluation.evaluate(stream, &params, &stats, &mut out.slice_mut(..63)));
    let mut depth = StochasticDepth::plan(&device, 3, &[DropPath { rate: 0.5, block: 0 }]).unwrap();
    refused(depth.draw(stream, &StepScalars::new(&device, 4).unwrap()));
    assert_eq!(device.read(&depth.factors(0)).unwrap(), vec![0.0; 3]);
    assert_eq!(device.read(&out).unwrap(), vec![0.0; 400]);
    // One pixel has no variance.
    let one = BatchNorm::<f32>::plan(&device, Shape::new(1, 1, 1, c)).unwrap();
    let mut outputs: Vec<_> = (0..3).map(|_| device.zeros::<f32>(64).unwrap()).collect();
    let [mean, var, norm] = &mut outputs[..] else { unreachable!() };
    let statistics = Statistics {
        gamma: &input.slice(..c),
        beta: &input.slice(..c),
        running_mean: &mut mean.slice_mut(..c),
        running_var: &mut var.slice_mut(..c),
        norm: &mut norm.slice_mut(..4 * c),
        epsilon: 1e-3,
        momentum: 0.1,
        variance: VarianceEstimator::Unbiased,
    };
    refused(one.moments(stream, &input.slice(..c), statistics, &mut workspace));
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
