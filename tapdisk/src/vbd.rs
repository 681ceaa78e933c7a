//! The VBDs of a tapdisk: which minors it has charge of, and what is open on each.

use nix::errno::Errno;
use tap_ctl::minors::{Claim, claim};
use tap_ctl::proto::{DiskInfo, ImageSpec, Minor, VbdEntry};
use tap_ctl::{ControlDir, Reply};

use crate::worker::Worker;

/// State bit of XenServer's tapdisk for a VBD whose image was closed.
const STATE_CLOSED: u32 = 2;

/// An image being opened or open.
#[derive(Debug)]
pub struct Open {
    /// The image.
    pub image: ImageSpec,
    /// Its thread.
    pub worker: Worker,
    /// Known once it is open.
    pub info: Option<DiskInfo>,
    /// Why the disk was stopped, if it was.
    pub failed: Option<String>,
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
        let claim = claim(dir, minor)
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
        Some(Reply::Changed { minor: self.minor, info: open.info?, failed: open.failed.clone() })
    }

    /// The line of `tap-ctl list`.
    pub fn entry(&self) -> VbdEntry {
        VbdEntry {
            minor: self.minor,
            state: if self.open.is_none() && self.closed_before { STATE_CLOSED } else { 0 },
            image: self.open.as_ref().map(|open| open.image.clone()),
            rings: self.open.as_ref().map(|open| open.worker.rings()).unwrap_or_default(),
        }
    }
}
