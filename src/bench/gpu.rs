//! Measuring on a GPU.

use super::Measured;
use super::machine::Machine;
use super::timing::Clock;
use crate::Result;
use crate::device::{Device, Mark};
use crate::kernels::fused::{Accelerated, FusedElement};

/// Events on the stream that computes.
impl Clock for Device {
    type Mark = Mark;

    fn mark(&self) -> Result<Mark> {
        self.mark()
    }

    fn seconds(&self, from: &Mark, to: &Mark) -> Result<f64> {
        self.between(from, to).map(|time| time.as_secs_f64())
    }
}

impl<T: FusedElement> Measured for Accelerated<T> {
    type Clock = Device;

    fn clock(&self) -> Device {
        self.device().clone()
    }

    fn machine(&self) -> Machine {
        Machine::of(self.device())
    }

    fn cache(&self) -> usize {
        if self.device().is_host() { 0 } else { self.device().gpu().cache }
    }

    fn mode(&self) -> &'static str {
        if self.graphs() > 0 { "graph" } else { "plain" }
    }

    fn overlaps(&self) -> bool {
        self.device().is_overlapping()
    }
}
