//! Guests on qcow2 images, alone and in chains.

use std::path::PathBuf;

use blkif::DomId;
use integration::rig::Rig;
use integration::sim::frontend::Shape;

use super::support::*;

const SIZE: usize = 8 * MIB;

/// Disks that begin with these bytes: parameters, the image that is written, and what must stay as it is.
fn disks(rig: &Rig, round: u16) -> Vec<(String, PathBuf, Vec<u8>)> {
    let mib = SIZE / MIB;
    let name = |name: &str| format!("{round}-{name}");
    let base = pattern(9, SIZE);
    std::fs::write(rig.path(&name("base.img")), &base).unwrap();
    let (plain, params) = qcow2(rig, &name("plain.qcow2"), mib, None);
    let (over_raw, on_raw) = qcow2(rig, &name("child.qcow2"), mib, Some((&name("base.img"), "raw")));
    qcow2(rig, &name("middle.qcow2"), mib, Some((&name("base.img"), "raw")));
    let (over_qcow2, on_qcow2) = qcow2(rig, &name("leaf.qcow2"), mib, Some((&name("middle.qcow2"), "qcow2")));
    vec![(params, plain, vec![0; SIZE]), (on_raw, over_raw, base.clone()), (on_qcow2, over_qcow2, base)]
}

#[test]
fn a_guest_that_reads_writes_and_discards_on_a_qcow2_finds_what_it_wrote() {
    let rig = rig();
    let disks = disks(&rig, 1);
    for (domid, (params, path, model)) in (1..).zip(disks) {
        let shape = Shape { persistent: true, indirect: 64, ..Shape::simple(DomId(domid)) };
        let (device, mut frontend) = guest(&rig, domid, &params, shape);
        let mut storm = Storm::new(model, 5, true);
        storm.blow(&mut frontend, 1500);
        storm.verify(&mut frontend);
        rig.unplug(&device);
        check_qcow2(&path, false);
        let (device, mut frontend) = guest(&rig, 10 + domid, &params, Shape::simple(DomId(10 + domid)));
        storm.verify(&mut frontend);
        rig.unplug(&device);
    }
    assert!(std::fs::read(rig.path("1-base.img")).unwrap() == pattern(9, SIZE), "parents are not written");
    rig.assert_clean();
}

#[test]
fn a_killed_tapdisk_loses_no_acknowledged_write_of_a_qcow2() {
    let rig = rig();
    let disks = disks(&rig, 2);
    for (domid, (params, path, model)) in (1..).zip(disks) {
        let (device, mut frontend) = guest(&rig, domid, &params, Shape::simple(DomId(domid)));
        let mut storm = Storm::new(model, 6, true);
        storm.blow(&mut frontend, 400);
        let pid = nix::unistd::Pid::from_raw(device.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        rig.destroy(&device);
        for name in ["2-base.img", "2-middle.qcow2"] {
            wait_for_lock(&rig.path(name));
        }
        wait_for_lock(&path);
        check_qcow2(&path, true);
        let (device, mut frontend) = guest(&rig, 10 + domid, &params, Shape::simple(DomId(10 + domid)));
        storm.verify(&mut frontend);
        storm.blow(&mut frontend, 200);
        storm.verify(&mut frontend);
        rig.unplug(&device);
        check_qcow2(&path, true);
    }
}
