//! From a request to its answer.
//!
//! Three ways for the data, chosen for each request:
//!
//! | the guest's pages are | and | the data goes |
//! |---|---|---|
//! | mapped ([`Persistent`]) | neighbours here | between image and guest directly |
//! | mapped | scattered | through a buffer, copied by us |
//! | not mapped | | through a buffer, copied by the hypervisor, one batch for all requests of a turn |

use std::cell::Cell;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkif::ids::PAGE_SIZE;
use blkif::request::{Transfer, parse_indirect};
use blkif::{DomId, GrantRef, Request, RequestKind, Sector, Segment, Status};
use gntdev::{CopyDirection, CopySegment, Grants};
use nix::errno::Errno;

use super::Notice;
use super::persistent::Persistent;
use super::ring::Ring;
use super::seat::Seat;
use super::served::{Clock, Served};
use crate::buf::{Buf, GuestBytes, Pool};
use crate::copier::Copier;
use crate::flight::What;
use crate::image::Disk;
use crate::io::Direction;
use crate::xentop::Page;

/// Bytes of a segment in an indirect page.
const WIRE_SEGMENT: usize = 8;

/// What a request comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Answer(Status),
    /// The reason may pass.
    Again,
    /// The truth cannot be told in the protocol: never answer.
    Hold,
}

impl From<Result<(), Errno>> for Outcome {
    fn from(result: Result<(), Errno>) -> Outcome {
        match result {
            Ok(()) => Outcome::Answer(Status::Okay),
            Err(Errno::EOPNOTSUPP) => Outcome::Answer(Status::NotSupported),
            // Interruptions were dealt with below; XenServer's tapdisk tries the same errors again.
            Err(Errno::EAGAIN | Errno::EBUSY | Errno::EINTR) => Outcome::Again,
            Err(_) => Outcome::Answer(Status::Error),
        }
    }
}

/// A failed request is logged, but a guest can cause some: at most one line in this time, with the number of those between.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The failures of a ring.
#[derive(Debug, Default)]
pub struct Failures {
    logged: Cell<Option<Instant>>,
    since: Cell<u64>,
}

impl Failures {
    /// Counts one; if it is to be logged, how many were not.
    fn count(&self, now: Instant) -> Option<u64> {
        if self.logged.get().is_some_and(|then| now.duration_since(then) < LOG_INTERVAL) {
            self.since.set(self.since.get() + 1);
            return None;
        }
        self.logged.set(Some(now));
        Some(self.since.take())
    }
}

/// Memory of a slot that is used for one request after the other.
#[derive(Debug, Default)]
struct Scratch {
    /// Of an indirect request.
    segments: Vec<Segment>,
    /// Over the guest's pages, while they are in use.
    pages: Vec<GuestBytes>,
}

/// The life of a slot: take a request, serve it, answer it, until the ring is disconnected.
pub async fn slot<G: Grants>(ring: Rc<Ring<G::Map>>, slot: usize, way: Rc<Way<G>>)
where
    G::Map: 'static,
{
    let mut scratch = Scratch::default();
    while let Some(request) = ring.next(slot).await {
        let begun = way.clock.now();
        way.served.begin(&request);
        let outcome = match way.seat.disk() {
            Some(disk) => {
                let mut outcome = way.serve(&disk, &ring, &request, &mut scratch).await;
                while outcome == Outcome::Again {
                    scratch.pages.clear();
                    if !ring.may_try_again(slot, way.seat.patience()) {
                        outcome = Outcome::Answer(Status::Error);
                        break;
                    }
                    way.seat.next_try().await;
                    outcome = way.serve(&disk, &ring, &request, &mut scratch).await;
                }
                match outcome {
                    Outcome::Answer(Status::Error) => way.complain(&disk, &request),
                    Outcome::Answer(_) | Outcome::Again => {}
                    Outcome::Hold => way.report(&disk),
                }
                outcome
            }
            // A paused ring takes no requests.
            None => Outcome::Answer(Status::Error),
        };
        // The guest's pages are let go before the answer.
        scratch.pages.clear();
        let status = match outcome {
            Outcome::Answer(status) => status,
            Outcome::Again => Status::Error,
            Outcome::Hold => {
                ring.hold(slot, &request).await;
                continue;
            }
        };
        let time = way.clock.now().saturating_duration_since(begun);
        way.served.end(&request, sectors(&request, &scratch), status != Status::Okay, time);
        ring.complete(slot, &request, status);
    }
}

