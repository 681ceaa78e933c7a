//! Checks that every format passes.

use std::fmt;

use crate::Format;

use super::{
    Fault, Job, Memory, Op, Parent, Random, SECTOR, Subject, Turns, apart, crash_states, stamp, stamped,
    stamps,
};

/// How large things are.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Sectors of the disk.
    pub sectors: u64,
    /// The longest request, in sectors.
    pub longest: u64,
    /// Batches of requests, and other things, one after another.
    pub steps: usize,
    /// States to look at for each moment of a stop.
    pub states: usize,
}

impl Size {
    /// What takes a fraction of a second in all: for units of up to 16 sectors.
    pub fn small() -> Self {
        Self { sectors: 150, longest: 24, steps: 12, states: 3 }
    }
}

/// The value of a parent's stamps.
const PARENT: u8 = 255;

/// What each sector of a disk may hold, by the values of its [`stamp`].
#[derive(Debug, Clone)]
pub struct Allowed {
    sectors: Vec<Vec<u8>>,
    /// The sizes that the disk may have, in sectors.
    sizes: Vec<usize>,
}

impl Allowed {
    /// Just this.
    pub fn exactly(contents: &[u8]) -> Self {
        let sectors = contents.chunks(SECTOR).zip(0..);
        let value = |(bytes, sector)| vec![known(sector, bytes)];
        let sectors = sectors.map(value).collect::<Vec<_>>();
        Self { sizes: vec![sectors.len()], sectors }
    }

    /// From now on the results of these jobs may appear.
    pub fn allow(&mut self, jobs: &[Job]) {
        for job in jobs {
            let (first, count, value) = outline(job);
            for allowed in &mut self.sectors[first..first + count] {
                if !allowed.contains(&value) {
                    allowed.push(value);
                }
            }
        }
    }

    /// From now on nothing but the results of these jobs may appear; a discard may have done nothing.
    fn demand(&mut self, jobs: &[&Job]) {
        for job in jobs {
            let (first, count, value) = outline(job);
            if value != 0 {
                self.sectors[first..first + count].fill(vec![value]);
            }
        }
    }

    /// From now on the disk may also have this size; what is new of it is zeros.
    pub fn allow_size(&mut self, sectors: u64) {
        let size = usize::try_from(sectors).unwrap();
        self.sectors.resize(size.max(self.sectors.len()), vec![0]);
        self.sizes.push(size);
    }

    /// The whole disk is as it may be.
    pub fn verify(&self, contents: &[u8]) {
        let size = contents.len() / SECTOR;
        assert!(self.sizes.contains(&size), "{size} sectors instead of {:?}", self.sizes);
        for ((bytes, allowed), sector) in contents.chunks(SECTOR).zip(&self.sectors).zip(0..) {
            let value = known(sector, bytes);
            assert!(allowed.contains(&value), "sector {sector} has {value} instead of {allowed:?}");
        }
    }
}

/// The value of the stamp that a sector must have.
fn known(sector: u64, bytes: &[u8]) -> u8 {
    let (head, tail) = (&bytes[..16], &bytes[SECTOR - 8..]);
    let value = stamped(sector, bytes);
    value.unwrap_or_else(|| panic!("sector {sector} is torn or of nobody: {head:?} .. {tail:?}"))
}

/// First sector, number of sectors and value of a job.
fn outline(job: &Job) -> (usize, usize, u8) {
    let small = |number: u64| usize::try_from(number).unwrap();
    match job {
        Job::Write { sector, data } => (small(*sector), data.len() / SECTOR, data[SECTOR - 1]),
        Job::Discard { sector, count } => (small(*sector), small(*count), 0),
    }
}

/// Some requests that do not touch each other; `value` counts up with each write.
pub fn jobs(size: &Size, sectors: u64, value: &mut u8, random: &mut Random) -> Vec<Job> {
    let mut runs = Vec::new();
    for _ in 0..=random.below(5) {
        let first = random.up_to(sectors);
        let count = 1 + random.up_to(size.longest.min(sectors - first));
        // Now and then an edge: the whole disk, or its end.
        let (first, count) = match random.below(30) {
            0 => (0, sectors),
            1 => (sectors - 1, 1),
            _ => (first, count),
        };
        runs.push((first, count, random.once_in(5)));
    }
    let job = |(sector, count, discard)| {
        if discard {
            return Job::Discard { sector, count };
        }
        *value = *value % (PARENT - 1) + 1;
        Job::Write { sector, data: stamps(sector, count, *value) }
    };
    apart(&runs).into_iter().map(job).collect()
}

