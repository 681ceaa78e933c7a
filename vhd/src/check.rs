//! The checks of `vhd-util check`, with the words that XenServer's tool uses for what it finds.
//!
//! Opening an image asks whether it can be used safely; this asks whether it is what the format prescribes.

use crate::batmap::{self, RawBatmapHeader};
use crate::footer::{self, DiskType, FooterFault, RawFooter};
use crate::header::{self, RawHeader};
use format::Source;

use crate::{Error, OpenOptions, SECTOR_SIZE, Vhd, bitmap, geometry, open};

/// What to leave out and what to add.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckOptions {
    /// Accept an image whose footer at the end is missing.
    pub ignore_footer: bool,
    /// Accept time stamps in the future.
    pub ignore_timestamps: bool,
    /// Read all bitmaps and compare them with the batmap.
    pub bitmaps: bool,
    /// The present time, see [`crate::time`].
    pub now: u32,
}

/// What a check has found.
#[derive(Debug)]
pub enum Verdict {
    /// A valid fixed image: there is little to check.
    Fixed,
    /// A valid dynamic or differencing image.
    Valid(Box<Vhd>),
    /// Not valid, for this reason.
    Invalid(String),
}

/// How much of an image is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Sectors of all allocated blocks.
    pub allocated: u64,
    /// Sectors with data.
    pub written: u64,
}

/// Checks an image.
///
/// # Errors
/// Only [`Error::Io`]: all that is wrong with the image itself is a verdict.
pub fn check(source: &mut Source<'_>, options: &CheckOptions) -> Result<Verdict, Error> {
    match find_fault(source, options) {
        Ok(verdict) => Ok(verdict),
        Err(Fault::Io(error)) => Err(error),
        Err(Fault::Reason(reason)) => Ok(Verdict::Invalid(reason)),
    }
}

enum Fault {
    Io(Error),
    Reason(String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error {
            Error::Io { .. } => Self::Io(error),
            other => Self::Reason(other.to_string()),
        }
    }
}

fn find_fault(source: &mut Source<'_>, options: &CheckOptions) -> Result<Verdict, Fault> {
    if source.size < footer::LEN as u64 {
        return Err(Fault::Reason(format!("error calculating end of file: -{}", libc::EINVAL)));
    }
    let primary = open::read_end(source)?;
    let primary_fault = footer_fault(&primary.footer, options);
    if let Some(fault) = primary_fault.filter(|_| !options.ignore_footer) {
        return Err(Fault::Reason(format!("primary footer invalid: {fault}")));
    }
    if primary_fault.is_none() && primary.footer.disk_type.get() == DiskType::Fixed.raw() {
        return Ok(Verdict::Fixed);
    }
    let backup = RawFooter::from_slice(&open::bytes(source, "footer copy", 0, footer::LEN as u64)?);
    if let Some(fault) = footer_fault(&backup, options) {
        return Err(Fault::Reason(format!("backup footer invalid: {fault}")));
    }
    if primary_fault.is_none() && primary.footer != backup {
        return Err(Fault::Reason("primary and backup footers do not match".into()));
    }
    let header =
        RawHeader::from_slice(&open::bytes(source, "header", backup.data_offset.get(), header::LEN as u64)?);
    if let Some(fault) = header_fault(&header, &backup, source.size, options) {
        return Err(Fault::Reason(format!("header is invalid: {fault}")));
    }
    let vhd = Vhd::open(
        Source { size: source.size, regular: source.regular, read: source.read },
        &OpenOptions { allow_encrypted: true, ..OpenOptions::default() },
    )?;
    let end = if primary_fault.is_none() { primary.offset } else { source.size };
    table_fault(&vhd, end)?;
    let has_batmap = backup.tap_version().is_some_and(|version| version >= (1, 2));
    if has_batmap {
        let raw = read_batmap(source, &header)?;
        batmap_fault(source, &raw, &header, &backup)?;
    }
    if options.bitmaps {
        bitmaps_fault(source, &vhd)?;
    }
    Ok(Verdict::Valid(Box::new(vhd)))
}

