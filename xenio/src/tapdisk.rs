//! Control connections to tapdisks: two each, kept open, never waited for.
//!
//! A request is written and forgotten; its reply comes as an event with the request's ticket. The end of that connection
//! is the end of the tapdisk. On the other one the tapdisk tells what becomes of its disks. So a tapdisk that hangs holds
//! up nothing but its own disks.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use mio::net::UnixStream;
use mio::{Interest, Registry, Token};
use nix::errno::Errno;
use tap_ctl::frame::{Decoder, FrameError, encode};
use tap_ctl::proto::DiskInfo;
use tap_ctl::{ControlDir, Minor, Reply, Request};

use crate::limit::Bucket;

/// How often a tapdisk may end the connection it tells news on and be followed again: the time between two, and how many
/// at once. It does so when it was not listened to for long.
const FOLLOW_AGAIN: (Duration, u32) = (Duration::from_secs(10), 5);

/// Names a request until its reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

/// Tokens of connections begin here; smaller ones are the caller's.
pub const FIRST_TOKEN: usize = 16;

/// Most news taken at once: a tapdisk has no more disks.
const MOST_NEWS: usize = Minor::MAX.0 as usize + 1;

/// How a disk is, told unasked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Its minor.
    pub minor: Minor,
    /// The disk as it is now.
    pub info: DiskInfo,
    /// Why it serves no more writes, if so.
    pub failed: Option<String>,
    /// Why it is not as it was asked for, if so.
    pub degraded: Option<String>,
}

/// What came of a connection's readiness.
#[derive(Debug)]
pub struct Report {
    /// The tapdisk's process id.
    pub pid: i32,
    /// Replies, oldest first.
    pub replies: Vec<(Ticket, Reply)>,
    /// News, oldest first.
    pub news: Vec<News>,
    /// Why the connection is over, if it is, and with it the tapdisk. Requests without reply will not get one.
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

impl LinkError {
    /// Whether it says that there is no such tapdisk any more.
    pub fn is_death(&self) -> bool {
        match self {
            LinkError::Ended { .. } => true,
            LinkError::Unreachable { source, .. } => {
                matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused)
            }
            LinkError::Io { .. } | LinkError::Frame { .. } | LinkError::Unasked { .. } => false,
        }
    }

    /// Whether this host had no descriptors or memory left, or too many wait to be let in by the tapdisk: it may be as well as
    /// ever.
    pub fn is_scarcity(&self) -> bool {
        let LinkError::Unreachable { source, .. } = self else { return false };
        let scarce =
            [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS, Errno::ENOSPC, Errno::EAGAIN];
        source.raw_os_error().is_some_and(|code| scarce.contains(&Errno::from_raw(code)))
    }
}

/// All connections.
#[derive(Debug)]
pub struct Links {
    registry: Registry,
    dir: ControlDir,
    links: HashMap<i32, Pair>,
    next_ticket: u64,
    next_token: usize,
}

