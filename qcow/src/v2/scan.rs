//! A walk through all tables of an image, which counts who refers to each cluster.

use std::collections::HashMap;

use format::Source;

use super::Error;
use super::entry::{self, COPIED, Cluster};
use super::geometry::{Geometry, be64, down, index, rest, up};
use super::header::Header;
use super::metadata::clusters;
use super::open::{read, read_entries};
use super::snapshot::{self, Snapshot};

/// Counts of a page of the map.
const PAGE_BITS: u32 = 10;

/// Reference counts of all clusters, by who refers to them. Memory: 4 bytes for each cluster of a region of 1024 that is in
/// use.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pages: HashMap<u64, Box<[u32]>>,
    /// First cluster behind all that are in use.
    pub(super) end: u64,
}

impl Usage {
    pub(super) fn get(&self, cluster: u64) -> u64 {
        let page = self.pages.get(&down(cluster, PAGE_BITS));
        page.and_then(|page| page.get(index(rest(cluster, PAGE_BITS)))).copied().unwrap_or(0).into()
    }

    pub(super) fn add(&mut self, cluster: u64) {
        let page =
            self.pages.entry(down(cluster, PAGE_BITS)).or_insert_with(|| vec![0; 1 << PAGE_BITS].into());
        if let Some(count) = page.get_mut(index(rest(cluster, PAGE_BITS))) {
            *count = count.saturating_add(1);
        }
        self.end = self.end.max(cluster.saturating_add(1));
    }

    pub(super) fn add_range(&mut self, offset: u64, len: u64, g: &Geometry) {
        if len > 0 {
            clusters(offset, len, g).for_each(|cluster| self.add(cluster));
        }
    }
}

/// An entry of the active tables whose mark of being unshared is to be compared with the count.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    /// Byte offset of the entry in the file.
    pub(super) at: u64,
    /// The entry.
    pub(super) entry: u64,
    /// The cluster that it names.
    pub(super) cluster: u64,
}

/// What a walk has found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub(super) usage: Usage,
    /// What is wrong with tables, in words.
    pub(super) problems: Vec<String>,
    pub(super) marks: Vec<Mark>,
    /// Clusters of the disk that have a place.
    pub(super) allocated: u64,
    /// Of these, compressed ones.
    pub(super) compressed: u64,
}

/// Walks through everything but the refcount structures.
pub(super) fn scan(source: &mut Source<'_>, header: &Header) -> Result<Scan, Error> {
    let g = header.geometry;
    let mut scan = Scan::default();
    scan.usage.add(0);
    let (snapshots, len) = snapshot::read_table(source, header, true)?;
    scan.usage.add_range(header.snapshot_table, len, &g);
    scan.table(source, header, header.l1_offset, header.l1_entries, true)?;
    for Snapshot { l1_offset, l1_entries, .. } in &snapshots {
        scan.table(source, header, *l1_offset, *l1_entries, false)?;
    }
    Ok(scan)
}

impl Scan {
    /// An L1 table with all below it.
    fn table(
        &mut self,
        source: &mut Source<'_>,
        header: &Header,
        offset: u64,
        entries: u64,
        active: bool,
    ) -> Result<(), Error> {
        let g = &header.geometry;
        self.usage.add_range(offset, entries.saturating_mul(8), g);
        let table = read_entries(source, "L1 table", offset, entries)?;
        for (number, entry) in (0_u64..).zip(table) {
            let place = match entry::l1(entry, g) {
                Ok((0, _)) => continue,
                Ok((place, _)) => place,
                Err(error) => {
                    self.problems.push(error.to_string());
                    continue;
                }
            };
            if place.saturating_add(g.cluster()) > source.size {
                self.problems.push(format!("the L2 table at {place:#x} lies beyond the end of the file"));
                continue;
            }
            self.usage.add_range(place, 1, g);
            if active {
                let at = offset.saturating_add(up(number, 3));
                self.marks.push(Mark { at, entry, cluster: down(place, g.cluster_bits) });
            }
            let bytes = read(source, "L2 table", place, g.cluster())?;
            self.entries(&bytes, place, g, source.size, active);
        }
        Ok(())
    }

    fn entries(&mut self, bytes: &[u8], table: u64, g: &Geometry, file_len: u64, active: bool) {
        let size = if g.extended { 16 } else { 8 };
        for (number, entry) in (0_u64..).zip(bytes.chunks_exact(size).map(|entry| be64(entry, 0))) {
            let found = match entry::l2(entry, g) {
                Ok(found) => found,
                Err(error) => {
                    self.problems.push(error.to_string());
                    continue;
                }
            };
            let (host, len) = match found {
                Cluster::Absent | Cluster::Zero { host: None } => continue,
                Cluster::Zero { host: Some(host) } => (host, 1),
                Cluster::Data { host, .. } => (host, 1),
                Cluster::Packed(packed) => (packed.offset, packed.len.into()),
            };
            if host >= file_len {
                self.problems.push(format!("data at {host:#x} lie beyond the end of the file"));
                continue;
            }
            self.usage.add_range(host, len, g);
            if active {
                self.allocated = self.allocated.saturating_add(1);
                if let Cluster::Packed(_) = found {
                    self.compressed = self.compressed.saturating_add(1);
                } else {
                    let at = table.saturating_add(number.saturating_mul(size as u64));
                    self.marks.push(Mark { at, entry, cluster: down(host, g.cluster_bits) });
                }
            }
        }
    }
}

impl Mark {
    /// The entry as it should be for a cluster with so many references.
    pub(super) fn wanted(&self, count: u64) -> u64 {
        if count == 1 { self.entry | COPIED } else { self.entry & !COPIED }
    }
}
