//! The loop of a worker thread.
//!
//! One turn: take requests and run tasks and grant copies until nothing moves; hand all I/O to the kernel and take what has
//! ended; run tasks again; publish answers with at most one notification a ring. A busy turn costs one `io_uring_enter`,
//! one grant copy each way and one notification, however many requests it serves. Only when a turn has found nothing to
//! do does the thread look a little longer ([`Poller`]), ask the frontends to notify, and sleep.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gntdev::Grants;
use nix::errno::Errno;
use tap_ctl::Reply;
use tap_ctl::proto::{DiskInfo, OpenParams, RingParams};

use super::channel::Channel;
use super::connect::Sibling;
use super::keeper::Keeper;
use super::late::Watch;
use super::pause::{Then, Wish};
use super::poll::{Advice, Poller};
use super::ring::{Armed, Ring};
use super::seat::{Seat, info};
use super::serve::Way;
use super::served::Clock;
use super::stats::Counted;
use super::takeover::open_again;
use super::{Answer, Command, HOUSEKEEPING, Inbox, Notice, PATIENCE, RETRY, Source, Throttle};
use crate::buf::{MAX_DATA, Pool};
use crate::copier::Copier;
use crate::executor::{Executor, Scheduler};
use crate::image;
use crate::io::{Io, errno_of};
use crate::nbd::Clients;
use crate::reactor::{EngineChoice, Reactor, Readable, Timer};
use crate::xen::Xen;

/// Budget for data in flight of one thread: sixteen of the largest requests, or 4096 of one page. Requests beyond wait.
const DATA_BYTES: usize = 16 * MAX_DATA;

pub(super) type RingOf<X> = Ring<<<X as Xen>::Grants as Grants>::Map>;

/// A thread that does not sleep shows its rings' numbers once in so many turns.
const SHOW_EVERY: u32 = 256;

/// A ring being served.
pub(super) struct Served<X: Xen> {
    pub ring: Rc<RingOf<X>>,
    pub way: Rc<Way<X::Grants>>,
    pub channel: Rc<Channel<X::Events>>,
}

impl<X: Xen> Clone for Served<X> {
    fn clone(&self) -> Served<X> {
        Served { ring: self.ring.clone(), way: self.way.clone(), channel: self.channel.clone() }
    }
}

impl<X: Xen> Served<X> {
    /// A failure concerns a domain that is going away; it is no reason to stop serving others.
    pub fn notify(&self) {
        if let Err(error) = self.channel.notify() {
            log::debug!("{:?}: notifying failed: {error}", self.ring);
        }
    }
}

pub(super) struct State<X: Xen> {
    pub xen: X,
    pub engine: EngineChoice,
    pub io: Io,
    pub executor: Executor,
    pub seat: Rc<Seat>,
    /// Who reads and writes the disk by NBD.
    pub clients: Rc<Clients>,
    /// With the grant device, opened when the first ring is connected and kept from then on.
    pub copier: Option<Rc<Copier<X::Grants>>>,
    pub rings: Rc<RefCell<Vec<Served<X>>>>,
    /// Threads for further rings of our frontends.
    pub siblings: Rc<RefCell<Vec<Sibling>>>,
    /// Further rings of our frontends, of one queue each, that are served again after a pause.
    pub parked: Rc<RefCell<Vec<RingParams>>>,
    pub throttle: Arc<Throttle>,
    /// What is kept for the case that we die.
    pub keeper: Arc<Keeper>,
    /// The turn's time.
    pub clock: Rc<Clock>,
    /// Turns since the rings' numbers were shown.
    unshown: Cell<u32>,
    /// What threads had counted that have ended.
    pub past: Rc<RefCell<Counted>>,
    /// When the timer for limits is due, if it is set.
    limit_timer: Cell<Option<Instant>>,
    /// Requests that the store does not answer.
    pub watch: Watch,
    /// The timer for further tries is set.
    retrying: Cell<bool>,
    /// The number of the pause that waits for what is in flight; 0: none does.
    pub pausing: Rc<Cell<u64>>,
    /// What to do when the disk is paused.
    pub after_pause: Vec<Wish>,
    pub poller: Poller,
    pub inbox: Rc<Inbox>,
    pub tell: Arc<dyn Fn(Notice) + Send + Sync>,
    /// It was told that the disk is not as it was asked for.
    pub degraded: Cell<bool>,
    /// Left by the task that closed the image: what to answer once everything is released.
    pub ended: Rc<RefCell<Option<(Answer, Reply)>>>,
    pub closing: bool,
    /// The timer for housekeeping is set.
    housekeeping: Cell<bool>,
}

