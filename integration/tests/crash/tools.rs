//! vhd-util changes an image.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use format::testing::{Memory, Op, Parent, Random, Subject, Turns, crash_states, stamps};
use tempfile::TempDir;
use vhd::{NewParent, OpenOptions, Uuid, Vhd};

use crate::folder;
use crate::recorder::Folder;
use crate::vhd_support::{Shape, open};

const SECTORS: u64 = 16384;

/// What a file was at first, and what was done to it.
type Recording = (Memory, Vec<(usize, Op)>);

/// Runs vhd-util in a folder. What it does to a file there.
fn record(folder: &Folder, name: &str, args: &[&str]) -> Recording {
    let start = Memory::of(folder.bytes(name), true);
    let output = Command::new(env!("CARGO_BIN_EXE_vhd-util-recorded")).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    let log = folder.log(name);
    assert!(log.len() > 3, "{args:?} did {log:?}");
    (start, log)
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn operations(log: &[(usize, Op)]) -> Vec<Op> {
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
fn put(folder: &Folder, disk: &Turns<Vhd>) {
    folder.put("child.vhd", disk.image.storage());
    for parent in &disk.parents {
        folder.put("p.vhd", parent.borrow().storage());
    }
}

#[test]
fn a_coalesce_never_changes_what_the_child_shows() {
    let Some(folder) = folder() else { return };
    let (shape, mut random) = (Shape::default(), Random::new(3));
    let mut disk = chain(&shape, &mut random);
    let contents = disk.contents();
    put(&folder, &disk);
    let (start, log) = record(&folder, "p.vhd", &["coalesce", "-n", &text(&folder.path("child.vhd"))]);
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
    let Some(folder) = folder() else { return };
    let (shape, mut random) = (Shape::default(), Random::new(6));
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
        folder.put(name, image);
    }
    let args = ["coalesce", "-n", &text(&folder.path("child.vhd")), "-a", &text(&folder.path("base.vhd"))];
    let (start, log) = record(&folder, "base.vhd", &args);
    let between = folder.log("middle.vhd");
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
    let Some(folder) = folder() else { return };
    let (shape, mut random) = (Shape::default(), Random::new(4));
    let disk = chain(&shape, &mut random);
    put(&folder, &disk);
    folder.put("other.vhd", &shape.image(SECTORS, 9, None));
    let args = ["modify", "-n", &text(&folder.path("child.vhd")), "-p", &text(&folder.path("other.vhd"))];
    let (start, log) = record(&folder, "child.vhd", &args);
    let journal_log = folder.log("child.vhd.relink-journal");
    let desk = TempDir::new().unwrap();
    let (child, journal) = (desk.path().join("child.vhd"), desk.path().join("child.vhd.relink-journal"));
    crash_states(&start, &operations(&log), 4, &mut random, |done, state, _| {
        let saved = durable(Memory::file(), &journal_log, moment(&log, done)).bytes;
        // Whatever opens the image to write finds the journal by itself.
        let undo = ["set", "-n", &text(&child), "-f", "hidden", "-v", "0"];
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
    let Some(folder) = folder() else { return };
    let (shape, mut random) = (Shape::default(), Random::new(5));
    put(&folder, &chain(&shape, &mut random));
    let new = folder.put("new.vhd", &Memory::file());
    let args = ["snapshot", "-n", &text(&new), "-p", &text(&folder.path("child.vhd"))];
    let (start, log) = record(&folder, "new.vhd", &args);
    assert!(folder.log("child.vhd").iter().all(|(_, op)| *op == Op::Flush));
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
    for mebibytes in [40, 20] {
        resize_and_revert(mebibytes);
    }
}

fn resize_and_revert(mebibytes: u64) {
    let Some(folder) = folder() else { return };
    let (shape, mut random) = (Shape::default(), Random::new(mebibytes));
    let mut disk = Turns::create(&shape, SECTORS);
    disk.write(vec![(0, stamps(0, 3000, 1)), (9000, stamps(9000, 100, 2))], &mut random);
    let mut disk = disk.reopen(&shape);
    let old = disk.contents();
    let mut new = old.clone();
    new.resize(usize::try_from(mebibytes << 20).unwrap(), 0);
    let (name, saved) = (text(&folder.put("a.vhd", disk.image.storage())), text(&folder.path("journal")));
    let size = mebibytes.to_string();
    let (start, log) = record(&folder, "a.vhd", &["resize", "-n", &name, "-s", &size, "-j", &saved]);
    let journal_log = folder.log("journal");
    let desk = TempDir::new().unwrap();
    let (path, journal) = (desk.path().join("a.vhd"), desk.path().join("journal"));
    crash_states(&start, &operations(&log), 4, &mut random, |done, state, _| {
        let saved = durable(Memory::file(), &journal_log, moment(&log, done)).bytes;
        let undo = ["revert", "-n", &text(&path), "-j", &text(&journal)];
        let state = intact_or_undone(state, (&path, &journal), &saved, &undo);
        shape.check(&state, false);
        let found = Turns::open(&shape, state, Vec::new()).contents();
        assert!(found == old || found == new, "after {done} operations of {}", log.len());
        assert!(done < log.len() || found == new, "in the end it has its new size");
    });
}

/// What of a file, which was like this at first, is certainly on the disk at some moment.
fn durable(mut file: Memory, log: &[(usize, Op)], now: usize) -> Memory {
    let before = &log[..log.partition_point(|(moment, _)| *moment < now)];
    let flushed = before.iter().rposition(|(_, op)| *op == Op::Flush).map_or(0, |at| at + 1);
    before[..flushed].iter().for_each(|(_, op)| file.apply(op));
    Memory::of(file.bytes, file.regular)
}

/// The moment before which so many operations had been done.
fn moment(log: &[(usize, Op)], done: usize) -> usize {
    log.get(done).map_or(usize::MAX, |(moment, _)| *moment)
}

/// The image, after vhd-util has undone what was cut short, if it was.
fn intact_or_undone(state: Memory, (path, journal): (&Path, &Path), saved: &[u8], undo: &[&str]) -> Memory {
    if open(&state, &OpenOptions { writable: true, ..OpenOptions::default() }).is_ok() {
        return state;
    }
    // A new file: the one before may be open still, and locked, in a process that another test is just starting.
    let _ = std::fs::remove_file(path);
    std::fs::write(path, &state.bytes).unwrap();
    std::fs::write(journal, saved).unwrap();
    let mut text = Vec::new();
    let code = vhd::util::run(undo.iter().map(Into::into), &mut text, &mut std::io::sink());
    assert_eq!(code, 0, "{}", String::from_utf8_lossy(&text));
    assert!(!journal.exists(), "what is undone needs no journal any more");
    Memory::of(std::fs::read(path).unwrap(), true)
}
