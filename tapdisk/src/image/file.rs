//! An image's file or block device: opened, measured and locked.
//!
//! **The lock** is an OFD lock, which the kernel releases when the last descriptor is closed and the last I/O in flight
//! has ended, so that it fences even a killed process. A writer locks the whole file exclusively. A reader locks byte 0,
//! which our writers collide with, and byte 201 (QEMU's "nobody else may write", `block/file-posix.c`), which QEMU's
//! writers collide with while its readers do not. A writer's lock covers QEMU's bytes too.

use std::cell::{Cell, OnceCell, RefCell};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use blkif::ids::PAGE_SIZE;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::OpenError;
use super::cache::{Cache, Cached};
use super::locks::BlockLocks;
use super::store::Store;
use crate::buf::Piece;
use crate::executor::Scheduler;
use crate::io::errno_of;
use crate::porter::{self, How};
use crate::reactor::{FixedFile, Reactor, Target};

const QEMU_UNSHARE_WRITE: i64 = 201;

/// Who may use the file beside us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// We write; nobody else has it open.
    Exclusive,
    /// We read; others may read too.
    Shared,
}

/// A descriptor that may hold a lock.
///
/// It gives the lock up when the last handle lets go of it: all I/O has ended by then, because every operation borrows a
/// handle. Closing the descriptor alone would keep the lock a little longer, as io_uring lets go of its own references
/// later, and who opens the image next would find it in use.
#[derive(Debug)]
pub struct Locked(File);

impl Locked {
    /// The open file.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl From<File> for Locked {
    fn from(file: File) -> Locked {
        Locked(file)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if let Err(errno) = set_lock(&self.0, libc::F_UNLCK, 0, 0) {
            log::warn!("giving up the lock of an image failed: {errno}");
        }
    }
}

/// An open image file, for one thread.
#[derive(Debug)]
pub struct ImageFile {
    path: PathBuf,
    /// Replaced only while no I/O is in flight, see [`ImageFile::make_readonly`].
    file: RefCell<Arc<Locked>>,
    regular: bool,
    direct: bool,
    len: u64,
    store: Store,
    granule: u32,
    memory_align: u32,
    locks: OnceCell<BlockLocks>,
    /// The same file through the page cache, for writing; see [`ImageFile::tail`].
    buffered: RefCell<Option<Rc<File>>>,
    flushes_deferred: Cell<bool>,
    /// Of `file`, as transfers name it.
    target: Cell<Target>,
    at_hand: RefCell<Option<FixedFile>>,
    cached: OnceCell<Cached>,
}

/// What another thread needs for an [`ImageFile`] of its own over the same descriptor.
#[derive(Debug)]
pub struct FileShare {
    path: PathBuf,
    file: Arc<Locked>,
    regular: bool,
    direct: bool,
    len: u64,
    store: Store,
}

impl From<FileShare> for ImageFile {
    fn from(share: FileShare) -> ImageFile {
        let FileShare { path, file, regular, direct, len, store } = share;
        // A registered buffer reaches the block layer as pages, and each piece of a page has to be whole blocks, whatever
        // alignment the device names: so for larger blocks memory lies at multiples of them.
        let (granule, memory_align) = match (direct, store.block_size) {
            (true, 512) => (512, store.memory_align),
            (true, block) => (block, store.memory_align.max(block)),
            (false, _) => (512, 1),
        };
        ImageFile {
            path,
            target: Cell::new(file.file().as_fd().into()),
            at_hand: RefCell::new(None),
            file: RefCell::new(file),
            regular,
            direct,
            len,
            store,
            granule,
            memory_align,
            locks: OnceCell::new(),
            buffered: RefCell::new(None),
            cached: OnceCell::new(),
            flushes_deferred: Cell::new(false),
        }
    }
}

impl ImageFile {
    /// Opens and locks `path`. With `direct`, past the page cache where the file system allows it.
    pub fn open(path: &Path, mode: Mode, direct: bool) -> Result<ImageFile, OpenError> {
        let mut file = ImageFile::open_unlocked(path, mode, direct)?;
        file.lock(mode)?;
        Ok(file)
    }

    /// Opens and locks `path`, through the page cache, for a store that refuses O_DIRECT but must not lose what was answered:
    /// the kernel ends a write when it is durable (O_DSYNC).
    pub fn open_synchronous(path: &Path, mode: Mode) -> Result<ImageFile, OpenError> {
        let mut file = ImageFile::open_with(path, mode, false, libc::O_DSYNC)?;
        file.lock(mode)?;
        Ok(file)
    }

    /// Opens `path`, for who looks at it before locking it; its length is known from then on only.
    pub fn open_unlocked(path: &Path, mode: Mode, direct: bool) -> Result<ImageFile, OpenError> {
        ImageFile::open_with(path, mode, direct, 0)
    }

    /// A regular file that is open already and needs no lock, as it has no name that others could open it by.
    pub fn nameless(name: &str, file: Arc<Locked>) -> std::io::Result<ImageFile> {
        let metadata = file.file().metadata()?;
        let mut store = Store::of(file.file(), &metadata, true);
        store.try_file(file.file())?;
        let (path, len) = (PathBuf::from(name), metadata.len());
        Ok(FileShare { path, file, regular: true, direct: false, len, store }.into())
    }

