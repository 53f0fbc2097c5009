//! The stem: the dense 3×3 convolution of stride 2 that reads the images. Formulas, shapes and bytes are in
//! `kernels/stem.cu`.
//!
//! Evaluation may give the images as bytes ([`StemInput::Bytes`]) and spare the normalised tensor.

use super::operand::{Arrival, GradientOutput, GradientView, NormFinish, Output, OutputKind};
use super::raw::RawElement;
use super::{Cost, Work, Workspace};
use crate::backend::Activation;
use crate::device::cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};
use crate::device::{Argument, Device, Entry, Family, Kernel, Operands};
use crate::tensor::{Conv, ConvKind, Dtype, MAX_ELEMENTS, Shape};
use crate::{Error, Result};
use std::marker::PhantomData;
use std::sync::Arc;

const THREADS: u32 = 256;

const fn entry(name: &'static str, signature: &'static str) -> Entry {
    Entry { name, signature, threads: THREADS }
}

/// The kernels of `kernels/stem.cu`.
pub const FAMILY: Family = Family {
    name: "stem",
    kernels: &[
        entry("stem_fprop_f32", "ppppppppp{56:8}I{48:4}"),
        entry("stem_fprop_f16", "ppppppppp{56:8}I{48:4}"),
        entry("stem_fprop_bf16", "ppppppppp{56:8}I{48:4}"),
        entry("stem_wgrad_f32", "pppppppppI{48:4}"),
        entry("stem_wgrad_f16", "pppppppppI{48:4}"),
        entry("stem_wgrad_bf16", "pppppppppI{48:4}"),
        entry("stem_dgrad_f32", "pppppp{48:4}"),
        entry("stem_dgrad_f16", "pppppp{48:4}"),
        entry("stem_dgrad_bf16", "pppppp{48:4}"),
    ],
};

// As in the `.cu` file.
const COLORS: usize = 3;
const TAPS: usize = 27;
const BAND_ROWS: u32 = 4;
const MAX_CHANNELS: usize = 64;
const MAX_BANDS: u32 = 16;
/// Most blocks of a launch, each of which leaves partial sums: of fprop, of wgrad.
const FPROP_RUNS: u32 = 512;
const WGRAD_RUNS: u32 = 256;
/// Bytes in which the threads of a block put their sums together.
const COLLECTED: u32 = 8192;
const TABLE: usize = 256 * COLORS;
const OPERATION: &str = "stem";

/// `StemShape` of the `.cu` file.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Raw {
    images: u32,
    height: u32,
    width: u32,
    out_height: u32,
    out_width: u32,
    channels: u32,
    pad_top: u32,
    pad_left: u32,
    columns: u32,
    bands: u32,
    tiles_across: u32,
    tiles_down: u32,
}

// SAFETY: a plain struct of the layout that the kernels declare.
unsafe impl DeviceRepr for Raw {}

impl Argument for Raw {
    const CODE: &'static str = "{48:4}";
}

impl Raw {
    fn tiles(&self) -> u32 {
        self.images * self.tiles_across * self.tiles_down
    }

    /// Bytes of the input rows in shared memory.
    fn rows(&self, dtype: Dtype) -> u32 {
        let pitch = ((2 * self.columns + 1) * COLORS as u32 + 14) / 8 * 8;
        (2 * BAND_ROWS * self.bands + 1) * pitch * dtype.bytes() as u32
    }
}

/// A stem of certain shapes: what its launches are and cost, without a device.
#[derive(Clone, Copy, Debug)]
pub struct StemShape {
    x: Shape,
    y: Shape,
    fprop: Raw,
    wgrad: Raw,
}

