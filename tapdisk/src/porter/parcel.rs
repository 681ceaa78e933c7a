//! Datagrams that carry descriptors, between the processes of one disk.
//!
//! Sockets of sequenced packets (unix(7)): a datagram arrives whole with what it carries, and the end of the other process is an end of file.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// Longest datagram in bytes. What the kernel lets a sender queue by default (`net.core.wmem_default`) is less.
const LONGEST: usize = 256 * 1024;

/// Descriptors of one datagram.
const MOST: usize = 2;

/// A datagram that arrived.
#[derive(Debug)]
pub struct Parcel {
    /// Empty if the datagram was too long.
    pub bytes: Vec<u8>,
    /// In the order in which they were sent; close-on-exec.
    pub descriptors: Vec<OwnedFd>,
    /// There were more descriptors than the kernel could give to this process.
    pub short: bool,
}

/// Two connected sockets, close-on-exec.
///
/// # Errors
/// Of socketpair(2).
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends a datagram with at most two descriptors; waits until there is room.
///
/// # Errors
/// Of sendmsg(2): EPIPE and ECONNRESET if nobody is there, EMSGSIZE if it is too long.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], with: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !with.is_empty() && !control.push(SendAncillaryMessage::ScmRights(with)) {
            return Err(Errno::INVAL);
        }
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return sent.map(drop),
        }
    }
}

/// Takes the next datagram in, waiting for it unless `flags` say otherwise; `None`: nobody is there who could send one.
///
/// # Errors
/// Of recvmsg(2).
pub fn receive(socket: BorrowedFd<'_>, flags: RecvFlags) -> Result<Option<Parcel>, Errno> {
    let mut bytes = vec![0; LONGEST];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = flags | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(Errno::INTR) => continue,
            received => received?,
        };
        let descriptors: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 && descriptors.is_empty() {
            return Ok(None);
        }
        let whole = !received.flags.contains(ReturnFlags::TRUNC);
        bytes.truncate(if whole { received.bytes } else { 0 });
        return Ok(Some(Parcel { bytes, descriptors, short: received.flags.contains(ReturnFlags::CTRUNC) }));
    }
}
