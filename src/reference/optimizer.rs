//! One step of the optimizer over the flat parameter buffer, and the two passes around it: the norm of the gradient
//! before, the moving average after.
//!
//! The buffers are cut into chunks of a fixed size that the threads share. Updates are element by element, and sums are
//! taken chunk by chunk in a fixed order, so no result depends on the number of threads.

use super::parallel::simd;
use crate::optimizer::{Rule, Step};
use crate::{Error, Result};
use num_traits::Float;
use rayon::prelude::*;
use std::ops::Range;

/// Elements a thread takes at once. Part of the definition of [`gradient_norm`]: it fixes the order of its sums.
const CHUNK: usize = 1 << 14;

/// The slots of `rule` for `parameters` elements, before the first step.
pub fn initial_slots<F: Float>(rule: Rule, parameters: usize) -> Vec<Vec<F>> {
    rule.slots().iter().map(|slot| vec![cast(f64::from(slot.initial)); parameters]).collect()
}

/// Updates `parameters` in place by one step of `rule`; see [`Rule`] for the formulas.
///
/// `gradients` and each of `slots` (in the order of [`Rule::slots`]) are as long as `parameters`. `kernels` are the
/// parts of the buffer that weight decay applies to, sorted and disjoint: the weights of convolutions and dense layers,
/// not the biases and not the scales and shifts of batch norm.
///
/// # Errors
/// [`Error::Shape`] when the lengths differ, the number of slots is not the rule's, or `kernels` are not sorted,
/// overlap, or reach beyond the buffer. Nothing has been changed then.
pub fn update<F, S>(
    rule: Rule,
    step: &Step,
    kernels: &[Range<usize>],
    parameters: &mut [F],
    gradients: &[F],
    slots: &mut [S],
) -> Result<()>
where
    F: Float + Send + Sync,
    S: AsMut<[F]>,
{
    check(kernels, parameters.len(), gradients.len())?;
    let lr: F = cast(step.learning_rate);
    let sweep = Sweep {
        kernels,
        decay: cast(step.weight_decay),
        gradient_scale: cast(step.gradient_scale),
        parameters,
        gradients,
    };
    match rule {
        Rule::RmsPropTf { rho, momentum, epsilon } => {
            let [keep, add, momentum, epsilon] = [rho, 1.0 - rho, momentum, epsilon].map(cast::<F>);
            sweep.run(
                slots,
                #[inline(always)]
                |w, g, decay, [mean_square, velocity]| {
                    let g = g + decay * *w;
                    *mean_square = keep * *mean_square + add * g * g;
                    *velocity = momentum * *velocity + lr * g / (*mean_square + epsilon).sqrt();
                    *w = *w - *velocity;
                },
            )
        }
        Rule::Sgd { momentum, nesterov } => {
            let momentum: F = cast(momentum);
            sweep.run(
                slots,
                #[inline(always)]
                |w, g, decay, [velocity]| {
                    let g = g + decay * *w;
                    *velocity = momentum * *velocity + g;
                    let direction = if nesterov { g + momentum * *velocity } else { *velocity };
                    *w = *w - lr * direction;
                },
            )
        }
        Rule::AdamW { beta1, beta2, epsilon } => {
            let [keep1, add1, keep2, add2] = [beta1, 1.0 - beta1, beta2, 1.0 - beta2].map(cast::<F>);
            let [correct1, correct2] = rule.bias_corrections(step.number).map(cast::<F>);
            let epsilon: F = cast(epsilon);
            sweep.run(
                slots,
                #[inline(always)]
                |w, g, decay, [first, second]| {
                    *first = keep1 * *first + add1 * g;
                    *second = keep2 * *second + add2 * g * g;
                    let direction = (*first / correct1) / ((*second / correct2).sqrt() + epsilon);
                    *w = *w - lr * decay * *w - lr * direction;
                },
            )
        }
    }
}

/// The Euclidean norm of `gradients`, summed in f64. Not finite if and only if an element is not finite (or, for f64
/// alone, the sum of squares overflows).
pub fn gradient_norm<F: Float + Send + Sync>(gradients: &[F]) -> f64 {
    let partial: Vec<f64> =
        gradients.par_chunks(CHUNK).map(|chunk| chunk.iter().map(|&g| square(g)).sum()).collect();
    partial.iter().sum::<f64>().sqrt()
}

