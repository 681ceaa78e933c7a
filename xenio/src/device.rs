//! The record of one device: what XenStore does not tell, and how the tapdisk's answers change it. No I/O here.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use tap_ctl::proto::{DiskInfo, RingParams, VbdEntry};
use tap_ctl::{Minor, Reply, Request};

use crate::input::{Backend, Named};
use crate::limit::Bucket;
use crate::machine::{Frontend, Own, Phase, Ring, Tap, View};
use crate::paths::DeviceId;
use crate::problem::Problem;
use crate::tapdisk::{News, Ticket};
use blkif::XenbusState;

/// A VBD of a tapdisk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vbd {
    /// The tapdisk's process id.
    pub pid: i32,
    /// The minor.
    pub minor: Minor,
}

/// What is known of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Disk {
    Unnamed,
    New,
    Asking,
    Ready(DiskInfo),
    Lost(Problem),
}

/// A request that the tapdisk has not answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pending {
    /// Which VBDs and rings are there?
    List,
    /// How large is the disk?
    DiskInfo,
    /// Connect this ring.
    Connect(RingParams),
    /// Let go of the ring.
    Disconnect,
}

/// What xenio remembers of a device between two looks at it. Nothing of it needs to survive xenio.
#[derive(Debug)]
pub struct Device {
    id: DeviceId,
    /// Tells apart two devices that had the same name one after the other.
    pub generation: u64,
    /// The frontend directory whose `state` is being watched.
    pub watched: Option<Vec<u8>>,
    /// Not seen since the connection to XenStore was made anew: absence of the directory proves nothing.
    pub unconfirmed: bool,
    /// Messages that the guest can cause.
    pub chatter: Bucket,
    /// The state that was last written for it.
    pub written: Option<Phase>,
    seen: bool,
    vbd: Option<Vbd>,
    /// The process id by which XenStore names the tapdisk, if another one goes on in its place.
    former: Option<i32>,
    disk: Disk,
    ring: Ring,
    /// The connected ring, unless an earlier xenio connected it.
    params: Option<RingParams>,
    announced: bool,
    /// The frontend was seen in operation since Connected was written.
    greeted: bool,
    published: bool,
    problem: Option<Problem>,
    /// Why the disk is not as it was asked for, if so; `None`: it was not told yet.
    degraded: Option<Option<String>>,
    /// XenStore says the same.
    noted: bool,
    failed: bool,
    pending: Option<(Ticket, Pending)>,
    shown: Option<(Own, Frontend, Ring)>,
}

impl Device {
    /// A device that was never looked at.
    pub fn new(id: DeviceId, generation: u64, now: Instant) -> Device {
        Device {
            id,
            generation,
            watched: None,
            unconfirmed: false,
            chatter: Bucket::new(Duration::from_secs(1), 10, now),
            written: None,
            seen: false,
            vbd: None,
            former: None,
            disk: Disk::Unnamed,
            ring: Ring::Down,
            params: None,
            announced: false,
            greeted: false,
            published: false,
            degraded: None,
            noted: true,
            problem: None,
            failed: false,
            pending: None,
            shown: None,
        }
    }

    /// Its name.
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// The VBD in use.
    pub fn vbd(&self) -> Option<Vbd> {
        self.vbd
    }

    /// The disk, once the tapdisk has told.
    pub fn disk(&self) -> Option<&DiskInfo> {
        match &self.disk {
            Disk::Ready(info) => Some(info),
            _ => None,
        }
    }

