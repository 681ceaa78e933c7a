//! The xenbus state machine of a backend, as a pure function: what is the one next thing to do for a device?
//!
//! The caller looks at the device, asks [`decide`], acts, and looks again until there is nothing to do. An event never
//! carries meaning beyond "look again", so merged, repeated and reordered events are harmless.
//!
//! # Rules
//!
//! 1. What a frontend needs is published and state InitWait written at once, without waiting for frontend or hotplug
//!    script: the toolstack runs the script only after it saw InitWait.
//! 2. A ring is connected only after the hotplug script's `connected`, for a frontend in state Initialised or
//!    Connected, on a tapdisk that has the disk open. Small frontends never write Initialised.
//! 3. Connected is written only after the tapdisk serves the ring.
//! 4. Closing is answered by Closing and nothing else: frontends may go on using the ring until Closed.
//! 5. Closed is answered by Closed, after the tapdisk has let go of the ring. The same when the frontend's directory has
//!    vanished, and when the toolstack wrote Closing for a device without a live frontend.
//! 6. After Closed, a frontend that begins anew gets InitWait while the device is online.
//! 7. A failure writes the reason and Closing once; there is no second attempt before the frontend has closed.
//! 8. A disk that has grown is published and Connected written once more, over itself: its watch tells the frontend.
//! 9. Nothing is written once the device's directory is gone, and the directory is never removed by us.
//!
//! They follow Linux's xen-blkback and xenbus (drivers/block/xen-blkback/xenbus.c, drivers/xen/xenbus) and libxl's
//! device handling (tools/libs/light/libxl_device.c).

use std::fmt;

use blkif::XenbusState;

/// Our own `state` key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Own {
    /// There is no device: no `state`, or no `frontend`.
    Absent,
    /// A state that neither a toolstack nor we write. Hands off.
    Odd,
    /// One of Initialising, InitWait, Connected, Closing, Closed.
    Is(Phase),
}

/// The states a backend of this kind is ever in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// As the toolstack made it.
    Initialising,
    /// Published, waiting for the frontend.
    InitWait,
    /// In operation.
    Connected,
    /// Asked to close, or asking.
    Closing,
    /// Closed.
    Closed,
}

impl Phase {
    /// The state as the protocol numbers it.
    pub fn state(self) -> XenbusState {
        match self {
            Phase::Initialising => XenbusState::Initialising,
            Phase::InitWait => XenbusState::InitWait,
            Phase::Connected => XenbusState::Connected,
            Phase::Closing => XenbusState::Closing,
            Phase::Closed => XenbusState::Closed,
        }
    }
}

/// The frontend's `state` key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frontend {
    /// The key or its directory is gone, or we may not read it any more.
    Gone,
    /// The guest wrote something that is no state.
    Bogus,
    /// A state.
    Is(XenbusState),
}

impl Frontend {
    /// It has published a ring.
    pub fn has_ring(self) -> bool {
        matches!(self, Frontend::Is(XenbusState::Initialised | XenbusState::Connected))
    }
}

/// What is known of the tapdisk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tap {
    /// The hotplug script has not named one.
    Unnamed,
    /// Named, not asked yet.
    New,
    /// Asked, no answer yet.
    Asking,
    /// It has the disk open.
    Ready,
    /// It has ended, or does not have the disk.
    Lost,
}

/// What is known of the ring between frontend and tapdisk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// An earlier xenio may have connected it.
    Unknown,
    /// Not connected.
    Down,
    /// The tapdisk is connecting or disconnecting it.
    Busy,
    /// Connected.
    Up,
}

/// All that a decision depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Our state.
    pub own: Own,
    /// The frontend's state.
    pub frontend: Frontend,
    /// `online` is not 0.
    pub online: bool,
    /// `hotplug-status` is `connected`.
    pub hotplug: bool,
    /// The toolstack's own keys contradict each other: the device is never served.
    pub defect: bool,
    /// The tapdisk.
    pub tap: Tap,
    /// The ring.
    pub ring: Ring,
    /// The ring is up, and the frontend has published another: its keys differ from those it was connected with, or it
    /// was in operation and is in state Initialised again.
    pub moved: bool,
    /// The ring is up and Connected has been written for it.
    pub announced: bool,
    /// Size and properties of the disk have been published as they are.
    pub published: bool,
    /// Something failed that is not reported yet.
    pub problem: bool,
    /// A failure was reported, and the frontend has not closed since.
    pub failed: bool,
}

/// The next thing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Publish what is offered, and write InitWait.
    InitWait,
    /// Publish the disk.
    Publish,
    /// Publish the disk, and write Connected.
    Announce,
    /// Publish the size, and if that is news write Connected again.
    Resize,
    /// Write Closing.
    Closing,
    /// Write Closed.
    Closed,
    /// Report the failure, and write Closing.
    Fail,
    /// Ask the tapdisk for disk and rings.
    Ask,
    /// Let the tapdisk connect the ring.
    Connect,
    /// Let the tapdisk let go of the ring.
    Disconnect,
    /// Drop our record of the device.
    Forget,
}

