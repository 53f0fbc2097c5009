//! EfficientNetV2 with manual backprop.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod backend;
pub mod error;
pub mod model;
pub mod nn;
pub mod optimizer;
mod pool;
pub mod random;
pub mod reference;
pub mod report;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
