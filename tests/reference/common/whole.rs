//! A small network with its loss: images to mean cross entropy, and every gradient back.

use super::differences::{Loss, assert_gradient};
use super::{EPSILON, Table, cast, f64s, tensor, uniform};
use effnetv2::Result;
use effnetv2::backend::{Backend, Mode, StepKey, Variables, VarianceEstimator};
use effnetv2::nn::{BatchNormSpec, BlockSpec, Network, NetworkSpec, Pass, Role, StageSpec};
use effnetv2::reference::Reference;
use effnetv2::tensor::{Padding, Real, Shape};
use std::ops::Range;

/// A network of these blocks, one a stage.
pub fn spec(padding: Padding, stem: usize, blocks: &[BlockSpec], head: usize, classes: usize) -> NetworkSpec {
    NetworkSpec {
        name: "proof".into(),
        stem,
        stages: blocks.iter().map(|&block| StageSpec { blocks: vec![block] }).collect(),
        head,
        classes,
        padding,
        batch_norm: BatchNormSpec { epsilon: EPSILON, momentum: 0.1, variance: VarianceEstimator::Unbiased },
    }
}

/// The network, and one buffer of its parameters and images.
#[derive(Debug)]
pub struct Whole {
    pub network: Network,
    pub dropout: f64,
    pub key: StepKey,
    shape: Shape,
    images: Range<usize>,
    table: Table,
    seed: u64,
}

/// What a training step computes.
#[derive(Debug)]
pub struct Run<F> {
    pub logits: Vec<F>,
    pub loss: f64,
    pub grads: Vec<F>,
    pub stats: Vec<F>,
}

impl Whole {
    pub fn new(spec: NetworkSpec, (n, h, w): (usize, usize, usize), dropout: f64, seed: u64) -> Self {
        let network = Network::new(spec);
        let mut table = Table::default();
        for entry in &network.layout().params {
            let fan_in = (entry.range.len() / entry.shape[0]) as f64;
            let (scale, offset) = match entry.role {
                Role::Gamma => (0.5, 1.0),
                Role::Beta | Role::Bias => (1.0, 0.0),
                _ => ((3.0 / fan_in).sqrt(), 0.0),
            };
            table.tensor(entry.name.clone(), entry.range.len(), scale, offset);
        }
        let shape = Shape::new(n, h, w, 3);
        let images = table.tensor("images".into(), shape.elements(), 1.0, 0.0);
        let key = StepKey { seed, epoch: 2, images: (0..n as u32).map(|i| 5 + 3 * i).collect() };
        Self { network, dropout, key, shape, images, table, seed }
    }

    pub fn values(&self) -> Vec<f64> {
        self.table.values(self.seed)
    }

    pub fn variables<F: Real>(&self, values: &[F]) -> Variables<Reference<F>> {
        Variables {
            params: values[..self.images.start].to_vec(),
            grads: vec![F::zero(); self.images.start],
            stats: vec![F::one(); self.network.layout().stat_buffer()],
        }
    }

    /// Soft targets: positive, an image's sum one.
    fn targets(&self) -> Vec<f32> {
        let classes = self.network.spec().classes;
        let mut targets = uniform(self.seed, 3000, self.shape.n * classes);
        for row in targets.chunks_mut(classes) {
            row.iter_mut().for_each(|t| *t = *t * *t + 0.01);
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|t| *t /= sum);
        }
        targets.into_iter().map(|t| t as f32).collect()
    }

    /// Logits in `mode`; the statistics of `vars` move as they do.
    pub fn logits<F: Real>(
        &self,
        values: &[F],
        vars: &mut Variables<Reference<F>>,
        mode: Mode,
    ) -> Result<Vec<F>> {
        let mut backend = Reference::new();
        backend.begin_step(&self.key).unwrap();
        let x = tensor(self.shape, values[self.images.clone()].to_vec());
        let pass = self.network.forward(&mut backend, x, vars, mode, self.dropout)?;
        backend.logits(&pass.head)
    }

    /// Logits of inference.
    pub fn infer<F: Real>(&self, values: &[F], vars: &mut Variables<Reference<F>>) -> Result<Vec<F>> {
        let mut backend = Reference::new();
        let x = tensor(self.shape, values[self.images.clone()].to_vec());
        let head = self.network.infer(&mut backend, x, vars)?;
        backend.logits(&head)
    }

    /// Forward in training, and the loss.
    fn forward<F: Real>(
        &self,
        values: &[F],
        backend: &mut Reference<F>,
        vars: &mut Variables<Reference<F>>,
    ) -> Result<(Pass<Reference<F>>, Vec<F>, f64)> {
        backend.begin_step(&self.key).unwrap();
        let x = tensor(self.shape, values[self.images.clone()].to_vec());
        let mut pass = self.network.forward(backend, x, vars, Mode::Train, self.dropout)?;
        let logits = backend.logits(&pass.head)?;
        let loss = backend.cross_entropy(&mut pass.head, &self.targets())?;
        Ok((pass, logits, loss))
    }

    /// Forward and backward; the gradients end with those of the images.
    pub fn run<F: Real>(&self, values: &[F]) -> Result<Run<F>> {
        let (mut backend, mut vars) = (Reference::new(), self.variables(values));
        let (pass, logits, loss) = self.forward(values, &mut backend, &mut vars)?;
        let dx = self.network.backward_to_images(&mut backend, pass, &mut vars)?;
        let mut grads = vars.grads;
        grads.extend_from_slice(dx.data());
        grads.resize(self.table.len(), F::zero());
        Ok(Run { logits, loss, grads, stats: vars.stats })
    }

    /// Every gradient against finite differences.
    pub fn assert_gradients(&self) {
        let values = self.values();
        let gradient = self.run(&values).unwrap().grads;
        assert_gradient(&self.table.slots, &values, &gradient, self.seed, |values| {
            let mut vars = self.variables(values);
            let (_, logits, value) = self.forward(values, &mut Reference::new(), &mut vars).unwrap();
            Loss { value, magnitude: logits.iter().fold(1.0, |m: f64, l| m.max(l.abs())) }
        });
    }

    /// Everything computed in `F`.
    pub fn results<F: Real>(&self) -> Vec<Vec<f64>> {
        let run = self.run(&cast::<F>(&self.values())).unwrap();
        vec![vec![run.loss], f64s(&run.logits), f64s(&run.grads), f64s(&run.stats)]
    }

    /// The gradients of the parameters whose name holds `part`.
    pub fn part<'a, F>(&self, grads: &'a [F], part: &str) -> Vec<(&str, &'a [F])> {
        let slots = self.table.slots.iter().filter(|slot| slot.name.contains(part));
        slots.map(|slot| (slot.name.as_str(), &grads[slot.range.clone()])).collect()
    }
}
