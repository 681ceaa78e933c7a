//! What the replies to one request may say, and what has come so far.

use std::ops::Range;

use crate::error::ErrorCode;
use crate::wire::{Command, Extent, Fixed, Hole, chunk};

/// Runs of bytes that have come apart from each other, at most; replies in order need one.
const MAX_RUNS: usize = 1024;

/// Chunks that bring nothing, at most: errors beside the first.
const MAX_IDLE: u32 = 64;

/// The longest content of a chunk that is kept whole, in bytes: a list of extents.
pub(super) const MAX_KEPT: u32 = 64 << 10;

/// The server breaks the protocol: nothing that follows in the stream can be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the NBD server breaks the protocol: {0}")]
pub struct Violation(pub &'static str);

/// How the content of a chunk is to be dealt with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// These bytes of the request's memory follow in the stream.
    Data(Range32),
    /// These bytes of the request's memory are zeros.
    Zero(Range32),
    /// Nothing for the caller; so many bytes of text are to be skipped.
    Nothing {
        /// Bytes.
        skip: u32,
    },
}

/// A range of a request's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range32 {
    /// Counted from the request's first.
    pub at: u32,
    /// Not 0.
    pub len: u32,
}

/// A request that has been sent, and what has come for it.
#[derive(Debug)]
pub(super) struct Pending {
    pub command: Command,
    offset: u64,
    len: u32,
    error: Option<ErrorCode>,
    /// What has come, sorted, not touching each other.
    runs: Vec<Range<u32>>,
    idle: u32,
    pub extents: Option<Vec<Extent>>,
}

impl Pending {
    pub fn new(command: Command, offset: u64, len: u32) -> Pending {
        Pending { command, offset, len, error: None, runs: Vec::new(), idle: 0, extents: None }
    }

    /// A simple reply: the bytes of payload that follow it.
    pub fn simple(&mut self, error: Option<ErrorCode>, structured: bool) -> Result<u32, Violation> {
        match (self.command, error) {
            (Command::Read | Command::BlockStatus, _) if structured => {
                Err(Violation("a simple reply where chunks were agreed on"))
            }
            (Command::BlockStatus, None) => Err(Violation("a block status without extents")),
            (Command::Read, None) => {
                self.arrived(0, self.len)?;
                Ok(self.len)
            }
            (_, error) => {
                self.error = error;
                Ok(0)
            }
        }
    }

    /// How many bytes of a chunk's content must be there before [`Pending::chunk`] can judge it.
    pub fn wants(&self, kind: u16, len: u32) -> Result<u32, Violation> {
        let (least, most, wants) = match kind {
            chunk::NONE => (0, 0, 0),
            chunk::DATA => (9, u32::MAX, 8),
            chunk::HOLE => (12, 12, 12),
            chunk::BLOCK_STATUS => (12, MAX_KEPT, len),
            chunk::ERROR => (6, MAX_KEPT, 6),
            chunk::ERROR_OFFSET => (14, MAX_KEPT, 6),
            // An error of a kind that is not known still begins as one.
            _ if kind >= 1 << 15 => (6, MAX_KEPT, 6),
            _ => return Err(Violation("a chunk of an unknown kind")),
        };
        if (least..=most).contains(&len) {
            Ok(wants)
        } else {
            Err(Violation("a chunk of an impossible length"))
        }
    }

    /// Judges a chunk by the first bytes of its content.
    pub fn chunk(
        &mut self,
        (kind, len): (u16, u32),
        done: bool,
        bytes: &[u8],
        context: Option<u32>,
    ) -> Result<Content, Violation> {
        const SHORT: Violation = Violation("a short chunk");
        match (kind, self.command) {
            (chunk::NONE, _) if done => Ok(Content::Nothing { skip: 0 }),
            (chunk::NONE, _) => Err(Violation("an empty chunk that is not the last")),
            (chunk::DATA, Command::Read) => {
                let (offset, _) = bytes.split_first_chunk::<8>().ok_or(SHORT)?;
                let range = self.inside(u64::from_be_bytes(*offset), len.saturating_sub(8))?;
                Ok(Content::Data(range))
            }
            (chunk::HOLE, Command::Read) => {
                let hole = Hole::take(bytes).ok_or(SHORT)?;
                let range = self.inside(hole.offset.get(), hole.len.get())?;
                Ok(Content::Zero(range))
            }
            (chunk::BLOCK_STATUS, Command::BlockStatus) => {
                self.status(bytes, context)?;
                Ok(Content::Nothing { skip: 0 })
            }
            (chunk::DATA | chunk::HOLE | chunk::BLOCK_STATUS, _) => {
                Err(Violation("a chunk that does not fit its request"))
            }
            _ => self.failed(len, bytes),
        }
    }

