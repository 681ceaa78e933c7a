//! `xenio`: see the library's documentation.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(xenio::cli::main(&xenio::cli::Places::default()))
}
