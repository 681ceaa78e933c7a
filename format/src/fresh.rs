//! New units of an image, from the choice of their place to the commit that makes them part of it.
//!
//! For formats whose units (clusters, grains) are all alike and are first written whole, by one writer. Then whatever is at
//! their place before does not matter, and neither a parent nor encryption needs a way of its own.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::{Plan, SECTOR_SIZE, Sector, Write};

/// Units that have a place and are not part of the image yet, by their number on the disk.
#[derive(Debug)]
pub struct Fresh {
    sectors: u32,
    units: BTreeMap<u64, Unit>,
}

#[derive(Debug, Clone, Copy)]
struct Unit {
    place: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A writer fills it, and nobody else may touch it.
    Filling,
    /// It is whole.
    Filled,
    /// It is part of the commit under way.
    Committing,
}

impl Fresh {
    /// None, each of so many sectors.
    pub fn new(sectors: u32) -> Self {
        Self { sectors: sectors.max(1), units: BTreeMap::new() }
    }

    /// How to write from `sector` on, if its unit is here: one that is whole is written in place, beside others.
    pub fn plan(&self, sector: Sector, count: u32) -> Option<Plan> {
        let (mut unit, first) = self.position(sector);
        let &Unit { place, state } = self.units.get(&unit)?;
        if state == State::Filling {
            return Some(Plan::Wait);
        }
        let (mut found, mut next) = (self.sectors.saturating_sub(first), place);
        while found < count {
            (unit, next) = (unit.saturating_add(1), next.saturating_add(self.bytes(1)));
            match self.units.get(&unit) {
                Some(unit) if unit.place == next && unit.state != State::Filling => {
                    found = found.saturating_add(self.sectors);
                }
                _ => break,
            }
        }
        Some(in_place(data(place, first), found.min(count), true))
    }

    /// How many units a writer of `count` sectors from `sector` on may claim, all neighbours and none of them here; and
    /// their length in bytes.
    pub fn run(&self, sector: Sector, count: u32) -> (u64, u64) {
        let (unit, first) = self.position(sector);
        let wanted = u64::from(first).saturating_add(count.into()).div_ceil(self.sectors.into());
        let busy = self.units.range(unit..).next().map(|(&busy, _)| busy.saturating_sub(unit));
        let units = busy.map_or(wanted, |busy| wanted.min(busy));
        (units, self.bytes(units))
    }

    /// Claims `units` units, which lie at `place` from now on, for the writer of `count` sectors from `sector` on, and plans
    /// his write: all of them, as far as the disk of `end` sectors goes.
    pub fn claim(&mut self, sector: Sector, count: u32, units: u64, place: u64, end: u64) -> Write {
        let (unit, first) = self.position(sector);
        for i in 0..units {
            let place = place.saturating_add(self.bytes(i));
            self.units.insert(unit.saturating_add(i), Unit { place, state: State::Filling });
        }
        let last = unit.saturating_add(units).saturating_mul(self.sectors.into()).min(end);
        let rest = last.saturating_sub(sector);
        let count = u64::from(count).min(rest);
        Write {
            offset: data(place, first),
            count: u32::try_from(count).unwrap_or(u32::MAX),
            prepare: None,
            copy_before: first,
            copy_after: u32::try_from(rest.saturating_sub(count)).unwrap_or(0),
            publish: true,
        }
    }

    /// A planned write has ended. If it was that of a claim and has failed, the units are forgotten; returns the byte range
    /// that they had.
    pub fn written(&mut self, sector: Sector, count: u32, done: bool) -> Option<Range<u64>> {
        let last = sector.saturating_add(count.max(1).into()).saturating_sub(1);
        let (first, last) = (self.position(sector).0, self.position(last).0);
        let mut lost: Option<Range<u64>> = None;
        let bytes = self.bytes(1);
        for number in first..=last {
            // Others were written beside somebody, or are part of the image by now.
            let Some(unit) = self.units.get_mut(&number).filter(|unit| unit.state == State::Filling) else {
                continue;
            };
            if done {
                unit.state = State::Filled;
            } else {
                let start = lost.as_ref().map_or(unit.place, |lost| lost.start);
                lost = Some(start..unit.place.saturating_add(bytes));
                self.units.remove(&number);
            }
        }
        lost
    }

