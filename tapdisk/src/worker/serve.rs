//! From a request to its answer.

use std::rc::Rc;

use blkif::{DomId, Request, RequestKind, Sector, Segments, Status};
use gntdev::{CopyDirection, CopySegment, Grants};
use nix::errno::Errno;

use super::ring::{Ring, Work};
use crate::buf::Buf;
use crate::copier::Copier;
use crate::image::Disk;

/// What a request comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Answer(Status),
    /// The truth cannot be told in the protocol: never answer.
    Hold,
}

impl From<Result<(), Errno>> for Outcome {
    fn from(result: Result<(), Errno>) -> Outcome {
        Outcome::Answer(match result {
            Ok(()) => Status::Okay,
            Err(Errno::EOPNOTSUPP) => Status::NotSupported,
            Err(_) => Status::Error,
        })
    }
}

/// The life of a slot: take a request, serve it, answer it, until the ring is disconnected.
pub async fn slot<G: Grants>(ring: Rc<Ring<G::Map>>, slot: usize, disk: Rc<Disk>, copier: Rc<Copier<G>>) {
    let way = Way { dom: ring.dom, disk: &disk, copier: &copier };
    while let Some(Work { request, buf }) = ring.next(slot).await {
        let outcome = serve(&ring, &request, buf.as_ref(), &way).await;
        // The memory goes back before the answer, so that what the guest asks next finds it free.
        drop(buf);
        match outcome {
            Outcome::Answer(status) => ring.complete(slot, &request, status),
            Outcome::Hold => ring.hold(slot, &request).await,
        }
    }
}

async fn serve<G: Grants>(
    ring: &Ring<G::Map>,
    request: &Request,
    buf: Option<&Buf>,
    way: &Way<'_, G>,
) -> Outcome {
    match (&request.kind, buf) {
        (RequestKind::Read { sector, segments }, Some(buf)) => way.read(*sector, segments, buf).await.into(),
        (RequestKind::Write { sector, segments }, Some(buf)) => {
            way.write(*sector, segments, buf).await.into()
        }
        (RequestKind::Flush, _) => way.flush().await,
        (RequestKind::Barrier { sector, segments }, buf) => {
            // Everything taken before has ended and is durable before the barrier's own data, which is durable before
            // anything taken later begins (the ring takes nothing while a barrier is in flight).
            ring.drain_to(1).await;
            if way.flush().await == Outcome::Hold {
                return Outcome::Hold;
            }
            let Some(buf) = buf else { return Outcome::Answer(Status::Okay) };
            match way.write(*sector, segments, buf).await {
                Ok(()) => way.flush().await,
                failed => failed.into(),
            }
        }
        // Neither is offered.
        (RequestKind::Discard { .. } | RequestKind::Indirect { .. }, _) => {
            Outcome::Answer(Status::NotSupported)
        }
        // Taking gives every request with data its buffer.
        (RequestKind::Read { .. } | RequestKind::Write { .. }, None) => Outcome::Answer(Status::Error),
    }
}

/// The way of data between a guest's pages and the disk.
struct Way<'a, G> {
    dom: DomId,
    disk: &'a Disk,
    copier: &'a Copier<G>,
}

impl<G: Grants> Way<'_, G> {
    async fn read(&self, sector: Sector, segments: &Segments, buf: &Buf) -> Result<(), Errno> {
        self.disk.read(sector, buf).await?;
        self.copy(CopyDirection::ToGuest, segments, buf).await
    }

    async fn write(&self, sector: Sector, segments: &Segments, buf: &Buf) -> Result<(), Errno> {
        self.copy(CopyDirection::FromGuest, segments, buf).await?;
        self.disk.write(sector, buf).await
    }

    async fn copy(&self, direction: CopyDirection, segments: &Segments, buf: &Buf) -> Result<(), Errno> {
        self.copier.queue(direction, pieces(direction, self.dom, segments, buf), buf)?.await
    }

    async fn flush(&self) -> Outcome {
        match self.disk.flush().await {
            Ok(()) => Outcome::Answer(Status::Okay),
            Err(_) => Outcome::Hold,
        }
    }
}

/// The segments of a request, laid end to end in `buf`.
fn pieces(
    direction: CopyDirection,
    dom: DomId,
    segments: &Segments,
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
