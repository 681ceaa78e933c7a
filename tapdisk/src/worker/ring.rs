//! One frontend's ring: takes requests while slots are free, hands each to a slot's task, sends answers.
//!
//! **Exactly once**: a request that was taken is owned by one slot until it is answered. Out of slots, requests stay on
//! the shared ring, which is the queue. A barrier stops the taking until it is answered.
//!
//! Wake-ups: while the ring is *awake* it is looked at in every turn, and the frontend is not asked to notify. Only before
//! the thread sleeps the ring is armed ([`Ring::arm`]): found empty, our wake-up index published, and the event channel
//! unmasked if it had fired. Unmasking comes last: until then the guest cannot make us run.
//!
//! **Hold-off**: a frontend whose notifications bring no work has its event channel unmasked ever later, up to
//! [`MAX_HOLD_OFF`], so that it cannot keep a processor busy. The kernel's own delay for such events does not reach
//! user space (`drivers/xen/evtchn.c` calls `xen_irq_lateeoi` without the spurious flag).

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use blkif::ids::{PAGE_SIZE, SECTOR_SIZE};
use blkif::{BackRing, DomId, Geometry, RawRequest, Rejection, Request, RequestKind, Status, VdevId};
use gntdev::GrantMap;
use tap_ctl::proto::{RingEntry, RingStats};

use super::mapped::MappedRing;
use super::throttle::Gate;
use crate::executor::{Scheduler, TaskId};
use crate::flight::{By, Flight, Taken, What};
use crate::journal::{Entry, Journal, Replay};
use crate::sync::WaitSet;
use crate::tick::Tick;

/// Most requests of one ring in flight; the largest ring has 512 slots.
const MAX_SLOTS: usize = 256;

/// So many notifications without work in a row are taken for bad luck: a request that we found before its notification
/// came leaves one behind.
const FREE_SPURIOUS: u32 = 16;
/// The longest that a frontend's event channel is kept silent.
const MAX_HOLD_OFF: Duration = Duration::from_millis(100);

/// What became of arming a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// There is work: do not sleep.
    Work,
    /// The frontend will notify, and will be heard without our doing.
    Listening,
    /// The frontend will notify once its event channel is unmasked, which is to be done now.
    Unmask,
    /// The same, but not before this time has passed.
    Later(Duration),
    /// There are requests, which may not be taken before this time has passed.
    Limited(Duration),
    /// Nothing of this ring wakes us: it waits for its own requests, is being disconnected, or is broken.
    Deaf,
}

struct Slot {
    task: Cell<Option<TaskId>>,
    request: Cell<Option<Request>>,
    /// Where the request that the slot owns stands in the journal.
    entry: Cell<Option<Entry>>,
    /// When its request was taken, and what it is; `None`: it has none that will be answered.
    taken: Cell<Option<(Tick, What)>>,
}

/// What has come and gone.
#[derive(Debug, Default)]
struct Counts {
    taken: Cell<u64>,
    answered: Cell<u64>,
    kicked: Cell<u64>,
    kicks: Cell<u64>,
    malformed: Cell<u64>,
    failed: Cell<u64>,
}

fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

/// A frontend's ring, mapped, and the journal of its requests.
#[derive(Debug)]
pub struct Attached<M> {
    /// The ring, which counts the requests in `replay` as taken.
    pub mapped: MappedRing<M>,
    /// Its journal.
    pub journal: Journal,
    /// Requests that the process before us has left unanswered, oldest first.
    pub replay: Replay,
}

/// What is there while the ring is mapped.
struct Link<M> {
    mapped: MappedRing<M>,
    journal: Journal,
    replay: Replay,
}

impl<M: GrantMap> Link<M> {
    /// The next request: of those left to us, or of those on the ring. None is taken from the ring that could not be noted.
    fn next(&mut self) -> Result<Option<(Entry, RawRequest)>, blkif::RingBroken> {
        if let Some(left) = self.replay.pop_front() {
            return Ok(Some(left));
        }
        if !self.journal.has_room() {
            return Ok(None);
        }
        let ring = self.mapped.ring();
        let index = ring.next_request();
        let Some(raw) = ring.take()? else { return Ok(None) };
        Ok(self.journal.take(index, &raw).map(|entry| (entry, raw)))
    }

    fn respond(&mut self, entry: Entry, (id, op, status): (u64, u8, Status)) {
        let ring = self.mapped.ring();
        self.journal.answer(entry, ring.next_response());
        ring.respond(id, op, status);
    }

    fn push(&mut self) -> bool {
        let ring = self.mapped.ring();
        self.journal.publish(ring.next_response());
        let notify = ring.push();
        self.journal.published();
        notify
    }
}

