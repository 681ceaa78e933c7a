//! The ring in memory: against a model of two queues, and with a frontend that misbehaves.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::abi::header::{REQ_EVENT, REQ_PROD, RSP_EVENT, RSP_PROD};
use crate::encode::{Draft, DraftSegment};
use crate::ids::GrantRef;

/// Page-aligned memory of a ring, with the frontend's view of it.
#[derive(Debug)]
struct Guest {
    words: Box<[Page]>,
    abi: Abi,
    order: RingOrder,
    req_prod: u32,
    rsp_cons: u32,
}

#[repr(align(4096))]
#[derive(Debug)]
struct Page([AtomicU32; 1024]);

impl Guest {
    /// A ring whose counters start at `start`, as after `start` requests and responses.
    fn new(abi: Abi, order: RingOrder, start: u32) -> Guest {
        let words: Box<[Page]> =
            (0..order.pages()).map(|_| Page([const { AtomicU32::new(0) }; 1024])).collect();
        let guest = Guest { words, abi, order, req_prod: start, rsp_cons: start };
        guest.word(REQ_PROD).store(start, Ordering::Relaxed);
        guest.word(RSP_PROD).store(start, Ordering::Relaxed);
        guest.word(REQ_EVENT).store(start.wrapping_add(1), Ordering::Relaxed);
        guest.word(RSP_EVENT).store(start.wrapping_add(1), Ordering::Relaxed);
        guest
    }

    fn attach(&self) -> Result<BackRing, AttachError> {
        // SAFETY: the tests keep the guest alive longer than the ring, and access its words only as atomics.
        unsafe { BackRing::attach(NonNull::from_ref(&self.words[0]).cast(), self.abi, self.order) }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        &self.words[offset / 4096].0[offset % 4096 / 4]
    }

    fn slot(&self, position: u32) -> usize {
        HEADER_SIZE + (position % self.abi.slots(self.order)) as usize * self.abi.entry_size()
    }

    fn write_request(&mut self, draft: &Draft) {
        let raw = draft.encode(self.abi);
        let at = self.slot(self.req_prod);
        for (i, bytes) in raw.as_bytes().chunks(4).enumerate() {
            self.word(at + i * 4).store(u32::from_ne_bytes(bytes.try_into().unwrap()), Ordering::Relaxed);
        }
        self.req_prod = self.req_prod.wrapping_add(1);
    }

    /// True: the backend wants to be notified.
    fn push_requests(&mut self, count: usize) -> bool {
        let old = self.req_prod.wrapping_sub(u32::try_from(count).unwrap());
        crate::indices::publish(self.word(REQ_PROD), self.word(REQ_EVENT), old, self.req_prod)
    }

    fn push_one(&mut self, id: u64) -> bool {
        self.write_request(&Draft::new(0, id, id, &[]));
        self.push_requests(1)
    }

    /// The responses published since the last call.
    fn responses(&mut self) -> Vec<Response> {
        let mut out = Vec::new();
        while self.rsp_cons != self.word(RSP_PROD).load(Ordering::Acquire) {
            let at = self.slot(self.rsp_cons);
            let mut bytes = [0; 16];
            for i in 0..self.abi.response_size() / 4 {
                let word = self.word(at + i * 4).load(Ordering::Relaxed);
                bytes[i * 4..i * 4 + 4].copy_from_slice(&word.to_ne_bytes());
            }
            out.push(Response::decode(bytes));
            self.rsp_cons = self.rsp_cons.wrapping_add(1);
        }
        out
    }
}

fn id_of(raw: &RawRequest) -> u64 {
    let at = if raw.abi() == Abi::X86_64 { 8 } else { 4 };
    u64::from_le_bytes(raw.as_bytes()[at..at + 8].try_into().unwrap())
}

const ORDER0: RingOrder = RingOrder::new(0).unwrap();

