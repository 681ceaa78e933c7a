//! What stands between a disk's images and its guests, whatever the format of the images.
//!
//! | filter | what it does |
//! |---|---|
//! | [`dirty_log`] | notes which blocks are written |
//! | [`mirror`] | writes to a second image too |
//! | [`standby`] | writes to a second image once the first is full |
//! | [`local_cache`] | writes to the leaf what was read from a parent |
//!
//! A write passes through them in this order, so that a block is noted before anything of it is written anywhere. A disk
//! without filters pays for them with one look at an `Option`; with one it has a single thread, because what a filter
//! knows is not shared.

mod dirty_log;
mod local_cache;
mod mirror;
mod standby;

use std::path::Path;
use std::rc::Rc;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{DiskStats, ImageSpec, OpenParams};

use self::dirty_log::DirtyLog;
use self::local_cache::LocalCache;
use self::mirror::Mirror;
pub use self::mirror::Succession;
use self::standby::Standby;
use super::OpenError;
use super::chain::Chain;
use super::locks::BlockLock;
use crate::buf::Buf;
use crate::io::{Direction, Io, Transfer};
use crate::sync::both;

/// What [`Filters::work`] is to do.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    mirror: bool,
    local: bool,
}

/// The filters of a disk.
#[derive(Debug)]
pub struct Filters {
    io: Io,
    log: Option<DirtyLog>,
    mirror: Option<Mirror>,
    standby: Option<Standby>,
    local: Option<LocalCache>,
}

impl Filters {
    /// What `params` asks for on top of a disk of so many sectors; `None`: nothing.
    pub fn open(
        params: &OpenParams,
        chain: &Rc<Chain>,
        sectors: u64,
        io: &Io,
    ) -> Result<Option<Box<Filters>>, OpenError> {
        let (mirror, standby) = match &params.secondary {
            None => (None, None),
            Some(spec) if params.standby => (None, Some(Standby::open(spec, params, chain, sectors, io)?)),
            Some(spec) => (Some(Mirror::open(spec, params, sectors, io)?), None),
        };
        // Last, because it changes something. What is never written needs no log.
        let log = params.log.as_ref().filter(|_| !params.readonly);
        let log = log.map(|path| DirtyLog::open(Path::new(path), sectors * SECTOR_SIZE, io)).transpose()?;
        // It writes to the leaf.
        let local = (params.local_cache && !params.readonly).then(|| LocalCache::new(io));
        let needed = mirror.is_some() || standby.is_some() || log.is_some() || local.is_some();
        Ok(needed.then(|| Box::new(Filters { io: io.clone(), log, mirror, standby, local })))
    }

    /// The images that serve now, where `chain` did at first.
    pub fn serving<'a>(&'a self, chain: &'a Chain) -> &'a Chain {
        let standby = || self.standby.as_ref().and_then(Standby::successor);
        self.mirror.as_ref().and_then(Mirror::successor).or_else(standby).unwrap_or(chain)
    }

    /// Whether the second image is lost, or the first is full.
    pub fn is_degraded(&self) -> bool {
        self.mirror.as_ref().is_some_and(|mirror| !mirror.is_active())
            || self.standby.as_ref().is_some_and(|standby| standby.successor().is_some())
    }

    /// The same, in words.
    pub fn degradation(&self) -> Option<String> {
        let standby = || self.standby.as_ref().and_then(Standby::degradation);
        self.mirror.as_ref().and_then(Mirror::degradation).or_else(standby)
    }

    /// The image that has become the disk for good, where the one that was opened has not everything any more.
    pub fn heir(&self) -> Option<&ImageSpec> {
        self.mirror.as_ref().and_then(Mirror::heir)
    }

    /// Who is told when another image than at first serves.
    pub fn tell_succession(&self, succession: Succession) {
        if let Some(mirror) = &self.mirror {
            mirror.tell_succession(succession);
        }
    }

    /// Whether each write goes to two images.
    fn is_mirroring(&self) -> bool {
        self.mirror.as_ref().is_some_and(Mirror::is_active)
    }

    /// Whether there is a second image, whose size is its own.
    pub fn has_second(&self) -> bool {
        self.is_mirroring() || self.standby.is_some()
    }

