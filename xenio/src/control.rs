//! All devices: looking at one, deciding, acting, until there is nothing left to do.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use blkif::{DomId, XenbusState, keys};
use mio::Token;
use nix::errno::Errno;
use tap_ctl::{ControlDir, Minor, Request};
use xenstore::value::{parse_u16, parse_u64};
use xenstore::{Client, Error, TxId};

use crate::connect::{self, Terms};
use crate::device::{Device, Pending};
use crate::features::{self, Disk, Offer};
use crate::input::{self, Backend, Named};
use crate::leftovers;
use crate::machine::{Action, Frontend, Own, Phase, View, decide};
use crate::paths::{self, DeviceId, Paths};
use crate::problem::Problem;
use crate::publish::{self, Change, Outcome, Place};
use crate::revive::Revivals;
use crate::tapdisk::{LinkError, Links, News, Ticket};

/// After so many actions in a row a device waits for its next turn: others have theirs in between.
const STEPS: usize = 16;

/// All devices and the connections to their tapdisks.
#[derive(Debug)]
pub struct Control {
    paths: Paths,
    dir: ControlDir,
    own_domid: u16,
    offer: Offer,
    links: Links,
    revivals: Revivals,
    /// What the tapdisks told last of each of their disks. It may come before a device asks, or belong to several.
    heard: HashMap<(i32, Minor), News>,
    devices: BTreeMap<DeviceId, Device>,
    tickets: HashMap<Ticket, DeviceId>,
    generation: u64,
    /// A request could not be sent for want of descriptors or memory.
    scarce: bool,
}

/// A device as it was just seen.
struct Look {
    backend: Backend,
    /// The frontend's directory; empty for a defective device, which is never connected.
    frontend_path: Vec<u8>,
    frontend: Frontend,
    view: View,
}

/// Whether a device has come to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Until something changes.
    Yes,
    /// It wants another turn.
    No,
    /// It wants another turn when the host may have more to give.
    Later,
}

impl Control {
    /// No devices yet.
    pub fn new(paths: Paths, dir: ControlDir, offer: Offer, links: Links, revivals: Revivals) -> Control {
        Control {
            paths,
            dir,
            own_domid: 0,
            offer,
            links,
            revivals,
            heard: HashMap::new(),
            devices: BTreeMap::new(),
            tickets: HashMap::new(),
            generation: 0,
            scarce: false,
        }
    }

    /// A new connection to XenStore: sets the watch on all devices, and forgets which frontends are watched. Everything
    /// has to be looked at again.
    ///
    /// # Errors
    ///
    /// Those of XenStore.
    pub fn attach(&mut self, store: &mut Client) -> Result<(), Error> {
        // Only a domain's own toolstack area has this key; dom0's may lack it.
        let domid = input::optional(store, TxId::NONE, "domid")?;
        self.own_domid = domid.and_then(|value| parse_u16(&value).ok()).unwrap_or(0);
        for device in self.devices.values_mut() {
            device.watched = None;
            // While there was no daemon nobody could remove a device. One that is missing now was more likely lost with
            // the daemon's memory, and its guest goes on using it.
            device.unconfirmed = true;
        }
        store.watch(self.paths.root(), "backend")?;
        self.sweep_errors(store)
    }

    /// Removes the error messages of devices that went while nobody was there to see it.
    fn sweep_errors(&self, store: &mut Client) -> Result<(), Error> {
        let root = self.paths.errors();
        for domid in children(store, &root)?.iter().filter_map(|name| paths::domid(name)) {
            for vdev in
                children(store, &format!("{root}/{domid}"))?.iter().filter_map(|name| paths::vdev(name))
            {
                let id = DeviceId { domid, vdev };
                let state = format!("{}/{}", self.paths.device(id), keys::STATE);
                if input::optional(store, TxId::NONE, state)?.is_none() {
                    remove_error(store, &self.paths.error(id))?;
                }
            }
        }
        Ok(())
    }

    /// The devices there may be: those known and those with a directory; of one domain, or of all.
    ///
    /// # Errors
    ///
    /// Those of XenStore.
    pub fn scan(&self, store: &mut Client, only: Option<DomId>) -> Result<Vec<DeviceId>, Error> {
        let known = self.devices.keys().copied().filter(|id| only.is_none_or(|domid| id.domid == domid));
        let mut found: Vec<DeviceId> = known.collect();
        let domains = match only {
            Some(domid) => vec![domid],
            None => {
                children(store, self.paths.root())?.iter().filter_map(|name| paths::domid(name)).collect()
            }
        };
        for domid in domains {
            let names = children(store, &self.paths.domain(domid))?;
            found.extend(
                names.iter().filter_map(|name| paths::vdev(name)).map(|vdev| DeviceId { domid, vdev }),
            );
        }
        Ok(found)
    }

