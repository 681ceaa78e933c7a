//! Planning writes: in place, into a cluster that somebody else has begun, or into a new one.

use std::cmp::min;
use std::collections::BTreeMap;
use std::ops::Range;

use format::{MetaWrite, Plan, Prepare, Sector, Source, Step, Write};

use super::Error;
use super::commit::Commit;
use super::entry::{self, COPIED, Cluster};
use super::geometry::{SECTOR_BITS, down, exp, rest, up};
use super::header::{Header, at};
use super::image::{Place, Qcow2};
use super::metadata::{self, Metadata};
use super::open::{read, read_entries};
use super::refcount::{Count, Refcounts};
use super::resize::Growth;
use super::snapshot::Snapshot;
use super::space::{Room, Space, last_used};

/// Slices of empty refcount blocks that are looked through for the last cluster in use.
const MOST_EMPTY_SLICES: u32 = 64;

/// Bits of the key of a [`Prepare`].
const START: u64 = 1;
const RESERVE: u64 = 2;

/// The state of all writing to an image.
#[derive(Debug)]
pub(super) struct Writing {
    pub(super) refcounts: Refcounts,
    pub(super) metadata: Metadata,
    pub(super) space: Space,
    stage: Stage,
    /// Clusters of the disk that have a new place, or none any more, which a commit is to tell.
    pub(super) changes: BTreeMap<u64, Change>,
    /// New L2 tables by their index in the L1 table.
    pub(super) tables: BTreeMap<u64, NewTable>,
    /// Clusters of the file to which one reference less is due, once for each. No table in memory names them for that any
    /// more. Their reference counts are kept in memory.
    pub(super) freed: Vec<u64>,
    pub(super) commit: Option<Commit>,
    /// The commit under way changes reference counts.
    pub(super) releasing: bool,
    pub(super) resizing: Option<Growth>,
    pub(super) poisoned: bool,
}

/// What must come before the first write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The header names features that a writer must clear, or the file does not end with a whole cluster.
    Resting,
    Starting,
    Started,
}

/// A change of where a cluster of the disk is.
#[derive(Debug)]
pub(super) struct Change {
    /// The new cluster of the file; `None` if the cluster of the disk loses its place.
    pub(super) host: Option<u64>,
    /// The new entry.
    pub(super) entry: u64,
    /// Clusters of the file that lose a reference by it.
    pub(super) old: Vec<u64>,
    /// Writers with a plan, not yet answered.
    pub(super) writers: u32,
    /// Its writer writes all of the cluster; others have to wait.
    pub(super) exclusive: bool,
    /// The data must be durable before the entry names them.
    pub(super) barrier: bool,
    pub(super) state: State,
    /// Its cluster of the file is not ready before a preparation has ended: that of its first writer.
    pub(super) unprepared: bool,
}

/// What planning has found out for a write to a new place.
struct Fresh {
    /// Where the clusters are now.
    old: Cluster,
    /// What they lose.
    freed: Vec<u64>,
    /// How many clusters of the disk may be taken together.
    clusters: u64,
    /// How many clusters of the file are needed at least: one more if there is an L2 table to make.
    need: u64,
    prepare: Option<Prepare>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing to tell yet.
    Filling,
    /// The next commit tells.
    Ready,
    /// The commit under way tells.
    Committing,
    /// It has been told, but a writer is still at work.
    Published,
}

/// An L2 table that the L1 table in the file does not name yet.
#[derive(Debug)]
pub(super) struct NewTable {
    /// Its cluster.
    pub(super) host: u64,
    /// Byte offset of the table that it replaces, which others refer to as well.
    pub(super) old: Option<u64>,
    /// Its cluster is not ready before a preparation has ended.
    pub(super) unprepared: bool,
}

