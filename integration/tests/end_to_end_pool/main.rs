//! The tests of `end_to_end` in which a disk does real work, with tapdisks whose engine is a pool of threads.

#![expect(clippy::cast_possible_truncation, reason = "positions on small test disks, and seeds of patterns")]

/// The engine that tapdisks are told to use.
const ENGINE: Option<&str> = Some("pool");

#[path = "../end_to_end/guest.rs"]
mod guest;
#[path = "../end_to_end/hostile_data.rs"]
mod hostile_data;
#[path = "../end_to_end/pause.rs"]
mod pause;
#[path = "../end_to_end/protocol.rs"]
mod protocol;
#[path = "../end_to_end/resize.rs"]
mod resize;
#[path = "../end_to_end/scene.rs"]
mod scene;
#[path = "../end_to_end/snapshot.rs"]
mod snapshot;
#[path = "../end_to_end/support.rs"]
mod support;
#[path = "../end_to_end/takeover.rs"]
mod takeover;
