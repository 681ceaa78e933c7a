//! Making the new leaf of a snapshot: an image that holds nothing yet, with the leaf so far as its parent.
//!
//! It is written under a name of its own, made durable, and only then given its real one: a file of that name is always a
//! whole image. Whoever finds it after a crash goes on with it, because a guest may have written to it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use blkif::ids::SECTOR_SIZE;
use format::FormatError;
use nix::errno::Errno;
use qcow::v2::Backing;
use tap_ctl::proto::{ImageSpec, ImageType, OpenParams};
use vhd::create::{NewImage, NewParent};
use vhd::{DiskType, Uuid, Vhd, chain};

use super::OpenError;
use crate::porter::{self, How};

/// What is to be written into a new file.
struct Content {
    writes: Vec<(u64, Vec<u8>)>,
    len: u64,
}

/// A new image. Unless it is kept, it is removed again.
#[derive(Debug)]
#[must_use]
pub struct Made {
    path: PathBuf,
    kept: bool,
}

impl Made {
    /// It stays.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = porter::remove(&self.path)
        {
            log::error!("{}: the new image cannot be removed: {error}", self.path.display());
        }
    }
}

/// Makes the image `child` of `sectors` sectors over the closed image that `parent` says how to open. Blocks.
///
/// # Errors
/// EEXIST if there is a file of that name; EOPNOTSUPP if the formats do not go together, or with a standby image; EROFS for a disk that is only read;
/// and those of the files.
pub fn create(parent: &OpenParams, sectors: u64, child: &ImageSpec) -> Result<Made, OpenError> {
    let path = PathBuf::from(&child.path);
    let refuse = |errno, text: &str| Err(OpenError::new(&path, errno, text));
    if parent.readonly {
        return refuse(Errno::EROFS, "a disk that is only read needs no snapshot");
    }
    if parent.standby {
        let text = "a disk with a standby image cannot have one: do without that first (tap-ctl pause, unpause -2 null)";
        return refuse(Errno::EOPNOTSUPP, text);
    }
    if porter::exists(&path).map_err(|e| OpenError::io(&path, "cannot look for", &e))? {
        return refuse(Errno::EEXIST, "exists already, and a snapshot makes a new image");
    }
    let folder = porter::resolve(folder_of(&path))
        .map_err(|e| OpenError::io(&path, "cannot find the folder of", &e))?;
    let below = Path::new(&parent.image.path);
    let below = porter::resolve(below).map_err(|e| OpenError::io(below, "cannot resolve", &e))?;
    let content = match (child.kind, parent.image.kind) {
        (ImageType::Vhd, ImageType::Vhd | ImageType::Aio | ImageType::Sync) => {
            vhd_child(parent.image.kind, &below, &folder, sectors)?
        }
        (ImageType::Qcow2, ImageType::Qcow2 | ImageType::Vhd | ImageType::Aio | ImageType::Sync) => {
            qcow2_child(parent.image.kind, &below, &folder, sectors)?
        }
        (child, parent) => {
            let text = format!("a {} image cannot be made over one of type {}", child.name(), parent.name());
            return refuse(Errno::EOPNOTSUPP, &text);
        }
    };
    publish(&folder, &path, &content).map_err(|e| OpenError::io(&path, "cannot create", &e))?;
    Ok(Made { path, kept: false })
}

