//! What is kept of parents: in memory, for all disks of a tapdisk (`--parent-cache`), and in the leaf itself (`-r`).

use blkif::{DomId, Sector};
use integration::rig::{Device, Rig};
use integration::sim::frontend::{Frontend, Shape};

use super::mirror::{stats, until};
use super::pause::{ok, under_load};
use super::support::*;

const SIZE: usize = 8 * MIB;

/// A parent full of data, and children of it.
fn family(rig: &Rig, children: &[&str]) -> Vec<String> {
    let base = rig.path("base.img");
    std::fs::write(&base, pattern(7, SIZE)).unwrap();
    let params = children.iter().map(|name| {
        let path = rig.path(name);
        vhd_util(&["snapshot", "-m", "-n", path.to_str().unwrap(), "-p", base.to_str().unwrap()]);
        format!("vhd:{}", path.display())
    });
    params.collect()
}

fn number(rig: &Rig, device: &Device, group: &str, name: &str) -> u64 {
    let all: serde_json::Value = serde_json::from_str(&stats(rig, device, &["--full"])).unwrap();
    all["disk"][group][name].as_u64().unwrap_or_else(|| panic!("no {group}.{name} in {all}"))
}

/// A disk that the tapdisk of another one serves too.
fn beside(rig: &Rig, first: &Device, domid: u16, params: &str) -> (Device, Frontend) {
    rig.create_domain(domid);
    let mut device = rig.write_device(domid, XVDA, params, "w");
    rig.wait_value(&format!("{}/state", device.backend), "2");
    rig.hotplug_in(&mut device, params, Some(first.pid)).unwrap();
    let frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(domid))).unwrap();
    rig.connect(&device, &frontend);
    (device, frontend)
}

#[test]
fn what_one_disk_has_read_of_a_parent_another_finds_in_the_cache() {
    let mut rig = rig();
    rig.environment = vec![("XENIO_PARENT_CACHE".into(), "4M".into())];
    let params = family(&rig, &["one.vhd", "two.vhd"]);
    let (one, mut first) = guest(&rig, 1, &params[0], Shape::simple(DomId(1)));
    let (two, mut second) = beside(&rig, &one, 2, &params[1]);
    let some = 64 << 10;
    for place in (0..2 * MIB).step_by(some) {
        assert!(
            first.read(Sector(place as u64 / 512), some).unwrap() == pattern(7, SIZE)[place..place + some]
        );
    }
    let missed = number(&rig, &two, "cache", "misses");
    for place in (0..2 * MIB).step_by(some) {
        assert!(
            second.read(Sector(place as u64 / 512), some).unwrap() == pattern(7, SIZE)[place..place + some]
        );
    }
    assert_eq!(number(&rig, &two, "cache", "misses"), missed, "the first disk's reads have filled it");
    assert!(number(&rig, &two, "cache", "hits") >= (2 * MIB / 512) as u64);
    // Twice as much as it may hold, and each disk's own writes over it.
    let mut storms = [9, 10].map(|seed| Storm::new(pattern(7, SIZE), seed, false));
    let [one_storm, two_storm] = &mut storms;
    std::thread::scope(|scope| {
        scope.spawn(|| one_storm.blow(&mut first, 600));
        two_storm.blow(&mut second, 600);
    });
    one_storm.verify(&mut first);
    two_storm.verify(&mut second);
    assert!(number(&rig, &two, "cache", "bytes") <= 4 << 20);
    rig.unplug(&one);
    two_storm.verify(&mut second);
    rig.unplug(&two);
    assert!(std::fs::read(rig.path("base.img")).unwrap() == pattern(7, SIZE));
    rig.assert_clean();
}

#[test]
fn what_was_read_of_a_parent_is_in_the_leaf_and_what_was_written_stays() {
    let mut rig = rig();
    rig.open_options = vec!["-r".into()];
    let params = family(&rig, &["leaf.vhd"]);
    let (device, mut frontend) = guest(&rig, 1, &params[0], Shape::simple(DomId(1)));
    let piece = 64 << 10;
    let at = Sector((4 * MIB / 512) as u64);
    assert!(frontend.read(at, piece).unwrap() == pattern(7, SIZE)[4 * MIB..4 * MIB + piece]);
    until(&rig, &device, &["--full"], "\"kept\":128,");
    let mut storm = Storm::new(pattern(7, SIZE), 12, false);
    under_load(&mut frontend, &mut storm, || {
        // Whatever is on its way to the leaf.
        for _ in 0..5 {
            ok(&rig, &device, "pause", &[]);
            ok(&rig, &device, "unpause", &[]);
        }
    });
    assert!(number(&rig, &device, "local_cache", "kept") > 0);
    rig.unplug(&device);
    let leaf = rig.path("leaf.vhd");
    assert!(vhd_util(&["check", "-n", leaf.to_str().unwrap()]).contains("is valid"));
    // Without the cache the disk is the same, and it does not need the parent for what was kept.
    rig.open_options.clear();
    let (device, mut frontend) = guest(&rig, 2, &params[0], Shape::simple(DomId(2)));
    storm.verify(&mut frontend);
    rig.unplug(&device);
    rig.assert_clean();
}
