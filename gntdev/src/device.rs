//! `/dev/xen/gntdev`.
//!
//! # Invariants of this file
//!
//! - Every ioctl gets a pointer to a live argument of the layout its number stands for (see [`ioctl`]).
//! - A [`Mapping`] owns exactly one `mmap` of this device, and the record behind it; both are given back once, on drop:
//!   the mapping first, because the device forgets a record only when nothing maps it any more.
//! - No reference to mapped memory is ever made here.
#![expect(unsafe_code, reason = "ioctls and mmap; see the invariants above")]

use std::fs::OpenOptions;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use blkif::ids::PAGE_SIZE;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};

use crate::ioctl::{self, MapRef};
use crate::{Access, CopyDirection, CopySegment, DomId, GrantMap, GrantRef, Grants};

/// The device's path on Linux.
pub const PATH: &str = "/dev/xen/gntdev";

/// An open grant device.
///
/// Mappings keep it open. Closing it for good, also by a crash, unmaps everything mapped through it.
#[derive(Clone, Debug)]
pub struct GntDev {
    fd: Arc<OwnedFd>,
}

impl GntDev {
    /// Opens the device and makes sure that it can copy.
    ///
    /// # Errors
    ///
    /// The device is missing or not ours to open; `Unsupported` if the kernel has no grant copy (before Linux 4.8).
    pub fn open() -> io::Result<GntDev> {
        GntDev::open_at(Path::new(PATH))
    }

    /// [`GntDev::open`] for a device node elsewhere.
    pub fn open_at(path: &Path) -> io::Result<GntDev> {
        GntDev::over(GntDev::device(path)?)
    }

    /// Opens the device for another process, which makes it a `GntDev` by [`GntDev::over`].
    ///
    /// # Errors
    ///
    /// The device is missing or not ours to open.
    pub fn device(path: &Path) -> io::Result<OwnedFd> {
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path);
        let file = opened.map_err(|error| {
            let advice = "is this a Xen domain, is the module xen-gntdev loaded, and may we open it?";
            io::Error::new(error.kind(), format!("cannot open {}: {error}; {advice}", path.display()))
        })?;
        Ok(file.into())
    }

    /// A device that is open already; makes sure that it can copy.
    ///
    /// # Errors
    ///
    /// `Unsupported` if the kernel has no grant copy.
    pub fn over(fd: OwnedFd) -> io::Result<GntDev> {
        let gntdev = GntDev { fd: Arc::new(fd) };
        gntdev.probe().map_err(|error| {
            let advice = "a kernel from Linux 4.8 on is needed";
            io::Error::new(
                io::ErrorKind::Unsupported,
                format!("the grant device cannot copy: {error}; {advice}"),
            )
        })?;
        Ok(gntdev)
    }

    /// A copy of nothing, which succeeds exactly if the device knows the ioctl.
    fn probe(&self) -> io::Result<()> {
        self.copy_raw(&mut [])
    }

    fn copy_raw(&self, segments: &mut [CopySegment]) -> io::Result<()> {
        let count = count(segments.len())?;
        let mut argument = ioctl::GrantCopy { count, segments: segments.as_mut_ptr() };
        // SAFETY: the argument is of the ioctl's layout and names `count` live segments, which have the kernel's layout
        // (copy.rs). That the segments' own addresses are valid is the promise of `Grants::copy`'s caller.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::GRANT_COPY, &raw mut argument) };
        nix::errno::Errno::result(result)?;
        Ok(())
    }

    /// Tells the device which grants the next `mmap` is about; returns the offset for it.
    fn record(&self, dom: DomId, refs: &[GrantRef]) -> io::Result<u64> {
        let mut argument = MapArgument::new(dom, refs)?;
        // SAFETY: the argument is of the ioctl's layout: a header that counts the references behind it.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::MAP_GRANT_REF, argument.0.as_mut_ptr()) };
        nix::errno::Errno::result(result)?;
        Ok(argument.index())
    }

    fn forget(&self, index: u64, count: u32) -> io::Result<()> {
        let argument = ioctl::Unmap { index, count, pad: 0 };
        // SAFETY: the argument is of the ioctl's layout.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), ioctl::UNMAP_GRANT_REF, &raw const argument) };
        nix::errno::Errno::result(result)?;
        Ok(())
    }

    /// Maps what was recorded at `index`. The hypervisor sees the grants only now.
    fn map_recorded(&self, index: u64, pages: usize, access: Access) -> io::Result<NonNull<u8>> {
        let bytes = pages
            .checked_mul(PAGE_SIZE)
            .and_then(NonZeroUsize::new)
            .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let offset = libc::off_t::try_from(index).map_err(io::Error::other)?;
        let protection = match access {
            Access::ReadOnly => ProtFlags::PROT_READ,
            Access::ReadWrite => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        };
        // SAFETY: the kernel picks a free range of addresses, so no existing mapping changes.
        let base = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, &self.fd, offset) }?;
        // A child must not inherit the pages: the grants would stay in use after we gave them back.
        // SAFETY: `base` is the mapping just made, of that length.
        let advised = unsafe { madvise(base, bytes.get(), MmapAdvise::MADV_DONTFORK) };
        if let Err(errno) = advised {
            // SAFETY: the mapping just made, of which nobody knows yet.
            unsafe { munmap(base, bytes.get()) }?;
            return Err(errno.into());
        }
        Ok(base.cast())
    }
}

