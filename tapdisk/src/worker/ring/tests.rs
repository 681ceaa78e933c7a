use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use blkif::abi::{HEADER_SIZE, header, op};
use blkif::encode::{Draft, DraftSegment};
use blkif::{Abi, GrantRef, RingOrder};

use tap_ctl::proto::Limits;

use super::*;
use crate::executor::Executor;
use crate::worker::takeover::attached;
use crate::worker::{Begin, Throttle};

/// A page that the test, as the guest, shares with the ring.
#[repr(align(4096))]
struct Page([AtomicU32; 1024]);

struct TestMap(Rc<Page>);

impl GrantMap for TestMap {
    fn as_ptr(&self) -> NonNull<u8> {
        NonNull::from(&self.0.0).cast()
    }

    fn len(&self) -> usize {
        4096
    }
}

struct Guest {
    page: Rc<Page>,
    produced: u32,
}

impl Guest {
    fn word(&self, offset: usize) -> &AtomicU32 {
        &self.page.0[offset / 4]
    }

    /// Puts a request with `segments` whole pages on the ring.
    fn push(&mut self, op: u8, id: u64, segments: usize) {
        let segment = DraftSegment { gref: GrantRef(9), first: 0, last: 7 };
        let raw = Draft::new(op, id, 0, &[segment; 11][..segments]).encode(Abi::X86_64);
        let slot = HEADER_SIZE + (self.produced % 32) as usize * Abi::X86_64.entry_size();
        for (n, word) in raw.as_bytes().chunks_exact(4).enumerate() {
            self.word(slot + 4 * n).store(u32::from_ne_bytes(word.try_into().unwrap()), Ordering::Relaxed);
        }
        self.produced += 1;
        self.word(header::REQ_PROD).store(self.produced, Ordering::Release);
    }

    fn answered(&self) -> u32 {
        self.word(header::RSP_PROD).load(Ordering::Acquire)
    }
}

fn attach(page: &Rc<Page>, journal: &Path, begin: Begin) -> Attached<TestMap> {
    let mapped = MappedRing::attach(TestMap(page.clone()), Abi::X86_64, RingOrder::default()).unwrap();
    attached(mapped, journal, begin).unwrap()
}

fn connect() -> (Guest, Rc<Ring<TestMap>>, Rc<Scheduler>) {
    connect_limited(Throttle::new(Limits::default()))
}

fn connect_limited(throttle: Arc<Throttle>) -> (Guest, Rc<Ring<TestMap>>, Rc<Scheduler>) {
    let page = Rc::new(Page(std::array::from_fn(|_| AtomicU32::new(0))));
    let folder = tempfile::tempdir().unwrap();
    let attached = attach(&page, &folder.path().join("ring"), Begin::Anew);
    let scheduler = Rc::new(Scheduler::default());
    let geometry = Geometry {
        capacity: 1 << 20,
        readonly: false,
        flush: true,
        barrier: true,
        discard: false,
        discard_secure: false,
        max_indirect: 0,
    };
    let gate = Gate::new(throttle);
    let ring = Ring::new((DomId(1), VdevId(51712)), geometry, attached, gate, scheduler.clone());
    (Guest { page, produced: 0 }, Rc::new(ring), scheduler)
}

/// What slots have got, and not answered.
type InFlight = Rc<RefCell<Vec<(usize, Request)>>>;

/// Slot tasks that put what they get into a list and wait for leave to answer it.
fn slots(ring: &Rc<Ring<TestMap>>, scheduler: &Rc<Scheduler>) -> (Executor, InFlight) {
    let executor = Executor::new(scheduler.clone());
    let taken = Rc::new(RefCell::new(Vec::new()));
    for slot in 0..ring.slots() {
        let (ring, taken) = (ring.clone(), taken.clone());
        executor.spawn(async move {
            while let Some(request) = ring.next(slot).await {
                taken.borrow_mut().push((slot, request));
            }
        });
    }
    executor.run_ready();
    (executor, taken)
}

#[test]
fn requests_are_taken_in_order_and_the_ring_sleeps_when_it_is_empty() {
    let (mut guest, ring, scheduler) = connect();
    let (executor, taken) = slots(&ring, &scheduler);
    for id in 0..3 {
        guest.push(op::WRITE, id, 8);
    }
    assert!(ring.has_work());
    assert!(ring.take());
    assert!(!ring.take() && !ring.has_work());
    executor.run_ready();
    let ids: Vec<u64> = taken.borrow().iter().map(|(_, request)| request.id).collect();
    assert_eq!(ids, [0, 1, 2]);
    assert_eq!(ring.arm(), Armed::Listening, "the event channel has not fired");
    guest.push(op::WRITE, 3, 1);
    assert!(!ring.take(), "asleep until the event");
    ring.fired();
    assert!(ring.take());
    assert_eq!(ring.arm(), Armed::Unmask);
    let (slot, request) = taken.borrow_mut().remove(0);
    ring.complete(slot, &request, Status::Okay);
    assert_eq!(guest.answered(), 0);
    ring.push();
    assert_eq!(guest.answered(), 1);
}

#[test]
fn a_request_that_comes_while_the_ring_is_being_armed_is_seen() {
    let (mut guest, ring, scheduler) = connect();
    let (_executor, _taken) = slots(&ring, &scheduler);
    assert!(!ring.take());
    guest.push(op::READ, 1, 1);
    assert_eq!(ring.arm(), Armed::Work);
    assert!(ring.take());
}

