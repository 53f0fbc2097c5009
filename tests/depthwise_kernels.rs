//! The kernels of the depthwise convolution against `reference::depthwise` and `reference::batch_norm`.

#![cfg(feature = "cuda")]

mod devices;
#[path = "devices/elements.rs"]
#[allow(dead_code, reason = "made for all kernels that read raw outputs")]
mod elements;

use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::{Activation, VarianceEstimator};
use effnetv2::device::Device;
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::kernels::depthwise::{BackwardKind, Depthwise, DepthwiseShape};
use effnetv2::kernels::tuning::{Choice, Choices, Launch};
use effnetv2::kernels::{
    Arrival, Debt, GradientOutput, GradientView, Input, Output, OutputKind, Statistics, Workspace,
};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::batch_norm::{self, Norm, Owed};
use effnetv2::reference::depthwise as reference;
use effnetv2::tensor::{Conv, ConvKind, Dtype, Padding, Real, Shape, Tensor};
use elements::{EPSILON, Raw, Sample, activated, close, draw, unwritten, wide, written};
use half::{bf16, f16};
use proptest::prelude::*;

/// What a launch is about.
#[derive(Clone, Copy, Debug)]
struct Case {
    kernel: usize,
    stride: usize,
    padding: Padding,
    x: Shape,
    /// The input is SiLU(z).
    silu: bool,
    /// The gradient arrives through a squeeze-excitation.
    gated: bool,
    /// With the skip connection that there may be: inference forward, and backward unless `silu`.
    skip: bool,
    /// What inference ends with.
    act: Activation,
}

impl Case {
    fn conv(&self) -> Conv {
        let Self { kernel, stride, padding, .. } = *self;
        Conv { kind: ConvKind::Depthwise, kernel, stride, padding, inputs: self.x.c, outputs: self.x.c }
    }

    fn y(&self) -> Shape {
        self.conv().output(self.x).unwrap()
    }

    /// Additions in a row of a sum over pixels: those of a thread, of at most 64 rows of 5 pixels each, and of those of
    /// all threads.
    fn additions(&self) -> f64 {
        (self.x.pixels().min(320) + 64 + self.x.pixels() / 256) as f64
    }
}

/// All that goes in.
#[derive(Clone, Debug)]
struct Data<T> {
    case: Case,
    input: Raw<T>,
    weight: Vec<T>,
    made: Raw<T>,
    g: Vec<T>,
    owed: Vec<f32>,
    gate: Vec<f32>,
    dpool: Vec<f32>,
    bias: Vec<f32>,
    /// Of the output's shape, and of the input's.
    skips: [Vec<T>; 2],
    gamma: Vec<f32>,
    beta: Vec<f32>,
}

/// What gradients are added to, and running statistics were.
const BEFORE: f32 = 0.5;
const BN_EPSILON: f64 = 1e-3;
const MOMENTUM: f64 = 0.125;

impl<T: Sample> Data<T> {
    fn random(case: Case, seed: u64) -> Self {
        let (x, y) = (case.x, case.y());
        let mut stream = Stream::new(seed, 7, 0, Purpose::Init);
        Self {
            case,
            input: Raw::random(x, seed),
            weight: draw(&mut stream, case.conv().weights(), -1.0, 1.0),
            made: Raw::random(y, seed ^ 1),
            g: draw(&mut stream, y.elements(), -1.0, 1.0),
            owed: draw(&mut stream, 3 * x.c, -1.0, 1.0),
            gate: draw(&mut stream, x.n * x.c, 0.0, 1.0),
            dpool: draw(&mut stream, x.n * x.c, -0.5, 0.5),
            bias: draw(&mut stream, x.c, -1.0, 1.0),
            skips: [y, x].map(|shape| draw(&mut stream, shape.elements(), -2.0, 2.0)),
            gamma: draw(&mut stream, x.c, -2.0, 2.0),
            beta: draw(&mut stream, x.c, -2.0, 2.0),
        }
    }

    /// Such that every SiLU is the identity and every sum a small integer.
    fn integers(case: Case) -> Self {
        let (x, y) = (case.x, case.y());
        fn cycle<E: Sample>(count: usize, factor: usize, modulus: usize, offset: f32) -> Vec<E> {
            (0..count).map(|i| E::of((i * factor % modulus) as f32 - offset)).collect()
        }
        Self {
            case,
            input: Raw::integers(x),
            weight: cycle(case.conv().weights(), 7, 5, 2.0),
            made: Raw::integers(y),
            g: cycle(y.elements(), 5, 7, 3.0),
            owed: cycle(3 * x.c, 3, 4, 1.0),
            gate: cycle(x.n * x.c, 1, 2, -1.0),
            dpool: cycle(x.n * x.c, 2, 3, 1.0),
            bias: cycle(x.c, 1, 7, -1000.0),
            skips: [y, x].map(|shape| cycle(shape.elements(), 11, 13, 6.0)),
            gamma: vec![1.0; x.c],
            beta: vec![0.0; x.c],
        }
    }

    /// The input as the convolution sees it, and what its rounding is a share of.
    fn x(&self) -> (Tensor<f64>, Tensor<f64>) {
        let (raw, tensor) = (&self.input, self.input.tensor());
        if self.case.silu {
            (activated(raw), sizes(raw))
        } else {
            let size = wide(&raw.y).iter().map(|v| v.abs()).collect();
            (tensor, Tensor::from_vec(raw.shape, size).unwrap())
        }
    }

    /// dy, and what its rounding is a share of.
    fn dy(&self) -> (Tensor<f64>, Tensor<f64>) {
        let (y, c) = (self.case.y(), self.case.x.c);
        let mut dz = Tensor::from_vec(y, wide(&self.g)).unwrap();
        let (gate, dpool) = (wide(&self.gate), wide(&self.dpool));
        if self.case.gated {
            let arrival = batch_norm::Arrival::Gated(&gate, &dpool);
            batch_norm::backward(&mut dz, &self.made.tensor(), &self.made.norm(), arrival);
        }
        let owed = wide(&self.owed);
        let [a, b, constant] = [0, 1, 2].map(|k| owed[k * c..][..c].to_vec());
        let size = sizes(&self.made).into_vec();
        let bound = (0..y.elements()).map(|i| {
            let (k, of) = (i % c, i / (y.h * y.w * c) * c + i % c);
            let g = self.g[i].wide().abs();
            // The slope is at most 1.1, and its error grows with z.
            let dz = if self.case.gated { (gate[of] * g + dpool[of].abs()) * (1.1 + size[i]) } else { g };
            a[k].abs() * dz + (b[k] * self.made.y[i].wide()).abs() + constant[k].abs()
        });
        let bound = Tensor::from_vec(y, bound.collect()).unwrap();
        let owed = Owed { a, b, c: constant, factors: None };
        (owed.pay(&dz, &self.made.tensor()), bound)
    }

