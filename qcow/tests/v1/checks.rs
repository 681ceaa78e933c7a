//! The checks that every format passes.

use format::blocking::Storage;
use format::testing::{Op, Random, SECTOR, Size, Turns, crash, faults, model, seeds, stamps};

use crate::support::Shape;

/// The shapes that differ in what the core does with them.
fn shape(random: &mut Random) -> Shape {
    let (cluster_bits, l2_bits) = [(9, 6), (10, 6), (12, 9), (13, 6), (9, 12)][random.below(5)];
    let shape = Shape::new(cluster_bits, l2_bits);
    match random.below(6) {
        0 => Shape { xen: Some(3), ..shape },
        1 => Shape { xen: Some(1), ..shape },
        2 => Shape { xen: Some(2), ..shape },
        3 => Shape { encrypted: true, ..shape },
        4 => Shape { device: Some(4 << 20), ..shape },
        _ => shape,
    }
}

#[test]
fn a_chain_behaves_like_a_vector_of_bytes() {
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
fn more_tables_than_stay_in_memory() {
    let shape = Shape::new(9, 6);
    let mut random = Random::new(7);
    let mut disk = Turns::create(&shape, 64 * 200);
    let mut model = vec![0; 64 * 200 * SECTOR];
    for round in 0..2_u8 {
        for tables in (0..200_u64).collect::<Vec<_>>().chunks(20) {
            let sector = |table: &u64| table * 64 + 10 + u64::from(round) * 30;
            let writes = tables.iter().map(|table| (sector(table), stamps(sector(table), 2, round + 1)));
            for (sector, data) in writes.clone() {
                model[usize::try_from(sector).unwrap() * SECTOR..][..data.len()].copy_from_slice(&data);
            }
            disk.write(writes.collect(), &mut random);
        }
    }
    assert!(disk.contents() == model);
    assert!(disk.reopen(&shape).contents() == model);
}

#[test]
fn writers_of_neighbouring_clusters_share_one_place_and_one_commit() {
    let shape = Shape::new(9, 12);
    let mut disk = Turns::create(&shape, 4096);
    let before = disk.image.storage().log.len();
    disk.write(vec![(8, stamps(8, 64, 3))], &mut Random::new(1));
    let log = &disk.image.storage().log[before..];
    let writes = log.iter().filter(|op| matches!(op, Op::Write(..))).count();
    assert_eq!(writes, 3, "the data, the table, and the entry of the directory");
    assert_eq!(disk.read(8, 64), stamps(8, 64, 3));
    assert!(disk.image.storage().size().unwrap().is_multiple_of(512));
}
