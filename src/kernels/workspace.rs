//! Scratch memory that kernels share.
//!
//! Kernels that reduce over blocks leave partial results in device memory, and the last block to finish adds them up
//! (`kernels/include/last_block.cuh`). Nothing of it outlives a launch, so all operations on one stream share one
//! [`Workspace`].

use crate::device::Device;
use crate::device::cudarc::driver::CudaSlice;
use crate::{Error, Result};

/// Partial results and the counters by which blocks know that they are the last.
#[derive(Debug)]
pub struct Workspace {
    pub(super) partial: CudaSlice<f32>,
    /// All zero between launches.
    pub(super) counters: CudaSlice<u32>,
}

impl Workspace {
    /// Counters that a launch may use: one for each group of blocks that is added up by itself.
    pub const COUNTERS: usize = 4096;

    /// With room for `floats` partial results: the most that any plan which shares it asks for.
    ///
    /// # Errors
    /// [`Error::Driver`], out of memory for one.
    pub fn new(device: &Device, floats: usize) -> Result<Self> {
        let (partial, counters) = (device.zeros(floats.max(1))?, device.zeros(Self::COUNTERS)?);
        Ok(Self { partial, counters })
    }

    /// Partial results that there is room for.
    pub fn floats(&self) -> usize {
        self.partial.len()
    }

    /// Refuses a launch that needs more.
    pub(super) fn check(&self, operation: &'static str, floats: usize, counters: usize) -> Result<()> {
        if floats <= self.partial.len() && counters <= Self::COUNTERS {
            return Ok(());
        }
        let problem = format!(
            "a workspace of {floats} floats and {counters} counters is needed; this one has {} and {}",
            self.partial.len(),
            Self::COUNTERS
        );
        Err(Error::Shape { operation, problem })
    }
}
