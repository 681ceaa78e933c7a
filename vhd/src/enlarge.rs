//! Resizing an image that nobody uses, under an undo journal: the allocation table may grow beyond its room.
//!
//! Where the table needs more room, what follows it moves up, and the blocks that are in the way of that move to the end of
//! the file. All of this happens while the footers carry the poison cookie:
//!
//! 1. everything that will be overwritten is in the journal, durable;
//! 2. the footers are poisoned, durable;
//! 3. the work is done, durable;
//! 4. the footers are good again and have the new size: the one at offset 0 first, which decides, then the one at the end. As
//!    long as either is poisoned, nobody opens the image and the journal can undo everything;
//! 5. the journal can go.
//!
//! blktap does the same in an order that does not hold: it poisons before the journal is durable.

use std::ops::Range;

use format::blocking::Storage;
use format::{MetaWrite, SECTOR_SIZE, Step};
use zerocopy::IntoBytes;

use crate::bat::{self, Extent};
use crate::footer::{self, RawFooter};
use crate::header::{self, RawHeader};
use crate::image::Dynamic;
use crate::journal::{Builder, Kind};
use crate::{BlockIndex, Error, MAX_DISK_SIZE, Vhd, alloc, batmap, geometry, locator};

/// Bytes that are copied at a time.
const CHUNK: u64 = 1 << 20;

/// Where storage managers' tests stop a resize; the names are those of blktap's environment variables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The image is poisoned and otherwise untouched.
    Begin,
    /// The blocks in the way have been moved.
    DataMoved,
    /// What lies behind the table has been moved.
    MetadataMoved,
    /// Everything is done but for the footers.
    End,
}

impl Point {
    /// The name of the environment variable.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Begin => "VHD_UTIL_TEST_FAIL_RESIZE_BEGIN",
            Self::DataMoved => "VHD_UTIL_TEST_FAIL_RESIZE_DATA_MOVED",
            Self::MetadataMoved => "VHD_UTIL_TEST_FAIL_RESIZE_METADATA_MOVED",
            Self::End => "VHD_UTIL_TEST_FAIL_RESIZE_END",
        }
    }
}

/// Told where the work is; an error ends it there.
pub type AtPoint<'a> = dyn FnMut(Point) -> Result<(), Error> + 'a;

/// Makes the disk of an image `sectors` sectors large; a dynamic image's is rounded up to whole blocks. `vhd` was opened from
/// `image` for writing and found closed cleanly; nobody else uses it. Afterwards, whatever comes of it, `vhd` is to be opened
/// again. The journal is left to be removed.
///
/// # Errors
/// Sizes that cannot be: nothing has been touched then. Those of the storages, which leave the image to be reverted. What
/// `at` says.
pub fn resize<I: Storage, J: Storage>(
    vhd: &Vhd,
    image: &mut I,
    journal: &mut J,
    sectors: u64,
    at: &mut AtPoint<'_>,
) -> Result<(), Error> {
    let size = sectors.saturating_mul(SECTOR_SIZE);
    if size > MAX_DISK_SIZE {
        return Err(Error::TooBig { what: "disk size", value: size, limit: MAX_DISK_SIZE });
    }
    if size == 0 {
        return Err(Error::invalid("disk size", "a disk has at least one sector"));
    }
    match &vhd.dynamic {
        Some(_) if sectors < vhd.sectors => {
            Err(Error::invalid("disk size", "only a fixed image can be made smaller"))
        }
        Some(dynamic) => {
            let plan = Plan::new(vhd, dynamic, size, &Place::of(image)?)?;
            plan.save(vhd, image)?.write(journal)?;
            plan.carry_out(vhd, image, at)
        }
        None => resize_fixed(vhd, image, journal, size, at),
    }
}

/// Where the end of an image is.
struct Place {
    /// Byte offset of the footer at the end.
    footer: u64,
    regular: bool,
}

impl Place {
    fn of<I: Storage>(image: &I) -> Result<Self, Error> {
        let size = image.size().map_err(|source| unread(0, source))?;
        let footer = size.checked_sub(footer::LEN as u64).ok_or(Error::TooShort { size })?;
        Ok(Self { footer, regular: image.is_regular().map_err(|source| unread(0, source))? })
    }
}

/// A block that makes way.
struct Move {
    block: BlockIndex,
    from: Extent,
    /// Behind the end of what there was: begins with the gap before the bitmap.
    gap: u64,
    to: Extent,
    entry: u32,
}

