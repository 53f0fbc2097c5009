//! A device: its context, its two streams, and the kernels loaded on it.

use super::driver_error::Doing;
use super::module::{Family, Module};
use super::monitor::{Launched, Monitor};
use super::probe::{self, Gpu};
use super::{Element, HostControl, Image, embedded_images, transfer};
use crate::{Error, Result};
use cudarc::driver::sys::{CUevent_flags, CUmemPool_attribute};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError, result,
};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// A GPU, or the host device, ready to compute. Clones are the same device.
#[derive(Clone, Debug)]
pub struct Device(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    gpu: Gpu,
    is_host: bool,
    monitor: Arc<Monitor>,
    context: Arc<CudaContext>,
    compute: Arc<CudaStream>,
    copy: Arc<CudaStream>,
    modules: Mutex<HashMap<&'static str, Arc<Module>>>,
}

impl Device {
    /// The GPU numbered `ordinal`, from 0.
    ///
    /// `EFFNETV2_CUDA_DEBUG=1` in the environment is [`set_debugging`](Self::set_debugging) from the start.
    ///
    /// # Errors
    /// [`Error::NoDriver`], [`Error::NoGpu`], [`Error::OldDriver`], [`Error::OldGpu`], or [`Error::Driver`].
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Self::open(ordinal, None)
    }

    /// The host device at `library`, as `kernels/host/build.sh` built it: the same kernels, compiled for the CPU, for
    /// checking them where there is no GPU. A process that has it cannot use a GPU.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::File`] when the library cannot be opened or is none, [`Error::NoDriver`] when this
    /// process uses another driver already.
    pub fn host(library: &Path) -> Result<Self> {
        Self::open(0, Some(library))
    }

    fn open(ordinal: usize, library: Option<&Path>) -> Result<Self> {
        let gpu = probe::usable_gpu(ordinal, library)?;
        let doing = || format!("open GPU {ordinal} ({})", gpu.name);
        let context = CudaContext::new(ordinal).doing(doing)?;
        // SAFETY: no slice exists yet, and the work of this crate is on one stream, which others are joined to by
        // explicit events (the module's essay).
        unsafe { context.disable_event_tracking() };
        keep_freed_memory(&context).doing(doing)?;
        let compute = context.new_stream().doing(doing)?;
        let copy = context.new_stream().doing(doing)?;
        let monitor = Arc::<Monitor>::default();
        let debug = std::env::var("EFFNETV2_CUDA_DEBUG").is_ok_and(|value| !value.is_empty() && value != "0");
        monitor.set_debugging(debug);
        Ok(Self(Arc::new(Inner {
            is_host: library.is_some(),
            monitor,
            gpu,
            context,
            compute,
            copy,
            modules: Mutex::default(),
        })))
    }

    /// What the driver says about it.
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }

    /// The newest CUDA that its driver knows, (major, minor).
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn driver(&self) -> Result<(u32, u32)> {
        probe::driver_version()
    }

    /// Whether it is the host device.
    pub fn is_host(&self) -> bool {
        self.0.is_host
    }

    /// Whether it runs kernels with wgmma and TMA, which are traps elsewhere: Hopper, with an image for it alone, and the host
    /// device.
    pub fn has_wgmma(&self) -> bool {
        let best = Image::best(&embedded_images(), self.0.gpu.capability);
        self.is_host() || best.is_some_and(|image| image.exact && image.capability == (9, 0))
    }

    /// Whether every launch is waited for, so that an error names the kernel it arose in.
    pub fn is_debugging(&self) -> bool {
        self.0.monitor.is_debugging()
    }

    /// Waits for every launch from now on, or no more.
    pub fn set_debugging(&self, debugging: bool) {
        self.0.monitor.set_debugging(debugging);
    }

    /// Whether launches overlap.
    pub fn is_overlapping(&self) -> bool {
        self.0.monitor.is_overlapping()
    }

    /// From now on lets the blocks of each kernel be set up while the last ones of the kernel before it still run
    /// (programmatic dependent launch), or no more. They wait there until that kernel is done, so no bit of any result
    /// changes. A [`Graph`](super::Graph) replays launches as they were when it was recorded.
    ///
    /// # Errors
    /// [`Error::NoOverlap`] when the GPU, or what the kernels for it were built for, is older than compute capability 9.0.
    pub fn set_overlapping(&self, overlapping: bool) -> Result<()> {
        let gpu = self.gpu();
        // The host device has the kernels in itself, and checks that they wait.
        if overlapping && !self.is_host() {
            let image = Image::best(&embedded_images(), gpu.capability);
            if let Some(problem) = cannot_overlap(gpu.capability, image) {
                return Err(Error::NoOverlap {
                    device: format!("GPU {} ({})", gpu.ordinal, gpu.name),
                    problem,
                });
            }
        }
        self.0.monitor.set_overlapping(overlapping);
        Ok(())
    }

    /// Writes down every launch from now on, also those that a [`Graph`](super::Graph) records.
    pub fn log_launches(&self) {
        self.0.monitor.start_log();
    }

    /// The launches since [`log_launches`](Self::log_launches), in the order in which they were asked for; nothing more is
    /// written down. None without it.
    pub fn take_launches(&self) -> Vec<Launched> {
        self.0.monitor.take_log()
    }

    /// What kernels report their launches to.
    pub(super) fn monitor(&self) -> &Arc<Monitor> {
        &self.0.monitor
    }

    /// The context, for programs that use cudarc themselves. It does not track the uses of slices.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.0.context
    }

    /// The stream on which everything is computed.
    pub fn compute(&self) -> &Arc<CudaStream> {
        &self.0.compute
    }

    /// The stream on which input arrives.
    pub(super) fn copy(&self) -> &Arc<CudaStream> {
        &self.0.copy
    }

    /// The kernels of `family`, loaded when first asked for.
    ///
    /// # Errors
    /// [`Error::NoKernels`] when the build has no image for this GPU, [`Error::Driver`] when it cannot be loaded.
    pub fn module(&self, family: &'static Family) -> Result<Arc<Module>> {
        let mut modules = self.0.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = modules.get(family.name) {
            return Ok(module.clone());
        }
        let module = Arc::new(Module::load(self, family)?);
        modules.insert(family.name, module.clone());
        Ok(module)
    }

    /// A new buffer holding `values`.
    ///
    /// # Errors
    /// [`Error::Driver`], out of memory for one.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        // SAFETY: written in full right below.
        let mut slice = unsafe { self.allocate(values.len()) }?;
        transfer::write(self.compute(), values, &mut slice)?;
        Ok(slice)
    }

    /// A new buffer of `length` elements, `values` over and over. They are copied on the device, which is faster than to bring
    /// them all there.
    ///
    /// # Errors
    /// [`Error::Shape`] for no values; [`Error::Driver`].
    pub fn repeat<T: Element>(&self, values: &[T], length: usize) -> Result<CudaSlice<T>> {
        if values.is_empty() {
            return Err(Error::Shape { operation: "device memory", problem: "no values to repeat".into() });
        }
        let mut buffer = self.zeros(length)?;
        let mut filled = values.len().min(length);
        transfer::write(self.compute(), &values[..filled], &mut buffer.slice_mut(..filled))?;
        while filled < length {
            // What is there is a whole number of times all values.
            let more = filled.min(length - filled);
            let (from, mut to) = buffer.split_at_mut(filled);
            transfer::copy(self.compute(), &from.slice(..more), &mut to.slice_mut(..more))?;
            filled += more;
        }
        Ok(buffer)
    }

    /// A new buffer of `length` zeros.
    ///
    /// # Errors
    /// [`Error::Driver`], out of memory for one.
    pub fn zeros<T: Element>(&self, length: usize) -> Result<CudaSlice<T>> {
        // SAFETY: written in full right below.
        let mut slice = unsafe { self.allocate(length) }?;
        self.compute()
            .memset_zeros(&mut slice)
            .doing(|| format!("clear {} bytes of the GPU's memory", length * size_of::<T>()))?;
        Ok(slice)
    }

    /// A new buffer whose contents are whatever was there.
    ///
    /// # Safety
    /// It must be written before it is read.
    pub(super) unsafe fn allocate<T: Element>(&self, length: usize) -> Result<CudaSlice<T>> {
        let bytes =
            length.checked_mul(size_of::<T>()).filter(|&bytes| bytes > 0 && isize::try_from(bytes).is_ok());
        let Some(bytes) = bytes else {
            let problem = format!("{length} elements of {} bytes cannot be allocated", size_of::<T>());
            return Err(Error::Shape { operation: "device memory", problem });
        };
        // SAFETY: the caller's promise.
        unsafe { self.compute().alloc(length) }.doing(|| {
            let free = self.0.context.mem_get_info().map_or(0, |(free, _)| free);
            format!("allocate {bytes} bytes on GPU {}, {free} bytes free", self.0.gpu.ordinal)
        })
    }

    /// Sets every element of a buffer to zero.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn clear<T: Element>(&self, buffer: &mut impl DevicePtrMut<T>) -> Result<()> {
        let bytes = buffer.len() * size_of::<T>();
        self.compute().memset_zeros(buffer).doing(|| format!("clear {bytes} bytes of the GPU's memory"))
    }

    /// Bytes of its memory that nobody has taken.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn free_memory(&self) -> Result<usize> {
        // What was freed in the order of the stream counts only when that has been done.
        self.synchronize()?;
        Ok(self.0.context.mem_get_info().doing(|| "ask for the GPU's free memory".into())?.0)
    }

    /// The values of a buffer, once everything before on [`compute`](Self::compute) is done.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in the work before.
    pub fn read<T: Element>(&self, buffer: &impl DevicePtr<T>) -> Result<Vec<T>> {
        transfer::read(self.compute(), buffer)
    }

    /// Waits until all that was asked of both streams is done.
    ///
    /// # Errors
    /// [`Error::Driver`] for what went wrong in that work.
    pub fn synchronize(&self) -> Result<()> {
        let doing = || "finish the GPU's work".to_owned();
        self.0.copy.synchronize().doing(doing)?;
        self.0.compute.synchronize().doing(doing)
    }

    /// How long the GPU takes for `work` on [`compute`](Self::compute), by its own clock.
    ///
    /// # Errors
    /// Those of `work`, and [`Error::Driver`].
    pub fn time(&self, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let start = self.mark()?;
        work()?;
        self.between(&start, &self.mark()?)
    }

    /// The moment when all that was asked of [`compute`](Self::compute) so far is done.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn mark(&self) -> Result<Mark> {
        let event = self.compute().record_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        event.map(Mark).doing(|| "time the GPU's work".to_owned())
    }

    /// The time from one moment to a later one, by the GPU's own clock; waits for the later.
    ///
    /// # Errors
    /// [`Error::Driver`], also for what went wrong in between.
    pub fn between(&self, from: &Mark, to: &Mark) -> Result<Duration> {
        let milliseconds = from.0.elapsed_ms(&to.0).doing(|| "time the GPU's work".to_owned())?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }

    /// What steers the host device; none on a GPU.
    pub fn host_control(&self) -> Option<HostControl> {
        self.is_host().then(HostControl::new)
    }
}

