//! What has come and was not yet taken apart.

use std::cell::{Cell, RefCell};

use nbd::client::{Slot, Step};

use super::{Body, Broken, Connection};
use crate::buf::Buf;
use crate::io::Io;

/// Bytes received in one piece.
const ROOM: usize = 128 << 10;

/// What is still to come of data is received where it belongs from this size on, which saves copying it.
const DIRECT: usize = 16 << 10;

/// The stream of replies.
#[derive(Debug)]
pub struct Inbox {
    buffer: RefCell<Buf>,
    /// The bytes of it that were not taken.
    start: Cell<usize>,
    end: Cell<usize>,
    /// There is a reader.
    reading: Cell<bool>,
    /// What comes next, and the request that it belongs to.
    handed: RefCell<Option<(Slot, Step)>>,
}

/// The role of the reader, until it is dropped.
pub struct Role<'a>(&'a Inbox);

impl Drop for Role<'_> {
    fn drop(&mut self) {
        self.0.reading.set(false);
    }
}

impl Inbox {
    pub fn new(io: &Io) -> Option<Inbox> {
        Some(Inbox {
            buffer: RefCell::new(io.pool.data(ROOM)?),
            start: Cell::new(0),
            end: Cell::new(0),
            reading: Cell::new(false),
            handed: RefCell::default(),
        })
    }

    /// Whether the task of this request may become the reader.
    pub fn is_free_for(&self, slot: Slot) -> bool {
        !self.reading.get() && self.handed.borrow().as_ref().is_none_or(|(other, _)| *other == slot)
    }

    pub fn is_being_read(&self) -> bool {
        self.reading.get()
    }

    pub fn begin(&self) -> Role<'_> {
        self.reading.set(true);
        Role(self)
    }

    /// Leaves the next step to the task of a request.
    pub fn hand(&self, step: Step, slot: Slot) {
        *self.handed.borrow_mut() = Some((slot, step));
    }

    fn len(&self) -> usize {
        self.end.get() - self.start.get()
    }

    fn taken(&self, count: usize) {
        self.start.set(self.start.get() + count);
    }
}

impl Connection {
    /// What comes next.
    pub(super) fn next(&self) -> Result<Step, Broken> {
        let inbox = &self.inbox;
        if let Some((_, step)) = inbox.handed.borrow_mut().take() {
            return Ok(step);
        }
        let buffer = inbox.buffer.borrow();
        let stream = buffer.bytes().get(inbox.start.get()..inbox.end.get()).unwrap_or_default();
        match self.session.borrow_mut().next(stream) {
            Ok((used, step)) => {
                inbox.taken(used);
                Ok(step)
            }
            Err(violation) => Err(self.give_up(Broken::Violation(violation))),
        }
    }

    /// Waits until at least `count` bytes are there; they fit.
    pub(super) async fn fill(&self, io: &Io, count: usize) -> Result<(), Broken> {
        let inbox = &self.inbox;
        if inbox.len() == 0 || ROOM - inbox.start.get() < count {
            let bytes = inbox.start.get()..inbox.end.get();
            inbox.start.set(0);
            inbox.end.set(bytes.len());
            inbox.buffer.borrow_mut().bytes_mut().copy_within(bytes, 0);
        }
        while inbox.len() < count {
            let piece = inbox.buffer.borrow().piece(inbox.end.get()..ROOM);
            let Some(piece) = piece else {
                return Err(self.give_up(Broken::Lost("no room for a reply".into())));
            };
            let received = self.interruptible(io.reactor.receive(self.fd(), piece)).await;
            inbox.end.set(inbox.end.get() + self.moved(received)?.unwrap_or(0));
        }
        Ok(())
    }

    /// Takes data out of the stream to where it belongs: byte `at` of the request and on.
    pub(super) async fn take(&self, io: &Io, body: &Body<'_>, at: u32, len: u32) -> Result<(), Broken> {
        let Body::Receive(buf, range) = body else { return self.skip(io, len as usize).await };
        let (mut at, end) = (range.start + at as usize, range.start + (at + len) as usize);
        while at < end {
            let there = self.inbox.len().min(end - at);
            if there > 0 {
                let start = self.inbox.start.get();
                if !self.inbox.buffer.borrow().copy_to(start..start + there, buf, at) {
                    return Err(self.give_up(Broken::Lost("data for nobody".into())));
                }
                self.inbox.taken(there);
                at += there;
            } else if let (true, Some(piece)) = (end - at >= DIRECT, buf.piece(at..end)) {
                let received = self.interruptible(io.reactor.receive(self.fd(), piece)).await;
                at += self.moved(received)?.unwrap_or(0);
            } else {
                self.fill(io, 1).await?;
            }
        }
        Ok(())
    }

    /// Takes bytes out of the stream that nobody wants.
    pub(super) async fn skip(&self, io: &Io, mut count: usize) -> Result<(), Broken> {
        while count > 0 {
            self.fill(io, 1).await?;
            let there = self.inbox.len().min(count);
            self.inbox.taken(there);
            count -= there;
        }
        Ok(())
    }
}
