//! Hosts that fail: disks that cannot make data durable, kernels that refuse io_uring.

use std::collections::VecDeque;
use std::time::Duration;

use blkif::{DomId, Sector};
use integration::programs;
use integration::rig::Rig;
use integration::sim::frontend::{Io, Shape};

use super::support::*;

/// A frontend takes an error for "no flush here", and an okay for the truth: both would lie (`xen-blkfront.c`,
/// `blkif_interrupt`). So there is no answer, and the device is given up for the administrator to see.
#[test]
fn a_flush_that_fails_is_never_answered_and_ends_the_device() {
    let mut rig = Rig::start(programs!());
    let (_, params) = raw(&rig, "good.img", MIB);
    let (good, mut honest) = guest(&rig, 2, &params, Shape::simple(DomId(2)));
    // Threads, because a filter does not see what io_uring does.
    rig.spawn_options = vec!["--engine".into(), "pool".into()];
    rig.refuse = format!("fdatasync={}", libc::EIO);
    for (domid, ending) in [(1, Io::Flush), (3, Io::Barrier(Sector(0), &[7; 512]))] {
        let (_, params) = raw(&rig, &format!("{domid}.img"), MIB);
        let (device, mut frontend) = guest(&rig, domid, &params, Shape::simple(DomId(domid)));
        frontend.write(Sector(0), &pattern(1, 8192)).unwrap();
        let lost = frontend.submit(ending);
        frontend.kick().unwrap();
        rig.wait_value(&format!("{}/state", device.backend), "5");
        let mut out = VecDeque::new();
        frontend.poll(&mut out).unwrap();
        assert!(out.iter().all(|answer| answer.id != lost), "{out:?}");
        let error = rig.store.read(&format!("/local/domain/0/error/backend/vbd3/{domid}/{XVDA}/error"));
        let error = String::from_utf8_lossy(&error.expect("an error for the administrator")).into_owned();
        assert!(error.contains(&format!("{domid}.img")), "{error}");
        rig.store.write(&format!("{}/state", device.frontend), "6");
        rig.wait_value(&format!("{}/state", device.backend), "6");
        frontend.poll(&mut out).unwrap();
        assert!(out.iter().all(|answer| answer.id != lost), "nor when the ring is given up: {out:?}");
        assert_eq!(frontend.domain().mapped_pages(), 0);
        rig.ask_to_close(&device);
        rig.finish_removal(&device);
    }
    honest.write(Sector(0), &pattern(2, 8192)).unwrap();
    honest.flush().unwrap();
    rig.unplug(&good);
    rig.assert_clean();
}

#[test]
fn without_io_uring_threads_do_the_work_unless_it_was_demanded() {
    let mut rig = Rig::start(programs!());
    rig.refuse = format!("io_uring_setup={}", libc::EPERM);
    for (domid, engine) in [(1, "auto"), (2, "pool")] {
        rig.spawn_options = vec!["--engine".into(), engine.into()];
        let (_, params) = raw(&rig, &format!("{domid}.img"), 4 * MIB);
        let (device, mut frontend) = guest(&rig, domid, &params, Shape::simple(DomId(domid)));
        let mut storm = Storm::new(vec![0; 4 * MIB], 3, true);
        storm.blow(&mut frontend, 300);
        storm.verify(&mut frontend);
        rig.unplug(&device);
    }
    rig.spawn_options = vec!["--engine".into(), "uring".into()];
    rig.create_domain(3);
    let (_, params) = raw(&rig, "3.img", MIB);
    let error = rig.plug(3, XVDA, &params, "w").unwrap_err();
    assert!(error.contains("3.img") && error.contains("engine"), "{error}");
    rig.assert_clean();
}

/// A disk whose tapdisk has died does not answer; the guest waits, and the host can take it away.
#[test]
fn a_guest_may_go_while_its_tapdisk_is_dying() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(0), &pattern(1, 4096)).unwrap();
    let pid = nix::unistd::Pid::from_raw(device.pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    frontend.submit(Io::Read(Sector(0), 4096));
    frontend.kick().unwrap();
    // Another one may be about to go on, or have done so already.
    rig.destroy(&device);
    // Another one can serve the same image, and finds what was acknowledged.
    let (device, mut frontend) = guest(&rig, 2, &params, Shape::simple(DomId(2)));
    assert!(frontend.read(Sector(0), 4096).unwrap() == pattern(1, 4096));
    rig.unplug(&device);
    rig.assert_clean();
}

/// What may pass is tried again, for as long as the administrator says.
#[test]
fn a_write_that_fails_for_now_is_tried_again_until_its_time_is_over() {
    let mut rig = Rig::start(programs!());
    rig.spawn_options = vec!["--engine".into(), "pool".into()];
    rig.refuse = format!("pwrite64={}", libc::EBUSY);
    rig.open_options = vec!["-t".into(), "2".into()];
    let (_, params) = raw(&rig, "a.img", MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let start = std::time::Instant::now();
    assert!(!frontend.run(Io::Write(Sector(0), &pattern(1, 4096))).unwrap().is_okay());
    // Milliseconds of the clock that is read are missing.
    assert!(start.elapsed() >= Duration::from_millis(1900), "{:?}", start.elapsed());
    assert!(frontend.read(Sector(0), 4096).unwrap() == [0; 4096]);
    // Nobody waits for a try of a guest that goes.
    frontend.submit(Io::Write(Sector(0), &pattern(1, 4096)));
    frontend.kick().unwrap();
    rig.destroy(&device);
    rig.assert_clean();
}
