//! Room for new clusters.
//!
//! Clusters are reserved many at a time, ahead of need. A reserve is made by a preparation, after which three things hold
//! durably of each of its clusters: its reference count is 1, the file reaches around it, and it reads as zeros. So whoever
//! takes a cluster has nothing more to order: a table entry that names it is never wrong, and shows zeros at worst. What was
//! not needed is given back when the image is closed; after a crash it is leaked, which `check` tells and `repair` mends.
//!
//! Clusters that nobody refers to are found by a cursor that goes through the reference counts once; then the file grows.

use std::cmp::min;
use std::collections::VecDeque;
use std::ops::Range;

use format::{MetaWrite, Step};

use super::geometry::{Geometry, MAX_OFFSET, down, index, put, runs, up};
use super::header::{Header, at};
use super::image::Qcow2;
use super::refcount::Count;
use super::write::Writing;
use super::{Error, geometry, metadata};

/// Bytes of one reserve: an eighth of what is in use, between this and [`super::OpenOptions::reserve`].
const LEAST_RESERVE: u64 = 1 << 20;
/// The most for a device, where a reserve has to be filled with zeros.
const MOST_RESERVE_ON_DEVICE: u64 = 8 << 20;
const LEAST_CLUSTERS: u64 = 8;
/// Most bytes of a refcount table, as QEMU has it.
const MAX_TABLE: u64 = 8 << 20;

/// Clusters that are reserved, and where the next ones come from.
#[derive(Debug)]
pub(super) struct Space {
    /// May be taken.
    pub(super) ready: VecDeque<Range<u64>>,
    /// Being prepared: for the writer that prepares them only.
    pub(super) preparing: VecDeque<Range<u64>>,
    /// The steps that make `preparing` ready; kept until they have succeeded.
    steps: Vec<Step>,
    /// A preparation is being carried out.
    pub(super) running: bool,
    /// No cluster before this one is free.
    pub(super) cursor: u64,
    /// No cluster from this one on is in use.
    pub(super) frontier: u64,
    /// Length of the file once the preparation has been carried out.
    grown: u64,
    /// Most bytes of a reserve.
    pub(super) most: u64,
    /// When fewer are ready, more are prepared.
    low: u64,
    /// Slices of reference counts that are kept because `ready` or `preparing` are in them.
    pinned: Vec<u64>,
    /// What the last preparation has added behind the old frontier.
    extended: Range<u64>,
}

/// What a writer that needs clusters has to do.
pub(super) enum Room {
    Ready,
    Prepare(Vec<Step>),
    Wait,
    Load(format::Load),
}

/// A search that may need something read first.
pub(super) enum Found<T> {
    Yes(T),
    Load(format::Load),
}

impl Space {
    pub(super) fn new(frontier: u64, file_len: u64, most: u64) -> Self {
        Self {
            ready: VecDeque::new(),
            preparing: VecDeque::new(),
            steps: Vec::new(),
            running: false,
            cursor: 0,
            frontier,
            grown: file_len,
            most,
            low: 0,
            pinned: Vec::new(),
            extended: 0..0,
        }
    }

    fn available(&self) -> u64 {
        len(&self.ready)
    }

    /// True if so many clusters can be taken at once.
    pub(super) fn has(&self, count: u64) -> bool {
        self.available() >= count
    }

    /// Takes up to `count` clusters that follow each other. `fresh`: from those that the caller is about to prepare.
    pub(super) fn take(&mut self, count: u64, fresh: bool) -> Option<Range<u64>> {
        let from = if fresh { &mut self.preparing } else { &mut self.ready };
        let run = from.front_mut()?;
        let end = min(run.end, run.start.saturating_add(count));
        let taken = run.start..end;
        run.start = end;
        if run.is_empty() {
            from.pop_front();
        }
        Some(taken)
    }

    /// The preparation has ended.
    pub(super) fn prepared(&mut self, done: bool) -> Option<u64> {
        self.running = false;
        if !done {
            return None;
        }
        self.steps.clear();
        self.ready.extend(self.preparing.drain(..));
        Some(self.grown)
    }

    /// True if no preparation is under way, and none has failed and is to be tried again.
    pub(super) fn is_settled(&self) -> bool {
        !self.running && self.steps.is_empty()
    }

    /// Steps of a preparation that has failed.
    pub(super) fn failed_steps(&self) -> &[Step] {
        &self.steps
    }

    /// Everything that is reserved and in no use.
    pub(super) fn unused(&self) -> impl Iterator<Item = u64> + '_ {
        self.ready.iter().chain(&self.preparing).flat_map(Clone::clone)
    }
}

fn len(runs: &VecDeque<Range<u64>>) -> u64 {
    runs.iter().fold(0, |sum, run| sum.saturating_add(run.end.saturating_sub(run.start)))
}

