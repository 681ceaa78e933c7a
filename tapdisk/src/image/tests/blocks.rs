//! Stores with blocks larger than a guest's sectors. The files under these tests would take single sectors: that only whole
//! blocks reach them is asserted by `Io::start`.

use std::path::PathBuf;

use super::*;
use crate::buf::Buf;
use crate::image::file::Mode;
use crate::image::open::open_over;

const BLOCK: u32 = 4096;

fn open_4kn(kind: ImageType, path: &Path, io: &Io) -> Disk {
    let file = ImageFile::open(path, Mode::Exclusive, true).unwrap().with_block_size(BLOCK);
    let images = open_over(file, &params(kind, path, false), io).unwrap();
    Disk::new(images.chain.into(), None, false, Common::new(images.sectors))
}

/// A data buffer that begins a sector behind a page, as a guest's may.
fn askew(io: &Io, sectors: usize) -> (Buf, usize) {
    (io.pool.data((sectors + 1) * 512).unwrap(), 512)
}

#[derive(Clone, Debug)]
enum Step {
    /// First sector, number of sectors and value of each of several writes at a time.
    Writes(Vec<(u64, usize, u8)>),
    Read(u64, usize),
    Reopen,
}

/// Short runs close to each other, so that many share a block.
fn steps(sectors: u64) -> impl Strategy<Value = Vec<Step>> {
    let place = move || (0..=sectors - 40, 1_usize..=40, 1_u8..);
    let step = prop_oneof![
        4 => prop::collection::vec(place(), 1..24).prop_map(Step::Writes),
        2 => place().prop_map(|(sector, sectors, _)| Step::Read(sector, sectors)),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..16)
}

fn engines() -> impl Strategy<Value = EngineChoice> {
    prop_oneof![Just(EngineChoice::Uring), Just(EngineChoice::Pool)]
}

/// Carries the steps out on an image, and on a vector of bytes.
fn compare(engine: EngineChoice, kind: ImageType, path: PathBuf, sectors: u64, steps: Vec<Step>) {
    run_on(engine, move |io| async move {
        let mut disk = Rc::new(open_4kn(kind, &path, &io));
        assert_eq!((disk.physical_block_size(), disk.sectors()), (BLOCK, sectors));
        let mut model = vec![0_u8; sectors as usize * 512];
        let span = |sector: u64, count: usize| sector as usize * 512..(sector as usize + count) * 512;
        for step in steps {
            match step {
                Step::Writes(writes) => {
                    let writes = disjoint(writes);
                    join(writes.iter().map(|&(sector, count, byte)| {
                        let (disk, io) = (disk.clone(), io.clone());
                        async move { write(&disk, &io, sector, &vec![byte; count * 512]).await.unwrap() }
                    }))
                    .await;
                    for (sector, count, byte) in writes {
                        model[span(sector, count)].fill(byte);
                    }
                }
                Step::Read(sector, count) => {
                    assert!(read(&disk, &io, sector, count).await == model[span(sector, count)]);
                }
                Step::Reopen => {
                    disk.close().await.unwrap();
                    drop(disk);
                    disk = Rc::new(open_4kn(kind, &path, &io));
                }
            }
        }
        disk.close().await.unwrap();
        drop(disk);
        // What is on disk is what programs find that know nothing of all this.
        let disk = open(&params(kind, &path, true), &io).unwrap();
        for sector in (0..sectors).step_by(64) {
            let count = 64.min((sectors - sector) as usize);
            assert!(read(&disk, &io, sector, count).await == model[span(sector, count)], "sector {sector}");
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn a_raw_image_in_blocks_of_4096_behaves_like_a_vector_of_bytes(
        (sectors, steps) in (41_u64..100).prop_flat_map(|sectors| (Just(sectors), steps(sectors))),
        tail in 0_u64..512, engine in engines()
    ) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let len = sectors * 512 + tail;
        file.as_file().set_len(len).unwrap();
        compare(engine, ImageType::Aio, file.path().to_owned(), sectors, steps);
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), len);
    }

    #[test]
    fn a_vhd_in_blocks_of_4096_behaves_like_a_vector_of_bytes(
        steps in steps(3 * 4096), engine in engines()
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.vhd");
        make(&path, 6);
        compare(engine, ImageType::Vhd, path, 6 * 2048, steps);
    }
}

#[test]
fn more_writers_than_pages_all_end_with_every_sector_in_place() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let path = file.path().to_owned();
    run(move |io| async move {
        let disk = Rc::new(open_4kn(ImageType::Aio, &path, &io));
        // Each sector has a writer; eight of them share a block, and all of them the 32 pages.
        join((0..128).map(|sector| {
            let (disk, io) = (disk.clone(), io.clone());
            async move { write(&disk, &io, sector, &[sector as u8; 512]).await.unwrap() }
        }))
        .await;
        for sector in 0..128 {
            assert_eq!(read(&disk, &io, sector, 1).await, [sector as u8; 512]);
        }
    });
}

#[test]
fn memory_that_the_store_cannot_reach_goes_through_a_page() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let path = file.path().to_owned();
    run(move |io| async move {
        let file = ImageFile::open(&path, Mode::Exclusive, true).unwrap().with_memory_align(4096);
        let (mut out, first) = askew(&io, 40);
        out.bytes_mut().iter_mut().zip((0..251).cycle()).for_each(|(to, byte)| *to = byte);
        io.write(&file, 3 * 512, &out, first..out.len()).await.unwrap();
        let (back, _) = askew(&io, 40);
        io.read(&file, 3 * 512, &back, first..back.len()).await.unwrap();
        assert_eq!(out.bytes()[first..], back.bytes()[first..]);
    });
}
