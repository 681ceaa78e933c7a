//! `/dev/xen/gntdev`.
//!
//! Facts are from Linux `include/uapi/xen/gntdev.h` (layouts, numbers) and `drivers/xen/gntdev.c` (behaviour).
//!
//! Invariants this file owns:
//!
//! 1. every ioctl gets a pointer to a structure of exactly the size in its number, valid for the call;
//! 2. a mapping is created at the offset and with the length that MAP_GRANT_REF gave, and ends in this order: `munmap`,
//!    then UNMAP_GRANT_REF (the ioctl only removes the record; the pages go with the last mapping);
//! 3. the descriptor outlives its mappings: each [`DeviceMap`] holds a share of it.
#![expect(unsafe_code, reason = "ioctls and mmap of the grant device")]

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::rc::Rc;

use blkif::ids::PAGE_SIZE;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::{Access, CopyDirection, CopySegment, DomId, GrantMap, GrantRef, Grants};

/// Most pages in one mapping: the largest ring has 16.
const MAX_PAGES: usize = 16;

/// The number of an ioctl of this device: no direction bits, the argument's size, type 'G'.
pub const fn ioctl_number(nr: u32, size: usize) -> u64 {
    ((size as u64) << 16) | ((b'G' as u64) << 8) | nr as u64
}

/// MAP_GRANT_REF declares room for one reference; more follow behind it.
const MAP_GRANT_REF: u64 = ioctl_number(0, 24);
const UNMAP_GRANT_REF: u64 = ioctl_number(1, size_of::<UnmapGrantRef>());
const GRANT_COPY: u64 = ioctl_number(8, size_of::<GrantCopy>());

#[repr(C)]
struct MapGrantRef {
    count: u32,
    pad: u32,
    index: u64,
    refs: [MapRef; MAX_PAGES],
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct MapRef {
    domid: u32,
    gref: u32,
}

#[repr(C)]
struct UnmapGrantRef {
    index: u64,
    count: u32,
    pad: u32,
}

#[repr(C)]
struct GrantCopy {
    count: u32,
    pad: u32,
    segments: *mut CopySegment,
}

/// An open grant device.
#[derive(Debug)]
pub struct GntDev {
    file: Rc<File>,
}

impl GntDev {
    /// Opens the device and checks that it copies (Linux 4.8 and later).
    pub fn open() -> io::Result<GntDev> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/xen/gntdev").map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("/dev/xen/gntdev: {error} (is this a Xen dom0 with xen-gntdev loaded?)"),
            )
        })?;
        let device = GntDev { file: Rc::new(file) };
        let mut none = GrantCopy { count: 0, pad: 0, segments: std::ptr::null_mut() };
        // SAFETY: invariant 1; with a count of 0 no segment is looked at.
        unsafe { device.ioctl(GRANT_COPY, &mut none) }?;
        Ok(device)
    }

    /// # Safety
    ///
    /// `argument` is the structure that `number` stands for, and every pointer in it is good for what the ioctl does.
    unsafe fn ioctl<T>(&self, number: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: by the caller's promise; the descriptor is open.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), number, std::ptr::from_mut(argument)) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn unmap_record(&self, index: u64, count: u32) -> io::Result<()> {
        let mut unmap = UnmapGrantRef { index, count, pad: 0 };
        // SAFETY: invariant 1; there is no pointer in it.
        unsafe { self.ioctl(UNMAP_GRANT_REF, &mut unmap) }
    }
}

impl Grants for GntDev {
    type Map = DeviceMap;

    fn map(&self, dom: DomId, refs: &[GrantRef], access: Access) -> io::Result<DeviceMap> {
        let too_many = || io::Error::new(io::ErrorKind::InvalidInput, "a mapping has 1 to 16 pages");
        let count = u32::try_from(refs.len()).map_err(|_| too_many())?;
        let mut map = MapGrantRef { count, pad: 0, index: 0, refs: [MapRef::default(); MAX_PAGES] };
        let places = map.refs.get_mut(..refs.len()).ok_or_else(too_many)?;
        for (place, gref) in places.iter_mut().zip(refs) {
            *place = MapRef { domid: u32::from(dom.0), gref: gref.0 };
        }
        let len = NonZeroUsize::new(refs.len() * PAGE_SIZE).ok_or_else(too_many)?;
        // SAFETY: invariant 1: `count` references follow the header.
        unsafe { self.ioctl(MAP_GRANT_REF, &mut map) }?;
        let device = GntDev { file: self.file.clone() };
        let protection = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        let offset = i64::try_from(map.index).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours (invariant 2).
        let mapped = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &*self.file, offset) };
        match mapped {
            Ok(base) => {
                let map = DeviceMap { base: base.cast(), len, index: map.index, count, device };
                // A forked child must not inherit the guest's pages: on an HVM dom0 they are ordinary memory to fork.
                // SAFETY: the range is our new mapping.
                unsafe { madvise(base, len.get(), MmapAdvise::MADV_DONTFORK) }?;
                Ok(map)
            }
            Err(errno) => {
                device.unmap_record(map.index, count)?;
                Err(errno.into())
            }
        }
    }

    unsafe fn copy(&self, _: CopyDirection, segments: &mut [CopySegment]) -> io::Result<()> {
        let count = u32::try_from(segments.len()).map_err(io::Error::other)?;
        let mut copy = GrantCopy { count, pad: 0, segments: segments.as_mut_ptr() };
        // SAFETY: `segments` has `count` elements of the kernel's own layout; what they point to is the caller's promise.
        unsafe { self.ioctl(GRANT_COPY, &mut copy) }
    }
}

/// Granted pages in our address space.
#[derive(Debug)]
pub struct DeviceMap {
    base: NonNull<u8>,
    len: NonZeroUsize,
    index: u64,
    count: u32,
    device: GntDev,
}

impl GrantMap for DeviceMap {
    fn as_ptr(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len.get()
    }
}

impl Drop for DeviceMap {
    fn drop(&mut self) {
        // SAFETY: invariant 2: base and length are of this mapping, and its users are gone.
        if let Err(errno) = unsafe { munmap(self.base.cast(), self.len.get()) } {
            log::error!("unmapping {} granted pages failed: {errno}", self.count);
        }
        if let Err(error) = self.device.unmap_record(self.index, self.count) {
            log::error!("giving up {} granted pages failed: {error}", self.count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        assert_eq!(MAP_GRANT_REF, 0x0018_4700);
        assert_eq!(UNMAP_GRANT_REF, 0x0010_4701);
        assert_eq!(GRANT_COPY, 0x0010_4708);
    }

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(std::mem::offset_of!(MapGrantRef, index), 8);
        assert_eq!(std::mem::offset_of!(MapGrantRef, refs), 16);
        assert_eq!(size_of::<MapRef>(), 8);
        assert_eq!(std::mem::offset_of!(GrantCopy, segments), 8);
        assert_eq!(size_of::<CopySegment>(), 24);
    }
}
