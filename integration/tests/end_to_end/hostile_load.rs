//! Cases 37 to 40 of the catalogue: guests that want too much, and connections that come and go.

use std::time::{Duration, Instant};

use blkif::abi::op;
use blkif::{Abi, DomId, RingOrder, Sector};
use integration::rig::PATIENCE;
use integration::sim::calls::{Call, Calls};
use integration::sim::frontend::{Frontend, Io, Shape};
use integration::sim::host::BACKEND;
use tap_ctl::ControlDir;
use tap_ctl::client::Client;
use tap_ctl::proto::{Minor, Polling, QueueParams, Request, RingParams};

use super::scene::{Scene, draft, indirect};
use super::support::*;

/// Memory in use by a process, in MiB.
pub fn resident(pid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// Processor time that a process has used.
fn processor_time(pid: i32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // Behind the name, which may have blanks: field 3 comes first; 14 and 15 are the times.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    let each = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).unwrap().unwrap().cast_unsigned();
    Duration::from_millis(ticks * 1000 / each)
}

/// Open files of a process.
pub fn files(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Its threads, without those that the kernel keeps for io_uring as long as it likes.
pub fn threads(pid: i32) -> usize {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten();
    // One that ends while we look has no name any more.
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).ok();
    tasks.filter_map(name).filter(|name| !name.starts_with("iou-")).count()
}

#[test]
fn h37_a_guest_that_fills_every_ring_with_the_longest_requests_gets_a_bounded_amount_of_memory() {
    for persistent in [false, true] {
        let queues = most_queues(&rig());
        let order = RingOrder::MAX;
        let shape = Shape { order, queues, persistent, indirect: 256, ..Shape::simple(DomId(1)) };
        let mut scene = Scene::with(shape);
        let pages: Vec<_> = (0..256).map(|_| scene.page()).collect();
        let (_, list) = scene.segments(&pages);
        let per_queue = scene.hostile.free_slots() / queues as u32;
        for round in 0..2 {
            for queue in 0..queues {
                for n in 0..per_queue {
                    let op = if (n + round) % 2 == 0 { op::READ } else { op::WRITE };
                    let mut draft = indirect(op, 0, 256, list);
                    draft.id = u64::from(n);
                    scene.hostile.put_raw_on(queue, draft.id, &draft.encode(Abi::X86_64));
                }
            }
            scene.hostile.kick().unwrap();
            scene.others_still_work();
            let total = per_queue as usize * queues;
            assert!(answers(&mut scene.hostile, total).iter().all(|answer| answer.is_okay()));
        }
        // 512 MiB are wanted for each ring at the same time.
        let used = resident(scene.device.pid);
        assert!(used < 128, "{used} MiB are in use");
        scene.still_works();
    }
}

#[test]
fn h38_a_storm_of_events_without_work_costs_a_bounded_share_of_a_processor() {
    let mut scene = Scene::new();
    scene.still_works();
    let calls = Calls::open(&scene.rig.host.xen(), BACKEND).unwrap();
    let (pid, start) = (scene.device.pid, Instant::now());
    let (before, heard) = (processor_time(pid), calls.so_far(Call::Unmask));
    for second in 1..=2 {
        while start.elapsed() < Duration::from_secs(second) {
            scene.hostile.notify().unwrap();
        }
        scene.others_still_work();
    }
    let (used, heard) = (processor_time(pid) - before, calls.so_far(Call::Unmask) - heard);
    assert!(used < start.elapsed() / 4, "{used:?} of processor time in {:?}", start.elapsed());
    // Some tens of thousands, if each were heard as soon as the one before is dealt with.
    assert!(heard < 2000, "{heard} events were heard");
    scene.still_works();
}

#[test]
fn h38_a_storm_of_events_does_not_slow_the_storms_own_work_down_to_a_halt() {
    let mut scene = Scene::new();
    let start = Instant::now();
    for n in 0..200u64 {
        scene.hostile.submit(Io::Read(Sector(n), 512));
        scene.hostile.kick().unwrap();
        for _ in 0..50 {
            scene.hostile.notify().unwrap();
        }
        assert!(answers(&mut scene.hostile, 1)[0].is_okay());
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?} for 200 reads", start.elapsed());
}

#[test]
fn h39_errors_at_full_rate_leave_the_backend_quiet_and_alive() {
    let mut scene = Scene::with(Shape { order: RingOrder::MAX, ..Shape::simple(DomId(1)) });
    let bad = draft(op::READ, u64::MAX, &[]).encode(Abi::X86_64);
    let before = resident(scene.device.pid);
    for _ in 0..100 {
        for _ in 0..512 {
            scene.hostile.put_raw(77, &bad);
        }
        scene.hostile.kick().unwrap();
        assert!(answers(&mut scene.hostile, 512).iter().all(|answer| answer.status < 0));
    }
    assert!(resident(scene.device.pid) <= before + 4);
    assert!(scene.rig.xenio_log().lines().count() < 100, "{}", scene.rig.xenio_log());
    scene.still_works();
}

fn params(frontend: &Frontend) -> RingParams {
    let queue = |(refs, port): (&[blkif::GrantRef], blkif::Port)| QueueParams {
        ring_refs: refs.iter().map(|gref| gref.0).collect(),
        port: port.0,
    };
    RingParams {
        domid: frontend.shape().guest.0,
        vdev: XVDA,
        protocol: frontend.shape().abi.protocol_name().to_owned(),
        queues: frontend.queues().map(queue).collect(),
        readonly: false,
        persistent: frontend.shape().persistent,
        discard: true,
        polling: Polling::default(),
    }
}

/// Speaks to the tapdisk as xenio does, but without its limit on how often.
fn tapdisk(dir: &ControlDir, pid: i32, request: &Request) {
    Client::connect(dir, pid).unwrap().command(request, Some(PATIENCE)).unwrap();
}

#[test]
fn h40_a_thousand_connections_with_requests_in_flight_leave_nothing_behind() {
    let rig = rig();
    let (_, image) = raw(&rig, "a.img", 16 * MIB);
    let queues = most_queues(&rig);
    let plugged = rig.tap_ctl(&["create", "-a", &image]);
    assert_eq!(plugged.code, 0, "{}", plugged.err);
    let list = rig.tap_ctl(&["list"]).out;
    let pid: i32 = list.split([' ', '=']).nth(1).unwrap().parse().unwrap();
    let (dir, minor) = (rig.host.control(), Minor(0));
    // With what the first connection opens for good.
    let mut first = Frontend::create(&rig.host.xen(), Shape::simple(DomId(3))).unwrap();
    tapdisk(&dir, pid, &Request::Connect { minor, ring: params(&first) });
    tapdisk(&dir, pid, &Request::Disconnect { minor, domid: 3, vdev: XVDA });
    first.restart().unwrap();
    // The simulated devices keep two files open for each domain that they have met.
    let before = (threads(pid), files(pid) + 2 * 2);
    let mut settled = 0;
    for (domid, persistent) in [(1, false), (2, true)] {
        let shape = Shape { persistent, indirect: 256, queues, ..Shape::simple(DomId(domid)) };
        let mut frontend = Frontend::create(&rig.host.xen(), shape).unwrap();
        for round in 0..500u64 {
            tapdisk(&dir, pid, &Request::Connect { minor, ring: params(&frontend) });
            for n in 0..32 {
                let len = if n % 4 == 0 { 300 << 10 } else { 4096 };
                frontend.submit(Io::Read(Sector((n * 517 + round) % 20_000), len));
                frontend.submit(Io::Write(Sector((n * 311 + round) % 20_000), &[n as u8; 8192]));
                if frontend.free_slots() == 0 {
                    break;
                }
            }
            frontend.kick().unwrap();
            tapdisk(&dir, pid, &Request::Disconnect { minor, domid, vdev: XVDA });
            // Nothing of the guest is mapped, or this fails.
            frontend.restart().unwrap();
            if round == 50 {
                settled = settled.max(resident(pid));
            }
            assert!(round < 50 || resident(pid) <= settled + 8, "{} MiB after {settled}", resident(pid));
        }
    }
    // A ring's thread that has given everything back may take a moment to end.
    let start = Instant::now();
    while threads(pid) > before.0 || files(pid) > before.1 {
        assert!(start.elapsed() < PATIENCE, "{} threads, {} files", threads(pid), files(pid));
        std::thread::yield_now();
    }
    assert_eq!(rig.tap_ctl(&["destroy", "-p", &pid.to_string(), "-m", "0"]).code, 0);
    rig.assert_clean();
}

#[test]
fn h40_a_guest_that_closes_and_connects_again_and_again_always_gets_its_disk() {
    let rig = rig();
    let (path, params) = raw(&rig, "a.img", 4 * MIB);
    let (device, mut frontend) =
        guest(&rig, 1, &params, Shape { persistent: true, indirect: 32, ..Shape::simple(DomId(1)) });
    let states = |guest: &str, answer: &str| {
        rig.store.write(&format!("{}/state", device.frontend), guest);
        rig.wait_value(&format!("{}/state", device.backend), answer);
    };
    for round in 0..25u8 {
        frontend.write(Sector(u64::from(round) * 8), &[round; 4096]).unwrap();
        for n in 0..32 {
            frontend.submit(Io::Write(Sector(4096 + n * 8), &[round; 4096]));
        }
        frontend.kick().unwrap();
        states("6", "6");
        frontend.restart().unwrap();
        states("1", "2");
        rig.connect(&device, &frontend);
    }
    rig.unplug(&device);
    let disk = std::fs::read(path).unwrap();
    for round in 0..25u8 {
        assert!(disk[usize::from(round) * 4096..][..4096] == [round; 4096]);
    }
    rig.assert_clean();
}
