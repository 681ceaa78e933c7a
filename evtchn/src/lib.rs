//! Event channels: how a frontend and we wake each other.
//!
//! [`EventChannel`] is the seam between the data plane and the hypervisor: the real one is [`device::EvtchnDev`] over
//! `/dev/xen/evtchn`, the simulated one lives in `integration`.
//!
//! Rules of the device that every implementation keeps (Linux `drivers/xen/evtchn.c`):
//!
//! - a port that fires is **masked** and queued once; it stays silent until [`EventChannel::unmask`]. So there is at
//!   most one queued event for each port, and unmasking late is the natural brake on a guest that floods us;
//! - the descriptor becomes readable when the queue goes from empty to non-empty: read until [`EventChannel::pending`]
//!   returns 0 before waiting again;
//! - order: take pending ports, drain the ring including its final check, then unmask.

pub mod device;
pub mod ioctl;

use std::io;
use std::os::fd::AsFd;

pub use blkif::{DomId, Port};

/// A set of bound event channels behind one pollable descriptor.
pub trait EventChannel: AsFd {
    /// Limits this descriptor to ports of domain `dom`, for good; what is bound stays bound.
    ///
    /// # Errors
    ///
    /// `EACCES` if it is limited already; `EINVAL` for domain 0 and for Xen's reserved domain ids; `ENOSYS` from a kernel that
    /// does not know it (before Linux 4.8).
    fn restrict(&self, dom: DomId) -> io::Result<()>;

    /// Binds the unbound port `remote` that domain `dom` allotted to us; returns our local port.
    ///
    /// A freshly bound port fires once. Fails with `EINVAL` if the remote port is not an unbound one reserved for us, and
    /// with `EACCES` if the descriptor is [limited](EventChannel::restrict) to another domain.
    fn bind(&mut self, dom: DomId, remote: Port) -> io::Result<Port>;

    /// Unbinds a local port. The peer can be bound again afterwards.
    fn unbind(&mut self, local: Port) -> io::Result<()>;

    /// Takes queued local ports, without blocking, into the front of `out`; 0 means none is left.
    ///
    /// Every port returned is masked until [`EventChannel::unmask`].
    fn pending(&self, out: &mut [Port]) -> io::Result<usize>;

    /// Lets a local port fire again.
    fn unmask(&self, local: Port) -> io::Result<()>;

    /// Signals the other end of a local port.
    fn notify(&self, local: Port) -> io::Result<()>;
}
