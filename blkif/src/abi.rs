//! The two layouts of a ring entry, and the sizes that follow from them.
//!
//! The protocol was laid out by C compilers: a `uint64_t` is aligned to 8 bytes on x86_64 and on both ARM widths,
//! but to 4 bytes on 32-bit x86, so the same structure has two shapes. A frontend says which one it speaks in its
//! `protocol` key. All fields are little-endian in both.
//!
//! Source: `blkif.h` for the fields; the offsets below are what its structures compile to for either alignment.

use std::fmt;
use std::mem::offset_of;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::ids::PAGE_SIZE;

/// Operation codes (`BLKIF_OP_*`), as they stand in byte 0 of a request and in byte 8 of a response.
pub mod op {
    /// Read sectors into the granted pages.
    pub const READ: u8 = 0;
    /// Write sectors from the granted pages.
    pub const WRITE: u8 = 1;
    /// A write that everything earlier must be durable before, and that is durable before anything later starts.
    pub const WRITE_BARRIER: u8 = 2;
    /// Make every completed write durable.
    pub const FLUSH_DISKCACHE: u8 = 3;
    /// Forget sectors; advisory.
    pub const DISCARD: u8 = 5;
    /// A read or write whose segments stand in pages of their own; byte 1 holds the operation proper.
    pub const INDIRECT: u8 = 6;
}

/// Bit 0 of a DISCARD's `flag`: the sectors must not be readable by anybody any more (`BLKIF_DISCARD_SECURE`).
pub const DISCARD_SECURE: u8 = 1;

/// Most segments a request can carry in the ring entry itself (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const MAX_SEGMENTS: usize = 11;
/// Most segments of an INDIRECT request that this crate accepts: 1 MiB of data. They fill half of one page, so that the
/// first of the entry's page references is the only one ever used.
pub const MAX_INDIRECT_SEGMENTS: u16 = 256;
/// Page references in an INDIRECT entry (`BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`).
pub const MAX_INDIRECT_PAGES: usize = 8;
/// Bytes of one segment, in an entry and in an indirect page alike.
pub const SEGMENT_SIZE: usize = size_of::<WireSegment>();
/// Largest entry of any ABI, in bytes.
pub const MAX_ENTRY_SIZE: usize = size_of::<Entry64>();
/// Largest response of any ABI, in bytes.
pub const MAX_RESPONSE_SIZE: usize = 16;
/// Bytes of the ring header (`ring.h`: four counters and padding); entry 0 starts here.
pub const HEADER_SIZE: usize = 64;

/// Byte offsets of the counters in the ring header (`ring.h`, `DEFINE_RING_TYPES`); each is a `u32`.
pub mod header {
    /// Requests produced; the frontend's.
    pub const REQ_PROD: usize = 0;
    /// Where the backend wants to be notified; the backend's.
    pub const REQ_EVENT: usize = 4;
    /// Responses produced; the backend's.
    pub const RSP_PROD: usize = 8;
    /// Where the frontend wants to be notified; the frontend's.
    pub const RSP_EVENT: usize = 12;
}

/// One data segment of a request: same layout in both ABIs.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireSegment {
    pub gref: U32,
    pub first_sect: u8,
    pub last_sect: u8,
    pub pad: U16,
}

/// A READ, WRITE, WRITE_BARRIER or FLUSH_DISKCACHE entry where `uint64_t` is aligned to 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Entry64 {
    pub operation: u8,
    pub nr_segments: u8,
    pub handle: U16,
    pub pad: U32,
    pub id: U64,
    pub sector_number: U64,
    pub seg: [WireSegment; MAX_SEGMENTS],
}

/// The same entry where `uint64_t` is aligned to 4.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Entry32 {
    pub operation: u8,
    pub nr_segments: u8,
    pub handle: U16,
    pub id: U64,
    pub sector_number: U64,
    pub seg: [WireSegment; MAX_SEGMENTS],
}

/// A DISCARD entry where `uint64_t` is aligned to 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Discard64 {
    pub operation: u8,
    pub flag: u8,
    pub handle: U16,
    pub pad: U32,
    pub id: U64,
    pub sector_number: U64,
    pub nr_sectors: U64,
}

