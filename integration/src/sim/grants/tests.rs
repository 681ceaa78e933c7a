//! Grants that are good, and every way in which one can be bad.

use super::*;
use crate::sim::domain::{Frame, Refusal, SimDomain};

const US: DomId = DomId(0);
const GUEST: DomId = DomId(5);

struct Bench {
    dir: tempfile::TempDir,
    domain: SimDomain,
    grants: SimGrants,
    frame: Frame,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let mut domain = SimDomain::create(dir.path(), GUEST, 32).unwrap();
    let grants = SimGrants::open(dir.path(), US).unwrap();
    let frame = domain.allocate(1);
    Bench { dir, domain, grants, frame }
}

impl Bench {
    /// Copies `local` in `direction` at byte `offset` of a page.
    fn copy(
        &self,
        direction: CopyDirection,
        dom: DomId,
        gref: GrantRef,
        offset: u16,
        local: &mut [u8],
    ) -> CopyStatus {
        let len = u16::try_from(local.len()).unwrap();
        let at = NonNull::from_mut(local).cast();
        let mut segments = [CopySegment::new(direction, dom, gref, offset, len, at).unwrap()];
        // SAFETY: the local side is `local`, which is borrowed for the whole call.
        unsafe { self.grants.copy(direction, &mut segments) }.unwrap();
        segments[0].status()
    }

    fn read(&self, gref: GrantRef) -> CopyStatus {
        self.copy(CopyDirection::FromGuest, GUEST, gref, 0, &mut [0; 512])
    }

    fn write(&self, gref: GrantRef) -> CopyStatus {
        self.copy(CopyDirection::ToGuest, GUEST, gref, 0, &mut [0; 512])
    }
}

#[test]
fn copies_move_exactly_the_bytes_asked_for() {
    let mut bench = bench();
    let gref = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    bench.domain.write(bench.frame, 0, &[1; 4096]);
    let mut data = [7; 512];
    assert!(bench.copy(CopyDirection::ToGuest, GUEST, gref, 512, &mut data).is_okay());
    let mut page = [0; 4096];
    bench.domain.read(bench.frame, 0, &mut page);
    assert!(page[..512].iter().chain(&page[1024..]).all(|b| *b == 1) && page[512..1024] == [7; 512]);
    let mut back = [0; 1024];
    assert!(bench.copy(CopyDirection::FromGuest, GUEST, gref, 256, &mut back).is_okay());
    assert_eq!((&back[..256], &back[256..768]), (&[1; 256][..], &[7; 512][..]));
}

