//! The notification protocol under every interleaving and every reordering its memory orders allow.
//!
//! A frontend and a backend exchange requests and responses over the real counters code. Each sleeps when its final
//! check finds nothing, and is woken only by the other's notification: a lost wake-up is a deadlock, which loom
//! reports.
//!
//! Run: `RUSTFLAGS="--cfg loom" cargo test -p blkif --test loom_notify --release`.
#![cfg(loom)]

use blkif::indices::{BackIndices, Words, arm, publish};
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// One direction of an event channel: a pending bit that wakes a sleeper.
#[derive(Debug, Default)]
struct Event {
    pending: Mutex<bool>,
    wake: Condvar,
}

impl Event {
    fn notify(&self) {
        *self.pending.lock().unwrap() = true;
        self.wake.notify_one();
    }

    fn wait(&self) {
        let mut pending = self.pending.lock().unwrap();
        while !*pending {
            pending = self.wake.wait(pending).unwrap();
        }
        *pending = false;
    }
}

const SLOTS: u32 = 2;

/// The header, one word for each entry, and the two directions of the event channel.
#[derive(Debug)]
struct Shared {
    req_prod: AtomicU32,
    req_event: AtomicU32,
    rsp_prod: AtomicU32,
    rsp_event: AtomicU32,
    entries: [AtomicU32; SLOTS as usize],
    to_back: Event,
    to_front: Event,
}

impl Shared {
    fn new(start: u32) -> Shared {
        Shared {
            req_prod: AtomicU32::new(start),
            req_event: AtomicU32::new(start.wrapping_add(1)),
            rsp_prod: AtomicU32::new(start),
            rsp_event: AtomicU32::new(start.wrapping_add(1)),
            entries: [AtomicU32::new(0), AtomicU32::new(0)],
            to_back: Event::default(),
            to_front: Event::default(),
        }
    }

    fn words(&self) -> Words<'_> {
        Words {
            req_prod: &self.req_prod,
            req_event: &self.req_event,
            rsp_prod: &self.rsp_prod,
            rsp_event: &self.rsp_event,
        }
    }

    fn entry(&self, position: u32) -> &AtomicU32 {
        &self.entries[(position % SLOTS) as usize]
    }
}

/// Serves `count` requests, answering each with its number plus 100.
fn backend(shared: &Shared, start: u32, count: u32) {
    let mut indices = BackIndices::attach(shared.words(), SLOTS).unwrap();
    let mut next = start;
    while next != start.wrapping_add(count) {
        while let Some(position) = indices.take(shared.words()).unwrap() {
            let request = shared.entry(position).load(Ordering::Relaxed);
            assert_eq!(request, next.wrapping_add(1), "the entry is older than the counter that covers it");
            let answer = indices.respond();
            shared.entry(answer).store(request.wrapping_add(100), Ordering::Relaxed);
            next = next.wrapping_add(1);
        }
        if indices.push(shared.words()) {
            shared.to_front.notify();
        }
        if next != start.wrapping_add(count) && !indices.final_check(shared.words()).unwrap() {
            shared.to_back.wait();
        }
    }
}

/// Sends `count` requests one by one, then waits for their answers.
fn frontend(shared: &Shared, start: u32, count: u32) {
    let end = start.wrapping_add(count);
    let mut produced = start;
    while produced != end {
        let next = produced.wrapping_add(1);
        shared.entry(produced).store(next, Ordering::Relaxed);
        if publish(&shared.req_prod, &shared.req_event, produced, next) {
            shared.to_back.notify();
        }
        produced = next;
    }
    let mut cons = start;
    while cons != end {
        let mut seen = shared.rsp_prod.load(Ordering::Acquire);
        if seen == cons {
            seen = arm(&shared.rsp_prod, &shared.rsp_event, cons);
        }
        if seen == cons {
            shared.to_front.wait();
            continue;
        }
        while cons != seen {
            let answer = shared.entry(cons).load(Ordering::Relaxed);
            assert_eq!(answer, cons.wrapping_add(101), "the entry is older than the counter that covers it");
            cons = cons.wrapping_add(1);
        }
    }
}

fn exchange(start: u32, count: u32, preemptions: Option<usize>) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = preemptions;
    model.check(move || {
        let shared = Arc::new(Shared::new(start));
        let back = thread::spawn({
            let shared = Arc::clone(&shared);
            move || backend(&shared, start, count)
        });
        frontend(&shared, start, count);
        back.join().unwrap();
    });
}

#[test]
fn one_request_wakes_the_backend_and_its_response_the_frontend() {
    exchange(0, 1, None);
}

#[test]
fn two_requests_lose_no_wake_up_across_the_wrap() {
    // Without the bound the search takes hours; lost wake-ups need one preemption on either side.
    exchange(u32::MAX, 2, Some(3));
}
