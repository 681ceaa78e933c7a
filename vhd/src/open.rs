//! Opening: which footer counts, and the checks that everything later relies on.
//!
//! A writer of blocks overwrites the footer at the end of a file and puts it back when it closes the image. After a
//! crash the last sector may therefore hold whatever the guest wrote, even a footer of its own making. So the copy at
//! offset 0, which no guest can reach in a dynamic image, decides; the footer at the end only confirms it.
//! In a fixed image it is the other way round: the guest owns offset 0. If both places hold a good footer of the kind
//! that belongs there, nothing can tell which of them the guest forged, and the image is refused.

use format::Source;
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::U32;

use crate::bat::{self, Bat, Layout};
use crate::batmap::{self, Batmap, RawBatmapHeader};
use crate::footer::{self, DiskType, FooterFault, RawFooter};
use crate::header::{self, RawHeader};
use crate::image::{Dynamic, EndFooter, Vhd};
use crate::key::{self, Key};
use crate::locator::{self, ParentName, Platform};
use crate::{Error, SECTOR_SIZE};

/// The largest disk, in bytes: more cannot be addressed by 32-bit sector numbers of the table.
pub const MAX_DISK_SIZE: u64 = 2 << 40;

/// Reads `len` bytes of the structure `what`.
pub(crate) fn bytes(
    source: &mut Source<'_>,
    what: &'static str,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, Error> {
    if offset.checked_add(len).is_none_or(|end| end > source.size) {
        let reason = format!("it lies beyond the end of the file at byte {}", source.size);
        return Err(Error::invalid(what, reason));
    }
    source.bytes(offset, len).map_err(|source| Error::Io { what, offset, source })
}

/// How to open an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Blocks may be written and allocated. Asks more of the image than reading does.
    pub writable: bool,
    /// Open although a journalled operation is unfinished; only for programs that finish or undo it.
    pub ignore_poison: bool,
    /// Use the footer at the end of a dynamic image whose copy at offset 0 is damaged. Only for tools that look at an
    /// image for its administrator: a guest may have forged it.
    pub trust_end: bool,
    /// Open an encrypted image without its key. Only for tools that do not read its data.
    pub allow_encrypted: bool,
    /// Note which single sectors are written also where nothing but speed depends on it: in a dynamic image, whose other
    /// sectors are zeros. For tools that put together what others will compare or merge.
    pub precise: bool,
    /// The key of an encrypted image; others are refused with one. A fixed image has no place to say that it is encrypted.
    pub key: Option<Key>,
}

/// A footer found in an image with the place where it was found.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) footer: RawFooter,
    pub(crate) offset: u64,
    pub(crate) state: Result<(), FooterFault>,
}

/// Reads the footer at the end, in its short form if the length of the file says so.
pub(crate) fn read_end(source: &mut Source<'_>) -> Result<Found, Error> {
    let short = source.regular && source.size % SECTOR_SIZE == footer::SHORT_LEN as u64;
    let len = if short { footer::SHORT_LEN } else { footer::LEN } as u64;
    let offset = source.size.checked_sub(len).ok_or(Error::TooShort { size: source.size })?;
    let footer = RawFooter::from_slice(&bytes(source, "footer", offset, len)?);
    Ok(Found { state: footer.verify(), footer, offset })
}

/// Reads the copy at offset 0.
pub(crate) fn read_copy(source: &mut Source<'_>) -> Result<Option<Found>, Error> {
    if source.size < footer::LEN as u64 {
        return Ok(None);
    }
    let footer = RawFooter::from_slice(&bytes(source, "footer copy", 0, footer::LEN as u64)?);
    Ok(Some(Found { state: footer.verify(), footer, offset: 0 }))
}

/// The footer that decides what the image is, and the one at the end if that confirms it.
struct Decision {
    footer: RawFooter,
    end: Option<Found>,
}

