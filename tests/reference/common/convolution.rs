//! What the three convolutions are held to alike: exact integers, adjointness, errors.

use super::definition::for_products;
use super::{PADDINGS, Table, assert_shape_error, cast, f64s, integers, nothing_owed, tensor, uniform};
use effnetv2::Result;
use effnetv2::backend::{Activation, Backend, ConvNorm, DropPath, Gradient, Load, Mode, Raw, Variables};
use effnetv2::reference::Reference;
use effnetv2::tensor::{Conv, Real, Shape, Tensor};

/// A convolution by itself: its batch norm uses running statistics and owes nothing backward.
#[derive(Debug)]
pub struct Lone<F: Real> {
    pub layer: ConvNorm,
    pub vars: Variables<Reference<F>>,
    pub backend: Reference<F>,
}

impl<F: Real> Lone<F> {
    pub fn new(conv: Conv, weights: &[F]) -> Self {
        let mut table = Table::default();
        let layer = table.conv_norm("conv", conv);
        let mut params = cast(&table.values(0));
        params[layer.weight.clone()].copy_from_slice(weights);
        let vars =
            Variables { grads: vec![F::zero(); params.len()], params, stats: vec![F::one(); table.stats] };
        Self { layer, vars, backend: Reference::new() }
    }

    pub fn forward(&mut self, x: &Tensor<F>) -> Result<Raw<Reference<F>>> {
        self.backend.conv_norm(&self.layer, Load::Plain(x), &mut self.vars, Mode::Eval)
    }

    /// The gradient of `x`, plus `skip`; that of the weights is added to those of before.
    pub fn backward(
        &mut self,
        x: &Tensor<F>,
        raw: &Raw<Reference<F>>,
        dy: &Tensor<F>,
        skip: Option<&Tensor<F>>,
    ) -> Result<Tensor<F>> {
        let owed = nothing_owed(self.layer.conv.outputs);
        let grad = Gradient { gradient: dy, raw, owed: &owed };
        self.backend.conv_backward(&self.layer, x, grad, skip, &mut self.vars)
    }

    pub fn weight_gradient(&mut self) -> &mut [F] {
        &mut self.vars.grads[self.layer.weight.clone()]
    }
}

/// All three directions equal the definition, value for value.
fn assert_exact<F: Real>(conv: Conv, (n, h, w): (usize, usize, usize)) {
    let shape = Shape::new(n, h, w, conv.inputs);
    let x = tensor(shape, integers::<F>(1, 0, shape.elements()));
    let weight = integers::<F>(1, 1, conv.weights());
    let mut lone = Lone::new(conv, &weight);
    let raw = lone.forward(&x).unwrap();

    let dy = tensor(raw.y.shape(), integers::<F>(1, 2, raw.y.shape().elements()));
    let skip = tensor(shape, integers::<F>(1, 3, shape.elements()));
    let before = integers::<F>(1, 4, weight.len());
    let (mut y, mut dx, mut dw) = (vec![F::zero(); dy.data().len()], skip.data().to_vec(), before.clone());
    let output = for_products(&conv, shape, |i, k, o| {
        y[o] += x.data()[i] * weight[k];
        dx[i] += dy.data()[o] * weight[k];
        dw[k] += dy.data()[o] * x.data()[i];
    });
    assert_eq!(raw.y.shape(), output, "output of {conv:?} for {shape}");
    assert_eq!(raw.y.data(), y, "fprop of {conv:?} for {shape}");

    lone.weight_gradient().copy_from_slice(&before);
    let found = lone.backward(&x, &raw, &dy, Some(&skip)).unwrap();
    assert_eq!(found.data(), dx, "dgrad of {conv:?} for {shape}");
    assert_eq!(lone.weight_gradient(), dw, "wgrad of {conv:?} for {shape}");

    lone.weight_gradient().copy_from_slice(&before);
    let owed = nothing_owed(conv.outputs);
    let grad = Gradient { gradient: &dy, raw: &raw, owed: &owed };
    lone.backend.conv_backward_weights(&lone.layer, &x, grad, &mut lone.vars).unwrap();
    assert_eq!(lone.weight_gradient(), dw, "wgrad alone of {conv:?} for {shape}");
}

