//! The daemon's sockets, and the thread that serves them.
//!
//! One lock guards everything. Whoever changes the daemon under it, the thread or a test, also sends what that
//! caused before the lock is given back: when a call of a test returns, its events are in their receivers' sockets
//! already, so tests need not wait for them. The thread sends what found no room.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use xenstore::codec::Decoder;

use super::daemon::{ConnectionId, Daemon};

/// What the thread and the tests share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    /// Signalled after every change.
    changed: Condvar,
    /// Makes the thread look at the state again.
    wake: EventFd,
}

/// Everything behind the lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) daemon: Daemon,
    doors: Vec<Door>,
    sockets: BTreeMap<ConnectionId, Socket>,
    quit: bool,
    /// The daemon was stopped by a cut.
    pub(super) is_cut: bool,
}

/// A place where clients of one domain connect.
#[derive(Debug)]
struct Door {
    domid: u16,
    path: PathBuf,
    /// `None` while the daemon is stopped.
    listener: Option<Arc<UnixListener>>,
}

/// The thread polls a second handle of each descriptor without holding the lock; the `Arc` keeps the number from
/// being used for something else meanwhile.
#[derive(Debug)]
struct Socket {
    stream: Arc<UnixStream>,
    decoder: Decoder,
}

/// Something the thread polls.
enum Source {
    Wake,
    Door(Arc<UnixListener>),
    Socket(ConnectionId, Arc<UnixStream>),
}

impl Shared {
    pub(super) fn new() -> io::Result<Shared> {
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let state = State {
            daemon: Daemon::new(),
            doors: Vec::new(),
            sockets: BTreeMap::new(),
            quit: false,
            is_cut: false,
        };
        Ok(Shared { state: Mutex::new(state), changed: Condvar::new(), wake })
    }

