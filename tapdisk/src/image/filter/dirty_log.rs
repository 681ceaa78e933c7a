//! The dirty-block log: notes in a file which 64 KiB blocks of the disk are written or discarded ([`cbt`]).
//!
//! **What can be relied on**: the log may claim too much, never too little.
//!
//! - A block's bit is in the kernel's hands before anything of the block is written, so that it survives the death of this
//!   process. Bits that are asked for together are written together; a block that is marked already costs nothing.
//! - A flush makes the bits durable before the data.
//! - Data that was written but not flushed may outlive a loss of power while its bit does not. So the log's header says
//!   `consistent` = 0 from the moment it is opened on, durably, and what it said before again only when it has been closed
//!   well. XenServer's storage manager sets 0 before it starts a disk and 1 after it has stopped it: a log that it finds
//!   with 0 is not used. To put back what was found serves both it and those who leave the flag to us.
//! - A log that cannot be written is given up, which is told once: the disk goes on, and the flag stays 0.
//!
//! The file is written by ordinary calls, not through a mapping, whose writer the kernel kills (SIGBUS) when somebody cuts
//! the file off or its file system is full.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeSet;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use cbt::Log;
use nix::errno::Errno;

use crate::image::OpenError;
use crate::image::file::{ImageFile, Mode};
use crate::io::Io;
use crate::sync::Group;

/// Bytes of the file that are written together.
const PAGE: u64 = 4096;

/// An open log.
#[derive(Debug)]
pub struct DirtyLog {
    file: ImageFile,
    log: RefCell<Log>,
    /// What the header said when it was opened.
    found: i32,
    /// Pages of the file that differ from what is in memory.
    changed: RefCell<BTreeSet<u64>>,
    /// Pages are being written.
    writing: Cell<bool>,
    rounds: Group,
    /// Why it was given up.
    failed: OnceCell<Errno>,
}

impl DirtyLog {
    /// Opens the log of a disk of `bytes` bytes, and notes in it that it is being written. Blocking.
    pub fn open(path: &Path, bytes: u64, io: &Io) -> Result<DirtyLog, OpenError> {
        let failed = |what: &str, error: &std::io::Error| OpenError::io(path, what, error);
        let refuse = |text: String| OpenError::new(path, Errno::EINVAL, text);
        let file = ImageFile::open(path, Mode::Exclusive, false)?;
        let mut content = Vec::new();
        file.reader()?
            .take(file.len())
            .read_to_end(&mut content)
            .map_err(|e| failed("cannot be read", &e))?;
        let mut log = Log::parse(&content).map_err(|error| refuse(error.to_string()))?;
        if log.header().size < bytes {
            return Err(refuse(format!(
                "is the log of a disk of {} bytes, and this disk has {bytes}: \
                 `cbt-util set -n {} -s {bytes}` makes it large enough",
                log.header().size,
                path.display()
            )));
        }
        let found = log.header().consistent;
        log.set_consistent(0);
        let header = log.bytes(0..cbt::HEADER_LEN);
        let kept = file.keep();
        std::os::unix::fs::FileExt::write_all_at(kept.file(), &header, 0)
            .and_then(|()| kept.file().sync_data())
            .map_err(|e| failed("cannot be written", &e))?;
        Ok(DirtyLog {
            file,
            log: RefCell::new(log),
            found,
            changed: RefCell::default(),
            writing: Cell::new(false),
            rounds: Group::new(io.scheduler.clone()),
            failed: OnceCell::new(),
        })
    }

    /// Whether all of these sectors are noted, so that they may be written at once.
    pub fn has(&self, sector: Sector, count: u64) -> bool {
        self.failed.get().is_some()
            || (self.is_settled() && self.log.borrow().is_marked(&bytes(sector, count)))
    }

    /// Nothing is in memory only.
    fn is_settled(&self) -> bool {
        !self.writing.get() && self.changed.borrow().is_empty()
    }

    /// Notes sectors that are going to be changed.
    pub async fn note(&self, io: &Io, sector: Sector, count: u64) {
        if self.has(sector, count) {
            return;
        }
        let changed = self.log.borrow_mut().mark(&bytes(sector, count));
        if !changed.is_empty() {
            self.changed.borrow_mut().extend(pages(&changed));
        }
        // Also if nothing has changed now: another task's bits, which are ours too, may still be on their way.
        self.settle(io).await;
    }

    /// Waits until everything that is in memory now is in the file.
    async fn settle(&self, io: &Io) {
        let result = self
            .rounds
            .run(async || {
                self.writing.set(true);
                let result = self.write_changed(io).await;
                self.writing.set(false);
                result
            })
            .await;
        self.give_up_unless(result);
    }

    async fn write_changed(&self, io: &Io) -> Result<(), Errno> {
        for page in self.changed.take() {
            let bytes = self.log.borrow().bytes(page * PAGE..(page + 1) * PAGE);
            io.write_metadata(&self.file, page * PAGE, &bytes).await?;
        }
        Ok(())
    }

    fn give_up_unless(&self, result: Result<(), Errno>) {
        if let Err(errno) = result
            && self.failed.set(errno).is_ok()
        {
            log::error!(
                "{}: the log of written blocks cannot be written: {errno}; it is given up, and says that it is not consistent",
                self.file.path().display()
            );
        }
    }

    /// Makes what was noted durable.
    pub async fn flush(&self, io: &Io) {
        if self.failed.get().is_none() {
            self.give_up_unless(io.fdatasync(&self.file).await);
        }
    }

    /// The disk has now so many bytes.
    pub async fn grow(&self, io: &Io, bytes: u64) {
        let before = self.log.borrow().len();
        // A log may be larger than its disk.
        if self.failed.get().is_some() || self.log.borrow_mut().grow(bytes).is_err() {
            return;
        }
        // Whatever stood behind the old bits, zeros do now; the header has the new size.
        let after = self.log.borrow().len();
        self.changed.borrow_mut().extend(pages(&(0..1)).chain(pages(&(before..after))));
        self.settle(io).await;
        self.flush(io).await;
    }

    /// Says that the log is complete, if it was when it was opened. Nothing may be in flight.
    pub async fn close(&self, io: &Io) {
        if self.found == 0 || self.failed.get().is_some() {
            return;
        }
        // The bits first: the flag vouches for them.
        self.flush(io).await;
        if self.failed.get().is_none() {
            self.log.borrow_mut().set_consistent(self.found);
            self.changed.borrow_mut().insert(0);
            self.settle(io).await;
            self.flush(io).await;
        }
    }
}

fn bytes(sector: Sector, count: u64) -> Range<u64> {
    sector.0 * SECTOR_SIZE..sector.0.saturating_add(count).saturating_mul(SECTOR_SIZE)
}

/// The pages that a range of the file touches.
fn pages(range: &Range<u64>) -> Range<u64> {
    range.start / PAGE..range.end.div_ceil(PAGE)
}

#[cfg(test)]
mod tests;
