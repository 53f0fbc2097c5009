//! JPEG and PNG to RGB, by content and never by name: ImageNet has PNGs called `.JPEG`, and JPEGs in CMYK.
//!
//! JPEG goes straight to its decoder, because that can read the header without the whole file and converts every
//! colour space (grey, YCbCr, RGB, CMYK, YCCK) to RGB. CMYK is taken to be stored inverted, as Adobe does and Pillow
//! assumes. PNG of any depth becomes 8 bits a channel; transparency is laid over mid grey, the fill value of the
//! augmentations, since the colour of a transparent pixel means nothing. The orientation in EXIF is applied.

use super::Image;
use crate::{Error, Result};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, RgbImage};
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Seek};
use std::path::Path;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZByteReaderTrait;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// More than any camera makes; a header that announces more is damaged, and must not be believed with memory.
const MAX_PIXELS: usize = 1 << 27;
const MID_GREY: u32 = 128;

/// Reads the header of `path` and no more: whether this is an image that we can decode, as far as the header tells.
pub(super) fn check_header(path: &Path) -> Result<()> {
    let mut file = BufReader::new(File::open(path).map_err(Error::io(path, "open"))?);
    let start = file.fill_buf().map_err(Error::io(path, "read"))?;
    header_size(sniff(start), file).map(drop).map_err(|problem| Error::file(path, problem))
}

/// Reads and decodes a JPEG or PNG file, told apart by content, to RGB.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::File`] if it is no image that can be decoded.
pub fn read(path: &Path) -> Result<Image> {
    let bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
    decode(&bytes).map_err(|problem| Error::file(path, problem))
}

/// Decodes a whole file that is in memory.
pub(super) fn decode(bytes: &[u8]) -> Result<Image, String> {
    let format = sniff(bytes);
    header_size(format, Cursor::new(bytes))?;
    let (mut image, orientation) = match format {
        Some(ImageFormat::Jpeg) => decode_jpeg(bytes)?,
        _ => decode_png(bytes).map_err(|error| error.to_string())?,
    };
    image.apply_orientation(orientation);
    let rgb = image.into_rgb8();
    Ok(Image { width: rgb.width() as usize, height: rgb.height() as usize, pixels: rgb.into_raw() })
}

fn sniff(start: &[u8]) -> Option<ImageFormat> {
    image::guess_format(start).ok()
}

/// Width and height, both at least 1, or why this cannot be decoded.
fn header_size(format: Option<ImageFormat>, input: impl BufRead + Seek) -> Result<(usize, usize), String> {
    let (width, height) = match format {
        Some(ImageFormat::Jpeg) => {
            let mut decoder = jpeg_decoder(input);
            decoder.decode_headers().map_err(|error| error.to_string())?;
            if let Some(ColorSpace::MultiBand(bands)) = decoder.input_colorspace() {
                return Err(format!("a JPEG of {bands} channels; convert it to RGB"));
            }
            decoder.dimensions().unwrap_or((0, 0))
        }
        Some(ImageFormat::Png) => {
            let (width, height) = ImageReader::with_format(input, ImageFormat::Png)
                .into_dimensions()
                .map_err(|error| error.to_string())?;
            (width as usize, height as usize)
        }
        Some(other) => {
            let name = other.extensions_str().first().unwrap_or(&"?");
            return Err(format!("{name} is not supported; convert it to JPEG or PNG"));
        }
        None => return Err("neither JPEG nor PNG by its content".to_owned()),
    };
    if width == 0 || height == 0 {
        return Err(format!("{width}x{height} pixels: the image is empty"));
    }
    if width.saturating_mul(height) > MAX_PIXELS {
        return Err(format!("{width}x{height} pixels: more than {MAX_PIXELS}; scale it down"));
    }
    Ok((width, height))
}

/// Lenient, as browsers are: stray bytes between segments are common in the wild.
fn jpeg_decoder<T: ZByteReaderTrait>(input: T) -> JpegDecoder<T> {
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::from(u16::MAX))
        .set_max_height(usize::from(u16::MAX))
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    JpegDecoder::new_with_options(input, options)
}

fn decode_jpeg(bytes: &[u8]) -> Result<(DynamicImage, Orientation), String> {
    if is_cut_short(bytes) {
        return Err("the file is cut short: no end-of-image marker".to_owned());
    }
    let mut decoder = jpeg_decoder(Cursor::new(bytes));
    let pixels = decoder.decode().map_err(|error| error.to_string())?;
    let orientation = decoder.exif().and_then(|exif| Orientation::from_exif_chunk(exif));
    let image = decoder
        .dimensions()
        .and_then(|(width, height)| RgbImage::from_raw(width as u32, height as u32, pixels))
        .ok_or("the decoder delivered fewer pixels than the header announces")?;
    Ok((image.into(), orientation.unwrap_or(Orientation::NoTransforms)))
}

