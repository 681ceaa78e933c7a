//! Tapdisks with a user of their own, and the porters that open files for them. These take root, which CI and the machines of disks are.

use std::path::Path;

use blkif::{DomId, Sector};
use integration::rig::{Device, Rig, set_mode};
use integration::sim::frontend::{Frontend, Shape};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User};

use super::pause::{ok, order, under_load};
use super::support::*;
use super::takeover::{kill_often, record, wait_for_successor, wait_until};

const SIZE: usize = 8 * MIB;

/// Whom tapdisks become.
const NOBODY: &str = "nobody";

/// A host where tapdisks become [`NOBODY`], with a folder for images that is root's; `None` if that cannot be.
fn own_user_rig() -> Option<Rig> {
    if !nix::unistd::geteuid().is_root() || !matches!(User::from_name(NOBODY), Ok(Some(_))) {
        eprintln!("not root, or there is no user {NOBODY}: nothing is tested");
        return None;
    }
    let mut rig = rig();
    let images = rig.path("images");
    std::fs::create_dir(&images).unwrap();
    set_mode(&images, 0o700);
    rig.give_user(NOBODY);
    Some(rig)
}

/// A guest with one disk, connected, whose files of the simulated hypervisor everybody may write to.
fn connected(rig: &Rig, params: &str) -> (Device, Frontend) {
    set_mode(Path::new(params.split_once(':').unwrap().1), 0o600);
    rig.create_domain(1);
    let device = rig.plug(1, XVDA, params, "w").unwrap();
    let frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(1))).unwrap();
    rig.share_devices();
    rig.connect(&device, &frontend);
    (device, frontend)
}

/// A line of `/proc/PID/status`.
fn status(pid: i32, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {key}: {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

fn porter_of(pid: i32) -> i32 {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let porter = children.trim().parse().unwrap_or_else(|_| panic!("one child, not {children:?}"));
    assert_eq!(status(porter, "Name"), "tapdisk-porter");
    porter
}

/// A process that has ended has no program, whether or not somebody has asked for its outcome.
fn runs(pid: i32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

#[test]
fn disks_of_roots_are_served_by_a_process_that_may_nothing_itself() {
    let Some(rig) = own_user_rig() else { return };
    let (_, params) = raw(&rig, "images/disk", SIZE);
    let (device, mut frontend) = connected(&rig, &params);
    let nobody = User::from_name(NOBODY).unwrap().unwrap();
    for (key, id) in [("Uid", nobody.uid.as_raw()), ("Gid", nobody.gid.as_raw())] {
        assert_eq!(status(device.pid, key), [id.to_string().as_str(); 4].join(" "));
    }
    assert_eq!(status(device.pid, "Groups"), "");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(device.pid, set), "0000000000000000", "{set}");
    }
    let porter = porter_of(device.pid);
    assert_eq!(status(porter, "Uid"), "0 0 0 0");
    for pid in [device.pid, porter] {
        assert_eq!((status(pid, "Seccomp").as_str(), status(pid, "NoNewPrivs").as_str()), ("2", "1"));
    }
    let mut storm = Storm::new(vec![0; SIZE], 21, false);
    storm.blow(&mut frontend, 200);
    storm.verify(&mut frontend);
    rig.unplug(&device);
    rig.assert_clean();
    wait_until("the porter's end", &rig, || !runs(porter));
}

#[test]
fn chains_snapshots_pauses_kills_and_upgrades_under_load_are_not_noticed() {
    let Some(rig) = own_user_rig() else { return };
    let (base, _) = vhd(&rig, "images/base", SIZE / MIB);
    let leaf = rig.path("images/leaf");
    vhd_util(&["snapshot", "-n", leaf.to_str().unwrap(), "-p", base.to_str().unwrap()]);
    set_mode(&base, 0o600);
    let (device, mut frontend) = connected(&rig, &format!("vhd:{}", leaf.display()));
    let mut storm = Storm::new(vec![0; SIZE], 22, true);
    let now = || Device { pid: record(&rig, &device).pid, ..device.clone() };
    under_load(&mut frontend, &mut storm, || {
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &[]);
        kill_often(&rig, &device, 3);
        let top = format!("vhd:{}", rig.path("images/top").display());
        ok(&rig, &now(), "snapshot", &["-a", &top]);
        kill_often(&rig, &device, 3);
        assert_eq!(record(&rig, &device).params.image.to_string(), top);
        for _ in 0..3 {
            let pid = record(&rig, &device).pid;
            let outcome = rig.tap_ctl(&["upgrade", "-p", &pid.to_string()]);
            assert_eq!(outcome.code, 0, "{}", outcome.err);
            wait_for_successor(&rig, &device, pid);
        }
        ok(&rig, &now(), "pause", &[]);
        ok(&rig, &now(), "unpause", &[]);
    });
    let pid = record(&rig, &device).pid;
    let nobody = User::from_name(NOBODY).unwrap().unwrap().uid.to_string();
    assert_eq!(status(pid, "Uid"), [nobody.as_str(); 4].join(" "), "its successors as well");
    porter_of(pid);
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_disk_whose_porter_has_died_goes_on_and_an_upgrade_gives_it_another() {
    let Some(rig) = own_user_rig() else { return };
    let (_, params) = raw(&rig, "images/disk", SIZE);
    let (device, mut frontend) = connected(&rig, &params);
    frontend.write(Sector(8), &pattern(1, 4096)).unwrap();
    let porter = porter_of(device.pid);
    kill(Pid::from_raw(porter), Signal::SIGKILL).unwrap();
    wait_until("the porter's end", &rig, || !runs(porter));
    assert!(frontend.read(Sector(8), 4096).unwrap() == pattern(1, 4096));
    let leaf = format!("qcow2:{}", rig.path("images/leaf").display());
    let (code, told) = order(&rig, &device, "snapshot", &["-a", &leaf]);
    assert!(code != 0 && told.contains("tap-ctl upgrade"), "{code}: {told}");
    let outcome = rig.tap_ctl(&["upgrade", "-p", &device.pid.to_string()]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    let next = wait_for_successor(&rig, &device, device.pid);
    porter_of(next);
    ok(&rig, &Device { pid: next, ..device.clone() }, "snapshot", &["-a", &leaf]);
    assert!(frontend.read(Sector(8), 4096).unwrap() == pattern(1, 4096));
    rig.unplug(&device);
    rig.assert_clean();
}
