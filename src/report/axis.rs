//! Axes: which range to show, where to put ticks, how to label them.

/// What the numbers of an axis are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Plain numbers.
    Number,
    /// Shares of 1, shown in percent.
    Share,
}

/// How values are spread over an axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Evenly.
    Linear,
    /// By their logarithm; values that are not positive are left out.
    Log,
}

/// A range of values with its ticks, in ascending order.
#[derive(Debug)]
pub(super) struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
    pub(super) ticks: Vec<(f64, String)>,
}

/// Ticks aimed at on a linear axis.
const TICKS: f64 = 6.0;

impl Axis {
    /// An axis that shows all of `values`, finite ones, with `margin` as a share of the range beyond either end.
    pub(super) fn new(values: impl Iterator<Item = f64>, scale: Scale, unit: Unit, margin: f64) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.map(|value| forward(scale, value)).filter(|value| value.is_finite()) {
            (low, high) = (low.min(value), high.max(value));
        }
        if low > high {
            (low, high) = (forward(scale, 0.1), forward(scale, 1.0));
        }
        let wide_enough = 1e-9 * low.abs().max(high.abs());
        let space = if high - low > wide_enough {
            margin * (high - low)
        } else if scale == Scale::Log || low == 0.0 {
            0.5
        } else {
            0.1 * low.abs()
        };
        let top = if unit == Unit::Share { 1.0_f64.max(high) } else { f64::INFINITY };
        (low, high) = (low - space, (high + space).min(top));
        let (low, high) = (backward(scale, low), backward(scale, high));
        let ticks = match scale {
            Scale::Linear => linear_ticks(low, high, unit),
            Scale::Log => log_ticks(low, high, unit),
        };
        Self { scale, low, high, ticks }
    }

    /// Where `value` lies: 0 at the lower end of the axis, 1 at the upper. Not finite if it cannot be shown.
    pub(super) fn position(&self, value: f64) -> f64 {
        let [low, high, value] = [self.low, self.high, value].map(|v| forward(self.scale, v));
        (value - low) / (high - low)
    }
}

fn forward(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Linear => value,
        Scale::Log if value > 0.0 => value.log10(),
        Scale::Log => f64::NAN,
    }
}

fn backward(scale: Scale, value: f64) -> f64 {
    match scale {
        Scale::Linear => value,
        Scale::Log => 10_f64.powf(value),
    }
}

/// Multiples of 1, 2 or 5 times a power of ten.
fn linear_ticks(low: f64, high: f64, unit: Unit) -> Vec<(f64, String)> {
    let factor = if unit == Unit::Share { 100.0 } else { 1.0 };
    let (low, high) = (low * factor, high * factor);
    let rough = (high - low) / TICKS;
    let power = 10_f64.powf(rough.log10().floor());
    let step = power * [1.0, 2.0, 5.0, 10.0].into_iter().find(|s| s * power >= 0.85 * rough).unwrap_or(10.0);
    let (first, last) = ((low / step - 1e-9).ceil() as i64, (high / step + 1e-9).floor() as i64);
    let largest = low.abs().max(high.abs());
    (first..=last)
        .map(|i| {
            let value = i as f64 * step;
            (value / factor, label(value, step, largest, unit))
        })
        .collect()
}

/// Powers of ten; within few of them also multiples of those; within less than that linear ticks.
fn log_ticks(low: f64, high: f64, unit: Unit) -> Vec<(f64, String)> {
    const MULTIPLES: [&[f64]; 3] = [&[1.0], &[1.0, 2.0, 5.0], &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0]];
    const ENOUGH: usize = 4;
    let shown = (low * (1.0 - 1e-9))..=(high * (1.0 + 1e-9));
    let every = ((high / low).log10() / 8.0).ceil().max(1.0) as i32;
    let powers = || (low.log10().floor() as i32..=high.log10().ceil() as i32).filter(|p| p % every == 0);
    for multiples in MULTIPLES {
        let values = powers().flat_map(|power| multiples.iter().map(move |m| m * 10_f64.powi(power)));
        let values: Vec<f64> = values.filter(|value| shown.contains(value)).collect();
        if values.len() >= ENOUGH {
            let factor = if unit == Unit::Share { 100.0 } else { 1.0 };
            return values.iter().map(|&v| (v, log_label(factor * v, unit))).collect();
        }
    }
    linear_ticks(low, high, unit)
}

/// A multiple of a power of ten, to its own precision.
fn log_label(value: f64, unit: Unit) -> String {
    let power = 10_f64.powf((value * (1.0 + 1e-9)).log10().floor());
    let is_whole = (value / power - (value / power).round()).abs() < 1e-6;
    label(value, if is_whole { power } else { power / 10.0 }, value, unit)
}

