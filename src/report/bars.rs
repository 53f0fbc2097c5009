//! Horizontal bars in groups, as SVG: a group for each thing measured, a bar for each way of doing it.

use super::axis::{Axis, Scale, Unit};
use super::canvas::{self, Canvas, Drawing, GREY, INK, PALE, PALETTE, Type};
use crate::Result;
use plotters::style::Color;
use plotters::style::text_anchor::HPos;
use std::path::Path;

const WIDTH: i32 = 1000;
const HEAD: i32 = 96;
const FOOT: i32 = 66;
const BAR: i32 = 14;
const GAP: i32 = 10;
const RIGHT: i32 = 84;

const TITLE: Type = Type::new(24).bold();
const LABEL: Type = Type::new(15);
const LEGEND: Type = Type::new(16).color(GREY);
const TICK: Type = Type::new(15).color(GREY);
const VALUE: Type = Type::new(13).color(GREY);

/// A picture of bars.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Its heading.
    pub title: String,
    /// What the bars measure, with its unit.
    pub x_label: String,
    /// The ways of doing it, in the order of a group's bars.
    pub series: Vec<String>,
    /// The things measured, from top to bottom. A value that is none, not finite or not positive has no bar.
    pub groups: Vec<Group>,
}

/// One thing measured.
#[derive(Clone, Debug)]
pub struct Group {
    /// What it is.
    pub label: String,
    /// A value for each series.
    pub values: Vec<Option<f64>>,
}

impl Bars {
    /// Draws the picture and saves it as SVG. Bars begin at zero.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let size = (WIDTH as u32, (HEAD + self.groups.len() as i32 * self.group_height() + FOOT) as u32);
        canvas::save(path, size, |canvas| self.draw(canvas))
    }

    fn group_height(&self) -> i32 {
        self.series.len().max(1) as i32 * BAR + GAP
    }

    fn draw(&self, canvas: &Canvas<'_>) -> Drawing {
        let widths = self.groups.iter().map(|group| LABEL.width(&group.label));
        let left = widths.max().unwrap_or(0).clamp(60, WIDTH / 2) + 30;
        let right = WIDTH - RIGHT;
        let bottom = HEAD + self.groups.len() as i32 * self.group_height();
        let axis = Axis::new(self.shown().chain([0.0]), Scale::Linear, Unit::Number, 0.0);
        let across = |value: f64| left + (axis.position(value) * f64::from(right - left)).round() as i32;
        canvas.text(&self.title, (28, 32), TITLE)?;
        self.legend(canvas)?;
        for (value, label) in &axis.ticks {
            let x = across(*value);
            canvas.line(vec![(x, HEAD - 6), (x, bottom)], PALE.to_rgba(), 1)?;
            canvas.text(label, (x, bottom + 16), TICK.anchor(HPos::Center))?;
        }
        canvas.text(&self.x_label, ((left + right) / 2, bottom + 44), LEGEND.anchor(HPos::Center))?;
        for (row, group) in self.groups.iter().enumerate() {
            let top = HEAD + row as i32 * self.group_height();
            let middle = top + (self.group_height() - GAP) / 2;
            canvas.text(&group.label, (left - 10, middle), LABEL.anchor(HPos::Right))?;
            for (i, value) in group.values.iter().enumerate() {
                let Some(value) = value.filter(|value| is_shown(*value)) else { continue };
                let (upper, end) = (top + i as i32 * BAR, across(value));
                canvas.fill([(left, upper + 1), (end.max(left + 1), upper + BAR - 1)], color(i))?;
                canvas.text(&short(value), (end + 6, upper + BAR / 2), VALUE)?;
            }
        }
        canvas.line(vec![(left, HEAD - 6), (left, bottom)], INK.to_rgba(), 1)
    }

    fn shown(&self) -> impl Iterator<Item = f64> {
        let values = self.groups.iter().flat_map(|group| &group.values);
        values.filter_map(|value| value.filter(|value| is_shown(*value)))
    }

    fn legend(&self, canvas: &Canvas<'_>) -> Drawing {
        let mut x = 28;
        for (i, name) in self.series.iter().enumerate() {
            canvas.fill([(x, 58), (x + 20, 70)], color(i))?;
            canvas.text(name, (x + 27, 64), LEGEND)?;
            x += 27 + LEGEND.width(name) + 26;
        }
        Ok(())
    }
}

fn is_shown(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

fn color(series: usize) -> plotters::style::RGBColor {
    PALETTE[series % PALETTE.len()]
}

/// Three significant digits.
fn short(value: f64) -> String {
    let places = (2.0 - value.log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.places$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(groups: Vec<Group>) -> String {
        let bars = Bars {
            title: "Blocks <of> S".into(),
            x_label: "milliseconds".into(),
            series: vec!["fused".into(), "depthwise".into()],
            groups,
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bars.svg");
        bars.write(&path).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    fn group(label: &str, values: [Option<f64>; 2]) -> Group {
        Group { label: label.into(), values: values.to_vec() }
    }

    /// The widths of the rectangles in the colours of the bars, without the two of the legend.
    fn bars(svg: &str) -> Vec<i32> {
        let filled = svg.lines().filter(|l| l.starts_with("<rect") && !l.contains("#FFFFFF"));
        let width = |line: &str| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok();
        filled.skip(2).filter_map(width).collect()
    }

    #[test]
    fn bars_are_as_long_as_their_values() {
        let svg = drawn(vec![group("a", [Some(1.0), Some(2.0)]), group("b", [None, Some(4.0)])]);
        let widths = bars(&svg);
        assert_eq!(widths.len(), 3, "{svg}");
        assert!(
            (widths[2] - 2 * widths[1]).abs() <= 1 && (widths[1] - 2 * widths[0]).abs() <= 1,
            "{widths:?}"
        );
        for text in ["Blocks &lt;of&gt; S", "milliseconds", "fused", "depthwise", "1.00", "4.00"] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn what_was_not_measured_has_no_bar() {
        let svg =
            drawn(vec![group("a", [Some(f64::NAN), Some(f64::INFINITY)]), group("b", [Some(-1.0), None])]);
        assert!(bars(&svg).is_empty() && !svg.contains("NaN"));
        assert!(drawn(Vec::new()).contains("</svg>"));
    }

    #[test]
    fn values_have_three_digits() {
        for (value, text) in [(1234.5, "1234"), (12.345, "12.3"), (0.012_34, "0.0123"), (999.9, "1000")] {
            assert_eq!(short(value), text);
        }
    }
}
