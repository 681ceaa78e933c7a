//! From the bytes of one ring entry to a request, or to a rejection that can be answered.
//!
//! [`parse`] is total: any bytes give one or the other. It works on a private copy, so the guest cannot change what was
//! checked; it allocates nothing, and its result says exactly which bytes of which granted page to touch and which
//! sectors of the disk, both inside their bounds. Only an indirect request takes a second step, [`parse_indirect`],
//! because its segments are elsewhere.
//!
//! Two fields are ignored on purpose: `handle`, which frontends fill with anything (`blkif.h` calls it historical), and
//! the segments of a flush, where NetBSD leaves stale numbers of the slot's previous use.

mod indirect;
mod reason;
mod segment;

use crate::abi::{
    Abi, DISCARD_SECURE, Entry32, Entry64, MAX_ENTRY_SIZE, MAX_INDIRECT_SEGMENTS, MAX_SEGMENTS,
    PaddedDiscard32, PaddedDiscard64, PaddedEntry32, PaddedIndirect32, PaddedIndirect64, WireSegment, op,
};
use crate::ids::{GrantRef, Sector};
use crate::response::Status;

pub use indirect::parse_indirect;
pub use reason::Reason;
pub use segment::{Segment, Segments};

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

    /// All bytes of the copy, those behind the entry included: what [`RawRequest::new`] makes the same request of.
    pub fn copy(&self) -> &[u8; MAX_ENTRY_SIZE] {
        &self.bytes
    }

    /// What entries of all operations have in common.
    fn head(&self) -> Head {
        match self.abi {
            Abi::X86_64 => {
                let Entry64 { operation, nr_segments, id, sector_number, .. } =
                    zerocopy::transmute_ref!(&self.bytes);
                Head {
                    op: *operation,
                    detail: *nr_segments,
                    id: id.get(),
                    sector: Sector(sector_number.get()),
                }
            }
            Abi::X86_32 => {
                let PaddedEntry32 {
                    entry: Entry32 { operation, nr_segments, id, sector_number, .. }, ..
                } = zerocopy::transmute_ref!(&self.bytes);
                Head {
                    op: *operation,
                    detail: *nr_segments,
                    id: id.get(),
                    sector: Sector(sector_number.get()),
                }
            }
        }
    }

    /// The segments of a direct request.
    fn segments(&self) -> &[WireSegment; MAX_SEGMENTS] {
        match self.abi {
            Abi::X86_64 => {
                let Entry64 { seg, .. } = zerocopy::transmute_ref!(&self.bytes);
                seg
            }
            Abi::X86_32 => {
                let PaddedEntry32 { entry, .. } = zerocopy::transmute_ref!(&self.bytes);
                &entry.seg
            }
        }
    }

    /// The number of sectors of a discard.
    fn discard_sectors(&self) -> u64 {
        match self.abi {
            Abi::X86_64 => {
                let PaddedDiscard64 { entry, .. } = zerocopy::transmute_ref!(&self.bytes);
                entry.nr_sectors.get()
            }
            Abi::X86_32 => {
                let PaddedDiscard32 { entry, .. } = zerocopy::transmute_ref!(&self.bytes);
                entry.nr_sectors.get()
            }
        }
    }

    /// The number of segments of an indirect request, and the first page they stand in.
    fn indirect(&self) -> (u16, GrantRef) {
        let (nr_segments, [page, ..]) = match self.abi {
            Abi::X86_64 => {
                let PaddedIndirect64 { entry, .. } = zerocopy::transmute_ref!(&self.bytes);
                (entry.nr_segments, entry.pages)
            }
            Abi::X86_32 => {
                let PaddedIndirect32 { entry, .. } = zerocopy::transmute_ref!(&self.bytes);
                (entry.nr_segments, entry.pages)
            }
        };
        (nr_segments.get(), GrantRef(page.get()))
    }
}

/// The fields that stand at the same place whatever the operation, still unchecked.
struct Head {
    op: u8,
    /// Byte 1: `nr_segments` of a direct request, `flag` of a discard, `indirect_op` of an indirect request.
    detail: u8,
    id: u64,
    sector: Sector,
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
    /// Whether `feature-discard` was published as 1.
    pub discard: bool,
    /// Whether `discard-secure` was published as 1.
    pub discard_secure: bool,
    /// What was published as `feature-max-indirect-segments`, at most [`MAX_INDIRECT_SEGMENTS`]; 0: not offered.
    pub max_indirect: u16,
}