/// What is wrong with a footer.
fn footer_fault(footer: &RawFooter, options: &CheckOptions) -> Option<&'static str> {
    let kind = DiskType::from_raw(footer.disk_type.get());
    let offset = footer.data_offset.get();
    let (cylinders, heads, per_track) = geometry::split(footer.geometry.get());
    let chs = geometry::bytes(footer.geometry.get());
    // Programs that ignore the geometry write the largest one.
    let largest = cylinders == u16::MAX && heads == 16 && per_track == 255;
    let fault = match footer.verify() {
        Err(FooterFault::Cookie | FooterFault::Poisoned) => "invalid cookie",
        Err(FooterFault::Checksum) => "invalid checksum",
        Ok(()) if footer.features.get() & footer::FEATURE_RESERVED == 0 => "invalid 'reserved' feature",
        Ok(()) if footer.features.get() & !(footer::FEATURE_RESERVED | footer::FEATURE_TEMPORARY) != 0 => {
            "invalid extra features"
        }
        Ok(()) if footer.version.get() != footer::FORMAT_VERSION => "invalid file format version",
        Ok(()) if kind == Some(DiskType::Fixed) && offset != footer::NO_OFFSET => "invalid data offset",
        Ok(()) if kind != Some(DiskType::Fixed) && !offset.is_multiple_of(SECTOR_SIZE) => {
            "invalid data offset"
        }
        Ok(()) if !options.ignore_timestamps && footer.timestamp.get() > options.now => {
            "creation time in future"
        }
        Ok(()) if footer.tap_version().is_some_and(|version| !((0, 1)..=(1, 3)).contains(&version)) => {
            "unsupported tap creator version"
        }
        Ok(()) if chs > footer.current_size.get() && !largest => "geometry too large",
        Ok(()) if kind.is_none() => "invalid type",
        Ok(()) if footer.saved > 1 => "invalid 'saved' state",
        Ok(()) if footer.hidden > 1 => "invalid 'hidden' state",
        Ok(()) if footer.reserved.iter().any(|&byte| byte != 0) => "invalid 'reserved' bits",
        Ok(()) if footer.uuid.is_null() => "invalid (NULL) uuid",
        Ok(()) => return None,
    };
    Some(fault)
}

/// What is wrong with a dynamic header.
fn header_fault(
    header: &RawHeader,
    footer: &RawFooter,
    size: u64,
    options: &CheckOptions,
) -> Option<&'static str> {
    let block_size = header.block_size.get();
    let table = header.table_offset.get();
    let header_end = footer.data_offset.get().saturating_add(header::LEN as u64);
    let table_end = table.saturating_add(u64::from(header.table_entries.get()).saturating_mul(4));
    let fault = if header.cookie != header::COOKIE {
        "invalid cookie"
    } else if header.checksum.get() != header.expected_checksum() {
        "invalid checksum"
    } else if header.version.get() != header::VERSION {
        "invalid header version"
    } else if !table.is_multiple_of(SECTOR_SIZE) || table < header_end || table_end > size {
        "invalid table offset"
    } else if !block_size.is_power_of_two()
        || !(header::MIN_BLOCK_SIZE..=header::DEFAULT_BLOCK_SIZE).contains(&block_size)
    {
        "invalid block size"
    } else if header.reserved1.get() != 0 || header.reserved2.iter().any(|&byte| byte != 0) {
        "invalid reserved bits"
    } else if footer.disk_type.get() == DiskType::Differencing.raw() {
        if !options.ignore_timestamps && header.parent_timestamp.get() > options.now {
            "parent creation time in future"
        } else if header.parent_name().is_empty() {
            "invalid parent name"
        } else {
            return None;
        }
    } else if !header.parent_name().is_empty() {
        "invalid non-null parent name"
    } else if header.locators.iter().any(|locator| locator.code.get() != 0) {
        "invalid non-null parent locators"
    } else if !header.parent_uuid.is_null() {
        "invalid non-null parent uuid"
    } else if header.parent_timestamp.get() != 0 {
        "invalid non-zero parent timestamp"
    } else {
        return None;
    };
    Some(fault)
}

