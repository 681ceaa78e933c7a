//! A worker: the thread that serves one disk, and the handle by which the control server speaks to it.
//!
//! ```text
//!  control server --Command--> queue + eventfd --> worker thread (executor, reactor, disk, rings)
//!                 <--Answer--- queue + waker  <--
//! ```

mod mapped;
mod ring;
mod serve;
mod thread;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use tap_ctl::Reply;
use tap_ctl::proto::{DiskInfo, OpenParams, RingEntry, RingParams};

use crate::xen::Xen;

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
    Connect(RingParams, Answer),
    /// Stop serving a frontend.
    Disconnect(RingEntry, Answer),
    /// Disconnect every frontend, close the image and end.
    Close(Answer),
}

/// The control server's end of a worker.
#[derive(Debug)]
pub struct Worker {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    rings: Arc<Mutex<Vec<RingEntry>>>,
}

impl Worker {
    /// Starts a thread, which opens the image and tells the outcome through `opened`. After a failure it has ended.
    pub fn start<X: Xen>(
        xen: X,
        params: OpenParams,
        opened: Box<dyn FnOnce(Result<DiskInfo, Reply>) + Send>,
    ) -> io::Result<Worker> {
        let (commands, receiver) = channel();
        let wake =
            Arc::new(EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let rings = Arc::new(Mutex::new(Vec::new()));
        let inbox = Inbox { commands: receiver, wake: wake.clone(), rings: rings.clone() };
        std::thread::Builder::new()
            .name("disk".into())
            .spawn(move || thread::run(xen, &params, inbox, opened))?;
        Ok(Worker { commands, wake, rings })
    }

    /// Queues a command. A worker that has ended drops it, which answers it.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_ok()
            && let Err(errno) = self.wake.write(1)
        {
            log::error!("cannot wake a worker thread: {errno}");
        }
    }

    /// The frontends being served.
    pub fn rings(&self) -> Vec<RingEntry> {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The worker's end.
struct Inbox {
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    rings: Arc<Mutex<Vec<RingEntry>>>,
}

impl Inbox {
    fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next command. Reset the wake-up before taking the first, so that none is slept through.
    fn take(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    fn reset(&self) {
        // EAGAIN: nothing to reset.
        let _ = self.wake.read();
    }

    fn publish(&self, rings: Vec<RingEntry>) {
        *self.rings.lock().unwrap_or_else(PoisonError::into_inner) = rings;
    }
}