/// Applies the rule at the head of this file. Pure.
fn decide(copy: Option<Found>, end: Found, options: &OpenOptions) -> Result<Decision, Error> {
    let usable = |found: &Found| match found.state {
        Ok(()) => true,
        Err(FooterFault::Poisoned) => options.ignore_poison,
        Err(_) => false,
    };
    let kind = |found: &Found| DiskType::from_raw(found.footer.disk_type.get());
    let is_fixed =
        usable(&end) && kind(&end) == Some(DiskType::Fixed) && end.footer.current_size.get() <= end.offset;
    let copy_state = copy.as_ref().map_or(Err(FooterFault::Cookie), |copy| copy.state);
    match copy.filter(|copy| matches!(kind(copy), Some(DiskType::Dynamic | DiskType::Differencing))) {
        Some(copy) if usable(&copy) => {
            if is_fixed {
                return Err(Error::invalid(
                    "image",
                    "it begins as a dynamic and ends as a fixed VHD, and a guest may have forged either",
                ));
            }
            let poisoned = end.state == Err(FooterFault::Poisoned) && !options.ignore_poison;
            if poisoned && end.footer.same_image(&copy.footer) {
                return Err(Error::JournalPending);
            }
            let confirmed = usable(&end) && end.footer.same_image(&copy.footer);
            Ok(Decision { footer: copy.footer, end: confirmed.then_some(end) })
        }
        Some(copy) if copy.state == Err(FooterFault::Poisoned) => Err(Error::JournalPending),
        _ if is_fixed => Ok(Decision { footer: end.footer.clone(), end: Some(end) }),
        _ if end.state == Err(FooterFault::Poisoned) && !options.ignore_poison => Err(Error::JournalPending),
        _ if usable(&end) && options.trust_end && kind(&end) != Some(DiskType::Fixed) => {
            Ok(Decision { footer: end.footer.clone(), end: Some(end) })
        }
        _ => Err(unusable(copy_state, &end)),
    }
}

/// The error for an image none of whose footers can be used.
fn unusable(copy: Result<(), FooterFault>, end: &Found) -> Error {
    let say = |state: Result<(), FooterFault>| match state {
        Ok(()) => "is of an unknown or unsuitable type",
        Err(FooterFault::Cookie) => "has no VHD cookie",
        Err(FooterFault::Checksum) => "has a wrong checksum",
        Err(FooterFault::Poisoned) => "is poisoned",
    };
    if end.state.is_ok() && DiskType::from_raw(end.footer.disk_type.get()) == Some(DiskType::Fixed) {
        let size = end.footer.current_size.get();
        return Error::invalid("footer", format!("a fixed disk of {size} bytes does not fit into the file"));
    }
    Error::invalid(
        "footer",
        format!("the one at the end {}, the copy at offset 0 {}", say(end.state), say(copy)),
    )
}

/// Checks the fields of the deciding footer that both kinds of image share.
fn check_footer(footer: &RawFooter) -> Result<(), Error> {
    if footer.version.get() != footer::FORMAT_VERSION {
        return Err(Error::invalid("footer", format!("unknown format version {:#x}", footer.version.get())));
    }
    match footer.tap_version() {
        // Version 0.1 wrote its bitmaps in another bit order; blktap refuses it too.
        Some((0, minor)) => {
            return Err(Error::invalid("footer", format!("blktap version 0.{minor} is not supported")));
        }
        Some(version) if version > (1, 3) => {
            return Err(Error::invalid(
                "footer",
                format!("blktap version {}.{} is unknown", version.0, version.1),
            ));
        }
        _ => {}
    }
    check_size(footer.current_size.get())
}

fn check_size(size: u64) -> Result<(), Error> {
    if size == 0 || !size.is_multiple_of(SECTOR_SIZE) {
        return Err(Error::invalid(
            "footer",
            format!("the disk size {size} is not a positive number of sectors"),
        ));
    }
    if size > MAX_DISK_SIZE {
        return Err(Error::TooBig { what: "disk size", value: size, limit: MAX_DISK_SIZE });
    }
    Ok(())
}

pub(crate) fn open(source: &mut Source<'_>, options: &OpenOptions) -> Result<Vhd, Error> {
    let end = read_end(source)?;
    let copy = read_copy(source)?;
    let Decision { footer, end } = decide(copy, end, options)?;
    check_footer(&footer)?;
    let kind = DiskType::from_raw(footer.disk_type.get())
        .ok_or_else(|| Error::invalid("footer", "unknown disk type"))?;
    if kind == DiskType::Fixed {
        key::unlock(None, options.key.as_ref(), options.allow_encrypted)?;
        let offset = end.map_or(0, |end| end.offset);
        return Ok(Vhd::new(footer, kind, options.writable, EndFooter::Alike, offset, None));
    }
    let (footer, end, dynamic) = open_dynamic(source, options, footer, end, kind)?;
    Ok(Vhd::new(footer, kind, options.writable, end, 0, Some(dynamic)))
}

