//! qcow images, version 1.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use ::qcow::v1::{Backing, Flavour, NewImage};

use super::*;

const SECTORS: u64 = 4096;

fn make_qcow(path: &Path, backing: Option<&Path>, encrypted: bool) {
    let name = |path: &Path| path.as_os_str().as_bytes().to_vec();
    let backing = backing.map(|path| Backing { name: name(path), mtime: 0 });
    let flavour = if encrypted { Flavour::Qemu } else { Flavour::Xen { reserve: false } };
    let new = NewImage { sectors: SECTORS, flavour, backing, encrypted }.build().unwrap();
    let file = std::fs::File::create(path).unwrap();
    file.set_len(new.len).unwrap();
    for write in &new.writes {
        file.write_all_at(&write.bytes, write.offset).unwrap();
    }
}

fn keyed(path: &Path, key: Option<&[u8]>) -> OpenParams {
    let key = key.map(|key| tap_ctl::proto::Key::new(key.to_vec()));
    OpenParams { key, ..params(ImageType::Qcow, path, false) }
}

/// A disk over a raw file, written at many places at a time, is what a vector of bytes would be; also after it was opened
/// again.
fn compare(engine: EngineChoice, key: Option<&'static [u8]>, rounds: Vec<Vec<(u64, usize, u8)>>) {
    let dir = tempfile::tempdir().unwrap();
    let (base, leaf) = (dir.path().join("base.raw"), dir.path().join("leaf.qcow"));
    let mut model: Vec<u8> = (0..SECTORS as usize * 512).map(|i| (i / 700 % 251) as u8).collect();
    std::fs::write(&base, &model).unwrap();
    make_qcow(&leaf, Some(Path::new("base.raw")), key.is_some());
    run_on(engine, move |io| async move {
        for round in rounds {
            let disk = Rc::new(open(&keyed(&leaf, key), &io).unwrap());
            let writes = disjoint(round);
            join(writes.iter().map(|&(sector, count, byte)| {
                let (disk, io) = (disk.clone(), io.clone());
                async move { write(&disk, &io, sector, &vec![byte; count * 512]).await.unwrap() }
            }))
            .await;
            for (sector, count, byte) in writes {
                model[sector as usize * 512..][..count * 512].fill(byte);
            }
            assert!(read(&disk, &io, 0, SECTORS as usize / 4).await == model[..model.len() / 4]);
            for sector in (0..SECTORS).step_by(512) {
                assert!(read(&disk, &io, sector, 512).await == model[sector as usize * 512..][..512 * 512]);
            }
            disk.flush().await.unwrap();
            disk.close().await.unwrap();
        }
    });
    drop(dir);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_child_over_a_raw_file_behaves_like_a_vector_of_bytes(
        pool: bool, sealed: bool,
        rounds in prop::collection::vec(
            prop::collection::vec((0..SECTORS - 300, 1_usize..300, 1_u8..), 1..24), 1..4)
    ) {
        let engine = if pool { EngineChoice::Pool } else { EngineChoice::Uring };
        compare(engine, sealed.then_some(b"a key"), rounds);
    }
}

#[test]
fn a_backing_file_elsewhere_or_in_a_format_that_nobody_has_said_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    elsewhere.as_file().set_len(1 << 20).unwrap();
    let (middle, leaf) = (dir.path().join("middle.qcow"), dir.path().join("leaf.qcow"));
    make_qcow(&middle, None, false);
    run(move |io| async move {
        for (name, errno) in [
            (elsewhere.path(), Errno::EPERM),
            (Path::new("nbd:localhost:1"), Errno::EPERM),
            (Path::new("missing"), Errno::ENOENT),
            (Path::new("middle.qcow"), Errno::EINVAL),
            (Path::new("leaf.qcow"), Errno::ELOOP),
        ] {
            make_qcow(&leaf, Some(name), false);
            let error = open(&params(ImageType::Qcow, &leaf, false), &io).unwrap_err();
            assert_eq!(error.errno(), errno, "{error}");
        }
    });
    drop(dir);
}

#[test]
fn a_missing_and_a_needless_key_are_refused_and_growth_too() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, sealed) = (dir.path().join("plain"), dir.path().join("sealed"));
    make_qcow(&plain, None, false);
    make_qcow(&sealed, None, true);
    run(move |io| async move {
        assert_eq!(open(&keyed(&sealed, None), &io).unwrap_err().errno(), Errno::ENOKEY);
        assert_eq!(open(&keyed(&plain, Some(b"x")), &io).unwrap_err().errno(), Errno::EINVAL);
        let disk = open(&keyed(&plain, None), &io).unwrap();
        assert_eq!(disk.resize(Some((SECTORS + 8) * 512)).await, Err(Errno::EOPNOTSUPP));
        assert_eq!(disk.sectors(), SECTORS);
    });
    drop(dir);
}