    fn weights(&self) -> [Vec<f64>; 2] {
        let weight = wide(&self.weight);
        [weight.clone(), weight.iter().map(|w| w.abs()).collect()]
    }
}

/// |scale·y| + |shift| of every element: what the rounding of z and SiLU(z) is a share of.
fn sizes<T: Sample>(raw: &Raw<T>) -> Tensor<f64> {
    let c = raw.shape.c;
    let size = |(i, y): (usize, &T)| {
        (f64::from(raw.scale[i % c]) * y.wide()).abs() + f64::from(raw.shift[i % c]).abs()
    };
    Tensor::from_vec(raw.shape, raw.y.iter().enumerate().map(size).collect()).unwrap()
}

/// A raw tensor on the device.
struct OnDevice<T> {
    y: CudaSlice<T>,
    norm: CudaSlice<f32>,
}

impl<T: Sample> OnDevice<T> {
    fn new(device: &Device, raw: &Raw<T>) -> Self {
        let norm = [&raw.scale[..], &raw.shift, &raw.mean, &raw.rstd].concat();
        Self { y: device.upload(&raw.y).unwrap(), norm: device.upload(&norm).unwrap() }
    }
}

/// What comes out of one forward launch.
#[derive(Clone, Debug, PartialEq)]
struct Forward<T> {
    y: Vec<T>,
    /// Empty without moments: \[4, c\], and the running mean and variance.
    norm: Vec<f32>,
    running: [Vec<f32>; 2],
}

fn plan<T: Sample>(device: &Device, case: &Case) -> (Depthwise<T>, Workspace) {
    let plan = Depthwise::<T>::plan(device, &case.conv(), case.x).unwrap();
    // Partial results of an earlier launch must not matter.
    let workspace = Workspace::new(device, plan.workspace_floats()).unwrap();
    (plan, workspace)
}

fn forward<T: Sample>(device: &Device, data: &Data<T>, kind: OutputKind) -> Forward<T> {
    let Case { x, silu, act, .. } = data.case;
    let (out, stream) = (data.case.y(), device.compute());
    let (plan, mut workspace) = plan(device, &data.case);
    let input = OnDevice::new(device, &data.input);
    let upload = |values: &[f32]| device.upload(values).unwrap();
    let (weight, skip) = (device.upload(&data.weight).unwrap(), device.upload(&data.skips[0]).unwrap());
    let (bias, gamma, beta) = (upload(&data.bias), upload(&data.gamma), upload(&data.beta));
    let mut running = [(); 2].map(|()| upload(&vec![BEFORE; x.c]));
    let mut y = unwritten::<T>(device, out.elements());
    let mut norm = unwritten::<f32>(device, 4 * x.c);
    {
        let (view, norm_view) = (input.y.as_view(), input.norm.as_view());
        let input = if silu { Input::Silu { y: &view, norm: &norm_view } } else { Input::Plain(&view) };
        let [mean, variance] = &mut running;
        let (bias, skip, gamma, beta) = (bias.as_view(), skip.as_view(), gamma.as_view(), beta.as_view());
        let mut mean = mean.as_view_mut();
        let mut variance = variance.as_view_mut();
        let mut norm = norm.slice_mut(..4 * x.c);
        let output = match kind {
            OutputKind::Plain => Output::Plain,
            OutputKind::Moments => Output::Moments(Statistics {
                gamma: &gamma,
                beta: &beta,
                running_mean: &mut mean,
                running_var: &mut variance,
                norm: &mut norm,
                epsilon: BN_EPSILON,
                momentum: MOMENTUM,
                variance: VarianceEstimator::Unbiased,
            }),
            OutputKind::Folded { skip: with } => {
                Output::Folded { bias: &bias, act, skip: with.then_some(&skip) }
            }
        };
        let mut y = y.slice_mut(..out.elements());
        plan.fprop(stream, input, &weight.as_view(), &mut y, output, &mut workspace).unwrap();
    }
    let moments = kind == OutputKind::Moments;
    Forward {
        y: written(device, &y),
        norm: if moments { written(device, &norm) } else { Vec::new() },
        running: running.map(|values| if moments { device.read(&values).unwrap() } else { Vec::new() }),
    }
}

/// What comes out of the backward launch.
#[derive(Clone, Debug, PartialEq)]
struct Backward<T> {
    dx: Vec<T>,
    dweight: Vec<f32>,
    /// Of a plain input, what they were.
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
    owed: Vec<f32>,
}

fn backward<T: Sample>(device: &Device, data: &Data<T>) -> Backward<T> {
    let Case { x, silu, gated, skip: with_skip, .. } = data.case;
    let stream = device.compute();
    let (plan, mut workspace) = plan(device, &data.case);
    let (input, made) = (OnDevice::new(device, &data.input), OnDevice::new(device, &data.made));
    let upload = |values: &[f32]| device.upload(values).unwrap();
    let (weight, skip) = (device.upload(&data.weight).unwrap(), device.upload(&data.skips[1]).unwrap());
    let (g, owed_in) = (device.upload(&data.g).unwrap(), upload(&data.owed));
    let (gate, dpool) = (upload(&data.gate), upload(&data.dpool));
    let weights = data.case.conv().weights();
    let mut dx = unwritten::<T>(device, x.elements());
    let [mut dweight, mut dgamma, mut dbeta] =
        [weights, x.c, x.c].map(|length| upload(&vec![BEFORE; length]));
    let mut owed = unwritten::<f32>(device, 3 * x.c);
    {
        let (y, norm) = (input.y.as_view(), input.norm.as_view());
        let (made_y, made_norm) = (made.y.as_view(), made.norm.as_view());
        let (skip, gate, dpool) = (skip.as_view(), gate.as_view(), dpool.as_view());
        let arrival = if gated {
            Arrival::Gated { norm: &made_norm, gate: &gate, dpool: &dpool }
        } else {
            Arrival::Alone
        };
        let (g, owed_in) = (g.as_view(), owed_in.as_view());
        let gradient = GradientView { g: &g, y: &made_y, owed: &owed_in, arrival };
        let (mut dgamma, mut dbeta) = (dgamma.as_view_mut(), dbeta.as_view_mut());
        let mut owed = owed.slice_mut(..3 * x.c);
        let (input, output) = if silu {
            let debt = Debt { norm: &norm, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed };
            (Input::Silu { y: &y, norm: &norm }, GradientOutput::Silu { y: &y, debt })
        } else {
            (Input::Plain(&y), GradientOutput::Plain { skip: with_skip.then_some(&skip) })
        };
        let (mut dx, mut dweight) = (dx.slice_mut(..x.elements()), dweight.as_view_mut());
        let weight = weight.as_view();
        plan.backward(stream, input, gradient, &weight, &mut dx, &mut dweight, output, &mut workspace)
            .unwrap();
    }
    Backward {
        dx: written(device, &dx),
        dweight: device.read(&dweight).unwrap(),
        dgamma: device.read(&dgamma).unwrap(),
        dbeta: device.read(&dbeta).unwrap(),
        owed: written(device, &owed),
    }
}

