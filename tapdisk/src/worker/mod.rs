//! A worker: a thread that serves a disk, and the handle by which others speak to it.
//!
//! ```text
//!  control server --Command--> queue + eventfd --> worker thread (executor, reactor, disk, rings)
//!                 <--Answer--- queue + waker  <--      | the same, for further rings of an image without metadata
//!                 <--Notice---                         v
//!                                                   siblings
//! ```

mod channel;
mod clients;
mod connect;
pub mod keeper;
mod late;
mod limit;
mod mapped;
mod pause;
mod persistent;
mod poll;
mod ring;
mod seat;
mod serve;
mod served;
mod stats;
mod takeover;
mod thread;
mod throttle;

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use tap_ctl::Reply;
use tap_ctl::inflight::Record;
use tap_ctl::proto::{DiskInfo, ImageSpec, LimitChange, OpenParams, Reopen, RingEntry, RingParams};

use self::keeper::{Identity, Keeper};
use self::stats::{Counted, Gathering};
pub use self::throttle::Throttle;
use crate::image::DiskShare;
use crate::nbd::Client;
use crate::reactor::EngineChoice;
use crate::sync::WaitSet;
use crate::xen::Xen;

/// How long a request is tried again that fails for a reason that may pass, where the administrator does not say: as long
/// as XenServer's tapdisk does it.
const PATIENCE: Duration = Duration::from_secs(120);
/// The time between two tries.
const RETRY: Duration = Duration::from_secs(1);

/// How often a thread that holds memory or mappings looks what it can give back. An idle disk does not do it.
const HOUSEKEEPING: Duration = Duration::from_secs(10);

/// Where a worker's disk comes from.
#[derive(Debug)]
pub enum Source {
    /// It is opened.
    Open {
        /// How.
        params: OpenParams,
        /// By whom.
        identity: Identity,
        /// Keeps what is needed to go on with it.
        keeper: Arc<Keeper>,
    },
    /// Another process had it open, and has died.
    TakeOver {
        /// What that one has left.
        record: Record,
        /// Keeps it.
        keeper: Arc<Keeper>,
    },
    /// Another thread has it open.
    Share(Shared),
}

/// A disk that another thread has open.
#[derive(Debug)]
pub struct Shared {
    /// Its handle.
    pub disk: DiskShare,
    /// Its limits.
    pub throttle: Arc<Throttle>,
    /// How long a request is tried again.
    pub patience: Duration,
    /// What is kept of it.
    pub keeper: Arc<Keeper>,
}

/// How a frontend's rings are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// Nobody has served them before.
    Anew,
    /// Another process may have served them, and died.
    Again,
}

/// What a worker tells without being asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The disk has another size.
    Resized(DiskInfo),
    /// The disk has been paused and goes on; it may be another one.
    Reopened(DiskInfo),
    /// The disk goes on, but not as it was asked for, for this reason.
    Degraded(String),
    /// The disk has stopped: its guests must be disconnected, for this reason.
    Failed(String),
}

/// Where a disk is between running and paused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// Its image is open, and its rings are served.
    #[default]
    Running,
    /// What is in flight ends.
    Pausing,
    /// Its image is closed, and its rings wait.
    Paused,
}

/// What a worker lets others see at any time.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// The frontends being served.
    pub rings: Vec<RingEntry>,
    /// Where the disk is between running and paused.
    pub phase: Phase,
    /// What is open, or was when the disk was paused.
    pub image: Option<ImageSpec>,
}

/// What a thread leaves behind.
type Legacy = Arc<Mutex<Counted>>;

/// Takes a reply to whoever asked, exactly once: if it is dropped with the command (the worker has ended), it says so.
pub struct Answer(Option<Box<dyn FnOnce(Reply) + Send>>);

impl Answer {
    /// An answer that is handed to `tell`.
    pub fn new(tell: impl FnOnce(Reply) + Send + 'static) -> Answer {
        Answer(Some(Box::new(tell)))
    }

