//! Connecting and disconnecting frontends, and the end of a disk.
//!
//! **Threads**: an image without metadata is served by one thread for each ring. The thread that opened the image keeps the
//! first ring of a frontend; the others get **siblings**, threads with an I/O engine, buffers and devices of their own and
//! a second handle on the image, which live as long as the frontend is connected. An image with metadata (VHD) serves
//! all rings from its one thread: its maps need no locks then.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::mpsc::{RecvError, channel};

use blkif::{Abi, DomId, Geometry, MAX_INDIRECT_SEGMENTS, RingOrder, VdevId};
use gntdev::{Access, Grants};
use nix::errno::Errno;
use tap_ctl::Reply;
use tap_ctl::proto::{LimitChange, Limits, QueueParams, RingEntry, RingParams};

use super::channel::Channel;
use super::mapped::MappedRing;
use super::persistent::Persistent;
use super::ring::Ring;
use super::seat::{Seat, info};
use super::serve::{self, Failures, Way};
use super::served;
use super::stats::Counted;
use super::thread::{Served, State, failure};
use super::throttle::Gate;
use super::{Answer, Begin, Command, Commands, Inbox, Notice, Phase, Shared, Source, Worker, takeover};
use crate::copier::Copier;
use crate::flight::{Operation, What};
use crate::io::errno_of;
use crate::xen::Xen;
use crate::xentop::Page;

/// What went wrong: for programs, and for people.
pub(super) type Failure = (Errno, String);

/// A thread that serves one more ring of a frontend.
pub(super) struct Sibling {
    /// Its name in [`Command::SiblingEnded`].
    number: u64,
    /// With that one ring.
    params: RingParams,
    worker: Worker,
    ending: bool,
}

impl Sibling {
    /// What it serves.
    pub(super) fn params(&self) -> &RingParams {
        &self.params
    }

    fn entry(&self) -> RingEntry {
        self.params.entry()
    }

    /// It was told to end.
    pub(super) fn is_ending(&self) -> bool {
        self.ending
    }
}

impl<X: Xen> State<X> {
    /// Connects all rings of a frontend, or none.
    pub(super) fn connect(&mut self, params: &RingParams, begin: Begin) -> Result<(), Failure> {
        let (dom, vdev) = (params.dom(), params.device());
        let named = |(errno, what): Failure| (errno, format!("device {vdev} of domain {dom}: {what}"));
        if self.closing {
            return Err(named((Errno::ESHUTDOWN, "the image is being closed".into())));
        }
        if self.entries().contains(&params.entry()) {
            return Err(named((Errno::EALREADY, "its ring is connected already".into())));
        }
        // The toolstack's mode reaches the descriptor itself; another ring may still be writing through it, though.
        if params.readonly && self.rings.borrow().is_empty() {
            if let Some(disk) = self.seat.disk() {
                disk.make_readonly().map_err(|e| named((e.errno(), e.to_string())))?;
            }
            self.seat.stay_readonly();
        }
        let [first, rest @ ..] = &params.queues[..] else {
            return Err(named((Errno::EINVAL, "it has no queue".into())));
        };
        let running = self.seat.phase() == Phase::Running;
        // Of a disk that is paused nobody knows yet how many threads may serve it.
        let apart =
            !rest.is_empty() && (!running || self.seat.disk().is_some_and(|disk| disk.share().is_some()));
        let own = if apart { std::slice::from_ref(first) } else { &params.queues[..] };
        let mut served = Vec::with_capacity(own.len());
        for queue in own {
            match self.attach(params, queue, begin) {
                Ok(ring) => served.push(ring),
                Err(error) => {
                    self.detach(served);
                    return Err(named(error));
                }
            }
        }
        // Threads of their own serve at once, and the record comes before.
        if self.seat.is_first()
            && let Err(error) = self.keeper.serves(params)
        {
            self.detach(served);
            return Err(named((errno_of(&error), format!("cannot note it for a takeover: {error}"))));
        }
        if apart && running {
            if let Err(error) = self.start_siblings(params, rest, begin) {
                self.keeper.served(params.entry());
                self.detach(served);
                return Err(named(error));
            }
        } else if apart {
            self.parked.borrow_mut().extend(rest.iter().map(|queue| params.with_queue(queue)));
        }
        self.poller.configure(params.polling);
        for served in &served {
            if !running {
                served.ring.pause();
            }
            self.start_slots(served);
        }
        if begin == Begin::Again {
            self.wake_frontends(&served);
        }
        log::info!(
            "device {vdev} of domain {dom}: connected, {} of {} slots{}",
            counted(params.queues.len(), "ring"),
            served.first().map_or(0, |served| served.ring.slots()),
            if params.persistent { ", persistent grants" } else { "" }
        );
        self.rings.borrow_mut().extend(served);
        self.publish();
        Ok(())
    }

