//! An image's file or block device: opened, measured and locked.
//!
//! **The lock** is an OFD lock, which the kernel releases when the last descriptor is closed and the last I/O in flight
//! has ended, so that it fences even a killed process. A writer locks the whole file exclusively. A reader locks byte 0,
//! which our writers collide with, and byte 201 (QEMU's "nobody else may write", `block/file-posix.c`), which QEMU's
//! writers collide with while its readers do not. A writer's lock covers QEMU's bytes too.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::OpenError;

const QEMU_UNSHARE_WRITE: i64 = 201;

/// Who may use the file beside us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// We write; nobody else has it open.
    Exclusive,
    /// We read; others may read too.
    Shared,
}

/// An open image file.
#[derive(Debug)]
pub struct ImageFile {
    path: PathBuf,
    /// Replaced only while no I/O is in flight, see [`ImageFile::make_readonly`].
    file: RefCell<File>,
    regular: bool,
    direct: bool,
    block_size: u32,
    len: u64,
}

impl ImageFile {
    /// Opens and locks `path`. With `direct`, past the page cache where the file system allows it.
    pub fn open(path: &Path, mode: Mode, direct: bool) -> Result<ImageFile, OpenError> {
        let file = ImageFile::open_unlocked(path, mode, direct)?;
        file.lock(mode)?;
        Ok(file)
    }

    /// Opens `path`, for who looks at it before locking it.
    pub fn open_unlocked(path: &Path, mode: Mode, direct: bool) -> Result<ImageFile, OpenError> {
        let error = |errno: Errno| OpenError::file(path, "cannot open", errno);
        // O_NONBLOCK: a FIFO must not hang us before its type is known.
        let plain = |flags: i32| {
            OpenOptions::new()
                .read(true)
                .write(mode == Mode::Exclusive)
                .custom_flags(libc::O_NONBLOCK | flags)
                .open(path)
                .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
        };
        let probe = plain(0).map_err(error)?;
        let metadata = probe.metadata().map_err(|e| OpenError::io(path, "cannot stat", &e))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::file(path, "is neither a file nor a block device:", Errno::EINVAL));
        }
        let block_size = if kind.is_block_device() { logical_block_size(metadata.rdev()) } else { 512 };
        // A store with blocks larger than a guest's sectors cannot take single sectors past the page cache.
        let (mut file, direct) = match direct && block_size == 512 {
            true => match plain(libc::O_DIRECT) {
                Ok(file) => (file, true),
                Err(Errno::EINVAL) => (probe, false),
                Err(errno) => return Err(error(errno)),
            },
            false => (probe, false),
        };
        let len = file.seek(SeekFrom::End(0)).map_err(|e| OpenError::io(path, "cannot measure", &e))?;
        Ok(ImageFile {
            path: path.to_owned(),
            file: RefCell::new(file),
            regular: kind.is_file(),
            direct,
            block_size,
            len,
        })
    }

    /// Takes the lock that `mode` needs.
    pub fn lock(&self, mode: Mode) -> Result<(), OpenError> {
        lock(&self.file.borrow(), mode).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => OpenError::in_use(&self.path, mode),
            errno => OpenError::file(&self.path, "cannot lock", errno),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A regular file, not a block device.
    pub fn is_regular(&self) -> bool {
        self.regular
    }

    /// Logical block size of a block device; 512 for files.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Length in bytes when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it had no byte when it was opened.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Calls `operation` with the descriptor.
    pub fn with<T>(&self, operation: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
        operation(self.file.borrow().as_fd())
    }

    /// Changes the length of a regular file.
    pub fn set_len(&self, len: u64) -> Result<(), Errno> {
        self.file.borrow().set_len(len).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
    }

    /// The same file through another descriptor, for reading metadata while the image is being opened: blocking, and
    /// without the alignment rules of one that goes past the page cache.
    pub fn reader(&self) -> Result<File, OpenError> {
        self.reopen(0).map_err(|e| OpenError::io(&self.path, "cannot open for reading", &e))
    }

    /// Opens the file again, read-only. Through /proc, so that it is the same file whatever happened to its name.
    fn reopen(&self, flags: i32) -> std::io::Result<File> {
        let link = format!("/proc/self/fd/{}", self.file.borrow().as_raw_fd());
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | flags).open(link)
    }

    /// Gives up writing for good: from now on the descriptor itself refuses it, and other readers are let in.
    ///
    /// Only while no I/O is in flight.
    pub fn make_readonly(&self) -> Result<(), OpenError> {
        let old = self.file.borrow();
        lock(&old, Mode::Shared).map_err(|errno| OpenError::file(&self.path, "cannot share", errno))?;
        let file = self
            .reopen(if self.direct { libc::O_DIRECT } else { 0 })
            .map_err(|e| OpenError::io(&self.path, "cannot reopen read-only", &e))?;
        lock(&file, Mode::Shared).map_err(|errno| OpenError::file(&self.path, "cannot share", errno))?;
        drop(old);
        unlock(&self.file.replace(file));
        Ok(())
    }

    /// Device and inode, which name the file whatever its paths.
    pub fn identity(&self) -> std::io::Result<(u64, u64)> {
        let metadata = self.file.borrow().metadata()?;
        Ok(if self.regular { (metadata.dev(), metadata.ino()) } else { (0, metadata.rdev()) })
    }
}

