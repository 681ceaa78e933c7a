//! What a disk has done: counted by each thread for itself, gathered when somebody asks.

use std::fmt;

use nix::errno::Errno;
use tap_ctl::Reply;
use tap_ctl::proto::{DiskStats, ImageSpec, Latencies, Limits, ReadWrite, RingStats, Stats, StoreOperation};

use super::served::Served;
use super::thread::{State, failure};
use super::{Answer, Command, Commands, Phase};
use crate::flight::Flight;
use crate::tick::Tick;
use crate::xen::Xen;

/// What a thread has counted. Numbers of a thread that ends go over to the one that started it.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    sectors: ReadWrite,
    requests: ReadWrite,
    failed: ReadWrite,
    latency: Latencies,
    flight: Flight,
    /// The oldest operation of the store that has not ended.
    store: Option<StoreOperation>,
    throttled: u64,
    rings: Vec<RingStats>,
    disk: DiskStats,
}

impl Counted {
    /// What was served on a ring.
    pub fn of(served: &Served) -> Counted {
        Counted {
            sectors: served.sectors(),
            requests: served.requests(),
            failed: served.failed(),
            latency: served.latencies(),
            ..Counted::default()
        }
    }

    /// Adds what another thread has counted.
    fn add(&mut self, other: Counted) {
        for (mine, its) in [
            (&mut self.sectors, other.sectors),
            (&mut self.requests, other.requests),
            (&mut self.failed, other.failed),
        ] {
            *mine = sum(*mine, its);
        }
        self.latency.add(&other.latency);
        self.flight.merge(other.flight);
        self.store = [self.store.take(), other.store].into_iter().flatten().max_by_key(|store| store.age_ms);
        self.throttled += other.throttled;
        for ring in other.rings {
            self.add_ring(ring);
        }
        if self.disk.images.is_empty() {
            self.disk = other.disk;
            return;
        }
        for (mine, its) in self.disk.images.iter_mut().zip(&other.disk.images) {
            mine.hits = sum(mine.hits, its.hits);
        }
    }

    /// The queues of a frontend are shown as one.
    fn add_ring(&mut self, ring: RingStats) {
        match self.rings.iter_mut().find(|mine| mine.entry == ring.entry) {
            None => self.rings.push(ring),
            Some(mine) => {
                let pairs = [
                    (&mut mine.queues, ring.queues),
                    (&mut mine.taken, ring.taken),
                    (&mut mine.answered, ring.answered),
                    (&mut mine.kicked, ring.kicked),
                    (&mut mine.kicks, ring.kicks),
                    (&mut mine.malformed, ring.malformed),
                    (&mut mine.failed, ring.failed),
                ];
                pairs.into_iter().for_each(|(sum, more)| *sum += more);
            }
        }
    }

    /// Takes in what stays of a thread that has ended.
    pub fn outlive(&mut self, other: Counted) {
        self.add(other.past());
    }

    fn past(self) -> Counted {
        Counted {
            sectors: self.sectors,
            requests: self.requests,
            failed: self.failed,
            latency: self.latency,
            throttled: self.throttled,
            ..Counted::default()
        }
    }
}

fn sum(one: ReadWrite, other: ReadWrite) -> ReadWrite {
    ReadWrite { read: one.read + other.read, write: one.write + other.write }
}

/// What is told of a disk that is not counted.
#[derive(Debug)]
pub struct About {
    /// The image.
    pub image: ImageSpec,
    /// The disk is paused.
    pub paused: bool,
    /// What it may do in a second.
    pub limit: Limits,
}

/// A question that goes from thread to thread. Wherever it ends, it is answered with what was counted so far: a thread that
/// is ending has nothing to add.
pub struct Gathering {
    about: Option<About>,
    counted: Counted,
    next: Vec<Commands>,
    answer: Option<Answer>,
}

impl fmt::Debug for Gathering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gathering")
    }
}

impl Gathering {
    /// A question about the disk that `about` describes, which is to be put to the threads `next` too.
    pub fn new(about: About, next: Vec<Commands>, answer: Answer) -> Box<Gathering> {
        Box::new(Gathering { about: Some(about), counted: Counted::default(), next, answer: Some(answer) })
    }