/// Each stored value within `bound` of the expected one, and half a unit of its type.
#[track_caller]
fn all_stored<T: Sample>(actual: &[T], expected: &[f64], bound: &[f64], what: &str) {
    assert_eq!((actual.len(), expected.len()), (bound.len(), bound.len()), "{what}");
    for (i, actual) in actual.iter().enumerate() {
        let tolerance = bound[i] + T::UNIT * (expected[i].abs() + bound[i]) + T::TINY;
        close(actual.wide(), expected[i], tolerance, format_args!("{what} {i}"));
    }
}

fn check_forward<T: Sample>(device: &Device, data: &Data<T>) {
    let case = &data.case;
    let (conv, out, c) = (case.conv(), case.y(), case.x.c);
    let (x, size) = data.x();
    let [weight, magnitude] = data.weights();
    let y = reference::forward(&conv, &x, &weight, out).into_vec();
    // A sum of k k products; a transformed element is off by less than 8 ε of its size.
    let share = ((conv.kernel * conv.kernel + 8) as f64 / 2.0 + 8.0) * EPSILON;
    let size = reference::forward(&conv, &size, &magnitude, out).into_vec();
    let bound: Vec<f64> = size.iter().map(|size| share * size).collect();
    let plain = forward(device, data, OutputKind::Plain);
    all_stored(&plain.y, &y, &bound, "y");

    // Inference: the activation's slope is at most 1.1.
    let mut folded: Vec<f64> = (0..y.len()).map(|i| y[i] + f64::from(data.bias[i % c])).collect();
    if case.act == Activation::Silu {
        folded.iter_mut().for_each(|z| *z = z.silu());
    }
    let skip: Vec<f64> = data.skips[0].iter().map(|s| if case.skip { s.wide() } else { 0.0 }).collect();
    let bounds: Vec<f64> = (0..y.len())
        .map(|i| {
            let size = size[i] + f64::from(data.bias[i % c]).abs() + skip[i].abs();
            1.1 * bound[i] + 8.0 * EPSILON * size
        })
        .collect();
    folded.iter_mut().zip(&skip).for_each(|(y, skip)| *y += skip);
    let actual = forward(device, data, OutputKind::Folded { skip: case.skip });
    all_stored(&actual.y, &folded, &bounds, "folded");

    if out.pixels() < 2 {
        return;
    }
    let moments = forward(device, data, OutputKind::Moments);
    assert_eq!(moments.y, plain.y);
    check_moments(data, &moments);
}

/// The moments are those of what was stored.
fn check_moments<T: Sample>(data: &Data<T>, actual: &Forward<T>) {
    let (out, c) = (data.case.y(), data.case.x.c);
    let y = Tensor::from_vec(out, wide(&actual.y)).unwrap();
    let moments = batch_norm::moments(&y);
    let norm = Norm::new(&wide(&data.gamma), &wide(&data.beta), &moments, BN_EPSILON);
    let count = out.pixels() as f64;
    for k in 0..c {
        let column = || y.data().iter().skip(k).step_by(c).copied();
        let range = column().fold(f64::MIN, f64::max) - column().fold(f64::MAX, f64::min);
        let (mean, var) = (moments.mean[k], moments.var[k]);
        // Sums of differences from a value of the channel; then the mean itself is rounded a few times.
        let terms = data.case.additions() / 2.0 + 16.0;
        let mean_bound = terms * EPSILON * range + 4.0 * EPSILON * mean.abs();
        let var_bound = 2.0 * terms * EPSILON * range * range + 8.0 * EPSILON * range * mean.abs();
        let rstd_bound = (0.5 * var_bound / (var + BN_EPSILON) + 4.0 * EPSILON) * norm.rstd[k];
        let gamma = f64::from(data.gamma[k]).abs();
        let scale_bound = gamma * rstd_bound + EPSILON * norm.scale[k].abs();
        let shift_bound = scale_bound * mean.abs()
            + norm.scale[k].abs() * mean_bound
            + 2.0 * EPSILON * (norm.shift[k].abs() + (norm.scale[k] * mean).abs());
        let expected = [norm.scale[k], norm.shift[k], mean, norm.rstd[k]];
        for (row, bound) in [scale_bound, shift_bound, mean_bound, rstd_bound].into_iter().enumerate() {
            close(
                actual.norm[row * c + k].into(),
                expected[row],
                bound + f64::MIN_POSITIVE,
                format_args!("row {row} of the norm, channel {k}"),
            );
        }
        let correction = count / (count - 1.0);
        let before = f64::from(BEFORE);
        let statistics = [(mean, mean_bound), (var * correction, var_bound * correction)];
        for (running, (new, bound)) in actual.running.iter().zip(statistics) {
            let expected = before + MOMENTUM * (new - before);
            let rounding = 4.0 * EPSILON * (before + new.abs());
            close(running[k].into(), expected, MOMENTUM * bound + rounding, format_args!("running {k}"));
        }
    }
}

