//! The frontend's side of a ring entry: from fields to bytes, in either layout.
//!
//! Nothing is checked: a frontend that tests a backend must be able to send nonsense.

use zerocopy::little_endian::{U16, U32, U64};

use crate::abi::{Abi, Entry32, Entry64, MAX_ENTRY_SIZE, MAX_SEGMENTS, PaddedEntry32, WireSegment};
use crate::ids::GrantRef;
use crate::request::{RawRequest, Segment};

/// One segment as a frontend writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DraftSegment {
    /// The granted page.
    pub gref: GrantRef,
    /// First sector in the page; 0 to 7 if honest.
    pub first: u8,
    /// Last sector in the page, included; `first` to 7 if honest.
    pub last: u8,
}

impl From<Segment> for DraftSegment {
    fn from(segment: Segment) -> DraftSegment {
        DraftSegment { gref: segment.gref(), first: segment.first(), last: segment.last() }
    }
}

/// The fields of a direct request as a frontend writes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// Operation code, see [`crate::abi::op`].
    pub op: u8,
    /// Number of segments that shall count; at most 11 if honest.
    pub nr_segments: u8,
    /// Ignored by every backend.
    pub handle: u16,
    /// Comes back in the response.
    pub id: u64,
    /// First sector on the disk, in 512-byte units.
    pub sector: u64,
    /// The segments; those from `nr_segments` on are written all the same.
    pub segments: [DraftSegment; MAX_SEGMENTS],
}

impl Draft {
    /// A request over `segments`, of which the first 11 are taken.
    pub fn new(op: u8, id: u64, sector: u64, segments: &[DraftSegment]) -> Draft {
        let mut draft = Draft { op, id, sector, ..Draft::default() };
        for (to, from) in draft.segments.iter_mut().zip(segments) {
            *to = *from;
            draft.nr_segments += 1;
        }
        draft
    }

    /// The ring entry.
    pub fn encode(&self, abi: Abi) -> RawRequest {
        let seg = self.segments.map(|segment| WireSegment {
            gref: U32::new(segment.gref.0),
            first_sect: segment.first,
            last_sect: segment.last,
            pad: U16::ZERO,
        });
        let bytes: [u8; MAX_ENTRY_SIZE] = match abi {
            Abi::X86_64 => zerocopy::transmute!(Entry64 {
                operation: self.op,
                nr_segments: self.nr_segments,
                handle: U16::new(self.handle),
                pad: U32::ZERO,
                id: U64::new(self.id),
                sector_number: U64::new(self.sector),
                seg,
            }),
            Abi::X86_32 => zerocopy::transmute!(PaddedEntry32 {
                entry: Entry32 {
                    operation: self.op,
                    nr_segments: self.nr_segments,
                    handle: U16::new(self.handle),
                    id: U64::new(self.id),
                    sector_number: U64::new(self.sector),
                    seg,
                },
                unused: [0; 4],
            }),
        };
        RawRequest::new(bytes, abi)
    }
}
