//! Copies a raw image into a new qcow image, as the tool of this name in Xen's blktap.

use std::path::Path;
use std::process::ExitCode;

use format::SECTOR_SIZE;
use format::blocking::Storage;
use tap_ctl::proto::ImageType;
use tap_img::xen::{NewQcow, may_overwrite, names, run, transfer};

const USAGE: &str = "img2qcow <QCOW FILENAME> <SRC IMAGE>";

fn main() -> ExitCode {
    run(USAGE, convert)
}

fn convert(args: lexopt::Parser) -> anyhow::Result<Option<()>> {
    let Some([target, source]) = names(args)? else { return Ok(None) };
    let size = std::fs::File::open(&source).and_then(|file| file.size());
    let size = size.map_err(|error| anyhow::anyhow!("{source}: {error}"))?;
    if may_overwrite(Path::new(&target))? {
        let new = NewQcow { version_2: false, sectors: size / SECTOR_SIZE, reserve: false };
        new.create(Path::new(&target), None)?;
        transfer((ImageType::Aio, source), (ImageType::Qcow, target))?;
    }
    Ok(Some(()))
}
