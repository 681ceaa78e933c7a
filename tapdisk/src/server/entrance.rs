//! Where clients of the control server come from: the control socket, or the porter, which lets them in there.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use mio::net::UnixStream;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tap_ctl::ControlDir;

use crate::porter::channel::GONE;
use crate::porter::{self, parcel};

/// The control socket of this process. It is removed in the end.
#[derive(Debug)]
pub struct Entrance {
    path: PathBuf,
    listener: UnixListener,
    /// Where the porter sends clients. Its end is the end of the porter: from then on they are let in here.
    visitors: Option<OwnedFd>,
    /// It has ended.
    orphaned: bool,
}

impl Entrance {
    /// Listens at the control socket that this process has in `dir`, which is made.
    ///
    /// # Errors
    /// Of the system.
    pub fn bind(dir: &ControlDir) -> io::Result<Entrance> {
        let path = dir.control_socket(nix::unistd::getpid().as_raw());
        std::fs::create_dir_all(dir.root())?;
        // In the place of what a dead process has left that had our pid.
        let listener = porter::listen(&path)?;
        Ok(Entrance { path, listener, visitors: None, orphaned: false })
    }

    /// The control socket, which does not block.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// The control socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// From now on clients come from the porter.
    pub fn through(&mut self, visitors: OwnedFd) {
        self.visitors = Some(visitors);
    }

    /// Whether there was a porter, and is none any more.
    pub(super) fn is_orphaned(&self) -> bool {
        self.orphaned
    }

    /// Has the poll say when there may be clients.
    ///
    /// # Errors
    /// Of the system.
    pub(super) fn register(&self, registry: &Registry, token: Token) -> io::Result<()> {
        let source = self.visitors.as_ref().map_or(self.listener.as_raw_fd(), AsRawFd::as_raw_fd);
        registry.register(&mut SourceFd(&source), token, Interest::READABLE)
    }

    /// The next client. After the porter's end, `token` is for the control socket.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none. Any other: it waits, and this process was short of something.
    pub(super) fn next(&mut self, registry: &Registry, token: Token) -> io::Result<UnixStream> {
        while let Some(visitors) = &self.visitors {
            // A look first: where there is no room for the descriptor, the client is not lost but waits.
            match parcel::receive(visitors.as_fd(), RecvFlags::DONTWAIT | RecvFlags::PEEK) {
                Ok(Some(parcel)) => {
                    let Some(client) = parcel.descriptors.into_iter().next().filter(|_| !parcel.short) else {
                        return Err(Errno::MFILE.into());
                    };
                    rustix::net::recv(visitors, &mut [0_u8; 1][..], RecvFlags::DONTWAIT)?;
                    let client = std::os::unix::net::UnixStream::from(client);
                    client.set_nonblocking(true)?;
                    return Ok(UnixStream::from_std(client));
                }
                Ok(None) | Err(Errno::CONNRESET) => {
                    log::error!("{GONE}");
                    self.orphaned = true;
                    registry.deregister(&mut SourceFd(&visitors.as_raw_fd()))?;
                    self.visitors = None;
                    self.register(registry, token)?;
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        let (client, _) = self.listener.accept()?;
        client.set_nonblocking(true)?;
        Ok(UnixStream::from_std(client))
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        if let Err(error) = porter::remove(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use mio::Poll;

    use super::*;

    const TOKEN: Token = Token(7);

    fn entrance() -> (tempfile::TempDir, Entrance, Poll) {
        let dir = tempfile::tempdir().unwrap();
        let entrance = Entrance::bind(&ControlDir::at(dir.path())).unwrap();
        (dir, entrance, Poll::new().unwrap())
    }

    fn says(client: &mut UnixStream, text: &str) {
        let mut got = vec![0; text.len()];
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, text.as_bytes());
    }

    #[test]
    fn clients_come_from_the_porter_and_after_its_end_from_the_control_socket() {
        let (_dir, mut entrance, poll) = entrance();
        let (ours, porters) = parcel::pair().unwrap();
        entrance.through(ours);
        entrance.register(poll.registry(), TOKEN).unwrap();
        let none = entrance.next(poll.registry(), TOKEN).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        for text in ["one", "two"] {
            let (mut peer, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            peer.write_all(text.as_bytes()).unwrap();
            parcel::send(porters.as_fd(), b"visitor", &[theirs.as_fd()]).unwrap();
        }
        for text in ["one", "two"] {
            says(&mut entrance.next(poll.registry(), TOKEN).unwrap(), text);
        }
        assert!(!entrance.is_orphaned());
        drop(porters);
        let none = entrance.next(poll.registry(), TOKEN).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::WouldBlock);
        assert!(entrance.is_orphaned());
        let mut peer = std::os::unix::net::UnixStream::connect(entrance.path()).unwrap();
        peer.write_all(b"three").unwrap();
        says(&mut entrance.next(poll.registry(), TOKEN).unwrap(), "three");
    }
}
