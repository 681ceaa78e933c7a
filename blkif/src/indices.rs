//! The ring's counters and its notification protocol.
//!
//! A ring is two queues in one array of slots. Each end owns one producer counter and one event counter in the shared
//! header; all four run freely modulo 2³². An end that goes to sleep stores in its event counter the position at which
//! it wants to be woken, and the producer notifies when its counter passes that position. Both directions are the
//! same protocol, so both are made of [`publish`] and [`arm`].
//!
//! Source: `ring.h`, `RING_PUSH_*_AND_CHECK_NOTIFY` and `RING_FINAL_CHECK_FOR_*`.
//!
//! This module touches no memory but the words it is given. [`crate::ring`] lays it over a shared page, the loom test
//! over model-checked atomics.

use crate::sync::{AtomicU32, Ordering, fence};

/// The four counters of the shared header. The other domain may change any of them at any time.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a> {
    /// Requests produced; written by the frontend.
    pub req_prod: &'a AtomicU32,
    /// Where the backend wants to be notified of requests; written by the backend.
    pub req_event: &'a AtomicU32,
    /// Responses produced; written by the backend.
    pub rsp_prod: &'a AtomicU32,
    /// Where the frontend wants to be notified of responses; written by the frontend.
    pub rsp_event: &'a AtomicU32,
}

/// Makes the entries from `old` to `new` visible to the other end; true if it asked to be notified of one of them.
///
/// The Release store orders the entries before the counter. The fence orders the counter before the read of `event`:
/// without it this end could read a stale event position while the other end, having armed it, reads a stale counter,
/// and both would sleep.
pub fn publish(prod: &AtomicU32, event: &AtomicU32, old: u32, new: u32) -> bool {
    prod.store(new, Ordering::Release);
    fence(Ordering::SeqCst);
    let wanted = event.load(Ordering::Relaxed);
    new.wrapping_sub(wanted) < new.wrapping_sub(old)
}

/// Asks to be notified of the entry after `cons`, and returns the other end's counter as it is now.
///
/// If the result differs from `cons`, work came in before the request for notification was in place: do not sleep.
pub fn arm(prod: &AtomicU32, event: &AtomicU32, cons: u32) -> u32 {
    event.store(cons.wrapping_add(1), Ordering::Relaxed);
    // Pairs with the fence in `publish`: see there.
    fence(Ordering::SeqCst);
    prod.load(Ordering::Acquire)
}

/// The ring cannot be attached: more requests are unanswered than it has slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the ring shows {} unanswered requests but has {slots} slots (req_prod {req_prod}, rsp_prod {rsp_prod}): the \
     frontend set it up wrongly",
    req_prod.wrapping_sub(*rsp_prod)
)]
pub struct AttachError {
    /// The frontend's counter.
    pub req_prod: u32,
    /// The backend's counter as found in the ring.
    pub rsp_prod: u32,
    /// Slots of the ring.
    pub slots: u32,
}

/// The frontend moved its request counter to where it cannot be. The ring stays unusable until it is attached anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "req_prod {req_prod} is impossible with {req_cons} requests taken, {outstanding} of them unanswered, and {slots} \
     slots: the frontend is broken or hostile, its ring is no longer served"
)]
pub struct RingBroken {
    /// The frontend's counter.
    pub req_prod: u32,
    /// Requests taken so far.
    pub req_cons: u32,
    /// Requests taken and not answered.
    pub outstanding: u32,
    /// Slots of the ring.
    pub slots: u32,
}

/// The backend's private counters.
///
/// What this end wrote to the header is never read back after [`BackIndices::attach`]: the frontend can scribble on
/// `rsp_prod` and `req_event` as it likes and harms only itself.
#[derive(Debug)]
pub struct BackIndices {
    slots: u32,
    /// Next request to take.
    req_cons: u32,
    /// `req_prod` as last read, and checked.
    req_seen: u32,
    /// Next response to write.
    rsp_next: u32,
    /// `rsp_prod` as last published.
    rsp_pushed: u32,
    /// Whether the frontend was notified of the last published response.
    notified: bool,
    broken: Option<RingBroken>,
}

impl BackIndices {
    /// Takes up a ring of `slots` entries (a power of two) at the last response found in it.
    ///
    /// On a fresh ring that is 0. On one that another backend left, every request without a response is taken again.
    pub fn attach(words: Words<'_>, slots: u32) -> Result<BackIndices, AttachError> {
        let rsp_prod = words.rsp_prod.load(Ordering::Relaxed);
        let req_prod = words.req_prod.load(Ordering::Relaxed);
        if req_prod.wrapping_sub(rsp_prod) > slots {
            return Err(AttachError { req_prod, rsp_prod, slots });
        }
        Ok(BackIndices {
            slots,
            req_cons: rsp_prod,
            req_seen: rsp_prod,
            rsp_next: rsp_prod,
            rsp_pushed: rsp_prod,
            // A frontend that waited through the change of backends may have missed the last one's notification.
            notified: false,
            broken: None,
        })
    }

