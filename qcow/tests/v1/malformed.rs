//! Malformed images: each is refused with the errno that tells why, or gives an error where the damage is.

use std::io::Write;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use format::blocking::{Blocking, nothing, with_source};
use format::testing::{Memory, Random, Subject, Turns, stamps};
use format::{Format, FormatError};
use qcow::v1::{self, OpenOptions, check};

use crate::support::{KEY, Shape, open, put};

const PLAIN: Shape =
    Shape { cluster_bits: 12, l2_bits: 9, xen: None, encrypted: false, device: None, tables: 4 };

fn image() -> Memory {
    PLAIN.image(16384, None)
}

/// The errnos of opening for reading and for writing; 0 for success.
fn errnos(file: &Memory) -> (i32, i32) {
    let errno = |writable| open(file, writable).map_or_else(|error| error.errno(), |_| 0);
    let before = file.bytes.clone();
    let both = (errno(false), errno(true));
    assert!(file.bytes == before);
    both
}

fn with(at: usize, bytes: &[u8]) -> Memory {
    let mut file = image();
    put(&mut file.bytes, at, bytes);
    file
}

fn refused(file: &Memory, errno: i32) {
    assert_eq!(errnos(file), (errno, errno), "{:?}", &file.bytes[..64]);
}

/// The errno of reading a sector.
fn reading(file: &Memory, sector: u64) -> i32 {
    let mut image = Blocking::new(open(file, false).unwrap(), file.clone());
    let errno = image.read(sector, &mut [0; 512], &mut nothing).map_or_else(|error| error.errno(), |()| 0);
    assert!(with_source(file, check::check).unwrap().is_ok(), "the check survives it");
    errno
}

fn writing(file: &Memory, sector: u64) -> i32 {
    let mut image = Blocking::new(open(file, true).unwrap(), file.clone());
    image.write(sector, &[1; 512], &mut nothing).map_or_else(|error| error.errno(), |()| 0)
}

#[test]
fn m31_cluster_bits() {
    for bits in [0, 8, 0x11, 0x1f, 0xff] {
        refused(&with(32, &[bits]), libc::EINVAL);
    }
}

#[test]
fn m32_l2_bits() {
    for bits in [0, 5, 0x0e, 0x1b, 0xff] {
        refused(&with(33, &[bits]), libc::EINVAL);
    }
}

#[test]
fn m33_size() {
    for (size, errno) in [
        (0, libc::EINVAL),
        (1, libc::EINVAL),
        (511, libc::EINVAL),
        (0xeeee_eeee_eeee_eeee, libc::EFBIG),
        (0x7fff_ffff_ffff_ffff, libc::EFBIG),
        (u64::MAX, libc::EFBIG),
        (1 << 40, libc::EINVAL),
    ] {
        refused(&with(24, &size.to_be_bytes()), errno);
    }
}

#[test]
fn m34_name_of_the_backing_file() {
    for (offset, len) in [(48_u64, u32::MAX), (48, 0), (48, 1024), (1 << 40, 5), (u64::MAX, 5), (7, 5)] {
        let mut file = PLAIN.image(16384, Some(b"x"));
        put(&mut file.bytes, 8, &offset.to_be_bytes());
        put(&mut file.bytes, 16, &len.to_be_bytes());
        refused(&file, libc::EINVAL);
    }
    refused(&PLAIN.image(16384, Some(b"a\0b")), libc::EINVAL);
}

#[test]
fn m35_place_of_the_directory() {
    for offset in [0_u64, 8, 47, 49, 1 << 30, u64::MAX, u64::MAX - 7] {
        refused(&with(40, &offset.to_be_bytes()), libc::EINVAL);
    }
    let mut over_name = PLAIN.image(16384, Some(&[b'x'; 64]));
    put(&mut over_name.bytes, 40, &56_u64.to_be_bytes());
    refused(&over_name, libc::EINVAL);
}

