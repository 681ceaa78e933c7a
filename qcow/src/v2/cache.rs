//! Slices of tables in memory.

use std::collections::HashMap;

use format::cache::Tables;

/// Slices of one kind by their number. A slice that is pinned stays.
#[derive(Debug)]
pub(super) struct Cache {
    slices: Tables<Box<[u8]>>,
    pins: HashMap<u64, u32>,
}

impl Cache {
    /// An empty cache for `capacity` slices, and more only while none may leave.
    pub(super) fn new(capacity: usize) -> Self {
        Self { slices: Tables::new(capacity.max(1)), pins: HashMap::new() }
    }

    pub(super) fn get(&self, key: u64) -> Option<&[u8]> {
        self.slices.get(key).map(|slice| &**slice)
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut [u8]> {
        self.slices.get_mut(key).map(|slice| &mut **slice)
    }

    /// Puts in or replaces a slice.
    pub(super) fn insert(&mut self, key: u64, bytes: Box<[u8]>) {
        self.slices.insert(key, bytes, |key| self.pins.contains_key(&key));
    }

    /// Keeps a slice, once more; also one that is not here yet.
    pub(super) fn pin(&mut self, key: u64) {
        let pins = self.pins.entry(key).or_default();
        *pins = pins.saturating_add(1);
    }

    /// Ends one [`Cache::pin`].
    pub(super) fn unpin(&mut self, key: u64) {
        if let Some(pins) = self.pins.get_mut(&key) {
            *pins = pins.saturating_sub(1);
            if *pins == 0 {
                self.pins.remove(&key);
            }
        }
    }

    /// Somebody begins to read a slice from the file.
    pub(super) fn load_began(&self, key: u64) {
        self.slices.load_began(key);
    }

    /// His reading is over. What he brings is taken if nobody was faster.
    pub(super) fn load_ended(&mut self, key: u64, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.slices.arrived(key, bytes.into(), |key| self.pins.contains_key(&key)),
            None => self.slices.failed(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pinned_stays_until_the_last_pin_is_gone() {
        let mut cache = Cache::new(2);
        cache.pin(0);
        cache.pin(0);
        for key in 0..6 {
            cache.insert(key, [1].into());
        }
        cache.unpin(0);
        for key in 6..12 {
            cache.insert(key, [1].into());
        }
        assert!(cache.get(0).is_some());
        cache.unpin(0);
        for key in 12..18 {
            cache.insert(key, [1].into());
        }
        assert!(cache.get(0).is_none());
    }
}
