//! The frontend, the simulated devices and the real ring code, with a disk of bytes in memory behind them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use blkif::abi::{SEGMENT_SIZE, op};
use blkif::encode::{Draft, DraftSegment};
use blkif::request::{Segment, Transfer, parse, parse_indirect};
use blkif::{BackRing, Geometry, Request, RequestKind};
use gntdev::{CopyDirection, CopySegment, GrantMap, Grants};
use proptest::prelude::*;

use super::*;
use crate::sim::grants::{SimGrants, SimMapping};

const US: DomId = DomId(0);
const CAPACITY: u64 = 4096;
const GEOMETRY: Geometry = Geometry {
    capacity: CAPACITY,
    readonly: false,
    flush: true,
    barrier: true,
    discard: true,
    discard_secure: false,
    max_indirect: 256,
};

/// A ring as the backend has it.
struct Served {
    ring: BackRing,
    port: Port,
    _map: SimMapping,
}

/// A backend of a few lines: the disk is a vector.
struct Backend {
    shape: Shape,
    grants: SimGrants,
    events: SimEvents,
    rings: Vec<Served>,
    /// Pages kept mapped, as a backend with persistent grants does.
    kept: HashMap<GrantRef, SimMapping>,
    disk: Vec<u8>,
}

impl Backend {
    fn connect(dir: &Path, shape: Shape, queues: &[(Vec<GrantRef>, Port)]) -> Backend {
        let grants = SimGrants::open(dir, US).unwrap();
        let mut events = SimEvents::open(dir, US).unwrap();
        let mut serve = |(refs, port): &(Vec<GrantRef>, Port)| {
            let map = grants.map(shape.guest, refs, Access::ReadWrite).unwrap();
            let port = events.bind(shape.guest, *port).unwrap();
            Served { ring: attach(&map, shape), port, _map: map }
        };
        let rings = queues.iter().map(&mut serve).collect();
        let disk = vec![0; usize::try_from(CAPACITY * SECTOR_SIZE).unwrap()];
        Backend { shape, grants, events, rings, kept: HashMap::new(), disk }
    }

    /// Serves until told to stop.
    fn run(mut self, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            if self.events.wait(Duration::from_millis(20)).unwrap() {
                self.drain();
            }
        }
    }

    /// Serves what is in the rings; then the ports may fire again.
    fn drain(&mut self) {
        let mut ports = [Port(0); 4];
        while self.events.pending(&mut ports).unwrap() > 0 {}
        let mut rings = std::mem::take(&mut self.rings);
        for Served { ring, port, .. } in &mut rings {
            loop {
                while let Some(raw) = ring.take().unwrap() {
                    let (id, op, status) = match parse(&raw, &GEOMETRY) {
                        Ok(request) => (request.id, request.op, self.serve(&request)),
                        Err(rejection) => (rejection.id, rejection.op, rejection.status),
                    };
                    ring.respond(id, op, status);
                }
                if ring.push() {
                    self.events.notify(*port).unwrap();
                }
                if !ring.final_check().unwrap() {
                    break;
                }
            }
            if ring.nudge() {
                self.events.notify(*port).unwrap();
            }
            self.events.unmask(*port).unwrap();
        }
        self.rings = rings;
    }

    fn serve(&mut self, request: &Request) -> Status {
        use CopyDirection::{FromGuest, ToGuest};
        match request.kind {
            RequestKind::Read { sector, segments } => self.copy(ToGuest, sector, segments.as_slice()),
            RequestKind::Write { sector, segments } | RequestKind::Barrier { sector, segments } => {
                self.copy(FromGuest, sector, segments.as_slice())
            }
            RequestKind::Flush => Status::Okay,
            RequestKind::Discard { sector, count, .. } => {
                let (at, len) = (sector.0 * SECTOR_SIZE, count * SECTOR_SIZE);
                let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
                self.disk[range].fill(0);
                Status::Okay
            }
            RequestKind::Indirect { transfer, sector, count, page } => {
                let mut bytes = vec![0; usize::from(count) * SEGMENT_SIZE];
                let local = std::ptr::NonNull::from_mut(&mut bytes[..]).cast();
                let len = u16::try_from(bytes.len()).unwrap();
                let guest = self.shape.guest;
                let mut batch = [CopySegment::new(FromGuest, guest, page, 0, len, local).unwrap()];
                copy_batch(&self.grants, FromGuest, &mut batch);
                let mut segments = Vec::new();
                match parse_indirect(&bytes, sector, transfer, &GEOMETRY, &mut segments) {
                    Ok(_) if transfer == Transfer::Read => self.copy(ToGuest, sector, &segments),
                    Ok(_) => self.copy(FromGuest, sector, &segments),
                    Err(reason) => reason.status(),
                }
            }
        }
    }

    fn copy(&mut self, direction: CopyDirection, sector: Sector, segments: &[Segment]) -> Status {
        let guest = self.shape.guest;
        let mut batch = Vec::new();
        let at = usize::try_from(sector.0 * SECTOR_SIZE).unwrap();
        let mut disk = self.disk.get_mut(at..).unwrap_or_default();
        for segment in segments {
            let (part, rest) = disk.split_at_mut(usize::from(segment.bytes()));
            disk = rest;
            let local = std::ptr::NonNull::from_mut(part).cast();
            let (gref, offset, len) = (segment.gref(), segment.offset(), segment.bytes());
            batch.push(CopySegment::new(direction, guest, gref, offset, len, local).unwrap());
            if self.shape.persistent {
                let map = || self.grants.map(guest, &[gref], Access::ReadWrite).unwrap();
                self.kept.entry(gref).or_insert_with(map);
            }
        }
        copy_batch(&self.grants, direction, &mut batch);
        if batch.iter().all(|segment| segment.status().is_okay()) { Status::Okay } else { Status::Error }
    }
}

