//! Simulated event channels, between threads and between processes.
//!
//! What the hypervisor keeps is in files of the simulated hypervisor's folder, so that no process has to serve it:
//!
//! | file | holds |
//! |---|---|
//! | `dom<N>.ports` | the ports of a domain (see `ports.rs`) |
//! | `dom<N>.calls` | how often a domain has called its devices |
//! | `events.<pid>.<n>` | one open device: a FIFO of fired ports, locked by its owner |
//! | `lock` | held while ports are bound and unbound |
//!
//! A notification is one atomic operation on the other end's port; only if that port is not masked, its number is
//! written to the FIFO. As on the real device a port is then masked until it is unmasked, so it stands in the FIFO at
//! most once, and the FIFO never fills. As there, a device that is closed, or whose process was killed, leaves the
//! other ends of its ports free to be bound again.

mod ports;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use evtchn::{DomId, EventChannel, Port};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::Mode;

use super::calls::{Call, Calls};
use ports::{Device, PortTable, State};

/// The first of the numbers that are no domain's (`DOMID_FIRST_RESERVED` of Xen's `public/xen.h`).
const FIRST_RESERVED: u16 = 0x7ff0;

/// Ports taken in one read.
const PORTS_PER_READ: usize = 64;

/// An open simulated event channel device of one domain.
#[derive(Debug)]
pub struct SimEvents {
    dir: PathBuf,
    own: DomId,
    device: Device,
    /// The queue of fired ports. The lock on it tells others that this device is open.
    queue: Flock<File>,
    own_ports: PortTable,
    /// The only domain whose ports may be bound.
    restricted: Cell<Option<DomId>>,
    bound: HashMap<Port, Channel>,
    calls: Calls,
    /// The queues of other devices.
    queues: RefCell<HashMap<Device, File>>,
}

/// A port bound through this device.
#[derive(Debug)]
struct Channel {
    remote_dom: DomId,
    /// The other end's ports; unknown while nobody has bound the other end.
    remote: RefCell<Option<PortTable>>,
}

