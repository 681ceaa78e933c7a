//! The memory that I/O goes through: one page-aligned region for each worker thread, handed out in runs of pages; and
//! pages of a guest that are mapped here, lent for one request at a time.
//!
//! Invariants this file owns:
//!
//! 1. the region is mapped once, stays at its address and is unmapped when the last [`Buf`] and the [`Pool`] are gone;
//!    a guest's pages stay mapped while [`GuestBytes`] over them live, because it holds on to the mapping;
//! 2. a page of the region belongs to at most one live [`Buf`]; runs of different `Buf`s never overlap;
//! 3. the kernel (io_uring, grant copy) writes to a `Buf`'s bytes only while an operation that was given one of its
//!    [`Piece`]s is in flight, and whoever starts an operation keeps the `Buf` until it has ended
//!    (see `reactor`: an operation that is dropped in flight waits for its end);
//! 4. no Rust reference to the bytes outlives the call that made it, and none is made while an operation is in flight.
//!    To a guest's bytes none is ever made, because the guest may change them at any time: they are copied. The kernel is
//!    never given them (`worker::persistent` says why): [`GuestBytes`] make no [`Piece`].
//!
//! Data buffers are limited by a budget: a request that finds none waits. Metadata buffers, one page each, come from a
//! part of their own, because a request that already holds a data buffer may need them to finish. What passes through
//! memory of ours in between ([`Pool::bounce`]) never waits.
//!
//! The region is registered with the kernel in **chunks**, each when it is first used, and given back when the disk is
//! idle: a disk that does nothing holds next to no memory.
#![expect(unsafe_code, reason = "owns the region that the kernel reads and writes")]

use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;

use blkif::ids::PAGE_SIZE;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::executor::Scheduler;
use crate::reactor::{Fixed, Reactor};
use crate::sync::WaitSet;

/// Pages for metadata in every pool.
const META_PAGES: usize = 32;

/// Pages of a chunk. A buffer lies in one chunk, so this is also the longest buffer: 1 MiB, the most that one request moves.
const CHUNK_PAGES: usize = 256;

/// The longest buffer outside of the budget in bytes.
const MOST_OWN: usize = 64 << 10;

/// The longest data buffer in bytes.
pub const MAX_DATA: usize = CHUNK_PAGES * PAGE_SIZE;

/// The memory of one worker thread.
pub struct Pool {
    region: Rc<Region>,
    chunks: RefCell<Vec<Chunk>>,
    data_freed: WaitSet,
    /// Behind the last chunk.
    meta: RefCell<Runs>,
    meta_start: usize,
    meta_freed: WaitSet,
    meta_fixed: Cell<Option<Fixed>>,
    reactor: OnceCell<Rc<Reactor>>,
}

struct Region {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

impl Region {
    /// Fresh memory, all zeros.
    fn new(len: NonZeroUsize) -> Result<Region, Errno> {
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }?;
        Ok(Region { base: base.cast(), len })
    }

    /// The address of a page.
    fn page(&self, index: usize) -> NonNull<u8> {
        assert!(index * PAGE_SIZE < self.len.get());
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.base.add(index * PAGE_SIZE) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: invariant 1: `base` and `len` are of our own mapping, and nobody else refers to it any more.
        let unmapped = unsafe { munmap(self.base.cast(), self.len.get()) };
        debug_assert!(unmapped.is_ok());
    }
}

/// A part of the region that is registered as a whole.
#[derive(Debug)]
struct Chunk {
    runs: Runs,
    fixed: Option<Fixed>,
    /// The kernel was asked to register it, whatever it answered.
    used: bool,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("bytes", &self.region.len).finish_non_exhaustive()
    }
}

impl Pool {
    /// A pool with a budget of `data_bytes` for data, rounded up to pages. Untouched pages cost no memory.
    pub fn new(scheduler: Rc<Scheduler>, data_bytes: usize) -> std::io::Result<Rc<Pool>> {
        let data_pages = data_bytes.div_ceil(PAGE_SIZE);
        let len = NonZeroUsize::new((data_pages + META_PAGES) * PAGE_SIZE)
            .ok_or(std::io::ErrorKind::InvalidInput)?;
        let region = Region::new(len)?;
        let chunk =
            |first| Chunk { runs: Runs::new(CHUNK_PAGES.min(data_pages - first)), fixed: None, used: false };
        Ok(Rc::new(Pool {
            region: Rc::new(region),
            chunks: RefCell::new((0..data_pages).step_by(CHUNK_PAGES).map(chunk).collect()),
            data_freed: WaitSet::new(scheduler.clone()),
            meta: RefCell::new(Runs::new(META_PAGES)),
            meta_start: data_pages,
            meta_freed: WaitSet::new(scheduler),
            meta_fixed: Cell::new(None),
            reactor: OnceCell::new(),
        }))
    }