    /// Takes in what was just read.
    pub fn observe(&mut self, backend: &Backend, frontend: Frontend) {
        if !self.seen && backend.own != Own::Absent {
            self.seen = true;
            self.adopt(&backend.named);
            let served =
                [Phase::InitWait, Phase::Connected, Phase::Closing].map(Own::Is).contains(&backend.own);
            if served && self.vbd.is_some() {
                self.ring = Ring::Unknown;
            }
        }
        if backend.own == Own::Is(Phase::Initialising) {
            // The directory is new, whatever there was before it.
            self.published = false;
            self.noted = self.degraded.is_none();
            self.failed = false;
        }
        if self.ring == Ring::Down && self.differs(&backend.named) {
            self.adopt(&backend.named);
        }
        let told = self.announced || self.ring == Ring::Unknown;
        if told
            && backend.own == Own::Is(Phase::Connected)
            && frontend == Frontend::Is(XenbusState::Connected)
        {
            self.greeted = true;
        }
        let closes = [Frontend::Gone, Frontend::Is(XenbusState::Closing), Frontend::Is(XenbusState::Closed)];
        if closes.contains(&frontend) {
            self.failed = false;
        }
    }

    fn differs(&self, named: &Named) -> bool {
        match named {
            Named::Tapdisk(pid, minor) if self.former == Some(*pid) => {
                self.vbd.is_none_or(|vbd| vbd.minor != *minor)
            }
            Named::Nobody => self.vbd.is_some() || self.disk != Disk::Unnamed,
            Named::Tapdisk(pid, minor) => self.vbd != Some(Vbd { pid: *pid, minor: *minor }),
            Named::Malformed(_) => self.disk != malformed(named),
        }
    }

    fn adopt(&mut self, named: &Named) {
        (self.vbd, self.disk) = match named {
            Named::Nobody => (None, Disk::Unnamed),
            Named::Tapdisk(pid, minor) => (Some(Vbd { pid: *pid, minor: *minor }), Disk::New),
            Named::Malformed(_) => (None, malformed(named)),
        };
        self.former = None;
        self.pending = None;
        self.problem = None;
        self.published = false;
        self.failed = false;
    }

    /// All that a decision depends on. `moved` as in [`View`].
    pub fn view(&self, backend: &Backend, frontend: Frontend, moved: bool) -> View {
        View {
            own: backend.own,
            frontend,
            online: backend.online,
            hotplug: backend.hotplug,
            defect: backend.frontend.is_err(),
            tap: match self.disk {
                Disk::Unnamed => Tap::Unnamed,
                Disk::New => Tap::New,
                Disk::Asking => Tap::Asking,
                Disk::Ready(_) => Tap::Ready,
                Disk::Lost(_) => Tap::Lost,
            },
            ring: self.ring,
            moved,
            announced: self.announced,
            published: self.published,
            problem: self.problem.is_some(),
            failed: self.failed,
        }
    }

    /// Whether own state, frontend's state or ring differ from the last call's.
    pub fn changed(&mut self, view: &View) -> bool {
        let now = Some((view.own, view.frontend, view.ring));
        std::mem::replace(&mut self.shown, now) != now
    }

    /// Whether the tapdisk may hold the frontend's ring.
    pub fn has_ring(&self) -> bool {
        self.ring != Ring::Down
    }

    /// The ring to compare with what the frontend shows: it may have connected anew.
    pub fn params(&self) -> Option<&RingParams> {
        self.params.as_ref().filter(|_| self.ring == Ring::Up && self.announced)
    }

    /// Whether the frontend, which was in operation, has published a ring again. It is a new one even if its keys are
    /// the old ones': a guest that resumes in place hands the same references and ports out again.
    pub fn returned(&self, frontend: Frontend) -> bool {
        self.greeted && self.ring == Ring::Up && frontend == Frontend::Is(XenbusState::Initialised)
    }

    /// A request was sent.
    pub fn sent(&mut self, ticket: Ticket, pending: Pending) {
        match &pending {
            Pending::List | Pending::DiskInfo => self.disk = Disk::Asking,
            Pending::Connect(_) | Pending::Disconnect => {
                self.ring = Ring::Busy;
                if self.disk == Disk::Asking {
                    // That answer will not be waited for.
                    self.disk = Disk::New;
                }
            }
        }
        self.pending = Some((ticket, pending));
    }

    /// The disk was published.
    pub fn published(&mut self) {
        self.published = true;
    }

