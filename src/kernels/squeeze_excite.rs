//! Squeeze-excitation: the pool, both layers and the gate, and their backward with the sums that batch norm needs of it.
//! Formulas, shapes and bytes are in `kernels/squeeze_excite.cu`.
//!
//! Forward is [`forward`](SqueezeExcite::forward); whoever reads SiLU(z)·gate applies both on load. Backward is
//! [`backward_sums`](SqueezeExcite::backward_sums), unless what made dx has taken those sums already, and
//! [`backward`](SqueezeExcite::backward); then dz = (gate·dx + dpool)·SiLU'(z), to be applied on load again.

use super::operand::Debt;
use super::raw::{RawElement, RawView, channel_blocks, check_shape};
use super::{Cost, Work, Workspace};
use crate::device::cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut};
use crate::device::{Device, Entry, Family, Kernel, Operands};
use crate::tensor::{Dtype, MAX_ELEMENTS, Shape};
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
        entry("squeeze_excite_forward_f32", "ppppppppppppIII"),
        entry("squeeze_excite_forward_f16", "ppppppppppppIII"),
        entry("squeeze_excite_forward_bf16", "ppppppppppppIII"),
        entry("squeeze_excite_sums_f32", "pppppppIII"),
        entry("squeeze_excite_sums_f16", "pppppppIII"),
        entry("squeeze_excite_sums_bf16", "pppppppIII"),
        entry("squeeze_excite_backward_hidden_f32", "pppppppIII"),
        entry("squeeze_excite_backward_hidden_f16", "pppppppIII"),
        entry("squeeze_excite_backward_hidden_bf16", "pppppppIII"),
        entry("squeeze_excite_backward_f32", "pppppppppppIIII{40:8}"),
        entry("squeeze_excite_backward_f16", "pppppppppppIIII{40:8}"),
        entry("squeeze_excite_backward_bf16", "pppppppppppIIII{40:8}"),
    ],
};

// As in the `.cu` file: images of a block of the hidden units' gradient, channels of it and of one of the last kernel.
const IMAGE_GROUP: u32 = 4;
const CHANNEL_TILE: u32 = 64;
const BACKWARD_TILE: u32 = 32;

/// Hidden units, at most: the last block of an image keeps them in shared memory.
const MOST_HIDDEN: usize = 8192;

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

/// The same, to be written.
#[derive(Debug)]
pub struct StateMut<'a, 'b> {
    /// The mean of SiLU(z), \[n, c\].
    pub pooled: &'a mut CudaViewMut<'b, f32>,
    /// W₁·pooled + b₁, \[n, reduced\].
    pub hidden: &'a mut CudaViewMut<'b, f32>,
    /// The gate, \[n, c\].
    pub gate: &'a mut CudaViewMut<'b, f32>,
}

/// What a squeeze-excitation is of; its launches, without a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqueezeExciteShape {
    shape: Shape,
    reduced: usize,
    dtype: Dtype,
}

impl SqueezeExciteShape {
    /// Of raw outputs of `shape` and `dtype`, with `reduced` hidden units.
    ///
    /// # Errors
    /// [`Error::Shape`] for an empty shape, channels that are no multiple of 8, no hidden units or more than 8192, or a
    /// tensor of 2³¹ elements and more.
    pub fn new(shape: Shape, reduced: usize, dtype: Dtype) -> Result<Self> {
        check_shape(OPERATION, shape)?;
        let Shape { n, c, .. } = shape;
        let tiles = c.div_ceil(CHANNEL_TILE as usize);
        let fits = |a: usize, b: usize, c: usize| {
            a.checked_mul(b).and_then(|ab| ab.checked_mul(c)).is_some_and(|count| count <= MAX_ELEMENTS)
        };
        let possible = (1..=MOST_HIDDEN).contains(&reduced)
            && fits(1, c, reduced)
            && fits(n, tiles, reduced)
            && fits(n, c, SUMS);
        if possible {
            return Ok(Self { shape, reduced, dtype });
        }
        let problem = format!(
            "{shape} with {reduced} hidden units; 1 to {MOST_HIDDEN} are possible, and at most {MAX_ELEMENTS} elements"
        );
        Err(Error::Shape { operation: OPERATION, problem })
    }

