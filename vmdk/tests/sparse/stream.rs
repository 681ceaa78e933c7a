//! Streams: compressed grains, with the directory at the beginning or at the end.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;
use format::blocking::Blocking;
use format::testing::{Memory, stamps};

use crate::support::{contents, errnos, open, put, reading};

const GRAIN: usize = 8;
const SECTORS: u64 = 43;

pub fn packed(unit: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(unit).unwrap();
    encoder.finish().unwrap()
}

fn grain(lba: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = lba.to_le_bytes().to_vec();
    bytes.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn marker(sectors: u64, kind: u32) -> Vec<u8> {
    let mut bytes = sectors.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(kind.to_le_bytes());
    bytes.resize(512, 0);
    bytes
}

/// A stream of grains 0, 2 and 5, of which the last is cut off by the end of the disk; with the directory behind the grains.
pub fn stream() -> Memory {
    let mut header = vec![0; 512];
    put(&mut header, 0, b"KDMV\x03\0\0\0\x01\0\x03\0");
    put(&mut header, 12, &SECTORS.to_le_bytes());
    put(&mut header, 20, &(GRAIN as u64).to_le_bytes());
    put(&mut header, 44, &4_u32.to_le_bytes());
    put(&mut header, 56, &u64::MAX.to_le_bytes());
    put(&mut header, 73, b"\n \r\n\x01");
    let mut bytes = header.clone();
    let mut places = [0_u32; 8];
    for (number, len) in [(0, 8), (2, 8), (5, 3)] {
        places[number] = u32::try_from(bytes.len() / 512).unwrap();
        let lba = (number * GRAIN) as u64;
        bytes.extend(grain(lba, &packed(&stamps(lba, len, 7))));
    }
    let mut tables = [0_u32; 2];
    for (table, places) in tables.iter_mut().zip(places.chunks(4)) {
        bytes.extend(marker(1, 1));
        *table = u32::try_from(bytes.len() / 512).unwrap();
        bytes.extend(places.iter().flat_map(|place| place.to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(512), 0);
    }
    bytes.extend(marker(1, 2));
    put(&mut header, 56, &((bytes.len() / 512) as u64).to_le_bytes());
    bytes.extend(tables.iter().flat_map(|table| table.to_le_bytes()));
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes.extend(marker(1, 3));
    bytes.extend(header);
    bytes.extend(marker(0, 0));
    Memory::of(bytes, true)
}

#[test]
fn a_stream_is_read_by_its_footer_and_not_written() {
    let file = stream();
    assert_eq!(errnos(&file), (0, libc::EROFS));
    let mut image = Blocking::new(open(&file, false).unwrap(), file.clone());
    let zeros = |sectors: usize| vec![0; sectors * 512];
    let expected = [stamps(0, 8, 7), zeros(8), stamps(16, 8, 7), zeros(16), stamps(40, 3, 7)].concat();
    assert!(contents(&mut image) == expected);
}

#[test]
fn m74_damaged_grains() {
    let good = stream();
    let at = 512;
    for change in [
        &|bytes: &mut Vec<u8>| put(bytes, at + 8, &[0; 4]) as _,
        &|bytes: &mut Vec<u8>| put(bytes, at + 8, &8200_u32.to_le_bytes()),
        &|bytes: &mut Vec<u8>| put(bytes, at, &16_u64.to_le_bytes()),
        &|bytes: &mut Vec<u8>| put(bytes, at, &3_u64.to_le_bytes()),
        &|bytes: &mut Vec<u8>| put(bytes, at, &u64::MAX.to_le_bytes()),
        &|bytes: &mut Vec<u8>| put(bytes, at + 12, &[0xff; 20]),
        &|bytes: &mut Vec<u8>| {
            let other = grain(0, &packed(&[0; 4095]));
            put(bytes, at, &other);
        },
        &|bytes: &mut Vec<u8>| {
            let other = grain(0, &packed(&vec![0; 1 << 20]));
            put(bytes, at, &other[..512]);
        },
    ] as [&dyn Fn(&mut Vec<u8>); 8]
    {
        let mut file = good.clone();
        change(&mut file.bytes);
        assert_eq!((reading(&file, 1), reading(&file, 17)), (libc::EIO, 0));
    }
}

#[test]
fn m75_footers() {
    let good = stream();
    for len in [512, 513, 1024, 1535] {
        let short = Memory::of(good.bytes[..len].to_vec(), true);
        assert_eq!(errnos(&short).0, libc::EINVAL, "{len}");
    }
    let at = good.bytes.len() - 1024;
    for (field, value) in [(56, u64::MAX), (56, 1 << 40), (0, 0), (12, 0)] {
        let mut file = good.clone();
        put(&mut file.bytes, at + field, &u64::to_le_bytes(value));
        assert_eq!(errnos(&file).0, libc::EINVAL, "{field}");
    }
}
