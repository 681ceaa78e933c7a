//! `tap-ctl` as a library call, so that tests and simulations can use another runtime folder and another tapdisk.

mod force;
mod key;
mod show;
mod upgrade;

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::Child;
use std::time::{Duration, Instant};

use self::key::with_key;
use self::show::Form;
use crate::args::{self, Command, Opening, Target, TlsDoor};
use crate::client::{self, Client, QUICK};
use crate::dir::ControlDir;
use crate::error::Error;
use crate::list::{self, Entry, Filter};
use crate::metrics;
use crate::metrics::serve::{Listener, serve};
use crate::minors;
use crate::proto::{LimitChange, Limits, Minor, OpenParams, Reopen, Reply, Request};
use crate::spawn::spawn;
use crate::stats;
use crate::survey::survey;
use crate::tls::Door;
use crate::top;

/// The folder of the tapdisk program; set `XENIO_LIBEXECDIR` at build time to move it.
const LIBEXECDIR: &str = match option_env!("XENIO_LIBEXECDIR") {
    Some(dir) => dir,
    None => "/usr/libexec/xenio",
};

/// Exit code of a command line that cannot be understood (EINVAL).
const USAGE: u8 = 22;

/// How long a tapdisk that was killed may take to be gone, or another one to go on with its disk.
const DYING: Duration = Duration::from_secs(5);

/// Where things are.
#[derive(Clone, Debug)]
pub struct Config {
    /// The runtime folder.
    pub dir: ControlDir,
    /// The program that `spawn` and `create` start.
    pub tapdisk: PathBuf,
    /// Standard output is a terminal: print for people, not for scripts.
    pub terminal: bool,
}

impl Config {
    /// The installed system.
    pub fn installed(terminal: bool) -> Config {
        let tapdisk = PathBuf::from(LIBEXECDIR).join("tapdisk");
        Config { dir: ControlDir::default(), tapdisk, terminal }
    }
}

/// The standard streams.
#[expect(missing_debug_implementations, reason = "streams have nothing to show")]
pub struct Streams<'a> {
    /// Keys are read from it.
    pub stdin: &'a mut dyn Read,
    /// For output.
    pub stdout: &'a mut dyn Write,
    /// For failures.
    pub stderr: &'a mut dyn Write,
}

/// A command that failed: what was tried, and why it failed.
#[derive(Debug)]
struct Failure {
    what: String,
    why: Error,
}

/// Runs one command line (without the program's name) and returns its exit code: 0, or the errno of the failure.
/// A failure is told in one line on `stderr`, which hotplug scripts forward to their log.
pub fn run(args: &[OsString], config: &Config, streams: Streams<'_>) -> u8 {
    let Streams { stdin, stdout, stderr } = streams;
    // `--debug` belongs to the program and may stand anywhere; main has acted on it.
    let args: Vec<OsString> = args.iter().filter(|arg| *arg != "--debug").cloned().collect();
    let command = match args::parse(&args) {
        Ok(command) => command,
        Err(error) => {
            let usage = args::usage_of(error.command);
            // Nothing can be told where even standard error is closed.
            let _ = writeln!(stderr, "tap-ctl: {}: {error}\n{usage}", error.command);
            return USAGE;
        }
    };
    let mut output = String::new();
    let mut notes = Vec::new();
    let result = match go_on(&command, config, stdout) {
        Some(ended) => ended,
        None => perform(&command, config, stdin, &mut output, &mut notes),
    };
    for note in &notes {
        let _ = writeln!(stderr, "tap-ctl: {}", one_line(&note.to_string()));
    }
    let told = stdout.write_all(output.as_bytes()).and_then(|()| stdout.flush());
    if let Err(Failure { what, why }) = result {
        let _ = writeln!(stderr, "tap-ctl: {what}: {}", one_line(&why.to_string()));
        return why.errno();
    }
    match told {
        Ok(()) => 0,
        Err(error) => {
            let _ = writeln!(stderr, "tap-ctl: cannot write to standard output: {error}");
            error.raw_os_error().and_then(|errno| u8::try_from(errno).ok()).unwrap_or(5)
        }
    }
}

