//! Makes a qcow image, as the tool of this name in Xen's blktap.
//!
//! `-f qcow2` takes its format from the argument behind it; blktap's tool took the one that getopt was to look at next.

use std::path::Path;
use std::process::ExitCode;

use lexopt::{Arg, ValueExt};
use tap_img::xen::{NewQcow, may_overwrite, run, text};

const USAGE: &str = "qcow-create [-h help] [-r reserve] <SIZE(MB)> <FILENAME> [<BACKING_FILENAME>]";

fn main() -> ExitCode {
    run(USAGE, create)
}

fn create(mut args: lexopt::Parser) -> anyhow::Result<Option<()>> {
    let (mut reserve, mut version_2, mut names) = (false, false, Vec::new());
    while let Some(arg) = args.next()? {
        match arg {
            Arg::Short('r') => reserve = true,
            Arg::Short('f') => match args.value()?.string()?.as_str() {
                "qcow" => version_2 = false,
                "qcow2" => version_2 = true,
                _ => return Ok(None),
            },
            Arg::Value(name) => names.push(text(&name)?),
            _ => return Ok(None),
        }
    }
    let (size, file, backing) = match &names[..] {
        [size, file] => (size, file, None),
        [size, file, backing] => (size, file, Some(Path::new(backing))),
        _ => return Ok(None),
    };
    let Some(sectors) = size.parse().ok().and_then(|megabytes: u64| megabytes.checked_mul(2048)) else {
        return Ok(None);
    };
    if may_overwrite(Path::new(file))? {
        NewQcow { version_2, sectors, reserve }.create(Path::new(file), backing)?;
    }
    Ok(Some(()))
}
