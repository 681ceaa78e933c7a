use std::path::{Path, PathBuf};

use blkif::Sector;
use nix::errno::Errno;
use tap_ctl::proto::{ImageType, OpenParams};

use super::*;
use crate::image::tests::{make, make_qcow2, params, read, run, snapshot, write};
use crate::image::{Disk, open};

const SECTORS: usize = 4096;

fn paths(dir: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    (dir.path().join("first"), dir.path().join("second"))
}

fn with_standby(first: (ImageType, &Path), second: (ImageType, &Path)) -> OpenParams {
    let secondary = ImageSpec { kind: second.0, path: second.1.to_str().unwrap().into() };
    OpenParams { secondary: Some(secondary), standby: true, ..params(first.0, first.1, false) }
}

fn standby(disk: &Disk) -> &Standby {
    disk.filters.as_ref().unwrap().standby.as_ref().unwrap()
}

fn is_serving(disk: &Disk) -> bool {
    let stats = disk.stats().standby.unwrap();
    assert_eq!(stats.serving, standby(disk).successor().is_some());
    stats.serving
}

/// A write for which the first image has no room.
async fn write_in_vain(disk: &Disk, io: &Io, sector: u64, bytes: &[u8]) {
    let mut buf = io.pool.data_soon(bytes.len()).await.unwrap();
    buf.bytes_mut().copy_from_slice(bytes);
    let first = &*disk.chain;
    let full = async |to: &Chain| {
        if std::ptr::eq(to, first) {
            return Err(Errno::ENOSPC);
        }
        to.write(Sector(sector), &buf, 0..buf.len()).await
    };
    standby(disk).change(first, bytes.len() as u64 / 512, full).await.unwrap();
}

#[test]
fn want_of_room_is_no_answer_nor_is_what_fails_after_it() {
    use State::{Draining, Serving, Waiting};
    for (state, result, verdict) in [
        (Waiting, Ok(()), Verdict::Answer),
        (Waiting, Err(Errno::EIO), Verdict::Answer),
        (Waiting, Err(Errno::ENOSPC), Verdict::TakeOver),
        (Waiting, Err(Errno::EDQUOT), Verdict::TakeOver),
        (Waiting, Err(Errno::EFBIG), Verdict::TakeOver),
        (Draining, Ok(()), Verdict::Answer),
        (Draining, Err(Errno::EIO), Verdict::TakeOver),
        (Serving, Ok(()), Verdict::Answer),
        (Serving, Err(Errno::EIO), Verdict::TakeOver),
    ] {
        assert_eq!(judge(state, result), verdict, "{state:?} {result:?}");
    }
}

#[test]
fn a_standby_must_stand_on_the_first_image_or_beside_it_and_be_large_enough() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let made = |name: &str| path(name);
    make(&made("other.vhd"), 2);
    make(&made("base.vhd"), 2);
    for (child, parent) in [
        ("first.vhd", "base.vhd"),
        ("child.vhd", "first.vhd"),
        ("beside.vhd", "base.vhd"),
        ("far.vhd", "other.vhd"),
    ] {
        snapshot(&made(child), &made(parent));
    }
    std::fs::write(made("raw"), vec![0; SECTORS * 512]).unwrap();
    make_qcow2(&made("short.qcow2"), 16, Some((Path::new("first.vhd"), Some("vpc"))), SECTORS as u64 - 8);
    let open_with =
        |kind, name: &str| with_standby((ImageType::Vhd, &path("first.vhd")), (kind, &path(name)));
    let cases = [
        (open_with(ImageType::Vhd, "child.vhd"), None),
        (open_with(ImageType::Vhd, "beside.vhd"), None),
        (open_with(ImageType::Vhd, "far.vhd"), Some(Errno::EINVAL)),
        (open_with(ImageType::Vhd, "other.vhd"), Some(Errno::EINVAL)),
        (open_with(ImageType::Aio, "raw"), Some(Errno::EINVAL)),
        (open_with(ImageType::Qcow2, "short.qcow2"), Some(Errno::EINVAL)),
        (open_with(ImageType::Vhd, "first.vhd"), Some(Errno::EBUSY)),
    ];
    run(move |io| async move {
        for (params, errno) in cases {
            let result = open(&params, &io);
            assert_eq!(result.as_ref().err().map(|error| error.errno()), errno, "{:?}", params.secondary);
        }
    });
}