impl StemShape {
    /// The 3×3 convolution `conv` of stride 2 on images `x`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another convolution or other than 3 inputs, for outputs that are no multiple of 8 or more than
    /// 64, and for an empty or too large tensor.
    pub fn new(conv: &Conv, x: Shape) -> Result<Self> {
        let y = conv.output(x)?;
        let wrong = |problem| Err(Error::Shape { operation: OPERATION, problem });
        let Conv { kind, kernel, stride, inputs, outputs, .. } = *conv;
        if (kind, kernel, stride, inputs) != (ConvKind::Dense, 3, 2, COLORS) {
            return wrong(format!("{conv:?}: the stem is a dense 3×3 convolution of stride 2 with 3 inputs"));
        }
        if outputs % 8 != 0 || !(8..=MAX_CHANNELS).contains(&outputs) {
            return wrong(format!("{outputs} outputs; a multiple of 8 up to {MAX_CHANNELS} is needed"));
        }
        // Rows of a tile below the last image are counted, too.
        let beyond = (2 * BAND_ROWS * MAX_BANDS + 3) as usize * COLORS * x.w;
        if x.elements() + beyond > MAX_ELEMENTS {
            return wrong(format!("{x} is too large; use a smaller batch"));
        }
        let groups = (outputs / 8) as u32;
        let raw = |slots: u32| {
            let (out_height, out_width) = (y.h as u32, y.w as u32);
            let columns = out_width.div_ceil(out_width.div_ceil(slots));
            let bands = (slots / columns).clamp(1, out_height.div_ceil(BAND_ROWS).min(MAX_BANDS));
            Raw {
                images: x.n as u32,
                height: x.h as u32,
                width: x.w as u32,
                out_height,
                out_width,
                channels: outputs as u32,
                pad_top: conv.pad_before(x.h) as u32,
                pad_left: conv.pad_before(x.w) as u32,
                columns,
                bands,
                tiles_across: out_width.div_ceil(columns),
                tiles_down: out_height.div_ceil(BAND_ROWS * bands),
            }
        };
        let slots = THREADS / groups;
        Ok(Self { x, y, fprop: raw(slots.min(128)), wgrad: raw((slots / 2).min(64)) })
    }

    /// Of the input.
    pub const fn input(&self) -> Shape {
        self.x
    }

    /// Of the output.
    pub const fn output(&self) -> Shape {
        self.y
    }

    /// The number of weights.
    pub const fn weights(&self) -> usize {
        self.y.c * TAPS
    }

    /// Bytes of x, the weights and whatever else there is of the type.
    const fn bytes(&self, dtype: Dtype, elements: usize) -> u64 {
        (elements * dtype.bytes()) as u64
    }

    const fn operations(&self) -> u64 {
        (2 * TAPS * self.y.elements()) as u64
    }

    const fn input_bytes(&self, dtype: Dtype, from_bytes: bool) -> u64 {
        match from_bytes {
            true => (self.x.elements() + 4 * TABLE) as u64,
            false => self.bytes(dtype, self.x.elements()),
        }
    }

    /// The launch of [`Stem::fprop`], reading bytes or elements.
    pub fn fprop_work(&self, dtype: Dtype, from_bytes: bool, output: OutputKind) -> Work {
        let Self { y, fprop, .. } = self;
        let runs = blocks(fprop, FPROP_RUNS);
        let extra = match output {
            OutputKind::Plain => 0,
            // Partial moments, γ, β, the running statistics and the norm.
            OutputKind::Moments => 4 * moment_floats(runs, y.c) as u64 + 4 * 10 * y.c as u64,
            OutputKind::Folded { skip } => {
                4 * y.c as u64 + if skip { self.bytes(dtype, y.elements()) } else { 0 }
            }
        };
        Work {
            kernel: format!("stem_fprop_{}", dtype.suffix()),
            grid: [runs, 1, 1],
            shared: 4 * TAPS as u32 * fprop.channels + fprop.rows(dtype).max(COLLECTED),
            cost: Cost {
                bytes: self.input_bytes(dtype, from_bytes)
                    + self.bytes(dtype, self.weights() + y.elements())
                    + extra,
                tensor_operations: 0,
                operations: self.operations(),
            },
        }
    }

