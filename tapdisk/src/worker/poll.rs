//! When to look for work a little longer before going to sleep.
//!
//! Being woken costs both ends a trip through the hypervisor and the scheduler. If the guest's next request, or the
//! disk's answer, usually comes sooner than that, looking for it without sleeping is faster and cheaper; if not, it burns a
//! processor for nothing. So polling is *earned*: now and then a sleep is measured, and only when sleeps turn out short does
//! polling begin; every time that it finds nothing it is cut down, until it is off again. An idle disk never polls.

use std::fs;
use std::time::{Duration, Instant};

use tap_ctl::proto::Polling;

/// How long is polled at most, where the toolstack does not say.
const DEFAULT_LIMIT: Duration = Duration::from_micros(10);
/// However large the toolstack's number is.
const MAX_LIMIT: Duration = Duration::from_millis(10);
/// Every so many sleeps one is measured; short ones in a row start polling.
const SAMPLE_EVERY: u32 = 16;
const SAMPLES_TO_START: u32 = 3;
/// Polls that found nothing in a row after which polling stops.
const MISSES_TO_STOP: u32 = 3;
/// How often the load of the host is looked at while polling.
const LOAD_INTERVAL: Duration = Duration::from_secs(1);

/// What to do before the next sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Sleep.
    Sleep,
    /// Sleep, and tell [`Poller::slept`] how long.
    Measure,
    /// Look for work for so long.
    Poll(Duration),
}

/// Decides for one thread.
#[derive(Debug)]
pub struct Poller {
    limit: Duration,
    idle_threshold: u8,
    polling: bool,
    /// Sleeps since the last one measured.
    sleeps: u32,
    short: u32,
    misses: u32,
    load: Load,
}

impl Default for Poller {
    fn default() -> Poller {
        Poller {
            limit: DEFAULT_LIMIT,
            idle_threshold: 0,
            polling: false,
            sleeps: 0,
            short: 0,
            misses: 0,
            load: Load::default(),
        }
    }
}

impl Poller {
    /// Follows the toolstack's wishes from now on.
    pub fn configure(&mut self, wish: Polling) {
        let asked = wish.duration_us.map(|us| Duration::from_micros(u64::from(us)));
        *self = Poller {
            limit: asked.unwrap_or(DEFAULT_LIMIT).min(MAX_LIMIT),
            idle_threshold: wish.idle_threshold,
            ..Poller::default()
        };
    }

    /// What to do now that there is nothing to do.
    pub fn advise(&mut self) -> Advice {
        if self.limit.is_zero() {
            return Advice::Sleep;
        }
        if self.polling {
            if self.idle_threshold > 0 && !self.load.leaves_idle(self.idle_threshold) {
                return Advice::Sleep;
            }
            return Advice::Poll(self.limit);
        }
        self.sleeps += 1;
        if self.sleeps < SAMPLE_EVERY {
            return Advice::Sleep;
        }
        self.sleeps = 0;
        Advice::Measure
    }

    /// A sleep that was to be measured is over.
    pub fn slept(&mut self, how_long: Duration) {
        self.short = if how_long < self.limit { self.short + 1 } else { 0 };
        if self.short > 0 {
            // The next one too, so that a busy time is not over before it is noticed.
            self.sleeps = SAMPLE_EVERY - 1;
        }
        if self.short >= SAMPLES_TO_START {
            self.polling = true;
            self.short = 0;
            self.misses = 0;
        }
    }

    /// Polling is over.
    pub fn polled(&mut self, found: bool) {
        self.misses = if found { 0 } else { self.misses + 1 };
        if self.misses >= MISSES_TO_STOP {
            self.polling = false;
            self.sleeps = 0;
        }
    }
}

/// How busy the host's processors are, from `/proc/stat`.
#[derive(Debug, Default)]
struct Load {
    looked: Option<Instant>,
    seen: Ticks,
    idle_percent: u64,
}

/// Clock ticks of all processors since boot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ticks {
    idle: u64,
    all: u64,
}

