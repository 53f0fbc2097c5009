//! Memory of a step, planned once.
//!
//! Activations are a stack: the forward pass pushes, the backward pass pops, and the same step asks for the same sizes in
//! the same order every time. So one allocation serves them all. A [`Layout`] is the arithmetic alone; it says how much
//! a step needs before there is any memory. An [`Arena`] is a layout with the memory behind it. The same calls give the
//! same addresses, which is what lets a captured graph be replayed.

use super::{Device, Element};
use crate::{Error, Result};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr};
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Every block begins at a multiple of this many bytes: a cache line pair, and more than any access needs.
const ALIGNMENT: usize = 256;

/// Where the blocks of a stack lie.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    extents: Vec<Extent>,
    high_water: usize,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    begin: usize,
    end: usize,
    live: bool,
}

impl Layout {
    /// An empty stack.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a block of `bytes` on top and returns its offset.
    pub fn push(&mut self, bytes: usize) -> usize {
        let begin = self.used();
        let end =
            begin.saturating_add(bytes.max(1)).checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        self.extents.push(Extent { begin, end, live: true });
        self.high_water = self.high_water.max(end);
        begin
    }

    /// Gives back the block at `offset`. Blocks may go in any order; room comes back when all above are gone, too.
    pub fn pop(&mut self, offset: usize) {
        if let Some(extent) = self.extents.iter_mut().rev().find(|extent| extent.begin == offset) {
            extent.live = false;
        }
        while self.extents.last().is_some_and(|extent| !extent.live) {
            self.extents.pop();
        }
    }

    /// Bytes up to the top of the stack.
    pub fn used(&self) -> usize {
        self.extents.last().map_or(0, |extent| extent.end)
    }

    /// The most bytes that were ever used: the size of an arena for the same calls.
    pub fn high_water(&self) -> usize {
        self.high_water
    }
}

/// One allocation that serves as a stack of blocks. Clones are the same arena.
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

    /// Puts a block of `length` elements on top. It holds whatever was there before.
    ///
    /// # Errors
    /// [`Error::ArenaFull`].
    pub fn push<T: Element>(&self, length: usize) -> Result<Block<T>> {
        let capacity = self.capacity();
        let asked = length.saturating_mul(size_of::<T>());
        let mut layout = self.0.layout();
        let used = layout.used();
        if used.saturating_add(asked) > capacity {
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

    /// Bytes up to the top of the stack.
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
    fn a_layout_is_a_stack() {
        let mut layout = Layout::new();
        assert_eq!([layout.push(1), layout.push(256), layout.push(257)], [0, 256, 512]);
        assert_eq!((layout.used(), layout.high_water()), (1024, 1024));
        // Out of order: the room comes back with the block above it.
        layout.pop(256);
        assert_eq!(layout.used(), 1024);
        layout.pop(512);
        assert_eq!(layout.used(), 256);
        assert_eq!(layout.push(100), 256);
        layout.pop(256);
        layout.pop(0);
        assert_eq!((layout.used(), layout.high_water()), (0, 1024));
    }

    #[test]
    fn sizes_beyond_all_memory_do_not_wrap() {
        let mut layout = Layout::new();
        layout.push(300);
        layout.push(usize::MAX - 10);
        assert_eq!(layout.high_water(), usize::MAX);
    }
}