/// Whether every element is a finite number.
pub fn all_finite<F: Float + Send + Sync>(values: &[F]) -> bool {
    values.par_chunks(CHUNK).all(|chunk| chunk.iter().all(|v| v.is_finite()))
}

/// Moves `average` towards `values`: ema ← decay·ema + (1 − decay)·value, with decay from
/// [`ema_decay`](crate::optimizer::ema_decay). For parameters and for the running statistics of batch norm alike.
///
/// Written as ema + (1 − decay)·(value − ema), which leaves an average that has arrived where it is.
///
/// # Errors
/// [`Error::Shape`] when the lengths differ.
pub fn update_average<F: Float + Send + Sync>(average: &mut [F], values: &[F], decay: f64) -> Result<()> {
    if average.len() != values.len() {
        return Err(shape(format!(
            "the average has {} elements, the values {}",
            average.len(),
            values.len()
        )));
    }
    let approach: F = cast(1.0 - decay);
    average.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(average, values)| {
        for (ema, &value) in average.iter_mut().zip(values) {
            *ema = *ema + approach * (value - *ema);
        }
    });
    Ok(())
}

/// What every rule's pass over the buffers has in common.
struct Sweep<'a, F> {
    kernels: &'a [Range<usize>],
    decay: F,
    gradient_scale: F,
    parameters: &'a mut [F],
    gradients: &'a [F],
}

impl<F: Float + Send + Sync> Sweep<'_, F> {
    /// Calls `element(parameter, scaled gradient, weight decay, its K slots)` once for each parameter.
    fn run<const K: usize, S: AsMut<[F]>>(
        self,
        slots: &mut [S],
        element: impl Fn(&mut F, F, F, [&mut F; K]) + Sync,
    ) -> Result<()> {
        let mut slots =
            slots_of_length::<F, S, K>(slots, self.parameters.len())?.map(|s| s.chunks_mut(CHUNK));
        let chunks: Vec<_> = self
            .parameters
            .chunks_mut(CHUNK)
            .zip(self.gradients.chunks(CHUNK))
            .map(|(w, g)| (w, g, slots.each_mut().map(|slot| slot.next().unwrap_or_default())))
            .collect();
        chunks.into_par_iter().enumerate().for_each(|(index, (w, g, mut slots))| {
            let start = index * CHUNK;
            for (part, is_kernel) in parts(self.kernels, start..start + w.len()) {
                let decay = if is_kernel { self.decay } else { F::zero() };
                let part = part.start - start..part.end - start;
                let (w, g) = (&mut w[part.clone()], &g[part.clone()]);
                let mut slots = slots.each_mut().map(|slot| &mut slot[part.clone()]);
                simd!({
                    for (i, (w, &g)) in w.iter_mut().zip(g).enumerate() {
                        let slots = slots.each_mut().map(
                            #[inline(always)]
                            |slot| &mut slot[i],
                        );
                        element(w, g * self.gradient_scale, decay, slots);
                    }
                });
            }
        });
        Ok(())
    }
}

/// Cuts `within` at the borders of the sorted `kernels`: the pieces in order, and whether each lies in a kernel.
fn parts(kernels: &[Range<usize>], within: Range<usize>) -> Vec<(Range<usize>, bool)> {
    let first = kernels.partition_point(|kernel| kernel.end <= within.start);
    let mut pieces = Vec::new();
    let mut at = within.start;
    for kernel in kernels[first..].iter().take_while(|kernel| kernel.start < within.end) {
        pieces.push((at..kernel.start.max(at), false));
        at = kernel.end.min(within.end);
        pieces.push((kernel.start.max(within.start)..at, true));
    }
    pieces.push((at..within.end, false));
    pieces
}

fn slots_of_length<F, S: AsMut<[F]>, const K: usize>(
    slots: &mut [S],
    length: usize,
) -> Result<[&mut [F]; K]> {
    let slots: Vec<&mut [F]> = slots.iter_mut().map(AsMut::as_mut).collect();
    if let Some(slot) = slots.iter().find(|slot| slot.len() != length) {
        return Err(shape(format!("a slot has {} elements, the parameters {length}", slot.len())));
    }
    let count = slots.len();
    slots.try_into().map_err(|_| shape(format!("the rule keeps {K} slots, {count} were given")))
}

