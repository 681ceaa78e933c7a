//! What is the tapdisk's business.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use nix::errno::Errno;
use tap_ctl::proto::Minor;
use tap_ctl::{ControlDir, Request};

use super::{Errand, Outcome};

/// Knows what the administrator has asked for.
#[derive(Debug)]
pub struct Judge {
    dir: ControlDir,
    pid: i32,
}

/// While it is there, names inside images may be followed.
#[derive(Debug)]
pub struct Window {
    _judge: Arc<Judge>,
}

impl Judge {
    /// For the tapdisk `pid`, which nothing was asked of yet.
    pub fn new(dir: ControlDir, pid: i32) -> Judge {
        Judge { dir, pid }
    }

    /// Notes what a request names, before the tapdisk gets it. The window is to be kept until the tapdisk has answered; `None`: the
    /// request opens nothing. May block on a store that hangs.
    pub fn learn(self: &Arc<Judge>, _request: &Request) -> Option<Window> {
        let _ = (&self.dir, self.pid);
        None
    }

    /// The tapdisk was started to go on with this disk: notes what its record names. Names inside images may be followed until
    /// [`Errand::Settled`].
    pub fn take_over(&self, _minor: Minor) {}

    /// Does an errand if it is the tapdisk's business. Blocking; any thread may call it.
    pub fn carry_out(&self, _errand: &Errand, _with: Option<BorrowedFd<'_>>) -> Outcome {
        Err(Errno::ENOSYS.into())
    }
}
