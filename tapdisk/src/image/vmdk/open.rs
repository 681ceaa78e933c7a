//! Opening a VMDK with the files that its descriptor names.
//!
//! **Extents** are opened only by a plain name, in the folder of the descriptor, and only if what is found there, links
//! resolved, is in that folder: an image must not make us open other people's files.

use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blkif::ids::SECTOR_SIZE;
use format::{Format, FormatError, Source};
use nix::errno::Errno;
use vmdk::descriptor::{self, Descriptor as Text, Extent, Kind};
use vmdk::{OpenOptions, Sparse, is_sparse};

use super::{Descriptor, Piece, Storage, Vmdk};
use crate::image::OpenError;
use crate::image::file::{ImageFile, Mode};
use crate::image::formatted::Formatted;
use crate::image::layer::Layer;
use crate::image::open::{Opened, Opener, canonical};
use crate::porter;

impl Opener<'_> {
    /// Opens a VMDK by its descriptor, or by the file of a monolithic one.
    pub(in crate::image) fn open_vmdk(
        &mut self,
        file: ImageFile,
        writable: bool,
    ) -> Result<Opened, OpenError> {
        if self.params.key.is_some() && !self.below {
            return Err(OpenError::new(file.path(), Errno::EINVAL, "is a VMDK, which cannot be encrypted"));
        }
        let mut head = [0; 8];
        let short = file.reader()?.read_exact_at(&mut head, 0).is_err();
        let path = file.path().to_owned();
        let (pieces, descriptor) = match !short && is_sparse(&head) {
            true => (vec![self.monolithic(file, writable)?], None),
            false => self.described(file, writable)?,
        };
        Ok(Opened { layer: Layer::Vmdk(Box::new(Vmdk { path, pieces, descriptor })), backing: None })
    }

    fn monolithic(&self, file: ImageFile, writable: bool) -> Result<Piece, OpenError> {
        let core = open_sparse(&file, writable)?;
        let whole = core.descriptor().is_some_and(|text| {
            matches!(text.kind, Kind::MonolithicSparse | Kind::StreamOptimized) && text.extents.len() == 1
        });
        if !whole {
            let text = "is only a part of a VMDK; open the descriptor that names it";
            return Err(OpenError::new(file.path(), Errno::EINVAL, text));
        }
        let sectors = core.sectors();
        let storage = Storage::Sparse(Box::new(Formatted::new(file, core, self.io)));
        Ok(Piece { first: 0, sectors, writable, storage, dirty: Cell::new(false) })
    }

    /// Opens what a descriptor in a file of its own names.
    fn described(
        &mut self,
        file: ImageFile,
        writable: bool,
    ) -> Result<(Vec<Piece>, Option<Descriptor>), OpenError> {
        if file.len() > descriptor::MAX_LEN {
            let text = "is neither a sparse VMDK nor a descriptor of one, which has 1 MiB at most";
            return Err(OpenError::new(file.path(), Errno::EINVAL, text));
        }
        let mut bytes = vec![0; usize::try_from(file.len()).unwrap_or(0)];
        let read = file.reader()?.read_exact_at(&mut bytes, 0);
        read.map_err(|error| OpenError::io(file.path(), "cannot be read", &error))?;
        let text = descriptor::text(&bytes).map_err(|error| refuse(file.path(), &error))?;
        let parsed = Text::parse(&bytes).map_err(|error| refuse(file.path(), &error))?;
        parsed.sectors().map_err(|error| refuse(file.path(), &error))?;
        let folder = canonical(file.path())?.parent().unwrap_or(Path::new("/")).to_owned();
        let mut pieces = Vec::new();
        let mut first = 0;
        for extent in &parsed.extents {
            let writable = writable && extent.writable;
            let storage = self.open_extent(&folder, extent, first, writable)?;
            let sectors = extent.sectors;
            pieces.push(Piece { first, sectors, writable, storage, dirty: Cell::new(false) });
            first += sectors;
        }
        let changed = descriptor::with_new_cid(text).filter(|new| writable && new.len() == text.len());
        let descriptor = changed.map(|text| {
            let writer = file.writer()?;
            Ok(Descriptor { _file: file, writer, text, changed: Cell::new(false) })
        });
        Ok((pieces, descriptor.transpose()?))
    }

    fn open_extent(
        &mut self,
        folder: &Path,
        extent: &Extent,
        first: u64,
        writable: bool,
    ) -> Result<Storage, OpenError> {
        if extent.storage == descriptor::Storage::Zero {
            return Ok(Storage::Zero);
        }
        let path = find(folder, &extent.name)?;
        let mode = if writable { Mode::Exclusive } else { Mode::Shared };
        let mut file = ImageFile::open_unlocked(&path, mode, !self.params.buffered)?;
        // Before the lock: a descriptor that names itself would otherwise be told to be in use, by ourselves.
        self.enter(&file)?;
        file.lock(mode)?;
        let too_short = |found: u64| {
            let text =
                format!("has {found} sectors, fewer than the {} that its descriptor says", extent.sectors);
            OpenError::new(&path, Errno::EINVAL, text)
        };
        match extent.storage {
            descriptor::Storage::Flat { offset } => {
                let found = (file.len() / SECTOR_SIZE).saturating_sub(offset);
                if found < extent.sectors {
                    return Err(too_short(found));
                }
                Ok(Storage::Flat(Box::new(file), offset * SECTOR_SIZE))
            }
            _ => {
                let core = open_sparse(&file, writable)?;
                if core.sectors() < extent.sectors {
                    return Err(too_short(core.sectors()));
                }
                Ok(Storage::Sparse(Box::new(Formatted::piece(file, core, first, self.io))))
            }
        }
    }
}

/// The canonical path of an extent.
fn find(folder: &Path, name: &str) -> Result<PathBuf, OpenError> {
    let path = folder.join(name);
    let found =
        porter::resolve(&path).map_err(|error| OpenError::io(&path, "cannot find the extent", &error))?;
    if found.parent() == Some(folder) {
        return Ok(found);
    }
    let text =
        format!("leads to {}, out of the folder of its descriptor, and is not opened", found.display());
    Err(OpenError::new(&path, Errno::EPERM, text))
}

fn open_sparse(file: &ImageFile, writable: bool) -> Result<Sparse, OpenError> {
    let reader = file.reader()?;
    let mut read = |offset: u64, bytes: &mut [u8]| reader.read_exact_at(bytes, offset);
    let source = Source { size: file.len(), regular: file.is_regular(), read: &mut read };
    let options = OpenOptions { writable, ..OpenOptions::default() };
    vmdk::open(source, &options).map_err(|error| refuse(file.path(), &error))
}

fn refuse(path: &Path, error: &vmdk::Error) -> OpenError {
    OpenError::new(path, Errno::from_raw(error.errno()), error.to_string())
}
