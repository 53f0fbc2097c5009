//! The GPU: the only place that knows cudarc.
//!
//! A [`Device`] is a context with two streams: everything is computed on one, [`Staging`] brings input on the other. Its
//! memory comes in plain cudarc slices ([`Device::upload`], [`Device::zeros`]) for what lives as long as a run, and
//! from an [`Arena`] for what lives within a step: planned once, never allocated in between. Kernels
//! come in families, one `kernels/*.cu` each; a [`Module`] is a family loaded, each kernel looked up once. A [`Graph`] is
//! a whole step recorded, and owns what it replays.
//!
//! Ordering. cudarc can order the streams of a context by events around every launch; that costs microseconds for each
//! argument and cannot be captured, so it is off here. Everything in this crate computes on [`Device::compute`], in the
//! order of the calls, and what `Staging` copies is joined to it. Whoever opens streams of their own on
//! [`Device::context`] orders them by events of their own. With [`Device::set_overlapping`] a kernel's blocks are set up
//! before the kernel ahead has ended; each waits by itself, so that this order stands (kernels/include/predecessors.cuh).
//!
//! Nothing here panics without a driver, and nothing chooses for the user: [`Device::cuda`] is a GPU or an error, and
//! [`Device::host`] is the host device, which runs the same kernels on the CPU to check them (kernels/host/README.md).

mod arena;
mod context;
mod driver_error;
mod graph;
mod host;
mod images;
mod launch;
mod module;
mod monitor;
mod operands;
mod probe;
mod staging;
mod tensor_map;
mod transfer;

pub use arena::{Arena, Block, Layout};
pub use context::{Device, Mark};
pub use cudarc;
pub use graph::Graph;
pub use host::{HostControl, HostKernel};
pub use images::{Image, embedded_images, toolkit};
pub use launch::{Argument, Launch};
pub use module::{Entry, Family, Kernel, Module, Resources};
pub use monitor::Launched;
pub use operands::Operands;
pub use probe::{Gpu, Survey, survey};
pub use staging::Staging;
pub use tensor_map::TensorMap;
pub use transfer::{copy, read, write};

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};

/// What buffers hold: numbers for which every pattern of bits is a value.
pub trait Element: DeviceRepr + ValidAsZeroBits + Copy + Default + Send + Sync + 'static {}

impl Element for f32 {}
impl Element for f64 {}
impl Element for half::f16 {}
impl Element for half::bf16 {}
impl Element for u8 {}
impl Element for i32 {}
impl Element for u32 {}
