//! What can go wrong between a client and a tapdisk, each with the errno that becomes an exit code.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use nix::errno::Errno;

use crate::frame::FrameError;
use crate::proto::Minor;

/// A control operation that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers on the control socket.
    #[error("cannot reach tapdisk {pid} on {}: {errno}; it may have ended: see `tap-ctl list`", path.display())]
    Unreachable {
        /// The tapdisk's process id.
        pid: i32,
        /// Its control socket.
        path: PathBuf,
        /// What the system said: ENOENT without socket, ECONNREFUSED when its owner is gone.
        errno: Errno,
    },
    /// The tapdisk did not answer in time.
    #[error("tapdisk {pid} did not answer within {} s; it may hang on its storage", limit.as_secs())]
    Timeout {
        /// The tapdisk's process id.
        pid: i32,
        /// How long the caller was willing to wait.
        limit: Duration,
    },
    /// The connection ended in the middle of a call.
    #[error("tapdisk {pid} ended before it answered: see its log")]
    Ended {
        /// The tapdisk's process id.
        pid: i32,
    },
    /// The connection failed in the middle of a call.
    #[error("the connection to tapdisk {pid} failed: {source}")]
    Io {
        /// The tapdisk's process id.
        pid: i32,
        /// What the system said.
        source: io::Error,
    },
    /// The answer is no message of the protocol, or the request does not fit into one.
    #[error("talking to tapdisk {pid}: {source}")]
    Frame {
        /// The tapdisk's process id.
        pid: i32,
        /// What is wrong with the message.
        source: FrameError,
    },
    /// The answer is a message, but not one that answers the request.
    #[error("tapdisk {pid} gave an answer that does not belong to the request")]
    Unexpected {
        /// The tapdisk's process id.
        pid: i32,
    },
    /// The tapdisk refused, or tried and failed.
    #[error("{message}")]
    Refused {
        /// Its positive errno.
        errno: i32,
        /// Its explanation.
        message: String,
    },
    /// A file of the runtime folder cannot be used.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// All minors are taken.
    #[error("all {} minors are allocated: free unused ones with `tap-ctl free -m N`", u32::from(Minor::MAX.0) + 1)]
    NoFreeMinor,
    /// The minor has no marker.
    #[error("minor {minor} is not allocated: there is no {}", path.display())]
    NoSuchMinor {
        /// The minor.
        minor: Minor,
        /// Where its marker would be.
        path: PathBuf,
    },
    /// A tapdisk holds the minor.
    #[error("minor {minor} is in use by a tapdisk: detach it first")]
    MinorInUse {
        /// The minor.
        minor: Minor,
    },
    /// A disk whose tapdisk is gone cannot be gone on with.
    #[error("nobody can go on with minor {minor}: {why}")]
    NotRevived {
        /// The minor.
        minor: Minor,
        /// Why.
        why: String,
    },
    /// Killing it would take other disks along.
    #[error("tapdisk {pid} does not close the disk, and serves minor {other} too: destroy that one first")]
    ServesOthers {
        /// The tapdisk's process id.
        pid: i32,
        /// Another minor with an open image.
        other: Minor,
    },
    /// The tapdisk was killed, and the system keeps it until its storage answers.
    #[error(
        "tapdisk {pid} was killed, and stays until its storage has ended what it has in flight; the image and the guest's \
         memory are in use so long. Repeat the command then"
    )]
    Undead {
        /// The tapdisk's process id.
        pid: i32,
    },
    /// There is a tapdisk's socket, but another process behind it.
    #[error("process {pid} is not the one that listens on its control socket: not killed")]
    Impostor {
        /// The process id.
        pid: i32,
    },
    /// The tapdisk could not be killed.
    #[error("cannot kill tapdisk {pid}: {errno}")]
    Kill {
        /// The tapdisk's process id.
        pid: i32,
        /// What the system said.
        errno: Errno,
    },
    /// The tapdisk program cannot be started at all.
    #[error("cannot start {}: {source}", program.display())]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The tapdisk started and gave up before it was ready.
    #[error("{} gave up ({status}): {output}", program.display())]
    Startup {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: String,
        /// What it printed.
        output: String,
    },
}

impl Error {
    /// The positive errno of the failure, 1 to 255, for use as an exit code.
    pub fn errno(&self) -> u8 {
        let raw = match self {
            Error::Unreachable { errno, .. } | Error::Kill { errno, .. } => *errno as i32,
            Error::ServesOthers { .. } | Error::Undead { .. } => Errno::EBUSY as i32,
            Error::Impostor { .. } => Errno::ESRCH as i32,
            Error::Timeout { .. } => Errno::ETIMEDOUT as i32,
            Error::Ended { .. } => Errno::EPIPE as i32,
            Error::Io { source, .. } | Error::File { source, .. } | Error::Start { source, .. } => {
                source.raw_os_error().unwrap_or(Errno::EIO as i32)
            }
            Error::Frame { .. } | Error::Unexpected { .. } => Errno::EPROTO as i32,
            Error::Refused { errno, .. } => *errno,
            Error::NoFreeMinor => Errno::ENOSPC as i32,
            Error::NotRevived { .. } => Errno::ENODATA as i32,
            Error::NoSuchMinor { .. } => Errno::ENOENT as i32,
            Error::MinorInUse { .. } => Errno::EAGAIN as i32,
            Error::Startup { .. } => Errno::ECHILD as i32,
        };
        // The number comes from the peer: nothing it says may turn a failure into exit code 0.
        u8::try_from(raw).ok().filter(|&code| code != 0).unwrap_or(5)
    }

    /// The tapdisk is not there: it ended before or during the call.
    pub fn is_dead(&self) -> bool {
        match self {
            Error::Unreachable { errno, .. } => {
                matches!(errno, Errno::ENOENT | Errno::ECONNREFUSED | Errno::ESRCH)
            }
            Error::Ended { .. } => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_errno_of_a_peer_becomes_success() {
        for errno in [0, -1, 256, i32::MIN, i32::MAX, 512] {
            assert_eq!(Error::Refused { errno, message: String::new() }.errno(), 5, "{errno}");
        }
        assert_eq!(Error::Refused { errno: 114, message: String::new() }.errno(), 114);
    }
}
