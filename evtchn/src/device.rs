//! `/dev/xen/evtchn`.
//!
//! # Invariants of this file
//!
//! - Every ioctl gets a pointer to a live argument of the layout its number stands for, or none where it takes none
//!   (see [`ioctl`]).
#![expect(unsafe_code, reason = "ioctls; see the invariant above")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;

use crate::ioctl;
use crate::{DomId, EventChannel, Port};

/// The device's path on Linux.
pub const PATH: &str = "/dev/xen/evtchn";

/// Ports taken from the device in one read.
const PORTS_PER_READ: usize = 64;

/// An open event channel device with the ports bound through it. Dropping it unbinds them all.
///
/// # Overflow
///
/// The kernel's queue of fired ports has room for every bound port, so it does not overflow; should it do so all the
/// same, it says `EFBIG`, drops events and leaves their ports masked. [`EventChannel::pending`] then resets the queue
/// and reports **every** bound port once. Callers need no case of their own: they look at a ring that may hold nothing
/// and unmask its port, both of which are harmless.
#[derive(Debug)]
pub struct EvtchnDev {
    fd: OwnedFd,
    ports: RefCell<Ports>,
}

impl EvtchnDev {
    /// Opens the device, not blocking.
    pub fn open() -> io::Result<EvtchnDev> {
        EvtchnDev::open_at(Path::new(PATH))
    }

