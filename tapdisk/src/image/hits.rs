//! Which image of a chain served how much. Counted where a request is on its way already, without anything shared.

use std::cell::Cell;

use tap_ctl::proto::ReadWrite;

use crate::io::Direction;

/// What one image has served, in sectors.
#[derive(Debug, Default)]
pub(super) struct Hits {
    read: Cell<u64>,
    write: Cell<u64>,
}

impl Hits {
    /// It serves so many sectors more.
    pub(super) fn add(&self, direction: Direction, sectors: u32) {
        let count = match direction {
            Direction::Read => &self.read,
            Direction::Write => &self.write,
        };
        count.set(count.get() + u64::from(sectors));
    }

    /// The numbers.
    pub(super) fn get(&self) -> ReadWrite {
        ReadWrite { read: self.read.get(), write: self.write.get() }
    }
}
