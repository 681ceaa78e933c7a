//! A tapdisk's NBD server under other people's clients, its client under a guest, and both under a malicious peer.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use blkif::{DomId, Sector};
use integration::rig::{PATIENCE, Rig};
use integration::sim::frontend::Shape;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tap_ctl::inflight::Folder;

use crate::support::{MIB, Storm, guest, pattern, raw, rig, vhd_util};

/// Runs a program; `None` if it is not installed.
pub fn run(program: &str, args: &[&str]) -> Option<Output> {
    match Command::new(program).args(args).stdin(Stdio::null()).output() {
        Ok(output) => Some(output),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            eprintln!("{program} is not installed: nothing is tested");
            None
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// The same, of which success is expected; what it has printed.
pub fn succeed(program: &str, args: &[&str]) -> Option<String> {
    let output = run(program, args)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    Some(text)
}

/// A disk that no guest uses; the path of its NBD socket, and its minor.
pub fn serve(rig: &Rig, args: &[&str]) -> (PathBuf, String) {
    let outcome = rig.tap_ctl(&[&["create"], args].concat());
    assert_eq!(outcome.code, 0, "{args:?}: {}", outcome.err);
    // The path that stands for the disk is that of the socket.
    let list = rig.tap_ctl(&["list"]).out;
    let minors = std::fs::read_dir(rig.host.control().root()).unwrap().filter_map(Result::ok);
    let mut sockets: Vec<PathBuf> = minors
        .map(|entry| entry.path())
        .filter(|path| rig.host.control().parse_vbd_path(path).is_some())
        .collect();
    sockets.sort_by_key(|path| std::fs::metadata(path).unwrap().modified().unwrap());
    let socket = sockets.pop().unwrap_or_else(|| panic!("no socket: {list}"));
    let minor = rig.host.control().parse_vbd_path(&socket).unwrap().1;
    (socket, minor.to_string())
}

fn uri(socket: &Path) -> String {
    format!("nbd+unix:///?socket={}", socket.display())
}

#[test]
fn nbdinfo_sees_what_the_disk_is() {
    let rig = rig();
    let (image, params) = raw(&rig, "a.img", 8 * MIB);
    std::fs::File::options().write(true).open(&image).unwrap().write_all(&pattern(1, MIB)).unwrap();
    let (socket, _) = serve(&rig, &["-a", &params]);
    let Some(told) = succeed("nbdinfo", &["--json", &uri(&socket)]) else { return };
    for fact in [
        "\"export-size\": 8388608",
        "\"is_read_only\": false",
        "\"can_flush\": true",
        "\"can_fua\": true",
        "\"can_zero\": true",
        "\"can_multi_conn\": true",
        "\"can_cache\": true",
        "\"can_df\": true",
        "\"block_size_minimum\": 512",
        "\"block_size_preferred\": 4096",
        "\"block_size_maximum\": 33554432",
        "base:allocation",
    ] {
        assert!(told.contains(fact), "{fact}: {told}");
    }
    let list = succeed("nbdinfo", &["--list", &uri(&socket)]).unwrap();
    assert!(list.contains("tapdisk_client"), "{list}");
    let map = succeed("nbdinfo", &["--map", &uri(&socket)]).unwrap();
    assert!(map.contains("1048576") && map.contains("hole,zero"), "{map}");
}

/// A boot sector: reads the 4096 bytes at sector 8, inverts them, writes them to sector 16, and ends the machine with 0x10, or
/// with 0x20 after an error. The BIOS loads it to 0x7c00 and leaves the drive's number in DL.
const INVERTER: [u8; 69] = [
    0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xd0, 0xbc, 0x00, 0x7c, // ds = ss = 0, sp = 0x7c00
    0xbe, 0x35, 0x7c, 0xb4, 0x42, 0xcd, 0x13, 0x72,
    0x1a, // int 0x13: extended read of the packet at the end, jc
    0xbf, 0x00, 0x80, 0xb9, 0x00, 0x10, 0xf6, 0x15, 0x47, 0xe2,
    0xfb, // not byte [di++], 4096 times from 0x8000 on
    0xc6, 0x44, 0x08, 0x10, 0xb8, 0x00, 0x43, 0xcd, 0x13, 0x72, 0x04, // sector 16: extended write, jc
    0xb0, 0x10, 0xeb, 0x02, 0xb0, 0x20, // al = 0x10 or 0x20
    0xba, 0x01, 0x05, 0xee, 0xf4, 0xeb, 0xfd, // out 0x501, al; then halt
    0x10, 0x00, 0x08, 0x00, 0x00, 0x80, 0x00, 0x00, 8, 0, 0, 0, 0, 0, 0,
    0, // 8 sectors, 0:0x8000, sector 8
];

#[test]
fn a_machine_of_qemu_boots_from_the_disk_and_writes_it() {
    let rig = rig();
    let mut content = vec![0; MIB];
    content[..INVERTER.len()].copy_from_slice(&INVERTER);
    content[510..512].copy_from_slice(&[0x55, 0xaa]);
    let data = pattern(5, 4096);
    content[4096..8192].copy_from_slice(&data);
    let (image, params) = raw(&rig, "boot.img", MIB);
    std::fs::write(&image, &content).unwrap();
    serve(&rig, &["-a", &params]);
    let list: serde_json::Value = serde_json::from_str(&rig.tap_ctl(&["list", "--json"]).out).unwrap();
    let uri = list[0]["uri"].as_str().expect("a URI");
    let drive = format!("file={uri},format=raw,if=none,id=disk");
    let machine = ["-M", "pc", "-accel", "tcg", "-m", "32", "-nodefaults", "-display", "none", "-no-reboot"];
    let devices =
        ["-device", "isa-debug-exit", "-device", "virtio-blk-pci,drive=disk,bootindex=1", "-drive", &drive];
    // It does not halt for ever, whatever goes wrong.
    let limited = [&["60", "qemu-system-x86_64"], &machine[..], &devices].concat();
    let output = run("timeout", &limited).unwrap();
    if output.status.code() == Some(127) {
        eprintln!("qemu-system-x86_64 is not installed: nothing is tested");
        return;
    }
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    // The device ends QEMU with twice the number, and one more.
    assert_eq!(output.status.code(), Some(0x21), "{words}");
    let inverted: Vec<u8> = data.iter().map(|byte| !byte).collect();
    assert!(std::fs::read(&image).unwrap()[8192..12288] == inverted);
}

#[test]
fn a_read_only_disk_takes_no_writes_from_clients() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (socket, _) = serve(&rig, &["-R", "-a", &params]);
    let Some(told) = succeed("nbdinfo", &["--json", &uri(&socket)]) else { return };
    assert!(told.contains("\"is_read_only\": true"), "{told}");
    let Some(written) = run("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri(&socket)]) else { return };
    assert!(!written.status.success());
}

#[test]
fn whole_disks_are_copied_in_and_out() {
    let rig = rig();
    let source = rig.path("source");
    let content = [pattern(1, 3 * MIB + 512), vec![0; 2 * MIB], pattern(7, 3 * MIB - 512)].concat();
    std::fs::write(&source, &content).unwrap();
    let (source, target) = (source.to_str().unwrap(), rig.path("target"));
    vhd_util(&["create", "-n", rig.path("disk.vhd").to_str().unwrap(), "-s", "8"]);
    for params in [raw(&rig, "disk.img", 8 * MIB).1, format!("vhd:{}", rig.path("disk.vhd").display())] {
        let (socket, _) = serve(&rig, &["-a", &params]);
        let uri = uri(&socket);
        if succeed("nbdcopy", &["--flush", source, &uri]).is_none() {
            return;
        }
        succeed("nbdcopy", &[&uri, target.to_str().unwrap()]).unwrap();
        assert!(std::fs::read(&target).unwrap() == content, "{params}");
        succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", source, &uri]).unwrap();
        let commands = [
            "write -P 3 512 1024",
            "write -f -P 4 1M 2M",
            "write -z 1M 64k",
            "write -z -u 2M 64k",
            "discard 4M 1M",
            "flush",
            "read -P 3 512 1024",
            "read -P 0 1M 64k",
            "read -P 4 1114112 4096",
        ];
        let args = commands.iter().flat_map(|command| ["-c", command]);
        let args: Vec<&str> = ["-f", "raw"].into_iter().chain(args).chain([&*uri]).collect();
        let told = succeed("qemu-io", &args).unwrap();
        assert!(!told.contains("failed"), "{told}");
        let Some(_) = run("fio", &["--version"]) else { continue };
        let uri_option = format!("--uri={uri}");
        succeed(
            "fio",
            &[
                "--name=a",
                "--ioengine=nbd",
                &uri_option,
                "--rw=randrw",
                "--bs=4k",
                "--iodepth=32",
                "--size=8m",
                "--number_ios=2000",
                "--verify=crc32c",
                "--verify_state_save=0",
                "--runtime=20",
            ],
        );
    }
}

/// The kernel tells of a loss once: whoever took over would flush in good faith, and promise a guest what is lost.
#[test]
fn nobody_goes_on_with_a_disk_that_has_failed_a_client() {
    let mut rig = rig();
    // Threads, because a filter does not see what io_uring does.
    rig.spawn_options = vec!["--engine".into(), "pool".into()];
    rig.refuse = format!("fdatasync={}", libc::EIO);
    let (_, params) = raw(&rig, "disk.img", MIB);
    let (device, mut frontend) = guest(&rig, 1, &params, Shape::simple(DomId(1)));
    frontend.write(Sector(8), &pattern(1, 4096)).unwrap();
    let kept = Folder::of(&rig.host.control(), device.minor);
    assert!(kept.read().unwrap().is_some());
    let socket = rig.host.control().vbd_path(device.pid, device.minor);
    let Some(output) = run("qemu-io", &["-f", "raw", "-c", "flush", &uri(&socket)]) else { return };
    assert!(!output.status.success(), "{output:?}");
    assert_eq!(kept.read().unwrap(), None);
    let refused = rig.tap_ctl(&["upgrade", "--all"]);
    assert_eq!((refused.code, refused.out.as_str()), (libc::EINVAL, ""), "{}", refused.err);
    assert!(refused.err.contains("cannot be taken over"), "{}", refused.err);
    kill(Pid::from_raw(device.pid), Signal::SIGKILL).unwrap();
    rig.wait_value(&format!("{}/state", device.backend), "5");
    rig.destroy(&device);
    rig.assert_clean();
}

#[test]
fn a_guest_lives_on_another_tapdisk_by_nbd() {
    let rig = rig();
    let (image, params) = raw(&rig, "a.img", 16 * MIB);
    let (socket, _) = serve(&rig, &["-a", &params]);
    let spec = format!("nbd:unix:{}", socket.display());
    let (device, mut frontend) = guest(&rig, 1, &spec, Shape::simple(DomId(1)));
    let mut storm = Storm::new(vec![0; 16 * MIB], 5, false);
    storm.blow(&mut frontend, 3000);
    drop(frontend);
    rig.unplug(&device);
    assert!(std::fs::read(&image).unwrap() == storm.model, "the image differs from the model");
}

/// A TCP port of an address behind which a server with a socket is. `None` where there is no such address.
fn forwarded(address: &str, socket: &Path) -> Option<u16> {
    let listener = match TcpListener::bind((address, 0)) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("{address}: {error}: nothing is tested");
            return None;
        }
    };
    let (port, socket) = (listener.local_addr().unwrap().port(), socket.to_owned());
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), UnixStream::connect(&socket).unwrap());
            let (mut from, mut to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
            let (mut from, mut to) = (server, client);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
    Some(port)
}

