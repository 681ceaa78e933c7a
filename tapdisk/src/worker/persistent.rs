//! The pages of a guest that stay mapped, for frontends with persistent grants.
//!
//! Such a frontend uses the same granted pages again and again, so mapping them once saves copying through the
//! hypervisor. Pages that one request shows for the first time are mapped together, as a **group**: neighbours in our
//! address space, which one copy can then cover.
//!
//! **The kernel never gets to see them.** Data passes through buffers of our own ([`crate::buf::Pool`]), although the kernel could read and write
//! an image's data in the guest's pages. For that it holds on to them, and while it does a process must not die: `gntdev` then
//! puts the unmapping off (`unmap_grant_pages` in `drivers/xen/gntdev.c` waits for each page's count to fall), and the end of the process's memory in a PV
//! domain finds their page table entries still there and drops references that nobody took (`vm_normal_page` with `find_special_page`). From then on
//! these pages of dom0 cannot be used for any I/O, of any tapdisk, until dom0 boots again. A tapdisk can be killed at any time; so no page
//! of a guest may be held by the kernel at any time.
//!
//! The cache keeps Linux's limits (`xen-blkback`, `max_persistent_grants` and the constants beside it): 1056 pages of a
//! ring; when it is full, groups that were not used for the longest time make room, at most 5 % in 100 ms; what was not
//! used for a minute is unmapped. What does not fit is not mapped at all: [`Persistent::lease`] declines, and the caller
//! copies. The same when mapping fails, because a copy tells for each segment whether it was possible.
//!
//! A group that a request is using stays mapped until the request has ended, whatever the cache does:
//! [`GuestBytes`] over it hold a reference.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::{Duration, Instant};

use blkif::ids::PAGE_SIZE;
use blkif::{DomId, GrantRef, Segment};
use gntdev::{Access, GrantMap, Grants};

use crate::buf::{GuestBytes, GuestMemory};

/// Most pages of one ring that stay mapped.
const MAX_PAGES: usize = 1056;
/// Pages that may be unmapped at once to make room; and how long until the next time.
const PURGE_PAGES: usize = MAX_PAGES / 20;
const PURGE_INTERVAL: Duration = Duration::from_millis(100);
/// Calls of [`Persistent::age`] without use after which a group is unmapped; one call each [`super::HOUSEKEEPING`].
const MAX_AGE: usize = 6;
/// After so many failures in a row no more mapping is tried: the frontend does not keep its word.
const MAX_FAILURES: u32 = 16;

/// A group of mapped pages.
struct Group<M>(M);

impl<M: GrantMap> GuestMemory for Group<M> {
    fn span(&self) -> (NonNull<u8>, usize) {
        (self.0.as_ptr(), self.0.len())
    }
}

/// A group in the cache.
struct Kept<M: GrantMap + 'static> {
    group: Rc<Group<M>>,
    refs: Vec<GrantRef>,
    /// The lease that used it last.
    used: u64,
}

impl<M: GrantMap> Kept<M> {
    fn is_idle(&self) -> bool {
        Rc::strong_count(&self.group) == 1
    }
}

/// Grant references are small numbers of the guest's choice; a bad choice costs only the guest's own disk.
#[derive(Default)]
struct RefHasher(u64);

impl Hasher for RefHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn write_u32(&mut self, number: u32) {
        // Knuth's multiplicative hashing: the high bits depend on all bits.
        self.0 = (self.0 ^ u64::from(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// A page: its group, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    group: usize,
    page: usize,
}

/// Bytes of a guest that follow one another here.
struct Run {
    place: Place,
    /// Bytes from the start of the group.
    start: usize,
    end: usize,
}

struct Cache<M: GrantMap + 'static> {
    places: HashMap<GrantRef, Place, BuildHasherDefault<RefHasher>>,
    groups: Vec<Option<Kept<M>>>,
    free: Vec<usize>,
    /// Leases so far.
    clock: u64,
    /// `clock` at the last calls of `age`, newest last.
    ages: VecDeque<u64>,
    purged: Option<Instant>,
    failures: u32,
}

/// The mapped pages of one ring.
pub struct Persistent<G: Grants>
where
    G::Map: 'static,
{
    dom: DomId,
    cache: RefCell<Cache<G::Map>>,
}

impl<G: Grants> fmt::Debug for Persistent<G>
where
    G::Map: 'static,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Persistent").field("dom", &self.dom).finish_non_exhaustive()
    }
}

