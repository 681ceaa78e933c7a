//! The requests of a ring that were served: how many, how much, and how long they took.
//!
//! Times are measured with the turn's clock, which is read when first asked for after the thread was in the kernel, that is,
//! twice for all requests that are taken and answered together. So a time can be too short by as long as we compute between two
//! system calls, some microseconds, and is right otherwise.

use std::cell::Cell;
use std::time::{Duration, Instant};

use blkif::Request;
use tap_ctl::proto::latency::{BUCKETS, bucket};
use tap_ctl::proto::{Histogram, Latencies, ReadWrite};

use crate::flight::Operation;
use crate::xentop::{Counters, Moved};

/// The time of a turn.
#[derive(Debug, Default)]
pub struct Clock(Cell<Option<Instant>>);

impl Clock {
    /// Now, or shortly before.
    pub fn now(&self) -> Instant {
        let now = self.0.get().unwrap_or_else(Instant::now);
        self.0.set(Some(now));
        now
    }

    /// Time has passed.
    pub fn pass(&self) {
        self.0.set(None);
    }
}

/// Of one kind of requests.
#[derive(Debug)]
struct Tally {
    begun: Cell<u64>,
    ended: Cell<u64>,
    failed: Cell<u64>,
    sectors: Cell<u64>,
    micros: Cell<u64>,
    longest: Cell<u64>,
    times: [Cell<u64>; BUCKETS],
}

impl Default for Tally {
    fn default() -> Tally {
        Tally {
            begun: Cell::default(),
            ended: Cell::default(),
            failed: Cell::default(),
            sectors: Cell::default(),
            micros: Cell::default(),
            longest: Cell::default(),
            times: [const { Cell::new(0) }; BUCKETS],
        }
    }
}

fn add(count: &Cell<u64>, more: u64) {
    count.set(count.get().wrapping_add(more));
}

impl Tally {
    fn end(&self, sectors: u64, failed: bool, time: Duration) {
        let micros = time.as_secs().saturating_mul(1_000_000).saturating_add(time.subsec_micros().into());
        add(&self.ended, 1);
        if failed {
            add(&self.failed, 1);
        } else {
            add(&self.sectors, sectors);
        }
        add(&self.micros, micros);
        self.longest.set(self.longest.get().max(micros));
        if let Some(count) = self.times.get(bucket(micros)) {
            add(count, 1);
        }
    }

    fn histogram(&self) -> Histogram {
        let used = self.times.iter().rposition(|count| count.get() > 0).map_or(0, |last| last + 1);
        Histogram {
            counts: self.times.iter().take(used).map(Cell::get).collect(),
            sum_us: self.micros.get(),
            max_us: self.longest.get(),
        }
    }

    fn moved(&self) -> Moved {
        Moved {
            begun: self.begun.get(),
            ended: self.ended.get(),
            sectors: self.sectors.get(),
            micros: self.micros.get(),
        }
    }
}

/// The requests of a ring.
#[derive(Debug, Default)]
pub struct Served {
    read: Tally,
    write: Tally,
    flush: Tally,
    discard: Tally,
}

impl Served {
    fn of(&self, request: &Request) -> &Tally {
        match Operation::from(request) {
            Operation::Read => &self.read,
            Operation::Write => &self.write,
            Operation::Flush => &self.flush,
            // Nothing on a ring asks for the last two.
            Operation::Discard | Operation::Survey | Operation::Resize => &self.discard,
        }
    }

    /// A request was taken.
    pub fn begin(&self, request: &Request) {
        add(&self.of(request).begun, 1);
    }

    /// A request is answered after `time`, and has moved so many sectors; `failed`: it is answered with an error.
    pub fn end(&self, request: &Request, sectors: u64, failed: bool, time: Duration) {
        self.of(request).end(sectors, failed, time);
    }

    /// Sectors moved.
    pub fn sectors(&self) -> ReadWrite {
        self.pair(|tally| &tally.sectors)
    }

    /// Requests answered.
    pub fn requests(&self) -> ReadWrite {
        self.pair(|tally| &tally.ended)
    }

    /// Requests that moved nothing, because of an error.
    pub fn failed(&self) -> ReadWrite {
        self.pair(|tally| &tally.failed)
    }

    fn pair(&self, count: impl Fn(&Tally) -> &Cell<u64>) -> ReadWrite {
        ReadWrite { read: count(&self.read).get(), write: count(&self.write).get() }
    }

    /// How long they took.
    pub fn latencies(&self) -> Latencies {
        Latencies {
            read: self.read.histogram(),
            write: self.write.histogram(),
            flush: self.flush.histogram(),
            discard: self.discard.histogram(),
        }
    }

    /// For xentop; `waits`: how often requests had to wait on the ring.
    pub fn counters(&self, waits: u64) -> Counters {
        let failed = self.failed();
        let errors = failed.read.wrapping_add(failed.write);
        Counters { waits, read: self.read.moved(), write: self.write.moved(), errors }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blkif::request::Transfer;
    use blkif::{RequestKind, Sector};

    fn request(kind: RequestKind) -> Request {
        Request { id: 1, op: 0, kind }
    }

    #[test]
    fn each_kind_has_its_own_numbers() {
        let served = Served::default();
        let discard = request(RequestKind::Discard { sector: Sector(0), count: 8, secure: false });
        let flush = request(RequestKind::Flush);
        for (request, sectors, micros) in [(&discard, 0, 10), (&flush, 0, 3000), (&flush, 0, 1000)] {
            served.begin(request);
            served.end(request, sectors, false, Duration::from_micros(micros));
        }
        let times = served.latencies();
        assert_eq!((times.discard.count(), times.flush.count(), times.read.count()), (1, 2, 0));
        assert_eq!((times.flush.sum_us, times.flush.max_us), (4000, 3000));
        assert_eq!(served.requests(), ReadWrite::default());
    }

    #[test]
    fn a_failed_request_moves_nothing_and_is_told_to_xentop() {
        let served = Served::default();
        let write = request(RequestKind::Indirect {
            transfer: Transfer::Write,
            sector: Sector(0),
            count: 1,
            page: blkif::GrantRef(8),
        });
        served.begin(&write);
        served.begin(&write);
        served.end(&write, 8, true, Duration::from_micros(5));
        let write = Moved { begun: 2, ended: 1, sectors: 0, micros: 5 };
        assert_eq!(served.counters(4), Counters { waits: 4, write, errors: 1, ..Counters::default() });
        assert_eq!((served.failed().write, served.sectors().write), (1, 0));
    }

    #[test]
    fn a_turn_has_one_time() {
        let clock = Clock::default();
        let first = clock.now();
        while Instant::now() == first {}
        assert_eq!(clock.now(), first);
        clock.pass();
        assert!(clock.now() > first);
    }
}
