//! `tap-img convert`.

use std::fs::File;
use std::path::Path;

use anyhow::Context;
use tap_ctl::proto::ImageType;
use tap_img::copy::copy;
use tap_img::create::{Created, New};
use tap_img::progress::Progress;
use tap_img::source::Image;
use tapdisk::image::Disk;
use tapdisk::io::Io;

use super::{Args, work};

pub fn run(args: Args) -> anyhow::Result<u8> {
    let (source, kind) = (args.image()?, args.target_format()?);
    work(async move |io| {
        let from = source.open(&io, false)?;
        let path = &args.names[1];
        let created = match args.existing {
            true => Created { blank: false },
            false => New { kind, size: from.sectors() * 512 }.create(Path::new(path))?,
        };
        let progress = if args.quiet { Progress::hidden() } else { Progress::new(from.sectors()) };
        let done = fill(&io, &from, kind, path, created, &progress).await;
        progress.end();
        done?;
        durable(Path::new(path))
    })?;
    Ok(0)
}

async fn fill(
    io: &Io,
    from: &Disk,
    kind: ImageType,
    path: &str,
    created: Created,
    progress: &Progress,
) -> anyhow::Result<()> {
    let to = Image::new(kind, path).open(io, true)?;
    // A new image is worth nothing before it is complete.
    to.defer_flushes(created.blank);
    let copied = copy(io, from, &to, created.blank, progress).await;
    to.defer_flushes(false);
    copied?;
    to.close().await.with_context(|| format!("{path}: cannot close it"))
}

/// Makes the name of a file durable; its content is already.
fn durable(path: &Path) -> anyhow::Result<()> {
    let path = path.canonicalize()?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder)?.sync_all().with_context(|| format!("{}: cannot be made durable", folder.display()))
}