/// The same entry where `uint64_t` is aligned to 4.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Discard32 {
    pub operation: u8,
    pub flag: u8,
    pub handle: U16,
    pub id: U64,
    pub sector_number: U64,
    pub nr_sectors: U64,
}

/// An INDIRECT entry where `uint64_t` is aligned to 8.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Indirect64 {
    pub operation: u8,
    pub indirect_op: u8,
    pub nr_segments: U16,
    pub pad1: U32,
    pub id: U64,
    pub sector_number: U64,
    pub handle: U16,
    pub pad2: U16,
    pub pages: [U32; MAX_INDIRECT_PAGES],
    pub pad3: U32,
}

/// The same entry where `uint64_t` is aligned to 4; the header pads it to the other one's size.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Indirect32 {
    pub operation: u8,
    pub indirect_op: u8,
    pub nr_segments: U16,
    pub id: U64,
    pub sector_number: U64,
    pub handle: U16,
    pub pad1: U16,
    pub pages: [U32; MAX_INDIRECT_PAGES],
    pub pad2: U64,
}

/// An entry in the buffer that is large enough for each of them.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Padded<T, const N: usize> {
    pub entry: T,
    /// Not part of the entry.
    pub unused: [u8; N],
}

/// [`Entry32`] in a buffer of [`MAX_ENTRY_SIZE`].
pub(crate) type PaddedEntry32 = Padded<Entry32, { MAX_ENTRY_SIZE - size_of::<Entry32>() }>;
/// [`Discard64`] in a buffer of [`MAX_ENTRY_SIZE`].
pub(crate) type PaddedDiscard64 = Padded<Discard64, { MAX_ENTRY_SIZE - size_of::<Discard64>() }>;
/// [`Discard32`] in a buffer of [`MAX_ENTRY_SIZE`].
pub(crate) type PaddedDiscard32 = Padded<Discard32, { MAX_ENTRY_SIZE - size_of::<Discard32>() }>;
/// [`Indirect64`] in a buffer of [`MAX_ENTRY_SIZE`].
pub(crate) type PaddedIndirect64 = Padded<Indirect64, { MAX_ENTRY_SIZE - size_of::<Indirect64>() }>;
/// [`Indirect32`] in a buffer of [`MAX_ENTRY_SIZE`].
pub(crate) type PaddedIndirect32 = Padded<Indirect32, { MAX_ENTRY_SIZE - size_of::<Indirect32>() }>;

/// A response; the 32-bit layout is the first 12 bytes of it.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct WireResponse {
    pub id: U64,
    pub operation: u8,
    pub pad: u8,
    pub status: zerocopy::little_endian::I16,
    /// Tail padding, in the 8-aligned layout only.
    pub tail: U32,
}

const _: () = {
    assert!(size_of::<WireSegment>() == 8);
    assert!(size_of::<Entry64>() == 112);
    assert!(offset_of!(Entry64, id) == 8);
    assert!(offset_of!(Entry64, sector_number) == 16);
    assert!(offset_of!(Entry64, seg) == 24);
    assert!(size_of::<Entry32>() == 108);
    assert!(offset_of!(Entry32, id) == 4);
    assert!(offset_of!(Entry32, sector_number) == 12);
    assert!(offset_of!(Entry32, seg) == 20);
    assert!(size_of::<Discard64>() == 32);
    assert!(offset_of!(Discard64, nr_sectors) == 24);
    assert!(size_of::<Discard32>() == 28);
    assert!(offset_of!(Discard32, nr_sectors) == 20);
    assert!(size_of::<Indirect64>() == 64);
    assert!(offset_of!(Indirect64, id) == 8);
    assert!(offset_of!(Indirect64, handle) == 24);
    assert!(offset_of!(Indirect64, pages) == 28);
    assert!(size_of::<Indirect32>() == 64);
    assert!(offset_of!(Indirect32, id) == 4);
    assert!(offset_of!(Indirect32, handle) == 20);
    assert!(offset_of!(Indirect32, pages) == 24);
    assert!(MAX_INDIRECT_SEGMENTS as usize * SEGMENT_SIZE <= PAGE_SIZE);
    assert!(size_of::<WireResponse>() == MAX_RESPONSE_SIZE);
    assert!(offset_of!(WireResponse, operation) == 8);
    assert!(offset_of!(WireResponse, status) == 10);
    assert!(offset_of!(WireResponse, tail) == 12);
    // The ring copies entries and responses word by word.
    assert!(HEADER_SIZE.is_multiple_of(4));
    assert!(size_of::<Entry64>().is_multiple_of(4));
    assert!(size_of::<Entry32>().is_multiple_of(4));
};

