//! One frontend's ring: takes requests while slots and buffers are free, hands each to a slot's task, sends answers.
//!
//! **Exactly once**: a request that was taken is owned by one slot until it is answered. Out of slots or buffers, requests
//! stay on the shared ring, which is the queue. A barrier stops the taking until it is answered.
//!
//! Wake-ups: the ring is *armed* when it was found empty, our wake-up index published, and the event channel unmasked.
//! Unmasking comes last: until then the guest cannot make us run.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use blkif::{BackRing, DomId, Geometry, Port, Rejection, Request, RequestKind, Status, VdevId};
use gntdev::GrantMap;

use super::mapped::MappedRing;
use crate::buf::{Buf, Pool};
use crate::executor::{Scheduler, TaskId};
use crate::sync::WaitSet;

/// Most requests of one ring in flight; the largest ring has 512 slots.
const MAX_SLOTS: usize = 256;

/// A request with the memory for its data.
#[derive(Debug)]
pub struct Work {
    /// What to do.
    pub request: Request,
    /// Room for all its segments; `None` if it has no data.
    pub buf: Option<Buf>,
}

/// What became of the taking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The ring is empty and we have asked to be woken: unmask the event channel.
    Armed,
    /// Something else must end first: a slot, a buffer, a barrier.
    Starved,
    /// The frontend broke the protocol, or we are disconnecting: never again.
    Stopped,
}

struct Slot {
    task: Cell<Option<TaskId>>,
    work: RefCell<Option<Work>>,
}

