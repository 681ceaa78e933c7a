//! Writing: new clusters are filled first, and become part of the image by a commit.

use std::collections::BTreeMap;

use format::fresh::{Fresh, in_place};
use format::tail::Tail;
use format::{DiscardPlan, MetaWrite, Plan, Sector, Step};
use zerocopy::IntoBytes;

use super::directory::{Directory, Order};
use super::header::{Geometry, LEN, XEN_BIG_ENDIAN, XEN_PAGE as PAGE};
use super::image::{Entry, Qcow, Run};
use super::{Error, SECTOR};

/// The state of all writing to one image.
#[derive(Debug)]
pub(super) struct Writes {
    pub(super) tail: Tail,
    pub(super) poisoned: bool,
    /// The first sector of the file, if the image has Xen's extension and is writable.
    pub(super) first_sector: Option<Vec<u8>>,
    l2_bits: u32,
    /// Clusters that have a place and are not part of the image.
    fresh: Fresh,
    /// Places for tables that are not in the directory.
    tables: BTreeMap<u32, u64>,
    /// The place of a new directory, if it must move.
    directory: Option<u64>,
    commit: Option<Commit>,
    /// The directory was changed, so Xen's checksum is not right any more.
    stale_checksum: bool,
}

/// What the commit under way makes of the image.
#[derive(Debug, Default)]
struct Commit {
    /// Clusters with their places, in ascending order.
    clusters: Vec<(u64, u64)>,
    /// New tables.
    tables: Vec<(u32, u64)>,
    /// The directory that takes the place of the present one.
    directory: Option<Directory>,
    /// The first sector, if it changes.
    first_sector: Option<Vec<u8>>,
}

impl Writes {
    pub(super) fn new(tail: Tail, geometry: Geometry) -> Self {
        Self {
            tail,
            poisoned: false,
            first_sector: None,
            l2_bits: geometry.l2_bits,
            fresh: Fresh::new(geometry.cluster_sectors()),
            tables: BTreeMap::new(),
            directory: None,
            commit: None,
            stale_checksum: false,
        }
    }

    /// True if a table must stay in memory, because a cluster of it is on its way.
    pub(super) fn touches(&self, table: u64) -> bool {
        let first = |table: u64| table << self.l2_bits;
        self.fresh.touches(first(table)..first(table.saturating_add(1)))
    }
}

impl Qcow {
    pub(super) fn plan(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        self.check_writable(sector, count)?;
        if let Some(plan) = self.writes.fresh.plan(sector, count) {
            return Ok(plan);
        }
        match self.run(sector, count)? {
            (Run::Unread(load), _) => {
                self.tables.load_began(load.key);
                Ok(Plan::Load(load))
            }
            (Run::Data(offset), count) => Ok(in_place(offset, count, false)),
            (Run::Absent | Run::Packed(_), count) => self.plan_new(sector, count),
        }
    }

