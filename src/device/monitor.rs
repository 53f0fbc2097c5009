//! How the launches of a device are made, and what watches them: overlapping, waiting for each, a list of them.

use std::fmt::{self, Display, Formatter};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A launch as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// The kernel's name in its `.cu` file.
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

impl Display for Launched {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.grid;
        write!(
            f,
            "`{}` (grid {x}×{y}×{z}, block {}, {} bytes of shared memory)",
            self.kernel, self.threads, self.shared
        )
    }
}

/// One for a device and all its kernels.
#[derive(Debug, Default)]
pub(super) struct Monitor {
    overlapping: AtomicBool,
    debugging: AtomicBool,
    logging: AtomicBool,
    log: Mutex<Vec<Launched>>,
}

impl Monitor {
    pub(super) fn is_overlapping(&self) -> bool {
        self.overlapping.load(Ordering::Relaxed)
    }

    pub(super) fn set_overlapping(&self, overlapping: bool) {
        self.overlapping.store(overlapping, Ordering::Relaxed);
    }

    pub(super) fn is_debugging(&self) -> bool {
        self.debugging.load(Ordering::Relaxed)
    }

    pub(super) fn set_debugging(&self, debugging: bool) {
        self.debugging.store(debugging, Ordering::Relaxed);
    }

    /// Begins a list.
    pub(super) fn start_log(&self) {
        let mut log = self.log();
        log.clear();
        self.logging.store(true, Ordering::Relaxed);
    }

    /// Ends it.
    pub(super) fn take_log(&self) -> Vec<Launched> {
        let mut log = self.log();
        self.logging.store(false, Ordering::Relaxed);
        std::mem::take(&mut log)
    }

    pub(super) fn note(&self, launched: &Launched) {
        if self.logging.load(Ordering::Relaxed) {
            self.log().push(launched.clone());
        }
    }

    fn log(&self) -> MutexGuard<'_, Vec<Launched>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
