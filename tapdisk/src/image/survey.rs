//! What tools ask of a disk that a guest does not: what its images are and which of its sectors hold data at all.

use std::path::Path;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::Disk;
use super::chain::Place;
use super::file::ImageFile;
use super::layer::Layer;

/// What a run of sectors holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Data, whatever they are.
    Data {
        /// Byte offset in the image's file, unless they are compressed, encrypted or in no file.
        offset: Option<u64>,
    },
    /// Zeros: an image says so, or its file has a hole there.
    Zeros,
    /// Zeros, because no image has them.
    Nothing,
}

/// A run of sectors that is alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The image that has them: 0 is the leaf, 1 its parent. The last one for [`Holds::Nothing`].
    pub depth: usize,
    /// What they are.
    pub holds: Holds,
    /// How many.
    pub count: u32,
}

impl Disk {
    /// What the first of `count` sectors from `sector` are, and how many are alike. It blocks on the file system for a moment.
    ///
    /// # Errors
    /// Reading metadata, or what they say.
    pub async fn survey(&self, sector: Sector, count: u32) -> Result<Run, Errno> {
        let (depth, place, count) = self.chain.find(sector, count).await?;
        let (holds, count) = match place {
            Place::Nowhere => (Holds::Nothing, count),
            Place::Zeros => (Holds::Zeros, count),
            Place::Layer(Layer::Nbd(nbd)) => match nbd.allocation(&self.io, sector, count).await? {
                (true, count) => (Holds::Zeros, count),
                (false, count) => (Holds::Data { offset: None }, count),
            },
            Place::Layer(_) => (Holds::Data { offset: None }, count),
            Place::File(file, offset) => match hole(file, offset, u64::from(count) * SECTOR_SIZE)? {
                (true, bytes) => (Holds::Zeros, sectors(bytes, count)),
                (false, bytes) => (Holds::Data { offset: Some(offset) }, sectors(bytes, count)),
            },
        };
        Ok(Run { depth, holds, count })
    }

    /// The files of the images, the leaf first; `None` for one that has no file.
    pub fn files(&self) -> Vec<Option<&Path>> {
        self.chain.layers().map(|(layer, _)| layer.files().first().map(|file| file.path())).collect()
    }

    /// From now on (or, if not `defer`, no more) nothing is made durable, not even where the format needs it to survive a
    /// stop: for filling a new image, which is worth nothing before it is complete. [`Disk::close`] after the end of it makes all
    /// durable.
    pub fn defer_flushes(&self, defer: bool) {
        for file in self.chain.leaf.files() {
            file.defer_flushes(defer);
        }
    }
}

/// Sectors of so many bytes; a part of one counts, so that there is an end.
fn sectors(bytes: u64, most: u32) -> u32 {
    u32::try_from(bytes.div_ceil(SECTOR_SIZE)).map_or(most, |sectors| sectors.min(most))
}

/// Whether a file has a hole at `offset`, and how many of `len` bytes are alike.
fn hole(file: &ImageFile, offset: u64, len: u64) -> Result<(bool, u64), Errno> {
    if !file.is_regular() {
        return Ok((false, len));
    }
    let seek = |whence| {
        let from = i64::try_from(offset).map_err(|_| Errno::EOVERFLOW)?;
        match file.with(|fd| lseek(fd, from, whence)) {
            Ok(found) => Ok(Some(u64::try_from(found).unwrap_or(0).saturating_sub(offset))),
            // There is none up to the end of the file.
            Err(Errno::ENXIO) => Ok(None),
            // The file system does not tell.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(0)),
            Err(errno) => Err(errno),
        }
    };
    match seek(Whence::SeekData)? {
        None => Ok((true, len)),
        // A hole that ends within a sector is not one for that sector.
        Some(data) if data >= SECTOR_SIZE => Ok((true, data.min(len) / SECTOR_SIZE * SECTOR_SIZE)),
        Some(_) => {
            let data = seek(Whence::SeekHole)?.filter(|&bytes| bytes > 0);
            Ok((false, data.map_or(len, |bytes| bytes.min(len))))
        }
    }
}
