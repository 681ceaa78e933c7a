//! Pausing a disk under its frontends, and going on with the same image or another one.
//!
//! 1. The rings take no more requests: what the guests ask for stays on the shared rings. Threads for further rings end; the
//!    rings that they served are *parked*.
//! 2. What is in flight ends, the image is brought into its resting state and closed. From now on others may work on it.
//! 3. Frontends come and go as ever. Rings are mapped, or parked, and not served.
//! 4. An image is opened, and must be as large as the guests were told. Parked rings are served again, by threads of their
//!    own or, if the image needs that, by this one. A larger image is published as any growth.
//!
//! A request that is held for ever, because a flush has failed, is not waited for: it stays held.

use std::time::Instant;

use blkif::{DomId, VdevId};
use nix::errno::Errno;
use tap_ctl::Reply;
use tap_ctl::proto::{DiskInfo, ImageSpec, Reopen, RingEntry, RingParams};

use super::connect::Failure;
use super::seat::info;
use super::thread::{Served, State, failure};
use super::{Answer, Begin, Command, Notice, Phase};
use crate::image::{self, snapshot};
use crate::io::errno_of;
use crate::reactor::Timer;
use crate::xen::Xen;

/// What comes after a pause.
#[derive(Debug)]
pub(super) enum Then {
    /// The disk stays paused.
    Stay,
    /// A new image is made, and opened.
    Snapshot(ImageSpec),
    /// Another process goes on.
    Leave,
}

impl Then {
    /// Whether the disk is to be at rest. Such wishes go together, but not with a snapshot, after which the disk goes on.
    fn is_rest(&self) -> bool {
        matches!(self, Then::Stay | Then::Leave)
    }
}

/// Somebody wants a pause.
#[derive(Debug)]
pub(super) struct Wish {
    /// For what.
    pub then: Then,
    /// Not if it takes longer.
    pub until: Option<Instant>,
    /// Who.
    pub answer: Answer,
}

impl Wish {
    fn refuse(self, errno: Errno, message: String) {
        self.answer.give(failure(errno, message));
    }
}

impl<X: Xen> State<X> {
    /// Begins to pause.
    pub(super) fn pause(&mut self, wish: Wish) {
        let name = self.seat.name();
        if self.closing {
            return wish.refuse(Errno::ESHUTDOWN, "the image is being closed".into());
        }
        match (self.seat.phase(), &wish.then) {
            (Phase::Paused, Then::Stay | Then::Leave) => wish.answer.give(Reply::Done),
            (Phase::Paused, Then::Snapshot(_)) => wish.refuse(Errno::EBUSY, format!("{name}: is paused")),
            (Phase::Pausing, then) => {
                if self.after_pause.is_empty() {
                    wish.refuse(
                        Errno::EBUSY,
                        format!("{name}: a pause that was given up is ending; try again"),
                    );
                } else if then.is_rest() && self.after_pause.iter().all(|other| other.then.is_rest()) {
                    self.want(wish);
                } else {
                    wish.refuse(Errno::EBUSY, format!("{name}: is being paused"));
                }
            }
            (Phase::Running, _) => {
                self.want(wish);
                self.begin_pause();
            }
        }
    }

    fn want(&mut self, wish: Wish) {
        if let Some(until) = wish.until {
            let time = until.saturating_duration_since(Instant::now());
            if let Err(error) = self.io.reactor.timer(Timer::Pause, time) {
                return wish.refuse(Errno::EAGAIN, format!("{}: no timer: {error}", self.seat.name()));
            }
        }
        self.after_pause.push(wish);
    }

    fn begin_pause(&mut self) {
        self.seat.enter(Phase::Pausing);
        self.publish();
        self.rings.borrow().iter().for_each(|served| served.ring.pause());
        self.park_siblings();
        let (seat, rings, siblings) = (self.seat.clone(), self.rings.clone(), self.siblings.clone());
        let (inbox, pausing) = (self.inbox.clone(), self.pausing.clone());
        let number = inbox.next_number();
        pausing.set(number);
        self.executor.spawn(async move {
            while !siblings.borrow().is_empty() {
                inbox.siblings_changed.wait().await;
            }
            // A ring that is connected meanwhile takes nothing.
            let ours: Vec<Served<X>> = rings.borrow().clone();
            for served in &ours {
                served.ring.quiesce(0).await;
            }
            drop(ours);
            seat.no_work().await;
            if pausing.get() != number {
                // It was given up.
                return;
            }
            pausing.set(0);
            let closed = match seat.disk() {
                Some(disk) => disk.close().await,
                None => Ok(()),
            };
            inbox.sender().send(Command::Quiet(closed));
        });
    }

