//! The sixteen operations of RandAugment on 8-bit RGB pixels, in place: height × width × 3, row by row.
//!
//! Definitions as in google/automl (`autoaugment.py`), with three repairs that [`RandAugment`](super::RandAugment)
//! explains: `solarize` does not wrap around, `posterize` keeps at least one bit, `contrast` blends towards the mean.

/// The value that appears where an operation has nothing to show.
pub const FILL: u8 = 128;

/// The luma of ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B, rounded.
fn luma(rgb: &[u8]) -> u8 {
    let [r, g, b] = [rgb[0], rgb[1], rgb[2]].map(u32::from);
    ((299 * r + 587 * g + 114 * b + 500) / 1000) as u8
}

/// a + factor · (b − a), clipped to 0..=255, the fraction cut off.
fn blend(a: u8, b: u8, factor: f32) -> u8 {
    let (a, b) = (f32::from(a), f32::from(b));
    // `as` clips and cuts off.
    (a + factor * (b - a)) as u8
}

fn map(pixels: &mut [u8], function: impl Fn(u8) -> u8) {
    for value in pixels {
        *value = function(*value);
    }
}

/// Maps each of the three channels by a table made from its histogram.
fn map_channels(pixels: &mut [u8], table: impl Fn(&[u32; 256]) -> [u8; 256]) {
    for channel in 0..3 {
        let mut histogram = [0; 256];
        for rgb in pixels.chunks_exact(3) {
            histogram[usize::from(rgb[channel])] += 1;
        }
        let table = table(&histogram);
        for rgb in pixels.chunks_exact_mut(3) {
            rgb[channel] = table[usize::from(rgb[channel])];
        }
    }
}

const IDENTITY: [u8; 256] = {
    let mut table = [0; 256];
    let mut value = 0;
    while value < 256 {
        table[value] = value as u8;
        value += 1;
    }
    table
};

/// 255 − v.
pub fn invert(pixels: &mut [u8]) {
    map(pixels, |value| !value);
}

/// Keeps the upper `bits` bits of each value, 1 to 8.
pub fn posterize(pixels: &mut [u8], bits: u32) {
    let mask = (0xff00u16 >> bits.clamp(1, 8)) as u8;
    map(pixels, |value| value & mask);
}

/// Inverts the values that are not below `threshold`; from 256 on there are none.
pub fn solarize(pixels: &mut [u8], threshold: u32) {
    map(pixels, |value| if u32::from(value) < threshold { value } else { !value });
}

/// Adds to the values below 128.
pub fn solarize_add(pixels: &mut [u8], addend: u8) {
    map(pixels, |value| if value < 128 { value.saturating_add(addend) } else { value });
}

/// Stretches each channel to the full range; a channel of one value stays.
pub fn auto_contrast(pixels: &mut [u8]) {
    map_channels(pixels, |histogram| {
        let low = histogram.iter().position(|&count| count > 0).unwrap_or(0);
        let high = histogram.iter().rposition(|&count| count > 0).unwrap_or(0);
        if high <= low {
            return IDENTITY;
        }
        std::array::from_fn(|value| ((value.clamp(low, high) - low) * 255 / (high - low)) as u8)
    });
}

/// Flattens the histogram of each channel: with step = (N − count of the largest value) / 255, a value becomes
/// (count of all smaller values + step / 2) / step. A channel with step 0 stays.
pub fn equalize(pixels: &mut [u8]) {
    map_channels(pixels, |histogram| {
        let total: u32 = histogram.iter().sum();
        let last = histogram.iter().rev().find(|&&count| count > 0).copied().unwrap_or(0);
        let step = (total - last) / 255;
        if step == 0 {
            return IDENTITY;
        }
        let mut smaller = 0;
        std::array::from_fn(|value| {
            let level = if value == 0 { 0 } else { (smaller + step / 2) / step };
            smaller += histogram[value];
            level.min(255) as u8
        })
    });
}

/// Blends from grey (factor 0) to the image (1) and beyond.
pub fn color(pixels: &mut [u8], factor: f32) {
    for rgb in pixels.chunks_exact_mut(3) {
        let grey = luma(rgb);
        map(rgb, |value| blend(grey, value, factor));
    }
}

/// Blends from the mean luma of the image (factor 0) to the image (1) and beyond.
pub fn contrast(pixels: &mut [u8], factor: f32) {
    let count = (pixels.len() / 3).max(1) as u64;
    let sum: u64 = pixels.chunks_exact(3).map(|rgb| u64::from(luma(rgb))).sum();
    let mean = ((sum + count / 2) / count) as u8;
    map(pixels, |value| blend(mean, value, factor));
}

