//! The one error type of the crate. Every message names the file, flag or value at fault and the next step.

#![forbid(unsafe_code)]

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
    #[error("{path}: cannot {action}: {source}", path = path.display())]
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
    /// Training cannot go on (the loss is not finite, for one).
    #[error("{0}")]
    Training(String),
    /// The user asked to stop (Ctrl-C); work up to here is saved.
    #[error("{0}")]
    Interrupted(String),
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
