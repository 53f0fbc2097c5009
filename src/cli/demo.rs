//! `demo`: the whole of it in under a minute.

use super::compute::Compute;
use super::{output::say, train};
use crate::Result;
use crate::train::TrainConfig;
use crate::train::run::CURVES;
use std::path::PathBuf;

/// Train a small network on embedded images of digits, in under a minute.
///
/// Trains `nano`, a toy EfficientNetV2 with Fused-MBConv, MBConv and squeeze-excitation, on 1,797 real handwritten digits
/// with progressive learning, and measures it on the fifth of them that it never sees.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The seed: the same one gives the same figures.
    #[arg(long, default_value_t = 0, value_parser = train::seeds())]
    seed: u64,
    /// The folder of the run [default: runs/demo-N].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    compute: Compute,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut config = TrainConfig::recipe("nano", "digits")?;
    config.seed = args.seed;
    let start = train::Start::new(config, args.out.as_deref(), "demo");
    let folder = args.compute.run(None, false, start)?;
    say!("next: look at {}, then try", folder.file(CURVES).display())?;
    say!("  effnetv2 eval {}", folder.path().display())?;
    say!("  effnetv2 train --help")
}
