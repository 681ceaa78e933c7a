//! Images under random use, compared with a vector of bytes.

use crate::support::{Disk, Random, SECTOR, Shape, Store, apart};
use format::Source;
use proptest::prelude::*;
use vhd::check::{self, CheckOptions, Verdict};
use vhd::{DiskType, bitmap};

#[derive(Debug, Clone)]
enum Step {
    /// First sector, number of sectors and value of each of several writes at a time.
    Write(Vec<(u64, u64, u8)>),
    Flush,
    Reopen,
    Snapshot,
}

fn steps(sectors: u64, longest: u64) -> impl Strategy<Value = Vec<Step>> {
    let write = (0..sectors, 1..longest, 1_u8..)
        .prop_map(move |(first, count, value)| (first, count.min(sectors - first), value));
    let step = prop_oneof![
        6 => prop::collection::vec(write, 1..6).prop_map(Step::Write),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Snapshot),
    ];
    prop::collection::vec(step, 1..24)
}

fn shapes() -> impl Strategy<Value = Shape> {
    let kind = prop_oneof![4 => Just(DiskType::Dynamic), 1 => Just(DiskType::Fixed)];
    let block_size = prop_oneof![Just(4096), Just(8192), Just(1 << 16), Just(2 << 20)];
    (kind, block_size, any::<bool>(), 1_u64..1200).prop_map(|(kind, block_size, regular, sectors)| Shape {
        kind,
        block_size,
        sectors,
        max_sectors: 0,
        regular,
    })
}

fn run(shape: Shape, steps: Vec<Step>, seed: u64) {
    let mut random = Random::new(seed);
    let mut disk = Disk::create(&shape);
    let mut model = vec![0_u8; usize::try_from(shape.sectors).unwrap() * SECTOR];
    let mut depth = 1;
    for step in steps {
        match step {
            Step::Write(writes) => {
                let writes = apart(&writes);
                let data = |&(first, count, value): &(u64, u64, u8)| {
                    (first, vec![value; usize::try_from(count).unwrap() * SECTOR])
                };
                disk.write(writes.iter().map(data).collect(), &mut random).unwrap();
                for (first, data) in writes.iter().map(data) {
                    let start = usize::try_from(first).unwrap() * SECTOR;
                    model[start..start + data.len()].copy_from_slice(&data);
                }
            }
            Step::Flush => disk.flush(),
            Step::Reopen => {
                let (store, parents) = disk.close();
                disk = Disk::open(store, parents).unwrap();
                assert!(!disk.vhd.was_unclean());
            }
            Step::Snapshot if depth < 4 => {
                depth += 1;
                disk = disk.snapshot(&shape, depth);
            }
            Step::Snapshot => {}
        }
        assert!(disk.contents() == model);
    }
    let (store, parents) = disk.close();
    validate(&store);
    for parent in &parents {
        validate(&parent.borrow().store);
    }
}

/// The image passes all checks, and sectors that no bit marks are zeros on disk.
fn validate(store: &Store) {
    let mut read = |offset: u64, buf: &mut [u8]| store.read(offset, buf);
    let mut source = Source { size: store.bytes.len() as u64, regular: store.regular, read: &mut read };
    let options = CheckOptions { bitmaps: true, now: 2, ..CheckOptions::default() };
    let vhd = match check::check(&mut source, &options).unwrap() {
        Verdict::Fixed => return,
        Verdict::Valid(vhd) => vhd,
        Verdict::Invalid(reason) => panic!("{reason}"),
    };
    let sectors = vhd.block_sectors();
    for block in 0..vhd.blocks() {
        let Some(entry) = vhd.block_entry(block) else { continue };
        let bits = entry as usize * SECTOR;
        let data = bits + (sectors.div_ceil(8) as usize).next_multiple_of(SECTOR);
        for sector in (0..sectors).filter(|&sector| !bitmap::get(&store.bytes[bits..data], sector)) {
            let at = data + sector as usize * SECTOR;
            assert!(store.bytes[at..at + SECTOR].iter().all(|&b| b == 0), "block {block} sector {sector}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_chain_behaves_like_a_vector_of_bytes(
        (shape, steps) in shapes().prop_flat_map(|s| (Just(s), steps(s.sectors, 70))), seed: u64
    ) {
        run(shape, steps, seed);
    }
}

#[test]
fn more_partly_written_blocks_than_bitmaps_in_memory() {
    let shape = Shape::dynamic(4096, 6000 * 8);
    let mut random = Random::new(1);
    let mut disk = Disk::create(&shape);
    let mut model = vec![0_u8; 6000 * 4096];
    for round in 0..2 {
        for chunk in (0..6000_u64).collect::<Vec<_>>().chunks(100) {
            let sector = |block: u64| block * 8 + round * 3;
            let value = |block: u64| u8::try_from(block % 250).unwrap() + 1;
            let writes = chunk.iter().map(|&b| (sector(b), vec![value(b); SECTOR])).collect();
            disk.write(writes, &mut random).unwrap();
            for &block in chunk {
                let at = usize::try_from(sector(block)).unwrap() * SECTOR;
                model[at..at + SECTOR].fill(value(block));
            }
        }
    }
    assert!(disk.contents() == model);
    let (store, parents) = disk.close();
    assert!(Disk::open(store, parents).unwrap().contents() == model);
}
