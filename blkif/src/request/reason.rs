//! Why a request is refused.

use crate::ids::Sector;
use crate::response::Status;

/// What is wrong with a request. A guest can cause each of these at will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The operation does not exist or was not offered to this frontend.
    #[error("operation {op} is not offered")]
    NotOffered {
        /// Byte 0 of the entry.
        op: u8,
    },
    /// More segments than an entry has room for, or than were offered for an indirect request.
    #[error("{count} segments where at most {limit} are allowed")]
    TooManySegments {
        /// `nr_segments`.
        count: usize,
        /// The most there may be.
        limit: usize,
    },
    /// An indirect request that is neither a read nor a write.
    #[error("operation {op} inside an indirect request")]
    NotIndirect {
        /// `indirect_op`.
        op: u8,
    },
    /// A read or write without data.
    #[error("a read or write without segments")]
    NoSegments,
    /// A segment that does not lie inside its page.
    #[error("a segment from sector {first} to {last} of a page of 8 sectors")]
    BadSegment {
        /// `first_sect`.
        first: u8,
        /// `last_sect`.
        last: u8,
    },
    /// Sectors beyond the end of the disk.
    #[error("{count} sectors at {sector} reach beyond the disk's end")]
    OutOfRange {
        /// First sector.
        sector: Sector,
        /// Number of sectors.
        count: u64,
    },
    /// A request to change a read-only disk.
    #[error("the disk is read-only")]
    ReadOnly,
}

impl Reason {
    /// The status a frontend gets for it.
    pub fn status(self) -> Status {
        match self {
            Reason::NotOffered { .. } => Status::NotSupported,
            Reason::TooManySegments { .. }
            | Reason::NotIndirect { .. }
            | Reason::NoSegments
            | Reason::BadSegment { .. }
            | Reason::OutOfRange { .. }
            | Reason::ReadOnly => Status::Error,
        }
    }
}
