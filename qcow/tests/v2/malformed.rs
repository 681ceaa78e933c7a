//! Malformed images: each is refused with the errno that tells why, or gives an error where the damage is.

use std::io::Write;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use format::blocking::{Blocking, nothing, with_source};
use format::testing::{Memory, Op, Subject, Turns, stamps};
use format::{Format, FormatError};
use qcow::v2::{self, Backing, NewImage, OpenOptions, Qcow2};

use crate::support::{Shape, put};

const SECTORS: u64 = 16384;
/// Clusters of 4 KiB: header, refcount table, refcount block, L1 table, L2 table, data of the disk's first cluster.
const CLUSTER: usize = 4096;
const TABLE: usize = CLUSTER;
const BLOCK: usize = 2 * CLUSTER;
const L1: usize = 3 * CLUSTER;
const L2: usize = 4 * CLUSTER;
const DATA: usize = 5 * CLUSTER;
const COPIED: u64 = 1 << 63;

fn image() -> Memory {
    let shape = Shape::default();
    let mut disk = Turns::create(&shape, SECTORS);
    disk.write(vec![(0, stamps(0, 1, 7))], &mut format::testing::Random::new(1));
    let mut storage = disk.close().0;
    storage.log.clear();
    assert_eq!(storage.bytes.len(), 6 * CLUSTER);
    assert_eq!(storage.bytes[L2..][..8], (DATA as u64 | COPIED).to_be_bytes());
    storage
}

fn open(file: &Memory, writable: bool) -> Result<Qcow2, v2::Error> {
    let options = OpenOptions { writable, ..OpenOptions::default() };
    with_source(file, |source| v2::open(source, &options)).unwrap()
}

/// The errnos of opening for reading and for writing; 0 for success.
fn errnos(file: &Memory) -> (i32, i32) {
    let errno = |writable| open(file, writable).map_or_else(|error| error.errno(), |_| 0);
    let before = file.bytes.clone();
    let both = (errno(false), errno(true));
    assert!(file.bytes == before && file.log.is_empty(), "opening changes nothing");
    // Whatever it says, a check survives it.
    let _ = with_source(file, v2::check).unwrap();
    both
}

fn with(changes: &[(usize, &[u8])]) -> Memory {
    let mut file = image();
    for (at, bytes) in changes {
        put(&mut file.bytes, *at, bytes);
    }
    file
}

fn number(at: usize, value: u32) -> Memory {
    with(&[(at, &value.to_be_bytes())])
}

fn long(at: usize, value: u64) -> Memory {
    with(&[(at, &value.to_be_bytes())])
}

fn refused(file: &Memory, errno: i32) {
    assert_eq!(errnos(file), (errno, errno), "{:x?}", &file.bytes[..112]);
}

/// The errno of reading a sector.
fn reading(file: &Memory, sector: u64) -> i32 {
    let mut image = Blocking::new(open(file, false).unwrap(), file.clone());
    image.read(sector, &mut [0; 512], &mut nothing).map_or_else(|error| error.errno(), |()| 0)
}

/// The errno of writing a sector; the image must be as it was if it fails.
fn writing(file: &Memory, sector: u64) -> i32 {
    let mut image = Blocking::new(open(file, true).unwrap(), file.clone());
    let errno = image.write(sector, &[1; 512], &mut nothing).map_or_else(|error| error.errno(), |()| 0);
    assert!(errno == 0 || image.storage().bytes == file.bytes, "nothing was written");
    errno
}

fn corruptions(file: &Memory) -> u64 {
    with_source(file, v2::check).unwrap().unwrap().corruptions
}

#[test]
fn m41_header_length() {
    for length in [0, 96, 103, 108, 4104, u32::MAX] {
        refused(&number(100, length), libc::EINVAL);
    }
}

