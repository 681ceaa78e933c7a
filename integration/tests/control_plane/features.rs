//! Everything that two ends agree on, refuse, or misunderstand.

use tap_ctl::proto::{Discard, DiskInfo, Polling, QueueParams, RingParams};
use xenio::features::Offer;

use crate::fake_tapdisk::disk;
use crate::rig::{DISK, Rig};

const DISCARD: Discard = Discard { granularity: 4096, alignment: 0, secure: true };

/// The ring of a device whose toolstack and guest have written these keys beside the usual ones.
fn ring_with(toolstack: &[(&str, &str)], guest: &[(&str, &str)], info: DiskInfo) -> RingParams {
    let rig = Rig::new();
    rig.tapdisk.open(0, info);
    rig.add_with(DISK, toolstack);
    rig.wait_state(DISK, "2");
    rig.hotplug(DISK);
    for (key, value) in guest {
        rig.guest(DISK, key, value);
    }
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    rig.tapdisk.rings().remove(0)
}

#[test]
fn persistent_grants_are_used_when_both_ends_offer_them() {
    for (value, expected) in [("1", true), ("0", false), ("banana", false), ("", false), ("-1", false)] {
        let ring = ring_with(&[], &[("feature-persistent", value)], disk());
        assert_eq!(ring.persistent, expected, "{value:?}");
    }
    assert!(!ring_with(&[], &[], disk()).persistent);
}

/// The keys of a frontend with so many queues.
fn queues(count: u32) -> Vec<(String, String)> {
    let keys = |queue: u32| {
        let key = move |name: &str| format!("queue-{queue}/{name}");
        [(key("ring-ref"), (100 + queue).to_string()), (key("event-channel"), (9 + queue).to_string())]
    };
    let number = [("multi-queue-num-queues".to_owned(), count.to_string())];
    (0..count).flat_map(keys).chain(number).collect()
}

#[test]
fn every_number_of_queues_up_to_the_offer_reaches_the_tapdisk_in_order() {
    for count in 1..=4 {
        let keys = queues(count);
        let keys: Vec<(&str, &str)> =
            keys.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let expected: Vec<QueueParams> = match count {
            // With a single queue its keys stand where a frontend without the feature writes them.
            1 => vec![QueueParams { ring_refs: vec![8], port: 9 }],
            _ => (0..count).map(|n| QueueParams { ring_refs: vec![100 + n], port: 9 + n }).collect(),
        };
        assert_eq!(ring_with(&[], &keys, disk()).queues, expected);
    }
}

#[test]
fn queues_beyond_the_offer_refuse_the_device() {
    for (offered, asked) in [(1, 2), (2, 3), (4, 5), (4, 0)] {
        let mut rig = Rig::without_xenio();
        rig.offer = Offer { max_queues: offered };
        rig.start_xenio();
        rig.add(DISK);
        rig.wait_state(DISK, "2");
        assert_eq!(rig.value(&DISK.back("multi-queue-max-queues")), Some(offered.to_string()));
        rig.hotplug(DISK);
        for (key, value) in queues(asked) {
            rig.guest(DISK, &key, &value);
        }
        rig.offer_ring(DISK);
        rig.wait_error(DISK, "multi-queue-num-queues");
        rig.wait_state(DISK, "5");
        assert_eq!(rig.tapdisk.connects(), 0);
    }
}

#[test]
fn several_rings_of_several_pages_are_read() {
    let mut keys = vec![("multi-queue-num-queues".to_owned(), "2".to_owned())];
    keys.push(("ring-page-order".to_owned(), "1".to_owned()));
    for queue in 0..2 {
        for page in 0..2 {
            keys.push((format!("queue-{queue}/ring-ref{page}"), (40 + queue * 2 + page).to_string()));
        }
        keys.push((format!("queue-{queue}/event-channel"), (9 + queue).to_string()));
    }
    let keys: Vec<(&str, &str)> = keys.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let rings: Vec<Vec<u32>> =
        ring_with(&[], &keys, disk()).queues.into_iter().map(|queue| queue.ring_refs).collect();
    assert_eq!(rings, [[40, 41], [42, 43]]);
}

#[test]
fn discard_is_offered_once_the_disk_is_known() {
    let rig = Rig::new();
    rig.tapdisk.open(0, DiskInfo { discard: Some(DISCARD), ..disk() });
    rig.add(DISK);
    rig.wait_state(DISK, "2");
    assert_eq!(rig.value(&DISK.back("feature-discard")).as_deref(), Some("0"));
    rig.hotplug(DISK);
    rig.offer_ring(DISK);
    rig.wait_state(DISK, "4");
    for (key, value) in [
        ("feature-discard", "1"),
        ("discard-granularity", "4096"),
        ("discard-alignment", "0"),
        ("discard-secure", "1"),
    ] {
        assert_eq!(rig.value(&DISK.back(key)).as_deref(), Some(value), "{key}");
        assert!(rig.is_published(&DISK.back(key), 0, DISK.domid), "{key}");
    }
    assert!(rig.tapdisk.rings()[0].discard);
}

#[test]
fn discard_is_not_offered_against_the_toolstack_the_mode_or_the_disk() {
    let can = DiskInfo { discard: Some(DISCARD), ..disk() };
    let readonly = DiskInfo { readonly: true, ..can };
    for (toolstack, info, expected) in [
        (("discard-enable", "1"), can, true),
        (("discard-enable", "banana"), can, true),
        (("discard-enable", "0"), can, false),
        (("mode", "r"), can, false),
        (("discard-enable", "1"), readonly, false),
        (("discard-enable", "1"), disk(), false),
    ] {
        assert_eq!(ring_with(&[toolstack], &[], info).discard, expected, "{toolstack:?} {info:?}");
    }
}

#[test]
fn the_toolstacks_polling_reaches_the_tapdisk_and_nonsense_does_not() {
    let none = Polling::default();
    for (duration, threshold, expected) in [
        ("1000", "30", Polling { duration_us: Some(1000), idle_threshold: 30 }),
        ("0", "0", Polling { duration_us: Some(0), idle_threshold: 0 }),
        ("6 ms", "101", none),
        ("-1", "", none),
        ("4294967296", "50%", none),
    ] {
        let keys = [("polling-duration", duration), ("polling-idle-threshold", threshold)];
        assert_eq!(ring_with(&keys, &[], disk()).polling, expected, "{keys:?}");
    }
    assert_eq!(ring_with(&[], &[], disk()).polling, none);
}

#[test]
fn a_frontend_that_asks_for_nothing_gets_the_plain_protocol() {
    let plain = ring_with(&[], &[], disk());
    assert_eq!((plain.queues.len(), plain.persistent, plain.discard), (1, false, false));
}
