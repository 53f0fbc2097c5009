//! The input: 8-bit RGB to normalised values, and mixing.

use crate::Result;
use crate::backend::Normalisation;
use crate::data::MixPlan;
use crate::tensor::{Real, Shape, Tensor};

/// Images \[n, side, side, 3\], n being that of `mix`, normalised and then mixed.
///
/// # Errors
/// When there are not that many values.
pub fn forward<F: Real>(
    images: &[u8],
    side: usize,
    normalisation: &Normalisation,
    mix: &MixPlan,
) -> Result<Tensor<F>> {
    let table: Vec<[F; 256]> = (0..3)
        .map(|c| {
            let normalised =
                |v: usize| (v as f64 / 255.0 - normalisation.mean[c]) / normalisation.deviation[c];
            std::array::from_fn(|value| F::of(normalised(value)))
        })
        .collect();
    let values = images.iter().enumerate().map(|(i, &value)| table[i % 3][usize::from(value)]).collect();
    let plain = Tensor::from_vec(Shape::new(mix.len(), side, side, 3), values)?;
    if mix.is_none() {
        return Ok(plain);
    }
    Tensor::from_vec(plain.shape(), mix.apply(plain.data(), side, 3)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn black_and_white_reach_the_ends() {
        let half = forward::<f64>(&[0, 255, 51], 1, &Normalisation::HALF, &MixPlan::none(1)).unwrap();
        assert_eq!(half.data(), [-1.0, 1.0, -0.6]);
        let imagenet = forward::<f64>(&[255; 3], 1, &Normalisation::IMAGENET, &MixPlan::none(1)).unwrap();
        assert_eq!(imagenet.data(), [0.515 / 0.229, 0.544 / 0.224, (1.0 - 0.406) / 0.225]);
        assert!(forward::<f64>(&[0; 3], 2, &Normalisation::HALF, &MixPlan::none(1)).is_err());
    }
}
