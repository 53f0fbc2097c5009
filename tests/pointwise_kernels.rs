//! The kernels of pointwise convolution and the classifier against `reference::pointwise` and `reference::batch_norm`.

#![cfg(feature = "cuda")]

mod devices;
#[path = "devices/elements.rs"]
#[allow(dead_code, reason = "sums over the pixels of an image are taken by hand here")]
mod elements;

use devices::{again_on_a_gpu, device, other_schedules};
use effnetv2::Error;
use effnetv2::backend::{Activation, VarianceEstimator};
use effnetv2::device::Device;
use effnetv2::kernels::pointwise::{Classifier, Passes, Pointwise, PointwiseWork};
use effnetv2::kernels::tuning::{Choice, Choices, Launch, Way};
use effnetv2::kernels::{
    Arrival, Debt, GradientKind, GradientOutput, GradientView, Input, InputKind, Output, OutputKind,
    Statistics, Workspace,
};
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::batch_norm::{self, Norm};
use effnetv2::reference::pointwise as reference;
use effnetv2::tensor::{Dtype, Real, Shape, Tensor};
use elements::{EPSILON, Raw, Sample, close, draw, unwritten, wide, written};
use half::{bf16, f16};
use proptest::prelude::*;

/// What the weights' and batch norm's gradients are added to.
const BEFORE: f32 = 0.5;
const RUNNING: (f32, f32) = (0.25, 2.0);
const BN_EPSILON: f64 = 1e-3;
const MOMENTUM: f64 = 0.125;

/// Which prologues and epilogues to take.
#[derive(Clone, Copy, Debug)]
struct Variant {
    input: InputKind,
    output: OutputKind,
    act: Activation,
    gradient: GradientKind,
    factors: bool,
}

/// All tensors on the host.
#[derive(Clone, Debug)]
struct Data<T> {
    /// How it is to be multiplied.
    dtype: Dtype,
    /// How it is to be launched.
    choices: Choices,
    /// The input, which is also what the gradient's epilogues differentiate.
    x: Raw<T>,
    gate: Vec<f32>,
    outputs: usize,
    weight: Vec<T>,
    /// A gradient of z and the raw output that it owes the rest to.
    g: Vec<T>,
    y: Vec<T>,
    owed: Vec<f32>,
    factors: Vec<f32>,
    bias: Vec<f32>,
    skip_y: Vec<T>,
    skip_x: Vec<T>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
}

impl<T: Sample> Data<T> {
    fn random(shape: Shape, outputs: usize, seed: u64) -> Self {
        let mut stream = Stream::new(seed, 5, 0, Purpose::Init);
        let out = shape.with_channels(outputs).elements();
        let reach = 1.0 / (shape.c as f64).sqrt();
        Self {
            dtype: T::DTYPE,
            choices: Choices::default(),
            x: Raw::random(shape, seed),
            gate: draw(&mut stream, shape.n * shape.c, 0.0, 1.0),
            outputs,
            weight: draw(&mut stream, shape.c * outputs, -reach, reach),
            g: draw(&mut stream, out, -2.0, 2.0),
            y: draw(&mut stream, out, -2.0, 2.0),
            owed: draw(&mut stream, 3 * outputs, -1.0, 1.0),
            factors: draw(&mut stream, shape.n, 0.0, 2.0),
            bias: draw(&mut stream, outputs, -1.0, 1.0),
            skip_y: draw(&mut stream, out, -2.0, 2.0),
            skip_x: draw(&mut stream, shape.elements(), -2.0, 2.0),
            gamma: draw(&mut stream, outputs, 0.5, 2.0),
            beta: draw(&mut stream, outputs, -1.0, 1.0),
        }
    }

    /// Few small integers everywhere, so that every sum is exact and only the results are rounded, and z so large that
    /// SiLU is the identity.
    fn integers(shape: Shape, outputs: usize) -> Self {
        let out = shape.with_channels(outputs).elements();
        let of = |count: usize, f: &dyn Fn(usize) -> i32| {
            (0..count).map(|i| T::of(f(i) as f32)).collect::<Vec<T>>()
        };
        let floats =
            |count: usize, f: &dyn Fn(usize) -> i32| (0..count).map(|i| f(i) as f32).collect::<Vec<f32>>();
        Self {
            dtype: T::DTYPE,
            choices: Choices::default(),
            x: Raw::integers(shape),
            gate: (0..shape.n * shape.c).map(|i| [1.0, 2.0, 0.5][i % 3]).collect(),
            outputs,
            weight: of(shape.c * outputs, &|i| (i * 5 % 7) as i32 % 3 - 1),
            g: of(out, &|i| (i * 3 % 5) as i32 - 2),
            y: of(out, &|i| (i * 7 % 13) as i32 % 4),
            owed: floats(3 * outputs, &|i| (i % 4) as i32 - 1),
            factors: (0..shape.n).map(|i| [1.0, 0.0, 2.0][i % 3]).collect(),
            bias: floats(outputs, &|i| (i % 5) as i32),
            skip_y: of(out, &|i| (i % 9) as i32 - 4),
            skip_x: of(shape.elements(), &|i| (i % 9) as i32 - 4),
            gamma: vec![1.0; outputs],
            beta: vec![0.0; outputs],
        }
    }

    fn shape(&self) -> Shape {
        self.x.shape
    }

    fn out(&self) -> Shape {
        self.x.shape.with_channels(self.outputs)
    }

    fn norm(&self) -> Vec<f32> {
        [&self.x.scale[..], &self.x.shift, &self.x.mean, &self.x.rstd].concat()
    }
}

/// Everything the device computes.
#[derive(Clone, Debug, PartialEq)]
struct Outcome<T> {
    y: Vec<T>,
    norm: Vec<f32>,
    running: [Vec<f32>; 2],
    dx: Vec<T>,
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
    owed: Vec<f32>,
    sums: Vec<f32>,
    dweight: Vec<f32>,
}

/// How the gradients are computed.
#[derive(Clone, Copy, Debug)]
enum Launches {
    One(Passes),
    /// One for each.
    Each,
}

/// With the gradients of two passes, and also of one and in windows where that is possible.
fn on_device<T: Sample>(device: &Device, data: &Data<T>, variant: Variant) -> Vec<Outcome<T>> {
    let stream = device.compute();
    let (shape, out, c, o) = (data.shape(), data.out(), data.shape().c, data.outputs);
    let plan = Pointwise::<T>::plan_with(device, shape, o, data.dtype, data.choices).unwrap();
    let floats = [Passes::One, Passes::Interleaved].map(|passes| plan.work().floats_in(passes));
    let floats = plan.workspace_floats().max(floats[0]).max(floats[1]);
    let mut workspace = Workspace::new(device, floats).unwrap();
    let vector = |values: &[f32]| device.upload(values).unwrap();
    let tensor = |values: &[T]| device.upload(values).unwrap();
    let (x, weight, g, gy) = (tensor(&data.x.y), tensor(&data.weight), tensor(&data.g), tensor(&data.y));
    let (skip_x, skip_y) = (tensor(&data.skip_x), tensor(&data.skip_y));
    let (norm, gate, owed) = (vector(&data.norm()), vector(&data.gate), vector(&data.owed));
    let (factors, bias) = (vector(&data.factors), vector(&data.bias));
    let (gamma, beta) = (vector(&data.gamma), vector(&data.beta));
    let (mut running_mean, mut running_var) = (vector(&vec![RUNNING.0; o]), vector(&vec![RUNNING.1; o]));
    let (mut y, mut new_norm) = (unwritten::<T>(device, out.elements()), unwritten::<f32>(device, 4 * o));

    let (x, weight, norm, gate) = (x.as_view(), weight.as_view(), norm.as_view(), gate.as_view());
    let (skip_x, skip_y, bias) = (skip_x.as_view(), skip_y.as_view(), bias.as_view());
    let (g, gy, owed, factors) = (g.as_view(), gy.as_view(), owed.as_view(), factors.as_view());
    let (gamma, beta) = (gamma.as_view(), beta.as_view());
    let input = match variant.input {
        InputKind::Plain => Input::Plain(&x),
        InputKind::Silu => Input::Silu { y: &x, norm: &norm },
        InputKind::Gated => Input::Gated { y: &x, norm: &norm, gate: &gate },
    };
    let arrival = if variant.factors { Arrival::Factors(&factors) } else { Arrival::Alone };
    let gradient = GradientView { g: &g, y: &gy, owed: &owed, arrival };
    {
        let mut views = (
            running_mean.as_view_mut(),
            running_var.as_view_mut(),
            new_norm.slice_mut(..4 * o),
            y.slice_mut(..out.elements()),
        );
        let output = match variant.output {
            OutputKind::Plain => Output::Plain,
            OutputKind::Moments => Output::Moments(Statistics {
                gamma: &gamma,
                beta: &beta,
                running_mean: &mut views.0,
                running_var: &mut views.1,
                norm: &mut views.2,
                epsilon: BN_EPSILON,
                momentum: MOMENTUM,
                variance: VarianceEstimator::Biased,
            }),
            OutputKind::Folded { skip } => {
                Output::Folded { bias: &bias, act: variant.act, skip: skip.then_some(&skip_y) }
            }
        };
        plan.fprop(stream, input, &weight, &mut views.3, output, &mut workspace).unwrap();
    }
    let mut backward = |launches: Launches| {
        let mut dx = unwritten::<T>(device, shape.elements());
        let mut new_owed = unwritten::<f32>(device, 3 * c);
        let mut sums = unwritten::<f32>(device, 5 * shape.n * c);
        let (mut dgamma, mut dbeta) = (vector(&vec![BEFORE; c]), vector(&vec![BEFORE; c]));
        let mut dweight = vector(&vec![BEFORE; c * o]);
        {
            let mut views = (
                dgamma.as_view_mut(),
                dbeta.as_view_mut(),
                new_owed.slice_mut(..3 * c),
                sums.slice_mut(..5 * shape.n * c),
                dx.slice_mut(..shape.elements()),
                dweight.as_view_mut(),
            );
            let output = match variant.gradient {
                GradientKind::Plain { skip } => GradientOutput::Plain { skip: skip.then_some(&skip_x) },
                GradientKind::Silu => GradientOutput::Silu {
                    y: &x,
                    debt: Debt { norm: &norm, dgamma: &mut views.0, dbeta: &mut views.1, owed: &mut views.2 },
                },
                GradientKind::Gated => GradientOutput::Gated { y: &x, norm: &norm, sums: &mut views.3 },
            };
            let (dx, dweight, workspace) = (&mut views.4, &mut views.5, &mut workspace);
            match launches {
                Launches::One(passes) => plan
                    .backward_in(passes, stream, input, gradient, &weight, dx, dweight, output, workspace)
                    .unwrap(),
                Launches::Each => {
                    plan.wgrad(stream, input, gradient, dweight, workspace).unwrap();
                    plan.dgrad(stream, gradient, &weight, dx, output, workspace).unwrap();
                }
            }
        }
        let vectors = [dgamma, dbeta, dweight].map(|v| device.read(&v).unwrap());
        (written(device, &dx), written(device, &new_owed), written(device, &sums), vectors)
    };
    let two = backward(Launches::One(Passes::Two));
    assert_eq!(two, backward(Launches::Each), "in one launch and in two");
    let [one, interleaved] = [Passes::One, Passes::Interleaved].map(|passes| {
        let work = plan.work().backward_in(passes, variant.input, variant.gradient);
        work.map(|_| backward(Launches::One(passes)))
    });
    let outcome = |(dx, owed, sums, [dgamma, dbeta, dweight]): (_, _, _, [Vec<f32>; 3])| Outcome {
        y: written(device, &y),
        norm: written(device, &new_norm),
        running: [&running_mean, &running_var].map(|v| device.read(v).unwrap()),
        dx,
        dgamma,
        dbeta,
        owed,
        sums,
        dweight,
    };
    [Some(two), one, interleaved].into_iter().flatten().map(outcome).collect()
}

