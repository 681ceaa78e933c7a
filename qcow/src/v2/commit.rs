//! Commits: what has been written becomes part of the image.
//!
//! The steps of a commit, and why they are in this order:
//!
//! 1. copies of L2 tables that snapshots share. Nobody names them yet;
//! 2. a flush, but only if one of these is new: a copy from 1, or a cluster of data that replaces something other than
//!    zeros. Without the flush a table could name a cluster whose data are not there, and it reads as zeros then. That is a
//!    lie only if it was not zeros before: a new cluster where there was none, in an image without a backing file, needs no
//!    flush at all, because zeros are what an unflushed write may leave, and so it is with new L2 tables, whose zeros say
//!    "nothing here";
//! 3. references that earlier commits have made superfluous are counted down, and room is given back. The flush before
//!    has made durable that nobody names it;
//! 4. slices of L2 tables, and the L1 table, in any order: they lie in tables of their own or begin as zeros.
//!
//! What a commit has taken from a cluster of the file is counted down by a later one, because until the end of this one the
//! map in memory still shows the old place to readers.

use std::collections::{BTreeMap, BTreeSet};

use format::{MetaWrite, Step};

use super::entry::COPIED;
use super::geometry::{down, exp, index, put, rest, runs, up};
use super::image::Qcow2;
use super::refcount::Count;
use super::write::{State, Writing};

/// Bytes of clusters to free that make counting down worth a flush of its own.
const WORTH_A_FLUSH: u64 = 1 << 20;

/// A commit under way.
#[derive(Debug)]
pub(super) struct Commit {
    clusters: Vec<u64>,
    slices: BTreeMap<u64, Box<[u8]>>,
    tables: BTreeSet<u64>,
    /// Clusters that lose a reference: their counts stay in memory until the commit has ended.
    released: Vec<u64>,
}

impl Qcow2 {
    /// Takes all that is pending as one commit.
    pub(super) fn commit_steps(&mut self) -> Option<Vec<Step>> {
        let bits = self.geometry.cluster_bits;
        let writing = self.writing.as_mut()?;
        if writing.commit.is_some() || writing.poisoned || writing.resizing.is_some() {
            return None;
        }
        let enough = up(writing.freed.len() as u64, bits) >= WORTH_A_FLUSH.min(writing.space.most).max(1);
        let ready = writing.changes.iter().filter(|(_, change)| change.state == State::Ready);
        let clusters = ready.map(|(&cluster, _)| cluster).collect::<Vec<_>>();
        let mut barrier = false;
        for cluster in &clusters {
            if let Some(change) = writing.changes.get_mut(cluster) {
                change.state = State::Committing;
                barrier |= change.barrier;
            }
        }
        let slices = self.changed_slices(&clusters);
        let tables = self.new_tables(&clusters);
        let mut steps = self.table_copies(&tables, &slices);
        barrier |= !steps.is_empty();
        let writing = self.writing.as_mut()?;
        let release = (enough || (barrier && !writing.freed.is_empty())) && writing.space.is_settled();
        if clusters.is_empty() && !release {
            return None;
        }
        if barrier || release {
            steps.push(Step::Flush);
        }
        let mut released = Vec::new();
        if release {
            let (more, clusters) = writing.release(bits);
            // Whoever has learned an old place before may still be at work there.
            steps.push(Step::Settle);
            steps.extend(more);
            released = clusters;
            writing.releasing = true;
        }
        steps.extend(self.slice_writes(&tables, &slices));
        steps.extend(self.l1_writes(&tables));
        self.writing.as_mut()?.commit = Some(Commit { clusters, slices, tables, released });
        Some(steps)
    }

    /// The slices with the new entries.
    fn changed_slices(&self, clusters: &[u64]) -> BTreeMap<u64, Box<[u8]>> {
        let g = &self.geometry;
        let mut slices: BTreeMap<u64, Box<[u8]>> = BTreeMap::new();
        let Some(writing) = &self.writing else { return slices };
        for cluster in clusters {
            let Some(change) = writing.changes.get(cluster) else { continue };
            let key = down(*cluster, g.slice_entries());
            // A slice with a change is kept. If it is not here, its table is new and has nothing but zeros there.
            let slice = slices.entry(key).or_insert_with(|| match self.slices.get(key) {
                Some(bytes) => bytes.into(),
                None => vec![0; index(exp(g.slice_bits()))].into(),
            });
            let at = index(up(rest(*cluster, g.slice_entries()), g.entry_bits()));
            put(slice, at, &change.entry.to_be_bytes());
        }
        slices
    }

    /// The new L2 tables that these clusters need.
    fn new_tables(&self, clusters: &[u64]) -> BTreeSet<u64> {
        let bits = self.geometry.l2_bits();
        let Some(writing) = &self.writing else { return BTreeSet::new() };
        let tables = clusters.iter().map(|&cluster| down(cluster, bits));
        tables.filter(|table| writing.tables.contains_key(table)).collect()
    }