    /// Begins to serve a ring that was attached.
    pub(super) fn start_slots(&self, served: &Served<X>) {
        let Served { ring, way, .. } = served;
        for slot in 0..ring.slots() {
            self.executor.spawn(serve::slot(ring.clone(), slot, way.clone()));
        }
    }

    fn copier(&mut self) -> io::Result<Rc<Copier<X::Grants>>> {
        if let Some(copier) = &self.copier {
            return Ok(copier.clone());
        }
        // A device that is missing now may be there when the next ring is connected.
        let grants = self.xen.open_grants()?;
        self.io.pool.register_with(self.io.reactor.clone());
        Ok(self.copier.insert(Rc::new(Copier::new(grants, self.io.scheduler.clone()))).clone())
    }

    /// Maps a ring, takes its journal up and binds its event channel. Nothing is served yet.
    pub(super) fn attach(
        &mut self,
        params: &RingParams,
        queue: &QueueParams,
        begin: Begin,
    ) -> Result<Served<X>, Failure> {
        let (dom, vdev) = (params.dom(), params.device());
        let abi = Abi::from_protocol_key(Some(params.protocol.as_bytes()))
            .map_err(|e| (Errno::EPROTONOSUPPORT, e.to_string()))?;
        let refs = queue.refs();
        let order = RingOrder::all()
            .find(|order| order.pages() == refs.len())
            .ok_or((Errno::EINVAL, "a ring has 1, 2, 4, 8 or 16 pages".to_owned()))?;
        let disk = self.seat.info();
        let geometry = Geometry {
            capacity: disk.sectors,
            readonly: params.readonly || disk.readonly,
            flush: true,
            barrier: true,
            discard: params.discard && disk.discard.is_some(),
            discard_secure: disk.discard.is_some_and(|discard| discard.secure),
            max_indirect: MAX_INDIRECT_SEGMENTS,
        };
        let journal = self.keeper.journal(params, queue);
        let missing = |e: io::Error| (errno_of(&e), format!("cannot open Xen's devices: {e}"));
        let copier = self.copier().map_err(missing)?;
        let events = self.xen.open_events(dom).map_err(missing)?;
        let map = copier
            .grants()
            .map(dom, &refs, Access::ReadWrite)
            .map_err(|e| (errno_of(&e), format!("cannot map the ring's pages: {e}")))?;
        let mapped = MappedRing::attach(map, abi, order).map_err(|e| (Errno::EIO, e.to_string()))?;
        let attached = takeover::attached(mapped, &journal, begin)?;
        let channel = Channel::new(events, &self.io.reactor, (dom, queue.remote_port()), begin)
            .map_err(|e| (errno_of(&e), format!("cannot bind event channel {}: {e}", queue.port)))?;
        let gate = Gate::new(self.throttle.clone());
        let ring = Ring::new((dom, vdev), geometry, attached, gate, self.io.scheduler.clone());
        let way = Way {
            dom,
            seat: self.seat.clone(),
            served: served::Served::default(),
            page: self.page(params, queue),
            clock: self.clock.clone(),
            pool: self.io.pool.clone(),
            copier,
            persistent: params.persistent.then(|| Persistent::new(dom)),
            tell: self.tell.clone(),
            told: Cell::new(false),
            failures: Failures::default(),
        };
        Ok(Served { ring: Rc::new(ring), way: Rc::new(way), channel: Rc::new(channel) })
    }

