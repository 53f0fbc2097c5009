//! Buffers that go back where they came from. A training step needs the same tensors again and again; fresh memory for
//! each would be zeroed, and mapped page by page, only to be overwritten.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A store of buffers, shared by its clones.
pub(crate) struct Pool<F>(Arc<Mutex<HashMap<usize, Shelf<F>>>>);

/// All buffers of one length.
struct Shelf<F> {
    idle: Vec<Vec<F>>,
    /// Buffers taken and not given back.
    lent: usize,
    /// How many of the idle ones nobody has needed since the last [`Pool::trim`].
    unneeded: usize,
}

impl<F> Pool<F> {
    fn shelves(&self) -> MutexGuard<'_, HashMap<usize, Shelf<F>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a buffer back. One that never came from here is dropped, so the pool cannot grow without bound.
    pub(crate) fn give(&self, buffer: Vec<F>) {
        if let Some(shelf) = self.shelves().get_mut(&buffer.len())
            && shelf.lent > 0
        {
            shelf.lent -= 1;
            shelf.idle.push(buffer);
        }
    }

    /// Frees what nobody has needed since the last call.
    pub(crate) fn trim(&self) {
        self.shelves().retain(|_, shelf| {
            shelf.idle.truncate(shelf.idle.len() - shelf.unneeded);
            shelf.unneeded = shelf.idle.len();
            shelf.lent + shelf.idle.len() > 0
        });
    }
}

impl<F: num_traits::Float> Pool<F> {
    /// A buffer of `len` values, whatever they are; NaN in debug builds, so that a read before a write shows.
    pub(crate) fn take(&self, len: usize) -> Vec<F> {
        let mut shelves = self.shelves();
        let shelf = shelves.entry(len).or_insert(Shelf { idle: Vec::new(), lent: 0, unneeded: 0 });
        shelf.lent += 1;
        let recycled = shelf.idle.pop();
        shelf.unneeded = shelf.unneeded.min(shelf.idle.len());
        drop(shelves);
        let mut buffer = recycled.unwrap_or_else(|| vec![F::zero(); len]);
        if cfg!(debug_assertions) {
            buffer.fill(F::nan());
        }
        buffer
    }
}

impl<F> Default for Pool<F> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<F> Clone for Pool<F> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<F> Debug for Pool<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle(pool: &Pool<f32>) -> usize {
        pool.shelves().values().map(|shelf| shelf.idle.len()).sum()
    }

    #[test]
    fn a_buffer_comes_back_only_for_its_own_length() {
        let pool = Pool::<f32>::default();
        let first = pool.take(8);
        let address = first.as_ptr();
        pool.give(first);
        let (other, again) = (pool.take(7), pool.take(8));
        assert_eq!((other.len(), again.len(), again.as_ptr(), idle(&pool)), (7, 8, address, 0));
    }

    #[test]
    fn strangers_are_not_kept() {
        let pool = Pool::default();
        pool.give(vec![0.0; 8]);
        let own = pool.take(8);
        pool.give(own);
        pool.give(vec![0.0; 8]);
        assert_eq!(idle(&pool), 1);
    }

    #[test]
    fn trimming_frees_what_a_whole_step_did_not_need() {
        let pool = Pool::default();
        for buffer in [pool.take(8), pool.take(8)] {
            pool.give(buffer);
        }
        pool.trim();
        assert_eq!(idle(&pool), 2, "both were needed since the pool began");
        let one = pool.take(8);
        pool.give(one);
        pool.trim();
        assert_eq!(idle(&pool), 1);
        pool.trim();
        assert_eq!(idle(&pool), 0);
    }
}
