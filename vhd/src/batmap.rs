//! The batmap: one bit a block, "completely written". An extension of XenServer's blktap, behind the allocation table.
//!
//! The map is advisory. A bit that is wrongly clear costs a read of the block's bitmap; a bit that is wrongly set would
//! make old disk contents appear as data. So this crate never decides a read or a write by a bit found on disk: it
//! only keeps the map up to date for other programs, and only at a clean close.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{KeyHash, bitmap};
use format::MetaWrite;

/// Length of the batmap header in bytes; the map is in sectors of its own.
pub const LEN: usize = 512;
/// The cookie of every batmap header.
pub const COOKIE: [u8; 8] = *b"tdbatmap";
/// The version that this crate writes.
pub const VERSION: u32 = 0x0001_0002;
/// The version whose checksum adds bytes as signed numbers.
const VERSION_SIGNED: u32 = 0x0001_0001;

/// A batmap header exactly as it lies on disk.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawBatmapHeader {
    /// [`COOKIE`].
    pub cookie: [u8; 8],
    /// Byte offset of the map.
    pub offset: U64,
    /// Sectors of the map.
    pub sectors: U32,
    /// [`VERSION`].
    pub version: U32,
    /// One's complement of the sum of the map's covered bytes, see [`covered_len`].
    pub checksum: U32,
    /// Free for use by storage managers.
    pub marker: u8,
    /// 1 if the image is encrypted and the next two fields are in use.
    pub key_cookie: u8,
    /// Random bytes hashed before the key.
    pub key_nonce: [u8; 32],
    /// SHA-256 of nonce and key.
    pub key_hash: [u8; 32],
    /// Zeros.
    pub reserved: [u8; 418],
}

impl RawBatmapHeader {
    /// The header of an all-clear map of `sectors` sectors at byte `offset`.
    pub fn new(offset: u64, sectors: u32) -> Self {
        let mut header = Self::new_zeroed();
        header.cookie = COOKIE;
        header.offset = offset.into();
        header.sectors = sectors.into();
        header.version = VERSION.into();
        header.checksum = u32::MAX.into();
        header
    }

    /// A header of the first 512 of `bytes`; missing ones become zeros.
    pub fn from_slice(bytes: &[u8]) -> Self {
        crate::from_prefix(bytes)
    }

    /// The checksum that this header should carry for `map`, of which only the covered bytes count.
    pub fn expected_checksum(&self, map: &[u8], disk_size: u64) -> u32 {
        let covered = map.get(..covered_len(disk_size)).unwrap_or(map);
        let signed = self.version.get() == VERSION_SIGNED;
        let sum = covered.iter().fold(0_u32, |sum, &byte| {
            sum.wrapping_add(if signed {
                i32::from(i8::from_ne_bytes([byte])).cast_unsigned()
            } else {
                byte.into()
            })
        });
        !sum
    }

    /// What is said of the key if the image is encrypted.
    pub fn key_hash(&self) -> Option<KeyHash> {
        let encrypted = self.cookie == COOKIE && self.key_cookie == 1;
        encrypted.then_some(KeyHash { nonce: self.key_nonce, hash: self.key_hash })
    }

    /// Says this of the key.
    pub fn set_key_hash(&mut self, key: KeyHash) {
        self.key_cookie = 1;
        self.key_nonce = key.nonce;
        self.key_hash = key.hash;
    }
}

/// Sectors of a map for a table of `entries` entries.
pub fn sectors_for(entries: u32) -> u32 {
    entries.div_ceil(8).div_ceil(512).max(1)
}