/// Whether the end-of-image marker is missing after the first scan. A lenient decoder fills the missing part with
/// grey, and that must not be trained on. (A thumbnail's marker does not count: it lies in a segment before the scan.)
fn is_cut_short(jpeg: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xDA;
    let mut at = 2;
    while at + 4 <= jpeg.len() {
        match (jpeg[at], jpeg[at + 1]) {
            (0xFF, START_OF_SCAN) => return !jpeg[at..].windows(2).rev().any(|pair| pair == [0xFF, 0xD9]),
            // Fill bytes, strays, and markers without a length.
            (0xFF, 0xFF) => at += 1,
            (0xFF, 0x01 | 0xD0..=0xD8) => at += 2,
            (0xFF, _) => at += 2 + usize::from(u16::from_be_bytes([jpeg[at + 2], jpeg[at + 3]])),
            _ => at += 1,
        }
    }
    true
}

fn decode_png(bytes: &[u8]) -> image::ImageResult<(DynamicImage, Orientation)> {
    let mut decoder = ImageReader::with_format(Cursor::new(bytes), ImageFormat::Png).into_decoder()?;
    let orientation = decoder.orientation()?;
    let image = DynamicImage::from_decoder(decoder)?;
    if !image.color().has_alpha() {
        return Ok((image, orientation));
    }
    let rgba = image.into_rgba8();
    let rgb = RgbImage::from_fn(rgba.width(), rgba.height(), |x, y| {
        let [color @ .., alpha] = rgba.get_pixel(x, y).0;
        let alpha = u32::from(alpha);
        color.map(|c| ((u32::from(c) * alpha + MID_GREY * (255 - alpha) + 127) / 255) as u8).into()
    });
    Ok((rgb.into(), orientation))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, codecs::jpeg::JpegEncoder, codecs::png::PngEncoder};

    const CMYK: &[u8] = include_bytes!("../../tests/images/cmyk.jpg");
    const YCCK: &[u8] = include_bytes!("../../tests/images/ycck.jpg");
    const ROTATED: &[u8] = include_bytes!("../../tests/images/rotated.jpg");
    const PALETTE: &[u8] = include_bytes!("../../tests/images/palette.png");
    const BITS: &[u8] = include_bytes!("../../tests/images/bits.png");

    /// A PNG of one row.
    fn png(samples: &[u8], width: u32, color: ExtendedColorType) -> Vec<u8> {
        let mut file = Vec::new();
        PngEncoder::new(&mut file).write_image(samples, width, 1, color).unwrap();
        file
    }

    fn jpeg(samples: &[u8], width: u32, height: u32, color: ExtendedColorType) -> Vec<u8> {
        let mut file = Vec::new();
        JpegEncoder::new_with_quality(&mut file, 95).write_image(samples, width, height, color).unwrap();
        file
    }

    fn pixel(image: &Image, x: usize, y: usize) -> [u8; 3] {
        image.pixels[(y * image.width + x) * 3..][..3].try_into().unwrap()
    }

    fn assert_near(found: [u8; 3], expected: [u8; 3]) {
        let near = found.iter().zip(expected).all(|(&found, expected)| found.abs_diff(expected) <= 3);
        assert!(near, "{found:?} instead of {expected:?}");
    }

    #[test]
    fn every_kind_of_png_becomes_rgb() {
        let native =
            |values: &[u16]| values.iter().flat_map(|value| value.to_ne_bytes()).collect::<Vec<u8>>();
        let cases: [(Vec<u8>, &[u8]); 8] = [
            (png(&[1, 2, 3, 4, 5, 6], 2, ExtendedColorType::Rgb8), &[1, 2, 3, 4, 5, 6]),
            (png(&[7, 250], 2, ExtendedColorType::L8), &[7, 7, 7, 250, 250, 250]),
            // Opaque, transparent, and 0x33 of 0xff: (200·51 + 128·204) / 255 = 142.4.
            (
                png(&[9, 255, 9, 0, 200, 51], 3, ExtendedColorType::La8),
                &[9, 9, 9, 128, 128, 128, 142, 142, 142],
            ),
            (png(&[1, 2, 3, 255, 0, 100, 200, 51], 2, ExtendedColorType::Rgba8), &[1, 2, 3, 102, 122, 142]),
            (png(&native(&[0, 0x8080]), 2, ExtendedColorType::L16), &[0, 0, 0, 128, 128, 128]),
            (png(&native(&[0x0101, 0x0202, 0xffff]), 1, ExtendedColorType::Rgb16), &[1, 2, 255]),
            (PALETTE.to_vec(), &[255, 0, 0, 0, 255, 0, 128, 128, 128]),
            (BITS.to_vec(), &[255, 255, 255, 0, 0, 0, 255, 255, 255]),
        ];
        for (number, (file, expected)) in cases.iter().enumerate() {
            let image = decode(file).unwrap();
            assert_eq!(image.pixels, *expected, "case {number}");
            assert_eq!((image.width, image.height), (expected.len() / 3, 1));
        }
    }

    #[test]
    fn grey_and_rgb_jpegs_become_rgb() {
        let grey = decode(&jpeg(&[77; 9 * 5], 9, 5, ExtendedColorType::L8)).unwrap();
        assert_eq!((grey.width, grey.height, grey.pixels.len()), (9, 5, 135));
        assert_near(pixel(&grey, 8, 4), [77; 3]);
        let orange = [250, 120, 10].repeat(9 * 5);
        assert_near(
            pixel(&decode(&jpeg(&orange, 9, 5, ExtendedColorType::Rgb8)).unwrap(), 4, 2),
            [250, 120, 10],
        );
    }

    /// What Pillow makes of the same files.
    #[test]
    fn cmyk_jpegs_have_the_right_colours() {
        for file in [CMYK, YCCK] {
            let image = decode(file).unwrap();
            assert_eq!((image.width, image.height), (32, 32));
            assert_near(pixel(&image, 8, 8), [255, 0, 0]);
            assert_near(pixel(&image, 24, 8), [0, 255, 0]);
            assert_near(pixel(&image, 8, 24), [0, 0, 255]);
            assert_near(pixel(&image, 24, 24), [126, 126, 126]);
        }
    }

    #[test]
    fn exif_orientation_is_applied() {
        let image = decode(ROTATED).unwrap();
        assert_eq!((image.width, image.height), (8, 16));
        assert_near(pixel(&image, 6, 4), [254, 0, 0]);
        assert_near(pixel(&image, 1, 12), [0, 0, 254]);
    }

    /// The marker of a thumbnail inside a segment must not pass for that of the image.
    #[test]
    fn a_cut_jpeg_is_noticed_wherever_it_is_cut() {
        let noise: Vec<u8> =
            (0..32 * 32 * 3u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let whole = jpeg(&noise, 32, 32, ExtendedColorType::Rgb8);
        let comment = [0xFF, 0xFE, 0, 6, 0xFF, 0xD9, 0xFF, 0xD9];
        let whole = [&whole[..2], &comment, &whole[2..]].concat();
        decode(&whole).unwrap();
        decode(&[&whole[..], b"trailing bytes"].concat()).unwrap();
        for length in (2..whole.len()).step_by(37).chain([whole.len() - 1]) {
            assert!(decode(&whole[..length]).is_err(), "{length} of {} bytes", whole.len());
        }
    }

    #[test]
    fn what_is_no_image_is_told_apart() {
        let mut empty_png = png(&[1], 1, ExtendedColorType::L8);
        empty_png[16..20].fill(0);
        let whole = png(&[1; 300], 100, ExtendedColorType::Rgb8);
        let cases: [(&[u8], &str); 6] = [
            (b"", "neither JPEG nor PNG"),
            (b"<html></html>", "neither JPEG nor PNG"),
            (b"GIF89a\x01\x00\x01\x00", "gif is not supported; convert it"),
            (&CMYK[..100], ""),
            (&empty_png, ""),
            (&whole[..whole.len() - 20], ""),
        ];
        for (file, message) in cases {
            let error = decode(file).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    /// A damaged header must not be believed with gigabytes.
    #[test]
    fn enormous_sizes_are_refused() {
        let mut huge = jpeg(&[77; 64], 8, 8, ExtendedColorType::L8);
        let frame = huge.windows(2).position(|pair| pair == [0xFF, 0xC0]).unwrap();
        huge[frame + 5..frame + 9].fill(0xFF);
        assert!(decode(&huge).unwrap_err().contains("65535x65535"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("huge.jpg");
        std::fs::write(&path, huge).unwrap();
        assert!(check_header(&path).unwrap_err().to_string().contains("scale it down"));
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]

        /// Damaged bytes give an image or an error, never a panic.
        #[test]
        fn damage_never_panics(which in 0usize..5, at: proptest::sample::Index, value: u8, cut: proptest::sample::Index) {
            let mut file = [CMYK, YCCK, ROTATED, PALETTE, BITS][which].to_vec();
            let at = at.index(file.len());
            file[at] = value;
            if let Ok(image) = decode(&file) {
                proptest::prop_assert_eq!(image.pixels.len(), image.width * image.height * 3);
            }
            file.truncate(cut.index(file.len()));
            let _ = decode(&file);
        }
    }
}
