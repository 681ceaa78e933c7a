//! The image format qcow2, versions 2 and 3, without I/O. Source of the format: QEMU's docs/interop/qcow2.txt.
//!
//! # What is served
//! Clusters of 512 bytes to 2 MiB, reference counts of 1 to 64 bits, backing files (named by [`Backing`], never opened here), zero
//! clusters, compressed clusters (deflate and Zstandard), internal snapshots (their clusters are left alone), lazy reference
//! counts. Read only: subclusters, AES. Refused by name: LUKS, data files, unknown incompatible features.
//!
//! # Durability
//! A stop at any moment leaves an image whose tables are right and in which, at worst, clusters are leaked. How that is had
//! at the price of few flushes:
//! - clusters are reserved many at a time (`space.rs`): counted, there, zeros, and all that durably, before any of them
//!   is used;
//! - so a new cluster can be named by a table in any order with its data, unless it replaces something other than zeros, and
//!   only then a commit begins with a flush (`commit.rs`);
//! - reference counts go down only after it is durable that nobody refers there, many at a time too.
//!
//! A random write to a new cluster of an image without a backing file thus costs its data, one slice of a table that it
//! shares with all writers of the same moment, and no flush.
//!
//! # Memory
//! The L1 table: 16 KiB for each TiB with clusters of 64 KiB. Slices of L2 tables: 128 MiB for each TiB that is in use, at most
//! [`OpenOptions::cache`]. Reference counts: at most 4 MiB, and their table, 4 KiB for each TiB.

mod cache;
mod check;
mod close;
mod commit;
mod create;
mod discard;
mod entry;
mod error;
mod geometry;
mod header;
mod image;
mod implement;
mod metadata;
mod open;
mod refcount;
mod resize;
mod scan;
mod snapshot;
mod space;
mod unpack;
mod write;

pub use check::{Report, check, repair};
pub use create::{NewBytes, NewImage};
pub use error::Error;
pub use header::{Backing, Compression};
pub use image::Qcow2;
pub use open::{DEFAULT_CACHE, DEFAULT_RESERVE, OpenOptions, open};
pub use snapshot::Snapshot;
