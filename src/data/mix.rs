//! Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019), as google/automl combines them (`datasets.py`).
//!
//! A sample is mixed with its partner, the sample at the mirrored place of the batch:
//!
//! - mixup: x ← λ·x + (1−λ)·x', λ ~ Beta(α, α) per sample, then λ ← max(λ, 1−λ); labels likewise;
//! - CutMix: a box of x comes from x'; its centre is uniform, its sides are √(1−Beta(α, α)) of the image's, clipped at
//!   the border, per sample; the label weight is one for the whole group, the mean share of pixels kept.
//!
//! With both switched on the first half of the batch gets mixup and the second half CutMix, each mirrored in itself.
//!
//! Both are one formula, so that one kernel serves: inside the box take the partner, outside λ·x + (1−λ)·x'. Mixup has an
//! empty box, CutMix has λ = 1. A [`MixPlan`] is a pure function of seed, epoch, image indices and image size.

use super::draw::below;
use super::transform::SampleId;
use crate::random::Purpose;
use crate::{Error, Result};
use num_traits::Float;
use rand_distr::{Beta, Distribution};
use serde::{Deserialize, Serialize};

/// The parameters α of the two Beta distributions; 0 switches one off. The default is both off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MixConfig {
    /// α of mixup.
    pub mixup: f64,
    /// α of CutMix.
    pub cutmix: f64,
}

impl MixConfig {
    /// Whether both are numbers from 0 on.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field.
    pub fn validate(&self) -> Result<()> {
        for (name, alpha) in [("mixup", self.mixup), ("cutmix", self.cutmix)] {
            if !(alpha == 0.0 || (1e-3..=1e3).contains(&alpha)) {
                return Err(Error::usage(name, alpha, "expected 0 (off) or a number from 0.001 to 1000"));
            }
        }
        Ok(())
    }
}

/// The columns `left..right` and rows `top..bottom` that come from the partner; empty for mixup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PatchBox {
    /// First column.
    pub left: u32,
    /// First row.
    pub top: u32,
    /// Column after the last.
    pub right: u32,
    /// Row after the last.
    pub bottom: u32,
}

impl PatchBox {
    /// Pixels inside.
    pub const fn area(&self) -> u64 {
        (self.right - self.left) as u64 * (self.bottom - self.top) as u64
    }

    /// Whether column `x`, row `y` is inside.
    pub const fn contains(&self, x: u32, y: u32) -> bool {
        self.left <= x && x < self.right && self.top <= y && y < self.bottom
    }
}

/// How a batch of n samples is mixed. Four lists of n, ready to be uploaded.
#[derive(Clone, Debug, PartialEq)]
pub struct MixPlan {
    /// The sample in the batch that each is mixed with; itself where nothing is mixed.
    pub partner: Vec<u32>,
    /// λ, the weight of a sample's own pixels outside the box, ½ to 1.
    pub lambda: Vec<f32>,
    /// Where the pixels are the partner's.
    pub boxes: Vec<PatchBox>,
    /// The weight of a sample's own label; the partner's has the rest.
    pub label_weight: Vec<f32>,
}

impl MixPlan {
    /// Nothing is mixed.
    pub fn none(samples: usize) -> Self {
        Self {
            partner: (0..samples as u32).collect(),
            lambda: vec![1.0; samples],
            boxes: vec![PatchBox::default(); samples],
            label_weight: vec![1.0; samples],
        }
    }

    /// The plan for the images `indices` of one batch, `size` × `size` pixels each. Of a batch of odd length CutMix gets
    /// the larger half.
    ///
    /// # Errors
    /// [`Error::Usage`] if `config` is out of range.
    pub fn draw(config: MixConfig, seed: u64, epoch: u32, indices: &[u32], size: usize) -> Result<Self> {
        config.validate()?;
        let samples = indices.len();
        let mixup_samples = match (config.mixup > 0.0, config.cutmix > 0.0) {
            (false, false) => return Ok(Self::none(samples)),
            (true, false) => samples,
            (false, true) => 0,
            (true, true) => samples / 2,
        };
        let ids: Vec<SampleId> = indices.iter().map(|&image| SampleId { seed, epoch, image }).collect();
        let mut plan = Self::none(samples);
        plan.mixup(config.mixup, &ids, 0..mixup_samples)?;
        plan.cutmix(config.cutmix, &ids, mixup_samples..samples, size as u32)?;
        Ok(plan)
    }