    /// Which device an event of a frontend's watch is about, if that device still is the one that set the watch.
    pub fn frontend_of(&self, token: &[u8]) -> Option<DeviceId> {
        let mut parts = token.strip_prefix(b"frontend/")?.split(|&byte| byte == b'/');
        let id = DeviceId { domid: paths::domid(parts.next()?)?, vdev: paths::vdev(parts.next()?)? };
        let generation = parse_u64(parts.next()?).ok()?;
        self.devices.get(&id).filter(|device| device.generation == generation).map(|_| id)
    }

    /// Whether a device is known.
    pub fn knows(&self, id: DeviceId) -> bool {
        self.devices.contains_key(&id)
    }

    /// Whether a device's `state` is what we wrote last, so that an event for it tells nothing new.
    ///
    /// # Errors
    ///
    /// Those of XenStore.
    pub fn is_echo(&self, store: &mut Client, id: DeviceId) -> Result<bool, Error> {
        let Some(written) = self.devices.get(&id).and_then(|device| device.written) else {
            return Ok(false);
        };
        let own = input::optional(store, TxId::NONE, format!("{}/{}", self.paths.device(id), keys::STATE))?;
        Ok(own.as_deref() == Some(written.state().as_str().as_bytes()))
    }

    /// Does what the readiness of a tapdisk's connection allows; gives the devices to look at.
    pub fn link_ready(&mut self, token: Token) -> Vec<DeviceId> {
        let Some(report) = self.links.ready(token) else {
            return Vec::new();
        };
        let mut touched = Vec::new();
        for (ticket, reply) in report.replies {
            let Some(id) = self.tickets.remove(&ticket) else { continue };
            touched.push(id);
            let Some(device) = self.devices.get_mut(&id) else { continue };
            if let Some((request, pending)) = device.answered(ticket, reply) {
                self.send(id, &request, pending);
            } else if let (Some(vbd), Some(_)) = (device.vbd(), device.disk())
                && let Some(news) = self.heard.get(&(vbd.pid, vbd.minor))
            {
                tell(device, news);
            }
        }
        for news in report.news {
            for device in self.devices.values_mut() {
                if device.vbd().is_some_and(|vbd| (vbd.pid, vbd.minor) == (report.pid, news.minor)) {
                    tell(device, &news);
                    touched.push(device.id());
                }
            }
            self.heard.insert((report.pid, news.minor), news);
        }
        if let Some(reason) = report.ended {
            log::info!("{reason}");
            touched.extend(self.bury(report.pid, &reason));
        }
        touched
    }

    /// A tapdisk is gone: others go on with its disks, where that is possible; else they are gone too, with their rings.
    fn bury(&mut self, pid: i32, reason: &LinkError) -> Vec<DeviceId> {
        self.heard.retain(|(teller, _), _| *teller != pid);
        leftovers::remove(&self.dir, pid.cast_unsigned());
        let problem = Problem::new(Errno::ENXIO, reason.to_string());
        let served = |device: &&mut Device| device.vbd().is_some_and(|vbd| vbd.pid == pid);
        let mut touched = Vec::new();
        for device in self.devices.values_mut().filter(served) {
            let revived = reason.is_death() && device.vbd().is_some_and(|vbd| self.revivals.begin(vbd));
            if revived {
                device.waits_for_successor();
            } else {
                device.died(pid, problem.clone());
            }
            touched.push(device.id());
        }
        self.tickets.retain(|_, id| !touched.contains(id));
        touched
    }

    /// Takes in what came of disks whose tapdisks died; gives the devices to look at.
    pub fn take_revivals(&mut self) -> Vec<DeviceId> {
        let mut touched = Vec::new();
        for outcome in self.revivals.outcomes() {
            let vbd = outcome.vbd;
            for device in self.devices.values_mut().filter(|device| device.vbd() == Some(vbd)) {
                match &outcome.next {
                    Ok(next) => {
                        if *next != vbd.pid {
                            let (id, pid) = (device.id(), vbd.pid);
                            log::warn!("device {id}: tapdisk {next} goes on after tapdisk {pid}");
                        }
                        device.succeeded(*next);
                    }
                    Err(problem) => device.died(vbd.pid, problem.clone()),
                }
                touched.push(device.id());
            }
        }
        touched
    }

