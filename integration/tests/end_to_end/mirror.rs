//! A disk with a second image: what the guest writes is in both, and a second image that fails is no secret.

use std::path::Path;

use blkif::DomId;
use integration::rig::{Device, Rig};
use integration::sim::frontend::Shape;

use super::pause::{ok, order, under_load};
use super::support::*;

const SIZE: usize = 8 * MIB;

pub fn stats(rig: &Rig, device: &Device, options: &[&str]) -> String {
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    let outcome = rig.tap_ctl(&[&["stats", "-p", &pid, "-m", &minor], options].concat());
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    outcome.out
}

/// Waits until the statistics say so.
pub fn until(rig: &Rig, device: &Device, options: &[&str], part: &str) {
    let end = std::time::Instant::now() + integration::rig::PATIENCE;
    loop {
        let seen = stats(rig, device, options);
        if seen.contains(part) {
            return;
        }
        assert!(std::time::Instant::now() < end, "{part:?} is not in {seen}");
    }
}

fn copied(rig: &Rig, device: &Device) {
    until(rig, device, &["--full"], &format!("\"copied\":{SIZE}"));
}

/// The bytes of an image that is at rest.
fn content(rig: &Rig, params: &str, path: &Path) -> Vec<u8> {
    if params.starts_with("aio:") {
        return std::fs::read(path).unwrap();
    }
    rig.create_domain(99);
    let (device, mut frontend) = guest(rig, 99, params, Shape::simple(DomId(99)));
    let bytes = frontend.read(blkif::Sector(0), SIZE).unwrap();
    rig.unplug(&device);
    bytes
}

#[test]
fn a_second_image_that_comes_under_load_has_everything_in_the_end() {
    let rig = rig();
    for (n, kind) in (1..).zip(["raw", "vhd"]) {
        let (path, params) = raw(&rig, &format!("{n}.img"), SIZE);
        std::fs::write(&path, pattern(3, SIZE)).unwrap();
        let name = format!("{n}.second");
        let (second, secondary) =
            if kind == "raw" { raw(&rig, &name, SIZE) } else { vhd(&rig, &name, SIZE / MIB) };
        let queues = most_queues(&rig);
        let shape = Shape { queues, persistent: true, ..Shape::simple(DomId(n)) };
        let (device, mut frontend) = guest(&rig, n, &params, shape);
        // Without discards: what they leave is not defined.
        let mut storm = Storm::new(pattern(3, SIZE), 11, false);
        under_load(&mut frontend, &mut storm, || {
            ok(&rig, &device, "pause", &[]);
            ok(&rig, &device, "unpause", &["-2", &secondary]);
            copied(&rig, &device);
        });
        assert!(stats(&rig, &device, &[]).contains("\"nbd_mirror_failed\": 0"));
        assert_eq!(order(&rig, &device, "resize", &["-s", "16"]).0, libc::EINVAL);
        ok(&rig, &device, "pause", &[]);
        assert!(content(&rig, &secondary, &second) == storm.model, "{kind}");
        ok(&rig, &device, "unpause", &["-2", "null"]);
        storm.blow(&mut frontend, 200);
        storm.verify(&mut frontend);
        assert!(!stats(&rig, &device, &["--full"]).contains("\"copied\""));
        rig.unplug(&device);
        assert!(std::fs::read(&path).unwrap() == storm.model);
    }
    rig.assert_clean();
}

#[test]
fn the_second_image_can_take_the_place_of_the_first() {
    let rig = rig();
    let (_, params) = raw(&rig, "first.img", SIZE);
    let (_, secondary) = raw(&rig, "second.img", SIZE);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let mut storm = Storm::new(vec![0; SIZE], 5, false);
    under_load(&mut frontend, &mut storm, || {
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &["-2", &secondary]);
        copied(&rig, &device);
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &["-a", &secondary, "-2", "null"]);
    });
    rig.unplug(&device);
    assert!(std::fs::read(rig.path("second.img")).unwrap() == storm.model);
    rig.assert_clean();
}

#[test]
fn a_second_image_that_fails_under_load_is_told_of_and_the_guest_notices_nothing() {
    let rig = rig();
    let (_, params) = raw(&rig, "first.img", SIZE);
    let (second, secondary) = raw(&rig, "second.img", SIZE);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let mut storm = Storm::new(vec![0; SIZE], 5, true);
    let mut server = std::process::Command::new("qemu-nbd")
        .args(["-t", "-f", "raw", "-e", "4", "-k"])
        .args([&rig.path("nbd.sock"), &second])
        .spawn()
        .expect("qemu-nbd is installed");
    while !rig.path("nbd.sock").exists() {
        assert!(server.try_wait().unwrap().is_none(), "qemu-nbd serves");
        std::thread::yield_now();
    }
    let remote = format!("nbd:unix:{}", rig.path("nbd.sock").display());
    under_load(&mut frontend, &mut storm, || {
        ok(&rig, &device, "pause", &[]);
        // In use by the server.
        assert_ne!(order(&rig, &device, "unpause", &["-2", &secondary]).0, 0);
        ok(&rig, &device, "unpause", &["-2", &remote]);
        copied(&rig, &device);
        server.kill().unwrap();
        server.wait().unwrap();
        until(&rig, &device, &[], "\"nbd_mirror_failed\": 1");
        assert!(stats(&rig, &device, &["--full"]).contains("nbd.sock"));
    });
    let noted = |value: Option<&[u8]>| {
        value.is_some_and(|value| String::from_utf8_lossy(value).contains("its second image: nbd:unix:"))
    };
    let note = format!("{}/degraded", device.backend);
    assert!(rig.store.wait_for(&note, integration::rig::PATIENCE, noted), "{}", rig.xenio_log());
    assert!(rig.xenio_log().contains("goes on without its second image: nbd:unix:"));
    rig.unplug(&device);
    rig.assert_clean();
}
