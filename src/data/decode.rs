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

/// Reads and decodes `path`.
pub(super) fn read(path: &Path) -> Result<Image> {
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
