//! Snapshots of a disk in use: the image so far stays as it is, and no write gets lost between the two.

use std::path::Path;
use std::process::Command;

use blkif::{DomId, Sector};
use integration::sim::frontend::{Completion, Io, MAX_TRANSFER, Shape};

use super::pause::{ok, order, under_load};
use super::support::*;

const SIZE: usize = 8 * MIB;

fn check(path: &Path) {
    if path.extension().is_some_and(|kind| kind == "qcow2") {
        check_qcow2(path, false);
        // QEMU is of the same opinion, where it is installed.
        if let Ok(checked) = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output() {
            assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
        }
        return;
    }
    assert!(vhd_util(&["check", "-n", path.to_str().unwrap()]).contains("is valid"), "{}", path.display());
}

#[test]
fn a_snapshot_under_load_freezes_the_parent_and_loses_nothing() {
    let rig = rig();
    let queues = most_queues(&rig);
    for (domid, kind, child, queues) in [
        (1, "raw", "vhd", 1),
        (2, "vhd", "vhd", 1),
        (3, "raw", "vhd", queues),
        (4, "raw", "qcow2", queues),
        (5, "vhd", "qcow2", 1),
        (6, "qcow2", "qcow2", 1),
    ] {
        let name = format!("{domid}.{kind}");
        let (path, params) = match kind {
            "raw" => raw(&rig, &name, SIZE),
            "vhd" => vhd(&rig, &name, SIZE / MIB),
            _ => qcow2(&rig, &name, SIZE / MIB, None),
        };
        let (device, mut frontend) = guest(&rig, domid, &params, Shape { queues, ..Shape::simple(DomId(1)) });
        let mut storm = Storm::new(vec![0; SIZE], 11, true);
        let (one, two) = (rig.path(&format!("{domid}-1.{child}")), rig.path(&format!("{domid}-2.{child}")));
        under_load(&mut frontend, &mut storm, || {
            ok(&rig, &device, "snapshot", &["-a", &format!("{child}:{}", one.display())]);
            let parent = std::fs::read(&path).unwrap();
            ok(&rig, &device, "snapshot", &["-a", &format!("{child}:{}", two.display())]);
            let first = std::fs::read(&one).unwrap();
            // Under the eyes of the load.
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(std::fs::read(&path).unwrap() == parent, "the parent has changed");
            assert!(std::fs::read(&one).unwrap() == first, "the first child has changed");
        });
        assert!(rig.tap_ctl(&["list"]).out.ends_with(&format!("args={child}:{}", two.display())));
        rig.unplug(&device);
        check(&one);
        check(&two);
        // The chain is what a tapdisk finds that knows nothing of all this.
        let (device, mut frontend) =
            guest(&rig, 10 + domid, &format!("{child}:{}", two.display()), Shape::simple(DomId(1)));
        storm.verify(&mut frontend);
        rig.unplug(&device);
    }
    rig.assert_clean();
}

#[test]
fn a_snapshot_that_fails_leaves_the_disk_as_it_was() {
    let rig = rig();
    let (path, params) = raw(&rig, "a.img", SIZE);
    let (device, mut frontend) =
        guest(&rig, 1, &params, Shape { queues: most_queues(&rig), ..Shape::simple(DomId(1)) });
    let mut storm = Storm::new(vec![0; SIZE], 13, true);
    let other = rig.path("apart");
    std::fs::create_dir(&other).unwrap();
    let taken = rig.path("taken.vhd");
    std::fs::write(&taken, "somebody's").unwrap();
    under_load(&mut frontend, &mut storm, || {
        for (image, code) in [
            (format!("vhd:{}", taken.display()), libc::EEXIST),
            (format!("vhd:{}", rig.path("missing/c.vhd").display()), libc::ENOENT),
            (format!("aio:{}", rig.path("c.img").display()), libc::EOPNOTSUPP),
            // A raw parent above the child's own folder is not opened.
            (format!("vhd:{}", other.join("c.vhd").display()), libc::EPERM),
        ] {
            let (found, err) = order(&rig, &device, "snapshot", &["-a", &image]);
            assert!(found == code && !err.contains("stays paused"), "{image}: {found}: {err}");
        }
        ok(&rig, &device, "pause", &[]);
        let image = format!("vhd:{}", rig.path("c.vhd").display());
        assert_eq!(order(&rig, &device, "snapshot", &["-a", &image]).0, libc::EBUSY);
        ok(&rig, &device, "unpause", &[]);
    });
    assert_eq!(std::fs::read(&taken).unwrap(), b"somebody's");
    assert_eq!(std::fs::read_dir(&other).unwrap().count(), 0, "the child was removed");
    let drafts = std::fs::read_dir(path.parent().unwrap()).unwrap().flatten();
    assert_eq!(drafts.filter(|entry| entry.file_name().to_string_lossy().starts_with('.')).count(), 0);
    rig.unplug(&device);
    assert!(std::fs::read(&path).unwrap() == storm.model);
    rig.assert_clean();
}

