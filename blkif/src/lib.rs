//! The Xen block interface on the wire.
//!
//! Source of every protocol fact: Xen's public headers `xen/include/public/io/blkif.h` and `ring.h`.
//!
//! | module | holds |
//! |---|---|
//! | [`ids`] | the numbers that name a domain, a grant, an event channel, a sector |
//! | [`abi`] | the two layouts of a ring entry, ring sizes, the `protocol` key |
//! | [`indices`] | the ring's counters and its notification protocol, without any memory access |
//! | [`ring`] | the backend's end of a ring in shared memory |
//! | [`request`] | from the bytes of one entry to a request or a rejection |
//! | [`response`] | the status and the bytes of an answer |
//! | [`encode`] | the frontend's side of the same bytes |
//! | [`keys`], [`state`] | the words both ends exchange in XenStore |
//!
//! The way of a request: [`BackRing::take`] copies one entry out of shared memory, [`request::parse`] judges the
//! copy, [`BackRing::respond`] and [`BackRing::push`] give the answer back. Nothing looks at shared memory twice.

pub mod abi;
pub mod encode;
pub mod ids;
pub mod indices;
pub mod keys;
pub mod request;
pub mod response;
// Under loom the ring's counters run on loom's atomics, which cannot be laid over shared memory.
#[cfg(not(loom))]
pub mod ring;
pub mod state;
mod sync;

pub use abi::{Abi, MAX_INDIRECT_SEGMENTS, RingOrder};
pub use ids::{DomId, GrantRef, Port, Sector, VdevId};
pub use indices::{AttachError, RingBroken};
pub use request::{
    Geometry, RawRequest, Reason, Rejection, Request, RequestKind, Segment, Segments, Transfer,
};
pub use response::{Response, Status};
#[cfg(not(loom))]
pub use ring::BackRing;
pub use state::XenbusState;
