//! The host device: a library that answers for the driver and runs the kernels on the CPU.
//!
//! Built by `kernels/host/build.sh`. cudarc asks the loader for `libcuda.so`; a library that is already loaded under
//! that name is what it gets, so opening it first is all there is to do.

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

/// Steers the host device, for tests.
#[derive(Clone, Copy, Debug)]
pub struct HostControl(());

impl HostControl {
    /// For a device that is the host device.
    pub(super) fn new() -> Self {
        Self(())
    }

    /// The kernels in the library; none on systems other than Linux.
    pub fn kernels(&self) -> Vec<HostKernel> {
        library::kernels().unwrap_or_default()
    }

    /// The order in which warps, lanes and blocks run: 0 is first to last, anything else a shuffle.
    pub fn shuffle(&self, seed: u64) {
        library::set_seed(seed);
    }

    /// Whether work waits until something waits for it, as it may on a GPU.
    pub fn defer(&self, deferred: bool) {
        library::set_deferred(deferred);
    }

    /// How many launches that have run could have begun before the one ahead had ended.
    pub fn dependents(&self) -> u64 {
        library::dependents()
    }
}

#[cfg(target_os = "linux")]
mod library {
    use super::HostKernel;
    use crate::{Error, Result};
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW, Symbol};
    use std::ffi::{CStr, c_char, c_int};
    use std::path::Path;
    use std::sync::OnceLock;

    static LIBRARY: OnceLock<Functions> = OnceLock::new();

    /// The functions of kernels/host/control.h. Their library stays for the life of the process: cudarc keeps pointers
    /// into it.
    struct Functions {
        count: Symbol<unsafe extern "C" fn() -> usize>,
        name: Symbol<unsafe extern "C" fn(usize) -> *const c_char>,
        family: Symbol<unsafe extern "C" fn(usize) -> *const c_char>,
        signature: Symbol<unsafe extern "C" fn(*const c_char) -> *const c_char>,
        dependents: Symbol<unsafe extern "C" fn() -> u64>,
        set_seed: Symbol<unsafe extern "C" fn(u64)>,
        set_deferred: Symbol<unsafe extern "C" fn(c_int)>,
        _library: Library,
    }

    pub(in crate::device) fn open(path: &Path) -> Result<()> {
        let functions = find(path).map_err(|e| Error::file(path, format!("is no host device: {e}")))?;
        LIBRARY.get_or_init(|| functions);
        Ok(())
    }

    fn find(path: &Path) -> Result<Functions, libloading::Error> {
        // SAFETY: running the library's initialisers is what the caller names it for, like a program to start. The
        // types are those of control.h.
        unsafe {
            let library = Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL)?;
            Ok(Functions {
                count: library.get(b"effnetv2_host_kernel_count")?,
                name: library.get(b"effnetv2_host_kernel_name")?,
                family: library.get(b"effnetv2_host_kernel_family")?,
                signature: library.get(b"effnetv2_host_kernel_signature")?,
                dependents: library.get(b"effnetv2_host_dependent_count")?,
                set_seed: library.get(b"effnetv2_host_set_seed")?,
                set_deferred: library.get(b"effnetv2_host_set_deferred")?,
                _library: library,
            })
        }
    }

    pub(super) fn kernels() -> Option<Vec<HostKernel>> {
        let functions = LIBRARY.get()?;
        let text = |text: *const c_char| {
            // SAFETY: texts that the library never frees; null only for what does not exist.
            let text = unsafe { (!text.is_null()).then(|| CStr::from_ptr(text)) };
            text.map(|text| text.to_string_lossy().into_owned())
        };
        // SAFETY: these read a table that was filled when the library was loaded, and take any index; `signature` is
        // given a name that they gave.
        let kernel = |index| unsafe {
            let name = (functions.name)(index);
            Some(HostKernel {
                name: text(name)?,
                family: text((functions.family)(index))?,
                signature: text((functions.signature)(name))?,
            })
        };
        // SAFETY: as above.
        (0..unsafe { (functions.count)() }).map(kernel).collect()
    }

    pub(super) fn dependents() -> u64 {
        // SAFETY: reads a number.
        LIBRARY.get().map_or(0, |functions| unsafe { (functions.dependents)() })
    }

    pub(super) fn set_seed(seed: u64) {
        if let Some(functions) = LIBRARY.get() {
            // SAFETY: takes any number.
            unsafe { (functions.set_seed)(seed) };
        }
    }

    pub(super) fn set_deferred(deferred: bool) {
        if let Some(functions) = LIBRARY.get() {
            // SAFETY: takes any number.
            unsafe { (functions.set_deferred)(deferred.into()) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod library {
    use super::HostKernel;
    use crate::{Error, Result};
    use std::path::Path;

    pub(in crate::device) fn open(path: &Path) -> Result<()> {
        Err(Error::file(path, "the host device exists on Linux only"))
    }

    pub(super) fn kernels() -> Option<Vec<HostKernel>> {
        None
    }

    pub(super) fn dependents() -> u64 {
        0
    }

    pub(super) fn set_seed(_: u64) {}

    pub(super) fn set_deferred(_: bool) {}
}

pub(super) use library::open;
