//! How a worker thread waits: operations on files and sockets, and watched descriptors.
//!
//! `engine` carries them out, by io_uring or by threads; nothing above this folder knows which.
//!
//! Starting an operation queues it; everything queued goes to the kernel in one system call when the thread has nothing
//! else to do ([`Reactor::turn`]). An [`Op`] is the future of its result.
//!
//! **Ownership of memory in flight**: the kernel writes to the buffer of a read whenever it likes until the operation
//! has ended. The caller therefore keeps the [`Buf`](crate::buf::Buf) beside the `Op`, declared before it; if an `Op` is
//! dropped early (a task being torn down), its drop waits for the end.

mod engine;
mod orders;
mod pool;
mod uring;
mod watch;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::ptr::NonNull;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::errno::Errno;

use self::engine::Engine;
pub use self::engine::{EngineChoice, UnknownEngine};
pub use self::orders::{Kind, Order};
use self::uring::Transfer;
pub use self::watch::Watch;
use self::watch::Watches;
use crate::buf::Piece;
use crate::executor::{Scheduler, TaskId};

/// That the engine has stopped watching a descriptor; operations count up from 0.
const KEY_UNWATCHED: u64 = u64::MAX;
/// The descriptor of the command queue.
const KEY_COMMANDS: u64 = u64::MAX - 1;
/// The engine's own.
const KEY_HELPER: u64 = u64::MAX - 2;
/// One for each [`Timer`].
const KEY_TIMERS: [u64; 6] =
    [u64::MAX - 3, u64::MAX - 4, u64::MAX - 5, u64::MAX - 6, u64::MAX - 7, u64::MAX - 8];

/// Memory that was registered with the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed(u16);

/// The file of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Open until the transfer has ended.
    fd: RawFd,
    /// Its place among the files that the engine keeps at hand.
    place: Option<u32>,
}

impl From<BorrowedFd<'_>> for Target {
    fn from(fd: BorrowedFd<'_>) -> Target {
        Target { fd: fd.as_raw_fd(), place: None }
    }
}

/// A file that the engine keeps at hand, which saves looking it up for each transfer. Dropping it ends that.
#[derive(Debug)]
pub struct FixedFile {
    reactor: Rc<Reactor>,
    target: Target,
}

impl FixedFile {
    /// What to start transfers with.
    pub fn target(&self) -> Target {
        self.target
    }

    /// The same for the file that takes this one's place.
    pub fn replace(self, fd: BorrowedFd<'_>) -> FixedFile {
        self.reactor.clone().fix_file(fd)
    }
}

impl Drop for FixedFile {
    fn drop(&mut self) {
        if let Some(place) = self.target.place {
            self.reactor.engine.borrow_mut().unregister_file(place);
        }
    }
}

/// What a timer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timer {
    /// Giving unused memory back.
    Housekeeping,
    /// Looking at a ring again whose event channel is kept silent.
    HoldOff,
    /// Looking at a ring again that was not allowed to take a request.
    Limit,
    /// Trying requests again that have failed.
    Retry,
    /// Looking for requests that the store does not answer.
    Late,
    /// Giving up a pause that takes too long.
    Pause,
}

/// The I/O of one worker thread.
pub struct Reactor {
    engine: RefCell<Engine>,
    scheduler: Rc<Scheduler>,
    ops: RefCell<Ops>,
    commands: Cell<Option<RawFd>>,
    watches: RefCell<Watches>,
    readable: Cell<Readable>,
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("ops", &self.ops).finish_non_exhaustive()
    }
}

/// What became readable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readable {
    /// One or more of the descriptors with a [`Watch`].
    pub events: bool,
    /// The command queue.
    pub commands: bool,
    /// The timers whose time has come, by [`Timer`].
    pub timers: [bool; 6],
}

#[derive(Clone, Copy, Debug)]
enum Slot {
    Free,
    /// In flight; the task to wake, once it is known.
    Flying(Option<TaskId>),
    /// Ended with this result.
    Landed(i32),
}

#[derive(Debug, Default)]
struct Ops {
    slots: Vec<Slot>,
    /// What those in flight are, by the same index.
    orders: Vec<Option<Order>>,
    free: Vec<usize>,
}

impl Ops {
    fn begin(&mut self, order: Option<Order>) -> usize {
        if let Some(index) = self.free.pop() {
            self.slots[index] = Slot::Flying(None);
            self.orders[index] = order;
            return index;
        }
        self.slots.push(Slot::Flying(None));
        self.orders.push(order);
        // So that ending an operation never allocates.
        self.free.reserve(self.slots.len());
        self.slots.len() - 1
    }

    fn land(&mut self, index: usize, result: i32) -> Option<TaskId> {
        self.orders[index] = None;
        match std::mem::replace(&mut self.slots[index], Slot::Landed(result)) {
            Slot::Flying(task) => task,
            Slot::Free | Slot::Landed(_) => unreachable!("an operation completes once"),
        }
    }

