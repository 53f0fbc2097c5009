//! From a decoded image of any size to the square that the network sees.
//!
//! Training: random resized crop, horizontal flip, RandAugment, in the order of google/automl (`preprocessing.py`).
//! Evaluation: a centred square or the whole image, resized. The resize is antialiased by default, as in Pillow, timm
//! and torchvision; `antialias = false` gives the plain interpolation of `tf.image.resize` that the paper's own code used.

use super::draw::below;
use super::{Image, MixConfig, RandAugment};
use crate::random::{Purpose, Stream};
use crate::{Error, Result};
use fast_image_resize as fr;
use serde::{Deserialize, Serialize};

/// Which random numbers belong to a sample: those of this seed, epoch and image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SampleId {
    /// Seed of the training run.
    pub seed: u64,
    /// Epoch, from 0.
    pub epoch: u32,
    /// Index of the image in its dataset.
    pub image: u32,
}

impl SampleId {
    /// The stream of this sample for one purpose.
    pub const fn stream(self, purpose: Purpose) -> Stream {
        Stream::new(self.seed, self.epoch, self.image, purpose)
    }
}

/// The interpolation of a resize.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Triangle.
    #[default]
    Bilinear,
    /// Keys' cubic with a = −½, as Pillow's and TensorFlow's bicubic.
    Bicubic,
}

/// How pixels are interpolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resampling {
    /// The kernel.
    pub filter: Filter,
    /// Whether the kernel widens when the image shrinks, so that every source pixel counts.
    pub antialias: bool,
}

impl Default for Resampling {
    fn default() -> Self {
        Self { filter: Filter::Bilinear, antialias: true }
    }
}

/// A rectangle of whole pixels inside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CropBox {
    /// First column.
    pub left: usize,
    /// First row.
    pub top: usize,
    /// Columns, at least 1.
    pub width: usize,
    /// Rows, at least 1.
    pub height: usize,
}

impl CropBox {
    const fn whole(width: usize, height: usize) -> Self {
        Self { left: 0, top: 0, width, height }
    }
}

/// Inception's crop: a random part of the area at a random aspect ratio. Area and the logarithm of the aspect ratio
/// are uniform. After 100 draws that do not fit it is the whole image.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandomResizedCrop {
    /// Smallest and largest part of the area, in (0, 1].
    pub area: (f64, f64),
    /// Smallest and largest width / height.
    pub aspect: (f64, f64),
}

/// The ranges of google/automl for EfficientNetV2 S to XL.
impl Default for RandomResizedCrop {
    fn default() -> Self {
        Self { area: (0.05, 1.0), aspect: (0.75, 1.33) }
    }
}

impl RandomResizedCrop {
    const ATTEMPTS: usize = 100;

    /// The box for an image of this size.
    pub fn draw(&self, width: usize, height: usize, stream: &mut Stream) -> CropBox {
        for _ in 0..Self::ATTEMPTS {
            let area = stream.uniform_in(self.area.0, self.area.1) * (width * height) as f64;
            let aspect = stream.uniform_in(self.aspect.0.ln(), self.aspect.1.ln()).exp();
            let crop_width = (area * aspect).sqrt().round().max(1.0) as usize;
            let crop_height = (area / aspect).sqrt().round().max(1.0) as usize;
            if crop_width <= width && crop_height <= height {
                return CropBox {
                    left: below(stream, (width - crop_width) as u32 + 1) as usize,
                    top: below(stream, (height - crop_height) as u32 + 1) as usize,
                    width: crop_width,
                    height: crop_height,
                };
            }
        }
        CropBox::whole(width, height)
    }

    fn validate(&self) -> Result<()> {
        let ordered = |(low, high): (f64, f64)| low > 0.0 && low <= high && high.is_finite();
        if !ordered(self.area) || self.area.1 > 1.0 {
            let problem =
                "expected two numbers above 0, the first not above the second, the second not above 1";
            return Err(Error::usage("crop.area", format!("{:?}", self.area), problem));
        }
        if !ordered(self.aspect) {
            let problem = "expected two numbers above 0, the first not above the second";
            return Err(Error::usage("crop.aspect", format!("{:?}", self.aspect), problem));
        }
        Ok(())
    }
}

