//! One convolution as the blocks use it: what it reads is plain, or owes a batch norm and SiLU, or a gate as well; what
//! it writes is normalised and merged with a skip connection under stochastic depth. The loss is a fixed probe.

use super::differences::{Loss, assert_gradient};
use super::{
    Table, assert_same_on_any_number_of_threads, cast, conv, f64s, images, pointwise, tensor, uniform,
};
use effnetv2::Result;
use effnetv2::backend::{
    Activation, Backend, ConvNorm, DropPath, Gradient, Load, Mode, SqueezeExcite, StepKey, Variables,
};
use effnetv2::reference::Reference;
use effnetv2::tensor::{Conv, ConvKind, Real, Shape};
use proptest::prelude::*;
use std::ops::Range;

/// Channels that the producer of a convolution's input reads.
const SOURCE_CHANNELS: usize = 3;

/// How the convolution reads its input.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    Plain,
    Silu,
    /// With this many channels inside the squeeze-excitation.
    Gated(usize),
}

/// What to build.
#[derive(Clone, Debug)]
pub struct ChainSpec {
    pub source: Source,
    pub conv: Conv,
    /// Images, rows, columns.
    pub images: (usize, usize, usize),
    pub act: Activation,
    pub skip: bool,
    /// The rate of stochastic depth.
    pub drop: Option<f64>,
    pub seed: u64,
}

/// The layers, and one buffer of everything a gradient exists for, the input included.
#[derive(Debug)]
pub struct Chain {
    spec: ChainSpec,
    producer: Option<ConvNorm>,
    squeeze: Option<SqueezeExcite>,
    conv: ConvNorm,
    input: (Shape, Range<usize>),
    skip: Option<Range<usize>>,
    output: Shape,
    table: Table,
}

/// What came out.
#[derive(Debug)]
pub struct Run<F> {
    pub output: Vec<F>,
    pub stats: Vec<F>,
    pub grads: Vec<F>,
}

impl Chain {
    pub fn new(spec: ChainSpec) -> Self {
        let mut table = Table::default();
        let (n, h, w) = spec.images;
        let conv = spec.conv;
        let shape = Shape::new(n, h, w, conv.inputs);
        let output = conv.output(shape).unwrap();
        let producer = match spec.source {
            Source::Plain => None,
            _ => Some(table.conv_norm("producer", pointwise(SOURCE_CHANNELS, conv.inputs))),
        };
        let squeeze = match spec.source {
            Source::Gated(reduced) => Some(table.squeeze_excite(conv.inputs, reduced)),
            _ => None,
        };
        let input = shape.with_channels(producer.as_ref().map_or(conv.inputs, |p| p.conv.inputs));
        let conv = table.conv_norm("conv", conv);
        let input = (input, table.tensor("input".into(), input.elements(), 1.0, 0.0));
        let skip = spec.skip.then(|| table.tensor("skip".into(), output.elements(), 1.0, 0.0));
        Self { spec, producer, squeeze, conv, input, skip, output, table }
    }

    pub fn values(&self) -> Vec<f64> {
        self.table.values(self.spec.seed)
    }

    /// d loss / d output.
    pub fn probe(&self) -> Vec<f64> {
        uniform(self.spec.seed, u32::MAX, self.output.elements())
    }

