//! Opening a disk: the leaf, and the chain of its parents.
//!
//! The format of the leaf is the one that was asked for and never guessed: a guest can write any header it likes into a raw
//! disk. A parent's format follows from its child in the same way.
//!
//! **Which files a name inside an image may open** says [`policy`].

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blkif::ids::SECTOR_SIZE;
use nix::errno::Errno;
use tap_ctl::proto::{ImageSpec, ImageType, OpenParams, null_size};
use vhd::chain::{Policy, Visited, candidates, check_identity, is_plain};
use vhd::{ParentRef, Vhd};

use super::chain::Chain;
use super::file::{ImageFile, Mode};
use super::filter::Filters;
use super::formatted::Formatted;
use super::layer::Layer;
use super::nbd::{self, Nbd};
use super::null::Null;
use super::raw::Raw;
use super::share::Common;
use super::stack::{self, Stack};
use super::{Disk, OpenError, cache, policy, qcow, ram};
use crate::io::Io;
use crate::porter;

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
    /// By its name alone: it is raw, and nothing else.
    Bare {
        /// As it stands in the child.
        name: PathBuf,
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
    servers: nbd::Limits,
    visited: Visited,
    /// The leaf is open.
    pub(super) below: bool,
}

/// Opens the disk that `params` asks for, blocking. Nothing is changed on disk, whether it succeeds or fails; but a log of
/// written blocks says from then on that it is being written.
pub fn open(params: &OpenParams, io: &Io) -> Result<Disk, OpenError> {
    let Images { chain, sectors } = open_images(params, nbd::Limits::default(), io)?;
    let chain = Rc::new(chain);
    let filters = Filters::open(params, &chain, sectors, io)?;
    Ok(Disk::new(chain, filters, params.readonly, Common::new(sectors)))
}

/// The images of a disk.
#[derive(Debug)]
pub(super) struct Images {
    pub(super) chain: Chain,
    /// Capacity of the disk.
    pub(super) sectors: u64,
}

impl Images {
    fn new(leaf: Layer, parents: Vec<Layer>, sectors: u64, io: &Io) -> Images {
        Images { chain: Chain::new(leaf, parents, io.clone()), sectors }
    }
}

/// Opens the image that `params` names, with what is below it; `servers`: how long NBD servers are waited for.
pub(super) fn open_images(params: &OpenParams, servers: nbd::Limits, io: &Io) -> Result<Images, OpenError> {
    let mut opener = Opener { servers, ..Opener::new(params, io) };
    let stack = match params.image.kind {
        ImageType::XChain => stack::read(Path::new(&params.image.path))?,
        _ => Stack { leaf: params.image.clone(), below: Vec::new() },
    };
    let leaf = opener.open_named(&stack.leaf, !params.readonly)?;
    opener.below = true;
    let mut parents = Vec::new();
    let mut last = (leaf.path, leaf.opened.backing);
    for image in &stack.below {
        let named = opener.open_named(image, false)?;
        parents.push(named.opened.layer);
        last = (named.path, named.opened.backing);
    }
    if let Some(parent) = &params.parent {
        // It stands for all parents: what the images name is not looked at.
        parents.push(opener.open_named(parent, false)?.opened.layer);
    } else if let (Some(path), backing) = last {
        parents.extend(opener.open_parents(path, backing)?);
    }
    Ok(Images::new(leaf.opened.layer, parents, leaf.sectors, io))
}

/// Opens the image `spec` to stand on top of `first`, the disk that `params` asks for: what it names as its parent is compared
/// with that, and not opened.
pub(super) fn open_on_top(
    spec: &ImageSpec,
    params: &OpenParams,
    first: &Chain,
    io: &Io,
) -> Result<Layer, OpenError> {
    let refuse = |text: String| OpenError::new(spec.path.as_ref(), Errno::EINVAL, text);
    let Named { opened: Opened { layer, backing }, path, .. } =
        Opener::new(params, io).open_named(spec, !params.readonly)?;
    let (Some(path), Some(backing)) = (path, backing) else {
        return Err(refuse("is no image that stands on another, as a standby image must".into()));
    };
    let named = resolve(&path, &backing)?;
    let is =
        |layer: &Layer| layer.file().is_some() && canonical(layer.name()).is_ok_and(|path| path == named);
    if is(&first.leaf) {
        if let (Backing::Vhd(parent), Layer::Vhd(vhd)) = (&backing, &first.leaf) {
            check_identity(parent, vhd.with_core(Vhd::uuid)).map_err(|error| self::refuse(&named, &error))?;
        }
    } else if params.parent.is_none() && !first.parents.first().is_some_and(is) {
        let (named, first) = (named.display(), first.leaf.name().display());
        let text = format!("its parent is {named}, which is neither {first} nor the parent of that");
        return Err(refuse(text));
    }
    Ok(layer)
}

/// As [`open_images`] over an open file, which is the leaf.
#[cfg(test)]
pub(super) fn open_over(file: ImageFile, params: &OpenParams, io: &Io) -> Result<Images, OpenError> {
    let mut opener = Opener::new(params, io);
    let Named { opened, sectors, path } = opener.open_file(params.image.kind, file, !params.readonly)?;
    let parents = match path {
        Some(path) => opener.open_parents(path, opened.backing)?,
        None => Vec::new(),
    };
    Ok(Images::new(opened.layer, parents, sectors, io))
}