    fn failed(&mut self, len: u32, bytes: &[u8]) -> Result<Content, Violation> {
        let (number, rest) = bytes.split_first_chunk::<4>().ok_or(Violation("a short chunk"))?;
        let text = rest.first_chunk::<2>().map_or(0, |text| u32::from(u16::from_be_bytes(*text)));
        let skip = len.saturating_sub(6);
        if text > skip {
            return Err(Violation("an error text longer than its chunk"));
        }
        let error = ErrorCode::from_wire(u32::from_be_bytes(*number))
            .ok_or(Violation("an error chunk without error"))?;
        self.error.get_or_insert(error);
        self.idle = self.idle.saturating_add(1);
        if self.idle > MAX_IDLE {
            return Err(Violation("endless chunks"));
        }
        Ok(Content::Nothing { skip })
    }

    /// Bytes at a position of the disk, as a range of the request that has not come before.
    fn inside(&mut self, offset: u64, len: u32) -> Result<Range32, Violation> {
        const OUTSIDE: Violation = Violation("a chunk outside of its request");
        let at = offset.checked_sub(self.offset).and_then(|at| u32::try_from(at).ok()).ok_or(OUTSIDE)?;
        let end = at.checked_add(len).filter(|&end| end <= self.len).ok_or(OUTSIDE)?;
        if len == 0 {
            return Err(Violation("an empty chunk"));
        }
        self.arrived(at, end)?;
        Ok(Range32 { at, len })
    }

    /// Notes that bytes `at..end` have come, for the first time.
    fn arrived(&mut self, at: u32, end: u32) -> Result<(), Violation> {
        // The first run that ends behind the beginning of this one, and the one before it.
        let next = self.runs.partition_point(|run| run.end <= at);
        let full = self.runs.len() >= MAX_RUNS;
        let (before, after) = self.runs.split_at_mut(next);
        let (before, after) = (before.last_mut().filter(|run| run.end == at), after.first_mut());
        match (before, after) {
            (_, Some(run)) if run.start < end => return Err(Violation("two chunks with the same bytes")),
            (Some(before), Some(after)) if after.start == end => {
                before.end = after.end;
                self.runs.remove(next);
            }
            (Some(run), _) => run.end = end,
            (None, Some(run)) if run.start == end => run.start = at,
            (None, _) if full => {
                return Err(Violation("a reply in too many pieces"));
            }
            (None, _) => self.runs.insert(next, at..end),
        }
        Ok(())
    }

    fn status(&mut self, bytes: &[u8], context: Option<u32>) -> Result<(), Violation> {
        let (number, list) = bytes.split_first_chunk::<4>().ok_or(Violation("a short chunk"))?;
        if Some(u32::from_be_bytes(*number)) != context || self.extents.is_some() {
            return Err(Violation("a block status that was not asked for"));
        }
        if !list.len().is_multiple_of(Extent::LEN) {
            return Err(Violation("a list of extents of an impossible length"));
        }
        let mut extents = Vec::new();
        let mut left = self.len;
        for extent in list.chunks_exact(Extent::LEN).filter_map(Extent::take) {
            if extent.len.get() == 0 {
                return Err(Violation("an extent without length"));
            }
            if left == 0 {
                return Err(Violation("extents behind the end of the request"));
            }
            // The last one may reach beyond what was asked for.
            let len = extent.len.get().min(left);
            left = left.saturating_sub(len);
            extents.push(Extent { len: len.into(), ..extent });
        }
        self.extents = Some(extents);
        Ok(())
    }

    /// The reply is complete.
    pub fn finish(self) -> Result<Result<Vec<Extent>, ErrorCode>, Violation> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        match self.command {
            // What did not come is never taken for zeros.
            Command::Read if self.runs.first() != Some(&(0..self.len)) => {
                Err(Violation("a reply that lacks bytes"))
            }
            Command::BlockStatus if self.extents.is_none() => {
                Err(Violation("a block status without extents"))
            }
            _ => Ok(Ok(self.extents.unwrap_or_default())),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against one flag for each byte.
        #[test]
        fn bytes_come_once_and_completeness_is_known(parts in prop::collection::vec((0_u32..40, 0_u32..12), 0..30)) {
            let mut pending = Pending::new(Command::Read, 1000, 40);
            let mut seen = [false; 40];
            for (at, len) in parts {
                let range = at as usize..(at + len) as usize;
                let fits = len > 0 && range.end <= 40 && !seen[range.clone()].contains(&true);
                prop_assert_eq!(pending.inside(1000 + u64::from(at), len).is_ok(), fits);
                if !fits {
                    return Ok(());
                }
                seen[range].fill(true);
            }
            prop_assert_eq!(pending.finish().is_ok(), !seen.contains(&false));
        }
    }
}
