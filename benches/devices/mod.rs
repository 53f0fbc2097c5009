//! What the benchmarks of kernels share: the GPU, the bandwidth of a copy, inputs that no cache still holds, and a table
//! of what came out.
//!
//! Every case is recorded as a CUDA graph of several launches, each on a set of buffers of its own, so that the time
//! between two events on the GPU is that of the kernels and not of the CPU that asks for them. The sets together are
//! several times the L2 cache. GB/s are the least bytes of the launches ([`Work`]) over the time.
//!
//! Without a GPU a benchmark says so in one line and ends well. `EFFNETV2_BENCH_HOST=LIBRARY` goes through the same code on
//! the host device that `kernels/host/build.sh` built, at tiny sizes: it proves the benchmark and times nothing.

#![allow(dead_code, unused_imports, reason = "no benchmark needs all of it")]

mod layer;

pub(crate) use layer::{Layer, Vectors, gradient};

use criterion::{BenchmarkId, Criterion, Throughput};
use effnetv2::device::cudarc::driver::CudaSlice;
use effnetv2::device::cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
use effnetv2::device::{Device, Element, Graph};
use effnetv2::kernels::{Cost, Work};
use effnetv2::report::table::{Column, Table, percent, si};
use effnetv2::{Error, Result};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

/// The sets of a case take at least this many times the L2 cache.
const ROTATION: u64 = 4;
const COPY_BYTES: usize = 256 << 20;

/// The benchmarks of one family.
pub(crate) struct Bench {
    pub(crate) device: Device,
    family: &'static str,
    criterion: Option<Criterion>,
    cache: u64,
    rows: Vec<Row>,
}

struct Row {
    name: String,
    bytes: u64,
    /// Operations of matrix products.
    products: u64,
    /// Median of the samples, in seconds; none on the host device.
    time: Option<f64>,
}

/// What a graph of a case replays.
struct Case<S> {
    sets: Vec<S>,
    run: fn(&mut S) -> Result<()>,
}

impl<S> Case<S> {
    fn all(&mut self) -> Result<()> {
        self.sets.iter_mut().try_for_each(self.run)
    }
}

