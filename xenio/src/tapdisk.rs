//! Control connections to tapdisks: one each, kept open, never waited for.
//!
//! A request is written and forgotten; its reply comes as an event with the request's ticket. The end of the connection
//! is the end of the tapdisk. So a tapdisk that hangs holds up nothing but its own disks.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};

use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use tap_ctl::frame::{Decoder, FrameError, encode};
use tap_ctl::{ControlDir, Reply, Request};

/// Names a request until its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

/// Tokens of connections begin here; smaller ones are the caller's.
pub const FIRST_TOKEN: usize = 16;

/// What came of a connection's readiness.
#[derive(Debug)]
pub struct Report {
    /// The tapdisk's process id.
    pub pid: i32,
    /// Replies, oldest first.
    pub replies: Vec<(Ticket, Reply)>,
    /// Why the connection is over, if it is. Requests without reply will not get one.
    pub ended: Option<LinkError>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It could not be made.
    #[error("cannot reach tapdisk {pid}: {source}")]
    Unreachable {
        /// The tapdisk's process id.
        pid: i32,
        /// What the system said.
        source: io::Error,
    },
    /// The tapdisk has closed it, which it does only by ending.
    #[error("tapdisk {pid} has ended; see its log")]
    Ended {
        /// The tapdisk's process id.
        pid: i32,
    },
    /// It failed.
    #[error("the connection to tapdisk {pid} failed: {source}")]
    Io {
        /// The tapdisk's process id.
        pid: i32,
        /// What the system said.
        source: io::Error,
    },
    /// The tapdisk does not speak the protocol.
    #[error("tapdisk {pid}: {source}")]
    Frame {
        /// The tapdisk's process id.
        pid: i32,
        /// What is wrong with its message.
        source: FrameError,
    },
    /// The tapdisk answers what was not asked.
    #[error("tapdisk {pid} sent a reply without a request")]
    Unasked {
        /// The tapdisk's process id.
        pid: i32,
    },
}

/// All connections.
#[derive(Debug)]
pub struct Links {
    registry: Registry,
    dir: ControlDir,
    links: HashMap<i32, Link>,
    next_ticket: u64,
    next_token: usize,
}

#[derive(Debug)]
struct Link {
    pid: i32,
    token: Token,
    stream: UnixStream,
    decoder: Decoder,
    unsent: Vec<u8>,
    /// Requests without reply, oldest first: a tapdisk answers in order.
    waiting: VecDeque<Ticket>,
}

impl Links {
    /// No connections yet.
    pub fn new(registry: Registry, dir: ControlDir) -> Links {
        Links { registry, dir, links: HashMap::new(), next_ticket: 0, next_token: FIRST_TOKEN }
    }

    /// Sends a request to the tapdisk `pid`, connecting to it first if need be.
    ///
    /// # Errors
    ///
    /// When the tapdisk is not there. A connection that breaks while the request is being written is told by its
    /// readiness, as any other end.
    pub fn send(&mut self, pid: i32, request: &Request) -> Result<Ticket, LinkError> {
        let line = encode(request).map_err(|source| LinkError::Frame { pid, source })?;
        let ticket = Ticket(self.next_ticket);
        self.next_ticket = self.next_ticket.wrapping_add(1);
        let link = self.link(pid).map_err(|source| LinkError::Unreachable { pid, source })?;
        link.unsent.extend_from_slice(&line);
        link.waiting.push_back(ticket);
        // The outcome shows at the next readiness: an error here is seen again there, by the read.
        let _ = link.flush();
        Ok(ticket)
    }

    fn link(&mut self, pid: i32) -> io::Result<&mut Link> {
        use std::collections::hash_map::Entry;
        match self.links.entry(pid) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let token = Token(self.next_token);
                self.next_token = self.next_token.wrapping_add(1).max(FIRST_TOKEN);
                let mut stream = UnixStream::connect(self.dir.control_socket(pid))?;
                self.registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
                Ok(entry.insert(Link {
                    pid,
                    token,
                    stream,
                    decoder: Decoder::default(),
                    unsent: Vec::new(),
                    waiting: VecDeque::new(),
                }))
            }
        }
    }

    /// Does what the readiness of `token` allows. `None` if the connection is gone meanwhile.
    pub fn ready(&mut self, token: Token) -> Option<Report> {
        let link = self.links.values_mut().find(|link| link.token == token)?;
        let mut replies = Vec::new();
        let ended = link.service(&mut replies).err();
        let pid = link.pid;
        if ended.is_some() {
            self.drop_link(pid);
        }
        Some(Report { pid, replies, ended })
    }

    /// Ends the connections to all tapdisks but those that `needed` names.
    pub fn retain(&mut self, needed: impl Fn(i32) -> bool) {
        let unneeded: Vec<i32> = self.links.keys().copied().filter(|pid| !needed(*pid)).collect();
        unneeded.into_iter().for_each(|pid| self.drop_link(pid));
    }

    fn drop_link(&mut self, pid: i32) {
        if let Some(mut link) = self.links.remove(&pid) {
            // Closing the descriptor would end its registration as well; a failure here changes nothing.
            let _ = self.registry.deregister(&mut link.stream);
        }
    }
}

impl Link {
    fn service(&mut self, replies: &mut Vec<(Ticket, Reply)>) -> Result<(), LinkError> {
        let pid = self.pid;
        // What a tapdisk said before it ended still counts, so reading comes first.
        self.receive(replies)?;
        self.flush().map_err(|source| LinkError::Io { pid, source })
    }

    fn receive(&mut self, replies: &mut Vec<(Ticket, Reply)>) -> Result<(), LinkError> {
        let pid = self.pid;
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(LinkError::Ended { pid }),
                Ok(count) => self.decoder.feed(bytes.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(LinkError::Ended { pid });
                }
                Err(source) => return Err(LinkError::Io { pid, source }),
            }
            while let Some(reply) = self.decoder.next().map_err(|source| LinkError::Frame { pid, source })? {
                let ticket = self.waiting.pop_front().ok_or(LinkError::Unasked { pid })?;
                replies.push((ticket, reply));
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
