//! The VMDK image format, without I/O.
//!
//! A VMDK is a text, the [descriptor](descriptor::Descriptor), and the extents that it names, which follow one another on the
//! disk. An extent is flat, which is a raw file, or sparse: grains behind a directory and tables, the core [`Sparse`]. The
//! descriptor of a monolithic image lies in its only extent.
//!
//! | type | read | write |
//! |---|---|---|
//! | monolithicSparse, twoGbMaxExtentSparse | yes | yes |
//! | monolithicFlat, twoGbMaxExtentFlat, vmfs | yes | yes |
//! | streamOptimized, and sparse extents of version 3 | yes | `EROFS` |
//! | children (with a parent), vmfsSparse, seSparse, `COWD`, whole devices | `ENOTSUP` | `ENOTSUP` |
//!
//! Sources of the format: VMware "Virtual Disk Format 5.0"; QEMU `block/vmdk.c`.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod check;
mod create;
pub mod descriptor;
mod error;
mod header;
mod open;
mod sparse;
mod write;

pub use create::{NewBytes, NewImage};
pub use error::Error;
pub use header::{Header, is_sparse};
pub use open::{OpenOptions, open};
pub use sparse::Sparse;

/// Bytes of a sector.
const SECTOR: u64 = format::SECTOR_SIZE;
