//! Pointwise convolutions as matrix products of cuBLASLt, summed in f32.
//!
//! The library knows matrices by columns: a row-major \[r, c\] is for it c × r. So y = x·wᵀ is computed as yᵀ = w·xᵀ, and
//! likewise the gradients.

use super::{Direction, Tensors, check, input, output};
use crate::device::Device;
use crate::device::cudarc::cublaslt::result::{self, CublasError};
use crate::device::cudarc::cublaslt::sys;
use crate::device::cudarc::driver::CudaSlice;
use crate::kernels::RawElement;
use crate::tensor::{Dtype, Shape};
use crate::{Error, Result};
use std::cell::RefCell;
use std::ffi::c_void;
use std::rc::Rc;

const LIBRARY: &str = "cuBLASLt";
/// Bytes of scratch memory that an algorithm may use: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Algorithms asked for, of which the fastest is found by trying.
const ALGORITHMS: usize = 8;
/// Calls by which an algorithm is timed, after one that is not.
const TRIES: u32 = 3;

fn failed(action: &str) -> impl FnOnce(CublasError) -> Error {
    let action = action.to_owned();
    move |error| Error::Library { library: LIBRARY, action, problem: error.to_string() }
}

/// The library, opened.
#[derive(Debug)]
pub struct CublasLt {
    handle: sys::cublasLtHandle_t,
    device: Device,
    name: String,
    workspace: RefCell<CudaSlice<u8>>,
}

impl CublasLt {
    /// For work on `device`.
    ///
    /// # Errors
    /// [`Error::Library`] when it cannot be opened, [`Error::Driver`].
    pub fn open(device: &Device) -> Result<Self> {
        // SAFETY: only asks the system whether it can open the library.
        if !unsafe { sys::is_culib_present() } {
            let problem = "there is no libcublasLt.so that LD_LIBRARY_PATH or the system leads to".into();
            return Err(Error::Library { library: LIBRARY, action: "be opened".into(), problem });
        }
        let workspace = RefCell::new(device.zeros(WORKSPACE)?);
        let handle = result::create_handle().map_err(failed("be started"))?;
        // SAFETY: it takes nothing.
        let version = unsafe { sys::cublasLtGetVersion() };
        let (major, minor) = (version / 10_000, version / 100 % 100);
        Ok(Self { handle, device: device.clone(), name: format!("{LIBRARY} {major}.{minor}"), workspace })
    }