    fn open_with(path: &Path, mode: Mode, direct: bool, flags: i32) -> Result<ImageFile, OpenError> {
        let error = |errno: Errno| OpenError::file(path, "cannot open", errno);
        // O_NONBLOCK: a FIFO must not hang us before its type is known.
        let plain = |more: i32| {
            let how = quietly(mode == Mode::Exclusive, flags | more);
            porter::open(path, how).map_err(|e| errno_of(&e))
        };
        let probe = plain(0).map_err(error)?;
        let metadata = probe.metadata().map_err(|e| OpenError::io(path, "cannot stat", &e))?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::file(path, "is neither a file nor a block device:", Errno::EINVAL));
        }
        let store = Store::of(&probe, &metadata, mode == Mode::Exclusive);
        // Parts of a block go through a page of memory, so a block must fit in.
        let (file, direct) = match direct && store.block_size as usize <= PAGE_SIZE {
            true => match plain(libc::O_DIRECT) {
                Ok(file) => (file, true),
                Err(Errno::EINVAL) => (probe, false),
                Err(errno) => return Err(error(errno)),
            },
            false => (probe, false),
        };
        let file = Arc::new(Locked(file));
        Ok(FileShare { path: path.to_owned(), file, regular: kind.is_file(), direct, len: 0, store }.into())
    }

    /// Takes the lock that `mode` needs. What the last writer has left is looked at from now on.
    pub fn lock(&mut self, mode: Mode) -> Result<(), OpenError> {
        let locked = self.keep();
        lock(locked.file(), mode).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => {
                OpenError::in_use(&self.path, mode, &porter::holder(locked.file().as_fd()))
            }
            errno => OpenError::file(&self.path, "cannot lock", errno),
        })?;
        self.len = self.measure().map_err(|errno| OpenError::file(&self.path, "cannot measure", errno))?;
        if mode == Mode::Exclusive && self.regular {
            let tried = self.store.try_file(locked.file());
            tried.map_err(|e| OpenError::io(&self.path, "cannot stat", &e))?;
        }
        Ok(())
    }

    /// Whether nobody could open it again: it has no name, or has lost it.
    pub fn is_nameless(&self) -> bool {
        self.regular && self.keep().file().metadata().is_ok_and(|metadata| metadata.nlink() == 0)
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A regular file, not a block device.
    pub fn is_regular(&self) -> bool {
        self.regular
    }

    /// What the store asks for and can do.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Bytes; offsets and lengths of transfers are multiples of it.
    pub fn granule(&self) -> u32 {
        self.granule
    }

    /// Has what is read of it kept in a cache. Only for a file that nobody writes while it is open.
    pub fn keep_in(&self, cache: &Arc<Cache>) -> std::io::Result<()> {
        let cached = cache.enter(self)?;
        self.cached.get_or_init(|| cached);
        Ok(())
    }

    /// Its share in a cache.
    pub fn cached(&self) -> Option<&Cached> {
        self.cached.get()
    }

    /// Whether a transfer can go to the descriptor as it is.
    pub fn takes(&self, offset: u64, piece: Piece) -> bool {
        let position = (offset | u64::from(piece.len)) & u64::from(self.granule - 1);
        let address = piece.ptr.addr().get() & (self.memory_align as usize - 1);
        position == 0 && address == 0
    }

    /// The writes under way, if the store's blocks are larger than a guest's sectors.
    pub fn locks(&self, scheduler: &Rc<Scheduler>) -> Option<&BlockLocks> {
        (self.granule > 512).then(|| self.locks.get_or_init(|| BlockLocks::new(scheduler.clone())))
    }

    /// A descriptor for writing a part of a block that ends at `end`, if that lies behind the end of a regular file.
    ///
    /// Writing the whole block past the page cache would round the file's length up, and the end of a file has a meaning.
    /// The page cache takes single bytes; the kernel keeps it in step with what goes past it.
    pub fn tail(&self, end: u64) -> Result<Option<Rc<File>>, Errno> {
        if !self.regular || end <= self.measure()? {
            return Ok(None);
        }
        let mut buffered = self.buffered.borrow_mut();
        if let Some(file) = &*buffered {
            return Ok(Some(file.clone()));
        }
        let file = self.reopen(true, 0).map_err(|e| errno_of(&e))?;
        Ok(Some(buffered.insert(Rc::new(file)).clone()))
    }

    /// Whether nothing is to be made durable for now.
    pub fn are_flushes_deferred(&self) -> bool {
        self.flushes_deferred.get()
    }

    /// From now on, or no more, flushing does nothing.
    pub fn defer_flushes(&self, defer: bool) {
        self.flushes_deferred.set(defer);
    }

    /// Length in bytes when it was locked.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// As if the store had blocks of this size: I/O is aligned to them, although the file under a test would take less.
    #[cfg(test)]
    pub fn with_block_size(mut self, block_size: u32) -> ImageFile {
        self.granule = block_size;
        self.store.block_size = block_size;
        self.store.physical_block_size = block_size;
        self
    }

    /// As if the store took memory at multiples of this only.
    #[cfg(test)]
    pub fn with_memory_align(mut self, memory_align: u32) -> ImageFile {
        self.memory_align = memory_align;
        self
    }

    /// Whether it had no byte when it was locked.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Length in bytes now.
    pub fn measure(&self) -> Result<u64, Errno> {
        let file = self.file.borrow();
        let mut file = file.file();
        let len = match self.regular {
            true => file.metadata().map(|metadata| metadata.len()),
            false => file.seek(SeekFrom::End(0)),
        };
        len.map_err(|e| errno_of(&e))
    }

    /// The file, for transfers.
    pub fn target(&self) -> Target {
        self.target.get()
    }

    /// Has the thread's engine keep the file at hand.
    pub fn register(&self, reactor: &Rc<Reactor>) {
        let fixed = reactor.fix_file(self.file.borrow().file().as_fd());
        self.target.set(fixed.target());
        self.at_hand.replace(Some(fixed));
    }

    /// Calls `operation` with the descriptor.
    pub fn with<T>(&self, operation: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
        operation(self.file.borrow().file().as_fd())
    }

    /// The descriptor, to be kept while another thread works on it.
    pub fn keep(&self) -> Arc<Locked> {
        self.file.borrow().clone()
    }

    /// For a handle on another thread.
    pub fn share(&self) -> FileShare {
        FileShare {
            path: self.path.clone(),
            file: self.keep(),
            regular: self.regular,
            direct: self.direct,
            len: self.len,
            store: self.store,
        }
    }

    /// Changes the length of a regular file.
    pub fn set_len(&self, len: u64) -> Result<(), Errno> {
        self.file.borrow().file().set_len(len).map_err(|e| errno_of(&e))
    }

    /// The same file through another descriptor, for reading metadata while the image is being opened: blocking, and
    /// without the alignment rules of one that goes past the page cache.
    pub fn reader(&self) -> Result<File, OpenError> {
        self.reopen(false, 0).map_err(|e| OpenError::io(&self.path, "cannot open for reading", &e))
    }

    /// The same for writing: for the repair of an image while it is being opened, and for short texts.
    pub fn writer(&self) -> Result<File, OpenError> {
        self.reopen(true, 0).map_err(|e| OpenError::io(&self.path, "cannot open for writing", &e))
    }

    /// Opens the file again, whatever happened to its name.
    fn reopen(&self, write: bool, flags: i32) -> std::io::Result<File> {
        porter::again(self.file.borrow().file().as_fd(), quietly(write, flags))
    }

    /// Gives up writing for good: from now on the descriptor itself refuses it, and other readers are let in. Handles on
    /// other threads keep theirs.
    ///
    /// Only while no I/O is in flight.
    pub fn make_readonly(&self) -> Result<(), OpenError> {
        let old = self.file.borrow();
        lock(old.file(), Mode::Shared).map_err(|errno| OpenError::file(&self.path, "cannot share", errno))?;
        let file = self
            .reopen(false, if self.direct { libc::O_DIRECT } else { 0 })
            .map_err(|e| OpenError::io(&self.path, "cannot reopen read-only", &e))?;
        lock(&file, Mode::Shared).map_err(|errno| OpenError::file(&self.path, "cannot share", errno))?;
        drop(old);
        let at_hand = self.at_hand.take().map(|old| old.replace(file.as_fd()));
        self.target.set(at_hand.as_ref().map_or_else(|| file.as_fd().into(), FixedFile::target));
        self.at_hand.replace(at_hand);
        self.file.replace(Arc::new(Locked(file)));
        self.buffered.take();
        Ok(())
    }

    /// Device and inode, which name the file whatever its paths.
    pub fn identity(&self) -> std::io::Result<(u64, u64)> {
        let metadata = self.file.borrow().file().metadata()?;
        Ok(if self.regular { (metadata.dev(), metadata.ino()) } else { (0, metadata.rdev()) })
    }
}

/// Without waiting, and without leaving a time of access behind at each read, which costs.
fn quietly(write: bool, flags: i32) -> How {
    How { write, create: None, flags: flags | libc::O_NONBLOCK | libc::O_NOATIME }
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
        assert!(image.file.borrow().file().write_at(b"x", 0).is_err());
        ImageFile::open(file.path(), Mode::Shared, true).unwrap();
        assert_eq!(ImageFile::open(file.path(), Mode::Exclusive, true).unwrap_err().errno(), Errno::EBUSY);
    }

    #[test]
    fn a_synchronous_file_is_locked_and_each_write_waits_for_the_store() {
        let file = image();
        let image = ImageFile::open_synchronous(file.path(), Mode::Exclusive).unwrap();
        assert_eq!(ImageFile::open(file.path(), Mode::Shared, true).unwrap_err().errno(), Errno::EBUSY);
        let flags = fcntl(image.file.borrow().file(), FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & (libc::O_DSYNC | libc::O_DIRECT), libc::O_DSYNC);
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