/// Of an element: its value, or a bound.
type Term<'a> = &'a dyn Fn(usize) -> f64;

/// An operand as the oracle has it: values, numbers not smaller than them, and the share of these numbers by which what
/// the kernel multiplies may differ.
struct Operand {
    value: Tensor<f64>,
    size: Tensor<f64>,
    share: f64,
}

fn tensor(shape: Shape, f: impl Fn(usize) -> f64) -> Tensor<f64> {
    Tensor::from_vec(shape, (0..shape.elements()).map(f).collect()).unwrap()
}

fn zip(a: &Tensor<f64>, b: &Tensor<f64>, f: impl Fn(f64, f64) -> f64) -> Tensor<f64> {
    tensor(a.shape(), |i| f(a.data()[i], b.data()[i]))
}

/// The number that a channel of every pixel has.
fn at(vector: &[f32], i: usize) -> f64 {
    f64::from(vector[i % vector.len()])
}

impl<T: Sample> Data<T> {
    /// |scale y| + |shift| of an element of x.
    fn z_size(&self, i: usize) -> f64 {
        (at(&self.x.scale, i) * self.x.y[i].wide()).abs() + at(&self.x.shift, i).abs()
    }

    fn z(&self, i: usize) -> f64 {
        at(&self.x.scale, i) * self.x.y[i].wide() + at(&self.x.shift, i)
    }

    fn input(&self, kind: InputKind) -> Operand {
        let shape = self.shape();
        let gate = |i: usize| match kind {
            InputKind::Gated => {
                f64::from(self.gate[i / (shape.h * shape.w * shape.c) * shape.c + i % shape.c])
            }
            _ => 1.0,
        };
        if kind == InputKind::Plain {
            let value = self.x.tensor();
            let size = tensor(shape, |i| value.data()[i].abs());
            return Operand { value, size, share: 0.0 };
        }
        Operand {
            value: tensor(shape, |i| self.z(i).silu() * gate(i)),
            size: tensor(shape, |i| self.z_size(i) * gate(i).abs()),
            // Rounded to T; the sigmoid is off by 2⁻²¹.
            share: T::UNIT + 8.0 * EPSILON,
        }
    }

    fn gradient(&self, factors: bool) -> Operand {
        let (shape, o) = (self.out(), self.outputs);
        let parts = |i: usize| {
            let image = i / (shape.h * shape.w * shape.c);
            let factor = if factors { f64::from(self.factors[image]) } else { 1.0 };
            let row = |k: usize| f64::from(self.owed[k * o + i % o]);
            [row(0) * factor * self.g[i].wide(), row(1) * self.y[i].wide(), row(2)]
        };
        Operand {
            value: tensor(shape, |i| parts(i).iter().sum()),
            size: tensor(shape, |i| parts(i).iter().map(|part| part.abs()).sum()),
            share: T::UNIT + 4.0 * EPSILON,
        }
    }

    /// What rounding both factors of a product to 11 significant bits may cost of it, where that is how they are
    /// multiplied.
    fn of_factors(&self) -> f64 {
        if self.dtype == Dtype::Tf32 { 2.0 / 2048.0 + 1.0 / (2048.0 * 2048.0) } else { 0.0 }
    }

    /// Of a product whose operand is `operand`: values, and bounds before the result is rounded.
    fn product(
        &self,
        operand: &Operand,
        terms: usize,
        multiply: impl Fn(&Tensor<f64>, &[f64]) -> Tensor<f64>,
    ) -> (Tensor<f64>, Tensor<f64>) {
        let (weight, size) =
            (wide(&self.weight), self.weight.iter().map(|w| w.wide().abs()).collect::<Vec<_>>());
        let share = operand.share + self.of_factors() + (terms + 8) as f64 * EPSILON;
        let bound = multiply(&operand.size, &size);
        (multiply(&operand.value, &weight), tensor(bound.shape(), |i| share * bound.data()[i]))
    }
}

/// What rounding `value`, known up to `bound`, to T adds.
fn rounded<T: Sample>(value: f64, bound: f64) -> f64 {
    bound + (value.abs() + bound) * T::UNIT + T::TINY
}

#[track_caller]
fn check_elements<T: Sample>(actual: &[T], expected: &Tensor<f64>, bound: &Tensor<f64>, what: &str) {
    assert_eq!(actual.len(), expected.data().len(), "{what}");
    for (i, actual) in actual.iter().enumerate() {
        let (expected, bound) = (expected.data()[i], bound.data()[i]);
        close(actual.wide(), expected, rounded::<T>(expected, bound), format_args!("{what} {i}"));
    }
}

/// The normalisation and running statistics of what the device stored.
fn check_moments<T: Sample>(data: &Data<T>, actual: &Outcome<T>) {
    let (out, o) = (data.out(), data.outputs);
    let y = Tensor::from_vec(out, wide(&actual.y)).unwrap();
    let moments = batch_norm::moments(&y);
    let norm = Norm::<f64>::new(&wide(&data.gamma), &wide(&data.beta), &moments, BN_EPSILON);
    let roundings = (out.pixels().min(4096) + 64) as f64 * EPSILON;
    for k in 0..o {
        let column = || y.data()[k..].iter().step_by(o).copied();
        let (low, high) = column().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        // Sums are of differences between values; the mean itself is rounded.
        let range = high - low;
        let mean_bound = roundings * range + 2.0 * EPSILON * moments.mean[k].abs();
        let var_bound = roundings * range * range + mean_bound * mean_bound;
        let rstd_share = var_bound / (moments.var[k] + BN_EPSILON) + 4.0 * EPSILON;
        let what = |name: &str| format!("{name} {k}");
        close(actual.norm[2 * o + k].into(), norm.mean[k], mean_bound, what("mean"));
        close(actual.norm[3 * o + k].into(), norm.rstd[k], rstd_share * norm.rstd[k], what("rstd"));
        let scale_bound = (rstd_share + EPSILON) * norm.scale[k].abs();
        close(actual.norm[k].into(), norm.scale[k], scale_bound, what("scale"));
        let shift_size = (norm.scale[k] * norm.mean[k]).abs() + norm.shift[k].abs();
        let shift_bound =
            scale_bound * norm.mean[k].abs() + norm.scale[k].abs() * mean_bound + 2.0 * EPSILON * shift_size;
        close(actual.norm[o + k].into(), norm.shift[k], shift_bound, what("shift"));
        let expected = f64::from(RUNNING.0) + MOMENTUM * (moments.mean[k] - f64::from(RUNNING.0));
        let size = moments.mean[k].abs() + 1.0;
        close(actual.running[0][k].into(), expected, mean_bound + 4.0 * EPSILON * size, what("running mean"));
        let expected = f64::from(RUNNING.1) + MOMENTUM * (moments.var[k] - f64::from(RUNNING.1));
        let size = moments.var[k] + 4.0;
        close(
            actual.running[1][k].into(),
            expected,
            var_bound + 4.0 * EPSILON * size,
            what("running variance"),
        );
    }
}

