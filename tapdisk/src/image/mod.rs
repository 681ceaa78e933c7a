//! A disk: a chain of images, and what is between it and its guests.

pub mod cache;
mod chain;
mod discard;
mod error;
pub mod file;
mod filter;
mod formatted;
mod hits;
pub mod holders;
mod layer;
pub mod locks;
mod nbd;
mod null;
mod open;
pub(crate) mod policy;
mod qcow;
mod qcow2;
pub(crate) mod ram;
mod raw;
mod resize;
mod share;
pub mod snapshot;
pub(crate) mod stack;
pub mod store;
mod survey;
mod vmdk;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use blkif::Sector;
use nix::errno::Errno;
use tap_ctl::proto::{DiskStats, ImageSpec};

use self::chain::Chain;
pub use self::error::OpenError;
use self::filter::Filters;
pub use self::filter::Succession;
pub use self::open::open;
use self::share::Common;
pub use self::share::{DiskShare, OnFailure};
pub use self::survey::{Holds, Run};
use crate::buf::Buf;
use crate::io::{Direction, Io, Transfer};
use crate::sync::Group;

/// Bytes of so many sectors.
const fn bytes(sectors: u32) -> usize {
    sectors as usize * 512
}

/// Where sectors of a layer are; counts in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// At this byte offset of the layer's file.
    Data {
        /// Bytes from the start of the file.
        offset: u64,
        /// Sectors.
        count: u32,
    },
    /// Nowhere: they read as zeros.
    Zero {
        /// Sectors.
        count: u32,
    },
    /// The layer must be asked for them: they are compressed, encrypted, or in no file.
    Own {
        /// Sectors.
        count: u32,
    },
    /// Not in this layer.
    Parent {
        /// Sectors.
        count: u32,
    },
}

/// An open disk, or one of several handles of it. All requests on a handle come from one thread.
#[derive(Debug)]
pub struct Disk {
    chain: Rc<Chain>,
    /// What stands on top of the images, if anything does.
    filters: Option<Box<Filters>>,
    io: Io,
    readonly: Cell<bool>,
    flushes: Group,
    resizing: Cell<bool>,
    common: Arc<Common>,
}

impl Disk {
    fn new(chain: Rc<Chain>, filters: Option<Box<Filters>>, readonly: bool, common: Arc<Common>) -> Disk {
        let io = chain.io.clone();
        let flushes = Group::new(io.scheduler.clone());
        let (readonly, resizing) = (Cell::new(readonly), Cell::new(false));
        Disk { chain, filters, io, readonly, flushes, resizing, common }
    }

    /// The images that serve now.
    fn chain(&self) -> &Chain {
        match &self.filters {
            None => &self.chain,
            Some(filters) => filters.serving(&self.chain),
        }
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.common.sectors()
    }

    /// Whether writes are refused.
    pub fn is_readonly(&self) -> bool {
        self.readonly.get()
    }

    /// Who is told when the second image serves instead of the first; asked before anything is written to the second only.
    pub fn tell_succession(&self, succession: Succession) {
        if let Some(filters) = &self.filters {
            filters.tell_succession(succession);
        }
    }

    /// Who is told when a flush fails, on whichever handle, before anybody else learns of it.
    pub fn tell_failure(&self, whom: OnFailure) {
        self.common.tell_failure(whom);
    }

    /// Whether what is written is still there when this process has died: not so in a file without a name.
    pub fn outlives_process(&self) -> bool {
        self.chain.leaf.files().into_iter().all(|file| !file.is_nameless())
    }

    /// Physical block size of the store in bytes.
    pub fn physical_block_size(&self) -> u32 {
        self.chain.leaf.physical_block_size()
    }

    /// Why the disk was stopped, once a flush has failed: what the device holds is unknown from then on (the kernel reports
    /// such a loss only once).
    pub fn failure(&self) -> Option<String> {
        self.common.failure().map(str::to_owned)
    }

    /// Gives up writing for good, down to the descriptor. Nothing may be in flight.
    pub fn make_readonly(&self) -> Result<(), OpenError> {
        if !self.readonly.get() {
            for file in self.chain.leaf.files() {
                file.make_readonly()?;
            }
            self.readonly.set(true);
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.readonly.get() {
            return Err(Errno::EROFS);
        }
        match self.common.failure() {
            Some(_) => Err(Errno::EIO),
            None => Ok(()),
        }
    }

    /// The image, for messages.
    pub fn name(&self) -> std::path::Display<'_> {
        self.chain.leaf.name().display()
    }