impl Qcow2 {
    /// Sees to it that `need` clusters can be taken.
    pub(super) fn room(&mut self, need: u64) -> Result<Room, Error> {
        let Some(writing) = &mut self.writing else { return Err(Error::ReadOnly) };
        let available = writing.space.available();
        let busy = writing.space.running || writing.releasing || writing.resizing.is_some();
        // What has failed is tried again first: there may be changes that wait for it.
        let whole = writing.space.steps.is_empty();
        if available >= need && (busy || (whole && available >= writing.space.low)) {
            return Ok(Room::Ready);
        }
        if busy {
            return Ok(Room::Wait);
        }
        let device = (!self.regular).then_some(self.file_len);
        match writing.refill(&mut self.header, need, self.file_len, device) {
            Ok(Found::Load(load)) => Ok(Room::Load(load)),
            Ok(Found::Yes(())) => {
                writing.space.running = true;
                Ok(Room::Prepare(writing.space.steps.clone()))
            }
            Err(Error::NoSpace { .. }) if available >= need => {
                writing.space.low = 0;
                Ok(Room::Ready)
            }
            Err(error) => {
                writing.poisoned |= matches!(error, Error::Corrupt { .. });
                Err(error)
            }
        }
    }
}

impl Writing {
    /// Reserves more clusters and says how to prepare them.
    fn refill(
        &mut self,
        header: &mut Header,
        need: u64,
        file_len: u64,
        device: Option<u64>,
    ) -> Result<Found<()>, Error> {
        if !self.space.steps.is_empty() && (len(&self.space.preparing) >= need || self.space.has(need)) {
            return Ok(Found::Yes(()));
        }
        // Clusters that are to be freed but could not yet: now is the time to read what that needs.
        for &cluster in &self.freed {
            if let Count::Missing(load) = self.refcounts.get(cluster)? {
                return Ok(Found::Load(load));
            }
        }
        let g = header.geometry;
        let want = wanted(&self.space, &g, device.is_some()).max(need);
        let found = match self.search(want, need)? {
            Found::Yes(found) => found,
            Found::Load(load) => return Ok(Found::Load(load)),
        };
        let mut steps = self.space.steps.clone();
        self.space.grown = self.space.grown.max(file_len);
        if (found.len() as u64) < need {
            match self.extend(header, want, need, file_len, device)? {
                Found::Load(load) => return Ok(Found::Load(load)),
                Found::Yes(more) => {
                    steps.extend(more.steps);
                    self.space.preparing.push_back(more.clusters);
                }
            }
        }
        for &cluster in &found {
            self.refcounts.set(cluster, 1);
            self.space.cursor = cluster.saturating_add(1);
        }
        let found = runs(found);
        if !found.is_empty() {
            steps.extend(self.reuse_steps(&found, &g, file_len, device.is_some()));
            self.space.preparing.extend(found);
        }
        self.space.low = want / 4;
        self.space.steps = steps;
        self.pin_reserve();
        Ok(Found::Yes(()))
    }

    /// Steps that make clusters within the file a reserve.
    fn reuse_steps(&mut self, found: &[Range<u64>], g: &Geometry, file_len: u64, device: bool) -> Vec<Step> {
        let end = up(found.last().map_or(0, |run| run.end), g.cluster_bits);
        let mut steps = Vec::new();
        if !device && end > self.space.grown {
            self.space.grown = end;
            steps.push(Step::Truncate(end));
        }
        steps.extend(self.refcounts.take_writes().into_iter().map(Step::Write));
        steps.extend(found.iter().filter_map(|run| zero_step(run, g, file_len)));
        steps.push(Step::Flush);
        steps
    }

    /// Up to `want` clusters before the frontier that nobody refers to. Stops early rather than read more than `need` asks
    /// for.
    fn search(&mut self, want: u64, need: u64) -> Result<Found<Vec<u64>>, Error> {
        let mut found = Vec::new();
        let mut at = self.space.cursor;
        while at < self.space.frontier && (found.len() as u64) < want {
            let end = match self.refcounts.get(at)? {
                Count::Missing(_) if found.len() as u64 >= need => break,
                Count::Missing(load) => {
                    if found.is_empty() {
                        self.space.cursor = at;
                    }
                    return Ok(Found::Load(load));
                }
                Count::NoBlock => {
                    at = self.refcounts.next_block(at);
                    continue;
                }
                Count::Known(_) => min(self.refcounts.next_slice(at), self.space.frontier),
            };
            while at < end && (found.len() as u64) < want {
                if self.refcounts.get(at)? == Count::Known(0) {
                    if self.metadata.contains(at) {
                        return Err(Error::corrupt(
                            "reference count of cluster",
                            at,
                            "is 0 although it holds metadata",
                        ));
                    }
                    found.push(at);
                }
                at = at.saturating_add(1);
            }
        }
        if found.is_empty() {
            self.space.cursor = at.min(self.space.frontier);
        }
        Ok(Found::Yes(found))
    }

