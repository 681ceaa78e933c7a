//! Writing in two phases: room is reserved and filled first, and becomes part of the image by a commit.
//!
//! What holds on disk at every moment, also if the machine stops:
//! 1. an entry of the allocation table points to a valid bitmap;
//! 2. a set bit of a bitmap means that the sector's data are there;
//! 3. blocks do not overlap and lie behind the headers.
//!
//! So zeroed bitmaps and data must be durable before the commit that refers to them is written, and that is the
//! first step of a commit. The writes of one commit need no order: a table entry without its new bits shows an
//! empty block, and bits without their table entry show nothing.
//!
//! # Whole blocks
//! In a file, a new block lies in room that reads as zeros, durably ([`crate::alloc`]), and where no parent shows through, zeros are what
//! its sectors held before. So 2 holds for all of its bits from the beginning, whether or not any data has arrived: such a
//! block is published with all bits set, once, and a commit of nothing but such blocks needs no flush before it. What a stop can
//! leave is each combination of
//!
//! | the table's entry | the bits | the data | the sectors read as |
//! |---|---|---|---|
//! | lost | any | any | zeros: the block is not there; its room is lost if a later block stays |
//! | there | lost | any | zeros: the bitmap is |
//! | there | there | lost | zeros: the room is |
//! | there | there | there | the data |
//!
//! of which each is the state before the write or the one after it, sector by sector, as long as the guest has not
//! flushed; and a flush makes all three durable. Afterwards the block is written without any metadata, like a raw disk.
//! This is not so in an encrypted image, where zeros in the file are not zeros of the disk, on a device, whose
//! blocks have to be zeroed first, nor above a parent.

use std::collections::{BTreeMap, BTreeSet};

use format::{MetaWrite, Plan, Prepare, Step, Write};

use crate::alloc::{Admission, Allocator};
use crate::bat::PER_SECTOR;
use crate::footer::RawFooter;
use crate::image::{BlockState, Dynamic, Piece, data_offset};
use crate::{BlockIndex, Error, SECTOR_SIZE, Sector, Vhd, bitmap};

/// What a commit makes of one block.
#[derive(Debug)]
struct Publication {
    block: BlockIndex,
    /// The new entry of a block that was not in the table.
    entry: Option<u32>,
    bits: Box<[u8]>,
    /// What the bits promise holds without the data, and is durable.
    safe: bool,
}

/// The state of all writing to one image.
#[derive(Debug)]
pub(crate) struct Writes {
    pub(crate) alloc: Allocator,
    activity: BTreeMap<BlockIndex, Activity>,
    /// Blocks not in the table that hold parts of writes that have failed. Their other bits must stay clear, or those parts
    /// would appear by and by.
    tainted: BTreeSet<BlockIndex>,
    /// A commit or something else that changes metadata is under way.
    alone: bool,
    /// What the commit under way makes of the image.
    committing: Vec<Publication>,
    poisoned: bool,
    end_of_data_at_open: u64,
}

/// Reasons why the bitmap of a block must stay in memory.
#[derive(Debug, Default)]
struct Activity {
    /// Writers with a plan to publish, not yet answered.
    writers: u32,
    /// Bits of sectors that are written but in no commit yet.
    fresh: Option<Box<[u8]>>,
    /// The block is part of the commit under way.
    committing: bool,
}

impl Activity {
    fn over(&self) -> bool {
        self.writers == 0 && self.fresh.is_none() && !self.committing
    }
}

impl Writes {
    pub(crate) fn new(regular: bool, size: u64, end_of_data: u64, limit: u64) -> Self {
        Self {
            alloc: Allocator::new(regular, size, end_of_data, limit),
            activity: BTreeMap::new(),
            tainted: BTreeSet::new(),
            alone: false,
            committing: Vec::new(),
            poisoned: false,
            end_of_data_at_open: end_of_data,
        }
    }