/// Runs the benchmarks of `family` if there is a device for them.
pub(crate) fn main(family: &'static str, benchmarks: fn(&mut Bench) -> Result<()>) -> ExitCode {
    let host = std::env::var_os("EFFNETV2_BENCH_HOST");
    let device = match &host {
        Some(library) => Device::host(Path::new(library)),
        None => Device::cuda(0),
    };
    let outcome = match device {
        Ok(device) => run(device, family, benchmarks),
        Err(
            reason @ (Error::NoDriver(_)
            | Error::NoGpu { .. }
            | Error::NoKernels { .. }
            | Error::OldDriver { .. }
            | Error::OldGpu { .. }),
        ) if host.is_none() => {
            println!("not run: the benchmarks of {family}: {reason}");
            Ok(())
        }
        Err(error) => Err(error),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{family}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(device: Device, family: &'static str, benchmarks: fn(&mut Bench) -> Result<()>) -> Result<()> {
    let criterion = (!device.is_host()).then(|| Criterion::default().configure_from_args());
    let cache = match device.is_host() {
        true => 0,
        false => device
            .context()
            .attribute(CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)
            .map_or(0, |bytes| u64::try_from(bytes).unwrap_or(0)),
    };
    let mut bench = Bench { device, family, criterion, cache, rows: Vec::new() };
    bench.copy()?;
    benchmarks(&mut bench)?;
    if let Some(criterion) = &mut bench.criterion {
        criterion.final_summary();
    }
    bench.print();
    Ok(())
}

impl Bench {
    /// `full` on a GPU, `tiny` on the host device.
    pub(crate) fn size<T>(&self, full: T, tiny: T) -> T {
        if self.device.is_host() { tiny } else { full }
    }

    /// Times one launch or several: `work` says what they are, `set` makes the buffers they use, `run` launches them on
    /// [`Device::compute`].
    pub(crate) fn case<S: 'static>(
        &mut self,
        shape: &str,
        work: &[Work],
        set: impl Fn(&Device) -> Result<S>,
        run: fn(&mut S) -> Result<()>,
    ) -> Result<()> {
        let names: Vec<&str> = work.iter().map(|work| work.kernel.as_str()).collect();
        let cost = work.iter().map(|work| work.cost).sum();
        self.add(format!("{} {shape}", names.join(" + ")), cost, set, run)
    }

    /// What the memory of this GPU can do: a copy from one place to another, which is read and written.
    fn copy(&mut self) -> Result<()> {
        struct Copy {
            device: Device,
            from: CudaSlice<u8>,
            to: CudaSlice<u8>,
        }
        let length = self.size(COPY_BYTES, 1 << 12);
        let set = |device: &Device| {
            Ok(Copy { device: device.clone(), from: device.zeros(length)?, to: device.zeros(length)? })
        };
        let copy = |set: &mut Copy| effnetv2::device::copy(set.device.compute(), &set.from, &mut set.to);
        self.add("copy".into(), Cost { bytes: 2 * length as u64, ..Cost::default() }, set, copy)
    }

    fn add<S: 'static>(
        &mut self,
        name: String,
        cost: Cost,
        set: impl Fn(&Device) -> Result<S>,
        run: fn(&mut S) -> Result<()>,
    ) -> Result<()> {
        let (bytes, products) = (cost.bytes, cost.tensor_operations);
        let count = (ROTATION * self.cache).div_ceil(bytes.max(1)).clamp(2, 1024);
        let sets = (0..count).map(|_| set(&self.device)).collect::<Result<_>>()?;
        let mut case = Case { sets, run };
        // Whatever is set up on first use cannot be recorded.
        case.all()?;
        let mut graph = Graph::record(&self.device, case, Case::all)?;
        let device = self.device.clone();
        // `iterations` launches or a few more, as many as whole graphs have.
        let mut time = |iterations: u64| {
            let replays = iterations.div_ceil(count);
            let elapsed = device.time(|| (0..replays).try_for_each(|_| graph.launch()))?;
            Ok::<_, Error>(elapsed.as_secs_f64() / (replays * count) as f64)
        };
        time(1)?;
        let Some(criterion) = &mut self.criterion else {
            self.rows.push(Row { name, bytes, products, time: None });
            return Ok(());
        };
        let (mut samples, mut failure) = (Vec::new(), None);
        let mut group = criterion.benchmark_group(self.family);
        group.throughput(Throughput::Bytes(bytes));
        group.bench_function(BenchmarkId::from_parameter(&name), |bencher| {
            bencher.iter_custom(|iterations| {
                let seconds = time(iterations).unwrap_or_else(|error| {
                    failure = Some(error);
                    1.0
                });
                samples.push(seconds);
                Duration::from_secs_f64(seconds * iterations as f64)
            });
        });
        group.finish();
        if let Some(failure) = failure {
            return Err(failure);
        }
        samples.sort_by(f64::total_cmp);
        // None where the command line leaves the case out.
        if let Some(&median) = samples.get(samples.len() / 2) {
            self.rows.push(Row { name, bytes, products, time: Some(median) });
        }
        Ok(())
    }

    fn print(&self) {
        let Self { device, family, rows, .. } = self;
        if device.is_host() {
            let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
            println!(
                "host device: the benchmarks of {family} went through their code at tiny sizes, untimed: {}",
                names.join(", ")
            );
            return;
        }
        let rate = |row: &Row| row.time.map(|time| row.bytes as f64 / time);
        let copy = rows.iter().find(|row| row.name == "copy").and_then(rate);
        let mut table = Table::new([
            Column::left(format!("{family} on {}", device.gpu().name)),
            Column::right("least bytes"),
            Column::right("time"),
            Column::right("bandwidth"),
            Column::right("of a copy's"),
            Column::right("products"),
        ]);
        for row in rows {
            let (Some(time), Some(rate)) = (row.time, rate(row)) else { continue };
            table.row([
                row.name.clone(),
                si(row.bytes as f64, "B"),
                si(time, "s"),
                format!("{:.0} GB/s", rate / 1e9),
                copy.map_or_else(|| "not measured".into(), |copy| percent(rate / copy)),
                match row.products {
                    0 => String::new(),
                    products => format!("{:.1} TFLOP/s", products as f64 / time / 1e12),
                },
            ]);
        }
        println!("\n{table}");
    }
}

/// A buffer of `length` numbers from −1 to 1, the same every time.
pub(crate) fn numbers<T: Element>(
    device: &Device,
    length: usize,
    from: fn(f32) -> T,
) -> Result<CudaSlice<T>> {
    // A short pattern is enough: memory does not look at what it moves, and values stay in range.
    let pattern: Vec<T> = (0..4096).map(|i| from((i as f32 * 0.618_034).fract() * 2.0 - 1.0)).collect();
    device.upload(&pattern.iter().copied().cycle().take(length).collect::<Vec<_>>())
}
