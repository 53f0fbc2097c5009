//! The CPU reference: every family of operations in its textbook form, forward and backward, generic over f32 and f64.
//!
//! One file a family; each is a handful of plain functions on NHWC tensors. [`Reference`] composes them into the fused
//! operations of [`Backend`](crate::backend::Backend). It is the oracle of the kernels, so it stays obvious, and it is
//! what trains when there is no GPU, so the heavy loops run over all threads and in the widest vectors of the machine.
//!
//! Results do not depend on the number of threads: work is cut by shape alone and partial sums are added in order.

#![forbid(unsafe_code)]

pub mod batch_norm;
pub mod conv3x3;
pub mod depthwise;
mod fused;
pub mod head;
pub mod input;
pub mod optimizer;
mod parallel;
pub mod pointwise;
pub mod squeeze_excite;

pub use fused::Reference;
