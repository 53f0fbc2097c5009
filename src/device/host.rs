//! The host device: a library that answers for the driver and runs the kernels on the CPU.
//!
//! Built by `kernels/host/build.sh`. cudarc asks the loader for `libcuda.so`; a library that is already loaded under
//! that name is what it gets, so opening it first is all there is to do.

use crate::{Error, Result};
use std::path::Path;

/// A kernel that the host device holds.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostKernel {
    /// Its family: the name of its `.cu` file.
    pub family: String,
    /// Its name.
    pub name: String,
    /// The types of its parameters, in the code of [`Entry::signature`](super::Entry::signature).
    pub signature: String,
}

/// The image that stands for the kernels of one family.
pub(super) fn image(family: &str) -> Vec<u8> {
    format!("effnetv2 host kernels: {family}\0").into_bytes()
}

#[cfg(target_os = "linux")]
mod library {
    use super::{HostKernel, Path};
    use crate::{Error, Result};
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
    use std::ffi::{CStr, c_char};
    use std::sync::OnceLock;

    static LIBRARY: OnceLock<Library> = OnceLock::new();

    pub(in crate::device) fn open(path: &Path) -> Result<()> {
        let problem = |e: libloading::Error| Error::file(path, format!("is no host device: {e}"));
        // SAFETY: running the library's initialisers is what the caller names it for, like a program to start.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(problem)?;
        // SAFETY: only looked up, and never called in this type.
        unsafe { library.get::<unsafe extern "C" fn()>(b"effnetv2_host_kernel_count") }.map_err(problem)?;
        // It stays for the life of the process: cudarc keeps pointers into it.
        LIBRARY.get_or_init(|| library);
        Ok(())
    }

    pub(in crate::device) fn kernels() -> Option<Vec<HostKernel>> {
        let library = LIBRARY.get()?;
        // SAFETY: these are the types of kernels/host/control.h.
        let (count, name, family, signature) = unsafe {
            let count: Symbol<unsafe extern "C" fn() -> usize> =
                library.get(b"effnetv2_host_kernel_count").ok()?;
            let name: Symbol<unsafe extern "C" fn(usize) -> *const c_char> =
                library.get(b"effnetv2_host_kernel_name").ok()?;
            let family: Symbol<unsafe extern "C" fn(usize) -> *const c_char> =
                library.get(b"effnetv2_host_kernel_family").ok()?;
            let signature: Symbol<unsafe extern "C" fn(*const c_char) -> *const c_char> =
                library.get(b"effnetv2_host_kernel_signature").ok()?;
            (count, name, family, signature)
        };
        let text = |text: *const c_char| {
            // SAFETY: texts that the library never frees; null only for what does not exist.
            let text = unsafe { (!text.is_null()).then(|| CStr::from_ptr(text)) };
            text.map(|text| text.to_string_lossy().into_owned())
        };
        // SAFETY: the functions read a table that was filled when the library was loaded.
        (0..unsafe { count() })
            .map(|index| unsafe {
                let entry = name(index);
                let kernel = text(entry)?;
                Some(HostKernel {
                    family: text(family(index))?,
                    name: kernel,
                    signature: text(signature(entry))?,
                })
            })
            .collect()
    }
}

#[cfg(target_os = "linux")]
pub(super) use library::{kernels, open};

#[cfg(not(target_os = "linux"))]
pub(super) fn open(path: &Path) -> Result<()> {
    Err(Error::file(path, "the host device exists on Linux only"))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn kernels() -> Option<Vec<HostKernel>> {
    None
}
