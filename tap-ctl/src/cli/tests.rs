use super::*;
use crate::proto::{DiskInfo, ImageSpec, VbdEntry};
use crate::testing::{FakeTapdisk, Script};

/// Exit code, standard output and standard error of a command line.
fn tap_ctl(dir: &ControlDir, terminal: bool, line: &str) -> (u8, String, String) {
    let config = Config { dir: dir.clone(), tapdisk: PathBuf::from("/nonexistent/tapdisk"), terminal };
    let args: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let streams = Streams { stdin: &mut io::empty(), stdout: &mut stdout, stderr: &mut stderr };
    let code = run(&args, &config, streams);
    (code, String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap())
}

fn refuse(errno: i32, message: &str) -> Reply {
    Reply::Error { errno, message: message.to_owned() }
}

fn disk_info() -> Reply {
    Reply::DiskInfo(DiskInfo {
        sectors: 8,
        sector_size: 512,
        physical_sector_size: 512,
        readonly: false,
        discard: None,
    })
}

#[test]
fn a_failed_open_tells_file_and_reason_in_one_line() {
    let fake = FakeTapdisk::start(Script::Always(refuse(2, "no such\nfile\u{1b}[2J")));
    let (code, stdout, stderr) = tap_ctl(&fake.dir, false, "open -p 4711 -m 3 -a vhd:/srv/x.vhd");
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert_eq!(stderr, "tap-ctl: open vhd:/srv/x.vhd: no such\\nfile\\u{1b}[2J\n");
}

#[test]
fn success_is_silent_and_sends_what_was_asked() {
    let answer = |request: &Request| match request {
        Request::Open { .. } => disk_info(),
        _ => Reply::Done,
    };
    let fake = FakeTapdisk::start(Script::Answer(Box::new(answer)));
    for line in
        ["attach -p 4711 -m 3", "open -p 4711 -m 3 -a aio:/x -R", "close -p 4711 -m 3", "detach -p 4711 -m 3"]
    {
        assert_eq!(tap_ctl(&fake.dir, false, line), (0, String::new(), String::new()), "{line}");
    }
    let minor = Minor(3);
    let image: ImageSpec = "aio:/x".parse().unwrap();
    let params = OpenParams { readonly: true, ..OpenParams::new(image) };
    let expected = [
        Request::Attach { minor },
        Request::Open { minor, params },
        Request::Close { minor },
        Request::Detach { minor },
    ];
    assert_eq!(fake.seen(), expected);
}

#[test]
fn allocate_prints_the_marker_and_free_removes_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = ControlDir::at(folder.path());
    let (code, stdout, _) = tap_ctl(&dir, false, "allocate");
    assert_eq!((code, stdout), (0, format!("{}/tapdisk/tapdisk-0\n", folder.path().display())));
    assert_eq!(tap_ctl(&dir, false, "free -m 0").0, 0);
    let (code, _, stderr) = tap_ctl(&dir, false, "free -m 0");
    assert_eq!(code, 2);
    assert!(stderr.starts_with("tap-ctl: free minor 0: minor 0 is not allocated"), "{stderr}");
    let _held = {
        minors::allocate(&dir).unwrap();
        minors::claim(&dir, Minor(0)).unwrap()
    };
    assert_eq!(tap_ctl(&dir, false, "free -m 0").0, 11);
}

#[test]
fn list_succeeds_with_nothing_to_show_and_tells_problems_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let dir = ControlDir::at(folder.path());
    let nothing = (0, String::new(), String::new());
    assert_eq!(tap_ctl(&dir, false, "list -t vhd -f /srv/x.vhd"), nothing);
    assert_eq!(tap_ctl(&dir, false, "list -p 99"), nothing);
    let fake = FakeTapdisk::start(Script::Garbage);
    let (code, stdout, stderr) = tap_ctl(&fake.dir, false, "list");
    assert_eq!((code, stdout.as_str()), (0, ""));
    assert!(stderr.contains("tapdisk 4711"), "{stderr}");
}

#[test]
fn list_differs_between_terminal_and_script() {
    let vbds = vec![VbdEntry {
        minor: Minor(3),
        state: 0,
        image: Some("vhd:/a".parse().unwrap()),
        rings: Vec::new(),
    }];
    let fake = FakeTapdisk::start(Script::Always(Reply::List { vbds }));
    assert_eq!(tap_ctl(&fake.dir, false, "list").1, "pid=4711 minor=3 state=0 args=vhd:/a\n");
    assert_eq!(tap_ctl(&fake.dir, true, "list").1, "    4711    3    0        vhd /a\n");
}

#[test]
fn help_is_success_and_nonsense_is_22() {
    let folder = tempfile::tempdir().unwrap();
    let dir = ControlDir::at(folder.path());
    for line in ["", "reboot -p 1", "-h", "--debug", "spawn -h"] {
        let (code, stdout, stderr) = tap_ctl(&dir, false, line);
        assert_eq!((code, stderr.as_str()), (0, ""), "{line}");
        assert!(stdout.starts_with("usage: tap-ctl"), "{stdout}");
    }
    let (code, stdout, stderr) = tap_ctl(&dir, false, "open -p 1 --debug -m");
    assert_eq!((code, stdout.as_str()), (22, ""));
    assert!(stderr.contains("\nusage: tap-ctl open -p PID"), "{stderr}");
}

