//! `tap-ctl` on a simulated host.

use std::ffi::OsString;
use std::process::ExitCode;

use integration::sim::host::SimHost;
use tap_ctl::cli::{Config, Streams, run};

fn main() -> ExitCode {
    let host = SimHost::from_environment();
    let here = std::env::current_exe().unwrap_or_default();
    let config = Config { dir: host.control(), tapdisk: here.with_file_name("tapdisk-sim"), terminal: false };
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let (mut stdin, mut stdout, mut stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let streams = Streams { stdin: &mut stdin, stdout: &mut stdout, stderr: &mut stderr };
    ExitCode::from(run(&args, &config, streams))
}
