//! `summary`: an architecture, stage by stage.

use super::output::say;
use crate::Result;
use crate::model::{Architecture, StageCount, summarise};
use crate::nn::BlockKind;
use crate::report::table::{Column, Table, thousands};
use crate::train::progressive::check_side;

/// Print what an architecture consists of, stage by stage.
///
/// Block, kernel, stride, expansion, squeeze-excitation, channels, repeats, output side, parameters, multiply-adds
/// (convolutions and classifier) and elements of convolution outputs, for one image.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// b0 to b3, s, m, l, xl, v1-b0 to v1-b7, nano; timm's and torchvision's names work too.
    model: String,
    /// Side of the image in pixels [default: that of the model's evaluation].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Number of classes.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    classes: u32,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let architecture = Architecture::find(&args.model)?;
    let size = args.size.unwrap_or(architecture.eval_size);
    check_side("--size", size)?;
    let summary = summarise(&architecture.network(args.classes as usize), size);
    say!("{}, {size} × {size} pixels, {} classes\n", architecture.name, args.classes)?;
    let mut table = Table::new([
        Column::left("stage"),
        Column::left("block"),
        Column::right("kernel"),
        Column::right("stride"),
        Column::right("expansion"),
        Column::right("SE"),
        Column::right("channels"),
        Column::right("repeats"),
        Column::right("output"),
        Column::right("parameters"),
        Column::right("MACs"),
        Column::right("activations"),
    ]);
    summary.stages.iter().for_each(|stage| {
        table.row(row(stage));
    });
    let total = &summary.total;
    let blank = String::new;
    table.totals([
        "total".into(),
        blank(),
        blank(),
        blank(),
        blank(),
        blank(),
        blank(),
        blank(),
        blank(),
        thousands(total.parameters as u64),
        thousands(total.macs as u64),
        thousands(total.activations as u64),
    ]);
    say!("{table}")?;
    say!(
        "{} batch norms with {} running statistics; trained at {} px, evaluated at {} px",
        total.batch_norms,
        thousands(total.statistics as u64),
        architecture.train_size,
        architecture.eval_size
    )
}

fn row(stage: &StageCount) -> [String; 12] {
    let first = stage.first.as_ref();
    let (block, kernel, stride) = match (first, stage.name.as_str()) {
        (Some(block), _) => (kind(block.kind), block.kernel, block.stride),
        (None, "stem") => ("Conv", 3, 2),
        (None, _) => ("Conv, pool, FC", 1, 1),
    };
    [
        stage.name.clone(),
        block.into(),
        format!("{kernel}×{kernel}"),
        stride.to_string(),
        first.map_or_else(String::new, |b| b.expansion.to_string()),
        first.and_then(|b| b.squeeze).map_or_else(String::new, |s| s.to_string()),
        format!("{}→{}", stage.inputs, stage.outputs),
        stage.repeats.to_string(),
        format!("{0}×{0}", stage.side),
        thousands(stage.count.parameters as u64),
        thousands(stage.count.macs as u64),
        thousands(stage.count.activations as u64),
    ]
}

const fn kind(kind: BlockKind) -> &'static str {
    match kind {
        BlockKind::FusedMbConv => "Fused-MBConv",
        BlockKind::MbConv => "MBConv",
    }
}