/// The thread: opens the image, serves until it is closed.
pub(super) fn run<X: Xen>(
    xen: X,
    source: Source,
    engine: EngineChoice,
    inbox: impl FnOnce(Rc<Scheduler>) -> Inbox,
    opened: Box<dyn FnOnce(Result<DiskInfo, Reply>) + Send>,
    tell: Arc<dyn Fn(Notice) + Send + Sync>,
) {
    let rings = match &source {
        Source::TakeOver { record, .. } => record.rings.clone(),
        Source::Open { .. } | Source::Share(_) => Vec::new(),
    };
    let mut state = match set_up(xen, source, engine, inbox, tell) {
        Ok(ready) => ready,
        Err(reply) => return opened(Err(reply)),
    };
    state.take_over(&rings);
    opened(Ok(state.seat.info()));
    while state.ended.borrow().is_none() {
        if let Err(error) = state.turn() {
            // Without its ring the thread can do nothing, and guests must not be told anything wrong.
            log::error!("{}: the I/O loop failed: {error}", state.seat.name());
            std::process::abort();
        }
    }
    let ended = state.ended.take();
    state.inbox.bequeath(state.counted());
    // The image is released before the answer: whoever waited for it can open it at once.
    drop(state);
    if let Some((answer, reply)) = ended {
        answer.give(reply);
    }
}

pub(super) fn failure(errno: Errno, message: String) -> Reply {
    Reply::Error { errno: errno as i32, message }
}

fn set_up<X: Xen>(
    xen: X,
    source: Source,
    engine: EngineChoice,
    inbox: impl FnOnce(Rc<Scheduler>) -> Inbox,
    tell: Arc<dyn Fn(Notice) + Send + Sync>,
) -> Result<State<X>, Reply> {
    let system =
        |what: &str, error: &io::Error| failure(errno_of(error), format!("cannot set up {what}: {error}"));
    let scheduler = Rc::new(Scheduler::default());
    let inbox = inbox(scheduler.clone());
    let reactor = Reactor::new(scheduler.clone(), engine).map_err(|e| system("the I/O engine", &e))?;
    let pool = Pool::new(scheduler.clone(), DATA_BYTES).map_err(|e| system("buffers", &e))?;
    reactor.watch_commands(inbox.fd()).map_err(|e| system("the I/O engine", &e))?;
    let io = Io::new(reactor, pool, scheduler.clone());
    let (seat, throttle, keeper) = match source {
        Source::Open { params, identity, keeper } => {
            let disk =
                image::open(&params, &io).map_err(|error| failure(error.errno(), error.to_string()))?;
            let kept = keeper.begin(identity, &params, info(&disk), disk.outlives_process());
            kept.map_err(|e| system("the record of the disk", &e))?;
            let (throttle, patience) = (Throttle::new(params.limit), patience(&params));
            (Seat::new(disk, Some(params), patience, scheduler.clone()), throttle, keeper)
        }
        Source::TakeOver { record, keeper } => {
            let patience = patience(&record.params);
            let throttle = Throttle::new(record.params.limit);
            let seat = match record.paused {
                true => Seat::paused(record.params, record.info, patience, scheduler.clone()),
                false => {
                    let disk = open_again(&record, &io)
                        .map_err(|error| failure(error.errno(), error.to_string()))?;
                    Seat::new(disk, Some(record.params), patience, scheduler.clone())
                }
            };
            (seat, throttle, keeper)
        }
        Source::Share(shared) => {
            let disk = shared.disk.open(io.clone());
            (Seat::new(disk, None, shared.patience, scheduler.clone()), shared.throttle, shared.keeper)
        }
    };
    let executor = Executor::new(scheduler);
    let seat = Rc::new(seat);
    seat.heed(&keeper);
    if let Some(work) = seat.disk().and_then(|disk| disk.background()) {
        executor.spawn(work);
    }
    Ok(State {
        xen,
        engine,
        io,
        executor,
        seat,
        clients: Rc::default(),
        copier: None,
        rings: Rc::default(),
        siblings: Rc::default(),
        parked: Rc::default(),
        throttle,
        keeper,
        clock: Rc::default(),
        unshown: Cell::new(0),
        past: Rc::default(),
        limit_timer: Cell::new(None),
        watch: Watch::default(),
        retrying: Cell::new(false),
        pausing: Rc::default(),
        after_pause: Vec::new(),
        poller: Poller::default(),
        inbox: Rc::new(inbox),
        tell,
        degraded: Cell::new(false),
        ended: Rc::default(),
        closing: false,
        housekeeping: Cell::new(false),
    })
}

