use std::path::{Path, PathBuf};
use std::rc::Rc;

use tap_ctl::proto::ImageType;

use super::*;
use crate::image::tests::{join, make, params, read, run, write};
use crate::image::{Disk, open};

const SECTORS: usize = 4096;

fn raw(path: &Path, byte: u8) {
    std::fs::write(path, vec![byte; SECTORS * 512]).unwrap();
}

/// A disk of the first image with the second as its mirror.
fn mirrored(first: &Path, kind: ImageType, second: &Path, io: &Io) -> Rc<Disk> {
    let secondary = ImageSpec { kind, path: second.to_str().unwrap().into() };
    let params = OpenParams { secondary: Some(secondary), ..params(ImageType::Aio, first, false) };
    Rc::new(open(&params, io).unwrap())
}

fn mirror(disk: &Disk) -> &Mirror {
    disk.filters.as_ref().unwrap().mirror.as_ref().unwrap()
}

/// Has the copying go on beside a task, which ends it by closing the disk.
async fn beside(disk: &Rc<Disk>, task: impl Future<Output = ()>) {
    both(disk.background().unwrap(), task).await;
}

async fn completed(disk: &Disk, io: &Io) {
    while !mirror(disk).is_complete() && mirror(disk).is_active() {
        // A turn of the reactor.
        read(disk, io, 0, 1).await;
    }
}

fn paths(dir: &tempfile::TempDir) -> (PathBuf, PathBuf) {
    (dir.path().join("first"), dir.path().join("second"))
}

#[test]
fn every_part_is_copied_once_and_failed_ones_again() {
    let total = 3 * PART + 512;
    let mut progress = Progress::default();
    let mut parts = Vec::new();
    while let Some(part) = progress.next(total) {
        assert_eq!(progress.left(total), total - part.start, "what is being copied is not copied yet");
        progress.done(&part);
        parts.push(part);
    }
    assert_eq!(parts, [0..PART, PART..2 * PART, 2 * PART..3 * PART, 3 * PART..total]);
    progress.again.push(512..PART + 1024);
    assert_eq!(progress.left(total), PART + 512);
    for part in [512..PART + 512, PART + 512..PART + 1024] {
        assert_eq!(progress.next(total), Some(part.clone()));
        progress.done(&part);
    }
    assert_eq!((progress.next(total), progress.left(total)), (None, 0));
}

#[test]
fn while_copying_writes_discards_and_flushes_go_to_both_and_both_are_equal_in_the_end() {
    for kind in [ImageType::Aio, ImageType::Vhd] {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = paths(&dir);
        raw(&first, 7);
        match kind {
            ImageType::Vhd => make(&second, SECTORS as u64 / 2048),
            _ => raw(&second, 0),
        }
        let names = (first.clone(), second.clone());
        run(move |io| async move {
            let disk = mirrored(&names.0, kind, &names.1, &io);
            let guest = async {
                let mut random = format::testing::Random::new(1);
                for round in 0..60_u8 {
                    // Eight that may overlap, in flight together.
                    let places: Vec<(u64, usize)> = (0..8)
                        .map(|_| {
                            let sectors = 1 + random.below(64);
                            (random.below(SECTORS - sectors) as u64, sectors)
                        })
                        .collect();
                    join(places.into_iter().zip(0..).map(|((sector, sectors), n)| {
                        let (disk, io) = (disk.clone(), io.clone());
                        async move {
                            write(&disk, &io, sector, &vec![round ^ (n << 5); sectors * 512]).await.unwrap();
                        }
                    }))
                    .await;
                    if round % 10 == 0 {
                        let sector = random.below(SECTORS - 512) as u64;
                        disk.discard(Sector(sector), 512, false).await.unwrap();
                        disk.flush().await.unwrap();
                    }
                }
                completed(&disk, &io).await;
                let stats = disk.stats().mirror.unwrap();
                let total = SECTORS as u64 * 512;
                assert_eq!((stats.copied, stats.total, stats.failed), (total, total, None));
                disk.close().await.unwrap();
            };
            beside(&disk, guest).await;
            drop(disk);
            let (one, two) = (params(ImageType::Aio, &names.0, true), params(kind, &names.1, true));
            let (one, two) = (open(&one, &io).unwrap(), open(&two, &io).unwrap());
            for sector in (0..SECTORS as u64).step_by(64) {
                assert!(
                    read(&one, &io, sector, 64).await == read(&two, &io, sector, 64).await,
                    "{kind:?} differs at sector {sector}"
                );
            }
        });
    }
}

