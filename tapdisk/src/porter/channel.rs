//! The way between a tapdisk and its porter.
//!
//! An errand is one datagram: the errand in JSON, with the socket for its reply and, if it is about an open file, that file's descriptor. The
//! reply is one datagram too, on that socket, with the descriptor that was asked for. Each errand has a socket of its own, so who waits for
//! a store that hangs keeps nobody waiting, and the end of the porter is the end of every wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::io::Errno as Failed;
use rustix::net::RecvFlags;

use super::{Answer, Errand, Failure, Outcome, parcel};

/// What to know and to do when there is no porter any more.
pub const GONE: &str = "the process that opens files for this disk has ended; the disk goes on with what is open, and `tap-ctl upgrade` \
                    gives it a new one";

/// The tapdisk's end.
#[derive(Debug)]
pub struct Channel {
    errands: OwnedFd,
}

impl Channel {
    /// Over a socket of [`parcel::pair`], at whose other end there is a [`Desk`].
    pub fn new(errands: OwnedFd) -> Channel {
        Channel { errands }
    }

    /// Has an errand done, with a descriptor or without. Blocking; any thread may call it.
    pub fn ask(&self, errand: &Errand, with: Option<BorrowedFd<'_>>) -> Outcome {
        let bytes = serde_json::to_vec(errand).map_err(io::Error::from)?;
        let (ours, theirs) = parcel::pair().map_err(failed)?;
        let reply = theirs.as_fd();
        match with {
            Some(file) => parcel::send(self.errands.as_fd(), &bytes, &[reply, file]),
            None => parcel::send(self.errands.as_fd(), &bytes, &[reply]),
        }
        .map_err(failed)?;
        // The porter's copy is the last one: when it is closed without a reply, there is none to wait for.
        drop(theirs);
        let mut reply =
            parcel::receive(ours.as_fd(), RecvFlags::empty()).map_err(failed)?.ok_or_else(gone)?;
        if reply.short {
            return Err(Errno::EMFILE.into());
        }
        let answer: Result<Answer, Failure> =
            serde_json::from_slice(&reply.bytes).map_err(io::Error::from)?;
        Ok((answer?, reply.descriptors.pop()))
    }
}

fn gone() -> Failure {
    Failure { errno: libc::EPIPE, words: GONE.to_owned(), telling: true }
}

/// What a failed system call on the way means.
fn failed(errno: Failed) -> Failure {
    match errno {
        Failed::PIPE | Failed::CONNRESET => gone(),
        errno => io::Error::from(errno).into(),
    }
}

/// The porter's end.
#[derive(Debug)]
pub struct Desk {
    errands: OwnedFd,
    asker: i32,
}

/// An errand that came, to be answered.
#[derive(Debug)]
pub struct Asked {
    /// The errand.
    pub errand: Errand,
    /// The open file that it is about.
    pub with: Option<OwnedFd>,
    reply: OwnedFd,
}

impl Desk {
    /// Over a socket of [`parcel::pair`], for the process `asker`.
    pub fn new(errands: OwnedFd, asker: i32) -> Desk {
        Desk { errands, asker }
    }

    /// Waits for the next errand; `None`: who asks has ended. What is no errand is answered EPROTO.
    ///
    /// # Errors
    /// The socket is of no further use.
    pub fn receive(&self) -> io::Result<Option<Asked>> {
        loop {
            let parcel = match parcel::receive(self.errands.as_fd(), RecvFlags::empty()) {
                Ok(Some(parcel)) => parcel,
                Ok(None) | Err(Failed::CONNRESET) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            };
            let mut descriptors = parcel.descriptors.into_iter();
            let Some(reply) = descriptors.next().filter(|reply| self.is_theirs(reply.as_fd())) else {
                log::warn!("an errand without a socket for its reply is not done");
                continue;
            };
            match serde_json::from_slice(&parcel.bytes) {
                Ok(errand) if !parcel.short => {
                    return Ok(Some(Asked { errand, with: descriptors.next(), reply }));
                }
                Ok(_) => answer(reply.as_fd(), Err(Errno::EMFILE.into())),
                Err(why) => {
                    log::warn!("what is no errand is not done: {why}");
                    answer(reply.as_fd(), Err(Errno::EPROTO.into()));
                }
            }
        }
    }

