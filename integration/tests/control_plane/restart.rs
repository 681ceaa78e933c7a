//! xenio and xenstored come and go; disks stay.

use integration::sim::store::TreeAfter;

use crate::rig::{DISK, Disk, Rig};

const SECOND: Disk = Disk { domid: 6, vdev: 51728 };

#[test]
fn stopping_and_starting_xenio_touches_nothing_of_a_disk_in_use() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    let mut spy = rig.spy(DISK);
    rig.stop_xenio();
    rig.start_xenio();
    rig.connected(SECOND);
    assert_eq!(spy.changes(), [""; 0]);
    assert_eq!((rig.tapdisk.connects(), rig.tapdisk.disconnects()), (2, 0));
    // And it is watched again.
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    assert_eq!(rig.tapdisk.rings().len(), 1);
}

#[test]
fn a_ring_that_was_lost_meanwhile_is_connected_anew() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.stop_xenio();
    rig.tapdisk.lose_rings();
    rig.start_xenio();
    rig.tapdisk.wait_log("connect again", |log| {
        log.iter().filter(|request| matches!(request, tap_ctl::Request::Connect { .. })).count() == 2
    });
    rig.settle();
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("4"));
}

#[test]
fn what_happened_while_xenio_was_away_is_made_up_for() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.stop_xenio();
    rig.request_removal(DISK, true);
    rig.add(SECOND);
    rig.start_xenio();
    rig.wait_state(DISK, "6");
    rig.wait_state(SECOND, "2");
    assert_eq!(rig.tapdisk.rings().len(), 0);
}

#[test]
fn a_tapdisk_that_died_while_xenio_was_away_is_reported() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.stop_xenio();
    rig.tapdisk.crash(&rig.dir);
    rig.start_xenio();
    rig.wait_state(DISK, "5");
    rig.wait_error(DISK, "4711");
}

#[test]
fn xenio_killed_between_tapdisk_and_state_connects_anew() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.stop_xenio();
    rig.store.write(&DISK.back("state"), "2");
    rig.guest(DISK, "state", "3");
    rig.start_xenio();
    rig.wait_state(DISK, "4");
    assert_eq!(rig.tapdisk.rings().len(), 1);
}

#[test]
fn xenio_killed_before_a_resumed_frontend_was_told_tells_it() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    rig.stop_xenio();
    let mut spy = rig.spy(DISK);
    // As the former xenio left it: the new ring is connected, Connected is not yet written once more.
    rig.guest(DISK, "state", "3");
    rig.start_xenio();
    let mut told = Vec::new();
    // Its watch is what the frontend waits for.
    while !told.contains(&DISK.back("state")) {
        rig.settle();
        told.extend(spy.changes());
    }
    // The ring that was found may have been an older one.
    assert_eq!((rig.tapdisk.connects(), rig.tapdisk.disconnects()), (2, 1));
}

#[test]
fn h53_a_store_that_restarts_with_its_tree_leaves_disks_alone_and_is_found_again() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    rig.store.restart(TreeAfter::Kept);
    rig.connected(SECOND);
    assert_eq!((rig.tapdisk.connects(), rig.tapdisk.disconnects()), (2, 0));
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
}

#[test]
fn h53_a_store_that_comes_back_empty_does_not_cost_a_guest_its_disk() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    rig.store.restart(TreeAfter::Fresh);
    rig.connected(SECOND);
    assert_eq!(rig.tapdisk.rings().len(), 2);
    assert_eq!(rig.tapdisk.disconnects(), 0);
}

#[test]
fn h53_what_changed_while_the_store_was_away_is_found() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    rig.store.stop();
    rig.store.write(&DISK.front("state"), "6");
    rig.store.resume(TreeAfter::Kept);
    rig.wait_state(DISK, "6");
}

#[test]
fn xenio_started_before_the_store_waits_for_it() {
    let mut rig = Rig::without_xenio();
    rig.store.stop();
    rig.start_xenio();
    rig.store.resume(TreeAfter::Kept);
    rig.add(DISK);
    rig.wait_state(DISK, "2");
}

#[test]
fn an_error_of_the_store_delays_a_device_and_no_more() {
    let rig = Rig::new();
    rig.settle();
    rig.store.fail_write(2, nix::errno::Errno::ENOSPC);
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    assert_eq!(rig.value(&DISK.back("max-ring-page-order")).as_deref(), Some("4"));
}
