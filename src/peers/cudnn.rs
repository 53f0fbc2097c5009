//! Dense and depthwise convolutions by cuDNN, NHWC, summed in f32.

use super::{Direction, Tensors, check, input, output};
use crate::device::Device;
use crate::device::cudarc::cudnn::result::{self, CudnnError};
use crate::device::cudarc::cudnn::sys;
use crate::device::cudarc::driver::CudaSlice;
use crate::kernels::RawElement;
use crate::tensor::{Conv, ConvKind, Dtype, Padding, Shape};
use crate::{Error, Result};
use std::cell::RefCell;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::rc::Rc;

const LIBRARY: &str = "cuDNN";
/// Bytes of scratch memory that an algorithm may use.
const WORKSPACE: usize = 256 << 20;
/// There are no more in any direction.
const ALGORITHMS: usize = 10;

fn failed(action: &str) -> impl FnOnce(CudnnError) -> Error {
    let action = action.to_owned();
    move |error| Error::Library { library: LIBRARY, action, problem: error.to_string() }
}

/// The library, opened.
#[derive(Debug)]
pub struct Cudnn {
    handle: sys::cudnnHandle_t,
    device: Device,
    name: String,
    workspace: RefCell<CudaSlice<u8>>,
}

impl Cudnn {
    /// For work on `device`.
    ///
    /// # Errors
    /// [`Error::Library`] when it cannot be opened, [`Error::Driver`].
    pub fn open(device: &Device) -> Result<Self> {
        // SAFETY: only asks the system whether it can open the library.
        if !unsafe { sys::is_culib_present() } {
            let problem = "there is no libcudnn.so that LD_LIBRARY_PATH or the system leads to".into();
            return Err(Error::Library { library: LIBRARY, action: "be opened".into(), problem });
        }
        // On the host device memory is the machine's own, and nothing needs any.
        let bytes = if device.is_host() { 1 } else { WORKSPACE };
        let workspace = RefCell::new(device.zeros(bytes)?);
        let handle = result::create_handle().map_err(failed("be started"))?;
        let version = result::get_version();
        // 8.9.2 is 8902, 9.2.1 is 90201.
        let unit = if version >= 90_000 { 10_000 } else { 1000 };
        let name = format!("{LIBRARY} {}.{}", version / unit, version % unit / 100);
        let library = Self { handle, device: device.clone(), name, workspace };
        // SAFETY: handle and stream are alive, and the device keeps the stream as long as this keeps the device.
        unsafe { result::set_stream(handle, device.compute().cu_stream().cast()) }
            .map_err(failed("be started"))?;
        Ok(library)
    }

    /// One direction of `conv`.
    pub(super) fn convolution<T: RawElement>(
        self: &Rc<Self>,
        conv: &Conv,
        x: Shape,
        direction: Direction,
        tensors: &mut Tensors<T>,
    ) -> Result<Convolution> {
        let y = conv.output(x)?;
        if conv.padding != Padding::Symmetric {
            let problem = "it knows no padding but a symmetric one".into();
            return Err(Error::Library {
                library: LIBRARY,
                action: "describe a convolution".into(),
                problem,
            });
        }
        let groups = if conv.kind == ConvKind::Depthwise { x.c } else { 1 };
        let weights = [conv.outputs, x.c / groups, conv.kernel, conv.kernel];
        let mut convolution = Convolution {
            library: Rc::clone(self),
            lengths: [x.elements(), weights.iter().product(), y.elements()],
            direction,
            x: Tensor::new(tensors.dtype, x)?,
            y: Tensor::new(tensors.dtype, y)?,
            weight: Filter::new(tensors.dtype, weights)?,
            description: Description::new(tensors.dtype, conv, groups)?,
            algorithms: Vec::new(),
            names: Vec::new(),
        };
        convolution.find(tensors)?;
        Ok(convolution)
    }
}

