//! `plan`: what a training step launches, moves and takes, without a GPU.

use super::compute::DtypeName;
use super::output::say;
use crate::backend::PassKind;
use crate::kernels::fused::{Footprint, Planner};
use crate::kernels::tuning::Tuning;
use crate::kernels::{Cost, Work};
use crate::model::{Architecture, Dataflow, traffic};
use crate::nn::Network;
use crate::optimizer::Rule;
use crate::report::table::{Column, Table, bytes, percent, si, thousands};
use crate::tensor::Dtype;
use crate::train::progressive::check_side;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// List every launch of a training step with the least time it can take; no GPU is needed.
///
/// The step is one of the paper's RMSProp with stochastic depth, dropout and a moving average. Bytes are those of each tensor
/// of a launch, once. The floor of a launch is the longest of three times: its bytes at the bandwidth, its matrix products at
/// the rate of the tensor cores, and its other operations at the rate of the rest.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// b0 to b3, s, m, l, xl, v1-b0 to v1-b7, nano; timm's and torchvision's names work too.
    model: String,
    /// Images of a batch.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    batch: u32,
    /// Side of the image in pixels [default: that of the model's training].
    #[arg(long, value_name = "PIXELS")]
    size: Option<usize>,
    /// The type of activations.
    #[arg(long, default_value = "bf16")]
    dtype: DtypeName,
    /// Number of classes.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    classes: u32,
    /// What device memory can move, in TB/s; the default is what a copy reaches on an H200.
    #[arg(long, value_name = "TB/S", default_value_t = 4.3, value_parser = positive)]
    bandwidth: f64,
    /// What tensor cores can do in the instructions of these kernels in f16, in TFLOP/s; the default is for an H200.
    #[arg(long, value_name = "TFLOP/S", default_value_t = 490.0, value_parser = positive)]
    tensor: f64,
    /// What everything else can do in f32, in TFLOP/s; the default is for an H200.
    #[arg(long, value_name = "TFLOP/S", default_value_t = 55.0, value_parser = positive)]
    vector: f64,
    /// Launches as this file says, which `bench tune` wrote, whatever GPU it was measured on.
    #[arg(long, value_name = "FILE")]
    tuning: Option<PathBuf>,
    /// Leave out the launches and print what they come to.
    #[arg(long)]
    totals: bool,
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if value > 0.0 && value < 1e9 => Ok(value),
        _ => Err("expected a positive number".into()),
    }
}

/// What a device can do in a second.
#[derive(Clone, Copy, Debug)]
struct Ceilings {
    bytes: f64,
    tensor_operations: f64,
    operations: f64,
}

impl Ceilings {
    fn of(args: &Args) -> Self {
        // In f32 there are no tensor cores, and tf32 is twice as wide as f16.
        let tensor = match args.dtype {
            DtypeName::F32 => args.vector,
            DtypeName::Tf32 => args.tensor / 2.0,
            DtypeName::F16 | DtypeName::Bf16 => args.tensor,
        };
        Self {
            bytes: args.bandwidth * 1e12,
            tensor_operations: tensor * 1e12,
            operations: args.vector * 1e12,
        }
    }

    /// The least seconds, and what takes them.
    fn floor(&self, cost: &Cost) -> (f64, &'static str) {
        let times = [
            (cost.bytes as f64 / self.bytes, "memory"),
            (cost.tensor_operations as f64 / self.tensor_operations, "products"),
            (cost.operations as f64 / self.operations, "operations"),
        ];
        times.into_iter().fold((0.0, "launch"), |a, b| if b.0 > a.0 { b } else { a })
    }

