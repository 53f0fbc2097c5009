//! The learning rate as a function of the step: linear warm-up, then a staircase, a cosine or a constant.
//!
//! The conventions are those of google/automl, which trained the published weights: decay counts from step 0, not from
//! the end of the warm-up, and steps per epoch is a fraction (1,256,144 images in batches of 4096 are 306.68 steps).

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The batch size at which the base learning rate is the peak.
const BASE_BATCH: f64 = 256.0;

/// How the learning rate falls from its peak.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Decay {
    /// It does not.
    Constant,
    /// peak · rate^⌊step / (epochs · steps per epoch)⌋; the paper: 0.97 every 2.4 epochs.
    Staircase {
        /// The factor of each stair, in (0, 1].
        rate: f64,
        /// The length of a stair in epochs; positive.
        epochs: f64,
    },
    /// floor + (peak − floor) · ½(1 + cos(π · step / total steps)).
    Cosine {
        /// Where it ends, as a share of the peak, in [0, 1].
        floor: f64,
    },
}

impl Decay {
    /// The paper's staircase: 0.97 every 2.4 epochs.
    pub const PAPER: Self = Self::Staircase { rate: 0.97, epochs: 2.4 };
}

/// The linear scaling rule (Goyal et al., 2017): the peak for `batch` images a step, base · batch / 256.
pub fn scaled_peak(base: f64, batch: usize) -> f64 {
    base * batch as f64 / BASE_BATCH
}

/// A learning rate for every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    peak: f64,
    decay: Decay,
    steps_per_epoch: f64,
    warmup_steps: u64,
    total_steps: u64,
}

impl Schedule {
    /// A run of ⌊epochs · steps_per_epoch⌋ steps, of which the first ⌊warmup_epochs · steps_per_epoch⌋ climb from 0 to
    /// `peak`. `steps_per_epoch` may be a fraction: images / batch.
    ///
    /// # Errors
    /// [`Error::Usage`] for a negative or non-finite value, no steps at all, a warm-up longer than the run, or
    /// constants of `decay` out of range.
    pub fn new(
        peak: f64,
        decay: Decay,
        warmup_epochs: f64,
        epochs: f64,
        steps_per_epoch: f64,
    ) -> Result<Self> {
        check("learning_rate", peak, peak > 0.0, "must be positive")?;
        check("steps_per_epoch", steps_per_epoch, steps_per_epoch > 0.0, "must be positive")?;
        check("epochs", epochs, epochs > 0.0, "must be positive")?;
        check("warmup_epochs", warmup_epochs, warmup_epochs >= 0.0, "must not be negative")?;
        check(
            "warmup_epochs",
            warmup_epochs,
            warmup_epochs <= epochs,
            "must not exceed the epochs of the run",
        )?;
        match decay {
            Decay::Constant => {}
            Decay::Staircase { rate, epochs } => {
                check("decay.rate", rate, rate > 0.0 && rate <= 1.0, "must lie in (0, 1]")?;
                check("decay.epochs", epochs, epochs > 0.0, "must be positive")?;
            }
            Decay::Cosine { floor } => {
                check("decay.floor", floor, (0.0..=1.0).contains(&floor), "must lie in [0, 1]")?;
            }
        }
        let total_steps = (epochs * steps_per_epoch) as u64;
        if total_steps == 0 {
            let problem = format!("gives no step at {steps_per_epoch} steps per epoch; train longer");
            return Err(Error::usage("epochs", epochs, problem));
        }
        let warmup_steps = (warmup_epochs * steps_per_epoch) as u64;
        Ok(Self { peak, decay, steps_per_epoch, warmup_steps, total_steps })
    }

    /// The learning rate of the step numbered `step` from 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let at = step as f64;
        if step < self.warmup_steps {
            return self.peak * at / self.warmup_steps as f64;
        }
        match self.decay {
            Decay::Constant => self.peak,
            Decay::Staircase { rate, epochs } => {
                self.peak * rate.powf((at / (epochs * self.steps_per_epoch)).floor())
            }
            Decay::Cosine { floor } => {
                let progress = (at / self.total_steps as f64).min(1.0);
                let share = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
                self.peak * (floor + (1.0 - floor) * share)
            }
        }
    }

    /// The highest learning rate, that of the end of the warm-up before any decay.
    pub fn peak(&self) -> f64 {
        self.peak
    }

    /// Steps of the warm-up.
    pub fn warmup_steps(&self) -> u64 {
        self.warmup_steps
    }

    /// Steps of the run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }
}

