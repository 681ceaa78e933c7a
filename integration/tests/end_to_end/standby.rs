//! A disk whose image has no room left goes on in the image that stands by, and its guest notices nothing.

use std::path::Path;

use blkif::DomId;
use integration::sim::frontend::Shape;

use super::mirror::{stats, until};
use super::pause::{ok, order, under_load};
use super::support::*;

/// Twice what a VHD grows by at a time.
const SIZE: usize = 128 * MIB;

/// The first image can become 132 MiB long, because it begins with a table for a much larger disk, and the second 128 MiB.
const LIMIT: usize = 130 * MIB;

/// From now on no file of this process becomes longer than [`LIMIT`].
fn limit_files(pid: i32) {
    let status = std::process::Command::new("prlimit")
        .args(["--pid", &pid.to_string(), &format!("--fsize={LIMIT}")])
        .status()
        .expect("prlimit is installed");
    assert!(status.success());
}

fn child(path: &Path, parent: &Path) -> String {
    vhd_util(&["snapshot", "-n", path.to_str().unwrap(), "-p", parent.to_str().unwrap()]);
    format!("vhd:{}", path.display())
}

#[test]
fn a_full_disk_goes_on_in_the_image_that_stands_by_and_so_after_a_pause_and_alone() {
    let rig = rig();
    let first = rig.path("first.vhd");
    let size = (SIZE / MIB).to_string();
    vhd_util(&["create", "-n", first.to_str().unwrap(), "-s", &size, "-S", "2000000"]);
    let second = rig.path("second.vhd");
    let secondary = child(&second, &first);
    let shape = Shape { queues: most_queues(&rig), persistent: true, ..Shape::simple(DomId(1)) };
    let (device, mut frontend) = guest(&rig, 1, &format!("vhd:{}", first.display()), shape);
    let mut storm = Storm::new(vec![0; SIZE], 17, true);
    storm.blow(&mut frontend, 10);
    ok(&rig, &device, "pause", &[]);
    let (code, text) = order(&rig, &device, "unpause", &["-s"]);
    assert_eq!((code, text.contains("-2")), (libc::EINVAL, true), "{text}");
    ok(&rig, &device, "unpause", &["-2", &secondary, "-s"]);
    assert!(stats(&rig, &device, &["--full"]).contains("\"serving\":false"));
    limit_files(device.pid);
    under_load(&mut frontend, &mut storm, || {
        until(&rig, &device, &["--full"], "\"serving\":true");
    });
    assert!(!stats(&rig, &device, &[]).contains("\"FIXME_enospc_redirect_count\": 0,"));
    for (command, options, errno) in [
        ("resize", ["-s", "256"], libc::EINVAL),
        ("snapshot", ["-a", "vhd:/tmp/third.vhd"], libc::EOPNOTSUPP),
    ] {
        assert_eq!(order(&rig, &device, command, &options).0, errno, "{command}");
    }
    under_load(&mut frontend, &mut storm, || {
        ok(&rig, &device, "pause", &[]);
        ok(&rig, &device, "unpause", &[]);
        assert!(stats(&rig, &device, &["--full"]).contains("\"serving\":true"));
        ok(&rig, &device, "pause", &[]);
        // The second image is the disk: it names the first as its parent.
        ok(&rig, &device, "unpause", &["-a", &secondary, "-2", "null"]);
    });
    rig.unplug(&device);
    rig.assert_clean();
}
