//! How a worker thread waits: operations on files, and two watched descriptors.
//!
//! Starting an operation queues it; everything queued goes to the kernel in one system call when the thread has nothing
//! else to do ([`Reactor::turn`]). An [`Op`] is the future of its result.
//!
//! **Ownership of memory in flight**: the kernel writes to the buffer of a read whenever it likes until the operation
//! has ended. The caller therefore keeps the [`Buf`](crate::buf::Buf) beside the `Op`, declared before it; if an `Op` is
//! dropped early (a task being torn down), its drop waits for the end.

mod uring;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::ptr::NonNull;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::errno::Errno;

use self::uring::{Transfer, Uring};
use crate::buf::Piece;
use crate::executor::{Scheduler, TaskId};

/// Keys of the watched descriptors; operations count up from 0.
const KEY_EVENTS: u64 = u64::MAX;
const KEY_COMMANDS: u64 = u64::MAX - 1;
const KEY_TIMER: u64 = u64::MAX - 2;

/// Memory that was registered with the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixed(u16);

/// The I/O of one worker thread.
pub struct Reactor {
    engine: RefCell<Uring>,
    scheduler: Rc<Scheduler>,
    ops: RefCell<Ops>,
    watched: RefCell<Watched>,
    readable: Cell<Readable>,
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("ops", &self.ops).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Watched {
    events: Option<i32>,
    commands: Option<i32>,
}

/// What became readable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readable {
    /// The event channel descriptor.
    pub events: bool,
    /// The command queue.
    pub commands: bool,
    /// The time asked for with [`Reactor::timer`] has come.
    pub timer: bool,
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
    free: Vec<usize>,
}

impl Ops {
    fn begin(&mut self) -> usize {
        if let Some(index) = self.free.pop() {
            self.slots[index] = Slot::Flying(None);
            return index;
        }
        self.slots.push(Slot::Flying(None));
        // So that ending an operation never allocates.
        self.free.reserve(self.slots.len());
        self.slots.len() - 1
    }

    fn land(&mut self, index: usize, result: i32) -> Option<TaskId> {
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
    pub fn new(scheduler: Rc<Scheduler>) -> io::Result<Rc<Reactor>> {
        Ok(Rc::new(Reactor {
            engine: RefCell::new(Uring::new()?),
            scheduler,
            ops: RefCell::default(),
            watched: RefCell::default(),
            readable: Cell::default(),
        }))
    }

    /// Registers memory, which saves pinning it for each operation. `None`: operations on it cost a little more.
    ///
    /// The caller gives it up with [`Reactor::unfix`] before it unmaps it.
    pub fn fix(&self, base: NonNull<u8>, len: usize) -> Option<Fixed> {
        self.engine.borrow_mut().register(base, len)
    }

    /// Gives registered memory up.
    pub fn unfix(&self, fixed: Fixed) {
        self.engine.borrow_mut().unregister(fixed);
    }

    /// Asks for [`Readable::timer`] once, after this time.
    pub fn timer(&self, after: Duration) -> io::Result<()> {
        self.engine.borrow_mut().timer(after, KEY_TIMER)
    }

    /// Whether [`Reactor::turn`] would find something; for polling, costs no system call.
    pub fn has_news(&self) -> bool {
        self.engine.borrow_mut().has_news()
    }

    /// Watches the descriptor of the command queue.
    pub fn watch_commands(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watched.borrow_mut().commands = Some(fd.as_raw_fd());
        self.engine.borrow_mut().watch(fd.as_raw_fd(), KEY_COMMANDS)
    }

    /// Watches the descriptor of the event channels.
    pub fn watch_events(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.watched.borrow_mut().events = Some(fd.as_raw_fd());
        self.engine.borrow_mut().watch(fd.as_raw_fd(), KEY_EVENTS)
    }

    fn start(&self, queue: impl FnOnce(&mut Uring, u64) -> io::Result<()>) -> Op<'_> {
        let index = self.ops.borrow_mut().begin();
        if let Err(error) = queue(&mut self.engine.borrow_mut(), index as u64) {
            // Never reached the kernel: it ends here with the error.
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            self.ops.borrow_mut().land(index, -errno);
        }
        Op { reactor: self, index: Some(index) }
    }

