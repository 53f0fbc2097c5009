//! The confusion matrix of a classifier: rows are true classes, columns predicted ones.

use super::canvas::{self, Canvas, Drawing, GREY, INK, PALE, Type};
use super::table::{percent, thousands};
use crate::{Error, Result};
use plotters::style::text_anchor::HPos;
use plotters::style::{RGBColor, WHITE};
use std::path::Path;

/// Classes up to which cells show their counts.
const NUMBERED: usize = 40;
/// Cells a side, at most: of more classes, several share a cell.
const CELLS: usize = 250;
/// Letters of a class name, at most.
const NAME: usize = 20;

const TITLE: Type = Type::new(24).bold();
const LABEL: Type = Type::new(18).color(GREY);
const CLASS: Type = Type::new(15);
const TICK: Type = Type::new(14).color(GREY);

/// The scale of colours, from a share of 0 to 1 at equal distances of its cube root: one error in hundreds must show.
const COLORS: [RGBColor; 5] = [
    RGBColor(255, 255, 255),
    RGBColor(214, 230, 244),
    RGBColor(127, 184, 218),
    RGBColor(40, 121, 185),
    RGBColor(8, 48, 107),
];

/// How often which class was taken for which.
#[derive(Clone, Debug)]
pub struct ConfusionMatrix {
    classes: Vec<String>,
    counts: Vec<u64>,
}

impl ConfusionMatrix {
    /// An empty matrix for the classes of these names.
    ///
    /// # Errors
    /// [`Error::Shape`] for fewer than two classes.
    pub fn new(classes: Vec<String>) -> Result<Self> {
        if classes.len() < 2 {
            return Err(shape(format!("needs two classes or more, not {}", classes.len())));
        }
        let counts = vec![0; classes.len() * classes.len()];
        Ok(Self { classes, counts })
    }

    /// Counts an image of class `truth` that was taken for `predicted`; both are numbered from 0.
    ///
    /// # Errors
    /// [`Error::Shape`] for a class that does not exist.
    pub fn record(&mut self, truth: usize, predicted: usize) -> Result<()> {
        let n = self.classes.len();
        if truth >= n || predicted >= n {
            return Err(shape(format!("class {} of {n}, numbered from 0", truth.max(predicted))));
        }
        self.counts[truth * n + predicted] += 1;
        Ok(())
    }

    /// How many images of class `truth` were taken for `predicted`; 0 for classes that do not exist.
    pub fn count(&self, truth: usize, predicted: usize) -> u64 {
        let n = self.classes.len();
        if truth < n && predicted < n { self.counts[truth * n + predicted] } else { 0 }
    }

    /// All images counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Images taken for what they are.
    pub fn correct(&self) -> u64 {
        self.counts.iter().step_by(self.classes.len() + 1).sum()
    }

    /// The share of images taken for what they are; `None` when there are none.
    pub fn accuracy(&self) -> Option<f64> {
        share(self.correct(), self.total())
    }

    /// The share of the images of `class` that were recognised; `None` when there are none.
    pub fn recall(&self, class: usize) -> Option<f64> {
        share(self.count(class, class), (0..self.classes.len()).map(|other| self.count(class, other)).sum())
    }

    /// The share of the images taken for `class` that are of it; `None` when there are none.
    pub fn precision(&self, class: usize) -> Option<f64> {
        share(self.count(class, class), (0..self.classes.len()).map(|other| self.count(other, class)).sum())
    }

    /// Draws the matrix and saves it as SVG. A cell is coloured by its share of the images of its row, and shows its
    /// count up to 40 classes. Above 250 classes neighbours share a cell.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let picture = Picture::new(self);
        canvas::save(path, picture.size(), |canvas| picture.draw(canvas))
    }

    /// The matrix with every `group` classes made one.
    fn pooled(&self, group: usize) -> Vec<Vec<u64>> {
        let n = self.classes.len();
        let cells = n.div_ceil(group);
        let mut pooled = vec![vec![0; cells]; cells];
        for (i, &count) in self.counts.iter().enumerate() {
            pooled[i / n / group][i % n / group] += count;
        }
        pooled
    }
}

