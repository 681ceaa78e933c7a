//! `vhd-util` against images and outputs of XenServer's original, byte for byte. See `golden/README.md`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// Commands that are not compared, with the reason.
const SKIPPED: [(&str, &str); 3] = [
    ("resize -n base.vhd -s 32 -j j.tmp", "no resize with a journal yet"),
    ("coalesce -n base.vhd", "no coalesce yet"),
    (
        "scan -f -m *.vhd",
        "the original scans in the order of the directory up to the first error; ours is sorted",
    ),
];

/// Commands of which only the lines are compared, not their order: the original goes in the order of the directory.
const UNORDERED: [&str; 1] = ["scan -f -m s?.vhd -a"];

struct Images {
    folder: tempfile::TempDir,
    prefix: Vec<u8>,
}

impl Images {
    fn unpack() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let archive = Path::new(DATA).join("vhds.tar.xz");
        let done = Command::new("tar").arg("-xJf").arg(&archive).current_dir(folder.path()).status().unwrap();
        assert!(done.success(), "tar and xz are needed");
        let prefix = format!("{}/", folder.path().canonicalize().unwrap().display()).into_bytes();
        Self { folder, prefix }
    }

    /// Output, with the folder's path cut out, and exit code.
    fn run(&self, args: &str) -> (Vec<u8>, i32) {
        let output = Command::new(env!("CARGO_BIN_EXE_vhd-util"))
            .args(args.split_whitespace())
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "{args}");
        (cut(&output.stdout, &self.prefix), output.status.code().unwrap())
    }
}

fn cut(bytes: &[u8], what: &[u8]) -> Vec<u8> {
    let mut rest = bytes;
    let mut kept = Vec::new();
    while let Some((&first, tail)) = rest.split_first() {
        match rest.strip_prefix(what) {
            Some(after) => rest = after,
            None => {
                kept.push(first);
                rest = tail;
            }
        }
    }
    kept
}

/// Arguments, output and exit code of each command in a file.
fn expectations(name: &str) -> Vec<(String, Vec<u8>, i32)> {
    let text = std::fs::read(Path::new(DATA).join(name)).unwrap();
    let mut all = Vec::new();
    let mut rest = &text[..];
    while let Some(command) = rest.strip_prefix(b"$ vhd-util ") {
        let line = command.iter().position(|&b| b == b'\n').unwrap();
        let body = &command[line + 1..];
        let end = body.windows(6).position(|window| window == b"[exit ").unwrap();
        let code = body[end + 6..].iter().take_while(|b| b.is_ascii_digit()).map(|&b| b as char);
        let code = code.collect::<String>();
        all.push((
            String::from_utf8(command[..line].to_vec()).unwrap(),
            body[..end].to_vec(),
            code.parse().unwrap(),
        ));
        rest = &body[end + 6 + code.len() + 2..];
    }
    assert!(rest.is_empty());
    all
}

fn sorted_lines(text: &[u8]) -> Vec<&[u8]> {
    let mut lines = text.split(|&b| b == b'\n').collect::<Vec<_>>();
    lines.sort_unstable();
    lines
}

fn compare(file: &str, least: usize) {
    let images = Images::unpack();
    let (mut compared, mut wrong) = (0, Vec::new());
    for (args, expected, code) in expectations(file) {
        if SKIPPED.iter().any(|(skipped, _)| *skipped == args) {
            continue;
        }
        let (found, found_code) = images.run(&args);
        let same = if UNORDERED.contains(&args.as_str()) {
            sorted_lines(&found) == sorted_lines(&expected)
        } else {
            found == expected
        };
        compared += 1;
        if !same || found_code != code {
            wrong.push(format!(
                "$ vhd-util {args}\n--- expected {code}\n{}\n--- found {found_code}\n{}",
                String::from_utf8_lossy(&expected),
                String::from_utf8_lossy(&found)
            ));
        }
    }
    println!("{compared} commands compared");
    assert!(wrong.is_empty(), "{} of {compared} differ\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared >= least, "only {compared} commands in {file}");
}

#[test]
fn commands_print_and_exit_as_the_original() {
    compare("expected-output.txt", 80);
}

#[test]
fn headers_are_printed_as_by_the_original() {
    compare("expected-read-p.txt", 10);
}

#[test]
fn chains_have_the_contents_that_the_original_wrote() {
    let images = Images::unpack();
    let list = std::fs::read_to_string(Path::new(DATA).join("content-sha256.txt")).unwrap();
    let mut compared = 0;
    for line in list.lines() {
        let [name, sectors, "sectors", "sha256", expected] = line.split(' ').collect::<Vec<_>>()[..] else {
            panic!("{line}");
        };
        let (data, code) = images.run(&format!("read -n {name} -r 0 -c {sectors}"));
        assert_eq!(code, 0, "{name}");
        assert_eq!(data.len(), sectors.parse::<usize>().unwrap() * 512, "{name}");
        let copy = images.folder.path().join("content");
        std::fs::write(&copy, &data).unwrap();
        let sum = Command::new("sha256sum").arg(&copy).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&sum.stdout).split(' ').next(), Some(expected), "{name}");
        compared += 1;
    }
    assert_eq!(compared, 8);
}

/// Offsets of the fields of footer and header that differ between any two images: time, identity, checksums.
const VARYING: [std::ops::Range<usize>; 3] = [24..28, 64..84, 512 + 36..512 + 40];

fn without_varying(path: PathBuf) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    let footer = bytes.len() - 512;
    for range in VARYING {
        if range.end <= 512 {
            bytes[footer + range.start..footer + range.end].fill(0);
        }
        bytes[range].fill(0);
    }
    bytes
}

