//! The checks that every format passes.

use format::testing::{Random, Size, crash, faults, model, seeds};

use crate::support::Shape;
use qcow::v2;

/// The shapes that differ in what the core does with them.
fn shape(random: &mut Random) -> Shape {
    let cluster_bits = random.pick(&[9, 9, 10, 12, 13]);
    // Little, so that it is often used up, and what is freed is soon given to others.
    let reserve = random.pick(&[0, 0, v2::DEFAULT_RESERVE]);
    let shape = Shape { cluster_bits, reserve, ..Shape::default() };
    match random.below(7) {
        0 => Shape { version: 2, ..shape },
        1 => Shape { refcount_bits: random.pick(&[1, 2, 4, 8]), ..shape },
        2 => Shape { refcount_bits: random.pick(&[32, 64]), ..shape },
        3 => Shape { device: Some(6 << 20), ..shape },
        4 => Shape { preallocate: true, ..shape },
        _ => shape,
    }
}

#[test]
fn a_chain_behaves_like_a_vector_of_bytes() {
    seeds(200, |random| model(&shape(random), &Size::small(), random));
}

#[test]
fn a_stop_at_any_moment_loses_nothing_that_was_flushed() {
    seeds(60, |random| crash(&Shape { may_leak: true, ..shape(random) }, &Size::small(), random));
}

#[test]
fn a_failing_storage_loses_nothing_that_was_answered() {
    seeds(200, |random| faults(&Shape { may_leak: true, ..shape(random) }, &Size::small(), random));
}
