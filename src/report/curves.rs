//! Curves over the course of a run, several panels to a picture, as SVG.

pub use super::axis::{Scale, Unit};

use super::axis::Axis;
use super::canvas::{self, Canvas, Drawing, GREY, INK, PALE, PALETTE, Type};
use crate::Result;
use plotters::style::text_anchor::HPos;
use plotters::style::{Color, RGBAColor};
use std::path::Path;

/// Width and height of a panel with its labels, in pixels.
const PANEL: (i32, i32) = (720, 430);
/// From the border of a panel to the frame of its plot: left, top, right, bottom.
const MARGIN: (i32, i32, i32, i32) = (104, 74, 30, 74);
const HEAD: i32 = 62;

const TITLE: Type = Type::new(26).bold();
const PANEL_TITLE: Type = Type::new(20).bold();
const LABEL: Type = Type::new(17).color(GREY);
const TICK: Type = Type::new(16).color(GREY);
const NOTE: Type = Type::new(14).color(GREY);

/// How the points of a series are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stroke {
    /// Straight from point to point.
    Line,
    /// As a line, but thin and pale: the noisy values behind a smooth curve. Not in the legend.
    Faint,
    /// A value holds until the next.
    Steps,
}

/// A curve. Points that are not finite, or not positive on a logarithmic scale, leave a gap.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// (step or epoch, value) with ascending first numbers.
    pub points: Vec<(f64, f64)>,
    /// How they are joined.
    pub stroke: Stroke,
    /// Which colour of the palette it takes; a faint series and its smooth curve share one.
    pub color: usize,
}

/// One plot of the picture.
#[derive(Clone, Debug)]
pub struct Panel {
    /// Its heading.
    pub title: String,
    /// What the vertical axis shows.
    pub y_label: String,
    /// How the vertical axis is spread.
    pub scale: Scale,
    /// What its numbers are.
    pub unit: Unit,
    /// The curves; a later one lies over an earlier one. A legend appears from two names on.
    pub series: Vec<Series>,
}

/// A vertical line through all panels: where a stage of progressive learning begins.
#[derive(Clone, Debug)]
pub struct Mark {
    /// Its step or epoch.
    pub at: f64,
    /// A few letters to stand above it.
    pub label: String,
}

/// A picture of panels that share the horizontal axis.
#[derive(Clone, Debug)]
pub struct Figure {
    /// Its heading.
    pub title: String,
    /// What the horizontal axis counts.
    pub x_label: String,
    /// The plots, two in a row.
    pub panels: Vec<Panel>,
    /// Vertical marks; those outside the range of the curves are left out.
    pub marks: Vec<Mark>,
}

/// The course of a training run; every pair is (step or epoch, value).
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Training loss.
    pub loss: Vec<(f64, f64)>,
    /// Validation accuracy of the weights as they are, in [0, 1].
    pub accuracy: Vec<(f64, f64)>,
    /// Validation accuracy of the moving average of the weights, in [0, 1].
    pub ema_accuracy: Vec<(f64, f64)>,
    /// Learning rate.
    pub learning_rate: Vec<(f64, f64)>,
    /// Side of the training images, in pixels.
    pub image_size: Vec<(f64, f64)>,
}

/// Points of a noisy curve beyond which a smoothed one is drawn over it, and the points of that one.
const SMOOTHED_POINTS: usize = 120;

impl Figure {
    /// The four panels of a training run: loss, accuracy, learning rate, image size.
    pub fn training(
        title: impl Into<String>,
        x_label: impl Into<String>,
        history: History,
        marks: Vec<Mark>,
    ) -> Self {
        let series =
            |name: &str, points, stroke, color| Series { name: name.to_owned(), points, stroke, color };
        let panel = |title: &str, y_label: &str, scale, unit, series| Panel {
            title: title.to_owned(),
            y_label: y_label.to_owned(),
            scale,
            unit,
            series,
        };
        let loss = if history.loss.len() > 3 * SMOOTHED_POINTS {
            let smooth = binned_mean(&history.loss, SMOOTHED_POINTS);
            vec![series("loss", history.loss, Stroke::Faint, 0), series("mean", smooth, Stroke::Line, 0)]
        } else {
            vec![series("loss", history.loss, Stroke::Line, 0)]
        };
        let accuracy = vec![
            series("weights", history.accuracy, Stroke::Line, 0),
            series("EMA of weights", history.ema_accuracy, Stroke::Line, 1),
        ];
        let learning_rate = vec![series("learning rate", history.learning_rate, Stroke::Line, 2)];
        let image_size = vec![series("image size", history.image_size, Stroke::Steps, 3)];
        Self {
            title: title.into(),
            x_label: x_label.into(),
            panels: vec![
                panel("Training loss", "cross entropy", Scale::Log, Unit::Number, loss),
                panel("Validation accuracy", "top-1 accuracy", Scale::Linear, Unit::Share, accuracy),
                panel("Learning rate", "learning rate", Scale::Linear, Unit::Number, learning_rate),
                panel("Image size", "pixels", Scale::Linear, Unit::Number, image_size),
            ],
            marks,
        }
    }

