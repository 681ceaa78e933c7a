//! io_uring: the only file that hands pointers to the kernel's ring.
//!
//! Invariants this file owns:
//!
//! 1. every submission entry refers to a [`Piece`] whose buffer outlives the operation (kept by the caller, see
//!    `reactor`: an [`super::Op`] that is dropped early waits for its end first), or to no memory at all;
//! 2. every descriptor given to the kernel stays open until its operation has ended, one in the table of files until it is
//!    taken out, one that is watched until that is ended, or the ring is;
//! 3. registered memory stays mapped until it is unregistered or the ring is gone (the kernel holds the pages themselves
//!    as long as an operation uses them).
#![expect(unsafe_code, reason = "submission entries carry raw pointers")]

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};

use super::{Fixed, Target};
use crate::buf::Piece;

/// Entries of the submission queue; the completion queue has twice as many and never loses one (NODROP).
const ENTRIES: u32 = 256;

/// Places for registered memory: the pool's chunks, and the mappings of the guests' pages.
const FIXED_PLACES: u16 = 2048;

/// Keys of completions that say that a place's memory was released; behind the last number of an operation.
const RELEASED: u64 = 1 << 62;

/// Places for files at hand: the layers of a chain.
const FILE_PLACES: u32 = 64;

/// `IORING_ENTER_GETEVENTS`: run what the kernel has put off for us, and show the completions.
const GET_EVENTS: u32 = 1;

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
    /// Free places of the table of registered memory; `None` until it is first needed, empty if the kernel has no table.
    places: Option<Vec<u16>>,
    /// Free places of the table of files; likewise.
    file_places: Option<Vec<u32>>,
    /// The time that the last timer entry points to.
    time: types::Timespec,
}

impl Uring {
    /// A ring with the cheapest set-up the kernel allows.
    pub(super) fn new() -> io::Result<Uring> {
        // Completions are then delivered when we ask for them, not by interrupting us, and a flag in shared memory says
        // that there are some; Linux 6.1.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES)
            .or_else(|_| IoUring::builder().build(ENTRIES))?;
        // Saves looking the descriptor up in each call. Refusal (before Linux 5.18) costs nothing but that.
        let _ = ring.submitter().register_ring_fd();
        Ok(Uring { ring, places: None, file_places: None, time: types::Timespec::new() })
    }

