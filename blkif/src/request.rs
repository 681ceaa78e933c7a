//! From the bytes of one ring entry to a request, or to a rejection that can be answered.
//!
//! [`parse`] is total: any bytes give one or the other. It works on a private copy, so the guest cannot change what was
//! checked; it allocates nothing, and its result says exactly which bytes of which granted page to touch and which
//! sectors of the disk, both inside their bounds.
//!
//! Two fields are ignored on purpose: `handle`, which frontends fill with anything (`blkif.h` calls it historical), and
//! the segments of a flush, where NetBSD leaves stale numbers of the slot's previous use.

use crate::abi::{Abi, Entry64, MAX_ENTRY_SIZE, MAX_SEGMENTS, PaddedEntry32, WireSegment, op};
use crate::ids::{GrantRef, SECTOR_SIZE, Sector};
use crate::response::Status;

/// The last 512-byte sector of a granted page.
const LAST_SECTOR_OF_PAGE: u8 = 7;

/// A private copy of one ring entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRequest {
    bytes: [u8; MAX_ENTRY_SIZE],
    abi: Abi,
}

impl RawRequest {
    /// An entry of layout `abi`, of whose bytes the first [`Abi::entry_size`] count.
    pub fn new(bytes: [u8; MAX_ENTRY_SIZE], abi: Abi) -> RawRequest {
        RawRequest { bytes, abi }
    }

    /// The entry's layout.
    pub fn abi(&self) -> Abi {
        self.abi
    }

    /// The entry's bytes, [`Abi::entry_size`] of them.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.abi.entry_size()).unwrap_or(&self.bytes)
    }

    /// The fields, whichever layout they come in.
    fn fields(&self) -> Fields {
        match self.abi {
            Abi::X86_64 => {
                let entry: Entry64 = zerocopy::transmute!(self.bytes);
                Fields {
                    op: entry.operation,
                    nr_segments: entry.nr_segments,
                    id: entry.id.get(),
                    sector: entry.sector_number.get(),
                    seg: entry.seg,
                }
            }
            Abi::X86_32 => {
                let PaddedEntry32 { entry, .. } = zerocopy::transmute!(self.bytes);
                Fields {
                    op: entry.operation,
                    nr_segments: entry.nr_segments,
                    id: entry.id.get(),
                    sector: entry.sector_number.get(),
                    seg: entry.seg,
                }
            }
        }
    }
}

/// What all four direct operations have in common, still unchecked.
struct Fields {
    op: u8,
    nr_segments: u8,
    id: u64,
    sector: u64,
    seg: [WireSegment; MAX_SEGMENTS],
}

/// What a disk is and offers, as published to the frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk in 512-byte sectors.
    pub capacity: u64,
    /// Whether everything that changes the disk is refused.
    pub readonly: bool,
    /// Whether `feature-flush-cache` was published as 1.
    pub flush: bool,
    /// Whether `feature-barrier` was published as 1.
    pub barrier: bool,
}

/// One piece of a request's data: consecutive sectors inside one granted page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    gref: GrantRef,
    first: u8,
    last: u8,
}

impl Segment {
    /// Sectors `first` to `last`, both included, of the page `gref`; `None` unless `first <= last <= 7`.
    pub fn new(gref: GrantRef, first: u8, last: u8) -> Option<Segment> {
        (first <= last && last <= LAST_SECTOR_OF_PAGE).then_some(Segment { gref, first, last })
    }

    /// The granted page.
    pub fn gref(self) -> GrantRef {
        self.gref
    }

    /// First sector in the page, 0 to 7.
    pub fn first(self) -> u8 {
        self.first
    }

    /// Last sector in the page, included; 0 to 7.
    pub fn last(self) -> u8 {
        self.last
    }

    /// Number of 512-byte sectors, 1 to 8.
    pub fn sectors(self) -> u8 {
        self.last - self.first + 1
    }

    /// Byte offset in the page, 0 to 3584.
    pub fn offset(self) -> u16 {
        u16::from(self.first) << SECTOR_SIZE.trailing_zeros()
    }

    /// Length in bytes, 512 to 4096.
    pub fn bytes(self) -> u16 {
        u16::from(self.sectors()) << SECTOR_SIZE.trailing_zeros()
    }
}

/// The data of a direct request: up to 11 segments, in the order of the disk's sectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    list: [Segment; MAX_SEGMENTS],
    len: u8,
}

impl Segments {
    /// The segments as a slice.
    pub fn as_slice(&self) -> &[Segment] {
        self.list.get(..usize::from(self.len)).unwrap_or(&self.list)
    }