/// Acts; `output` is for standard output, `notes` are problems that do not make the command fail.
fn perform(
    command: &Command,
    config: &Config,
    stdin: &mut dyn Read,
    output: &mut String,
    notes: &mut Vec<Error>,
) -> Result<(), Failure> {
    let dir = &config.dir;
    let (command, form) = match command {
        Command::Json(inner) => (&**inner, Form::Json),
        plain if config.terminal => (plain, Form::People),
        plain => (plain, Form::Script),
    };
    match command {
        Command::Help => output.push_str(&args::usage()),
        Command::HelpOn(command) => *output = args::help_of(command),
        Command::Allocate => {
            let minor = minors::allocate(dir).map_err(because("allocate"))?;
            *output = form.minor(dir, minor);
        }
        Command::Free(minor) => {
            minors::free(dir, *minor).map_err(because(format!("free minor {minor}")))?;
        }
        Command::Spawn(engine) => {
            let child = spawn(dir, &config.tapdisk, &options(*engine)).map_err(because("spawn"))?;
            *output = form.tapdisk(child.id());
        }
        Command::Attach(target) => {
            let request = Request::Attach { minor: target.minor };
            order(dir, *target, &request, None).map_err(because(with_target("attach", *target)))?;
        }
        Command::Detach(target) => {
            let request = Request::Detach { minor: target.minor };
            order(dir, *target, &request, None).map_err(because(with_target("detach", *target)))?;
        }
        Command::Open(target, opening) => {
            let opened = with_key(opening, stdin).and_then(|params| open(dir, *target, &params));
            opened.map_err(because(format!("open {}", opening.params.image)))?;
        }
        Command::Close(target, limit) => {
            let request = Request::Close { minor: target.minor };
            order(dir, *target, &request, *limit).map_err(because(with_target("close", *target)))?;
        }
        Command::Create(opening, engine) => {
            *output = form.minor(dir, create(config, opening, *engine, stdin)?);
        }
        Command::Pause(target, limit) => {
            let request = Request::Pause { minor: target.minor, within: limit.map(|limit| limit.as_secs()) };
            order(dir, *target, &request, limit.map(with_grace))
                .map_err(because(with_target("pause", *target)))?;
        }
        Command::Unpause(target, change) => {
            unpause(dir, *target, change).map_err(because(with_target("unpause", *target)))?;
        }
        Command::Snapshot(target, image, limit) => {
            let within = limit.map(|limit| limit.as_secs());
            let request = Request::Snapshot { minor: target.minor, image: image.clone(), within };
            order(dir, *target, &request, limit.map(with_grace))
                .map_err(because(with_target("snapshot", *target)))?;
        }
        Command::Limit(target, change) => {
            let limits = limit(dir, *target, *change).map_err(because(with_target("limit", *target)))?;
            *output = form.limits(limits);
        }
        Command::Stats(target, full) => {
            *output = statistics(dir, *target, *full).map_err(because(with_target("stats", *target)))?;
        }
        Command::Upgrade(which) => {
            upgrade::upgrade(config, *which, output).map_err(|(what, why)| Failure { what, why })?;
        }
        Command::Resize(target, size) => {
            resize(dir, *target, *size).map_err(because(with_target("resize", *target)))?;
        }
        Command::Destroy(target, limit, false) => destroy(dir, *target, *limit)?,
        Command::Destroy(target, limit, true) => force::destroy(dir, *target, *limit)?,
        Command::List(filter) => *output = form.entries(&listing(dir, filter, notes)?),
        Command::Metrics(None) => *output = metrics_once(dir, notes)?,
        // Carried out by who calls us, as they have no end.
        Command::Top(_) | Command::Metrics(Some(_)) | Command::NbdTls(_) | Command::Json(_) => {}
    }
    Ok(())
}

