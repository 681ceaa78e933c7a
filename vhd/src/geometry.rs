//! Cylinders, heads and sectors, by the algorithm of the VHD specification's appendix.

/// Sectors of the largest disk that a geometry can name.
const MAX_SECTORS: u64 = 65_535 * 16 * 255;
/// From this size on every disk has 255 sectors a track.
const LARGE: u64 = 65_535 * 16 * 63;

/// The geometry field for a disk of `sectors` sectors: cylinders in the upper 16 bits, then heads, then sectors a
/// track. The product is rounded down, so it may be smaller than the disk.
pub fn for_sectors(sectors: u64) -> u32 {
    let sectors = sectors.clamp(1, MAX_SECTORS);
    let (per_track, heads, tracks) =
        if sectors >= LARGE { (255, 16, sectors.div_euclid(255)) } else { small(sectors) };
    let cylinders = u16::try_from(tracks.checked_div(u64::from(heads)).unwrap_or(0)).unwrap_or(u16::MAX);
    let [high, low] = cylinders.to_be_bytes();
    u32::from_be_bytes([high, low, heads, per_track])
}

/// Sectors a track, heads, and tracks (cylinders times heads) of a disk below [`LARGE`].
fn small(sectors: u64) -> (u8, u8, u64) {
    let tracks = sectors.div_euclid(17);
    let heads = tracks.div_ceil(1024).max(4);
    match u8::try_from(heads) {
        Ok(heads @ ..=16) if tracks < u64::from(heads).saturating_mul(1024) => return (17, heads, tracks),
        _ => {}
    }
    let tracks = sectors.div_euclid(31);
    if tracks < 16 * 1024 {
        return (31, 16, tracks);
    }
    (63, 16, sectors.div_euclid(63))
}

/// Cylinders, heads and sectors a track of a geometry field.
pub fn split(geometry: u32) -> (u16, u8, u8) {
    let [high, low, heads, per_track] = geometry.to_be_bytes();
    (u16::from_be_bytes([high, low]), heads, per_track)
}

/// Bytes of the disk that a geometry field describes.
pub fn bytes(geometry: u32) -> u64 {
    let (cylinders, heads, per_track) = split(geometry);
    // At most 2^16 * 2^8 * 2^8 * 2^9: no overflow.
    u64::from(cylinders)
        .saturating_mul(u64::from(heads))
        .saturating_mul(u64::from(per_track))
        .saturating_mul(512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 2048;

    #[test]
    fn known_geometries() {
        assert_eq!(split(for_sectors(64 * MIB)), (963, 8, 17));
        assert_eq!(split(for_sectors(16 * MIB)), (481, 4, 17));
        assert_eq!(split(for_sectors(100 * MIB)), (1003, 12, 17));
        assert_eq!(bytes(for_sectors(100 * MIB)), 104_761_344);
        assert_eq!(split(for_sectors(0)), (0, 4, 17));
        assert_eq!(split(for_sectors(u64::MAX)), (65535, 16, 255));
    }

    proptest! {
        #[test]
        fn never_larger_than_the_disk(sectors in 68_u64..MAX_SECTORS) {
            let described = bytes(for_sectors(sectors)) / 512;
            prop_assert!(described <= sectors && described > sectors - sectors / 4 - 4096);
        }
    }
}
