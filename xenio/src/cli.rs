//! The command line, and what a daemon does before its loop.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::num::NonZero;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use lexopt::{Arg, Parser, ValueExt};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tap_ctl::ControlDir;
use tap_ctl::logging::{self, Mode};

use crate::daemon::{Config, run};
use crate::features::{MAX_QUEUES, Offer};

/// The usage text.
const USAGE: &str = "\
usage: xenio [-D | -f] [-n NAME] [-p FILE] [--max-queues N]
  -D              stay in the foreground, with debug messages on standard error
  -f              stay in the foreground and log to the system log, for a service
                  manager
  -n NAME         serve the devices in backend/NAME (default vbd3)
  -p FILE         write the process id to FILE
  --max-queues N  offer at most N rings for a disk, 1 to 4 (default 4), and in no
                  case more than this domain has processors
  -h              this text
  --version       the version
";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `-h`
    Help,
    /// `--version`
    Version,
    /// Serve.
    Serve(Options),
}

/// How the process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Detached, with messages to the system log.
    Daemon,
    /// `-f`: a service manager's child, with messages to the system log, which knows their priorities.
    Service,
    /// `-D`: at a terminal, with debug messages there.
    Debug,
}

/// How to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How to run.
    pub way: Way,
    /// `-n`
    pub kind: String,
    /// `-p`
    pub pid_file: Option<PathBuf>,
    /// `--max-queues`, 1 to [`MAX_QUEUES`].
    pub max_queues: u32,
}

/// Where an installed xenio keeps its things. A simulation uses others.
#[derive(Clone, Debug)]
pub struct Places {
    /// The tapdisks' runtime folder.
    pub control_dir: ControlDir,
    /// The tapdisk program, for disks whose tapdisk died.
    pub tapdisk: PathBuf,
    /// Locked while a xenio runs.
    pub lock: PathBuf,
}

impl Default for Places {
    fn default() -> Places {
        let tap_ctl::cli::Config { dir, tapdisk, .. } = tap_ctl::cli::Config::installed(false);
        Places { control_dir: dir, tapdisk, lock: PathBuf::from("/run/xenio.lock") }
    }
}

/// Reads the command line, without the program's name.
///
/// # Errors
///
/// What is wrong with it.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, lexopt::Error> {
    let mut options =
        Options { way: Way::Daemon, kind: "vbd3".to_owned(), pid_file: None, max_queues: MAX_QUEUES };
    let mut parser = Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help),
            Arg::Long("version") => return Ok(Command::Version),
            Arg::Short('D') => options.way = Way::Debug,
            Arg::Short('f') => options.way = Way::Service,
            Arg::Short('n') => options.kind = parser.value()?.string()?,
            Arg::Short('p') => options.pid_file = Some(parser.value()?.into()),
            Arg::Long("max-queues") => options.max_queues = parser.value()?.parse_with(queues)?,
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::Serve(options))
}

fn queues(text: &str) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_QUEUES).contains(number));
    number.ok_or_else(|| format!("the number of rings is 1 to {MAX_QUEUES}"))
}

/// More rings than processors to serve them only cost memory.
fn offer(options: &Options) -> Offer {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    Offer { max_queues: u32::try_from(processors).map_or(options.max_queues, |n| n.min(options.max_queues)) }
}

/// Runs `xenio` on the arguments of this process; gives its exit code: 0, 1 for a failure, 2 for a command line that
/// cannot be understood.
pub fn main(places: &Places) -> u8 {
    let command = match parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(error) => {
            eprint!("xenio: {error}\n{USAGE}");
            return 2;
        }
    };
    let outcome = match command {
        Command::Help => io::stdout().write_all(USAGE.as_bytes()).map_err(anyhow::Error::from),
        Command::Version => writeln!(io::stdout(), "xenio {}", env!("CARGO_PKG_VERSION")).map_err(Into::into),
        Command::Serve(options) => serve(&options, places),
    };
    match outcome {
        Ok(()) => 0,
        Err(error) => {
            if log::max_level() == log::LevelFilter::Off {
                eprintln!("xenio: {error:#}");
            } else {
                log::error!("{error:#}");
            }
            1
        }
    }
}

