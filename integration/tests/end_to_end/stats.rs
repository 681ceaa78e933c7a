//! What tap-ctl tells of a disk in use.

use blkif::{DomId, Sector};
use integration::rig::{Device, Rig};
use integration::sim::frontend::{Io, Shape};
use serde_json::{Value, json};

use super::pause::ok;
use super::support::*;

const SIZE: usize = 8 * MIB;

pub fn stats(rig: &Rig, device: &Device, options: &[&str]) -> Value {
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    let outcome = rig.tap_ctl(&[&["stats", "-p", &pid, "-m", &minor], options].concat());
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    serde_json::from_str(&outcome.out).unwrap_or_else(|error| panic!("{error}: {}", outcome.out))
}

#[test]
fn sectors_are_counted_over_all_threads_and_pauses() {
    let rig = rig();
    let queues = most_queues(&rig);
    let (path, params) = raw(&rig, "a.img", SIZE);
    let shape = Shape { queues, indirect: 64, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &params, shape);
    for round in 1..=3 {
        for n in 0..20 {
            frontend.submit(Io::Write(Sector(n * 8), &pattern(n as u8, 4096)));
        }
        frontend.submit(Io::Read(Sector(0), 128 << 10));
        frontend.submit(Io::Flush);
        frontend.kick().unwrap();
        answers(&mut frontend, 22);
        let told = stats(&rig, &device, &[]);
        assert_eq!(told["secs"], json!([256 * round, 160 * round]), "{told}");
        assert_eq!(told["name"], json!(params));
        assert_eq!(told["images"][0]["name"], json!(path.to_str().unwrap()));
        assert_eq!((&told["reqs_outstanding"], &told["xenbus"]["domid"]), (&json!(0), &json!(1)));
        // Rings that had threads of their own begin anew.
        ok(&rig, &device, "pause", &[]);
        let paused = stats(&rig, &device, &["--full"]);
        assert_eq!((&paused["paused"], &paused["sectors"]["write"]), (&json!(true), &json!(160 * round)));
        ok(&rig, &device, "unpause", &[]);
    }
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn each_image_of_a_chain_has_its_share() {
    let rig = rig();
    let (base, params) = vhd(&rig, "base.vhd", SIZE / MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(0), &pattern(1, 64 << 10)).unwrap();
    let child = rig.path("child.vhd");
    ok(&rig, &device, "snapshot", &["-a", &format!("vhd:{}", child.display())]);
    frontend.write(Sector(0), &pattern(2, 32 << 10)).unwrap();
    frontend.read(Sector(0), 64 << 10).unwrap();
    let told = stats(&rig, &device, &[]);
    let image = |n: usize, path: &std::path::Path, hits: Value| {
        assert_eq!(told["images"][n]["name"], json!(path.to_str().unwrap()), "{told}");
        assert_eq!(told["images"][n]["hits"], hits, "{told}");
        assert_eq!(told["images"][n]["driver"]["name"], json!("vhd"));
    };
    image(0, &child, json!([64, 64]));
    image(1, &base, json!([64, 0]));
    assert_eq!(told["secs"], json!([128, 128 + 64]));
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn what_is_under_way_and_how_old_it_is_is_told() {
    let mut rig = rig();
    rig.spawn_options = vec!["--engine".into(), "pool".into()];
    rig.refuse = format!("fdatasync={}", libc::EIO);
    let (_, params) = raw(&rig, "a.img", SIZE);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.submit(Io::Flush);
    frontend.kick().unwrap();
    rig.wait_value(&format!("{}/state", device.backend), "5");
    let told = stats(&rig, &device, &["--full"]);
    // A request that is never answered is not under way.
    assert_eq!(
        (&told["held"], &told["outstanding"], &told["oldest_ms"]),
        (&json!(1), &json!(0), &Value::Null)
    );
    rig.destroy(&device);
    rig.assert_clean();
}

#[test]
fn who_waits_for_the_limits_is_counted_and_nobody_is_asked_for_nothing() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", SIZE);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    ok_limit(&rig, &device);
    for n in 0..20 {
        frontend.submit(Io::Read(Sector(n * 8), 4096));
    }
    frontend.kick().unwrap();
    answers(&mut frontend, 1);
    let told = stats(&rig, &device, &["--full"]);
    assert_eq!((&told["throttled"], &told["limit"]["iops"]), (&json!(1), &json!(1)));
    assert!(told["rings"][0]["taken"].as_u64().unwrap() < 20, "{told}");
    let (pid, other) = (device.pid.to_string(), (device.minor.0 + 1).to_string());
    assert_eq!(rig.tap_ctl(&["stats", "-p", &pid, "-m", &other]).code, libc::ENODEV);
    rig.destroy(&device);
    rig.assert_clean();
}

fn ok_limit(rig: &Rig, device: &Device) {
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    let options = ["limit", "-p", &pid, "-m", &minor, "--iops", "1", "--burst-iops", "1"];
    assert_eq!(rig.tap_ctl(&options).code, 0);
}