/// What batch norm's backward is owed, from the device's own sums.
fn check_owed<T: Sample>(data: &Data<T>, actual: &Outcome<T>) {
    let (c, count) = (data.shape().c, data.shape().pixels() as f64);
    for k in 0..c {
        let of = |v: &[f32]| f64::from(v[k]);
        // The sums themselves are known up to a rounding of what they were added to.
        let (dbeta, dgamma) = (of(&actual.dbeta) - f64::from(BEFORE), of(&actual.dgamma) - f64::from(BEFORE));
        let (dbeta_size, dgamma_size) = (dbeta.abs() + 1.0, dgamma.abs() + 1.0);
        let (scale, mean, rstd) = (of(&data.x.scale), of(&data.x.mean), of(&data.x.rstd));
        assert_eq!(actual.owed[k], data.x.scale[k], "a {k}");
        let (b, size) = (-scale * rstd * dgamma / count, (scale * rstd * dgamma_size / count).abs());
        close(actual.owed[c + k].into(), b, 6.0 * EPSILON * size, format_args!("b {k}"));
        let expected = -scale * dbeta / count - b * mean;
        let size = (scale * dbeta_size / count).abs() + size * mean.abs();
        close(actual.owed[2 * c + k].into(), expected, 8.0 * EPSILON * size, format_args!("c {k}"));
    }
}

fn check<T: Sample>(device: &Device, data: &Data<T>, variant: Variant) {
    on_device(device, data, variant).iter().for_each(|actual| check_outcome(data, variant, actual));
}

fn check_outcome<T: Sample>(data: &Data<T>, variant: Variant, actual: &Outcome<T>) {
    let (shape, out, c, o) = (data.shape(), data.out(), data.shape().c, data.outputs);

    let input = data.input(variant.input);
    let (mut y, mut bound) = data.product(&input, c, |x, weight| reference::forward(x, weight, o));
    if let OutputKind::Folded { skip } = variant.output {
        let skip_of = |i: usize| if skip { data.skip_y[i].wide() } else { 0.0 };
        let before = tensor(out, |i| y.data()[i] + at(&data.bias, i));
        let act = |v: f64| if variant.act == Activation::Silu { v.silu() } else { v };
        y = tensor(out, |i| act(before.data()[i]) + skip_of(i));
        bound = tensor(out, |i| {
            // SiLU's slope is at most 1.1, and its own error a share of its argument.
            1.1 * bound.data()[i] + 10.0 * EPSILON * (before.data()[i].abs() + skip_of(i).abs())
        });
    }
    check_elements(&actual.y, &y, &bound, "y");
    if variant.output == OutputKind::Moments {
        check_moments(data, actual);
    }

    let gradient = data.gradient(variant.factors);
    let (dx, bound) = data.product(&gradient, o, |dy, weight| reference::backward_input(dy, weight, c));
    let slope = |i: usize| data.z(i).silu_grad();
    let slope_error = |i: usize| 8.0 * EPSILON * (1.0 + data.z_size(i));
    let dz = tensor(shape, |i| dx.data()[i] * slope(i));
    let dz_bound =
        tensor(shape, |i| 1.1 * bound.data()[i] + (dx.data()[i].abs() + bound.data()[i]) * slope_error(i));
    let xhat = |i: usize| (data.x.y[i].wide() - at(&data.x.mean, i)) * at(&data.x.rstd, i);
    let xhat_size = |i: usize| (data.x.y[i].wide().abs() + at(&data.x.mean, i).abs()) * at(&data.x.rstd, i);
    // A sum over rows whose terms have these values, sizes and bounds.
    let sum = |rows: std::ops::Range<usize>,
               k: usize,
               value: &dyn Fn(usize) -> f64,
               bound: &dyn Fn(usize) -> f64| {
        let terms = (rows.len() + 16) as f64;
        let elements = || rows.clone().map(|row| row * c + k);
        let total: f64 = elements().map(value).sum();
        let size: f64 = elements().map(|i| value(i).abs()).sum();
        let error: f64 = elements().map(bound).sum();
        (total, error + terms * EPSILON * (size + error) + f64::MIN_POSITIVE)
    };
    let value_dz = |i: usize| dz.data()[i];
    let bound_dz = |i: usize| dz_bound.data()[i];
    let value_dz_xhat = |i: usize| dz.data()[i] * xhat(i);
    let bound_dz_xhat = |i: usize| (dz_bound.data()[i] + 4.0 * EPSILON * dz.data()[i].abs()) * xhat_size(i);
    match variant.gradient {
        GradientKind::Plain { skip } => {
            let skip = tensor(shape, |i| if skip { data.skip_x[i].wide() } else { 0.0 });
            let bound = zip(&bound, &skip, |bound, skip| bound * (1.0 + EPSILON) + EPSILON * skip.abs());
            let bound = zip(&bound, &dx, |bound, dx| bound + EPSILON * dx.abs());
            check_elements(&actual.dx, &zip(&dx, &skip, |dx, skip| dx + skip), &bound, "dx");
        }
        GradientKind::Silu => {
            check_elements(&actual.dx, &dz, &dz_bound, "dz");
            for k in 0..c {
                let before = f64::from(BEFORE);
                let (dbeta, bound) = sum(0..shape.pixels(), k, &value_dz, &bound_dz);
                let slack = EPSILON * (1.0 + dbeta.abs());
                close(actual.dbeta[k].into(), before + dbeta, bound + slack, format_args!("dbeta {k}"));
                let (dgamma, bound) = sum(0..shape.pixels(), k, &value_dz_xhat, &bound_dz_xhat);
                let slack = EPSILON * (1.0 + dgamma.abs());
                close(actual.dgamma[k].into(), before + dgamma, bound + slack, format_args!("dgamma {k}"));
            }
            check_owed(data, actual);
        }
        GradientKind::Gated => {
            check_elements(&actual.dx, &dx, &bound, "dx");
            let active = |i: usize| dx.data()[i] * data.z(i).silu();
            let active_bound = |i: usize| {
                bound.data()[i] * data.z_size(i) + dx.data()[i].abs() * 8.0 * EPSILON * data.z_size(i)
            };
            let slope_xhat = |i: usize| slope(i) * xhat(i);
            let slope_xhat_bound = |i: usize| (slope_error(i) + 4.0 * EPSILON) * xhat_size(i);
            let terms: [(Term<'_>, Term<'_>); 5] = [
                (&value_dz, &bound_dz),
                (&slope, &slope_error),
                (&value_dz_xhat, &bound_dz_xhat),
                (&slope_xhat, &slope_xhat_bound),
                (&active, &active_bound),
            ];
            let pixels = shape.h * shape.w;
            for (kind, (value, bound)) in terms.into_iter().enumerate() {
                for (image, k) in (0..shape.n).flat_map(|image| (0..c).map(move |k| (image, k))) {
                    let (expected, bound) = sum(image * pixels..(image + 1) * pixels, k, value, bound);
                    let actual = actual.sums[(kind * shape.n + image) * c + k];
                    close(
                        actual.into(),
                        expected,
                        bound,
                        format_args!("sum {kind} of image {image}, channel {k}"),
                    );
                }
            }
        }
    }

    let (mut expected, mut size) = (vec![f64::from(BEFORE); c * o], vec![f64::from(BEFORE); c * o]);
    reference::backward_weight(&input.value, &gradient.value, &mut expected);
    reference::backward_weight(&input.size, &gradient.size, &mut size);
    let share = input.share + gradient.share + data.of_factors() + (shape.pixels() + 24) as f64 * EPSILON;
    for (i, &actual) in actual.dweight.iter().enumerate() {
        close(actual.into(), expected[i], 1.1 * share * size[i], format_args!("dweight {i}"));
    }
}

/// Around the tiles' borders: 128 pixels, 128 and 64 channels, steps of 32 and 16 of the sum; the last have enough blocks
/// for the wide tile, and enough pixels to be cut for the weights.
const SHAPES: [(usize, usize, usize, usize, usize); 10] = [
    (1, 1, 1, 8, 8),
    (1, 3, 43, 8, 136),
    (2, 8, 8, 64, 64),
    (3, 5, 9, 24, 72),
    (1, 11, 13, 72, 24),
    (5, 1, 1, 136, 40),
    (7, 6, 6, 40, 200),
    (2, 12, 17, 16, 8),
    (130, 1, 2, 32, 16),
    (1, 1, 127, 48, 56),
];

const VARIANTS: [Variant; 6] = [
    Variant {
        input: InputKind::Plain,
        output: OutputKind::Plain,
        act: Activation::Identity,
        gradient: GradientKind::Plain { skip: false },
        factors: false,
    },
    Variant {
        input: InputKind::Gated,
        output: OutputKind::Moments,
        act: Activation::Identity,
        gradient: GradientKind::Gated,
        factors: true,
    },
    Variant {
        input: InputKind::Silu,
        output: OutputKind::Moments,
        act: Activation::Identity,
        gradient: GradientKind::Silu,
        factors: true,
    },
    Variant {
        input: InputKind::Plain,
        output: OutputKind::Folded { skip: true },
        act: Activation::Silu,
        gradient: GradientKind::Plain { skip: true },
        factors: false,
    },
    Variant {
        input: InputKind::Silu,
        output: OutputKind::Folded { skip: false },
        act: Activation::Silu,
        gradient: GradientKind::Silu,
        factors: false,
    },
    Variant {
        input: InputKind::Gated,
        output: OutputKind::Folded { skip: true },
        act: Activation::Identity,
        gradient: GradientKind::Gated,
        factors: false,
    },
];

fn any_shape() -> impl Strategy<Value = (Shape, usize)> {
    let shapes = prop_oneof![
        prop::sample::select(SHAPES.to_vec()),
        (1_usize..5, 1_usize..10, 1_usize..10, 1_usize..20, 1_usize..20).prop_map(|(n, h, w, c, o)| (
            n,
            h,
            w,
            8 * c,
            8 * o
        ))
    ];
    shapes.prop_map(|(n, h, w, c, o)| (Shape::new(n, h, w, c), o))
}

