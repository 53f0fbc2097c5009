//! The update rules of the optimizer as plain data.
//!
//! All parameters live in ONE flat buffer and all gradients in another of the same layout; a rule keeps one more flat
//! buffer per slot. This module says what a rule is, which slots it needs and how the scalars of one step come about.
//! It sits below both executions of a step, the CPU reference ([`crate::reference::optimizer`]) and the CUDA kernel,
//! so that neither has to know the other.

#![forbid(unsafe_code)]

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// An update rule with its constants. In the formulas g is the gradient after [`Step::gradient_scale`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", deny_unknown_fields)]
pub enum Rule {
    /// RMSProp as TensorFlow 1 defines it, the optimizer of the paper (`tensorflow/python/training/rmsprop.py`):
    ///
    /// - g ← g + weight_decay·w (kernels only)
    /// - ms ← rho·ms + (1 − rho)·g², ms starting at **1**
    /// - mom ← momentum·mom + lr·g / √(ms + epsilon)
    /// - w ← w − mom
    ///
    /// PyTorch starts ms at 0, adds epsilon outside the root and keeps lr out of the momentum: the first updates of the
    /// two are about 30 times apart.
    #[serde(rename = "rmsprop")]
    RmsPropTf {
        /// Share of the old mean square that is kept, in [0, 1).
        #[serde(default = "constants::nine_tenths")]
        rho: f64,
        /// Share of the old momentum that is kept, in [0, 1).
        #[serde(default = "constants::nine_tenths")]
        momentum: f64,
        /// Added inside the root; positive.
        #[serde(default = "constants::rmsprop_epsilon")]
        epsilon: f64,
    },
    /// Stochastic gradient descent with momentum, as `torch.optim.SGD` without dampening:
    ///
    /// - g ← g + weight_decay·w (kernels only)
    /// - mom ← momentum·mom + g
    /// - w ← w − lr·(g + momentum·mom) with Nesterov's look-ahead, w − lr·mom without
    #[serde(rename = "sgd")]
    Sgd {
        /// Share of the old momentum that is kept, in [0, 1).
        #[serde(default = "constants::nine_tenths")]
        momentum: f64,
        /// Whether to step along the momentum of the next step.
        #[serde(default)]
        nesterov: bool,
    },
    /// Adam with decoupled weight decay (Loshchilov & Hutter, 2019), as `torch.optim.AdamW`; t counts from 1:
    ///
    /// - w ← w − lr·weight_decay·w (kernels only)
    /// - m ← beta1·m + (1 − beta1)·g
    /// - v ← beta2·v + (1 − beta2)·g²
    /// - w ← w − lr·(m / (1 − beta1ᵗ)) / (√(v / (1 − beta2ᵗ)) + epsilon)
    #[serde(rename = "adamw")]
    AdamW {
        /// Share of the old first moment that is kept, in [0, 1).
        #[serde(default = "constants::nine_tenths")]
        beta1: f64,
        /// Share of the old second moment that is kept, in [0, 1).
        #[serde(default = "constants::beta2")]
        beta2: f64,
        /// Added outside the root; positive.
        #[serde(default = "constants::adamw_epsilon")]
        epsilon: f64,
    },
}

/// What a configuration may leave out: google/automl's constants for RMSProp, the authors' for AdamW.
mod constants {
    pub(super) const fn nine_tenths() -> f64 {
        0.9
    }

    pub(super) const fn rmsprop_epsilon() -> f64 {
        1e-3
    }

    pub(super) const fn beta2() -> f64 {
        0.999
    }

    pub(super) const fn adamw_epsilon() -> f64 {
        1e-8
    }
}

/// A flat buffer, as long as the parameters, that a rule carries from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Slot {
    /// Its name in a checkpoint.
    pub name: &'static str,
    /// The value of every element before the first step.
    pub initial: f32,
}

impl Rule {
    /// The paper's optimizer: RMSProp with decay 0.9, momentum 0.9 and the epsilon of google/automl, 1e-3.
    pub const PAPER: Self = Self::RmsPropTf { rho: 0.9, momentum: 0.9, epsilon: 1e-3 };

