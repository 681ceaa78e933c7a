//! Going on where another process has died, and making room for one that goes on.
//!
//! 1. The image is opened as soon as the dead process's lock on it is gone, which the kernel keeps until its last I/O has
//!    ended.
//! 2. Each ring is mapped again and its journal read: what was taken and not answered is served again, before anything new.
//! 3. The event channel is bound to the port that the frontend still offers. The kernel frees the dead process's end when it
//!    gets to it, so that takes some milliseconds.
//! 4. The frontend is notified once: the last answers may have been published without.
//!
//! A ring that cannot be taken up, because its domain is going away or its guest has changed what was not its own, does not
//! hold up others: it is not served, and xenio finds it missing.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use gntdev::GrantMap;
use nix::errno::Errno;
use tap_ctl::inflight::Record;
use tap_ctl::proto::RingParams;

use super::connect::Failure;
use super::mapped::MappedRing;
use super::pause::{Then, Wish};
use super::ring::Attached;
use super::thread::{Served, State, failure};
use super::{Answer, Begin};
use crate::image::{self, Disk, OpenError};
use crate::io::{Io, errno_of};
use crate::journal::{Journal, Replay};
use crate::xen::Xen;

/// How long the dead process's I/O may take to end.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// How long its event channels may take to be free.
const PORT_PATIENCE: Duration = Duration::from_secs(2);
/// The time between two looks: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(20));

/// Does something until it does not fail for this reason any more, or the time is over.
fn until<T, E>(
    patience: Duration,
    mut attempt: impl FnMut() -> Result<T, E>,
    may_pass: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let (start, mut pause) = (Instant::now(), PAUSE.0);
    loop {
        match attempt() {
            Err(error) if may_pass(&error) && start.elapsed() < patience => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE.1);
            }
            result => return result,
        }
    }
}

/// Binds an event channel as soon as the dead process's end of it is free.
pub(super) fn patiently<T>(bind: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    until(PORT_PATIENCE, bind, |error| error.raw_os_error() == Some(libc::EINVAL))
}

/// Opens a disk again that another process had open.
pub(super) fn open_again(record: &Record, io: &Io) -> Result<Disk, OpenError> {
    let params = &record.params;
    let disk = until(LOCK_PATIENCE, || image::open(params, io), |error| error.errno() == Errno::EBUSY)?;
    let (found, told) = (disk.sectors(), record.info.sectors);
    if found < told {
        let text = format!("has {found} sectors, and the guests were told {told}");
        return Err(OpenError::new(params.image.path.as_ref(), Errno::EMEDIUMTYPE, text));
    }
    Ok(disk)
}

/// A mapped ring with its journal: a new one, or the one that the dead process has left.
pub(super) fn attached<M: GrantMap>(
    mut mapped: MappedRing<M>,
    journal: &Path,
    begin: Begin,
) -> Result<Attached<M>, Failure> {
    let ring = mapped.ring();
    let (abi, slots, responses) = (ring.abi(), ring.slots(), ring.next_response());
    if begin == Begin::Again {
        let left =
            Journal::resume(journal, abi, slots, responses).map_err(|e| (Errno::EIO, e.to_string()))?;
        if let Some((journal, replay)) = left {
            let unanswered = u32::try_from(replay.len()).unwrap_or(u32::MAX);
            ring.resume(unanswered).map_err(|e| (Errno::EIO, e.to_string()))?;
            return Ok(Attached { mapped, journal, replay });
        }
    }
    let journal = Journal::create(journal, abi, slots, responses)
        .map_err(|e| (errno_of(&e), format!("cannot make the journal {}: {e}", journal.display())))?;
    Ok(Attached { mapped, journal, replay: Replay::new() })
}

impl<X: Xen> State<X> {
    /// Serves the frontends that the dead process served.
    pub(super) fn take_over(&mut self, rings: &[RingParams]) {
        for params in rings {
            if let Err((_, why)) = self.connect(params, Begin::Again) {
                log::error!("{why}; it is not served until it reconnects");
                self.keeper.served(params.entry());
            }
        }
    }

    /// Tells frontends to look at their rings.
    pub(super) fn wake_frontends(&self, served: &[Served<X>]) {
        served.iter().for_each(Served::notify);
    }

    /// Ends what is in flight and closes the image, for another process to go on with everything.
    pub(super) fn leave(&mut self, answer: Answer) {
        if !self.keeper.is_kept() {
            let name = self.seat.name();
            let message =
                format!("{name}: cannot be taken over: it has failed, or is in this process's memory");
            return answer.give(failure(Errno::EINVAL, message));
        }
        // Whoever goes when asked to has not failed, even if it had nothing to answer.
        self.keeper.note(|record| record.history.fruitless = 0);
        // No limit: what is in flight takes as long as the store does, and meanwhile guests are served.
        self.pause(Wish { then: Then::Leave, until: None, answer });
    }
}
