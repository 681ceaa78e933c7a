//! The terminal: its alternate screen, its size, single keys.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::signalfd::SignalFd;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::{Row, Sort, table};

/// What the user did, or the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A key was pressed.
    Key(char),
    /// It is time for the next survey.
    Due,
    /// The terminal has another size.
    Redraw,
    /// No more.
    End,
}

/// The terminal, in our hands until this is dropped.
pub(super) struct Screen {
    before: Termios,
}

/// The alternate screen, without a cursor and without wrapping lines.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";

impl Screen {
    /// Takes the terminal of standard input and output.
    pub(super) fn open() -> io::Result<Screen> {
        let before = tcgetattr(io::stdin())?;
        let mut modes = before.clone();
        // Keys at once, and not shown; keys that send signals still do.
        modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
        tcsetattr(io::stdin(), OptionalActions::Now, &modes)?;
        let screen = Screen { before };
        put(ENTER)?;
        Ok(screen)
    }

    /// Shows a table, or that there is none yet.
    pub(super) fn show(&mut self, table: Option<(&Vec<Row>, usize)>, sort: Sort) -> io::Result<()> {
        let size = tcgetwinsize(io::stdout())?;
        let (columns, height) = (usize::from(size.ws_col), usize::from(size.ws_row));
        let mut lines = match table {
            Some((rows, problems)) => table::lines(rows, problems, sort, columns),
            None => vec!["measuring".to_owned()],
        };
        lines.truncate(height.saturating_sub(1));
        let mut text = String::from("\x1b[H");
        for line in lines {
            text += &line;
            text += "\x1b[K\r\n";
        }
        text += "\x1b[J";
        text += &keys();
        text += "\x1b[K";
        put(&text)
    }

    /// Waits for a key, a signal, or that time.
    pub(super) fn wait(&self, signals: &SignalFd, due: Instant) -> io::Result<Event> {
        let stdin = io::stdin();
        let mut ready =
            [PollFd::new(stdin.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Event::Due);
        }
        // Rounded up, so that it is time when this ends.
        let left = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut ready, left) {
            Err(Errno::EINTR) => return Ok(Event::Redraw),
            result => result?,
        };
        let [stdin_ready, signalled] = ready.map(|fd| fd.any().unwrap_or(false));
        if signalled {
            let signal = signals.read_signal()?.map(|signal| signal.ssi_signo);
            let resized = signal == Some(Signal::SIGWINCH as u32);
            return Ok(if resized { Event::Redraw } else { Event::End });
        }
        if !stdin_ready {
            return Ok(Event::Redraw);
        }
        let mut bytes = [0; 16];
        match nix::unistd::read(io::stdin(), &mut bytes)? {
            0 => Ok(Event::End),
            // Of a sequence of bytes, such as an arrow key's, nothing is meant for us.
            1 => Ok(match char::from(bytes[0]) {
                'q' | 'Q' => Event::End,
                key => Event::Key(key),
            }),
            _ => Ok(Event::Redraw),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing back.
        let _ = put(LEAVE);
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

fn put(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

fn keys() -> String {
    let sorts: Vec<String> = Sort::ALL.iter().map(|(_, key, name)| format!("{key} {name}")).collect();
    format!("sort by {}   q quit", sorts.join(", "))
}
