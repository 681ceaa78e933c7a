//! `vhd-util set`: fields that storage managers use.

use std::io::Write;

use format::blocking::carry_out;

use super::args::Args;
use super::disk::Disk;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::OpenOptions;

pub(super) const OPTIONS: &str = "n:f:v:";
pub(super) const USAGE: &str =
    "options: <-n name> <-f field> <-v value> [-h help]\nfields: hidden, marker (0 to 255)";

pub(super) fn run(args: &Args, _out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let value = args.number::<u8>('v')?.ok_or_else(wrong_usage)?;
    let failure = |errno: i32| Failure::new(errno, format!("error opening {}: -{errno}", path.display()));
    let field = args.text('f').and_then(|field| field.to_str()).ok_or_else(wrong_usage)?;
    let mut disk = Disk::open(path, true).map_err(|error| failure(errno_of(&error)))?;
    // The footer is where a writer of blocks would put the next one. Readers do not mind.
    disk.lock(false).map_err(|error| in_use(path, &error))?;
    let options = OpenOptions { writable: true, allow_encrypted: true, ..OpenOptions::default() };
    let mut vhd = disk.vhd(&options).map_err(|error| failure(error.errno()))?;
    let steps = match field {
        "hidden" => vhd.set_hidden(value)?,
        "marker" => vhd.set_marker(value)?,
        _ => return Err(wrong_usage()),
    };
    Ok(carry_out(&mut disk, &steps)?)
}
