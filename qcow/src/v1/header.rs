//! The header at the beginning of the file, and Xen's extension of it.

use std::ops::Range;

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Error, SECTOR};

/// `QFI\xfb`.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// `XEN\xfb`.
pub(super) const XEN_MAGIC: u32 = 0x5845_4efb;
/// Bytes of the header.
pub(super) const LEN: u64 = 48;
/// Bytes of the header with Xen's extension, behind which Xen puts the name of a backing file.
pub(super) const XEN_LEN: u64 = 64;
/// Clusters are encrypted with AES-128-CBC.
pub(super) const CRYPT_AES: u32 = 1;
/// Flag of Xen's extension: the file is grown without writing zeros.
pub(super) const XEN_SPARSE: u32 = 1;
/// Flag of Xen's extension: the directory is big endian. Xen 3.2 and before wrote it in the processor's order.
pub(super) const XEN_BIG_ENDIAN: u32 = 2;
/// Xen aligns the directory to pages, and takes an image for its own only if it is.
pub(super) const XEN_PAGE: u64 = 4096;
/// Bytes of the longest name of a backing file that QEMU accepts.
const MAX_NAME: u32 = 1023;
/// Bytes of the largest directory: 16 TiB of QEMU's default clusters and tables, less with smaller ones.
const MAX_DIRECTORY: u64 = 64 << 20;

/// The header as it is on disk (QEMU `block/qcow.c`, `QCowHeader`).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Raw {
    pub(super) magic: U32,
    pub(super) version: U32,
    pub(super) backing_offset: U64,
    pub(super) backing_len: U32,
    pub(super) mtime: U32,
    pub(super) size: U64,
    pub(super) cluster_bits: u8,
    pub(super) l2_bits: u8,
    pub(super) padding: U16,
    pub(super) crypt: U32,
    pub(super) directory: U64,
}

/// Xen's extension as it is on disk (`qcow.h`, `QCowHeader_ext`).
#[derive(Debug, Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct RawXen {
    pub(super) magic: U32,
    pub(super) checksum: U32,
    pub(super) min_cluster_alloc: U32,
    pub(super) flags: U32,
}

/// Sizes of clusters and tables. A cluster has 512 bytes to 64 KiB, a table 64 to 8192 entries of 8 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Binary logarithm of the bytes of a cluster.
    pub cluster_bits: u32,
    /// Binary logarithm of the entries of a table.
    pub l2_bits: u32,
}

impl Geometry {
    /// Bytes of a cluster.
    pub fn cluster_bytes(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Sectors of a cluster.
    pub fn cluster_sectors(self) -> u32 {
        1 << self.cluster_bits.saturating_sub(9)
    }

    /// Entries of a table.
    pub fn table_entries(self) -> u32 {
        1 << self.l2_bits
    }

    /// Bytes of a table, which is one piece whatever the size of a cluster.
    pub fn table_bytes(self) -> u64 {
        8 << self.l2_bits
    }

    /// Entries of the directory for a disk of `size` bytes.
    pub(super) fn directory_entries(self, size: u64) -> u64 {
        size.div_ceil(self.cluster_bytes() << self.l2_bits)
    }
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Sizes of clusters and tables.
    pub geometry: Geometry,
    /// True if clusters are encrypted.
    pub encrypted: bool,
    /// Byte offset of the directory, a multiple of 8.
    pub directory: u64,
    /// Byte range of the backing file's name; empty if there is none.
    pub(super) name: Range<u64>,
    pub(super) mtime: u32,
    /// Xen's extension.
    pub xen: Option<Xen>,
}

/// The file below an image, which has what the image itself has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its name, as whoever made the image has written it: never opened by the core. What format the file has is not said.
    pub name: Vec<u8>,
    /// When it was changed last, in seconds since 1970; 0 if that was not noted.
    pub mtime: u32,
}

/// What Xen's extension says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xen {
    /// See [`super::check`]: the first bytes of the MD5 of the directory, as one number.
    pub checksum: u32,
    /// Clusters that are allocated together. As many as a table has entries: Xen's tools take for granted that a table is
    /// followed by all its clusters in order, and do not read it.
    pub min_cluster_alloc: u32,
    /// The bits `SPARSE_FILE` (1) and `EXTHDR_L1_BIG_ENDIAN` (2).
    pub flags: u32,
}

impl Xen {
    pub(super) fn big_endian(self) -> bool {
        self.flags & XEN_BIG_ENDIAN != 0
    }

    pub(super) fn raw(self) -> RawXen {
        RawXen {
            magic: XEN_MAGIC.into(),
            checksum: self.checksum.into(),
            min_cluster_alloc: self.min_cluster_alloc.into(),
            flags: self.flags.into(),
        }
    }
}