    /// From now on registers the memory with the reactor's engine, which saves pinning it for each operation. Once.
    pub fn register_with(&self, reactor: Rc<Reactor>) {
        self.meta_fixed.set(reactor.fix(self.region.page(self.meta_start), META_PAGES * PAGE_SIZE));
        let fresh = self.reactor.set(reactor).is_ok();
        debug_assert!(fresh, "a pool is registered once");
    }

    /// A data buffer of `len` bytes (1 to [`MAX_DATA`]), page aligned, or `None` while the budget is used up.
    pub fn data(self: &Rc<Self>, len: usize) -> Option<Buf> {
        let pages = len.div_ceil(PAGE_SIZE).max(1);
        let mut chunks = self.chunks.borrow_mut();
        let (index, page) =
            chunks.iter_mut().enumerate().find_map(|(i, chunk)| Some((i, chunk.runs.take(pages)?)))?;
        let chunk = &mut chunks[index];
        if !chunk.used
            && let Some(reactor) = self.reactor.get()
        {
            chunk.used = true;
            chunk.fixed = reactor.fix(self.region.page(index * CHUNK_PAGES), chunk.runs.pages * PAGE_SIZE);
        }
        let base = self.region.page(index * CHUNK_PAGES + page);
        Some(Buf {
            base,
            len,
            fixed: chunk.fixed,
            home: Home::Data { pool: self.clone(), index, page, pages },
        })
    }

    /// A data buffer, as soon as there is one. `None` if `len` is more than the whole budget ever allows.
    pub async fn data_soon(self: &Rc<Self>, len: usize) -> Option<Buf> {
        let most = self.chunks.borrow().first().map_or(0, |chunk| chunk.runs.pages * PAGE_SIZE);
        if len > most {
            return None;
        }
        loop {
            if let Some(buf) = self.data(len) {
                return Some(buf);
            }
            self.data_freed.wait().await;
        }
    }

    /// A metadata buffer of one page; waits until one is free.
    pub async fn meta(self: &Rc<Self>) -> Buf {
        loop {
            let page = self.meta.borrow_mut().take(1);
            if let Some(page) = page {
                let base = self.region.page(self.meta_start + page);
                let home = Home::Meta { pool: self.clone(), page };
                return Buf { base, len: PAGE_SIZE, fixed: self.meta_fixed.get(), home };
            }
            self.meta_freed.wait().await;
        }
    }

    /// Memory of `len` bytes or less, at once and whatever the budget says: for the few requests whose data must pass through
    /// memory of our own although they have a buffer already. They could otherwise wait for each other.
    ///
    /// # Errors
    ///
    /// ENOMEM.
    pub fn bounce(self: &Rc<Self>, len: usize) -> Result<Buf, Errno> {
        match self.data(len.min(MAX_DATA)) {
            Some(buf) => Ok(buf),
            None => Buf::own(len.min(MOST_OWN)),
        }
    }

    /// Whether [`Pool::trim`] could give memory back.
    pub fn holds_memory(&self) -> bool {
        self.chunks.borrow().iter().any(|chunk| chunk.used)
    }

    /// Gives the memory of chunks without a live buffer back to the system.
    pub fn trim(&self) {
        for (index, chunk) in self.chunks.borrow_mut().iter_mut().enumerate() {
            if !chunk.used || !chunk.runs.is_unused() {
                continue;
            }
            if let (Some(fixed), Some(reactor)) = (chunk.fixed.take(), self.reactor.get()) {
                reactor.unfix(fixed);
            }
            chunk.used = false;
            let base = self.region.page(index * CHUNK_PAGES);
            // SAFETY: the chunk's pages are ours, no buffer in them is alive, and they read as zeros afterwards.
            let advised =
                unsafe { madvise(base.cast(), chunk.runs.pages * PAGE_SIZE, MmapAdvise::MADV_DONTNEED) };
            debug_assert!(advised.is_ok());
        }
    }
}

/// A mapping of a guest's pages. It is unmapped when the last reference to it is dropped.
pub trait GuestMemory {
    /// The first byte and the length in bytes; the same for as long as it lives.
    fn span(&self) -> (NonNull<u8>, usize);
}

/// A part of a guest's mapped pages, for copying.
pub struct GuestBytes {
    base: NonNull<u8>,
    len: usize,
    _kept: Rc<dyn GuestMemory>,
}

impl fmt::Debug for GuestBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestBytes").field("len", &self.len).finish_non_exhaustive()
    }
}