#[test]
fn new_images_have_the_bytes_of_the_original() {
    let images = Images::unpack();
    let path = |name: &str| images.folder.path().join(name);
    for (args, golden) in [
        ("create -n new.vhd -s 64", "empty.vhd"),
        ("create -n new.vhd -s 63", "empty.vhd"),
        ("create -n new.vhd -s 64 -S 256", "prealloc.vhd"),
    ] {
        assert_eq!(images.run(args), (Vec::new(), 0), "{args}");
        assert!(without_varying(path("new.vhd")) == without_varying(path(golden)), "{args}");
    }
    assert_eq!(images.run("create -n new.vhd -s 8 -r").1, 0);
    let fixed = std::fs::read(path("new.vhd")).unwrap();
    let golden = std::fs::read(path("fixed.vhd")).unwrap();
    let footer = |bytes: &[u8]| [&bytes[8 << 20..][..24], &bytes[8 << 20..][28..64]].concat();
    assert_eq!(footer(&fixed), footer(&golden));
    assert!(fixed[..8 << 20].iter().all(|&byte| byte == 0));
}

#[test]
fn new_snapshots_have_the_headers_of_the_original() {
    let images = Images::unpack();
    let path = |name: &str| images.folder.path().join(name);
    for (args, golden) in [
        ("snapshot -n new.vhd -p base.vhd", "s1.vhd"),
        ("snapshot -n new.vhd -p s1.vhd", "s2.vhd"),
        ("snapshot -n new.vhd -p rawparent.img -m", "onraw.vhd"),
    ] {
        assert_eq!(images.run(args), (Vec::new(), 0), "{args}");
        let mut new = without_varying(path("new.vhd"));
        let mut old = std::fs::read(path(golden)).unwrap();
        // The golden ones have been written to: compare what lies before the table and behind the batmap. The time of
        // the parent is that of its last change.
        for bytes in [&mut new, &mut old] {
            for range in VARYING.into_iter().chain([512 + 56..512 + 60, 1536..2048 + 1024]) {
                bytes[range].fill(0);
            }
        }
        assert!(new[..4608] == old[..4608], "{args}");
        assert_eq!(images.run("check -n new.vhd -p").1, 0);
        assert_eq!(images.run("query -n new.vhd -p").0, images.run(&format!("query -n {golden} -p")).0);
    }
}

#[test]
fn empty_snapshots_are_skipped_unless_told_otherwise() {
    let images = Images::unpack();
    assert_eq!(images.run("snapshot -n e1.vhd -p base.vhd").1, 0);
    assert_eq!(images.run("snapshot -n e2.vhd -p e1.vhd").1, 0);
    assert_eq!(images.run("query -n e2.vhd -p -d").0, b"base.vhd\nchain depth: 2\n");
    assert_eq!(images.run("snapshot -n e3.vhd -p e1.vhd -e").1, 0);
    assert_eq!(images.run("query -n e3.vhd -p -d").0, b"e1.vhd\nchain depth: 3\n");
    assert_eq!(images.run("query -n e3.vhd -p -u").0, b"./e1.vhd\n");
    assert_eq!(images.run("snapshot -n base.vhd -p e1.vhd").1, 22);
    assert_eq!(images.run("check -n base.vhd").1, 0);
}

#[test]
fn fields_can_be_set() {
    let images = Images::unpack();
    assert_eq!(images.run("set -n base.vhd -f hidden -v 1"), (Vec::new(), 0));
    assert_eq!(images.run("set -n base.vhd -f marker -v 9"), (Vec::new(), 0));
    assert_eq!(images.run("query -n base.vhd -f -m").0, b"hidden: 1\nmarker: 9\n");
    assert_eq!(images.run("check -n base.vhd").1, 0);
    assert_eq!(images.run("set -n fixed.vhd -f hidden -v 1"), (Vec::new(), 0));
    assert_eq!(images.run("query -n fixed.vhd -f").0, b"hidden: 1\n");
    assert_eq!(images.run("set -n base.vhd -f colour -v 1").1, 22);
    assert_eq!(images.run("set -n base.vhd -f hidden -v 256").1, 22);
}

#[test]
fn a_loop_of_parents_ends() {
    let images = Images::unpack();
    assert_eq!(images.run("snapshot -n l1.vhd -p base.vhd").1, 0);
    let (first, second) = (images.folder.path().join("l1.vhd"), images.folder.path().join("base.vhd"));
    // The child in the place of its parent: the same file and the wrong identity.
    std::fs::copy(&first, &second).unwrap();
    for args in
        ["query -n l1.vhd -d", "check -n l1.vhd -p", "read -n l1.vhd -r 0", "snapshot -n x.vhd -p l1.vhd"]
    {
        assert_ne!(images.run(args).1, 0, "{args}");
    }
}

#[test]
fn images_in_use_are_not_changed() {
    let images = Images::unpack();
    let path = images.folder.path().join("base.vhd");
    let before = std::fs::read(&path).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let whole = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&whole)).unwrap();
    for args in
        ["set -n base.vhd -f hidden -v 1", "create -n base.vhd -s 64", "snapshot -n base.vhd -p cbase.vhd"]
    {
        let (text, code) = images.run(args);
        assert_eq!(code, libc::EBUSY, "{args}");
        assert!(String::from_utf8(text).unwrap().starts_with("base.vhd is in use"), "{args}");
    }
    assert_eq!(images.run("check -n base.vhd").1, 0);
    assert!(std::fs::read(&path).unwrap() == before);
}
