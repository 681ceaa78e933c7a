//! The crate's error type.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::codec::ProtocolError;
use crate::path::{Escaped, PathError};
use crate::wire::MessageType;

/// What a failed call was doing: the type of its request.
pub type Operation = MessageType;

/// Why a XenStore call failed.
///
/// After [`Error::Disconnected`], [`Error::Io`] and [`Error::Protocol`] in the framing the connection is gone: every
/// later call answers [`Error::Disconnected`]. After all others it goes on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The daemon refused the request.
    #[error("XenStore {operation} of {path} failed: {errno}")]
    Errno {
        /// The reason.
        errno: Errno,
        /// What was asked.
        operation: Operation,
        /// The path it was asked of, escaped; empty for requests without one.
        path: String,
    },
    /// The daemon refused the request with an error name this crate does not know.
    #[error("XenStore {operation} of {path} failed with the unknown error {name}")]
    UnknownErrno {
        /// The name, escaped.
        name: String,
        /// What was asked.
        operation: Operation,
        /// The path it was asked of, escaped.
        path: String,
    },
    /// The connection has ended.
    #[error("the connection to xenstored has ended; check that xenstored is running, then reconnect")]
    Disconnected,
    /// No connection could be made.
    #[error("cannot connect to XenStore at {}: {source}; check that xenstored is running", .path.display())]
    Connect {
        /// What was tried last.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The connection failed in another way than by ending.
    #[error("cannot {action} the XenStore connection: {source}")]
    Io {
        /// What was done: "read from", "write to" or "wait for".
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The daemon sent something that is not XenStore protocol.
    #[error("xenstored broke the protocol: {0}")]
    Protocol(#[from] ProtocolError),
    /// The path was refused before anything was sent.
    #[error("XenStore path {path} is not valid: {reason}")]
    InvalidPath {
        /// The path, escaped.
        path: String,
        /// The rule it breaks.
        reason: PathError,
    },
    /// The token was refused before anything was sent: it has a NUL, which would end it early.
    #[error("XenStore watch token {token} contains a NUL byte")]
    InvalidToken {
        /// The token, escaped.
        token: String,
    },
    /// The request, or the answer collected for it, is longer than is acceptable.
    #[error("XenStore {operation} of {path}: {len} bytes are more than the {max} allowed")]
    TooLong {
        /// What was asked.
        operation: Operation,
        /// The path it was asked of, escaped.
        path: String,
        /// The length in bytes.
        len: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// Others changed the same nodes again and again.
    #[error("XenStore {operation} gave up after {tries} tries: the nodes it needs change all the time")]
    Busy {
        /// What was tried.
        operation: Operation,
        /// How often.
        tries: u32,
    },
}

impl Error {
    /// The daemon's error code, if the daemon refused the request with one.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Errno { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether the node (or the transaction) does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        self.errno() == Some(Errno::ENOENT)
    }

    /// Whether a transaction lost against another change and has to be repeated from its start.
    #[must_use]
    pub fn is_again(&self) -> bool {
        self.errno() == Some(Errno::EAGAIN)
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_disconnected(&self) -> bool {
        matches!(self, Error::Disconnected)
    }

    pub(crate) fn io(action: &'static str, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::NotConnected
            | io::ErrorKind::UnexpectedEof => Error::Disconnected,
            _ => Error::Io { action, source },
        }
    }

    pub(crate) fn refused(operation: Operation, path: &[u8], name: &[u8]) -> Error {
        let path = Escaped(path).to_string();
        match crate::wire::errno_from_name(name) {
            Some(errno) => Error::Errno { errno, operation, path },
            None => Error::UnknownErrno { name: Escaped(name).to_string(), operation, path },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_name_the_operation_the_path_and_the_reason() {
        let error = Error::refused(MessageType::Read, b"/a\n", b"ENOENT");
        assert_eq!(error.to_string(), "XenStore READ of /a\\n failed: ENOENT: No such file or directory");
        assert!(error.is_not_found() && !error.is_again());
        let error = Error::refused(MessageType::Write, b"/a", b"EQUOTA\x1b");
        assert_eq!(error.to_string(), "XenStore WRITE of /a failed with the unknown error EQUOTA\\x1b");
        assert_eq!(error.errno(), None);
    }

    #[test]
    fn every_way_a_peer_goes_away_is_a_disconnection() {
        for errno in [libc::EPIPE, libc::ECONNRESET, libc::ENOTCONN] {
            let error = Error::io("write to", io::Error::from_raw_os_error(errno));
            assert!(error.is_disconnected(), "{error}");
        }
        assert!(!Error::io("write to", io::Error::from_raw_os_error(libc::EIO)).is_disconnected());
    }
}
