//! The real tapdisk's side of what xenio is told unasked, with the real xenio where a guest is to see it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use blkif::{DomId, Sector};
use integration::programs;
use integration::rig::{Device, PATIENCE, Rig};
use integration::sim::frontend::{Frontend, Shape};
use tap_ctl::frame;
use tap_ctl::proto::{DiskInfo, Minor, Reply, Request};

const MIB: u64 = 1 << 20;

/// An empty raw image and its parameters.
fn raw(rig: &Rig, name: &str, bytes: u64) -> (PathBuf, String) {
    let path = rig.path(name);
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    let params = format!("aio:{}", path.display());
    (path, params)
}

fn grow(path: &PathBuf, bytes: u64) {
    std::fs::File::options().write(true).open(path).unwrap().set_len(bytes).unwrap();
}

fn ok(rig: &Rig, args: &[&str]) -> String {
    let outcome = rig.tap_ctl(args);
    assert_eq!(outcome.code, 0, "{args:?}: {}", outcome.err);
    outcome.out
}

/// A tapdisk with a minor and nothing open.
fn tapdisk(rig: &Rig) -> String {
    ok(rig, &["allocate"]);
    let pid = ok(rig, &["spawn"]);
    ok(rig, &["attach", "-p", &pid, "-m", "0"]);
    pid
}

/// A connection to a tapdisk, on which everything is read line by line.
struct Line {
    stream: BufReader<UnixStream>,
}

impl Line {
    fn to(rig: &Rig, pid: &str) -> Line {
        let stream = UnixStream::connect(rig.host.control().control_socket(pid.parse().unwrap())).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Line { stream: BufReader::new(stream) }
    }

    fn follow(rig: &Rig, pid: &str) -> Line {
        let mut line = Line::to(rig, pid);
        line.ask(&Request::Follow);
        line
    }

    fn ask(&mut self, request: &Request) {
        self.stream.get_mut().write_all(&frame::encode(request).unwrap()).unwrap();
    }

