use std::path::Path;

use super::*;
use crate::image::file::Mode;
use crate::image::tests::run;

const LEN: usize = 8 * UNIT + 1536;

fn byte(at: usize) -> u8 {
    u8::try_from(at / 512 % 251).unwrap()
}

fn file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), (0..LEN).map(byte).collect::<Vec<u8>>()).unwrap();
    file
}

fn image(path: &Path) -> ImageFile {
    ImageFile::open(path, Mode::Shared, true).unwrap()
}

async fn read(io: &Io, cached: &Cached, image: &ImageFile, at: usize, len: usize) -> Vec<u8> {
    let mut buf = io.pool.data(len).unwrap();
    buf.bytes_mut().fill(0xee);
    cached.read(io, image, at as u64, &buf, 0..len).await.unwrap();
    buf.bytes().to_vec()
}

#[test]
fn reads_give_the_files_bytes_whatever_is_cached() {
    for limit in [1, 3 * UNIT as u64, 1 << 30] {
        let file = file();
        let path = file.path().to_owned();
        run(move |io| async move {
            let cache = Cache::new(limit);
            let image = image(&path);
            let cached = cache.enter(&image).unwrap();
            let mut random = format::testing::Random::new(limit);
            for _ in 0..300 {
                let len = 512 * (1 + random.below(700));
                let at = 512 * random.below((LEN - len) / 512 + 1);
                let expected: Vec<u8> = (at..at + len).map(byte).collect();
                assert!(read(&io, &cached, &image, at, len).await == expected, "{len} bytes at {at}");
                assert!(cache.bytes() <= limit.max(UNIT as u64));
            }
        });
    }
}

#[test]
fn a_part_is_read_once_for_all_who_have_the_file_open_and_forgotten_with_the_last() {
    let file = file();
    let path = file.path().to_owned();
    run(move |io| async move {
        let cache = Cache::new(1 << 30);
        let (one, two) = (image(&path), image(&path));
        let (first, second) = (cache.enter(&one).unwrap(), cache.enter(&two).unwrap());
        read(&io, &first, &one, 512, 512).await;
        read(&io, &second, &two, 1024, 4096).await;
        read(&io, &first, &one, 0, STREAM).await;
        assert_eq!(first.found(), Found { hits: 0, misses: 512 });
        assert_eq!(second.found(), Found { hits: 4096, misses: 0 });
        assert_eq!(cache.bytes(), UNIT as u64);
        drop(first);
        assert_eq!(cache.bytes(), UNIT as u64);
        drop((second, one, two));
        assert_eq!(cache.bytes(), 0);
        // Changed while nobody had it open.
        std::fs::write(&path, vec![9; LEN]).unwrap();
        let again = image(&path);
        let cached = cache.enter(&again).unwrap();
        assert_eq!(read(&io, &cached, &again, 512, 512).await, [9; 512]);
    });
}
