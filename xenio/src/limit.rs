//! How often a guest may make us work, or make us write to the log.

use std::time::{Duration, Instant};

/// A token bucket, kept as the one instant at which it would be full again.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    interval: Duration,
    span: Duration,
    full_at: Instant,
}

impl Bucket {
    /// A full bucket of `burst` tokens that gains one every `interval`.
    pub fn new(interval: Duration, burst: u32, now: Instant) -> Bucket {
        Bucket { interval, span: interval * burst.saturating_sub(1), full_at: now }
    }

    /// When the next token is there; not in the future if it is there already.
    pub fn next(&self) -> Instant {
        self.full_at.checked_sub(self.span).unwrap_or(self.full_at)
    }

    /// Takes a token, or tells when the next one is there.
    ///
    /// # Errors
    ///
    /// The instant of the next token.
    pub fn take(&mut self, now: Instant) -> Result<(), Instant> {
        let full_at = self.full_at.max(now);
        match full_at.checked_sub(self.span) {
            Some(next) if next > now => Err(next),
            _ => {
                self.full_at = full_at + self.interval;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INTERVAL: Duration = Duration::from_millis(50);

    #[test]
    fn a_burst_passes_and_the_next_waits_for_one_interval() {
        let start = Instant::now();
        let mut bucket = Bucket::new(INTERVAL, 50, start);
        assert!((0..50).all(|_| bucket.take(start).is_ok()));
        assert_eq!(bucket.take(start), Err(start + INTERVAL));
        assert_eq!(bucket.take(start + INTERVAL), Ok(()));
        assert!(bucket.take(start + INTERVAL).is_err());
    }

    proptest! {
        #[test]
        fn it_agrees_with_counting_tokens(burst in 1u32..20, gaps in prop::collection::vec(0u32..200, 1..200)) {
            let start = Instant::now();
            let mut bucket = Bucket::new(INTERVAL, burst, start);
            // The model counts in milliseconds of credit: 50 a token.
            let (mut credit, mut elapsed) = (u64::from(burst) * 50, 0u64);
            for gap in gaps {
                elapsed += u64::from(gap);
                credit = (credit + u64::from(gap)).min(u64::from(burst) * 50);
                let allowed = credit >= 50;
                if allowed {
                    credit -= 50;
                }
                prop_assert_eq!(bucket.take(start + Duration::from_millis(elapsed)).is_ok(), allowed);
            }
        }
    }
}
