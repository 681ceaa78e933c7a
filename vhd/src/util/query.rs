//! `vhd-util query`: facts on an image, one a line.

use std::io::Write;

use super::args::Args;
use super::disk::{Disk, open_chain, open_parent};
use super::{Failure, errno_of, wrong_usage};
use crate::{DiskType, Error, OpenOptions, SECTOR_SIZE, Vhd};

pub(super) const OPTIONS: &str = "n:vspfdSmau";
pub(super) const USAGE: &str = "options: <-n name> [-v print virtual size (in MB)] [-s print physical utilization (bytes)] [-p print parent] [-f \
     print fields] [-m print marker] [-d print chain depth] [-S print max virtual size (MB) for fast resize] [-a print \
     allocated block count] [-u don't resolve parent path] [-h help]";

/// For tools of the administrator that look at metadata only.
pub(super) const LOOK: OpenOptions = OpenOptions {
    writable: false,
    ignore_poison: false,
    trust_end: true,
    allow_encrypted: true,
    precise: false,
    key: None,
};

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let name = path.display();
    let failure = |errno: i32| Failure::new(errno, format!("error opening {name}: -{errno}"));
    let disk = Disk::open(path, false).map_err(|error| failure(errno_of(&error)))?;
    let vhd = disk.vhd(&LOOK).map_err(|error| failure(error.errno()))?;
    if args.has('v') {
        writeln!(out, "{}", vhd.sectors() / 2048)?;
    }
    if args.has('s') {
        writeln!(out, "{}", vhd.end_of_data().saturating_add(SECTOR_SIZE))?;
    }
    if args.has('p') {
        writeln!(out, "{}", parent_text(&disk, &vhd, args.has('u'), &name.to_string())?)?;
    }
    if args.has('f') {
        writeln!(out, "hidden: {}", vhd.footer().hidden)?;
    }
    if args.has('m') {
        writeln!(out, "marker: {}", vhd.batmap().map_or(0, |(header, _)| header.marker))?;
    }
    // What may follow needs the image no more but for these two numbers.
    let allocated = vhd.allocated_blocks();
    let largest = vhd.header().map_or(0, |header| {
        u64::from(header.table_entries.get()).saturating_mul(header.block_size.get().into()) >> 20
    });
    let fixed = vhd.kind() == DiskType::Fixed;
    if args.has('d') {
        let depth =
            open_chain(disk, vhd, &LOOK).map_err(|error| parent_failure("chain depth", &error))?.len();
        writeln!(out, "chain depth: {depth}")?;
    }
    if args.has('a') {
        if fixed {
            return Err(Failure::new(libc::EINVAL, format!("error reading bat: -{}", libc::EINVAL)));
        }
        writeln!(out, "{allocated}")?;
    }
    if args.has('S') {
        writeln!(out, "{largest}")?;
    }
    Ok(())
}

fn parent_text(disk: &Disk, vhd: &Vhd, unresolved: bool, name: &str) -> Result<String, Failure> {
    let Some(parent) = vhd.parent() else { return Ok(format!("{name} has no parent")) };
    if unresolved {
        let first = parent.names.first().ok_or(Error::NoParentName);
        return Ok(first.map_err(|error| parent_failure("parent name", &error))?.path.display().to_string());
    }
    match open_parent(disk, vhd, &LOOK) {
        Ok(Some(parent)) => Ok(parent.disk.path.display().to_string()),
        Ok(None) => Ok(format!("{name} has no parent")),
        Err(error) => Err(parent_failure("parent", &error)),
    }
}

fn parent_failure(what: &str, error: &Error) -> Failure {
    Failure::new(error.errno(), format!("error getting {what}: {error}"))
}
