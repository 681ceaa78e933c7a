//! Requests in flight, as they are told to people.

use std::fmt;

use blkif::ids::PAGE_SIZE;
use blkif::request::Transfer;
use blkif::{DomId, Request, RequestKind, VdevId};
use tap_ctl::proto::{LATE, OldestRequest};

use crate::tick::Tick;

/// What is to be done with sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Read them.
    Read,
    /// Write them.
    Write,
    /// Make durable what was answered.
    Flush,
    /// Give them up, or write zeros.
    Discard,
    /// Find out what is allocated.
    Survey,
    /// Change how many there are.
    Resize,
}

impl Operation {
    /// As programs read it.
    pub fn word(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::Survey => "survey",
            Operation::Resize => "resize",
        }
    }
}

impl From<&Request> for Operation {
    fn from(request: &Request) -> Operation {
        match &request.kind {
            RequestKind::Read { .. } | RequestKind::Indirect { transfer: Transfer::Read, .. } => {
                Operation::Read
            }
            RequestKind::Write { .. }
            | RequestKind::Barrier { .. }
            | RequestKind::Indirect { transfer: Transfer::Write, .. } => Operation::Write,
            RequestKind::Flush => Operation::Flush,
            RequestKind::Discard { .. } => Operation::Discard,
        }
    }
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct What {
    /// What is to be done.
    pub operation: Operation,
    /// With the sectors from this one on.
    pub sector: u64,
    /// So many sectors; what is only known to be a limit is taken for the number.
    pub sectors: u64,
}

impl From<&Request> for What {
    fn from(request: &Request) -> What {
        let (sector, sectors) = match &request.kind {
            RequestKind::Read { sector, segments }
            | RequestKind::Write { sector, segments }
            | RequestKind::Barrier { sector, segments } => (sector.0, segments.sectors().into()),
            RequestKind::Flush => (0, 0),
            RequestKind::Discard { sector, count, .. } => (sector.0, *count),
            RequestKind::Indirect { sector, count, .. } => {
                (sector.0, u64::from(*count) * (PAGE_SIZE as u64 / 512))
            }
        };
        What { operation: Operation::from(request), sector, sectors }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match self.operation {
            Operation::Read => "reading",
            Operation::Write => "writing",
            Operation::Flush => return f.write_str("flushing"),
            Operation::Discard => "discarding",
            Operation::Survey => "looking at",
            Operation::Resize => return f.write_str("changing its size"),
        };
        write!(f, "{verb} {} sectors at {}", self.sectors, self.sector)
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// A frontend.
    Frontend(DomId, VdevId),
    /// An NBD client, or an administrator.
    Other,
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            By::Frontend(dom, vdev) => write!(f, "device {vdev} of domain {dom}"),
            By::Other => f.write_str("an NBD client or the administrator"),
        }
    }
}

/// A request that was taken and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// When.
    pub since: Tick,
    /// What it asks for.
    pub what: What,
    /// For whom.
    pub by: By,
}

impl Taken {
    /// As it is told to programs.
    pub fn tell(&self, now: Tick) -> OldestRequest {
        OldestRequest {
            age_ms: now.millis_since(self.since),
            operation: self.what.operation.word().to_owned(),
            sector: self.what.sector,
            sectors: self.what.sectors,
            by: self.by.to_string(),
        }
    }
}

/// What is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flight {
    /// Requests, without those that never will be answered.
    pub requests: u64,
    /// Those.
    pub held: u64,
    /// Requests that have been taken long ago.
    pub late: u64,
    /// The oldest.
    pub oldest: Option<Taken>,
}

impl Flight {
    /// Counts a request in.
    pub fn add(&mut self, taken: Taken, now: Tick) {
        self.requests += 1;
        self.late += u64::from(now.since(taken.since) >= LATE);
        self.oldest = older(self.oldest, Some(taken));
    }

    /// Counts in what somebody else has under way.
    pub fn merge(&mut self, other: Flight) {
        self.requests += other.requests;
        self.held += other.held;
        self.late += other.late;
        self.oldest = older(self.oldest, other.oldest);
    }
}

fn older(one: Option<Taken>, other: Option<Taken>) -> Option<Taken> {
    [one, other].into_iter().flatten().min_by_key(|taken| taken.since)
}