fn check(name: &str, value: f64, holds: bool, problem: &str) -> Result<()> {
    if holds && value.is_finite() { Ok(()) } else { Err(Error::usage(name, value, problem)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ImageNet in the paper's recipe: 1,256,144 images (the rest is held out), batches of 4096, 350 epochs.
    fn imagenet(decay: Decay) -> Schedule {
        Schedule::new(scaled_peak(0.016, 4096), decay, 5.0, 350.0, 1_256_144.0 / 4096.0).unwrap()
    }

    fn assert_close(actual: f64, expected: f64, tolerance: f64) {
        assert!((actual - expected).abs() <= tolerance, "{actual} instead of {expected}");
    }

    #[test]
    fn the_papers_run_has_its_published_figures() {
        let schedule = imagenet(Decay::PAPER);
        assert_close(schedule.peak(), 0.256, 1e-15);
        assert_eq!(schedule.total_steps(), 107_336);
        assert_eq!(schedule.warmup_steps(), 1533);
        assert_eq!(schedule.learning_rate(0), 0.0);
        assert_close(schedule.learning_rate(1), 0.256 / 1533.0, 1e-15);
        assert_close(schedule.learning_rate(1532), 0.256 * 1532.0 / 1533.0, 1e-15);
        // Two stairs lie behind the warm-up: the decay counts from step 0.
        assert_close(schedule.learning_rate(1533), 0.2409, 5e-5);
        assert_close(schedule.learning_rate(1533), 0.256 * 0.97 * 0.97, 1e-15);
        assert_close(schedule.learning_rate(107_335), 0.003091, 5e-7);
    }

    /// A stair is 2.4 · 306.676 = 736.02 steps: the third begins at step ⌈3 · 736.02⌉ = 2209.
    #[test]
    fn stairs_begin_where_they_should() {
        let schedule = imagenet(Decay::PAPER);
        assert_close(schedule.learning_rate(2208), 0.256 * 0.97_f64.powi(2), 1e-15);
        assert_close(schedule.learning_rate(2209), 0.256 * 0.97_f64.powi(3), 1e-15);
    }

    #[test]
    fn a_cosine_counts_from_step_0_and_ends_on_its_floor() {
        let schedule = Schedule::new(2.0, Decay::Cosine { floor: 0.1 }, 1.0, 10.0, 10.0).unwrap();
        assert_close(schedule.learning_rate(5), 1.0, 1e-15);
        assert_close(schedule.learning_rate(25), 0.2 + 1.8 * 0.5 * (1.0 + 0.5_f64.sqrt()), 1e-12);
        assert_close(schedule.learning_rate(50), 0.2 + 0.9, 1e-12);
        assert_close(schedule.learning_rate(100), 0.2, 1e-12);
        assert_close(schedule.learning_rate(150), 0.2, 1e-12);
    }

    #[test]
    fn a_constant_follows_its_warm_up() {
        let schedule = Schedule::new(0.5, Decay::Constant, 2.0, 4.0, 2.5).unwrap();
        assert_eq!(schedule.warmup_steps(), 5);
        let rates: Vec<f64> = (0..7).map(|step| schedule.learning_rate(step)).collect();
        for (rate, expected) in rates.iter().zip([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]) {
            assert_close(*rate, expected, 1e-15);
        }
        let at_once = Schedule::new(0.5, Decay::Constant, 0.0, 4.0, 2.5).unwrap();
        assert_eq!(at_once.learning_rate(0), 0.5);
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        let cases = [
            (0.0, Decay::Constant, 0.0, 1.0, 1.0, "learning_rate"),
            (f64::NAN, Decay::Constant, 0.0, 1.0, 1.0, "learning_rate"),
            (0.1, Decay::Constant, -1.0, 1.0, 1.0, "warmup_epochs"),
            (0.1, Decay::Constant, 2.0, 1.0, 1.0, "warmup_epochs"),
            (0.1, Decay::Constant, 0.0, f64::INFINITY, 1.0, "epochs"),
            (0.1, Decay::Constant, 0.0, 1.0, 0.5, "epochs"),
            (0.1, Decay::Constant, 0.0, 1.0, 0.0, "steps_per_epoch"),
            (0.1, Decay::Staircase { rate: 0.0, epochs: 2.4 }, 0.0, 1.0, 1.0, "decay.rate"),
            (0.1, Decay::Staircase { rate: 0.97, epochs: 0.0 }, 0.0, 1.0, 1.0, "decay.epochs"),
            (0.1, Decay::Cosine { floor: 1.5 }, 0.0, 1.0, 1.0, "decay.floor"),
        ];
        for (peak, decay, warmup, epochs, steps, name) in cases {
            let message = Schedule::new(peak, decay, warmup, epochs, steps).unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }
}