    /// The launch of [`Stem::wgrad`].
    pub fn wgrad_work(&self, dtype: Dtype, from_bytes: bool) -> Work {
        let Self { y, wgrad, .. } = self;
        let runs = blocks(wgrad, WGRAD_RUNS);
        let floats = (runs as usize + 2) * self.weights() + 3 * y.c;
        Work {
            kernel: format!("stem_wgrad_{}", dtype.suffix()),
            grid: [runs, 1, 1],
            shared: self.wgrad_rows_at() + wgrad.rows(dtype),
            cost: Cost {
                bytes: self.input_bytes(dtype, from_bytes)
                    + self.bytes(dtype, 2 * y.elements())
                    + 4 * floats as u64,
                tensor_operations: 0,
                operations: self.operations(),
            },
        }
    }

    /// Where the input rows of wgrad begin in shared memory: behind dy.
    fn wgrad_rows_at(&self) -> u32 {
        let Raw { columns, bands, channels, .. } = self.wgrad;
        (4 * BAND_ROWS * bands * columns * channels).max(COLLECTED)
    }

    /// The launch of [`Stem::dgrad`], with something to add or not.
    pub fn dgrad_work(&self, dtype: Dtype, skip: bool) -> Work {
        let Self { x, y, .. } = self;
        let elements = 2 * y.elements() + self.weights() + (1 + usize::from(skip)) * x.elements();
        Work {
            kernel: format!("stem_dgrad_{}", dtype.suffix()),
            grid: [(x.pixels() as u32).div_ceil(THREADS), 1, 1],
            shared: 0,
            cost: Cost {
                bytes: self.bytes(dtype, elements) + 4 * 3 * y.c as u64,
                tensor_operations: 0,
                operations: self.operations(),
            },
        }
    }

    /// Floats that the launches need in a [`Workspace`].
    pub fn workspace_floats(&self) -> usize {
        let wgrad = blocks(&self.wgrad, WGRAD_RUNS) as usize * self.weights();
        wgrad.max(moment_floats(blocks(&self.fprop, FPROP_RUNS), self.y.c))
    }
}

/// Blocks of a launch: all alike but for the last ones, and at most `runs`.
fn blocks(shape: &Raw, runs: u32) -> u32 {
    let tiles = shape.tiles();
    tiles.div_ceil(tiles.div_ceil(runs))
}

/// Two numbers for each run and channel, and the runs' pixels.
const fn moment_floats(runs: u32, channels: usize) -> usize {
    runs as usize * (2 * channels + 1)
}

/// The images.
#[derive(Clone, Copy, Debug)]
pub enum StemInput<'a, 'b, T> {
    /// Normalised, \[n, h, w, 3\].
    Elements(&'a CudaView<'b, T>),
    /// 8-bit RGB, normalised on load: the same values as [`Input::forward`](super::input::Input::forward) makes of
    /// unmixed images.
    Bytes {
        /// \[n, h, w, 3\].
        images: &'a CudaView<'b, u8>,
        /// \[3, 256\], as [`table`](super::input::table) makes it.
        table: &'a CudaView<'b, f32>,
    },
}

impl<T: RawElement> StemInput<'_, '_, T> {
    fn check(&self, operands: &mut Operands<'_>, x: Shape) -> Result<()> {
        match self {
            Self::Elements(elements) => operands.read("x", *elements, x.elements()),
            Self::Bytes { images, table } => {
                operands.read("images", *images, x.elements())?;
                operands.read("the table", *table, TABLE)
            }
        }
    }

    const fn is_bytes(&self) -> bool {
        matches!(self, Self::Bytes { .. })
    }
}

/// The plan for one stem, batch and element type. The same calls give the same bits.
#[derive(Debug)]
pub struct Stem<T> {
    device: Device,
    shape: StemShape,
    fprop: Kernel,
    wgrad: Kernel,
    dgrad: Kernel,
    element: PhantomData<fn() -> T>,
}

