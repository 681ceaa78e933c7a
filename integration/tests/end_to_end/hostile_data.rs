//! Cases 16 and 23 to 35 of the catalogue: grants, discards and indirect requests that lie, and pages that change under
//! the backend's eyes. Each is tried with grants that stay mapped and with those that are copied.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use blkif::abi::{MAX_INDIRECT_PAGES, SEGMENT_SIZE, header, op};
use blkif::encode::{DiscardDraft, Draft, DraftSegment};
use blkif::ids::PAGE_SIZE;
use blkif::{Abi, DomId, GrantRef, Sector};
use gntdev::Access;
use integration::rig::PATIENCE;
use integration::sim::domain::{DomainMemory, Frame, Refusal};
use integration::sim::frontend::{Frontend, Io, Shape, UNTOUCHED};

use super::scene::{ERROR, SECTORS, Scene, draft, indirect};
use super::support::*;

const ABI: Abi = Abi::X86_64;

fn whole(gref: GrantRef) -> DraftSegment {
    DraftSegment { gref, first: 0, last: 7 }
}

/// Read and write requests, direct and indirect, over these segments, each followed by one over `good` alone. Every second
/// answer is thus a success, whatever the others are.
fn among_good_ones(scene: &mut Scene, ops: &[u8], bad: &[DraftSegment], good: DraftSegment) -> Vec<i16> {
    let mut long = vec![good; 20];
    long.extend_from_slice(bad);
    let (_, page) = scene.segments(&long);
    let mut entries = Vec::new();
    for &op in ops {
        entries.push(Draft::new(op, 0, 0, bad).encode(ABI));
        entries.push(Draft::new(op, 0, 256, &[good]).encode(ABI));
        entries.push(indirect(op, 0, long.len() as u16, page).encode(ABI));
        entries.push(Draft::new(op, 0, 512, &[good]).encode(ABI));
    }
    // The id is the place in the batch.
    let numbered: Vec<_> = (0u64..)
        .zip(entries)
        .map(|(id, entry)| {
            let mut bytes = [0; 112];
            bytes.copy_from_slice(entry.as_bytes());
            bytes[8..16].copy_from_slice(&id.to_le_bytes());
            (id, blkif::RawRequest::new(bytes, ABI))
        })
        .collect();
    let statuses = scene.batch(&numbered);
    assert!(statuses.iter().skip(1).step_by(2).all(|status| *status == 0), "{statuses:?}");
    statuses.into_iter().step_by(2).collect()
}

#[test]
fn h16_a_grant_that_gives_too_little_fails_its_own_request_only() {
    Scene::each(|mut scene| {
        let good = scene.page();
        let backend = scene.hostile.shape().backend;
        let domain = scene.hostile.domain();
        let frame = domain.allocate(1);
        let foreign = domain.grant(frame, DomId(7), Access::ReadWrite);
        let revoked = domain.grant(frame, backend, Access::ReadWrite);
        domain.revoke(revoked);
        let beyond = domain.grant(Frame(u32::MAX), backend, Access::ReadWrite);
        for gref in [foreign, revoked, beyond, GrantRef(0), GrantRef(5), GrantRef(40_000), GrantRef(u32::MAX)]
        {
            let statuses =
                among_good_ones(&mut scene, &[op::READ, op::WRITE], &[good, whole(gref), good], good);
            assert!(statuses.iter().all(|status| *status == ERROR), "{gref}: {statuses:?}");
        }
        // Enough for the backend to read from, not to write to.
        let (frame, readonly) = scene.hostile.page(Access::ReadOnly);
        scene.hostile.domain().write(frame, 0, &[UNTOUCHED; PAGE_SIZE]);
        let statuses = among_good_ones(&mut scene, &[op::READ], &[whole(readonly)], good);
        assert!(statuses.iter().all(|status| *status == ERROR), "{statuses:?}");
        let mut page = [0; PAGE_SIZE];
        scene.hostile.domain().read(frame, 0, &mut page);
        assert_eq!(page, [UNTOUCHED; PAGE_SIZE]);
        scene.still_works();
    });
}

