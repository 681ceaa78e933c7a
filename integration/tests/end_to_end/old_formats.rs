//! Guests on qcow images of version 1 and on VMDKs.

use std::path::{Path, PathBuf};

use blkif::DomId;
use format::blocking::with_source;
use integration::rig::Rig;
use integration::sim::frontend::Shape;
use qcow::v1::{self, Backing, Flavour};

use super::support::*;

const SIZE: usize = 8 * MIB;
const SECTORS: u64 = (SIZE / 512) as u64;

fn make_qcow(path: &Path, backing: Option<&str>) {
    let backing = backing.map(|name| Backing { name: name.into(), mtime: 0 });
    let flavour = Flavour::Xen { reserve: false };
    let new = v1::NewImage { sectors: SECTORS, flavour, backing, encrypted: false }.build().unwrap();
    put(path, new.len, &new.writes);
}

fn make_vmdk(path: &Path, sectors: u64) {
    let new = vmdk::NewImage { sectors, name: "x.vmdk".into() }.build().unwrap();
    put(path, new.len, &new.writes);
}

/// Images of one disk that begins with these bytes: the type, and the file that names it.
fn images(rig: &Rig, domid: u16) -> Vec<(String, PathBuf, Vec<u8>)> {
    let path = |name: &str| rig.path(&format!("{domid}-{name}"));
    let (plain, child, one, split) = (path("a.qcow"), path("b.qcow"), path("c.vmdk"), path("d.vmdk"));
    let base = pattern(9, SIZE);
    make_qcow(&plain, None);
    std::fs::write(path("base"), &base).unwrap();
    make_qcow(&child, Some(&format!("{domid}-base")));
    make_vmdk(&one, SECTORS);
    make_vmdk(&path("part"), SECTORS / 2);
    std::fs::File::create(path("flat")).unwrap().set_len((SECTORS / 2 + 63) * 512).unwrap();
    let half = SECTORS / 2;
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentSparse\"\n\
         RW {half} SPARSE \"{domid}-part\"\nRW {half} FLAT \"{domid}-flat\" 63\n"
    );
    std::fs::write(&split, text).unwrap();
    let zeros = || vec![0; SIZE];
    let kinds =
        [("qcow", plain, zeros()), ("qcow", child, base), ("vmdk", one, zeros()), ("vmdk", split, zeros())];
    kinds.map(|(kind, path, model)| (format!("{kind}:{}", path.display()), path, model)).into()
}

/// The metadata are in order.
fn check(path: &Path) {
    let Ok(file) = std::fs::File::open(path) else { return };
    let report = match path.extension().and_then(|kind| kind.to_str()) {
        Some("qcow") => with_source(&file, v1::check::check).unwrap().unwrap(),
        _ => match with_source(&file, vmdk::check::check).unwrap() {
            Ok(report) => report,
            // A descriptor.
            Err(_) => return,
        },
    };
    assert!(report.problems.is_empty(), "{}: {:?}", path.display(), report.problems);
}

#[test]
fn a_guest_that_reads_writes_and_discards_at_random_finds_what_it_wrote() {
    let rig = rig();
    for (domid, (params, path, model)) in (1..).zip(images(&rig, 1)) {
        let (device, mut frontend) = guest(&rig, domid, &params, Shape::simple(DomId(domid)));
        let mut storm = Storm::new(model, 5, true);
        storm.blow(&mut frontend, 1500);
        storm.verify(&mut frontend);
        rig.unplug(&device);
        check(&path);
        let (device, mut frontend) = guest(&rig, 10 + domid, &params, Shape::simple(DomId(10 + domid)));
        storm.verify(&mut frontend);
        rig.unplug(&device);
    }
    rig.assert_clean();
}

#[test]
fn a_killed_tapdisk_loses_no_acknowledged_write_of_these_formats_either() {
    let rig = rig();
    for (domid, (params, path, model)) in (1..).zip(images(&rig, 2)) {
        let (device, mut frontend) = guest(&rig, domid, &params, Shape::simple(DomId(domid)));
        let mut storm = Storm::new(model, 6, false);
        storm.blow(&mut frontend, 400);
        let pid = nix::unistd::Pid::from_raw(device.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        rig.destroy(&device);
        // A VMDK's extents are locked each by itself, and a dead process's last I/O may outlive another's.
        for name in ["a.qcow", "b.qcow", "c.vmdk", "part", "flat"] {
            wait_for_lock(&rig.path(&format!("2-{name}")));
        }
        check(&path);
        let (device, mut frontend) = guest(&rig, 10 + domid, &params, Shape::simple(DomId(10 + domid)));
        storm.verify(&mut frontend);
        storm.blow(&mut frontend, 200);
        storm.verify(&mut frontend);
        rig.unplug(&device);
        check(&path);
    }
}
