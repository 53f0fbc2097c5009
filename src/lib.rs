//! EfficientNetV2 (Tan & Le, ICML 2021) with manual backprop.
//!
//! The crate holds every network of the family as data ([`model`]), the blocks with forward and backward written once
//! against a trait of fused operations ([`nn`], [`backend`]), a CPU implementation of that trait which is the oracle of
//! every kernel ([`mod@reference`]), datasets and augmentation ([`data`]), and the training recipe with progressive
//! learning ([`train`]).
//!
//! # Example
//!
//! One training step of a toy network on the CPU:
//!
//! ```
//! use effnetv2::backend::{Backend, Mode, StepKey, Variables};
//! use effnetv2::model::{Architecture, initial_values};
//! use effnetv2::nn::Network;
//! use effnetv2::reference::Reference;
//! use effnetv2::tensor::Shape;
//!
//! # fn main() -> effnetv2::Result<()> {
//! let network = Network::new(Architecture::find("nano")?.network(10));
//! let (params, stats) = initial_values::<f32>(network.layout(), 0);
//! let grads = vec![0.0; params.len()];
//! let mut vars = Variables { params, grads, stats };
//!
//! let mut cpu = Reference::new();
//! cpu.begin_step(&StepKey { seed: 0, epoch: 0, images: vec![0, 1] })?;
//! let images = cpu.tensor(Shape::new(2, 32, 32, 3), vec![0.5; 2 * 32 * 32 * 3])?;
//! let mut pass = network.forward(&mut cpu, images, &mut vars, Mode::Train, 0.2)?;
//! let loss = cpu.cross_entropy(&mut pass.head, &[0.1; 20])?;
//! network.backward(&mut cpu, pass, &mut vars)?;
//! assert!(loss.is_finite() && cpu.norm(&vars.grads)? > 0.0);
//! # Ok(())
//! # }
//! ```
//!
//! # Determinism
//!
//! Random numbers are a pure function of (seed, epoch, image, purpose) ([`random`]), work is cut by shape alone and partial
//! sums are added in a fixed order: the same run gives the same bits on any number of threads, interrupted or not.
//!
//! # Features
//!
//! - `cli` (default): the command-line program and its dependencies.
//! - `cuda` (default): NVIDIA GPUs. Needs neither a toolkit nor a driver to build: without nvcc no kernels are embedded, and
//!   without a driver opening a device is an error.
//! - `peers`: NVIDIA's cuBLASLt and cuDNN beside ours (`effnetv2 bench libraries`), opened when that is asked for.
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod backend;
pub mod bench;
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
#[cfg(feature = "peers")]
pub mod peers;
mod pool;
pub mod random;
pub mod reference;
pub mod report;
pub mod tensor;
pub mod train;

pub use error::{Error, Result};
