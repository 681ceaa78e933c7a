//! vhd-util changes an image.

use std::path::Path;

use format::testing::{Memory, Op, Parent, Random, Subject, Turns, crash_states, stamps};
use tempfile::TempDir;
use vhd::{OpenOptions, Uuid, Vhd};

use crate::recorder::{Recorder, changes_of};
use crate::skipped;
use crate::vhd_support::{Shape, open};

const SECTORS: u64 = 16384;

/// Runs vhd-util in a folder, following what it does to a file there. What it did, and its whole trace.
fn record(folder: &Path, name: &str, args: &[&str]) -> (Memory, Vec<(u64, Op)>, String) {
    let path = folder.join(name);
    let start = Memory::of(std::fs::read(&path).unwrap(), true);
    let program = Path::new(env!("CARGO_BIN_EXE_vhd-util-traced"));
    let recorder = Recorder::run(&path, start, program, args);
    let trace = recorder.trace();
    let (start, log) = recorder.stop();
    assert!(log.len() > 3, "{args:?} did {log:?}");
    (start, log, trace)
}

fn operations(log: &[(u64, Op)]) -> Vec<Op> {
    log.iter().map(|(_, op)| op.clone()).collect()
}

/// A parent, and a child over it; both have data.
fn chain(shape: &Shape, random: &mut Random) -> Turns<Vhd> {
    let mut disk = Turns::create(shape, SECTORS);
    disk.write(vec![(0, stamps(0, 3000, 1)), (9000, stamps(9000, 100, 2))], random);
    let mut disk = disk.snapshot(shape, 2);
    disk.write(vec![(2990, stamps(2990, 30, 3)), (12000, stamps(12000, 500, 4))], random);
    disk.reopen(shape)
}

/// Makes the files `child.vhd` and, as the child names it, `p.vhd` of a chain.
fn put(folder: &Path, disk: &Turns<Vhd>) {
    std::fs::write(folder.join("child.vhd"), &disk.image.storage().bytes).unwrap();
    for parent in &disk.parents {
        std::fs::write(folder.join("p.vhd"), &parent.borrow().storage().bytes).unwrap();
    }
}

#[test]
fn a_coalesce_never_changes_what_the_child_shows() {
    if skipped() {
        return;
    }
    let (folder, shape, mut random) = (TempDir::new().unwrap(), Shape::default(), Random::new(3));
    let mut disk = chain(&shape, &mut random);
    let contents = disk.contents();
    put(folder.path(), &disk);
    let child = folder.path().join("child.vhd");
    let (start, log, _) = record(folder.path(), "p.vhd", &["coalesce", "-n", child.to_str().unwrap()]);
    let child = disk.image.into_parts().1;
    let log = operations(&log);
    crash_states(&start, &log, 3, &mut random, |done, parent, _| {
        shape.check(&parent, false);
        let whole = done == log.len();
        let parent = Turns::open(&shape, parent, Vec::new());
        if whole {
            let mut alone = Turns::open(&shape, parent.image.storage().clone(), Vec::new());
            assert!(alone.contents() == contents, "in the end the parent has all of it");
        }
        let parents: Vec<Parent> = vec![std::rc::Rc::new(std::cell::RefCell::new(parent.image))];
        assert!(
            Turns::open(&shape, child.clone(), parents).contents() == contents,
            "after {done} operations"
        );
    });
}

#[test]
fn another_parent_is_named_entirely_or_not_at_all() {
    if skipped() {
        return;
    }
    let (folder, shape, mut random) = (TempDir::new().unwrap(), Shape::default(), Random::new(4));
    let disk = chain(&shape, &mut random);
    put(folder.path(), &disk);
    let other = folder.path().join("other.vhd");
    std::fs::write(&other, &shape.image(SECTORS, 9, None).bytes).unwrap();
    let child = folder.path().join("child.vhd");
    let args = ["modify", "-n", child.to_str().unwrap(), "-p", other.to_str().unwrap()];
    let (start, log, trace) = record(folder.path(), "child.vhd", &args);
    let journal = folder.path().join("child.vhd.relink-journal");
    let journal_log = changes_of(&trace, &journal);
    crash_states(&start, &operations(&log), 4, &mut random, |done, state, _| {
        let saved = durable(&journal_log, moment(&log, done));
        // Whatever opens the image to write finds the journal by itself.
        let undo = ["set", "-n", child.to_str().unwrap(), "-f", "hidden", "-v", "0"];
        let state = intact_or_undone(state, (&child, &journal), &saved, &undo);
        shape.check(&state, false);
        let parent = shape.open(&state, false).parent().unwrap();
        let name = parent.names.iter().any(|name| format!("{name:?}").contains("other.vhd"));
        let known = [(Uuid([1; 16]), false), (Uuid([9; 16]), true)];
        let found = (parent.uuid, name);
        assert!(known.contains(&found), "after {done} operations: {found:?}");
        assert!(done < log.len() || found == known[1], "in the end it is the new one");
    });
}

