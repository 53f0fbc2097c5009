//! `demo`: the whole of it in under a minute.

use super::train;
use crate::Result;
use crate::train::TrainConfig;
use std::path::PathBuf;

/// Trains `nano`, a toy EfficientNetV2 with Fused-MBConv, MBConv and squeeze-excitation, on 1,797 real handwritten digits
/// with progressive learning, and measures it on the fifth of them that it never sees.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The seed: the same one gives the same figures.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The folder of the run [default: runs/demo-N].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Threads; 0 for one per processor.
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

pub(super) fn run(args: &Args) -> Result<()> {
    super::limit_threads(args.threads)?;
    let mut config = TrainConfig::recipe("nano", "digits")?;
    config.seed = args.seed;
    let folder = train::start(config, args.out.as_deref(), "demo", None)?;
    println!(
        "next: look at {}, then try\n  effnetv2 eval {}\n  effnetv2 train --help",
        folder.file(crate::train::run::CURVES).display(),
        folder.path().display()
    );
    Ok(())
}
