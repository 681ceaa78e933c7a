//! The directory (L1), whole in memory.

use std::ops::Range;

use format::MetaWrite;
use md5::{Digest, Md5};

use super::SECTOR;

/// Bytes of a write when all of the directory is written.
const CHUNK: usize = 64 << 10;

/// In which order the bytes of an entry are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Big,
    /// As Xen 3.2 and before wrote it on x86.
    Little,
}

/// The directory with the whole sectors that it lies in, since it may begin in the middle of the header's.
#[derive(Debug, Clone)]
pub(super) struct Directory {
    /// Byte offset of the first sector.
    offset: u64,
    /// The directory's first byte, counted from there.
    lead: usize,
    entries: u32,
    order: Order,
    bytes: Vec<u8>,
}

impl Directory {
    /// The sectors that a directory of `len` bytes at `offset` lies in.
    pub(super) fn sectors_of(offset: u64, len: u64) -> Range<u64> {
        let start = offset & !SECTOR.saturating_sub(1);
        start..offset.saturating_add(len).next_multiple_of(SECTOR)
    }

    /// The directory of `entries` entries at byte `offset`, of whose sectors `bytes` is the content.
    pub(super) fn new(offset: u64, entries: u32, bytes: Vec<u8>) -> Self {
        let lead = offset & SECTOR.saturating_sub(1);
        Self {
            offset: offset.saturating_sub(lead),
            lead: usize::try_from(lead).unwrap_or(0),
            entries,
            order: Order::Big,
            bytes,
        }
    }

    pub(super) fn set_order(&mut self, order: Order) {
        self.order = order;
    }

    pub(super) fn order(&self) -> Order {
        self.order
    }

    /// The entry of a table, in either order.
    pub(super) fn get_as(&self, order: Order, table: u32) -> u64 {
        let bytes =
            self.bytes.get(self.at(table)..).and_then(<[u8]>::first_chunk).copied().unwrap_or_default();
        match order {
            Order::Big => u64::from_be_bytes(bytes),
            Order::Little => u64::from_le_bytes(bytes),
        }
    }

    /// The entry of a table: 0 or its byte offset.
    pub(super) fn get(&self, table: u32) -> u64 {
        self.get_as(self.order, table)
    }

    /// All entries.
    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.entries).map(|table| self.get(table))
    }

    /// The byte range of the sectors that the directory lies in.
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.bytes.len() as u64)
    }

    /// Takes new entries, which are on disk by now.
    pub(super) fn set(&mut self, entries: &[(u32, u64)]) {
        for &(table, place) in entries {
            let (at, entry) = (self.at(table), self.encode(place));
            put(&mut self.bytes, at, &entry);
        }
    }

    /// The sectors with some new entries. `entries` is in ascending order.
    pub(super) fn writes(&self, entries: &[(u32, u64)]) -> Vec<MetaWrite> {
        let sector_of = |table| self.at(table) >> 9;
        let groups = entries.chunk_by(|a, b| sector_of(a.0) == sector_of(b.0));
        let write = |group: &[(u32, u64)]| {
            let start = sector_of(group.first()?.0) << 9;
            let mut bytes = self.bytes.get(start..start.saturating_add(512))?.to_vec();
            for &(table, place) in group {
                put(&mut bytes, self.at(table).saturating_sub(start), &self.encode(place));
            }
            Some(MetaWrite { offset: self.offset.saturating_add(start as u64), bytes })
        };
        groups.filter_map(write).collect()
    }

    /// The same directory, big endian, at another place, a multiple of 512.
    pub(super) fn moved(&self, offset: u64) -> Directory {
        let mut bytes: Vec<u8> = self.iter().flat_map(u64::to_be_bytes).collect();
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Directory::new(offset, self.entries, bytes)
    }

    /// All of it.
    pub(super) fn all_writes(&self) -> Vec<MetaWrite> {
        let chunks = (self.offset..).step_by(CHUNK).zip(self.bytes.chunks(CHUNK));
        chunks.map(|(offset, bytes)| MetaWrite { offset, bytes: bytes.to_vec() }).collect()
    }

    /// Xen's checksum of the entries.
    pub(super) fn checksum(&self) -> u32 {
        checksum(self.iter())
    }

    fn at(&self, table: u32) -> usize {
        usize::try_from(table).unwrap_or(usize::MAX).saturating_mul(8).saturating_add(self.lead)
    }

    fn encode(&self, place: u64) -> [u8; 8] {
        match self.order {
            Order::Big => place.to_be_bytes(),
            Order::Little => place.to_le_bytes(),
        }
    }
}

/// Xen's checksum of a directory: the first four bytes of the MD5 over its big endian entries, as an x86 processor reads
/// them (`gen_cksum`).
pub(super) fn checksum(entries: impl Iterator<Item = u64>) -> u32 {
    let mut md5 = Md5::new();
    for entry in entries {
        md5.update(entry.to_be_bytes());
    }
    md5.finalize().first_chunk().map_or(0, |&bytes| u32::from_le_bytes(bytes))
}

fn put(bytes: &mut [u8], at: usize, entry: &[u8; 8]) {
    if let Some(to) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *to = *entry;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_the_middle_of_a_sector_leaves_the_rest_as_it_is() {
        let bytes: Vec<u8> = (0..1024_u32).map(|i| (i % 251) as u8).collect();
        let directory = Directory::new(48, 100, bytes.clone());
        assert_eq!(Directory::sectors_of(48, 800), 0..1024);
        let writes = directory.writes(&[(0, 0x1122), (57, 0x33), (58, 0x44), (99, 0x55)]);
        assert_eq!(
            writes.iter().map(|w| (w.offset, w.bytes.len())).collect::<Vec<_>>(),
            [(0, 512), (512, 512)]
        );
        let written: Vec<u8> = writes.iter().flat_map(|w| w.bytes.clone()).collect();
        assert_eq!(written[..48], bytes[..48]);
        assert_eq!(written[48..56], [0, 0, 0, 0, 0, 0, 0x11, 0x22]);
        assert_eq!(written[511..520], [0x33, 0, 0, 0, 0, 0, 0, 0, 0x44]);
        assert_eq!(written[520..840], bytes[520..840]);
        assert_eq!(written[848..], bytes[848..]);
    }

    #[test]
    fn the_checksum_is_that_of_xens_own_tools() {
        // From images that qcow-create of Xen 4.2 made.
        assert_eq!(checksum([0; 8].into_iter()), 0x7d3c_5d3b);
    }

    #[test]
    fn a_little_endian_directory_is_moved_as_a_big_endian_one() {
        let mut directory = Directory::new(4096, 3, vec![0; 512]);
        directory.set_order(Order::Little);
        directory.set(&[(1, 8192)]);
        assert_eq!(directory.writes(&[(2, 0x10)])[0].bytes[9..18], [0x20, 0, 0, 0, 0, 0, 0, 0x10, 0]);
        let moved = directory.moved(12288);
        assert_eq!(moved.iter().collect::<Vec<_>>(), [0, 8192, 0]);
        assert_eq!((moved.range(), moved.order()), (12288..12800, Order::Big));
    }
}
