//! Stream sockets: with deadlines where a thread waits, and for operations of the reactor that may never end by themselves.

use std::future::Future;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::reactor::Op;

/// Connects to a socket by its name, without waiting: EAGAIN if too many do already. The descriptor blocks.
pub fn connect_now(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty()))?;
    Ok(socket)
}

/// What is left until a deadline; EAGAIN once it is over, as a socket says it.
fn left(deadline: Instant) -> Result<TimeVal, Errno> {
    let left = deadline.checked_duration_since(Instant::now()).filter(|left| left.as_micros() > 0);
    let left = left.ok_or(Errno::EAGAIN)?;
    Ok(TimeVal::new(left.as_secs().cast_signed(), i64::from(left.subsec_micros()).max(1)))
}

/// Fills `bytes`, blocking; fewer only at the end of the stream. EAGAIN when the time is over.
pub fn receive_until(socket: BorrowedFd<'_>, bytes: &mut [u8], deadline: Instant) -> Result<usize, Errno> {
    let mut at = 0;
    while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
        setsockopt(&socket, sockopt::ReceiveTimeout, &left(deadline)?)?;
        match recv(socket.as_raw_fd(), rest, MsgFlags::empty()) {
            Ok(0) => break,
            Ok(count) => at += count,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(at)
}

/// Sends all of `bytes`, blocking. EAGAIN when the time is over.
pub fn send_until(socket: BorrowedFd<'_>, mut bytes: &[u8], deadline: Instant) -> Result<(), Errno> {
    while !bytes.is_empty() {
        setsockopt(&socket, sockopt::SendTimeout, &left(deadline)?)?;
        match send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// From now on there are no deadlines.
pub fn no_deadlines(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let forever = TimeVal::new(0, 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &forever)?;
    setsockopt(&socket, sockopt::SendTimeout, &forever)
}

/// Sends what fits without waiting.
pub fn send_now(socket: &UnixStream, bytes: &[u8]) {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let _ = send(socket.as_fd().as_raw_fd(), bytes, flags);
}

/// An operation on a socket. If it is dropped in flight, which waits for its end, the socket is shut down first, because the
/// end may never come otherwise.
pub fn interruptible<'a>(
    socket: &'a UnixStream,
    op: Op<'a>,
) -> impl Future<Output = Result<u32, Errno>> + 'a {
    Interruptible { cut: Cut { socket: Some(socket) }, op }
}

struct Interruptible<'a> {
    // In this order.
    cut: Cut<'a>,
    op: Op<'a>,
}

struct Cut<'a> {
    socket: Option<&'a UnixStream>,
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        if let Some(socket) = self.socket {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Future for Interruptible<'_> {
    type Output = Result<u32, Errno>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let polled = Pin::new(&mut self.op).poll(cx);
        if polled.is_ready() {
            self.cut.socket = None;
        }
        polled
    }
}
