//! `vhd-util coalesce`: what an image has goes into its parent, an ancestor, or a new image.
//!
//! The image itself stays as it is and still hides all that is changed below it. So whoever has the chain open for reading may
//! go on, a stop in between does no harm, and the command can be given again. Whether the parent has other children, for
//! whom its contents change, no image can tell: that is the caller's business.

use std::io::Write;
use std::path::Path;

use format::Format;
use format::blocking::{Storage, carry_out};

use super::args::Args;
use super::create::{now, write_new};
use super::disk::{Disk, Layer, open_chain, open_parent, random, runs};
use super::progress::Percent;
use super::query::LOOK;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::header::DEFAULT_BLOCK_SIZE;
use crate::transfer::{self, Run, Target};
use crate::{DiskType, Error, NewImage, OpenOptions, SECTOR_SIZE, Uuid, Vhd, bitmap};

pub(super) const OPTIONS: &str = "n:o:a:x:sp";
pub(super) const USAGE: &str = "options: <-n name> [-a ancestor] [-o output] [-s sparse] [-p progress] [-x custom parent] \
                                [-h help]";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let path = args.path('n').ok_or_else(wrong_usage)?;
    let done = match (args.path('o'), args.path('a')) {
        (Some(_), Some(_)) => return Err(wrong_usage()),
        (Some(output), None) => flatten(path, output, args, out),
        (None, ancestor) => onto(path, ancestor, args, out),
    };
    done.map_err(|Failure { text, errno }| {
        let text = if text.is_empty() { text } else { text + "\n" };
        Failure { text: format!("{text}error coalescing: -{errno}"), errno }
    })
}

/// Opens the image, which nobody may write to meanwhile.
fn open_child(path: &Path) -> Result<Layer, Failure> {
    let disk = Disk::open(path, false).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    disk.lock(false).map_err(|error| in_use(path, &error))?;
    let options = OpenOptions { allow_encrypted: true, ..OpenOptions::default() };
    let vhd = disk.vhd(&options).map_err(|error| Failure::opening(path, error.errno()))?;
    Ok(Layer { disk, vhd: Some(vhd) })
}

/// Coalesces into the parent or an ancestor.
fn onto(path: &Path, ancestor: Option<&Path>, args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let mut child = open_child(path)?;
    let Some(vhd) = child.vhd.as_mut().filter(|vhd| vhd.kind() == DiskType::Differencing) else {
        return Err(Failure::new(libc::EINVAL, "coalescing of non-differencing disks is not supported"));
    };
    let (sectors, key) = (vhd.sectors(), vhd.key_hash());
    let (target, between) = match (ancestor, args.path('x')) {
        (None, None) => (parent_of(&child, path)?, Vec::new()),
        (None, Some(custom)) => (custom_parent(&child, custom)?, Vec::new()),
        (Some(ancestor), _) => ancestor_of(path, ancestor)?,
    };
    if target.disk.identity == child.disk.identity {
        return Err(Error::Loop.into());
    }
    let end = written_end(&mut child)?;
    if args.has('s') && target.vhd.is_some() {
        writeln!(out, "opening for sparse writes")?;
    }
    let mut target = writable(target, sectors, end)?;
    if let Target::Vhd(vhd, _) = &target
        && vhd.key_hash() != key
    {
        return Err(Failure::new(libc::EINVAL, "the parent is not encrypted with the same key"));
    }
    if key.is_some() && matches!(target, Target::Raw(_)) {
        return Err(Failure::new(libc::EINVAL, "a raw parent cannot take encrypted data"));
    }
    let mut percent = Percent::new(args.has('p'), out);
    let mut layers = [child];
    let copied = transfer::copy(
        sectors,
        &mut |sector| runs(&mut layers, sector, sectors),
        &mut target,
        &mut |done, of| percent.show(done, of),
    )?;
    percent.end();
    let [mut child] = layers;
    for layer in between {
        uncover(&mut child, layer)?;
    }
    write!(out, "Coalesced {copied} sectors")?;
    Ok(())
}

