//! What a tapdisk tells unasked: a disk has grown, a disk has failed.

use integration::sim::store::TreeAfter;
use tap_ctl::proto::DiskInfo;
use tap_ctl::{Minor, Request};
use xenstore::{Access, Permission};

use crate::fake_tapdisk::{DEGRADATION, FAILURE, disk};
use crate::rig::{DISK, Disk, PID, Rig};

const SECOND: Disk = Disk { domid: 6, vdev: 51712 };

#[test]
fn a_disk_that_grows_under_its_guest_is_published_and_connected_written_again_in_one_step() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    let mut spy = rig.spy(DISK);
    rig.tapdisk.resize(0, 4096);
    rig.wait(&DISK.back("sectors"), "4096");
    // One transaction: whoever sees the size sees the state's event with it.
    let mut changes = spy.changes();
    changes.sort();
    changes.dedup();
    assert_eq!(changes, [DISK.back("sectors"), DISK.back("state")]);
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("4"));
    assert!(rig.is_published(&DISK.back("sectors"), 0, DISK.domid));
    rig.settle();
    assert_eq!((spy.changes(), rig.tapdisk.disconnects()), (Vec::new(), 0));
}

#[test]
fn a_disk_that_grows_before_its_guest_connects_is_published_without_a_state() {
    let rig = Rig::new();
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    rig.hotplug(DISK);
    rig.wait(&DISK.back("sectors"), "2048");
    rig.settle();
    let mut spy = rig.spy(DISK);
    rig.tapdisk.resize(0, 4096);
    rig.wait(&DISK.back("sectors"), "4096");
    assert!(!spy.changes().contains(&DISK.back("state")));
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!(rig.value(&DISK.back("sectors")).as_deref(), Some("4096"));
}

#[test]
fn a_guest_that_is_closing_is_told_the_size_when_it_connects_again() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.guest(DISK, "state", "5");
    rig.wait_state(DISK, "5");
    rig.tapdisk.resize(0, 4096);
    rig.settle();
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("5"));
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    rig.guest(DISK, "state", "1");
    rig.wait_state(DISK, "2");
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!(rig.value(&DISK.back("sectors")).as_deref(), Some("4096"));
}

#[test]
fn each_frontend_of_a_disk_is_told() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.connected(SECOND);
    rig.tapdisk.resize(0, 4096);
    rig.wait(&DISK.back("sectors"), "4096");
    rig.wait(&SECOND.back("sectors"), "4096");
    assert_eq!(rig.tapdisk.follows(), 1, "one connection for all disks of a tapdisk");
}

#[test]
fn old_and_foreign_news_change_nothing() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    let mut spy = rig.spy(DISK);
    rig.tapdisk.tell(0, DiskInfo { sectors: 1024, ..disk() });
    rig.tapdisk.tell(7, DiskInfo { sectors: 9999, ..disk() });
    // News come in order, so those before are done with.
    rig.tapdisk.resize(0, 2049);
    rig.wait(&DISK.back("sectors"), "2049");
    assert!(spy.changes().iter().all(|path| *path == DISK.back("sectors") || *path == DISK.back("state")));
    assert_eq!(rig.tapdisk.disconnects(), 0);
}

#[test]
fn a_disk_that_grew_while_xenio_was_away_is_told_at_once() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    rig.stop_xenio();
    rig.tapdisk.resize(0, 4096);
    let mut spy = rig.spy(DISK);
    rig.start_xenio();
    rig.wait(&DISK.back("sectors"), "4096");
    assert!(spy.changes().contains(&DISK.back("state")));
    assert_eq!(rig.tapdisk.disconnects(), 0);
    rig.tapdisk.resize(0, 8192);
    rig.wait(&DISK.back("sectors"), "8192");
}

#[test]
fn h53_news_that_come_while_the_store_is_away_are_told_afterwards() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.connected(SECOND);
    rig.settle();
    rig.store.stop();
    rig.tapdisk.resize(0, 4096);
    rig.store.resume(TreeAfter::Kept);
    rig.wait(&DISK.back("sectors"), "4096");
    rig.store.stop();
    rig.tapdisk.fail(0);
    rig.store.resume(TreeAfter::Kept);
    for disk in [DISK, SECOND] {
        rig.wait_state(disk, "5");
        rig.wait_error(disk, FAILURE);
    }
}

#[test]
fn another_offer_after_a_restart_is_not_pushed_on_a_guest_in_operation() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    rig.stop_xenio();
    rig.offer.max_queues = 1;
    let mut spy = rig.spy(DISK);
    rig.start_xenio();
    rig.connected(SECOND);
    assert_eq!(spy.changes(), [""; 0]);
    rig.tapdisk.resize(0, 4096);
    rig.wait(&DISK.back("sectors"), "4096");
    assert_eq!(rig.value(&DISK.back("multi-queue-max-queues")).as_deref(), Some("4"));
}

#[test]
fn a_failed_disk_is_reported_and_its_guest_is_asked_to_close() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.fail(0);
    rig.wait_state(DISK, "5");
    rig.wait_error(DISK, FAILURE);
    assert_eq!(rig.value(&DISK.error()), Some(format!("5 {FAILURE}")));
    rig.settle();
    assert_eq!(
        rig.tapdisk.rings().len(),
        1,
        "unanswered requests stay with the tapdisk until the guest has closed"
    );
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    assert_eq!(rig.tapdisk.rings().len(), 0);
}

#[test]
fn a_failed_disk_is_not_connected_again() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.fail(0);
    rig.wait_state(DISK, "5");
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    // Beginning anew, the guest finds a device that closes before there is anything to connect.
    rig.guest(DISK, "state", "1");
    rig.settle();
    rig.offer_ring(DISK);
    rig.settle();
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("6"));
    assert_eq!(rig.tapdisk.connects(), 1);
}

