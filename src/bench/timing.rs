//! Clocks, and how a figure is taken: warm up, then the median of several rounds of as many calls as a round needs to
//! last long enough.

use crate::Result;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// Something that times the work of one device.
pub trait Clock {
    /// A moment in the order of the device's work.
    type Mark: std::fmt::Debug;

    /// The moment when all work asked for so far is done.
    ///
    /// # Errors
    /// What the device says.
    fn mark(&self) -> Result<Self::Mark>;

    /// Seconds from one moment to a later one; waits for that.
    ///
    /// # Errors
    /// What the device says, of the work in between too.
    fn seconds(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64>;
}

/// The clock of this machine, for work that is done when its call returns.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostClock;

impl Clock for HostClock {
    type Mark = Instant;

    fn mark(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn seconds(&self, from: &Instant, to: &Instant) -> Result<f64> {
        Ok(to.duration_since(*from).as_secs_f64())
    }
}

/// How long to take for a figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Effort {
    /// Rounds, of which the median counts; at least 1.
    pub rounds: u32,
    /// Seconds that a round lasts at least: short work is repeated.
    pub round_seconds: f64,
    /// Seconds to warm up for, at least one call.
    pub warm_up_seconds: f64,
}

/// A figure in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Milliseconds {
    /// The median of the rounds.
    pub median: f64,
    /// The fastest round.
    pub min: f64,
    /// The slowest round.
    pub max: f64,
    /// How many there were.
    pub rounds: usize,
}

impl Milliseconds {
    /// Of rounds in seconds; there must be one at least.
    pub fn of(seconds: &[f64]) -> Self {
        let mut sorted: Vec<f64> = seconds.iter().map(|s| s * 1e3).collect();
        sorted.sort_by(f64::total_cmp);
        let [low, high] = [(sorted.len() - 1) / 2, sorted.len() / 2].map(|i| sorted[i]);
        let median = (low + high) / 2.0;
        Self { median, min: sorted[0], max: sorted[sorted.len() - 1], rounds: sorted.len() }
    }

    /// (slowest − fastest) / median.
    pub fn spread(&self) -> f64 {
        (self.max - self.min) / self.median
    }
}

/// Times `N` pieces of work that need one another's state: `work(i)` does the i-th. Their rounds alternate, so that a
/// machine that slows down slows them all. Gives the seconds of one call, round by round.
///
/// # Errors
/// Those of the work and the clock.
pub fn alternate<C: Clock, const N: usize>(
    clock: &C,
    effort: Effort,
    work: impl FnMut(usize) -> Result<()>,
) -> Result<[Vec<f64>; N]> {
    let mut all = alternate_all(clock, effort, N, work)?.into_iter();
    Ok(std::array::from_fn(|_| all.next().unwrap_or_default()))
}

/// The same for `count` pieces of work.
///
/// # Errors
/// Those of the work and the clock.
pub fn alternate_all<C: Clock>(
    clock: &C,
    effort: Effort,
    count: usize,
    mut work: impl FnMut(usize) -> Result<()>,
) -> Result<Vec<Vec<f64>>> {
    let mut time = |i: usize, calls: u32| {
        let start = clock.mark()?;
        for _ in 0..calls {
            work(i)?;
        }
        clock.seconds(&start, &clock.mark()?)
    };
    let mut calls = vec![1; count];
    for (i, calls) in calls.iter_mut().enumerate() {
        let mut spent = 0.0;
        loop {
            let seconds = time(i, *calls)?;
            spent += seconds;
            let one = seconds / f64::from(*calls);
            if spent >= effort.warm_up_seconds {
                *calls = (effort.round_seconds / one).ceil().clamp(1.0, 1e5) as u32;
                break;
            }
            // Toward the end in growing steps: waiting for the device after each call would leave it idle.
            let rest = (effort.warm_up_seconds - spent) / one;
            *calls = rest.ceil().clamp(1.0, 2.0 * f64::from(*calls)) as u32;
        }
    }
    let mut seconds = vec![Vec::new(); count];
    for _ in 0..effort.rounds.max(1) {
        for (i, seconds) in seconds.iter_mut().enumerate() {
            seconds.push(time(i, calls[i])? / f64::from(calls[i]));
        }
    }
    Ok(seconds)
}

/// Times one piece of work.
///
/// # Errors
/// As [`alternate`].
pub fn measure<C: Clock>(
    clock: &C,
    effort: Effort,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Milliseconds> {
    let [seconds] = alternate(clock, effort, |_| work())?;
    Ok(Milliseconds::of(&seconds))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::cell::Cell;

    /// A clock that the work itself moves on.
    #[derive(Debug, Default)]
    pub(in crate::bench) struct Hand(pub(in crate::bench) Cell<f64>);

    impl Clock for Hand {
        type Mark = f64;

        fn mark(&self) -> Result<f64> {
            Ok(self.0.get())
        }

        fn seconds(&self, from: &f64, to: &f64) -> Result<f64> {
            Ok(to - from)
        }
    }

    #[test]
    fn the_median_is_the_middle_and_the_spread_counts_both_ends() {
        let figure = Milliseconds::of(&[0.004, 0.001, 0.002]);
        assert_eq!(figure, Milliseconds { median: 2.0, min: 1.0, max: 4.0, rounds: 3 });
        assert_eq!(figure.spread(), 1.5);
        assert_eq!(Milliseconds::of(&[0.001, 0.002, 0.004, 0.008]).median, 3.0);
    }

    #[test]
    fn rounds_alternate_and_last_long_enough() {
        let clock = Hand::default();
        let mut order = Vec::new();
        let effort = Effort { rounds: 3, round_seconds: 0.1, warm_up_seconds: 0.25 };
        // The first takes 30 ms, so 4 calls a round; the second 200 ms.
        let [first, second] = alternate(&clock, effort, |i| {
            clock.0.set(clock.0.get() + [0.03, 0.2][i]);
            order.push(i);
            Ok(())
        })
        .unwrap();
        for (found, expected) in first.iter().chain(&second).zip([0.03, 0.03, 0.03, 0.2, 0.2, 0.2]) {
            assert!((found - expected).abs() < 1e-12, "{found}");
        }
        let measured = &order[order.len() - 15..];
        assert_eq!(measured, [0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]);
        // 9 × 30 ms and 2 × 200 ms are the first to reach 250 ms.
        assert_eq!(order.len(), 9 + 2 + 15);
    }

    #[test]
    fn a_failure_ends_the_measurement() {
        let effort = Effort { rounds: 2, round_seconds: 0.0, warm_up_seconds: 0.0 };
        let mut calls = 0;
        let outcome = measure(&HostClock, effort, || {
            calls += 1;
            if calls == 2 { Err(crate::Error::Training("no".into())) } else { Ok(()) }
        });
        assert!(outcome.is_err() && calls == 2);
    }
}
