//! A guest that misbehaves, against the real programs. The numbers name the cases of the catalogue in
//! `docs/hostile-inputs.md`. Whatever it does, it gets errors; the process, other disks and the image go on.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use blkif::abi::{header, op};
use blkif::encode::{Draft, DraftSegment};
use blkif::ids::PAGE_SIZE;
use blkif::{Abi, GrantRef, RawRequest, Sector, Status};
use gntdev::Access;
use integration::rig::PATIENCE;
use integration::sim::frontend::UNTOUCHED;
use proptest::prelude::*;

use super::scene::{ERROR, SECTORS, Scene, draft};

const UNSUPPORTED: i16 = Status::NotSupported.wire();

/// Sets the ring's request counter to `value` and rings the bell.
fn overrun(value: impl Fn(u32) -> u32) {
    let mut scene = Scene::new();
    scene.still_works();
    let (ring, domain) = scene.hostile.ring();
    let word = ring.word(domain, header::REQ_PROD);
    word.store(value(word.load(Ordering::Relaxed)), Ordering::Release);
    scene.hostile.notify().unwrap();
    // Its ring is stopped; nothing else is, and its disk can be taken away.
    scene.others_still_work();
    assert_eq!(scene.rig.tap_ctl(&["list"]).out.lines().count(), 2);
    scene.rig.destroy(&scene.device);
    scene.others_still_work();
}

#[test]
fn h1_a_producer_one_too_far_stops_its_ring_only() {
    overrun(|prod| prod.wrapping_add(33));
}

#[test]
fn h2_a_producer_that_jumps_stops_its_ring_only() {
    overrun(|prod| prod.wrapping_add(1 << 31));
    overrun(|prod| prod.wrapping_add(u32::MAX));
}

#[test]
fn h3_a_producer_that_goes_back_stops_its_ring_only() {
    overrun(|prod| prod.wrapping_sub(2));
}

#[test]
fn h9_h10_segment_counts_out_of_range_are_errors() {
    let mut scene = Scene::new();
    let page = scene.page();
    for count in [0, 12, 31, 255] {
        for op in [op::READ, op::WRITE] {
            let draft = Draft { nr_segments: count, ..draft(op, 0, &[page; 11]) };
            assert_eq!(scene.raw(&draft), ERROR, "{count} segments");
        }
    }
    scene.still_works();
}

#[test]
fn h11_a_flush_with_stale_segments_is_a_flush() {
    let mut scene = Scene::new();
    let page = scene.page();
    for count in [0, 1, 11, 255] {
        let draft = Draft { nr_segments: count, ..draft(op::FLUSH_DISKCACHE, u64::MAX, &[page; 11]) };
        assert_eq!(scene.raw(&draft), 0);
    }
    scene.still_works();
}

#[test]
fn h12_segments_outside_their_page_touch_nothing() {
    let mut scene = Scene::new();
    let (frame, gref) = scene.hostile.page(Access::ReadWrite);
    scene.hostile.domain().write(frame, 0, &[UNTOUCHED; PAGE_SIZE]);
    for (first, last) in [(0, 8), (0, 255), (7, 8), (8, 8), (4, 3), (128, 255), (255, 0)] {
        let segment = DraftSegment { gref, first, last };
        assert_eq!(scene.raw(&draft(op::READ, 0, &[segment])), ERROR, "{first} to {last}");
        assert_eq!(scene.raw(&draft(op::WRITE, 0, &[segment])), ERROR, "{first} to {last}");
    }
    let mut page = [0; PAGE_SIZE];
    scene.hostile.domain().read(frame, 0, &mut page);
    assert_eq!(page, [UNTOUCHED; PAGE_SIZE]);
    scene.still_works();
}

#[test]
fn h13_h14_sectors_beyond_the_end_are_errors_and_the_last_one_is_not() {
    let mut scene = Scene::new();
    let page = scene.page();
    for op in [op::READ, op::WRITE] {
        for sector in [SECTORS - 7, SECTORS, u64::MAX, u64::MAX - 7, 1 << 55] {
            assert_eq!(scene.raw(&draft(op, sector, &[page])), ERROR, "sector {sector}");
        }
        assert_eq!(scene.raw(&draft(op, SECTORS - 8, &[page])), 0);
    }
    assert_eq!(
        std::fs::metadata(scene.rig.path("1.img")).unwrap().len(),
        SECTORS * 512,
        "the image did not grow"
    );
    scene.still_works();
}

#[test]
fn h15_unknown_operations_are_not_supported() {
    let mut scene = Scene::new();
    let page = scene.page();
    for op in [4, 7, 8, 100, 255] {
        assert_eq!(scene.raw(&draft(op, 0, &[page])), UNSUPPORTED, "operation {op}");
    }
    scene.still_works();
}

#[test]
fn h17_one_page_in_many_segments_and_requests_works() {
    let mut scene = Scene::new();
    let page = scene.page();
    let mut out = VecDeque::new();
    for id in 0..16 {
        let op = if id % 2 == 0 { op::READ } else { op::WRITE };
        scene.hostile.put_raw(1000 + id, &Draft::new(op, 1000 + id, 0, &[page; 11]).encode(Abi::X86_64));
    }
    scene.hostile.kick().unwrap();
    while out.len() < 16 {
        scene.hostile.wait(&mut out, PATIENCE).unwrap();
    }
    assert!(out.iter().all(|completion| completion.is_okay()));
    scene.still_works();
}