/// [`assert_exact`] for all kernels, strides, paddings, channels and images, in both precisions.
pub fn assert_all_exact(
    base: Conv,
    kernels: &[usize],
    strides: &[usize],
    channels: &[(usize, usize)],
    images: &[(usize, usize, usize)],
) {
    for &kernel in kernels {
        for &stride in strides {
            for padding in PADDINGS {
                for &(inputs, outputs) in channels {
                    for &images in images {
                        let conv = Conv { kernel, stride, padding, inputs, outputs, ..base };
                        assert_exact::<f32>(conv, images);
                        assert_exact::<f64>(conv, images);
                    }
                }
            }
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// ⟨conv(x, w), y⟩ = ⟨x, dgrad(y, w)⟩ = ⟨w, wgrad(x, y)⟩, to the rounding of sums of those terms.
pub fn assert_adjoint(conv: Conv, (n, h, w): (usize, usize, usize), seed: u64) {
    let shape = Shape::new(n, h, w, conv.inputs);
    let x = tensor(shape, uniform(seed, 0, shape.elements()));
    let weight = uniform(seed, 1, conv.weights());
    let mut lone = Lone::<f64>::new(conv, &weight);
    let raw = lone.forward(&x).unwrap();
    let dy = tensor(raw.y.shape(), uniform(seed, 2, raw.y.data().len()));
    let dx = lone.backward(&x, &raw, &dy, None).unwrap();

    let (mut terms, mut magnitude) = (0.0, 0.0);
    for_products(&conv, shape, |i, k, o| {
        terms += 1.0;
        magnitude += (x.data()[i] * weight[k] * dy.data()[o]).abs();
    });
    let bound = terms * f64::EPSILON * magnitude;
    let product = dot(raw.y.data(), dy.data());
    for (name, other) in
        [("dgrad", dot(x.data(), dx.data())), ("wgrad", dot(&weight, lone.weight_gradient()))]
    {
        let off = (product - other).abs();
        assert!(off <= bound, "{conv:?} for {shape}: {name} is off by {off:e} > {bound:e}");
    }
}

/// Arguments that do not fit are told by both shapes, and nothing is added to any gradient.
pub fn assert_errors(conv: Conv) {
    let (shape, other) = (Shape::new(2, 5, 4, conv.inputs), Shape::new(2, 5, 4, conv.inputs + 3));
    let weight = uniform(0, 0, conv.weights());
    let mut lone = Lone::<f64>::new(conv, &weight);
    let x = tensor(shape, uniform(0, 1, shape.elements()));
    let wide = Tensor::zeros(other);
    let channels = conv.inputs.to_string();
    assert_shape_error(lone.forward(&wide), &[&other.to_string(), &channels]);
    for empty in [Shape { n: 0, ..shape }, Shape { h: 0, ..shape }, Shape { w: 0, ..shape }] {
        assert_shape_error(lone.forward(&Tensor::zeros(empty)), &[&empty.to_string(), "empty"]);
    }

    let raw = lone.forward(&x).unwrap();
    let y = raw.y.shape();
    let (found, expected) = (y.with_channels(y.c + 1), y.to_string());
    let words = [expected.as_str(), &found.to_string()];
    let (misfit, dy) = (Tensor::zeros(found), tensor(y, uniform(0, 2, y.elements())));
    let drop = Some(DropPath { rate: 0.5, block: 0 });
    assert_shape_error(lone.backend.merge(&raw, Activation::Identity, Some(&misfit), None), &words);
    assert_shape_error(lone.backend.merge(&raw, Activation::Identity, None, drop), &["0 images", "2"]);
    for act in [Activation::Identity, Activation::Silu] {
        let branch = (&lone.layer, &raw);
        assert_shape_error(lone.backend.merge_backward(branch, act, None, &misfit, &mut lone.vars), &words);
        let branch = (&lone.layer, &raw);
        assert_shape_error(
            lone.backend.merge_backward(branch, act, drop, &dy, &mut lone.vars),
            &["0 images", "2"],
        );
    }
    assert_shape_error(lone.backward(&x, &raw, &misfit, None), &words);
    let owed = nothing_owed(conv.outputs);
    let grad = Gradient { gradient: &misfit, raw: &raw, owed: &owed };
    assert_shape_error(lone.backend.conv_backward_weights(&lone.layer, &x, grad, &mut lone.vars), &words);
    assert_shape_error(lone.backward(&wide, &raw, &dy, None), &[&other.to_string(), &channels]);
    let words = [shape.to_string(), other.to_string()];
    assert_shape_error(lone.backward(&x, &raw, &dy, Some(&wide)), &[&words[0], &words[1]]);

    // A raw output that is not of this convolution.
    let short = Tensor::zeros(Shape { n: 1, ..shape });
    let stranger = lone.forward(&short).unwrap();
    let words = [stranger.y.shape().to_string(), y.to_string()];
    assert_shape_error(lone.backward(&x, &stranger, &dy, None), &[&words[0], &words[1]]);
    assert!(f64s(&lone.vars.grads).iter().all(|&g| g == 0.0), "a refused backward left something behind");
}
