//! Clients of the control socket on their way to the tapdisk.
//!
//! The porter lets them in and hands the tapdisk one end of a pair of sockets for each. What a client asks passes through [`Relay`], which
//! shows it to whoever keeps account of what was asked, before the tapdisk gets it. What the tapdisk answers passes through as it is.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tap_ctl::Request;
use tap_ctl::frame::Decoder;

use super::judge::Judge;
use super::parcel;
use crate::server::MAX_UNREAD;

/// Clients at the same time; more wait in the socket's backlog.
const MOST: usize = 64;
/// When who could not be let in is tried again.
const AGAIN: Duration = Duration::from_secs(1);
/// Stack of a thread in bytes: a relay has its buffers elsewhere; what a request names may take a chain to be read.
const STACK: usize = 512 * 1024;

/// How many clients there are.
#[derive(Debug, Default)]
pub struct Places {
    taken: Mutex<usize>,
    changed: Condvar,
}

/// One of them.
#[derive(Debug)]
struct Place(Arc<Places>);

impl Places {
    /// Waits until there is a place.
    fn take(self: &Arc<Places>) -> Place {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut usize| *taken >= MOST;
        let mut taken = self.changed.wait_while(taken, full).unwrap_or_else(PoisonError::into_inner);
        *taken += 1;
        Place(self.clone())
    }

    /// Waits until nobody is there any more, at most this long.
    pub fn wait_empty(&self, at_most: Duration) {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // What is left then is left.
        let _ = self.changed.wait_timeout_while(taken, at_most, |taken| *taken > 0);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.changed.notify_all();
    }
}

/// Lets clients in, as long as the listener is not shut down and the tapdisk is there. A host short of descriptors, memory or threads makes
/// them wait longer, and nothing else.
pub fn admit(listener: &UnixListener, visitors: BorrowedFd<'_>, judge: &Arc<Judge>, places: &Arc<Places>) {
    loop {
        match admit_one(listener, visitors, judge, places) {
            Ok(()) => {}
            // Shut down; or nobody is at the other end of `visitors`.
            Err(Errno::EINVAL | Errno::EPIPE | Errno::ECONNRESET) => return,
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(errno) => {
                log::warn!("letting a control connection in failed: {}; trying again", errno.desc());
                std::thread::sleep(AGAIN);
            }
        }
    }
}

/// Everything that can be short is had before a client is taken off the backlog, its thread excepted.
fn admit_one(
    listener: &UnixListener,
    visitors: BorrowedFd<'_>,
    judge: &Arc<Judge>,
    places: &Arc<Places>,
) -> Result<(), Errno> {
    let place = places.take();
    // The listener does not block, because the tapdisk has it too; and what does not block does not say by accept(2) that it is shut down.
    let mut door = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    poll(&mut door, PollTimeout::NONE)?;
    if door.iter().filter_map(PollFd::revents).any(|events| events.contains(PollFlags::POLLHUP)) {
        return Err(Errno::EINVAL);
    }
    let (ours, theirs) = UnixStream::pair().map_err(|error| crate::io::errno_of(&error))?;
    let (client, _) = listener.accept().map_err(|error| crate::io::errno_of(&error))?;
    let relay = {
        let judge = judge.clone();
        Relay::new(client, ours, move |request: &Request| judge.learn(request))
            .map_err(|error| crate::io::errno_of(&error))?
    };
    parcel::send(visitors, b"visitor", &[theirs.as_fd()])
        .map_err(|errno| Errno::from_raw(errno.raw_os_error()))?;
    let run = move || {
        if let Err(error) = relay.run() {
            log::debug!("a control connection has ended: {error}");
        }
        drop(place);
    };
    let thread = std::thread::Builder::new().name("visitor".into()).stack_size(STACK).spawn(run);
    thread.map(drop).map_err(|error| crate::io::errno_of(&error))
}

/// What is done with the bytes of a client.
enum Turn<W> {
    /// It may ask.
    Asks,
    /// Its request is being carried out: the next one waits until the answer has passed, and so long the window is kept.
    Waits(W),
    /// What passes is not looked at: it follows, or does not keep to the protocol, which the tapdisk will tell it.
    Passes,
}

/// A client and the tapdisk. `learn` hears each request before the tapdisk gets it; what it returns is kept until the answer has passed.
struct Relay<L, W> {
    client: UnixStream,
    tapdisk: UnixStream,
    learn: L,
    turn: Turn<W>,
    asked: Decoder,
    to_tapdisk: Vec<u8>,
    to_client: Vec<u8>,
    /// It sends nothing any more, but still gets its answer.
    client_ended: bool,
    tapdisk_ended: bool,
}

