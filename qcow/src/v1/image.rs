//! The state of an open image, and where its sectors are.

use std::ops::Range;

use format::cache::Tables;
use format::cipher::Cipher;
use format::inflate::{Wrapping, inflate};
use format::{DiscardPlan, Format, Load, Lookup, Packed, Plan, Sector, Step};

use super::directory::Directory;
use super::header::{Backing, Geometry, Header};
use super::write::Writes;
use super::{Error, SECTOR};

/// An entry with this bit is of a compressed cluster.
const COMPRESSED: u64 = 1 << 63;

/// An open image.
#[derive(Debug)]
pub struct Qcow {
    pub(super) header: Header,
    pub(super) backing: Option<Backing>,
    pub(super) sectors: u64,
    pub(super) writable: bool,
    pub(super) directory: Directory,
    /// Tables of the directory, as they are on disk.
    pub(super) tables: Tables<Box<[u64]>>,
    /// First byte that no cluster or table on disk may reach.
    pub(super) limit: u64,
    pub(super) cipher: Option<Cipher>,
    pub(super) writes: Writes,
}

/// What a run of sectors within one table is.
pub(super) enum Run {
    /// No entry names them.
    Absent,
    /// They are at this byte offset.
    Data(u64),
    /// They are in this compressed cluster.
    Packed(Packed),
    /// Their table is not in memory.
    Unread(Load),
}

/// What an entry of a table says. Lengths and offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Absent,
    Data(u64),
    Packed { offset: u64, len: u64 },
}

impl Entry {
    pub(super) fn decode(entry: u64, geometry: Geometry) -> Entry {
        let offset_bits = 63_u32.saturating_sub(geometry.cluster_bits);
        if entry == 0 {
            Entry::Absent
        } else if entry & COMPRESSED == 0 {
            Entry::Data(entry)
        } else {
            let offset = entry & (1_u64 << offset_bits).saturating_sub(1);
            Entry::Packed { offset, len: (entry & !COMPRESSED) >> offset_bits }
        }
    }

    /// First byte behind what the entry names.
    pub(super) fn end(self, geometry: Geometry) -> Option<u64> {
        match self {
            Entry::Absent => None,
            Entry::Data(place) => place.checked_add(geometry.cluster_bytes()),
            Entry::Packed { offset, len } => offset.checked_add(len),
        }
    }
}

/// The entries of a table.
pub(super) fn decode_table(bytes: &[u8]) -> Box<[u64]> {
    let entries = bytes.chunks_exact(8).map(|entry| entry.first_chunk().copied().unwrap_or_default());
    entries.map(u64::from_be_bytes).collect()
}

/// Where a sector is in the tables.
#[derive(Debug, Clone, Copy)]
pub(super) struct Position {
    /// Number of the cluster on the disk.
    pub(super) cluster: u64,
    /// Number of its table.
    pub(super) table: u32,
    /// Its entry in the table.
    pub(super) slot: usize,
    /// The sector, counted from the cluster's first.
    pub(super) first: u32,
}

impl Qcow {
    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The file below this image.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Bytes of metadata that are always in memory.
    pub fn resident(&self) -> u64 {
        let range = self.directory.range();
        range.end.saturating_sub(range.start)
    }

    pub(super) fn position(&self, sector: Sector) -> Position {
        let geometry = self.header.geometry;
        let cluster = sector >> geometry.cluster_bits.saturating_sub(9);
        Position {
            cluster,
            table: u32::try_from(cluster >> geometry.l2_bits).unwrap_or(u32::MAX),
            slot: usize::try_from(cluster & u64::from(geometry.table_entries().saturating_sub(1)))
                .unwrap_or(usize::MAX),
            first: u32::try_from(sector & u64::from(geometry.cluster_sectors().saturating_sub(1)))
                .unwrap_or(0),
        }
    }

    /// Where a table is; `None` if the directory names none.
    pub(super) fn table_place(&self, table: u32) -> Result<Option<u64>, Error> {
        let place = self.directory.get(table);
        if place == 0 {
            return Ok(None);
        }
        match self.misplaced(place, self.header.geometry.table_bytes()) {
            None => Ok(Some(place)),
            Some(reason) => {
                let geometry = self.header.geometry;
                let covers = u64::from(geometry.cluster_sectors()) << geometry.l2_bits;
                Err(Error::Corrupt { sector: covers.saturating_mul(table.into()), reason })
            }
        }
    }