impl<T: RawElement> Stem<T> {
    /// For the convolution `conv` on images `x`.
    ///
    /// # Errors
    /// Those of [`StemShape::new`] and of [`Device::module`].
    pub fn plan(device: &Device, conv: &Conv, x: Shape) -> Result<Self> {
        let shape = StemShape::new(conv, x)?;
        let module = device.module(&FAMILY)?;
        let kernel = |name: &str| module.kernel(&format!("stem_{name}_{}", T::SUFFIX));
        Ok(Self {
            device: device.clone(),
            shape,
            fprop: kernel("fprop")?,
            wgrad: kernel("wgrad")?,
            dgrad: kernel("dgrad")?,
            element: PhantomData,
        })
    }

    /// The shapes, and what the launches cost.
    pub const fn shape(&self) -> &StemShape {
        &self.shape
    }

    /// Floats that the launches need in a [`Workspace`].
    pub fn workspace_floats(&self) -> usize {
        self.shape.workspace_floats()
    }

    /// y ← the convolution of the images, finished as `output` says. `weight` is \[out, 3, 3, 3\], y \[n, h/2, w/2, out\].
    ///
    /// # Errors
    /// [`Error::Shape`] for buffers of another length, device or alignment, or that overlap, too small a workspace, or the
    /// moments of a single value per channel. Nothing has been changed then. [`Error::Driver`].
    pub fn fprop(
        &self,
        stream: &Arc<CudaStream>,
        x: StemInput<'_, '_, T>,
        weight: &CudaView<'_, T>,
        y: &mut CudaViewMut<'_, T>,
        mut output: Output<'_, '_, T>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let shape = &self.shape;
        let work = shape.fprop_work(T::DTYPE, x.is_bytes(), output.kind());
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        x.check(&mut operands, shape.x)?;
        operands.read("weights", weight, shape.weights())?;
        operands.write("y", y, shape.y.elements())?;
        output.check(&mut operands, shape.y)?;
        let mut finish = NormFinish::default();
        let mut flags = 0_u32;
        match &mut output {
            Output::Plain => {}
            Output::Moments(statistics) => {
                if shape.y.pixels() == 1 {
                    let problem = format!("{} has one value per channel, and that has no variance", shape.y);
                    return Err(Error::Shape { operation: OPERATION, problem });
                }
                workspace.check(OPERATION, moment_floats(work.grid[0], shape.y.c), 1)?;
                finish = statistics.finish(stream, shape.y.pixels());
                flags = 1;
            }
            Output::Folded { act, .. } => {
                flags = match act {
                    Activation::Identity => 2,
                    Activation::Silu => 6,
                };
            }
        }
        let mut partial = workspace.partial.as_view_mut();
        let mut counters = workspace.counters.as_view_mut();
        let mut launch = self.fprop.on(stream);
        push_input(&mut launch, &x);
        launch.input(weight).output(y);
        match &output {
            Output::Folded { bias, skip, .. } => {
                launch.input(bias);
                match skip {
                    Some(skip) => launch.input(skip),
                    None => launch.null(),
                };
            }
            _ => {
                launch.null().null();
            }
        }
        launch.output(&mut partial).output(&mut counters);
        launch.value(&finish).value(&flags).value(&shape.fprop);
        // SAFETY: all buffers have their shapes and what is written overlaps nothing else. A block reads what the tiles of
        // `shape.fprop` need, those pixels that exist, and writes the pixels of y in them, its partial moments, for which
        // there is room, and as the last block the norm and the running statistics. The shared memory is the sum of the
        // weights and the rows, in which 256 threads find room for 8 sums each.
        unsafe { launch.run(work.grid, work.shared, shape.x) }
    }