    /// Bytes of one of the two layers' weights.
    fn weights(&self) -> usize {
        self.shape.c * self.reduced * self.dtype.bytes()
    }

    /// What the channels of a tile contribute to the hidden units of all images.
    fn partial_floats(&self) -> usize {
        let Shape { n, c, .. } = self.shape;
        n * c.div_ceil(CHANNEL_TILE as usize) * self.reduced
    }

    fn work(&self, name: &str, blocks: u32, shared: usize, bytes: usize, operations: usize) -> Work {
        let cost = Cost { bytes: bytes as u64, tensor_operations: 0, operations: operations as u64 };
        let kernel = format!("squeeze_excite_{name}_{}", self.dtype.suffix());
        Work { kernel, grid: [blocks, 1, 1], shared: shared as u32, cost }
    }

    /// The launch of [`SqueezeExcite::forward`].
    pub fn forward_work(&self) -> Work {
        let Shape { n, c, .. } = self.shape;
        let (elements, r) = (self.shape.elements(), self.reduced);
        let floats = self.partial_floats() + 2 * c + r + c + n * (2 * c + r);
        let bytes = elements * self.dtype.bytes() + 2 * self.weights() + 4 * floats;
        self.work("forward", channel_blocks(self.shape), 4 * r, bytes, 6 * elements + 4 * n * r * c)
    }

    /// The launch of [`SqueezeExcite::backward_sums`].
    pub fn backward_sums_work(&self) -> Work {
        let Shape { n, c, .. } = self.shape;
        let elements = self.shape.elements();
        let bytes = 2 * elements * self.dtype.bytes() + 4 * (4 * c + SUMS * n * c);
        self.work("sums", channel_blocks(self.shape), 0, bytes, 22 * elements)
    }

    /// The launches of [`SqueezeExcite::backward`], in their order.
    pub fn backward_works(&self) -> [Work; 2] {
        let Shape { n, c, .. } = self.shape;
        let r = self.reduced;
        let floats = self.partial_floats() + n * (2 * c + 2 * r);
        let blocks = (n as u32).div_ceil(IMAGE_GROUP) * (c as u32).div_ceil(CHANNEL_TILE);
        let hidden = self.work("backward_hidden", blocks, 0, self.weights() + 4 * floats, 2 * n * r * c);
        // Read: all sums, the gate, what was pooled and the hidden units with their gradient; written: dpool; the gradients
        // of the weights and biases are read and written, and so are those of batch norm.
        let floats = n * ((SUMS + 3) * c + 2 * r) + 2 * (2 * r * c + r + c) + 11 * c;
        let rest = self.work(
            "backward",
            (c as u32).div_ceil(BACKWARD_TILE),
            0,
            self.weights() + 4 * floats,
            6 * n * r * c,
        );
        [hidden, rest]
    }

    /// Floats of a [`Workspace`] that the operations need.
    pub fn workspace_floats(&self) -> usize {
        self.partial_floats()
    }
}

/// What [`SqueezeExcite::backward`] reads.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInput<'a, 'b, T> {
    /// Those of [`SqueezeExcite::backward_sums`], \[5, n, c\].
    pub sums: &'a CudaView<'b, f32>,
    /// What the forward pass left.
    pub state: State<'a, 'b>,
    /// The layers.
    pub weights: Weights<'a, 'b, T>,
}

/// The plan for one shape, number of hidden units and element type. The same calls give the same bits.
#[derive(Debug)]
pub struct SqueezeExcite<T> {
    device: Device,
    shape: SqueezeExciteShape,
    forward: Kernel,
    sums: Kernel,
    backward_hidden: Kernel,
    backward: Kernel,
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
    /// Those of [`SqueezeExciteShape::new`] and [`Device::module`]; [`Error::Driver`].
    pub fn plan(device: &Device, shape: Shape, reduced: usize) -> Result<Self> {
        let shape = SqueezeExciteShape::new(shape, reduced, T::DTYPE)?;
        let module = device.module(&FAMILY)?;
        let kernel = |name: &str| module.kernel(&format!("squeeze_excite_{name}_{}", T::SUFFIX));
        Ok(Self {
            device: device.clone(),
            shape,
            forward: kernel("forward")?,
            sums: kernel("sums")?,
            backward_hidden: kernel("backward_hidden")?,
            backward: kernel("backward")?,
            dhidden: device.zeros(shape.shape.n * reduced)?,
            element: PhantomData,
        })
    }

