//! What a device publishes: what the data plane serves, and what the disk is. The one place to change when the data
//! plane learns something.

use blkif::{RingOrder, keys};
use tap_ctl::proto::DiskInfo;

/// Largest ring that tapdisk maps.
pub const MAX_RING_ORDER: RingOrder = RingOrder::MAX;
/// Most rings of one device that tapdisk serves.
pub const MAX_QUEUES: u32 = 1;

/// Process id of the one who serves the device; xentop finds the disk's statistics by it. Absent from Xen's headers:
/// a convention between XenServer's tapback and xentop (tools/libs/stat/xenstat_linux.c).
const KTHREAD_PID: &str = "kthread-pid";

/// A key and the value it is to have.
pub type Entry = (&'static str, String);

/// What is known before there is a disk. A frontend chooses its ring's size from this, so it is published before
/// InitWait.
pub fn offered() -> Vec<Entry> {
    vec![
        (keys::MAX_RING_PAGE_ORDER, MAX_RING_ORDER.get().to_string()),
        (keys::MAX_RING_PAGES, MAX_RING_ORDER.pages().to_string()),
        (keys::MULTI_QUEUE_MAX_QUEUES, MAX_QUEUES.to_string()),
        (keys::FEATURE_FLUSH_CACHE, "1".to_owned()),
        (keys::FEATURE_BARRIER, "1".to_owned()),
        (keys::FEATURE_PERSISTENT, "0".to_owned()),
        (keys::FEATURE_DISCARD, "0".to_owned()),
    ]
}

/// What the toolstack decided about the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Role {
    /// The guest may write.
    pub writable: bool,
    /// The guest sees a CD-ROM drive.
    pub cdrom: bool,
}

/// What is known of the disk once a tapdisk has it open.
pub fn disk(info: &DiskInfo, role: Role, pid: i32) -> Vec<Entry> {
    let cdrom = if role.cdrom { keys::info::CDROM } else { 0 };
    let readonly = if role.writable && !info.readonly { 0 } else { keys::info::READONLY };
    vec![
        (keys::SECTORS, info.sectors.to_string()),
        (keys::SECTOR_SIZE, info.sector_size.to_string()),
        (keys::PHYSICAL_SECTOR_SIZE, info.physical_sector_size.to_string()),
        (keys::INFO, (cdrom | readonly).to_string()),
        (KTHREAD_PID, pid.to_string()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info_of(writable: bool, cdrom: bool, readonly: bool) -> String {
        let info = DiskInfo {
            sectors: 8,
            sector_size: 512,
            physical_sector_size: 4096,
            readonly,
            discard: None,
            queues: 1,
        };
        let entries = disk(&info, Role { writable, cdrom }, 7);
        entries.into_iter().find(|(key, _)| *key == "info").unwrap().1
    }

    #[test]
    fn the_guest_is_told_that_it_may_not_write() {
        assert_eq!(info_of(true, false, false), "0");
        assert_eq!(info_of(false, false, false), "4");
        assert_eq!(info_of(true, false, true), "4");
        assert_eq!(info_of(false, true, false), "5");
    }

    #[test]
    fn ring_size_is_offered_in_both_spellings() {
        let entries = offered();
        assert!(entries.contains(&("max-ring-page-order", "4".to_owned())));
        assert!(entries.contains(&("max-ring-pages", "16".to_owned())));
    }
}