impl<W, L: FnMut(&Request) -> W> Relay<L, W> {
    fn new(client: UnixStream, tapdisk: UnixStream, learn: L) -> io::Result<Relay<L, W>> {
        client.set_nonblocking(true)?;
        tapdisk.set_nonblocking(true)?;
        Ok(Relay {
            client,
            tapdisk,
            learn,
            turn: Turn::Asks,
            asked: Decoder::default(),
            to_tapdisk: Vec::new(),
            to_client: Vec::new(),
            client_ended: false,
            tapdisk_ended: false,
        })
    }

    /// Passes on until one of both has ended and the other has what was meant for it.
    fn run(mut self) -> io::Result<()> {
        loop {
            self.take_turn();
            self.push()?;
            if self.is_done() {
                return Ok(());
            }
            self.wait()?;
        }
    }

    /// Takes the next request, if it is its turn.
    fn take_turn(&mut self) {
        if !matches!(self.turn, Turn::Asks) {
            return;
        }
        match self.asked.next_line() {
            Ok(None) => {}
            Ok(Some(line)) => {
                self.turn = match serde_json::from_slice::<Request>(&line) {
                    Ok(Request::Follow) | Err(_) => Turn::Passes,
                    Ok(request) => Turn::Waits((self.learn)(&request)),
                };
                self.to_tapdisk = line;
            }
            Err(_) => self.turn = Turn::Passes,
        }
        if matches!(self.turn, Turn::Passes) {
            self.to_tapdisk.append(&mut self.asked.take());
        }
    }

    fn is_done(&self) -> bool {
        let answered = self.client_ended && matches!(self.turn, Turn::Asks);
        (self.tapdisk_ended || answered) && self.to_client.is_empty()
    }

    /// Waits until something can be done, and reads what there is.
    fn wait(&mut self) -> io::Result<()> {
        let waits = matches!(self.turn, Turn::Waits(_));
        let passes = matches!(self.turn, Turn::Passes);
        let hear_client = !self.client_ended && self.to_tapdisk.is_empty() && !waits;
        // Who follows and does not read shall not cost the tapdisk anything: what is too much for it is seen in `hear_tapdisk`.
        let hear_tapdisk = !self.tapdisk_ended && (self.to_client.is_empty() || passes);
        let both = [
            (self.client.as_fd(), interest(hear_client, !self.to_client.is_empty())),
            (self.tapdisk.as_fd(), interest(hear_tapdisk, !self.to_tapdisk.is_empty())),
        ];
        // Who has hung up is always ready, so of whom nothing is expected is not looked at. That is never both.
        let expected = both.into_iter().filter(|(_, interest)| !interest.is_empty());
        let mut polled: Vec<PollFd<'_>> =
            expected.map(|(end, interest)| PollFd::new(end, interest)).collect();
        match poll(&mut polled, PollTimeout::NONE) {
            Err(Errno::EINTR) => return Ok(()),
            polled => drop(polled?),
        }
        if hear_client {
            self.hear_client()?;
        }
        if hear_tapdisk {
            self.hear_tapdisk()?;
        }
        Ok(())
    }

    fn hear_client(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let Some(count) = or_nothing(self.client.read(&mut bytes))? else { return Ok(()) };
        match (bytes.get(..count).unwrap_or_default(), &self.turn) {
            ([], Turn::Passes) => {
                self.client_ended = true;
                self.tapdisk.shutdown(Shutdown::Write)?;
            }
            ([], _) => self.client_ended = true,
            (bytes, Turn::Passes) => self.to_tapdisk.extend_from_slice(bytes),
            (bytes, _) => self.asked.feed(bytes),
        }
        Ok(())
    }

    fn hear_tapdisk(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let Some(count) = or_nothing(self.tapdisk.read(&mut bytes))? else { return Ok(()) };
        let bytes = bytes.get(..count).unwrap_or_default();
        self.tapdisk_ended = bytes.is_empty();
        self.to_client.extend_from_slice(bytes);
        if self.to_client.len() > MAX_UNREAD {
            return Err(io::Error::other("it does not read what it is told"));
        }
        if bytes.contains(&b'\n') && matches!(self.turn, Turn::Waits(_)) {
            self.turn = Turn::Asks;
        }
        Ok(())
    }

    /// Passes on what can be passed on now.
    fn push(&mut self) -> io::Result<()> {
        if push(&mut self.tapdisk, &mut self.to_tapdisk).is_err() {
            // It hears nothing any more, but may have said why.
            self.to_tapdisk.clear();
            self.client_ended = true;
        }
        push(&mut self.client, &mut self.to_client)
    }
}