    /// Reserves up to `want` clusters that follow each other, behind all that are in use, with the refcount blocks that are
    /// missing for them, and a larger refcount table if that has no room for the blocks. At least `least`.
    ///
    /// New blocks and tables lie in clusters that nobody knows yet. They are durable before the table or the header names
    /// them, and named durably before any of the clusters is used.
    pub(super) fn extend(
        &mut self,
        header: &mut Header,
        want: u64,
        least: u64,
        file_len: u64,
        device: Option<u64>,
    ) -> Result<Found<Extension>, Error> {
        let g = header.geometry;
        let limit = down(device.unwrap_or(MAX_OFFSET), g.cluster_bits);
        let frontier = self.space.frontier;
        let plan = [want, least].into_iter().find_map(|count| self.layout(header, count, limit));
        let plan = plan.ok_or(Error::NoSpace { end: up(frontier, g.cluster_bits) })?;
        let mut at = frontier;
        while at < plan.end {
            match self.refcounts.get(at)? {
                Count::Missing(load) => return Ok(Found::Load(load)),
                Count::NoBlock => at = self.refcounts.next_block(at),
                Count::Known(0) => at = at.saturating_add(1),
                Count::Known(_) => {
                    return Err(Error::corrupt(
                        "reference count of cluster",
                        at,
                        "is not 0 behind the last one in use",
                    ));
                }
            }
        }
        for (host, &number) in (frontier..).zip(&plan.blocks) {
            self.refcounts.add_block(number, up(host, g.cluster_bits));
            self.metadata.add(host);
        }
        (frontier..plan.end).for_each(|cluster| {
            self.refcounts.set(cluster, 1);
        });
        let steps = self.extend_steps(header, &plan, file_len, device.is_some());
        self.space.extended = frontier..plan.end;
        self.space.frontier = plan.end;
        Ok(Found::Yes(Extension { clusters: plan.first..plan.end, steps }))
    }

    /// What lies where behind the frontier: new blocks, a new table, `count` clusters. `None` if that is too much.
    fn layout(&self, header: &Header, count: u64, limit: u64) -> Option<Layout> {
        let g = header.geometry;
        let frontier = self.space.frontier;
        let room = down(header.refcount_table_bytes(), 3);
        let (mut blocks, mut table) = (Vec::new(), 0_u64);
        loop {
            let first = frontier.checked_add(blocks.len() as u64)?.checked_add(table)?;
            let end = first.checked_add(count).filter(|&end| end <= limit)?;
            let numbers = down(frontier, g.block_bits())..=down(end.saturating_sub(1), g.block_bits());
            let entries = numbers.end().saturating_add(1);
            let missing =
                numbers.filter(|&number| self.refcounts.table.get(index(number)).is_none_or(|&b| b == 0));
            let missing = missing.collect::<Vec<_>>();
            let clusters = if entries > room { table_clusters(entries, &g)? } else { 0 };
            if missing.len() == blocks.len() && clusters == table {
                return Some(Layout { blocks, table, first, end });
            }
            (blocks, table) = (missing, clusters.max(table));
        }
    }

    fn extend_steps(&mut self, header: &mut Header, plan: &Layout, file_len: u64, device: bool) -> Vec<Step> {
        let g = header.geometry;
        let frontier = self.space.frontier;
        let end = up(plan.end, g.cluster_bits);
        let mut steps = Vec::new();
        if !device && end > self.space.grown.max(file_len) {
            self.space.grown = end;
            steps.push(Step::Truncate(end));
        }
        // The part that was in the file before may have any content.
        steps.extend(zero_step(&(plan.first..plan.end), &g, file_len));
        let written = self.refcounts.take_writes();
        if plan.blocks.is_empty() && plan.table == 0 {
            steps.extend(written.into_iter().map(Step::Write));
            steps.push(Step::Flush);
            return steps;
        }
        let blocks = frontier..frontier.saturating_add(plan.blocks.len() as u64);
        steps.extend(zero_step(&blocks, &g, file_len));
        if steps.iter().any(|step| matches!(step, Step::Zero(_))) {
            // What is written below must not be overtaken by zeros.
            steps.push(Step::Flush);
        }
        steps.extend(written.into_iter().map(Step::Write));
        if plan.table > 0 {
            steps.extend(self.move_table(header, blocks.end, plan.table));
        } else {
            steps.push(Step::Flush);
            steps.extend(self.table_writes(header.refcount_table, &plan.blocks));
        }
        steps.push(Step::Flush);
        steps
    }

