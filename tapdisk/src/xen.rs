//! Which hypervisor: the real devices, or a simulation in the tests.

use std::io;
use std::path::PathBuf;
use std::sync::Once;

use blkif::DomId;
use evtchn::EventChannel;
use gntdev::Grants;
use tap_ctl::ControlDir;

use crate::porter;

/// Opens the two devices: grants for each worker thread, event channels for each ring.
pub trait Xen: Clone + Send + 'static {
    /// Grant mapping and copy.
    type Grants: Grants + 'static;
    /// Event channels.
    type Events: EventChannel + 'static;

    /// Opens the grant device.
    fn open_grants(&self) -> io::Result<Self::Grants>;
    /// Opens the event channel device for ports of one domain.
    fn open_events(&self, dom: DomId) -> io::Result<Self::Events>;
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
        gntdev::device::GntDev::over(porter::grants()?)
    }

    fn open_events(&self, dom: DomId) -> io::Result<Self::Events> {
        Ok(porter::events(dom)?.into())
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

/// Restricts an event channel device to a domain, where the kernel can: it binds nothing else through it from then on
/// (`IOCTL_EVTCHN_RESTRICT_DOMID`, Linux `drivers/xen/evtchn.c`). Before anything is bound through it.
///
/// # Errors
/// The kernel refuses the restriction for another reason than not knowing it.
pub fn restrict(dom: DomId, device: impl FnOnce(DomId) -> io::Result<()>) -> io::Result<()> {
    // A disk of our own for dom0 itself, and the kernel restricts nothing to domain 0.
    if dom == DomId(0) {
        return Ok(());
    }
    match device(dom) {
        // The device answers ENOSYS to what it does not know.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::ENOTTY)) => {
            static TOLD: Once = Once::new();
            TOLD.call_once(|| {
                log::warn!(
                    "this kernel cannot restrict event channels to one domain; they are not restricted"
                );
            });
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_of_dom0_itself_is_not_restricted_because_that_cannot_be() {
        restrict(DomId(0), |_| panic!("the kernel was asked")).unwrap();
    }

    #[test]
    fn an_old_kernel_goes_unrestricted_and_any_other_refusal_is_an_error() {
        let asked = |errno: Option<i32>| {
            restrict(DomId(5), |dom| {
                assert_eq!(dom, DomId(5));
                errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
            })
        };
        for errno in [None, Some(libc::ENOSYS), Some(libc::ENOTTY)] {
            asked(errno).unwrap();
        }
        assert_eq!(asked(Some(libc::EACCES)).unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
