//! The control protocol of tapdisk, and `tap-ctl`, the command line to it.
//!
//! | module | holds |
//! |---|---|
//! | [`proto`] | the messages |
//! | [`frame`] | how messages lie on the socket |
//! | [`dir`] | the runtime folder: sockets, markers, minor numbers |
//! | [`minors`] | allocating, freeing and claiming minor numbers |
//! | [`client`] | a blocking client, for tools and tests |
//! | [`spawn`], [`revive`] | starting a tapdisk, and one that goes on with a dead one's disk |
//! | [`inflight`] | what a disk leaves behind when its tapdisk dies |
//! | [`list`] | what is there |
//! | [`stats`] | statistics as text |
//! | [`survey`] | the statistics of all disks |
//! | [`metrics`] | the same for Prometheus |
//! | [`top`] | the same as a table that renews itself |
//! | [`tls`] | a disk on a TCP port |
//! | [`args`], [`cli`] | the command line: read, carried out |
//! | [`logging`] | where xenio and tapdisk log to |

#![forbid(unsafe_code)]

pub mod args;
pub mod cli;
pub mod client;
mod clients;
pub mod dir;
mod error;
pub mod frame;
pub mod inflight;
pub mod list;
pub mod logging;
pub mod metrics;
pub mod minors;
pub mod proto;
pub mod revive;
pub mod spawn;
pub mod stats;
pub mod survey;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod top;

pub use dir::ControlDir;
pub use error::Error;
pub use proto::{Minor, Reply, Request};
