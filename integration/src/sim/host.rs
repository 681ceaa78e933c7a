//! A simulated host: one folder that holds everything the programs under test share.
//!
//! | in the folder | what |
//! |---|---|
//! | `store/` | sockets of the simulated XenStore |
//! | `xen/` | domains' memory and event channels |
//! | `control/` | what `/run/blktap-control` is on a real host |
//!
//! The thin binaries of this crate find it through the environment variable [`VARIABLE`]; the programs that ship know
//! nothing of it.

use std::io;
use std::path::{Path, PathBuf};

use blkif::DomId;
use evtchn::EventChannel;
use tap_ctl::ControlDir;
use tapdisk::xen::{Xen, restrict};

use super::events::SimEvents;
use super::grants::SimGrants;

/// Names the folder of the simulated host.
pub const VARIABLE: &str = "XENIO_SIM_HOST";

/// Names the user that tapdisks of the simulated host become, if root starts them. None without it.
pub const USER: &str = "XENIO_SIM_USER";

/// The backend's own domain.
pub const BACKEND: DomId = DomId(0);

/// A simulated host.
#[derive(Clone, Debug)]
pub struct SimHost {
    dir: PathBuf,
}

impl SimHost {
    /// The host in `dir`, whose subfolders are made.
    pub fn create(dir: &Path) -> io::Result<SimHost> {
        let host = SimHost { dir: dir.to_owned() };
        for folder in [host.store(), host.xen(), host.control().root().to_owned()] {
            std::fs::create_dir_all(folder)?;
        }
        Ok(host)
    }

    /// The host that this process was started on.
    ///
    /// # Panics
    ///
    /// If [`VARIABLE`] is not set: only the tests start these programs.
    #[must_use]
    pub fn from_environment() -> SimHost {
        match std::env::var_os(VARIABLE) {
            Some(dir) => SimHost { dir: dir.into() },
            None => panic!("{VARIABLE} is not set: this program runs on a simulated host only"),
        }
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Folder of XenStore's sockets.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// Folder of the simulated hypervisor.
    #[must_use]
    pub fn xen(&self) -> PathBuf {
        self.dir.join("xen")
    }

    /// The runtime folder of tapdisks.
    #[must_use]
    pub fn control(&self) -> ControlDir {
        ControlDir::at(self.dir.join("control"))
    }
}

impl Xen for SimHost {
    type Grants = SimGrants;
    type Events = SimEvents;

    fn open_grants(&self) -> io::Result<SimGrants> {
        SimGrants::open(&self.xen(), BACKEND)
    }

    fn open_events(&self, dom: DomId) -> io::Result<SimEvents> {
        let events = SimEvents::open(&self.xen(), BACKEND)?;
        restrict(dom, |dom| events.restrict(dom))?;
        Ok(events)
    }

    fn statistics(&self) -> PathBuf {
        self.control().statistics(std::process::id())
    }

    fn user(&self) -> Option<String> {
        std::env::var(USER).ok()
    }

    fn folders(&self) -> Vec<PathBuf> {
        vec![self.xen()]
    }
}
