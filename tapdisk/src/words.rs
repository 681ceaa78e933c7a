//! A file in memory, mapped as words of 64 bits.
//!
//! # Invariants of this file
//!
//! - `base` is a shared mapping of `count` words of a file whose blocks are allocated; it is unmapped once, on drop.
//! - Nobody makes the file shorter: only its owner may write to it, and no program of ours does. So a store never meets a
//!   missing page (SIGBUS).
//! - Every access is an aligned atomic of 64 bits inside the mapping, so what another process or thread does there is only a
//!   value.
#![expect(unsafe_code, reason = "maps a file; see the invariants above")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::posix_fallocate;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::porter::{self, How};

/// Words in a mapped file.
#[derive(Debug)]
pub struct Words {
    base: NonNull<AtomicU64>,
    count: usize,
    /// Every store, in its order, for tests that stop after each.
    #[cfg(test)]
    pub stores: std::cell::RefCell<Vec<(usize, u64)>>,
}

impl Words {
    /// A new file of `count` words of zero, in place of one that may be there.
    ///
    /// # Errors
    /// What the system says: ENOSPC if the file system has no room.
    pub fn create(path: &Path, count: usize) -> io::Result<Words> {
        match porter::remove(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = porter::open(path, How { create: Some(0o600), ..How::WRITE })?;
        let bytes = count.checked_mul(size_of::<u64>()).and_then(|bytes| i64::try_from(bytes).ok());
        posix_fallocate(&file, 0, bytes.ok_or(io::ErrorKind::InvalidInput)?)?;
        Words::map(&file, count)
    }

    /// An existing file, which must have `count` words.
    ///
    /// # Errors
    /// `NotFound`; `InvalidData` for one of another length; what the system says.
    pub fn open(path: &Path, count: usize) -> io::Result<Words> {
        let file = porter::open(path, How::WRITE)?;
        if usize::try_from(file.metadata()?.len()).ok() != count.checked_mul(size_of::<u64>()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it has another length"));
        }
        Words::map(&file, count)
    }

    fn map(file: &File, count: usize) -> io::Result<Words> {
        let bytes = NonZeroUsize::new(count.saturating_mul(size_of::<u64>()));
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel picks a free range of addresses, so no existing mapping changes.
        let base = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Words {
            base: base.cast(),
            count,
            #[cfg(test)]
            stores: std::cell::RefCell::default(),
        })
    }

    fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.count, "word {index} of {}", self.count);
        // SAFETY: inside the mapping, as just checked.
        let at = unsafe { self.base.add(index) };
        // SAFETY: the mapping is page aligned, lives as long as `self`, and is reached through atomics only.
        unsafe { at.as_ref() }
    }

    /// The word at `index`.
    pub fn load(&self, index: usize) -> u64 {
        self.at(index).load(Ordering::Acquire)
    }

    /// Stores a word, after everything that was stored before: who finds it finds that too.
    pub fn store(&self, index: usize, value: u64) {
        #[cfg(test)]
        self.stores.borrow_mut().push((index, value));
        self.at(index).store(value, Ordering::Release);
    }

    /// Adds to a word to which others may add at the same time; wraps around.
    pub fn add(&self, index: usize, more: u64) {
        self.at(index).fetch_add(more, Ordering::Relaxed);
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every reference into it borrowed `self`.
        let unmapped = unsafe { munmap(self.base.cast(), self.count * size_of::<u64>()) };
        if let Err(errno) = unmapped {
            log::error!("cannot unmap a file in memory: {errno}");
        }
    }
}