    /// Draws the picture and saves it as SVG.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let columns = self.panels.len().clamp(1, 2);
        let rows = self.panels.len().div_ceil(columns).max(1);
        let size = (columns as u32 * PANEL.0 as u32, (HEAD + rows as i32 * PANEL.1) as u32);
        canvas::save(path, size, |canvas| {
            canvas.text(&self.title, (28, HEAD / 2 + 6), TITLE)?;
            let points = self.panels.iter().flat_map(|panel| &panel.series).flat_map(|series| &series.points);
            let x = Axis::new(points.map(|point| point.0), Scale::Linear, Unit::Number, 0.0);
            for (i, panel) in self.panels.iter().enumerate() {
                let corner = ((i % columns) as i32 * PANEL.0, HEAD + (i / columns) as i32 * PANEL.1);
                let y = Axis::new(panel.values(), panel.scale, panel.unit, 0.06);
                Plot { canvas, panel, corner, x: &x, y }.draw(&self.x_label, &self.marks)?;
            }
            Ok(())
        })
    }
}

impl Panel {
    fn values(&self) -> impl Iterator<Item = f64> {
        self.series
            .iter()
            .flat_map(|series| &series.points)
            .filter(|(x, _)| x.is_finite())
            .map(|point| point.1)
    }
}

/// One panel at its place on the canvas.
struct Plot<'a, 'b> {
    canvas: &'a Canvas<'b>,
    panel: &'a Panel,
    corner: (i32, i32),
    x: &'a Axis,
    y: Axis,
}

impl Plot<'_, '_> {
    fn draw(&self, x_label: &str, marks: &[Mark]) -> Drawing {
        self.grid()?;
        self.marks(marks)?;
        for series in &self.panel.series {
            self.series(series)?;
        }
        if !self.panel.values().any(f64::is_finite) {
            let centre = ((self.left() + self.right()) / 2, (self.top() + self.bottom()) / 2);
            self.canvas.text("no data yet", centre, LABEL.anchor(HPos::Center))?;
        }
        self.canvas.frame([(self.left(), self.top()), (self.right(), self.bottom())], GREY)?;
        self.labels(x_label)?;
        self.legend()
    }

    fn left(&self) -> i32 {
        self.corner.0 + MARGIN.0
    }

    fn top(&self) -> i32 {
        self.corner.1 + MARGIN.1
    }

    fn right(&self) -> i32 {
        self.corner.0 + PANEL.0 - MARGIN.2
    }

    fn bottom(&self) -> i32 {
        self.corner.1 + PANEL.1 - MARGIN.3
    }

    fn across(&self, x: f64) -> i32 {
        self.left() + (self.x.position(x) * f64::from(self.right() - self.left())).round() as i32
    }

    fn up(&self, y: f64) -> i32 {
        self.bottom() - (self.y.position(y) * f64::from(self.bottom() - self.top())).round() as i32
    }

    fn grid(&self) -> Drawing {
        for (value, label) in &self.x.ticks {
            let x = self.across(*value);
            self.canvas.line(vec![(x, self.top()), (x, self.bottom())], PALE.to_rgba(), 1)?;
            self.canvas.text(label, (x, self.bottom() + 18), TICK.anchor(HPos::Center))?;
        }
        for (value, label) in &self.y.ticks {
            let y = self.up(*value);
            self.canvas.line(vec![(self.left(), y), (self.right(), y)], PALE.to_rgba(), 1)?;
            self.canvas.text(label, (self.left() - 10, y), TICK.anchor(HPos::Right))?;
        }
        Ok(())
    }

    /// A label that would run into the one before it is left out; its line stays.
    fn marks(&self, marks: &[Mark]) -> Drawing {
        let mut free_from = self.left();
        for mark in marks.iter().filter(|mark| (0.0..=1.0).contains(&self.x.position(mark.at))) {
            let x = self.across(mark.at);
            self.canvas.line(vec![(x, self.top() - 8), (x, self.bottom())], INK.mix(0.45), 1)?;
            let end = x + 4 + NOTE.width(&mark.label);
            if x >= free_from && end <= self.right() + MARGIN.2 {
                self.canvas.text(&mark.label, (x + 4, self.top() - 9), NOTE)?;
                free_from = end + 6;
            }
        }
        Ok(())
    }

