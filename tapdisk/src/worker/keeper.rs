//! What is kept of a disk for the case that this process dies; see [`tap_ctl::inflight`].
//!
//! The record is written before what it tells takes effect, where the opposite order could lose something: a ring is in it
//! before it is served, another image before anything is written to it. Where it does not matter, after.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use tap_ctl::ControlDir;
use tap_ctl::inflight::{Folder, History, Record};
use tap_ctl::proto::{DiskInfo, Minor, OpenParams, QueueParams, RingEntry, RingParams};

use crate::porter::{self, Keep};

/// Who this process is to whoever takes over.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Its process id.
    pub pid: i32,
    /// Where NBD clients come in.
    pub socket: PathBuf,
    /// The word for `--engine`.
    pub engine: String,
    /// The size for `--parent-cache`.
    pub parent_cache: Option<u64>,
}

/// The record of one disk, shared by its threads.
#[derive(Debug)]
pub struct Keeper {
    dir: ControlDir,
    minor: Minor,
    /// `None`: nobody is to take over.
    record: Mutex<Option<Record>>,
}

impl Keeper {
    /// For a disk that is being opened.
    pub fn new(dir: ControlDir, minor: Minor) -> Keeper {
        Keeper { dir, minor, record: Mutex::new(None) }
    }

    /// For a disk that is taken over.
    pub fn going_on(dir: ControlDir, minor: Minor, record: Record) -> Keeper {
        Keeper { dir, minor, record: Mutex::new(Some(record)) }
    }

    /// The image is open. If it does not outlive the process, nobody could go on with it.
    ///
    /// # Errors
    /// The folder or the record cannot be written.
    pub fn begin(
        &self,
        identity: Identity,
        params: &OpenParams,
        info: DiskInfo,
        outlives: bool,
    ) -> io::Result<()> {
        self.keep(Keep::Begin)?;
        if !outlives {
            return Ok(());
        }
        let Identity { pid, socket, engine, parent_cache } = identity;
        let record = Record {
            pid,
            socket,
            engine,
            parent_cache,
            params: params.clone(),
            info,
            paused: false,
            rings: Vec::new(),
            history: History { began_ms: uptime_ms(), ..History::default() },
        };
        self.keep(Keep::Write(Box::new(record.clone())))?;
        *self.locked() = Some(record);
        Ok(())
    }

    /// Changes the record, if there is one.
    ///
    /// # Errors
    /// It cannot be written; then it is as before.
    pub fn change(&self, change: impl FnOnce(&mut Record)) -> io::Result<()> {
        let mut kept = self.locked();
        let Some(record) = &*kept else { return Ok(()) };
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            self.keep(Keep::Write(Box::new(changed.clone())))?;
            *kept = Some(changed);
        }
        Ok(())
    }

    /// The same where nothing is lost if whoever takes over does not know of it.
    pub fn note(&self, change: impl FnOnce(&mut Record)) {
        if let Err(error) = self.change(change) {
            log::warn!("minor {}: its record cannot be written: {error}", self.minor);
        }
    }

    /// A frontend is about to be served.
    ///
    /// # Errors
    /// As [`Keeper::change`].
    pub fn serves(&self, params: &RingParams) -> io::Result<()> {
        self.change(|record| {
            record.rings.retain(|ring| ring.entry() != params.entry());
            record.rings.push(params.clone());
        })
    }

    /// A frontend is not served any more.
    pub fn served(&self, entry: RingEntry) {
        self.note(|record| record.rings.retain(|ring| ring.entry() != entry));
    }

    /// Whether somebody could take over.
    pub fn is_kept(&self) -> bool {
        self.locked().is_some()
    }

    /// The second image is about to serve instead of the first. Whether that was noted, without which it must not be.
    pub fn leaves_first_image(&self) -> bool {
        let noted = self.change(|record| {
            if let Some(second) = record.params.secondary.take() {
                record.params.image = second;
                record.params.standby = false;
            }
        });
        noted.inspect_err(|error| log::error!("cannot note that the first image is left: {error}")).is_ok()
    }

    /// Nobody is to take over: the disk has failed, and a fresh process would not know it.
    pub fn give_up(&self) {
        if self.locked().take().is_some()
            && let Err(error) = self.keep(Keep::Forget)
        {
            log::error!("minor {}: its record cannot be removed: {error}", self.minor);
        }
    }

    /// The disk was closed.
    pub fn end(&self) {
        self.locked().take();
        if let Err(error) = self.keep(Keep::End) {
            log::warn!("minor {}: what was kept of it cannot be removed: {error}", self.minor);
        }
    }

    /// Where the journal of one of a frontend's rings is.
    pub fn journal(&self, params: &RingParams, queue: &QueueParams) -> PathBuf {
        Folder::of(&self.dir, self.minor).journal(params, queue)
    }

    fn keep(&self, what: Keep) -> io::Result<()> {
        porter::keep(&self.dir, self.minor, what)
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Option<Record>> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since the system was started.
pub fn uptime_ms() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    let uptime = clock_gettime(ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from);
    u64::try_from(uptime.unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}
