//! The open image, and where its sectors are.

use std::cmp::min;

use format::cipher::Cipher;
use format::{Load, Lookup, Packed, Sector};

use super::entry::{self, Cluster, Subcluster};
use super::geometry::{Geometry, SECTOR_BITS, be64, down, exp, index, rest, up};
use super::header::{Backing, Compression, Header};
use super::snapshot::Snapshot;
use super::write::Writing;
use super::{Error, cache::Cache, geometry};

/// Set in the key of a [`Load`] that is a slice of a refcount block; the others are slices of L2 tables.
pub(super) const REFCOUNT_KEY: u64 = 1 << 63;

/// An open qcow2 image.
#[derive(Debug)]
pub struct Qcow2 {
    pub(super) header: Header,
    pub(super) geometry: Geometry,
    pub(super) sectors: u64,
    /// The L1 table, wholly in memory.
    pub(super) l1: Vec<u64>,
    /// Slices of L2 tables by the first cluster of the disk that they tell of, divided by the entries of a slice.
    pub(super) slices: Cache,
    /// Length of the file or device in bytes; what lies beyond cannot be data.
    pub(super) file_len: u64,
    pub(super) regular: bool,
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) cipher: Option<Cipher>,
    /// What writing needs; `None` for an image that is only read.
    pub(super) writing: Option<Box<Writing>>,
}

/// Where some sectors of one cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// At this byte of the file. `own` if they may be written there.
    Data { offset: u64, own: bool },
    /// They read as zeros.
    Zero,
    /// In the backing file, if there is one.
    Below,
    /// Compressed; they begin with this sector of the unit.
    Packed { packed: Packed, first: u32 },
    /// To be read first.
    Load(Load),
}

impl Qcow2 {
    /// The backing file that the header names.
    pub fn backing(&self) -> Option<&Backing> {
        self.header.backing.as_ref()
    }

