use proptest::prelude::*;

use super::*;

#[test]
fn the_layout_is_the_documented_one() {
    let mut log = Log::new(65 * BLOCK);
    log.set_parent("00112233-4455-6677-8899-aabbccddeeff".parse().unwrap());
    log.set_child(Uuid([9; 16]));
    log.set_consistent(1);
    assert_eq!(log.mark(&(3 * BLOCK..3 * BLOCK + 1)), 48..56);
    assert_eq!(log.mark(&(64 * BLOCK..65 * BLOCK)), 56..64);
    let mut expected = vec![0_u8; 64];
    for (at, byte) in (0..16).zip((0_u8..16).map(|n| n * 0x11)) {
        expected[at] = byte;
    }
    expected[16..32].fill(9);
    expected[32..36].copy_from_slice(&1_i32.to_ne_bytes());
    expected[40..48].copy_from_slice(&(65 * BLOCK).to_ne_bytes());
    expected[48..56].copy_from_slice(&8_u64.to_ne_bytes());
    expected[56..64].copy_from_slice(&1_u64.to_ne_bytes());
    assert_eq!(log.bytes(0..u64::MAX), expected);
    assert_eq!(log.len(), 64);
    assert_eq!(Log::parse(&expected), Ok(log));
}

#[test]
fn a_uuid_is_read_as_it_is_written_and_nothing_else_is() {
    let text = "e0cad18b-a961-480f-b730-37663ca1d819";
    assert_eq!(text.parse::<Uuid>().unwrap().to_string(), text);
    assert_eq!(text.to_uppercase().parse::<Uuid>().unwrap().to_string(), text);
    for wrong in
        ["", "e0cad18b", "e0cad18ba961480fb73037663ca1d819", &format!("{text}0"), &text.replace('e', "g")]
    {
        assert!(wrong.parse::<Uuid>().is_err(), "{wrong:?}");
    }
}

#[test]
fn sizes_of_bitmaps_are_whole_words() {
    for (size, len) in [(1, 8), (64 * BLOCK, 8), (64 * BLOCK + 1, 16), (1 << 40, 2 << 20)] {
        assert_eq!(bitmap_len(size), len, "{size}");
    }
    assert_eq!(bitmap_len(u64::MAX), 1 << 45);
}

#[test]
fn a_short_file_is_refused_before_memory_is_taken_for_it() {
    assert_eq!(Log::parse(&[0; 47]), Err(Error::NoHeader));
    let header = Header { size: u64::MAX, ..Header::default() };
    let error = Log::parse(&header.to_bytes()).unwrap_err();
    assert_eq!(error, Error::ShortBitmap { size: u64::MAX, found: 0 });
}

#[test]
fn a_log_grows_but_never_shrinks() {
    let mut log = Log::new(BLOCK);
    log.mark(&(0..1));
    log.grow(100 * BLOCK).unwrap();
    assert_eq!((log.len(), log.count()), (64, 1));
    assert_eq!(log.grow(BLOCK), Err(Error::Shrinks { size: 100 * BLOCK, asked: BLOCK }));
}

#[test]
fn a_parent_is_merged_into_a_child_that_is_as_large() {
    let (mut parent, mut child) = (Log::new(64 * BLOCK), Log::new(65 * BLOCK));
    parent.mark(&(0..2 * BLOCK));
    child.mark(&(BLOCK..3 * BLOCK));
    child.merge(&parent).unwrap();
    assert_eq!(child.bytes(48..56), 7_u64.to_ne_bytes());
    assert_eq!(parent.merge(&child), Err(Error::TooSmall { own: 64 * BLOCK, other: 65 * BLOCK }));
}

proptest! {
    #[test]
    fn marks_are_those_of_a_list_of_blocks(
        blocks in 1_u64..300, ranges in prop::collection::vec((0_u64..310 * BLOCK, 0_u64..80 * BLOCK), 0..20)
    ) {
        let size = blocks * BLOCK - 512;
        let mut log = Log::new(size);
        let mut model = vec![false; 400];
        for (start, len) in ranges {
            let range = start..start + len;
            let before = log.bytes(0..log.len());
            let changed = log.mark(&range);
            let touched: Vec<usize> = (0..blocks)
                .filter(|block| block * BLOCK < range.end.min(size) && range.start < (block + 1) * BLOCK)
                .filter(|_| len > 0 && start < size)
                .map(|block| usize::try_from(block).unwrap())
                .collect();
            touched.iter().for_each(|&block| model[block] = true);
            prop_assert!(touched.is_empty() || log.is_marked(&(range.start..range.end.min(size))));
            // What lies outside the range that is said to have changed has not.
            let after = log.bytes(0..log.len());
            for (at, (old, new)) in before.iter().zip(&after).enumerate() {
                prop_assert!(old == new || changed.contains(&(at as u64)));
            }
        }
        prop_assert_eq!(log.count(), model.iter().filter(|&&marked| marked).count() as u64);
        for (block, &marked) in model.iter().enumerate().take(usize::try_from(blocks).unwrap()) {
            let start = block as u64 * BLOCK;
            prop_assert_eq!(log.is_marked(&(start..start + 1)), marked);
        }
        prop_assert_eq!(Log::parse(&log.bytes(0..u64::MAX)), Ok(log));
    }

    #[test]
    fn any_part_of_the_file_is_that_part(start in 0_u64..100, len in 0_u64..100) {
        let mut log = Log::new(200 * BLOCK);
        log.mark(&(5 * BLOCK..150 * BLOCK));
        let all = log.bytes(0..log.len());
        let (from, to) = (start.min(log.len()), (start + len).min(log.len()));
        prop_assert_eq!(&log.bytes(start..start + len)[..], &all[usize::try_from(from).unwrap()..usize::try_from(to).unwrap()]);
    }

    #[test]
    fn no_content_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(mut log) = Log::parse(&bytes) {
            log.mark(&(0..u64::MAX));
        }
    }
}
