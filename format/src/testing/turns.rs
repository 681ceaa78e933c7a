//! Several writers, discards and commits that take turns at random, as tapdisk's requests do.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::rc::Rc;

use super::{Memory, Random, SECTOR, Subject};
use crate::blocking::{Blocking, Error, Storage, carry_out};
use crate::{DiscardPlan, Format, Load, Plan, SECTOR_SIZE, Sector, Step, Write};

/// What a request has come to.
pub type Failure<F> = Error<<F as Format>::Error>;

/// An image of a chain, of whatever format.
pub trait Layer {
    /// Size of its disk.
    fn sectors(&self) -> u64;

    /// What it lies in.
    fn storage(&self) -> &Memory;

    /// Reads; `below` is its parent.
    ///
    /// # Errors
    /// Those of the driver.
    fn read(
        &mut self,
        sector: Sector,
        buf: &mut [u8],
        below: &mut dyn FnMut(Sector, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()>;
}

impl<F: Format> Layer for Blocking<F, Memory> {
    fn sectors(&self) -> u64 {
        self.core.sectors()
    }

    fn storage(&self) -> &Memory {
        &self.storage
    }

    fn read(
        &mut self,
        sector: Sector,
        buf: &mut [u8],
        below: &mut dyn FnMut(Sector, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        Ok(Blocking::read(self, sector, buf, below)?)
    }
}

/// A parent; several images may share it.
pub type Parent = Rc<RefCell<dyn Layer>>;

/// Reads what the parents hold, the nearest first. Behind the end of one it has zeros.
pub fn read_below(parents: &[Parent], sector: Sector, buf: &mut [u8]) -> io::Result<()> {
    let Some((parent, rest)) = parents.split_first() else {
        buf.fill(0);
        return Ok(());
    };
    let mut parent = parent.borrow_mut();
    let there = parent.sectors().saturating_sub(sector).min((buf.len() / SECTOR) as u64);
    let (inside, behind) = buf.split_at_mut(usize::try_from(there).unwrap() * SECTOR);
    behind.fill(0);
    if inside.is_empty() {
        return Ok(());
    }
    parent.read(sector, inside, &mut |sector, buf| read_below(rest, sector, buf))
}

/// What a guest asks for.
#[derive(Debug, Clone)]
pub enum Job {
    /// Write.
    Write {
        /// First sector.
        sector: Sector,
        /// Whole sectors.
        data: Vec<u8>,
    },
    /// Discard.
    Discard {
        /// First sector.
        sector: Sector,
        /// Sectors.
        count: u64,
    },
}

/// Leaves out runs of sectors (first, count) that touch those before them: what comes of writing both at once is not defined.
pub fn apart<T: Clone>(runs: &[(u64, u64, T)]) -> Vec<(u64, u64, T)> {
    let mut kept: Vec<(u64, u64, T)> = Vec::new();
    for (first, count, value) in runs {
        if kept.iter().all(|(f, c, _)| first + count <= *f || f + c <= *first) {
            kept.push((*first, *count, value.clone()));
        }
    }
    kept
}

/// A writable image with its parents.
pub struct Turns<F: Format> {
    /// The image.
    pub image: Blocking<F, Memory>,
    /// The nearest first.
    pub parents: Vec<Parent>,
}

impl<F: Format> fmt::Debug for Turns<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turns").field("image", &self.image).finish_non_exhaustive()
    }
}

/// A request under way.
struct Task<F: Format> {
    job: Job,
    next: Next,
    /// It must take part in a commit.
    publish: bool,
    outcome: Option<Result<(), Failure<F>>>,
}

/// What a request does next.
enum Next {
    Plan,
    Load(Load),
    Prepare(VecDeque<Step>, Write),
    Copy(Write),
    Data { from: Sector, offset: u64, data: Vec<u8>, write: Write },
}

struct Commit {
    steps: VecDeque<Step>,
    /// The requests that are answered when it has ended.
    members: Vec<usize>,
}

impl<F: Format + 'static> Turns<F> {
    /// A new image without a parent.
    pub fn create<S: Subject<Core = F>>(subject: &S, sectors: u64) -> Self {
        let mut storage = subject.create(sectors, 1, None);
        storage.log.clear();
        Self::open(subject, storage, Vec::new())
    }

