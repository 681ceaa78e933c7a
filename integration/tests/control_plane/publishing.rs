//! Guarded writes to a backend directory, one at a time.

use xenio::machine::Phase;
use xenio::paths::DeviceId;
use xenio::publish::{Change, Outcome, Place, apply};

use crate::rig::{DISK, Rig};

fn place() -> Place {
    let id = DeviceId { domid: blkif::DomId(DISK.domid), vdev: blkif::VdevId(DISK.vdev) };
    Place { dir: DISK.backend(), own_domid: 0, id }
}

fn change(state: Option<Phase>) -> Change {
    let entries = vec![("sectors", "8".to_owned()), ("sector-size", "512".to_owned())];
    let error = Some((DISK.error().trim_end_matches("/error").to_owned(), "22 words".to_owned()));
    Change { entries, error, state, only_news: false }
}

#[test]
fn everything_is_written_in_one_step_readable_for_the_guest() {
    let rig = Rig::without_xenio();
    rig.add(DISK);
    let outcome = apply(&mut rig.client(), &place(), Phase::Initialising, &change(Some(Phase::InitWait)));
    assert_eq!(outcome.unwrap(), Outcome::Done);
    assert_eq!(rig.value(&DISK.back("sectors")).as_deref(), Some("8"));
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("2"));
    assert_eq!(rig.value(&DISK.error()).as_deref(), Some("22 words"));
    assert!(rig.is_published(&DISK.back("sector-size"), 0, DISK.domid));
}

#[test]
fn values_that_stand_there_already_wake_nobody() {
    let rig = Rig::without_xenio();
    rig.add_with(DISK, &[("sectors", "8")]);
    let mut spy = rig.spy(DISK);
    let change = Change { error: None, ..change(None) };
    apply(&mut rig.client(), &place(), Phase::Initialising, &change).unwrap();
    let changes = spy.changes();
    assert!(changes.iter().all(|path| *path == DISK.back("sector-size")), "{changes:?}");
    apply(&mut rig.client(), &place(), Phase::Initialising, &change).unwrap();
    assert_eq!(spy.changes(), [""; 0]);
}

#[test]
fn a_state_that_only_announces_news_is_written_only_with_them() {
    let rig = Rig::without_xenio();
    rig.add_with(DISK, &[("sectors", "8"), ("sector-size", "512"), ("state", "4")]);
    let mut spy = rig.spy(DISK);
    let change = Change { only_news: true, error: None, ..change(Some(Phase::Connected)) };
    apply(&mut rig.client(), &place(), Phase::Connected, &change).unwrap();
    assert_eq!(spy.changes(), [""; 0]);
    rig.store.write(&DISK.back("sectors"), "7");
    spy.changes();
    apply(&mut rig.client(), &place(), Phase::Connected, &change).unwrap();
    assert!(spy.changes().contains(&DISK.back("state")));
}

#[test]
fn h52_nothing_is_written_where_the_directory_is_gone() {
    let rig = Rig::without_xenio();
    let outcome = apply(&mut rig.client(), &place(), Phase::Initialising, &change(Some(Phase::InitWait)));
    assert_eq!(outcome.unwrap(), Outcome::Stale);
    // What a state written too late would leave behind.
    rig.store.write(&DISK.back("state"), "1");
    let outcome = apply(&mut rig.client(), &place(), Phase::Initialising, &change(Some(Phase::InitWait)));
    assert_eq!(outcome.unwrap(), Outcome::Stale);
    assert!(!rig.store.exists(&DISK.back("sectors")));
    assert!(!rig.store.exists(&DISK.error()));
}

#[test]
fn nothing_is_written_over_a_state_that_the_toolstack_has_changed() {
    let rig = Rig::without_xenio();
    rig.add_with(DISK, &[("state", "5")]);
    let outcome = apply(&mut rig.client(), &place(), Phase::InitWait, &change(Some(Phase::Connected)));
    assert_eq!(outcome.unwrap(), Outcome::Stale);
    assert_eq!(rig.value(&DISK.back("state")).as_deref(), Some("5"));
    assert!(!rig.store.exists(&DISK.back("sectors")));
}
