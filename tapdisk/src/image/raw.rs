//! A raw image: the guest's sectors are the file's, from offset 0.

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;

use super::file::ImageFile;
use super::{Extent, OpenError};

/// An open raw image.
#[derive(Debug)]
pub struct Raw {
    /// Where the data is.
    pub file: ImageFile,
}

impl Raw {
    /// A raw image over an open file. An empty one is refused; a tail shorter than a sector is left alone.
    pub fn new(file: ImageFile) -> Result<Raw, OpenError> {
        if file.len() < SECTOR_SIZE {
            return Err(OpenError::empty(file.path()));
        }
        Ok(Raw { file })
    }

    /// Capacity when it was opened.
    pub fn sectors(&self) -> u64 {
        self.file.len() / SECTOR_SIZE
    }

    /// Where sectors below the capacity lie.
    pub fn map(&self, sector: Sector, count: u32) -> Extent {
        Extent::Data { offset: sector.0 * SECTOR_SIZE, count }
    }
}
