//! The one error type of the crate. Every message names the file, flag or value at fault and the next step.

#![forbid(unsafe_code)]

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// What can go wrong, told so that the reader can mend it.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A flag, a configuration key or an argument holds a value that cannot work. The program exits with 2.
    #[error("{name} = {value}: {problem}")]
    Usage {
        /// The flag or key, as the user wrote it (`--model`, `train.batch`).
        name: String,
        /// The value given.
        value: String,
        /// Why it cannot work and what would.
        problem: String,
    },
    /// The operating system refused to read or write a file.
    #[error("{path}: cannot {action}: {source}{}", remedy(.source), path = path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried: "read", "create", ...
        action: &'static str,
        /// The reason the system gave.
        source: std::io::Error,
    },
    /// A file or folder was read but does not hold what it should.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it and what to do.
        problem: String,
    },
    /// Shapes that do not fit together: a mistake of the calling program.
    #[error("{operation}: {problem}")]
    Shape {
        /// The operation that was asked for.
        operation: &'static str,
        /// The shapes and the rule they break.
        problem: String,
    },
    /// There is no NVIDIA driver on this machine, or none that can be used.
    #[error("no NVIDIA driver: {0}; install one (libcuda.so.1 comes with it), or compute on the CPU")]
    NoDriver(String),
    /// There is a driver but not the GPU that was asked for.
    #[error("no GPU {ordinal}: {}", how_many(*.count))]
    NoGpu {
        /// The GPU asked for, from 0.
        ordinal: usize,
        /// How many the driver shows to this process.
        count: usize,
    },
    /// The driver is too old for the embedded kernels. Versions are (major, minor) of CUDA.
    #[error(
        "the NVIDIA driver is of CUDA {}.{}, the embedded kernels need {}.{} or later: update the driver, or build with \
         an older CUDA toolkit",
        found.0, found.1, needed.0, needed.1
    )]
    OldDriver {
        /// The newest CUDA that the driver knows.
        found: (u32, u32),
        /// What the kernels were built for.
        needed: (u32, u32),
    },
    /// The GPU is older than the kernels can be.
    #[error("GPU {ordinal} ({name}) has compute capability {}.{}; 8.0 (Ampere) is the least", capability.0, capability.1)]
    OldGpu {
        /// The GPU, from 0.
        ordinal: usize,
        /// Its name.
        name: String,
        /// Its compute capability.
        capability: (u32, u32),
    },
    /// The crate was built without the kernels that this GPU needs.
    #[error("no GPU kernels for {device}: {problem}")]
    NoKernels {
        /// The GPU.
        device: String,
        /// Why, and how to build them.
        problem: String,
    },
    /// Kernels cannot begin before the last one's end.
    #[error("{device} cannot overlap kernels: {problem}")]
    NoOverlap {
        /// The GPU.
        device: String,
        /// Why, and what to do.
        problem: String,
    },
    /// The driver refused or failed.
    #[error("cannot {action}: {text} ({name}){remedy}")]
    Driver {
        /// What was tried, with sizes: for a launch the kernel, grid, block and shapes.
        action: String,
        /// `CUresult`.
        code: u32,
        /// The name of that code, `CUDA_ERROR_...`.
        name: String,
        /// The driver's words.
        text: String,
        /// What to do; begins with a separator, or is empty.
        remedy: &'static str,
    },
    /// A library of NVIDIA's, against which ours is measured, cannot be opened, refused or failed.
    #[cfg(feature = "peers")]
    #[error("{library} cannot {action}: {problem}")]
    Library {
        /// Its name.
        library: &'static str,
        /// What was tried.
        action: String,
        /// What it said, or what to do.
        problem: String,
    },
    /// The arena cannot hold what a step asks for.
    #[error(
        "the arena has {capacity} bytes, {used} in use, and {asked} more are asked for: plan it for this shape"
    )]
    ArenaFull {
        /// Bytes in all.
        capacity: usize,
        /// Bytes that live blocks span.
        used: usize,
        /// Bytes of the block that does not fit.
        asked: usize,
    },
    /// The memory of a GPU is too small for what is to be computed.
    #[error("{what} needs {} of GPU memory, {} are free; {remedy}", gib(*.needed), gib(*.free))]
    OutOfMemory {
        /// What needs it.
        what: String,
        /// Bytes.
        needed: usize,
        /// Bytes.
        free: usize,
        /// What would fit, or what else to do.
        remedy: String,
    },
    /// Training cannot go on (the loss is not finite, for one).
    #[error("{0}")]
    Training(String),
    /// The user asked to stop (Ctrl-C); work up to here is saved.
    #[error("{0}")]
    Interrupted(String),
}

fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// What to do about it, where that can be said; begins with a separator, or is empty.
fn remedy(error: &std::io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "; check the path",
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => "; check the permissions",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => "; make room for it",
        ErrorKind::AlreadyExists | ErrorKind::NotADirectory => "; a file is in the way, choose another path",
        _ => "",
    }
}

fn how_many(count: usize) -> String {
    match count {
        0 => "the driver shows none to this process (is CUDA_VISIBLE_DEVICES empty?)".into(),
        1 => "there is only GPU 0".into(),
        _ => format!("there are 0 to {}", count - 1),
    }
}

/// A result with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An [`Error::Usage`] for `name = value`.
    pub fn usage(name: impl Into<String>, value: impl ToString, problem: impl Into<String>) -> Self {
        Self::Usage { name: name.into(), value: value.to_string(), problem: problem.into() }
    }

    /// An [`Error::Io`] for `action` on `path`; made for `map_err`.
    pub fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }

    /// An [`Error::File`] for `path`.
    pub fn file(path: &Path, problem: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), problem: problem.into() }
    }

    /// The exit code of the program: 2 for a wrong request, 130 after Ctrl-C, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => 2,
            Self::Interrupted(_) => 130,
            _ => 1,
        }
    }
}