/// All that a resize of a dynamic image changes.
struct Plan {
    footer: RawFooter,
    header: RawHeader,
    /// Byte offset of the footer at the end.
    old_end: u64,
    new_end: u64,
    moves: Vec<Move>,
    /// Where the locators' names were, and where they come to.
    names: Vec<(Range<u64>, u64)>,
    table: MetaWrite,
    batmap: Vec<MetaWrite>,
    end_of_headers: u64,
    /// The metadata do not stay where they are.
    shifted: bool,
    regular: bool,
}

impl Plan {
    /// Decides everything. Pure.
    fn new(vhd: &Vhd, dynamic: &Dynamic, size: u64, place: &Place) -> Result<Self, Error> {
        let layout = &dynamic.layout;
        let block_size = u64::from(layout.block_sectors).saturating_mul(SECTOR_SIZE).max(1);
        let blocks = u32::try_from(size.div_ceil(block_size)).unwrap_or(u32::MAX);
        let mut header = dynamic.header.clone();
        let old_entries = header.table_entries.get();
        let entries = old_entries.max(blocks);
        if entries > bat::MAX_ENTRIES {
            let (value, limit) = (entries.into(), bat::MAX_ENTRIES.into());
            return Err(Error::TooBig { what: "number of blocks", value, limit });
        }
        header.table_entries = entries.into();
        if vhd.footer.data_offset.get() > layout.table_offset {
            return Err(Error::invalid("header", "it lies behind the table, which cannot grow then"));
        }
        let mut footer = vhd.footer.clone();
        footer.current_size = u64::from(blocks).saturating_mul(block_size).into();
        footer.geometry = geometry::for_sectors(footer.current_size.get() / SECTOR_SIZE).into();
        footer.seal();

        let table_end = table_end(layout.table_offset, entries);
        let mut end = table_end;
        let mut map = None;
        if let Some(old) = &dynamic.batmap {
            let offset = end.saturating_add(batmap::LEN as u64);
            let sectors = batmap::sectors_for(entries).max(old.header.sectors.get());
            let full = |block| dynamic.is_full(block);
            map = Some(old.moved(table_end, offset, sectors, footer.current_size.get(), full));
            end = offset.saturating_add(u64::from(sectors).saturating_mul(SECTOR_SIZE));
        }
        let mut names = Vec::new();
        for raw in &mut header.locators {
            let Some((offset, space)) = locator::extent(raw) else { continue };
            if offset < layout.table_offset {
                continue;
            }
            names.push((offset..offset.saturating_add(space), end));
            raw.offset = end.into();
            end = end.saturating_add(space);
        }
        header.seal();
        let shifted = table_end != self::table_end(layout.table_offset, old_entries);
        let end_of_headers = end.max(header_end(vhd)).max(fixed_names_end(&header));
        let (moves, new_end) = make_way(dynamic, end_of_headers, place)?;
        let table = new_table(dynamic, entries, &moves);
        Ok(Self {
            footer,
            header,
            old_end: place.footer,
            new_end,
            moves,
            names,
            table: MetaWrite { offset: layout.table_offset, bytes: table },
            batmap: map.unwrap_or_default(),
            end_of_headers,
            shifted,
            regular: place.regular,
        })
    }

    /// What the image holds in all places that will change.
    fn save<I: Storage>(&self, vhd: &Vhd, image: &I) -> Result<Builder, Error> {
        let mut journal = Builder::new(vhd.uuid(), self.old_end);
        let mut add = |kind, range: Range<u64>| -> Result<(), Error> {
            if !range.is_empty() {
                journal.add(kind, range.start, &read(image, range.start, range.end)?);
            }
            Ok(())
        };
        let sector = |offset: u64| offset..offset.saturating_add(SECTOR_SIZE);
        let Some(dynamic) = &vhd.dynamic else { return Ok(journal) };
        add(Kind::EndFooter, sector(self.old_end))?;
        add(Kind::FooterCopy, sector(0))?;
        let header = vhd.footer.data_offset.get();
        add(Kind::Header, header..header_end(vhd))?;
        for (offset, space) in dynamic.header.locators.iter().filter_map(locator::extent) {
            add(Kind::Locator, offset..offset.saturating_add(space))?;
        }
        let table = dynamic.layout.table_offset;
        let table_end = table_end(table, dynamic.header.table_entries.get());
        add(Kind::Table, table..table_end)?;
        if let Some(batmap) = &dynamic.batmap {
            add(Kind::BatmapHeader, sector(batmap.offset))?;
            add(Kind::Batmap, batmap.header.offset.get()..batmap.end())?;
        }
        // The room before the first block, which the metadata take first.
        let first = dynamic.bat.iter().map(|(_, entry)| dynamic.layout.extent(entry).bitmap).min();
        let room_end = first.unwrap_or(self.old_end).min(self.end_of_headers);
        add(Kind::Data, dynamic.layout.end_of_headers..room_end)?;
        for Move { from, .. } in &self.moves {
            add(Kind::Data, from.bitmap..from.data)?;
            add(Kind::Data, from.data..from.end)?;
        }
        Ok(journal)
    }