    /// Opens an image to write.
    pub fn open<S: Subject<Core = F>>(subject: &S, storage: Memory, parents: Vec<Parent>) -> Self {
        let core = subject.open(&storage, true);
        Self { image: Blocking::new(core, storage), parents }
    }

    /// Size of the disk.
    pub fn sectors(&self) -> u64 {
        self.image.core.sectors()
    }

    /// Carries out requests that do not touch each other; they and the commits take turns at random. Returns when all are
    /// over, with what each has come to, in their order: a success is what a guest would have been told.
    pub fn run(&mut self, jobs: Vec<Job>, random: &mut Random) -> Vec<Result<(), Failure<F>>> {
        let task = |job| Task { job, next: Next::Plan, publish: false, outcome: None };
        let mut tasks = jobs.into_iter().map(task).collect::<Vec<Task<F>>>();
        let mut commit = None;
        let mut idle = 0;
        loop {
            let turn = random.below(tasks.len() + 2);
            let moved = match tasks.get_mut(turn) {
                Some(task) if task.outcome.is_none() => self.step(task, random),
                Some(_) => false,
                None => self.step_commit(&mut commit, &mut tasks, random),
            };
            // The flush of a guest who waits for none of these.
            if random.once_in(50) {
                let _ = self.image.storage.sync();
            }
            idle = if moved { 0 } else { idle + 1 };
            let over = tasks.iter().all(|task| task.outcome.is_some());
            let answered = over && commit.is_none() && tasks.iter().all(|task| !task.publish);
            // A request that failed may have left something for a commit.
            if answered && !self.step_commit(&mut commit, &mut tasks, random) {
                return tasks.into_iter().filter_map(|task| task.outcome).collect();
            }
            assert!(idle < 100 * (tasks.len() + 2), "everybody waits, for nothing");
        }
    }

    /// Writes several runs of sectors at once, successfully.
    pub fn write(&mut self, writes: Vec<(Sector, Vec<u8>)>, random: &mut Random) {
        let jobs = writes.into_iter().map(|(sector, data)| Job::Write { sector, data }).collect();
        for result in self.run(jobs, random) {
            result.expect("a write succeeds");
        }
    }

    /// One step of a request; false if it waits.
    fn step(&mut self, task: &mut Task<F>, random: &mut Random) -> bool {
        let next = std::mem::replace(&mut task.next, Next::Plan);
        let result = match (next, &mut task.job) {
            (Next::Plan, Job::Write { sector, data }) if !data.is_empty() => {
                let (sector, count) = (*sector, data.len() / SECTOR);
                self.plan_write(task, sector, count, random)
            }
            (Next::Plan, Job::Discard { sector, count }) if *count > 0 => {
                let (sector, count) = (*sector, *count);
                self.plan_discard(task, sector, count)
            }
            (Next::Plan, _) => Ok(true),
            (Next::Load(load), _) => self.image.load(&load).map(|()| true),
            (Next::Prepare(steps, write), _) => self.step_prepare(task, steps, write),
            (Next::Copy(write), Job::Write { sector, data }) => {
                let (sector, data) = (*sector, &data[..write.count as usize * SECTOR]);
                let parents = &self.parents;
                let around = self.image.surround(sector, &write, data, &mut |s, b| read_below(parents, s, b));
                around
                    .map(|(from, offset, data)| {
                        task.next = Next::Data { from, offset, data, write: write.clone() };
                        true
                    })
                    .inspect_err(|_| self.give_up(sector, &write))
            }
            (Next::Data { from, offset, data, write }, Job::Write { sector, data: left }) => {
                let done = self.image.write_data(from, offset, data);
                if write.publish {
                    self.image.core.written(*sector, write.count, done.is_ok());
                }
                task.publish |= write.publish;
                *sector += u64::from(write.count);
                left.drain(..write.count as usize * SECTOR);
                done.map(|()| true)
            }
            (Next::Copy(_) | Next::Data { .. }, Job::Discard { .. }) => unreachable!("no data to discard"),
        };
        let over = match &task.job {
            Job::Write { data, .. } => data.is_empty(),
            Job::Discard { count, .. } => *count == 0,
        };
        match result {
            Ok(moved) => {
                task.outcome = (over && matches!(task.next, Next::Plan)).then_some(Ok(()));
                moved
            }
            Err(error) => {
                task.outcome = Some(Err(error));
                // Whatever else of it was written is in the next commit, but nobody waits for that.
                task.publish = false;
                true
            }
        }
    }

