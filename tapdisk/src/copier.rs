//! Grant copies of all requests of a turn, in one call for each direction.
//!
//! A request adds its segments and waits; the worker runs the batch once, when no task can go on without it.
//!
//! Invariant: the local side of every queued segment lies in a [`Buf`] that the waiting request holds until its
//! [`Copy`](struct@Copy) has ended; one that is dropped early runs the batch first.
#![expect(unsafe_code, reason = "hands buffer addresses to the grant copy")]

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use gntdev::{CopyDirection, CopySegment, Grants};
use nix::errno::Errno;

use crate::buf::{Buf, Piece};
use crate::executor::{Scheduler, TaskId};

/// The batches of one worker thread.
pub struct Copier<G> {
    grants: G,
    scheduler: Rc<Scheduler>,
    from_guest: RefCell<Batch>,
    to_guest: RefCell<Batch>,
}

impl<G> fmt::Debug for Copier<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copier")
            .field("from_guest", &self.from_guest)
            .field("to_guest", &self.to_guest)
            .finish()
    }
}

#[derive(Debug, Default)]
struct Batch {
    segments: Vec<CopySegment>,
    parties: Vec<Party>,
    free: Vec<usize>,
    waiting: Vec<usize>,
}

/// One request's share of a batch.
#[derive(Clone, Copy, Debug)]
enum Party {
    Free,
    Waiting { task: Option<TaskId>, first: usize, count: usize },
    Ended(Result<(), Errno>),
}

impl<G: Grants> Copier<G> {
    /// A copier over an open grant device.
    pub fn new(grants: G, scheduler: Rc<Scheduler>) -> Copier<G> {
        Copier { grants, scheduler, from_guest: RefCell::default(), to_guest: RefCell::default() }
    }

    /// The grant device.
    pub fn grants(&self) -> &G {
        &self.grants
    }

    fn batch(&self, direction: CopyDirection) -> &RefCell<Batch> {
        match direction {
            CopyDirection::FromGuest => &self.from_guest,
            CopyDirection::ToGuest => &self.to_guest,
        }
    }

    /// Queues segments that all go in `direction` and whose local sides lie in `buf`.
    ///
    /// EIO if any of them fails; the others of the batch are not concerned. EINVAL, with nothing queued, for a segment
    /// of the other direction or with a local side outside `buf`.
    pub fn queue<'a>(
        &'a self,
        direction: CopyDirection,
        segments: impl Iterator<Item = CopySegment>,
        buf: &'a Buf,
    ) -> Result<Copy<'a, G>, Errno> {
        let mut batch = self.batch(direction).borrow_mut();
        let first = batch.segments.len();
        let (low, high) = match buf.piece(0..buf.len()) {
            Some(Piece { ptr, len, .. }) => {
                (ptr.addr().get() as u64, ptr.addr().get() as u64 + u64::from(len))
            }
            None => (0, 0),
        };
        for segment in segments {
            let inside = segment.local() >= low && segment.local() + u64::from(segment.len()) <= high;
            if !inside || segment.direction() != direction {
                batch.segments.truncate(first);
                return Err(Errno::EINVAL);
            }
            batch.segments.push(segment);
        }
        let count = batch.segments.len() - first;
        let party = Party::Waiting { task: None, first, count };
        let index = match batch.free.pop() {
            Some(index) => {
                batch.parties[index] = party;
                index
            }
            None => {
                batch.parties.push(party);
                let room = batch.parties.len();
                batch.free.reserve(room);
                batch.parties.len() - 1
            }
        };
        batch.waiting.push(index);
        Ok(Copy { copier: self, direction, index: Some(index), _buf: buf })
    }

    /// Runs what is queued. Returns whether anything was.
    pub fn run(&self) -> bool {
        let ran = self.run_one(CopyDirection::FromGuest);
        self.run_one(CopyDirection::ToGuest) || ran
    }

    fn run_one(&self, direction: CopyDirection) -> bool {
        let mut batch = self.batch(direction).borrow_mut();
        let Batch { segments, parties, waiting, .. } = &mut *batch;
        if waiting.is_empty() {
            return false;
        }
        // SAFETY: every local side lies in a buffer that its request holds until the copy has ended (invariant of this
        // file), and no I/O is in flight on it: the request waits here.
        let outcome = unsafe { self.grants.copy(direction, segments) };
        if let Err(error) = &outcome {
            log::debug!("grant copy of {} segments failed as a whole: {error}", segments.len());
        }
        for index in waiting.drain(..) {
            let Party::Waiting { task, first, count } = parties[index] else { continue };
            let okay = outcome.is_ok() && segments[first..first + count].iter().all(|s| s.status().is_okay());
            parties[index] = Party::Ended(if okay { Ok(()) } else { Err(Errno::EIO) });
            if let Some(task) = task {
                self.scheduler.wake(task);
            }
        }
        segments.clear();
        true
    }
}

/// A request's part of the batch; the future of its outcome.
#[must_use = "a copy that is dropped before its batch ran is not carried out"]
pub struct Copy<'a, G: Grants> {
    copier: &'a Copier<G>,
    direction: CopyDirection,
    index: Option<usize>,
    _buf: &'a Buf,
}

impl<G: Grants> fmt::Debug for Copy<'_, G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copy").field("index", &self.index).finish_non_exhaustive()
    }
}

impl<G: Grants> Future for Copy<'_, G> {
    type Output = Result<(), Errno>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(index) = self.index else { return Poll::Pending };
        let mut batch = self.copier.batch(self.direction).borrow_mut();
        match &mut batch.parties[index] {
            Party::Ended(result) => {
                let result = *result;
                batch.parties[index] = Party::Free;
                batch.free.push(index);
                drop(batch);
                self.index = None;
                Poll::Ready(result)
            }
            Party::Waiting { task, .. } => {
                *task = self.copier.scheduler.current();
                Poll::Pending
            }
            Party::Free => unreachable!("the share is ours until we give it back"),
        }
    }
}

impl<G: Grants> Drop for Copy<'_, G> {
    fn drop(&mut self) {
        let Some(index) = self.index else { return };
        let mut batch = self.copier.batch(self.direction).borrow_mut();
        if let Party::Waiting { .. } = batch.parties[index] {
            drop(batch);
            // Its segments point into a buffer that is given up next: run the batch now rather than edit it.
            self.copier.run_one(self.direction);
            batch = self.copier.batch(self.direction).borrow_mut();
        }
        batch.parties[index] = Party::Free;
        batch.free.push(index);
    }
}
