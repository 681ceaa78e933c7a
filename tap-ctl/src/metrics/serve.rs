//! The endpoint: a unix socket, or TCP on this machine only. HTTP/1.0 in as much as a scrape needs.
//!
//! There is no authentication: who may connect is decided by the socket's mode (0600, its owner may widen it), and a TCP port
//! can be opened on a loopback address only. Each client gets a thread and ten seconds; more than eight at once are sent away.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::clients;
use crate::dir::ControlDir;
use crate::list::Filter;
use crate::survey::survey;

/// Clients at the same time.
const MAX_CLIENTS: usize = 8;
/// For a client to ask, and again to take the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest head of a request.
const MAX_HEAD: usize = 8192;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A port of a loopback address.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        if text.starts_with('/') {
            return Ok(Address::Unix(text.into()));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Address::Tcp(address)),
            Ok(address) => Err(format!("{address} can be reached from elsewhere: write 127.0.0.1 or [::1]")),
            Err(_) => Err(format!("{text:?} is neither an absolute path nor a loopback address with a port")),
        }
    }
}

impl From<&Address> for PathBuf {
    /// For messages.
    fn from(address: &Address) -> PathBuf {
        match address {
            Address::Unix(path) => path.clone(),
            Address::Tcp(address) => address.to_string().into(),
        }
    }
}

/// A client's connection, whatever its kind.
trait Stream: Read + Write + Send {
    fn patience(&self, limit: Duration) -> io::Result<()>;
}

impl Stream for std::os::unix::net::UnixStream {
    fn patience(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

impl Stream for std::net::TcpStream {
    fn patience(&self, limit: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(limit))?;
        self.set_write_timeout(Some(limit))
    }
}

/// Where clients come in.
#[derive(Debug)]
pub enum Listener {
    /// A unix socket.
    Unix(UnixListener),
    /// A port.
    Tcp(TcpListener),
}

impl Listener {
    /// Begins to listen. A socket that a dead process has left is replaced.
    ///
    /// # Errors
    ///
    /// What the system says; `AddrInUse` where somebody listens already.
    pub fn bind(address: &Address) -> io::Result<Listener> {
        match address {
            Address::Unix(path) => {
                remove_dead(path)?;
                let listener = UnixListener::bind(path)?;
                std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
                Ok(Listener::Unix(listener))
            }
            Address::Tcp(address) => TcpListener::bind(address).map(Listener::Tcp),
        }
    }

    fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Listener::Unix(listener) => Box::new(listener.accept()?.0),
            Listener::Tcp(listener) => Box::new(listener.accept()?.0),
        })
    }
}

fn remove_dead(path: &Path) -> io::Result<()> {
    let is_socket = path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Answers clients for ever.
///
/// # Errors
///
/// When no more clients can be accepted.
pub fn serve(listener: &Listener, dir: &ControlDir) -> io::Result<()> {
    let dir = dir.clone();
    clients::serve(
        "scrape",
        MAX_CLIENTS,
        || listener.accept(),
        move |client| {
            if let Err(error) = attend(client, &dir) {
                log::debug!("a scrape failed: {error}");
            }
        },
    )
}

fn attend(mut client: Box<dyn Stream>, dir: &ControlDir) -> io::Result<()> {
    let head = read_head(&mut client)?;
    let (status, body) = match wanted(&head) {
        Ok(()) => match survey(dir, &Filter::default()) {
            Ok(survey) => {
                for problem in &survey.problems {
                    log::warn!("not in the metrics: {problem}");
                }
                ("200 OK", super::text(&survey))
            }
            Err(error) => ("500 Internal Server Error", format!("{error}\n")),
        },
        Err(status) => (status, format!("{status}: metrics are at /metrics\n")),
    };
    client.patience(PATIENCE)?;
    write!(
        client,
        "HTTP/1.0 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )?;
    client.flush()
}

/// Up to the empty line, within the time for all of it.
fn read_head(client: &mut Box<dyn Stream>) -> io::Result<Vec<u8>> {
    let end = Instant::now() + PATIENCE;
    let mut head = Vec::new();
    while !head.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || head.len() > MAX_HEAD {
            return Err(io::ErrorKind::TimedOut.into());
        }
        client.patience(left)?;
        let mut bytes = [0; 1024];
        let count = client.read(&mut bytes)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(bytes.get(..count).unwrap_or_default());
    }
    Ok(head)
}

/// Whether a request asks for the metrics; else the status to answer.
fn wanted(head: &[u8]) -> Result<(), &'static str> {
    let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let mut words = line.split(|byte| *byte == b' ');
    if words.next() != Some(b"GET") {
        return Err("405 Method Not Allowed");
    }
    match words.next().map(|target| target.split(|byte| *byte == b'?').next()) {
        Some(Some(b"/metrics" | b"/")) => Ok(()),
        _ => Err("404 Not Found"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_this_machine_can_be_served() {
        assert_eq!("/run/x".parse(), Ok(Address::Unix("/run/x".into())));
        assert_eq!("127.0.0.1:9".parse(), Ok(Address::Tcp("127.0.0.1:9".parse().unwrap())));
        assert!("[::1]:9".parse::<Address>().is_ok());
        for text in ["0.0.0.0:9", "192.0.2.1:9", "[::]:9", "localhost:9", "9", "x"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    fn ask(stream: &mut (impl Read + Write), request: &str) -> String {
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn a_scrape_gets_the_metrics_over_either_kind_of_socket() {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path().join("control"));
        let path = folder.path().join("socket");
        // A dead process's socket is in the way.
        drop(UnixListener::bind(&path).unwrap());
        let unix = Listener::bind(&Address::Unix(path.clone())).unwrap();
        assert!(Listener::bind(&Address::Unix(path.clone())).is_err(), "somebody listens there");
        let tcp = Listener::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(inner) = &tcp else { panic!() };
        let address = inner.local_addr().unwrap();
        for listener in [unix, tcp] {
            let dir = dir.clone();
            std::thread::spawn(move || serve(&listener, &dir));
        }
        let request = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
        for answer in [
            ask(&mut UnixStream::connect(&path).unwrap(), request),
            ask(&mut std::net::TcpStream::connect(address).unwrap(), request),
        ] {
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
            assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
            assert!(body.ends_with("\n") && body.contains("\nxenio_scrape_problems 0\n"), "{body}");
        }
        let answer = ask(&mut UnixStream::connect(&path).unwrap(), "POST /metrics HTTP/1.0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.0 405 "), "{answer}");
        let answer = ask(&mut UnixStream::connect(&path).unwrap(), "GET /secret HTTP/1.0\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.0 404 "), "{answer}");
    }
}