    fn series(&self, series: &Series) -> Drawing {
        let (color, width) = stroke(series);
        for run in self.runs(series) {
            if let [only] = run[..] {
                self.canvas.dot(only, color, 4)?;
            } else {
                self.canvas.line(run, color, width)?;
            }
        }
        Ok(())
    }

    /// The series in pixels, cut where values cannot be shown. Several points in one column of pixels become the first,
    /// the lowest, the highest and the last of them, which looks the same and keeps the file small.
    fn runs(&self, series: &Series) -> Vec<Vec<(i32, i32)>> {
        let shown = |&(x, y): &(f64, f64)| {
            let visible = self.x.position(x).is_finite() && self.y.position(y).is_finite();
            visible.then(|| (self.across(x), self.up(y)))
        };
        let mut runs = Vec::new();
        for run in series.points.iter().map(shown).collect::<Vec<_>>().split(Option::is_none) {
            let mut points: Vec<(i32, i32)> = run.iter().flatten().copied().collect();
            if series.stroke == Stroke::Steps {
                points = staircase(&points);
            }
            if !points.is_empty() {
                runs.push(thin(&points));
            }
        }
        runs
    }

    fn labels(&self, x_label: &str) -> Drawing {
        let middle = ((self.left() + self.right()) / 2, (self.top() + self.bottom()) / 2);
        self.canvas.text(&self.panel.title, (self.left(), self.corner.1 + 26), PANEL_TITLE)?;
        self.canvas.text(x_label, (middle.0, self.bottom() + 46), LABEL.anchor(HPos::Center))?;
        self.canvas.text(
            &self.panel.y_label,
            (self.corner.0 + 26, middle.1),
            LABEL.anchor(HPos::Center).upwards(),
        )
    }

    /// In the line of the title, from the right.
    fn legend(&self) -> Drawing {
        let named: Vec<&Series> =
            self.panel.series.iter().filter(|s| s.stroke != Stroke::Faint && !s.points.is_empty()).collect();
        if named.len() < 2 {
            return Ok(());
        }
        let y = self.corner.1 + 26;
        let mut right = self.right();
        for series in named.into_iter().rev() {
            self.canvas.text(&series.name, (right, y), LABEL.anchor(HPos::Right))?;
            let end = right - LABEL.width(&series.name) - 4;
            let (color, width) = stroke(series);
            self.canvas.line(vec![(end - 28, y), (end, y)], color, width + 1)?;
            right = end - 28 - 22;
        }
        Ok(())
    }
}

fn stroke(series: &Series) -> (RGBAColor, u32) {
    let color = PALETTE[series.color % PALETTE.len()];
    match series.stroke {
        Stroke::Faint => (color.mix(0.3), 1),
        Stroke::Line | Stroke::Steps => (color.to_rgba(), 2),
    }
}

fn staircase(points: &[(i32, i32)]) -> Vec<(i32, i32)> {
    let mut stairs = Vec::with_capacity(2 * points.len());
    for &(x, y) in points {
        if let Some(&(_, before)) = stairs.last() {
            stairs.push((x, before));
        }
        stairs.push((x, y));
    }
    stairs
}

fn thin(points: &[(i32, i32)]) -> Vec<(i32, i32)> {
    let mut thinned = Vec::new();
    for column in points.chunk_by(|a, b| a.0 == b.0) {
        let extremes = [column.first(), column.iter().min(), column.iter().max(), column.last()];
        for point in extremes.into_iter().flatten() {
            if thinned.last() != Some(point) {
                thinned.push(*point);
            }
        }
    }
    thinned
}

