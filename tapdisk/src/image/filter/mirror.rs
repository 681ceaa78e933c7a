//! Mirroring: every write goes to a second image too, and what that lacks is copied beside it.
//!
//! - **A write** is answered when both images have it. Writes that overlap, and the copying of a part, wait for each other:
//!   else the two images could take them in different orders and differ for ever.
//! - **Copying** reads a part of both images and writes what differs, so that equal parts, above all unwritten ones, stay as they
//!   are. One part is in work at a time while guests are active, a few otherwise; its buffers are taken before its place is
//!   locked, so that a writer who waits for the place never holds what the copying waits for.
//! - **A secondary that fails** gets nothing more. That is logged and told in the statistics; the disk goes on.
//! - **A full first image** (ENOSPC): if everything is copied, the secondary serves alone from then on.
//! - What was **discarded** has no defined content, and may differ. So may what a guest changes in its memory while it is
//!   being written, until it writes it again, as guests do.

use std::cell::{Cell, OnceCell, RefCell};
use std::ops::Range;
use std::time::{Duration, Instant};

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{ImageSpec, MirrorStats, OpenParams};

use crate::buf::Buf;
use crate::image::OpenError;
use crate::image::chain::Chain;
use crate::image::locks::{BlockLock, BlockLocks};
use crate::image::nbd::Limits;
use crate::image::open::{Images, open_images};
use crate::io::Io;
use crate::sync::{WaitSet, all, both};

/// Bytes that are copied at a time: one buffer has room for them twice.
const PART: u64 = 128 << 10;

/// Parts in work at a time while no guest asks for anything.
const PARTS: usize = 4;

/// How long a guest's writes wait for the server of a second image to come back.
const PATIENCE: Duration = Duration::from_secs(5);

/// A second image.
#[derive(Debug)]
pub struct Mirror {
    spec: ImageSpec,
    secondary: Chain,
    io: Io,
    /// Bytes of the disk.
    total: u64,
    locks: BlockLocks,
    progress: RefCell<Progress>,
    /// There may be more to copy.
    more: WaitSet,
    working: Cell<bool>,
    stopping: Cell<bool>,
    ended: WaitSet,
    /// Guests' requests since a part was copied last.
    requests: Cell<u64>,
    /// Why it gets nothing more.
    failed: OnceCell<String>,
    /// How much it has to do, and since when it has had something to do and finished nothing.
    waiting: Cell<(u32, Instant)>,
    /// The first image was full: the secondary serves alone.
    alone: Cell<bool>,
    /// Hears of that before anything is written to the secondary only.
    succession: OnceCell<Succession>,
}

/// Who is told that the first image is left; false: it must not be.
pub struct Succession(pub Box<dyn Fn() -> bool>);

impl std::fmt::Debug for Succession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Succession")
    }
}

/// What is copied and what is not.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    /// Everything before this byte has been copied, or is being copied.
    position: u64,
    /// Bytes that are being copied.
    flying: u64,
    /// But these parts must be copied again: a write to them has failed on the first image.
    again: Vec<Range<u64>>,
}

impl Progress {
    /// Takes the next part to copy.
    fn next(&mut self, total: u64) -> Option<Range<u64>> {
        if self.position < total {
            let part = self.position..total.min(self.position + PART);
            self.position = part.end;
            self.flying += part.end - part.start;
            return Some(part);
        }
        let whole = self.again.pop()?;
        let part = whole.start..whole.end.min(whole.start + PART);
        if part.end < whole.end {
            self.again.push(part.end..whole.end);
        }
        self.flying += part.end - part.start;
        Some(part)
    }

    /// A part that was taken has been copied.
    fn done(&mut self, part: &Range<u64>) {
        self.flying -= part.end - part.start;
    }

    /// Bytes that are not copied.
    fn left(&self, total: u64) -> u64 {
        let again: u64 = self.again.iter().map(|part| part.end - part.start).sum();
        total.min(total - self.position.min(total) + self.flying + again)
    }
}

/// Why a part was not copied.
enum CopyError {
    Read(Errno),
    Secondary(Errno),
}

impl Mirror {
    /// Opens the secondary image of a disk of so many sectors. Blocking.
    pub fn open(spec: &ImageSpec, params: &OpenParams, sectors: u64, io: &Io) -> Result<Mirror, OpenError> {
        let plain = OpenParams { image: spec.clone(), readonly: false, secondary: None, ..params.clone() };
        let servers = Limits { reconnect: PATIENCE, ..Limits::default() };
        let Images { chain, sectors: found } = open_images(&plain, servers, io)?;
        if found < sectors {
            let text = format!(
                "has {found} sectors of 512 bytes, too few for the secondary image of a disk of {sectors}"
            );
            return Err(OpenError::new(spec.path.as_ref(), Errno::EINVAL, text));
        }
        log::info!("{spec}: is a secondary image from now on; what it lacks is copied");
        let set = || WaitSet::new(io.scheduler.clone());
        Ok(Mirror {
            spec: spec.clone(),
            secondary: chain,
            io: io.clone(),
            total: sectors * SECTOR_SIZE,
            locks: BlockLocks::new(io.scheduler.clone()),
            progress: RefCell::default(),
            more: set(),
            working: Cell::new(false),
            stopping: Cell::new(false),
            ended: set(),
            requests: Cell::new(0),
            failed: OnceCell::new(),
            waiting: Cell::new((0, Instant::now())),
            alone: Cell::new(false),
            succession: OnceCell::new(),
        })
    }

