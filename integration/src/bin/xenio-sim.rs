//! `xenio` on a simulated host.

use std::process::ExitCode;

use integration::sim::host::SimHost;
use xenio::cli::{Places, main as run};

fn main() -> ExitCode {
    let host = SimHost::from_environment();
    ExitCode::from(run(&Places { control_dir: host.control(), lock: host.dir().join("xenio.lock") }))
}
