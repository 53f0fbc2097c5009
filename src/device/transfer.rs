//! Copies between the program's memory and the device's.

#![forbid(unsafe_code)]

use super::Element;
use super::driver_error::Doing;
use crate::{Error, Result};
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use std::sync::Arc;

/// Copies `values` to a buffer of the same length, in the order of `stream`.
///
/// # Errors
/// [`Error::Shape`] when the lengths differ, [`Error::Driver`].
pub fn write<T: Element>(
    stream: &Arc<CudaStream>,
    values: &[T],
    to: &mut impl DevicePtrMut<T>,
) -> Result<()> {
    if values.len() != to.len() {
        let problem = format!("{} elements cannot be copied to {}", values.len(), to.len());
        return Err(Error::Shape { operation: "copy to the GPU", problem });
    }
    stream.memcpy_htod(values, to).doing(|| format!("copy {} bytes to the GPU", size_of_val(values)))
}

/// Copies a buffer to another of the same length, in the order of `stream`.
///
/// # Errors
/// [`Error::Shape`] when the lengths differ, [`Error::Driver`].
pub fn copy<T: Element>(
    stream: &Arc<CudaStream>,
    from: &impl DevicePtr<T>,
    to: &mut impl DevicePtrMut<T>,
) -> Result<()> {
    if from.len() != to.len() {
        let problem = format!("{} elements cannot be copied to {}", from.len(), to.len());
        return Err(Error::Shape { operation: "copy within the GPU", problem });
    }
    stream.memcpy_dtod(from, to).doing(|| format!("copy {} bytes within the GPU", from.num_bytes()))
}

/// The values of a buffer, once everything before on `stream` is done.
///
/// # Errors
/// [`Error::Driver`], also for what went wrong in the work before.
pub fn read<T: Element>(stream: &Arc<CudaStream>, from: &impl DevicePtr<T>) -> Result<Vec<T>> {
    let doing = || format!("read {} bytes from the GPU", from.num_bytes());
    let mut values = vec![T::default(); from.len()];
    stream.memcpy_dtoh(from, &mut values).doing(doing)?;
    stream.synchronize().doing(doing)?;
    Ok(values)
}
