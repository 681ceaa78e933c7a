//! A layer in a format with metadata: carries out what the format's core decides.
//!
//! The core (a [`Format`]) knows where data is and what must be written in which order; it does no I/O. A write that
//! needs new metadata is acknowledged only after a **commit**. All writers that are ready share one commit, so that what it
//! costs, above all the flushes that some formats need, is paid once for many requests.

mod copy;
mod survey;
mod unpacked;

use std::cell::{Cell, RefCell};
use std::ops::Range;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use format::{DiscardPlan, Format, FormatError, Load, Lookup, Plan, Step, Write};
use nix::errno::Errno;

use self::unpacked::Units;
use super::chain::Chain;
use super::file::ImageFile;
use super::{Extent, bytes};
use crate::buf::Buf;
use crate::io::Io;
use crate::sync::{Group, WaitSet, all};

/// Bytes that are written as zeros; more are left to the file system.
const MOST_ZEROS: u64 = 64 << 10;

/// An open image file of some format.
#[derive(Debug)]
pub struct Formatted<F> {
    /// Where the data is.
    pub file: ImageFile,
    /// The sector of the disk that is the file's first: other than 0 for pieces of a disk.
    first: u64,
    core: RefCell<F>,
    /// The bytes in the file are not those of the disk.
    sealed: bool,
    commits: Group,
    /// A preparation or a commit has ended.
    changed: WaitSet,
    /// Something was written, so there is something to do when the image is closed.
    dirty: Cell<bool>,
    /// A growth to this many sectors is asked for: the next commit carries it out.
    growth: Cell<Option<u64>>,
    /// What has become of it.
    grown: Cell<Result<(), Errno>>,
    units: Units,
}

impl<F: Format> Formatted<F> {
    /// A layer over an image that was opened and checked.
    pub fn new(file: ImageFile, core: F, io: &Io) -> Formatted<F> {
        Formatted::piece(file, core, 0, io)
    }

    /// The same for a piece of a disk, which begins with sector `first` of that.
    pub fn piece(file: ImageFile, core: F, first: u64, io: &Io) -> Formatted<F> {
        Formatted {
            file,
            first,
            sealed: core.cipher().is_some(),
            core: RefCell::new(core),
            commits: Group::new(io.scheduler.clone()),
            changed: WaitSet::new(io.scheduler.clone()),
            dirty: Cell::new(false),
            growth: Cell::new(None),
            grown: Cell::new(Ok(())),
            units: Units::default(),
        }
    }

    /// Something that the core alone knows.
    pub fn with_core<T>(&self, ask: impl FnOnce(&F) -> T) -> T {
        ask(&self.core.borrow())
    }

    /// Capacity.
    pub fn sectors(&self) -> u64 {
        self.core.borrow().sectors()
    }

    /// Byte offset of `count` sectors if they all are in this file as they are, one after another, and nothing must be read to
    /// know it.
    pub fn place(&self, sector: Sector, count: u32) -> Option<u64> {
        if self.sealed { None } else { self.core.borrow().place(sector.0, count) }
    }

    /// Byte offset for writing `count` sectors, if that is all there is to do.
    pub fn overwrite(&self, sector: Sector, count: u32) -> Option<u64> {
        let offset = if self.sealed { None } else { self.core.borrow().overwrite(sector.0, count) };
        if offset.is_some() {
            self.dirty.set(true);
        }
        offset
    }

    /// Where sectors lie: the longest prefix with one answer.
    pub async fn map(&self, io: &Io, sector: Sector, count: u32) -> Result<Extent, Errno> {
        loop {
            let lookup = self.core.borrow().map(sector.0, count).map_err(|e| self.errno(&e))?;
            return Ok(match lookup {
                Lookup::Data { count, .. } if self.sealed => Extent::Own { count },
                Lookup::Data { offset, count } => Extent::Data { offset, count },
                Lookup::Packed { count, .. } => Extent::Own { count },
                Lookup::Zero { count } => Extent::Zero { count },
                Lookup::Parent { count } => Extent::Parent { count },
                Lookup::Load(load) => {
                    self.load(io, &load).await?;
                    continue;
                }
            });
        }
    }

    async fn load(&self, io: &Io, load: &Load) -> Result<(), Errno> {
        match io.read_metadata(&self.file, load.offset, load.len as usize).await {
            Ok(bytes) => self.core.borrow_mut().loaded(load, &bytes).map_err(|e| self.errno(&e)),
            Err(errno) => {
                self.core.borrow_mut().load_failed(load);
                Err(errno)
            }
        }
    }

