//! The qcow tools as they are called, on files.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use format::testing::Random;

const TOOLS: [(&str, &str); 3] = [
    ("qcow-create", env!("CARGO_BIN_EXE_qcow-create")),
    ("img2qcow", env!("CARGO_BIN_EXE_img2qcow")),
    ("qcow2raw", env!("CARGO_BIN_EXE_qcow2raw")),
];

/// Runs a tool in a folder, with something on its standard input.
fn tool(folder: &Path, line: &str, input: &str) -> Output {
    let (name, args) = line.split_once(' ').unwrap_or((line, ""));
    let program = TOOLS.iter().find(|tool| tool.0 == name).unwrap().1;
    let mut command = Command::new(program);
    command.current_dir(folder).args(args.split_whitespace());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    // A tool that asks nothing may have ended.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn succeeds(folder: &Path, line: &str) {
    let output = tool(folder, line, "");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// As Xen 4.2's tools print it, whatever is wrong with the command line.
#[test]
fn usage_is_xens() {
    let folder = tempfile::tempdir().unwrap();
    for (lines, usage) in [
        (
            [
                "qcow-create",
                "qcow-create -h",
                "qcow-create x y",
                "qcow-create -f raw 1 y",
                "qcow-create 1 a b c",
            ],
            "qcow-create [-h help] [-r reserve] <SIZE(MB)> <FILENAME> [<BACKING_FILENAME>]",
        ),
        (
            ["img2qcow", "img2qcow a", "img2qcow -h", "img2qcow a b c", "img2qcow -x a b"],
            "img2qcow <QCOW FILENAME> <SRC IMAGE>",
        ),
        (
            ["qcow2raw", "qcow2raw a", "qcow2raw -h", "qcow2raw a b c", "qcow2raw --x a b"],
            "qcow2raw <Dest File descriptor> <Qcow SRC IMAGE>",
        ),
    ] {
        for line in lines {
            let output = tool(folder.path(), line, "");
            assert_eq!(output.status.code(), Some(255), "{line}");
            let expected = format!("Qcow-utils: v1.0.0\nusage: {usage}\n");
            assert_eq!(String::from_utf8(output.stderr).unwrap(), expected, "{line}");
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing was made");
}

#[test]
fn images_are_made_as_xen_makes_them() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("base.raw"), vec![1; 3 << 20]).unwrap();
    for (line, len, size, flags) in [
        ("qcow-create 16 a", 8192, 16 << 20, 3),
        ("qcow-create -r 16 b", 16_789_504, 16 << 20, 2),
        ("qcow-create 16 c base.raw", 8192, 3 << 20, 3),
    ] {
        succeeds(folder, line);
        let bytes =
            std::fs::read(folder.join(line.split(' ').find(|word| word.len() == 1).unwrap())).unwrap();
        assert_eq!(bytes.len(), len, "{line}");
        assert_eq!(bytes[24..32], u64::to_be_bytes(size), "{line}");
        assert_eq!((&bytes[48..52], bytes[63]), (&b"XEN\xfb"[..], flags), "{line}");
    }
    let child = std::fs::read(folder.join("c")).unwrap();
    let base = folder.join("base.raw").canonicalize().unwrap();
    assert!(child[64..].starts_with(base.to_str().unwrap().as_bytes()));
    succeeds(folder, "qcow-create -f qcow2 16 d base.raw");
    assert_eq!(std::fs::read(folder.join("d")).unwrap()[..7], *b"QFI\xfb\0\0\0");
    assert_eq!(
        tool(folder, "qcow-create 16 e a", "").status.code(),
        Some(255),
        "an image is no raw backing file"
    );
    assert_eq!(tool(folder, "qcow-create 16 e missing", "").status.code(), Some(255));
    assert!(!folder.join("e").exists());
}

#[test]
fn a_disk_survives_the_way_there_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut bytes = vec![0; (5 << 20) + 512];
    let mut random = Random::new(4);
    for _ in 0..20 {
        let at = random.below(bytes.len() - 70_000);
        let len = random.below(70_000);
        random.fill(&mut bytes[at..at + len]);
    }
    // A tail that is no sector is dropped.
    std::fs::write(folder.join("a.raw"), [&bytes[..], &[9; 100]].concat()).unwrap();
    succeeds(folder, "img2qcow a.qcow a.raw");
    succeeds(folder, "qcow2raw b.raw a.qcow");
    assert!(std::fs::read(folder.join("b.raw")).unwrap() == bytes);
    // With what is below.
    std::fs::write(folder.join("base.raw"), &bytes).unwrap();
    succeeds(folder, "qcow-create 1 child base.raw");
    succeeds(folder, "qcow2raw c.raw child");
    assert!(std::fs::read(folder.join("c.raw")).unwrap() == bytes);
}

#[test]
fn what_is_there_is_written_over_only_after_a_yes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("src"), vec![3; 1 << 20]).unwrap();
    succeeds(folder, "img2qcow src.qcow src");
    for line in ["qcow-create 1 old", "img2qcow old src", "qcow2raw old src.qcow"] {
        std::fs::write(folder.join("old"), "precious").unwrap();
        for answer in ["n\n", "\n", "", "maybe\n"] {
            let output = tool(folder, line, answer);
            assert!(output.status.success());
            assert!(String::from_utf8(output.stdout).unwrap().contains("y or n"), "{line}");
            assert_eq!(std::fs::read(folder.join("old")).unwrap(), b"precious", "{line} {answer:?}");
        }
        assert!(tool(folder, line, "y\n").status.success());
        assert_ne!(std::fs::read(folder.join("old")).unwrap(), b"precious", "{line}");
    }
    assert!(std::fs::read(folder.join("old")).unwrap() == vec![3; 1 << 20]);
    // What cannot be done destroys nothing, and is not asked for.
    for line in ["img2qcow old missing", "qcow2raw old missing", "qcow2raw old src"] {
        let output = tool(folder, line, "y\n");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(255), 0), "{line}");
        assert!(std::fs::read(folder.join("old")).unwrap() == vec![3; 1 << 20], "{line}");
    }
}
