//! The requests of `/dev/xen/gntdev` and their arguments, as numbers and layouts.
//!
//! Source: Linux `include/uapi/xen/gntdev.h`.

/// An ioctl number of direction "none": the only one Xen's devices use, also where the argument is read or written.
/// Valid for x86 and ARM, where that direction is 0.
const fn number(kind: u8, nr: u8, argument_size: usize) -> libc::Ioctl {
    assert!(argument_size < 1 << 14, "the size field of an ioctl number has 14 bits");
    ((argument_size as libc::Ioctl) << 16) | ((kind as libc::Ioctl) << 8) | nr as libc::Ioctl
}

/// Records grant references for a later `mmap`. The argument is a [`MapHeader`] followed by a [`MapRef`] for each page.
pub const MAP_GRANT_REF: libc::Ioctl = number(b'G', 0, size_of::<MapHeader>() + size_of::<MapRef>());
/// Forgets grant references; `munmap` comes first. The argument is an [`Unmap`].
pub const UNMAP_GRANT_REF: libc::Ioctl = number(b'G', 1, size_of::<Unmap>());
/// Copies to and from granted pages. The argument is a [`GrantCopy`].
pub const GRANT_COPY: libc::Ioctl = number(b'G', 8, size_of::<GrantCopy>());

/// The fixed part of `struct ioctl_gntdev_map_grant_ref`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MapHeader {
    /// In: number of references that follow.
    pub count: u32,
    /// Unused.
    pub pad: u32,
    /// Out: the offset to give to `mmap`.
    pub index: u64,
}

/// `struct ioctl_gntdev_grant_ref`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct MapRef {
    /// The granting domain.
    pub domid: u32,
    /// Its grant reference.
    pub gref: u32,
}

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Unmap {
    /// What [`MAP_GRANT_REF`] returned.
    pub index: u64,
    /// Number of pages, the same as there.
    pub count: u32,
    /// Unused.
    pub pad: u32,
}

/// `struct ioctl_gntdev_grant_copy`.
#[derive(Debug)]
#[repr(C)]
pub struct GrantCopy {
    /// Number of segments.
    pub count: libc::c_uint,
    /// The first of them.
    pub segments: *mut crate::CopySegment,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(MAP_GRANT_REF, 0x0018_4700);
        assert_eq!(UNMAP_GRANT_REF, 0x0010_4701);
        assert_eq!(GRANT_COPY, 0x0010_4708);
        assert_eq!(size_of::<crate::CopySegment>(), 24);
    }
}
