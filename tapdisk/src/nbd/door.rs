//! Where clients come in: the socket, and the handshakes, each on a thread of its own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mio::net::UnixListener;
use mio::{Interest, Registry, Token};
use nbd::server::{Offer, Welcome};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tap_ctl::proto::DiskInfo;

use super::{Client, offer};
use crate::porter;
use crate::socket::{no_deadlines, receive_until, send_until};

/// How long a handshake may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Handshakes of a disk at the same time; who comes then is sent away.
const MAX_HANDSHAKES: usize = 8;

/// The socket of a disk; it is removed when this is dropped.
#[derive(Debug)]
pub struct Door {
    /// Its events.
    pub token: Token,
    listener: UnixListener,
    path: PathBuf,
    /// An older name of the socket, by which clients know it.
    alias: Option<PathBuf>,
    handshakes: Arc<AtomicUsize>,
}

/// One of the handshakes, until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Door {
    /// Listens at `path`, where a dead process may have left a socket.
    pub fn open(path: PathBuf, token: Token, registry: &Registry) -> io::Result<Door> {
        let mut listener = UnixListener::from_std(porter::listen(&path)?);
        registry.register(&mut listener, token, Interest::READABLE)?;
        Ok(Door { token, listener, path, alias: None, handshakes: Arc::default() })
    }

    /// Lets clients in by another name too, in the same folder, where a dead process may have left a socket.
    pub fn also_at(&mut self, alias: PathBuf) -> io::Result<()> {
        porter::alias(&self.path, &alias)?;
        self.alias = Some(alias);
        Ok(())
    }

    /// Begins the handshakes of those who wait outside; `deliver` gets each client that comes to an agreement.
    pub fn welcome(&self, info: &DiskInfo, deliver: impl Fn(Client) + Send + Clone + 'static) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::warn!("{}: accepting an NBD connection failed: {error}", self.path.display());
                    return;
                }
            };
            let place = Place(self.handshakes.clone());
            if self.handshakes.fetch_add(1, Ordering::Relaxed) >= MAX_HANDSHAKES {
                log::warn!("{}: too many NBD handshakes at a time", self.path.display());
                continue;
            }
            let (offer, deliver, path) = (offer(info), deliver.clone(), self.path.clone());
            let thread = std::thread::Builder::new().name("nbd-welcome".into()).spawn(move || {
                match welcome(stream.into(), offer) {
                    Ok(client) => deliver(client),
                    Err(why) => log::debug!("{}: no NBD client: {why}", path.display()),
                }
                drop(place);
            });
            if let Err(error) = thread {
                log::warn!("{}: no thread for an NBD handshake: {error}", self.path.display());
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        for path in self.alias.iter().chain([&self.path]) {
            if let Err(error) = porter::remove(path) {
                log::warn!("cannot remove {}: {error}", path.display());
            }
        }
    }
}

/// A whole handshake.
fn welcome(socket: OwnedFd, offer: Offer) -> Result<Client, String> {
    let failed = |errno: nix::errno::Errno| errno.desc().to_owned();
    let deadline = Instant::now() + PATIENCE;
    fcntl(&socket, FcntlArg::F_SETFL(OFlag::empty())).map_err(failed)?;
    let mut welcome = Welcome::new(offer);
    loop {
        send_until(socket.as_fd(), &welcome.output(), deadline).map_err(failed)?;
        let mut bytes = vec![0; welcome.wants()];
        let count = receive_until(socket.as_fd(), &mut bytes, deadline).map_err(failed)?;
        let agreed = welcome.input(bytes.get(..count).unwrap_or_default());
        if !matches!(agreed, Ok(None)) {
            send_until(socket.as_fd(), &welcome.output(), deadline).map_err(failed)?;
        }
        if let Some(agreed) = agreed.map_err(|goodbye| goodbye.to_string())? {
            no_deadlines(socket.as_fd()).map_err(failed)?;
            return Ok(Client { socket, offer, agreed });
        }
    }
}
