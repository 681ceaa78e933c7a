//! The Windows PV driver xenvbd (src/xenvbd/frontend.c, ring.c), which waits for each answer without a limit, some of the time
//! with interrupts off: a backend that owes it one stops the guest.

use blkif::RingOrder;
use blkif::abi::op;
use integration::rig::Rig;
use integration::sim::frontend::{Io, Shape};

use super::*;

impl Guest {
    /// `FrontendClose`: from whatever there is, connected or not.
    fn windows_close(&mut self, rig: &Rig) {
        self.wait(rig, &["2", "3", "4", "5", "6"]);
        self.state("5");
        self.wait(rig, &["5", "6"]);
        self.state("6");
        self.wait(rig, &["6"]);
    }

    /// `FrontendPrepare` and `FrontendConnect`.
    fn windows_open(&mut self, rig: &Rig) {
        self.state("1");
        self.wait(rig, &["2"]);
        let shape = self.frontend.shape();
        let mut keys: Vec<_> = self.ring_keys();
        keys.retain(|(key, _)| key != "feature-persistent");
        if shape.queues == 1 {
            // Written also for one ring, whose keys then stand beside it.
            keys.push(("multi-queue-num-queues".into(), "1".into()));
        }
        for (key, value) in [
            ("target-id", "0"),
            ("feature-surprise-remove", "1"),
            ("feature-online-resize", "1"),
            ("feature-large-sector-size", "1"),
        ] {
            keys.push((key.into(), value.into()));
        }
        self.set_all(&keys.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect::<Vec<_>>());
        self.state("3");
        self.wait(rig, &["4"]);
        self.state("4");
    }
}

#[test]
fn windows_closes_what_was_never_open_and_goes_through_it_all_again_at_each_sleep() {
    let rig = rig();
    let queues = most_queues(&rig);
    let order = RingOrder::new(4).unwrap();
    let shapes = [simple(1), Shape { order, queues, indirect: 256, ..simple(2) }];
    for shape in shapes {
        let mut guest = Guest::start(&rig, shape);
        for _ in 0..3 {
            guest.windows_close(&rig);
            guest.windows_open(&rig);
            guest.use_disk();
            // The sector of an empty flush comes from the command and may lie beyond the disk.
            assert_eq!(guest.send(&empty(op::FLUSH_DISKCACHE, 1 << 40, u64::MAX)), 0);
            assert!(
                guest
                    .frontend
                    .run(Io::Discard { sector: Sector(4096), count: 64, secure: false })
                    .unwrap()
                    .is_okay()
            );
            guest.leave_requests();
            guest.windows_close(&rig);
            guest.frontend.restart().unwrap();
        }
        guest.windows_open(&rig);
        guest.use_disk();
        // Ejected: it sees 5 with online at 0.
        rig.ask_to_close(&guest.device);
        guest.windows_close(&rig);
        guest.frontend.restart().unwrap();
        rig.finish_removal(&guest.device);
    }
    rig.assert_clean();
}

#[test]
fn windows_closes_before_the_hotplug_script_has_run() {
    let rig = rig();
    let mut guest = Guest::before_hotplug(&rig, simple(1));
    guest.windows_close(&rig);
    guest.state("1");
    guest.hotplug(&rig);
    guest.windows_open(&rig);
    guest.use_disk();
    guest.unplug(&rig);
    rig.assert_clean();
}

/// The driver that writes crash dumps takes the disk over without interrupts, and polls.
#[test]
fn windows_dumps_its_memory_after_a_crash() {
    let rig = rig();
    let mut guest = Guest::start(&rig, Shape { indirect: 32, ..simple(1) });
    guest.windows_close(&rig);
    guest.windows_open(&rig);
    guest.use_disk();
    guest.leave_requests();
    guest.windows_close(&rig);
    guest.frontend.restart().unwrap();
    guest.windows_open(&rig);
    for n in 0..64u64 {
        let id = guest.frontend.submit(Io::Write(Sector(n * 88), &[n as u8; 44 << 10]));
        guest.frontend.kick().unwrap();
        let mut out = VecDeque::new();
        let start = std::time::Instant::now();
        while out.is_empty() {
            assert!(start.elapsed() < PATIENCE);
            guest.frontend.poll(&mut out).unwrap();
        }
        assert!(out[0].id == id && out[0].is_okay());
    }
    guest.unplug(&rig);
    rig.assert_clean();
}
