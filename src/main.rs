//! The command-line program; `effnetv2 --help` says what it does.

use std::process::ExitCode;

fn main() -> ExitCode {
    effnetv2::cli::main()
}