/// An image under random use, with snapshots, discards, growth and reopening, is what a vector of bytes would be; and every
/// image of the chain passes its check when it has been closed.
pub fn model<S: Subject>(subject: &S, size: &Size, random: &mut Random) {
    let mut disk = Turns::create(subject, size.sectors);
    let mut model = vec![0; usize::try_from(size.sectors).unwrap() * SECTOR];
    let (mut value, mut depth) = (0, 1);
    for _ in 0..1 + random.below(2 * size.steps) {
        match random.below(10) {
            0 => disk.flush(),
            1 => disk = disk.reopen(subject),
            2 if subject.has_parents() && depth < 4 => {
                depth += 1;
                disk = disk.snapshot(subject, depth);
            }
            3 if subject.grows_to(size.sectors) > disk.sectors() => {
                let sectors =
                    disk.sectors() + random.up_to(subject.grows_to(size.sectors) - disk.sectors() + 1);
                disk.resize(sectors).unwrap();
                model.resize(usize::try_from(sectors).unwrap() * SECTOR, 0);
            }
            _ => {
                let jobs = jobs(size, disk.sectors(), &mut value, random);
                run_on_model(&mut disk, &mut model, jobs, random);
            }
        }
        let first = random.up_to(disk.sectors());
        let count = 1 + random.up_to(disk.sectors() - first);
        let at = usize::try_from(first).unwrap() * SECTOR;
        assert!(disk.read(first, count) == model[at..][..usize::try_from(count).unwrap() * SECTOR]);
        assert!(disk.contents() == model, "the disk is not what was written");
    }
    let (storage, parents) = disk.close();
    subject.check(&storage, true);
    for parent in &parents {
        subject.check(parent.borrow().storage(), true);
    }
    assert!(
        Turns::open(subject, storage, parents).contents() == model,
        "closing and opening changes nothing"
    );
}

fn run_on_model<F: Format + 'static>(
    disk: &mut Turns<F>,
    model: &mut [u8],
    jobs: Vec<Job>,
    random: &mut Random,
) {
    for result in disk.run(jobs.clone(), random) {
        result.unwrap();
    }
    let contents = disk.contents();
    for job in &jobs {
        let (first, count, value) = outline(job);
        for sector in first..first + count {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            // A discarded sector is zeros, or as it was.
            if value != 0 {
                model[range].copy_from_slice(&stamp(sector as u64, value));
            } else if contents[range.clone()].iter().all(|b| *b == 0) {
                model[range].fill(0);
            }
        }
    }
}

/// A new image; if the format has parents, over one that is full of data, so that a sector that wrongly counts as written
/// shows.
fn begin<S: Subject>(subject: &S, size: &Size, random: &mut Random) -> Turns<S::Core> {
    let mut disk = Turns::create(subject, size.sectors);
    if subject.has_parents() && !random.once_in(3) {
        disk.write(vec![(0, stamps(0, size.sectors, PARENT))], random);
        disk = disk.snapshot(subject, 2);
    }
    disk
}

/// What was done to a storage, and what the disk in it may hold meanwhile.
pub struct History {
    /// As it was at first.
    pub start: Memory,
    /// What is below the image.
    pub parents: Vec<Parent>,
    /// What was done.
    pub log: Vec<Op>,
    /// What the sectors may hold once so many operations have been done, in this order; the first is for none.
    pub allowed: Vec<(usize, Allowed)>,
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("History").field("operations", &self.log.len()).finish_non_exhaustive()
    }
}

impl History {
    /// Stops everywhere in the history, in `each` ways: the image passes its check, has only what it may have, and can be
    /// written and closed as any other.
    pub fn replay<S: Subject>(&self, subject: &S, each: usize, random: &mut Random) {
        crash_states(&self.start, &self.log, each, random, |done, state, random| {
            let (_, allowed) = self.allowed.iter().rev().find(|(from, _)| *from <= done).unwrap();
            survive(subject, state, &self.parents, allowed, random);
        });
    }
}

/// Wherever the process or the machine stops, and whatever part of the writes since the last flush has reached the storage,
/// in whatever order and torn between any two sectors: the image passes its check, has everything that was flushed, has
/// the old or the new contents of everything else, and can be written and closed as any other.
pub fn crash<S: Subject>(subject: &S, size: &Size, random: &mut Random) {
    record(subject, size, random).replay(subject, size.states, random);
}

