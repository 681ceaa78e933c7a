//! QEMU's tools read what we write, and we read what they write. Skipped, with a word, where they are missing; but not where
//! `CI` is set.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use format::blocking::{Below, Blocking, nothing, with_source};
use format::testing::{Random, seeds};
use qcow::v2::{self, Backing, Error, NewImage, OpenOptions, Qcow2};

const SECTORS: u64 = 9001;

/// Runs a tool; false if there is none.
fn run(tool: &str, arguments: &[&str]) -> bool {
    match Command::new(tool).args(arguments).output() {
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{tool} {arguments:?}: {words}{said}");
            true
        }
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "{tool}: {error}");
            eprintln!("skipped: {tool}: {error}");
            false
        }
    }
}

struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn put(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    /// What QEMU reads, from a snapshot if one is named.
    fn qemu_reads(&self, image: &str, snapshot: Option<&str>) -> Vec<u8> {
        let back = self.path("back");
        let snapshot = snapshot.map(|name| format!("snapshot.name={name}"));
        let of: Vec<&str> = snapshot.iter().flat_map(|name| ["-l", name.as_str()]).collect();
        run("qemu-img", &[&["convert", "-f", "qcow2", "-O", "raw"], &of[..], &[image, &back]].concat());
        std::fs::read(back).unwrap()
    }
}

/// Data, zeros, and what can be compressed, mixed.
fn contents(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SECTORS).unwrap() * 512];
    for chunk in bytes.chunks_mut(70_000) {
        match random.below(3) {
            0 => random.fill(chunk),
            1 => chunk.fill(7),
            _ => {}
        }
    }
    bytes
}

type Image = Blocking<Qcow2, File>;

fn try_open(path: impl AsRef<Path>, writable: bool, key: Option<&[u8]>) -> Result<Image, Error> {
    let file = File::options().read(true).write(writable).open(path).unwrap();
    let options = OpenOptions { writable, key: key.map(<[u8]>::to_vec), ..OpenOptions::default() };
    let core = with_source(&file, |source| v2::open(source, &options)).unwrap()?;
    let report = with_source(&file, v2::check).unwrap().unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.problems);
    Ok(Blocking::new(core, file))
}

fn open(path: impl AsRef<Path>, writable: bool) -> Image {
    try_open(path, writable, None).unwrap()
}

fn read_all(image: &mut Image, below: &mut Below<'_>) -> Vec<u8> {
    let mut bytes = vec![0x5a; usize::try_from(SECTORS).unwrap() * 512];
    image.read(0, &mut bytes, below).unwrap();
    bytes
}

/// Writes and discards at random places, in the image and the model.
fn scribble(image: &mut Image, model: &mut [u8], below: &mut Below<'_>, random: &mut Random) {
    for _ in 0..40 {
        let sector = random.below(usize::try_from(SECTORS).unwrap() - 600);
        let most = random.pick(&[600, 40, 40]);
        let count = 1 + random.below(most);
        if random.once_in(6) {
            image.discard(sector as u64, count as u64).unwrap();
            image.read(sector as u64, &mut model[sector * 512..][..count * 512], below).unwrap();
            continue;
        }
        let mut bytes = vec![0; 512 * count];
        random.fill(&mut bytes);
        image.write(sector as u64, &bytes, below).unwrap();
        model[sector * 512..][..bytes.len()].copy_from_slice(&bytes);
    }
}

/// What `qemu-img convert` is asked for, and whether we write such images.
const OPTIONS: [(&str, bool, bool); 15] = [
    ("compat=1.1", false, true),
    ("compat=1.1", true, true),
    ("compat=0.10", false, true),
    ("compat=0.10", true, true),
    ("cluster_size=512", false, true),
    ("cluster_size=512,refcount_bits=1", false, true),
    ("cluster_size=4k,refcount_bits=2", false, true),
    ("cluster_size=4k,refcount_bits=64", true, true),
    ("cluster_size=2M,refcount_bits=8", false, true),
    ("lazy_refcounts=on", false, true),
    ("preallocation=metadata", false, true),
    ("preallocation=falloc", false, true),
    ("compression_type=zstd", true, true),
    ("extended_l2=on", false, false),
    ("extended_l2=on,cluster_size=16k,compression_type=zstd", true, false),
];