impl Writing {
    /// Reads what writing needs to know from the start.
    pub(super) fn open(
        source: &mut Source<'_>,
        header: &Header,
        l1: &[u64],
        (snapshots, snapshot_bytes): (&[Snapshot], u64),
        reserve: u64,
    ) -> Result<Self, Error> {
        let entries = down(header.refcount_table_bytes(), 3);
        let table = read_entries(source, "refcount table", header.refcount_table, entries)?;
        let metadata = Metadata::new(header, l1, &table, snapshots, snapshot_bytes);
        let mut refcounts = Refcounts::new(header.geometry, table);
        let frontier = find_frontier(source, header, &mut refcounts)?;
        refcounts.cache.pin(refcounts.slice_of(frontier));
        let l1_bytes = header.l1_entries.saturating_mul(8);
        for (offset, len) in
            [(header.refcount_table, header.refcount_table_bytes()), (header.l1_offset, l1_bytes)]
        {
            load_counts(source, &mut refcounts, refcounts_of(offset, len, header))?;
        }
        let aligned = !source.regular || rest(source.size, header.geometry.cluster_bits) == 0;
        let stage = if header.autoclear == 0 && aligned { Stage::Started } else { Stage::Resting };
        Ok(Self {
            refcounts,
            metadata,
            space: Space::new(frontier, source.size, reserve),
            stage,
            changes: BTreeMap::new(),
            tables: BTreeMap::new(),
            freed: Vec::new(),
            commit: None,
            releasing: false,
            resizing: None,
            poisoned: false,
        })
    }

    pub(super) fn is_started(&self) -> bool {
        self.stage == Stage::Started
    }

    pub(super) fn is_starting(&self) -> bool {
        self.stage == Stage::Starting
    }

    /// One reference less, as soon as nobody reads there by an old map.
    pub(super) fn free_later(&mut self, cluster: u64) {
        self.freed.push(cluster);
        self.refcounts.cache.pin(self.refcounts.slice_of(cluster));
    }

    /// Drops a change that nobody will tell of; its new cluster goes back.
    fn drop_change(&mut self, cluster: u64) {
        let Some(change) = self.changes.remove(&cluster) else { return };
        self.unpin_old(&change.old);
        if let Some(host) = change.host {
            self.free_later(host);
        }
    }

    /// Ends the pins that planning has set on the reference counts of `old`.
    pub(super) fn unpin_old(&mut self, old: &[u64]) {
        for &cluster in old {
            self.refcounts.cache.unpin(self.refcounts.slice_of(cluster));
        }
    }

    /// Learns whether one reference less is possible for each of these clusters, and keeps their counts in memory.
    ///
    /// A count of 0 for a cluster that is in use means that the counts are damaged, and that the allocator could have given
    /// the cluster to somebody else.
    pub(super) fn hold(&mut self, clusters: &[u64]) -> Result<Option<format::Load>, Error> {
        for &cluster in clusters {
            match self.refcounts.get(cluster)? {
                Count::Missing(load) => {
                    self.refcounts.cache.load_began(load.key & !super::image::REFCOUNT_KEY);
                    return Ok(Some(load));
                }
                Count::Known(0) | Count::NoBlock => {
                    self.poisoned = true;
                    return Err(Error::corrupt(
                        "reference count of cluster",
                        cluster,
                        "is 0 although it is in use",
                    ));
                }
                Count::Known(_) => {}
            }
        }
        for &cluster in clusters {
            self.refcounts.cache.pin(self.refcounts.slice_of(cluster));
        }
        Ok(None)
    }
}

/// The clusters of a table; none for a table of no length.
fn refcounts_of(offset: u64, len: u64, header: &Header) -> Range<u64> {
    if len == 0 { 0..0 } else { metadata::clusters(offset, len, &header.geometry) }
}