impl GuestBytes {
    /// Bytes `range` of mapped pages. `None` if the range is empty or outside.
    pub fn new(memory: Rc<dyn GuestMemory>, range: Range<usize>) -> Option<GuestBytes> {
        let (base, len) = memory.span();
        if range.start >= range.end || range.end > len {
            return None;
        }
        // SAFETY: inside the mapping, as just checked; we keep it (invariant 1).
        let base = unsafe { base.add(range.start) };
        Some(GuestBytes { base, len: range.end - range.start, _kept: memory })
    }

    /// Length in bytes, not 0.
    #[expect(clippy::len_without_is_empty, reason = "there are no empty ones")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies them to byte `at` and on of a buffer; false, with nothing done, if they do not fit. Only while no operation on the
    /// part concerned is in flight.
    ///
    /// What the guest writes to its pages meanwhile may come through in part.
    #[must_use]
    pub fn copy_to(&self, buf: &Buf, at: usize) -> bool {
        let Some(to) = buf.piece(at..at.saturating_add(self.len)) else { return false };
        // SAFETY: both are mapped (invariant 1), and a mapping of a guest's pages overlaps none of ours. No Rust reference to either
        // exists (invariant 4). A guest that writes at the same time is outside of this program; the bytes are plain data to us, and
        // nothing is decided from them twice.
        unsafe { copy(self.base, to.ptr, self.len) };
        true
    }

    /// Fills them from byte `at` and on of a buffer; false, with nothing done, if it has not as many.
    #[must_use]
    pub fn fill_from(&self, buf: &Buf, at: usize) -> bool {
        let Some(from) = buf.piece(at..at.saturating_add(self.len)) else { return false };
        // SAFETY: as in `copy_to`, the other way.
        unsafe { copy(from.ptr, self.base, self.len) };
        true
    }
}

/// Copies `len` bytes, a page at a time: the C library copies longer runs by a string instruction, which emulators, and processors
/// without fast strings, carry out byte by byte.
///
/// # Safety
///
/// As for [`NonNull::copy_to_nonoverlapping`].
unsafe fn copy(from: NonNull<u8>, to: NonNull<u8>, len: usize) {
    for at in (0..len).step_by(PAGE_SIZE) {
        // SAFETY: `at < len`, so it lies inside what the caller vouches for.
        let from = unsafe { from.add(at) };
        // SAFETY: the same.
        let to = unsafe { to.add(at) };
        // SAFETY: the same, because no more than `len - at` bytes are copied.
        unsafe { from.copy_to_nonoverlapping(to, PAGE_SIZE.min(len - at)) };
    }
}

/// Memory for I/O: an owned run of pages of a [`Pool`].
pub struct Buf {
    base: NonNull<u8>,
    len: usize,
    fixed: Option<Fixed>,
    home: Home,
}

enum Home {
    Data { pool: Rc<Pool>, index: usize, page: usize, pages: usize },
    Meta { pool: Rc<Pool>, page: usize },
    Own { _region: Region },
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buf").field("base", &self.base).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        match &self.home {
            Home::Data { pool, index, page, pages } => {
                pool.chunks.borrow_mut()[*index].runs.give(*page, *pages);
                pool.data_freed.wake_all();
            }
            Home::Meta { pool, page } => {
                pool.meta.borrow_mut().give(*page, 1);
                pool.meta_freed.wake_all();
            }
            Home::Own { .. } => {}
        }
    }
}

/// A part of a [`Buf`] as the kernel is told of it. Valid while the `Buf` lives.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// First byte.
    pub ptr: NonNull<u8>,
    /// Bytes, not 0.
    pub len: u32,
    /// The registered memory that it lies in.
    pub fixed: Option<Fixed>,
}

impl Piece {
    /// What is left after the first `done` bytes; `None` when nothing is.
    pub fn rest(self, done: u32) -> Option<Piece> {
        let len = self.len.checked_sub(done).filter(|&len| len > 0)?;
        // SAFETY: `done < self.len`, so the result lies inside the same buffer.
        let ptr = unsafe { self.ptr.add(done as usize) };
        Some(Piece { ptr, len, ..self })
    }
}

