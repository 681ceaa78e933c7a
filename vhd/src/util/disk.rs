//! Images in files and on block devices, with their parents, for the command-line tools.

use std::fs::{File, OpenOptions as FileOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::chain::{self, Policy, Visited};
use crate::journal::{Journal, State};
use crate::transfer::Run;
use crate::{Error, OpenOptions, SECTOR_SIZE, Vhd};
use format::blocking::Storage;
use format::{Format, Load, Lookup, Source};

/// A file or block device that holds an image.
#[derive(Debug)]
pub struct Disk {
    file: File,
    /// Its canonical path.
    pub path: PathBuf,
    /// Its length in bytes.
    pub size: u64,
    /// True for a file, false for a block device.
    pub regular: bool,
    /// Device and inode number.
    pub identity: (u64, u64),
    /// Time of the last change in Unix seconds.
    pub changed: i64,
}

impl Disk {
    /// Opens a file or block device, to write too if `writable`.
    ///
    /// # Errors
    /// Those of the operating system, and `EINVAL` for anything else, on which it does not block.
    pub fn open(path: &Path, writable: bool) -> io::Result<Self> {
        let path = path.canonicalize()?;
        recover(&path)?;
        Self::open_as_is(path, writable)
    }

    /// Opens the file at a canonical path, in whatever state an interrupted operation has left it.
    fn open_as_is(path: PathBuf, writable: bool) -> io::Result<Self> {
        let mut options = FileOptions::new();
        options.read(true).write(writable).custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
        Self::new(options.open(&path)?, path)
    }

    /// Looks at the length again.
    pub(super) fn measure(&mut self) -> io::Result<()> {
        self.size = self.file.size()?;
        Ok(())
    }

    /// Takes an open file.
    pub(super) fn new(mut file: File, path: PathBuf) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        let regular = kind.is_file();
        if !regular && !kind.is_block_device() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let size = file.seek(SeekFrom::End(0))?;
        let identity = (metadata.dev(), metadata.ino());
        Ok(Self { file, path, size, regular, identity, changed: metadata.mtime() })
    }

    /// Keeps others away as long as this disk is open. `exclusive` keeps everybody away; otherwise others may go on reading,
    /// but nobody may write. The bytes are those that tapdisk and QEMU lock: a writer locks all, a reader byte 0 and QEMU's
    /// byte for "nobody else may write" (`block/file-posix.c`).
    pub(super) fn lock(&self, exclusive: bool) -> io::Result<()> {
        let ranges: &[(i64, i64)] = if exclusive { &[(0, 0)] } else { &[(0, 1), (201, 1)] };
        let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        ranges.iter().try_for_each(|&(start, len)| self.lock_range(kind, start, len))
    }

    fn lock_range(&self, kind: libc::c_int, start: i64, len: i64) -> io::Result<()> {
        let lock = libc::flock {
            l_type: lock_type(kind),
            l_whence: lock_type(libc::SEEK_SET),
            l_start: start,
            l_len: len,
            l_pid: 0,
        };
        fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)).map_err(|errno| match errno {
            Errno::EAGAIN | Errno::EACCES => io::Error::from_raw_os_error(libc::EBUSY),
            errno => errno.into(),
        })?;
        Ok(())
    }

    /// Lets readers go on, but no writer and nobody else who does this: for changes that readers of the chain cannot see,
    /// because a child hides them.
    pub(super) fn lock_beside_readers(&self) -> io::Result<()> {
        self.lock(false)?;
        self.lock_range(libc::F_WRLCK, 1, 1)
    }

    /// Gives a view of the image to `use_source`.
    pub fn with_source<T>(&self, use_source: impl FnOnce(&mut Source<'_>) -> T) -> T {
        let mut read = |offset, buf: &mut [u8]| self.file.read_exact_at(buf, offset);
        use_source(&mut Source { size: self.size, regular: self.regular, read: &mut read })
    }

    /// Opens the image in it.
    ///
    /// # Errors
    /// Those of [`Vhd::open`].
    pub fn vhd(&self, options: &OpenOptions) -> Result<Vhd, Error> {
        self.with_source(|source| {
            Vhd::open(Source { size: source.size, regular: source.regular, read: source.read }, options)
        })
    }

    /// The folder that it lies in.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Makes the file and its name durable.
    pub(super) fn sync_name(&self) -> io::Result<()> {
        self.file.sync_all()?;
        if self.regular { sync_folder(&self.path) } else { Ok(()) }
    }
}

impl Storage for Disk {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        Storage::read_at(&self.file, offset, buf)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        Storage::write_at(&mut self.file, offset, bytes)
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn is_regular(&self) -> io::Result<bool> {
        Ok(self.regular)
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        Storage::set_len(&mut self.file, len)
    }