#[test]
fn m42_extension_length() {
    for length in [4096_u32, 0x7fff_ffff, u32::MAX] {
        let extension = [0x1234_5678_u32.to_be_bytes(), length.to_be_bytes()].concat();
        refused(&with(&[(112, &extension)]), libc::EINVAL);
    }
}

#[test]
fn m43_refcount_table() {
    for clusters in [0, 2049, u32::MAX] {
        refused(&number(56, clusters), libc::EINVAL);
    }
    for offset in [0, 512, 4097, 1 << 40, u64::MAX - 65535] {
        refused(&long(48, offset), libc::EINVAL);
    }
}

#[test]
fn m44_refcount_order() {
    for order in [7, 64, u32::MAX] {
        refused(&number(96, order), libc::EINVAL);
    }
}

#[test]
fn m45_l1_table() {
    for entries in [0x7fff_ffff, u32::MAX, (4 << 20) + 1] {
        refused(&number(36, entries), libc::EFBIG);
    }
    for entries in [0, 3] {
        refused(&number(36, entries), libc::EINVAL);
    }
    for offset in [0, 1, 512, 1 << 40, u64::MAX - 4095] {
        refused(&long(40, offset), libc::EINVAL);
    }
    refused(&number(36, 4 << 20), libc::EINVAL);
}

#[test]
fn m46_snapshot_count_and_table() {
    for count in [0x1_0001, 0x7fff_ffff, u32::MAX] {
        refused(&number(60, count), libc::EFBIG);
    }
    for offset in [0_u64, 100, 1 << 30] {
        let file = with(&[(60, &1_u32.to_be_bytes()), (64, &offset.to_be_bytes())]);
        refused(&file, libc::EINVAL);
    }
}

/// An image with one snapshot, whose entry is this.
fn snapshot(l1: u64, entries: u32, id: u16, name: u16, extra: u32) -> Memory {
    let mut file = image();
    let at = file.bytes.len();
    file.bytes.resize(at + CLUSTER, 0);
    put(&mut file.bytes, 60, &1_u32.to_be_bytes());
    put(&mut file.bytes, 64, &(at as u64).to_be_bytes());
    put(&mut file.bytes, BLOCK + 12, &[0, 1]);
    put(&mut file.bytes, at, &l1.to_be_bytes());
    put(&mut file.bytes, at + 8, &entries.to_be_bytes());
    put(&mut file.bytes, at + 12, &[id.to_be_bytes(), name.to_be_bytes()].concat());
    put(&mut file.bytes, at + 36, &extra.to_be_bytes());
    file
}

#[test]
fn m47_snapshot_entries() {
    assert_eq!(errnos(&snapshot(L1 as u64, 4, 1, 1, 16)), (0, 0));
    for bad in [
        snapshot(100, 4, 1, 1, 16),
        snapshot(1 << 40, 4, 1, 1, 16),
        snapshot(0, 4, 1, 1, 16),
        snapshot(L1 as u64, u32::MAX, 1, 1, 16),
        snapshot(L1 as u64, 4, 1, 1, 0),
        snapshot(L1 as u64, 4, 1, 1, 1025),
        snapshot(L1 as u64, 4, 1, 1, u32::MAX),
        snapshot(L1 as u64, 4, u16::MAX, u16::MAX, 16),
    ] {
        assert_eq!(errnos(&bad), (0, libc::EINVAL));
        assert_eq!(reading(&bad, 0), 0);
    }
}

#[test]
fn m48_entries_with_reserved_bits_or_askew() {
    for entry in [1, 1 << 56, 1 << 62, 512, L2 as u64 + 512] {
        let file = long(L1, entry | COPIED);
        assert_eq!((reading(&file, 0), writing(&file, 0)), (libc::EIO, libc::EIO), "{entry:#x}");
        assert!(corruptions(&file) > 0);
    }
    for entry in [2, 1 << 56, 1 << 61, 512, DATA as u64 + 512, COPIED >> 1 | COPIED] {
        let file = long(L2, entry | COPIED);
        assert_eq!((reading(&file, 0), writing(&file, 0)), (libc::EIO, libc::EIO), "{entry:#x}");
        assert!(corruptions(&file) > 0);
    }
    // Only where it is; the rest of the disk is well.
    assert_eq!(reading(&long(L1, 1), 4096), 0);
    let damaged = long(TABLE, BLOCK as u64 + 512);
    assert!(corruptions(&damaged) > 0);
    assert!(open(&damaged, true).is_err() && reading(&damaged, 0) == 0);
}

