//! DISCARD.

use super::*;
use crate::encode::DiscardDraft;

fn parse_discard(draft: &DiscardDraft, geometry: &Geometry) -> Result<Request, Rejection> {
    let [a, b] = ABIS.map(|abi| parse(&draft.encode(abi), geometry));
    assert_eq!(a, b);
    a
}

#[test]
fn h23_discard_keeps_every_field() {
    let draft = DiscardDraft { flag: 1, handle: 9, id: u64::MAX, sector: 8, count: 992 };
    let kind = RequestKind::Discard { sector: Sector(8), count: 992, secure: true };
    assert_eq!(parse_discard(&draft, &geometry()), Ok(Request { id: u64::MAX, op: op::DISCARD, kind }));
}

#[test]
fn h23_discard_beyond_the_end_is_refused() {
    for (sector, count) in [
        (0, 1001),
        (1000, 1),
        (1001, 0),
        (u64::MAX, 1),
        (1, u64::MAX),
        (u64::MAX, u64::MAX),
        (1 << 63, 1 << 63),
    ] {
        let draft = DiscardDraft { sector, count, id: 3, ..DiscardDraft::default() };
        let rejection = parse_discard(&draft, &geometry()).unwrap_err();
        let reason = Reason::OutOfRange { sector: Sector(sector), count };
        assert_eq!(rejection, Rejection { id: 3, op: op::DISCARD, status: Status::Error, reason });
    }
}

#[test]
fn h23_discard_of_nothing_is_accepted() {
    for sector in [0, 1000] {
        let draft = DiscardDraft { sector, ..DiscardDraft::default() };
        assert!(parse_discard(&draft, &geometry()).is_ok());
    }
}

#[test]
fn h23_secure_flag_has_no_meaning_where_it_was_not_offered() {
    let plain = Geometry { discard_secure: false, ..geometry() };
    for (flag, geometry, expected) in [
        (1, geometry(), true),
        (0xff, geometry(), true),
        (0, geometry(), false),
        (0xfe, geometry(), false),
        (1, plain, false),
    ] {
        let draft = DiscardDraft { flag, count: 1, ..DiscardDraft::default() };
        let request = parse_discard(&draft, &geometry).unwrap();
        assert_eq!(request.kind, RequestKind::Discard { sector: Sector(0), count: 1, secure: expected });
    }
}

#[test]
fn h22_h23_discard_on_a_read_only_disk_is_refused() {
    let draft = DiscardDraft { count: 1, ..DiscardDraft::default() };
    let readonly = Geometry { readonly: true, ..geometry() };
    let rejection = parse_discard(&draft, &readonly).unwrap_err();
    assert_eq!((rejection.status, rejection.reason), (Status::Error, Reason::ReadOnly));
    let without = Geometry { discard: false, ..readonly };
    assert_eq!(parse_discard(&draft, &without).unwrap_err().status, Status::NotSupported);
}

proptest! {
    #[test]
    fn every_field_of_an_accepted_discard_is_the_frontends(
        (flag, handle, id) in any::<(u8, u16, u64)>(),
        sector in prop_oneof![0..3000u64, any::<u64>()],
        count in prop_oneof![0..3000u64, any::<u64>()],
        abi in any_abi(),
        geometry in any_geometry(),
    ) {
        let draft = DiscardDraft { flag, handle, id, sector, count };
        let end = u128::from(sector) + u128::from(count);
        let fine = geometry.discard && !geometry.readonly && end <= u128::from(geometry.capacity);
        match parse(&draft.encode(abi), &geometry) {
            Ok(request) => {
                prop_assert!(fine);
                let secure = geometry.discard_secure && flag % 2 == 1;
                let kind = RequestKind::Discard { sector: Sector(sector), count, secure };
                prop_assert_eq!(request, Request { id, op: op::DISCARD, kind });
            }
            Err(rejection) => {
                prop_assert!(!fine);
                prop_assert_eq!((rejection.id, rejection.op), (id, op::DISCARD));
                prop_assert_eq!(rejection.status == Status::NotSupported, !geometry.discard);
            }
        }
    }
}