    /// Looks at a device, decides and acts until it is at rest.
    ///
    /// # Errors
    ///
    /// Those of XenStore; the device then wants another look later.
    pub fn evaluate(&mut self, store: &mut Client, id: DeviceId) -> Result<Rest, Error> {
        for _ in 0..STEPS {
            let Some(look) = self.look(store, id)? else {
                return Ok(Rest::Yes);
            };
            let Some(action) = decide(&look.view) else {
                return Ok(Rest::Yes);
            };
            self.act(store, id, &look, action)?;
            if std::mem::take(&mut self.scarce) {
                return Ok(Rest::Later);
            }
        }
        Ok(Rest::No)
    }

    /// `None`: there is nothing to decide about.
    fn look(&mut self, store: &mut Client, id: DeviceId) -> Result<Option<Look>, Error> {
        let mut backend = input::backend(store, &self.paths.device(id), id, &self.dir)?;
        self.rename(store, id, &mut backend)?;
        let (offer, place) = (self.offer, self.place(id));
        if backend.own == Own::Absent && !self.knows(id) {
            // It went before this xenio had looked at it; the sweep at the beginning may have found it there still.
            remove_error(store, &self.paths.error(id))?;
            return Ok(None);
        }
        let Some(device) = self.device(id, &backend) else {
            return Ok(None);
        };
        let (frontend_path, frontend) = match &backend.frontend {
            Ok(path) if backend.own != Own::Absent => {
                watch(store, device, path)?;
                let (frontend, odd) = input::frontend(store, path)?;
                if let Some(value) = odd
                    && device.chatter.take(Instant::now()).is_ok()
                {
                    log::warn!("device {id}: ignoring the frontend's state \"{value}\"");
                }
                (path.clone(), frontend)
            }
            _ => (Vec::new(), Frontend::Gone),
        };
        device.observe(&backend, frontend);
        if let (Some(reason), Own::Is(_)) = (device.to_note(), backend.own)
            && publish::note(store, &place, reason)? == Outcome::Done
        {
            device.noted();
        }
        let moved = device.returned(frontend)
            || match device.params() {
                // It may be in operation already when its new ring is first seen: NetBSD's waits for nothing.
                Some(params) if frontend.has_ring() => {
                    let terms = Terms {
                        offer,
                        writable: backend.role.writable,
                        // Only what the frontend shows is of interest.
                        discard: params.discard,
                        polling: params.polling,
                    };
                    connect::ring(store, id, &frontend_path, terms)?.is_ok_and(|shown| shown != *params)
                }
                _ => false,
            };
        let view = device.view(&backend, frontend, moved);
        if device.changed(&view) {
            log::debug!("device {id}: {view}");
        }
        Ok(Some(Look { backend, frontend_path, frontend, view }))
    }

    /// Has XenStore name the tapdisk that goes on with a device's disk.
    fn rename(&mut self, store: &mut Client, id: DeviceId, backend: &mut Backend) -> Result<(), Error> {
        let Some(device) = self.devices.get_mut(&id) else { return Ok(()) };
        let Some((former, vbd)) = device.renamed() else { return Ok(()) };
        if backend.named == Named::Tapdisk(former, vbd.minor) {
            let path = |pid| self.dir.vbd_path(pid, vbd.minor).display().to_string();
            let (old, new) = (path(former), path(vbd.pid));
            let dir = self.paths.device(id);
            if publish::rename(store, &dir, (&old, former), (&new, vbd.pid))? == Outcome::Stale {
                // Whoever changed it meanwhile makes us look again.
                return Ok(());
            }
            backend.named = Named::Tapdisk(vbd.pid, vbd.minor);
        }
        device.is_named();
        Ok(())
    }

    /// The record of a device, a new one if it appears.
    fn device(&mut self, id: DeviceId, backend: &Backend) -> Option<&mut Device> {
        if backend.own == Own::Absent {
            return self.devices.get_mut(&id).filter(|device| !(device.unconfirmed && device.has_ring()));
        }
        let generation = &mut self.generation;
        let device = self.devices.entry(id).or_insert_with(|| {
            *generation = generation.wrapping_add(1);
            Device::new(id, *generation, Instant::now())
        });
        device.unconfirmed = false;
        Some(device)
    }

