//! Writing: new grains are filled first, and become part of the image by a commit.
//!
//! What holds on disk at every moment: an entry of the directory names a table that is there, an entry of a table a grain
//! that is there; and what is new lies behind everything that was in the file when it was opened. Within a commit new
//! tables are written, already with their entries, beside the grains; then everything is made durable; then come the entries
//! that lead to it, those of the redundant tables last. Either kind of table leads to valid grains whatever part of
//! the two is on disk, so no flush keeps them apart.
//!
//! Before the first write of all, the header says that the image is open, and the descriptor gets another content identifier,
//! so that children notice.

use std::collections::BTreeMap;

use format::fresh::{Fresh, in_place};
use format::tail::Tail;
use format::{DiscardPlan, MetaWrite, Plan, Prepare, Sector, Step, Write};

use crate::descriptor::with_new_cid;
use crate::header::{Header, UNCLEAN_FIELD};
use crate::sparse::{Entry, Run, Sparse};
use crate::{Error, SECTOR};

/// Words of a sector.
const WORDS: usize = 128;
const PAGE: u64 = 4096;

/// The state of all writing to one extent.
#[derive(Debug)]
pub(crate) struct Writes {
    pub(crate) tail: Tail,
    pub(crate) poisoned: bool,
    mark: Mark,
    first_sector: Vec<u8>,
    /// The text of the descriptor within.
    text: Option<String>,
    table_entries: u64,
    fresh: Fresh,
    /// Places for tables that are not in the directory, and for their redundant twins.
    tables: BTreeMap<u32, (u64, Option<u64>)>,
    commit: Option<Commit>,
}

/// Whether the file says that it is being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Needed,
    Running,
    Done,
}

/// What the commit under way makes of the image.
#[derive(Debug, Default)]
struct Commit {
    /// Grains with their places, in ascending order.
    grains: Vec<(u64, u64)>,
    /// New tables, for the directory and for the redundant one.
    tables: Vec<(usize, u32)>,
    redundant: Vec<(usize, u32)>,
}

impl Writes {
    pub(crate) fn with(tail: Tail, header: &Header, first_sector: Vec<u8>, text: Option<String>) -> Self {
        Self {
            tail,
            poisoned: false,
            mark: Mark::Needed,
            first_sector,
            text,
            table_entries: header.table_entries.into(),
            fresh: Fresh::new(header.grain),
            tables: BTreeMap::new(),
            commit: None,
        }
    }

    /// True if the file says that it is being written.
    pub(crate) fn is_marked(&self) -> bool {
        self.mark == Mark::Done
    }

    /// True if a table must stay in memory, because a grain of it is on its way.
    pub(crate) fn touches(&self, table: u64) -> bool {
        let first = |table: u64| table.saturating_mul(self.table_entries);
        self.fresh.touches(first(table)..first(table.saturating_add(1)))
    }
}

impl Sparse {
    pub(crate) fn plan(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        self.check_writable(sector, count)?;
        if self.writes.mark == Mark::Running {
            return Ok(Plan::Wait);
        }
        let plan = self.plan_marked(sector, count)?;
        Ok(match plan {
            Plan::Write(write) if self.writes.mark == Mark::Needed => {
                self.writes.mark = Mark::Running;
                Plan::Write(Write { prepare: Some(self.marking()), ..write })
            }
            plan => plan,
        })
    }

    fn plan_marked(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        if let Some(plan) = self.writes.fresh.plan(sector, count) {
            return Ok(plan);
        }
        match self.run(sector, count)? {
            (Run::Unread(load), _) => {
                self.tables.load_began(load.key);
                Ok(Plan::Load(load))
            }
            (Run::Data(offset), count) => Ok(in_place(offset, count, false)),
            (Run::Absent | Run::Packed(_), count) => self.plan_new(sector, count),
        }
    }