/// The shape of ring entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Abi {
    /// 64-bit fields aligned to 8 bytes: `x86_64-abi`, and `arm-abi` for 32- and 64-bit ARM alike.
    X86_64,
    /// 64-bit fields aligned to 4 bytes: `x86_32-abi`.
    X86_32,
}

/// A `protocol` key that names no ABI we know. The device cannot be connected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the frontend's protocol \"{name}\" is none of x86_64-abi, x86_32-abi, arm-abi: use a frontend driver that \
     speaks one of them"
)]
pub struct UnknownProtocol {
    /// The value, escaped for printing and cut to 64 bytes: the guest wrote it.
    pub name: String,
}

impl Abi {
    /// The ABI that the frontend's `protocol` key asks for, `None` being an absent key.
    ///
    /// Absent means `x86_32-abi` on x86 and the native layout elsewhere: the key came with the first 64-bit
    /// frontends, so a driver that does not write it is older than they are. Linux's backend has the same rule
    /// (`drivers/block/xen-blkback/common.h`, `BLKIF_PROTOCOL_DEFAULT`).
    pub fn from_protocol_key(value: Option<&[u8]>) -> Result<Abi, UnknownProtocol> {
        match value {
            None if cfg!(any(target_arch = "x86", target_arch = "x86_64")) => Ok(Abi::X86_32),
            None => Ok(Abi::X86_64),
            Some(b"x86_64-abi" | b"arm-abi") => Ok(Abi::X86_64),
            Some(b"x86_32-abi") => Ok(Abi::X86_32),
            Some(other) => {
                Err(UnknownProtocol { name: other.get(..64).unwrap_or(other).escape_ascii().to_string() })
            }
        }
    }

    /// The value of the `protocol` key for this layout on this machine's architecture.
    pub fn protocol_name(self) -> &'static str {
        match self {
            Abi::X86_64 if cfg!(any(target_arch = "arm", target_arch = "aarch64")) => "arm-abi",
            Abi::X86_64 => "x86_64-abi",
            Abi::X86_32 => "x86_32-abi",
        }
    }

    /// Bytes from one ring entry to the next.
    pub const fn entry_size(self) -> usize {
        match self {
            Abi::X86_64 => size_of::<Entry64>(),
            Abi::X86_32 => size_of::<Entry32>(),
        }
    }

    /// Bytes of an entry that its first two, operation and detail, give a meaning: the fields every operation has, and
    /// behind them the segments that are said to be there, or a discard's or an indirect request's own fields. A
    /// multiple of 4, at most [`Abi::entry_size`].
    #[cfg(not(loom))]
    pub(crate) fn used(self, operation: u8, detail: u8) -> usize {
        let (head, discard, indirect) = match self {
            Abi::X86_64 => (offset_of!(Entry64, seg), size_of::<Discard64>(), size_of::<Indirect64>()),
            Abi::X86_32 => (offset_of!(Entry32, seg), size_of::<Discard32>(), size_of::<Indirect32>()),
        };
        match operation {
            op::READ | op::WRITE | op::WRITE_BARRIER => {
                head + usize::from(detail).min(MAX_SEGMENTS) * SEGMENT_SIZE
            }
            op::DISCARD => discard,
            op::INDIRECT => indirect,
            _ => head,
        }
    }

    /// Bytes of a response, padding included. It is written at the start of an entry; the rest is left alone.
    pub const fn response_size(self) -> usize {
        match self {
            Abi::X86_64 => MAX_RESPONSE_SIZE,
            Abi::X86_32 => 12,
        }
    }

    /// Entries of a ring of `order`: as many as fit behind the header, rounded down to a power of two.
    pub const fn slots(self, order: RingOrder) -> u32 {
        let fit = (order.bytes() - HEADER_SIZE) / self.entry_size();
        1 << fit.ilog2()
    }
}

