//! Xen's extended header.

use format::blocking::{Blocking, nothing};
use format::testing::{Memory, Random, Subject, Turns, stamps};

use crate::support::{Shape, open, put};

const OLD: Shape =
    Shape { cluster_bits: 12, l2_bits: 6, xen: Some(1), encrypted: false, device: None, tables: 8 };

/// An image of two tables with some data, as Xen 3.2 wrote it: like that of today, but for the byte order of the directory.
fn old_image() -> (Memory, Vec<u8>) {
    let today = Shape { xen: Some(3), ..OLD };
    let mut disk = Turns::create(&today, 1024);
    disk.write(vec![(3, stamps(3, 20, 1)), (600, stamps(600, 9, 2))], &mut Random::new(1));
    let contents = disk.contents();
    let (mut file, _) = disk.close();
    for entry in file.bytes[4096..4112].chunks_mut(8) {
        entry.reverse();
    }
    file.bytes[63] = 1;
    file.log.clear();
    (file, contents)
}

fn contents(file: &Memory) -> Vec<u8> {
    let mut image = Blocking::new(open(file, false).unwrap(), file.clone());
    let mut contents = vec![0x5a; 1024 * 512];
    image.read(0, &mut contents, &mut nothing).unwrap();
    contents
}

#[test]
fn a_little_endian_directory_is_read_without_a_change() {
    let (file, expected) = old_image();
    assert!(contents(&file) == expected);
    let disk = Turns::open(&OLD, file.clone(), Vec::new());
    let (closed, _) = disk.close();
    assert!(closed.bytes == file.bytes, "opening and closing writes nothing");
}

#[test]
fn the_first_new_cluster_puts_the_directory_right_and_other_writes_do_not() {
    let (file, mut expected) = old_image();
    let mut disk = Turns::open(&OLD, file, Vec::new());
    disk.write(vec![(4, stamps(4, 2, 9))], &mut Random::new(1));
    assert_eq!(disk.image.storage().bytes[63], 1, "nothing was allocated");
    disk.write(vec![(300, stamps(300, 1, 9))], &mut Random::new(1));
    put(&mut expected, 4 * 512, &stamps(4, 2, 9));
    put(&mut expected, 300 * 512, &stamps(300, 1, 9));
    assert!(disk.contents() == expected);
    let (file, _) = disk.close();
    assert_eq!(
        file.bytes[56..64],
        [0, 0, 0, 1, 0, 0, 0, 3],
        "its clusters do not follow their table, and it says so"
    );
    assert_ne!(file.bytes[40..48], [0, 0, 0, 0, 0, 0, 0x10, 0], "the directory has moved");
    assert!(contents(&file) == expected);
    OLD.check(&file, true);
}

#[test]
fn an_unfinished_conversion_is_seen_by_where_the_entries_point() {
    let (mut file, expected) = old_image();
    for entry in file.bytes[4096..4112].chunks_mut(8) {
        entry.reverse();
    }
    assert!(contents(&file) == expected, "big endian, although the flag is missing");
}

#[test]
fn the_checksum_is_right_after_closing_and_a_wrong_one_does_not_matter() {
    let shape = Shape { xen: Some(3), ..OLD };
    let mut disk = Turns::create(&shape, 1024);
    disk.write(vec![(3, stamps(3, 20, 1))], &mut Random::new(1));
    let (mut file, _) = disk.close();
    let core = open(&file, false).unwrap();
    let stored = core.header().xen.unwrap().checksum;
    // The MD5 that md5sum says of the two entries, 0x2000 and 0.
    assert_eq!(file.bytes[4096..4112], [0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(stored, u32::from_le_bytes([0x31, 0x6b, 0x5d, 0x40]));
    put(&mut file.bytes, 52, &[1, 2, 3, 4]);
    assert!(contents(&file) == Turns::open(&shape, file.clone(), Vec::new()).contents());
}

#[test]
fn the_room_of_a_reserved_file_is_used() {
    let shape = Shape { xen: Some(2), ..OLD };
    let mut file = shape.image(1024, None);
    file.bytes.resize(1 << 20, 0);
    let mut disk = Turns::open(&shape, file, Vec::new());
    disk.write(vec![(0, stamps(0, 1024, 5))], &mut Random::new(1));
    let mut disk = disk.reopen(&shape);
    disk.write(vec![(0, stamps(0, 1024, 6))], &mut Random::new(1));
    assert_eq!(disk.image.storage().bytes.len(), 1 << 20);
    assert!(disk.contents() == stamps(0, 1024, 6));
}