    /// [`EvtchnDev::open`] for a device node elsewhere.
    pub fn open_at(path: &Path) -> io::Result<EvtchnDev> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let file = opened.map_err(|error| {
            let advice = "is this a Xen domain, is the module xen-evtchn loaded, and may we open it?";
            io::Error::new(error.kind(), format!("cannot open {}: {error}; {advice}", path.display()))
        })?;
        Ok(EvtchnDev { fd: file.into(), ports: RefCell::default() })
    }

    fn on_port(&self, request: libc::c_ulong, local: Port) -> io::Result<()> {
        // SAFETY: the argument is a live u32, as both requests that come here take.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, &raw const local.0) };
        Errno::result(result)?;
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        // SAFETY: the request takes no argument.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::RESET) };
        Errno::result(result)?;
        Ok(())
    }

    /// Reads up to `out.len()` ports; an overflow is an error here.
    fn read_ports(&self, out: &mut [Port]) -> Result<usize, Errno> {
        let mut buffer = [0; PORTS_PER_READ * size_of::<u32>()];
        let wanted = out.len().min(PORTS_PER_READ) * size_of::<u32>();
        let Some(buffer) = buffer.get_mut(..wanted).filter(|buffer| !buffer.is_empty()) else { return Ok(0) };
        let got = loop {
            match nix::unistd::read(&self.fd, buffer) {
                Ok(got) => break got,
                Err(Errno::EAGAIN) => return Ok(0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        };
        let (ports, _) = buffer.get(..got).unwrap_or_default().as_chunks();
        for (to, from) in out.iter_mut().zip(ports) {
            *to = Port(u32::from_ne_bytes(*from));
        }
        Ok(ports.len())
    }
}

/// A device that is open already, not blocking, and through which nothing is bound.
impl From<OwnedFd> for EvtchnDev {
    fn from(fd: OwnedFd) -> EvtchnDev {
        EvtchnDev { fd, ports: RefCell::default() }
    }
}

/// For another process; nothing may be bound.
impl From<EvtchnDev> for OwnedFd {
    fn from(events: EvtchnDev) -> OwnedFd {
        events.fd
    }
}

impl AsFd for EvtchnDev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl EventChannel for EvtchnDev {
    fn restrict(&self, dom: DomId) -> io::Result<()> {
        // SAFETY: the argument is a live u16.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::RESTRICT_DOMID, &raw const dom.0) };
        Errno::result(result)?;
        Ok(())
    }

    fn bind(&mut self, dom: DomId, remote: Port) -> io::Result<Port> {
        let argument = ioctl::Remote { domain: u32::from(dom.0), port: remote.0 };
        // SAFETY: the argument is of the ioctl's layout.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::BIND_INTERDOMAIN, &raw const argument) };
        let local = Errno::result(result)?;
        // A result that is no error is not negative.
        let local = Port(local.unsigned_abs());
        self.ports.get_mut().bound.insert(local);
        Ok(local)
    }

    fn unbind(&mut self, local: Port) -> io::Result<()> {
        self.on_port(ioctl::UNBIND, local)?;
        self.ports.get_mut().forget(local);
        Ok(())
    }

    fn pending(&self, out: &mut [Port]) -> io::Result<usize> {
        let mut ports = self.ports.borrow_mut();
        if ports.suspects.is_empty() {
            match self.read_ports(out) {
                Ok(got) => return Ok(got),
                Err(Errno::EFBIG) => {
                    self.reset()?;
                    ports.suspect_all();
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(ports.take_suspects(out))
    }

    fn unmask(&self, local: Port) -> io::Result<()> {
        loop {
            match nix::unistd::write(&self.fd, &local.0.to_ne_bytes()) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn notify(&self, local: Port) -> io::Result<()> {
        self.on_port(ioctl::NOTIFY, local)
    }
}

/// The ports bound, and those whose events an overflow may have swallowed and that are still to be reported.
#[derive(Debug, Default)]
struct Ports {
    bound: BTreeSet<Port>,
    suspects: BTreeSet<Port>,
}

impl Ports {
    fn forget(&mut self, port: Port) {
        self.bound.remove(&port);
        self.suspects.remove(&port);
    }

    fn suspect_all(&mut self) {
        self.suspects.clone_from(&self.bound);
    }

    fn take_suspects(&mut self, out: &mut [Port]) -> usize {
        let mut taken = 0;
        for to in out {
            let Some(port) = self.suspects.pop_first() else { break };
            *to = port;
            taken += 1;
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The device's read and write sides, as a socket whose other end the test holds.
    fn device() -> (EvtchnDev, UnixStream) {
        let (ours, kernel) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (EvtchnDev { fd: ours.into(), ports: RefCell::default() }, kernel)
    }

    #[test]
    fn fired_ports_are_read_until_none_is_left() {
        let (device, mut kernel) = device();
        for port in [7u32, 8, 0x0102_0304] {
            kernel.write_all(&port.to_ne_bytes()).unwrap();
        }
        let mut out = [Port(0); 2];
        assert_eq!(device.pending(&mut []).unwrap(), 0);
        assert_eq!(device.pending(&mut out).unwrap(), 2);
        assert_eq!(out, [Port(7), Port(8)]);
        assert_eq!(device.pending(&mut out).unwrap(), 1);
        assert_eq!(out[0], Port(0x0102_0304));
        assert_eq!(device.pending(&mut out).unwrap(), 0);
    }

    #[test]
    fn more_room_than_one_read_takes_is_no_fault() {
        let (device, mut kernel) = device();
        for port in 0..100u32 {
            kernel.write_all(&port.to_ne_bytes()).unwrap();
        }
        let mut out = [Port(0); 200];
        let first = device.pending(&mut out).unwrap();
        assert_eq!(first, PORTS_PER_READ);
        assert_eq!(device.pending(&mut out[first..]).unwrap(), 100 - first);
        assert!(out.iter().take(100).enumerate().all(|(i, port)| port.0 as usize == i));
    }

    #[test]
    fn unmask_writes_the_port() {
        let (device, mut kernel) = device();
        device.unmask(Port(9)).unwrap();
        let mut word = [0; 4];
        kernel.read_exact(&mut word).unwrap();
        assert_eq!(u32::from_ne_bytes(word), 9);
    }

    #[test]
    fn after_an_overflow_every_bound_port_is_reported_once() {
        let mut ports = Ports::default();
        ports.bound.extend([Port(3), Port(1), Port(2), Port(4)]);
        ports.suspect_all();
        ports.forget(Port(2));
        let mut out = [Port(0); 2];
        assert_eq!((ports.take_suspects(&mut out), out), (2, [Port(1), Port(3)]));
        assert_eq!((ports.take_suspects(&mut out), out[0]), (1, Port(4)));
        assert_eq!(ports.take_suspects(&mut out), 0);
        assert_eq!(ports.bound.len(), 3);
    }

    #[test]
    fn suspects_come_before_the_queue() {
        let (mut device, mut kernel) = device();
        kernel.write_all(&5u32.to_ne_bytes()).unwrap();
        device.ports.get_mut().bound.extend([Port(1)]);
        device.ports.get_mut().suspect_all();
        let mut out = [Port(0); 4];
        assert_eq!((device.pending(&mut out).unwrap(), out[0]), (1, Port(1)));
        assert_eq!((device.pending(&mut out).unwrap(), out[0]), (1, Port(5)));
    }

    #[test]
    fn errors_of_the_device_reach_the_caller() {
        let (mut device, _kernel) = device();
        for error in [
            device.bind(DomId(1), Port(1)).unwrap_err(),
            device.notify(Port(1)).unwrap_err(),
            device.restrict(DomId(1)).unwrap_err(),
        ] {
            assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        }
    }

    #[test]
    fn missing_device_is_named() {
        let error = EvtchnDev::open_at(Path::new("/nonexistent/evtchn")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("/nonexistent/evtchn"), "{error}");
    }
}