#[test]
fn m49_data_in_metadata() {
    for place in [0, TABLE, BLOCK, L1, L2] {
        // The header is at 0, which as an entry means "nowhere", unless marked.
        let file = long(L2, place as u64 | COPIED);
        if place != 0 {
            assert_eq!(writing(&file, 0), libc::EIO, "{place:#x}");
            assert!(corruptions(&file) > 0);
        }
        let core = open(&file, true).unwrap();
        assert_eq!(core.overwrite(0, 1), None);
    }
}

#[test]
fn m50_data_beyond_the_end() {
    for place in [6 * CLUSTER as u64, 1 << 40, 0x00ff_ffff_ffff_f000] {
        let file = long(L2, place | COPIED);
        assert_eq!((reading(&file, 0), writing(&file, 0)), (libc::EIO, libc::EIO), "{place:#x}");
        assert!(corruptions(&file) > 0);
        let file = long(L1, place | COPIED);
        assert_eq!((reading(&file, 0), writing(&file, 0)), (libc::EIO, libc::EIO), "{place:#x}");
        assert!(corruptions(&file) > 0);
    }
}

/// Starts the session with a harmless write, then discards the disk's first cluster.
fn discarding(file: &Memory) -> i32 {
    let mut image = Blocking::new(open(file, true).unwrap(), file.clone());
    image.write(8192, &[1; 512], &mut nothing).unwrap();
    image.discard(0, 8).map_or_else(|error| error.errno(), |()| 0)
}

#[test]
fn m51_a_cluster_mapped_twice() {
    let twice = (DATA as u64 | COPIED).to_be_bytes();
    let once_counted = with(&[(L2 + 8, &twice)]);
    assert!(corruptions(&once_counted) > 0);
    let counted = with(&[(L2 + 8, &twice), (BLOCK + 10, &[0, 2])]);
    assert!(corruptions(&counted) > 0, "the marks are wrong");
    assert_eq!(discarding(&counted), libc::EIO);
    assert_eq!(discarding(&image()), 0);
    // Counted twice and not marked as unshared, it is a legal image, and a write to one does not change the other.
    let shared = (DATA as u64).to_be_bytes();
    let file = with(&[(L2, &shared), (L2 + 8, &shared), (BLOCK + 10, &[0, 2])]);
    assert_eq!(corruptions(&file), 0);
    let mut image = Blocking::new(open(&file, true).unwrap(), file);
    image.write(0, &stamps(0, 1, 9), &mut nothing).unwrap();
    let mut there = [0; 512];
    image.read(8, &mut there, &mut nothing).unwrap();
    assert!(there[..] == stamps(0, 1, 7));
}

#[test]
fn m52_a_count_of_0_for_what_is_in_use() {
    for cluster in [0, 1, 2, 3, 4] {
        let file = with(&[(BLOCK + cluster * 2, &[0, 0])]);
        assert!(corruptions(&file) > 0);
        assert_eq!(writing(&file, 8192), libc::EIO, "cluster {cluster} would have been given out");
        let mut repaired = file;
        let report = v2::repair(&mut repaired).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.problems);
        repaired.log.clear();
        assert_eq!((writing(&repaired, 8192), reading(&repaired, 0)), (0, 0));
    }
    assert_eq!(
        discarding(&with(&[(L2 + 8, &(DATA as u64).to_be_bytes()), (BLOCK + 10, &[0, 2])])),
        libc::EIO
    );
}

