//! Opening a disk: the leaf, and the chain of its parents.
//!
//! The format of the leaf is the one that was asked for and never guessed: a guest can write any header it likes into a raw
//! disk. A parent's format follows from its child in the same way.
//!
//! **Which files a name inside an image may open** says [`policy`].

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{ImageType, OpenParams, null_size};
use vhd::chain::{Policy, Visited, candidates, check_identity, is_plain};
use vhd::{ParentRef, Vhd};

use super::file::{ImageFile, Mode};
use super::formatted::Formatted;
use super::layer::Layer;
use super::null::Null;
use super::raw::Raw;
use super::{Disk, OpenError, policy, ram};
use crate::io::Io;

/// What a child says of its parent.
#[derive(Debug)]
pub(super) enum Backing {
    /// As a differencing VHD does.
    Vhd(ParentRef),
    /// By its name and format.
    Named {
        /// As it stands in the child.
        name: PathBuf,
        /// The format.
        kind: ImageType,
    },
}

/// An opened image, and what is below it.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) layer: Layer,
    pub(super) backing: Option<Backing>,
}

/// What opening an image needs beside its file.
#[derive(Debug)]
pub(super) struct Opener<'a> {
    pub(super) params: &'a OpenParams,
    pub(super) io: &'a Io,
    visited: Visited,
    /// The leaf is open.
    below: bool,
}

/// Opens the disk that `params` asks for, blocking. Nothing is changed on disk, whether it succeeds or fails.
pub fn open(params: &OpenParams, io: &Io) -> Result<Disk, OpenError> {
    let path = Path::new(&params.image.path);
    let mode = if params.readonly { Mode::Shared } else { Mode::Exclusive };
    if params.image.kind == ImageType::Null {
        let bytes = null_size(&params.image.path)
            .ok_or_else(|| OpenError::new(path, Errno::EINVAL, "is no size of a null image in bytes"))?;
        let (layer, sectors) = (Layer::Null(Null), bytes / SECTOR_SIZE);
        return Ok(Disk::new(layer, Vec::new(), io.clone(), params.readonly, sectors));
    }
    let file = match params.image.kind {
        ImageType::Ram => {
            let raw = Raw::new(ram::open(&params.image.path)?)?;
            let sectors = raw.sectors();
            return Ok(Disk::new(Layer::Raw(raw), Vec::new(), io.clone(), params.readonly, sectors));
        }
        ImageType::Sync => ImageFile::open_synchronous(path, mode)?,
        _ => ImageFile::open(path, mode, !params.buffered)?,
    };
    open_over(file, params, io)
}

/// The same over an open file, which is the leaf.
pub(super) fn open_over(file: ImageFile, params: &OpenParams, io: &Io) -> Result<Disk, OpenError> {
    let mut opener = Opener { params, io, visited: Visited::default(), below: false };
    let path = canonical(file.path())?;
    opener.enter(&file)?;
    let Opened { layer, backing } = opener.open(params.image.kind, file, !params.readonly)?;
    let parents = opener.open_parents(path, backing)?;
    let sectors = layer.sectors();
    Ok(Disk::new(layer, parents, io.clone(), params.readonly, sectors))
}

