//! Becoming the tapdisk that served a minor before and has died, or made room.
//!
//! The claim on the minor's marker comes first: the kernel frees it when the other process is gone, and gives it to one
//! successor only.

use std::io;
use std::sync::Arc;

use mio::Token;
use tap_ctl::Reply;
use tap_ctl::inflight::{Folder, History, Record};
use tap_ctl::proto::Minor;

use super::history::{Verdict, judge};
use super::{Event, Server};
use crate::journal;
use crate::porter::{self, Keep};
use crate::vbd::Vbd;
use crate::worker::Source;
use crate::worker::keeper::{Keeper, uptime_ms};
use crate::xen::Xen;

/// Why a disk is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// Somebody serves it, or it is not there any more.
    #[error("{0}")]
    Refused(String),
    /// It was closed, or has failed.
    #[error("minor {0} left nothing to go on with: it was closed, or its disk has failed")]
    Nothing(Minor),
    /// Its tapdisks die without doing anything.
    #[error("minor {0}: its tapdisks ended again and again without having answered anything; see their logs")]
    Hopeless(Minor),
    /// The record cannot be used.
    #[error("cannot use the record of minor {minor}: {source}")]
    Record {
        /// The minor.
        minor: Minor,
        /// What the system said.
        source: io::Error,
    },
}

impl<X: Xen> Server<X> {
    /// Goes on with a disk. Blocking; to be called before [`Server::run`].
    ///
    /// # Errors
    /// Nobody serves the disk then; its frontends wait.
    pub fn take_over(&mut self, minor: Minor) -> Result<(), TakeoverError> {
        let refused = |reply: Reply| match reply {
            Reply::Error { message, .. } => TakeoverError::Refused(message),
            _ => TakeoverError::Refused(format!("minor {minor}: the disk's thread gave no sensible answer")),
        };
        self.vbds.push(Vbd::attach(&self.dir, minor).map_err(refused)?);
        let failed = |source| TakeoverError::Record { minor, source };
        let folder = Folder::of(&self.dir, minor);
        let mut record =
            porter::record(&self.dir, minor).map_err(failed)?.ok_or(TakeoverError::Nothing(minor))?;
        let write = |record: &Record| porter::keep(&self.dir, minor, Keep::Write(Box::new(record.clone())));
        let dead = record.pid;
        match judge(record.history, responses(&folder, &record), uptime_ms()) {
            Verdict::Begin(pause, history) => {
                (record.pid, record.history) = (self.pid, history);
                // Before anything that could kill us: the next one is to know that we were here.
                write(&record).map_err(failed)?;
                std::thread::sleep(pause);
            }
            Verdict::Hopeless => {
                record.history = History { hopeless: true, ..record.history };
                write(&record).map_err(failed)?;
                return Err(TakeoverError::Hopeless(minor));
            }
        }
        if let Err(error) = porter::clean_up(&self.dir, dead, minor, &record.socket) {
            log::warn!("the sockets of tapdisk {dead} may have stayed: {error}");
        }
        log::info!("minor {minor}: going on with {} after tapdisk {dead}", record.params.image);
        if let Some(shared) = record.params.shared_parent {
            let image =
                porter::parent(&self.dir, shared).map_err(|(_, text)| TakeoverError::Refused(text))?;
            record.params.parent = Some(image);
        }
        let known_as = Some(record.socket.clone());
        let keeper = Arc::new(Keeper::going_on(self.dir.clone(), minor, record.clone()));
        let source = Source::TakeOver { record, keeper };
        if let Some(reply) = self.start_worker(Token(usize::MAX), minor, source, known_as) {
            return Err(refused(reply));
        }
        // The worker tells nothing before this.
        match self.receiver.recv() {
            Ok(Event::Opened(_, _, Ok(info))) => {
                self.opened(minor, info);
                porter::settled();
                Ok(())
            }
            Ok(Event::Opened(_, _, Err(reply))) => Err(refused(reply)),
            _ => Err(refused(Reply::Done)),
        }
    }
}

/// How many requests the rings of a disk have answered, in a measure that only has to change with every answer.
fn responses(folder: &Folder, record: &Record) -> u64 {
    let journals =
        record.rings.iter().flat_map(|ring| ring.queues.iter().map(|queue| folder.journal(ring, queue)));
    journals.filter_map(|path| journal::responses(&path)).map(u64::from).sum()
}
