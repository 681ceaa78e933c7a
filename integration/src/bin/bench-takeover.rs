//! How long a guest waits when its tapdisk is killed: prints the median and the longest time of a request that was under way,
//! in the simulation. `bench-takeover [KILLS]`. Root sees it for tapdisks with a user of their own as well, each with its porter.

use std::time::{Duration, Instant};

use blkif::{DomId, Sector};
use integration::rig::{PATIENCE, Programs, Rig};
use integration::sim::frontend::{Frontend, Shape};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tap_ctl::inflight::Folder;

const VDEV: u32 = 51712;

fn main() {
    let kills = std::env::args().nth(1).map_or(50, |text| text.parse().expect("a number of kills"));
    let here = std::env::current_exe().expect("the path of this program");
    let program = |name| here.with_file_name(name);
    let programs = Programs { xenio: program("xenio-sim"), tap_ctl: program("tap-ctl-sim") };
    measure(Rig::start(programs.clone()), kills, "as who started it");
    if nix::unistd::geteuid().is_root() {
        let mut rig = Rig::start(programs);
        rig.give_user("nobody");
        measure(rig, kills, "with a user of its own");
    }
}

fn measure(rig: Rig, kills: u64, how: &str) {
    let path = rig.path("disk.img");
    std::fs::File::create(&path).and_then(|file| file.set_len(64 << 20)).expect("an image");
    rig.create_domain(1);
    let device = rig.plug(1, VDEV, &format!("aio:{}", path.display()), "w").expect("a disk");
    let mut frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(1))).expect("a frontend");
    rig.share_devices();
    rig.connect(&device, &frontend);
    let folder = Folder::of(&rig.host.control(), device.minor);
    let named = format!("{}/physical-device-path", device.backend);
    let mut pauses: Vec<Duration> = (0..kills)
        .map(|round| {
            // Something is answered in each life.
            frontend.write(Sector(round % 1024 * 8), &[1; 4096]).expect("an answer");
            let pid = folder.read().ok().flatten().expect("a record").pid;
            let start = Instant::now();
            kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it was running");
            frontend.write(Sector(round % 1024 * 8), &[2; 4096]).expect("an answer");
            let pause = start.elapsed();
            let old = rig.host.control().vbd_path(pid, device.minor).display().to_string();
            assert!(
                rig.store
                    .wait_for(&named, PATIENCE, |value| value.is_some_and(|value| value != old.as_bytes()))
            );
            pause
        })
        .collect();
    pauses.sort_unstable();
    let [median, longest] = [pauses.len() / 2, pauses.len() - 1].map(|at| pauses[at].as_secs_f64() * 1e3);
    println!(
        "{kills} kills of a tapdisk {how}, under a guest's write: median {median:.1} ms, longest {longest:.1} ms"
    );
    rig.destroy(&device);
}
