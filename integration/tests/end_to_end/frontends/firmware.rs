//! What runs before an operating system: GRUB (grub-core/disk/xen/xendisk.c), and the family of mini-os' blkfront.c, to which
//! OVMF (OvmfPkg/XenPvBlkDxe) and U-Boot (drivers/xen/pvblock.c) belong.

use blkif::abi::op;
use blkif::encode::DraftSegment;
use gntdev::Access;
use integration::rig::Rig;

use super::*;

#[test]
fn grub_reads_with_one_page_and_leaves_the_disk_to_the_kernel() {
    let rig = rig();
    let mut guest = Guest::start(&rig, simple(1));
    std::fs::write(rig.path("1.img"), pattern(5, DISK)).unwrap();
    assert_eq!(guest.offered("dev").as_deref(), Some("xvda"));
    // One by one, and no feature keys.
    for key in ["ring-ref", "event-channel", "protocol"] {
        let value = guest.ring_key(key);
        guest.set(key, &value);
    }
    guest.state("3");
    // It goes on at any state but InitWait, and stays in state 3.
    guest.wait(&rig, &["1", "3", "4", "5", "6"]);
    guest.wait(&rig, &["4"]);
    let (frame, gref) = guest.frontend.page(Access::ReadWrite);
    for sector in (0..64).map(|n| n * 8) {
        let whole = DraftSegment { gref, first: 0, last: 7 };
        // Every request has the same page and the id 0.
        assert_eq!(guest.send(&over(op::READ, 0, sector, &[whole])), 0);
        let mut page = [0; 4096];
        guest.frontend.domain().read(frame, 0, &mut page);
        assert!(page[..] == pattern(5, DISK)[sector as usize * 512..][..4096]);
    }
    guest.state("6");
    guest.wait(&rig, &["6"]);
    guest.set("ring-ref", "");
    guest.set("event-channel", "");
    guest.state("1");
    guest.frontend.restart().unwrap();
    guest.linux(&rig);
    guest.unplug(&rig);
    rig.assert_clean();
}

impl Guest {
    /// From state 1 to 4, in one transaction with the keys, whatever the backend's state.
    fn mini_os_connect(&mut self, rig: &Rig) {
        self.mini_os_offer();
        self.wait(rig, &["4"]);
    }

    fn mini_os_offer(&mut self) {
        let value = |key| self.ring_key(key);
        let (ring, port, protocol) = (value("ring-ref"), value("event-channel"), value("protocol"));
        self.set_all(&[
            ("ring-ref", &ring),
            ("event-channel", &port),
            ("protocol", &protocol),
            ("state", "4"),
        ]);
    }

    /// A barrier and then a flush, both empty and with the id 0.
    fn mini_os_sync(&mut self) {
        assert_eq!(self.send(&empty(op::WRITE_BARRIER, 0, 0)), 0);
        assert_eq!(self.send(&empty(op::FLUSH_DISKCACHE, 0, 0)), 0);
    }

    /// Each wait has no end, and its condition is no single state.
    fn mini_os_shutdown(&mut self, rig: &Rig) {
        self.state("5");
        self.wait(rig, &["5", "6"]);
        self.state("6");
        self.wait(rig, &["6"]);
        self.state("1");
        self.wait(rig, &["2", "3", "4", "5"]);
        self.remove("ring-ref");
        self.remove("event-channel");
        self.frontend.restart().unwrap();
    }
}

#[test]
fn firmware_goes_straight_to_connected_syncs_and_hands_over() {
    let rig = rig();
    let mut guest = Guest::start(&rig, simple(1));
    for _ in 0..3 {
        guest.mini_os_connect(&rig);
        guest.use_disk();
        guest.mini_os_sync();
        guest.mini_os_shutdown(&rig);
    }
    guest.linux(&rig);
    guest.unplug(&rig);
    rig.assert_clean();
}

#[test]
fn firmware_may_be_faster_than_the_hotplug_script_and_than_the_backend() {
    let mut rig = rig();
    rig.kill_xenio();
    let mut guest = Guest::before_hotplug(&rig, simple(1));
    guest.mini_os_offer();
    rig.start_xenio();
    guest.hotplug(&rig);
    guest.wait(&rig, &["4"]);
    guest.use_disk();
    guest.mini_os_shutdown(&rig);
    guest.unplug(&rig);
    rig.assert_clean();
}

/// Buffers begin at any sector of a page, so that segments are parts of pages.
#[test]
fn firmware_reads_and_writes_parts_of_pages() {
    let rig = rig();
    let mut guest = Guest::start(&rig, simple(1));
    guest.mini_os_connect(&rig);
    let pages: Vec<_> = (0..3).map(|_| guest.frontend.page(Access::ReadWrite)).collect();
    let data = pattern(9, 3 * 4096);
    for ((frame, _), bytes) in pages.iter().zip(data.chunks(4096)) {
        guest.frontend.domain().write(*frame, 0, bytes);
    }
    // From sector 5 of the first page to sector 2 of the last: 3 + 8 + 3.
    let part = |n: usize, first, last| DraftSegment { gref: pages[n].1, first, last };
    let segments = [part(0, 5, 7), part(1, 0, 7), part(2, 0, 2)];
    assert_eq!(guest.send(&over(op::WRITE, 0, 3, &segments)), 0);
    assert!(guest.frontend.read(Sector(3), 14 * 512).unwrap() == data[5 * 512..][..14 * 512]);
    guest.mini_os_shutdown(&rig);
    guest.unplug(&rig);
    rig.assert_clean();
}
