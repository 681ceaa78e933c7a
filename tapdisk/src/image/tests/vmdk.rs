//! VMDKs, in one file and in several.

use std::os::unix::fs::FileExt;

use ::vmdk::NewImage;

use super::*;

fn make_sparse(path: &Path, sectors: u64) {
    let name = path.file_name().unwrap().to_str().unwrap().to_owned();
    let new = NewImage { sectors, name }.build().unwrap();
    let file = std::fs::File::create(path).unwrap();
    file.set_len(new.len).unwrap();
    for write in &new.writes {
        file.write_all_at(&write.bytes, write.offset).unwrap();
    }
}

fn describe(path: &Path, extents: &str) {
    let text = format!(
        "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
         createType=\"twoGbMaxExtentSparse\"\n{extents}"
    );
    std::fs::write(path, text).unwrap();
}

const PIECE: u64 = 1000;

/// Two sparse pieces around a flat one, which begins in the middle of its file.
fn make_split(folder: &Path) -> std::path::PathBuf {
    make_sparse(&folder.join("a.vmdk"), PIECE);
    make_sparse(&folder.join("c.vmdk"), PIECE);
    std::fs::write(folder.join("b.vmdk"), vec![0; (PIECE as usize + 7) * 512]).unwrap();
    let path = folder.join("disk.vmdk");
    describe(&path, "RW 1000 SPARSE \"a.vmdk\"\nRW 1000 FLAT \"b.vmdk\" 7\nRW 1000 SPARSE \"c.vmdk\"\n");
    path
}

fn compare(engine: EngineChoice, split: bool, rounds: Vec<Vec<(u64, usize, u8)>>) {
    let dir = tempfile::tempdir().unwrap();
    let sectors = 3 * PIECE;
    let path = if split { make_split(dir.path()) } else { dir.path().join("one.vmdk") };
    if !split {
        make_sparse(&path, sectors);
    }
    let mut model = vec![0; sectors as usize * 512];
    run_on(engine, move |io| async move {
        for round in rounds {
            let disk = Rc::new(open(&params(ImageType::Vmdk, &path, false), &io).unwrap());
            assert_eq!(disk.sectors(), sectors);
            let writes = disjoint(round);
            join(writes.iter().map(|&(sector, count, byte)| {
                let (disk, io) = (disk.clone(), io.clone());
                async move { write(&disk, &io, sector, &vec![byte; count * 512]).await.unwrap() }
            }))
            .await;
            for (sector, count, byte) in writes {
                model[sector as usize * 512..][..count * 512].fill(byte);
            }
            for sector in (0..sectors).step_by(600) {
                assert!(read(&disk, &io, sector, 600).await == model[sector as usize * 512..][..600 * 512]);
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
    fn one_piece_or_several_behave_like_a_vector_of_bytes(
        pool: bool, split: bool,
        rounds in prop::collection::vec(
            prop::collection::vec((0..3 * PIECE - 300, 1_usize..300, 1_u8..), 1..24), 1..4)
    ) {
        compare(if pool { EngineChoice::Pool } else { EngineChoice::Uring }, split, rounds);
    }
}

fn errno_of(path: &Path, readonly: bool, io: &Io) -> Errno {
    open(&params(ImageType::Vmdk, path, readonly), io)
        .map_or_else(|error| error.errno(), |_| Errno::UnknownErrno)
}

#[test]
fn m72_an_extent_outside_the_folder_of_its_descriptor_is_not_opened() {
    let dir = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::NamedTempFile::new().unwrap();
    elsewhere.as_file().set_len(1 << 20).unwrap();
    let path = dir.path().join("disk.vmdk");
    std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("link")).unwrap();
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    run(move |io| async move {
        for (extent, errno) in [
            (format!("RW 8 FLAT \"{}\" 0", elsewhere.path().display()), Errno::EINVAL),
            ("RW 8 FLAT \"../x\" 0".into(), Errno::EINVAL),
            ("RW 8 FLAT \"link\" 0".into(), Errno::EPERM),
            ("RW 8 FLAT \"missing\" 0".into(), Errno::ENOENT),
            ("RW 8 FLAT \"folder\" 0".into(), Errno::EISDIR),
            ("RW 1 FLAT \"disk.vmdk\" 0".into(), Errno::ELOOP),
            ("RW 1 SPARSE \"disk.vmdk\"".into(), Errno::ELOOP),
        ] {
            describe(&path, &extent);
            assert_eq!(errno_of(&path, false, &io), errno, "{extent}");
        }
    });
    drop(dir);
}

#[test]
fn m73_an_extent_that_is_too_short_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_split(dir.path());
    let (flat, sparse) = (dir.path().join("b.vmdk"), dir.path().join("c.vmdk"));
    run(move |io| async move {
        std::fs::File::options().write(true).open(&flat).unwrap().set_len((PIECE + 6) * 512).unwrap();
        assert_eq!(errno_of(&path, true, &io), Errno::EINVAL);
        std::fs::File::options().write(true).open(&flat).unwrap().set_len((PIECE + 7) * 512).unwrap();
        make_sparse(&sparse, PIECE - 1);
        assert_eq!(errno_of(&path, true, &io), Errno::EINVAL);
    });
    drop(dir);
}

#[test]
fn the_first_write_changes_the_content_identifier_and_nothing_else_in_the_descriptor() {
    let dir = tempfile::tempdir().unwrap();
    let path = make_split(dir.path());
    let text = std::fs::read_to_string(&path).unwrap();
    run(move |io| async move {
        let disk = open(&params(ImageType::Vmdk, &path, false), &io).unwrap();
        disk.close().await.unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        write(&disk, &io, PIECE + 5, &[1; 512]).await.unwrap();
        let new = std::fs::read_to_string(&path).unwrap();
        let cid = |text: &str| text.lines().nth(2).unwrap().to_owned();
        assert_ne!(cid(&new), cid(&text));
        assert_eq!(new.replace(&cid(&new), ""), text.replace(&cid(&text), ""));
        assert_eq!(disk.resize(Some(1 << 30)).await, Err(Errno::EINVAL));
    });
    drop(dir);
}

#[test]
fn extents_for_reading_only_and_extents_of_zeros_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.vmdk");
    std::fs::write(dir.path().join("flat"), [7; 4096]).unwrap();
    describe(&path, "RDONLY 8 FLAT \"flat\" 0\nRW 8 ZERO\n");
    run(move |io| async move {
        let disk = open(&params(ImageType::Vmdk, &path, false), &io).unwrap();
        assert_eq!(read(&disk, &io, 4, 8).await, [[7; 2048], [0; 2048]].concat());
        for sector in [0, 8] {
            assert_eq!(write(&disk, &io, sector, &[1; 512]).await, Err(Errno::EROFS));
        }
    });
    drop(dir);
}

/// Runs qemu-img; false if it is not installed.
fn qemu_img(arguments: &[&std::ffi::OsStr]) -> bool {
    match std::process::Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let words = [output.stdout, output.stderr].concat();
            assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&words));
            true
        }
        Err(error) => {
            eprintln!("skipped: qemu-img: {error}");
            false
        }
    }
}

