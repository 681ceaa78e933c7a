//! Numbers that are random enough, and the same for the same seed.

/// A generator: xorshift64*.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator that begins anywhere.
    pub fn new(seed: u64) -> Self {
        let mixed = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self(mixed.max(1))
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`, or 0.
    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.up_to(limit as u64)).unwrap()
    }

    /// A number below `limit`, or 0.
    pub fn up_to(&mut self, limit: u64) -> u64 {
        (self.number() >> 20) % limit.max(1)
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of some.
    pub fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    /// Puts items into any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// Fills a buffer.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let number = self.number().to_le_bytes();
            chunk.copy_from_slice(&number[..chunk.len()]);
        }
    }
}

/// Runs a test with the seeds 0 to `count`, or only with the one in the environment variable `SEED`. A seed with which it
/// fails is named on the standard error output.
pub fn seeds(count: u64, mut test: impl FnMut(&mut Random)) {
    let only = std::env::var("SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    for seed in only.map_or(0..count, |seed| seed..seed + 1) {
        named(seed, &mut test);
    }
}

/// Runs a test with one seed, and names it if it panics.
pub(super) fn named(seed: u64, test: &mut impl FnMut(&mut Random)) {
    struct Tell(u64);
    impl Drop for Tell {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("this was SEED={}", self.0);
            }
        }
    }
    let _tell = Tell(seed);
    test(&mut Random::new(seed));
}
