//! The control server: the main thread, which speaks to `tap-ctl` and `xenio` and starts a worker for each image.
//!
//! It never does image I/O and never waits for a worker: a request that a worker must carry out is answered when the worker
//! answers, and meanwhile everybody else is served. Nor does it wait for a client.

mod client;
mod entrance;
mod history;
mod leave;
pub mod parent;
mod takeover;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tap_ctl::proto::{DiskInfo, Minor, OpenParams, RingEntry};
use tap_ctl::{ControlDir, Reply, Request};

pub(crate) use self::client::MAX_UNREAD;
use self::client::{Broken, Client};
pub use self::entrance::Entrance;
use self::leave::Leaving;
use crate::nbd::door::Door;
use crate::porter;
use crate::porter::channel::GONE;
use crate::reactor::EngineChoice;
use crate::vbd::{Open, Vbd};
use crate::worker::keeper::{Identity, Keeper};
use crate::worker::{Answer, Begin, Command, Notice, Source, Worker};
use crate::xen::Xen;

const ENTRANCE: Token = Token(0);
const WAKER: Token = Token(1);
const SIGNALS: Token = Token(2);
const FIRST_CLIENT: usize = 3;

/// Clients at the same time; more wait in the socket's backlog.
const MAX_CLIENTS: usize = 64;
/// When who could not be let in is tried again.
const ACCEPT_AGAIN: Duration = Duration::from_secs(1);

/// What worker threads tell the server.
enum Event {
    /// The outcome of opening an image.
    Opened(Minor, Token, Result<DiskInfo, Reply>),
    /// An image was closed.
    Closed(Minor, Token, Reply),
    /// A disk is ready to be taken over, or is not.
    Left(Reply),
    /// An answer to pass on.
    Answer(Token, Reply),
    /// A worker's disk is not what it was.
    Noticed(Minor, Notice),
}

/// The control server of one tapdisk.
pub struct Server<X: Xen> {
    xen: X,
    /// For every image.
    engine: EngineChoice,
    /// For all images, in bytes.
    parent_cache: Option<u64>,
    dir: ControlDir,
    entrance: Entrance,
    pid: i32,
    poll: Poll,
    signals: SignalFd,
    sender: Sender<Event>,
    receiver: Receiver<Event>,
    waker: Arc<Waker>,
    clients: HashMap<Token, Client>,
    next_token: usize,
    /// Somebody may be waiting at the entrance whom we could not let in.
    unaccepted: bool,
    /// Newest last.
    vbds: Vec<Vbd>,
    /// The process ends when it has no VBD and this is set: by the last detach, or a signal.
    ending: bool,
    /// Somebody waits for all disks to be ready to be taken over.
    leaving: Option<Leaving>,
    /// All disks are, and the process ends.
    left: bool,
}

impl<X: Xen> std::fmt::Debug for Server<X> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("entrance", &self.entrance)
            .field("vbds", &self.vbds)
            .finish_non_exhaustive()
    }
}

