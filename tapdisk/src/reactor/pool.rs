//! The engine for where io_uring is refused: threads with blocking calls.
//!
//! ```text
//!  engine --orders (bounded channel)--> up to 4 threads: pread, pwrite, fdatasync, fallocate
//!         <--results (queue) + eventfd--
//! ```
//!
//! The thread of the disk sleeps in poll(2) on that eventfd, the watched descriptors and the sockets. On a socket it receives
//! and sends itself: a thread could wait there for ever.
//!
//! Invariants this file owns:
//!
//! 1. an order or a stream refers to a [`Piece`] whose memory outlives the operation (kept by the caller, see `reactor`: an
//!    [`super::Op`] that is dropped early waits for its end first), or to no memory; while it is under way nobody else
//!    touches those bytes, and the thread has let go of them before it tells the result;
//! 2. every descriptor in an order or a stream stays open until the operation has ended, a watched one until that is ended;
//! 3. every order that was taken is carried out and its result told once; dropping the engine waits for the threads.
#![expect(unsafe_code, reason = "the threads read and write memory by raw pointers")]

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::uring::Transfer;
use crate::buf::Piece;

/// Threads of a disk at most. Each holds one request to the device: four keep a disk busy without letting one guest fill
/// the machine with threads, and who wants a deeper queue has io_uring.
const THREADS: usize = 4;

/// Orders that wait for a thread in the channel; more wait with the engine.
const WAITING: usize = 64;

/// Something that blocks; its number becomes the operation's result.
pub(super) type Work = Box<dyn FnOnce() -> io::Result<u32> + Send>;

/// The memory of a transfer on its way to a thread.
struct Memory {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: invariant 1: from the order to its result the bytes belong to the thread that carries it out.
unsafe impl Send for Memory {}

enum Job {
    Transfer { what: Transfer, fd: RawFd, offset: u64, memory: Memory },
    Sync { fd: RawFd },
    Allocate { fd: RawFd, mode: i32, offset: u64, len: u64 },
    Blocking(Work),
}

struct Order {
    key: u64,
    job: Job,
}

/// Results on their way back.
struct Landed {
    results: Mutex<VecDeque<(u64, i32)>>,
    bell: EventFd,
}

impl Landed {
    fn tell(&self, key: u64, result: i32) {
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        let first = results.is_empty();
        results.push_back((key, result));
        drop(results);
        // The engine takes all results at once, so one ring announces every result until it has done so.
        if first && let Err(errno) = self.bell.write(1) {
            log::error!("cannot wake the thread of a disk: {errno}");
        }
    }
}

/// Threads that carry out orders.
pub(super) struct Workers {
    /// `None` only while being dropped.
    orders: Option<Sender<Order>>,
    /// For further threads.
    taking: Receiver<Order>,
    threads: Vec<JoinHandle<()>>,
    limit: usize,
    queued: VecDeque<Order>,
    /// Orders in the channel or with a thread, and results not yet taken.
    flying: usize,
    landed: Arc<Landed>,
    taken: VecDeque<(u64, i32)>,
}

impl Workers {
    /// One thread; up to `limit` are started when there is something for them to do.
    pub(super) fn new(limit: usize) -> io::Result<Workers> {
        let (orders, taking) = bounded(WAITING);
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let landed = Arc::new(Landed { results: Mutex::default(), bell });
        let mut workers = Workers {
            orders: Some(orders),
            taking,
            threads: Vec::with_capacity(limit),
            limit,
            queued: VecDeque::new(),
            flying: 0,
            landed,
            taken: VecDeque::new(),
        };
        workers.start_thread()?;
        Ok(workers)
    }

    fn start_thread(&mut self) -> io::Result<()> {
        let (orders, landed) = (self.taking.clone(), self.landed.clone());
        let thread = std::thread::Builder::new().name("disk-io".into()).spawn(move || {
            for Order { key, job } in orders {
                landed.tell(key, job.run());
            }
        })?;
        self.threads.push(thread);
        Ok(())
    }