    /// Nothing is in flight any more, and the image was closed; or the pause was given up.
    pub(super) fn quiet(&mut self, closed: Result<(), Errno>) {
        let name = self.seat.name();
        match closed {
            Ok(()) => {
                self.seat.empty();
                self.seat.enter(Phase::Paused);
                if self.after_pause.iter().any(|wish| matches!(wish.then, Then::Stay)) {
                    self.keeper.note(|record| record.paused = true);
                }
                log::info!("{name}: paused");
            }
            Err(_) => self.go_on(),
        }
        self.publish();
        let wishes = std::mem::take(&mut self.after_pause);
        if wishes.is_empty() && closed.is_ok() && !self.closing {
            // Given up when the image was being closed already.
            if let Err((_, why)) = self.unpause(Reopen::default()) {
                self.keeper.note(|record| record.paused = true);
                log::error!("{name}: stays paused: {why}");
            }
        }
        for wish in wishes {
            match (closed, wish.then) {
                (Err(errno), _) => {
                    let message = format!("{name}: closing it for a pause failed: {}", errno.desc());
                    wish.answer.give(failure(errno, message));
                }
                (Ok(()), _) if self.closing => {
                    wish.answer.give(failure(Errno::ESHUTDOWN, format!("{name}: is being closed")));
                }
                (Ok(()), Then::Stay | Then::Leave) => wish.answer.give(Reply::Done),
                (Ok(()), Then::Snapshot(image)) => wish.answer.give(match self.snapshot(&image) {
                    Ok(()) => Reply::Done,
                    Err((errno, message)) => failure(errno, message),
                }),
            }
        }
    }

    /// Refuses those who did not want to wait so long.
    pub(super) fn give_up_late(&mut self) {
        let now = Instant::now();
        let late = |wish: &mut Wish| wish.until.is_some_and(|until| now >= until);
        let over: Vec<Wish> = self.after_pause.extract_if(.., late).collect();
        let any = !over.is_empty();
        for wish in over {
            let name = self.seat.name();
            let message =
                format!("{name}: what is in flight did not end in time; the disk goes on as before");
            wish.refuse(Errno::ETIMEDOUT, message);
        }
        if any && self.after_pause.is_empty() {
            self.give_up_pause();
        }
    }

    /// Serves the rings again although requests are in flight. Those that had threads of their own wait for the end of these.
    fn give_up_pause(&mut self) {
        if self.pausing.replace(0) == 0 {
            // The image is being closed: it is opened again when it is.
            return;
        }
        let (inbox, siblings) = (self.inbox.clone(), self.siblings.clone());
        self.executor.spawn(async move {
            while !siblings.borrow().is_empty() {
                inbox.siblings_changed.wait().await;
            }
            inbox.sender().send(Command::Quiet(Err(Errno::ECANCELED)));
        });
    }

    /// Takes a pause that is under way back.
    fn take_back(&mut self) {
        for wish in std::mem::take(&mut self.after_pause) {
            wish.refuse(Errno::ECANCELED, format!("{}: the pause was taken back", self.seat.name()));
        }
        self.give_up_pause();
    }

