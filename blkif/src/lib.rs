//! The Xen block interface on the wire.
//!
//! Source of every protocol fact: Xen's public headers `xen/include/public/io/blkif.h` and `ring.h`.
//!
//! | module | holds |
//! |---|---|
//! | [`ids`] | the numbers that name a domain, a grant, an event channel, a sector |

pub mod ids;

pub use ids::{DomId, GrantRef, Port, Sector, VdevId};
