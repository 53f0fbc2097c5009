//! What the proofs of the reference share: values, layers without a network, threads, expected errors.
#![allow(unreachable_pub, reason = "what the other files of this program use")]

pub mod chain;
pub mod convolution;
pub mod definition;
pub mod differences;
pub mod whole;

use effnetv2::backend::{Classifier, ConvNorm, SqueezeExcite, VarianceEstimator};
use effnetv2::nn::ALIGNMENT;
use effnetv2::random::{Purpose, Stream};
use effnetv2::reference::batch_norm::Owed;
use effnetv2::tensor::{Conv, ConvKind, Padding, Real, Shape, Tensor};
use effnetv2::{Error, Result};
use proptest::prelude::*;
use std::ops::Range;

/// Random cases of each property.
pub const CASES: u32 = 32;

/// ε of the layers here. The published 1e-3 would make a batch norm over two or three values bend so sharply that a
/// finite difference says nothing; networks with 1e-3 are compared with PyTorch in `goldens.rs`.
pub const EPSILON: f64 = 0.1;

/// Both conventions.
pub const PADDINGS: [Padding; 2] = [Padding::Same, Padding::Symmetric];

/// `len` pseudo-random values in [-1, 1); the same for the same (seed, index).
pub fn uniform(seed: u64, index: u32, len: usize) -> Vec<f64> {
    let mut stream = Stream::new(seed, 0, index, Purpose::Init);
    (0..len).map(|_| stream.uniform_in(-1.0, 1.0)).collect()
}

/// `len` integers from -3 to 3: sums of their products are exact in f32.
pub fn integers<F: Real>(seed: u64, index: u32, len: usize) -> Vec<F> {
    uniform(seed, index, len).into_iter().map(|v| F::of((v * 3.5).trunc())).collect()
}

/// `values` in another precision.
pub fn cast<F: Real>(values: &[f64]) -> Vec<F> {
    values.iter().map(|&v| F::of(v)).collect()
}

/// `values` as f64.
pub fn f64s<F: Real>(values: &[F]) -> Vec<f64> {
    values.iter().map(|v| v.f64()).collect()
}

/// A tensor around `values`.
pub fn tensor<F: Real>(shape: Shape, values: Vec<F>) -> Tensor<F> {
    Tensor::from_vec(shape, values).unwrap()
}

/// A 1×1 convolution.
pub const fn pointwise(inputs: usize, outputs: usize) -> Conv {
    Conv { kind: ConvKind::Pointwise, kernel: 1, stride: 1, padding: Padding::Same, inputs, outputs }
}

/// Coefficients of a gradient to which no batch norm owes anything: dy = g.
pub fn nothing_owed<F: Real>(channels: usize) -> Owed<F> {
    let [a, b] = [F::one(), F::zero()].map(|value| vec![value; channels]);
    Owed { a, c: b.clone(), b, factors: None }
}

/// One tensor inside a flat buffer, and where random values for it lie: offset + scale · [-1, 1).
#[derive(Clone, Debug)]
pub struct Slot {
    pub name: String,
    pub range: Range<usize>,
    scale: f64,
    offset: f64,
}

/// Lays out layers by hand, as a network would.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub slots: Vec<Slot>,
    pub stats: usize,
}

impl Table {
    /// The length of the buffer: tensors begin where a network's would.
    pub fn len(&self) -> usize {
        self.slots.last().map_or(0, |slot| slot.range.end.next_multiple_of(ALIGNMENT))
    }

    pub fn tensor(&mut self, name: String, len: usize, scale: f64, offset: f64) -> Range<usize> {
        let range = self.len()..self.len() + len;
        self.slots.push(Slot { name, range: range.clone(), scale, offset });
        range
    }

    /// Weights of variance 1 / fan-in, as makes outputs of variance 1/3.
    fn weight(&mut self, name: String, len: usize, fan_in: usize) -> Range<usize> {
        self.tensor(name, len, (3.0 / fan_in as f64).sqrt(), 0.0)
    }