impl<G: Grants> Persistent<G>
where
    G::Map: 'static,
{
    /// An empty cache of pages of `dom`.
    pub fn new(dom: DomId) -> Persistent<G> {
        let cache = Cache {
            places: HashMap::with_capacity_and_hasher(MAX_PAGES, BuildHasherDefault::default()),
            groups: Vec::new(),
            free: Vec::new(),
            clock: 0,
            ages: VecDeque::with_capacity(MAX_AGE + 1),
            purged: None,
            failures: 0,
        };
        Persistent { dom, cache: RefCell::new(cache) }
    }

    /// Pages mapped.
    pub fn pages(&self) -> usize {
        self.cache.borrow().places.len()
    }

    /// Puts the segments' bytes into `out`, in their order, as few as possible. False, with `out` empty: copy
    /// instead.
    pub fn lease(&self, grants: &G, segments: &[Segment], out: &mut Vec<GuestBytes>) -> bool {
        let mut cache = self.cache.borrow_mut();
        cache.clock += 1;
        if cache.lend(segments, out) {
            return true;
        }
        out.clear();
        self.admit(&mut cache, grants, segments) && cache.lend(segments, out)
    }

    /// Maps the pages that are missing.
    fn admit(&self, cache: &mut Cache<G::Map>, grants: &G, segments: &[Segment]) -> bool {
        if cache.failures >= MAX_FAILURES {
            return false;
        }
        let mut missing: Vec<GrantRef> = Vec::with_capacity(segments.len());
        for segment in segments {
            if !cache.places.contains_key(&segment.gref()) && !missing.contains(&segment.gref()) {
                missing.push(segment.gref());
            }
        }
        if !cache.make_room(missing.len()) {
            return false;
        }
        match grants.map(self.dom, &missing, Access::ReadWrite) {
            Ok(map) => {
                cache.keep(Rc::new(Group(map)), missing);
                cache.failures = 0;
                true
            }
            Err(error) => {
                cache.failures += 1;
                log::debug!("mapping {} pages of domain {} failed: {error}", missing.len(), self.dom);
                if cache.failures == MAX_FAILURES {
                    log::info!("domain {}: its grants cannot be kept mapped; data is copied", self.dom);
                }
                false
            }
        }
    }

    /// Unmaps everything. No request may be using a page.
    pub fn clear(&self) {
        let mut cache = self.cache.borrow_mut();
        for index in 0..cache.groups.len() {
            cache.drop_if(index, |_| true);
        }
        debug_assert!(cache.places.is_empty(), "a page of the guest is in use");
    }

    /// Time passes: unmaps what was not used lately.
    pub fn age(&self) {
        let mut cache = self.cache.borrow_mut();
        let now = cache.clock;
        cache.ages.push_back(now);
        if cache.ages.len() > MAX_AGE
            && let Some(then) = cache.ages.pop_front()
        {
            for index in 0..cache.groups.len() {
                cache.drop_if(index, |kept| kept.used <= then);
            }
        }
    }
}

impl<M: GrantMap + 'static> Cache<M> {
    fn lend(&mut self, segments: &[Segment], out: &mut Vec<GuestBytes>) -> bool {
        out.clear();
        let mut run: Option<Run> = None;
        for segment in segments {
            let len = usize::from(segment.bytes());
            if let Some(run) = &mut run
                && run.end.is_multiple_of(PAGE_SIZE)
                && segment.offset() == 0
                && self.has(run.place.group, run.place.page + 1, segment.gref())
            {
                run.place.page += 1;
                run.end += len;
                continue;
            }
            let Some(&place) = self.places.get(&segment.gref()) else { return false };
            let start = place.page * PAGE_SIZE + usize::from(segment.offset());
            if let Some(done) = run.replace(Run { place, start, end: start + len })
                && !self.lend_run(&done, out)
            {
                return false;
            }
        }
        run.is_some_and(|run| self.lend_run(&run, out))
    }

    fn lend_run(&mut self, run: &Run, out: &mut Vec<GuestBytes>) -> bool {
        let Some(Some(kept)) = self.groups.get_mut(run.place.group) else { return false };
        kept.used = self.clock;
        let bytes = GuestBytes::new(kept.group.clone(), run.start..run.end);
        bytes.map(|bytes| out.push(bytes)).is_some()
    }

    fn has(&self, group: usize, page: usize, gref: GrantRef) -> bool {
        let kept = self.groups.get(group).and_then(Option::as_ref);
        kept.is_some_and(|kept| kept.refs.get(page) == Some(&gref))
    }

    fn keep(&mut self, group: Rc<Group<M>>, refs: Vec<GrantRef>) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.groups.push(None);
            self.groups.len() - 1
        });
        for (page, gref) in refs.iter().enumerate() {
            self.places.insert(*gref, Place { group: index, page });
        }
        self.groups[index] = Some(Kept { group, refs, used: self.clock });
    }

    /// Drops a group that no request is using, if `when` says so; returns its pages.
    fn drop_if(&mut self, index: usize, when: impl FnOnce(&Kept<M>) -> bool) -> usize {
        let Some(slot) = self.groups.get_mut(index) else { return 0 };
        let Some(kept) = slot.take_if(|kept| kept.is_idle() && when(kept)) else { return 0 };
        for gref in &kept.refs {
            self.places.remove(gref);
        }
        self.free.push(index);
        kept.refs.len()
    }

    /// Makes sure that `count` more pages fit.
    fn make_room(&mut self, count: usize) -> bool {
        let excess = (self.places.len() + count).saturating_sub(MAX_PAGES);
        if excess == 0 {
            return true;
        }
        // The clock is read only here, when the cache is full.
        let now = Instant::now();
        if self.purged.is_some_and(|then| now.duration_since(then) < PURGE_INTERVAL) {
            return false;
        }
        self.purged = Some(now);
        let goal = excess.max(PURGE_PAGES);
        let mut freed = 0;
        while freed < goal {
            let idle = self.groups.iter().enumerate().filter_map(|(index, slot)| {
                slot.as_ref().filter(|kept| kept.is_idle()).map(|kept| (kept.used, index))
            });
            let Some((_, oldest)) = idle.min() else { break };
            freed += self.drop_if(oldest, |_| true);
        }
        freed >= excess
    }
}

#[cfg(test)]
mod tests;
