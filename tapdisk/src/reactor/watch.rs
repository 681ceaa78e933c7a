//! Descriptors that are watched for input for as long as somebody wants to know of it: the event channels.
//!
//! An engine may report a descriptor once more after it was asked to stop, so a place is given out again only when its last
//! report has come: what a descriptor had to say is never taken for another's.

use std::os::fd::RawFd;
use std::rc::Rc;

use super::Reactor;

/// The keys of watched descriptors, beyond the number of any operation.
const FIRST_KEY: u64 = 1 << 61;
/// Ends them.
const KEYS_END: u64 = 1 << 62;

/// A descriptor being watched. Dropping it ends that, and must come before the descriptor is closed.
#[derive(Debug)]
pub struct Watch {
    reactor: Rc<Reactor>,
    place: usize,
}

impl Watch {
    pub(super) fn new(reactor: Rc<Reactor>, place: usize) -> Watch {
        Watch { reactor, place }
    }

    /// Whether the descriptor became readable since this was last asked.
    pub fn take_readable(&self) -> bool {
        self.reactor.watches.borrow_mut().take_readable(self.place)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Err(error) = self.reactor.unwatch(self.place) {
            log::warn!("an event channel is watched until its thread ends: {error}");
        }
    }
}

/// The key of a place's reports.
pub(super) fn key_of(place: usize) -> u64 {
    FIRST_KEY + place as u64
}

/// The place that a report belongs to, if it belongs to one.
pub(super) fn place_of(key: u64) -> Option<usize> {
    let place = key.checked_sub(FIRST_KEY).filter(|_| key < KEYS_END)?;
    usize::try_from(place).ok()
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Free,
    Watched {
        fd: RawFd,
        readable: bool,
    },
    /// Nobody wants to know any more; the last report is still to come.
    Ending,
}

/// All that a thread watches.
#[derive(Debug, Default)]
pub(super) struct Watches(Vec<Place>);

impl Watches {
    /// A place for one more descriptor.
    pub(super) fn begin(&mut self, fd: RawFd) -> usize {
        let place = self.0.iter().position(|place| matches!(place, Place::Free)).unwrap_or(self.0.len());
        let watched = Place::Watched { fd, readable: false };
        match self.0.get_mut(place) {
            Some(free) => *free = watched,
            None => self.0.push(watched),
        }
        place
    }

    /// A report has come; unless there are `more`, it was the last. Returns the descriptor if it is to be watched anew.
    pub(super) fn report(&mut self, place: usize, more: bool) -> Option<RawFd> {
        let place = self.0.get_mut(place)?;
        match place {
            Place::Watched { fd, readable } => {
                *readable = true;
                Some(*fd).filter(|_| !more)
            }
            Place::Ending if !more => {
                *place = Place::Free;
                None
            }
            Place::Ending | Place::Free => None,
        }
    }

    /// Whether there was a report since this was last asked.
    pub(super) fn take_readable(&mut self, place: usize) -> bool {
        match self.0.get_mut(place) {
            Some(Place::Watched { readable, .. }) => std::mem::take(readable),
            _ => false,
        }
    }

    /// Nobody wants to know any more. `silent`: no report will come from now on.
    pub(super) fn end(&mut self, place: usize, silent: bool) {
        if let Some(place) = self.0.get_mut(place) {
            *place = if silent { Place::Free } else { Place::Ending };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_told_once_and_the_last_one_asks_for_another_watch() {
        let mut watches = Watches::default();
        let place = watches.begin(7);
        assert!(!watches.take_readable(place));
        assert_eq!(watches.report(place, true), None);
        assert!(watches.take_readable(place));
        assert!(!watches.take_readable(place));
        assert_eq!(watches.report(place, false), Some(7));
        assert!(watches.take_readable(place));
    }

    #[test]
    fn a_place_is_given_out_again_only_after_its_last_report() {
        let mut watches = Watches::default();
        let first = watches.begin(7);
        watches.end(first, false);
        let second = watches.begin(8);
        assert_ne!(first, second);
        // What was under way when the watch ended is nobody's.
        assert_eq!(watches.report(first, true), None);
        assert!(!watches.take_readable(first) && !watches.take_readable(second));
        assert_ne!(watches.begin(9), first);
        assert_eq!(watches.report(first, false), None);
        assert_eq!(watches.begin(10), first);
        watches.end(second, true);
        assert_eq!(watches.begin(11), second);
    }

    #[test]
    fn keys_are_neither_those_of_operations_nor_those_of_memory_being_released() {
        assert_eq!(place_of(key_of(3)), Some(3));
        assert_eq!((place_of(4096), place_of(1 << 62), place_of(u64::MAX)), (None, None, None));
    }
}
