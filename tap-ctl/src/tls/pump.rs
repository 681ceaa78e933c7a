//! Passing bytes on between a client and a disk, of which neither must wait for the other: a disk may have to send its replies
//! while the client sends a long write.
//!
//! Nothing is read from a side before what was read from it is with the other one, so that little is kept in memory.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::ServerConnection;

/// Bytes read at a time.
const STEP: usize = 64 << 10;

/// What was read and is not written yet.
#[derive(Default)]
struct Pending {
    bytes: Vec<u8>,
    done: usize,
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.done == self.bytes.len()
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.is_empty() {
            self.bytes.clear();
            self.done = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Writes as much as can be written now.
    fn write(&mut self, mut to: impl Write) -> io::Result<()> {
        while !self.is_empty() {
            match to.write(self.bytes.get(self.done..).unwrap_or_default()) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => self.done = self.done.saturating_add(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// `None`: not now.
fn now<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Goes on until either side ends the connection. What a client has sent before that is passed on.
pub(super) fn pump(mut tls: ServerConnection, client: &TcpStream, disk: &UnixStream) -> io::Result<()> {
    client.set_nonblocking(true)?;
    disk.set_nonblocking(true)?;
    // We read no more from the disk before it is sent, which is limit enough.
    tls.set_buffer_limit(None);
    let mut bytes = vec![0; STEP];
    let mut for_disk = Pending::default();
    let mut gone = false;
    loop {
        gone |= take_plain(&mut tls, &mut bytes, &mut for_disk)?;
        for_disk.write(disk)?;
        while tls.wants_write() && now(tls.write_tls(&mut &*client))?.is_some() {}
        if gone && for_disk.is_empty() {
            return Ok(());
        }
        let reads_client = for_disk.is_empty() && !gone;
        let reads_disk = !tls.wants_write();
        let ready = wait(
            (client, interest(reads_client, tls.wants_write())),
            (disk, interest(reads_disk, !for_disk.is_empty())),
        )?;
        if ready.client && reads_client {
            gone |= take_sealed(&mut tls, client)?;
        }
        if ready.disk && reads_disk {
            match now((&*disk).read(&mut bytes))? {
                Some(0) => return say_goodbye(tls, client),
                Some(count) => tls.writer().write_all(bytes.get(..count).unwrap_or_default())?,
                None => {}
            }
        }
    }
}

/// Takes what was deciphered; whether the client has said that nothing more comes.
fn take_plain(tls: &mut ServerConnection, bytes: &mut [u8], to: &mut Pending) -> io::Result<bool> {
    loop {
        match now(tls.reader().read(bytes)) {
            Ok(Some(0)) => return Ok(true),
            Ok(Some(count)) => to.add(bytes.get(..count).unwrap_or_default()),
            Ok(None) => return Ok(false),
            // Many clients end without a word, and each of their requests has its length.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(true),
            Err(error) => return Err(error),
        }
    }
}

/// Reads and deciphers; whether the client is gone.
fn take_sealed(tls: &mut ServerConnection, client: &TcpStream) -> io::Result<bool> {
    let Some(count) = now(tls.read_tls(&mut &*client))? else { return Ok(false) };
    if let Err(error) = tls.process_new_packets() {
        // It is told why, if it still listens.
        let _ = tls.write_tls(&mut &*client);
        return Err(io::Error::other(error));
    }
    Ok(count == 0)
}

/// Ends the connection after the disk has.
fn say_goodbye(mut tls: ServerConnection, client: &TcpStream) -> io::Result<()> {
    tls.send_close_notify();
    client.set_nonblocking(false)?;
    client.set_write_timeout(Some(super::PATIENCE))?;
    while tls.wants_write() {
        tls.write_tls(&mut &*client)?;
    }
    Ok(())
}

fn interest(reads: bool, writes: bool) -> PollFlags {
    let mut flags = PollFlags::empty();
    flags.set(PollFlags::POLLIN, reads);
    flags.set(PollFlags::POLLOUT, writes);
    flags
}

/// Which side something can be done with.
struct Ready {
    client: bool,
    disk: bool,
}

/// Waits for either side. One of which nothing is wanted is left out: that it has ended would be reported again and again.
fn wait(client: (&TcpStream, PollFlags), disk: (&UnixStream, PollFlags)) -> io::Result<Ready> {
    let mut polled = Vec::with_capacity(2);
    let mut add = |fd, flags: PollFlags| {
        (!flags.is_empty()).then(|| {
            polled.push(PollFd::new(fd, flags));
            polled.len().saturating_sub(1)
        })
    };
    let places = (add(client.0.as_fd(), client.1), add(disk.0.as_fd(), disk.1));
    match poll(&mut polled, PollTimeout::NONE) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let is_ready = |place: Option<usize>| {
        place.and_then(|place| polled.get(place)).and_then(PollFd::any).unwrap_or(false)
    };
    Ok(Ready { client: is_ready(places.0), disk: is_ready(places.1) })
}
