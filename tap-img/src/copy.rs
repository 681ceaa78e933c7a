//! All of a disk, to another one or compared with it.
//!
//! Several workers take turns at the next run of sectors that may hold data, so that as many requests are in flight. What the
//! images say is zeros is not read, and zeros that were read are not written where there are zeros already.

use std::cell::{Cell, RefCell};
use std::ops::Range;

use blkif::Sector;
use nix::errno::Errno;
use tapdisk::buf::Buf;
use tapdisk::image::{Disk, Holds};
use tapdisk::io::Io;
use tapdisk::sync::{WaitSet, all};

use crate::progress::Progress;

/// Requests in flight.
pub const WORKERS: usize = 16;

/// The most sectors of one request. Requests end at multiples of it, so that two of them hardly ever meet in one unit of
/// an image.
const CHUNK: u64 = (tapdisk::buf::MAX_DATA / SECTOR) as u64;

/// Zeros are left out in whole units of so many bytes: enough that the requests between them stay large.
const UNIT: usize = 64 << 10;

const SECTOR: usize = 512;

/// What went wrong, with the disk it went wrong on.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CopyError {
    /// Reading.
    #[error("{image}: cannot read at byte {offset}: {}", errno.desc())]
    Read {
        /// Its name.
        image: String,
        /// Byte offset on the disk.
        offset: u64,
        /// Why.
        errno: Errno,
    },
    /// Writing.
    #[error("{image}: cannot write at byte {offset}: {}", errno.desc())]
    Write {
        /// Its name.
        image: String,
        /// Byte offset on the disk.
        offset: u64,
        /// Why.
        errno: Errno,
    },
    /// The target is smaller than the source.
    #[error("{image}: has {has} bytes, {needed} are needed")]
    TooSmall {
        /// Its name.
        image: String,
        /// Bytes of it.
        has: u64,
        /// Bytes of the source.
        needed: u64,
    },
}

/// Copies all of `from` to `to`, which may be larger, and shows how many sectors of `from` are done. With `blank`, `to` reads as
/// zeros all over, and stays so where `from` has zeros. Nothing is flushed.
///
/// # Errors
/// The first thing that went wrong; any part may have been copied.
pub async fn copy(
    io: &Io,
    from: &Disk,
    to: &Disk,
    blank: bool,
    progress: &Progress,
) -> Result<(), CopyError> {
    if to.sectors() < from.sectors() {
        let (has, needed) = (to.sectors() * SECTOR as u64, from.sectors() * SECTOR as u64);
        return Err(CopyError::TooSmall { image: to.name().to_string(), has, needed });
    }
    let walk = Walk::new(io, vec![from], blank, progress);
    run_workers(&walk, async |sector, count| {
        let buf = buffer(io, count).await;
        from.read(Sector(sector), &buf).await.map_err(|errno| read_error(from, sector, errno))?;
        write(io, to, sector, &buf, blank).await?;
        progress.add(count.into());
        Ok(())
    })
    .await?;
    if blank { Ok(()) } else { write_zeros(io, to, from.sectors()..to.sectors()).await }
}

/// Writes a buffer; with `blank` only what is not zeros.
async fn write(io: &Io, to: &Disk, sector: u64, buf: &Buf, blank: bool) -> Result<(), CopyError> {
    let all = || std::iter::once(0..buf.len()).collect();
    let parts = if blank { busy_parts(sector, buf.bytes()) } else { all() };
    for part in parts {
        let at = sector + (part.start / SECTOR) as u64;
        let failed = |errno| write_error(to, at, errno);
        if part.len() == buf.len() {
            to.write(Sector(at), buf).await.map_err(failed)?;
            continue;
        }
        let mut piece = buffer(io, u32::try_from(part.len() / SECTOR).unwrap_or(0)).await;
        piece.bytes_mut().copy_from_slice(&buf.bytes()[part]);
        to.write(Sector(at), &piece).await.map_err(failed)?;
    }
    Ok(())
}

/// The parts of some sectors' bytes that are not zeros, in whole [`UNIT`]s of the disk; neighbours are one part.
fn busy_parts(sector: u64, bytes: &[u8]) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let position = sector * SECTOR as u64 + at as u64;
        let to_boundary = UNIT - usize::try_from(position % UNIT as u64).unwrap_or(0);
        let end = bytes.len().min(at + to_boundary);
        if !is_zero(&bytes[at..end]) {
            match parts.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => parts.push(at..end),
            }
        }
        at = end;
    }
    parts
}

