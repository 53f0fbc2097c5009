//! The commands.

#![forbid(unsafe_code)]

mod demo;
mod devices;
mod eval;
mod interrupt;
mod predict;
mod progress;
mod summary;
mod train;

use crate::train::checkpoint::WeightSet;
use crate::train::config::SMALLEST_IMAGE;
use crate::{Error, Result};
use clap::{Parser, Subcommand, ValueEnum};
use std::process::ExitCode;

/// EfficientNetV2: train, evaluate, predict.
#[derive(Debug, Parser)]
#[command(name = "effnetv2", version, about, max_term_width = 110)]
#[command(after_help = "Start here:  effnetv2 demo")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a small network on embedded images of digits, in under a minute.
    Demo(demo::Args),
    /// Train a network.
    Train(Box<train::Args>),
    /// Evaluate a checkpoint: accuracy, loss, confusion matrix.
    Eval(eval::Args),
    /// Classify image files with a checkpoint.
    Predict(predict::Args),
    /// Print what an architecture consists of, stage by stage.
    Summary(summary::Args),
    /// Show the NVIDIA driver, the GPUs and the kernels built for them.
    Devices(devices::Args),
}

/// Which weights of a checkpoint to use.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Weights {
    /// The moving average: usually the better ones.
    #[default]
    Ema,
    /// The weights as they are trained.
    Raw,
}

impl From<Weights> for WeightSet {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Ema => Self::Ema,
            Weights::Raw => Self::Raw,
        }
    }
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Predict(args) => predict::run(&args),
        Command::Summary(args) => summary::run(&args),
        Command::Devices(args) => devices::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Says what computes, as the first line of a command's output.
fn announce_device() {
    println!("device: CPU reference, {} threads", rayon::current_num_threads());
}

/// Limits the threads of the whole process; 0 leaves one for each processor.
fn limit_threads(threads: usize) -> Result<()> {
    if threads > 0 {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build_global().map_err(|e| Error::usage("--threads", threads, e.to_string()))?;
    }
    Ok(())
}

/// The side of images for inference: the flag's or the default.
fn image_side(flag: Option<usize>, default: usize) -> Result<usize> {
    let side = flag.unwrap_or(default);
    if side < SMALLEST_IMAGE {
        let problem = format!("must be at least {SMALLEST_IMAGE}: the network halves it five times");
        return Err(Error::usage("--size", side, problem));
    }
    Ok(side)
}
