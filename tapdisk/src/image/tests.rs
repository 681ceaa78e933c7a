#![expect(clippy::cast_possible_truncation, reason = "positions on small test disks")]

mod blocks;
mod handles;
mod qcow;
mod qcow2;
mod sealed;
mod vmdk;

use std::future::Future;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use ::vhd::DiskType;
use ::vhd::create::{NewImage, NewParent};
use proptest::prelude::*;
use tap_ctl::proto::{ImageSpec, ImageType, OpenParams};

use super::file::ImageFile;
use super::*;
use crate::reactor::EngineChoice;

/// Runs a task on an executor and a reactor of its own.
pub(crate) fn run<F: Future<Output = ()> + 'static>(task: impl FnOnce(Io) -> F) {
    run_on(EngineChoice::Auto, task);
}

/// The same with this engine.
fn run_on<F: Future<Output = ()> + 'static>(engine: EngineChoice, task: impl FnOnce(Io) -> F) {
    crate::alone::run(engine, 1 << 20, task).unwrap();
}

pub(in crate::image) fn params(kind: ImageType, path: &Path, readonly: bool) -> OpenParams {
    let path = path.to_str().unwrap().to_owned();
    OpenParams { readonly, ..OpenParams::new(ImageSpec { kind, path }) }
}

pub(in crate::image) async fn write(disk: &Disk, io: &Io, sector: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut buf = io.pool.data_soon(bytes.len()).await.unwrap();
    buf.bytes_mut().copy_from_slice(bytes);
    disk.write(Sector(sector), &buf).await
}

pub(in crate::image) async fn read(disk: &Disk, io: &Io, sector: u64, sectors: usize) -> Vec<u8> {
    let mut buf = io.pool.data_soon(sectors * 512).await.unwrap();
    buf.bytes_mut().fill(0xee);
    disk.read(Sector(sector), &buf).await.unwrap();
    buf.bytes().to_vec()
}

#[test]
fn raw_reads_back_what_was_written_and_keeps_its_size() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len((1 << 20) + 100).unwrap();
    let path = file.path().to_owned();
    run(move |io| async move {
        let disk = open(&params(ImageType::Aio, &path, false), &io).unwrap();
        assert_eq!(disk.sectors(), 2048, "the tail of 100 bytes is no sector");
        write(&disk, &io, 2047, &[7; 512]).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(read(&disk, &io, 2046, 2).await, [[0; 512], [7; 512]].concat());
        disk.close().await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), (1 << 20) + 100);
    });
}

#[test]
fn an_empty_file_is_refused_with_its_name() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let path = file.path().to_owned();
    run(move |io| async move {
        let error = open(&params(ImageType::Aio, &path, false), &io).unwrap_err();
        assert_eq!(error.errno(), Errno::EINVAL);
        assert!(
            error.to_string().contains(path.to_str().unwrap()) && error.to_string().contains("empty"),
            "{error}"
        );
    });
}

#[test]
fn readonly_refuses_writes_at_the_disk_and_at_the_descriptor() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let path = file.path().to_owned();
    run(move |io| async move {
        let disk = open(&params(ImageType::Aio, &path, false), &io).unwrap();
        disk.make_readonly().unwrap();
        assert_eq!(write(&disk, &io, 0, &[1; 512]).await, Err(Errno::EROFS));
        let buf = io.pool.data(512).unwrap();
        let transfer =
            io.start(Direction::Write, disk.chain.leaf.file().unwrap(), 0, buf.piece(0..512).unwrap());
        assert_eq!(transfer.finish().await, Err(Errno::EBADF), "the descriptor itself does not write");
        assert!(std::fs::read(&path).unwrap().iter().all(|&b| b == 0));
    });
}

#[test]
fn a_vhd_without_its_parent_names_child_and_parent() {
    let dir = tempfile::tempdir().unwrap();
    let (base, child) = (dir.path().join("base.vhd"), dir.path().join("child.vhd"));
    make(&base, 8);
    snapshot(&child, &base);
    std::fs::remove_file(&base).unwrap();
    run(move |io| async move {
        let error = open(&params(ImageType::Vhd, &child, false), &io).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOENT);
        let text = error.to_string();
        assert!(text.contains("child.vhd") && text.contains("base.vhd"), "{text}");
    });
}

