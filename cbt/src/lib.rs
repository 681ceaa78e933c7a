//! The dirty-block log: which 64 KiB blocks of a disk were written since the log was begun. Backup software asks for it,
//! so that it copies only what has changed.
//!
//! # The file
//! As `cbt-util` and the `log` driver of XenServer's blktap have it (`cbt/cbt-util.c`, `drivers/block-log.c`):
//!
//! | bytes | what |
//! |---|---|
//! | 0 .. 16 | UUID of the log before this one |
//! | 16 .. 32 | UUID of the log after this one |
//! | 32 .. 36 | `consistent`, a signed integer: 0 or 1 |
//! | 36 .. 40 | unused |
//! | 40 .. 48 | size of the disk in bytes |
//! | 48 .. | one bit for each 64 KiB of the disk, in words of 64 bits, the least significant bit first |
//!
//! All numbers are in the order of the host.
//!
//! This library does no I/O. What it reads is a file from outside, so nothing in it may panic on any content.

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

mod uuid;

use std::ops::Range;

pub use self::uuid::{Uuid, UuidError};

/// Bytes of the header.
pub const HEADER_LEN: u64 = 48;

/// Bytes of the disk that one bit stands for.
pub const BLOCK: u64 = 64 << 10;

/// Bits of a word.
const WORD_BITS: u64 = 64;

/// Bytes of a word.
const WORD: u64 = 8;

/// Bytes of the bitmap for a disk of `size` bytes: whole words.
pub fn bitmap_len(size: u64) -> u64 {
    // At most 2^45: it cannot overflow.
    size.div_ceil(BLOCK).div_ceil(WORD_BITS).saturating_mul(WORD)
}

/// A file that is no dirty-block log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Shorter than a header.
    #[error("is too short for a dirty-block log, which has a header of 48 bytes")]
    NoHeader,
    /// The bitmap is incomplete.
    #[error("is cut off: the bitmap of a disk of {size} bytes takes {} bytes, and {found} are there", bitmap_len(*size))]
    ShortBitmap {
        /// Bytes of the disk.
        size: u64,
        /// Bytes behind the header.
        found: u64,
    },
    /// A disk never shrinks.
    #[error("is the log of a disk of {size} bytes already, which is more than {asked}")]
    Shrinks {
        /// Bytes of the disk.
        size: u64,
        /// What was asked for.
        asked: u64,
    },
    /// A bitmap that does not fit into another.
    #[error("is the log of a disk of {own} bytes, too small for one of {other} bytes")]
    TooSmall {
        /// Bytes of the disk.
        own: u64,
        /// Bytes of the other log's disk.
        other: u64,
    },
}

/// What the log says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The log before this one; all zeros: none.
    pub parent: Uuid,
    /// The log after this one; all zeros: none.
    pub child: Uuid,
    /// Not 0: the bits are complete. 0: the log is being written, or whoever wrote it did not end well.
    pub consistent: i32,
    /// Bytes of the disk.
    pub size: u64,
}

impl Header {
    /// Reads a header.
    ///
    /// # Errors
    /// Fewer than 48 bytes.
    pub fn parse(bytes: &[u8]) -> Result<Header, Error> {
        let (parent, rest) = bytes.split_first_chunk().ok_or(Error::NoHeader)?;
        let (child, rest) = rest.split_first_chunk().ok_or(Error::NoHeader)?;
        let (consistent, rest) = rest.split_first_chunk().ok_or(Error::NoHeader)?;
        let (_unused, rest) = rest.split_first_chunk::<4>().ok_or(Error::NoHeader)?;
        let (size, _) = rest.split_first_chunk().ok_or(Error::NoHeader)?;
        Ok(Header {
            parent: Uuid(*parent),
            child: Uuid(*child),
            consistent: i32::from_ne_bytes(*consistent),
            size: u64::from_ne_bytes(*size),
        })
    }

    /// The header as it stands in the file: [`HEADER_LEN`] bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let (consistent, size) = (self.consistent.to_ne_bytes(), self.size.to_ne_bytes());
        [&self.parent.0[..], &self.child.0, &consistent, &[0; 4], &size].concat()
    }
}

/// A whole log in memory: 2 MiB for each TiB of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// What it says of itself.
    header: Header,
    words: Vec<u64>,
}

impl Log {
    /// An empty log for a disk of `size` bytes.
    pub fn new(size: u64) -> Log {
        Log { header: Header { size, ..Header::default() }, words: vec![0; word_count(size)] }
    }