    /// Writes `range` of `buf` to `sector`. When this returns, the data is readable, and durable after the next flush.
    /// `chain` is the one that this is the leaf of.
    pub async fn write(
        &self,
        io: &Io,
        chain: &Chain,
        sector: Sector,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let count = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        match self.overwrite(sector, count) {
            Some(offset) => io.write(&self.file, offset, buf, range).await,
            None => self.write_planning(io, chain, sector, buf, range).await,
        }
    }

    /// The same for writes that need more than one step.
    async fn write_planning(
        &self,
        io: &Io,
        chain: &Chain,
        sector: Sector,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let mut publish = false;
        let written = self.write_parts(io, chain, sector, buf, range, &mut publish).await;
        // Also after an error: others wait for what this writer has written before it.
        let committed = if publish { self.commit(io).await } else { Ok(()) };
        written.and(committed)
    }

    /// Writes part by part. `publish` is set while some are written that no commit has taken.
    async fn write_parts(
        &self,
        io: &Io,
        chain: &Chain,
        mut sector: Sector,
        buf: &Buf,
        mut range: Range<usize>,
        publish: &mut bool,
    ) -> Result<(), Errno> {
        while !range.is_empty() {
            let count = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
            let plan = self.core.borrow_mut().plan_write(sector.0, count).map_err(|e| self.errno(&e))?;
            match plan {
                Plan::Load(load) => self.load(io, &load).await?,
                // Whoever waits holds nothing that others could wait for.
                Plan::Wait if std::mem::take(publish) => self.commit(io).await?,
                Plan::Wait => self.changed.wait().await,
                Plan::Write(write) => {
                    self.dirty.set(true);
                    let count = write.count;
                    let part = range.start..range.start + bytes(count);
                    let shared = write.publish;
                    let done = self.write_planned(io, chain, sector, write, buf, part).await;
                    if shared {
                        self.core.borrow_mut().written(sector.0, count, done.is_ok());
                        *publish |= done.is_ok();
                        if done.is_err() {
                            // Nobody will commit what this writer kept others from.
                            self.changed.wake_all();
                        }
                    }
                    done?;
                    sector = Sector(sector.0 + u64::from(count));
                    range.start += bytes(count);
                }
            }
        }
        Ok(())
    }

    async fn write_planned(
        &self,
        io: &Io,
        chain: &Chain,
        sector: Sector,
        mut write: Write,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        if let Some(prepare) = write.prepare.take() {
            let done = self.take_steps(io, &prepare.steps).await;
            if let Err(errno) = done {
                log::error!("{}: preparing room for new data failed: {errno}", self.file.path().display());
            }
            self.core.borrow_mut().prepared(prepare.key, done.is_ok());
            self.changed.wake_all();
            done?;
        }
        if write.copy_before == 0 && write.copy_after == 0 && !self.sealed {
            return io.write(&self.file, write.offset, buf, range).await;
        }
        // Rare, and large: kept out of the future that every request has room for.
        Box::pin(self.write_through_copy(io, chain, sector, &write, buf, range)).await
    }

    /// Publishes everything written so far, this caller's part included.
    async fn commit(&self, io: &Io) -> Result<(), Errno> {
        let result = self
            .commits
            .run(async || {
                // Not beside a commit, whoever leads it.
                if let Some(sectors) = self.growth.take() {
                    self.grown.set(self.grow(io, sectors).await);
                }
                self.publish(io).await
            })
            .await;
        // What a commit has published is visible only after it: whoever waits for that can plan again.
        self.changed.wake_all();
        result
    }

    async fn publish(&self, io: &Io) -> Result<(), Errno> {
        let begun = self.core.borrow_mut().begin_commit();
        let Some(steps) = begun else {
            return if self.core.borrow().is_poisoned() { Err(Errno::EIO) } else { Ok(()) };
        };
        let result = self.take_steps(io, &steps).await;
        self.say_if_poisoned(result);
        self.core.borrow_mut().commit_ended(result.is_ok());
        result
    }

    fn say_if_poisoned(&self, result: Result<(), Errno>) {
        if let Err(errno) = result {
            log::error!(
                "{}: writing metadata failed: {errno}; the image takes no more writes until it is reopened",
                self.file.path().display()
            );
        }
    }

    /// Discards what can be discarded of `count` sectors.
    pub async fn discard(&self, io: &Io, sector: Sector, count: u64) -> Result<(), Errno> {
        let mut publish = false;
        let discarded = self.discard_parts(io, sector, count, &mut publish).await;
        if publish {
            self.commit(io).await?;
            // What the first has freed is given back by the next, if it is worth it.
            self.commit(io).await?;
        }
        discarded
    }