    /// Readable when results have come.
    pub(super) fn bell(&self) -> RawFd {
        self.landed.bell.as_fd().as_raw_fd()
    }

    /// Makes the bell unreadable. To be followed by [`Workers::collect`], so that no result is slept through.
    pub(super) fn quieten(&self) {
        // EAGAIN: it had not rung.
        let _ = self.landed.bell.read();
    }

    /// Queues something that blocks.
    pub(super) fn blocking(&mut self, work: Work, key: u64) {
        self.queue(key, Job::Blocking(work));
    }

    fn queue(&mut self, key: u64, job: Job) {
        self.queued.push_back(Order { key, job });
    }

    /// Hands queued orders to the threads, as many as there is room for.
    pub(super) fn submit(&mut self) {
        while let (Some(order), Some(orders)) = (self.queued.pop_front(), &self.orders) {
            match orders.try_send(order) {
                Ok(()) => self.flying += 1,
                // Goes on when a result is taken.
                Err(TrySendError::Full(order) | TrySendError::Disconnected(order)) => {
                    self.queued.push_front(order);
                    break;
                }
            }
        }
        while self.threads.len() < self.limit.min(self.flying) {
            if let Err(error) = self.start_thread() {
                log::warn!("a disk does with {} I/O threads: {error}", self.threads.len());
                self.limit = self.threads.len();
            }
        }
    }

    /// Whether there are results to take.
    fn has_results(&self) -> bool {
        let results = self.landed.results.lock().unwrap_or_else(PoisonError::into_inner);
        !(results.is_empty() && self.taken.is_empty())
    }

    /// Moves results to where [`Workers::take`] finds them.
    pub(super) fn collect(&mut self) {
        if self.taken.is_empty() {
            // Swapped, so that both queues keep their memory.
            let mut results = self.landed.results.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::swap(&mut *results, &mut self.taken);
        }
    }

    /// The next result: key and number.
    pub(super) fn take(&mut self) -> Option<(u64, i32)> {
        let result = self.taken.pop_front()?;
        self.flying -= 1;
        if self.taken.is_empty() {
            // Results that came while these were being taken did not ring again if those were still there.
            self.collect();
        }
        if !self.queued.is_empty() {
            self.submit();
        }
        Some(result)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Without a sender the threads end after the last order.
        self.orders = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("an I/O thread of a disk has panicked");
            }
        }
    }
}

impl Job {
    /// Carries it out: the result is not negative, or a negated errno.
    fn run(self) -> i32 {
        match self {
            Job::Transfer { what, fd, offset, memory } => transfer(what, fd, offset, &memory),
            Job::Sync { fd } => {
                // SAFETY: no memory is involved; the descriptor is open (invariant 2).
                result(i64::from(unsafe { libc::fdatasync(fd) }))
            }
            Job::Allocate { fd, mode, offset, len } => {
                let (Ok(offset), Ok(len)) = (i64::try_from(offset), i64::try_from(len)) else {
                    return -libc::EINVAL;
                };
                // SAFETY: no memory is involved; the descriptor is open (invariant 2).
                result(i64::from(unsafe { libc::fallocate(fd, mode, offset, len) }))
            }
            Job::Blocking(work) => match work() {
                Ok(number) => i32::try_from(number).unwrap_or(-libc::EOVERFLOW),
                Err(error) => -error.raw_os_error().unwrap_or(libc::EIO),
            },
        }
    }
}

fn transfer(what: Transfer, fd: RawFd, offset: u64, memory: &Memory) -> i32 {
    let Ok(offset) = i64::try_from(offset) else { return -libc::EINVAL };
    let moved = match what {
        Transfer::Read => {
            // SAFETY: `memory` is ours to write until the result is told (invariant 1).
            unsafe { libc::pread(fd, memory.ptr.as_ptr().cast(), memory.len, offset) }
        }
        Transfer::Write => {
            // SAFETY: `memory` stays as it is until the result is told (invariant 1).
            unsafe { libc::pwrite(fd, memory.ptr.as_ptr().cast_const().cast(), memory.len, offset) }
        }
    };
    result(i64::try_from(moved).unwrap_or(-1))
}