impl<X: Xen> Server<X> {
    /// For clients who come by `entrance`. Blocks SIGINT and SIGTERM for this and all later threads and takes them as events.
    ///
    /// # Errors
    /// Of the system.
    pub fn new(
        xen: X,
        dir: ControlDir,
        engine: EngineChoice,
        parent_cache: Option<u64>,
        entrance: Entrance,
    ) -> io::Result<Server<X>> {
        let pid = nix::unistd::getpid().as_raw();
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGINT);
        mask.add(Signal::SIGTERM);
        mask.thread_block()?;
        // A file that may not become larger is an error of the write, not the end of all disks.
        SigSet::from(Signal::SIGXFSZ).thread_block()?;
        // Nobody needs it, and another tapdisk could have the kernel send it.
        SigSet::from(Signal::SIGIO).thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let poll = Poll::new()?;
        let registry = poll.registry();
        entrance.register(registry, ENTRANCE)?;
        registry.register(&mut SourceFd(&signals.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        let waker = Arc::new(Waker::new(registry, WAKER)?);
        let (sender, receiver) = channel();
        Ok(Server {
            xen,
            engine,
            parent_cache,
            dir,
            entrance,
            pid,
            poll,
            signals,
            sender,
            receiver,
            waker,
            clients: HashMap::new(),
            next_token: FIRST_CLIENT,
            unaccepted: false,
            vbds: Vec::new(),
            ending: false,
            leaving: None,
            left: false,
        })
    }

    /// The control socket's path.
    pub fn socket(&self) -> &std::path::Path {
        self.entrance.path()
    }

    /// Serves until the last VBD is detached or a signal asks to end.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = Events::with_capacity(64);
        while !self.is_done() {
            match self.poll.poll(&mut events, self.unaccepted.then_some(ACCEPT_AGAIN)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            if self.unaccepted {
                self.accept();
            }
            for event in &events {
                match event.token() {
                    ENTRANCE => self.accept(),
                    WAKER => self.take_worker_events(),
                    SIGNALS => self.take_signals()?,
                    token if self.welcome(token) => {}
                    token => self.serve_client(token),
                }
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let idle = self.ending && self.vbds.is_empty();
        (idle || self.left) && self.clients.values().all(Client::is_content)
    }

    /// Lets in who waits at the entrance. A host short of descriptors or memory makes them wait longer, and nothing else:
    /// the entrance's readiness is edge-triggered, so it is tried again after a while.
    fn accept(&mut self) {
        self.unaccepted = false;
        while self.clients.len() < MAX_CLIENTS {
            let token = Token(self.next_token);
            let registry = self.poll.registry();
            let accepted = self.entrance.next(registry, ENTRANCE).and_then(|mut stream| {
                registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
                Ok(stream)
            });
            match accepted {
                Ok(stream) => drop(self.clients.insert(token, Client::new(stream))),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::warn!("accepting a control connection failed: {error}; trying again");
                    self.unaccepted = true;
                    return;
                }
            }
            self.next_token += 1;
        }
    }

    /// Lets NBD clients in, if that is what an event means.
    fn welcome(&self, token: Token) -> bool {
        let mut opens = self.vbds.iter().filter_map(|vbd| vbd.open.as_ref());
        let door =
            opens.find_map(|open| Some((open, open.door.as_ref().filter(|door| door.token == token)?)));
        let Some((open, door)) = door else { return false };
        if let Some(info) = &open.info {
            let commands = open.worker.commands();
            door.welcome(info, move |client| commands.send(Command::Client(client)));
        }
        true
    }

    /// Opens the door for NBD clients of a disk that is open.
    fn open_door(&mut self, minor: Minor) {
        let path = self.dir.vbd_path(self.pid, minor);
        let token = Token(self.next_token);
        self.next_token += 1;
        match Door::open(path.clone(), token, self.poll.registry()) {
            Ok(mut door) => {
                let Ok(open) = self.open_vbd(minor) else { return };
                if let Some(name) = open.known_as.take()
                    && let Err(error) = door.also_at(name.clone())
                {
                    log::warn!("minor {minor}: no NBD at {}: {error}", name.display());
                }
                open.door = Some(door);
            }
            Err(error) => log::warn!("minor {minor}: no NBD at {}: {error}", path.display()),
        }
    }

    fn drop_client(&mut self, token: Token) {
        if let Some(mut client) = self.clients.remove(&token) {
            let _ = self.poll.registry().deregister(&mut client.stream);
        }
        // There may be connections that found no place; the entrance's readiness was edge-triggered.
        self.accept();
    }

    /// Reads what there is, carries out whole requests, writes what there is to write.
    fn serve_client(&mut self, token: Token) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        if let Err(broken) = client.receive() {
            return self.give_up(token, &broken);
        }
        self.next_requests(token);
        self.flush_client(token);
    }

    fn give_up(&mut self, token: Token, broken: &Broken) {
        log::warn!("a control connection is closed: {broken}");
        self.drop_client(token);
    }

    fn next_requests(&mut self, token: Token) {
        while let Some(client) = self.clients.get_mut(&token) {
            match client.next() {
                Ok(None) => return,
                Ok(Some(request)) => {
                    log::debug!("request {request:?}");
                    if let Some(reply) = self.carry_out(token, request) {
                        self.answer(token, &reply);
                    }
                }
                Err(error) => {
                    client.answer(&Reply::Error { errno: libc::EPROTO, message: error.to_string() });
                    self.flush_client(token);
                    self.drop_client(token);
                    return;
                }
            }
        }
    }

    fn answer(&mut self, token: Token, reply: &Reply) {
        if let Some(client) = self.clients.get_mut(&token) {
            client.answer(reply);
        }
    }

    fn flush_client(&mut self, token: Token) {
        let Some(client) = self.clients.get_mut(&token) else { return };
        if client.send().is_err() || client.is_done() {
            self.drop_client(token);
        }
    }

    /// Tells every follower how a disk is now.
    fn tell(&mut self, minor: Minor) {
        let Ok(Some(news)) = self.vbd(minor).map(|vbd| vbd.news()) else { return };
        let followers = self.clients.iter_mut().filter(|(_, client)| client.follows());
        let told: Vec<_> = followers.map(|(token, client)| (*token, client.tell(&news))).collect();
        for (token, result) in told {
            if let Err(broken) = result {
                self.give_up(token, &broken);
            }
        }
    }

    /// Makes a client a follower, and tells it how all disks are.
    fn follow(&mut self, token: Token) {
        let news: Vec<Reply> = self.vbds.iter().filter_map(Vbd::news).collect();
        let Some(client) = self.clients.get_mut(&token) else { return };
        let told = client.follow().and_then(|()| news.iter().try_for_each(|news| client.tell(news)));
        if let Err(broken) = told {
            self.give_up(token, &broken);
        }
    }

    /// `None`: a worker answers later.
    fn carry_out(&mut self, token: Token, request: Request) -> Option<Reply> {
        // The image would be closed, and could not be opened again.
        if self.entrance.is_orphaned() && matches!(request, Request::Pause { .. } | Request::Snapshot { .. })
        {
            return Some(refuse(Errno::EPIPE, GONE.to_owned()));
        }
        match request {
            Request::Pid => Some(Reply::Pid { pid: self.pid }),
            Request::List => Some(Reply::List { vbds: self.vbds.iter().rev().map(Vbd::entry).collect() }),
            Request::Attach { minor } => Some(self.attach(minor)),
            Request::Detach { minor } => Some(self.detach(minor)),
            Request::Open { minor, params } => self.open(token, minor, params),
            Request::Close { minor } => self.close(token, minor),
            Request::DiskInfo { minor } => Some(match self.open_vbd(minor).map(|open| open.info) {
                Ok(Some(info)) => Reply::DiskInfo(info),
                Ok(None) => {
                    refuse(Errno::EAGAIN, format!("the image of minor {minor} is still being opened"))
                }
                Err(reply) => reply,
            }),
            Request::Resize { minor, size } => {
                self.command(token, minor, |answer| Command::Resize(size, answer))
            }
            Request::Pause { minor, within } => {
                self.command(token, minor, |answer| Command::Pause(until(within), answer))
            }
            Request::Unpause { minor, change } => {
                self.command(token, minor, |answer| Command::Unpause(change, answer))
            }
            Request::Leave => self.leave(token),
            Request::Snapshot { minor, image, within } => {
                self.command(token, minor, |answer| Command::Snapshot(image, until(within), answer))
            }
            Request::Limit { minor, change } => {
                self.command(token, minor, |answer| Command::Limit(change, answer))
            }
            Request::Stats { minor } => self.command(token, minor, Command::Statistics),
            Request::Follow => {
                self.follow(token);
                None
            }
            Request::Connect { minor, ring } => {
                self.command(token, minor, |answer| Command::Connect(ring, Begin::Anew, answer))
            }
            Request::Disconnect { minor, domid, vdev } => {
                self.command(token, minor, |answer| Command::Disconnect(RingEntry { domid, vdev }, answer))
            }
        }
    }

    fn vbd(&mut self, minor: Minor) -> Result<&mut Vbd, Reply> {
        self.vbds
            .iter_mut()
            .find(|vbd| vbd.minor == minor)
            .ok_or_else(|| refuse(Errno::ENODEV, format!("minor {minor} is not attached to this tapdisk")))
    }

    fn open_vbd(&mut self, minor: Minor) -> Result<&mut Open, Reply> {
        self.vbd(minor)?
            .open
            .as_mut()
            .ok_or_else(|| refuse(Errno::ENODEV, format!("minor {minor} has no open image")))
    }

    fn attach(&mut self, minor: Minor) -> Reply {
        if self.vbd(minor).is_ok() {
            return refuse(Errno::EINVAL, format!("minor {minor} is attached already"));
        }
        match Vbd::attach(&self.dir, minor) {
            Ok(vbd) => {
                self.vbds.push(vbd);
                Reply::Done
            }
            Err(reply) => reply,
        }
    }

    fn detach(&mut self, minor: Minor) -> Reply {
        match self.vbd(minor) {
            Err(reply) => return reply,
            Ok(vbd) if vbd.open.is_some() => {
                return refuse(Errno::EINVAL, format!("minor {minor} has an open image; close it first"));
            }
            Ok(_) => {}
        }
        self.vbds.retain(|vbd| vbd.minor != minor);
        self.ending = self.vbds.is_empty();
        Reply::Done
    }

    fn open(&mut self, token: Token, minor: Minor, mut params: OpenParams) -> Option<Reply> {
        match self.vbd(minor) {
            Err(reply) => return Some(reply),
            Ok(vbd) if vbd.open.is_some() => {
                let image =
                    vbd.entry().image.map_or_else(|| "an image".to_owned(), |image| image.to_string());
                return Some(refuse(Errno::EALREADY, format!("minor {minor} has {image} open already")));
            }
            Ok(_) => {}
        }
        if let Some(shared) = params.shared_parent {
            match porter::parent(&self.dir, shared) {
                Ok(image) => params.parent = Some(image),
                Err((errno, text)) => return Some(refuse(errno, format!("{}: {text}", params.image))),
            }
        }
        log::info!(
            "minor {minor}: opening {}{}",
            params.image,
            if params.readonly { " read-only" } else { "" }
        );
        let identity = Identity {
            pid: self.pid,
            socket: self.dir.vbd_path(self.pid, minor),
            engine: self.engine.to_string(),
            parent_cache: self.parent_cache,
        };
        let keeper = Arc::new(Keeper::new(self.dir.clone(), minor));
        self.start_worker(token, minor, Source::Open { params, identity, keeper }, None)
    }

    /// Starts the thread of a disk; the outcome comes as an event. An error: it could not be started.
    fn start_worker(
        &mut self,
        token: Token,
        minor: Minor,
        source: Source,
        known_as: Option<PathBuf>,
    ) -> Option<Reply> {
        let tell = self.teller();
        let opened = Box::new(move |result| tell(Event::Opened(minor, token, result)));
        let tell = self.teller();
        let noticed = Arc::new(move |notice| tell(Event::Noticed(minor, notice)));
        match Worker::start(self.xen.clone(), source, self.engine, opened, noticed) {
            Ok(worker) => {
                if let Ok(vbd) = self.vbd(minor) {
                    vbd.open =
                        Some(Open { worker, info: None, failed: None, degraded: None, door: None, known_as });
                }
                None
            }
            Err(error) => Some(refuse(
                Errno::from_raw(error.raw_os_error().unwrap_or(libc::EAGAIN)),
                format!("minor {minor}: cannot start a thread for its image: {error}"),
            )),
        }
    }

    fn close(&mut self, token: Token, minor: Minor) -> Option<Reply> {
        // An attached minor without image is closed: nothing to do.
        match self.vbd(minor) {
            Err(reply) => return Some(reply),
            Ok(vbd) if vbd.open.is_none() => return Some(Reply::Done),
            Ok(_) => {}
        }
        let tell = self.teller();
        let answer = Answer::new(move |reply| tell(Event::Closed(minor, token, reply)));
        if let Ok(open) = self.open_vbd(minor) {
            open.worker.send(Command::Close(answer));
        }
        None
    }

    fn command(
        &mut self,
        token: Token,
        minor: Minor,
        command: impl FnOnce(Answer) -> Command,
    ) -> Option<Reply> {
        let tell = self.teller();
        match self.open_vbd(minor) {
            Err(reply) => Some(reply),
            Ok(open) => {
                open.worker.send(command(Answer::new(move |reply| tell(Event::Answer(token, reply)))));
                None
            }
        }
    }

    fn teller(&self) -> impl Fn(Event) + Send + Sync + 'static {
        let (sender, waker) = (self.sender.clone(), self.waker.clone());
        move |event| {
            // Both fail only while the process ends.
            if sender.send(event).is_ok() {
                let _ = waker.wake();
            }
        }
    }

