//! Requests in flight, and the stream of replies.

use super::Export;
use super::reply::{Content, Pending, Violation};
use crate::error::ErrorCode;
use crate::flags::{ChunkFlags, CommandFlags};
use crate::wire::{CHUNK_MAGIC, Chunk, Command, Extent, Fixed, REQUEST_MAGIC, Request, SIMPLE_MAGIC, Simple};

/// The place of a request in flight; small numbers, used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slot(pub u32);

/// A request to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// What.
    pub command: Command,
    /// How.
    pub flags: CommandFlags,
    /// Byte position; 0 for a flush.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub len: u32,
}

/// What a request has come to: its extents, for a block status, or the server's error.
pub type Outcome = Result<Vec<Extent>, ErrorCode>;

/// What the next bytes of the stream mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// So many bytes must be there together before anything can be said; at most 64 KiB and some.
    Need(usize),
    /// The next `len` bytes of the stream belong to bytes `at` and on of the request. The caller takes them out of the
    /// stream.
    Data {
        /// The request.
        slot: Slot,
        /// Counted from its first byte.
        at: u32,
        /// Not 0.
        len: u32,
    },
    /// Bytes of the request are zeros.
    Zero {
        /// The request.
        slot: Slot,
        /// Counted from its first byte.
        at: u32,
        /// Not 0.
        len: u32,
    },
    /// The caller skips so many bytes of the stream.
    Skip(usize),
    /// The reply is complete. The slot stays taken until [`Session::release`].
    Done(Slot, Outcome),
}

#[derive(Debug, Default)]
struct Place {
    /// How often it has been used, so that a late reply is not taken for the one that is awaited.
    uses: u32,
    /// Until it is released, which is later than the end of the reply.
    taken: bool,
    pending: Option<Pending>,
}

/// The transmission phase of one connection.
#[derive(Debug)]
pub struct Session {
    structured: bool,
    context: Option<u32>,
    places: Vec<Place>,
    free: Vec<Slot>,
    /// The request whose last chunk was seen.
    ending: Option<Slot>,
}

impl Session {
    /// For an export that is in use.
    pub fn new(export: &Export) -> Session {
        Session {
            structured: export.structured,
            context: export.allocation,
            places: Vec::new(),
            free: Vec::new(),
            ending: None,
        }
    }

    /// How many slots are taken.
    pub fn in_flight(&self) -> usize {
        self.places.len().saturating_sub(self.free.len())
    }

    /// Makes the slot of a request whose reply is complete free for the next one.
    pub fn release(&mut self, slot: Slot) {
        let over = |place: &mut Place| place.pending.is_none() && std::mem::take(&mut place.taken);
        if self.place(slot).is_some_and(over) {
            self.free.push(slot);
        }
    }

    /// Begins a request: its place, and what to send before its payload.
    pub fn begin(&mut self, ask: &Ask) -> (Slot, [u8; Request::LEN]) {
        let slot = self.free.pop().unwrap_or_else(|| {
            let slot = Slot(u32::try_from(self.places.len()).unwrap_or(u32::MAX));
            self.places.push(Place::default());
            slot
        });
        let mut uses = 0;
        if let Some(place) = self.place(slot) {
            place.uses = place.uses.wrapping_add(1);
            place.taken = true;
            place.pending = Some(Pending::new(ask.command, ask.offset, ask.len));
            uses = place.uses;
        }
        let request = Request {
            magic: REQUEST_MAGIC.into(),
            flags: ask.flags.0.into(),
            command: ask.command.number().into(),
            cookie: (u64::from(uses) << 32 | u64::from(slot.0)).into(),
            offset: ask.offset.into(),
            len: ask.len.into(),
        };
        (slot, zerocopy::transmute!(request))
    }

    fn place(&mut self, slot: Slot) -> Option<&mut Place> {
        self.places.get_mut(usize::try_from(slot.0).ok()?)
    }

