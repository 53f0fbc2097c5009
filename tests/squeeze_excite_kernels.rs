//! The kernels of squeeze-excitation against `reference::squeeze_excite` and `reference::batch_norm`.

#![cfg(feature = "cuda")]

mod devices;
#[path = "devices/elements.rs"]
#[allow(dead_code, reason = "only outputs in f32 are checked here, so nothing is rounded to an element type")]
mod elements;

use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::SqueezeExcite as Layer;
use effnetv2::device::Device;
use effnetv2::kernels::squeeze_excite::{
    BackwardInput, Gradients, SqueezeExcite, SqueezeExciteShape, State, StateMut, Weights,
};
use effnetv2::kernels::{Debt, RawElement, Workspace};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::batch_norm::{self, Arrival, Owed};
use effnetv2::reference::squeeze_excite as reference;
use effnetv2::tensor::{Shape, Tensor, matrix};
use elements::{
    EPSILON, Raw, Sample, activated, additions, close, draw, pixel_sums, unwritten, wide, written,
};
use half::{bf16, f16};
use ndarray::Array2;
use proptest::prelude::*;

/// The layers' weights on the host.
#[derive(Clone, Debug)]
struct Layers<T> {
    reduced: usize,
    reduce: Vec<T>,
    reduce_bias: Vec<f32>,
    expand: Vec<T>,
    expand_bias: Vec<f32>,
}

impl<T: Sample> Layers<T> {
    /// Such that hidden units and logits are about −3 to 3, whatever the widths.
    fn random(channels: usize, reduced: usize, seed: u64) -> Self {
        let mut stream = Stream::new(seed, 3, 0, Purpose::Init);
        let (wide, narrow) = (2.0 / (channels as f64).sqrt(), 2.0 / (reduced as f64).sqrt());
        Self {
            reduced,
            reduce: draw(&mut stream, channels * reduced, -wide, wide),
            reduce_bias: draw(&mut stream, reduced, -1.0, 1.0),
            expand: draw(&mut stream, channels * reduced, -narrow, narrow),
            expand_bias: draw(&mut stream, channels, -1.0, 1.0),
        }
    }

    /// As the reference wants them: ranges of one flat buffer.
    fn flat(&self, magnitude: bool) -> (Layer, Vec<f64>) {
        let parts =
            [wide(&self.reduce), wide(&self.reduce_bias), wide(&self.expand), wide(&self.expand_bias)];
        let mut end = 0;
        let [reduce_weight, reduce_bias, expand_weight, expand_bias] = parts.each_ref().map(|part| {
            end += part.len();
            end - part.len()..end
        });
        let (channels, reduced) = (self.expand_bias.len(), self.reduced);
        let params = parts.concat().into_iter().map(|v| if magnitude { v.abs() } else { v }).collect();
        (Layer { channels, reduced, reduce_weight, reduce_bias, expand_weight, expand_bias }, params)
    }
}

/// Everything the device computes.
#[derive(Clone, Debug, PartialEq)]
struct Outcome {
    pooled: Vec<f32>,
    hidden: Vec<f32>,
    gate: Vec<f32>,
    sums: Vec<f32>,
    /// W₁, b₁, W₂, b₂, in the order of the flat buffer.
    gradients: Vec<f32>,
    dpool: Vec<f32>,
    /// dγ, dβ.
    sums_of_dz: [Vec<f32>; 2],
    owed: Vec<f32>,
}

/// What the gradients are added to.
const BEFORE: f32 = 0.5;

