//! Telling a service manager how we are, by systemd's protocol: datagrams of `NAME=value` lines to the socket that
//! `NOTIFY_SOCKET` names (sd_notify(3)), one every half of `WATCHDOG_USEC` while all is well (sd_watchdog_enabled(3)).
//! Without those variables nothing is sent.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// The service manager, or nobody.
#[derive(Debug, Default)]
pub struct Manager {
    peer: Option<Peer>,
    watchdog: Option<Watchdog>,
    ready: bool,
}

#[derive(Debug)]
struct Peer {
    socket: UnixDatagram,
    address: SocketAddr,
}

#[derive(Debug)]
struct Watchdog {
    /// Half the time after which the manager gives us up.
    interval: Duration,
    due: Instant,
}

/// What the environment says, as it stands there.
#[derive(Debug, Default)]
struct Environment {
    socket: Option<OsString>,
    watchdog_usec: Option<OsString>,
    watchdog_pid: Option<OsString>,
}

impl Manager {
    /// The one that the environment names. Trouble with it is logged, and nobody is told anything then: a daemon that
    /// serves disks does not stop because it cannot say that it does.
    pub fn from_environment() -> Manager {
        let environment = Environment {
            socket: env::var_os("NOTIFY_SOCKET"),
            watchdog_usec: env::var_os("WATCHDOG_USEC"),
            watchdog_pid: env::var_os("WATCHDOG_PID"),
        };
        Manager::from(&environment, std::process::id(), Instant::now()).unwrap_or_else(|error| {
            log::warn!("cannot reach the service manager: {error}");
            Manager::default()
        })
    }

    fn from(environment: &Environment, pid: u32, now: Instant) -> io::Result<Manager> {
        let Some(name) = environment.socket.as_deref().filter(|name| !name.is_empty()) else {
            return Ok(Manager::default());
        };
        let socket = UnixDatagram::unbound()?;
        // A manager that does not read is told less; we do not wait for it.
        socket.set_nonblocking(true)?;
        let peer = Some(Peer { socket, address: address(name)? });
        let watchdog = interval(environment, pid).map(|interval| Watchdog { interval, due: now });
        Ok(Manager { peer, watchdog, ready: false })
    }

    /// The devices are served from now on. Only the first call says so.
    pub fn ready(&mut self) {
        if !std::mem::replace(&mut self.ready, true) {
            self.send("READY=1\nSTATUS=serving disks");
        }
    }

    /// What a person reads beside the service's state.
    pub fn status(&self, words: &str) {
        self.send(&format!("STATUS={words}"));
    }

    /// We end because we were asked to.
    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// A whole turn of the loop is done: tells the watchdog if it is time, and when the next time is.
    pub fn alive(&mut self, now: Instant) -> Option<Instant> {
        let watchdog = self.watchdog.as_mut()?;
        if watchdog.due > now {
            return Some(watchdog.due);
        }
        watchdog.due = now + watchdog.interval;
        let due = watchdog.due;
        self.send("WATCHDOG=1");
        Some(due)
    }

    fn send(&self, words: &str) {
        if let Some(peer) = &self.peer
            && let Err(error) = peer.socket.send_to_addr(words.as_bytes(), &peer.address)
        {
            log::debug!("cannot tell the service manager {words:?}: {error}");
        }
    }
}

/// A path, or with `@` in front a name in Linux's abstract namespace.
fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => Err(io::Error::other(format!("NOTIFY_SOCKET={} names no local socket", name.display()))),
    }
}

/// `None`: no watchdog, or one of another process.
fn interval(environment: &Environment, pid: u32) -> Option<Duration> {
    let number = |value: &OsString| value.to_str()?.parse::<u64>().ok();
    if let Some(owner) = &environment.watchdog_pid
        && number(owner) != Some(u64::from(pid))
    {
        return None;
    }
    let limit = environment.watchdog_usec.as_ref().and_then(number)?;
    (limit > 0).then(|| Duration::from_micros(limit) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Stage {
        _folder: tempfile::TempDir,
        socket: UnixDatagram,
        environment: Environment,
    }

    impl Stage {
        fn new(usec: &str, pid: Option<&str>) -> Stage {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("notify");
            let socket = UnixDatagram::bind(&path).unwrap();
            socket.set_nonblocking(true).unwrap();
            let environment = Environment {
                socket: Some(path.into()),
                watchdog_usec: Some(usec.into()),
                watchdog_pid: pid.map(OsString::from),
            };
            Stage { _folder: folder, socket, environment }
        }

        fn manager(&self, now: Instant) -> Manager {
            Manager::from(&self.environment, 7, now).unwrap()
        }

        /// What has arrived since the last call.
        fn heard(&self) -> Vec<String> {
            let mut buffer = [0; 256];
            std::iter::from_fn(|| self.socket.recv(&mut buffer).ok().map(|count| buffer[..count].to_vec()))
                .map(|bytes| String::from_utf8(bytes).unwrap())
                .collect()
        }
    }

    #[test]
    fn the_manager_hears_once_that_we_are_ready() {
        let stage = Stage::new("0", None);
        let mut manager = stage.manager(Instant::now());
        manager.status("waiting");
        manager.ready();
        manager.ready();
        manager.stopping();
        assert_eq!(stage.heard(), ["STATUS=waiting", "READY=1\nSTATUS=serving disks", "STOPPING=1"]);
    }

    #[test]
    fn the_watchdog_hears_of_us_twice_in_its_time() {
        let stage = Stage::new("3000000", Some("7"));
        let start = Instant::now();
        let mut manager = stage.manager(start);
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!(manager.alive(at(0)), Some(at(1500)));
        assert_eq!(manager.alive(at(1499)), Some(at(1500)));
        assert_eq!(stage.heard(), ["WATCHDOG=1"]);
        assert_eq!(manager.alive(at(1600)), Some(at(3100)));
        assert_eq!(stage.heard(), ["WATCHDOG=1"]);
    }

    #[test]
    fn there_is_no_watchdog_without_a_time_or_for_another_process() {
        for (usec, pid) in [("0", None), ("soon", None), ("3000000", Some("8"))] {
            let stage = Stage::new(usec, pid);
            assert_eq!(stage.manager(Instant::now()).alive(Instant::now()), None, "{usec} {pid:?}");
        }
    }

    #[test]
    fn abstract_sockets_are_reached_too() {
        let name = format!("xenio-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = UnixDatagram::bind_addr(&address).unwrap();
        let environment = Environment { socket: Some(format!("@{name}").into()), ..Environment::default() };
        Manager::from(&environment, 7, Instant::now()).unwrap().stopping();
        let mut buffer = [0; 32];
        let count = socket.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..count], b"STOPPING=1");
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        let now = Instant::now();
        let mut manager = Manager::from(&Environment::default(), 7, now).unwrap();
        manager.ready();
        assert_eq!(manager.alive(now), None);
        let elsewhere = Environment { socket: Some("vsock:2:9".into()), ..Environment::default() };
        assert!(Manager::from(&elsewhere, 7, now).is_err());
    }

    #[test]
    fn a_manager_that_is_gone_does_not_stop_us() {
        let stage = Stage::new("1000000", None);
        let mut manager = stage.manager(Instant::now());
        drop(stage);
        manager.ready();
        assert!(manager.alive(Instant::now()).is_some());
    }
}
