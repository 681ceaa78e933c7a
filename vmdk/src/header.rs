//! The header of a sparse extent.

use std::ops::Range;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::{Error, SECTOR};

/// Bytes of the header.
pub(crate) const LEN: u64 = 512;
pub(crate) const MAGIC: [u8; 4] = *b"KDMV";
/// Sparse extents of ESX before version 5.
const COWD: [u8; 4] = *b"COWD";
/// Space-efficient sparse extents of ESX (64 bits, little endian).
const SE_SPARSE: [u8; 8] = [0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0];
/// The bytes at 73 show whether somebody has carried the file as a text.
pub(crate) const CHECK_BYTES: [u8; 4] = *b"\n \r\n";
pub(crate) const FLAG_CHECK_BYTES: u32 = 1;
pub(crate) const FLAG_REDUNDANT: u32 = 2;
const FLAG_ZERO_GRAINS: u32 = 4;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAG_MARKERS: u32 = 1 << 17;
/// The place of the directory is in the footer.
const AT_END: u64 = u64::MAX;
const DEFLATE: u16 = 1;
/// Sectors of the largest grain, 2 MiB.
const MAX_GRAIN: u64 = 4096;
/// Entries of the largest directory: 128 TiB with usual grains and tables.
const MAX_DIRECTORY: u64 = 1 << 22;
/// Sectors of the largest descriptor within an extent.
const MAX_DESCRIPTOR: u64 = 2048;

/// The header as it is on disk. Offsets and sizes are in sectors.
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Raw {
    pub(crate) magic: [u8; 4],
    pub(crate) version: U32,
    pub(crate) flags: U32,
    pub(crate) capacity: U64,
    pub(crate) grain: U64,
    pub(crate) descriptor: U64,
    pub(crate) descriptor_len: U64,
    pub(crate) table_entries: U32,
    pub(crate) redundant: U64,
    pub(crate) directory: U64,
    pub(crate) overhead: U64,
    pub(crate) unclean: u8,
    pub(crate) check_bytes: [u8; 4],
    pub(crate) compression: U16,
    pub(crate) padding: [u8; 433],
}

/// Byte offset of the flag that says that the extent was not closed.
pub(crate) const UNCLEAN_FIELD: usize = 72;

/// A checked header. Sizes are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Version, 1 to 3.
    pub version: u32,
    /// Size of the extent's part of the disk.
    pub capacity: u64,
    /// Size of a grain, a power of two.
    pub grain: u32,
    /// Entries of a table.
    pub table_entries: u32,
    /// Byte offset of the directory.
    pub(crate) directory: u64,
    /// Byte offset of the redundant directory.
    pub(crate) redundant: Option<u64>,
    /// Byte range of the descriptor; empty if it lies in a file of its own.
    pub(crate) descriptor: Range<u64>,
    /// Grains are compressed.
    pub compressed: bool,
    /// Each compressed grain begins with its sector number and length.
    pub(crate) markers: bool,
    /// An entry of 1 is a grain of zeros.
    pub(crate) zero_grains: bool,
    /// The extent was not closed by its last writer.
    pub unclean: bool,
}

/// Whether a file that begins with these bytes is a sparse extent rather than a descriptor.
pub fn is_sparse(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC) || bytes.starts_with(&COWD) || bytes.starts_with(&SE_SPARSE)
}

impl Header {
    /// The header that counts: `bytes` is the first sector, `footer` reads the copy that a stream has behind its grains.
    pub(crate) fn parse(
        bytes: &[u8],
        footer: impl FnOnce() -> Result<Vec<u8>, Error>,
    ) -> Result<Header, Error> {
        let first = raw(bytes)?;
        if first.directory.get() != AT_END {
            return check(&first);
        }
        let last = raw(&footer()?)?;
        if last.directory.get() == AT_END {
            return Err(invalid("the footer does not say where the grain directory is"));
        }
        check(&last)
    }

    /// Bytes of a grain.
    pub fn grain_bytes(&self) -> u64 {
        u64::from(self.grain).saturating_mul(SECTOR)
    }

