//! EfficientNetV2 with manual backprop.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod error;
pub mod optimizer;
pub mod random;
pub mod reference;
pub mod report;
pub mod train;

pub use error::{Error, Result};