/// Bytes of the map that the checksum covers. libvhd computes them from the disk size, as if every block had 2 MiB, and
/// rounds a part of 16 MiB down; what lies beyond is not kept by it either.
pub fn covered_len(disk_size: u64) -> usize {
    let bytes = (disk_size >> 24).max(1).next_multiple_of(512);
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The batmap of an open image.
#[derive(Debug)]
pub(crate) struct Batmap {
    /// The header as it will be written, but for the checksum.
    pub(crate) header: RawBatmapHeader,
    /// Byte offset of the header.
    pub(crate) offset: u64,
    map: Vec<u8>,
    covered_bits: u32,
    changed: bool,
}

impl Batmap {
    /// A batmap with the given map; `changed` if it must be written even when no bit changes any more.
    pub(crate) fn new(
        header: RawBatmapHeader,
        offset: u64,
        map: Vec<u8>,
        disk_size: u64,
        changed: bool,
    ) -> Self {
        let covered = covered_len(disk_size).min(map.len()).saturating_mul(8);
        Self { header, offset, map, covered_bits: u32::try_from(covered).unwrap_or(u32::MAX), changed }
    }

    /// First byte behind the map.
    pub(crate) fn end(&self) -> u64 {
        map_end(&self.header).unwrap_or(u64::MAX)
    }

    pub(crate) fn map(&self) -> &[u8] {
        &self.map
    }

    /// Makes the image an encrypted one.
    pub(crate) fn set_key_hash(&mut self, key: KeyHash) {
        self.header.set_key_hash(key);
        self.changed = true;
    }

    /// Sets the marker, to be written even if it was the same.
    pub(crate) fn set_marker(&mut self, marker: u8) {
        self.header.marker = marker;
        self.changed = true;
    }

    /// Notes that `block` is completely written.
    pub(crate) fn set(&mut self, block: u32) {
        if block < self.covered_bits && !bitmap::get(&self.map, block) {
            bitmap::set(&mut self.map, block..block.saturating_add(1));
            self.changed = true;
        }
    }

    /// Covers a disk of `disk_size` bytes. Bits that were not covered before have meant nothing: only those stay that `full`
    /// confirms.
    pub(crate) fn grow(&mut self, disk_size: u64, full: impl Fn(u32) -> bool) {
        let before = self.covered_bits;
        self.retain(|block| block < before || full(block));
        let covered = covered_len(disk_size).min(self.map.len()).saturating_mul(8);
        self.covered_bits = u32::try_from(covered).unwrap_or(u32::MAX);
        self.changed = true;
    }

    /// What to write to have the batmap elsewhere: its header at byte `header`, its map of so many sectors at `offset`, for a
    /// disk of `disk_size` bytes. Of the bits that were not covered before only those stay that `full` confirms.
    pub(crate) fn moved(
        &self,
        header: u64,
        offset: u64,
        sectors: u32,
        disk_size: u64,
        full: impl Fn(u32) -> bool,
    ) -> Vec<MetaWrite> {
        let mut raw = self.header.clone();
        raw.offset = offset.into();
        raw.sectors = sectors.into();
        let mut map = self.map.clone();
        map.resize(usize::try_from(sectors).unwrap_or(0).saturating_mul(LEN), 0);
        let mut moved = Self::new(raw, header, map, disk_size, true);
        let before = self.covered_bits;
        moved.retain(|block| block < before || full(block));
        moved.writes(disk_size)
    }

    /// Clears the bits that `keep` does not confirm; returns how many there were.
    pub(crate) fn retain(&mut self, keep: impl Fn(u32) -> bool) -> u32 {
        let mut cleared = 0_u32;
        let mut block = 0_u32;
        for byte in &mut self.map {
            for bit in 0..8 {
                let mask = 0x80_u8 >> bit;
                if *byte & mask != 0 && !keep(block) {
                    *byte &= !mask;
                    cleared = cleared.saturating_add(1);
                }
                block = block.saturating_add(1);
            }
        }
        self.changed |= cleared > 0;
        cleared
    }

    /// The sealed header and the map, if they differ from what is on disk.
    pub(crate) fn to_write(&self, disk_size: u64) -> Option<(RawBatmapHeader, &[u8])> {
        let mut header = self.header.clone();
        header.checksum = header.expected_checksum(&self.map, disk_size).into();
        self.changed.then_some((header, &self.map))
    }

    /// The same as writes.
    pub(crate) fn writes(&self, disk_size: u64) -> Vec<MetaWrite> {
        let Some((header, map)) = self.to_write(disk_size) else { return Vec::new() };
        let map = MetaWrite { offset: header.offset.get(), bytes: map.to_vec() };
        let header = MetaWrite { offset: self.offset, bytes: header.as_bytes().to_vec() };
        vec![map, header]
    }
}

/// First byte behind the map that a header describes.
pub(crate) fn map_end(header: &RawBatmapHeader) -> Option<u64> {
    header.offset.get().checked_add(u64::from(header.sectors.get()).checked_mul(512)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_one_sector() {
        assert_eq!(size_of::<RawBatmapHeader>(), LEN);
        let header = RawBatmapHeader::new(2560, 1);
        assert_eq!(header.expected_checksum(&[0; 512], 64 << 20), u32::MAX);
    }

    #[test]
    fn checksums_of_the_old_version_are_signed() {
        let mut header = RawBatmapHeader::new(2560, 1);
        assert_eq!(header.expected_checksum(&[0x80, 4], 64 << 20), !0x84);
        header.version = VERSION_SIGNED.into();
        assert_eq!(header.expected_checksum(&[0x80, 4], 64 << 20), !(-124_i32).cast_unsigned());
    }

    #[test]
    fn bits_outside_the_checksum_are_never_set() {
        // 8193 MiB: 4097 blocks of 2 MiB, one more than the covered sector has bits.
        let size = 8194 << 20;
        assert_eq!(covered_len(size), 512);
        let mut batmap = Batmap::new(RawBatmapHeader::new(2560, 2), 2048, vec![0; 1024], size, false);
        batmap.set(4096);
        assert!(batmap.to_write(size).is_none());
        batmap.set(4095);
        assert_eq!(batmap.to_write(size).unwrap().1[511], 1);
    }

    #[test]
    fn unconfirmed_bits_are_cleared() {
        let mut batmap = Batmap::new(RawBatmapHeader::new(0, 1), 0, vec![0xff; 2], 64 << 20, false);
        assert_eq!(batmap.retain(|block| block == 9), 15);
        assert_eq!(batmap.map(), [0, 0x40]);
        assert!(batmap.to_write(64 << 20).is_some());
    }
}