#[expect(unsafe_code, reason = "the contracts of the ring and of the grants")]
fn attach(map: &SimMapping, shape: Shape) -> BackRing {
    // SAFETY: the mapping has the ring's size and lives as long as the ring: both are in the same Served.
    unsafe { BackRing::attach(map.as_ptr(), shape.abi, shape.order) }.unwrap()
}

#[expect(unsafe_code, reason = "the contracts of the ring and of the grants")]
fn copy_batch(grants: &SimGrants, direction: CopyDirection, batch: &mut [CopySegment]) {
    // SAFETY: the local sides are disjoint parts of vectors that are borrowed for the whole call.
    unsafe { grants.copy(direction, batch) }.unwrap();
}

/// Tells the backend's thread to end, also when the test panics: the scope would wait for it for ever.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `test` with a frontend whose backend serves in another thread.
fn with_backend(shape: Shape, test: impl FnOnce(&mut Frontend)) {
    let dir = tempfile::tempdir().unwrap();
    let mut frontend = Frontend::create(dir.path(), shape).unwrap();
    let dir = dir.path();
    let queues: Vec<_> = frontend.queues.iter().map(|queue| (queue.refs.clone(), queue.port)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        scope.spawn(|| Backend::connect(dir, shape, &queues).run(&stop));
        test(&mut frontend);
    });
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from((i * 7 + i / 251 + seed) % 256).unwrap()).collect()
}

#[test]
fn data_survives_the_way_to_the_disk_and_back_in_every_shape() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        for order in RingOrder::all() {
            // Close to the end of the counters' range: the ring wraps in every shape.
            let shape = Shape { abi, order, start: u32::MAX - 5, ..Shape::simple(DomId(3)) };
            with_backend(shape, |frontend| {
                let data = pattern(10 * MAX_TRANSFER + 512, 1);
                frontend.write(Sector(3), &data).unwrap();
                frontend.flush().unwrap();
                assert!(frontend.read(Sector(3), data.len()).unwrap() == data, "{abi} {}", order.get());
                assert_eq!(frontend.read(Sector(0), 3 * 512).unwrap(), vec![0; 3 * 512]);
            });
        }
    }
}

