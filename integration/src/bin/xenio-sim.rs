//! `xenio` on a simulated host.

use std::process::ExitCode;

use integration::sim::host::SimHost;
use xenio::cli::{Places, main as run};

fn main() -> ExitCode {
    let host = SimHost::from_environment();
    let here = std::env::current_exe().unwrap_or_default();
    ExitCode::from(run(&Places {
        control_dir: host.control(),
        tapdisk: here.with_file_name("tapdisk-sim"),
        lock: host.dir().join("xenio.lock"),
    }))
}
