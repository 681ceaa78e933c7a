//! The second step of an indirect request: the segments of its page.

use super::segment::Segment;
use super::{Geometry, Reason, Transfer, countable, in_range, writable};
use crate::abi::{SEGMENT_SIZE, WireSegment};
use crate::ids::Sector;

/// Judges the segments of an indirect request, and gives the number of 512-byte sectors they move.
///
/// `bytes` is a **private copy** of the first `8 * count` bytes of the page that
/// [`RequestKind::Indirect`](super::RequestKind::Indirect) names; `sector` and `transfer` are that request's. The
/// segments, 1 to 256, stand in `out` afterwards, in the order of the disk's sectors; `out` grows only when its capacity
/// is too small for them, and holds nothing of use after an error.
///
/// # Errors
///
/// No segment or too many of them, a segment that does not lie inside its page, sectors beyond the end of the disk, a
/// write to a read-only one. All are answered with [`Status::Error`](crate::Status::Error).
pub fn parse_indirect(
    bytes: &[u8],
    sector: Sector,
    transfer: Transfer,
    geometry: &Geometry,
    out: &mut Vec<Segment>,
) -> Result<u32, Reason> {
    out.clear();
    let (entries, _) = bytes.as_chunks::<SEGMENT_SIZE>();
    countable(entries.len(), geometry)?;
    if transfer == Transfer::Write {
        writable(geometry)?;
    }
    out.reserve(entries.len());
    let mut sectors = 0;
    for entry in entries {
        let wire: WireSegment = zerocopy::transmute!(*entry);
        let segment = Segment::check(&wire)?;
        sectors += u32::from(segment.sectors());
        out.push(segment);
    }
    in_range(sector, u64::from(sectors), geometry)?;
    Ok(sectors)
}
