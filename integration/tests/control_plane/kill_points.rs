//! The life of a disk, in which xenio is killed at every point, or loses XenStore at every message. However often that happens, the
//! life has the same turns with the same outcome: the same tree, the same rings.

use std::sync::Arc;
use std::time::{Duration, Instant};

use integration::sim::store::{Cut, TreeAfter, Waited, What, When};
use tap_ctl::Request;
use tap_ctl::proto::{DiskInfo, RingParams};

use crate::fake_tapdisk::disk;
use crate::rig::{DISK, Disk, PATIENCE, Rig};

/// What toolstack, guest or tapdisk do, and what they then wait for.
struct Turn {
    name: &'static str,
    act: fn(&Rig),
    /// The node that shows the answer, and the value that it is to have.
    node: fn() -> String,
    value: Option<&'static str>,
}

fn state() -> String {
    DISK.back("state")
}

fn sectors() -> String {
    DISK.back("sectors")
}

fn error() -> String {
    DISK.error()
}

const fn turn(name: &'static str, act: fn(&Rig), state_then: &'static str) -> Turn {
    Turn { name, act, node: state, value: Some(state_then) }
}

fn ring(rig: &Rig, gref: &str) {
    rig.guest(DISK, "ring-ref", gref);
    rig.guest(DISK, "event-channel", "9");
    rig.guest(DISK, "protocol", "x86_64-abi");
    rig.guest(DISK, "state", "3");
}

/// libxl's request to remove the disk, in one step.
fn ask_to_close(rig: &Rig) {
    rig.store.write_all(&[(&DISK.back("online"), "0"), (&DISK.back("state"), "5")]);
}

const APPEARS: Turn = turn("appears", |rig| rig.add(DISK), "2");
const HOTPLUG: Turn =
    Turn { name: "hotplug", act: |rig| rig.hotplug(DISK), node: sectors, value: Some("2048") };
const CONNECTS: Turn = turn("connects", |rig| ring(rig, "8"), "4");
const CLOSES: Turn = turn("closes", |rig| rig.guest(DISK, "state", "6"), "6");
const BEGINS_ANEW: Turn = turn("begins anew", |rig| rig.guest(DISK, "state", "1"), "2");
const RECONNECTS: Turn = turn("reconnects", |rig| ring(rig, "78"), "4");
const REMOVED_BY_CONSENT: Turn = turn(
    "is removed by consent",
    |rig| {
        rig.guest(DISK, "state", "4");
        ask_to_close(rig);
        rig.guest(DISK, "state", "5");
        rig.guest(DISK, "state", "6");
    },
    "6",
);
const DIRECTORIES_GO: Turn = Turn {
    name: "its directories go",
    act: |rig| {
        rig.store.rm(&DISK.backend());
        rig.store.rm(&DISK.frontend());
    },
    node: error,
    value: None,
};

const WHOLE: [Turn; 19] = [
    APPEARS,
    HOTPLUG,
    CONNECTS,
    Turn {
        name: "grows",
        act: |rig| {
            rig.guest(DISK, "state", "4");
            rig.tapdisk.resize(0, 4096);
        },
        node: sectors,
        value: Some("4096"),
    },
    turn("is about to close", |rig| rig.guest(DISK, "state", "5"), "5"),
    turn("thinks better of it", |rig| ring(rig, "77"), "4"),
    CLOSES,
    BEGINS_ANEW,
    RECONNECTS,
    turn(
        "fails",
        |rig| {
            rig.guest(DISK, "state", "4");
            rig.tapdisk.fail(0);
        },
        "5",
    ),
    turn(
        "is opened anew and given up",
        |rig| {
            // No smaller than it was, or the tree would depend on when one looks.
            rig.tapdisk.open(0, DiskInfo { sectors: 4096, ..disk() });
            rig.guest(DISK, "state", "6");
        },
        "6",
    ),
    BEGINS_ANEW,
    turn("is used again", |rig| ring(rig, "79"), "4"),
    REMOVED_BY_CONSENT,
    DIRECTORIES_GO,
    turn("appears again", |rig| rig.add(DISK), "2"),
    turn(
        "connects as firmware does",
        |rig| {
            for (key, value) in [("ring-ref", "80"), ("event-channel", "9"), ("state", "4")] {
                rig.guest(DISK, key, value);
            }
            rig.hotplug(DISK);
        },
        "4",
    ),
    turn(
        "is removed by force",
        |rig| {
            rig.store.rm(&DISK.frontend());
            ask_to_close(rig);
        },
        "6",
    ),
    DIRECTORIES_GO,
];

const SHORT: [Turn; 8] =
    [APPEARS, HOTPLUG, CONNECTS, CLOSES, BEGINS_ANEW, RECONNECTS, REMOVED_BY_CONSENT, DIRECTORIES_GO];

/// What is there after a turn.
struct After {
    nodes: Vec<String>,
    rings: Vec<RingParams>,
}

fn nodes(rig: &Rig) -> Vec<String> {
    let error = DISK.error();
    let error = error.strip_suffix("/error").unwrap();
    let places = [DISK.backend(), DISK.frontend(), error.to_owned()];
    let folder = rig.dir.root().to_str().unwrap();
    let nodes = places.iter().flat_map(|place| rig.store.dump(place));
    nodes.map(|node| node.replace(folder, "/run/blktap-control")).collect()
}

