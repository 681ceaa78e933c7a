//! A disk that is paused under its guest: nothing is lost, nobody is told, and the image is free meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};

use blkif::{DomId, Sector};
use integration::rig::{Device, Rig};
use integration::sim::frontend::{Frontend, Io, Shape};

use super::support::*;

const SIZE: usize = 8 * MIB;

/// Runs tap-ctl on a device's disk; exit code and standard error.
pub fn order(rig: &Rig, device: &Device, command: &str, options: &[&str]) -> (i32, String) {
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    let outcome = rig.tap_ctl(&[&[command, "-p", &pid, "-m", &minor], options].concat());
    (outcome.code, outcome.err)
}

pub fn ok(rig: &Rig, device: &Device, command: &str, options: &[&str]) {
    assert_eq!(order(rig, device, command, options), (0, String::new()), "{command} {options:?}");
}

/// Blows a storm until `act` has ended, and verifies it.
pub fn under_load(frontend: &mut Frontend, storm: &mut Storm, act: impl FnOnce()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let blowing = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                storm.blow(frontend, 50);
            }
            storm.blow(frontend, 50);
        });
        // Ended also when `act` panics: the scope would wait for it for ever.
        let acted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::Relaxed);
        blowing.join().unwrap();
        if let Err(panic) = acted {
            std::panic::resume_unwind(panic);
        }
    });
    storm.verify(frontend);
}

fn state(rig: &Rig) -> String {
    let list = rig.tap_ctl(&["list"]).out;
    list.split(' ').find_map(|field| field.strip_prefix("state=")).unwrap_or_default().to_owned()
}

/// One shape for each way in which rings are served.
fn shapes(rig: &Rig) -> Vec<Shape> {
    let queues = most_queues(rig);
    let plain = Shape::simple(DomId(1));
    vec![plain, Shape { queues, persistent: true, indirect: 64, ..plain }]
}

#[test]
fn pauses_under_load_are_not_noticed() {
    let rig = rig();
    for (n, shape) in (1..).zip(shapes(&rig)) {
        for kind in ["raw", "vhd"] {
            let name = format!("{n}.{kind}");
            let (path, params) =
                if kind == "raw" { raw(&rig, &name, SIZE) } else { vhd(&rig, &name, SIZE / MIB) };
            let (device, mut frontend) = guest(&rig, n, &params, shape);
            let mut storm = Storm::new(vec![0; SIZE], 7, true);
            under_load(&mut frontend, &mut storm, || {
                for _ in 0..8 {
                    ok(&rig, &device, "pause", &[]);
                    assert_eq!(state(&rig), "0x2a");
                    // Nobody has the image: whoever wants to may have it all.
                    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
                    let all = libc::flock {
                        l_type: libc::F_WRLCK as i16,
                        l_whence: 0,
                        l_start: 0,
                        l_len: 0,
                        l_pid: 0,
                    };
                    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&all)).unwrap();
                    if kind == "vhd" {
                        assert!(
                            vhd_util(&["check", "-i", "-n", path.to_str().unwrap()]).contains("is valid")
                        );
                    }
                    drop(file);
                    ok(&rig, &device, "unpause", &[]);
                    assert_eq!(state(&rig), "0");
                }
            });
            rig.unplug(&device);
        }
    }
    rig.assert_clean();
}