#[test]
fn h16_a_grant_revoked_in_flight_fails_at_most_its_own_request() {
    Scene::each(|mut scene| {
        let backend = scene.hostile.shape().backend;
        for round in 0..100 {
            let (frame, gref) = scene.hostile.page(Access::ReadWrite);
            let op = if round % 2 == 0 { op::READ } else { op::WRITE };
            let bad = Draft::new(op, 1 << 40, 0, &[whole(gref)]).encode(ABI);
            scene.hostile.put_raw(1 << 40, &bad);
            let good = scene.hostile.submit(Io::Read(Sector(64), 4096));
            scene.hostile.kick().unwrap();
            scene.hostile.domain().revoke(gref);
            for answer in answers(&mut scene.hostile, 2) {
                assert!(answer.is_okay() || answer.id != good && answer.status == ERROR);
            }
            // For another page now, in the same place of the table.
            scene.hostile.domain().set_grant(gref, frame, backend, Access::ReadWrite);
        }
        scene.still_works();
    });
}

#[test]
fn h17_one_page_many_times_is_not_mapped_as_often() {
    Scene::each(|mut scene| {
        let page = scene.page();
        let (_, list) = scene.segments(&[page; 256]);
        let entries: Vec<_> = (0..16)
            .map(|id| {
                let mut draft = indirect(if id % 2 == 0 { op::READ } else { op::WRITE }, 0, 256, list);
                draft.id = id;
                (id, draft.encode(ABI))
            })
            .collect();
        assert!(scene.batch(&entries).iter().all(|status| *status == 0));
        assert!(scene.hostile.domain().mappings(page.gref) <= 1);
        scene.still_works();
    });
}