    fn carry_out<I: Storage>(&self, vhd: &Vhd, image: &mut I, at: &mut AtPoint<'_>) -> Result<(), Error> {
        let poison = poisoned(&vhd.footer);
        write(image, 0, &poison)?;
        write(image, self.old_end, &poison)?;
        sync(image)?;
        at(Point::Begin)?;
        let names = self.names.iter().map(|(from, _)| read(image, from.start, from.end));
        let names = names.collect::<Result<Vec<_>, _>>()?;
        if !self.moves.is_empty() {
            self.move_blocks(image)?;
            at(Point::DataMoved)?;
        }
        for ((_, to), name) in self.names.iter().zip(&names) {
            write(image, *to, name)?;
        }
        for part in &self.batmap {
            write(image, part.offset, &part.bytes)?;
        }
        sync(image)?;
        if self.shifted {
            at(Point::MetadataMoved)?;
        }
        write(image, self.table.offset, &self.table.bytes)?;
        write(image, vhd.footer.data_offset.get(), self.header.as_bytes())?;
        let poison = poisoned(&self.footer);
        write(image, 0, &poison)?;
        if self.regular {
            write(image, self.new_end, &poison)?;
        } else {
            write(image, self.old_end, &poison)?;
        }
        sync(image)?;
        at(Point::End)?;
        let good = self.footer.as_bytes();
        write(image, 0, good)?;
        sync(image)?;
        write(image, if self.regular { self.new_end } else { self.old_end }, good)?;
        sync(image)
    }

    fn move_blocks<I: Storage>(&self, image: &mut I) -> Result<(), Error> {
        if self.regular {
            // The end is never the data of a guest.
            write(image, self.new_end, &poisoned(&self.footer))?;
        }
        for Move { from, gap, to, .. } in &self.moves {
            image.zero(*gap..to.bitmap).map_err(unwritten)?;
            let mut done = from.bitmap;
            while done < from.end {
                let next = done.saturating_add(CHUNK).min(from.end);
                let bytes = read(image, done, next)?;
                write(image, to.bitmap.saturating_add(done.saturating_sub(from.bitmap)), &bytes)?;
                done = next;
            }
        }
        sync(image)
    }
}

/// The blocks that begin before `end_of_headers`, with their new places, and the new end of the data.
fn make_way(dynamic: &Dynamic, end_of_headers: u64, place: &Place) -> Result<(Vec<Move>, u64), Error> {
    let layout = &dynamic.layout;
    let mut in_the_way = dynamic
        .bat
        .iter()
        .map(|(block, entry)| (entry, block))
        .filter(|&(entry, _)| layout.extent(entry).bitmap < end_of_headers)
        .collect::<Vec<_>>();
    in_the_way.sort_unstable();
    let limit = if place.regular { alloc::MAX_FILE } else { place.footer.min(alloc::MAX_FILE) };
    let mut end = dynamic.end_of_data.max(end_of_headers);
    if end > limit {
        return Err(Error::NoSpace { end });
    }
    let mut moves = Vec::new();
    for (old, block) in in_the_way {
        let full = Error::NoSpace { end };
        let (entry, next) = alloc::place(end, layout).filter(|&(_, next)| next <= limit).ok_or(full)?;
        moves.push(Move { block, from: layout.extent(old), gap: end, to: layout.extent(entry), entry });
        end = next;
    }
    Ok((moves, end))
}