/// What happens to an image in training. The default is the paper's: crop, flip with probability ½, RandAugment. In a
/// configuration file whatever is not named is off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default = "TrainTransform::plain", deny_unknown_fields)]
pub struct TrainTransform {
    /// The crop; `None` resizes the whole image to a square.
    pub crop: Option<RandomResizedCrop>,
    /// Probability of a horizontal flip. 0 for characters: a mirrored 2 is no digit.
    pub flip: f32,
    /// The resize.
    pub resampling: Resampling,
    /// RandAugment, or `None`.
    pub randaugment: Option<RandAugment>,
    /// Mixup and CutMix of each batch.
    pub mix: MixConfig,
}

impl Default for TrainTransform {
    fn default() -> Self {
        Self {
            crop: Some(RandomResizedCrop::default()),
            flip: 0.5,
            resampling: Resampling::default(),
            randaugment: Some(RandAugment::default()),
            mix: MixConfig::default(),
        }
    }
}

impl TrainTransform {
    /// Nothing but a resize to a square: no crop, flip, RandAugment or mixing.
    pub fn plain() -> Self {
        Self {
            crop: None,
            flip: 0.0,
            resampling: Resampling::default(),
            randaugment: None,
            mix: MixConfig::default(),
        }
    }

    /// Writes the augmented image, `size` × `size` × 3, into `out`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `image` or `out` does not hold as many bytes as its size says.
    pub fn apply(
        &self,
        image: &Image,
        size: usize,
        sample: SampleId,
        scratch: &mut Scratch,
        out: &mut [u8],
    ) -> Result<()> {
        let crop = match &self.crop {
            Some(crop) => crop.draw(image.width, image.height, &mut sample.stream(Purpose::Crop)),
            None => CropBox::whole(image.width, image.height),
        };
        resize(image, crop, size, self.resampling, scratch, out)?;
        if sample.stream(Purpose::Flip).uniform() < self.flip {
            flip_horizontally(out, size);
        }
        if let Some(randaugment) = &self.randaugment {
            randaugment.apply(out, size, &mut sample.stream(Purpose::RandAugment));
        }
        Ok(())
    }

    /// Whether all numbers are in range.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.flip) {
            return Err(Error::usage("flip", self.flip, "expected a probability from 0 to 1"));
        }
        self.crop.as_ref().map_or(Ok(()), RandomResizedCrop::validate)?;
        self.randaugment.as_ref().map_or(Ok(()), RandAugment::validate)?;
        self.mix.validate()
    }
}

/// Which part of an image evaluation looks at.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvalCrop {
    /// The centred square whose side is this fraction, in (0, 1], of the short side (timm's `crop_pct`, "center").
    Center(f64),
    /// The whole image, squeezed into a square (timm's "squash", google/automl from 320 pixels on).
    Squash,
}

/// What happens to an image in evaluation: nothing random. The default is the whole centred square.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EvalTransform {
    /// The part looked at.
    pub crop: EvalCrop,
    /// The resize.
    pub resampling: Resampling,
}

impl Default for EvalTransform {
    fn default() -> Self {
        Self { crop: EvalCrop::Center(1.0), resampling: Resampling::default() }
    }
}

impl EvalTransform {
    /// Writes the image, `size` × `size` × 3, into `out`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `image` or `out` does not hold as many bytes as its size says.
    pub fn apply(&self, image: &Image, size: usize, scratch: &mut Scratch, out: &mut [u8]) -> Result<()> {
        let (width, height) = (image.width, image.height);
        let crop = match self.crop {
            EvalCrop::Squash => CropBox::whole(width, height),
            EvalCrop::Center(fraction) => {
                let side = ((width.min(height) as f64 * fraction).round() as usize).max(1);
                CropBox { left: (width - side) / 2, top: (height - side) / 2, width: side, height: side }
            }
        };
        resize(image, crop, size, self.resampling, scratch, out)
    }

