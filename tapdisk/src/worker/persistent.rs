//! The pages of a guest that stay mapped, for frontends with persistent grants.
//!
//! Such a frontend uses the same granted pages again and again, so mapping them once saves copying through the
//! hypervisor. Pages that one request shows for the first time are mapped together, as a **group**: neighbours in our
//! address space, which a transfer can then cover in one piece. A group is registered with the I/O engine, so that reads
//! and writes of the image go straight to and from the guest's memory without pinning it each time.
//!
//! The cache keeps Linux's limits (`xen-blkback`, `max_persistent_grants` and the constants beside it): 1056 pages of a
//! ring; when it is full, groups that were not used for the longest time make room, at most 5 % in 100 ms; what was not
//! used for a minute is unmapped. What does not fit is not mapped at all: [`Persistent::lease`] declines, and the caller
//! copies. The same when mapping fails, because a copy tells for each segment whether it was possible.
//!
//! **Both ways round**: Linux's frontend keeps its free pages on a stack, so a large request's pages come back in reverse
//! order next time, and in order the time after. Pages that come exactly in the reverse order of their group are mapped once
//! more, in that order, so that such a request too is one piece.
//!
//! A group that a request is using stays mapped until the request has ended, whatever the cache does: each
//! [`Buf`] over it holds a reference.

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

use crate::buf::{Buf, GuestMemory};
use crate::reactor::{Fixed, Reactor};

/// Most pages of one ring that stay mapped.
const MAX_PAGES: usize = 1056;
/// The same with those that are mapped a second time.
const MAX_MAPPED: usize = 2 * MAX_PAGES;
/// Pages in reverse order that are worth a mapping of their own.
const MIN_REVERSED: usize = 8;
/// Pages that may be unmapped at once to make room; and how long until the next time.
const PURGE_PAGES: usize = MAX_PAGES / 20;
const PURGE_INTERVAL: Duration = Duration::from_millis(100);
/// Calls of [`Persistent::age`] without use after which a group is unmapped; one call each [`super::HOUSEKEEPING`].
const MAX_AGE: usize = 6;
/// After so many failures in a row no more mapping is tried: the frontend does not keep its word.
const MAX_FAILURES: u32 = 16;

/// A group of mapped pages.
struct Group<M: GrantMap + 'static> {
    /// `None` only while being dropped.
    map: Option<M>,
    span: (NonNull<u8>, usize),
    fixed: Option<Fixed>,
    reactor: Rc<Reactor>,
}

impl<M: GrantMap> GuestMemory for Group<M> {
    fn span(&self) -> (NonNull<u8>, usize) {
        self.span
    }

    fn fixed(&self) -> Option<Fixed> {
        self.fixed
    }
}

impl<M: GrantMap> Drop for Group<M> {
    /// The engine unmaps it when the kernel has let go of its pages.
    fn drop(&mut self) {
        if let (Some(fixed), Some(map)) = (self.fixed, self.map.take()) {
            self.reactor.unfix(fixed, Box::new(map));
        }
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

/// Where a page can be found: in one group, or in two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Places {
    first: Place,
    second: Option<Place>,
}

/// Bytes of a guest that follow one another here.
struct Run {
    place: Place,
    /// Bytes from the start of the group.
    start: usize,
    end: usize,
}

struct Cache<M: GrantMap + 'static> {
    places: HashMap<GrantRef, Places, BuildHasherDefault<RefHasher>>,
    /// Pages of all groups.
    mapped: usize,
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
    reactor: Rc<Reactor>,
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
    pub fn new(dom: DomId, reactor: Rc<Reactor>) -> Persistent<G> {
        let cache = Cache {
            places: HashMap::with_capacity_and_hasher(MAX_PAGES, BuildHasherDefault::default()),
            mapped: 0,
            groups: Vec::new(),
            free: Vec::new(),
            clock: 0,
            ages: VecDeque::with_capacity(MAX_AGE + 1),
            purged: None,
            failures: 0,
        };
        Persistent { dom, reactor, cache: RefCell::new(cache) }
    }

    /// Pages mapped.
    pub fn pages(&self) -> usize {
        self.cache.borrow().places.len()
    }

    /// Puts buffers over the segments' bytes into `out`, in their order, as few as possible. False, with `out` empty: copy
    /// instead.
    pub fn lease(&self, grants: &G, segments: &[Segment], out: &mut Vec<Buf>) -> bool {
        let mut cache = self.cache.borrow_mut();
        cache.clock += 1;
        if !cache.lend(segments, out) {
            out.clear();
            return self.admit(&mut cache, grants, segments) && cache.lend(segments, out);
        }
        if out.len() > 1
            && cache.mapped + segments.len() <= MAX_MAPPED
            && cache.is_reversed(segments)
            && self.map(&mut cache, grants, segments.iter().map(|segment| segment.gref()).collect())
        {
            return cache.lend(segments, out);
        }
        true
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
        self.map(cache, grants, missing)
    }

