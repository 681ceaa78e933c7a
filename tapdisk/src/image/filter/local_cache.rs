//! The local read cache (`-r`): what a guest read from a parent is written to the leaf too, so that it is read from there
//! the next time. That pays where parents lie on slow shared storage and the leaf on a fast local disk.
//!
//! - The guest's read is not held up: its data is copied and written later, one piece after the other. When memory is
//!   short or too much waits already, a piece is left out.
//! - **Never over what a guest wrote meanwhile**: the place is locked against writers, and only sectors that are still in no
//!   other image than a parent are written, as an ordinary allocation. A disk with this filter therefore has its writers take
//!   turns with it, place by place.
//! - Zeros are not kept: most come from no image at all.
//! - Nothing is kept while the leaf's file system has little room left, nor ever again after writing has failed.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;
use tap_ctl::proto::LocalCacheStats;

use crate::buf::Buf;
use crate::image::chain::Chain;
use crate::image::locks::{BlockLock, BlockLocks};
use crate::image::{Extent, bytes};
use crate::io::Io;
use crate::sync::WaitSet;

/// Pieces that may wait.
const MOST_WAITING: usize = 16;

/// Bytes of a piece at most.
const PIECE: usize = 128 << 10;

/// Bytes that the leaf's file system must have left.
const RESERVE: u64 = 256 << 20;

/// How long a look at the file system counts.
const LOOK: Duration = Duration::from_secs(1);

/// The cache of a disk.
#[derive(Debug)]
pub struct LocalCache {
    io: Io,
    locks: BlockLocks,
    waiting: RefCell<VecDeque<Piece>>,
    more: WaitSet,
    working: Cell<bool>,
    stopping: Cell<bool>,
    ended: WaitSet,
    /// When the file system was looked at last, and whether it had room.
    room: Cell<Option<(Instant, bool)>>,
    failed: OnceCell<Errno>,
    kept: Cell<u64>,
    left_out: Cell<u64>,
}

/// Data from a parent.
#[derive(Debug)]
struct Piece {
    sector: Sector,
    data: Buf,
}

impl LocalCache {
    /// An idle cache.
    pub fn new(io: &Io) -> LocalCache {
        let set = || WaitSet::new(io.scheduler.clone());
        LocalCache {
            io: io.clone(),
            locks: BlockLocks::new(io.scheduler.clone()),
            waiting: RefCell::default(),
            more: set(),
            working: Cell::new(false),
            stopping: Cell::new(false),
            ended: set(),
            room: Cell::new(None),
            failed: OnceCell::new(),
            kept: Cell::new(0),
            left_out: Cell::new(0),
        }
    }