impl Buf {
    /// Memory of its own, outside of every pool.
    fn own(len: usize) -> Result<Buf, Errno> {
        let region = Region::new(NonZeroUsize::new(len).ok_or(Errno::EINVAL)?)?;
        Ok(Buf { base: region.base, len, fixed: None, home: Home::Own { _region: region } })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes `range`, for an operation of the kernel. `None` if the range is empty or outside.
    pub fn piece(&self, range: Range<usize>) -> Option<Piece> {
        if range.start >= range.end || range.end > self.len {
            return None;
        }
        let len = u32::try_from(range.end - range.start).ok()?;
        // SAFETY: `range` was checked to lie inside this buffer.
        let ptr = unsafe { self.base.add(range.start) };
        Some(Piece { ptr, len, fixed: self.fixed })
    }

    /// The bytes. Only while no operation on this buffer is in flight (invariant 4).
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the pages are ours alone (invariant 2), initialised by the mapping, and at rest (invariant 4).
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// The bytes, to be changed. Only while no operation on this buffer is in flight (invariant 4).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }

    /// Copies bytes `range` to byte `at` and on of another buffer; false, with nothing done, if they do not lie in both or
    /// the two overlap. Only while no operation on the parts concerned is in flight.
    #[must_use]
    pub fn copy_to(&self, range: Range<usize>, other: &Buf, at: usize) -> bool {
        let target = at..at.saturating_add(range.len());
        let (Some(from), Some(to)) = (self.piece(range), other.piece(target)) else { return false };
        let len = from.len as usize;
        if from.ptr.addr().get().abs_diff(to.ptr.addr().get()) < len {
            return false;
        }
        // SAFETY: both lie in live buffers and do not overlap, as just checked. No Rust reference to either exists
        // (invariant 4).
        unsafe { from.ptr.copy_to_nonoverlapping(to.ptr, len) };
        true
    }

    /// Copies `bytes` to byte `at` and on; false, with nothing done, if they do not fit. Only while no operation on the part
    /// concerned is in flight.
    #[must_use]
    pub fn copy_from(&self, at: usize, bytes: &[u8]) -> bool {
        let Some(to) = self.piece(at..at.saturating_add(bytes.len())) else { return false };
        let from = NonNull::from(bytes).cast::<u8>();
        // SAFETY: `to` lies inside this buffer and is as long as `bytes`, which nobody can refer to mutably: so they do not
        // overlap. No Rust reference to the buffer exists (invariant 4).
        unsafe { from.copy_to_nonoverlapping(to.ptr, bytes.len()) };
        true
    }

    /// Writes zeros to `range`; other parts of the buffer may have operations in flight. Bytes outside are left alone.
    pub fn zero(&self, range: Range<usize>) {
        if let Some(piece) = self.piece(range) {
            // SAFETY: `piece` lies inside the buffer; the caller gives no part of it to the kernel at the same time
            // (invariant 3), and no reference to it exists (invariant 4).
            unsafe { piece.ptr.write_bytes(0, piece.len as usize) };
        }
    }
}

/// First-fit allocator of runs of up to [`CHUNK_PAGES`] pages: one bit a page, set when it is free.
#[derive(Debug)]
struct Runs {
    free: [u64; CHUNK_PAGES / 64],
    pages: usize,
    unused: usize,
}

impl Runs {
    fn new(pages: usize) -> Runs {
        let mut runs = Runs { free: [0; CHUNK_PAGES / 64], pages, unused: 0 };
        runs.give(0, pages);
        runs
    }

    fn is_unused(&self) -> bool {
        self.unused == self.pages
    }

    /// How many pages from `at` on are alike, all free or all taken.
    fn alike(&self, at: usize, free: bool) -> usize {
        let mut end = at;
        while end < CHUNK_PAGES {
            let word = if free { self.free[end / 64] } else { !self.free[end / 64] };
            let here = ((word >> (end % 64)).trailing_ones() as usize).min(64 - end % 64);
            end += here;
            if here == 0 || !end.is_multiple_of(64) {
                break;
            }
        }
        end - at
    }

    fn take(&mut self, count: usize) -> Option<usize> {
        if count > self.unused {
            return None;
        }
        let mut at = 0;
        while at + count <= self.pages {
            at += self.alike(at, false);
            let free = self.alike(at, true);
            if free >= count {
                self.mark(at, count, false);
                self.unused -= count;
                return Some(at);
            }
            at += free;
        }
        None
    }

    fn give(&mut self, first: usize, count: usize) {
        self.mark(first, count, true);
        self.unused += count;
    }

    fn mark(&mut self, first: usize, count: usize, free: bool) {
        let mut at = first;
        while at < first + count {
            let here = (64 - at % 64).min(first + count - at);
            let bits = (u64::MAX >> (64 - here)) << (at % 64);
            let word = &mut self.free[at / 64];
            debug_assert_eq!(*word & bits, if free { 0 } else { bits }, "a page changes hands");
            if free {
                *word |= bits
            } else {
                *word &= !bits
            }
            at += here;
        }
    }
}

#[cfg(test)]
mod tests;
