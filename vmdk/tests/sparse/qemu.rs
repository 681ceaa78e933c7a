//! QEMU's tools read what we write, and we read what they write. Skipped, with a word, where they are missing.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use format::blocking::{Blocking, nothing, with_source};
use format::testing::{Random, seeds};
use vmdk::{OpenOptions, Sparse, check};

use crate::support::{contents, made};

const SECTORS: u64 = 5000;

fn qemu_img(arguments: &[&str]) -> bool {
    match Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let words = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "qemu-img {arguments:?}: {words}");
            true
        }
        Err(error) => {
            eprintln!("skipped: qemu-img: {error}");
            false
        }
    }
}

/// Data, zeros, and what can be compressed, mixed.
fn data(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(SECTORS).unwrap() * 512];
    for chunk in bytes.chunks_mut(100_000) {
        match random.below(3) {
            0 => random.fill(chunk),
            1 => chunk.fill(7),
            _ => {}
        }
    }
    bytes
}

fn open(path: &Path, writable: bool) -> Blocking<Sparse, File> {
    let file = File::options().read(true).write(writable).open(path).unwrap();
    let options = OpenOptions { writable, ..OpenOptions::default() };
    let core = with_source(&file, |source| vmdk::open(source, &options)).unwrap().unwrap();
    assert_eq!(with_source(&file, check::check).unwrap().unwrap().count, 0);
    Blocking::new(core, file)
}

fn scribble(image: &mut Blocking<Sparse, File>, model: &mut [u8], random: &mut Random) {
    for _ in 0..40 {
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
    let (raw, image, back) = (path("raw"), path("image.vmdk"), path("back"));
    seeds(3, |random| {
        for options in ["subformat=monolithicSparse", "subformat=monolithicSparse,zeroed_grain=on"] {
            let mut model = data(random);
            std::fs::write(&raw, &model).unwrap();
            if !qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", options, &raw, &image]) {
                return;
            }
            let mut ours = open(Path::new(&image), true);
            assert!(contents(&mut ours) == model);
            scribble(&mut ours, &mut model, random);
            assert!(contents(&mut ours) == model);
            ours.close().unwrap();
            qemu_img(&["check", "-f", "vmdk", &image]);
            qemu_img(&["convert", "-f", "vmdk", "-O", "raw", &image, &back]);
            assert!(std::fs::read(&back).unwrap() == model);
        }
    });
}

#[test]
fn streams_of_qemu_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (raw, image) = (path("raw"), path("image.vmdk"));
    seeds(3, |random| {
        let model = data(random);
        std::fs::write(&raw, &model).unwrap();
        let options = "subformat=streamOptimized";
        if !qemu_img(&["convert", "-f", "raw", "-O", "vmdk", "-o", options, &raw, &image]) {
            return;
        }
        assert!(contents(&mut open(Path::new(&image), false)) == model);
    });
}

#[test]
fn new_images_are_read_by_qemu() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (image, back) = (path("x.vmdk"), path("back"));
    seeds(3, |random| {
        std::fs::write(&image, made(SECTORS).bytes).unwrap();
        let mut model = vec![0; usize::try_from(SECTORS).unwrap() * 512];
        let mut ours = open(Path::new(&image), true);
        scribble(&mut ours, &mut model, random);
        ours.close().unwrap();
        if !qemu_img(&["convert", "-f", "vmdk", "-O", "raw", &image, &back]) {
            return;
        }
        assert!(std::fs::read(&back).unwrap() == model);
    });
}