fn on_device<T: Sample>(device: &Device, raw: &Raw<T>, layers: &Layers<T>, dx: &[T]) -> Outcome {
    let stream = device.compute();
    let Shape { n, c, .. } = raw.shape;
    let r = layers.reduced;
    let mut plan = SqueezeExcite::<T>::plan(device, raw.shape, r).unwrap();
    let mut workspace = Workspace::new(device, plan.workspace_floats()).unwrap();
    let output = |length| unwritten::<f32>(device, length);
    let (mut pooled, mut hidden, mut gate) = (output(n * c), output(n * r), output(n * c));
    let (mut sums, mut dpool, mut owed) = (output(5 * n * c), output(n * c), output(3 * c));
    let mut gradients =
        [r * c, r, r * c, c, c, c].map(|length| device.upload(&vec![BEFORE; length]).unwrap());
    let (reduce, expand) = (device.upload(&layers.reduce).unwrap(), device.upload(&layers.expand).unwrap());
    let reduce_bias = device.upload(&layers.reduce_bias).unwrap();
    let expand_bias = device.upload(&layers.expand_bias).unwrap();
    let dx = device.upload(dx).unwrap();
    let norm = [&raw.scale, &raw.shift, &raw.mean, &raw.rstd].into_iter().flatten().copied();
    let norm = device.upload(&norm.collect::<Vec<_>>()).unwrap();
    let on_device = raw.upload(device);
    let weights = Weights {
        reduce: &reduce.as_view(),
        reduce_bias: &reduce_bias.as_view(),
        expand: &expand.as_view(),
        expand_bias: &expand_bias.as_view(),
    };
    with_raw!(on_device, view => {
        let state = StateMut {
            pooled: &mut pooled.slice_mut(..n * c),
            hidden: &mut hidden.slice_mut(..n * r),
            gate: &mut gate.slice_mut(..n * c),
        };
        plan.forward(stream, view, weights, state, &mut workspace).unwrap();
        plan.backward_sums(stream, &dx.as_view(), view, &mut sums.slice_mut(..5 * n * c)).unwrap();
    });
    {
        let [reduce, reduce_bias, expand, expand_bias, dgamma, dbeta] = &mut gradients;
        let gradients = Gradients {
            reduce: &mut reduce.as_view_mut(),
            reduce_bias: &mut reduce_bias.as_view_mut(),
            expand: &mut expand.as_view_mut(),
            expand_bias: &mut expand_bias.as_view_mut(),
        };
        let debt = Debt {
            norm: &norm.as_view(),
            dgamma: &mut dgamma.as_view_mut(),
            dbeta: &mut dbeta.as_view_mut(),
            owed: &mut owed.slice_mut(..3 * c),
        };
        let (pooled, hidden, gate) = (pooled.slice(..n * c), hidden.slice(..n * r), gate.slice(..n * c));
        let state = State { pooled: &pooled, hidden: &hidden, gate: &gate };
        let sums = sums.slice(..5 * n * c);
        let input = BackwardInput { sums: &sums, state, weights };
        let mut dpool = dpool.slice_mut(..n * c);
        plan.backward(stream, input, gradients, &mut dpool, debt, &mut workspace).unwrap();
    }
    let [layers @ .., dgamma, dbeta] = &gradients;
    Outcome {
        pooled: written(device, &pooled),
        hidden: written(device, &hidden),
        gate: written(device, &gate),
        sums: written(device, &sums),
        gradients: layers.iter().flat_map(|gradient| device.read(gradient).unwrap()).collect(),
        dpool: written(device, &dpool),
        sums_of_dz: [device.read(dgamma).unwrap(), device.read(dbeta).unwrap()],
        owed: written(device, &owed),
    }
}

/// Each of `actual` within a share of its magnitude.
#[track_caller]
fn all_close<'a>(
    actual: &[f32],
    expected: impl IntoIterator<Item = &'a f64>,
    magnitude: impl IntoIterator<Item = &'a f64>,
    share: f64,
    what: &str,
) {
    let expected: Vec<f64> = expected.into_iter().copied().collect();
    let magnitude: Vec<f64> = magnitude.into_iter().copied().collect();
    assert_eq!((actual.len(), expected.len()), (magnitude.len(), magnitude.len()), "{what}");
    for (i, &actual) in actual.iter().enumerate() {
        close(
            actual.into(),
            expected[i],
            share * magnitude[i] + f64::MIN_POSITIVE,
            format_args!("{what} {i}"),
        );
    }
}