/// What an entry does not use is left from the slot's last use: nothing of it reaches the copy.
#[test]
fn only_what_an_entry_uses_is_copied() {
    for abi in [Abi::X86_64, Abi::X86_32] {
        let head = if abi == Abi::X86_64 { 24 } else { 20 };
        for (op, detail, used) in [
            (0, 0, head),
            (1, 3, head + 24),
            (2, 11, head + 88),
            (1, 12, head + 88),
            (0, 255, head + 88),
            (3, 11, head),
            (4, 11, head),
            (5, 255, head + 8),
            (6, 0, 64),
            (255, 255, head),
        ] {
            let mut guest = Guest::new(abi, ORDER0, 0);
            let mut ring = guest.attach().unwrap();
            let at = guest.slot(0);
            for offset in (0..abi.entry_size()).step_by(4) {
                guest.word(at + offset).store(0x5555_5555, Ordering::Relaxed);
            }
            guest.word(at).store(u32::from_le_bytes([op, detail, 0x55, 0x55]), Ordering::Relaxed);
            guest.req_prod += 1;
            guest.push_requests(1);
            let raw = ring.take().unwrap().unwrap();
            let (copied, rest) = raw.as_bytes().split_at(used);
            assert_eq!(copied[..2], [op, detail]);
            assert!(copied[2..].iter().all(|byte| *byte == 0x55), "{abi} {op} {detail}: {copied:x?}");
            assert!(rest.iter().all(|byte| *byte == 0), "{abi} {op} {detail}: {rest:x?}");
        }
    }
}

#[test]
fn h1_h2_h3_impossible_producer_stops_the_ring_for_good() {
    // Two taken, one of them answered, so 31 slots are free.
    for jump in [32, 33, 100, 1 << 31, u32::MAX, u32::MAX - 1] {
        let mut guest = Guest::new(Abi::X86_64, ORDER0, 10);
        let mut ring = guest.attach().unwrap();
        guest.push_one(1);
        guest.push_one(2);
        ring.take().unwrap().unwrap();
        ring.take().unwrap().unwrap();
        ring.respond(1, 0, Status::Okay);
        guest.word(REQ_PROD).store(12u32.wrapping_add(jump), Ordering::Relaxed);
        let broken = ring.take().unwrap_err();
        assert_eq!((broken.outstanding, broken.slots), (1, 32));
        // Repairing the counter does not bring the ring back.
        guest.word(REQ_PROD).store(12, Ordering::Relaxed);
        assert_eq!(ring.take(), Err(broken));
        assert_eq!(ring.final_check(), Err(broken));
        assert_eq!(ring.has_unconsumed(), Err(broken));
        // What was taken can still be answered.
        ring.respond(2, 0, Status::Error);
        assert!(ring.push());
        assert_eq!(guest.responses().len(), 2);
    }
}

#[test]
fn a_full_ring_is_no_overflow() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
    let mut ring = guest.attach().unwrap();
    for id in 0..32 {
        guest.push_one(id);
    }
    for id in 0..32 {
        assert_eq!(id_of(&ring.take().unwrap().unwrap()), id);
    }
    assert_eq!(ring.outstanding(), 32);
    assert_eq!(ring.take().unwrap(), None);
}

#[test]
fn h4_requests_beyond_the_unanswered_ones_are_never_taken() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
    let mut ring = guest.attach().unwrap();
    for id in 0..32 {
        guest.push_one(id);
        ring.take().unwrap().unwrap();
    }
    guest.push_one(32);
    assert!(ring.take().is_err());
}

#[test]
fn h5_scribbled_backend_counters_change_nothing() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
    let mut ring = guest.attach().unwrap();
    for id in 0..100 {
        guest.push_one(id);
        guest.word(RSP_PROD).store(0x8000_0000, Ordering::Relaxed);
        guest.word(REQ_EVENT).store(77, Ordering::Relaxed);
        assert_eq!(id_of(&ring.take().unwrap().unwrap()), id);
        ring.respond(id, 0, Status::Okay);
        let _ = ring.push();
        assert_eq!(guest.responses()[0].id, id);
        assert!(!ring.final_check().unwrap());
    }
}

#[test]
fn h6_any_response_event_gives_at_most_one_notification() {
    for event in [0, 1, 2, 3, 1 << 31, u32::MAX, u32::MAX - 1] {
        let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
        let mut ring = guest.attach().unwrap();
        guest.push_one(1);
        ring.take().unwrap().unwrap();
        ring.respond(1, 0, Status::Okay);
        guest.word(RSP_EVENT).store(event, Ordering::Relaxed);
        let pushed = ring.push();
        assert!(!ring.push(), "nothing new to publish");
        let nudged = ring.nudge();
        assert!(!(pushed && nudged), "event {event}");
        assert!(!ring.nudge());
    }
}