    async fn discard_parts(
        &self,
        io: &Io,
        mut sector: Sector,
        mut count: u64,
        publish: &mut bool,
    ) -> Result<(), Errno> {
        while count > 0 {
            let wanted = u32::try_from(count).unwrap_or(u32::MAX);
            let plan = self.core.borrow_mut().plan_discard(sector.0, wanted).map_err(|e| self.errno(&e))?;
            let done = match plan {
                DiscardPlan::Load(load) => {
                    self.load(io, &load).await?;
                    0
                }
                DiscardPlan::Wait if std::mem::take(publish) => {
                    self.commit(io).await?;
                    0
                }
                DiscardPlan::Wait => {
                    self.changed.wait().await;
                    0
                }
                DiscardPlan::Skip { count } => count,
                DiscardPlan::Punch { offset, count } => {
                    self.dirty.set(true);
                    // What the store's units hold besides is left alone.
                    let unit =
                        self.file.store().discard.map_or(SECTOR_SIZE, |limits| limits.granularity.into());
                    let end = offset + u64::from(count) * SECTOR_SIZE;
                    let whole = offset.next_multiple_of(unit)..end / unit * unit;
                    if !whole.is_empty() {
                        self.punch(io, whole).await?;
                    }
                    count
                }
                DiscardPlan::Publish { count } => {
                    self.dirty.set(true);
                    *publish = true;
                    count
                }
            };
            sector.0 += u64::from(done);
            count -= u64::from(done).min(count);
        }
        Ok(())
    }

    /// Gives room back if the store can.
    async fn punch(&self, io: &Io, range: Range<u64>) -> Result<(), Errno> {
        match io.punch(&self.file, range).await {
            Err(Errno::EOPNOTSUPP) => Ok(()),
            result => result,
        }
    }

    /// Makes the disk this many sectors large, one resize at a time. When this returns, it is so and durable.
    pub async fn resize(&self, io: &Io, sectors: u64) -> Result<(), Errno> {
        self.growth.set(Some(sectors));
        self.grown.set(Err(Errno::EIO));
        // Whoever leads the round carries the growth out, and tells of it apart from what becomes of the commit.
        let _ = self.commit(io).await;
        self.grown.get()
    }

    async fn grow(&self, io: &Io, sectors: u64) -> Result<(), Errno> {
        let steps = loop {
            let begun = self.core.borrow_mut().begin_resize(sectors).map_err(|error| {
                log::error!("{}: cannot be resized: {error}", self.file.path().display());
                Errno::from_raw(error.errno())
            })?;
            match begun {
                Some(steps) => break steps,
                None => self.changed.wait().await,
            }
        };
        self.dirty.set(true);
        let result = self.take_steps(io, &steps).await;
        self.say_if_poisoned(result);
        self.core.borrow_mut().resize_ended(result.is_ok());
        result
    }

    /// Carries out steps. What lies between two flushes is in flight together.
    async fn take_steps(&self, io: &Io, steps: &[Step]) -> Result<(), Errno> {
        let alone = |step: &Step| matches!(step, Step::Flush | Step::Truncate(_) | Step::Settle);
        for part in steps.split_inclusive(alone) {
            let (last, others) = match part.split_last() {
                Some((last, others)) if alone(last) => (Some(last), others),
                _ => (None, part),
            };
            match others {
                [] => {}
                [one] => self.take_step(io, one).await?,
                several => all(several.iter().map(|step| self.take_step(io, step))).await?,
            }
            if let Some(last) = last {
                self.take_step(io, last).await?;
            }
        }
        Ok(())
    }

    async fn take_step(&self, io: &Io, step: &Step) -> Result<(), Errno> {
        match step {
            Step::Write(write) => io.write_metadata(&self.file, write.offset, &write.bytes).await,
            Step::Zero(range) if range.end.saturating_sub(range.start) <= MOST_ZEROS => {
                io.write_zeros(&self.file, range.clone()).await
            }
            Step::Zero(range) => io.zero_range(&self.file, range.clone()).await,
            Step::Truncate(len) => self.file.set_len(*len),
            Step::Punch(range) => self.punch(io, range.clone()).await,
            Step::Settle => {
                io.flights.settle().await;
                Ok(())
            }
            Step::Flush => io.fdatasync(&self.file).await,
        }
    }

    /// Brings the image into its resting state after writes. Nothing may be in flight.
    pub async fn close(&self, io: &Io) -> Result<(), Errno> {
        if !self.dirty.replace(false) {
            return Ok(());
        }
        let steps = self.core.borrow().close_steps();
        self.take_steps(io, &steps).await
    }

    fn errno(&self, error: &F::Error) -> Errno {
        log::debug!("{}: {error}", self.file.path().display());
        Errno::from_raw(error.errno())
    }
}