/// Whether all bytes are 0. Comparing the bytes with themselves, one place further, is what `memcmp` is fast at.
fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && *rest == bytes[..rest.len()],
    }
}

async fn write_zeros(io: &Io, to: &Disk, sectors: Range<u64>) -> Result<(), CopyError> {
    let mut at = sectors.start;
    while at < sectors.end {
        let count = u32::try_from((sectors.end - at).min(CHUNK)).unwrap_or(0);
        let buf = buffer(io, count).await;
        buf.zero(0..buf.len());
        to.write(Sector(at), &buf).await.map_err(|errno| write_error(to, at, errno))?;
        at += u64::from(count);
    }
    Ok(())
}

/// The byte offset of the first byte in which two disks differ; `None` if they do not. Behind the end of the smaller one its
/// bytes count as zeros. The progress is that of the larger one.
///
/// # Errors
/// Reading.
pub async fn compare(io: &Io, a: &Disk, b: &Disk, progress: &Progress) -> Result<Option<u64>, CopyError> {
    let first = Cell::new(None::<u64>);
    let walk = Walk::new(io, vec![a, b], true, progress);
    run_workers(&walk, async |sector, count| {
        progress.add(count.into());
        let start = sector * SECTOR as u64;
        // What lies behind a difference does not matter any more.
        if first.get().is_some_and(|first| first <= start) {
            return Ok(());
        }
        let (mine, theirs) = (buffer(io, count).await, buffer(io, count).await);
        read_or_zeros(a, sector, &mine).await?;
        read_or_zeros(b, sector, &theirs).await?;
        let (mine, theirs) = (mine.bytes(), theirs.bytes());
        if mine != theirs
            && let Some(at) = mine.iter().zip(theirs).position(|(a, b)| a != b)
        {
            let at = start + at as u64;
            first.set(Some(first.get().map_or(at, |before| before.min(at))));
        }
        Ok(())
    })
    .await?;
    Ok(first.get())
}

/// Reads sectors that lie all on the disk or all behind its end.
async fn read_or_zeros(disk: &Disk, sector: u64, buf: &Buf) -> Result<(), CopyError> {
    if sector >= disk.sectors() {
        buf.zero(0..buf.len());
        return Ok(());
    }
    disk.read(Sector(sector), buf).await.map_err(|errno| read_error(disk, sector, errno))
}

/// A buffer of 1 to [`CHUNK`] sectors. The budget has room for two of the largest for each worker, so waiting ends.
async fn buffer(io: &Io, sectors: u32) -> Buf {
    loop {
        if let Some(buf) = io.pool.data_soon(sectors as usize * SECTOR).await {
            return buf;
        }
    }
}

fn read_error(disk: &Disk, sector: u64, errno: Errno) -> CopyError {
    CopyError::Read { image: disk.name().to_string(), offset: sector * SECTOR as u64, errno }
}

fn write_error(disk: &Disk, sector: u64, errno: Errno) -> CopyError {
    CopyError::Write { image: disk.name().to_string(), offset: sector * SECTOR as u64, errno }
}

/// The way along some disks that all workers go together.
struct Walk<'a> {
    disks: Vec<&'a Disk>,
    /// Of the largest, in sectors.
    end: u64,
    skip_zeros: bool,
    progress: &'a Progress,
    at: Cell<u64>,
    /// Somebody looks for the next run.
    looking: Cell<bool>,
    looked: WaitSet,
}

