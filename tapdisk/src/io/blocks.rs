//! Sectors of a store whose blocks are larger: by reading the whole block, and for a write changing it and writing it back.
//!
//! The guest's sectors have 512 bytes, and so have VHD's structures; a 4Kn disk takes whole blocks of 4096 bytes at
//! multiples of 4096 only. What is whole blocks anyway goes straight from and to the caller's memory. The rest, the first and
//! the last block of a transfer as a rule, goes through one page of the pool at a time. A caller's memory that the store
//! cannot reach directly (aligned too loosely) takes the same way.
//!
//! **Two writers of one block** must not undo each other's change, so every write to such a store holds a lock on its
//! blocks: alone for a part of a block, together with others for whole blocks (`image::locks`).
//!
//! **No deadlock when pages or locks run short**: a task takes the lock first and the page second, never holds two of
//! either, and with a page in hand waits for nothing but the device. So every page comes back; whoever holds a lock
//! gets a page in the end and then ends; so every lock comes back too. The callers hold data buffers while they wait, but
//! nobody who has a lock or a page waits for a data buffer.
//!
//! **The end of a regular file** may lie within a block, see [`ImageFile::tail`].

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;

use blkif::ids::PAGE_SIZE;
use nix::errno::Errno;

use super::{Direction, Io, moved};
use crate::buf::{Buf, Piece};
use crate::image::file::ImageFile;
use crate::image::locks::BlockLock;

/// Where the bytes of a write come from.
#[derive(Clone, Copy, Debug)]
enum Source<'a> {
    /// From this byte of a buffer on.
    Buf(&'a Buf, usize),
    /// Bytes in memory that the kernel is not told of.
    Bytes(&'a [u8]),
    /// Zeros.
    Zeros,
}

impl<'a> Source<'a> {
    /// The bytes `range` as they lie in a buffer, to be written from there.
    fn piece(self, range: Range<usize>) -> Option<Piece> {
        match self {
            Source::Buf(buf, first) => buf.piece(first + range.start..first + range.end),
            Source::Bytes(_) | Source::Zeros => None,
        }
    }

    /// Puts the bytes from `from` on into `to` of a page.
    fn copy(self, from: usize, page: &mut Buf, to: Range<usize>) -> Result<(), Errno> {
        let len = to.len();
        if let Source::Buf(buf, first) = self {
            let from = first + from;
            return if buf.copy_to(from..from + len, page, to.start) { Ok(()) } else { Err(Errno::EINVAL) };
        }
        let to = page.bytes_mut().get_mut(to).ok_or(Errno::EINVAL)?;
        match self {
            Source::Bytes(bytes) => {
                to.copy_from_slice(bytes.get(from..from + len).ok_or(Errno::EINVAL)?);
            }
            Source::Zeros | Source::Buf(..) => to.fill(0),
        }
        Ok(())
    }
}

/// Some bytes of a file and the blocks that they are a part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    /// Byte offset of the first block.
    start: u64,
    /// Bytes before the part.
    skip: usize,
    /// Bytes of the part.
    len: usize,
    /// Bytes of the blocks.
    span: usize,
}

impl Part {
    /// The part that the bytes from `at` on begin with, where `left` are wanted. `granule` is a power of two up to a page.
    fn first(granule: u32, at: u64, left: usize) -> Part {
        Part::within(granule, at, left, PAGE_SIZE)
    }

    /// The same for blocks of `most` bytes together, some pages.
    fn within(granule: u32, at: u64, left: usize, most: usize) -> Part {
        // Fits: it is less than a page.
        let skip = usize::try_from(at % u64::from(granule)).unwrap_or(0);
        let granule = granule as usize;
        let len = left.min(most - skip);
        Part { start: at - skip as u64, skip, len, span: (skip + len).next_multiple_of(granule) }
    }

    /// Whether its blocks have other bytes too.
    fn is_partial(&self) -> bool {
        self.len != self.span
    }

    fn range(&self) -> Range<usize> {
        self.skip..self.skip + self.len
    }