    /// Writes of whole tables that replace shared ones.
    fn table_copies(&self, tables: &BTreeSet<u64>, slices: &BTreeMap<u64, Box<[u8]>>) -> Vec<Step> {
        let g = &self.geometry;
        let Some(writing) = &self.writing else { return Vec::new() };
        let copies = tables.iter().filter_map(|&at| {
            let table = writing.tables.get(&at).filter(|table| table.old.is_some())?;
            let keys = up(at, g.slices())..up(at.saturating_add(1), g.slices());
            let slice = |key: u64| slices.get(&key).map(|slice| &**slice).or_else(|| self.slices.get(key));
            let bytes = keys.flat_map(|key| slice(key).unwrap_or_default().iter().copied()).collect();
            Some(Step::Write(MetaWrite { offset: up(table.host, g.cluster_bits), bytes }))
        });
        copies.collect()
    }

    /// Writes of slices into tables that are not copied as a whole.
    fn slice_writes(&self, tables: &BTreeSet<u64>, slices: &BTreeMap<u64, Box<[u8]>>) -> Vec<Step> {
        let g = &self.geometry;
        let Some(writing) = &self.writing else { return Vec::new() };
        let writes = slices.iter().filter_map(|(&key, bytes)| {
            let at = down(key, g.slices());
            let table = match writing.tables.get(&at).filter(|_| tables.contains(&at)) {
                Some(table) if table.old.is_some() => return None,
                Some(table) => up(table.host, g.cluster_bits),
                None => self.table(up(key, g.slice_entries())).ok()?.0,
            };
            Some(Step::Write(MetaWrite { offset: self.slice_load(key, table).offset, bytes: bytes.to_vec() }))
        });
        writes.collect()
    }

    /// The sectors of the L1 table that name new tables.
    fn l1_writes(&self, tables: &BTreeSet<u64>) -> Vec<Step> {
        let Some(writing) = &self.writing else { return Vec::new() };
        let sectors = tables.iter().map(|table| down(*table, 6)).collect::<BTreeSet<_>>();
        let entry = |at: u64| match writing.tables.get(&at).filter(|_| tables.contains(&at)) {
            Some(table) => up(table.host, self.geometry.cluster_bits) | COPIED,
            None => self.l1.get(index(at)).copied().unwrap_or(0),
        };
        let write = |sector: u64| {
            let entries = up(sector, 6)..up(sector.saturating_add(1), 6);
            let bytes = entries.flat_map(|at| entry(at).to_be_bytes()).collect();
            Step::Write(MetaWrite { offset: self.header.l1_offset.saturating_add(up(sector, 9)), bytes })
        };
        sectors.into_iter().map(write).collect()
    }

    /// The commit under way has been carried out, or (`done` false) a part of it has failed.
    pub(super) fn end_commit(&mut self, done: bool) {
        let g = self.geometry;
        let Some(writing) = &mut self.writing else { return };
        let Some(commit) = writing.commit.take() else { return };
        writing.releasing = false;
        writing.unpin_old(&commit.released);
        if !done {
            writing.poisoned = true;
            return;
        }
        for (key, bytes) in commit.slices {
            self.slices.insert(key, bytes);
        }
        for at in commit.tables {
            let Some(table) = writing.tables.remove(&at) else { continue };
            if let Some(entry) = self.l1.get_mut(index(at)) {
                *entry = up(table.host, g.cluster_bits) | COPIED;
            }
            writing.metadata.add(table.host);
            if let Some(old) = table.old.map(|old| down(old, g.cluster_bits)) {
                writing.free_later(old);
                writing.unpin_old(&[old]);
                let slices = up(at, g.slices())..up(at.saturating_add(1), g.slices());
                slices.for_each(|slice| self.slices.unpin(slice));
            }
        }
        for cluster in commit.clusters {
            let Some(change) = writing.changes.get_mut(&cluster) else { continue };
            let old = std::mem::take(&mut change.old);
            change.state = State::Published;
            if change.writers == 0 {
                writing.changes.remove(&cluster);
            }
            old.iter().for_each(|&host| writing.free_later(host));
            writing.unpin_old(&old);
            self.slices.unpin(down(cluster, g.slice_entries()));
        }
    }
}

impl Writing {
    /// Counts down what is due and known; returns the steps, and the clusters whose counts are to stay in memory meanwhile.
    fn release(&mut self, cluster_bits: u32) -> (Vec<Step>, Vec<u64>) {
        let (mut kept, mut released, mut empty) = (Vec::new(), Vec::new(), Vec::new());
        for cluster in std::mem::take(&mut self.freed) {
            match self.refcounts.get(cluster) {
                Ok(Count::Known(count)) if count > 0 => {
                    self.refcounts.set(cluster, count.saturating_sub(1));
                    released.push(cluster);
                    if count == 1 {
                        empty.push(cluster);
                    }
                }
                Ok(Count::Missing(_)) => kept.push(cluster),
                _ => {
                    log::error!(
                        "cluster {cluster} has no reference left to give up; the image takes no more writes"
                    );
                    self.poisoned = true;
                }
            }
        }
        self.freed = kept;
        for &cluster in &empty {
            self.metadata.remove(cluster);
            self.space.cursor = self.space.cursor.min(cluster);
        }
        let mut steps = self.refcounts.take_writes().into_iter().map(Step::Write).collect::<Vec<_>>();
        empty.sort_unstable();
        let punch = |run: std::ops::Range<u64>| up(run.start, cluster_bits)..up(run.end, cluster_bits);
        steps.extend(runs(empty).into_iter().map(punch).map(Step::Punch));
        (steps, released)
    }
}
