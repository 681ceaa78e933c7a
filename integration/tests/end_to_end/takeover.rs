//! Tapdisks that are killed, or make room for others, under busy guests.

use std::time::Instant;

use blkif::{Abi, DomId, RingOrder, Sector};
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Io, Shape};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tap_ctl::inflight::{Folder, Record};
use tapdisk::journal;

use super::pause::{ok, under_load};
use super::support::*;

const SIZE: usize = 8 * MIB;

fn folder(rig: &Rig, device: &Device) -> Folder {
    Folder::of(&rig.host.control(), device.minor)
}

pub fn record(rig: &Rig, device: &Device) -> Record {
    folder(rig, device).read().unwrap().expect("a record")
}

/// What the rings have answered so far.
pub fn responses(rig: &Rig, device: &Device) -> Vec<Option<u32>> {
    let folder = folder(rig, device);
    let record = record(rig, device);
    let queues =
        record.rings.iter().flat_map(|ring| ring.queues.iter().map(|queue| folder.journal(ring, queue)));
    queues.map(|path| journal::responses(&path)).collect()
}

/// Waits for something that another process does without telling.
pub fn wait_until(what: &str, rig: &Rig, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} does not happen; xenio said:\n{}", rig.xenio_log());
        std::thread::yield_now();
    }
}

/// Waits until XenStore names another tapdisk than `pid`.
pub fn wait_for_successor(rig: &Rig, device: &Device, pid: i32) -> i32 {
    let path = format!("{}/physical-device-path", device.backend);
    let old = rig.host.control().vbd_path(pid, device.minor);
    let old = old.to_str().unwrap().as_bytes();
    let changed = rig.store.wait_for(&path, PATIENCE, |value| value.is_some_and(|value| value != old));
    assert!(changed, "nobody went on; xenio said:\n{}", rig.xenio_log());
    record(rig, device).pid
}

pub fn kill_tapdisk(rig: &Rig, device: &Device) -> i32 {
    let pid = record(rig, device).pid;
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    pid
}

/// Kills the disk's tapdisk so many times, each after it has answered something, and waits for the next one each time.
pub fn kill_often(rig: &Rig, device: &Device, times: u32) {
    for _ in 0..times {
        let before = responses(rig, device);
        wait_until("an answer", rig, || responses(rig, device) != before);
        let pid = kill_tapdisk(rig, device);
        wait_for_successor(rig, device, pid);
    }
}

/// Takes the disk away, which another tapdisk serves than the one that the toolstack started.
fn finish(rig: &Rig, device: &Device) {
    rig.unplug(device);
    rig.assert_clean();
}

fn disk(rig: &Rig, kind: &str, name: &str) -> String {
    if kind == "vhd" { vhd(rig, name, SIZE / MIB).1 } else { raw(rig, name, SIZE).1 }
}

fn survives_kills(kind: &str, shape: Shape, times: u32) {
    let rig = rig();
    let params = disk(&rig, kind, "disk");
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    if kind == "qcow2" {
        let leaf = format!("qcow2:{}", rig.path("leaf.qcow2").display());
        ok(&rig, &device, "snapshot", &["-a", &leaf]);
    }
    let mut storm = Storm::new(vec![0; SIZE], 11, true);
    under_load(&mut frontend, &mut storm, || kill_often(&rig, &device, times));
    finish(&rig, &device);
}

#[test]
fn a_guest_on_a_raw_disk_does_not_notice_kills() {
    survives_kills("raw", Shape::simple(DomId(1)), 30);
}

#[test]
fn a_guest_on_a_vhd_does_not_notice_kills() {
    survives_kills("vhd", Shape { abi: Abi::X86_32, ..Shape::simple(DomId(1)) }, 20);
}

#[test]
fn a_guest_on_a_qcow2_does_not_notice_kills() {
    survives_kills("qcow2", Shape { order: RingOrder::new(2).unwrap(), ..Shape::simple(DomId(1)) }, 20);
}

#[test]
fn several_rings_with_persistent_grants_and_indirect_requests_go_on_at_the_wrap_of_their_counters() {
    let queues = most_queues(&rig());
    let shape = Shape {
        queues,
        persistent: true,
        indirect: 64,
        order: RingOrder::MAX,
        start: u32::MAX - 500,
        ..Shape::simple(DomId(1))
    };
    for kind in ["raw", "vhd"] {
        survives_kills(kind, shape, 20);
    }
}

#[test]
fn xenio_may_die_at_the_same_time() {
    let mut rig = rig();
    let params = disk(&rig, "vhd", "disk");
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let mut storm = Storm::new(vec![0; SIZE], 12, true);
    under_load(&mut frontend, &mut storm, || {
        for round in 0..6 {
            let pid = record(&rig, &device).pid;
            if round % 2 == 0 {
                rig.kill_xenio();
                kill_tapdisk(&rig, &device);
            } else {
                kill_tapdisk(&rig, &device);
                rig.kill_xenio();
            }
            rig.start_xenio();
            wait_for_successor(&rig, &device, pid);
            let before = responses(&rig, &device);
            wait_until("an answer", &rig, || responses(&rig, &device) != before);
        }
    });
    finish(&rig, &device);
}

