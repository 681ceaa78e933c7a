//! New images.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use format::blocking::Storage;
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
    #[error("{}: {source}", path.display())]
    Vhd {
        /// Its name.
        path: PathBuf,
        /// Why.
        source: vhd::Error,
    },
    /// Images of that format are only read, or are in no file.
    #[error("images of format {} cannot be created", format_name(*.0))]
    Format(ImageType),
}

impl New {
    /// Makes the image, in place of whatever the file holds, but never of an image that is in use. It is not durable yet.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub fn create(&self, path: &Path) -> Result<Created, CreateError> {
        let fail = |what| move |source| CreateError::File { path: path.to_owned(), what, source };
        // A wrong wish destroys nothing.
        let vhd = match self.kind {
            ImageType::Aio | ImageType::Sync => None,
            ImageType::Vhd => Some(self.vhd().map_err(fail("no identifier"))?),
            other => return Err(CreateError::Format(other)),
        };
        let refuse = |source| CreateError::Vhd { path: path.to_owned(), source };
        if let Some(image) = &vhd {
            image.build(None).map_err(refuse)?;
        }
        let mut file = claim(path)?;
        let regular = file.is_regular().map_err(fail("neither a file nor a block device"))?;
        let size = file.size().map_err(fail("cannot measure"))?;
        if regular {
            file.set_len(0).map_err(fail("cannot truncate"))?;
        }
        let Some(image) = vhd else {
            if regular {
                file.set_len(self.size).map_err(fail("cannot set its length"))?;
            } else if size < self.size {
                return Err(fail("too small")(Errno::ENOSPC.into()));
            }
            return Ok(Created { blank: regular });
        };
        let bytes = image.build((!regular).then_some(size)).map_err(refuse)?;
        for write in &bytes.writes {
            file.write_at(write.offset, &write.bytes).map_err(fail("cannot write"))?;
        }
        if regular {
            file.set_len(bytes.len).map_err(fail("cannot set its length"))?;
        }
        Ok(Created { blank: true })
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