/// The options of a tapdisk with this I/O engine.
fn options(engine: Option<&'static str>) -> Vec<&'static str> {
    engine.map_or_else(Vec::new, |engine| vec!["--engine", engine])
}

fn because(what: impl Into<String>) -> impl FnOnce(Error) -> Failure {
    let what = what.into();
    move |why| Failure { what, why }
}

fn with_target(verb: &str, target: Target) -> String {
    format!("{verb} minor {} of tapdisk {}", target.minor, target.pid)
}

/// How long the tapdisk may take to say that the time is over, which it would rather decide itself: then both agree on what has
/// become of the request.
fn with_grace(limit: Duration) -> Duration {
    limit.saturating_add(Duration::from_secs(2))
}

fn order(dir: &ControlDir, target: Target, request: &Request, limit: Option<Duration>) -> Result<(), Error> {
    Client::connect(dir, target.pid)?.command(request, limit)
}

fn open(dir: &ControlDir, target: Target, params: &OpenParams) -> Result<(), Error> {
    // No limit: opening waits for storage, and only the caller knows for how long that makes sense.
    let request = Request::Open { minor: target.minor, params: params.clone() };
    match client::call(dir, target.pid, &request, None)? {
        Reply::DiskInfo(_) => Ok(()),
        _ => Err(Error::Unexpected { pid: target.pid }),
    }
}

fn unpause(dir: &ControlDir, target: Target, change: &Reopen) -> Result<(), Error> {
    let request = Request::Unpause { minor: target.minor, change: change.clone() };
    match client::call(dir, target.pid, &request, None)? {
        Reply::DiskInfo(_) => Ok(()),
        _ => Err(Error::Unexpected { pid: target.pid }),
    }
}

fn limit(dir: &ControlDir, target: Target, change: LimitChange) -> Result<Limits, Error> {
    let request = Request::Limit { minor: target.minor, change };
    match client::call(dir, target.pid, &request, Some(QUICK))? {
        Reply::Limits(limits) => Ok(limits),
        _ => Err(Error::Unexpected { pid: target.pid }),
    }
}

/// The empty line at the end is XenServer's.
fn statistics(dir: &ControlDir, target: Target, full: bool) -> Result<String, Error> {
    let request = Request::Stats { minor: target.minor };
    match client::call(dir, target.pid, &request, Some(QUICK))? {
        Reply::Stats(stats) if full => Ok(format!("{}\n", stats::full(&stats))),
        Reply::Stats(stats) => Ok(format!("{}\n\n", stats::xenserver(&stats))),
        _ => Err(Error::Unexpected { pid: target.pid }),
    }
}

fn resize(dir: &ControlDir, target: Target, size: Option<u64>) -> Result<(), Error> {
    let request = Request::Resize { minor: target.minor, size };
    match client::call(dir, target.pid, &request, None)? {
        Reply::DiskInfo(_) => Ok(()),
        _ => Err(Error::Unexpected { pid: target.pid }),
    }
}

/// allocate, spawn, attach, open; whatever was made is undone when a later step fails.
fn create(
    config: &Config,
    opening: &Opening,
    engine: Option<&'static str>,
    stdin: &mut dyn Read,
) -> Result<Minor, Failure> {
    let what = || format!("create {}", opening.params.image);
    let params = with_key(opening, stdin).map_err(because(what()))?;
    let minor = minors::allocate(&config.dir).map_err(because(what()))?;
    match serve_new(config, minor, &params, engine) {
        Ok(()) => Ok(minor),
        Err(error) => {
            // The first failure is the one to tell.
            if let Err(error) = minors::free(&config.dir, minor) {
                log::warn!("minor {minor} stays allocated: {error}");
            }
            Err(because(what())(error))
        }
    }
}

fn serve_new(
    config: &Config,
    minor: Minor,
    params: &OpenParams,
    engine: Option<&'static str>,
) -> Result<(), Error> {
    let mut child = spawn(&config.dir, &config.tapdisk, &options(engine))?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    let target = Target { pid, minor };
    if let Err(error) = order(&config.dir, target, &Request::Attach { minor }, None) {
        // Without a minor it would wait for ever.
        end(&mut child);
        return Err(error);
    }
    if let Err(error) = open(&config.dir, target, params) {
        if let Err(error) = order(&config.dir, target, &Request::Detach { minor }, None) {
            log::warn!("tapdisk {pid} does not give up minor {minor}: {error}");
            end(&mut child);
        }
        return Err(error);
    }
    Ok(())
}

/// Ends a tapdisk of our own that never served anything.
fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        log::warn!("tapdisk {} does not end: {error}", child.id());
    }
}

/// close, detach, free.
fn destroy(dir: &ControlDir, target: Target, limit: Option<Duration>) -> Result<(), Failure> {
    take_away(dir, target, |target| close_and_detach(dir, target, limit))
}

