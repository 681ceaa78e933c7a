//! The 1024-byte header of dynamic and differencing images ("dynamic disk header" of the VHD specification).

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::footer::NO_OFFSET;
use crate::{Error, Uuid, checksum};

/// Length of a header in bytes.
pub const LEN: usize = 1024;
/// The cookie of every header.
pub const COOKIE: [u8; 8] = *b"cxsparse";
/// The only header version.
pub const VERSION: u32 = 0x0001_0000;
/// The block size that blktap and Hyper-V write, and the largest that blktap accepts, in bytes.
pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;
/// The smallest accepted block size in bytes: a page, to which blktap aligns a block's data.
pub const MIN_BLOCK_SIZE: u32 = 4096;

/// Where a differencing image notes one name of its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawLocator {
    /// Kind of name, see [`crate::locator::Platform`]; 0 for an unused slot.
    pub code: U32,
    /// Room for the name: bytes if 512 or more (Microsoft, blktap), sectors if less (the specification).
    pub space: U32,
    /// Length of the name in bytes.
    pub length: U32,
    /// Zero.
    pub reserved: U32,
    /// Byte offset of the name.
    pub offset: U64,
}

/// A header exactly as it lies on disk. Nothing in it has been checked.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RawHeader {
    /// [`COOKIE`].
    pub cookie: [u8; 8],
    /// Unused, all ones.
    pub data_offset: U64,
    /// Byte offset of the block allocation table.
    pub table_offset: U64,
    /// [`VERSION`].
    pub version: U32,
    /// Entries that the table has room for.
    pub table_entries: U32,
    /// Bytes of a block's data.
    pub block_size: U32,
    /// One's complement of the sum of all other bytes.
    pub checksum: U32,
    /// Identity of the parent; null if the parent is a raw file (extension of blktap).
    pub parent_uuid: Uuid,
    /// Time of the parent's last change when the child was made.
    pub parent_timestamp: U32,
    /// Zero.
    pub reserved1: U32,
    /// Name of the parent in UTF-16, filled up with zeros.
    pub parent_name: [U16; 256],
    /// Longer names of the parent.
    pub locators: [RawLocator; 8],
    /// Zeros.
    pub reserved2: [u8; 256],
}

impl RawHeader {
    /// A header of a new image without a parent, not yet sealed.
    pub fn new(table_offset: u64, table_entries: u32, block_size: u32) -> Self {
        let mut header = Self::new_zeroed();
        header.cookie = COOKIE;
        header.data_offset = NO_OFFSET.into();
        header.table_offset = table_offset.into();
        header.version = VERSION.into();
        header.table_entries = table_entries.into();
        header.block_size = block_size.into();
        header
    }

    /// A header of the first 1024 of `bytes`; missing ones become zeros.
    pub fn from_slice(bytes: &[u8]) -> Self {
        crate::from_prefix(bytes)
    }

    /// The checksum that the header should carry.
    pub fn expected_checksum(&self) -> u32 {
        let mut copy = self.clone();
        copy.checksum = 0.into();
        checksum(copy.as_bytes())
    }

    /// Sets the checksum.
    pub fn seal(&mut self) {
        self.checksum = self.expected_checksum().into();
    }

    /// Checks everything that can be checked without the footer and the file.
    pub fn verify(&self) -> Result<(), Error> {
        let invalid = |reason: String| Err(Error::invalid("header", reason));
        if self.cookie != COOKIE {
            return invalid("its cookie is not 'cxsparse'".into());
        }
        if self.checksum.get() != self.expected_checksum() {
            return invalid("its checksum is wrong".into());
        }
        if self.version.get() != VERSION {
            return invalid(format!("unknown version {:#x}", self.version.get()));
        }
        let block_size = self.block_size.get();
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=DEFAULT_BLOCK_SIZE).contains(&block_size) {
            return invalid(format!(
                "block size {block_size} is not a power of two from {MIN_BLOCK_SIZE} to {DEFAULT_BLOCK_SIZE}"
            ));
        }
        Ok(())
    }

    /// The parent's name up to the first zero; what is not UTF-16 becomes U+FFFD.
    pub fn parent_name(&self) -> String {
        let units = self.parent_name.iter().map(|unit| unit.get()).take_while(|&unit| unit != 0);
        char::decode_utf16(units).map(|c| c.unwrap_or(char::REPLACEMENT_CHARACTER)).collect()
    }

    /// Sets the parent's name; a name of more than 255 UTF-16 units does not fit.
    pub fn set_parent_name(&mut self, name: &str) -> Result<(), Error> {
        if name.encode_utf16().count() >= self.parent_name.len() {
            return Err(Error::TooBig { what: "parent name length", value: 256, limit: 255 });
        }
        self.parent_name = [U16::ZERO; 256];
        for (to, unit) in self.parent_name.iter_mut().zip(name.encode_utf16()) {
            *to = unit.into();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> RawHeader {
        let mut header = RawHeader::new(1536, 32, DEFAULT_BLOCK_SIZE);
        header.seal();
        header
    }

    #[test]
    fn a_new_header_has_the_checksum_that_blktap_writes() {
        assert_eq!(size_of::<RawHeader>(), LEN);
        assert!(header().verify().is_ok());
        assert_eq!(header().checksum.get(), 0xffff_f457);
    }

    #[test]
    fn block_sizes_must_be_powers_of_two_within_bounds() {
        for size in [0, 0x80, 2048, 0x1234_5678, 4 << 20, 1 << 31, u32::MAX] {
            let mut header = header();
            header.block_size = size.into();
            header.seal();
            assert!(header.verify().is_err(), "{size:#x}");
        }
        for shift in 12..=21 {
            let mut header = header();
            header.block_size = (1 << shift).into();
            header.seal();
            assert!(header.verify().is_ok(), "{shift}");
        }
    }

    #[test]
    fn parent_names_survive_and_are_bounded() {
        let mut header = header();
        header.set_parent_name("größe.vhd").unwrap();
        assert_eq!(header.parent_name(), "größe.vhd");
        assert!(header.set_parent_name(&"x".repeat(255)).is_ok());
        assert!(header.set_parent_name(&"x".repeat(256)).is_err());
    }
}
