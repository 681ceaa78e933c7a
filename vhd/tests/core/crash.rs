//! A machine that stops at any moment: whatever part of the writes since the last flush has reached the storage, in
//! whatever order and torn between any two sectors, the image is valid, has everything that was flushed, and has the old or
//! the new contents of everything else.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use crate::support::{Disk, Layer, Op, Random, SECTOR, Shape, Store, apart};
use format::Source;
use proptest::prelude::*;
use vhd::OpenOptions;
use vhd::check::{self, CheckOptions, Verdict};

#[derive(Debug, Clone)]
enum Step {
    Write(Vec<(u64, u64)>),
    Flush,
    Reopen,
    /// By so many sectors, as far as there is room.
    Grow(u64),
}

/// The first sectors of writes are to be taken modulo the size that the disk has then.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0..MAX_SECTORS, 1..24_u64);
    let step = prop_oneof![
        5 => prop::collection::vec(write, 1..5).prop_map(Step::Write),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => (1..MAX_SECTORS / 3).prop_map(Step::Grow),
    ];
    prop::collection::vec(step, 1..12)
}

/// The most sectors that the table has room for.
const MAX_SECTORS: u64 = 1300;

/// What the parent has everywhere.
const PARENT: u8 = 255;

/// What each sector may hold, by the number of the write that put it there.
#[derive(Clone)]
struct Allowed {
    sectors: Vec<BTreeSet<u8>>,
    /// The sizes that the disk may have.
    sizes: Vec<usize>,
}

/// A parent full of data, so that a sector that wrongly counts as written shows.
fn parent(shape: &Shape, random: &mut Random) -> Disk {
    let mut parent = Disk::create(shape);
    let all = vec![PARENT; usize::try_from(shape.sectors).unwrap() * SECTOR];
    parent.write(vec![(0, all)], random).unwrap();
    parent.snapshot(shape, 2)
}

/// The storage's history with what the sectors may hold after the first so many operations.
struct History {
    start: Store,
    parents: Vec<Rc<RefCell<Layer>>>,
    log: Vec<Op>,
    allowed: Vec<(usize, Allowed)>,
}

fn record(shape: &Shape, steps: &[Step], random: &mut Random) -> History {
    let mut disk = parent(shape, random);
    let start = disk.store.clone();
    let size = usize::try_from(shape.sectors).unwrap();
    let mut now = vec![PARENT; size];
    let mut allowed = Allowed { sectors: vec![BTreeSet::from([PARENT]); size], sizes: vec![size] };
    let mut history = vec![(0, allowed.clone())];
    let mut value = 0_u8;
    for step in steps {
        match step {
            Step::Write(writes) => {
                let size = now.len() as u64;
                let runs = writes.iter().map(|&(first, count)| {
                    value = value % 250 + 1;
                    (first % size, count.min(size - first % size), value)
                });
                let mut batch = Vec::new();
                for (first, count, value) in apart(&runs.collect::<Vec<_>>()) {
                    let (start, count) = (usize::try_from(first).unwrap(), usize::try_from(count).unwrap());
                    allowed.sectors[start..start + count].iter_mut().for_each(|sector| {
                        sector.insert(value);
                    });
                    now[start..start + count].fill(value);
                    batch.push((first, vec![value; count * SECTOR]));
                }
                // From now on the new contents may appear at any time.
                history.push((disk.store.log.len(), allowed.clone()));
                disk.write(batch, random).unwrap();
            }
            Step::Flush => {
                disk.flush();
                allowed.sectors = now.iter().map(|&value| BTreeSet::from([value])).collect();
                history.push((disk.store.log.len(), allowed.clone()));
            }
            Step::Reopen => {
                let (store, parents) = disk.close();
                disk = Disk::open(store, parents).unwrap();
                assert!(!disk.vhd.was_unclean());
            }
            Step::Grow(by) => {
                let sectors = (now.len() as u64 + by).min(MAX_SECTORS);
                now.resize(usize::try_from(sectors).unwrap(), 0);
                allowed.sectors.resize(now.len(), BTreeSet::from([0]));
                allowed.sizes.push(now.len());
                history.push((disk.store.log.len(), allowed.clone()));
                disk.resize(sectors).unwrap();
                // The guest may be told.
                allowed.sizes = vec![now.len()];
                history.push((disk.store.log.len(), allowed.clone()));
            }
        }
    }
    let (store, parents) = disk.close();
    History { start, parents, log: store.log, allowed: history }
}

