//! `vhd-util repair`: puts the footers right.

use std::io::Write;

use format::blocking::carry_out;

use super::args::Args;
use super::disk::{Disk, random};
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::Uuid;
use crate::repair::{self, Repair};

pub(super) const OPTIONS: &str = "n:b";
pub(super) const USAGE: &str = "options: <-n name> [-b use the backup footer] [-h help]";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let mut disk = Disk::open(path, true).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    disk.lock(true).map_err(|error| in_use(path, &error))?;
    let uuid = Uuid::from_random(random()?);
    let repair = disk.with_source(|source| repair::repair(source, args.has('b'), uuid));
    let Repair { steps, lost_blocks: lost } =
        repair.map_err(|error| Failure::opening(path, error.errno()))?;
    carry_out(&mut disk, &steps).map_err(|error| {
        Failure::new(errno_of(&error), format!("error writing footer: -{}", errno_of(&error)))
    })?;
    if lost > 0 {
        writeln!(
            out,
            "{lost} blocks reached beyond the end of the file: what they had there is lost and is zeros now"
        )?;
    }
    Ok(())
}
