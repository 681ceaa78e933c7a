//! The memory that I/O goes through: one page-aligned region for each worker thread, handed out in runs of pages.
//!
//! Invariants this file owns:
//!
//! 1. the region is mapped once, stays at its address and is unmapped when the last [`Buf`] and the [`Pool`] are gone;
//! 2. a page belongs to at most one live [`Buf`]; runs of different `Buf`s never overlap;
//! 3. the kernel (io_uring, grant copy) writes to a `Buf`'s bytes only while an operation that was given one of its
//!    [`Piece`]s is in flight, and whoever starts an operation keeps the `Buf` until it has ended
//!    (see `reactor`: an operation that is dropped in flight waits for its end);
//! 4. no Rust reference to the bytes outlives the call that made it, and none is made while an operation is in flight.
//!
//! Data buffers are limited by a budget: a request that finds none stays on the guest's ring. Metadata buffers, one
//! page each, come from a part of their own, because a request that already holds a data buffer may need them to
//! finish.
#![expect(unsafe_code, reason = "owns the region that the kernel reads and writes")]

use std::cell::RefCell;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::rc::Rc;

use blkif::ids::PAGE_SIZE;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::executor::Scheduler;
use crate::sync::WaitSet;

/// Pages for metadata in every pool.
const META_PAGES: usize = 32;

/// The memory of one worker thread.
pub struct Pool {
    region: Rc<Region>,
    data: RefCell<Runs>,
    meta: RefCell<Runs>,
    meta_freed: WaitSet,
}

struct Region {
    base: NonNull<u8>,
    len: NonZeroUsize,
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: invariant 1: `base` and `len` are of our own mapping, and nobody else refers to it any more.
        let unmapped = unsafe { munmap(self.base.cast(), self.len.get()) };
        debug_assert!(unmapped.is_ok());
    }
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
        // SAFETY: a fresh private mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .map_err(std::io::Error::from)?;
        Ok(Rc::new(Pool {
            region: Rc::new(Region { base: base.cast(), len }),
            data: RefCell::new(Runs::new(0..data_pages)),
            meta: RefCell::new(Runs::new(data_pages..data_pages + META_PAGES)),
            meta_freed: WaitSet::new(scheduler),
        }))
    }

    /// Address and length of the whole region, for registering it with io_uring.
    pub fn region(&self) -> (NonNull<u8>, usize) {
        (self.region.base, self.region.len.get())
    }

    /// A data buffer of `len` bytes (at least 1), page aligned, or `None` while the budget is used up.
    pub fn data(self: &Rc<Self>, len: usize) -> Option<Buf> {
        let pages = len.div_ceil(PAGE_SIZE).max(1);
        let first = self.data.borrow_mut().take(pages)?;
        Some(Buf { pool: self.clone(), first, pages, len, meta: false })
    }

    /// A metadata buffer of one page; waits until one is free.
    pub async fn meta(self: &Rc<Self>) -> Buf {
        loop {
            let page = self.meta.borrow_mut().take(1);
            if let Some(first) = page {
                return Buf { pool: self.clone(), first, pages: 1, len: PAGE_SIZE, meta: true };
            }
            self.meta_freed.wait().await;
        }
    }
}

/// An owned run of pages of a [`Pool`].
pub struct Buf {
    pool: Rc<Pool>,
    first: usize,
    pages: usize,
    len: usize,
    meta: bool,
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buf").field("page", &self.first).field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if self.meta {
            self.pool.meta.borrow_mut().give(self.first, self.pages);
            self.pool.meta_freed.wake_all();
        } else {
            self.pool.data.borrow_mut().give(self.first, self.pages);
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
}

impl Piece {
    /// What is left after the first `done` bytes; `None` when nothing is.
    pub fn rest(self, done: u32) -> Option<Piece> {
        let len = self.len.checked_sub(done).filter(|&len| len > 0)?;
        // SAFETY: `done < self.len`, so the result lies inside the same buffer.
        let ptr = unsafe { self.ptr.add(done as usize) };
        Some(Piece { ptr, len })
    }
}