    fn map(&self, cache: &mut Cache<G::Map>, grants: &G, refs: Vec<GrantRef>) -> bool {
        match grants.map(self.dom, &refs, Access::ReadWrite) {
            Ok(map) => {
                let span = (map.as_ptr(), map.len());
                let fixed = self.reactor.fix(span.0, span.1);
                let group = Rc::new(Group { map: Some(map), span, fixed, reactor: self.reactor.clone() });
                cache.keep(group, refs);
                cache.failures = 0;
                true
            }
            Err(error) => {
                cache.failures += 1;
                log::debug!("mapping {} pages of domain {} failed: {error}", refs.len(), self.dom);
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

    /// Waits until all that was dropped is unmapped.
    pub async fn unmapped(&self) {
        self.reactor.all_released().await;
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
    fn lend(&mut self, segments: &[Segment], out: &mut Vec<Buf>) -> bool {
        out.clear();
        let mut run: Option<Run> = None;
        let mut rest = segments.iter();
        while let Some(segment) = rest.next() {
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
            let next = rest.as_slice().first().map(|next| next.gref());
            let Some(place) = self.find(segment.gref(), next) else { return false };
            let start = place.page * PAGE_SIZE + usize::from(segment.offset());
            if let Some(done) = run.replace(Run { place, start, end: start + len })
                && !self.lend_run(&done, out)
            {
                return false;
            }
        }
        run.is_some_and(|run| self.lend_run(&run, out))
    }

    fn lend_run(&mut self, run: &Run, out: &mut Vec<Buf>) -> bool {
        let Some(Some(kept)) = self.groups.get_mut(run.place.group) else { return false };
        kept.used = self.clock;
        let buf = Buf::guest(kept.group.clone(), run.start..run.end);
        buf.map(|buf| out.push(buf)).is_some()
    }

    fn has(&self, group: usize, page: usize, gref: GrantRef) -> bool {
        let kept = self.groups.get(group).and_then(Option::as_ref);
        kept.is_some_and(|kept| kept.refs.get(page) == Some(&gref))
    }

    /// Where a page is; of two places the one where `next` follows.
    fn find(&self, gref: GrantRef, next: Option<GrantRef>) -> Option<Place> {
        let Places { first, second } = *self.places.get(&gref)?;
        let follows = |place: &Place| next.is_some_and(|next| self.has(place.group, place.page + 1, next));
        Some(second.filter(follows).unwrap_or(first))
    }

    /// Whether these are whole pages, and enough of them, in the exact reverse order of their group.
    fn is_reversed(&self, segments: &[Segment]) -> bool {
        let [first, rest @ ..] = segments else { return false };
        let Some(Places { first: Place { group, page }, second: None }) =
            self.places.get(&first.gref()).copied()
        else {
            return false;
        };
        let once = |gref| self.places.get(&gref).is_some_and(|places| places.second.is_none());
        let whole = segments.iter().all(|s| usize::from(s.bytes()) == PAGE_SIZE && once(s.gref()));
        let before = |n: usize| page.checked_sub(n + 1);
        let in_order = rest
            .iter()
            .enumerate()
            .all(|(n, segment)| before(n).is_some_and(|page| self.has(group, page, segment.gref())));
        segments.len() >= MIN_REVERSED && whole && in_order
    }

    fn keep(&mut self, group: Rc<Group<M>>, refs: Vec<GrantRef>) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.groups.push(None);
            self.groups.len() - 1
        });
        for (page, gref) in refs.iter().enumerate() {
            let place = Place { group: index, page };
            let fresh = Places { first: place, second: None };
            self.places.entry(*gref).and_modify(|places| places.second = Some(place)).or_insert(fresh);
        }
        self.mapped += refs.len();
        self.groups[index] = Some(Kept { group, refs, used: self.clock });
    }

    /// Drops a group that no request is using, if `when` says so; returns its pages.
    fn drop_if(&mut self, index: usize, when: impl FnOnce(&Kept<M>) -> bool) -> usize {
        let Some(slot) = self.groups.get_mut(index) else { return 0 };
        let Some(kept) = slot.take_if(|kept| kept.is_idle() && when(kept)) else { return 0 };
        for gref in &kept.refs {
            let Some(places) = self.places.get_mut(gref) else { continue };
            match (places.first.group == index, places.second) {
                (true, None) => drop(self.places.remove(gref)),
                (true, Some(second)) => *places = Places { first: second, second: None },
                (false, _) => places.second = None,
            }
        }
        self.mapped -= kept.refs.len();
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