    /// Why a table or a cluster of `len` bytes must not be at `place`.
    pub(super) fn misplaced(&self, place: u64, len: u64) -> Option<&'static str> {
        if !place.is_multiple_of(SECTOR) {
            return Some("an entry is not a multiple of 512");
        }
        self.outside(place, len)
    }

    /// Why something of `len` bytes, of any alignment, must not be at `place`.
    pub(super) fn outside(&self, place: u64, len: u64) -> Option<&'static str> {
        let directory = self.directory.range();
        match place.checked_add(len) {
            Some(end) if end <= self.limit => (place < self.header.end()
                || (place < directory.end && directory.start < end))
                .then_some("an entry points into the header or the L1 table"),
            _ => Some("an entry points beyond the end of the file"),
        }
    }

    /// What the first sectors of a run are, and how many of them: the longest prefix of one kind that is covered by one
    /// table.
    pub(super) fn run(&self, sector: Sector, count: u32) -> Result<(Run, u32), Error> {
        let at = self.position(sector);
        let geometry = self.header.geometry;
        let entries = usize::try_from(geometry.table_entries()).unwrap_or(0).saturating_sub(at.slot);
        let sectors_of = |clusters: usize| {
            let clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
            clusters.saturating_mul(geometry.cluster_sectors()).saturating_sub(at.first).min(count)
        };
        let Some(place) = self.table_place(at.table)? else { return Ok((Run::Absent, sectors_of(entries))) };
        let Some(table) = self.tables.get(at.table.into()) else {
            let len = u32::try_from(geometry.table_bytes()).unwrap_or(0);
            let load = Load { key: at.table.into(), offset: place, len };
            return Ok((Run::Unread(load), sectors_of(entries)));
        };
        let clusters =
            u64::from(at.first).saturating_add(count.into()).div_ceil(geometry.cluster_sectors().into());
        let wanted = table.iter().skip(at.slot).take(usize::try_from(clusters).unwrap_or(usize::MAX));
        let entry = |at| Entry::decode(at, geometry);
        match entry(table.get(at.slot).copied().unwrap_or(0)) {
            Entry::Absent => {
                let clusters = wanted.take_while(|&&e| entry(e) == Entry::Absent).count();
                Ok((Run::Absent, sectors_of(clusters)))
            }
            Entry::Data(place) => {
                self.check_data(at.cluster, place)?;
                let places =
                    (place..).step_by(usize::try_from(geometry.cluster_bytes()).unwrap_or(usize::MAX));
                let follows = |&(i, (&e, place)): &(u64, (&u64, u64))| {
                    e == place && self.check_data(at.cluster.saturating_add(i), place).is_ok()
                };
                let clusters = (0..).zip(wanted.zip(places)).take_while(follows).count();
                let first = u64::from(at.first).saturating_mul(SECTOR);
                Ok((Run::Data(place.saturating_add(first)), sectors_of(clusters)))
            }
            Entry::Packed { offset, len } => {
                Ok((Run::Packed(self.packed(sector, offset, len)?), sectors_of(1)))
            }
        }
    }

    /// Refuses a cluster that is where none can be. Of the last cluster of the disk only the part that the disk has must be
    /// there.
    fn check_data(&self, cluster: u64, place: u64) -> Result<(), Error> {
        let sectors = self.cluster_sectors(cluster);
        let len = sectors.end.saturating_sub(sectors.start).saturating_mul(SECTOR);
        match self.misplaced(place, len) {
            None => Ok(()),
            Some(reason) => Err(Error::Corrupt { sector: sectors.start, reason }),
        }
    }

    fn packed(&self, sector: Sector, offset: u64, len: u64) -> Result<Packed, Error> {
        let corrupt = |reason| Error::Corrupt { sector, reason };
        if self.cipher.is_some() {
            return Err(corrupt("a cluster of an encrypted image is compressed"));
        }
        if len == 0 {
            return Err(corrupt("a compressed cluster has no bytes"));
        }
        if let Some(reason) = self.outside(offset, len) {
            return Err(corrupt(reason));
        }
        let sectors = self.header.geometry.cluster_sectors();
        Ok(Packed { offset, len: u32::try_from(len).unwrap_or(u32::MAX), sectors })
    }

    /// The sectors of the disk that a cluster has.
    pub(super) fn cluster_sectors(&self, cluster: u64) -> Range<u64> {
        let sectors = u64::from(self.header.geometry.cluster_sectors());
        let start = cluster.saturating_mul(sectors);
        start..start.saturating_add(sectors).min(self.sectors)
    }

    pub(super) fn check_range(&self, sector: Sector, count: u32) -> Result<(), Error> {
        match sector.checked_add(count.into()) {
            Some(end) if end <= self.sectors && count > 0 => Ok(()),
            _ => Err(Error::OutOfRange { sector, count, sectors: self.sectors }),
        }
    }
}

impl Format for Qcow {
    type Error = Error;

    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn place(&self, sector: Sector, count: u32) -> Option<u64> {
        self.check_range(sector, count).ok()?;
        match self.run(sector, count) {
            Ok((Run::Data(offset), found)) if found == count => Some(offset),
            _ => None,
        }
    }

    fn overwrite(&self, sector: Sector, count: u32) -> Option<u64> {
        if !self.writable || self.is_poisoned() { None } else { self.place(sector, count) }
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
        Ok(if self.backing.is_some() {
            Lookup::Parent { count: absent }
        } else {
            Lookup::Zero { count: absent }
        })
    }

    fn loaded(&mut self, load: &Load, bytes: &[u8]) -> Result<(), Error> {
        if u64::try_from(bytes.len()) != Ok(self.header.geometry.table_bytes()) {
            self.tables.failed(load.key);
            return Err(Error::invalid("L2 table", format!("{} bytes are not one", bytes.len())));
        }
        let table = decode_table(bytes);
        if self.writable {
            self.avoid_all(&table);
        }
        let writes = &self.writes;
        self.tables.arrived(load.key, table, |table| writes.touches(table));
        Ok(())
    }

    fn load_failed(&mut self, load: &Load) {
        self.tables.failed(load.key);
    }

    fn unpack(&self, packed: &Packed, bytes: &[u8], into: &mut [u8]) -> Result<(), Error> {
        inflate(Wrapping::Raw, bytes, into)
            .map_err(|reason| Error::BadCluster { offset: packed.offset, reason })
    }

    fn plan_write(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        self.plan(sector, count)
    }

    /// No write has a preparation.
    fn prepared(&mut self, _key: u64, _done: bool) {}

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
        Err(Error::Unsupported("a qcow image cannot be resized; convert it to another format"))
    }

    /// No resize ever begins.
    fn resize_ended(&mut self, _done: bool) {}

    fn close_steps(&self) -> Vec<Step> {
        self.resting_steps()
    }

    fn is_poisoned(&self) -> bool {
        self.writes.poisoned
    }

    fn cipher(&self) -> Option<&Cipher> {
        self.cipher.as_ref()
    }
}
