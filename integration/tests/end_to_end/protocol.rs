//! Everything a frontend can choose, in every combination; data is compared with a model.

use blkif::{Abi, DomId, RingOrder, Sector, Status, keys};
use integration::sim::calls::{Call, Calls};
use integration::sim::frontend::{Frontend, Io, Shape, UNTOUCHED};
use integration::sim::host::BACKEND;

use super::support::*;

const DISK: usize = 12 * MIB;

/// A storm on a fresh disk for each combination with rings of `order`.
fn every_combination_with_order(order: u32) {
    let rig = rig();
    let mut queues = vec![1, most_queues(&rig)];
    queues.dedup();
    let mut domid = 0;
    for abi in [Abi::X86_64, Abi::X86_32] {
        for persistent in [false, true] {
            for indirect in [0, 32, 256] {
                for &queues in &queues {
                    domid += 1;
                    let order = RingOrder::new(order).unwrap();
                    let shape =
                        Shape { abi, order, persistent, indirect, queues, ..Shape::simple(DomId(domid)) };
                    let (path, params) = raw(&rig, &format!("{domid}.img"), DISK);
                    let (device, mut frontend) = guest(&rig, domid, &params, shape);
                    let mut storm = Storm::new(vec![0; DISK], domid.into(), true);
                    storm.blow(&mut frontend, 150);
                    rig.unplug(&device);
                    assert_eq!(frontend.domain().mapped_pages(), 0, "{shape:?}");
                    assert!(std::fs::read(path).unwrap() == storm.model, "{shape:?}");
                }
            }
        }
    }
    rig.assert_clean();
}

#[test]
fn every_combination_with_rings_of_one_page_moves_the_right_bytes() {
    every_combination_with_order(0);
}

#[test]
fn every_combination_with_rings_of_two_pages_moves_the_right_bytes() {
    every_combination_with_order(1);
}

#[test]
fn every_combination_with_rings_of_four_pages_moves_the_right_bytes() {
    every_combination_with_order(2);
}

#[test]
fn every_combination_with_rings_of_eight_pages_moves_the_right_bytes() {
    every_combination_with_order(3);
}

#[test]
fn every_combination_with_rings_of_sixteen_pages_moves_the_right_bytes() {
    every_combination_with_order(4);
}

#[test]
fn a_vhd_serves_every_kind_of_guest_alike() {
    let rig = rig();
    let queues = most_queues(&rig);
    let (path, params) = vhd(&rig, "a.vhd", DISK / MIB);
    let mut model = vec![0; DISK];
    let base = Shape::simple(DomId(0));
    let shapes = [
        base,
        Shape { persistent: true, indirect: 32, order: RingOrder::MAX, ..base },
        Shape { abi: Abi::X86_32, indirect: 256, queues, ..base },
        Shape { abi: Abi::X86_32, persistent: true, queues, ..base },
    ];
    for (domid, shape) in (1..).zip(shapes) {
        let (device, mut frontend) = guest(&rig, domid, &params, shape);
        let mut storm = Storm::new(model, domid.into(), false);
        storm.verify(&mut frontend);
        storm.blow(&mut frontend, 600);
        rig.unplug(&device);
        assert_eq!(frontend.domain().mapped_pages(), 0, "{shape:?}");
        model = storm.model;
    }
    assert!(vhd_util(&["check", "-n", path.to_str().unwrap()]).contains("is valid"));
    rig.assert_clean();
}

#[test]
fn everything_is_offered_before_the_guest_chooses() {
    let rig = rig();
    rig.create_domain(1);
    let device = rig.write_device(1, XVDA, "aio:/nowhere", "w");
    rig.wait_value(&format!("{}/state", device.backend), "2");
    assert_eq!(published(&rig, &device, keys::FEATURE_MAX_INDIRECT_SEGMENTS), 256);
    assert_eq!(published(&rig, &device, keys::MAX_RING_PAGE_ORDER), 4);
    let processors = std::thread::available_parallelism().unwrap().get() as u64;
    assert_eq!(published(&rig, &device, keys::MULTI_QUEUE_MAX_QUEUES), processors.min(4));
    for key in [keys::FEATURE_PERSISTENT, keys::FEATURE_FLUSH_CACHE, keys::FEATURE_BARRIER] {
        assert_eq!(published(&rig, &device, key), 1, "{key}");
    }
    assert_eq!(published(&rig, &device, keys::FEATURE_DISCARD), 0, "not known before the disk is open");
}