    fn mixup(&mut self, alpha: f64, ids: &[SampleId], group: std::ops::Range<usize>) -> Result<()> {
        if group.is_empty() {
            return Ok(());
        }
        let beta = beta("mixup", alpha)?;
        for sample in group.clone() {
            let drawn = beta.sample(&mut ids[sample].stream(Purpose::Mixup)) as f32;
            self.partner[sample] = mirrored(sample, &group);
            self.lambda[sample] = drawn.max(1.0 - drawn);
            self.label_weight[sample] = self.lambda[sample];
        }
        Ok(())
    }

    fn cutmix(
        &mut self,
        alpha: f64,
        ids: &[SampleId],
        group: std::ops::Range<usize>,
        size: u32,
    ) -> Result<()> {
        if group.is_empty() {
            return Ok(());
        }
        let beta = beta("cutmix", alpha)?;
        for sample in group.clone() {
            let mut stream = ids[sample].stream(Purpose::CutMix);
            let (x, y) = (below(&mut stream, size), below(&mut stream, size));
            let side = (1.0 - beta.sample(&mut stream)).sqrt() * f64::from(size);
            self.partner[sample] = mirrored(sample, &group);
            self.boxes[sample] = square_around(x, y, side as u32, size);
        }
        let cut: u64 = self.boxes[group.clone()].iter().map(PatchBox::area).sum();
        let pixels = group.len() as u64 * u64::from(size) * u64::from(size);
        let kept = 1.0 - cut as f64 / pixels as f64;
        self.label_weight[group].fill(kept as f32);
        Ok(())
    }

    /// How many samples the plan is for.
    pub fn len(&self) -> usize {
        self.partner.len()
    }

    /// Whether it is for none.
    pub fn is_empty(&self) -> bool {
        self.partner.is_empty()
    }

    /// Whether every sample stays as it is, so that mixing can be left out.
    pub fn is_none(&self) -> bool {
        (0..self.len())
            .all(|i| self.lambda[i] == 1.0 && self.boxes[i].area() == 0 && self.label_weight[i] == 1.0)
    }

    /// Targets `[n, classes]` for the cross entropy: mixed one-hot labels y, smoothed to (1−ε)·y + ε/classes.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one label a sample or a label is not below `classes`; [`Error::Usage`] if
    /// `smoothing` ε is not in [0, 1).
    pub fn soft_targets(&self, labels: &[u32], classes: usize, smoothing: f32) -> Result<Vec<f32>> {
        let shape = |problem| Err(Error::Shape { operation: "soft targets", problem });
        if labels.len() != self.len() {
            return shape(format!("{} labels for a plan of {} samples", labels.len(), self.len()));
        }
        if let Some(label) = labels.iter().find(|&&label| label as usize >= classes) {
            return shape(format!("label {label} with {classes} classes"));
        }
        if !(0.0..1.0).contains(&smoothing) {
            let problem = "expected a number from 0 to below 1";
            return Err(Error::usage("label_smoothing", smoothing, problem));
        }
        let mut targets = vec![smoothing / classes as f32; self.len() * classes];
        for (sample, row) in targets.chunks_exact_mut(classes).enumerate() {
            let own = self.label_weight[sample];
            row[labels[sample] as usize] += (1.0 - smoothing) * own;
            row[labels[self.partner[sample] as usize] as usize] += (1.0 - smoothing) * (1.0 - own);
        }
        Ok(targets)
    }

    /// The mixed images, straight from the formula: the oracle of the backends. `images` is `[n, size, size, channels]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `images` does not have that many elements.
    pub fn apply<T: Float>(&self, images: &[T], size: usize, channels: usize) -> Result<Vec<T>> {
        let image = size * size * channels;
        if images.len() != self.len() * image {
            let problem =
                format!("{} elements for [{}, {size}, {size}, {channels}]", images.len(), self.len());
            return Err(Error::Shape { operation: "mix", problem });
        }
        let mixed = (0..images.len()).map(|at| {
            let (sample, inside) = (at / image, at % image);
            let (x, y) = (inside / channels % size, inside / channels / size);
            let other = images[self.partner[sample] as usize * image + inside];
            if self.boxes[sample].contains(x as u32, y as u32) {
                return other;
            }
            let lambda = f64::from(self.lambda[sample]);
            let weight = |value: f64| T::from(value).unwrap_or_else(T::nan);
            weight(lambda) * images[at] + weight(1.0 - lambda) * other
        });
        Ok(mixed.collect())
    }
}

fn beta(name: &str, alpha: f64) -> Result<Beta<f64>> {
    Beta::new(alpha, alpha).map_err(|error| Error::usage(name, alpha, error.to_string()))
}

/// The sample at the mirrored place of its group.
fn mirrored(sample: usize, group: &std::ops::Range<usize>) -> u32 {
    (group.end - 1 - (sample - group.start)) as u32
}