    /// True if the bitmap of `block` must stay in memory.
    pub(crate) fn touches(&self, block: BlockIndex) -> bool {
        self.activity.contains_key(&block)
    }

    /// True if the file's end has been in use for new blocks since it was opened.
    pub(crate) fn moved_end(&self) -> bool {
        self.alloc.used(self.end_of_data_at_open)
    }

    /// Begins a change of metadata that no commit may go on beside. False if a commit is under way.
    pub(crate) fn begin_alone(&mut self) -> bool {
        !std::mem::replace(&mut self.alone, true)
    }

    /// Ends what [`Writes::begin_alone`] has begun; `failed` if nobody knows what is on disk.
    pub(crate) fn end_alone(&mut self, failed: bool) {
        self.alone = false;
        self.poisoned |= failed;
    }

    fn writer_came(&mut self, block: BlockIndex) {
        let activity = self.activity.entry(block).or_default();
        activity.writers = activity.writers.saturating_add(1);
    }

    fn writer_left(&mut self, block: BlockIndex) {
        if let Some(activity) = self.activity.get_mut(&block) {
            activity.writers = activity.writers.saturating_sub(1);
            if activity.over() {
                self.activity.remove(&block);
            }
        }
    }
}

impl Vhd {
    /// What to do to write the longest possible prefix of `count` sectors from `sector`.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Poisoned`], [`Error::OutOfRange`], [`Error::NoSpace`].
    pub fn plan_write(&mut self, sector: Sector, count: u32) -> Result<Plan, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        self.check_range(sector, count)?;
        let Some(dynamic) = &mut self.dynamic else {
            let offset = sector.saturating_mul(SECTOR_SIZE);
            return Ok(Plan::Write(in_place(offset, count, false)));
        };
        if dynamic.writes.poisoned {
            return Err(Error::Poisoned);
        }
        let piece = dynamic.piece(sector, count);
        dynamic.plan(&piece, &self.footer)
    }

    /// Byte offset to write `count` sectors to, if that is all there is to do: the sectors have their place, and their bits
    /// are on disk. What [`Vhd::plan_write`] plans for most writes to an image that has been in use for some time, at a lower
    /// price.
    pub fn overwrite(&self, sector: Sector, count: u32) -> Option<u64> {
        if !self.writable || self.is_poisoned() {
            return None;
        }
        self.place(sector, count)
    }

    /// The preparation of `block` has been carried out.
    pub(crate) fn block_prepared(&mut self, block: BlockIndex) {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.writes.alloc.prepared(block);
        }
    }

    /// The preparation of `block` has failed. The block keeps its place, and its next writer prepares it again.
    pub(crate) fn prepare_failed(&mut self, block: BlockIndex) {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.writes.alloc.prepare_failed(block);
        }
    }

    /// The data of a planned write are in place, durable or not: the next commit publishes them.
    pub(crate) fn sectors_written(&mut self, sector: Sector, count: u32) {
        if let Some(dynamic) = &mut self.dynamic {
            let piece = dynamic.piece(sector, count);
            dynamic.note(&piece);
            dynamic.writes.writer_left(piece.block);
        }
    }

    /// The data of a planned write could not be written; nothing of them will be published.
    pub(crate) fn write_failed(&mut self, sector: Sector, count: u32) {
        if let Some(dynamic) = &mut self.dynamic {
            let piece = dynamic.piece(sector, count);
            dynamic.writes.writer_left(piece.block);
            if dynamic.bat.get(piece.block).is_none() {
                dynamic.writes.tainted.insert(piece.block);
            }
        }
    }

    /// True if something is written but in no commit yet, and could go into one.
    pub fn has_pending(&self) -> bool {
        self.dynamic.as_ref().is_some_and(|dynamic| {
            let writes = &dynamic.writes;
            let ready =
                |block| dynamic.bat.get(block).is_some() || writes.alloc.prepared_entry(block).is_some();
            !writes.poisoned && writes.activity.iter().any(|(&block, a)| a.fresh.is_some() && ready(block))
        })
    }

    /// Takes everything that is pending as one commit; `None` if there is nothing or a commit is under way.
    ///
    /// The first step makes all data and preparations of the image durable, unless what is published holds without; the
    /// writes need no order.
    pub fn begin_commit(&mut self) -> Option<Vec<Step>> {
        let dynamic = self.dynamic.as_mut()?;
        if dynamic.writes.alone || dynamic.writes.poisoned {
            return None;
        }
        let blocks = dynamic.take_pending();
        if blocks.is_empty() {
            return None;
        }
        dynamic.writes.alone = true;
        let writes = dynamic.meta_writes(&blocks);
        let barrier = blocks.iter().any(|block| !block.safe).then_some(Step::Flush);
        dynamic.writes.committing = blocks;
        Some(barrier.into_iter().chain(writes.into_iter().map(Step::Write)).collect())
    }

    /// All writes of the commit have been carried out: its sectors are part of the image now.
    pub(crate) fn commit_done(&mut self) {
        let Some(dynamic) = &mut self.dynamic else { return };
        dynamic.writes.alone = false;
        for Publication { block, entry, bits, .. } in std::mem::take(&mut dynamic.writes.committing) {
            if let Some(entry) = entry {
                dynamic.publish(block, entry);
                dynamic.writes.alloc.release(block);
                dynamic.writes.tainted.remove(&block);
            }
            dynamic.learn(block, &bits);
            if let Some(activity) = dynamic.writes.activity.get_mut(&block) {
                activity.committing = false;
                if activity.over() {
                    dynamic.writes.activity.remove(&block);
                }
            }
        }
    }

    /// A part of the commit has failed. Nobody knows what is on disk now, so the image takes no more writes; what could
    /// be read before still can.
    pub(crate) fn commit_failed(&mut self) {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.writes.committing = Vec::new();
            dynamic.writes.end_alone(true);
        }
    }

    /// True after a commit or a growth has failed.
    pub fn is_poisoned(&self) -> bool {
        self.dynamic.as_ref().is_some_and(|dynamic| dynamic.writes.poisoned)
    }
}

