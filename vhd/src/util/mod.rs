//! The commands of `vhd-util`: options, text and exit codes of the tool of that name in XenServer's blktap.
//!
//! All text goes to the output, errors too, and the exit code is the errno, because scripts rely on both.

mod args;
mod check;
mod coalesce;
mod copy;
mod create;
pub mod disk;
mod fill;
mod key;
mod modify;
mod progress;
mod query;
mod read;
mod repair;
mod resize;
mod revert;
mod scan;
mod set;
mod snapshot;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;

use crate::Error;

const COMMANDS: &str = "{ create | snapshot | query | read | set | repair | resize | fill | coalesce | modify | scan \
                        | check | revert | key | copy }";

/// How a command failed: what to print, and the exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    text: String,
    errno: i32,
}

impl Failure {
    fn new(errno: i32, text: impl Into<String>) -> Self {
        Self { text: text.into(), errno }
    }

    /// An image that could not be opened.
    fn opening(path: &Path, errno: i32) -> Self {
        Self::new(errno, format!("error opening {}: -{errno}", path.display()))
    }

    /// A failure whose text is already printed.
    fn silent(errno: i32) -> Self {
        Self::new(errno, "")
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(errno_of(&error), error.to_string())
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

/// The errno of an I/O error.
fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// The failure for an image that could not be locked.
fn in_use(path: &Path, error: &io::Error) -> Failure {
    let text = match errno_of(error) {
        libc::EBUSY => format!("{} is in use; close it in the program that serves it first", path.display()),
        _ => format!("cannot lock {}: {error}", path.display()),
    };
    Failure::new(errno_of(error), text)
}

type Command = fn(&args::Args, &mut dyn Write) -> Result<(), Failure>;

/// Runs a command line without the program's name and returns the exit code. `err` takes what concerns the program
/// rather than an image.
pub fn run(args: impl IntoIterator<Item = OsString>, out: &mut dyn Write, err: &mut dyn Write) -> i32 {
    let mut args = args.into_iter();
    let result = match args.next() {
        None => usage(out),
        Some(name) => dispatch(&name.to_string_lossy(), args, out),
    };
    let result = result.and_then(|()| Ok(out.flush()?));
    let Err(failure) = result else { return 0 };
    if !failure.text.is_empty() && writeln!(out, "{}", failure.text).and_then(|()| out.flush()).is_err() {
        // Nothing is left to report it to when this fails too.
        let _ = writeln!(err, "vhd-util: cannot write: {}", failure.text);
    }
    failure.errno & 0xff
}

fn dispatch(name: &str, args: impl Iterator<Item = OsString>, out: &mut dyn Write) -> Result<(), Failure> {
    let (command, spec, usage_text): (Command, _, _) = match name {
        "create" => (create::run, create::OPTIONS, create::USAGE),
        "snapshot" => (snapshot::run, snapshot::OPTIONS, snapshot::USAGE),
        "query" => (query::run, query::OPTIONS, query::USAGE),
        "read" => (read::run, read::OPTIONS, read::USAGE),
        "set" => (set::run, set::OPTIONS, set::USAGE),
        "resize" => (resize::run, resize::OPTIONS, resize::USAGE),
        "scan" => (scan::run, scan::OPTIONS, scan::USAGE),
        "check" => (check::run, check::OPTIONS, check::USAGE),
        "key" => (key::run, key::OPTIONS, key::USAGE),
        "repair" => (repair::run, repair::OPTIONS, repair::USAGE),
        "modify" => (modify::run, modify::OPTIONS, modify::USAGE),
        "revert" => (revert::run, revert::OPTIONS, revert::USAGE),
        "fill" => (fill::run, fill::OPTIONS, fill::USAGE),
        "coalesce" => (coalesce::run, coalesce::OPTIONS, coalesce::USAGE),
        "copy" => (copy::run, copy::OPTIONS, copy::USAGE),
        _ => {
            writeln!(out, "invalid COMMAND {name}")?;
            return usage(out);
        }
    };
    match args::Args::parse(spec, args) {
        Ok(args) => match command(&args, out) {
            Err(failure) if failure.errno == 0 => Err(Failure::new(libc::EINVAL, usage_text)),
            result => result,
        },
        Err(reason) => Err(Failure::new(libc::EINVAL, format!("{reason}{usage_text}"))),
    }
}

/// A failure that prints the usage of the command.
fn wrong_usage() -> Failure {
    Failure::silent(0)
}

fn usage(out: &mut dyn Write) -> Result<(), Failure> {
    writeln!(out, "usage: vhd-util COMMAND [OPTIONS]\nCOMMAND := {COMMANDS}")?;
    Ok(())
}