impl<'a> Walk<'a> {
    fn new(io: &Io, disks: Vec<&'a Disk>, skip_zeros: bool, progress: &'a Progress) -> Walk<'a> {
        Walk {
            end: disks.iter().map(|disk| disk.sectors()).max().unwrap_or(0),
            disks,
            skip_zeros,
            progress,
            at: Cell::new(0),
            looking: Cell::new(false),
            looked: WaitSet::new(io.scheduler.clone()),
        }
    }

    /// The next sectors to be read: at most [`CHUNK`], none of two chunks, and none behind the end of one disk together with
    /// some before it. Skips what are zeros on all disks.
    async fn next(&self) -> Result<Option<(u64, u32)>, CopyError> {
        while self.looking.replace(true) {
            self.looked.wait().await;
        }
        let found = self.look().await;
        self.looking.set(false);
        self.looked.wake_all();
        found
    }

    async fn look(&self) -> Result<Option<(u64, u32)>, CopyError> {
        let mut start = self.at.get();
        loop {
            let at = self.at.get();
            let limit = self.limit(start);
            if at < limit {
                let (data, count) = match self.skip_zeros {
                    true => self.survey(at).await?,
                    false => (true, limit - at),
                };
                if data {
                    self.at.set(limit.min(at + count));
                    continue;
                }
                self.at.set(at + count);
                self.progress.add(count);
                if at == start {
                    start = at + count;
                    continue;
                }
            }
            return Ok((at > start).then(|| (start, u32::try_from(at - start).unwrap_or(0))));
        }
    }

    /// Where a run that begins at `start` ends at the latest.
    fn limit(&self, start: u64) -> u64 {
        let ends = self.disks.iter().map(|disk| disk.sectors()).filter(|&end| end > start);
        ends.chain([(start / CHUNK + 1) * CHUNK]).min().unwrap_or(start).min(self.end)
    }

    /// Whether any disk has data at a sector, and for how many more this is true.
    async fn survey(&self, at: u64) -> Result<(bool, u64), CopyError> {
        let mut zeros = self.end - at;
        for disk in self.disks.iter().filter(|disk| at < disk.sectors()) {
            let most = u32::try_from(disk.sectors() - at).unwrap_or(u32::MAX);
            let run = disk.survey(Sector(at), most).await;
            let run = run.map_err(|errno| read_error(disk, at, errno))?;
            let count = u64::from(run.count.max(1));
            match run.holds {
                Holds::Data { .. } => return Ok((true, count)),
                // Behind the end of a disk nothing can be known of it that is not zeros.
                Holds::Zeros | Holds::Nothing if at + count == disk.sectors() => {}
                Holds::Zeros | Holds::Nothing => zeros = zeros.min(count),
            }
        }
        Ok((false, zeros))
    }
}

/// Lets all workers go along the way, each with `work` on a run of sectors at a time. After a failure nothing new is begun.
async fn run_workers(
    walk: &Walk<'_>,
    work: impl AsyncFn(u64, u32) -> Result<(), CopyError>,
) -> Result<(), CopyError> {
    let failure = RefCell::new(None);
    let worker = async || {
        while failure.borrow().is_none() {
            let done = match walk.next().await {
                Ok(None) => break,
                Ok(Some((sector, count))) => work(sector, count).await,
                Err(error) => Err(error),
            };
            if let Err(error) = done {
                failure.borrow_mut().get_or_insert(error);
            }
        }
        Ok(())
    };
    let ended = all((0..WORKERS).map(|_| worker())).await;
    debug_assert!(ended.is_ok(), "failures are kept apart");
    failure.into_inner().map_or(Ok(()), Err)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "one part is what is expected")]
mod tests {
    use super::*;

    #[test]
    fn only_whole_units_of_zeros_are_left_out() {
        let mut bytes = vec![0; 4 * UNIT];
        assert_eq!(busy_parts(0, &bytes), []);
        bytes[UNIT] = 1;
        bytes[2 * UNIT + 7] = 1;
        assert_eq!(busy_parts(0, &bytes), [UNIT..3 * UNIT]);
        bytes[4 * UNIT - 1] = 1;
        assert_eq!(busy_parts(0, &bytes), [UNIT..4 * UNIT]);
    }

    #[test]
    fn units_lie_at_their_places_on_the_disk() {
        let mut bytes = vec![0; 2 * UNIT];
        bytes[SECTOR] = 1;
        let sector = (UNIT / SECTOR) as u64 - 1;
        assert_eq!(busy_parts(sector, &bytes), [SECTOR..SECTOR + UNIT]);
    }

    #[test]
    fn zeros_are_zeros_to_the_last_byte() {
        let mut bytes = vec![0; 5000];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for at in [0, 1, 2500, 4999] {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
            bytes[at] = 0;
        }
    }
}
