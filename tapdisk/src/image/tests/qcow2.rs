//! qcow2 images.

use std::os::unix::fs::FileExt;

use ::qcow::v2;
use format::blocking::with_source;

use super::*;

const SECTORS: u64 = 4096;

fn of_type(path: &Path) -> OpenParams {
    params(ImageType::Qcow2, path, false)
}

fn check(path: &Path, may_leak: bool) {
    let file = std::fs::File::open(path).unwrap();
    let report = with_source(&file, v2::check).unwrap().unwrap();
    assert!(report.corruptions == 0 && (may_leak || report.leaks == 0), "{:?}", report.problems);
}

/// A disk, written and discarded at many places at a time, is what a vector of bytes would be; also after it was opened again,
/// and after its process died.
fn compare(engine: EngineChoice, cluster_bits: u32, over: bool, rounds: Vec<Vec<(u64, usize, u8)>>) {
    let dir = tempfile::tempdir().unwrap();
    let (base, leaf) = (dir.path().join("base.raw"), dir.path().join("leaf.qcow2"));
    let mut model = vec![0_u8; SECTORS as usize * 512];
    if over {
        model = (0..SECTORS as usize * 512).map(|i| (i / 700 % 251) as u8).collect();
        std::fs::write(&base, &model).unwrap();
    }
    make_qcow2(&leaf, cluster_bits, over.then_some((Path::new("base.raw"), Some("raw"))), SECTORS);
    run_on(engine, move |io| async move {
        let count = rounds.len();
        for (number, round) in rounds.into_iter().enumerate() {
            let disk = Rc::new(open(&of_type(&leaf), &io).unwrap());
            let jobs = disjoint(round);
            join(jobs.iter().map(|&(sector, count, byte)| {
                let (disk, io) = (disk.clone(), io.clone());
                async move {
                    if byte < 50 {
                        disk.discard(Sector(sector), count as u64, false).await.unwrap();
                    } else {
                        write(&disk, &io, sector, &vec![byte; count * 512]).await.unwrap();
                    }
                }
            }))
            .await;
            for (sector, count, byte) in jobs {
                let there = &mut model[sector as usize * 512..][..count * 512];
                if byte >= 50 {
                    there.fill(byte);
                    continue;
                }
                let now = read(&disk, &io, sector, count).await;
                for (there, now) in there.chunks_mut(512).zip(now.chunks(512)) {
                    assert!(now == there || now.iter().all(|byte| *byte == 0));
                    there.copy_from_slice(now);
                }
            }
            for sector in (0..SECTORS).step_by(512) {
                assert!(read(&disk, &io, sector, 512).await == model[sector as usize * 512..][..512 * 512]);
            }
            disk.flush().await.unwrap();
            // The last one dies.
            if number + 1 < count {
                disk.close().await.unwrap();
                check(&leaf, false);
            } else {
                check(&leaf, true);
            }
        }
    });
    drop(dir);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_disk_behaves_like_a_vector_of_bytes(
        pool: bool, over: bool, small: bool,
        rounds in prop::collection::vec(
            prop::collection::vec((0..SECTORS - 300, 1_usize..300, 1_u8..), 1..24), 1..4)
    ) {
        let engine = if pool { EngineChoice::Pool } else { EngineChoice::Uring };
        compare(engine, if small { 12 } else { 16 }, over, rounds);
    }
}

#[test]
fn a_backing_file_is_opened_in_the_format_that_the_header_tells_and_in_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    elsewhere.as_file().set_len(1 << 20).unwrap();
    let (middle, leaf) = (dir.path().join("middle"), dir.path().join("leaf"));
    make_qcow2(&middle, 16, None, SECTORS);
    std::fs::write(dir.path().join("raw"), vec![7; 1 << 20]).unwrap();
    run(move |io| async move {
        for (name, format, errno) in [
            (elsewhere.path(), Some("raw"), Errno::EPERM),
            (Path::new("json:{\"driver\":\"file\"}"), Some("raw"), Errno::EPERM),
            (Path::new("nbd:localhost:1"), Some("raw"), Errno::EPERM),
            (Path::new("missing"), Some("qcow2"), Errno::ENOENT),
            (Path::new("middle"), None, Errno::EINVAL),
            (Path::new("raw"), Some("qcow2"), Errno::EINVAL),
            (Path::new("raw"), Some("ssh"), Errno::ENOTSUP),
            (Path::new("leaf"), Some("qcow2"), Errno::ELOOP),
        ] {
            make_qcow2(&leaf, 16, Some((name, format)), SECTORS);
            let before = std::fs::read(&leaf).unwrap();
            let error = open(&of_type(&leaf), &io).unwrap_err();
            assert_eq!(error.errno(), errno, "{error}");
            assert!(std::fs::read(&leaf).unwrap() == before);
        }
        for (name, format, byte) in [("middle", Some("qcow2"), 0), ("raw", Some("raw"), 7), ("raw", None, 7)]
        {
            make_qcow2(&leaf, 16, Some((Path::new(name), format)), SECTORS);
            let disk = open(&of_type(&leaf), &io).unwrap();
            assert!(read(&disk, &io, 5, 9).await.iter().all(|there| *there == byte), "{name}");
            disk.close().await.unwrap();
        }
    });
    drop(dir);
}

#[test]
fn a_disk_grows_while_it_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let leaf = dir.path().join("leaf");
    make_qcow2(&leaf, 9, None, SECTORS);
    run(move |io| async move {
        let disk = open(&of_type(&leaf), &io).unwrap();
        write(&disk, &io, 9, &[1; 512]).await.unwrap();
        disk.resize(Some(SECTORS * 512 * 9)).await.unwrap();
        assert_eq!(disk.sectors(), SECTORS * 9);
        write(&disk, &io, SECTORS * 9 - 1, &[2; 512]).await.unwrap();
        assert_eq!(read(&disk, &io, SECTORS * 9 - 1, 1).await, [2; 512]);
        disk.close().await.unwrap();
        drop(disk);
        check(&leaf, false);
        let disk = open(&of_type(&leaf), &io).unwrap();
        assert_eq!((disk.sectors(), read(&disk, &io, 9, 1).await), (SECTORS * 9, vec![1; 512]));
    });
    drop(dir);
}

#[test]
fn a_dirty_image_is_put_right_before_it_is_written_and_read_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let leaf = dir.path().join("leaf");
    make_qcow2(&leaf, 16, None, SECTORS);
    let file = std::fs::File::options().write(true).open(&leaf).unwrap();
    // The dirty bit, and a reference count of 0 for the first cluster.
    file.write_all_at(&[1], 79).unwrap();
    file.write_all_at(&[0, 0], 2 << 16).unwrap();
    run(move |io| async move {
        let read_only = OpenParams { readonly: true, ..of_type(&leaf) };
        let before = std::fs::read(&leaf).unwrap();
        drop(open(&read_only, &io).unwrap());
        assert!(std::fs::read(&leaf).unwrap() == before);
        let disk = open(&of_type(&leaf), &io).unwrap();
        write(&disk, &io, 9, &[1; 512]).await.unwrap();
        disk.close().await.unwrap();
        drop(disk);
        check(&leaf, false);
        let disk = open(&of_type(&leaf), &io).unwrap();
        assert_eq!(read(&disk, &io, 9, 1).await, [1; 512]);
    });
    drop(dir);
}
