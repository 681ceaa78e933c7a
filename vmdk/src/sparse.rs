//! The state of an open sparse extent, and where its sectors are.

use std::ops::Range;

use format::cache::Tables;
use format::inflate::{Wrapping, inflate};
use format::{DiscardPlan, Format, Load, Lookup, Packed, Plan, Sector, Step};
use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::{U32, U64};

use crate::descriptor::Descriptor;
use crate::header::Header;
use crate::write::Writes;
use crate::{Error, SECTOR};

/// Bytes of a marker before compressed data.
const MARKER: usize = 12;

/// An open sparse extent.
#[derive(Debug)]
pub struct Sparse {
    pub(crate) header: Header,
    /// The descriptor that lies within.
    pub(crate) descriptor: Option<Descriptor>,
    pub(crate) writable: bool,
    /// Where each table is, in sectors, with what else is in the last sector.
    pub(crate) directory: Vec<u32>,
    /// The same of the redundant tables.
    pub(crate) redundant: Option<Vec<u32>>,
    /// Tables, as they are on disk, in whole sectors.
    pub(crate) tables: Tables<Box<[u32]>>,
    /// First byte that nothing on disk may reach.
    pub(crate) limit: u64,
    pub(crate) writes: Writes,
}

/// What a run of sectors within one table is.
pub(crate) enum Run {
    /// They read as zeros.
    Absent,
    /// They are at this byte offset.
    Data(u64),
    /// They are in this compressed grain.
    Packed(Packed),
    /// Their table is not in memory.
    Unread(Load),
}

/// What an entry of a table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    Absent,
    /// A grain at this byte offset.
    Grain(u64),
}

/// Where a sector is in the tables.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Position {
    /// Number of the grain.
    pub(crate) grain: u64,
    /// Number of its table.
    pub(crate) table: u32,
    /// Its entry in the table.
    pub(crate) slot: usize,
    /// The sector, counted from the grain's first.
    pub(crate) first: u32,
}

impl Sparse {
    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The descriptor that lies within the extent.
    pub fn descriptor(&self) -> Option<&Descriptor> {
        self.descriptor.as_ref()
    }

    pub(crate) fn decode(&self, entry: u32) -> Entry {
        match entry {
            0 => Entry::Absent,
            1 if self.header.zero_grains => Entry::Absent,
            sector => Entry::Grain(u64::from(sector).saturating_mul(SECTOR)),
        }
    }

    pub(crate) fn position(&self, sector: Sector) -> Position {
        let grain_sectors = u64::from(self.header.grain);
        let entries = u64::from(self.header.table_entries);
        let grain = sector.checked_div(grain_sectors).unwrap_or(0);
        let small = |value: Option<u64>| value.and_then(|value| u32::try_from(value).ok());
        Position {
            grain,
            table: small(grain.checked_div(entries)).unwrap_or(u32::MAX),
            slot: small(grain.checked_rem(entries)).and_then(|slot| usize::try_from(slot).ok()).unwrap_or(0),
            first: small(sector.checked_rem(grain_sectors)).unwrap_or(0),
        }
    }

    /// The sector at which the directory says that a table is; 0 for none.
    pub(crate) fn entry(directory: &[u32], table: u32) -> u32 {
        usize::try_from(table).ok().and_then(|table| directory.get(table)).copied().unwrap_or(0)
    }

    /// Where a table is; `None` if the directory names none.
    pub(crate) fn table_place(&self, table: u32) -> Result<Option<u64>, Error> {
        let place = u64::from(Self::entry(&self.directory, table)).saturating_mul(SECTOR);
        if place == 0 {
            return Ok(None);
        }
        match self.misplaced(place, self.header.table_bytes()) {
            None => Ok(Some(place)),
            Some(reason) => Err(Error::Corrupt {
                sector: self.header.table_covers().saturating_mul(table.into()),
                reason,
            }),
        }
    }

