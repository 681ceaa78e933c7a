//! The seam between image formats and whoever does their I/O.
//!
//! A format's core implements [`Format`]. It never touches a file: it says where sectors lie ([`Format::map`]), what must
//! be done to write some ([`Format::plan_write`]), and what must go to disk before a write counts as done
//! ([`Format::begin_commit`]). Three drivers carry that out: tapdisk's asynchronous one, the blocking one of the
//! command-line tools, and the one of the tests, which crashes wherever it likes.
//!
//! # Units
//! Positions and counts on the virtual disk are in sectors of 512 bytes; offsets and lengths in a file are in bytes. All
//! that [`Step`]s write lies at multiples of 512 bytes and is as long as some.
//!
//! # The way of a write
//! ```text
//!  overwrite() ── Some(offset) ──> write there: done
//!      │ None
//!  plan_write() ─ Load ──> read the range, loaded(), plan again
//!               ─ Wait ──> until a preparation or a commit has ended, plan again
//!               ─ Write ─> 1. carry out `prepare`, tell prepared()
//!                          2. read what is to be copied around the data, write all of it in one piece
//!                          3. if `publish`: tell written(); when all parts of the request are there, take part in a commit
//!
//!  a commit:    begin_commit() ──> carry out its steps in order ──> commit_ended()
//! ```
//! All writers that are ready share one commit. What a core has been told by `written` goes into the next commit that begins
//! after that; a writer is answered when that commit has ended. What was answered survives the death of the process; it
//! survives the loss of power after a flush of the file.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

pub mod blocking;
pub mod cache;
pub mod cipher;
pub mod fresh;
pub mod inflate;
pub mod report;
mod source;
pub mod tail;
#[cfg(feature = "testing")]
pub mod testing;

use std::fmt::{Debug, Display};
use std::ops::Range;

pub use source::{ReadAt, Source};

/// Position on the virtual disk in sectors of 512 bytes.
pub type Sector = u64;

/// Bytes of a sector.
pub const SECTOR_SIZE: u64 = 512;

/// Where a run of sectors is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// In this file, one after another.
    Data {
        /// Byte offset of the first one.
        offset: u64,
        /// Number of sectors.
        count: u32,
    },
    /// Nowhere: they read as zeros.
    Zero {
        /// Number of sectors.
        count: u32,
    },
    /// In the parent, at the same position; without a parent, and behind its end, they read as zeros.
    Parent {
        /// Number of sectors.
        count: u32,
    },
    /// In this file, compressed: read its range, hand that to [`Format::unpack`].
    Packed {
        /// The compressed unit.
        packed: Packed,
        /// The first of the sectors asked for, counted from the beginning of the unit.
        first: u32,
        /// Number of sectors.
        count: u32,
    },
    /// Not known before some metadata is read.
    Load(Load),
}

/// A compressed unit: a cluster or a grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Packed {
    /// Byte offset in the file; any number.
    pub offset: u64,
    /// Bytes in the file; some at the end may not belong to the unit. They may reach beyond the end of the file, where they
    /// count as zeros.
    pub len: u32,
    /// Sectors of the unit when it is unpacked.
    pub sectors: u32,
}

/// A range of metadata that must be read and handed to [`Format::loaded`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// What it is, for the core.
    pub key: u64,
    /// Byte offset in the file, a multiple of 512.
    pub offset: u64,
    /// Bytes, a multiple of 512, at most 64 KiB.
    pub len: u32,
}

/// What to do to write the first of some sectors.
///
/// Every [`Write`] with `publish` set must be answered by [`Format::written`] with the sectors of the plan, and every
/// `prepare` by [`Format::prepared`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Plan {
    /// Read this, hand it to [`Format::loaded`], and plan again.
    Load(Load),
    /// Another writer is at work: wait for the end of a preparation or a commit, and plan again.
    Wait,
    /// Write.
    Write(Write),
}

/// A planned write of the first `count` sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// Byte offset for the data.
    pub offset: u64,
    /// Number of sectors.
    pub count: u32,
    /// What must be carried out before any of the data is written.
    pub prepare: Option<Prepare>,
    /// Sectors of the disk directly before the data that are to be copied along, to directly before `offset`: what the disk
    /// holds there now, by [`Format::map`] and the parents. The writer of a unit owns the whole of it until it has
    /// told `written`: nobody else is given a plan for it.
    pub copy_before: u32,
    /// The same behind the data; what is behind the end of the disk is zeros.
    pub copy_after: u32,
    /// True if the data become part of the image only by a commit; false if the data are all there is to write.
    pub publish: bool,
}

/// Makes a place ready for new data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepare {
    /// What it is, for the core.
    pub key: u64,
    /// In this order.
    pub steps: Vec<Step>,
}

/// What to do to discard the first of some sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiscardPlan {
    /// Read this, hand it to [`Format::loaded`], and plan again.
    Load(Load),
    /// Another writer is at work: wait for the end of a preparation or a commit, and plan again.
    Wait,
    /// These sectors stay as they are.
    Skip {
        /// Number of sectors.
        count: u32,
    },
    /// Punch a hole over their bytes; they stay part of the image and read as zeros.
    Punch {
        /// Byte offset of the first one.
        offset: u64,
        /// Number of sectors.
        count: u32,
    },
    /// The core has noted it; it becomes part of the image by the next commit, in which the caller takes part as a writer
    /// does.
    Publish {
        /// Number of sectors.
        count: u32,
    },
}

