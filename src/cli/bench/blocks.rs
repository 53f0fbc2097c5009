//! `bench blocks`: each block shape, as Fused-MBConv and as MBConv.

use super::{Common, Job, Site, milliseconds, rate, table};
use crate::bench::blocks::{BlockResult, BlockShape, Place, Settings, crossovers, measure, shapes_of};
use crate::bench::{Bench, Measured};
use crate::cli::output::say;
use crate::cli::progress::bar;
use crate::nn::BlockKind;
use crate::report::bars::{Bars, Group};
use crate::report::table::{Column, si};
use crate::train::progressive::check_side;
use crate::{Error, Result};

/// Each block shape as Fused-MBConv and as MBConv, and where MBConv becomes the faster.
///
/// Every distinct shape of the networks, both forms of it forward and backward in training mode; MBConv with
/// squeeze-excitation, Fused-MBConv without, as the networks have them. Says the first shape at which MBConv is faster.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The networks whose shapes to measure [default: s,m,l, or none with --block].
    #[arg(long, value_delimiter = ',')]
    models: Option<Vec<String>>,
    /// A shape of your own: inputs,outputs,expansion,kernel,stride,side. May be given several times.
    #[arg(long, value_name = "SHAPE")]
    block: Vec<BlockShape>,
    /// Side of the networks' images in pixels [default: 96 on the CPU, on a GPU that of each network's training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    #[command(flatten)]
    pub(super) common: Common,
}

impl Args {
    fn places(&self, size: Option<usize>) -> Result<Vec<Place>> {
        let mut places = match (&self.models, self.block.is_empty()) {
            (Some(models), _) => shapes_of(models, size)?,
            (None, true) => shapes_of(&["s", "m", "l"].map(String::from), size)?,
            (None, false) => Vec::new(),
        };
        let given = |&shape| Place { model: "given".into(), stage: 0, count: 1, native: None, shape };
        places.extend(self.block.iter().map(given));
        Ok(places)
    }
}

impl Job for Args {
    fn check(&self) -> Result<()> {
        self.size.map_or(Ok(()), |size| check_side("--size", size))?;
        self.places(self.size).map(drop)
    }

    fn run<B: Measured>(&self, bench: &mut Bench<'_, B, B::Clock>, site: &Site) -> Result<()> {
        let size = self.size.or((!site.on_gpu).then_some(96));
        let places = self.places(size)?;
        let batch = self.common.batch(if site.on_gpu { 128 } else { 1 });
        let settings = Settings { batch, dtype: site.dtype, count_bytes: site.on_gpu, ceiling: site.ceiling };
        say!("batch {batch}, {}, {} rounds\n", site.dtype, bench.effort.rounds)?;
        let forms = [BlockKind::FusedMbConv, BlockKind::MbConv];
        let bar = bar(2 * places.len(), "blocks");
        let (mut results, mut missing) = (Vec::new(), Vec::new());
        for place in &places {
            for form in forms {
                match measure(bench, place, form, &settings) {
                    Ok(result) => results.push(result),
                    Err(Error::Shape { problem, .. }) => {
                        missing.push(format!("{} as {}: {problem}", place.shape, name(form)));
                    }
                    Err(error) => return Err(error),
                }
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        missing.iter().try_for_each(|text| say!("not on this device: {text}"))?;
        print(&results, site)?;
        for crossover in crossovers(&results) {
            say!("{crossover}")?;
        }
        let chart = chart(&results, site);
        site.leave(results, &chart)
    }
}

const fn name(form: BlockKind) -> &'static str {
    match form {
        BlockKind::FusedMbConv => "Fused-MBConv",
        BlockKind::MbConv => "MBConv",
    }
}

fn print(results: &[BlockResult], site: &Site) -> Result<()> {
    let mut columns = vec![
        Column::left("network"),
        Column::right("stage"),
        Column::left("block"),
        Column::left("form"),
        Column::right("forward ms"),
        Column::right("backward ms"),
        Column::right("spread"),
        Column::right("images/s"),
        Column::right("rate"),
    ];
    let row = |result: &BlockResult| {
        let place = &result.place;
        // The form that the network itself has is marked.
        let mark = if place.native == Some(result.form) { " *" } else { "" };
        let mut cells = vec![
            place.model.clone(),
            if place.stage == 0 { String::new() } else { place.stage.to_string() },
            place.shape.to_string(),
            format!("{}{mark}", name(result.form)),
            milliseconds(result.forward.median),
            milliseconds(result.backward.median),
            format!("{:.0} %", 100.0 * result.spread()),
            rate(result.images_per_second),
            si(result.operations_per_second, "FLOP/s"),
        ];
        if site.on_gpu {
            cells.push(result.bytes_per_second.map_or_else(String::new, |rate| si(rate, "B/s")));
            cells.push(result.of_floor.map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)));
        }
        cells
    };
    let rows = results.iter().map(row).collect();
    match site.on_gpu {
        true => {
            columns.extend([Column::right("memory"), Column::right("of floor")]);
            say!("{}", table::<11>(columns, rows)?)
        }
        false => say!("{}", table::<9>(columns, rows)?),
    }
}

fn chart(results: &[BlockResult], site: &Site) -> Bars {
    let forms = [BlockKind::FusedMbConv, BlockKind::MbConv];
    let group = |same: &[BlockResult]| {
        let time = |form| same.iter().find(|r| r.form == form).map(|r| r.milliseconds() / r.batch as f64);
        Group {
            label: format!("{} {}", same[0].place.model, same[0].place.shape),
            values: forms.map(time).to_vec(),
        }
    };
    Bars {
        title: site.title("Blocks"),
        x_label: "milliseconds an image, forward and backward".into(),
        series: forms.map(|form| name(form).into()).to_vec(),
        groups: results.chunk_by(|a, b| a.place == b.place).map(group).collect(),
    }
}
