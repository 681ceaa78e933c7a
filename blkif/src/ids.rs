//! The numbers that name things between domains.
//!
//! They live in this crate because all of them are fields of the block protocol: the segment carries a grant
//! reference, the frontend's XenStore directory an event channel and grant references, the backend's path a domain
//! and a virtual device. The device crates (`gntdev`, `evtchn`) and the control plane use the same types, so that a
//! number is never converted on its way from XenStore to an ioctl.

use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// A domain. 0 is dom0; ids from 0x7ff0 on are reserved by Xen and never name a frontend.
    DomId(u16)
}
id! {
    /// A grant reference: index of an entry in the granting domain's grant table.
    GrantRef(u32)
}
id! {
    /// An event channel port, of the domain that the context names.
    Port(u32)
}
id! {
    /// A position on a virtual disk in units of 512 bytes, whatever the disk's logical block size.
    Sector(u64)
}
id! {
    /// A virtual device number, the last component of a VBD's XenStore path (51712 is xvda). Opaque.
    VdevId(u32)
}

/// Bytes in a [`Sector`].
pub const SECTOR_SIZE: u64 = 512;
/// Bytes in a grantable page, also where the guest's own pages are larger.
pub const PAGE_SIZE: usize = 4096;
