//! Which pixels make one of a resized image, and with what weights.
//!
//! An output pixel's centre lies at first + (o + ½)·scale of the source, scale being source pixels for each output pixel. The
//! pixels around it count by the filter of their distance, which is measured in pixels, or with antialiasing in
//! max(scale, 1) pixels; then the weights are divided by their sum. They are rounded to integers with as many binary places as
//! let the largest of an axis fit 15 bits, 21 at most. All of this is as in fast_image_resize, which the CPU pipeline uses,
//! so that both make the same bits.

use crate::data::transform::{Filter, Resampling};

/// Where the taps of an axis lie among all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    /// The word where they begin.
    pub(super) at: usize,
    /// The first source pixel that is read, and the one past the last.
    pub(super) first: usize,
    pub(super) end: usize,
    /// Weights of all output pixels together, and their binary places.
    pub(super) weights: usize,
    pub(super) shift: u32,
}

/// The most pixels that count for one, in each direction, where the source has `scale` pixels for each of the output.
fn radius(scale: f64, resampling: Resampling) -> f64 {
    support(resampling.filter) * stretch(scale, resampling)
}

fn support(filter: Filter) -> f64 {
    match filter {
        Filter::Bilinear => 1.0,
        Filter::Bicubic => 2.0,
    }
}

fn stretch(scale: f64, resampling: Resampling) -> f64 {
    if resampling.antialias { scale.max(1.0) } else { 1.0 }
}

/// The weight at a distance: a triangle, or Keys' cubic with a = −½.
fn weight(filter: Filter, distance: f64) -> f64 {
    let x = distance.abs();
    match filter {
        Filter::Bilinear => (1.0 - x).max(0.0),
        Filter::Bicubic if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        Filter::Bicubic if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
        Filter::Bicubic => 0.0,
    }
}

/// Words of an axis, at most, for sources up to `largest` pixels.
pub(super) fn most_words(side: usize, largest: usize, resampling: Resampling) -> usize {
    let taps = 2 * radius(largest as f64 / side as f64, resampling).ceil() as usize + 1;
    2 * (side + 1) + side * taps.min(largest)
}

/// Appends the taps that make `side` pixels of the `length` ones from `first` on, of `whole`: for each output pixel, and one
/// past the last, its first pixel and the word where its weights begin, and then all weights.
pub(super) fn append(
    words: &mut Vec<u32>,
    (first, length): (usize, usize),
    whole: usize,
    side: usize,
    resampling: Resampling,
) -> Axis {
    let scale = length as f64 / side as f64;
    let (radius, distances) = (radius(scale, resampling), 1.0 / stretch(scale, resampling));
    let mut taps = Vec::with_capacity(side);
    for o in 0..side {
        let centre = first as f64 + (o as f64 + 0.5) * scale;
        let low = (centre - radius).floor().max(0.0) as usize;
        let high = ((centre + radius).ceil() as usize).min(whole);
        let of = |pixel| weight(resampling.filter, (pixel as f64 - (centre - 0.5)) * distances);
        let all: Vec<f64> = (low..high).map(of).collect();
        let sum: f64 = all.iter().sum();
        // Pixels at the ends that do not count are not read.
        let zeros = all.iter().take_while(|&&w| w == 0.0).count();
        let used = all.iter().rposition(|&w| w != 0.0).map_or(zeros, |last| last + 1);
        let weights: Vec<f64> = all[zeros..used].iter().map(|w| w / sum).collect();
        taps.push((low + zeros, weights));
    }
    let largest = taps.iter().flat_map(|(_, weights)| weights).copied().fold(0.0, f64::max);
    let fits = |shift: &u32| (largest * f64::from(1_u32 << shift)).round() < 32_768.0;
    let shift = (0..22).rev().find(fits).unwrap_or(0);
    let at = words.len();
    let mut begin = at + 2 * (side + 1);
    for (start, weights) in &taps {
        words.extend([*start as u32, begin as u32]);
        begin += weights.len();
    }
    words.extend([0, begin as u32]);
    let integer = |w: &f64| ((w * f64::from(1_u32 << shift)).round() as i32).cast_unsigned();
    words.extend(taps.iter().flat_map(|(_, weights)| weights).map(integer));
    let weights = begin - at - 2 * (side + 1);
    let first = taps.iter().map(|(start, _)| *start).min().unwrap_or(0);
    let end = taps.iter().map(|(start, weights)| start + weights.len()).max().unwrap_or(first);
    Axis { at, first, end, weights, shift }
}
