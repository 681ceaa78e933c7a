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
    sectors: u64,
}

impl Raw {
    /// A raw image over an open file. An empty one is refused; a tail shorter than a sector is left alone.
    pub fn new(file: ImageFile) -> Result<Raw, OpenError> {
        let sectors = file.len() / SECTOR_SIZE;
        if sectors == 0 {
            return Err(OpenError::empty(file.path()));
        }
        Ok(Raw { file, sectors })
    }

    /// Capacity.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Where sectors below the capacity lie.
    pub fn map(&self, sector: Sector, count: u32) -> Extent {
        Extent::Data { offset: sector.0 * SECTOR_SIZE, count }
    }
}
