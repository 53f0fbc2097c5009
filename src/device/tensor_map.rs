//! Matrices as TMA reads them: `kernels/include/ptx/tensor_copy.cuh`.

use super::driver_error::Doing;
use super::{Argument, Element};
use crate::Result;
use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};
use cudarc::driver::{CudaStream, CudaView, DevicePtr, DeviceRepr};
use std::sync::Arc;

/// `TensorMap`: a matrix in device memory, and the boxes that are copied of it.
#[repr(C, align(128))]
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(CUtensorMap);

/// Bytes of a box's rows, whose 16-byte pieces are swizzled.
const BOX_BYTES: usize = 64;

impl TensorMap {
    /// Of `matrix` \[height, width\], elements of 16 bits: boxes of `rows` rows of 64 bytes, at most 256. Elements outside the
    /// matrix are zero.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) for a matrix that does not begin at a multiple of 16 bytes, or whose rows do
    /// not.
    ///
    /// # Panics
    /// If elements are of another size, or `matrix` is of another length.
    pub fn rows_of_64_bytes<T: Element>(
        stream: &Arc<CudaStream>,
        matrix: &CudaView<'_, T>,
        [height, width]: [usize; 2],
        rows: u32,
    ) -> Result<Self> {
        assert_eq!(size_of::<T>(), 2, "elements of 16 bits");
        assert_eq!(matrix.len(), height * width, "{height}×{width} elements");
        let (address, _order) = matrix.device_ptr(stream);
        let extents = [width as u64, height as u64];
        let pitch = [(width * size_of::<T>()) as u64];
        let of_box = [(BOX_BYTES / size_of::<T>()) as u32, rows];
        let mut map = Self(CUtensorMap { opaque: [0; 16] });
        // SAFETY: the arrays are as long as the two dimensions want them, and the map is aligned to 64 bytes and more. The
        // driver notes the address and reads nothing there.
        unsafe {
            cuTensorMapEncodeTiled(
                &raw mut map.0,
                CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                extents.len() as u32,
                address as *mut _,
                extents.as_ptr(),
                pitch.as_ptr(),
                of_box.as_ptr(),
                [1; 2].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .doing(|| format!("describe a matrix of {height}×{width} elements to TMA"))?;
        Ok(map)
    }
}

// SAFETY: a plain struct of the size and alignment that the kernels declare.
unsafe impl DeviceRepr for TensorMap {}

impl Argument for TensorMap {
    const CODE: &'static str = "{128:128}";
}