fn check<T: Sample>(device: &Device, shape: Shape, reduced: usize, seed: u64) {
    let (raw, layers) = (Raw::<T>::random(shape, seed), Layers::<T>::random(shape.c, reduced, seed));
    let dx = draw::<T>(&mut Stream::new(seed, 4, 0, Purpose::Init), shape.elements(), -2.0, 2.0);
    let actual = on_device(device, &raw, &layers, &dx);
    let Shape { n, h, w, c } = shape;
    let pixels = h * w;
    let (layer, params) = layers.flat(false);
    let (_, magnitudes) = layers.flat(true);

    // The pool: as in the head's test.
    let expected = reference::forward(&layer, &raw.tensor(), &raw.norm(), &params);
    let pooled_share = (additions(shape) + 8.0) * EPSILON / 2.0 + 4.0 * EPSILON;
    let pooled_magnitude = raw.magnitude(|_| 1.0);
    all_close(&actual.pooled, &expected.pooled, &pooled_magnitude, pooled_share, "pooled");

    // Each stage from what the device had before it, so that a stage's bound is its own. A sum of k products costs at
    // most k roundings of the sum of their magnitudes, a sigmoid 2⁻²¹. A hidden unit is added up over 8 channels, 8 threads
    // and the tiles of 64 channels; a logit over a quarter of the units and 4 threads.
    let array =
        |values: &[f32], columns: usize| matrix(&wide(values), values.len() / columns, columns).to_owned();
    let (pooled, hidden, gate) =
        (array(&actual.pooled, c), array(&actual.hidden, reduced), array(&actual.gate, c));
    let layer_of = |x: &Array2<f64>,
                    weight: &std::ops::Range<usize>,
                    offset: &std::ops::Range<usize>,
                    params: &[f64]| {
        let rows = offset.len();
        x.dot(&matrix(&params[weight.clone()], rows, x.ncols()).t())
            + ndarray::ArrayView1::from(&params[offset.clone()])
    };
    let expected = layer_of(&pooled, &layer.reduce_weight, &layer.reduce_bias, &params);
    let bound = layer_of(&pooled.mapv(f64::abs), &layer.reduce_weight, &layer.reduce_bias, &magnitudes);
    let roundings = |terms: usize| (terms + 8) as f64 * EPSILON / 2.0;
    all_close(&actual.hidden, &expected, &bound, roundings(8 + 3 + c.div_ceil(64)), "hidden");

    use effnetv2::tensor::Real;
    let active = hidden.mapv(Real::silu);
    let expected = layer_of(&active, &layer.expand_weight, &layer.expand_bias, &params).mapv(Real::sigmoid);
    let bound = layer_of(&hidden.mapv(f64::abs), &layer.expand_weight, &layer.expand_bias, &magnitudes);
    // The sigmoid's slope is at most a quarter.
    let bound = bound.mapv(|b| 1.0 + b / 4.0);
    all_close(
        &actual.gate,
        &expected,
        &bound,
        roundings(8 * reduced.div_ceil(32) + 2) + 8.0 * EPSILON,
        "gate",
    );

    // The sums over pixels.
    let element = |f: &dyn Fn(f64, f64, f64, f64) -> f64| {
        let values = (0..shape.elements()).map(|i| {
            let y = raw.y[i].wide();
            let at = |v: &[f32]| f64::from(v[i % c]);
            let z = at(&raw.scale) * y + at(&raw.shift);
            f(z, (y - at(&raw.mean)) * at(&raw.rstd), dx[i].wide(), {
                let size = (at(&raw.scale) * y).abs() + at(&raw.shift).abs();
                (1.0 + size) * (1.0 + (y.abs() + at(&raw.mean).abs()) * at(&raw.rstd))
            })
        });
        pixel_sums(&Tensor::from_vec(shape, values.collect()).unwrap(), None)
    };
    let expected = [
        element(&|z, _, g, _| g * z.silu_grad()),
        element(&|z, _, _, _| z.silu_grad()),
        element(&|z, x, g, _| g * z.silu_grad() * x),
        element(&|z, x, _, _| z.silu_grad() * x),
        element(&|z, _, g, _| g * z.silu()),
    ];
    let bound = element(&|_, _, g, size| size * (1.0 + g.abs()));
    let share = (additions(shape) + 8.0) * EPSILON / 2.0 + 8.0 * EPSILON;
    for (k, expected) in expected.iter().enumerate() {
        all_close(&actual.sums[k * n * c..][..n * c], expected, &bound, share, &format!("sum {k}"));
    }

    // The layers' backward, from the device's own sums.
    let dgate = array(&actual.sums[4 * n * c..], c);
    let state = reference::Gate { pooled, hidden, gate };
    let mut grads = vec![f64::from(BEFORE); params.len()];
    let dpool = reference::backward(&layer, &state, &dgate, pixels, &params, &mut grads);
    // The same with all signs positive bounds every intermediate sum: SiLU and its slope are at most |x| and 1.1.
    let slope = |s: &f64| s * (1.0 - s);
    let dlogit = ndarray::Zip::from(&dgate)
        .and(&state.gate)
        .map_collect(|d, s| d.abs() * slope(s) + d.abs() * EPSILON);
    let dhidden = dlogit.dot(&matrix(&magnitudes[layer.expand_weight.clone()], c, reduced)) * 1.1;
    let dpool_bound =
        dhidden.dot(&matrix(&magnitudes[layer.reduce_weight.clone()], reduced, c)) / pixels as f64;
    let size = state.hidden.mapv(|h| 2.0 * h.abs() + 1.0);
    let scaled = |m: &Array2<f64>| m * &size;
    // dhidden is added up over 8 channels, 8 warps and the tiles of 64 channels; dpool and the weights' gradients over all
    // units and all images.
    let share = roundings(8 + 8 + c.div_ceil(64)) + 12.0 * EPSILON;
    let hidden_range = size.iter().copied().fold(1.0, f64::max);
    let dpool_share = (share + roundings(reduced)) * hidden_range;
    all_close(&actual.dpool, &dpool, &dpool_bound, dpool_share, "dpool");
    let mut bounds =
        scaled(&dhidden).t().dot(&state.pooled.mapv(f64::abs)).iter().copied().collect::<Vec<_>>();
    bounds.extend(scaled(&dhidden).sum_axis(ndarray::Axis(0)));
    bounds.extend(dlogit.t().dot(&size).iter());
    bounds.extend(dlogit.sum_axis(ndarray::Axis(0)));
    bounds.iter_mut().for_each(|bound| *bound += f64::from(BEFORE));
    all_close(&actual.gradients, &grads, &bounds, share + roundings(n) * 2.0, "gradient");

    // Batch norm's sums: those of the tensor dz that nobody has made.
    let (gate, dpool) = (wide(&actual.gate), wide(&actual.dpool));
    let mut dz = Tensor::from_vec(shape, wide(&dx)).unwrap();
    let (dbeta, dgamma) =
        batch_norm::backward(&mut dz, &raw.tensor(), &raw.norm(), Arrival::Gated(&gate, &dpool));
    let mut size = vec![0.0; c];
    for (i, dx) in dx.iter().enumerate() {
        let (k, at) = (i % c, |v: &[f32]| f64::from(v[i % c]));
        // What each of the kernels' sums is a share of.
        let of = i / (pixels * c) * c + k;
        let share = 1.0 + (at(&raw.scale) * raw.y[i].wide()).abs() + at(&raw.shift).abs();
        let share = share * (1.0 + (raw.y[i].wide().abs() + at(&raw.mean).abs()) * at(&raw.rstd));
        size[k] += share * (1.0 + dx.wide().abs()) * (gate[of] + dpool[of].abs());
    }
    // Of the images a warp adds up every eighth group of 4, and then there are 8 warps.
    let share = (additions(shape) + 16.0 + 4.0 * n.div_ceil(32) as f64 + 8.0) * EPSILON / 2.0 + 8.0 * EPSILON;
    let expected =
        [&dgamma, &dbeta].map(|sums| sums.iter().map(|s| s + f64::from(BEFORE)).collect::<Vec<_>>());
    let bound = |size: &f64| size + (size + f64::from(BEFORE)) * EPSILON / 2.0 / share;
    let bounds: Vec<f64> = size.iter().map(bound).collect();
    for (actual, expected) in actual.sums_of_dz.iter().zip(&expected) {
        all_close(actual, expected, &bounds, share, "a sum of dz");
    }
    let norm = raw.norm();
    let owed = Owed::new(&norm, &dbeta, &dgamma, None);
    let row = |k: usize| &actual.owed[k * c..][..c];
    assert_eq!(wide(row(0)), owed.a);
    let (sums, four) = ((n * pixels) as f64, 4.0 * EPSILON);
    let slopes: Vec<f64> = (0..c).map(|k| norm.scale[k].abs() * norm.rstd[k] / sums * size[k]).collect();
    all_close(row(1), &owed.b, &slopes, share + four, "b");
    let offsets = (0..c).map(|k| norm.scale[k].abs() / sums * size[k] + slopes[k] * norm.mean[k].abs());
    all_close(row(2), &owed.c, &offsets.collect::<Vec<_>>(), share + 2.0 * four, "c");
}

