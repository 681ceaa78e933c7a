//! When to look for work a little longer before going to sleep.
//!
//! Being woken costs both ends a trip through the hypervisor and the scheduler. If the guest's next request, or the
//! disk's answer, usually comes sooner than that, looking for it without sleeping is faster and cheaper; if not, it burns a
//! processor for nothing. So polling is *earned*: one sleep in many is preceded by a trial, and only when trials in a row find
//! work does polling begin; when it finds nothing a few times in a row, it is off again. An idle disk never polls.

use std::fs;
use std::time::{Duration, Instant};

use tap_ctl::proto::Polling;

/// How long is polled at most, where the toolstack does not say.
const DEFAULT_LIMIT: Duration = Duration::from_micros(50);
/// However large the toolstack's number is.
const MAX_LIMIT: Duration = Duration::from_millis(10);
/// One sleep in so many is preceded by a trial. A trial that finds nothing costs no more than this part of the limit.
const TRIAL_EVERY: u32 = 64;
/// Trials in a row that find work start polling.
const HITS_TO_START: u32 = 3;
/// Polls that found nothing in a row after which polling stops.
const MISSES_TO_STOP: u32 = 3;
/// How often the load of the host is looked at while polling.
const LOAD_INTERVAL: Duration = Duration::from_secs(1);

/// What to do before the next sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Sleep.
    Sleep,
    /// Look for work for so long, and tell [`Poller::polled`] whether there was some.
    Poll(Duration),
}

/// Decides for one thread.
#[derive(Debug)]
pub struct Poller {
    limit: Duration,
    idle_threshold: u8,
    polling: bool,
    /// Sleeps until the next trial.
    sleeps: u32,
    hits: u32,
    misses: u32,
    load: Load,
}

impl Default for Poller {
    fn default() -> Poller {
        Poller {
            limit: DEFAULT_LIMIT,
            idle_threshold: 0,
            polling: false,
            sleeps: TRIAL_EVERY,
            hits: 0,
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
        if !self.polling && self.sleeps > 0 {
            self.sleeps -= 1;
            return Advice::Sleep;
        }
        if self.idle_threshold > 0 && !self.load.leaves_idle(self.idle_threshold) {
            return Advice::Sleep;
        }
        Advice::Poll(self.limit)
    }

    /// Polling is over.
    pub fn polled(&mut self, found: bool) {
        if self.polling {
            self.misses = if found { 0 } else { self.misses + 1 };
            self.polling = self.misses < MISSES_TO_STOP;
        } else {
            self.hits = if found { self.hits + 1 } else { 0 };
            self.polling = self.hits >= HITS_TO_START;
        }
        if !self.polling {
            // After a hit the next one too, so that a busy time is not over before it is noticed.
            self.sleeps = if self.hits > 0 && found { 0 } else { TRIAL_EVERY };
        } else if self.hits > 0 {
            self.hits = 0;
            self.misses = 0;
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

    /// Sleeps until polling is on, if trials end like this; `None` if it never is.
    fn sleeps_until_polling(poller: &mut Poller, found: bool) -> Option<u32> {
        (0..10_000).find(|_| {
            if let Advice::Poll(_) = poller.advise() {
                poller.polled(found);
            }
            poller.polling
        })
    }

    #[test]
    fn trials_that_find_work_start_polling_and_fruitless_polls_end_it() {
        let mut poller = Poller::default();
        assert_eq!(sleeps_until_polling(&mut poller, true), Some(TRIAL_EVERY + HITS_TO_START - 1));
        for _ in 0..100 {
            assert_eq!(poller.advise(), Advice::Poll(DEFAULT_LIMIT));
            poller.polled(true);
        }
        for _ in 0..MISSES_TO_STOP {
            assert_eq!(poller.advise(), Advice::Poll(DEFAULT_LIMIT));
            poller.polled(false);
        }
        assert_eq!(poller.advise(), Advice::Sleep);
        assert_eq!(sleeps_until_polling(&mut poller, true), Some(TRIAL_EVERY + HITS_TO_START - 2));
    }

    #[test]
    fn where_trials_find_nothing_nearly_all_sleeps_come_at_once() {
        let mut poller = Poller::default();
        let polls = (0..6500).filter(|_| match poller.advise() {
            Advice::Poll(_) => {
                poller.polled(false);
                true
            }
            Advice::Sleep => false,
        });
        assert_eq!(polls.count(), 100);
    }

    #[test]
    fn the_toolstack_can_forbid_and_extend_polling() {
        let mut poller = Poller::default();
        poller.configure(Polling { duration_us: Some(0), idle_threshold: 0 });
        assert_eq!(sleeps_until_polling(&mut poller, true), None);
        poller.configure(Polling { duration_us: Some(1000), idle_threshold: 0 });
        sleeps_until_polling(&mut poller, true).unwrap();
        assert_eq!(poller.advise(), Advice::Poll(Duration::from_millis(1)));
        poller.configure(Polling { duration_us: Some(u32::MAX), idle_threshold: 0 });
        sleeps_until_polling(&mut poller, true).unwrap();
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
