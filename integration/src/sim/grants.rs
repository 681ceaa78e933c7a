//! Simulated grants: the memory of simulated domains behind the same trait as `/dev/xen/gntdev`.
//!
//! # Invariants of this file
//!
//! - A [`SimMapping`] owns one contiguous range of addresses, reserved once and unmapped once. Pages of domains are put
//!   into that range only, by `MAP_FIXED`.
//! - A copy touches, on the domain's side, one page that a valid grant names, and on ours what the caller of
//!   [`Grants::copy`] promised to be valid.
#![expect(unsafe_code, reason = "maps pages and copies between them; see the invariants above")]

use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::rc::Rc;

use blkif::ids::PAGE_SIZE;
use gntdev::{Access, CopyDirection, CopySegment, CopyStatus, DomId, GrantMap, GrantRef, Grants};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::calls::{Call, Calls};
use super::domain::{DomainMemory, GrantFault};

// Codes of Xen's `grant_table.h`.
const GENERAL_ERROR: CopyStatus = CopyStatus(-1);
const BAD_DOMAIN: CopyStatus = CopyStatus(-2);
const BAD_GNTREF: CopyStatus = CopyStatus(-3);
const BAD_PAGE: CopyStatus = CopyStatus(-9);
const NO_SPACE: CopyStatus = CopyStatus(-13);

/// An open simulated grant device.
#[derive(Debug)]
pub struct SimGrants {
    dir: PathBuf,
    own: DomId,
    domains: RefCell<HashMap<DomId, Rc<DomainMemory>>>,
    calls: Rc<Calls>,
}

impl SimGrants {
    /// Opens the device of domain `own` in the simulated hypervisor's folder.
    pub fn open(dir: &Path, own: DomId) -> io::Result<SimGrants> {
        let calls = Rc::new(Calls::open(dir, own)?);
        Ok(SimGrants { dir: dir.to_owned(), own, domains: RefCell::default(), calls })
    }

    /// The memory of a living domain.
    fn domain(&self, dom: DomId) -> Option<Rc<DomainMemory>> {
        let mut domains = self.domains.borrow_mut();
        if let Some(known) = domains.get(&dom).filter(|known| known.is_alive()) {
            return Some(Rc::clone(known));
        }
        // A number may come back with another domain behind it.
        domains.remove(&dom);
        let opened = Rc::new(DomainMemory::open(&self.dir, dom).ok().filter(DomainMemory::is_alive)?);
        domains.insert(dom, Rc::clone(&opened));
        Some(opened)
    }

    fn copy_one(&self, segment: &CopySegment) -> CopyStatus {
        let (dom, gref, offset) = segment.guest();
        let Some(domain) = self.domain(dom) else { return BAD_DOMAIN };
        if domain.refusal().copies {
            return NO_SPACE;
        }
        let access = match segment.direction() {
            CopyDirection::FromGuest => Access::ReadOnly,
            CopyDirection::ToGuest => Access::ReadWrite,
        };
        let page = match domain.granted_page(gref, self.own, access) {
            Ok(page) => page,
            Err(GrantFault::BadReference) => return BAD_GNTREF,
            Err(GrantFault::Denied) => return GENERAL_ERROR,
            Err(GrantFault::BadFrame) => return BAD_PAGE,
        };
        let len = usize::from(segment.len());
        let guest = domain.memory().at(page + usize::from(offset), len);
        // The segment exposed the provenance of its local side when it was made.
        let local = usize::try_from(segment.local()).ok().map(ptr::with_exposed_provenance_mut);
        let Some(local) = local.and_then(NonNull::new) else { return GENERAL_ERROR };
        match segment.direction() {
            // SAFETY: both sides are valid for `len` bytes: the guest's page is mapped, the local side is promised by
            // the caller of `Grants::copy`. A caller's buffer is never part of a domain's mapping.
            CopyDirection::FromGuest => unsafe { guest.copy_to_nonoverlapping(local, len) },
            // SAFETY: as above.
            CopyDirection::ToGuest => unsafe { local.copy_to_nonoverlapping(guest, len) },
        }
        CopyStatus::OKAY
    }
}

impl Grants for SimGrants {
    type Map = SimMapping;

    fn map(&self, dom: DomId, refs: &[GrantRef], access: Access) -> io::Result<SimMapping> {
        self.calls.count(Call::Map);
        let domain = self.domain(dom).filter(|domain| !domain.refusal().maps).ok_or(Errno::EINVAL)?;
        let protection = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        let mut mapping = SimMapping::reserve(&domain, refs.len(), &self.calls)?;
        for gref in refs {
            let page = domain.granted_page(*gref, self.own, access).map_err(|_| Errno::EINVAL)?;
            mapping.place(*gref, page, protection)?;
        }
        Ok(mapping)
    }

    unsafe fn copy(&self, direction: CopyDirection, segments: &mut [CopySegment]) -> io::Result<()> {
        self.calls.count(Call::Copy);
        for segment in segments {
            // The kernel does not look at the direction of a batch; a mixed one is a mistake all the same.
            assert_eq!(segment.direction(), direction, "a batch of grant copies in two directions");
            let status = self.copy_one(segment);
            segment.set_status(status);
        }
        Ok(())
    }
}

/// Granted pages of a simulated domain in our address space. Dropping it unmaps them.
pub struct SimMapping {
    base: NonNull<u8>,
    len: NonZeroUsize,
    domain: Rc<DomainMemory>,
    /// The pages that are mapped, in order.
    refs: Vec<GrantRef>,
    calls: Rc<Calls>,
}

impl fmt::Debug for SimMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimMapping")
            .field("base", &self.base)
            .field("refs", &self.refs)
            .finish_non_exhaustive()
    }
}

impl SimMapping {
    /// Addresses for `pages` pages, with nothing behind them yet.
    fn reserve(domain: &Rc<DomainMemory>, pages: usize, calls: &Rc<Calls>) -> io::Result<SimMapping> {
        let len = pages.checked_mul(PAGE_SIZE).and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        // SAFETY: the kernel picks a free range of addresses, so no existing mapping changes.
        let base = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }?;
        let refs = Vec::with_capacity(pages);
        Ok(SimMapping { base: base.cast(), len, domain: domain.clone(), refs, calls: calls.clone() })
    }

    /// Puts the page at byte `page` of the domain's memory, which `gref` gives, at the next position of the range reserved.
    fn place(&mut self, gref: GrantRef, page: usize, protection: ProtFlags) -> io::Result<()> {
        let address = self.base.addr().get() + self.refs.len() * PAGE_SIZE;
        let size = NonZeroUsize::new(PAGE_SIZE).ok_or(Errno::EINVAL)?;
        let offset = libc::off_t::try_from(page).map_err(io::Error::other)?;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
        let file = self.domain.memory().file();
        // SAFETY: replaces one page of the range that this mapping reserved and that nobody uses yet.
        unsafe { mmap(NonZeroUsize::new(address), size, protection, flags, file, offset) }?;
        self.domain.count_map(gref);
        self.refs.push(gref);
        Ok(())
    }
}

impl GrantMap for SimMapping {
    fn as_ptr(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len.get()
    }
}

impl Drop for SimMapping {
    fn drop(&mut self) {
        // SAFETY: the range is ours alone, and whoever used its pointer does no longer.
        if let Err(errno) = unsafe { munmap(self.base.cast(), self.len.get()) } {
            log::error!("cannot unmap simulated grants: {errno}");
        }
        self.calls.count(Call::Unmap);
        for gref in &self.refs {
            self.domain.count_unmap(*gref);
        }
    }
}

#[cfg(test)]
mod tests;
