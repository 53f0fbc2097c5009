//! NVIDIA's own libraries, for measuring against them: cuBLASLt for pointwise convolutions, cuDNN for dense 3×3 and
//! depthwise ones.
//!
//! An [`Operation`] is one direction of one convolution, with the algorithms that its library offers for it, the fastest
//! first. It computes what a bare convolution is: no normalisation on load, no moments on store. Everything is done on
//! [`Device::compute`], and nothing in this crate computes with it.
//!
//! The libraries are opened by name (`libcublasLt.so`, `libcudnn.so`); `benches/peers/libraries.sh` makes those names
//! where only Python packages have them.

mod cublaslt;
mod cudnn;

pub use cublaslt::CublasLt;
pub use cudnn::Cudnn;

use crate::device::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut};
use crate::device::{Device, Element};
use crate::kernels::RawElement;
use crate::tensor::{Conv, ConvKind, Dtype, Shape};
use crate::{Error, Result};
use std::ffi::c_void;
use std::rc::Rc;
use std::sync::Arc;

/// What is computed from what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// y from x and w.
    Forward,
    /// dx from g and w.
    Data,
    /// dw from x and g.
    Weights,
}

/// The tensors of a convolution, in all directions.
#[derive(Debug)]
pub struct Tensors<T> {
    /// What products are computed in: [`Dtype::Tf32`], or the type of `T`.
    pub dtype: Dtype,
    /// The input, \[n, h, w, c\].
    pub x: CudaSlice<T>,
    /// The weights as libraries have them: \[out, kh, kw, in\], of depthwise ones \[c, kh, kw\].
    pub weight: CudaSlice<T>,
    /// The output.
    pub y: CudaSlice<T>,
    /// The gradient of the output.
    pub g: CudaSlice<T>,
    /// The gradient of the input.
    pub dx: CudaSlice<T>,
    /// The gradient of the weights in f32, to which cuBLASLt adds, as our kernels do.
    pub dweight: CudaSlice<f32>,
    /// The gradient of the weights in the type that cuDNN writes.
    pub typed_dweight: CudaSlice<T>,
}

/// The libraries that could be opened.
#[derive(Clone, Debug)]
pub struct Libraries {
    cublaslt: Option<Rc<CublasLt>>,
    cudnn: Option<Rc<Cudnn>>,
}

impl Libraries {
    /// For work on `device`, and why one is missing.
    pub fn open(device: &Device) -> (Self, Vec<Error>) {
        let mut missing = Vec::new();
        let cublaslt = CublasLt::open(device).map_err(|error| missing.push(error)).ok().map(Rc::new);
        let cudnn = Cudnn::open(device).map_err(|error| missing.push(error)).ok().map(Rc::new);
        (Self { cublaslt, cudnn }, missing)
    }

    /// Whether there is one for convolutions of this kind.
    pub fn has(&self, kind: ConvKind) -> bool {
        match kind {
            ConvKind::Pointwise => self.cublaslt.is_some(),
            ConvKind::Dense | ConvKind::Depthwise => self.cudnn.is_some(),
        }
    }

    /// One direction of `conv` on inputs of shape `x`, for which `tensors` are written while algorithms are compared.
    ///
    /// # Errors
    /// [`Error::Library`] when no algorithm can compute it; [`Error::Shape`].
    pub fn operation<T: RawElement>(
        &self,
        conv: &Conv,
        x: Shape,
        direction: Direction,
        tensors: &mut Tensors<T>,
    ) -> Result<Operation> {
        match (conv.kind, &self.cublaslt, &self.cudnn) {
            (ConvKind::Pointwise, Some(library), _) => {
                library.product(x, conv.outputs, direction, tensors).map(Operation::Product)
            }
            (ConvKind::Dense | ConvKind::Depthwise, _, Some(library)) => {
                library.convolution(conv, x, direction, tensors).map(Operation::Convolution)
            }
            _ => {
                let problem = format!("the library for {conv:?} could not be opened");
                Err(Error::Shape { operation: "operation of a library", problem })
            }
        }
    }
}

/// One direction of one convolution.
#[derive(Debug)]
pub enum Operation {
    /// By cuBLASLt.
    Product(cublaslt::Product),
    /// By cuDNN.
    Convolution(cudnn::Convolution),
}

impl Operation {
    /// The library and its version.
    pub fn library(&self) -> &str {
        match self {
            Self::Product(product) => product.library(),
            Self::Convolution(convolution) => convolution.library(),
        }
    }

    /// What can compute it, the fastest first; one at least.
    pub fn algorithms(&self) -> &[String] {
        match self {
            Self::Product(product) => product.algorithms(),
            Self::Convolution(convolution) => convolution.algorithms(),
        }
    }

    /// Computes it by one of [`algorithms`](Self::algorithms).
    ///
    /// # Errors
    /// [`Error::Library`]; [`Error::Shape`] for tensors of other lengths.
    pub fn run<T: RawElement>(&self, algorithm: usize, tensors: &mut Tensors<T>) -> Result<()> {
        match self {
            Self::Product(product) => product.run(algorithm, tensors),
            Self::Convolution(convolution) => convolution.run(algorithm, tensors),
        }
    }
}

/// Whether a library was told the lengths that `tensors` have.
fn check<T: Element>(
    operation: &'static str,
    tensors: &Tensors<T>,
    [x, weight, y]: [usize; 3],
) -> Result<()> {
    let found = [
        (tensors.x.len(), x),
        (tensors.dx.len(), x),
        (tensors.weight.len(), weight),
        (tensors.dweight.len(), weight),
        (tensors.typed_dweight.len(), weight),
        (tensors.y.len(), y),
        (tensors.g.len(), y),
    ];
    match found.iter().find(|(found, needed)| found != needed) {
        None => Ok(()),
        Some((found, needed)) => {
            let problem = format!("a tensor of {found} elements where {needed} are needed");
            Err(Error::Shape { operation, problem })
        }
    }
}

/// Where a buffer that is read begins on the device.
fn input<T>(buffer: &impl DevicePtr<T>, stream: &Arc<CudaStream>) -> *const c_void {
    buffer.device_ptr(stream).0 as *const c_void
}

/// Where a buffer that is written begins on the device.
fn output<T>(buffer: &mut impl DevicePtrMut<T>, stream: &Arc<CudaStream>) -> *mut c_void {
    buffer.device_ptr_mut(stream).0 as *mut c_void
}