    /// Takes all that are whole for a commit: their numbers, in ascending order, and places.
    pub fn take(&mut self) -> Vec<(u64, u64)> {
        let filled = self.units.iter_mut().filter(|(_, unit)| unit.state == State::Filled);
        filled
            .map(|(&number, unit)| {
                unit.state = State::Committing;
                (number, unit.place)
            })
            .collect()
    }

    /// A unit is part of the image now.
    pub fn publish(&mut self, unit: u64) {
        self.units.remove(&unit);
    }

    /// True if one of these units is here.
    pub fn touches(&self, units: Range<u64>) -> bool {
        self.units.range(units).next().is_some()
    }

    fn position(&self, sector: Sector) -> (u64, u32) {
        let sectors = u64::from(self.sectors);
        let first = sector.checked_rem(sectors).and_then(|first| u32::try_from(first).ok());
        (sector.checked_div(sectors).unwrap_or(0), first.unwrap_or(0))
    }

    fn bytes(&self, units: u64) -> u64 {
        units.saturating_mul(self.sectors.into()).saturating_mul(SECTOR_SIZE)
    }
}

/// The plan of a write that is not part of a claim.
pub fn in_place(offset: u64, count: u32, publish: bool) -> Plan {
    Plan::Write(Write { offset, count, prepare: None, copy_before: 0, copy_after: 0, publish })
}

fn data(place: u64, first: u32) -> u64 {
    place.saturating_add(u64::from(first).saturating_mul(SECTOR_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(fresh: &mut Fresh, sector: u64, count: u32, place: u64) -> Write {
        let (units, _) = fresh.run(sector, count);
        fresh.claim(sector, count, units, place, 30)
    }

    #[test]
    fn a_claim_covers_whole_units_up_to_the_end_of_the_disk() {
        let mut fresh = Fresh::new(8);
        let write = claim(&mut fresh, 3, 7, 4096);
        assert_eq!((write.offset, write.count), (4096 + 3 * 512, 7));
        assert_eq!((write.copy_before, write.copy_after, write.publish), (3, 6, true));
        let write = claim(&mut fresh, 25, 2, 1 << 20);
        assert_eq!((write.copy_before, write.copy_after), (1, 3));
    }

    #[test]
    fn others_wait_for_the_one_who_fills_and_then_write_beside_him() {
        let mut fresh = Fresh::new(8);
        claim(&mut fresh, 8, 16, 4096);
        assert_eq!(fresh.plan(15, 4), Some(Plan::Wait));
        assert_eq!(fresh.plan(7, 4), None);
        assert_eq!(fresh.run(2, 20).0, 1, "up to the unit that is taken");
        assert_eq!(fresh.written(8, 16, true), None);
        assert_eq!(fresh.plan(15, 4), Some(in_place(4096 + 7 * 512, 4, true)));
        assert_eq!(fresh.plan(15, 40), Some(in_place(4096 + 7 * 512, 9, true)));
        assert_eq!(fresh.take(), [(1, 4096), (2, 8192)]);
        assert_eq!(fresh.take(), []);
        assert!(fresh.touches(2..3));
        fresh.publish(1);
        fresh.publish(2);
        assert!(!fresh.touches(0..99));
    }

    #[test]
    fn a_claim_that_fails_gives_its_place_back_and_a_write_beside_it_does_not() {
        let mut fresh = Fresh::new(8);
        claim(&mut fresh, 8, 16, 4096);
        assert_eq!(fresh.written(8, 16, false), Some(4096..12288));
        claim(&mut fresh, 8, 16, 4096);
        fresh.written(8, 16, true);
        assert_eq!(fresh.written(9, 1, false), None);
        assert_eq!(fresh.take().len(), 2);
    }
}