#[test]
fn h7_attach_accepts_only_as_many_open_requests_as_slots() {
    for (req_prod, rsp_prod, fits) in [
        (32, 0, true),
        (33, 0, false),
        (0, 1, false),
        (5, u32::MAX - 26, true),
        (6, u32::MAX - 26, false),
        (0, 1 << 31, false),
    ] {
        let guest = Guest::new(Abi::X86_32, ORDER0, 0);
        guest.word(REQ_PROD).store(req_prod, Ordering::Relaxed);
        guest.word(RSP_PROD).store(rsp_prod, Ordering::Relaxed);
        assert_eq!(guest.attach().is_ok(), fits, "{req_prod} {rsp_prod}");
    }
}

#[test]
fn second_backend_takes_the_unanswered_requests_again() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, u32::MAX - 1);
    let mut first = guest.attach().unwrap();
    for id in 0..4 {
        guest.push_one(id);
        first.take().unwrap().unwrap();
    }
    first.respond(0, 0, Status::Okay);
    let _ = first.push();
    let mut second = guest.attach().unwrap();
    for id in 1..4 {
        assert_eq!(id_of(&second.take().unwrap().unwrap()), id);
    }
    assert_eq!(second.take().unwrap(), None);
    assert_eq!(second.outstanding(), 3);
}

#[test]
fn h36_response_padding_is_zero_and_the_rest_of_the_entry_untouched() {
    for (abi, size) in [(Abi::X86_64, 16), (Abi::X86_32, 12)] {
        let mut guest = Guest::new(abi, ORDER0, 0);
        let mut ring = guest.attach().unwrap();
        let at = guest.slot(0);
        guest.push_one(1);
        for i in 0..abi.entry_size() / 4 {
            guest.word(at + 4 * i).store(u32::MAX, Ordering::Relaxed);
        }
        ring.take().unwrap().unwrap();
        ring.respond(7, 1, Status::Okay);
        let bytes: Vec<u8> = (0..abi.entry_size() / 4)
            .flat_map(|i| guest.word(at + 4 * i).load(Ordering::Relaxed).to_ne_bytes())
            .collect();
        assert_eq!(&bytes[..12], &[7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert!(bytes[12..size].iter().all(|b| *b == 0) && bytes[size..].iter().all(|b| *b == 0xff));
    }
}

#[test]
fn responses_are_invisible_before_push() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
    let mut ring = guest.attach().unwrap();
    guest.push_one(1);
    ring.take().unwrap().unwrap();
    ring.respond(1, 0, Status::Okay);
    assert!(guest.responses().is_empty());
    assert!(ring.push());
    assert_eq!(guest.responses().len(), 1);
}

#[test]
#[should_panic(expected = "without an unanswered request")]
fn one_response_too_many_panics() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
    let mut ring = guest.attach().unwrap();
    guest.push_one(1);
    guest.push_one(2);
    ring.take().unwrap().unwrap();
    ring.respond(1, 0, Status::Okay);
    ring.respond(1, 0, Status::Okay);
}

#[test]
fn nudge_serves_a_frontend_that_arms_its_event_too_late() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
    guest.word(RSP_EVENT).store(0, Ordering::Relaxed);
    let mut ring = guest.attach().unwrap();
    guest.push_one(1);
    ring.take().unwrap().unwrap();
    ring.respond(1, 0, Status::Okay);
    assert!(!ring.push());
    // The late store: exactly the published position, which no later push passes.
    guest.word(RSP_EVENT).store(1, Ordering::Relaxed);
    assert!(ring.nudge());
    assert!(!ring.nudge());
}

#[test]
fn nudge_leaves_a_frontend_alone_that_waits_properly() {
    let mut guest = Guest::new(Abi::X86_64, ORDER0, 0);
    guest.word(RSP_EVENT).store(0, Ordering::Relaxed);
    let mut ring = guest.attach().unwrap();
    guest.push_one(1);
    ring.take().unwrap().unwrap();
    assert!(!ring.nudge(), "a request is unanswered");
    ring.respond(1, 0, Status::Okay);
    assert!(!ring.push());
    guest.word(RSP_EVENT).store(2, Ordering::Relaxed);
    assert!(!ring.nudge());
}