    /// Connected was written.
    pub fn announced(&mut self) {
        self.announced = true;
        self.published = true;
    }

    /// InitWait or Closed was written: what went wrong before is over.
    pub fn settled(&mut self) {
        self.problem = None;
    }

    /// Something is wrong; the machine will want it reported.
    pub fn trouble(&mut self, problem: Problem) {
        self.problem = Some(problem);
    }

    /// What to report.
    pub fn cause(&self, backend: &Backend) -> Problem {
        match (&backend.frontend, &self.problem, &self.disk) {
            (Err(defect), _, _) => defect.clone(),
            (_, Some(problem), _) | (_, None, Disk::Lost(problem)) => problem.clone(),
            _ => Problem::new(Errno::EIO, "the device cannot be served"),
        }
    }

    /// The failure was reported.
    pub fn failed(&mut self) {
        self.failed = true;
        self.problem = None;
    }

    /// The tapdisk tells how the disk is now. Returns whether it has grown.
    ///
    /// What is said before the disk is known is said again when it is. A disk never shrinks, so a smaller size is only
    /// older news that another connection has overtaken.
    pub fn told(&mut self, news: &News) -> bool {
        if matches!(self.disk, Disk::Lost(_)) && news.failed.is_none() {
            // Opened, or closed after its failure and opened anew: worth asking when the guest comes back, and if it is back
            // already, worth its second attempt.
            self.disk = Disk::New;
            self.failed = false;
        }
        let Disk::Ready(known) = &mut self.disk else { return false };
        let grown = news.info.sectors > known.sectors;
        if grown {
            *known = news.info;
            self.published = false;
        }
        if let Some(reason) = &news.failed {
            // The ring stays until the guest closes: the tapdisk still holds it, with requests that are never answered.
            let problem = Problem::new(Errno::EIO, reason.clone());
            self.disk = Disk::Lost(problem.clone());
            self.problem = Some(problem);
        }
        grown
    }