/// Reads the reference counts of clusters, and keeps them. They are those of tables that may move when the image grows, and
/// what they leave is given back without further reading.
fn load_counts(
    source: &mut Source<'_>,
    refcounts: &mut Refcounts,
    clusters: Range<u64>,
) -> Result<(), Error> {
    for cluster in clusters.clone() {
        if let Ok(Count::Missing(load)) = refcounts.get(cluster) {
            let bytes = read(source, "refcount block", load.offset, load.len.into())?;
            refcounts.cache.insert(refcounts.slice_of(cluster), bytes.into());
        }
    }
    refcounts.keep(clusters);
    Ok(())
}

/// The first cluster from which on none is in use, by the last reference count that is not 0.
fn find_frontier(source: &mut Source<'_>, header: &Header, refcounts: &mut Refcounts) -> Result<u64, Error> {
    let g = &header.geometry;
    let counts = exp(g.refcount_slice_counts());
    let mut last = refcounts.table.iter().rposition(|&entry| entry != 0).map_or(0, |at| at as u64);
    let mut empty = 0;
    loop {
        let mut slice = refcounts.slice_of(refcounts.next_block(up(last, g.block_bits())).saturating_sub(1));
        loop {
            let first = slice.saturating_mul(counts);
            if let Count::Missing(load) = refcounts.get(first)? {
                let bytes = read(source, "refcount block", load.offset, load.len.into())?;
                let used = last_used(&bytes, g.refcount_order);
                refcounts.cache.insert(slice, bytes.into());
                empty = u32::saturating_add(empty, 1);
                if let Some(used) = used {
                    return Ok(first.saturating_add(used).saturating_add(1));
                }
                if empty > MOST_EMPTY_SLICES {
                    return Ok(refcounts.next_slice(first));
                }
            }
            if slice == 0 || down(first, g.block_bits()) < last || first == up(last, g.block_bits()) {
                break;
            }
            slice = slice.saturating_sub(1);
        }
        if last == 0 {
            return Err(Error::invalid("refcount table", "it says that no cluster is in use"));
        }
        last = last.saturating_sub(1);
    }
}

impl Qcow2 {
    pub(super) fn check_writable(&self) -> Result<&Writing, Error> {
        let writing = self.writing.as_deref().ok_or(Error::ReadOnly)?;
        if writing.poisoned { Err(Error::Poisoned) } else { Ok(writing) }
    }

    /// Byte offset to write to if that is all there is to do.
    pub(super) fn overwrite_at(&self, sector: Sector, count: u32) -> Option<u64> {
        let writing = self.check_writable().ok().filter(|writing| writing.is_started())?;
        let offset = self.in_one_piece(sector, count, true)?;
        let len = up(count.into(), SECTOR_BITS);
        let mut hosts = metadata::clusters(offset, len, &self.geometry);
        if hosts.any(|host| writing.metadata.contains(host)) {
            return None;
        }
        // Who has a change under way there is to be waited for.
        let clusters = self.clusters_of(sector, count);
        writing.changes.range(clusters).next().is_none().then_some(offset)
    }

    /// The clusters of the disk that some sectors lie in.
    pub(super) fn clusters_of(&self, sector: Sector, count: u32) -> Range<u64> {
        let bits = self.geometry.sector_bits();
        let last = sector.saturating_add(count.into()).saturating_sub(1);
        down(sector, bits)..down(last, bits).saturating_add(1)
    }

    /// What to do to write a prefix of the sectors.
    pub(super) fn plan(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        let stage = self.check_writable()?.stage;
        self.check_range(sector, count)?;
        if stage == Stage::Starting {
            return Ok(Plan::Wait);
        }
        let mut plan = self.plan_started(sector, count)?;
        if stage == Stage::Resting
            && let Plan::Write(write) = &mut plan
        {
            let mut steps = self.start_steps();
            let more = write.prepare.take();
            let key = START | more.as_ref().map_or(0, |more| more.key);
            steps.extend(more.into_iter().flat_map(|more| more.steps));
            write.prepare = Some(Prepare { key, steps });
        }
        Ok(plan)
    }