    /// The secondary image, if it serves instead of the first.
    pub fn successor(&self) -> Option<&Chain> {
        self.alone.get().then_some(&self.secondary)
    }

    /// The secondary image, if it is the disk from now on, whoever opens it.
    pub fn heir(&self) -> Option<&ImageSpec> {
        self.alone.get().then_some(&self.spec)
    }

    /// What has become of either image, if anything has.
    pub fn degradation(&self) -> Option<String> {
        let alone = || self.heir().map(|image| format!("its first image is full, and {image} serves alone"));
        self.failed.get().map(|why| format!("goes on without its second image: {why}")).or_else(alone)
    }

    /// Waits for something that the secondary does.
    async fn by_secondary<T>(&self, work: impl Future<Output = T>) -> T {
        let now = self.waiting.get();
        self.waiting.set((now.0 + 1, if now.0 == 0 { Instant::now() } else { now.1 }));
        let output = work.await;
        self.waiting.set((self.waiting.get().0 - 1, Instant::now()));
        output
    }

    /// Whether [`Mirror::work`] is to be begun; from now on [`Mirror::stop`] waits for it.
    pub fn begin_work(&self) -> bool {
        let needed = self.is_active() && !self.working.get();
        if needed {
            self.stopping.set(false);
            self.working.set(true);
        }
        needed
    }

    /// Whether writes go to both images.
    pub fn is_active(&self) -> bool {
        self.failed.get().is_none() && !self.alone.get()
    }

    /// A guest has asked for something: copying steps back.
    pub fn count_request(&self) {
        self.requests.set(self.requests.get() + 1);
    }

    /// Writes `buf` to both images.
    pub async fn write(&self, first: &Chain, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        let whole = 0..buf.len();
        let start = sector.0 * SECTOR_SIZE;
        let place = start..start + buf.len() as u64;
        let _lock = self.lock(&place).await;
        if !self.is_active() {
            return self.successor().unwrap_or(first).write(sector, buf, whole).await;
        }
        let second = self.by_secondary(self.secondary.write(sector, buf, whole.clone()));
        let (one, two) = both(first.write(sector, buf, whole), second).await;
        self.judge("writing", place, one, two)
    }

    /// Discards on both images, on the secondary as far as it can.
    pub async fn discard(
        &self,
        first: &Chain,
        sector: Sector,
        count: u64,
        secure: bool,
    ) -> Result<(), Errno> {
        let place = sector.0 * SECTOR_SIZE..(sector.0 + count) * SECTOR_SIZE;
        let _lock = self.lock(&place).await;
        if !self.is_active() {
            return self.successor().unwrap_or(first).discard(sector, count, secure).await;
        }
        let second = async {
            match self.secondary.discard(sector, count, false).await {
                // It keeps what it had.
                Err(Errno::EOPNOTSUPP) => Ok(()),
                result => result,
            }
        };
        let (one, two) = both(first.discard(sector, count, secure), self.by_secondary(second)).await;
        self.judge("discarding", place, one, two)
    }

    /// What a request to both images has come to.
    fn judge(
        &self,
        what: &str,
        place: Range<u64>,
        first: Result<(), Errno>,
        second: Result<(), Errno>,
    ) -> Result<(), Errno> {
        if let Err(errno) = second {
            self.fail(format!("{what} failed: {errno}"));
            return first;
        }
        match first {
            Err(Errno::ENOSPC | Errno::EDQUOT) if self.is_complete() && self.may_succeed() => {
                self.take_over();
                Ok(())
            }
            Err(errno) => {
                // The secondary has what the first has not.
                self.progress.borrow_mut().again.push(place);
                self.more.wake_all();
                Err(errno)
            }
            Ok(()) => Ok(()),
        }
    }

