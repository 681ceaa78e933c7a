//! What the tests of every format are made of.
//!
//! A format tells what is its own by [`Subject`] (how to create, open and check an image); the rest is here:
//!
//! ```ignore
//! struct Mine;                                     // or a struct of parameters: cluster size and so on
//! impl Subject for Mine { type Core = Core; ... }
//!
//! #[test]
//! fn it_behaves_like_a_vector_of_bytes() {
//!     seeds(200, |random| model(&Mine, &Size::small(), random));
//! }
//! #[test]
//! fn a_stop_at_any_moment_loses_nothing_that_was_flushed() {
//!     seeds(60, |random| crash(&Mine, &Size::small(), random));
//! }
//! #[test]
//! fn a_failing_storage_loses_nothing_that_was_answered() {
//!     seeds(200, |random| faults(&Mine, &Size::small(), random));
//! }
//! ```
//!
//! | part | what |
//! |---|---|
//! | [`Random`], [`seeds`] | seeded numbers; a failing seed is named when the test fails, and `SEED=n` runs only that one |
//! | [`Memory`] | a [`Storage`](crate::blocking::Storage) in memory with a log of all changes and injected failures |
//! | [`Turns`] | an image on a `Memory` with its parents; several writers, discards and commits take turns at random |
//! | [`crash_states`] | every state that a stop could have left: prefixes, and within a flush epoch subsets, orders, torn sectors |
//! | [`model`], [`crash`], [`faults`] | the checks above |
//! | [`fuzz_for`], [`mutate`], [`exercise`] | malformed images, made of good ones by chance |
//! | [`stamp`], [`stamped`] | contents of sectors that tell whose they are |
//!
//! Everything here panics where something is not as it must be: that is how a test fails.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::missing_panics_doc,
    reason = "only tests use it, and they fail by panicking"
)]

mod checks;
mod crash;
mod fuzz;
mod memory;
mod random;
mod turns;

pub use checks::{Allowed, History, Size, crash, faults, jobs, model};
pub use crash::crash_states;
pub use fuzz::{exercise, fuzz_for, mutate};
pub use memory::{Fault, Memory, Op};
pub use random::{Random, seeds};
pub use turns::{Failure, Job, Parent, Turns, apart};

use crate::{Format, Sector};

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// What the generic checks must know of a format. Whatever fails panics.
pub trait Subject {
    /// The core.
    type Core: Format + 'static;

    /// A storage with a new image that reads as zeros, or, if it has a parent, as that. `number` is another one for each
    /// image of a chain (to make an identifier or a name of it). The checks begin with an empty log.
    fn create(&self, sectors: u64, number: u8, parent: Option<&Turns<Self::Core>>) -> Memory;

    /// Opens the image.
    fn open(&self, storage: &Memory, writable: bool) -> Self::Core;

    /// Checks the image by all that its format promises. `resting` is false after a stop at any moment: what the format
    /// allows then (leaked room, an unclean mark, an old footer) is in order.
    fn check(&self, storage: &Memory, resting: bool);

    /// Whether images can have parents.
    fn has_parents(&self) -> bool {
        true
    }

    /// Sectors that a disk created with so many can grow to; the same number if it cannot grow.
    fn grows_to(&self, sectors: u64) -> u64 {
        sectors
    }
}

/// What a test writes to a sector: its number, and `value` in all other bytes. The value 0 makes it zeros.
pub fn stamp(sector: Sector, value: u8) -> [u8; SECTOR] {
    let mut bytes = [value; SECTOR];
    if value != 0 {
        bytes[..8].copy_from_slice(&sector.to_le_bytes());
    }
    bytes
}

/// Stamps for several sectors.
pub fn stamps(sector: Sector, count: u64, value: u8) -> Vec<u8> {
    (sector..sector + count).flat_map(|sector| stamp(sector, value)).collect()
}

/// The value of a sector's stamp; `None` if it is torn, of another sector, or no stamp at all.
pub fn stamped(sector: Sector, bytes: &[u8]) -> Option<u8> {
    let value = *bytes.last()?;
    (bytes == stamp(sector, value)).then_some(value)
}
