//! Disks that grow while a guest uses them.

use blkif::{DomId, Sector, Status};
use integration::rig::{Device, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};

use super::support::*;

fn tap_ctl_resize(rig: &Rig, device: &Device, size: &[&str]) -> i32 {
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    rig.tap_ctl(&[&["resize", "-p", &pid, "-m", &minor], size].concat()).code
}

fn wait_sectors(rig: &Rig, device: &Device, bytes: usize) {
    rig.wait_value(&format!("{}/sectors", device.backend), &(bytes / 512).to_string());
    rig.wait_value(&format!("{}/state", device.backend), "4");
}

/// The guest uses what was there all the time, and what came as soon as it is told.
fn grows_under_io(
    rig: &Rig,
    params: &str,
    shape: Shape,
    before: usize,
    after: usize,
    grow: impl Fn(&Device) + Sync,
) {
    let (device, mut frontend) = guest(rig, shape.guest.0, params, shape);
    let mut storm = Storm::new(vec![0; before], 1, false);
    storm.blow(&mut frontend, 200);
    let beyond = |frontend: &mut Frontend| frontend.run(Io::Read(Sector(before as u64 / 512), 512)).unwrap();
    assert_eq!(beyond(&mut frontend).status, Status::Error.wire());
    // The requests on their way when it happens are of the old size.
    std::thread::scope(|scope| {
        let growing = scope.spawn(|| {
            grow(&device);
            wait_sectors(rig, &device, after);
        });
        while !growing.is_finished() {
            storm.blow(&mut frontend, 20);
        }
    });
    assert!(beyond(&mut frontend).is_okay());
    storm.model.resize(after, 0);
    storm.verify(&mut frontend);
    storm.blow(&mut frontend, 200);
    storm.verify(&mut frontend);
    rig.unplug(&device);
    assert_eq!(frontend.domain().mapped_pages(), 0);
}

#[test]
fn a_raw_image_grows_by_tap_ctl_under_a_busy_guest() {
    let rig = rig();
    for (domid, persistent) in [(1, false), (2, true)] {
        let (path, params) = raw(&rig, &format!("{domid}.img"), 4 * MIB);
        let shape = Shape { persistent, indirect: 256, ..Shape::simple(DomId(domid)) };
        grows_under_io(&rig, &params, shape, 4 * MIB, 9 * MIB, |device| {
            assert_eq!(tap_ctl_resize(&rig, device, &["-s", "9"]), 0);
        });
        assert_eq!(std::fs::metadata(path).unwrap().len(), 9 * MIB as u64);
    }
    rig.assert_clean();
}

#[test]
fn a_raw_image_that_was_made_longer_is_measured_again() {
    let rig = rig();
    let (path, params) = raw(&rig, "a.img", 4 * MIB);
    grows_under_io(&rig, &params, Shape::simple(DomId(1)), 4 * MIB, 6 * MIB, |device| {
        std::fs::File::options().write(true).open(&path).unwrap().set_len(6 * MIB as u64).unwrap();
        assert_eq!(tap_ctl_resize(&rig, device, &[]), 0);
    });
    rig.assert_clean();
}

#[test]
fn every_ring_of_a_disk_sees_its_new_size() {
    let rig = rig();
    let queues = most_queues(&rig);
    let (_, params) = raw(&rig, "a.img", 4 * MIB);
    let shape = Shape { queues, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    assert_eq!(tap_ctl_resize(&rig, &device, &["-s", "8"]), 0);
    wait_sectors(&rig, &device, 8 * MIB);
    // The rings take turns.
    for _ in 0..2 * queues {
        frontend.submit(Io::Read(Sector(6 * MIB as u64 / 512), 4096));
    }
    frontend.kick().unwrap();
    assert!(answers(&mut frontend, 2 * queues).iter().all(|answer| answer.is_okay()));
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_vhd_grows_as_far_as_its_block_table_reaches_and_no_further() {
    let rig = rig();
    let path = rig.path("a.vhd");
    vhd_util(&["create", "-n", path.to_str().unwrap(), "-s", "8", "-S", "64"]);
    let params = format!("vhd:{}", path.display());
    grows_under_io(&rig, &params, Shape::simple(DomId(1)), 8 * MIB, 24 * MIB, |device| {
        assert_ne!(tap_ctl_resize(&rig, device, &["-s", "1024"]), 0);
        assert_eq!(tap_ctl_resize(&rig, device, &["-s", "24"]), 0);
    });
    assert!(vhd_util(&["check", "-n", path.to_str().unwrap()]).contains("is valid"));
    assert_eq!(vhd_util(&["query", "-n", path.to_str().unwrap(), "-v"]).trim(), "24");
    rig.assert_clean();
}

#[test]
fn a_qcow2_grows_beyond_its_tables_and_over_a_smaller_backing_file() {
    let rig = rig();
    let (_, below) = raw(&rig, "base.img", 4 * MIB);
    for (domid, backing) in [(1, None), (2, Some(("base.img", "raw")))] {
        let (path, params) = qcow2(&rig, &format!("{domid}.qcow2"), 4, backing);
        grows_under_io(&rig, &params, Shape::simple(DomId(domid)), 4 * MIB, 24 * MIB, |device| {
            assert_eq!(tap_ctl_resize(&rig, device, &["-s", "24"]), 0);
        });
        check_qcow2(&path, false);
        let (device, mut frontend) = guest(&rig, 10 + domid, &params, Shape::simple(DomId(10 + domid)));
        // One table reaches over 512 MiB, and the directory had one entry.
        assert_eq!(tap_ctl_resize(&rig, &device, &["-s", "1100"]), 0);
        wait_sectors(&rig, &device, 1100 * MIB);
        let far = Sector(1099 * MIB as u64 / 512);
        frontend.write(far, &pattern(1, 4096)).unwrap();
        assert!(frontend.read(far, 4096).unwrap() == pattern(1, 4096));
        rig.unplug(&device);
        check_qcow2(&path, false);
    }
    assert!(std::fs::read(below.strip_prefix("aio:").unwrap()).unwrap() == vec![0; 4 * MIB]);
    rig.assert_clean();
}

#[test]
fn a_disk_does_not_shrink() {
    let rig = rig();
    let (path, params) = raw(&rig, "a.img", 4 * MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(0), &pattern(1, 4 * MIB)).unwrap();
    assert_ne!(tap_ctl_resize(&rig, &device, &["-s", "2"]), 0);
    assert!(frontend.read(Sector(0), 4 * MIB).unwrap() == pattern(1, 4 * MIB));
    assert_eq!(published(&rig, &device, "sectors"), 4 * MIB as u64 / 512);
    rig.unplug(&device);
    assert_eq!(std::fs::metadata(path).unwrap().len(), 4 * MIB as u64);
    rig.assert_clean();
}