/// The means of `bins` runs of points that are equally long; points that are not finite do not count.
fn binned_mean(points: &[(f64, f64)], bins: usize) -> Vec<(f64, f64)> {
    let finite: Vec<(f64, f64)> =
        points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    let length = finite.len().div_ceil(bins).max(1);
    let mean = |run: &[(f64, f64)]| {
        let (x, y) = run.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (x / run.len() as f64, y / run.len() as f64)
    };
    finite.chunks(length).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(figure: &Figure) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("curves.svg");
        figure.write(&path).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    fn figure(points: Vec<(f64, f64)>, scale: Scale, stroke: Stroke) -> Figure {
        let series = Series { name: "one".into(), points, stroke, color: 0 };
        let panel = Panel {
            title: "Loss".into(),
            y_label: "nats".into(),
            scale,
            unit: Unit::Number,
            series: vec![series],
        };
        Figure { title: "A & B <run>".into(), x_label: "step".into(), panels: vec![panel], marks: Vec::new() }
    }

    /// The curves of a picture: its polylines in a colour of the palette, two pixels wide.
    fn curves(svg: &str) -> Vec<&str> {
        svg.lines().filter(|l| l.starts_with("<polyline") && l.contains("stroke-width=\"2\"")).collect()
    }

    #[test]
    fn a_run_becomes_four_labelled_panels() {
        let over = |f: fn(f64) -> f64| (0..100).map(|i| (f64::from(i), f(f64::from(i)))).collect();
        let history = History {
            loss: over(|x| 2.0 / (1.0 + x)),
            accuracy: over(|x| x / 120.0),
            ema_accuracy: over(|x| x / 110.0),
            learning_rate: over(|x| 0.1 - 0.001 * x),
            image_size: over(|x| if x < 50.0 { 128.0 } else { 160.0 }),
        };
        let marks = [0.0, 50.0, 400.0].map(|at| Mark { at, label: format!("from {at}") });
        let svg = drawn(&Figure::training("EfficientNetV2-B0", "epoch", history, marks.to_vec()));
        assert_eq!(curves(&svg).len(), 5);
        for text in [
            "EfficientNetV2-B0",
            "Training loss",
            "Validation accuracy",
            "Learning rate",
            "Image size",
            "EMA of weights",
            "from 50",
        ] {
            assert!(svg.contains(text), "{text}");
        }
        assert_eq!(svg.matches("epoch").count(), 4);
        assert_eq!(svg.matches("opacity=\"0.45\"").count(), 4 * 2, "the third mark is outside of the range");
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"));
    }

    #[test]
    fn titles_are_escaped() {
        let svg = drawn(&figure(vec![(0.0, 1.0), (1.0, 2.0)], Scale::Linear, Stroke::Line));
        assert!(svg.contains("A &amp; B &lt;run&gt;"));
    }

    #[test]
    fn values_that_cannot_be_shown_leave_gaps() {
        let points =
            || vec![(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, 1.0), (4.0, -2.0), (5.0, 1.0), (6.0, 3.0)];
        assert_eq!(curves(&drawn(&figure(points(), Scale::Linear, Stroke::Line))).len(), 2);
        let svg = drawn(&figure(points(), Scale::Log, Stroke::Line));
        assert_eq!((curves(&svg).len(), svg.matches("<circle").count()), (2, 1));
        for empty in [vec![], vec![(0.0, f64::NAN)], vec![(f64::INFINITY, 1.0)]] {
            let svg = drawn(&figure(empty, Scale::Linear, Stroke::Line));
            assert!(svg.contains("no data yet") && curves(&svg).is_empty());
        }
    }

    #[test]
    fn long_curves_stay_small_and_keep_their_peaks() {
        let mut points: Vec<(f64, f64)> = (0..200_000).map(|i| (f64::from(i), f64::from(i % 7))).collect();
        points[123_456].1 = 100.0;
        let svg = drawn(&figure(points, Scale::Linear, Stroke::Line));
        assert!(svg.len() < 60_000, "{} bytes", svg.len());
        let heights = |curve: &str| -> Vec<i32> {
            let points = curve.split("points=\"").nth(1).unwrap().trim_end_matches("\"/>").trim();
            points.split(' ').map(|point| point.split(',').nth(1).unwrap().parse().unwrap()).collect()
        };
        let heights = heights(curves(&svg)[0]);
        let peak = *heights.iter().min().unwrap();
        assert_eq!(heights.iter().filter(|&&y| y == peak).count(), 1);
        assert!(peak < heights[0] - 200, "the peak is lost");
    }

    #[test]
    fn strokes() {
        assert_eq!(staircase(&[(0, 5), (4, 5), (6, 9)]), [(0, 5), (4, 5), (4, 5), (6, 5), (6, 9)]);
        assert_eq!(thin(&[(1, 5), (1, 9), (1, 2), (1, 4), (2, 3)]), [(1, 5), (1, 2), (1, 9), (1, 4), (2, 3)]);
        let points = [(0.0, 1.0), (1.0, 3.0), (2.0, f64::NAN), (3.0, 5.0), (5.0, 7.0), (6.0, 8.0)];
        assert_eq!(binned_mean(&points, 3), [(0.5, 2.0), (4.0, 6.0), (6.0, 8.0)]);
    }
}