/// Around the blocks' tiles: 64 channels and 32 pixels of a sum, 32 and 256 channels, 8 and 32 hidden units, 4 and 32
/// images; hidden units that are multiples of 8 and others.
const SHAPES: [(usize, usize, usize, usize, usize); 9] = [
    (1, 1, 1, 8, 1),
    (5, 3, 3, 72, 6),
    (4, 4, 8, 64, 8),
    (3, 3, 11, 256, 33),
    (2, 2, 3, 264, 65),
    (33, 1, 2, 16, 4),
    (9, 2, 2, 136, 44),
    (1, 9, 15, 24, 130),
    (70, 1, 1, 8, 5),
];

fn any_shape() -> impl Strategy<Value = (Shape, usize)> {
    let shapes = prop_oneof![
        prop::sample::select(SHAPES.to_vec()),
        (1_usize..10, 1_usize..7, 1_usize..7, 1_usize..20, 1_usize..40).prop_map(|(n, h, w, c, r)| (
            n,
            h,
            w,
            8 * c,
            r
        ))
    ];
    shapes.prop_map(|(n, h, w, c, r)| (Shape::new(n, h, w, c), r))
}

proptest! {
    #![proptest_config(devices::cases(24))]

    #[test]
    fn every_stage_is_the_reference_s((shape, reduced) in any_shape(), seed in any::<u64>()) {
        let Some(device) = device() else { return Ok(()) };
        check::<f32>(&device, shape, reduced, seed);
        check::<f16>(&device, shape, reduced, seed);
        check::<bf16>(&device, shape, reduced, seed);
    }
}