    /// What comes before the first write: features that a writer does not keep up are cleared, and the last cluster of the
    /// file becomes whole.
    pub(super) fn start_steps(&mut self) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.regular {
            steps.push(Step::Truncate(self.geometry.round_up(self.file_len)));
        }
        if self.header.autoclear != 0 {
            self.header.sector = self.header.with(&[(at::AUTOCLEAR, &[0; 8])]);
            steps.push(Step::Write(MetaWrite { offset: 0, bytes: self.header.sector.to_vec() }));
        }
        steps.push(Step::Flush);
        if let Some(writing) = &mut self.writing {
            writing.stage = Stage::Starting;
        }
        steps
    }

    /// A preparation has ended.
    pub(super) fn preparation_ended(&mut self, key: u64, done: bool) {
        let Some(writing) = &mut self.writing else { return };
        if key & START != 0 {
            writing.stage = if done { Stage::Started } else { Stage::Resting };
            if done && self.regular {
                self.header.autoclear = 0;
                self.file_len = self.geometry.round_up(self.file_len);
            }
        }
        if key & RESERVE != 0
            && let Some(grown) = writing.space.prepared(done)
        {
            self.file_len = self.file_len.max(grown);
            writing.changes.values_mut().for_each(|change| change.unprepared = false);
            writing.tables.values_mut().for_each(|table| table.unprepared = false);
        }
    }

    /// The first write's steps and those of a reserve were carried out along with something else.
    pub(super) fn everything_prepared(&mut self) {
        let started = self.writing.as_ref().is_none_or(|writing| writing.is_started());
        self.preparation_ended(RESERVE | if started { 0 } else { START }, true);
    }

    fn plan_started(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        let first_cluster = down(sector, self.geometry.sector_bits());
        if let Some(plan) = self.join_change(first_cluster, sector, count) {
            return Ok(plan);
        }
        match self.look(sector, count)? {
            (Place::Load(load), _) => {
                self.slices.load_began(load.key);
                Ok(Plan::Load(load))
            }
            _ => match self.own_run(sector, count)? {
                Some((offset, count)) => Ok(Plan::Write(write(offset, count, None, false))),
                None => self.plan_new(sector, count),
            },
        }
    }

    /// A plan for a cluster that has a change under way.
    fn join_change(&mut self, cluster: u64, sector: Sector, count: u32) -> Option<Plan> {
        let bits = self.geometry.sector_bits();
        let change = self.writing.as_mut()?.changes.get_mut(&cluster)?;
        let taken = change.unprepared || (change.exclusive && change.writers > 0);
        let Some(host) = change.host.filter(|_| !taken) else {
            return Some(Plan::Wait);
        };
        let first = rest(sector, bits);
        let left = u32::try_from(exp(bits).saturating_sub(first)).unwrap_or(u32::MAX);
        change.writers = change.writers.saturating_add(1);
        let offset = up(host, self.geometry.cluster_bits).saturating_add(up(first, SECTOR_BITS));
        Some(Plan::Write(write(offset, min(count, left), None, true)))
    }

    /// Place and number of the first sectors that may be written in place.
    fn own_run(&mut self, sector: Sector, count: u32) -> Result<Option<(u64, u32)>, Error> {
        let bits = self.geometry.sector_bits();
        let (mut start, mut done) = (None, 0_u32);
        while done < count {
            let at = sector.saturating_add(done.into());
            let cluster = down(at, bits);
            let Some(host) = self.own_host(cluster, done == 0)? else { break };
            let first = rest(at, bits);
            let offset = host.saturating_add(up(first, SECTOR_BITS));
            if offset != start.get_or_insert(offset).saturating_add(up(done.into(), SECTOR_BITS)) {
                break;
            }
            let left = u32::try_from(exp(bits).saturating_sub(first)).unwrap_or(u32::MAX);
            done = done.saturating_add(min(left, count.saturating_sub(done)));
        }
        Ok(start.filter(|_| done > 0).map(|start| (start, done)))
    }

    /// Byte offset of a cluster that may be written in place. `first`: an error counts.
    fn own_host(&mut self, cluster: u64, first: bool) -> Result<Option<u64>, Error> {
        let table = self.table(cluster)?;
        let entry = match self.entry(cluster) {
            Some((entry, _)) if table == (table.0, true) && table.0 != 0 => entry,
            _ => return Ok(None),
        };
        let host = match entry::l2(entry, &self.geometry) {
            Ok(Cluster::Data { host, copied: true }) => host,
            Err(error) if first => return Err(error),
            _ => return Ok(None),
        };
        let Some(writing) = &mut self.writing else { return Ok(None) };
        if writing.changes.contains_key(&cluster) {
            return Ok(None);
        }
        if writing.metadata.contains(down(host, self.geometry.cluster_bits)) {
            if first {
                writing.poisoned = true;
                return Err(Error::corrupt("L2 entry", entry, "names a cluster that holds metadata"));
            }
            return Ok(None);
        }
        Ok(Some(host))
    }

    /// Plans a write to clusters of the disk that get a new place.
    fn plan_new(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        let cluster = down(sector, self.geometry.sector_bits());
        if self.table_is_unprepared(cluster) && self.writing.as_ref().is_some_and(|w| w.space.running) {
            return Ok(Plan::Wait);
        }
        let (old, freed, new_table) = match self.replace(cluster)? {
            Ok(found) => found,
            Err(load) => return Ok(Plan::Load(load)),
        };
        let clusters = if freed.is_empty() { self.similar(self.clusters_of(sector, count), old) } else { 1 };
        let need = if new_table.is_some() { 2 } else { 1 };
        let room = self.room(need);
        if !matches!(room, Ok(Room::Ready | Room::Prepare(_))) {
            self.let_go(&freed, new_table);
        }
        let prepare = match room? {
            Room::Wait => return Ok(Plan::Wait),
            Room::Load(load) => {
                self.refcount_load_began(&load);
                return Ok(Plan::Load(load));
            }
            Room::Ready => None,
            Room::Prepare(steps) => Some(Prepare { key: RESERVE, steps }),
        };
        self.take_clusters(sector, count, Fresh { old, freed, clusters, need, prepare })
    }

    /// Where a cluster of the disk is, which clusters of the file lose a reference when it gets another place, and, if its L2
    /// table has to be made or copied, the cluster of the old one (0: none); or what to read first. Reference counts of
    /// all of them are held.
    #[expect(clippy::type_complexity, reason = "used twice, taken apart at once")]
    pub(super) fn replace(
        &mut self,
        cluster: u64,
    ) -> Result<Result<(Cluster, Vec<u64>, Option<u64>), format::Load>, Error> {
        let old = match self.old_place(cluster)? {
            Ok(old) => old,
            Err(load) => return Ok(Err(load)),
        };
        let new_table = match self.table_needs(cluster)? {
            Ok(needs) => needs,
            Err(load) => return Ok(Err(load)),
        };
        let freed = self.freed_by(old);
        let Some(writing) = &mut self.writing else { return Err(Error::ReadOnly) };
        let table = new_table.filter(|&table| table != 0);
        let all = freed.iter().copied().chain(table).collect::<Vec<_>>();
        Ok(match writing.hold(&all)? {
            Some(load) => Err(load),
            None => Ok((old, freed, new_table)),
        })
    }

    /// Undoes what [`Qcow2::replace`] has kept.
    pub(super) fn let_go(&mut self, freed: &[u64], table: Option<u64>) {
        if let Some(writing) = &mut self.writing {
            writing.unpin_old(freed);
            writing.unpin_old(table.filter(|&table| table != 0).as_slice());
        }
    }

    pub(super) fn refcount_load_began(&self, load: &format::Load) {
        if let Some(writing) = &self.writing {
            writing.refcounts.cache.load_began(load.key & !super::image::REFCOUNT_KEY);
        }
    }

    /// Where a cluster of the disk is now; or what to read first.
    pub(super) fn old_place(&mut self, cluster: u64) -> Result<Result<Cluster, format::Load>, Error> {
        let (table, _) = self.table(cluster)?;
        if table == 0 {
            return Ok(Ok(Cluster::Absent));
        }
        if let Some((entry, _)) = self.entry(cluster) {
            return Ok(Ok(entry::l2(entry, &self.geometry)?));
        }
        let load = self.slice_load(down(cluster, self.geometry.slice_entries()), table);
        self.slices.load_began(load.key);
        Ok(Err(load))
    }

    /// Clusters of the file that lose a reference when the cluster of the disk gets another place.
    fn freed_by(&self, old: Cluster) -> Vec<u64> {
        let bits = self.geometry.cluster_bits;
        match old {
            Cluster::Absent | Cluster::Zero { host: None } => Vec::new(),
            Cluster::Zero { host: Some(host) } | Cluster::Data { host, .. } => vec![down(host, bits)],
            Cluster::Packed(packed) => {
                metadata::clusters(packed.offset, packed.len.into(), &self.geometry).collect()
            }
        }
    }

    /// How many of the clusters are where the first one is, and free of changes. They share a slice.
    fn similar(&self, clusters: Range<u64>, old: Cluster) -> u64 {
        let g = &self.geometry;
        let slice = down(clusters.start, g.slice_entries());
        let Some(writing) = &self.writing else { return 1 };
        let same = clusters.take_while(|&cluster| {
            let entry = match self.table(cluster) {
                Ok((0, _)) => Some(Cluster::Absent),
                Ok(_) => self.entry(cluster).and_then(|(entry, _)| entry::l2(entry, g).ok()),
                Err(_) => None,
            };
            down(cluster, g.slice_entries()) == slice
                && entry == Some(old)
                && !writing.changes.contains_key(&cluster)
        });
        (same.count() as u64).max(1)
    }

    /// If the L2 table for a cluster has to be made or copied, the cluster of the old one (0: none); or what to read first.
    fn table_needs(&mut self, cluster: u64) -> Result<Result<Option<u64>, format::Load>, Error> {
        let g = self.geometry;
        let (table, own) = self.table(cluster)?;
        let at = down(cluster, g.l2_bits());
        let Some(writing) = &mut self.writing else { return Err(Error::ReadOnly) };
        if (table != 0 && own) || writing.tables.contains_key(&at) {
            return Ok(Ok(None));
        }
        if table == 0 {
            return Ok(Ok(Some(0)));
        }
        // Somebody else's table is copied: all of it has to be in memory, and stays there until the copy is written.
        let slices = up(at, g.slices())..up(at.saturating_add(1), g.slices());
        if let Some(missing) = slices.clone().find(|&slice| self.slices.get(slice).is_none()) {
            let load = self.slice_load(missing, table);
            self.slices.load_began(load.key);
            return Ok(Err(load));
        }
        Ok(Ok(Some(down(table, g.cluster_bits))))
    }

    /// True if the L2 table for a cluster is new and lies where no preparation has succeeded yet.
    pub(super) fn table_is_unprepared(&self, cluster: u64) -> bool {
        let at = down(cluster, self.geometry.l2_bits());
        let tables = self.writing.as_ref().map(|writing| &writing.tables);
        tables.and_then(|tables| tables.get(&at)).is_some_and(|table| table.unprepared)
    }

    /// Makes room for a new L2 table.
    pub(super) fn add_table(&mut self, cluster: u64, host: u64, unprepared: bool) -> Result<(), Error> {
        let g = self.geometry;
        let (table, _) = self.table(cluster)?;
        let at = down(cluster, g.l2_bits());
        if let Some(writing) = &mut self.writing {
            writing.tables.insert(at, NewTable { host, old: (table != 0).then_some(table), unprepared });
        }
        if table != 0 {
            (up(at, g.slices())..up(at.saturating_add(1), g.slices()))
                .for_each(|slice| self.slices.pin(slice));
        }
        Ok(())
    }

    /// Takes the clusters and notes the change.
    fn take_clusters(&mut self, sector: Sector, count: u32, fresh: Fresh) -> Result<Plan, Error> {
        let g = self.geometry;
        let (first_cluster, first) = (down(sector, g.sector_bits()), rest(sector, g.sector_bits()));
        let Some(writing) = &mut self.writing else { return Err(Error::ReadOnly) };
        let full = Error::NoSpace { end: up(writing.space.frontier, g.cluster_bits) };
        let from_new = fresh.prepare.is_some() && !writing.space.has(fresh.need);
        let table = if fresh.need > 1 { writing.space.take(1, from_new).map(|run| run.start) } else { None };
        let hosts = writing.space.take(fresh.clusters, from_new).ok_or(full)?;
        if let Some(host) = table {
            self.add_table(first_cluster, host, from_new)?;
        }
        let clean = match fresh.old {
            Cluster::Absent => self.header.backing.is_none(),
            Cluster::Zero { .. } => true,
            Cluster::Data { .. } | Cluster::Packed(_) => false,
        };
        let length = hosts.end.saturating_sub(hosts.start);
        let room = up(length, g.sector_bits()).saturating_sub(first);
        let count = min(count, u32::try_from(room).unwrap_or(u32::MAX));
        for (cluster, host) in (first_cluster..).zip(hosts.clone()) {
            let change = Change {
                host: Some(host),
                entry: up(host, g.cluster_bits) | COPIED,
                old: fresh.freed.clone(),
                writers: 1,
                exclusive: !clean,
                barrier: !clean,
                state: State::Filling,
                unprepared: from_new,
            };
            self.add_change(cluster, change);
        }
        let offset = up(hosts.start, g.cluster_bits).saturating_add(up(first, SECTOR_BITS));
        let mut plan = write(offset, count, fresh.prepare, true);
        if !clean {
            // Behind the end of the disk there is nothing to copy.
            let end = sector.saturating_add(count.into());
            let unit = up(first_cluster.saturating_add(length), g.sector_bits()).min(self.sectors);
            plan.copy_before = u32::try_from(first).unwrap_or(u32::MAX);
            plan.copy_after = u32::try_from(unit.saturating_sub(end)).unwrap_or(u32::MAX);
        }
        Ok(Plan::Write(plan))
    }

    /// Notes a change, and keeps the slice that it will change.
    pub(super) fn add_change(&mut self, cluster: u64, change: Change) {
        self.slices.pin(down(cluster, self.geometry.slice_entries()));
        if let Some(writing) = &mut self.writing {
            writing.changes.insert(cluster, change);
        }
    }

    /// The data of a planned write are in place, or (`done` false) could not be written.
    pub(super) fn data_written(&mut self, sector: Sector, count: u32, done: bool) {
        for cluster in self.clusters_of(sector, count) {
            let Some(writing) = &mut self.writing else { return };
            let Some(change) = writing.changes.get_mut(&cluster) else { continue };
            change.writers = change.writers.saturating_sub(1);
            change.exclusive = false;
            if done && change.state == State::Filling {
                change.state = State::Ready;
            }
            if change.writers > 0 {
                continue;
            }
            match change.state {
                State::Filling => {
                    writing.drop_change(cluster);
                    self.slices.unpin(down(cluster, self.geometry.slice_entries()));
                }
                State::Published => {
                    writing.changes.remove(&cluster);
                }
                State::Ready | State::Committing => {}
            }
        }
    }
}

fn write(offset: u64, count: u32, prepare: Option<Prepare>, publish: bool) -> Write {
    Write { offset, count, prepare, copy_before: 0, copy_after: 0, publish }
}
