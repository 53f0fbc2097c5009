//! `bench ops`: the operations of a training step.

use super::{Common, Job, Site, milliseconds, spread, table};
use crate::Result;
use crate::bench::operations::{OperationResult, run};
use crate::bench::{Bench, Measured};
use crate::cli::output::say;
use crate::model::Architecture;
use crate::report::bars::{Bars, Group};
use crate::report::table::{Column, si};
use crate::train::progressive::check_side;

/// Where the time of a training step goes: every operation on every shape of a network, the costliest first.
///
/// Each is timed within whole steps, one a round, so that its input is as cold as in training. Its time includes that of
/// starting it.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The network: one of those that `summary` knows.
    #[arg(long, default_value = "s")]
    model: String,
    /// Side of the images in pixels [default: 128 on the CPU, on a GPU that of the network's training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// Rows of the table and the chart; the JSON has all.
    #[arg(long, default_value_t = 30)]
    top: usize,
    #[command(flatten)]
    pub(super) common: Common,
}

impl Job for Args {
    fn check(&self) -> Result<()> {
        Architecture::find(&self.model)?;
        self.size.map_or(Ok(()), |size| check_side("--size", size))
    }

    fn run<B: Measured>(&self, bench: &mut Bench<'_, B, B::Clock>, site: &Site) -> Result<()> {
        let architecture = Architecture::find(&self.model)?;
        let size = self.size.unwrap_or(if site.on_gpu { architecture.train_size } else { 128 });
        let batch = self.common.batch(if site.on_gpu { 256 } else { 8 });
        let name = &architecture.name;
        let rounds = bench.effort.rounds;
        say!("{name}, {size} px, batch {batch}, {}, {rounds} training steps\n", site.dtype)?;
        let network = architecture.network(1000);
        let settings = site.settings(network, size, batch);
        let results = run(bench, &settings)?;
        let shown = &results[..self.top.min(results.len())];
        print(shown, site)?;
        let rest: f64 = results[shown.len()..].iter().map(|result| result.share).sum();
        if shown.len() < results.len() {
            let more = results.len() - shown.len();
            say!("and {more} more with {:.1} % of the time; --top shows more", 100.0 * rest)?;
        }
        let total: f64 = results.iter().map(|r| r.time.median * r.calls as f64).sum();
        say!("{} ms a step in all", milliseconds(total))?;
        let chart = chart(shown, site, name);
        site.leave(results, &chart)
    }
}

fn print(results: &[OperationResult], site: &Site) -> Result<()> {
    let mut columns = vec![
        Column::left("operation"),
        Column::left("layer"),
        Column::right("input"),
        Column::right("calls"),
        Column::right("ms a call"),
        Column::right("spread"),
        Column::right("share"),
        Column::right("rate"),
    ];
    let row = |result: &OperationResult| {
        let [n, h, w, c] = result.input;
        let is_tensor = [n, h, w, c] != [1; 4];
        let mut cells = vec![
            result.operation.clone(),
            result.layer.clone(),
            if is_tensor { format!("{n}×{h}×{w}×{c}") } else { String::new() },
            result.calls.to_string(),
            milliseconds(result.time.median),
            spread(&result.time),
            format!("{:.1} %", 100.0 * result.share),
            result.operations_per_second.map_or_else(String::new, |rate| si(rate, "FLOP/s")),
        ];
        if site.on_gpu {
            cells.push(result.bytes_per_second.map_or_else(String::new, |rate| si(rate, "B/s")));
            cells.push(result.of_floor.map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)));
            cells.push(result.over_floor().map_or_else(String::new, milliseconds));
        }
        cells
    };
    let rows = results.iter().map(row).collect();
    match site.on_gpu {
        true => {
            columns.extend(["memory", "of floor", "ms over it"].map(Column::right));
            say!("{}", table::<11>(columns, rows)?)
        }
        false => say!("{}", table::<8>(columns, rows)?),
    }
}

fn chart(results: &[OperationResult], site: &Site, name: &str) -> Bars {
    let group = |result: &OperationResult| Group {
        label: format!("{} {} @{}", result.operation, result.layer, result.input[1]),
        values: vec![Some(result.calls as f64 * result.time.median)],
    };
    Bars {
        title: site.title(&format!("A training step of {name}")),
        x_label: "milliseconds of a step".into(),
        series: vec!["all calls".into()],
        groups: results.iter().map(group).collect(),
    }
}
