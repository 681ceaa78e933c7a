//! Guests that write nonsense, and hosts in disorder. The names carry the numbers of the project's list of hostile
//! inputs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tap_ctl::Reply;
use xenstore::{Access, Permission, TxId};

use crate::rig::{DISK, Disk, Rig};

const OTHER: Disk = Disk { domid: 6, vdev: 51712 };

/// A disk whose guest has published `keys` beside or instead of the usual ones.
fn with_keys(rig: &Rig, keys: &[(&str, &[u8])]) {
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.hotplug(DISK);
    rig.guest(DISK, "ring-ref", "8");
    rig.guest(DISK, "event-channel", "9");
    for (key, value) in keys {
        rig.store.write(&DISK.front(key), value);
    }
    rig.guest(DISK, "state", "3");
}

/// The device was refused with these words, once, and others are served.
fn refused(keys: &[(&str, &[u8])], words: &str) {
    let rig = Rig::new();
    with_keys(&rig, keys);
    rig.wait_state(DISK, "5");
    rig.wait_error(DISK, words);
    rig.settle();
    assert_eq!(rig.tapdisk.connects(), 0);
    rig.connected(OTHER);
    // The guest can recover by closing and beginning anew with sane keys.
    for (guest, answer) in [("6", "6"), ("1", "2")] {
        rig.guest(DISK, "state", guest);
        rig.wait_state(DISK, answer);
    }
    for (key, _) in keys {
        rig.store.rm(&DISK.front(key));
    }
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
}

#[test]
fn h41_a_guest_that_changes_its_state_without_end_is_bounded_and_does_not_hold_up_others() {
    let rig = Rig::new();
    rig.connected(DISK);
    let stop = AtomicBool::new(false);
    let start = Instant::now();
    let writes = thread::scope(|scope| {
        let storm = scope.spawn(|| {
            let mut guest = rig.client();
            let mut writes = 0u64;
            while !stop.load(Ordering::Relaxed) {
                for state in ["6", "1", "3"] {
                    guest.write(TxId::NONE, DISK.front("state"), state).unwrap();
                    writes += 1;
                }
            }
            writes
        });
        for domid in 6..16 {
            rig.connected(Disk { domid, vdev: 51712 });
        }
        // Long enough to tell the limit from the initial burst.
        while start.elapsed() < Duration::from_secs(2) {
            rig.settle();
        }
        stop.store(true, Ordering::Relaxed);
        storm.join().unwrap()
    });
    let allowed = 50 + start.elapsed().as_millis() / 50;
    let asked = rig.tapdisk.connects() + rig.tapdisk.disconnects() - 10;
    assert!(asked as u128 <= allowed, "{asked} requests, {allowed} allowed, {writes} writes");
    assert!(u128::from(writes) > 4 * allowed, "{writes} writes are no storm");
    rig.guest(DISK, "state", "6");
    rig.tapdisk.wait_rings(10);
    rig.wait_state(DISK, "6");
}

#[test]
fn h42_a_frontend_directory_with_ten_thousand_keys_is_served_as_any_other() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    let keys: Vec<String> =
        (0..10_000).map(|number| DISK.front(&format!("junk/{}/{}", number / 100, number % 100))).collect();
    rig.store.write_all(&keys.iter().map(|key| (key.as_str(), "x")).collect::<Vec<_>>());
    rig.hotplug(DISK);
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
}

#[test]
fn h43_numbers_that_are_none_refuse_the_device() {
    let long = [b'7'; 3000];
    let values: [&[u8]; 8] =
        [b"18446744073709551616", b"-1", b"0x10", b" 8", b"8\n", b"8\0", b"\xff\xfe\x1b[31m", &long];
    for value in values {
        refused(&[("ring-ref", value)], "ring-ref");
    }
    refused(&[("event-channel", b"")], "event-channel");
}

#[test]
fn h44_ring_orders_and_queue_counts_out_of_range_refuse_the_device() {
    for order in [&b"5"[..], b"31", b"64", b"4294967295"] {
        refused(&[("ring-page-order", order)], "ring-page-order");
    }
    for count in [&b"0"[..], b"5", b"65536"] {
        refused(&[("multi-queue-num-queues", count)], "multi-queue-num-queues");
    }
}

#[test]
fn h45_incomplete_and_shared_ring_pages_refuse_the_device() {
    refused(&[("ring-page-order", b"2"), ("ring-ref0", b"1"), ("ring-ref1", b"2")], "ring-ref2 is missing");
    refused(&[("ring-page-order", b"1"), ("ring-ref0", b"3"), ("ring-ref1", b"3")], "grant 3 twice");
}

#[test]
fn h46_a_ring_that_the_tapdisk_cannot_map_refuses_the_device_without_another_try() {
    let rig = Rig::new();
    let words = "cannot bind event channel 2147483648 of domain 5";
    rig.tapdisk.refuse_connect(Some(Reply::Error { errno: 22, message: words.into() }));
    with_keys(&rig, &[("event-channel", b"2147483648")]);
    rig.wait_state(DISK, "5");
    rig.wait_error(DISK, words);
    assert_eq!(rig.value(&DISK.error()), Some(format!("22 {words}")));
    for _ in 0..5 {
        rig.guest(DISK, "state", "3");
        rig.settle();
    }
    assert_eq!(rig.tapdisk.connects(), 1);
    refused(&[("event-channel", b"0")], "event-channel is 0");
}

