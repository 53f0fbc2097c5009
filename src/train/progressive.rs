//! Progressive learning with adaptive regularisation (Tan & Le, 2021, section 4): a run is cut into stages of equal
//! length; early stages train on small images with weak regularisation, later ones on larger images with stronger.
//!
//! The paper's Algorithm 1 and the code its weights were trained with disagree on the interpolation, so both are here:
//! see [`Interpolation`].

use crate::data::loader::LARGEST_SIDE;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The smallest image that survives the five halvings of the network.
const SMALLEST_IMAGE: usize = 32;

/// Checks the side of square images, in pixels, that the flag or key `name` asks for.
///
/// # Errors
/// [`Error::Usage`] when it is below 32 or above [`LARGEST_SIDE`].
pub fn check_side(name: &str, side: usize) -> Result<()> {
    if side < SMALLEST_IMAGE {
        let problem = format!("must be at least {SMALLEST_IMAGE}: the network halves it five times");
        return Err(Error::usage(name, side, problem));
    }
    if side > LARGEST_SIDE {
        return Err(Error::usage(name, side, format!("must be at most {LARGEST_SIDE}")));
    }
    Ok(())
}

/// How the values of stage s of M, counted from 0, lie between the first and the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Interpolation {
    /// Algorithm 1 of the paper: everything at s/(M−1), image sizes rounded. The first stage trains the smallest size.
    Paper,
    /// google/automl: image sizes at (s+1)/M, rounded down, so that the smallest size itself is never trained;
    /// regularisation at s/(M−1) as in the paper.
    Automl,
}

/// How strongly a stage regularises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Regularisation {
    /// Probability of dropping a feature before the classifier.
    pub dropout: f64,
    /// Magnitude of RandAugment; its operations are tuned for 0 to 10 and extrapolate beyond.
    pub randaugment: f64,
    /// α of mixup's Beta(α, α); 0 is off.
    pub mixup_alpha: f64,
    /// α of CutMix's Beta(α, α); 0 is off.
    pub cutmix_alpha: f64,
}

/// A part of the run with one image size.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Its number, from 0.
    pub index: usize,
    /// Height and width of the training images, in pixels.
    pub image_size: usize,
    /// What its images and its network are subjected to.
    pub regularisation: Regularisation,
    /// The steps or epochs it lasts, in the unit that [`Progressive::stages`] was asked in.
    pub range: Range<u64>,
}

/// A progression: pairs are [first, last].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progressive {
    /// Number of stages, at least 1. A single stage trains the last values throughout.
    pub stages: usize,
    /// How values lie between first and last.
    pub interpolation: Interpolation,
    /// Image sizes in pixels, at least 32, not shrinking.
    pub image_size: [usize; 2],
    /// Round the sizes between the first and the last to the nearest multiple of this; `None` takes them as they come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multiple_of: Option<usize>,
    /// Dropout before the classifier, in [0, 1).
    pub dropout: [f64; 2],
    /// Magnitude of RandAugment.
    pub randaugment: [f64; 2],
    /// α of mixup.
    pub mixup_alpha: [f64; 2],
    /// α of CutMix.
    pub cutmix_alpha: [f64; 2],
}

impl Progressive {
    /// Checks the values.
    ///
    /// # Errors
    /// [`Error::Usage`] for no stages, sizes below 32 or shrinking, a multiple of 0, a dropout outside [0, 1), or
    /// another strength that is negative or not finite.
    pub fn validate(&self) -> Result<()> {
        if self.stages == 0 {
            return Err(usage(
                "stages",
                self.stages,
                "must be at least 1; 1 trains one image size throughout",
            ));
        }
        let [smallest, largest] = self.image_size;
        check_side("progressive.image_size", smallest)?;
        if largest < smallest {
            return Err(usage(
                "image_size",
                smallest,
                format!("the first size must not be above that of the last stage, {largest}"),
            ));
        }
        check_side("progressive.image_size", largest)?;
        if self.multiple_of == Some(0) {
            return Err(usage("multiple_of", 0, "must be at least 1; leave it out to round to nothing"));
        }
        for value in self.dropout {
            if !(0.0..1.0).contains(&value) {
                return Err(usage("dropout", value, "must lie in [0, 1)"));
            }
        }
        let strengths = [
            ("randaugment", self.randaugment),
            ("mixup_alpha", self.mixup_alpha),
            ("cutmix_alpha", self.cutmix_alpha),
        ];
        for (name, values) in strengths {
            for value in values {
                if !(value.is_finite() && value >= 0.0) {
                    return Err(usage(name, value, "must be a number of at least 0"));
                }
            }
        }
        Ok(())
    }

