//! Chains of images of several formats, through the disks that tapdisk serves.

use std::path::{Path, PathBuf};

use blkif::Sector;
use format::MetaWrite;
use format::testing::{Random, SECTOR, seeds};
use qcow::{v1, v2};
use tap_ctl::proto::{ImageSpec, ImageType, OpenParams};
use tapdisk::image::{Disk, open};
use tapdisk::io::Io;
use tapdisk::reactor::EngineChoice;
use vhd::{DiskType, NewImage, NewParent, Uuid};

const SECTORS: u64 = 4096;

fn put(path: &Path, len: u64, writes: Vec<MetaWrite>) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(len).unwrap();
    for MetaWrite { offset, bytes } in writes {
        std::os::unix::fs::FileExt::write_all_at(&file, &bytes, offset).unwrap();
    }
}

fn vhd(path: &Path, sectors: u64, number: u8, parent: Option<(&str, Uuid)>) {
    let parent = parent.map(|(name, uuid)| NewParent {
        uuid,
        timestamp: 1,
        name: name.into(),
        path: format!("./{name}"),
    });
    let image = NewImage {
        kind: if parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic },
        size: sectors * 512,
        max_size: 0,
        block_size: 1 << 16,
        uuid: Uuid([number; 16]),
        timestamp: 1,
        parent,
        key: None,
    };
    let bytes = image.build(None).unwrap();
    put(path, bytes.len, bytes.writes);
}

/// A new image over another one, in any format that can have that as its parent.
fn child(folder: &Path, depth: u8, parent: ImageType, random: &mut Random) -> ImageType {
    let below = format!("{}", depth - 1);
    let path = folder.join(depth.to_string());
    let mut kinds = vec![ImageType::Qcow2];
    match parent {
        ImageType::Vhd => kinds.push(ImageType::Vhd),
        // What an image of version 1 or a VHD cannot say is the format of its parent: another VHD, or raw.
        ImageType::Aio => kinds.extend([ImageType::Vhd, ImageType::Qcow]),
        _ => {}
    }
    let kind = random.pick(&kinds);
    match kind {
        ImageType::Vhd => {
            let uuid = if parent == ImageType::Vhd { Uuid([depth - 1; 16]) } else { Uuid([0; 16]) };
            vhd(&path, SECTORS, depth, Some((&below, uuid)));
        }
        ImageType::Qcow => {
            let backing = Some(v1::Backing { name: below.into_bytes(), mtime: 0 });
            let image =
                v1::NewImage { sectors: SECTORS, flavour: v1::Flavour::Qemu, backing, encrypted: false };
            let bytes = image.build().unwrap();
            put(&path, bytes.len, bytes.writes);
        }
        _ => {
            let format = match parent {
                ImageType::Aio => "raw",
                ImageType::Vhd => "vpc",
                other => other.name(),
            };
            let backing = Some(v2::Backing { name: below.into(), format: Some(format.into()) });
            let bytes = v2::NewImage { backing, ..v2::NewImage::new(SECTORS) }.build().unwrap();
            put(&path, bytes.len, bytes.writes);
        }
    }
    kind
}

fn opened(folder: &Path, depth: u8, kind: ImageType, io: &Io) -> Disk {
    let path = folder.join(depth.to_string()).to_str().unwrap().to_owned();
    open(&OpenParams::new(ImageSpec { kind, path }), io).unwrap()
}

/// Some writes, each read back with what is around it.
async fn use_disk(disk: &Disk, io: &Io, model: &mut [u8], random: &mut Random) {
    for _ in 0..12 {
        let first = random.up_to(SECTORS);
        let count = 1 + random.up_to((SECTORS - first).min(200));
        let at = usize::try_from(first).unwrap() * SECTOR;
        let len = usize::try_from(count).unwrap() * SECTOR;
        let mut buf = io.pool.data(len).unwrap();
        random.fill(buf.bytes_mut());
        disk.write(Sector(first), &buf).await.unwrap();
        model[at..at + len].copy_from_slice(buf.bytes());
    }
    verify(disk, io, model).await;
}

async fn verify(disk: &Disk, io: &Io, model: &[u8]) {
    for (chunk, sector) in model.chunks(256 * SECTOR).zip((0..).step_by(256)) {
        let buf = io.pool.data(chunk.len()).unwrap();
        disk.read(Sector(sector), &buf).await.unwrap();
        assert!(buf.bytes() == chunk, "at sector {sector}");
    }
}

#[test]
fn a_chain_of_mixed_formats_behaves_like_a_vector_of_bytes() {
    seeds(12, |random| {
        let folder = tempfile::tempdir().unwrap();
        let path: PathBuf = folder.path().to_owned();
        let mut random = random.clone();
        let work = move |io: Io| async move {
            let mut model = vec![0; usize::try_from(SECTORS).unwrap() * SECTOR];
            random.fill(&mut model[..1 << 18]);
            std::fs::write(path.join("1"), &model).unwrap();
            let mut kind = ImageType::Aio;
            for depth in 2..7 {
                kind = child(&path, depth, kind, &mut random);
                let disk = opened(&path, depth, kind, &io);
                verify(&disk, &io, &model).await;
                use_disk(&disk, &io, &mut model, &mut random).await;
                disk.close().await.unwrap();
                drop(disk);
                verify(&opened(&path, depth, kind, &io), &io, &model).await;
            }
        };
        tapdisk::alone::run(EngineChoice::Auto, 4 << 20, work).unwrap();
    });
}

#[test]
fn m23_a_parent_larger_than_its_child_shows_what_fits() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().to_owned();
    vhd(&path.join("1"), SECTORS, 1, None);
    vhd(&path.join("2"), SECTORS / 2, 2, Some(("1", Uuid([1; 16]))));
    let work = move |io: Io| async move {
        let mut model = vec![0; usize::try_from(SECTORS).unwrap() * SECTOR];
        let parent = opened(&path, 1, ImageType::Vhd, &io);
        use_disk(&parent, &io, &mut model, &mut Random::new(1)).await;
        parent.close().await.unwrap();
        drop(parent);
        let child = opened(&path, 2, ImageType::Vhd, &io);
        assert_eq!(child.sectors(), SECTORS / 2);
        verify(&child, &io, &model[..model.len() / 2]).await;
        let buf = io.pool.data(SECTOR).unwrap();
        assert!(child.read(Sector(SECTORS / 2), &buf).await.is_err(), "behind its end");
    };
    tapdisk::alone::run(EngineChoice::Auto, 4 << 20, work).unwrap();
}
