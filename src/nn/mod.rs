//! The network: blocks with forward and backward, written once against [`Backend`](crate::backend::Backend).
//!
//! A block's forward returns its output and a tape of what backward needs; backward consumes the tape, so every stored
//! tensor is released as soon as its gradient is known.

#![forbid(unsafe_code)]

mod block;
mod fused_mbconv;
mod layout;
mod mbconv;
mod network;
mod spec;

pub use block::{Block, BlockTape};
pub use fused_mbconv::FusedMbConv;
pub use layout::{ALIGNMENT, Entry, Layout, Role};
pub use mbconv::MbConv;
pub use network::{Network, Pass};
pub use spec::{BatchNormSpec, BlockKind, BlockSpec, NetworkSpec, StageSpec};