    /// Gives the answer.
    pub fn give(mut self, reply: Reply) {
        if let Some(tell) = self.0.take() {
            tell(reply);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(tell) = self.0.take() {
            tell(Reply::Error { errno: libc::ESHUTDOWN, message: "the image was closed meanwhile".into() });
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answer")
    }
}

/// What a worker is asked to do.
#[derive(Debug)]
pub enum Command {
    /// Serve a frontend.
    Connect(RingParams, Begin, Answer),
    /// Stop serving a frontend.
    Disconnect(RingEntry, Answer),
    /// Take a change of the image's size in; or, with a size in bytes, make it grow.
    Resize(Option<u64>, Answer),
    /// Close the image, and keep the frontends waiting; not if it takes longer than until then.
    Pause(Option<Instant>, Answer),
    /// Close the image, so that another process can go on with everything.
    Leave(Answer),
    /// Go on after a pause.
    Unpause(Reopen, Answer),
    /// Make a new image over the present one, and go on with that; not if what is in flight takes longer than until then.
    Snapshot(ImageSpec, Option<Instant>, Answer),
    /// Serve an NBD client.
    Client(Client),
    /// From the thread itself: nothing is in flight any more, and the image was closed with this result.
    Quiet(Result<(), Errno>),
    /// Change what the disk may do in a second, and tell it.
    Limit(LimitChange, Answer),
    /// Take part in an answer to how much has been done.
    Stats(Box<Gathering>),
    /// Tell how much has been done.
    Statistics(Answer),
    /// For a sibling: the limits have changed.
    Limited,
    /// For a sibling: the disk has grown.
    Grown,
    /// From a sibling: it has ended.
    SiblingEnded(u64),
    /// Disconnect every frontend, close the image and end.
    Close(Answer),
}

/// Where commands go in.
#[derive(Clone, Debug)]
pub struct Commands {
    queue: Sender<Command>,
    wake: Arc<EventFd>,
}

impl Commands {
    #[cfg(test)]
    fn for_test(queue: Sender<Command>) -> Commands {
        Commands { queue, wake: Arc::new(EventFd::new().expect("a descriptor")) }
    }

    /// Queues a command. A worker that has ended drops it, which answers it.
    pub fn send(&self, command: Command) {
        if self.queue.send(command).is_ok()
            && let Err(errno) = self.wake.write(1)
        {
            log::error!("cannot wake a worker thread: {errno}");
        }
    }
}

/// The handle of a worker.
#[derive(Debug)]
pub struct Worker {
    commands: Commands,
    status: Arc<Mutex<Status>>,
    legacy: Legacy,
}

impl Worker {
    /// Starts a thread, which opens the image and tells the outcome through `opened`. After a failure it has ended.
    pub fn start<X: Xen>(
        xen: X,
        source: Source,
        engine: EngineChoice,
        opened: Box<dyn FnOnce(Result<DiskInfo, Reply>) + Send>,
        tell: Arc<dyn Fn(Notice) + Send + Sync>,
    ) -> io::Result<Worker> {
        let (queue, receiver) = channel();
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let commands = Commands { queue, wake };
        let image = match &source {
            Source::Open { params, .. } => Some(params.image.clone()),
            Source::TakeOver { record, .. } => Some(record.params.image.clone()),
            Source::Share(..) => None,
        };
        let status = Arc::new(Mutex::new(Status { image, ..Status::default() }));
        let legacy = Legacy::default();
        let (given, told, left) = (commands.clone(), status.clone(), legacy.clone());
        let name = if matches!(source, Source::Share(_)) { "ring" } else { "disk" };
        std::thread::Builder::new().name(name.into()).spawn(move || {
            // Built here: what waits for siblings belongs to the thread.
            let inbox = |scheduler| Inbox {
                received: receiver,
                commands: given,
                status: told,
                legacy: left,
                siblings_changed: WaitSet::new(scheduler),
                numbers: Cell::new(0),
            };
            thread::run(xen, source, engine, inbox, opened, tell);
        })?;
        Ok(Worker { commands, status, legacy })
    }

    /// Queues a command. A worker that has ended drops it, which answers it.
    pub fn send(&self, command: Command) {
        self.commands.send(command);
    }

    /// Where commands go in.
    pub fn commands(&self) -> Commands {
        self.commands.clone()
    }

    /// What it had counted when it ended.
    fn legacy(&self) -> Counted {
        std::mem::take(&mut *self.legacy.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How it is.
    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The worker's end.
struct Inbox {
    received: Receiver<Command>,
    commands: Commands,
    status: Arc<Mutex<Status>>,
    legacy: Legacy,
    siblings_changed: WaitSet,
    numbers: Cell<u64>,
}

impl Inbox {
    fn fd(&self) -> BorrowedFd<'_> {
        self.commands.wake.as_fd()
    }

    /// The next command. Reset the wake-up before taking the first, so that none is slept through.
    fn take(&self) -> Option<Command> {
        self.received.try_recv().ok()
    }

    fn reset(&self) {
        // EAGAIN: nothing to reset.
        let _ = self.commands.wake.read();
    }

    /// For siblings to answer to.
    fn sender(&self) -> Commands {
        self.commands.clone()
    }

    /// A number that was not given out before.
    fn next_number(&self) -> u64 {
        self.numbers.set(self.numbers.get() + 1);
        self.numbers.get()
    }

    fn bequeath(&self, counted: Counted) {
        *self.legacy.lock().unwrap_or_else(PoisonError::into_inner) = counted;
    }

    fn publish(&self, status: Status) {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}
