//! The place of a worker's disk, which is empty while the disk is paused.
//!
//! Whoever uses the disk takes it from here each time and lets go of it with the request: when nothing is in flight and the
//! place is emptied, the image is closed and its lock given up.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tap_ctl::proto::{DiskInfo, ImageSpec, Limits, OpenParams};

use super::Phase;
use super::keeper::Keeper;
use crate::executor::Scheduler;
use crate::flight::{By, Flight, Taken, What};
use crate::image::{Disk, OnFailure, Succession};
use crate::sync::WaitSet;
use crate::tick::Tick;

/// The place of a disk.
pub(super) struct Seat {
    disk: RefCell<Option<Rc<Disk>>>,
    /// How the disk was opened; `None`: another thread did.
    params: RefCell<Option<OpenParams>>,
    /// The disk as it was when it was last seen.
    seen: Cell<DiskInfo>,
    phase: Cell<Phase>,
    /// What NBD clients and administrators have under way.
    works: RefCell<Vec<Option<Taken>>>,
    /// Places in there that are free.
    free: RefCell<Vec<usize>>,
    changed: WaitSet,
    patience: Duration,
    /// Requests that are to be tried again.
    trying: Cell<u32>,
    tries: WaitSet,
}

/// A work on the disk, during which it is not taken away.
pub(super) struct Work {
    seat: Rc<Seat>,
    place: usize,
    /// The disk.
    pub disk: Rc<Disk>,
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Some(work) = self.seat.works.borrow_mut().get_mut(self.place) {
            *work = None;
        }
        self.seat.free.borrow_mut().push(self.place);
        self.seat.changed.wake_all();
    }
}

impl Seat {
    /// The place of an open disk.
    pub fn new(disk: Disk, params: Option<OpenParams>, patience: Duration, scheduler: Rc<Scheduler>) -> Seat {
        Seat {
            seen: Cell::new(info(&disk)),
            disk: RefCell::new(Some(Rc::new(disk))),
            params: RefCell::new(params),
            phase: Cell::new(Phase::Running),
            works: RefCell::default(),
            free: RefCell::default(),
            changed: WaitSet::new(scheduler.clone()),
            patience,
            trying: Cell::new(0),
            tries: WaitSet::new(scheduler),
        }
    }

    /// The place of a disk that was paused when another process had it, and that guests know as `info`.
    pub fn paused(params: OpenParams, info: DiskInfo, patience: Duration, scheduler: Rc<Scheduler>) -> Seat {
        Seat {
            seen: Cell::new(info),
            disk: RefCell::new(None),
            params: RefCell::new(Some(params)),
            phase: Cell::new(Phase::Paused),
            works: RefCell::default(),
            free: RefCell::default(),
            changed: WaitSet::new(scheduler.clone()),
            patience,
            trying: Cell::new(0),
            tries: WaitSet::new(scheduler),
        }
    }

    /// The disk; `None` while it is paused.
    pub fn disk(&self) -> Option<Rc<Disk>> {
        self.disk.borrow().clone()
    }

    /// Takes the disk for a work; `None` while it is paused, or is being paused.
    pub fn work(self: &Rc<Self>, what: What) -> Option<Work> {
        let disk = self.disk().filter(|_| self.phase.get() == Phase::Running)?;
        let mut works = self.works.borrow_mut();
        let place = self.free.borrow_mut().pop().unwrap_or_else(|| {
            works.push(None);
            works.len() - 1
        });
        if let Some(work) = works.get_mut(place) {
            *work = Some(Taken { since: Tick::now(), what, by: By::Other });
        }
        drop(works);
        Some(Work { seat: self.clone(), place, disk })
    }

    /// The same, as soon as the disk is not paused; `None` if `over` becomes true before.
    pub async fn work_soon(self: &Rc<Self>, what: What, over: impl Fn() -> bool) -> Option<Work> {
        loop {
            if over() {
                return None;
            }
            if let Some(work) = self.work(what) {
                return Some(work);
            }
            self.changed.wait().await;
        }
    }

    /// Lets everybody look again who waits for the disk.
    pub fn stir(&self) {
        self.changed.wake_all();
    }

    /// Ends when no work is under way.
    pub async fn no_work(&self) {
        while self.works.borrow().iter().any(Option::is_some) {
            self.changed.wait().await;
        }
    }

