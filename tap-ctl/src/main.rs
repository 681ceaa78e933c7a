//! `tap-ctl`: see [`tap_ctl::args`] for its commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(tap_ctl::cli::main())
}