/// Whoever finds the child after a crash goes on with it; without one the parent is all there is.
#[test]
fn a_tapdisk_killed_during_a_snapshot_loses_no_acknowledged_write() {
    let rig = rig();
    for round in 0..8u16 {
        let (path, params) = vhd(&rig, &format!("{round}.vhd"), 64);
        let child = rig.path(&format!("{round}-child.vhd"));
        let (device, mut frontend) = guest(&rig, round + 1, &params, Shape::simple(DomId(1)));
        let place = |id: u64| Sector((id - 1) * 4000);
        let acknowledged = std::thread::scope(|scope| {
            let snapshot = scope
                .spawn(|| order(&rig, &device, "snapshot", &["-a", &format!("vhd:{}", child.display())]));
            for n in 0..30 {
                frontend.submit(Io::Write(Sector(n * 4000), &pattern(n as u8 + 1, MAX_TRANSFER)));
            }
            frontend.kick().unwrap();
            let acknowledged = answers(&mut frontend, 1 + usize::from(round) * 4);
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(device.pid), nix::sys::signal::Signal::SIGKILL)
                .unwrap();
            let (code, _) = snapshot.join().unwrap();
            assert!(code != 0 || child.exists());
            acknowledged
        });
        rig.destroy(&device);
        let leaf = if child.exists() { &child } else { &path };
        wait_for_lock(leaf);
        wait_for_lock(&path);
        check(leaf);
        let (device, mut reader) =
            guest(&rig, 100 + round, &format!("vhd:{}", leaf.display()), Shape::simple(DomId(1)));
        for Completion { id, status, .. } in acknowledged {
            assert_eq!(status, 0);
            assert!(
                reader.read(place(id), MAX_TRANSFER).unwrap() == pattern(id as u8, MAX_TRANSFER),
                "{id} of {round}"
            );
        }
        rig.unplug(&device);
    }
}

/// The procedure of `docs/running-disk.md`.
#[test]
fn a_middle_image_is_coalesced_away_under_a_running_guest() {
    let rig = rig();
    let (base, params) = vhd(&rig, "base.vhd", SIZE / MIB);
    let (middle, leaf) = (rig.path("middle.vhd"), rig.path("leaf.vhd"));
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    let mut storm = Storm::new(vec![0; SIZE], 17, false);
    storm.blow(&mut frontend, 100);
    ok(&rig, &device, "snapshot", &["-a", &format!("vhd:{}", middle.display())]);
    storm.blow(&mut frontend, 100);
    ok(&rig, &device, "snapshot", &["-a", &format!("vhd:{}", leaf.display())]);
    under_load(&mut frontend, &mut storm, || {
        ok(&rig, &device, "pause", &[]);
        vhd_util(&["coalesce", "-n", middle.to_str().unwrap()]);
        vhd_util(&["modify", "-n", leaf.to_str().unwrap(), "-p", base.to_str().unwrap()]);
        std::fs::remove_file(&middle).unwrap();
        ok(&rig, &device, "unpause", &[]);
    });
    rig.unplug(&device);
    check(&leaf);
    rig.assert_clean();
}