/// How many sectors a request that has succeeded moved.
fn sectors(request: &Request, scratch: &Scratch) -> u64 {
    match &request.kind {
        RequestKind::Read { segments, .. }
        | RequestKind::Write { segments, .. }
        | RequestKind::Barrier { segments, .. } => u64::from(segments.sectors()),
        RequestKind::Indirect { .. } => {
            scratch.segments.iter().map(|segment| u64::from(segment.bytes()) / 512).sum()
        }
        RequestKind::Flush | RequestKind::Discard { .. } => 0,
    }
}

/// The way of data between a guest's pages and the disk, for one ring.
pub struct Way<G: Grants>
where
    G::Map: 'static,
{
    /// The guest.
    pub dom: DomId,
    /// The place of the disk.
    pub seat: Rc<Seat>,
    /// What was served.
    pub served: Served,
    /// Where xentop sees it.
    pub page: Option<Page>,
    /// The turn's time.
    pub clock: Rc<Clock>,
    /// Buffers.
    pub pool: Rc<Pool>,
    /// Grant copies.
    pub copier: Rc<Copier<G>>,
    /// The pages that stay mapped; `None` for a frontend without persistent grants.
    pub persistent: Option<Persistent<G>>,
    /// Tells the control server.
    pub tell: Arc<dyn Fn(Notice) + Send + Sync>,
    /// It was told that the disk has stopped.
    pub told: Cell<bool>,
    /// Requests that were answered with an error.
    pub failures: Failures,
}

impl<G: Grants> fmt::Debug for Way<G>
where
    G::Map: 'static,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Way").field("dom", &self.dom).finish_non_exhaustive()
    }
}

impl<G: Grants> Way<G>
where
    G::Map: 'static,
{
    async fn serve(
        &self,
        disk: &Disk,
        ring: &Ring<G::Map>,
        request: &Request,
        scratch: &mut Scratch,
    ) -> Outcome {
        let Scratch { segments: list, pages } = scratch;
        match &request.kind {
            RequestKind::Read { sector, segments } => {
                self.read(disk, *sector, segments.as_slice(), pages).await.into()
            }
            RequestKind::Write { sector, segments } => {
                self.write(disk, *sector, segments.as_slice(), pages).await.into()
            }
            RequestKind::Flush => self.flush(disk).await,
            RequestKind::Barrier { sector, segments } => {
                // Everything taken before has ended and is durable before the barrier's own data, which is durable
                // before anything taken later begins (the ring takes nothing while a barrier is in flight).
                ring.quiesce(1).await;
                if self.flush(disk).await == Outcome::Hold {
                    return Outcome::Hold;
                }
                if segments.is_empty() {
                    return Outcome::Answer(Status::Okay);
                }
                match self.write(disk, *sector, segments.as_slice(), pages).await {
                    Ok(()) => self.flush(disk).await,
                    failed => failed.into(),
                }
            }
            RequestKind::Discard { count: 0, .. } => Outcome::Answer(Status::Okay),
            RequestKind::Discard { sector, count, secure } => {
                disk.discard(*sector, *count, *secure).await.into()
            }
            RequestKind::Indirect { transfer, sector, count, page } => {
                if let Err(errno) = self
                    .fetch_segments(*page, usize::from(*count), pages, |bytes| {
                        // Judged by what the disk is now: it may have grown since the request was taken.
                        parse_indirect(bytes, *sector, *transfer, &ring.geometry(), list).map(drop)
                    })
                    .await
                {
                    return Err(errno).into();
                }
                let moved: u64 = list.iter().map(|segment| u64::from(segment.bytes())).sum();
                ring.gate().refund((u64::from(*count) * PAGE_SIZE as u64).saturating_sub(moved));
                match transfer {
                    Transfer::Read => self.read(disk, *sector, list, pages).await.into(),
                    Transfer::Write => self.write(disk, *sector, list, pages).await.into(),
                }
            }
        }
    }

    /// Copies the segments of an indirect request into private memory, once, and has that copy judged.
    async fn fetch_segments(
        &self,
        page: GrantRef,
        count: usize,
        pages: &mut Vec<GuestBytes>,
        judge: impl FnOnce(&[u8]) -> Result<(), blkif::Reason>,
    ) -> Result<(), Errno> {
        let len = count * WIRE_SEGMENT;
        let buf = self.pool.meta().await;
        // Whole sectors, which every grant allows to name: the segments stand at the page's start.
        let last = u8::try_from(len.div_ceil(512).saturating_sub(1)).map_err(|_| Errno::EINVAL)?;
        let segment = [Segment::new(page, 0, last).ok_or(Errno::EINVAL)?];
        if self.lease(&segment, pages) {
            let from = pages.first().ok_or(Errno::EIO)?;
            if !from.copy_to(&buf, 0) {
                return Err(Errno::EIO);
            }
        } else {
            self.copy(CopyDirection::FromGuest, &segment, &buf).await?;
        }
        judge(buf.bytes().get(..len).ok_or(Errno::EIO)?).map_err(|reason| {
            log::debug!("domain {}: indirect request refused: {reason}", self.dom);
            Errno::EINVAL
        })
    }

    fn lease(&self, segments: &[Segment], pages: &mut Vec<GuestBytes>) -> bool {
        match &self.persistent {
            Some(persistent) => persistent.lease(self.copier.grants(), segments, pages),
            None => false,
        }
    }

    /// A buffer for all of `segments`.
    async fn buffer(&self, segments: &[Segment]) -> Result<Buf, Errno> {
        let len = segments.iter().map(|segment| usize::from(segment.bytes())).sum();
        self.pool.data_soon(len).await.ok_or(Errno::ENOMEM)
    }

    async fn read(
        &self,
        disk: &Disk,
        sector: Sector,
        segments: &[Segment],
        pages: &mut Vec<GuestBytes>,
    ) -> Result<(), Errno> {
        let mapped = self.lease(segments, pages);
        let buf = self.buffer(segments).await?;
        match disk.start(Direction::Read, sector, &buf) {
            Some(transfer) => transfer.finish().await?,
            None => disk.read(sector, &buf).await?,
        }
        if mapped {
            return scatter(&buf, pages);
        }
        self.copy(CopyDirection::ToGuest, segments, &buf).await
    }

    async fn write(
        &self,
        disk: &Disk,
        sector: Sector,
        segments: &[Segment],
        pages: &mut Vec<GuestBytes>,
    ) -> Result<(), Errno> {
        let mapped = self.lease(segments, pages);
        let buf = self.buffer(segments).await?;
        if mapped {
            gather(pages, &buf)?;
        } else {
            self.copy(CopyDirection::FromGuest, segments, &buf).await?;
        }
        match disk.start(Direction::Write, sector, &buf) {
            Some(transfer) => transfer.finish().await,
            None => disk.write(sector, &buf).await,
        }
    }

    async fn copy(&self, direction: CopyDirection, segments: &[Segment], buf: &Buf) -> Result<(), Errno> {
        self.copier.queue(direction, pieces(direction, self.dom, segments, buf), buf)?.await
    }

    async fn flush(&self, disk: &Disk) -> Outcome {
        match disk.flush().await {
            Ok(()) => Outcome::Answer(Status::Okay),
            Err(_) => Outcome::Hold,
        }
    }

    fn complain(&self, disk: &Disk, request: &Request) {
        let Some(more) = self.failures.count(Instant::now()) else { return };
        let what = What::from(request);
        let (disk, dom) = (disk.name(), self.dom);
        log::warn!("{disk}: {what} failed for domain {dom} ({more} more failures since the last such line)");
    }

    /// The disk has stopped: the guest's device is to be closed, and the administrator told.
    fn report(&self, disk: &Disk) {
        if !self.told.replace(true) {
            let reason = disk.failure().unwrap_or_else(|| "the disk has stopped".to_owned());
            (self.tell)(Notice::Failed(reason));
        }
    }
}