/// Blends from black (factor 0) to the image (1) and beyond.
pub fn brightness(pixels: &mut [u8], factor: f32) {
    map(pixels, |value| blend(0, value, factor));
}

/// Blends from the image smoothed by the 3×3 kernel of ones with 5 in the middle, over 13 (factor 0), to the image (1)
/// and beyond. The pixels of the border stay.
pub fn sharpness(pixels: &mut [u8], width: usize, factor: f32) {
    let height = pixels.len() / 3 / width;
    let source = pixels.to_vec();
    for y in 1..height.saturating_sub(1) {
        for x in 1..width.saturating_sub(1) {
            for channel in 0..3 {
                let at = |x: usize, y: usize| u32::from(source[(y * width + x) * 3 + channel]);
                let around: u32 = (0..9).map(|i| at(x + i % 3 - 1, y + i / 3 - 1)).sum();
                let smooth = (around + 4 * at(x, y)) / 13;
                let value = &mut pixels[(y * width + x) * 3 + channel];
                *value = blend(smooth as u8, *value, factor);
            }
        }
    }
}

/// Sets pixel (x, y) to the nearest one to (a·x + b·y + c, d·x + e·y + f), or [`FILL`] if that is outside.
fn warp(pixels: &mut [u8], width: usize, [a, b, c, d, e, f]: [f32; 6]) {
    let height = pixels.len() / 3 / width;
    let source = pixels.to_vec();
    for (position, rgb) in pixels.chunks_exact_mut(3).enumerate() {
        let (x, y) = ((position % width) as f32, (position / width) as f32);
        let from_x = (a * x + b * y + c + 0.5).floor();
        let from_y = (d * x + e * y + f + 0.5).floor();
        let inside = from_x >= 0.0 && from_y >= 0.0 && from_x < width as f32 && from_y < height as f32;
        if inside {
            let from = (from_y as usize * width + from_x as usize) * 3;
            rgb.copy_from_slice(&source[from..from + 3]);
        } else {
            rgb.fill(FILL);
        }
    }
}

/// Turns the image about its centre, counterclockwise for positive degrees.
pub fn rotate(pixels: &mut [u8], width: usize, degrees: f32) {
    let height = pixels.len() / 3 / width;
    let (sin, cos) = degrees.to_radians().sin_cos();
    let (center_x, center_y) = ((width as f32 - 1.0) / 2.0, (height as f32 - 1.0) / 2.0);
    let from_x = center_x - cos * center_x + sin * center_y;
    let from_y = center_y - sin * center_x - cos * center_y;
    warp(pixels, width, [cos, -sin, from_x, sin, cos, from_y]);
}

/// Moves row y to the left by `level` · y pixels.
pub fn shear_x(pixels: &mut [u8], width: usize, level: f32) {
    warp(pixels, width, [1.0, level, 0.0, 0.0, 1.0, 0.0]);
}

/// Moves column x up by `level` · x pixels.
pub fn shear_y(pixels: &mut [u8], width: usize, level: f32) {
    warp(pixels, width, [1.0, 0.0, 0.0, level, 1.0, 0.0]);
}

/// Moves the image to the left.
pub fn translate_x(pixels: &mut [u8], width: usize, distance: f32) {
    warp(pixels, width, [1.0, 0.0, distance, 0.0, 1.0, 0.0]);
}

/// Moves the image up.
pub fn translate_y(pixels: &mut [u8], width: usize, distance: f32) {
    warp(pixels, width, [1.0, 0.0, 0.0, 0.0, 1.0, distance]);
}