    /// The slots of the rule, in the order in which an update takes them.
    pub const fn slots(&self) -> &'static [Slot] {
        match self {
            Self::RmsPropTf { .. } => {
                &[Slot { name: "mean_square", initial: 1.0 }, Slot { name: "momentum", initial: 0.0 }]
            }
            Self::Sgd { .. } => &[Slot { name: "momentum", initial: 0.0 }],
            Self::AdamW { .. } => {
                &[Slot { name: "first_moment", initial: 0.0 }, Slot { name: "second_moment", initial: 0.0 }]
            }
        }
    }

    /// Checks the constants.
    ///
    /// # Errors
    /// [`Error::Usage`] for a share outside [0, 1), an epsilon that is not positive, and Nesterov without momentum.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::RmsPropTf { rho, momentum, epsilon } => {
                share("optimizer.rho", rho)?;
                share("optimizer.momentum", momentum)?;
                positive("optimizer.epsilon", epsilon)
            }
            Self::Sgd { momentum, nesterov } => {
                share("optimizer.momentum", momentum)?;
                if nesterov && momentum == 0.0 {
                    let problem = "Nesterov's look-ahead needs a momentum above 0; set one or drop nesterov";
                    return Err(Error::usage("optimizer.momentum", momentum, problem));
                }
                Ok(())
            }
            Self::AdamW { beta1, beta2, epsilon } => {
                share("optimizer.beta1", beta1)?;
                share("optimizer.beta2", beta2)?;
                positive("optimizer.epsilon", epsilon)
            }
        }
    }

    /// AdamW's divisors 1 − beta1ᵗ and 1 − beta2ᵗ in the step numbered `number` from 0; 1 and 1 for the other rules.
    pub fn bias_corrections(&self, number: u64) -> [f64; 2] {
        match *self {
            Self::AdamW { beta1, beta2, .. } => {
                // f64 counts steps exactly up to 2⁵³.
                let t = (number + 1) as f64;
                [1.0 - beta1.powf(t), 1.0 - beta2.powf(t)]
            }
            Self::RmsPropTf { .. } | Self::Sgd { .. } => [1.0; 2],
        }
    }
}

/// The scalars of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The number of the step, from 0.
    pub number: u64,
    /// The learning rate.
    pub learning_rate: f64,
    /// Weight decay λ of the kernels: the gradient of ½·λ·‖w‖² (RMSProp, SGD), or decoupled (AdamW).
    pub weight_decay: f64,
    /// What every gradient is multiplied with first; see [`gradient_scale`].
    pub gradient_scale: f64,
}

/// Everything that changes from one update to the next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scalars {
    /// Those of the rule.
    pub step: Step,
    /// The decay of the moving average in this step; see [`ema_decay`].
    pub ema_decay: f64,
    /// What the gradients have been multiplied with: undone, together with clipping, by [`gradient_scale`].
    pub loss_scale: f64,
    /// The norm to which the gradient is clipped.
    pub max_norm: Option<f64>,
}

impl Scalars {
    /// A step with the average following at once, no loss scale and no clipping.
    pub const fn plain(step: Step) -> Self {
        Self { step, ema_decay: 0.0, loss_scale: 1.0, max_norm: None }
    }
}

/// The loss scale of f16, which looks for the largest power of two that lets no gradient overflow: halved when one does,
/// and the step is skipped; doubled after [`LossScale::PERIOD`] steps without.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// What the loss is multiplied with.
    pub scale: f64,
    /// Steps since it changed.
    pub good_steps: u32,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: Self::INITIAL, good_steps: 0 }
    }
}

impl LossScale {
    /// Where it starts.
    pub const INITIAL: f64 = 65_536.0;
    /// Good steps before it is doubled.
    pub const PERIOD: u32 = 2000;
    /// It is not doubled beyond this.
    pub const LARGEST: f64 = 16_777_216.0;

    /// After a step whose gradients were finite.
    pub fn keep(&mut self) {
        self.good_steps += 1;
        if self.good_steps >= Self::PERIOD {
            *self = Self { scale: (2.0 * self.scale).min(Self::LARGEST), good_steps: 0 };
        }
    }

    /// After a step that was skipped because a gradient was not finite. False when there is nothing left to halve: then
    /// the scale is not at fault.
    pub fn back_off(&mut self) -> bool {
        let can = self.scale > 1.0;
        *self = Self { scale: (self.scale / 2.0).max(1.0), good_steps: 0 };
        can
    }
}

/// The factor that undoes the loss scale and clips the gradient to `max_norm`:
/// 1/loss_scale · min(1, max_norm / (norm/loss_scale)), as TensorFlow's `clip_by_global_norm`.
///
/// `norm` is the norm of the gradients as they lie in their buffer, still multiplied by `loss_scale`; weight decay is no
/// part of it. `None` when the norm is not finite: the step must be skipped (and the loss scale lowered).
pub fn gradient_scale(norm: f64, loss_scale: f64, max_norm: Option<f64>) -> Option<f64> {
    let unscaled = norm / loss_scale;
    if !unscaled.is_finite() {
        return None;
    }
    let clip = match max_norm {
        Some(limit) if unscaled > limit => limit / unscaled,
        _ => 1.0,
    };
    Some(clip / loss_scale)
}