proptest! {
    #![proptest_config(devices::cases(16))]

    #[test]
    fn every_direction_is_the_reference_s(
        (shape, outputs) in any_shape(),
        variant in prop::sample::select(VARIANTS.to_vec()),
        seed in any::<u64>(),
    ) {
        let Some(device) = device() else { return Ok(()) };
        let data = Data::<f32>::random(shape, outputs, seed);
        check(&device, &data, variant);
        check(&device, &Data { dtype: Dtype::Tf32, ..data }, variant);
        check(&device, &Data::<f16>::random(shape, outputs, seed), variant);
        check(&device, &Data::<bf16>::random(shape, outputs, seed), variant);
    }
}

#[test]
fn awkward_shapes_are_the_reference_s() {
    let Some(device) = device() else { return };
    for (i, (n, h, w, c, outputs)) in SHAPES.into_iter().enumerate() {
        check(
            &device,
            &Data::<bf16>::random(Shape::new(n, h, w, c), outputs, 1),
            VARIANTS[i % VARIANTS.len()],
        );
    }
}

/// Enough blocks for wide tiles in both directions and broad ones of an output, and pixels in more than 16 splits.
const WIDE: (Shape, usize) = (Shape::new(2, 60, 71, 136), 136);

#[test]
fn larger_tiles_are_taken_where_there_are_blocks() {
    let (shape, outputs) = (Shape { n: 4, ..WIDE.0 }, WIDE.1);
    let work = PointwiseWork::new(shape, outputs, Dtype::F16).unwrap();
    let (plain, moments) = (GradientKind::Plain { skip: false }, OutputKind::Moments);
    assert_eq!(work.fprop(InputKind::Plain, moments).kernel, "pointwise_fprop_wide_f16");
    // Where rows owe something, what they owe is paid once for 256 columns.
    assert_eq!(work.fprop(InputKind::Silu, moments).kernel, "pointwise_fprop_broad_f16");
    assert_eq!(work.dgrad(GradientKind::Silu).kernel, "pointwise_dgrad_broad_f16");
    assert_eq!(work.wgrad(InputKind::Plain).kernel, "pointwise_wgrad_broad_f16");
    let two = |output| work.backward_in(Passes::Two, InputKind::Plain, output).unwrap().kernel;
    assert_eq!(two(plain), "pointwise_backward_broad_f16");
    assert_eq!(two(GradientKind::Gated), "pointwise_backward_gated_broad_f16");
    // Of three groups of 128 two of 256 would be more products.
    let odd = PointwiseWork::new(shape.with_channels(304), 304, Dtype::F16).unwrap();
    assert_eq!(odd.fprop(InputKind::Silu, moments).kernel, "pointwise_fprop_wide_f16");
    assert_eq!(odd.dgrad(plain).kernel, "pointwise_dgrad_wide_f16");
    assert_eq!(odd.wgrad(InputKind::Plain).kernel, "pointwise_wgrad_low_f16");
    // Without enough blocks, and in f32.
    let few = PointwiseWork::new(Shape::new(1, 8, 8, 136), 136, Dtype::F16).unwrap();
    let single = PointwiseWork::new(shape, outputs, Dtype::F32).unwrap();
    for work in [few, single] {
        for kernel in [work.fprop(InputKind::Silu, moments).kernel, work.dgrad(plain).kernel] {
            assert!(kernel.contains("narrow"), "{kernel}");
        }
        assert!(work.wgrad(InputKind::Plain).kernel.contains("low"));
    }
}

/// Where they are chosen, few pixels do for several tiles, groups and splits, the last of each begun.
#[test]
fn larger_tiles_are_the_reference_s() {
    fn check_larger<T: Sample>(device: &Device, columns: u32, variant: Variant) {
        let larger = |choice: Choice| choice.columns(columns).blocks(528);
        let (fprop, backward) = (larger(Choice::default()), larger(Choice::by(Way::TwoPasses)));
        let choices = Choices { fprop, backward, ..Choices::default() };
        let (shape, outputs) = (Shape::new(2, 19, 23, 136), 136);
        let work = PointwiseWork::new(shape, outputs, T::DTYPE).unwrap().with(choices).unwrap();
        let name = if columns == 128 { "wide" } else { "broad" };
        assert!(work.fprop(variant.input, variant.output).kernel.contains(name));
        let gated = variant.gradient == GradientKind::Gated;
        assert_eq!(work.dgrad(variant.gradient).kernel.contains(name), !gated);
        check(device, &Data::<T> { choices, ..Data::random(shape, outputs, 3) }, variant);
    }
    let Some(device) = device() else { return };
    check_larger::<f16>(&device, 128, VARIANTS[2]);
    check_larger::<bf16>(&device, 128, VARIANTS[3]);
    check_larger::<bf16>(&device, 256, VARIANTS[2]);
    check_larger::<f16>(&device, 256, VARIANTS[3]);
    check_larger::<f16>(&device, 256, VARIANTS[1]);
    check_larger::<bf16>(&device, 256, VARIANTS[1]);
}

/// Every sum is of few small integers: f32 holds it, and the result is it, rounded to T.
fn check_integers<T: Sample>(device: &Device, shape: Shape, outputs: usize, variant: Variant) {
    check_integers_in::<T>(device, T::DTYPE, shape, outputs, variant);
}

/// The same, multiplied as `dtype` says.
fn check_integers_in<T: Sample>(
    device: &Device,
    dtype: Dtype,
    shape: Shape,
    outputs: usize,
    variant: Variant,
) {
    let data = Data::<T> { dtype, ..Data::integers(shape, outputs) };
    let outcomes = on_device(device, &data, variant);
    outcomes.iter().for_each(|actual| check_exactly(&data, variant, actual));
}

fn check_exactly<T: Sample>(data: &Data<T>, variant: Variant, actual: &Outcome<T>) {
    let (shape, outputs) = (data.shape(), data.outputs);
    let (out, c) = (data.out(), shape.c);
    let weight = wide(&data.weight);
    let exact = |value: f64| T::of(value as f32);
    // SiLU is the identity of such arguments, which the oracle's sigmoid misses by a rounding.
    let input = data.input(variant.input).value;
    let input = tensor(shape, |i| (input.data()[i] * 2.0).round() / 2.0);
    let y = reference::forward(&input, &weight, outputs);
    let y = tensor(out, |i| match variant.output {
        OutputKind::Folded { skip } => {
            let before = y.data()[i] + at(&data.bias, i);
            before + if skip { data.skip_y[i].wide() } else { 0.0 }
        }
        _ => y.data()[i],
    });
    assert_eq!(actual.y, y.data().iter().copied().map(exact).collect::<Vec<_>>(), "y");

    let gradient = data.gradient(variant.factors).value;
    let dx = reference::backward_input(&gradient, &weight, c);
    let skip = |i: usize| match variant.gradient {
        GradientKind::Plain { skip: true } => data.skip_x[i].wide(),
        _ => 0.0,
    };
    let stored: Vec<T> = (0..shape.elements()).map(|i| exact(dx.data()[i] + skip(i))).collect();
    assert_eq!(actual.dx, stored, "dx");
    let mut dweight = vec![f64::from(BEFORE); c * outputs];
    reference::backward_weight(&input, &gradient, &mut dweight);
    assert_eq!(wide(&actual.dweight), dweight, "dweight");

    let xhat = |i: usize| (data.x.y[i].wide() - at(&data.x.mean, i)) * at(&data.x.rstd, i);
    let sum = |rows: std::ops::Range<usize>, k: usize, f: &dyn Fn(usize) -> f64| -> f64 {
        rows.map(|row| f(row * c + k)).sum()
    };
    let dz_xhat = |i: usize| dx.data()[i] * xhat(i);
    match variant.gradient {
        GradientKind::Plain { .. } => {}
        GradientKind::Silu => {
            let all = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
                (0..c).map(|k| f64::from(BEFORE) + sum(0..shape.pixels(), k, f)).collect()
            };
            assert_eq!(wide(&actual.dbeta), all(&|i| dx.data()[i]), "dbeta");
            assert_eq!(wide(&actual.dgamma), all(&dz_xhat), "dgamma");
        }
        GradientKind::Gated => {
            let pixels = shape.h * shape.w;
            let active = |i: usize| dx.data()[i] * data.z(i);
            let terms: [&dyn Fn(usize) -> f64; 5] = [&|i| dx.data()[i], &|_| 1.0, &dz_xhat, &xhat, &active];
            let expected: Vec<f64> = (0..5 * shape.n * c)
                .map(|i| {
                    let image = i / c % shape.n;
                    sum(image * pixels..(image + 1) * pixels, i % c, terms[i / c / shape.n])
                })
                .collect();
            assert_eq!(wide(&actual.sums), expected, "sums");
        }
    }
}

#[test]
fn integers_are_exact() {
    let Some(device) = device() else { return };
    for (i, (n, h, w, c, outputs)) in SHAPES.into_iter().enumerate() {
        let shape = Shape::new(n, h, w, c);
        // SiLU of what may be small is no integer.
        let variant = Variant { act: Activation::Identity, ..VARIANTS[(i + 1) % VARIANTS.len()] };
        check_integers::<f32>(&device, shape, outputs, variant);
        check_integers_in::<f32>(&device, Dtype::Tf32, shape, outputs, variant);
        check_integers::<f16>(&device, shape, outputs, variant);
        check_integers::<bf16>(&device, shape, outputs, variant);
    }
    let (shape, outputs) = WIDE;
    check_integers::<bf16>(&device, shape, outputs, VARIANTS[2]);
}