/// One step of metadata work. Steps are carried out in order as far as [`Step::Flush`] says; between two flushes the core
/// does not care, and all may be in flight together, except that a truncation comes before what follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Write.
    Write(MetaWrite),
    /// Make these bytes read as zeros.
    Zero(Range<u64>),
    /// Set the length of a regular file.
    Truncate(u64),
    /// These bytes are not used any more: give their room back, if that is possible.
    Punch(Range<u64>),
    /// Wait until all reads and writes have ended whose place the core has told before this step: what lay there is going to be
    /// somebody else's. Comes before what follows it.
    Settle,
    /// Make everything before durable: all data and metadata that were written to the file by anybody.
    Flush,
}

/// One write of metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaWrite {
    /// Byte offset in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// Errors of a core, which a guest sees as a failed request only.
pub trait FormatError: Debug + Display {
    /// The errno that fits.
    fn errno(&self) -> i32;
}

/// The core of a format: the state of one open image file.
///
/// What the disk holds changes only by [`Format::commit_ended`]: sectors that are written but not committed are invisible to
/// [`Format::map`].
pub trait Format: Debug {
    /// What can go wrong.
    type Error: FormatError;

    /// Size of the virtual disk in sectors.
    fn sectors(&self) -> u64;

    /// Byte offset of `count` sectors if they lie in this file, one after another, uncompressed, and all that is known
    /// without reading. What [`Format::map`] says of most reads, at a lower price.
    fn place(&self, sector: Sector, count: u32) -> Option<u64>;

    /// Byte offset to write `count` sectors to, if that is all there is to do. What [`Format::plan_write`] plans for most
    /// writes, at a lower price.
    fn overwrite(&self, sector: Sector, count: u32) -> Option<u64>;

    /// Where the sectors are: the answer for the longest prefix of `count` sectors from `sector` that has one answer.
    ///
    /// # Errors
    /// Sectors outside the disk, and metadata that point where they must not.
    fn map(&self, sector: Sector, count: u32) -> Result<Lookup, Self::Error>;

    /// Takes the bytes that a [`Load`] asked for. Several reads of one range may be under way at a time: the first to arrive
    /// counts.
    ///
    /// # Errors
    /// Malformed metadata.
    fn loaded(&mut self, load: &Load, bytes: &[u8]) -> Result<(), Self::Error>;

    /// A [`Load`] that could not be read.
    fn load_failed(&mut self, load: &Load);

    /// Writes the content of a unit to `into`, which is as long as the unit. `bytes` are those of [`Packed`].
    ///
    /// # Errors
    /// The bytes do not unpack to just one unit.
    fn unpack(&self, packed: &Packed, bytes: &[u8], into: &mut [u8]) -> Result<(), Self::Error>;

    /// What to do to write the longest possible prefix of `count` sectors from `sector`.
    ///
    /// # Errors
    /// The image is read-only or poisoned, sectors outside the disk, no space, damaged metadata.
    fn plan_write(&mut self, sector: Sector, count: u32) -> Result<Plan, Self::Error>;

    /// A preparation has been carried out, or (`done` false) has failed.
    fn prepared(&mut self, key: u64, done: bool);

    /// The data of a planned write with `publish` are in place, durable or not, or (`done` false) could not be written.
    fn written(&mut self, sector: Sector, count: u32, done: bool);

    /// What to do to discard a prefix of `count` sectors from `sector`. Only whole units, where a format has them; a request
    /// never fails because it is not aligned.
    ///
    /// # Errors
    /// As [`Format::plan_write`].
    fn plan_discard(&mut self, sector: Sector, count: u32) -> Result<DiscardPlan, Self::Error>;

    /// Takes everything that is pending as one commit, as steps; `None` if there is nothing or a commit is under way.
    fn begin_commit(&mut self) -> Option<Vec<Step>>;

    /// The commit under way has been carried out; or (`done` false) a part of it has failed: nobody knows what is on disk
    /// now, so the image takes no more writes. What could be read before still can.
    fn commit_ended(&mut self, done: bool);

    /// Begins to make the disk this many sectors large; `None` while something else is under way that it must not go on
    /// beside. The steps include all flushes. [`Format::resize_ended`] makes it so.
    ///
    /// # Errors
    /// The format or the image cannot have that size.
    fn begin_resize(&mut self, sectors: u64) -> Result<Option<Vec<Step>>, Self::Error>;

    /// The steps of the resize have been carried out, or (`done` false) a part has failed; see [`Format::commit_ended`].
    fn resize_ended(&mut self, done: bool);

    /// The steps that bring a written image into its resting state. Nothing is in flight, everything is committed.
    fn close_steps(&self) -> Vec<Step>;

    /// True after something has failed that leaves it unknown what is on disk.
    fn is_poisoned(&self) -> bool;

    /// What is between the bytes in the file and those of the disk; `None`: nothing.
    fn cipher(&self) -> Option<&cipher::Cipher> {
        None
    }
}