/// The direction of an indirect request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transfer {
    /// From the disk to the guest.
    Read,
    /// From the guest to the disk.
    Write,
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
    /// Forget sectors. Advisory, so what lies outside the store's units may be left as it is.
    Discard {
        /// First sector on the disk.
        sector: Sector,
        /// Number of 512-byte sectors, inside the disk; may be 0, which is nothing to do.
        count: u64,
        /// Nobody may be able to read the old content afterwards. Only where this was offered: elsewhere the frontend's
        /// flag has no meaning (`blkif.h`).
        secure: bool,
    },
    /// A read or write whose segments stand in a page of the guest: copy the first `count` × 8 bytes of it, and have
    /// them judged by [`parse_indirect`]. Until then nothing is known about the data but its place on the disk.
    Indirect {
        /// Read or write.
        transfer: Transfer,
        /// First sector on the disk.
        sector: Sector,
        /// Number of segments, 1 to 256 and no more than were offered.
        count: u16,
        /// The page with the segments; only to be read.
        page: GrantRef,
    },
}

/// A request that may be executed as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The frontend's name for it, opaque; goes into the response.
    pub id: u64,
    /// The operation to put into the response; of an indirect request the one inside it.
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

/// Judges one ring entry.
pub fn parse(raw: &RawRequest, geometry: &Geometry) -> Result<Request, Rejection> {
    let head = raw.head();
    let (id, op) = (head.id, echoed_operation(&head));
    match decide(&head, raw, geometry) {
        Ok(kind) => Ok(Request { id, op, kind }),
        Err(reason) => Err(Rejection { id, op, status: reason.status(), reason }),
    }
}

/// The operation a response must carry. For an indirect request that is the operation inside it, also when it is
/// rejected: Linux's frontend compares the two and disables the disk for good when they differ
/// (`drivers/block/xen-blkfront.c`, `blkif_interrupt`).
fn echoed_operation(head: &Head) -> u8 {
    match head.op {
        op::INDIRECT => head.detail,
        other => other,
    }
}

fn decide(head: &Head, raw: &RawRequest, geometry: &Geometry) -> Result<RequestKind, Reason> {
    let sector = head.sector;
    match head.op {
        op::READ | op::WRITE => direct(head, raw, geometry),
        op::WRITE_BARRIER if geometry.barrier => match head.detail {
            // Windows puts the sector of the SCSI command here, which may lie beyond the end: no range check.
            0 => Ok(RequestKind::Barrier { sector, segments: Segments::default() }),
            _ => direct(head, raw, geometry),
        },
        op::FLUSH_DISKCACHE if geometry.flush => Ok(RequestKind::Flush),
        op::DISCARD if geometry.discard => {
            writable(geometry)?;
            let count = raw.discard_sectors();
            in_range(sector, count, geometry)?;
            let secure = geometry.discard_secure && head.detail & DISCARD_SECURE != 0;
            Ok(RequestKind::Discard { sector, count, secure })
        }
        op::INDIRECT if geometry.max_indirect > 0 => indirect(head, raw, geometry),
        op => Err(Reason::NotOffered { op }),
    }
}

/// A read, a write, or a barrier with data.
fn direct(head: &Head, raw: &RawRequest, geometry: &Geometry) -> Result<RequestKind, Reason> {
    let sector = head.sector;
    let segments = Segments::check(raw.segments(), head.detail)?;
    if segments.is_empty() {
        return Err(Reason::NoSegments);
    }
    in_range(sector, u64::from(segments.sectors()), geometry)?;
    if head.op == op::READ {
        return Ok(RequestKind::Read { sector, segments });
    }
    writable(geometry)?;
    Ok(match head.op {
        op::WRITE => RequestKind::Write { sector, segments },
        _ => RequestKind::Barrier { sector, segments },
    })
}

fn indirect(head: &Head, raw: &RawRequest, geometry: &Geometry) -> Result<RequestKind, Reason> {
    let transfer = match head.detail {
        op::READ => Transfer::Read,
        op::WRITE => Transfer::Write,
        op => return Err(Reason::NotIndirect { op }),
    };
    let (count, page) = raw.indirect();
    countable(usize::from(count), geometry)?;
    if transfer == Transfer::Write {
        writable(geometry)?;
    }
    // A segment moves a sector at least. That refuses what is far outside before a page is copied for it.
    in_range(head.sector, u64::from(count), geometry)?;
    Ok(RequestKind::Indirect { transfer, sector: head.sector, count, page })
}

/// Whether an indirect request may have so many segments.
fn countable(count: usize, geometry: &Geometry) -> Result<(), Reason> {
    let limit = usize::from(geometry.max_indirect.min(MAX_INDIRECT_SEGMENTS));
    match count {
        0 => Err(Reason::NoSegments),
        _ if count > limit => Err(Reason::TooManySegments { count, limit }),
        _ => Ok(()),
    }
}

fn in_range(sector: Sector, count: u64, geometry: &Geometry) -> Result<(), Reason> {
    match sector.0.checked_add(count) {
        Some(end) if end <= geometry.capacity => Ok(()),
        _ => Err(Reason::OutOfRange { sector, count }),
    }
}

fn writable(geometry: &Geometry) -> Result<(), Reason> {
    if geometry.readonly { Err(Reason::ReadOnly) } else { Ok(()) }
}

#[cfg(test)]
mod tests;
