//! The 512-byte footer, at the end of every image and, as a copy, at offset 0 of dynamic and differencing ones.
//!
//! Layout: Microsoft "Virtual Hard Disk Image Format Specification" 1.0; `hidden`, the creator `tap` and the poison
//! cookie are extensions of XenServer's libvhd (`vhd.h`). All numbers are big-endian.

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Uuid, checksum, geometry};

/// Length of a footer in bytes.
pub const LEN: usize = 512;
/// Length of the footer of early Virtual PC versions, which leave out the last byte.
pub const SHORT_LEN: usize = 511;
/// The cookie of every usable footer.
pub const COOKIE: [u8; 8] = *b"conectix";
/// The cookie that libvhd puts in while a journalled operation is unfinished.
pub const POISON: [u8; 8] = *b"v_poison";
/// `features`: this bit is always set.
pub const FEATURE_RESERVED: u32 = 2;
/// `features`: the image is temporary.
pub const FEATURE_TEMPORARY: u32 = 1;
/// The only file format version.
pub const FORMAT_VERSION: u32 = 0x0001_0000;
/// `creator` of images made by blktap and by this crate.
pub const CREATOR_TAP: [u8; 4] = *b"tap\0";
/// `creator_version` that this crate writes: a batmap of version 1.2 follows the table.
pub const TAP_VERSION: u32 = 0x0001_0003;
/// The version of blktap that may do without a batmap.
pub const TAP_VERSION_WITHOUT_BATMAP: u32 = 0x0001_0001;
/// `data_offset` of a fixed image, and of the header's unused field of that name.
pub const NO_OFFSET: u64 = u64::MAX;

/// How an image stores its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskType {
    /// The disk's bytes in order, then the footer.
    Fixed,
    /// Blocks allocated at first write; the rest reads as zeros.
    Dynamic,
    /// Blocks allocated at first write; the rest is read from the parent.
    Differencing,
}

impl DiskType {
    /// The type for the number in a footer; `None` for the deprecated and unknown ones.
    pub fn from_raw(raw: u32) -> Option<Self> {
        match raw {
            2 => Some(Self::Fixed),
            3 => Some(Self::Dynamic),
            4 => Some(Self::Differencing),
            _ => None,
        }
    }

    /// The number in a footer.
    pub fn raw(self) -> u32 {
        match self {
            Self::Fixed => 2,
            Self::Dynamic => 3,
            Self::Differencing => 4,
        }
    }
}

/// A footer exactly as it lies on disk. Nothing in it has been checked.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawFooter {
    /// [`COOKIE`] or [`POISON`].
    pub cookie: [u8; 8],
    /// Bit 0 temporary, bit 1 always set, others 0.
    pub features: U32,
    /// [`FORMAT_VERSION`].
    pub version: U32,
    /// Byte offset of the dynamic header; [`NO_OFFSET`] in fixed images.
    pub data_offset: U64,
    /// Creation time, see [`crate::time`].
    pub timestamp: U32,
    /// Program that made the image.
    pub creator: [u8; 4],
    /// Version of that program: major in the upper half.
    pub creator_version: U32,
    /// Operating system that it ran on.
    pub creator_os: [u8; 4],
    /// Disk size in bytes at creation.
    pub original_size: U64,
    /// Disk size in bytes now.
    pub current_size: U64,
    /// See [`geometry`].
    pub geometry: U32,
    /// See [`DiskType`].
    pub disk_type: U32,
    /// One's complement of the sum of all other bytes.
    pub checksum: U32,
    /// Identity of the image.
    pub uuid: Uuid,
    /// 1 if the image belongs to a saved machine state.
    pub saved: u8,
    /// 1 if storage managers should not show the image (extension of blktap).
    pub hidden: u8,
    /// Zeros.
    pub reserved: [u8; 426],
}

/// Why bytes are not a usable footer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FooterFault {
    /// Neither cookie.
    Cookie,
    /// The checksum does not match.
    Checksum,
    /// A good footer of an image whose journalled operation was interrupted.
    Poisoned,
}

