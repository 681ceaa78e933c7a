//! What waits to be sent.

use std::cell::{Cell, RefCell};

use nbd::client::Slot;

use super::{Body, Broken, Connection};
use crate::buf::Buf;
use crate::io::Io;
use crate::sync::{WaitSet, yield_now};

/// Bytes of each of the two buffers: some small writes, and a large one in few pieces.
const ROOM: usize = 128 << 10;

/// A header is put in whole.
const HEADER: usize = nbd::client::REQUEST_LEN;

/// What goes out in one piece; counted up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch(u64);

/// Two buffers: one is filled while the other is being sent.
#[derive(Debug)]
pub struct Outbox {
    buffers: [RefCell<Buf>; 2],
    /// The batch that is being filled; which buffer it is in says its last bit.
    batch: Cell<u64>,
    /// Bytes in it.
    len: Cell<usize>,
    sending: Cell<bool>,
    /// A request is being put in, which may be in pieces.
    putting: Cell<bool>,
    /// The last request whose last byte was put in.
    last: Cell<Option<Slot>>,
    changed: WaitSet,
}

/// Sets a mark, until it is dropped, and tells of its end.
struct Marked<'a> {
    mark: &'a Cell<bool>,
    changed: &'a WaitSet,
}

impl<'a> Marked<'a> {
    fn new(mark: &'a Cell<bool>, changed: &'a WaitSet) -> Marked<'a> {
        mark.set(true);
        Marked { mark, changed }
    }
}

impl Drop for Marked<'_> {
    fn drop(&mut self) {
        self.mark.set(false);
        self.changed.wake_all();
    }
}

impl Outbox {
    pub fn new(io: &Io) -> Option<Outbox> {
        Some(Outbox {
            buffers: [RefCell::new(io.pool.data(ROOM)?), RefCell::new(io.pool.data(ROOM)?)],
            batch: Cell::new(0),
            len: Cell::new(0),
            sending: Cell::new(false),
            putting: Cell::new(false),
            last: Cell::new(None),
            changed: WaitSet::new(io.scheduler.clone()),
        })
    }

    pub fn is_sending(&self) -> bool {
        self.sending.get()
    }

    /// Whether the batch has not begun to be sent.
    pub fn is_filling(&self, Batch(batch): Batch) -> bool {
        batch == self.batch.get()
    }

    /// Lets everybody look again who waits for room.
    pub fn wake(&self) {
        self.changed.wake_all();
    }

    fn filling(&self) -> &RefCell<Buf> {
        let [even, odd] = &self.buffers;
        if self.batch.get().is_multiple_of(2) { even } else { odd }
    }

    fn room(&self) -> usize {
        ROOM - self.len.get()
    }

    fn put_bytes(&self, bytes: &[u8]) {
        let at = self.len.get();
        if let Some(room) = self.filling().borrow_mut().bytes_mut().get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
            self.len.set(at + bytes.len());
        }
    }
}

impl Connection {
    /// Puts a whole request into the buffers, behind those that were put in before.
    pub(super) async fn put(
        &self,
        io: &Io,
        slot: Slot,
        header: &[u8],
        body: &Body<'_>,
    ) -> Result<(), Broken> {
        self.put_all(io, header, body).await?;
        let batch = Batch(self.outbox.batch.get());
        self.with_waiter(slot, |waiter| waiter.batch = Some(batch));
        self.outbox.last.set(Some(slot));
        Ok(())
    }

    pub(super) async fn put_all(&self, io: &Io, header: &[u8], body: &Body<'_>) -> Result<(), Broken> {
        let outbox = &self.outbox;
        while outbox.putting.get() {
            outbox.changed.wait().await;
            self.check()?;
        }
        let _putting = Marked::new(&outbox.putting, &outbox.changed);
        self.make_room(io, HEADER).await?;
        outbox.put_bytes(header);
        match body {
            Body::None | Body::Receive(..) => Ok(()),
            Body::Bytes(bytes) => {
                let mut bytes = *bytes;
                while !bytes.is_empty() {
                    self.make_room(io, 1).await?;
                    let (part, rest) = bytes.split_at(outbox.room().min(bytes.len()));
                    outbox.put_bytes(part);
                    bytes = rest;
                }
                Ok(())
            }
            Body::Send(buf, range, copy) => {
                let mut at = range.start;
                if let Some(copy) = copy {
                    copy.borrow_mut().clear();
                }
                while at < range.end {
                    self.make_room(io, 1).await?;
                    let end = range.end.min(at + outbox.room());
                    self.put_part(buf, at..end, *copy);
                    at = end;
                }
                Ok(())
            }
        }
    }

    fn put_part(&self, buf: &Buf, part: std::ops::Range<usize>, copy: Option<&RefCell<Vec<u8>>>) {
        let (outbox, len) = (&self.outbox, part.len());
        let (at, to) = (outbox.len.get(), outbox.filling().borrow());
        // Both lie in their buffers, which are not the same.
        let copied = buf.copy_to(part, &to, at);
        debug_assert!(copied);
        // What a guest changes meanwhile must not make a difference between what is sent and what is kept.
        if let (Some(copy), Some(bytes)) = (copy, to.bytes().get(at..at + len)) {
            copy.borrow_mut().extend_from_slice(bytes);
        }
        outbox.len.set(at + len);
    }

    /// Waits until so many bytes can be put in, and sends if nobody else does.
    async fn make_room(&self, io: &Io, bytes: usize) -> Result<(), Broken> {
        while self.outbox.room() < bytes {
            if self.outbox.is_sending() {
                self.outbox.changed.wait().await;
            } else {
                self.send_batch(io).await?;
            }
            self.check()?;
        }
        Ok(())
    }

    /// Sends what the buffer holds that is being filled, which the other one is from then on.
    pub(super) async fn send_batch(&self, io: &Io) -> Result<(), Broken> {
        let outbox = &self.outbox;
        let sending = Marked::new(&outbox.sending, &outbox.changed);
        // Those who are ready at the same time put theirs in too.
        yield_now(&io.scheduler).await;
        self.check()?;
        let (buffer, len) = (outbox.filling(), outbox.len.replace(0));
        outbox.batch.set(outbox.batch.get() + 1);
        outbox.changed.wake_all();
        // The replies to these requests may come before all of them are sent.
        self.wake_a_reader();
        let mut at = 0;
        while at < len {
            let piece = buffer.borrow().piece(at..len);
            let Some(piece) = piece else { break };
            let sent = self.interruptible(io.reactor.send(self.fd(), piece)).await;
            at += self.moved(sent)?.unwrap_or(0);
        }
        drop(sending);
        // Whose request has been put in meanwhile sees to the rest.
        if let Some(slot) = outbox.last.take() {
            self.wake(slot);
        }
        Ok(())
    }
}