#[test]
fn limits_mirrors_snapshots_and_pauses_are_kept() {
    let rig = rig();
    let params = disk(&rig, "vhd", "disk");
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let mut storm = Storm::new(vec![0; SIZE], 13, false);
    let (_, secondary) = raw(&rig, "second", SIZE);
    let named = |pid: i32| Device { pid, ..device.clone() };
    under_load(&mut frontend, &mut storm, || {
        ok(&rig, &device, "limit", &["--iops", "100000"]);
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &["-2", &secondary]);
        kill_often(&rig, &device, 3);
        let now = named(record(&rig, &device).pid);
        let leaf = format!("vhd:{}", rig.path("leaf.vhd").display());
        ok(&rig, &now, "snapshot", &["-a", &leaf]);
        kill_often(&rig, &device, 3);
        let Record { params, pid, .. } = record(&rig, &device);
        assert_eq!((params.image.to_string(), params.limit.iops), (leaf, 100_000));
        assert_eq!(params.secondary.unwrap().to_string(), secondary);
        // Killed while it is paused: the next one is paused too.
        ok(&rig, &named(pid), "pause", &[]);
        kill_tapdisk(&rig, &device);
        let next = named(wait_for_successor(&rig, &named(pid), pid));
        assert!(rig.tap_ctl(&["list"]).out.contains("state=0x2a"), "{}", rig.tap_ctl(&["list"]).out);
        ok(&rig, &next, "unpause", &[]);
    });
    finish(&rig, &device);
}

#[test]
fn upgrades_under_load_are_not_noticed() {
    let rig = rig();
    let params = disk(&rig, "vhd", "disk");
    let queues = most_queues(&rig);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape { queues, ..Shape::simple(DomId(1)) });
    let mut storm = Storm::new(vec![0; SIZE], 14, true);
    under_load(&mut frontend, &mut storm, || {
        for round in 0..10 {
            let pid = record(&rig, &device).pid;
            let text = pid.to_string();
            let args = if round % 2 == 0 { vec!["upgrade", "-p", &text] } else { vec!["upgrade", "--all"] };
            let outcome = rig.tap_ctl(&args);
            assert_eq!(outcome.code, 0, "{}", outcome.err);
            let next = wait_for_successor(&rig, &device, pid);
            assert_eq!(outcome.out, format!("pid={next} minor={}", device.minor));
            let before = responses(&rig, &device);
            wait_until("an answer", &rig, || responses(&rig, &device) != before);
        }
    });
    finish(&rig, &device);
    assert_ne!(rig.tap_ctl(&["upgrade"]).code, 0);
    assert_eq!(rig.tap_ctl(&["upgrade", "--all"]).code, 0, "there is nothing to upgrade");
}

#[test]
fn nbd_clients_find_the_disk_under_the_name_they_know() {
    let rig = rig();
    let params = disk(&rig, "raw", "disk");
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let known = rig.host.control().vbd_path(device.pid, device.minor);
    let mut pid = device.pid;
    for seed in 1..4 {
        frontend.write(Sector(8), &pattern(seed, 4096)).unwrap();
        kill_tapdisk(&rig, &device);
        pid = wait_for_successor(&rig, &Device { pid, ..device.clone() }, pid);
        std::os::unix::net::UnixStream::connect(&known).unwrap();
        assert!(frontend.read(Sector(8), 4096).unwrap() == pattern(seed, 4096));
    }
    finish(&rig, &device);
}

#[test]
fn an_idle_disk_may_be_upgraded_as_often_as_one_likes() {
    let rig = rig();
    let params = disk(&rig, "raw", "disk");
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(8), &pattern(1, 4096)).unwrap();
    for _ in 0..12 {
        let pid = record(&rig, &device).pid;
        let outcome = rig.tap_ctl(&["upgrade", "--all"]);
        assert_eq!(outcome.code, 0, "{}", outcome.err);
        wait_for_successor(&rig, &device, pid);
    }
    assert!(frontend.read(Sector(8), 4096).unwrap() == pattern(1, 4096));
    finish(&rig, &device);
}

#[test]
fn tapdisks_that_die_without_having_done_anything_are_not_replaced_for_ever() {
    let rig = rig();
    let params = disk(&rig, "raw", "disk");
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    // The image is gone, so that none of them can go on, and the guest waits for its answer.
    std::fs::remove_file(rig.path("disk")).unwrap();
    frontend.submit(Io::Write(Sector(0), &pattern(1, 4096)));
    kill_tapdisk(&rig, &device);
    frontend.kick().unwrap();
    rig.wait_value(&format!("{}/state", device.backend), "5");
    let error = format!("/local/domain/0/error/backend/vbd3/1/{XVDA}/error");
    let told = String::from_utf8(rig.store.read(&error).unwrap()).unwrap();
    assert!(told.contains("no other one can go on"), "{told}");
    rig.destroy(&device);
    rig.assert_clean();
}

#[test]
fn a_guest_that_changes_our_counter_meanwhile_loses_its_ring_and_nothing_else() {
    let mut rig = rig();
    let params = disk(&rig, "raw", "disk");
    let (device, mut hostile) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    hostile.write(Sector(0), &pattern(1, 4096)).unwrap();
    let page = hostile.ring_refs()[0];
    assert_eq!(hostile.domain().mappings(page), 1);
    rig.kill_xenio();
    kill_tapdisk(&rig, &device);
    let (ring, domain) = hostile.ring();
    let frame = ring.frames().next().unwrap();
    domain.write(frame, blkif::abi::header::RSP_PROD, &1000u32.to_ne_bytes());
    rig.start_xenio();
    // Connected anew, it finds a ring that was never set up so, and is refused for that.
    rig.wait_value(&format!("{}/state", device.backend), "5");
    let pid = record(&rig, &device).pid;
    assert_ne!(pid, device.pid);
    assert!(record(&rig, &device).rings.is_empty());
    rig.destroy(&device);
    rig.assert_clean();
}