fn parent_of(child: &Layer, path: &Path) -> Result<Layer, Failure> {
    let vhd = child.vhd.as_ref().ok_or_else(wrong_usage)?;
    let found = open_parent(&child.disk, vhd, &LOOK).and_then(|parent| parent.ok_or(Error::NoParentName));
    found.map_err(|error| {
        let errno = error.errno();
        Failure::new(errno, format!("error finding {} parent: -{errno}", path.display()))
    })
}

/// The image or raw disk that is to take the place of the parent.
fn custom_parent(child: &Layer, path: &Path) -> Result<Layer, Failure> {
    let disk = Disk::open(path, false).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    let raw = child.vhd.as_ref().and_then(Vhd::parent).is_some_and(|parent| parent.uuid.is_null());
    let vhd = if raw { None } else { Some(disk.vhd(&LOOK)?) };
    Ok(Layer { disk, vhd })
}

/// The ancestor of that name, and the layers between it and the image.
fn ancestor_of(path: &Path, ancestor: &Path) -> Result<(Layer, Vec<Layer>), Failure> {
    let wanted = Disk::open(ancestor, false).map_err(|error| Failure::opening(ancestor, errno_of(&error)))?;
    let disk = Disk::open(path, false).map_err(|error| Failure::opening(path, errno_of(&error)))?;
    let vhd = disk.vhd(&LOOK)?;
    let mut chain = open_chain(disk, vhd, &LOOK)?;
    let at = chain.iter().skip(1).position(|layer| layer.disk.identity == wanted.identity);
    let at = at.and_then(|at| at.checked_add(1)).ok_or_else(|| {
        let text = format!("{} is no ancestor of {}", ancestor.display(), path.display());
        Failure::new(libc::ENOENT, text)
    })?;
    chain.truncate(at.saturating_add(1));
    let target = chain.pop().ok_or_else(wrong_usage)?;
    chain.remove(0);
    Ok((target, chain))
}

/// The first sector behind all data of an image.
fn written_end(layer: &mut Layer) -> Result<u64, Failure> {
    let Some(vhd) = &layer.vhd else { return Ok(0) };
    let in_block = u64::from(vhd.block_sectors());
    let last = (0..vhd.blocks()).rev().find(|&block| vhd.block_entry(block).is_some());
    let Some(last) = last else { return Ok(0) };
    let (sectors, mut sector) = (vhd.sectors(), u64::from(last).saturating_mul(in_block));
    let mut end = 0;
    while sector < sectors {
        let run = runs(std::slice::from_mut(layer), sector, sectors)?;
        sector = sector.saturating_add(run.count.into());
        if run.data.is_some() {
            end = sector;
        }
    }
    Ok(end)
}

/// Opens a layer for writing beside its readers, large enough for data up to the sector `end`; `sectors` would be best.
fn writable(layer: Layer, sectors: u64, end: u64) -> Result<Target<Disk>, Failure> {
    let path = layer.disk.path.clone();
    let mut disk = Disk::open(&path, true).map_err(|error| {
        let errno = errno_of(&error);
        Failure::new(errno, format!("failed to open parent {}: -{errno}", path.display()))
    })?;
    disk.lock_beside_readers().map_err(|error| in_use(&path, &error))?;
    if layer.vhd.is_none() {
        let bytes = end.saturating_mul(SECTOR_SIZE);
        if disk.size < bytes {
            disk.set_len(bytes)?;
        }
        return Ok(Target::Raw(disk));
    }
    let options =
        OpenOptions { writable: true, precise: true, allow_encrypted: true, ..OpenOptions::default() };
    let mut vhd = disk.vhd(&options).map_err(|error| Failure::opening(&path, error.errno()))?;
    let wanted = sectors.min(vhd.max_sectors());
    if wanted > vhd.sectors()
        && let Some(steps) = vhd.begin_resize(wanted)?
    {
        carry_out(&mut disk, &steps)?;
        vhd.resize_ended(true);
    }
    if vhd.sectors() < end {
        let text = format!(
            "{} has {} sectors and its child data up to {end}: enlarge it first with 'vhd-util resize -j'",
            path.display(),
            vhd.sectors()
        );
        return Err(Failure::new(libc::EINVAL, text));
    }
    Ok(Target::Vhd(Box::new(vhd), disk))
}

