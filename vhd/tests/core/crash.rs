//! A machine that stops at any moment, and a storage that fails.

use format::testing::{Random, Size, crash, faults, seeds};

use crate::support::Shape;

fn shape(random: &mut Random) -> Shape {
    let (block_size, regular) = (random.pick(&[4096, 16384]), random.once_in(2));
    let precise = random.once_in(3);
    Shape { block_size, regular, precise, max_sectors: 1300, ..Shape::default() }
}

#[test]
fn a_stop_at_any_moment_loses_nothing_that_was_flushed() {
    seeds(60, |random| crash(&shape(random), &Size::small(), random));
}

#[test]
fn a_failing_storage_loses_nothing_that_was_answered() {
    seeds(300, |random| faults(&shape(random), &Size::small(), random));
}