    /// Starts reading into `piece`; the result is the number of bytes, 0 at the end of the file.
    pub fn read(&self, file: BorrowedFd<'_>, offset: u64, piece: Piece) -> Op<'_> {
        self.start(|engine, key| engine.transfer(Transfer::Read, file.as_raw_fd(), offset, piece, key))
    }

    /// Starts writing `piece`; the result is the number of bytes.
    pub fn write(&self, file: BorrowedFd<'_>, offset: u64, piece: Piece) -> Op<'_> {
        self.start(|engine, key| engine.transfer(Transfer::Write, file.as_raw_fd(), offset, piece, key))
    }

    /// Starts an `fdatasync`.
    pub fn fdatasync(&self, file: BorrowedFd<'_>) -> Op<'_> {
        self.start(|engine, key| engine.fdatasync(file.as_raw_fd(), key))
    }

    /// Starts a `fallocate` with `FALLOC_FL_*` mode bits.
    pub fn fallocate(&self, file: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> Op<'_> {
        self.start(|engine, key| engine.fallocate(file.as_raw_fd(), mode, offset, len, key))
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
        if wait || engine.has_queued() {
            engine.enter(wait)?;
        }
        let mut readable = self.readable.get();
        while let Some((key, result, more)) = engine.complete() {
            match key {
                KEY_TIMER => readable.timer = true,
                KEY_EVENTS | KEY_COMMANDS => {
                    let watched = self.watched.borrow();
                    let fd = if key == KEY_EVENTS {
                        readable.events = true;
                        watched.events
                    } else {
                        readable.commands = true;
                        watched.commands
                    };
                    if let (false, Some(fd)) = (more, fd) {
                        engine.watch(fd, key)?;
                    }
                }
                _ => {
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
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::buf::Pool;
    use crate::executor::Executor;

    fn run(reactor: &Reactor, executor: &Executor, done: &Cell<bool>) {
        while !done.get() {
            if !executor.run_ready() {
                reactor.turn(true).unwrap();
            }
        }
    }

    #[test]
    fn what_is_written_is_read_back_with_and_without_registration() {
        for register in [false, true] {
            let scheduler = Rc::new(Scheduler::default());
            let executor = Executor::new(scheduler.clone());
            let reactor = Reactor::new(scheduler.clone()).unwrap();
            let pool = Pool::new(scheduler, 1 << 20).unwrap();
            if register {
                pool.register_with(reactor.clone());
            }
            let file: Rc<File> = Rc::new(tempfile::tempfile().unwrap());
            let done = Rc::new(Cell::new(false));
            executor.spawn({
                let (reactor, pool, file, done) = (reactor.clone(), pool.clone(), file.clone(), done.clone());
                async move {
                    let mut out = pool.data(8192).unwrap();
                    out.bytes_mut().iter_mut().zip((0..251).cycle()).for_each(|(to, byte)| *to = byte);
                    let wrote = reactor.write(file.as_fd(), 512, out.piece(0..8192).unwrap()).await;
                    assert_eq!(wrote, Ok(8192));
                    assert_eq!(reactor.fdatasync(file.as_fd()).await, Ok(0));
                    let back = pool.data(8192).unwrap();
                    let (a, b) = (
                        reactor.read(file.as_fd(), 512, back.piece(0..4096).unwrap()),
                        reactor.read(file.as_fd(), 4608, back.piece(4096..8192).unwrap()),
                    );
                    assert_eq!((a.await, b.await), (Ok(4096), Ok(4096)));
                    assert_eq!(back.bytes(), out.bytes());
                    done.set(true);
                }
            });
            run(&reactor, &executor, &done);
        }
    }

    #[test]
    fn errors_come_back_as_errno() {
        let scheduler = Rc::new(Scheduler::default());
        let executor = Executor::new(scheduler.clone());
        let reactor = Reactor::new(scheduler.clone()).unwrap();
        let pool = Pool::new(scheduler, 4096).unwrap();
        let done = Rc::new(Cell::new(false));
        executor.spawn({
            let (reactor, done) = (reactor.clone(), done.clone());
            async move {
                let file = File::open("/proc/self/exe").unwrap();
                let buf = pool.data(512).unwrap();
                let wrote = reactor.write(file.as_fd(), 0, buf.piece(0..512).unwrap()).await;
                assert_eq!(wrote, Err(Errno::EBADF));
                done.set(true);
            }
        });
        run(&reactor, &executor, &done);
    }

    #[test]
    fn a_dropped_operation_is_waited_for() {
        let scheduler = Rc::new(Scheduler::default());
        let reactor = Reactor::new(scheduler.clone()).unwrap();
        let pool = Pool::new(scheduler, 4096).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let buf = pool.data(4096).unwrap();
        drop(reactor.read(file.as_fd(), 0, buf.piece(0..4096).unwrap()));
        assert!(matches!(reactor.ops.borrow().slots[..], [Slot::Free]));
    }

    #[test]
    fn what_became_readable_while_an_operation_was_dropped_is_told() {
        let scheduler = Rc::new(Scheduler::default());
        let reactor = Reactor::new(scheduler.clone()).unwrap();
        let pool = Pool::new(scheduler, 4096).unwrap();
        let wake = nix::sys::eventfd::EventFd::new().unwrap();
        reactor.watch_commands(wake.as_fd()).unwrap();
        reactor.turn(false).unwrap();
        wake.write(1).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let buf = pool.data(4096).unwrap();
        drop(reactor.read(file.as_fd(), 0, buf.piece(0..4096).unwrap()));
        assert!(reactor.turn(true).unwrap().commands);
    }
}
