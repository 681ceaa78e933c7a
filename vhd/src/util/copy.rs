//! `vhd-util copy`: a new dynamic image with what a disk holds through its chain, encrypted or not.

use std::io::Write;
use std::path::Path;

use super::args::Args;
use super::create::{now, write_new};
use super::disk::{Disk, Layer, open_chain, random, runs};
use super::key::read_key;
use super::progress::Percent;
use super::{Failure, errno_of, in_use, wrong_usage};
use crate::header::DEFAULT_BLOCK_SIZE;
use crate::key::HASH_LEN;
use crate::transfer::{self, Target};
use crate::{DiskType, Error, Key, KeyHash, NewImage, OpenOptions, SECTOR_SIZE, Uuid};

pub(super) const OPTIONS: &str = "n:N:k:E";
pub(super) const USAGE: &str = "options: <-n name> <-N new name> [-k keyfile to encrypt the copy with | -E copy an encrypted image as it is] [-h help]";

pub(super) fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    let (Some(old), Some(new)) = (args.path('n'), args.path('N')) else { return Err(wrong_usage()) };
    if args.has('k') && args.has('E') {
        return Err(wrong_usage());
    }
    if new.symlink_metadata().is_ok_and(|found| found.is_file()) {
        return Err(Failure::new(libc::EEXIST, format!("{} already exists", new.display())));
    }
    let key = args.path('k').map(|path| read_key(path, Some(new), out)).transpose()?;
    let disk = Disk::open(old, false).map_err(|error| Failure::opening(old, errno_of(&error)))?;
    disk.lock(false).map_err(|error| in_use(old, &error))?;
    let options = OpenOptions { allow_encrypted: args.has('E'), ..OpenOptions::default() };
    let vhd = disk.vhd(&options).map_err(|error| Failure::opening(old, error.errno()))?;
    let (sectors, stored) = (vhd.sectors(), vhd.key_hash());
    if args.has('E') && stored.is_none() {
        return Err(Error::NotEncrypted.into());
    }
    let mut layers = open_chain(disk, vhd, &options)?;
    check_keys(&layers, stored)?;
    let image = NewImage {
        kind: DiskType::Dynamic,
        size: sectors.saturating_mul(SECTOR_SIZE),
        max_size: 0,
        block_size: DEFAULT_BLOCK_SIZE,
        uuid: Uuid::from_random(random()?),
        timestamp: now(),
        parent: None,
        key: stored.or_else(|| key.as_ref().map(|key| key.hash([0; HASH_LEN]))),
    };
    write_new(new, &image)?;
    let mut percent = Percent::at_terminal(out);
    let done = fill(new, key, sectors, &mut layers, &mut percent);
    if done.is_err() {
        // The first error is the one to report.
        let _ = std::fs::remove_file(new);
    }
    percent.end();
    done
}

/// Ciphertext of several keys has no place in one image.
fn check_keys(layers: &[Layer], stored: Option<KeyHash>) -> Result<(), Failure> {
    let alike = |layer: &Layer| layer.vhd.as_ref().and_then(crate::Vhd::key_hash) == stored;
    if layers.iter().all(alike) {
        return Ok(());
    }
    Err(Failure::new(libc::EINVAL, "the images of the chain are not encrypted with the same key"))
}

fn fill(
    new: &Path,
    key: Option<Key>,
    sectors: u64,
    layers: &mut [Layer],
    percent: &mut Percent<'_>,
) -> Result<(), Failure> {
    let disk = Disk::open(new, true)?;
    disk.lock(true).map_err(|error| in_use(new, &error))?;
    let options = OpenOptions {
        writable: true,
        precise: true,
        allow_encrypted: key.is_none(),
        key,
        ..OpenOptions::default()
    };
    let vhd = disk.vhd(&options)?;
    let mut target = Target::Vhd(Box::new(vhd), disk);
    let mut next = |sector| runs(layers, sector, sectors);
    transfer::copy(sectors, &mut next, &mut target, &mut |done, of| percent.show(done, of))?;
    Ok(())
}