impl SimEvents {
    /// Opens a device of domain `own` in the simulated hypervisor's folder, which must exist.
    pub fn open(dir: &Path, own: DomId) -> io::Result<SimEvents> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (device, path) = loop {
            let device = Device { pid: std::process::id(), number: NEXT.fetch_add(1, Ordering::Relaxed) };
            let path = queue_path(dir, device);
            match nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR) {
                Ok(()) => break (device, path),
                // A process of the same number died here without removing its own.
                Err(Errno::EEXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        let queue = Flock::lock(open_queue(&path)?, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| io::Error::from(errno))?;
        let own_ports = {
            let _guard = control_lock(dir)?;
            PortTable::open_or_create(dir, own)?
        };
        Ok(SimEvents {
            dir: dir.to_owned(),
            own,
            device,
            queue,
            own_ports,
            restricted: Cell::new(None),
            bound: HashMap::new(),
            calls: Calls::open(dir, own)?,
            queues: RefCell::default(),
        })
    }

    /// Allots a port that domain `remote` may bind to: what a frontend does. Notifications go nowhere until then.
    pub fn allocate(&mut self, remote: DomId) -> io::Result<Port> {
        if self.restricted.get().is_some() {
            return Err(Errno::EACCES.into());
        }
        let _guard = control_lock(&self.dir)?;
        let local = self.own_ports.free_port().ok_or(Errno::ENOSPC)?;
        self.own_ports.take(local, self.device, State::Unbound, remote, Port(0));
        self.bound.insert(local, Channel { remote_dom: remote, remote: RefCell::default() });
        Ok(local)
    }

    /// Whether the other end of a port is bound, to know when a backend has come or gone.
    pub fn is_connected(&self, local: Port) -> bool {
        self.bound.contains_key(&local) && self.own_ports.state(local) == Some(State::Bound)
    }

    /// Waits until a port fires, at most `timeout`; false if none did.
    pub fn wait(&self, timeout: std::time::Duration) -> io::Result<bool> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Puts a port into the queue of the device that owns it.
    fn deliver(&self, owner: Device, port: Port) -> io::Result<()> {
        if owner == self.device {
            return write_port(&self.queue, port);
        }
        let mut queues = self.queues.borrow_mut();
        if let Some(queue) = queues.get(&owner) {
            return write_port(queue, port);
        }
        match open_queue(&queue_path(&self.dir, owner)) {
            Ok(queue) => write_port(queues.entry(owner).or_insert(queue), port),
            // The device was closed meanwhile, and nobody listens any more.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Makes `port` of domain `dom` bindable again if what was bound to it is a device that died without unbinding.
    fn reclaim(&self, ports: &PortTable, port: Port) -> io::Result<()> {
        let (dom, peer) = ports.remote(port);
        if ports.state(port) != Some(State::Bound) || dom != self.own {
            return Ok(());
        }
        let owner = self.own_ports.owner(peer);
        match open_queue(&queue_path(&self.dir, owner)) {
            Ok(queue) => match Flock::lock(queue, FlockArg::LockExclusiveNonblock) {
                Ok(_abandoned) => std::fs::remove_file(queue_path(&self.dir, owner))?,
                Err((_, Errno::EWOULDBLOCK)) => return Ok(()),
                Err((_, errno)) => return Err(errno.into()),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        self.own_ports.release(peer);
        ports.disconnect(port, self.own);
        // Xen notifies in one step; here the dead process may have masked the port and not come to write into the queue.
        // A port that stands there twice does no harm.
        if ports.is_masked(port) { self.deliver(ports.owner(port), port) } else { Ok(()) }
    }

    /// Ends a port of ours; the other end becomes bindable again.
    fn close(&self, local: Port, channel: &Channel) -> io::Result<()> {
        if self.own_ports.owner(local) != self.device {
            return Ok(());
        }
        if self.own_ports.state(local) == Some(State::Bound) {
            let (dom, peer) = self.own_ports.remote(local);
            let ports = PortTable::open_or_create(&self.dir, channel.remote_dom)?;
            if ports.remote(peer) == (self.own, local) && dom == channel.remote_dom {
                ports.disconnect(peer, self.own);
            }
        }
        self.own_ports.release(local);
        Ok(())
    }
}

impl AsFd for SimEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

impl EventChannel for SimEvents {
    fn restrict(&self, dom: DomId) -> io::Result<()> {
        if self.restricted.get().is_some() {
            return Err(Errno::EACCES.into());
        }
        if dom.0 == 0 || dom.0 >= FIRST_RESERVED {
            return Err(Errno::EINVAL.into());
        }
        self.restricted.set(Some(dom));
        Ok(())
    }

    fn bind(&mut self, dom: DomId, remote: Port) -> io::Result<Port> {
        if self.restricted.get().is_some_and(|only| only != dom) {
            return Err(Errno::EACCES.into());
        }
        let guard = control_lock(&self.dir)?;
        let ports = PortTable::open(&self.dir, dom).map_err(|_| Errno::EINVAL)?;
        if ports.state(remote).is_none() {
            return Err(Errno::EINVAL.into());
        }
        self.reclaim(&ports, remote)?;
        let offered_to = ports.remote(remote).0;
        if ports.state(remote) != Some(State::Unbound) || offered_to != self.own {
            return Err(Errno::EINVAL.into());
        }
        let local = self.own_ports.free_port().ok_or(Errno::ENOSPC)?;
        self.own_ports.take(local, self.device, State::Bound, dom, remote);
        ports.connect(remote, self.own, local);
        self.bound.insert(local, Channel { remote_dom: dom, remote: RefCell::new(Some(ports)) });
        drop(guard);
        // Xen raises a port when it is bound: the other end may have notified before.
        if self.own_ports.raise(local) {
            self.deliver(self.device, local)?;
        }
        Ok(local)
    }

    fn unbind(&mut self, local: Port) -> io::Result<()> {
        let channel = self.bound.remove(&local).ok_or(Errno::ENOTCONN)?;
        let _guard = control_lock(&self.dir)?;
        self.close(local, &channel)
    }

    fn pending(&self, out: &mut [Port]) -> io::Result<usize> {
        self.calls.count(Call::Pending);
        let mut buffer = [0; PORTS_PER_READ * size_of::<u32>()];
        let wanted = out.len().min(PORTS_PER_READ) * size_of::<u32>();
        if wanted == 0 {
            return Ok(0);
        }
        let mut queue: &File = &self.queue;
        let got = match queue.read(&mut buffer[..wanted]) {
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error),
        };
        let (ports, _) = buffer[..got].as_chunks();
        for (to, from) in out.iter_mut().zip(ports) {
            *to = Port(u32::from_ne_bytes(*from));
        }
        Ok(ports.len())
    }

    fn unmask(&self, local: Port) -> io::Result<()> {
        self.calls.count(Call::Unmask);
        // The real device ignores ports that it has not bound.
        if self.bound.contains_key(&local) && self.own_ports.unmask(local) {
            self.deliver(self.device, local)?;
        }
        Ok(())
    }

    fn notify(&self, local: Port) -> io::Result<()> {
        self.calls.count(Call::Notify);
        let channel = self.bound.get(&local).ok_or(Errno::ENOTCONN)?;
        if self.own_ports.state(local) != Some(State::Bound) {
            return Ok(());
        }
        let (_, peer) = self.own_ports.remote(local);
        let mut remote = channel.remote.borrow_mut();
        let ports = match &*remote {
            Some(ports) => ports,
            None => remote.insert(PortTable::open(&self.dir, channel.remote_dom)?),
        };
        // The other end may just be going away: then this is a notification to nobody.
        let theirs = ports.state(peer) == Some(State::Bound) && ports.remote(peer) == (self.own, local);
        if theirs && ports.raise(peer) {
            self.deliver(ports.owner(peer), peer)?;
        }
        Ok(())
    }
}

impl Drop for SimEvents {
    fn drop(&mut self) {
        let guard = control_lock(&self.dir);
        for (local, channel) in &self.bound {
            if let Err(error) = self.close(*local, channel) {
                log::warn!("cannot close port {local} of domain {}: {error}", self.own);
            }
        }
        drop(guard);
        if let Err(error) = std::fs::remove_file(queue_path(&self.dir, self.device)) {
            log::warn!("cannot remove an event queue: {error}");
        }
    }
}

fn queue_path(dir: &Path, device: Device) -> PathBuf {
    dir.join(format!("events.{}.{}", device.pid, device.number))
}

/// Opens a FIFO for both directions, so that neither end waits for the other or sees it end.
fn open_queue(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

fn write_port(mut queue: &File, port: Port) -> io::Result<()> {
    queue.write_all(&port.0.to_ne_bytes())
}

/// Excludes every other process and thread from binding and unbinding, until dropped.
fn control_lock(dir: &Path) -> io::Result<Flock<File>> {
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(dir.join("lock"))?;
    loop {
        match Flock::lock(file, FlockArg::LockExclusive) {
            Ok(lock) => return Ok(lock),
            Err((again, Errno::EINTR)) => file = again,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests;