/// Has a disk closed, and frees its minor. A tapdisk that has ended has closed and detached everything: then only the marker is
/// left. Unless another one has gone on with its disk, of which the caller does not know yet, or is just about to; and the
/// system closes a dead process's files one after the other, so that the marker may be locked when the control socket is gone.
fn take_away(
    dir: &ControlDir,
    target: Target,
    close: impl Fn(Target) -> Result<(), Error>,
) -> Result<(), Failure> {
    let end = Instant::now() + DYING;
    loop {
        let target = upgrade::successor(dir, target);
        let what = || because(with_target("destroy", target));
        close(target).map_err(what())?;
        match minors::free(dir, target.minor) {
            Err(Error::MinorInUse { .. }) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other.map_err(what()),
        }
    }
}

fn close_and_detach(dir: &ControlDir, target: Target, limit: Option<Duration>) -> Result<(), Error> {
    let steps = [Request::Close { minor: target.minor }, Request::Detach { minor: target.minor }];
    for request in steps {
        match order(dir, target, &request, limit) {
            Err(error) if error.is_dead() => {
                log::info!("tapdisk {} is gone already: {error}", target.pid);
                break;
            }
            other => other?,
        }
    }
    Ok(())
}

fn listing(dir: &ControlDir, filter: &Filter, notes: &mut Vec<Error>) -> Result<Vec<Entry>, Failure> {
    let (mut entries, problems) = list::gather(dir, filter).map_err(because("list"))?;
    notes.extend(problems);
    entries.iter_mut().for_each(|entry| entry.add_uri(dir));
    Ok(entries)
}

fn metrics_once(dir: &ControlDir, notes: &mut Vec<Error>) -> Result<String, Failure> {
    let mut survey = survey(dir, &Filter::default()).map_err(because("metrics"))?;
    let text = metrics::text(&survey);
    notes.append(&mut survey.problems);
    Ok(text)
}

/// The commands that go on until they are ended; `None`: it is another one.
fn go_on(command: &Command, config: &Config, stdout: &mut dyn Write) -> Option<Result<(), Failure>> {
    let Config { dir, terminal, .. } = config;
    match command {
        Command::Top(options) => Some(top::run(dir, options, *terminal, stdout).map_err(because("top"))),
        Command::Metrics(Some(address)) => {
            let served = Listener::bind(address).and_then(|listener| serve(&listener, dir));
            let failed = |source| Error::File { action: "serve metrics on", path: address.into(), source };
            Some(served.map_err(failed).map_err(because("metrics")))
        }
        Command::NbdTls(door) => {
            Some(nbd_tls(dir, door, stdout).map_err(because(with_target("nbd-tls", door.target))))
        }
        _ => None,
    }
}

fn nbd_tls(dir: &ControlDir, wanted: &TlsDoor, stdout: &mut dyn Write) -> Result<(), Error> {
    let Target { pid, minor } = wanted.target;
    let door = Door::open(wanted.address, &wanted.certificates, dir.vbd_path(pid, minor))?;
    let served = door.address().and_then(|address| {
        writeln!(stdout, "nbds://{address}")?;
        stdout.flush()?;
        door.serve()
    });
    let path = wanted.address.to_string().into();
    served.map_err(|source| Error::File { action: "serve a disk at", path, source })
}

/// Control characters, which a path or a peer may contain, made visible.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() { line.extend(character.escape_default()) } else { line.push(character) }
    }
    line
}

/// Runs `tap-ctl` on the arguments and streams of this process.
pub fn main() -> u8 {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if args.iter().any(|arg| arg == "--debug") {
        // A second logger is impossible here, and without one only the extra words are missing.
        let _ = crate::logging::init("tap-ctl", crate::logging::Mode::Foreground, true);
    }
    let config = Config::installed(io::IsTerminal::is_terminal(&io::stdout()));
    let (mut stdin, mut stdout, mut stderr) = (io::stdin().lock(), io::stdout().lock(), io::stderr().lock());
    run(&args, &config, Streams { stdin: &mut stdin, stdout: &mut stdout, stderr: &mut stderr })
}

#[cfg(test)]
mod tests;
