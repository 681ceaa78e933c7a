//! The requests of `/dev/xen/evtchn` and their arguments, as numbers and layouts.
//!
//! Source: Linux `include/uapi/xen/evtchn.h`.

/// An ioctl number of direction "none": the only one Xen's devices use, also where the argument is read.
/// Valid for x86 and ARM, where that direction is 0.
const fn number(kind: u8, nr: u8, argument_size: usize) -> libc::Ioctl {
    assert!(argument_size < 1 << 14, "the size field of an ioctl number has 14 bits");
    ((argument_size as libc::Ioctl) << 16) | ((kind as libc::Ioctl) << 8) | nr as libc::Ioctl
}

/// Binds to a port that another domain allotted to us; the result is our local port. The argument is a [`Remote`].
pub const BIND_INTERDOMAIN: libc::Ioctl = number(b'E', 1, size_of::<Remote>());
/// Gives a local port back. The argument is the port, a `u32`.
pub const UNBIND: libc::Ioctl = number(b'E', 3, size_of::<u32>());
/// Signals the other end of a local port. The argument is the port, a `u32`.
pub const NOTIFY: libc::Ioctl = number(b'E', 4, size_of::<u32>());
/// Empties the queue and clears its overflow. No argument.
pub const RESET: libc::Ioctl = number(b'E', 5, 0);
/// Limits the descriptor to one remote domain, for good. The argument is the domain, a `u16`.
pub const RESTRICT_DOMID: libc::Ioctl = number(b'E', 6, size_of::<u16>());

/// `struct ioctl_evtchn_bind_interdomain`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Remote {
    /// The other domain.
    pub domain: u32,
    /// Its port.
    pub port: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(BIND_INTERDOMAIN, 0x0008_4501);
        assert_eq!(UNBIND, 0x0004_4503);
        assert_eq!(NOTIFY, 0x0004_4504);
        assert_eq!(RESET, 0x0000_4505);
        assert_eq!(RESTRICT_DOMID, 0x0002_4506);
    }
}
