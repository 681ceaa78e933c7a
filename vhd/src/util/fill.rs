//! `vhd-util fill`: gives every block of an image a place, and what the chain below has in it.

use std::io::Write;

use super::args::Args;
use super::disk::{Disk, open_chain, read_chain};
use super::progress::Percent;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::transfer::{self, Run, Target};
use crate::{DiskType, OpenOptions, SECTOR_SIZE};

pub(super) const OPTIONS: &str = "n:f:t:bB";
pub(super) const USAGE: &str = "options: <-n name> [-h help] [-b initialise the BAT and bitmaps, don't write to the data \
                                blocks (much faster)] [-f start intialisation from this sector, only usable with -b] \
                                [-t intialise up to this sector (inclusive), only usable with -b] [-B ignore the 2 TB \
                                limit, only usable with -b]";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let (from, to) = (args.number::<u64>('f')?, args.number::<u64>('t')?);
    if !args.has('b') && (from.is_some() || to.is_some() || args.has('B')) {
        writeln!(out, "{} can only be used with -b", if args.has('B') { "-B" } else { "-f/-t" })?;
        return Err(wrong_usage());
    }
    if let Some((from, to)) = from.zip(to).filter(|(from, to)| to < from) {
        writeln!(out, "invalid sector range {from}-{to}")?;
        return Err(wrong_usage());
    }
    let mut disk = Disk::open(path, true).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    disk.lock(true).map_err(|error| in_use(path, &error))?;
    let options = OpenOptions {
        writable: true,
        precise: true,
        allow_encrypted: args.has('b'),
        ..OpenOptions::default()
    };
    let mut vhd = disk.vhd(&options).map_err(|error| Failure::opening(path, error.errno()))?;
    if vhd.kind() == DiskType::Fixed {
        return Err(Failure::new(libc::EINVAL, "a fixed image has no blocks to fill"));
    }
    let mut percent = Percent::at_terminal(out);
    if args.has('b') {
        let in_block = u64::from(vhd.block_sectors());
        let block =
            |sector: u64| u32::try_from(sector.checked_div(in_block).unwrap_or(0)).unwrap_or(u32::MAX);
        let end = to.map_or(u32::MAX, |to| block(to).saturating_add(1)).min(vhd.blocks());
        let blocks = from.map_or(0, block).min(end)..end;
        transfer::allocate(&mut vhd, &mut disk, blocks, &mut |done, of| percent.show(done, of))?;
        percent.end();
        return Ok(());
    }
    let (sectors, in_block) = (vhd.sectors(), u64::from(vhd.block_sectors()));
    let reader = Disk::open(path, false)?;
    let mut layers = open_chain(reader, disk.vhd(&OpenOptions::default())?, &OpenOptions::default())?;
    let mut next = |sector: u64| {
        let count = sectors.saturating_sub(sector).min(in_block);
        let mut data = vec![0; usize::try_from(count.saturating_mul(SECTOR_SIZE)).unwrap_or(0)];
        read_chain(&mut layers, sector, &mut data)?;
        Ok(Run { count: u32::try_from(count).unwrap_or(u32::MAX), data: Some(data) })
    };
    let mut target = Target::Vhd(Box::new(vhd), disk);
    transfer::copy(sectors, &mut next, &mut target, &mut |done, of| percent.show(done, of))?;
    percent.end();
    Ok(())
}