    /// What it launches.
    pub fn shape(&self) -> SqueezeExciteShape {
        self.shape
    }

    /// Floats of the [`Workspace`] that its operations share.
    pub fn workspace_floats(&self) -> usize {
        self.shape.workspace_floats()
    }

    /// pooled ← the mean over pixels of SiLU(z), \[n, c\]; hidden ← W₁·pooled + b₁, \[n, reduced\]; and
    /// gate ← σ(W₂·SiLU(hidden) + b₂), \[n, c\].
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap, for a workspace that is too
    /// small, and for more than [`Workspace::COUNTERS`] images. Nothing has been changed then. [`Error::Driver`].
    pub fn forward(
        &self,
        stream: &Arc<CudaStream>,
        raw: RawView<'_, '_, T>,
        weights: Weights<'_, '_, T>,
        state: StateMut<'_, '_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let SqueezeExciteShape { shape, reduced, .. } = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        raw.check(&mut operands, shape)?;
        self.check_weights(&mut operands, weights)?;
        let StateMut { pooled, hidden, gate } = state;
        operands.write("pooled", &*pooled, shape.n * shape.c)?;
        operands.write("hidden", &*hidden, shape.n * reduced)?;
        operands.write("gate", &*gate, shape.n * shape.c)?;
        workspace.check(OPERATION, self.shape.partial_floats(), shape.n)?;
        let work = self.shape.forward_work();
        let (pixels, channels, reduced) = ((shape.h * shape.w) as u32, shape.c as u32, reduced as u32);
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut launch = self.forward.on(stream);
        launch.input(raw.y).input(raw.scale).input(raw.shift);
        launch.input(weights.reduce).input(weights.reduce_bias);
        launch.input(weights.expand).input(weights.expand_bias);
        launch.output(pooled).output(hidden).output(gate).output(&mut partial).output(&mut counters);
        launch.value(&pixels).value(&channels).value(&reduced);
        // SAFETY: y has `shape`, whose channels are a multiple of 8, the vectors its channels, weights and state their
        // shapes, and the workspace a row of hidden units for each block and a counter for each image. A block reads one
        // image's tile of 64 channels, those that exist, and writes their means and its row; the last one of an image
        // reads the image's rows and writes its hidden units, which fit the shared memory, and its gate. Nothing that is
        // written overlaps anything.
        unsafe { launch.run(work.grid, work.shared, format_args!("{shape}, {reduced} hidden units")) }
    }

    /// Of dx, the gradient of SiLU(z)·gate, for each image and channel the sums over pixels, `sums` \[5, n, c\]:
    /// dx·SiLU'(z), SiLU'(z), dx·SiLU'(z)·x̂, SiLU'(z)·x̂, and dx·SiLU(z).
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap. Nothing has been changed
    /// then. [`Error::Driver`].
    pub fn backward_sums(
        &self,
        stream: &Arc<CudaStream>,
        dx: &CudaView<'_, T>,
        raw: RawView<'_, '_, T>,
        sums: &mut CudaViewMut<'_, f32>,
    ) -> Result<()> {
        let SqueezeExciteShape { shape, .. } = self.shape;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("dx", dx, shape.elements())?;
        raw.check(&mut operands, shape)?;
        operands.write("sums", sums, SUMS * shape.n * shape.c)?;
        let work = self.shape.backward_sums_work();
        let (images, pixels, channels) = (shape.n as u32, (shape.h * shape.w) as u32, shape.c as u32);
        let mut launch = self.sums.on(stream);
        launch.input(dx).input(raw.y).input(raw.scale).input(raw.shift).input(raw.mean).input(raw.rstd);
        launch.output(sums).value(&pixels).value(&channels).value(&images);
        // SAFETY: as in `forward`; dx is read where y is, and a block writes SUMS numbers for each of its channels.
        unsafe { launch.run(work.grid, work.shared, shape) }
    }

