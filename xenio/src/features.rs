//! What a device publishes: what the data plane serves, and what the disk is. The one place to change when the data
//! plane learns something.

use blkif::{RingOrder, keys};
use tap_ctl::proto::{Discard, DiskInfo};

/// Largest ring that tapdisk maps.
pub const MAX_RING_ORDER: RingOrder = RingOrder::MAX;
/// Most rings of one device, however many processors there are: each costs a thread and its memory.
pub const MAX_QUEUES: u32 = 4;
/// Most segments of an indirect request; 0: none are served.
pub const INDIRECT_SEGMENTS: u16 = blkif::MAX_INDIRECT_SEGMENTS;
/// Whether frontends are asked to use the same grants again, so that they can stay mapped.
pub const PERSISTENT: bool = true;

/// Process id of the one who serves the device; xentop finds the disk's statistics by it. Absent from Xen's headers:
/// a convention between XenServer's tapback and xentop (tools/libs/stat/xenstat_linux.c).
pub const KTHREAD_PID: &str = "kthread-pid";

/// A key and the value it is to have.
pub type Entry = (&'static str, String);

/// What the host offers to every frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Most rings of one device, at least 1.
    pub max_queues: u32,
}

/// What the toolstack decided about the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    /// The guest may write.
    pub writable: bool,
    /// The guest sees a CD-ROM drive.
    pub cdrom: bool,
    /// The guest may discard, if the disk can.
    pub discard: bool,
}

/// An open disk as a device's frontend is to see it.
#[derive(Clone, Copy, Debug)]
pub struct Disk<'a> {
    /// What the tapdisk tells.
    pub info: &'a DiskInfo,
    /// What the toolstack decided.
    pub role: Role,
    /// The tapdisk's process id.
    pub pid: i32,
}

impl Disk<'_> {
    fn readonly(&self) -> bool {
        !self.role.writable || self.info.readonly
    }

    /// What the guest may discard; never on a disk that it may not write.
    pub fn discard(&self) -> Option<Discard> {
        self.info.discard.filter(|_| self.role.discard && !self.readonly())
    }
}

/// Everything that is published. A frontend chooses its rings before there is a disk, so what they depend on is complete
/// without one; the rest it reads when the device is Connected.
pub fn published(offer: Offer, disk: Option<Disk<'_>>) -> Vec<Entry> {
    let flag = |set: bool| if set { "1".to_owned() } else { "0".to_owned() };
    let discard = disk.and_then(|disk| disk.discard());
    let mut entries = vec![
        (keys::MAX_RING_PAGE_ORDER, MAX_RING_ORDER.get().to_string()),
        (keys::MAX_RING_PAGES, MAX_RING_ORDER.pages().to_string()),
        (keys::MULTI_QUEUE_MAX_QUEUES, offer.max_queues.to_string()),
        (keys::FEATURE_MAX_INDIRECT_SEGMENTS, INDIRECT_SEGMENTS.to_string()),
        (keys::FEATURE_PERSISTENT, flag(PERSISTENT)),
        (keys::FEATURE_FLUSH_CACHE, flag(true)),
        (keys::FEATURE_BARRIER, flag(true)),
        (keys::FEATURE_DISCARD, flag(discard.is_some())),
    ];
    if let Some(Discard { granularity, alignment, secure }) = discard {
        entries.push((keys::DISCARD_GRANULARITY, granularity.to_string()));
        entries.push((keys::DISCARD_ALIGNMENT, alignment.to_string()));
        entries.push((keys::DISCARD_SECURE, flag(secure)));
    }
    let Some(disk) = disk else { return entries };
    let cdrom = if disk.role.cdrom { keys::info::CDROM } else { 0 };
    let readonly = if disk.readonly() { keys::info::READONLY } else { 0 };
    entries.extend(size(disk.info));
    entries.extend([
        (keys::SECTOR_SIZE, disk.info.sector_size.to_string()),
        (keys::PHYSICAL_SECTOR_SIZE, disk.info.physical_sector_size.to_string()),
        (keys::INFO, (cdrom | readonly).to_string()),
        (KTHREAD_PID, disk.pid.to_string()),
    ]);
    entries
}

/// The one property of a disk that may change under a frontend.
pub fn size(info: &DiskInfo) -> [Entry; 1] {
    [(keys::SECTORS, info.sectors.to_string())]
}

#[cfg(test)]
mod tests {
    use super::*;

    const OFFER: Offer = Offer { max_queues: 4 };
    const ROLE: Role = Role { writable: true, cdrom: false, discard: true };
    const INFO: DiskInfo = DiskInfo {
        sectors: 8,
        sector_size: 512,
        physical_sector_size: 4096,
        readonly: false,
        discard: Some(Discard { granularity: 4096, alignment: 512, secure: true }),
    };

    fn value_of(key: &str, info: &DiskInfo, role: Role) -> Option<String> {
        let entries = published(OFFER, Some(Disk { info, role, pid: 7 }));
        entries.into_iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    fn info_of(writable: bool, cdrom: bool, readonly: bool) -> String {
        value_of("info", &DiskInfo { readonly, ..INFO }, Role { writable, cdrom, ..ROLE }).unwrap()
    }

    #[test]
    fn the_guest_is_told_that_it_may_not_write() {
        assert_eq!(info_of(true, false, false), "0");
        assert_eq!(info_of(false, false, false), "4");
        assert_eq!(info_of(true, false, true), "4");
        assert_eq!(info_of(false, true, false), "5");
    }

    #[test]
    fn discard_is_offered_when_disk_toolstack_and_mode_allow_it() {
        let offered = |info: DiskInfo, role: Role| value_of("feature-discard", &info, role).unwrap();
        assert_eq!(offered(INFO, ROLE), "1");
        assert_eq!(offered(DiskInfo { discard: None, ..INFO }, ROLE), "0");
        assert_eq!(offered(DiskInfo { readonly: true, ..INFO }, ROLE), "0");
        assert_eq!(offered(INFO, Role { writable: false, ..ROLE }), "0");
        assert_eq!(offered(INFO, Role { discard: false, ..ROLE }), "0");
        for (key, value) in
            [("discard-granularity", "4096"), ("discard-alignment", "512"), ("discard-secure", "1")]
        {
            assert_eq!(value_of(key, &INFO, ROLE).as_deref(), Some(value), "{key}");
            assert_eq!(value_of(key, &DiskInfo { discard: None, ..INFO }, ROLE), None, "{key}");
        }
    }

    #[test]
    fn every_key_is_published_once_and_what_rings_depend_on_does_not_wait_for_the_disk() {
        let all = published(OFFER, Some(Disk { info: &INFO, role: ROLE, pid: 7 }));
        let names: std::collections::HashSet<_> = all.iter().map(|(key, _)| key).collect();
        assert_eq!(names.len(), all.len());
        let early = published(OFFER, None);
        for (key, value) in [
            ("max-ring-page-order", "4"),
            ("max-ring-pages", "16"),
            ("multi-queue-max-queues", "4"),
            ("feature-max-indirect-segments", &INDIRECT_SEGMENTS.to_string()),
            ("feature-persistent", "1"),
            ("feature-discard", "0"),
        ] {
            assert!(early.contains(&(key, value.to_owned())), "{key}");
        }
    }
}
