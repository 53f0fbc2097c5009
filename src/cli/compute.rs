//! What a command computes on: the flags, the device they lead to, and the line that says so.

use super::output::say;
use crate::bench::Measured;
use crate::reference::Reference;
use crate::tensor::Dtype;
use crate::{Error, Result};
use clap::ValueEnum;
use std::path::PathBuf;
use std::str::FromStr;

// No doc comment: clap would take it for the description of the whole command.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Compute {
    /// What computes: `cuda` or `cuda:N` (an NVIDIA GPU), `cpu`, `host` or `host=LIBRARY` (the GPU's kernels run on the CPU,
    /// to check them), or `auto`: the GPU if there is one that can be used, else the CPU.
    #[arg(long, value_name = "DEVICE", default_value = "auto", help_heading = HEADING)]
    device: DeviceName,
    /// The type of activations and of the weights that convolutions read; sums, weights and optimizer are f32 always.
    /// tf32 is f32 whose matrix products round their factors to 11 bits, for the tensor cores
    /// [default: that of the checkpoint, else bf16 on a GPU and f32 on the CPU, which computes in no other].
    #[arg(long, help_heading = HEADING)]
    dtype: Option<DtypeName>,
    /// Record training passes as CUDA graphs; it changes no bit of the result.
    #[arg(long, default_value = "on", help_heading = HEADING)]
    graph: Switch,
    /// Set up a kernel's blocks while the last ones of the kernel before still run (programmatic dependent launch; a GPU of
    /// compute capability 9.0 or later); it changes no bit of the result.
    #[arg(long, default_value = "off", help_heading = HEADING)]
    overlap: Switch,
    /// Launch convolutions as this file says, which `bench tune` wrote for this GPU: faster, and other in the last bits than
    /// by the rules, which are the same on every GPU [default: none, the rules].
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    tuning: Option<PathBuf>,
    /// Threads; 0 for one per processor.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1024), help_heading = HEADING)]
    threads: u16,
}

const HEADING: &str = "Computing";