#[test]
fn servers_of_other_hosts_are_named_by_addresses_names_and_uris() {
    let rig = rig();
    let (image, params) = raw(&rig, "a.img", 8 * MIB);
    let (socket, _) = serve(&rig, &["-a", &params]);
    let mut model = vec![0; 8 * MIB];
    let forms: [(&str, &[&str]); 2] = [
        ("127.0.0.1", &["nbd:127.0.0.1:PORT", "nbd:localhost:PORT:disk", "nbd://127.0.0.1:PORT/disk"]),
        ("::1", &["nbd:[::1]:PORT:disk", "nbd://[::1]:PORT/"]),
    ];
    let mut domid = 0;
    for (address, forms) in forms {
        let Some(port) = forwarded(address, &socket) else { continue };
        for form in forms {
            domid += 1;
            let params = form.replace("PORT", &port.to_string());
            let (device, mut frontend) = guest(&rig, domid, &params, Shape::simple(DomId(domid)));
            let mut storm = Storm::new(model, u64::from(domid), false);
            storm.blow(&mut frontend, 300);
            storm.verify(&mut frontend);
            rig.unplug(&device);
            model = storm.model;
        }
    }
    assert!(domid >= 3 && std::fs::read(&image).unwrap() == model, "the image differs from the model");
    // A port where nobody listens.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let refused = rig.tap_ctl(&["create", "-a", &format!("nbd:{closed}")]);
    assert_eq!(refused.code, libc::ECONNREFUSED, "{}", refused.err);
    assert!(refused.err.contains(&closed.to_string()), "{}", refused.err);
}