impl Opener<'_> {
    /// Opens one image in its format.
    fn open(&mut self, kind: ImageType, file: ImageFile, writable: bool) -> Result<Opened, OpenError> {
        match kind {
            ImageType::Aio | ImageType::Sync => {
                Ok(Opened { layer: Layer::Raw(Raw::new(file)?), backing: None })
            }
            ImageType::Vhd => self.open_vhd(file, writable),
            other => {
                let text = format!("images of type {} are not built in", other.name());
                Err(OpenError::new(file.path(), Errno::ENOSYS, text))
            }
        }
    }

    fn open_parents(&mut self, leaf: PathBuf, backing: Option<Backing>) -> Result<Vec<Layer>, OpenError> {
        self.below = true;
        let policy = policy::for_leaf(&leaf);
        let (mut child, mut wanted) = (leaf, backing);
        let mut parents = Vec::new();
        while let Some(backing) = wanted.take() {
            let path = find(&child, &backing, &policy)?;
            let mut file = ImageFile::open_unlocked(&path, Mode::Shared, !self.params.buffered)?;
            // Before the lock: an image that is its own ancestor would otherwise be told to be in use, by ourselves.
            self.enter(&file)?;
            file.lock(Mode::Shared)?;
            let opened = self.open(backing.kind(), file, false)?;
            if let (Backing::Vhd(parent), Layer::Vhd(vhd)) = (&backing, &opened.layer) {
                check_identity(parent, vhd.with_core(Vhd::uuid)).map_err(|error| refuse(&path, &error))?;
            }
            parents.push(opened.layer);
            wanted = opened.backing;
            child = path;
        }
        Ok(parents)
    }

    fn open_vhd(&mut self, file: ImageFile, writable: bool) -> Result<Opened, OpenError> {
        let reader = file.reader()?;
        let mut read = |offset: u64, bytes: &mut [u8]| reader.read_exact_at(bytes, offset);
        let (size, regular) = (file.len(), file.is_regular());
        let mut open = |key| {
            let options = vhd::OpenOptions { writable, key, ..vhd::OpenOptions::default() };
            Vhd::open(format::Source { size, regular, read: &mut read }, &options)
        };
        let key = self.params.key.as_ref().map(|key| vhd::key::Key::new(key.bytes().to_vec()));
        let core = key.transpose().and_then(|key| match open(key) {
            // An encrypted disk may have grown from a plain one.
            Err(vhd::Error::NotEncrypted) if self.below => open(None),
            result => result,
        });
        let core = core.map_err(|error| refuse(file.path(), &error))?;
        self.visited.identify(core.uuid()).map_err(|error| refuse(file.path(), &error))?;
        if core.was_unclean() {
            log::warn!(
                "{}: was not closed cleanly; the footer copy at its start is used",
                file.path().display()
            );
        }
        let backing = core.parent().map(Backing::Vhd);
        Ok(Opened { layer: Layer::Vhd(Box::new(Formatted::new(file, core, self.io))), backing })
    }

    /// Notes an image of the chain: none may be there twice.
    fn enter(&mut self, file: &ImageFile) -> Result<(), OpenError> {
        let (device, inode) =
            file.identity().map_err(|error| OpenError::io(file.path(), "cannot stat", &error))?;
        self.visited.enter(device, inode).map_err(|error| refuse(file.path(), &error))
    }
}

impl Backing {
    /// The parent's format.
    fn kind(&self) -> ImageType {
        match self {
            Backing::Vhd(parent) if parent.uuid.is_null() => ImageType::Aio,
            Backing::Vhd(_) => ImageType::Vhd,
            Backing::Named { kind, .. } => *kind,
        }
    }

    /// Whether the parent proves that it is the one that is meant.
    fn proves_itself(&self) -> bool {
        matches!(self, Backing::Vhd(parent) if !parent.uuid.is_null())
    }
}

/// The canonical path of the parent that `child` names.
fn find(child: &Path, backing: &Backing, policy: &Policy) -> Result<PathBuf, OpenError> {
    let folder = child.parent().unwrap_or(Path::new("/"));
    let tried = match backing {
        Backing::Vhd(parent) => candidates(folder, parent).map_err(|error| refuse(child, &error))?,
        Backing::Named { name, .. } if is_plain(name) => vec![folder.join(name)],
        Backing::Named { name, .. } => {
            let text = format!("its backing file {} is no plain path, and is not opened", name.display());
            return Err(OpenError::new(child, Errno::EPERM, text));
        }
    };
    let found = tried.iter().find_map(|path| path.canonicalize().ok()).ok_or_else(|| {
        let names: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        let text = format!("its parent image is missing: tried {}", names.join(", "));
        OpenError::new(child, Errno::ENOENT, text)
    })?;
    policy.permit(&found, !backing.proves_itself()).map_err(|error| refuse(child, &error))?;
    Ok(found)
}

fn refuse(path: &Path, error: &vhd::Error) -> OpenError {
    OpenError::new(path, Errno::from_raw(error.errno()), error.to_string())
}

fn canonical(path: &Path) -> Result<PathBuf, OpenError> {
    path.canonicalize().map_err(|error| OpenError::io(path, "cannot resolve", &error))
}
