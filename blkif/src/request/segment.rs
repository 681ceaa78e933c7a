//! Pieces of granted pages: the data of a request.

use super::Reason;
use crate::abi::{MAX_SEGMENTS, WireSegment};
use crate::ids::{GrantRef, SECTOR_SIZE};

/// The last 512-byte sector of a granted page.
const LAST_SECTOR_OF_PAGE: u8 = 7;

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

    /// The segment a frontend wrote, if it lies inside its page.
    pub(super) fn check(wire: &WireSegment) -> Result<Segment, Reason> {
        Segment::new(GrantRef(wire.gref.get()), wire.first_sect, wire.last_sect)
            .ok_or(Reason::BadSegment { first: wire.first_sect, last: wire.last_sect })
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

    /// The first `len` of an entry's segments, each inside its page.
    pub(super) fn check(seg: &[WireSegment; MAX_SEGMENTS], len: u8) -> Result<Segments, Reason> {
        let count = usize::from(len);
        let wire = seg.get(..count).ok_or(Reason::TooManySegments { count, limit: MAX_SEGMENTS })?;
        let mut list = [Segment::default(); MAX_SEGMENTS];
        for (to, from) in list.iter_mut().zip(wire) {
            *to = Segment::check(from)?;
        }
        Ok(Segments { list, len })
    }
}