/// H38: notifications without work.
#[test]
fn h38_an_event_storm_is_heard_ever_later_and_work_ends_that() {
    let (mut guest, ring, scheduler) = connect();
    let (_executor, _taken) = slots(&ring, &scheduler);
    let fire = || {
        ring.fired();
        ring.take();
        ring.arm()
    };
    for _ in 0..FREE_SPURIOUS {
        assert_eq!(fire(), Armed::Unmask);
    }
    let mut waits = Vec::new();
    for _ in 0..10 {
        let Armed::Later(wait) = fire() else { panic!("not held off") };
        waits.push(wait.as_millis());
        ring.awake.set(true);
        assert_eq!(ring.arm(), Armed::Listening, "nothing but the timer ends it");
        ring.release_hold();
        assert!(!ring.take());
        assert_eq!(ring.arm(), Armed::Unmask);
    }
    assert_eq!(waits, [1, 2, 4, 8, 16, 32, 64, 100, 100, 100]);
    guest.push(op::READ, 1, 1);
    assert_eq!(fire(), Armed::Unmask, "there was work");
    assert_eq!(fire(), Armed::Unmask, "and the count begins anew");
}

#[test]
fn a_barrier_holds_back_what_comes_later_and_waits_for_what_came_before() {
    let (mut guest, ring, scheduler) = connect();
    let (executor, taken) = slots(&ring, &scheduler);
    guest.push(op::WRITE, 1, 1);
    guest.push(op::WRITE_BARRIER, 2, 0);
    guest.push(op::WRITE, 3, 1);
    assert!(ring.take());
    assert_eq!(ring.arm(), Armed::Deaf, "only the barrier's end makes us look again");
    executor.run_ready();
    assert_eq!(taken.borrow().len(), 2, "the write after the barrier is left on the ring");

    let drained = Rc::new(Cell::new(false));
    executor.spawn({
        let (ring, drained) = (ring.clone(), drained.clone());
        async move {
            ring.quiesce(1).await;
            drained.set(true);
        }
    });
    executor.run_ready();
    assert!(!drained.get(), "the write before the barrier is in flight");
    let (slot, before) = taken.borrow_mut().remove(0);
    ring.complete(slot, &before, Status::Okay);
    executor.run_ready();
    assert!(drained.get());

    let (slot, barrier) = taken.borrow_mut().remove(0);
    ring.complete(slot, &barrier, Status::Okay);
    assert!(ring.take());
    executor.run_ready();
    assert_eq!(taken.borrow()[0].1.id, 3);
}

#[test]
fn a_stopped_ring_ends_its_tasks_when_their_requests_have_ended() {
    let (mut guest, ring, scheduler) = connect();
    let (executor, taken) = slots(&ring, &scheduler);
    guest.push(op::FLUSH_DISKCACHE, 1, 0);
    ring.take();
    executor.run_ready();
    ring.stop();
    executor.run_ready();
    guest.push(op::READ, 2, 1);
    assert!(!ring.take());
    let (slot, work) = taken.borrow_mut().remove(0);
    let ended = Rc::new(Cell::new(false));
    executor.spawn({
        let (ring, ended) = (ring.clone(), ended.clone());
        async move {
            ring.drain().await;
            ended.set(true);
        }
    });
    executor.run_ready();
    assert!(!ended.get());
    ring.complete(slot, &work, Status::Okay);
    executor.run_ready();
    assert!(ended.get());
    ring.unmap();
    assert_eq!(Rc::strong_count(&guest.page), 1, "nothing refers to the guest's page any more");
}

/// A flush that failed: the guest must never take its data for safe.
#[test]
fn a_held_request_is_never_answered_and_does_not_keep_the_ring_from_ending() {
    let (mut guest, ring, scheduler) = connect();
    let (executor, taken) = slots(&ring, &scheduler);
    guest.push(op::FLUSH_DISKCACHE, 1, 0);
    ring.take();
    executor.run_ready();
    let (slot, work) = taken.borrow_mut().remove(0);
    let released = Rc::new(Cell::new(false));
    executor.spawn({
        let (ring, released) = (ring.clone(), released.clone());
        async move {
            ring.hold(slot, &work).await;
            released.set(true);
        }
    });
    executor.run_ready();
    assert!(!released.get());
    ring.stop();
    executor.run_ready();
    assert!(released.get());
    assert!(!ring.push());
    assert_eq!(guest.answered(), 0);
}

#[test]
fn a_rejected_request_is_answered_without_a_slot() {
    let (mut guest, ring, scheduler) = connect();
    let (executor, taken) = slots(&ring, &scheduler);
    guest.push(op::WRITE, 1, 0);
    guest.push(200, 2, 0);
    assert!(ring.take());
    executor.run_ready();
    assert!(taken.borrow().is_empty());
    ring.push();
    assert_eq!(guest.answered(), 2);
}

#[test]
fn a_ring_over_its_limit_leaves_requests_where_they_are_and_asks_to_be_looked_at_again() {
    let limits = Limits { iops: 1, burst_iops: 1, ..Limits::default() };
    let throttle = Throttle::new(limits);
    let (mut guest, ring, _) = connect_limited(throttle.clone());
    (0..5).for_each(|id| guest.push(op::READ, id, 1));
    assert!(ring.take() && !ring.take());
    assert_eq!(ring.in_flight(), 2, "the burst, and the one that is owed for");
    assert!(!ring.has_work(), "there is nothing to poll for");
    let Armed::Limited(time) = ring.arm() else { panic!() };
    assert!(time <= Duration::from_secs(1), "{time:?}");
    throttle.set(Limits::default());
    ring.gate().renew();
    assert!(ring.take());
    assert_eq!((ring.in_flight(), ring.gate().waits()), (5, 1));
}