#[test]
fn h47_a_frontend_of_another_domain_is_refused_and_never_looked_at() {
    for (key, value) in [("frontend", "/local/domain/7/device/vbd/51712"), ("frontend-id", "7")] {
        let rig = Rig::new();
        rig.store.write("/local/domain/7/device/vbd/51712/state", "3");
        rig.add_with(DISK, &[(key, value)]);
        rig.wait_error(DISK, "7");
        rig.wait_state(DISK, "6");
        rig.hotplug(DISK);
        rig.settle();
        assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("6"));
        assert!(rig.tapdisk.log().is_empty());
        rig.connected(OTHER);
    }
}

#[test]
fn h48_a_physical_device_path_that_names_no_vbd_is_refused() {
    for path in ["/dev/loop0", "nbd:unix:/x", "|sh", "/run/blktap-control/../nbd1.1", "file:///etc/passwd"] {
        let rig = Rig::new();
        rig.add(DISK);
        rig.wait_state(DISK, "2");
        rig.store.write(&DISK.back("physical-device-path"), path);
        rig.store.write(&DISK.back("hotplug-status"), "connected");
        rig.wait_error(DISK, "is no VBD of a tapdisk");
        rig.wait_state(DISK, "6");
        assert!(rig.tapdisk.log().is_empty());
    }
}

#[test]
fn a_minor_that_the_tapdisk_does_not_serve_is_refused() {
    let rig = Rig::new();
    rig.add(DISK);
    let path = rig.dir.vbd_path(crate::rig::PID, tap_ctl::Minor(9));
    rig.store.write(&DISK.back("physical-device-path"), path.to_str().unwrap());
    rig.store.write(&DISK.back("hotplug-status"), "connected");
    rig.wait_error(DISK, "does not serve minor 9");
    rig.wait_state(DISK, "6");
}

#[test]
fn h49_a_guest_that_removes_its_directory_loses_its_disk_and_may_begin_anew() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.store.rm(&DISK.frontend());
    rig.wait_state(DISK, "6");
    rig.guest(DISK, "state", "1");
    rig.wait_state(DISK, "2");
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!(rig.tapdisk.rings().len(), 1);
}

#[test]
fn h49_a_guest_that_denies_a_driver_domain_its_keys_loses_its_disk() {
    let mut rig = Rig::without_xenio();
    rig.move_to_domain(3);
    let backend = "/local/domain/3/backend/vbd3/5/51712";
    let (driver, guest) = (|access| Permission::new(3, access), |access| Permission::new(5, access));
    for path in ["/local/domain/3", "/local/domain/3/backend", "/local/domain/3/backend/vbd3", backend] {
        rig.store.mkdir(path);
        rig.store.set_perms(path, &[driver(Access::None), guest(Access::Read)]);
    }
    rig.store.mkdir(&DISK.frontend());
    rig.store.set_perms(&DISK.frontend(), &[guest(Access::None), driver(Access::Read)]);
    rig.guest(DISK, "state", "1");
    rig.store.write("/local/domain/3/domid", "3");
    for (key, value) in [("frontend-id", "5"), ("online", "1"), ("mode", "w"), ("state", "1")] {
        rig.store.write(&format!("{backend}/{key}"), value);
    }
    rig.store.write(&format!("{backend}/frontend"), DISK.frontend());
    for key in ["state", "frontend", "frontend-id", "online", "mode"] {
        rig.store.set_perms(&format!("{backend}/{key}"), &[driver(Access::None), guest(Access::Read)]);
    }
    rig.start_xenio();
    rig.wait(&format!("{backend}/state"), "2");
    assert!(rig.is_published(&format!("{backend}/max-ring-page-order"), 3, 5));
    rig.store.set_perms(&DISK.front("state"), &[guest(Access::None)]);
    rig.wait(&format!("{backend}/state"), "6");
}

#[test]
fn h50_states_that_are_none_are_ignored() {
    let rig = Rig::new();
    rig.connected(DISK);
    for value in ["banana", "99", "", "0", "2", "7", "8", "4\n", "\u{1b}[2J"] {
        rig.guest(DISK, "state", value);
        rig.settle();
        assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("4"), "{value:?}");
    }
    assert_eq!(rig.tapdisk.disconnects(), 0);
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
}

#[test]
fn h50_nonsense_cannot_hold_up_a_removal() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.guest(DISK, "state", "banana");
    rig.request_removal(DISK, false);
    rig.wait_state(DISK, "6");
    assert_eq!(rig.tapdisk.rings().len(), 0);
}

#[test]
fn h51_a_domain_that_dies_in_the_middle_is_disconnected() {
    let rig = Rig::new();
    rig.store.introduce(DISK.domid);
    rig.add(DISK);
    let owner = [xenstore::Permission::new(DISK.domid, xenstore::Access::None)];
    for path in [DISK.frontend(), DISK.front("state")] {
        rig.store.set_perms(&path, &owner);
    }
    rig.hotplug(DISK);
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert!(rig.store.release(DISK.domid));
    rig.wait_state(DISK, "6");
    assert_eq!(rig.tapdisk.rings().len(), 0);
}

#[test]
fn h52_a_directory_removed_while_a_state_is_being_written_stays_removed() {
    let rig = Rig::new();
    for requests in 0..32 {
        rig.add(DISK);
        rig.wait_state(DISK, "2");
        rig.settle();
        // Lets xenio get so many requests far on its way to writing Closed, and takes the directory away there.
        rig.store.hold_requests();
        rig.guest(DISK, "state", "6");
        for _ in 0..requests {
            if !rig.store.wait_held(1, Duration::from_millis(20)) {
                break;
            }
            rig.store.release_requests();
            rig.store.hold_requests();
        }
        rig.store.rm(&DISK.backend());
        rig.store.release_requests();
        rig.settle();
        assert!(!rig.store.exists(&DISK.backend()), "after {requests} requests");
        rig.store.rm(&DISK.frontend());
    }
}