impl RawFooter {
    /// A footer of a new image: everything but the identity of its data is filled in, the checksum too.
    pub fn new(disk_type: DiskType, size: u64, uuid: Uuid, timestamp: u32) -> Self {
        let mut footer = Self::new_zeroed();
        footer.cookie = COOKIE;
        footer.features = FEATURE_RESERVED.into();
        footer.version = FORMAT_VERSION.into();
        footer.data_offset = match disk_type {
            DiskType::Fixed => NO_OFFSET,
            DiskType::Dynamic | DiskType::Differencing => 512,
        }
        .into();
        footer.timestamp = timestamp.into();
        footer.creator = CREATOR_TAP;
        footer.creator_version = TAP_VERSION.into();
        footer.original_size = size.into();
        footer.current_size = size.into();
        footer.geometry = geometry::for_sectors(size.div_ceil(512)).into();
        footer.disk_type = disk_type.raw().into();
        footer.uuid = uuid;
        footer.seal();
        footer
    }

    /// A footer of `bytes`, which may lack the last byte as those of early Virtual PC do.
    pub fn from_slice(bytes: &[u8]) -> Self {
        crate::from_prefix(bytes)
    }

    /// The checksum that the footer should carry.
    pub fn expected_checksum(&self) -> u32 {
        let mut copy = self.clone();
        copy.checksum = 0.into();
        checksum(copy.as_bytes())
    }

    /// Sets the checksum.
    pub fn seal(&mut self) {
        self.checksum = self.expected_checksum().into();
    }

    /// A copy with the right checksum.
    pub fn sealed(&self) -> Self {
        let mut copy = self.clone();
        copy.seal();
        copy
    }

    /// Whether the bytes are a footer at all.
    pub fn verify(&self) -> Result<(), FooterFault> {
        if self.cookie != COOKIE && self.cookie != POISON {
            return Err(FooterFault::Cookie);
        }
        if !self.checksum_good() {
            return Err(FooterFault::Checksum);
        }
        if self.cookie == POISON {
            return Err(FooterFault::Poisoned);
        }
        Ok(())
    }

    fn checksum_good(&self) -> bool {
        if self.checksum.get() == self.expected_checksum() {
            return true;
        }
        // Versions 0.1 and 1.1 of blktap set `hidden` without a new checksum.
        let mut shown = self.clone();
        shown.hidden = 0;
        matches!(self.tap_version(), Some((0 | 1, 1)))
            && self.hidden != 0
            && self.checksum.get() == shown.expected_checksum()
    }

    /// Major and minor version of blktap if it made the image.
    pub fn tap_version(&self) -> Option<(u16, u16)> {
        let [a, b, c, d] = self.creator_version.get().to_be_bytes();
        (self.creator == CREATOR_TAP).then(|| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
    }

    /// True if the footer names the same image in the same place as `other`, whatever its changeable fields say.
    pub fn same_image(&self, other: &Self) -> bool {
        self.uuid == other.uuid && self.disk_type == other.disk_type && self.data_offset == other.data_offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer() -> RawFooter {
        RawFooter::new(DiskType::Dynamic, 64 << 20, Uuid([7; 16]), 1)
    }

    #[test]
    fn a_new_footer_is_valid_and_512_bytes() {
        assert_eq!(size_of::<RawFooter>(), LEN);
        assert_eq!(footer().verify(), Ok(()));
        assert_eq!(footer().tap_version(), Some((1, 3)));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        for i in 0..LEN {
            let mut bytes = footer().as_bytes().to_vec();
            bytes[i] ^= 0x40;
            assert!(RawFooter::from_slice(&bytes).verify().is_err(), "byte {i}");
        }
    }

    #[test]
    fn old_tap_versions_may_hide_without_a_new_checksum() {
        let mut old = footer();
        old.creator_version = 0x0001_0001.into();
        old.seal();
        old.hidden = 1;
        assert_eq!(old.verify(), Ok(()));
        let mut new = footer();
        new.hidden = 1;
        assert_eq!(new.verify(), Err(FooterFault::Checksum));
    }

    #[test]
    fn the_poison_cookie_is_told_from_damage() {
        let mut poisoned = footer();
        poisoned.cookie = POISON;
        assert_eq!(poisoned.verify(), Err(FooterFault::Checksum));
        poisoned.seal();
        assert_eq!(poisoned.verify(), Err(FooterFault::Poisoned));
    }

    #[test]
    fn short_footers_are_padded() {
        let whole = footer();
        assert_eq!(RawFooter::from_slice(&whole.as_bytes()[..SHORT_LEN]), whole);
    }
}
