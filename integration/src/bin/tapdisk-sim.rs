//! `tapdisk` on a simulated host.

use std::process::ExitCode;

use integration::sim::host::SimHost;
use integration::sim::refuse;

fn main() -> ExitCode {
    refuse::from_environment();
    let host = SimHost::from_environment();
    let control = host.control();
    tapdisk::cli::main(host, &control)
}
