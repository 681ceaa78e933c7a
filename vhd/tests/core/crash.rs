//! A machine that stops at any moment, and a storage that fails.

use format::testing::{
    Allowed, Job, Memory, Random, Size, Subject, Turns, crash, crash_states, faults, seeds, stamps,
};

use crate::support::Shape;

fn shape(random: &mut Random) -> Shape {
    let (block_size, regular) = (random.pick(&[4096, 16384]), random.once_in(2));
    let precise = random.once_in(3);
    Shape { block_size, regular, precise, max_sectors: 1300, ..Shape::default() }
}

#[test]
fn a_stop_at_any_moment_loses_nothing_that_was_flushed() {
    seeds(60, |random| crash(&shape(random), &Size::small(), random));
}

#[test]
fn a_failing_storage_loses_nothing_that_was_answered() {
    seeds(300, |random| faults(&shape(random), &Size::small(), random));
}

/// The first block's bitmap comes just where the footer is. If that were still there when the table's entry is and the bitmap is
/// not, its bytes would be taken for a bitmap, and zeros hide what the parent has.
#[test]
fn a_stop_while_the_footer_makes_way_for_a_bitmap() {
    const SECTORS: u64 = 144;
    let with_room = |entries: u64| Shape { block_size: 4096, max_sectors: 8 * entries, ..Shape::default() };
    // The data are to begin at a multiple of 4096, so the footer is to lie one sector before.
    let fits = |shape: &Shape| {
        let parent = Turns::create(shape, SECTORS);
        (shape.create(SECTORS, 2, Some(&parent)).bytes.len() as u64).is_multiple_of(4096)
    };
    // Another sector of the table each.
    let shape = (1..=8).map(|sectors| with_room(128 * sectors)).find(fits).unwrap();
    seeds(40, |random| {
        let mut parent = Turns::create(&shape, SECTORS);
        parent.write(vec![(0, stamps(0, SECTORS, 255))], random);
        let mut disk = parent.snapshot(&shape, 2);
        let start = Memory::of(disk.image.storage().bytes.clone(), true);
        let from = disk.image.storage().log.len();
        let mut allowed = Allowed::exactly(&disk.contents());
        let jobs = [Job::Write { sector: 9, data: stamps(9, 3, 1) }];
        allowed.allow(&jobs);
        disk.run(jobs.to_vec(), random).into_iter().for_each(|result| result.unwrap());
        let log = disk.image.storage().log[from..].to_vec();
        let parents = disk.close().1;
        crash_states(&start, &log, 8, random, |_, state, _| {
            shape.check(&state, false);
            allowed.verify(&Turns::open(&shape, state, parents.clone()).contents());
        });
    });
}

/// What the table holds behind its last entry may be anything: it means nothing, until the disk grows.
#[test]
fn a_stop_while_a_disk_grows_over_what_is_left_in_its_table() {
    const SECTORS: u64 = 144;
    const LARGEST: u64 = 1296;
    seeds(40, |random| {
        let (block_size, regular) = (4096, random.once_in(2));
        let shape = Shape { block_size, regular, max_sectors: LARGEST, ..Shape::default() };
        let mut image = shape.image(SECTORS, 1, None);
        // The header's table offset, behind the footer's copy.
        let table = usize::try_from(u64::from_be_bytes(image.bytes[528..536].try_into().unwrap())).unwrap();
        let left = &mut image.bytes[table..][..usize::try_from(LARGEST / 2).unwrap()];
        let entry = random.pick(&[0, 3, 40]);
        left[usize::try_from(SECTORS / 2).unwrap()..].fill(entry);
        let mut disk = Turns::open(&shape, image, Vec::new());
        disk.write(vec![(3, stamps(3, SECTORS - 3, 1))], random);
        disk.flush();
        let (old, start) = (disk.contents(), disk.image.storage().clone());
        disk.resize(LARGEST).unwrap();
        let new = disk.contents();
        let log = disk.image.storage().log[start.log.len()..].to_vec();
        crash_states(&Memory::of(start.bytes, regular), &log, 6, random, |done, state, _| {
            shape.check(&state, false);
            let found = Turns::open(&shape, state, Vec::new()).contents();
            assert!(found == old || found == new, "after {done} operations");
        });
    });
}