#[test]
fn m53_refcount_blocks_out_of_place() {
    for (block, errno) in [(512, libc::EIO), (1 << 40, libc::EINVAL), (!4095, libc::EIO)] {
        let file = long(TABLE, block);
        assert!(corruptions(&file) > 0);
        assert_eq!((errnos(&file), reading(&file, 0)), ((0, errno), 0), "{block:#x}");
    }
    // A block that tells of others' clusters as its own.
    let file = long(TABLE + 8, BLOCK as u64);
    assert!(corruptions(&file) > 0 || with_source(&file, v2::check).unwrap().unwrap().leaks > 0);
}

#[test]
fn m54_more_references_than_can_be_counted() {
    let shape = Shape { refcount_bits: 1, ..Shape::default() };
    let mut disk = Turns::create(&shape, SECTORS);
    disk.write(vec![(0, stamps(0, 1, 7))], &mut format::testing::Random::new(1));
    let mut storage = disk.close().0;
    let entry: [u8; 8] = storage.bytes[L2..][..8].try_into().unwrap();
    put(&mut storage.bytes, L2 + 8, &entry);
    assert!(corruptions(&storage) > 0);
    assert_eq!(v2::repair(&mut storage).unwrap_err().errno(), libc::EOVERFLOW);
}

#[test]
fn m55_zero_flags() {
    let old = Shape { version: 2, ..Shape::default() };
    let mut disk = Turns::create(&old, SECTORS);
    disk.write(vec![(0, stamps(0, 1, 7))], &mut format::testing::Random::new(1));
    let mut file = disk.close().0;
    put(&mut file.bytes, L2, &1_u64.to_be_bytes());
    assert_eq!(reading(&file, 0), libc::EIO);
    assert_eq!(reading(&long(L2, 1), 0), 0);
    assert_eq!(reading(&long(L2, (DATA as u64 + 512) | 1 | COPIED), 0), libc::EIO);
}

/// An image whose first cluster is compressed, as these bytes at the end of the file; the entry names so many sectors more.
fn packed(bytes: &[u8], more: u64) -> Memory {
    let mut file = image();
    let at = file.bytes.len() as u64;
    file.bytes.extend(bytes);
    file.bytes.resize(file.bytes.len().next_multiple_of(512), 0);
    // With clusters of 4 KiB the offset has 58 bits.
    put(&mut file.bytes, L2, &((1 << 62) | (more << 58) | at).to_be_bytes());
    file
}

fn deflated(len: usize) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&vec![5; len]).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn m56_compressed_clusters() {
    assert_eq!(reading(&packed(&deflated(4096), 0), 0), 0);
    for bad in [deflated(4095), deflated(1 << 24), vec![0xff; 512], deflated(4096)[..4].to_vec(), Vec::new()]
    {
        assert_eq!(reading(&packed(&bad, 0), 0), libc::EIO);
    }
    // Sectors beyond the end of the file count as zeros behind the stream.
    assert_eq!(reading(&packed(&deflated(4096), 15), 0), 0);
    assert_eq!(reading(&long(L2, (1 << 62) | (1 << 40)), 0), libc::EIO);
    let zstd = |bytes: &[u8]| {
        let mut file = packed(bytes, 0);
        put(&mut file.bytes, 79, &[8]);
        put(&mut file.bytes, 104, &[1]);
        file
    };
    // A frame of 16 MiB of one byte, one that asks for a window of a terabyte, and none.
    let bomb: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd, 0, 0x70, 2, 0, 0x10, 5, 2, 0, 0x10, 5, 3, 0, 0x10, 5];
    let window: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd, 0, 0xf0, 3, 0, 0, 5];
    for bad in [window, &[0x28, 0xb5][..], &[0xff; 64]] {
        assert_eq!(reading(&zstd(bad), 0), libc::EIO);
    }
    assert!([0, libc::EIO].contains(&reading(&zstd(bomb), 0)), "bounded by the cluster");
}

