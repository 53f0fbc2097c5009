//! Lines on standard output and standard error.
//!
//! Where `println!` panics, because the reader of a pipe has gone or the disk behind a redirection is full, [`say!`] is an
//! error that a command hands on like any other.

use crate::{Error, Result};
use std::fmt::Arguments;
use std::io::{ErrorKind, Write, stderr, stdout};
use std::path::Path;

const STANDARD_OUTPUT: &str = "standard output";

/// A line on standard output; takes what `println!` takes.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::output::to_output(format_args!($($text)*)) };
}

/// A line on standard error; takes what `eprintln!` takes.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::output::to_error(format_args!($($text)*)) };
}

pub(super) use {note, say};

pub(super) fn to_output(text: Arguments<'_>) -> Result<()> {
    writeln!(stdout().lock(), "{text}").map_err(Error::io(Path::new(STANDARD_OUTPUT), "write"))
}

pub(super) fn to_error(text: Arguments<'_>) {
    // Nobody is left to hear that nobody listens.
    let _ = writeln!(stderr().lock(), "{text}");
}

/// Whether `error` only says that the reader of standard output has seen enough, as `head` has.
pub(super) fn reader_has_gone(error: &Error) -> bool {
    matches!(error, Error::Io { path, source, .. }
        if path == Path::new(STANDARD_OUTPUT) && source.kind() == ErrorKind::BrokenPipe)
}
