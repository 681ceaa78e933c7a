//! Copying data into an image in bulk: many writes to one commit.

use format::blocking::{Storage, carry_out};
use format::{Format, Plan, SECTOR_SIZE, Sector, Step};

use crate::{BlockIndex, Error, Vhd};

/// Bytes written before they are committed. What is lost by a stop is copied again, so it matters for speed only.
const COMMIT_AFTER: u64 = 64 << 20;

/// Sectors of a source, from where it was asked on.
#[derive(Debug)]
pub struct Run {
    /// How many.
    pub count: u32,
    /// What they hold, `None` if the source does not have them.
    pub data: Option<Vec<u8>>,
}

/// Tells the run that begins at a sector.
pub type Runs<'a> = dyn FnMut(Sector) -> Result<Run, Error> + 'a;

/// Told how many of how many sectors are done.
pub type Progress<'a> = dyn FnMut(u64, u64) + 'a;

/// Where the copied data go.
#[derive(Debug)]
pub enum Target<S> {
    /// Into an image that was opened from the storage for writing.
    Vhd(Box<Vhd>, S),
    /// Into a raw disk.
    Raw(S),
}

/// Copies all runs of a source of `sectors` sectors that have data, in the order of the disk, and makes them durable; returns
/// the number of sectors copied. Cut short, it can be begun again.
///
/// # Errors
/// Those of the source and the target.
pub fn copy<S: Storage>(
    sectors: u64,
    runs: &mut Runs<'_>,
    target: &mut Target<S>,
    progress: &mut Progress<'_>,
) -> Result<u64, Error> {
    let (mut sector, mut copied, mut pending) = (0_u64, 0_u64, 0_u64);
    while sector < sectors {
        let run = runs(sector)?;
        if run.count == 0 {
            return Err(Error::OutOfRange { sector, count: 1, sectors });
        }
        if let Some(data) = run.data {
            pending = pending.saturating_add(data.len() as u64);
            copied = copied.saturating_add(run.count.into());
            target.put(sector, data)?;
        }
        if pending >= COMMIT_AFTER {
            target.commit()?;
            pending = 0;
        }
        sector = sector.saturating_add(run.count.into()).min(sectors);
        progress(sector, sectors);
    }
    target.commit()?;
    target.close()?;
    Ok(copied)
}

impl<S: Storage> Target<S> {
    /// Writes some sectors, not yet part of the image.
    fn put(&mut self, sector: Sector, data: Vec<u8>) -> Result<(), Error> {
        match self {
            Self::Raw(storage) => {
                storage.write_at(sector.saturating_mul(SECTOR_SIZE), &data).map_err(unwritten)
            }
            Self::Vhd(vhd, storage) => put(vhd, storage, sector, data),
        }
    }

    fn commit(&mut self) -> Result<(), Error> {
        match self {
            Self::Raw(storage) => storage.sync().map_err(unwritten),
            Self::Vhd(vhd, storage) => commit(vhd, storage),
        }
    }

    fn close(&mut self) -> Result<(), Error> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Vhd(vhd, storage) => carry_out(storage, &vhd.close_steps()).map_err(unwritten),
        }
    }
}

fn put<S: Storage>(
    vhd: &mut Vhd,
    storage: &mut S,
    mut sector: Sector,
    mut data: Vec<u8>,
) -> Result<(), Error> {
    if let Some(cipher) = vhd.cipher() {
        cipher.encrypt(sector, &mut data);
    }
    let mut left = &data[..];
    while !left.is_empty() {
        let wanted = u32::try_from(left.len() as u64 / SECTOR_SIZE).unwrap_or(u32::MAX);
        let (offset, count, publish) = place(vhd, storage, sector, wanted)?;
        let len = usize::try_from(u64::from(count).saturating_mul(SECTOR_SIZE)).unwrap_or(usize::MAX);
        let (part, rest) = left.split_at_checked(len).unwrap_or((left, &[]));
        let done = storage.write_at(offset, part);
        if publish {
            vhd.written(sector, count, done.is_ok());
        }
        done.map_err(unwritten)?;
        sector = sector.saturating_add(count.into());
        left = rest;
    }
    Ok(())
}

/// Where to write the first of some sectors, how many they are, and whether the image is to be told.
fn place<S: Storage>(
    vhd: &mut Vhd,
    storage: &mut S,
    sector: Sector,
    count: u32,
) -> Result<(u64, u32, bool), Error> {
    loop {
        match vhd.plan_write(sector, count)? {
            Plan::Write(write) => {
                if let Some(prepare) = &write.prepare {
                    let done = carry_out(storage, &prepare.steps);
                    vhd.prepared(prepare.key, done.is_ok());
                    done.map_err(unwritten)?;
                }
                return Ok((write.offset, write.count, write.publish));
            }
            Plan::Load(load) => {
                let mut bits = vec![0; usize::try_from(load.len).unwrap_or(0)];
                let offset = load.offset;
                let source = storage.read_at(offset, &mut bits);
                source.map_err(|source| Error::Io { what: "bitmap", offset, source })?;
                vhd.loaded(&load, &bits)?;
            }
            Plan::Wait => commit(vhd, storage)?,
        }
    }
}

fn commit<S: Storage>(vhd: &mut Vhd, storage: &mut S) -> Result<(), Error> {
    let Some(mut steps) = vhd.begin_commit() else { return Ok(()) };
    steps.push(Step::Flush);
    let done = carry_out(storage, &steps);
    vhd.commit_ended(done.is_ok());
    done.map_err(unwritten)
}

/// Gives a place to each of some blocks that has none, with all sectors marked as written, and writes no data: they are
/// zeros, whatever the parent has there. Blocks that have a place stay as they are.
///
/// # Errors
/// No space, and those of the storage.
pub fn allocate<S: Storage>(
    vhd: &mut Vhd,
    storage: &mut S,
    blocks: std::ops::Range<BlockIndex>,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let (first, total) = (blocks.start, u64::from(blocks.end.saturating_sub(blocks.start)));
    for block in blocks {
        if vhd.block_entry(block).is_none() {
            let in_block = vhd.block_sectors();
            let sector = u64::from(block).saturating_mul(in_block.into());
            let count = vhd.sectors().saturating_sub(sector).min(in_block.into());
            let count = u32::try_from(count).unwrap_or(in_block);
            let (_, count, publish) = place(vhd, storage, sector, count)?;
            if publish {
                vhd.written(sector, count, true);
            }
        }
        let done = u64::from(block.saturating_sub(first)).saturating_add(1);
        if done.is_multiple_of(1024) {
            commit(vhd, storage)?;
        }
        progress(done, total);
    }
    commit(vhd, storage)?;
    carry_out(storage, &vhd.close_steps()).map_err(unwritten)
}

fn unwritten(source: std::io::Error) -> Error {
    Error::Unwritten { what: "image", source }
}
