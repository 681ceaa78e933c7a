//! An image in memory that carries out what the core plans, and notes all that it does to its storage.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use format::{Format, Load, Lookup, MetaWrite, Plan, Prepare, Source, Step, Write};
use vhd::header::DEFAULT_BLOCK_SIZE;
use vhd::{DiskType, Error, NewImage, NewParent, OpenOptions, Uuid, Vhd};

pub const SECTOR: usize = 512;

/// A generator of numbers that are random enough: xorshift64*.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(number).unwrap() % limit.max(1)
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Leaves out runs of sectors that touch those before them: what comes of writing both at once is not defined.
pub fn apart<T: Copy>(runs: &[(u64, u64, T)]) -> Vec<(u64, u64, T)> {
    let mut kept: Vec<(u64, u64, T)> = Vec::new();
    for &(first, count, value) in runs {
        if kept.iter().all(|&(f, c, _)| first + count <= f || f + c <= first) {
            kept.push((first, count, value));
        }
    }
    kept
}

/// What was done to a storage.
#[derive(Debug, Clone)]
pub enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Flush,
}

/// A file or block device in memory.
#[derive(Debug, Clone)]
pub struct Store {
    pub bytes: Vec<u8>,
    pub regular: bool,
    pub log: Vec<Op>,
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl Store {
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let from = at(offset);
        let bytes = self.bytes.get(from..from + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(offset, bytes) => {
                let range = at(*offset)..at(*offset) + bytes.len();
                if range.end > self.bytes.len() {
                    assert!(self.regular, "write beyond the end of the device");
                    self.bytes.resize(range.end, 0);
                }
                self.bytes[range].copy_from_slice(bytes);
            }
            Op::SetLen(len) => {
                assert!(self.regular, "length of a device");
                self.bytes.resize(at(*len), 0);
            }
            Op::Flush => {}
        }
    }

    fn run(&mut self, op: Op) {
        self.apply(&op);
        self.log.push(op);
    }

    pub fn open(&self, options: &OpenOptions) -> Result<Vhd, Error> {
        let mut read = |offset: u64, buf: &mut [u8]| self.read(offset, buf);
        Vhd::open(Source { size: self.bytes.len() as u64, regular: self.regular, read: &mut read }, options)
    }
}

/// What kind of image to make.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub kind: DiskType,
    pub block_size: u32,
    pub sectors: u64,
    /// Sectors that the disk can grow to; 0 for no more than it has.
    pub max_sectors: u64,
    pub regular: bool,
}

impl Shape {
    pub fn dynamic(block_size: u32, sectors: u64) -> Self {
        Self { kind: DiskType::Dynamic, block_size, sectors, max_sectors: 0, regular: true }
    }

    fn image(&self, id: u8, parent: Option<NewParent>) -> NewImage {
        NewImage {
            kind: if parent.is_some() { DiskType::Differencing } else { self.kind },
            size: self.sectors * 512,
            max_size: self.max_sectors * 512,
            block_size: self.block_size,
            uuid: Uuid([id; 16]),
            timestamp: 1,
            parent,
            key: None,
        }
    }

    /// A storage with a new image; a device is full of old data around it.
    pub fn create(&self, id: u8, parent: Option<NewParent>) -> Store {
        let image = self.image(id, parent);
        let blocks = (self.sectors.max(self.max_sectors) * 512).div_ceil(u64::from(self.block_size));
        let room = blocks * (u64::from(self.block_size) + 8192) + (1 << 16);
        let bytes = image.build((!self.regular).then_some(room)).unwrap();
        let filler = if self.regular || self.kind == DiskType::Fixed { 0 } else { 0xa5 };
        let mut store = Store { bytes: vec![filler; at(bytes.len)], regular: self.regular, log: Vec::new() };
        for MetaWrite { offset, bytes } in bytes.writes {
            store.apply(&Op::Write(offset, bytes));
        }
        store
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self::dynamic(DEFAULT_BLOCK_SIZE, 131_072)
    }
}

/// A writable image with its parents.
pub struct Disk {
    pub store: Store,
    pub vhd: Vhd,
    /// Nearest first; a parent can be shared.
    pub parents: Vec<Rc<RefCell<Layer>>>,
}