#[test]
fn a_failed_disk_that_was_opened_anew_is_connected_when_its_guest_comes_back() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.fail(0);
    rig.wait_state(DISK, "5");
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    // Another disk of the same tapdisk, whose news show that those before have arrived.
    rig.tapdisk.open(1, disk());
    rig.add(SECOND);
    rig.wait_state(SECOND, "2");
    let path = rig.dir.vbd_path(PID, Minor(1));
    rig.store.write(&SECOND.back("physical-device-path"), path.to_str().unwrap());
    rig.store.write(&SECOND.back("hotplug-status"), "connected");
    rig.wait(&SECOND.back("sectors"), "2048");
    rig.tapdisk.open(0, DiskInfo { sectors: 1024, ..disk() });
    rig.tapdisk.resize(1, 4096);
    rig.wait(&SECOND.back("sectors"), "4096");
    rig.guest(DISK, "state", "1");
    rig.wait_state(DISK, "2");
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    assert_eq!(rig.value(&DISK.back("sectors")).as_deref(), Some("1024"));
}

#[test]
fn a_minor_without_an_image_is_asked_for_once_however_much_was_told_before() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
    rig.tapdisk.close(0);
    let lists = || rig.tapdisk.log().iter().filter(|request| **request == Request::List).count();
    let before = lists();
    rig.add(SECOND);
    rig.hotplug(SECOND);
    rig.wait_error(SECOND, "does not serve minor 0");
    rig.settle();
    assert_eq!(lists(), before + 1);
}

#[test]
fn a_failure_is_known_to_the_next_xenio_and_to_the_next_device() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.stop_xenio();
    rig.tapdisk.fail(0);
    rig.start_xenio();
    rig.wait_state(DISK, "5");
    rig.wait_error(DISK, FAILURE);
    rig.add(SECOND);
    rig.hotplug(SECOND);
    rig.wait_error(SECOND, FAILURE);
    assert_eq!(rig.tapdisk.connects(), 1);
}

#[test]
fn a_failure_is_reported_once_however_often_it_is_told() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.fail(0);
    rig.wait_state(DISK, "5");
    rig.settle();
    let mut spy = rig.spy(DISK);
    for _ in 0..10 {
        rig.tapdisk.fail(0);
    }
    rig.settle();
    assert_eq!(spy.changes(), [""; 0]);
}

#[test]
fn a_connection_for_news_that_ends_is_made_anew_and_nothing_is_missed() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.wait_follows(1);
    rig.tapdisk.drop_followers();
    rig.tapdisk.wait_follows(2);
    rig.tapdisk.resize(0, 4096);
    rig.wait(&DISK.back("sectors"), "4096");
    assert_eq!(rig.tapdisk.disconnects(), 0);
}

#[test]
fn a_tapdisk_that_keeps_ending_the_connection_for_news_is_left_alone_and_served() {
    let rig = Rig::new();
    rig.connected(DISK);
    for count in 1..=6 {
        rig.tapdisk.wait_follows(count);
        rig.tapdisk.drop_followers();
    }
    rig.settle();
    assert_eq!(rig.tapdisk.follows(), 6);
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("4"));
    rig.guest(DISK, "state", "6");
    rig.wait_state(DISK, "6");
}

#[test]
fn a_tapdisk_of_an_earlier_release_serves_without_news() {
    let rig = Rig::new();
    rig.tapdisk.grow_old();
    rig.connected(DISK);
    rig.settle();
    assert_eq!(rig.tapdisk.follows(), 1);
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("4"));
}

#[test]
fn the_next_tapdisk_is_followed_when_one_has_died() {
    let rig = Rig::new();
    rig.connected(DISK);
    rig.tapdisk.crash(&rig.dir);
    rig.wait_state(DISK, "5");
    let other = crate::fake_tapdisk::FakeTapdisk::start(&rig.dir, PID + 1);
    other.open(3, disk());
    let path = rig.dir.vbd_path(PID + 1, Minor(3));
    rig.store.write(&DISK.back("physical-device-path"), path.to_str().unwrap());
    for (guest, answer) in [("6", "6"), ("1", "2")] {
        rig.guest(DISK, "state", guest);
        rig.wait_state(DISK, answer);
    }
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    other.resize(3, 4096);
    rig.wait(&DISK.back("sectors"), "4096");
}

#[test]
fn a_disk_that_lost_its_mirror_has_a_note_in_its_directory_until_it_has_one_again() {
    let mut rig = Rig::new();
    rig.connected(DISK);
    rig.settle();
    let note = DISK.back("degraded");
    assert_eq!(rig.value(&note), None);
    let mut spy = rig.spy(DISK);
    rig.tapdisk.degrade(0, true);
    rig.wait(&note, DEGRADATION);
    rig.settle();
    assert!(spy.changes().iter().all(|path| *path == note), "nothing that a guest looks at");
    let ours = [Permission::new(0, Access::None)];
    assert_eq!(
        rig.store.perms(&note).as_deref(),
        Some(&ours[..]),
        "it names images, which no guest is to know"
    );
    // Another xenio finds it, and takes it away although it has not written it.
    rig.stop_xenio();
    rig.start_xenio();
    rig.settle();
    assert_eq!(rig.value(&note).as_deref(), Some(DEGRADATION));
    rig.stop_xenio();
    rig.tapdisk.degrade(0, false);
    rig.start_xenio();
    rig.wait_gone(&note);
    assert_eq!((rig.value(&DISK.back("state")).as_deref(), rig.tapdisk.disconnects()), (Some("4"), 0));
}