impl Drop for Cudnn {
    fn drop(&mut self) {
        // SAFETY: made in `open` and destroyed nowhere else. What it cannot undo is lost memory, and no more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

const fn data_type(dtype: Dtype) -> sys::cudnnDataType_t {
    match dtype {
        Dtype::F32 | Dtype::Tf32 => sys::cudnnDataType_t::CUDNN_DATA_FLOAT,
        Dtype::F16 => sys::cudnnDataType_t::CUDNN_DATA_HALF,
        Dtype::Bf16 => sys::cudnnDataType_t::CUDNN_DATA_BFLOAT16,
    }
}

const NHWC: sys::cudnnTensorFormat_t = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;

#[derive(Debug)]
struct Tensor(sys::cudnnTensorDescriptor_t);

impl Tensor {
    fn new(dtype: Dtype, shape: Shape) -> Result<Self> {
        let tensor = Self(result::create_tensor_descriptor().map_err(failed("describe a tensor"))?);
        let sides = [shape.n, shape.c, shape.h, shape.w].map(|side| side as i32);
        // SAFETY: the descriptor is alive.
        unsafe { result::set_tensor4d_descriptor(tensor.0, NHWC, data_type(dtype), sides) }
            .map_err(failed("describe a tensor"))?;
        Ok(tensor)
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: as for the library's.
        let _ = unsafe { result::destroy_tensor_descriptor(self.0) };
    }
}

#[derive(Debug)]
struct Filter(sys::cudnnFilterDescriptor_t);

impl Filter {
    /// \[out, in of a group, kh, kw\], of which \[out, kh, kw, in\] is stored.
    fn new(dtype: Dtype, sides: [usize; 4]) -> Result<Self> {
        let filter = Self(result::create_filter_descriptor().map_err(failed("describe weights"))?);
        let sides = sides.map(|side| side as i32);
        // SAFETY: the descriptor is alive.
        unsafe { result::set_filter4d_descriptor(filter.0, data_type(dtype), NHWC, sides) }
            .map_err(failed("describe weights"))?;
        Ok(filter)
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        // SAFETY: as for the library's.
        let _ = unsafe { result::destroy_filter_descriptor(self.0) };
    }
}

#[derive(Debug)]
struct Description(sys::cudnnConvolutionDescriptor_t);

impl Description {
    fn new(dtype: Dtype, conv: &Conv, groups: usize) -> Result<Self> {
        let doing = || failed("describe a convolution");
        let description = Self(result::create_convolution_descriptor().map_err(doing())?);
        let (pad, stride) = ((conv.kernel / 2) as i32, conv.stride as i32);
        let mode = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        // In f32 our kernels multiply in f32, too.
        let math = match dtype {
            Dtype::F32 => sys::cudnnMathType_t::CUDNN_FMA_MATH,
            Dtype::Tf32 | Dtype::F16 | Dtype::Bf16 => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
        };
        let sums = sys::cudnnDataType_t::CUDNN_DATA_FLOAT;
        // SAFETY: the descriptor is alive.
        unsafe {
            result::set_convolution2d_descriptor(description.0, pad, pad, stride, stride, 1, 1, mode, sums)
                .map_err(doing())?;
            result::set_convolution_group_count(description.0, groups as i32).map_err(doing())?;
            result::set_convolution_math_type(description.0, math).map_err(doing())?;
        }
        Ok(description)
    }

    fn set_math(&self, math: sys::cudnnMathType_t) -> Result<()> {
        // SAFETY: the descriptor is alive.
        unsafe { result::set_convolution_math_type(self.0, math) }.map_err(failed("describe a convolution"))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: as for the library's.
        let _ = unsafe { result::destroy_convolution_descriptor(self.0) };
    }
}

/// One of the library's ways.
#[derive(Clone, Copy, Debug)]
struct Algorithm {
    kind: Kind,
    math: sys::cudnnMathType_t,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Forward(sys::cudnnConvolutionFwdAlgo_t),
    Data(sys::cudnnConvolutionBwdDataAlgo_t),
    Weights(sys::cudnnConvolutionBwdFilterAlgo_t),
}

impl Kind {
    /// NVIDIA's name without what all have in common.
    fn name(self) -> String {
        let name = match self {
            Self::Forward(kind) => format!("{kind:?}"),
            Self::Data(kind) => format!("{kind:?}"),
            Self::Weights(kind) => format!("{kind:?}"),
        };
        name.split("ALGO_").last().unwrap_or_default().to_lowercase()
    }
}

/// One direction of one convolution.
#[derive(Debug)]
pub struct Convolution {
    library: Rc<Cudnn>,
    lengths: [usize; 3],
    direction: Direction,
    x: Tensor,
    y: Tensor,
    weight: Filter,
    description: Description,
    algorithms: Vec<Algorithm>,
    names: Vec<String>,
}

/// The usable ones of what a search found, the fastest first.
macro_rules! usable {
    ($found:expr, $count:expr, $bytes:expr, $kind:path) => {{
        let written = &$found[..usize::try_from($count).unwrap_or(0).min(ALGORITHMS)];
        let all = written.iter().map(|one| {
            // SAFETY: the library has written as many as it says.
            unsafe { one.assume_init() }
        });
        all.filter(|one| one.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS && one.memory <= $bytes)
            .map(|one| Algorithm { kind: $kind(one.algo), math: one.mathType })
            .collect()
    }};
}

impl Convolution {
    pub(super) fn library(&self) -> &str {
        &self.library.name
    }

    pub(super) fn algorithms(&self) -> &[String] {
        &self.names
    }

    /// Has the library try all it has.
    fn find<T: RawElement>(&mut self, tensors: &mut Tensors<T>) -> Result<()> {
        check("convolution", tensors, self.lengths)?;
        let (library, conv) = (&self.library, self.description.0);
        let (handle, stream) = (library.handle, library.device.compute());
        let (x, y, weight) = (self.x.0, self.y.0, self.weight.0);
        let mut workspace = library.workspace.borrow_mut();
        let (scratch, bytes) = (output(&mut *workspace, stream), workspace.len());
        let mut count = 0;
        let asked = ALGORITHMS as i32;
        let (status, algorithms): (_, Vec<Algorithm>) = match self.direction {
            Direction::Forward => {
                type Found = MaybeUninit<sys::cudnnConvolutionFwdAlgoPerf_t>;
                let mut found: [Found; ALGORITHMS] = [const { MaybeUninit::uninit() }; ALGORITHMS];
                let from = (input(&tensors.x, stream), input(&tensors.weight, stream));
                let to = output(&mut tensors.y, stream);
                // SAFETY: all objects are alive, the descriptions are those of the buffers, whose lengths have been checked,
                // what is written overlaps nothing else, and there is room for as many results as are asked for.
                let status = unsafe {
                    sys::cudnnFindConvolutionForwardAlgorithmEx(
                        handle,
                        x,
                        from.0,
                        weight,
                        from.1,
                        conv,
                        y,
                        to,
                        asked,
                        &mut count,
                        found.as_mut_ptr().cast(),
                        scratch,
                        bytes,
                    )
                };
                (status, usable!(found, count, bytes, Kind::Forward))
            }
            Direction::Data => {
                type Found = MaybeUninit<sys::cudnnConvolutionBwdDataAlgoPerf_t>;
                let mut found: [Found; ALGORITHMS] = [const { MaybeUninit::uninit() }; ALGORITHMS];
                let from = (input(&tensors.weight, stream), input(&tensors.g, stream));
                let to = output(&mut tensors.dx, stream);
                // SAFETY: as above.
                let status = unsafe {
                    sys::cudnnFindConvolutionBackwardDataAlgorithmEx(
                        handle,
                        weight,
                        from.0,
                        y,
                        from.1,
                        conv,
                        x,
                        to,
                        asked,
                        &mut count,
                        found.as_mut_ptr().cast(),
                        scratch,
                        bytes,
                    )
                };
                (status, usable!(found, count, bytes, Kind::Data))
            }
            Direction::Weights => {
                type Found = MaybeUninit<sys::cudnnConvolutionBwdFilterAlgoPerf_t>;
                let mut found: [Found; ALGORITHMS] = [const { MaybeUninit::uninit() }; ALGORITHMS];
                let from = (input(&tensors.x, stream), input(&tensors.g, stream));
                let to = output(&mut tensors.typed_dweight, stream);
                // SAFETY: as above.
                let status = unsafe {
                    sys::cudnnFindConvolutionBackwardFilterAlgorithmEx(
                        handle,
                        x,
                        from.0,
                        y,
                        from.1,
                        conv,
                        weight,
                        to,
                        asked,
                        &mut count,
                        found.as_mut_ptr().cast(),
                        scratch,
                        bytes,
                    )
                };
                (status, usable!(found, count, bytes, Kind::Weights))
            }
        };
        status.result().map_err(failed("find an algorithm"))?;
        if algorithms.is_empty() {
            let status = sys::cudnnStatus_t::CUDNN_STATUS_NOT_SUPPORTED;
            return Err(failed("find an algorithm")(CudnnError(status)));
        }
        self.names = algorithms.iter().map(|one| one.kind.name()).collect();
        self.algorithms = algorithms;
        Ok(())
    }

    pub(super) fn run<T: RawElement>(&self, algorithm: usize, tensors: &mut Tensors<T>) -> Result<()> {
        check("convolution", tensors, self.lengths)?;
        let Algorithm { kind, math } = self.algorithms[algorithm];
        self.description.set_math(math)?;
        let (library, conv) = (&self.library, self.description.0);
        let (handle, stream) = (library.handle, library.device.compute());
        let (x, y, weight) = (self.x.0, self.y.0, self.weight.0);
        let mut workspace = library.workspace.borrow_mut();
        let (scratch, bytes) = (output(&mut *workspace, stream), workspace.len());
        let (one, zero) = (1.0_f32, 0.0_f32);
        let [one, zero] = [&one, &zero].map(|value| (&raw const *value).cast::<c_void>());
        let status = match kind {
            // SAFETY: all objects are alive, the descriptions are those of the buffers, whose lengths have been checked, and
            // what is written overlaps nothing else; scalars are read before the call returns; the workspace is as large as
            // the algorithm was told, and all that uses it is on one stream.
            Kind::Forward(kind) => unsafe {
                let from = (input(&tensors.x, stream), input(&tensors.weight, stream));
                let to = output(&mut tensors.y, stream);
                result::convolution_forward(
                    handle, one, x, from.0, weight, from.1, conv, kind, scratch, bytes, zero, y, to,
                )
            },
            // SAFETY: as above.
            Kind::Data(kind) => unsafe {
                let from = (input(&tensors.weight, stream), input(&tensors.g, stream));
                let to = output(&mut tensors.dx, stream);
                result::convolution_backward_data(
                    handle, one, weight, from.0, y, from.1, conv, kind, scratch, bytes, zero, x, to,
                )
            },
            // SAFETY: as above.
            Kind::Weights(kind) => unsafe {
                let from = (input(&tensors.x, stream), input(&tensors.g, stream));
                let to = output(&mut tensors.typed_dweight, stream);
                result::convolution_backward_filter(
                    handle, one, x, from.0, y, from.1, conv, kind, scratch, bytes, zero, weight, to,
                )
            },
        };
        status.map_err(failed("convolve"))
    }
}
