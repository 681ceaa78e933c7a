//! How long requests took.

use serde::{Deserialize, Serialize};

/// Buckets of an octave, as a power of two.
const SUB_BITS: u32 = 2;

/// Buckets of a [`Histogram`]; the last one takes everything from 235 seconds on.
pub const BUCKETS: usize = 108;

/// The bucket of a time in microseconds.
///
/// Each is a quarter of its octave wide: 0, 1, ... 7 µs, then 8 to 9, 10 to 11, and so on, so that a time read off a histogram is
/// wrong by an eighth at most.
pub fn bucket(micros: u64) -> usize {
    let octave = micros.checked_ilog2().unwrap_or(0);
    if octave < SUB_BITS {
        return usize::try_from(micros).unwrap_or(0);
    }
    let within = micros >> (octave - SUB_BITS) & ((1 << SUB_BITS) - 1);
    let index = u64::from((octave - SUB_BITS + 1) << SUB_BITS) + within;
    usize::try_from(index).unwrap_or(usize::MAX).min(BUCKETS - 1)
}

/// The time in microseconds that is just beyond a bucket.
pub fn beyond(bucket: usize) -> u64 {
    let bucket = u64::try_from(bucket.min(BUCKETS - 1)).unwrap_or(0);
    let (octave, within) = (bucket >> SUB_BITS, bucket & ((1 << SUB_BITS) - 1));
    match octave {
        0 => within + 1,
        _ => (within + (1 << SUB_BITS) + 1) << (octave - 1),
    }
}

/// How long requests of a kind took, from the moment they were taken to their answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// How many took a time in each [`bucket`]; buckets that are left out at the end are empty.
    pub counts: Vec<u64>,
    /// The sum of all times, in microseconds.
    pub sum_us: u64,
    /// The longest time, in microseconds.
    pub max_us: u64,
}

impl Histogram {
    /// How many requests.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// How many took less than `micros`, which should be the end of a bucket.
    pub fn below(&self, micros: u64) -> u64 {
        let whole = self.counts.iter().enumerate().take_while(|(index, _)| beyond(*index) <= micros);
        whole.fold(0, |sum, (_, count)| sum.saturating_add(*count))
    }

    /// The time in microseconds that a share of the requests, in thousandths, did not exceed. `None` without requests.
    pub fn quantile(&self, thousandths: u64) -> Option<u64> {
        let count = self.count();
        let rank = u128::from(count) * u128::from(thousandths.min(1000));
        let rank = u64::try_from(rank.div_ceil(1000)).unwrap_or(u64::MAX).max(1);
        let mut before = 0u64;
        for (index, &here) in self.counts.iter().enumerate() {
            if before.saturating_add(here) >= rank && here > 0 {
                let start = index.checked_sub(1).map_or(0, beyond);
                // The middle of those who may be meant: as if they were spread over the bucket evenly.
                let width = u128::from(beyond(index) - start);
                let within = width * (u128::from(rank - before) * 2 - 1) / (u128::from(here) * 2);
                let time = start.saturating_add(u64::try_from(within).unwrap_or(0));
                return Some(if self.max_us > 0 { time.min(self.max_us) } else { time });
            }
            before = before.saturating_add(here);
        }
        None
    }

    /// The mean in microseconds. `None` without requests.
    pub fn mean(&self) -> Option<u64> {
        self.sum_us.checked_div(self.count())
    }

    /// Takes in what another thread has measured.
    pub fn add(&mut self, other: &Histogram) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (mine, its) in self.counts.iter_mut().zip(&other.counts) {
            *mine = mine.saturating_add(*its);
        }
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
        self.max_us = self.max_us.max(other.max_us);
    }

    /// What has come since an earlier look. The longest time of just these is not known; the end of their last bucket is.
    pub fn since(&self, earlier: &Histogram) -> Histogram {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        let counts: Vec<u64> =
            self.counts.iter().zip(before).map(|(now, then)| now.saturating_sub(then)).collect();
        let last = counts.iter().rposition(|&count| count > 0);
        Histogram {
            sum_us: self.sum_us.saturating_sub(earlier.sum_us),
            max_us: last.map_or(0, |last| beyond(last).min(self.max_us)),
            counts,
        }
    }
}

/// How long each kind of request took. Writes with barriers are writes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latencies {
    /// Reads.
    pub read: Histogram,
    /// Writes.
    pub write: Histogram,
    /// Flushes.
    pub flush: Histogram,
    /// Discards.
    pub discard: Histogram,
}

impl Latencies {
    /// All, with their names.
    pub fn named(&self) -> [(&'static str, &Histogram); 4] {
        [("read", &self.read), ("write", &self.write), ("flush", &self.flush), ("discard", &self.discard)]
    }

    /// Takes in what another thread has measured.
    pub fn add(&mut self, other: &Latencies) {
        self.read.add(&other.read);
        self.write.add(&other.write);
        self.flush.add(&other.flush);
        self.discard.add(&other.discard);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn histogram(times: &[u64]) -> Histogram {
        let mut histogram = Histogram { counts: vec![0; BUCKETS], ..Histogram::default() };
        for &time in times {
            histogram.counts[bucket(time)] += 1;
            histogram.sum_us += time;
            histogram.max_us = histogram.max_us.max(time);
        }
        histogram
    }

    #[test]
    fn every_time_lies_in_its_bucket_and_buckets_follow_one_another() {
        let mut start = 0;
        for index in 0..BUCKETS - 1 {
            let end = beyond(index);
            assert!(end > start, "{index}");
            assert_eq!((bucket(start), bucket(end - 1)), (index, index));
            assert!(
                start < 4 || (end - start) * 4 <= start,
                "bucket {index} is a quarter of its start at most"
            );
            start = end;
        }
        assert_eq!((start, bucket(start), bucket(u64::MAX)), (234_881_024, BUCKETS - 1, BUCKETS - 1));
    }

    #[test]
    fn quantiles_are_right_within_a_bucket() {
        let times: Vec<u64> = (1..=1000).collect();
        let histogram = histogram(&times);
        for (thousandths, truth) in [(500, 500), (900, 900), (990, 990), (1, 1)] {
            let read = histogram.quantile(thousandths).unwrap();
            assert!(read.abs_diff(truth) * 8 <= truth.max(8), "{thousandths}: {read}");
        }
        assert_eq!((histogram.quantile(1000), histogram.mean()), (Some(1000), Some(500)));
        let empty = Histogram::default();
        assert_eq!((empty.quantile(500), empty.mean(), empty.count()), (None, None, 0));
    }

    #[test]
    fn histograms_add_up_and_a_difference_has_no_old_times() {
        let earlier = histogram(&[5, 5, 1_000_000]);
        let mut later = earlier.clone();
        later.add(&histogram(&[100, 200]));
        assert_eq!((later.count(), later.sum_us, later.max_us), (5, 1_000_310, 1_000_000));
        let since = later.since(&earlier);
        assert_eq!((since.count(), since.sum_us, since.below(128)), (2, 300, 1));
        assert!((200..256).contains(&since.max_us), "{since:?}");
        assert_eq!(since.since(&since).quantile(990), None);
    }
}
