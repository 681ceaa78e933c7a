//! Operations of the tools that stop at any moment: what an image and its journal hold afterwards is the old state or the
//! new one, or can be brought back to the old one, also if that is cut short too.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use format::blocking::{Blocking, Storage, nothing};
use format::testing::{Memory, Op, Random, SECTOR, Subject, Turns, crash_states, seeds, stamps};
use format::{Format, Lookup};
use vhd::journal::{Journal, State};
use vhd::transfer::{self, Run, Target};
use vhd::{DiskType, Error, NewParent, OpenOptions, Uuid, Vhd, enlarge, relink};

use crate::support::{self, Shape};

/// A storage that notes in which order several of them were used.
struct Part {
    memory: Memory,
    number: usize,
    order: Rc<RefCell<Vec<usize>>>,
}

impl Part {
    fn noted<T>(&mut self, act: impl FnOnce(&mut Memory) -> io::Result<T>) -> io::Result<T> {
        let before = self.memory.log.len();
        let result = act(&mut self.memory);
        let done = self.memory.log.len() - before;
        self.order.borrow_mut().extend(std::iter::repeat_n(self.number, done));
        result
    }
}

impl Storage for Part {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.memory.read_at(offset, buf)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.noted(|memory| memory.write_at(offset, bytes))
    }

    fn size(&self) -> io::Result<u64> {
        self.memory.size()
    }

    fn is_regular(&self) -> io::Result<bool> {
        self.memory.is_regular()
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.noted(|memory| memory.set_len(len))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.noted(Memory::sync)
    }

    fn punch(&mut self, range: Range<u64>) -> io::Result<()> {
        self.noted(|memory| memory.punch(range))
    }

    fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        self.noted(|memory| memory.zero(range))
    }
}

/// All states in which an operation on an image and a journal can leave both, as far as `each` random ones at a time show.
fn stops(
    image: &Memory,
    each: usize,
    random: &mut Random,
    operate: impl FnOnce(&mut Part, &mut Part),
    mut visit: impl FnMut(Memory, Memory, &mut Random),
) {
    let order = Rc::new(RefCell::new(Vec::new()));
    let part = |memory, number| Part { memory, number, order: order.clone() };
    let (mut image, mut journal) = (part(start(image), 0), part(Memory::file(), 1));
    let starts = [image.memory.clone(), journal.memory.clone()];
    operate(&mut image, &mut journal);
    let states = [(&starts[0], &image.memory.log), (&starts[1], &journal.memory.log)].map(|(start, log)| {
        let mut states = vec![Vec::new(); log.len() + 1];
        crash_states(start, log, each, random, |done, state, _| states[done].push(state));
        states
    });
    let mut done = [0; 2];
    for next in std::iter::once(None).chain(order.borrow().iter().map(Some)) {
        if let Some(&number) = next {
            done[number] += 1;
        }
        for _ in 0..each {
            let [image, journal] = [0, 1].map(|i| random.pick(&states[i][done[i]]));
            visit(image, journal, random);
        }
    }
}

/// The same storage without history.
fn start(memory: &Memory) -> Memory {
    Memory::of(memory.bytes.clone(), memory.regular)
}

fn open(image: &Memory) -> Result<Vhd, Error> {
    support::open(image, &OpenOptions::default())
}

/// What an image without parent holds; above a parent, zeros where it has nothing.
fn contents(image: &Memory) -> Vec<u8> {
    let vhd = open(image).unwrap();
    let mut all = vec![0; usize::try_from(vhd.sectors()).unwrap() * SECTOR];
    Blocking::new(vhd, image.clone()).read(0, &mut all, &mut nothing).unwrap();
    all
}

/// An image with data in some blocks, closed cleanly; the disk has 128 blocks, whose entries fill a sector of the table.
fn image(shape: &Shape, random: &mut Random) -> Memory {
    const SECTORS: u64 = 1024;
    let mut disk = Turns::create(shape, SECTORS);
    if shape.kind != DiskType::Fixed && random.once_in(2) {
        disk = disk.snapshot(shape, 2);
    }
    for _ in 0..1 + random.below(8) {
        let sector = random.up_to(SECTORS - 20);
        disk.write(vec![(sector, stamps(sector, 1 + random.up_to(20), 7))], random);
    }
    start(&disk.close().0)
}

