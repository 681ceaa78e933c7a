use std::path::PathBuf;

use cbt::BLOCK;
use tap_ctl::proto::{ImageType, OpenParams};

use super::*;
use crate::image::tests::{join, params, read, run, write};
use crate::image::{Disk, open};

const BLOCKS: u64 = 40;

/// A raw disk and its log, which says this of itself.
fn files(dir: &tempfile::TempDir, consistent: i32) -> (PathBuf, PathBuf) {
    let (disk, log) = (dir.path().join("disk"), dir.path().join("log"));
    std::fs::File::create(&disk).unwrap().set_len(BLOCKS * BLOCK).unwrap();
    let mut empty = Log::new(BLOCKS * BLOCK);
    empty.set_consistent(consistent);
    std::fs::write(&log, empty.bytes(0..u64::MAX)).unwrap();
    (disk, log)
}

fn logged(disk: &Path, log: &Path, io: &Io) -> Disk {
    let log = Some(log.to_str().unwrap().into());
    open(&OpenParams { log, ..params(ImageType::Aio, disk, false) }, io).unwrap()
}

fn found(path: &Path) -> Log {
    Log::parse(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn what_is_written_and_discarded_is_noted_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, log) = files(&dir, 1);
    run(move |io| async move {
        let open = logged(&disk, &log, &io);
        read(&open, &io, 0, 8).await;
        write(&open, &io, 127, &[1; 1024]).await.unwrap();
        // Before the write was answered they were in the file already.
        let mut expected = Log::new(BLOCKS * BLOCK);
        expected.mark(&(0..2 * BLOCK));
        assert_eq!(found(&log), expected);
        open.discard(Sector(20 * 128), 256, false).await.unwrap();
        expected.mark(&(20 * BLOCK..22 * BLOCK));
        assert_eq!(found(&log), expected);
        open.flush().await.unwrap();
        open.close().await.unwrap();
        expected.set_consistent(1);
        assert_eq!(found(&log), expected);
    });
}

#[test]
fn a_log_is_not_consistent_before_it_is_closed_nor_after_if_it_was_not_before() {
    for consistent in [0, 1] {
        let dir = tempfile::tempdir().unwrap();
        let (disk, log) = files(&dir, consistent);
        run(move |io| async move {
            let open = logged(&disk, &log, &io);
            assert_eq!(found(&log).header().consistent, 0);
            write(&open, &io, 0, &[1; 512]).await.unwrap();
            assert_eq!(found(&log).header().consistent, 0);
            open.close().await.unwrap();
            assert_eq!(found(&log).header().consistent, consistent);
            drop(open);
            // Not closed, as if the process had been killed.
            drop(logged(&disk, &log, &io));
            assert_eq!(found(&log).header().consistent, 0);
        });
    }
}

#[test]
fn many_writers_at_once_each_have_their_bits_in_the_file_before_they_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, log) = files(&dir, 1);
    run(move |io| async move {
        let open = std::rc::Rc::new(logged(&disk, &log, &io));
        let mut random = format::testing::Random::new(5);
        for _ in 0..40 {
            let sectors: Vec<u64> = (0..6).map(|_| random.up_to(BLOCKS * 128)).collect();
            join(sectors.into_iter().map(|sector| {
                let (open, io, log) = (open.clone(), io.clone(), log.clone());
                async move {
                    write(&open, &io, sector, &[1; 512]).await.unwrap();
                    assert!(found(&log).is_marked(&bytes(Sector(sector), 1)));
                }
            }))
            .await;
        }
        open.close().await.unwrap();
    });
}

#[test]
fn a_log_grows_with_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, log) = files(&dir, 1);
    // Left by somebody behind the bits.
    let mut bytes = std::fs::read(&log).unwrap();
    bytes.extend([0xff; 30_000]);
    std::fs::write(&log, bytes).unwrap();
    run(move |io| async move {
        let open = logged(&disk, &log, &io);
        write(&open, &io, 0, &[1; 512]).await.unwrap();
        open.resize(Some(100_000 * BLOCK)).await.unwrap();
        write(&open, &io, 99_999 * 128, &[1; 512]).await.unwrap();
        open.close().await.unwrap();
        let mut expected = Log::new(100_000 * BLOCK);
        expected.mark(&(0..1));
        expected.mark(&(99_999 * BLOCK..100_000 * BLOCK));
        expected.set_consistent(1);
        assert_eq!(found(&log), expected);
    });
}

#[test]
fn a_log_that_cannot_be_written_is_given_up_and_the_disk_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, log) = files(&dir, 1);
    run(move |io| async move {
        // Writing behind the end of a file takes a descriptor of its own.
        std::fs::File::options().write(true).open(&log).unwrap().set_len(PAGE).unwrap();
        let open = logged(&disk, &log, &io);
        open.filters.as_ref().unwrap().log.as_ref().unwrap().file.make_readonly().unwrap();
        write(&open, &io, 0, &[1; 512]).await.unwrap();
        write(&open, &io, 1, &[1; 512]).await.unwrap();
        open.flush().await.unwrap();
        open.close().await.unwrap();
        assert_eq!(found(&log).header().consistent, 0);
        assert_eq!(std::fs::read(&disk).unwrap()[..512], [1; 512]);
    });
}

#[test]
fn a_log_that_is_too_small_in_use_or_none_is_refused_and_a_disk_for_reading_needs_none() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, log) = files(&dir, 1);
    run(move |io| async move {
        let asked = |readonly: bool| {
            let log = Some(log.to_str().unwrap().into());
            open(&OpenParams { log, ..params(ImageType::Aio, &disk, readonly) }, &io)
        };
        std::fs::write(&log, Log::new(BLOCK).bytes(0..u64::MAX)).unwrap();
        let error = asked(false).unwrap_err();
        assert_eq!(error.errno(), Errno::EINVAL);
        assert!(error.to_string().contains("cbt-util set"), "{error}");
        std::fs::write(&log, [0; 10]).unwrap();
        assert_eq!(asked(false).unwrap_err().errno(), Errno::EINVAL);
        drop(asked(true).unwrap());
        std::fs::write(&log, Log::new(BLOCKS * BLOCK).bytes(0..u64::MAX)).unwrap();
        let first = asked(false).unwrap();
        assert_eq!(DirtyLog::open(&log, BLOCK, &io).unwrap_err().errno(), Errno::EBUSY);
        drop(first);
    });
}