    fn release(&mut self, index: usize) {
        self.slots[index] = Slot::Free;
        self.free.push(index);
    }
}

impl Reactor {
    /// A reactor for the calling thread, which alone may use it.
    pub fn new(scheduler: Rc<Scheduler>, choice: EngineChoice) -> io::Result<Rc<Reactor>> {
        Ok(Rc::new(Reactor {
            engine: RefCell::new(Engine::new(choice)?),
            ops: RefCell::default(),
            commands: Cell::default(),
            watches: RefCell::default(),
            readable: Cell::default(),
            scheduler,
        }))
    }

    /// Registers memory, which saves pinning it for each operation. `None`: operations on it cost a little more.
    ///
    /// The caller gives it up with [`Reactor::unfix`] before it unmaps it.
    pub fn fix(&self, base: NonNull<u8>, len: usize) -> Option<Fixed> {
        self.engine.borrow_mut().register(base, len)
    }

    /// Gives registered memory up. The kernel lets go of it once the operations in flight have ended, whatever memory they use.
    pub fn unfix(&self, fixed: Fixed) {
        self.engine.borrow_mut().unregister(fixed);
    }

    /// Keeps a file at hand. Its descriptor stays open until the result is dropped.
    pub fn fix_file(self: &Rc<Self>, fd: BorrowedFd<'_>) -> FixedFile {
        let place = self.engine.borrow_mut().register_file(fd.as_raw_fd());
        FixedFile { reactor: self.clone(), target: Target { place, ..fd.into() } }
    }

    /// Asks for the mark in [`Readable::timers`] once, after this time.
    pub fn timer(&self, timer: Timer, after: Duration) -> io::Result<()> {
        self.engine.borrow_mut().timer(after, KEY_TIMERS[timer as usize])
    }

    /// Whether operations wait to be handed to the engine by [`Reactor::turn`].
    pub fn has_queued(&self) -> bool {
        self.engine.borrow_mut().has_queued()
    }

    /// Whether [`Reactor::turn`] would find something; for polling, costs no system call.
    pub fn has_news(&self) -> bool {
        self.engine.borrow_mut().has_news()
    }

    /// Watches the descriptor of the command queue.
    pub fn watch_commands(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.commands.set(Some(fd.as_raw_fd()));
        self.engine.borrow_mut().watch(fd.as_raw_fd(), KEY_COMMANDS)
    }

    /// Watches a descriptor, which stays open until the result is dropped.
    pub fn watch(self: &Rc<Self>, fd: BorrowedFd<'_>) -> io::Result<Watch> {
        let place = self.watches.borrow_mut().begin(fd.as_raw_fd());
        let watched = self.engine.borrow_mut().watch(fd.as_raw_fd(), watch::key_of(place));
        if let Err(error) = watched {
            self.watches.borrow_mut().end(place, true);
            return Err(error);
        }
        Ok(Watch::new(self.clone(), place))
    }

    fn unwatch(&self, place: usize) -> io::Result<()> {
        let mut engine = self.engine.borrow_mut();
        self.watches.borrow_mut().end(place, !engine.reports_last());
        engine.unwatch(watch::key_of(place), KEY_UNWATCHED)
    }

