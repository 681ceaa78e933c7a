//! A bounded cache of block bitmaps.

use std::cell::Cell;
use std::collections::HashMap;

use crate::BlockIndex;

/// Bitmaps of recently used blocks. When full, the second-chance rule decides which one makes room: it comes close to
/// least-recently-used and a hit only sets a flag.
#[derive(Debug)]
pub(crate) struct BitmapCache {
    capacity: usize,
    slots: Vec<Slot>,
    index: HashMap<BlockIndex, usize>,
    hand: usize,
}

#[derive(Debug)]
struct Slot {
    block: BlockIndex,
    bits: Box<[u8]>,
    used: Cell<bool>,
}

impl BitmapCache {
    /// An empty cache that holds at most `capacity` bitmaps, and more only while none may leave.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity, slots: Vec::new(), index: HashMap::new(), hand: 0 }
    }

    /// The bitmap of `block`.
    pub(crate) fn get(&self, block: BlockIndex) -> Option<&[u8]> {
        let slot = self.slots.get(*self.index.get(&block)?)?;
        slot.used.set(true);
        Some(&slot.bits)
    }

    /// The bitmap of `block`, without counting as use.
    pub(crate) fn peek(&self, block: BlockIndex) -> Option<&[u8]> {
        self.slots.get(*self.index.get(&block)?).map(|slot| &*slot.bits)
    }

    /// Puts in or replaces the bitmap of `block`. `stays` tells which blocks must not leave.
    pub(crate) fn insert(&mut self, block: BlockIndex, bits: &[u8], stays: impl Fn(BlockIndex) -> bool) {
        let at = match self.index.get(&block) {
            Some(&at) => Some(at),
            None if self.slots.len() < self.capacity => None,
            None => self.victim(stays),
        };
        let slot = Slot { block, bits: bits.into(), used: Cell::new(true) };
        let at = match at.and_then(|at| Some((at, self.slots.get_mut(at)?))) {
            Some((at, old)) => {
                self.index.remove(&old.block);
                *old = slot;
                at
            }
            None => {
                self.slots.push(slot);
                self.slots.len().saturating_sub(1)
            }
        };
        self.index.insert(block, at);
    }

    /// Forgets the bitmap of `block`.
    pub(crate) fn remove(&mut self, block: BlockIndex) {
        let Some(at) = self.index.remove(&block) else { return };
        self.slots.swap_remove(at);
        if let Some(moved) = self.slots.get(at) {
            self.index.insert(moved.block, at);
        }
    }

    /// A slot whose block may leave, giving each used one a second chance.
    fn victim(&mut self, stays: impl Fn(BlockIndex) -> bool) -> Option<usize> {
        let len = self.slots.len();
        for _ in 0..len.saturating_mul(2) {
            let at = self.hand.checked_rem(len)?;
            self.hand = at.saturating_add(1);
            let slot = self.slots.get(at)?;
            if stays(slot.block) {
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

    #[test]
    fn stays_within_its_capacity() {
        let mut cache = BitmapCache::new(3);
        for block in 0..10 {
            cache.insert(block, &[1], |_| false);
        }
        assert_eq!(cache.slots.len(), 3);
        assert_eq!((0..10).filter(|&b| cache.peek(b).is_some()).count(), 3);
    }

    #[test]
    fn used_bitmaps_outlive_unused_ones() {
        let mut cache = BitmapCache::new(3);
        for block in 0..4 {
            cache.insert(block, &[1], |_| false);
        }
        // The last insertion took the second chance of 1 and 2 away.
        cache.get(1);
        cache.insert(9, &[1], |_| false);
        assert!(cache.peek(1).is_some() && cache.peek(2).is_none());
    }

    #[test]
    fn what_must_stay_stays() {
        let mut cache = BitmapCache::new(2);
        for block in 0..10 {
            cache.insert(block, &[1], |b| b < 3);
        }
        assert!((0..3).all(|b| cache.peek(b).is_some()));
        assert!(cache.slots.len() <= 4);
    }

    #[test]
    fn replacing_and_removing_keep_the_index_right() {
        let mut cache = BitmapCache::new(4);
        for block in 0..4 {
            cache.insert(block, &[u8::try_from(block).unwrap()], |_| false);
        }
        cache.insert(2, &[77], |_| false);
        cache.remove(0);
        cache.remove(0);
        assert_eq!(cache.peek(2), Some(&[77][..]));
        assert_eq!(cache.peek(3), Some(&[3][..]));
        assert_eq!(cache.get(0), None);
        assert_eq!(cache.slots.len(), 3);
    }
}
