//! A ring and the mapping under it, kept together.
//!
//! Invariant: the mapping outlives the ring that points into it (fields drop in the order of their declaration).
#![expect(unsafe_code, reason = "attaches a ring to mapped memory")]

use std::fmt;

use blkif::{Abi, AttachError, BackRing, RingOrder};
use gntdev::GrantMap;

/// A frontend's shared ring, mapped.
pub struct MappedRing<M> {
    ring: BackRing,
    _map: M,
}

impl<M> fmt::Debug for MappedRing<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedRing").field("ring", &self.ring).finish_non_exhaustive()
    }
}

impl<M: GrantMap> MappedRing<M> {
    /// Attaches to the ring in `map`, which must be exactly as long as `order` says.
    pub fn attach(map: M, abi: Abi, order: RingOrder) -> Result<MappedRing<M>, AttachError> {
        assert_eq!(map.len(), order.bytes(), "the mapping was made for this order");
        // SAFETY: the mapping is valid for its whole length until it is dropped, which is after the ring (invariant);
        // it is shared with the guest, which BackRing expects.
        let ring = unsafe { BackRing::attach(map.as_ptr(), abi, order) }?;
        Ok(MappedRing { ring, _map: map })
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut BackRing {
        &mut self.ring
    }
}