/// A storage as it may be found after a stop within or behind the first `done` operations.
fn crash(history: &History, done: usize, random: &mut Random) -> Store {
    let mut store = history.start.clone();
    let log = &history.log[..done];
    let flushed = log.iter().rposition(|op| matches!(op, Op::Flush)).map_or(0, |at| at + 1);
    for op in &log[..flushed] {
        store.apply(op);
    }
    // Lengths change in their order, as file systems keep it; any number of the last changes may be lost.
    let lengths = log[flushed..].iter().filter(|op| matches!(op, Op::SetLen(_))).collect::<Vec<_>>();
    for op in &lengths[..random.below(lengths.len() + 1)] {
        store.apply(op);
    }
    let mut pieces = Vec::new();
    for op in &log[flushed..] {
        if let Op::Write(offset, bytes) = op {
            for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                pieces.push(Op::Write(offset + (i * SECTOR) as u64, sector.to_vec()));
            }
        }
    }
    match random.below(4) {
        // Everything, in order: the process died, not the machine.
        0 => {}
        1 => pieces.truncate(random.below(pieces.len() + 1)),
        _ => {
            random.shuffle(&mut pieces);
            pieces.truncate(random.below(pieces.len() + 1));
        }
    }
    // A write beyond a length that was lost makes the file longer or is lost with it.
    let extends = random.below(2) == 0;
    for piece in &pieces {
        let Op::Write(offset, bytes) = piece else { continue };
        let end = usize::try_from(*offset).unwrap() + bytes.len();
        if extends || end <= store.bytes.len() {
            store.apply(piece);
        }
    }
    store
}

fn verify(store: Store, parents: &[Rc<RefCell<Layer>>], allowed: &Allowed, random: &mut Random) {
    check_valid(&store, true);
    let mut disk = Disk::open(store, parents.to_vec()).unwrap();
    let contents = disk.contents();
    let size = contents.len() / SECTOR;
    assert!(allowed.sizes.contains(&size), "{size} sectors instead of {:?}", allowed.sizes);
    for (sector, (bytes, allowed)) in contents.chunks(SECTOR).zip(&allowed.sectors).enumerate() {
        assert!(bytes.iter().all(|b| *b == bytes[0]), "sector {sector} is torn or of nobody");
        assert!(allowed.contains(&bytes[0]), "sector {sector} has {} instead of {allowed:?}", bytes[0]);
    }
    // The image can be written and closed as any other.
    let mut model = contents;
    for _ in 0..4 {
        let first = random.below(size - 1);
        let data = vec![251; SECTOR * 2];
        model[first * SECTOR..][..data.len()].copy_from_slice(&data);
        disk.write(vec![(first as u64, data)], random).unwrap();
    }
    assert!(disk.contents() == model);
    let (store, _) = disk.close();
    assert!(!store.open(&OpenOptions::default()).unwrap().was_unclean());
    check_valid(&store, false);
}

fn check_valid(store: &Store, ignore_footer: bool) {
    let mut read = |offset: u64, buf: &mut [u8]| store.read(offset, buf);
    let mut source = Source { size: store.bytes.len() as u64, regular: store.regular, read: &mut read };
    let options = CheckOptions { ignore_footer, bitmaps: true, now: 2, ..CheckOptions::default() };
    match check::check(&mut source, &options).unwrap() {
        Verdict::Valid(_) => {}
        // The two parts of the batmap may be of different ages; it is not used then. A growth that was cut short has
        // changed one of the footers.
        Verdict::Invalid(reason)
            if ignore_footer
                && (reason == "batmap is invalid: invalid checksum"
                    || reason == "primary and backup footers do not match") => {}
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_stop_at_any_moment_loses_nothing_that_was_flushed(
        steps in steps(), block_size in prop_oneof![Just(4096_u32), Just(16384)], regular: bool, seed: u64
    ) {
        let shape = Shape { regular, max_sectors: MAX_SECTORS, ..Shape::dynamic(block_size, 150) };
        let mut random = Random::new(seed);
        let history = record(&shape, &steps, &mut random);
        for done in 0..=history.log.len() {
            let (_, allowed) = history.allowed.iter().rev().find(|(from, _)| *from <= done).unwrap();
            for _ in 0..3 {
                verify(crash(&history, done, &mut random), &history.parents, allowed, &mut random);
            }
        }
    }
}
