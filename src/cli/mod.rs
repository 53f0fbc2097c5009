//! The commands.

#![forbid(unsafe_code)]

mod bench;
mod demo;
mod devices;
mod eval;
mod inference;
mod interrupt;
mod output;
mod predict;
mod progress;
mod summary;
mod train;

use crate::{Error, Result};
use clap::{Parser, Subcommand};
use output::{note, say};
use std::process::ExitCode;

/// EfficientNetV2: train, evaluate, predict.
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
    Bench(bench::Args),
    /// Show the NVIDIA driver, the GPUs and the kernels built for them.
    Devices(devices::Args),
}

// No doc comment: clap would take it for the description of the whole command.
#[derive(Clone, Copy, Debug, clap::Args)]
struct Threads {
    /// Threads; 0 for one per processor.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024))]
    threads: u16,
}

impl Threads {
    /// Limits the threads of the whole process.
    fn limit(self) -> Result<()> {
        if self.threads > 0 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads.into());
            pool.build_global().map_err(|e| Error::usage("--threads", self.threads, e.to_string()))?;
        }
        Ok(())
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

/// Says what computes, as the first line of a command's output.
fn announce_device() -> Result<()> {
    say!("device: CPU reference, {} threads", rayon::current_num_threads())
}
