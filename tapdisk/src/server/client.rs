//! One control connection.
//!
//! Nothing here waits: what cannot be read or written now is left for the socket's next readiness.

use std::io::{self, Read, Write};

use mio::net::UnixStream;
use tap_ctl::frame::{Decoder, FrameError, encode};
use tap_ctl::{Reply, Request};

/// How much a follower may leave unread, in bytes, beyond what the socket itself holds: several hundred changes.
pub(crate) const MAX_UNREAD: usize = 64 * 1024;

/// What a client is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// It may ask.
    Asks,
    /// Its request is being carried out: the next one waits.
    Waits,
    /// It is told of changes, and asks nothing any more.
    Follows,
}

/// A client of the control server.
pub(super) struct Client {
    /// Its socket.
    pub stream: UnixStream,
    decoder: Decoder,
    out: Vec<u8>,
    role: Role,
    /// It sends nothing any more, but still gets its answer.
    ended: bool,
}

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    /// The socket failed; whoever was there knows.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A follower does not read.
    #[error("it does not read what it is told")]
    Deaf,
    /// A follower asks.
    #[error("it follows and may not ask any more")]
    Talkative,
}

impl Client {
    pub fn new(stream: UnixStream) -> Client {
        Client { stream, decoder: Decoder::default(), out: Vec::new(), role: Role::Asks, ended: false }
    }

    /// Takes in what there is to read.
    pub fn receive(&mut self) -> Result<(), Broken> {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => {
                    self.ended = true;
                    return Ok(());
                }
                Ok(_) if self.follows() => return Err(Broken::Talkative),
                Ok(count) => self.decoder.feed(bytes.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.ended = true;
                    return Ok(());
                }
            }
        }
    }

    /// The next request, if it is its turn. It must be answered, or the client be made a follower.
    pub fn next(&mut self) -> Result<Option<Request>, FrameError> {
        if self.role != Role::Asks {
            return Ok(None);
        }
        let request = self.decoder.next()?;
        if request.is_some() {
            self.role = Role::Waits;
        }
        Ok(request)
    }

    /// Queues the answer to its request.
    pub fn answer(&mut self, reply: &Reply) {
        self.role = Role::Asks;
        self.queue(reply);
    }

    /// From now on it is told of changes. It may have asked more already.
    pub fn follow(&mut self) -> Result<(), Broken> {
        self.role = Role::Follows;
        if self.decoder.is_empty() { Ok(()) } else { Err(Broken::Talkative) }
    }

    /// Whether it is told of changes.
    pub fn follows(&self) -> bool {
        self.role == Role::Follows
    }

    /// Queues a change for a follower.
    pub fn tell(&mut self, news: &Reply) -> Result<(), Broken> {
        self.queue(news);
        self.send()?;
        if self.out.len() > MAX_UNREAD { Err(Broken::Deaf) } else { Ok(()) }
    }

    fn queue(&mut self, reply: &Reply) {
        match encode(reply) {
            Ok(bytes) => self.out.extend_from_slice(&bytes),
            Err(error) => log::error!("a reply does not fit the control protocol: {error}"),
        }
    }

    /// Writes what can be written now.
    pub fn send(&mut self) -> io::Result<()> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether there is nothing left to do for it.
    pub fn is_done(&self) -> bool {
        match self.role {
            Role::Asks => self.ended && self.out.is_empty(),
            Role::Waits => false,
            Role::Follows => self.ended,
        }
    }

    /// Whether the process may end without it: it is owed no answer. A follower sees the end itself.
    pub fn is_content(&self) -> bool {
        self.follows() || self.out.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream as StdStream;
    use tap_ctl::Minor;
    use tap_ctl::proto::DiskInfo;

    fn pair() -> (Client, StdStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let theirs = StdStream::from(std::os::fd::OwnedFd::from(theirs));
        theirs.set_nonblocking(false).unwrap();
        (Client::new(ours), theirs)
    }

    fn ask(peer: &mut StdStream, request: &Request) {
        peer.write_all(&encode(request).unwrap()).unwrap();
    }

    fn news() -> Reply {
        let info = DiskInfo {
            sectors: 8,
            sector_size: 512,
            physical_sector_size: 512,
            readonly: false,
            discard: None,
        };
        Reply::Changed { minor: Minor(3), info, failed: None, degraded: None }
    }

    #[test]
    fn requests_have_their_turn_one_after_the_other() {
        let (mut client, mut peer) = pair();
        ask(&mut peer, &Request::Pid);
        ask(&mut peer, &Request::List);
        client.receive().unwrap();
        assert_eq!(client.next().unwrap(), Some(Request::Pid));
        assert_eq!(client.next().unwrap(), None);
        client.answer(&Reply::Done);
        assert_eq!(client.next().unwrap(), Some(Request::List));
    }

    #[test]
    fn a_client_that_ended_still_gets_its_answer() {
        let (mut client, mut peer) = pair();
        ask(&mut peer, &Request::Pid);
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        client.receive().unwrap();
        assert!(client.next().unwrap().is_some());
        assert!(!client.is_done() && client.is_content());
        client.answer(&Reply::Done);
        assert!(!client.is_done() && !client.is_content());
        client.send().unwrap();
        assert!(client.is_done());
        drop(client);
        let mut text = String::new();
        peer.read_to_string(&mut text).unwrap();
        assert_eq!(text, "{\"reply\":\"done\"}\n");
    }

    #[test]
    fn a_follower_that_does_not_read_is_given_up_before_it_costs_much_and_never_waited_for() {
        let (mut client, _peer) = pair();
        client.follow().unwrap();
        let told = (0..1_000_000).find(|_| matches!(client.tell(&news()), Err(Broken::Deaf)));
        assert!(told.is_some());
        assert!(client.out.len() < MAX_UNREAD + 1024);
        assert!(client.is_content(), "it holds up no end");
    }

    #[test]
    fn a_follower_may_not_ask_and_is_done_when_it_ends() {
        let (mut client, mut peer) = pair();
        client.follow().unwrap();
        client.tell(&news()).unwrap();
        ask(&mut peer, &Request::Pid);
        assert!(matches!(client.receive(), Err(Broken::Talkative)));
        let (mut client, mut peer) = pair();
        ask(&mut peer, &Request::Follow);
        ask(&mut peer, &Request::Pid);
        client.receive().unwrap();
        client.next().unwrap();
        assert!(matches!(client.follow(), Err(Broken::Talkative)));
        let (mut client, peer) = pair();
        client.follow().unwrap();
        drop(peer);
        client.receive().unwrap();
        assert!(client.is_done());
    }
}