fn record<S: Subject>(subject: &S, size: &Size, random: &mut Random) -> History {
    let mut disk = begin(subject, size, random);
    let start = disk.image.storage().clone();
    let mut allowed = Allowed::exactly(&disk.contents());
    let mut history = vec![(0, allowed.clone())];
    let mut value = 0;
    for _ in 0..1 + random.below(size.steps) {
        match random.below(9) {
            0 | 1 => {
                disk.flush();
                allowed = Allowed::exactly(&disk.contents());
            }
            2 => disk = disk.reopen(subject),
            3 if subject.grows_to(size.sectors) > disk.sectors() => {
                let sectors =
                    disk.sectors() + random.up_to(subject.grows_to(size.sectors) - disk.sectors() + 1);
                allowed.allow_size(sectors);
                history.push((disk.image.storage().log.len(), allowed.clone()));
                disk.resize(sectors).unwrap();
                // The guest may be told.
                allowed.sizes = vec![usize::try_from(sectors).unwrap()];
            }
            _ => {
                let jobs = jobs(size, disk.sectors(), &mut value, random);
                // From now on the new contents may appear at any time.
                allowed.allow(&jobs);
                history.push((disk.image.storage().log.len(), allowed.clone()));
                for result in disk.run(jobs, random) {
                    result.unwrap();
                }
                allowed.verify(&disk.contents());
            }
        }
        history.push((disk.image.storage().log.len(), allowed.clone()));
    }
    let (storage, parents) = disk.close();
    History { start, parents, log: storage.log, allowed: history }
}

fn survive<S: Subject>(
    subject: &S,
    state: Memory,
    parents: &[Parent],
    allowed: &Allowed,
    random: &mut Random,
) {
    subject.check(&state, false);
    let mut disk = Turns::open(subject, state, parents.to_vec());
    let mut model = disk.contents();
    allowed.verify(&model);
    for _ in 0..4 {
        let first = random.up_to(disk.sectors());
        let data = stamps(first, 1 + random.up_to((disk.sectors() - first).min(3)), 251);
        model[usize::try_from(first).unwrap() * SECTOR..][..data.len()].copy_from_slice(&data);
        disk.write(vec![(first, data)], random);
    }
    assert!(disk.contents() == model, "after a stop the disk is not what was written");
    let (storage, _) = disk.close();
    subject.check(&storage, true);
}

/// Whatever operation of the storage fails, by an error or half way: what was answered with success is there, also for the
/// next who opens the image, of what failed each sector is old or new, and the image passes its check.
pub fn faults<S: Subject>(subject: &S, size: &Size, random: &mut Random) {
    let mut disk = begin(subject, size, random);
    let mut allowed = Allowed::exactly(&disk.contents());
    let mut value = 0;
    for _ in 0..1 + random.below(size.steps) {
        for _ in 0..random.below(3) {
            let fault = random.pick(&[Fault::Error(libc::EIO), Fault::Error(libc::ENOSPC), Fault::Short]);
            let after = random.below(12);
            disk.image.storage_mut().fail(after, fault);
        }
        let jobs = jobs(size, disk.sectors(), &mut value, random);
        allowed.allow(&jobs);
        let results = disk.run(jobs.clone(), random);
        let failed = disk.image.storage_mut().heal();
        assert!(failed || results.iter().all(Result::is_ok), "{results:?} though nothing has failed");
        let answered = jobs.iter().zip(&results).filter(|(_, result)| result.is_ok()).map(|(job, _)| job);
        allowed.demand(&answered.collect::<Vec<_>>());
        let contents = disk.contents();
        allowed.verify(&contents);
        if disk.image.core().is_poisoned() || random.once_in(4) {
            let (_, storage) = disk.image.into_parts();
            subject.check(&storage, false);
            disk = Turns::open(subject, storage, disk.parents);
            allowed.verify(&disk.contents());
            allowed = Allowed::exactly(&disk.contents());
        } else {
            allowed = Allowed::exactly(&contents);
        }
    }
    // An image that is only read stays as a failure has left it.
    disk.write(vec![(0, stamps(0, 1, 251))], random);
    let (storage, _) = disk.close();
    subject.check(&storage, true);
}
