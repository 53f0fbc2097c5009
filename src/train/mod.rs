//! The training recipe: what a run is, how it goes, and how it goes on after an interruption.

#![forbid(unsafe_code)]

pub mod checkpoint;
pub mod config;
pub mod evaluate;
pub mod progressive;
pub mod run;
pub mod schedule;
mod trainer;

pub use config::TrainConfig;
pub use trainer::{Observer, Silent, Trainer, largest_batch};
