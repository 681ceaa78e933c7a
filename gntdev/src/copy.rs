//! The segment of a batched grant copy.
//!
//! [`CopySegment`] has the kernel's own layout (`struct gntdev_grant_copy_segment`, 24 bytes), so that a batch is
//! handed to the ioctl as it stands: nothing is translated or allocated per request.
//!
//! ```text
//!  offset  from the guest          to the guest
//!   0      source: ref u32,        source: pointer u64
//!          offset u16, domid u16
//!   8      dest: pointer u64       dest: ref u32, offset u16, domid u16
//!  16      len u16
//!  18      flags u16: 1            flags u16: 2
//!  20      status i16, written by the kernel
//! ```

use std::ptr::NonNull;

use blkif::ids::PAGE_SIZE;
use zerocopy::{Immutable, IntoBytes};

use crate::{DomId, GrantRef};

/// Which way a batch goes. One batch, one direction: the kernel decides per batch whether the local pages get dirty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyDirection {
    /// From the granted page into local memory (a guest's WRITE).
    FromGuest,
    /// From local memory into the granted page (a guest's READ).
    ToGuest,
}

/// The outcome of one segment, a `GNTST_*` code of Xen's `grant_table.h`. Zero is success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyStatus(pub i16);

impl CopyStatus {
    /// `GNTST_okay`.
    pub const OKAY: CopyStatus = CopyStatus(0);
    /// Not executed yet; no code of Xen's.
    pub const PENDING: CopyStatus = CopyStatus(i16::MAX);

    /// Whether the bytes were copied.
    pub fn is_okay(self) -> bool {
        self == Self::OKAY
    }
}

const FLAG_SOURCE_GREF: u16 = 1;
const FLAG_DEST_GREF: u16 = 2;

/// One contiguous piece of a grant copy: at most one page, and not crossing the granted page's end.
#[derive(Clone, Copy, Debug, Immutable, IntoBytes)]
#[repr(C)]
pub struct CopySegment {
    source: [u8; 8],
    dest: [u8; 8],
    len: u16,
    flags: u16,
    status: i16,
    _pad: u16,
}

/// A piece that does not lie inside one granted page. The kernel would fail the whole batch for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("grant copy of {len} bytes at offset {offset} does not fit a 4096-byte page")]
pub struct OutsidePage {
    /// Byte offset in the granted page.
    pub offset: u16,
    /// Length in bytes.
    pub len: u16,
}

impl CopySegment {
    /// A copy of `len` bytes between offset `offset` of the page `gref` of `dom` and `local`.
    pub fn new(
        direction: CopyDirection,
        dom: DomId,
        gref: GrantRef,
        offset: u16,
        len: u16,
        local: NonNull<u8>,
    ) -> Result<CopySegment, OutsidePage> {
        if len == 0 || usize::from(offset) + usize::from(len) > PAGE_SIZE {
            return Err(OutsidePage { offset, len });
        }
        let [g0, g1, g2, g3] = gref.0.to_ne_bytes();
        let [o0, o1] = offset.to_ne_bytes();
        let [d0, d1] = dom.0.to_ne_bytes();
        let guest = [g0, g1, g2, g3, o0, o1, d0, d1];
        let local = (local.as_ptr().expose_provenance() as u64).to_ne_bytes();
        let (source, dest, flags) = match direction {
            CopyDirection::FromGuest => (guest, local, FLAG_SOURCE_GREF),
            CopyDirection::ToGuest => (local, guest, FLAG_DEST_GREF),
        };
        Ok(CopySegment { source, dest, len, flags, status: CopyStatus::PENDING.0, _pad: 0 })
    }

    /// The outcome; [`CopyStatus::PENDING`] before the batch was run.
    pub fn status(&self) -> CopyStatus {
        CopyStatus(self.status)
    }

    /// Stores the outcome; for implementations of [`crate::Grants`] other than the kernel's.
    pub fn set_status(&mut self, status: CopyStatus) {
        self.status = status.0;
    }

    /// Which way this piece goes.
    pub fn direction(&self) -> CopyDirection {
        if self.flags & FLAG_SOURCE_GREF != 0 { CopyDirection::FromGuest } else { CopyDirection::ToGuest }
    }

    /// The guest's side: domain, grant reference, byte offset in the page.
    pub fn guest(&self) -> (DomId, GrantRef, u16) {
        let [g0, g1, g2, g3, o0, o1, d0, d1] = match self.direction() {
            CopyDirection::FromGuest => self.source,
            CopyDirection::ToGuest => self.dest,
        };
        (
            DomId(u16::from_ne_bytes([d0, d1])),
            GrantRef(u32::from_ne_bytes([g0, g1, g2, g3])),
            u16::from_ne_bytes([o0, o1]),
        )
    }

    /// The address of our side.
    pub fn local(&self) -> u64 {
        u64::from_ne_bytes(match self.direction() {
            CopyDirection::FromGuest => self.dest,
            CopyDirection::ToGuest => self.source,
        })
    }

    /// Length in bytes, 1 to 4096.
    pub fn len(&self) -> u16 {
        self.len
    }

    /// Always false: a segment has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }
}
