//! Grants: access to the pages another domain shares with us.
//!
//! [`Grants`] is the seam between the data plane and the hypervisor: the real one is [`device::GntDev`] over
//! `/dev/xen/gntdev`, the simulated one lives in `integration`. Two ways to reach a guest's page:
//!
//! - **map** it into our address space ([`Grants::map`]): for rings, which live as long as the connection;
//! - **copy** to or from it ([`Grants::copy`]): for data, one call for a whole batch.
//!
//! Guest memory is never a Rust slice or reference: the guest may write any byte at any time. A [`GrantMap`] gives a
//! pointer and a length, and the crates that read through it use atomics or volatile copies only.
//!
//! Facts about the device are from Linux `include/uapi/xen/gntdev.h` and `drivers/xen/gntdev.c`.

pub mod copy;
pub mod device;
pub mod ioctl;

use std::io;
use std::ptr::NonNull;

pub use blkif::{DomId, GrantRef};
pub use copy::{CopyDirection, CopySegment, CopyStatus};

/// What a mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// We only read; also works on grants given read-only.
    ReadOnly,
    /// We read and write; fails on a read-only grant.
    ReadWrite,
}

/// A mapping of one or more granted pages, contiguous in our address space in the order of the references.
///
/// Dropping it unmaps.
pub trait GrantMap {
    /// The first byte of the mapping; page aligned.
    fn as_ptr(&self) -> NonNull<u8>;
    /// Length in bytes: pages × 4096.
    fn len(&self) -> usize;
    /// Whether the mapping has no page at all. Never true for a mapping returned by [`Grants::map`].
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Access to other domains' granted pages.
pub trait Grants {
    /// A live mapping.
    type Map: GrantMap;

    /// Maps `refs` of domain `dom` contiguously.
    ///
    /// All or nothing: if one reference is bad the call fails with `EINVAL` and nothing stays mapped; which one was
    /// bad is not told (a property of gntdev).
    fn map(&self, dom: DomId, refs: &[GrantRef], access: Access) -> io::Result<Self::Map>;

    /// Performs all `segments`, which must all go in `direction`, and stores each one's own [`CopyStatus`].
    ///
    /// On `Err` the whole batch counts as failed, whatever single segments say.
    ///
    /// # Safety
    ///
    /// The local side of every segment must be valid for reads ([`CopyDirection::ToGuest`]) or writes
    /// ([`CopyDirection::FromGuest`]) of the segment's length until the call returns, and nothing else may write
    /// (respectively access) those bytes meanwhile.
    #[expect(unsafe_code, reason = "the contract of the seam; callers are the files that own buffers")]
    unsafe fn copy(&self, direction: CopyDirection, segments: &mut [CopySegment]) -> io::Result<()>;
}