#[test]
fn the_codes_are_xenservers() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", SIZE);
    let (_, small) = raw(&rig, "small.img", SIZE / 2);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(8), &pattern(1, 4096)).unwrap();
    assert_eq!(order(&rig, &device, "unpause", &[]).0, libc::EINVAL);
    ok(&rig, &device, "pause", &[]);
    ok(&rig, &device, "pause", &["-t", "5"]);
    assert_eq!(order(&rig, &device, "resize", &["-s", "16"]).0, libc::EBUSY);
    let missing = format!("aio:{}", rig.path("missing.img").display());
    for (image, code) in [(&small, 124), (&missing, libc::ENOENT)] {
        let (found, err) = order(&rig, &device, "unpause", &["-a", image]);
        assert!(found == code && err.contains(image.strip_prefix("aio:").unwrap()), "{found}: {err}");
        assert_eq!(state(&rig), "0x2a");
    }
    ok(&rig, &device, "unpause", &[]);
    assert!(frontend.read(Sector(8), 4096).unwrap() == pattern(1, 4096));
    assert_eq!(order(&rig, &device, "unpause", &[]).0, libc::EINVAL);
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn another_image_takes_the_place_of_the_one_before() {
    let rig = rig();
    for (n, shape) in (1..).zip(shapes(&rig)) {
        let (path, params) = raw(&rig, &format!("{n}.img"), SIZE);
        let (device, mut frontend) = guest(&rig, n, &params, shape);
        frontend.write(Sector(0), &pattern(1, SIZE)).unwrap();
        ok(&rig, &device, "pause", &[]);
        // What is asked for meanwhile waits for the image that comes.
        frontend.submit(Io::Read(Sector(0), 4096));
        frontend.kick().unwrap();
        let copy = rig.path(&format!("{n}-copy.img"));
        std::fs::copy(&path, &copy).unwrap();
        std::fs::write(&path, pattern(9, SIZE)).unwrap();
        let other = format!("aio:{}", copy.display());
        ok(&rig, &device, "unpause", &["-a", &other]);
        assert!(answers(&mut frontend, 1)[0].data == pattern(1, 4096));
        assert!(rig.tap_ctl(&["list"]).out.ends_with(&other));
        assert!(frontend.read(Sector(0), SIZE).unwrap() == pattern(1, SIZE));
        // An image of another format, which has to serve all rings from one thread.
        let child = rig.path(&format!("{n}.vhd"));
        ok(&rig, &device, "pause", &[]);
        let (child, parent) = (child.to_str().unwrap(), copy.to_str().unwrap());
        vhd_util(&["snapshot", "-n", child, "-p", parent, "-m"]);
        ok(&rig, &device, "unpause", &["-a", &format!("vhd:{child}")]);
        frontend.write(Sector(3), &pattern(5, MIB)).unwrap();
        assert!(frontend.read(Sector(3), MIB).unwrap() == pattern(5, MIB));
        rig.unplug(&device);
        assert!(std::fs::read(parent).unwrap() == pattern(1, SIZE), "the parent is as it was");
    }
    rig.assert_clean();
}

#[test]
fn a_larger_image_is_told_as_growth() {
    let rig = rig();
    let (path, params) = raw(&rig, "a.img", SIZE);
    let (device, mut frontend) =
        guest(&rig, 1, &params, Shape { queues: most_queues(&rig), ..Shape::simple(DomId(1)) });
    ok(&rig, &device, "pause", &[]);
    std::fs::File::options().write(true).open(path).unwrap().set_len(2 * SIZE as u64).unwrap();
    ok(&rig, &device, "unpause", &[]);
    rig.wait_value(&format!("{}/sectors", device.backend), &(2 * SIZE / 512).to_string());
    frontend.write(Sector(SIZE as u64 / 512), &pattern(2, SIZE)).unwrap();
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn frontends_come_and_go_while_the_disk_is_paused() {
    let rig = rig();
    for (n, shape) in (1..).zip(shapes(&rig)) {
        let (_, params) = raw(&rig, &format!("{n}.img"), SIZE);
        rig.create_domain(n);
        let device = rig.plug(n, XVDA, &params, "w").unwrap();
        ok(&rig, &device, "pause", &[]);
        let shape = Shape { guest: DomId(n), ..shape };
        let mut frontend = Frontend::create(&rig.host.xen(), shape).unwrap();
        rig.connect(&device, &frontend);
        for _ in 0..4 {
            frontend.submit(Io::Read(Sector(0), 4096));
        }
        frontend.kick().unwrap();
        // It goes without an answer, and comes again.
        rig.store.write(&format!("{}/state", device.frontend), "5");
        rig.wait_value(&format!("{}/state", device.backend), "5");
        rig.store.write(&format!("{}/state", device.frontend), "6");
        rig.wait_value(&format!("{}/state", device.backend), "6");
        assert_eq!((frontend.outstanding(), frontend.domain().mapped_pages()), (4, 0));
        frontend.restart().unwrap();
        rig.store.write(&format!("{}/state", device.frontend), "1");
        rig.wait_value(&format!("{}/state", device.backend), "2");
        rig.connect(&device, &frontend);
        frontend.submit(Io::Write(Sector(0), &pattern(3, 4096)));
        frontend.kick().unwrap();
        ok(&rig, &device, "unpause", &[]);
        assert!(answers(&mut frontend, 1)[0].is_okay());
        let mut storm = Storm::new(frontend.read(Sector(0), SIZE).unwrap(), 5, false);
        storm.blow(&mut frontend, 100);
        storm.verify(&mut frontend);
        ok(&rig, &device, "pause", &[]);
        rig.destroy(&device);
        rig.assert_clean();
    }
}

#[test]
fn xenio_that_is_killed_during_a_pause_finds_the_disk_again() {
    let mut rig = rig();
    let (_, params) = vhd(&rig, "a.vhd", SIZE / MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    ok(&rig, &device, "pause", &[]);
    rig.kill_xenio();
    rig.start_xenio();
    frontend.submit(Io::Write(Sector(0), &pattern(3, 4096)));
    frontend.kick().unwrap();
    ok(&rig, &device, "unpause", &[]);
    assert!(answers(&mut frontend, 1)[0].is_okay());
    rig.unplug(&device);
    rig.assert_clean();
}