    fn take_worker_events(&mut self) {
        while let Ok(event) = self.receiver.try_recv() {
            let (token, reply) = match event {
                Event::Answer(token, reply) => (token, reply),
                Event::Left(reply) => {
                    self.disk_left(reply);
                    continue;
                }
                Event::Noticed(minor, notice) => {
                    self.notice(minor, notice);
                    continue;
                }
                Event::Opened(minor, token, Ok(info)) => {
                    self.opened(minor, info);
                    (token, Reply::DiskInfo(info))
                }
                Event::Opened(minor, token, Err(reply)) => {
                    if let Reply::Error { message, .. } = &reply {
                        log::error!("minor {minor}: {message}");
                    }
                    if let Ok(vbd) = self.vbd(minor) {
                        vbd.open = None;
                    }
                    (token, reply)
                }
                Event::Closed(minor, token, reply) => {
                    log::info!("minor {minor}: closed");
                    if let Ok(vbd) = self.vbd(minor) {
                        vbd.close();
                    }
                    if self.ending {
                        self.vbds.retain(|vbd| vbd.minor != minor);
                    }
                    (token, reply)
                }
            };
            self.answer(token, &reply);
            self.next_requests(token);
            self.flush_client(token);
        }
    }

    fn opened(&mut self, minor: Minor, info: DiskInfo) {
        if let Ok(open) = self.open_vbd(minor) {
            open.info = Some(info);
        }
        self.open_door(minor);
        log::info!("minor {minor}: open, {} sectors", info.sectors);
        self.tell(minor);
    }

