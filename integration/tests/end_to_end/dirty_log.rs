//! A disk whose written blocks are noted: never too few of them, whatever becomes of the tapdisk.

use std::path::Path;

use blkif::{DomId, Sector};
use cbt::{BLOCK, Log};
use integration::sim::frontend::{Io, Shape};

use super::pause::{ok, under_load};
use super::support::*;

const SIZE: usize = 8 * MIB;

fn new_log(path: &Path) -> String {
    let mut log = Log::new(SIZE as u64);
    log.set_consistent(1);
    std::fs::write(path, log.bytes(0..u64::MAX)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn found(path: &Path) -> Log {
    Log::parse(&std::fs::read(path).unwrap()).unwrap()
}

/// Every block of the disk that differs from zeros is noted.
fn assert_noted(log: &Log, disk: &[u8]) {
    for (block, bytes) in (0_u64..).zip(disk.chunks(usize::try_from(BLOCK).unwrap())) {
        let range = block * BLOCK..(block + 1) * BLOCK;
        assert!(log.is_marked(&range) || bytes.iter().all(|&byte| byte == 0), "block {block} is missing");
    }
}

#[test]
fn a_log_holds_what_a_storm_has_written_and_a_quiet_disk_adds_nothing() {
    let rig = rig();
    for (n, kind) in (1..).zip(["raw", "vhd"]) {
        let name = format!("{n}.{kind}");
        let (_, params) = if kind == "raw" { raw(&rig, &name, SIZE) } else { vhd(&rig, &name, SIZE / MIB) };
        let (first, second) = (rig.path(&format!("{n}.log")), rig.path(&format!("{n}-later.log")));
        let (device, mut frontend) = guest(&rig, n, &params, Shape::simple(DomId(n)));
        let mut storm = Storm::new(vec![0; SIZE], 9, true);
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &["-c", &new_log(&first)]);
        assert_eq!(found(&first).header().consistent, 0);
        under_load(&mut frontend, &mut storm, || {
            ok(&rig, &device, "pause", &[]);
            assert_eq!(found(&first).header().consistent, 1, "a paused disk is closed");
            ok(&rig, &device, "unpause", &[]);
        });
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &["-c", &new_log(&second)]);
        let mut storm = storm.model;
        assert_noted(&found(&first), &storm);
        frontend.write(Sector(1000), &pattern(1, 512)).unwrap();
        storm[1000 * 512..1001 * 512].copy_from_slice(&pattern(1, 512));
        assert!(frontend.read(Sector(0), SIZE).unwrap() == storm);
        rig.unplug(&device);
        let later = found(&second);
        assert_eq!((later.count(), later.header().consistent), (1, 1));
    }
    rig.assert_clean();
}

/// Writes are in flight when the process is killed: of those that reached the image, none is missing in the log.
#[test]
fn a_tapdisk_that_is_killed_under_load_leaves_no_block_out() {
    for round in 0..3_u64 {
        let rig = rig();
        let (path, params) = raw(&rig, "a.img", SIZE);
        let log = rig.path("a.log");
        let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &["-c", &new_log(&log)]);
        let mut dice = Dice::new(round);
        let data = pattern(1, 4096);
        let mut out = std::collections::VecDeque::new();
        while out.len() < 200 + 100 * usize::try_from(round).unwrap() {
            while frontend.free_slots() > 0 {
                frontend.submit(Io::Write(Sector(dice.roll(SIZE as u64 / 4096) * 8), &data));
            }
            frontend.kick().unwrap();
            frontend.poll(&mut out).unwrap();
        }
        let pid = nix::unistd::Pid::from_raw(device.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        wait_for_lock(&path);
        let (disk, log) = (std::fs::read(&path).unwrap(), found(&log));
        assert!(disk.iter().any(|&byte| byte != 0));
        assert_eq!(log.header().consistent, 0);
        assert_noted(&log, &disk);
    }
}
