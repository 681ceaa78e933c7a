//! Requests: every rejection by name, and any bytes at all.

mod discard;
mod indirect;

use proptest::prelude::*;

use super::*;
use crate::encode::{Draft, DraftSegment};

const ABIS: [Abi; 2] = [Abi::X86_64, Abi::X86_32];

fn geometry() -> Geometry {
    Geometry {
        capacity: 1000,
        readonly: false,
        flush: true,
        barrier: true,
        discard: true,
        discard_secure: true,
        max_indirect: MAX_INDIRECT_SEGMENTS,
    }
}

fn segment(first: u8, last: u8) -> DraftSegment {
    DraftSegment { gref: GrantRef(77), first, last }
}

/// Parses the same draft in both layouts, which must agree.
fn parse_draft(draft: &Draft, geometry: &Geometry) -> Result<Request, Rejection> {
    let [a, b] = ABIS.map(|abi| parse(&draft.encode(abi), geometry));
    assert_eq!(a, b);
    a
}

fn reason(draft: &Draft) -> Reason {
    let rejection = parse_draft(draft, &geometry()).unwrap_err();
    assert_eq!((rejection.id, rejection.status), (draft.id, rejection.reason.status()));
    rejection.reason
}

#[test]
fn read_keeps_every_field() {
    let draft = Draft::new(op::READ, 42, 7, &[segment(0, 7), segment(3, 5)]);
    let request = parse_draft(&draft, &geometry()).unwrap();
    assert_eq!((request.id, request.op), (42, op::READ));
    let RequestKind::Read { sector, segments } = request.kind else { panic!("{request:?}") };
    assert_eq!((sector, segments.len(), segments.sectors(), segments.bytes()), (Sector(7), 2, 11, 11 * 512));
    let second = segments.as_slice()[1];
    assert_eq!((second.gref(), second.offset(), second.bytes()), (GrantRef(77), 3 * 512, 3 * 512));
}

#[test]
fn h9_more_segments_than_an_entry_has_are_refused() {
    for count in 12..=255 {
        let mut draft = Draft::new(op::WRITE, 1, 0, &[segment(0, 0); 11]);
        draft.nr_segments = count;
        assert_eq!(reason(&draft), Reason::TooManySegments { count: usize::from(count), limit: 11 });
    }
    let draft = Draft::new(op::WRITE, 1, 0, &[segment(0, 0); 11]);
    assert!(parse_draft(&draft, &geometry()).is_ok());
}

#[test]
fn h10_read_and_write_without_segments_are_refused() {
    for op in [op::READ, op::WRITE] {
        assert_eq!(reason(&Draft::new(op, 1, 0, &[])), Reason::NoSegments);
    }
}

#[test]
fn h11_flush_ignores_segments_and_sector() {
    for nr_segments in [0, 1, 11, 12, 255] {
        let mut draft = Draft::new(op::FLUSH_DISKCACHE, 9, u64::MAX, &[segment(200, 100); 11]);
        draft.nr_segments = nr_segments;
        let request = parse_draft(&draft, &geometry()).unwrap();
        assert_eq!(request, Request { id: 9, op: op::FLUSH_DISKCACHE, kind: RequestKind::Flush });
    }
}

#[test]
fn h12_segment_outside_its_page_is_refused() {
    for (first, last) in [(0, 8), (7, 8), (5, 4), (128, 128), (128, 130), (0, 255), (255, 0), (8, 7)] {
        let draft = Draft::new(op::READ, 1, 0, &[segment(0, 7), segment(first, last)]);
        assert_eq!(reason(&draft), Reason::BadSegment { first, last });
    }
}

#[test]
fn h13_sector_number_that_overflows_is_refused() {
    for sector in [u64::MAX, u64::MAX - 7, u64::MAX - 8, 1 << 63, u64::MAX / 512] {
        let draft = Draft::new(op::READ, 1, sector, &[segment(0, 7)]);
        assert_eq!(reason(&draft), Reason::OutOfRange { sector: Sector(sector), count: 8 });
    }
}

#[test]
fn h14_range_may_end_at_the_capacity_and_not_beyond() {
    for op in [op::READ, op::WRITE, op::WRITE_BARRIER] {
        assert!(parse_draft(&Draft::new(op, 1, 992, &[segment(0, 7)]), &geometry()).is_ok());
        let beyond = Draft::new(op, 1, 993, &[segment(0, 7)]);
        assert_eq!(reason(&beyond), Reason::OutOfRange { sector: Sector(993), count: 8 });
    }
}

