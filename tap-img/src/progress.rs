//! How far a long piece of work is.

use std::cell::Cell;
use std::io::{IsTerminal, Write};

/// Progress, shown as a line of the standard error output if that is a terminal.
#[derive(Debug)]
pub struct Progress {
    total: u64,
    done: Cell<u64>,
    /// Tenths of a percent on the screen; `None`: nothing is shown.
    shown: Cell<Option<u64>>,
}

impl Progress {
    /// Work of so many units.
    pub fn new(total: u64) -> Progress {
        let shown = std::io::stderr().is_terminal().then_some(u64::MAX);
        Progress { total, done: Cell::new(0), shown: Cell::new(shown) }
    }

    /// Progress that nobody sees.
    pub fn hidden() -> Progress {
        Progress { total: 0, done: Cell::new(0), shown: Cell::new(None) }
    }

    /// So many more units are done.
    pub fn add(&self, units: u64) {
        let done = self.done.get().saturating_add(units);
        self.done.set(done);
        let now = permille(done, self.total);
        if let Some(shown) = self.shown.get()
            && shown != now
        {
            self.shown.set(Some(now));
            // A terminal that takes no more text is no reason to stop.
            let _ = write!(std::io::stderr(), "\r{:3}.{} % ", now / 10, now % 10);
        }
    }

    /// Ends the line.
    pub fn end(&self) {
        if self.shown.take().is_some_and(|shown| shown != u64::MAX) {
            let _ = writeln!(std::io::stderr());
        }
    }
}

fn permille(done: u64, total: u64) -> u64 {
    let share = u128::from(done) * 1000 / u128::from(total.max(1));
    u64::try_from(share).unwrap_or(1000).min(1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_permilles_and_never_more_than_all() {
        assert_eq!([permille(0, 7), permille(1, 3), permille(7, 7), permille(9, 7)], [0, 333, 1000, 1000]);
        assert_eq!(permille(u64::MAX, u64::MAX), 1000);
        assert_eq!(permille(5, 0), 1000);
    }
}