    /// dweight += the gradient of the weights, \[out, 3, 3, 3\] in f32.
    ///
    /// # Errors
    /// As for [`fprop`](Self::fprop), and for a gradient that does not arrive [alone](Arrival::Alone).
    pub fn wgrad(
        &self,
        stream: &Arc<CudaStream>,
        x: StemInput<'_, '_, T>,
        gradient: GradientView<'_, '_, T>,
        dweight: &mut CudaViewMut<'_, f32>,
        workspace: &mut Workspace,
    ) -> Result<()> {
        let shape = &self.shape;
        let work = shape.wgrad_work(T::DTYPE, x.is_bytes());
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        x.check(&mut operands, shape.x)?;
        check_gradient(&gradient, &mut operands, shape.y)?;
        operands.write("the gradient of the weights", dweight, shape.weights())?;
        workspace.check(OPERATION, work.grid[0] as usize * shape.weights(), 1)?;
        let mut partial = workspace.partial.as_view_mut();
        let mut counters = workspace.counters.as_view_mut();
        let rows_at = shape.wgrad_rows_at();
        let mut launch = self.wgrad.on(stream);
        push_input(&mut launch, &x);
        launch.input(gradient.g).input(gradient.y).input(gradient.owed).output(dweight);
        launch.output(&mut partial).output(&mut counters).value(&rows_at).value(&shape.wgrad);
        // SAFETY: as in `fprop`; a block writes its partial sums alone, one for each weight, and the last block dweight.
        // The shared memory is the sum of dy, which has room for 8 floats a thread, and the rows.
        unsafe { launch.run(work.grid, work.shared, shape.x) }
    }

    /// dx ← the gradient of the images, \[n, h, w, 3\], plus what is to be added.
    ///
    /// # Errors
    /// As for [`wgrad`](Self::wgrad), and for another output than [`GradientOutput::Plain`].
    pub fn dgrad(
        &self,
        stream: &Arc<CudaStream>,
        gradient: GradientView<'_, '_, T>,
        weight: &CudaView<'_, T>,
        dx: &mut CudaViewMut<'_, T>,
        output: GradientOutput<'_, '_, T>,
    ) -> Result<()> {
        let shape = &self.shape;
        let GradientOutput::Plain { skip } = output else {
            let problem = "images are stored plainly: no activation lies before the stem".into();
            return Err(Error::Shape { operation: OPERATION, problem });
        };
        let mut operands = Operands::new(OPERATION, &self.device, stream)?;
        check_gradient(&gradient, &mut operands, shape.y)?;
        operands.read("weights", weight, shape.weights())?;
        if let Some(skip) = skip {
            operands.read("skip", skip, shape.x.elements())?;
        }
        operands.write("dx", dx, shape.x.elements())?;
        let work = shape.dgrad_work(T::DTYPE, skip.is_some());
        let mut launch = self.dgrad.on(stream);
        launch.input(gradient.g).input(gradient.y).input(gradient.owed).input(weight);
        match skip {
            Some(skip) => launch.input(skip),
            None => launch.null(),
        };
        launch.output(dx).value(&shape.fprop);
        // SAFETY: all buffers have their shapes and dx overlaps none. A thread reads the output pixels that a pixel reaches,
        // those that exist, and writes the pixel's three elements.
        unsafe { launch.run(work.grid, work.shared, shape.x) }
    }
}

/// The first three arguments of fprop and wgrad.
fn push_input<'a, 'b: 'a, 'c: 'b, T: RawElement>(
    launch: &mut crate::device::Launch<'a>,
    x: &StemInput<'b, 'c, T>,
) {
    match *x {
        StemInput::Elements(elements) => launch.input(elements).null().null(),
        StemInput::Bytes { images, table } => launch.null().input(images).input(table),
    };
}

fn check_gradient<T: RawElement>(
    gradient: &GradientView<'_, '_, T>,
    operands: &mut Operands<'_>,
    y: Shape,
) -> Result<()> {
    if !matches!(gradient.arrival, Arrival::Alone) {
        let problem =
            "the gradient of a stem's output arrives alone: it has neither stochastic depth nor a gate"
                .into();
        return Err(Error::Shape { operation: OPERATION, problem });
    }
    gradient.check(operands, y)
}