#[test]
fn h15_unknown_operations_are_not_supported_and_echoed() {
    for op in (4..=255).filter(|op| ![op::DISCARD, op::INDIRECT].contains(op)) {
        let rejection = parse_draft(&Draft::new(op, 5, 0, &[segment(0, 7)]), &geometry()).unwrap_err();
        let expected =
            Rejection { id: 5, op, status: Status::NotSupported, reason: Reason::NotOffered { op } };
        assert_eq!(rejection, expected);
    }
}

#[test]
fn operation_that_was_not_offered_is_not_supported() {
    let bare = Geometry { flush: false, barrier: false, discard: false, max_indirect: 0, ..geometry() };
    for op in [op::FLUSH_DISKCACHE, op::WRITE_BARRIER, op::DISCARD, op::INDIRECT] {
        let rejection = parse_draft(&Draft::new(op, 1, 0, &[]), &bare).unwrap_err();
        assert_eq!(rejection.status, Status::NotSupported);
    }
}

#[test]
fn empty_barrier_is_not_range_checked() {
    let request = parse_draft(&Draft::new(op::WRITE_BARRIER, 1, u64::MAX, &[]), &geometry()).unwrap();
    let RequestKind::Barrier { segments, .. } = request.kind else { panic!("{request:?}") };
    assert!(segments.is_empty());
}

#[test]
fn h22_read_only_disk_refuses_data_and_allows_the_rest() {
    let readonly = Geometry { readonly: true, ..geometry() };
    for op in [op::WRITE, op::WRITE_BARRIER] {
        let rejection = parse_draft(&Draft::new(op, 1, 0, &[segment(0, 7)]), &readonly).unwrap_err();
        assert_eq!((rejection.status, rejection.reason), (Status::Error, Reason::ReadOnly));
    }
    for draft in [
        Draft::new(op::READ, 1, 0, &[segment(0, 7)]),
        Draft::new(op::FLUSH_DISKCACHE, 1, 0, &[]),
        Draft::new(op::WRITE_BARRIER, 1, 0, &[]),
    ] {
        assert!(parse_draft(&draft, &readonly).is_ok(), "{draft:?}");
    }
}

#[test]
fn h21_handle_is_ignored() {
    let draft = Draft::new(op::READ, 1, 0, &[segment(0, 7)]);
    let odd = Draft { handle: 0xdead, ..draft };
    assert_eq!(parse_draft(&odd, &geometry()), parse_draft(&draft, &geometry()));
}

fn bounds_hold(kind: &RequestKind, geometry: &Geometry) {
    let (sector, sectors, segments, changes) = match kind {
        RequestKind::Flush => return,
        RequestKind::Barrier { segments, .. } if segments.is_empty() => return,
        RequestKind::Read { sector, segments } => (sector, segments.sectors().into(), Some(segments), false),
        RequestKind::Write { sector, segments } | RequestKind::Barrier { sector, segments } => {
            (sector, segments.sectors().into(), Some(segments), true)
        }
        RequestKind::Discard { sector, count, secure } => {
            assert!(geometry.discard && (geometry.discard_secure || !secure));
            (sector, *count, None, true)
        }
        RequestKind::Indirect { transfer, sector, count, .. } => {
            assert!((1..=geometry.max_indirect).contains(count) && *count <= MAX_INDIRECT_SEGMENTS);
            (sector, u64::from(*count), None, *transfer == Transfer::Write)
        }
    };
    assert!(!changes || !geometry.readonly);
    assert!(u128::from(sector.0) + u128::from(sectors) <= u128::from(geometry.capacity));
    if let Some(segments) = segments {
        assert!((1..=MAX_SEGMENTS).contains(&segments.len()));
        assert_eq!(segments.bytes(), segments.sectors() * 512);
        segments_hold(segments.as_slice());
    }
}

fn segments_hold(segments: &[Segment]) {
    for segment in segments {
        assert!(usize::from(segment.offset()) + usize::from(segment.bytes()) <= crate::ids::PAGE_SIZE);
        assert!(segment.bytes() > 0);
    }
}