fn check_backward<T: Sample>(device: &Device, data: &Data<T>) {
    let case = &data.case;
    let (conv, shape, c) = (case.conv(), case.x, case.x.c);
    let taps = (conv.kernel * conv.kernel) as f64;
    let (x, x_size) = data.x();
    let (dy, dy_size) = data.dy();
    let [weight, magnitude] = data.weights();
    let actual = backward(device, data);

    let mut dweight = vec![f64::from(BEFORE); conv.weights()];
    reference::backward_weight(&conv, &x, &dy, &mut dweight);
    let mut size = vec![f64::from(BEFORE); conv.weights()];
    reference::backward_weight(&conv, &x_size, &dy_size, &mut size);
    // Each factor is off by less than 12 ε of its size.
    let terms = case.additions() / 2.0 + 24.0;
    for i in 0..dweight.len() {
        let tolerance = terms * EPSILON * size[i];
        close(actual.dweight[i].into(), dweight[i], tolerance, format_args!("weight gradient {i}"));
    }

    let mut dx = reference::backward_input(&conv, &dy, &weight, shape);
    let size = reference::backward_input(&conv, &dy_size, &magnitude, shape).into_vec();
    let share = ((taps + 8.0) / 2.0 + 12.0) * EPSILON;
    if !case.silu {
        let skip = |i: usize| if case.skip { data.skips[1][i].wide() } else { 0.0 };
        let expected: Vec<f64> = dx.data().iter().enumerate().map(|(i, dx)| dx + skip(i)).collect();
        let bound: Vec<f64> =
            size.iter().enumerate().map(|(i, size)| share * size + EPSILON * skip(i).abs()).collect();
        all_stored(&actual.dx, &expected, &bound, "dx");
        let untouched = vec![BEFORE; c];
        assert_eq!((actual.dgamma, actual.dbeta), (untouched.clone(), untouched));
        assert_eq!(actual.owed, vec![-123.0; 3 * c]);
        return;
    }
    let (raw, norm) = (data.input.tensor(), data.input.norm());
    let (dbeta, dgamma) = batch_norm::backward(&mut dx, &raw, &norm, batch_norm::Arrival::Alone);
    // SiLU' is at most 1.1, and off by less than 6 ε (1 + size).
    let bound: Vec<f64> = size
        .iter()
        .zip(x_size.data())
        .map(|(size, z)| size * (1.1 * share + 6.0 * EPSILON * (1.0 + z)))
        .collect();
    all_stored(&actual.dx, dx.data(), &bound, "dz");
    let (mut beta_bound, mut gamma_bound) = (vec![0.0; c], vec![0.0; c]);
    for (i, dz) in dx.data().iter().enumerate() {
        let k = i % c;
        let off = bound[i] + terms * EPSILON * dz.abs();
        beta_bound[k] += off;
        gamma_bound[k] += off * (raw.data()[i].abs() + norm.mean[k].abs()) * norm.rstd[k];
    }
    let owed = Owed::new(&norm, &dbeta, &dgamma, None);
    let count = shape.pixels() as f64;
    for k in 0..c {
        let before = f64::from(BEFORE);
        let expected = [before + dbeta[k], before + dgamma[k], owed.a[k], owed.b[k], owed.c[k]];
        let actual =
            [actual.dbeta[k], actual.dgamma[k], actual.owed[k], actual.owed[c + k], actual.owed[2 * c + k]];
        let per_pixel = norm.scale[k].abs() / count;
        let slope = per_pixel * norm.rstd[k] * gamma_bound[k] + 4.0 * EPSILON * owed.b[k].abs();
        let mean = norm.mean[k].abs();
        let constant = per_pixel * beta_bound[k]
            + mean * slope
            + 4.0 * EPSILON * (per_pixel * dbeta[k].abs() + mean * owed.b[k].abs());
        let sums = EPSILON * (before + dbeta[k].abs() + dgamma[k].abs());
        let bounds = [beta_bound[k] + sums, gamma_bound[k] + sums, 0.0, slope, constant];
        for (row, bound) in bounds.into_iter().enumerate() {
            let what = format_args!("sum or debt {row}, channel {k}");
            close(actual[row].into(), expected[row], bound + f64::MIN_POSITIVE, what);
        }
    }
}

fn check<T: Sample>(device: &Device, case: Case, seed: u64) {
    let data = Data::<T>::random(case, seed);
    check_forward(device, &data);
    check_backward(device, &data);
}

/// Around what threads and blocks have: 2 to 5 columns, 4 rows and more, 2 and 4 channels of 64, 4 and 8 strips, 64 rows,
/// 512 runs.
const SHAPES: [(usize, usize, usize, usize); 12] = [
    (1, 1, 1, 8),
    (3, 1, 2, 16),
    (2, 2, 1, 8),
    (1, 1, 9, 72),
    (2, 5, 4, 64),
    (1, 4, 5, 136),
    (3, 7, 7, 40),
    (1, 10, 10, 64),
    (1, 67, 2, 8),
    (1, 3, 131, 8),
    (19, 3, 3, 24),
    (4200, 1, 1, 8),
];

fn cases(shape: (usize, usize, usize, usize), index: usize) -> Vec<Case> {
    let (n, h, w, c) = shape;
    let mut cases = Vec::new();
    for (i, (kernel, stride)) in [(3, 1), (3, 2), (5, 1), (5, 2)].into_iter().enumerate() {
        let bit = |k: usize| (index + i) >> k & 1 == 1;
        cases.push(Case {
            kernel,
            stride,
            padding: if bit(0) { Padding::Same } else { Padding::Symmetric },
            x: Shape::new(n, h, w, c),
            silu: bit(1),
            gated: bit(0),
            skip: bit(2),
            act: if bit(0) { Activation::Silu } else { Activation::Identity },
        });
    }
    cases
}

fn any_case() -> impl Strategy<Value = Case> {
    let shapes = prop_oneof![
        prop::sample::select(SHAPES[..11].to_vec()),
        (1_usize..4, 1_usize..13, 1_usize..13, 1_usize..12).prop_map(|(n, h, w, c)| (n, h, w, 8 * c))
    ];
    let kernel = (prop_oneof![Just(3_usize), Just(5)], 1_usize..3);
    let padding = prop_oneof![Just(Padding::Same), Just(Padding::Symmetric)];
    (shapes, kernel, padding, any::<[bool; 4]>()).prop_map(
        |((n, h, w, c), (kernel, stride), padding, [silu, gated, skip, act])| Case {
            kernel,
            stride,
            padding,
            x: Shape::new(n, h, w, c),
            silu,
            gated,
            skip,
            act: if act { Activation::Silu } else { Activation::Identity },
        },
    )
}

proptest! {
    #![proptest_config(devices::cases(48))]

    #[test]
    fn random_shapes_are_the_reference_s(case in any_case(), seed in any::<u64>()) {
        let Some(device) = device() else { return Ok(()) };
        check::<f32>(&device, case, seed);
        check::<f16>(&device, case, seed);
        check::<bf16>(&device, case, seed);
    }
}