#[test]
fn h18_the_ring_itself_as_data_does_not_take_the_backend_down() {
    let mut scene = Scene::new();
    let gref = scene.hostile.ring_refs()[0];
    // Writing the ring to the disk works; reading the disk's zeros over the ring breaks the guest's own disk at most.
    assert_eq!(scene.raw(&draft(op::WRITE, 0, &[DraftSegment { gref, first: 0, last: 7 }])), 0);
    let read = Draft::new(op::READ, 78, 16, &[DraftSegment { gref, first: 0, last: 7 }]);
    scene.hostile.put_raw(78, &read.encode(Abi::X86_64));
    scene.hostile.kick().unwrap();
    scene.others_still_work();
    scene.rig.destroy(&scene.device);
    scene.others_still_work();
}

#[test]
fn h19_grants_that_are_none_of_its_own_are_errors_for_their_request_only() {
    let mut scene = Scene::new();
    let good = scene.page();
    let mut out = VecDeque::new();
    let bad = [u32::MAX, 0, 7, 1_000_000];
    for (n, gref) in (0u64..).zip(bad) {
        let segment = DraftSegment { gref: GrantRef(gref), first: 0, last: 7 };
        scene.hostile.put_raw(2 * n, &Draft::new(op::WRITE, 2 * n, 0, &[good, segment]).encode(Abi::X86_64));
        scene.hostile.put_raw(2 * n + 1, &Draft::new(op::WRITE, 2 * n + 1, 0, &[good]).encode(Abi::X86_64));
    }
    scene.hostile.kick().unwrap();
    while out.len() < 2 * bad.len() {
        scene.hostile.wait(&mut out, PATIENCE).unwrap();
    }
    for completion in &out {
        let wanted = if completion.id % 2 == 0 { ERROR } else { 0 };
        assert_eq!(completion.status, wanted, "request {}", completion.id);
    }
    scene.still_works();
}

#[test]
fn h20_any_id_comes_back_as_it_was() {
    let mut scene = Scene::new();
    let page = scene.page();
    for id in [0, 1, u64::MAX, 0x8000_0000_0000_0000, 0x0123_4567_89ab_cdef] {
        assert_eq!(scene.raw(&Draft { id, ..draft(op::READ, 0, &[page]) }), 0);
    }
    // The same id twice at the same time.
    for _ in 0..2 {
        scene.hostile.put_raw(5, &Draft::new(op::READ, 5, 0, &[page]).encode(Abi::X86_64));
    }
    scene.hostile.kick().unwrap();
    let mut out = VecDeque::new();
    while out.len() < 2 {
        scene.hostile.wait(&mut out, PATIENCE).unwrap();
    }
    assert!(out.iter().all(|completion| completion.id == 5 && completion.is_okay()));
    scene.still_works();
}

#[test]
fn h21_handle_and_padding_mean_nothing() {
    let mut scene = Scene::new();
    let page = scene.page();
    assert_eq!(scene.raw(&Draft { handle: 0xdead, ..draft(op::READ, 0, &[page]) }), 0);
    scene.still_works();
}

/// What a guest gets to see of the backend's memory: the sectors it asked for, and nothing else.
#[test]
fn h36_no_memory_of_the_backend_shows_through() {
    let mut scene = Scene::new();
    scene.honest.write(Sector(0), &[0x77; 4096]).unwrap();
    scene.hostile.write(Sector(0), &[0x33; 45056]).unwrap();
    let (frame, gref) = scene.hostile.page(Access::ReadWrite);
    scene.hostile.domain().write(frame, 0, &[UNTOUCHED; PAGE_SIZE]);
    let segment = DraftSegment { gref, first: 3, last: 5 };
    assert_eq!(scene.raw(&draft(op::READ, 1024, &[segment])), 0);
    let mut page = [0; PAGE_SIZE];
    scene.hostile.domain().read(frame, 0, &mut page);
    assert!(
        page[..3 * 512].iter().chain(&page[6 * 512..]).all(|&byte| byte == UNTOUCHED),
        "outside the segment"
    );
    assert!(page[3 * 512..6 * 512].iter().all(|&byte| byte == 0), "sectors never written");
    scene.still_works();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// Whole rings of random bytes: every request is answered, and the programs go on.
    #[test]
    fn random_requests_are_all_answered(entries in prop::collection::vec(any::<[u8; 32]>(), 1..200)) {
        let mut scene = Scene::new();
        let page = scene.page();
        for chunk in entries.chunks(32) {
            for entry in chunk {
                let mut bytes = [0; 112];
                for (place, byte) in bytes.iter_mut().zip(entry.iter().cycle()) {
                    *place = *byte;
                }
                // Half of them with a page that exists, so that some get further.
                if entry[0] % 2 == 0 {
                    bytes[0] %= 4;
                    bytes[1] %= 14;
                    bytes[16..24].copy_from_slice(&u64::from(entry[5]).to_le_bytes());
                    bytes[24..28].copy_from_slice(&page.gref.0.to_le_bytes());
                }
                let raw = RawRequest::new(bytes, Abi::X86_64);
                let id = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
                scene.hostile.put_raw(id, &raw);
            }
            scene.hostile.kick().unwrap();
            let mut out = VecDeque::new();
            while out.len() < chunk.len() {
                scene.hostile.wait(&mut out, PATIENCE).unwrap();
            }
        }
        scene.still_works();
    }
}