    fn plan_write(
        &mut self,
        task: &mut Task<F>,
        sector: Sector,
        count: usize,
        random: &mut Random,
    ) -> Result<bool, Failure<F>> {
        let count = u32::try_from(count).unwrap();
        let short = self.image.core.overwrite(sector, count);
        let plan = match short {
            Some(offset) if random.once_in(2) => Plan::Write(plain(offset, count)),
            _ => self.image.core.plan_write(sector, count).map_err(Error::Core)?,
        };
        if let Some(offset) = short {
            assert_eq!(plan, Plan::Write(plain(offset, count)), "the short way plans like the long one");
        }
        task.next = match plan {
            Plan::Wait => return Ok(false),
            Plan::Load(load) => Next::Load(load),
            Plan::Write(write) => {
                assert!((1..=count).contains(&write.count), "{write:?} for {count} sectors");
                self.image.dirty = true;
                match &write.prepare {
                    Some(prepare) => Next::Prepare(in_some_order(prepare.steps.clone(), random), write),
                    None => Next::Copy(write),
                }
            }
        };
        Ok(true)
    }

    fn plan_discard(&mut self, task: &mut Task<F>, sector: Sector, count: u64) -> Result<bool, Failure<F>> {
        let wanted = u32::try_from(count).unwrap();
        let done = match self.image.core.plan_discard(sector, wanted).map_err(Error::Core)? {
            DiscardPlan::Wait => return Ok(false),
            DiscardPlan::Load(load) => {
                task.next = Next::Load(load);
                return Ok(true);
            }
            DiscardPlan::Skip { count } => count,
            DiscardPlan::Punch { offset, count } => {
                self.image.dirty = true;
                self.image.storage.punch(offset..offset + u64::from(count) * SECTOR_SIZE)?;
                count
            }
            DiscardPlan::Publish { count } => {
                self.image.dirty = true;
                task.publish = true;
                count
            }
        };
        assert!((1..=wanted).contains(&done), "{done} of {wanted} sectors discarded");
        task.job = Job::Discard { sector: sector + u64::from(done), count: count - u64::from(done) };
        Ok(true)
    }

    fn step_prepare(
        &mut self,
        task: &mut Task<F>,
        mut steps: VecDeque<Step>,
        write: Write,
    ) -> Result<bool, Failure<F>> {
        let Job::Write { sector, .. } = task.job else { unreachable!("a discard prepares nothing") };
        let key = write.prepare.as_ref().expect("this one has").key;
        let Some(step) = steps.pop_front() else {
            self.image.core.prepared(key, true);
            task.next = Next::Copy(write);
            return Ok(true);
        };
        if let Err(error) = carry_out(&mut self.image.storage, &[step]) {
            self.image.core.prepared(key, false);
            self.give_up(sector, &write);
            return Err(error.into());
        }
        task.next = Next::Prepare(steps, write);
        Ok(true)
    }

    fn give_up(&mut self, sector: Sector, write: &Write) {
        if write.publish {
            self.image.core.written(sector, write.count, false);
        }
    }