#[test]
fn a_guest_does_not_notice_that_its_nbd_server_was_killed() {
    let rig = rig();
    let (image, _) = raw(&rig, "a.img", 16 * MIB);
    let socket = rig.path("s");
    let start = || {
        let _ = std::fs::remove_file(&socket);
        let child = Command::new("qemu-nbd")
            .args(["-f", "raw", "-t", "-e", "4", "-k"])
            .arg(&socket)
            .arg(&image)
            .stdin(Stdio::null())
            .spawn()
            .ok()?;
        while UnixStream::connect(&socket).is_err() {
            std::thread::yield_now();
        }
        Some(child)
    };
    let Some(mut server) = start() else { return };
    let spec = format!("nbd:{}", socket.display());
    let (device, mut frontend) = guest(&rig, 1, &spec, Shape::simple(DomId(1)));
    let mut storm = Storm::new(vec![0; 16 * MIB], 6, false);
    for _ in 0..3 {
        storm.blow(&mut frontend, 500);
        server.kill().unwrap();
        server.wait().unwrap();
        server = start().unwrap();
    }
    storm.blow(&mut frontend, 500);
    drop(frontend);
    rig.unplug(&device);
    server.kill().unwrap();
    server.wait().unwrap();
    assert!(std::fs::read(&image).unwrap() == storm.model, "the image differs from the model");
}

