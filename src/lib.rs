//! EfficientNetV2 with manual backprop.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod backend;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
#[cfg(feature = "cuda")]
pub mod device;
pub mod error;
#[cfg(feature = "cuda")]
pub mod kernels;
pub mod model;
pub mod nn;
pub mod optimizer;
pub mod random;
pub mod reference;
pub mod report;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
