//! `vhd-util read`: metadata and data as they are.

use std::io::Write;
use std::ops::Range;

use format::blocking::Storage;

use super::args::Args;
use super::disk::{Disk, open_chain, read_chain};
use super::query::LOOK;
use super::{Failure, errno_of, wrong_usage};
use crate::locator::{self, Platform};
use crate::{DiskType, OpenOptions, SECTOR_SIZE, Vhd, bitmap, print};

pub(super) const OPTIONS: &str = "n:pt:b:Bm:i:e:aj:d:c:r:R:xC";
pub(super) const USAGE: &str = "\
options:
-h          help
-n          name
-p          print VHD headers
-t sec      translate logical sector to VHD location
-b blk      print bat entry
-B          print entire bat as a bitmap
-m blk      print bitmap
-i sec      test bitmap for logical sector
-e sec      output extent list of allocated logical sectors
-a          print batmap
-j blk      test batmap for block
-d blk      print data
-c num      num units
-r sec      read num sectors at sec
-R byte     read num bytes at byte
-x          print in hex";

/// Sectors that are read and written out at once.
const CHUNK: u64 = 2048;

/// A number as the user wants to see it.
#[derive(Clone, Copy)]
struct Show {
    hex: bool,
}

impl Show {
    fn number(self, number: u64) -> String {
        if self.hex && number > 0 { format!("{number:#x}") } else { number.to_string() }
    }
}

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let count = args.number::<u64>('c')?.unwrap_or(1);
    let show = Show { hex: args.has('x') };
    let failure = |errno: i32| Failure::new(errno, format!("Failed to open {}: -{errno}", path.display()));
    let disk = Disk::open(path, false).map_err(|error| failure(errno_of(&error)))?;
    let vhd = disk.vhd(&LOOK).map_err(|error| failure(error.errno()))?;
    if vhd.kind() == DiskType::Fixed && !args.has('r') && !args.has('R') {
        let text = format!("Failed to get bat for {}: -{}", path.display(), libc::EINVAL);
        return Err(Failure::new(libc::EINVAL, text));
    }
    if args.has('p') {
        headers(&disk, &vhd, out)?;
    }
    if let Some(sector) = args.number('t')? {
        for sector in sectors(&vhd, sector, count)? {
            place_of_sector(&vhd, sector, show, out)?;
        }
    }
    if let Some(block) = args.number('b')? {
        for block in blocks(&vhd, block, count)? {
            let place = match bitmap_offset(&vhd, block) {
                None => "offset: not allocated".into(),
                Some(offset) => format!("offset: {}", show.number(offset)),
            };
            writeln!(out, "block: {}: {place}", show.number(block.into()))?;
        }
    }
    if args.has('B') {
        allocation(&vhd, out)?;
    }
    let look = Look { disk: &disk, vhd: &vhd, show };
    look.blocks(args, count, out)?;
    look.bits(args, count, out)?;
    let start = match (args.number::<u64>('r')?, args.number::<u64>('R')?) {
        (None, None) => return Ok(()),
        (Some(sector), _) => (sector.saturating_mul(SECTOR_SIZE), count.saturating_mul(SECTOR_SIZE)),
        (None, Some(byte)) => (byte, count),
    };
    data(disk, start, out)
}

/// What is looked at.
struct Look<'a> {
    disk: &'a Disk,
    vhd: &'a Vhd,
    show: Show,
}

impl Look<'_> {
    /// Options about blocks: bitmaps, batmap, data.
    fn blocks(&self, args: &Args, count: u64, out: &mut dyn Write) -> Result<(), Failure> {
        let unallocated = |block: u32| format!("block {} not allocated", self.show.number(block.into()));
        if let Some(block) = args.number('m')? {
            for block in blocks(self.vhd, block, count)? {
                match self.bitmap(block)? {
                    Some(bits) => out.write_all(&bits)?,
                    None => writeln!(out, "{}", unallocated(block))?,
                }
            }
        }
        if args.has('a') || args.has('j') {
            let no_batmap =
                || Failure::new(libc::EINVAL, format!("failed to read batmap: -{}", libc::EINVAL));
            let (_, map) = self.vhd.batmap().ok_or_else(no_batmap)?;
            if args.has('a') {
                out.write_all(map)?;
            }
            if let Some(block) = args.number('j')? {
                for block in blocks(self.vhd, block, count)? {
                    let bit = u8::from(bitmap::get(map, block));
                    writeln!(out, "batmap for block {}: {bit}", self.show.number(block.into()))?;
                }
            }
        }
        if let Some(block) = args.number('d')? {
            for block in blocks(self.vhd, block, count)? {
                match self.vhd.bitmap_range(block) {
                    Some(bits) => {
                        let len = u64::from(self.vhd.block_sectors()).saturating_mul(SECTOR_SIZE);
                        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
                        self.disk.read_at(bits.end, &mut bytes)?;
                        out.write_all(&bytes)?;
                    }
                    None => writeln!(out, "{}", unallocated(block))?,
                }
            }
        }
        Ok(())
    }

    /// Options about the bits of sectors: single ones, extents.
    fn bits(&self, args: &Args, count: u64, out: &mut dyn Write) -> Result<(), Failure> {
        if let Some(sector) = args.number('i')? {
            self.each_bit(sectors(self.vhd, sector, count)?, |block, in_block, bit| {
                let (block, sector) = (self.show.number(block.into()), self.show.number(in_block.into()));
                Ok(writeln!(out, "block {block}: sec: {sector}: {}", u8::from(bit))?)
            })?;
        }
        if let Some(first) = args.number::<u64>('e')? {
            let range = sectors(self.vhd, first, count)?;
            let (mut sector, mut run) = (range.start, 0_u64);
            let mut print = |end: u64, run: u64| -> Result<(), Failure> {
                if run > 0 {
                    let start = self.show.number(end.saturating_sub(run));
                    writeln!(out, "{start} {}", self.show.number(run))?;
                }
                Ok(())
            };
            self.each_bit(range, |_, _, bit| {
                if bit {
                    run = run.saturating_add(1);
                } else {
                    print(sector, std::mem::take(&mut run))?;
                }
                sector = sector.saturating_add(1);
                Ok(())
            })?;
            print(sector, run)?;
        }
        Ok(())
    }

    /// Tells block, sector in the block and bit of each of some sectors.
    fn each_bit(
        &self,
        sectors: Range<u64>,
        mut tell: impl FnMut(u32, u32, bool) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut loaded = None;
        for sector in sectors {
            let (block, in_block) = split(self.vhd, sector);
            if !matches!(&loaded, Some((of, _)) if *of == block) {
                loaded = Some((block, self.bitmap(block)?.unwrap_or_default()));
            }
            let bits = loaded.as_ref().map_or(&[][..], |(_, bits)| bits);
            tell(block, in_block, bitmap::get(bits, in_block))?;
        }
        Ok(())
    }

    /// The bitmap of a block, `None` if the block is not allocated.
    fn bitmap(&self, block: u32) -> Result<Option<Vec<u8>>, Failure> {
        let Some(range) = self.vhd.bitmap_range(block) else { return Ok(None) };
        let mut bits = vec![0; usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0)];
        self.disk.read_at(range.start, &mut bits)?;
        Ok(Some(bits))
    }
}