    /// Registers memory, so that operations on it need not pin it each time; `None` if the kernel refuses.
    ///
    /// It stays mapped until it is [unregistered](Uring::unregister) (invariant 3).
    pub(super) fn register(&mut self, base: NonNull<u8>, len: usize) -> Option<Fixed> {
        let places = self.places.get_or_insert_with(|| {
            let table = self.ring.submitter().register_buffers_sparse(u32::from(FIXED_PLACES));
            if let Err(error) = &table {
                log::warn!("the kernel registers no memory for I/O ({error}); I/O costs a little more");
            }
            table.map_or_else(|_| Vec::new(), |()| (0..FIXED_PLACES).rev().collect())
        });
        let place = places.pop()?;
        let memory = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: len };
        let tag = [RELEASED + u64::from(place)];
        // SAFETY: invariant 3, kept by the callers of `Reactor::fix`.
        let registered =
            unsafe { self.ring.submitter().register_buffers_update(u32::from(place), &[memory], Some(&tag)) };
        match registered {
            Ok(_) => Some(Fixed(place)),
            Err(error) => {
                log::debug!("registering {len} bytes for I/O failed: {error}");
                places.push(place);
                None
            }
        }
    }

    /// Gives registered memory up. The kernel lets go of it when the operations in flight have ended; a completion says so,
    /// see [`Uring::released`].
    pub(super) fn unregister(&mut self, Fixed(place): Fixed) {
        let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty place refers to no memory.
        let emptied =
            unsafe { self.ring.submitter().register_buffers_update(u32::from(place), &[nothing], None) };
        if let Err(error) = &emptied {
            log::warn!("giving registered memory up failed: {error}");
        }
    }

    /// Whether a completion's key says that memory has been released; its place is free again then.
    pub(super) fn released(&mut self, key: u64) -> bool {
        let place = key.checked_sub(RELEASED).and_then(|place| u16::try_from(place).ok());
        let Some(place) = place.filter(|&place| place < FIXED_PLACES) else { return false };
        self.places.get_or_insert_default().push(place);
        true
    }

    /// Puts a file into the ring's table; `None` if there is no place, or the kernel has no table.
    pub(super) fn register_file(&mut self, fd: RawFd) -> Option<u32> {
        let places = self.file_places.get_or_insert_with(|| {
            let table = self.ring.submitter().register_files_sparse(FILE_PLACES);
            table.map_or_else(|_| Vec::new(), |()| (0..FILE_PLACES).rev().collect())
        });
        let place = places.pop()?;
        if let Err(error) = self.ring.submitter().register_files_update(place, &[fd]) {
            log::debug!("keeping a file at hand failed: {error}");
            places.push(place);
            return None;
        }
        Some(place)
    }

    /// Takes a file out of the table. Operations in flight on it go on.
    pub(super) fn unregister_file(&mut self, place: u32) {
        match (self.ring.submitter().register_files_update(place, &[-1]), &mut self.file_places) {
            (Ok(_), Some(places)) => places.push(place),
            (result, _) => log::warn!("letting go of a file failed: {result:?}"),
        }
    }

    /// Queues a transfer. The caller keeps the buffer until the completion with `key` arrives (invariant 1).
    pub(super) fn transfer(
        &mut self,
        what: Transfer,
        Target { fd, place }: Target,
        offset: u64,
        piece: Piece,
        key: u64,
    ) -> io::Result<()> {
        let (ptr, len) = (piece.ptr.as_ptr(), piece.len);
        let (fd, flags) = match place {
            // A place in the table stands where the descriptor does otherwise.
            Some(place) => (types::Fd(place.cast_signed()), squeue::Flags::FIXED_FILE),
            None => (types::Fd(fd), squeue::Flags::empty()),
        };
        let entry = match (what, piece.fixed) {
            (Transfer::Read, Some(Fixed(place))) => {
                opcode::ReadFixed::new(fd, ptr, len, place).offset(offset).build()
            }
            (Transfer::Read, None) => opcode::Read::new(fd, ptr, len).offset(offset).build(),
            (Transfer::Write, Some(Fixed(place))) => {
                opcode::WriteFixed::new(fd, ptr.cast_const(), len, place).offset(offset).build()
            }
            (Transfer::Write, None) => opcode::Write::new(fd, ptr.cast_const(), len).offset(offset).build(),
        };
        self.push(entry.flags(flags).user_data(key))
    }

    /// Queues receiving or sending on a stream socket. As [`Uring::transfer`].
    pub(super) fn stream(&mut self, what: Transfer, fd: RawFd, piece: Piece, key: u64) -> io::Result<()> {
        let (fd, ptr, len) = (types::Fd(fd), piece.ptr.as_ptr(), piece.len);
        let entry = match what {
            Transfer::Read => opcode::Recv::new(fd, ptr, len).build(),
            Transfer::Write => opcode::Send::new(fd, ptr.cast_const(), len).flags(libc::MSG_NOSIGNAL).build(),
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

    /// Ends the watch with `key`, which completes without the "more" mark then; a completion with `done` follows.
    pub(super) fn unwatch(&mut self, key: u64, done: u64) -> io::Result<()> {
        // Not the operation that removes polls: it gives up (EALREADY) where input is just being reported.
        self.push(opcode::AsyncCancel::new(key).build().user_data(done))?;
        // The watch itself may still be queued, and the caller closes the descriptor (invariant 2).
        self.enter(false)
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: invariants 1 and 2 hold for every entry built above.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.enter(false)?;
        }
    }

    /// Queues a timer: a completion with `key` after `after`.
    pub(super) fn timer(&mut self, after: Duration, key: u64) -> io::Result<()> {
        self.time = types::Timespec::from(after);
        // The kernel reads the time when it takes the entry, which is done before this returns.
        let entry = opcode::Timeout::new(&raw const self.time).build();
        self.push(entry.user_data(key))?;
        self.enter(false)
    }

    /// Hands queued entries to the kernel, has it show all completions, and with `wait` sleeps until there is one.
    pub(super) fn enter(&mut self, wait: bool) -> io::Result<()> {
        loop {
            let queued = u32::try_from(self.ring.submission().len()).map_err(io::Error::other)?;
            // SAFETY: no argument beside the numbers; the entries are good by invariants 1 and 2.
            let entered = unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(queued, u32::from(wait), GET_EVENTS, None)
            };
            match entered {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue is full: take completions first, then submit again.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Whether [`Uring::enter`] or [`Uring::complete`] has something for us; costs no system call.
    pub(super) fn has_news(&mut self) -> bool {
        let taskrun = self.ring.submission().taskrun();
        taskrun || !self.ring.completion().is_empty()
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