#[test]
fn another_disk_stands_for_the_parents() {
    let rig = rig();
    let (base, params) = raw(&rig, "base.img", 4 * MIB);
    std::fs::write(&base, pattern(9, 4 * MIB)).unwrap();
    let child = rig.path("child.vhd");
    let (base, child) = (base.to_str().unwrap(), child.to_str().unwrap());
    vhd_util(&["snapshot", "-m", "-n", child, "-p", base]);
    let (_, minor) = serve(&rig, &["-R", "-a", &params]);
    let params = format!("vhd:{child}");
    let missing = rig.tap_ctl(&["create", "-a", &params, "-e", "77"]);
    assert_eq!(missing.code, libc::ENOENT, "{}", missing.err);
    let (socket, _) = serve(&rig, &["-a", &params, "-e", &minor]);
    let Some(_) = succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", base, &uri(&socket)]) else {
        return;
    };
}

/// What a client sends that means no good. After each, another client is served as ever.
#[test]
fn m77_to_m83_hostile_clients_hurt_only_themselves() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (socket, _) = serve(&rig, &["-a", &params]);
    let option = |number: u32, len: u32, data: &[u8]| {
        [b"IHAVEOPT".as_slice(), &number.to_be_bytes(), &len.to_be_bytes(), data].concat()
    };
    let go = option(7, 6, &[0; 6]);
    let request = |flags: u16, command: u16, offset: u64, len: u32| {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend([7; 8]);
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    };
    let hello = 3_u32.to_be_bytes().to_vec();
    let with = |parts: &[&[u8]]| [&[&*hello], parts].concat().concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("unknown flags", vec![0xff; 4]),
        ("m77 an option without end", with(&[&option(6, u32::MAX, &[0; 64])])),
        ("m77 a name without end", with(&[&option(1, u32::MAX, &[b'x'; 64])])),
        ("m77 a name longer than its option", with(&[&option(7, 6, &[0xff; 6]), &go])),
        (
            "m78 a long name",
            with(&[&option(7, 5006, &[&5000_u32.to_be_bytes()[..], &[b'x'; 5000], &[0; 2]].concat()), &go]),
        ),
        ("m78 a long name to export", with(&[&option(1, 5000, &[b'x'; 5000])])),
        ("m79 endless options", with(&[&option(3, 0, &[]).repeat(1000)])),
        ("m80 the same twice", with(&[&option(6, 6, &[0; 6]).repeat(2), &go])),
        ("m81 plain text behind STARTTLS", with(&[&option(5, 0, &[]), &go])),
        ("m82 a write without end", with(&[&go, &request(0, 1, 0, u32::MAX), &[0; 4096]])),
        ("m82 beyond the end", with(&[&go, &request(0, 0, u64::MAX - 511, 1024), &request(0, 3, 0, 0)])),
        (
            "m82 no length, askew",
            with(&[&go, &request(0, 0, 0, 0), &request(0, 0, 1, 512), &request(0, 1, 0, 100), &[0; 100]]),
        ),
        (
            "m83 unknown flags and commands",
            with(&[&go, &request(0xffff, 0, 0, 512), &request(0, 99, 0, 512), &request(0, 7, 0, 512)]),
        ),
        ("no request at all", with(&[&go, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])),
        ("many reads whose answers nobody takes", with(&[&go, &request(0, 0, 0, 1 << 20).repeat(200)])),
    ];
    let mut left_open = Vec::new();
    for (what, bytes) in cases {
        let mut hostile = UnixStream::connect(&socket).unwrap();
        hostile.set_write_timeout(Some(std::time::Duration::from_millis(100))).unwrap();
        let _ = hostile.write_all(&bytes);
        well(&socket, what, &hello, &go, &request);
        left_open.push(hostile);
    }
    // None of those who are still connected keeps the disk from being closed.
    let (pid, minor) = rig.host.control().parse_vbd_path(&socket).unwrap();
    let closed = rig.tap_ctl(&["destroy", "-p", &pid.to_string(), "-m", &minor.to_string()]);
    assert_eq!(closed.code, 0, "{}", closed.err);
    assert!(!socket.exists());
}

