//! QEMU's tools read what we write, and we read what they write. Skipped, with a word, where they are missing.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use format::blocking::{Blocking, nothing, with_source};
use format::testing::{Random, seeds};
use qcow::v1::{self, Backing, Flavour, NewImage, OpenOptions, check};

use crate::create::made;
use crate::support::KEY;

const SECTORS: u64 = 5000;

fn qemu_img(arguments: &[&str]) -> bool {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            // Version 10.0 says nothing and exits with 1 after it has made a good compressed image.
            let good = output.status.success() || (arguments.contains(&"-c") && words.is_empty());
            assert!(good, "qemu-img {arguments:?}: {words}");
            true
        }
        Err(error) => {
            eprintln!("skipped: qemu-img: {error}");
            false
        }
    }
}

/// Data, zeros, and what can be compressed, mixed.
fn contents(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SECTORS).unwrap() * 512];
    for chunk in bytes.chunks_mut(8192) {
        match random.below(3) {
            0 => random.fill(chunk),
            1 => chunk.fill(7),
            _ => {}
        }
    }
    bytes
}

fn open(path: &Path, writable: bool, key: Option<&[u8]>) -> Blocking<v1::Qcow, File> {
    let file = File::options().read(true).write(writable).open(path).unwrap();
    let options = OpenOptions { writable, key, ..OpenOptions::default() };
    let core = with_source(&file, |source| v1::open(source, &options)).unwrap().unwrap();
    assert_eq!(with_source(&file, check::check).unwrap().unwrap().count, 0);
    Blocking::new(core, file)
}

fn read_all(image: &mut Blocking<v1::Qcow, File>) -> Vec<u8> {
    let mut bytes = vec![0x5a; usize::try_from(SECTORS).unwrap() * 512];
    image.read(0, &mut bytes, &mut nothing).unwrap();
    bytes
}

/// Writes at random places, also into compressed clusters, to the image and the model.
fn scribble(image: &mut Blocking<v1::Qcow, File>, model: &mut [u8], random: &mut Random) {
    for _ in 0..60 {
        let sector = random.below(usize::try_from(SECTORS).unwrap() - 40);
        let mut bytes = vec![0; 512 * (1 + random.below(40))];
        random.fill(&mut bytes);
        image.write(sector as u64, &bytes, &mut nothing).unwrap();
        model[sector * 512..][..bytes.len()].copy_from_slice(&bytes);
    }
}

#[test]
fn images_of_qemu_are_read_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (raw, image, back) = (path("raw"), path("image"), path("back"));
    seeds(3, |random| {
        for compress in [&[][..], &["-c"]] {
            let mut model = contents(random);
            std::fs::write(&raw, &model).unwrap();
            let arguments = [&["convert", "-f", "raw", "-O", "qcow"], compress, &[&raw, &image]].concat();
            if !qemu_img(&arguments) {
                return;
            }
            let mut ours = open(Path::new(&image), true, None);
            assert!(read_all(&mut ours) == model);
            scribble(&mut ours, &mut model, random);
            assert!(read_all(&mut ours) == model);
            ours.close().unwrap();
            qemu_img(&["convert", "-f", "qcow", "-O", "raw", &image, &back]);
            assert!(std::fs::read(&back).unwrap() == model);
        }
    });
}

#[test]
fn new_images_are_read_by_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (image, back) = (path("image"), path("back"));
    seeds(3, |random| {
        for flavour in [Flavour::Qemu, Flavour::Xen { reserve: false }, Flavour::Xen { reserve: true }] {
            let new = NewImage { sectors: SECTORS, flavour, backing: None, encrypted: false };
            std::fs::write(&image, made(&new).bytes).unwrap();
            let mut model = vec![0; usize::try_from(SECTORS).unwrap() * 512];
            let mut ours = open(Path::new(&image), true, None);
            scribble(&mut ours, &mut model, random);
            ours.close().unwrap();
            if !qemu_img(&["convert", "-f", "qcow", "-O", "raw", &image, &back]) {
                return;
            }
            assert!(std::fs::read(&back).unwrap() == model, "{flavour:?}");
        }
    });
}

#[test]
fn a_child_over_a_raw_file_is_read_by_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (raw, image, back) = (path("raw"), path("image"), path("back"));
    let mut random = Random::new(5);
    let mut model = contents(&mut random);
    std::fs::write(&raw, &model).unwrap();
    let below = model.clone();
    let backing = Some(Backing { name: raw.clone().into_bytes(), mtime: 0 });
    let new = NewImage { sectors: SECTORS, flavour: Flavour::Qemu, backing, encrypted: false };
    std::fs::write(&image, made(&new).bytes).unwrap();
    let mut ours = open(Path::new(&image), true, None);
    let mut read_below = |sector: u64, buf: &mut [u8]| {
        buf.copy_from_slice(&below[usize::try_from(sector).unwrap() * 512..][..buf.len()]);
        Ok(())
    };
    for sector in [0, 17, 999, 4999] {
        let mut bytes = vec![0; 512];
        random.fill(&mut bytes);
        ours.write(sector as u64, &bytes, &mut read_below).unwrap();
        model[sector * 512..][..512].copy_from_slice(&bytes);
    }
    ours.close().unwrap();
    if qemu_img(&["convert", "-f", "qcow", "-O", "raw", &image, &back]) {
        assert!(std::fs::read(&back).unwrap() == model);
    }
}

#[test]
fn encrypted_images_go_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (raw, image, back) = (path("raw"), path("image"), path("back"));
    let mut random = Random::new(11);
    let mut model = contents(&mut random);
    std::fs::write(&raw, &model).unwrap();
    let secret = format!("secret,id=key,data={}", std::str::from_utf8(KEY).unwrap());
    let new =
        ["create", "-f", "qcow", "--object", &secret, "-o", "encrypt.format=aes,encrypt.key-secret=key"];
    let size = (SECTORS * 512).to_string();
    if !qemu_img(&[&new[..], &[&image, &size]].concat()) {
        return;
    }
    let options = format!("driver=qcow,encrypt.key-secret=key,file.filename={image}");
    qemu_img(&["convert", "-n", "--object", &secret, "-f", "raw", &raw, "--target-image-opts", &options]);
    let mut ours = open(Path::new(&image), true, Some(KEY));
    assert!(read_all(&mut ours) == model);
    scribble(&mut ours, &mut model, &mut random);
    assert!(read_all(&mut ours) == model);
    ours.close().unwrap();
    qemu_img(&["convert", "--object", &secret, "--image-opts", &options, "-O", "raw", &back]);
    assert!(std::fs::read(&back).unwrap() == model);
}