/// A connected ring.
pub struct Ring<M> {
    /// The frontend's domain.
    pub dom: DomId,
    /// The frontend's device.
    pub vdev: VdevId,
    geometry: Cell<Geometry>,
    /// `None` once it was unmapped.
    link: RefCell<Option<Link<M>>>,
    scheduler: Rc<Scheduler>,
    slots: Vec<Slot>,
    idle: RefCell<Vec<usize>>,
    barrier: Cell<bool>,
    stopping: Cell<bool>,
    paused: Cell<bool>,
    /// Requests that are never answered, see [`Ring::hold`].
    unanswered: Cell<usize>,
    gate: Gate,
    counts: Counts,
    broken: Cell<bool>,
    answered: Cell<bool>,
    ended: WaitSet,
    /// Looked at in every turn.
    awake: Cell<bool>,
    /// The event channel has fired and is masked.
    masked: Cell<bool>,
    /// Something was taken since the event channel fired.
    fruitful: Cell<bool>,
    /// Notifications in a row that brought nothing.
    spurious: Cell<u32>,
    /// The event channel is kept masked until [`Ring::release_hold`], or until there is work after all.
    held: Cell<bool>,
    /// That time has come.
    due: Cell<bool>,
}

impl<M> fmt::Debug for Ring<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ring of {}/{}", self.dom, self.vdev)
    }
}

impl<M: GrantMap> Ring<M> {
    /// A ring that has not taken anything yet.
    pub fn new(
        (dom, vdev): (DomId, VdevId),
        geometry: Geometry,
        attached: Attached<M>,
        gate: Gate,
        scheduler: Rc<Scheduler>,
    ) -> Ring<M> {
        let Attached { mut mapped, journal, replay } = attached;
        let slots = (mapped.ring().slots() as usize).min(MAX_SLOTS);
        Ring {
            dom,
            vdev,
            geometry: Cell::new(geometry),
            link: RefCell::new(Some(Link { mapped, journal, replay })),
            slots: (0..slots)
                .map(|_| Slot {
                    task: Cell::default(),
                    request: Cell::default(),
                    entry: Cell::default(),
                    taken: Cell::default(),
                })
                .collect(),
            idle: RefCell::new((0..slots).rev().collect()),
            barrier: Cell::new(false),
            stopping: Cell::new(false),
            paused: Cell::new(false),
            unanswered: Cell::new(0),
            gate,
            counts: Counts::default(),
            broken: Cell::new(false),
            answered: Cell::new(false),
            ended: WaitSet::new(scheduler.clone()),
            awake: Cell::new(true),
            masked: Cell::new(false),
            fruitful: Cell::new(false),
            spurious: Cell::new(0),
            held: Cell::new(false),
            due: Cell::new(false),
            scheduler,
        }
    }

    fn with_ring<T>(&self, access: impl FnOnce(&mut BackRing) -> T) -> Option<T> {
        self.with_link(|link| access(link.mapped.ring()))
    }

    fn with_link<T>(&self, access: impl FnOnce(&mut Link<M>) -> T) -> Option<T> {
        self.link.borrow_mut().as_mut().map(access)
    }

    /// How many slot tasks to start.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// What the disk is and offers.
    pub fn geometry(&self) -> Geometry {
        self.geometry.get()
    }

    /// What the disk's limits mean for it.
    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The disk has grown.
    pub fn set_capacity(&self, capacity: u64) {
        self.geometry.set(Geometry { capacity, ..self.geometry.get() });
    }

    /// The event channel fired, and is masked: the ring may hold requests.
    pub fn fired(&self) {
        count(&self.counts.kicked);
        self.masked.set(true);
        self.fruitful.set(false);
        self.due.set(false);
        self.awake.set(true);
    }

    /// The time of [`Armed::Later`] has passed.
    pub fn release_hold(&self) {
        if self.held.get() {
            self.due.set(true);
            self.awake.set(true);
        }
    }

    /// Whether requests stay on the ring, whatever there is.
    fn is_closed(&self) -> bool {
        self.stopping.get() || self.broken.get() || self.paused.get()
    }

    /// Takes no more requests until [`Ring::go_on`].
    pub fn pause(&self) {
        self.paused.set(true);
    }

    /// Takes requests again. There may be some that the frontend will not notify again.
    pub fn go_on(&self) {
        self.paused.set(false);
        self.awake.set(true);
    }

