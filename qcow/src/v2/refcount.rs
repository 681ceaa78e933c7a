//! Reference counts: of each cluster of the file, how many refer to it.
//!
//! The table of blocks is wholly in memory (8 bytes for each 2 GiB of the file with clusters of 64 KiB and counts of 16
//! bits), blocks are in slices of at most 64 KiB. What is in memory is what holds: a change is made here first, and the
//! steps that bring it to the file are taken by whoever made it. At no time are two such sets of steps under way, so that no
//! older bytes can overtake newer ones.

use std::collections::BTreeMap;
use std::ops::Range;

use format::{Load, MetaWrite};

use super::Error;
use super::cache::Cache;
use super::geometry::{Geometry, MAX_OFFSET, SECTOR_BITS, down, exp, index, rest, up};
use super::image::REFCOUNT_KEY;

/// Memory for slices of refcount blocks.
const CACHE_BYTES: u64 = 4 << 20;

#[derive(Debug)]
pub(super) struct Refcounts {
    geometry: Geometry,
    /// Byte offsets of the blocks, 0 for none, as they are in the file.
    pub(super) table: Vec<u64>,
    pub(super) cache: Cache,
    /// Bytes of slices that differ from the file.
    dirty: BTreeMap<u64, Range<usize>>,
}

/// What is known of a reference count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Count {
    Known(u64),
    /// There is no block that tells of the cluster: nobody refers to it.
    NoBlock,
    /// To be read first.
    Missing(Load),
}

impl Refcounts {
    pub(super) fn new(geometry: Geometry, table: Vec<u64>) -> Self {
        let capacity = index(down(CACHE_BYTES, geometry.refcount_slice_bits()));
        Self { geometry, table, cache: Cache::new(capacity), dirty: BTreeMap::new() }
    }

    /// The number of the slice that tells of a cluster.
    pub(super) fn slice_of(&self, cluster: u64) -> u64 {
        down(cluster, self.geometry.refcount_slice_counts())
    }

    /// The first cluster that a slice tells of.
    pub(super) fn first_of(&self, slice: u64) -> u64 {
        up(slice, self.geometry.refcount_slice_counts())
    }

    /// Bits of a count, as the exponent of 2.
    pub(super) fn order(&self) -> u32 {
        self.geometry.refcount_order
    }

    /// The first cluster of the next slice.
    pub(super) fn next_slice(&self, cluster: u64) -> u64 {
        up(self.slice_of(cluster).saturating_add(1), self.geometry.refcount_slice_counts())
    }

    /// The first cluster of the next block.
    pub(super) fn next_block(&self, cluster: u64) -> u64 {
        up(down(cluster, self.geometry.block_bits()).saturating_add(1), self.geometry.block_bits())
    }

    /// The byte offset of the block that tells of a cluster; 0 for none.
    pub(super) fn block(&self, cluster: u64) -> Result<u64, Error> {
        let entry = self.table.get(index(down(cluster, self.geometry.block_bits()))).copied().unwrap_or(0);
        if rest(entry, self.geometry.cluster_bits) != 0 || entry >= MAX_OFFSET {
            return Err(Error::corrupt("refcount table entry", entry, "is no place for a block"));
        }
        Ok(entry)
    }

    /// The reference count of a cluster.
    pub(super) fn get(&self, cluster: u64) -> Result<Count, Error> {
        let g = &self.geometry;
        let key = self.slice_of(cluster);
        if let Some(slice) = self.cache.get(key) {
            return Ok(Count::Known(count(
                slice,
                rest(cluster, g.refcount_slice_counts()),
                g.refcount_order,
            )));
        }
        let block = self.block(cluster)?;
        if block == 0 {
            return Ok(Count::NoBlock);
        }
        let slices = g.cluster_bits.saturating_sub(g.refcount_slice_bits());
        let offset = block.saturating_add(up(rest(key, slices), g.refcount_slice_bits()));
        let len = u32::try_from(exp(g.refcount_slice_bits())).unwrap_or(0);
        Ok(Count::Missing(Load { key: key | REFCOUNT_KEY, offset, len }))
    }

    /// Sets the count of a cluster whose slice is in memory; false if it is not, or if the value does not fit.
    pub(super) fn set(&mut self, cluster: u64, value: u64) -> bool {
        let g = &self.geometry;
        let key = down(cluster, g.refcount_slice_counts());
        let at = rest(cluster, g.refcount_slice_counts());
        let Some(slice) = self.cache.get_mut(key).filter(|_| value <= g.max_refcount()) else { return false };
        let bytes = set_count(slice, at, g.refcount_order, value);
        let sector = |byte: usize| byte & !511;
        let (from, to) = (sector(bytes.start), sector(bytes.end.saturating_sub(1)).saturating_add(512));
        let dirty = self.dirty.entry(key).or_insert(from..to);
        *dirty = dirty.start.min(from)..dirty.end.max(to);
        true
    }

    /// Keeps the counts of these clusters in memory.
    pub(super) fn keep(&mut self, clusters: Range<u64>) {
        clusters.for_each(|cluster| self.cache.pin(self.slice_of(cluster)));
    }

    /// Ends [`Refcounts::keep`].
    pub(super) fn let_go(&mut self, clusters: Range<u64>) {
        clusters.for_each(|cluster| self.cache.unpin(self.slice_of(cluster)));
    }

