//! From the toolstack's first write to a guest that uses its disk, and through the guest's own restarts.

use tap_ctl::proto::{DiskInfo, Polling, QueueParams, RingParams};
use tap_ctl::{Minor, Request};

use xenio::features::INDIRECT_SEGMENTS;

use crate::fake_tapdisk::disk;
use crate::rig::{DISK, Disk, PID, Rig};

#[test]
fn everything_a_ring_depends_on_is_published_before_init_wait_and_before_hotplug() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    for (key, value) in [
        ("max-ring-page-order", "4"),
        ("max-ring-pages", "16"),
        ("multi-queue-max-queues", "4"),
        ("feature-max-indirect-segments", &INDIRECT_SEGMENTS.to_string()),
        ("feature-flush-cache", "1"),
        ("feature-barrier", "1"),
        ("feature-persistent", "1"),
        ("feature-discard", "0"),
    ] {
        assert_eq!(rig.value(&DISK.back(key)).as_deref(), Some(value), "{key}");
        assert!(rig.is_published(&DISK.back(key), 0, DISK.domid), "{key}");
    }
    assert!(rig.tapdisk.log().is_empty());
}

#[test]
fn a_disk_is_described_after_hotplug_and_connected_for_the_frontends_ring() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.hotplug(DISK);
    rig.wait(&DISK.back("sectors"), "2048");
    for (key, value) in [("sector-size", "512"), ("physical-sector-size", "4096"), ("info", "0")] {
        assert_eq!(rig.value(&DISK.back(key)).as_deref(), Some(value), "{key}");
        assert!(rig.is_published(&DISK.back(key), 0, DISK.domid), "{key}");
    }
    assert_eq!(rig.value(&DISK.back("kthread-pid")), Some(PID.to_string()));
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    let ring = RingParams {
        domid: 5,
        vdev: 51712,
        protocol: "x86_64-abi".into(),
        queues: vec![QueueParams { ring_refs: vec![8], port: 9 }],
        readonly: false,
        persistent: false,
        discard: false,
        polling: Polling::default(),
    };
    assert_eq!(rig.tapdisk.rings(), [ring]);
    assert_eq!(rig.value(&DISK.error()), None);
}

#[test]
fn nothing_is_connected_before_the_hotplug_script_says_so() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.offer_ring(DISK);
    let path = rig.dir.vbd_path(PID, Minor(0));
    rig.store.write(&DISK.back("physical-device-path"), path.to_str().unwrap());
    rig.store.write(&DISK.back("hotplug-status"), "error");
    rig.settle();
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("2"));
    rig.store.write(&DISK.back("hotplug-status"), "connected");
    rig.wait_state(DISK, "4");
    assert_eq!(rig.tapdisk.connects(), 1);
}

#[test]
fn hotplug_status_may_come_before_the_path() {
    let rig = Rig::new();
    rig.add_with(DISK, &[("mode", "r")]);
    rig.store.write(&DISK.back("hotplug-status"), "connected");
    rig.offer_ring(DISK);
    rig.settle();
    rig.hotplug(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!(rig.value(&DISK.back("info")).as_deref(), Some("4"));
}

#[test]
fn a_read_only_disk_is_announced_as_such_and_the_tapdisk_told() {
    let rig = Rig::new();
    rig.add_with(DISK, &[("mode", "r"), ("device-type", "cdrom")]);
    rig.hotplug(DISK);
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!(rig.value(&DISK.back("info")).as_deref(), Some("5"));
    assert!(rig.tapdisk.rings()[0].readonly);
}

#[test]
fn an_image_opened_read_only_is_announced_as_such() {
    let rig = Rig::new();
    rig.tapdisk.open(0, DiskInfo { readonly: true, ..disk() });
    rig.connected(DISK);
    assert_eq!(rig.value(&DISK.back("info")).as_deref(), Some("4"));
}

#[test]
fn firmware_that_goes_from_initialising_to_connected_is_served() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.hotplug(DISK);
    rig.guest(DISK, "ring-ref", "8");
    rig.guest(DISK, "event-channel", "9");
    rig.guest(DISK, "state", "4");
    rig.wait_state(DISK, "4");
    assert_eq!(rig.tapdisk.connects(), 1);
}

#[test]
fn a_ring_of_sixteen_pages_reaches_the_tapdisk_in_order() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.hotplug(DISK);
    rig.guest(DISK, "ring-page-order", "4");
    for page in 0..16 {
        rig.guest(DISK, &format!("ring-ref{page}"), &(100 - page).to_string());
    }
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!(rig.tapdisk.rings()[0].queues[0].ring_refs, (85..=100).rev().collect::<Vec<u32>>());
}

#[test]
fn dom0_is_a_frontend_like_any_other() {
    let rig = Rig::new();
    let disk = Disk { domid: 0, vdev: 51712 };
    rig.connected(disk);
    assert_eq!(rig.tapdisk.rings()[0].domid, 0);
    rig.request_removal(disk, false);
    rig.guest(disk, "state", "6");
    rig.wait_state(disk, "6");
}