#[test]
fn h23_discards_out_of_range_are_errors_and_empty_or_crooked_ones_are_not() {
    let mut scene = Scene::new();
    let discard = |sector, count| DiscardDraft { id: 9, sector, count, ..DiscardDraft::default() };
    scene.hostile.write(Sector(0), &pattern(4, SECTORS as usize * 512)).unwrap();
    let wrong = [
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (0, SECTORS + 1),
        (0, u64::MAX),
        (1, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (1 << 55, 8),
    ];
    for (sector, count) in wrong {
        assert_eq!(scene.discard(&discard(sector, count)), ERROR, "{count} at {sector}");
    }
    for sector in [0, 5, SECTORS - 1] {
        assert_eq!(scene.discard(&discard(sector, 0)), 0);
    }
    assert!(
        scene.hostile.read(Sector(0), SECTORS as usize * 512).unwrap() == pattern(4, SECTORS as usize * 512)
    );
    // Heads and tails that are no whole block, and a flag that was not offered, with bits that mean nothing.
    for flag in [0, 1, 0xfe, 0xff] {
        let crooked = DiscardDraft { flag, ..discard(3, 17) };
        assert_eq!(scene.discard(&crooked), 0);
    }
    let data = scene.hostile.read(Sector(0), SECTORS as usize * 512).unwrap();
    let before = pattern(4, SECTORS as usize * 512);
    assert!(data[..3 * 512] == before[..3 * 512] && data[20 * 512..] == before[20 * 512..]);
    assert_eq!(scene.discard(&discard(0, SECTORS)), 0);
    scene.still_works();
}

#[test]
fn h24_discards_that_race_with_writes_leave_one_or_the_other() {
    Scene::each(|mut scene| {
        for round in 0..60u64 {
            let sector = Sector(round % 8 * 8);
            for n in 0..8u8 {
                scene.hostile.submit(Io::Write(sector, &[n + 1; 4096]));
                scene.hostile.submit(Io::Discard { sector, count: 8, secure: n % 2 == 0 });
            }
            scene.hostile.kick().unwrap();
            assert!(answers(&mut scene.hostile, 16).iter().all(|answer| answer.is_okay()));
            let seen = scene.hostile.read(sector, 4096).unwrap();
            assert!(seen.iter().all(|byte| *byte <= 8), "{:?}", &seen[..8]);
        }
        scene.still_works();
    });
}

#[test]
fn h25_storms_of_flushes_and_barriers_are_answered_and_hold_up_nobody_else() {
    let mut scene = Scene::with(Shape { order: blkif::RingOrder::MAX, ..Shape::simple(DomId(1)) });
    for round in 0..6 {
        for n in 0..512u64 {
            let barrier = Io::Barrier(Sector(n), &[7; 512]);
            scene.hostile.submit(if round % 2 == 0 || n % 16 > 0 { Io::Flush } else { barrier });
        }
        scene.hostile.kick().unwrap();
        scene.others_still_work();
        assert!(answers(&mut scene.hostile, 512).iter().all(|answer| answer.is_okay()));
    }
    scene.still_works();
}

#[test]
fn h26_indirect_requests_with_counts_out_of_range_are_errors() {
    Scene::each(|mut scene| {
        let page = scene.page();
        let (_, list) = scene.segments(&[page; 512]);
        for count in [0, 257, 511, 512, 513, 4096, 4097, u16::MAX] {
            for op in [op::READ, op::WRITE] {
                assert_eq!(scene.indirect(&indirect(op, 0, count, list)), ERROR, "{count} segments");
            }
        }
        for count in [1, 11, 256] {
            assert_eq!(scene.indirect(&indirect(op::READ, 0, count, list)), 0, "{count} segments");
        }
        scene.still_works();
    });
}

#[test]
fn h27_indirect_requests_of_anything_but_reads_and_writes_are_refused_with_the_inner_operation() {
    Scene::each(|mut scene| {
        let page = scene.page();
        let (_, list) = scene.segments(&[page; 16]);
        for op in [op::WRITE_BARRIER, op::FLUSH_DISKCACHE, 4, op::DISCARD, op::INDIRECT, 7, 255] {
            assert!(scene.indirect(&indirect(op, 0, 16, list)) < 0, "operation {op}");
        }
        scene.still_works();
    });
}

#[test]
fn h28_bad_pages_of_segments_are_errors_and_odd_ones_are_judged_like_others() {
    Scene::each(|mut scene| {
        let page = scene.page();
        for gref in [GrantRef(0), GrantRef(40_000), GrantRef(u32::MAX)] {
            assert_eq!(scene.indirect(&indirect(op::READ, 0, 20, gref)), ERROR, "{gref}");
        }
        // The page of segments is also the data, and the target of what is read: the copy was judged, so all is well.
        let (frame, own) = scene.hostile.page(Access::ReadWrite);
        let segments = [whole(own); 20];
        integration::sim::frontend::write_segments(scene.hostile.domain(), frame, &segments);
        assert_eq!(scene.indirect(&indirect(op::WRITE, 0, 20, own)), 0);
        assert_eq!(scene.indirect(&indirect(op::READ, 512, 20, own)), 0);
        // Now it holds zeros: twenty times grant 0.
        assert_eq!(scene.indirect(&indirect(op::WRITE, 0, 20, own)), ERROR);
        // Pages beyond the first are not looked at, as there are too few segments to need them.
        let (_, list) = scene.segments(&[page; 20]);
        let mut draft = indirect(op::READ, 0, 20, list);
        draft.pages = [GrantRef(u32::MAX); MAX_INDIRECT_PAGES];
        draft.pages[0] = list;
        assert_eq!(scene.indirect(&draft), 0);
        // The ring's own page as a page of segments: whatever stands there is judged.
        let ring = scene.hostile.ring_refs()[0];
        assert!(scene.indirect(&indirect(op::READ, 0, 200, ring)) <= 0);
        // Segments that reach out of their pages, or beyond the disk.
        for bad in [(0, 8), (0, 255), (4, 3), (128, 255)] {
            let mut list = [page; 64];
            list[63] = DraftSegment { gref: page.gref, first: bad.0, last: bad.1 };
            let (_, list) = scene.segments(&list);
            assert_eq!(scene.indirect(&indirect(op::READ, 0, 64, list)), ERROR, "{bad:?}");
        }
        let (_, list) = scene.segments(&[page; 256]);
        for sector in [SECTORS - 2047, SECTORS, u64::MAX, u64::MAX - 2047] {
            assert_eq!(scene.indirect(&indirect(op::WRITE, sector, 256, list)), ERROR, "sector {sector}");
        }
        assert_eq!(scene.indirect(&indirect(op::WRITE, 0, 256, list)), 0);
        scene.still_works();
    });
}

/// Another mapping of the hostile guest's memory, for its other processor.
fn memory(scene: &Scene) -> DomainMemory {
    DomainMemory::open(&scene.rig.host.xen(), DomId(1)).unwrap()
}

/// Every byte of the guest that it did not name in a request: filled before, compared after.
struct Guard(Vec<Frame>);

impl Guard {
    fn new(frontend: &mut Frontend) -> Guard {
        let frames: Vec<_> = (0..16).map(|_| frontend.page(Access::ReadWrite).0).collect();
        for frame in &frames {
            frontend.domain().write(*frame, 0, &[UNTOUCHED; PAGE_SIZE]);
        }
        Guard(frames)
    }

    fn check(&self, frontend: &mut Frontend) {
        for frame in &self.0 {
            let mut page = [0; PAGE_SIZE];
            frontend.domain().read(*frame, 0, &mut page);
            assert_eq!(page, [UNTOUCHED; PAGE_SIZE]);
        }
    }
}

#[test]
fn h30_a_request_rewritten_after_it_was_pushed_is_one_or_the_other() {
    Scene::each(|mut scene| {
        let page = scene.page();
        let guard = Guard::new(&mut scene.hostile);
        let good = draft(op::READ, 0, &[page]).encode(ABI);
        let mut wild = [0xff; 112];
        wild[0] = op::WRITE;
        wild[1] = 11;
        let memory = memory(&scene);
        let (ring, domain) = scene.hostile.ring();
        let places: Vec<usize> = {
            let base = domain.offset(ring.frames().next().unwrap());
            (0..32).map(|slot| base + ring.entry_offset(slot)).collect()
        };
        let disturb = |round: u64| {
            for place in &places {
                let from = if round.is_multiple_of(2) { &wild[..] } else { good.as_bytes() };
                memory.memory().write(*place, from);
            }
        };
        scene.while_disturbed(disturb, |scene| {
            // Answers are torn by the guest itself, in the same places; that there are as many as requests is what counts.
            for round in 1..=500u32 {
                let (ring, domain) = scene.hostile.ring();
                for slot in 0..32 {
                    ring.poke(domain, ring.entry_offset(slot), good.as_bytes());
                }
                ring.word(domain, header::REQ_PROD).store(round * 32, Ordering::Release);
                scene.hostile.notify().unwrap();
                let start = Instant::now();
                let (ring, domain) = scene.hostile.ring();
                while ring.word(domain, header::RSP_PROD).load(Ordering::Acquire) != round * 32 {
                    assert!(start.elapsed() < PATIENCE, "round {round} is not answered");
                    std::thread::yield_now();
                }
            }
        });
        guard.check(&mut scene.hostile);
        assert_eq!(std::fs::metadata(scene.rig.path("1.img")).unwrap().len(), SECTORS * 512);
        scene.rig.destroy(&scene.device);
        scene.others_still_work();
    });
}

#[test]
fn h31_segments_rewritten_while_they_are_looked_at_are_judged_as_copied() {
    Scene::each(|mut scene| {
        let page = scene.page();
        let guard = Guard::new(&mut scene.hostile);
        let (frame, list) = scene.segments(&[page; 256]);
        let memory = memory(&scene);
        let place = scene.hostile.domain().offset(frame);
        let wild = [
            DraftSegment { gref: page.gref, first: 0, last: 255 },
            DraftSegment { gref: page.gref, first: 128, last: 255 },
            DraftSegment { gref: GrantRef(u32::MAX), first: 0, last: 7 },
            page,
        ];
        let disturb = |round: u64| {
            let segment = wild[(round % 4) as usize].encode();
            for n in [0, 100, 255] {
                memory.memory().write(place + n * SEGMENT_SIZE, &segment);
            }
        };
        let mut refused = 0;
        scene.while_disturbed(disturb, |scene| {
            for round in 0..1500 {
                let op = if round % 2 == 0 { op::READ } else { op::WRITE };
                let status = scene.indirect(&indirect(op, 0, 256, list));
                assert!(status == 0 || status == ERROR);
                refused += u32::from(status == ERROR);
            }
        });
        assert!(refused > 0, "the race was never met");
        guard.check(&mut scene.hostile);
        scene.still_works();
    });
}

#[test]
fn h32_data_rewritten_while_it_is_written_is_some_of_both_and_the_image_stays_sound() {
    for persistent in [false, true] {
        let rig = rig();
        let (path, params) = vhd(&rig, "a.vhd", 16);
        let shape = Shape { persistent, ..Shape::simple(DomId(1)) };
        let (device, mut frontend) = guest(&rig, 1, &params, shape);
        let (frame, gref) = frontend.page(Access::ReadWrite);
        let place = frontend.domain().offset(frame);
        frontend.domain().write(frame, 0, &[0xaa; PAGE_SIZE]);
        let memory = DomainMemory::open(&rig.host.xen(), DomId(1)).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    memory.memory().write(place, &[0x55; PAGE_SIZE]);
                    memory.memory().write(place, &[0xaa; PAGE_SIZE]);
                }
            });
            for n in 0..150 {
                let entry = Draft::new(op::WRITE, 1 << 40, n * 192, &[whole(gref)]).encode(ABI);
                frontend.put_raw(1 << 40, &entry);
                frontend.kick().unwrap();
                assert!(answers(&mut frontend, 1)[0].is_okay());
            }
            stop.store(true, Ordering::Relaxed);
        });
        for n in 0..150 {
            let data = frontend.read(Sector(n * 192), 4096).unwrap();
            assert!(data.iter().all(|byte| [0x55, 0xaa].contains(byte)));
            assert!(frontend.read(Sector(n * 192 + 8), 512).unwrap() == [0; 512]);
        }
        rig.unplug(&device);
        assert!(vhd_util(&["check", "-n", path.to_str().unwrap()]).contains("is valid"));
    }
}