    /// Counts `unanswered` requests as taken, for a backend that kept copies of them when another one took them. Right
    /// after [`BackIndices::attach`], before anything else.
    ///
    /// # Errors
    ///
    /// They are more than the ring has slots, or the frontend's counter is behind them: the frontend changed a counter
    /// that was ours. The ring is broken from now on.
    pub fn resume(&mut self, words: Words<'_>, unanswered: u32) -> Result<(), RingBroken> {
        self.req_cons = self.rsp_next.wrapping_add(unanswered);
        self.req_seen = self.req_cons;
        let req_prod = words.req_prod.load(Ordering::Acquire);
        if unanswered > self.slots {
            let broken =
                RingBroken { req_prod, req_cons: self.req_cons, outstanding: unanswered, slots: self.slots };
            self.broken = Some(broken);
            return Err(broken);
        }
        self.observe(req_prod)
    }

    /// Slots of the ring.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// The position of the next request to take.
    pub fn next_request(&self) -> u32 {
        self.req_cons
    }

    /// The position of the next response to write.
    pub fn next_response(&self) -> u32 {
        self.rsp_next
    }

    /// Requests taken and not answered.
    pub fn outstanding(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_next)
    }

    /// The position of the next request, which counts as taken from now on. Its entry may be read until it is answered.
    pub fn take(&mut self, words: Words<'_>) -> Result<Option<u32>, RingBroken> {
        if !self.has_unconsumed(words)? {
            return Ok(None);
        }
        let position = self.req_cons;
        self.req_cons = position.wrapping_add(1);
        Ok(Some(position))
    }

    /// Whether there is a request to take. Reads the shared counter only when all requests seen so far are taken.
    pub fn has_unconsumed(&mut self, words: Words<'_>) -> Result<bool, RingBroken> {
        if self.req_cons == self.req_seen {
            // Acquire: the entries are read after the counter that covers them.
            self.observe(words.req_prod.load(Ordering::Acquire))?;
        }
        self.intact()?;
        Ok(self.req_cons != self.req_seen)
    }

    /// To be called when [`BackIndices::take`] found nothing, before sleeping. True: a request came in, do not sleep.
    /// False: the next request will be notified.
    pub fn final_check(&mut self, words: Words<'_>) -> Result<bool, RingBroken> {
        self.intact()?;
        if self.req_cons == self.req_seen {
            self.observe(arm(words.req_prod, words.req_event, self.req_cons))?;
        }
        Ok(self.req_cons != self.req_seen)
    }

    /// The position of the entry for the next response, which is published by the next [`BackIndices::push`].
    ///
    /// # Panics
    ///
    /// If every request taken has its response already. The entry could hold a request that was not taken yet, so an
    /// answer too many would destroy it.
    pub fn respond(&mut self) -> u32 {
        assert!(self.outstanding() > 0, "a response without an unanswered request");
        let position = self.rsp_next;
        self.rsp_next = position.wrapping_add(1);
        position
    }

    /// Publishes the responses written since the last push. True: notify the frontend.
    pub fn push(&mut self, words: Words<'_>) -> bool {
        if self.rsp_next == self.rsp_pushed {
            return false;
        }
        let old = std::mem::replace(&mut self.rsp_pushed, self.rsp_next);
        self.notified = publish(words.rsp_prod, words.rsp_event, old, self.rsp_next);
        self.notified
    }

    /// To be called before sleeping. True: notify the frontend although it did not ask in time.
    ///
    /// Some frontends (OpenBSD's `xbf`) publish a request first, store `rsp_event` afterwards and never look again. An
    /// answer that falls between the two stores is not notified by the letter of the protocol, and the guest would
    /// wait for ever. When everything is answered and the last push was not notified, a frontend that waits properly
    /// has `rsp_event` ahead of `rsp_prod`; any other gets one notification too many, once for each push.
    pub fn nudge(&mut self, words: Words<'_>) -> bool {
        if self.notified || self.outstanding() > 0 || self.rsp_next != self.rsp_pushed {
            return false;
        }
        let ahead = words.rsp_event.load(Ordering::Relaxed).wrapping_sub(self.rsp_pushed);
        self.notified = true;
        !(1..=self.slots).contains(&ahead)
    }

    /// Checks a value of `req_prod` and remembers it.
    ///
    /// The frontend may be ahead of what we took by the slots that hold no unanswered request, and by no more. A
    /// counter that went backwards is ahead by nearly 2³², so one comparison finds every impossible value.
    fn observe(&mut self, req_prod: u32) -> Result<(), RingBroken> {
        self.intact()?;
        let outstanding = self.outstanding();
        // No underflow: outstanding never exceeds slots, as only checked values of req_prod let req_cons advance.
        if req_prod.wrapping_sub(self.req_cons) > self.slots.saturating_sub(outstanding) {
            let broken = RingBroken { req_prod, req_cons: self.req_cons, outstanding, slots: self.slots };
            self.broken = Some(broken);
            return Err(broken);
        }
        self.req_seen = req_prod;
        Ok(())
    }

    fn intact(&self) -> Result<(), RingBroken> {
        self.broken.map_or(Ok(()), Err)
    }
}