    /// Runs `act` on the state and sends what it caused.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let value = act(&mut state);
        state.flush();
        drop(state);
        self.changed.notify_all();
        // It fails only when the counter is full, and then the thread is being woken already.
        let _ = self.wake.write(1);
        value
    }

    /// Looks at the state.
    pub(super) fn look<T>(&self, show: impl FnOnce(&State) -> T) -> T {
        show(&self.lock())
    }

    /// Waits until `condition` holds, but no longer than `timeout`; tells whether it does.
    pub(super) fn wait(
        &self,
        timeout: std::time::Duration,
        mut condition: impl FnMut(&State) -> bool,
    ) -> bool {
        let outcome = self.changed.wait_timeout_while(self.lock(), timeout, |state| !condition(state));
        let (_state, result) = outcome.unwrap_or_else(PoisonError::into_inner);
        !result.timed_out()
    }

    pub(super) fn quit(&self) {
        self.with(|state| state.quit = true);
    }

    /// Serves clients until [`Shared::quit`].
    pub(super) fn serve(&self) {
        loop {
            let sources = {
                let state = self.lock();
                if state.quit {
                    return;
                }
                state.sources()
            };
            let ready = self.poll(&sources);
            let mut state = self.lock();
            for ((source, _), _) in sources.iter().zip(ready).filter(|&(_, ready)| ready) {
                match source {
                    Source::Wake => drop(self.wake.read()),
                    Source::Door(listener) => state.accept(listener),
                    Source::Socket(id, _) => state.receive(*id),
                }
            }
            state.flush();
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Which of `sources` are ready.
    fn poll(&self, sources: &[(Source, PollFlags)]) -> Vec<bool> {
        let mut fds: Vec<PollFd<'_>> = sources
            .iter()
            .map(|(source, interest)| match source {
                Source::Wake => PollFd::new(self.wake.as_fd(), *interest),
                Source::Door(listener) => PollFd::new(listener.as_fd(), *interest),
                Source::Socket(_, stream) => PollFd::new(stream.as_fd(), *interest),
            })
            .collect();
        while poll(&mut fds, PollTimeout::NONE) == Err(Errno::EINTR) {}
        fds.iter().map(|fd| fd.any().unwrap_or(true)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn sources(&self) -> Vec<(Source, PollFlags)> {
        let listeners = self.doors.iter().filter_map(|door| door.listener.clone());
        let doors = listeners.map(|listener| (Source::Door(listener), PollFlags::POLLIN));
        let sockets = self.sockets.iter().map(|(&id, socket)| {
            let waiting = self.daemon.connections.get(&id).is_some_and(|c| !c.outgoing.is_empty());
            let interest = if waiting { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
            (Source::Socket(id, Arc::clone(&socket.stream)), interest)
        });
        std::iter::once((Source::Wake, PollFlags::POLLIN)).chain(doors).chain(sockets).collect()
    }

    /// Opens a door for clients of `domid` at `path`.
    pub(super) fn open_door(&mut self, domid: u16, path: &Path) -> io::Result<()> {
        let listener = Some(listen(path)?);
        self.doors.push(Door { domid, path: path.to_owned(), listener });
        Ok(())
    }

    /// Closes all doors and drops all connections.
    pub(super) fn close_doors(&mut self) {
        for door in &mut self.doors {
            door.listener = None;
            // Already gone is as good.
            let _ = std::fs::remove_file(&door.path);
        }
        self.drop_connections();
    }

    /// Opens the doors that [`State::close_doors`] closed.
    pub(super) fn reopen_doors(&mut self) -> io::Result<()> {
        self.is_cut = false;
        for door in self.doors.iter_mut().filter(|door| door.listener.is_none()) {
            door.listener = Some(listen(&door.path)?);
        }
        Ok(())
    }

    /// Ends every connection, with its watches and transactions.
    pub(super) fn drop_connections(&mut self) {
        self.daemon.connections.clear();
        self.drop_orphans();
    }

    /// Closes the sockets of connections that the daemon has given up.
    fn drop_orphans(&mut self) {
        let connections = &self.daemon.connections;
        self.sockets.retain(|id, socket| {
            let alive = connections.contains_key(id);
            if !alive {
                // The thread may still hold its handle; this way the client knows at once.
                let _ = socket.stream.shutdown(std::net::Shutdown::Both);
            }
            alive
        });
    }

    fn accept(&mut self, listener: &Arc<UnixListener>) {
        // A door that was closed since it became ready lets nobody in.
        let is_this = |door: &&Door| door.listener.as_ref().is_some_and(|open| Arc::ptr_eq(open, listener));
        let Some(door) = self.doors.iter().find(is_this) else {
            return;
        };
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                let id = self.daemon.connect(door.domid);
                self.sockets.insert(id, Socket { stream: Arc::new(stream), decoder: Decoder::new() });
            }
        }
    }

    /// Takes in what a client has sent; gives the client up when it has gone or broken the protocol.
    fn receive(&mut self, id: ConnectionId) {
        let mut buffer = [0; 16 << 10];
        while let Some(socket) = self.sockets.get_mut(&id) {
            match (&*socket.stream).read(&mut buffer) {
                Ok(count) if count > 0 => socket.decoder.extend(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return self.give_up(id),
            }
            loop {
                match self.sockets.get_mut(&id).map(|socket| socket.decoder.next_frame()) {
                    Some(Ok(Some(request))) => self.daemon.handle(id, request),
                    Some(Err(_)) => return self.give_up(id),
                    Some(Ok(None)) | None => break,
                }
            }
        }
    }

    fn give_up(&mut self, id: ConnectionId) {
        self.daemon.connections.remove(&id);
        self.drop_orphans();
    }

    /// Sends what can be sent without waiting.
    fn flush(&mut self) {
        let mut broken = Vec::new();
        for (id, connection) in &mut self.daemon.connections {
            let Some(socket) = self.sockets.get(id) else {
                continue;
            };
            while let Some(message) = connection.outgoing.front() {
                match (&*socket.stream).write(message.get(connection.sent..).unwrap_or_default()) {
                    Ok(count) => connection.sent += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => {
                        broken.push(*id);
                        break;
                    }
                }
                if connection.sent == message.len() {
                    connection.outgoing.pop_front();
                    connection.sent = 0;
                }
            }
        }
        for id in broken {
            self.daemon.connections.remove(&id);
        }
        self.daemon.connections.retain(|_, connection| !connection.doomed);
        self.drop_orphans();
        if self.daemon.faults.done.take().is_some_and(|cut| cut.stop) {
            self.stop_after_cut();
        }
    }

    /// Ends all connections and lets nobody in, as after [`State::close_doors`], for waiting tests to see.
    pub(super) fn stop_after_cut(&mut self) {
        self.close_doors();
        self.is_cut = true;
    }
}

fn listen(path: &Path) -> io::Result<Arc<UnixListener>> {
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(Arc::new(listener))
}