    /// Whether the fraction is in range.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the field.
    pub fn validate(&self) -> Result<()> {
        match self.crop {
            EvalCrop::Center(fraction) if !(fraction > 0.0 && fraction <= 1.0) => {
                Err(Error::usage("crop.center", fraction, "expected a fraction above 0 and not above 1"))
            }
            _ => Ok(()),
        }
    }
}

/// Memory that one thread reuses from image to image.
#[derive(Debug, Default)]
pub struct Scratch {
    resizer: fr::Resizer,
}

fn resize(
    image: &Image,
    crop: CropBox,
    size: usize,
    resampling: Resampling,
    scratch: &mut Scratch,
    out: &mut [u8],
) -> Result<()> {
    if image.pixels.len() != image.width * image.height * 3 || out.len() != size * size * 3 {
        let Image { width, height, pixels } = image;
        let problem = format!(
            "an image of {width}x{height} with {} bytes into a square of {size} with {} bytes; 3 bytes a pixel are needed",
            pixels.len(),
            out.len()
        );
        return Err(Error::Shape { operation: "resize", problem });
    }
    let filter = match resampling.filter {
        Filter::Bilinear => fr::FilterType::Bilinear,
        Filter::Bicubic => fr::FilterType::CatmullRom,
    };
    let algorithm = if resampling.antialias {
        fr::ResizeAlg::Convolution(filter)
    } else {
        fr::ResizeAlg::Interpolation(filter)
    };
    let [left, top, width, height] = [crop.left, crop.top, crop.width, crop.height].map(|side| side as f64);
    let options = fr::ResizeOptions::new().resize_alg(algorithm).crop(left, top, width, height);
    // Typed: `Resizer::resize` would have its kernels for every other type of pixel compiled with this crate.
    let (width, height, side) = (image.width as u32, image.height as u32, size as u32);
    let source = fr::images::TypedImageRef::<fr::pixels::U8x3>::from_buffer(width, height, &image.pixels);
    let target = fr::images::TypedImage::<fr::pixels::U8x3>::from_buffer(side, side, out);
    let failed = |problem: String| Error::Shape { operation: "resize", problem };
    let source = source.map_err(|error| failed(error.to_string()))?;
    let mut target = target.map_err(|error| failed(error.to_string()))?;
    scratch.resizer.resize_typed(&source, &mut target, &options).map_err(|error| failed(error.to_string()))
}