#[test]
fn images_of_qemu_are_read_and_written() {
    let folder = Folder::new();
    let image = folder.path("image");
    for (options, compress, writable) in OPTIONS {
        let mut random = Random::new(options.len() as u64);
        let mut model = contents(&mut random);
        let raw = folder.put("raw", &model);
        let compress: &[&str] = if compress { &["-c"] } else { &[] };
        let all =
            [&["convert", "-f", "raw", "-O", "qcow2", "-o", options], compress, &[&raw, &image]].concat();
        if !run("qemu-img", &all) {
            return;
        }
        assert!(read_all(&mut open(&image, false), &mut nothing) == model, "{options}");
        if !writable {
            assert!(matches!(try_open(&image, true, None), Err(Error::NotSupported { .. })), "{options}");
            continue;
        }
        for _ in 0..2 {
            let mut ours = open(&image, true);
            scribble(&mut ours, &mut model, &mut nothing, &mut random);
            assert!(read_all(&mut ours, &mut nothing) == model, "{options}");
            ours.close().unwrap();
            run("qemu-img", &["check", "-f", "qcow2", &image]);
            assert!(folder.qemu_reads(&image, None) == model, "{options}");
        }
    }
}

#[test]
fn images_of_ours_are_good_for_qemu() {
    let folder = Folder::new();
    let image = folder.path("image");
    seeds(12, |random| {
        let version = random.pick(&[2, 3]);
        let new = NewImage {
            version,
            cluster_bits: random.pick(&[9, 10, 12, 16, 21]),
            refcount_bits: if version == 2 { 16 } else { random.pick(&[1, 2, 4, 8, 16, 32, 64]) },
            preallocate: random.once_in(4),
            ..NewImage::new(SECTORS)
        };
        let made = new.build().unwrap();
        let file = File::create(&image).unwrap();
        file.set_len(made.len).unwrap();
        for write in made.writes {
            std::os::unix::fs::FileExt::write_all_at(&file, &write.bytes, write.offset).unwrap();
        }
        if !run("qemu-img", &["check", "-f", "qcow2", &image]) {
            return;
        }
        let mut model = vec![0; usize::try_from(SECTORS).unwrap() * 512];
        let mut ours = open(&image, true);
        scribble(&mut ours, &mut model, &mut nothing, random);
        ours.close().unwrap();
        run("qemu-img", &["check", "-f", "qcow2", &image]);
        assert!(folder.qemu_reads(&image, None) == model, "{new:?}");
        // Both grow it, and go on.
        let mut ours = open(&image, true);
        ours.resize(SECTORS * 3).unwrap();
        ours.close().unwrap();
        run("qemu-img", &["check", "-f", "qcow2", &image]);
        run("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 9 {} 8M", SECTORS * 512), &image]);
        let mut buf = vec![0; 8 << 20];
        open(&image, false).read(SECTORS, &mut buf, &mut nothing).unwrap();
        assert!(buf.iter().all(|byte| *byte == 9));
    });
}

#[test]
fn internal_snapshots_keep_what_they_have() {
    let folder = Folder::new();
    for options in ["cluster_size=64k", "cluster_size=4k,refcount_bits=32", "compat=0.10,cluster_size=1k"] {
        let image = folder.path("image");
        let mut random = Random::new(5);
        let mut model = contents(&mut random);
        let raw = folder.put("raw", &model);
        if !run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-c", "-o", options, &raw, &image]) {
            return;
        }
        let mut past = Vec::new();
        for name in ["first", "second", "third"] {
            let mut ours = open(&image, true);
            scribble(&mut ours, &mut model, &mut nothing, &mut random);
            ours.close().unwrap();
            run("qemu-img", &["snapshot", "-c", name, &image]);
            past.push((name, model.clone()));
        }
        let mut ours = open(&image, true);
        assert_eq!(ours.core().snapshots().len(), 3);
        scribble(&mut ours, &mut model, &mut nothing, &mut random);
        assert!(read_all(&mut ours, &mut nothing) == model);
        ours.close().unwrap();
        run("qemu-img", &["check", "-f", "qcow2", &image]);
        assert!(folder.qemu_reads(&image, None) == model, "{options}");
        for (name, then) in &past {
            assert!(folder.qemu_reads(&image, Some(name)) == *then, "{options} {name}");
        }
        // Nothing is left of them when they are deleted.
        for (name, _) in past {
            run("qemu-img", &["snapshot", "-d", name, &image]);
        }
        run("qemu-img", &["check", "-f", "qcow2", &image]);
        assert!(read_all(&mut open(&image, true), &mut nothing) == model);
    }
}