#[test]
fn m57_subclusters_that_are_both() {
    // 16 KiB clusters with extended entries, made by hand: header, table, block, L1, L2, data.
    let cluster = 16384;
    let shape = Shape { cluster_bits: 14, ..Shape::default() };
    let mut file = shape.image(SECTORS, None);
    file.bytes.resize(6 * cluster, 7);
    file.bytes[4 * cluster..5 * cluster].fill(0);
    put(&mut file.bytes, 79, &[16]);
    put(&mut file.bytes, 3 * cluster, &((4 * cluster as u64) | COPIED).to_be_bytes());
    put(&mut file.bytes, 4 * cluster, &((5 * cluster as u64) | COPIED).to_be_bytes());
    put(&mut file.bytes, 4 * cluster + 8, &((1_u64 << 33) | 0b0_1001).to_be_bytes());
    assert_eq!((reading(&file, 0), reading(&file, 1), reading(&file, 2)), (0, 0, 0));
    put(&mut file.bytes, 4 * cluster + 8, &((1_u64 << 32) | 1).to_be_bytes());
    assert_eq!((reading(&file, 0), reading(&file, 1)), (libc::EIO, 0));
    put(&mut file.bytes, 4 * cluster, &0_u64.to_be_bytes());
    put(&mut file.bytes, 4 * cluster + 8, &1_u64.to_be_bytes());
    assert_eq!(reading(&file, 0), libc::EIO);
    assert_eq!(open(&file, true).unwrap_err().errno(), libc::ENOTSUP);
}

#[test]
fn m58_backing_file_name() {
    for (offset, len) in [(4097_u64, 4_u32), (200, 1024), (4094, 4), (64, 4), (u64::MAX, 4), (200, u32::MAX)]
    {
        let file = with(&[(8, &offset.to_be_bytes()), (16, &len.to_be_bytes())]);
        refused(&file, libc::EINVAL);
    }
}

#[test]
fn m59_backing_names_are_told_and_never_opened() {
    for name in ["json:{\"driver\":\"file\"}", "nbd://host", "fat:rw:/", "/etc/passwd"] {
        let backing = Backing { name: name.into(), format: None };
        let new = NewImage { backing: Some(backing.clone()), ..NewImage::new(SECTORS) }.build().unwrap();
        let mut file = Memory::of(vec![0; usize::try_from(new.len).unwrap()], true);
        new.writes
            .iter()
            .for_each(|write| put(&mut file.bytes, usize::try_from(write.offset).unwrap(), &write.bytes));
        assert_eq!(open(&file, true).unwrap().backing(), Some(&backing));
    }
}

#[test]
fn m60_data_files() {
    for name in ["json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", "/dev/sda"] {
        let mut extension = 0x4441_5441_u32.to_be_bytes().to_vec();
        extension.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
        extension.extend(name.as_bytes());
        let file = with(&[(79, &[4]), (112, &extension)]);
        refused(&file, libc::EPERM);
        assert_eq!(with_source(&file, v2::check).unwrap().unwrap_err().errno(), libc::EPERM);
    }
}

#[test]
fn m62_unknown_features_are_named() {
    let mut names = 0x6803_f857_u32.to_be_bytes().to_vec();
    names.extend(48_u32.to_be_bytes());
    names.extend([0, 5]);
    names.extend(b"time travel");
    let file = with(&[(79, &[1 << 5]), (76, &[1]), (112, &names)]);
    refused(&file, libc::ENOTSUP);
    let words = open(&file, false).unwrap_err().to_string();
    assert!(words.contains("'time travel'") && words.contains("incompatible bit 24"), "{words}");
    refused(&number(4, 4), libc::ENOTSUP);
    refused(&number(32, 2), libc::ENOTSUP);
    assert!(open(&number(32, 2), false).unwrap_err().to_string().contains("LUKS"));
    refused(&number(32, 9), libc::ENOTSUP);
    assert_eq!(errnos(&number(32, 1)), (libc::ENOKEY, libc::ENOTSUP));
    refused(&with(&[(79, &[8]), (104, &[2])]), libc::ENOTSUP);
    refused(&with(&[(104, &[1])]), libc::EINVAL);
    for bits in [0, 8, 22, u32::MAX] {
        refused(&number(20, bits), libc::EINVAL);
    }
}