    fn act(&mut self, store: &mut Client, id: DeviceId, look: &Look, action: Action) -> Result<(), Error> {
        log::debug!("device {id}: -> {action}");
        match action {
            Action::Ask => self.send(id, &Request::List, Pending::List),
            Action::Connect => self.connect(store, id, look)?,
            Action::Disconnect => self.disconnect(id),
            Action::Forget => self.forget(store, id)?,
            Action::Fail => self.fail(store, id, look)?,
            Action::InitWait => {
                if self.write(store, id, look, Some(Phase::InitWait))? == Outcome::Done {
                    self.with(id, Device::settled);
                }
            }
            Action::Publish => {
                if self.write(store, id, look, None)? == Outcome::Done {
                    self.with(id, Device::published);
                }
            }
            Action::Announce => {
                // A frontend that waits for Connected while it stands there already is told again.
                let told = look.view.own == Own::Is(Phase::Connected)
                    && look.frontend != Frontend::Is(XenbusState::Initialised);
                let state = (!told).then_some(Phase::Connected);
                if self.write(store, id, look, state)? == Outcome::Done {
                    self.with(id, Device::announced);
                    self.say(id, "connected");
                }
            }
            Action::Resize => {
                if self.resize(store, id, look)? == Outcome::Done {
                    self.with(id, Device::published);
                }
            }
            Action::Closing => drop(self.set_state(store, id, look, Phase::Closing)?),
            Action::Closed => {
                if self.set_state(store, id, look, Phase::Closed)? == Outcome::Done {
                    self.with(id, Device::settled);
                    self.say(id, "closed");
                }
            }
        }
        Ok(())
    }

    fn with(&mut self, id: DeviceId, change: impl FnOnce(&mut Device)) {
        if let Some(device) = self.devices.get_mut(&id) {
            change(device);
        }
    }

    /// Logs a step that a guest can bring about as often as it likes.
    fn say(&mut self, id: DeviceId, words: &str) {
        if self.devices.get_mut(&id).is_some_and(|device| device.chatter.take(Instant::now()).is_ok()) {
            log::info!("device {id}: {words}");
        }
    }

    fn place(&self, id: DeviceId) -> Place {
        Place { dir: self.paths.device(id), own_domid: self.own_domid, id }
    }

    /// Publishes all that is known, with a state.
    fn write(
        &mut self,
        store: &mut Client,
        id: DeviceId,
        look: &Look,
        state: Option<Phase>,
    ) -> Result<Outcome, Error> {
        let entries = features::published(self.offer, self.disk(id, look));
        self.apply(store, id, look, Change { entries, error: None, state, only_news: false })
    }