#[test]
fn resize_is_silent_and_tells_why_not() {
    let fake = FakeTapdisk::start(Script::Always(disk_info()));
    assert_eq!(tap_ctl(&fake.dir, false, "resize -p 4711 -m 3 -s 2"), (0, String::new(), String::new()));
    assert_eq!(tap_ctl(&fake.dir, false, "resize -p 4711 -m 3").0, 0);
    let minor = Minor(3);
    let expected = [Request::Resize { minor, size: Some(2 << 20) }, Request::Resize { minor, size: None }];
    assert_eq!(fake.seen(), expected);
    let fake = FakeTapdisk::start(Script::Always(refuse(22, "vhd:/a: an image never shrinks")));
    let (code, _, stderr) = tap_ctl(&fake.dir, false, "resize -p 4711 -m 3 -s 1");
    let words = "tap-ctl: resize minor 3 of tapdisk 4711: vhd:/a: an image never shrinks\n";
    assert_eq!((code, stderr.as_str()), (22, words));
}

#[test]
fn a_failed_create_leaves_no_marker() {
    let folder = tempfile::tempdir().unwrap();
    let dir = ControlDir::at(folder.path());
    let (code, stdout, stderr) = tap_ctl(&dir, false, "create -a vhd:/a");
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.starts_with("tap-ctl: create vhd:/a: cannot start /nonexistent/tapdisk"), "{stderr}");
    assert!(minors::allocated(&dir).unwrap().is_empty());
}

#[test]
fn destroy_closes_detaches_and_frees() {
    let fake = FakeTapdisk::start(Script::Always(Reply::Done));
    let minor = minors::allocate(&fake.dir).unwrap();
    assert_eq!(tap_ctl(&fake.dir, false, "destroy -p 4711 -m 0"), (0, String::new(), String::new()));
    assert_eq!(fake.seen(), [Request::Close { minor }, Request::Detach { minor }]);
    assert!(minors::allocated(&fake.dir).unwrap().is_empty());
}

#[test]
fn destroy_of_a_dead_tapdisk_frees_the_minor() {
    for script in [None, Some(Script::HangUp)] {
        let fake = script.map(FakeTapdisk::start);
        let folder = tempfile::tempdir().unwrap();
        let dir = fake.as_ref().map_or_else(|| ControlDir::at(folder.path()), |fake| fake.dir.clone());
        minors::allocate(&dir).unwrap();
        assert_eq!(tap_ctl(&dir, false, "destroy -p 4711 -m 0").0, 0);
        assert!(minors::allocated(&dir).unwrap().is_empty());
    }
}

#[test]
fn destroy_that_fails_to_close_keeps_the_minor() {
    let fake = FakeTapdisk::start(Script::Always(refuse(16, "image is busy")));
    minors::allocate(&fake.dir).unwrap();
    let (code, _, stderr) = tap_ctl(&fake.dir, false, "destroy -p 4711 -m 0");
    assert_eq!((code, stderr.as_str()), (16, "tap-ctl: destroy minor 0 of tapdisk 4711: image is busy\n"));
    assert_eq!(minors::allocated(&fake.dir).unwrap(), [Minor(0)]);
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(28))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let config = Config { dir: ControlDir::at(folder.path()), tapdisk: PathBuf::new(), terminal: false };
    let streams = Streams { stdin: &mut io::empty(), stdout: &mut Full, stderr: &mut Vec::new() };
    assert_eq!(run(&[OsString::from("allocate")], &config, streams), 28);
}

#[test]
fn json_has_the_same_content_with_null_for_what_is_not_known() {
    let vbds = vec![VbdEntry {
        minor: Minor(1),
        state: 42,
        image: Some("vhd:/a b".parse().unwrap()),
        rings: vec![],
    }];
    let answer = move |request: &Request| match request {
        Request::List => Reply::List { vbds: vbds.clone() },
        Request::Limit { .. } => Reply::Limits(Limits { iops: 7, ..Limits::default() }),
        _ => Reply::Done,
    };
    let fake = FakeTapdisk::start(Script::Answer(Box::new(answer)));
    let marker = fake.dir.marker(Minor(0));
    for (line, expected) in [
        ("allocate --json", format!(r#"{{"marker":"{}","minor":0}}"#, marker.display())),
        (
            "list --json",
            format!(
                r#"[{{"minor":1,"path":"/a b","pid":4711,"state":42,"type":"vhd","uri":"{}"}},"#,
                fake.dir.nbd_uri(4711, Minor(1))
            ) + r#"{"minor":0,"path":null,"pid":null,"state":null,"type":null,"uri":null}]"#,
        ),
        ("limit -p 4711 -m 1 --json", r#"{"bps":0,"burst_bps":0,"burst_iops":0,"iops":7}"#.to_owned()),
    ] {
        // A terminal makes no difference.
        assert_eq!(tap_ctl(&fake.dir, true, line), (0, expected + "\n", String::new()), "{line}");
    }
}

#[test]
fn metrics_and_tables_are_printed_and_what_does_not_answer_is_told_beside_them() {
    let vbds =
        vec![VbdEntry { minor: Minor(1), state: 0, image: Some("vhd:/a".parse().unwrap()), rings: vec![] }];
    let answer = move |request: &Request| match request {
        Request::List => Reply::List { vbds: vbds.clone() },
        _ => Reply::Done,
    };
    let fake = FakeTapdisk::start(Script::Answer(Box::new(answer)));
    let (code, stdout, stderr) = tap_ctl(&fake.dir, false, "metrics");
    assert!(stdout.contains("\nxenio_scrape_problems 1\n"), "{stdout}");
    assert_eq!((code, stderr.lines().count()), (0, 1), "{stderr}");
    let (code, stdout, _) = tap_ctl(&fake.dir, false, "top -b -n 1 -d 1");
    assert_eq!(code, 0);
    assert!(stdout.starts_with("0 disks, 0 IOPS, 0 MB/s read, 0 MB/s written, 1 not answering"), "{stdout}");
    assert_eq!(stdout.lines().count(), 2, "{stdout}");
}