    /// One direction of the pointwise convolution of `x` to `outputs` channels.
    pub(super) fn product<T: RawElement>(
        self: &Rc<Self>,
        x: Shape,
        outputs: usize,
        direction: Direction,
        tensors: &mut Tensors<T>,
    ) -> Result<Product> {
        let kind = match tensors.dtype {
            Dtype::F32 | Dtype::Tf32 => sys::cudaDataType_t::CUDA_R_32F,
            Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F,
            Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let (rows, inputs, columns) = (x.pixels() as u64, x.c as u64, outputs as u64);
        let (x_layout, y_layout) = (Layout::new(kind, inputs, rows)?, || Layout::new(kind, columns, rows));
        let weight = Layout::new(kind, inputs, columns)?;
        let (transposed, a, b, to) = match direction {
            Direction::Forward => ([true, false], weight, x_layout, y_layout()?),
            Direction::Data => ([false, false], weight, y_layout()?, x_layout),
            Direction::Weights => {
                let to = Layout::new(sys::cudaDataType_t::CUDA_R_32F, inputs, columns)?;
                ([false, true], x_layout, y_layout()?, to)
            }
        };
        let mut product = Product {
            library: Rc::clone(self),
            lengths: [x.elements(), x.c * outputs, x.pixels() * outputs],
            direction,
            description: Description::new(tensors.dtype, transposed)?,
            layouts: [a, b, to],
            algorithms: Vec::new(),
            names: Vec::new(),
        };
        product.find()?;
        product.sort(tensors)?;
        Ok(product)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        // SAFETY: made in `open` and destroyed nowhere else. What it cannot undo is lost memory, and no more.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// A matrix by columns, without gaps.
#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(kind: sys::cudaDataType_t, height: u64, width: u64) -> Result<Self> {
        let layout = result::create_matrix_layout(kind, height, width, height as i64);
        layout.map(Self).map_err(failed("describe a matrix"))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: as for the library's.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// A product of matrices, each transposed or not.
#[derive(Debug)]
struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(dtype: Dtype, transposed: [bool; 2]) -> Result<Self> {
        let compute = match dtype {
            Dtype::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            Dtype::F32 | Dtype::F16 | Dtype::Bf16 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let scale = sys::cudaDataType_t::CUDA_R_32F;
        let description =
            Self(result::create_matmul_desc(compute, scale).map_err(failed("describe a product"))?);
        let names = [
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB,
        ];
        for (name, transposed) in names.into_iter().zip(transposed) {
            // `cublasOperation_t`.
            let operation = i32::from(transposed);
            let (value, size) = ((&raw const operation).cast(), size_of_val(&operation));
            // SAFETY: the description is alive, and the value has the type of this attribute.
            unsafe { result::set_matmul_desc_attribute(description.0, name, value, size) }
                .map_err(failed("describe a product"))?;
        }
        Ok(description)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: as for the library's.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// One direction of one pointwise convolution.
#[derive(Debug)]
pub struct Product {
    library: Rc<CublasLt>,
    lengths: [usize; 3],
    direction: Direction,
    description: Description,
    /// Of both factors and the product.
    layouts: [Layout; 3],
    algorithms: Vec<sys::cublasLtMatmulAlgo_t>,
    names: Vec<String>,
}

impl Product {
    pub(super) fn library(&self) -> &str {
        &self.library.name
    }

    pub(super) fn algorithms(&self) -> &[String] {
        &self.names
    }

    /// Asks the library's heuristics.
    fn find(&mut self) -> Result<()> {
        let preference = result::create_matmul_pref().map_err(failed("state a preference"))?;
        let name = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let (value, size) = ((&raw const WORKSPACE_BYTES).cast(), size_of_val(&WORKSPACE_BYTES));
        let [a, b, to] = [0, 1, 2].map(|i| self.layouts[i].0);
        let mut found = [sys::cublasLtMatmulHeuristicResult_t {
            algo: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
            workspaceSize: 0,
            state: sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            wavesCount: 0.0,
            reserved: [0; 4],
        }; ALGORITHMS];
        let mut count = 0;
        // SAFETY: the preference was made just now and is destroyed here alone, the value has the type of this attribute,
        // everything else is alive, and there is room for as many results as are asked for.
        let status = unsafe {
            let status = result::set_matmul_pref_attribute(preference, name, value, size).and_then(|()| {
                sys::cublasLtMatmulAlgoGetHeuristic(
                    self.library.handle,
                    self.description.0,
                    a,
                    b,
                    to,
                    to,
                    preference,
                    ALGORITHMS as i32,
                    found.as_mut_ptr(),
                    &mut count,
                )
                .result()
            });
            let _ = result::destroy_matmul_pref(preference);
            status
        };
        status.map_err(failed("find an algorithm"))?;
        let count = usize::try_from(count).unwrap_or(0);
        for (i, one) in found.iter().take(count).enumerate() {
            if one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                self.algorithms.push(one.algo);
                self.names.push(format!("heuristic {}", i + 1));
            }
        }
        match self.algorithms.is_empty() {
            false => Ok(()),
            true => Err(failed("find an algorithm")(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            ))),
        }
    }

    /// Puts the fastest algorithm first; those that fail are left out.
    fn sort<T: RawElement>(&mut self, tensors: &mut Tensors<T>) -> Result<()> {
        let device = self.library.device.clone();
        let mut timed = Vec::new();
        let mut failure = None;
        for i in 0..self.algorithms.len() {
            let time = self
                .run(i, tensors)
                .and_then(|()| device.time(|| (0..TRIES).try_for_each(|_| self.run(i, tensors))));
            match time {
                Ok(time) => timed.push((time, self.algorithms[i], self.names[i].clone())),
                Err(error) => failure = Some(error),
            }
        }
        timed.sort_by_key(|&(time, ..)| time);
        match failure {
            Some(error) if timed.is_empty() => Err(error),
            _ => {
                (self.algorithms, self.names) =
                    timed.into_iter().map(|(_, algorithm, name)| (algorithm, name)).unzip();
                Ok(())
            }
        }
    }

    pub(super) fn run<T: RawElement>(&self, algorithm: usize, tensors: &mut Tensors<T>) -> Result<()> {
        check("matrix product", tensors, self.lengths)?;
        let stream = self.library.device.compute();
        let (one, zero) = (1.0_f32, 0.0_f32);
        let (a, b, to, beta) = match self.direction {
            Direction::Forward => (
                input(&tensors.weight, stream),
                input(&tensors.x, stream),
                output(&mut tensors.y, stream),
                &zero,
            ),
            Direction::Data => (
                input(&tensors.weight, stream),
                input(&tensors.g, stream),
                output(&mut tensors.dx, stream),
                &zero,
            ),
            Direction::Weights => {
                let to = output(&mut tensors.dweight, stream);
                (input(&tensors.x, stream), input(&tensors.g, stream), to, &one)
            }
        };
        let mut workspace = self.library.workspace.borrow_mut();
        let scalar = |value: &f32| (&raw const *value).cast::<c_void>();
        // SAFETY: all objects are alive; the layouts are those of the buffers, whose lengths have been checked, and what is
        // written overlaps nothing else; scalars are read before the call returns; the workspace is as large as the
        // algorithm was told, and all that uses it is on one stream.
        unsafe {
            result::matmul(
                self.library.handle,
                self.description.0,
                scalar(&one),
                scalar(beta),
                a,
                self.layouts[0].0,
                b,
                self.layouts[1].0,
                to,
                self.layouts[2].0,
                to,
                self.layouts[2].0,
                &raw const self.algorithms[algorithm],
                output(&mut *workspace, stream),
                WORKSPACE,
                stream.cu_stream().cast(),
            )
        }
        .map_err(failed("multiply matrices"))
    }
}

/// [`WORKSPACE`], at an address.
static WORKSPACE_BYTES: usize = WORKSPACE;