    /// The disk as the frontend is to see it, if it is known.
    fn disk(&self, id: DeviceId, look: &Look) -> Option<Disk<'_>> {
        let device = self.devices.get(&id)?;
        Some(Disk { info: device.disk()?, role: look.backend.role, pid: device.vbd()?.pid })
    }

    /// Tells a frontend in operation the disk's size: by the key, and by the state's watch, for which Linux's blkfront
    /// waits to look at the key (`blkback_changed` in drivers/block/xen-blkfront.c). All else stays as it was when the
    /// frontend read it.
    fn resize(&mut self, store: &mut Client, id: DeviceId, look: &Look) -> Result<Outcome, Error> {
        let Some(disk) = self.disk(id, look) else { return Ok(Outcome::Stale) };
        let entries = features::size(disk.info).to_vec();
        let state = Some(Phase::Connected);
        self.apply(store, id, look, Change { entries, error: None, state, only_news: true })
    }

    fn set_state(
        &mut self,
        store: &mut Client,
        id: DeviceId,
        look: &Look,
        state: Phase,
    ) -> Result<Outcome, Error> {
        let state = Some(state);
        self.apply(store, id, look, Change { entries: Vec::new(), error: None, state, only_news: false })
    }

    fn apply(
        &mut self,
        store: &mut Client,
        id: DeviceId,
        look: &Look,
        change: Change,
    ) -> Result<Outcome, Error> {
        let Own::Is(phase) = look.view.own else {
            return Ok(Outcome::Stale);
        };
        let outcome = publish::apply(store, &self.place(id), phase, &change)?;
        if outcome == Outcome::Done
            && let Some(state) = change.state
        {
            self.with(id, |device| device.written = Some(state));
        }
        Ok(outcome)
    }

    fn connect(&mut self, store: &mut Client, id: DeviceId, look: &Look) -> Result<(), Error> {
        let (polling, odd) = input::polling(store, &self.paths.device(id))?;
        for words in odd {
            self.say(id, &words);
        }
        let terms = Terms {
            offer: self.offer,
            writable: look.backend.role.writable,
            discard: self.disk(id, look).is_some_and(|disk| disk.discard().is_some()),
            polling,
        };
        match connect::ring(store, id, &look.frontend_path, terms)? {
            Err(problem) => self.with(id, |device| device.trouble(problem)),
            Ok(params) => {
                let Some(vbd) = self.devices.get(&id).and_then(Device::vbd) else { return Ok(()) };
                let request = Request::Connect { minor: vbd.minor, ring: params.clone() };
                self.send(id, &request, Pending::Connect(params));
            }
        }
        Ok(())
    }

    fn disconnect(&mut self, id: DeviceId) {
        if let Some(vbd) = self.devices.get(&id).and_then(Device::vbd) {
            let request = Request::Disconnect { minor: vbd.minor, domid: id.domid.0, vdev: id.vdev.0 };
            self.send(id, &request, Pending::Disconnect);
        }
    }

    /// Sends a request to the device's tapdisk. A tapdisk that is not there has let go of everything.
    fn send(&mut self, id: DeviceId, request: &Request, pending: Pending) {
        let Some(device) = self.devices.get_mut(&id) else { return };
        let Some(vbd) = device.vbd() else { return };
        match self.links.send(vbd.pid, request) {
            Ok(ticket) => {
                device.sent(ticket, pending);
                self.tickets.insert(ticket, id);
            }
            Err(reason) if reason.is_scarcity() => {
                if device.chatter.take(Instant::now()).is_ok() {
                    log::warn!("device {id}: {reason}; trying again");
                }
                self.scarce = true;
            }
            Err(reason) => {
                log::info!("device {id}: {reason}");
                self.bury(vbd.pid, &reason);
            }
        }
    }

    /// As Linux's `xenbus_dev_fatal`: the reason into the `error` node, and Closing.
    fn fail(&mut self, store: &mut Client, id: DeviceId, look: &Look) -> Result<(), Error> {
        let Some(device) = self.devices.get_mut(&id) else { return Ok(()) };
        let problem = device.cause(&look.backend);
        if device.chatter.take(Instant::now()).is_ok() {
            log::error!("device {id}: {}", problem.message);
        }
        let error = Some((self.paths.error(id), problem.to_string()));
        let state = (look.view.own != Own::Is(Phase::Closing)).then_some(Phase::Closing);
        let change = Change { entries: Vec::new(), error, state, only_news: false };
        if self.apply(store, id, look, change)? == Outcome::Done {
            self.with(id, Device::failed);
        }
        Ok(())
    }

    fn forget(&mut self, store: &mut Client, id: DeviceId) -> Result<(), Error> {
        let Some(device) = self.devices.get(&id) else { return Ok(()) };
        if let Some(path) = &device.watched {
            ignore_missing(
                store.unwatch(input::frontend_key(path, keys::STATE), token(id, device.generation)),
            )?;
        }
        remove_error(store, &self.paths.error(id))?;
        self.devices.remove(&id);
        self.tickets.retain(|_, owner| *owner != id);
        let devices = &self.devices;
        let uses = |pid| devices.values().any(|device| device.vbd().is_some_and(|vbd| vbd.pid == pid));
        self.links.retain(uses);
        self.heard.retain(|(pid, _), _| uses(*pid));
        log::info!("device {id}: gone");
        Ok(())
    }
}

/// Takes the tapdisk's news of a disk in.
fn tell(device: &mut Device, news: &News) {
    if device.told(news) {
        log::info!("device {}: the disk has grown to {} sectors", device.id(), news.info.sectors);
    }
    if let Some(reason) = device.degrades(news) {
        log::warn!("device {}: the disk {reason}", device.id());
    }
}

fn token(id: DeviceId, generation: u64) -> String {
    format!("frontend/{id}/{generation}")
}

/// Watches the frontend's `state`, and nothing else there: the guest decides how much there is and how often it changes.
fn watch(store: &mut Client, device: &mut Device, path: &[u8]) -> Result<(), Error> {
    if device.watched.as_deref() == Some(path) {
        return Ok(());
    }
    let token = token(device.id(), device.generation);
    if let Some(old) = device.watched.take() {
        ignore_missing(store.unwatch(input::frontend_key(&old, keys::STATE), &token))?;
    }
    store.watch(input::frontend_key(path, keys::STATE), &token)?;
    device.watched = Some(path.to_vec());
    Ok(())
}

fn children(store: &mut Client, dir: &str) -> Result<Vec<Vec<u8>>, Error> {
    match store.directory(TxId::NONE, dir) {
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        other => other,
    }
}

fn ignore_missing(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Removes an error message if there is one, and the domain's directory above it if it was the last one in there.
fn remove_error(store: &mut Client, dir: &str) -> Result<(), Error> {
    if input::optional(store, TxId::NONE, format!("{dir}/error"))?.is_none() {
        return Ok(());
    }
    ignore_missing(store.rm(TxId::NONE, dir))?;
    let Some((parent, _)) = dir.rsplit_once('/') else { return Ok(()) };
    if children(store, parent)?.is_empty() {
        ignore_missing(store.rm(TxId::NONE, parent))?;
    }
    Ok(())
}
