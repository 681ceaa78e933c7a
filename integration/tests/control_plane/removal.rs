//! Taking a disk away: with the guest's help, without it, and when things vanish by themselves.

use crate::rig::{DISK, PATIENCE, Rig};

#[test]
fn a_cooperative_removal_ends_closed_after_the_ring_is_gone() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.request_removal(DISK, false);
    rig.settle();
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("5"));
    assert_eq!(rig.tapdisk.rings().len(), 1, "the guest may still be writing");
    rig.guest(DISK, "state", "5");
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    assert_eq!(rig.tapdisk.rings().len(), 0);
    rig.store.rm(&DISK.backend());
    rig.store.rm(&DISK.frontend());
    rig.settle();
    assert!(!rig.store.exists(&DISK.backend()));
}

#[test]
fn a_forced_removal_of_a_busy_disk_ends_closed() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.request_removal(DISK, true);
    rig.wait_state(DISK, "6");
    assert_eq!((rig.tapdisk.rings().len(), rig.tapdisk.disconnects()), (0, 1));
}

#[test]
fn a_frontend_directory_that_vanishes_ends_closed_without_being_recreated() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.store.rm(&DISK.frontend());
    rig.wait_state(DISK, "6");
    assert_eq!(rig.tapdisk.rings().len(), 0);
    rig.settle();
    assert!(!rig.store.exists(&DISK.frontend()));
    assert!(rig.store.exists(&DISK.backend()), "the directory is the toolstack's to remove");
}

#[test]
fn the_toolstacks_closing_without_a_live_frontend_ends_closed() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.request_removal(DISK, false);
    rig.wait_state(DISK, "6");
}

#[test]
fn a_closing_that_the_toolstack_writes_alone_is_noticed() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.settle();
    rig.store.write(&DISK.back("state"), "5");
    rig.wait_state(DISK, "6");
}

#[test]
fn a_removal_before_the_device_was_ever_seen_ends_closed() {
    let mut rig = Rig::without_xenio();
    rig.add(DISK);
    rig.request_removal(DISK, false);
    rig.start_xenio();
    rig.wait_state(DISK, "6");
}

#[test]
fn a_dead_tapdisk_counts_as_let_go() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.request_removal(DISK, false);
    rig.tapdisk.crash(&rig.dir);
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
}

#[test]
fn a_tapdisk_that_dies_under_a_guest_is_reported_and_the_disk_closes() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.crash(&rig.dir);
    rig.wait_state(DISK, "5");
    rig.wait_error(DISK, "tapdisk 4711 has ended");
    rig.settle();
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("5"), "reported once");
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    rig.store.rm(&DISK.backend());
    let gone = rig.store.wait_for("/local/domain/0/error/backend/vbd3/5", PATIENCE, |value| value.is_none());
    assert!(gone, "the message goes with the device");
}

#[test]
fn a_tapdisk_that_hangs_delays_closed_until_it_ends() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.hang(true);
    rig.request_removal(DISK, true);
    rig.tapdisk.wait_log("disconnect", |log| log.len() >= 4);
    rig.settle();
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("5"));
    rig.tapdisk.crash(&rig.dir);
    rig.wait_state(DISK, "6");
}

#[test]
fn a_directory_removed_under_a_running_disk_disconnects_it() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.store.rm(&DISK.backend());
    rig.tapdisk.wait_log("disconnect", |log| {
        log.iter().any(|request| matches!(request, tap_ctl::Request::Disconnect { .. }))
    });
    rig.settle();
    assert!(!rig.store.exists(&DISK.backend()));
}

#[test]
fn a_device_recreated_under_the_same_name_starts_from_the_beginning() {
    let rig = Rig::new();
    for round in 1..=10 {
        rig.connected(DISK);
        assert_eq!(rig.tapdisk.rings().len(), 1);
        rig.store.rm(&DISK.backend());
        rig.store.rm(&DISK.frontend());
        // Added again at once: xenio may never see that it was away.
        if round % 2 == 0 {
            rig.settle();
        }
    }
    rig.connected(DISK);
    assert_eq!(rig.tapdisk.rings().len(), 1);
}