    /// Why a table or a grain of `len` bytes must not be at `place`.
    pub(crate) fn misplaced(&self, place: u64, len: u64) -> Option<&'static str> {
        let Some(end) = place.checked_add(len).filter(|&end| end <= self.limit) else {
            return Some("an entry points beyond the end of the file");
        };
        let hit = self.metadata().any(|range| place < range.end && range.start < end);
        hit.then_some("an entry points into the header, the descriptor or a grain directory")
    }

    /// The byte ranges of what is at fixed places.
    pub(crate) fn metadata(&self) -> impl Iterator<Item = Range<u64>> {
        let len = self.header.directory_bytes();
        let directory = |start: u64| start..start.saturating_add(len);
        let redundant = self.header.redundant.map(directory);
        [0..SECTOR, self.header.descriptor.clone(), directory(self.header.directory)]
            .into_iter()
            .chain(redundant)
    }

    /// What the first sectors of a run are, and how many of them: the longest prefix of one kind that is covered by one
    /// table.
    pub(crate) fn run(&self, sector: Sector, count: u32) -> Result<(Run, u32), Error> {
        let (at, header) = (self.position(sector), &self.header);
        let entries = usize::try_from(header.table_entries).unwrap_or(0);
        let sectors_of = |grains: usize| {
            let grains = u32::try_from(grains).unwrap_or(u32::MAX);
            grains.saturating_mul(header.grain).saturating_sub(at.first).min(count)
        };
        let left = entries.saturating_sub(at.slot);
        let Some(place) = self.table_place(at.table)? else { return Ok((Run::Absent, sectors_of(left))) };
        let Some(table) = self.tables.get(at.table.into()) else {
            let len = u32::try_from(header.table_bytes()).unwrap_or(0);
            return Ok((Run::Unread(Load { key: at.table.into(), offset: place, len }), sectors_of(left)));
        };
        let grains = u64::from(at.first).saturating_add(count.into()).div_ceil(header.grain.into());
        let wanted = usize::try_from(grains).unwrap_or(usize::MAX).min(left);
        let wanted = table.iter().skip(at.slot).take(wanted);
        match self.decode(table.get(at.slot).copied().unwrap_or(0)) {
            Entry::Absent => {
                let grains = wanted.take_while(|&&entry| self.decode(entry) == Entry::Absent).count();
                Ok((Run::Absent, sectors_of(grains)))
            }
            Entry::Grain(place) if header.compressed => {
                Ok((Run::Packed(self.packed(sector, place)?), sectors_of(1)))
            }
            Entry::Grain(place) => {
                self.check_grain(at.grain, place)?;
                let places = (place..).step_by(usize::try_from(header.grain_bytes()).unwrap_or(usize::MAX));
                let follows = |&(i, (&entry, place)): &(u64, (&u32, u64))| {
                    self.decode(entry) == Entry::Grain(place)
                        && self.check_grain(at.grain.saturating_add(i), place).is_ok()
                };
                let grains = (0..).zip(wanted.zip(places)).take_while(follows).count();
                let first = u64::from(at.first).saturating_mul(SECTOR);
                Ok((Run::Data(place.saturating_add(first)), sectors_of(grains)))
            }
        }
    }

    /// Refuses a grain that is where none can be. Of the last grain only the part that the disk has must be there.
    fn check_grain(&self, grain: u64, place: u64) -> Result<(), Error> {
        let sectors = self.grain_sectors(grain);
        let len = sectors.end.saturating_sub(sectors.start).saturating_mul(SECTOR);
        match self.misplaced(place, len) {
            None => Ok(()),
            Some(reason) => Err(Error::Corrupt { sector: sectors.start, reason }),
        }
    }

    fn packed(&self, sector: Sector, offset: u64) -> Result<Packed, Error> {
        if let Some(reason) = self.misplaced(offset, SECTOR.min(self.limit.saturating_sub(offset)).max(1)) {
            return Err(Error::Corrupt { sector, reason });
        }
        // How long it is stands in its marker. What cannot be compressed is a little longer than the grain; QEMU takes twice
        // a grain for the limit.
        let most = self.header.grain_bytes().saturating_mul(2).min(self.limit.saturating_sub(offset));
        Ok(Packed { offset, len: u32::try_from(most).unwrap_or(u32::MAX), sectors: self.header.grain })
    }

    /// The sectors of the disk that a grain has.
    pub(crate) fn grain_sectors(&self, grain: u64) -> Range<u64> {
        let start = grain.saturating_mul(self.header.grain.into());
        start..start.saturating_add(self.header.grain.into()).min(self.header.capacity)
    }

    pub(crate) fn check_range(&self, sector: Sector, count: u32) -> Result<(), Error> {
        let sectors = self.header.capacity;
        match sector.checked_add(count.into()) {
            Some(end) if end <= sectors && count > 0 => Ok(()),
            _ => Err(Error::OutOfRange { sector, count, sectors }),
        }
    }

    /// The compressed data behind the marker, and the sectors of the disk that they should give.
    fn behind_marker<'a>(
        &self,
        packed: &Packed,
        bytes: &'a [u8],
    ) -> Result<(&'a [u8], Range<u64>), &'static str> {
        if !self.header.markers {
            return Ok((bytes, 0..self.header.grain.into()));
        }
        let (sector, rest) = U64::read_from_prefix(bytes).map_err(|_| "its marker is cut off")?;
        let (len, _) = U32::read_from_prefix(rest).map_err(|_| "its marker is cut off")?;
        let position = self.position(sector.get());
        let sectors = self.grain_sectors(position.grain);
        if position.first != 0 || sectors.is_empty() {
            return Err("its marker is of a sector where no grain begins");
        }
        let entry = self.tables.peek(position.table.into()).and_then(|table| table.get(position.slot));
        if entry.is_some_and(|&entry| self.decode(entry) != Entry::Grain(packed.offset)) {
            return Err("its marker is of another grain");
        }
        let len = usize::try_from(len.get()).unwrap_or(usize::MAX);
        let data = bytes.get(MARKER..MARKER.saturating_add(len)).filter(|data| !data.is_empty());
        Ok((data.ok_or("its marker has an impossible length")?, sectors))
    }
}