/// The line of the debug trace.
impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.own {
            Own::Absent => write!(f, "backend gone")?,
            Own::Odd => write!(f, "backend in no state of ours")?,
            Own::Is(phase) => write!(f, "backend {phase:?}")?,
        }
        match self.frontend {
            Frontend::Gone => write!(f, ", frontend gone")?,
            Frontend::Bogus => write!(f, ", frontend in no known state")?,
            Frontend::Is(state) => write!(f, ", frontend {state:?}")?,
        }
        let ring = match self.ring {
            Ring::Unknown => "not known yet",
            Ring::Down => "not connected",
            Ring::Busy => "with the tapdisk",
            Ring::Up => "connected",
        };
        write!(f, ", ring {ring}")?;
        if !self.online {
            write!(f, ", to be removed")?;
        }
        if !self.hotplug {
            write!(f, ", hotplug script not done")?;
        }
        Ok(())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Action::InitWait => "publish features, write InitWait",
            Action::Publish => "publish the disk's size",
            Action::Announce => "publish everything, write Connected",
            Action::Resize => "publish the disk's size to a frontend in operation",
            Action::Closing => "write Closing",
            Action::Closed => "write Closed",
            Action::Fail => "report the failure, write Closing",
            Action::Ask => "ask the tapdisk",
            Action::Connect => "have the ring connected",
            Action::Disconnect => "have the ring disconnected",
            Action::Forget => "forget the device",
        })
    }
}

/// The next thing to do for a device, or `None` until something changes.
pub fn decide(view: &View) -> Option<Action> {
    let phase = match view.own {
        Own::Absent => return vanish(view),
        Own::Odd => return None,
        Own::Is(phase) => phase,
    };
    if view.defect && !matches!(phase, Phase::Closing | Phase::Closed) {
        return Some(Action::Fail);
    }
    if must_close(view, phase) {
        return close(view, phase);
    }
    if view.frontend == Frontend::Is(XenbusState::Closing) {
        // A toolstack that waits for Closed on a device it took offline must not see it leave that state again.
        let settled = phase == Phase::Closing || (phase == Phase::Closed && !view.online);
        return (!settled).then_some(Action::Closing);
    }
    if view.problem {
        return Some(Action::Fail);
    }
    let may_begin = view.online && !view.failed;
    match phase {
        Phase::Initialising => view.online.then_some(begin(view)),
        Phase::InitWait | Phase::Connected => serve(view, phase),
        // Closing was ours or the toolstack's. Only a frontend that publishes a ring anew takes it back.
        Phase::Closing if view.frontend == Frontend::Is(XenbusState::Initialised) && may_begin => {
            serve(view, phase)
        }
        Phase::Closed if view.frontend == Frontend::Is(XenbusState::Initialising) && may_begin => {
            Some(begin(view))
        }
        Phase::Closed if view.frontend.has_ring() && may_begin => serve(view, phase),
        Phase::Closing | Phase::Closed => None,
    }
}

/// The directory is gone.
fn vanish(view: &View) -> Option<Action> {
    match view.ring {
        Ring::Up | Ring::Unknown => Some(Action::Disconnect),
        Ring::Busy => None,
        Ring::Down => Some(Action::Forget),
    }
}

fn must_close(view: &View, phase: Phase) -> bool {
    match view.frontend {
        Frontend::Gone | Frontend::Is(XenbusState::Closed) => true,
        _ if view.defect => true,
        Frontend::Is(XenbusState::Initialised | XenbusState::Connected | XenbusState::Closing) => false,
        Frontend::Is(XenbusState::Initialising | XenbusState::InitWait) => phase == Phase::Closing,
        // Nonsense is ignored, but it cannot hold up a removal.
        Frontend::Bogus | Frontend::Is(_) => phase == Phase::Closing && !view.online,
    }
}

fn close(view: &View, phase: Phase) -> Option<Action> {
    match view.ring {
        Ring::Up | Ring::Unknown => Some(Action::Disconnect),
        Ring::Busy => None,
        Ring::Down => (phase != Phase::Closed).then_some(Action::Closed),
    }
}

/// A ring that is still up belongs to an earlier life of the device.
fn begin(view: &View) -> Action {
    match view.ring {
        Ring::Up | Ring::Unknown => Action::Disconnect,
        Ring::Busy | Ring::Down => Action::InitWait,
    }
}

/// Brings the device into operation and keeps it there.
fn serve(view: &View, phase: Phase) -> Option<Action> {
    let waits = view.frontend == Frontend::Is(XenbusState::Initialised);
    match view.ring {
        Ring::Busy => None,
        // Found in operation by a new xenio: the tapdisk knows whether it is. Not so for a frontend that waits: its ring
        // may be newer than the one that the tapdisk has.
        Ring::Unknown if phase == Phase::Connected && !waits => (view.tap == Tap::New).then_some(Action::Ask),
        Ring::Unknown => Some(Action::Disconnect),
        Ring::Up if !view.announced && view.frontend.has_ring() => Some(Action::Announce),
        Ring::Up if view.announced && phase == Phase::Connected => match view.moved {
            true => Some(Action::Disconnect),
            false => (view.tap == Tap::Ready && !view.published).then_some(Action::Resize),
        },
        Ring::Up => Some(Action::Disconnect),
        Ring::Down if !view.hotplug => None,
        Ring::Down => match view.tap {
            Tap::Unnamed | Tap::Asking => None,
            Tap::New => Some(Action::Ask),
            Tap::Lost => Some(Action::Fail),
            Tap::Ready if !view.published => Some(Action::Publish),
            Tap::Ready => view.frontend.has_ring().then_some(Action::Connect),
        },
    }
}

#[cfg(test)]
mod tests;
