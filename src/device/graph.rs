//! A whole step as one launch.
//!
//! A CUDA graph replays launches with the addresses they were recorded with, and does not keep that memory alive. So a
//! [`Graph`] owns it: what is recorded may use nothing but the state it is given, and the graph keeps that state. Whoever
//! keeps the memory alive by other means records with [`Graph::record_borrowed`].

use super::Device;
use super::driver_error::Doing;
use crate::{Error, Result};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use std::fmt::{self, Debug, Formatter};

/// Recorded work and all that it uses.
pub struct Graph<S> {
    // Before the state: it goes first.
    graph: CudaGraph,
    state: S,
    device: Device,
}

impl<S: Debug> Debug for Graph<S> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Graph").field("state", &self.state).finish_non_exhaustive()
    }
}

/// What `work` asks of [`Device::compute`], recorded instead of done.
fn capture(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<CudaGraph> {
    let doing = || "record a CUDA graph".to_owned();
    let stream = device.compute();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).doing(doing)?;
    let done = work();
    // Always, or the stream would stay in capture.
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).doing(doing);
    done?;
    let graph = graph?.ok_or_else(|| Error::Shape {
        operation: "graph",
        problem: "the work to record asked nothing of the compute stream".into(),
    })?;
    graph.upload().doing(doing)?;
    Ok(graph)
}

impl Graph<()> {
    /// As [`record`](Self::record), for work on buffers that stay with the caller.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// Whenever the graph is launched, every buffer that `work` used must be alive, and nothing else may be using those
    /// that it wrote.
    pub unsafe fn record_borrowed(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        Ok(Self { graph: capture(device, work)?, state: (), device: device.clone() })
    }
}

impl<S: 'static> Graph<S> {
    /// Records what `work` asks of [`Device::compute`], without doing it.
    ///
    /// `work` is a plain function, so that all it can use is `state`. Values that change from step to step must lie in
    /// device memory. Run the same work once before: modules are loaded and kernels set up on first use, which cannot be
    /// recorded.
    ///
    /// # Errors
    /// Those of `work`, [`Error::Shape`] when it asks for nothing, and [`Error::Driver`], for work that cannot be
    /// recorded (waiting for the device, for one). The stream is usable afterwards.
    pub fn record(device: &Device, mut state: S, work: fn(&mut S) -> Result<()>) -> Result<Self> {
        let graph = capture(device, || work(&mut state))?;
        Ok(Self { graph, state, device: device.clone() })
    }

    /// Does the recorded work once more, on [`Device::compute`].
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn launch(&mut self) -> Result<()> {
        let doing = || "launch a CUDA graph".to_owned();
        self.graph.launch().doing(doing)?;
        if self.device.is_debugging() { self.device.compute().synchronize().doing(doing) } else { Ok(()) }
    }

    /// What the graph works on.
    pub fn state(&self) -> &S {
        &self.state
    }

    /// What the graph works on, to be written.
    ///
    /// # Safety
    /// No buffer may be freed, replaced or taken out: the graph knows their addresses. Writing into them is what this
    /// is for.
    pub unsafe fn state_mut(&mut self) -> &mut S {
        &mut self.state
    }

    /// Gives the state back and forgets the recorded work.
    ///
    /// # Errors
    /// [`Error::Driver`] when work under way failed: it is waited for first.
    pub fn into_state(self) -> Result<S> {
        self.device.compute().synchronize().doing(|| "finish a CUDA graph".into())?;
        Ok(self.state)
    }
}