/// Linux's frontend tells nobody, but its pages come back again and again: they are mapped at the beginning only.
#[test]
fn a_persistent_guests_pages_are_mapped_at_the_beginning_and_not_afterwards() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", DISK);
    let shape = Shape { persistent: true, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    let calls = Calls::open(&rig.host.xen(), BACKEND).unwrap();
    let round = |frontend: &mut Frontend| {
        for n in 0..16 {
            frontend.submit(Io::Write(Sector(n * 64), &pattern(n as u8, 16384)));
        }
        frontend.kick().unwrap();
        assert!(answers(frontend, 16).iter().all(|answer| answer.is_okay()));
    };
    (0..10).for_each(|_| round(&mut frontend));
    let (maps, mapped) = (calls.so_far(Call::Map), frontend.mapped_data_pages());
    // Four pages for each of at most 16 requests at a time, and once more in reverse order.
    assert!((1..=128).contains(&mapped), "{mapped} pages are mapped");
    (0..200).for_each(|_| round(&mut frontend));
    assert_eq!((calls.so_far(Call::Map), frontend.mapped_data_pages()), (maps, mapped));
    rig.unplug(&device);
    assert_eq!(frontend.domain().mapped_pages(), 0);
    rig.assert_clean();
}

/// A guest whose pages never come back would have everything mapped in the end.
#[test]
fn what_is_kept_mapped_is_bounded_and_nothing_is_when_the_disk_is_gone() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", DISK);
    let shape = Shape { persistent: true, indirect: 256, order: RingOrder::MAX, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    let mut most = 0;
    for round in 0..6u64 {
        // Each round holds pages of 40 requests of 1 MiB at the same time.
        for n in 0..40 {
            frontend.submit(Io::Read(Sector((n + round) % 10 * 2048), MIB));
        }
        frontend.kick().unwrap();
        assert!(answers(&mut frontend, 40).iter().all(|answer| answer.is_okay()));
        most = most.max(frontend.mapped_data_pages());
    }
    // Linux's blkback keeps 1056 for each ring; no guest gets a multiple of that out of us.
    assert!((1..=4096).contains(&most), "{most} pages were mapped");
    rig.unplug(&device);
    assert_eq!(frontend.domain().mapped_pages(), 0);
    rig.assert_clean();
}

