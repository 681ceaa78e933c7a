//! `vhd-util snapshot`: a new image on top of another.

use std::io::Write;

use super::args::Args;
use super::create::{now, size_option, write_new};
use super::disk::{Disk, Layer, open_chain, random};
use super::{Failure, errno_of, wrong_usage};
use crate::header::DEFAULT_BLOCK_SIZE;
use crate::{DiskType, NewImage, NewParent, OpenOptions, SECTOR_SIZE, Uuid, Vhd, chain, time};

pub(super) const OPTIONS: &str = "n:p:S:l:me";
pub(super) const USAGE: &str = "options: <-n name> <-p parent name> [-l snapshot depth limit] [-m parent_is_raw] [-S \
                                size (MB) for metadata preallocation (see vhd-util resize)] [-e link to supplied \
                                parent name even if it might be empty] [-h help]";

pub(super) fn run(args: &Args, _out: &mut dyn Write) -> Result<(), Failure> {
    let (Some(child), Some(parent)) = (args.path('n'), args.path('p')) else { return Err(wrong_usage()) };
    let open_failure =
        |errno: i32| Failure::new(errno, format!("error opening {}: -{errno}", parent.display()));
    let disk = Disk::open(parent, false).map_err(|error| open_failure(errno_of(&error)))?;
    let chain = if args.has('m') {
        vec![Layer { disk, vhd: None }]
    } else {
        let options = OpenOptions { allow_encrypted: true, ..OpenOptions::default() };
        let vhd = disk.vhd(&options).map_err(|error| open_failure(error.errno()))?;
        open_chain(disk, vhd, &options)?
    };
    check_depth(chain.len(), args.number::<usize>('l')?)?;
    let named = chain.first().ok_or_else(wrong_usage)?;
    let linked = if args.has('e') { named } else { first_with_data(&chain).unwrap_or(named) };
    let size = match &named.vhd {
        Some(vhd) => vhd.sectors().saturating_mul(SECTOR_SIZE),
        None => named.disk.size,
    };
    let folder = child.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(std::path::Path::new(".")).canonicalize()?;
    if child.canonicalize().is_ok_and(|child| chain.iter().any(|layer| layer.disk.path == child)) {
        return Err(Failure::new(libc::EINVAL, format!("{} is an image of that chain", child.display())));
    }
    let image = NewImage {
        kind: DiskType::Differencing,
        size,
        max_size: size_option(args, 'S')?.unwrap_or(0),
        block_size: DEFAULT_BLOCK_SIZE,
        uuid: Uuid::from_random(random()?),
        timestamp: now(),
        parent: Some(describe(linked, &folder)?),
        key: named.vhd.as_ref().and_then(Vhd::key_hash),
    };
    write_new(child, &image)
}

/// Checks that the child will not be deeper than `limit` images.
fn check_depth(depth: usize, limit: Option<usize>) -> Result<(), Failure> {
    match limit {
        Some(limit) if depth.saturating_add(1) > limit => Err(Failure::new(
            libc::ENOSPC,
            format!("snapshot depth exceeded: current depth: {depth}, limit: {limit}"),
        )),
        _ => Ok(()),
    }
}

/// The first layer that is not an empty differencing image: the others add nothing to the chain.
fn first_with_data(chain: &[Layer]) -> Option<&Layer> {
    let empty = |vhd: &Vhd| vhd.kind() == DiskType::Differencing && vhd.allocated_blocks() == 0;
    chain.iter().find(|layer| !layer.vhd.as_ref().is_some_and(empty))
}

pub(super) fn describe(parent: &Layer, folder: &std::path::Path) -> Result<NewParent, Failure> {
    let path = chain::relative(folder, &parent.disk.path);
    let name = parent.disk.path.file_name();
    let (Some(path), Some(name)) = (path.to_str(), name.and_then(|name| name.to_str())) else {
        let text = format!("the path of {} is not UTF-8, as a VHD needs it", parent.disk.path.display());
        return Err(Failure::new(libc::EINVAL, text));
    };
    Ok(NewParent {
        uuid: parent.vhd.as_ref().map_or(Uuid::NULL, Vhd::uuid),
        timestamp: time::from_unix(parent.disk.changed),
        name: name.to_owned(),
        path: path.to_owned(),
    })
}
