//! The command-line program; `effnetv2 --help` says what it does.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    effnetv2::cli::main()
}
