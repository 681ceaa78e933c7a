//! `tapdisk` on a simulated host.

use std::process::ExitCode;

use integration::sim::host::SimHost;

fn main() -> ExitCode {
    let host = SimHost::from_environment();
    let control = host.control();
    tapdisk::cli::main(host, &control)
}
