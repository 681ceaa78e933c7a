//! The pure parts of serving a request, for an instruction counter: taking it from the ring, parsing it, responding, pushing.
//!
//! `bench-parts REQUESTS BATCH` sends so many requests in batches and serves them in the function `serve_batch`, which is what
//! `valgrind --tool=callgrind --toggle-collect='*serve_batch*'` counts.

use std::process::ExitCode;

use blkif::abi::op;
use blkif::encode::{Draft, DraftSegment};
use blkif::{Abi, BackRing, DomId, Geometry, RequestKind, RingOrder, Status};
use gntdev::{Access, GrantMap, Grants};
use integration::sim::domain::SimDomain;
use integration::sim::front_ring::FrontRing;
use integration::sim::grants::{SimGrants, SimMapping};

const GUEST: DomId = DomId(1);
const BACKEND: DomId = DomId(0);
const GEOMETRY: Geometry = Geometry {
    capacity: 1 << 21,
    readonly: false,
    flush: true,
    barrier: true,
    discard: true,
    discard_secure: false,
    max_indirect: 256,
};

fn main() -> ExitCode {
    let mut numbers = std::env::args().skip(1).map_while(|text| text.parse::<u64>().ok());
    let (Some(requests), Some(batch @ 1..=32)) = (numbers.next(), numbers.next()) else {
        eprintln!("usage: bench-parts REQUESTS BATCH, with a batch of 1 to 32");
        return ExitCode::from(2);
    };
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut domain = SimDomain::create(dir.path(), GUEST, 4).expect("a domain");
    let mut front = FrontRing::create(&mut domain, Abi::X86_64, RingOrder::default(), 0);
    let frame = front.frames().next().expect("a ring of one page");
    let gref = domain.grant(frame, BACKEND, Access::ReadWrite);
    let grants = SimGrants::open(dir.path(), BACKEND).expect("a grant device");
    let map = grants.map(GUEST, &[gref], Access::ReadWrite).expect("a granted ring");
    let mut ring = attach(&map);
    let segment = DraftSegment { gref, first: 0, last: 7 };
    for start in (0..requests).step_by(usize::try_from(batch).unwrap_or(1)) {
        for id in start..start + batch {
            front.put(&domain, &Draft::new(op::READ, id, id % 4096, &[segment]).encode(Abi::X86_64));
        }
        front.push(&domain);
        assert_eq!(serve_batch(&mut ring), batch);
        while front.take(&domain).is_some() {}
    }
    ExitCode::SUCCESS
}

#[expect(unsafe_code, reason = "attaches a ring to mapped memory")]
fn attach(map: &SimMapping) -> BackRing {
    // SAFETY: the mapping has the ring's one page, and `main` keeps it longer than the ring.
    unsafe { BackRing::attach(map.as_ptr(), Abi::X86_64, RingOrder::default()) }.expect("a fresh ring")
}

/// Serves what is in the ring. Its own function for the instruction counter.
#[inline(never)]
fn serve_batch(ring: &mut BackRing) -> u64 {
    let mut served = 0;
    while let Ok(Some(raw)) = ring.take() {
        let (id, op, status) = match blkif::request::parse(&raw, &GEOMETRY) {
            Ok(request) if matches!(request.kind, RequestKind::Read { .. }) => {
                (request.id, request.op, Status::Okay)
            }
            Ok(request) => (request.id, request.op, Status::Error),
            Err(rejection) => (rejection.id, rejection.op, rejection.status),
        };
        ring.respond(id, op, status);
        served += 1;
    }
    std::hint::black_box(ring.push());
    served
}