pub struct Layer {
    pub store: Store,
    pub vhd: Vhd,
}

const WRITABLE: OpenOptions =
    OpenOptions { writable: true, ignore_poison: false, trust_end: false, allow_encrypted: false, key: None };

/// A writer of some sectors with what it does next.
struct Writer {
    sector: u64,
    data: Vec<u8>,
    next: Next,
}

enum Next {
    Plan,
    Prepare(Prepare, Write),
    Data(Write),
    Over,
}

impl Disk {
    pub fn create(shape: &Shape) -> Self {
        Self::open(shape.create(1, None), Vec::new()).unwrap()
    }

    pub fn open(store: Store, parents: Vec<Rc<RefCell<Layer>>>) -> Result<Self, Error> {
        let vhd = store.open(&WRITABLE)?;
        Ok(Self { store, vhd, parents })
    }

    /// Writes several runs of sectors at once; the writers and the commits take turns at random. Returns when all are done.
    pub fn write(&mut self, writes: Vec<(u64, Vec<u8>)>, random: &mut Random) -> Result<(), Error> {
        let mut writers = writes
            .into_iter()
            .map(|(sector, data)| Writer { sector, data, next: Next::Plan })
            .collect::<Vec<_>>();
        let mut commit: Option<Vec<Step>> = None;
        loop {
            let over = writers.iter().all(|writer| matches!(writer.next, Next::Over));
            if over && commit.is_none() && !self.vhd.has_pending() {
                return Ok(());
            }
            let turn = random.below(writers.len() + 2);
            if let Some(writer) = writers.get_mut(turn) {
                self.step(writer)?;
            } else {
                commit = self.step_commit(commit, random);
            }
        }
    }

    fn step(&mut self, writer: &mut Writer) -> Result<(), Error> {
        let next = std::mem::replace(&mut writer.next, Next::Over);
        writer.next = match next {
            Next::Over => Next::Over,
            Next::Plan if writer.data.is_empty() => Next::Over,
            Next::Plan => {
                let count = u32::try_from(writer.data.len() / SECTOR).unwrap();
                let overwrite = self.vhd.overwrite(writer.sector, count);
                let plan = self.vhd.plan_write(writer.sector, count)?;
                let alone = match &plan {
                    Plan::Write(Write { offset, count: planned, prepare: None, publish: false, .. }) => {
                        (*planned == count).then_some(*offset)
                    }
                    _ => None,
                };
                assert_eq!(overwrite, alone, "the short way plans like the long one");
                match plan {
                    Plan::Wait => Next::Plan,
                    Plan::Load(load) => {
                        self.load(&load);
                        Next::Plan
                    }
                    Plan::Write(mut write) => match write.prepare.take() {
                        Some(prepare) => {
                            assert!(write.publish);
                            Next::Prepare(prepare, write)
                        }
                        None => Next::Data(write),
                    },
                }
            }
            Next::Prepare(prepare, write) => {
                self.carry_out(&prepare.steps);
                self.vhd.prepared(prepare.key, true);
                Next::Data(write)
            }
            Next::Data(Write { offset, count, publish, .. }) => {
                let rest = writer.data.split_off(count as usize * SECTOR);
                let data = std::mem::replace(&mut writer.data, rest);
                self.store.run(Op::Write(offset, data));
                if publish {
                    self.vhd.written(writer.sector, count, true);
                }
                writer.sector += u64::from(count);
                Next::Plan
            }
        };
        Ok(())
    }

    fn load(&mut self, load: &Load) {
        let mut bits = vec![0; load.len as usize];
        self.store.read(load.offset, &mut bits).unwrap();
        self.vhd.loaded(load, &bits).unwrap();
    }

    fn carry_out(&mut self, steps: &[Step]) {
        for step in steps {
            self.store.run(op(step.clone()));
        }
    }

    /// One step of a commit: begin it, flush, one of its writes, or its end.
    fn step_commit(&mut self, running: Option<Vec<Step>>, random: &mut Random) -> Option<Vec<Step>> {
        let Some(mut steps) = running else {
            let mut steps = self.vhd.begin_commit()?;
            assert!(self.vhd.begin_commit().is_none());
            // The flush first, the others in any order. They are taken from the end.
            random.shuffle(&mut steps[1..]);
            steps.reverse();
            return Some(steps);
        };
        match steps.pop() {
            Some(step) => {
                self.store.run(op(step));
                Some(steps)
            }
            None => {
                self.vhd.commit_ended(true);
                None
            }
        }
    }