    fn check_writable(&self, sector: Sector, count: u32) -> Result<(), Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        self.check_range(sector, count)?;
        if self.writes.poisoned { Err(Error::Poisoned) } else { Ok(()) }
    }

    /// Plans a write to grains of one table that need a place.
    fn plan_new(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        self.reserve_tables(self.position(sector).table)?;
        let (grains, len) = self.writes.fresh.run(sector, count);
        let place = self.take(len, self.header.grain_bytes().max(PAGE))?;
        Ok(Plan::Write(self.writes.fresh.claim(sector, count, grains, place, self.header.capacity)))
    }

    fn take(&mut self, len: u64, align: u64) -> Result<u64, Error> {
        let tail = &mut self.writes.tail;
        tail.take(len, align).ok_or(Error::NoSpace { end: tail.end(), len })
    }

    /// Finds room for a table that is not there, and for its redundant twin.
    fn reserve_tables(&mut self, table: u32) -> Result<(), Error> {
        if Self::entry(&self.directory, table) != 0 || self.writes.tables.contains_key(&table) {
            return Ok(());
        }
        let len = self.header.table_bytes();
        let place = self.take(len, SECTOR)?;
        let missing = self.redundant.as_ref().filter(|directory| Self::entry(directory, table) == 0);
        let twin = missing.is_some().then(|| self.take(len, SECTOR)).transpose()?;
        self.writes.tables.insert(table, (place, twin));
        Ok(())
    }

    /// What must be on disk before anything is written.
    fn marking(&self) -> Prepare {
        let mut steps = vec![Step::Write(MetaWrite { offset: 0, bytes: self.first_sector(1) })];
        let area = &self.header.descriptor;
        let text = self.writes.text.as_ref().and_then(|text| with_new_cid(text));
        let room = usize::try_from(area.end.saturating_sub(area.start)).unwrap_or(0);
        if let Some(mut bytes) = text.map(String::into_bytes).filter(|bytes| bytes.len() <= room) {
            bytes.resize(room, 0);
            steps.push(Step::Write(MetaWrite { offset: area.start, bytes }));
        }
        steps.push(Step::Flush);
        Prepare { key: 0, steps }
    }

    pub(crate) fn marked(&mut self, done: bool) {
        self.writes.mark = if done { Mark::Done } else { Mark::Needed };
    }

    fn first_sector(&self, unclean: u8) -> Vec<u8> {
        let mut bytes = self.writes.first_sector.clone();
        if let Some(flag) = bytes.get_mut(UNCLEAN_FIELD) {
            *flag = unclean;
        }
        bytes
    }

    pub(crate) fn note_written(&mut self, sector: Sector, count: u32, done: bool) {
        if let Some(lost) = self.writes.fresh.written(sector, count, done) {
            self.writes.tail.give_back(lost);
        }
    }

    /// What is in the image reads as zeros where it is punched; the rest is zeros already.
    pub(crate) fn discard(&mut self, sector: Sector, count: u32) -> Result<DiscardPlan, Error> {
        self.check_writable(sector, count)?;
        Ok(match self.run(sector, count)? {
            (Run::Unread(load), _) => {
                self.tables.load_began(load.key);
                DiscardPlan::Load(load)
            }
            (Run::Data(offset), count) if self.writes.is_marked() => DiscardPlan::Punch { offset, count },
            (Run::Data(_) | Run::Absent | Run::Packed(_), count) => DiscardPlan::Skip { count },
        })
    }

    pub(crate) fn commit_steps(&mut self) -> Option<Vec<Step>> {
        if self.writes.poisoned || self.writes.commit.is_some() {
            return None;
        }
        let grains = self.writes.fresh.take();
        if grains.is_empty() {
            return None;
        }
        let Some((commit, steps)) = self.build(grains) else {
            log::error!("a table of a planned write is not in memory; the image takes no more writes");
            self.writes.poisoned = true;
            return None;
        };
        self.writes.commit = Some(commit);
        Some(steps)
    }

    /// The commit of some grains and its steps. `None` if a table that must be in memory is not: a caller has reported a
    /// write that was never planned.
    fn build(&self, grains: Vec<(u64, u64)>) -> Option<(Commit, Vec<Step>)> {
        let mut commit = Commit::default();
        let (mut before, mut primary, mut redundant) = (Vec::new(), Vec::new(), Vec::new());
        for group in groups(&self.header, &grains) {
            let table = self.table_of(group.first()?.0);
            let slot = usize::try_from(table).ok()?;
            let changes: Vec<_> =
                group.iter().map(|&(grain, place)| (self.slot_of(grain), sector(place))).collect();
            let twin =
                self.redundant.as_ref().map(|directory| Self::entry(directory, table)).filter(|&at| at != 0);
            let twin = twin.map(|at| u64::from(at).saturating_mul(SECTOR));
            let twin = twin.filter(|&place| self.misplaced(place, self.header.table_bytes()).is_none());
            match self.tables.peek(table.into()) {
                Some(words) => {
                    let place = u64::from(Self::entry(&self.directory, table)).saturating_mul(SECTOR);
                    primary.extend(changed_sectors(words, place, &changes));
                    redundant
                        .extend(twin.into_iter().flat_map(|twin| changed_sectors(words, twin, &changes)));
                }
                None => {
                    let &(place, new_twin) = self.writes.tables.get(&table)?;
                    let bytes = encode(&changed(&self.empty_table(), &changes));
                    let write = |offset| MetaWrite { offset, bytes: bytes.clone() };
                    before.push(write(place));
                    // A twin that is named already is part of the image, and may lead only to what is durable.
                    redundant.extend(twin.map(write));
                    before.extend(new_twin.map(write));
                    commit.tables.push((slot, sector(place)));
                    commit.redundant.extend(new_twin.map(|place| (slot, sector(place))));
                }
            }
        }
        primary.extend(changed_sectors(&self.directory, self.header.directory, &commit.tables));
        if let (Some(directory), Some(offset)) = (&self.redundant, self.header.redundant) {
            redundant.extend(changed_sectors(directory, offset, &commit.redundant));
        }
        commit.grains = grains;
        let after = primary.into_iter().chain(redundant);
        let steps = before.into_iter().map(Step::Write).chain([Step::Flush]).chain(after.map(Step::Write));
        Some((commit, steps.collect()))
    }

    fn table_of(&self, grain: u64) -> u32 {
        self.position(grain.saturating_mul(self.header.grain.into())).table
    }

    fn slot_of(&self, grain: u64) -> usize {
        self.position(grain.saturating_mul(self.header.grain.into())).slot
    }

    fn empty_table(&self) -> Vec<u32> {
        vec![0; usize::try_from(self.header.table_bytes() >> 2).unwrap_or(0)]
    }

    pub(crate) fn end_commit(&mut self, done: bool) {
        let Some(commit) = self.writes.commit.take() else { return };
        if !done {
            self.writes.poisoned = true;
            return;
        }
        let mut end = 0;
        for group in groups(&self.header, &commit.grains) {
            let Some(&(grain, _)) = group.first() else { continue };
            let table = self.table_of(grain);
            let changes: Vec<_> =
                group.iter().map(|&(grain, place)| (self.slot_of(grain), sector(place))).collect();
            let words = match self.tables.peek(table.into()) {
                Some(words) => changed(words, &changes),
                None => changed(&self.empty_table(), &changes),
            };
            let writes = &self.writes;
            self.tables.insert(table.into(), words.into(), |table| writes.touches(table));
            for &(grain, place) in group {
                self.writes.fresh.publish(grain);
                end = end.max(place.saturating_add(self.header.grain_bytes()));
            }
        }
        for &(slot, place) in commit.tables.iter().chain(&commit.redundant) {
            let place = u64::from(place).saturating_mul(SECTOR);
            end = end.max(place.saturating_add(self.header.table_bytes()));
            self.writes.tables.remove(&u32::try_from(slot).unwrap_or(u32::MAX));
        }
        self.directory = changed(&self.directory, &commit.tables);
        self.redundant = self.redundant.as_ref().map(|directory| changed(directory, &commit.redundant));
        self.limit = self.limit.max(end);
    }

    pub(crate) fn resting_steps(&self) -> Vec<Step> {
        if !self.writes.is_marked() || self.writes.poisoned {
            return Vec::new();
        }
        vec![Step::Flush, Step::Write(MetaWrite { offset: 0, bytes: self.first_sector(0) }), Step::Flush]
    }

    /// Nothing new is placed where an entry of a table points to.
    pub(crate) fn avoid_all(&mut self, table: &[u32]) {
        for &entry in table {
            if let Entry::Grain(place) = self.decode(entry) {
                self.writes.tail.avoid(place.saturating_add(self.header.grain_bytes()));
            }
        }
    }
}

