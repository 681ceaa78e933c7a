//! How often a domain has called its simulated devices.
//!
//! One call is one system call on the real devices, whatever it is made of here. The counters are in a file of the simulated
//! hypervisor's folder, `dom<N>.calls`, so that a test or a bench sees what another process does.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use blkif::DomId;

use super::memory::SharedFile;

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Grants were mapped: an ioctl and an `mmap`.
    Map,
    /// A mapping was given back: a `munmap` and an ioctl.
    Unmap,
    /// A batch of grant copies: an ioctl.
    Copy,
    /// Fired event channels were asked for: a `read`.
    Pending,
    /// An event channel was let fire again: a `write`.
    Unmask,
    /// The other end was notified: an ioctl.
    Notify,
}

impl Call {
    /// Every kind.
    pub const ALL: [Call; 6] =
        [Call::Map, Call::Unmap, Call::Copy, Call::Pending, Call::Unmask, Call::Notify];
}

/// The counters of one domain, of all its processes together.
#[derive(Debug)]
pub struct Calls {
    file: SharedFile,
}

impl Calls {
    fn path(dir: &Path, dom: DomId) -> PathBuf {
        dir.join(format!("dom{dom}.calls"))
    }

    /// Opens the counters of a domain, made when they are first opened.
    pub fn open(dir: &Path, dom: DomId) -> io::Result<Calls> {
        let path = Calls::path(dir, dom);
        match SharedFile::create(&path, Call::ALL.len() * size_of::<u32>()) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Ok(Calls { file: SharedFile::open(&path)? })
            }
            other => Ok(Calls { file: other? }),
        }
    }

    /// Counts a call.
    pub fn count(&self, call: Call) {
        self.file.word(call as usize * size_of::<u32>()).fetch_add(1, Ordering::Relaxed);
    }

    /// Calls of this kind so far, modulo 2³².
    pub fn so_far(&self, call: Call) -> u32 {
        self.file.word(call as usize * size_of::<u32>()).load(Ordering::Relaxed)
    }
}
