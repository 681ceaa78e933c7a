//! INDIRECT: the entry, and the segments in its page.

use super::*;
use crate::encode::IndirectDraft;

fn draft(indirect_op: u8, nr_segments: u16) -> IndirectDraft {
    let mut draft = IndirectDraft { indirect_op, nr_segments, id: 5, ..IndirectDraft::default() };
    draft.pages[0] = GrantRef(99);
    draft
}

fn parse_entry(draft: &IndirectDraft, geometry: &Geometry) -> Result<Request, Rejection> {
    let [a, b] = ABIS.map(|abi| parse(&draft.encode(abi), geometry));
    assert_eq!(a, b);
    a
}

fn page(segments: &[DraftSegment]) -> Vec<u8> {
    segments.iter().flat_map(|segment| segment.encode()).collect()
}

fn parse_page(segments: &[DraftSegment], sector: u64) -> Result<(u32, Vec<Segment>), Reason> {
    let mut out = vec![Segment::default(); 3];
    let sectors = parse_indirect(&page(segments), Sector(sector), Transfer::Write, &geometry(), &mut out)?;
    Ok((sectors, out))
}

#[test]
fn indirect_request_keeps_every_field_and_answers_with_the_inner_operation() {
    for (op, transfer) in [(op::READ, Transfer::Read), (op::WRITE, Transfer::Write)] {
        let draft = IndirectDraft { sector: 7, handle: 0xdead, ..draft(op, 256) };
        let kind = RequestKind::Indirect { transfer, sector: Sector(7), count: 256, page: GrantRef(99) };
        assert_eq!(parse_entry(&draft, &geometry()), Ok(Request { id: 5, op, kind }));
    }
}

#[test]
fn h26_no_segments_or_more_than_offered_are_refused() {
    let few = Geometry { max_indirect: 32, ..geometry() };
    let more = Geometry { max_indirect: u16::MAX, ..geometry() };
    for (count, offered, limit) in
        [(33, few, 32), (257, geometry(), 256), (257, more, 256), (65535, more, 256)]
    {
        let rejection = parse_entry(&draft(op::WRITE, count), &offered).unwrap_err();
        let reason = Reason::TooManySegments { count: count.into(), limit };
        assert_eq!(rejection, Rejection { id: 5, op: op::WRITE, status: Status::Error, reason });
    }
    let rejection = parse_entry(&draft(op::READ, 0), &geometry()).unwrap_err();
    assert_eq!(
        (rejection.op, rejection.status, rejection.reason),
        (op::READ, Status::Error, Reason::NoSegments)
    );
}

#[test]
fn h27_only_reads_and_writes_may_be_indirect() {
    for op in 2..=255 {
        let rejection = parse_entry(&draft(op, 1), &geometry()).unwrap_err();
        let expected = Rejection { id: 5, op, status: Status::Error, reason: Reason::NotIndirect { op } };
        assert_eq!(rejection, expected);
    }
}

#[test]
fn h29_indirect_that_was_not_offered_is_not_supported_and_echoes_the_inner_operation() {
    let without = Geometry { max_indirect: 0, ..geometry() };
    for op in [op::READ, op::WRITE, op::FLUSH_DISKCACHE, op::INDIRECT, 255] {
        let rejection = parse_entry(&draft(op, 1), &without).unwrap_err();
        assert_eq!((rejection.op, rejection.status), (op, Status::NotSupported));
    }
}

#[test]
fn h22_indirect_write_to_a_read_only_disk_is_refused_at_both_steps() {
    let readonly = Geometry { readonly: true, ..geometry() };
    let rejection = parse_entry(&draft(op::WRITE, 1), &readonly).unwrap_err();
    assert_eq!((rejection.status, rejection.reason), (Status::Error, Reason::ReadOnly));
    assert!(parse_entry(&draft(op::READ, 1), &readonly).is_ok());
    let (bytes, mut out) = (page(&[segment(0, 7)]), Vec::new());
    let judge =
        |transfer, out: &mut Vec<Segment>| parse_indirect(&bytes, Sector(0), transfer, &readonly, out);
    assert_eq!(judge(Transfer::Write, &mut out), Err(Reason::ReadOnly));
    assert_eq!(judge(Transfer::Read, &mut out), Ok(8));
}

#[test]
fn h13_indirect_far_beyond_the_end_is_refused_before_its_page_is_read() {
    for sector in [u64::MAX, 1000, 999] {
        let draft = IndirectDraft { sector, ..draft(op::READ, 2) };
        let reason = parse_entry(&draft, &geometry()).unwrap_err().reason;
        assert_eq!(reason, Reason::OutOfRange { sector: Sector(sector), count: 2 });
    }
}

