//! tap-ctl and tapdisk, as the hotplug script and the administrator use them; no guest is needed for any of this.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use integration::programs;
use integration::rig::{PATIENCE, Rig};

fn raw(rig: &Rig, name: &str) -> String {
    let path = rig.path(name);
    std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    format!("aio:{}", path.display())
}

fn spawn(rig: &Rig) -> String {
    let outcome = rig.tap_ctl(&["spawn"]);
    assert_eq!(outcome.code, 0, "{}", outcome.err);
    outcome.out
}

fn assert_ok(rig: &Rig, args: &[&str]) -> String {
    let outcome = rig.tap_ctl(args);
    assert_eq!(outcome.code, 0, "{args:?}: {}", outcome.err);
    outcome.out
}

/// What upstream's block-tap runs, with what it reads.
#[test]
fn the_hotplug_scripts_sequence_leaves_nothing_behind() {
    let rig = Rig::start(programs!());
    let image = raw(&rig, "a b:c.img");
    let control = rig.host.control();
    let marker = assert_ok(&rig, &["allocate"]);
    assert_eq!(Path::new(&marker), control.markers().join("tapdisk-0"));
    let pid = spawn(&rig);
    assert_ok(&rig, &["attach", "-p", &pid, "-m", "0"]);
    assert_eq!(assert_ok(&rig, &["list"]), format!("pid={pid} minor=0 state=0"));
    assert_ok(&rig, &["open", "-p", &pid, "-m", "0", "-a", &image]);
    assert_eq!(assert_ok(&rig, &["list"]), format!("pid={pid} minor=0 state=0 args={image}"));
    let file = image.strip_prefix("aio:").unwrap();
    assert_eq!(
        assert_ok(&rig, &["list", "-t", "aio", "-f", file]),
        format!("pid={pid} minor=0 state=0 args={image}")
    );
    assert_eq!(assert_ok(&rig, &["list", "-t", "vhd", "-f", file]), "");
    assert_eq!(rig.tap_ctl(&["free", "-m", "0"]).code, libc::EAGAIN, "a tapdisk holds it");
    assert_ok(&rig, &["destroy", "-p", &pid, "-m", "0"]);
    rig.assert_clean();
}

#[test]
fn closing_keeps_the_minor_and_detaching_needs_a_closed_image() {
    let rig = Rig::start(programs!());
    let image = raw(&rig, "a.img");
    assert_ok(&rig, &["allocate"]);
    let pid = spawn(&rig);
    assert_ok(&rig, &["attach", "-p", &pid, "-m", "0"]);
    assert_ok(&rig, &["open", "-p", &pid, "-m", "0", "-a", &image]);
    assert_eq!(rig.tap_ctl(&["open", "-p", &pid, "-m", "0", "-a", &image]).code, libc::EALREADY);
    assert_eq!(rig.tap_ctl(&["detach", "-p", &pid, "-m", "0"]).code, libc::EINVAL);
    assert_eq!(rig.tap_ctl(&["attach", "-p", &pid, "-m", "0"]).code, libc::EINVAL);
    assert_ok(&rig, &["close", "-p", &pid, "-m", "0"]);
    assert_eq!(assert_ok(&rig, &["list"]), format!("pid={pid} minor=0 state=0x2"));
    assert_ok(&rig, &["open", "-p", &pid, "-m", "0", "-a", &image]);
    assert_eq!(rig.tap_ctl(&["close", "-p", &pid, "-m", "7"]).code, libc::ENODEV);
    assert_ok(&rig, &["destroy", "-p", &pid, "-m", "0"]);
    rig.assert_clean();
}

#[test]
fn one_image_has_one_writer_and_the_refusal_names_it() {
    let rig = Rig::start(programs!());
    let image = raw(&rig, "shared.img");
    assert_ok(&rig, &["create", "-a", &image]);
    let second = rig.tap_ctl(&["create", "-a", &image]);
    assert_eq!(second.code, libc::EBUSY);
    assert!(second.err.contains("shared.img") && second.err.contains("in use"), "{}", second.err);
    assert_eq!(assert_ok(&rig, &["list"]).lines().count(), 1, "the failed create took everything back");
}

