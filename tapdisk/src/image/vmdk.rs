//! VMDKs: pieces that follow one another on the disk, each in a file of its own.

mod open;

use std::cell::Cell;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use vmdk::Sparse;

use super::chain::Chain;
use super::file::ImageFile;
use super::formatted::Formatted;
use super::{Extent, bytes};
use crate::buf::Buf;
use crate::io::Io;

/// An open VMDK.
#[derive(Debug)]
pub struct Vmdk {
    path: PathBuf,
    /// In the order in which they lie on the disk; none is empty.
    pieces: Vec<Piece>,
    /// The descriptor in a file of its own, if it is going to be changed.
    descriptor: Option<Descriptor>,
}

/// A part of the disk.
#[derive(Debug)]
struct Piece {
    /// Its first sector on the disk.
    first: u64,
    sectors: u64,
    writable: bool,
    storage: Storage,
    /// Something was written. True for ever: a write that is under way during a flush needs the next one too.
    dirty: Cell<bool>,
}

#[derive(Debug)]
enum Storage {
    /// As it is, from this byte of the file on.
    Flat(Box<ImageFile>, u64),
    Sparse(Box<Formatted<Sparse>>),
    /// Nowhere: zeros.
    Zero,
}

/// A descriptor that gets another content identifier before the first write.
#[derive(Debug)]
struct Descriptor {
    /// Holds the lock.
    _file: ImageFile,
    writer: File,
    text: String,
    changed: Cell<bool>,
}

impl Piece {
    fn file(&self) -> Option<&ImageFile> {
        match &self.storage {
            Storage::Flat(file, _) => Some(file),
            Storage::Sparse(sparse) => Some(&sparse.file),
            Storage::Zero => None,
        }
    }
}

impl Vmdk {
    /// What was opened.
    pub fn name(&self) -> &Path {
        &self.path
    }

