//! The backend's end of a ring in memory that another domain writes at any time.
//!
//! # Invariants of this file
//!
//! - `base` points to `order.bytes()` bytes, valid for as long as the [`BackRing`] lives, page aligned
//!   ([`BackRing::attach`]'s contract).
//! - Every access goes through `RingMemory::word`: an aligned 32-bit atomic inside those bytes. No reference to the
//!   memory other than to such an atomic ever exists, so a concurrent writer in another domain causes no undefined
//!   behaviour, only values that mean nothing.
//! - Each word of an entry is loaded exactly once, into private memory. The compiler may neither repeat nor merge
//!   atomic loads, so what was checked is what is used (Xen security advisory 155).
//! - An entry is written only at a position that [`BackIndices::respond`] gave out, and read only at one that
//!   [`BackIndices::take`] gave out.
#![expect(unsafe_code, reason = "shared memory is reached through a raw pointer; see the invariants above")]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::abi::{Abi, HEADER_SIZE, MAX_ENTRY_SIZE, RingOrder, header};
use crate::indices::{AttachError, BackIndices, RingBroken, Words};
use crate::request::RawRequest;
use crate::response::{Response, Status};

const WORD: usize = size_of::<u32>();

/// The backend's end of a ring.
///
/// Requests are taken one by one, answered in any order, and the answers published together:
/// [`take`](BackRing::take), [`respond`](BackRing::respond), [`push`](BackRing::push). Before the caller sleeps it
/// calls [`final_check`](BackRing::final_check) and [`nudge`](BackRing::nudge).
#[derive(Debug)]
pub struct BackRing {
    memory: RingMemory,
    indices: BackIndices,
}

impl BackRing {
    /// Takes up the ring at `base`, at the last response found in it: 0 in a fresh ring, else where the backend before
    /// this one stopped, so that each request without a response is taken (again).
    ///
    /// A response goes into the entry of the oldest request without one, not into that of the request it answers. So
    /// after a backend that answered out of order, or died between `respond` and `push`, the entries of some unanswered
    /// requests are gone: whoever takes over must have kept copies, and use them instead of what
    /// [`BackRing::take`] returns for these positions.
    ///
    /// Nothing is written: the header is the frontend's to initialise.
    ///
    /// # Errors
    ///
    /// More requests are unanswered than the ring has slots. The frontend set the ring up wrongly.
    ///
    /// # Safety
    ///
    /// `base` is page aligned and valid for reads and writes of `order.bytes()` bytes until the `BackRing` is dropped.
    /// Other domains may write there at any time; in this process nothing else may, except through atomics.
    pub unsafe fn attach(base: NonNull<u8>, abi: Abi, order: RingOrder) -> Result<BackRing, AttachError> {
        let slots = abi.slots(order);
        let memory = RingMemory { base, abi, order, mask: slots - 1 };
        let indices = BackIndices::attach(memory.header(), slots)?;
        Ok(BackRing { memory, indices })
    }

    /// The layout of the entries.
    pub fn abi(&self) -> Abi {
        self.memory.abi
    }

    /// The ring's size.
    pub fn order(&self) -> RingOrder {
        self.memory.order
    }

    /// Number of entries.
    pub fn slots(&self) -> u32 {
        self.indices.slots()
    }

    /// Requests taken and not answered.
    pub fn outstanding(&self) -> u32 {
        self.indices.outstanding()
    }

    /// Counts `unanswered` requests as taken that the backend before this one took, and of which copies were kept. Right
    /// after [`BackRing::attach`].
    ///
    /// # Errors
    ///
    /// As [`BackIndices::resume`].
    pub fn resume(&mut self, unanswered: u32) -> Result<(), RingBroken> {
        self.indices.resume(self.memory.header(), unanswered)
    }

    /// The position of the next request to take.
    pub fn next_request(&self) -> u32 {
        self.indices.next_request()
    }

    /// The position of the next response to write; right after [`BackRing::attach`] that of the first response that the
    /// frontend was not shown.
    pub fn next_response(&self) -> u32 {
        self.indices.next_response()
    }

    /// Takes the next request, as a private copy.
    ///
    /// # Errors
    ///
    /// The frontend's counter is impossible. Every later call fails as well; requests already taken may still be
    /// answered.
    pub fn take(&mut self) -> Result<Option<RawRequest>, RingBroken> {
        let position = self.indices.take(self.memory.header())?;
        Ok(position.map(|position| self.memory.copy_entry(position)))
    }