#[test]
fn a_snapshot_leaves_its_parent_alone() {
    if skipped() {
        return;
    }
    let (folder, shape, mut random) = (TempDir::new().unwrap(), Shape::default(), Random::new(5));
    put(folder.path(), &chain(&shape, &mut random));
    let (new, child) = (folder.path().join("new.vhd"), folder.path().join("child.vhd"));
    std::fs::write(&new, []).unwrap();
    let args = ["snapshot", "-n", new.to_str().unwrap(), "-p", child.to_str().unwrap()];
    let before = std::fs::read(&child).unwrap();
    let (start, log, _) = record(folder.path(), "new.vhd", &args);
    assert!(std::fs::read(&child).unwrap() == before);
    let log = operations(&log);
    crash_states(&start, &log, 4, &mut random, |done, state, _| {
        // What is not complete is no image; what is one is right.
        if let Ok(vhd) = open(&state, &OpenOptions::default()) {
            assert_eq!(vhd.parent().unwrap().uuid, Uuid([2; 16]), "after {done} operations");
            shape.check(&state, false);
        } else {
            assert!(done < log.len(), "in the end it is an image");
        }
    });
}

#[test]
fn a_resize_that_was_cut_short_is_undone_by_its_journal() {
    if skipped() {
        return;
    }
    for mebibytes in [40, 20] {
        resize_and_revert(mebibytes);
    }
}

fn resize_and_revert(mebibytes: u64) {
    let (folder, shape, mut random) = (TempDir::new().unwrap(), Shape::default(), Random::new(mebibytes));
    let mut disk = Turns::create(&shape, SECTORS);
    disk.write(vec![(0, stamps(0, 3000, 1)), (9000, stamps(9000, 100, 2))], &mut random);
    let mut disk = disk.reopen(&shape);
    let old = disk.contents();
    let mut new = old.clone();
    new.resize(usize::try_from(mebibytes << 20).unwrap(), 0);
    let path = folder.path().join("a.vhd");
    std::fs::write(&path, &disk.image.storage().bytes).unwrap();
    let journal = folder.path().join("journal");
    let size = mebibytes.to_string();
    let (name, saved) = (path.to_str().unwrap(), journal.to_str().unwrap());
    let (start, log, trace) =
        record(folder.path(), "a.vhd", &["resize", "-n", name, "-s", &size, "-j", saved]);
    let journal_log = changes_of(&trace, &journal);
    crash_states(&start, &operations(&log), 4, &mut random, |done, state, _| {
        let saved = durable(&journal_log, moment(&log, done));
        let undo = ["revert", "-n", path.to_str().unwrap(), "-j", journal.to_str().unwrap()];
        let state = intact_or_undone(state, (&path, &journal), &saved, &undo);
        shape.check(&state, false);
        let found = Turns::open(&shape, state, Vec::new()).contents();
        assert!(found == old || found == new, "after {done} operations of {}", log.len());
        assert!(done < log.len() || found == new, "in the end it has its new size");
    });
}

/// What of a file is certainly on the disk at some moment.
fn durable(log: &[(u64, Op)], now: u64) -> Vec<u8> {
    let before = &log[..log.partition_point(|(moment, _)| *moment < now)];
    let flushed = before.iter().rposition(|(_, op)| *op == Op::Flush).map_or(0, |at| at + 1);
    let mut file = Memory::file();
    before[..flushed].iter().for_each(|(_, op)| file.apply(op));
    file.bytes
}

/// The moment before which so many operations had been done.
fn moment(log: &[(u64, Op)], done: usize) -> u64 {
    log.get(done).map_or(u64::MAX, |(moment, _)| *moment)
}

/// The image, after vhd-util has undone what was cut short, if it was.
fn intact_or_undone(state: Memory, (path, journal): (&Path, &Path), saved: &[u8], undo: &[&str]) -> Memory {
    if open(&state, &OpenOptions { writable: true, ..OpenOptions::default() }).is_ok() {
        return state;
    }
    std::fs::write(path, &state.bytes).unwrap();
    std::fs::write(journal, saved).unwrap();
    let mut text = Vec::new();
    let code = vhd::util::run(undo.iter().map(Into::into), &mut text, &mut std::io::sink());
    assert_eq!(code, 0, "{}", String::from_utf8_lossy(&text));
    assert!(!journal.exists(), "what is undone needs no journal any more");
    Memory::of(std::fs::read(path).unwrap(), true)
}
