//! EfficientNetV2 with manual backprop.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod backend;
pub mod error;
pub mod model;
pub mod nn;
pub mod random;
pub mod reference;
pub mod tensor;

pub use error::{Error, Result};