    fn check_writable(&self, sector: Sector, count: u32) -> Result<(), Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        self.check_range(sector, count)?;
        if self.writes.poisoned { Err(Error::Poisoned) } else { Ok(()) }
    }

    /// Plans a write to clusters of one table that need a place.
    fn plan_new(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        self.reserve_metadata(self.position(sector).table)?;
        let (clusters, len) = self.writes.fresh.run(sector, count);
        // Small clusters that are written by the page shall lie by the page.
        let start = sector.saturating_sub(self.position(sector).first.into()).saturating_mul(SECTOR);
        let align = if len.is_multiple_of(PAGE) && start.is_multiple_of(PAGE) { PAGE } else { 0 };
        let place = self.take(len, align)?;
        Ok(Plan::Write(self.writes.fresh.claim(sector, count, clusters, place, self.sectors)))
    }

    fn take(&mut self, len: u64, align: u64) -> Result<u64, Error> {
        let tail = &mut self.writes.tail;
        tail.take(len, align).ok_or(Error::NoSpace { end: tail.end(), len })
    }

    /// Finds room for a table that is not there, and for the directory if it must move.
    fn reserve_metadata(&mut self, table: u32) -> Result<(), Error> {
        if self.directory.get(table) == 0 && !self.writes.tables.contains_key(&table) {
            let place = self.take(self.header.geometry.table_bytes(), 0)?;
            self.writes.tables.insert(table, place);
        }
        if self.directory_moves() && self.writes.directory.is_none() {
            let range = self.directory.range();
            let len = range.end.saturating_sub(range.start);
            self.writes.directory = Some(self.take(len, PAGE)?);
        }
        Ok(())
    }

    /// True if the directory is, or is said to be, in the order of Xen 3.2. Then it is copied in the right one to
    /// another place and the header turned to that, in one sector, so that nothing can come in between.
    fn directory_moves(&self) -> bool {
        self.directory.order() == Order::Little || self.header.xen.is_some_and(|xen| !xen.big_endian())
    }

    pub(super) fn note_written(&mut self, sector: Sector, count: u32, done: bool) {
        if let Some(lost) = self.writes.fresh.written(sector, count, done) {
            self.writes.tail.give_back(lost);
        }
    }

    /// What is in the image reads as zeros where it is punched, unless it is encrypted. What is not stays as it is: there is
    /// no way to say that a cluster does not come from the backing file.
    pub(super) fn discard(&mut self, sector: Sector, count: u32) -> Result<DiscardPlan, Error> {
        self.check_writable(sector, count)?;
        Ok(match self.run(sector, count)? {
            (Run::Unread(load), _) => {
                self.tables.load_began(load.key);
                DiscardPlan::Load(load)
            }
            (Run::Data(offset), count) if self.cipher.is_none() => DiscardPlan::Punch { offset, count },
            (Run::Data(_) | Run::Absent | Run::Packed(_), count) => DiscardPlan::Skip { count },
        })
    }

    pub(super) fn commit_steps(&mut self) -> Option<Vec<Step>> {
        if self.writes.poisoned || self.writes.commit.is_some() {
            return None;
        }
        let clusters = self.writes.fresh.take();
        if clusters.is_empty() {
            return None;
        }
        let Some((commit, steps)) = self.build(clusters) else {
            log::error!("a table of a planned write is not in memory; the image takes no more writes");
            self.writes.poisoned = true;
            return None;
        };
        self.writes.commit = Some(commit);
        Some(steps)
    }

    /// The commit of some clusters and its steps. `None` if a table that must be in memory is not: a caller has reported a
    /// write that was never planned.
    fn build(&self, clusters: Vec<(u64, u64)>) -> Option<(Commit, Vec<Step>)> {
        let mut commit = Commit {
            directory: self.writes.directory.map(|at| self.directory.moved(at)),
            ..Commit::default()
        };
        // What nothing leads to yet, and what leads to it.
        let (mut before, mut after) = (Vec::new(), Vec::new());
        let table_of = |cluster: u64| cluster >> self.header.geometry.l2_bits;
        for group in clusters.chunk_by(|a, b| table_of(a.0) == table_of(b.0)) {
            let table = self.position_of_cluster(group.first()?.0).0;
            if self.directory.get(table) == 0 {
                let &place = self.writes.tables.get(&table)?;
                before.push(MetaWrite { offset: place, bytes: encode(&self.new_table(group)) });
                commit.tables.push((table, place));
            } else {
                let old = self.tables.peek(table.into())?;
                after.extend(self.table_sectors(old, self.directory.get(table), group));
            }
        }
        let directory = commit.directory.as_ref().unwrap_or(&self.directory);
        after.extend(directory.writes(&commit.tables));
        commit.first_sector = self.new_first_sector(directory);
        let first = commit.first_sector.clone().map(|bytes| MetaWrite { offset: 0, bytes });
        match &commit.directory {
            Some(directory) => {
                before.extend(directory.all_writes());
                after.extend(first);
            }
            None => before.extend(first),
        }
        commit.clusters = clusters;
        let steps = before
            .into_iter()
            .map(Step::Write)
            .chain([Step::Flush])
            .chain(after.into_iter().map(Step::Write));
        Some((commit, steps.collect()))
    }

    /// The table and the entry of a cluster.
    fn position_of_cluster(&self, cluster: u64) -> (u32, usize) {
        let at = self.position(cluster.saturating_mul(self.header.geometry.cluster_sectors().into()));
        (at.table, at.slot)
    }

    fn new_table(&self, clusters: &[(u64, u64)]) -> Box<[u64]> {
        let entries = usize::try_from(self.header.geometry.table_entries()).unwrap_or(0);
        let mut table = vec![0; entries].into_boxed_slice();
        self.enter(&mut table, clusters);
        table
    }

    /// Puts clusters of one table into it.
    fn enter(&self, table: &mut [u64], clusters: &[(u64, u64)]) {
        for &(cluster, place) in clusters {
            if let Some(entry) = table.get_mut(self.position_of_cluster(cluster).1) {
                *entry = place;
            }
        }
    }

    /// The sectors of the table at `offset` with some new entries.
    fn table_sectors(&self, table: &[u64], offset: u64, clusters: &[(u64, u64)]) -> Vec<MetaWrite> {
        let mut new = table.to_vec();
        self.enter(&mut new, clusters);
        let sector_of = |cluster: u64| self.position_of_cluster(cluster).1 >> 6;
        let groups = clusters.chunk_by(|a, b| sector_of(a.0) == sector_of(b.0));
        let write = |group: &[(u64, u64)]| {
            let sector = sector_of(group.first()?.0);
            let entries = new.chunks_exact(64).nth(sector)?;
            let at = (sector as u64).saturating_mul(SECTOR);
            Some(MetaWrite { offset: offset.saturating_add(at), bytes: encode(entries) })
        };
        groups.filter_map(write).collect()
    }

    /// The first sector with Xen's extension as it must be before anything is allocated: Xen's tools must not take for granted
    /// that the clusters of a table follow it.
    fn new_first_sector(&self, directory: &Directory) -> Option<Vec<u8>> {
        let xen = self.header.xen?;
        let ready = xen.min_cluster_alloc == 1 && xen.big_endian();
        if ready {
            return None;
        }
        let mut bytes = self.writes.first_sector.clone()?;
        let changed = super::Xen { min_cluster_alloc: 1, flags: xen.flags | XEN_BIG_ENDIAN, ..xen };
        put(&mut bytes, LEN, changed.raw().as_bytes());
        if directory_place(directory) != directory_place(&self.directory) {
            put(&mut bytes, DIRECTORY_FIELD, &directory_place(directory).to_be_bytes());
        }
        Some(bytes)
    }

    pub(super) fn end_commit(&mut self, done: bool) {
        let Some(commit) = self.writes.commit.take() else { return };
        if !done {
            self.writes.poisoned = true;
            return;
        }
        if let Some(directory) = commit.directory {
            self.header.directory = directory_place(&directory);
            self.directory = directory;
            self.writes.directory = None;
        }
        if let Some(bytes) = commit.first_sector {
            self.header.xen = self.header.xen.map(|xen| super::Xen {
                min_cluster_alloc: 1,
                flags: xen.flags | XEN_BIG_ENDIAN,
                ..xen
            });
            self.writes.first_sector = Some(bytes);
            self.writes.stale_checksum = true;
        }
        self.writes.stale_checksum |= !commit.tables.is_empty();
        self.directory.set(&commit.tables);
        self.publish(&commit.clusters, &commit.tables);
    }

    /// Makes clusters, and the new tables among theirs, part of the image in memory.
    fn publish(&mut self, clusters: &[(u64, u64)], new: &[(u32, u64)]) {
        let geometry = self.header.geometry;
        let mut end = 0;
        for group in clusters.chunk_by(|a, b| a.0 >> geometry.l2_bits == b.0 >> geometry.l2_bits) {
            let Some(&(cluster, _)) = group.first() else { continue };
            let table = self.position_of_cluster(cluster).0;
            let mut entries = match self.tables.peek(table.into()) {
                Some(old) => old.clone(),
                None => self.new_table(&[]),
            };
            self.enter(&mut entries, group);
            let writes = &self.writes;
            self.tables.insert(table.into(), entries, |table| writes.touches(table));
            for &(cluster, place) in group {
                self.writes.fresh.publish(cluster);
                end = end.max(place.saturating_add(geometry.cluster_bytes()));
            }
        }
        for &(table, place) in new {
            self.writes.tables.remove(&table);
            end = end.max(place.saturating_add(geometry.table_bytes()));
        }
        self.limit = self.limit.max(end).max(self.directory.range().end);
    }

    /// Xen's tools write the checksum when they close an image, and so do we.
    pub(super) fn resting_steps(&self) -> Vec<Step> {
        let first =
            self.writes.first_sector.clone().filter(|_| self.writes.stale_checksum && !self.writes.poisoned);
        let (Some(xen), Some(mut bytes)) = (self.header.xen, first) else { return Vec::new() };
        let xen = super::Xen { checksum: self.directory.checksum(), ..xen };
        put(&mut bytes, LEN, xen.raw().as_bytes());
        vec![Step::Flush, Step::Write(MetaWrite { offset: 0, bytes }), Step::Flush]
    }

    /// Nothing new is placed where an entry of a table points to.
    pub(super) fn avoid_all(&mut self, table: &[u64]) {
        let geometry = self.header.geometry;
        let end = |entry: &u64| Entry::decode(*entry, geometry).end(geometry);
        for end in table.iter().filter_map(end) {
            self.writes.tail.avoid(end);
        }
    }
}

/// Byte offset of the directory's place in the header.
const DIRECTORY_FIELD: u64 = 40;

fn directory_place(directory: &Directory) -> u64 {
    directory.range().start
}

fn encode(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}

fn put(bytes: &mut [u8], at: u64, what: &[u8]) {
    let to = usize::try_from(at).ok().and_then(|at| bytes.get_mut(at..)).unwrap_or_default();
    for (to, from) in to.iter_mut().zip(what) {
        *to = *from;
    }
}
