//! The input: 8-bit RGB to the network's element type, normalised, flipped and mixed in one launch, and before it, where the
//! images are of other sizes, their resize. Formulas, shapes and bytes are in `kernels/input.cu`; how a batch is mixed is
//! drawn by [`MixPlan`].

mod taps;

use super::{Cost, Work};
use crate::backend::Normalisation;
use crate::data::MixPlan;
use crate::data::transform::{CropBox, Resampling};
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
use crate::device::{self, Device, Element, Entry, Family, Kernel, Operands};
use crate::tensor::{Dtype, MAX_ELEMENTS};
use crate::{Error, Result};
use half::{bf16, f16};
use std::sync::Arc;

const THREADS: u32 = 256;
/// Elements of a block: as in the `.cu` file.
const TILE: u32 = 8192;
/// Words of the kernels' `Mix`.
const MIX_WORDS: usize = 8;
const CHANNELS: usize = 3;

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: THREADS }
}

/// The kernels of `kernels/input.cu`.
pub const FAMILY: Family = Family {
    name: "input",
    kernels: &[
        entry("input_f32", "ppppII"),
        entry("input_f16", "ppppII"),
        entry("input_bf16", "ppppII"),
        entry("input_resize", "ppppI"),
    ],
};

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

/// The launch of [`Input::forward`] for `images` images of `side` × `side` pixels, unmixed.
pub fn forward_work(images: usize, side: usize, dtype: Dtype) -> Work {
    let elements = images * side * side * CHANNELS;
    let bytes = elements * (1 + dtype.bytes()) + 4 * (CHANNELS * 256 + images * MIX_WORDS);
    let cost = Cost { bytes: bytes as u64, tensor_operations: 0, operations: 2 * elements as u64 };
    Work { kernel: format!("input_{}", dtype.suffix()), grid: grid(elements as u32), shared: 0, cost }
}

const fn grid(elements: u32) -> [u32; 3] {
    [elements.div_ceil(TILE), 1, 1]
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
        unsafe { launch.run(grid(elements), 0, format_args!("{n} images of {side}×{side} pixels")) }
    }
}

/// One image of a batch to be resized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Where its pixels, \[height, width, 3\], begin among those of all, in bytes.
    pub offset: usize,
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// The part that becomes the output. Pixels around it still count where the kernel reaches beyond.
    pub crop: CropBox,
}

/// The resize of a batch of 8-bit RGB images of any sizes to squares of one, by the weights of the CPU pipeline
/// ([`data::transform`](crate::data::transform)) and in its integer arithmetic: bit for bit the same.
#[derive(Debug)]
pub struct Resize {
    device: Device,
    kernel: Kernel,
    images: usize,
    side: usize,
    resampling: Resampling,
    largest: usize,
    /// The kernel's `Source` of each image, and what its axes are made of.
    sources: CudaSlice<u32>,
    taps: CudaSlice<u32>,
    /// Bytes of the images of this step, and its launch; none before the first.
    step: Option<(usize, Work)>,
}

/// Words of the kernels' `Source`.
const SOURCE_WORDS: usize = 8;
/// The shared memory of a block holds a row of this many pixels.
const LARGEST: usize = 16_384;
const RESIZE: &str = "resize";

impl Resize {
    /// For batches of `images` images, of sides up to `largest` pixels, to `side` × `side` pixels.
    ///
    /// # Errors
    /// [`Error::Shape`] for no images or pixels, sides above 16384, or 2³¹ bytes and more; those of [`Device::module`];
    /// [`Error::Driver`].
    pub fn plan(
        device: &Device,
        images: usize,
        side: usize,
        largest: usize,
        resampling: Resampling,
    ) -> Result<Self> {
        let row = side.checked_mul(CHANNELS);
        let output = row.and_then(|row| row.checked_mul(side)).and_then(|image| image.checked_mul(images));
        let possible = output.is_some_and(|bytes| (1..=MAX_ELEMENTS).contains(&bytes));
        let words = || images.checked_mul(2 * taps::most_words(side, largest, resampling));
        let words = if possible && (1..=LARGEST).contains(&largest) { words() } else { None };
        let Some(words @ 1..=MAX_ELEMENTS) = words else {
            return Err(refused(format!(
                "{images} images of up to {largest} pixels a side to {side}×{side}"
            )));
        };
        Ok(Self {
            device: device.clone(),
            kernel: device.module(&FAMILY)?.kernel("input_resize")?,
            images,
            side,
            resampling,
            largest,
            sources: device.zeros(images * SOURCE_WORDS)?,
            taps: device.zeros(words)?,
            step: None,
        })
    }