/// Why a GPU that runs this image cannot begin a kernel before the last one's end; none if it can.
fn cannot_overlap(capability: (u32, u32), image: Option<Image>) -> Option<String> {
    const LEAST: (u32, u32) = (9, 0);
    let image = image.filter(|image| image.capability < LEAST);
    if capability < LEAST {
        let (major, minor) = capability;
        let needed = "programmatic dependent launch came with 9.0 (Hopper)";
        return Some(format!("it has compute capability {major}.{minor}, and {needed}"));
    }
    image.map(|image| {
        let (major, minor) = capability;
        format!(
            "it runs kernels that were built for {image}, which cannot wait for the ones before: build again with \
             EFFNETV2_CUDA_ARCHS={major}{minor}"
        )
    })
}

/// A moment in the order of a GPU's work.
#[derive(Debug)]
pub struct Mark(CudaEvent);

/// By default freed memory goes back to the system whenever the GPU is waited for, and comes back slowly.
fn keep_freed_memory(context: &Arc<CudaContext>) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    // SAFETY: the device is the context's, the pool the device's, and this attribute is a u64.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        let value = (&raw mut threshold).cast();
        result::mem_pool::set_attribute(pool, CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_overlap_says_why() {
        let image = |capability| Some(Image { capability, exact: false, ptx: capability == (8, 0) });
        assert_eq!(cannot_overlap((9, 0), image((9, 0))), None);
        assert_eq!(cannot_overlap((12, 1), image((12, 0))), None);
        let old = cannot_overlap((8, 9), image((8, 9))).unwrap();
        assert!(old.contains("capability 8.9") && old.contains("9.0 (Hopper)"), "{old}");
        let built = cannot_overlap((11, 0), image((8, 0))).unwrap();
        assert!(built.contains("compute_80") && built.contains("EFFNETV2_CUDA_ARCHS=110"), "{built}");
        // Without kernels there is nothing to launch.
        assert_eq!(cannot_overlap((9, 0), None), None);
    }
}