#[test]
fn h33_single_sectors_anywhere_land_where_they_belong() {
    for persistent in [false, true] {
        let rig = rig();
        let (path, params) = raw(&rig, "a.img", MIB);
        let shape = Shape { persistent, ..Shape::simple(DomId(1)) };
        let (device, mut frontend) = guest(&rig, 1, &params, shape);
        let data = pattern(3, 64 * 512);
        // Backwards and all at once, so that neighbours are on their way together.
        for n in (0..64usize).rev() {
            if frontend.free_slots() == 0 {
                frontend.kick().unwrap();
                answers(&mut frontend, 32);
            }
            frontend.submit(Io::Write(Sector(3 + n as u64), &data[n * 512..][..512]));
        }
        frontend.kick().unwrap();
        while frontend.outstanding() > 0 {
            answers(&mut frontend, 1);
        }
        rig.unplug(&device);
        let disk = std::fs::read(path).unwrap();
        assert!(disk[..3 * 512].iter().chain(&disk[67 * 512..]).all(|byte| *byte == 0));
        assert!(disk[3 * 512..67 * 512] == data);
    }
}

#[test]
fn h35_grants_that_the_hypervisor_refuses_are_errors_as_long_as_it_does() {
    Scene::each(|mut scene| {
        scene.still_works();
        for (maps, copies) in [(true, true), (false, true), (true, false)] {
            scene.hostile.domain().refuse(Refusal { maps, copies });
            for n in 0..32 {
                // Fresh pages: those mapped before may go on working.
                let page = scene.page();
                let op = if n % 2 == 0 { op::READ } else { op::WRITE };
                let status = scene.raw(&draft(op, 0, &[page]));
                assert!(status == ERROR || !(maps && copies), "status {status}");
            }
            scene.others_still_work();
            scene.hostile.domain().refuse(Refusal::default());
            scene.still_works();
        }
    });
}

#[test]
fn h35_grants_that_come_and_go_while_they_are_used_hang_nothing() {
    Scene::each(|mut scene| {
        let (frame, gref) = scene.hostile.page(Access::ReadWrite);
        let place = scene.hostile.domain().offset(frame);
        let memory = memory(&scene);
        // The entry of the table: flags and domain, then the frame. Flags of 0 give nothing.
        let entry = PAGE_SIZE + gref.0 as usize * 8;
        let mut given = [0; 4];
        memory.memory().read(entry, &mut given);
        let disturb = |round: u64| {
            memory.memory().write(entry, if round.is_multiple_of(2) { &[0; 4] } else { &given });
            memory.memory().write(place, &[round as u8; 64]);
        };
        scene.while_disturbed(disturb, |scene| {
            for round in 0..2000u64 {
                let op = if round % 2 == 0 { op::READ } else { op::WRITE };
                let status = scene.raw(&draft(op, round % 64 * 8, &[whole(gref)]));
                assert!(status == 0 || status == ERROR);
            }
        });
        scene.still_works();
    });
}