/// Brings an image back with its journal, which is cut short several times.
fn undo(mut image: Memory, journal: &Journal, random: &mut Random) -> Memory {
    for _ in 0..3 {
        let before = start(&image);
        let mut whole = before.clone();
        journal.undo(&mut whole).unwrap();
        let mut states = Vec::new();
        crash_states(&before, &whole.log, 2, random, |_, state, _| states.push(state));
        image = random.pick(&states);
        if journal.state(&image).unwrap() == State::Whole {
            break;
        }
    }
    if journal.state(&image).unwrap() == State::Interrupted {
        journal.undo(&mut image).unwrap();
    }
    start(&image)
}

#[test]
fn a_resize_that_stops_at_any_moment_is_complete_or_is_undone() {
    let (mut undone, mut complete) = (0, 0);
    seeds(8, |random| {
        let kind = random.pick(&[DiskType::Dynamic, DiskType::Dynamic, DiskType::Fixed]);
        let regular = kind == DiskType::Fixed || random.once_in(2);
        let shape = Shape { kind, block_size: 4096, regular, ..Shape::default() };
        let before = image(&shape, random);
        let sectors = match kind {
            DiskType::Fixed => random.pick(&[1000, 1030, 1200]),
            _ => random.pick(&[1032, 2048, 4096]),
        };
        let old = contents(&before);
        let mut new = old.clone();
        new.resize(usize::try_from(sectors).unwrap() * SECTOR, 0);
        let operate = |image: &mut Part, journal: &mut Part| {
            let vhd = support::open(&image.memory, &OpenOptions { writable: true, ..OpenOptions::default() });
            enlarge::resize(&vhd.unwrap(), image, journal, sectors, &mut |_| Ok(())).unwrap();
            shape.check(&image.memory, true);
            assert!(contents(&image.memory) == new);
        };
        stops(&before, 2, random, operate, |image, journal, random| {
            let journal = Journal::read(&journal);
            let image = match open(&image) {
                Ok(_) => {
                    assert!(journal.is_err() || journal.unwrap().state(&image).unwrap() == State::Whole);
                    image
                }
                Err(_) => {
                    undone += 1;
                    let journal = journal.unwrap();
                    assert_eq!(journal.state(&image).unwrap(), State::Interrupted);
                    let image = undo(image, &journal, random);
                    assert!(contents(&image) == old);
                    assert!(!regular || image.bytes == before.bytes);
                    image
                }
            };
            shape.check(&image, true);
            let found = contents(&image);
            complete += usize::from(found == new);
            assert!(found == old || found == new);
        });
    });
    assert!(undone > 100 && complete > 20, "{undone} {complete}");
}

#[test]
fn a_change_of_the_parent_that_stops_at_any_moment_is_complete_or_is_undone() {
    let (mut undone, mut complete) = (0, 0);
    let parent = |id: u8, path: &str| NewParent {
        uuid: Uuid([id; 16]),
        timestamp: 1,
        name: path.into(),
        path: format!("./{path}"),
    };
    let shape = Shape { block_size: 4096, ..Shape::default() };
    let before = shape.image(1024, 3, Some(parent(1, "old.vhd")));
    let names = |vhd: &Vhd| {
        let parent = vhd.parent().unwrap();
        assert!(parent.names.iter().all(|name| name.path == parent.names[0].path));
        (parent.uuid, parent.names[0].path.display().to_string(), vhd.header().unwrap().parent_name())
    };
    let state = |id: u8, path: &str| (Uuid([id; 16]), format!("./{path}"), path.to_owned());
    seeds(8, |random| {
        let operate = |image: &mut Part, journal: &mut Part| {
            let vhd = support::open(&image.memory, &OpenOptions { writable: true, ..OpenOptions::default() });
            let new = parent(9, "another name.vhd");
            relink::relink(&vhd.unwrap(), image, Some(journal), &new, &mut |_| Ok(())).unwrap();
            assert_eq!(names(&open(&image.memory).unwrap()), state(9, "another name.vhd"));
        };
        stops(&before, 2, random, operate, |image, journal, random| {
            let journal = Journal::read(&journal);
            let image = match open(&image) {
                Ok(_) => image,
                Err(_) => {
                    undone += 1;
                    undo(image, &journal.unwrap(), random)
                }
            };
            shape.check(&image, true);
            let found = names(&open(&image).unwrap());
            complete += usize::from(found == state(9, "another name.vhd"));
            assert!(found == state(1, "old.vhd") || found == state(9, "another name.vhd"), "{found:?}");
        });
    });
    assert!(undone > 10 && complete > 0, "{undone} {complete}");
}

