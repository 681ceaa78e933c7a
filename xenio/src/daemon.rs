//! The event loop: one thread, nothing in it waits for a guest or a tapdisk.
//!
//! Events only mark devices; marked devices are evaluated once a turn, however many events there were. What a guest can
//! cause by writing its own state is limited to 20 evaluations a second with bursts of 50 for each of its devices, whose
//! number the toolstack decides: enough for every frontend's life cycle, too little to keep others waiting. The same
//! limit holds for what follows from it, or a guest could keep the machine turning by changing its mind whenever we
//! have acted.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blkif::DomId;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use tap_ctl::ControlDir;
use xenstore::path::PathError;
use xenstore::{Client, WatchEvent};

use crate::control::{Control, Rest};
use crate::features::Offer;
use crate::leftovers;
use crate::limit::Bucket;
use crate::notify::Manager;
use crate::paths::{DeviceId, Paths, Touched};
use crate::revive::Revivals;
use crate::tapdisk::{FIRST_TOKEN, Links};

const STOP: Token = Token(0);
const STORE: Token = Token(1);
const REVIVED: Token = Token(2);

/// Limit of evaluations that a guest can cause for a device: the time between two.
const GUEST_INTERVAL: Duration = Duration::from_millis(50);
/// How many may come at once.
const GUEST_BURST: u32 = 50;
/// A device that met an error of XenStore, or a host short of descriptors or memory, is looked at again after this time.
const RETRY: Duration = Duration::from_secs(1);
/// Time between attempts to reach XenStore: the first, and the longest after doubling.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What to serve and where things are.
#[derive(Clone, Debug)]
pub struct Config {
    /// The backend's kind: devices are those in `backend/<kind>`.
    pub kind: String,
    /// The tapdisks' runtime folder.
    pub control_dir: ControlDir,
    /// The program that goes on with the disks of tapdisks that died.
    pub tapdisk: PathBuf,
    /// XenStore's socket; `None` for the usual places.
    pub store: Option<PathBuf>,
    /// What every frontend is offered.
    pub offer: Offer,
}

/// Why xenio cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The kind makes no path.
    #[error("{kind:?} is no backend kind: {source}")]
    Kind {
        /// The kind.
        kind: String,
        /// What is wrong with it.
        source: PathError,
    },
    /// The kernel's event interface failed.
    #[error("cannot wait for events: {0}")]
    Poll(#[from] io::Error),
}

/// Serves until `stop` becomes readable. All disks go on without us.
///
/// XenStore may be away at the start and at any time later; it is looked for until it is there.
///
/// # Errors
///
/// Only those of the process itself.
pub fn run(config: &Config, stop: BorrowedFd<'_>) -> Result<(), RunError> {
    let paths =
        Paths::new(&config.kind).map_err(|source| RunError::Kind { kind: config.kind.clone(), source })?;
    let poll = Poll::new()?;
    poll.registry().register(&mut SourceFd(&stop.as_raw_fd()), STOP, Interest::READABLE)?;
    leftovers::sweep(&config.control_dir);
    let links = Links::new(poll.registry().try_clone()?, config.control_dir.clone());
    let revivals =
        Revivals::new(poll.registry(), REVIVED, config.control_dir.clone(), config.tapdisk.clone())?;
    let control = Control::new(paths.clone(), config.control_dir.clone(), config.offer, links, revivals);
    Daemon {
        store_path: config.store.clone(),
        paths,
        poll,
        control,
        manager: Manager::from_environment(),
        store: None,
        store_ready: false,
        connect_at: Instant::now(),
        backoff: BACKOFF.0,
        dirty: BTreeSet::new(),
        stirred: BTreeSet::new(),
        echoes: BTreeSet::new(),
        later: BTreeMap::new(),
        buckets: HashMap::new(),
    }
    .run()
}

