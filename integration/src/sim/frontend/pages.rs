//! The pages that a frontend's data lies in, and their grants.
//!
//! As Linux's `xen-blkfront` does it (`blkif_completion`): when a request is answered, the grant of each of its pages ends, unless the
//! backend still has the page mapped. With persistent grants such a page keeps its grant and is used first the next time; without
//! them a page still mapped is the backend's mistake.

use std::collections::VecDeque;
use std::io;

use blkif::{DomId, GrantRef};
use gntdev::Access;

use crate::sim::domain::{Frame, SimDomain};

/// A page and the grant that the backend reaches it through.
pub type Granted = (Frame, GrantRef);

/// The free pages of one queue.
#[derive(Debug)]
pub struct Pages {
    backend: DomId,
    persistent: bool,
    /// Those that the backend has mapped come first.
    free: VecDeque<(Frame, Option<GrantRef>)>,
}

impl Pages {
    /// Pages to be granted to `backend`.
    pub fn new(backend: DomId, persistent: bool) -> Pages {
        Pages { backend, persistent, free: VecDeque::new() }
    }

    /// A page for a request that needs no more than `access`. A persistent grant allows everything: it comes back for any request.
    pub fn take(&mut self, domain: &mut SimDomain, access: Access) -> Granted {
        let (frame, gref) = self.free.pop_front().unwrap_or_else(|| (domain.allocate(1), None));
        let access = if self.persistent { Access::ReadWrite } else { access };
        (frame, gref.unwrap_or_else(|| domain.grant(frame, self.backend, access)))
    }

    /// Takes the page of an answered request back.
    ///
    /// # Errors
    ///
    /// The backend has it mapped, although grants are not persistent.
    pub fn give(&mut self, domain: &mut SimDomain, (frame, gref): Granted) -> io::Result<()> {
        if domain.mappings(gref) == 0 {
            domain.revoke(gref);
            self.free.push_back((frame, None));
        } else if self.persistent {
            self.free.push_front((frame, Some(gref)));
        } else {
            return Err(io::Error::other(format!("grant {gref} is mapped after its request was answered")));
        }
        Ok(())
    }

    /// Ends all grants and gives the pages back to the domain.
    pub fn dissolve(&mut self, domain: &mut SimDomain) {
        for (frame, gref) in self.free.drain(..) {
            if let Some(gref) = gref {
                domain.revoke(gref);
            }
            domain.free(frame, 1);
        }
    }
}