    fn sum<'a>(&self, launches: impl IntoIterator<Item = &'a Work>) -> f64 {
        launches.into_iter().map(|work| self.floor(&work.cost).0).sum()
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    let architecture = Architecture::find(&args.model)?;
    let size = args.size.unwrap_or(architecture.train_size);
    check_side("--size", size)?;
    let (images, classes, dtype) = (args.batch as usize, args.classes as usize, Dtype::from(args.dtype));
    let network = Network::new(architecture.network(classes));
    let mut planner = Planner::new(dtype);
    if let Some(path) = &args.tuning {
        let tuning = Tuning::read(path)?;
        say!("{} launches tuned for {} by {}", tuning.launches.len(), tuning.gpu, path.display())?;
        planner = planner.tuned(tuning);
    }
    let kind = PassKind { images, side: size, dropout: architecture.dropout, first: true, last: true };
    network.rehearse_training(&mut planner, kind, Rule::PAPER).map_err(|error| match error {
        Error::Shape { problem, .. } => Error::usage("--batch", images, problem),
        error => error,
    })?;
    let launches: Vec<Work> = planner.draw().into_iter().chain(planner.launches().iter().cloned()).collect();
    let ceilings = Ceilings::of(args);
    say!(
        "{}, {size} × {size} pixels, {classes} classes, batch {images}, {}; floors at {} TB/s, {} TFLOP/s of matrix products \
         and {} TFLOP/s of the rest\n",
        architecture.name,
        dtype,
        args.bandwidth,
        ceilings.tensor_operations / 1e12,
        args.vector
    )?;
    if !args.totals {
        say!("{}", list(&launches, &ceilings))?;
    }
    say!("{}", by_kernel(&launches, &ceilings))?;
    let flows = Dataflow::ALL.map(|flow| (flow, traffic(network.spec(), size, dtype.bytes(), flow)));
    let mut table = Table::new([
        Column::left("for each image"),
        Column::right("moved"),
        Column::right("kept or in use"),
        Column::right("this step moves"),
    ]);
    let footprint = planner.footprint();
    let each = |bytes: u64| bytes as f64 / images as f64;
    let total: Cost = launches.iter().map(|work| work.cost).sum();
    for (flow, traffic) in flows {
        table.row([
            flow.name().into(),
            si(traffic.moved as f64, "B"),
            si(traffic.kept as f64, "B"),
            percent(each(total.bytes) / traffic.moved as f64),
        ]);
    }
    let (moved, arena) = (each(total.bytes), each(footprint.arena as u64));
    table.totals(["this step".into(), si(moved, "B"), si(arena, "B"), String::new()]);
    say!("{table}")?;
    let floor = ceilings.sum(&launches);
    say!(
        "floor: {} a step, {} an image, {} images/s",
        si(floor, "s"),
        si(floor / images as f64, "s"),
        thousands((images as f64 / floor) as u64)
    )?;
    memory(footprint)
}

fn memory(footprint: Footprint) -> Result<()> {
    let Footprint { arena, workspace, feeds, buffers } = footprint;
    let size = |count: usize| bytes(count as u64);
    say!(
        "memory: {} at most: activations and their gradients {}, partial sums {}, images and copies of the weights {}, \
         weights, gradients and the optimizer's {}",
        size(footprint.passes() + buffers),
        size(arena),
        size(workspace * size_of::<f32>()),
        size(feeds),
        size(buffers)
    )
}

fn list(launches: &[Work], ceilings: &Ceilings) -> Table<9> {
    let mut table = Table::new([
        Column::right("launch"),
        Column::left("kernel"),
        Column::right("grid"),
        Column::right("shared"),
        Column::right("bytes"),
        Column::right("products"),
        Column::right("operations"),
        Column::right("floor"),
        Column::left("bound by"),
    ]);
    for (i, work) in launches.iter().enumerate() {
        let Work { kernel, grid: [x, y, z], shared, cost } = work;
        let (floor, bound) = ceilings.floor(cost);
        table.row([
            (i + 1).to_string(),
            kernel.clone(),
            format!("{x}×{y}×{z}"),
            bytes((*shared).into()),
            si(cost.bytes as f64, "B"),
            si(cost.tensor_operations as f64, "FLOP"),
            si(cost.operations as f64, "FLOP"),
            si(floor, "s"),
            bound.into(),
        ]);
    }
    table
}

/// The launches of each kernel together, those that take longest first.
fn by_kernel(launches: &[Work], ceilings: &Ceilings) -> Table<6> {
    let mut kernels = BTreeMap::<&str, Vec<&Work>>::new();
    for work in launches {
        kernels.entry(&work.kernel).or_default().push(work);
    }
    let floor = ceilings.sum(launches);
    let row = |name: &str, works: &[&Work]| {
        let cost: Cost = works.iter().map(|work| work.cost).sum();
        let time = ceilings.sum(works.iter().copied());
        let share = percent(time / floor);
        let cells = [
            name.into(),
            works.len().to_string(),
            si(cost.bytes as f64, "B"),
            si((cost.tensor_operations + cost.operations) as f64, "FLOP"),
            si(time, "s"),
            share,
        ];
        (time, cells)
    };
    let mut rows: Vec<_> = kernels.iter().map(|(name, works)| row(name, works)).collect();
    rows.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    let mut table = Table::new([
        Column::left("kernel"),
        Column::right("launches"),
        Column::right("bytes"),
        Column::right("operations"),
        Column::right("floor"),
        Column::right("share"),
    ]);
    for (_, cells) in rows {
        table.row(cells);
    }
    table.totals(row("all", &launches.iter().collect::<Vec<_>>()).1);
    table
}