impl Dynamic {
    /// Plans a write within one block.
    fn plan(&mut self, piece: &Piece, footer: &RawFooter) -> Result<Plan, Error> {
        let (block, count) = (piece.block, piece.count);
        let (extent, publish) = match self.state(block)? {
            BlockState::Absent => return self.plan_new(piece, footer),
            BlockState::Unread(extent) => {
                self.load_began(block);
                return Ok(Plan::Load(self.bitmap_load(block, extent)));
            }
            BlockState::Full(extent) => (extent, false),
            BlockState::Partial(extent, bits) => (extent, bitmap::run(bits, piece.bits()) != (true, count)),
        };
        if publish {
            self.writes.writer_came(block);
        }
        Ok(Plan::Write(in_place(data_offset(extent, piece), count, publish)))
    }

    /// Plans a write to a block that is not in the table.
    fn plan_new(&mut self, piece: &Piece, footer: &RawFooter) -> Result<Plan, Error> {
        let (entry, prepare) = match self.writes.alloc.admit(piece.block, &self.layout, self.grow_by())? {
            Admission::Wait => return Ok(Plan::Wait),
            Admission::Ready(entry) => (entry, None),
            Admission::Prepare(entry, room) => {
                (entry, Some(Prepare { key: piece.block.into(), steps: room.steps(footer) }))
            }
        };
        self.writes.writer_came(piece.block);
        let offset = data_offset(self.layout.extent(entry), piece);
        Ok(Plan::Write(Write { prepare, ..in_place(offset, piece.count, true) }))
    }

    /// By how many blocks more than needed a file grows.
    fn grow_by(&self) -> u32 {
        const BLOCKS: u32 = 31;
        self.bat.entries().saturating_sub(self.allocated).saturating_sub(1).min(BLOCKS)
    }

