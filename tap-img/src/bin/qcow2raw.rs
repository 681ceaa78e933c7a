//! Copies a qcow image, with what is below it, into a raw file, as the tool of this name in Xen's blktap.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use format::blocking::with_source;
use qcow::v1::{self, OpenOptions};
use tap_ctl::proto::ImageType;
use tap_img::create::New;
use tap_img::xen::{may_overwrite, names, run, transfer};

const USAGE: &str = "qcow2raw <Dest File descriptor> <Qcow SRC IMAGE>";

fn main() -> ExitCode {
    run(USAGE, convert)
}

fn convert(args: lexopt::Parser) -> anyhow::Result<Option<()>> {
    let Some([target, source]) = names(args)? else { return Ok(None) };
    let size = size(&source).with_context(|| source.clone())?;
    if may_overwrite(Path::new(&target))? {
        New { kind: ImageType::Aio, size }.create(Path::new(&target))?;
        transfer((ImageType::Qcow, source), (ImageType::Aio, target))?;
    }
    Ok(Some(()))
}

/// Bytes of the disk, before anything is destroyed for it.
fn size(source: &str) -> anyhow::Result<u64> {
    let file = File::open(source)?;
    let core = with_source(&file, |source| v1::open(source, &OpenOptions::default()))??;
    Ok(core.header().size / 512 * 512)
}
