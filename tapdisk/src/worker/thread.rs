//! The loop of a worker thread.
//!
//! One turn: completions, event channels, commands, take requests, run tasks, one grant copy for all of them, run tasks
//! again until nothing moves, publish answers with at most one notification a ring, and only then sleep. A busy turn costs
//! one `io_uring_enter`, one grant copy each way and one notification, however many requests it serves.

use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;

use blkif::{Abi, DomId, Geometry, Port, RingOrder, VdevId};
use evtchn::EventChannel;
use gntdev::{Access, GrantMap, Grants};
use nix::errno::Errno;
use tap_ctl::Reply;
use tap_ctl::proto::{DiskInfo, OpenParams, RingEntry, RingParams};

use super::mapped::MappedRing;
use super::ring::{Ring, Taken};
use super::{Answer, Command, Inbox, serve};
use crate::buf::Pool;
use crate::copier::Copier;
use crate::executor::{Executor, Scheduler};
use crate::image::{self, Disk};
use crate::io::Io;
use crate::reactor::{EngineChoice, Reactor};
use crate::xen::Xen;

/// Budget for data in flight of one disk: 32 slots of eleven pages with room to spare. Requests beyond stay on the ring.
const DATA_BYTES: usize = 4 << 20;

type RingOf<X> = Ring<<<X as Xen>::Grants as Grants>::Map>;

/// The devices, opened when the first ring is connected and kept from then on.
struct Devices<X: Xen> {
    copier: Rc<Copier<X::Grants>>,
    events: Rc<RefCell<X::Events>>,
}

struct State<X: Xen> {
    xen: X,
    io: Io,
    executor: Executor,
    disk: Rc<Disk>,
    devices: Option<Devices<X>>,
    rings: Rc<RefCell<Vec<Rc<RingOf<X>>>>>,
    inbox: Rc<Inbox>,
    /// Left by the task that closed the image: what to answer once everything is released.
    ended: Rc<RefCell<Option<(Answer, Reply)>>>,
    closing: bool,
}

/// The thread: opens the image, serves until it is closed.
pub(super) fn run<X: Xen>(
    xen: X,
    params: &OpenParams,
    inbox: Inbox,
    opened: Box<dyn FnOnce(Result<DiskInfo, Reply>) + Send>,
) {
    let (mut state, info) = match set_up(xen, params, inbox) {
        Ok(ready) => ready,
        Err(reply) => return opened(Err(reply)),
    };
    opened(Ok(info));
    while state.ended.borrow().is_none() {
        if let Err(error) = state.turn() {
            // Without its ring the thread can do nothing, and guests must not be told anything wrong.
            log::error!("{}: the I/O loop failed: {error}", params.image);
            std::process::abort();
        }
    }
    let ended = state.ended.take();
    // The image is released before the answer: whoever waited for it can open it at once.
    drop(state);
    if let Some((answer, reply)) = ended {
        answer.give(reply);
    }
}

fn failure(errno: Errno, message: String) -> Reply {
    Reply::Error { errno: errno as i32, message }
}

fn set_up<X: Xen>(xen: X, params: &OpenParams, inbox: Inbox) -> Result<(State<X>, DiskInfo), Reply> {
    let system = |what: &str, error: &io::Error| {
        failure(
            Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
            format!("cannot set up {what}: {error}"),
        )
    };
    let scheduler = Rc::new(Scheduler::default());
    let reactor = Reactor::new(scheduler.clone(), EngineChoice::Auto).map_err(|e| system("io_uring", &e))?;
    let pool = Pool::new(scheduler.clone(), DATA_BYTES).map_err(|e| system("buffers", &e))?;
    reactor.watch_commands(inbox.fd()).map_err(|e| system("io_uring", &e))?;
    let io = Io { reactor, pool, scheduler: scheduler.clone() };
    let disk = image::open(params, &io).map_err(|error| failure(error.errno(), error.to_string()))?;
    let info = DiskInfo {
        sectors: disk.sectors(),
        sector_size: 512,
        physical_sector_size: disk.physical_block_size(),
        readonly: disk.is_readonly(),
        discard: None,
        queues: 1,
    };
    let state = State {
        xen,
        io,
        executor: Executor::new(scheduler),
        disk: Rc::new(disk),
        devices: None,
        rings: Rc::default(),
        inbox: Rc::new(inbox),
        ended: Rc::default(),
        closing: false,
    };
    Ok((state, info))
}