/// Takes from a layer between an image and its ancestor what the image has: the ancestor has it now.
fn uncover(child: &mut Layer, layer: Layer) -> Result<(), Failure> {
    let path = layer.disk.path.clone();
    let mut disk = Disk::open(&path, true).map_err(|error| Failure::opening(&path, errno_of(&error)))?;
    disk.lock_beside_readers().map_err(|error| in_use(&path, &error))?;
    let options =
        OpenOptions { writable: true, precise: true, allow_encrypted: true, ..OpenOptions::default() };
    let mut vhd = disk.vhd(&options).map_err(|error| Failure::opening(&path, error.errno()))?;
    let Some(upper) = &child.vhd else { return Ok(()) };
    if upper.block_sectors() != vhd.block_sectors() {
        return Err(Failure::new(libc::EINVAL, "the images of the chain have blocks of different sizes"));
    }
    let mut changed = Vec::new();
    for block in 0..upper.blocks().min(vhd.blocks()) {
        let (Some(from), Some(to)) = (upper.bitmap_range(block), vhd.bitmap_range(block)) else { continue };
        let mut bits = read(&disk, to.start, to.end)?;
        let cleared = read(&child.disk, from.start, from.end)?;
        if bitmap::clear(&mut bits, &cleared) {
            changed.push((block, to.start, bits));
        }
    }
    // Nothing may be called full whose bitmap is not.
    let steps = vhd.partial_steps(&changed.iter().map(|&(block, ..)| block).collect::<Vec<_>>())?;
    carry_out(&mut disk, &steps)?;
    for (_, offset, bits) in &changed {
        disk.write_at(*offset, bits)?;
    }
    Ok(disk.sync()?)
}

fn read(disk: &Disk, from: u64, to: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = vec![0; usize::try_from(to.saturating_sub(from)).unwrap_or(0)];
    disk.read_at(from, &mut bytes)?;
    Ok(bytes)
}

/// Writes what the disk holds through its chain into a new dynamic image.
fn flatten(path: &Path, output: &Path, args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    if output.symlink_metadata().is_ok() {
        return Err(Failure::new(libc::EEXIST, format!("{} already exists", output.display())));
    }
    let Layer { disk, vhd } = open_child(path)?;
    let vhd = vhd.ok_or_else(wrong_usage)?;
    if vhd.key_hash().is_some() {
        return Err(Error::Encrypted.into());
    }
    let (sectors, size) = (vhd.sectors(), vhd.sectors().saturating_mul(SECTOR_SIZE));
    let mut layers = open_chain(disk, vhd, &OpenOptions::default())?;
    let image = NewImage {
        kind: DiskType::Dynamic,
        size,
        max_size: 0,
        block_size: DEFAULT_BLOCK_SIZE,
        uuid: Uuid::from_random(random()?),
        timestamp: now(),
        parent: None,
        key: None,
    };
    let mut percent = Percent::new(args.has('p'), out);
    write_new(output, &image)?;
    let done = fill_new(output, sectors, &mut layers, &mut percent);
    if done.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(output);
    }
    percent.end();
    done
}

fn fill_new(
    output: &Path,
    sectors: u64,
    layers: &mut [Layer],
    percent: &mut Percent<'_>,
) -> Result<(), Failure> {
    let disk = Disk::open(output, true)?;
    disk.lock(true).map_err(|error| in_use(output, &error))?;
    let vhd = disk.vhd(&OpenOptions { writable: true, precise: true, ..OpenOptions::default() })?;
    let mut target = Target::Vhd(Box::new(vhd), disk);
    let mut next = |sector| {
        let Run { count, data } = runs(layers, sector, sectors)?;
        Ok(Run { count, data: data.filter(|data| data.iter().any(|&byte| byte != 0)) })
    };
    transfer::copy(sectors, &mut next, &mut target, &mut |done, of| percent.show(done, of))?;
    Ok(())
}