/// How long a request of a disk is tried again.
fn patience(params: &OpenParams) -> Duration {
    let patience = params.timeout.filter(|&seconds| seconds > 0);
    patience.map_or(PATIENCE, |seconds| Duration::from_secs(seconds.into()))
}

impl<X: Xen> State<X> {
    /// Tells once that the disk is not as it was asked for any more.
    fn tell_if_degraded(&self) {
        if self.seat.is_degraded()
            && !self.degraded.replace(true)
            && let Some(reason) = self.seat.disk().and_then(|disk| disk.degradation())
        {
            (self.tell)(Notice::Degraded(reason));
        }
    }

    fn turn(&mut self) -> io::Result<()> {
        self.tell_if_degraded();
        let mut moved = self.advance(true);
        if self.io.reactor.has_queued() || self.io.reactor.has_news() {
            let readable = self.io.reactor.turn(false)?;
            self.clock.pass();
            self.heed(readable)?;
            // What came with it is answered in this turn; new requests wait for the next.
            moved |= self.advance(false);
        }
        self.push_answers();
        self.unshown.set(self.unshown.get() + 1);
        if self.unshown.get() >= SHOW_EVERY {
            self.show();
        }
        if moved || self.ended.borrow().is_some() {
            return Ok(());
        }
        let advice = if self.rings.borrow().is_empty() { Advice::Sleep } else { self.poller.advise() };
        if let Advice::Poll(limit) = advice {
            let found = self.has_work_within(limit);
            self.clock.pass();
            self.poller.polled(found);
            if found {
                return Ok(());
            }
        }
        if !self.arm()? {
            return Ok(());
        }
        let readable = self.io.reactor.turn(true)?;
        self.clock.pass();
        self.heed(readable)
    }

    /// Takes requests, runs tasks and copies until nothing moves without the kernel. Returns whether anything did.
    fn advance(&self, take: bool) -> bool {
        let mut moved = false;
        loop {
            let mut again = false;
            if take {
                for Served { ring, .. } in self.rings.borrow().iter() {
                    again |= ring.take();
                }
            }
            again |= self.executor.run_ready();
            again |= self.copier.as_ref().is_some_and(|copier| copier.run());
            if !again {
                return moved;
            }
            moved = true;
        }
    }

    fn heed(&mut self, readable: Readable) -> io::Result<()> {
        if readable.events {
            self.take_events()?;
        }
        if readable.timers[Timer::HoldOff as usize] {
            self.rings.borrow().iter().for_each(|served| served.ring.release_hold());
        }
        if readable.timers[Timer::Limit as usize] {
            // The rings look for themselves.
            self.limit_timer.set(None);
        }
        if readable.timers[Timer::Retry as usize] {
            self.retrying.set(false);
            self.seat.try_again();
        }
        if readable.timers[Timer::Late as usize] {
            self.late_timer_ended();
        }
        if readable.timers[Timer::Pause as usize] {
            self.give_up_late();
        }
        if readable.timers[Timer::Housekeeping as usize] {
            self.housekeeping.set(false);
            self.clean_up()?;
        }
        if readable.commands {
            self.inbox.reset();
            while let Some(command) = self.inbox.take() {
                self.obey(command);
            }
        }
        Ok(())
    }

    fn push_answers(&self) {
        for served in self.rings.borrow().iter() {
            if served.ring.push() {
                served.notify();
            }
        }
    }

    /// Shows xentop what was served.
    fn show(&self) {
        self.unshown.set(0);
        for Served { ring, way, .. } in self.rings.borrow().iter() {
            if let Some(page) = &way.page {
                page.tell(way.served.counters(ring.gate().waits()));
            }
        }
    }