    /// The sectors of the refcount table that name new blocks.
    fn table_writes(&self, table: u64, blocks: &[u64]) -> Vec<Step> {
        let mut sectors =
            blocks.iter().map(|&number| self.refcounts.table_sector(number)).collect::<Vec<_>>();
        sectors.dedup_by_key(|sector| sector.0);
        let write = |(at, bytes): (u64, Vec<u8>)| MetaWrite { offset: table.saturating_add(at), bytes };
        sectors.into_iter().map(write).map(Step::Write).collect()
    }

    /// Writes the whole refcount table to a new place and lets the header name it, by one write of one sector.
    fn move_table(&mut self, header: &mut Header, first: u64, clusters: u64) -> Vec<Step> {
        let g = header.geometry;
        let (offset, len) = (up(first, g.cluster_bits), up(clusters, g.cluster_bits));
        let mut bytes = vec![0; index(len)];
        for (at, entry) in self.refcounts.table.iter().enumerate() {
            put(&mut bytes, at.saturating_mul(8), &entry.to_be_bytes());
        }
        let (old, old_len) = (header.refcount_table, header.refcount_table_bytes());
        self.metadata.remove_range(old, old_len, &g);
        self.metadata.add_range(offset, len, &g);
        let gone = metadata::clusters(old, old_len, &g);
        gone.clone().for_each(|cluster| self.free_later(cluster));
        self.refcounts.let_go(gone);
        self.refcounts.keep(metadata::clusters(offset, len, &g));
        header.refcount_table = offset;
        header.refcount_table_clusters = clusters;
        let count = u32::try_from(clusters).unwrap_or(u32::MAX).to_be_bytes();
        header.sector = header
            .with(&[(at::REFCOUNT_TABLE, &offset.to_be_bytes()), (at::REFCOUNT_TABLE_CLUSTERS, &count)]);
        vec![
            Step::Write(MetaWrite { offset, bytes }),
            Step::Flush,
            Step::Write(MetaWrite { offset: 0, bytes: header.sector.to_vec() }),
        ]
    }

    /// Keeps the reference counts of the reserve in memory, so that what is left of it can be given back.
    pub(super) fn pin_reserve(&mut self) {
        for key in std::mem::take(&mut self.space.pinned) {
            self.refcounts.cache.unpin(key);
        }
        // New clusters are found behind the frontier without reading.
        let mut keys = vec![self.refcounts.slice_of(self.space.frontier)];
        let extended = std::iter::once(&self.space.extended).filter(|run| !run.is_empty());
        for run in self.space.ready.iter().chain(&self.space.preparing).chain(extended) {
            let last = self.refcounts.slice_of(run.end.saturating_sub(1));
            keys.extend(self.refcounts.slice_of(run.start)..=last);
        }
        keys.sort_unstable();
        keys.dedup();
        keys.iter().for_each(|&key| self.refcounts.cache.pin(key));
        self.space.pinned = keys;
    }
}

/// Clusters that follow each other behind all others, and the steps that reserve them.
pub(super) struct Extension {
    pub(super) clusters: Range<u64>,
    pub(super) steps: Vec<Step>,
}

/// Where new things lie, in clusters: the blocks from the frontier on, then the table, then what was asked for.
struct Layout {
    /// The numbers of the blocks that are missing.
    blocks: Vec<u64>,
    /// Clusters of a new table; 0 if the old one has room.
    table: u64,
    first: u64,
    end: u64,
}

/// Clusters of a table with room for twice as many entries.
fn table_clusters(entries: u64, g: &Geometry) -> Option<u64> {
    let bytes = entries.saturating_mul(8);
    let most = g.round_up(MAX_TABLE);
    (bytes <= most).then(|| down(g.round_up(bytes.saturating_mul(2)).min(most), g.cluster_bits))
}

/// How many clusters to reserve at once.
fn wanted(space: &Space, g: &Geometry, device: bool) -> u64 {
    let most = if device { space.most.min(MOST_RESERVE_ON_DEVICE) } else { space.most };
    let bytes = (up(space.frontier, g.cluster_bits) / 8).clamp(LEAST_RESERVE.min(most), most);
    down(bytes, g.cluster_bits).max(LEAST_CLUSTERS)
}

/// Makes zeros of the clusters of a run that were in the file before.
fn zero_step(run: &Range<u64>, g: &Geometry, file_len: u64) -> Option<Step> {
    let range = up(run.start, g.cluster_bits)..up(run.end, g.cluster_bits).min(g.round_up(file_len));
    (range.start < range.end).then_some(Step::Zero(range))
}

/// The clusters that hold the last count that is not 0, and all behind: what [`Space::frontier`] begins as.
pub(super) fn last_used(slice: &[u8], order: u32) -> Option<u64> {
    let counts = down(geometry::up(slice.len() as u64, 3), order);
    (0..counts).rev().find(|&at| super::refcount::count(slice, at, order) != 0)
}
