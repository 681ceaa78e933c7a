//! A layer in the VHD format: carries out what the format's core decides.
//!
//! The core (`vhd::Vhd`) knows where data is and what must be written in which order; it does no I/O. A write that needs
//! new metadata is acknowledged only after a **commit**: data durable first, then block table and bitmaps. All writers
//! that are ready share one commit, so its two device flushes are paid once for many requests.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use vhd::{BlockIndex, CloseStep, Lookup, MetaWrite, Prepare, Vhd, WritePlan};

use super::Extent;
use super::file::ImageFile;
use crate::buf::Buf;
use crate::io::Io;
use crate::sync::{Group, WaitSet};

/// An open VHD.
#[derive(Debug)]
pub struct VhdLayer {
    /// Where the data is.
    pub file: ImageFile,
    core: RefCell<Vhd>,
    commits: Group,
    prepared: WaitSet,
    /// Something was written, so the footer at the end must be made good when the image is closed.
    dirty: Cell<bool>,
    /// A growth to this many sectors is asked for: the next commit carries it out.
    growth: Cell<Option<u64>>,
    /// What has become of it.
    grown: Cell<Result<(), Errno>>,
}

impl VhdLayer {
    /// A layer over an image that was opened and checked.
    pub fn new(file: ImageFile, core: Vhd, io: &Io) -> VhdLayer {
        VhdLayer {
            file,
            core: RefCell::new(core),
            commits: Group::new(io.scheduler.clone()),
            prepared: WaitSet::new(io.scheduler.clone()),
            dirty: Cell::new(false),
            growth: Cell::new(None),
            grown: Cell::new(Ok(())),
        }
    }

    /// Capacity.
    pub fn sectors(&self) -> u64 {
        self.core.borrow().sectors()
    }

    /// Byte offset of `count` sectors if they all are in this layer, one after another, and nothing must be read to know it.
    pub fn place(&self, sector: Sector, count: u32) -> Option<u64> {
        self.core.borrow().place(sector.0, count)
    }

    /// Where sectors lie: the longest prefix with one answer.
    pub async fn map(&self, io: &Io, sector: Sector, count: u32) -> Result<Extent, Errno> {
        loop {
            let lookup = self.core.borrow().map(sector.0, count).map_err(|e| self.errno(&e))?;
            match lookup {
                Lookup::Data { offset, count } => return Ok(Extent::Data { offset, count }),
                Lookup::Zero { count } => return Ok(Extent::Zero { count }),
                Lookup::Parent { count } => return Ok(Extent::Parent { count }),
                Lookup::NeedBitmap { block, offset, len } => self.load_bitmap(io, block, offset, len).await?,
            }
        }
    }

    async fn load_bitmap(&self, io: &Io, block: BlockIndex, offset: u64, len: u32) -> Result<(), Errno> {
        let bytes = io.read_metadata(&self.file, offset, len as usize).await?;
        self.core.borrow_mut().insert_bitmap(block, &bytes).map_err(|e| self.errno(&e))
    }

    /// Writes `range` of `buf` to `sector`. When this returns, the data is readable, and durable after the next flush.
    pub async fn write(&self, io: &Io, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        let count = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        let overwrite = self.core.borrow().overwrite(sector.0, count);
        if let Some(offset) = overwrite {
            self.dirty.set(true);
            return io.write(&self.file, offset, buf, range).await;
        }
        self.write_planning(io, sector, buf, range).await
    }

    /// The same for writes that need more than one step.
    async fn write_planning(
        &self,
        io: &Io,
        sector: Sector,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let (mut sector, mut range) = (sector, range);
        let mut publish = false;
        while !range.is_empty() {
            let count = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
            let plan = self.core.borrow_mut().plan_write(sector.0, count).map_err(|e| self.errno(&e))?;
            match plan {
                WritePlan::NeedBitmap { block, offset, len } => {
                    self.load_bitmap(io, block, offset, len).await?
                }
                WritePlan::Wait { .. } => self.prepared.wait().await,
                WritePlan::Write { offset, count, prepare, publish: publish_these } => {
                    self.dirty.set(true);
                    let bytes = super::bytes(count);
                    let part = range.start..range.start + bytes;
                    let done = self.write_planned(io, prepare, offset, buf, part).await;
                    if publish_these {
                        let mut core = self.core.borrow_mut();
                        match done {
                            Ok(()) => core.written(sector.0, count),
                            Err(_) => core.write_failed(sector.0, count),
                        }
                        publish |= done.is_ok();
                    }
                    done?;
                    sector = Sector(sector.0 + u64::from(count));
                    range.start += bytes;
                }
            }
        }
        if publish { self.commit(io).await } else { Ok(()) }
    }

