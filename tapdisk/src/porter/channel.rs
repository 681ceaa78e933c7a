//! The way between a tapdisk and its porter.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::{Errand, Outcome};

/// The tapdisk's end.
#[derive(Debug)]
pub struct Channel;

impl Channel {
    /// Has an errand done, with a descriptor or without. Blocking; any thread may call it.
    pub fn ask(&self, _errand: &Errand, _with: Option<BorrowedFd<'_>>) -> Outcome {
        Err(Errno::ENOSYS.into())
    }
}