    /// Where xentop looks for this frontend. To make the file falls to the frontend's first ring, which is the last to end.
    fn page(&self, params: &RingParams, queue: &QueueParams) -> Option<Page> {
        let (folder, entry) = (self.xen.statistics(), params.entry());
        let first = params.queues.first() == Some(queue) && self.seat.image().is_some();
        let made = match first && !self.entries().contains(&entry) {
            true => Page::create(&folder, entry),
            false => Page::join(&folder, entry),
        };
        let warn = |error: &io::Error| {
            let (dom, vdev) = (params.dom(), params.device());
            log::warn!(
                "device {vdev} of domain {dom}: no statistics for xentop in {}: {error}",
                folder.display()
            );
        };
        made.inspect_err(warn).ok()
    }

    /// Takes back what [`State::attach`] did.
    fn detach(&self, served: Vec<Served<X>>) {
        for served in &served {
            release(served);
        }
    }

    /// Starts a thread for each of `queues`. Waits for them: connecting takes no longer than mapping a ring does.
    fn start_siblings(
        &mut self,
        params: &RingParams,
        queues: &[QueueParams],
        begin: Begin,
    ) -> Result<(), Failure> {
        for queue in queues {
            if let Err(error) = self.start_sibling(params.with_queue(queue), begin) {
                self.end_siblings(|sibling| sibling.entry() == params.entry());
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) fn start_sibling(&mut self, params: RingParams, begin: Begin) -> Result<(), Failure> {
        let refused = |reply: Reply| match reply {
            Reply::Error { errno, message } => (Errno::from_raw(errno), message),
            _ => (Errno::EIO, "a thread for a ring gave no sensible answer".to_owned()),
        };
        let lost = |_: RecvError| (Errno::EIO, "a thread for a ring has ended at once".to_owned());
        let share = self
            .seat
            .disk()
            .and_then(|disk| disk.share())
            .ok_or((Errno::EINVAL, "the image has one thread only".to_owned()))?;
        let (sender, opened) = channel();
        let worker = Worker::start(
            self.xen.clone(),
            Source::Share(Shared {
                disk: share,
                throttle: self.throttle.clone(),
                patience: self.seat.patience(),
                keeper: self.keeper.clone(),
            }),
            self.engine,
            Box::new(move |result| drop(sender.send(result))),
            self.tell.clone(),
        )
        .map_err(|e| (errno_of(&e), format!("cannot start a thread for a ring: {e}")))?;
        opened.recv().map_err(lost)?.map_err(refused)?;
        let (sender, connected) = channel();
        let answer = Answer::new(move |reply| drop(sender.send(reply)));
        worker.send(Command::Connect(params.clone(), begin, answer));
        match connected.recv().map_err(lost)? {
            Reply::Done => {}
            reply => return Err(refused(reply)),
        }
        let number = self.inbox.next_number();
        self.siblings.borrow_mut().push(Sibling { number, params, worker, ending: false });
        Ok(())
    }

    /// Has threads end. They are gone from the list when they have.
    pub(super) fn end_siblings(&self, which: impl Fn(&Sibling) -> bool) {
        end_siblings(&self.siblings, &self.inbox, which);
    }

    pub(super) fn sibling_ended(&self, number: u64) {
        self.siblings.borrow_mut().retain(|sibling| {
            let ended = sibling.number == number;
            if ended {
                self.past.borrow_mut().outlive(sibling.worker.legacy());
            }
            !ended
        });
        self.inbox.siblings_changed.wake_all();
        self.publish();
    }

    /// For asking the threads for further rings.
    pub(super) fn sibling_commands(&self) -> Vec<Commands> {
        self.siblings.borrow().iter().map(|sibling| sibling.worker.commands()).collect()
    }

    /// The frontends being served.
    fn entries(&self) -> Vec<RingEntry> {
        entries(&self.rings, &self.siblings, &self.parked)
    }

    pub(super) fn publish(&self) {
        publish(&self.inbox, &self.seat, self.entries());
    }

    pub(super) fn disconnect(&self, entry: RingEntry, answer: Answer) {
        let (dom, vdev) = (DomId(entry.domid), VdevId(entry.vdev));
        if !self.entries().contains(&entry) {
            let message = format!("device {vdev} of domain {dom}: no ring is connected");
            return answer.give(failure(Errno::ENODEV, message));
        }
        let end = self.end_of_frontend(entry);
        self.executor.spawn(async move {
            end.await;
            answer.give(Reply::Done);
        });
    }

    /// Takes a frontend out of service: nothing of the guest is mapped or bound when this ends.
    fn end_of_frontend(&self, entry: RingEntry) -> impl Future<Output = ()> + use<X> {
        let (dom, vdev) = (DomId(entry.domid), VdevId(entry.vdev));
        let ours: Vec<Served<X>> = self
            .rings
            .borrow()
            .iter()
            .filter(|served| (served.ring.dom, served.ring.vdev) == (dom, vdev))
            .cloned()
            .collect();
        self.unpark(entry);
        let (rings, siblings, parked) = (self.rings.clone(), self.siblings.clone(), self.parked.clone());
        let past = self.past.clone();
        let (inbox, seat, keeper) = (self.inbox.clone(), self.seat.clone(), self.keeper.clone());
        async move {
            end_siblings(&siblings, &inbox, |sibling| sibling.entry() == entry);
            ours.iter().for_each(|served| served.ring.stop());
            for served in &ours {
                end_ring(served).await;
            }
            rings
                .borrow_mut()
                .retain(|served| !ours.iter().any(|ended| Rc::ptr_eq(&ended.ring, &served.ring)));
            ours.iter().for_each(|ended| past.borrow_mut().outlive(Counted::of(&ended.way.served)));
            while siblings.borrow().iter().any(|sibling| sibling.entry() == entry) {
                inbox.siblings_changed.wait().await;
            }
            if seat.is_first() {
                keeper.served(entry);
            }
            publish(&inbox, &seat, entries(&rings, &siblings, &parked));
            log::info!("device {vdev} of domain {dom}: disconnected");
        }
    }

    pub(super) fn resize(&self, size: Option<u64>, answer: Answer) {
        let Some(work) = self.seat.work(What { operation: Operation::Resize, sector: 0, sectors: 0 }) else {
            return answer.give(failure(Errno::EBUSY, format!("{}: is paused", self.seat.name())));
        };
        let rings = self.rings.clone();
        let (siblings, tell, keeper) = (self.siblings.clone(), self.tell.clone(), self.keeper.clone());
        self.executor.spawn(async move {
            let disk = &work.disk;
            let before = disk.sectors();
            match disk.resize(size).await {
                Ok(sectors) => {
                    rings.borrow().iter().for_each(|served| served.ring.set_capacity(sectors));
                    for sibling in siblings.borrow().iter() {
                        sibling.worker.send(Command::Grown);
                    }
                    if sectors != before {
                        keeper.note(|record| record.info = info(disk));
                        log::info!("{}: has grown from {before} to {sectors} sectors", disk.name());
                        tell(Notice::Resized(info(disk)));
                    }
                    answer.give(Reply::DiskInfo(info(disk)));
                }
                Err(errno) => {
                    let message =
                        format!("{}: cannot be resized: {}; see the log", disk.name(), errno.desc());
                    answer.give(failure(errno, message));
                }
            }
        });
    }

    /// Changes what the disk may do in a second; what holds from now on.
    pub(super) fn limit(&self, change: LimitChange) -> Limits {
        let before = self.throttle.limits();
        let limits = before.changed(change);
        if limits != before {
            self.throttle.set(limits);
            self.seat.stay_limited(limits);
            self.keeper.note(|record| record.params.limit = limits);
            self.renew_limits();
            for sibling in self.siblings.borrow().iter() {
                sibling.worker.send(Command::Limited);
            }
            log::info!("{}: limited to {limits}", self.seat.name());
        }
        limits
    }

    /// The limits are others than before.
    pub(super) fn renew_limits(&self) {
        self.rings.borrow().iter().for_each(|served| served.ring.gate().renew());
    }

    /// For a sibling: the disk has grown.
    pub(super) fn grown(&self) {
        let sectors = self.seat.info().sectors;
        self.rings.borrow().iter().for_each(|served| served.ring.set_capacity(sectors));
    }

    pub(super) fn close(&mut self, answer: Answer) {
        if std::mem::replace(&mut self.closing, true) {
            return answer.give(failure(Errno::EALREADY, "the image is being closed already".into()));
        }
        self.send_clients_away();
        let ends: Vec<_> = self.entries().into_iter().map(|entry| self.end_of_frontend(entry)).collect();
        let (seat, ended, keeper) = (self.seat.clone(), self.ended.clone(), self.keeper.clone());
        self.executor.spawn(async move {
            for end in ends {
                end.await;
            }
            seat.settled().await;
            seat.no_work().await;
            let closed = match seat.disk() {
                Some(disk) => disk.close().await,
                None => Ok(()),
            };
            if seat.is_first() {
                keeper.end();
            }
            let reply = match closed {
                Ok(()) => Reply::Done,
                Err(errno) => failure(errno, format!("closing the image failed: {}", errno.desc())),
            };
            ended.replace(Some((answer, reply)));
        });
    }
}

fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

fn publish(inbox: &Inbox, seat: &Seat, rings: Vec<RingEntry>) {
    inbox.publish(super::Status { rings, phase: seat.phase(), image: seat.image() });
}

fn entries<X: Xen>(
    rings: &RefCell<Vec<Served<X>>>,
    siblings: &RefCell<Vec<Sibling>>,
    parked: &RefCell<Vec<RingParams>>,
) -> Vec<RingEntry> {
    let rings = rings.borrow();
    let own = rings.iter().map(|Served { ring, .. }| RingEntry { domid: ring.dom.0, vdev: ring.vdev.0 });
    let (siblings, parked) = (siblings.borrow(), parked.borrow());
    let mut entries: Vec<RingEntry> = Vec::new();
    let others = siblings.iter().map(Sibling::entry).chain(parked.iter().map(RingParams::entry));
    for entry in own.chain(others) {
        if !entries.contains(&entry) {
            entries.push(entry);
        }
    }
    entries
}

fn end_siblings(siblings: &RefCell<Vec<Sibling>>, inbox: &Inbox, which: impl Fn(&Sibling) -> bool) {
    for sibling in siblings.borrow_mut().iter_mut().filter(|sibling| !sibling.ending && which(sibling)) {
        sibling.ending = true;
        let (number, home) = (sibling.number, inbox.sender());
        sibling.worker.send(Command::Close(Answer::new(move |_| home.send(Command::SiblingEnded(number)))));
    }
}

/// Takes a stopped ring out of service.
async fn end_ring<X: Xen>(served: &Served<X>) {
    served.ring.drain().await;
    if served.ring.push() {
        served.notify();
    }
    if let Some(persistent) = &served.way.persistent {
        persistent.clear();
    }
    release(served);
}

/// Nothing of the guest is mapped or bound after this.
fn release<X: Xen>(served: &Served<X>) {
    served.ring.unmap();
    if let Err(error) = served.channel.unbind() {
        log::warn!("{:?}: unbinding its event channel failed: {error}", served.ring);
    }
}
