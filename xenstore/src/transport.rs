//! The two roads to the daemon: its unix socket, and the kernel's device.
//!
//! Both are used without blocking in `read` and `write`, with `poll` in front where waiting is wanted. That way a
//! request can be written while the daemon is busy sending events, and one code path serves both.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::Error;

/// Names another socket (or device) than the usual ones; the same variable as Xen's own libxenstore reads.
const PATH_VARIABLE: &str = "XENSTORED_PATH";
/// The daemon's socket in the domain it runs in.
const SOCKET: &str = "/run/xenstored/socket";
/// The kernel's device, for domains that do not run the daemon.
const DEVICE: &str = "/dev/xen/xenbus";

/// What became of a non-blocking transfer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// So many bytes went through; more than none.
    Bytes(usize),
    /// Nothing can go through at the moment.
    WouldBlock,
}

/// An open road to the daemon.
#[derive(Debug)]
pub(crate) enum Transport {
    Socket(UnixStream),
    /// The kernel never signals that this device is writable: it takes every write of a whole message at once.
    Device(File),
}

/// The places to try, in this order.
fn candidates(from_environment: Option<OsString>) -> Vec<PathBuf> {
    match from_environment {
        Some(path) if !path.is_empty() => vec![path.into()],
        _ => vec![SOCKET.into(), DEVICE.into()],
    }
}

impl Transport {
    /// Opens the first of the usual places that works; fails with the last one's error.
    pub(crate) fn open_default() -> Result<Transport, Error> {
        Transport::open_first(&candidates(std::env::var_os(PATH_VARIABLE)))
    }

    fn open_first(places: &[PathBuf]) -> Result<Transport, Error> {
        let mut outcome = Err(Error::Disconnected);
        for place in places {
            outcome = Transport::open(place);
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    /// Opens `path`: a character device as the kernel's device, anything else as a socket.
    pub(crate) fn open(path: &Path) -> Result<Transport, Error> {
        let is_device = path.metadata().is_ok_and(|meta| meta.file_type().is_char_device());
        let opened = if is_device {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
            options.open(path).map(Transport::Device)
        } else {
            UnixStream::connect(path).and_then(|stream| {
                stream.set_nonblocking(true)?;
                Ok(Transport::Socket(stream))
            })
        };
        opened.map_err(|source| Error::Connect { path: path.to_owned(), source })
    }

    /// Reads what is there, at most `buffer`.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Result<Transfer, Error> {
        let result = retry(|| match self {
            Transport::Socket(stream) => stream.read(buffer),
            Transport::Device(file) => file.read(buffer),
        });
        transfer("read from", result)
    }

    /// Writes as much of `bytes`, which are not empty, as is taken at once.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<Transfer, Error> {
        let result = retry(|| match self {
            Transport::Socket(stream) => stream.write(bytes),
            Transport::Device(file) => file.write(bytes),
        });
        match (transfer("write to", result)?, &self) {
            // Waiting for it to become writable would be waiting for ever.
            (Transfer::WouldBlock, Transport::Device(_)) => {
                Err(Error::Io { action: "write to", source: Errno::EAGAIN.into() })
            }
            (done, _) => Ok(done),
        }
    }

    /// Blocks until there is something to read (or the connection has ended).
    pub(crate) fn wait_readable(&self) -> Result<(), Error> {
        self.wait(PollFlags::POLLIN)
    }

    /// Blocks until there is something to read or room to write (or the connection has ended).
    pub(crate) fn wait_readable_or_writable(&self) -> Result<(), Error> {
        self.wait(PollFlags::POLLIN | PollFlags::POLLOUT)
    }

    fn wait(&self, interest: PollFlags) -> Result<(), Error> {
        loop {
            match poll(&mut [PollFd::new(self.as_fd(), interest)], PollTimeout::NONE) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::Io { action: "wait for", source: errno.into() }),
            }
        }
    }
}

impl AsFd for Transport {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Transport::Socket(stream) => stream.as_fd(),
            Transport::Device(file) => file.as_fd(),
        }
    }
}

/// Repeats `attempt` while signals interrupt it.
fn retry(mut attempt: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Sorts the outcomes of a transfer; no byte at all means that the connection has ended.
fn transfer(action: &'static str, result: io::Result<usize>) -> Result<Transfer, Error> {
    match result {
        Ok(0) => Err(Error::Disconnected),
        Ok(count) => Ok(Transfer::Bytes(count)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Transfer::WouldBlock),
        Err(error) => Err(Error::io(action, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_environment_replaces_both_usual_places() {
        assert_eq!(candidates(Some("/x/y".into())), [PathBuf::from("/x/y")]);
        let usual = [PathBuf::from("/run/xenstored/socket"), PathBuf::from("/dev/xen/xenbus")];
        assert_eq!(candidates(None), usual);
        assert_eq!(candidates(Some("".into())), usual);
    }

    #[test]
    fn the_second_place_is_tried_when_the_first_is_absent() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).expect("a listener");
        let opened = Transport::open_first(&[dir.path().join("absent"), socket]);
        assert!(matches!(opened, Ok(Transport::Socket(_))), "{opened:?}");
    }

    #[test]
    fn a_failed_connection_names_its_path() {
        let error = Transport::open(Path::new("/nonexistent/socket")).expect_err("nothing there");
        assert!(error.to_string().contains("/nonexistent/socket"), "{error}");
    }

    #[test]
    fn a_character_device_is_opened_as_a_file() {
        let mut opened = Transport::open(Path::new("/dev/null")).expect("it exists everywhere");
        assert!(matches!(opened, Transport::Device(_)), "{opened:?}");
        assert!(matches!(opened.read(&mut [0; 8]), Err(Error::Disconnected)));
        assert_eq!(opened.write(b"12345").expect("it takes everything"), Transfer::Bytes(5));
    }
}