impl Load {
    /// Whether at least `percent` of the processors' time is idle. True until that is known.
    fn leaves_idle(&mut self, percent: u8) -> bool {
        let now = Instant::now();
        match self.looked {
            Some(then) if now.duration_since(then) < LOAD_INTERVAL => {}
            previous => {
                self.looked = Some(now);
                let ticks =
                    fs::read_to_string("/proc/stat").ok().and_then(|text| ticks(&text)).unwrap_or_default();
                self.idle_percent = match previous {
                    Some(_) => idle_percent(self.seen, ticks),
                    None => 100,
                };
                self.seen = ticks;
            }
        }
        self.idle_percent >= u64::from(percent)
    }
}

fn idle_percent(before: Ticks, after: Ticks) -> u64 {
    let all = after.all.saturating_sub(before.all);
    let idle = after.idle.saturating_sub(before.idle);
    idle.saturating_mul(100).checked_div(all).unwrap_or(100)
}

/// The first line of `/proc/stat`: user, nice, system, idle, iowait and so on.
fn ticks(stat: &str) -> Option<Ticks> {
    let numbers = stat.lines().next()?.strip_prefix("cpu ")?;
    let mut ticks = Ticks::default();
    for (column, number) in numbers.split_ascii_whitespace().enumerate() {
        let number: u64 = number.parse().ok()?;
        ticks.all = ticks.all.saturating_add(number);
        if column == 3 || column == 4 {
            ticks.idle = ticks.idle.saturating_add(number);
        }
    }
    Some(ticks)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sleeps of this length until polling begins; how many it took.
    fn sleep_until_polling(poller: &mut Poller, sleep: Duration, most: u32) -> Option<u32> {
        (0..most).find(|_| match poller.advise() {
            Advice::Poll(_) => true,
            Advice::Measure => {
                poller.slept(sleep);
                false
            }
            Advice::Sleep => false,
        })
    }

    #[test]
    fn short_sleeps_start_polling_and_fruitless_polls_end_it() {
        let mut poller = Poller::default();
        let took = sleep_until_polling(&mut poller, Duration::from_micros(5), 100).unwrap();
        assert!(took > 10, "not at the first sign: {took}");
        for _ in 0..100 {
            assert_eq!(poller.advise(), Advice::Poll(DEFAULT_LIMIT));
            poller.polled(true);
        }
        for _ in 0..MISSES_TO_STOP {
            assert_eq!(poller.advise(), Advice::Poll(DEFAULT_LIMIT));
            poller.polled(false);
        }
        assert_eq!(poller.advise(), Advice::Sleep);
    }

    #[test]
    fn long_sleeps_never_start_polling() {
        let mut poller = Poller::default();
        assert_eq!(sleep_until_polling(&mut poller, Duration::from_micros(51), 1000), None);
    }

    #[test]
    fn the_toolstack_can_forbid_and_extend_polling() {
        let mut poller = Poller::default();
        poller.configure(Polling { duration_us: Some(0), idle_threshold: 0 });
        assert_eq!(sleep_until_polling(&mut poller, Duration::ZERO, 1000), None);
        poller.configure(Polling { duration_us: Some(1000), idle_threshold: 0 });
        sleep_until_polling(&mut poller, Duration::from_micros(900), 100).unwrap();
        poller.configure(Polling { duration_us: Some(u32::MAX), idle_threshold: 0 });
        sleep_until_polling(&mut poller, Duration::from_micros(900), 100).unwrap();
        assert_eq!(poller.advise(), Advice::Poll(MAX_LIMIT));
    }

    #[test]
    fn idle_time_is_read_from_the_kernels_counters() {
        let before = ticks("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 2 3\n").unwrap();
        assert_eq!(before, Ticks { idle: 800, all: 1000 });
        let after = Ticks { idle: 850, all: 1200 };
        assert_eq!(idle_percent(before, after), 25);
        assert_eq!(idle_percent(after, after), 100);
        assert_eq!(ticks("intr 5\n"), None);
    }
}