    fn blocks(&self) -> Range<u64> {
        self.start..self.start + self.span as u64
    }
}

/// How many of `left` bytes at `at` are whole blocks from there on.
fn whole(granule: u32, at: u64, left: usize) -> usize {
    let mask = granule as usize - 1;
    if at & mask as u64 == 0 { left & !mask } else { 0 }
}

/// Bytes of metadata that are read at a time.
const MOST_METADATA: usize = 64 << 10;

impl Io {
    /// Fills bytes `range` of `buf` from byte `offset` on.
    pub async fn read(
        &self,
        file: &ImageFile,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let piece = buf.piece(range.clone()).ok_or(Errno::EINVAL)?;
        if file.takes(offset, piece) {
            return self.whole(Direction::Read, file, offset, piece).await;
        }
        let _flight = self.flights.begin();
        self.read_parts(file, offset, buf, range).await
    }

    async fn read_parts(
        &self,
        file: &ImageFile,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let Range { start: mut to, end } = range;
        let mut at = offset;
        while to < end {
            let whole = whole(file.granule(), at, end - to);
            let done = match buf.piece(to..to + whole).filter(|&piece| file.takes(at, piece)) {
                Some(piece) => {
                    self.start(Direction::Read, file, at, piece).finish().await?;
                    whole
                }
                None => {
                    let part = Part::first(file.granule(), at, end - to);
                    let page = self.pool.meta().await;
                    self.read_blocks(file, &part, &page, part.range().end).await?;
                    if !page.copy_to(part.range(), buf, to) {
                        return Err(Errno::EINVAL);
                    }
                    part.len
                }
            };
            to += done;
            at += done as u64;
        }
        Ok(())
    }