#[test]
fn an_image_that_is_its_own_ancestor_is_refused_as_a_loop() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.vhd"), dir.path().join("b.vhd"));
    make(&a, 8);
    snapshot(&b, &a);
    // Under its parent's name there is now the child itself, which is locked by then: the loop must be told, not the lock.
    std::fs::remove_file(&a).unwrap();
    std::fs::hard_link(&b, &a).unwrap();
    run(move |io| async move {
        let error = open(&params(ImageType::Vhd, &b, false), &io).unwrap_err();
        assert_eq!(error.errno(), Errno::ELOOP, "{error}");
        assert!(error.to_string().contains("a.vhd"), "{error}");
    });
}

#[test]
fn a_chain_longer_than_the_limit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: usize| dir.path().join(format!("{n}.vhd"));
    make(&path(0), 2);
    for n in 1..=CHAIN {
        // Each must hold something, or the snapshot skips it.
        touch(&path(n - 1));
        snapshot(&path(n), &path(n - 1));
    }
    let (good, bad) = (path(CHAIN - 1), path(CHAIN));
    run(move |io| async move {
        drop(open(&params(ImageType::Vhd, &good, false), &io).unwrap());
        assert_eq!(open(&params(ImageType::Vhd, &bad, false), &io).unwrap_err().errno(), Errno::ELOOP);
    });
}

#[test]
fn a_parent_in_use_by_a_reader_can_be_shared_but_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = |n: &str| dir.path().join(n);
    let (base, one, two) = (path("base.vhd"), path("one.vhd"), path("two.vhd"));
    make(&base, 8);
    touch(&base);
    snapshot(&one, &base);
    snapshot(&two, &base);
    run(move |io| async move {
        let first = open(&params(ImageType::Vhd, &one, false), &io).unwrap();
        let second = open(&params(ImageType::Vhd, &two, false), &io).unwrap();
        assert_eq!(open(&params(ImageType::Vhd, &base, false), &io).unwrap_err().errno(), Errno::EBUSY);
        drop((first, second));
        open(&params(ImageType::Vhd, &base, false), &io).unwrap();
    });
}

/// Creates a dynamic VHD of `mib` MiB.
pub(in crate::image) fn make(path: &Path, mib: u64) {
    create(path, DiskType::Dynamic, mib << 20, 0, None);
}

pub(in crate::image) fn snapshot(child: &Path, parent: &Path) {
    snapshot_with(child, parent, None);
}

fn snapshot_with(child: &Path, parent: &Path, key: Option<::vhd::key::KeyHash>) {
    let file = std::fs::File::open(parent).unwrap();
    let mut read =
        |offset: u64, bytes: &mut [u8]| std::os::unix::fs::FileExt::read_exact_at(&file, bytes, offset);
    let source = format::Source { size: file.metadata().unwrap().len(), regular: true, read: &mut read };
    let core = ::vhd::Vhd::open(source, &::vhd::OpenOptions::default()).unwrap();
    let name = parent.file_name().unwrap().to_str().unwrap().to_owned();
    let parent = NewParent { uuid: core.uuid(), timestamp: 0, path: format!("./{name}"), name };
    create_with(child, DiskType::Differencing, core.sectors() * 512, 0, Some(parent), key);
}

fn create(path: &Path, kind: DiskType, size: u64, max_size: u64, parent: Option<NewParent>) {
    create_with(path, kind, size, max_size, parent, None);
}

fn create_with(
    path: &Path,
    kind: DiskType,
    size: u64,
    max_size: u64,
    parent: Option<NewParent>,
    key: Option<::vhd::key::KeyHash>,
) {
    static CREATED: AtomicU64 = AtomicU64::new(1);
    let mut id = [0; 16];
    id[..8].copy_from_slice(&CREATED.fetch_add(1, Ordering::Relaxed).to_be_bytes());
    let image = NewImage {
        kind,
        size,
        max_size,
        block_size: 2 << 20,
        uuid: ::vhd::Uuid::from_random(id),
        timestamp: 0,
        parent,
        key,
    };
    let bytes = image.build(None).unwrap();
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes.len).unwrap();
    for write in bytes.writes {
        std::os::unix::fs::FileExt::write_all_at(&file, &write.bytes, write.offset).unwrap();
    }
}

/// Creates a qcow2 image.
pub(in crate::image) fn make_qcow2(
    path: &Path,
    cluster_bits: u32,
    backing: Option<(&Path, Option<&str>)>,
    sectors: u64,
) {
    let backing = backing.map(|(path, format)| ::qcow::v2::Backing {
        name: std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec(),
        format: format.map(str::to_owned),
    });
    let new =
        ::qcow::v2::NewImage { cluster_bits, backing, ..::qcow::v2::NewImage::new(sectors) }.build().unwrap();
    let file = std::fs::File::create(path).unwrap();
    file.set_len(new.len).unwrap();
    for write in &new.writes {
        std::os::unix::fs::FileExt::write_all_at(&file, &write.bytes, write.offset).unwrap();
    }
}