    fn sync(&mut self) -> io::Result<()> {
        Storage::sync(&mut self.file)
    }

    fn punch(&mut self, range: Range<u64>) -> io::Result<()> {
        self.file.punch(range)
    }
}

/// An image or raw file of a chain.
#[derive(Debug)]
pub struct Layer {
    /// The file.
    pub disk: Disk,
    /// The image in it; `None` for a raw file.
    pub vhd: Option<Vhd>,
}

/// Opens the parent of an image.
///
/// # Errors
/// `None` of a layer without parent is no error. Otherwise those of [`chain`], and the last one met on the paths tried.
pub fn open_parent(disk: &Disk, vhd: &Vhd, options: &OpenOptions) -> Result<Option<Layer>, Error> {
    let Some(parent) = vhd.parent() else { return Ok(None) };
    let io = |source| Error::Io { what: "parent image", offset: 0, source };
    let mut last = Error::NoParentName;
    for path in chain::candidates(disk.folder(), &parent)? {
        let found = match Disk::open(&path, false) {
            Ok(found) => found,
            Err(error) => {
                last = io(error);
                continue;
            }
        };
        Policy::trusting().permit(&found.path, parent.uuid.is_null())?;
        if parent.uuid.is_null() {
            return Ok(Some(Layer { disk: found, vhd: None }));
        }
        let vhd = found.vhd(options)?;
        chain::check_identity(&parent, vhd.uuid())?;
        return Ok(Some(Layer { disk: found, vhd: Some(vhd) }));
    }
    Err(last)
}

/// Opens the chain of an image, the image itself first.
///
/// # Errors
/// As [`open_parent`], [`Error::Loop`] and [`Error::TooDeep`].
pub fn open_chain(disk: Disk, vhd: Vhd, options: &OpenOptions) -> Result<Vec<Layer>, Error> {
    let mut visited = Visited::default();
    let mut layers = Vec::new();
    let mut next = Some(Layer { disk, vhd: Some(vhd) });
    while let Some(layer) = next {
        let (device, inode) = layer.disk.identity;
        visited.enter(device, inode)?;
        if let Some(vhd) = &layer.vhd {
            visited.identify(vhd.uuid())?;
        }
        next = match &layer.vhd {
            Some(vhd) => open_parent(&layer.disk, vhd, options)?,
            None => None,
        };
        layers.push(layer);
    }
    Ok(layers)
}

/// Reads whole sectors of a chain into `buf`, whose length is a multiple of 512.
///
/// # Errors
/// Those of the layers.
pub fn read_chain(layers: &mut [Layer], sector: u64, buf: &mut [u8]) -> Result<(), Error> {
    let mut done = 0_usize;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = sector.saturating_add(done as u64 / SECTOR_SIZE);
        let wanted = u32::try_from(rest.len() as u64 / SECTOR_SIZE).unwrap_or(u32::MAX);
        let found = locate(layers, at, wanted)?;
        let len = usize::try_from(u64::from(found.count).saturating_mul(SECTOR_SIZE)).unwrap_or(usize::MAX);
        let part = rest.get_mut(..len).unwrap_or_default();
        match found.place {
            None => part.fill(0),
            Some((disk, offset)) => {
                disk.read_at(offset, part).map_err(|source| data_error(offset, source))?
            }
        }
        done = done.saturating_add(len);
    }
    Ok(())
}

/// The run that begins at `sector` of a chain whose disk has `sectors`, with its data if a layer has it.
pub(super) fn runs(layers: &mut [Layer], sector: u64, sectors: u64) -> Result<Run, Error> {
    const MOST: u64 = 2048;
    let wanted = u32::try_from(sectors.saturating_sub(sector).min(MOST)).unwrap_or(u32::MAX);
    let Found { place, count } = locate(layers, sector, wanted)?;
    let data = match place {
        None => None,
        Some((disk, offset)) => {
            let len = u64::from(count).saturating_mul(SECTOR_SIZE);
            let mut data = vec![0; usize::try_from(len).unwrap_or(0)];
            disk.read_at(offset, &mut data).map_err(|source| data_error(offset, source))?;
            Some(data)
        }
    };
    Ok(Run { count, data })
}

/// A run of sectors with the place of its data, `None` for zeros.
struct Found<'a> {
    place: Option<(&'a Disk, u64)>,
    count: u32,
}

