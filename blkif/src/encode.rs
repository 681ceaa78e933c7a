//! The frontend's side of a ring entry: from fields to bytes, in either layout.
//!
//! Nothing is checked: a frontend that tests a backend must be able to send nonsense.

use zerocopy::little_endian::{U16, U32, U64};

use crate::abi::{
    Abi, Discard32, Discard64, Entry32, Entry64, Indirect32, Indirect64, MAX_ENTRY_SIZE, MAX_INDIRECT_PAGES,
    MAX_SEGMENTS, Padded, SEGMENT_SIZE, WireSegment, op,
};
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

impl DraftSegment {
    /// The segment as it stands in an entry, and in the page of an indirect request.
    pub fn encode(self) -> [u8; SEGMENT_SIZE] {
        zerocopy::transmute!(self.wire())
    }

    fn wire(self) -> WireSegment {
        WireSegment {
            gref: U32::new(self.gref.0),
            first_sect: self.first,
            last_sect: self.last,
            pad: U16::ZERO,
        }
    }
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
        let seg = self.segments.map(DraftSegment::wire);
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
            Abi::X86_32 => zerocopy::transmute!(Padded {
                entry: Entry32 {
                    operation: self.op,
                    nr_segments: self.nr_segments,
                    handle: U16::new(self.handle),
                    id: U64::new(self.id),
                    sector_number: U64::new(self.sector),
                    seg,
                },
                unused: [0; MAX_ENTRY_SIZE - size_of::<Entry32>()],
            }),
        };
        RawRequest::new(bytes, abi)
    }
}

/// The fields of a DISCARD as a frontend writes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiscardDraft {
    /// Bit 0: [`crate::abi::DISCARD_SECURE`].
    pub flag: u8,
    /// Ignored by every backend.
    pub handle: u16,
    /// Comes back in the response.
    pub id: u64,
    /// First sector on the disk, in 512-byte units.
    pub sector: u64,
    /// Number of 512-byte sectors.
    pub count: u64,
}

impl DiscardDraft {
    /// The ring entry.
    pub fn encode(&self, abi: Abi) -> RawRequest {
        let bytes: [u8; MAX_ENTRY_SIZE] = match abi {
            Abi::X86_64 => zerocopy::transmute!(Padded {
                entry: Discard64 {
                    operation: op::DISCARD,
                    flag: self.flag,
                    handle: U16::new(self.handle),
                    pad: U32::ZERO,
                    id: U64::new(self.id),
                    sector_number: U64::new(self.sector),
                    nr_sectors: U64::new(self.count),
                },
                unused: [0; MAX_ENTRY_SIZE - size_of::<Discard64>()],
            }),
            Abi::X86_32 => zerocopy::transmute!(Padded {
                entry: Discard32 {
                    operation: op::DISCARD,
                    flag: self.flag,
                    handle: U16::new(self.handle),
                    id: U64::new(self.id),
                    sector_number: U64::new(self.sector),
                    nr_sectors: U64::new(self.count),
                },
                unused: [0; MAX_ENTRY_SIZE - size_of::<Discard32>()],
            }),
        };
        RawRequest::new(bytes, abi)
    }
}

/// The fields of an INDIRECT request as a frontend writes them. The segments go into its pages, each as
/// [`DraftSegment::encode`] gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IndirectDraft {
    /// The operation proper: [`op::READ`] or [`op::WRITE`] if honest.
    pub indirect_op: u8,
    /// Number of segments in the pages.
    pub nr_segments: u16,
    /// Ignored by every backend.
    pub handle: u16,
    /// Comes back in the response.
    pub id: u64,
    /// First sector on the disk, in 512-byte units.
    pub sector: u64,
    /// The pages with the segments, 512 segments each.
    pub pages: [GrantRef; MAX_INDIRECT_PAGES],
}

impl IndirectDraft {
    /// The ring entry.
    pub fn encode(&self, abi: Abi) -> RawRequest {
        let pages = self.pages.map(|page| U32::new(page.0));
        let bytes: [u8; MAX_ENTRY_SIZE] = match abi {
            Abi::X86_64 => zerocopy::transmute!(Padded {
                entry: Indirect64 {
                    operation: op::INDIRECT,
                    indirect_op: self.indirect_op,
                    nr_segments: U16::new(self.nr_segments),
                    pad1: U32::ZERO,
                    id: U64::new(self.id),
                    sector_number: U64::new(self.sector),
                    handle: U16::new(self.handle),
                    pad2: U16::ZERO,
                    pages,
                    pad3: U32::ZERO,
                },
                unused: [0; MAX_ENTRY_SIZE - size_of::<Indirect64>()],
            }),
            Abi::X86_32 => zerocopy::transmute!(Padded {
                entry: Indirect32 {
                    operation: op::INDIRECT,
                    indirect_op: self.indirect_op,
                    nr_segments: U16::new(self.nr_segments),
                    id: U64::new(self.id),
                    sector_number: U64::new(self.sector),
                    handle: U16::new(self.handle),
                    pad1: U16::ZERO,
                    pages,
                    pad2: U64::ZERO,
                },
                unused: [0; MAX_ENTRY_SIZE - size_of::<Indirect32>()],
            }),
        };
        RawRequest::new(bytes, abi)
    }
}