fn any_geometry() -> impl Strategy<Value = Geometry> {
    let capacity = prop_oneof![0..3000u64, any::<u64>()];
    let max_indirect = prop_oneof![Just(0), Just(32), Just(256), any::<u16>()];
    (capacity, any::<[bool; 5]>(), max_indirect).prop_map(|(capacity, flags, max_indirect)| {
        let [readonly, flush, barrier, discard, discard_secure] = flags;
        Geometry { capacity, readonly, flush, barrier, discard, discard_secure, max_indirect }
    })
}

fn any_abi() -> impl Strategy<Value = Abi> {
    prop_oneof![Just(Abi::X86_64), Just(Abi::X86_32)]
}

/// Mostly inside its page.
fn any_segment() -> impl Strategy<Value = DraftSegment> + Clone {
    let good = (0..8u8).prop_flat_map(|first| (Just(first), first..8));
    (any::<u32>(), prop_oneof![1 => (0..10u8, 0..10u8), 15 => good])
        .prop_map(|(gref, (first, last))| DraftSegment { gref: GrantRef(gref), first, last })
}

/// Fields near their limits, so that a good share of the drafts is valid.
fn any_draft() -> impl Strategy<Value = Draft> {
    (
        0..5u8,
        0..14u8,
        any::<u16>(),
        any::<u64>(),
        prop_oneof![0..200u64, any::<u64>()],
        proptest::array::uniform11(any_segment()),
    )
        .prop_map(|(op, nr_segments, handle, id, sector, segments)| Draft {
            op,
            nr_segments,
            handle,
            id,
            sector,
            segments,
        })
}

proptest! {
    #[test]
    fn any_bytes_give_a_request_in_bounds_or_a_rejection(
        bytes in any::<[[u8; 16]; 7]>(),
        op in prop_oneof![0..8u8, any::<u8>()],
        abi in any_abi(),
        geometry in any_geometry(),
    ) {
        let mut bytes: [u8; MAX_ENTRY_SIZE] = bytes.concat().try_into().unwrap();
        bytes[0] = op;
        let raw = RawRequest::new(bytes, abi);
        match parse(&raw, &geometry) {
            Ok(request) => {
                let inner = if op == op::INDIRECT { bytes[1] } else { op };
                prop_assert_eq!(request.op, inner);
                bounds_hold(&request.kind, &geometry);
            }
            Err(rejection) => prop_assert_ne!(rejection.status, Status::Okay),
        }
    }

    #[test]
    fn every_field_of_an_accepted_request_is_the_frontends(
        draft in any_draft(),
        abi in any_abi(),
        geometry in any_geometry(),
    ) {
        match parse(&draft.encode(abi), &geometry) {
            Err(rejection) => prop_assert_eq!(rejection.id, draft.id),
            Ok(request) => {
                bounds_hold(&request.kind, &geometry);
                prop_assert_eq!((request.id, request.op), (draft.id, draft.op));
                let (op, sector, segments) = match request.kind {
                    RequestKind::Flush => {
                        prop_assert_eq!(draft.op, op::FLUSH_DISKCACHE);
                        return Ok(());
                    }
                    RequestKind::Read { sector, segments } => (op::READ, sector, segments),
                    RequestKind::Write { sector, segments } => (op::WRITE, sector, segments),
                    RequestKind::Barrier { sector, segments } => (op::WRITE_BARRIER, sector, segments),
                    RequestKind::Discard { .. } | RequestKind::Indirect { .. } => unreachable!(),
                };
                prop_assert_eq!((op, sector.0), (draft.op, draft.sector));
                let back: Vec<DraftSegment> = segments.iter().map(DraftSegment::from).collect();
                prop_assert_eq!(&back[..], &draft.segments[..usize::from(draft.nr_segments)]);
            }
        }
    }

    #[test]
    fn bytes_behind_a_short_entry_have_no_meaning(draft in any_draft(), tail in any::<[u8; 4]>()) {
        let raw = draft.encode(Abi::X86_32);
        let mut bytes = [0; MAX_ENTRY_SIZE];
        bytes[..108].copy_from_slice(raw.as_bytes());
        bytes[108..].copy_from_slice(&tail);
        prop_assert_eq!(
            parse(&RawRequest::new(bytes, Abi::X86_32), &geometry()),
            parse(&raw, &geometry())
        );
    }
}
