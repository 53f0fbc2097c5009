//! Families of kernels, loaded once.
//!
//! What kernels there are and what arguments they take is a table in Rust ([`Family`]), one for each `kernels/*.cu`.
//! Launches check their arguments against it, and tests check it against what the compilers saw.

#![forbid(unsafe_code)]

use super::driver_error::Doing;
use super::monitor::Monitor;
use super::{Device, Image, embedded_images, host, images, toolkit};
use crate::{Error, Result};
use cudarc::driver::sys::CUfunction_attribute;
use cudarc::driver::{CudaContext, CudaFunction};
use cudarc::nvrtc::Ptx;
use std::sync::{Arc, Mutex, PoisonError};

/// The kernels of one `kernels/*.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Family {
    /// The name of the file, without suffix.
    pub name: &'static str,
    /// Its kernels.
    pub kernels: &'static [Entry],
}

/// A kernel of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name in the `.cu` file.
    pub name: &'static str,
    /// Its parameters, one character each: `p` pointer; `c C`, `s S`, `i I`, `l L` integers of 8, 16, 32 and 64 bits
    /// (capitals unsigned); `h` f16, `b` bf16, `f` f32, `d` f64; `{size:alignment}` a struct passed by value.
    pub signature: &'static str,
    /// Threads of a block.
    pub threads: u32,
}

/// A family on a device.
#[derive(Debug)]
pub struct Module {
    family: &'static Family,
    kernels: Vec<Kernel>,
}

/// A kernel on a device.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub(super) entry: &'static Entry,
    pub(super) function: CudaFunction,
    pub(super) monitor: Arc<Monitor>,
    context: Arc<CudaContext>,
}

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Bytes of local memory of a thread: spilled registers and arrays. Should be 0.
    pub local: u32,
    /// The compute capability of the machine code that runs.
    pub binary: (u32, u32),
    /// Blocks that a multiprocessor holds at once, without dynamic shared memory.
    pub blocks: u32,
}

impl Module {
    pub(super) fn load(device: &Device, family: &'static Family) -> Result<Self> {
        let image = match device.is_host() {
            true => host::image(family.name),
            false => gpu_image(device, family)?.to_vec(),
        };
        let doing = || format!("load kernels/{}.cu on {}", family.name, device.gpu().name);
        let module = device.context().load_module(Ptx::from_binary(image)).doing(doing)?;
        let load = |entry: &'static Entry| {
            let function = module
                .load_function(entry.name)
                .doing(|| format!("find the kernel `{}` of kernels/{}.cu", entry.name, family.name))?;
            Ok(Kernel {
                entry,
                function,
                monitor: device.monitor().clone(),
                context: device.context().clone(),
            })
        };
        // Loading a module has bound the context to this thread, which looking up functions relies on.
        Ok(Self { family, kernels: family.kernels.iter().map(load).collect::<Result<_>>()? })
    }

    /// The kernel `name`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the family's table has none of that name.
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        let kernel = self.kernels.iter().find(|kernel| kernel.entry.name == name);
        kernel.cloned().ok_or_else(|| Error::Shape {
            operation: self.family.name,
            problem: format!("the table of kernels/{}.cu has no kernel `{name}`", self.family.name),
        })
    }

    /// All kernels, in the order of the table.
    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }
}

impl Kernel {
    /// Its row of the table.
    pub fn entry(&self) -> &'static Entry {
        self.entry
    }

    /// What it takes of a multiprocessor. The host device knows none of it but the blocks.
    ///
    /// # Errors
    /// [`Error::Driver`].
    pub fn resources(&self) -> Result<Resources> {
        let doing = || format!("ask about the kernel `{}`", self.entry.name);
        self.context.bind_to_thread().doing(doing)?;
        let count = |value: Result<i32, _>| Ok::<_, Error>(u32::try_from(value.doing(doing)?).unwrap_or(0));
        let binary = count(self.function.binary_version())?;
        let blocks = self
            .function
            .occupancy_max_active_blocks_per_multiprocessor(self.entry.threads, 0, None)
            .doing(doing)?;
        Ok(Resources {
            registers: count(self.function.num_regs())?,
            shared: count(self.function.shared_size_bytes())?,
            local: count(self.function.local_size_bytes())?,
            binary: (binary / 10, binary % 10),
            blocks,
        })
    }

    /// Lets launches ask for up to `bytes` of dynamic shared memory; 48 KB without this. What was allowed before stays so, to
    /// whomever: the kernel may be planned for several shapes.
    ///
    /// # Errors
    /// [`Error::Driver`] when that is more than the GPU has.
    pub fn allow_shared(&self, bytes: u32) -> Result<()> {
        let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        let value = i32::try_from(bytes).unwrap_or(i32::MAX);
        let doing = || format!("give the kernel `{}` {bytes} bytes of shared memory", self.entry.name);
        // The driver keeps what was set last, so looking and setting are one for all threads.
        static RAISING: Mutex<()> = Mutex::new(());
        let _raising = RAISING.lock().unwrap_or_else(PoisonError::into_inner);
        self.context.bind_to_thread().doing(doing)?;
        if self.function.get_attribute(attribute).doing(doing)? >= value {
            return Ok(());
        }
        self.function.set_attribute(attribute, value).doing(doing)
    }
}

fn gpu_image(device: &Device, family: &Family) -> Result<&'static [u8]> {
    let none = |problem: String| Error::NoKernels { device: device.gpu().name.clone(), problem };
    let Some(image) = images::fat_binary(family.name) else {
        return Err(none(match toolkit() {
            Some(_) => format!("there was no kernels/{}.cu when this was built", family.name),
            None => "no nvcc was found when this was built. Install the CUDA toolkit, or the Python wheel \
                     nvidia-cuda-nvcc, and build again; EFFNETV2_REQUIRE_CUDA=1 makes sure"
                .into(),
        }));
    };
    let images = embedded_images();
    if Image::best(&images, device.gpu().capability).is_some() {
        return Ok(image);
    }
    let (major, minor) = device.gpu().capability;
    let names: Vec<String> = images.iter().map(ToString::to_string).collect();
    Err(none(format!(
        "it is of sm_{major}{minor}, and this was built for {}: build again with EFFNETV2_CUDA_ARCHS={major}{minor}",
        names.join(", ")
    )))
}
