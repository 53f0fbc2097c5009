//! Squeeze-excitation: the pool, both layers and the gate, and their backward with the sums that batch norm needs of it.
//! Formulas, shapes and bytes are in `kernels/squeeze_excite.cu`.
//!
//! Forward is [`pool`](SqueezeExcite::pool) and [`gate`](SqueezeExcite::gate); whoever reads SiLU(z)·gate applies both on
//! load. Backward is [`backward_sums`](SqueezeExcite::backward_sums), unless what made dx has taken those sums already,
//! and [`backward`](SqueezeExcite::backward); then dz = (gate·dx + dpool)·SiLU'(z), to be applied on load again.

use super::raw::{RawElement, RawView, channel_blocks, check_shape};
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
use crate::device::{Device, Entry, Family, Kernel, Operands};
use crate::tensor::{MAX_ELEMENTS, Shape};
use crate::{Error, Result};
use std::marker::PhantomData;
use std::sync::Arc;

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: 256 }
}

/// The kernels of `kernels/squeeze_excite.cu`.
pub const FAMILY: Family = Family {
    name: "squeeze_excite",
    kernels: &[
        entry("squeeze_excite_pool_f32", "ppppII"),
        entry("squeeze_excite_pool_f16", "ppppII"),
        entry("squeeze_excite_pool_bf16", "ppppII"),
        entry("squeeze_excite_hidden_f32", "ppppIII"),
        entry("squeeze_excite_hidden_f16", "ppppIII"),
        entry("squeeze_excite_hidden_bf16", "ppppIII"),
        entry("squeeze_excite_gate_f32", "ppppIII"),
        entry("squeeze_excite_gate_f16", "ppppIII"),
        entry("squeeze_excite_gate_bf16", "ppppIII"),
        entry("squeeze_excite_sums_f32", "pppppppIII"),
        entry("squeeze_excite_sums_f16", "pppppppIII"),
        entry("squeeze_excite_sums_bf16", "pppppppIII"),
        entry("squeeze_excite_backward_hidden_f32", "pppppIII"),
        entry("squeeze_excite_backward_hidden_f16", "pppppIII"),
        entry("squeeze_excite_backward_hidden_bf16", "pppppIII"),
        entry("squeeze_excite_backward_pool_f32", "pppIIII"),
        entry("squeeze_excite_backward_pool_f16", "pppIIII"),
        entry("squeeze_excite_backward_pool_bf16", "pppIIII"),
        Entry { name: "squeeze_excite_backward_weights", signature: "pppppppppIII", threads: WEIGHT_THREADS },
        entry("squeeze_excite_backward_moments", "ppppII"),
    ],
};

// As in the `.cu` file: images, hidden units and channels of a block.
const WEIGHT_THREADS: u32 = 128;
const IMAGE_TILE: u32 = 4;
const HIDDEN_TILE: u32 = 8;
const GATE_TILE: u32 = 256;
const BACKWARD_HIDDEN_TILE: u32 = 32;
const WEIGHT_UNITS: u32 = 4;
const MOMENT_TILE: u32 = 32;

/// The two layers. Weights are of the element type, biases in f32.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a, 'b, T> {
    /// W₁, \[reduced, c\].
    pub reduce: &'a CudaView<'b, T>,
    /// b₁, \[reduced\].
    pub reduce_bias: &'a CudaView<'b, f32>,
    /// W₂, \[c, reduced\].
    pub expand: &'a CudaView<'b, T>,
    /// b₂, \[c\].
    pub expand_bias: &'a CudaView<'b, f32>,
}

/// Their gradients, in f32 and the same shapes.
#[derive(Debug)]
pub struct Gradients<'a, 'b> {
    /// Of W₁.
    pub reduce: &'a mut CudaViewMut<'b, f32>,
    /// Of b₁.
    pub reduce_bias: &'a mut CudaViewMut<'b, f32>,
    /// Of W₂.
    pub expand: &'a mut CudaViewMut<'b, f32>,
    /// Of b₂.
    pub expand_bias: &'a mut CudaViewMut<'b, f32>,
}

