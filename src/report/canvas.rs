//! A sheet of pixels to draw an SVG on: the few strokes that our pictures need, in one look.

use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::FontTransform;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::fs;
use std::path::Path;

/// Text and frames.
pub(super) const INK: RGBColor = RGBColor(32, 36, 42);
/// Axis labels and notes.
pub(super) const GREY: RGBColor = RGBColor(96, 103, 112);
/// Grid lines.
pub(super) const PALE: RGBColor = RGBColor(228, 231, 235);
/// Curves: the Okabe-Ito colours, told apart by colour-blind eyes too.
pub(super) const PALETTE: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

/// Plotters divides font sizes by this.
const PLOTTERS_FONT: f64 = 1.24;
/// Average width of a letter of a sans-serif font over its size; widths are estimates, the reader's font is unknown.
const LETTER: f64 = 0.55;

pub(super) type Drawing = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

pub(super) struct Canvas<'a> {
    area: DrawingArea<SVGBackend<'a>, Shift>,
}

/// How a text is set: its size in pixels, and which point of it lies at the given position.
#[derive(Clone, Copy)]
pub(super) struct Type {
    pub(super) size: u32,
    pub(super) bold: bool,
    pub(super) color: RGBColor,
    pub(super) anchor: HPos,
    /// Turned to read upwards; the anchor then counts along the text.
    pub(super) upwards: bool,
}

impl Type {
    pub(super) const fn new(size: u32) -> Self {
        Self { size, bold: false, color: INK, anchor: HPos::Left, upwards: false }
    }

    pub(super) const fn bold(self) -> Self {
        Self { bold: true, ..self }
    }

    pub(super) const fn color(self, color: RGBColor) -> Self {
        Self { color, ..self }
    }

    pub(super) const fn anchor(self, anchor: HPos) -> Self {
        Self { anchor, ..self }
    }

    pub(super) const fn upwards(self) -> Self {
        Self { upwards: true, ..self }
    }

    /// About how many pixels `text` is long.
    pub(super) fn width(&self, text: &str) -> i32 {
        let letter = if self.bold { LETTER * 1.12 } else { LETTER };
        (letter * f64::from(self.size) * text.chars().count() as f64).ceil() as i32
    }
}

impl Canvas<'_> {
    pub(super) fn text(&self, text: &str, at: (i32, i32), set: Type) -> Drawing {
        let weight = if set.bold { FontStyle::Bold } else { FontStyle::Normal };
        let font = FontDesc::new(FontFamily::SansSerif, f64::from(set.size) * PLOTTERS_FONT, weight);
        let turn = if set.upwards { FontTransform::Rotate270 } else { FontTransform::None };
        let style =
            TextStyle::from(font.transform(turn)).color(&set.color).pos(Pos::new(set.anchor, VPos::Center));
        self.area.draw(&Text::new(text, at, style))
    }

    pub(super) fn line(&self, points: Vec<(i32, i32)>, color: RGBAColor, width: u32) -> Drawing {
        self.area.draw(&PathElement::new(points, color.stroke_width(width)))
    }

    pub(super) fn dot(&self, at: (i32, i32), color: RGBAColor, radius: i32) -> Drawing {
        self.area.draw(&Circle::new(at, radius, color.filled()))
    }

    pub(super) fn fill(&self, corners: [(i32, i32); 2], color: RGBColor) -> Drawing {
        self.area.draw(&Rectangle::new(corners, color.filled()))
    }

    pub(super) fn frame(&self, corners: [(i32, i32); 2], color: RGBColor) -> Drawing {
        self.area.draw(&Rectangle::new(corners, color.stroke_width(1)))
    }
}

/// Draws a white sheet of `size` pixels and saves it at `path`.
pub(super) fn save(path: &Path, size: (u32, u32), draw: impl FnOnce(&Canvas<'_>) -> Drawing) -> Result<()> {
    let mut svg = String::new();
    render(&mut svg, size, draw).map_err(|error| Error::file(path, format!("cannot be drawn: {error}")))?;
    fs::write(path, svg).map_err(Error::io(path, "write"))
}

fn render(svg: &mut String, size: (u32, u32), draw: impl FnOnce(&Canvas<'_>) -> Drawing) -> Drawing {
    let canvas = Canvas { area: SVGBackend::with_string(svg, size).into_drawing_area() };
    canvas.area.fill(&WHITE)?;
    draw(&canvas)?;
    canvas.area.present()
}