    fn notice(&mut self, minor: Minor, notice: Notice) {
        // It may have been closed meanwhile.
        let Ok(open) = self.open_vbd(minor) else { return };
        match notice {
            Notice::Resized(info) => {
                log::info!("minor {minor}: has {} sectors now", info.sectors);
                open.info = Some(info);
            }
            Notice::Reopened(info) => {
                open.info = Some(info);
                (open.failed, open.degraded) = (None, None);
            }
            // The disk itself has logged it.
            Notice::Degraded(reason) => open.degraded = Some(reason),
            // Each of its threads says so.
            Notice::Failed(_) if open.failed.is_some() => return,
            Notice::Failed(reason) => {
                log::error!("minor {minor}: {reason}");
                open.failed = Some(reason);
            }
        }
        self.tell(minor);
    }

    /// SIGTERM and SIGINT: disconnect and close everything, then end.
    fn take_signals(&mut self) -> io::Result<()> {
        while let Some(signal) = self.signals.read_signal()? {
            log::info!("ending: signal {}", signal.ssi_signo);
            self.ending = true;
        }
        if self.ending {
            self.vbds.retain(|vbd| vbd.open.is_some());
            let minors: Vec<Minor> = self.vbds.iter().map(|vbd| vbd.minor).collect();
            for minor in minors {
                // No client waits for this answer.
                if let Some(Reply::Error { message, .. }) = self.close(Token(usize::MAX), minor) {
                    log::error!("minor {minor}: {message}");
                }
            }
        }
        Ok(())
    }
}

/// When the patience of who asks ends.
fn until(within: Option<u64>) -> Option<Instant> {
    within.and_then(|seconds| Instant::now().checked_add(Duration::from_secs(seconds)))
}

fn refuse(errno: Errno, message: String) -> Reply {
    Reply::Error { errno: errno as i32, message }
}
