//! The header and its extensions, by QEMU's docs/interop/qcow2.txt.

use super::Error;
use super::geometry::{Geometry, be32, be64, index, put, rest};

pub(super) const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a header of version 2.
pub(super) const V2_LEN: u64 = 72;
/// Bytes of the shortest header of version 3.
pub(super) const V3_LEN: u64 = 104;

/// QEMU's limits, so that a header cannot ask for any amount of memory.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_SNAPSHOTS: u64 = 65536;
const MAX_BACKING_NAME: u64 = 1023;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
pub(super) const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// Types of header extensions.
pub(super) const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;

/// Byte offsets of the fields that change while an image is in use. All lie in the first sector, so that a change of several
/// is one write.
pub(super) mod at {
    pub(in super::super) const SIZE: usize = 24;
    pub(in super::super) const L1_ENTRIES: usize = 36;
    pub(in super::super) const L1_OFFSET: usize = 40;
    pub(in super::super) const REFCOUNT_TABLE: usize = 48;
    pub(in super::super) const REFCOUNT_TABLE_CLUSTERS: usize = 56;
    pub(in super::super) const INCOMPATIBLE: usize = 72;
    pub(in super::super) const AUTOCLEAR: usize = 88;
}

/// What an image says of its backing file. Nothing is opened because of it: whether the name may be opened is for the
/// caller to decide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// The name as it is in the header: a path, or something that only QEMU understands.
    pub name: Vec<u8>,
    /// The format of the backing file as QEMU names it; `None` if the header does not tell.
    pub format: Option<String>,
}

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Deflate without a header.
    Zlib,
    /// Zstandard.
    Zstd,
}

/// How data are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Crypt {
    None,
    Aes,
}

/// A header that was checked as far as that needs nothing but the header and the length of the file.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) geometry: Geometry,
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) backing: Option<Backing>,
    pub(super) crypt: Crypt,
    pub(super) l1_entries: u64,
    pub(super) l1_offset: u64,
    pub(super) refcount_table: u64,
    pub(super) refcount_table_clusters: u64,
    pub(super) snapshots: u64,
    pub(super) snapshot_table: u64,
    pub(super) incompatible: u64,
    pub(super) autoclear: u64,
    pub(super) compression: Compression,
    /// The first sector of the file, to be written again with some fields changed.
    pub(super) sector: [u8; 512],
}

impl Header {
    pub(super) fn is_dirty(&self) -> bool {
        self.incompatible & DIRTY != 0
    }

    pub(super) fn is_marked_corrupt(&self) -> bool {
        self.incompatible & CORRUPT != 0
    }

    /// The first sector with fields replaced.
    pub(super) fn with(&self, fields: &[(usize, &[u8])]) -> [u8; 512] {
        let mut sector = self.sector;
        for (at, bytes) in fields {
            put(&mut sector, *at, bytes);
        }
        sector
    }

    /// The incompatible features without the marks of an image that needs repair.
    pub(super) fn repaired(&self) -> u64 {
        self.incompatible & !(DIRTY | CORRUPT)
    }

    /// Bytes of the refcount table.
    pub(super) fn refcount_table_bytes(&self) -> u64 {
        self.refcount_table_clusters.saturating_mul(self.geometry.cluster())
    }
}

/// Bytes of the first cluster, as the first sector tells; checks what is needed for that.
pub(super) fn first_cluster(sector: &[u8]) -> Result<u64, Error> {
    if be32(sector, 0) != MAGIC {
        return Err(Error::invalid("header", "it does not begin as a qcow image does"));
    }
    let version = be32(sector, 4);
    if !matches!(version, 2 | 3) {
        return Err(Error::unsupported(format!("version {version} of the format instead of 2 or 3")));
    }
    let bits = be32(sector, 20);
    if !(9..=21).contains(&bits) {
        return Err(Error::invalid("header", format!("clusters of 2^{bits} bytes instead of 2^9 to 2^21")));
    }
    Ok(super::geometry::exp(bits))
}