    /// Takes requests while there are any, and slots for them. Returns whether anything was taken or answered.
    pub fn take(&self) -> bool {
        let (mut took, mut now) = (false, None);
        while self.awake.get() && !self.is_closed() && !self.barrier.get() {
            let Some(&slot) = self.idle.borrow().last() else { break };
            let Some(slot_place) = self.slots.get(slot) else { break };
            // What was left to us has passed the gate before.
            if self.gate.is_limited() && !self.has_left() && !(self.has_unconsumed() && self.gate.admits()) {
                break;
            }
            let Some((entry, raw)) = self.next_entry() else { break };
            took = true;
            count(&self.counts.taken);
            match blkif::request::parse(&raw, &self.geometry.get()) {
                Ok(request) => {
                    self.barrier.set(matches!(request.kind, RequestKind::Barrier { .. }));
                    self.gate.charge(most_bytes(&request));
                    self.idle.borrow_mut().pop();
                    let taken = (*now.get_or_insert_with(Tick::now), What::from(&request));
                    slot_place.entry.set(Some(entry));
                    slot_place.request.set(Some(request));
                    slot_place.taken.set(Some(taken));
                    if let Some(task) = slot_place.task.get() {
                        self.scheduler.wake(task);
                    }
                }
                Err(Rejection { id, op, status, reason }) => {
                    log::debug!("{self:?}: request refused: {reason}");
                    count(&self.counts.malformed);
                    self.send(entry, id, op, status);
                }
            }
        }
        if took {
            self.fruitful.set(true);
        }
        took
    }

    /// Whether there are requests of the process before us.
    fn has_left(&self) -> bool {
        self.with_link(|link| !link.replay.is_empty()).unwrap_or(false)
    }

    fn next_entry(&self) -> Option<(Entry, RawRequest)> {
        match self.with_link(Link::next)? {
            Ok(entry) => entry,
            Err(broken) => {
                self.report_broken(&broken);
                None
            }
        }
    }

    fn report_broken(&self, broken: &blkif::RingBroken) {
        if !self.broken.replace(true) {
            log::error!("{self:?}: {broken}; the ring is not served any more until the frontend reconnects");
        }
    }

    /// Whether there is a request to take, for polling: the frontend is not asked to notify.
    pub fn has_work(&self) -> bool {
        let open = self.awake.get() && !self.is_closed() && !self.barrier.get() && !self.gate.is_waiting();
        open && self.has_unconsumed()
    }

    fn has_unconsumed(&self) -> bool {
        // A broken ring counts as work: taking finds out.
        self.with_ring(BackRing::has_unconsumed).is_some_and(|found| found.unwrap_or(true))
    }

    /// To be called before sleeping.
    pub fn arm(&self) -> Armed {
        if self.is_closed() || self.barrier.get() || self.idle.borrow().is_empty() {
            // A request that ends makes the next turn look again.
            return Armed::Deaf;
        }
        if let Some(time) = self.gate.wait() {
            return Armed::Limited(time);
        }
        self.gate.rest();
        if !self.awake.get() {
            return Armed::Listening;
        }
        match self.with_ring(BackRing::final_check) {
            Some(Ok(false)) => {}
            Some(Ok(true)) => return Armed::Work,
            Some(Err(broken)) => {
                self.report_broken(&broken);
                return Armed::Deaf;
            }
            None => return Armed::Deaf,
        }
        self.awake.set(false);
        if !self.masked.get() {
            return Armed::Listening;
        }
        if self.fruitful.get() {
            self.spurious.set(0);
        } else if !self.held.get() {
            self.spurious.set(self.spurious.get().saturating_add(1));
        }
        let excess = self.spurious.get().saturating_sub(FREE_SPURIOUS);
        if excess > 0 && !self.due.get() {
            if self.held.replace(true) {
                return Armed::Listening;
            }
            let millis = Duration::from_millis(1 << (excess - 1).min(7));
            return Armed::Later(millis.min(MAX_HOLD_OFF));
        }
        self.held.set(false);
        self.masked.set(false);
        Armed::Unmask
    }

    fn send(&self, entry: Entry, id: u64, op: u8, status: Status) {
        self.with_link(|link| link.respond(entry, (id, op, status)));
        count(&self.counts.answered);
        if status == Status::Error {
            count(&self.counts.failed);
        }
        self.answered.set(true);
    }

    /// Publishes answers. Returns whether the frontend wants to be notified.
    pub fn push(&self) -> bool {
        let notify = self.answered.replace(false) && self.with_link(Link::push).unwrap_or(false);
        if notify {
            count(&self.counts.kicks);
        }
        notify
    }

    /// What has come and gone.
    pub fn stats(&self) -> RingStats {
        let Counts { taken, answered, kicked, kicks, malformed, failed } = &self.counts;
        RingStats {
            entry: RingEntry { domid: self.dom.0, vdev: self.vdev.0 },
            queues: 1,
            taken: taken.get(),
            answered: answered.get(),
            kicked: kicked.get(),
            kicks: kicks.get(),
            malformed: malformed.get(),
            failed: failed.get(),
        }
    }