/// Copies a buffer to the guest's pages, one after the other.
fn scatter(buf: &Buf, pages: &[GuestBytes]) -> Result<(), Errno> {
    let mut at = 0;
    for page in pages {
        if !page.fill_from(buf, at) {
            return Err(Errno::EIO);
        }
        at += page.len();
    }
    Ok(())
}

/// Copies the guest's pages into a buffer, one after the other.
fn gather(pages: &[GuestBytes], buf: &Buf) -> Result<(), Errno> {
    let mut at = 0;
    for page in pages {
        if !page.copy_to(buf, at) {
            return Err(Errno::EIO);
        }
        at += page.len();
    }
    Ok(())
}

/// The segments of a request, laid end to end in `buf`.
fn pieces(
    direction: CopyDirection,
    dom: DomId,
    segments: &[Segment],
    buf: &Buf,
) -> impl Iterator<Item = CopySegment> {
    let mut at = 0;
    segments.iter().filter_map(move |segment| {
        let len = segment.bytes();
        let piece = buf.piece(at..at + usize::from(len))?;
        at += usize::from(len);
        CopySegment::new(direction, dom, segment.gref(), segment.offset(), len, piece.ptr).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_logged_once_in_a_while_and_counted_in_between() {
        let failures = Failures::default();
        let start = Instant::now();
        assert_eq!(failures.count(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(failures.count(start + Duration::from_secs(9)), None);
        }
        assert_eq!(failures.count(start + LOG_INTERVAL), Some(1000));
    }
}
