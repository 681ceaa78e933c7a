//! New images.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use format::blocking::Storage;
use format::{MetaWrite, SECTOR_SIZE};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tap_ctl::proto::ImageType;
use vhd::{DiskType, NewImage, Uuid, header};

use crate::source::format_name;

/// What a new image is to be.
#[derive(Debug, Clone)]
pub struct New {
    /// Its format.
    pub kind: ImageType,
    /// Bytes of the disk, a multiple of 512.
    pub size: u64,
}

/// An image that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Created {
    /// All of it reads as zeros; otherwise, as on a device with a raw image, it holds what was there before.
    pub blank: bool,
}

/// Why there is no new image.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The file.
    #[error("{}: {what}: {source}", path.display())]
    File {
        /// Its name.
        path: PathBuf,
        /// What could not be done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Somebody has it open.
    #[error("{}: is in use by another process (its lock is held)", path.display())]
    InUse {
        /// Its name.
        path: PathBuf,
    },
    /// No such image can exist.
    #[error("{}: {reason}", path.display())]
    Impossible {
        /// Its name.
        path: PathBuf,
        /// Why, in the format's words.
        reason: String,
    },
    /// Images of that format are only read, or are in no file.
    #[error("images of format {} cannot be created", format_name(*.0))]
    Format(ImageType),
}

/// What is written into an empty file.
struct Content {
    len: u64,
    writes: Vec<MetaWrite>,
}

impl New {
    /// Makes the image, in place of whatever the file holds, but never of an image that is in use. It is not durable yet.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn create(&self, path: &Path) -> Result<Created, CreateError> {
        let fail = |what| move |source| CreateError::File { path: path.to_owned(), what, source };
        // A wrong wish destroys nothing.
        self.content(path, None)?;
        let mut file = claim(path)?;
        let regular = file.is_regular().map_err(fail("neither a file nor a block device"))?;
        let size = file.size().map_err(fail("cannot measure"))?;
        let Content { len, writes } = self.content(path, (!regular).then_some(size))?;
        if regular {
            file.set_len(0).map_err(fail("cannot truncate"))?;
        } else if size < len {
            return Err(fail("too small")(Errno::ENOSPC.into()));
        } else if !self.is_raw() {
            // Old data must not show through tables that are not written.
            let end = writes.iter().map(|write| write.offset + write.bytes.len() as u64).max();
            file.zero(0..end.unwrap_or(0).min(len)).map_err(fail("cannot write"))?;
        }
        for write in &writes {
            file.write_at(write.offset, &write.bytes).map_err(fail("cannot write"))?;
        }
        if regular {
            file.set_len(len).map_err(fail("cannot set its length"))?;
        }
        Ok(Created { blank: regular || !self.is_raw() })
    }

    fn is_raw(&self) -> bool {
        matches!(self.kind, ImageType::Aio | ImageType::Sync)
    }

    /// What the image is made of, in a file, or on a device of so many bytes.
    fn content(&self, path: &Path, device: Option<u64>) -> Result<Content, CreateError> {
        let sectors = self.size / SECTOR_SIZE;
        let refuse = |reason: String| CreateError::Impossible { path: path.to_owned(), reason };
        let (len, writes) = match self.kind {
            ImageType::Aio | ImageType::Sync => (self.size, Vec::new()),
            ImageType::Vhd => {
                let image = self.vhd().map_err(|error| refuse(format!("it gets no identifier: {error}")))?;
                let bytes = image.build(device).map_err(|error| refuse(error.to_string()))?;
                (bytes.len, bytes.writes)
            }
            ImageType::Qcow2 => {
                let bytes = qcow::v2::NewImage::new(sectors).build();
                let bytes = bytes.map_err(|error| refuse(error.to_string()))?;
                (bytes.len, bytes.writes)
            }
            ImageType::Qcow => {
                let flavour = qcow::v1::Flavour::Qemu;
                let image = qcow::v1::NewImage { sectors, flavour, backing: None, encrypted: false };
                let bytes = image.build().map_err(|error| refuse(error.to_string()))?;
                (bytes.len, bytes.writes)
            }
            other => return Err(CreateError::Format(other)),
        };
        Ok(Content { len, writes })
    }

    fn vhd(&self) -> io::Result<NewImage> {
        let mut random = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut random)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(NewImage {
            kind: DiskType::Dynamic,
            size: self.size,
            max_size: 0,
            block_size: header::DEFAULT_BLOCK_SIZE,
            uuid: Uuid::from_random(random),
            timestamp: vhd::time::from_unix(i64::try_from(now).unwrap_or(i64::MAX)),
            parent: None,
            key: None,
        })
    }
}

/// Opens or makes the file; nobody else may have it open. The lock ends with the descriptor.
pub(crate) fn claim(path: &Path) -> Result<File, CreateError> {
    let fail = |what| move |source| CreateError::File { path: path.to_owned(), what, source };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK);
    let file = options.open(path).map_err(fail("cannot create"))?;
    let narrow = |number: i32| i16::try_from(number).unwrap_or(0);
    let (l_type, l_whence) = (narrow(libc::F_WRLCK), narrow(libc::SEEK_SET));
    let whole = libc::flock { l_type, l_whence, l_start: 0, l_len: 0, l_pid: 0 };
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(file),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(CreateError::InUse { path: path.to_owned() }),
        Err(errno) => Err(fail("cannot lock")(errno.into())),
    }
}
