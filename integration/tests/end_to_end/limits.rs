//! Disks that may do only so much in a second.
//!
//! Nothing here depends on how fast the host is: that a limit holds back is seen in a time that cannot be shorter, that it
//! lets through in there being an end.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use blkif::{DomId, Sector};
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};

use super::pause::ok;
use super::support::*;

const SIZE: usize = 8 * MIB;

/// Sets limits; those that hold then.
fn limit(rig: &Rig, device: &Device, options: &[&str]) -> String {
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    let outcome = rig.tap_ctl(&[&["limit", "-p", &pid, "-m", &minor], options].concat());
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    outcome.out
}

/// How long it takes until `count` reads of `len` bytes have been answered, sent as the rings have room.
fn time_of(frontend: &mut Frontend, count: usize, len: usize) -> Duration {
    let start = Instant::now();
    let (mut sent, mut out) = (0, VecDeque::new());
    while out.len() < count {
        while sent < count && frontend.free_slots() > 4 {
            frontend.submit(Io::Read(Sector(sent as u64 % 8 * 1024), len));
            sent += 1;
        }
        frontend.kick().unwrap();
        frontend.wait(&mut out, PATIENCE).unwrap();
    }
    assert!(out.iter().all(|answer| answer.is_okay()));
    start.elapsed()
}

#[test]
fn a_guest_has_the_requests_and_bytes_of_a_second_and_no_more() {
    let rig = rig();
    let queues = most_queues(&rig);
    for (domid, kind, queues) in [(1, "raw", queues), (2, "vhd", 1)] {
        let name = format!("{domid}.{kind}");
        let (_, params) = if kind == "raw" { raw(&rig, &name, SIZE) } else { vhd(&rig, &name, SIZE / MIB) };
        let shape = Shape { queues, indirect: 64, persistent: true, ..Shape::simple(DomId(1)) };
        let (device, mut frontend) = guest(&rig, domid, &params, shape);
        let free = time_of(&mut frontend, 400, 4096);
        let now = limit(&rig, &device, &["--iops", "400", "--burst-iops", "20"]);
        assert_eq!(now, "iops=400,bps=0,burst-iops=20,burst-bps=0");
        // 400 without the burst, and one on its way for each ring.
        let took = time_of(&mut frontend, 400, 4096);
        assert!(took >= Duration::from_millis(900) && took > free, "{took:?}, {free:?} without limit");
        assert_eq!(
            limit(&rig, &device, &["--iops", "0", "--bps", "8M", "--burst-bps", "256K"]),
            "iops=0,bps=8388608,burst-iops=20,burst-bps=262144"
        );
        // 8 MiB in requests of 128 KiB.
        let took = time_of(&mut frontend, 64, 128 << 10);
        assert!(took >= Duration::from_millis(900), "{took:?}");
        limit(&rig, &device, &["--bps", "0"]);
        assert!(time_of(&mut frontend, 400, 4096) < took + free);
        rig.unplug(&device);
    }
    rig.assert_clean();
}

#[test]
fn a_change_is_felt_at_once_and_lasts_over_a_pause() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", SIZE);
    let shape = Shape { queues: most_queues(&rig), ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    limit(&rig, &device, &["--iops", "1", "--burst-iops", "1"]);
    // They would take longer than anybody here waits.
    for n in 0..60 {
        frontend.submit(Io::Write(Sector(n * 8), &pattern(n as u8, 4096)));
    }
    frontend.kick().unwrap();
    let _ = answers(&mut frontend, 1);
    ok(&rig, &device, "pause", &[]);
    ok(&rig, &device, "unpause", &[]);
    assert_eq!(limit(&rig, &device, &[]), "iops=1,bps=0,burst-iops=1,burst-bps=0");
    assert!(frontend.outstanding() > 40);
    limit(&rig, &device, &["--iops", "0"]);
    let left = frontend.outstanding();
    answers(&mut frontend, left);
    // What waits for its turn is no reason to stay.
    limit(&rig, &device, &["--iops", "1"]);
    for n in 0..30 {
        frontend.submit(Io::Read(Sector(n * 8), 4096));
    }
    frontend.kick().unwrap();
    rig.destroy(&device);
    rig.assert_clean();
}

#[test]
fn two_frontends_of_one_disk_have_equal_parts() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", SIZE);
    let (device, one) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let (second, two) = also(&rig, &device, 2);
    limit(&rig, &device, &["--iops", "300", "--burst-iops", "10"]);
    let mut guests = [one, two];
    let mut counts = [0; 2];
    let mut out = VecDeque::new();
    while counts.iter().sum::<usize>() < 300 {
        for (frontend, count) in guests.iter_mut().zip(&mut counts) {
            while frontend.free_slots() > 4 {
                frontend.submit(Io::Read(Sector(0), 4096));
            }
            frontend.kick().unwrap();
            frontend.poll(&mut out).unwrap();
            *count += out.drain(..).count();
        }
        std::thread::yield_now();
    }
    assert!(counts.iter().all(|count| (120..=180).contains(count)), "{counts:?}");
    limit(&rig, &device, &["--iops", "0"]);
    rig.store.rm(&second.frontend);
    rig.ask_to_close(&second);
    rig.wait_value(&format!("{}/state", second.backend), "6");
    rig.store.rm(&second.backend);
    rig.destroy(&device);
    rig.assert_clean();
}

#[test]
fn an_image_is_opened_with_its_limits() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", SIZE);
    assert_eq!(rig.tap_ctl(&["create", "-a", &params, "--limit", "iops=100,burst-bps=1M"]).code, 0);
    let list = rig.tap_ctl(&["list"]).out;
    let pid = list.strip_prefix("pid=").unwrap().split(' ').next().unwrap();
    let shown = rig.tap_ctl(&["limit", "-p", pid, "-m", "0"]);
    assert_eq!(shown.out, "iops=100,bps=0,burst-iops=0,burst-bps=1048576");
    assert_eq!(rig.tap_ctl(&["destroy", "-p", pid, "-m", "0"]).code, 0);
    rig.assert_clean();
}
