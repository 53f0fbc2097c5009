//! Memory of a step, planned once.
//!
//! The same step asks for the same blocks and gives them back in the same order every time, so one allocation serves them
//! all. The forward pass piles them up; the backward pass gives them back, nearly in reverse, and its gradients take the
//! room of the activations that are done with: a block lies in the lowest gap that holds it. A [`Layout`] is the arithmetic
//! alone; it says how much a step needs before there is any memory. An [`Arena`] is a layout with the memory behind it.
//! The same calls give the same addresses, which is what lets a captured graph be replayed.

use super::{Device, Element};
use crate::{Error, Result};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Every block begins at a multiple of this many bytes: a cache line pair, and more than any access needs.
const ALIGNMENT: usize = 256;

/// Where blocks lie.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// In the order of their places.
    extents: Vec<Extent>,
    high_water: usize,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    begin: usize,
    end: usize,
}

impl Layout {
    /// No blocks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a block of `bytes` into the lowest gap that holds it and returns its offset.
    pub fn push(&mut self, bytes: usize) -> usize {
        let length = bytes.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        let (place, begin) = self.gap(length);
        let end = begin.saturating_add(length);
        self.extents.insert(place, Extent { begin, end });
        self.high_water = self.high_water.max(end);
        begin
    }

    /// The number that a block of `length` bytes would have, and its offset.
    fn gap(&self, length: usize) -> (usize, usize) {
        let mut free_from = 0;
        for (place, extent) in self.extents.iter().enumerate() {
            if extent.begin - free_from >= length {
                return (place, free_from);
            }
            free_from = extent.end;
        }
        (self.extents.len(), free_from)
    }

    /// Gives back the block at `offset`. Blocks may go in any order.
    pub fn pop(&mut self, offset: usize) {
        self.extents.retain(|extent| extent.begin != offset);
    }

    /// Bytes up to the end of the last block.
    pub fn used(&self) -> usize {
        self.extents.last().map_or(0, |extent| extent.end)
    }

    /// The most bytes that were ever used: the size of an arena for the same calls.
    pub fn high_water(&self) -> usize {
        self.high_water
    }
}

/// One allocation that serves all blocks of a step. Clones are the same arena.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    memory: CudaSlice<u8>,
    begin: u64,
    layout: Mutex<Layout>,
}

impl Inner {
    fn layout(&self) -> MutexGuard<'_, Layout> {
        self.layout.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arena {
    /// An arena of `bytes`, usually a [`Layout::high_water`].
    ///
    /// # Errors
    /// [`Error::Driver`] when there is no memory for it.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        // SAFETY: blocks are documented to hold whatever was there.
        let memory = unsafe { device.allocate::<u8>(bytes.max(1)) }?;
        let begin = memory.device_ptr(device.compute()).0;
        Ok(Self(Arc::new(Inner { memory, begin, layout: Mutex::default() })))
    }

    /// Puts a block of `length` elements into the lowest gap that holds it. It holds whatever was there before.
    ///
    /// # Errors
    /// [`Error::ArenaFull`].
    pub fn push<T: Element>(&self, length: usize) -> Result<Block<T>> {
        let capacity = self.capacity();
        let asked = length.saturating_mul(size_of::<T>());
        let mut layout = self.0.layout();
        let used = layout.used();
        let (_, begin) = layout.gap(asked.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX));
        if begin.saturating_add(asked) > capacity {
            return Err(Error::ArenaFull { capacity, used, asked });
        }
        let offset = layout.push(asked);
        // SAFETY: the range lies within the arena's memory, is aligned, and is this block's alone until it is dropped; the
        // memory outlives it because the block holds the arena. `Drop` never frees it. Every pattern of bits is a value.
        let slice = unsafe { self.stream().upgrade_device_ptr(self.0.begin + offset as u64, length) };
        Ok(Block { slice: ManuallyDrop::new(slice), offset, arena: self.0.clone() })
    }

    /// Bytes in all.
    pub fn capacity(&self) -> usize {
        self.0.memory.len()
    }

    /// Bytes up to the end of the last block.
    pub fn used(&self) -> usize {
        self.0.layout().used()
    }

    /// The most bytes that were ever used.
    pub fn high_water(&self) -> usize {
        self.0.layout().high_water()
    }

    fn stream(&self) -> &Arc<CudaStream> {
        self.0.memory.stream()
    }
}

/// A part of an [`Arena`], given back when dropped.
///
/// The device may still be using it then: what takes its place is computed later on the same stream.
#[derive(Debug)]
pub struct Block<T: Element> {
    slice: ManuallyDrop<CudaSlice<T>>,
    offset: usize,
    arena: Arc<Inner>,
}

impl<T: Element> Block<T> {
    /// Its elements, to read.
    pub fn view(&self) -> CudaView<'_, T> {
        self.slice.as_view()
    }

    /// Its elements, to write.
    pub fn view_mut(&mut self) -> CudaViewMut<'_, T> {
        self.slice.as_view_mut()
    }

    /// How many elements it has.
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.slice.len() == 0
    }
}

impl<T: Element> Drop for Block<T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used afterwards.
        let slice = unsafe { ManuallyDrop::take(&mut self.slice) };
        // Lets go of the stream without freeing what is the arena's.
        slice.leak();
        self.arena.layout().pop(self.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_lie_in_the_lowest_gap_that_holds_them() {
        let mut layout = Layout::new();
        assert_eq!([layout.push(1), layout.push(256), layout.push(257)], [0, 256, 512]);
        assert_eq!((layout.used(), layout.high_water()), (1024, 1024));
        // Out of order: the gap takes what fits, and nothing else.
        layout.pop(256);
        assert_eq!(layout.used(), 1024);
        assert_eq!([layout.push(257), layout.push(100)], [1024, 256]);
        layout.pop(512);
        assert_eq!([layout.push(200), layout.push(256)], [512, 768]);
        for offset in [1024, 0, 768, 256, 512] {
            layout.pop(offset);
        }
        assert_eq!((layout.used(), layout.high_water()), (0, 1536));
    }

    /// Forward and back: gradients take the room of activations that are done with.
    #[test]
    fn a_backward_pass_needs_little_more_than_the_forward_pass() {
        let mut layout = Layout::new();
        let activations: Vec<usize> = (0..10).map(|_| layout.push(1000)).collect();
        let forward = layout.high_water();
        let mut gradient = layout.push(1000);
        for activation in activations.into_iter().rev() {
            let next = layout.push(1000);
            layout.pop(activation);
            layout.pop(gradient);
            gradient = next;
        }
        assert_eq!(layout.high_water(), forward + 2 * 1024);
    }

    #[test]
    fn sizes_beyond_all_memory_do_not_wrap() {
        let mut layout = Layout::new();
        layout.push(300);
        layout.push(usize::MAX - 10);
        assert_eq!(layout.high_water(), usize::MAX);
    }
}
