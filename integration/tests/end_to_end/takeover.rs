//! Tapdisks that are killed, or make room for others, under busy guests.

use std::time::Instant;

use blkif::{Abi, DomId, RingOrder, Sector};
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};
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

fn record(rig: &Rig, device: &Device) -> Record {
    folder(rig, device).read().unwrap().expect("a record")
}

/// What the rings have answered so far.
fn responses(rig: &Rig, device: &Device) -> Vec<Option<u32>> {
    let folder = folder(rig, device);
    let record = record(rig, device);
    let queues =
        record.rings.iter().flat_map(|ring| ring.queues.iter().map(|queue| folder.journal(ring, queue)));
    queues.map(|path| journal::responses(&path)).collect()
}

/// Waits for something that another process does without telling.
fn wait_until(what: &str, rig: &Rig, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "{what} does not happen; xenio said:\n{}", rig.xenio_log());
        std::thread::yield_now();
    }
}

/// Waits until XenStore names another tapdisk than `pid`.
fn wait_for_successor(rig: &Rig, device: &Device, pid: i32) -> i32 {
    let path = format!("{}/physical-device-path", device.backend);
    let old = rig.host.control().vbd_path(pid, device.minor);
    let old = old.to_str().unwrap().as_bytes();
    let changed = rig.store.wait_for(&path, PATIENCE, |value| value.is_some_and(|value| value != old));
    assert!(changed, "nobody went on; xenio said:\n{}", rig.xenio_log());
    record(rig, device).pid
}

fn kill_tapdisk(rig: &Rig, device: &Device) -> i32 {
    let pid = record(rig, device).pid;
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    pid
}

/// Kills the disk's tapdisk so many times, each after it has answered something, and waits for the next one each time.
fn kill_often(rig: &Rig, device: &Device, times: u32) {
    for _ in 0..times {
        let before = responses(rig, device);
        wait_until("an answer", rig, || responses(rig, device) != before);
        let pid = kill_tapdisk(rig, device);
        wait_for_successor(rig, device, pid);
    }
}

/// Takes the disk away, which another tapdisk serves than the one that the toolstack started.
fn finish(rig: &Rig, device: &Device) {
    unplug(rig, device);
    rig.assert_clean();
}

fn disk(rig: &Rig, kind: &str, name: &str) -> String {
    match kind {
        "raw" => raw(rig, name, SIZE).1,
        "vhd" => vhd(rig, name, SIZE / MIB).1,
        _ => {
            let path = rig.path(name);
            let size = SIZE.to_string();
            let made = std::process::Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &size])
                .status()
                .unwrap();
            assert!(made.success());
            format!("qcow2:{}", path.display())
        }
    }
}

fn survives_kills(kind: &str, shape: Shape, times: u32) {
    let rig = rig();
    let params = disk(&rig, kind, "disk");
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    let mut storm = Storm::new(vec![0; SIZE], 11, true);
    under_load(&mut frontend, &mut storm, || kill_often(&rig, &device, times));
    finish(&rig, &device);
}

#[test]
fn a_guest_on_a_raw_disk_does_not_notice_kills() {
    survives_kills("raw", Shape::simple(DomId(1)), 30);
}