#[test]
fn awkward_shapes_are_the_reference_s() {
    let Some(device) = device() else { return };
    for (i, shape) in SHAPES.into_iter().enumerate() {
        for case in cases(shape, i) {
            check::<bf16>(&device, case, 1);
        }
    }
}

/// The widths of S at 300 pixels, 19 and 10, take fewer instructions in strips of five columns, those of M and L at 384 in
/// strips of four.
#[test]
fn strips_are_as_wide_as_divides_images_best() {
    let kernel = |width, stride, dtype| {
        let (kind, padding) = (ConvKind::Depthwise, Padding::Same);
        let conv = Conv { kind, kernel: 3, stride, padding, inputs: 8, outputs: 8 };
        let shape = DepthwiseShape::new(&conv, Shape::new(1, 4, width, 8), dtype).unwrap();
        shape.backward_work(false, BackwardKind::Silu).kernel
    };
    for width in [5, 9, 10, 14, 15, 19, 20, 131] {
        assert_eq!(kernel(width, 1, Dtype::Bf16), "depthwise_backward_3x3_s1c5_bf16", "{width}");
        assert_eq!(kernel(width, 1, Dtype::F16), "depthwise_backward_3x3_s1c5_f16", "{width}");
        assert_eq!(kernel(width, 1, Dtype::F32), "depthwise_backward_3x3_s1_f32", "{width}");
        assert_eq!(kernel(width, 2, Dtype::Bf16), "depthwise_backward_3x3_s2_bf16", "{width}");
    }
    for width in [1, 4, 7, 8, 12, 16, 24] {
        assert_eq!(kernel(width, 1, Dtype::Bf16), "depthwise_backward_3x3_s1_bf16", "{width}");
    }
}

#[test]
fn a_tuning_chooses_among_the_columns_that_there_are_kernels_for() {
    let shape = |width, kernel, stride, dtype| {
        let (kind, padding) = (ConvKind::Depthwise, Padding::Same);
        let conv = Conv { kind, kernel, stride, padding, inputs: 8, outputs: 8 };
        DepthwiseShape::new(&conv, Shape::new(64, 64, width, 8), dtype).unwrap()
    };
    let with = |shape: DepthwiseShape, columns, blocks| {
        let choice = Choice::default().columns(columns).blocks(blocks);
        shape
            .with(Choices::only(Launch::Backward, choice))
            .map(|shape| shape.backward_work(false, BackwardKind::Silu))
    };
    // By the rule the first has strips of five columns, the second of four, and all 1024 blocks.
    for (width, rule) in [(19, 5), (24, 4)] {
        let shape = shape(width, 3, 1, Dtype::F16);
        assert_eq!(shape.choices(Launch::Backward).len(), 2 * shape.choices(Launch::Fprop).len());
        assert_eq!(with(shape, 4, 256).unwrap().kernel, "depthwise_backward_3x3_s1_f16");
        assert_eq!(with(shape, 5, 256).unwrap().kernel, "depthwise_backward_3x3_s1c5_f16");
        assert_ne!(with(shape, rule, 256).unwrap().grid, with(shape, rule, 4096).unwrap().grid);
        let by_rule = shape.backward_work(false, BackwardKind::Silu);
        assert_eq!(with(shape, rule, 1024).unwrap(), by_rule);
        assert_ne!(with(shape, 9 - rule, 1024).unwrap(), by_rule);
        assert!(with(shape, 3, 1024).is_err());
    }
    // There is one kernel for each of these.
    for other in [
        shape(19, 3, 1, Dtype::F32),
        shape(19, 3, 2, Dtype::F16),
        shape(19, 5, 1, Dtype::F16),
        shape(19, 5, 2, Dtype::F16),
    ] {
        assert_eq!(other.choices(Launch::Backward), other.choices(Launch::Fprop));
        assert!((2..6).all(|columns| with(other, columns, 1024).is_err()), "{other:?}");
    }
}

fn exact<T: Sample>(device: &Device, case: Case) {
    let data = Data::<T>::integers(case);
    let (conv, out, c) = (case.conv(), case.y(), case.x.c);
    let (x, _) = data.x();
    let x = Tensor::from_vec(case.x, x.data().iter().map(|v| v.round()).collect()).unwrap();
    let [weight, _] = data.weights();
    let rounded = |values: &[f64]| values.iter().map(|&v| T::of(v as f32)).collect::<Vec<_>>();
    let y = reference::forward(&conv, &x, &weight, out);
    let plain = forward(device, &data, OutputKind::Plain);
    assert_eq!(plain.y, rounded(y.data()), "{case:?}");
    let folded: Vec<f64> = y
        .data()
        .iter()
        .enumerate()
        .map(|(i, y)| y + f64::from(data.bias[i % c]) + if case.skip { data.skips[0][i].wide() } else { 0.0 })
        .collect();
    let identity = Data { case: Case { act: Activation::Identity, ..case }, ..data.clone() };
    let actual = forward(device, &identity, OutputKind::Folded { skip: case.skip });
    assert_eq!(actual.y, rounded(&folded), "{case:?}");

    let (dy, _) = data.dy();
    let dy = Tensor::from_vec(out, dy.data().iter().map(|v| v.round()).collect()).unwrap();
    let dx = reference::backward_input(&conv, &dy, &weight, case.x);
    let mut dweight = vec![f64::from(BEFORE); conv.weights()];
    reference::backward_weight(&conv, &x, &dy, &mut dweight);
    let actual = backward(device, &data);
    assert_eq!(wide(&actual.dweight), dweight, "{case:?}");
    let skip = |i: usize| if case.skip && !case.silu { data.skips[1][i].wide() } else { 0.0 };
    let expected: Vec<f64> = dx.data().iter().enumerate().map(|(i, dx)| dx + skip(i)).collect();
    assert_eq!(actual.dx, rounded(&expected), "{case:?}");
    if case.silu {
        let (mut dbeta, mut dgamma) = (vec![f64::from(BEFORE); c], vec![f64::from(BEFORE); c]);
        for (i, dz) in dx.data().iter().enumerate() {
            let k = i % c;
            dbeta[k] += dz;
            dgamma[k] += dz * (data.input.y[i].wide() - f64::from(data.input.mean[k])) * 0.5;
        }
        assert_eq!((wide(&actual.dbeta), wide(&actual.dgamma)), (dbeta, dgamma), "{case:?}");
    }
}