/// What io_uring would give for the return value of a system call, right after it.
fn result(returned: i64) -> i32 {
    match i32::try_from(returned) {
        Ok(number) if number >= 0 => number,
        _ => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
    }
}

/// A timer that has not fired.
struct Pending {
    when: Instant,
    key: u64,
}

/// Receiving or sending that has not ended.
struct Stream {
    key: u64,
    what: Transfer,
    fd: RawFd,
    memory: Memory,
}

impl Stream {
    /// Tries it without waiting; `None` if it has to wait.
    fn run(&self) -> Option<i32> {
        let (ptr, len, flags) = (self.memory.ptr.as_ptr(), self.memory.len, libc::MSG_DONTWAIT);
        let moved = match self.what {
            Transfer::Read => {
                // SAFETY: `memory` is ours to write until the result is told (invariant 1).
                unsafe { libc::recv(self.fd, ptr.cast(), len, flags) }
            }
            Transfer::Write => {
                // SAFETY: `memory` stays as it is until the result is told (invariant 1).
                unsafe { libc::send(self.fd, ptr.cast_const().cast(), len, flags | libc::MSG_NOSIGNAL) }
            }
        };
        Some(result(i64::try_from(moved).unwrap_or(-1))).filter(|&result| result != -libc::EAGAIN)
    }
}

struct Watched {
    key: u64,
    readable: bool,
}

/// The engine of one thread.
pub(super) struct Pool {
    workers: Workers,
    watched: Vec<Watched>,
    timers: Vec<Pending>,
    streams: Vec<Stream>,
    /// Some of `streams` were not tried yet.
    untried: bool,
    /// Results of streams.
    streamed: VecDeque<(u64, i32)>,
    /// The bell, then one for each of `watched`; in a call of poll(2) one for each of `streams` as well.
    polled: Vec<libc::pollfd>,
}

fn polled(fd: RawFd) -> libc::pollfd {
    libc::pollfd { fd, events: libc::POLLIN, revents: 0 }
}

impl Pool {
    /// An engine with one thread to begin with.
    pub(super) fn new() -> io::Result<Pool> {
        let workers = Workers::new(THREADS)?;
        let polled = vec![polled(workers.bell())];
        Ok(Pool {
            workers,
            watched: Vec::new(),
            timers: Vec::new(),
            streams: Vec::new(),
            untried: false,
            streamed: VecDeque::new(),
            polled,
        })
    }

    /// Queues a transfer. The caller keeps the memory until the completion with `key` arrives (invariant 1).
    pub(super) fn transfer(&mut self, what: Transfer, fd: RawFd, offset: u64, piece: Piece, key: u64) {
        let memory = Memory { ptr: piece.ptr, len: piece.len as usize };
        self.workers.queue(key, Job::Transfer { what, fd, offset, memory });
    }

    /// Queues receiving or sending. As [`Pool::transfer`].
    pub(super) fn stream(&mut self, what: Transfer, fd: RawFd, piece: Piece, key: u64) {
        let memory = Memory { ptr: piece.ptr, len: piece.len as usize };
        self.streams.push(Stream { key, what, fd, memory });
        self.untried = true;
    }

    /// Tries all streams. Those that have to wait stay, in their order.
    fn try_streams(&mut self) {
        self.untried = false;
        let streamed = &mut self.streamed;
        self.streams.retain(|stream| {
            let result = stream.run();
            streamed.extend(result.map(|result| (stream.key, result)));
            result.is_none()
        });
    }

    /// Queues an `fdatasync`.
    pub(super) fn fdatasync(&mut self, fd: RawFd, key: u64) {
        self.workers.queue(key, Job::Sync { fd });
    }

