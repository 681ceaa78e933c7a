//! The course of things: survey, wait, survey, show.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::screen::{Event, Screen};
use super::{Options, Row, Sort, rates, table};
use crate::dir::ControlDir;
use crate::error::Error;
use crate::survey::{Survey, survey};

/// The longest time to the first table of a screen.
const FIRST: Duration = Duration::from_secs(1);

/// Shows tables until the times are over or the user ends it: on the terminal if there is one, else on `stdout`.
///
/// # Errors
///
/// When the runtime folder cannot be read, or nothing can be shown.
pub fn run(dir: &ControlDir, options: &Options, terminal: bool, stdout: &mut dyn Write) -> Result<(), Error> {
    if options.batch || !terminal {
        return batch(dir, options, stdout);
    }
    interact(dir, options)
}

fn shown(source: io::Error) -> Error {
    Error::File { action: "write to", path: "standard output".into(), source }
}

fn batch(dir: &ControlDir, options: &Options, stdout: &mut dyn Write) -> Result<(), Error> {
    let mut before = survey(dir, &options.filter)?;
    for time in 0u32.. {
        if options.times.is_some_and(|times| time >= times) {
            break;
        }
        std::thread::sleep(options.delay);
        let now = survey(dir, &options.filter)?;
        let mut text = table::lines(
            &rates(&before, &now, options.sort),
            now.problems.len(),
            options.sort,
            table::COLUMNS,
        )
        .join("\n");
        text.push_str(if options.times == Some(time + 1) { "\n" } else { "\n\n" });
        stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(shown)?;
        before = now;
    }
    Ok(())
}

/// Signals that end or stop a program, and the one of another size, as something to wait for: so the terminal is given back
/// whatever ends us.
fn signals() -> io::Result<SignalFd> {
    let mut mask = SigSet::empty();
    for signal in
        [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGWINCH]
    {
        mask.add(signal);
    }
    mask.thread_block()?;
    Ok(SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

fn interact(dir: &ControlDir, options: &Options) -> Result<(), Error> {
    let signals = signals().map_err(shown)?;
    let mut before = survey(dir, &options.filter)?;
    let mut screen = Screen::open().map_err(shown)?;
    let mut sort = options.sort;
    let mut left = options.times;
    let mut now: Option<Survey> = None;
    let mut due = Instant::now() + options.delay.min(FIRST);
    while left != Some(0) {
        let rows: Vec<Row> = now.as_ref().map(|now| rates(&before, now, sort)).unwrap_or_default();
        let problems = now.as_ref().map_or(0, |now| now.problems.len());
        screen.show(now.is_some().then_some((&rows, problems)), sort).map_err(shown)?;
        match screen.wait(&signals, due).map_err(shown)? {
            Event::End => return Ok(()),
            Event::Key(key) => sort = Sort::key(key).unwrap_or(sort),
            Event::Redraw => {}
            Event::Due => {
                let next = survey(dir, &options.filter)?;
                if let Some(last) = now.replace(next) {
                    before = last;
                }
                due = Instant::now() + options.delay;
                left = left.map(|left| left - 1);
            }
        }
    }
    Ok(())
}