/// Waits as xenio's killer: a xenio that has lost XenStore for good is replaced.
fn wait(rig: &mut Rig, path: &str, value: Option<&str>, context: &str) {
    loop {
        let wanted = |found: Option<&[u8]>| found == value.map(str::as_bytes);
        match rig.store.wait_for_or_cut(path, PATIENCE, wanted) {
            Waited::Reached => return,
            Waited::Cut => replace_xenio(rig),
            Waited::TimedOut => panic!("{context}: {path} is {:?}, not {value:?}", rig.value(path)),
        }
    }
}

fn replace_xenio(rig: &mut Rig) {
    rig.stop_xenio();
    rig.store.resume(TreeAfter::Kept);
    rig.start_xenio();
}

/// Lives the life, and compares each turn's outcome with the undisturbed life's; gives them.
fn live(
    turns: &[Turn],
    expected: Option<&[After]>,
    disturb: impl FnOnce(&Rig),
    what: &str,
) -> (Rig, Vec<After>) {
    let mut rig = Rig::without_xenio();
    disturb(&rig);
    rig.start_xenio();
    let mut outcomes = Vec::new();
    for (number, turn) in turns.iter().enumerate() {
        let context = format!("{what}, when the disk {}", turn.name);
        (turn.act)(&rig);
        wait(&mut rig, &(turn.node)(), turn.value, &context);
        if let Some(expected) = expected {
            let start = Instant::now();
            // Closing says nothing of the ring: the next xenio may have been about to connect it anew.
            let certain = turn.value != Some("5");
            while certain && !rig.tapdisk.serves(&expected[number].rings, Duration::from_millis(5)) {
                assert!(start.elapsed() < PATIENCE, "{context}: {:?}", rig.tapdisk.rings());
                if rig.store.is_cut() {
                    replace_xenio(&mut rig);
                }
            }
            let (found, expected) = (nodes(&rig), &expected[number].nodes);
            let odd: Vec<_> = found.iter().filter(|node| !expected.contains(node)).collect();
            let missing: Vec<_> = expected.iter().filter(|node| !found.contains(node)).collect();
            assert!(odd.is_empty() && missing.is_empty(), "{context}: {odd:?} instead of {missing:?}");
        }
        outcomes.push(After { nodes: nodes(&rig), rings: rig.tapdisk.rings() });
    }
    // Whoever serves now is well.
    let sentinel = Disk { domid: 32_000, vdev: 1 };
    rig.add(sentinel);
    wait(&mut rig, &sentinel.back("state"), Some("2"), what);
    assert!(nodes(&rig).is_empty(), "{what}: {:?}", nodes(&rig));
    assert!(rig.tapdisk.rings().is_empty(), "{what}");
    (rig, outcomes)
}

/// Lives once undisturbed, then with each disturbance until one comes too late; gives how many came in time.
fn disturbed(
    turns: &[Turn],
    what: &str,
    mut disturb: impl FnMut(&Rig, usize),
    missed: impl Fn(&Rig) -> bool,
) -> usize {
    let (_, expected) = live(turns, None, |_| {}, "undisturbed");
    for nth in 1.. {
        let context = format!("{what} {nth}");
        let (rig, _) = live(turns, Some(&expected), |rig| disturb(rig, nth), &context);
        if missed(&rig) {
            return nth - 1;
        }
    }
    unreachable!("lives end")
}

fn killed_at_change(when: When) -> usize {
    let cut = Cut { what: What::Changes, when, stop: true, every: None };
    disturbed(
        &WHOLE,
        "xenio killed at change",
        |rig, nth| rig.store.cut_at(nth, cut),
        |rig| rig.store.is_uncut(),
    )
}

#[test]
fn xenio_killed_after_any_change_of_xenstore_leaves_a_life_that_goes_on() {
    let points = killed_at_change(When::After);
    assert!(points > 60, "{points} points");
}

#[test]
fn xenio_killed_before_any_change_of_xenstore_leaves_a_life_that_goes_on() {
    let points = killed_at_change(When::Before);
    assert!(points > 60, "{points} points");
}

#[test]
fn xenio_killed_at_any_message_to_a_tapdisk_leaves_a_life_that_goes_on() {
    for carried_out in [true, false] {
        let points = disturbed(
            &WHOLE,
            "xenio killed at message",
            |rig, nth| {
                let store = Arc::clone(&rig.store);
                rig.tapdisk.strike(nth, carried_out, move || store.cut());
            },
            |rig| rig.tapdisk.is_unstruck(),
        );
        assert!(points > 15, "{points} points");
    }
}

/// How many requests a connection has before it is cut too: more than xenio needs to connect and to get one thing done.
const DISTANCE: usize = 150;

/// Every message of the life is one of those, in one of the lives, at which XenStore is lost; in each life about every 150th.
#[test]
fn h53_xenstore_lost_at_any_message_is_found_again_and_no_ring_is_touched() {
    let asked = |rig: &Rig| -> Vec<Request> {
        let rings =
            |request: &Request| matches!(request, Request::Connect { .. } | Request::Disconnect { .. });
        rig.tapdisk.log().into_iter().filter(rings).collect()
    };
    let (rig, expected) = live(&SHORT, None, |_| {}, "undisturbed");
    let undisturbed = asked(&rig);
    for when in [When::Before, When::InReply, When::After] {
        for first in 1..=DISTANCE {
            let cut = Cut { what: What::Requests, when, stop: false, every: Some(DISTANCE) };
            let context = format!("XenStore lost {when:?} request {first}");
            let (rig, _) = live(&SHORT, Some(&expected), |rig| rig.store.cut_at(first, cut), &context);
            assert_eq!(asked(&rig), undisturbed, "{context}");
        }
    }
}
