//! Writing in two phases: room is reserved and filled first, and becomes part of the image by a commit.
//!
//! What holds on disk at every moment, also if the machine stops:
//! 1. an entry of the allocation table points to a valid bitmap;
//! 2. a set bit of a bitmap means that the sector's data are there;
//! 3. blocks do not overlap and lie behind the headers.
//!
//! So zeroed bitmaps and data must be durable before the commit that refers to them is written, and that is the
//! contract of [`Vhd::begin_commit`]. The writes of one commit need no order: a table entry without its new bits shows an
//! empty block, and bits without their table entry show nothing.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::alloc::{Admission, Allocator};
use crate::bat::PER_SECTOR;
use crate::image::{BlockState, Dynamic, Piece, data_offset};
use crate::{BlockIndex, Error, SECTOR_SIZE, Sector, Vhd, bitmap};

/// What to do to write the first of some sectors.
///
/// Every `Write` with `publish` set must be answered by [`Vhd::written`] or [`Vhd::write_failed`] with the sectors of the
/// plan, and every `prepare` by [`Vhd::prepared`] or [`Vhd::prepare_failed`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WritePlan {
    /// Read a bitmap, give it to [`Vhd::insert_bitmap`], and plan again.
    NeedBitmap {
        /// The block.
        block: BlockIndex,
        /// Byte offset of its bitmap.
        offset: u64,
        /// Length of its bitmap in bytes.
        len: u32,
    },
    /// Another writer prepares a block (this one, or in a file any other): wait for the end of that, and plan again.
    Wait {
        /// The block in preparation.
        block: BlockIndex,
    },
    /// Write.
    Write {
        /// Byte offset for the data.
        offset: u64,
        /// Number of sectors.
        count: u32,
        /// What must be carried out before any of the data is written.
        prepare: Option<Prepare>,
        /// True if the data become part of the image only by a commit; false if the data are all there is to write.
        publish: bool,
    },
}

/// Makes a place ready for a new block, in this order: trim, grow, zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepare {
    /// The block.
    pub block: BlockIndex,
    /// Byte range to be filled with zeros: the gap before the bitmap, where an old footer may be, and the bitmap.
    pub zero: Range<u64>,
    /// Byte range of the data. It must read as zeros afterwards: on a block device it has to be zeroed, in a file it
    /// is new.
    pub body: Range<u64>,
    /// In a file: truncate to this length first. Drops what an unclean end has left.
    pub trim: Option<u64>,
    /// In a file, always: then grow to this length, which is never less than what other blocks need.
    pub file_len: Option<u64>,
}

/// Metadata to be written together.
#[derive(Debug)]
pub struct Commit {
    /// The writes, in any order.
    pub writes: Vec<MetaWrite>,
    blocks: Vec<Publication>,
}

/// One write of metadata, of whole sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaWrite {
    /// Byte offset in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// What a commit makes of one block.
#[derive(Debug)]
struct Publication {
    block: BlockIndex,
    /// The new entry of a block that was not in the table.
    entry: Option<u32>,
    bits: Box<[u8]>,
}

/// The state of all writing to one image.
#[derive(Debug)]
pub(crate) struct Writes {
    pub(crate) alloc: Allocator,
    activity: BTreeMap<BlockIndex, Activity>,
    committing: bool,
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
            committing: false,
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
    pub fn plan_write(&mut self, sector: Sector, count: u32) -> Result<WritePlan, Error> {
        if !self.writable {
            return Err(Error::ReadOnly);
        }
        self.check_range(sector, count)?;
        let Some(dynamic) = &mut self.dynamic else {
            let offset = sector.saturating_mul(SECTOR_SIZE);
            return Ok(WritePlan::Write { offset, count, prepare: None, publish: false });
        };
        if dynamic.writes.poisoned {
            return Err(Error::Poisoned);
        }
        let piece = dynamic.piece(sector, count);
        dynamic.plan(&piece)
    }

