//! One image of a chain, whatever its format.

use std::ops::Range;
use std::path::Path;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use qcow::v1::Qcow;
use qcow::v2::Qcow2;
use tap_ctl::proto::ImageType;
use vhd::Vhd;

use super::Extent;
use super::chain::Chain;
use super::file::ImageFile;
use super::formatted::Formatted;
use super::nbd::Nbd;
use super::null::Null;
use super::raw::Raw;
use super::vmdk::Vmdk;
use crate::buf::Buf;
use crate::io::Io;

/// An open image.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a disk has a few, which never move; the way to the file is the hot one"
)]
pub enum Layer {
    /// Sectors as they are.
    Raw(Raw),
    /// VHD.
    Vhd(Box<Formatted<Vhd>>),
    /// qcow, version 1.
    Qcow(Box<Formatted<Qcow>>),
    /// qcow2.
    Qcow2(Box<Formatted<Qcow2>>),
    /// VMDK, in one or several files.
    Vmdk(Box<Vmdk>),
    /// What an NBD server has.
    Nbd(Box<Nbd>),
    /// No image.
    Null(Null),
}

impl Layer {
    /// The format. How the bytes of a raw image get to its store makes no difference here.
    pub fn kind(&self) -> ImageType {
        match self {
            Layer::Raw(_) => ImageType::Aio,
            Layer::Vhd(_) => ImageType::Vhd,
            Layer::Qcow(_) => ImageType::Qcow,
            Layer::Qcow2(_) => ImageType::Qcow2,
            Layer::Vmdk(_) => ImageType::Vmdk,
            Layer::Nbd(_) => ImageType::Nbd,
            Layer::Null(_) => ImageType::Null,
        }
    }

    /// The file of an image that has just one.
    pub fn file(&self) -> Option<&ImageFile> {
        match self {
            Layer::Raw(raw) => Some(&raw.file),
            Layer::Vhd(vhd) => Some(&vhd.file),
            Layer::Qcow(qcow) => Some(&qcow.file),
            Layer::Qcow2(qcow) => Some(&qcow.file),
            Layer::Vmdk(_) | Layer::Nbd(_) | Layer::Null(_) => None,
        }
    }

    /// All files of an image.
    pub fn files(&self) -> Vec<&ImageFile> {
        match self {
            Layer::Vmdk(vmdk) => vmdk.files().collect(),
            _ => self.file().into_iter().collect(),
        }
    }

    /// The file that [`Extent::Data`] of this sector speaks of.
    pub fn file_of(&self, sector: Sector) -> Option<&ImageFile> {
        match self {
            Layer::Vmdk(vmdk) => vmdk.file_of(sector),
            _ => self.file(),
        }
    }

    /// The image, for messages.
    pub fn name(&self) -> &Path {
        match (self, self.file()) {
            (Layer::Nbd(nbd), _) => nbd.name(),
            (Layer::Vmdk(vmdk), _) => vmdk.name(),
            (_, Some(file)) => file.path(),
            (_, None) => Path::new("null"),
        }
    }

    /// Physical block size of the store in bytes.
    pub fn physical_block_size(&self) -> u32 {
        match (self, self.file()) {
            (Layer::Nbd(nbd), _) => nbd.block_size(),
            (Layer::Vmdk(vmdk), _) => vmdk.physical_block_size(),
            (_, Some(file)) => file.store().physical_block_size,
            (_, None) => 512,
        }
    }

    /// Capacity in sectors by the image itself. A null image has none.
    pub fn sectors(&self) -> u64 {
        match self {
            Layer::Raw(raw) => raw.sectors(),
            Layer::Vhd(vhd) => vhd.sectors(),
            Layer::Qcow(qcow) => qcow.sectors(),
            Layer::Qcow2(qcow) => qcow.sectors(),
            Layer::Vmdk(vmdk) => vmdk.sectors(),
            Layer::Nbd(nbd) => nbd.sectors(),
            Layer::Null(_) => 0,
        }
    }

    /// The file that holds `count` sectors as they are, one after another, and the byte offset, if that is known at once.
    pub fn place(&self, sector: Sector, count: u32) -> Option<(&ImageFile, u64)> {
        match self {
            Layer::Raw(raw) => Some((&raw.file, sector.0.checked_mul(SECTOR_SIZE)?)),
            Layer::Vhd(vhd) => Some((&vhd.file, vhd.place(sector, count)?)),
            Layer::Qcow(qcow) => Some((&qcow.file, qcow.place(sector, count)?)),
            Layer::Qcow2(qcow) => Some((&qcow.file, qcow.place(sector, count)?)),
            Layer::Vmdk(vmdk) => vmdk.place(sector, count),
            Layer::Nbd(_) | Layer::Null(_) => None,
        }
    }