/// The matrix laid out in pixels.
struct Picture<'a> {
    matrix: &'a ConfusionMatrix,
    title: String,
    /// Classes in a cell, along a side.
    group: usize,
    cells: Vec<Vec<u64>>,
    /// Side of a cell.
    side: i32,
    /// A class is named every this many cells.
    every: usize,
    /// Whether the names of the columns are turned.
    turned: bool,
    /// Upper left corner of the cells.
    corner: (i32, i32),
    /// Space below the cells for the names.
    below: i32,
}

impl<'a> Picture<'a> {
    fn new(matrix: &'a ConfusionMatrix) -> Self {
        let group = matrix.classes.len().div_ceil(CELLS);
        let cells = matrix.pooled(group);
        let n = cells.len() as i32;
        let side = if cells.len() <= NUMBERED { (900 / n).clamp(30, 130) } else { (1000 / n).max(4) };
        let every = [1, 2, 5, 10, 20, 50].into_iter().find(|every| every * side >= 18).unwrap_or(50) as usize;
        let longest = matrix.classes.iter().map(|name| CLASS.width(&short(name))).max().unwrap_or(0);
        let turned = longest + 8 > side * every as i32;
        let title = match matrix.accuracy() {
            None => "Confusion matrix: no images".to_owned(),
            Some(accuracy) => format!(
                "{} of {} images recognised ({})",
                thousands(matrix.correct()),
                thousands(matrix.total()),
                percent(accuracy)
            ),
        };
        Self {
            matrix,
            title,
            group,
            cells,
            side,
            every,
            turned,
            corner: (58 + longest, 84),
            below: if turned { longest + 16 } else { 32 },
        }
    }

    fn extent(&self) -> i32 {
        self.side * self.cells.len() as i32
    }

    fn size(&self) -> (u32, u32) {
        let width = (self.corner.0 + self.extent() + 140).max(TITLE.width(&self.title) + 60);
        let height = self.corner.1 + self.extent() + self.below + 50 + if self.group > 1 { 28 } else { 0 };
        (width as u32, height as u32)
    }

    fn draw(&self, canvas: &Canvas<'_>) -> Drawing {
        canvas.text(&self.title, (28, 40), TITLE)?;
        self.cells(canvas)?;
        self.names(canvas)?;
        self.legend(canvas)
    }

    fn cells(&self, canvas: &Canvas<'_>) -> Drawing {
        let (left, top) = self.corner;
        let end = self.extent();
        // A gap of one pixel makes the grid, where there is room for one.
        let gap = i32::from(self.cells.len() <= NUMBERED);
        if gap == 1 {
            canvas.fill([(left, top), (left + end, top + end)], PALE)?;
        }
        for (y, row) in (top..).step_by(self.side as usize).zip(&self.cells) {
            let images: u64 = row.iter().sum();
            for (x, &count) in (left..).step_by(self.side as usize).zip(row) {
                let color = color(share(count, images).unwrap_or(0.0));
                if count > 0 || gap == 1 {
                    canvas.fill([(x + gap, y + gap), (x + self.side, y + self.side)], color)?;
                }
                if count > 0 && gap == 1 {
                    self.number(canvas, count, (x + self.side / 2, y + self.side / 2), color)?;
                }
            }
        }
        canvas.frame([(left, top), (left + end, top + end)], GREY)
    }

    fn number(&self, canvas: &Canvas<'_>, count: u64, centre: (i32, i32), behind: RGBColor) -> Drawing {
        let text = thousands(count);
        let fitting = f64::from(self.side) * 0.86 / (0.58 * text.len() as f64);
        let size = fitting.min(f64::from(self.side) * 0.42).clamp(7.0, 20.0) as u32;
        let ink = if luminance(behind) < 0.5 { WHITE } else { INK };
        canvas.text(&text, centre, Type::new(size).color(ink).anchor(HPos::Center))
    }

