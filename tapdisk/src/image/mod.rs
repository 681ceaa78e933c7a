//! A disk: a chain of image layers, the leaf first, that reads, writes and flushes as one.
//!
//! A read is resolved iteratively: each layer says of a sector range "the data is here", "zeros" or "ask my parent"; only
//! the leaf is ever written.

mod discard;
mod error;
pub mod file;
pub mod locks;
mod null;
mod open;
mod ram;
mod raw;
mod resize;
mod share;
pub mod store;
mod vhd;

use std::cell::Cell;
use std::sync::Arc;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;

pub use self::error::OpenError;
use self::file::ImageFile;
use self::null::Null;
pub use self::open::open;
use self::raw::Raw;
use self::share::Common;
pub use self::share::DiskShare;
use self::vhd::VhdLayer;
use crate::buf::Buf;
use crate::io::{Direction, Flying, Io, Transfer};
use crate::sync::Group;

/// Bytes of so many sectors.
const fn bytes(sectors: u32) -> usize {
    sectors as usize * 512
}

/// Where sectors of a layer are; counts in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// At this byte offset of the layer's file.
    Data {
        /// Bytes from the start of the file.
        offset: u64,
        /// Sectors.
        count: u32,
    },
    /// Nowhere: they read as zeros.
    Zero {
        /// Sectors.
        count: u32,
    },
    /// Not in this layer.
    Parent {
        /// Sectors.
        count: u32,
    },
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "a disk has a few, which never move; the way to the file is the hot one"
)]
enum Layer {
    Raw(Raw),
    Vhd(Box<VhdLayer>),
    Null(Null),
}

impl Layer {
    fn file(&self) -> Option<&ImageFile> {
        match self {
            Layer::Raw(raw) => Some(&raw.file),
            Layer::Vhd(vhd) => Some(&vhd.file),
            Layer::Null(_) => None,
        }
    }

    async fn map(&self, io: &Io, sector: Sector, count: u32) -> Result<Extent, Errno> {
        match self {
            Layer::Raw(raw) => Ok(raw.map(sector, count)),
            Layer::Vhd(vhd) => vhd.map(io, sector, count).await,
            Layer::Null(null) => Ok(null.map(count)),
        }
    }
}

/// An open disk, or one of several handles of it. All requests on a handle come from one thread.
#[derive(Debug)]
pub struct Disk {
    leaf: Layer,
    /// The nearest first.
    parents: Vec<Layer>,
    io: Io,
    readonly: Cell<bool>,
    flushes: Group,
    resizing: Cell<bool>,
    common: Arc<Common>,
}

impl Disk {
    fn new(leaf: Layer, parents: Vec<Layer>, io: Io, readonly: bool, sectors: u64) -> Disk {
        Disk::with(leaf, parents, io, readonly, Common::new(sectors))
    }

    fn with(leaf: Layer, parents: Vec<Layer>, io: Io, readonly: bool, common: Arc<Common>) -> Disk {
        for file in std::iter::once(&leaf).chain(&parents).filter_map(Layer::file) {
            file.register(&io.reactor);
        }
        let flushes = Group::new(io.scheduler.clone());
        let (readonly, resizing) = (Cell::new(readonly), Cell::new(false));
        Disk { leaf, parents, io, readonly, flushes, resizing, common }
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.common.sectors()
    }

    /// Whether writes are refused.
    pub fn is_readonly(&self) -> bool {
        self.readonly.get()
    }

    /// Physical block size of the store in bytes.
    pub fn physical_block_size(&self) -> u32 {
        self.leaf.file().map_or(512, |file| file.store().physical_block_size)
    }

    /// Why the disk was stopped, once a flush has failed: what the device holds is unknown from then on (the kernel reports
    /// such a loss only once).
    pub fn failure(&self) -> Option<String> {
        self.common.failure().map(str::to_owned)
    }