    /// The request in flight that a cookie belongs to.
    fn find(&mut self, cookie: u64) -> Result<(Slot, &mut Pending), Violation> {
        const UNKNOWN: Violation = Violation("a reply to a request that is not in flight");
        let slot = Slot(u32::try_from(cookie & u64::from(u32::MAX)).map_err(|_| UNKNOWN)?);
        let place = self.place(slot).ok_or(UNKNOWN)?;
        let expected = u64::from(place.uses) << 32 | u64::from(slot.0);
        match &mut place.pending {
            Some(pending) if cookie == expected => Ok((slot, pending)),
            _ => Err(UNKNOWN),
        }
    }

    /// Says what `stream` begins with, and how many of its bytes that has used up.
    ///
    /// After [`Step::Data`] and [`Step::Skip`] the bytes named there come out of the stream before the next call.
    ///
    /// # Errors
    /// The server breaks the protocol; the connection is of no use any more.
    pub fn next(&mut self, stream: &[u8]) -> Result<(usize, Step), Violation> {
        if let Some(slot) = self.ending.take() {
            return self.finish(slot).map(|outcome| (0, Step::Done(slot, outcome)));
        }
        let Some((magic, _)) = stream.split_first_chunk::<4>() else {
            return Ok((0, Step::Need(Simple::LEN)));
        };
        match u32::from_be_bytes(*magic) {
            SIMPLE_MAGIC => self.simple(stream),
            CHUNK_MAGIC if self.structured => self.chunk(stream),
            CHUNK_MAGIC => Err(Violation("a chunk where only simple replies were agreed on")),
            _ => Err(Violation("a reply without its magic number")),
        }
    }

    fn simple(&mut self, stream: &[u8]) -> Result<(usize, Step), Violation> {
        let Some(reply) = Simple::take(stream) else { return Ok((0, Step::Need(Simple::LEN))) };
        let structured = self.structured;
        let (slot, pending) = self.find(reply.cookie.get())?;
        let len = pending.simple(ErrorCode::from_wire(reply.error.get()), structured)?;
        let step = if len > 0 {
            self.ending = Some(slot);
            Step::Data { slot, at: 0, len }
        } else {
            Step::Done(slot, self.finish(slot)?)
        };
        Ok((Simple::LEN, step))
    }

    fn chunk(&mut self, stream: &[u8]) -> Result<(usize, Step), Violation> {
        let Some(header) = Chunk::take(stream) else { return Ok((0, Step::Need(Chunk::LEN))) };
        let (kind, len) = (header.kind.get(), header.len.get());
        let done = ChunkFlags(header.flags.get()).has(ChunkFlags::DONE);
        let context = self.context;
        let (slot, pending) = self.find(header.cookie.get())?;
        let wanted = usize::try_from(pending.wants(kind, len)?).map_err(|_| Violation("a chunk too long"))?;
        let used = Chunk::LEN.saturating_add(wanted);
        let Some(content) = stream.get(Chunk::LEN..used) else { return Ok((0, Step::Need(used))) };
        let step = match pending.chunk((kind, len), done, content, context)? {
            Content::Data(range) => Step::Data { slot, at: range.at, len: range.len },
            Content::Zero(range) => Step::Zero { slot, at: range.at, len: range.len },
            Content::Nothing { skip } if skip == 0 && done => {
                return self.finish(slot).map(|outcome| (used, Step::Done(slot, outcome)));
            }
            Content::Nothing { skip } => Step::Skip(usize::try_from(skip).unwrap_or(usize::MAX)),
        };
        if done {
            self.ending = Some(slot);
        }
        Ok((used, step))
    }

    fn finish(&mut self, slot: Slot) -> Result<Outcome, Violation> {
        let pending = self.place(slot).and_then(|place| place.pending.take());
        pending.ok_or(Violation("a reply to a request that is not in flight"))?.finish()
    }
}

/// The request that ends a connection; it has no reply.
pub fn disconnect() -> [u8; Request::LEN] {
    let request = Request {
        magic: REQUEST_MAGIC.into(),
        flags: 0.into(),
        command: Command::Disconnect.number().into(),
        cookie: 0.into(),
        offset: 0.into(),
        len: 0.into(),
    };
    zerocopy::transmute!(request)
}