/// The decay of the moving average after the step numbered `number` from 0: min(decay, (1 + t) / (10 + t)).
///
/// The early averages would otherwise stay near the initial weights for 1 / (1 − decay) steps
/// (`tf.train.ExponentialMovingAverage` with `num_updates`).
pub fn ema_decay(decay: f64, number: u64) -> f64 {
    let t = number as f64;
    decay.min((1.0 + t) / (10.0 + t))
}

fn share(name: &str, value: f64) -> Result<()> {
    if (0.0..1.0).contains(&value) {
        return Ok(());
    }
    Err(Error::usage(name, value, "must lie in [0, 1)"))
}

fn positive(name: &str, value: f64) -> Result<()> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(Error::usage(name, value, "must be a positive number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_out_of_range_are_refused_by_name() {
        let cases = [
            (Rule::RmsPropTf { rho: 1.0, momentum: 0.9, epsilon: 1e-3 }, "optimizer.rho"),
            (Rule::RmsPropTf { rho: 0.9, momentum: -0.1, epsilon: 1e-3 }, "optimizer.momentum"),
            (Rule::RmsPropTf { rho: 0.9, momentum: 0.9, epsilon: 0.0 }, "optimizer.epsilon"),
            (Rule::Sgd { momentum: f64::NAN, nesterov: false }, "optimizer.momentum"),
            (Rule::Sgd { momentum: 0.0, nesterov: true }, "optimizer.momentum"),
            (Rule::AdamW { beta1: 1.5, beta2: 0.999, epsilon: 1e-8 }, "optimizer.beta1"),
            (Rule::AdamW { beta1: 0.9, beta2: 1.0, epsilon: 1e-8 }, "optimizer.beta2"),
            (Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: f64::INFINITY }, "optimizer.epsilon"),
        ];
        for (rule, name) in cases {
            let message = rule.validate().unwrap_err().to_string();
            assert!(message.starts_with(name), "{rule:?}: {message}");
        }
        for rule in [
            Rule::PAPER,
            Rule::Sgd { momentum: 0.0, nesterov: false },
            Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
        ] {
            rule.validate().unwrap();
        }
    }

    #[test]
    fn a_rule_reads_back_from_its_configuration() {
        let text = "rule = \"rmsprop\"\nrho = 0.9\nmomentum = 0.9\nepsilon = 0.001\n";
        assert_eq!(toml::from_str::<Rule>(text).unwrap(), Rule::PAPER);
        assert_eq!(toml::to_string(&Rule::PAPER).unwrap(), text);
        assert!(
            toml::from_str::<Rule>("rule = \"sgd\"\nmomentum = 0.9\nnesterov = true\nrho = 1\n").is_err()
        );
    }

    #[test]
    fn the_gradient_scale_undoes_the_loss_scale_and_clips() {
        // A gradient of norm 4, stored 8 times as large.
        assert_eq!(gradient_scale(32.0, 8.0, None), Some(0.125));
        assert_eq!(gradient_scale(32.0, 8.0, Some(4.0)), Some(0.125));
        assert_eq!(gradient_scale(32.0, 8.0, Some(1.0)), Some(0.125 / 4.0));
        assert_eq!(gradient_scale(0.0, 8.0, Some(1.0)), Some(0.125));
        assert_eq!(gradient_scale(f64::INFINITY, 8.0, Some(1.0)), None);
        assert_eq!(gradient_scale(f64::NAN, 8.0, None), None);
    }

    #[test]
    fn the_loss_scale_follows_overflows() {
        let mut scale = LossScale::default();
        assert_eq!(scale.scale, 65_536.0);
        (1..LossScale::PERIOD).for_each(|_| scale.keep());
        assert_eq!(scale, LossScale { scale: 65_536.0, good_steps: 1999 });
        assert!(scale.back_off());
        assert_eq!(scale, LossScale { scale: 32_768.0, good_steps: 0 });
        (0..LossScale::PERIOD).for_each(|_| scale.keep());
        assert_eq!(scale, LossScale { scale: 65_536.0, good_steps: 0 });
        (0..20 * LossScale::PERIOD).for_each(|_| scale.keep());
        assert_eq!(scale.scale, LossScale::LARGEST);
        assert_eq!((0..30).filter(|_| scale.back_off()).count(), 24);
        assert_eq!(scale.scale, 1.0);
    }

    #[test]
    fn the_average_warms_up() {
        assert_eq!(ema_decay(0.9999, 0), 0.1);
        assert_eq!(ema_decay(0.9999, 8), 0.5);
        assert_eq!(ema_decay(0.9999, 107_335), 0.9999);
        // (1 + t) / (10 + t) reaches 0.9999 at t = 89,990.
        assert!(ema_decay(0.9999, 89_989) < 0.9999);
        assert_eq!(ema_decay(0.9999, 89_991), 0.9999);
        assert_eq!(ema_decay(0.0, 5), 0.0);
    }
}
