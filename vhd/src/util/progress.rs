//! How far long work is.

use std::io::{IsTerminal, Write};

/// Writes a percentage to the output each time it changes.
pub(super) struct Percent<'a> {
    out: &'a mut dyn Write,
    shown: Option<u64>,
    wanted: bool,
}

impl<'a> Percent<'a> {
    /// Shows it if `asked`.
    pub(super) fn new(asked: bool, out: &'a mut dyn Write) -> Self {
        Self { out, shown: None, wanted: asked }
    }

    /// Shows it to whoever sits at the terminal.
    pub(super) fn at_terminal(out: &'a mut dyn Write) -> Self {
        Self::new(std::io::stdout().is_terminal(), out)
    }

    pub(super) fn show(&mut self, done: u64, of: u64) {
        if !self.wanted {
            return;
        }
        // In hundredths of a percent; a disk is far too small for an overflow.
        let hundredths = done.saturating_mul(10_000).checked_div(of).unwrap_or(10_000);
        if self.shown != Some(hundredths) {
            self.shown = Some(hundredths);
            let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
            // Work does not stop because nobody can be told of it.
            let _ = write!(self.out, "\r{text:>6}%").and_then(|()| self.out.flush());
        }
    }

    /// Ends the line.
    pub(super) fn end(self) {
        if self.wanted {
            let _ = writeln!(self.out, "\r100.00%").and_then(|()| self.out.flush());
        }
    }
}
