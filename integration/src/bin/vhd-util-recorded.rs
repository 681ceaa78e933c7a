//! `vhd-util`, built beside the tests that record what it does to files.

use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = std::env::args_os().skip(1);
    let code = vhd::util::run(args, &mut io::BufWriter::new(io::stdout().lock()), &mut io::stderr());
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