    /// Sends to the device where the images of the next batch lie, in `bytes` bytes, and what is made of them. Outside of
    /// captured graphs, and with a resize that is not captured either: its shared memory depends on the sizes.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of images, one that is not within the bytes or larger than planned, a crop that
    /// is not within its image, 2³¹ bytes and more, or a stream of another device; [`Error::Driver`].
    pub fn begin_step(&mut self, stream: &Arc<CudaStream>, sources: &[Source], bytes: usize) -> Result<()> {
        Operands::new(RESIZE, &self.device, stream)?;
        if sources.len() != self.images || bytes > MAX_ELEMENTS {
            let problem = format!(
                "{} images of {bytes} bytes for a batch of {}; up to {MAX_ELEMENTS} bytes are possible",
                sources.len(),
                self.images
            );
            return Err(refused(problem));
        }
        for (i, source) in sources.iter().enumerate() {
            self.check(source, bytes).map_err(|problem| refused(format!("image {i}: {problem}")))?;
        }
        let (mut words, mut all) = (Vec::with_capacity(self.images * SOURCE_WORDS), Vec::new());
        let (mut widest, mut read, mut operations) = (0, 0, 0);
        for &Source { offset, width, height, crop } in sources {
            let mut axis = |first, length, whole| {
                taps::append(&mut all, (first, length), whole, self.side, self.resampling)
            };
            let rows = axis(crop.top, crop.height, height);
            let columns = axis(crop.left, crop.width, width);
            let row = CHANNELS * (columns.end - columns.first);
            widest = widest.max(row);
            read += row * (rows.end - rows.first);
            operations += 2 * (rows.weights * row + self.side * columns.weights * CHANNELS);
            let stride = CHANNELS * width;
            words.extend(
                [offset, stride, rows.at, columns.at, CHANNELS * columns.first, row].map(|v| v as u32),
            );
            words.extend([rows.shift, columns.shift]);
        }
        let moved = read + self.output() + 4 * (words.len() + all.len());
        let cost = Cost { bytes: moved as u64, tensor_operations: 0, operations: operations as u64 };
        let grid = [(self.images * self.side) as u32, 1, 1];
        let work = Work { kernel: "input_resize".into(), grid, shared: widest as u32, cost };
        self.step = None;
        device::write(stream, &words, &mut self.sources)?;
        device::write(stream, &all, &mut self.taps.slice_mut(..all.len()))?;
        self.step = Some((bytes, work));
        Ok(())
    }

    /// Elements of the output.
    fn output(&self) -> usize {
        self.images * self.side * self.side * CHANNELS
    }

    fn check(&self, source: &Source, bytes: usize) -> Result<(), String> {
        let &Source { offset, width, height, crop } = source;
        if width > self.largest || height > self.largest {
            return Err(format!("{width}×{height} pixels, where {} a side were planned", self.largest));
        }
        let end = (width * height * CHANNELS).checked_add(offset);
        if end.is_none_or(|end| end > bytes) {
            return Err(format!("{width}×{height} pixels from byte {offset} on, of {bytes} bytes"));
        }
        let within = |first: usize, length: usize, whole: usize| {
            length > 0 && first.checked_add(length).is_some_and(|end| end <= whole)
        };
        if !within(crop.left, crop.width, width) || !within(crop.top, crop.height, height) {
            return Err(format!("{crop:?} is not within {width}×{height} pixels"));
        }
        Ok(())
    }

    /// Its launch for the batch of the last [`begin_step`](Self::begin_step), if there was one.
    pub fn work(&self) -> Option<&Work> {
        self.step.as_ref().map(|(_, work)| work)
    }

    /// out ← the images of the last [`begin_step`](Self::begin_step), \[images, side, side, 3\].
    ///
    /// # Errors
    /// [`Error::Shape`] before the first step, and for buffers of another length, device or alignment, or that overlap.
    /// Nothing has been changed then. [`Error::Driver`].
    pub fn forward(
        &self,
        stream: &Arc<CudaStream>,
        images: &CudaView<'_, u8>,
        out: &mut CudaViewMut<'_, u8>,
    ) -> Result<()> {
        let Some((bytes, work)) = &self.step else {
            return Err(refused("no step has begun".into()));
        };
        let (n, side) = (self.images, self.side as u32);
        let mut operands = Operands::new(RESIZE, &self.device, stream)?;
        operands.read("images", images, *bytes)?;
        operands.write("out", out, self.output())?;
        let (sources, all) = (self.sources.as_view(), self.taps.as_view());
        let mut launch = self.kernel.on(stream);
        launch.input(images).input(&sources).input(&all).output(out).value(&side);
        // SAFETY: `begin_step` has checked that every image lies within the buffer, and its taps are those of pixels within
        // it; the shared memory has room for what is read of a row. A block writes one row of the output.
        unsafe { launch.run(work.grid, work.shared, format_args!("{n} images to {side}×{side} pixels")) }
    }
}

fn refused(problem: String) -> Error {
    Error::Shape { operation: RESIZE, problem }
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