/// Parses the first cluster of a file that is `file_len` bytes long.
pub(super) fn parse(bytes: &[u8], file_len: u64) -> Result<Header, Error> {
    let cluster = first_cluster(bytes)?;
    let version = be32(bytes, 4);
    let modern = version >= 3;
    let field = |at: usize| if modern { be64(bytes, at) } else { 0 };
    let length = if modern { u64::from(be32(bytes, 100)) } else { V2_LEN };
    if modern && (length < V3_LEN || !length.is_multiple_of(8) || length > cluster) {
        return Err(Error::invalid("header", format!("its length {length} is impossible")));
    }
    let incompatible = field(at::INCOMPATIBLE);
    let backing_offset = be64(bytes, 8);
    let end = if backing_offset == 0 { cluster } else { backing_offset.min(cluster) };
    let extensions = extensions(bytes, length, end)?;
    check_features(incompatible, &extensions)?;
    let geometry = Geometry {
        cluster_bits: be32(bytes, 20),
        refcount_order: if modern { be32(bytes, 96) } else { 4 },
        extended: incompatible & EXTENDED_L2 != 0,
        version,
    };
    if geometry.refcount_order > 6 {
        return Err(Error::invalid(
            "header",
            format!("reference counts of 2^{} bits", geometry.refcount_order),
        ));
    }
    if geometry.extended && geometry.cluster_bits < 14 {
        return Err(Error::invalid("header", "clusters are too small for subclusters"));
    }
    let mut sector = [0; 512];
    put(&mut sector, 0, bytes);
    let header = Header {
        geometry,
        size: be64(bytes, at::SIZE),
        backing: backing(bytes, backing_offset, cluster, length, &extensions)?,
        crypt: crypt(be32(bytes, 32))?,
        l1_entries: be32(bytes, at::L1_ENTRIES).into(),
        l1_offset: be64(bytes, at::L1_OFFSET),
        refcount_table: be64(bytes, at::REFCOUNT_TABLE),
        refcount_table_clusters: be32(bytes, at::REFCOUNT_TABLE_CLUSTERS).into(),
        snapshots: be32(bytes, 60).into(),
        snapshot_table: be64(bytes, 64),
        incompatible,
        autoclear: field(at::AUTOCLEAR),
        compression: compression(incompatible, if length > V3_LEN { bytes.get(104) } else { None })?,
        sector,
    };
    check_tables(&header, file_len)?;
    Ok(header)
}

/// A header extension.
struct Extension<'a> {
    kind: u32,
    data: &'a [u8],
}

fn extensions(bytes: &[u8], from: u64, end: u64) -> Result<Vec<Extension<'_>>, Error> {
    let area = bytes.get(..index(end)).unwrap_or(bytes);
    let mut rest = area.get(index(from)..).unwrap_or_default();
    let mut found = Vec::new();
    while rest.len() >= 8 {
        let (kind, len) = (be32(rest, 0), be32(rest, 4));
        if kind == 0 {
            break;
        }
        let padded = u64::from(len).next_multiple_of(8);
        let data = rest.get(8..).unwrap_or_default();
        let Some(own) = data.get(..index(len.into())) else {
            let reason = format!("extension {kind:#x} of {len} bytes reaches beyond the first cluster");
            return Err(Error::invalid("header", reason));
        };
        found.push(Extension { kind, data: own });
        rest = data.get(index(padded)..).unwrap_or_default();
    }
    Ok(found)
}

