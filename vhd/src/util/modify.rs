//! `vhd-util modify`: another parent, another place for the footer, no data.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use format::blocking::carry_out;

use super::args::Args;
use super::disk::{Disk, Layer, journal_of, open_chain};
use super::query::LOOK;
use super::resize::{create_journal, drop_journal, stop_at};
use super::snapshot::describe;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::relink::{self, Point};
use crate::{DiskType, Error, OpenOptions, Vhd};

pub(super) const OPTIONS: &str = "n:s:p:mz";
pub(super) const USAGE: &str = "*** Dangerous operations, use with care ***\noptions: <-n name> [-p NEW_PARENT set parent [-m \
                                raw]] [-s NEW_SIZE set size] [-z zero (kill data)] [-h help]";

pub(super) fn run(args: &Args, _out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let size = args.number::<u64>('s')?;
    let mut disk = Disk::open(path, true).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    disk.lock(true).map_err(|error| in_use(path, &error))?;
    let mut vhd = open_vhd(&disk, path)?;
    let failure = |what: &str, error: &Error| {
        let errno = error.errno();
        Failure::new(errno, format!("failed to {what}: -{errno}: {error}"))
    };
    if args.has('z') {
        if vhd.kind() == DiskType::Fixed {
            return Err(Failure::new(libc::ENOSYS, format!("failed to zero VHD: -{}", libc::ENOSYS)));
        }
        carry_out(&mut disk, &vhd.clear_steps()?)?;
        vhd = reopen(&mut disk, path)?;
    }
    if let Some(size) = size {
        let steps = vhd.phys_size_steps(size, disk.size, disk.regular);
        let what = format!("set physical size to {size}");
        carry_out(&mut disk, &steps.map_err(|error| failure(&what, &error))?)?;
        vhd = reopen(&mut disk, path)?;
    }
    match args.path('p') {
        None => Ok(()),
        Some(parent) => {
            let what = format!("set parent to '{}'", parent.display());
            set_parent(&mut disk, &vhd, path, parent, args.has('m')).map_err(|found| match found {
                Fault::Stopped(error) => error.into(),
                Fault::Error(error) => failure(&what, &error),
                Fault::Other(failure) => failure,
            })
        }
    }
}

fn open_vhd(disk: &Disk, path: &Path) -> Result<Vhd, Failure> {
    let options = OpenOptions { writable: true, allow_encrypted: true, ..OpenOptions::default() };
    disk.vhd(&options).map_err(|error| Failure::opening(path, error.errno()))
}

/// The same after a change of it.
fn reopen(disk: &mut Disk, path: &Path) -> Result<Vhd, Failure> {
    disk.measure()?;
    open_vhd(disk, path)
}

enum Fault {
    Stopped(Error),
    Error(Error),
    Other(Failure),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            Error::Stopped { .. } => Self::Stopped(error),
            other => Self::Error(other),
        }
    }
}

impl From<Failure> for Fault {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

fn set_parent(disk: &mut Disk, vhd: &Vhd, path: &Path, parent: &Path, raw: bool) -> Result<(), Fault> {
    let new = describe(&find_parent(disk, parent, raw)?, disk.folder())?;
    let mut at = |point: Point| stop_at(point.variable());
    if !disk.regular {
        return Ok(relink::relink(vhd, disk, None::<&mut File>, &new, &mut at)?);
    }
    if vhd.needs_tidying(disk.size, true) {
        carry_out(disk, &vhd.tidying_steps()).map_err(Failure::from)?;
    }
    let name = journal_of(&disk.path);
    let mut journal = create_journal(&name)?;
    let done = relink::relink(vhd, disk, Some(&mut journal), &new, &mut at);
    if !matches!(done, Err(Error::Stopped { .. })) {
        if done.is_err() {
            super::disk::undo(disk, &mut journal)?;
        }
        drop_journal(&name, &mut journal)?;
    }
    if done.is_ok() {
        log::info!("{} is a child of {} now", path.display(), parent.display());
    }
    Ok(done?)
}

/// Opens the new parent, which must not be a child of the image.
fn find_parent(disk: &Disk, parent: &Path, raw: bool) -> Result<Layer, Error> {
    let io = |source| Error::Io { what: "parent image", offset: 0, source };
    let found = Disk::open(parent, false).map_err(io)?;
    if raw {
        return if found.identity == disk.identity {
            Err(Error::Loop)
        } else {
            Ok(Layer { disk: found, vhd: None })
        };
    }
    let vhd = found.vhd(&LOOK)?;
    let mut chain = open_chain(found, vhd, &LOOK)?;
    if chain.iter().any(|layer| layer.disk.identity == disk.identity) {
        return Err(Error::Loop);
    }
    if chain.is_empty() { Err(Error::Loop) } else { Ok(chain.swap_remove(0)) }
}