/// Flat and sparse, in one file and in several, beside a raw file with the same content.
#[test]
fn images_of_qemu_of_every_kind_are_read_and_written() {
    const GIB: u64 = 1 << 30;
    for (kind, size, files) in [
        ("monolithicSparse", 24 << 20, 1),
        ("monolithicFlat", 24 << 20, 2),
        ("twoGbMaxExtentSparse", 2 * GIB + (1 << 20), 3),
        ("twoGbMaxExtentFlat", 2 * GIB + (1 << 20), 3),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (raw, folder) = (dir.path().join("raw"), dir.path().join("image"));
        std::fs::create_dir(&folder).unwrap();
        let image = folder.join("disk.vmdk");
        let file = std::fs::File::create_new(&raw).unwrap();
        file.set_len(size).unwrap();
        // Around the middle, where the second extent of the large ones begins, and at both ends.
        let middle = if size > 2 * GIB { 2 * GIB } else { size / 2 } / 512;
        let places = [0, 77, middle - 100, middle + 300, size / 512 - 256];
        for (place, byte) in places.into_iter().zip(1..) {
            file.write_all_at(&[byte; 200 * 512], place * 512).unwrap();
        }
        let option = format!("subformat={kind}");
        let convert = ["convert", "-f", "raw", "-O", "vmdk", "-o", &option];
        let paths = [raw.as_os_str(), image.as_os_str()];
        if !qemu_img(&[&convert.map(AsRef::as_ref)[..], &paths].concat()) {
            return;
        }
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), files, "{kind}");
        run(move |io| async move {
            let disk = open(&params(ImageType::Vmdk, &image, false), &io).unwrap();
            assert_eq!(disk.sectors(), size / 512, "{kind}");
            let mut seen = vec![0; 200 * 512];
            for shift in [0, 50, 0] {
                for place in places.map(|place| place.saturating_sub(shift)) {
                    file.read_exact_at(&mut seen, place * 512).unwrap();
                    assert!(read(&disk, &io, place, 200).await == seen, "{kind}: {place}");
                }
                for (place, byte) in places.into_iter().zip(shift as u8 + 10..) {
                    let (at, data) = (place.saturating_sub(20), vec![byte; 120 * 512]);
                    write(&disk, &io, at, &data).await.unwrap();
                    file.write_all_at(&data, at * 512).unwrap();
                }
            }
            disk.flush().await.unwrap();
            disk.close().await.unwrap();
            drop(disk);
            if kind == "twoGbMaxExtentSparse" {
                let part = folder.join("disk-s001.vmdk");
                assert_eq!(errno_of(&part, false, &io), Errno::EINVAL, "a part alone is no disk");
            }
            let compare = ["compare", "-f", "raw", "-F", "vmdk"];
            qemu_img(&[&compare.map(AsRef::as_ref)[..], &[raw.as_os_str(), image.as_os_str()]].concat());
        });
        drop(dir);
    }
}
