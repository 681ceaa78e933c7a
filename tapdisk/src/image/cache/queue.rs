//! Which entries a cache keeps.
//!
//! New entries go through a small queue first: those that are not asked for again before they leave it, as the ones of a scan,
//! never push out any of the main queue. An entry that comes back soon after it had to leave goes to the main queue at
//! once; so its keys are remembered for a while. In the main queue an entry that was asked for gets another round. (The scheme is
//! known as S3-FIFO: Yang and others, "FIFO queues are all you need for cache eviction", SOSP 2023.)

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::Hash;

/// One in so many entries may be in the small queue.
const SMALL: usize = 10;

/// Rounds that an entry of the main queue can earn.
const ROUNDS: u8 = 3;

/// A bounded map.
#[derive(Debug)]
pub struct Queue<K, V> {
    most: usize,
    entries: HashMap<K, Entry<V>>,
    small: VecDeque<K>,
    main: VecDeque<K>,
    /// Those that had to leave the small queue, the latest last.
    left: VecDeque<K>,
    remembered: HashSet<K>,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    /// How often it was asked for since its last round, up to [`ROUNDS`].
    asked: u8,
}

impl<K: Hash + Eq + Copy, V: Clone> Queue<K, V> {
    /// A map of `most` entries, at least 1.
    pub fn new(most: usize) -> Queue<K, V> {
        Queue {
            most: most.max(1),
            entries: HashMap::new(),
            small: VecDeque::new(),
            main: VecDeque::new(),
            left: VecDeque::new(),
            remembered: HashSet::new(),
        }
    }

    /// The value of a key.
    pub fn get(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.get_mut(key)?;
        entry.asked = ROUNDS.min(entry.asked + 1);
        Some(entry.value.clone())
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.values().map(|entry| &entry.value)
    }

    /// Puts an entry in, and others out if there are too many.
    pub fn insert(&mut self, key: K, value: V) {
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.value = value;
            return;
        }
        while self.entries.len() >= self.most {
            self.make_room();
        }
        let queue = if self.remembered.contains(&key) { &mut self.main } else { &mut self.small };
        queue.push_back(key);
        self.entries.insert(key, Entry { value, asked: 0 });
    }

    /// Takes one step towards room for one more.
    fn make_room(&mut self) {
        if self.main.is_empty() || self.small.len() * SMALL > self.most {
            let Some(key) = self.small.pop_front() else { return };
            match self.entries.get_mut(&key) {
                Some(entry) if entry.asked > 0 => {
                    entry.asked = 0;
                    self.main.push_back(key);
                }
                _ => {
                    self.entries.remove(&key);
                    self.remember(key);
                }
            }
        } else if let Some(key) = self.main.pop_front() {
            match self.entries.get_mut(&key) {
                Some(entry) if entry.asked > 0 => {
                    entry.asked -= 1;
                    self.main.push_back(key);
                }
                _ => {
                    self.entries.remove(&key);
                }
            }
        }
    }

    fn remember(&mut self, key: K) {
        if self.remembered.insert(key) {
            self.left.push_back(key);
        }
        while self.left.len() > self.most {
            if let Some(oldest) = self.left.pop_front() {
                self.remembered.remove(&oldest);
            }
        }
    }

    /// Forgets the entries that `keep` does not name.
    pub fn retain(&mut self, keep: impl Fn(&K) -> bool) {
        self.entries.retain(|key, _| keep(key));
        self.remembered.retain(&keep);
        for queue in [&mut self.small, &mut self.main, &mut self.left] {
            queue.retain(&keep);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(most: usize, keys: impl Iterator<Item = u32>) -> Queue<u32, u32> {
        let mut queue = Queue::new(most);
        for key in keys {
            if queue.get(&key).is_none() {
                queue.insert(key, key);
            }
        }
        queue
    }

    #[test]
    fn a_scan_leaves_what_is_asked_for_again_and_again() {
        let mut queue = filled(100, (0..50).chain(0..50));
        for key in 1000..5000 {
            queue.insert(key, key);
        }
        assert!((0..50).all(|key| queue.get(&key) == Some(key)));
        assert_eq!(queue.entries.len(), 100);
    }

    #[test]
    fn what_comes_back_soon_after_it_had_to_leave_stays() {
        let mut queue = filled(100, 0..150);
        let gone: Vec<u32> = (0..50).filter(|key| queue.get(key).is_none()).collect();
        assert!(!gone.is_empty());
        for &key in &gone {
            queue.insert(key, key);
        }
        (1000..1200).for_each(|key| queue.insert(key, key));
        let kept = gone.iter().filter(|key| queue.get(key).is_some()).count();
        assert!(kept * 2 > gone.len(), "{kept} of {}", gone.len());
    }

    #[test]
    fn it_never_holds_more_than_it_may_and_answers_only_what_was_put_in() {
        for most in [1, 2, 7, 64] {
            format::testing::seeds(20, |random| {
                let mut queue = Queue::new(most);
                let mut put = HashMap::new();
                for step in 0..2000_u32 {
                    let key = random.up_to(200);
                    match random.below(20) {
                        0 => {
                            queue.retain(|other| other % 7 != key % 7);
                            put.retain(|other, _| other % 7 != key % 7);
                        }
                        1..8 => {
                            queue.insert(key, step);
                            put.insert(key, step);
                        }
                        _ => assert!(queue.get(&key).is_none_or(|value| put.get(&key) == Some(&value))),
                    }
                    assert!(queue.entries.len() <= most && queue.left.len() <= most);
                    assert_eq!(queue.small.len() + queue.main.len(), queue.entries.len());
                    assert_eq!(queue.left.len(), queue.remembered.len());
                }
            });
        }
    }
}