    /// The stages of a run of `total` steps, or `total` epochs: the unit is the caller's. Stage s of M ends at
    /// ⌊(s + 1)·total / M⌋, so that the stages cover the run without gap or overlap and none is empty.
    ///
    /// # Errors
    /// As [`Self::validate`], and [`Error::Usage`] when there are more stages than `total`.
    pub fn stages(&self, total: u64) -> Result<Vec<Stage>> {
        self.validate()?;
        if self.stages as u64 > total {
            let problem =
                format!("more stages than the {total} epochs of the run; take fewer stages or train longer");
            return Err(usage("stages", self.stages, problem));
        }
        let boundary = |stage: usize| (stage as u128 * u128::from(total) / self.stages as u128) as u64;
        let stage = |index: usize| Stage {
            index,
            image_size: self.size(index),
            regularisation: Regularisation {
                dropout: self.blend(self.dropout, index),
                randaugment: self.blend(self.randaugment, index),
                mixup_alpha: self.blend(self.mixup_alpha, index),
                cutmix_alpha: self.blend(self.cutmix_alpha, index),
            },
            range: boundary(index)..boundary(index + 1),
        };
        Ok((0..self.stages).map(stage).collect())
    }

    /// The image size of stage `index`. Integer arithmetic, so that no rounding error can shift a pixel.
    fn size(&self, index: usize) -> usize {
        let [first, last] = self.image_size;
        let rise = last - first;
        let size = match self.interpolation {
            _ if self.stages == 1 => last,
            Interpolation::Paper => first + nearest(rise * index, self.stages - 1),
            Interpolation::Automl => first + rise * (index + 1) / self.stages,
        };
        match self.multiple_of {
            Some(multiple) if size != first && size != last => {
                (multiple * nearest(size, multiple)).clamp(first, last)
            }
            _ => size,
        }
    }

    /// The strength of stage `index`, at index/(M−1) from the first to the last.
    fn blend(&self, [first, last]: [f64; 2], index: usize) -> f64 {
        if index + 1 == self.stages {
            return last;
        }
        first + (last - first) * index as f64 / (self.stages - 1) as f64
    }
}

/// The stage in which step (or epoch) `position` lies; `None` beyond the last.
pub fn stage_at(stages: &[Stage], position: u64) -> Option<&Stage> {
    stages.iter().find(|stage| stage.range.contains(&position))
}

/// a / b to the nearest integer, halves up.
fn nearest(a: usize, b: usize) -> usize {
    (2 * a + b) / (2 * b)
}

