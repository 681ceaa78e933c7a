//! Malformed images. Each is a good one with something changed; opening reports it and writes nothing, and never takes more
//! memory or time than the image is large.

use crate::support::{self, Shape};
use format::blocking::Storage;
use format::testing::{Memory, Random, SECTOR, Subject, Turns};
use format::{Format, Load, Lookup};
use vhd::footer::{self, RawFooter};
use vhd::header::RawHeader;
use vhd::{DiskType, Error, NewParent, OpenOptions, Uuid, Vhd};
use zerocopy::IntoBytes;

const SIZE: u64 = 64 << 20;
const TABLE: usize = 1536;
const BATMAP: usize = 2048;

/// An image of 32 blocks, the first three of which are written, the second completely.
fn image() -> Memory {
    let mut disk = Turns::create(&Shape { precise: true, ..Shape::default() }, SIZE / 512);
    let mut random = Random::new(1);
    let data = |sectors: usize| vec![1; sectors * SECTOR];
    disk.write(vec![(0, data(16)), (4096, data(4096)), (8192, data(1))], &mut random);
    disk.close().0
}

fn child() -> Memory {
    let parent =
        NewParent { uuid: Uuid([9; 16]), timestamp: 1, name: "p.vhd".into(), path: "./p.vhd".into() };
    Shape::default().image(SIZE / 512, 2, Some(parent))
}

fn open(store: &Memory) -> Result<Vhd, Error> {
    support::open(store, &OpenOptions::default())
}

fn open_writable(store: &Memory) -> Result<Vhd, Error> {
    support::open(store, &OpenOptions { writable: true, ..OpenOptions::default() })
}

fn errno<T: std::fmt::Debug>(result: Result<T, Error>) -> i32 {
    result.unwrap_err().errno()
}