    /// From the sums of [`backward_sums`](Self::backward_sums): dpool \[n, c\], what SiLU(z) still receives at every pixel
    /// through the pool; the gradients of the layers, which are added to what is there; and what batch norm's backward
    /// owes, from Σ dz and Σ dz·x̂ over images and pixels, where dz = (gate·dx + dpool)·SiLU'(z).
    ///
    /// # Errors
    /// As for [`forward`](Self::forward).
    pub fn backward(
        &mut self,
        stream: &Arc<CudaStream>,
        input: BackwardInput<'_, '_, T>,
        gradients: Gradients<'_, '_>,
        dpool: &mut CudaViewMut<'_, f32>,
        mut debt: Debt<'_, '_>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let SqueezeExciteShape { shape, reduced: r, .. } = self.shape;
        let (n, c) = (shape.n, shape.c);
        let BackwardInput { sums, state, weights } = input;
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        operands.read("sums", sums, SUMS * n * c)?;
        operands.read("pooled", state.pooled, n * c)?;
        operands.read("hidden", state.hidden, n * r)?;
        operands.read("gate", state.gate, n * c)?;
        self.check_weights(&mut operands, weights)?;
        let Gradients { reduce, reduce_bias, expand, expand_bias } = gradients;
        operands.write("the gradient of W₁", &*reduce, r * c)?;
        operands.write("the gradient of b₁", &*reduce_bias, r)?;
        operands.write("the gradient of W₂", &*expand, r * c)?;
        operands.write("the gradient of b₂", &*expand_bias, c)?;
        operands.write("dpool", dpool, n * c)?;
        debt.check(&mut operands, c)?;
        workspace.check(OPERATION, self.shape.partial_floats(), n.div_ceil(IMAGE_GROUP as usize))?;
        let [first, second] = self.shape.backward_works();
        let (images, channels, reduced) = (n as u32, c as u32, r as u32);
        let pixels = (shape.h * shape.w) as u32;
        let shapes = format_args!("{shape}, {reduced} hidden units");
        let (mut partial, mut counters) = (workspace.partial.as_view_mut(), workspace.counters.as_view_mut());
        let mut dhidden = self.dhidden.as_view_mut();
        let mut launch = self.backward_hidden.on(stream);
        launch.input(sums).input(state.gate).input(weights.expand).input(state.hidden).output(&mut dhidden);
        launch.output(&mut partial).output(&mut counters);
        launch.value(&images).value(&channels).value(&reduced);
        // SAFETY: all buffers have their shapes, `dhidden` is this plan's own, and the workspace has a row of hidden units
        // for each image and tile of channels, and a counter for each 4 images. A block reads what 4 images and 64
        // channels need and writes its rows; the last one of 4 images reads theirs and writes their part of `dhidden`.
        unsafe { launch.run(first.grid, first.shared, shapes) }?;

        let dhidden = self.dhidden.as_view();
        let finish = debt.finish(stream, shape.pixels());
        let mut launch = self.backward.on(stream);
        launch.input(sums).input(state.gate).input(state.pooled).input(state.hidden).input(&dhidden);
        launch.input(weights.reduce).output(dpool);
        launch.output(reduce).output(reduce_bias).output(expand).output(expand_bias);
        launch.value(&images).value(&channels).value(&reduced).value(&pixels).value(&finish);
        // SAFETY: all buffers have their shapes and what is written overlaps nothing. A block reads what its 32 channels
        // need and writes their part of dpool, of the gradients of the weights and of the debt; the gradient of b₁ belongs
        // to the first block.
        unsafe { launch.run(second.grid, second.shared, shapes) }
    }

    fn check_weights(&self, operands: &mut Operands<'_>, weights: Weights<'_, '_, T>) -> Result<()> {
        let (c, r) = (self.shape.shape.c, self.shape.reduced);
        operands.read("W₁", weights.reduce, r * c)?;
        operands.read("b₁", weights.reduce_bias, r)?;
        operands.read("W₂", weights.expand, r * c)?;
        operands.read("b₂", weights.expand_bias, c)
    }
}