impl<X: Xen> State<X> {
    fn turn(&mut self) -> io::Result<()> {
        let mut busy = false;
        loop {
            self.take_requests();
            let ran = self.executor.run_ready();
            let copied = self.devices.as_ref().is_some_and(|devices| devices.copier.run());
            if !ran && !copied {
                break;
            }
            busy = true;
        }
        self.push_answers();
        if self.ended.borrow().is_some() {
            return Ok(());
        }
        if !busy {
            self.nudge();
        }
        let readable = self.io.reactor.turn(!busy)?;
        if readable.events {
            self.take_events()?;
        }
        if readable.commands {
            self.inbox.reset();
            while let Some(command) = self.inbox.take() {
                self.obey(command);
            }
        }
        Ok(())
    }

    fn take_requests(&self) {
        let Some(devices) = &self.devices else { return };
        for ring in self.rings.borrow().iter().filter(|ring| ring.is_awake()) {
            if ring.take(&self.io.pool) == Taken::Armed
                && let Err(error) = devices.events.borrow().unmask(ring.port)
            {
                log::debug!("{ring:?}: unmasking its event channel failed: {error}");
            }
        }
    }

    fn push_answers(&self) {
        let Some(devices) = &self.devices else { return };
        for ring in self.rings.borrow().iter() {
            if ring.push() {
                notify(&*devices.events.borrow(), ring);
            }
        }
    }

    fn nudge(&self) {
        let Some(devices) = &self.devices else { return };
        for ring in self.rings.borrow().iter().filter(|ring| ring.nudge()) {
            notify(&*devices.events.borrow(), ring);
        }
    }

    fn take_events(&self) -> io::Result<()> {
        let Some(devices) = &self.devices else { return Ok(()) };
        let mut ports = [Port(0); 64];
        loop {
            let count = devices.events.borrow().pending(&mut ports)?;
            if count == 0 {
                return Ok(());
            }
            let rings = self.rings.borrow();
            for port in ports.iter().take(count) {
                // A port that was unbound meanwhile belongs to no ring.
                if let Some(ring) = rings.iter().find(|ring| ring.port == *port) {
                    ring.disarm();
                }
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Connect(params, answer) => {
                answer.give(match self.connect(&params) {
                    Ok(()) => Reply::Done,
                    Err((errno, message)) => failure(errno, message),
                });
            }
            Command::Disconnect(entry, answer) => self.disconnect(entry, answer),
            Command::Close(answer) => self.close(answer),
        }
    }

    fn connect(&mut self, params: &RingParams) -> Result<(), (Errno, String)> {
        let (dom, vdev) = (params.dom(), params.device());
        let named = |errno: Errno, what: &str| (errno, format!("device {vdev} of domain {dom}: {what}"));
        let error = |what: &str, error: io::Error| {
            named(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)), &format!("{what}: {error}"))
        };
        if self.closing {
            return Err(named(Errno::ESHUTDOWN, "the image is being closed"));
        }
        if self.rings.borrow().iter().any(|ring| (ring.dom, ring.vdev) == (dom, vdev)) {
            return Err(named(Errno::EALREADY, "its ring is connected already"));
        }
        let [queue] = &params.queues[..] else {
            return Err(named(Errno::EINVAL, "exactly one queue is supported"));
        };
        let abi = Abi::from_protocol_key(Some(params.protocol.as_bytes()))
            .map_err(|e| named(Errno::EPROTONOSUPPORT, &e.to_string()))?;
        let refs = queue.refs();
        let order = RingOrder::all()
            .find(|order| order.pages() == refs.len())
            .ok_or_else(|| named(Errno::EINVAL, "a ring has 1, 2, 4, 8 or 16 pages"))?;
        // The toolstack's mode reaches the descriptor itself; another ring may still be writing through it, though.
        if params.readonly && self.rings.borrow().is_empty() {
            self.disk.make_readonly().map_err(|e| named(e.errno(), &e.to_string()))?;
        }
        let geometry = Geometry {
            capacity: self.disk.sectors(),
            readonly: params.readonly || self.disk.is_readonly(),
            flush: true,
            barrier: true,
            discard: false,
            discard_secure: false,
            max_indirect: 0,
        };
        let devices = match &self.devices {
            Some(devices) => devices,
            None => self.devices.insert(
                open_devices(&self.xen, &self.io).map_err(|e| error("cannot open Xen's devices", e))?,
            ),
        };
        let map = devices
            .copier
            .grants()
            .map(dom, &refs, Access::ReadWrite)
            .map_err(|e| error("cannot map the ring's pages", e))?;
        let mapped = MappedRing::attach(map, abi, order).map_err(|e| named(Errno::EIO, &e.to_string()))?;
        let port = devices
            .events
            .borrow_mut()
            .bind(dom, queue.remote_port())
            .map_err(|e| error(&format!("cannot bind event channel {}", queue.port), e))?;
        let ring = Rc::new(Ring::new((dom, vdev), port, geometry, mapped, self.io.scheduler.clone()));
        for slot in 0..ring.slots() {
            self.executor.spawn(serve::slot(ring.clone(), slot, self.disk.clone(), devices.copier.clone()));
        }
        log::info!(
            "device {vdev} of domain {dom}: ring of {} slots connected, event channel {port}",
            ring.slots()
        );
        self.rings.borrow_mut().push(ring);
        publish(&self.rings.borrow(), &self.inbox);
        Ok(())
    }

    fn disconnect(&self, entry: RingEntry, answer: Answer) {
        let (dom, vdev) = (DomId(entry.domid), VdevId(entry.vdev));
        let found = self.rings.borrow().iter().find(|ring| (ring.dom, ring.vdev) == (dom, vdev)).cloned();
        let (Some(ring), Some(devices)) = (found, &self.devices) else {
            return answer.give(failure(
                Errno::ENODEV,
                format!("device {vdev} of domain {dom}: no ring is connected"),
            ));
        };
        let (rings, inbox, events) = (self.rings.clone(), self.inbox.clone(), devices.events.clone());
        self.executor.spawn(async move {
            end_ring::<X>(ring, &rings, &inbox, &events).await;
            answer.give(Reply::Done);
        });
    }

    fn close(&mut self, answer: Answer) {
        if std::mem::replace(&mut self.closing, true) {
            return answer.give(failure(Errno::EALREADY, "the image is being closed already".into()));
        }
        let rings: Vec<_> = self.rings.borrow().clone();
        let (shared, inbox) = (self.rings.clone(), self.inbox.clone());
        let events = self.devices.as_ref().map(|devices| devices.events.clone());
        let (disk, ended) = (self.disk.clone(), self.ended.clone());
        self.executor.spawn(async move {
            if let Some(events) = events {
                for ring in rings {
                    end_ring::<X>(ring, &shared, &inbox, &events).await;
                }
            }
            let reply = match disk.close().await {
                Ok(()) => Reply::Done,
                Err(errno) => failure(errno, format!("closing the image failed: {}", errno.desc())),
            };
            ended.replace(Some((answer, reply)));
        });
    }
}

