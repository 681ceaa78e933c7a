//! The two directions of a connection. One task at a time reads a request, one at a time writes a reply.

use std::cell::{Cell, RefCell};
use std::net::Shutdown;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use nix::errno::Errno;

use crate::buf::{Buf, Piece, Pool};
use crate::io::Io;
use crate::socket::interruptible;
use crate::sync::WaitSet;

/// Bytes of the buffer for what comes in, and of the one for what goes out.
const ROOM: usize = 128 << 10;

/// Data of this size and more go straight from and to where they belong.
const DIRECT: usize = 32 << 10;

/// The connection is of no use any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

/// A connected socket and its buffers.
#[derive(Debug)]
pub struct Stream {
    socket: UnixStream,
    io: Io,
    gone: Cell<bool>,
    pub reading: Turn,
    input: RefCell<Buf>,
    /// The bytes of it that were not taken.
    start: Cell<usize>,
    end: Cell<usize>,
    pub writing: Turn,
    output: RefCell<Buf>,
    /// Bytes in it.
    len: Cell<usize>,
}

/// A role that one task at a time has.
#[derive(Debug)]
pub struct Turn {
    taken: Cell<bool>,
    waiting: Cell<usize>,
    freed: WaitSet,
}

/// The role, until it is dropped.
pub struct Taken<'a>(&'a Turn);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.taken.set(false);
        self.0.freed.wake_all();
    }
}

impl Turn {
    fn new(io: &Io) -> Turn {
        let freed = WaitSet::new(io.scheduler.clone());
        Turn { taken: Cell::new(false), waiting: Cell::new(0), freed }
    }

    pub async fn take(&self) -> Taken<'_> {
        self.waiting.set(self.waiting.get() + 1);
        while self.taken.get() {
            self.freed.wait().await;
        }
        self.waiting.set(self.waiting.get() - 1);
        self.taken.set(true);
        Taken(self)
    }
}

impl Stream {
    /// Over a socket in blocking mode. `None` if there is no memory.
    pub fn new(socket: OwnedFd, io: &Io, pool: &Rc<Pool>) -> Option<Stream> {
        Some(Stream {
            socket: socket.into(),
            io: io.clone(),
            gone: Cell::new(false),
            reading: Turn::new(io),
            input: RefCell::new(pool.data(ROOM)?),
            start: Cell::new(0),
            end: Cell::new(0),
            writing: Turn::new(io),
            output: RefCell::new(pool.data(ROOM)?),
            len: Cell::new(0),
        })
    }

    /// Ends both directions.
    pub fn close(&self) -> Gone {
        self.gone.set(true);
        let _ = self.socket.shutdown(Shutdown::Both);
        Gone
    }

    /// Whether it was ended.
    pub fn is_gone(&self) -> bool {
        self.gone.get()
    }

    fn moved(&self, result: Result<u32, Errno>) -> Result<usize, Gone> {
        match result {
            Ok(0) => Err(self.close()),
            Ok(count) => Ok(count as usize),
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(0),
            Err(_) => Err(self.close()),
        }
    }

    async fn receive(&self, piece: Piece) -> Result<usize, Gone> {
        if self.gone.get() {
            return Err(Gone);
        }
        let op = self.io.reactor.receive(self.socket.as_fd(), piece);
        self.moved(interruptible(&self.socket, op).await)
    }

    async fn send(&self, mut piece: Piece) -> Result<(), Gone> {
        loop {
            if self.gone.get() {
                return Err(Gone);
            }
            let op = self.io.reactor.send(self.socket.as_fd(), piece);
            let sent = self.moved(interruptible(&self.socket, op).await)?;
            match piece.rest(u32::try_from(sent).unwrap_or(u32::MAX)) {
                Some(rest) => piece = rest,
                None => return Ok(()),
            }
        }
    }

    fn there(&self) -> usize {
        self.end.get() - self.start.get()
    }

    fn taken(&self, count: usize) {
        self.start.set(self.start.get() + count);
    }

    /// Waits until so many bytes have come; they fit.
    async fn fill(&self, count: usize) -> Result<(), Gone> {
        if self.there() == 0 || ROOM - self.start.get() < count {
            let bytes = self.start.get()..self.end.get();
            self.start.set(0);
            self.end.set(bytes.len());
            self.input.borrow_mut().bytes_mut().copy_within(bytes, 0);
        }
        while self.there() < count {
            let piece = self.input.borrow().piece(self.end.get()..ROOM).ok_or(Gone)?;
            self.end.set(self.end.get() + self.receive(piece).await?);
        }
        Ok(())
    }

    /// Takes the next `N` bytes.
    pub async fn take<const N: usize>(&self) -> Result<[u8; N], Gone> {
        self.fill(N).await?;
        let start = self.start.get();
        self.taken(N);
        let input = self.input.borrow();
        input.bytes().get(start..).and_then(|bytes| bytes.first_chunk::<N>()).copied().ok_or(Gone)
    }

    /// Fills all of `buf` with the next bytes.
    pub async fn take_into(&self, buf: &Buf) -> Result<(), Gone> {
        let mut at = 0;
        while at < buf.len() {
            let there = self.there().min(buf.len() - at);
            if there > 0 {
                let start = self.start.get();
                if !self.input.borrow().copy_to(start..start + there, buf, at) {
                    return Err(self.close());
                }
                self.taken(there);
                at += there;
            } else if let (true, Some(piece)) = (buf.len() - at >= DIRECT, buf.piece(at..buf.len())) {
                at += self.receive(piece).await?;
            } else {
                self.fill(1).await?;
            }
        }
        Ok(())
    }

    /// Takes bytes that nobody wants.
    pub async fn skip(&self, mut count: usize) -> Result<(), Gone> {
        while count > 0 {
            self.fill(1).await?;
            let there = self.there().min(count);
            self.taken(there);
            count -= there;
        }
        Ok(())
    }

    /// Writes some bytes, fewer than the buffer has.
    pub async fn put(&self, bytes: &[u8]) -> Result<(), Gone> {
        if self.len.get() + bytes.len() > ROOM {
            self.flush().await?;
        }
        let at = self.len.get();
        let mut output = self.output.borrow_mut();
        output.bytes_mut().get_mut(at..at + bytes.len()).ok_or(Gone)?.copy_from_slice(bytes);
        self.len.set(at + bytes.len());
        Ok(())
    }

    /// Writes a part of a buffer.
    pub async fn put_buf(&self, buf: &Buf, range: Range<usize>) -> Result<(), Gone> {
        if range.len() >= DIRECT {
            self.flush().await?;
            return self.send(buf.piece(range).ok_or(Gone)?).await;
        }
        if self.len.get() + range.len() > ROOM {
            self.flush().await?;
        }
        let at = self.len.get();
        self.len.set(at + range.len());
        if buf.copy_to(range, &self.output.borrow(), at) { Ok(()) } else { Err(self.close()) }
    }

    /// A reply is written: it is sent at once, unless somebody will do so who waits to write the next one.
    pub async fn end_of_reply(&self) -> Result<(), Gone> {
        if self.writing.waiting.get() > 0 { Ok(()) } else { self.flush().await }
    }

    async fn flush(&self) -> Result<(), Gone> {
        let len = self.len.replace(0);
        let piece = self.output.borrow().piece(0..len);
        match piece {
            Some(piece) => self.send(piece).await,
            None => Ok(()),
        }
    }
}
