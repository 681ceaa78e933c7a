//! `vhd-util revert`: undoes a resize that was cut short.

use std::fs::File;
use std::io::Write;

use super::args::Args;
use super::disk::Disk;
use super::resize::drop_journal;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::Error;
use crate::journal::{Journal, State};

pub(super) const OPTIONS: &str = "n:j:";
pub(super) const USAGE: &str = "options: <-n name> <-j journal> [-h help]";

pub(super) fn run(args: &Args, _out: &mut dyn Write) -> Result<(), Failure> {
    let (Some(path), Some(journal)) = (args.path('n'), args.path('j')) else { return Err(wrong_usage()) };
    let opening = |errno: i32, why: String| {
        Failure::new(errno, format!("opening journal failed: -{errno}: {}: {why}", journal.display()))
    };
    let refused = |error: Error| opening(error.errno(), error.to_string());
    let file = File::options().read(true).write(true).open(journal);
    let mut file = file.map_err(|error| opening(errno_of(&error), error.to_string()))?;
    let mut disk = Disk::open(path, true).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    disk.lock(true).map_err(|error| in_use(path, &error))?;
    let saved = Journal::read(&file).map_err(refused)?;
    if saved.state(&disk).map_err(refused)? == State::Interrupted {
        saved
            .undo(&mut disk)
            .map_err(|error| Failure::new(error.errno(), format!("reverting journal failed: {error}")))?;
    }
    drop_journal(journal, &mut file)
}
