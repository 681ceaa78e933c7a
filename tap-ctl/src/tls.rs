//! A disk's NBD socket on a TCP port, by TLS, for whoever has a certificate.
//!
//! It is a process of its own, `tap-ctl nbd-tls`, between the network and the tapdisk: no byte of a stranger comes to the process
//! that serves a guest, and it goes on when that process is replaced. It does what the NBD project calls FORCEDTLS (`proto.md`,
//! "TLS versions"): nothing is told, not even whether there is a disk, before both sides have shown their certificates. Then the
//! disk's own server goes on with the handshake, and bytes are passed on as they come.
//!
//! Each client gets a thread and ten seconds for the handshake; more than 16 at once are sent away.

mod certificates;
mod pump;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd::flags::HandshakeFlags;
use nbd::server::Guard;
use nbd::wire::{Fixed, Greeting, MAGIC, OPTION_MAGIC};
use nix::sys::socket::{setsockopt, sockopt};
use rustls::{ServerConfig, ServerConnection};

use crate::clients;
use crate::error::Error;

/// Clients at the same time; more are sent away.
const MAX_CLIENTS: usize = 16;
/// For a client to come to the end of the handshake.
const PATIENCE: Duration = Duration::from_secs(10);
/// Seconds of silence after which a client is asked whether it is still there.
const SILENCE: u32 = 60;

/// Where clients come in.
#[derive(Debug)]
pub struct Door {
    listener: TcpListener,
    config: Arc<ServerConfig>,
    socket: PathBuf,
}

impl Door {
    /// Begins to listen at `address`, with the certificates in `folder`, for those who want the disk with this NBD socket.
    ///
    /// # Errors
    /// The certificates cannot be used, there is no such disk, or nobody may listen there.
    pub fn open(address: SocketAddr, folder: &Path, socket: PathBuf) -> Result<Door, Error> {
        let config = certificates::config(folder).map_err(|why| Error::File {
            action: "use the certificates of",
            path: folder.into(),
            source: io::Error::other(why),
        })?;
        let failed = |action, path: &Path| {
            let path = path.into();
            move |source| Error::File { action, path, source }
        };
        UnixStream::connect(&socket).map_err(failed("reach a disk at", &socket))?;
        let place = PathBuf::from(address.to_string());
        let listener = TcpListener::bind(address).map_err(failed("listen at", &place))?;
        Ok(Door { listener, config, socket })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// What the system says.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves clients for ever.
    ///
    /// # Errors
    /// When no more clients can be accepted.
    pub fn serve(&self) -> io::Result<()> {
        let (config, socket) = (self.config.clone(), self.socket.clone());
        clients::serve(
            "nbd-tls",
            MAX_CLIENTS,
            || self.listener.accept(),
            move |(client, from)| {
                log::debug!("{from}: comes in");
                match attend(&client, config.clone(), &socket) {
                    Ok(()) => log::debug!("{from}: has left"),
                    Err(why) => log::debug!("{from}: {why}"),
                }
            },
        )
    }
}

/// A client within the time that it has for the handshake.
struct Within<'a> {
    client: &'a TcpStream,
    end: Instant,
}

impl Within<'_> {
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Within<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.client.set_read_timeout(self.left()?)?;
        self.client.read(bytes)
    }
}

impl Write for Within<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.client.set_write_timeout(self.left()?)?;
        self.client.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn attend(client: &TcpStream, config: Arc<ServerConfig>, socket: &Path) -> io::Result<()> {
    client.set_nodelay(true)?;
    setsockopt(client, sockopt::KeepAlive, &true)?;
    setsockopt(client, sockopt::TcpKeepIdle, &SILENCE)?;
    let mut within = Within { client, end: Instant::now() + PATIENCE };
    let flags = guard(&mut within)?;
    let mut tls = ServerConnection::new(config).map_err(io::Error::other)?;
    while tls.is_handshaking() {
        tls.complete_io(&mut within)?;
    }
    let disk = begin(socket, flags)?;
    pump::pump(tls, client, &disk)
}

/// The handshake in clear text: the client's flags, once it wants TLS. Exactly what is wanted is read, so that nothing that was said
/// in clear text can be taken for what is said within TLS.
fn guard(client: &mut Within<'_>) -> io::Result<HandshakeFlags> {
    let mut guard = Guard::new();
    loop {
        client.write_all(&guard.output())?;
        let mut bytes = vec![0; guard.wants()];
        client.read_exact(&mut bytes)?;
        let heard = guard.input(&bytes);
        if !matches!(heard, Ok(None)) {
            client.write_all(&guard.output())?;
        }
        match heard {
            Ok(None) => {}
            Ok(Some(flags)) => return Ok(flags),
            Err(goodbye) => return Err(io::Error::other(goodbye)),
        }
    }
}

/// A connection to the disk's server, as far in the handshake as the client believes to be.
fn begin(socket: &Path, flags: HandshakeFlags) -> io::Result<UnixStream> {
    let mut disk = UnixStream::connect(socket)?;
    disk.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; Greeting::LEN];
    disk.read_exact(&mut greeting)?;
    let expected = |greeting: &Greeting| {
        (greeting.magic.get(), greeting.option_magic.get()) == (MAGIC, OPTION_MAGIC)
            && HandshakeFlags(greeting.flags.get()).has(flags)
    };
    if !Greeting::take(&greeting).is_some_and(|greeting| expected(&greeting)) {
        return Err(io::Error::other("the disk's server begins otherwise than expected"));
    }
    disk.write_all(&u32::from(flags.0).to_be_bytes())?;
    Ok(disk)
}

#[cfg(test)]
mod tests;