#[test]
fn bad_images_are_refused_by_name_and_nothing_is_left() {
    let rig = Rig::start(programs!());
    std::fs::write(rig.path("empty.img"), "").unwrap();
    std::fs::write(rig.path("text.vhd"), "not a disk, but long enough for a footer".repeat(100)).unwrap();
    let cases = [
        ("aio", "missing.img", libc::ENOENT, "No such file"),
        ("aio", "empty.img", libc::EINVAL, "empty"),
        ("vhd", "text.vhd", libc::EINVAL, "footer"),
        ("vhd", "missing.vhd", libc::ENOENT, "No such file"),
    ];
    for (kind, name, code, word) in cases {
        let outcome = rig.tap_ctl(&["create", "-a", &format!("{kind}:{}", rig.path(name).display())]);
        assert_eq!(outcome.code, code, "{name}: {}", outcome.err);
        assert!(outcome.err.contains(name) && outcome.err.contains(word), "{}", outcome.err);
        assert_eq!(outcome.err.lines().count(), 1, "{}", outcome.err);
    }
    rig.assert_clean();
}

#[test]
fn a_malformed_control_message_ends_its_own_connection_only() {
    let rig = Rig::start(programs!());
    assert_ok(&rig, &["create", "-a", &raw(&rig, "a.img")]);
    let pid = assert_ok(&rig, &["list"]);
    let pid: i32 = pid.strip_prefix("pid=").unwrap().split(' ').next().unwrap().parse().unwrap();
    let messages: [&[u8]; 6] = [
        b"{}\n",
        b"\xff\xfe\n",
        b"{\"request\":\"attach\",\"minor\":65536}\n",
        b"{\"request\":\"connect\",\"minor\":0,\"ring\":{}}\n",
        b"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[\n",
        &[b'x'; 70_000],
    ];
    for message in messages {
        let mut stream = UnixStream::connect(rig.host.control().control_socket(pid)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The peer may have hung up in the middle of the longest.
        let _ = stream.write_all(message);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(
            answer.is_empty() || answer.starts_with(b"{\"reply\":\"error\""),
            "{}",
            answer.escape_ascii()
        );
    }
    assert_eq!(assert_ok(&rig, &["list"]).lines().count(), 1, "it still serves");
}

#[test]
fn rings_that_cannot_be_served_are_refused_with_a_reason() {
    let rig = Rig::start(programs!());
    assert_ok(&rig, &["create", "-a", &raw(&rig, "a.img")]);
    let list = assert_ok(&rig, &["list"]);
    let pid: i32 = list.strip_prefix("pid=").unwrap().split(' ').next().unwrap().parse().unwrap();
    let ask = |ring: &str| {
        let mut stream = UnixStream::connect(rig.host.control().control_socket(pid)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, "{{\"request\":\"connect\",\"minor\":0,\"ring\":{{\"domid\":9,\"vdev\":51712,{ring},\"readonly\":false}}}}")
            .unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    for (ring, word) in [
        ("\"protocol\":\"x86_64-abi\",\"queues\":[]", "queue"),
        ("\"protocol\":\"x86_64-abi\",\"queues\":[{\"ring_refs\":[1,2,3],\"port\":1}]", "pages"),
        ("\"protocol\":\"sparc-abi\",\"queues\":[{\"ring_refs\":[1],\"port\":1}]", "protocol"),
        ("\"protocol\":\"x86_64-abi\",\"queues\":[{\"ring_refs\":[1],\"port\":1}]", "ring's pages"),
    ] {
        let answer = ask(ring);
        assert!(
            answer.contains("\"error\"") && answer.contains("51712") && answer.contains(word),
            "{answer}"
        );
    }
}

#[test]
fn a_signal_closes_everything() {
    let rig = Rig::start(programs!());
    assert_ok(&rig, &["create", "-a", &raw(&rig, "a.img")]);
    let list = assert_ok(&rig, &["list"]);
    let pid: i32 = list.strip_prefix("pid=").unwrap().split(' ').next().unwrap().parse().unwrap();
    let mut watch = UnixStream::connect(rig.host.control().control_socket(pid)).unwrap();
    watch.set_read_timeout(Some(PATIENCE)).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM).unwrap();
    assert_eq!(watch.read(&mut [0]).unwrap(), 0, "the connection ends with the process");
    assert!(!rig.host.control().control_socket(pid).exists());
    assert_ok(&rig, &["free", "-m", "0"]);
    rig.assert_clean();
}
