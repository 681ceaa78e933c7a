//! What a ring's requests are until they are answered, in memory that outlives the process.
//!
//! A ring alone cannot be taken over from a process that died: a response goes into the place of the oldest request
//! without one, not into that of the request it answers, so the ring may have lost requests that were not answered. So
//! the process that serves a ring keeps a copy of each request in a file on a file system in memory, and the one that
//! takes over reads it.
//!
//! Order is everything, because a process may die between any two stores:
//!
//! 1. [`Journal::take`]: the copy is complete before the entry says that the request was taken.
//! 2. [`Journal::answer`]: the entry says at which position of the ring the answer stands before
//! 3. [`Journal::publish`] notes what the ring's counter of responses is to be, and before the ring's owner stores that counter,
//!    which is the one store by which requests become answered.
//! 4. [`Journal::published`]: entries are used again only now.
//!
//! So a request is executed at least once, answered exactly once, and never executed again once the guest has seen its
//! answer: a guest may use a sector again then. What is executed twice is a read, write, flush or discard whose answer nobody
//! saw, and these may be repeated.
//!
//! Costs: a request is written to two cache lines, with no system call, lock or allocation.

mod layout;
mod recover;

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use blkif::{Abi, RawRequest};

use self::layout::{Head, State};
pub use self::recover::{Disagreement, Unanswered};
use crate::porter::{self, How};
use crate::words::Words;

/// The place of a request in a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(u16);

/// Requests to be served again, oldest first, each with the place that it keeps.
pub type Replay = VecDeque<(Entry, RawRequest)>;

/// The journal of one ring.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    words: Words,
    /// The ring's counter of responses as it was stored last.
    published: u32,
    /// The last one freed is used first: it is in the processor's cache.
    free: Vec<u16>,
    /// Answered, and not published.
    answered: Vec<u16>,
}

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The file cannot be used.
    #[error("cannot use the journal {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It does not fit the ring.
    #[error(transparent)]
    Disagreement(#[from] Disagreement),
}

impl Journal {
    /// An empty journal, in place of one that may be there, for a ring with so many slots whose counter of responses is
    /// `responses`.
    ///
    /// # Errors
    /// What the system says, for example ENOSPC.
    pub fn create(path: &Path, abi: Abi, slots: u32, responses: u32) -> io::Result<Journal> {
        let words = Words::create(path, layout::words(slots))?;
        words.store(layout::SHAPE_WORD, layout::shape(abi, slots));
        words.store(layout::PUBLISHED_WORD, Head { before: responses, after: responses }.pack());
        words.store(layout::MAGIC_WORD, layout::MAGIC);
        Ok(Journal::over(path, words, slots, responses))
    }

    /// The journal that another process left, and its requests that have no answer. `responses` is the ring's counter, read once. `None`: there is none, so nothing was taken.
    ///
    /// # Errors
    /// It cannot be read, or contradicts the ring.
    pub fn resume(
        path: &Path,
        abi: Abi,
        slots: u32,
        responses: u32,
    ) -> Result<Option<(Journal, Replay)>, ResumeError> {
        let words = match Words::open(path, layout::words(slots)) {
            Ok(words) => words,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ResumeError::File { path: path.to_owned(), source }),
        };
        let unanswered = recover::decide(|index| words.load(index), abi, slots, responses)?;
        let mut journal = Journal::over(path, words, slots, responses);
        journal.adopt(&unanswered, responses);
        Ok(Some((journal, unanswered.iter().map(|one| (Entry(one.entry), one.request)).collect())))
    }

    fn over(path: &Path, words: Words, slots: u32, published: u32) -> Journal {
        let slots = u16::try_from(slots).unwrap_or(u16::MAX);
        Journal {
            path: path.to_owned(),
            words,
            published,
            free: (0..slots).rev().collect(),
            answered: Vec::with_capacity(usize::from(slots)),
        }
    }

    /// Forgets the other process's answers. If we die in the middle of this, what is found next is the same.
    fn adopt(&mut self, unanswered: &[Unanswered], responses: u32) {
        self.free.retain(|entry| !unanswered.iter().any(|one| one.entry == *entry));
        for entry in &self.free {
            self.words.store(layout::entry(*entry), State::Free.pack());
        }
        for one in unanswered {
            self.words.store(layout::entry(one.entry), State::Taken.pack());
        }
        let head = Head { before: responses, after: responses };
        self.words.store(layout::PUBLISHED_WORD, head.pack());
    }

    /// Whether a request may be taken. If not, answers have to be published first.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Notes a request that is taken at a position. `None`: there is no room, and it must not be taken.
    pub fn take(&mut self, index: u32, request: &RawRequest) -> Option<Entry> {
        let entry = self.free.pop()?;
        let at = layout::entry(entry);
        for (number, word) in layout::request_words(request).enumerate() {
            self.words.store(at + 2 + number, word);
        }
        self.words.store(at + 1, u64::from(index));
        self.words.store(at, State::Taken.pack());
        Some(Entry(entry))
    }

    /// Notes that the answer to a request is going to stand at a position of the ring.
    pub fn answer(&mut self, entry: Entry, position: u32) {
        self.words.store(layout::entry(entry.0), State::Answered(position).pack());
        self.answered.push(entry.0);
    }

    /// Notes what the ring's counter of responses is to be. Right before it is stored.
    pub fn publish(&mut self, responses: u32) {
        let head = Head { before: self.published, after: responses };
        self.words.store(layout::PUBLISHED_WORD, head.pack());
        self.published = responses;
    }

    /// The ring's counter was stored.
    pub fn published(&mut self) {
        for entry in self.answered.drain(..) {
            self.words.store(layout::entry(entry), State::Free.pack());
            self.free.push(entry);
        }
    }

    /// Removes the file: the ring is not served any more, and nobody is to take it over.
    pub fn remove(self) {
        if let Err(error) = porter::remove(&self.path) {
            log::warn!("cannot remove the journal {}: {error}", self.path.display());
        }
    }
}

/// How many responses the owner of a journal has published, modulo 2³²; for judging whether a disk makes progress. `None`: it
/// cannot be told.
pub fn responses(path: &Path) -> Option<u32> {
    let mut bytes = Vec::new();
    porter::open(path, How::READ).ok()?.read_to_end(&mut bytes).ok()?;
    let (words, _) = bytes.as_chunks::<8>();
    let word = |index: usize| words.get(index).map(|word| u64::from_ne_bytes(*word));
    (word(layout::MAGIC_WORD)? == layout::MAGIC)
        .then(|| word(layout::PUBLISHED_WORD).map(|word| Head::unpack(word).after))?
}

#[cfg(test)]
mod tests;
