//! Malformed extents: each is refused with the errno that tells why, or gives an error where the damage is.

use format::Format;
use format::blocking::{Blocking, nothing, with_source};
use format::testing::{Memory, Random, Turns, stamps};
use vmdk::check;

use crate::support::{Shape, errnos, open, put, reading, writing};

const SHAPE: Shape = Shape { grain: 8, entries: 128, redundant: true, tables: true, cache: 9 };
/// Where the directory and its first table are in an image of 2048 sectors.
const DIRECTORY: usize = (3 + 1 + 2) * 512;
const TABLE: usize = DIRECTORY + 512;

fn image() -> Memory {
    let mut file = SHAPE.image(2048);
    file.bytes.resize(64 << 10, 0);
    file
}

fn with(at: usize, bytes: &[u8]) -> Memory {
    let mut file = image();
    put(&mut file.bytes, at, bytes);
    file
}

fn refused(file: &Memory, errno: i32) {
    assert_eq!(errnos(file), (errno, errno), "{:?}", &file.bytes[..80]);
}

#[test]
fn m67_granularity() {
    for (grain, errno) in [
        (0, libc::EINVAL),
        (3, libc::EINVAL),
        (8192, libc::EFBIG),
        (1 << 32, libc::EFBIG),
        (u64::MAX, libc::EFBIG),
    ] {
        refused(&with(20, &u64::to_le_bytes(grain)), errno);
    }
}

#[test]
fn m68_entries_of_a_table() {
    for entries in [0, 513, u32::MAX] {
        refused(&with(44, &entries.to_le_bytes()), libc::EINVAL);
    }
}

#[test]
fn m69_capacity() {
    refused(&with(12, &u64::MAX.to_le_bytes()), libc::EFBIG);
    refused(&with(12, &(1_u64 << 40).to_le_bytes()), libc::EFBIG);
    refused(&with(12, &(1_u64 << 30).to_le_bytes()), libc::EINVAL);
    refused(&with(12, &[0; 8]), libc::EINVAL);
}

#[test]
fn m70_places() {
    // The directories themselves.
    for (field, value) in
        [(56, 0), (56, 1), (56, 1 << 30), (56, u64::MAX - 1), (48, 1 << 30), (48, 2), (28, 1 << 30)]
    {
        refused(&with(field, &u64::to_le_bytes(value)), libc::EINVAL);
    }
    // A table beyond the end: nothing of its part can be used, and nothing is ever placed there.
    let file = with(DIRECTORY, &300_u32.to_le_bytes());
    assert_eq!(errnos(&file), (0, 0));
    assert_eq!((reading(&file, 0), reading(&file, 1024)), (libc::EIO, 0));
    assert_eq!((writing(&file, 0), writing(&file, 1024)), (libc::EIO, 0));
    let mut disk = Blocking::new(open(&file, true).unwrap(), file.clone());
    disk.write(1024, &[1; 4096], &mut nothing).unwrap();
    assert!(disk.storage().bytes[300 * 512..301 * 512].iter().all(|b| *b == 0));
    // In the header, the descriptor, the directory, or where another is.
    for sector in [1_u32, 2, 3, 6, 8] {
        let file = with(DIRECTORY, &sector.to_le_bytes());
        assert_eq!(errnos(&file), (0, libc::EINVAL), "{sector}");
        assert_eq!(reading(&file, 0), if sector == 8 { 0 } else { libc::EIO }, "{sector}");
    }
    // Grains.
    for sector in [1_u32, 2, 3, 6, 121, 128, u32::MAX] {
        let file = with(TABLE, &sector.to_le_bytes());
        assert_eq!((reading(&file, 0), reading(&file, 8)), (libc::EIO, 0), "{sector}");
        assert_eq!((writing(&file, 0), writing(&file, 8)), (libc::EIO, 0), "{sector}");
        assert_eq!(with_source(&file, check::check).unwrap().unwrap().count, 1, "{sector}");
    }
}

#[test]
fn m71_descriptors_within() {
    let mut empty = image();
    empty.bytes[512..1536].fill(0);
    for text in ["# Disk DescriptorFile\n", "x"] {
        let mut file = empty.clone();
        put(&mut file.bytes, 512, text.as_bytes());
        refused(&file, libc::EINVAL);
    }
    // Room for one, and none in it: a part of an image in several files.
    assert!(open(&empty, true).unwrap().descriptor().is_none());
    let parent =
        String::from_utf8(image().bytes[512..1536].to_vec()).unwrap().replace("ffffffff", "00000001");
    refused(&with(512, parent.as_bytes()), libc::ENOTSUP);
    refused(&with(36, &(1_u64 << 20).to_le_bytes()), libc::EFBIG);
}

#[test]
fn m76_versions_compressions_and_other_formats() {
    for version in [0_u32, 4, u32::MAX] {
        refused(&with(4, &version.to_le_bytes()), libc::ENOTSUP);
    }
    assert_eq!(errnos(&with(4, &[3])), (0, libc::EROFS));
    for method in [2_u16, u16::MAX] {
        refused(&with(77, &method.to_le_bytes()), libc::ENOTSUP);
    }
    refused(&with(8, &0x1_0003_u32.to_le_bytes()), libc::ENOTSUP);
    refused(&with(0, b"COWD"), libc::ENOTSUP);
    refused(&with(0, &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0]), libc::ENOTSUP);
    refused(&with(0, b"QFI\xfb"), libc::EINVAL);
    refused(&with(73, b"\n \n\n"), libc::EINVAL);
    refused(&Memory::file(), libc::EINVAL);
    refused(&Memory::of(vec![0; 511], true), libc::EINVAL);
    let mut device = image();
    device.regular = false;
    assert_eq!(errnos(&device), (0, libc::EROFS));
}

#[test]
fn entries_of_zeros_are_zeros_and_can_be_written() {
    let mut file = with(TABLE, &1_u32.to_le_bytes());
    file.bytes[8] |= 4;
    assert_eq!((reading(&file, 0), writing(&file, 3)), (0, 0));
}

#[test]
fn random_damage_gives_errors() {
    format::testing::seeds(1500, |random| {
        let shape = Shape { grain: 4, entries: 8, redundant: true, tables: random.once_in(2), cache: 2 };
        let mut disk = Turns::create(&shape, 100);
        disk.write(vec![(5, stamps(5, 30, 1)), (80, stamps(80, 20, 2))], &mut Random::new(3));
        let (mut file, _) = disk.close();
        if random.once_in(4) {
            file = crate::stream::stream();
        }
        for _ in 0..=random.below(6) {
            let metadata = if random.once_in(2) { 80 } else { file.bytes.len() };
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