    /// Notes that the sectors of a piece are written. Also if a commit has just set their bits on disk: the writer was
    /// told to wait for a commit, so there must be one.
    fn note(&mut self, piece: &Piece) {
        let Ok(len) = usize::try_from(self.layout.bitmap_bytes()) else { return };
        let activity = self.writes.activity.entry(piece.block).or_default();
        bitmap::set(activity.fresh.get_or_insert_with(|| vec![0; len].into()), piece.bits());
    }

    /// Takes the fresh bits of all blocks that can go into a commit.
    fn take_pending(&mut self) -> Vec<Publication> {
        let mut blocks = Vec::new();
        for (&block, activity) in &mut self.writes.activity {
            let published = self.bat.get(block).is_some();
            let entry = self.writes.alloc.prepared_entry(block);
            if !published && entry.is_none() {
                continue;
            }
            let Some(mut bits) = activity.fresh.take() else { continue };
            let whole = !published && self.whole_blocks && !self.writes.tainted.contains(&block);
            let full = bitmap::get(&self.full, block);
            if full || whole {
                bits.fill(0xff);
            } else if published {
                // A bitmap with a writer is not evicted, so it is here unless a caller reports writes it never planned.
                // Without it the bits on disk are not known, and writing only the new ones would lose the others.
                let Some(known) = self.cache.peek(block) else {
                    log::error!("block {block} was written without a plan; the image takes no more writes");
                    self.writes.poisoned = true;
                    return Vec::new();
                };
                bitmap::merge(&mut bits, known);
            }
            activity.committing = true;
            let safe = full || (whole && self.writes.alloc.is_file());
            blocks.push(Publication { block, entry: entry.filter(|_| !published), bits, safe });
        }
        blocks
    }

    /// The bitmaps and table sectors of a commit.
    fn meta_writes(&self, blocks: &[Publication]) -> Vec<MetaWrite> {
        let mut writes = Vec::new();
        let mut entries = Vec::new();
        for Publication { block, entry, bits, .. } in blocks {
            // The bits of a block that is full are on disk already.
            if entry.is_none() && self.is_full(*block) {
                continue;
            }
            let Some(at) = entry.or_else(|| self.bat.get(*block)) else { continue };
            writes.push(MetaWrite { offset: self.layout.extent(at).bitmap, bytes: bits.to_vec() });
            entries.extend(entry.map(|entry| (*block, entry)));
        }
        let sector_of = |block: BlockIndex| block / PER_SECTOR;
        for group in entries.chunk_by(|a, b| sector_of(a.0) == sector_of(b.0)) {
            let Some(&(block, _)) = group.first() else { continue };
            let sector = sector_of(block);
            let offset =
                self.layout.table_offset.saturating_add(u64::from(sector).saturating_mul(SECTOR_SIZE));
            writes.push(MetaWrite { offset, bytes: self.bat.sector(sector, group) });
        }
        writes
    }
}

