//! Disks of all kinds as their users handle them: discarded, grown, shared between threads, stopped.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

fn image(bytes: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    file
}

#[test]
fn a_null_image_reads_zeros_forgets_writes_and_grows() {
    run(|io| async move {
        let spec = |size: &str| OpenParams::new(ImageSpec { kind: ImageType::Null, path: size.into() });
        let disk = open(&spec("1M"), &io).unwrap();
        assert_eq!((disk.sectors(), disk.discard_limits()), (2048, None));
        write(&disk, &io, 7, &[1; 1024]).await.unwrap();
        assert_eq!(read(&disk, &io, 7, 2).await, [0; 1024]);
        disk.flush().await.unwrap();
        assert_eq!((disk.resize(None).await, disk.resize(Some(2 << 20)).await), (Ok(2048), Ok(4096)));
        disk.make_readonly().unwrap();
        assert_eq!(write(&disk, &io, 7, &[1; 512]).await, Err(Errno::EROFS));
        disk.close().await.unwrap();
        assert_eq!(open(&spec("many"), &io).unwrap_err().errno(), Errno::EINVAL);
    });
}

#[test]
fn a_discarded_range_of_a_file_is_zeros_and_takes_no_room() {
    let file = image(0);
    let data = [5; 1 << 20];
    file.as_file().write_all_at(&data, 0).unwrap();
    file.as_file().sync_all().unwrap();
    let path = file.path().to_owned();
    run(move |io| async move {
        let disk = open(&params(ImageType::Aio, &path, false), &io).unwrap();
        let limits = disk.discard_limits().expect("the test's file system gives room back");
        let before = std::fs::metadata(&path).unwrap().blocks();
        // A sector too far to the left and to the right.
        let unit = u64::from(limits.granularity) / 512;
        disk.discard(Sector(unit - 1), 2 * unit + 2, false).await.unwrap();
        let kept = read(&disk, &io, unit - 1, 1).await;
        assert_eq!(kept, [5; 512]);
        assert_eq!(read(&disk, &io, 3 * unit, 1).await, [5; 512]);
        assert!(read(&disk, &io, unit, 2 * unit as usize).await.iter().all(|&byte| byte == 0));
        assert_eq!(before - std::fs::metadata(&path).unwrap().blocks(), 2 * unit);
        // Nothing to do is done; what does not exist is refused.
        disk.discard(Sector(2048), 0, false).await.unwrap();
        for (sector, count) in [(2048, 1), (0, u64::MAX), (u64::MAX, 2)] {
            assert_eq!(disk.discard(Sector(sector), count, false).await, Err(Errno::EINVAL));
        }
        assert_eq!(disk.discard(Sector(0), 8, true).await, Err(Errno::EOPNOTSUPP), "files cannot erase");
        disk.make_readonly().unwrap();
        assert_eq!(disk.discard_limits(), None);
        assert_eq!(disk.discard(Sector(0), 8, false).await, Err(Errno::EROFS));
    });
}

#[test]
fn a_vhd_gives_the_room_of_discarded_sectors_back_and_they_read_as_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhd");
    make(&path, 8);
    run(move |io| async move {
        let disk = open(&params(ImageType::Vhd, &path, false), &io).unwrap();
        assert!(disk.discard_limits().is_some());
        write(&disk, &io, 0, &[7; 1 << 20]).await.unwrap();
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).unwrap());
        let before = blocks();
        disk.discard(Sector(1), 1600, false).await.unwrap();
        assert!(blocks() + 1500 < before, "{before} blocks, then {}", blocks());
        assert_eq!(read(&disk, &io, 0, 1).await, [7; 512]);
        assert_eq!(read(&disk, &io, 8, 1000).await, [0; 512_000]);
        assert_eq!(read(&disk, &io, 1601, 100).await, [7; 51_200]);
        disk.discard(Sector(8192), 8192, false).await.unwrap();
        assert_eq!(disk.discard(Sector(0), 8, true).await, Err(Errno::EOPNOTSUPP), "not securely");
    });
}

#[test]
fn a_raw_file_grows_by_itself_and_on_demand_but_never_shrinks() {
    let file = image(1 << 20);
    let path = file.path().to_owned();
    run(move |io| async move {
        let disk = open(&params(ImageType::Aio, &path, false), &io).unwrap();
        let other = disk.share().unwrap().open(io.clone());
        assert_eq!(disk.resize(None).await, Ok(2048));
        assert_eq!(disk.resize(Some(2 << 20)).await, Ok(4096));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 2 << 20);
        write(&other, &io, 4095, &[3; 512]).await.unwrap();
        assert_eq!(read(&disk, &io, 4095, 1).await, [3; 512]);
        std::fs::File::options().write(true).open(&path).unwrap().set_len((3 << 20) + 100).unwrap();
        assert_eq!(disk.resize(None).await, Ok(6144));
        assert_eq!(other.sectors(), 6144, "handles grow together");
        for size in [1 << 20, (4 << 20) + 1] {
            assert_eq!(disk.resize(Some(size)).await, Err(Errno::EINVAL));
        }
        disk.make_readonly().unwrap();
        assert_eq!(disk.resize(Some(4 << 20)).await, Err(Errno::EROFS));
        assert_eq!(disk.sectors(), 6144);
    });
}

