//! `tap-img create`.

use std::fs::File;
use std::path::Path;

use tap_ctl::proto::null_size;
use tap_img::create::New;

use super::{Args, Usage};

pub fn run(args: Args) -> anyhow::Result<u8> {
    let (kind, path) = (args.format()?, Path::new(&args.names[0]));
    let size = null_size(&args.names[1]);
    let size = size.ok_or_else(|| {
        Usage::error(format!(
            "{:?} is no size: write bytes, a multiple of 512, or a number with K, M, G or T",
            args.names[1]
        ))
    })?;
    New { kind, size }.create(path)?;
    File::open(path)?.sync_all()?;
    Ok(0)
}
