//! A host that runs out of descriptors or memory: errors where something new is wanted, nothing for disks in use, and everything
//! as before once there is enough again.

use std::process::Command;

use blkif::{DomId, Sector};
use integration::rig::Rig;
use integration::sim::frontend::{Frontend, Io, Shape};

use super::hostile_load::files;
use super::support::*;

/// Sets a process' limit (soft and hard) with the tool of util-linux, which every Debian has.
fn limit(pid: i32, what: &str) {
    let done = Command::new("prlimit").args(["--pid", &pid.to_string(), what]).status().unwrap();
    assert!(done.success(), "{what}");
}

/// No descriptor above those in use.
fn no_more_files(pid: i32) {
    limit(pid, &format!("--nofile={}:4096", files(pid)));
}

fn enough_files(pid: i32) {
    limit(pid, "--nofile=4096:4096");
}

fn state(rig: &Rig, device: &integration::rig::Device, guest: &str, answer: &str) {
    rig.store.write(&format!("{}/state", device.frontend), guest);
    rig.wait_value(&format!("{}/state", device.backend), answer);
}

fn still_works(frontend: &mut Frontend, seed: u8) {
    frontend.write(Sector(64), &pattern(seed, 256 << 10)).unwrap();
    frontend.flush().unwrap();
    assert!(frontend.read(Sector(64), 256 << 10).unwrap() == pattern(seed, 256 << 10));
}

/// A second guest of the disk, which cannot be connected while `scarce` holds and is when it has ended.
fn refused_and_then_served(scarce: impl Fn(i32), ended: impl Fn(i32)) {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", 4 * MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let (second, mut other) = also(&rig, &device, 2);
    for round in 0..3 {
        // The simulated devices open what they need of a domain when they first meet it.
        still_works(&mut frontend, round);
        still_works(&mut other, round);
        state(&rig, &second, "6", "6");
        other.restart().unwrap();
        state(&rig, &second, "1", "2");
        scarce(device.pid);
        rig.announce(&second, &other.keys());
        rig.wait_value(&format!("{}/state", second.backend), "5");
        still_works(&mut frontend, round);
        ended(device.pid);
        state(&rig, &second, "6", "6");
        other.restart().unwrap();
        state(&rig, &second, "1", "2");
        rig.connect(&second, &other);
        still_works(&mut other, round);
        still_works(&mut frontend, round);
    }
    rig.ask_to_close(&second);
    rig.close_frontend(&second);
    rig.wait_value(&format!("{}/state", second.backend), "6");
    rig.store.rm(&second.backend);
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_tapdisk_without_descriptors_refuses_a_ring_and_goes_on_with_the_others() {
    refused_and_then_served(no_more_files, enough_files);
}

#[test]
fn a_tapdisk_without_memory_refuses_a_ring_and_goes_on_with_the_others() {
    // What the process has it keeps; the heap has room for a message, and nothing new can be mapped.
    let scarce = |pid| limit(pid, "--as=1:unlimited");
    refused_and_then_served(scarce, |pid| limit(pid, "--as=unlimited:unlimited"));
}

#[test]
fn an_image_that_finds_no_descriptor_is_refused_with_the_reason_and_opened_later() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let pid = {
        assert_eq!(rig.tap_ctl(&["allocate"]).code, 0);
        let pid = rig.tap_ctl(&["spawn"]).out;
        assert_eq!(rig.tap_ctl(&["attach", "-p", &pid, "-m", "0"]).code, 0);
        pid
    };
    let open = || rig.tap_ctl(&["open", "-p", &pid, "-m", "0", "-a", &params]);
    let number = pid.parse().unwrap();
    // One for the connection that asks.
    limit(number, &format!("--nofile={}:4096", files(number) + 1));
    let refused = open();
    assert_eq!(refused.code, libc::EMFILE, "{}", refused.err);
    enough_files(number);
    let opened = open();
    assert_eq!(opened.code, 0, "{}", opened.err);
    assert_eq!(rig.tap_ctl(&["destroy", "-p", &pid, "-m", "0"]).code, 0);
    rig.assert_clean();
}

#[test]
fn who_asks_a_tapdisk_without_descriptors_is_answered_when_it_has_some() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    still_works(&mut frontend, 0);
    no_more_files(device.pid);
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| rig.tap_ctl(&["stats", "-p", &device.pid.to_string(), "-m", "0"]));
        still_works(&mut frontend, 1);
        enough_files(device.pid);
        let answer = asked.join().unwrap();
        assert_eq!(answer.code, 0, "{}", answer.err);
    });
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_xenio_without_descriptors_keeps_its_disks_and_serves_new_ones_later() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    no_more_files(rig.xenio_pid());
    let (_, params) = raw(&rig, "b.img", MIB);
    rig.create_domain(2);
    let second = rig.plug(2, XVDA, &params, "w").unwrap();
    let mut other = Frontend::create(&rig.host.xen(), Shape::simple(DomId(2))).unwrap();
    rig.announce(&second, &other.keys());
    still_works(&mut frontend, 1);
    // The first guest's life goes on meanwhile: its tapdisk's connections are there.
    state(&rig, &device, "6", "6");
    frontend.restart().unwrap();
    state(&rig, &device, "1", "2");
    rig.connect(&device, &frontend);
    still_works(&mut frontend, 2);
    assert_eq!(rig.store.read(&format!("{}/state", second.backend)).unwrap(), b"2", "it waits");
    enough_files(rig.xenio_pid());
    rig.wait_value(&format!("{}/state", second.backend), "4");
    rig.store.write(&format!("{}/state", second.frontend), "4");
    assert!(other.run(Io::Write(Sector(0), &[1; 512])).unwrap().is_okay());
    rig.unplug(&second);
    rig.unplug(&device);
    rig.assert_clean();
}