/// An image that the administrator has named.
#[derive(Debug)]
struct Named {
    opened: Opened,
    /// Capacity.
    sectors: u64,
    /// The canonical path of its file.
    path: Option<PathBuf>,
}

impl<'a> Opener<'a> {
    fn new(params: &'a OpenParams, io: &'a Io) -> Opener<'a> {
        Opener { params, io, servers: nbd::Limits::default(), visited: Visited::default(), below: false }
    }

    fn open_named(&mut self, image: &ImageSpec, writable: bool) -> Result<Named, OpenError> {
        let path = Path::new(&image.path);
        let mode = if writable { Mode::Exclusive } else { Mode::Shared };
        let apart = |layer, sectors| Named { opened: Opened { layer, backing: None }, sectors, path: None };
        let file = match image.kind {
            ImageType::Null => {
                let bytes = null_size(&image.path).ok_or_else(|| {
                    OpenError::new(path, Errno::EINVAL, "is no size of a null image in bytes")
                })?;
                return Ok(apart(Layer::Null(Null), bytes / SECTOR_SIZE));
            }
            ImageType::Ram => {
                let raw = Raw::new(ram::open(&image.path)?)?;
                let sectors = raw.sectors();
                return Ok(apart(Layer::Raw(raw), sectors));
            }
            ImageType::Nbd => {
                let nbd = Nbd::open(&image.path, !writable, self.servers, self.io)?;
                let sectors = nbd.sectors();
                return Ok(apart(Layer::Nbd(Box::new(nbd)), sectors));
            }
            ImageType::Sync => ImageFile::open_synchronous(path, mode)?,
            _ => ImageFile::open(path, mode, !self.params.buffered)?,
        };
        if self.below {
            keep(&file)?;
        }
        self.open_file(image.kind, file, writable)
    }

    fn open_file(&mut self, kind: ImageType, file: ImageFile, writable: bool) -> Result<Named, OpenError> {
        let path = canonical(file.path())?;
        self.enter(&file)?;
        let opened = self.open(kind, file, writable)?;
        Ok(Named { sectors: opened.layer.sectors(), path: Some(path), opened })
    }
}

impl Opener<'_> {
    /// Opens one image in its format.
    fn open(&mut self, kind: ImageType, file: ImageFile, writable: bool) -> Result<Opened, OpenError> {
        match kind {
            ImageType::Aio | ImageType::Sync => {
                Ok(Opened { layer: Layer::Raw(Raw::new(file)?), backing: None })
            }
            ImageType::Vhd => self.open_vhd(file, writable),
            ImageType::Qcow => self.open_qcow(file, writable),
            ImageType::Qcow2 => self.open_qcow2(file, writable),
            ImageType::Vmdk => self.open_vmdk(file, writable),
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
            keep(&file)?;
            if matches!(backing, Backing::Bare { .. }) {
                qcow::check_bare(&file)?;
            }
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
    pub(super) fn enter(&mut self, file: &ImageFile) -> Result<(), OpenError> {
        let (device, inode) =
            file.identity().map_err(|error| OpenError::io(file.path(), "cannot stat", &error))?;
        self.visited.enter(device, inode).map_err(|error| refuse(file.path(), &error))
    }
}

impl Backing {
    /// The parent's format.
    fn kind(&self) -> ImageType {
        match self {
            Backing::Bare { .. } => ImageType::Aio,
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

/// Has the cache for parents, if there is one, keep what is read of one.
fn keep(file: &ImageFile) -> Result<(), OpenError> {
    let kept = cache::shared().map_or(Ok(()), |cache| file.keep_in(&cache));
    kept.map_err(|error| OpenError::io(file.path(), "cannot stat", &error))
}

/// The canonical path of the parent that `child` names, if it may be opened.
fn find(child: &Path, backing: &Backing, policy: &Policy) -> Result<PathBuf, OpenError> {
    let found = resolve(child, backing)?;
    policy.permit(&found, !backing.proves_itself()).map_err(|error| refuse(child, &error))?;
    Ok(found)
}

/// The canonical path of the parent that `child` names.
fn resolve(child: &Path, backing: &Backing) -> Result<PathBuf, OpenError> {
    let folder = child.parent().unwrap_or(Path::new("/"));
    let tried = match backing {
        Backing::Vhd(parent) => candidates(folder, parent).map_err(|error| refuse(child, &error))?,
        Backing::Named { name, .. } | Backing::Bare { name } if is_plain(name) => vec![folder.join(name)],
        Backing::Named { name, .. } | Backing::Bare { name } => {
            let text = format!("its backing file {} is no plain path, and is not opened", name.display());
            return Err(OpenError::new(child, Errno::EPERM, text));
        }
    };
    tried.iter().find_map(|path| porter::resolve(path).ok()).ok_or_else(|| {
        let names: Vec<String> = tried.iter().map(|path| path.display().to_string()).collect();
        let text = format!("its parent image is missing: tried {}", names.join(", "));
        OpenError::new(child, Errno::ENOENT, text)
    })
}

fn refuse(path: &Path, error: &vhd::Error) -> OpenError {
    OpenError::new(path, Errno::from_raw(error.errno()), error.to_string())
}

pub(super) fn canonical(path: &Path) -> Result<PathBuf, OpenError> {
    porter::resolve(path).map_err(|error| OpenError::io(path, "cannot resolve", &error))
}