/// With z this large SiLU is the identity and its slope 1: sums of few bits alone.
#[test]
fn integers_are_exact() {
    let Some(device) = device() else { return };
    for (i, shape) in [(1, 1, 1, 8), (2, 3, 9, 72), (1, 8, 7, 40), (3, 5, 6, 16)].into_iter().enumerate() {
        for (gated, silu) in [(false, false), (false, true), (true, false), (true, true)] {
            for case in cases(shape, i) {
                let case = Case { gated, silu, ..case };
                exact::<f32>(&device, case);
                exact::<f16>(&device, case);
                exact::<bf16>(&device, case);
            }
        }
    }
}

/// ⟨dy, y(x, w)⟩ = ⟨dx(dy, w), x⟩ = ⟨dw(dy, x), w⟩, in whole numbers.
#[test]
fn directions_are_adjoint() {
    let Some(device) = device() else { return };
    for case in cases((2, 9, 10, 24), 0) {
        let case = Case { silu: false, gated: false, skip: false, ..case };
        let mut data = Data::<f32>::integers(case);
        let c = case.x.c;
        data.owed = [vec![1.0; c], vec![0.0; 2 * c]].concat();
        let y = forward(&device, &data, OutputKind::Plain).y;
        let gradients = backward(&device, &data);
        let product = |a: &[f32], b: &[f32]| {
            assert_eq!(a.len(), b.len());
            wide(a).iter().zip(&wide(b)).map(|(a, b)| a * b).sum::<f64>()
        };
        let dweight: Vec<f32> = gradients.dweight.iter().map(|w| w - BEFORE).collect();
        let expected = product(&data.g, &y);
        assert_ne!(expected, 0.0);
        assert_eq!(product(&gradients.dx, &data.input.y), expected, "{case:?}");
        assert_eq!(product(&dweight, &data.weight), expected, "{case:?}");
    }
}

/// A mean that is a hundred times the deviation.
#[test]
fn moments_survive_a_large_mean() {
    let Some(device) = device() else { return };
    for case in cases((5, 11, 13, 8), 0) {
        let case = Case { silu: false, ..case };
        let mut data = Data::<f32>::random(case, 2);
        // One tap alone, so that borders leave the mean what it is: beside them there are none for stride 2.
        let (taps, c) = (case.kernel * case.kernel, case.x.c);
        for (i, weight) in data.weight.iter_mut().enumerate() {
            *weight = f32::from(i / c == taps / 2);
        }
        data.input.y.iter_mut().for_each(|y| *y += 200.0);
        let actual = forward(&device, &data, OutputKind::Moments);
        check_moments(&data, &actual);
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    for case in cases((5, 9, 10, 72), 0) {
        let case = Case { silu: true, gated: true, ..case };
        let data = Data::<bf16>::random(case, 3);
        let run = |seed| {
            if let Some(control) = device.host_control() {
                control.shuffle(seed);
            }
            (forward(&device, &data, OutputKind::Moments), backward(&device, &data))
        };
        let first = run(0);
        for seed in other_schedules() {
            assert!(first == run(seed), "{case:?}, schedule {seed}");
        }
    }
}

/// One workspace serves launches one after the other: counters are left as they were.
#[test]
fn a_workspace_is_used_again() {
    let Some(device) = device() else { return };
    let case = Case { silu: true, gated: true, ..cases((3, 6, 6, 72), 0)[0] };
    let data = Data::<f32>::random(case, 9);
    let (plan, mut workspace) = plan::<f32>(&device, &case);
    let stream = device.compute();
    let (weight, input) = (device.upload(&data.weight).unwrap(), OnDevice::new(&device, &data.input));
    let vector = || device.upload(&vec![1.0_f32; case.x.c]).unwrap();
    let mut norms = Vec::new();
    for _ in 0..3 {
        let (gamma, mut mean, mut variance) = (vector(), vector(), vector());
        let mut norm = device.zeros::<f32>(4 * case.x.c).unwrap();
        let mut y = device.zeros::<f32>(case.y().elements()).unwrap();
        let statistics = Statistics {
            gamma: &gamma.as_view(),
            beta: &gamma.as_view(),
            running_mean: &mut mean.as_view_mut(),
            running_var: &mut variance.as_view_mut(),
            norm: &mut norm.as_view_mut(),
            epsilon: BN_EPSILON,
            momentum: MOMENTUM,
            variance: VarianceEstimator::Biased,
        };
        let input = Input::Silu { y: &input.y.as_view(), norm: &input.norm.as_view() };
        let output = Output::Moments(statistics);
        plan.fprop(stream, input, &weight.as_view(), &mut y.as_view_mut(), output, &mut workspace).unwrap();
        norms.push(device.read(&norm).unwrap());
    }
    assert!(norms[0].iter().any(|v| *v != 0.0));
    assert!(norms.iter().all(|norm| *norm == norms[0]));
}

#[test]
fn impossible_plans_are_refused() {
    let Some(device) = device() else { return };
    let good = cases((2, 5, 5, 16), 0)[0];
    let (conv, x) = (good.conv(), good.x);
    assert!(Depthwise::<f32>::plan(&device, &conv, x).is_ok());
    for (conv, x) in [
        (Conv { kernel: 1, ..conv }, x),
        (Conv { kernel: 7, ..conv }, x),
        (Conv { stride: 3, ..conv }, x),
        (Conv { kind: ConvKind::Dense, ..conv }, x),
        (conv, Shape { c: 24, ..x }),
        (Conv { inputs: 12, outputs: 12, ..conv }, Shape { c: 12, ..x }),
        (conv, Shape { n: 0, ..x }),
        (conv, Shape { h: usize::MAX, ..x }),
        (conv, Shape { n: 1 << 27, h: 1, w: 1, ..x }),
        (Conv { inputs: 1 << 19, outputs: 1 << 19, ..conv }, Shape::new(1, 1, 1, 1 << 19)),
    ] {
        let plan = Depthwise::<f32>::plan(&device, &conv, x);
        assert!(matches!(plan, Err(Error::Shape { .. })), "{conv:?}, {x}");
    }
}

#[test]
fn unfit_forward_operands_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let case = cases((2, 5, 5, 16), 1)[0];
    let (x, y, c) = (case.x.elements(), case.y().elements(), case.x.c);
    let (plan, mut workspace) = plan::<f32>(&device, &case);
    let input = device.zeros::<f32>(4096).unwrap();
    let mut out = device.zeros::<f32>(4096).unwrap();
    let all = input.as_view();
    let refused =
        |result: effnetv2::Result<()>| assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    let weights = case.conv().weights();
    let (good_x, good_weight) = (all.slice(..x), all.slice(..weights));
    let plain = Input::Plain(&good_x);
    for range in [0..y - 1, 0..y + 1, 1..y + 1] {
        let mut target = out.slice_mut(range);
        refused(plan.fprop(stream, plain, &good_weight, &mut target, Output::Plain, &mut workspace));
    }
    let mut target = out.slice_mut(..y);
    for length in [x - 1, x + 1] {
        let wrong = all.slice(..length);
        let input = Input::Plain(&wrong);
        refused(plan.fprop(stream, input, &good_weight, &mut target, Output::Plain, &mut workspace));
        let input = Input::Silu { y: &good_x, norm: &wrong };
        refused(plan.fprop(stream, input, &good_weight, &mut target, Output::Plain, &mut workspace));
    }
    let (norm, gate) = (all.slice(..4 * c), all.slice(..2 * c));
    let gated = Input::Gated { y: &good_x, norm: &norm, gate: &gate };
    refused(plan.fprop(stream, gated, &good_weight, &mut target, Output::Plain, &mut workspace));
    let wrong = all.slice(..weights + 1);
    refused(plan.fprop(stream, plain, &wrong, &mut target, Output::Plain, &mut workspace));
    let (bias, short, skip) = (all.slice(..c), all.slice(..c - 1), all.slice(..y - 1));
    let act = Activation::Silu;
    for output in [
        Output::Folded { bias: &short, act, skip: None },
        Output::Folded { bias: &bias, act, skip: Some(&skip) },
    ] {
        refused(plan.fprop(stream, plain, &good_weight, &mut target, output, &mut workspace));
    }
    // gamma, beta, both running statistics and the norm, one of a wrong length in turn.
    for wrong in 0..5 {
        let length = |i: usize, right: usize| right + usize::from(i == wrong);
        let mut outputs: Vec<_> = (0..3).map(|_| device.zeros::<f32>(128).unwrap()).collect();
        let [mean, variance, norm] = &mut outputs[..] else { unreachable!() };
        let statistics = Statistics {
            gamma: &all.slice(..length(0, c)),
            beta: &all.slice(..length(1, c)),
            running_mean: &mut mean.slice_mut(..length(2, c)),
            running_var: &mut variance.slice_mut(..length(3, c)),
            norm: &mut norm.slice_mut(..length(4, 4 * c)),
            epsilon: BN_EPSILON,
            momentum: MOMENTUM,
            variance: VarianceEstimator::Biased,
        };
        let output = Output::Moments(statistics);
        refused(plan.fprop(stream, plain, &good_weight, &mut target, output, &mut workspace));
        for output in &outputs {
            assert_eq!(device.read(output).unwrap(), vec![0.0; 128]);
        }
    }
    let mut small = Workspace::new(&device, plan.workspace_floats() - 1).unwrap();
    refused(plan.fprop(stream, plain, &good_weight, &mut target, Output::Plain, &mut small));
    assert_eq!(device.read(&out).unwrap(), vec![0.0; 4096]);

    // One value a channel has no moments.
    let one = cases((1, 1, 1, 16), 1)[0];
    let (plan, mut workspace) = self::plan::<f32>(&device, &one);
    let mut vectors: Vec<_> = (0..3).map(|_| device.zeros::<f32>(64).unwrap()).collect();
    let [mean, variance, norm] = &mut vectors[..] else { unreachable!() };
    let statistics = Statistics {
        gamma: &bias,
        beta: &bias,
        running_mean: &mut mean.slice_mut(..c),
        running_var: &mut variance.slice_mut(..c),
        norm: &mut norm.slice_mut(..4 * c),
        epsilon: BN_EPSILON,
        momentum: MOMENTUM,
        variance: VarianceEstimator::Biased,
    };
    let (x, mut y) = (all.slice(..16), out.slice_mut(..16));
    let output = Output::Moments(statistics);
    refused(plan.fprop(stream, Input::Plain(&x), &good_weight, &mut y, output, &mut workspace));
}