/// `value` to the precision of `step`; on an axis that reaches to `largest`.
fn label(value: f64, step: f64, largest: f64, unit: Unit) -> String {
    // A hair above the power of ten must not cost a digit.
    let places = |step: f64| (-(step * (1.0 + 1e-9)).log10().floor()).max(0.0) as usize;
    if unit == Unit::Share {
        return format!("{value:.*} %", places(step));
    }
    if value == 0.0 {
        return "0".to_owned();
    }
    if largest >= 1e7 {
        format!("{:.*}M", places(step / 1e6), value / 1e6)
    } else if largest >= 1e4 {
        format!("{:.*}k", places(step / 1e3), value / 1e3)
    } else if largest < 1e-2 {
        let power = |value: f64| (value.abs() * (1.0 + 1e-9)).log10().floor();
        let digits = (power(value) - power(step)).max(0.0) as usize;
        format!("{value:.digits$e}")
    } else {
        format!("{value:.*}", places(step))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64], scale: Scale, unit: Unit) -> Vec<String> {
        Axis::new(values.iter().copied(), scale, unit, 0.0)
            .ticks
            .into_iter()
            .map(|(_, label)| label)
            .collect()
    }

    #[test]
    fn ticks_are_round_numbers() {
        use Scale::{Linear, Log};
        use Unit::{Number, Share};
        let cases: [(&[f64], Scale, Unit, &[&str]); 11] = [
            (&[0.0, 10.0], Linear, Number, &["0", "2", "4", "6", "8", "10"]),
            (&[-0.3, 0.35], Linear, Number, &["-0.3", "-0.2", "-0.1", "0", "0.1", "0.2", "0.3"]),
            (&[0.0, 107_336.0], Linear, Number, &["0", "20k", "40k", "60k", "80k", "100k"]),
            (&[0.0, 2.5e7], Linear, Number, &["0", "5M", "10M", "15M", "20M", "25M"]),
            (&[0.0, 0.0012], Linear, Number, &["0", "2e-4", "4e-4", "6e-4", "8e-4", "1.0e-3", "1.2e-3"]),
            (&[0.92, 0.985], Linear, Share, &["92 %", "93 %", "94 %", "95 %", "96 %", "97 %", "98 %"]),
            (&[1e-4, 0.3], Log, Number, &["1e-4", "1e-3", "0.01", "0.1"]),
            (&[0.08, 2.0], Log, Number, &["0.1", "0.2", "0.5", "1", "2"]),
            (&[1.1, 7.2], Log, Number, &["1.5", "2", "3", "5", "7"]),
            (
                &[1.2e-4, 1.6e-3],
                Log,
                Share,
                &["0.015 %", "0.02 %", "0.03 %", "0.05 %", "0.07 %", "0.1 %", "0.15 %"],
            ),
            (&[2.2, 2.6], Log, Number, &["2.2", "2.3", "2.4", "2.5", "2.6"]),
        ];
        for (values, scale, unit, expected) in cases {
            assert_eq!(labels(values, scale, unit), expected, "{values:?}");
        }
    }

    #[test]
    fn positions_run_from_0_to_1() {
        let linear = Axis::new([2.0, 4.0].into_iter(), Scale::Linear, Unit::Number, 0.5);
        assert_eq!([1.0, 3.0, 5.0].map(|v| linear.position(v)), [0.0, 0.5, 1.0]);
        let log = Axis::new([1.0, 100.0].into_iter(), Scale::Log, Unit::Number, 0.0);
        assert!((log.position(10.0) - 0.5).abs() < 1e-12);
        assert!(log.position(0.0).is_nan());
    }

    /// One value, none at all, and values that cannot be shown still make an axis.
    #[test]
    fn every_axis_has_a_range() {
        let cases: [&[f64]; 6] = [&[], &[0.0], &[7.0], &[-1e-3], &[f64::NAN, f64::INFINITY], &[0.256, 0.256]];
        for values in cases {
            for scale in [Scale::Linear, Scale::Log] {
                let axis = Axis::new(values.iter().copied(), scale, Unit::Number, 0.05);
                assert!(axis.low < axis.high, "{values:?}: {axis:?}");
                assert!((2..20).contains(&axis.ticks.len()), "{values:?}: {axis:?}");
                assert!(axis.ticks.iter().all(|(v, _)| (-1e-6..1.000_001).contains(&axis.position(*v))));
            }
        }
    }

    #[test]
    fn shares_do_not_exceed_one() {
        let axis = Axis::new([0.5, 1.0].into_iter(), Scale::Linear, Unit::Share, 0.1);
        assert_eq!((axis.high, axis.ticks.last().unwrap().1.as_str()), (1.0, "100 %"));
    }
}