/// Goes down a chain until a layer has the sector.
fn locate(layers: &mut [Layer], sector: u64, wanted: u32) -> Result<Found<'_>, Error> {
    let mut count = wanted;
    for Layer { disk, vhd } in layers {
        let Some(vhd) = vhd else { return Ok(locate_raw(disk, sector, count)) };
        // A parent may be smaller than its child; behind its end there are zeros.
        count = match within(vhd.sectors(), sector, count) {
            0 => break,
            within => within,
        };
        loop {
            match vhd.map(sector, count)? {
                Lookup::Data { offset, count } => return Ok(Found { place: Some((disk, offset)), count }),
                Lookup::Zero { count } => return Ok(Found { place: None, count }),
                Lookup::Parent { count: absent } => {
                    count = absent;
                    break;
                }
                Lookup::Load(load) => {
                    let Load { offset, len, .. } = load;
                    let mut bits = vec![0; usize::try_from(len).unwrap_or(0)];
                    disk.read_at(offset, &mut bits).map_err(|source| data_error(offset, source))?;
                    vhd.loaded(&load, &bits)?;
                }
                Lookup::Packed { .. } => return Err(Error::invalid("block", "a VHD has no compressed data")),
            }
        }
    }
    Ok(Found { place: None, count })
}

fn locate_raw(disk: &Disk, sector: u64, count: u32) -> Found<'_> {
    match within(disk.size / SECTOR_SIZE, sector, count) {
        0 => Found { place: None, count },
        count => Found { place: Some((disk, sector.saturating_mul(SECTOR_SIZE))), count },
    }
}

/// How many of `count` sectors from `sector` are on a disk of `sectors`.
fn within(sectors: u64, sector: u64, count: u32) -> u32 {
    u32::try_from(sectors.saturating_sub(sector)).unwrap_or(u32::MAX).min(count)
}

fn data_error(offset: u64, source: io::Error) -> Error {
    Error::Io { what: "data", offset, source }
}

/// The journal of a change of the parent of the image at `path`.
pub(super) fn journal_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".relink-journal");
    name.into()
}

/// Undoes a change of the parent that was cut short.
fn recover(path: &Path) -> io::Result<()> {
    let name = journal_of(path);
    let mut journal = match FileOptions::new().read(true).write(true).open(&name) {
        Ok(journal) => journal,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut disk = Disk::open_as_is(path.to_owned(), true)?;
    disk.lock(true)?;
    undo(&mut disk, &mut journal).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
    match std::fs::remove_file(&name) {
        // Whoever was at work has just ended.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done.and_then(|()| sync_folder(&name)),
    }
}

/// Writes back what a journal holds if the image needs it. A journal that is not complete is one of an image that was not
/// touched.
pub(super) fn undo(disk: &mut Disk, journal: &mut File) -> Result<(), Error> {
    match Journal::read(journal) {
        Err(Error::Invalid { .. }) => Ok(()),
        Err(error) => Err(error),
        Ok(saved) => match saved.state(disk)? {
            State::Whole => Ok(()),
            State::Interrupted => saved.undo(disk),
        },
    }
}

/// Makes the names in the folder of `path` durable.
pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

/// The kernel's constants in the type of the lock's fields.
fn lock_type(constant: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(constant).unwrap_or_default()
}

/// Random bytes of the operating system.
pub(super) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn m22_only_files_and_block_devices_are_opened_and_nothing_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [&fifo, folder.path(), Path::new("/dev/null")] {
            let error = Disk::open(path, false).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{}", path.display());
        }
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        File::create(&path).unwrap();
        let disk = || Disk::open(&path, true).unwrap();
        let (first, second) = (disk(), disk());
        first.lock(false).unwrap();
        second.lock(false).unwrap();
        assert_eq!(disk().lock(true).unwrap_err().raw_os_error(), Some(libc::EBUSY));
        drop((first, second));
        let writer = disk();
        writer.lock(true).unwrap();
        for exclusive in [false, true] {
            assert_eq!(disk().lock(exclusive).unwrap_err().raw_os_error(), Some(libc::EBUSY));
        }
    }

    #[test]
    fn m23_behind_the_end_of_a_smaller_parent_there_are_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("raw"), vec![7; 3 * 512]).unwrap();
        let run = |args: &[&str]| {
            let args = args.iter().map(|arg| arg.replace('@', &path("").display().to_string()).into());
            crate::util::run(args, &mut io::stdout(), &mut io::stderr())
        };
        assert_eq!(run(&["create", "-n", "@big", "-s", "4"]), 0);
        assert_eq!(run(&["snapshot", "-n", "@child", "-p", "@big"]), 0);
        let child = Disk::open(&path("child"), false).unwrap();
        let vhd = child.vhd(&OpenOptions::default()).unwrap();
        let raw = Layer { disk: Disk::open(&path("raw"), false).unwrap(), vhd: None };
        let mut layers = [Layer { disk: child, vhd: Some(vhd) }, raw];
        let mut buf = [1; 5 * 512];
        read_chain(&mut layers, 1, &mut buf).unwrap();
        assert!(buf[..1024].iter().all(|&b| b == 7) && buf[1024..].iter().all(|&b| b == 0));
    }
}