fn usage(key: &str, value: impl ToString, problem: impl Into<String>) -> Error {
    Error::usage(format!("progressive.{key}"), value, problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn progression(interpolation: Interpolation, image_size: [usize; 2]) -> Progressive {
        Progressive {
            stages: 4,
            interpolation,
            image_size,
            multiple_of: None,
            dropout: [0.0; 2],
            randaugment: [0.0; 2],
            mixup_alpha: [0.0; 2],
            cutmix_alpha: [0.0; 2],
        }
    }

    fn sizes(progressive: &Progressive) -> Vec<usize> {
        progressive.stages(350).unwrap().iter().map(|stage| stage.image_size).collect()
    }

    /// `places` is how many decimals the table prints.
    fn assert_row(
        progressive: &Progressive,
        of: fn(&Regularisation) -> f64,
        expected: [f64; 4],
        places: i32,
    ) {
        let row: Vec<f64> = progressive.stages(350).unwrap().iter().map(|s| of(&s.regularisation)).collect();
        let unit = 10_f64.powi(-places);
        assert_eq!(row.len(), 4);
        assert!(
            row.iter().zip(expected).all(|(r, e)| (r - e).abs() < 0.51 * unit),
            "{row:?}, not {expected:?}"
        );
    }

    /// Table 6 of the paper gives the ends; Algorithm 1 fills in the stages.
    #[test]
    fn the_papers_table() {
        let small = Progressive {
            dropout: [0.1, 0.3],
            randaugment: [5.0, 15.0],
            ..progression(Interpolation::Paper, [128, 300])
        };
        assert_eq!(sizes(&small), [128, 185, 243, 300]);
        assert_row(&small, |r| r.randaugment, [5.0, 8.33, 11.67, 15.0], 2);
        assert_row(&small, |r| r.mixup_alpha, [0.0; 4], 3);
        assert_row(&small, |r| r.dropout, [0.1, 0.167, 0.233, 0.3], 3);

        let medium = Progressive {
            dropout: [0.1, 0.4],
            randaugment: [5.0, 20.0],
            mixup_alpha: [0.0, 0.2],
            ..progression(Interpolation::Paper, [128, 380])
        };
        assert_eq!(sizes(&medium), [128, 212, 296, 380]);
        assert_row(&medium, |r| r.randaugment, [5.0, 10.0, 15.0, 20.0], 2);
        assert_row(&medium, |r| r.mixup_alpha, [0.0, 0.067, 0.133, 0.2], 3);
        assert_row(&medium, |r| r.dropout, [0.1, 0.2, 0.3, 0.4], 3);

        let large = Progressive {
            dropout: [0.1, 0.5],
            randaugment: [5.0, 25.0],
            mixup_alpha: [0.0, 0.4],
            ..progression(Interpolation::Paper, [128, 380])
        };
        assert_eq!(sizes(&large), [128, 212, 296, 380]);
        assert_row(&large, |r| r.randaugment, [5.0, 11.67, 18.33, 25.0], 2);
        assert_row(&large, |r| r.mixup_alpha, [0.0, 0.133, 0.267, 0.4], 3);
        assert_row(&large, |r| r.dropout, [0.1, 0.233, 0.367, 0.5], 3);
    }

    /// What the released code trains: mixup and CutMix together, dropout constant.
    #[test]
    fn the_table_of_the_released_code() {
        let automl = |train_size| progression(Interpolation::Automl, [128, train_size]);
        assert_eq!(sizes(&automl(300)), [171, 214, 257, 300]); // S
        assert_eq!(sizes(&automl(384)), [192, 256, 320, 384]); // M, L, XL
        assert_eq!(sizes(&automl(192)), [144, 160, 176, 192]); // B0, B1
        assert_eq!(sizes(&automl(208)), [148, 168, 188, 208]); // B2
        assert_eq!(sizes(&automl(240)), [156, 184, 212, 240]); // B3
        assert_eq!(sizes(&automl(297)), [170, 212, 254, 297]); // 254.75 is rounded down

        let small = Progressive { randaugment: [5.0, 10.0], dropout: [0.2; 2], ..automl(300) };
        assert_row(&small, |r| r.randaugment, [5.0, 6.67, 8.33, 10.0], 2);
        assert_row(&small, |r| r.mixup_alpha, [0.0; 4], 3);
        assert_row(&small, |r| r.dropout, [0.2; 4], 3);
        let medium = Progressive {
            randaugment: [5.0, 15.0],
            mixup_alpha: [0.0, 0.2],
            cutmix_alpha: [0.0, 0.2],
            ..automl(384)
        };
        assert_row(&medium, |r| r.randaugment, [5.0, 8.33, 11.67, 15.0], 2);
        assert_row(&medium, |r| r.mixup_alpha, [0.0, 0.067, 0.133, 0.2], 3);
        assert_row(&medium, |r| r.cutmix_alpha, [0.0, 0.067, 0.133, 0.2], 3);
        let large = Progressive {
            randaugment: [5.0, 20.0],
            mixup_alpha: [0.0, 0.5],
            cutmix_alpha: [0.0, 0.5],
            ..automl(384)
        };
        assert_row(&large, |r| r.randaugment, [5.0, 10.0, 15.0, 20.0], 2);
        assert_row(&large, |r| r.cutmix_alpha, [0.0, 0.167, 0.333, 0.5], 3);
    }

    #[test]
    fn stages_end_where_the_released_code_ends_them() {
        let ends = |total| -> Vec<u64> {
            let stages = progression(Interpolation::Automl, [128, 300]).stages(total).unwrap();
            stages.iter().map(|stage| stage.range.end).collect()
        };
        assert_eq!(ends(107_336), [26_834, 53_668, 80_502, 107_336]);
        assert_eq!(ends(350), [87, 175, 262, 350]);
    }

    #[test]
    fn a_single_stage_trains_the_last_values() {
        for interpolation in [Interpolation::Paper, Interpolation::Automl] {
            let one =
                Progressive { stages: 1, randaugment: [5.0, 15.0], ..progression(interpolation, [128, 300]) };
            let stages = one.stages(7).unwrap();
            assert_eq!((stages.len(), stages[0].image_size, stages[0].range.clone()), (1, 300, 0..7));
            assert_eq!(stages[0].regularisation.randaugment, 15.0);
        }
    }

    #[test]
    fn sizes_between_the_ends_round_to_a_multiple() {
        let rounded = |multiple, image_size| {
            sizes(&Progressive {
                multiple_of: Some(multiple),
                ..progression(Interpolation::Automl, image_size)
            })
        };
        assert_eq!(rounded(32, [128, 300]), [160, 224, 256, 300]);
        assert_eq!(rounded(8, [128, 300]), [168, 216, 256, 300]);
        assert_eq!(rounded(1, [128, 300]), [171, 214, 257, 300]);
        assert_eq!(rounded(31, [32, 32]), [32; 4]);
        assert_eq!(rounded(100, [32, 64]), [32, 32, 64, 64], "never beyond the ends");
    }

    #[test]
    fn a_position_finds_its_stage() {
        let stages = progression(Interpolation::Automl, [128, 300]).stages(10).unwrap();
        let found: Vec<usize> =
            (0..10).filter_map(|p| stage_at(&stages, p)).map(|stage| stage.index).collect();
        assert_eq!(found, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]);
        assert_eq!(stage_at(&stages, 10), None);
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let good = progression(Interpolation::Paper, [128, 300]);
        let cases = [
            (Progressive { stages: 0, ..good }, "progressive.stages = 0"),
            (Progressive { stages: 11, ..good }, "progressive.stages = 11"),
            (Progressive { image_size: [31, 300], ..good }, "progressive.image_size = 31"),
            (Progressive { image_size: [128, 127], ..good }, "progressive.image_size = 128"),
            (Progressive { multiple_of: Some(0), ..good }, "progressive.multiple_of = 0"),
            (Progressive { dropout: [0.1, 1.0], ..good }, "progressive.dropout = 1"),
            (Progressive { randaugment: [-1.0, 1.0], ..good }, "progressive.randaugment = -1"),
            (Progressive { mixup_alpha: [0.0, f64::NAN], ..good }, "progressive.mixup_alpha = NaN"),
            (Progressive { cutmix_alpha: [f64::INFINITY, 1.0], ..good }, "progressive.cutmix_alpha = inf"),
        ];
        for (progressive, start) in cases {
            let message = progressive.stages(10).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
        }
    }

    proptest! {
        #[test]
        fn stages_partition_the_run(
            stages in 1_usize..40,
            beyond in 0_u64..100_000,
            first in 32_usize..300,
            rise in 0_usize..300,
            paper: bool,
        ) {
            let interpolation = if paper { Interpolation::Paper } else { Interpolation::Automl };
            let total = stages as u64 + beyond;
            let run = Progressive { stages, ..progression(interpolation, [first, first + rise]) };
            let run = run.stages(total).unwrap();
            prop_assert_eq!(run.len(), stages);
            prop_assert_eq!(run[0].range.start, 0);
            prop_assert_eq!(run[stages - 1].range.end, total);
            prop_assert_eq!(run[stages - 1].image_size, first + rise);
            prop_assert!(run.iter().all(|stage| stage.range.start < stage.range.end));
            for pair in run.windows(2) {
                prop_assert_eq!(pair[0].range.end, pair[1].range.start);
                prop_assert!(pair[0].image_size <= pair[1].image_size);
            }
            let lengths = || run.iter().map(|stage| stage.range.end - stage.range.start);
            prop_assert!(lengths().max().unwrap() - lengths().min().unwrap() <= 1);
        }
    }
}