    /// As [`Disk::start`](super::Disk::start).
    pub fn start<'a>(
        &'a self,
        chain: &'a Chain,
        direction: Direction,
        sector: Sector,
        buf: &Buf,
    ) -> Option<Transfer<'a>> {
        self.mirror.iter().for_each(Mirror::count_request);
        if direction == Direction::Write {
            let noted = self.log.as_ref().is_none_or(|log| log.has(sector, buf.len() as u64 / SECTOR_SIZE));
            if self.has_second() || self.local.is_some() || !noted {
                return None;
            }
        }
        self.serving(chain).start(direction, sector, buf)
    }

    /// Fills `buf` from `sector` on.
    pub async fn read(&self, chain: &Chain, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        let serving = self.serving(chain);
        serving.read(sector, buf, 0..buf.len()).await?;
        if let Some(local) = self.local_of(serving, chain) {
            local.offer(chain, sector, buf).await;
        }
        Ok(())
    }

    /// The local cache, unless another image than the one it is for serves.
    fn local_of(&self, serving: &Chain, chain: &Chain) -> Option<&LocalCache> {
        self.local.as_ref().filter(|_| std::ptr::eq(serving, chain))
    }

    /// Writes `buf` to `sector` and on.
    pub async fn write(&self, chain: &Chain, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        let count = buf.len() as u64 / SECTOR_SIZE;
        self.note(sector, count).await;
        let _lock = self.keep_local_off(sector, count).await;
        match (&self.mirror, &self.standby) {
            (Some(mirror), _) => mirror.write(chain, sector, buf).await,
            (None, Some(standby)) => {
                standby.change(chain, count, async |to| to.write(sector, buf, 0..buf.len()).await).await
            }
            (None, None) => chain.write(sector, buf, 0..buf.len()).await,
        }
    }

    /// Discards sectors, which lie on the disk.
    pub async fn discard(
        &self,
        chain: &Chain,
        sector: Sector,
        count: u64,
        secure: bool,
    ) -> Result<(), Errno> {
        self.note(sector, count).await;
        let _lock = self.keep_local_off(sector, count).await;
        match (&self.mirror, &self.standby) {
            (Some(mirror), _) => mirror.discard(chain, sector, count, secure).await,
            (None, Some(standby)) => {
                standby.change(chain, 0, async |from| from.discard(sector, count, secure).await).await
            }
            (None, None) => chain.discard(sector, count, secure).await,
        }
    }

    async fn note(&self, sector: Sector, count: u64) {
        if let Some(log) = &self.log {
            log.note(&self.io, sector, count).await;
        }
    }

    async fn keep_local_off(&self, sector: Sector, count: u64) -> Option<BlockLock<'_>> {
        match &self.local {
            Some(local) => Some(local.lock(sector, count).await),
            None => None,
        }
    }

    /// Makes what was written durable, its notes first.
    pub async fn flush(&self, chain: &Chain) -> Result<(), Errno> {
        if let Some(log) = &self.log {
            log.flush(&self.io).await;
        }
        match (&self.mirror, &self.standby) {
            (Some(mirror), _) => mirror.flush(chain).await,
            (None, Some(standby)) => standby.flush(chain, &self.io).await,
            (None, None) => chain.leaf.flush(&self.io).await,
        }
    }

    /// The disk has grown.
    pub async fn grown(&self, sectors: u64) {
        if let Some(log) = &self.log {
            log.grow(&self.io, sectors * SECTOR_SIZE).await;
        }
    }

    /// Begins what goes on beside the guests' requests, until [`Filters::stop`]; `None`: there is nothing.
    pub fn begin_work(&self) -> Option<Work> {
        let work = Work {
            mirror: self.mirror.as_ref().is_some_and(Mirror::begin_work),
            local: self.local.as_ref().is_some_and(LocalCache::begin_work),
        };
        (work.mirror || work.local).then_some(work)
    }

    /// Does what was begun.
    pub async fn work(&self, chain: &Chain, work: Work) {
        let mirror = async {
            if let Some(mirror) = self.mirror.as_ref().filter(|_| work.mirror) {
                mirror.work(chain).await;
            }
        };
        let local = async {
            if let Some(local) = self.local.as_ref().filter(|_| work.local) {
                local.work(chain).await;
            }
        };
        both(mirror, local).await;
    }

    /// Has [`Filters::work`] end, and waits for it.
    pub async fn stop(&self) {
        if let Some(local) = &self.local {
            local.stop().await;
        }
        if let Some(mirror) = &self.mirror {
            mirror.stop().await;
        }
    }

    /// Brings what belongs to the filters into its resting state. Nothing may be in flight.
    pub async fn close(&self) {
        if let Some(mirror) = &self.mirror {
            mirror.close().await;
        }
        if let Some(standby) = &self.standby {
            standby.close(&self.io).await;
        }
        if let Some(log) = &self.log {
            log.close(&self.io).await;
        }
    }

    /// What there is to tell of a disk of so many sectors.
    pub fn stats(&self, sectors: u64) -> DiskStats {
        let mirror = self.mirror.as_ref().map(|mirror| mirror.stats(sectors));
        let local_cache = self.local.as_ref().map(LocalCache::stats);
        let standby = self.standby.as_ref().map(Standby::stats);
        DiskStats { mirror, standby, local_cache, ..DiskStats::default() }
    }
}