impl Grants for GntDev {
    type Map = Mapping;

    fn map(&self, dom: DomId, refs: &[GrantRef], access: Access) -> io::Result<Mapping> {
        let count = count(refs.len())?;
        let index = self.record(dom, refs)?;
        match self.map_recorded(index, refs.len(), access) {
            Ok(base) => Ok(Mapping { device: self.clone(), base, pages: refs.len(), index, count }),
            Err(error) => {
                self.forget(index, count)?;
                Err(error)
            }
        }
    }

    unsafe fn copy(&self, direction: CopyDirection, segments: &mut [CopySegment]) -> io::Result<()> {
        debug_assert!(segments.iter().all(|segment| segment.direction() == direction));
        self.copy_raw(segments)
    }
}

impl AsFd for GntDev {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Granted pages in our address space. Dropping it unmaps them.
///
/// The kernel gives a page back to its domain only when no I/O refers to it any more, which may be after the drop.
#[derive(Debug)]
pub struct Mapping {
    device: GntDev,
    base: NonNull<u8>,
    pages: usize,
    index: u64,
    count: u32,
}

impl GrantMap for Mapping {
    fn as_ptr(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.pages * PAGE_SIZE
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let bytes = self.len();
        // SAFETY: the mapping is ours alone, and whoever used its pointer does no longer (GrantMap's contract).
        let unmapped = unsafe { munmap(self.base.cast(), bytes) };
        if let Err(errno) = unmapped {
            log::error!("cannot unmap {} granted pages: {errno}; they stay in use until we exit", self.pages);
            return;
        }
        if let Err(error) = self.device.forget(self.index, self.count) {
            log::error!("{PATH} does not forget {} unmapped pages: {error}", self.pages);
        }
    }
}

/// The argument of [`ioctl::MAP_GRANT_REF`]: two 64-bit words of header, then one for each reference.
struct MapArgument(Vec<[u32; 2]>);

const _: () = {
    assert!(size_of::<ioctl::MapHeader>() == 2 * size_of::<[u32; 2]>());
    assert!(std::mem::offset_of!(ioctl::MapHeader, index) == size_of::<[u32; 2]>());
    assert!(size_of::<MapRef>() == size_of::<[u32; 2]>());
    assert!(std::mem::offset_of!(MapRef, gref) == size_of::<u32>());
};

impl MapArgument {
    fn new(dom: DomId, refs: &[GrantRef]) -> io::Result<MapArgument> {
        let mut words = Vec::with_capacity(refs.len().saturating_add(2));
        words.push([count(refs.len())?, 0]);
        words.push([0, 0]);
        words.extend(refs.iter().map(|gref| [u32::from(dom.0), gref.0]));
        Ok(MapArgument(words))
    }

    /// What the device stored in the second word.
    fn index(&self) -> u64 {
        let [a, b] = self.0.get(1).copied().unwrap_or_default();
        let ([a, b, c, d], [e, f, g, h]) = (a.to_ne_bytes(), b.to_ne_bytes());
        u64::from_ne_bytes([a, b, c, d, e, f, g, h])
    }
}

fn count(len: usize) -> io::Result<u32> {
    u32::try_from(len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_argument_has_the_kernels_layout() {
        let mut argument = MapArgument::new(DomId(5), &[GrantRef(8), GrantRef(0xffff_fff0)]).unwrap();
        assert_eq!(argument.0, [[2, 0], [0, 0], [5, 8], [5, 0xffff_fff0]]);
        argument.0[1] = [0x1000, 3];
        assert_eq!(
            argument.index(),
            if cfg!(target_endian = "little") { 0x3_0000_1000 } else { 0x1000_0000_0003 }
        );
    }

    #[test]
    fn missing_device_is_named() {
        let error = GntDev::open_at(Path::new("/nonexistent/gntdev")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(error.to_string().contains("/nonexistent/gntdev"), "{error}");
    }

    #[test]
    fn device_that_cannot_copy_is_refused_at_open() {
        let error = GntDev::open_at(Path::new("/dev/null")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn errors_of_the_device_reach_the_caller() {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        let gntdev = GntDev { fd: Arc::new(null.into()) };
        let error = gntdev.map(DomId(1), &[GrantRef(8)], Access::ReadWrite).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
    }
}
