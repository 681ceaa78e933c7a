use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn runs_never_overlap_and_come_back(
        ops in prop::collection::vec((prop_oneof![1usize..12, 50usize..140], any::<bool>()), 1..300),
    ) {
        let mut runs = Runs::new(200);
        let mut live: Vec<(usize, usize)> = Vec::new();
        for (count, give) in ops {
            if give && !live.is_empty() {
                let (first, count) = live.swap_remove(count % live.len());
                runs.give(first, count);
            } else {
                let mut taken = [false; 200];
                live.iter().for_each(|&(first, count)| taken[first..first + count].fill(true));
                let fit = taken.windows(count).position(|pages| pages.iter().all(|&page| !page));
                let first = runs.take(count);
                prop_assert_eq!(first, fit, "the first place where it fits");
                live.extend(first.map(|first| (first, count)));
            }
        }
        for (first, count) in live.drain(..) {
            runs.give(first, count);
        }
        prop_assert!(runs.is_unused());
        prop_assert_eq!(runs.take(200), Some(0));
    }
}

#[test]
fn a_pool_keeps_to_its_budget() {
    let pool = Pool::new(Rc::default(), 10 * PAGE_SIZE).unwrap();
    let big = pool.data(9 * PAGE_SIZE).unwrap();
    assert!(pool.data(2 * PAGE_SIZE).is_none());
    let small = pool.data(1).unwrap();
    assert!(pool.data(1).is_none());
    drop(big);
    assert!(pool.data(9 * PAGE_SIZE).is_some());
    drop(small);
}

#[test]
fn a_buffer_lies_in_one_chunk() {
    let pool = Pool::new(Rc::default(), 2 * MAX_DATA).unwrap();
    let half = pool.data(MAX_DATA / 2 + 1).unwrap();
    let whole = pool.data(MAX_DATA).unwrap();
    assert!(pool.data(MAX_DATA / 2).is_none(), "only less than half a chunk is left");
    drop((half, whole));
    assert!(pool.data(MAX_DATA + 1).is_none());
}

#[test]
fn trimmed_memory_is_zero_and_can_be_used_again() {
    let scheduler = Rc::new(Scheduler::default());
    let pool = Pool::new(scheduler.clone(), 2 * MAX_DATA).unwrap();
    pool.register_with(Reactor::new(scheduler, crate::reactor::EngineChoice::Auto).unwrap());
    let mut kept = pool.data(PAGE_SIZE).unwrap();
    kept.bytes_mut().fill(1);
    pool.data(MAX_DATA).unwrap().bytes_mut().fill(2);
    pool.trim();
    assert!(pool.holds_memory(), "one chunk is in use");
    assert!(kept.bytes().iter().all(|&byte| byte == 1));
    assert!(pool.data(MAX_DATA).unwrap().bytes().iter().all(|&byte| byte == 0));
    drop(kept);
    pool.trim();
    assert!(!pool.holds_memory());
}

#[test]
fn pieces_stay_inside_their_buffer() {
    let pool = Pool::new(Rc::default(), PAGE_SIZE).unwrap();
    let mut buf = pool.data(1024).unwrap();
    buf.bytes_mut().fill(7);
    buf.zero(512..1024);
    assert!(buf.bytes()[..512].iter().all(|&b| b == 7));
    assert!(buf.bytes()[512..].iter().all(|&b| b == 0));
    assert!(buf.piece(512..1025).is_none());
    assert!(buf.piece(512..512).is_none());
    let piece = buf.piece(512..1024).unwrap();
    assert_eq!(piece.rest(500).unwrap().len, 12);
    assert!(piece.rest(512).is_none());
}

/// Two pages that play a guest's.
#[repr(align(4096))]
struct Pages(Cell<[u8; 2 * PAGE_SIZE]>);

impl GuestMemory for Pages {
    fn span(&self) -> (NonNull<u8>, usize) {
        (NonNull::from(&self.0).cast(), 2 * PAGE_SIZE)
    }
}

#[test]
fn bytes_are_copied_between_a_guests_pages_and_a_buffer() {
    let pages = Rc::new(Pages(Cell::new([3; 2 * PAGE_SIZE])));
    let pool = Pool::new(Rc::default(), PAGE_SIZE).unwrap();
    let own = pool.data(1024).unwrap();
    let guest = GuestBytes::new(pages.clone(), 4000..4512).unwrap();
    assert!(guest.copy_to(&own, 512));
    assert_eq!((own.bytes()[511], own.bytes()[512]), (0, 3));
    assert!(GuestBytes::new(pages.clone(), 4100..4612).unwrap().fill_from(&own, 0));
    assert_eq!((pages.0.get()[4099], pages.0.get()[4100], pages.0.get()[4612]), (3, 0, 3));
    assert!(!guest.copy_to(&own, 513), "beyond the buffer");
    assert!(!guest.fill_from(&own, 513), "beyond the buffer");
    assert!(!own.copy_to(0..512, &own, 256), "over itself");
    assert!(GuestBytes::new(pages, 8000..8193).is_none());
}
