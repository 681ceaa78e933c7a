//! Closing: what was reserved and not used goes back, and so does what was given up.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use format::{MetaWrite, Step};

use super::geometry::{rest, runs, up};
use super::image::Qcow2;
use super::refcount::{Count, count, set_count};
use super::write::Writing;

impl Qcow2 {
    /// The steps that leave an image as other programs expect it: nothing leaked, the file no longer than needed.
    ///
    /// A flush comes first, so that it is durable that no table names what is given back.
    pub(super) fn resting_steps(&self) -> Vec<Step> {
        let Some(writing) = self.writing.as_deref().filter(|writing| !writing.poisoned) else {
            return Vec::new();
        };
        let bits = self.geometry.cluster_bits;
        let mut slices: BTreeMap<u64, Box<[u8]>> = BTreeMap::new();
        let mut empty = Vec::new();
        for cluster in writing.due() {
            match writing.count_down(cluster, &mut slices) {
                Some(0) => empty.push(cluster),
                Some(_) => {}
                None => log::debug!("cluster {cluster} stays reserved"),
            }
        }
        if slices.is_empty() {
            return vec![Step::Flush];
        }
        let mut steps = writing.space.failed_steps().to_vec();
        steps.push(Step::Flush);
        for (key, bytes) in &slices {
            let first = up(*key, self.geometry.refcount_slice_counts());
            let Ok(block) = writing.refcounts.block(first) else { continue };
            let within = self.geometry.cluster_bits.saturating_sub(self.geometry.refcount_slice_bits());
            let offset = block.saturating_add(up(rest(*key, within), self.geometry.refcount_slice_bits()));
            steps.push(Step::Write(MetaWrite { offset, bytes: bytes.to_vec() }));
        }
        steps.push(Step::Flush);
        let end = writing.end_of_use(&slices);
        empty.sort_unstable();
        let inside = empty.into_iter().filter(|&cluster| !self.regular || cluster < end);
        let punch = |run: std::ops::Range<u64>| Step::Punch(up(run.start, bits)..up(run.end, bits));
        steps.extend(runs(inside).into_iter().map(punch));
        if self.regular && up(end, bits) < self.file_len {
            steps.push(Step::Truncate(up(end, bits)));
        }
        steps.push(Step::Flush);
        steps
    }
}

impl Writing {
    /// Clusters that lose a reference now, once for each.
    fn due(&self) -> impl Iterator<Item = u64> + '_ {
        let tables = self.tables.values().map(|table| table.host);
        self.freed.iter().copied().chain(self.space.unused()).chain(tables)
    }

    /// Counts down in copies of the slices; the new count, `None` if it is not known.
    fn count_down(&self, cluster: u64, slices: &mut BTreeMap<u64, Box<[u8]>>) -> Option<u64> {
        let order = self.refcounts.order();
        let key = self.refcounts.slice_of(cluster);
        let at = cluster.saturating_sub(self.refcounts.first_of(key));
        let slice = match slices.entry(key) {
            Entry::Occupied(slice) => slice.into_mut(),
            Entry::Vacant(place) => place.insert(self.refcounts.cache.get(key)?.into()),
        };
        let now = count(slice, at, order).checked_sub(1)?;
        set_count(slice, at, order, now);
        Some(now)
    }

    /// The first cluster from which on none is in use.
    fn end_of_use(&self, slices: &BTreeMap<u64, Box<[u8]>>) -> u64 {
        let order = self.refcounts.order();
        let mut end = self.space.frontier;
        while let Some(last) = end.checked_sub(1) {
            let key = self.refcounts.slice_of(last);
            let used = match slices.get(&key) {
                Some(slice) => count(slice, last.saturating_sub(self.refcounts.first_of(key)), order) != 0,
                None => self.refcounts.get(last).ok() != Some(Count::Known(0)),
            };
            if used {
                break;
            }
            end = last;
        }
        end
    }
}