/// What a child shows above its parent.
fn chain(child: &Memory, parent: &Memory) -> Vec<u8> {
    let vhd = open(child).unwrap();
    let mut all = vec![0; usize::try_from(vhd.sectors()).unwrap() * SECTOR];
    let mut below = Blocking::new(open(parent).unwrap(), parent.clone());
    let mut read = |sector, buf: &mut [u8]| Ok(below.read(sector, buf, &mut nothing)?);
    Blocking::new(vhd, child.clone()).read(0, &mut all, &mut read).unwrap();
    all
}

/// Copies what a child has into its parent.
fn coalesce(child: &Memory, parent: Memory) -> Memory {
    let mut vhd = open(child).unwrap();
    let sectors = vhd.sectors();
    let mut runs = |sector| loop {
        let wanted = u32::try_from(sectors - sector).unwrap().min(64);
        match vhd.map(sector, wanted)? {
            Lookup::Load(load) => {
                let mut bits = vec![0; load.len as usize];
                child.read_at(load.offset, &mut bits).unwrap();
                vhd.loaded(&load, &bits)?;
            }
            Lookup::Data { offset, count } => {
                let mut data = vec![0; count as usize * SECTOR];
                child.read_at(offset, &mut data).unwrap();
                return Ok(Run { count, data: Some(data) });
            }
            Lookup::Zero { count } | Lookup::Parent { count } | Lookup::Packed { count, .. } => {
                return Ok(Run { count, data: None });
            }
        }
    };
    let options = OpenOptions { writable: true, precise: true, ..OpenOptions::default() };
    let mut target = Target::Vhd(Box::new(support::open(&parent, &options).unwrap()), parent);
    transfer::copy(sectors, &mut runs, &mut target, &mut |_, _| {}).unwrap();
    let Target::Vhd(_, parent) = target else { panic!() };
    parent
}

#[test]
fn a_coalesce_that_stops_at_any_moment_changes_nothing_that_can_be_seen_and_can_be_repeated() {
    let shape = Shape { block_size: 4096, precise: true, ..Shape::default() };
    seeds(8, |random| {
        let mut disk = Turns::create(&shape, 300);
        let mut write = |disk: &mut Turns<Vhd>, value| {
            for _ in 0..1 + random.below(6) {
                let sector = random.up_to(270);
                disk.write(vec![(sector, stamps(sector, 1 + random.up_to(30), value))], random);
            }
        };
        write(&mut disk, 1);
        let parent = start(&disk.image.storage().clone());
        let parent = {
            let (storage, _) = Turns::open(&shape, parent, Vec::new()).close();
            start(&storage)
        };
        disk = Turns::open(&shape, parent.clone(), Vec::new()).snapshot(&shape, 2);
        write(&mut disk, 2);
        let child = start(&disk.close().0);
        let expected = chain(&child, &parent);
        let done = coalesce(&child, parent.clone());
        let mut ops = done.log.clone();
        ops.push(Op::Flush);
        crash_states(&parent, &ops, 3, random, |_, state, _| {
            shape.check(&state, false);
            assert!(chain(&child, &state) == expected);
            let again = start(&coalesce(&child, start(&state)));
            shape.check(&again, true);
            assert!(contents(&again) == expected);
        });
    });
}