fn interest(read: bool, write: bool) -> PollFlags {
    let (read, write) = (read.then_some(PollFlags::POLLIN), write.then_some(PollFlags::POLLOUT));
    read.into_iter().chain(write).collect()
}

/// Writes what can be written now.
fn push(to: &mut UnixStream, bytes: &mut Vec<u8>) -> io::Result<()> {
    while !bytes.is_empty() {
        match or_nothing(to.write(bytes))? {
            Some(0) => return Err(io::ErrorKind::WriteZero.into()),
            Some(count) => drop(bytes.drain(..count)),
            None => return Ok(()),
        }
    }
    Ok(())
}

/// `None` if nothing could be done now. A connection that was cut is one that has ended.
fn or_nothing(done: io::Result<usize>) -> io::Result<Option<usize>> {
    match done {
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
            io::ErrorKind::ConnectionReset => Ok(Some(0)),
            _ => Err(error),
        },
        Ok(count) => Ok(Some(count)),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use rustix::net::RecvFlags;
    use tap_ctl::frame::{MAX_LINE, encode};
    use tap_ctl::{ControlDir, Minor};

    use super::*;

    /// What the one who keeps account sees.
    #[derive(Debug, PartialEq)]
    enum Seen {
        Asked(Request),
        Closed,
    }

    struct Window(Sender<Seen>);

    impl Drop for Window {
        fn drop(&mut self) {
            let _ = self.0.send(Seen::Closed);
        }
    }

    /// A relay between two ends; and what is seen.
    fn relayed() -> (UnixStream, UnixStream, Receiver<Seen>) {
        let (client, theirs) = UnixStream::pair().unwrap();
        let (tapdisk, ours) = UnixStream::pair().unwrap();
        let (see, seen) = channel();
        std::thread::spawn(move || {
            let relay = Relay::new(theirs, ours, |request: &Request| {
                see.send(Seen::Asked(request.clone())).unwrap();
                Window(see.clone())
            });
            relay.unwrap().run()
        });
        (client, tapdisk, seen)
    }

    fn read_line(from: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        line
    }

    fn ask(to: &mut UnixStream, request: &Request) {
        to.write_all(&encode(request).unwrap()).unwrap();
    }

    fn line(request: &Request) -> String {
        String::from_utf8(encode(request).unwrap()).unwrap()
    }

    #[test]
    fn a_request_is_seen_before_the_tapdisk_has_it_and_the_window_is_open_until_the_answer_has_passed() {
        let (mut client, tapdisk, seen) = relayed();
        let request = Request::Attach { minor: Minor(3) };
        ask(&mut client, &request);
        let mut tapdisk = BufReader::new(tapdisk);
        assert_eq!(read_line(&mut tapdisk), line(&request));
        assert_eq!(seen.try_recv().unwrap(), Seen::Asked(request));
        tapdisk.get_mut().write_all(b"half an ").unwrap();
        let mut half = [0; 8];
        client.read_exact(&mut half).unwrap();
        assert!(seen.try_recv().is_err(), "the answer is not whole");
        tapdisk.get_mut().write_all(b"answer\n").unwrap();
        assert_eq!(seen.recv().unwrap(), Seen::Closed);
        assert_eq!(read_line(&mut BufReader::new(client)), "answer\n");
    }

    #[test]
    fn requests_pass_one_after_the_other_and_those_of_a_client_that_has_ended_are_answered() {
        let (mut client, tapdisk, seen) = relayed();
        ask(&mut client, &Request::Pid);
        ask(&mut client, &Request::List);
        client.shutdown(Shutdown::Write).unwrap();
        let mut tapdisk = BufReader::new(tapdisk);
        assert_eq!(read_line(&mut tapdisk), line(&Request::Pid));
        assert_eq!(seen.recv().unwrap(), Seen::Asked(Request::Pid));
        tapdisk.get_ref().set_nonblocking(true).unwrap();
        assert!(seen.try_recv().is_err());
        assert_eq!(tapdisk.fill_buf().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        tapdisk.get_ref().set_nonblocking(false).unwrap();
        tapdisk.get_mut().write_all(b"1\n").unwrap();
        assert_eq!(read_line(&mut tapdisk), line(&Request::List));
        assert_eq!(seen.recv().unwrap(), Seen::Closed);
        assert_eq!(seen.recv().unwrap(), Seen::Asked(Request::List));
        tapdisk.get_mut().write_all(b"2\n").unwrap();
        let mut answers = String::new();
        client.read_to_string(&mut answers).unwrap();
        assert_eq!(answers, "1\n2\n");
        assert_eq!(read_line(&mut tapdisk), "", "the tapdisk sees the end");
    }

    #[test]
    fn a_follower_hears_everything_until_one_of_both_ends() {
        let (mut client, mut tapdisk, seen) = relayed();
        ask(&mut client, &Request::Follow);
        let mut asked = BufReader::new(tapdisk.try_clone().unwrap());
        assert_eq!(read_line(&mut asked), line(&Request::Follow));
        let mut told = BufReader::new(client.try_clone().unwrap());
        for news in ["one\n", "two\n", "three\n"] {
            tapdisk.write_all(news.as_bytes()).unwrap();
            assert_eq!(read_line(&mut told), news);
        }
        assert!(seen.try_recv().is_err(), "to follow opens nothing");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_line(&mut asked), "");
        drop((tapdisk, asked));
        assert_eq!(read_line(&mut told), "");
    }

    #[test]
    fn a_follower_that_does_not_read_is_given_up_and_the_tapdisk_never_waits_for_it() {
        let (mut client, mut tapdisk, _seen) = relayed();
        ask(&mut client, &Request::Follow);
        let written = (0..1_000_000).find(|_| tapdisk.write_all(&[b'x'; 1023]).is_err());
        assert!(written.is_some());
    }

    #[test]
    fn what_is_no_request_is_not_learnt_from_and_the_tapdisk_says_what_it_thinks() {
        for garbage in [b"{\"request\":\"reboot\"}\n".to_vec(), vec![b'x'; MAX_LINE + 5]] {
            let (mut client, mut tapdisk, seen) = relayed();
            client.write_all(&garbage).unwrap();
            let mut got = vec![0; garbage.len()];
            tapdisk.read_exact(&mut got).unwrap();
            assert_eq!(got, garbage);
            tapdisk.write_all(b"no\n").unwrap();
            drop(tapdisk);
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "no\n");
            assert_eq!(seen.recv().ok(), None);
        }
    }

    #[test]
    fn an_answer_of_a_tapdisk_that_hears_nothing_any_more_arrives() {
        let (mut client, mut tapdisk, _seen) = relayed();
        tapdisk.shutdown(Shutdown::Read).unwrap();
        tapdisk.write_all(b"no\n").unwrap();
        ask(&mut client, &Request::Pid);
        drop(tapdisk);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "no\n");
    }

    #[test]
    fn clients_are_let_in_while_there_are_places_until_nobody_listens() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ctl");
        let listener = Arc::new(UnixListener::bind(&path).unwrap());
        listener.set_nonblocking(true).unwrap();
        let (visitors, theirs) = parcel::pair().unwrap();
        let judge = Arc::new(Judge::new(ControlDir::at(dir.path()), 1));
        let places = Arc::new(Places::default());
        let porter = {
            let (listener, places) = (listener.clone(), places.clone());
            std::thread::spawn(move || admit(&listener, theirs.as_fd(), &judge, &places))
        };
        let visitor = |flags| {
            let parcel = parcel::receive(visitors.as_fd(), flags)?.unwrap();
            Ok::<_, rustix::io::Errno>(UnixStream::from(parcel.descriptors.into_iter().next().unwrap()))
        };
        let mut clients: Vec<UnixStream> = (0..=MOST).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut tapdisk: Vec<UnixStream> = (0..MOST).map(|_| visitor(RecvFlags::empty()).unwrap()).collect();
        assert_eq!(visitor(RecvFlags::DONTWAIT).unwrap_err(), rustix::io::Errno::AGAIN);
        ask(&mut clients[0], &Request::Pid);
        assert_eq!(read_line(&mut BufReader::new(tapdisk[0].try_clone().unwrap())), line(&Request::Pid));
        tapdisk.remove(0);
        tapdisk.push(visitor(RecvFlags::empty()).unwrap());
        drop((clients, tapdisk));
        rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both).unwrap();
        porter.join().unwrap();
        places.wait_empty(Duration::from_secs(60));
        assert_eq!(*places.taken.lock().unwrap(), 0);
        assert!(UnixStream::connect(&path).is_err());
    }

    #[test]
    fn nobody_is_let_in_where_no_tapdisk_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ctl");
        let listener = UnixListener::bind(&path).unwrap();
        let (visitors, theirs) = parcel::pair().unwrap();
        drop(visitors);
        let mut client = UnixStream::connect(&path).unwrap();
        admit(
            &listener,
            theirs.as_fd(),
            &Arc::new(Judge::new(ControlDir::at(dir.path()), 1)),
            &Arc::default(),
        );
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }
}