    /// Capacity.
    pub fn sectors(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.first + piece.sectors)
    }

    /// The files of the pieces.
    pub fn files(&self) -> impl Iterator<Item = &ImageFile> {
        self.pieces.iter().filter_map(Piece::file)
    }

    /// Physical block size of the store in bytes.
    pub fn physical_block_size(&self) -> u32 {
        self.files().map(|file| file.store().physical_block_size).max().unwrap_or(512)
    }

    /// The file of a piece in which grains can be discarded.
    pub fn sparse_file(&self) -> Option<&ImageFile> {
        let sparse = self.pieces.iter().find(|piece| matches!(piece.storage, Storage::Sparse(_)));
        sparse.and_then(Piece::file)
    }

    /// The piece of a sector, the sector in that, and how many of `count` sectors it has.
    fn at(&self, sector: Sector, count: u32) -> Option<(&Piece, Sector, u32)> {
        let number = self.pieces.partition_point(|piece| piece.first <= sector.0).checked_sub(1)?;
        let piece = self.pieces.get(number)?;
        let inner = sector.0 - piece.first;
        let left = piece.sectors.checked_sub(inner).filter(|&left| left > 0)?;
        Some((piece, Sector(inner), u32::try_from(left).map_or(count, |left| left.min(count))))
    }

    /// The file of a sector's piece.
    pub fn file_of(&self, sector: Sector) -> Option<&ImageFile> {
        self.at(sector, 1)?.0.file()
    }

    /// The file that holds `count` sectors as they are, one after another, and the byte offset, if that is known at once.
    pub fn place(&self, sector: Sector, count: u32) -> Option<(&ImageFile, u64)> {
        let (piece, inner, part) = self.at(sector, count)?;
        if part < count {
            return None;
        }
        match &piece.storage {
            Storage::Flat(file, offset) => Some((file, offset + inner.0 * SECTOR_SIZE)),
            Storage::Sparse(sparse) => Some((&sparse.file, sparse.place(inner, count)?)),
            Storage::Zero => None,
        }
    }

    /// The file and byte offset to write `count` sectors to, if that is all there is to do.
    pub fn overwrite(&self, sector: Sector, count: u32) -> Option<(&ImageFile, u64)> {
        let (piece, inner, part) = self.at(sector, count)?;
        if part < count || !piece.writable || self.descriptor.as_ref().is_some_and(|d| !d.changed.get()) {
            return None;
        }
        let place = match &piece.storage {
            Storage::Flat(file, offset) => (file.as_ref(), offset + inner.0 * SECTOR_SIZE),
            Storage::Sparse(sparse) => (&sparse.file, sparse.overwrite(inner, count)?),
            Storage::Zero => return None,
        };
        piece.dirty.set(true);
        Some(place)
    }

    /// Where sectors lie: the longest prefix with one answer.
    pub async fn map(&self, io: &Io, sector: Sector, count: u32) -> Result<Extent, Errno> {
        let (piece, inner, count) = self.at(sector, count).ok_or(Errno::EINVAL)?;
        match &piece.storage {
            Storage::Flat(_, offset) => Ok(Extent::Data { offset: offset + inner.0 * SECTOR_SIZE, count }),
            Storage::Sparse(sparse) => sparse.map(io, inner, count).await,
            Storage::Zero => Ok(Extent::Zero { count }),
        }
    }

    /// Reads the first of the sectors of which [`Vmdk::map`] says that it must be asked for them. Returns how many bytes.
    pub async fn read(
        &self,
        io: &Io,
        sector: Sector,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<usize, Errno> {
        let count = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        let (piece, inner, count) = self.at(sector, count).ok_or(Errno::EINVAL)?;
        match &piece.storage {
            Storage::Sparse(sparse) => {
                sparse.read(io, inner, buf, range.start..range.start + bytes(count)).await
            }
            Storage::Flat(..) | Storage::Zero => Ok(0),
        }
    }

    /// Writes `range` of `buf`, whole sectors, from `sector` on.
    pub async fn write(
        &self,
        io: &Io,
        chain: &Chain,
        mut sector: Sector,
        buf: &Buf,
        mut range: Range<usize>,
    ) -> Result<(), Errno> {
        self.change_descriptor(io).await?;
        while !range.is_empty() {
            let count = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
            let (piece, inner, count) = self.at(sector, count).ok_or(Errno::EINVAL)?;
            if !piece.writable {
                return Err(Errno::EROFS);
            }
            piece.dirty.set(true);
            let part = range.start..range.start + bytes(count);
            match &piece.storage {
                Storage::Flat(file, offset) => {
                    io.write(file, offset + inner.0 * SECTOR_SIZE, buf, part).await?;
                }
                Storage::Sparse(sparse) => sparse.write(io, chain, inner, buf, part).await?,
                Storage::Zero => return Err(Errno::EROFS),
            }
            sector.0 += u64::from(count);
            range.start += bytes(count);
        }
        Ok(())
    }

    /// Before the first write: whoever has made a child of this image can see that it is another one now.
    async fn change_descriptor(&self, io: &Io) -> Result<(), Errno> {
        let Some(descriptor) =
            self.descriptor.as_ref().filter(|descriptor| !descriptor.changed.replace(true))
        else {
            return Ok(());
        };
        let text = descriptor.text.clone();
        let writer = descriptor.writer.try_clone().map_err(|error| crate::io::errno_of(&error))?;
        let written = io
            .reactor
            .blocking(move || {
                writer.write_all_at(text.as_bytes(), 0)?;
                writer.sync_data().map(|()| 0)
            })
            .await;
        if let Err(errno) = written {
            log::error!("{}: cannot be written: {errno}", self.path.display());
            descriptor.changed.set(false);
        }
        written.map(drop)
    }

    /// Discards what can be discarded of `count` sectors: what lies in sparse pieces.
    pub async fn discard(&self, io: &Io, mut sector: Sector, mut count: u64) -> Result<(), Errno> {
        self.change_descriptor(io).await?;
        while count > 0 {
            let wanted = u32::try_from(count).unwrap_or(u32::MAX);
            let (piece, inner, part) = self.at(sector, wanted).ok_or(Errno::EINVAL)?;
            if let Storage::Sparse(sparse) = &piece.storage
                && piece.writable
            {
                piece.dirty.set(true);
                sparse.discard(io, inner, part.into()).await?;
            }
            sector.0 += u64::from(part);
            count -= u64::from(part);
        }
        Ok(())
    }

    /// Makes all that was written durable.
    pub async fn flush(&self, io: &Io) -> Result<(), Errno> {
        for piece in self.pieces.iter().filter(|piece| piece.dirty.get()) {
            if let Some(file) = piece.file() {
                io.fdatasync(file).await?;
            }
        }
        Ok(())
    }

    /// Brings the pieces that were written into their resting state. Nothing may be in flight.
    pub async fn close(&self, io: &Io) -> Result<(), Errno> {
        for piece in &self.pieces {
            if let Storage::Sparse(sparse) = &piece.storage {
                sparse.close(io).await?;
            }
        }
        Ok(())
    }
}