impl Header {
    /// Checks the header of a file of `file_size` bytes that begins with `bytes`.
    pub(super) fn parse(bytes: &[u8], file_size: u64) -> Result<Header, Error> {
        let (raw, rest) = Raw::read_from_prefix(bytes).map_err(|_| {
            Error::invalid("header", format!("a file of {file_size} bytes has no room for one"))
        })?;
        check_kind(&raw)?;
        let geometry = geometry(&raw)?;
        let encrypted = match raw.crypt.get() {
            0 => false,
            CRYPT_AES => true,
            _ => return Err(Error::Unsupported("the image is encrypted with an unknown method")),
        };
        let size = raw.size.get();
        if size < SECTOR {
            return Err(Error::invalid("header", format!("a disk of {size} bytes has not even a sector")));
        }
        let directory = raw.directory.get();
        let directory_len = directory_len(geometry, size)?;
        let name = name(&raw, file_size)?;
        let directory_end = directory.checked_add(directory_len).filter(|&end| end <= file_size);
        let Some(directory_end) = directory_end.filter(|_| directory.is_multiple_of(8)) else {
            let reason = format!(
                "its {directory_len} bytes at {directory} are not at a multiple of 8 inside the file"
            );
            return Err(Error::invalid("L1 table", reason));
        };
        if directory < LEN || (directory < name.end && name.start < directory_end) {
            return Err(Error::invalid("L1 table", format!("at byte {directory} it overlaps the header")));
        }
        let xen = xen(rest, directory, &name);
        Ok(Header { size, geometry, encrypted, directory, name, mtime: raw.mtime.get(), xen })
    }

    /// Bytes of the directory.
    pub(super) fn directory_len(&self) -> u64 {
        self.geometry.directory_entries(self.size).saturating_mul(8)
    }

    /// First byte behind what is at the beginning of the file, apart from the directory.
    pub(super) fn end(&self) -> u64 {
        self.name.end.max(if self.xen.is_some() { XEN_LEN } else { LEN })
    }
}

fn check_kind(raw: &Raw) -> Result<(), Error> {
    match (raw.magic.get(), raw.version.get()) {
        (MAGIC, 1) => Ok(()),
        (MAGIC, 2 | 3) => Err(Error::invalid("header", "this is a qcow2 image; open it as one")),
        (MAGIC, version) => Err(Error::invalid("header", format!("unknown version {version}"))),
        _ => Err(Error::invalid("header", "this is not a qcow image")),
    }
}

/// The limits are QEMU's.
fn geometry(raw: &Raw) -> Result<Geometry, Error> {
    let (cluster_bits, l2_bits) = (u32::from(raw.cluster_bits), u32::from(raw.l2_bits));
    if !(9..=16).contains(&cluster_bits) {
        let reason = format!("cluster_bits is {cluster_bits}, not one of 9 to 16");
        return Err(Error::invalid("header", reason));
    }
    if !(6..=13).contains(&l2_bits) {
        return Err(Error::invalid("header", format!("l2_bits is {l2_bits}, not one of 6 to 13")));
    }
    Ok(Geometry { cluster_bits, l2_bits })
}

/// Bytes of the directory of a disk of `size` bytes.
pub(super) fn directory_len(geometry: Geometry, size: u64) -> Result<u64, Error> {
    let len = geometry.directory_entries(size).saturating_mul(8);
    if len > MAX_DIRECTORY {
        let table_covers = geometry.cluster_bytes() << geometry.l2_bits;
        let limit = table_covers.saturating_mul(MAX_DIRECTORY >> 3);
        return Err(Error::TooBig { what: "disk size", value: size, limit });
    }
    Ok(len)
}

fn name(raw: &Raw, file_size: u64) -> Result<Range<u64>, Error> {
    let (start, len) = (raw.backing_offset.get(), raw.backing_len.get());
    if start == 0 {
        return Ok(0..0);
    }
    let end = start.checked_add(len.into()).filter(|&end| end <= file_size && start >= LEN);
    match end {
        Some(end) if (1..=MAX_NAME).contains(&len) => Ok(start..end),
        _ => Err(Error::invalid(
            "backing file name",
            format!("{len} bytes at {start} are not 1 to {MAX_NAME} behind the header and inside the file"),
        )),
    }
}

/// Xen's extension, if `rest`, what follows the header, is one: QEMU puts the name of a backing file there.
fn xen(rest: &[u8], directory: u64, name: &Range<u64>) -> Option<Xen> {
    let covered = !name.is_empty() && name.start < XEN_LEN;
    if covered || !directory.is_multiple_of(XEN_PAGE) {
        return None;
    }
    let (raw, _) = RawXen::read_from_prefix(rest).ok()?;
    (raw.magic.get() == XEN_MAGIC).then(|| Xen {
        checksum: raw.checksum.get(),
        min_cluster_alloc: raw.min_cluster_alloc.get(),
        flags: raw.flags.get(),
    })
}