    pub fn conv_norm(&mut self, name: &str, conv: Conv) -> ConvNorm {
        let channels = conv.outputs;
        let [mean, var] = [0, 1].map(|i| self.stats + i * channels.next_multiple_of(ALIGNMENT));
        self.stats = var + channels.next_multiple_of(ALIGNMENT);
        ConvNorm {
            conv,
            weight: self.weight(format!("{name}.weight"), conv.weights(), conv.weights() / channels),
            gamma: self.tensor(format!("{name}.gamma"), channels, 0.5, 1.0),
            beta: self.tensor(format!("{name}.beta"), channels, 1.0, 0.0),
            running_mean: mean..mean + channels,
            running_var: var..var + channels,
            epsilon: EPSILON,
            momentum: 0.1,
            variance: VarianceEstimator::Unbiased,
        }
    }

    pub fn squeeze_excite(&mut self, channels: usize, reduced: usize) -> SqueezeExcite {
        SqueezeExcite {
            channels,
            reduced,
            reduce_weight: self.weight("reduce.weight".into(), reduced * channels, channels),
            reduce_bias: self.tensor("reduce.bias".into(), reduced, 1.0, 0.0),
            expand_weight: self.weight("expand.weight".into(), channels * reduced, reduced),
            expand_bias: self.tensor("expand.bias".into(), channels, 1.0, 0.0),
        }
    }

    pub fn classifier(&mut self, features: usize, classes: usize) -> Classifier {
        Classifier {
            features,
            classes,
            weight: self.weight("classifier.weight".into(), classes * features, features),
            bias: self.tensor("classifier.bias".into(), classes, 1.0, 0.0),
        }
    }

    /// Random values for the whole buffer, zero between tensors.
    pub fn values(&self, seed: u64) -> Vec<f64> {
        let mut values = vec![0.0; self.len()];
        for (index, slot) in self.slots.iter().enumerate() {
            let draws = uniform(seed, index as u32, slot.range.len());
            values[slot.range.clone()]
                .iter_mut()
                .zip(draws)
                .for_each(|(v, u)| *v = slot.offset + slot.scale * u);
        }
        values
    }
}

/// A whole convolution; the spatial kinds have a kernel of 3 or 5.
pub fn conv(kind: ConvKind, max_channels: usize) -> impl Strategy<Value = Conv> {
    let kernel =
        if kind == ConvKind::Pointwise { Just(1).boxed() } else { prop_oneof![Just(3), Just(5)].boxed() };
    let stride = if kind == ConvKind::Pointwise { 1..2 } else { 1..3_usize };
    let padding = prop_oneof![Just(Padding::Same), Just(Padding::Symmetric)];
    (kernel, stride, padding, 1..=max_channels, 1..=max_channels).prop_map(
        move |(kernel, stride, padding, inputs, outputs)| {
            let outputs = if kind == ConvKind::Depthwise { inputs } else { outputs };
            Conv { kind, kernel, stride, padding, inputs, outputs }
        },
    )
}

/// Images, rows, columns; few and small, odd and even.
pub fn images() -> impl Strategy<Value = (usize, usize, usize)> {
    (1..=3_usize, 1..=9_usize, 1..=9_usize)
}

/// Runs `work` on pools of one, two and seven threads and compares every bit. Work in f32 is given out as f64, which
/// loses none; work in f64 shows an order of sums that rounding to f32 may hide.
pub fn assert_same_on_any_number_of_threads(work: impl Fn() -> Vec<Vec<f64>> + Sync) {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect::<Vec<_>>();
        pool.install(&work).into_iter().map(bits).collect::<Vec<_>>()
    };
    let one = run(1);
    for threads in [2, 7] {
        for (index, (found, expected)) in run(threads).iter().zip(&one).enumerate() {
            let differing = found.iter().zip(expected).filter(|(a, b)| a != b).count();
            let total = expected.len();
            assert_eq!(
                differing, 0,
                "{threads} threads: {differing} of {total} values differ in result {index}"
            );
        }
    }
}

/// `result` is an [`Error::Shape`] whose message holds all of `words`.
pub fn assert_shape_error<T>(result: Result<T>, words: &[&str]) {
    match result {
        Err(error @ Error::Shape { .. }) => {
            let message = error.to_string();
            for word in words {
                assert!(message.contains(word), "{message:?} does not name {word:?}");
            }
        }
        Err(other) => panic!("not a shape error: {other}"),
        Ok(_) => panic!("accepted, though {words:?} do not fit"),
    }
}
