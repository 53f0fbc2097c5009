//! One launch of one kernel.
//!
//! The driver takes arguments as untyped pointers. [`Launch`] writes down the type of each as it comes and compares the
//! list with the kernel's table before anything is launched; a wrong number or type is an error.

use super::driver_error::convert;
use super::{Element, Kernel, Launched};
use crate::{Error, Result};
use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{
    CudaStream, CudaView, CudaViewMut, DeviceRepr, DriverError, LaunchArgs, LaunchConfig, PushKernelArg,
};
use std::fmt::{self, Debug, Display, Formatter};
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

static NULL: u64 = 0;

/// A launch being put together: arguments in the order of the kernel's parameters, then [`run`](Self::run).
pub struct Launch<'a> {
    kernel: &'a Kernel,
    stream: &'a Arc<CudaStream>,
    arguments: LaunchArgs<'a>,
    codes: String,
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
        Launch { kernel: self, stream, arguments: stream.launch_builder(&self.function), codes }
    }
}

impl<'a> Launch<'a> {
    /// A buffer that the kernel reads.
    pub fn input<'b: 'a, 'c: 'b, T: Element>(&mut self, view: &'b CudaView<'c, T>) -> &mut Self {
        self.arguments.arg(view);
        self.code("p")
    }

    /// A buffer that the kernel writes.
    pub fn output<'b: 'a, 'c: 'b, T: Element>(&mut self, view: &'b mut CudaViewMut<'c, T>) -> &mut Self {
        self.arguments.arg(view);
        self.code("p")
    }

    /// A null pointer, for a buffer that the kernel can do without.
    pub fn null(&mut self) -> &mut Self {
        self.arguments.arg(&NULL);
        self.code("p")
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
        self.arguments.arg(value);
        self.code(T::CODE)
    }

    fn code(&mut self, code: &str) -> &mut Self {
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
        let Self { kernel, stream, .. } = self;
        if self.codes != kernel.entry.signature {
            let problem = format!(
                "the kernel `{}` takes arguments of the types \"{}\", not \"{}\"",
                kernel.entry.name, kernel.entry.signature, self.codes
            );
            return Err(Error::Shape { operation: "launch", problem });
        }
        let configuration = LaunchConfig {
            grid_dim: grid.into(),
            block_dim: (kernel.entry.threads, 1, 1),
            shared_mem_bytes: shared,
        };
        let launched = Launched { kernel: kernel.entry.name, grid, threads: kernel.entry.threads, shared };
        kernel.monitor.note(&launched);
        // SAFETY: the arguments are of the kernel's types; the rest is the caller's promise.
        let done = unsafe { self.arguments.launch(configuration) };
        let finished = done.and_then(|_| if kernel.monitor.is_debugging() { finish(stream) } else { Ok(()) });
        finished.map_err(|error| convert(error, format!("launch {launched}, {shapes}")))
    }
}

/// Waits for the stream, unless it is being captured: then nothing runs yet.
fn finish(stream: &CudaStream) -> Result<(), DriverError> {
    match stream.capture_status()? {
        CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => stream.synchronize(),
        _ => Ok(()),
    }
}
