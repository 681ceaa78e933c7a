//! A disk: a chain of image layers, the leaf first, that reads, writes and flushes as one.
//!
//! A read is resolved iteratively: each layer says of a sector range "the data is here", "zeros" or "ask my parent"; only
//! the leaf is ever written.

mod error;
pub mod file;
mod open;
mod raw;
mod vhd;

use std::cell::Cell;
use std::ops::Range;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;

pub use self::error::OpenError;
use self::file::ImageFile;
pub use self::open::open;
use self::raw::Raw;
use self::vhd::VhdLayer;
use crate::buf::Buf;
use crate::io::{Direction, Io, Transfer};
use crate::sync::Group;

/// Bytes of so many sectors.
const fn bytes(sectors: u32) -> usize {
    sectors as usize * 512
}

/// Transfers that one request has in flight at most.
const MAX_TRANSFERS: usize = 16;

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
enum Layer {
    Raw(Raw),
    Vhd(Box<VhdLayer>),
}

impl Layer {
    fn file(&self) -> &ImageFile {
        match self {
            Layer::Raw(raw) => &raw.file,
            Layer::Vhd(vhd) => &vhd.file,
        }
    }

    fn sectors(&self) -> u64 {
        match self {
            Layer::Raw(raw) => raw.sectors(),
            Layer::Vhd(vhd) => vhd.sectors(),
        }
    }

    async fn map(&self, io: &Io, sector: Sector, count: u32) -> Result<Extent, Errno> {
        match self {
            Layer::Raw(raw) => Ok(raw.map(sector, count)),
            Layer::Vhd(vhd) => vhd.map(io, sector, count).await,
        }
    }
}

/// An open disk. All requests on it come from one thread.
#[derive(Debug)]
pub struct Disk {
    /// Leaf first, never empty.
    leaf: Layer,
    parents: Vec<Layer>,
    io: Io,
    sectors: u64,
    readonly: Cell<bool>,
    flushes: Group,
    /// A flush failed: what the device holds is unknown from then on (the kernel reports such a loss only once).
    lost: Cell<bool>,
}

impl Disk {
    fn new(leaf: Layer, parents: Vec<Layer>, io: Io, readonly: bool) -> Disk {
        let sectors = leaf.sectors();
        let flushes = Group::new(io.scheduler.clone());
        Disk { leaf, parents, io, sectors, readonly: Cell::new(readonly), flushes, lost: Cell::new(false) }
    }

    /// Capacity in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether writes are refused.
    pub fn is_readonly(&self) -> bool {
        self.readonly.get()
    }

    /// Physical block size of the store in bytes.
    pub fn physical_block_size(&self) -> u32 {
        self.leaf.file().block_size()
    }

    /// Gives up writing for good, down to the descriptor. Nothing may be in flight.
    pub fn make_readonly(&self) -> Result<(), OpenError> {
        if !self.readonly.get() {
            self.leaf.file().make_readonly()?;
            self.readonly.set(true);
        }
        Ok(())
    }

    fn layer(&self, index: usize) -> Option<&Layer> {
        match index.checked_sub(1) {
            None => Some(&self.leaf),
            Some(parent) => self.parents.get(parent),
        }
    }

    /// The layer that holds `sector`, the byte offset in its file, and how many of `count` sectors this is true for;
    /// no layer for zeros.
    async fn resolve(&self, sector: Sector, count: u32) -> Result<(Option<(&Layer, u64)>, u32), Errno> {
        let mut count = count;
        let mut depth = 0;
        while let Some(layer) = self.layer(depth) {
            // A parent may be shorter than its child: beyond its end there are zeros.
            let left = layer.sectors().saturating_sub(sector.0);
            if left == 0 {
                break;
            }
            count = u32::try_from(left).map_or(count, |left| left.min(count));
            match layer.map(&self.io, sector, count).await? {
                Extent::Data { offset, count } => return Ok((Some((layer, offset)), count)),
                Extent::Zero { count } => return Ok((None, count)),
                Extent::Parent { count: part } => count = part,
            }
            depth += 1;
        }
        Ok((None, count))
    }

    /// Fills `buf`, whose length is a multiple of 512, from `sector` on.
    pub async fn read(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
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
                Some((layer, offset)) => {
                    let piece = buf.piece(at..end).ok_or(Errno::EINVAL)?;
                    flying.add(self.io.start(Direction::Read, layer.file(), offset, piece)).await?;
                }
            }
            at = end;
        }
        flying.finish().await
    }

    /// Writes `buf`, whose length is a multiple of 512, to `sector` and on.
    pub async fn write(&self, sector: Sector, buf: &Buf) -> Result<(), Errno> {
        if self.readonly.get() {
            return Err(Errno::EROFS);
        }
        if self.lost.get() {
            return Err(Errno::EIO);
        }
        let all: Range<usize> = 0..buf.len();
        match &self.leaf {
            Layer::Vhd(vhd) => vhd.write(&self.io, sector, buf, all).await,
            Layer::Raw(raw) => {
                let offset = sector.0.checked_mul(SECTOR_SIZE).ok_or(Errno::EINVAL)?;
                let piece = buf.piece(all).ok_or(Errno::EINVAL)?;
                self.io.start(Direction::Write, &raw.file, offset, piece).finish().await
            }
        }
    }

    /// Makes every write that has been answered durable. Flushes that are asked for together share one.
    ///
    /// After a failure nothing is promised any more: this and all later flushes and writes fail.
    pub async fn flush(&self) -> Result<(), Errno> {
        if self.readonly.get() {
            return Ok(());
        }
        let file = self.leaf.file();
        self.flushes
            .run(async || {
                if self.lost.get() {
                    return Err(Errno::EIO);
                }
                let result = self.io.fdatasync(file).await;
                if let Err(errno) = result {
                    log::error!(
                        "{}: flushing failed: {errno}; writes may be lost, the disk is stopped",
                        file.path().display()
                    );
                    self.lost.set(true);
                }
                result
            })
            .await
    }

    /// Brings the leaf into its resting state. Nothing may be in flight.
    pub async fn close(&self) -> Result<(), Errno> {
        if self.readonly.get() || self.lost.get() {
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

/// The transfers of one request.
#[derive(Default)]
struct Flying<'a> {
    transfers: [Option<Transfer<'a>>; MAX_TRANSFERS],
    next: usize,
}

impl<'a> Flying<'a> {
    /// Adds one; if all places are taken, waits for the oldest first.
    async fn add(&mut self, transfer: Transfer<'a>) -> Result<(), Errno> {
        let place = &mut self.transfers[self.next % MAX_TRANSFERS];
        self.next += 1;
        if let Some(oldest) = place.replace(transfer) {
            oldest.finish().await?;
        }
        Ok(())
    }

    async fn finish(self) -> Result<(), Errno> {
        for transfer in self.transfers.into_iter().flatten() {
            transfer.finish().await?;
        }
        Ok(())
    }
}