/// A VHD with room to grow.
fn make_growing(path: &Path, mebibytes: u64, most: u64) {
    create(path, DiskType::Dynamic, mebibytes << 20, most << 20, None);
}

/// Writes something through a disk.
fn touch(path: &Path) {
    let path = path.to_owned();
    run(move |io| async move {
        let disk = open(&params(ImageType::Vhd, &path, false), &io).unwrap();
        write(&disk, &io, 3, &[1; 512]).await.unwrap();
        disk.close().await.unwrap();
    });
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        sector: u64,
        sectors: usize,
        byte: u8,
    },
    /// Several at once, as slots do.
    Writes(Vec<(u64, usize, u8)>),
    Read {
        sector: u64,
        sectors: usize,
    },
    Flush,
    Reopen,
    Snapshot,
}

/// The longest chain.
const CHAIN: usize = ::vhd::chain::MAX_DEPTH as usize;

const SECTORS: u64 = 6 * 4096;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || (0..SECTORS - 88, 1usize..88, any::<u8>());
    let step = prop_oneof![
        4 => place().prop_map(|(sector, sectors, byte)| Step::Write { sector, sectors, byte }),
        2 => prop::collection::vec(place(), 2..8).prop_map(Step::Writes),
        3 => place().prop_map(|(sector, sectors, _)| Step::Read { sector, sectors }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Snapshot),
    ];
    prop::collection::vec(step, 1..30)
}

/// Drops writes that overlap an earlier one of the same batch: their order is not defined.
fn disjoint(writes: Vec<(u64, usize, u8)>) -> Vec<(u64, usize, u8)> {
    let mut kept: Vec<(u64, usize, u8)> = Vec::new();
    for write in writes {
        if kept.iter().all(|k| k.0 + k.1 as u64 <= write.0 || write.0 + write.1 as u64 <= k.0) {
            kept.push(write);
        }
    }
    kept
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn a_vhd_chain_behaves_like_a_vector_of_bytes(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_owned();
        make(&folder.join("0.vhd"), SECTORS / 2048);
        run(move |io| async move {
            let mut depth = 0;
            let path = |n: usize| folder.join(format!("{n}.vhd"));
            let mut disk = Rc::new(open(&params(ImageType::Vhd, &path(0), false), &io).unwrap());
            let mut model = vec![0u8; SECTORS as usize * 512];
            let span = |sector: u64, sectors: usize| sector as usize * 512..(sector as usize + sectors) * 512;
            for step in steps {
                match step {
                    Step::Write { sector, sectors, byte } => {
                        write(&disk, &io, sector, &vec![byte; sectors * 512]).await.unwrap();
                        model[span(sector, sectors)].fill(byte);
                    }
                    Step::Writes(writes) => {
                        let writes = disjoint(writes);
                        join(writes.iter().map(|&(sector, sectors, byte)| {
                            let (disk, io) = (disk.clone(), io.clone());
                            async move { write(&disk, &io, sector, &vec![byte; sectors * 512]).await.unwrap() }
                        })).await;
                        for (sector, sectors, byte) in writes {
                            model[span(sector, sectors)].fill(byte);
                        }
                    }
                    Step::Read { sector, sectors } => {
                        assert!(read(&disk, &io, sector, sectors).await == model[span(sector, sectors)]);
                    }
                    Step::Flush => disk.flush().await.unwrap(),
                    Step::Reopen => {
                        disk.close().await.unwrap();
                        drop(disk);
                        disk = Rc::new(open(&params(ImageType::Vhd, &path(depth), false), &io).unwrap());
                    }
                    Step::Snapshot => {
                        disk.close().await.unwrap();
                        drop(disk);
                        snapshot(&path(depth + 1), &path(depth));
                        depth += 1;
                        disk = Rc::new(open(&params(ImageType::Vhd, &path(depth), false), &io).unwrap());
                    }
                }
            }
            for sector in (0..SECTORS).step_by(128) {
                assert!(read(&disk, &io, sector, 128).await == model[span(sector, 128)], "sector {sector}");
            }
        });
    }
}

/// Polls several futures of one task until all are done.
pub(in crate::image) async fn join(futures: impl Iterator<Item = impl Future<Output = ()>>) {
    let mut futures: Vec<_> = futures.map(|future| Some(Box::pin(future))).collect();
    std::future::poll_fn(|context| {
        for place in &mut futures {
            if let Some(future) = place
                && future.as_mut().poll(context).is_ready()
            {
                *place = None;
            }
        }
        if futures.iter().all(Option::is_none) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}