#[derive(Clone, Debug)]
enum Step {
    /// The frontend writes up to this many requests, then publishes them.
    Push(u8),
    /// The backend takes up to this many.
    Take(u8),
    /// The backend answers one of its unanswered requests, picked by the number.
    Respond(u16),
    /// The backend publishes and the frontend collects.
    Collect,
    /// The backend is about to sleep.
    Sleep,
    /// The frontend arms its event.
    Arm,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        1 => any::<u8>().prop_map(Step::Push),
        1 => any::<u8>().prop_map(Step::Take),
        4 => any::<u16>().prop_map(Step::Respond),
        1 => Just(Step::Collect),
        1 => Just(Step::Sleep),
        1 => Just(Step::Arm),
    ]
}

proptest! {
    #[test]
    fn h8_ring_behaves_as_two_queues_also_across_the_wrap(
        abi in prop_oneof![Just(Abi::X86_64), Just(Abi::X86_32)],
        order in 0..=4u32,
        start in prop_oneof![Just(0), (u32::MAX - 600)..=u32::MAX, any::<u32>()],
        steps in proptest::collection::vec(step(), 1..200),
    ) {
        let order = RingOrder::new(order).unwrap();
        let mut guest = Guest::new(abi, order, start);
        let mut ring = guest.attach().unwrap();
        let slots = abi.slots(order) as usize;
        // The model: requests not taken, requests not answered, responses not collected.
        let mut queued: VecDeque<(u64, RawRequest)> = VecDeque::new();
        let mut taken: Vec<u64> = Vec::new();
        let mut answered: VecDeque<u64> = VecDeque::new();
        let mut next_id = 0u64;
        let mut asleep = false;
        let mut armed = true;
        for step in steps {
            match step {
                Step::Push(n) => {
                    let free = slots - queued.len() - taken.len() - answered.len();
                    let count = usize::from(n).min(free);
                    for _ in 0..count {
                        next_id += 1;
                        let gref = GrantRef(u32::try_from(next_id).unwrap() ^ 0x5555_5555);
                        let data = [DraftSegment { gref, first: 1, last: 2 }; 11];
                        let draft = Draft::new(1, next_id, !next_id, &data);
                        guest.write_request(&draft);
                        queued.push_back((next_id, draft.encode(abi)));
                    }
                    let notify = guest.push_requests(count);
                    if asleep && count > 0 {
                        prop_assert!(notify, "the backend sleeps and is not woken");
                        asleep = false;
                    }
                }
                Step::Take(n) => {
                    for _ in 0..n {
                        let expected = queued.pop_front();
                        prop_assert_eq!(ring.take().unwrap(), expected.as_ref().map(|(_, raw)| *raw));
                        let Some((id, _)) = expected else { break };
                        taken.push(id);
                    }
                }
                Step::Respond(n) if !taken.is_empty() => {
                    let id = taken.swap_remove(usize::from(n) % taken.len());
                    ring.respond(id, 1, Status::Okay);
                    answered.push_back(id);
                }
                Step::Respond(_) => {}
                Step::Collect => {
                    let fresh = !answered.is_empty();
                    let notify = ring.push();
                    prop_assert!(fresh || !notify);
                    if armed && fresh {
                        prop_assert!(notify, "the frontend waits and is not woken");
                        armed = false;
                    }
                    let got: Vec<u64> = guest.responses().iter().map(|response| response.id).collect();
                    prop_assert_eq!(got, Vec::from(std::mem::take(&mut answered)));
                }
                Step::Sleep => {
                    let work = ring.final_check().unwrap();
                    prop_assert_eq!(work, !queued.is_empty());
                    asleep |= !work;
                }
                Step::Arm => {
                    let seen = crate::indices::arm(guest.word(RSP_PROD), guest.word(RSP_EVENT), guest.rsp_cons);
                    prop_assert_eq!(seen, guest.rsp_cons);
                    armed = true;
                }
            }
            prop_assert_eq!(ring.outstanding() as usize, taken.len());
        }
    }
}
