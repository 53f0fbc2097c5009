//! A raw convolution output and the normalisation owed to it, as the kernels that reduce over pixels take it.

use crate::device::cudarc::driver::CudaView;
use crate::device::{Element, Operands};
use crate::tensor::{Dtype, MAX_ELEMENTS, Shape};
use crate::{Error, Result};
use half::{bf16, f16};

/// An element of a raw tensor.
pub trait RawElement: Element {
    /// Its type as a value.
    const DTYPE: Dtype;
    /// The ending of its kernels' names.
    const SUFFIX: &'static str = Self::DTYPE.suffix();
}

impl RawElement for f32 {
    const DTYPE: Dtype = Dtype::F32;
}

impl RawElement for f16 {
    const DTYPE: Dtype = Dtype::F16;
}

impl RawElement for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

/// z = scale·y + shift, with x̂ = (y − mean)·rstd.
#[derive(Clone, Copy, Debug)]
pub struct RawView<'a, 'b, T> {
    /// The convolution's output, \[n, h, w, c\].
    pub y: &'a CudaView<'b, T>,
    /// γ·rstd, \[c\].
    pub scale: &'a CudaView<'b, f32>,
    /// β − γ·rstd·mean, \[c\].
    pub shift: &'a CudaView<'b, f32>,
    /// The mean of the batch, \[c\].
    pub mean: &'a CudaView<'b, f32>,
    /// 1/√(variance + ε), \[c\].
    pub rstd: &'a CudaView<'b, f32>,
}

impl<T> RawView<'_, '_, T> {
    /// Adds its buffers to the operands of an operation.
    pub(super) fn check(&self, operands: &mut Operands<'_>, shape: Shape) -> Result<()> {
        operands.read("y", self.y, shape.elements())?;
        operands.read("scale", self.scale, shape.c)?;
        operands.read("shift", self.shift, shape.c)?;
        operands.read("mean", self.mean, shape.c)?;
        operands.read("rstd", self.rstd, shape.c)
    }
}

/// Channels of a block of the kernels that sum over pixels: as in `kernels/include/channel_sums.cuh`.
const CHANNEL_TILE: u32 = 64;

/// Blocks of a kernel that sums over pixels.
pub(super) fn channel_blocks(shape: Shape) -> u32 {
    shape.n as u32 * (shape.c as u32).div_ceil(CHANNEL_TILE)
}

/// Refuses to take elements for those of `dtype` if they are not.
pub(super) fn check_storage<T: RawElement>(operation: &'static str, dtype: Dtype) -> Result<()> {
    if dtype.storage() == T::DTYPE {
        return Ok(());
    }
    let problem = format!("its elements are {}, which are not multiplied as {dtype}", T::DTYPE);
    Err(Error::Shape { operation, problem })
}

/// Refuses what the kernels that sum over pixels cannot index.
pub(super) fn check_shape(operation: &'static str, shape: Shape) -> Result<()> {
    let Shape { n, h, w, c } = shape;
    let elements = [h, w, c].into_iter().try_fold(n, usize::checked_mul);
    let problem = match elements {
        Some(elements) if (1..=MAX_ELEMENTS).contains(&elements) && c % 8 == 0 => return Ok(()),
        Some(elements) if (1..=MAX_ELEMENTS).contains(&elements) => {
            format!("{shape} has {c} channels; a multiple of 8 is needed")
        }
        _ => format!("{shape}: 1 to {MAX_ELEMENTS} elements are possible"),
    };
    Err(Error::Shape { operation, problem })
}
