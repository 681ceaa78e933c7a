//! The frontends of FreeBSD (sys/dev/xen/blkfront/blkfront.c), NetBSD (sys/arch/xen/xen/xbd_xenbus.c) and OpenBSD
//! (sys/dev/pv/xbf.c).

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use blkif::RingOrder;
use blkif::abi::{header, op};
use blkif::encode::{Draft, DraftSegment};
use gntdev::Access;
use integration::rig::Rig;
use integration::sim::calls::{Call, Calls};
use integration::sim::frontend::{Io, Shape};
use integration::sim::host::BACKEND;

use super::*;

impl Guest {
    /// Ring pages as FreeBSD and OpenBSD announce them: by number and by order, one key after the other.
    fn bsd_keys(&mut self) {
        let refs: Vec<_> = self.frontend.ring_refs().iter().map(ToString::to_string).collect();
        self.set("num-ring-pages", &refs.len().to_string());
        self.set("ring-page-order", &refs.len().ilog2().to_string());
        for (n, gref) in refs.iter().enumerate() {
            self.set(&format!("ring-ref{n}"), gref);
        }
        let port = self.ring_key("event-channel");
        self.set("event-channel", &port);
        self.set("protocol", "x86_64-abi");
    }

    fn freebsd(&mut self, rig: &Rig) {
        self.wait(rig, &["2", "3", "4"]);
        self.bsd_keys();
        self.state("3");
        self.wait(rig, &["4"]);
        self.state("4");
        self.use_disk();
    }
}

#[test]
fn freebsd_orders_by_barriers_and_keeps_a_disk_in_use_that_it_is_asked_to_close() {
    let rig = rig();
    let mut guest = Guest::start(&rig, Shape { order: RingOrder::new(2).unwrap(), ..simple(1) });
    // It reads either of the two.
    assert_eq!(guest.offered("max-ring-page-order").as_deref(), Some("4"));
    assert_eq!(guest.offered("max-ring-pages").as_deref(), Some("16"));
    guest.freebsd(&rig);
    // BIO_ORDERED, with data, and whatever was in the field `handle`.
    let (frame, gref) = guest.frontend.page(Access::ReadWrite);
    guest.frontend.domain().write(frame, 0, &[0x33; 4096]);
    let whole = [DraftSegment { gref, first: 0, last: 7 }];
    let barrier = Draft { handle: 0xdead, ..over(op::WRITE_BARRIER, 12, 800, &whole) };
    assert_eq!(guest.send(&barrier), 0);
    assert!(guest.frontend.read(Sector(800), 4096).unwrap() == [0x33; 4096]);
    // Suspended and resumed: it lets its requests end, and begins anew at InitWait or later.
    guest.linux_reset(&rig);
    guest.freebsd(&rig);
    // The toolstack asks; the file system is mounted, so the driver goes on.
    rig.ask_to_close(&guest.device);
    guest.wait(&rig, &["5"]);
    guest.use_disk();
    guest.frontend.run(Io::Flush).unwrap();
    // Unmounted at last.
    guest.state("6");
    rig.finish_removal(&guest.device);
    guest.frontend.restart().unwrap();
    rig.assert_clean();
}

#[test]
fn netbsd_waits_neither_for_the_backend_nor_for_the_answer_to_a_second_ring() {
    let mut rig = rig();
    rig.kill_xenio();
    let mut guest = Guest::before_hotplug(&rig, simple(1));
    let offer = |guest: &mut Guest, state: &str| {
        let (ring, port) = (guest.ring_key("ring-ref"), guest.ring_key("event-channel"));
        guest.set_all(&[("ring-ref", &ring), ("event-channel", &port), ("protocol", "x86_64-abi")]);
        guest.state(state);
    };
    offer(&mut guest, "3");
    rig.start_xenio();
    guest.hotplug(&rig);
    guest.wait(&rig, &["4"]);
    // It panics without one of these.
    for key in ["sectors", "info", "sector-size"] {
        assert!(guest.offered(key).is_some(), "{key}");
    }
    guest.state("4");
    guest.use_disk();
    // A flush in the slot of a request of two segments, whose number it leaves standing.
    let stale = [DraftSegment { gref: blkif::GrantRef(8), first: 0, last: 7 }; 2];
    assert_eq!(guest.send(&over(op::FLUSH_DISKCACHE, 3, 0, &stale)), 0);
    // Asleep and awake again: 3 and at once 4, so that nobody may ever see the 3.
    guest.frontend.resume().unwrap();
    offer(&mut guest, "4");
    guest.use_disk();
    // Detaching spins until the grants of its rings are free.
    guest.state("5");
    guest.state("6");
    guest.wait(&rig, &["6"]);
    guest.frontend.restart().unwrap();
    offer(&mut guest, "3");
    guest.wait(&rig, &["4"]);
    guest.state("4");
    guest.use_disk();
    guest.unplug(&rig);
    rig.assert_clean();
}

#[test]
fn openbsd_hears_of_the_last_answer_and_of_no_other() {
    let rig = rig();
    for (domid, order) in [(1, 0), (2, 3)] {
        let order = RingOrder::new(order).unwrap();
        let mut guest = Guest::start(&rig, Shape { order, ..simple(domid) });
        assert!(guest.offered("type").is_some() && guest.offered("dev").is_some());
        guest.bsd_keys();
        guest.state("3");
        guest.wait(&rig, &["4"]);
        guest.state("4");
        guest.use_disk();
        let calls = Calls::open(&rig.host.xen(), BACKEND).unwrap();
        for round in 0..50u32 {
            let before = calls.so_far(Call::Notify);
            let count = 1 + round % 20;
            for n in 0..count {
                guest.frontend.submit(Io::Write(Sector(u64::from(n) * 8), &[round as u8; 4096]));
            }
            // `xbf_submit_cmd`: the answer that empties the ring raises the event, stored before the request is seen.
            let (ring, domain) = guest.frontend.ring();
            let answered = ring.word(domain, header::RSP_PROD).load(Ordering::Acquire);
            let last = answered.wrapping_add(count);
            ring.word(domain, header::RSP_EVENT).store(last, Ordering::SeqCst);
            guest.frontend.kick().unwrap();
            let (ring, domain) = guest.frontend.ring();
            let produced = ring.word(domain, header::RSP_PROD);
            let start = std::time::Instant::now();
            while produced.load(Ordering::Acquire) != last {
                assert!(start.elapsed() < PATIENCE);
                std::thread::yield_now();
            }
            let mut out = VecDeque::new();
            while out.len() < count as usize {
                guest.frontend.wait(&mut out, PATIENCE).unwrap();
            }
            assert!(out.iter().all(integration::sim::frontend::Completion::is_okay));
            while calls.so_far(Call::Notify) == before {
                assert!(start.elapsed() < PATIENCE, "no event for the answer that empties the ring");
                std::thread::yield_now();
            }
        }
        // SYNCHRONIZE CACHE: a flush without segments, its id the number of its slot.
        assert_eq!(guest.send(&empty(op::FLUSH_DISKCACHE, 17, 0)), 0);
        guest.unplug(&rig);
    }
    rig.assert_clean();
}