    async fn lock(&self, place: &Range<u64>) -> Option<BlockLock<'_>> {
        if self.is_active() { Some(self.locks.lock(place.clone(), true).await) } else { None }
    }

    /// Whether the secondary has everything that the first image has.
    fn is_complete(&self) -> bool {
        self.progress.borrow().left(self.total) == 0
    }

    /// Who is told when the first image is left.
    pub fn tell_succession(&self, succession: Succession) {
        // The first one who wants to know it stays.
        let _ = self.succession.set(succession);
    }

    /// Whether the first image may be left: whoever opens the disk next has to know it.
    fn may_succeed(&self) -> bool {
        self.alone.get() || self.succession.get().is_none_or(|succession| succession.0())
    }

    fn take_over(&self) {
        if !self.alone.replace(true) {
            log::error!(
                "{}: the first image has no space left; the secondary serves alone from now on",
                self.spec
            );
            self.more.wake_all();
        }
    }

    fn fail(&self, why: String) {
        let why = format!("{}: {why}", self.spec);
        if self.failed.set(why.clone()).is_ok() {
            log::error!("{why}; the secondary image gets no more writes, the disk goes on without it");
            self.more.wake_all();
        }
    }

    /// Makes what was written durable.
    pub async fn flush(&self, first: &Chain) -> Result<(), Errno> {
        if !self.is_active() {
            return self.successor().unwrap_or(first).leaf.flush(&self.io).await;
        }
        let (one, two) =
            both(first.leaf.flush(&self.io), self.by_secondary(self.secondary.leaf.flush(&self.io))).await;
        if let Err(errno) = two {
            self.fail(format!("flushing failed: {errno}"));
        }
        one
    }

    /// Copies what the secondary lacks, until [`Mirror::stop`].
    pub async fn work(&self, first: &Chain) {
        while !self.stopping.get() && self.is_active() {
            let parts = self.next_parts();
            if parts.is_empty() {
                self.more.wait().await;
                continue;
            }
            let copies = parts.iter().map(async |part| match self.copy(first, part).await {
                Ok(()) => {
                    self.progress.borrow_mut().done(part);
                    Ok(())
                }
                Err(CopyError::Read(errno)) => {
                    self.fail(format!("cannot be completed: reading the first image failed: {errno}"));
                    Err(errno)
                }
                Err(CopyError::Secondary(errno)) => {
                    self.fail(format!("copying failed: {errno}"));
                    Err(errno)
                }
            });
            if all(copies).await.is_ok() && self.is_complete() {
                log::info!("{}: the secondary image is complete", self.spec);
            }
        }
        self.working.set(false);
        self.ended.wake_all();
    }

    fn next_parts(&self) -> Vec<Range<u64>> {
        let most = if self.requests.replace(0) == 0 { PARTS } else { 1 };
        let mut progress = self.progress.borrow_mut();
        (0..most).map_while(|_| progress.next(self.total)).collect()
    }

    /// Makes a part of the secondary equal to the first image.
    async fn copy(&self, first: &Chain, part: &Range<u64>) -> Result<(), CopyError> {
        let len = usize::try_from(part.end - part.start).map_err(|_| CopyError::Read(Errno::EINVAL))?;
        let buf = self.io.pool.data_soon(2 * len).await.ok_or(CopyError::Read(Errno::ENOMEM))?;
        let _lock = self.locks.lock(part.clone(), true).await;
        let sector = Sector(part.start / SECTOR_SIZE);
        let second = self.by_secondary(self.secondary.read(sector, &buf, len..2 * len));
        let (one, two) = both(first.read(sector, &buf, 0..len), second).await;
        one.map_err(CopyError::Read)?;
        two.map_err(CopyError::Secondary)?;
        let equal = {
            let (one, two) = buf.bytes().split_at(len);
            one == two
        };
        if equal {
            return Ok(());
        }
        let written = self.by_secondary(self.secondary.write(sector, &buf, 0..len)).await;
        written.map_err(CopyError::Secondary)
    }

    /// Has the copying end, and waits for it.
    pub async fn stop(&self) {
        self.stopping.set(true);
        self.more.wake_all();
        while self.working.get() {
            self.ended.wait().await;
        }
    }

    /// Brings the secondary into its resting state. Nothing may be in flight.
    pub async fn close(&self) {
        if self.failed.get().is_some() {
            return;
        }
        let mut result = self.secondary.leaf.close(&self.io).await;
        if result.is_ok() {
            result = self.secondary.leaf.flush(&self.io).await;
        }
        if let Err(errno) = result {
            self.fail(format!("closing failed: {errno}"));
        }
        if !self.alone.get() && !self.is_complete() {
            log::warn!("{}: the secondary image is closed before it was complete", self.spec);
        }
    }

    /// How far it is. The disk may have grown to so many sectors once the secondary had failed.
    pub fn stats(&self, sectors: u64) -> MirrorStats {
        let copied = self.total - self.progress.borrow().left(self.total);
        let (waiting, since) = self.waiting.get();
        let stuck = (waiting > 0).then(|| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX));
        MirrorStats {
            copied,
            total: sectors * SECTOR_SIZE,
            failed: self.failed.get().cloned(),
            stuck_ms: stuck,
        }
    }
}

#[cfg(test)]
mod tests;