#[test]
fn keys_are_those_of_linux() {
    let dir = tempfile::tempdir().unwrap();
    let one = Frontend::create(dir.path(), Shape::simple(DomId(1))).unwrap();
    let names = |frontend: &Frontend| frontend.keys().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(&one), ["protocol", "feature-persistent", "event-channel", "ring-ref"]);
    let order = RingOrder::new(1).unwrap();
    let two = Frontend::create(dir.path(), Shape { order, ..Shape::simple(DomId(2)) }).unwrap();
    assert_eq!(
        names(&two),
        ["protocol", "feature-persistent", "ring-page-order", "event-channel", "ring-ref0", "ring-ref1"]
    );
    assert_eq!(two.keys()[2].1, "1");
    let several = Shape { queues: 2, persistent: true, ..Shape::simple(DomId(3)) };
    let several = Frontend::create(dir.path(), several).unwrap();
    assert_eq!(
        names(&several)[2..],
        [
            "multi-queue-num-queues",
            "queue-0/event-channel",
            "queue-0/ring-ref",
            "queue-1/event-channel",
            "queue-1/ring-ref"
        ]
    );
    assert_eq!((several.keys()[1].1.as_str(), several.keys()[2].1.as_str()), ("1", "2"));
}

#[test]
fn long_requests_are_indirect_and_discards_discard_in_both_layouts() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        for persistent in [false, true] {
            let shape = Shape { abi, persistent, indirect: 256, queues: 3, ..Shape::simple(DomId(3)) };
            with_backend(shape, |frontend| {
                let data = pattern(shape.max_transfer() + 12 * 4096, 5);
                frontend.write(Sector(3), &data).unwrap();
                assert!(frontend.read(Sector(3), data.len()).unwrap() == data);
                frontend.discard(Sector(10), 20).unwrap();
                assert!(frontend.read(Sector(10), 20 * 512).unwrap() == [0; 20 * 512]);
                assert!(frontend.read(Sector(30), 512).unwrap() == data[27 * 512..28 * 512]);
                assert_eq!(frontend.mapped_data_pages() > 0, persistent);
            });
        }
    }
}

#[test]
fn a_page_that_stays_mapped_is_used_again_if_persistent_and_a_mistake_if_not() {
    for persistent in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let grants = SimGrants::open(dir.path(), US).unwrap();
        let mut domain = SimDomain::create(dir.path(), DomId(3), 8).unwrap();
        let mut pages = pages::Pages::new(US, persistent);
        let first = pages.take(&mut domain, Access::ReadWrite);
        let map = grants.map(DomId(3), &[first.1], Access::ReadWrite).unwrap();
        assert_eq!(pages.give(&mut domain, first).is_ok(), persistent);
        if persistent {
            assert_eq!(pages.take(&mut domain, Access::ReadOnly), first);
            drop(map);
            pages.give(&mut domain, first).unwrap();
            assert!(grants.map(DomId(3), &[first.1], Access::ReadOnly).is_err(), "its grant has ended");
        }
    }
}

#[test]
fn a_restart_needs_everything_unmapped_and_gives_a_fresh_ring() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { queues: 2, ..Shape::simple(DomId(3)) };
    let mut frontend = Frontend::create(dir.path(), shape).unwrap();
    frontend.submit(Io::Write(Sector(0), &[1; 8192]));
    let grants = SimGrants::open(dir.path(), US).unwrap();
    let map = grants.map(DomId(3), frontend.ring_refs(), Access::ReadWrite).unwrap();
    assert!(frontend.restart().is_err());
    drop(map);
    frontend.restart().unwrap();
    assert_eq!((frontend.outstanding(), frontend.free_slots()), (0, 64));
}

#[test]
fn full_ring_of_requests_is_answered_once_each() {
    let shape = Shape { order: RingOrder::MAX, ..Shape::simple(DomId(3)) };
    with_backend(shape, |frontend| {
        let mut done = VecDeque::new();
        let mut sent = 0u64;
        while sent < 20_000 {
            while frontend.free_slots() > 0 {
                let sector = Sector(sent % CAPACITY);
                if sent.is_multiple_of(3) {
                    frontend.submit(Io::Write(sector, &[1; 512]));
                } else {
                    frontend.submit(Io::Read(sector, 512));
                }
                sent += 1;
            }
            frontend.kick().unwrap();
            frontend.wait(&mut done, Duration::from_secs(10)).unwrap();
        }
        while frontend.outstanding() > 0 {
            frontend.wait(&mut done, Duration::from_secs(10)).unwrap();
        }
        let mut ids: Vec<u64> = done.iter().map(|completion| completion.id).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(1..=sent));
        assert!(done.iter().all(Completion::is_okay));
    });
}

