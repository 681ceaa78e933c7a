//! When a ring may take requests, if the disk may do only so much in a second. Decisions on numbers; time is nanoseconds
//! from any beginning.
//!
//! Each limit is a [`Bucket`], shared by all rings of the disk. A ring with requests *reserves* a **slice**: what the rates
//! give in a millisecond, at least one request. The slice is paid for at once and may be used from a certain time on, so
//! rings that want more than there is get their slices one after the other, whichever thread looks more often. How many
//! bytes a request moves is known only when it has been taken: a request that is larger than what is left of its slice is
//! served all the same, and the next slice comes that much later. What a ring does not use it gives back.

use tap_ctl::proto::Limits;

/// A slice, as a part of a second.
const SLICES: u64 = 1000;
/// The usual burst, as a part of a second.
const BURSTS: u64 = 10;
const NANOS: i128 = 1_000_000_000;

/// What a rate has given and not yet been used, in units times [`NANOS`], so that nothing is ever rounded.
#[derive(Clone, Debug)]
struct Bucket {
    /// Units in a second; not 0.
    rate: i128,
    most: i128,
    left: i128,
    when: u64,
}

impl Bucket {
    fn new(rate: u64, burst: u64, now: u64) -> Option<Bucket> {
        let burst = if burst == 0 { (rate / BURSTS).max(1) } else { burst };
        let most = i128::from(burst) * NANOS;
        (rate > 0).then(|| Bucket { rate: i128::from(rate), most, left: most, when: now })
    }

    fn fill(&mut self, now: u64) {
        let passed = i128::from(now.saturating_sub(self.when));
        self.left = (self.left + passed * self.rate).min(self.most);
        self.when = self.when.max(now);
    }

    /// Nanoseconds until it owes nothing.
    fn wait(&self) -> u64 {
        let owed = (-self.left).max(0);
        u64::try_from((owed + self.rate - 1) / self.rate).unwrap_or(u64::MAX)
    }

    /// Pays for `units`, or gives them back.
    fn pay(&mut self, units: i64) {
        self.left = (self.left - i128::from(units) * NANOS).min(self.most);
    }

    fn slice(&self) -> i64 {
        i64::try_from(self.rate / i128::from(SLICES)).unwrap_or(i64::MAX / 2).max(1)
    }
}

/// The limits of a disk.
#[derive(Clone, Debug)]
pub struct Limiter {
    requests: Option<Bucket>,
    bytes: Option<Bucket>,
}

/// What a ring has reserved.
#[derive(Clone, Copy, Debug)]
struct Slice {
    /// From when on.
    at: u64,
    /// `None`: as many as there are.
    requests: Option<i64>,
    bytes: Option<i64>,
}

impl Limiter {
    /// `None`: nothing is limited.
    pub fn new(limits: &Limits, now: u64) -> Option<Limiter> {
        let requests = Bucket::new(limits.iops, limits.burst_iops, now);
        let bytes = Bucket::new(limits.bps, limits.burst_bps, now);
        (requests.is_some() || bytes.is_some()).then_some(Limiter { requests, bytes })
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.requests.iter_mut().chain(&mut self.bytes)
    }

    fn reserve(&mut self, now: u64) -> Slice {
        self.buckets().for_each(|bucket| bucket.fill(now));
        let wait = self.buckets().map(|bucket| bucket.wait()).max().unwrap_or(0);
        let pay = |bucket: &mut Bucket| {
            let slice = bucket.slice();
            bucket.pay(slice);
            slice
        };
        let requests = self.requests.as_mut().map(pay);
        let bytes = self.bytes.as_mut().map(pay);
        Slice { at: now.saturating_add(wait), requests, bytes }
    }

    /// Takes back what is left of a slice, or the payment for what was used beyond it.
    fn settle(&mut self, slice: Slice) {
        for (bucket, left) in [(&mut self.requests, slice.requests), (&mut self.bytes, slice.bytes)] {
            if let (Some(bucket), Some(left)) = (bucket, left) {
                bucket.pay(-left);
            }
        }
    }

    /// Takes back the payment for bytes that were not moved after all.
    pub fn refund(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.pay(-i64::try_from(bytes).unwrap_or(0));
        }
    }
}

/// What one ring has of the limits.
#[derive(Debug, Default)]
pub struct Turn {
    slice: Option<Slice>,
}

impl Turn {
    /// Whether the ring may take a request now; if not, the time from which on it may.
    pub fn admit(&mut self, limiter: &mut Limiter, now: u64) -> Result<(), u64> {
        let used = |left: Option<i64>| left.is_some_and(|left| left <= 0);
        if self.slice.is_some_and(|slice| used(slice.requests) || used(slice.bytes)) {
            self.end(limiter);
        }
        let slice = self.slice.get_or_insert_with(|| limiter.reserve(now));
        if slice.at <= now { Ok(()) } else { Err(slice.at) }
    }

    /// A request was taken that moves so many bytes.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(slice) = &mut self.slice {
            slice.requests = slice.requests.map(|left| left - 1);
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX / 2);
            slice.bytes = slice.bytes.map(|left| left.saturating_sub(bytes));
        }
    }

    /// The ring wants nothing for now.
    pub fn end(&mut self, limiter: &mut Limiter) {
        if let Some(slice) = self.slice.take() {
            limiter.settle(slice);
        }
    }

    /// The limits have changed: what was reserved is worth nothing.
    pub fn forget(&mut self) {
        self.slice = None;
    }
}

#[cfg(test)]
mod tests;
