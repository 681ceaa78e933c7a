//! A file that several processes map, with an interface that is safe to use.
//!
//! # Invariants of this file
//!
//! - `base` is a shared mapping of `len` bytes of a file that never shrinks; it is unmapped once, on drop.
//! - Everything in it may change at any time. Words are reached through atomics only; bytes are copied through raw
//!   pointers, and no reference to them exists. A copy that races with another process gives bytes without meaning, as
//!   memory shared with a guest does.
#![expect(unsafe_code, reason = "maps a file and copies from and to the mapping; see the invariants above")]

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// A file mapped readable and writable, shared with whoever else maps it.
#[derive(Debug)]
pub struct SharedFile {
    base: NonNull<u8>,
    len: NonZeroUsize,
    file: File,
}

// SAFETY: the mapping is valid in the whole process, and is accessed by atomics and raw copies only.
unsafe impl Send for SharedFile {}
// SAFETY: as above.
unsafe impl Sync for SharedFile {}

impl SharedFile {
    /// Makes a file of `len` zero bytes. It appears under `path` only when it is complete.
    ///
    /// # Errors
    ///
    /// `AlreadyExists` if the path is taken.
    pub fn create(path: &Path, len: usize) -> io::Result<SharedFile> {
        let draft = path.with_extension(format!("draft-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&draft)?;
        file.set_len(len as u64)?;
        // Unlike a rename, a link does not replace what another process made meanwhile.
        let linked = std::fs::hard_link(&draft, path);
        std::fs::remove_file(&draft)?;
        linked?;
        SharedFile::map(file)
    }

    /// Maps an existing file, whole.
    pub fn open(path: &Path) -> io::Result<SharedFile> {
        SharedFile::map(OpenOptions::new().read(true).write(true).open(path)?)
    }

    fn map(file: File) -> io::Result<SharedFile> {
        let len = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidData)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel picks a free range of addresses, so no existing mapping changes.
        let base = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) }?;
        Ok(SharedFile { base: base.cast(), len, file })
    }

    /// Length in bytes.
    pub fn size(&self) -> usize {
        self.len.get()
    }

    /// The file, for mapping parts of it elsewhere.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The word at byte `offset`.
    ///
    /// # Panics
    ///
    /// If it does not lie in the file, or not at a multiple of 4.
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4), "word at {offset}");
        let at = self.at(offset, 4);
        // SAFETY: four aligned bytes of the mapping, which outlives `self`; other access to words is atomic too.
        unsafe { AtomicU32::from_ptr(at.cast::<u32>().as_ptr()) }
    }

    /// Copies from byte `offset` on.
    ///
    /// # Panics
    ///
    /// If the bytes do not all lie in the file.
    pub fn read(&self, offset: usize, to: &mut [u8]) {
        let from = self.at(offset, to.len());
        let to = NonNull::from(&mut *to);
        // SAFETY: `from` is inside the mapping; `to` is a live slice of this length, which no mapping overlaps.
        unsafe { from.copy_to_nonoverlapping(to.cast(), to.len()) };
    }

    /// Copies to byte `offset` on.
    ///
    /// # Panics
    ///
    /// If the bytes do not all lie in the file.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let to = self.at(offset, from.len());
        let from = NonNull::from(from);
        // SAFETY: `to` is inside the mapping; `from` is a live slice of this length, which no mapping overlaps.
        unsafe { to.copy_from_nonoverlapping(from.cast(), from.len()) };
    }

    /// The address of byte `offset`, with `len` bytes behind it inside the mapping.
    ///
    /// # Panics
    ///
    /// If the bytes do not all lie in the file.
    pub fn at(&self, offset: usize, len: usize) -> NonNull<u8> {
        let end = offset.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.size()), "{len} bytes at {offset} of {}", self.size());
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.base.add(offset) }
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every reference into it borrowed `self`.
        let unmapped = unsafe { munmap(self.base.cast(), self.size()) };
        if let Err(errno) = unmapped {
            log::error!("cannot unmap a shared file: {errno}");
        }
    }
}