/// The connections to one tapdisk.
#[derive(Debug)]
struct Pair {
    ask: Link,
    /// `None`: the tapdisk tells nothing.
    follow: Option<Link>,
    follow_again: Bucket,
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
        if !self.links.contains_key(&pid) {
            // Both or none: a tapdisk without the second would be served for ever without its news.
            let (ask, follow) = (self.open(pid)?, self.open(pid)?);
            let (interval, burst) = FOLLOW_AGAIN;
            let follow_again = Bucket::new(interval, burst, Instant::now());
            self.links.insert(pid, Pair { ask, follow: None, follow_again });
            self.follow(pid, Ok(follow));
        }
        self.links.get_mut(&pid).map(|pair| &mut pair.ask).ok_or_else(|| ErrorKind::NotConnected.into())
    }

    fn open(&mut self, pid: i32) -> io::Result<Link> {
        let token = Token(self.next_token);
        self.next_token = self.next_token.wrapping_add(1).max(FIRST_TOKEN);
        let mut stream = UnixStream::connect(self.dir.control_socket(pid))?;
        self.registry.register(&mut stream, token, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Link {
            pid,
            token,
            stream,
            decoder: Decoder::default(),
            unsent: Vec::new(),
            waiting: VecDeque::new(),
        })
    }

    /// Asks the tapdisk `pid` for its news on a new connection. Without them its disks are served all the same.
    fn follow(&mut self, pid: i32, opened: io::Result<Link>) {
        let asked = opened.map_err(|error| error.to_string()).and_then(|mut link| {
            link.unsent = encode(&Request::Follow).map_err(|error| error.to_string())?;
            // An error here is seen again by the read.
            let _ = link.flush();
            Ok(link)
        });
        let Some(pair) = self.links.get_mut(&pid) else { return };
        match asked {
            Ok(link) => pair.follow = Some(link),
            // It is ending, which the other connection will tell.
            Err(error) => log::info!("cannot follow tapdisk {pid}: {error}"),
        }
    }

    /// Does what the readiness of `token` allows. `None` if the connection is gone meanwhile.
    pub fn ready(&mut self, token: Token) -> Option<Report> {
        let follows = |pair: &Pair| pair.follow.as_ref().is_some_and(|link| link.token == token);
        let (&pid, pair) =
            self.links.iter_mut().find(|(_, pair)| pair.ask.token == token || follows(pair))?;
        if pair.ask.token != token {
            return Some(Report { pid, replies: Vec::new(), news: self.news(pid), ended: None });
        }
        let mut replies = Vec::new();
        let ended = pair.ask.answers(&mut replies).err();
        if ended.is_some() {
            self.drop_links(pid);
        }
        Some(Report { pid, replies, news: Vec::new(), ended })
    }

    /// What the tapdisk `pid` tells unasked.
    fn news(&mut self, pid: i32) -> Vec<News> {
        let mut news = Vec::new();
        let Some(pair) = self.links.get_mut(&pid) else { return news };
        let Some(link) = &mut pair.follow else { return news };
        match link.news(&mut news) {
            Ok(()) => return news,
            Err(Unfollowed::Ended(reason)) => log::debug!("no more news: {reason}"),
            Err(Unfollowed::Refused(message)) => {
                log::warn!("tapdisk {pid} tells no news of its disks: {message}");
                self.drop_follow(pid);
                return news;
            }
        }
        let again = pair.follow_again.take(Instant::now()).is_ok();
        self.drop_follow(pid);
        if again {
            let opened = self.open(pid);
            self.follow(pid, opened);
        } else {
            log::warn!("tapdisk {pid} has ended too many connections for news: not following it any more");
        }
        news
    }

    /// Ends the connections to all tapdisks but those that `needed` names.
    pub fn retain(&mut self, needed: impl Fn(i32) -> bool) {
        let unneeded: Vec<i32> = self.links.keys().copied().filter(|pid| !needed(*pid)).collect();
        unneeded.into_iter().for_each(|pid| self.drop_links(pid));
    }

    fn drop_links(&mut self, pid: i32) {
        self.drop_follow(pid);
        if let Some(mut pair) = self.links.remove(&pid) {
            // Closing the descriptor would end its registration as well; a failure here changes nothing.
            let _ = self.registry.deregister(&mut pair.ask.stream);
        }
    }

    fn drop_follow(&mut self, pid: i32) {
        if let Some(mut link) = self.links.get_mut(&pid).and_then(|pair| pair.follow.take()) {
            let _ = self.registry.deregister(&mut link.stream);
        }
    }
}

/// Why there are no news any more.
enum Unfollowed {
    /// The connection is over.
    Ended(LinkError),
    /// The tapdisk does not tell news: it is of an earlier release.
    Refused(String),
}

impl From<LinkError> for Unfollowed {
    fn from(error: LinkError) -> Unfollowed {
        Unfollowed::Ended(error)
    }
}

impl Link {
    fn answers(&mut self, replies: &mut Vec<(Ticket, Reply)>) -> Result<(), LinkError> {
        let pid = self.pid;
        // What a tapdisk said before it ended still counts, so reading comes first.
        self.receive(|waiting, reply| {
            let ticket = waiting.pop_front().ok_or(LinkError::Unasked { pid })?;
            replies.push((ticket, reply));
            Ok(())
        })?;
        self.flush().map_err(|source| LinkError::Io { pid, source })
    }

    fn news(&mut self, news: &mut Vec<News>) -> Result<(), Unfollowed> {
        let pid = self.pid;
        self.receive(|_, reply| match reply {
            Reply::Changed { minor, info, failed, degraded } if news.len() < MOST_NEWS => {
                news.push(News { minor, info, failed, degraded });
                Ok(())
            }
            Reply::Error { message, .. } => Err(Unfollowed::Refused(message)),
            _ => Err(Unfollowed::Ended(LinkError::Unasked { pid })),
        })?;
        self.flush().map_err(|source| Unfollowed::Ended(LinkError::Io { pid, source }))
    }

    /// Hands over every message there is.
    fn receive<E: From<LinkError>>(
        &mut self,
        mut take: impl FnMut(&mut VecDeque<Ticket>, Reply) -> Result<(), E>,
    ) -> Result<(), E> {
        let pid = self.pid;
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(LinkError::Ended { pid }.into()),
                Ok(count) => self.decoder.feed(bytes.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Err(LinkError::Ended { pid }.into());
                }
                Err(source) => return Err(LinkError::Io { pid, source }.into()),
            }
            while let Some(reply) = self.decoder.next().map_err(|source| LinkError::Frame { pid, source })? {
                take(&mut self.waiting, reply)?;
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
