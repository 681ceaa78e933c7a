//! What a journal says about the requests that the process before us left: a pure function of its words and the ring's
//! counter of responses.

use blkif::{Abi, RawRequest};

use super::layout::{self, FIRST_ENTRY, Head, State};

/// A request that was taken, and of whose answer the guest knows nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unanswered {
    /// The position at which it was taken.
    pub index: u32,
    /// The copy that was made of it then.
    pub request: RawRequest,
    pub(super) entry: u16,
}

/// Why a ring cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Disagreement {
    /// The journal is none of this ring.
    #[error("the journal belongs to another ring, or another release wrote it")]
    Foreign,
    /// The counter in the ring is none that was ever to stand there.
    #[error(
        "the ring says that {found} requests are answered, the journal {before} or {after}: the guest has changed it"
    )]
    Counter {
        /// What the ring says.
        found: u32,
        /// What the journal says it was last.
        before: u32,
        /// What it was about to be.
        after: u32,
    },
    /// A request was taken at a position that was not reached.
    #[error(
        "request {index} was taken, although the ring shows {taken} only: the guest has changed a counter"
    )]
    Ahead {
        /// Its position.
        index: u32,
        /// Where the next request would be taken.
        taken: u32,
    },
}

/// Finds the unanswered requests, in the order in which they were taken.
///
/// `rsp_prod` is the ring's counter of responses. A request is unanswered if it was taken, and no answer was written, or
/// it was written at a position that the counter has not passed.
///
/// # Errors
/// Ring and journal contradict each other, which no death of a process causes.
pub(super) fn decide(
    load: impl Fn(usize) -> u64,
    abi: Abi,
    slots: u32,
    rsp_prod: u32,
) -> Result<Vec<Unanswered>, Disagreement> {
    if load(layout::MAGIC_WORD) != layout::MAGIC || load(layout::SHAPE_WORD) != layout::shape(abi, slots) {
        return Err(Disagreement::Foreign);
    }
    let Head { before, after } = Head::unpack(load(layout::PUBLISHED_WORD));
    if rsp_prod != before && rsp_prod != after {
        return Err(Disagreement::Counter { found: rsp_prod, before, after });
    }
    let mut unanswered = Vec::new();
    for entry in 0..u16::try_from(slots).unwrap_or(u16::MAX) {
        let at = layout::entry(entry);
        let open = match State::unpack(load(at)) {
            State::Free => false,
            State::Taken => true,
            State::Answered(position) => is_at_or_after(position, rsp_prod),
        };
        if open {
            let index = layout::index(load(at + 1));
            unanswered.push(Unanswered { index, request: layout::request(&load, at, abi), entry });
        }
    }
    // No underflow of what matters: there are at most `slots` of them.
    let taken = rsp_prod.wrapping_add(u32::try_from(unanswered.len()).unwrap_or(u32::MAX));
    if let Some(ahead) = unanswered.iter().find(|one| is_at_or_after(one.index, taken)) {
        return Err(Disagreement::Ahead { index: ahead.index, taken });
    }
    // Oldest first. The positions run freely, so what counts is how far behind the next one they are.
    unanswered.sort_by_key(|one| std::cmp::Reverse(taken.wrapping_sub(one.index)));
    Ok(unanswered)
}

/// Whether one position of a counter that runs freely is another, or comes after it.
fn is_at_or_after(position: u32, other: u32) -> bool {
    position.wrapping_sub(other) < 1 << 31
}

const _: () = assert!(FIRST_ENTRY > layout::PUBLISHED_WORD);