    /// Gives up writing for good, down to the descriptor. Nothing may be in flight.
    pub fn make_readonly(&self) -> Result<(), OpenError> {
        if !self.readonly.get() {
            if let Some(file) = self.leaf.file() {
                file.make_readonly()?;
            }
            self.readonly.set(true);
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<(), Errno> {
        if self.readonly.get() {
            return Err(Errno::EROFS);
        }
        match self.common.failure() {
            Some(_) => Err(Errno::EIO),
            None => Ok(()),
        }
    }

    /// The image, for messages.
    pub fn name(&self) -> std::path::Display<'_> {
        self.leaf.file().map_or(std::path::Path::new("null"), ImageFile::path).display()
    }

    fn layer(&self, index: usize) -> Option<(&Layer, u64)> {
        match index.checked_sub(1) {
            None => Some((&self.leaf, self.sectors())),
            Some(parent) => {
                let layer = self.parents.get(parent)?;
                let sectors = match layer {
                    Layer::Raw(raw) => raw.sectors(),
                    Layer::Vhd(vhd) => vhd.sectors(),
                    Layer::Null(_) => 0,
                };
                Some((layer, sectors))
            }
        }
    }

    /// The file that holds `sector`, the byte offset in it, and how many of `count` sectors this is true for; no file for
    /// zeros.
    async fn resolve(&self, sector: Sector, count: u32) -> Result<(Option<(&ImageFile, u64)>, u32), Errno> {
        let mut count = count;
        let mut depth = 0;
        while let Some((layer, sectors)) = self.layer(depth) {
            // A parent may be shorter than its child: beyond its end there are zeros.
            let left = sectors.saturating_sub(sector.0);
            if left == 0 {
                break;
            }
            count = u32::try_from(left).map_or(count, |left| left.min(count));
            match layer.map(&self.io, sector, count).await? {
                Extent::Data { offset, count } => {
                    return Ok((layer.file().map(|file| (file, offset)), count));
                }
                Extent::Zero { count } => return Ok((None, count)),
                Extent::Parent { count: part } => count = part,
            }
            depth += 1;
        }
        Ok((None, count))
    }

    /// Starts to move all of `buf` if that takes a single transfer and nothing must be read or locked first, as is the case
    /// for nearly every request; `None`: go the long way, by [`Disk::read`] or [`Disk::write`].
    pub fn start(&self, direction: Direction, sector: Sector, buf: &Buf) -> Option<Transfer<'_>> {
        let (file, offset) = match &self.leaf {
            Layer::Raw(raw) => (&raw.file, sector.0.checked_mul(SECTOR_SIZE)?),
            Layer::Vhd(vhd) if direction == Direction::Read => {
                let count = u32::try_from(buf.len() as u64 / SECTOR_SIZE).ok()?;
                (&vhd.file, vhd.place(sector, count)?)
            }
            Layer::Vhd(_) | Layer::Null(_) => return None,
        };
        if direction == Direction::Write && (self.check_writable().is_err() || file.granule() > 512) {
            return None;
        }
        self.io.start_whole(direction, file, offset, buf.piece(0..buf.len())?)
    }

    /// Fills `buf`, whose length is a multiple of 512, from `sector` on.
    pub async fn read(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        match &self.leaf {
            Layer::Raw(raw) => {
                let offset = sector.0.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?;
                self.io.read(&raw.file, offset, buf, 0..buf.len()).await
            }
            Layer::Vhd(vhd) => {
                let count = u32::try_from(buf.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
                match vhd.place(sector, count) {
                    Some(offset) => self.io.read(&vhd.file, offset, buf, 0..buf.len()).await,
                    None => self.read_layers(sector, buf).await,
                }
            }
            Layer::Null(_) => {
                buf.zero(0..buf.len());
                Ok(())
            }
        }
    }

    /// Reads what may be in any layer. Most requests are in one place, which spares them the room for several transfers.
    async fn read_layers(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        let all = u32::try_from(buf.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        match self.resolve(sector, all).await? {
            (None, count) if count == all => {
                buf.zero(0..buf.len());
                Ok(())
            }
            (Some((file, offset)), count) if count == all => {
                self.io.read(file, offset, buf, 0..buf.len()).await
            }
            _ => self.read_scattered(sector, buf).await,
        }
    }

    async fn read_scattered(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        let mut flying = Flying::default();
        let mut at = 0;
        let total = buf.len();
        while at < total {
            let here = Sector(sector.0 + at as u64 / SECTOR_SIZE);
            let count = u32::try_from((total - at) as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
            let (place, count) = self.resolve(here, count).await?;
            let end = at + bytes(count);
            match place {
                None => buf.zero(at..end),
                Some((file, offset)) => {
                    let piece = buf.piece(at..end).ok_or(Errno::EINVAL)?;
                    if file.takes(offset, piece) {
                        flying.add(self.io.start(Direction::Read, file, offset, piece)).await?;
                    } else {
                        self.io.read(file, offset, buf, at..end).await?;
                    }
                }
            }
            at = end;
        }
        flying.finish().await
    }

    /// Writes `buf`, whose length is a multiple of 512, to `sector` and on.
    pub async fn write(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        self.check_writable()?;
        match &self.leaf {
            Layer::Raw(raw) => {
                let offset = sector.0.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?;
                self.io.write(&raw.file, offset, buf, 0..buf.len()).await
            }
            Layer::Vhd(vhd) => vhd.write(&self.io, sector, buf, 0..buf.len()).await,
            Layer::Null(_) => Ok(()),
        }
    }

    /// Makes every write that has been answered durable, whichever handle answered it. Flushes that are asked for together
    /// share one.
    ///
    /// After a failure nothing is promised any more: this and all later flushes and writes fail.
    pub async fn flush(&self) -> Result<(), Errno> {
        let Some(file) = self.leaf.file().filter(|_| !self.readonly.get()) else { return Ok(()) };
        self.flushes
            .run(async || {
                self.check_writable()?;
                let result = self.io.fdatasync(file).await;
                if let Err(errno) = result {
                    let name = file.path().display();
                    let why =
                        format!("{name}: flushing failed: {errno}; writes may be lost, the disk is stopped");
                    log::error!("{why}");
                    self.common.fail(why);
                }
                // Another handle's flush may have been told of the loss instead of this one.
                result.and(self.check_writable())
            })
            .await
    }

    /// Brings the leaf into its resting state. Nothing may be in flight. Of several handles the last one is closed.
    pub async fn close(&self) -> Result<(), Errno> {
        if self.check_writable().is_err() {
            return Ok(());
        }
        if let Layer::Vhd(vhd) = &self.leaf {
            vhd.close(&self.io).await?;
        }
        self.flush().await
    }
}

#[cfg(test)]
mod tests;