#[test]
fn a_guest_and_its_device_model_domain_share_one_vbd() {
    let rig = Rig::new();
    let stub = Disk { domid: 6, ..DISK };
    rig.connected(DISK);
    rig.connected(stub);
    assert_eq!(rig.tapdisk.rings().len(), 2);
    rig.request_removal(stub, true);
    rig.wait_state(stub, "6");
    assert_eq!(rig.tapdisk.rings().len(), 1);
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("4"));
}

#[test]
fn a_frontend_that_restarts_through_closed_is_served_again() {
    let rig = Rig::new();
    rig.connected(DISK);
    for round in 1..=3 {
        for (guest, answer) in [("5", "5"), ("6", "6"), ("1", "2")] {
            rig.guest(DISK, "state", guest);
            rig.wait_state(DISK, answer);
        }
        assert_eq!(rig.tapdisk.rings().len(), 0);
        rig.offer_ring(DISK);
        rig.wait_state(DISK, "4");
        assert_eq!((rig.tapdisk.connects(), rig.tapdisk.disconnects()), (round + 1, round));
    }
}

#[test]
fn a_windows_frontend_that_closes_before_it_begins_is_answered_at_each_step() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.hotplug(DISK);
    for (guest, answer) in [("5", "5"), ("6", "6"), ("1", "2")] {
        rig.guest(DISK, "state", guest);
        rig.wait_state(DISK, answer);
    }
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!((rig.tapdisk.connects(), rig.tapdisk.disconnects()), (1, 0));
}

#[test]
fn closing_keeps_the_ring_until_closed() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.guest(DISK, "state", "5");
    rig.wait_state(DISK, "5");
    rig.settle();
    assert_eq!((rig.tapdisk.rings().len(), rig.tapdisk.disconnects()), (1, 0));
}

#[test]
fn closing_and_a_new_ring_without_closed_is_disconnect_and_connect() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.guest(DISK, "state", "5");
    rig.wait_state(DISK, "5");
    rig.guest(DISK, "ring-ref", "77");
    rig.guest(DISK, "state", "3");
    rig.wait_state(DISK, "4");
    assert_eq!(rig.tapdisk.rings()[0].queues[0].ring_refs, [77]);
    assert_eq!(rig.tapdisk.disconnects(), 1);
}

#[test]
fn a_frontend_resumed_in_place_with_a_new_ring_is_connected_anew_and_told() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    let mut spy = rig.spy(DISK);
    rig.guest(DISK, "ring-ref", "77");
    rig.guest(DISK, "state", "3");
    rig.tapdisk.wait_log("connect again", |log| {
        log.iter().filter(|request| matches!(request, Request::Connect { .. })).count() == 2
    });
    let mut told = Vec::new();
    // The state is written again although it stays 4: its watch is what the frontend waits for.
    while !told.contains(&DISK.back("state")) {
        rig.settle();
        told.extend(spy.changes());
    }
    assert_eq!(rig.tapdisk.rings()[0].queues[0].ring_refs, [77]);
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("4"));
}

/// A guest that wakes where it slept hands out grant references and ports from the start again.
#[test]
fn a_frontend_resumed_in_place_with_the_same_keys_is_connected_anew_too() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    for restarted in [false, true] {
        if restarted {
            rig.stop_xenio();
            rig.start_xenio();
        }
        rig.settle();
        let before = (rig.tapdisk.connects(), rig.tapdisk.disconnects());
        rig.guest(DISK, "state", "3");
        rig.tapdisk.wait_log("connect again", |log| {
            log.iter().filter(|request| matches!(request, Request::Connect { .. })).count() == before.0 + 1
        });
        rig.settle();
        assert_eq!(rig.tapdisk.disconnects(), before.1 + 1);
        rig.guest(DISK, "state", "4");
    }
    rig.settle();
    assert_eq!((rig.tapdisk.connects(), rig.tapdisk.disconnects()), (3, 2));
}

#[test]
fn a_frontend_whose_new_ring_is_first_seen_in_operation_is_connected_anew() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    rig.guest(DISK, "ring-ref", "77");
    rig.guest(DISK, "state", "4");
    rig.tapdisk.wait_log("connect again", |log| {
        log.iter().filter(|request| matches!(request, Request::Connect { .. })).count() == 2
    });
    assert_eq!(rig.tapdisk.rings()[0].queues[0].ring_refs, [77]);
}

#[test]
fn a_hung_tapdisk_holds_up_only_its_own_disks() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.tapdisk.hang(true);
    rig.hotplug(DISK);
    rig.tapdisk.wait_log("list", |log| !log.is_empty());
    let other = crate::fake_tapdisk::FakeTapdisk::start(&rig.dir, PID + 1);
    other.open(3, disk());
    let second = Disk { domid: 6, ..DISK };
    rig.add(second);
    rig.wait_state(second, "2");
    let path = rig.dir.vbd_path(PID + 1, Minor(3));
    rig.store.write(&second.back("physical-device-path"), path.to_str().unwrap());
    rig.store.write(&second.back("hotplug-status"), "connected");
    rig.offer_ring(second);
    rig.wait_state(second, "4");
    rig.tapdisk.hang(false);
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
}
