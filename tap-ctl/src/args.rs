//! The command line of `tap-ctl`, as text to [`Command`]. Nothing is done here.
//!
//! Options are those of XenServer's tap-ctl, as its hotplug scripts and storage managers call it. What a tapdisk cannot do
//! it refuses by name: to ignore an option would give the caller another disk than the one asked for.

mod help;
mod options;
mod values;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use self::options::Options;
use crate::list::Filter;
use crate::proto::{ImageSpec, LimitChange, Minor, OpenParams, Reopen};
use crate::{metrics, top};

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Print the usage of all commands.
    Help,
    /// Print the usage of one command.
    HelpOn(&'static str),
    /// `allocate`
    Allocate,
    /// `free`
    Free(Minor),
    /// `spawn`, with the I/O engine the tapdisk is to use
    Spawn(Option<&'static str>),
    /// `attach`
    Attach(Target),
    /// `detach`
    Detach(Target),
    /// `open`
    Open(Target, Opening),
    /// `close`, waiting at most so long
    Close(Target, Option<Duration>),
    /// `create`, with the I/O engine the tapdisk is to use
    Create(Opening, Option<&'static str>),
    /// `destroy`, waiting at most so long for the image to close, and then by force
    Destroy(Target, Option<Duration>, bool),
    /// `resize`, to a size in bytes or to what the storage has become
    Resize(Target, Option<u64>),
    /// `pause`, waiting at most so long
    Pause(Target, Option<Duration>),
    /// `unpause`
    Unpause(Target, Reopen),
    /// `snapshot`, to a new image, waiting at most so long
    Snapshot(Target, ImageSpec, Option<Duration>),
    /// `limit`
    Limit(Target, LimitChange),
    /// `stats`, in full or as XenServer's storage manager reads them
    Stats(Target, bool),
    /// `upgrade`, of one tapdisk or of all
    Upgrade(Option<i32>),
    /// `list`
    List(Filter),
    /// `top`
    Top(top::Options),
    /// `metrics`, once or for whoever asks there
    Metrics(Option<metrics::serve::Address>),
    /// `nbd-tls`
    NbdTls(TlsDoor),
    /// With `--json`: the same, and what it prints as JSON
    Json(Box<Command>),
}

/// What to open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Everything but the key.
    pub params: Box<OpenParams>,
    /// Whether the key is to be read from standard input, where `ps` does not show it.
    pub encrypted: bool,
}

/// A disk on a TCP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsDoor {
    /// The disk.
    pub target: Target,
    /// Where to listen.
    pub address: SocketAddr,
    /// Where the certificates are.
    pub certificates: PathBuf,
}

/// A VBD of a tapdisk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The tapdisk's process id.
    pub pid: i32,
    /// The minor.
    pub minor: Minor,
}

/// A command line that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct UsageError {
    /// The command, for its usage text.
    pub command: &'static str,
    /// What is wrong.
    pub message: String,
}

/// The options that open an image, in words.
macro_rules! opening {
    () => {
        "-a TYPE:PATH [-R read-only] [-D through the page cache] [-r local read cache] [-e MINOR of the disk that \
         stands for the parents] [-2 TYPE:PATH of the mirror, or with -s of the image that takes the writes when this one is full] [-t SECONDS] [-C LOG of written blocks] \
         [-E key from standard input] [--limit iops=N,bps=N,burst-iops=N,burst-bps=N]"
    };
}

/// Commands with their options, in the order of the help text.
const COMMANDS: [(&str, &str); 20] = [
    ("list", "[-p PID] [-m MINOR] [-t TYPE] [-f FILE] [--json]"),
    ("allocate", "[--json]"),
    ("free", "-m MINOR"),
    ("create", concat!(opening!(), " [--engine uring|pool|auto] [-d NAME ignored] [--json]")),
    ("destroy", "-p PID -m MINOR [-t SECONDS] [-f by killing the tapdisk if it does not answer]"),
    ("spawn", "[--engine uring|pool|auto] [--json]"),
    ("attach", "-p PID -m MINOR"),
    ("detach", "-p PID -m MINOR"),
    ("open", concat!("-p PID -m MINOR ", opening!())),
    ("close", "-p PID -m MINOR [-f] [-t SECONDS]"),
    ("pause", "-p PID -m MINOR [-t SECONDS]"),
    (
        "unpause",
        "-p PID -m MINOR [-a TYPE:PATH] [-2 TYPE:PATH of the mirror, or with -s of the standby image, or null for none] \
         [-c LOG of written blocks]",
    ),
    ("snapshot", "-p PID -m MINOR -a TYPE:PATH of the new image [-t SECONDS]"),
    ("resize", "-p PID -m MINOR [-s MIB, without it the size that the storage has now]"),
    (
        "limit",
        "-p PID -m MINOR [--iops N] [--bps N] [--burst-iops N] [--burst-bps N] (0: no limit; prints what holds then) [--json]",
    ),
    ("stats", "-p PID -m MINOR [--full, or --json, for everything there is]"),
    (
        "top",
        "[-p PID] [-m MINOR] [-d SECONDS between two tables] [-n TIMES] [-s device|iops|bytes|latency|queue|hits] \
         [-b for scripts: one table after the other]",
    ),
    ("metrics", "[-l SOCKET or LOOPBACK-ADDRESS:PORT to serve Prometheus; without it, prints them once]"),
    (
        "nbd-tls",
        "-p PID -m MINOR -l ADDRESS:PORT -c FOLDER with ca-cert.pem, server-cert.pem and server-key.pem",
    ),
    (
        "upgrade",
        "-p PID [-m MINOR of it] | --all (other tapdisks, of the program installed now, go on with the disks; guests wait)",
    ),
];

/// The usage line of one command.
pub fn usage_of(command: &str) -> String {
    let options = COMMANDS.iter().find(|(name, _)| *name == command).map_or("", |(_, options)| options);
    help::fold(&format!("usage: tap-ctl {command} {options}"), 4)
}

/// The usage line of one command, and what it is for.
pub fn help_of(command: &str) -> String {
    format!("{}\n\n{}\n", usage_of(command), help::fold(help::about(command), 0))
}

/// The usage of the program. Lines that begin a command are indented by two columns, and what goes on by more.
pub fn usage() -> String {
    let mut text = String::from("usage: tap-ctl COMMAND [OPTIONS] [--debug]\n");
    for (name, options) in COMMANDS {
        text.push_str(&help::fold(&format!("  {name:<9} {options}"), 12));
        text.push('\n');
    }
    text
}

/// Reads a command line without the program's name. `--debug` has been taken out by the caller.
///
/// No command and an unknown command are requests for help, as in XenServer's tap-ctl.
///
/// # Errors
///
/// [`UsageError`] names the command and what is wrong.
pub fn parse(args: &[OsString]) -> Result<Command, UsageError> {
    let Some((first, rest)) = args.split_first() else {
        return Ok(Command::Help);
    };
    let Some((command, _)) = COMMANDS.iter().find(|(name, _)| first == name) else {
        return Ok(Command::Help);
    };
    let options = match Options::read(command, rest) {
        Ok(Some(options)) => options,
        Ok(None) => return Ok(Command::HelpOn(command)),
        Err(message) => return Err(UsageError { command, message }),
    };
    options.into_command(command).map_err(|message| UsageError { command, message })
}

#[cfg(test)]
mod tests;