fn open_dynamic(
    source: &mut Source<'_>,
    options: &OpenOptions,
    copy: RawFooter,
    end: Option<Found>,
    kind: DiskType,
) -> Result<(RawFooter, EndFooter, Dynamic), Error> {
    let header_offset = copy.data_offset.get();
    let header = read_header(source, header_offset)?;
    let (layout, table_end) = place(source, &header, header_offset)?;
    // A resize that was cut short leaves footers of different sizes. The table is read for the larger one, so that no
    // block of it is missed when the end of the data is computed.
    let entries_of = |footer: &RawFooter| blocks_for(footer.current_size.get(), header.block_size.get());
    let entries = entries_of(&copy);
    if entries > header.table_entries.get() {
        let reason =
            format!("a disk of {entries} blocks exceeds the table of {}", header.table_entries.get());
        return Err(Error::invalid("header", reason));
    }
    let end = end.filter(|end| {
        check_size(end.footer.current_size.get()).is_ok()
            && entries_of(&end.footer) <= header.table_entries.get()
    });
    let most = end.as_ref().map_or(entries, |end| entries_of(&end.footer).max(entries));
    let table = read_table(source, &layout, most)?;
    let names = if kind == DiskType::Differencing { read_names(source, &header) } else { Vec::new() };

    let mut layout = layout;
    let bat = Bat::new(table, most);
    let blocks_start = bat.iter().map(|(_, entry)| layout.extent(entry).bitmap).min();
    let batmap = read_batmap(source, &copy, &header, table_end, blocks_start)?;
    let stored = batmap.as_ref().and_then(|map| map.header.key_hash());
    let cipher = key::unlock(stored.as_ref(), options.key.as_ref(), options.allow_encrypted)?;
    let locators_end = header.locators.iter().filter_map(|raw| locator_end(raw, source.size)).max();
    layout.end_of_headers = layout
        .end_of_headers
        .max(batmap.as_ref().map_or(0, Batmap::end))
        .max(locators_end.unwrap_or(0))
        .next_multiple_of(SECTOR_SIZE);

    let end_of_data = bat::end_of_data(&bat, &layout);
    if end_of_data > u64::from(u32::MAX).saturating_mul(SECTOR_SIZE) {
        return Err(Error::invalid("block allocation table", "a block reaches beyond 2 TiB of the file"));
    }
    let limit = data_limit(source);
    if options.writable {
        bat::check_places(&bat, &layout, limit)?;
    }
    // A footer inside the data is the guest's.
    let end = end.filter(|end| end.offset >= end_of_data);
    let state = match &end {
        None => EndFooter::Missing,
        Some(end) if end.footer == copy => EndFooter::Alike,
        Some(_) => EndFooter::Differs,
    };
    let footer = end.map_or(copy, |end| end.footer);
    let bat = bat.truncated(entries_of(&footer));
    let end_of_data = bat::end_of_data(&bat, &layout).max(end_of_data);
    if state == EndFooter::Missing {
        log::warn!("image was not closed cleanly; the footer copy at offset 0 is used");
    }
    let batmap = batmap.map(|mut batmap| {
        let stale = batmap.retain(|block| bat.get(block).is_some());
        if stale > 0 {
            log::warn!("batmap marks {stale} unallocated blocks as full; ignored");
        }
        batmap
    });
    let mut dynamic = Dynamic::new(header, names, layout, bat, batmap, end_of_data, limit, source);
    dynamic.cipher = cipher;
    dynamic.whole_blocks = kind == DiskType::Dynamic && stored.is_none() && !options.precise;
    Ok((footer, state, dynamic))
}

/// The first byte that blocks must not reach: the end of a file, the footer at the end of a device.
pub(crate) fn data_limit(source: &Source<'_>) -> u64 {
    if source.regular { source.size } else { source.size.saturating_sub(SECTOR_SIZE) }
}

/// Reads and checks the dynamic header.
fn read_header(source: &mut Source<'_>, offset: u64) -> Result<RawHeader, Error> {
    if offset < footer::LEN as u64 || !offset.is_multiple_of(SECTOR_SIZE) {
        return Err(Error::invalid(
            "footer",
            format!("header offset {offset} is not a sector behind the footer"),
        ));
    }
    let header = RawHeader::from_slice(&bytes(source, "header", offset, header::LEN as u64)?);
    header.verify()?;
    Ok(header)
}

/// The layout so far, and the first byte behind the table.
fn place(source: &Source<'_>, header: &RawHeader, header_offset: u64) -> Result<(Layout, u64), Error> {
    let invalid = |reason: String| Error::invalid("header", reason);
    let table = header.table_offset.get();
    let header_end = header_offset.saturating_add(header::LEN as u64);
    let table_len = u64::from(header.table_entries.get()).saturating_mul(4).next_multiple_of(SECTOR_SIZE);
    let table_end = table.checked_add(table_len).filter(|&end| end <= source.size).ok_or_else(|| {
        invalid(format!("table of {table_len} bytes at {table} reaches beyond the end of file"))
    })?;
    let apart = table >= header_end || table_end <= header_offset;
    if table < footer::LEN as u64 || !table.is_multiple_of(SECTOR_SIZE) || !apart {
        return Err(invalid(format!("table offset {table} is not a sector behind the header")));
    }
    let block_sectors = header.block_size.get() >> 9;
    let layout = Layout {
        block_sectors,
        bitmap_sectors: block_sectors.div_ceil(8).div_ceil(512),
        table_offset: table,
        end_of_headers: header_end.max(table_end),
    };
    Ok((layout, table_end))
}

