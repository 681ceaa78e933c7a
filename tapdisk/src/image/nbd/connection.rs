//! One connection, and the requests in flight on it.
//!
//! There is no task for the connection: the tasks that wait for replies do its work, each in its turn.
//!
//! - **Sending**: a request is copied into the buffer that is being filled. One task at a time sends a full buffer while the
//!   others fill the second one, so that the requests of a turn leave in one piece.
//! - **Receiving**: one task at a time is the *reader*. It takes what has come apart; what belongs to another
//!   request, that request's task is given to take, together with the role.
//!
//! **No deadlock with a server that stops reading until its replies are taken**: a task goes on receiving while it sends
//! ([`Connection::send_and_wait`]), a request of which some bytes still wait to be sent never makes its task the
//! reader, and the reader never waits for the sender.

mod inbox;
mod outbox;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Instant;

use nbd::client::{Ask, Export, Outcome, Session, Slot, Step, Violation, disconnect};
use nix::errno::Errno;

use self::inbox::Inbox;
use self::outbox::{Batch, Outbox};
use super::dial::Dialled;
use crate::buf::Buf;
use crate::executor::{Scheduler, TaskId};
use crate::io::Io;
use crate::reactor::Op;
use crate::socket::{interruptible, send_now};

/// Why a connection is of no use any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Broken {
    /// It has ended.
    Lost(String),
    /// The server breaks the protocol.
    Violation(Violation),
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Broken::Lost(why) => f.write_str(why),
            Broken::Violation(violation) => violation.fmt(f),
        }
    }
}

/// The memory of a request.
#[derive(Debug)]
pub enum Body<'a> {
    /// None.
    None,
    /// The bytes to write; what was sent is copied to the second as well.
    Send(&'a Buf, Range<usize>, Option<&'a RefCell<Vec<u8>>>),
    /// The bytes to write.
    Bytes(&'a [u8]),
    /// Where to put what is read.
    Receive(&'a Buf, Range<usize>),
}

/// The task of a request in flight.
#[derive(Debug, Default)]
struct Waiter {
    /// What the last byte of the request was put into, once it was.
    batch: Option<Batch>,
    /// It sleeps, and can become the reader.
    asleep: Option<TaskId>,
    outcome: Option<Outcome>,
}

/// A connection in the transmission phase.
pub struct Connection {
    socket: UnixStream,
    /// What it is for.
    pub export: Export,
    /// When the transmission phase began.
    pub begun: Instant,
    session: RefCell<Session>,
    waiters: RefCell<Vec<Waiter>>,
    broken: RefCell<Option<Broken>>,
    outbox: Outbox,
    inbox: Inbox,
    scheduler: Rc<Scheduler>,
    /// A reply has come.
    answered: Cell<bool>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Connection");
        debug.field("export", &self.export).field("broken", &self.broken).finish_non_exhaustive()
    }
}