#[test]
fn m36_entries_of_the_directory() {
    // Beyond the end, as QEMU leaves it: that part of the disk cannot be used, and nothing is ever placed there.
    let mut file = with(48, &(1_u64 << 20).to_be_bytes());
    assert_eq!(errnos(&file), (0, 0));
    assert_eq!((reading(&file, 0), reading(&file, 4096)), (libc::EIO, 0));
    assert_eq!(writing(&file, 0), libc::EIO);
    assert_eq!(writing(&file, 4096), 0);
    let mut disk = Blocking::new(open(&file, true).unwrap(), file.clone());
    disk.write(4096, &[1; 4096], &mut nothing).unwrap();
    file = disk.storage().clone();
    assert!(file.bytes.len() > (1 << 20) + 4096);
    assert!(file.bytes[1 << 20..][..4096].iter().all(|b| *b == 0));
    // Into the header, into itself, askew, or two alike: refused for writing.
    for entry in [48_u64, 512, 513, 0] {
        let mut file = image();
        file.bytes.resize(64 << 10, 0);
        put(&mut file.bytes, 48, &if entry == 0 { 4096 } else { entry }.to_be_bytes());
        put(&mut file.bytes, 56, &4096_u64.to_be_bytes());
        let same = entry == 0 || entry == 512;
        assert_eq!(errnos(&file), (0, libc::EINVAL), "{entry}");
        assert_eq!(reading(&file, 0), if same { 0 } else { libc::EIO }, "{entry}");
    }
}

/// An image of one table, which begins with `entry`, and some bytes at 16384.
fn with_entry(entry: u64, bytes: &[u8]) -> Memory {
    let mut file = image();
    file.bytes.resize(16384, 0);
    put(&mut file.bytes, 48, &4096_u64.to_be_bytes());
    put(&mut file.bytes, 4096, &entry.to_be_bytes());
    file.bytes.extend(bytes);
    file
}

#[test]
fn m36_entries_of_a_table() {
    for entry in [1_u64, 40, 48, 511, 8193, 16384, 1 << 62] {
        let file = with_entry(entry, &[]);
        assert_eq!((reading(&file, 0), reading(&file, 8)), (libc::EIO, 0), "{entry}");
        assert_eq!(writing(&file, 0), libc::EIO, "{entry}");
        assert_eq!(writing(&file, 8), 0, "{entry}");
        assert_eq!(with_source(&file, check::check).unwrap().unwrap().count, 1, "{entry}");
    }
    // A cluster in its own table: the check tells.
    let file = with_entry(4096, &[]);
    assert_eq!(with_source(&file, check::check).unwrap().unwrap().count, 1);
}

fn packed(unit: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(unit).unwrap();
    encoder.finish().unwrap()
}

fn with_packed(bytes: &[u8], len: u64) -> Memory {
    with_entry(1 << 63 | len << 51 | 16384, bytes)
}

#[test]
fn m37_compressed_clusters() {
    let good = packed(&stamps(0, 8, 7));
    let file = with_packed(&good, good.len() as u64);
    assert_eq!(reading(&file, 3), 0);
    // Writing into it copies the rest.
    let mut disk = Blocking::new(open(&file, true).unwrap(), file.clone());
    disk.write(2, &stamps(2, 1, 9), &mut nothing).unwrap();
    let mut contents = vec![0; 4096];
    disk.read(0, &mut contents, &mut nothing).unwrap();
    assert!(contents == [stamps(0, 2, 7), stamps(2, 1, 9), stamps(3, 5, 7)].concat());
    for (bytes, len) in [
        (good.clone(), 0),
        (good.clone(), good.len() as u64 + 1),
        (good.clone(), good.len() as u64 / 2),
        (packed(&[1; 4095]), packed(&[1; 4095]).len() as u64),
        (packed(&[1; 4097]), packed(&[1; 4097]).len() as u64),
        (packed(&vec![0; 1 << 20]), packed(&vec![0; 1 << 20]).len() as u64),
        (vec![0xff; 100], 100),
    ] {
        let file = with_packed(&bytes, len);
        assert_eq!((reading(&file, 0), reading(&file, 8)), (libc::EIO, 0), "{len}");
        assert_eq!(writing(&file, 1), libc::EIO, "{len}");
    }
}

