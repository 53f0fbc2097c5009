//! Ctrl-C: the first asks the run to stop after its step, the second ends the process at once.

use super::output::note;
use crate::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that Ctrl-C (or a termination signal) raises.
pub(super) fn stop_flag() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = Arc::clone(&stop);
    let handler = move || {
        if raised.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        note!("\nstopping after this step and saving a checkpoint; once more ends at once");
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Training(format!("cannot listen for Ctrl-C: {e}")))?;
    Ok(stop)
}