    /// The preparation of `block` has been carried out.
    pub fn prepared(&mut self, block: BlockIndex) {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.writes.alloc.prepared(block, &dynamic.layout);
        }
    }

    /// The preparation of `block` has failed. The block keeps its place, and its next writer prepares it again.
    pub fn prepare_failed(&mut self, block: BlockIndex) {
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.writes.alloc.prepare_failed(block);
        }
    }

    /// The data of a planned write are in place, durable or not: the next commit publishes them.
    pub fn written(&mut self, sector: Sector, count: u32) {
        if let Some(dynamic) = &mut self.dynamic {
            let piece = dynamic.piece(sector, count);
            dynamic.note(&piece);
            dynamic.writes.writer_left(piece.block);
        }
    }

    /// The data of a planned write could not be written; nothing of them will be published.
    pub fn write_failed(&mut self, sector: Sector, count: u32) {
        if let Some(dynamic) = &mut self.dynamic {
            let piece = dynamic.piece(sector, count);
            dynamic.writes.writer_left(piece.block);
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
    /// The caller first makes all data and preparations of the image durable (fdatasync *after* this call), then carries
    /// out all [`Commit::writes`], and then calls [`Vhd::commit_done`] or, if any of that failed,
    /// [`Vhd::commit_failed`]. The guest's writes that came before this call count as done only after `commit_done`.
    /// A guest's flush needs another fdatasync behind that.
    pub fn begin_commit(&mut self) -> Option<Commit> {
        let dynamic = self.dynamic.as_mut()?;
        if dynamic.writes.committing || dynamic.writes.poisoned {
            return None;
        }
        let blocks = dynamic.take_pending();
        if blocks.is_empty() {
            return None;
        }
        dynamic.writes.committing = true;
        Some(Commit { writes: dynamic.meta_writes(&blocks), blocks })
    }

    /// All writes of the commit have been carried out: its sectors are part of the image now.
    pub fn commit_done(&mut self, commit: Commit) {
        let Some(dynamic) = &mut self.dynamic else { return };
        dynamic.writes.committing = false;
        for Publication { block, entry, bits } in commit.blocks {
            if let Some(entry) = entry {
                dynamic.publish(block, entry);
                dynamic.writes.alloc.release(block);
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
    pub fn commit_failed(&mut self, commit: Commit) {
        drop(commit);
        if let Some(dynamic) = &mut self.dynamic {
            dynamic.writes.committing = false;
            dynamic.writes.poisoned = true;
        }
    }

    /// True after [`Vhd::commit_failed`].
    pub fn is_poisoned(&self) -> bool {
        self.dynamic.as_ref().is_some_and(|dynamic| dynamic.writes.poisoned)
    }
}

impl Dynamic {
    /// Plans a write within one block.
    fn plan(&mut self, piece: &Piece) -> Result<WritePlan, Error> {
        let (block, count) = (piece.block, piece.count);
        let (extent, publish) = match self.state(block)? {
            BlockState::Absent => return self.plan_new(piece),
            BlockState::Unread(extent) => {
                let len = self.layout.bitmap_bytes();
                self.load_began(block);
                return Ok(WritePlan::NeedBitmap { block, offset: extent.bitmap, len });
            }
            BlockState::Full(extent) => (extent, false),
            BlockState::Partial(extent, bits) => (extent, bitmap::run(bits, piece.bits()) != (true, count)),
        };
        if publish {
            self.writes.writer_came(block);
        }
        Ok(WritePlan::Write { offset: data_offset(extent, piece), count, prepare: None, publish })
    }

    /// Plans a write to a block that is not in the table.
    fn plan_new(&mut self, piece: &Piece) -> Result<WritePlan, Error> {
        let (entry, prepare) = match self.writes.alloc.admit(piece.block, &self.layout)? {
            Admission::Wait(block) => return Ok(WritePlan::Wait { block }),
            Admission::Ready(entry) => (entry, None),
            Admission::Prepare(entry, prepare) => (entry, Some(prepare)),
        };
        self.writes.writer_came(piece.block);
        let offset = data_offset(self.layout.extent(entry), piece);
        Ok(WritePlan::Write { offset, count: piece.count, prepare, publish: true })
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
            if bitmap::get(&self.full, block) {
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
            blocks.push(Publication { block, entry: entry.filter(|_| !published), bits });
        }
        blocks
    }

    /// The bitmaps and table sectors of a commit.
    fn meta_writes(&self, blocks: &[Publication]) -> Vec<MetaWrite> {
        let mut writes = Vec::new();
        let mut entries = Vec::new();
        for Publication { block, entry, bits } in blocks {
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
