//! The 1,797 UCI handwritten digits, embedded in the program: a first run that needs no download.
//!
//! E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", 1998, CC BY 4.0; see `digits/README.md`.
//! A fifth of each class is held out. Which fifth is fixed for good, whatever seed a training run has: figures of
//! different runs are measured on the same images, and no seed can leak one into training.

use super::draw::shuffle;
use super::{Dataset, Image, Problems, Splits};
use crate::Result;
use crate::random::{Purpose, Stream};
use std::sync::Arc;

const IMAGES: &[u8] = include_bytes!("digits/digits-images-8x8.u8");
const LABELS: &[u8] = include_bytes!("digits/digits-labels.u8");
const SIDE: usize = 8;
const INK: u16 = 16;
const SPLIT_SEED: u64 = 0;
/// One in this many of each class is held out.
const HELD_OUT: usize = 5;

/// One part of the digits. Its images are 8×8 with the ink bright, its classes `0` to `9`.
#[derive(Debug)]
pub struct Digits {
    rows: Vec<u32>,
    classes: Vec<String>,
    problems: Problems,
}

/// Training and held-out digits, split class by class.
pub fn open() -> Splits {
    let mut train = Vec::new();
    let mut validation = Vec::new();
    for class in 0..10 {
        let mut rows: Vec<u32> =
            (0..LABELS.len() as u32).filter(|&row| LABELS[row as usize] == class).collect();
        shuffle(&mut Stream::new(SPLIT_SEED, 0, u32::from(class), Purpose::Split), &mut rows);
        let held_out = rows.len() / HELD_OUT;
        validation.extend_from_slice(&rows[..held_out]);
        train.extend_from_slice(&rows[held_out..]);
    }
    Splits { train: Arc::new(Digits::new(train)), validation: Arc::new(Digits::new(validation)) }
}

impl Digits {
    fn new(mut rows: Vec<u32>) -> Self {
        rows.sort_unstable();
        Self {
            rows,
            classes: (0..10).map(|digit| digit.to_string()).collect(),
            problems: Problems::default(),
        }
    }
}

impl Dataset for Digits {
    fn name(&self) -> &str {
        "digits"
    }

    fn len(&self) -> usize {
        self.rows.len()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> u32 {
        u32::from(LABELS[self.rows[index] as usize])
    }

    fn image(&self, index: usize) -> Result<Image> {
        let start = self.rows[index] as usize * SIDE * SIDE;
        let ink = &IMAGES[start..start + SIDE * SIDE];
        let grey = ink.iter().map(|&value| ((u16::from(value) * 255 + INK / 2) / INK) as u8);
        Ok(Image::from_grey(SIDE, SIDE, grey))
    }

    fn problems(&self) -> &Problems {
        &self.problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_split_is_disjoint_complete_and_stratified() {
        let splits = open();
        assert_eq!(splits.train.len() + splits.validation.len(), 1797);
        for class in 0..10 {
            let count = |part: &dyn Dataset| (0..part.len()).filter(|&i| part.label(i) == class).count();
            let (train, held_out) = (count(&*splits.train), count(&*splits.validation));
            assert_eq!(held_out, (train + held_out) / 5, "class {class}");
        }
    }

    #[test]
    fn rows_do_not_overlap() {
        let mut seen = HashSet::new();
        let splits = open();
        for part in [&splits.train, &splits.validation] {
            for index in 0..part.len() {
                let image = part.image(index).unwrap();
                // No two of the digits are the same picture, so pictures identify rows.
                assert!(seen.insert(image.pixels), "image {index} appears twice");
            }
        }
    }

    #[test]
    fn the_first_digit_is_the_published_zero() {
        // The first row of the published test set begins 0,0,5,13,9,1,0,0 and shows a zero.
        let all = Digits::new((0..1797).collect());
        let image = all.image(0).unwrap();
        let first_row: Vec<u8> = image.pixels[..8 * 3].chunks_exact(3).map(|rgb| rgb[0]).collect();
        assert_eq!(first_row, [0, 0, 80, 207, 143, 16, 0, 0]);
        assert_eq!((all.label(0), image.width, image.height), (0, 8, 8));
        let brightest = (0..1797).flat_map(|i| all.image(i).unwrap().pixels).max();
        assert_eq!(brightest, Some(255));
    }
}
