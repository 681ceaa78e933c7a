//! `vhd-util` against images and outputs of XenServer's original, byte for byte. See `golden/README.md`.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// A command that goes in the order of the directory up to the first error, where ours is sorted: each of its lines is
/// compared with what is printed of that image alone.
const IN_DIRECTORY_ORDER: &str = "scan -f -m *.vhd";

/// Commands of which only the lines are compared, not their order: the original goes in the order of the directory.
const UNORDERED: [&str; 1] = ["scan -f -m s?.vhd -a"];

struct Images {
    folder: tempfile::TempDir,
    prefix: Vec<u8>,
}

impl Images {
    fn unpack() -> Self {
        static ONCE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
            let folder = tempfile::tempdir().unwrap();
            let archive = Path::new(DATA).join("vhds.tar.xz");
            let done =
                Command::new("tar").arg("-xJf").arg(&archive).current_dir(folder.path()).status().unwrap();
            assert!(done.success(), "tar and xz are needed");
            folder
        });
        let folder = tempfile::tempdir().unwrap();
        let from = ONCE.path().join(".");
        let done =
            Command::new("cp").args(["-r", "--sparse=always"]).arg(from).arg(folder.path()).status().unwrap();
        assert!(done.success());
        let prefix = format!("{}/", folder.path().canonicalize().unwrap().display()).into_bytes();
        Self { folder, prefix }
    }

    /// Output, with the folder's path cut out, and exit code.
    fn run(&self, args: &str) -> (Vec<u8>, i32) {
        self.run_with(args, &[])
    }

    /// The same with variables in the environment.
    fn run_with(&self, args: &str, variables: &[(&str, &str)]) -> (Vec<u8>, i32) {
        let output = Command::new(env!("CARGO_BIN_EXE_vhd-util"))
            .args(args.split_whitespace())
            .envs(variables.iter().copied())
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

fn each_line_is_that_of_its_image(images: &Images, expected: &[u8]) {
    for line in String::from_utf8_lossy(expected).lines() {
        let name = line.strip_prefix("vhd=").and_then(|rest| rest.split(' ').next()).unwrap();
        let (found, code) = images.run(&format!("scan -f {name}"));
        assert_eq!(String::from_utf8(found).unwrap(), format!("{line}\n"));
        assert_eq!(code, if line.contains("scan-error=-22") { 22 } else { 0 }, "{name}");
    }
}

fn compare(file: &str, least: usize) {
    let images = Images::unpack();
    let (mut compared, mut wrong) = (0, Vec::new());
    for (args, expected, code) in expectations(file) {
        if args == IN_DIRECTORY_ORDER {
            each_line_is_that_of_its_image(&images, &expected);
            compared += 1;
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
    compare("expected-output.txt", 91);
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

/// The whole disk.
fn content(images: &Images, name: &str) -> Vec<u8> {
    let sectors = images.run(&format!("query -n {name} -v")).0;
    let mib = String::from_utf8(sectors).unwrap().trim().parse::<u64>().unwrap();
    let (data, code) = images.run(&format!("read -n {name} -r 0 -c {}", mib * 2048));
    assert_eq!(code, 0, "{name}: {}", String::from_utf8_lossy(&data));
    data
}

#[test]
fn a_resize_under_a_journal_makes_room_for_the_table() {
    let images = Images::unpack();
    for name in ["base.vhd", "s1.vhd", "empty.vhd", "prealloc.vhd"] {
        let before = content(&images, name);
        // 1200 MiB need five sectors of table; 20000 MiB a second sector of batmap.
        for mib in [66, 1200, 20000] {
            let args = format!("resize -n {name} -s {mib} -j journal");
            assert_eq!(images.run(&args), (Vec::new(), 0), "{args}");
            assert!(!images.folder.path().join("journal").exists());
            assert_eq!(images.run(&format!("query -n {name} -v")).0, format!("{mib}\n").into_bytes());
            let (text, code) = images.run(&format!("check -n {name} -b"));
            let expected = format!("{name} is valid\n");
            assert_eq!((String::from_utf8(text).unwrap(), code), (expected, 0), "{args}");
            let (data, _) = images.run(&format!("read -n {name} -r 0 -c {}", before.len() / 512));
            assert!(data == before, "{args}");
        }
    }
    assert_eq!(content(&images, "s2.vhd").len(), 64 << 20);
}

#[test]
fn a_fixed_image_grows_and_shrinks_under_a_journal() {
    let images = Images::unpack();
    let before = content(&images, "fixed.vhd");
    let mut kept = before.len();
    for mib in [12, 8, 3, 4] {
        assert_eq!(images.run(&format!("resize -n fixed.vhd -s {mib} -j journal")), (Vec::new(), 0));
        assert_eq!(images.run("check -n fixed.vhd").1, 0);
        let after = content(&images, "fixed.vhd");
        assert_eq!(after.len(), mib << 20);
        kept = kept.min(after.len());
        assert!(after[..kept] == before[..kept] && after[kept..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_resize_that_is_stopped_is_reverted() {
    let images = Images::unpack();
    for name in ["base.vhd", "s1.vhd", "fixed.vhd", "key.vhd"] {
        let path = images.folder.path().join(name);
        let before = std::fs::read(&path).unwrap();
        for point in ["BEGIN", "DATA_MOVED", "METADATA_MOVED", "END"] {
            let variable = format!("VHD_UTIL_TEST_FAIL_RESIZE_{point}");
            let stop = [(variable.as_str(), "1")];
            let mib = if name == "fixed.vhd" { 12 } else { 20000 };
            let (text, code) = images.run_with(&format!("resize -n {name} -s {mib} -j journal"), &stop);
            if code == 0 {
                // Without data in the way none is moved.
                assert!(name != "base.vhd" && name != "s1.vhd", "{name} {point}");
                std::fs::write(&path, &before).unwrap();
                continue;
            }
            assert_eq!((String::from_utf8(text).unwrap(), code), (format!("Failing at {variable}\n"), 22));
            assert_ne!(images.run(&format!("query -n {name} -v")).1, 0, "{name} {point} is not for use");
            assert_eq!(
                images.run(&format!("revert -n {name} -j journal")),
                (Vec::new(), 0),
                "{name} {point}"
            );
            assert!(std::fs::read(&path).unwrap() == before, "{name} {point}");
            assert!(!images.folder.path().join("journal").exists());
        }
    }
    // A journal that belongs to another image or to none, and one that is there already.
    std::fs::write(images.folder.path().join("journal"), b"vjournal").unwrap();
    assert_eq!(images.run("revert -n base.vhd -j journal").1, 22);
    assert_eq!(images.run("revert -n base.vhd -j missing").1, 2);
    assert_eq!(images.run("resize -n base.vhd -s 70 -j journal").1, 17);
    assert_eq!(images.run("check -n base.vhd").1, 0);
}

#[test]
fn only_images_of_xen_are_resized() {
    let images = Images::unpack();
    let path = images.folder.path().join("fixed.vhd");
    let mut bytes = std::fs::read(&path).unwrap();
    let footer = bytes.len() - 512;
    bytes[footer + 28..footer + 32].copy_from_slice(b"vpc ");
    let summed = bytes[footer..].iter().enumerate().filter(|(i, _)| !(64..68).contains(i));
    let sum = !summed.map(|(_, &byte)| u32::from(byte)).sum::<u32>();
    bytes[footer + 64..footer + 68].copy_from_slice(&sum.to_be_bytes());
    std::fs::write(&path, bytes).unwrap();
    let (text, code) = images.run("resize -n fixed.vhd -s 9 -j journal");
    assert_eq!((&text[..], code), (&b"fixed.vhd not created by xen; resize not supported\n"[..], 22));
}

#[test]
fn an_image_can_get_another_parent() {
    let images = Images::unpack();
    let path = |name: &str| images.folder.path().join(name);
    std::fs::create_dir(path("sub")).unwrap();
    std::fs::rename(path("base.vhd"), path("sub/bäse.vhd")).unwrap();
    assert_ne!(images.run("query -n s1.vhd -p").1, 0);
    let before = std::fs::read(path("s1.vhd")).unwrap();
    for point in ["BEGIN", "LOCATOR", "END"] {
        std::fs::write(path("s1.vhd"), &before).unwrap();
        let variable = format!("VHD_UTIL_TEST_FAIL_REPARENT_{point}");
        let (text, code) = images.run_with("modify -n s1.vhd -p sub/bäse.vhd", &[(&variable, "1")]);
        assert_eq!((String::from_utf8(text).unwrap(), code), (format!("Failing at {variable}\n"), 22));
        // The next command finds the old state or the new one, whole.
        let found = images.run("query -n s1.vhd -p -u");
        let expected = if point == "END" { "./sub/bäse.vhd\n" } else { "./base.vhd\n" };
        assert_eq!((String::from_utf8(found.0).unwrap(), found.1), (expected.to_owned(), 0), "{point}");
        assert!(!path("s1.vhd.relink-journal").exists());
        assert_eq!(images.run("check -n s1.vhd").1, 0);
    }
    assert_eq!(images.run("modify -n s1.vhd -p sub/bäse.vhd"), (Vec::new(), 0));
    assert_eq!(String::from_utf8(images.run("query -n s1.vhd -p").0).unwrap(), "sub/bäse.vhd\n");
    assert_eq!(images.run("check -n s2.vhd -p").1, 0);
    // A raw parent, and what cannot be a parent.
    assert_eq!(images.run("modify -n onraw.vhd -p fixed.vhd -m").1, 0);
    assert_eq!(images.run("query -n onraw.vhd -p").0, b"fixed.vhd\n");
    for (args, code) in [
        ("modify -n s1.vhd -p s2.vhd", 40),
        ("modify -n s1.vhd -p s1.vhd", 40),
        ("modify -n s1.vhd -p missing", 2),
        ("modify -n empty.vhd -p cbase.vhd", 22),
    ] {
        assert_eq!(images.run(args).1, code, "{args}");
    }
    let deep = "d/".repeat(150);
    std::fs::create_dir_all(path(&deep)).unwrap();
    std::fs::rename(path("cbase.vhd"), path(&format!("{deep}c.vhd"))).unwrap();
    assert_eq!(images.run(&format!("modify -n s1.vhd -p {deep}c.vhd")).1, 36);
    assert_eq!(images.run("check -n s1.vhd").1, 0);
}

#[test]
fn data_can_be_dropped_and_the_end_be_put_elsewhere() {
    let images = Images::unpack();
    assert_eq!(images.run("modify -n base.vhd -z"), (Vec::new(), 0));
    assert_eq!(images.run("check -n base.vhd -b").1, 0);
    assert_eq!(images.run("query -n base.vhd -a -s").0, b"3584\n0\n");
    assert!(content(&images, "base.vhd").iter().all(|&byte| byte == 0));
    assert_eq!(images.run("modify -n fixed.vhd -z").1, 38);
    assert_eq!(images.run("modify -n base.vhd -s 4096"), (Vec::new(), 0));
    assert_eq!(std::fs::metadata(images.folder.path().join("base.vhd")).unwrap().len(), 4096);
    assert_eq!(images.run("check -n base.vhd").1, 0);
    assert_eq!(images.run("modify -n base.vhd -s 3000").1, 22);
    assert_eq!(images.run("modify -n base.vhd -s 4097").1, 22);
}

#[test]
fn damaged_ends_are_repaired() {
    let images = Images::unpack();
    for name in ["nofooter.vhd", "truncated.vhd", "badsum.vhd"] {
        let (text, code) = images.run(&format!("repair -n {name}"));
        assert_eq!(code, 0, "{name}");
        assert_eq!(text.is_empty(), name != "truncated.vhd", "{name}: what is lost is said");
        assert_eq!(images.run(&format!("check -n {name}")).1, 0, "{name}");
    }
    assert!(content(&images, "nofooter.vhd") == content(&images, "badsum.vhd"));
    // The copy at offset 0 is taken if that is asked for.
    assert_eq!(images.run("set -n base.vhd -f hidden -v 1").1, 0);
    let path = images.folder.path().join("base.vhd");
    let mut bytes = std::fs::read(&path).unwrap();
    let golden = std::fs::read(images.folder.path().join("cbase.vhd")).unwrap();
    let end = bytes.len() - 512;
    bytes[end..].copy_from_slice(&golden[..512]);
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(images.run("repair -n base.vhd -b"), (Vec::new(), 0));
    assert_eq!(images.run("query -n base.vhd -f").0, b"hidden: 1\n");
    assert_eq!(images.run("check -n base.vhd").1, 0);
    assert_eq!(images.run("repair -n badbat.vhd").1, 22, "nobody knows whose data it is");
    assert_eq!(images.run("repair -n text.vhd").1, 5);
}

#[test]
fn keys_are_calculated_set_and_checked() {
    let images = Images::unpack();
    let key = "empty,aes-xts-plain,256.key";
    let nonce = "ab".repeat(32);
    std::fs::write(images.folder.path().join(key), [7; 32]).unwrap();
    let said = format!("vhd_util_read_key: using keyfile {key}, Size (bytes) 32\n").into_bytes();
    assert_eq!(images.run("key -p -n empty.vhd"), (b"none\n".to_vec(), 0));
    assert_eq!(images.run(&format!("key -c -n empty.vhd -k {key}")).1, 22);
    assert_eq!(images.run(&format!("key -s -n empty.vhd -k {key} -N {nonce}")), (said.clone(), 0));
    assert_eq!(images.run(&format!("key -c -n empty.vhd -k {key}")), (said, 0));
    let printed = String::from_utf8(images.run("key -p -n empty.vhd").0).unwrap();
    let calculated = String::from_utf8(images.run(&format!("key -C -k {key} -N {nonce}")).0).unwrap();
    assert_eq!(printed, format!("{nonce} {}\n", calculated.lines().last().unwrap()));
    assert_eq!(images.run("check -n empty.vhd").1, 0);
    std::fs::write(images.folder.path().join(key), [8; 32]).unwrap();
    assert_eq!(images.run(&format!("key -c -n empty.vhd -k {key}")).1, 22);
    // The child inherits the key; data are nothing but ciphertext without it.
    assert_eq!(images.run("snapshot -n child.vhd -p empty.vhd -e").1, 0);
    assert_eq!(String::from_utf8(images.run("key -p -n child.vhd").0).unwrap(), printed);
    assert_eq!(images.run("read -n child.vhd -r 0").1, 22);
    for args in [
        format!("key -s -n fixed.vhd -H {}", "0".repeat(64)),
        format!("key -s -n base.vhd -H {}", "0".repeat(64)),
        "key -n base.vhd".into(),
        format!("key -s -n marker.vhd -k {key}"),
    ] {
        assert_eq!(images.run(&args).1, 22, "{args}");
    }
}

#[test]
fn coalescing_does_what_the_original_did() {
    let images = Images::unpack();
    let path = |name: &str| images.folder.path().join(name);
    // The golden parent is the one after its coalesce: with the one from before in its place it is done again.
    let mut before = std::fs::read(path("cbase-before.vhd")).unwrap();
    let after = std::fs::read(path("cbase.vhd")).unwrap();
    let end = before.len() - 512;
    before[..512].copy_from_slice(&after[..512]);
    before[end..].copy_from_slice(&after[..512]);
    std::fs::write(path("cbase.vhd"), &before).unwrap();
    for round in 1..3 {
        let (text, code) = images.run("coalesce -n cchild.vhd");
        assert_eq!((&text[..], code), (&b"Coalesced 2304 sectors"[..], 0), "round {round}");
        assert!(std::fs::read(path("cbase.vhd")).unwrap() == after, "round {round}");
        assert_eq!(images.run("check -n cbase.vhd -b").1, 0);
    }
    let text = String::from_utf8(images.run("coalesce -n cchild.vhd -s -p").0).unwrap();
    assert!(text.starts_with("opening for sparse writes\n\r") && text.contains("\r 50.00%"), "{text}");
    assert!(text.ends_with("\r100.00%\nCoalesced 2304 sectors"), "{text}");
}

/// A file of random sectors, some of them zeros.
fn raw(len: usize, seed: u64) -> Vec<u8> {
    let mut random = format::testing::Random::new(seed);
    let mut bytes = vec![0; len];
    for sector in bytes.chunks_mut(512) {
        if random.once_in(2) {
            random.fill(sector);
        }
    }
    bytes
}

#[test]
fn a_raw_parent_takes_what_its_child_has() {
    let images = Images::unpack();
    let expected = content(&images, "onraw.vhd");
    assert_eq!(images.run("coalesce -n onraw.vhd"), (b"Coalesced 8 sectors".to_vec(), 0));
    assert!(std::fs::read(images.folder.path().join("rawparent.img")).unwrap() == expected);
    assert!(content(&images, "onraw.vhd") == expected);
}

#[test]
fn an_ancestor_takes_the_data_and_what_is_between_gives_way() {
    let images = Images::unpack();
    let expected = content(&images, "s2.vhd");
    let before = content(&images, "s1.vhd");
    let (text, code) = images.run("coalesce -n s2.vhd -a base.vhd");
    assert_eq!((&text[..], code), (&b"Coalesced 4098 sectors"[..], 0));
    // The child and what is between show the child's data now.
    assert!(content(&images, "s2.vhd") == expected && content(&images, "s1.vhd") == expected);
    assert!(before != expected);
    for name in ["s1.vhd", "s2.vhd", "base.vhd"] {
        assert_eq!(images.run(&format!("check -n {name} -b")).1, 0, "{name}");
    }
    assert_eq!(images.run("coalesce -n s2.vhd -a cbase.vhd").1, 2);
}

#[test]
fn a_parent_grows_with_its_child_as_far_as_it_can() {
    let images = Images::unpack();
    let path = |name: &str| images.folder.path().join(name);
    for (parent, code) in [("prealloc.vhd", 0), ("empty.vhd", 22)] {
        assert_eq!(images.run(&format!("snapshot -n c.vhd -p {parent} -e")).1, 0);
        assert_eq!(images.run("resize -n c.vhd -s 70 -j journal"), (Vec::new(), 0));
        // Data behind the end of the parent.
        std::fs::write(path("raw"), raw(70 << 20, 1)).unwrap();
        assert_eq!(images.run("modify -n c.vhd -p raw -m").1, 0);
        assert_eq!(images.run("fill -n c.vhd"), (Vec::new(), 0));
        let expected = content(&images, "c.vhd");
        assert!(expected == raw(70 << 20, 1));
        assert_eq!(images.run(&format!("modify -n c.vhd -p {parent}")).1, 0);
        let (text, found) = images.run("coalesce -n c.vhd");
        assert_eq!(found, code, "{}", String::from_utf8_lossy(&text));
        if code == 0 {
            assert_eq!(text, b"Coalesced 143360 sectors");
            assert!(content(&images, parent) == expected);
            assert_eq!(images.run(&format!("check -n {parent} -b")).1, 0);
        } else {
            assert!(String::from_utf8(text).unwrap().contains("resize -j"));
        }
    }
}

#[test]
fn a_chain_is_written_into_one_image() {
    let images = Images::unpack();
    for name in ["s2.vhd", "onraw.vhd", "base.vhd", "fixed.vhd"] {
        let expected = content(&images, name);
        for args in [format!("coalesce -n {name} -o new.vhd"), format!("copy -n {name} -N new.vhd")] {
            assert_eq!(images.run(&args), (Vec::new(), 0), "{args}");
            assert!(content(&images, "new.vhd") == expected, "{args}");
            assert_eq!(images.run("check -n new.vhd -b").1, 0);
            assert_eq!(images.run("query -n new.vhd -d").0, b"chain depth: 1\n");
            assert_eq!(images.run(&args).1, 17, "not in place of another image");
            std::fs::remove_file(images.folder.path().join("new.vhd")).unwrap();
        }
    }
}

#[test]
fn copies_are_encrypted_if_asked_for() {
    let images = Images::unpack();
    let path = |name: &str| images.folder.path().join(name);
    for (bits, len) in [(256, 32), (512, 64)] {
        let name = format!("new{bits}.vhd");
        let key = format!("new{bits},aes-xts-plain,{bits}.key");
        std::fs::write(path(&key), vec![3_u8; len]).unwrap();
        let expected = content(&images, "s2.vhd");
        assert_eq!(images.run(&format!("copy -n s2.vhd -N {name} -k {key}")).1, 0);
        assert_eq!(images.run(&format!("key -c -n {name} -k {key}")).1, 0);
        assert_eq!(images.run(&format!("copy -n {name} -N again.vhd")).1, 22);
        assert_eq!(images.run(&format!("copy -n {name} -N again.vhd -E")), (Vec::new(), 0));
        assert_eq!(images.run("copy -n base.vhd -N other.vhd -E").1, 22);
        for name in [name.as_str(), "again.vhd"] {
            let file = std::fs::read(path(name)).unwrap();
            let key = vhd::Key::new(vec![3; len]).unwrap();
            assert!(decrypted(&file, key) == expected, "{name}");
        }
        std::fs::remove_file(path("again.vhd")).unwrap();
    }
}

/// What the disk of an encrypted image without parent holds.
fn decrypted(file: &[u8], key: vhd::Key) -> Vec<u8> {
    use format::blocking::{Blocking, nothing, with_source};
    let memory = format::testing::Memory::of(file.to_vec(), true);
    let options = vhd::OpenOptions { key: Some(key), ..vhd::OpenOptions::default() };
    let vhd = with_source(&memory, |source| vhd::Vhd::open(source, &options)).unwrap().unwrap();
    let mut all = vec![0; usize::try_from(vhd.sectors()).unwrap() * 512];
    Blocking::new(vhd, memory).read(0, &mut all, &mut nothing).unwrap();
    all
}

#[test]
fn filling_gives_every_block_a_place() {
    let images = Images::unpack();
    for (name, blocks) in [("s1.vhd", 32), ("base.vhd", 32), ("onraw.vhd", 8)] {
        let expected = content(&images, name);
        assert_eq!(images.run(&format!("fill -n {name}")), (Vec::new(), 0));
        assert!(content(&images, name) == expected);
        assert_eq!(images.run(&format!("query -n {name} -a")).0, format!("{blocks}\n").into_bytes());
        assert_eq!(images.run(&format!("check -n {name} -b")).1, 0);
    }
    // Only the table and the bitmaps, of all blocks or some.
    let expected = content(&images, "cbase.vhd");
    assert_eq!(images.run("fill -n cbase.vhd -b -f 40960 -t 49152"), (Vec::new(), 0));
    assert_eq!(images.run("query -n cbase.vhd -a").0, b"8\n");
    assert_eq!(images.run("fill -n cbase.vhd -b"), (Vec::new(), 0));
    assert_eq!(images.run("query -n cbase.vhd -a").0, b"32\n");
    assert!(content(&images, "cbase.vhd") == expected);
    assert_eq!(images.run("check -n cbase.vhd -b").1, 0);
    for args in ["fill -n cbase.vhd -f 3", "fill -n cbase.vhd -B", "fill -n cbase.vhd -b -f 5 -t 4", "fill"] {
        assert_eq!(images.run(args).1, 22, "{args}");
    }
}

#[test]
fn metadata_and_data_are_read_in_every_way() {
    let images = Images::unpack();
    let text = |args: &str| {
        let (text, code) = images.run(&format!("read -n s1.vhd {args}"));
        assert_eq!(code, 0, "{args}: {}", String::from_utf8_lossy(&text));
        text
    };
    let content = content(&images, "s1.vhd");
    assert!(text("-R 1000 -c 3000") == content[1000..4000]);
    assert!(text("-r 4095 -c 3000") == content[4095 * 512..7095 * 512]);
    // The extents are those of the single bits, which are those of the bitmaps.
    let bits = String::from_utf8(text("-i 0 -c 131072")).unwrap();
    let set = bits.lines().enumerate().filter(|(_, line)| line.ends_with(": 1")).map(|(i, _)| i as u64);
    let set = set.collect::<std::collections::BTreeSet<_>>();
    assert_eq!(set.len(), 0x1d);
    let extents = String::from_utf8(text("-e 0 -c 131072")).unwrap();
    let mut listed = std::collections::BTreeSet::new();
    for line in extents.lines() {
        let (first, count) = line.split_once(' ').unwrap();
        let first: u64 = first.parse().unwrap();
        listed.extend(first..first + count.parse::<u64>().unwrap());
    }
    assert_eq!(listed, set);
    let first = *set.first().unwrap();
    let hex = String::from_utf8(text(&format!("-x -i {first}"))).unwrap();
    assert!(hex.starts_with("block 0") && hex.ends_with(": 1\n"), "{hex}");
    assert_eq!(text("-a").len(), 512);
    assert_eq!(text("-j 0 -c 2"), b"batmap for block 0: 0\nbatmap for block 1: 0\n");
    let block = String::from_utf8(text("-b 0 -c 32")).unwrap();
    assert_eq!(block.matches("offset: not allocated").count(), 29);
    let allocated = block.lines().position(|line| !line.ends_with("allocated")).unwrap();
    assert_eq!(text(&format!("-d {allocated}")).len(), 2 << 20);
    assert_eq!(text(&format!("-m {allocated} -C")).len(), 512);
    for args in
        ["-b 32", "-t 131072", "-i 131071 -c 2", "-m 31 -c 2", "-r 131072", "-R 67108864", "-j 32", "-d 32"]
    {
        assert_eq!(images.run(&format!("read -n s1.vhd {args}")).1, 34, "{args}");
    }
}

#[test]
fn an_image_can_be_made_with_all_of_its_blocks_and_for_qemu() {
    let images = Images::unpack();
    assert_eq!(images.run("create -n new.vhd -s 64 -a"), (Vec::new(), 0));
    assert_eq!(images.run("query -n new.vhd -a").0, b"32\n");
    assert_eq!(images.run("check -n new.vhd -b").1, 0);
    assert!(content(&images, "new.vhd").iter().all(|&byte| byte == 0));
    let used = std::os::unix::fs::MetadataExt::blocks(
        &std::fs::metadata(images.folder.path().join("new.vhd")).unwrap(),
    );
    assert!(used < 1024, "{used} sectors of the file system: the data are holes");
    assert_eq!(images.run("create -n new.vhd -s 16 -q"), (Vec::new(), 0));
    assert_eq!(images.run("check -n new.vhd"), (b"new.vhd is valid\n".to_vec(), 0));
    let path = images.folder.path().join("new.vhd");
    let io = ["-f", "vpc", "-c", "write -P 7 5M 64k", path.to_str().unwrap()];
    match Command::new("qemu-io").args(io).output() {
        Err(_) => eprintln!("skipped: there is no qemu-io"),
        Ok(done) => assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr)),
    }
    assert_eq!(images.run("check -n new.vhd"), (b"new.vhd is valid\n".to_vec(), 0));
    let all = content(&images, "new.vhd");
    assert!(
        all.iter()
            .enumerate()
            .all(|(i, &byte)| byte == 0 || (byte == 7 && (5 << 20..(5 << 20) + 65536).contains(&i)))
    );
    assert_eq!(images.run("snapshot -n child.vhd -p new.vhd -e").1, 0);
    assert_eq!(images.run("check -n child.vhd -p").1, 0);
}

#[test]
fn a_scan_prints_names_markers_and_trees() {
    let images = Images::unpack();
    let folder = images.folder.path().canonicalize().unwrap();
    let scan = |args: &str| {
        let (text, code) = images.run(&format!("scan -f {args}"));
        assert_eq!(code, 0, "{args}");
        String::from_utf8(text).unwrap()
    };
    let here = folder.display();
    assert!(scan(&format!("{here}/s1.vhd")).starts_with("vhd=s1.vhd "));
    // With -v whole paths, which the tests cut down.
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhd-util"));
    let output = command.args(["scan", "-f", "-v"]).arg(folder.join("s1.vhd")).output().unwrap();
    let output = String::from_utf8(output.stdout).unwrap();
    assert!(output.starts_with(&format!("vhd={here}/s1.vhd ")), "{output}");
    assert!(output.trim_end().ends_with(&format!("parent={here}/base.vhd")), "{output}");
    assert!(scan("-M marker.vhd").contains(" hidden=0 marker=7 keyhash= parent=none"));
    assert_eq!(images.run("set -n s1.vhd -f hidden -v 1").1, 0);
    assert_eq!(images.run("snapshot -n aa.vhd -p base.vhd").1, 0);
    let tree = scan("-p s2.vhd s1.vhd base.vhd aa.vhd hidden.vhd");
    let names = tree.lines().map(|line| line.split(" capacity").next().unwrap()).collect::<Vec<_>>();
    assert_eq!(
        names,
        ["vhd=hidden.vhd", "vhd=base.vhd", "   vhd=aa.vhd", "   vhd=s1.vhd", "      vhd=s2.vhd"]
    );
}

/// What libvhdi, which knows nothing of us, reads of a chain, the image itself first; `None` if it is not installed.
fn by_libvhdi(images: &Images, chain: &[&str]) -> Option<Vec<u8>> {
    const SCRIPT: &str = "
import sys
try:
    import pyvhdi
except ImportError:
    sys.exit(77)
files = [pyvhdi.file() for name in sys.argv[1:]]
for file, name in zip(files, sys.argv[1:]):
    file.open(name)
for i in reversed(range(len(files) - 1)):
    files[i].set_parent(files[i + 1])
size = files[0].get_media_size()
while size > 0:
    data = files[0].read_buffer(min(size, 1 << 20))
    sys.stdout.buffer.write(data)
    size -= len(data)
";
    let mut command = Command::new("/usr/bin/python3");
    let output = command.args(["-c", SCRIPT]).args(chain).current_dir(images.folder.path()).output().ok()?;
    if output.status.code() == Some(77) {
        return None;
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(output.stdout)
}

#[test]
fn libvhdi_reads_our_chains_as_we_do() {
    let images = Images::unpack();
    if by_libvhdi(&images, &["empty.vhd"]).is_none() {
        eprintln!("skipped: there is no pyvhdi for /usr/bin/python3");
        return;
    }
    let compare = |chain: &[&str]| {
        assert!(by_libvhdi(&images, chain).unwrap() == content(&images, chain[0]), "{chain:?}");
    };
    // It takes eight sectors for present if the first of them is, so not every chain can be compared.
    compare(&["cchild.vhd", "cbase.vhd"]);
    // Chains that are ours altogether: filled from a raw parent, put on another, snapshot, coalesced, resized, copied.
    std::fs::write(images.folder.path().join("raw"), raw(16 << 20, 3)).unwrap();
    for args in [
        "snapshot -n one.vhd -p raw -m",
        "fill -n one.vhd",
        "create -n zero.vhd -s 64",
        "modify -n one.vhd -p zero.vhd",
        "snapshot -n two.vhd -p one.vhd",
        "resize -n two.vhd -s 2000 -j journal",
        "copy -n two.vhd -N copy.vhd",
    ] {
        assert_eq!(images.run(args), (Vec::new(), 0), "{args}");
    }
    compare(&["one.vhd", "zero.vhd"]);
    assert_eq!(images.run("coalesce -n one.vhd").1, 0);
    compare(&["zero.vhd"]);
    compare(&["one.vhd", "zero.vhd"]);
    assert_eq!(images.run("resize -n copy.vhd -s 2100 -j journal"), (Vec::new(), 0));
    let copy = by_libvhdi(&images, &["copy.vhd"]).unwrap();
    assert!(copy[..16 << 20] == raw(16 << 20, 3) && copy[16 << 20..].iter().all(|&byte| byte == 0));
}