    /// Reads `len` bytes of metadata.
    pub async fn read_metadata(&self, file: &ImageFile, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let (at, left) = (offset + bytes.len() as u64, len - bytes.len());
            let part = match left {
                0..=PAGE_SIZE => Part::first(file.granule(), at, left),
                _ => Part::within(file.granule(), at, left, MOST_METADATA),
            };
            let buf = match part.span {
                0..=PAGE_SIZE => self.pool.meta().await,
                span => self.pool.bounce(span)?,
            };
            self.read_blocks(file, &part, &buf, part.range().end).await?;
            bytes.extend_from_slice(buf.bytes().get(part.range()).ok_or(Errno::EIO)?);
        }
        Ok(bytes)
    }

    /// Reads the blocks of a part to the beginning of a page; `needed` bytes of them must be there, the others may lie behind
    /// the end of the file.
    async fn read_blocks(
        &self,
        file: &ImageFile,
        part: &Part,
        page: &Buf,
        needed: usize,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < needed {
            let piece = page.piece(done..part.span).ok_or(Errno::EIO)?;
            let op = self.op(Direction::Read, file, part.start + done as u64, piece);
            done += moved(op.await)? as usize;
        }
        Ok(())
    }

    /// Writes bytes `range` of `buf` to byte `offset` and on.
    pub async fn write(
        &self,
        file: &ImageFile,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        let piece = buf.piece(range.clone()).ok_or(Errno::EINVAL)?;
        let _flight = self.flights.begin();
        if file.takes(offset, piece) {
            return self.write_whole(file, offset, piece).await;
        }
        self.write_parts(file, offset, Source::Buf(buf, range.start), range.len()).await
    }

    /// Writes metadata.
    pub async fn write_metadata(&self, file: &ImageFile, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.write_parts(file, offset, Source::Bytes(bytes), bytes.len()).await
    }

    /// Writes zeros, for short ranges.
    pub async fn write_zeros(&self, file: &ImageFile, range: Range<u64>) -> Result<(), Errno> {
        let len = range.end.saturating_sub(range.start);
        let len = usize::try_from(len).map_err(|_| Errno::EINVAL)?;
        self.write_parts(file, range.start, Source::Zeros, len).await
    }

    /// Makes a range of a file or block device read as zeros.
    pub async fn zero_range(&self, file: &ImageFile, range: Range<u64>) -> Result<(), Errno> {
        // The kernel zeroes whole blocks only, through the page cache or past it.
        let block = u64::from(file.store().block_size);
        let inner = range.start.next_multiple_of(block)..range.end / block * block;
        if inner.is_empty() {
            return self.write_zeros(file, range).await;
        }
        self.write_zeros(file, range.start..inner.start).await?;
        {
            let _lock = self.lock(file, inner.clone(), false).await;
            match self.fallocate(file, libc::FALLOC_FL_ZERO_RANGE, inner.clone()).await {
                Err(Errno::EOPNOTSUPP) => {}
                result => {
                    result?;
                    return self.write_zeros(file, inner.end..range.end).await;
                }
            }
        }
        // A file system that cannot do it for us.
        self.write_zeros(file, inner.clone()).await?;
        self.write_zeros(file, inner.end..range.end).await
    }

    async fn lock<'a>(&self, file: &'a ImageFile, blocks: Range<u64>, alone: bool) -> Option<BlockLock<'a>> {
        match file.locks(&self.scheduler) {
            Some(locks) => Some(locks.lock(blocks, alone).await),
            None => None,
        }
    }

    async fn write_whole(&self, file: &ImageFile, offset: u64, piece: Piece) -> Result<(), Errno> {
        let _lock = self.lock(file, offset..offset + u64::from(piece.len), false).await;
        self.whole(Direction::Write, file, offset, piece).await
    }

    async fn write_parts(
        &self,
        file: &ImageFile,
        offset: u64,
        source: Source<'_>,
        len: usize,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let whole = whole(file.granule(), at, len - done);
            done += match source.piece(done..done + whole).filter(|&piece| file.takes(at, piece)) {
                Some(piece) => {
                    self.write_whole(file, at, piece).await?;
                    whole
                }
                None => {
                    let part = Part::first(file.granule(), at, len - done);
                    self.write_part(file, &part, source, done).await?;
                    part.len
                }
            };
        }
        Ok(())
    }

    /// Writes one part, from byte `from` of the source on.
    async fn write_part(
        &self,
        file: &ImageFile,
        part: &Part,
        source: Source<'_>,
        from: usize,
    ) -> Result<(), Errno> {
        let _lock = self.lock(file, part.blocks(), part.is_partial()).await;
        let mut page = self.pool.meta().await;
        if part.is_partial() {
            if let Some(tail) = file.tail(part.blocks().end)? {
                source.copy(from, &mut page, part.range())?;
                let piece = page.piece(part.range()).ok_or(Errno::EIO)?;
                return self.write_tail(&tail, part.start + part.skip as u64, piece).await;
            }
            self.read_blocks(file, part, &page, part.span).await?;
        }
        source.copy(from, &mut page, part.range())?;
        let piece = page.piece(0..part.span).ok_or(Errno::EIO)?;
        self.start(Direction::Write, file, part.start, piece).finish().await
    }

    async fn write_tail(&self, tail: &File, mut offset: u64, mut piece: Piece) -> Result<(), Errno> {
        loop {
            let moved = moved(self.reactor.write(tail.as_fd().into(), offset, piece).await)?;
            match piece.rest(moved) {
                None => return Ok(()),
                Some(rest) => piece = rest,
            }
            offset += u64::from(moved);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn parts_cover_every_byte_once_and_lie_in_whole_blocks(
            bits in 9_u32..=12, offset in 0_u64..100_000, len in 1_usize..20_000
        ) {
            let granule = 1 << bits;
            let mut done = 0;
            while done < len {
                let at = offset + done as u64;
                let part = Part::first(granule, at, len - done);
                prop_assert_eq!(part.start + part.skip as u64, at);
                prop_assert!(part.len > 0 && part.range().end <= part.span && part.span <= PAGE_SIZE);
                prop_assert_eq!((part.start | part.span as u64) % u64::from(granule), 0);
                // No block is read for nothing.
                prop_assert!(part.skip < granule as usize && part.span - part.range().end < granule as usize);
                done += part.len;
            }
            prop_assert_eq!(done, len);
        }
    }
}
