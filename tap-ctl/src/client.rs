//! A blocking client of a tapdisk's control socket, for command-line tools and tests.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::dir::ControlDir;
use crate::error::Error;
use crate::frame::{self, Decoder};
use crate::proto::{Reply, Request};

/// How long a question that a healthy tapdisk answers at once may take (LIST, PID).
pub const QUICK: Duration = Duration::from_secs(10);

/// A connection to one tapdisk.
#[derive(Debug)]
pub struct Client {
    pid: i32,
    stream: UnixStream,
    decoder: Decoder,
}

impl Client {
    /// Connects to the tapdisk `pid`, waiting at most [`QUICK`] for a place in its queue.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] with ENOENT without such a tapdisk, ECONNREFUSED when only its socket is left.
    pub fn connect(dir: &ControlDir, pid: i32) -> Result<Client, Error> {
        let path = dir.control_socket(pid);
        let open = || -> Result<UnixStream, Errno> {
            let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            // The kernel bounds connect() by the send timeout: a hung tapdisk with a full queue must not hold us.
            let limit = TimeVal::seconds(QUICK.as_secs().try_into().unwrap_or(i64::MAX));
            setsockopt(&fd, sockopt::SendTimeout, &limit)?;
            connect(fd.as_raw_fd(), &UnixAddr::new(&path)?)?;
            Ok(UnixStream::from(fd))
        };
        match open() {
            Ok(stream) => Ok(Client { pid, stream, decoder: Decoder::default() }),
            Err(Errno::EAGAIN) => Err(Error::Timeout { pid, limit: QUICK }),
            Err(errno) => Err(Error::Unreachable { pid, path, errno }),
        }
    }

    /// Sends one request and waits for its reply: for ever without `limit`, else at most so long in all.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] for an error reply. After any other error the connection is of no further use.
    pub fn call(&mut self, request: &Request, limit: Option<Duration>) -> Result<Reply, Error> {
        let pid = self.pid;
        let deadline = limit.map(|limit| (Instant::now() + limit, limit));
        let line = frame::encode(request).map_err(|source| Error::Frame { pid, source })?;
        self.remaining(deadline)?;
        self.stream.write_all(&line).map_err(|error| self.failed(error, deadline))?;
        loop {
            match self.decoder.next().map_err(|source| Error::Frame { pid, source })? {
                Some(Reply::Error { errno, message }) => return Err(Error::Refused { errno, message }),
                Some(reply) => return Ok(reply),
                None => self.receive(deadline)?,
            }
        }
    }

    /// As [`Client::call`] for requests that are answered by [`Reply::Done`].
    ///
    /// # Errors
    ///
    /// As [`Client::call`], and [`Error::Unexpected`] for any other reply.
    pub fn command(&mut self, request: &Request, limit: Option<Duration>) -> Result<(), Error> {
        match self.call(request, limit)? {
            Reply::Done => Ok(()),
            _ => Err(Error::Unexpected { pid: self.pid }),
        }
    }

    /// The process that listens on the control socket; `None` if the system does not tell.
    pub(crate) fn peer_pid(&self) -> Option<i32> {
        getsockopt(&self.stream, sockopt::PeerCredentials).ok().map(|credentials| credentials.pid())
    }

    /// Waits until the tapdisk has ended, or the time is over; returns whether it has.
    pub(crate) fn ends_within(&mut self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        loop {
            match self.receive(Some((end, limit))) {
                Ok(()) => {}
                Err(Error::Timeout { .. }) => return false,
                Err(_) => return true,
            }
        }
    }

    fn receive(&mut self, deadline: Option<(Instant, Duration)>) -> Result<(), Error> {
        self.remaining(deadline)?;
        let mut bytes = [0; 4096];
        let count = match self.stream.read(&mut bytes) {
            Ok(0) => return Err(Error::Ended { pid: self.pid }),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(self.failed(error, deadline)),
        };
        self.decoder.feed(bytes.get(..count).unwrap_or_default());
        Ok(())
    }