    /// Whether there is a request to take; for polling. Does not ask to be notified.
    pub fn has_unconsumed(&mut self) -> Result<bool, RingBroken> {
        self.indices.has_unconsumed(self.memory.header())
    }

    /// Asks the frontend to notify the next request, and looks once more.
    ///
    /// True: there is a request, do not sleep. Until this returned false, no notification need ever come.
    pub fn final_check(&mut self) -> Result<bool, RingBroken> {
        self.indices.final_check(self.memory.header())
    }

    /// Writes the response to one request taken. The frontend sees it after the next [`BackRing::push`].
    ///
    /// `id` and `op` are those of the [`Request`](crate::Request) or [`Rejection`](crate::Rejection).
    ///
    /// # Panics
    ///
    /// If every request taken has been answered already: see [`BackIndices::respond`].
    pub fn respond(&mut self, id: u64, op: u8, status: Status) {
        let position = self.indices.respond();
        self.memory.write_response(position, &Response { id, op, status: status.wire() });
    }

    /// Publishes the responses written since the last push. True: notify the frontend, once.
    #[must_use = "a frontend that is not notified when it asked for it waits for ever"]
    pub fn push(&mut self) -> bool {
        self.indices.push(self.memory.header())
    }

    /// To be called before sleeping. True: notify the frontend although it did not ask for it in time; see
    /// [`BackIndices::nudge`].
    #[must_use = "a frontend that armed its event too late waits for ever"]
    pub fn nudge(&mut self) -> bool {
        self.indices.nudge(self.memory.header())
    }
}

/// The shared memory of a ring.
#[derive(Debug)]
struct RingMemory {
    base: NonNull<u8>,
    abi: Abi,
    order: RingOrder,
    /// Number of slots, a power of two, less 1.
    mask: u32,
}

// SAFETY: the memory is valid in the whole process and has no tie to a thread; all access is atomic.
unsafe impl Send for RingMemory {}

impl RingMemory {
    fn header(&self) -> Words<'_> {
        Words {
            req_prod: self.word(header::REQ_PROD),
            req_event: self.word(header::REQ_EVENT),
            rsp_prod: self.word(header::RSP_PROD),
            rsp_event: self.word(header::RSP_EVENT),
        }
    }

    /// Copies what an entry uses of its place, each word once; the rest of the copy is zero.
    ///
    /// How much that is stands in the first word, and is taken from its copy.
    fn copy_entry(&self, position: u32) -> RawRequest {
        let offset = self.entry_offset(position);
        let first = self.word(offset).load(Ordering::Relaxed).to_ne_bytes();
        let [operation, detail, ..] = first;
        let used = self.abi.used(operation, detail) / WORD;
        let mut bytes = [0; MAX_ENTRY_SIZE];
        let (words, _) = bytes.as_chunks_mut::<WORD>();
        for (i, to) in words.iter_mut().take(used).enumerate() {
            *to = match i {
                0 => first,
                _ => self.word(offset + i * WORD).load(Ordering::Relaxed).to_ne_bytes(),
            };
        }
        RawRequest::new(bytes, self.abi)
    }

    fn write_response(&self, position: u32, response: &Response) {
        let offset = self.entry_offset(position);
        let bytes = response.encode();
        let (words, _) = bytes.as_chunks::<WORD>();
        for (i, from) in words.iter().take(self.abi.response_size() / WORD).enumerate() {
            self.word(offset + i * WORD).store(u32::from_ne_bytes(*from), Ordering::Relaxed);
        }
    }

    /// Byte offset of the entry at a free-running position.
    fn entry_offset(&self, position: u32) -> usize {
        // Masked, the entry lies inside the ring whatever the position.
        HEADER_SIZE + (position & self.mask) as usize * self.abi.entry_size()
    }

    /// The word at byte `offset`, a multiple of 4 inside the ring.
    fn word(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(offset.is_multiple_of(WORD) && offset + WORD <= self.order.bytes());
        // SAFETY: the offsets are those of the header, or entry_offset plus less than an entry: inside the ring, whose
        // bytes attach's caller promised.
        let at = unsafe { self.base.add(offset) };
        // SAFETY: the base is page aligned and the offset a multiple of 4; attach's caller promised the bytes to live
        // as long as `self`, which the reference cannot outlive, and that all access in this process is atomic.
        unsafe { AtomicU32::from_ptr(at.cast::<u32>().as_ptr()) }
    }
}

#[cfg(test)]
mod tests;
