//! The real programs on a simulated host.

#![expect(clippy::cast_possible_truncation, reason = "positions on small test disks, and seeds of patterns")]

/// The engine that tapdisks are told to use; `None`: the one that they choose.
const ENGINE: Option<&str> = None;

mod caches;
mod control;
mod dirty_log;
mod encrypted;
mod failures;
mod frontends;
mod guest;
mod hostile;
mod hostile_data;
mod hostile_load;
mod hostile_ring;
mod hung;
mod leaks;
mod limits;
mod mirror;
mod nbd;
mod old_formats;
mod own_user;
mod pause;
mod protocol;
mod qcow2;
mod ram;
mod resize;
mod scarcity;
mod scene;
mod snapshot;
mod standby;
mod stats;
mod support;
mod takeover;
mod tls;
