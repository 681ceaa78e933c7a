//! Why a device cannot be served, in the form its `error` node and the log want it.

use std::fmt;

use nix::errno::Errno;

/// A reason to give a device up. The device closes; nothing else is affected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Positive errno.
    pub errno: i32,
    /// What is wrong, on what, and what to do.
    pub message: String,
}

impl Problem {
    /// A problem of our own finding.
    pub fn new(errno: Errno, message: impl Into<String>) -> Problem {
        Problem { errno: errno as i32, message: message.into() }
    }
}

/// As Linux writes it into an `error` node (`xenbus_va_dev_error` in drivers/xen/xenbus/xenbus_client.c): the number,
/// a blank, the words.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.errno, self.message)
    }
}
