//! What the kernels of a training step read of it: the seed of its random numbers, and the loss scale.
//!
//! They lie in device memory, one copy for all kernels, so that a captured graph sees new ones each time it runs.

use crate::backend::StepKey;
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView};
use crate::device::{self, Device, Operands};
use crate::tensor::MAX_ELEMENTS;
use crate::{Error, Result};
use std::sync::Arc;

const OPERATION: &str = "training step";

/// Words before the indices of the images: `Step` of `kernels/include/step.cuh`.
const WORDS: usize = 4;

/// A step's key and loss scale on the device. Until [`begin_step`](Self::begin_step) the key is the default one, of as many
/// images 0, and the scale 1.
#[derive(Debug)]
pub struct StepScalars {
    device: Device,
    images: usize,
    words: CudaSlice<u32>,
}

impl StepScalars {
    /// For batches of `images` images.
    ///
    /// # Errors
    /// [`Error::Shape`] for no images, or 2³¹ and more; [`Error::Driver`].
    pub fn new(device: &Device, images: usize) -> Result<Self> {
        if !(1..=MAX_ELEMENTS - WORDS).contains(&images) {
            let problem = format!("a batch of {images} images");
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        let key = StepKey { images: vec![0; images], ..StepKey::default() };
        Ok(Self { device: device.clone(), images, words: device.upload(&encode(&key, 1.0))? })
    }

    /// Sends to the device what random numbers depend on, and what the loss's gradient is multiplied with. Outside of
    /// captured graphs: what follows may be captured, and reads it there.
    ///
    /// # Errors
    /// [`Error::Shape`] for a key of another number of images or a stream of another device, [`Error::Usage`] for a
    /// scale that is not a positive f32, [`Error::Driver`].
    pub fn begin_step(&mut self, stream: &Arc<CudaStream>, key: &StepKey, loss_scale: f64) -> Result<()> {
        Operands::new(OPERATION, &self.device, stream)?;
        if key.images.len() != self.images {
            let problem = format!("a key of {} images for a batch of {}", key.images.len(), self.images);
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        let scale = loss_scale as f32;
        if !(scale.is_normal() && scale > 0.0) {
            return Err(Error::usage("loss_scale", loss_scale, "expected a positive number that fits f32"));
        }
        device::write(stream, &encode(key, scale), &mut self.words)
    }

    /// As the kernels read it; an error where it is of another number of images or device.
    pub(super) fn view(&self, operands: &mut Operands<'_>, images: usize) -> Result<CudaView<'_, u32>> {
        let view = self.words.as_view();
        operands.read("the step's key", &view, WORDS + images)?;
        Ok(view)
    }
}

/// The 24 random bits below which something is dropped with probability `rate`: a uniform number k·2⁻²⁴ is below the rate
/// if and only if k is below rate·2²⁴, rounded up.
pub(super) fn threshold(rate: f64) -> u32 {
    (rate * 16_777_216.0).ceil() as u32
}

/// What the others are multiplied with.
pub(super) fn keep(rate: f64) -> f32 {
    (1.0 / (1.0 - rate)) as f32
}

fn encode(key: &StepKey, loss_scale: f32) -> Vec<u32> {
    let mut words = Vec::with_capacity(WORDS + key.images.len());
    words.extend([key.seed as u32, (key.seed >> 32) as u32, key.epoch, loss_scale.to_bits()]);
    words.extend(&key.images);
    words
}