    /// Queues a `fallocate`.
    pub(super) fn fallocate(&mut self, fd: RawFd, mode: i32, offset: u64, len: u64, key: u64) {
        self.workers.queue(key, Job::Allocate { fd, mode, offset, len });
    }

    /// Queues something that blocks.
    pub(super) fn blocking(&mut self, work: Work, key: u64) {
        self.workers.blocking(work, key);
    }

    /// Reports input on a descriptor for as long as there is some.
    pub(super) fn watch(&mut self, fd: RawFd, key: u64) {
        self.watched.push(Watched { key, readable: false });
        self.polled.push(polled(fd));
    }

    /// Ends the watch with `key`.
    pub(super) fn unwatch(&mut self, key: u64) {
        if let Some(index) = self.watched.iter().position(|watched| watched.key == key) {
            self.watched.remove(index);
            // Behind the bell.
            self.polled.remove(index + 1);
        }
    }

    /// A completion with `key` after `after`.
    pub(super) fn timer(&mut self, after: Duration, key: u64) {
        self.timers.push(Pending { when: Instant::now() + after, key });
    }

    /// Whether results have come; input and timers are seen by [`Pool::enter`] only.
    pub(super) fn has_news(&self) -> bool {
        !self.streamed.is_empty() || self.workers.has_results()
    }

    /// Milliseconds until the next timer, at least; -1 without one, as poll(2) wants it.
    fn timeout(&self) -> i32 {
        let Some(next) = self.timers.iter().map(|timer| timer.when).min() else { return -1 };
        let left = next.saturating_duration_since(Instant::now());
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    /// Sets queued operations going, and looks for results and input; with `wait`, sleeps until there is some.
    pub(super) fn enter(&mut self, wait: bool) -> io::Result<()> {
        self.workers.submit();
        self.try_streams();
        let idle = self.workers.taken.is_empty() && self.streamed.is_empty();
        let timeout = if wait && idle { self.timeout() } else { 0 };
        let own = self.polled.len();
        self.polled.extend(self.streams.iter().map(|stream| {
            let events = if stream.what == Transfer::Read { libc::POLLIN } else { libc::POLLOUT };
            libc::pollfd { events, ..polled(stream.fd) }
        }));
        self.poll(timeout)?;
        if self.polled.drain(own..).any(|polled| polled.revents != 0) {
            self.try_streams();
        }
        if self.polled.first().is_some_and(|bell| bell.revents != 0) {
            self.workers.quieten();
            self.workers.collect();
        }
        for (watched, polled) in self.watched.iter_mut().zip(self.polled.iter().skip(1)) {
            watched.readable |= polled.revents != 0;
        }
        Ok(())
    }

    fn poll(&mut self, timeout: i32) -> io::Result<()> {
        let count = self.polled.len() as libc::nfds_t;
        loop {
            // SAFETY: `polled` is `count` initialised entries, which the call alone uses; the descriptors are open
            // (invariant 2).
            if unsafe { libc::poll(self.polled.as_mut_ptr(), count, timeout) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Whether orders wait to be handed to the threads.
    pub(super) fn has_queued(&self) -> bool {
        self.untried || !self.workers.queued.is_empty()
    }

    /// The next completion: key, result, and whether more will come for this key.
    pub(super) fn complete(&mut self) -> Option<(u64, i32, bool)> {
        self.workers.collect();
        if let Some((key, result)) = self.workers.take() {
            return Some((key, result, false));
        }
        if let Some((key, result)) = self.streamed.pop_front() {
            return Some((key, result, false));
        }
        if !self.timers.is_empty() {
            let now = Instant::now();
            if let Some(due) = self.timers.iter().position(|timer| timer.when <= now) {
                return Some((self.timers.swap_remove(due).key, 0, false));
            }
        }
        let watched = self.watched.iter_mut().find(|watched| watched.readable)?;
        watched.readable = false;
        Some((watched.key, i32::from(libc::POLLIN), true))
    }
}
