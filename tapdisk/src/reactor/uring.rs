//! io_uring: the only file that hands pointers to the kernel's ring.
//!
//! Invariants this file owns:
//!
//! 1. every submission entry refers to a [`Piece`] whose buffer outlives the operation (kept by the caller, see
//!    `reactor`: an [`super::Op`] that is dropped early waits for its end first), or to no memory at all;
//! 2. every descriptor given to the kernel stays open until its operation has ended; multishot polls end with the ring;
//! 3. a registered region stays mapped until it is unregistered or the ring is gone.
#![expect(unsafe_code, reason = "submission entries carry raw pointers")]

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;

use io_uring::{IoUring, opcode, squeue, types};

use crate::buf::Piece;

/// Entries of the submission queue; the completion queue has twice as many and never loses one (NODROP).
const ENTRIES: u32 = 256;

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transfer {
    /// From the file into memory.
    Read,
    /// From memory to the file.
    Write,
}

/// One ring, of one thread.
pub(super) struct Uring {
    ring: IoUring,
    registered: Option<(usize, usize)>,
}

impl Uring {
    /// A ring with the cheapest set-up the kernel allows.
    pub(super) fn new() -> io::Result<Uring> {
        // Completions are then delivered when we ask for them, not by interrupting us; Linux 6.1.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(ENTRIES)
            .or_else(|_| IoUring::builder().build(ENTRIES))?;
        Ok(Uring { ring, registered: None })
    }

    /// Registers the region that buffers come from; plain reads and writes are used if the kernel refuses.
    pub(super) fn register(&mut self, base: NonNull<u8>, len: usize) -> io::Result<()> {
        let region = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: len };
        // SAFETY: invariant 3: the pool and its reactor live together in one worker, the ring is dropped first.
        unsafe { self.ring.submitter().register_buffers(&[region]) }?;
        let start = base.addr().get();
        self.registered = Some((start, start + len));
        Ok(())
    }

    fn is_registered(&self, piece: Piece) -> bool {
        let start = piece.ptr.addr().get();
        self.registered.is_some_and(|(low, high)| start >= low && start + piece.len as usize <= high)
    }

    /// Queues a transfer. The caller keeps the buffer until the completion with `key` arrives (invariant 1).
    pub(super) fn transfer(
        &mut self,
        what: Transfer,
        fd: RawFd,
        offset: u64,
        piece: Piece,
        key: u64,
    ) -> io::Result<()> {
        let (fd, ptr, len) = (types::Fd(fd), piece.ptr.as_ptr(), piece.len);
        let entry = match (what, self.is_registered(piece)) {
            (Transfer::Read, true) => opcode::ReadFixed::new(fd, ptr, len, 0).offset(offset).build(),
            (Transfer::Read, false) => opcode::Read::new(fd, ptr, len).offset(offset).build(),
            (Transfer::Write, true) => {
                opcode::WriteFixed::new(fd, ptr.cast_const(), len, 0).offset(offset).build()
            }
            (Transfer::Write, false) => opcode::Write::new(fd, ptr.cast_const(), len).offset(offset).build(),
        };
        self.push(entry.user_data(key))
    }

    /// Queues an `fdatasync`.
    pub(super) fn fdatasync(&mut self, fd: RawFd, key: u64) -> io::Result<()> {
        let entry = opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build();
        self.push(entry.user_data(key))
    }

    /// Queues a `fallocate`.
    pub(super) fn fallocate(
        &mut self,
        fd: RawFd,
        mode: i32,
        offset: u64,
        len: u64,
        key: u64,
    ) -> io::Result<()> {
        let entry = opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build();
        self.push(entry.user_data(key))
    }

    /// Watches a descriptor for input until the ring is dropped or a completion comes without the "more" mark.
    pub(super) fn watch(&mut self, fd: RawFd, key: u64) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true).build();
        self.push(entry.user_data(key))
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: invariants 1 and 2 hold for every entry built above.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    /// Hands queued entries to the kernel and waits for at least `want` completions.
    pub(super) fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submitter().submit_and_wait(want) {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue is full: take completions first, then submit again.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether entries wait to be handed to the kernel.
    pub(super) fn has_queued(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// The next completion: key, result, and whether more will come for this key.
    pub(super) fn complete(&mut self) -> Option<(u64, i32, bool)> {
        let entry = self.ring.completion().next()?;
        Some((entry.user_data(), entry.result(), io_uring::cqueue::more(entry.flags())))
    }
}
