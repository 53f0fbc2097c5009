//! Which driver this process has, and what GPUs it shows.
//!
//! cudarc panics when the driver is missing, so nothing may call it before [`claim`] has said that there is one. A process
//! has one driver for good: the system's, or the host device, never both.

use super::driver_error::{Doing, convert};
use super::{host, images};
use crate::{Error, Result};
use cudarc::driver::{CudaContext, DriverError, result, sys};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A driver that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// The NVIDIA driver of this machine.
    System,
    /// The host device, from this library.
    Host(PathBuf),
}

static CLAIMED: Mutex<Option<Driver>> = Mutex::new(None);

/// Makes the driver this process's, or says why that cannot be.
pub(super) fn claim(library: Option<&Path>) -> Result<()> {
    let wanted = match library {
        None => Driver::System,
        Some(path) => Driver::Host(path.canonicalize().map_err(Error::io(path, "find the host device"))?),
    };
    let mut claimed = CLAIMED.lock().unwrap_or_else(PoisonError::into_inner);
    match (&*claimed, &wanted) {
        (Some(driver), _) if *driver == wanted => return Ok(()),
        (Some(Driver::System), Driver::Host(_)) => {
            return Err(Error::NoDriver(
                "this process already uses the GPU's driver, so it cannot have the host device too".into(),
            ));
        }
        (Some(Driver::Host(path)), _) => {
            return Err(Error::NoDriver(format!(
                "this process already uses the host device {}",
                path.display()
            )));
        }
        (None, Driver::System) => {
            // SAFETY: opens libcuda and closes it again; its initialisers are the driver's own.
            if !unsafe { sys::is_culib_present() } {
                return Err(Error::NoDriver(
                    "libcuda.so.1 is not on this machine or cannot be loaded".into(),
                ));
            }
        }
        (None, Driver::Host(path)) => host::open(path)?,
        (Some(Driver::System), Driver::System) => {}
    }
    *claimed = Some(wanted);
    Ok(())
}

/// A GPU that the driver shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number, from 0.
    pub ordinal: usize,
    /// Its name.
    pub name: String,
    /// Its compute capability, (major, minor).
    pub capability: (u32, u32),
    /// Its memory in bytes.
    pub memory: usize,
    /// Its streaming multiprocessors.
    pub multiprocessors: u32,
    /// Threads that one of them can hold.
    pub threads_per_multiprocessor: u32,
    /// Bytes of the cache that all of them share.
    pub cache: usize,
}

/// What [`survey`] finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The newest CUDA the driver knows, (major, minor).
    pub driver: (u32, u32),
    /// The GPUs, by number.
    pub gpus: Vec<Gpu>,
}

/// Asks the driver of this machine, or the host device at `library`, what there is. Creates no context, takes no memory.
///
/// # Errors
/// [`Error::NoDriver`] without one, [`Error::Io`] and [`Error::File`] for a host device that cannot be opened, and
/// [`Error::Driver`] for what the driver says. A machine with a driver and no GPU is no error: the list is empty.
pub fn survey(library: Option<&Path>) -> Result<Survey> {
    claim(library)?;
    match result::init() {
        Ok(()) => {}
        Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => {
            return Ok(Survey { driver: driver_version()?, gpus: Vec::new() });
        }
        Err(error) => return Err(convert(error, "initialise the NVIDIA driver".into())),
    }
    let count = CudaContext::device_count().doing(|| "count the GPUs".into())?;
    let gpus = (0..usize::try_from(count).unwrap_or(0)).map(gpu).collect::<Result<_>>()?;
    Ok(Survey { driver: driver_version()?, gpus })
}

/// The GPU `ordinal`, if the kernels can run on it.
pub(super) fn usable_gpu(ordinal: usize, library: Option<&Path>) -> Result<Gpu> {
    let survey = survey(library)?;
    let count = survey.gpus.len();
    let gpu = survey.gpus.into_iter().nth(ordinal).ok_or(Error::NoGpu { ordinal, count })?;
    // The host device has the kernels in itself.
    if library.is_some() {
        return Ok(gpu);
    }
    if gpu.capability < (8, 0) {
        return Err(Error::OldGpu { ordinal, name: gpu.name, capability: gpu.capability });
    }
    match images::needed_driver() {
        Some(needed) if survey.driver < needed => Err(Error::OldDriver { found: survey.driver, needed }),
        _ => Ok(gpu),
    }
}

fn gpu(ordinal: usize) -> Result<Gpu> {
    let doing = || format!("ask about GPU {ordinal}");
    let index = i32::try_from(ordinal).map_err(|_| Error::NoGpu { ordinal, count: 0 })?;
    let device = result::device::get(index).doing(doing)?;
    let attribute = |attribute| {
        // SAFETY: `device` is what the driver just gave.
        let value = unsafe { result::device::get_attribute(device, attribute) }.doing(doing)?;
        Ok::<_, Error>(u32::try_from(value).unwrap_or(0))
    };
    use sys::CUdevice_attribute as A;
    Ok(Gpu {
        ordinal,
        name: result::device::get_name(device).doing(doing)?,
        capability: (
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory: unsafe { result::device::total_mem(device) }.doing(doing)?,
        multiprocessors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        threads_per_multiprocessor: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        cache: attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize,
    })
}

pub(super) fn driver_version() -> Result<(u32, u32)> {
    let mut version = 0;
    // SAFETY: writes one int, before or after initialisation.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .doing(|| "ask for the driver's version".into())?;
    let version = u32::try_from(version).unwrap_or(0);
    Ok((version / 1000, version % 1000 / 10))
}