struct Daemon {
    store_path: Option<PathBuf>,
    paths: Paths,
    poll: Poll,
    control: Control,
    manager: Manager,
    store: Option<Client>,
    /// There may be something to read on the connection: readiness is told only once.
    store_ready: bool,
    /// When to look for XenStore, if there is no connection.
    connect_at: Instant,
    backoff: Duration,
    /// Devices to look at.
    dirty: BTreeSet<DeviceId>,
    /// Devices to look at within the limit, because their guest may be behind it.
    stirred: BTreeSet<DeviceId>,
    /// Devices whose `state` was written, perhaps by ourselves.
    echoes: BTreeSet<DeviceId>,
    /// Devices to look at again later.
    later: BTreeMap<DeviceId, Instant>,
    buckets: HashMap<DeviceId, Bucket>,
}

impl Daemon {
    fn run(&mut self) -> Result<(), RunError> {
        let mut events = Events::with_capacity(128);
        loop {
            let wake = self.turn();
            let wake = wake.into_iter().chain(self.manager.alive(Instant::now())).min();
            let timeout = wake.map(|wake| wake.saturating_duration_since(Instant::now()));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                match event.token() {
                    STOP => {
                        self.manager.stopping();
                        return Ok(());
                    }
                    STORE => self.store_ready = true,
                    REVIVED => self.dirty.extend(self.control.take_revivals()),
                    token if token.0 >= FIRST_TOKEN => self.stirred.extend(self.control.link_ready(token)),
                    _ => {}
                }
            }
        }
    }

    /// Does all that can be done now; tells when there will be more to do without an event (`None`: never).
    fn turn(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if self.store.is_none() && self.connect_at <= now {
            self.connect();
        }
        if self.store.is_none() {
            return Some(self.connect_at);
        }
        // Requests take in events as well, and nothing will announce those again: hence the second time.
        let done = self.take_events().and_then(|()| self.evaluate(now)).and_then(|()| self.take_events());
        if let Err(error) = done {
            self.lose_store(&error);
            return Some(self.connect_at);
        }
        self.next_wake(now)
    }

    fn next_wake(&mut self, now: Instant) -> Option<Instant> {
        let queued =
            self.store.is_some() && (self.store_ready || !self.dirty.is_empty() || !self.echoes.is_empty());
        if queued {
            return Some(now);
        }
        let refill = self.stirred.iter().map(|id| self.buckets.get(id).map_or(now, Bucket::next)).min();
        self.later.values().copied().chain(refill).min()
    }

    fn connect(&mut self) {
        let client = match &self.store_path {
            Some(path) => Client::connect_to(path),
            None => Client::connect(),
        };
        let ready = client.and_then(|mut client| {
            self.control.attach(&mut client)?;
            Ok(client)
        });
        match ready.map_err(|error| error.to_string()).and_then(|client| self.register(client)) {
            Ok(client) => {
                log::info!("connected to XenStore, serving {}", self.paths.root());
                self.manager.ready();
                self.store = Some(client);
                self.store_ready = true;
                self.backoff = BACKOFF.0;
            }
            Err(error) => {
                log::warn!("{error}; trying again in {} ms", self.backoff.as_millis());
                self.manager.status("waiting for XenStore");
                self.connect_at = Instant::now() + self.backoff;
                self.backoff = (self.backoff * 2).min(BACKOFF.1);
            }
        }
    }

    fn register(&self, client: Client) -> Result<Client, String> {
        let fd = client.as_fd().as_raw_fd();
        match self.poll.registry().register(&mut SourceFd(&fd), STORE, Interest::READABLE) {
            Ok(()) => Ok(client),
            Err(error) => Err(format!("cannot wait for XenStore: {error}")),
        }
    }

    /// Rings go on; what happens meanwhile is found by the scan after the next connection.
    fn lose_store(&mut self, error: &xenstore::Error) {
        log::warn!("{error}; disks go on, reconnecting");
        // Closing the descriptor ends its registration.
        self.store = None;
        self.connect_at = Instant::now();
    }

    /// Turns queued watch events into marks.
    fn take_events(&mut self) -> Result<(), xenstore::Error> {
        let Some(store) = &mut self.store else { return Ok(()) };
        if self.store_ready {
            self.store_ready = store.poll_events()? > 0;
        }
        loop {
            let mut scans = BTreeSet::new();
            while let Some(event) = store.next_event() {
                match meaning(&self.paths, &self.control, &event) {
                    Meaning::Scan(domid) => drop(scans.insert(domid)),
                    Meaning::Look(id) => drop(self.dirty.insert(id)),
                    Meaning::Stirred(id) => drop(self.stirred.insert(id)),
                    Meaning::Echo(id) => drop(self.echoes.insert(id)),
                    Meaning::Nothing => {}
                }
            }
            if scans.contains(&None) {
                scans.retain(Option::is_none);
            }
            if scans.is_empty() {
                return Ok(());
            }
            for only in scans {
                self.dirty.extend(self.control.scan(store, only)?);
            }
            // Scanning made requests, which may have taken in more events.
        }
    }

    /// Looks at every marked device whose turn it is.
    fn evaluate(&mut self, now: Instant) -> Result<(), xenstore::Error> {
        let Some(store) = &mut self.store else { return Ok(()) };
        let due = |at: &Instant| *at <= now;
        self.dirty.extend(self.later.iter().filter(|(_, at)| due(at)).map(|(id, _)| *id));
        self.later.retain(|_, at| !due(at));
        for id in std::mem::take(&mut self.echoes) {
            if !self.dirty.contains(&id) && !self.control.is_echo(store, id)? {
                self.dirty.insert(id);
            }
        }
        for id in &self.stirred {
            let bucket = self.buckets.entry(*id);
            let bucket = bucket.or_insert_with(|| Bucket::new(GUEST_INTERVAL, GUEST_BURST, now));
            // A device that is looked at anyway costs its guest nothing.
            if !self.dirty.contains(id) && bucket.take(now).is_ok() {
                self.dirty.insert(*id);
            }
        }
        for id in std::mem::take(&mut self.dirty) {
            self.stirred.remove(&id);
            match self.control.evaluate(store, id) {
                Ok(Rest::Yes) => {}
                Ok(Rest::No) => drop(self.stirred.insert(id)),
                Ok(Rest::Later) => drop(self.later.insert(id, now + RETRY)),
                Err(error) if ends_connection(&error) => return Err(error),
                Err(error) => {
                    log::warn!("device {id}: {error}; looking again in {} s", RETRY.as_secs());
                    self.later.insert(id, now + RETRY);
                }
            }
        }
        self.buckets.retain(|id, _| self.control.knows(*id));
        Ok(())
    }
}

/// What a watch event calls for.
enum Meaning {
    /// Find the devices of one domain, or all.
    Scan(Option<DomId>),
    /// Look at a device: the toolstack changed something.
    Look(DeviceId),
    /// Look at a device: its guest changed its state.
    Stirred(DeviceId),
    /// Look at a device if its state is not the one we wrote.
    Echo(DeviceId),
    /// Nothing.
    Nothing,
}

fn meaning(paths: &Paths, control: &Control, event: &WatchEvent) -> Meaning {
    if let Some(id) = control.frontend_of(&event.token) {
        return Meaning::Stirred(id);
    }
    match paths.touched(&event.path) {
        Touched::Everything => Meaning::Scan(None),
        Touched::Domain(domid) => Meaning::Scan(Some(domid)),
        Touched::Device(id) => Meaning::Look(id),
        Touched::State(id) => Meaning::Echo(id),
        Touched::Nothing => Meaning::Nothing,
    }
}

/// Whether the connection is of no further use after this error.
fn ends_connection(error: &xenstore::Error) -> bool {
    use xenstore::Error;
    matches!(error, Error::Disconnected | Error::Io { .. } | Error::Protocol(_) | Error::Connect { .. })
}