/// A device as `--device` names it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum DeviceName {
    Auto,
    Cpu,
    Cuda(usize),
    Host(Option<PathBuf>),
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once([':', '=']) {
            None if text == "auto" => Ok(Self::Auto),
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(0)),
            None if text == "host" => Ok(Self::Host(None)),
            Some(("cuda", number)) => {
                number.parse().map(Self::Cuda).map_err(|_| format!("`{number}` is no number of a GPU"))
            }
            Some(("host", path)) if !path.is_empty() => Ok(Self::Host(Some(path.into()))),
            _ => Err("expected auto, cuda, cuda:N, cpu, host or host=LIBRARY".into()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum DtypeName {
    F32,
    Tf32,
    F16,
    Bf16,
}

impl From<DtypeName> for Dtype {
    fn from(name: DtypeName) -> Self {
        match name {
            DtypeName::F32 => Self::F32,
            DtypeName::Tf32 => Self::Tf32,
            DtypeName::F16 => Self::F16,
            DtypeName::Bf16 => Self::Bf16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// Work that is the same on every backend.
pub(super) trait Work {
    /// What it comes to.
    type Output;

    /// Does it.
    fn on<B: Measured>(self, backend: B) -> Result<Self::Output>;
}

impl Compute {
    /// Opens the device, says so in a line of output unless `quiet`, and does `work` on it. `dtype` is that of the
    /// checkpoint that is gone on from.
    ///
    /// # Errors
    /// A device that cannot be used, those of `work`.
    pub(super) fn run<W: Work>(&self, dtype: Option<Dtype>, quiet: bool, work: W) -> Result<W::Output> {
        self.limit_threads()?;
        let announce = |device: &str, dtype: Dtype, why: &str| {
            if quiet { Ok(()) } else { say!("device: {device}, {dtype}; {why}") }
        };
        let cpu = |why: &str, asked: bool| {
            if let Some(path) = &self.tuning {
                let problem = "the CPU reference launches no kernels that could be tuned; leave --tuning out";
                return Err(Error::usage("--tuning", path.display(), problem));
            }
            if self.overlap == Switch::On {
                let problem = "the CPU reference launches no kernels that could overlap; leave --overlap out";
                return Err(Error::usage("--overlap", "on", problem));
            }
            match self.dtype.map(Dtype::from) {
                Some(dtype) if dtype != Dtype::F32 => {
                    let problem =
                        "the CPU computes in f32 alone; leave --dtype out, or name a GPU by --device";
                    return Err(Error::usage("--dtype", dtype, problem));
                }
                _ => {}
            }
            let threads = rayon::current_num_threads();
            let why = if asked { why.to_owned() } else { format!("no GPU can be used: {why}") };
            announce(&format!("CPU reference, {threads} threads"), Dtype::F32, &why)
        };
        let wanted = self.dtype.map(Dtype::from).or(dtype);
        match &self.device {
            DeviceName::Cpu => {
                cpu("--device cpu", true)?;
                work.on(Reference::<f32>::new())
            }
            #[cfg(feature = "cuda")]
            device => gpu::run(self, device, wanted, announce, cpu, work),
            #[cfg(not(feature = "cuda"))]
            DeviceName::Auto => {
                let _ = wanted;
                cpu("this program was built without the feature `cuda`", false)?;
                work.on(Reference::<f32>::new())
            }
            #[cfg(not(feature = "cuda"))]
            DeviceName::Cuda(_) | DeviceName::Host(_) => {
                let problem = "this program was built without the feature `cuda`; use --device cpu";
                Err(Error::usage("--device", format!("{:?}", self.device).to_lowercase(), problem))
            }
        }
    }

    /// Opens a device that runs kernels, for work on those alone, and says so in a line of output; with the element type
    /// of tensors.
    ///
    /// # Errors
    /// A device that cannot be used; the CPU, which runs no kernels.
    #[cfg(feature = "cuda")]
    pub(super) fn device(&self) -> Result<(crate::device::Device, Dtype)> {
        self.limit_threads()?;
        if let Some(path) = &self.tuning {
            let problem = "this measures launches by the rules; leave --tuning out";
            return Err(Error::usage("--tuning", path.display(), problem));
        }
        if self.overlap == Switch::On {
            let problem = "this measures each launch on its own; leave --overlap out";
            return Err(Error::usage("--overlap", "on", problem));
        }
        let (device, why) = match gpu::open(&self.device)? {
            Some(opened) => opened,
            None => {
                let problem = "the CPU reference runs no kernels; name a GPU, or the host device, to go through the code";
                return Err(Error::usage("--device", "cpu", problem));
            }
        };
        let dtype = self.dtype.map_or(Dtype::Bf16, Dtype::from);
        say!("device: {}, {dtype}; {why}", gpu::name(&device))?;
        Ok((device, dtype))
    }

    /// Limits the threads of the whole process.
    fn limit_threads(&self) -> Result<()> {
        if self.threads > 0 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(self.threads.into());
            pool.build_global().map_err(|e| Error::usage("--threads", self.threads, e.to_string()))?;
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
mod gpu {
    use super::{Compute, DeviceName, Switch, Work};
    use crate::device::Device;
    use crate::kernels::FAMILIES;
    use crate::kernels::fused::Accelerated;
    use crate::kernels::tuning::Tuning;
    use crate::reference::Reference;
    use crate::tensor::Dtype;
    use crate::{Error, Result};
    use half::{bf16, f16};
    use std::path::{Path, PathBuf};

    const HOST_DEVICE: &str = "EFFNETV2_HOST_DEVICE";

    pub(super) fn run<W: Work>(
        flags: &Compute,
        device: &DeviceName,
        dtype: Option<Dtype>,
        announce: impl Fn(&str, Dtype, &str) -> Result<()>,
        cpu: impl Fn(&str, bool) -> Result<()>,
        work: W,
    ) -> Result<W::Output> {
        let (device, why) = match open(device) {
            Ok(Some(opened)) => opened,
            Ok(None) => {
                cpu("--device cpu", true)?;
                return work.on(Reference::<f32>::new());
            }
            Err(error) if *device == DeviceName::Auto => {
                cpu(&error.to_string(), false)?;
                return work.on(Reference::<f32>::new());
            }
            Err(error) => return Err(error),
        };
        let dtype = dtype.unwrap_or(Dtype::Bf16);
        let tuning = flags.tuning.as_deref().map(Tuning::read).transpose()?;
        let mut why = why.to_owned();
        if let (Some(tuning), Some(path)) = (&tuning, &flags.tuning) {
            tuning.check(&device, path)?;
            let (count, path) = (tuning.launches.len(), path.display());
            why += &format!("; {count} launches tuned by {path}, so the last bits are its own");
        }
        if flags.overlap == Switch::On {
            device.set_overlapping(true).map_err(|e| Error::usage("--overlap", "on", e.to_string()))?;
            why += "; kernels overlap";
        }
        announce(&name(&device), dtype, &why)?;
        let graphs = flags.graph == Switch::On;
        match dtype {
            Dtype::F32 => work.on(Accelerated::<f32>::new(&device, graphs)?.tuned(tuning)),
            Dtype::Tf32 => work.on(Accelerated::in_tf32(&device, graphs)?.tuned(tuning)),
            Dtype::F16 => work.on(Accelerated::<f16>::new(&device, graphs)?.tuned(tuning)),
            Dtype::Bf16 => work.on(Accelerated::<bf16>::new(&device, graphs)?.tuned(tuning)),
        }
    }

    /// The device of that name and why it is that; none for the CPU.
    pub(super) fn open(name: &DeviceName) -> Result<Option<(Device, &'static str)>> {
        Ok(Some(match name {
            DeviceName::Auto => (usable(0)?, "found by --device auto"),
            DeviceName::Cuda(ordinal) => (usable(*ordinal)?, "--device cuda"),
            DeviceName::Host(path) => (host(path.as_deref())?, "--device host"),
            DeviceName::Cpu => return Ok(None),
        }))
    }

    /// In words.
    pub(super) fn name(device: &Device) -> String {
        let gpu = device.gpu();
        match device.is_host() {
            true => "host device, the GPU's kernels on the CPU".to_owned(),
            false => format!("GPU {} ({})", gpu.ordinal, gpu.name),
        }
    }

    /// A GPU whose kernels can all be loaded.
    fn usable(ordinal: usize) -> Result<Device> {
        let device = Device::cuda(ordinal)?;
        FAMILIES.iter().try_for_each(|family| device.module(family).map(drop))?;
        Ok(device)
    }

    /// The host device at `path`, or where the environment says.
    fn host(path: Option<&Path>) -> Result<Device> {
        let named = path.map(Path::to_owned).or_else(|| std::env::var_os(HOST_DEVICE).map(PathBuf::from));
        let Some(path) = named else {
            let problem = format!(
                "no library is named: build one by kernels/host/build.sh, which prints its path, and give that as \
                 --device host=PATH or in {HOST_DEVICE}"
            );
            return Err(Error::usage("--device", "host", problem));
        };
        if !path.exists() {
            return Err(Error::file(
                &path,
                "does not exist; kernels/host/build.sh builds it and prints its path",
            ));
        }
        Device::host(&path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named() {
        let name = |text: &str| text.parse::<DeviceName>();
        assert_eq!(name("auto"), Ok(DeviceName::Auto));
        assert_eq!(name("cpu"), Ok(DeviceName::Cpu));
        assert_eq!(name("cuda"), Ok(DeviceName::Cuda(0)));
        assert_eq!(name("cuda:3"), Ok(DeviceName::Cuda(3)));
        assert_eq!(name("host"), Ok(DeviceName::Host(None)));
        assert_eq!(name("host=a/b.so"), Ok(DeviceName::Host(Some("a/b.so".into()))));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "host=", "cpu:1"] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
    }
}