fn put(store: &mut Memory, offset: usize, bytes: &[u8]) {
    store.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// Changes both footers and gives them good checksums.
fn change_footers(store: &mut Memory, change: impl Fn(&mut RawFooter)) {
    let end = store.bytes.len() - footer::LEN;
    for offset in [0, end] {
        change_footer(store, offset, &change);
    }
}

fn change_footer(store: &mut Memory, offset: usize, change: impl Fn(&mut RawFooter)) {
    let mut footer = RawFooter::from_slice(&store.bytes[offset..]);
    change(&mut footer);
    footer.seal();
    put(store, offset, footer.as_bytes());
}

fn change_header(store: &mut Memory, change: impl Fn(&mut RawHeader)) {
    let mut header = RawHeader::from_slice(&store.bytes[512..]);
    change(&mut header);
    header.seal();
    put(store, 512, header.as_bytes());
}

fn set_entry(store: &mut Memory, block: usize, entry: u32) {
    put(store, TABLE + block * 4, &entry.to_be_bytes());
}

fn entry(store: &Memory, block: u32) -> u32 {
    open(store).unwrap().block_entry(block).unwrap()
}

#[test]
fn m01_both_footers_have_a_wrong_checksum() {
    let mut store = image();
    let end = store.bytes.len() - footer::LEN;
    store.bytes[end + 50] ^= 1;
    assert!(open(&store).unwrap().was_unclean());
    store.bytes[50] ^= 1;
    assert_eq!(errno(open(&store)), libc::EINVAL);
}

#[test]
fn m02_a_footer_forged_in_guest_data_is_ignored() {
    let good = image();
    let end = good.bytes.len() - footer::LEN;
    // The file ends in guest data, as after a stop. The guest wrote a footer of another image there ...
    let mut store = good.clone();
    store.bytes.truncate(end);
    let forged = end - footer::LEN;
    put(&mut store, forged, &good.bytes[..512]);
    change_footer(&mut store, forged, |footer| {
        footer.uuid = Uuid([66; 16]);
        footer.data_offset = (1 << 20).into();
    });
    let vhd = open(&store).unwrap();
    assert!(vhd.was_unclean());
    assert_eq!(vhd.uuid(), Uuid([1; 16]));
    // ... or one of this image, of another size.
    put(&mut store, forged, &good.bytes[..512]);
    change_footer(&mut store, forged, |footer| footer.current_size = (32 << 20).into());
    let vhd = open_writable(&store).unwrap();
    assert!(vhd.was_unclean());
    assert_eq!(vhd.sectors(), SIZE / 512);
}

#[test]
fn m02_an_image_that_is_fixed_and_dynamic_is_refused() {
    let mut store = image();
    let end = store.bytes.len() - footer::LEN;
    change_footer(&mut store, end, |footer| {
        footer.disk_type = DiskType::Fixed.raw().into();
        footer.current_size = (1 << 20).into();
    });
    assert_eq!(errno(open(&store)), libc::EINVAL);
}

#[test]
fn m03_unknown_types() {
    for kind in [0, 1, 5, 6, 7, u32::MAX] {
        let mut store = image();
        change_footers(&mut store, |footer| footer.disk_type = kind.into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{kind}");
    }
}

#[test]
fn m04_header_offsets() {
    for offset in [0, 256, 511, 513, 1000, 1 << 40, u64::MAX, u64::MAX - 511] {
        let mut store = image();
        change_footers(&mut store, |footer| footer.data_offset = offset.into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{offset}");
    }
}

#[test]
fn m05_block_sizes_that_are_no_powers_of_two() {
    for size in [0, 0x80, 0x1234_5678, 3 << 19] {
        let mut store = image();
        change_header(&mut store, |header| header.block_size = size.into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{size:#x}");
    }
}

#[test]
fn m06_block_sizes_above_2_mib() {
    for shift in 22..32 {
        let mut store = image();
        change_header(&mut store, |header| header.block_size = (1_u32 << shift).into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{shift}");
    }
}

#[test]
fn m07_a_table_larger_than_the_file() {
    for entries in [0x4000_0001, u32::MAX, 1 << 24] {
        let mut store = image();
        change_header(&mut store, |header| header.table_entries = entries.into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{entries:#x}");
    }
}

#[test]
fn m08_a_table_smaller_than_the_disk() {
    for entries in [0, 1, 31] {
        let mut store = image();
        change_header(&mut store, |header| header.table_entries = entries.into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{entries}");
    }
}

#[test]
fn m09_table_offsets() {
    for offset in [0, 511, 512, 1024, 1537, 1 << 40, u64::MAX, u64::MAX - 511] {
        let mut store = image();
        change_header(&mut store, |header| header.table_offset = offset.into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{offset}");
    }
}

#[test]
fn m10_blocks_in_the_headers() {
    for bad in [0, 1, 3, 5] {
        let mut store = image();
        set_entry(&mut store, 0, bad);
        assert_eq!(errno(open_writable(&store)), libc::EINVAL, "{bad}");
        let vhd = open(&store).unwrap();
        assert_eq!(errno(vhd.map(0, 1)), libc::EIO, "{bad}");
        assert!(vhd.map(4096 * 3, 8).is_ok());
    }
}

#[test]
fn m11_blocks_beyond_the_end() {
    let mut store = image();
    let bytes = store.bytes.len() / 2;
    store.bytes.truncate(bytes);
    assert_eq!(errno(open_writable(&store)), libc::EINVAL);
    let vhd = open(&store).unwrap();
    let results = (0..3).map(|block| vhd.map(block * 4096, 1)).collect::<Vec<_>>();
    assert!(results.iter().flat_map(|result| result.as_ref().err()).all(|error| error.errno() == libc::EIO));
    assert!(results.iter().any(Result::is_err));
    assert!(results.iter().any(Result::is_ok));
}

#[test]
fn m12_blocks_that_overlap() {
    let good = image();
    for offset in [0, 1, 4095, 4096] {
        let mut store = good.clone();
        set_entry(&mut store, 5, entry(&good, 0) + offset);
        assert_eq!(errno(open_writable(&store)), libc::EINVAL, "{offset}");
        assert!(open(&store).is_ok());
    }
}

#[test]
fn m13_a_block_beyond_32_bits() {
    for bad in [u32::MAX - 1, u32::MAX - 4096] {
        let mut store = image();
        set_entry(&mut store, 31, bad);
        assert_eq!(errno(open(&store)), libc::EINVAL);
        assert_eq!(errno(open_writable(&store)), libc::EINVAL);
    }
}

#[test]
fn m14_disk_sizes() {
    for (size, expected) in [
        (0, libc::EINVAL),
        (511, libc::EINVAL),
        (513, libc::EINVAL),
        ((2 << 40) + 512, libc::EFBIG),
        (!511, libc::EFBIG),
    ] {
        let mut store = image();
        change_footers(&mut store, |footer| footer.current_size = size.into());
        assert_eq!(errno(open(&store)), expected, "{size}");
        let mut fixed = Shape { kind: DiskType::Fixed, ..Shape::default() }.image(64, 3, None);
        let end = fixed.bytes.len() - 512;
        change_footer(&mut fixed, end, |footer| footer.current_size = size.into());
        assert!(open(&fixed).is_err(), "{size}");
    }
}

#[test]
fn m15_footers_that_differ() {
    // After a stop in a resize the footer at the end, which is younger or older, may have another size.
    for mib in [32_u64, 60] {
        let mut store = image();
        let end = store.bytes.len() - footer::LEN;
        change_footer(&mut store, end, |footer| footer.current_size = (mib << 20).into());
        let vhd = open(&store).unwrap();
        assert_eq!((vhd.sectors(), vhd.was_unclean()), (mib << 11, false));
    }
    // One that the table cannot serve, or of another image, is not used.
    let changes: [fn(&mut RawFooter); 2] =
        [|footer| footer.current_size = (66 << 20).into(), |footer| footer.uuid = Uuid([8; 16])];
    for change in changes {
        let mut store = image();
        let end = store.bytes.len() - footer::LEN;
        change_footer(&mut store, end, change);
        let vhd = open(&store).unwrap();
        assert_eq!((vhd.sectors(), vhd.was_unclean()), (SIZE / 512, true));
    }
}

#[test]
fn m16_locators_that_contradict_themselves_are_skipped() {
    let spaces = [(0, 8), (513, 8), (u32::MAX, 8), (512, 600)];
    for (space, length) in spaces {
        let mut store = child();
        change_header(&mut store, |header| {
            header.locators[0].space = space.into();
            header.locators[0].length = length.into();
        });
        let parent = open(&store).unwrap().parent().unwrap();
        assert_eq!(parent.names.len(), 2);
    }
}

#[test]
fn m17_locators_beyond_the_end_are_skipped() {
    let mut store = child();
    change_header(&mut store, |header| header.locators[1].offset = u64::MAX.into());
    assert_eq!(open(&store).unwrap().parent().unwrap().names.len(), 2);
    let mut store = child();
    change_header(&mut store, |header| {
        for locator in &mut header.locators {
            locator.offset = (1 << 40).into();
        }
    });
    let parent = open(&store).unwrap().parent().unwrap();
    let error = vhd::chain::candidates(std::path::Path::new("/"), &parent).unwrap_err();
    assert_eq!(error.errno(), libc::EINVAL);
}

#[test]
fn m18_names_that_are_no_text_are_skipped() {
    let mut store = child();
    let vhd = open(&store).unwrap();
    let offsets =
        vhd.header().unwrap().locators.map(|locator| usize::try_from(locator.offset.get()).unwrap());
    put(&mut store, offsets[0], &[0xff]);
    put(&mut store, offsets[1], &[0, 0xd8, 0, 0]);
    assert_eq!(open(&store).unwrap().parent().unwrap().names.len(), 1);
}

#[test]
fn m24_a_damaged_batmap_is_started_anew() {
    for (offset, value) in [(0, b'x'), (24, 1), (512, 0xff)] {
        let mut store = image();
        store.bytes[BATMAP + offset] = value;
        assert!(open(&store).is_ok());
        let mut disk = Turns::open(&Shape::default(), store, Vec::new());
        disk.write(vec![(0, vec![1; SECTOR])], &mut Random::new(1));
        let (store, _) = disk.close();
        Shape::default().check(&store, true);
    }
}

#[test]
fn m25_batmap_bits_are_not_believed() {
    // Blocks 0 (partly written) and 9 (not allocated) marked as full, with a good checksum.
    let mut store = image();
    store.bytes[BATMAP + 512] = 0xc0;
    store.bytes[BATMAP + 513] = 0x40;
    put(&mut store, BATMAP + 24, &(!(0xc0_u32 + 0x40)).to_be_bytes());
    let mut vhd = open(&store).unwrap();
    assert_eq!(vhd.map(9 * 4096, 1).unwrap(), Lookup::Zero { count: 1 });
    let Lookup::Load(load @ Load { key: 0, offset, len }) = vhd.map(100, 1).unwrap() else { panic!() };
    let mut bits = vec![0; len as usize];
    store.read_at(offset, &mut bits).unwrap();
    vhd.loaded(&load, &bits).unwrap();
    assert_eq!(vhd.map(100, 1).unwrap(), Lookup::Zero { count: 1 });
}

#[test]
fn m26_a_batmap_beyond_the_end_or_over_data_is_started_anew() {
    for (field, value) in [(8, 1_u64 << 40), (8, u64::MAX), (8, 8192), (8, 4096)] {
        let mut store = image();
        put(&mut store, BATMAP + field, &value.to_be_bytes());
        let vhd = open_writable(&store).unwrap();
        assert_eq!(vhd.batmap().unwrap().0.offset.get(), 2560, "{value}");
    }
    let mut store = image();
    put(&mut store, BATMAP + 16, &u32::MAX.to_be_bytes());
    assert_eq!(open_writable(&store).unwrap().batmap().unwrap().0.sectors.get(), 1);
    // A program that knows no batmap has put a block there.
    let mut store = image();
    put(&mut store, BATMAP, &[0; 512]);
    set_entry(&mut store, 4, 4);
    set_entry(&mut store, 0, u32::MAX);
    set_entry(&mut store, 1, u32::MAX);
    set_entry(&mut store, 2, u32::MAX);
    let vhd = open_writable(&store).unwrap();
    assert!(vhd.batmap().is_none());
    assert_eq!(vhd.end_of_headers(), 2048);
}

#[test]
fn m27_a_pending_journal() {
    let mut store = image();
    change_footers(&mut store, |footer| footer.cookie = footer::POISON);
    assert_eq!(errno(open(&store)), libc::EBUSY);
    let options = OpenOptions { ignore_poison: true, ..OpenOptions::default() };
    assert!(support::open(&store, &options).is_ok());
    // Poison reaches the footers one after the other.
    let mut store = image();
    let end = store.bytes.len() - footer::LEN;
    change_footer(&mut store, end, |footer| footer.cookie = footer::POISON);
    assert_eq!(errno(open(&store)), libc::EBUSY);
}

#[test]
fn m29_short_footers_and_short_files() {
    let mut fixed = Shape { kind: DiskType::Fixed, ..Shape::default() }.image(64, 3, None);
    fixed.bytes.pop();
    assert_eq!(open(&fixed).unwrap().sectors(), 64);
    let mut dynamic = image();
    dynamic.bytes.pop();
    assert!(!open(&dynamic).unwrap().was_unclean());
    for len in [0, 20, 100, 510] {
        let mut store = image();
        store.bytes.truncate(len);
        assert_eq!(errno(open(&store)), libc::EIO, "{len}");
    }
    for len in [511, 512, 513, 1024, 1535, 1536, 2047] {
        let mut store = image();
        store.bytes.truncate(len);
        assert_eq!(errno(open(&store)), libc::EINVAL, "{len}");
    }
}

#[test]
fn m30_an_encrypted_image() {
    let mut store = image();
    store.bytes[BATMAP + 29] = 1;
    assert_eq!(errno(open(&store)), libc::EINVAL);
    let options = OpenOptions { allow_encrypted: true, ..OpenOptions::default() };
    assert!(support::open(&store, &options).is_ok());
}

#[test]
fn old_and_unknown_creators_are_refused() {
    for version in [1_u32, 0x0001_0004, 0x0002_0000] {
        let mut store = image();
        change_footers(&mut store, |footer| footer.creator_version = version.into());
        assert_eq!(errno(open(&store)), libc::EINVAL, "{version:#x}");
    }
}

/// Whatever single byte of the metadata is changed, opening and reading neither panic nor read outside the file.
#[test]
fn every_changed_byte_gives_an_answer() {
    let good = image();
    let mut random = Random::new(7);
    for offset in 0..3584 {
        let mut store = good.clone();
        store.bytes.truncate(1 << 20);
        store.bytes[offset] ^= u8::try_from(1 + random.below(255)).unwrap();
        if offset < 512 {
            change_footer(&mut store, 0, |_| {});
        } else if offset < 1536 {
            change_header(&mut store, |_| {});
        }
        for writable in [false, true] {
            let Ok(vhd) = support::open(&store, &OpenOptions { writable, ..OpenOptions::default() }) else {
                continue;
            };
            for block in 0..vhd.blocks().min(64) {
                let sector = u64::from(block) * u64::from(vhd.block_sectors());
                if let Ok(Lookup::Data { offset, count }) = vhd.map(sector, 1) {
                    assert!(offset + u64::from(count) * 512 <= store.bytes.len() as u64);
                }
            }
        }
    }
}
