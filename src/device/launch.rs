//! One launch of one kernel.
//!
//! The driver takes arguments as untyped pointers. [`Launch`] writes down the type of each as it comes and compares the
//! list with the kernel's table before anything is launched; a wrong number or type is an error.

use super::driver_error::convert;
use super::{Element, Kernel, Launched};
use crate::{Error, Result};
use cudarc::driver::sys::{
    CUdeviceptr, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
    CUstreamCaptureStatus, cuLaunchKernelEx,
};
use cudarc::driver::{
    CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut, DeviceRepr, DriverError, result,
};
use std::ffi::c_void;
use std::fmt::{self, Debug, Display, Formatter};
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

/// A value passed to a kernel.
pub trait Argument: DeviceRepr {
    /// Its code in [`Entry::signature`](super::Entry::signature).
    const CODE: &'static str;
}

impl Argument for i32 {
    const CODE: &'static str = "i";
}
impl Argument for u32 {
    const CODE: &'static str = "I";
}
impl Argument for i64 {
    const CODE: &'static str = "l";
}
impl Argument for u64 {
    const CODE: &'static str = "L";
}
impl Argument for f32 {
    const CODE: &'static str = "f";
}
impl Argument for f64 {
    const CODE: &'static str = "d";
}

/// Where the value of an argument is.
enum Slot {
    /// Here: the address of a buffer, which is borrowed for as long as the launch.
    Address(CUdeviceptr),
    /// There, and borrowed as well.
    Borrowed(*const c_void),
}

/// A launch being put together: arguments in the order of the kernel's parameters, then [`run`](Self::run).
pub struct Launch<'a> {
    kernel: &'a Kernel,
    stream: &'a Arc<CudaStream>,
    arguments: Vec<Slot>,
    codes: String,
    borrowed: PhantomData<&'a c_void>,
}

impl Debug for Launch<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Launch").field("kernel", self.kernel.entry).finish_non_exhaustive()
    }
}

impl Kernel {
    /// Begins a launch on `stream`.
    pub fn on<'a>(&'a self, stream: &'a Arc<CudaStream>) -> Launch<'a> {
        let codes = String::with_capacity(self.entry.signature.len());
        Launch { kernel: self, stream, arguments: Vec::new(), codes, borrowed: PhantomData }
    }
}

impl<'a> Launch<'a> {
    /// A buffer that the kernel reads.
    pub fn input<'b: 'a, 'c: 'b, T: Element>(&mut self, view: &'b CudaView<'c, T>) -> &mut Self {
        let (address, _) = view.device_ptr(self.stream);
        self.argument(Slot::Address(address), "p")
    }

    /// A buffer that the kernel writes.
    pub fn output<'b: 'a, 'c: 'b, T: Element>(&mut self, view: &'b mut CudaViewMut<'c, T>) -> &mut Self {
        let (address, _) = view.device_ptr_mut(self.stream);
        self.argument(Slot::Address(address), "p")
    }

    /// A null pointer, for a buffer that the kernel can do without.
    pub fn null(&mut self) -> &mut Self {
        self.argument(Slot::Address(0), "p")
    }

    /// The buffer or a null pointer.
    pub fn optional<'b: 'a, 'c: 'b, T: Element>(
        &mut self,
        view: Option<&'b mut CudaViewMut<'c, T>>,
    ) -> &mut Self {
        match view {
            Some(view) => self.output(view),
            None => self.null(),
        }
    }

    /// A number or a struct.
    pub fn value<T: Argument>(&mut self, value: &'a T) -> &mut Self {
        self.argument(Slot::Borrowed(ptr::from_ref(value).cast()), T::CODE)
    }

    fn argument(&mut self, slot: Slot, code: &str) -> &mut Self {
        self.arguments.push(slot);
        self.codes.push_str(code);
        self
    }

    /// Launches `grid` blocks of the kernel's threads, with `shared` bytes of dynamic shared memory. `shapes` says in
    /// errors what was to be computed.
    ///
    /// # Errors
    /// [`Error::Shape`] when the arguments are not those of the kernel's table; [`Error::Driver`] when it cannot be
    /// launched, on a device that is debugging also when it fails.
    ///
    /// # Safety
    /// With these arguments, this grid and this much shared memory the kernel must stay within the buffers it was given,
    /// and no other work may use a buffer that it writes at the same time.
    pub unsafe fn run(&mut self, grid: [u32; 3], shared: u32, shapes: impl Display) -> Result<()> {
        let (kernel, stream) = (self.kernel, self.stream);
        if self.codes != kernel.entry.signature {
            let problem = format!(
                "the kernel `{}` takes arguments of the types \"{}\", not \"{}\"",
                kernel.entry.name, kernel.entry.signature, self.codes
            );
            return Err(Error::Shape { operation: "launch", problem });
        }
        let launched = Launched { kernel: kernel.entry.name, grid, threads: kernel.entry.threads, shared };
        kernel.monitor.note(&launched);
        // SAFETY: the arguments are of the kernel's types; the rest is the caller's promise.
        let done = unsafe { self.submit(grid, shared) };
        let finished =
            done.and_then(|()| if kernel.monitor.is_debugging() { finish(stream) } else { Ok(()) });
        finished.map_err(|error| convert(error, format!("launch {launched}, {shapes}")))
    }

    /// Hands the launch to the driver, which reads the arguments before it returns.
    ///
    /// # Safety
    /// That of [`run`](Self::run), and the arguments are of the kernel's types.
    unsafe fn submit(&self, grid: [u32; 3], shared: u32) -> Result<(), DriverError> {
        let pointer = |slot: &Slot| match slot {
            Slot::Address(address) => ptr::from_ref(address).cast_mut().cast(),
            Slot::Borrowed(value) => value.cast_mut(),
        };
        // Of values that this launch holds or borrows; the driver only reads them.
        let mut pointers: Vec<*mut c_void> = self.arguments.iter().map(pointer).collect();
        let (function, stream, threads) =
            (self.kernel.function.cu_function(), self.stream.cu_stream(), self.kernel.entry.threads);
        self.stream.context().bind_to_thread()?;
        if !self.kernel.monitor.is_overlapping() {
            // SAFETY: function and stream are alive; the arguments are the caller's promise.
            return unsafe {
                result::launch_kernel(function, grid.into(), (threads, 1, 1), shared, stream, &mut pointers)
            };
        }
        let mut dependent = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { pad: [0; 64] },
        };
        dependent.value.programmaticStreamSerializationAllowed = 1;
        let configuration = CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared,
            hStream: stream,
            attrs: &raw mut dependent,
            numAttrs: 1,
        };
        // SAFETY: as above, and every kernel waits for its predecessors before it touches memory (`after_predecessors` in
        // kernels/include/predecessors.cuh; tests/machine_code.rs looks for it in the machine code), so the order of the
        // stream holds for what it reads and writes. The driver reads configuration and attribute before it returns.
        unsafe {
            cuLaunchKernelEx(&raw const configuration, function, pointers.as_mut_ptr(), ptr::null_mut())
        }
        .result()
    }
}

/// Waits for the stream, unless it is being captured: then nothing runs yet.
fn finish(stream: &CudaStream) -> Result<(), DriverError> {
    match stream.capture_status()? {
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => stream.synchronize(),
        _ => Ok(()),
    }
}