impl fmt::Display for Abi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.protocol_name())
    }
}

/// The size of a ring as a power of two of 4096-byte pages, 0 to 4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RingOrder(u8);

impl RingOrder {
    /// The largest ring served: 16 pages, 512 entries. The value for `max-ring-page-order`.
    pub const MAX: RingOrder = RingOrder(4);

    /// The order a frontend asks for with `ring-page-order`; `None` above [`RingOrder::MAX`].
    pub const fn new(order: u32) -> Option<RingOrder> {
        match order {
            0 => Some(RingOrder(0)),
            1 => Some(RingOrder(1)),
            2 => Some(RingOrder(2)),
            3 => Some(RingOrder(3)),
            4 => Some(RingOrder(4)),
            _ => None,
        }
    }

    /// Every order served, smallest first.
    pub fn all() -> impl Iterator<Item = RingOrder> {
        (0..=Self::MAX.0).map(RingOrder)
    }

    /// The order itself.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }

    /// Pages of the ring, each with a grant of its own.
    pub const fn pages(self) -> usize {
        1 << self.0
    }

    /// Bytes of the ring.
    pub const fn bytes(self) -> usize {
        PAGE_SIZE << self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_double_with_each_order_and_are_the_same_in_both_abis() {
        for abi in [Abi::X86_64, Abi::X86_32] {
            let slots: Vec<u32> = RingOrder::all().map(|order| abi.slots(order)).collect();
            assert_eq!(slots, [32, 64, 128, 256, 512], "{abi}");
        }
    }

    #[test]
    fn every_entry_lies_inside_the_ring() {
        for abi in [Abi::X86_64, Abi::X86_32] {
            for order in RingOrder::all() {
                let end = HEADER_SIZE + abi.slots(order) as usize * abi.entry_size();
                assert!(end <= order.bytes(), "{abi} order {}", order.get());
            }
        }
    }

    #[test]
    fn response_fits_at_the_start_of_an_entry() {
        assert_eq!(Abi::X86_64.response_size(), 16);
        assert_eq!(Abi::X86_32.response_size(), 12);
    }

    #[test]
    fn protocol_key_is_matched_exactly() {
        assert_eq!(Abi::from_protocol_key(Some(b"x86_64-abi")), Ok(Abi::X86_64));
        assert_eq!(Abi::from_protocol_key(Some(b"arm-abi")), Ok(Abi::X86_64));
        assert_eq!(Abi::from_protocol_key(Some(b"x86_32-abi")), Ok(Abi::X86_32));
        for wrong in [&b""[..], b"x86_64-abi\n", b" x86_64-abi", b"X86_64-ABI", b"x86_64-abi\0", b"native"] {
            assert!(Abi::from_protocol_key(Some(wrong)).is_err(), "{}", wrong.escape_ascii());
        }
        for abi in [Abi::X86_64, Abi::X86_32] {
            assert_eq!(Abi::from_protocol_key(Some(abi.protocol_name().as_bytes())), Ok(abi));
        }
    }

    #[test]
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    fn absent_protocol_key_means_the_oldest_frontends_on_x86() {
        assert_eq!(Abi::from_protocol_key(None), Ok(Abi::X86_32));
    }

    #[test]
    fn unknown_protocol_is_quoted_escaped_and_short() {
        let error = Abi::from_protocol_key(Some(&[b'\n'; 4000])).unwrap_err();
        assert!(error.name.len() <= 128 && error.name.starts_with("\\n"), "{}", error.name);
    }

    #[test]
    fn ring_order_above_four_is_refused() {
        assert_eq!(RingOrder::new(4), Some(RingOrder::MAX));
        for order in [5, 31, 32, 64, 256, 260, u32::MAX] {
            assert_eq!(RingOrder::new(order), None);
        }
    }
}