    /// What NBD clients and administrators have under way.
    pub fn flight(&self, now: Tick) -> Flight {
        let mut flight = Flight::default();
        self.works.borrow().iter().flatten().for_each(|taken| flight.add(*taken, now));
        flight
    }

    /// What the disk is, or was when it was paused.
    pub fn info(&self) -> DiskInfo {
        if let Some(disk) = &*self.disk.borrow() {
            self.seen.set(info(disk));
        }
        self.seen.get()
    }

    /// How long a request is tried again that fails for a reason that may pass.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Ends when it is time for another try.
    pub async fn next_try(&self) {
        self.trying.set(self.trying.get() + 1);
        self.tries.wait().await;
        self.trying.set(self.trying.get() - 1);
    }

    /// Whether the disk goes on, but not as it was asked for.
    pub fn is_degraded(&self) -> bool {
        self.disk.borrow().as_ref().is_some_and(|disk| disk.is_degraded())
    }

    /// Whether requests wait for another try.
    pub fn is_trying(&self) -> bool {
        self.trying.get() > 0
    }

    /// It is time for another try.
    pub fn try_again(&self) {
        self.tries.wake_all();
    }

    /// Whether it is the place of the thread that opened the disk.
    pub fn is_first(&self) -> bool {
        self.params.borrow().is_some()
    }

    /// How the disk was opened.
    pub fn params(&self) -> Option<OpenParams> {
        self.params.borrow().clone()
    }

    /// The image, for people.
    pub fn image(&self) -> Option<ImageSpec> {
        self.params.borrow().as_ref().map(|params| params.image.clone())
    }

    /// The image, for messages.
    pub fn name(&self) -> String {
        match (&*self.disk.borrow(), &*self.params.borrow()) {
            (Some(disk), _) => disk.name().to_string(),
            (None, Some(params)) => params.image.path.clone(),
            (None, None) => "a disk".to_owned(),
        }
    }

    /// Where the disk is between running and paused.
    pub fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// Goes over to another phase.
    pub fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.changed.wake_all();
    }

    /// Ends when the disk is not on its way to a pause.
    pub async fn settled(&self) {
        while self.phase.get() == Phase::Pausing {
            self.changed.wait().await;
        }
    }

    /// Whenever the disk is opened again, it is for reading only.
    pub fn stay_readonly(&self) {
        if let Some(params) = &mut *self.params.borrow_mut() {
            params.readonly = true;
        }
        let seen = self.info();
        self.seen.set(DiskInfo { readonly: true, ..seen });
    }

    /// Whenever the disk is opened again, it is with these limits.
    pub fn stay_limited(&self, limit: Limits) {
        if let Some(params) = &mut *self.params.borrow_mut() {
            params.limit = limit;
        }
    }

    /// What whoever takes over has to know of the disk itself: if its second image comes to serve instead of the first, only
    /// that is to be opened; if a flush fails, nobody is to take over, who would find a disk that flushes.
    pub fn heed(&self, keeper: &Arc<Keeper>) {
        let (Some(disk), true) = (self.disk(), self.is_first()) else { return };
        let told = keeper.clone();
        disk.tell_succession(Succession(Box::new(move || told.leaves_first_image())));
        let told = keeper.clone();
        disk.tell_failure(OnFailure(Box::new(move || told.give_up())));
    }

    /// Lets go of the disk, which closes its files if nobody else has it.
    pub fn empty(&self) {
        let _ = self.info();
        let heir = self.disk.take().and_then(|disk| disk.heir());
        if let (Some(image), Some(params)) = (heir, &mut *self.params.borrow_mut()) {
            // The first image is older: to mirror it again would undo what the guests have written since.
            (params.image, params.secondary) = (image, None);
        }
    }

    /// Puts a disk in.
    pub fn fill(&self, disk: Disk, params: OpenParams) {
        self.seen.set(info(&disk));
        self.disk.replace(Some(Rc::new(disk)));
        self.params.replace(Some(params));
    }
}

/// What xenio publishes.
pub(super) fn info(disk: &Disk) -> DiskInfo {
    DiskInfo {
        sectors: disk.sectors(),
        sector_size: 512,
        physical_sector_size: disk.physical_block_size(),
        readonly: disk.is_readonly(),
        discard: disk.discard_limits(),
    }
}