fn flip_horizontally(pixels: &mut [u8], width: usize) {
    for row in pixels.chunks_exact_mut(width * 3) {
        for column in 0..width / 2 {
            let (left, right) = row.split_at_mut((width - 1 - column) * 3);
            left[column * 3..column * 3 + 3].swap_with_slice(&mut right[..3]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SAMPLE: SampleId = SampleId { seed: 1, epoch: 2, image: 3 };

    /// Grey columns: pixel (x, y) is `values[x]`.
    fn columns(values: &[u8], height: usize) -> Image {
        let grey = values.repeat(height);
        Image::from_grey(values.len(), height, grey)
    }

    fn first_row(pixels: &[u8], size: usize) -> Vec<u8> {
        pixels[..size * 3].chunks_exact(3).map(|rgb| rgb[0]).collect()
    }

    fn evaluate(image: &Image, size: usize, crop: EvalCrop, resampling: Resampling) -> Vec<u8> {
        let mut out = vec![0; size * size * 3];
        EvalTransform { crop, resampling }.apply(image, size, &mut Scratch::default(), &mut out).unwrap();
        first_row(&out, size)
    }

    /// `tf.image.resize` of 0..8, times 32: bilinear to 4 without and with antialias, half-pixel bicubic to 5 without.
    #[test]
    fn resize_agrees_with_tensorflow() {
        let image = columns(&[0, 32, 64, 96, 128, 160, 192, 224], 8);
        let expected = |values: &[f64]| values.iter().map(|v| (v * 32.0).round() as u8).collect::<Vec<u8>>();
        let resampling = |filter, antialias| Resampling { filter, antialias };
        assert_eq!(
            evaluate(&image, 4, EvalCrop::Squash, resampling(Filter::Bilinear, false)),
            expected(&[0.5, 2.5, 4.5, 6.5])
        );
        assert_eq!(
            evaluate(&image, 4, EvalCrop::Squash, resampling(Filter::Bilinear, true)),
            expected(&[0.714286, 2.5, 4.5, 6.285714])
        );
        assert_eq!(
            evaluate(&image, 5, EvalCrop::Squash, resampling(Filter::Bicubic, false)),
            expected(&[0.210818, 1.900391, 3.5, 5.09961, 6.789182])
        );
    }

    #[test]
    fn centre_crop_takes_the_middle_of_the_long_side() {
        let image = columns(&[9, 10, 20, 30, 40, 9], 4);
        let take = |crop| evaluate(&image, 4, crop, Resampling::default());
        assert_eq!(take(EvalCrop::Center(1.0)), [10, 20, 30, 40]);
        assert_eq!(evaluate(&image, 2, EvalCrop::Center(0.5), Resampling::default()), [20, 30]);
        assert_ne!(take(EvalCrop::Squash), [10, 20, 30, 40]);
    }

    #[test]
    fn flip_mirrors_each_row() {
        let mut pixels: Vec<u8> = (0..18).collect();
        flip_horizontally(&mut pixels, 3);
        assert_eq!(pixels, [6, 7, 8, 3, 4, 5, 0, 1, 2, 15, 16, 17, 12, 13, 14, 9, 10, 11]);
        let mut even: Vec<u8> = (0..12).collect();
        flip_horizontally(&mut even, 4);
        assert_eq!(even, [9, 10, 11, 6, 7, 8, 3, 4, 5, 0, 1, 2]);
    }

    #[test]
    fn flip_happens_as_often_as_asked() {
        let image = columns(&[0, 255], 2);
        let flipped = |flip, epoch| {
            let mut out = [0; 12];
            let transform = TrainTransform { flip, ..TrainTransform::plain() };
            let sample = SampleId { epoch, ..SAMPLE };
            transform.apply(&image, 2, sample, &mut Scratch::default(), &mut out).unwrap();
            out[0] == 255
        };
        let count = |flip| (0..400).filter(|&epoch| flipped(flip, epoch)).count();
        assert_eq!((count(0.0), count(1.0)), (0, 400));
        // 100 expected, standard deviation 8.7.
        assert!((65..=135).contains(&count(0.25)), "{}", count(0.25));
    }

    #[test]
    fn crops_have_the_area_and_aspect_asked_for() {
        let crop = RandomResizedCrop { area: (0.2, 0.4), aspect: (0.5, 2.0) };
        let (mut areas, mut wide) = (0.0, 0);
        for epoch in 0..2000 {
            let drawn = crop.draw(500, 400, &mut Stream::new(0, epoch, 0, Purpose::Crop));
            let area = (drawn.width * drawn.height) as f64 / 200_000.0;
            let aspect = drawn.width as f64 / drawn.height as f64;
            assert!((0.198..0.402).contains(&area) && (0.495..2.02).contains(&aspect), "{drawn:?}");
            areas += area / 2000.0;
            wide += usize::from(drawn.width > drawn.height);
        }
        // Standard deviations: 0.0013 of the mean area, 22 of the count.
        assert!((areas - 0.3).abs() < 0.006, "mean area {areas}");
        assert!((900..1100).contains(&wide), "{wide} of 2000 are wider than high");
    }

    #[test]
    fn a_crop_that_cannot_fit_is_the_whole_image() {
        let crop = RandomResizedCrop { area: (1.0, 1.0), aspect: (4.0, 4.0) };
        assert_eq!(crop.draw(10, 10, &mut SAMPLE.stream(Purpose::Crop)), CropBox::whole(10, 10));
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let crop = |area, aspect| TrainTransform {
            crop: Some(RandomResizedCrop { area, aspect }),
            ..TrainTransform::plain()
        };
        let cases = [
            (crop((0.0, 1.0), (1.0, 1.0)), "crop.area"),
            (crop((0.5, 1.1), (1.0, 1.0)), "crop.area"),
            (crop((0.5, f64::NAN), (1.0, 1.0)), "crop.area"),
            (crop((0.5, 1.0), (2.0, 1.0)), "crop.aspect"),
            (TrainTransform { flip: 1.5, ..TrainTransform::plain() }, "flip"),
            (TrainTransform { flip: f32::NAN, ..TrainTransform::plain() }, "flip"),
        ];
        for (transform, name) in cases {
            assert!(transform.validate().unwrap_err().to_string().starts_with(name), "{transform:?}");
        }
        for fraction in [0.0, 1.01, f64::NAN] {
            let transform = EvalTransform { crop: EvalCrop::Center(fraction), ..Default::default() };
            assert!(transform.validate().unwrap_err().to_string().starts_with("crop.center"));
        }
        TrainTransform::default().validate().unwrap();
        EvalTransform::default().validate().unwrap();
    }

    #[test]
    fn wrong_buffers_are_refused() {
        let image = columns(&[1, 2], 2);
        let result = TrainTransform::plain().apply(&image, 2, SAMPLE, &mut Scratch::default(), &mut [0; 11]);
        assert!(matches!(result, Err(Error::Shape { operation: "resize", .. })));
    }

    #[test]
    fn configurations_survive_toml() {
        for transform in [TrainTransform::default(), TrainTransform::plain()] {
            let text = toml::to_string(&transform).unwrap();
            assert_eq!(toml::from_str::<TrainTransform>(&text).unwrap(), transform);
        }
        assert!(toml::from_str::<TrainTransform>("flop = 1").is_err());
        let eval = EvalTransform { crop: EvalCrop::Center(0.875), ..Default::default() };
        assert_eq!(toml::from_str::<EvalTransform>(&toml::to_string(&eval).unwrap()).unwrap(), eval);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn crops_lie_inside_the_image(
            width in 1usize..400, height in 1usize..400, low in 0.01f64..1.0, ratio in 1.0f64..5.0, epoch in 0u32..1000
        ) {
            let crop = RandomResizedCrop { area: (low, 1.0), aspect: (1.0 / ratio, ratio) };
            let drawn = crop.draw(width, height, &mut Stream::new(5, epoch, 0, Purpose::Crop));
            prop_assert!(drawn.width >= 1 && drawn.left + drawn.width <= width, "{drawn:?}");
            prop_assert!(drawn.height >= 1 && drawn.top + drawn.height <= height, "{drawn:?}");
        }

        /// Any image becomes any square, and one colour stays that colour.
        #[test]
        fn one_colour_survives_every_resize(
            width in 1usize..40, height in 1usize..40, size in 1usize..40, value: u8, antialias: bool, bicubic: bool,
            epoch in 0u32..100
        ) {
            let image = Image::from_grey(width, height, vec![value; width * height]);
            let filter = if bicubic { Filter::Bicubic } else { Filter::Bilinear };
            let resampling = Resampling { filter, antialias };
            let mut out = vec![!value; size * size * 3];
            let train = TrainTransform { crop: Some(Default::default()), resampling, ..TrainTransform::plain() };
            train.apply(&image, size, SampleId { epoch, ..SAMPLE }, &mut Scratch::default(), &mut out).unwrap();
            prop_assert!(out.iter().all(|&v| v == value));
        }
    }
}
