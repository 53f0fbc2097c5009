//! `devices`: what there is to compute on, and what was built for it.

use std::path::PathBuf;

/// Shows the NVIDIA driver, the GPUs, and how the kernels fit them: which image each GPU runs, and the registers, shared
/// memory and occupancy of each kernel.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Look at the host device instead: the library that kernels/host/build.sh made.
    #[arg(long, value_name = "LIBRARY")]
    host: Option<PathBuf>,
}

#[cfg(not(feature = "cuda"))]
pub(super) fn run(args: &Args) -> crate::Result<()> {
    if let Some(library) = &args.host {
        let problem = "this program was built without the feature `cuda`, which the host device needs";
        return Err(crate::Error::usage("--host", library.display(), problem));
    }
    super::output::say!("GPUs: none, this program was built without the feature `cuda`")
}

#[cfg(feature = "cuda")]
pub(super) use gpu::run;

#[cfg(feature = "cuda")]
mod gpu {
    use super::Args;
    use crate::cli::output::say;
    use crate::device::{Device, Gpu, Image, Kernel, embedded_images, survey, toolkit};
    use crate::kernels::FAMILIES;
    use crate::report::table::{Column, Table};
    use crate::{Error, Result};
    use std::path::Path;

    pub(in crate::cli) fn run(args: &Args) -> Result<()> {
        say!("kernels: {}", built())?;
        let host = args.host.as_deref();
        let found = match survey(host) {
            // The CPU is there, so this is an answer and no failure.
            Err(error @ Error::NoDriver(_)) if host.is_none() => {
                say!("driver: {error}")?;
                return Ok(());
            }
            found => found?,
        };
        say!("driver: CUDA {}.{}", found.driver.0, found.driver.1)?;
        if found.gpus.is_empty() {
            say!("GPUs: none that the driver shows to this process")?;
        }
        for gpu in &found.gpus {
            say!("\n{}", describe(gpu, host.is_some()))?;
            match kernels(gpu, host) {
                Ok(table) => say!("\n{table}")?,
                // One GPU that cannot be used must not hide the next.
                Err(error) => say!("  not usable: {error}")?,
            }
        }
        Ok(())
    }

    fn built() -> String {
        let Some((major, minor)) = toolkit() else {
            return "none, there was no nvcc when this program was built".into();
        };
        let images: Vec<String> = embedded_images().iter().map(ToString::to_string).collect();
        format!("for {}, by CUDA {major}.{minor}", images.join(", "))
    }

    fn describe(gpu: &Gpu, is_host: bool) -> String {
        let (major, minor) = gpu.capability;
        let runs = match Image::best(&embedded_images(), gpu.capability) {
            _ if is_host => "runs kernels compiled for the CPU".into(),
            Some(image) if image.ptx => format!("runs {image}, compiled by the driver when it is first used"),
            Some(image) => format!("runs {image}"),
            None => "runs none of the images".into(),
        };
        format!(
            "GPU {}: {}, compute capability {major}.{minor}, {:.1} GiB, {} multiprocessors; {runs}",
            gpu.ordinal,
            gpu.name,
            gpu.memory as f64 / f64::from(1 << 30),
            gpu.multiprocessors
        )
    }

    /// Every kernel on this GPU. Spilled registers show as local memory, in bytes a thread.
    fn kernels(gpu: &Gpu, host: Option<&Path>) -> Result<Table<6>> {
        let device = host.map_or_else(|| Device::cuda(gpu.ordinal), Device::host)?;
        let mut table = Table::new([
            Column::left("kernel"),
            Column::right("threads"),
            Column::right("registers"),
            Column::right("shared"),
            Column::right("local"),
            Column::right("occupancy"),
        ]);
        for family in FAMILIES {
            for kernel in device.module(family)?.kernels() {
                table.row(row(gpu, kernel)?);
            }
        }
        Ok(table)
    }

    fn row(gpu: &Gpu, kernel: &Kernel) -> Result<[String; 6]> {
        let (entry, resources) = (kernel.entry(), kernel.resources()?);
        let resident = f64::from(resources.blocks * entry.threads);
        let occupancy = 100.0 * resident / f64::from(gpu.threads_per_multiprocessor.max(1));
        Ok([
            entry.name.into(),
            entry.threads.to_string(),
            resources.registers.to_string(),
            format!("{} B", resources.shared),
            format!("{} B", resources.local),
            format!("{occupancy:.0} %"),
        ])
    }
}