    /// The writes that bring all changes so far to the file.
    pub(super) fn take_writes(&mut self) -> Vec<MetaWrite> {
        let dirty = std::mem::take(&mut self.dirty);
        let g = self.geometry;
        let writes = dirty.into_iter().filter_map(|(key, range)| {
            let block = self.block(up(key, g.refcount_slice_counts())).ok()?;
            let slices = g.cluster_bits.saturating_sub(g.refcount_slice_bits());
            let slice = block.saturating_add(up(rest(key, slices), g.refcount_slice_bits()));
            let bytes = self.cache.get(key)?.get(range.clone())?.to_vec();
            Some(MetaWrite { offset: slice.saturating_add(range.start as u64), bytes })
        });
        writes.collect()
    }

    /// Makes an empty block at byte `host` part of the table, with all its slices in memory.
    pub(super) fn add_block(&mut self, number: u64, host: u64) {
        let g = self.geometry;
        if self.table.len() <= index(number) {
            self.table.resize(index(number).saturating_add(1), 0);
        }
        if let Some(entry) = self.table.get_mut(index(number)) {
            *entry = host;
        }
        let slices = g.cluster_bits.saturating_sub(g.refcount_slice_bits());
        for slice in 0..exp(slices) {
            let bytes = vec![0; index(exp(g.refcount_slice_bits()))];
            self.cache.insert(up(number, slices).saturating_add(slice), bytes.into());
        }
    }

    /// The sector of the table that has the entry of block `number`, by its index.
    pub(super) fn table_sector(&self, number: u64) -> (u64, Vec<u8>) {
        let entries = exp(SECTOR_BITS.saturating_sub(3));
        let first = number & !entries.wrapping_sub(1);
        let entry = |at: u64| self.table.get(index(at)).copied().unwrap_or(0).to_be_bytes();
        let bytes = (first..first.saturating_add(entries)).flat_map(entry).collect();
        (first.saturating_mul(8), bytes)
    }
}

/// The count at `at` in a slice. Counts of less than a byte fill each from its lowest bit.
pub(super) fn count(slice: &[u8], at: u64, order: u32) -> u64 {
    let place = place(at, order);
    let bytes = slice.get(place.bytes).unwrap_or_default();
    let number = bytes.iter().fold(0_u64, |number, &byte| number.wrapping_shl(8) | u64::from(byte));
    number.wrapping_shr(place.shift) & place.mask
}

/// Sets the count at `at`; returns the bytes that it changed.
pub(super) fn set_count(slice: &mut [u8], at: u64, order: u32, value: u64) -> Range<usize> {
    let place = place(at, order);
    let bytes = slice.get_mut(place.bytes.clone()).unwrap_or_default();
    if let [byte] = bytes {
        let mask = u8::try_from(place.mask).unwrap_or(u8::MAX).wrapping_shl(place.shift);
        let value = u8::try_from(value & place.mask).unwrap_or(u8::MAX).wrapping_shl(place.shift);
        *byte = (*byte & !mask) | value;
    } else {
        let all = value.to_be_bytes();
        let used = all.get(all.len().saturating_sub(bytes.len())..).unwrap_or_default();
        for (to, from) in bytes.iter_mut().zip(used) {
            *to = *from;
        }
    }
    place.bytes
}

struct Bits {
    bytes: Range<usize>,
    shift: u32,
    mask: u64,
}

fn place(at: u64, order: u32) -> Bits {
    if order >= 3 {
        let width = exp(order.saturating_sub(3));
        let from = index(at.saturating_mul(width));
        let mask =
            if order >= 6 { u64::MAX } else { exp(u32::try_from(exp(order)).unwrap_or(0)).wrapping_sub(1) };
        return Bits { bytes: from..from.saturating_add(index(width)), shift: 0, mask };
    }
    let in_byte = 3_u32.saturating_sub(order);
    let byte = index(down(at, in_byte));
    let shift = u32::try_from(up(rest(at, in_byte), order)).unwrap_or(0);
    Bits {
        bytes: byte..byte.saturating_add(1),
        shift,
        mask: exp(u32::try_from(exp(order)).unwrap_or(0)).wrapping_sub(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_keep_apart() {
        for order in 0..=6 {
            let g = Geometry { cluster_bits: 9, refcount_order: order, extended: false, version: 3 };
            let mut slice = vec![0; 512];
            let total = exp(g.block_bits());
            let value = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15) & g.max_refcount();
            for at in 0..total {
                let range = set_count(&mut slice, at, order, value(at));
                assert!(range.end <= 512);
            }
            assert!((0..total).all(|at| count(&slice, at, order) == value(at)), "order {order}");
        }
    }

    #[test]
    fn small_counts_begin_at_the_lowest_bit_and_large_ones_are_big_endian() {
        let mut slice = vec![0; 512];
        set_count(&mut slice, 1, 0, 1);
        set_count(&mut slice, 9, 1, 2);
        set_count(&mut slice, 4, 4, 0x1234);
        assert_eq!((slice[0], slice[2], &slice[8..10]), (2, 8, &[0x12, 0x34][..]));
    }

    #[test]
    fn only_changed_sectors_are_written() {
        let g = Geometry { cluster_bits: 16, refcount_order: 4, extended: false, version: 3 };
        let mut counts = Refcounts::new(g, vec![0x20000]);
        assert!(!counts.set(0, 1), "not in memory");
        let Count::Missing(load) = counts.get(300).unwrap() else { panic!() };
        assert_eq!((load.offset, load.len), (0x20000, 65536));
        counts.cache.insert(0, vec![0; 65536].into());
        assert!(counts.set(300, 1) && counts.set(600, 7) && !counts.set(1, 65536));
        let writes = counts.take_writes();
        assert_eq!((writes.len(), writes[0].offset, writes[0].bytes.len()), (1, 0x20200, 1024));
        assert!(counts.take_writes().is_empty());
        assert_eq!(counts.get(600).unwrap(), Count::Known(7));
        assert_eq!(counts.get(40000).unwrap(), Count::NoBlock);
    }
}
