//! A chain of images, the leaf first, that reads and writes as one.
//!
//! A read is resolved iteratively: each layer says of a sector range "the data is here", "zeros", "ask me" or "ask my
//! parent"; only the leaf is ever written.

use std::ops::Range;

use blkif::Sector;
use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{ImageSpec, ImageStats, ReadWrite};

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
    /// What each image has served, the leaf first. That a request failed later does not count here.
    hits: Vec<Hits>,
    /// The thread's means.
    pub(super) io: Io,
}

/// Where the first sectors of a range are.
enum Place<'a> {
    File(&'a ImageFile, u64),
    Zeros,
    Layer(&'a Layer),
}

/// The first sectors of a range.
struct Found<'a> {
    place: Place<'a>,
    /// Of the image that has them; `None`: none has.
    hits: Option<&'a Hits>,
    count: u32,
}

impl Found<'_> {
    /// They are being read.
    fn count(&self, sectors: u32) {
        if let Some(hits) = self.hits {
            hits.add(Direction::Read, sectors);
        }
    }
}

impl Chain {
    /// A chain whose images are served by the thread of `io`.
    pub fn new(leaf: Layer, parents: Vec<Layer>, io: Io) -> Chain {
        for file in std::iter::once(&leaf).chain(&parents).filter_map(Layer::file) {
            file.register(&io.reactor);
        }
        let hits = (0..=parents.len()).map(|_| Hits::default()).collect();
        Chain { leaf, parents, hits, io }
    }

    /// The images, the leaf first, with their capacities as far as the chain must mind them: what is asked of the leaf lies on
    /// the disk.
    fn layers(&self) -> impl Iterator<Item = (&Layer, &Hits, u64)> {
        let parents = self.parents.iter().map(|layer| (layer, layer.sectors()));
        let layers = std::iter::once((&self.leaf, u64::MAX)).chain(parents);
        layers.zip(&self.hits).map(|((layer, sectors), hits)| (layer, hits, sectors))
    }

    fn count(&self, direction: Direction, sectors: u32) {
        if let Some(leaf) = self.hits.first() {
            leaf.add(direction, sectors);
        }
    }

    /// What the images have served, the leaf first.
    pub fn stats(&self) -> Vec<ImageStats> {
        let one = |(layer, hits, _): (&Layer, &Hits, u64)| {
            let path =
                layer.file().map_or_else(String::new, |file| file.path().to_string_lossy().into_owned());
            let image = ImageSpec { kind: layer.kind(), path };
            ImageStats { image, hits: hits.get(), fail: ReadWrite::default() }
        };
        self.layers().map(one).collect()
    }

    /// Where `sector` is, of how many of `count` sectors this is true, and whose numbers they count to.
    async fn resolve(&self, sector: Sector, mut count: u32) -> Result<Found<'_>, Errno> {
        for (layer, hits, sectors) in self.layers() {
            // A parent may be shorter than its child: beyond its end there are zeros.
            let left = sectors.saturating_sub(sector.0);
            if left == 0 {
                break;
            }
            count = u32::try_from(left).map_or(count, |left| left.min(count));
            let (place, count) = match layer.map(&self.io, sector, count).await? {
                Extent::Data { offset, count } => {
                    let file = layer.file().ok_or(Errno::EIO)?;
                    (Place::File(file, offset), count)
                }
                Extent::Zero { count } => (Place::Zeros, count),
                Extent::Own { count } => (Place::Layer(layer), count),
                Extent::Parent { count: part } => {
                    count = part;
                    continue;
                }
            };
            return Ok(Found { place, hits: Some(hits), count });
        }
        Ok(Found { place: Place::Zeros, hits: None, count })
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
        self.count(direction, count);
        Some(started)
    }

    /// Fills `range` of `buf`, whole sectors, from `sector` on.
    pub async fn read(&self, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        let all = u32::try_from(range.len() as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
        if let Some((file, offset)) = self.leaf.place(sector, all) {
            self.count(Direction::Read, all);
            return self.io.read(file, offset, buf, range).await;
        }
        // Most requests are in one place, which spares them the room for several transfers.
        let found = self.resolve(sector, all).await?;
        match found.place {
            Place::Zeros if found.count == all => {
                found.count(all);
                buf.zero(range);
                Ok(())
            }
            Place::File(file, offset) if found.count == all => {
                found.count(all);
                self.io.read(file, offset, buf, range).await
            }
            _ => self.read_scattered(sector, buf, range).await,
        }
    }

    async fn read_scattered(&self, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        let mut flying = Flying::default();
        let mut at = range.start;
        while at < range.end {
            let here = Sector(sector.0 + (at - range.start) as u64 / SECTOR_SIZE);
            let count = u32::try_from((range.end - at) as u64 / SECTOR_SIZE).map_err(|_| Errno::EINVAL)?;
            let found = self.resolve(here, count).await?;
            let mut end = at + bytes(found.count);
            match found.place {
                Place::Zeros => buf.zero(at..end),
                Place::Layer(layer) => end = at + layer.read(&self.io, here, buf, at..end).await?,
                Place::File(file, offset) => {
                    let piece = buf.piece(at..end).ok_or(Errno::EINVAL)?;
                    if file.takes(offset, piece) {
                        flying.add(self.io.start(Direction::Read, file, offset, piece)).await?;
                    } else {
                        self.io.read(file, offset, buf, at..end).await?;
                    }
                }
            }
            found.count(u32::try_from((end - at) / bytes(1)).unwrap_or(u32::MAX));
            at = end;
        }
        flying.finish().await
    }

    /// Writes `range` of `buf`, whole sectors, from `sector` on.
    pub async fn write(&self, sector: Sector, buf: &Buf, range: Range<usize>) -> Result<(), Errno> {
        self.count(Direction::Write, u32::try_from(range.len() as u64 / SECTOR_SIZE).unwrap_or(u32::MAX));
        self.leaf.write(&self.io, self, sector, buf, range).await
    }
}