    /// Starts to move all of `buf` if that takes a single transfer and nothing must be read or locked first, as is the case
    /// for nearly every request; `None`: go the long way, by [`Disk::read`] or [`Disk::write`].
    pub fn start(&self, direction: Direction, sector: Sector, buf: &Buf) -> Option<Transfer<'_>> {
        if direction == Direction::Write && self.check_writable().is_err() {
            return None;
        }
        match &self.filters {
            None => self.chain.start(direction, sector, buf),
            Some(filters) => filters.start(&self.chain, direction, sector, buf),
        }
    }

    /// Fills `buf`, whose length is a multiple of 512, from `sector` on.
    pub async fn read(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        match &self.filters {
            None => self.chain.read(sector, buf, 0..buf.len()).await,
            // Kept out of the future that every request has room for, as everything else that filters do.
            Some(filters) => Box::pin(filters.read(&self.chain, sector, buf)).await,
        }
    }

    /// Writes `buf`, whose length is a multiple of 512, to `sector` and on.
    pub async fn write(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        self.check_writable()?;
        match &self.filters {
            None => self.chain.write(sector, buf, 0..buf.len()).await,
            Some(filters) => Box::pin(filters.write(&self.chain, sector, buf)).await,
        }
    }

    /// Makes every write that has been answered durable, whichever handle answered it. Flushes that are asked for together
    /// share one.
    ///
    /// After a failure nothing is promised any more: this and all later flushes and writes fail.
    pub async fn flush(&self) -> Result<(), Errno> {
        if self.readonly.get() {
            return Ok(());
        }
        self.flushes
            .run(async || {
                self.check_writable()?;
                let result = match &self.filters {
                    None => self.chain.leaf.flush(&self.io).await,
                    Some(filters) => Box::pin(filters.flush(&self.chain)).await,
                };
                if let Err(errno) = result {
                    let name = self.name();
                    let why =
                        format!("{name}: flushing failed: {errno}; writes may be lost, the disk is stopped");
                    log::error!("{why}");
                    self.common.fail(why);
                }
                // Another handle's flush may have been told of the loss instead of this one.
                result.and(self.check_writable())
            })
            .await
    }

    /// Brings the leaf into its resting state. Nothing may be in flight. Of several handles the last one is closed.
    pub async fn close(&self) -> Result<(), Errno> {
        if let Some(filters) = &self.filters {
            filters.stop().await;
        }
        if self.check_writable().is_ok() {
            let closed = self.chain.leaf.close(&self.io).await;
            match closed {
                // It was left because it is full: as it is, it is what a stop of the process leaves, which every format survives.
                Err(errno) if !std::ptr::eq(self.chain(), &raw const *self.chain) => {
                    log::warn!("{}: cannot be closed cleanly: {errno}", self.name());
                }
                result => result?,
            }
            self.flush().await?;
        }
        if let Some(filters) = self.filters.as_ref().filter(|_| self.failure().is_none()) {
            filters.close().await;
        }
        Ok(())
    }

    /// What goes on beside the guests' requests, for the executor of the thread, which must run it. It ends when
    /// the disk is closed, and can be begun again then.
    pub fn background(self: &Rc<Disk>) -> Option<impl Future<Output = ()> + use<>> {
        let work = self.filters.as_ref()?.begin_work()?;
        let disk = self.clone();
        Some(async move {
            if let Some(filters) = &disk.filters {
                filters.work(&disk.chain, work).await;
            }
        })
    }

    /// Whether the disk goes on, but not as it was asked for.
    pub fn is_degraded(&self) -> bool {
        self.filters.as_ref().is_some_and(|filters| filters.is_degraded())
    }

    /// The same, in words.
    pub fn degradation(&self) -> Option<String> {
        self.filters.as_ref()?.degradation()
    }

    /// The image that must be opened instead when the disk is opened again: a secondary one that has become the disk.
    pub fn heir(&self) -> Option<ImageSpec> {
        self.filters.as_ref()?.heir().cloned()
    }

    /// What it tells of its images.
    pub fn stats(&self) -> DiskStats {
        let filters = self.filters.as_ref();
        let stats = filters.map_or_else(DiskStats::default, |filters| filters.stats(self.sectors()));
        DiskStats { images: self.chain().stats(), cache: self.chain.cache_stats(), ..stats }
    }
}

#[cfg(test)]
mod tests;