#[test]
fn writes_go_to_the_first_until_one_finds_no_room_and_then_to_the_second_for_good() {
    for kind in [ImageType::Vhd, ImageType::Qcow2] {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = paths(&dir);
        let mut model = vec![0_u8; SECTORS * 512];
        make(&first, 2);
        match kind {
            ImageType::Vhd => snapshot(&second, &first),
            _ => make_qcow2(&second, 16, Some((Path::new("first"), Some("vpc"))), SECTORS as u64),
        }
        let asked = with_standby((ImageType::Vhd, &first), (kind, &second));
        run(move |io| async move {
            let mut random = format::testing::Random::new(3);
            let mut put = async |disk: &Disk, io: &Io, full: bool, byte: u8| {
                let sectors = 1 + random.below(64);
                let sector = random.below(SECTORS - sectors);
                let bytes = vec![byte; sectors * 512];
                match full {
                    true => write_in_vain(disk, io, sector as u64, &bytes).await,
                    false => write(disk, io, sector as u64, &bytes).await.unwrap(),
                }
                model[sector * 512..(sector + sectors) * 512].fill(byte);
            };
            let disk = open(&asked, &io).unwrap();
            for round in 1..=40 {
                put(&disk, &io, false, round).await;
            }
            disk.flush().await.unwrap();
            assert!(!is_serving(&disk));
            put(&disk, &io, true, 50).await;
            assert!(is_serving(&disk));
            for round in 51..=90 {
                put(&disk, &io, false, round).await;
            }
            assert!(standby(&disk).unsettled.get(), "a flush covers what the first image took last");
            disk.flush().await.unwrap();
            assert!(!standby(&disk).unsettled.get());
            disk.close().await.unwrap();
            drop(disk);
            // Opened again it goes on; and without the word standby it is an image like any other.
            let disk = open(&asked, &io).unwrap();
            assert!(is_serving(&disk));
            put(&disk, &io, false, 91).await;
            disk.close().await.unwrap();
            drop(disk);
            for asked in [asked, params(kind, &second, true)] {
                let disk = open(&asked, &io).unwrap();
                for sector in (0..SECTORS).step_by(64) {
                    let part = &model[sector * 512..(sector + 64) * 512];
                    assert!(read(&disk, &io, sector as u64, 64).await == part, "{kind:?} {sector}");
                }
            }
        });
    }
}

/// The second image copies what lies around a write. What is on its way to the first image then must not be missed.
#[test]
fn taking_over_waits_for_what_is_on_its_way_to_the_first_image() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = paths(&dir);
    std::fs::write(&first, vec![1; SECTORS * 512]).unwrap();
    make_qcow2(&second, 16, Some((Path::new("first"), Some("raw"))), SECTORS as u64);
    let asked = with_standby((ImageType::Aio, &first), (ImageType::Qcow2, &second));
    run(move |io| async move {
        let disk = Rc::new(open(&asked, &io).unwrap());
        let slow = {
            let (disk, io) = (disk.clone(), io.clone());
            async move {
                let first = &*disk.chain;
                let mut buf = io.pool.data_soon(512).await.unwrap();
                buf.bytes_mut().fill(2);
                let other = io.pool.data_soon(512).await.unwrap();
                let late = async |to: &Chain| {
                    // It is held up until the other has found no room.
                    while standby(&disk).state.get() == State::Waiting {
                        first.read(Sector(100), &other, 0..512).await.unwrap();
                    }
                    to.write(Sector(8), &buf, 0..512).await
                };
                standby(&disk).change(first, 1, late).await.unwrap();
                assert_eq!(standby(&disk).stats().written, 0, "the other has to wait for this one");
            }
        };
        let full = {
            let (disk, io) = (disk.clone(), io.clone());
            async move { write_in_vain(&disk, &io, 0, &[3; 512]).await }
        };
        both(slow, full).await;
        assert_eq!(read(&disk, &io, 8, 1).await, [2; 512]);
        assert_eq!(read(&disk, &io, 0, 2).await, [[3; 512], [1; 512]].concat());
        disk.close().await.unwrap();
        assert_eq!((std::fs::read(&first).unwrap()[0], std::fs::read(&first).unwrap()[8 * 512]), (1, 2));
    });
}
