//! The commands.

#![forbid(unsafe_code)]

mod bench;
mod compute;
mod demo;
mod devices;
mod eval;
mod inference;
mod interrupt;
mod output;
#[cfg(feature = "cuda")]
mod plan;
mod predict;
mod progress;
mod summary;
mod train;

use clap::{Parser, Subcommand};
use output::note;
use std::process::ExitCode;

/// EfficientNetV2: train, evaluate, predict, measure.
#[derive(Debug, Parser)]
#[command(name = "effnetv2", version, max_term_width = 110)]
#[command(after_help = "Start here:  effnetv2 demo")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

// Each command is described where its flags are.
#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::Args),
    Train(Box<train::Args>),
    Eval(eval::Args),
    Predict(predict::Args),
    Summary(summary::Args),
    #[cfg(feature = "cuda")]
    Plan(plan::Args),
    Bench(bench::Args),
    /// Show the NVIDIA driver, the GPUs and the kernels built for them.
    Devices(devices::Args),
}

/// Runs the program with the arguments of the process.
pub fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(args) => demo::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Predict(args) => predict::run(&args),
        Command::Summary(args) => summary::run(&args),
        #[cfg(feature = "cuda")]
        Command::Plan(args) => plan::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Devices(args) => devices::run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if output::reader_has_gone(&error) => ExitCode::SUCCESS,
        Err(error) => {
            note!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