fn open_devices<X: Xen>(xen: &X, io: &Io) -> io::Result<Devices<X>> {
    let events = xen.open_events()?;
    io.reactor.watch_events(events.as_fd())?;
    io.pool.register_with(io.reactor.clone());
    let copier = Copier::new(xen.open_grants()?, io.scheduler.clone());
    Ok(Devices { copier: Rc::new(copier), events: Rc::new(RefCell::new(events)) })
}

/// Takes a ring out of service: nothing of the guest is mapped or bound when this ends.
async fn end_ring<X: Xen>(
    ring: Rc<RingOf<X>>,
    rings: &RefCell<Vec<Rc<RingOf<X>>>>,
    inbox: &Inbox,
    events: &RefCell<X::Events>,
) {
    ring.stop();
    ring.drain_to(0).await;
    if ring.push() {
        notify(&*events.borrow(), &ring);
    }
    ring.unmap();
    rings.borrow_mut().retain(|other| !Rc::ptr_eq(other, &ring));
    if let Err(error) = events.borrow_mut().unbind(ring.port) {
        log::warn!("{ring:?}: unbinding its event channel failed: {error}");
    }
    publish(&rings.borrow(), inbox);
    log::info!("device {} of domain {}: ring disconnected", ring.vdev, ring.dom);
}

fn publish<M: GrantMap>(rings: &[Rc<Ring<M>>], inbox: &Inbox) {
    inbox.publish(rings.iter().map(|ring| RingEntry { domid: ring.dom.0, vdev: ring.vdev.0 }).collect());
}

/// A failure concerns a domain that is going away; it is no reason to stop serving others.
fn notify<M: GrantMap>(events: &impl EventChannel, ring: &Ring<M>) {
    if let Err(error) = events.notify(ring.port) {
        log::debug!("{ring:?}: notifying failed: {error}");
    }
}
