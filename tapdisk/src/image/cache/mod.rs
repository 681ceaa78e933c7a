//! The read cache for parents: one for the whole process, shared by all its disks and threads.
//!
//! It keeps parts of parents' files in memory. That pays only where several disks that are served by one process stand on the
//! same parents: a guest keeps what it reads in its own page cache, so that a disk of its own, as `block-tap` makes them,
//! hardly ever asks twice. Therefore it is off unless `tapdisk --parent-cache SIZE` turns it on. To share between
//! processes is the business of the kernel's page cache, through which parents are read with `-D`.
//!
//! - A part is `UNIT` bytes at a multiple of it. A read that misses reads the whole part; reads of `STREAM` bytes or more
//!   are streams, which neither look here nor leave anything.
//! - A file is known by what it is, not by its name, and only while somebody has it open: its lock keeps writers out so long
//!   and no longer. What is compressed or encrypted is not kept here.
//! - What goes when memory is short decides `queue`.

mod queue;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use nix::errno::Errno;

use self::queue::Queue;
use super::file::ImageFile;
use crate::buf::Buf;
use crate::io::Io;

/// Bytes of a part.
const UNIT: usize = 64 << 10;

/// Bytes of a read that passes the cache by.
const STREAM: usize = 4 * UNIT;

/// The cache of this process.
static CACHE: OnceLock<Arc<Cache>> = OnceLock::new();

/// Turns the cache on, for so many bytes. Once.
pub fn turn_on(bytes: u64) {
    let fresh = CACHE.set(Cache::new(bytes)).is_ok();
    debug_assert!(fresh, "the cache is turned on once");
}

/// The cache of this process, if there is one.
pub fn shared() -> Option<Arc<Cache>> {
    CACHE.get().cloned()
}

/// A cache.
#[derive(Debug)]
pub struct Cache {
    limit: u64,
    state: Mutex<State>,
}

/// Device and inode.
type Identity = (u64, u64);

#[derive(Debug)]
struct State {
    /// By file and part.
    parts: Queue<(u64, u64), Arc<[u8]>>,
    files: BTreeMap<Identity, Weak<Open>>,
    /// No number is given twice.
    next: u64,
}

/// A file that somebody has open.
#[derive(Debug)]
struct Open {
    number: u64,
    cache: Arc<Cache>,
}

impl Drop for Open {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        state.parts.retain(|(number, _)| *number != self.number);
        // The last one to close a file; who opens it next gets another number.
        state.files.retain(|_, file| file.strong_count() > 0);
    }
}

/// A file's share in a cache, for one thread.
#[derive(Debug)]
pub struct Cached {
    open: Arc<Open>,
    hits: Cell<u64>,
    misses: Cell<u64>,
}

/// What a file's reads have found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Bytes that were there.
    pub hits: u64,
    /// Bytes that were not.
    pub misses: u64,
}

impl Cache {
    fn new(limit: u64) -> Arc<Cache> {
        let parts = usize::try_from(limit / UNIT as u64).unwrap_or(usize::MAX).max(1);
        let state = State { parts: Queue::new(parts), files: BTreeMap::new(), next: 0 };
        Arc::new(Cache { limit, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file that is opened, and that nobody writes while it is open.
    pub fn enter(self: &Arc<Self>, file: &ImageFile) -> std::io::Result<Cached> {
        let identity = file.identity()?;
        let mut state = self.lock();
        let known = state.files.get(&identity).and_then(Weak::upgrade);
        let open = known.unwrap_or_else(|| {
            let open = Arc::new(Open { number: state.next, cache: self.clone() });
            state.next += 1;
            state.files.insert(identity, Arc::downgrade(&open));
            open
        });
        drop(state);
        Ok(Cached { open, hits: Cell::new(0), misses: Cell::new(0) })
    }

    /// Bytes that it may hold.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> u64 {
        self.lock().parts.values().map(|part| part.len() as u64).sum()
    }
}

impl Cached {
    /// What this thread's reads have found.
    pub fn found(&self) -> Found {
        Found { hits: self.hits.get(), misses: self.misses.get() }
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.open.cache
    }

    /// Fills bytes `range` of `buf` from byte `offset` of the file on.
    pub async fn read(
        &self,
        io: &Io,
        file: &ImageFile,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        if range.len() >= STREAM {
            return io.read(file, offset, buf, range).await;
        }
        let (mut at, mut from) = (range.start, offset);
        while at < range.end {
            let unit = from / UNIT as u64;
            let skip = usize::try_from(from % UNIT as u64).map_err(|_| Errno::EINVAL)?;
            let part = skip..UNIT.min(skip + range.end - at);
            let to = at..at + part.len();
            let known = self.cache().lock().parts.get(&(self.open.number, unit));
            let copied = known.and_then(|bytes| Some(buf.copy_from(at, bytes.get(part.clone())?)));
            let count = if copied == Some(true) { &self.hits } else { &self.misses };
            count.set(count.get() + to.len() as u64);
            if copied != Some(true) && self.load(io, file, unit, part, buf, at).await.is_err() {
                // It may be another place of the part that cannot be read.
                io.read(file, from, buf, to.clone()).await?;
            }
            from += to.len() as u64;
            at = to.end;
        }
        Ok(())
    }

    /// Reads a whole part, keeps it, and copies bytes `part` of it to byte `at` of `buf`.
    async fn load(
        &self,
        io: &Io,
        file: &ImageFile,
        unit: u64,
        part: Range<usize>,
        buf: &Buf,
        at: usize,
    ) -> Result<(), Errno> {
        let start = unit * UNIT as u64;
        let len = usize::try_from(file.len().saturating_sub(start)).map_or(UNIT, |left| left.min(UNIT));
        let bounce = io.pool.bounce(UNIT)?;
        if part.end > len || bounce.len() < len {
            return Err(Errno::EINVAL);
        }
        io.read(file, start, &bounce, 0..len).await?;
        let bytes = bounce.bytes().get(..len).ok_or(Errno::EINVAL)?;
        self.cache().lock().parts.insert((self.open.number, unit), bytes.into());
        if bounce.copy_to(part, buf, at) { Ok(()) } else { Err(Errno::EINVAL) }
    }
}

#[cfg(test)]
mod tests;
