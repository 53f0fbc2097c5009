//! RandAugment (Cubuk et al., 2019) as EfficientNetV2 is trained with: `layers` operations one after another, each
//! drawn uniformly and always applied, all at one strength. The operations are in [`pixel_ops`].
//!
//! Arguments follow google/automl (`autoaugment.py`), where the strength is a float of scale 10. Where that code does
//! something its authors cannot have meant, this one does what was meant:
//!
//! - *Solarize* there casts the threshold to 8 bits, so that 256 wraps to 0 and inverts the whole image exactly at
//!   magnitude 10. Here a threshold of 256 or more leaves the image alone.
//! - *Contrast* there blends towards the number of pixels divided by 256. Here it blends towards the mean.
//! - *Posterize* there keeps 0 bits below magnitude 2.5, which is a black image. Here it keeps at least one.
//! - *Translate* and *Cutout* are there in pixels whatever the image size, so that progressive learning, which starts
//!   with small images to start gently, would start with the strongest. Here pixels are meant at
//!   [`RandAugment::reference_side`] and scale with the image; without one they are absolute, as there.

use super::draw::below;
use super::pixel_ops;
use crate::random::Stream;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// One of the sixteen operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// Each channel stretched to the full range.
    AutoContrast,
    /// Each channel's histogram flattened.
    Equalize,
    /// 255 − v.
    Invert,
    /// By ± 3 · magnitude degrees.
    Rotate,
    /// To ⌊0.4 · magnitude⌋ bits, at least 1: stronger for smaller magnitudes.
    Posterize,
    /// Values from ⌊25.6 · magnitude⌋ on inverted: stronger for smaller magnitudes.
    Solarize,
    /// ⌊11 · magnitude⌋ added to values below 128.
    SolarizeAdd,
    /// Saturation, by 0.18 · magnitude + 0.1.
    Color,
    /// Contrast, by 0.18 · magnitude + 0.1.
    Contrast,
    /// Brightness, by 0.18 · magnitude + 0.1.
    Brightness,
    /// Sharpness, by 0.18 · magnitude + 0.1.
    Sharpness,
    /// By ± 0.03 · magnitude, horizontally.
    ShearX,
    /// By ± 0.03 · magnitude, vertically.
    ShearY,
    /// By ± 10 · magnitude pixels, horizontally.
    TranslateX,
    /// By ± 10 · magnitude pixels, vertically.
    TranslateY,
    /// A grey square of 2 · ⌊4 · magnitude⌋ pixels a side at a random place.
    Cutout,
}

impl Operation {
    /// All sixteen.
    pub const ALL: [Self; 16] = [
        Self::AutoContrast,
        Self::Equalize,
        Self::Invert,
        Self::Rotate,
        Self::Posterize,
        Self::Solarize,
        Self::SolarizeAdd,
        Self::Color,
        Self::Contrast,
        Self::Brightness,
        Self::Sharpness,
        Self::ShearX,
        Self::ShearY,
        Self::TranslateX,
        Self::TranslateY,
        Self::Cutout,
    ];

    /// Those that leave a written character what it is: no inversion of ink and paper, nothing for colour.
    pub const FOR_CHARACTERS: [Self; 8] = [
        Self::Rotate,
        Self::Contrast,
        Self::Brightness,
        Self::Sharpness,
        Self::ShearX,
        Self::ShearY,
        Self::TranslateX,
        Self::TranslateY,
    ];
}

/// The configuration. The default is 2 layers of all operations at magnitude 10, V2-S's last stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandAugment {
    /// How many operations are applied, one after another.
    pub layers: usize,
    /// Their strength, scale 10; it may exceed 10.
    pub magnitude: f32,
    /// The operations to draw from.
    pub operations: Vec<Operation>,
    /// The image side in pixels at which *Translate* and *Cutout* have their stated size; 0 for every side.
    pub reference_side: u32,
}

impl Default for RandAugment {
    fn default() -> Self {
        // 300: the largest side V2-S is trained at, where google/automl's pixel constants were settled.
        Self { layers: 2, magnitude: 10.0, operations: Operation::ALL.to_vec(), reference_side: 300 }
    }
}

/// What is random about one layer. All of it is always drawn, so that a changed magnitude changes nothing else.
struct Draw {
    operation: Operation,
    sign: f32,
    place: (usize, usize),
}