    async fn write_planned(
        &self,
        io: &Io,
        prepare: Option<Prepare>,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        if let Some(prepare) = prepare {
            self.prepare(io, prepare).await?;
        }
        io.write(&self.file, offset, buf, range).await
    }

    async fn prepare(&self, io: &Io, prepare: Prepare) -> Result<(), Errno> {
        let done = self.carry_out(io, &prepare).await;
        let mut core = self.core.borrow_mut();
        match done {
            Ok(()) => core.prepared(prepare.block),
            Err(errno) => {
                log::error!("{}: preparing a new block failed: {errno}", self.file.path().display());
                core.prepare_failed(prepare.block);
            }
        }
        drop(core);
        self.prepared.wake_all();
        done
    }

    async fn carry_out(&self, io: &Io, prepare: &Prepare) -> Result<(), Errno> {
        match &prepare.footer {
            // A file: bytes beyond the end read as zeros once stale ones are cut off. Writing the footer grows the file
            // in one step, so that whenever we are stopped its end is a footer.
            Some(footer) => {
                if let Some(trim) = prepare.trim {
                    self.file.set_len(trim)?;
                }
                self.write_metadata(io, footer).await?;
            }
            // A device: whatever was there before must not show through.
            None => io.zero_range(&self.file, prepare.body.clone()).await?,
        }
        io.write_zeros(&self.file, prepare.zero.clone()).await
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
        // The bits of a commit are visible only after it: whoever waits for a block can plan again.
        self.prepared.wake_all();
        result
    }

    async fn publish(&self, io: &Io) -> Result<(), Errno> {
        let begun = self.core.borrow_mut().begin_commit();
        let Some(commit) = begun else {
            return if self.core.borrow().is_poisoned() { Err(Errno::EIO) } else { Ok(()) };
        };
        // Barrier 1: what the metadata is going to point to must be on the disk before it.
        let mut result = io.fdatasync(&self.file).await;
        for write in &commit.writes {
            if result.is_err() {
                break;
            }
            result = self.write_metadata(io, write).await;
        }
        let mut core = self.core.borrow_mut();
        match result {
            Ok(()) => core.commit_done(commit),
            Err(errno) => {
                self.say_poisoned(errno);
                core.commit_failed(commit);
            }
        }
        result
    }

    fn say_poisoned(&self, errno: Errno) {
        log::error!(
            "{}: writing metadata failed: {errno}; the image takes no more writes until it is reopened",
            self.file.path().display()
        );
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
        let resize = loop {
            let begun = self.core.borrow_mut().begin_resize(sectors).map_err(|error| {
                log::error!("{}: cannot be resized: {error}", self.file.path().display());
                Errno::from_raw(error.errno())
            })?;
            match begun {
                Some(resize) => break resize,
                None => self.prepared.wait().await,
            }
        };
        self.dirty.set(true);
        let result = self.take_steps(io, &resize.steps).await;
        let mut core = self.core.borrow_mut();
        match result {
            Ok(()) => core.resize_done(resize),
            Err(errno) => {
                self.say_poisoned(errno);
                core.resize_failed(resize);
            }
        }
        result
    }

    async fn take_steps(&self, io: &Io, steps: &[CloseStep]) -> Result<(), Errno> {
        for step in steps {
            match step {
                CloseStep::Write(write) => self.write_metadata(io, write).await?,
                CloseStep::Truncate(len) => self.file.set_len(*len)?,
                CloseStep::Flush => io.fdatasync(&self.file).await?,
            }
        }
        Ok(())
    }

    async fn write_metadata(&self, io: &Io, write: &MetaWrite) -> Result<(), Errno> {
        io.write_metadata(&self.file, write.offset, &write.bytes).await
    }

    /// Makes footers and batmap good after writes. Nothing may be in flight.
    pub async fn close(&self, io: &Io) -> Result<(), Errno> {
        if !self.dirty.replace(false) {
            return Ok(());
        }
        let steps = self.core.borrow().close_writes();
        self.take_steps(io, &steps.steps).await
    }

    fn errno(&self, error: &vhd::Error) -> Errno {
        log::debug!("{}: {error}", self.file.path().display());
        Errno::from_raw(error.errno())
    }
}