    /// Whether a socket for replies was made by who asks: what this process sends carries its user id, and is for nobody else.
    fn is_theirs(&self, reply: BorrowedFd<'_>) -> bool {
        rustix::net::sockopt::socket_peercred(reply)
            .is_ok_and(|maker| maker.pid.as_raw_nonzero().get() == self.asker)
    }
}

impl Asked {
    /// Tells the outcome. Who has asked may be gone.
    pub fn answer(self, outcome: Outcome) {
        answer(self.reply.as_fd(), outcome);
    }
}

fn answer(reply: BorrowedFd<'_>, outcome: Outcome) {
    let (answer, descriptor) = match outcome {
        Ok((answer, descriptor)) => (Ok(answer), descriptor),
        Err(failure) => (Err(failure), None),
    };
    let with: Vec<BorrowedFd<'_>> = descriptor.iter().map(AsFd::as_fd).collect();
    let sent = serde_json::to_vec(&answer)
        .map_err(io::Error::from)
        .and_then(|bytes| parcel::send(reply, &bytes, &with).map_err(io::Error::from));
    if let Err(error) = sent {
        log::debug!("an errand's outcome is not told: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::thread::JoinHandle;

    use super::*;
    use crate::porter::How;

    fn ends() -> (Channel, Desk) {
        let (ours, theirs) = parcel::pair().unwrap();
        (Channel::new(ours), Desk::new(theirs, std::process::id().cast_signed()))
    }

    /// Answers all errands by `act`, each on a thread of its own.
    fn attended(
        desk: Desk,
        act: impl Fn(&Errand, Option<OwnedFd>) -> Outcome + Clone + Send + 'static,
    ) -> JoinHandle<()> {
        std::thread::spawn(move || {
            while let Some(mut asked) = desk.receive().unwrap() {
                let act = act.clone();
                std::thread::spawn(move || {
                    let outcome = act(&asked.errand, asked.with.take());
                    asked.answer(outcome);
                });
            }
        })
    }

    fn resolve(name: &str) -> Errand {
        Errand::Resolve { path: Path::new(name).into() }
    }

    #[test]
    fn an_errand_takes_a_descriptor_there_and_another_one_back() {
        let (channel, desk) = ends();
        let porter = attended(desk, |errand, with| {
            assert_eq!(*errand, Errand::Again { how: How::READ });
            File::from(with.unwrap()).write_all(b"seen").unwrap();
            let mut other = tempfile::tempfile().unwrap();
            other.write_all(b"other").unwrap();
            other.rewind().unwrap();
            Ok((Answer::Done, Some(other.into())))
        });
        let mut file = tempfile::tempfile().unwrap();
        let errand = Errand::Again { how: How::READ };
        let (answer, other) = channel.ask(&errand, Some(file.as_fd())).unwrap();
        assert_eq!(answer, Answer::Done);
        let mut text = String::new();
        File::from(other.unwrap()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "other");
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "otherseen");
        drop(channel);
        porter.join().unwrap();
    }

    #[test]
    fn failures_keep_their_number_and_their_words() {
        let (channel, desk) = ends();
        attended(desk, |_, _| Err(Failure { errno: libc::EACCES, words: "not yours".into(), telling: true }));
        let failure = channel.ask(&resolve("/"), None).unwrap_err();
        assert_eq!((failure.errno, failure.words.as_str()), (libc::EACCES, "not yours"));
    }

    #[test]
    fn many_threads_ask_at_once_and_each_hears_its_own_answer_though_one_errand_hangs() {
        let (channel, desk) = ends();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let ended = std::sync::Arc::new(std::sync::Mutex::new(ended));
        attended(desk, move |errand, _| match errand {
            Errand::Resolve { path } => Ok((Answer::Path(path.clone()), None)),
            _ => {
                let _ = ended.lock().unwrap().recv();
                Ok((Answer::Done, None))
            }
        });
        std::thread::scope(|scope| {
            let hangs = scope.spawn(|| channel.ask(&Errand::Grants, None));
            let askers: Vec<_> = (0..16)
                .map(|asker| {
                    let channel = &channel;
                    scope.spawn(move || {
                        for turn in 0..20 {
                            let name = format!("/{asker}/{turn}");
                            let (answer, _) = channel.ask(&resolve(&name), None).unwrap();
                            assert_eq!(answer, Answer::Path(Path::new(&name).into()));
                        }
                    })
                })
                .collect();
            askers.into_iter().for_each(|asker| asker.join().unwrap());
            drop(end);
            assert_eq!(hangs.join().unwrap().unwrap().0, Answer::Done);
        });
    }

    #[test]
    fn without_a_porter_errands_fail_with_words_that_help() {
        let (channel, desk) = ends();
        drop(desk);
        let failure = channel.ask(&Errand::Grants, None).unwrap_err();
        assert_eq!(failure.errno, libc::EPIPE);
        assert!(failure.words.contains("tap-ctl upgrade"), "{failure}");
        // It ends while it has the errand.
        let (channel, desk) = ends();
        let ending = std::thread::spawn(move || drop(desk.receive().unwrap()));
        assert_eq!(channel.ask(&Errand::Grants, None).unwrap_err().errno, libc::EPIPE);
        ending.join().unwrap();
        // It ends before it takes the errand.
        let (channel, desk) = ends();
        std::thread::scope(|scope| {
            let asks = scope.spawn(|| channel.ask(&Errand::Grants, None));
            rustix::net::recv(&desk.errands, &mut [0_u8; 1][..], RecvFlags::PEEK).unwrap();
            drop(desk);
            assert_eq!(asks.join().unwrap().unwrap_err().errno, libc::EPIPE);
        });
    }

    #[test]
    fn what_is_no_errand_is_refused_and_what_comes_after_it_is_done() {
        let (channel, desk) = ends();
        let errands = channel.errands.as_fd();
        parcel::send(errands, b"no errand, and nowhere to say so", &[]).unwrap();
        let (stranger, _end) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        parcel::send(errands, b"\"grants\"", &[file.as_fd()]).unwrap();
        let (ours, theirs) = parcel::pair().unwrap();
        parcel::send(errands, b"{\"halt\":{}}", &[theirs.as_fd(), stranger.as_fd()]).unwrap();
        parcel::send(errands, b"\"grants\"", &[theirs.as_fd()]).unwrap();
        assert_eq!(desk.receive().unwrap().unwrap().errand, Errand::Grants);
        let refusal = parcel::receive(ours.as_fd(), RecvFlags::empty()).unwrap().unwrap();
        let refusal: Result<Answer, Failure> = serde_json::from_slice(&refusal.bytes).unwrap();
        assert_eq!(refusal.unwrap_err().errno, libc::EPROTO);
    }

    #[test]
    fn replies_go_to_sockets_only_that_the_tapdisk_has_made() {
        let (ours, theirs) = parcel::pair().unwrap();
        let (channel, desk) = (Channel::new(ours), Desk::new(theirs, 1));
        std::thread::scope(|scope| {
            let asks = scope.spawn(|| channel.ask(&Errand::Grants, None));
            let receives = scope.spawn(|| desk.receive());
            assert_eq!(asks.join().unwrap().unwrap_err().errno, libc::EPIPE);
            rustix::net::shutdown(&channel.errands, rustix::net::Shutdown::Both).unwrap();
            assert!(receives.join().unwrap().unwrap().is_none());
        });
    }
}
