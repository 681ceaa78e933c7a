//! Whole transfers between image files and buffers.

use std::rc::Rc;

use nix::errno::Errno;

use crate::buf::{Piece, Pool};
use crate::executor::Scheduler;
use crate::image::file::ImageFile;
use crate::reactor::{Op, Reactor};

/// What image code needs to do I/O on its thread.
#[derive(Clone, Debug)]
pub struct Io {
    /// Operations.
    pub reactor: Rc<Reactor>,
    /// Buffers.
    pub pool: Rc<Pool>,
    /// Tasks.
    pub scheduler: Rc<Scheduler>,
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
}

impl Io {
    /// Starts to move all of `piece`; see [`Transfer::finish`].
    pub fn start<'a>(
        &'a self,
        direction: Direction,
        file: &'a ImageFile,
        offset: u64,
        piece: Piece,
    ) -> Transfer<'a> {
        let op = self.op(direction, file, offset, piece);
        Transfer { io: self, file, direction, offset, piece, op }
    }

    fn op<'a>(&'a self, direction: Direction, file: &'a ImageFile, offset: u64, piece: Piece) -> Op<'a> {
        file.with(|fd| match direction {
            Direction::Read => self.reactor.read(fd, offset, piece),
            Direction::Write => self.reactor.write(fd, offset, piece),
        })
    }

    /// Makes all completed writes to `file` durable.
    pub async fn fdatasync(&self, file: &ImageFile) -> Result<(), Errno> {
        file.with(|fd| self.reactor.fdatasync(fd)).await.map(drop)
    }

    /// Makes a range of a file or block device read as zeros.
    pub async fn zero_range(&self, file: &ImageFile, offset: u64, len: u64) -> Result<(), Errno> {
        file.with(|fd| self.reactor.fallocate(fd, libc::FALLOC_FL_ZERO_RANGE, offset, len)).await.map(drop)
    }
}

impl Transfer<'_> {
    /// Waits until everything has been moved. A transfer that ends before is EIO: images are never read beyond their
    /// end on purpose.
    pub async fn finish(self) -> Result<(), Errno> {
        let Transfer { io, file, direction, mut offset, mut piece, mut op } = self;
        loop {
            let moved = match op.await {
                Ok(0) => return Err(Errno::EIO),
                Ok(moved) => moved,
                Err(Errno::EINTR | Errno::EAGAIN) => 0,
                Err(errno) => return Err(errno),
            };
            match piece.rest(moved) {
                None => return Ok(()),
                Some(rest) => piece = rest,
            }
            offset += u64::from(moved);
            op = io.op(direction, file, offset, piece);
        }
    }
}