/// Products of warpgroups for fprop, in tiles of so many columns, by loaders or TMA, and for the gradient of the input.
fn warpgroups(forward: Way, columns: u32) -> Choices {
    let choice = |way, columns| Choice::by(way).columns(columns);
    Choices {
        fprop: choice(forward, columns).blocks(528),
        backward: choice(Way::Wgmma, 64).blocks(264),
        ..Choices::default()
    }
}

/// How operands of theirs come.
const BOTH: [Way; 2] = [Way::Wgmma, Way::Tma];

/// With one step of a sum and many, whole ones and not, as with rows and columns; and with several tiles to a block.
#[test]
fn warpgroups_are_exact() {
    fn check<T: Sample>(device: &Device, shape: Shape, outputs: usize, columns: u32, variant: Variant) {
        let mut data = Data::<T>::integers(shape, outputs);
        // What an input owes is paid by loaders alone.
        let ways = if variant.input == InputKind::Plain { &BOTH[..] } else { &BOTH[..1] };
        for &way in ways {
            data.choices = warpgroups(way, columns);
            let variant = Variant { act: Activation::Identity, ..variant };
            on_device(device, &data, variant).iter().for_each(|actual| check_exactly(&data, variant, actual));
        }
    }
    let Some(device) = device() else { return };
    for (i, (n, h, w, c, outputs, columns)) in [
        (1, 1, 1, 8, 8, 64),
        (1, 3, 43, 8, 136, 128),
        (2, 8, 8, 64, 64, 64),
        (3, 5, 9, 24, 72, 128),
        (1, 11, 13, 72, 24, 64),
        (7, 6, 6, 136, 200, 128),
    ]
    .into_iter()
    .enumerate()
    {
        let shape = Shape::new(n, h, w, c);
        check::<f16>(&device, shape, outputs, columns, VARIANTS[i]);
        check::<bf16>(&device, shape, outputs, columns, VARIANTS[(i + 1) % VARIANTS.len()]);
        check::<bf16>(&device, shape, outputs, columns, VARIANTS[[0, 3][i % 2]]);
    }
    let long = Shape::new(1, 1, 512 * 128 + 700, 8);
    check::<bf16>(&device, long, 8, 64, Variant { input: InputKind::Plain, ..VARIANTS[2] });
}

#[test]
fn warpgroups_are_the_reference_s_bit_for_bit_again() {
    fn check<T: Sample>(device: &Device, shape: Shape, outputs: usize, choices: Choices, variant: Variant) {
        let data = Data::<T> { choices, ..Data::random(shape, outputs, 5) };
        let run = |seed| {
            if let Some(control) = device.host_control() {
                control.shuffle(seed);
            }
            on_device(device, &data, variant)
        };
        let first = run(0);
        first.iter().for_each(|actual| check_outcome(&data, variant, actual));
        for seed in other_schedules() {
            assert!(first == run(seed), "{}, schedule {seed}", T::DTYPE);
        }
    }
    let Some(device) = device() else { return };
    let (wide, narrow) = (Shape::new(3, 9, 13, 72), Shape::new(2, 10, 11, 136));
    let plain = |variant| Variant { input: InputKind::Plain, ..variant };
    for (shape, outputs, way, columns, variant) in [
        (wide, 136, Way::Wgmma, 128, VARIANTS[2]),
        (narrow, 40, Way::Wgmma, 64, VARIANTS[1]),
        (wide, 136, Way::Tma, 128, plain(VARIANTS[2])),
        (narrow, 40, Way::Tma, 64, plain(VARIANTS[1])),
    ] {
        check::<f16>(&device, shape, outputs, warpgroups(way, columns), variant);
        check::<bf16>(&device, shape, outputs, warpgroups(way, columns), variant);
    }
}

/// They are taken where they are chosen: elements of 16 bits, and not through a gate; TMA where the input is as it lies.
#[test]
fn warpgroups_are_taken_where_they_are_chosen() {
    let x = Shape::new(4, 19, 19, 160);
    let rule = PointwiseWork::new(x, 960, Dtype::Bf16).unwrap();
    let (plain, silu) = (OutputKind::Plain, GradientKind::Silu);
    let work = rule.with(warpgroups(Way::Wgmma, 128)).unwrap();
    assert_eq!(work.fprop(InputKind::Plain, plain).kernel, "pointwise_fprop_wgmma128_bf16");
    assert_eq!(work.backward(InputKind::Silu, silu).kernel, "pointwise_backward_wgmma64_bf16");
    let gated = work.backward(InputKind::Gated, GradientKind::Gated);
    assert_eq!(gated.kernel, "pointwise_backward_gated_bf16");
    assert_eq!(
        rule.with(warpgroups(Way::Wgmma, 64)).unwrap().fprop(InputKind::Plain, plain).kernel,
        "pointwise_fprop_wgmma64_bf16"
    );
    let by_tma = rule.with(warpgroups(Way::Tma, 128)).unwrap();
    assert_eq!(by_tma.fprop(InputKind::Plain, plain).kernel, "pointwise_fprop_tma128_bf16");
    assert_eq!(by_tma.fprop(InputKind::Silu, plain).kernel, "pointwise_fprop_wgmma128_bf16");
    assert!(!rule.fprop(InputKind::Plain, plain).kernel.contains("wgmma"));
    // Two blocks find place on a multiprocessor of Hopper: 227 KB and 1 KB of each.
    let launches = [
        work.fprop(InputKind::Plain, plain),
        by_tma.fprop(InputKind::Plain, plain),
        work.backward(InputKind::Silu, silu),
    ];
    for work in launches {
        assert!(work.shared + 3 * 1024 <= 114 * 1024, "{} needs {} bytes", work.kernel, work.shared);
    }
    for (outputs, dtype, columns) in [(960, Dtype::F32, 64), (960, Dtype::Tf32, 128), (64, Dtype::Bf16, 128)]
    {
        let work = PointwiseWork::new(x, outputs, dtype).unwrap();
        for way in BOTH {
            let choices = Choices::only(Launch::Fprop, warpgroups(way, columns).fprop);
            assert!(matches!(work.with(choices), Err(Error::Shape { .. })), "{outputs} {dtype}");
        }
    }
}

/// What tf32 has no bits for is gone before it is multiplied, in every direction; elements of other types are no tf32.
#[test]
fn tf32_rounds_the_factors() {
    let Some(device) = device() else { return };
    let (shape, outputs) = (Shape::new(1, 5, 7, 24), 40);
    let mut data = Data::<f32>::integers(shape, outputs);
    // 2⁻¹² too much: a quarter of the distance to the next number of tf32.
    let beside = |values: &mut Vec<f32>| values.iter_mut().for_each(|v| *v *= 1.0 + 1.0 / 4096.0);
    let exact = Data { dtype: Dtype::Tf32, ..data.clone() };
    beside(&mut data.x.y);
    beside(&mut data.weight);
    let rounded = Data { dtype: Dtype::Tf32, ..data.clone() };
    let [exact, rounded, full] =
        [exact, rounded, data].map(|data| on_device(&device, &data, VARIANTS[0]).remove(0));
    assert_eq!((&rounded.y, &rounded.dx, &rounded.dweight), (&exact.y, &exact.dx, &exact.dweight));
    assert!(full.y != exact.y && full.dx != exact.dx && full.dweight != exact.dweight);
    let plan = Pointwise::<bf16>::plan_with(&device, shape, outputs, Dtype::Tf32, Choices::default());
    assert!(matches!(plan, Err(Error::Shape { .. })));
}

/// Both gradients in one pass: tiles of 32, 64 and 128 pixels; one, two and three groups of inputs, the last smaller; runs in
/// more than 16 parts; a few images to a run, the last with fewer; runs of several tiles.
const ONE_PASS: [(usize, usize, usize, usize, usize); 7] = [
    (1, 21, 29, 200, 48),
    (2, 9, 9, 328, 56),
    (3, 7, 11, 520, 128),
    (291, 1, 2, 40, 16),
    (2, 13, 27, 16, 96),
    (1, 1, 2 * 132 * 32 + 77, 72, 8),
    (3, 15, 16, 72, 128),
];

#[test]
fn one_pass_is_exact() {
    let Some(device) = device() else { return };
    for (i, (n, h, w, c, outputs)) in ONE_PASS.into_iter().enumerate() {
        let shape = Shape::new(n, h, w, c);
        for (j, variant) in [VARIANTS[0], VARIANTS[1], VARIANTS[2], VARIANTS[3]].into_iter().enumerate() {
            let variant = Variant { act: Activation::Identity, ..variant };
            let work = PointwiseWork::new(shape, outputs, Dtype::Bf16).unwrap();
            assert!(work.backward_in(Passes::One, variant.input, variant.gradient).is_some(), "{shape}");
            if (i + j) % 2 == 0 {
                check_integers::<f16>(&device, shape, outputs, variant);
            } else {
                check_integers::<bf16>(&device, shape, outputs, variant);
            }
        }
    }
}

#[test]
fn one_pass_is_the_reference_s() {
    let Some(device) = device() else { return };
    for (i, (n, h, w, c, outputs)) in ONE_PASS.into_iter().enumerate() {
        let data = Data::<bf16>::random(Shape::new(n, h, w, c), outputs, 6);
        check(&device, &data, VARIANTS[1 + i % 3]);
    }
    // Every kernel of the other type.
    for (outputs, variant) in [(24, VARIANTS[1]), (24, VARIANTS[2]), (72, VARIANTS[1]), (72, VARIANTS[2])] {
        check(&device, &Data::<f16>::random(Shape::new(3, 5, 7, 72), outputs, 6), variant);
    }
}