/// A write that needs nothing before the data.
fn in_place(offset: u64, count: u32, publish: bool) -> Write {
    Write { offset, count, prepare: None, copy_before: 0, copy_after: 0, publish }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::BitmapCache;
    use crate::{DiskType, NewImage, OpenOptions, Uuid};
    use format::{Load, Lookup, Source};

    /// An image of 8 blocks of 16 sectors, opened for writing, that has room for one bitmap in memory.
    fn image() -> Vhd {
        let image = NewImage {
            kind: DiskType::Dynamic,
            size: 8 * 8192,
            max_size: 0,
            block_size: 8192,
            uuid: Uuid([1; 16]),
            timestamp: 1,
            parent: None,
            key: None,
        };
        let bytes = image.build(None).unwrap();
        let mut file = vec![0; usize::try_from(bytes.len).unwrap()];
        for write in &bytes.writes {
            let at = usize::try_from(write.offset).unwrap();
            file[at..at + write.bytes.len()].copy_from_slice(&write.bytes);
        }
        let mut read = |offset: u64, buf: &mut [u8]| {
            let at = usize::try_from(offset).unwrap();
            buf.copy_from_slice(&file[at..at + buf.len()]);
            Ok(())
        };
        let source = Source { size: bytes.len, regular: true, read: &mut read };
        let mut vhd =
            Vhd::open(source, &OpenOptions { writable: true, precise: true, ..Default::default() }).unwrap();
        vhd.dynamic.as_mut().unwrap().cache = BitmapCache::new(1);
        vhd
    }

    /// Plans a write, carries out its preparation, and says whether it must be published.
    fn plan(vhd: &mut Vhd, sector: Sector, count: u32) -> bool {
        match vhd.plan_write(sector, count).unwrap() {
            Plan::Write(Write { prepare, publish, count: planned, .. }) => {
                assert_eq!(planned, count);
                if let Some(prepare) = prepare {
                    vhd.block_prepared(prepare.key.try_into().unwrap());
                }
                publish
            }
            other => panic!("{other:?}"),
        }
    }

    fn commit(vhd: &mut Vhd) -> Vec<MetaWrite> {
        let writes = writes(&vhd.begin_commit().unwrap());
        vhd.commit_done();
        writes
    }

    /// The writes of a commit, which begins with a flush.
    fn writes(commit: &[Step]) -> Vec<MetaWrite> {
        assert_eq!(commit[0], Step::Flush);
        let write = |step: &Step| match step {
            Step::Write(write) => write.clone(),
            other => panic!("{other:?}"),
        };
        commit[1..].iter().map(write).collect()
    }

    fn write(vhd: &mut Vhd, sector: Sector, count: u32) {
        assert!(plan(vhd, sector, count));
        vhd.sectors_written(sector, count);
        commit(vhd);
    }

    fn bits(first: u8, second: u8) -> Vec<u8> {
        let mut bits = vec![0; 512];
        bits[..2].copy_from_slice(&[first, second]);
        bits
    }

    #[test]
    fn nothing_is_visible_before_its_commit_is_done() {
        let mut vhd = image();
        assert!(plan(&mut vhd, 0, 4));
        assert!(!vhd.has_pending());
        vhd.sectors_written(0, 4);
        assert!(vhd.has_pending());
        vhd.begin_commit().unwrap();
        assert_eq!(vhd.map(0, 16).unwrap(), Lookup::Zero { count: 16 });
        assert_eq!(vhd.end_of_data(), 3072);
        // What comes during a commit goes into the next one.
        assert!(plan(&mut vhd, 4, 2));
        vhd.sectors_written(4, 2);
        assert!(vhd.begin_commit().is_none());
        vhd.commit_done();
        assert_eq!(vhd.map(0, 16).unwrap(), Lookup::Data { offset: 4096, count: 4 });
        let second = vhd.begin_commit().unwrap();
        assert_eq!(writes(&second), [MetaWrite { offset: 3584, bytes: bits(0xfc, 0) }]);
        vhd.commit_done();
        assert!(!plan(&mut vhd, 1, 5) && plan(&mut vhd, 1, 6));
    }

    #[test]
    fn the_first_commit_of_a_block_has_its_table_entry() {
        let mut vhd = image();
        assert!(plan(&mut vhd, 16, 16));
        vhd.sectors_written(16, 16);
        let writes = commit(&mut vhd);
        assert_eq!(writes[0], MetaWrite { offset: 3584, bytes: bits(0xff, 0xff) });
        assert_eq!(writes[1].offset, 1536);
        assert_eq!(&writes[1].bytes[..12], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff]);
        // A full block needs no bitmap in memory and no publication.
        assert_eq!(vhd.map(16, 16).unwrap(), Lookup::Data { offset: 4096, count: 16 });
        assert!(!plan(&mut vhd, 20, 4));
    }

    #[test]
    fn unprepared_blocks_enter_no_commit() {
        let mut vhd = image();
        let Plan::Write(Write { prepare: Some(prepare), .. }) = vhd.plan_write(0, 1).unwrap() else {
            panic!()
        };
        assert_eq!(vhd.plan_write(1, 1).unwrap(), Plan::Wait);
        vhd.prepare_failed(0);
        vhd.write_failed(0, 1);
        vhd.sectors_written(0, 1);
        assert!(!vhd.has_pending() && vhd.begin_commit().is_none());
        // The next writer gets the same place, and prepares it.
        let Plan::Write(Write { offset: 4096, prepare: Some(again), .. }) = vhd.plan_write(0, 1).unwrap()
        else {
            panic!()
        };
        assert_eq!(again, prepare);
    }

    #[test]
    fn a_bitmap_with_a_writer_is_not_evicted() {
        let mut vhd = image();
        write(&mut vhd, 0, 1);
        assert!(plan(&mut vhd, 1, 1));
        // Bitmaps of other blocks come in meanwhile.
        write(&mut vhd, 16, 1);
        write(&mut vhd, 32, 1);
        vhd.sectors_written(1, 1);
        assert_eq!(commit(&mut vhd), [MetaWrite { offset: 3584, bytes: bits(0xc0, 0) }]);
        assert!(!vhd.is_poisoned());
    }

    #[test]
    fn a_late_bitmap_does_not_bring_back_old_bits() {
        let mut vhd = image();
        write(&mut vhd, 0, 1);
        write(&mut vhd, 16, 1);
        // The bitmap of block 0 is evicted: two readers fetch it.
        for _ in 0..2 {
            assert!(matches!(vhd.map(0, 1).unwrap(), Lookup::Load(Load { key: 0, .. })));
        }
        let old = bits(0x80, 0);
        vhd.insert_bitmap(0, &old).unwrap();
        write(&mut vhd, 1, 1);
        write(&mut vhd, 32, 1);
        write(&mut vhd, 48, 1);
        vhd.insert_bitmap(0, &old).unwrap();
        assert_eq!(vhd.map(0, 16).unwrap(), Lookup::Data { offset: 4096, count: 2 });
        // With no reader left it may go.
        write(&mut vhd, 64, 1);
        write(&mut vhd, 80, 1);
        assert!(matches!(vhd.map(0, 1).unwrap(), Lookup::Load(Load { key: 0, .. })));
    }

    #[test]
    fn a_failed_commit_ends_writing_but_not_reading() {
        let mut vhd = image();
        write(&mut vhd, 0, 1);
        assert!(plan(&mut vhd, 16, 1));
        vhd.sectors_written(16, 1);
        vhd.begin_commit().unwrap();
        vhd.commit_failed();
        assert!(vhd.is_poisoned() && !vhd.has_pending());
        assert!(matches!(vhd.plan_write(0, 1), Err(Error::Poisoned)));
        assert_eq!(vhd.map(0, 1).unwrap(), Lookup::Data { offset: 4096, count: 1 });
        assert_eq!(vhd.map(16, 1).unwrap(), Lookup::Zero { count: 1 });
        assert!(vhd.close_steps().is_empty());
    }

    #[test]
    fn ranges_and_modes_are_checked() {
        let mut vhd = image();
        for (sector, count) in [(128, 1), (127, 2), (u64::MAX, 1), (0, 0), (0, 129)] {
            assert!(matches!(vhd.map(sector, count), Err(Error::OutOfRange { .. })), "{sector} {count}");
            assert!(matches!(vhd.plan_write(sector, count), Err(Error::OutOfRange { .. })));
        }
        vhd.writable = false;
        assert!(matches!(vhd.plan_write(0, 1), Err(Error::ReadOnly)));
        assert!(vhd.insert_bitmap(0, &[0; 512]).is_err());
    }
}