/// The square of `side` pixels centred on (x, y), clipped to the image.
fn square_around(x: u32, y: u32, side: u32, size: u32) -> PatchBox {
    let start = |center: u32| center.saturating_sub(side / 2);
    let end = |center: u32| (center + side - side / 2).min(size);
    PatchBox { left: start(x), top: start(y), right: end(x), bottom: end(y) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIXUP: MixConfig = MixConfig { mixup: 0.2, cutmix: 0.0 };
    const CUTMIX: MixConfig = MixConfig { mixup: 0.0, cutmix: 1.0 };
    const BOTH: MixConfig = MixConfig { mixup: 0.2, cutmix: 1.0 };

    fn draw(config: MixConfig, indices: &[u32], size: usize) -> MixPlan {
        MixPlan::draw(config, 1, 2, indices, size).unwrap()
    }

    /// Cross entropy of softmax(1, 2, 3) with class 1, ε = 0.1: 1.407606.
    #[test]
    fn smoothed_targets_give_the_published_loss() {
        let targets = MixPlan::none(1).soft_targets(&[1], 3, 0.1).unwrap();
        let normalizer = [1f32, 2.0, 3.0].iter().map(|z| z.exp()).sum::<f32>().ln();
        let loss: f32 = targets.iter().zip([1.0, 2.0, 3.0]).map(|(t, z)| t * (normalizer - z)).sum();
        assert!((loss - 1.407_606).abs() < 1e-6, "{loss}");
    }

    #[test]
    fn targets_mix_the_labels_of_partners() {
        let mut plan = MixPlan::none(3);
        plan.partner = vec![2, 1, 0];
        plan.label_weight = vec![0.75, 0.5, 1.0];
        let targets = plan.soft_targets(&[0, 1, 3], 4, 0.0).unwrap();
        assert_eq!(targets, [0.75, 0.0, 0.0, 0.25, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]);
        let smoothed = plan.soft_targets(&[0, 1, 3], 4, 0.5).unwrap();
        assert_eq!(smoothed[..4], [0.5, 0.125, 0.125, 0.25]);
    }

    #[test]
    fn impossible_targets_are_refused() {
        let plan = MixPlan::none(2);
        assert!(matches!(plan.soft_targets(&[0], 3, 0.1), Err(Error::Shape { .. })));
        assert!(matches!(plan.soft_targets(&[0, 3], 3, 0.1), Err(Error::Shape { .. })));
        assert!(matches!(plan.soft_targets(&[0, 1], 3, 1.0), Err(Error::Usage { .. })));
        assert!(matches!(plan.soft_targets(&[0, 1], 3, f32::NAN), Err(Error::Usage { .. })));
        assert!(matches!(plan.apply(&[0f32; 5], 1, 3), Err(Error::Shape { .. })));
        for alpha in [-0.1, f64::NAN, f64::INFINITY, 1e-9] {
            assert!(
                MixPlan::draw(MixConfig { mixup: alpha, cutmix: 0.0 }, 0, 0, &[1], 2).is_err(),
                "{alpha}"
            );
        }
    }

    #[test]
    fn partners_mirror_the_batch_or_its_halves() {
        let indices = [5, 9, 2, 7, 1];
        assert_eq!(draw(MIXUP, &indices, 8).partner, [4, 3, 2, 1, 0]);
        assert_eq!(draw(CUTMIX, &indices, 8).partner, [4, 3, 2, 1, 0]);
        assert_eq!(draw(BOTH, &indices, 8).partner, [1, 0, 4, 3, 2]);
        assert_eq!(draw(MixConfig::default(), &indices, 8), MixPlan::none(5));
    }

    #[test]
    fn the_halves_get_mixup_and_cutmix() {
        let plan = draw(BOTH, &[5, 9, 2, 7], 16);
        assert!(plan.boxes[..2].iter().all(|b| b.area() == 0) && plan.lambda[..2].iter().all(|&l| l < 1.0));
        assert!(plan.boxes[2..].iter().any(|b| b.area() > 0) && plan.lambda[2..] == [1.0, 1.0]);
        assert_eq!(plan.label_weight[..2], plan.lambda[..2]);
        let cut = plan.boxes[2..].iter().map(PatchBox::area).sum::<u64>();
        assert_eq!(plan.label_weight[2..], [1.0 - cut as f32 / 512.0; 2]);
        assert!(!plan.is_none() && MixPlan::none(4).is_none());
    }

    /// A sample's own draws depend on its index, the epoch and the seed, not on its place in the batch.
    #[test]
    fn draws_belong_to_the_image() {
        let plan = draw(MIXUP, &[5, 9], 8);
        assert_eq!(draw(MIXUP, &[9, 3, 5], 8).lambda[2], plan.lambda[0]);
        for (seed, epoch) in [(2, 2), (1, 3)] {
            assert_ne!(MixPlan::draw(MIXUP, seed, epoch, &[5, 9], 8).unwrap().lambda, plan.lambda);
        }
        assert_eq!(draw(CUTMIX, &[9, 3, 5], 64).boxes[2], draw(CUTMIX, &[5, 9], 64).boxes[0]);
    }

    /// Beta(1, 1) is uniform: max(λ, 1−λ) has mean ¾, and an unclipped CutMix box would cut half on average.
    #[test]
    fn draws_have_the_right_mean() {
        let indices: Vec<u32> = (0..4000).collect();
        let uniform = MixConfig { mixup: 1.0, cutmix: 0.0 };
        let mean = draw(uniform, &indices, 8).lambda.iter().sum::<f32>() / 4000.0;
        assert!((mean - 0.75).abs() < 0.01, "mixup {mean}");
        // E[clipped area] for side s = √u of the image and a uniform centre: (s − s²/4)² integrated over u is
        // 1/2 − 1/5 + 1/48 = 0.3208.
        let kept = draw(CUTMIX, &indices, 256).label_weight[0];
        assert!((1.0 - kept - 0.3208).abs() < 0.012, "CutMix {kept}");
    }

    #[test]
    fn boxes_are_clipped_at_the_border() {
        let square = |x, y, side| {
            let PatchBox { left, top, right, bottom } = square_around(x, y, side, 10);
            [left, top, right, bottom]
        };
        assert_eq!(square(5, 5, 4), [3, 3, 7, 7]);
        assert_eq!(square(5, 4, 3), [4, 3, 6 + 1, 5 + 1]);
        assert_eq!(square(0, 9, 6), [0, 6, 3, 10]);
        assert_eq!(square(5, 5, 0), [5, 5, 5, 5]);
        assert_eq!(square(0, 0, 10), [0, 0, 5, 5]);
    }

    #[test]
    fn pixels_follow_the_formula() {
        // Two images of 2×2 with 2 channels. Image 0 by mixup with λ = ¾; image 1 has a box over its right column.
        let images: Vec<f64> = (0..16).map(f64::from).collect();
        let plan = MixPlan {
            partner: vec![1, 0],
            lambda: vec![0.75, 1.0],
            boxes: vec![PatchBox::default(), PatchBox { left: 1, top: 0, right: 2, bottom: 2 }],
            label_weight: vec![0.75, 0.5],
        };
        let mixed = plan.apply(&images, 2, 2).unwrap();
        // 0.75·i + 0.25·(i + 8) = i + 2.
        assert_eq!(mixed[..8], [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert_eq!(mixed[8..], [8.0, 9.0, 2.0, 3.0, 12.0, 13.0, 6.0, 7.0]);
        let single: Vec<f32> = images.iter().map(|&v| v as f32).collect();
        assert_eq!(plan.apply(&single, 2, 2).unwrap()[0], 2.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn plans_are_in_range(
            mixup in prop_oneof![Just(0.0), 0.01f64..2.0], cutmix in prop_oneof![Just(0.0), 0.01f64..2.0],
            samples in 0usize..9, size in 1usize..40, seed: u64
        ) {
            let indices: Vec<u32> = (0..samples as u32).map(|i| i * 31).collect();
            let plan = MixPlan::draw(MixConfig { mixup, cutmix }, seed, 0, &indices, size).unwrap();
            prop_assert_eq!(plan.len(), samples);
            for sample in 0..samples {
                let PatchBox { left, top, right, bottom } = plan.boxes[sample];
                prop_assert!(left <= right && right <= size as u32 && top <= bottom && bottom <= size as u32);
                prop_assert!((0.5..=1.0).contains(&plan.lambda[sample]), "λ {}", plan.lambda[sample]);
                prop_assert!((0.0..=1.0).contains(&plan.label_weight[sample]));
                // A partner's partner is the sample.
                prop_assert_eq!(plan.partner[plan.partner[sample] as usize] as usize, sample);
            }
        }

        #[test]
        fn targets_are_distributions(samples in 1usize..9, classes in 1u32..9, smoothing in 0f32..0.99, seed: u64) {
            let indices: Vec<u32> = (0..samples as u32).collect();
            let labels: Vec<u32> = indices.iter().map(|i| i % classes).collect();
            let plan = MixPlan::draw(BOTH, seed, 0, &indices, 16).unwrap();
            for row in plan.soft_targets(&labels, classes as usize, smoothing).unwrap().chunks_exact(classes as usize) {
                prop_assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5 && row.iter().all(|&t| t >= 0.0), "{row:?}");
            }
        }
    }
}