    /// Forward, and backward from `probe`.
    pub fn run<F: Real>(&self, values: &[F], probe: &[F]) -> Result<Run<F>> {
        let mut backend = Reference::<F>::new();
        let images = (0..self.output.n as u32).map(|i| 10 + i).collect();
        backend.begin_step(&StepKey { seed: self.spec.seed, epoch: 1, images }).unwrap();
        let mut vars = Variables {
            params: values.to_vec(),
            grads: vec![F::zero(); values.len()],
            stats: vec![F::one(); self.table.stats],
        };
        let x = tensor(self.input.0, values[self.input.1.clone()].to_vec());
        let skip = self.skip.clone().map(|range| tensor(self.output, values[range].to_vec()));
        let drop = self.spec.drop.map(|rate| DropPath { rate, block: 3 });
        let (act, mode) = (self.spec.act, Mode::Train);

        let produced = self
            .producer
            .as_ref()
            .map(|p| backend.conv_norm(p, Load::Plain(&x), &mut vars, mode))
            .transpose()?;
        let gate = match (&self.squeeze, &produced) {
            (Some(squeeze), Some(produced)) => Some(backend.squeeze_excite(squeeze, produced, &mut vars)?),
            _ => None,
        };
        let load = match (&produced, &gate) {
            (None, _) => Load::Plain(&x),
            (Some(raw), None) => Load::Silu(raw),
            (Some(raw), Some(gate)) => Load::Gated(raw, gate),
        };
        let raw = backend.conv_norm(&self.conv, load, &mut vars, mode)?;
        let output = backend.merge(&raw, act, skip.as_ref(), drop)?;

        let probe = tensor(self.output, probe.to_vec());
        let (dz, owed) = backend.merge_backward((&self.conv, &raw), act, drop, &probe, &mut vars)?;
        let grad = Gradient { gradient: dz.as_ref().unwrap_or(&probe), raw: &raw, owed: &owed };
        let dx = match (&self.producer, &produced) {
            (Some(producer), Some(produced)) => {
                let made = (producer, produced);
                let (dz, owed) = match (&self.squeeze, &gate) {
                    (Some(squeeze), Some(gate)) => {
                        backend.conv_backward_gated(&self.conv, made, (squeeze, gate), grad, &mut vars)?
                    }
                    _ => backend.conv_backward_silu(&self.conv, made, grad, &mut vars)?,
                };
                let grad = Gradient { gradient: &dz, raw: produced, owed: &owed };
                backend.conv_backward(producer, &x, grad, None, &mut vars)?
            }
            _ => backend.conv_backward(&self.conv, &x, grad, None, &mut vars)?,
        };
        let mut grads = vars.grads;
        grads[self.input.1.clone()].copy_from_slice(dx.data());
        if let Some(skip) = &self.skip {
            grads[skip.clone()].copy_from_slice(probe.data());
        }
        Ok(Run { output: output.into_vec(), stats: vars.stats, grads })
    }

    /// Every gradient against finite differences.
    pub fn assert_gradients(&self) {
        let (values, probe) = (self.values(), self.probe());
        let gradient = self.run(&values, &probe).unwrap().grads;
        assert_gradient(&self.table.slots, &values, &gradient, self.spec.seed, |values| {
            Loss::probe(&self.run(values, &probe).unwrap().output, &probe)
        });
    }

    /// Everything computed in `F`.
    fn results<F: Real>(&self) -> Vec<Vec<f64>> {
        let run = self.run(&cast::<F>(&self.values()), &cast::<F>(&self.probe())).unwrap();
        [run.output, run.stats, run.grads].iter().map(|values| f64s(values)).collect()
    }

    /// No number of threads changes a bit, in either precision.
    pub fn assert_same_on_any_number_of_threads(&self) {
        assert_same_on_any_number_of_threads(|| self.results::<f32>());
        assert_same_on_any_number_of_threads(|| self.results::<f64>());
    }
}

fn source() -> impl Strategy<Value = Source> {
    prop_oneof![Just(Source::Plain), Just(Source::Silu), (1..4_usize).prop_map(Source::Gated)]
}

/// Any chain around a convolution of `kind` whose normalisations all see two values a channel or more.
pub fn chains(kind: ConvKind) -> impl Strategy<Value = ChainSpec> {
    let act = prop_oneof![Just(Activation::Identity), Just(Activation::Silu)];
    let drop = prop_oneof![Just(None), (0.1..0.7).prop_map(Some)];
    (source(), conv(kind, 11), images(), act, any::<bool>(), drop, any::<u64>())
        .prop_map(|(source, conv, images, act, skip, drop, seed)| ChainSpec {
            source,
            conv,
            images,
            act,
            skip,
            drop,
            seed,
        })
        .prop_filter("one value has no variance", |spec| {
            let (n, h, w) = spec.images;
            spec.conv.output(Shape::new(n, h, w, spec.conv.inputs)).unwrap().pixels() > 1
        })
}
