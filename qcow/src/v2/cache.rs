//! Slices of tables in memory.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// Slices of one kind by their number. When full, the second-chance rule decides which one makes room: it comes close to
/// least recently used, and a hit only sets a flag.
///
/// A slice that is pinned stays, and so does one that somebody else is reading from the file: what he brings may be older
/// than what is here, and the first to arrive counts.
#[derive(Debug)]
pub(super) struct Cache {
    capacity: usize,
    slots: Vec<Slot>,
    index: HashMap<u64, usize>,
    hand: usize,
    pins: HashMap<u64, u32>,
    loads: RefCell<HashMap<u64, u32>>,
}

#[derive(Debug)]
struct Slot {
    key: u64,
    bytes: Box<[u8]>,
    used: Cell<bool>,
}

impl Cache {
    /// An empty cache for `capacity` slices, and more only while none may leave.
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            slots: Vec::new(),
            index: HashMap::new(),
            hand: 0,
            pins: HashMap::new(),
            loads: RefCell::default(),
        }
    }

    pub(super) fn get(&self, key: u64) -> Option<&[u8]> {
        let slot = self.slots.get(*self.index.get(&key)?)?;
        slot.used.set(true);
        Some(&slot.bytes)
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut [u8]> {
        let slot = self.slots.get_mut(*self.index.get(&key)?)?;
        slot.used.set(true);
        Some(&mut slot.bytes)
    }

    /// Puts in or replaces a slice.
    pub(super) fn insert(&mut self, key: u64, bytes: Box<[u8]>) {
        let slot = Slot { key, bytes, used: Cell::new(true) };
        let at = match self.index.get(&key) {
            Some(&at) => Some(at),
            None if self.slots.len() < self.capacity => None,
            None => self.victim(),
        };
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

    /// A slot whose slice may leave, giving each used one a second chance.
    fn victim(&mut self) -> Option<usize> {
        let len = self.slots.len();
        let loads = self.loads.borrow();
        for _ in 0..len.saturating_mul(2) {
            let at = self.hand.checked_rem(len)?;
            self.hand = at.saturating_add(1);
            let slot = self.slots.get(at)?;
            if self.pins.contains_key(&slot.key) || loads.contains_key(&slot.key) {
                continue;
            }
            if !slot.used.replace(false) {
                return Some(at);
            }
        }
        None
    }

    /// Keeps a slice, once more.
    pub(super) fn pin(&mut self, key: u64) {
        let pins = self.pins.entry(key).or_default();
        *pins = pins.saturating_add(1);
    }

    /// Ends one [`Cache::pin`].
    pub(super) fn unpin(&mut self, key: u64) {
        count_down(&mut self.pins, key);
    }

    /// Somebody begins to read a slice from the file.
    pub(super) fn load_began(&self, key: u64) {
        let mut loads = self.loads.borrow_mut();
        let count = loads.entry(key).or_default();
        *count = count.saturating_add(1);
    }

    /// His reading is over. What he brings is taken if nobody was faster.
    pub(super) fn load_ended(&mut self, key: u64, bytes: Option<&[u8]>) {
        if let Some(bytes) = bytes
            && !self.index.contains_key(&key)
        {
            self.insert(key, bytes.into());
        }
        count_down(self.loads.get_mut(), key);
    }
}

fn count_down(counts: &mut HashMap<u64, u32>, key: u64) {
    if let Some(count) = counts.get_mut(&key) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(cache: &Cache) -> Vec<u64> {
        let mut keys = cache.slots.iter().map(|slot| slot.key).collect::<Vec<_>>();
        keys.sort_unstable();
        keys
    }

    #[test]
    fn it_stays_within_its_capacity_and_prefers_what_is_used() {
        let mut cache = Cache::new(3);
        for key in 0..4 {
            cache.insert(key, [1].into());
        }
        cache.get(1);
        cache.insert(9, [1].into());
        assert_eq!(held(&cache), [1, 3, 9]);
    }

    #[test]
    fn what_is_pinned_or_being_read_stays() {
        let mut cache = Cache::new(2);
        cache.insert(0, [1].into());
        cache.insert(1, [1].into());
        cache.pin(0);
        cache.load_began(1);
        for key in 2..6 {
            cache.insert(key, [1].into());
        }
        assert!(cache.get(0).is_some() && cache.get(1).is_some());
        // The late reader does not bring back the past.
        cache.get_mut(1).unwrap()[0] = 7;
        cache.load_ended(1, Some(&[1]));
        assert_eq!(cache.get(1), Some(&[7][..]));
        cache.unpin(0);
        for key in 6..12 {
            cache.insert(key, [1].into());
        }
        assert!(cache.get(0).is_none() && cache.get(1).is_none());
    }
}