impl RandAugment {
    /// Augments a square of `side` × `side` × 3 bytes in place.
    ///
    /// # Panics
    /// If there are no operations ([`validate`](Self::validate) tells).
    pub fn apply(&self, pixels: &mut [u8], side: usize, stream: &mut Stream) {
        for _ in 0..self.layers {
            let operation = self.operations[below(stream, self.operations.len() as u32) as usize];
            let sign = if stream.bits() & 1 == 0 { 1.0 } else { -1.0 };
            let place = [(); 2].map(|()| below(stream, side as u32) as usize);
            self.apply_one(pixels, side, &Draw { operation, sign, place: place.into() });
        }
    }

    fn apply_one(&self, pixels: &mut [u8], side: usize, draw: &Draw) {
        let level = self.magnitude;
        let factor = 0.18 * level + 0.1;
        let scale = match self.reference_side {
            0 => 1.0,
            reference => side as f32 / reference as f32,
        };
        match draw.operation {
            Operation::AutoContrast => pixel_ops::auto_contrast(pixels),
            Operation::Equalize => pixel_ops::equalize(pixels),
            Operation::Invert => pixel_ops::invert(pixels),
            Operation::Rotate => pixel_ops::rotate(pixels, side, draw.sign * 3.0 * level),
            Operation::Posterize => pixel_ops::posterize(pixels, (0.4 * level) as u32),
            Operation::Solarize => pixel_ops::solarize(pixels, (25.6 * level) as u32),
            Operation::SolarizeAdd => pixel_ops::solarize_add(pixels, (11.0 * level) as u8),
            Operation::Color => pixel_ops::color(pixels, factor),
            Operation::Contrast => pixel_ops::contrast(pixels, factor),
            Operation::Brightness => pixel_ops::brightness(pixels, factor),
            Operation::Sharpness => pixel_ops::sharpness(pixels, side, factor),
            Operation::ShearX => pixel_ops::shear_x(pixels, side, draw.sign * 0.03 * level),
            Operation::ShearY => pixel_ops::shear_y(pixels, side, draw.sign * 0.03 * level),
            Operation::TranslateX => pixel_ops::translate_x(pixels, side, draw.sign * 10.0 * level * scale),
            Operation::TranslateY => pixel_ops::translate_y(pixels, side, draw.sign * 10.0 * level * scale),
            Operation::Cutout => pixel_ops::cutout(pixels, side, draw.place, (4.0 * level * scale) as usize),
        }
    }