/// A good client writes and reads.
fn well(socket: &Path, what: &str, hello: &[u8], go: &[u8], request: &dyn Fn(u16, u16, u64, u32) -> Vec<u8>) {
    let mut good = UnixStream::connect(socket).unwrap();
    good.set_read_timeout(Some(PATIENCE)).unwrap();
    // Errors are answered and leave the connection in use: beyond the end, unknown, without a context.
    let requests = [
        &*request(0, 1, 512, 512),
        &[0xa5; 512],
        &*request(0, 0, 1 << 20, 512),
        &*request(0, 99, 0, 512),
        &*request(0, 1, 1 << 20, 512),
        &[1; 512],
    ];
    good.write_all(&[hello, go, &requests.concat()].concat()).unwrap();
    let mut handshake = [0; 18 + 20 + 12 + 20 + 14 + 20];
    good.read_exact(&mut handshake).unwrap_or_else(|error| panic!("{what}: {error}"));
    let mut errors = Vec::new();
    for _ in 0..4 {
        let mut reply = [0; 16];
        good.read_exact(&mut reply).unwrap_or_else(|error| panic!("{what}: {error}"));
        errors.push(u32::from_be_bytes(reply[4..8].try_into().unwrap()));
    }
    errors.sort_unstable();
    // The protocol has Linux's numbers: NBD_EINVAL twice, NBD_ENOSPC.
    assert_eq!(errors, [0, 22, 22, 28], "{what}");
    good.write_all(&request(0, 0, 512, 512)).unwrap();
    let mut answer = [0; 16 + 512];
    good.read_exact(&mut answer).unwrap();
    assert_eq!(answer[16..], [0xa5; 512], "{what}");
}

#[test]
fn clients_that_say_nothing_do_not_keep_others_out() {
    let rig = rig();
    let (_, params) = raw(&rig, "a.img", MIB);
    let (socket, _) = serve(&rig, &["-a", &params]);
    let silent: Vec<UnixStream> = (0..5).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let hello = 3_u32.to_be_bytes();
    let go = [b"IHAVEOPT".as_slice(), &7_u32.to_be_bytes(), &6_u32.to_be_bytes(), &[0; 6]].concat();
    let mut good = UnixStream::connect(&socket).unwrap();
    good.set_read_timeout(Some(PATIENCE)).unwrap();
    good.write_all(&[&hello, &*go].concat()).unwrap();
    let mut handshake = [0; 18 + 20 + 12 + 20 + 14 + 20];
    good.read_exact(&mut handshake).unwrap();
    drop(silent);
    // A leftover of a name does not matter either.
    assert!(UnixListener::bind(&socket).is_err());
}
