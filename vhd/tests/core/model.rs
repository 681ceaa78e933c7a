//! Images under random use, compared with a vector of bytes.

use format::testing::{Random, SECTOR, Size, Turns, model, seeds};
use vhd::DiskType;

use crate::support::Shape;

fn shape(random: &mut Random) -> Shape {
    Shape {
        kind: random.pick(&[DiskType::Dynamic, DiskType::Dynamic, DiskType::Dynamic, DiskType::Fixed]),
        block_size: random.pick(&[4096, 8192, 1 << 16, 2 << 20]),
        max_sectors: 0,
        regular: random.once_in(2),
        encrypted: false,
        precise: random.once_in(2),
        pristine: true,
    }
}

#[test]
fn a_chain_behaves_like_a_vector_of_bytes() {
    seeds(300, |random| {
        let size = Size { sectors: 1 + random.up_to(1200), longest: 70, ..Size::small() };
        model(&shape(random), &size, random);
    });
}

#[test]
fn an_encrypted_chain_behaves_like_a_vector_of_bytes() {
    seeds(60, |random| {
        let shape = Shape { kind: DiskType::Dynamic, encrypted: true, ..shape(random) };
        model(&shape, &Size { longest: 70, ..Size::small() }, random);
    });
}

#[test]
fn a_growing_disk_behaves_like_a_vector_of_bytes() {
    seeds(100, |random| {
        let shape = Shape { kind: DiskType::Dynamic, max_sectors: 1300, ..shape(random) };
        model(&shape, &Size::small(), random);
    });
}

#[test]
fn more_partly_written_blocks_than_bitmaps_in_memory() {
    let shape = Shape { block_size: 4096, ..Shape::default() };
    let mut random = Random::new(1);
    let mut disk = Turns::create(&shape, 6000 * 8);
    let mut model = vec![0_u8; 6000 * 4096];
    for round in 0..2 {
        for chunk in (0..6000_u64).collect::<Vec<_>>().chunks(100) {
            let sector = |block: u64| block * 8 + round * 3;
            let value = |block: u64| u8::try_from(block % 250).unwrap() + 1;
            let writes = chunk.iter().map(|&b| (sector(b), vec![value(b); SECTOR])).collect();
            disk.write(writes, &mut random);
            for &block in chunk {
                let at = usize::try_from(sector(block)).unwrap() * SECTOR;
                model[at..at + SECTOR].fill(value(block));
            }
        }
    }
    assert!(disk.contents() == model);
    assert!(disk.reopen(&shape).contents() == model);
}