    /// Bytes of a table, in whole sectors.
    pub(crate) fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries).saturating_mul(4).next_multiple_of(SECTOR)
    }

    /// Sectors that a table covers.
    pub(crate) fn table_covers(&self) -> u64 {
        u64::from(self.grain).saturating_mul(self.table_entries.into())
    }

    /// Entries of the directory.
    pub(crate) fn directory_entries(&self) -> u64 {
        self.capacity.div_ceil(self.table_covers().max(1))
    }

    /// Bytes of the directory, in whole sectors.
    pub(crate) fn directory_bytes(&self) -> u64 {
        self.directory_entries().saturating_mul(4).next_multiple_of(SECTOR)
    }
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::invalid("header", reason)
}

fn raw(bytes: &[u8]) -> Result<Raw, Error> {
    if bytes.starts_with(&COWD) || bytes.starts_with(&SE_SPARSE) {
        return Err(Error::Unsupported("sparse extents of ESX".into()));
    }
    let (raw, _) = Raw::read_from_prefix(bytes).map_err(|_| invalid("the file is too short"))?;
    if raw.magic == MAGIC { Ok(raw) } else { Err(invalid("this is not a sparse VMDK")) }
}

fn check(raw: &Raw) -> Result<Header, Error> {
    let (version, flags) = (raw.version.get(), raw.flags.get());
    if !(1..=3).contains(&version) {
        return Err(Error::Unsupported(format!("sparse extents of version {version}")));
    }
    if flags & FLAG_CHECK_BYTES != 0 && raw.check_bytes != CHECK_BYTES {
        return Err(invalid("its line ends were changed: the file was carried as a text, and is damaged"));
    }
    let compressed = match (flags & FLAG_COMPRESSED != 0, raw.compression.get()) {
        (false, 0) => false,
        (_, DEFLATE) => true,
        (_, method) => return Err(Error::Unsupported(format!("grains compressed by method {method}"))),
    };
    let grain = raw.grain.get();
    if grain > MAX_GRAIN {
        return Err(Error::TooBig { what: "grain size in sectors", value: grain, limit: MAX_GRAIN });
    }
    let grain = u32::try_from(grain).ok().filter(|grain| grain.is_power_of_two());
    let grain = grain.ok_or_else(|| invalid("the grain size is not a power of two"))?;
    let table_entries = raw.table_entries.get();
    if !(1..=512).contains(&table_entries) {
        return Err(invalid(format!("{table_entries} entries of a grain table are not 1 to 512")));
    }
    let capacity = raw.capacity.get();
    let covers = u64::from(grain).saturating_mul(table_entries.into());
    let limit = covers.saturating_mul(MAX_DIRECTORY);
    if capacity > limit {
        return Err(Error::TooBig { what: "capacity in sectors", value: capacity, limit });
    }
    if capacity == 0 {
        return Err(invalid("the capacity is 0"));
    }
    let bytes =
        |sectors: u64| sectors.checked_mul(SECTOR).ok_or_else(|| invalid("an offset is out of all bounds"));
    let redundant = match flags & FLAG_REDUNDANT {
        0 => None,
        _ => Some(bytes(raw.redundant.get())?).filter(|&offset| offset != 0),
    };
    let descriptor_len = raw.descriptor_len.get();
    if descriptor_len > MAX_DESCRIPTOR {
        return Err(Error::TooBig {
            what: "descriptor size in sectors",
            value: descriptor_len,
            limit: MAX_DESCRIPTOR,
        });
    }
    let descriptor = match raw.descriptor.get() {
        0 => 0..0,
        start => {
            let start = bytes(start)?;
            start..start.saturating_add(bytes(descriptor_len)?)
        }
    };
    Ok(Header {
        version,
        capacity,
        grain,
        table_entries,
        directory: bytes(raw.directory.get())?,
        redundant,
        descriptor,
        compressed,
        markers: flags & FLAG_MARKERS != 0,
        zero_grains: flags & FLAG_ZERO_GRAINS != 0,
        unclean: raw.unclean != 0,
    })
}
