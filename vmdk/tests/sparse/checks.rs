//! The checks that every format passes.

use format::blocking::{Blocking, nothing};
use format::testing::{Random, Size, Subject, Turns, crash, faults, model, seeds, stamps};

use crate::support::{Shape, contents, made, open};

fn shape(random: &mut Random) -> Shape {
    let (grain, entries) = [(8, 4), (1, 128), (16, 3), (8, 200), (128, 512)][random.below(5)];
    Shape { grain, entries, redundant: random.once_in(2), tables: !random.once_in(3), cache: 3 }
}

#[test]
fn an_extent_behaves_like_a_vector_of_bytes() {
    seeds(300, |random| model(&shape(random), &Size::small(), random));
}

#[test]
fn a_stop_at_any_moment_loses_nothing_that_was_flushed() {
    seeds(60, |random| crash(&shape(random), &Size::small(), random));
}

#[test]
fn a_failing_storage_loses_nothing_that_was_answered() {
    seeds(200, |random| faults(&shape(random), &Size::small(), random));
}

#[test]
fn both_kinds_of_tables_say_the_same_in_the_end() {
    for tables in [false, true] {
        let shape = Shape { grain: 8, entries: 128, redundant: true, tables, cache: 9 };
        let mut disk = Turns::create(&shape, 8 * 128 * 3);
        for (sector, count) in [(5, 100), (8 * 128 * 2 + 9, 40)] {
            disk.write(vec![(sector, stamps(sector, count, 1))], &mut Random::new(2));
        }
        let expected = disk.contents();
        let (mut file, _) = disk.close();
        // By the redundant directory alone the disk is the same.
        let redundant: [u8; 8] = file.bytes[48..56].try_into().unwrap();
        file.bytes[56..64].copy_from_slice(&redundant);
        file.bytes[8] = 1;
        let mut image = Blocking::new(open(&file, false).unwrap(), file);
        assert!(contents(&mut image) == expected, "{tables}");
    }
}

#[test]
fn the_first_write_marks_the_file_and_changes_the_content_identifier_and_closing_unmarks_it() {
    let file = made(1000);
    let cid = open(&file, true).unwrap().descriptor().unwrap().cid;
    let mut image = Blocking::new(open(&file, true).unwrap(), file.clone());
    image.close().unwrap();
    assert!(image.storage().bytes == file.bytes, "nothing was written, nothing has changed");
    image.write(3, &[7; 512], &mut nothing).unwrap();
    let marked = open(image.storage(), false).unwrap();
    assert!(marked.header().unclean);
    assert_ne!(marked.descriptor().unwrap().cid, cid);
    image.close().unwrap();
    assert!(!open(image.storage(), false).unwrap().header().unclean);
    let text =
        |bytes: &[u8]| String::from_utf8_lossy(&bytes[512..21 * 512]).replace(char::is_alphanumeric, "x");
    assert_eq!(text(&image.storage().bytes), text(&file.bytes));
}

#[test]
fn new_images_are_in_order() {
    let shape = Shape { grain: 128, entries: 512, redundant: true, tables: true, cache: 9 };
    for sectors in [1, 127, 128, 65536, 65537, 1 << 25] {
        let file = made(sectors);
        shape.check(&file, true);
        assert_eq!(open(&file, true).unwrap().header().capacity, sectors);
    }
    assert!(vmdk::NewImage { sectors: 0, name: "x".into() }.build().is_err());
    assert!(vmdk::NewImage { sectors: 1 << 32, name: "x".into() }.build().is_err());
    assert!(vmdk::NewImage { sectors: 9, name: "a/b".into() }.build().is_err());
    assert!(vmdk::NewImage { sectors: 9, name: "a\"b".into() }.build().is_err());
}