    /// Takes a thread's part in, and passes the question on.
    pub fn pass(mut self: Box<Self>, counted: Counted) {
        self.counted.add(counted);
        if let Some(next) = self.next.pop() {
            next.send(Command::Stats(self));
        }
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        if let (Some(about), Some(answer)) = (self.about.take(), self.answer.take()) {
            let stats = std::mem::take(&mut self.counted).tell(about);
            answer.give(Reply::Stats(Box::new(stats)));
        }
    }
}

impl Counted {
    fn tell(mut self, About { image, paused, limit }: About) -> Stats {
        // Which layer a failed request was about is not known any more.
        if let Some(leaf) = self.disk.images.first_mut() {
            leaf.image = image.clone();
            leaf.fail = self.failed;
        }
        let oldest = self.flight.oldest.map(|taken| taken.tell(Tick::now()));
        Stats {
            image,
            paused,
            sectors: self.sectors,
            requests: self.requests,
            latency: self.latency,
            outstanding: self.flight.requests,
            held: self.flight.held,
            oldest_ms: oldest.as_ref().map(|oldest| oldest.age_ms),
            late: self.flight.late,
            oldest,
            store: self.store,
            throttled: self.throttled,
            limit,
            rings: self.rings,
            disk: self.disk,
        }
    }
}

impl<X: Xen> State<X> {
    /// Begins to gather what all threads have counted.
    pub(super) fn statistics(&self, answer: Answer) {
        let Some(image) = self.seat.image() else {
            return answer.give(failure(Errno::EINVAL, "the disk belongs to another thread".into()));
        };
        let paused = self.seat.phase() == Phase::Paused;
        let about = About { image, paused, limit: self.throttle.limits() };
        Gathering::new(about, self.sibling_commands(), answer).pass(self.counted());
    }

    /// What this thread has counted, and those that it has outlived.
    pub(super) fn counted(&self) -> Counted {
        let mut counted = self.past.borrow().clone();
        let mut own = Counted::default();
        let now = Tick::now();
        own.flight = self.flight(now);
        own.store = self.io.reactor.oldest().map(|order| order.tell(now));
        own.disk = self.seat.disk().map(|disk| disk.stats()).unwrap_or_default();
        for served in self.rings.borrow().iter() {
            let ring = &served.ring;
            own.add(Counted::of(&served.way.served));
            own.throttled += ring.gate().waits();
            own.add_ring(ring.stats());
        }
        counted.add(own);
        counted
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tap_ctl::proto::RingEntry;

    fn ring(domid: u16, taken: u64) -> RingStats {
        let entry = RingEntry { domid, vdev: 51712 };
        RingStats { entry, queues: 1, taken, answered: 0, kicked: 0, kicks: 0, malformed: 0, failed: 0 }
    }

    #[test]
    fn threads_are_added_up_and_the_queues_of_a_frontend_are_one() {
        let flight = |requests| Flight { requests, ..Flight::default() };
        let one = Counted { flight: flight(2), rings: vec![ring(1, 5), ring(2, 7)], ..Counted::default() };
        let mut sum = one.clone();
        sum.add(Counted { flight: flight(1), rings: vec![ring(1, 10)], ..Counted::default() });
        assert_eq!(sum.flight.requests, 3);
        assert_eq!(sum.rings, [RingStats { queues: 2, ..ring(1, 15) }, ring(2, 7)]);
        assert!(sum.clone().past().rings.is_empty());
    }

    #[test]
    fn a_question_is_answered_even_where_a_thread_has_ended() {
        let (sender, answer) = std::sync::mpsc::channel();
        let about = About { image: "aio:/a".parse().unwrap(), paused: false, limit: Limits::default() };
        let (queue, ended) = std::sync::mpsc::channel();
        drop(ended);
        let next = Commands::for_test(queue);
        let asked = Gathering::new(about, vec![next], Answer::new(move |reply| sender.send(reply).unwrap()));
        asked.pass(Counted { flight: Flight { requests: 4, ..Flight::default() }, ..Counted::default() });
        let Reply::Stats(stats) = answer.recv().unwrap() else { panic!() };
        assert_eq!(stats.outstanding, 4);
    }
}