    /// One step of a commit: its beginning, one of its steps, or its end. False if there is none to begin.
    fn step_commit(
        &mut self,
        commit: &mut Option<Commit>,
        tasks: &mut [Task<F>],
        random: &mut Random,
    ) -> bool {
        let Some(running) = commit else {
            let ready = |task: &Task<F>| task.publish && task.outcome.is_some();
            let members = (0..tasks.len()).filter(|&i| ready(&tasks[i])).collect::<Vec<_>>();
            let Some(steps) = self.image.core.begin_commit() else {
                // Nothing is pending: all of it was in an earlier commit, or there will never be one again.
                let poisoned = self.image.core.is_poisoned();
                answer(tasks, &members, !poisoned);
                return false;
            };
            assert!(self.image.core.begin_commit().is_none(), "one commit at a time");
            *commit = Some(Commit { steps: in_some_order(steps, random), members });
            return true;
        };
        let done = match running.steps.pop_front() {
            Some(step) => match carry_out(&mut self.image.storage, &[step]) {
                Ok(()) => return true,
                Err(_) => false,
            },
            None => true,
        };
        self.image.core.commit_ended(done);
        if !done {
            assert!(self.image.core.is_poisoned(), "a failed commit poisons the image");
        }
        answer(tasks, &running.members, done);
        *commit = None;
        true
    }

    /// Makes the disk larger.
    pub fn resize(&mut self, sectors: u64) -> Result<(), Failure<F>> {
        self.image.resize(sectors)
    }

    /// Makes all of it durable.
    pub fn flush(&mut self) {
        self.image.flush().unwrap();
    }

    /// Reads.
    pub fn read(&mut self, sector: Sector, count: u64) -> Vec<u8> {
        // No zeros, so that what is not filled shows.
        let mut buf = vec![0x5a; usize::try_from(count).unwrap() * SECTOR];
        let place = self.image.core.place(sector, u32::try_from(count).unwrap());
        if let (Some(offset), None) = (place, self.image.core.cipher()) {
            let mut direct = buf.clone();
            self.image.storage.read_at(offset, &mut direct).unwrap();
            self.read_long(sector, &mut buf);
            assert!(direct == buf, "the short way finds what the long one finds");
            return buf;
        }
        self.read_long(sector, &mut buf);
        buf
    }

    fn read_long(&mut self, sector: Sector, buf: &mut [u8]) {
        let parents = &self.parents;
        self.image.read_mapped(sector, buf, &mut |s, b| read_below(parents, s, b)).unwrap();
    }

    /// The whole disk.
    pub fn contents(&mut self) -> Vec<u8> {
        self.read(0, self.sectors())
    }

    /// Closes, and gives back the storage and the parents.
    pub fn close(mut self) -> (Memory, Vec<Parent>) {
        self.image.close().unwrap();
        (self.image.storage, self.parents)
    }

    /// Closes and opens again.
    #[must_use]
    pub fn reopen<S: Subject<Core = F>>(self, subject: &S) -> Self {
        let (storage, parents) = self.close();
        Self::open(subject, storage, parents)
    }

    /// Closes, and goes on in a new child of this image.
    #[must_use]
    pub fn snapshot<S: Subject<Core = F>>(mut self, subject: &S, number: u8) -> Self {
        self.image.close().unwrap();
        let mut child = subject.create(self.sectors(), number, Some(&self));
        child.log.clear();
        let Self { image: Blocking { storage, .. }, mut parents } = self;
        let core = subject.open(&storage, false);
        parents.insert(0, Rc::new(RefCell::new(Blocking::new(core, storage))));
        Self::open(subject, child, parents)
    }
}

fn plain(offset: u64, count: u32) -> Write {
    Write { offset, count, prepare: None, copy_before: 0, copy_after: 0, publish: false }
}

fn answer<F: Format>(tasks: &mut [Task<F>], members: &[usize], done: bool) {
    for &member in members {
        tasks[member].publish = false;
        if !done {
            tasks[member].outcome = Some(Err(Error::Poisoned));
        }
    }
}

/// Any order that the steps allow: between two flushes they may be in flight together, but a truncation comes before what
/// follows it.
fn in_some_order(steps: Vec<Step>, random: &mut Random) -> VecDeque<Step> {
    let mut ordered = VecDeque::new();
    let mut free: Vec<Step> = Vec::new();
    for step in steps {
        let barrier = matches!(step, Step::Flush | Step::Truncate(_) | Step::Settle);
        free.push(step);
        if barrier {
            let barrier = free.pop();
            random.shuffle(&mut free);
            ordered.extend(free.drain(..).chain(barrier));
        }
    }
    random.shuffle(&mut free);
    ordered.extend(free);
    ordered
}