    /// Keeps the cache from writing to these sectors while they are changed.
    pub async fn lock(&self, sector: Sector, count: u64) -> BlockLock<'_> {
        self.locks.lock(place(sector, count), false).await
    }

    /// A guest has read `buf` from `sector` on: takes what came from parents.
    pub async fn offer(&self, chain: &Chain, sector: Sector, buf: &Buf) {
        if self.failed.get().is_some() || !self.working.get() || self.stopping.get() {
            return;
        }
        let all = u32::try_from(buf.len() as u64 / SECTOR_SIZE).unwrap_or(0);
        let mut done = 0;
        while done < all {
            let here = Sector(sector.0 + u64::from(done));
            let Ok(extent) = chain.leaf.map(&self.io, here, all - done).await else { return };
            let (count, ours) = match extent {
                Extent::Parent { count } => (count, true),
                Extent::Data { count, .. } | Extent::Zero { count } | Extent::Own { count } => (count, false),
            };
            if count == 0 {
                return;
            }
            if ours {
                self.take(here, buf, bytes(done)..bytes(done + count));
            }
            done += count;
        }
    }

    /// Copies pieces of a guest's data.
    fn take(&self, mut sector: Sector, buf: &Buf, mut range: Range<usize>) {
        while !range.is_empty() {
            let part = range.start..range.end.min(range.start + PIECE);
            let waiting = self.waiting.borrow().len();
            // Never what a guest's request waits for: only what is free at once.
            let data = if waiting < MOST_WAITING { self.io.pool.data(part.len()) } else { None };
            match data {
                Some(data) if buf.copy_to(part.clone(), &data, 0) => {
                    if data.bytes().iter().any(|&byte| byte != 0) {
                        self.waiting.borrow_mut().push_back(Piece { sector, data });
                        self.more.wake_all();
                    }
                }
                _ => self.left_out.set(self.left_out.get() + part.len() as u64 / SECTOR_SIZE),
            }
            sector.0 += part.len() as u64 / SECTOR_SIZE;
            range.start = part.end;
        }
    }

    /// Whether [`LocalCache::work`] is to be begun; from now on [`LocalCache::stop`] waits for it.
    pub fn begin_work(&self) -> bool {
        let needed = self.failed.get().is_none() && !self.working.get();
        if needed {
            self.stopping.set(false);
            self.working.set(true);
        }
        needed
    }

    /// Writes what waits to the leaf, until [`LocalCache::stop`].
    pub async fn work(&self, chain: &Chain) {
        while !self.stopping.get() && self.failed.get().is_none() {
            let piece = self.waiting.borrow_mut().pop_front();
            let Some(piece) = piece else {
                self.more.wait().await;
                continue;
            };
            if !self.has_room(chain) {
                self.left_out.set(self.left_out.get() + piece.data.len() as u64 / SECTOR_SIZE);
            } else if let Err(errno) = self.keep(chain, &piece).await {
                let _ = self.failed.set(errno);
                log::error!("the local read cache could not be written: {errno}; nothing more is kept");
            }
        }
        self.waiting.borrow_mut().clear();
        self.working.set(false);
        self.ended.wake_all();
    }

    /// Writes what of a piece is still in parents only.
    async fn keep(&self, chain: &Chain, piece: &Piece) -> Result<(), Errno> {
        let all = u32::try_from(piece.data.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        let _lock = self.locks.lock(place(piece.sector, all.into()), true).await;
        let mut done = 0;
        while done < all {
            let here = Sector(piece.sector.0 + u64::from(done));
            let (count, absent) = match chain.leaf.map(&self.io, here, all - done).await? {
                Extent::Parent { count } => (count, true),
                Extent::Data { count, .. } | Extent::Zero { count } | Extent::Own { count } => (count, false),
            };
            if count == 0 {
                return Err(Errno::EIO);
            }
            if absent {
                chain.write(here, &piece.data, bytes(done)..bytes(done + count)).await?;
                self.kept.set(self.kept.get() + u64::from(count));
            }
            done += count;
        }
        Ok(())
    }

    /// Whether the leaf's file system has room. A block device has its room already, or says when it has not.
    fn has_room(&self, chain: &Chain) -> bool {
        if let Some((then, room)) = self.room.get()
            && then.elapsed() < LOOK
        {
            return room;
        }
        let file = chain.leaf.file().filter(|file| file.is_regular());
        let free = file.map(|file| file.with(|fd| fstatvfs(fd.as_fd())));
        let room = match free {
            None => true,
            Some(Ok(free)) => free.blocks_available().saturating_mul(free.fragment_size()) >= RESERVE,
            Some(Err(_)) => false,
        };
        self.room.set(Some((Instant::now(), room)));
        room
    }

    /// Has the writing end, and waits for it.
    pub async fn stop(&self) {
        self.stopping.set(true);
        self.more.wake_all();
        while self.working.get() {
            self.ended.wait().await;
        }
    }

    /// What it has done.
    pub fn stats(&self) -> LocalCacheStats {
        let failed = self.failed.get().map(|errno| errno.desc().to_owned());
        LocalCacheStats { kept: self.kept.get(), left_out: self.left_out.get(), failed }
    }
}

fn place(sector: Sector, count: u64) -> Range<u64> {
    sector.0 * SECTOR_SIZE..sector.0.saturating_add(count).saturating_mul(SECTOR_SIZE)
}

#[cfg(test)]
mod tests;