/// Both gradients in several windows: runs of several tiles, with sums or with a skip, and of an image; the last window of fewer
/// pixels; splits side by side, and one that is left without pixels.
const WINDOWS: [(Shape, usize, Dtype, Variant); 5] = [
    (Shape::new(1, 23, 31, 8), 136, Dtype::Tf32, VARIANTS[2]),
    (Shape::new(1, 21, 32, 136), 72, Dtype::F32, VARIANTS[0]),
    (Shape::new(11, 1, 61, 8), 24, Dtype::F32, VARIANTS[1]),
    (Shape::new(13, 5, 13, 16), 24, Dtype::F16, VARIANTS[1]),
    (Shape::new(1, 7, 191, 8), 136, Dtype::Bf16, VARIANTS[3]),
];

#[test]
fn windows_are_exact() {
    let Some(device) = device() else { return };
    for (shape, outputs, dtype, variant) in WINDOWS {
        let work = PointwiseWork::new(shape, outputs, dtype).unwrap();
        assert!(work.backward_in(Passes::Interleaved, variant.input, variant.gradient).is_some(), "{shape}");
        let variant = Variant { act: Activation::Identity, ..variant };
        match dtype {
            Dtype::F32 | Dtype::Tf32 => check_integers_in::<f32>(&device, dtype, shape, outputs, variant),
            Dtype::F16 => check_integers::<f16>(&device, shape, outputs, variant),
            Dtype::Bf16 => check_integers::<bf16>(&device, shape, outputs, variant),
        }
    }
}

#[test]
fn windows_are_the_reference_s() {
    let Some(device) = device() else { return };
    for (shape, outputs, variant) in
        [(Shape::new(1, 23, 31, 8), 136, VARIANTS[2]), (Shape::new(11, 1, 61, 8), 24, VARIANTS[1])]
    {
        check(&device, &Data::<bf16>::random(shape, outputs, 7), variant);
    }
    // In tiles of 256 columns.
    let choices = Choices::only(Launch::Backward, Choice::by(Way::Interleaved).columns(256).blocks(264));
    for variant in [VARIANTS[1], VARIANTS[2]] {
        let (shape, outputs) = (Shape::new(3, 13, 18, 136), 72);
        let work = PointwiseWork::new(shape, outputs, Dtype::Bf16).unwrap().with(choices).unwrap();
        assert_eq!(work.passes(variant.input, variant.gradient), Passes::Interleaved);
        check(&device, &Data::<bf16> { choices, ..Data::random(shape, outputs, 7) }, variant);
    }
}

/// Where operands are more than a cache holds, or where they are chosen; with no more bytes than two passes ask for.
#[test]
fn windows_are_taken_where_they_pay() {
    let (plain, gated) = (GradientKind::Plain { skip: true }, GradientKind::Gated);
    let chosen = Choices::only(Launch::Backward, Choice::by(Way::Interleaved).columns(128).blocks(528));
    for (x, outputs, input, output) in [
        (Shape::new(256, 19, 19, 160), 960, InputKind::Plain, plain),
        (Shape::new(256, 10, 10, 256), 1536, InputKind::Plain, plain),
        (Shape::new(256, 19, 19, 960), 160, InputKind::Gated, gated),
    ] {
        let work = PointwiseWork::new(x, outputs, Dtype::Bf16).unwrap();
        assert_eq!(work.passes(input, output), Passes::Interleaved, "{x}");
        let small = PointwiseWork::new(Shape { n: 16, ..x }, outputs, Dtype::Bf16).unwrap();
        assert_eq!(small.passes(input, output), Passes::Two, "{x}");
        assert_eq!(small.with(chosen).unwrap().passes(input, output), Passes::Interleaved, "{x}");
        let [launch, two] =
            [Passes::Interleaved, Passes::Two].map(|passes| work.backward_in(passes, input, output).unwrap());
        assert_eq!((&launch, &launch.kernel), (&work.backward(input, output), &two.kernel));
        assert!(launch.cost.bytes <= two.cost.bytes && launch.cost.bytes * 100 > two.cost.bytes * 95, "{x}");
        assert!(work.workspace_floats() >= work.floats_in(Passes::Interleaved));
    }
    // Few pixels make one window.
    let work = PointwiseWork::new(Shape::new(2, 7, 7, 160), 960, Dtype::Bf16).unwrap();
    assert!(
        work.with(chosen).is_err()
            && work.backward_in(Passes::Interleaved, InputKind::Plain, plain).is_none()
    );
}

/// An input whose SiLU is of one normalisation, and a gradient through another; and one pass where there is none.
#[test]
fn operands_that_do_not_fit_each_other_are_refused() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let shape = Shape::new(2, 3, 3, 16);
    let plan = Pointwise::<bf16>::plan(&device, shape, 24).unwrap();
    let mut workspace =
        Workspace::new(&device, plan.workspace_floats().max(plan.work().floats_in(Passes::One))).unwrap();
    let (x, y, weight) = (device.zeros(288).unwrap(), device.zeros(432).unwrap(), device.zeros(384).unwrap());
    let (x, y, weight) = (x.as_view(), y.as_view(), weight.as_view());
    let vectors = device.zeros::<f32>(1024).unwrap();
    let (norm, other, owed) = (vectors.slice(..64), vectors.slice(64..128), vectors.slice(128..200));
    let gradient = GradientView { g: &y, y: &y, owed: &owed, arrival: Arrival::Alone };
    let mut outputs = device.zeros::<f32>(1024).unwrap();
    let mut dx = device.zeros(288).unwrap();
    let mut outcome = |passes, input, of_gradient| {
        let mut whole = outputs.as_view_mut();
        let (mut dweight, mut rest) = whole.split_at_mut(384);
        let (mut dgamma, mut rest) = rest.split_at_mut(16);
        let (mut dbeta, mut rest) = rest.split_at_mut(16);
        let mut owed = rest.slice_mut(..48);
        let debt = Debt { norm: of_gradient, dgamma: &mut dgamma, dbeta: &mut dbeta, owed: &mut owed };
        let (output, dx) = (GradientOutput::Silu { y: &x, debt }, &mut dx.as_view_mut());
        plan.backward_in(passes, stream, input, gradient, &weight, dx, &mut dweight, output, &mut workspace)
    };
    let silu = Input::Silu { y: &x, norm: &norm };
    for passes in [Passes::One, Passes::Two] {
        assert!(outcome(passes, silu, &norm).is_ok());
        assert!(matches!(outcome(passes, silu, &other), Err(Error::Shape { .. })), "{passes:?}");
    }
    assert!(outcome(Passes::Two, Input::Plain(&x), &other).is_ok());
    assert!(matches!(outcome(Passes::One, Input::Plain(&x), &other), Err(Error::Shape { .. })));
}

/// It is taken where it moves fewer bytes: where channels are few and pixels many, and operands may be read once.
#[test]
fn one_pass_is_taken_where_it_pays() {
    let of = |x, outputs, dtype| PointwiseWork::new(x, outputs, dtype).unwrap();
    let (silu, plain) = (GradientKind::Silu, GradientKind::Plain { skip: true });
    let x = Shape::new(256, 75, 75, 192);
    let work = of(x, 48, Dtype::Bf16);
    assert_eq!(work.passes(InputKind::Silu, silu), Passes::One);
    let launch = work.backward(InputKind::Silu, silu);
    assert_eq!((launch.kernel.as_str(), launch.grid), ("pointwise_one_pass_n64_bf16", [512, 1, 1]));
    assert!(launch.shared <= 97 * 1024);
    assert_eq!(launch.cost.tensor_operations, 4 * 256 * 75 * 75 * 192 * 48);
    // g, y, x, dx; W, dW; partial results; vectors.
    let (pixels, runs) = (256 * 75 * 75, 512);
    let partial = 8 * runs * 192 * 48 + 16 * runs * 192;
    let vectors = 12 * 48 + 16 * 192;
    assert_eq!(launch.cost.bytes, 2 * pixels * 2 * (192 + 48) + (2 + 8) * 192 * 48 + partial + vectors);
    let two = work.backward_in(Passes::Two, InputKind::Silu, silu).unwrap();
    assert!(launch.cost.bytes * 100 < two.cost.bytes * 64, "{} of {}", launch.cost.bytes, two.cost.bytes);

    for (work, input, output) in [
        // Another type, two tensors in place of one, few pixels, many outputs, and what a third group would read again.
        (of(x, 48, Dtype::F32), InputKind::Silu, silu),
        (work, InputKind::Plain, silu),
        (of(Shape { n: 1, h: 7, w: 7, ..x }, 48, Dtype::Bf16), InputKind::Silu, silu),
        (of(x.with_channels(64), 256, Dtype::Bf16), InputKind::Plain, plain),
        (of(Shape::new(256, 19, 19, 512), 128, Dtype::Bf16), InputKind::Gated, GradientKind::Gated),
    ] {
        assert_ne!(work.passes(input, output), Passes::One, "{work:?}");
        assert!(work.backward(input, output).kernel.contains("backward"), "{work:?}");
    }
}

/// A block has several row tiles one after the other, the last run fewer, and the last tile is not full.
#[test]
fn long_runs_are_exact() {
    let Some(device) = device() else { return };
    let shape = Shape::new(1, 1, 512 * 128 + 700, 8);
    check_integers::<bf16>(&device, shape, 8, Variant { input: InputKind::Plain, ..VARIANTS[2] });
}

