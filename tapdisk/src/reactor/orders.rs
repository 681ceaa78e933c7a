//! What the store is asked for, kept while it is under way for who wonders why nothing comes back.

use std::os::fd::RawFd;
use std::path::Path;

use tap_ctl::proto::StoreOperation;

use crate::tick::Tick;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    Read,
    /// To take bytes.
    Write,
    /// To make bytes durable.
    Flush,
    /// To give room, or take it back.
    Allocate,
    /// Something rare.
    Other,
}

/// An operation on a file or device that has not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    /// When it was started.
    pub since: Tick,
    kind: Kind,
    /// Open until the operation has ended.
    fd: Option<RawFd>,
    offset: u64,
    len: u64,
}

impl Order {
    pub(super) fn transfer(kind: Kind, fd: RawFd, offset: u64, len: u32) -> Order {
        Order::range(kind, fd, offset, len.into())
    }

    pub(super) fn range(kind: Kind, fd: RawFd, offset: u64, len: u64) -> Order {
        Order { since: Tick::now(), kind, fd: Some(fd), offset, len }
    }

    pub(super) fn nameless(kind: Kind) -> Order {
        Order { since: Tick::now(), kind, fd: None, offset: 0, len: 0 }
    }

    /// As it is told to people and programs. To be called while the operation is under way: the file's name is asked of the
    /// system, which costs nothing before somebody wants to know.
    pub fn tell(&self, now: Tick) -> StoreOperation {
        let operation = match self.kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "fdatasync",
            Kind::Allocate => "fallocate",
            Kind::Other => "work",
        };
        let link =
            self.fd.and_then(|fd| std::fs::read_link(Path::new("/proc/self/fd").join(fd.to_string())).ok());
        StoreOperation {
            age_ms: now.millis_since(self.since),
            operation: operation.to_owned(),
            offset: self.offset,
            bytes: self.len,
            file: link.map(|path| path.display().to_string()).unwrap_or_default(),
        }
    }
}