    /// Opens the image of a paused disk, or another one, and goes on. After an error it is still paused.
    pub(super) fn unpause(&mut self, change: Reopen) -> Result<DiskInfo, Failure> {
        let name = self.seat.name();
        if self.closing {
            return Err((Errno::ESHUTDOWN, format!("{name}: is being closed")));
        }
        let params = match (self.seat.phase(), self.seat.params()) {
            (Phase::Paused, Some(params)) => params.reopened(change),
            (Phase::Pausing, _) if change == Reopen::default() => {
                self.take_back();
                return Ok(self.seat.info());
            }
            (Phase::Pausing, _) => return Err((Errno::EBUSY, format!("{name}: is being paused"))),
            _ => return Err((Errno::EINVAL, format!("{name}: is not paused"))),
        };
        let disk = image::open(&params, &self.io).map_err(|e| (e.errno(), e.to_string()))?;
        let before = self.seat.info().sectors;
        if disk.sectors() < before {
            // XenServer's tapdisk gives this error for any other size.
            let (image, sectors) = (&params.image, disk.sectors());
            let message =
                format!("{image}: has {sectors} sectors, and the guests were told {before}; still paused");
            return Err((Errno::EMEDIUMTYPE, message));
        }
        let after = info(&disk);
        let kept = self.keeper.change(|record| {
            record.paused = false;
            record.params = params.clone();
            record.info = after;
        });
        kept.map_err(|e| (errno_of(&e), format!("{}: cannot be noted for a takeover: {e}", params.image)))?;
        log::info!("{}: going on, {} sectors", params.image, after.sectors);
        self.seat.fill(disk, params);
        self.seat.heed(&self.keeper);
        self.go_on();
        self.publish();
        (self.tell)(Notice::Reopened(after));
        // If it still is not, the next turn says so again.
        self.degraded.set(false);
        Ok(after)
    }

    /// Serves the rings again.
    fn go_on(&mut self) {
        self.seat.enter(Phase::Running);
        let sectors = self.seat.info().sectors;
        if let Some(work) = self.seat.disk().and_then(|disk| disk.background()) {
            self.executor.spawn(work);
        }
        for params in self.parked.take() {
            self.serve_parked(params);
        }
        for served in self.rings.borrow().iter() {
            served.ring.set_capacity(sectors);
            served.ring.go_on();
        }
    }

    /// Serves a ring again that had a thread of its own. Its guest may have died meanwhile, which must not hold up others.
    fn serve_parked(&mut self, params: RingParams) {
        let shared = self.seat.disk().is_some_and(|disk| disk.share().is_some());
        let served =
            if shared { self.start_sibling(params.clone(), Begin::Again) } else { self.serve_here(&params) };
        if let Err((_, why)) = served {
            let (dom, vdev) = (DomId(params.domid), VdevId(params.vdev));
            log::error!(
                "device {vdev} of domain {dom}: one of its rings is not served until it reconnects: {why}"
            );
        }
    }

    fn serve_here(&mut self, params: &RingParams) -> Result<(), Failure> {
        for queue in &params.queues {
            let served = self.attach(params, queue, Begin::Again)?;
            self.start_slots(&served);
            self.rings.borrow_mut().push(served);
        }
        Ok(())
    }

    /// Ends the threads for further rings, and keeps what is needed to serve those again.
    fn park_siblings(&self) {
        let siblings = self.siblings.borrow();
        let running = siblings.iter().filter(|sibling| !sibling.is_ending());
        self.parked.borrow_mut().extend(running.map(|sibling| sibling.params().clone()));
        drop(siblings);
        self.end_siblings(|_| true);
    }

    /// Forgets the parked rings of a frontend.
    pub(super) fn unpark(&self, entry: RingEntry) {
        self.parked.borrow_mut().retain(|params| params.entry() != entry);
    }

    /// Makes a new image over the present one, which is closed, and goes on with it.
    fn snapshot(&mut self, image: &ImageSpec) -> Result<(), Failure> {
        let Some(params) = self.seat.params() else {
            return Err((Errno::EINVAL, "the disk belongs to another thread".into()));
        };
        let made = snapshot::create(&params, self.seat.info().sectors, image)
            .map_err(|e| (e.errno(), e.to_string()));
        let opened = made.and_then(|made| {
            let change = Reopen { image: Some(image.clone()), ..Reopen::default() };
            let opened = self.unpause(change);
            if opened.is_ok() {
                made.keep();
            }
            opened
        });
        let Err((errno, why)) = opened else { return Ok(()) };
        match self.unpause(Reopen::default()) {
            Ok(_) => Err((errno, why)),
            Err((_, also)) => {
                self.keeper.note(|record| record.paused = true);
                let message = format!(
                    "{why}; and the image before cannot be opened again, the disk stays paused: {also}"
                );
                Err((errno, message))
            }
        }
    }
}