    /// The internal snapshots.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    /// Bytes of a cluster.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster()
    }

    /// The version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.geometry.version
    }

    /// Bits of a reference count.
    pub fn refcount_bits(&self) -> u64 {
        exp(self.geometry.refcount_order)
    }

    /// How its clusters are compressed, if any are.
    pub fn compression(&self) -> Compression {
        self.header.compression
    }

    /// True if its tables tell of subclusters.
    pub fn has_subclusters(&self) -> bool {
        self.geometry.extended
    }

    pub(super) fn check_range(&self, sector: Sector, count: u32) -> Result<(), Error> {
        match sector.checked_add(count.into()) {
            Some(end) if end <= self.sectors && count > 0 => Ok(()),
            _ => Err(Error::OutOfRange { sector, count, sectors: self.sectors }),
        }
    }

    /// The longest prefix of the sectors with one answer. Nothing is noted.
    pub(super) fn resolve(&self, sector: Sector, count: u32) -> Result<Lookup, Error> {
        self.check_range(sector, count)?;
        let mut answer: Option<Lookup> = None;
        let mut done = 0_u32;
        while done < count {
            let at = sector.saturating_add(done.into());
            let (place, run) = match self.look(at, count.saturating_sub(done)) {
                Err(error) if answer.is_none() => return Err(error),
                Ok((Place::Load(load), _)) if answer.is_none() => return Ok(Lookup::Load(load)),
                Err(_) | Ok((Place::Load(_), _)) => break,
                Ok(found) => found,
            };
            if !join(&mut answer, place, run, self.header.backing.is_some()) {
                break;
            }
            done = done.saturating_add(run);
        }
        answer.ok_or(Error::OutOfRange { sector, count, sectors: self.sectors })
    }

    /// Where the longest prefix of the sectors is that lies in one cluster, or in one range of the disk without a table.
    pub(super) fn look(&self, sector: Sector, count: u32) -> Result<(Place, u32), Error> {
        let g = &self.geometry;
        let cluster = down(sector, g.sector_bits());
        let first = rest(sector, g.sector_bits());
        let (table, _) = self.table(cluster)?;
        if table == 0 {
            let covered = up(exp(g.l2_bits()), g.sector_bits());
            let left = covered.saturating_sub(rest(sector, g.l2_bits().saturating_add(g.sector_bits())));
            return Ok((Place::Below, min(count, u32::try_from(left).unwrap_or(u32::MAX))));
        }
        let left = exp(g.sector_bits()).saturating_sub(first);
        let count = min(count, u32::try_from(left).unwrap_or(u32::MAX));
        let Some((entry, bitmap)) = self.entry(cluster) else {
            return Ok((Place::Load(self.slice_load(down(cluster, g.slice_entries()), table)), count));
        };
        match entry::l2(entry, g)? {
            found if g.extended => self.look_extended(found, bitmap, first, count),
            Cluster::Absent => Ok((Place::Below, count)),
            Cluster::Zero { .. } => Ok((Place::Zero, count)),
            Cluster::Data { host, copied } => self.data(host, first, count, copied),
            Cluster::Packed(packed) => self.packed(packed, first, count),
        }
    }

    /// The same for a cluster whose entry tells of subclusters.
    fn look_extended(
        &self,
        found: Cluster,
        bitmap: u64,
        first: u64,
        count: u32,
    ) -> Result<(Place, u32), Error> {
        let host = match found {
            Cluster::Packed(packed) if bitmap == 0 => return self.packed(packed, first, count),
            Cluster::Packed(_) => {
                return Err(Error::corrupt(
                    "extended L2 entry",
                    bitmap,
                    "has subclusters although it is compressed",
                ));
            }
            Cluster::Data { host, .. } => host,
            Cluster::Absent | Cluster::Zero { .. } => 0,
        };
        let bits = self.geometry.sector_bits().saturating_sub(5);
        let number = u32::try_from(down(first, bits)).unwrap_or(u32::MAX);
        let left = exp(bits).saturating_sub(rest(first, bits));
        let count = min(count, u32::try_from(left).unwrap_or(u32::MAX));
        match entry::subcluster(bitmap, number)? {
            Subcluster::Absent => Ok((Place::Below, count)),
            Subcluster::Zero => Ok((Place::Zero, count)),
            Subcluster::Data if host != 0 => self.data(host, first, count, false),
            Subcluster::Data => {
                Err(Error::corrupt("extended L2 entry", bitmap, "has data but no cluster for it"))
            }
        }
    }

    /// Sectors of a cluster at `host`. The last cluster of a file may be cut short, behind a disk's end or where nothing
    /// was written: there it has zeros. A cluster wholly beyond the end is damage.
    fn data(&self, host: u64, first: u64, count: u32, own: bool) -> Result<(Place, u32), Error> {
        if host >= self.file_len {
            return Err(Error::corrupt("L2 entry", host, "lies beyond the end of the file"));
        }
        let offset = host.saturating_add(up(first, SECTOR_BITS));
        let there = down(self.file_len.saturating_sub(offset), SECTOR_BITS);
        if there == 0 {
            return Ok((Place::Zero, count));
        }
        Ok((Place::Data { offset, own }, min(count, u32::try_from(there).unwrap_or(u32::MAX))))
    }

    fn packed(&self, packed: Packed, first: u64, count: u32) -> Result<(Place, u32), Error> {
        if packed.offset >= self.file_len {
            return Err(Error::corrupt(
                "compressed cluster",
                packed.offset,
                "lies beyond the end of the file",
            ));
        }
        Ok((Place::Packed { packed, first: u32::try_from(first).unwrap_or(u32::MAX) }, count))
    }

    /// The byte offset of the L2 table for a cluster of the disk (0: none), and whether nobody else refers to it.
    pub(super) fn table(&self, cluster: u64) -> Result<(u64, bool), Error> {
        let entry = self.l1.get(index(down(cluster, self.geometry.l2_bits()))).copied().unwrap_or(0);
        let (offset, copied) = entry::l1(entry, &self.geometry)?;
        if offset.saturating_add(self.geometry.cluster()) > self.file_len {
            return Err(Error::corrupt("L1 entry", entry, "lies beyond the end of the file"));
        }
        Ok((offset, copied))
    }

    /// The entry of a cluster and its bitmap of subclusters, if its slice is in memory.
    pub(super) fn entry(&self, cluster: u64) -> Option<(u64, u64)> {
        let g = &self.geometry;
        let slice = self.slices.get(down(cluster, g.slice_entries()))?;
        let at = index(up(rest(cluster, g.slice_entries()), g.entry_bits()));
        Some((be64(slice, at), if g.extended { be64(slice, at.saturating_add(8)) } else { 0 }))
    }

    /// How to read a slice of the L2 table at byte `table`.
    pub(super) fn slice_load(&self, slice: u64, table: u64) -> Load {
        let g = &self.geometry;
        let offset = table.saturating_add(up(rest(slice, g.slices()), g.slice_bits()));
        Load { key: slice, offset, len: u32::try_from(exp(g.slice_bits())).unwrap_or(0) }
    }

    /// Byte offset of the sectors if all of them are data, one after another. `own`: only such as may be written there.
    pub(super) fn in_one_piece(&self, sector: Sector, count: u32, own: bool) -> Option<u64> {
        self.check_range(sector, count).ok()?;
        let mut start = None;
        let mut done = 0_u32;
        while done < count {
            let at = sector.saturating_add(done.into());
            let Ok((Place::Data { offset, own: may }, run)) = self.look(at, count.saturating_sub(done))
            else {
                return None;
            };
            let expected = start.get_or_insert(offset).saturating_add(up(done.into(), SECTOR_BITS));
            if expected != offset || (own && !may) {
                return None;
            }
            done = done.saturating_add(run);
        }
        start
    }

    /// Takes what a [`Load`] asked for.
    pub(super) fn take_load(&mut self, load: &Load, bytes: Option<&[u8]>) -> Result<(), Error> {
        let whole = bytes.filter(|bytes| bytes.len() == geometry::index(load.len.into()));
        if load.key & REFCOUNT_KEY == 0 {
            self.slices.load_ended(load.key, whole);
        } else if let Some(writing) = &mut self.writing {
            writing.refcounts.cache.load_ended(load.key & !REFCOUNT_KEY, whole);
        }
        if bytes.is_some() && whole.is_none() {
            return Err(Error::invalid("metadata", "other bytes were read than were asked for"));
        }
        Ok(())
    }
}

/// Lengthens `answer` by a piece that follows it; false if it does not fit.
fn join(answer: &mut Option<Lookup>, place: Place, run: u32, has_backing: bool) -> bool {
    let place = if place == Place::Below && !has_backing { Place::Zero } else { place };
    match (answer, place) {
        (None, Place::Load(_)) => false,
        (answer @ None, place) => {
            *answer = Some(match place {
                Place::Data { offset, .. } => Lookup::Data { offset, count: run },
                Place::Zero | Place::Load(_) => Lookup::Zero { count: run },
                Place::Below => Lookup::Parent { count: run },
                Place::Packed { packed, first } => Lookup::Packed { packed, first, count: run },
            });
            true
        }
        (Some(Lookup::Data { offset, count }), Place::Data { offset: next, .. })
            if offset.saturating_add(up((*count).into(), SECTOR_BITS)) == next =>
        {
            *count = count.saturating_add(run);
            true
        }
        (Some(Lookup::Zero { count }), Place::Zero) | (Some(Lookup::Parent { count }), Place::Below) => {
            *count = count.saturating_add(run);
            true
        }
        (Some(_), _) => false,
    }
}
