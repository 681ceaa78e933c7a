//! A clock that is cheap enough to be read for each request.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// A time, some milliseconds exact, which costs next to nothing to read, under Xen too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tick(Duration);

impl Tick {
    /// Now.
    pub fn now() -> Tick {
        // It fails for no clock that the kernel has; a wrong age is all there would be of it.
        Tick(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map(Duration::from).unwrap_or_default())
    }

    /// How long ago `then` was.
    pub fn since(self, then: Tick) -> Duration {
        self.0.saturating_sub(then.0)
    }

    /// The same in milliseconds.
    pub fn millis_since(self, then: Tick) -> u64 {
        u64::try_from(self.since(then).as_millis()).unwrap_or(u64::MAX)
    }

    /// A time that has passed.
    #[cfg(test)]
    pub fn after_start(time: Duration) -> Tick {
        Tick(time)
    }
}
