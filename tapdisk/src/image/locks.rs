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
    /// Those who hold a lock and those who wait for one, in the order in which they came.
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
        let id = self.next.get();
        self.next.set(id.wrapping_add(1));
        self.active.borrow_mut().push(Active { id, range, alone });
        // From now on it gives its place up when it is dropped, be that while it waits.
        let lock = BlockLock { locks: self, id };
        while self.must_wait(id) {
            self.ended.wait().await;
        }
        lock
    }

    /// Whether nobody holds a lock, nor waits for one.
    #[cfg(test)]
    pub fn is_idle(&self) -> bool {
        self.active.borrow().is_empty()
    }

    /// Whether somebody came before who must end first.
    fn must_wait(&self, id: u64) -> bool {
        let active = self.active.borrow();
        let Some(at) = active.iter().position(|active| active.id == id) else { return false };
        let (before, [own, ..]) = active.split_at(at) else { return false };
        before.iter().any(|other| {
            (own.alone || other.alone)
                && other.range.start < own.range.end
                && own.range.start < other.range.end
        })
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
            active.remove(at);
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
    fn one_of_a_large_part_is_not_overtaken_by_those_who_come_later() {
        let scheduler = Rc::new(Scheduler::default());
        let executor = Executor::new(scheduler.clone());
        let locks = Rc::new(BlockLocks::new(scheduler.clone()));
        let gate = Rc::new(WaitSet::new(scheduler));
        let order = Rc::new(RefCell::new(Vec::new()));
        for (name, range) in
            [("first", 0..512), ("large", 0..4096), ("later", 512..1024), ("beside", 4096..4608)]
        {
            let (locks, gate, order) = (locks.clone(), gate.clone(), order.clone());
            executor.spawn(async move {
                let _lock = locks.lock(range, true).await;
                order.borrow_mut().push(name);
                gate.wait().await;
            });
        }
        for expected in [&["first", "beside"][..], &["large"], &["later"]] {
            executor.run_ready();
            assert_eq!(order.take(), expected);
            gate.wake_all();
        }
    }

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