/// The mean of y is a thousand times its deviation.
#[test]
fn a_large_mean_costs_the_variance_nothing() {
    let Some(device) = device() else { return };
    let shape = Shape::new(3, 9, 11, 8);
    let mut data = Data::<f32>::random(shape, 16, 8);
    for (i, weight) in data.weight.iter_mut().enumerate() {
        *weight = if i % 8 == 0 { 1.0 } else { 1e-3 * *weight };
    }
    data.x.y.iter_mut().step_by(8).for_each(|y| *y = 100.0);
    let variant = Variant { input: InputKind::Plain, ..VARIANTS[2] };
    let actual = &on_device(&device, &data, variant)[0];
    check_moments(&data, actual);
    let moments = batch_norm::moments(&Tensor::from_vec(data.out(), wide(&actual.y)).unwrap());
    let share = |k: usize| moments.mean[k].abs() / moments.var[k].sqrt();
    assert!((0..16).all(|k| share(k) > 1e4), "the mean is not large");
}

/// ⟨x Wᵀ, g⟩ = ⟨x, g W⟩ = ⟨W, gᵀ x⟩: the three directions are one operator.
#[test]
fn the_directions_are_adjoint() {
    let Some(device) = device() else { return };
    for (n, h, w, c, outputs) in [(2, 9, 8, 72, 136), (1, 13, 13, 24, 8)] {
        let mut data = Data::<f32>::random(Shape::new(n, h, w, c), outputs, 11);
        data.owed = [vec![1.0; outputs], vec![0.0; 2 * outputs]].concat();
        let actual = &on_device(&device, &data, VARIANTS[0])[0];
        let dot = |a: &[f32], b: &[f32]| -> [f64; 2] {
            let terms = || a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b));
            [terms().sum(), terms().map(f64::abs).sum()]
        };
        let dweight: Vec<f32> = actual.dweight.iter().map(|v| v - BEFORE).collect();
        let [forward, size] = dot(&actual.y, &data.g);
        let bound = |terms: usize| (terms + 24) as f64 * EPSILON * size * 4.0;
        close(dot(&data.x.y, &actual.dx)[0], forward, bound(c.max(outputs)), "dgrad");
        close(dot(&data.weight, &dweight)[0], forward, bound(n * h * w), "wgrad");
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let Some(device) = device() else { return };
    for (shape, outputs, variant) in [
        (Shape::new(5, 13, 17, 72), 200, VARIANTS[2]),
        (Shape::new(3, 12, 11, 72), 40, VARIANTS[1]),
        (Shape::new(5, 13, 17, 264), 72, VARIANTS[2]),
        (Shape::new(13, 5, 13, 16), 24, VARIANTS[1]),
    ] {
        let data = Data::<bf16>::random(shape, outputs, 4);
        let run = |seed| {
            if let Some(control) = device.host_control() {
                control.shuffle(seed);
            }
            on_device(&device, &data, variant)
        };
        let first = run(0);
        for seed in other_schedules() {
            assert!(first == run(seed), "schedule {seed}");
        }
    }
}

/// logits, dfeatures, dweight and dbias.
fn classify<T: Sample>(
    device: &Device,
    [features, weight, dlogits]: [&[T]; 3],
    bias: &[f32],
    images: usize,
) -> (Vec<T>, Vec<T>, Vec<f32>, Vec<f32>) {
    let stream = device.compute();
    let (width, classes) = (features.len() / images, bias.len());
    let mut plan = Classifier::<T>::plan(device, images, width, classes).unwrap();
    let mut workspace = Workspace::new(device, plan.workspace_floats()).unwrap();
    let [x, w, d] = [features, weight, dlogits].map(|values| device.upload(values).unwrap());
    let (x, w, d) = (x.as_view(), w.as_view(), d.as_view());
    let bias = device.upload(bias).unwrap();
    let mut logits = unwritten::<T>(device, images * classes);
    let mut dfeatures = unwritten::<T>(device, images * width);
    let mut gradients = [classes * width, classes].map(|length| {
        let mut values = vec![BEFORE; length];
        values.resize(length + elements::MARGIN, -123.0);
        device.upload(&values).unwrap()
    });
    plan.fprop(stream, &x, &w, &bias.as_view(), &mut logits.slice_mut(..images * classes)).unwrap();
    {
        let [dweight, dbias] = &mut gradients;
        let (mut dweight, mut dbias) = (dweight.slice_mut(..classes * width), dbias.slice_mut(..classes));
        let mut dfeatures = dfeatures.slice_mut(..images * width);
        plan.backward(stream, &x, &d, &w, &mut dfeatures, &mut dweight, &mut dbias, &mut workspace).unwrap();
    }
    let [dweight, dbias] = gradients.map(|gradient| written(device, &gradient));
    (written(device, &logits), written(device, &dfeatures), dweight, dbias)
}

fn check_classifier<T: Sample>(device: &Device, images: usize, width: usize, classes: usize, integers: bool) {
    let mut stream = Stream::new(9, 0, 0, Purpose::Init);
    let mut numbers = |count: usize, reach: f64| -> Vec<T> {
        let values = draw::<f32>(&mut stream, count, -reach, reach);
        values.into_iter().map(|v| T::of(if integers { v.round() } else { v })).collect()
    };
    let (x, w, d) =
        (numbers(images * width, 2.0), numbers(classes * width, 1.0), numbers(images * classes, 2.0));
    let bias: Vec<f32> = numbers(classes, 3.0).iter().map(|v| v.wide() as f32).collect();
    let (logits, dfeatures, dweight, dbias) = classify(device, [&x, &w, &d], &bias, images);
    let of = |values: &[T], columns: usize, magnitude: bool| {
        let value = |i: usize| values[i].wide();
        let shape = Shape::new(images, 1, 1, columns);
        tensor(shape, |i| if magnitude { value(i).abs() } else { value(i) })
    };
    let mut results = [false, true].map(|magnitude| {
        let sign = |v: f64| if magnitude { v.abs() } else { v };
        let weight: Vec<f64> = w.iter().map(|v| sign(v.wide())).collect();
        let (x, d) = (of(&x, width, magnitude), of(&d, classes, magnitude));
        let y = reference::forward(&x, &weight, classes);
        let y = tensor(y.shape(), |i| y.data()[i] + sign(at(&bias, i)));
        let (mut dweight, mut dbias) =
            (vec![f64::from(BEFORE); classes * width], vec![f64::from(BEFORE); classes]);
        reference::backward_weight(&x, &d, &mut dweight);
        d.data().iter().enumerate().for_each(|(i, d)| dbias[i % classes] += d);
        (y, reference::backward_input(&d, &weight, width), dweight, dbias)
    });
    let share = |terms: usize| if integers { 0.0 } else { (terms + 16) as f64 * EPSILON };
    // What rounding to T alone makes of an exact result is known exactly.
    let round = |v: f64| if integers { T::of(v as f32).wide() } else { v };
    let [(y, dx, dw, db), (y_size, dx_size, dw_size, db_size)] = &mut results;
    let compare = |actual: &[T], expected: &Tensor<f64>, size: &Tensor<f64>, terms: usize, what: &str| {
        let bound = tensor(size.shape(), |i| share(terms) * size.data()[i]);
        if integers {
            assert_eq!(
                wide(actual),
                expected.data().iter().copied().map(round).collect::<Vec<_>>(),
                "{what}"
            );
        } else {
            check_elements(actual, expected, &bound, what);
        }
    };
    compare(&logits, y, y_size, width, "logits");
    compare(&dfeatures, dx, dx_size, classes, "dfeatures");
    for (actual, expected, size, what) in [(&dweight, dw, dw_size, "dweight"), (&dbias, db, db_size, "dbias")]
    {
        assert_eq!(actual.len(), expected.len());
        for (i, &actual) in actual.iter().enumerate() {
            close(actual.into(), expected[i], share(images) * size[i], format_args!("{what} {i}"));
        }
    }
}

#[test]
fn the_classifier_is_the_reference_s() {
    let Some(device) = device() else { return };
    for (images, width, classes) in [(1, 8, 1), (5, 64, 10), (3, 136, 64), (9, 16, 129), (130, 24, 7)] {
        for integers in [false, true] {
            check_classifier::<f32>(&device, images, width, classes, integers);
            check_classifier::<f16>(&device, images, width, classes, integers);
            check_classifier::<bf16>(&device, images, width, classes, integers);
        }
    }
}

#[test]
fn work_is_described_without_a_device() {
    let x = Shape::new(256, 19, 19, 160);
    let work = PointwiseWork::new(x, 960, Dtype::Bf16).unwrap();
    let fprop = work.fprop(InputKind::Plain, OutputKind::Moments);
    assert_eq!(fprop.kernel, "pointwise_fprop_wide_bf16");
    // 722 row tiles in 256 runs at most, and 8 groups of 128 outputs.
    assert_eq!(fprop.grid, [241 * 8, 1, 1]);
    let pixels = 256 * 19 * 19;
    assert_eq!(fprop.cost.tensor_operations, 2 * pixels * 160 * 960);
    let partial = 2 * 8 * 241 * 960;
    assert_eq!(fprop.cost.bytes, 2 * (pixels * (160 + 960) + 160 * 960) + partial);
    let dgrad = work.dgrad(GradientKind::Plain { skip: false });
    assert_eq!(dgrad.kernel, "pointwise_dgrad_broad_bf16");
    assert_eq!(dgrad.cost.bytes, 2 * (pixels * (160 + 2 * 960) + 160 * 960) + 12 * 960);
    let wgrad = work.wgrad(InputKind::Plain);
    // 15 tiles of 256 inputs, 2888 steps of 32 pixels in 26 splits at most.
    assert_eq!(wgrad.grid, [26 * 15, 1, 1]);
    let partial = 8 * 26 * 15 * 64 * 256;
    assert_eq!(wgrad.cost.bytes, 2 * pixels * (160 + 2 * 960) + 12 * 960 + 8 * 160 * 960 + partial);
    let gated = PointwiseWork::new(x.with_channels(960), 160, Dtype::F32).unwrap().dgrad(GradientKind::Gated);
    assert_eq!((gated.kernel.as_str(), gated.grid), ("pointwise_dgrad_gated_f32", [256 * 15, 1, 1]));
    assert_eq!(work.fprop(InputKind::Plain, OutputKind::Plain).kernel, fprop.kernel);
    // Few rows, few columns or f32: narrow tiles.
    for (x, outputs, dtype) in
        [(Shape::new(1, 7, 7, 160), 960, Dtype::F16), (x, 64, Dtype::F16), (x, 960, Dtype::F32)]
    {
        let work = PointwiseWork::new(x, outputs, dtype).unwrap();
        assert!(work.fprop(InputKind::Plain, OutputKind::Plain).kernel.contains("narrow"));
    }
    // A block of these has to find place on every GPU from sm_80 on: 99 KB at most.
    for work in [fprop, dgrad, wgrad, gated] {
        assert!(work.shared <= 99 * 1024, "{} needs {} bytes", work.kernel, work.shared);
    }
}