#[test]
fn m38_a_directory_in_no_byte_order() {
    let shape = Shape { xen: Some(1), ..PLAIN };
    let mut file = shape.image(16384, None);
    file.bytes.resize(32768, 0);
    put(&mut file.bytes, 4096, &0x1234_5600_0000_0078_u64.to_be_bytes());
    assert_eq!(errnos(&file), (0, libc::EINVAL));
    assert_eq!(reading(&file, 0), libc::EIO);
    // Big endian although the flag is clear.
    put(&mut file.bytes, 4096, &8192_u64.to_be_bytes());
    assert_eq!((errnos(&file), reading(&file, 0)), ((0, 0), 0));
}

#[test]
fn m39_a_name_that_looks_like_xens_header() {
    let mut file = Shape { xen: Some(1), ..PLAIN }.image(16384, None);
    put(&mut file.bytes, 8, &48_u64.to_be_bytes());
    put(&mut file.bytes, 16, &4_u32.to_be_bytes());
    let core = open(&file, true).unwrap();
    assert_eq!(core.header().xen, None);
    assert_eq!(core.backing().unwrap().name, b"XEN\xfb");
}

#[test]
fn m40_encryption() {
    refused(&with(36, &2_u32.to_be_bytes()), libc::ENOTSUP);
    refused(&with(36, &u32::MAX.to_be_bytes()), libc::ENOTSUP);
    refused(&with(36, &1_u32.to_be_bytes()), libc::ENOKEY);
    let options = OpenOptions { key: Some(KEY), ..OpenOptions::default() };
    let open_with_key = |file: &Memory| with_source(file, |source| v1::open(source, &options)).unwrap();
    assert_eq!(open_with_key(&image()).unwrap_err().errno(), libc::EINVAL);
    // Compressed and encrypted at a time is what nobody makes.
    let good = packed(&[1; 4096]);
    let mut file = with_packed(&good, good.len() as u64);
    put(&mut file.bytes, 36, &1_u32.to_be_bytes());
    let mut disk = Blocking::new(open_with_key(&file).unwrap(), file);
    assert_eq!(disk.read(0, &mut [0; 512], &mut nothing).unwrap_err().errno(), libc::EIO);
}

#[test]
fn other_files_are_not_opened() {
    refused(&Memory::file(), libc::EINVAL);
    refused(&Memory::of(vec![0; 47], true), libc::EINVAL);
    refused(&Memory::of(vec![0; 4096], true), libc::EINVAL);
    for version in [0_u32, 2, 3, 4] {
        refused(&with(4, &version.to_be_bytes()), libc::EINVAL);
    }
}

/// Whatever the metadata say: no panic, and nothing outside the disk.
#[test]
fn random_damage_gives_errors() {
    format::testing::seeds(2000, |random| {
        let shape = Shape { xen: [None, Some(1), Some(3)][random.below(3)], ..Shape::new(9, 6) };
        let mut disk = Turns::create(&shape, 100);
        disk.write(vec![(5, stamps(5, 30, 1)), (80, stamps(80, 20, 2))], &mut Random::new(3));
        let (mut file, _) = disk.close();
        for _ in 0..=random.below(6) {
            let metadata = if random.once_in(2) { 64 } else { file.bytes.len() };
            let at = random.below(metadata);
            file.bytes[at] = u8::try_from(random.below(256)).unwrap();
        }
        file.room = 1 << 24;
        let _ = with_source(&file, check::check).unwrap();
        for writable in [false, true] {
            let Ok(core) = open(&file, writable) else { continue };
            let sectors = core.sectors();
            let mut disk = Blocking::new(core, file.clone());
            for sector in (0..sectors.min(200)).step_by(7) {
                let _ = disk.read(sector, &mut [0; 512], &mut nothing);
                let _ = disk.write(sector, &[1; 512], &mut nothing);
            }
            let _ = disk.close();
        }
    });
}

#[test]
fn a_disk_that_ends_in_the_middle_of_a_cluster_is_as_long_as_it_says() {
    let mut disk = Turns::create(&PLAIN, 13);
    disk.write(vec![(9, stamps(9, 4, 1))], &mut Random::new(1));
    assert_eq!(disk.read(9, 4), stamps(9, 4, 1));
    PLAIN.check(&disk.close().0, true);
}
