//! Encrypted images.

use ::vhd::key::Key;

use super::*;

fn keyed(path: &Path, key: &[u8]) -> OpenParams {
    let key = Some(tap_ctl::proto::Key::new(key.to_vec()));
    OpenParams { key, ..params(ImageType::Vhd, path, false) }
}

#[test]
fn an_encrypted_disk_over_a_plain_one_reads_as_written_and_its_file_shows_nothing() {
    for len in [32, 64] {
        let dir = tempfile::tempdir().unwrap();
        let (base, leaf) = (dir.path().join("base.vhd"), dir.path().join("leaf.vhd"));
        let key = vec![0x5c; len];
        make(&base, 8);
        snapshot_with(&leaf, &base, Some(Key::new(key.clone()).unwrap().hash([3; 32])));
        run(move |io| async move {
            let disk = open(&params(ImageType::Vhd, &base, false), &io).unwrap();
            write(&disk, &io, 0, &[0xaa; 65_536]).await.unwrap();
            disk.close().await.unwrap();
            drop(disk);
            let disk = open(&keyed(&leaf, &key), &io).unwrap();
            assert!(disk.start(Direction::Read, Sector(0), &io.pool.data(512).unwrap()).is_none());
            // Across blocks, twice to the same place, a part of what is there already.
            let mut model = vec![0; 8 << 20];
            model[..65_536].fill(0xaa);
            let mut put = async |sector: usize, count: usize, byte: u8| {
                write(&disk, &io, sector as u64, &vec![byte; count * 512]).await.unwrap();
                model[sector * 512..(sector + count) * 512].fill(byte);
            };
            for (sector, count, byte) in [(3, 1, 1), (4090, 1200, 2), (4096, 1, 3), (100, 64, 4)] {
                put(sector, count, byte).await;
            }
            disk.flush().await.unwrap();
            for (sector, count) in [(0, 256), (3, 1), (4000, 1500), (5000, 600)] {
                let seen = read(&disk, &io, sector, count).await;
                let at = sector as usize * 512;
                assert!(seen == model[at..at + count * 512], "{sector} {count}");
            }
            disk.close().await.unwrap();
            drop(disk);
            let file = std::fs::read(&leaf).unwrap();
            assert!(!file.windows(512).any(|bytes| bytes == [2; 512]), "the guest's data is in the file");
            let disk = open(&keyed(&leaf, &key), &io).unwrap();
            assert!(read(&disk, &io, 4000, 1500).await == model[4000 * 512..5500 * 512]);
        });
    }
}

#[test]
fn a_missing_a_wrong_and_a_needless_key_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, sealed) = (dir.path().join("plain.vhd"), dir.path().join("sealed.vhd"));
    make(&plain, 8);
    let hash = Key::new(vec![1; 32]).unwrap().hash([0; 32]);
    create_with(&sealed, DiskType::Dynamic, 8 << 20, 0, None, Some(hash));
    run(move |io| async move {
        let errno = |params: OpenParams| open(&params, &io).unwrap_err().errno();
        assert_eq!(errno(params(ImageType::Vhd, &sealed, false)), Errno::EINVAL);
        assert_eq!(errno(keyed(&sealed, &[2; 32])), Errno::ENOKEY);
        assert_eq!(errno(keyed(&sealed, &[1; 33])), Errno::EINVAL);
        assert_eq!(errno(keyed(&plain, &[1; 32])), Errno::EINVAL);
        open(&keyed(&sealed, &[1; 32]), &io).unwrap();
    });
}