#[test]
fn refused_requests_are_refused_alone() {
    with_backend(Shape::simple(DomId(3)), |frontend| {
        let (_, readonly) = frontend.page(Access::ReadOnly);
        let segment = |gref| [DraftSegment { gref, first: 0, last: 7 }];
        let bad = [
            // h16, h19: references that give nothing, or not enough.
            (Draft::new(op::READ, 1 << 40, 0, &segment(readonly)), Status::Error),
            (Draft::new(op::READ, 1 << 41, 0, &segment(GrantRef(u32::MAX))), Status::Error),
            (Draft::new(op::WRITE, 1 << 42, 0, &segment(GrantRef(0))), Status::Error),
            (Draft::new(op::WRITE, 1 << 43, CAPACITY, &segment(readonly)), Status::Error),
            (Draft::new(200, u64::MAX, 0, &[]), Status::NotSupported),
        ];
        let good = frontend.submit(Io::Write(Sector(0), &[5; 4096]));
        for (draft, _) in &bad {
            frontend.put_raw(draft.id, &draft.encode(Abi::X86_64));
        }
        frontend.kick().unwrap();
        let mut done = VecDeque::new();
        while frontend.outstanding() > 0 {
            frontend.wait(&mut done, Duration::from_secs(10)).unwrap();
        }
        for completion in done {
            let expected = bad.iter().find(|(draft, _)| draft.id == completion.id);
            match expected {
                Some((draft, status)) => {
                    assert_eq!((completion.op, completion.status), (draft.op, status.wire()));
                }
                None => assert!(completion.id == good && completion.is_okay()),
            }
        }
        assert_eq!(frontend.read(Sector(0), 4096).unwrap(), [5; 4096]);
    });
}

#[test]
fn h34_read_leaves_the_rest_of_the_page_alone() {
    with_backend(Shape::simple(DomId(3)), |frontend| {
        let (frame, gref) = frontend.page(Access::ReadWrite);
        frontend.domain().write(frame, 0, &[UNTOUCHED; 4096]);
        let draft = Draft::new(op::READ, 1 << 40, 0, &[DraftSegment { gref, first: 3, last: 5 }]);
        frontend.put_raw(draft.id, &draft.encode(Abi::X86_64));
        frontend.kick().unwrap();
        frontend.wait(&mut VecDeque::new(), Duration::from_secs(10)).unwrap();
        let mut page = [0; 4096];
        frontend.domain().read(frame, 0, &mut page);
        assert!(page[..3 * 512].iter().chain(&page[6 * 512..]).all(|b| *b == UNTOUCHED));
        assert_eq!(page[3 * 512..6 * 512], [0; 3 * 512]);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn any_mix_of_requests_leaves_the_disk_a_vector_would_be(
        requests in proptest::collection::vec(
            (any::<bool>(), 0..CAPACITY - 88, 1..=88usize, any::<usize>()),
            1..200,
        ),
    ) {
        with_backend(Shape::simple(DomId(3)), |frontend| {
            let mut model = vec![0; usize::try_from(CAPACITY * SECTOR_SIZE).unwrap()];
            for (write, sector, sectors, seed) in requests {
                let at = usize::try_from(sector * SECTOR_SIZE).unwrap();
                let range = at..at + sectors * 512;
                if write {
                    let data = pattern(sectors * 512, seed % 256);
                    frontend.write(Sector(sector), &data).unwrap();
                    model[range].copy_from_slice(&data);
                } else {
                    assert!(frontend.read(Sector(sector), sectors * 512).unwrap() == model[range]);
                }
            }
        });
    }
}