/// The words of whole sectors.
pub(crate) fn words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.chunks_exact(4).map(|word| word.first_chunk().copied().unwrap_or_default());
    words.map(u32::from_le_bytes).collect()
}

impl Format for Sparse {
    type Error = Error;

    fn sectors(&self) -> u64 {
        self.header.capacity
    }

    fn place(&self, sector: Sector, count: u32) -> Option<u64> {
        self.check_range(sector, count).ok()?;
        match self.run(sector, count) {
            Ok((Run::Data(offset), found)) if found == count => Some(offset),
            _ => None,
        }
    }

    fn overwrite(&self, sector: Sector, count: u32) -> Option<u64> {
        if !self.writable || !self.writes.is_marked() || self.is_poisoned() {
            return None;
        }
        self.place(sector, count)
    }

    fn map(&self, sector: Sector, count: u32) -> Result<Lookup, Error> {
        self.check_range(sector, count)?;
        let mut absent = 0_u32;
        while absent < count {
            let (run, part) =
                match self.run(sector.saturating_add(absent.into()), count.saturating_sub(absent)) {
                    Ok(found) => found,
                    Err(_) if absent > 0 => break,
                    Err(error) => return Err(error),
                };
            match run {
                Run::Absent => absent = absent.saturating_add(part),
                _ if absent > 0 => break,
                Run::Data(offset) => return Ok(Lookup::Data { offset, count: part }),
                Run::Packed(packed) => {
                    return Ok(Lookup::Packed { packed, first: self.position(sector).first, count: part });
                }
                Run::Unread(load) => {
                    self.tables.load_began(load.key);
                    return Ok(Lookup::Load(load));
                }
            }
        }
        Ok(Lookup::Zero { count: absent })
    }

    fn loaded(&mut self, load: &Load, bytes: &[u8]) -> Result<(), Error> {
        if bytes.len() as u64 != self.header.table_bytes() {
            self.tables.failed(load.key);
            return Err(Error::invalid("grain table", format!("{} bytes are not one", bytes.len())));
        }
        let table = words(bytes);
        if self.writable {
            self.avoid_all(&table);
        }
        let writes = &self.writes;
        self.tables.arrived(load.key, table.into(), |table| writes.touches(table));
        Ok(())
    }

    fn load_failed(&mut self, load: &Load) {
        self.tables.failed(load.key);
    }

    fn unpack(&self, packed: &Packed, bytes: &[u8], into: &mut [u8]) -> Result<(), Error> {
        let bad = |reason| Error::BadGrain { offset: packed.offset, reason };
        let (data, sectors) = self.behind_marker(packed, bytes).map_err(bad)?;
        let whole = inflate(Wrapping::Zlib, data, into);
        // The last grain of a disk may end with it.
        let len = sectors.end.saturating_sub(sectors.start).saturating_mul(SECTOR);
        let part = usize::try_from(len).ok().filter(|&len| len < into.len());
        match (whole, part.and_then(|len| into.get_mut(..len))) {
            (Err(_), Some(part)) => inflate(Wrapping::Zlib, data, part).map_err(bad),
            (whole, _) => whole.map_err(bad),
        }
    }

    fn plan_write(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        self.plan(sector, count)
    }

    fn prepared(&mut self, _key: u64, done: bool) {
        self.marked(done);
    }

    fn written(&mut self, sector: Sector, count: u32, done: bool) {
        self.note_written(sector, count, done);
    }

    fn plan_discard(&mut self, sector: Sector, count: u32) -> Result<DiscardPlan, Error> {
        self.discard(sector, count)
    }

    fn begin_commit(&mut self) -> Option<Vec<Step>> {
        self.commit_steps()
    }

    fn commit_ended(&mut self, done: bool) {
        self.end_commit(done);
    }

    fn begin_resize(&mut self, _sectors: u64) -> Result<Option<Vec<Step>>, Error> {
        Err(Error::Unsupported("changes of the size of a VMDK".into()))
    }

    /// No resize ever begins.
    fn resize_ended(&mut self, _done: bool) {}

    fn close_steps(&self) -> Vec<Step> {
        self.resting_steps()
    }

    fn is_poisoned(&self) -> bool {
        self.writes.poisoned
    }
}
