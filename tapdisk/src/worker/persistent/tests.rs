use std::cell::{Cell, UnsafeCell};
use std::io;

use gntdev::{CopyDirection, CopySegment};

use super::*;

#[repr(align(4096))]
struct Page(#[expect(dead_code, reason = "only its place counts")] UnsafeCell<[u8; PAGE_SIZE]>);

/// Pages that nobody looks into, and how many are mapped.
struct TestMap {
    pages: Vec<Page>,
    live: Rc<Cell<usize>>,
}

impl GrantMap for TestMap {
    fn as_ptr(&self) -> NonNull<u8> {
        NonNull::from(&self.pages[0]).cast()
    }

    fn len(&self) -> usize {
        self.pages.len() * PAGE_SIZE
    }
}

impl Drop for TestMap {
    fn drop(&mut self) {
        self.live.set(self.live.get() - self.pages.len());
    }
}

#[derive(Default)]
struct TestGrants {
    live: Rc<Cell<usize>>,
    calls: Cell<u32>,
    refuse: Cell<bool>,
}

impl Grants for TestGrants {
    type Map = TestMap;

    fn map(&self, _: DomId, refs: &[GrantRef], access: Access) -> io::Result<TestMap> {
        assert_eq!(access, Access::ReadWrite);
        self.calls.set(self.calls.get() + 1);
        if self.refuse.get() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.live.set(self.live.get() + refs.len());
        let pages = refs.iter().map(|_| Page(UnsafeCell::new([0; PAGE_SIZE]))).collect();
        Ok(TestMap { pages, live: self.live.clone() })
    }

    #[expect(unsafe_code, reason = "the trait's contract")]
    unsafe fn copy(&self, _: CopyDirection, _: &mut [CopySegment]) -> io::Result<()> {
        unreachable!("nothing is copied here")
    }
}

fn segments(refs: impl IntoIterator<Item = u32>) -> Vec<Segment> {
    refs.into_iter().map(|gref| Segment::new(GrantRef(gref), 0, 7).unwrap()).collect()
}

fn cache() -> (TestGrants, Persistent<TestGrants>) {
    (TestGrants::default(), Persistent::new(DomId(1)))
}

#[test]
fn pages_are_mapped_once_and_those_of_one_request_are_neighbours() {
    let (grants, cache) = cache();
    let mut out = Vec::new();
    assert!(cache.lease(&grants, &segments([7, 3, 9]), &mut out));
    assert_eq!((out.len(), out[0].len()), (1, 3 * PAGE_SIZE));
    assert!(cache.lease(&grants, &segments([9, 7, 3]), &mut out));
    assert_eq!(out.len(), 2, "in another order they are not, but for 7 and 3");
    assert!(cache.lease(&grants, &segments([3, 3, 5, 5]), &mut out));
    assert_eq!(
        (grants.calls.get(), grants.live.get(), cache.pages()),
        (2, 4, 4),
        "only the new page was mapped"
    );
    out.clear();
    cache.clear();
    assert_eq!((grants.live.get(), cache.pages()), (0, 0));
}

#[test]
fn a_part_of_a_page_is_lent_as_such() {
    let (grants, cache) = cache();
    let mut out = Vec::new();
    let part = [Segment::new(GrantRef(1), 2, 3).unwrap()];
    assert!(cache.lease(&grants, &part, &mut out));
    assert_eq!(out[0].len(), 1024);
}

#[test]
fn where_mapping_fails_the_caller_copies_and_in_the_end_it_is_not_tried_any_more() {
    let (grants, cache) = cache();
    let mut out = Vec::new();
    assert!(cache.lease(&grants, &segments([1]), &mut out));
    grants.refuse.set(true);
    for gref in 100..200 {
        assert!(!cache.lease(&grants, &segments([1, gref]), &mut out));
        assert!(out.is_empty());
    }
    assert_eq!(grants.calls.get(), 1 + MAX_FAILURES);
    assert!(cache.lease(&grants, &segments([1]), &mut out), "what is mapped stays in use");
}

#[test]
fn a_full_cache_makes_room_from_its_oldest_end_and_not_too_often() {
    let (grants, cache) = cache();
    let mut out = Vec::new();
    for gref in 0..1056 {
        assert!(cache.lease(&grants, &segments([gref]), &mut out));
    }
    // The oldest is in use, the second oldest was just used again.
    assert!(cache.lease(&grants, &segments([0]), &mut out));
    let mut other = Vec::new();
    assert!(cache.lease(&grants, &segments([1]), &mut other));
    other.clear();
    assert!(cache.lease(&grants, &segments([5000]), &mut other));
    assert_eq!(grants.live.get(), MAX_PAGES - PURGE_PAGES + 1);
    let calls = grants.calls.get();
    assert!(
        cache.lease(&grants, &segments([0]), &mut other) && cache.lease(&grants, &segments([1]), &mut other)
    );
    assert_eq!(grants.calls.get(), calls, "both are still mapped");
    // Room again for as many; then not before the interval has passed.
    let fitting =
        (6000..7000).take_while(|gref| cache.lease(&grants, &segments([*gref]), &mut other)).count();
    assert!(fitting >= PURGE_PAGES - 1, "{fitting}");
    assert!(grants.live.get() <= MAX_PAGES);
}

#[test]
fn more_pages_than_fit_are_never_mapped() {
    let (grants, cache) = cache();
    let mut held = Vec::new();
    for first in (0..1024).step_by(256) {
        let mut out = Vec::new();
        assert!(cache.lease(&grants, &segments(first..first + 256), &mut out));
        held.push(out);
    }
    let mut out = Vec::new();
    assert!(!cache.lease(&grants, &segments(2000..2256), &mut out), "everything is in use");
    assert_eq!(grants.live.get(), 1024);
}

#[test]
fn what_was_not_used_for_a_while_is_unmapped_unless_it_is_in_use() {
    let (grants, cache) = cache();
    let (mut used, mut idle) = (Vec::new(), Vec::new());
    assert!(cache.lease(&grants, &segments([1, 2]), &mut used));
    assert!(cache.lease(&grants, &segments([3]), &mut idle));
    idle.clear();
    for _ in 0..MAX_AGE {
        cache.age();
    }
    assert_eq!(grants.live.get(), 3);
    cache.age();
    assert_eq!(grants.live.get(), 2, "the idle page");
    used.clear();
    cache.age();
    assert_eq!((grants.live.get(), cache.pages()), (0, 0));
}