fn check_features(incompatible: u64, extensions: &[Extension<'_>]) -> Result<(), Error> {
    if incompatible & DATA_FILE != 0 {
        return Err(Error::DataFile);
    }
    let known = DIRTY | CORRUPT | COMPRESSION | EXTENDED_L2;
    let unknown = (0..64_u8).filter(|bit| (incompatible & !known).wrapping_shr((*bit).into()) & 1 != 0);
    let names = unknown.map(|bit| feature_name(bit, extensions)).collect::<Vec<_>>();
    if names.is_empty() { Ok(()) } else { Err(Error::unsupported(names.join(", "))) }
}

/// The name that the image itself has for an incompatible feature.
fn feature_name(bit: u8, extensions: &[Extension<'_>]) -> String {
    let records =
        extensions.iter().filter(|e| e.kind == EXT_FEATURE_NAMES).flat_map(|e| e.data.chunks_exact(48));
    let name = records.filter(|r| r.first() == Some(&0) && r.get(1) == Some(&bit)).find_map(|record| {
        let name = record.get(2..)?.split(|&byte| byte == 0).next()?;
        (!name.is_empty()).then(|| String::from_utf8_lossy(name).into_owned())
    });
    match name {
        Some(name) => format!("the feature '{name}' (incompatible bit {bit})"),
        None => format!("an unknown feature (incompatible bit {bit})"),
    }
}

fn backing(
    bytes: &[u8],
    offset: u64,
    cluster: u64,
    header: u64,
    extensions: &[Extension<'_>],
) -> Result<Option<Backing>, Error> {
    let len = u64::from(be32(bytes, 16));
    if offset == 0 || (len == 0 && offset <= cluster) {
        return Ok(None);
    }
    if len > MAX_BACKING_NAME {
        return Err(Error::invalid(
            "backing file name",
            format!("{len} bytes, at most {MAX_BACKING_NAME} are allowed"),
        ));
    }
    let end = offset.saturating_add(len);
    let name = bytes.get(index(offset)..index(end)).filter(|_| end <= cluster && offset >= header);
    let name =
        name.ok_or_else(|| Error::invalid("backing file name", "it does not lie in the first cluster"))?;
    let format = extensions.iter().find(|e| e.kind == EXT_BACKING_FORMAT);
    let format = format.map(|e| String::from_utf8_lossy(e.data).trim_end_matches('\0').to_owned());
    Ok(Some(Backing { name: name.to_vec(), format: format.filter(|format| !format.is_empty()) }))
}

fn crypt(method: u32) -> Result<Crypt, Error> {
    match method {
        0 => Ok(Crypt::None),
        1 => Ok(Crypt::Aes),
        2 => Err(Error::unsupported("LUKS encryption")),
        other => Err(Error::unsupported(format!("encryption method {other}"))),
    }
}

fn compression(incompatible: u64, field: Option<&u8>) -> Result<Compression, Error> {
    match (incompatible & COMPRESSION != 0, field.copied().unwrap_or(0)) {
        (false, 0) => Ok(Compression::Zlib),
        (true, 1) => Ok(Compression::Zstd),
        (true, kind) if kind > 1 => Err(Error::unsupported(format!("compression method {kind}"))),
        (flag, kind) => {
            Err(Error::invalid("header", format!("compression method {kind} with its feature bit {flag}")))
        }
    }
}

/// Checks where the header says that tables lie.
fn check_tables(header: &Header, file_len: u64) -> Result<(), Error> {
    let geometry = &header.geometry;
    if header.size > i64::MAX.unsigned_abs() {
        return Err(Error::TooBig { what: "disk size", value: header.size, limit: i64::MAX.unsigned_abs() });
    }
    let l1_bytes = header.l1_entries.saturating_mul(8);
    if l1_bytes > MAX_L1_BYTES {
        return Err(Error::TooBig { what: "L1 table size", value: l1_bytes, limit: MAX_L1_BYTES });
    }
    let needed = geometry.l1_entries(header.size);
    if header.l1_entries < needed {
        let reason = format!("{} entries are too few for the disk, which needs {needed}", header.l1_entries);
        return Err(Error::invalid("L1 table", reason));
    }
    let refcount_bytes = header.refcount_table_bytes();
    if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES {
        let reason =
            format!("its size {refcount_bytes} is not between 1 and {MAX_REFCOUNT_TABLE_BYTES} bytes");
        return Err(Error::invalid("refcount table", reason));
    }
    if header.snapshots > MAX_SNAPSHOTS {
        return Err(Error::TooBig { what: "snapshot count", value: header.snapshots, limit: MAX_SNAPSHOTS });
    }
    check_place("refcount table", header.refcount_table, refcount_bytes, geometry, file_len)?;
    if header.l1_entries > 0 {
        check_place("L1 table", header.l1_offset, l1_bytes, geometry, file_len)?;
    }
    if header.snapshots > 0 {
        check_place("snapshot table", header.snapshot_table, 40, geometry, file_len)?;
    }
    Ok(())
}

/// Checks that a table begins at a cluster behind the header and lies in the file.
pub(super) fn check_place(
    what: &'static str,
    offset: u64,
    len: u64,
    geometry: &Geometry,
    file_len: u64,
) -> Result<(), Error> {
    if rest(offset, geometry.cluster_bits) != 0 || offset == 0 {
        return Err(Error::invalid(what, format!("its offset {offset:#x} is no place for a table")));
    }
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(Error::invalid(
            what,
            format!("{len} bytes at {offset:#x} reach beyond the end of the file"),
        ));
    }
    Ok(())
}
