//! vhd-util changes an image.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use format::testing::{Memory, Op, Parent, Random, Subject, Turns, crash_states, stamps};
use tempfile::TempDir;
use vhd::{NewParent, OpenOptions, Uuid, Vhd};

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
        let parents: Vec<Parent> = vec![Rc::new(RefCell::new(parent.image))];
        assert!(
            Turns::open(&shape, child.clone(), parents).contents() == contents,
            "after {done} operations"
        );
    });
}

/// An image over others, the nearest first, with these writes.
fn over(
    shape: &Shape,
    image: Memory,
    below: &[&Memory],
    writes: Vec<(u64, Vec<u8>)>,
    random: &mut Random,
) -> Memory {
    let mut disk = Turns::open(shape, image, parents(shape, below));
    disk.write(writes, random);
    let image = disk.close().0;
    Memory::of(image.bytes, true)
}

fn parents(shape: &Shape, below: &[&Memory]) -> Vec<Parent> {
    let open = |image: &&Memory| Turns::open(shape, (*image).clone(), Vec::new()).image;
    below.iter().map(|image| -> Parent { Rc::new(RefCell::new(open(image))) }).collect()
}

#[test]
fn a_coalesce_into_an_ancestor_never_changes_what_the_child_shows() {
    if skipped() {
        return;
    }
    let (folder, shape, mut random) = (TempDir::new().unwrap(), Shape::default(), Random::new(6));
    let named = |number: u8, name: &str| {
        let (name, path) = (name.to_owned(), format!("./{name}"));
        Some(NewParent { uuid: Uuid([number; 16]), timestamp: 1, name, path })
    };
    let base = shape.image(SECTORS, 1, None);
    let base = over(&shape, base, &[], vec![(0, stamps(0, 5000, 1))], &mut random);
    // What lies between has all of a block, of which the child then has a part.
    let middle = shape.image(SECTORS, 2, named(1, "base.vhd"));
    let writes = vec![(0, stamps(0, 4096, 2)), (9000, stamps(9000, 100, 3))];
    let middle = over(&shape, middle, &[&base], writes, &mut random);
    let child = shape.image(SECTORS, 3, named(2, "middle.vhd"));
    let writes = vec![(100, stamps(100, 60, 4)), (9050, stamps(9050, 500, 5))];
    let child = over(&shape, child, &[&middle, &base], writes, &mut random);
    let shows = |base: &Memory, middle: &Memory| {
        Turns::open(&shape, child.clone(), parents(&shape, &[middle, base])).contents()
    };
    let expected = shows(&base, &middle);
    for (name, image) in [("base.vhd", &base), ("middle.vhd", &middle), ("child.vhd", &child)] {
        std::fs::write(folder.path().join(name), &image.bytes).unwrap();
    }
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let args = ["coalesce", "-n", &path("child.vhd"), "-a", &path("base.vhd")];
    let (start, log, trace) = record(folder.path(), "base.vhd", &args);
    let between = changes_of(&trace, &folder.path().join("middle.vhd"));
    assert!(!between.is_empty(), "what is between gives way");
    crash_states(&start, &operations(&log), 3, &mut random, |done, state, _| {
        shape.check(&state, false);
        let untouched = between.first().is_none_or(|(first, _)| moment(&log, done) <= *first);
        // Later the two are compared the other way round.
        assert!(!untouched || shows(&state, &middle) == expected, "after {done} operations on the ancestor");
    });
    crash_states(&middle, &operations(&between), 3, &mut random, |done, state, _| {
        shape.check(&state, false);
        let base = durable(start.clone(), &log, moment(&between, done));
        assert!(shows(&base, &state) == expected, "after {done} operations on what is between");
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
        let saved = durable(Memory::file(), &journal_log, moment(&log, done)).bytes;
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
        let saved = durable(Memory::file(), &journal_log, moment(&log, done)).bytes;
        let undo = ["revert", "-n", path.to_str().unwrap(), "-j", journal.to_str().unwrap()];
        let state = intact_or_undone(state, (&path, &journal), &saved, &undo);
        shape.check(&state, false);
        let found = Turns::open(&shape, state, Vec::new()).contents();
        assert!(found == old || found == new, "after {done} operations of {}", log.len());
        assert!(done < log.len() || found == new, "in the end it has its new size");
    });
}

/// What of a file, which was like this at first, is certainly on the disk at some moment.
fn durable(mut file: Memory, log: &[(u64, Op)], now: u64) -> Memory {
    let before = &log[..log.partition_point(|(moment, _)| *moment < now)];
    let flushed = before.iter().rposition(|(_, op)| *op == Op::Flush).map_or(0, |at| at + 1);
    before[..flushed].iter().for_each(|(_, op)| file.apply(op));
    Memory::of(file.bytes, file.regular)
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
    // A new file: the one before may be open still, and locked, in a process that another test is just starting.
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, &state.bytes).unwrap();
    std::fs::write(journal, saved).unwrap();
    let mut text = Vec::new();
    let code = vhd::util::run(undo.iter().map(Into::into), &mut text, &mut std::io::sink());
    assert_eq!(code, 0, "{}", String::from_utf8_lossy(&text));
    assert!(!journal.exists(), "what is undone needs no journal any more");
    Memory::of(std::fs::read(path).unwrap(), true)
}
