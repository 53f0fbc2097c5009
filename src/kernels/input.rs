//! The input: 8-bit RGB to the network's element type, normalised, flipped and mixed in one launch. Formulas, shapes and
//! bytes are in `kernels/input.cu`; how a batch is mixed is drawn by [`MixPlan`].

use crate::backend::Normalisation;
use crate::data::MixPlan;
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
use crate::device::{self, Device, Element, Entry, Family, Kernel, Operands};
use crate::tensor::MAX_ELEMENTS;
use crate::{Error, Result};
use half::{bf16, f16};
use std::sync::Arc;

const THREADS: u32 = 256;
/// Elements of a block: as in the `.cu` file.
const TILE: u32 = 8192;
/// Words of the kernels' `Mix`.
const MIX_WORDS: usize = 8;
const CHANNELS: usize = 3;

const fn entry(name: &'static str) -> Entry {
    Entry { name, signature: "ppppII", threads: THREADS }
}

/// The kernels of `kernels/input.cu`.
pub const FAMILY: Family =
    Family { name: "input", kernels: &[entry("input_f32"), entry("input_f16"), entry("input_bf16")] };

/// An element that the input can be made of.
pub trait InputElement: Element {
    /// The kernel that makes it.
    const KERNEL: &'static str;
}

impl InputElement for f32 {
    const KERNEL: &'static str = "input_f32";
}

impl InputElement for f16 {
    const KERNEL: &'static str = "input_f16";
}

impl InputElement for bf16 {
    const KERNEL: &'static str = "input_bf16";
}

/// The plan for batches of one size and element type.
#[derive(Debug)]
pub struct Input<T> {
    device: Device,
    kernel: Kernel,
    images: u32,
    side: u32,
    /// \[3, 256\]: what each value of each channel becomes.
    table: CudaSlice<f32>,
    /// \[images, 8\]: the kernels' `Mix`.
    mix: CudaSlice<u32>,
    element: std::marker::PhantomData<fn() -> T>,
}