/// What one backward call is made of; each field wrong in turn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Wrong {
    g: usize,
    y: usize,
    owed: usize,
    gate: usize,
    weight: usize,
    dx: usize,
    dweight: usize,
    dgamma: usize,
    dbeta: usize,
    debt: usize,
    other_y: bool,
    other_norm: bool,
}

#[test]
fn unfit_backward_operands_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let case = cases((2, 5, 5, 16), 1)[0];
    let (x, y, c, n) = (case.x.elements(), case.y().elements(), case.x.c, case.x.n);
    let weights = case.conv().weights();
    let (plan, mut workspace) = plan::<f32>(&device, &case);
    let input = device.upload(&vec![1.0_f32; 4096]).unwrap();
    let all = input.as_view();
    let run = |wrong: Wrong, workspace: &mut Workspace| {
        let mut outputs: Vec<_> = (0..5).map(|_| device.zeros::<f32>(4096).unwrap()).collect();
        let [dx, dweight, dgamma, dbeta, debt] = &mut outputs[..] else { unreachable!() };
        let (x_view, norm) = (all.slice(..x), all.slice(..4 * c));
        let (y_view, norm_view) = match wrong {
            Wrong { other_y: true, .. } => (all.slice(16..16 + x), all.slice(..4 * c)),
            Wrong { other_norm: true, .. } => (all.slice(..x), all.slice(16..16 + 4 * c)),
            _ => (all.slice(..x), all.slice(..4 * c)),
        };
        let (gate, dpool) = (all.slice(..n * c + wrong.gate), all.slice(..n * c));
        let gradient = GradientView {
            g: &all.slice(..y + wrong.g),
            y: &all.slice(..y + wrong.y),
            owed: &all.slice(..3 * c + wrong.owed),
            arrival: Arrival::Gated { norm: &norm, gate: &gate, dpool: &dpool },
        };
        let debt = Debt {
            norm: &norm_view,
            dgamma: &mut dgamma.slice_mut(..c + wrong.dgamma),
            dbeta: &mut dbeta.slice_mut(..c + wrong.dbeta),
            owed: &mut debt.slice_mut(..3 * c + wrong.debt),
        };
        let result = plan.backward(
            stream,
            Input::Silu { y: &x_view, norm: &norm },
            gradient,
            &all.slice(..weights + wrong.weight),
            &mut dx.slice_mut(..x + wrong.dx),
            &mut dweight.slice_mut(..weights + wrong.dweight),
            GradientOutput::Silu { y: &y_view, debt },
            workspace,
        );
        let untouched = outputs.iter().all(|output| device.read(output).unwrap() == vec![0.0; 4096]);
        (result, untouched)
    };
    let good = Wrong::default();
    let (result, untouched) = run(good, &mut workspace);
    assert!(result.is_ok() && !untouched);
    for wrong in [
        Wrong { g: 1, ..good },
        Wrong { y: 1, ..good },
        Wrong { owed: 1, ..good },
        Wrong { gate: 1, ..good },
        Wrong { weight: 1, ..good },
        Wrong { dx: 1, ..good },
        Wrong { dweight: 1, ..good },
        Wrong { dgamma: 1, ..good },
        Wrong { dbeta: 1, ..good },
        Wrong { debt: 1, ..good },
        Wrong { other_y: true, ..good },
        Wrong { other_norm: true, ..good },
    ] {
        let (result, untouched) = run(wrong, &mut workspace);
        assert!(matches!(result, Err(Error::Shape { .. })) && untouched, "{wrong:?}: {result:?}");
    }
    let mut small = Workspace::new(&device, plan.workspace_floats() - 1).unwrap();
    let (result, untouched) = run(good, &mut small);
    assert!(matches!(result, Err(Error::Shape { .. })) && untouched);
}