/// Grains in ascending order, those of each table together.
fn groups<'a>(header: &Header, grains: &'a [(u64, u64)]) -> impl Iterator<Item = &'a [(u64, u64)]> {
    let entries = u64::from(header.table_entries);
    let table_of = move |grain: u64| grain.checked_div(entries);
    grains.chunk_by(move |a, b| table_of(a.0) == table_of(b.0))
}

fn sector(place: u64) -> u32 {
    u32::try_from(place >> 9).unwrap_or(0)
}

fn encode(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Words with some of them changed.
fn changed(words: &[u32], changes: &[(usize, u32)]) -> Vec<u32> {
    let mut words = words.to_vec();
    for &(at, value) in changes {
        if let Some(word) = words.get_mut(at) {
            *word = value;
        }
    }
    words
}

/// The sectors with changed words of what lies at byte `offset`. `changes` are in ascending order.
fn changed_sectors(words: &[u32], offset: u64, changes: &[(usize, u32)]) -> Vec<MetaWrite> {
    let groups = changes.chunk_by(|a, b| a.0 >> 7 == b.0 >> 7);
    let write = |group: &[(usize, u32)]| {
        let number = group.first()?.0 >> 7;
        let old = words.chunks(WORDS).nth(number)?;
        let here: Vec<_> = group.iter().map(|&(at, value)| (at & (WORDS.saturating_sub(1)), value)).collect();
        let offset = offset.saturating_add((number as u64).saturating_mul(SECTOR));
        Some(MetaWrite { offset, bytes: encode(&changed(old, &here)) })
    };
    groups.filter_map(write).collect()
}
