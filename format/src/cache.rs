//! Tables of metadata in memory, within a budget.

use std::cell::{Cell, RefCell};
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

/// Recently used tables of an image, by a number that the format gives them. When full, the second-chance rule decides
/// which one makes room: it comes close to least-recently-used and a hit only sets a flag.
///
/// Also keeps count of the reads that are under way, see [`Tables::arrived`].
#[derive(Debug)]
pub struct Tables<T> {
    capacity: usize,
    slots: Vec<Slot<T>>,
    index: HashMap<u64, usize>,
    hand: usize,
    /// Tables asked for and not delivered yet, and how often.
    loads: RefCell<BTreeMap<u64, u32>>,
}

#[derive(Debug)]
struct Slot<T> {
    key: u64,
    table: T,
    used: Cell<bool>,
}

impl<T> Tables<T> {
    /// Room for `capacity` tables; more are held only while none may leave.
    pub fn new(capacity: usize) -> Self {
        Self { capacity, slots: Vec::new(), index: HashMap::new(), hand: 0, loads: RefCell::default() }
    }

    /// A table.
    pub fn get(&self, key: u64) -> Option<&T> {
        let slot = self.slots.get(*self.index.get(&key)?)?;
        slot.used.set(true);
        Some(&slot.table)
    }

    /// A table, without counting as use.
    pub fn peek(&self, key: u64) -> Option<&T> {
        self.slots.get(*self.index.get(&key)?).map(|slot| &slot.table)
    }

    /// A table that is going to be changed.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        self.slots.get_mut(*self.index.get(&key)?).map(|slot| &mut slot.table)
    }

    /// Notes that a read of a table begins. To be answered by [`Tables::arrived`] or [`Tables::failed`].
    pub fn load_began(&self, key: u64) {
        let mut loads = self.loads.borrow_mut();
        let count = loads.entry(key).or_default();
        *count = count.saturating_add(1);
    }

    /// Takes a table that was read. `stays` tells which tables must not leave, because they are going to be changed.
    ///
    /// Several reads of one table may be under way at a time. The first to arrive counts: while others are missing the
    /// table stays in memory, so that they, which may have read before a change, cannot bring back old entries.
    pub fn arrived(&mut self, key: u64, table: T, stays: impl Fn(u64) -> bool) {
        if !self.index.contains_key(&key) {
            self.insert(key, table, stays);
        }
        self.failed(key);
    }

    /// A read of a table has ended without one.
    pub fn failed(&mut self, key: u64) {
        if let Entry::Occupied(mut load) = self.loads.get_mut().entry(key) {
            *load.get_mut() = load.get().saturating_sub(1);
            if *load.get() == 0 {
                load.remove();
            }
        }
    }

    /// Puts in or replaces a table.
    pub fn insert(&mut self, key: u64, table: T, stays: impl Fn(u64) -> bool) {
        let at = match self.index.get(&key) {
            Some(&at) => Some(at),
            None if self.slots.len() < self.capacity => None,
            None => self.victim(stays),
        };
        let slot = Slot { key, table, used: Cell::new(true) };
        let at = match at.and_then(|at| Some((at, self.slots.get_mut(at)?))) {
            Some((at, old)) => {
                self.index.remove(&old.key);
                *old = slot;
                at
            }
            None => {
                self.slots.push(slot);
                self.slots.len().saturating_sub(1)
            }
        };
        self.index.insert(key, at);
    }

    /// A slot whose table may leave, giving each used one a second chance.
    fn victim(&mut self, stays: impl Fn(u64) -> bool) -> Option<usize> {
        let len = self.slots.len();
        for _ in 0..len.saturating_mul(2) {
            let at = self.hand.checked_rem(len)?;
            self.hand = at.saturating_add(1);
            let slot = self.slots.get(at)?;
            if stays(slot.key) || self.loads.borrow().contains_key(&slot.key) {
                continue;
            }
            if !slot.used.replace(false) {
                return Some(at);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(tables: &Tables<u64>) -> Vec<u64> {
        (0..100).filter(|key| tables.index.contains_key(key)).collect()
    }

    #[test]
    fn stays_within_its_capacity() {
        let mut tables = Tables::new(3);
        for key in 0..10 {
            tables.insert(key, key, |_| false);
        }
        assert_eq!((tables.slots.len(), keys(&tables).len()), (3, 3));
    }

    #[test]
    fn used_tables_outlive_unused_ones() {
        let mut tables = Tables::new(3);
        for key in 0..4 {
            tables.insert(key, key, |_| false);
        }
        // The last insertion took the second chance of 1 and 2 away.
        tables.get(1);
        tables.insert(9, 9, |_| false);
        assert_eq!(keys(&tables), [1, 3, 9]);
    }

    #[test]
    fn what_must_stay_stays() {
        let mut tables = Tables::new(2);
        for key in 0..10 {
            tables.insert(key, key, |key| key < 3);
        }
        assert!((0..3).all(|key| tables.get(key) == Some(&key)));
        assert!(tables.slots.len() <= 4);
    }

    #[test]
    fn a_late_arrival_does_not_bring_back_what_was_changed() {
        let mut tables = Tables::new(1);
        tables.load_began(5);
        tables.load_began(5);
        tables.arrived(5, 1, |_| false);
        *tables.get_mut(5).unwrap() = 2;
        tables.insert(6, 0, |_| false);
        assert_eq!(tables.get(5), Some(&2), "the second read is still under way");
        tables.arrived(5, 1, |_| false);
        assert_eq!(tables.get(5), Some(&2));
        tables.insert(7, 0, |_| false);
        tables.insert(8, 0, |_| false);
        assert_eq!(tables.get(5), None);
    }

    #[test]
    fn a_failed_read_holds_nothing() {
        let mut tables = Tables::new(1);
        tables.load_began(5);
        tables.failed(5);
        tables.failed(5);
        tables.insert(5, 1, |_| false);
        tables.insert(6, 1, |_| false);
        assert_eq!(keys(&tables), [6]);
    }
}