/// A connected ring.
pub struct Ring<M> {
    /// The frontend's domain.
    pub dom: DomId,
    /// The frontend's device.
    pub vdev: VdevId,
    /// Our end of its event channel.
    pub port: Port,
    geometry: Geometry,
    /// `None` once it was unmapped.
    mapped: RefCell<Option<MappedRing<M>>>,
    scheduler: Rc<Scheduler>,
    slots: Vec<Slot>,
    idle: RefCell<Vec<usize>>,
    /// Taken from the ring, waiting for a buffer.
    parked: RefCell<Option<Request>>,
    barrier: Cell<bool>,
    stopping: Cell<bool>,
    broken: Cell<bool>,
    answered: Cell<bool>,
    ended: WaitSet,
    armed: Cell<bool>,
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
        port: Port,
        geometry: Geometry,
        mut mapped: MappedRing<M>,
        scheduler: Rc<Scheduler>,
    ) -> Ring<M> {
        let slots = (mapped.ring().slots() as usize).min(MAX_SLOTS);
        Ring {
            dom,
            vdev,
            port,
            geometry,
            mapped: RefCell::new(Some(mapped)),
            slots: (0..slots).map(|_| Slot { task: Cell::default(), work: RefCell::default() }).collect(),
            idle: RefCell::new((0..slots).collect()),
            parked: RefCell::default(),
            barrier: Cell::new(false),
            stopping: Cell::new(false),
            broken: Cell::new(false),
            answered: Cell::new(false),
            ended: WaitSet::new(scheduler.clone()),
            armed: Cell::new(false),
            scheduler,
        }
    }

    fn with_ring<T>(&self, access: impl FnOnce(&mut BackRing) -> T) -> Option<T> {
        self.mapped.borrow_mut().as_mut().map(|mapped| access(mapped.ring()))
    }

    /// How many slot tasks to start.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    /// The event channel fired: the ring may hold requests.
    pub fn disarm(&self) {
        self.armed.set(false);
    }

    /// Whether taking is worth a try: not asleep until the next event.
    pub fn is_awake(&self) -> bool {
        !self.armed.get() && !self.stopping.get() && !self.broken.get()
    }

    /// Takes requests while there are any, and slots and buffers for them.
    pub fn take(&self, pool: &Rc<Pool>) -> Taken {
        loop {
            if self.stopping.get() || self.broken.get() {
                return Taken::Stopped;
            }
            if self.barrier.get() {
                return Taken::Starved;
            }
            let Some(&slot) = self.idle.borrow().last() else { return Taken::Starved };
            let Some(request) = self.next_request() else {
                if self.broken.get() {
                    return Taken::Stopped;
                }
                match self.with_ring(BackRing::final_check) {
                    None => return Taken::Stopped,
                    Some(Ok(true)) => continue,
                    Some(Ok(false)) => {
                        self.armed.set(true);
                        return Taken::Armed;
                    }
                    Some(Err(broken)) => {
                        self.report_broken(&broken);
                        return Taken::Stopped;
                    }
                }
            };
            let buf = match data_len(&request) {
                0 => None,
                bytes => match pool.data(bytes) {
                    Some(buf) => Some(buf),
                    None => {
                        self.parked.replace(Some(request));
                        return Taken::Starved;
                    }
                },
            };
            if matches!(request.kind, RequestKind::Barrier { .. }) {
                self.barrier.set(true);
            }
            self.idle.borrow_mut().pop();
            if let Some(slot) = self.slots.get(slot) {
                slot.work.replace(Some(Work { request, buf }));
                if let Some(task) = slot.task.get() {
                    self.scheduler.wake(task);
                }
            }
        }
    }

    /// The next request that is worth a slot; bad ones are answered on the way.
    fn next_request(&self) -> Option<Request> {
        if let Some(request) = self.parked.take() {
            return Some(request);
        }
        loop {
            match self.with_ring(BackRing::take)? {
                Ok(None) => return None,
                Ok(Some(raw)) => match blkif::request::parse(&raw, &self.geometry) {
                    Ok(request) => return Some(request),
                    Err(Rejection { id, op, status, reason }) => {
                        log::debug!("{self:?}: request refused: {reason}");
                        self.send(id, op, status);
                    }
                },
                Err(broken) => {
                    self.report_broken(&broken);
                    return None;
                }
            }
        }
    }

    fn report_broken(&self, broken: &blkif::RingBroken) {
        if !self.broken.replace(true) {
            log::error!("{self:?}: {broken}; the ring is not served any more until the frontend reconnects");
        }
    }

    fn send(&self, id: u64, op: u8, status: Status) {
        self.with_ring(|ring| ring.respond(id, op, status));
        self.answered.set(true);
    }

    /// Publishes answers. Returns whether the frontend wants to be notified.
    pub fn push(&self) -> bool {
        self.answered.replace(false) && self.with_ring(BackRing::push).unwrap_or(false)
    }

    /// For a slot's task: the next request, or `None` when the ring is being disconnected.
    pub async fn next(&self, slot: usize) -> Option<Work> {
        let place = self.slots.get(slot)?;
        std::future::poll_fn(|_| {
            if let Some(work) = place.work.take() {
                return std::task::Poll::Ready(Some(work));
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
        self.send(request.id, request.op, status);
        self.release(slot, request);
    }

    fn release(&self, slot: usize, request: &Request) {
        if matches!(request.kind, RequestKind::Barrier { .. }) {
            self.barrier.set(false);
        }
        self.idle.borrow_mut().push(slot);
        self.ended.wake_all();
    }

    /// For a slot's task: keeps its request unanswered until the ring is disconnected.
    ///
    /// This is what a failed flush comes to: Linux's frontend takes an error for "flush is not supported" and lets the
    /// application believe that its data is safe (`xen-blkfront.c`, `blkif_interrupt`).
    pub async fn hold(&self, slot: usize, request: &Request) {
        while !self.stopping.get() {
            self.ended.wait().await;
        }
        self.release(slot, request);
    }

    /// Waits until at most `left` requests are in flight.
    pub async fn drain_to(&self, left: usize) {
        while self.slots.len() - self.idle.borrow().len() > left {
            self.ended.wait().await;
        }
    }

    /// To be called before sleeping: whether the frontend must be notified although it did not ask in time.
    pub fn nudge(&self) -> bool {
        self.with_ring(BackRing::nudge).unwrap_or(false)
    }

    /// Gives the guest's pages back. Nothing may be in flight.
    pub fn unmap(&self) {
        self.mapped.take();
    }

    /// Takes no more requests; every slot's task ends when its request has. Those that were parked are dropped.
    pub fn stop(&self) {
        self.stopping.set(true);
        self.parked.take();
        for slot in &self.slots {
            if let Some(task) = slot.task.get() {
                self.scheduler.wake(task);
            }
        }
        self.ended.wake_all();
    }
}

/// Bytes of data that a request moves.
fn data_len(request: &Request) -> usize {
    match &request.kind {
        RequestKind::Read { segments, .. }
        | RequestKind::Write { segments, .. }
        | RequestKind::Barrier { segments, .. } => segments.bytes() as usize,
        RequestKind::Flush | RequestKind::Discard { .. } | RequestKind::Indirect { .. } => 0,
    }
}

#[cfg(test)]
mod tests;