/// The sectors asked for, if the disk has all of them.
fn sectors(vhd: &Vhd, first: u64, count: u64) -> Result<Range<u64>, Failure> {
    let end = first.checked_add(count).filter(|&end| end <= vhd.sectors());
    let past =
        || Failure::new(libc::ERANGE, format!("sector {} past end of file", first.saturating_add(count)));
    Ok(first..end.ok_or_else(past)?)
}

/// The blocks asked for, if the disk has all of them.
fn blocks(vhd: &Vhd, first: u64, count: u64) -> Result<Range<u32>, Failure> {
    let end = first.checked_add(count).and_then(|end| u32::try_from(end).ok());
    let past =
        || Failure::new(libc::ERANGE, format!("block {} past end of file", first.saturating_add(count)));
    let end = end.filter(|&end| end <= vhd.blocks()).ok_or_else(past)?;
    Ok(u32::try_from(first).map_err(|_| past())?..end)
}

/// The block of a sector, and the sector's place in it.
fn split(vhd: &Vhd, sector: u64) -> (u32, u32) {
    let in_block = u64::from(vhd.block_sectors());
    let number = |number: Option<u64>| u32::try_from(number.unwrap_or(0)).unwrap_or(u32::MAX);
    (number(sector.checked_div(in_block)), number(sector.checked_rem(in_block)))
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
fn bitmap_offset(vhd: &Vhd, block: u32) -> Option<u64> {
    vhd.bitmap_range(block).map(|range| range.start)
}

fn place_of_sector(vhd: &Vhd, sector: u64, show: Show, out: &mut dyn Write) -> Result<(), Failure> {
    let (block, first) = split(vhd, sector);
    let place = match vhd.bitmap_range(block) {
        None => "not allocated".into(),
        Some(bitmap) => show.number(bitmap.end.saturating_add(u64::from(first).saturating_mul(SECTOR_SIZE))),
    };
    let (sector, block, first) = (show.number(sector), show.number(block.into()), show.number(first.into()));
    writeln!(
        out,
        "logical sector {sector}: block number: {block}, sector offset: {first}, file offset: {place}"
    )?;
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

/// Bytes of the disk, read through the chain: where they begin, and how many.
fn data(disk: Disk, (start, len): (u64, u64), out: &mut dyn Write) -> Result<(), Failure> {
    let options = OpenOptions::default();
    let vhd = disk.vhd(&options)?;
    let size = vhd.sectors().saturating_mul(SECTOR_SIZE);
    let Some(end) = start.checked_add(len).filter(|&end| end <= size) else {
        let text = format!("{len} bytes at {start} reach beyond the disk of {size}");
        return Err(Failure::new(libc::ERANGE, text));
    };
    let mut layers = open_chain(disk, vhd, &options)?;
    let mut at = start;
    while at < end {
        let sector = at / SECTOR_SIZE;
        let behind = end.div_ceil(SECTOR_SIZE).min(sector.saturating_add(CHUNK));
        let mut buf =
            vec![0; usize::try_from(behind.saturating_sub(sector).saturating_mul(SECTOR_SIZE)).unwrap_or(0)];
        read_chain(&mut layers, sector, &mut buf)?;
        let base = sector.saturating_mul(SECTOR_SIZE);
        let next = behind.saturating_mul(SECTOR_SIZE).min(end);
        let within = |byte: u64| usize::try_from(byte.saturating_sub(base)).unwrap_or(usize::MAX);
        out.write_all(buf.get(within(at)..within(next)).unwrap_or_default())?;
        at = next;
    }
    Ok(())
}
