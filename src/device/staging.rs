//! Input on its way to the device, while the device computes.
//!
//! A batch is copied into page-locked memory, from there by the copy engine into a buffer on the device, and when the
//! compute stream is ready for it, within the device to where the step reads it: always the same place, as a captured
//! graph needs. There are two of each buffer, so the next batch travels while this one is computed with.

use super::driver_error::Doing;
use super::{Device, Element};
use crate::{Error, Result};
use cudarc::driver::{CudaEvent, CudaSlice, CudaViewMut, DriverError, PinnedHostSlice};

/// Buffers for batches of a fixed number of elements.
#[derive(Debug)]
pub struct Staging<T: Element> {
    device: Device,
    length: usize,
    slots: [Slot<T>; 2],
    sent: usize,
    received: usize,
}

#[derive(Debug)]
struct Slot<T: Element> {
    pinned: PinnedHostSlice<T>,
    buffer: CudaSlice<T>,
    /// On the copy stream: the batch is in `buffer`.
    arrived: CudaEvent,
    /// On the compute stream: `buffer` has been read.
    consumed: CudaEvent,
}

impl<T: Element> Staging<T> {
    /// For batches of `length` elements.
    ///
    /// # Errors
    /// [`Error::Driver`] when there is no memory for the buffers.
    pub fn new(device: &Device, length: usize) -> Result<Self> {
        let slot = || {
            let buffer = device.zeros(length)?;
            let doing = || format!("allocate {} bytes of page-locked memory", length * size_of::<T>());
            // SAFETY: `send` writes it in full before it is copied from. It is written in order and never read by the
            // CPU, which is what write-combined memory is for.
            let pinned = unsafe { device.context().alloc_pinned(length) }.doing(doing)?;
            let arrived = device.context().new_event(None).doing(doing)?;
            let consumed = device.context().new_event(None).doing(doing)?;
            // The buffer may be copied into when it has been cleared.
            consumed.record(device.compute()).doing(doing)?;
            Ok::<_, Error>(Slot { pinned, buffer, arrived, consumed })
        };
        Ok(Self { device: device.clone(), length, slots: [slot()?, slot()?], sent: 0, received: 0 })
    }

    /// Starts a batch on its way; `fill` writes it. Waits only if the copy of the batch before the last is still under way.
    ///
    /// # Errors
    /// [`Error::Shape`] when two batches are on their way already; those of `fill`; [`Error::Driver`].
    pub fn send(&mut self, fill: impl FnOnce(&mut [T]) -> Result<()>) -> Result<()> {
        if self.sent - self.received == self.slots.len() {
            return Err(misuse("two batches are on their way: receive one before sending a third"));
        }
        let doing = || "send a batch to the GPU".to_owned();
        let slot = &mut self.slots[self.sent % 2];
        // cudarc would wait itself, were it tracking uses.
        slot.arrived.synchronize().doing(doing)?;
        fill(slot.pinned.as_mut_slice().doing(doing)?)?;
        let copy = self.device.copy();
        let mut start = || -> Result<(), DriverError> {
            copy.wait(&slot.consumed)?;
            copy.memcpy_htod(&slot.pinned, &mut slot.buffer)?;
            slot.arrived.record(copy)
        };
        start().doing(doing)?;
        self.sent += 1;
        Ok(())
    }

    /// Forgets the batches that are on their way.
    pub fn discard(&mut self) {
        self.received = self.sent;
    }

    /// Lets the compute stream wait for the oldest batch on its way and copy it to `to`.
    ///
    /// # Errors
    /// [`Error::Shape`] when none is on its way or `to` is of another length; [`Error::Driver`].
    pub fn receive(&mut self, to: &mut CudaViewMut<'_, T>) -> Result<()> {
        if self.sent == self.received {
            return Err(misuse("no batch is on its way: send one first"));
        }
        if to.len() != self.length {
            return Err(misuse(&format!(
                "a batch has {} elements, its destination {}",
                self.length,
                to.len()
            )));
        }
        let slot = &mut self.slots[self.received % 2];
        let compute = self.device.compute();
        let mut start = || -> Result<(), DriverError> {
            compute.wait(&slot.arrived)?;
            compute.memcpy_dtod(&slot.buffer, to)?;
            slot.consumed.record(compute)
        };
        start().doing(|| "receive a batch on the GPU".into())?;
        self.received += 1;
        Ok(())
    }
}

impl<T: Element> Drop for Staging<T> {
    /// Page-locked memory is freed at once and buffers in the order of the compute stream: the copies from the one to
    /// the other must be over.
    fn drop(&mut self) {
        for slot in &self.slots {
            // If this fails the context is lost, and the next call says so.
            let _ = slot.arrived.synchronize();
        }
    }
}

fn misuse(problem: &str) -> Error {
    Error::Shape { operation: "staging", problem: problem.into() }
}
