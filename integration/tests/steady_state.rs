//! In steady state the data plane allocates nothing for a request, whatever way its data takes.
//!
//! The server and its worker threads run in this process over the simulation, with an allocator that counts for every thread
//! but the one that plays the guest.

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use blkif::{DomId, RingOrder, Sector};
use integration::sim::frontend::{Frontend, Io, Shape};
use integration::sim::host::SimHost;
use tap_ctl::cli::{Config, Streams, run};
use tap_ctl::client::Client;
use tap_ctl::proto::{Minor, Polling, QueueParams, Request, RingParams};
use tapdisk::reactor::EngineChoice;
use tapdisk::server::{Entrance, Server};

const VDEV: u32 = 51712;
const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// Allocations of all threads but those that are exempt.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Whether the next one is to be printed with the way to it.
static TELL: AtomicBool = AtomicBool::new(false);

thread_local! {
    static EXEMPT: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

fn count() {
    // A thread that is ending has no thread-locals any more; it counts.
    if EXEMPT.try_with(Cell::get).unwrap_or(false) {
        return;
    }
    ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    if TELL.swap(false, Ordering::Relaxed) {
        EXEMPT.set(true);
        eprintln!("an allocation:\n{}", Backtrace::force_capture());
        EXEMPT.set(false);
    }
}

#[expect(unsafe_code, reason = "an allocator that hands everything on to the system's")]
// SAFETY: every method hands its arguments on as they are; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn tap_ctl(host: &SimHost, args: &[&str]) {
    let config = Config { dir: host.control(), tapdisk: "/nowhere".into(), terminal: false };
    let args: Vec<_> = args.iter().map(Into::into).collect();
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let streams = Streams { stdin: &mut std::io::empty(), stdout: &mut out, stderr: &mut err };
    let code = run(&args, &config, streams);
    assert_eq!(code, 0, "{args:?}: {}", String::from_utf8_lossy(&err));
}

fn ring_params(frontend: &Frontend) -> RingParams {
    let shape = frontend.shape();
    let queue = |(refs, port): (&[blkif::GrantRef], blkif::Port)| QueueParams {
        ring_refs: refs.iter().map(|gref| gref.0).collect(),
        port: port.0,
    };
    RingParams {
        domid: shape.guest.0,
        vdev: VDEV,
        protocol: shape.abi.protocol_name().to_owned(),
        queues: frontend.queues().map(queue).collect(),
        readonly: false,
        persistent: shape.persistent,
        discard: true,
        polling: Polling::default(),
    }
}

/// Reads and writes of several lengths, and rarely a flush, 16 at a time.
fn work(frontend: &mut Frontend, requests: u64) {
    let longest = frontend.shape().max_transfer();
    let data = vec![0x5a; longest];
    let mut out = VecDeque::new();
    let (mut sent, mut answered) = (0, 0);
    while answered < requests {
        while sent < requests && sent - answered < 16 {
            let sector = Sector(sent * 37 % 2000 * 8);
            let len = if sent % 32 < 2 { longest } else { [4096, 512, 8192][(sent % 3) as usize] };
            frontend.submit(match sent % 256 {
                0 => Io::Flush,
                odd if odd % 2 == 1 => Io::Read(sector, len),
                _ => Io::Write(sector, &data[..len]),
            });
            sent += 1;
        }
        frontend.kick().unwrap();
        frontend.wait(&mut out, PATIENCE).unwrap();
        for answer in out.drain(..) {
            assert!(answer.is_okay(), "{answer:?}");
            answered += 1;
        }
    }
}

/// As much at once as [`work`] ever has on its way, and more: every page that it will use has been used, every list has grown.
fn fill(frontend: &mut Frontend) {
    let longest = frontend.shape().max_transfer();
    let mut out = VecDeque::new();
    for _ in 0..4 {
        for n in 0..32 {
            frontend.submit(Io::Read(Sector(n * 512), longest));
            frontend.submit(Io::Flush);
        }
        frontend.kick().unwrap();
        while frontend.outstanding() > 0 {
            frontend.wait(&mut out, PATIENCE).unwrap();
        }
    }
}

/// Allocations while 10,000 requests are served, in each of some rounds until there are none.
///
/// A list that grows to the most it ever holds, or a thread that is started when it is first needed, does so at a time that the
/// machine's load decides. That ends by itself; what allocates for requests does not.
fn allocations(host: &SimHost, pid: i32, shape: Shape) -> Vec<u64> {
    let command = |request: &Request| {
        Client::connect(&host.control(), pid).unwrap().command(request, Some(PATIENCE)).unwrap();
    };
    let mut frontend = Frontend::create(&host.xen(), shape).unwrap();
    let minor = Minor(0);
    command(&Request::Connect { minor, ring: ring_params(&frontend) });
    fill(&mut frontend);
    work(&mut frontend, 2000);
    let mut rounds = Vec::new();
    while rounds.len() < 5 && rounds.last() != Some(&0) {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        TELL.store(true, Ordering::Relaxed);
        work(&mut frontend, 10_000);
        TELL.store(false, Ordering::Relaxed);
        rounds.push(ALLOCATIONS.load(Ordering::Relaxed) - before);
    }
    command(&Request::Disconnect { minor, domid: shape.guest.0, vdev: VDEV });
    rounds
}

#[test]
fn in_steady_state_no_request_allocates() {
    EXEMPT.set(true);
    for engine in [EngineChoice::Uring, EngineChoice::Pool] {
        for image in ["aio", "vhd"] {
            let folder = tempfile::tempdir().unwrap();
            let host = SimHost::create(folder.path()).unwrap();
            let path = folder.path().join("image");
            match image {
                "aio" => std::fs::File::create(&path).unwrap().set_len(32 * MIB).unwrap(),
                _ => {
                    let args = ["create", "-n", path.to_str().unwrap(), "-s", "32"];
                    let code = vhd::util::run(args.iter().map(Into::into), &mut Vec::new(), &mut Vec::new());
                    assert_eq!(code, 0);
                }
            }
            let entrance = Entrance::bind(&host.control()).unwrap();
            let mut server = Server::new(host.clone(), host.control(), engine, None, entrance).unwrap();
            let serving = std::thread::spawn(move || server.run());
            let pid = std::process::id().cast_signed();
            tap_ctl(&host, &["allocate"]);
            let place = ["-p", &pid.to_string(), "-m", "0"];
            tap_ctl(&host, &[&["attach"], &place[..]].concat());
            tap_ctl(
                &host,
                &[&["open"], &place[..], &["-a", &format!("{image}:{}", path.display())]].concat(),
            );
            for (domid, persistent) in [(1, false), (2, true)] {
                for indirect in [0, 64] {
                    let order = RingOrder::new(1).unwrap();
                    let shape = Shape { order, persistent, indirect, ..Shape::simple(DomId(domid)) };
                    let rounds = allocations(&host, pid, shape);
                    assert_eq!(rounds.last(), Some(&0), "{rounds:?}: {engine:?}, {image}, {shape:?}");
                }
            }
            tap_ctl(&host, &[&["destroy"], &place[..]].concat());
            serving.join().unwrap().unwrap();
        }
    }
}