    /// Starts an operation; `order`: what the store is asked for.
    fn start(&self, order: Option<Order>, queue: impl FnOnce(&mut Engine, u64) -> io::Result<()>) -> Op<'_> {
        let index = self.ops.borrow_mut().begin(order);
        if let Err(error) = queue(&mut self.engine.borrow_mut(), index as u64) {
            // Never reached the kernel: it ends here with the error.
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.ops.borrow_mut().land(index, -errno);
        }
        Op { reactor: self, index: Some(index) }
    }

    /// Starts reading into `piece`; the result is the number of bytes, 0 at the end of the file.
    pub fn read(&self, file: Target, offset: u64, piece: Piece) -> Op<'_> {
        let order = Order::transfer(Kind::Read, file.fd, offset, piece.len);
        self.start(Some(order), |engine, key| engine.transfer(Transfer::Read, file, offset, piece, key))
    }

    /// Starts writing `piece`; the result is the number of bytes.
    pub fn write(&self, file: Target, offset: u64, piece: Piece) -> Op<'_> {
        let order = Order::transfer(Kind::Write, file.fd, offset, piece.len);
        self.start(Some(order), |engine, key| engine.transfer(Transfer::Write, file, offset, piece, key))
    }

    /// Starts receiving into `piece` from a connected stream socket, which must not be in non-blocking mode; the result is the
    /// number of bytes, 0 at the end of the stream. `shutdown(2)` ends it early.
    pub fn receive(&self, socket: BorrowedFd<'_>, piece: Piece) -> Op<'_> {
        // Silence of a peer is not one of a store: who speaks to a server knows what it owes.
        self.start(None, |engine, key| engine.stream(Transfer::Read, socket.as_raw_fd(), piece, key))
    }

    /// Starts sending `piece` on such a socket; the result is the number of bytes. EPIPE is no signal.
    pub fn send(&self, socket: BorrowedFd<'_>, piece: Piece) -> Op<'_> {
        self.start(None, |engine, key| engine.stream(Transfer::Write, socket.as_raw_fd(), piece, key))
    }

    /// Starts an `fdatasync`.
    pub fn fdatasync(&self, file: BorrowedFd<'_>) -> Op<'_> {
        let order = Order::transfer(Kind::Flush, file.as_raw_fd(), 0, 0);
        self.start(Some(order), |engine, key| engine.fdatasync(file.as_raw_fd(), key))
    }

    /// Starts a `fallocate` with `FALLOC_FL_*` mode bits.
    pub fn fallocate(&self, file: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> Op<'_> {
        let order = Order::range(Kind::Allocate, file.as_raw_fd(), offset, len);
        self.start(Some(order), |engine, key| engine.fallocate(file.as_raw_fd(), mode, offset, len, key))
    }

    /// Starts something rare that blocks, on a thread; the result is the number that `work` returns.
    pub fn blocking(&self, work: impl FnOnce() -> io::Result<u32> + Send + 'static) -> Op<'_> {
        self.start(Some(Order::nameless(Kind::Other)), |engine, key| engine.blocking(Box::new(work), key))
    }

    /// The operation on a file or device that was started first of those that have not ended.
    pub fn oldest(&self) -> Option<Order> {
        self.ops.borrow().orders.iter().flatten().copied().min_by_key(|order| order.since)
    }

    /// Takes completions, waking their tasks, and says what has become readable since the last call. With `wait`, sleeps
    /// until there is something.
    pub fn turn(&self, wait: bool) -> io::Result<Readable> {
        // What an operation being dropped has met with is still to be told.
        let known = self.readable.get() != Readable::default();
        self.advance(wait && !known)?;
        Ok(self.readable.take())
    }

    fn advance(&self, wait: bool) -> io::Result<()> {
        let mut engine = self.engine.borrow_mut();
        if wait || engine.has_queued() || engine.has_news() {
            engine.enter(wait)?;
        }
        let mut readable = self.readable.get();
        while let Some((key, result, more)) = engine.complete() {
            match key {
                _ if KEY_TIMERS.contains(&key) => {
                    for (mark, timer) in readable.timers.iter_mut().zip(KEY_TIMERS) {
                        *mark |= timer == key;
                    }
                }
                KEY_UNWATCHED => {}
                KEY_COMMANDS => {
                    readable.commands = true;
                    if let (false, Some(fd)) = (more, self.commands.get()) {
                        engine.watch(fd, key)?;
                    }
                }
                _ => {
                    if let Some(place) = watch::place_of(key) {
                        readable.events = true;
                        if let Some(fd) = self.watches.borrow_mut().report(place, more) {
                            engine.watch(fd, key)?;
                        }
                        continue;
                    }
                    if engine.released(key) {
                        continue;
                    }
                    let index = usize::try_from(key).map_err(io::Error::other)?;
                    if let Some(task) = self.ops.borrow_mut().land(index, result) {
                        self.scheduler.wake(task);
                    }
                }
            }
        }
        self.readable.set(readable);
        Ok(())
    }
}

/// An operation; the future of its result.
#[must_use = "an operation that is dropped is waited for"]
pub struct Op<'a> {
    reactor: &'a Reactor,
    /// `None` once the result was taken.
    index: Option<usize>,
}

impl fmt::Debug for Op<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Op").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Future for Op<'_> {
    type Output = Result<u32, Errno>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(index) = self.index else { return Poll::Pending };
        let mut ops = self.reactor.ops.borrow_mut();
        match &mut ops.slots[index] {
            Slot::Landed(result) => {
                let result = *result;
                ops.release(index);
                drop(ops);
                self.index = None;
                Poll::Ready(u32::try_from(result).map_err(|_| Errno::from_raw(-result)))
            }
            Slot::Flying(task) => {
                *task = self.reactor.scheduler.current();
                Poll::Pending
            }
            Slot::Free => unreachable!("the slot is ours until we release it"),
        }
    }
}

impl Drop for Op<'_> {
    fn drop(&mut self) {
        let Some(index) = self.index else { return };
        // The kernel may still use the buffer, which the caller drops next.
        while matches!(self.reactor.ops.borrow().slots[index], Slot::Flying(_)) {
            if let Err(error) = self.reactor.advance(true) {
                // Without its end the buffer can never be given up.
                log::error!("waiting for an I/O operation in flight failed: {error}");
                std::process::abort();
            }
        }
        self.reactor.ops.borrow_mut().release(index);
    }
}

#[cfg(test)]
mod tests;
