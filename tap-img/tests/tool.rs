//! The tool as it is called, on files.

use std::path::Path;
use std::process::{Command, Output};

use format::testing::Random;

/// Runs the tool in a folder.
fn tool(folder: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tap-img")).current_dir(folder).args(args).output().unwrap()
}

/// The exit code; a failure is shown.
fn code(folder: &Path, args: &[&str]) -> i32 {
    let output = tool(folder, args);
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    output.status.code().unwrap()
}

fn stdout(folder: &Path, args: &[&str]) -> String {
    String::from_utf8(tool(folder, args).stdout).unwrap()
}

/// 20 MiB and one sector with some data: single bytes, long runs, and something in the last sector.
fn content(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; (20 << 20) + 512];
    let last = bytes.len() - 1;
    bytes[last] = 1;
    for _ in 0..30 {
        let start = random.below(bytes.len());
        let scale = 1 << random.below(21);
        let len = 1 + random.below(scale).min(bytes.len() - start - 1);
        random.fill(&mut bytes[start..start + len]);
    }
    bytes
}

#[test]
fn a_disk_survives_conversion_there_and_back() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for seed in 0..4 {
        let bytes = content(&mut Random::new(seed));
        std::fs::write(folder.join("a.raw"), &bytes).unwrap();
        assert_eq!(code(folder, &["convert", "-f", "raw", "-O", "vhd", "a.raw", "a.vhd"]), 0);
        assert_eq!(code(folder, &["check", "-f", "vhd", "a.vhd"]), 0);
        assert_eq!(code(folder, &["compare", "-s", "-f", "raw", "-F", "vhd", "a.raw", "a.vhd"]), 0);
        for format in ["qcow2", "qcow"] {
            assert_eq!(code(folder, &["convert", "-f", "vhd", "-O", format, "a.vhd", "a.other"]), 0);
            assert_eq!(code(folder, &["check", "-f", format, "a.other"]), 0);
            assert_eq!(code(folder, &["compare", "-s", "-f", "raw", "-F", format, "a.raw", "a.other"]), 0);
        }
        // Over a longer file, of which nothing must stay.
        std::fs::write(folder.join("b.raw"), vec![7; bytes.len() + 5000]).unwrap();
        assert_eq!(code(folder, &["convert", "-f", "vhd", "-O", "raw", "a.vhd", "b.raw"]), 0);
        assert!(std::fs::read(folder.join("b.raw")).unwrap() == bytes);
        // Into a larger one that exists: its end becomes zeros.
        std::fs::write(folder.join("c.raw"), vec![7; 22 << 20]).unwrap();
        assert_eq!(code(folder, &["convert", "-n", "-f", "vhd", "-O", "raw", "a.vhd", "c.raw"]), 0);
        let c = std::fs::read(folder.join("c.raw")).unwrap();
        assert!(c[..bytes.len()] == bytes && c[bytes.len()..].iter().all(|b| *b == 0));
    }
}

#[test]
fn zeros_take_no_room() {
    use std::os::unix::fs::MetadataExt;
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let mut bytes = vec![0; 64 << 20];
    bytes[33 << 20] = 1;
    std::fs::write(folder.join("a.raw"), &bytes).unwrap();
    for (format, name) in [("vhd", "a.vhd"), ("raw", "b.raw")] {
        assert_eq!(code(folder, &["convert", "-f", "raw", "-O", format, "a.raw", name]), 0);
        let used = folder.join(name).metadata().unwrap().blocks() * 512;
        assert!(used < 1 << 20, "{format}: {used} bytes");
    }
}

#[test]
fn comparing_finds_the_first_difference_and_minds_the_ends() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let bytes = content(&mut Random::new(9));
    let write = |name: &str, bytes: &[u8]| std::fs::write(folder.join(name), bytes).unwrap();
    write("a", &bytes);
    write("longer", &[&bytes[..], &[0; 3 << 20]].concat());
    let compare = |more: &[&str]| code(folder, &[&["compare", "-f", "raw"], more].concat());
    assert_eq!(compare(&["a", "longer"]), 0);
    assert_eq!(compare(&["-s", "a", "longer"]), 1);
    let mut other = bytes.clone();
    for at in [(19 << 20) + 77, (5 << 20) + 3] {
        other[at] ^= 1;
        write("b", &other);
        assert_eq!(
            stdout(folder, &["compare", "-f", "raw", "a", "b"]),
            format!("Content mismatch at offset {at}!\n")
        );
        assert_eq!(compare(&["b", "a"]), 1);
    }
    assert_eq!(compare(&["a", "missing"]), 2);
}

#[test]
fn the_map_says_where_data_are_and_in_which_image() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let file = std::fs::File::create(folder.join("a")).unwrap();
    file.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 2 << 20).unwrap();
    let text = stdout(folder, &["map", "--json", "-f", "raw", "a"]);
    let lines = text.lines().collect::<Vec<_>>();
    let zeros = r#"{"start":0,"length":2097152,"depth":0,"present":true,"zero":true,"data":false}"#;
    assert_eq!(lines[0], format!("[{zeros},"), "{text}");
    assert!(
        lines[1].starts_with(r#"{"start":2097152,"length":"#) && lines[1].contains(r#""offset":2097152"#)
    );
    assert_eq!(lines.len(), 3);
}

#[test]
fn m61_a_raw_disk_that_looks_like_an_image_stays_raw() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let made = ["create", "-f", "qcow2", "guest", "1M"];
    assert_eq!(code(folder, &made), 0);
    // What a guest wrote to its raw disk is what another reads from it, names of files and all.
    let bytes = std::fs::read(folder.join("guest")).unwrap();
    assert_eq!(code(folder, &["convert", "-f", "raw", "-O", "raw", "guest", "copy"]), 0);
    let copy = std::fs::read(folder.join("copy")).unwrap();
    assert!(copy[..bytes.len() / 512 * 512] == bytes[..bytes.len() / 512 * 512]);
}

#[test]
fn a_format_is_never_guessed_and_an_image_in_use_never_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("a"), vec![0; 1 << 20]).unwrap();
    let guess = tool(folder, &["info", "a"]);
    assert_eq!(guess.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&guess.stderr).contains("-f"));
    assert_eq!(code(folder, &["create", "-f", "vhd", "b.vhd", "8M"]), 0);
    let before = std::fs::read(folder.join("b.vhd")).unwrap();
    let used = std::fs::File::open(folder.join("b.vhd")).unwrap();
    let (l_type, l_whence) = (libc::F_RDLCK.try_into().unwrap(), libc::SEEK_SET.try_into().unwrap());
    let lock = libc::flock { l_type, l_whence, l_start: 0, l_len: 1, l_pid: 0 };
    nix::fcntl::fcntl(&used, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert_eq!(code(folder, &["convert", "-f", "raw", "-O", "vhd", "a", "b.vhd"]), 1);
    assert_eq!(code(folder, &["create", "-f", "vhd", "b.vhd", "16M"]), 1);
    assert!(std::fs::read(folder.join("b.vhd")).unwrap() == before);
}