    fn names(&self, canvas: &Canvas<'_>) -> Drawing {
        let (left, top) = self.corner;
        let bottom = top + self.extent();
        for cell in (0..self.cells.len()).step_by(self.every) {
            let name = short(&self.matrix.classes[cell * self.group]);
            let middle = cell as i32 * self.side + self.side / 2;
            canvas.text(&name, (left - 8, top + middle), CLASS.anchor(HPos::Right))?;
            let column =
                if self.turned { CLASS.anchor(HPos::Right).upwards() } else { CLASS.anchor(HPos::Center) };
            canvas.text(&name, (left + middle, bottom + if self.turned { 8 } else { 16 }), column)?;
        }
        let middle = self.extent() / 2;
        canvas.text("true class", (24, top + middle), LABEL.anchor(HPos::Center).upwards())?;
        let under = bottom + self.below + 14;
        canvas.text("predicted class", (left + middle, under), LABEL.anchor(HPos::Center))?;
        if self.group > 1 {
            let note =
                format!("each cell holds {0} × {0} classes; its row is named by the first", self.group);
            canvas.text(&note, (left + middle, under + 28), TICK.anchor(HPos::Center))?;
        }
        Ok(())
    }

    /// The scale of colours, to the right of the cells.
    fn legend(&self, canvas: &Canvas<'_>) -> Drawing {
        const BANDS: i32 = 64;
        let (x, top) = (self.corner.0 + self.extent() + 30, self.corner.1);
        let height = self.extent().min(420);
        canvas.text("share of row", (x - 2, top - 22), TICK)?;
        for band in 0..BANDS {
            let root = (f64::from(BANDS - band) - 0.5) / f64::from(BANDS);
            let rows = (top + band * height / BANDS, top + (band + 1) * height / BANDS);
            canvas.fill([(x, rows.0), (x + 20, rows.1)], color(root.powi(3)))?;
        }
        canvas.frame([(x, top), (x + 20, top + height)], GREY)?;
        for share in [0.0, 0.001, 0.01, 0.05, 0.2, 0.5, 1.0_f64] {
            let y = top + ((1.0 - share.cbrt()) * f64::from(height)).round() as i32;
            canvas.text(&format!("{} %", 100.0 * share), (x + 28, y), TICK)?;
        }
        Ok(())
    }
}

