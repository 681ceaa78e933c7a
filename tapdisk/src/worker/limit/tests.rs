use proptest::prelude::*;

use super::*;

const SECOND: u64 = 1_000_000_000;
const MILLI: u64 = 1_000_000;

/// A ring that always has requests, on a thread that wakes up a little late.
struct Busy {
    turn: Turn,
    wake: u64,
    requests: u64,
    bytes: u64,
    dice: u64,
}

impl Busy {
    fn new(seed: u64) -> Busy {
        Busy { turn: Turn::default(), wake: 0, requests: 0, bytes: 0, dice: seed * 2 + 1 }
    }

    fn roll(&mut self, below: u64) -> u64 {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        (self.dice >> 11) % below
    }

    /// Takes all it may, of up to `largest` bytes each.
    fn run(&mut self, limiter: &mut Limiter, largest: u64, late: u64) {
        let now = self.wake;
        loop {
            match self.turn.admit(limiter, now) {
                Ok(()) => {
                    let bytes = 512 * (1 + self.roll(largest / 512));
                    self.turn.charge(bytes);
                    self.requests += 1;
                    self.bytes += bytes;
                }
                Err(at) => {
                    self.wake = at.max(now + MILLI) + self.roll(late + 1);
                    return;
                }
            }
        }
    }
}

/// Lets `rings` busy rings run from `from` to `to`.
fn run(limiter: &mut Limiter, rings: &mut [Busy], largest: u64, late: u64, to: u64) {
    while let Some(next) = rings.iter_mut().filter(|ring| ring.wake < to).min_by_key(|ring| ring.wake) {
        next.run(limiter, largest, late);
    }
}

fn totals(rings: &[Busy]) -> (u64, u64) {
    (rings.iter().map(|ring| ring.requests).sum(), rings.iter().map(|ring| ring.bytes).sum())
}

fn within(found: u64, wanted: u64, percent: u64) -> bool {
    found.abs_diff(wanted) * 100 <= wanted * percent
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// A ring may be that much late, and requests that large, that what a second gives is never more than a slice of it.
    #[test]
    fn what_is_done_in_ten_seconds_is_what_the_rates_give(
        iops in 20u64..20_000,
        bps in (2u64 << 20)..(1 << 30),
        limited in 1usize..4,
        rings in 1usize..6,
        pages in 1u64..16,
        late in 0..2 * MILLI,
        seed in any::<u32>(),
    ) {
        let limits = Limits {
            iops: if limited & 1 > 0 { iops } else { 0 },
            bps: if limited & 2 > 0 { bps } else { 0 },
            ..Limits::default()
        };
        let mut limiter = Limiter::new(&limits, 0).unwrap();
        let mut all: Vec<Busy> = (0..rings as u64).map(|n| Busy::new(n + u64::from(seed))).collect();
        run(&mut limiter, &mut all, pages * 4096, late, 10 * SECOND);
        let (requests, bytes) = totals(&all);
        // Where both are limited the narrower one decides.
        let full = |done: u64, rate: u64| rate > 0 && within(done, rate * 10, 5);
        let above = |done: u64, rate: u64| rate > 0 && done * 100 > rate * 10 * 105;
        prop_assert!(full(requests, limits.iops) || full(bytes, limits.bps), "{requests} {bytes} {limits}");
        prop_assert!(!above(requests, limits.iops) && !above(bytes, limits.bps), "{requests} {bytes} {limits}");
    }

    #[test]
    fn busy_rings_have_equal_parts(iops in 50u64..50_000, rings in 2usize..8, late in 0..MILLI, seed in any::<u32>()) {
        let mut limiter = Limiter::new(&Limits { iops, ..Limits::default() }, 0).unwrap();
        let mut all: Vec<Busy> = (0..rings as u64).map(|n| Busy::new(n * 77 + u64::from(seed))).collect();
        // Without the burst, which goes to whoever comes first.
        run(&mut limiter, &mut all, 4096, late, SECOND);
        for ring in &mut all {
            ring.requests = 0;
        }
        run(&mut limiter, &mut all, 4096, late, 11 * SECOND);
        let equal = totals(&all).0 / rings as u64;
        for ring in &all {
            prop_assert!(within(ring.requests, equal, 10), "{} of {equal} each, {iops}", ring.requests);
        }
    }

    /// Whatever the rings do, what is taken never exceeds burst and rate by more than a request for each ring.
    #[test]
    fn what_is_given_back_is_not_given_twice(steps in prop::collection::vec((0usize..3, any::<bool>(), 0..50 * MILLI), 1..300)) {
        let limits = Limits { iops: 1000, burst_iops: 20, ..Limits::default() };
        let mut limiter = Limiter::new(&limits, 0).unwrap();
        let mut turns = [Turn::default(), Turn::default(), Turn::default()];
        let (mut now, mut taken) = (0, 0u64);
        for (ring, ends, passed) in steps {
            now += passed;
            let turn = &mut turns[ring];
            if ends {
                turn.end(&mut limiter);
            } else if turn.admit(&mut limiter, now).is_ok() {
                turn.charge(4096);
                taken += 1;
            }
            prop_assert!(taken <= 20 + 3 + now / MILLI, "{taken} after {now} ns");
        }
    }
}

#[test]
fn a_rested_disk_has_its_burst_and_no_more() {
    let taken = |burst_iops: u64, rest: u64| {
        let mut limiter = Limiter::new(&Limits { iops: 100, burst_iops, ..Limits::default() }, 0).unwrap();
        let mut turn = Turn::default();
        let mut count = 0;
        while turn.admit(&mut limiter, rest).is_ok() {
            turn.charge(512);
            count += 1;
        }
        count
    };
    // The one that was reserved before anything was owed comes on top.
    assert_eq!([taken(0, 0), taken(0, 100 * SECOND), taken(500, SECOND), taken(1, SECOND)], [11, 11, 501, 2]);
}

#[test]
fn a_large_request_is_served_whole_and_paid_for_afterwards() {
    let mut limiter = Limiter::new(&Limits { bps: 1_000_000, burst_bps: 1, ..Limits::default() }, 0).unwrap();
    let mut turn = Turn::default();
    assert_eq!(turn.admit(&mut limiter, 0), Ok(()));
    turn.charge(1_000_000);
    assert_eq!(turn.admit(&mut limiter, 0), Err(SECOND - 1000));
    // Half of it was not moved after all. That helps those who come next.
    limiter.refund(500_000);
    turn.end(&mut limiter);
    let Err(at) = turn.admit(&mut limiter, 0) else { panic!() };
    assert!(at.abs_diff(SECOND / 2) <= 1000, "{at}");
}

#[test]
fn what_is_not_limited_is_not_counted() {
    assert!(Limiter::new(&Limits { burst_iops: 5, ..Limits::default() }, 0).is_none());
    let mut limiter = Limiter::new(&Limits { iops: 1000, ..Limits::default() }, 0).unwrap();
    let mut turn = Turn::default();
    for _ in 0..100 {
        assert_eq!(turn.admit(&mut limiter, 0), Ok(()));
        turn.charge(u64::MAX);
    }
    assert!(turn.admit(&mut limiter, 0).is_ok() && turn.admit(&mut limiter, u64::MAX).is_ok());
}
