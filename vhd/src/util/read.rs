//! `vhd-util read`: metadata and data as they are.

use std::io::Write;

use format::blocking::Storage;

use super::args::Args;
use super::disk::{Disk, open_chain, read_chain};
use super::query::LOOK;
use super::{Failure, errno_of, wrong_usage};
use crate::locator::{self, Platform};
use crate::{DiskType, OpenOptions, SECTOR_SIZE, Vhd, bitmap, print};

pub(super) const OPTIONS: &str = "n:pt:b:Bm:c:r:";
pub(super) const USAGE: &str = "options: <-n name> [-p print headers] [-t logical sector] [-b block number] [-B print \
                                block allocation as a bitmap] [-m bitmap of block] [-r sector to read through the \
                                chain] [-c count] [-h help]";

/// Sectors that are read and written out at once.
const CHUNK: u64 = 2048;

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let count = args.number::<u64>('c')?;
    let failure = |errno: i32| Failure::new(errno, format!("Failed to open {}: -{errno}", path.display()));
    let disk = Disk::open(path, false).map_err(|error| failure(errno_of(&error)))?;
    let vhd = disk.vhd(&LOOK).map_err(|error| failure(error.errno()))?;
    if vhd.kind() == DiskType::Fixed && !args.has('r') {
        let text = format!("Failed to get bat for {}: -{}", path.display(), libc::EINVAL);
        return Err(Failure::new(libc::EINVAL, text));
    }
    if args.has('p') {
        headers(&disk, &vhd, out)?;
    }
    if let Some(sector) = args.number('t')? {
        place_of_sector(&vhd, sector, out)?;
    }
    if let Some(block) = args.number('b')? {
        place_of_block(&vhd, block, count, out)?;
    }
    if let Some(block) = args.number('m')? {
        bitmap_of_block(&disk, &vhd, block, out)?;
    }
    if args.has('B') {
        allocation(&vhd, out)?;
    }
    match args.number('r')? {
        Some(sector) => data(disk, sector, count.unwrap_or(1), out),
        None => Ok(()),
    }
}

/// All headers as text.
pub(super) fn headers(disk: &Disk, vhd: &Vhd, out: &mut dyn Write) -> Result<(), Failure> {
    out.write_all(print::footer(vhd.footer()).as_bytes())?;
    let Some(header) = vhd.header() else { return Ok(()) };
    out.write_all(print::header(header).as_bytes())?;
    if vhd.kind() == DiskType::Differencing {
        let used = header.locators.iter().enumerate().filter(|(_, raw)| raw.code.get() != 0);
        let list = print::locators(used.map(|(slot, raw)| {
            let name = locator::extent(raw).and_then(|(offset, _)| {
                let mut bytes = vec![0; usize::try_from(raw.length.get()).ok()?];
                disk.read_at(offset, &mut bytes).ok()?;
                locator::decode(Platform::from_code(raw.code.get())?, &bytes)
            });
            (slot, raw, name)
        }));
        out.write_all(list.as_bytes())?;
    }
    if let Some((batmap, map)) = vhd.batmap() {
        let expected = batmap.expected_checksum(map, vhd.footer().current_size.get());
        out.write_all(print::batmap(batmap, expected).as_bytes())?;
    }
    Ok(())
}

/// Byte offset of a block's bitmap, `None` if the block is not allocated.
fn bitmap_offset(vhd: &Vhd, block: u32) -> Result<Option<u64>, Failure> {
    if block >= vhd.blocks() {
        let text = format!("block {block} is beyond the disk of {} blocks", vhd.blocks());
        return Err(Failure::new(libc::ERANGE, text));
    }
    Ok(vhd.block_entry(block).map(|entry| u64::from(entry).saturating_mul(SECTOR_SIZE)))
}

fn place_of_sector(vhd: &Vhd, sector: u64, out: &mut dyn Write) -> Result<(), Failure> {
    let in_block = u64::from(vhd.block_sectors());
    let block = u32::try_from(sector.checked_div(in_block).unwrap_or(0)).unwrap_or(u32::MAX);
    let first = sector.checked_rem(in_block).unwrap_or(0);
    write!(out, "logical sector {sector}: ")?;
    match bitmap_offset(vhd, block)? {
        None => writeln!(out, "block number: {block}, not allocated")?,
        Some(bitmap) => {
            let data = bitmap.saturating_add(bitmap_bytes(vhd));
            let offset = data.saturating_add(first.saturating_mul(SECTOR_SIZE));
            writeln!(out, "block number: {block}, sector offset: {first}, file offset: {offset}")?;
        }
    }
    Ok(())
}

fn place_of_block(vhd: &Vhd, block: u32, count: Option<u64>, out: &mut dyn Write) -> Result<(), Failure> {
    for i in 0..count.unwrap_or(1) {
        let block = block.saturating_add(u32::try_from(i).unwrap_or(u32::MAX));
        match bitmap_offset(vhd, block)? {
            None => writeln!(out, "block: {block}: not allocated")?,
            Some(offset) => writeln!(out, "block: {block}: offset: {offset}")?,
        }
    }
    Ok(())
}

fn bitmap_of_block(disk: &Disk, vhd: &Vhd, block: u32, out: &mut dyn Write) -> Result<(), Failure> {
    let Some(offset) = bitmap_offset(vhd, block)? else {
        return Err(Failure::new(libc::EINVAL, format!("block {block} is not allocated")));
    };
    let mut bits = vec![0; usize::try_from(bitmap_bytes(vhd)).unwrap_or(0)];
    disk.read_at(offset, &mut bits)?;
    out.write_all(&bits)?;
    Ok(())
}

/// One bit for each block, set if the block is allocated.
fn allocation(vhd: &Vhd, out: &mut dyn Write) -> Result<(), Failure> {
    let blocks = vhd.blocks();
    let mut bits = vec![0; usize::try_from(blocks.div_ceil(8)).unwrap_or(0)];
    for block in (0..blocks).filter(|&block| vhd.block_entry(block).is_some()) {
        bitmap::set(&mut bits, block..block.saturating_add(1));
    }
    out.write_all(&bits)?;
    Ok(())
}

fn bitmap_bytes(vhd: &Vhd) -> u64 {
    u64::from(vhd.block_sectors().div_ceil(8)).next_multiple_of(SECTOR_SIZE)
}

/// Data through the chain.
fn data(disk: Disk, sector: u64, count: u64, out: &mut dyn Write) -> Result<(), Failure> {
    let options = OpenOptions::default();
    let vhd = disk.vhd(&options)?;
    if sector.checked_add(count).is_none_or(|end| end > vhd.sectors()) {
        let text = format!("sectors {sector} and {} more are not on the disk of {}", count, vhd.sectors());
        return Err(Failure::new(libc::ERANGE, text));
    }
    let mut layers = open_chain(disk, vhd, &options)?;
    let (mut sector, mut left) = (sector, count);
    while left > 0 {
        let chunk = left.min(CHUNK);
        let mut buf = vec![0; usize::try_from(chunk.saturating_mul(SECTOR_SIZE)).unwrap_or(0)];
        read_chain(&mut layers, sector, &mut buf)?;
        out.write_all(&buf)?;
        sector = sector.saturating_add(chunk);
        left = left.saturating_sub(chunk);
    }
    Ok(())
}