    /// Takes in how far the disk is what it was asked to be. Returns why it is not, if that is news.
    pub fn degrades<'a>(&mut self, news: &'a News) -> Option<&'a str> {
        if self.degraded.as_ref() == Some(&news.degraded) {
            return None;
        }
        self.degraded = Some(news.degraded.clone());
        self.noted = false;
        news.degraded.as_deref()
    }

    /// What XenStore is to say of that, if it does not yet: a reason, or nothing at all.
    pub fn to_note(&self) -> Option<Option<&str>> {
        self.degraded.as_ref().filter(|_| !self.noted).map(Option::as_deref)
    }

    /// XenStore says it.
    pub fn noted(&mut self) {
        self.noted = true;
    }

    /// The tapdisk `pid` is not there any more; with it all it held.
    pub fn died(&mut self, pid: i32, problem: Problem) {
        if self.vbd.is_some_and(|vbd| vbd.pid == pid) {
            self.lose(problem);
        }
    }

    /// Another tapdisk is going to go on with the disk: until then nothing can be asked, and the ring is as it is.
    pub fn waits_for_successor(&mut self) {
        self.disk = Disk::Asking;
        if self.ring != Ring::Down {
            self.ring = Ring::Busy;
        }
        self.pending = None;
    }

    /// Another tapdisk goes on with the disk, or the same one still does. It knows which rings it serves.
    pub fn succeeded(&mut self, pid: i32) {
        let Some(vbd) = &mut self.vbd else { return };
        if vbd.pid != pid {
            self.former.get_or_insert(vbd.pid);
            vbd.pid = pid;
        }
        self.disk = Disk::New;
        if self.ring == Ring::Busy {
            self.ring = Ring::Unknown;
        }
    }

    /// XenStore names a tapdisk that is not there any more: which one, and which is there.
    pub fn renamed(&self) -> Option<(i32, Vbd)> {
        Some((self.former?, self.vbd?))
    }

    /// XenStore names the tapdisk that is there, or another one that the toolstack has written.
    pub fn is_named(&mut self) {
        self.former = None;
    }

    fn lose(&mut self, problem: Problem) {
        self.disk = Disk::Lost(problem);
        self.ring = Ring::Down;
        self.params = None;
        self.announced = false;
        self.greeted = false;
        self.pending = None;
    }

    /// Takes the tapdisk's answer in; gives the request that follows from it. Answers to requests that do not matter
    /// any more are ignored.
    pub fn answered(&mut self, ticket: Ticket, reply: Reply) -> Option<(Request, Pending)> {
        if self.pending.as_ref().is_none_or(|(awaited, _)| *awaited != ticket) {
            return None;
        }
        let (_, pending) = self.pending.take()?;
        let vbd = self.vbd?;
        match (pending, reply) {
            (Pending::List, Reply::List { vbds }) => return self.listed(vbd, &vbds),
            (Pending::DiskInfo, Reply::DiskInfo(info)) => {
                self.disk = Disk::Ready(info);
                self.published = false;
            }
            (Pending::List | Pending::DiskInfo, reply) => self.lose(refusal(vbd, reply)),
            (Pending::Connect(params), Reply::Done) => self.connected(params),
            (Pending::Connect(params), Reply::Error { errno, .. }) if errno == Errno::EALREADY as i32 => {
                self.connected(params);
            }
            (Pending::Connect(_), reply) => {
                self.ring = Ring::Down;
                self.problem = Some(refusal(vbd, reply));
            }
            (Pending::Disconnect, reply) => self.disconnected(vbd, reply),
        }
        None
    }

    fn listed(&mut self, vbd: Vbd, vbds: &[VbdEntry]) -> Option<(Request, Pending)> {
        let lacks = |what: &str| {
            let Vbd { pid, minor } = vbd;
            Problem::new(Errno::ENODEV, format!("tapdisk {pid} {what} minor {minor}; see its log"))
        };
        match vbds.iter().find(|entry| entry.minor == vbd.minor) {
            None => self.lose(lacks("does not serve")),
            Some(VbdEntry { image: None, .. }) => self.lose(lacks("has no image open as")),
            Some(entry) => {
                if self.ring == Ring::Unknown {
                    let ours = |ring: &tap_ctl::proto::RingEntry| {
                        (ring.domid, ring.vdev) == (self.id.domid.0, self.id.vdev.0)
                    };
                    self.announced = entry.rings.iter().any(ours);
                    self.ring = if self.announced { Ring::Up } else { Ring::Down };
                }
                return Some((Request::DiskInfo { minor: vbd.minor }, Pending::DiskInfo));
            }
        }
        None
    }

    fn connected(&mut self, params: RingParams) {
        self.ring = Ring::Up;
        self.params = Some(params);
        self.announced = false;
        self.greeted = false;
    }

    fn disconnected(&mut self, vbd: Vbd, reply: Reply) {
        self.ring = Ring::Down;
        self.params = None;
        self.announced = false;
        self.greeted = false;
        let gone = [Errno::ENODEV, Errno::ENOENT, Errno::ESRCH].map(|errno| errno as i32);
        match reply {
            Reply::Done => {}
            Reply::Error { errno, .. } if gone.contains(&errno) => {}
            // Asking again would give the same answer, and the guest must be able to go on.
            other => log::warn!("device {}: {}", self.id, refusal(vbd, other).message),
        }
    }
}

fn malformed(named: &Named) -> Disk {
    let value = if let Named::Malformed(value) = named { value.as_str() } else { "" };
    let message =
        format!("physical-device-path {value} is no VBD of a tapdisk; see the hotplug script's log");
    Disk::Lost(Problem::new(Errno::EINVAL, message))
}

fn refusal(vbd: Vbd, reply: Reply) -> Problem {
    match reply {
        Reply::Error { errno, message } => Problem { errno, message },
        _ => {
            Problem::new(Errno::EPROTO, format!("tapdisk {} gave an answer that was not asked for", vbd.pid))
        }
    }
}

#[cfg(test)]
mod tests;
