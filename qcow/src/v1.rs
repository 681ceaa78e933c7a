//! qcow, version 1: an image of clusters behind two levels of tables.
//!
//! The directory (L1) names tables (L2), a table names clusters. What is not named is in the backing file, or reads as
//! zeros. A cluster may be compressed; a whole image may be encrypted. Nothing counts references and nothing is ever freed.
//!
//! Sources of the format: QEMU `block/qcow.c`; Xen `tools/blktap2/drivers/block-qcow.c` and `qcow.h` for the extended header.
//!
//! # What holds on disk at every moment
//! 1. An entry of the directory names a table that is there, an entry of a table a cluster that is there.
//! 2. What is new lies behind everything that was in the file when it was opened.
//!
//! Both follow from the order within a commit: new tables are written, already with their entries, beside the clusters
//! of the guest's data; then everything is made durable; then come the entries that lead to it. A machine that stops in
//! between leaves clusters that nothing names.

pub mod check;
mod create;
mod directory;
mod error;
mod header;
mod image;
mod open;
mod write;

pub use create::{Flavour, NewBytes, NewImage};
pub use error::Error;
pub use header::{Backing, Header, Xen};
pub use image::Qcow;
pub use open::{OpenOptions, open};

/// Bytes of a sector.
const SECTOR: u64 = format::SECTOR_SIZE;