fn share(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// The colour of a share in [0, 1].
fn color(share: f64) -> RGBColor {
    let at = share.cbrt() * (COLORS.len() - 1) as f64;
    let below = (at as usize).min(COLORS.len() - 2);
    let (from, to, t) = (COLORS[below], COLORS[below + 1], at - below as f64);
    let mix = |a: u8, b: u8| (f64::from(a) + t * (f64::from(b) - f64::from(a))).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// From 0, black, to 1, white.
fn luminance(color: RGBColor) -> f64 {
    (0.299 * f64::from(color.0) + 0.587 * f64::from(color.1) + 0.114 * f64::from(color.2)) / 255.0
}

/// A name cut to what fits beside the cells.
fn short(name: &str) -> String {
    if name.chars().count() <= NAME {
        return name.to_owned();
    }
    let mut cut: String = name.chars().take(NAME - 1).collect();
    cut.push('…');
    cut
}

fn shape(problem: String) -> Error {
    Error::Shape { operation: "confusion matrix", problem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(classes: usize, pairs: impl IntoIterator<Item = (usize, usize)>) -> ConfusionMatrix {
        let names = (0..classes).map(|class| format!("class {class}")).collect();
        let mut matrix = ConfusionMatrix::new(names).unwrap();
        for (truth, predicted) in pairs {
            matrix.record(truth, predicted).unwrap();
        }
        matrix
    }

    fn drawn(matrix: &ConfusionMatrix) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("confusion.svg");
        matrix.write(&path).unwrap();
        std::fs::read_to_string(path).unwrap()
    }

    /// Three images of class 0, one of them taken for 2; one of class 1 taken for 0; none of class 2.
    #[test]
    fn shares_by_hand() {
        let matrix = matrix(3, [(0, 0), (0, 2), (0, 0), (1, 0)]);
        assert_eq!(
            (matrix.count(0, 0), matrix.count(0, 2), matrix.count(2, 0), matrix.count(1, 0)),
            (2, 1, 0, 1)
        );
        assert_eq!((matrix.total(), matrix.correct(), matrix.accuracy()), (4, 2, Some(0.5)));
        assert_eq!([0, 1, 2].map(|class| matrix.recall(class)), [Some(2.0 / 3.0), Some(0.0), None]);
        assert_eq!([0, 1, 2].map(|class| matrix.precision(class)), [Some(2.0 / 3.0), None, Some(0.0)]);
    }

    #[test]
    fn misuse_is_an_error() {
        assert!(ConfusionMatrix::new(vec!["only".into()]).is_err());
        let mut matrix = matrix(3, []);
        assert!(matrix.record(3, 0).unwrap_err().to_string().contains("class 3 of 3"));
        assert!(matrix.record(0, 7).unwrap_err().to_string().contains("class 7 of 3"));
        assert_eq!((matrix.total(), matrix.count(3, 0), matrix.accuracy()), (0, 0, None));
    }

    #[test]
    fn few_classes_show_counts_and_names() {
        let pairs = (0..1234).map(|_| (0, 0)).chain((0..56).map(|_| (1, 0))).chain((0..78).map(|_| (1, 1)));
        let svg = drawn(&matrix(2, pairs));
        for text in
            ["1,234", "\n56\n", "\n78\n", "class 0", "class 1", "1,312 of 1,368 images recognised (95.91 %)"]
        {
            assert!(svg.contains(text), "{text}");
        }
        let hex = |c: RGBColor| format!("#{:02X}{:02X}{:02X}", c.0, c.1, c.2);
        assert!(svg.contains(&hex(color(56.0 / 134.0))), "the colour of the row's share");
        assert!(drawn(&matrix(2, [])).contains("no images"));
    }

    /// Above 40 classes no numbers; above 250 a bounded number of cells, however many are filled.
    #[test]
    fn many_classes_stay_readable() {
        let svg = drawn(&matrix(41, (0..41).flat_map(|class| vec![(class, class); 77])));
        assert!(!svg.contains("\n77\n"));
        assert!(svg.contains("class 40"));
        let full =
            matrix(1000, (0..1000).flat_map(|truth| (0..1000).map(move |predicted| (truth, predicted))));
        let svg = drawn(&full);
        assert!((62_500..62_700).contains(&svg.matches("<rect").count()));
        assert!(svg.matches("class ").count() < 130);
        assert!(svg.contains("4 × 4 classes"));
    }

    #[test]
    fn pooling_keeps_every_image() {
        let matrix = matrix(5, [(0, 0), (1, 1), (1, 4), (4, 4), (3, 2)]);
        assert_eq!(matrix.pooled(2), [[2, 0, 1], [0, 1, 0], [0, 0, 1]]);
        assert_eq!(matrix.pooled(1)[1], [0, 1, 0, 0, 1]);
    }

    #[test]
    fn colours_and_names() {
        assert_eq!((color(0.0), color(1.0), color(0.125)), (COLORS[0], COLORS[4], COLORS[2]));
        assert!(luminance(color(0.01)) < luminance(color(0.0)) - 0.05);
        assert_eq!(short("twenty letters long."), "twenty letters long.");
        assert_eq!(short("twenty-one letters ßß"), "twenty-one letters …");
    }
}