    /// The segments one by one.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Segment> + '_ {
        self.as_slice().iter().copied()
    }

    /// Number of segments, 0 to 11.
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Whether there is no data.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of 512-byte sectors in all, 0 to 88.
    pub fn sectors(&self) -> u32 {
        self.iter().map(|segment| u32::from(segment.sectors())).sum()
    }

    /// Length of all data in bytes, 0 to 45056.
    pub fn bytes(&self) -> u32 {
        self.iter().map(|segment| u32::from(segment.bytes())).sum()
    }

    fn check(seg: &[WireSegment; MAX_SEGMENTS], count: u8) -> Result<Segments, Reason> {
        let wire = seg.get(..usize::from(count)).ok_or(Reason::TooManySegments { count })?;
        let mut list = [Segment::default(); MAX_SEGMENTS];
        for (to, from) in list.iter_mut().zip(wire) {
            *to = Segment::new(GrantRef(from.gref.get()), from.first_sect, from.last_sect)
                .ok_or(Reason::BadSegment { first: from.first_sect, last: from.last_sect })?;
        }
        Ok(Segments { list, len: count })
    }
}

/// What a request wants, inside the bounds of the disk and of the granted pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// Fill the segments from the disk.
    Read {
        /// First sector on the disk.
        sector: Sector,
        /// Where the data goes; at least one.
        segments: Segments,
    },
    /// Store the segments on the disk.
    Write {
        /// First sector on the disk.
        sector: Sector,
        /// Where the data comes from; at least one.
        segments: Segments,
    },
    /// Make every write that was answered durable.
    Flush,
    /// Make everything earlier durable, then store the segments, durably before anything later.
    Barrier {
        /// First sector on the disk; without meaning when there is no data.
        sector: Sector,
        /// Where the data comes from; may be empty.
        segments: Segments,
    },
}

/// A request that may be executed as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The frontend's name for it, opaque; goes into the response.
    pub id: u64,
    /// The operation to put into the response.
    pub op: u8,
    /// What to do.
    pub kind: RequestKind,
}

/// A request that is answered without being executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The frontend's name for it, opaque; goes into the response.
    pub id: u64,
    /// The operation to put into the response.
    pub op: u8,
    /// The status to answer.
    pub status: Status,
    /// What was wrong, for counters and the (rate-limited) log.
    pub reason: Reason,
}

/// What is wrong with a request. A guest can cause each of these at will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// The operation does not exist or was not offered to this frontend.
    #[error("operation {op} is not offered")]
    NotOffered {
        /// Byte 0 of the entry.
        op: u8,
    },
    /// More segments than an entry has.
    #[error("{count} segments, but an entry has room for 11")]
    TooManySegments {
        /// `nr_segments`.
        count: u8,
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
        count: u32,
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
            | Reason::NoSegments
            | Reason::BadSegment { .. }
            | Reason::OutOfRange { .. }
            | Reason::ReadOnly => Status::Error,
        }
    }
}

/// Judges one ring entry.
pub fn parse(raw: &RawRequest, geometry: &Geometry) -> Result<Request, Rejection> {
    let fields = raw.fields();
    let echo = echoed_operation(&fields);
    match decide(&fields, geometry) {
        Ok(kind) => Ok(Request { id: fields.id, op: echo, kind }),
        Err(reason) => Err(Rejection { id: fields.id, op: echo, status: reason.status(), reason }),
    }
}

/// The operation a response must carry. For an indirect request that is the operation inside it, also when it is
/// rejected: Linux's frontend compares the two and disables the disk for good when they differ
/// (`drivers/block/xen-blkfront.c`, `blkif_interrupt`).
fn echoed_operation(fields: &Fields) -> u8 {
    match fields.op {
        // `indirect_op` stands where a direct request has its number of segments.
        op::INDIRECT => fields.nr_segments,
        other => other,
    }
}

fn decide(fields: &Fields, geometry: &Geometry) -> Result<RequestKind, Reason> {
    let sector = Sector(fields.sector);
    match fields.op {
        op::READ => Ok(RequestKind::Read { sector, segments: data(fields, geometry)? }),
        op::WRITE => {
            let segments = data(fields, geometry)?;
            writable(geometry)?;
            Ok(RequestKind::Write { sector, segments })
        }
        op::FLUSH_DISKCACHE if geometry.flush => Ok(RequestKind::Flush),
        op::WRITE_BARRIER if geometry.barrier => {
            if fields.nr_segments == 0 {
                // Windows puts the sector of the SCSI command here, which may lie beyond the end: no range check.
                return Ok(RequestKind::Barrier { sector, segments: Segments::default() });
            }
            let segments = data(fields, geometry)?;
            writable(geometry)?;
            Ok(RequestKind::Barrier { sector, segments })
        }
        op => Err(Reason::NotOffered { op }),
    }
}

/// The segments of a request that must have some, and whose sectors must exist.
fn data(fields: &Fields, geometry: &Geometry) -> Result<Segments, Reason> {
    let segments = Segments::check(&fields.seg, fields.nr_segments)?;
    if segments.is_empty() {
        return Err(Reason::NoSegments);
    }
    let count = segments.sectors();
    let end = fields.sector.checked_add(u64::from(count));
    match end {
        Some(end) if end <= geometry.capacity => Ok(segments),
        _ => Err(Reason::OutOfRange { sector: Sector(fields.sector), count }),
    }
}

fn writable(geometry: &Geometry) -> Result<(), Reason> {
    if geometry.readonly { Err(Reason::ReadOnly) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