impl Connection {
    /// Over a socket whose handshake is over. `None` if there is no memory for its buffers.
    pub fn new(Dialled { socket, export }: Dialled, io: &Io) -> Option<Connection> {
        Some(Connection {
            // Whatever its family: what is used of it is the descriptor and shutdown(2).
            socket: socket.into(),
            export,
            begun: Instant::now(),
            session: RefCell::new(Session::new(&export)),
            waiters: RefCell::default(),
            broken: RefCell::default(),
            outbox: Outbox::new(io)?,
            inbox: Inbox::new(io)?,
            scheduler: io.scheduler.clone(),
            answered: Cell::new(false),
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether any reply has come on it.
    pub fn has_answered(&self) -> bool {
        self.answered.get()
    }

    /// Requests that wait for their replies, or to be sent.
    pub fn in_flight(&self) -> usize {
        self.session.borrow().in_flight()
    }

    /// Why it is of no use any more, if so.
    pub fn broken(&self) -> Option<Broken> {
        self.broken.borrow().clone()
    }

    fn check(&self) -> Result<(), Broken> {
        match &*self.broken.borrow() {
            Some(broken) => Err(broken.clone()),
            None => Ok(()),
        }
    }

    /// Ends it: every request in flight fails with `why`. The first reason stays.
    pub fn give_up(&self, why: Broken) -> Broken {
        let why = self.broken.borrow_mut().get_or_insert(why).clone();
        let _ = self.socket.shutdown(Shutdown::Both);
        let waiters = self.waiters.borrow();
        waiters.iter().filter_map(|waiter| waiter.asleep).for_each(|task| self.scheduler.wake(task));
        self.outbox.wake();
        why
    }

    /// Sends a request and waits for its reply. The reads of its body, if it has one, are complete if the outcome is no error.
    pub async fn exchange(&self, io: &Io, ask: &Ask, body: &Body<'_>) -> Result<Outcome, Broken> {
        self.check()?;
        let (slot, header) = self.session.borrow_mut().begin(ask);
        let flight = Flight { connection: self, over: Cell::new(false) };
        self.enter(slot);
        let outcome = match self.put(io, slot, &header, body).await {
            Ok(()) => self.wait(io, slot, body).await,
            Err(broken) => Err(broken),
        };
        flight.over.set(true);
        if outcome.is_ok() {
            self.session.borrow_mut().release(slot);
        }
        outcome
    }

    fn enter(&self, slot: Slot) {
        let (mut waiters, index) = (self.waiters.borrow_mut(), slot.0 as usize);
        if waiters.len() <= index {
            waiters.resize_with(index + 1, Waiter::default);
        }
        waiters[index] = Waiter::default();
    }

    fn with_waiter<T>(&self, slot: Slot, with: impl FnOnce(&mut Waiter) -> T) -> Option<T> {
        self.waiters.borrow_mut().get_mut(slot.0 as usize).map(with)
    }

    async fn wait(&self, io: &Io, slot: Slot, body: &Body<'_>) -> Result<Outcome, Broken> {
        loop {
            if !self.must_send(slot) {
                return self.outcome(io, slot, body).await;
            }
            if !self.outbox.is_sending() {
                return self.send_and_wait(io, slot, body).await;
            }
            self.sleep(slot).await;
            self.check()?;
        }
    }

    /// Sends, and receives meanwhile.
    async fn send_and_wait(&self, io: &Io, slot: Slot, body: &Body<'_>) -> Result<Outcome, Broken> {
        let (mut sending, mut receiving) = (pin!(self.send_batch(io)), pin!(self.outcome(io, slot, body)));
        let (mut sent, mut outcome) = (false, None);
        std::future::poll_fn(|cx| {
            if !sent {
                // What has become of it says `check` as well.
                sent = sending.as_mut().poll(cx).is_ready();
            }
            if outcome.is_none()
                && let Poll::Ready(ready) = receiving.as_mut().poll(cx)
            {
                outcome = Some(ready);
            }
            if sent && outcome.is_some() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        outcome.unwrap_or_else(|| Err(Broken::Lost("no outcome".into())))
    }

    /// Waits for the outcome of a request, as the reader or not.
    async fn outcome(&self, io: &Io, slot: Slot, body: &Body<'_>) -> Result<Outcome, Broken> {
        loop {
            if let Some(outcome) = self.with_waiter(slot, |waiter| waiter.outcome.take()).flatten() {
                return Ok(outcome);
            }
            self.check()?;
            if !self.must_send(slot) && self.inbox.is_free_for(slot) {
                self.read(io, slot, body).await?;
            } else {
                self.sleep(slot).await;
            }
        }
    }

    /// Whether some of a request waits to be sent.
    fn must_send(&self, slot: Slot) -> bool {
        self.with_waiter(slot, |waiter| waiter.batch.is_none_or(|batch| self.outbox.is_filling(batch)))
            .unwrap_or(false)
    }

    /// Ends when the request's task is woken, for whatever reason.
    async fn sleep(&self, slot: Slot) {
        let mut slept = false;
        std::future::poll_fn(|_| {
            let task = if std::mem::replace(&mut slept, true) { None } else { self.scheduler.current() };
            self.with_waiter(slot, |waiter| waiter.asleep = task);
            if task.is_some() { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    fn wake(&self, slot: Slot) {
        if let Some(task) = self.with_waiter(slot, |waiter| waiter.asleep).flatten() {
            self.scheduler.wake(task);
        }
    }

    /// Being the reader: takes what comes apart until there is an outcome for `mine` and nothing left to take, or something for
    /// another request has come, whose task is the reader then.
    async fn read(&self, io: &Io, mine: Slot, body: &Body<'_>) -> Result<(), Broken> {
        let role = self.inbox.begin();
        loop {
            match self.next()? {
                Step::Need(count) => {
                    let done = self.with_waiter(mine, |waiter| waiter.outcome.is_some());
                    if done == Some(true) {
                        drop(role);
                        self.wake_a_reader();
                        return Ok(());
                    }
                    self.fill(io, count).await?;
                }
                step @ (Step::Data { slot, .. } | Step::Zero { slot, .. }) if slot != mine => {
                    if self.must_send(slot) {
                        let early = Violation("a reply to a request that was not sent");
                        return Err(self.give_up(Broken::Violation(early)));
                    }
                    self.inbox.hand(step, slot);
                    drop(role);
                    self.wake(slot);
                    return Ok(());
                }
                Step::Data { at, len, .. } => self.take(io, body, at, len).await?,
                Step::Zero { at, len, .. } => {
                    if let Body::Receive(buf, range) = body {
                        buf.zero(range.start + at as usize..range.start + (at + len) as usize);
                    }
                }
                Step::Skip(count) => self.skip(io, count).await?,
                Step::Done(slot, outcome) => {
                    self.answered.set(true);
                    self.with_waiter(slot, |waiter| waiter.outcome = Some(outcome));
                    if slot != mine {
                        self.wake(slot);
                    }
                }
            }
        }
    }

    /// Wakes a task that waits for a reply, if there is no reader.
    fn wake_a_reader(&self) {
        if self.inbox.is_being_read() {
            return;
        }
        let waiters = self.waiters.borrow();
        let sent = |waiter: &&Waiter| waiter.batch.is_some_and(|batch| !self.outbox.is_filling(batch));
        let next = waiters.iter().filter(sent).filter(|waiter| waiter.outcome.is_none());
        if let Some(task) = next.filter_map(|waiter| waiter.asleep).next() {
            self.scheduler.wake(task);
        }
    }

    /// What comes of an operation on the socket: 0 bytes and errors are its end, but `None` for one to be repeated.
    fn moved(&self, result: Result<u32, Errno>) -> Result<Option<usize>, Broken> {
        match result {
            Ok(0) => Err(self.give_up(Broken::Lost("the server closed the connection".into()))),
            Ok(count) => Ok(Some(count as usize)),
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(self.give_up(Broken::Lost(format!("the connection failed: {}", errno.desc())))),
        }
    }

    fn interruptible<'a>(&'a self, op: Op<'a>) -> impl Future<Output = Result<u32, Errno>> + 'a {
        interruptible(&self.socket, op)
    }
}

impl Drop for Connection {
    /// Tells the server that nothing more will come, so that it sees no loss.
    fn drop(&mut self) {
        if self.broken.get_mut().is_none() && self.session.get_mut().in_flight() == 0 {
            send_now(&self.socket, &disconnect());
        }
    }
}

/// A request in flight. If its task is dropped, nobody takes its reply, and a part of it may have been sent.
struct Flight<'a> {
    connection: &'a Connection,
    over: Cell<bool>,
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        if !self.over.get() {
            self.connection.give_up(Broken::Lost("a request was given up".into()));
        }
    }
}
