//! Driver errors become this crate's where they arise.
//!
//! The text is fetched then and there: it is the driver that knows it, and cudarc panics when an error is formatted in a
//! process that has none.

#![forbid(unsafe_code)]

use crate::{Error, Result};
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;
use std::ffi::CStr;

/// Turns a driver's refusal into an error that says what was tried.
pub(super) trait Doing<T> {
    /// `action` completes "cannot ...".
    fn doing(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for Result<T, DriverError> {
    fn doing(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| convert(error, action()))
    }
}

/// `error` must come from a driver call: then there is a driver to ask for its text.
pub(super) fn convert(error: DriverError, action: String) -> Error {
    let text = |text: Result<&CStr, DriverError>, otherwise: &str| {
        text.map_or_else(|_| otherwise.to_owned(), |text| text.to_string_lossy().into_owned())
    };
    Error::Driver {
        action,
        code: error.0 as u32,
        name: text(error.error_name(), "a code the driver does not know"),
        text: text(error.error_string(), "the driver does not say why"),
        remedy: remedy(error.0),
    }
}

const fn remedy(code: CUresult) -> &'static str {
    match code {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
            "; use a smaller batch or smaller images, or end other programs on the GPU (nvidia-smi)"
        }
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_IMAGE => {
            "; rebuild with EFFNETV2_CUDA_ARCHS naming this GPU (`effnetv2 devices` shows it), or update the driver"
        }
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
            "; the driver is older than the toolkit of the build: update it, or rebuild with EFFNETV2_CUDA_ARCHS naming \
             this GPU"
        }
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS | CUresult::CUDA_ERROR_LAUNCH_FAILED => {
            "; the GPU is lost to this process. Set EFFNETV2_CUDA_DEBUG=1 to have the kernel at fault named"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "; the driver was updated while running: restart the machine"
        }
        _ => "",
    }
}