    /// Looks for work for so long.
    fn has_work_within(&self, limit: Duration) -> bool {
        let rings = self.rings.borrow();
        let start = Instant::now();
        loop {
            if rings.iter().any(|served| served.ring.has_work()) || self.io.reactor.has_news() {
                return true;
            }
            if start.elapsed() >= limit {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Asks all frontends to notify. False: there is work after all.
    fn arm(&self) -> io::Result<bool> {
        self.look_for_late()?;
        self.show();
        if self.copier.is_none() {
            return Ok(true);
        }
        for served in self.rings.borrow().iter() {
            let ring = &served.ring;
            match ring.arm() {
                Armed::Work => return Ok(false),
                Armed::Unmask => {
                    if let Err(error) = served.channel.unmask() {
                        log::debug!("{ring:?}: unmasking its event channel failed: {error}");
                    }
                }
                Armed::Limited(time) => self.look_again(time)?,
                Armed::Later(time) => self.io.reactor.timer(Timer::HoldOff, time)?,
                Armed::Listening | Armed::Deaf => {}
            }
            if ring.nudge() {
                served.notify();
            }
        }
        self.plan_retry()?;
        self.plan_housekeeping()?;
        Ok(true)
    }

    /// Has the rings looked at again after this time.
    fn look_again(&self, after: Duration) -> io::Result<()> {
        let when = Instant::now() + after;
        if self.limit_timer.get().is_none_or(|set| when < set) {
            self.limit_timer.set(Some(when));
            self.io.reactor.timer(Timer::Limit, after)?;
        }
        Ok(())
    }

    /// Sets the timer while there is something that could be given back: an idle disk is left alone.
    fn plan_housekeeping(&self) -> io::Result<()> {
        let holds = || {
            let persistent =
                |served: &Served<X>| served.way.persistent.as_ref().is_some_and(|p| p.pages() > 0);
            self.io.pool.holds_memory() || self.rings.borrow().iter().any(persistent)
        };
        if !self.housekeeping.get() && holds() {
            self.housekeeping.set(true);
            self.io.reactor.timer(Timer::Housekeeping, HOUSEKEEPING)?;
        }
        Ok(())
    }

    /// Sets the timer while requests wait for another try.
    fn plan_retry(&self) -> io::Result<()> {
        if !self.retrying.get() && self.seat.is_trying() {
            self.retrying.set(true);
            self.io.reactor.timer(Timer::Retry, RETRY)?;
        }
        Ok(())
    }

    fn clean_up(&self) -> io::Result<()> {
        self.io.pool.trim();
        for served in self.rings.borrow().iter() {
            if let Some(persistent) = &served.way.persistent {
                persistent.age();
            }
        }
        self.plan_housekeeping()
    }

    fn take_events(&self) -> io::Result<()> {
        for Served { ring, channel, .. } in self.rings.borrow().iter() {
            if channel.take_fired()? {
                ring.fired();
            }
        }
        Ok(())
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Connect(params, begin, answer) => {
                answer.give(match self.connect(&params, begin) {
                    Ok(()) => Reply::Done,
                    Err((errno, message)) => failure(errno, message),
                });
            }
            Command::Disconnect(entry, answer) => self.disconnect(entry, answer),
            Command::Resize(size, answer) => self.resize(size, answer),
            Command::Pause(until, answer) => self.pause(Wish { then: Then::Stay, until, answer }),
            Command::Leave(answer) => self.leave(answer),
            Command::Unpause(change, answer) => answer.give(match self.unpause(change) {
                Ok(info) => Reply::DiskInfo(info),
                Err((errno, message)) => failure(errno, message),
            }),
            Command::Snapshot(image, until, answer) => {
                self.pause(Wish { then: Then::Snapshot(image), until, answer });
            }
            Command::Quiet(closed) => self.quiet(closed),
            Command::Limit(change, answer) => answer.give(Reply::Limits(self.limit(change))),
            Command::Limited => self.renew_limits(),
            Command::Statistics(answer) => self.statistics(answer),
            Command::Stats(asked) => asked.pass(self.counted()),
            Command::Grown => self.grown(),
            Command::SiblingEnded(number) => self.sibling_ended(number),
            Command::Client(client) => self.enter(client),
            Command::Close(answer) => self.close(answer),
        }
    }
}