#[test]
fn a_backing_file_shows_through_and_is_not_written() {
    let folder = Folder::new();
    for options in ["cluster_size=64k", "compat=0.10", "cluster_size=4k,lazy_refcounts=on"] {
        let mut random = Random::new(11);
        let base = contents(&mut random);
        let short = base.len() - 70_144;
        let raw = folder.put("base", &base[..short]);
        let image = folder.path("image");
        let size = (SECTORS * 512).to_string();
        let arguments = ["create", "-f", "qcow2", "-F", "raw", "-b", "base", "-o", options, &image, &size];
        if !run("qemu-img", &arguments) {
            return;
        }
        let mut model = base.clone();
        model[short..].fill(0);
        let mut below = |sector: u64, buf: &mut [u8]| {
            let from = usize::try_from(sector).unwrap() * 512;
            let there = base[..short].get(from..).unwrap_or_default();
            let count = there.len().min(buf.len());
            buf[..count].copy_from_slice(&there[..count]);
            buf[count..].fill(0);
            Ok(())
        };
        let mut ours = open(&image, true);
        let backing = Backing { name: b"base".to_vec(), format: Some("raw".into()) };
        assert_eq!(ours.core().backing(), Some(&backing));
        scribble(&mut ours, &mut model, &mut below, &mut random);
        assert!(read_all(&mut ours, &mut below) == model, "{options}");
        ours.close().unwrap();
        run("qemu-img", &["check", "-f", "qcow2", &image]);
        assert!(folder.qemu_reads(&image, None) == model, "{options}");
        assert!(std::fs::read(raw).unwrap() == base[..short]);
    }
}

#[test]
fn an_encrypted_image_is_read_with_its_key() {
    let folder = Folder::new();
    let mut random = Random::new(3);
    let model = contents(&mut random);
    let (raw, image) = (folder.put("raw", &model), folder.path("image"));
    let size = (SECTORS * 512).to_string();
    let secret = ["--object", "secret,id=s,data=a secret"];
    let options = "encrypt.format=aes,encrypt.key-secret=s";
    let create = [&["create"], &secret[..], &["-f", "qcow2", "-o", options, &image, &size]].concat();
    if !run("qemu-img", &create) {
        return;
    }
    let target = format!("driver=qcow2,file.filename={image},encrypt.key-secret=s");
    let convert =
        [&["convert"], &secret[..], &["-n", "--target-image-opts", "-f", "raw", &raw, &target]].concat();
    run("qemu-img", &convert);
    assert!(matches!(try_open(&image, false, None), Err(Error::NeedsKey)));
    assert!(matches!(try_open(&image, true, Some(b"a secret")), Err(Error::NotSupported { .. })));
    let mut ours = try_open(&image, false, Some(b"a secret")).unwrap();
    assert!(read_all(&mut ours, &mut nothing) == model);
}

#[test]
fn a_dirty_image_is_repaired_before_it_is_written() {
    let folder = Folder::new();
    let image: PathBuf = folder.path("image").into();
    let size = (SECTORS * 512).to_string();
    let name = image.to_str().unwrap();
    if !run("qemu-img", &["create", "-f", "qcow2", "-o", "lazy_refcounts=on,cluster_size=4k", name, &size]) {
        return;
    }
    // QEMU dies with its reference counts not written.
    let commands = ["-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "flush", "-c", "abort", name];
    assert!(!Command::new("qemu-io").args(commands).output().unwrap().status.success());
    let mut file = File::options().read(true).write(true).open(&image).unwrap();
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let refused = with_source(&file, |source| v2::open(source, &options)).unwrap();
    assert!(matches!(refused, Err(Error::NeedsRepair)), "{refused:?}");
    let report = v2::repair(&mut file).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{:?}", report.problems);
    let mut ours = open(&image, true);
    let mut buf = vec![0; 1 << 20];
    ours.read(0, &mut buf, &mut nothing).unwrap();
    assert!(buf.iter().all(|byte| *byte == 5));
    run("qemu-img", &["check", "-f", "qcow2", name]);
}