#[test]
fn awkward_shapes_are_the_reference_s() {
    let Some(device) = device() else { return };
    for (n, h, w, c, reduced) in SHAPES {
        check::<bf16>(&device, Shape::new(n, h, w, c), reduced, 1);
    }
}

/// With z this large SiLU is the identity and its slope 1: sums of few bits alone.
#[test]
fn integers_are_exact() {
    let Some(device) = device() else { return };
    for (n, h, w, c, reduced) in [(1, 1, 1, 8, 3), (5, 2, 4, 72, 9), (3, 8, 8, 264, 70)] {
        let shape = Shape::new(n, h, w, c);
        let raw = Raw::<f32>::integers(shape);
        let mut layers = Layers::<f32>::random(c, reduced, 0);
        layers.reduce.iter_mut().enumerate().for_each(|(i, v)| *v = (i % 3) as f32);
        layers.reduce_bias.fill(64.0);
        let dx: Vec<f32> = (0..shape.elements()).map(|i| (i % 5) as f32 - 2.0).collect();
        let pixels = (h * w) as f64;
        let act = activated(&raw);
        let (layer, params) = layers.flat(false);
        let expected = reference::forward(&layer, &raw.tensor(), &raw.norm(), &params);
        let actual = on_device(&device, &raw, &layers, &dx);
        assert_eq!(
            wide(&actual.pooled),
            expected.pooled.iter().map(|v| (v * pixels).round() / pixels).collect::<Vec<_>>()
        );
        let round = |v: &f64| (v * pixels).round() / pixels;
        assert_eq!(wide(&actual.hidden), expected.hidden.iter().map(round).collect::<Vec<_>>());
        let dx = Tensor::from_vec(shape, wide(&dx)).unwrap();
        let plain: Vec<f64> = pixel_sums(&dx, None).iter().copied().collect();
        assert_eq!(wide(&actual.sums[..n * c]), plain);
        assert_eq!(wide(&actual.sums[n * c..2 * n * c]), vec![pixels; n * c]);
        let weighted = pixel_sums(&dx, Some(&act)).iter().map(|v| v.round()).collect::<Vec<_>>();
        assert_eq!(wide(&actual.sums[4 * n * c..]), weighted);
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    let (shape, reduced) = (Shape::new(7, 9, 10, 200), 19);
    let run = |seed| {
        if let Some(control) = device.host_control() {
            control.shuffle(seed);
        }
        let (raw, layers) = (Raw::<bf16>::random(shape, 4), Layers::random(shape.c, reduced, 5));
        let dx = draw::<bf16>(&mut Stream::new(6, 0, 0, Purpose::Init), shape.elements(), -1.0, 1.0);
        on_device(&device, &raw, &layers, &dx)
    };
    let first = run(0);
    for seed in other_schedules() {
        assert!(first == run(seed), "schedule {seed}");
    }
}

#[test]
fn works_are_those_of_the_formulas() {
    let shape = SqueezeExciteShape::new(Shape::new(5, 3, 4, 72), 9, f16::DTYPE).unwrap();
    // Two tiles of up to 64 channels for each image, three of up to 32.
    assert_eq!(shape.workspace_floats(), 5 * 2 * 9);
    let work = shape.forward_work();
    assert_eq!(
        (work.kernel.as_str(), work.grid, work.shared),
        ("squeeze_excite_forward_f16", [10, 1, 1], 36)
    );
    let (elements, weights, partial) = (60 * 72, 9 * 72, 5 * 2 * 9);
    let floats = partial + 2 * 72 + 9 + 72 + 5 * (2 * 72 + 9);
    assert_eq!(work.cost.bytes, 2 * elements + 2 * 2 * weights + 4 * floats);
    assert_eq!(shape.backward_sums_work().cost.bytes, 2 * 2 * elements + 4 * (4 * 72 + 5 * 5 * 72));
    let [hidden, rest] = shape.backward_works();
    assert_eq!((hidden.grid, rest.grid), ([4, 1, 1], [3, 1, 1]));
    assert_eq!(hidden.cost.bytes, 2 * weights + 4 * (partial + 5 * 2 * (72 + 9)));
    let floats = 5 * (8 * 72 + 2 * 9) + 2 * (2 * weights + 9 + 72) + 11 * 72;
    assert_eq!(rest.cost.bytes, 2 * weights + 4 * floats);
}

#[test]
fn impossible_plans_are_refused() {
    let Some(device) = device() else { return };
    let good = Shape::new(2, 3, 3, 16);
    for (shape, reduced) in [
        (Shape { n: 0, ..good }, 4),
        (Shape { c: 12, ..good }, 4),
        (Shape { w: usize::MAX, ..good }, 4),
        (Shape { n: 1 << 26, h: 1, w: 1, ..good }, 4),
        (good, 0),
        (good, 8193),
        (Shape { n: 1 << 20, h: 1, w: 1, ..good }, 4096),
        (good, usize::MAX),
    ] {
        let plan = SqueezeExcite::<f32>::plan(&device, shape, reduced);
        assert!(matches!(plan, Err(Error::Shape { .. })), "{shape}, {reduced}");
    }
}

#[test]
fn unfit_buffers_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let shape = Shape::new(2, 3, 3, 16);
    let (n_c, r) = (32, 8);
    let mut plan = SqueezeExcite::<f32>::plan(&device, shape, r).unwrap();
    let mut workspace = Workspace::new(&device, plan.workspace_floats()).unwrap();
    let mut small = Workspace::new(&device, plan.workspace_floats() - 1).unwrap();
    let raw = Raw::<f32>::integers(shape).upload(&device);
    let input = device.zeros::<f32>(512).unwrap();
    let refused =
        |result: effnetv2::Result<()>| assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    let mut out = device.zeros::<f32>(1024).unwrap();
    with_raw!(raw, view => {
        for (dx, sums) in [(287, 160), (288, 159), (289, 160)] {
            refused(plan.backward_sums(stream, &input.slice(..dx), view, &mut out.slice_mut(..sums)));
        }
    });
    assert_eq!(device.read(&out).unwrap(), vec![0.0; 1024]);
    // Each length of W₁, b₁, W₂, b₂, then of the outputs, one too large in turn; in the last round the workspace is too
    // small.
    let right = [16 * r, r, 16 * r, 16];
    let lengths = [128, 8, 128, 16, n_c, 16, 16, 48];
    for wrong in 0..13 {
        let views: Vec<_> = right
            .iter()
            .enumerate()
            .map(|(i, &length)| input.slice(..length + usize::from(i == wrong)))
            .collect();
        let [reduce, reduce_bias, expand, expand_bias] = &views[..] else { unreachable!() };
        let weights = Weights { reduce, reduce_bias, expand, expand_bias };
        let workspace = if wrong == 12 { &mut small } else { &mut workspace };
        let mut outputs: Vec<_> = (0..8).map(|_| device.zeros::<f32>(256).unwrap()).collect();
        if wrong < 7 || wrong == 12 {
            let [pooled, hidden, gate, ..] = &mut outputs[..] else { unreachable!() };
            let state = StateMut {
                pooled: &mut pooled.slice_mut(..n_c + usize::from(wrong == 4)),
                hidden: &mut hidden.slice_mut(..16 + usize::from(wrong == 5)),
                gate: &mut gate.slice_mut(..n_c + usize::from(wrong == 6)),
            };
            with_raw!(raw, view => refused(plan.forward(stream, view, weights, state, workspace)));
        }
        {
            let mut views = outputs.iter_mut().enumerate();
            let mut view = || {
                let (i, buffer) = views.next().unwrap();
                buffer.slice_mut(..lengths[i] + usize::from(i + 4 == wrong))
            };
            let gradients = Gradients {
                reduce: &mut view(),
                reduce_bias: &mut view(),
                expand: &mut view(),
                expand_bias: &mut view(),
            };
            let mut dpool = view();
            let norm = input.slice(..64);
            let debt = Debt { norm: &norm, dgamma: &mut view(), dbeta: &mut view(), owed: &mut view() };
            let (pooled, hidden, sums) = (input.slice(..n_c), input.slice(..16), input.slice(..160));
            let state = State { pooled: &pooled, hidden: &hidden, gate: &pooled };
            let input = BackwardInput { sums: &sums, state, weights };
            refused(plan.backward(stream, input, gradients, &mut dpool, debt, workspace));
        }
        for output in &outputs {
            assert_eq!(device.read(output).unwrap(), vec![0.0; 256]);
        }
    }
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
