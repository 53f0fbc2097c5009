//! The family: architectures as data, scaling, counting, initial values, names and files of weights.

#![forbid(unsafe_code)]

mod architecture;
mod count;
mod dataflow;
mod init;
mod names;
pub mod weights;

pub use architecture::{Architecture, StageTemplate, WidthRounding};
pub use count::{LayerCount, StageCount, Summary, block_count, summarise};
pub use dataflow::{Dataflow, Traffic, traffic};
pub use init::initial_values;
pub use names::{Naming, torchvision_name};
