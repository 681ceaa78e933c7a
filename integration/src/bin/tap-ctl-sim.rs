//! `tap-ctl` on a simulated host.

use std::ffi::OsString;
use std::process::ExitCode;

use integration::sim::host::SimHost;
use tap_ctl::cli::{Config, run};

fn main() -> ExitCode {
    let host = SimHost::from_environment();
    let here = std::env::current_exe().unwrap_or_default();
    let config = Config { dir: host.control(), tapdisk: here.with_file_name("tapdisk-sim"), terminal: false };
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    ExitCode::from(run(&args, &config, &mut std::io::stdout(), &mut std::io::stderr()))
}