impl Buf {
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn base(&self) -> NonNull<u8> {
        // SAFETY: `first` is a page of the region (invariant 2), so the offset lies inside the mapping.
        unsafe { self.pool.region.base.add(self.first * PAGE_SIZE) }
    }

    /// The bytes `range`, for an operation of the kernel. `None` if the range is empty or outside.
    pub fn piece(&self, range: Range<usize>) -> Option<Piece> {
        if range.start >= range.end || range.end > self.len {
            return None;
        }
        let len = u32::try_from(range.end - range.start).ok()?;
        // SAFETY: `range` was checked to lie inside this buffer.
        let ptr = unsafe { self.base().add(range.start) };
        Some(Piece { ptr, len })
    }

    /// The bytes. Only while no operation on this buffer is in flight (invariant 4).
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the pages are ours alone (invariant 2), initialised by the mapping, and at rest (invariant 4).
        unsafe { std::slice::from_raw_parts(self.base().as_ptr(), self.len) }
    }

    /// The bytes, to be changed. Only while no operation on this buffer is in flight (invariant 4).
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.base().as_ptr(), self.len) }
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

/// First-fit allocator of runs of pages.
#[derive(Debug)]
struct Runs {
    start: usize,
    used: Vec<bool>,
    /// No page below this one is free.
    hint: usize,
}

impl Runs {
    fn new(pages: Range<usize>) -> Runs {
        Runs { start: pages.start, used: vec![false; pages.len()], hint: 0 }
    }

    fn take(&mut self, count: usize) -> Option<usize> {
        let mut run = 0;
        for page in self.hint..self.used.len() {
            run = if self.used[page] { 0 } else { run + 1 };
            if run == count {
                let first = page + 1 - count;
                self.used[first..=page].fill(true);
                if first == self.hint {
                    self.hint = page + 1;
                }
                return Some(self.start + first);
            }
        }
        None
    }

    fn give(&mut self, first: usize, count: usize) {
        let first = first - self.start;
        self.used[first..first + count].fill(false);
        self.hint = self.hint.min(first);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_never_overlap_and_come_back(ops in prop::collection::vec((1usize..12, any::<bool>()), 1..200)) {
            let mut runs = Runs::new(7..47);
            let mut live: Vec<(usize, usize)> = Vec::new();
            for (count, give) in ops {
                if give && !live.is_empty() {
                    let (first, count) = live.swap_remove(count % live.len());
                    runs.give(first, count);
                } else if let Some(first) = runs.take(count) {
                    prop_assert!(first >= 7 && first + count <= 47);
                    for &(other, len) in &live {
                        prop_assert!(first + count <= other || other + len <= first);
                    }
                    live.push((first, count));
                }
            }
            for (first, count) in live.drain(..) {
                runs.give(first, count);
            }
            prop_assert_eq!(runs.take(40), Some(7));
        }
    }

    #[test]
    fn a_pool_keeps_to_its_budget() {
        let pool = Pool::new(Rc::default(), 10 * PAGE_SIZE).unwrap();
        let big = pool.data(9 * PAGE_SIZE).unwrap();
        assert!(pool.data(2 * PAGE_SIZE).is_none());
        let small = pool.data(1).unwrap();
        assert!(pool.data(1).is_none());
        drop(big);
        assert!(pool.data(9 * PAGE_SIZE).is_some());
        drop(small);
    }

    #[test]
    fn pieces_stay_inside_their_buffer() {
        let pool = Pool::new(Rc::default(), PAGE_SIZE).unwrap();
        let mut buf = pool.data(1024).unwrap();
        buf.bytes_mut().fill(7);
        buf.zero(512..1024);
        assert!(buf.bytes()[..512].iter().all(|&b| b == 7));
        assert!(buf.bytes()[512..].iter().all(|&b| b == 0));
        assert!(buf.piece(512..1025).is_none());
        assert!(buf.piece(512..512).is_none());
        let piece = buf.piece(512..1024).unwrap();
        assert_eq!(piece.rest(500).unwrap().len, 12);
        assert!(piece.rest(512).is_none());
    }
}
