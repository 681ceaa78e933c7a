//! Discarding whole clusters.

use std::cmp::min;

use format::{DiscardPlan, Sector};

use super::Error;
use super::entry::{Cluster, ZERO};
use super::geometry::{down, exp, rest, up};
use super::image::Qcow2;
use super::refcount::Count;
use super::write::{Change, State};

/// What becomes of a cluster.
enum Outcome {
    /// It reads as zeros already, or cannot be made to.
    Stays,
    Changed,
    Load(format::Load),
}

impl Qcow2 {
    /// What to do to discard a prefix of the sectors. Without a backing file a cluster becomes unallocated; with one it is
    /// marked as zeros, for which version 2 has no mark.
    pub(super) fn discard(&mut self, sector: Sector, count: u32) -> Result<DiscardPlan, Error> {
        self.check_range(sector, count)?;
        let bits = self.geometry.sector_bits();
        let unit = exp(bits);
        let into = rest(sector, bits);
        if into != 0 {
            let left = u32::try_from(unit.saturating_sub(into)).unwrap_or(u32::MAX);
            return Ok(DiscardPlan::Skip { count: min(count, left) });
        }
        let end = sector.saturating_add(count.into());
        // The last cluster of the disk may be cut short.
        let whole = if end == self.sectors { end.div_ceil(unit) } else { down(end, bits) };
        let clusters = down(sector, bits)..whole;
        let no_mark = self.geometry.version < 3 && self.header.backing.is_some();
        if clusters.is_empty() || no_mark || !self.is_started()? {
            return Ok(DiscardPlan::Skip { count });
        }
        let counted =
            |clusters: u64| u32::try_from(min(u64::from(count), up(clusters, bits))).unwrap_or(u32::MAX);
        let (table, _) = self.table(clusters.start)?;
        if table == 0 {
            let next =
                up(down(clusters.start, self.geometry.l2_bits()).saturating_add(1), self.geometry.l2_bits());
            return Ok(DiscardPlan::Skip { count: counted(next.saturating_sub(clusters.start)) });
        }
        let in_slice = self.geometry.slice_entries();
        let slice = down(clusters.start, in_slice);
        let mut changed = None;
        let mut done = 0_u64;
        for cluster in clusters.take_while(|&cluster| down(cluster, in_slice) == slice) {
            if self.writing.as_ref().is_some_and(|writing| writing.changes.contains_key(&cluster)) {
                if done == 0 {
                    return Ok(DiscardPlan::Wait);
                }
                break;
            }
            let now = match self.discard_cluster(cluster) {
                Ok(Outcome::Load(load)) if done == 0 => return Ok(DiscardPlan::Load(load)),
                Ok(Outcome::Load(load)) => {
                    // Asked for again when this cluster is the first.
                    self.take_load(&load, None)?;
                    break;
                }
                Ok(Outcome::Stays) => false,
                Ok(Outcome::Changed) => true,
                Err(error) if done == 0 => return Err(error),
                Err(_) => break,
            };
            if changed.is_some_and(|changed| changed != now) && !now {
                break;
            }
            changed = Some(now | changed.unwrap_or(false));
            done = done.saturating_add(1);
        }
        Ok(match changed {
            Some(true) => DiscardPlan::Publish { count: counted(done) },
            _ => DiscardPlan::Skip { count: counted(done) },
        })
    }

    fn is_started(&self) -> Result<bool, Error> {
        let writing = self.writing.as_deref().ok_or(Error::ReadOnly)?;
        if writing.poisoned { Err(Error::Poisoned) } else { Ok(writing.is_started()) }
    }

    fn discard_cluster(&mut self, cluster: u64) -> Result<Outcome, Error> {
        let has_backing = self.header.backing.is_some();
        match self.old_place(cluster)? {
            Err(load) => return Ok(Outcome::Load(load)),
            Ok(Cluster::Zero { host: None }) => return Ok(Outcome::Stays),
            Ok(Cluster::Absent) if !has_backing => return Ok(Outcome::Stays),
            Ok(_) => {}
        }
        if self.table_is_unprepared(cluster) {
            return Ok(Outcome::Stays);
        }
        let (old, freed, table) = match self.replace(cluster)? {
            Ok(found) => found,
            Err(load) => return Ok(Outcome::Load(load)),
        };
        let Some(writing) = &mut self.writing else { return Err(Error::ReadOnly) };
        if let Cluster::Data { host, copied: true } = old {
            let host = down(host, self.geometry.cluster_bits);
            if writing.refcounts.get(host)? != Count::Known(1) {
                writing.poisoned = true;
                return Err(Error::corrupt(
                    "cluster",
                    host,
                    "is marked as unshared, but others refer to it too",
                ));
            }
        }
        if table.is_some() {
            // A discard has no preparation: without a cluster at hand it is left alone.
            match writing.space.take(1, false) {
                Some(run) => self.add_table(cluster, run.start, false)?,
                None => {
                    self.let_go(&freed, table);
                    return Ok(Outcome::Stays);
                }
            }
        }
        let entry = if has_backing { ZERO } else { 0 };
        let change = Change {
            host: None,
            entry,
            old: freed,
            writers: 0,
            exclusive: false,
            barrier: false,
            state: State::Ready,
            unprepared: false,
        };
        self.add_change(cluster, change);
        Ok(Outcome::Changed)
    }
}