    /// Whether there is something to draw from and the strength is a number from 0 to 30.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field.
    pub fn validate(&self) -> Result<()> {
        if self.operations.is_empty() {
            return Err(Error::usage("randaugment.operations", "[]", "name at least one operation"));
        }
        if !(0.0..=30.0).contains(&self.magnitude) {
            return Err(Error::usage(
                "randaugment.magnitude",
                self.magnitude,
                "expected a number from 0 to 30",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Purpose;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn only(operation: Operation, magnitude: f32) -> RandAugment {
        RandAugment { layers: 1, magnitude, operations: vec![operation], reference_side: 0 }
    }

    fn augment(config: &RandAugment, grey: &[u8], side: usize, epoch: u32) -> Vec<u8> {
        let mut pixels: Vec<u8> = grey.iter().flat_map(|&value| [value; 3]).collect();
        config.apply(&mut pixels, side, &mut Stream::new(0, epoch, 0, Purpose::RandAugment));
        pixels.chunks_exact(3).map(|rgb| rgb[0]).collect()
    }

    /// The arguments of google/automl at some levels, seen through what they do to values.
    #[test]
    fn levels_become_the_published_arguments() {
        let values = [0, 100, 200, 255];
        let cases = [
            (Operation::Posterize, 5.0, [0, 64, 192, 192]),  // 2 bits
            (Operation::Posterize, 10.0, [0, 96, 192, 240]), // 4 bits
            (Operation::Posterize, 20.0, values),            // 8 bits
            (Operation::Posterize, 1.0, [0, 0, 128, 128]),   // 0 bits there, 1 here
            (Operation::Solarize, 5.0, [0, 100, 55, 0]),     // from 128
            (Operation::Solarize, 10.0, values),             // from 256: nothing
            (Operation::Solarize, 15.0, values),             // from 384: nothing, not 128
            (Operation::SolarizeAdd, 5.0, [55, 155, 200, 255]),
            (Operation::SolarizeAdd, 15.0, [165, 255, 200, 255]),
            (Operation::Brightness, 5.0, values),              // factor 1
            (Operation::Brightness, 10.0, [0, 190, 255, 255]), // factor 1.9
            (Operation::Invert, 3.0, [255, 155, 55, 0]),
        ];
        for (operation, magnitude, expected) in cases {
            let result = augment(&only(operation, magnitude), &values, 2, 0);
            assert_eq!(result, expected, "{operation:?} at {magnitude}");
        }
    }

    /// Signed operations go either way, about equally often, and by the published distance.
    #[test]
    fn signs_are_random() {
        let square: Vec<u8> = (0..225).collect();
        for (operation, magnitude) in [
            (Operation::TranslateX, 0.5),
            (Operation::TranslateY, 0.5),
            (Operation::ShearX, 10.0),
            (Operation::Rotate, 10.0),
        ] {
            let config = only(operation, magnitude);
            let results: Vec<Vec<u8>> = (0..100).map(|epoch| augment(&config, &square, 15, epoch)).collect();
            let different: HashSet<&Vec<u8>> = results.iter().collect();
            assert_eq!(different.len(), 2, "{operation:?}");
            let first = results.iter().filter(|&result| *result == results[0]).count();
            assert!((30..=70).contains(&first), "{operation:?}: {first} of 100");
        }
        // 10 · 0.5 = 5 pixels to the left or right.
        let moved = augment(&only(Operation::TranslateX, 0.5), &square, 15, 0);
        assert!(
            moved[..15] == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14].as_slice(), &[128; 5]].concat()
                || moved[..15] == [[128; 5].as_slice(), &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]].concat()
        );
    }

    #[test]
    fn pixel_distances_scale_with_the_image() {
        let image = vec![0; 30 * 30];
        let filled = |reference_side| {
            let config = RandAugment { reference_side, ..only(Operation::TranslateX, 10.0) };
            augment(&config, &image, 30, 0).iter().filter(|&&value| value == 128).count()
        };
        // 100 of 300 pixels are 10 of 30; absolute, everything is gone.
        assert_eq!((filled(300), filled(0)), (300, 900));
    }

    #[test]
    fn every_operation_is_drawn_about_equally_often() {
        // Each turns 100 into something else.
        let outcomes = [
            (Operation::Invert, 155),
            (Operation::Posterize, 96),
            (Operation::SolarizeAdd, 210),
            (Operation::Brightness, 190),
            (Operation::Solarize, 100),
        ];
        let operations = outcomes.map(|(operation, _)| operation).to_vec();
        let config = RandAugment { layers: 1, magnitude: 10.0, operations, reference_side: 0 };
        let results: Vec<u8> = (0..1000).map(|epoch| augment(&config, &[100], 1, epoch)[0]).collect();
        for (operation, outcome) in outcomes {
            let count = results.iter().filter(|&&result| result == outcome).count();
            // 200 expected, standard deviation 13.
            assert!((140..=260).contains(&count), "{operation:?}: {count} of 1000");
        }
    }

    #[test]
    fn layers_are_applied_one_after_another() {
        let twice = RandAugment { layers: 2, ..only(Operation::Invert, 1.0) };
        assert_eq!(augment(&twice, &[1, 2, 3, 4], 2, 0), [1, 2, 3, 4]);
        let none = RandAugment { layers: 0, ..twice };
        assert_eq!(augment(&none, &[1, 2, 3, 4], 2, 0), [1, 2, 3, 4]);
    }

    #[test]
    fn impossible_configurations_are_refused() {
        let empty = RandAugment { operations: Vec::new(), ..RandAugment::default() };
        assert!(empty.validate().unwrap_err().to_string().starts_with("randaugment.operations"));
        for magnitude in [-1.0, f32::NAN, f32::INFINITY] {
            let config = RandAugment { magnitude, ..RandAugment::default() };
            assert!(config.validate().unwrap_err().to_string().starts_with("randaugment.magnitude"));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// No operation fails at any strength or size, and the same stream gives the same image.
        #[test]
        fn any_size_and_strength_works(
            side in 1usize..20, magnitude in 0.0f32..30.0, layers in 0usize..4, epoch: u32, reference_side in 0u32..400
        ) {
            let config = RandAugment { layers, magnitude, reference_side, ..RandAugment::default() };
            let grey: Vec<u8> = (0..side * side).map(|i| (i * 7 % 256) as u8).collect();
            prop_assert_eq!(augment(&config, &grey, side, epoch), augment(&config, &grey, side, epoch));
        }

        #[test]
        fn every_operation_works_on_a_single_pixel(index in 0usize..16, magnitude in 0.0f32..30.0) {
            let result = augment(&only(Operation::ALL[index], magnitude), &[77], 1, 0);
            prop_assert_eq!(result.len(), 1);
        }
    }
}