    /// `None`: the connection has ended.
    fn next(&mut self) -> Option<Reply> {
        let mut text = String::new();
        match self.stream.read_line(&mut text) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_str(&text).unwrap()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// The next news.
    fn news(&mut self) -> (Minor, DiskInfo, Option<String>) {
        match self.next() {
            Some(Reply::Changed { minor, info, failed, .. }) => (minor, info, failed),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_follower_is_told_of_images_open_already_and_opened_later_and_of_their_growth() {
    let rig = Rig::start(programs!());
    let (path, params) = raw(&rig, "a.img", MIB);
    let pid = tapdisk(&rig);
    let mut early = Line::follow(&rig, &pid);
    ok(&rig, &["open", "-p", &pid, "-m", "0", "-a", &params]);
    let (minor, info, failed) = early.news();
    assert_eq!((minor, info.sectors, failed), (Minor(0), 2048, None));
    let mut late = Line::follow(&rig, &pid);
    assert_eq!(late.news(), (minor, info, None));
    grow(&path, 2 * MIB);
    ok(&rig, &["resize", "-p", &pid, "-m", "0"]);
    let grown = DiskInfo { sectors: 4096, ..info };
    for follower in [&mut early, &mut late] {
        assert_eq!(follower.news(), (minor, grown, None));
    }
    let mut asker = Line::to(&rig, &pid);
    asker.ask(&Request::DiskInfo { minor });
    assert_eq!(asker.next(), Some(Reply::DiskInfo(grown)));
    drop(asker);
    ok(&rig, &["destroy", "-p", &pid, "-m", "0"]);
    assert_eq!(early.next(), None, "followers see the end, and do not hold it up");
    rig.assert_clean();
}

#[test]
fn a_size_that_is_asked_for_is_made_and_an_image_never_shrinks() {
    let rig = Rig::start(programs!());
    let (path, params) = raw(&rig, "a.img", 2 * MIB);
    let pid = tapdisk(&rig);
    let resize = |size: &str| rig.tap_ctl(&["resize", "-p", &pid, "-m", "0", "-s", size]);
    assert_eq!(resize("3").code, libc::ENODEV, "nothing is open");
    ok(&rig, &["open", "-p", &pid, "-m", "0", "-a", &params]);
    let mut follower = Line::follow(&rig, &pid);
    follower.news();
    assert_eq!(resize("3").code, 0);
    assert_eq!(follower.news().1.sectors, 3 * 2048);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 * MIB);
    let refused = resize("2");
    assert_ne!(refused.code, 0);
    assert!(
        refused.err.starts_with(&format!("tap-ctl: resize minor 0 of tapdisk {pid}: ")),
        "{}",
        refused.err
    );
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 3 * MIB);
    ok(&rig, &["destroy", "-p", &pid, "-m", "0"]);
    rig.assert_clean();
}

#[test]
fn a_follower_that_does_not_read_holds_up_nobody() {
    let rig = Rig::start(programs!());
    let (path, params) = raw(&rig, "a.img", MIB);
    let pid = tapdisk(&rig);
    ok(&rig, &["open", "-p", &pid, "-m", "0", "-a", &params]);
    let mut deaf = Line::follow(&rig, &pid);
    let mut attentive = Line::follow(&rig, &pid);
    attentive.news();
    let mut asker = Line::to(&rig, &pid);
    // More news than socket and buffer hold.
    for step in 1..=4000 {
        grow(&path, MIB + step * 512);
        asker.ask(&Request::Resize { minor: Minor(0), size: None });
        let Some(Reply::DiskInfo(info)) = asker.next() else { panic!("step {step}") };
        assert_eq!(info.sectors, 2048 + step);
        assert_eq!(attentive.news().1.sectors, 2048 + step);
    }
    let told = std::iter::from_fn(|| deaf.next()).count();
    assert!((1..4000).contains(&told), "{told} news before it was given up");
    // Whoever was given up comes back for the present state.
    assert_eq!(Line::follow(&rig, &pid).news().1.sectors, 6048);
    drop(asker);
    ok(&rig, &["destroy", "-p", &pid, "-m", "0"]);
    rig.assert_clean();
}

#[test]
fn a_follower_that_asks_is_given_up() {
    let rig = Rig::start(programs!());
    let pid = tapdisk(&rig);
    let mut follower = Line::follow(&rig, &pid);
    follower.ask(&Request::Pid);
    assert_eq!(follower.next(), None);
    ok(&rig, &["detach", "-p", &pid, "-m", "0"]);
    ok(&rig, &["free", "-m", "0"]);
    rig.assert_clean();
}

#[test]
fn an_engine_is_chosen_at_the_start_of_a_tapdisk() {
    let rig = Rig::start(programs!());
    let (_, params) = raw(&rig, "a.img", MIB);
    for engine in ["pool", "auto"] {
        let marker = ok(&rig, &["create", "-a", &params, "--engine", engine]);
        let minor = marker.rsplit('-').next().unwrap();
        let listed = ok(&rig, &["list"]);
        let pid = listed.strip_prefix("pid=").unwrap().split(' ').next().unwrap();
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(command.ends_with(&format!("--engine\0{engine}\0")), "{command:?}");
        ok(&rig, &["destroy", "-p", pid, "-m", minor]);
    }
    rig.assert_clean();
}

fn sectors(rig: &Rig, device: &Device, expected: u64) {
    rig.wait_value(&format!("{}/sectors", device.backend), &expected.to_string());
}

#[test]
fn a_guest_uses_the_room_that_its_disk_gained_without_a_restart() {
    let rig = Rig::start(programs!());
    let (path, params) = raw(&rig, "a.img", MIB);
    rig.create_domain(1);
    let device = rig.plug(1, 51712, &params, "w").unwrap();
    sectors(&rig, &device, 2048);
    let mut frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(1))).unwrap();
    rig.connect(&device, &frontend);
    assert!(frontend.write(Sector(2048), &[7; 4096]).is_err(), "beyond the end");
    grow(&path, 2 * MIB);
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    ok(&rig, &["resize", "-p", &pid, "-m", &minor]);
    sectors(&rig, &device, 4096);
    rig.wait_value(&format!("{}/state", device.backend), "4");
    frontend.write(Sector(4088), &[7; 4096]).unwrap();
    assert_eq!(frontend.read(Sector(4088), 4096).unwrap(), [7; 4096]);
    assert!(frontend.write(Sector(4089), &[7; 4096]).is_err(), "beyond the new end");
    rig.unplug(&device);
    rig.assert_clean();
}

#[test]
fn a_disk_that_grew_while_xenio_was_dead_is_told_by_the_next() {
    let mut rig = Rig::start(programs!());
    let (path, params) = raw(&rig, "a.img", MIB);
    rig.create_domain(1);
    let device = rig.plug(1, 51712, &params, "w").unwrap();
    let frontend = Frontend::create(&rig.host.xen(), Shape::simple(DomId(1))).unwrap();
    rig.connect(&device, &frontend);
    rig.kill_xenio();
    grow(&path, 2 * MIB);
    let (pid, minor) = (device.pid.to_string(), device.minor.to_string());
    ok(&rig, &["resize", "-p", &pid, "-m", &minor]);
    rig.start_xenio();
    sectors(&rig, &device, 4096);
    rig.destroy(&device);
    rig.assert_clean();
}
