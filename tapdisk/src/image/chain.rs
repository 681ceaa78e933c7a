//! A chain of images, the leaf first, that reads and writes as one.
//!
//! A read is resolved iteratively: each layer says of a sector range "the data is here", "zeros", "ask me" or "ask my
//! parent"; only the leaf is ever written.

use std::ops::Range;
use std::rc::Rc;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{CacheStats, ImageSpec, ImageStats, ReadWrite};

use super::file::ImageFile;
use super::hits::Hits;
use super::layer::Layer;
use super::{Extent, bytes};
use crate::buf::Buf;
use crate::io::{Direction, Flying, Io, Transfer};

/// The images of a disk.
#[derive(Debug)]
pub struct Chain {
    /// The image that is written.
    pub leaf: Layer,
    /// The others, the nearest first.
    pub parents: Vec<Layer>,
    /// A chain that serves another purpose too, beneath these.
    below: Option<Rc<Chain>>,
    /// What each image has served, the leaf first. That a transfer failed later makes no difference here.
    hits: Vec<Hits>,
    /// The thread's means.
    pub(super) io: Io,
}

/// Where the first sectors of a range are.
pub(super) enum Place<'a> {
    /// In this file, from a byte offset on.
    File(&'a ImageFile, u64),
    /// Nowhere, as an image says: zeros.
    Zeros,
    /// In no image: zeros.
    Nowhere,
    /// Where this image alone can read them.
    Layer(&'a Layer),
}

impl Chain {
    /// A chain whose images are served by the thread of `io`.
    pub fn new(leaf: Layer, parents: Vec<Layer>, io: Io) -> Chain {
        for file in std::iter::once(&leaf).chain(&parents).flat_map(Layer::files) {
            file.register(&io.reactor);
        }
        let hits = (0..=parents.len()).map(|_| Hits::default()).collect();
        Chain { leaf, parents, below: None, hits, io }
    }

    /// A single image on top of a chain that can go on to be used without it.
    pub fn over(leaf: Layer, below: Rc<Chain>) -> Chain {
        let io = below.io.clone();
        Chain { below: Some(below), ..Chain::new(leaf, Vec::new(), io) }
    }

    /// The image of this depth serves so many sectors.
    fn count(&self, depth: usize, direction: Direction, sectors: u32) {
        match (self.hits.get(depth), &self.below) {
            (Some(hits), _) => hits.add(direction, sectors),
            (None, Some(below)) => below.count(depth - self.hits.len(), direction, sectors),
            (None, None) => {}
        }
    }

    /// What the images have served, the leaf first.
    pub fn stats(&self) -> Vec<ImageStats> {
        let one = |((layer, _), hits): ((&Layer, u64), &Hits)| {
            let path = layer.name().to_string_lossy().into_owned();
            let image = ImageSpec { kind: layer.kind(), path };
            ImageStats { image, hits: hits.get(), fail: ReadWrite::default() }
        };
        let below = self.below.iter().flat_map(|below| below.stats());
        self.own_layers().zip(&self.hits).map(one).chain(below).collect()
    }

    /// The images, the leaf first, with their capacities as far as the chain must mind them: what is asked of the leaf lies on
    /// the disk.
    pub(super) fn layers(&self) -> impl Iterator<Item = (&Layer, u64)> {
        let below = self.below.iter().flat_map(|below| below.own_layers());
        // Its leaf may be shorter than the image on top of it.
        self.own_layers().chain(below.map(|(layer, _)| (layer, layer.sectors())))
    }

    /// The same, without those of the chain below.
    fn own_layers(&self) -> impl Iterator<Item = (&Layer, u64)> {
        let parents = self.parents.iter().map(|layer| (layer, layer.sectors()));
        std::iter::once((&self.leaf, u64::MAX)).chain(parents)
    }

    /// Where `sector` is, and of how many of `count` sectors this is true. With the number of the image that says so.
    pub(super) async fn find(
        &self,
        sector: Sector,
        mut count: u32,
    ) -> Result<(usize, Place<'_>, u32), Errno> {
        for (depth, (layer, sectors)) in self.layers().enumerate() {
            // A parent may be shorter than its child: beyond its end there are zeros.
            let left = sectors.saturating_sub(sector.0);
            if left == 0 {
                break;
            }
            count = u32::try_from(left).map_or(count, |left| left.min(count));
            match layer.map(&self.io, sector, count).await? {
                Extent::Data { offset, count } => {
                    let file = layer.file_of(sector).ok_or(Errno::EIO)?;
                    return Ok((depth, Place::File(file, offset), count));
                }
                Extent::Zero { count } => return Ok((depth, Place::Zeros, count)),
                Extent::Own { count } => return Ok((depth, Place::Layer(layer), count)),
                Extent::Parent { count: part } => count = part,
            }
        }
        Ok((self.layers().count() - 1, Place::Nowhere, count))
    }

    /// Starts to move all of `buf` if that takes a single transfer and nothing must be read or locked first, as is the case
    /// for nearly every request.
    pub fn start(&self, direction: Direction, sector: Sector, buf: &Buf) -> Option<Transfer<'_>> {
        let count = u32::try_from(buf.len() as u64 / SECTOR_SIZE).ok()?;
        let (file, offset) = match direction {
            Direction::Read => self.leaf.place(sector, count)?,
            Direction::Write => {
                let place = self.leaf.overwrite(sector, count)?;
                // Blocks of the store that it covers in part must be read and locked.
                if place.0.granule() > 512 {
                    return None;
                }
                place
            }
        };
        let started = self.io.start_whole(direction, file, offset, buf.piece(0..buf.len())?)?;
        self.count(0, direction, count);
        Some(started)
    }

    /// Fills `range` of `buf`, whole sectors, from `sector` on.
    pub async fn read(&self, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        let all = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        if let Some((file, offset)) = self.leaf.place(sector, all) {
            self.count(0, Direction::Read, all);
            return self.io.read(file, offset, buf, range).await;
        }
        // Most requests are in one place, which spares them the room for several transfers.
        match self.find(sector, all).await? {
            (depth, Place::Zeros | Place::Nowhere, count) if count == all => {
                self.count(depth, Direction::Read, all);
                buf.zero(range);
                Ok(())
            }
            (depth, Place::File(file, offset), count) if count == all => {
                self.count(depth, Direction::Read, all);
                self.read_file(file, offset, buf, range).await
            }
            (_, Place::Layer(Layer::Nbd(nbd)), count) if count == all => {
                nbd.read(&self.io, sector, buf, range).await
            }
            _ => self.read_scattered(sector, buf, range).await,
        }
    }

    /// Reads from one file, or from what a cache has of it.
    async fn read_file(
        &self,
        file: &ImageFile,
        offset: u64,
        buf: &Buf,
        range: Range<usize>,
    ) -> Result<(), Errno> {
        match file.cached() {
            None => self.io.read(file, offset, buf, range).await,
            // Kept out of the future that every request has room for.
            Some(cached) => Box::pin(cached.read(&self.io, file, offset, buf, range)).await,
        }
    }

    /// What the cache for parents has done for this chain, if there is one.
    pub fn cache_stats(&self) -> Option<CacheStats> {
        let mut stats: Option<CacheStats> = None;
        for cached in self.parents.iter().filter_map(|layer| layer.file()?.cached()) {
            let stats = stats.get_or_insert_with(|| CacheStats {
                bytes: cached.cache().bytes(),
                limit: cached.cache().limit(),
                ..CacheStats::default()
            });
            let found = cached.found();
            stats.hits += found.hits / SECTOR_SIZE;
            stats.misses += found.misses / SECTOR_SIZE;
        }
        stats
    }

    async fn read_scattered(&self, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        let mut flying = Flying::default();
        let mut at = range.start;
        while at < range.end {
            let here = Sector(sector.0 + (at - range.start) as u64 / SECTOR_SIZE);
            let count = u32::try_from((range.end - at) as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
            let (depth, place, count) = self.find(here, count).await?;
            let mut end = at + bytes(count);
            match place {
                Place::Zeros | Place::Nowhere => buf.zero(at..end),
                Place::Layer(layer) => end = at + layer.read(&self.io, here, buf, at..end).await?,
                Place::File(file, offset) => {
                    let piece = buf.piece(at..end).ok_or(Errno::EINVAL)?;
                    if file.cached().is_none() && file.takes(offset, piece) {
                        flying.add(self.io.start(Direction::Read, file, offset, piece)).await?;
                    } else {
                        self.read_file(file, offset, buf, at..end).await?;
                    }
                }
            }
            self.count(depth, Direction::Read, u32::try_from((end - at) / bytes(1)).unwrap_or(u32::MAX));
            at = end;
        }
        flying.finish().await
    }

    /// Writes `range` of `buf`, whole sectors, from `sector` on.
    pub async fn write(&self, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        self.count(0, Direction::Write, u32::try_from(range.len() / bytes(1)).unwrap_or(u32::MAX));
        self.leaf.write(&self.io, self, sector, buf, range).await
    }
}
