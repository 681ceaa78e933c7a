//! The VHD image format, without I/O.
//!
//! [`Vhd`] is the state of an open image, and a [`format::Format`]: it never touches a file.
//!
//! Sources of the format: Microsoft "Virtual Hard Disk Image Format Specification" 1.0, and XenServer's libvhd
//! (xapi-project/blktap, `include/vhd.h`) for its extensions: batmap, hidden flag, raw parents, poison cookie.

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

use zerocopy::{FromBytes, FromZeros, IntoBytes};

mod alloc;
pub mod bat;
pub mod batmap;
pub mod bitmap;
mod cache;
pub mod chain;
pub mod check;
mod close;
pub mod create;
pub mod enlarge;
mod error;
pub mod footer;
pub mod geometry;
pub mod header;
mod image;
mod implement;
pub mod journal;
pub mod key;
pub mod locator;
mod open;
pub mod print;
pub mod relink;
pub mod repair;
mod resize;
pub mod time;
pub mod transfer;
pub mod util;
mod uuid;
mod write;

pub use create::{NewBytes, NewImage, NewParent};
pub use error::Error;
pub use footer::DiskType;
pub use image::{ParentRef, Vhd};
pub use key::{Key, KeyHash};
pub use locator::ParentName;
pub use open::{MAX_DISK_SIZE, OpenOptions};
pub use uuid::Uuid;

use format::{SECTOR_SIZE, Sector};
/// Number of a block of the virtual disk, from 0.
pub type BlockIndex = u32;

/// A structure of the first of `bytes`; missing ones become zeros.
fn from_prefix<T: FromZeros + FromBytes + IntoBytes>(bytes: &[u8]) -> T {
    let mut value = T::new_zeroed();
    for (to, from) in value.as_mut_bytes().iter_mut().zip(bytes) {
        *to = *from;
    }
    value
}

/// One's complement of the sum of all bytes, as footers and headers carry it.
fn checksum(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(0_u32, |sum, &byte| sum.wrapping_add(byte.into()))
}