fn serve(options: &Options, places: &Places) -> anyhow::Result<()> {
    // Before the process leaves its terminal, so that who started it sees why it cannot run. The lock stays with the
    // open file and so passes to the daemon.
    let _lock = lock(&places.lock)?;
    if options.way == Way::Daemon {
        nix::unistd::daemon(false, false).context("cannot become a daemon")?;
    }
    let debug = options.way == Way::Debug;
    let mode = if debug { Mode::Foreground } else { Mode::Daemon };
    logging::init("xenio", mode, debug).context("cannot start logging")?;
    let _pid_file = options.pid_file.as_deref().map(PidFile::write).transpose()?;
    let signals = end_signals().context("cannot take signals")?;
    log::info!("xenio {} starts", env!("CARGO_PKG_VERSION"));
    let config = Config {
        kind: options.kind.clone(),
        control_dir: places.control_dir.clone(),
        tapdisk: places.tapdisk.clone(),
        store: None,
        offer: offer(options),
    };
    run(&config, signals.as_fd())?;
    log::info!("xenio ends; disks go on without it");
    Ok(())
}

/// Readable once SIGTERM or SIGINT has arrived.
fn end_signals() -> nix::Result<SignalFd> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    mask.add(Signal::SIGINT);
    mask.thread_block()?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
}

/// Two xenios would answer every frontend twice.
fn lock(path: &Path) -> anyhow::Result<Flock<File>> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("cannot open the lock file {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => {
            anyhow::bail!("another xenio is running (it holds {}); stop it first", path.display())
        }
        Err((_, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Removed when dropped.
struct PidFile {
    path: PathBuf,
}

impl PidFile {
    fn write(path: &Path) -> anyhow::Result<PidFile> {
        fs::write(path, format!("{}\n", std::process::id()))
            .with_context(|| format!("cannot write the process id to {}", path.display()))?;
        Ok(PidFile { path: path.to_owned() })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Option<Command> {
        parse(text.split_whitespace().map(OsString::from)).ok()
    }

    #[test]
    fn options_are_read() {
        let plain = Options { way: Way::Daemon, kind: "vbd3".into(), pid_file: None, max_queues: MAX_QUEUES };
        assert_eq!(line("-f"), Some(Command::Serve(Options { way: Way::Service, ..plain.clone() })));
        assert_eq!(line(""), Some(Command::Serve(plain)));
        let pid_file = Some("/run/x.pid".into());
        let all = Options { way: Way::Debug, kind: "vbd7".into(), pid_file, max_queues: 1 };
        assert_eq!(line("-D -n vbd7 -p /run/x.pid --max-queues 1"), Some(Command::Serve(all)));
        assert_eq!(line("-D -h"), Some(Command::Help));
        assert_eq!(line("--version"), Some(Command::Version));
        for text in [
            "-x",
            "extra",
            "-n",
            "--foreground",
            "-D extra",
            "--max-queues",
            "--max-queues 0",
            "--max-queues 5",
            "--max-queues -1",
        ] {
            assert_eq!(line(text), None, "{text}");
        }
    }

    #[test]
    fn no_more_rings_are_offered_than_asked_for_and_at_least_one() {
        let options = |max_queues| Options { way: Way::Debug, kind: "x".into(), pid_file: None, max_queues };
        assert_eq!(offer(&options(1)).max_queues, 1);
        assert!((1..=MAX_QUEUES).contains(&offer(&options(MAX_QUEUES)).max_queues));
    }

    #[test]
    fn a_second_instance_is_refused_while_the_first_lives() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let first = lock(&path).unwrap();
        let error = lock(&path).unwrap_err().to_string();
        assert!(error.contains("another xenio is running"), "{error}");
        drop(first);
        lock(&path).unwrap();
    }

    #[test]
    fn the_pid_file_is_there_as_long_as_the_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("pid");
        let file = PidFile::write(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        drop(file);
        assert!(!path.exists());
    }
}
