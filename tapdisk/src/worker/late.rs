//! Telling the administrator of requests that the store does not answer.
//!
//! Nothing can be done about such a request: the memory that it moves to or from is still in use, so it can neither be
//! answered nor dropped. The ring stays as it is, and the guest waits. What can be done is to say so, once when it is late and
//! once when it is over, however many requests wait.
//!
//! The timer is set only while something is in flight, so it wakes no idle disk.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use tap_ctl::proto::LATE;

use super::thread::State;
use crate::flight::Flight;
use crate::reactor::Timer;
use crate::tick::Tick;
use crate::xen::Xen;

/// By how much a [`Tick`] may lag behind the clock of timers.
const MARGIN: Duration = Duration::from_millis(10);

/// What a thread knows of its store's silence.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// The timer is set.
    timer: Cell<bool>,
    /// Since when the request waits whose lateness was told.
    late: Cell<Option<Tick>>,
}

/// What is to be told or done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing is in flight.
    Idle,
    /// The oldest will be late after this time.
    Fresh(Duration),
    /// From now on something is late.
    Began(Duration),
    /// That is known.
    Known,
    /// Nothing is late any more; for so long something was not answered.
    Over(Duration),
}

/// What the oldest in flight means, where lateness was told of something that waits since `late`.
fn judge(late: Option<Tick>, oldest: Option<Tick>, now: Tick) -> Verdict {
    let age = oldest.map(|since| now.since(since));
    match (late, age) {
        (Some(_), Some(age)) if age >= LATE => Verdict::Known,
        (Some(since), _) => Verdict::Over(now.since(since)),
        (None, Some(age)) if age >= LATE => Verdict::Began(age),
        (None, Some(age)) => Verdict::Fresh(LATE.saturating_sub(age)),
        (None, None) => Verdict::Idle,
    }
}

impl<X: Xen> State<X> {
    /// All requests under way on this thread.
    pub(super) fn flight(&self, now: Tick) -> Flight {
        let mut flight = self.seat.flight(now);
        self.rings.borrow().iter().for_each(|served| flight.merge(served.ring.flight(now)));
        flight
    }

    /// The timer has ended.
    pub(super) fn late_timer_ended(&self) {
        self.watch.timer.set(false);
    }

    /// To be called before sleeping: tells what is to be told, and has the thread woken when something may be late.
    pub(super) fn look_for_late(&self) -> io::Result<()> {
        let Watch { timer, late } = &self.watch;
        if timer.get() && late.get().is_none() {
            return Ok(());
        }
        let now = Tick::now();
        let (flight, order) = (self.flight(now), self.io.reactor.oldest());
        let taken = flight.oldest.map(|taken| taken.since);
        let oldest = [taken, order.map(|order| order.since)].into_iter().flatten().min();
        let mut verdict = judge(late.get(), oldest, now);
        if let Verdict::Over(time) = verdict {
            late.set(None);
            log::warn!("{}: the store answers again, after {} s", self.seat.name(), time.as_secs());
            verdict = judge(None, oldest, now);
        }
        match verdict {
            Verdict::Began(age) => {
                late.set(oldest);
                self.tell_late(age, &flight, now);
            }
            Verdict::Fresh(time) if !timer.replace(true) => {
                self.io.reactor.timer(Timer::Late, time + MARGIN)?;
            }
            Verdict::Idle | Verdict::Fresh(_) | Verdict::Known | Verdict::Over(_) => {}
        }
        Ok(())
    }

    fn tell_late(&self, age: Duration, flight: &Flight, now: Tick) {
        let what = match flight.oldest {
            Some(taken) => format!("{} for {}", taken.what, taken.by),
            None => "work of its own".to_owned(),
        };
        let file = match self.io.reactor.oldest().map(|order| order.tell(now)) {
            Some(store) if !store.file.is_empty() => {
                format!(" (the {} at byte {} of {})", store.operation, store.offset, store.file)
            }
            _ => String::new(),
        };
        let (name, seconds, requests) = (self.seat.name(), age.as_secs(), flight.requests);
        log::warn!(
            "{name}: the store has not answered for {seconds} s: {what}{file}; {requests} requests wait and stay \
             in flight; `tap-ctl stats --full` shows them, `tap-ctl destroy -f` gives the disk up"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lateness_is_told_when_it_begins_and_when_it_is_over() {
        let at = |seconds| Tick::after_start(Duration::from_secs(seconds));
        let seconds = Duration::from_secs;
        assert_eq!(judge(None, None, at(50)), Verdict::Idle);
        assert_eq!(judge(None, Some(at(50)), at(53)), Verdict::Fresh(seconds(7)));
        assert_eq!(judge(None, Some(at(50)), at(60)), Verdict::Began(seconds(10)));
        assert_eq!(judge(Some(at(50)), Some(at(50)), at(65)), Verdict::Known);
        // Another one that is late too belongs to the same silence.
        assert_eq!(judge(Some(at(50)), Some(at(52)), at(66)), Verdict::Known);
        assert_eq!(judge(Some(at(50)), Some(at(62)), at(67)), Verdict::Over(seconds(17)));
        assert_eq!(judge(Some(at(50)), None, at(68)), Verdict::Over(seconds(18)));
    }
}
