//! `/dev/xen/evtchn`.
//!
//! Facts are from Linux `include/uapi/xen/evtchn.h` (layouts, numbers) and `drivers/xen/evtchn.c` (behaviour).
//!
//! Invariant this file owns: every ioctl gets a pointer to a structure of exactly the size in its number, valid for the
//! call.
#![expect(unsafe_code, reason = "ioctls of the event channel device")]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::{DomId, EventChannel, Port};

/// Ports taken by one read: the device gives at most a page of them.
const PORTS_PER_READ: usize = 64;

/// The number of an ioctl of this device: no direction bits, the argument's size, type 'E'.
pub const fn ioctl_number(nr: u32, size: usize) -> u64 {
    ((size as u64) << 16) | ((b'E' as u64) << 8) | nr as u64
}

const BIND_INTERDOMAIN: u64 = ioctl_number(1, size_of::<BindInterdomain>());
const UNBIND: u64 = ioctl_number(3, size_of::<PortArgument>());
const NOTIFY: u64 = ioctl_number(4, size_of::<PortArgument>());
const RESET: u64 = ioctl_number(5, 0);

#[repr(C)]
struct BindInterdomain {
    remote_domain: u32,
    remote_port: u32,
}

#[repr(C)]
struct PortArgument {
    port: u32,
}

/// An open event channel device. Closing it unbinds all its ports.
#[derive(Debug)]
pub struct EvtchnDev {
    file: File,
    bound: Vec<Port>,
}

impl EvtchnDev {
    /// Opens the device.
    pub fn open() -> io::Result<EvtchnDev> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/xen/evtchn")
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("/dev/xen/evtchn: {error} (is this a Xen dom0 with xen-evtchn loaded?)"),
                )
            })?;
        Ok(EvtchnDev { file, bound: Vec::new() })
    }

    /// # Safety
    ///
    /// `argument` is the structure that `number` stands for; these contain no pointers.
    unsafe fn ioctl<T>(&self, number: u64, argument: &mut T) -> io::Result<i32> {
        // SAFETY: by the caller's promise; the descriptor is open.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), number, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }

    /// Empties the device's queue after an overflow, which the kernel promises not to happen: it grows the queue with the
    /// number of ports. Queued ports stay masked, so all count as fired.
    fn recover(&self) -> io::Result<()> {
        // SAFETY: RESET takes no argument.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), RESET) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for EvtchnDev {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl EventChannel for EvtchnDev {
    fn bind(&mut self, dom: DomId, remote: Port) -> io::Result<Port> {
        let mut bind = BindInterdomain { remote_domain: u32::from(dom.0), remote_port: remote.0 };
        // SAFETY: the structure is BIND_INTERDOMAIN's.
        let local = unsafe { self.ioctl(BIND_INTERDOMAIN, &mut bind) }?;
        let local = Port(u32::try_from(local).map_err(io::Error::other)?);
        self.bound.push(local);
        Ok(local)
    }

    fn unbind(&mut self, local: Port) -> io::Result<()> {
        let mut argument = PortArgument { port: local.0 };
        // SAFETY: the structure is UNBIND's.
        unsafe { self.ioctl(UNBIND, &mut argument) }?;
        self.bound.retain(|&port| port != local);
        Ok(())
    }

    fn pending(&self, out: &mut [Port]) -> io::Result<usize> {
        let mut bytes = [0; PORTS_PER_READ * size_of::<u32>()];
        let room = out.len().min(PORTS_PER_READ) * size_of::<u32>();
        let count = match (&self.file).read(bytes.get_mut(..room).unwrap_or_default()) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.raw_os_error() == Some(libc::EFBIG) => {
                self.recover()?;
                let count = self.bound.len().min(out.len());
                out.iter_mut().zip(&self.bound).for_each(|(to, from)| *to = *from);
                return Ok(count);
            }
            Err(error) => return Err(error),
        };
        let (ports, _) = bytes.get(..count).unwrap_or_default().as_chunks::<4>();
        out.iter_mut().zip(ports).for_each(|(to, from)| *to = Port(u32::from_ne_bytes(*from)));
        Ok(ports.len())
    }

    fn unmask(&self, local: Port) -> io::Result<()> {
        (&self.file).write_all(&local.0.to_ne_bytes())
    }

    fn notify(&self, local: Port) -> io::Result<()> {
        let mut argument = PortArgument { port: local.0 };
        // SAFETY: the structure is NOTIFY's.
        unsafe { self.ioctl(NOTIFY, &mut argument) }.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        assert_eq!(BIND_INTERDOMAIN, 0x0008_4501);
        assert_eq!(UNBIND, 0x0004_4503);
        assert_eq!(NOTIFY, 0x0004_4504);
        assert_eq!(RESET, 0x0000_4505);
    }
}