fn check(kernels: &[Range<usize>], parameters: usize, gradients: usize) -> Result<()> {
    if gradients != parameters {
        return Err(shape(format!("{parameters} parameters have {gradients} gradients")));
    }
    let mut free_from = 0;
    for kernel in kernels {
        if kernel.start < free_from || kernel.end < kernel.start || kernel.end > parameters {
            return Err(shape(format!(
                "the kernel {kernel:?} must begin at {free_from} or later and end by {parameters}: \
                 sort the ranges and merge those that overlap"
            )));
        }
        free_from = kernel.end;
    }
    Ok(())
}

fn shape(problem: String) -> Error {
    Error::Shape { operation: "optimizer", problem }
}

/// A constant in the type of the buffers; both of them, f32 and f64, can hold one.
fn cast<F: Float>(value: f64) -> F {
    F::from(value).unwrap_or_else(F::nan)
}

fn square<F: Float>(value: F) -> f64 {
    let value = value.to_f64().unwrap_or(f64::NAN);
    value * value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optimizer::ema_decay;
    use crate::random::{Purpose, Stream};

    const PLAIN: Step = Step { number: 0, learning_rate: 0.1, weight_decay: 0.0, gradient_scale: 1.0 };
    const RULES: [Rule; 4] = [
        Rule::PAPER,
        Rule::Sgd { momentum: 0.9, nesterov: false },
        Rule::Sgd { momentum: 0.9, nesterov: true },
        Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
    ];

    /// The weight 1 after each of `steps` (gradient, learning rate), with weight decay `weight_decay` on it.
    fn trajectory(rule: Rule, weight_decay: f64, steps: &[(f64, f64)]) -> Vec<f64> {
        let (mut w, mut slots) = ([1.0], initial_slots::<f64>(rule, 1));
        let mut weights = Vec::new();
        for (number, &(gradient, learning_rate)) in steps.iter().enumerate() {
            let step = Step { number: number as u64, learning_rate, weight_decay, gradient_scale: 1.0 };
            update(rule, &step, std::slice::from_ref(&(0..1)), &mut w, &[gradient], &mut slots).unwrap();
            weights.push(w[0]);
        }
        weights
    }

    fn assert_close(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 1e-12, "{actual:?} instead of {expected:?}");
        }
    }

    /// The first update measured in TensorFlow 1, in f32: 0.00105351 (Keras': 0.03146583). The second by hand, with
    /// another gradient and learning rate: ms = 0.9·0.90001 + 0.1·0.0004 = 0.810049, and lr sits inside the momentum.
    #[test]
    fn rmsprop_is_tensorflows() {
        let (mut w, mut slots) = ([1.0_f32], initial_slots(Rule::PAPER, 1));
        update(Rule::PAPER, &PLAIN, &[], &mut w, &[0.01], &mut slots).unwrap();
        assert!((1.0 - w[0] - 0.00105351).abs() < 5e-9, "{}", 1.0 - w[0]);
        let first = 0.1 * 0.01 / 0.90101_f64.sqrt();
        let second = 0.9 * first + 0.05 * -0.02 / 0.811049_f64.sqrt();
        assert_close(
            &trajectory(Rule::PAPER, 0.0, &[(0.01, 0.1), (-0.02, 0.05)]),
            &[1.0 - first, 1.0 - first - second],
        );
        // Coupled decay: a gradient of 0.006 and a decay of 0.004 on w = 1 act as a gradient of 0.01.
        assert_close(&trajectory(Rule::PAPER, 0.004, &[(0.006, 0.1)]), &[1.0 - first]);
    }

    /// mom = 0.5, then 0.9·0.5 − 0.2 = 0.25.
    #[test]
    fn sgd_with_momentum() {
        let rule = Rule::Sgd { momentum: 0.9, nesterov: false };
        assert_close(&trajectory(rule, 0.0, &[(0.5, 0.1), (-0.2, 0.2)]), &[0.95, 0.90]);
    }

    /// mom = 0.5 and a step of 0.5 + 0.45; then mom = 0.25 and a step of −0.2 + 0.225. With decay 0.1 the gradients are
    /// 0.5 + 0.1·1 = 0.6 (mom 0.6, step 1.14), then −0.2 + 0.1·0.886 = −0.1114 (mom 0.4286, step 0.27434).
    #[test]
    fn sgd_with_nesterov_momentum() {
        let rule = Rule::Sgd { momentum: 0.9, nesterov: true };
        assert_close(&trajectory(rule, 0.0, &[(0.5, 0.1), (-0.2, 0.2)]), &[0.905, 0.900]);
        assert_close(&trajectory(rule, 0.1, &[(0.5, 0.1), (-0.2, 0.2)]), &[0.886, 0.831132]);
    }

    /// Step 1: m̂ = g and √v̂ = |g|, so w = 1 − 0.1·0.01·1 − 0.1. Step 2, g = −0.2: m = 0.9·0.05 − 0.02 = 0.025, over 0.19;
    /// v = 0.999·0.00025 + 0.00004 = 0.00028975, over 0.001999.
    #[test]
    fn adamw_corrects_its_bias_and_decouples_decay() {
        let rule = Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        let first = 1.0 - 0.001 - 0.1 * 0.5 / (0.5 + 1e-8);
        let direction = (0.025 / 0.19) / ((0.00028975_f64 / 0.001999).sqrt() + 1e-8);
        let second = first * (1.0 - 0.2 * 0.01) - 0.2 * direction;
        assert_close(&trajectory(rule, 0.01, &[(0.5, 0.1), (-0.2, 0.2)]), &[first, second]);
    }

    #[test]
    fn the_gradient_is_scaled_first() {
        for rule in RULES {
            let (mut scaled, mut plain) = ([1.0, -2.0], [1.0, -2.0]);
            let step = Step { gradient_scale: 0.125, ..PLAIN };
            update(rule, &step, &[], &mut scaled, &[8.0, 4.0], &mut initial_slots::<f64>(rule, 2)).unwrap();
            update(rule, &PLAIN, &[], &mut plain, &[1.0, 0.5], &mut initial_slots::<f64>(rule, 2)).unwrap();
            assert_eq!(scaled, plain);
            assert_ne!(plain, [1.0, -2.0]);
        }
    }

    /// With zero gradients only decay moves a weight. The ranges begin and end inside chunks, on their borders, one
    /// spans a whole chunk, two touch and one is empty.
    #[test]
    fn weight_decay_stays_inside_the_kernels() {
        let kernels =
            [1..3, 3..5, 7..7, CHUNK - 1..CHUNK, CHUNK + 2..3 * CHUNK + 5, 4 * CHUNK..4 * CHUNK + 1];
        let length = 4 * CHUNK + 9;
        for rule in RULES {
            let mut w = vec![1.0_f32; length];
            let step = Step { weight_decay: 0.1, ..PLAIN };
            let gradients = vec![0.0; length];
            update(rule, &step, &kernels, &mut w, &gradients, &mut initial_slots::<f32>(rule, length))
                .unwrap();
            for (i, &w) in w.iter().enumerate() {
                let inside = kernels.iter().any(|kernel| kernel.contains(&i));
                assert_eq!(w < 1.0, inside, "{rule:?}: element {i} is {w}");
            }
        }
    }

    #[test]
    fn an_update_repeats_bit_for_bit_on_any_number_of_threads() {
        let length = 5 * CHUNK + 77;
        let mut stream = Stream::new(3, 0, 0, Purpose::Init);
        let mut draw = || (0..length).map(|_| stream.uniform() - 0.5).collect::<Vec<f32>>();
        let (weights, gradients) = (draw(), draw());
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let norm = gradient_norm(&gradients);
                let mut results = Vec::new();
                for rule in RULES {
                    let mut w = weights.clone();
                    let mut slots = initial_slots::<f32>(rule, length);
                    for number in 0..3 {
                        let step = Step { number, weight_decay: 1e-2, gradient_scale: 1.0 / norm, ..PLAIN };
                        let kernels = [10..CHUNK + 10, 2 * CHUNK..length];
                        update(rule, &step, &kernels, &mut w, &gradients, &mut slots).unwrap();
                    }
                    slots.push(w);
                    results.push(slots);
                }
                (norm.to_bits(), results)
            })
        };
        let one = run(1);
        assert!(one == run(2));
        assert!(one == run(7));
    }

    #[test]
    fn the_norm_spans_chunks_and_survives_small_terms() {
        assert_eq!(gradient_norm::<f32>(&[]), 0.0);
        assert_eq!(gradient_norm(&[3.0_f32, -4.0]), 5.0);
        assert_eq!(gradient_norm(&vec![0.5_f32; 4 * CHUNK]), 128.0);
        // In f32 the squares of the ones would vanish beside 2²⁶.
        let mut gradients = vec![1.0_f32; 3 * CHUNK];
        gradients[0] = 8192.0;
        let expected = (8192.0_f64 * 8192.0 + (3 * CHUNK - 1) as f64).sqrt();
        assert_eq!(gradient_norm(&gradients), expected);
        // Squares that overflow f32.
        assert_eq!(gradient_norm(&[3e30_f32, 4e30]) as f32, 5e30);
    }

    #[test]
    fn one_bad_element_is_found_anywhere() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, CHUNK - 1, CHUNK, 2 * CHUNK + 2] {
                let mut values = vec![1.0_f32; 2 * CHUNK + 3];
                assert!(all_finite(&values) && gradient_norm(&values).is_finite());
                values[place] = bad;
                assert!(!all_finite(&values) && !gradient_norm(&values).is_finite());
            }
        }
    }

    /// Steps 0 and 1 have decay 1/10 and 2/11: 0 → 0.9·2 = 1.8 → 2/11·1.8 + 9/11·4 = 3.6.
    #[test]
    fn the_average_follows_quickly_at_first() {
        let mut average = vec![0.0_f64; CHUNK + 1];
        update_average(&mut average, &vec![2.0; CHUNK + 1], ema_decay(0.9999, 0)).unwrap();
        assert!(average.iter().all(|ema| (ema - 1.8).abs() < 1e-12));
        update_average(&mut average, &vec![4.0; CHUNK + 1], ema_decay(0.9999, 1)).unwrap();
        assert!(average.iter().all(|ema| (ema - 3.6).abs() < 1e-12));
    }

    #[test]
    fn an_average_that_has_arrived_does_not_drift() {
        let values = [0.1_f32, 1.0 / 3.0, -7.7e-3];
        let mut average = values;
        for _ in 0..1000 {
            update_average(&mut average, &values, 0.9999).unwrap();
        }
        assert_eq!(average, values);
    }

    #[test]
    fn misfits_are_errors_and_change_nothing() {
        let rule = Rule::PAPER;
        let run = |kernels: &[Range<usize>], gradients: usize, slots: &mut [Vec<f32>]| {
            let mut w = [1.0_f32; 8];
            let step = Step { weight_decay: 0.1, ..PLAIN };
            let result = update(rule, &step, kernels, &mut w, &vec![1.0; gradients], slots);
            assert!(result.is_ok() || w == [1.0; 8]);
            result.map_err(|error| error.to_string())
        };
        let slots = || initial_slots::<f32>(rule, 8);
        run(&[0..4, 4..8], 8, &mut slots()).unwrap();
        assert!(run(&[], 7, &mut slots()).unwrap_err().contains("8 parameters have 7 gradients"));
        assert!(run(&[], 8, &mut slots()[..1]).unwrap_err().contains("keeps 2 slots, 1 were given"));
        assert!(run(&[], 8, &mut initial_slots(rule, 9)).unwrap_err().contains("a slot has 9 elements"));
        assert!(run(&[4..8, 0..4], 8, &mut slots()).unwrap_err().contains("0..4"));
        assert!(run(&[0..5, 4..8], 8, &mut slots()).unwrap_err().contains("4..8"));
        assert!(run(&[0..2, 3..9], 8, &mut slots()).unwrap_err().contains("3..9"));
        assert!(update_average(&mut [0.0_f32], &[1.0, 2.0], 0.9).is_err());
    }
}