impl<T: InputElement> Input<T> {
    /// For `images` RGB images of `side` × `side` pixels. Nothing is mixed or flipped until
    /// [`begin_step`](Self::begin_step) says so.
    ///
    /// # Errors
    /// [`Error::Shape`] for no images, no pixels, or 2³¹ elements and more; [`Error::Usage`] for a normalisation that
    /// is not finite; those of [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, images: usize, side: usize, normalisation: &Normalisation) -> Result<Self> {
        let pixels = side.checked_mul(side).and_then(|pixels| pixels.checked_mul(images));
        let elements = pixels.and_then(|pixels| pixels.checked_mul(CHANNELS));
        if !elements.is_some_and(|elements| (1..=MAX_ELEMENTS).contains(&elements)) {
            return Err(shape(format!(
                "{images} images of {side}×{side} pixels; 1 to {MAX_ELEMENTS} elements are possible"
            )));
        }
        let mix = encode(&MixPlan::none(images), None);
        Ok(Self {
            device: device.clone(),
            kernel: device.module(&FAMILY)?.kernel(T::KERNEL)?,
            images: images as u32,
            side: side as u32,
            table: device.upload(&table(normalisation)?)?,
            mix: device.upload(&mix)?,
            element: std::marker::PhantomData,
        })
    }

    /// Elements of a batch: images · side² · 3.
    pub fn elements(&self) -> usize {
        self.images as usize * (self.side * self.side) as usize * CHANNELS
    }

    /// Sends to the device how the next batch is mixed, and which of its images are flipped left to right before that.
    /// Outside of captured graphs: what follows may be captured, and reads it there.
    ///
    /// # Errors
    /// [`Error::Shape`] for a plan or flips of another number of images, a partner that is not in the batch, a weight
    /// that is not in \[0, 1\], a box that is not in the image, or a stream of another device; [`Error::Driver`].
    pub fn begin_step(
        &mut self,
        stream: &Arc<CudaStream>,
        mix: &MixPlan,
        flips: Option<&[bool]>,
    ) -> Result<()> {
        Operands::new(OPERATION, &self.device, stream)?;
        self.check(mix, flips)?;
        device::write(stream, &encode(mix, flips), &mut self.mix)
    }

    fn check(&self, mix: &MixPlan, flips: Option<&[bool]>) -> Result<()> {
        let n = self.images as usize;
        let flips = flips.map_or(n, <[bool]>::len);
        for (name, length) in [
            ("partners", mix.partner.len()),
            ("weights λ", mix.lambda.len()),
            ("boxes", mix.boxes.len()),
            ("flips", flips),
        ] {
            if length != n {
                return Err(shape(format!("{length} {name} for a batch of {n} images")));
            }
        }
        for i in 0..n {
            let (partner, lambda, patch) = (mix.partner[i], mix.lambda[i], mix.boxes[i]);
            if partner >= self.images {
                return Err(shape(format!("image {i}: its partner is {partner}, in a batch of {n}")));
            }
            if !(0.0..=1.0).contains(&lambda) {
                return Err(shape(format!("image {i}: its weight λ is {lambda}; 0 to 1 are possible")));
            }
            let inside = |low: u32, high: u32| low <= high && high <= self.side;
            if !inside(patch.left, patch.right) || !inside(patch.top, patch.bottom) {
                let side = self.side;
                return Err(shape(format!("image {i}: {patch:?} is not within {side}×{side} pixels")));
            }
        }
        Ok(())
    }

    /// y ← the mixed batch: `images` and y are \[images, side, side, 3\]. In f32 it is bit for bit what
    /// [`reference::input`](crate::reference::input) makes of the flipped images; in f16 and bf16 that, rounded.
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap. Nothing has been changed
    /// then. [`Error::Driver`].
    pub fn forward(
        &self,
        stream: &Arc<CudaStream>,
        images: &CudaView<'_, u8>,
        y: &mut CudaViewMut<'_, T>,
    ) -> Result<()> {
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("images", images, self.elements())?;
        operands.write("y", y, self.elements())?;
        let (n, side, elements) = (self.images, self.side, self.elements() as u32);
        let (table, mix) = (self.table.as_view(), self.mix.as_view());
        let mut launch = self.kernel.on(stream);
        launch.input(images).input(&table).input(&mix).output(y).value(&elements).value(&side);
        // SAFETY: `images` and y have `elements` elements and do not overlap, `table` has 3 · 256, `mix` one `Mix` an
        // image, each with a partner among them. Block b writes only elements below `elements` of the TILE from
        // b · TILE on, and reads pixels of their images and those images' partners.
        unsafe {
            launch.run([elements.div_ceil(TILE), 1, 1], 0, format_args!("{n} images of {side}×{side} pixels"))
        }
    }
}

const OPERATION: &str = "input";

/// What each value of each channel becomes, \[3, 256\]: (value/255 − mean) / deviation in f64, rounded once.
///
/// # Errors
/// [`Error::Usage`] where that is not finite.
pub fn table(normalisation: &Normalisation) -> Result<Vec<f32>> {
    let Normalisation { mean, deviation } = normalisation;
    let row = |c: usize| (0..256).map(move |v| ((f64::from(v) / 255.0 - mean[c]) / deviation[c]) as f32);
    let table: Vec<f32> = (0..CHANNELS).flat_map(row).collect();
    if table.iter().all(|value| value.is_finite()) {
        return Ok(table);
    }
    let problem = "gives values that are not finite; means must be numbers and deviations not 0";
    Err(Error::usage("normalisation", format!("{normalisation:?}"), problem))
}

/// The kernels' `Mix` of each image.
fn encode(mix: &MixPlan, flips: Option<&[bool]>) -> Vec<u32> {
    let flipped = |i: usize| u32::from(flips.is_some_and(|flips| flips[i]));
    let mut words = Vec::with_capacity(mix.len() * MIX_WORDS);
    for i in 0..mix.len() {
        let (partner, own, patch) = (mix.partner[i], mix.lambda[i], mix.boxes[i]);
        let other = (1.0 - f64::from(own)) as f32;
        words.extend([own.to_bits(), other.to_bits(), partner, flipped(i) | flipped(partner as usize) << 1]);
        words.extend([patch.left, patch.top, patch.right, patch.bottom]);
    }
    words
}

fn shape(problem: String) -> Error {
    Error::Shape { operation: OPERATION, problem }
}