/// Reports the first block, in the order of the disk, that lies in something else, with the other block by its number if
/// that is what it lies in. `end` is the byte offset of the footer or the end of file.
fn table_fault(vhd: &Vhd, end: u64) -> Result<(), Fault> {
    let Some(dynamic) = &vhd.dynamic else { return Ok(()) };
    let mut used = dynamic.bat.iter().collect::<Vec<_>>();
    let fault = |block, entry: u32, other: String| {
        Err(Fault::Reason(format!("block {block} (offset {entry:#x}) clobbers {other}")))
    };
    for &(block, entry) in &used {
        let extent = dynamic.layout.extent(entry);
        if extent.bitmap < dynamic.layout.end_of_headers {
            return fault(block, entry, "headers".into());
        }
        if extent.end > end {
            return fault(block, entry, "footer".into());
        }
    }
    used.sort_by_key(|&(block, entry)| (entry, block));
    let overlaps = used.windows(2).filter_map(|pair| match *pair {
        [a, b] if dynamic.layout.extent(a.1).end > dynamic.layout.extent(b.1).bitmap => {
            Some(if a.0 < b.0 { (a, b) } else { (b, a) })
        }
        _ => None,
    });
    match overlaps.min_by_key(|&(first, _)| first.0) {
        Some(((block, entry), (other, at))) => fault(block, entry, format!("block {other} (offset {at:#x})")),
        None => Ok(()),
    }
}

fn read_batmap(source: &mut Source<'_>, header: &RawHeader) -> Result<RawBatmapHeader, Fault> {
    let offset = batmap_offset(header);
    Ok(RawBatmapHeader::from_slice(&open::bytes(source, "batmap header", offset, batmap::LEN as u64)?))
}

/// Byte offset of the batmap header: behind the table.
fn batmap_offset(header: &RawHeader) -> u64 {
    let table_len = u64::from(header.table_entries.get()).saturating_mul(4).next_multiple_of(SECTOR_SIZE);
    header.table_offset.get().saturating_add(table_len)
}

fn batmap_fault(
    source: &mut Source<'_>,
    raw: &RawBatmapHeader,
    header: &RawHeader,
    footer: &RawFooter,
) -> Result<(), Fault> {
    let fault = |text: &str| Err(Fault::Reason(format!("batmap is invalid: {text}")));
    let sectors = u64::from(raw.sectors.get());
    if raw.cookie != batmap::COOKIE {
        return fault("invalid cookie");
    }
    if raw.version.get() > batmap::VERSION {
        return fault("unsupported batmap version");
    }
    if sectors == 0 {
        return fault("invalid size zero");
    }
    if sectors < u64::from(batmap::sectors_for(header.table_entries.get())) {
        return fault("batmap-BAT size mismatch");
    }
    if raw.offset.get() < batmap_offset(header).saturating_add(batmap::LEN as u64) {
        return fault("invalid batmap offset");
    }
    let Ok(map) = open::bytes(source, "batmap", raw.offset.get(), sectors.saturating_mul(SECTOR_SIZE)) else {
        return fault("invalid batmap size");
    };
    if raw.checksum.get() != raw.expected_checksum(&map, footer.current_size.get()) {
        return fault("invalid checksum");
    }
    Ok(())
}

/// Compares all bitmaps with the batmap.
fn bitmaps_fault(source: &mut Source<'_>, vhd: &Vhd) -> Result<(), Fault> {
    for_bitmaps(source, vhd, |block, bits| {
        let marked = vhd.batmap().is_some_and(|(_, map)| bitmap::get(map, block));
        if marked && !bitmap::all_set(bits, vhd.block_sectors()) {
            return Err(Fault::Reason(format!(
                "batmap marks block {block} as full, but its bitmap does not"
            )));
        }
        Ok(())
    })
}

/// Counts allocated and written sectors.
///
/// # Errors
/// Those of reading the bitmaps.
pub fn usage(source: &mut Source<'_>, vhd: &Vhd) -> Result<Usage, Error> {
    let mut usage = Usage::default();
    for_bitmaps(source, vhd, |_, bits| {
        usage.allocated = usage.allocated.saturating_add(vhd.block_sectors().into());
        usage.written = usage.written.saturating_add(bitmap::count(bits, vhd.block_sectors()).into());
        Ok::<(), Error>(())
    })?;
    Ok(usage)
}

/// Reads the bitmaps of all allocated blocks.
fn for_bitmaps<E: From<Error>>(
    source: &mut Source<'_>,
    vhd: &Vhd,
    mut visit: impl FnMut(u32, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let Some(dynamic) = &vhd.dynamic else { return Ok(()) };
    for (block, entry) in dynamic.bat.iter() {
        let bitmap = dynamic.layout.extent(entry).bitmap;
        let bits = open::bytes(source, "bitmap", bitmap, dynamic.layout.bitmap_bytes().into())?;
        visit(block, &bits)?;
    }
    Ok(())
}
