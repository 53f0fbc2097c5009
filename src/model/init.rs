//! Initial values, as google/automl draws them.

use crate::nn::{Entry, Layout, Role};
use crate::random::{Purpose, Stream};
use crate::tensor::{ConvKind, Real};
use rand_distr::{Distribution, StandardNormal};
use rayon::prelude::*;

/// Initial parameters and statistics: convolutions N(0, 2/fan_out) with fan_out = k²·outputs (k² for depthwise ones),
/// squeeze-excitation likewise, the classifier U(±1/√classes), biases 0, γ = 1, β = 0, running mean 0 and variance 1.
/// Every tensor has a random stream of its own.
pub fn initial_values<F: Real>(layout: &Layout, seed: u64) -> (Vec<F>, Vec<F>) {
    let fill = |entries: &[Entry], length: usize| {
        let mut values = vec![F::zero(); length];
        let drawn: Vec<Vec<F>> =
            entries.par_iter().enumerate().map(|(index, entry)| draw(entry, index, seed)).collect();
        for (entry, drawn) in entries.iter().zip(drawn) {
            entry.set_from_torch(drawn.into_iter(), &mut values);
        }
        values
    };
    (fill(&layout.params, layout.param_buffer()), fill(&layout.stats, layout.stat_buffer()))
}

/// The values of one tensor in PyTorch's order.
fn draw<F: Real>(entry: &Entry, index: usize, seed: u64) -> Vec<F> {
    let image = u32::try_from(index).expect("a network has fewer than 2³² tensors");
    let mut stream = Stream::new(seed, 0, image, Purpose::Init);
    let length = entry.range.len();
    let mut normal = |fan_out: usize| -> Vec<F> {
        let deviation = (2.0 / fan_out as f64).sqrt();
        let mut next = || -> f64 { StandardNormal.sample(&mut stream) };
        (0..length).map(|_| F::of(deviation * next())).collect()
    };
    match entry.role {
        Role::Kernel(conv) => {
            let area = conv.kernel * conv.kernel;
            normal(if conv.kind == ConvKind::Depthwise { area } else { area * conv.outputs })
        }
        Role::SqueezeKernel => normal(entry.shape[0]),
        Role::ClassifierKernel => {
            let bound = 1.0 / (entry.shape[0] as f64).sqrt();
            (0..length).map(|_| F::of(stream.uniform_in(-bound, bound))).collect()
        }
        Role::Bias | Role::Beta | Role::RunningMean => vec![F::zero(); length],
        Role::Gamma | Role::RunningVar => vec![F::one(); length],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;
    use crate::nn::Network;

    #[test]
    fn deviations_follow_the_fan_out() {
        let network = Network::new(Architecture::find("s").unwrap().network(1000));
        let (params, stats) = initial_values::<f32>(network.layout(), 1);
        let deviation = |name: &str| {
            let entry = network.layout().params.iter().find(|e| e.name == name).unwrap();
            let values = &params[entry.range.clone()];
            (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
        };
        for (name, expected) in [
            ("blocks.2.1.conv_exp.weight", (2.0_f32 / (9.0 * 256.0)).sqrt()),
            ("blocks.5.3.conv_dw.weight", (2.0_f32 / 9.0).sqrt()),
            ("blocks.5.3.conv_pwl.weight", (2.0_f32 / 256.0).sqrt()),
            ("classifier.weight", 1.0 / 3000.0_f32.sqrt()),
        ] {
            let found = deviation(name);
            assert!((found / expected - 1.0).abs() < 0.03, "{name}: {found}, expected {expected}");
        }
        assert_eq!(stats.iter().filter(|&&s| s == 1.0).count(), stats.len() / 2);
        assert_ne!(params, initial_values::<f32>(network.layout(), 2).0);
    }
}