/// Blocks of a disk of `size` bytes; what exceeds 32 bits is more than any table has.
fn blocks_for(size: u64, block_size: u32) -> u32 {
    u32::try_from(size.div_ceil(u64::from(block_size.max(1)))).unwrap_or(u32::MAX)
}

/// Reads the first `entries` entries of the table, up to the end of their last sector.
fn read_table(source: &mut Source<'_>, layout: &Layout, entries: u32) -> Result<Vec<U32>, Error> {
    if entries > bat::MAX_ENTRIES {
        let (value, limit) = (entries.into(), bat::MAX_ENTRIES.into());
        return Err(Error::TooBig { what: "number of blocks", value, limit });
    }
    let len = u64::from(entries).saturating_mul(4).next_multiple_of(SECTOR_SIZE);
    let bytes = bytes(source, "block allocation table", layout.table_offset, len)?;
    let table = <[U32]>::ref_from_bytes(&bytes)
        .map_err(|_| Error::invalid("block allocation table", "its length is not a multiple of 4"))?;
    Ok(table.to_vec())
}

/// First byte behind a usable locator inside the file.
fn locator_end(raw: &header::RawLocator, size: u64) -> Option<u64> {
    let (offset, space) = locator::extent(raw)?;
    offset.checked_add(space).filter(|&end| end <= size)
}

/// The parent's names that can be read and decoded, in the order in which they are to be tried.
fn read_names(source: &mut Source<'_>, header: &RawHeader) -> Vec<ParentName> {
    let mut names = Vec::new();
    for raw in &header.locators {
        let name = Platform::from_code(raw.code.get()).and_then(|platform| {
            locator_end(raw, source.size)?;
            let bytes = bytes(source, "parent locator", raw.offset.get(), raw.length.get().into()).ok()?;
            let path = locator::decode(platform, &bytes)?.into();
            Some(ParentName { platform, path })
        });
        names.extend(name);
    }
    locator::order(names)
}

/// The batmap, or an empty one in its place if what is there cannot be used; `None` if the image has no batmap or its
/// place is taken by blocks (as after writes by programs that know nothing of it).
fn read_batmap(
    source: &mut Source<'_>,
    footer: &RawFooter,
    header: &RawHeader,
    table_end: u64,
    blocks_start: Option<u64>,
) -> Result<Option<Batmap>, Error> {
    let Some(version) = footer.tap_version() else { return Ok(None) };
    let limit = blocks_start.unwrap_or(u64::MAX).min(source.size);
    let map_offset = table_end.saturating_add(batmap::LEN as u64);
    if map_offset > source.size {
        return Ok(None);
    }
    let raw = RawBatmapHeader::from_slice(&bytes(source, "batmap header", table_end, batmap::LEN as u64)?);
    let size = footer.current_size.get();
    if raw.cookie == batmap::COOKIE
        && let Some(map) = read_map(source, &raw, map_offset)
    {
        // A block in the place of the map would have spoilt its checksum: with a good one it is the block's entry that is
        // wrong.
        if raw.checksum.get() == raw.expected_checksum(&map, size) {
            return Ok(Some(Batmap::new(raw, table_end, map, size, false)));
        }
        if batmap::map_end(&raw).is_some_and(|end| end <= limit) {
            log::warn!("batmap checksum is wrong; the map is started anew");
            let empty = vec![0; map.len()];
            return Ok(Some(Batmap::new(raw, table_end, empty, size, true)));
        }
    }
    let sectors = batmap::sectors_for(header.table_entries.get());
    let fresh = RawBatmapHeader::new(map_offset, sectors);
    let end = batmap::map_end(&fresh).unwrap_or(u64::MAX);
    let free = header
        .locators
        .iter()
        .filter_map(locator::extent)
        .all(|(offset, space)| offset >= end || offset.saturating_add(space) <= table_end);
    if version < (1, 2) || end > limit || !free {
        return Ok(None);
    }
    log::warn!("batmap header is damaged; the map is started anew");
    let empty = vec![0; usize::try_from(sectors).unwrap_or(0).saturating_mul(512)];
    Ok(Some(Batmap::new(fresh, table_end, empty, size, true)))
}

/// The map that a batmap header describes, if it lies behind the header and in the file.
fn read_map(source: &mut Source<'_>, raw: &RawBatmapHeader, min: u64) -> Option<Vec<u8>> {
    let offset = raw.offset.get();
    let end = batmap::map_end(raw)?;
    if raw.sectors.get() == 0 || offset < min || !offset.is_multiple_of(SECTOR_SIZE) {
        return None;
    }
    bytes(source, "batmap", offset, end.checked_sub(offset)?).ok()
}
