//! `cbt-util` as storage managers call it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use cbt::{BLOCK, Log};

fn run(folder: &Path, args: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cbt-util")).args(args.split(' ')).current_dir(folder).output().unwrap()
}

fn said(folder: &Path, args: &str) -> Vec<u8> {
    let output = run(folder, args);
    assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn refused(folder: &Path, args: &str) -> (i32, String) {
    let output = run(folder, args);
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_new_log_is_empty_and_not_consistent() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(said(dir.path(), "create -n a.log -s 6815744"), b"");
    assert_eq!(fs::metadata(dir.path().join("a.log")).unwrap().len(), 48 + 16);
    for (option, text) in [
        ("-p", "00000000-0000-0000-0000-000000000000\n"),
        ("-c", "00000000-0000-0000-0000-000000000000\n"),
        ("-f", "0\n"),
        ("-s", "6815744\n"),
    ] {
        assert_eq!(String::from_utf8(said(dir.path(), &format!("get -n a.log {option}"))).unwrap(), text);
    }
    assert_eq!(said(dir.path(), "get -b -n a.log"), [0; 16]);
}

#[test]
fn what_is_set_is_shown_and_the_bits_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.log");
    let mut log = Log::new(10 * BLOCK);
    log.mark(&(0..10 * BLOCK));
    fs::write(&path, log.bytes(0..u64::MAX)).unwrap();
    let (p, c) = ("e0cad18b-a961-480f-b730-37663ca1d819", "11111111-2222-3333-4444-555555555555");
    said(dir.path(), &format!("set -n a.log -p {p} -c {c} -f 1 -s 4259840"));
    for (option, text) in [("-p", p), ("-c", c), ("-f", "1"), ("-s", "4259840")] {
        let shown = said(dir.path(), &format!("get -n a.log {option}"));
        assert_eq!(String::from_utf8(shown).unwrap(), format!("{text}\n"));
    }
    let bits = said(dir.path(), "get -n a.log -b");
    assert_eq!(bits, [1023_u64.to_ne_bytes(), [0; 8]].concat());
}

#[test]
fn the_parents_marks_are_added_to_the_childs() {
    let dir = tempfile::tempdir().unwrap();
    for (name, size, marked) in [("p.log", 64 * BLOCK, 0..BLOCK), ("c.log", 65 * BLOCK, 2 * BLOCK..3 * BLOCK)]
    {
        let mut log = Log::new(size);
        log.mark(&marked);
        fs::write(dir.path().join(name), log.bytes(0..u64::MAX)).unwrap();
    }
    let parent = fs::read(dir.path().join("p.log")).unwrap();
    said(dir.path(), "coalesce -p p.log -c c.log");
    assert_eq!(said(dir.path(), "get -n c.log -b"), [5_u64.to_ne_bytes(), [0; 8]].concat());
    assert_eq!(fs::read(dir.path().join("p.log")).unwrap(), parent);
    let (code, message) = refused(dir.path(), "coalesce -p c.log -c p.log");
    assert_eq!(code, 22);
    assert!(message.contains("p.log"), "{message}");
}

#[test]
fn what_makes_no_sense_ends_with_22_and_the_usage() {
    let dir = tempfile::tempdir().unwrap();
    said(dir.path(), "create -n a.log -s 65536");
    for args in [
        "create -n b.log",
        "create -s 512",
        "create -n b.log -s 0",
        "create -n b.log -s x",
        "get -n a.log",
        "get -p",
        "get -n a.log -p -c",
        "set -n a.log",
        "set -p 1",
        "set -n a.log -p nonsense",
        "set -n a.log -x",
        "coalesce -p a.log",
        "coalesce -c a.log",
        "get -h",
    ] {
        let output = run(dir.path(), args);
        assert_eq!(output.status.code(), Some(22), "{args}");
        assert!(output.stdout.starts_with(b"cbt-util "), "{args}");
    }
    assert!(!dir.path().join("b.log").exists());
    assert_eq!(refused(dir.path(), "set -n a.log -s 512").0, 22);
    assert_eq!(run(dir.path(), "nonsense").status.code(), Some(0));
}

#[test]
fn missing_short_and_busy_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("short.log"), [0; 20]).unwrap();
    fs::write(dir.path().join("cut.log"), Log::new(1 << 30).bytes(0..100)).unwrap();
    for (args, code) in [
        ("get -n none.log -p", 2),
        ("get -n short.log -p", 5),
        ("get -n cut.log -b", 5),
        ("set -n cut.log -s 2147483648", 5),
        ("coalesce -p cut.log -c cut.log", 5),
    ] {
        let (got, message) = refused(dir.path(), args);
        assert_eq!(got, code, "{args}: {message}");
        assert!(message.contains(".log"), "{message}");
    }
    assert_eq!(said(dir.path(), "get -n cut.log -s"), b"1073741824\n");

    let busy = fs::File::options().read(true).write(true).open(dir.path().join("cut.log")).unwrap();
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&busy, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert_eq!(refused(dir.path(), "set -n cut.log -f 1").0, 16);
    assert_eq!(refused(dir.path(), "create -n cut.log -s 512").0, 16);
    assert_eq!(said(dir.path(), "get -n cut.log -f"), b"0\n");
}