#[test]
fn impossible_plans_are_refused() {
    let Some(device) = device() else { return };
    let good = Shape::new(2, 3, 3, 16);
    for (shape, outputs) in [
        (Shape { n: 0, ..good }, 16),
        (Shape { c: 12, ..good }, 16),
        (Shape { w: usize::MAX, ..good }, 16),
        (Shape { n: 1 << 27, h: 1, w: 1, ..good }, 16),
        (Shape::new(1, 1, 1, 65_536), 65_536),
        (good, 0),
        (good, 12),
        (good, usize::MAX - 7),
    ] {
        let plan = Pointwise::<f32>::plan(&device, shape, outputs);
        assert!(matches!(plan, Err(Error::Shape { .. })), "{shape}, {outputs}");
    }
    for (images, features, classes) in
        [(0, 8, 3), (2, 12, 3), (2, 8, 0), (2, 8, usize::MAX), (1 << 27, 16, 3)]
    {
        let plan = Classifier::<f32>::plan(&device, images, features, classes);
        assert!(matches!(plan, Err(Error::Shape { .. })), "{images}, {features}, {classes}");
    }
}

/// Each buffer of each operation one element too long or too short, or overlapping what is written, or a workspace that is
/// too small: an error, and nothing is written.
#[test]
fn unfit_buffers_are_refused_before_anything_runs() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let shape = Shape::new(2, 3, 3, 16);
    let plan = Pointwise::<f32>::plan(&device, shape, 24).unwrap();
    let (x, y, weights) = (288, 432, 384);
    let input = device.zeros::<f32>(1024).unwrap();
    let mut outputs: Vec<_> = (0..4).map(|_| device.zeros::<f32>(1024).unwrap()).collect();
    let mut fits = Workspace::new(&device, plan.workspace_floats()).unwrap();
    let mut small = Workspace::new(&device, 31).unwrap();
    // Number 99 is right in everything.
    for wrong in (0..23).chain([99]) {
        let length = |number: usize, count: usize| count + usize::from(number == wrong);
        let read = |number: usize, count: usize| input.slice(..length(number, count));
        let (values, norm, gate, weight) = (read(0, x), read(1, 64), read(2, 32), read(3, weights));
        let (g, gy, owed, factors) = (read(4, y), read(5, y), read(6, 72), read(7, 2));
        let (bias, skip_y, skip_x) = (read(8, 24), read(9, y), read(22, x));
        let (gamma, beta) = (read(10, 24), read(11, 24));
        let gated = Input::Gated { y: &values, norm: &norm, gate: &gate };
        let gradient = GradientView { g: &g, y: &gy, owed: &owed, arrival: Arrival::Factors(&factors) };
        let result = |touched: &[usize], result: effnetv2::Result<()>| match result {
            Ok(()) => assert!(!touched.contains(&wrong), "buffer {wrong} was taken"),
            Err(Error::Shape { .. }) => assert!(touched.contains(&wrong), "buffer {wrong} was refused"),
            Err(error) => panic!("{error}"),
        };
        let [first, second, third, fourth] = &mut outputs[..] else { unreachable!() };
        let (mut whole, mut y_view) = (first.as_view_mut(), second.slice_mut(..length(12, y)));
        {
            let (mut mean, mut others) = whole.split_at_mut(64);
            let (mut var, mut others) = others.split_at_mut(64);
            let output = Output::Moments(Statistics {
                gamma: &gamma,
                beta: &beta,
                running_mean: &mut mean.slice_mut(..length(13, 24)),
                running_var: &mut var.slice_mut(..length(14, 24)),
                norm: &mut others.slice_mut(..length(15, 96)),
                epsilon: BN_EPSILON,
                momentum: MOMENTUM,
                variance: VarianceEstimator::Biased,
            });
            let outcome = plan.fprop(stream, gated, &weight, &mut y_view, output, &mut fits);
            result(&[0, 1, 2, 3, 10, 11, 12, 13, 14, 15], outcome);
        }
        let folded = Output::Folded { bias: &bias, act: Activation::Silu, skip: Some(&skip_y) };
        let outcome = plan.fprop(stream, Input::Plain(&values), &weight, &mut y_view, folded, &mut fits);
        result(&[0, 3, 8, 9, 12], outcome);

        let mut dx = third.slice_mut(..length(16, x));
        {
            let (mut dgamma, mut others) = whole.split_at_mut(64);
            let (mut dbeta, mut others) = others.split_at_mut(64);
            let debt = Debt {
                norm: &norm,
                dgamma: &mut dgamma.slice_mut(..length(17, 16)),
                dbeta: &mut dbeta.slice_mut(..length(18, 16)),
                owed: &mut others.slice_mut(..length(19, 48)),
            };
            let output = GradientOutput::Silu { y: &values, debt };
            let outcome = plan.dgrad(stream, gradient, &weight, &mut dx, output, &mut fits);
            result(&[0, 1, 3, 4, 5, 6, 7, 16, 17, 18, 19], outcome);
        }
        let mut sums = whole.slice_mut(..length(20, 160));
        let output = GradientOutput::Gated { y: &values, norm: &norm, sums: &mut sums };
        let outcome = plan.dgrad(stream, gradient, &weight, &mut dx, output, &mut fits);
        result(&[0, 1, 3, 4, 5, 6, 7, 16, 20], outcome);
        let output = || GradientOutput::Plain { skip: Some(&skip_x) };
        result(&[3, 4, 5, 6, 7, 16, 22], plan.dgrad(stream, gradient, &weight, &mut dx, output(), &mut fits));
        let outcome = plan.dgrad(stream, gradient, &weight, &mut dx, output(), &mut small);
        assert!(matches!(outcome, Err(Error::Shape { .. })), "a small workspace was taken");
        let mut dweight = fourth.slice_mut(..length(21, weights));
        let outcome = plan.wgrad(stream, gated, gradient, &mut dweight, &mut fits);
        result(&[0, 1, 2, 4, 5, 6, 7, 21], outcome);
        let output = GradientOutput::Plain { skip: Some(&skip_x) };
        let outcome =
            plan.backward(stream, gated, gradient, &weight, &mut dx, &mut dweight, output, &mut fits);
        result(&[0, 1, 2, 3, 4, 5, 6, 7, 16, 21, 22], outcome);
        if wrong == 99 {
            let through = Arrival::Gated { norm: &owed, gate: &gate, dpool: &gate };
            let gradient = GradientView { arrival: through, ..gradient };
            let outcome = plan.wgrad(stream, Input::Plain(&values), gradient, &mut dweight, &mut fits);
            assert!(matches!(outcome, Err(Error::Shape { .. })), "a gate was taken");
        }
    }
}

#[test]
fn unfit_buffers_of_the_classifier_are_refused() {
    let Some(device) = device() else { return };
    let stream = device.compute();
    let mut plan = Classifier::<f32>::plan(&device, 3, 16, 5).unwrap();
    let mut workspace = Workspace::new(&device, plan.workspace_floats()).unwrap();
    let input = device.zeros::<f32>(256).unwrap();
    for wrong in 0..8 {
        let length = |number: usize, count: usize| count + usize::from(number == wrong);
        let read = |number: usize, count: usize| input.slice(..length(number, count));
        let (features, weight, bias, dlogits) = (read(0, 48), read(1, 80), read(2, 5), read(3, 15));
        let mut outputs: Vec<_> = (0..4).map(|_| device.zeros::<f32>(128).unwrap()).collect();
        {
            let [logits, dfeatures, dweight, dbias] = &mut outputs[..] else { unreachable!() };
            let mut logits = logits.slice_mut(..length(4, 15));
            let outcome = plan.fprop(stream, &features, &weight, &bias, &mut logits);
            assert_eq!(matches!(outcome, Err(Error::Shape { .. })), [0, 1, 2, 4].contains(&wrong), "{wrong}");
            let (mut dfeatures, mut dweight, mut dbias) = (
                dfeatures.slice_mut(..length(5, 48)),
                dweight.slice_mut(..length(6, 80)),
                dbias.slice_mut(..length(7, 5)),
            );
            let outcome = plan.backward(
                stream,
                &features,
                &dlogits,
                &weight,
                &mut dfeatures,
                &mut dweight,
                &mut dbias,
                &mut workspace,
            );
            assert_eq!(matches!(outcome, Err(Error::Shape { .. })), ![2, 4].contains(&wrong), "{wrong}");
        }
        if ![2, 4].contains(&wrong) {
            for output in &outputs[1..] {
                assert_eq!(device.read(output).unwrap(), vec![0.0; 128], "{wrong}");
            }
        }
    }
}

#[test]
fn on_a_gpu() {
    again_on_a_gpu("on_a_gpu");
}
