//! Which blocks of a file are being written, for stores whose blocks are larger than a guest's sectors.
//!
//! Writing a part of a block means reading the block, changing it and writing it back. Until that is done nothing else may be
//! written there, or it would be undone. Whole blocks may be written by several at a time, as on any disk. Reading needs no
//! lock: a store reads and writes whole blocks.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

use crate::executor::Scheduler;
use crate::sync::WaitSet;

/// The writes under way in one file.
#[derive(Debug)]
pub struct BlockLocks {
    active: RefCell<Vec<Active>>,
    ended: WaitSet,
    next: Cell<u64>,
}

#[derive(Debug)]
struct Active {
    id: u64,
    range: Range<u64>,
    alone: bool,
}

impl BlockLocks {
    /// Nothing under way.
    pub fn new(scheduler: Rc<Scheduler>) -> BlockLocks {
        BlockLocks { active: RefCell::default(), ended: WaitSet::new(scheduler), next: Cell::new(0) }
    }

    /// Waits until bytes `range` may be written; with `alone`, by nobody else at the same time.
    pub async fn lock(&self, range: Range<u64>, alone: bool) -> BlockLock<'_> {
        while self.active.borrow().iter().any(|other| {
            (alone || other.alone) && other.range.start < range.end && range.start < other.range.end
        }) {
            self.ended.wait().await;
        }
        let id = self.next.get();
        self.next.set(id.wrapping_add(1));
        self.active.borrow_mut().push(Active { id, range, alone });
        BlockLock { locks: self, id }
    }
}

/// A write under way, until it is dropped.
#[derive(Debug)]
#[must_use = "the lock is held until this is dropped"]
pub struct BlockLock<'a> {
    locks: &'a BlockLocks,
    id: u64,
}

impl Drop for BlockLock<'_> {
    fn drop(&mut self) {
        let mut active = self.locks.active.borrow_mut();
        if let Some(at) = active.iter().position(|active| active.id == self.id) {
            active.swap_remove(at);
        }
        drop(active);
        self.locks.ended.wake_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::Executor;

    #[test]
    fn writers_of_parts_exclude_each_other_and_writers_of_whole_blocks_only_those() {
        let scheduler = Rc::new(Scheduler::default());
        let executor = Executor::new(scheduler.clone());
        let locks = Rc::new(BlockLocks::new(scheduler.clone()));
        let gate = Rc::new(WaitSet::new(scheduler));
        let holders = Rc::new(RefCell::new(Vec::new()));
        for (name, range, alone) in [
            ("part", 0..4096, true),
            ("other block", 4096..8192, true),
            ("whole", 0..8192, false),
            ("whole too", 0..4096, false),
            ("part again", 0..4096, true),
        ] {
            let (locks, gate, holders) = (locks.clone(), gate.clone(), holders.clone());
            executor.spawn(async move {
                let lock = locks.lock(range, alone).await;
                holders.borrow_mut().push(name);
                gate.wait().await;
                drop(lock);
            });
        }
        for expected in [&["part", "other block"][..], &["whole", "whole too"], &["part again"]] {
            executor.run_ready();
            assert_eq!(holders.take(), expected);
            gate.wake_all();
        }
        executor.run_ready();
        assert!(locks.active.borrow().is_empty());
    }
}
