//! Entries of L1 and L2 tables, by QEMU's docs/interop/qcow2.txt.

use format::Packed;

use super::Error;
use super::geometry::{Geometry, SECTOR_BITS, exp, rest};

/// Set in an entry: nobody else refers to the cluster, so it may be written in place.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Set in an entry of version 3: the cluster reads as zeros.
pub(super) const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Where one cluster of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cluster {
    /// Not in this file.
    Absent,
    /// It reads as zeros. It may have a place in the file all the same.
    Zero { host: Option<u64> },
    /// At byte `host`; `copied` if nobody else refers to it.
    Data { host: u64, copied: bool },
    /// Compressed.
    Packed(Packed),
}

/// The byte offset of the table that an L1 entry names (0: none), and whether nobody else refers to it.
pub(super) fn l1(entry: u64, geometry: &Geometry) -> Result<(u64, bool), Error> {
    let offset = entry & OFFSET;
    if entry & !(OFFSET | COPIED) != 0 {
        return Err(Error::corrupt("L1 entry", entry, "has reserved bits set"));
    }
    if rest(offset, geometry.cluster_bits) != 0 {
        return Err(Error::corrupt("L1 entry", entry, "is not a multiple of the cluster size"));
    }
    Ok((offset, entry & COPIED != 0))
}

/// What the first eight bytes of an L2 entry say. With extended entries, which clusters are zeros is in the other eight.
pub(super) fn l2(entry: u64, geometry: &Geometry) -> Result<Cluster, Error> {
    if entry & COMPRESSED != 0 {
        return packed(entry, geometry).map(Cluster::Packed);
    }
    let host = entry & OFFSET;
    let zero = entry & ZERO != 0;
    if entry & !(OFFSET | COPIED | ZERO) != 0 || (zero && (geometry.version < 3 || geometry.extended)) {
        return Err(Error::corrupt("L2 entry", entry, "has reserved bits set"));
    }
    if rest(host, geometry.cluster_bits) != 0 {
        return Err(Error::corrupt("L2 entry", entry, "is not a multiple of the cluster size"));
    }
    Ok(match (zero, host) {
        (true, _) => Cluster::Zero { host: (host != 0).then_some(host) },
        (false, 0) => Cluster::Absent,
        (false, host) => Cluster::Data { host, copied: entry & COPIED != 0 },
    })
}

fn packed(entry: u64, geometry: &Geometry) -> Result<Packed, Error> {
    if entry & COPIED != 0 {
        return Err(Error::corrupt(
            "L2 entry",
            entry,
            "is compressed and may not be shared at the same time",
        ));
    }
    // The larger clusters are, the fewer bits are left for the offset.
    let offset_bits = 62_u32.saturating_sub(geometry.cluster_bits.saturating_sub(8));
    let offset = entry & exp(offset_bits).wrapping_sub(1);
    let sectors = (entry & !COMPRESSED).wrapping_shr(offset_bits).saturating_add(1);
    let len = sectors.saturating_mul(exp(SECTOR_BITS)).saturating_sub(rest(offset, SECTOR_BITS));
    Ok(Packed {
        offset,
        // At most two clusters of 2 MiB.
        len: u32::try_from(len).unwrap_or(u32::MAX),
        sectors: u32::try_from(exp(geometry.sector_bits())).unwrap_or(u32::MAX),
    })
}

/// What the second eight bytes of an extended entry say of one of its 32 subclusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Subcluster {
    Absent,
    Zero,
    Data,
}

/// The state of subcluster `number`.
pub(super) fn subcluster(bitmap: u64, number: u32) -> Result<Subcluster, Error> {
    let bit = |at: u32| bitmap.wrapping_shr(at) & 1 != 0;
    match (bit(number), bit(number.wrapping_add(32))) {
        (false, false) => Ok(Subcluster::Absent),
        (false, true) => Ok(Subcluster::Zero),
        (true, false) => Ok(Subcluster::Data),
        (true, true) => {
            Err(Error::corrupt("extended L2 entry", bitmap, "has a subcluster that is both data and zeros"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const G: Geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended: false, version: 3 };

    #[test]
    fn every_kind_of_l2_entry_is_told_apart() {
        assert_eq!(l2(0, &G).unwrap(), Cluster::Absent);
        assert_eq!(l2(1, &G).unwrap(), Cluster::Zero { host: None });
        assert_eq!(l2(0x50001 | COPIED, &G).unwrap(), Cluster::Zero { host: Some(0x50000) });
        assert_eq!(l2(0x50000 | COPIED, &G).unwrap(), Cluster::Data { host: 0x50000, copied: true });
        assert_eq!(l2(0x50000, &G).unwrap(), Cluster::Data { host: 0x50000, copied: false });
        // 54 bits of offset; two additional sectors.
        let packed = Packed { offset: 0x5_0123, len: 3 * 512 - 0x123, sectors: 128 };
        assert_eq!(l2((1 << 62) | (2 << 54) | 0x5_0123, &G).unwrap(), Cluster::Packed(packed));
    }

    #[test]
    fn reserved_bits_and_crooked_offsets_are_corruption() {
        for entry in [2, 0x50200, 1 << 56, (1 << 61) | 0x50000, (3 << 62) | 0x50000] {
            assert!(matches!(l2(entry, &G), Err(Error::Corrupt { .. })), "{entry:#x}");
        }
        assert!(
            l2(1, &Geometry { version: 2, ..G }).is_err()
                && l2(1, &Geometry { extended: true, ..G }).is_err()
        );
        for entry in [1, 0x50200, 1 << 62] {
            assert!(l1(entry, &G).is_err(), "{entry:#x}");
        }
        assert_eq!(l1(0x50000 | COPIED, &G).unwrap(), (0x50000, true));
        assert!(subcluster((1 << 3) | (1 << 35), 3).is_err());
        assert_eq!(subcluster(1 << 35, 3).unwrap(), Subcluster::Zero);
    }
}