    /// Arms the socket with what is left of the caller's patience.
    fn remaining(&self, deadline: Option<(Instant, Duration)>) -> Result<(), Error> {
        let left = match deadline {
            None => None,
            Some((end, limit)) => match end.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Err(Error::Timeout { pid: self.pid, limit }),
                left => Some(left),
            },
        };
        let io = |source| Error::Io { pid: self.pid, source };
        self.stream.set_read_timeout(left).map_err(io)?;
        self.stream.set_write_timeout(left).map_err(io)
    }

    fn failed(&self, error: std::io::Error, deadline: Option<(Instant, Duration)>) -> Error {
        match (error.kind(), deadline) {
            (ErrorKind::WouldBlock | ErrorKind::TimedOut, Some((_, limit))) => {
                Error::Timeout { pid: self.pid, limit }
            }
            (ErrorKind::BrokenPipe | ErrorKind::ConnectionReset, _) => Error::Ended { pid: self.pid },
            _ => Error::Io { pid: self.pid, source: error },
        }
    }
}

/// One request on a connection of its own; see [`Client::call`].
///
/// # Errors
///
/// Those of [`Client::connect`] and [`Client::call`].
pub fn call(dir: &ControlDir, pid: i32, request: &Request, limit: Option<Duration>) -> Result<Reply, Error> {
    Client::connect(dir, pid)?.call(request, limit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Minor;
    use crate::testing::{FakeTapdisk, Script};

    fn attach() -> Request {
        Request::Attach { minor: Minor(0) }
    }

    #[test]
    fn an_error_reply_keeps_errno_and_words() {
        let fake = FakeTapdisk::start(Script::Always(Reply::Error { errno: 17, message: "taken".into() }));
        let error = call(&fake.dir, fake.pid, &attach(), None).unwrap_err();
        assert_eq!((error.errno(), error.to_string().as_str()), (17, "taken"));
    }

    #[test]
    fn several_requests_share_a_connection() {
        let fake = FakeTapdisk::start(Script::Always(Reply::Done));
        let mut client = Client::connect(&fake.dir, fake.pid).unwrap();
        client.command(&attach(), None).unwrap();
        client.command(&Request::Detach { minor: Minor(0) }, None).unwrap();
        assert_eq!(fake.seen(), [attach(), Request::Detach { minor: Minor(0) }]);
    }

    #[test]
    fn silence_ends_at_the_limit_and_a_hang_up_at_once() {
        let silent = FakeTapdisk::start(Script::Silent);
        let error =
            call(&silent.dir, silent.pid, &Request::List, Some(Duration::from_millis(50))).unwrap_err();
        assert_eq!(error.errno(), 110, "{error}");
        let gone = FakeTapdisk::start(Script::HangUp);
        let error = call(&gone.dir, gone.pid, &Request::List, None).unwrap_err();
        assert!(error.is_dead(), "{error}");
    }

    #[test]
    fn a_missing_and_an_abandoned_socket_both_mean_dead() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path());
        let error = Client::connect(&dir, 77).unwrap_err();
        assert_eq!((error.errno(), error.is_dead()), (2, true));
        drop(std::os::unix::net::UnixListener::bind(dir.control_socket(77)).unwrap());
        let error = Client::connect(&dir, 77).unwrap_err();
        assert_eq!((error.errno(), error.is_dead()), (111, true));
    }

    #[test]
    fn an_answer_of_another_kind_is_an_error() {
        let fake = FakeTapdisk::start(Script::Always(Reply::Pid { pid: 1 }));
        let error = Client::connect(&fake.dir, fake.pid).unwrap().command(&attach(), None).unwrap_err();
        assert!(matches!(error, Error::Unexpected { .. }), "{error}");
        let fake = FakeTapdisk::start(Script::Garbage);
        let error = call(&fake.dir, fake.pid, &attach(), None).unwrap_err();
        assert!(matches!(error, Error::Frame { .. }), "{error}");
    }
}