#[test]
fn what_is_equal_already_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = paths(&dir);
    std::fs::write(&first, vec![0; SECTORS * 512]).unwrap();
    let file = std::fs::File::create(&second).unwrap();
    file.set_len(SECTORS as u64 * 512).unwrap();
    run(move |io| async move {
        let disk = mirrored(&first, ImageType::Aio, &second, &io);
        let guest = async {
            completed(&disk, &io).await;
            disk.close().await.unwrap();
        };
        beside(&disk, guest).await;
        let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&second).unwrap());
        assert_eq!(blocks, 0, "the holes of the secondary image are filled");
    });
}

#[test]
fn a_secondary_that_fails_is_told_of_and_the_disk_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = paths(&dir);
    raw(&first, 1);
    raw(&second, 1);
    run(move |io| async move {
        let disk = mirrored(&first, ImageType::Aio, &second, &io);
        let guest = async {
            write(&disk, &io, 0, &[2; 512]).await.unwrap();
            completed(&disk, &io).await;
            assert_eq!((disk.is_degraded(), disk.degradation()), (false, None));
            // From now on the second image refuses writes.
            mirror(&disk).secondary.leaf.file().unwrap().make_readonly().unwrap();
            write(&disk, &io, 8, &[3; 512]).await.unwrap();
            let failed = disk.stats().mirror.unwrap().failed.unwrap();
            assert!(failed.contains("second") && failed.contains("writing"), "{failed}");
            assert_eq!(read(&disk, &io, 8, 1).await, [3; 512]);
            assert_eq!(disk.failure(), None);
            assert!(disk.is_degraded() && disk.degradation().unwrap().contains("second"));
            assert_eq!(disk.stats().mirror.unwrap().stuck_ms, None, "nothing waits for it");
            disk.flush().await.unwrap();
            disk.close().await.unwrap();
        };
        beside(&disk, guest).await;
        let (one, two) = (std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
        assert_eq!((one[0], one[8 * 512], two[0], two[8 * 512]), (2, 3, 2, 1));
    });
}

#[test]
fn a_secondary_that_cannot_be_read_ends_the_copying() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = paths(&dir);
    raw(&first, 1);
    raw(&second, 2);
    run(move |io| async move {
        let disk = mirrored(&first, ImageType::Aio, &second, &io);
        std::fs::File::options().write(true).open(&second).unwrap().set_len(4096).unwrap();
        disk.background().unwrap().await;
        assert!(disk.stats().mirror.unwrap().failed.unwrap().contains("copying"));
        write(&disk, &io, 0, &[2; 512]).await.unwrap();
        disk.close().await.unwrap();
    });
}

#[test]
fn a_full_first_image_is_left_when_the_second_is_complete_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = paths(&dir);
    raw(&first, 1);
    raw(&second, 2);
    run(move |io| async move {
        let disk = mirrored(&first, ImageType::Aio, &second, &io);
        let judged = mirror(&disk).judge("writing", 0..512, Err(Errno::ENOSPC), Ok(()));
        assert_eq!((judged, mirror(&disk).is_active()), (Err(Errno::ENOSPC), true));
        let guest = async {
            completed(&disk, &io).await;
            assert_eq!(disk.heir(), None);
            let judged = mirror(&disk).judge("writing", 0..512, Err(Errno::ENOSPC), Ok(()));
            assert_eq!((judged, mirror(&disk).is_active()), (Ok(()), false));
            let heir = disk.heir().expect("it is the disk from now on");
            assert_eq!((heir.kind, Path::new(&heir.path)), (ImageType::Aio, &*second));
            write(&disk, &io, 8, &[3; 512]).await.unwrap();
            assert_eq!(read(&disk, &io, 7, 2).await, [[1; 512], [3; 512]].concat());
            disk.close().await.unwrap();
        };
        beside(&disk, guest).await;
        assert_eq!(
            (std::fs::read(&first).unwrap()[8 * 512], std::fs::read(&second).unwrap()[8 * 512]),
            (1, 3)
        );
    });
}

#[test]
fn a_secondary_must_be_large_enough_and_another_file() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = paths(&dir);
    raw(&first, 1);
    std::fs::write(&second, [0; 512]).unwrap();
    run(move |io| async move {
        for (path, errno) in [(&second, Errno::EINVAL), (&first, Errno::EBUSY)] {
            let secondary = ImageSpec { kind: ImageType::Aio, path: path.to_str().unwrap().into() };
            let params = OpenParams { secondary: Some(secondary), ..params(ImageType::Aio, &first, false) };
            assert_eq!(open(&params, &io).unwrap_err().errno(), errno);
        }
    });
}
