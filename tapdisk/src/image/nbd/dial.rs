//! Connecting to a server, which blocks: when a disk is opened on its thread, later on a thread of its own.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nbd::client::{Export, Handshake};
use nbd::{Address, Place};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

use crate::porter;
use crate::socket::{no_deadlines, receive_until, send_until};

/// How long a TCP connection whose peer does not answer is believed to live, in milliseconds.
const TCP_TIMEOUT: u32 = 30_000;

/// The first pause between two attempts, and the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(2)];

/// A connection whose handshake is over.
#[derive(Debug)]
pub struct Dialled {
    /// The connection, in blocking mode, without timeouts.
    pub socket: OwnedFd,
    /// What it is for.
    pub export: Export,
}

/// Connects and comes to an agreement, all within `timeout`. Errors are sentences for people.
pub fn dial(address: &Address, timeout: Duration) -> Result<Dialled, String> {
    let deadline = Instant::now() + timeout;
    let socket = match &address.place {
        Place::Unix(path) => porter::connect(path).map_err(|error| error.to_string()),
        Place::Tcp { host, port } => dial_tcp(host, *port, timeout).map_err(|error| error.to_string()),
    }
    .map_err(|error| format!("cannot connect to {}: {error}", address.place))?;
    let export = agree(socket.as_fd(), &address.export, deadline)?;
    no_deadlines(socket.as_fd()).map_err(|errno| errno.to_string())?;
    Ok(Dialled { socket, export })
}

fn dial_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                // A peer that is gone without a word is noticed, however long nothing is sent.
                setsockopt(&stream, sockopt::KeepAlive, &true)?;
                setsockopt(&stream, sockopt::TcpKeepIdle, &10)?;
                setsockopt(&stream, sockopt::TcpKeepInterval, &5)?;
                setsockopt(&stream, sockopt::TcpUserTimeout, &TCP_TIMEOUT)?;
                return Ok(stream.into());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The handshake.
fn agree(socket: BorrowedFd<'_>, name: &str, deadline: Instant) -> Result<Export, String> {
    let failed = |errno: Errno| match errno {
        Errno::EAGAIN => "the NBD server did not answer in time".to_owned(),
        errno => format!("the handshake with the NBD server failed: {}", errno.desc()),
    };
    let mut handshake = Handshake::new(name);
    loop {
        let mut bytes = vec![0; handshake.wants()];
        let count = receive_until(socket, &mut bytes, deadline).map_err(failed)?;
        let agreed = handshake.input(bytes.get(..count).unwrap_or_default()).map_err(|e| e.to_string())?;
        send_until(socket, &handshake.output(), deadline).map_err(failed)?;
        if let Some(export) = agreed {
            return Ok(export);
        }
    }
}

/// When and how often to try.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How many attempts in a row have led to nothing before.
    pub failures: u32,
    /// The last attempt begins before this.
    pub until: Instant,
    /// For each attempt.
    pub timeout: Duration,
}

/// What the threads share.
#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// There is an outcome.
    over: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    outcome: Option<Result<Dialled, String>>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits so long; false once it was cancelled.
    fn pause(&self, time: Duration) -> bool {
        let going = |state: &mut State| !state.cancelled;
        let state = self.state();
        let waited =
            self.changed.wait_timeout_while(state, time, going).unwrap_or_else(PoisonError::into_inner);
        !waited.0.cancelled
    }
}

/// Attempts to connect, made by a thread; ended by being dropped.
#[derive(Debug)]
pub struct Attempts {
    shared: Arc<Shared>,
    /// Nothing comes from it but its end, once there is an outcome.
    pub bell: UnixStream,
}

impl Attempts {
    /// Starts the thread. A connection whose export `judge` does not accept counts as a failed attempt.
    pub fn start(
        address: Address,
        plan: Plan,
        judge: impl Fn(&Export) -> Result<(), String> + Send + 'static,
    ) -> io::Result<Attempts> {
        let shared = Arc::new(Shared::default());
        let (bell, rings) = UnixStream::pair()?;
        let told = shared.clone();
        std::thread::Builder::new().name("nbd-connect".into()).spawn(move || {
            let outcome = attempt(&address, plan, &judge, &told);
            told.state().outcome = Some(outcome);
            told.over.store(true, Ordering::Release);
            drop(rings);
        })?;
        Ok(Attempts { shared, bell })
    }

    /// Whether there is an outcome. Each request may ask: nothing is locked.
    pub fn is_over(&self) -> bool {
        self.shared.over.load(Ordering::Acquire)
    }

    /// The outcome, once.
    pub fn outcome(&self) -> Option<Result<Dialled, String>> {
        if self.is_over() { self.shared.state().outcome.take() } else { None }
    }
}

impl Drop for Attempts {
    fn drop(&mut self) {
        self.shared.state().cancelled = true;
        self.shared.changed.notify_all();
    }
}

fn attempt(
    address: &Address,
    plan: Plan,
    judge: &dyn Fn(&Export) -> Result<(), String>,
    shared: &Shared,
) -> Result<Dialled, String> {
    let mut failures = plan.failures;
    loop {
        if !shared.pause(pause(failures)) {
            return Err("the disk was closed".into());
        }
        let dialled = dial(address, plan.timeout);
        let outcome = dialled.and_then(|dialled| judge(&dialled.export).map(|()| dialled));
        if outcome.is_ok() || Instant::now() + pause(failures + 1) >= plan.until {
            return outcome;
        }
        failures += 1;
    }
}

/// The pause after so many failures.
fn pause(failures: u32) -> Duration {
    let [first, longest] = PAUSES;
    match failures {
        0 => Duration::ZERO,
        _ => longest.min(first.saturating_mul(1 << (failures - 1).min(16))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        assert_eq!(pause(0), Duration::ZERO);
        assert_eq!([pause(1), pause(2), pause(4)].map(|time| time.as_millis()), [50, 100, 400]);
        assert_eq!([pause(7), pause(u32::MAX - 1)], [PAUSES[1]; 2]);
    }

    #[test]
    fn a_silent_server_is_given_up_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _silent = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let address = Address { place: Place::Unix(path), export: String::new() };
        let error = dial(&address, Duration::from_millis(30)).unwrap_err();
        assert!(error.contains("did not answer in time"), "{error}");
    }

    #[test]
    fn attempts_end_when_they_are_dropped() {
        let address = Address { place: Place::Unix("/no/such/socket".into()), export: String::new() };
        let plan = Plan {
            failures: 9,
            until: Instant::now() + Duration::from_secs(3600),
            timeout: Duration::from_secs(3600),
        };
        let attempts = Attempts::start(address, plan, |_| Ok(())).unwrap();
        let shared = attempts.shared.clone();
        drop(attempts);
        // The thread holds the other one until it has ended; the test has no end if it has none.
        while Arc::strong_count(&shared) > 1 {
            std::thread::yield_now();
        }
        assert!(shared.state().outcome.as_ref().is_some_and(Result::is_err));
    }
}
