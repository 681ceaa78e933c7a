//! `tapdisk`: serves disks; started by `tap-ctl spawn`.

use std::process::ExitCode;

use tap_ctl::ControlDir;
use tapdisk::xen::DeviceXen;

fn main() -> ExitCode {
    tapdisk::cli::main(DeviceXen, &ControlDir::default())
}
