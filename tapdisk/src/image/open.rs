//! Opening a disk: the leaf, and for a differencing VHD the chain of its parents.
//!
//! The format of the leaf is the one that was asked for and never guessed: a guest can write any header it likes into a raw
//! disk. A parent's format follows from its child: a parent that the child names by UUID is a VHD with that very UUID; a
//! child without it has a raw parent.
//!
//! **Which files a name inside an image may open**: a VHD parent anywhere, because only a VHD that carries the UUID the
//! child asks for is accepted, which nobody's private file does; a raw parent, which any file would pass for, only below
//! the child's own folder.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use tap_ctl::proto::{ImageType, OpenParams};

use super::file::{ImageFile, Mode};
use super::raw::Raw;
use super::vhd::VhdLayer;
use super::{Disk, Layer, MAX_DEPTH, OpenError};
use crate::io::Io;

/// Opens the disk that `params` asks for, blocking. Nothing is changed on disk, whether it succeeds or fails.
pub fn open(params: &OpenParams, io: &Io) -> Result<Disk, OpenError> {
    let mode = if params.readonly { Mode::Shared } else { Mode::Exclusive };
    let path = Path::new(&params.image.path);
    let file = ImageFile::open(path, mode, !params.buffered)?;
    let (leaf, parents) = match params.image.kind {
        ImageType::Aio => (Layer::Raw(Raw::new(file)?), Vec::new()),
        ImageType::Vhd => open_chain(file, mode, params, io)?,
    };
    Ok(Disk::new(leaf, parents, io.clone(), params.readonly))
}

fn open_chain(
    file: ImageFile,
    mode: Mode,
    params: &OpenParams,
    io: &Io,
) -> Result<(Layer, Vec<Layer>), OpenError> {
    let mut seen = vec![identity(&file)?];
    let mut child = canonical(file.path())?;
    let (leaf, mut parent) = open_vhd(file, mode == Mode::Exclusive, None, io)?;
    let mut parents = Vec::new();
    while let Some(wanted) = parent.take() {
        if parents.len() + 1 >= MAX_DEPTH {
            return Err(OpenError::new(
                &child,
                Errno::ELOOP,
                format!("its chain of parents is longer than {MAX_DEPTH} images; coalesce it first"),
            ));
        }
        let path = find_parent(&child, &wanted)?;
        let file = ImageFile::open(&path, Mode::Shared, !params.buffered)?;
        let identity = identity(&file)?;
        if seen.contains(&identity) {
            return Err(OpenError::new(
                &path,
                Errno::ELOOP,
                "is its own ancestor: the chain of parents is a loop",
            ));
        }
        seen.push(identity);
        let layer = if wanted.uuid.is_null() {
            Layer::Raw(Raw::new(file)?)
        } else {
            let (layer, next) = open_vhd(file, false, Some((&child, wanted.uuid)), io)?;
            parent = next;
            layer
        };
        parents.push(layer);
        child = path;
    }
    Ok((leaf, parents))
}

/// Opens one VHD. `expected` is the child that names it as its parent and the UUID it must have.
fn open_vhd(
    file: ImageFile,
    writable: bool,
    expected: Option<(&Path, vhd::Uuid)>,
    io: &Io,
) -> Result<(Layer, Option<vhd::ParentRef>), OpenError> {
    let path = file.path().to_owned();
    let mut read = |offset: u64, bytes: &mut [u8]| file.read_exact_at(offset, bytes);
    let source = vhd::Source { size: file.len(), regular: file.is_regular(), read: &mut read };
    let options = vhd::OpenOptions { writable, ..vhd::OpenOptions::default() };
    let core = vhd::Vhd::open(source, &options)
        .map_err(|error| OpenError::new(&path, Errno::from_raw(error.errno()), error.to_string()))?;
    if let Some((child, uuid)) = expected
        && core.uuid() != uuid
    {
        return Err(OpenError::new(
            &path,
            Errno::EINVAL,
            format!("parent UUID changed: {} wants {uuid}, this image is {}", child.display(), core.uuid()),
        ));
    }
    if core.was_unclean() {
        log::warn!("{}: was not closed cleanly; the header copy at its start is used", path.display());
    }
    let parent = core.parent();
    Ok((Layer::Vhd(Box::new(VhdLayer::new(file, core, io))), parent))
}

fn find_parent(child: &Path, wanted: &vhd::ParentRef) -> Result<PathBuf, OpenError> {
    let folder = child.parent().unwrap_or(Path::new("/"));
    let candidates: Vec<PathBuf> = wanted.names.iter().map(|name| folder.join(&name.path)).collect();
    let found = candidates.iter().find_map(|path| path.canonicalize().ok());
    let Some(path) = found else {
        let names: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
        let tried =
            if names.is_empty() { "it names none".into() } else { format!("tried {}", names.join(", ")) };
        return Err(OpenError::new(child, Errno::ENOENT, format!("its parent image is missing: {tried}")));
    };
    if wanted.uuid.is_null() && !path.starts_with(folder) {
        return Err(OpenError::new(
            child,
            Errno::EPERM,
            format!("its raw parent {} is outside its own folder, which is not allowed", path.display()),
        ));
    }
    Ok(path)
}

fn identity(file: &ImageFile) -> Result<(u64, u64), OpenError> {
    file.identity().map_err(|error| OpenError::io(file.path(), "cannot stat", &error))
}

fn canonical(path: &Path) -> Result<PathBuf, OpenError> {
    path.canonicalize().map_err(|error| OpenError::io(path, "cannot resolve", &error))
}
