//! Which hypervisor: the real devices, or a simulation in the tests.

use std::io;
use std::path::PathBuf;

use evtchn::EventChannel;
use gntdev::Grants;
use tap_ctl::ControlDir;

/// Opens the two devices: grants for each worker thread, event channels for each ring.
pub trait Xen: Clone + Send + 'static {
    /// Grant mapping and copy.
    type Grants: Grants + 'static;
    /// Event channels.
    type Events: EventChannel + 'static;

    /// Opens the grant device.
    fn open_grants(&self) -> io::Result<Self::Grants>;
    /// Opens the event channel device.
    fn open_events(&self) -> io::Result<Self::Events>;
    /// The folder where xentop looks for this process's statistics.
    fn statistics(&self) -> PathBuf;
    /// The user that a tapdisk becomes which was started by root, if the host has it; see [`crate::porter`].
    fn user(&self) -> Option<String>;
    /// Folders that this user reaches itself, not through the porter: where the devices are files.
    fn folders(&self) -> Vec<PathBuf>;
}

/// `/dev/xen/gntdev` and `/dev/xen/evtchn`.
#[derive(Clone, Copy, Debug)]
pub struct DeviceXen;

impl Xen for DeviceXen {
    type Grants = gntdev::device::GntDev;
    type Events = evtchn::device::EvtchnDev;

    fn open_grants(&self) -> io::Result<Self::Grants> {
        gntdev::device::GntDev::open()
    }

    fn open_events(&self) -> io::Result<Self::Events> {
        evtchn::device::EvtchnDev::open()
    }

    fn statistics(&self) -> PathBuf {
        ControlDir::default().statistics(std::process::id())
    }

    fn user(&self) -> Option<String> {
        Some("xenio-tapdisk".to_owned())
    }

    fn folders(&self) -> Vec<PathBuf> {
        Vec::new()
    }
}