#[test]
fn a_handle_on_another_thread_sees_the_same_disk_and_keeps_its_lock() {
    let file = image(1 << 20);
    let path = file.path().to_owned();
    let share = Rc::new(Cell::new(None));
    run({
        let (path, share) = (path.clone(), share.clone());
        |io| async move {
            let disk = open(&params(ImageType::Aio, &path, false), &io).unwrap();
            write(&disk, &io, 9, &[4; 512]).await.unwrap();
            share.set(disk.share());
        }
    });
    let share = share.take().unwrap();
    std::thread::spawn({
        let path = path.clone();
        move || {
            run(move |io| async move {
                // The first handle is gone.
                let refused = open(&params(ImageType::Aio, &path, false), &io).unwrap_err();
                assert_eq!(refused.errno(), Errno::EBUSY);
                let disk = share.open(io.clone());
                assert_eq!(read(&disk, &io, 9, 1).await, [4; 512]);
                write(&disk, &io, 9, &[6; 512]).await.unwrap();
                disk.close().await.unwrap();
            });
        }
    })
    .join()
    .unwrap();
    run(move |io| async move {
        let disk = open(&params(ImageType::Aio, &path, false), &io).unwrap();
        assert_eq!(read(&disk, &io, 9, 1).await, [6; 512]);
    });
}

#[test]
fn images_with_metadata_have_one_handle() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhd");
    make(&path, 8);
    run(move |io| async move {
        assert!(open(&params(ImageType::Vhd, &path, false), &io).unwrap().share().is_none());
    });
}

#[test]
fn a_disk_that_was_stopped_says_why_and_stops_its_other_handles() {
    let file = image(1 << 20);
    let path = file.path().to_owned();
    run(move |io| async move {
        let disk = open(&params(ImageType::Aio, &path, false), &io).unwrap();
        let other = disk.share().unwrap().open(io.clone());
        assert_eq!(other.failure(), None);
        let told = Arc::new(AtomicBool::new(false));
        let whom = told.clone();
        disk.tell_failure(OnFailure(Box::new(move || whom.store(true, Ordering::Relaxed))));
        other.common.fail("first".into());
        assert!(told.load(Ordering::Relaxed), "whichever handle it is");
        disk.common.fail("second".into());
        assert_eq!(other.failure().as_deref(), Some("first"));
        assert_eq!(other.flush().await, Err(Errno::EIO));
        assert_eq!(write(&other, &io, 0, &[1; 512]).await, Err(Errno::EIO));
        assert_eq!(other.discard(Sector(0), 8, false).await, Err(Errno::EIO));
        assert_eq!(read(&other, &io, 0, 1).await, [0; 512], "reading goes on");
    });
}

#[test]
fn a_vhd_grows_while_it_is_written_and_stays_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.vhd");
    make_growing(&path, 8, 600);
    run(move |io| async move {
        let disk = Rc::new(open(&params(ImageType::Vhd, &path, false), &io).unwrap());
        assert_eq!(disk.resize(None).await, Ok(8 * 2048));
        let last = 600 * 2048 - 1;
        // Writers of new blocks and their commits around it, all in turns.
        let grown = {
            let disk = disk.clone();
            async move { assert_eq!(disk.resize(Some(600 << 20)).await, Ok(600 * 2048)) }
        };
        let mut all: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = vec![Box::pin(grown)];
        for block in 0..4 {
            let (disk, io) = (disk.clone(), io.clone());
            let at = if block == 2 { all.len() } else { 0 };
            all.insert(
                at,
                Box::pin(async move { write(&disk, &io, block * 4096 + 5, &[9; 1024]).await.unwrap() }),
            );
        }
        all.push(Box::pin({
            let disk = disk.clone();
            async move { assert_eq!(disk.resize(Some(600 << 20)).await, Err(Errno::EBUSY)) }
        }));
        join(all.into_iter()).await;
        write(&disk, &io, last, &[8; 512]).await.unwrap();
        for size in [8 << 20, (600 << 20) + 1, 602 << 20] {
            assert_eq!(disk.resize(Some(size)).await, Err(Errno::EINVAL));
        }
        assert_eq!(disk.resize(Some(600 << 20)).await, Ok(600 * 2048), "it has that size");
        disk.flush().await.unwrap();
        drop(disk);
        // As if tapdisk had been stopped there.
        let disk = open(&params(ImageType::Vhd, &path, false), &io).unwrap();
        assert_eq!(disk.sectors(), 600 * 2048);
        for block in 0..4 {
            assert_eq!(read(&disk, &io, block * 4096 + 5, 2).await, [9; 1024]);
        }
        assert_eq!(read(&disk, &io, last, 1).await, [8; 512]);
    });
}