impl Drop for ImageFile {
    /// Gives the lock up at once. All I/O has ended: every transfer borrows the file. Closing the descriptor alone would
    /// keep the lock a little longer, as io_uring lets go of its own references later, and who opens the image next would
    /// find it in use.
    fn drop(&mut self) {
        unlock(&self.file.borrow());
    }
}

fn unlock(file: &File) {
    if let Err(errno) = set_lock(file, libc::F_UNLCK, 0, 0) {
        log::warn!("giving up the lock of an image failed: {errno}");
    }
}

fn set_lock(file: &File, kind: i32, start: i64, len: i64) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: i16::try_from(kind).map_err(|_| Errno::EINVAL)?,
        l_whence: 0,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

fn lock(file: &File, mode: Mode) -> Result<(), Errno> {
    match mode {
        // Length 0 reaches to the end of the file, however long it grows.
        Mode::Exclusive => set_lock(file, libc::F_WRLCK, 0, 0),
        Mode::Shared => {
            set_lock(file, libc::F_RDLCK, 0, 1)?;
            set_lock(file, libc::F_RDLCK, QEMU_UNSHARE_WRITE, 1)?;
            set_lock(file, libc::F_UNLCK, 1, QEMU_UNSHARE_WRITE - 1)?;
            set_lock(file, libc::F_UNLCK, QEMU_UNSHARE_WRITE + 1, 0)
        }
    }
}

/// Reads `/sys/dev/block/M:N/queue/logical_block_size` (of the whole disk for a partition); 512 where it cannot be told.
fn logical_block_size(rdev: u64) -> u32 {
    let device = format!("/sys/dev/block/{}:{}", libc::major(rdev), libc::minor(rdev));
    [format!("{device}/queue/logical_block_size"), format!("{device}/../queue/logical_block_size")]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok())
        .unwrap_or(512)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn image() -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        file
    }

    #[test]
    fn a_second_writer_is_refused_and_the_message_names_the_file() {
        let file = image();
        let first = ImageFile::open(file.path(), Mode::Exclusive, true).unwrap();
        let error = ImageFile::open(file.path(), Mode::Exclusive, true).unwrap_err();
        assert_eq!(error.errno(), Errno::EBUSY);
        assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
        assert_eq!(ImageFile::open(file.path(), Mode::Shared, true).unwrap_err().errno(), Errno::EBUSY);
        drop(first);
        ImageFile::open(file.path(), Mode::Exclusive, true).unwrap();
    }

    #[test]
    fn readers_share_and_keep_writers_out() {
        let file = image();
        let first = ImageFile::open(file.path(), Mode::Shared, true).unwrap();
        let second = ImageFile::open(file.path(), Mode::Shared, false).unwrap();
        assert_eq!(ImageFile::open(file.path(), Mode::Exclusive, true).unwrap_err().errno(), Errno::EBUSY);
        drop((first, second));
        ImageFile::open(file.path(), Mode::Exclusive, true).unwrap();
    }

    #[test]
    fn made_readonly_the_descriptor_refuses_writes_and_lets_readers_in() {
        let file = image();
        let image = ImageFile::open(file.path(), Mode::Exclusive, false).unwrap();
        image.make_readonly().unwrap();
        assert!(image.file.borrow().write_at(b"x", 0).is_err());
        ImageFile::open(file.path(), Mode::Shared, true).unwrap();
        assert_eq!(ImageFile::open(file.path(), Mode::Exclusive, true).unwrap_err().errno(), Errno::EBUSY);
    }

    #[test]
    fn a_fifo_and_a_folder_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(ImageFile::open(&fifo, Mode::Shared, true).unwrap_err().errno(), Errno::EINVAL);
        assert_eq!(ImageFile::open(dir.path(), Mode::Shared, true).unwrap_err().errno(), Errno::EINVAL);
    }
}