    /// The file and byte offset to write `count` sectors to, if that is all there is to do.
    pub fn overwrite(&self, sector: Sector, count: u32) -> Option<(&ImageFile, u64)> {
        match self {
            Layer::Raw(raw) => Some((&raw.file, sector.0.checked_mul(SECTOR_SIZE)?)),
            Layer::Vhd(vhd) => Some((&vhd.file, vhd.overwrite(sector, count)?)),
            Layer::Qcow(qcow) => Some((&qcow.file, qcow.overwrite(sector, count)?)),
            Layer::Qcow2(qcow) => Some((&qcow.file, qcow.overwrite(sector, count)?)),
            Layer::Vmdk(vmdk) => vmdk.overwrite(sector, count),
            Layer::Nbd(_) | Layer::Null(_) => None,
        }
    }

    /// Where sectors lie: the longest prefix with one answer.
    pub async fn map(&self, io: &Io, sector: Sector, count: u32) -> Result<Extent, Errno> {
        match self {
            Layer::Raw(raw) => Ok(raw.map(sector, count)),
            Layer::Vhd(vhd) => vhd.map(io, sector, count).await,
            Layer::Qcow(qcow) => qcow.map(io, sector, count).await,
            Layer::Qcow2(qcow) => qcow.map(io, sector, count).await,
            Layer::Vmdk(vmdk) => vmdk.map(io, sector, count).await,
            Layer::Nbd(_) => Ok(Extent::Own { count }),
            Layer::Null(null) => Ok(null.map(count)),
        }
    }

    /// Whether nothing shows in this image but its parent. Blocks; for images that have one.
    pub fn shows_parent_only(&self) -> Result<bool, Errno> {
        match self {
            Layer::Vhd(vhd) => vhd.shows_parent_only(),
            Layer::Qcow(qcow) => qcow.shows_parent_only(),
            Layer::Qcow2(qcow) => qcow.shows_parent_only(),
            Layer::Raw(_) | Layer::Vmdk(_) | Layer::Nbd(_) | Layer::Null(_) => Ok(false),
        }
    }

    /// Reads the first of the sectors for which [`Layer::map`] says [`Extent::Own`] into the beginning of `range` of `buf`.
    /// Returns how many bytes; 0: ask [`Layer::map`] again.
    pub async fn read(
        &self,
        io: &Io,
        sector: Sector,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<usize, Errno> {
        match self {
            Layer::Vhd(vhd) => vhd.read(io, sector, buf, range).await,
            Layer::Qcow(qcow) => qcow.read(io, sector, buf, range).await,
            Layer::Qcow2(qcow) => qcow.read(io, sector, buf, range).await,
            Layer::Vmdk(vmdk) => vmdk.read(io, sector, buf, range).await,
            Layer::Nbd(nbd) => {
                let len = range.len();
                nbd.read(io, sector, buf, range).await.map(|()| len)
            }
            Layer::Raw(_) | Layer::Null(_) => Ok(0),
        }
    }

    /// Writes `range` of `buf`, whole sectors, from `sector` on. `chain` is the one that this is the leaf of.
    pub async fn write(
        &self,
        io: &Io,
        chain: &Chain,
        sector: Sector,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        match self {
            Layer::Raw(raw) => {
                let offset = sector.0.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?;
                io.write(&raw.file, offset, buf, range).await
            }
            Layer::Vhd(vhd) => vhd.write(io, chain, sector, buf, range).await,
            Layer::Qcow(qcow) => qcow.write(io, chain, sector, buf, range).await,
            Layer::Qcow2(qcow) => qcow.write(io, chain, sector, buf, range).await,
            Layer::Vmdk(vmdk) => vmdk.write(io, chain, sector, buf, range).await,
            Layer::Nbd(nbd) => nbd.write(io, sector, buf, range).await,
            Layer::Null(_) => Ok(()),
        }
    }

    /// Makes all that was written durable.
    pub async fn flush(&self, io: &Io) -> Result<(), Errno> {
        match (self, self.file()) {
            (Layer::Nbd(nbd), _) => nbd.flush(io).await,
            (Layer::Vmdk(vmdk), _) => vmdk.flush(io).await,
            (_, Some(file)) => io.fdatasync(file).await,
            (_, None) => Ok(()),
        }
    }

    /// Brings an image that was written into its resting state; [`Layer::flush`] makes that durable. Nothing may be in flight.
    pub async fn close(&self, io: &Io) -> Result<(), Errno> {
        match self {
            Layer::Vhd(vhd) => vhd.close(io).await,
            Layer::Qcow(qcow) => qcow.close(io).await,
            Layer::Qcow2(qcow) => qcow.close(io).await,
            Layer::Vmdk(vmdk) => vmdk.close(io).await,
            Layer::Raw(_) | Layer::Nbd(_) | Layer::Null(_) => Ok(()),
        }
    }
}