fn vhd_child(kind: ImageType, parent: &Path, folder: &Path, sectors: u64) -> Result<Content, OpenError> {
    let io = |what, error: &io::Error| OpenError::io(parent, what, error);
    let vhd_error =
        |error: &vhd::Error| OpenError::new(parent, Errno::from_raw(error.errno()), error.to_string());
    let file = porter::open(parent, How::READ).map_err(|e| io("cannot open", &e))?;
    let metadata = file.metadata().map_err(|e| io("cannot stat", &e))?;
    let core = match kind {
        ImageType::Vhd => Some(read_vhd(&file, &metadata).map_err(|error| vhd_error(&error))?),
        _ => None,
    };
    let relative = chain::relative(folder, parent);
    let name = parent.file_name().and_then(|name| name.to_str());
    let (Some(path), Some(name)) = (relative.to_str(), name) else {
        return Err(OpenError::new(parent, Errno::EINVAL, "its path is not UTF-8, as a VHD needs it"));
    };
    let image = NewImage {
        kind: DiskType::Differencing,
        size: sectors.saturating_mul(SECTOR_SIZE),
        max_size: 0,
        block_size: vhd::header::DEFAULT_BLOCK_SIZE,
        uuid: Uuid::from_random(random().map_err(|e| io("no random bytes for the child of", &e))?),
        timestamp: now(),
        parent: Some(NewParent {
            uuid: core.as_ref().map_or(Uuid::NULL, Vhd::uuid),
            timestamp: vhd::time::from_unix(metadata.mtime()),
            name: name.to_owned(),
            path: path.to_owned(),
        }),
        key: core.as_ref().and_then(Vhd::key_hash),
    };
    let bytes = image.build(None).map_err(|error| vhd_error(&error))?;
    let writes = bytes.writes.into_iter().map(|write| (write.offset, write.bytes)).collect();
    Ok(Content { writes, len: bytes.len })
}

fn qcow2_child(kind: ImageType, parent: &Path, folder: &Path, sectors: u64) -> Result<Content, OpenError> {
    // As QEMU calls them.
    let format = match kind {
        ImageType::Qcow2 => "qcow2",
        ImageType::Vhd => "vpc",
        _ => "raw",
    };
    let backing = Backing {
        name: chain::relative(folder, parent).into_os_string().into_vec(),
        format: Some(format.to_owned()),
    };
    let image = qcow::v2::NewImage { backing: Some(backing), ..qcow::v2::NewImage::new(sectors) };
    let bytes =
        image.build().map_err(|e| OpenError::new(parent, Errno::from_raw(e.errno()), e.to_string()))?;
    let writes = bytes.writes.into_iter().map(|write| (write.offset, write.bytes)).collect();
    Ok(Content { writes, len: bytes.len })
}

fn read_vhd(file: &File, metadata: &fs::Metadata) -> Result<Vhd, vhd::Error> {
    let mut read = |offset: u64, bytes: &mut [u8]| file.read_exact_at(bytes, offset);
    let size = io::Seek::seek(&mut &*file, io::SeekFrom::End(0)).unwrap_or(0);
    let source = format::Source { size, regular: metadata.is_file(), read: &mut read };
    Vhd::open(source, &vhd::OpenOptions { allow_encrypted: true, ..vhd::OpenOptions::default() })
}

fn random() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes)
}

fn now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    vhd::time::from_unix(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// The folder that a path names.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What the image of a name is called, in the same folder, until it is whole: `pid` makes it.
pub(crate) fn draft_name(name: &OsStr, pid: u32) -> String {
    format!(".{}.{pid}", name.to_string_lossy())
}

/// Makes a durable file of a name that nobody has. If it cannot be finished, nothing is left.
fn publish(folder: &Path, path: &Path, content: &Content) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let draft = folder.join(draft_name(name, std::process::id()));
    let written = write_durably(&draft, content)
        // A link, because a rename would take the place of a file that has come meanwhile.
        .and_then(|()| porter::link(&draft, path))
        .and_then(|()| sync_folder(folder).inspect_err(|_| drop(porter::remove(path))));
    // What cannot be removed is in nobody's way.
    let _ = porter::remove(&draft);
    written
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    porter::open(folder, How { flags: libc::O_DIRECTORY, ..How::READ })?.sync_all()
}

fn write_durably(path: &Path, content: &Content) -> io::Result<()> {
    // Of a process that had our number and died.
    let _ = porter::remove(path);
    let file = porter::open(path, How { create: Some(0o666), ..How::WRITE })?;
    file.set_len(content.len)?;
    for (offset, bytes) in &content.writes {
        file.write_all_at(bytes, *offset)?;
    }
    file.sync_all()
}