#[test]
fn segments_of_the_page_come_in_order() {
    let (sectors, segments) = parse_page(&[segment(0, 7), segment(7, 7), segment(3, 5)], 988).unwrap();
    assert_eq!(sectors, 12);
    let back: Vec<DraftSegment> = segments.into_iter().map(DraftSegment::from).collect();
    assert_eq!(back, [segment(0, 7), segment(7, 7), segment(3, 5)]);
}

#[test]
fn h12_segment_of_the_page_outside_its_own_page_is_refused() {
    for (first, last) in [(0, 8), (5, 4), (128, 128), (0, 255), (255, 0)] {
        let result = parse_page(&[segment(0, 7), segment(first, last)], 0);
        assert_eq!(result, Err(Reason::BadSegment { first, last }));
    }
}

#[test]
fn h14_indirect_range_may_end_at_the_capacity_and_not_beyond() {
    assert!(parse_page(&[segment(0, 7); 2], 984).is_ok());
    let beyond = Reason::OutOfRange { sector: Sector(985), count: 16 };
    assert_eq!(parse_page(&[segment(0, 7); 2], 985), Err(beyond));
}

#[test]
fn h26_page_without_segments_or_with_too_many_is_refused() {
    assert_eq!(parse_page(&[], 0), Err(Reason::NoSegments));
    let too_many = |count| Err(Reason::TooManySegments { count, limit: 256 });
    assert_eq!(parse_page(&[segment(0, 0); 257], 0), too_many(257));
    assert_eq!(parse_page(&vec![segment(0, 0); 1 << 16], 0), too_many(1 << 16));
    assert_eq!(parse_page(&[segment(0, 0); 256], 0).map(|(sectors, _)| sectors), Ok(256));
}

#[test]
fn segments_are_judged_without_allocation_in_a_list_that_is_large_enough() {
    let mut out = Vec::with_capacity(256);
    let (place, bytes) = (out.as_ptr(), page(&[segment(0, 0); 256]));
    for _ in 0..2 {
        parse_indirect(&bytes, Sector(0), Transfer::Read, &geometry(), &mut out).unwrap();
        assert_eq!((out.len(), out.as_ptr()), (256, place));
    }
}

proptest! {
    #[test]
    fn every_field_of_an_accepted_entry_is_the_frontends(
        op in 0..4u8,
        count in prop_oneof![0..300u16, any::<u16>()],
        (handle, id, pages) in any::<(u16, u64, [u32; 8])>(),
        sector in prop_oneof![0..3000u64, any::<u64>()],
        abi in any_abi(),
        geometry in any_geometry(),
    ) {
        let pages = pages.map(GrantRef);
        let draft = IndirectDraft { indirect_op: op, nr_segments: count, handle, id, sector, pages };
        match parse(&draft.encode(abi), &geometry) {
            Err(rejection) => prop_assert_eq!((rejection.id, rejection.op), (id, op)),
            Ok(request) => {
                bounds_hold(&request.kind, &geometry);
                let transfer = if op == op::READ { Transfer::Read } else { Transfer::Write };
                let kind = RequestKind::Indirect { transfer, sector: Sector(sector), count, page: pages[0] };
                prop_assert_eq!(request, Request { id, op, kind });
            }
        }
    }

    #[test]
    fn any_page_gives_segments_in_bounds_or_a_reason(
        segments in proptest::collection::vec(any_segment(), 0..300),
        sector in prop_oneof![0..3000u64, any::<u64>()],
        write in any::<bool>(),
        geometry in any_geometry(),
        remainder in 0..8usize,
    ) {
        let mut bytes = page(&segments);
        bytes.extend(std::iter::repeat_n(0xff, remainder));
        let transfer = if write { Transfer::Write } else { Transfer::Read };
        let mut out = Vec::new();
        // The model: 128-bit sums, nothing in common with the code but the rules.
        let inside = segments.iter().all(|segment| segment.first <= segment.last && segment.last < 8);
        let sum = |segment: &DraftSegment| u128::from(segment.last) + 1 - u128::from(segment.first);
        let fine = !segments.is_empty()
            && segments.len() <= usize::from(geometry.max_indirect.min(256))
            && inside
            && !(write && geometry.readonly)
            && u128::from(sector) + segments.iter().map(sum).sum::<u128>() <= u128::from(geometry.capacity);
        let result = parse_indirect(&bytes, Sector(sector), transfer, &geometry, &mut out);
        prop_assert_eq!(result.is_ok(), fine);
        match result {
            Err(reason) => prop_assert_eq!(reason.status(), Status::Error),
            Ok(sectors) => {
                segments_hold(&out);
                prop_assert_eq!(u128::from(sectors), segments.iter().map(sum).sum::<u128>());
                let back: Vec<DraftSegment> = out.iter().copied().map(DraftSegment::from).collect();
                prop_assert_eq!(back, segments);
            }
        }
    }
}
