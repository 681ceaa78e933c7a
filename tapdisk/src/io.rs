//! Whole transfers between image files and buffers.
//!
//! A transfer that the store takes as it is goes straight through ([`Io::start`]); [`Io::read`] and [`Io::write`] also take
//! single sectors of a store with larger blocks, see `blocks` below this folder.

mod blocks;

use std::fmt;
use std::ops::Range;
use std::rc::Rc;

use nix::errno::Errno;

use crate::buf::{Piece, Pool};
use crate::executor::Scheduler;
use crate::image::file::ImageFile;
use crate::porter::Failure;
use crate::reactor::{Op, Reactor};
use crate::sync::{Flight, Flights};

/// What image code needs to do I/O on its thread.
#[derive(Clone, Debug)]
pub struct Io {
    /// Operations.
    pub reactor: Rc<Reactor>,
    /// Buffers.
    pub pool: Rc<Pool>,
    /// Tasks.
    pub scheduler: Rc<Scheduler>,
    /// Transfers under way.
    pub flights: Rc<Flights>,
}

/// Which way a [`Transfer`] goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file.
    Read,
    /// To the file.
    Write,
}

/// A transfer that was started and has not been finished.
#[derive(Debug)]
pub struct Transfer<'a> {
    io: &'a Io,
    file: &'a ImageFile,
    direction: Direction,
    offset: u64,
    piece: Piece,
    op: Op<'a>,
    flight: Flight<'a>,
}

impl Io {
    /// The means of a thread.
    pub fn new(reactor: Rc<Reactor>, pool: Rc<Pool>, scheduler: Rc<Scheduler>) -> Io {
        let flights = Rc::new(Flights::new(scheduler.clone()));
        Io { reactor, pool, scheduler, flights }
    }

    /// Starts to move all of `piece`, which the file must take as it is ([`ImageFile::takes`]); see [`Transfer::finish`].
    pub fn start<'a>(
        &'a self,
        direction: Direction,
        file: &'a ImageFile,
        offset: u64,
        piece: Piece,
    ) -> Transfer<'a> {
        debug_assert!(
            file.takes(offset, piece),
            "{} bytes at {offset} are no whole blocks, or lie askew",
            piece.len
        );
        let op = self.op(direction, file, offset, piece);
        Transfer { io: self, file, direction, offset, piece, op, flight: self.flights.begin() }
    }

    /// Starts to move all of `piece` if the store takes it as it is and at once.
    pub fn start_whole<'a>(
        &'a self,
        direction: Direction,
        file: &'a ImageFile,
        offset: u64,
        piece: Piece,
    ) -> Option<Transfer<'a>> {
        let whole = piece.len <= file.store().most && file.takes(offset, piece);
        whole.then(|| self.start(direction, file, offset, piece))
    }

    /// Moves all of `piece`, which the file must take as it is, in as many operations as the store wants.
    async fn whole(
        &self,
        direction: Direction,
        file: &ImageFile,
        offset: u64,
        piece: Piece,
    ) -> Result<(), Errno> {
        if piece.len <= file.store().most {
            return self.start(direction, file, offset, piece).finish().await;
        }
        self.in_parts(direction, file, offset, piece).await
    }

    async fn in_parts(
        &self,
        direction: Direction,
        file: &ImageFile,
        mut offset: u64,
        mut piece: Piece,
    ) -> Result<(), Errno> {
        let mut flying = Flying::default();
        loop {
            let part = Piece { len: piece.len.min(file.store().most), ..piece };
            flying.add(self.start(direction, file, offset, part)).await?;
            offset += u64::from(part.len);
            match piece.rest(part.len) {
                Some(rest) => piece = rest,
                None => return flying.finish().await,
            }
        }
    }

    fn op<'a>(&'a self, direction: Direction, file: &'a ImageFile, offset: u64, piece: Piece) -> Op<'a> {
        match direction {
            Direction::Read => self.reactor.read(file.target(), offset, piece),
            Direction::Write => self.reactor.write(file.target(), offset, piece),
        }
    }

    /// Makes all completed writes to `file` durable.
    pub async fn fdatasync(&self, file: &ImageFile) -> Result<(), Errno> {
        if file.are_flushes_deferred() {
            return Ok(());
        }
        file.with(|fd| self.reactor.fdatasync(fd)).await.map(drop)
    }

    /// Gives the room of a byte range of a regular file back to its file system; the range reads as zeros then.
    pub async fn punch(&self, file: &ImageFile, range: Range<u64>) -> Result<(), Errno> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.fallocate(file, mode, range).await
    }

    async fn fallocate(&self, file: &ImageFile, mode: i32, range: Range<u64>) -> Result<(), Errno> {
        let len = range.end.saturating_sub(range.start);
        file.with(|fd| self.reactor.fallocate(fd, mode, range.start, len)).await.map(drop)
    }
}

impl Transfer<'_> {
    /// Waits until everything has been moved. A transfer that ends before is EIO: images are never read beyond their
    /// end on purpose.
    pub async fn finish(self) -> Result<(), Errno> {
        let Transfer { io, file, direction, mut offset, mut piece, mut op, flight: _flight } = self;
        loop {
            let moved = moved(op.await)?;
            match piece.rest(moved) {
                None => return Ok(()),
                Some(rest) => piece = rest,
            }
            offset += u64::from(moved);
            op = io.op(direction, file, offset, piece);
        }
    }
}

/// Transfers that one request has in flight at most.
const MAX_TRANSFERS: usize = 16;

/// The transfers of one request.
#[derive(Default)]
pub struct Flying<'a> {
    transfers: [Option<Transfer<'a>>; MAX_TRANSFERS],
    next: usize,
}

impl fmt::Debug for Flying<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flying").field("started", &self.next).finish_non_exhaustive()
    }
}

impl<'a> Flying<'a> {
    /// Adds one; if all places are taken, waits for the oldest first.
    pub async fn add(&mut self, transfer: Transfer<'a>) -> Result<(), Errno> {
        let place = &mut self.transfers[self.next % MAX_TRANSFERS];
        self.next += 1;
        if let Some(oldest) = place.replace(transfer) {
            oldest.finish().await?;
        }
        Ok(())
    }

    /// Waits for all.
    pub async fn finish(&mut self) -> Result<(), Errno> {
        for place in &mut self.transfers {
            // Taken out one by one: together they are large, and moving them costs more than the rest of a read.
            if let Some(transfer) = place.take() {
                transfer.finish().await?;
            }
        }
        Ok(())
    }
}

/// The errno of a failed call or errand; EIO for an error that has none.
pub fn errno_of(error: &std::io::Error) -> Errno {
    let errand = || Some(error.get_ref()?.downcast_ref::<Failure>()?.errno);
    Errno::from_raw(error.raw_os_error().or_else(errand).unwrap_or(libc::EIO))
}

/// How far an operation got that may be repeated for the rest.
fn moved(result: Result<u32, Errno>) -> Result<u32, Errno> {
    match result {
        Ok(0) => Err(Errno::EIO),
        Err(Errno::EINTR | Errno::EAGAIN) => Ok(0),
        other => other,
    }
}
