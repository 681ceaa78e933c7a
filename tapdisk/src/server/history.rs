//! Whether another tapdisk is to try after one that died.
//!
//! What counts is progress. A disk whose tapdisk is killed every few seconds while guests get answers in between goes on for
//! ever; one whose tapdisks die without having answered anything would only burn the host: something in the image, in a guest's
//! request or in us kills each of them.

use std::time::Duration;

use tap_ctl::inflight::History;

/// A tapdisk that lived so long has done its work, even if nobody asked it for any.
const LONG_LIFE_MS: u64 = 60_000;
/// So many may die in a row without having answered anything.
const MOST: u32 = 8;
/// So many of those are followed at once.
const AT_ONCE: u32 = 2;
/// The pause after that, doubled each time.
const PAUSE: Duration = Duration::from_millis(250);

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Begin after this time, and leave this behind.
    Begin(Duration, History),
    /// Do not.
    Hopeless,
}

/// Judges the tapdisk before this one by what it left, by the sum of the rings' counters now, and by the system's uptime.
pub(super) fn judge(before: History, responses: u64, now_ms: u64) -> Verdict {
    let fruitful = responses != before.responses || now_ms.saturating_sub(before.began_ms) >= LONG_LIFE_MS;
    let fruitless = if fruitful { 0 } else { before.fruitless.saturating_add(1) };
    if before.hopeless || fruitless > MOST {
        return Verdict::Hopeless;
    }
    let pause = match fruitless.checked_sub(AT_ONCE + 1) {
        None => Duration::ZERO,
        Some(doublings) => PAUSE * (1 << doublings),
    };
    Verdict::Begin(pause, History { fruitless, responses, began_ms: now_ms, hopeless: false })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk that dies every `life_ms`, having answered so many requests each time; how many lives it has, up to 1000.
    fn lives(life_ms: u64, answers: u64) -> u32 {
        let (mut history, mut responses, mut now) = (History::default(), 0, 100_000);
        for life in 0..1000 {
            responses += answers;
            now += life_ms;
            match judge(history, responses, now) {
                Verdict::Begin(pause, next) => {
                    assert!(pause <= Duration::from_secs(8), "{pause:?}");
                    (history, now) = (next, now + u64::try_from(pause.as_millis()).unwrap());
                }
                Verdict::Hopeless => return life,
            }
        }
        1000
    }

    #[test]
    fn who_answers_goes_on_for_ever_and_who_never_does_gives_up() {
        assert_eq!(lives(2000, 1), 1000);
        assert_eq!(lives(1, 1), 1000);
        assert_eq!(lives(LONG_LIFE_MS, 0), 1000, "an idle disk whose tapdisk dies once in a while");
        assert!((5..12).contains(&lives(1, 0)));
    }

    #[test]
    fn the_first_deaths_cost_no_time_and_later_ones_ever_more() {
        let pause = |fruitless| match judge(History { fruitless, ..History::default() }, 0, 1) {
            Verdict::Begin(pause, _) => Some(pause),
            Verdict::Hopeless => None,
        };
        assert_eq!(pause(0), Some(Duration::ZERO));
        assert_eq!(pause(1), Some(Duration::ZERO));
        assert_eq!(pause(2), Some(PAUSE));
        assert_eq!(pause(3), Some(PAUSE * 2));
        assert_eq!(pause(MOST), None);
    }

    #[test]
    fn what_was_given_up_stays_so() {
        let history = History { hopeless: true, ..History::default() };
        assert_eq!(judge(history, 5, LONG_LIFE_MS * 2), Verdict::Hopeless);
    }
}