    /// Whether a request that failed for a reason that may pass is tried again.
    pub fn may_try_again(&self, slot: usize, patience: Duration) -> bool {
        let taken = self.slots.get(slot).and_then(|place| place.taken.get());
        !self.stopping.get() && taken.is_some_and(|(since, _)| Tick::now().since(since) < patience)
    }

    /// What is under way.
    pub fn flight(&self, now: Tick) -> Flight {
        let mut flight = Flight { held: self.unanswered.get() as u64, ..Flight::default() };
        let by = By::Frontend(self.dom, self.vdev);
        for (since, what) in self.slots.iter().filter_map(|slot| slot.taken.get()) {
            flight.add(Taken { since, what, by }, now);
        }
        flight
    }

    /// For a slot's task: the next request, or `None` when the ring is being disconnected.
    pub async fn next(&self, slot: usize) -> Option<Request> {
        let place = self.slots.get(slot)?;
        std::future::poll_fn(|_| {
            if let Some(request) = place.request.take() {
                return std::task::Poll::Ready(Some(request));
            }
            if self.stopping.get() {
                return std::task::Poll::Ready(None);
            }
            place.task.set(self.scheduler.current());
            std::task::Poll::Pending
        })
        .await
    }

    /// For a slot's task: answers its request and takes the slot back.
    pub fn complete(&self, slot: usize, request: &Request, status: Status) {
        if let Some(entry) = self.slots.get(slot).and_then(|place| place.entry.take()) {
            self.send(entry, request.id, request.op, status);
        }
        self.release(slot, request);
    }

    fn release(&self, slot: usize, request: &Request) {
        if matches!(request.kind, RequestKind::Barrier { .. }) {
            self.barrier.set(false);
        }
        if let Some(place) = self.slots.get(slot) {
            place.taken.set(None);
        }
        self.idle.borrow_mut().push(slot);
        // There may be requests that found no slot, and that the frontend will not notify again.
        self.awake.set(true);
        self.ended.wake_all();
    }

    /// For a slot's task: keeps its request unanswered until the ring is disconnected.
    ///
    /// This is what a failed flush comes to: Linux's frontend takes an error for "flush is not supported" and lets the
    /// application believe that its data is safe (`xen-blkfront.c`, `blkif_interrupt`).
    pub async fn hold(&self, slot: usize, request: &Request) {
        self.unanswered.set(self.unanswered.get() + 1);
        if let Some(place) = self.slots.get(slot) {
            place.taken.set(None);
        }
        self.ended.wake_all();
        while !self.stopping.get() {
            self.ended.wait().await;
        }
        self.unanswered.set(self.unanswered.get() - 1);
        self.release(slot, request);
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.idle.borrow().len()
    }

    /// Waits until no request is in flight or held; for a ring that was stopped.
    pub async fn drain(&self) {
        while self.in_flight() > 0 {
            self.ended.wait().await;
        }
    }

    /// Waits until at most `left` requests are in flight, those that are held not counted.
    pub async fn quiesce(&self, left: usize) {
        while self.in_flight() - self.unanswered.get() > left {
            self.ended.wait().await;
        }
    }

    /// To be called before sleeping: whether the frontend must be notified although it did not ask in time.
    pub fn nudge(&self) -> bool {
        self.with_ring(BackRing::nudge).unwrap_or(false)
    }

    /// Gives the guest's pages back, and forgets its requests. Nothing may be in flight.
    pub fn unmap(&self) {
        if let Some(Link { mapped, journal, .. }) = self.link.take() {
            drop(mapped);
            journal.remove();
        }
    }

    /// Takes no more requests; every slot's task ends when its request has.
    pub fn stop(&self) {
        self.stopping.set(true);
        self.gate.rest();
        for slot in &self.slots {
            if let Some(task) = slot.task.get() {
                self.scheduler.wake(task);
            }
        }
        self.ended.wake_all();
    }
}

/// Bytes that a request moves at most: how much an indirect one does is not known before its segments are.
fn most_bytes(request: &Request) -> u64 {
    match &request.kind {
        RequestKind::Read { segments, .. }
        | RequestKind::Write { segments, .. }
        | RequestKind::Barrier { segments, .. } => u64::from(segments.sectors()) * SECTOR_SIZE,
        RequestKind::Indirect { count, .. } => u64::from(*count) * PAGE_SIZE as u64,
        RequestKind::Flush | RequestKind::Discard { .. } => 0,
    }
}

#[cfg(test)]
mod tests;
