//! Opening: everything that later work relies on is checked here; nothing is written.

use format::Source;
use format::cipher::Cipher;

use super::cache::Cache;
use super::geometry::{be64, down, exp, index};
use super::header::{self, Crypt, Header};
use super::image::Qcow2;
use super::write::Writing;
use super::{Error, snapshot};

/// Bytes read at a time.
const PART: u64 = 1 << 20;

/// Memory for slices of L2 tables, if nothing else is asked for. With clusters of 64 KiB, tables need 128 MiB for each TiB
/// of the disk; this much keeps those of the 256 GiB that are in use in memory.
pub const DEFAULT_CACHE: u64 = 32 << 20;

/// Most bytes that are reserved ahead, if nothing else is asked for.
pub const DEFAULT_RESERVE: u64 = 64 << 20;

/// How to open an image.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// It may be written.
    pub writable: bool,
    /// The passphrase of an image that is encrypted with AES.
    pub key: Option<Vec<u8>>,
    /// Open an encrypted image without its key: for tools that do not read its data.
    pub without_key: bool,
    /// Most bytes of memory for slices of L2 tables. The L1 table (16 KiB for each TiB with clusters of 64 KiB, at most 32 MiB)
    /// and up to 4 MiB of reference counts come on top.
    pub cache: u64,
    /// Most bytes of clusters that are reserved ahead of need, and given up before that is worth a flush of its own. A stop
    /// leaks so much at worst.
    pub reserve: u64,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            writable: false,
            key: None,
            without_key: false,
            cache: DEFAULT_CACHE,
            reserve: DEFAULT_RESERVE,
        }
    }
}

/// Opens an image.
///
/// # Errors
/// Every malformation and every feature that [`Error`] names. [`Error::NeedsRepair`] asks for [`super::repair()`] before the
/// image can be opened for writing.
pub fn open(mut source: Source<'_>, options: &OpenOptions) -> Result<Qcow2, Error> {
    let header = read_header(&mut source)?;
    check_mode(&header, options)?;
    let cipher = cipher(&header, options)?;
    let (snapshots, snapshot_bytes) = snapshot::read_table(&mut source, &header, options.writable)?;
    let l1 = read_entries(&mut source, "L1 table", header.l1_offset, header.l1_entries)?;
    let writing = match options.writable {
        true => Some(Box::new(Writing::open(
            &mut source,
            &header,
            &l1,
            (&snapshots, snapshot_bytes),
            options.reserve,
        )?)),
        false => None,
    };
    let geometry = header.geometry;
    Ok(Qcow2 {
        sectors: header.size / format::SECTOR_SIZE,
        slices: Cache::new(index(down(options.cache, geometry.slice_bits()))),
        l1,
        file_len: source.size,
        regular: source.regular,
        snapshots,
        cipher,
        writing,
        geometry,
        header,
    })
}

/// Reads and checks the header with its extensions.
pub(super) fn read_header(source: &mut Source<'_>) -> Result<Header, Error> {
    if source.size < header::V2_LEN {
        return Err(Error::invalid("header", "the file is too short for one"));
    }
    let sector = read(source, "header", 0, source.size.min(512))?;
    let cluster = header::first_cluster(&sector)?;
    let bytes = read(source, "header", 0, cluster.min(source.size))?;
    header::parse(&bytes, source.size)
}

/// What the image's own marks say against this use.
fn check_mode(header: &Header, options: &OpenOptions) -> Result<(), Error> {
    if !options.writable {
        if header.is_marked_corrupt() {
            log::warn!("the image is marked corrupt; what is read from it may be wrong");
        }
        return Ok(());
    }
    if header.is_marked_corrupt() {
        return Err(Error::MarkedCorrupt);
    }
    if header.crypt == Crypt::Aes {
        return Err(Error::unsupported("AES encryption, to which nothing can be written"));
    }
    if header.geometry.extended {
        return Err(Error::unsupported("subclusters (extended L2 entries), to which nothing can be written"));
    }
    if header.is_dirty() { Err(Error::NeedsRepair) } else { Ok(()) }
}

fn cipher(header: &Header, options: &OpenOptions) -> Result<Option<Cipher>, Error> {
    match (header.crypt, &options.key) {
        (Crypt::None, None) => Ok(None),
        (Crypt::None, Some(_)) => Err(Error::NotEncrypted),
        (Crypt::Aes, Some(key)) => Ok(Some(Cipher::cbc(key))),
        (Crypt::Aes, None) if options.without_key => Ok(None),
        (Crypt::Aes, None) => Err(Error::NeedsKey),
    }
}

/// Reads `len` bytes. The range is checked first, so a length from the image allocates no more than the image is long.
pub(super) fn read(
    source: &mut Source<'_>,
    what: &'static str,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, Error> {
    if offset.checked_add(len).is_none_or(|end| end > source.size) {
        let reason = format!("{len} bytes at {offset:#x} reach beyond the end of the file");
        return Err(Error::invalid(what, reason));
    }
    source.bytes(offset, len).map_err(|error| Error::Io { what, offset, source: error })
}

/// Reads a table of big-endian numbers of 64 bits.
pub(super) fn read_entries(
    source: &mut Source<'_>,
    what: &'static str,
    offset: u64,
    entries: u64,
) -> Result<Vec<u64>, Error> {
    let mut table = Vec::with_capacity(index(entries.min(exp(22))));
    let (mut at, mut left) = (offset, entries.saturating_mul(8));
    while left > 0 {
        let len = left.min(PART);
        let bytes = read(source, what, at, len)?;
        table.extend(bytes.chunks_exact(8).map(|entry| be64(entry, 0)));
        at = at.saturating_add(len);
        left = left.saturating_sub(len);
    }
    Ok(table)
}