#[test]
fn without_persistent_grants_no_page_of_data_stays_mapped() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", DISK);
    let shape = Shape { indirect: 256, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    // The frontend itself checks each page at the answer of its request, as Linux does.
    Storm::new(vec![0; DISK], 5, true).blow(&mut frontend, 300);
    assert_eq!(frontend.mapped_data_pages(), 0);
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_discard_frees_the_images_space_and_leaves_everything_else() {
    let rig = rig();
    let (path, params) = raw(&rig, "a.img", DISK);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    assert_eq!(published(&rig, &device, keys::FEATURE_DISCARD), 1);
    let data = pattern(1, 4 * MIB);
    frontend.write(Sector(0), &data).unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
    frontend.flush().unwrap();
    let before = blocks();
    frontend.discard(Sector(2048), 4096).unwrap();
    let seen = frontend.read(Sector(0), 4 * MIB).unwrap();
    assert!(seen[..MIB] == data[..MIB] && seen[3 * MIB..] == data[3 * MIB..]);
    assert!(seen[MIB..3 * MIB].iter().all(|byte| *byte == 0));
    assert!(blocks() < before, "{} blocks of 512 bytes before, {before} after", blocks());
    assert_eq!(std::fs::metadata(&path).unwrap().len(), DISK as u64);
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn discard_is_not_offered_and_not_served_where_it_must_not_be() {
    let rig = rig();
    let status = |frontend: &mut Frontend| {
        frontend.run(Io::Discard { sector: Sector(0), count: 8, secure: false }).unwrap().status
    };
    // A disk that has nothing to give back.
    let params = "null:4M".to_owned();
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    assert_eq!(published(&rig, &device, keys::FEATURE_DISCARD), 0);
    assert_eq!(status(&mut frontend), Status::NotSupported.wire());
    rig.unplug(&device);
    // A disk that may not be written.
    let (path, params) = raw(&rig, "b.img", MIB);
    std::fs::write(&path, pattern(3, MIB)).unwrap();
    rig.create_domain(2);
    let device = rig.plug(2, XVDA, &params, "r").unwrap();
    let mut frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(2))).unwrap();
    rig.connect(&device, &frontend);
    assert_eq!(published(&rig, &device, keys::FEATURE_DISCARD), 0);
    assert!(status(&mut frontend) < 0);
    rig.unplug(&device);
    assert!(std::fs::read(&path).unwrap() == pattern(3, MIB));
    // One whose administrator does not want it.
    rig.create_domain(3);
    let device = rig.plug_with(3, XVDA, &params, "w", &[("discard-enable", "0")]).unwrap();
    let mut frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(3))).unwrap();
    rig.connect(&device, &frontend);
    assert_eq!(published(&rig, &device, keys::FEATURE_DISCARD), 0);
    assert_eq!(status(&mut frontend), Status::NotSupported.wire());
    rig.unplug(&device);
    assert!(std::fs::read(&path).unwrap() == pattern(3, MIB));
    rig.assert_clean();
}

/// Sectors 3 to 5 of each page, through every way that data can take.
#[test]
fn h34_a_read_into_parts_of_pages_leaves_the_rest_of_them_alone() {
    use blkif::encode::{Draft, DraftSegment, IndirectDraft};
    use integration::sim::frontend::write_segments;
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    for (domid, persistent) in [(1, false), (2, true)] {
        let shape = Shape { persistent, ..Shape::simple(DomId(domid)) };
        let (device, mut frontend) = guest(&rig, domid, &params, shape);
        frontend.write(Sector(0), &pattern(9, MIB)).unwrap();
        for count in [2u16, 11, 12, 100, 256] {
            let pages: Vec<_> = (0..count).map(|_| frontend.page(gntdev::Access::ReadWrite)).collect();
            for (frame, _) in &pages {
                frontend.domain().write(*frame, 0, &[UNTOUCHED; 4096]);
            }
            let segments: Vec<_> =
                pages.iter().map(|(_, gref)| DraftSegment { gref: *gref, first: 3, last: 5 }).collect();
            let id = 1 << 40;
            let entry = if count <= 11 {
                Draft::new(blkif::abi::op::READ, id, 7, &segments).encode(Abi::X86_64)
            } else {
                let (frame, gref) = frontend.page(gntdev::Access::ReadOnly);
                write_segments(frontend.domain(), frame, &segments);
                let mut draft = IndirectDraft { nr_segments: count, id, sector: 7, ..Default::default() };
                draft.pages[0] = gref;
                draft.encode(Abi::X86_64)
            };
            frontend.put_raw(id, &entry);
            frontend.kick().unwrap();
            assert!(answers(&mut frontend, 1)[0].is_okay());
            let disk = pattern(9, MIB);
            for (n, (frame, _)) in pages.iter().enumerate() {
                let mut page = [0; 4096];
                frontend.domain().read(*frame, 0, &mut page);
                assert!(page[..1536].iter().chain(&page[3072..]).all(|byte| *byte == UNTOUCHED));
                assert!(page[1536..3072] == disk[(7 + 3 * n) * 512..][..1536], "page {n} of {count}");
            }
        }
        rig.unplug(&device);
    }
    rig.assert_clean();
}
