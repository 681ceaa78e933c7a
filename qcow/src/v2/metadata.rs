//! Which clusters of the file hold metadata: no data may ever be written there, whatever a damaged table says.

use std::collections::HashSet;
use std::ops::Range;

use super::entry;
use super::geometry::{Geometry, down};
use super::header::Header;
use super::snapshot::Snapshot;

#[derive(Debug, Default)]
pub(super) struct Metadata {
    /// Header, L1 tables, refcount table, snapshot table: ranges of clusters.
    ranges: Vec<Range<u64>>,
    /// L2 tables and refcount blocks.
    single: HashSet<u64>,
}

impl Metadata {
    /// What the tables of an image that was just opened tell of.
    pub(super) fn new(
        header: &Header,
        l1: &[u64],
        refcount_table: &[u64],
        snapshots: &[Snapshot],
        snapshot_bytes: u64,
    ) -> Self {
        let g = &header.geometry;
        let mut metadata = Self::default();
        metadata.add_range(0, 1, g);
        metadata.add_range(header.l1_offset, header.l1_entries.saturating_mul(8), g);
        metadata.add_range(header.refcount_table, header.refcount_table_bytes(), g);
        metadata.add_range(header.snapshot_table, snapshot_bytes, g);
        for snapshot in snapshots {
            metadata.add_range(snapshot.l1_offset, snapshot.l1_entries.saturating_mul(8), g);
        }
        let tables = l1.iter().filter_map(|&entry| entry::l1(entry, g).ok()).map(|(offset, _)| offset);
        let all = tables.chain(refcount_table.iter().copied()).filter(|&offset| offset != 0);
        metadata.single.extend(all.map(|offset| down(offset, g.cluster_bits)));
        metadata
    }

    /// Adds a table at a byte offset.
    pub(super) fn add_range(&mut self, offset: u64, len: u64, geometry: &Geometry) {
        if len > 0 {
            self.ranges.push(clusters(offset, len, geometry));
        }
    }

    /// Takes out what was added with the same numbers.
    pub(super) fn remove_range(&mut self, offset: u64, len: u64, geometry: &Geometry) {
        let gone = clusters(offset, len, geometry);
        self.ranges.retain(|range| *range != gone);
    }

    pub(super) fn add(&mut self, cluster: u64) {
        self.single.insert(cluster);
    }

    pub(super) fn remove(&mut self, cluster: u64) {
        self.single.remove(&cluster);
    }

    /// True if a cluster holds metadata.
    pub(super) fn contains(&self, cluster: u64) -> bool {
        self.single.contains(&cluster) || self.ranges.iter().any(|range| range.contains(&cluster))
    }
}

/// The clusters of some bytes.
pub(super) fn clusters(offset: u64, len: u64, geometry: &Geometry) -> Range<u64> {
    let last = offset.saturating_add(len.saturating_sub(1));
    down(offset, geometry.cluster_bits)..down(last, geometry.cluster_bits).saturating_add(1)
}