#[test]
fn bad_references_fail_alone() {
    let mut bench = bench();
    let good = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    let readonly = bench.domain.grant(bench.frame, US, Access::ReadOnly);
    let foreign = bench.domain.grant(bench.frame, DomId(6), Access::ReadWrite);
    let revoked = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    bench.domain.revoke(revoked);
    let outside = bench.domain.grant(Frame(u32::MAX), US, Access::ReadWrite);
    let table = bench.domain.grant(Frame(1), US, Access::ReadWrite);
    assert!(bench.read(readonly).is_okay());
    assert!(!bench.write(readonly).is_okay());
    for bad in
        [foreign, revoked, outside, table, GrantRef(0), GrantRef(7), GrantRef(8191), GrantRef(u32::MAX)]
    {
        assert!(!bench.read(bad).is_okay(), "{bad}");
        assert!(!bench.write(bad).is_okay(), "{bad}");
        assert_eq!(
            bench.grants.map(GUEST, &[good, bad], Access::ReadOnly).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }
    assert!(bench.read(good).is_okay() && bench.write(good).is_okay());
    assert!(bench.grants.map(GUEST, &[readonly], Access::ReadWrite).is_err());
    assert!(bench.grants.map(GUEST, &[], Access::ReadWrite).is_err());
}

#[test]
fn mapping_shows_the_pages_in_the_order_of_the_references() {
    let mut bench = bench();
    let second = bench.domain.allocate(1);
    let a = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    let b = bench.domain.grant(second, US, Access::ReadWrite);
    bench.domain.write(bench.frame, 0, &[1]);
    bench.domain.write(second, 0, &[2]);
    let map = bench.grants.map(GUEST, &[b, a], Access::ReadWrite).unwrap();
    assert_eq!(map.len(), 2 * PAGE_SIZE);
    // SAFETY: byte 0 of the mapping; nothing else accesses it now.
    let first = unsafe { map.as_ptr().read_volatile() };
    assert_eq!(first, 2);
    // SAFETY: byte 0 of the second page.
    let byte = unsafe { map.as_ptr().add(PAGE_SIZE) };
    // SAFETY: as above; nothing else accesses it now.
    unsafe { byte.write_volatile(9) };
    let mut seen = [0];
    bench.domain.read(bench.frame, 0, &mut seen);
    assert_eq!(seen, [9]);
}

#[test]
fn domain_that_is_gone_is_a_bad_domain_and_its_number_can_come_back() {
    let mut bench = bench();
    let gref = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    assert!(bench.read(gref).is_okay());
    assert!(SimDomain::create(bench.dir.path(), GUEST, 1).is_err(), "the number is taken");
    drop(bench.domain);
    let grants = bench.grants;
    let mut local = [0; 16];
    let mut copy = || {
        let at = NonNull::from_mut(&mut local).cast();
        let mut one = [CopySegment::new(CopyDirection::FromGuest, GUEST, gref, 0, 16, at).unwrap()];
        // SAFETY: the local side outlives the call.
        unsafe { grants.copy(CopyDirection::FromGuest, &mut one) }.unwrap();
        one[0].status()
    };
    assert_eq!(copy(), BAD_DOMAIN);
    let mut next = SimDomain::create(bench.dir.path(), GUEST, 4).unwrap();
    assert_eq!(copy(), GENERAL_ERROR, "the new domain granted nothing");
    let frame = next.allocate(1);
    next.set_grant(gref, frame, US, Access::ReadOnly);
    assert!(copy().is_okay());
}

#[test]
fn every_mapping_is_counted_until_it_is_gone_also_when_it_fails_half_way() {
    let mut bench = bench();
    let other = bench.domain.allocate(1);
    let a = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    let b = bench.domain.grant(other, US, Access::ReadOnly);
    let one = bench.grants.map(GUEST, &[a], Access::ReadWrite).unwrap();
    let both = bench.grants.map(GUEST, &[a, b], Access::ReadOnly).unwrap();
    assert!(bench.grants.map(GUEST, &[a, b], Access::ReadWrite).is_err());
    assert_eq!((bench.domain.mappings(a), bench.domain.mappings(b), bench.domain.mapped_pages()), (2, 1, 3));
    drop(one);
    assert_eq!((bench.domain.mappings(a), bench.domain.mapped_pages()), (1, 2));
    drop(both);
    assert_eq!((bench.domain.mappings(a), bench.domain.mapped_pages()), (0, 0));
}

#[test]
fn what_the_hypervisor_refuses_fails_until_it_does_not_any_more() {
    let mut bench = bench();
    let gref = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    let map = |bench: &Bench| bench.grants.map(GUEST, &[gref], Access::ReadWrite).is_ok();
    for (maps, copies) in [(true, false), (false, true), (true, true), (false, false)] {
        bench.domain.refuse(Refusal { maps, copies });
        assert_eq!((map(&bench), bench.read(gref).is_okay()), (!maps, !copies));
    }
}

#[test]
fn calls_are_counted_for_all_devices_of_a_domain_together() {
    let mut bench = bench();
    let gref = bench.domain.grant(bench.frame, US, Access::ReadWrite);
    let second = SimGrants::open(bench.dir.path(), US).unwrap();
    drop(second.map(GUEST, &[gref], Access::ReadOnly));
    bench.read(gref);
    bench.read(GrantRef(0));
    let calls = Calls::open(bench.dir.path(), US).unwrap();
    let counts = [Call::Map, Call::Unmap, Call::Copy, Call::Notify].map(|call| calls.so_far(call));
    assert_eq!(counts, [1, 1, 2, 0]);
}
