//! What a launch is and costs, known from shapes alone.
//!
//! Every wrapper derives its grids from such a record, and `plan` lists them without a device: what is listed is what
//! would be launched.

use crate::device::Launched;
use std::iter::Sum;
use std::ops::Add;

/// One launch of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    /// The kernel's name in its `.cu` file.
    pub kernel: String,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared: u32,
    /// The least it moves to and from memory, and what it computes.
    pub cost: Cost,
}

impl Work {
    /// Whether `launched` is this launch.
    pub fn is(&self, launched: &Launched) -> bool {
        self.kernel == launched.kernel && self.grid == launched.grid && self.shared == launched.shared
    }
}

/// What a launch must move and compute at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Bytes read from and written to device memory, each tensor once.
    pub bytes: u64,
    /// Floating-point operations on tensor cores (on plain ones in f32): a multiply-add counts two.
    pub tensor_operations: u64,
    /// Other floating-point operations.
    pub operations: u64,
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes + other.bytes,
            tensor_operations: self.tensor_operations + other.tensor_operations,
            operations: self.operations + other.operations,
        }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
        iter.fold(Self::default(), Add::add)
    }
}