#[test]
fn m63_dirty_and_corrupt() {
    assert_eq!(errnos(&with(&[(79, &[1])])), (0, libc::EUCLEAN));
    assert_eq!(errnos(&with(&[(79, &[2])])), (0, libc::EACCES));
    assert_eq!(errnos(&with(&[(79, &[3])])), (0, libc::EACCES));
    let mut both = with(&[(79, &[3]), (BLOCK + 8, &[0, 0, 0, 0])]);
    assert_eq!(reading(&both, 0), 0);
    let before = both.clone();
    v2::repair(&mut both).unwrap();
    // A stop within the repair leaves an image that can be repaired.
    for done in 0..both.log.len() {
        let mut stopped = before.clone();
        both.log[..done].iter().for_each(|op: &Op| stopped.apply(op));
        v2::repair(&mut stopped).unwrap();
        stopped.log.clear();
        assert_eq!((errnos(&stopped), corruptions(&stopped), reading(&stopped, 0)), ((0, 0), 0, 0));
    }
}

#[test]
fn m64_bitmaps_are_ignored_and_lose_their_validity() {
    let mut extension = 0x2385_2875_u32.to_be_bytes().to_vec();
    extension.extend(24_u32.to_be_bytes());
    extension.extend([0; 4]);
    extension.extend(u64::MAX.to_be_bytes());
    extension.extend([0xff; 8]);
    let file = with(&[(95, &[1]), (112, &extension)]);
    assert_eq!((errnos(&file), reading(&file, 0)), ((0, 0), 0));
    let shape = Shape::default();
    let mut disk = Turns::open(&shape, file, Vec::new());
    disk.write(vec![(0, stamps(0, 1, 9))], &mut format::testing::Random::new(1));
    let log = &disk.image.storage().log;
    let cleared = log.iter().position(|op| matches!(op, Op::Write(0, bytes) if bytes[88..96] == [0; 8]));
    let written = log.iter().position(|op| matches!(op, Op::Write(at, _) if *at == DATA as u64));
    let between = &log[cleared.unwrap()..written.unwrap()];
    assert!(between.iter().any(|op| matches!(op, Op::Flush)), "durably, before anything is written");
}

#[test]
fn m65_sizes() {
    refused(&long(24, 1 << 63), libc::EFBIG);
    refused(&long(24, u64::MAX), libc::EFBIG);
    refused(&long(24, (1 << 63) - 512), libc::EINVAL);
    refused(&long(24, SECTORS * 512 + 1), libc::EINVAL);
}

#[test]
fn m66_the_largest_table_of_the_smallest_clusters() {
    let shape = Shape { cluster_bits: 9, ..Shape::default() };
    let file = shape.image((128 << 30) / 512, None);
    let began = std::time::Instant::now();
    assert_eq!(errnos(&file), (0, 0));
    assert!(began.elapsed().as_secs() < 20);
    assert_eq!(writing(&file, (128 << 30) / 512 - 1), 0);
}

#[test]
fn too_short_files_are_refused() {
    let whole = image();
    for len in [0, 3, 4, 24, 71, 100, 511, 513, 4095, 4096, 8192, 12288] {
        let file = Memory::of(whole.bytes[..len].to_vec(), true);
        assert_eq!(errnos(&file).0, libc::EINVAL, "{len}");
    }
    let shape = Shape::default();
    shape.check(&whole, true);
}