    /// Reads a log. What follows the bitmap is left alone.
    ///
    /// # Errors
    /// A file that is too short for the disk that it names.
    pub fn parse(bytes: &[u8]) -> Result<Log, Error> {
        let header = Header::parse(bytes)?;
        let (_, bitmap) = bytes.split_at_checked(header.to_bytes().len()).ok_or(Error::NoHeader)?;
        let short = Error::ShortBitmap { size: header.size, found: bitmap.len() as u64 };
        let len = usize::try_from(bitmap_len(header.size)).map_err(|_| short)?;
        let (words, _) = bitmap.get(..len).ok_or(short)?.as_chunks();
        Ok(Log { header, words: words.iter().copied().map(u64::from_ne_bytes).collect() })
    }

    /// What it says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Names the log before this one.
    pub fn set_parent(&mut self, parent: Uuid) {
        self.header.parent = parent;
    }

    /// Names the log after this one.
    pub fn set_child(&mut self, child: Uuid) {
        self.header.child = child;
    }

    /// Says whether the bits are complete.
    pub fn set_consistent(&mut self, consistent: i32) {
        self.header.consistent = consistent;
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        HEADER_LEN.saturating_add(bitmap_len(self.header.size))
    }

    /// Never: there is a header at least.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Bytes `range` of the file, as far as it reaches.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let header = self.header.to_bytes();
        let bitmap = range.start.saturating_sub(HEADER_LEN)..range.end.saturating_sub(HEADER_LEN);
        let words = index(bitmap.start / WORD)..index(bitmap.end.div_ceil(WORD)).min(self.words.len());
        let skip = index(bitmap.start % WORD);
        let bits = self.words.get(words).unwrap_or_default().iter().flat_map(|word| word.to_ne_bytes());
        let len = index(range.end.saturating_sub(range.start));
        let head = header.get(index(range.start.min(HEADER_LEN))..).unwrap_or_default();
        head.iter().copied().chain(bits.skip(skip)).take(len).collect()
    }

    /// Whether all blocks that bytes `range` of the disk touch are marked.
    pub fn is_marked(&self, range: &Range<u64>) -> bool {
        parts(range).all(|(word, mask)| self.words.get(word).is_some_and(|word| word & mask == mask))
    }

    /// Marks all blocks that bytes `range` of the disk touch; what lies behind its end is not marked. Returns the bytes of the
    /// file from the first to the last that this changes; empty: none.
    pub fn mark(&mut self, range: &Range<u64>) -> Range<u64> {
        let range = range.start..range.end.min(self.header.size);
        let mut changed = 0..0;
        for (index, mask) in parts(&range) {
            let Some(word) = self.words.get_mut(index) else { break };
            if *word & mask != mask {
                *word |= mask;
                let offset = HEADER_LEN.saturating_add((index as u64).saturating_mul(WORD));
                let start = if changed.is_empty() { offset } else { changed.start };
                changed = start..offset.saturating_add(WORD);
            }
        }
        changed
    }

    /// Number of marked blocks.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Makes it the log of a larger disk; the new blocks are not marked.
    ///
    /// # Errors
    /// The disk would shrink.
    pub fn grow(&mut self, size: u64) -> Result<(), Error> {
        if size < self.header.size {
            return Err(Error::Shrinks { size: self.header.size, asked: size });
        }
        self.header.size = size;
        self.words.resize(word_count(size), 0);
        Ok(())
    }

    /// Marks what is marked in the log before this one.
    ///
    /// # Errors
    /// That one is the log of a larger disk.
    pub fn merge(&mut self, parent: &Log) -> Result<(), Error> {
        if parent.words.len() > self.words.len() {
            return Err(Error::TooSmall { own: self.header.size, other: parent.header.size });
        }
        for (own, other) in self.words.iter_mut().zip(&parent.words) {
            *own |= other;
        }
        Ok(())
    }
}

fn word_count(size: u64) -> usize {
    index(bitmap_len(size) / WORD)
}

/// A position in memory. A log lies in memory as a whole, so that none is too large.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// The blocks that a byte range of the disk touches: words, and which of their bits.
fn parts(range: &Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
    let (first, end) = (range.start / BLOCK, range.end.div_ceil(BLOCK));
    let blocks = if range.is_empty() { 0..0 } else { first..end };
    let words = blocks.start / WORD_BITS..blocks.end.div_ceil(WORD_BITS);
    words.map(move |word| {
        let start = word.saturating_mul(WORD_BITS);
        let from = blocks.start.saturating_sub(start);
        let above = WORD_BITS.saturating_sub(blocks.end.saturating_sub(start).min(WORD_BITS));
        // Both are less than the width of a word: each word of the range has a bit in it.
        let mask = u64::MAX.unbounded_shl(shift(from)) & u64::MAX.unbounded_shr(shift(above));
        (index(word), mask)
    })
}

fn shift(bits: u64) -> u32 {
    u32::try_from(bits).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests;
