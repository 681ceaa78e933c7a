//! How an image is divided: clusters, tables of clusters, and the slices in which tables are read and cached.

/// Bits of a sector's size.
pub(super) const SECTOR_BITS: u32 = 9;

/// The largest slice of an L2 table, in bits of its bytes. QEMU measured that small slices pay: 4 KiB is what a disk reads
/// and writes at the price of less.
const L2_SLICE_BITS: u32 = 12;

/// The largest slice of a refcount block, in bits of its bytes: what one [`format::Load`] may ask for.
const REFCOUNT_SLICE_BITS: u32 = 16;

/// First byte behind all that an entry of a table can name.
pub(super) const MAX_OFFSET: u64 = 1 << 56;

/// The sizes that follow from the header. All are powers of two, kept as the exponent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of a cluster: 9..=21.
    pub(super) cluster_bits: u32,
    /// Bits of a reference count: 0..=6.
    pub(super) refcount_order: u32,
    /// Entries of L2 tables have 16 bytes and tell of 32 subclusters each.
    pub(super) extended: bool,
    /// Version 2 knows no zero clusters.
    pub(super) version: u32,
}

/// 2 to the power of `bits`.
pub(super) const fn exp(bits: u32) -> u64 {
    1_u64.wrapping_shl(bits)
}

/// `value` divided by 2 to the power of `bits`.
pub(super) const fn down(value: u64, bits: u32) -> u64 {
    value.wrapping_shr(bits)
}

/// `value` times 2 to the power of `bits`; all bits set if that is too much.
pub(super) const fn up(value: u64, bits: u32) -> u64 {
    value.saturating_mul(exp(bits))
}

/// The rest of `value` divided by 2 to the power of `bits`.
pub(super) const fn rest(value: u64, bits: u32) -> u64 {
    value & exp(bits).wrapping_sub(1)
}

/// A number that is known to be small, as an index into memory.
pub(super) fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The big-endian number at byte `at`; zeros beyond the end.
pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()).map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

/// The big-endian number at byte `at`; zeros beyond the end.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<4>()).map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// Puts bytes at `at`, as far as there is room.
pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// Numbers that follow each other, as ranges.
pub(super) fn runs(sorted: impl IntoIterator<Item = u64>) -> Vec<std::ops::Range<u64>> {
    let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
    for number in sorted {
        match runs.last_mut() {
            Some(run) if run.end == number => run.end = number.saturating_add(1),
            Some(run) if run.contains(&number) => {}
            _ => runs.push(number..number.saturating_add(1)),
        }
    }
    runs
}

impl Geometry {
    /// Bytes of a cluster.
    pub(super) fn cluster(&self) -> u64 {
        exp(self.cluster_bits)
    }

    /// Bits of the number of sectors in a cluster.
    pub(super) fn sector_bits(&self) -> u32 {
        self.cluster_bits.saturating_sub(SECTOR_BITS)
    }

    /// Bits of the bytes of an entry in an L2 table.
    pub(super) fn entry_bits(&self) -> u32 {
        if self.extended { 4 } else { 3 }
    }

    /// Bits of the number of entries in an L2 table.
    pub(super) fn l2_bits(&self) -> u32 {
        self.cluster_bits.saturating_sub(self.entry_bits())
    }

    /// Bits of the number of bytes in a slice of an L2 table.
    pub(super) fn slice_bits(&self) -> u32 {
        self.cluster_bits.min(L2_SLICE_BITS)
    }

    /// Bits of the number of entries in a slice of an L2 table.
    pub(super) fn slice_entries(&self) -> u32 {
        self.slice_bits().saturating_sub(self.entry_bits())
    }

    /// Bits of the number of slices in an L2 table.
    pub(super) fn slices(&self) -> u32 {
        self.cluster_bits.saturating_sub(self.slice_bits())
    }

    /// Bits of the number of reference counts in a block of them.
    pub(super) fn block_bits(&self) -> u32 {
        self.cluster_bits.saturating_add(3).saturating_sub(self.refcount_order)
    }

    /// Bits of the number of bytes in a slice of a refcount block.
    pub(super) fn refcount_slice_bits(&self) -> u32 {
        self.cluster_bits.min(REFCOUNT_SLICE_BITS)
    }

    /// Bits of the number of reference counts in a slice.
    pub(super) fn refcount_slice_counts(&self) -> u32 {
        self.refcount_slice_bits().saturating_add(3).saturating_sub(self.refcount_order)
    }

    /// The largest reference count.
    pub(super) fn max_refcount(&self) -> u64 {
        match exp(self.refcount_order) {
            64 => u64::MAX,
            bits => 1_u64.wrapping_shl(u32::try_from(bits).unwrap_or(0)).wrapping_sub(1),
        }
    }

    /// Entries of an L1 table for a disk of so many bytes.
    pub(super) fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(exp(self.cluster_bits.saturating_add(self.l2_bits())))
    }

    /// `offset` rounded up to a cluster.
    pub(super) fn round_up(&self, offset: u64) -> u64 {
        offset.checked_next_multiple_of(self.cluster()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sizes_of_64_kib_clusters_are_those_that_the_format_text_gives() {
        let g = Geometry { cluster_bits: 16, refcount_order: 4, extended: false, version: 3 };
        assert_eq!((g.l2_bits(), g.slice_entries(), g.slices()), (13, 9, 4));
        assert_eq!((g.block_bits(), g.refcount_slice_counts(), g.max_refcount()), (15, 15, 65535));
        assert_eq!(g.l1_entries(1 << 40), 2048);
        let small = Geometry { cluster_bits: 9, refcount_order: 6, extended: false, version: 3 };
        assert_eq!((small.l2_bits(), small.slice_entries(), small.slices()), (6, 6, 0));
        assert_eq!((small.block_bits(), small.max_refcount()), (6, u64::MAX));
        let bit = Geometry { refcount_order: 0, ..g };
        assert_eq!((bit.block_bits(), bit.max_refcount()), (19, 1));
    }

    #[test]
    fn neighbours_are_one_run() {
        assert_eq!(runs([1, 2, 3, 7, 7, 8, 10]), [1..4, 7..9, 10..11]);
    }
}
