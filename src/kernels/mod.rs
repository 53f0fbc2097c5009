//! The safe wrapper of each `kernels/*.cu`.
//!
//! A wrapper is a plan: made once for shapes and a device, it checks what can be checked beforehand and holds its kernels;
//! each of its operations checks its buffers and launches. Buffers are plain cudarc views, so a program that knows
//! nothing of this crate's tensors can use it. The streams are the caller's, too, as long as they are of the plan's GPU.
//! Wrong lengths, overlaps, misalignment and foreign devices are errors before anything is launched.

pub mod batch_norm;
pub mod conv3x3;
mod conv_strips;
mod conv_tile;
pub mod depthwise;
pub mod fused;
mod gemm;
pub mod head;
pub mod input;
mod operand;
pub mod optimizer;
pub mod pointwise;
pub mod pointwise_one_pass;
mod raw;
pub mod squeeze_excite;
pub mod stem;
mod step;
pub mod tuning;
mod work;
mod workspace;

pub use operand::{
    Arrival, Debt, GradientKind, GradientOutput, GradientView, Input, InputKind, Output, OutputKind,
    Statistics,
};
pub use raw::{RawElement, RawView};
pub use step::StepScalars;
pub use work::{Cost, Work};
pub use workspace::Workspace;

use crate::device::Family;

/// Every family there is. build.rs watches this file: a new `kernels/*.cu` is compiled when it is listed here.
pub const FAMILIES: &[&Family] = &[
    &batch_norm::FAMILY,
    &conv3x3::FAMILY,
    &depthwise::FAMILY,
    &head::FAMILY,
    &input::FAMILY,
    &optimizer::FAMILY,
    &pointwise::FAMILY,
    &pointwise_one_pass::FAMILY,
    &squeeze_excite::FAMILY,
    &stem::FAMILY,
];
