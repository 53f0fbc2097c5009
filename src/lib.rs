//! EfficientNetV2 with manual backprop.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod data;
pub mod error;
pub mod random;

pub use error::{Error, Result};