    /// Grows the disk in place.
    pub fn resize(&mut self, sectors: u64) -> Result<(), Error> {
        let resize = self.vhd.begin_resize(sectors)?.expect("nothing else is under way");
        self.carry_out(&resize);
        self.vhd.resize_ended(true);
        Ok(())
    }

    pub fn flush(&mut self) {
        self.store.run(Op::Flush);
    }

    /// Closes cleanly and gives back the storage.
    pub fn close(mut self) -> (Store, Vec<Rc<RefCell<Layer>>>) {
        self.carry_out(&self.vhd.close_steps());
        (self.store, self.parents)
    }

    /// Closes, and goes on in a new child.
    pub fn snapshot(self, shape: &Shape, id: u8) -> Self {
        let uuid = self.vhd.uuid();
        let (store, mut parents) = self.close();
        let vhd = store.open(&OpenOptions::default()).unwrap();
        parents.insert(0, Rc::new(RefCell::new(Layer { store, vhd })));
        let parent = NewParent { uuid, timestamp: 1, name: "p.vhd".into(), path: "./p.vhd".into() };
        Self::open(shape.create(id, Some(parent)), parents).unwrap()
    }

    /// The whole disk, read through the chain in runs as long as possible.
    pub fn contents(&mut self) -> Vec<u8> {
        let mut all = vec![0x5a; at(self.vhd.sectors() * 512)];
        let mut open = vec![(0, self.vhd.sectors())];
        open = read_layer(&self.store, &mut self.vhd, &open, &mut all);
        for parent in &self.parents {
            let Layer { store, vhd } = &mut *parent.borrow_mut();
            // Behind the end of a shorter parent there are zeros.
            let end = vhd.sectors();
            for &(from, to) in open.iter().filter(|run| run.1 > end) {
                all[at(from.max(end) * 512)..at(to * 512)].fill(0);
            }
            let inside = open.iter().filter(|run| run.0 < end).map(|&(from, to)| (from, to.min(end)));
            open = read_layer(store, vhd, &inside.collect::<Vec<_>>(), &mut all);
        }
        assert!(open.is_empty());
        all
    }
}

fn op(step: Step) -> Op {
    match step {
        Step::Write(MetaWrite { offset, bytes }) => Op::Write(offset, bytes),
        Step::Zero(range) => Op::Write(range.start, vec![0; at(range.end - range.start)]),
        Step::Truncate(len) => Op::SetLen(len),
        Step::Flush => Op::Flush,
        Step::Punch(_) => unreachable!("a VHD gives no room back"),
    }
}

/// Reads the given runs of sectors as far as a layer has them; returns the runs that it leaves to its parent.
fn read_layer(store: &Store, vhd: &mut Vhd, runs: &[(u64, u64)], all: &mut [u8]) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    for &(start, end) in runs {
        let mut sector = start;
        while sector < end {
            let range = |count: u32| at(sector * 512)..at((sector + u64::from(count)) * 512);
            let wanted = u32::try_from(end - sector).unwrap();
            let place = vhd.place(sector, wanted);
            let lookup = vhd.map(sector, wanted).unwrap();
            let alone = match lookup {
                Lookup::Data { offset, count } if count == wanted => Some(offset),
                _ => None,
            };
            assert_eq!(place, alone, "the short way finds what the long one finds");
            match lookup {
                Lookup::Load(load) => {
                    let mut bits = vec![0; load.len as usize];
                    store.read(load.offset, &mut bits).unwrap();
                    vhd.loaded(&load, &bits).unwrap();
                }
                Lookup::Packed { .. } => unreachable!("a VHD has no compressed data"),
                Lookup::Data { offset, count } => {
                    store.read(offset, &mut all[range(count)]).unwrap();
                    sector += u64::from(count);
                }
                Lookup::Zero { count } => {
                    all[range(count)].fill(0);
                    sector += u64::from(count);
                }
                Lookup::Parent { count } => {
                    left.push((sector, sector + u64::from(count)));
                    sector += u64::from(count);
                }
            }
        }
    }
    left
}