/// The bytes of the larger table.
fn new_table(dynamic: &Dynamic, entries: u32, moves: &[Move]) -> Vec<u8> {
    let mut table = Vec::new();
    for block in 0..entries {
        table.extend(dynamic.bat.get(block).unwrap_or(bat::UNUSED).to_be_bytes());
    }
    for Move { block, entry, .. } in moves {
        let at = usize::try_from(*block).unwrap_or(usize::MAX).saturating_mul(4);
        for (to, from) in table.iter_mut().skip(at).zip(entry.to_be_bytes()) {
            *to = from;
        }
    }
    table.resize(table.len().next_multiple_of(512), 0);
    table
}

/// First byte behind a table with so many entries.
fn table_end(offset: u64, entries: u32) -> u64 {
    offset.saturating_add(u64::from(entries).saturating_mul(4).next_multiple_of(SECTOR_SIZE))
}

fn header_end(vhd: &Vhd) -> u64 {
    vhd.footer.data_offset.get().saturating_add(header::LEN as u64)
}

/// First byte behind all names of parents.
fn fixed_names_end(header: &RawHeader) -> u64 {
    let ends = header.locators.iter().filter_map(locator::extent);
    ends.map(|(offset, space)| offset.saturating_add(space)).max().unwrap_or(0)
}

/// Resizes a fixed image. What is cut off is gone by the last step, which makes the footer before it the end.
fn resize_fixed<I: Storage, J: Storage>(
    vhd: &Vhd,
    image: &mut I,
    journal: &mut J,
    size: u64,
    at: &mut AtPoint<'_>,
) -> Result<(), Error> {
    let Place { footer: old, regular } = Place::of(image)?;
    let mut footer = vhd.footer.clone();
    footer.current_size = size.into();
    footer.geometry = geometry::for_sectors(size / SECTOR_SIZE).into();
    footer.seal();
    let new = if regular { size } else { old };
    if size > old && !regular {
        return Err(Error::NoSpace { end: size });
    }
    let mut saved = Builder::new(vhd.uuid(), old);
    saved.add(Kind::EndFooter, old, &read(image, old, old.saturating_add(SECTOR_SIZE))?);
    if new < old {
        saved.add(Kind::Data, new, &read(image, new, new.saturating_add(SECTOR_SIZE))?);
    }
    saved.write(journal)?;
    write(image, old, &poisoned(&vhd.footer))?;
    sync(image)?;
    at(Point::Begin)?;
    if new > old {
        write(image, new, &poisoned(&footer))?;
        sync(image)?;
        image.zero(old..new).map_err(unwritten)?;
    } else if new < old {
        write(image, new, footer.as_bytes())?;
    } else if size > vhd.footer.current_size.get() {
        image.zero(vhd.footer.current_size.get()..size).map_err(unwritten)?;
    }
    sync(image)?;
    at(Point::End)?;
    if new < old {
        image.set_len(new.saturating_add(SECTOR_SIZE)).map_err(unwritten)?;
    } else {
        write(image, new, footer.as_bytes())?;
    }
    sync(image)
}

pub(crate) fn poisoned(footer: &RawFooter) -> Vec<u8> {
    let mut footer = footer.clone();
    footer.cookie = footer::POISON;
    footer.sealed().as_bytes().to_vec()
}

pub(crate) fn read<I: Storage>(image: &I, from: u64, to: u64) -> Result<Vec<u8>, Error> {
    let len = usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len];
    image.read_at(from, &mut bytes).map_err(|source| unread(from, source))?;
    Ok(bytes)
}

pub(crate) fn write<I: Storage>(image: &mut I, offset: u64, bytes: &[u8]) -> Result<(), Error> {
    image.write_at(offset, bytes).map_err(unwritten)
}

pub(crate) fn sync<I: Storage>(image: &mut I) -> Result<(), Error> {
    image.sync().map_err(unwritten)
}

fn unread(offset: u64, source: std::io::Error) -> Error {
    Error::Io { what: "image", offset, source }
}

fn unwritten(source: std::io::Error) -> Error {
    Error::Unwritten { what: "image", source }
}

impl Vhd {
    /// The steps that put the footer to all its places and cut off what is behind: what is to be done before a resize if
    /// [`Vhd::needs_tidying`].
    pub fn tidying_steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        self.footer_steps(&mut steps);
        steps
    }

    /// True if the image in a file of `size` bytes does not end directly behind its data, with a footer like the other one.
    pub fn needs_tidying(&self, size: u64, regular: bool) -> bool {
        let askew = regular && size != self.end_of_data().saturating_add(SECTOR_SIZE);
        askew || self.end != crate::image::EndFooter::Alike
    }
}
