//! `vhd-util create`.

use std::fs::{self, OpenOptions as FileOptions};
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use format::blocking::Storage;

use super::args::Args;
use super::disk::{Disk, random};
use super::progress::Percent;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::header::DEFAULT_BLOCK_SIZE;
use crate::{DiskType, Error, NewBytes, NewImage, OpenOptions, Uuid, time, transfer};

/// Ours are `-a`, which gives all blocks their places at once, and `-q`, which makes an image that QEMU may write to.
pub(super) const OPTIONS: &str = "n:s:S:raq";
pub(super) const USAGE: &str = "options: <-n name> <-s size (MB)> [-r reserve] [-h help] [<-S size (MB) for metadata \
                                preallocation (see vhd-util resize)>]";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let size = size_option(args, 's')?.ok_or_else(wrong_usage)?;
    let max_size = size_option(args, 'S')?.unwrap_or(0);
    if size == 0 || (args.has('S') && (max_size < size || args.has('r'))) {
        return Err(Failure::new(
            libc::EINVAL,
            "the size is zero, or no disk can grow to the preallocated size",
        ));
    }
    let image = NewImage {
        kind: if args.has('r') { DiskType::Fixed } else { DiskType::Dynamic },
        // As libvhd does, so that the last block is whole.
        size: size.next_multiple_of(DEFAULT_BLOCK_SIZE.into()),
        max_size,
        block_size: DEFAULT_BLOCK_SIZE,
        uuid: Uuid::from_random(random()?),
        timestamp: now(),
        parent: None,
        key: None,
    };
    if args.has('q') {
        write_as(path, &image, NewImage::build_for_qemu)?;
    } else {
        write_new(path, &image)?;
    }
    if args.has('a') && image.kind == DiskType::Dynamic { allocate(path, out) } else { Ok(()) }
}

/// Gives all blocks of a new image their places.
fn allocate(path: &Path, out: &mut dyn Write) -> Result<(), Failure> {
    let mut disk = Disk::open(path, true)?;
    disk.lock(true).map_err(|error| in_use(path, &error))?;
    let mut vhd = disk.vhd(&OpenOptions { writable: true, ..OpenOptions::default() })?;
    let mut percent = Percent::at_terminal(out);
    let blocks = 0..vhd.blocks();
    transfer::allocate(&mut vhd, &mut disk, blocks, &mut |done, of| percent.show(done, of))?;
    percent.end();
    Ok(())
}

/// The value of an option in MiB, as bytes.
pub(super) fn size_option(args: &Args, letter: char) -> Result<Option<u64>, Failure> {
    let Some(mib) = args.number::<u64>(letter)? else { return Ok(None) };
    let bytes = mib.checked_mul(1 << 20);
    bytes.map(Some).ok_or_else(|| Failure::new(libc::EFBIG, format!("{mib} MiB are too many")))
}

/// The present time as a stamp.
pub(super) fn now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    time::from_unix(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// Makes an image, in place of any other at that path, and makes it durable. A file that could not be finished is
/// removed.
pub(super) fn write_new(path: &Path, image: &NewImage) -> Result<(), Failure> {
    write_as(path, image, NewImage::build)
}

/// How the bytes of an image are made.
type Build = fn(&NewImage, Option<u64>) -> Result<NewBytes, Error>;

fn write_as(path: &Path, image: &NewImage, build: Build) -> Result<(), Failure> {
    // Checked first, so that a wrong wish destroys nothing.
    build(image, None)?;
    let file = FileOptions::new().read(true).write(true).create(true).truncate(false).open(path);
    let file =
        file.map_err(|error| Failure::new(errno_of(&error), format!("{}: {error}", path.display())))?;
    let mut disk = Disk::new(file, path.canonicalize()?)?;
    disk.lock(true).map_err(|error| in_use(path, &error))?;
    fill(&mut disk, image, build).inspect_err(|_| {
        if disk.regular {
            // The first error is the one to report.
            let _ = fs::remove_file(&disk.path);
        }
    })
}

fn fill(disk: &mut Disk, image: &NewImage, build: Build) -> Result<(), Failure> {
    let bytes = build(image, (!disk.regular).then_some(disk.size))?;
    if disk.regular {
        disk.set_len(0)?;
    }
    if image.kind == DiskType::Fixed {
        disk.zero(0..image.size)?;
    }
    for write in &bytes.writes {
        disk.write_at(write.offset, &write.bytes)?;
    }
    if disk.regular {
        disk.set_len(bytes.len)?;
    }
    Ok(disk.sync_name()?)
}
