//! The VBDs of a tapdisk: which minors it has charge of, and what is open on each.

use std::path::PathBuf;

use nix::errno::Errno;
use tap_ctl::minors::Claim;
use tap_ctl::proto::{DiskInfo, Minor, VbdEntry};
use tap_ctl::{ControlDir, Reply};

use crate::nbd::door::Door;
use crate::porter;
use crate::worker::{Phase, Status, Worker};

/// State bits of XenServer's tapdisk (xapi-project/blktap, `drivers/tapdisk-vbd.h`).
const STATE_CLOSED: u32 = 2;
/// Asked to become quiet and to pause.
const STATE_PAUSING: u32 = 4 | 0x10;
/// Quiet, paused, and its image closed.
const STATE_PAUSED: u32 = STATE_CLOSED | 8 | 0x20;

/// An image being opened or open.
#[derive(Debug)]
pub struct Open {
    /// Its thread.
    pub worker: Worker,
    /// Known once it is open.
    pub info: Option<DiskInfo>,
    /// Why the disk was stopped, if it was.
    pub failed: Option<String>,
    /// Why it is not as it was asked for, if so.
    pub degraded: Option<String>,
    /// Where NBD clients come in, once it is open.
    pub door: Option<Door>,
    /// An older name of that place, by which clients know it.
    pub known_as: Option<PathBuf>,
}

/// A minor in our charge.
#[derive(Debug)]
pub struct Vbd {
    /// The minor.
    pub minor: Minor,
    /// Tells `tap-ctl free` that the minor is in use; the kernel gives it up with the process.
    _claim: Claim,
    /// What is open.
    pub open: Option<Open>,
    closed_before: bool,
}

impl Vbd {
    /// Takes charge of a minor whose marker `tap-ctl allocate` has made.
    pub fn attach(dir: &ControlDir, minor: Minor) -> Result<Vbd, Reply> {
        // EINVAL whatever the reason: the exit code that XenServer's tap-ctl gives for a failed attach.
        let claim = porter::claim(dir, minor)
            .map_err(|error| Reply::Error { errno: Errno::EINVAL as i32, message: error.to_string() })?;
        Ok(Vbd { minor, _claim: claim, open: None, closed_before: false })
    }

    /// The image was closed.
    pub fn close(&mut self) {
        self.open = None;
        self.closed_before = true;
    }

    /// What followers are told; nothing before an image is open.
    pub fn news(&self) -> Option<Reply> {
        let open = self.open.as_ref()?;
        let (failed, degraded) = (open.failed.clone(), open.degraded.clone());
        Some(Reply::Changed { minor: self.minor, info: open.info?, failed, degraded })
    }

    /// Whether its image is open and guests are served.
    pub fn is_running(&self) -> bool {
        self.open
            .as_ref()
            .is_some_and(|open| open.info.is_some() && open.worker.status().phase == Phase::Running)
    }

    /// The line of `tap-ctl list`.
    pub fn entry(&self) -> VbdEntry {
        let Some(open) = &self.open else {
            let state = if self.closed_before { STATE_CLOSED } else { 0 };
            return VbdEntry { minor: self.minor, state, image: None, rings: Vec::new() };
        };
        let Status { rings, phase, image } = open.worker.status();
        let state = match phase {
            Phase::Running => 0,
            Phase::Pausing => STATE_PAUSING,
            Phase::Paused => STATE_PAUSED,
        };
        VbdEntry { minor: self.minor, state, image, rings }
    }
}
