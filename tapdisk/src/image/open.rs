//! Opening a disk: the leaf, and for a differencing VHD the chain of its parents.
//!
//! The format of the leaf is the one that was asked for and never guessed: a guest can write any header it likes into a raw
//! disk. A parent's format follows from its child: a parent that the child names by UUID is a VHD with that very UUID; a
//! child without it has a raw parent.
//!
//! **Which files a name inside an image may open**: a VHD parent anywhere, because only a VHD that carries the UUID the
//! child asks for is accepted, which nobody's private file does; a raw parent, which any file would pass for, only in the
//! leaf's own folder or below.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{ImageType, OpenParams, null_size};
use vhd::chain::{Policy, Visited, candidates, check_identity};
use vhd::{ParentRef, Vhd};

use super::file::{ImageFile, Mode};
use super::null::Null;
use super::raw::Raw;
use super::vhd::VhdLayer;
use super::{Disk, Layer, OpenError};
use crate::io::Io;

/// Opens the disk that `params` asks for, blocking. Nothing is changed on disk, whether it succeeds or fails.
pub fn open(params: &OpenParams, io: &Io) -> Result<Disk, OpenError> {
    let path = Path::new(&params.image.path);
    if params.image.kind == ImageType::Null {
        let bytes = null_size(&params.image.path)
            .ok_or_else(|| OpenError::new(path, Errno::EINVAL, "is no size of a null image in bytes"))?;
        return Ok(Disk::new(
            Layer::Null(Null),
            Vec::new(),
            io.clone(),
            params.readonly,
            bytes / SECTOR_SIZE,
        ));
    }
    let mode = if params.readonly { Mode::Shared } else { Mode::Exclusive };
    let file = ImageFile::open(path, mode, !params.buffered)?;
    open_over(file, params, io)
}

/// The same over an open file, which is the leaf.
pub(super) fn open_over(file: ImageFile, params: &OpenParams, io: &Io) -> Result<Disk, OpenError> {
    if params.image.kind == ImageType::Vhd {
        let (leaf, parents) = open_chain(file, params, io)?;
        let sectors = leaf.sectors();
        return Ok(Disk::new(Layer::Vhd(leaf), parents, io.clone(), params.readonly, sectors));
    }
    let raw = Raw::new(file)?;
    let sectors = raw.sectors();
    Ok(Disk::new(Layer::Raw(raw), Vec::new(), io.clone(), params.readonly, sectors))
}

fn open_chain(
    file: ImageFile,
    params: &OpenParams,
    io: &Io,
) -> Result<(Box<VhdLayer>, Vec<Layer>), OpenError> {
    let mut child = canonical(file.path())?;
    let policy = Policy::beside(&child);
    let mut visited = Visited::default();
    enter(&mut visited, &file)?;
    let core = read_vhd(&file, !params.readonly, &mut visited)?;
    let mut wanted = core.parent();
    let leaf = Box::new(VhdLayer::new(file, core, io));
    let mut parents = Vec::new();
    while let Some(parent) = wanted.take() {
        let path = find(&child, &parent)?;
        let is_raw = parent.uuid.is_null();
        policy.permit(&path, is_raw).map_err(|error| refuse(&child, &error))?;
        let mut file = ImageFile::open_unlocked(&path, Mode::Shared, !params.buffered)?;
        // Before the lock: an image that is its own ancestor would otherwise be told to be in use, by ourselves.
        enter(&mut visited, &file)?;
        file.lock(Mode::Shared)?;
        let layer = if is_raw {
            Layer::Raw(Raw::new(file)?)
        } else {
            let core = read_vhd(&file, false, &mut visited)?;
            check_identity(&parent, core.uuid()).map_err(|error| refuse(&path, &error))?;
            wanted = core.parent();
            Layer::Vhd(Box::new(VhdLayer::new(file, core, io)))
        };
        parents.push(layer);
        child = path;
    }
    Ok((leaf, parents))
}

fn read_vhd(file: &ImageFile, writable: bool, visited: &mut Visited) -> Result<Vhd, OpenError> {
    let reader = file.reader()?;
    let mut read = |offset: u64, bytes: &mut [u8]| reader.read_exact_at(bytes, offset);
    let source = vhd::Source { size: file.len(), regular: file.is_regular(), read: &mut read };
    let options = vhd::OpenOptions { writable, ..vhd::OpenOptions::default() };
    let core = Vhd::open(source, &options).map_err(|error| refuse(file.path(), &error))?;
    visited.identify(core.uuid()).map_err(|error| refuse(file.path(), &error))?;
    if core.was_unclean() {
        log::warn!("{}: was not closed cleanly; the footer copy at its start is used", file.path().display());
    }
    Ok(core)
}

fn enter(visited: &mut Visited, file: &ImageFile) -> Result<(), OpenError> {
    let (device, inode) =
        file.identity().map_err(|error| OpenError::io(file.path(), "cannot stat", &error))?;
    visited.enter(device, inode).map_err(|error| refuse(file.path(), &error))
}

/// The canonical path of the parent that `child` names.
fn find(child: &Path, parent: &ParentRef) -> Result<PathBuf, OpenError> {
    let folder = child.parent().unwrap_or(Path::new("/"));
    let tried = candidates(folder, parent).map_err(|error| refuse(child, &error))?;
    tried.iter().find_map(|path| path.canonicalize().ok()).ok_or_else(|| {
        let names: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        OpenError::new(
            child,
            Errno::ENOENT,
            format!("its parent image is missing: tried {}", names.join(", ")),
        )
    })
}

fn refuse(path: &Path, error: &vhd::Error) -> OpenError {
    OpenError::new(path, Errno::from_raw(error.errno()), error.to_string())
}

fn canonical(path: &Path) -> Result<PathBuf, OpenError> {
    path.canonicalize().map_err(|error| OpenError::io(path, "cannot resolve", &error))
}