/// Fills the square of `2 * half` pixels a side around (x, y), as far as it is inside the image.
pub fn cutout(pixels: &mut [u8], width: usize, (x, y): (usize, usize), half: usize) {
    let columns = x.saturating_sub(half)..(x + half).min(width);
    for row in pixels
        .chunks_exact_mut(width * 3)
        .skip(y.saturating_sub(half))
        .take(y + half - y.saturating_sub(half))
    {
        row[columns.start * 3..columns.end * 3].fill(FILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Grey pixels in, grey pixels out.
    fn on_grey(grey: &[u8], operation: impl Fn(&mut [u8])) -> Vec<u8> {
        let mut pixels: Vec<u8> = grey.iter().flat_map(|&value| [value; 3]).collect();
        operation(&mut pixels);
        assert!(pixels.chunks_exact(3).all(|rgb| rgb[0] == rgb[1] && rgb[1] == rgb[2]), "{pixels:?}");
        pixels.chunks_exact(3).map(|rgb| rgb[0]).collect()
    }

    /// 0 1 2 / 3 4 5 / 6 7 8, for geometry.
    fn on_square(operation: impl Fn(&mut [u8])) -> Vec<u8> {
        on_grey(&[0, 1, 2, 3, 4, 5, 6, 7, 8], operation)
    }

    /// Figures of google/automl's code on TensorFlow 2.15.1.
    #[test]
    fn posterize_known_answers() {
        let values = [0, 100, 200, 255];
        assert_eq!(on_grey(&values, |p| posterize(p, 2)), [0, 64, 192, 192]);
        assert_eq!(on_grey(&values, |p| posterize(p, 4)), [0, 96, 192, 240]);
        assert_eq!(on_grey(&values, |p| posterize(p, 8)), values);
        assert_eq!(on_grey(&values, |p| posterize(p, 0)), [0, 0, 128, 128]);
    }

    /// TensorFlow's figures for 128, and for what its wrapped 256 is: 0. Ours leaves everything below 256 alone.
    #[test]
    fn solarize_known_answers() {
        let values = [0, 100, 200, 255];
        assert_eq!(on_grey(&values, |p| solarize(p, 128)), [0, 100, 55, 0]);
        assert_eq!(on_grey(&[127, 128], |p| solarize(p, 128)), [127, 127]);
        assert_eq!(on_grey(&values, |p| solarize(p, 0)), [255, 155, 55, 0]);
        assert_eq!(on_grey(&values, |p| solarize(p, 256)), values);
    }

    #[test]
    fn solarize_add_leaves_the_bright_half() {
        assert_eq!(on_grey(&[0, 100, 127, 128, 250], |p| solarize_add(p, 110)), [110, 210, 237, 128, 250]);
        assert_eq!(on_grey(&[127], |p| solarize_add(p, 220)), [255]);
    }

    #[test]
    fn invert_turns_every_value() {
        assert_eq!(on_grey(&[0, 1, 128, 255], invert), [255, 254, 127, 0]);
    }

    #[test]
    fn auto_contrast_stretches_each_channel_by_itself() {
        // Red 50..=100: (v − 50) · 255 / 50. Green constant. Blue 0..=255 already.
        let mut pixels = [50, 7, 0, 60, 7, 10, 100, 7, 255];
        auto_contrast(&mut pixels);
        assert_eq!(pixels, [0, 7, 0, 51, 7, 10, 255, 7, 255]);
    }

    #[test]
    fn equalize_follows_the_cumulative_histogram() {
        // 510 pixels: 255 of value 10, 127 of 20, 128 of 30. step = (510 − 128) / 255 = 1, so a value becomes the count
        // of smaller ones, at most 255: 10 → 0, 20 → 255, 30 → 255.
        let grey: Vec<u8> = [(10, 255), (20, 127), (30, 128)].iter().flat_map(|&(v, n)| vec![v; n]).collect();
        let expected: Vec<u8> = [(0, 255), (255, 255)].iter().flat_map(|&(v, n)| vec![v; n]).collect();
        assert_eq!(on_grey(&grey, equalize), expected);
        // 1020 pixels, 204 of them the largest value: step = 3. (203 + 1) / 3 = 68, (407 + 1) / 3 = 136,
        // (611 + 1) / 3 = 204, (816 + 1) / 3 = 272, clipped.
        let counts = [203, 204, 204, 205, 204];
        let spread = |values: [u8; 5]| -> Vec<u8> {
            values.iter().zip(counts).flat_map(|(&value, count)| vec![value; count]).collect()
        };
        assert_eq!(on_grey(&spread([0, 9, 18, 27, 36]), equalize), spread([0, 68, 136, 204, 255]));
        // Too few pixels for a step of 1.
        assert_eq!(on_grey(&[3, 9, 27], equalize), [3, 9, 27]);
    }

    #[test]
    fn color_blends_with_luma() {
        // luma(100, 50, 200) = 29.9 + 29.35 + 22.8 = 82.05.
        let blended = |factor| {
            let mut pixels = [100, 50, 200];
            color(&mut pixels, factor);
            pixels
        };
        assert_eq!(blended(0.0), [82; 3]);
        assert_eq!(blended(1.0), [100, 50, 200]);
        assert_eq!(blended(0.5), [91, 66, 141]);
        // 82 + 2 · 18, 82 − 2 · 32, 82 + 2 · 118 clipped.
        assert_eq!(blended(2.0), [118, 18, 255]);
    }

    #[test]
    fn contrast_blends_with_the_mean() {
        // Mean of 10, 20, 90 is 40.
        assert_eq!(on_grey(&[10, 20, 90], |p| contrast(p, 0.0)), [40; 3]);
        assert_eq!(on_grey(&[10, 20, 90], |p| contrast(p, 0.5)), [25, 30, 65]);
        assert_eq!(on_grey(&[10, 20, 90], |p| contrast(p, 2.0)), [0, 0, 140]);
    }

    #[test]
    fn brightness_scales_and_clips() {
        assert_eq!(on_grey(&[0, 10, 33, 200], |p| brightness(p, 1.5)), [0, 15, 49, 255]);
        assert_eq!(on_grey(&[0, 10, 33, 200], |p| brightness(p, 0.1)), [0, 1, 3, 20]);
    }

    #[test]
    fn sharpness_touches_only_the_inside() {
        // The middle: smooth = (8 · 10 + 5 · 140) / 13 = 60.
        let grey = [10, 10, 10, 10, 140, 10, 10, 10, 10];
        let middle = |factor| {
            let result = on_grey(&grey, |p| sharpness(p, 3, factor));
            assert!(result.iter().enumerate().all(|(i, &v)| i == 4 || v == 10), "{result:?}");
            result[4]
        };
        assert_eq!([middle(0.0), middle(0.5), middle(1.0), middle(2.0)], [60, 100, 140, 220]);
        assert_eq!(on_grey(&[1, 2, 3, 4], |p| sharpness(p, 2, 0.0)), [1, 2, 3, 4]);
    }

    #[test]
    fn rotate_by_right_angles_is_exact() {
        assert_eq!(on_square(|p| rotate(p, 3, 90.0)), [2, 5, 8, 1, 4, 7, 0, 3, 6]);
        assert_eq!(on_square(|p| rotate(p, 3, -90.0)), [6, 3, 0, 7, 4, 1, 8, 5, 2]);
        assert_eq!(on_square(|p| rotate(p, 3, 180.0)), [8, 7, 6, 5, 4, 3, 2, 1, 0]);
        assert_eq!(on_grey(&[1, 2, 3, 4], |p| rotate(p, 2, 90.0)), [2, 4, 1, 3]);
        // At 45° the corners come from 1.41 pixels off the centre: outside. An edge comes from a diagonal at 0.71.
        assert_eq!(on_square(|p| rotate(p, 3, 45.0)), [1, 2, 5, 0, 4, 8, 3, 6, 7]);
    }

    #[test]
    fn shear_moves_rows_and_columns_in_proportion() {
        assert_eq!(on_square(|p| shear_x(p, 3, 1.0)), [0, 1, 2, 4, 5, FILL, 8, FILL, FILL]);
        assert_eq!(on_square(|p| shear_x(p, 3, -1.0)), [0, 1, 2, FILL, 3, 4, FILL, FILL, 6]);
        assert_eq!(on_square(|p| shear_y(p, 3, 1.0)), [0, 4, 8, 3, 7, FILL, 6, FILL, FILL]);
    }

    #[test]
    fn translate_moves_by_the_nearest_whole_pixel() {
        assert_eq!(on_square(|p| translate_x(p, 3, 1.2)), [1, 2, FILL, 4, 5, FILL, 7, 8, FILL]);
        assert_eq!(on_square(|p| translate_x(p, 3, 0.7)), [1, 2, FILL, 4, 5, FILL, 7, 8, FILL]);
        assert_eq!(on_square(|p| translate_x(p, 3, -2.0)), [FILL, FILL, 0, FILL, FILL, 3, FILL, FILL, 6]);
        assert_eq!(on_square(|p| translate_y(p, 3, 0.9)), [3, 4, 5, 6, 7, 8, FILL, FILL, FILL]);
        assert_eq!(on_square(|p| translate_y(p, 3, -7.0)), [FILL; 9]);
    }

    #[test]
    fn cutout_is_clipped_at_the_border() {
        assert_eq!(on_square(|p| cutout(p, 3, (1, 1), 1)), [FILL, FILL, 2, FILL, FILL, 5, 6, 7, 8]);
        assert_eq!(on_square(|p| cutout(p, 3, (0, 2), 1)), [0, 1, 2, FILL, 4, 5, FILL, 7, 8]);
        assert_eq!(on_square(|p| cutout(p, 3, (2, 0), 9)), [FILL; 9]);
        assert_eq!(on_square(|p| cutout(p, 3, (1, 1), 0)), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
    }
}