#[test]
fn operands_that_do_not_go_together_are_refused() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let case = cases((2, 5, 5, 16), 1)[0];
    let (x, y, c, n) = (case.x.elements(), case.y().elements(), case.x.c, case.x.n);
    let weights = case.conv().weights();
    let (plan, mut workspace) = plan::<f32>(&device, &case);
    let input = device.zeros::<f32>(4096).unwrap();
    let all = input.as_view();
    let (x_view, norm, y_view, owed) =
        (all.slice(..x), all.slice(..4 * c), all.slice(..y), all.slice(..3 * c));
    let (factors, weight) = (all.slice(..n), all.slice(..weights));
    let gate = all.slice(..n * c);
    let gradient = |arrival| GradientView { g: &y_view, y: &y_view, owed: &owed, arrival };
    let (plain, silu) = (Input::Plain(&x_view), Input::Silu { y: &x_view, norm: &norm });
    let gated = Input::Gated { y: &x_view, norm: &norm, gate: &gate };
    let mut dweight = device.zeros::<f32>(weights).unwrap();
    let mut dx = device.zeros::<f32>(x).unwrap();
    let mut others = device.zeros::<f32>(5 * n * c).unwrap();
    let mut vectors: Vec<_> = (0..3).map(|_| device.zeros::<f32>(64).unwrap()).collect();
    let nothing = || GradientOutput::Plain { skip: None };
    let mut refused = |input, arrival, output| {
        let (mut dx, mut dweight) = (dx.as_view_mut(), dweight.as_view_mut());
        let gradient = gradient(arrival);
        let result =
            plan.backward(stream, input, gradient, &weight, &mut dx, &mut dweight, output, &mut workspace);
        assert!(matches!(result, Err(Error::Shape { .. })), "{result:?}");
    };
    refused(plain, Arrival::Factors(&factors), nothing());
    refused(silu, Arrival::Alone, nothing());
    refused(gated, Arrival::Alone, nothing());
    let short = y_view.slice(..y - 1);
    refused(plain, Arrival::Alone, GradientOutput::Plain { skip: Some(&short) });
    let mut sums = others.as_view_mut();
    refused(silu, Arrival::Alone, GradientOutput::Gated { y: &x_view, norm: &norm, sums: &mut sums });
    let [dgamma, dbeta, debt] = &mut vectors[..] else { unreachable!() };
    let debt = Debt {
        norm: &norm,
        dgamma: &mut dgamma.slice_mut(..c),
        dbeta: &mut dbeta.slice_mut(..c),
        owed: &mut debt.slice_mut(..3 * c),
    };
    refused(plain, Arrival::Alone, GradientOutput::Silu { y: &x_view, debt });
}

/// Every depthwise layer of EfficientNetV2-S at 300 pixels: names, grids and bytes.
#[test]
fn launches_follow_from_shapes() {
    let known: Vec<&str> =
        effnetv2::kernels::depthwise::FAMILY.kernels.iter().map(|entry| entry.name).collect();
    for (side, channels, stride) in
        [(38, 256, 2), (19, 512, 1), (19, 768, 1), (19, 960, 1), (19, 960, 2), (10, 1536, 1)]
    {
        let conv = Conv {
            kind: ConvKind::Depthwise,
            kernel: 3,
            stride,
            padding: Padding::Same,
            inputs: channels,
            outputs: channels,
        };
        for images in [1, 7, 256] {
            let x = Shape::new(images, side, side, channels);
            let shape = DepthwiseShape::new(&conv, x, Dtype::Bf16).unwrap();
            let (x, y) = (x.elements() as u64, shape.output().elements() as u64);
            let weights = 9 * channels as u64;
            let forward = shape.fprop_work(false, OutputKind::Plain);
            assert_eq!(forward.cost.bytes, 2 * (x + y + weights));
            assert_eq!(forward.cost.operations, 18 * y);
            let training = shape.fprop_work(true, OutputKind::Moments);
            let backward = shape.backward_work(true, BackwardKind::Silu);
            assert_eq!(backward.cost.operations, 36 * y);
            let tiles = channels.div_ceil(64) as u32;
            for (work, tensors) in [(&training, x + y), (&backward, 2 * x + 2 * y)] {
                assert!(known.contains(&&*work.kernel), "{}", work.kernel);
                let runs = work.grid[0] / tiles;
                assert_eq!((work.grid[0] % tiles, work.grid[1], work.grid[2], work.shared), (0, 1, 1, 0));
                assert!((1..=512).contains(&runs), "{runs} runs");
                assert!(work.cost.bytes > 2 * tensors);
                // The partial sums are little beside the tensors where it matters.
                if images == 256 {
                    assert!(work.cost.bytes < 21 * tensors / 10, "{work:?}");
                    assert!(work.grid[0] >= 512, "{work:?}");
                }
            }
            assert_eq!(training.grid, forward.grid);
            assert!(shape.workspace_floats() <= 512 * 11 * channels);
        }
    }
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