/// What the forward pass leaves for the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct State<'a, 'b> {
    /// The mean of SiLU(z), \[n, c\].
    pub pooled: &'a CudaView<'b, f32>,
    /// W₁·pooled + b₁, \[n, reduced\].
    pub hidden: &'a CudaView<'b, f32>,
    /// The gate, \[n, c\].
    pub gate: &'a CudaView<'b, f32>,
}

/// The plan for one shape, number of hidden units and element type. The same calls give the same bits.
#[derive(Debug)]
pub struct SqueezeExcite<T> {
    device: Device,
    shape: Shape,
    reduced: u32,
    pool: Kernel,
    hidden: Kernel,
    gate: Kernel,
    sums: Kernel,
    backward_hidden: Kernel,
    backward_pool: Kernel,
    backward_weights: Kernel,
    backward_moments: Kernel,
    /// The gradient of `hidden`, \[n, reduced\].
    dhidden: CudaSlice<f32>,
    element: PhantomData<fn() -> T>,
}

const OPERATION: &str = "squeeze-excitation";

/// Rows of the sums of [`SqueezeExcite::backward_sums`].
const SUMS: usize = 5;

impl<T: RawElement> SqueezeExcite<T> {
    /// For raw outputs of `shape` and `reduced` hidden units.
    ///
    /// # Errors
    /// [`Error::Shape`] for an empty shape, channels that are no multiple of 8, no hidden units, or a tensor of 2³¹
    /// elements and more; those of [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, shape: Shape, reduced: usize) -> Result<Self> {
        check_shape(OPERATION, shape)?;
        let Shape { n, c, .. } = shape;
        let fits = |a: usize, b: usize| a.checked_mul(b).is_some_and(|count| count <= MAX_ELEMENTS);
        if reduced == 0 || !fits(c, reduced) || !fits(n, reduced) || !fits(n * c, SUMS) {
            let problem = format!(
                "{shape} with {reduced} hidden units; 1 and more are possible, and at most {MAX_ELEMENTS} elements"
            );
            return Err(Error::Shape { operation: OPERATION, problem });
        }
        let module = device.module(&FAMILY)?;
        let kernel = |name: &str| module.kernel(&format!("squeeze_excite_{name}_{}", T::SUFFIX));
        Ok(Self {
            device: device.clone(),
            shape,
            reduced: reduced as u32,
            pool: kernel("pool")?,
            hidden: kernel("hidden")?,
            gate: kernel("gate")?,
            sums: kernel("sums")?,
            backward_hidden: kernel("backward_hidden")?,
            backward_pool: kernel("backward_pool")?,
            backward_weights: module.kernel("squeeze_excite_backward_weights")?,
            backward_moments: module.kernel("squeeze_excite_backward_moments")?,
            dhidden: device.zeros(n * reduced)?,
            element: PhantomData,
        })
    }

    /// pooled ← the mean over pixels of SiLU(z), \[n, c\].
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap. Nothing has been changed
    /// then. [`Error::Driver`].
    pub fn pool(
        &self,
        stream: &Arc<CudaStream>,
        raw: RawView<'_, '_, T>,
        pooled: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let shape = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        raw.check(&mut operands, shape)?;
        operands.write("pooled", pooled, shape.n * shape.c)?;
        let (pixels, channels) = ((shape.h * shape.w) as u32, shape.c as u32);
        let mut launch = self.pool.on(stream);
        launch.input(raw.y).input(raw.scale).input(raw.shift).output(pooled).value(&pixels).value(&channels);
        // SAFETY: y has `shape`, whose channels are a multiple of 8, the vectors its channels. A block reads one image's
        // tile of 64 channels, those that exist, and writes their means, which overlap nothing.
        unsafe { launch.run([channel_blocks(shape), 1, 1], 0, shape) }
    }

    /// hidden ← W₁·pooled + b₁, \[n, reduced\], and gate ← σ(W₂·SiLU(hidden) + b₂), \[n, c\].
    ///
    /// # Errors
    /// As for [`pool`](Self::pool).
    pub fn gate(
        &self,
        stream: &Arc<CudaStream>,
        pooled: &CudaView<'_, f32>,
        weights: Weights<'_, '_, T>,
        hidden: &mut CudaViewMut<'_, f32>,
        gate: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (n, c, r) = (self.shape.n, self.shape.c, self.reduced as usize);
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("pooled", pooled, n * c)?;
        self.check_weights(&mut operands, weights)?;
        operands.write("hidden", hidden, n * r)?;
        operands.write("gate", gate, n * c)?;
        let (images, channels, reduced) = (n as u32, c as u32, self.reduced);
        let shapes = format_args!("{}, {reduced} hidden units", self.shape);
        let mut launch = self.hidden.on(stream);
        launch.input(pooled).input(weights.reduce).input(weights.reduce_bias).output(hidden);
        launch.value(&images).value(&channels).value(&reduced);
        // SAFETY: all buffers have their shapes and `hidden` overlaps none. A block reads the rows of 4 images and of 8
        // hidden units, those that exist, and writes their 4 · 8 places.
        unsafe { launch.run([self.blocks(reduced, HIDDEN_TILE), 1, 1], 0, shapes) }?;
        let mut launch = self.gate.on(stream);
        let hidden = hidden.as_view();
        launch.input(&hidden).input(weights.expand).input(weights.expand_bias).output(gate);
        launch.value(&images).value(&channels).value(&reduced);
        // SAFETY: likewise for 4 images and 256 channels.
        unsafe { launch.run([self.blocks(channels, GATE_TILE), 1, 1], 0, shapes) }
    }

    /// Of dx, the gradient of SiLU(z)·gate, for each image and channel the sums over pixels, `sums` \[5, n, c\]:
    /// dx·SiLU'(z), SiLU'(z), dx·SiLU'(z)·x̂, SiLU'(z)·x̂, and dx·SiLU(z).
    ///
    /// # Errors
    /// As for [`pool`](Self::pool).
    pub fn backward_sums(
        &self,
        stream: &Arc<CudaStream>,
        dx: &CudaView<'_, T>,
        raw: RawView<'_, '_, T>,
        sums: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let shape = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("dx", dx, shape.elements())?;
        raw.check(&mut operands, shape)?;
        operands.write("sums", sums, SUMS * shape.n * shape.c)?;
        let (images, pixels, channels) = (shape.n as u32, (shape.h * shape.w) as u32, shape.c as u32);
        let mut launch = self.sums.on(stream);
        launch.input(dx).input(raw.y).input(raw.scale).input(raw.shift).input(raw.mean).input(raw.rstd);
        launch.output(sums).value(&pixels).value(&channels).value(&images);
        // SAFETY: as in `pool`; dx is read where y is, and a block writes SUMS numbers for each of its channels.
        unsafe { launch.run([channel_blocks(shape), 1, 1], 0, shape) }
    }

    /// From the sums of [`backward_sums`](Self::backward_sums): dpool \[n, c\], what SiLU(z) still receives at every pixel
    /// through the pool; `moments` \[2, c\], Σ dz and Σ dz·x̂ over images and pixels, where
    /// dz = (gate·dx + dpool)·SiLU'(z); and the gradients of the layers, which are added to what is there.
    ///
    /// # Errors
    /// As for [`pool`](Self::pool).
    pub fn backward(
        &mut self,
        stream: &Arc<CudaStream>,
        sums: &CudaView<'_, f32>,
        state: State<'_, '_>,
        weights: Weights<'_, '_, T>,
        gradients: Gradients<'_, '_>,
        dpool: &mut CudaViewMut<'_, f32>,
        moments: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let (n, c, r) = (self.shape.n, self.shape.c, self.reduced as usize);
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("sums", sums, SUMS * n * c)?;
        operands.read("pooled", state.pooled, n * c)?;
        operands.read("hidden", state.hidden, n * r)?;
        operands.read("gate", state.gate, n * c)?;
        self.check_weights(&mut operands, weights)?;
        operands.write("the gradient of W₁", &*gradients.reduce, r * c)?;
        operands.write("the gradient of b₁", &*gradients.reduce_bias, r)?;
        operands.write("the gradient of W₂", &*gradients.expand, r * c)?;
        operands.write("the gradient of b₂", &*gradients.expand_bias, c)?;
        operands.write("dpool", dpool, n * c)?;
        operands.write("moments", moments, 2 * c)?;
        let (images, channels, reduced) = (n as u32, c as u32, self.reduced);
        let pixels = (self.shape.h * self.shape.w) as u32;
        let shapes = format_args!("{}, {reduced} hidden units", self.shape);
        let blocks = self.blocks(reduced, BACKWARD_HIDDEN_TILE);
        let mut dhidden = self.dhidden.as_view_mut();
        let mut launch = self.backward_hidden.on(stream);
        launch.input(sums).input(state.gate).input(weights.expand).input(state.hidden).output(&mut dhidden);
        launch.value(&images).value(&channels).value(&reduced);
        // SAFETY: all buffers have their shapes, and `dhidden` is this plan's own. A block reads what 4 images and 32
        // hidden units need and writes their 4 · 32 places, those that exist.
        unsafe { launch.run([blocks, 1, 1], 0, shapes) }?;

        let dhidden = self.dhidden.as_view();
        let mut launch = self.backward_pool.on(stream);
        launch.input(&dhidden).input(weights.reduce).output(dpool);
        launch.value(&images).value(&channels).value(&reduced).value(&pixels);
        // SAFETY: likewise for 4 images and 256 channels; `dpool` overlaps nothing.
        unsafe { launch.run([self.blocks(channels, GATE_TILE), 1, 1], 0, shapes) }?;

        let Gradients { reduce, reduce_bias, expand, expand_bias } = gradients;
        let mut launch = self.backward_weights.on(stream);
        launch.input(sums).input(state.gate).input(state.pooled).input(state.hidden).input(&dhidden);
        launch.output(reduce).output(reduce_bias).output(expand).output(expand_bias);
        launch.value(&images).value(&channels).value(&reduced);
        let blocks = channels.div_ceil(WEIGHT_THREADS) * reduced.div_ceil(WEIGHT_UNITS);
        // SAFETY: all buffers have their shapes and the gradients overlap nothing. A block changes the weights of 128
        // channels and 4 hidden units, those that exist; the biases belong to the first block of each.
        unsafe { launch.run([blocks, 1, 1], 0, shapes) }?;

        let dpool = dpool.as_view();
        let mut launch = self.backward_moments.on(stream);
        launch.input(sums).input(state.gate).input(&dpool).output(moments).value(&images).value(&channels);
        // SAFETY: all buffers have their shapes and `moments` overlaps none. A block reads 32 channels of every image,
        // those that exist, and writes their two moments.
        unsafe { launch.run([channels.div_ceil(MOMENT_TILE), 1, 1], 0, shapes) }
    }

    fn check_weights(&self, operands: &mut Operands<'_>, weights: Weights<'_, '_, T>) -> Result<()> {
        let (c, r) = (self.shape.c, self.reduced as usize);
        operands.read("W₁", weights.reduce, r * c)?;
        operands.read("b₁", weights.reduce_bias, r)?;
        operands.read("W₂", weights.expand, r * c)?;
        operands.read("b₂", weights.expand_bias, c)
    }

    /// Blocks for all images and `count` things, `tile` of which a block has.
    fn blocks(&self, count: u32, tile: u32) -> u32 {
        (self.shape.n as u32).div_ceil(IMAGE_TILE) * count.div_ceil(tile)
    }
}
