//! A driver that carries out one thing after another with plain blocking calls: for tools, tests and fuzzers.
//!
//! One request is under way at a time. A write is over when it has been committed; it survives the death of the process
//! then, and the loss of power after [`Blocking::flush`].

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::{
    DiscardPlan, Format, FormatError, Load, Lookup, Packed, Plan, SECTOR_SIZE, Sector, Source, Step, Write,
};

/// What an image lies in: a file, a block device, or something that passes for one. Offsets and lengths are in bytes.
pub trait Storage {
    /// Fills the buffer from `offset` on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the storage ends before; what else the storage says.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of it. Whatever lies between the old end of a regular file and `offset` becomes zeros.
    ///
    /// # Errors
    /// Those of the storage; some of the bytes may have been written then.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Length in bytes.
    ///
    /// # Errors
    /// Those of the storage.
    fn size(&self) -> io::Result<u64>;

    /// True for a regular file, whose length can be changed; false for a device.
    ///
    /// # Errors
    /// Those of the storage.
    fn is_regular(&self) -> io::Result<bool>;

    /// Changes the length; new bytes are zeros.
    ///
    /// # Errors
    /// Those of the storage; devices keep their length.
    fn set_len(&mut self, len: u64) -> io::Result<()>;

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// Those of the storage; what was written since the last success may be lost then.
    fn sync(&mut self) -> io::Result<()>;

    /// Makes bytes read as zeros and gives their room back. The length does not change.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the storage cannot do that; nothing has been changed then.
    fn punch(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Makes bytes zeros.
    ///
    /// # Errors
    /// As [`Storage::write_at`].
    fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let Range { mut start, end } = range;
        while start < end {
            let left = end.saturating_sub(start);
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
            self.write_at(start, ZEROS.get(..len).unwrap_or(&ZEROS))?;
            start = start.saturating_add(len as u64);
        }
        Ok(())
    }
}

impl Storage for File {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn size(&self) -> io::Result<u64> {
        // The length that stat tells of a block device is 0.
        (&*self).seek(SeekFrom::End(0))
    }

    fn is_regular(&self) -> io::Result<bool> {
        let kind = self.metadata()?.file_type();
        if kind.is_file() || kind.is_block_device() { Ok(kind.is_file()) } else { Err(Errno::EINVAL.into()) }
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn punch(&mut self, range: Range<u64>) -> io::Result<()> {
        let signed = |number: u64| i64::try_from(number).map_err(|_| Errno::EFBIG);
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let len = signed(range.end.saturating_sub(range.start))?;
        Ok(fallocate(&*self, flags, signed(range.start)?, len)?)
    }
}

/// Shows a storage to what opens an image in it.
///
/// # Errors
/// Length and kind of the storage could not be found out.
pub fn with_source<S: Storage, T>(storage: &S, open: impl FnOnce(Source<'_>) -> T) -> io::Result<T> {
    let (size, regular) = (storage.size()?, storage.is_regular()?);
    let mut read = |offset, buf: &mut [u8]| storage.read_at(offset, buf);
    Ok(open(Source { size, regular, read: &mut read }))
}

/// Carries out steps in their order.
///
/// # Errors
/// Those of the storage; the steps behind the failed one were not carried out.
pub fn carry_out<S: Storage>(storage: &mut S, steps: &[Step]) -> io::Result<()> {
    for step in steps {
        match step {
            Step::Write(write) => storage.write_at(write.offset, &write.bytes)?,
            Step::Zero(range) => storage.zero(range.clone())?,
            Step::Truncate(len) => storage.set_len(*len)?,
            // Bytes that nobody uses may stay where they cannot be given back.
            Step::Punch(range) => match storage.punch(range.clone()) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                other => other?,
            },
            // Nothing is under way beside this.
            Step::Settle => {}
            Step::Flush => storage.sync()?,
        }
    }
    Ok(())
}

/// Reads what lies below an image, its parent or backing file: fills the buffer from a sector of the disk on. Behind the end
/// of a shorter parent, and if there is none at all, that is zeros ([`nothing`]).
pub type Below<'a> = dyn FnMut(Sector, &mut [u8]) -> io::Result<()> + 'a;

/// The [`Below`] of an image without a parent.
///
/// # Errors
/// None.
pub fn nothing(_: Sector, buf: &mut [u8]) -> io::Result<()> {
    buf.fill(0);
    Ok(())
}

/// What can go wrong.
#[derive(Debug)]
pub enum Error<E> {
    /// The core refuses.
    Core(E),
    /// The storage, or what lies below.
    Io(io::Error),
    /// An earlier failure has left it unknown what is on disk.
    Poisoned,
    /// The core waits for something although nothing is under way: a mistake in the core.
    Stuck,
    /// A buffer is not a whole number of sectors.
    Askew,
}

impl<E: FormatError> Error<E> {
    /// The errno that fits.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Core(error) => error.errno(),
            Error::Io(error) => error.raw_os_error().unwrap_or(Errno::EIO as i32),
            Error::Poisoned => Errno::EIO as i32,
            Error::Stuck => Errno::EDEADLK as i32,
            Error::Askew => Errno::EINVAL as i32,
        }
    }
}

impl<E: FormatError> fmt::Display for Error<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Core(error) => write!(f, "{error}"),
            Error::Io(error) => write!(f, "{error}"),
            Error::Poisoned => f.write_str(
                "writing metadata has failed before: the image takes no more writes until it is reopened",
            ),
            Error::Stuck => f.write_str("the image waits for something that will never come"),
            Error::Askew => f.write_str("the buffer is not a whole number of sectors"),
        }
    }
}

impl<E: FormatError> std::error::Error for Error<E> {}

impl<E> From<io::Error> for Error<E> {
    fn from(error: io::Error) -> Self {
        Error::Io(error)
    }
}

impl<E: FormatError> From<Error<E>> for io::Error {
    fn from(error: Error<E>) -> Self {
        match error {
            Error::Io(error) => error,
            other => io::Error::other(other.to_string()),
        }
    }
}

/// An open image in a storage.
#[derive(Debug)]
pub struct Blocking<F, S> {
    pub(crate) core: F,
    pub(crate) storage: S,
    /// Something was written, so that closing has something to do.
    pub(crate) dirty: bool,
    /// The unit that was unpacked last.
    unpacked: Option<(Packed, Vec<u8>)>,
}

impl<F: Format, S: Storage> Blocking<F, S> {
    /// Takes a core and what it was opened from.
    pub fn new(core: F, storage: S) -> Self {
        Self { core, storage, dirty: false, unpacked: None }
    }

    /// The core.
    pub fn core(&self) -> &F {
        &self.core
    }

    /// The storage.
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// The storage. What is done to it behind the core's back is the caller's business.
    pub fn storage_mut(&mut self) -> &mut S {
        &mut self.storage
    }

    /// Gives both back without closing, as if the process had died here.
    pub fn into_parts(self) -> (F, S) {
        (self.core, self.storage)
    }

    /// Reads from `sector` on.
    ///
    /// # Errors
    /// Sectors outside the disk, damaged metadata, and those of the storage and of `below`.
    pub fn read(
        &mut self,
        sector: Sector,
        buf: &mut [u8],
        below: &mut Below<'_>,
    ) -> Result<(), Error<F::Error>> {
        match self.core.place(sector, sectors(buf.len())) {
            Some(offset) if whole_sectors(buf.len()) && !buf.is_empty() => {
                self.read_data(sector, offset, buf)
            }
            _ => self.read_mapped(sector, buf, below),
        }
    }

    /// [`Blocking::read`] without the short way.
    pub(crate) fn read_mapped(
        &mut self,
        sector: Sector,
        buf: &mut [u8],
        below: &mut Below<'_>,
    ) -> Result<(), Error<F::Error>> {
        if !whole_sectors(buf.len()) {
            return Err(Error::Askew);
        }
        let (mut sector, mut left) = (sector, buf);
        while !left.is_empty() {
            let wanted = sectors(left.len());
            let lookup = self.core.map(sector, wanted).map_err(Error::Core)?;
            let count = match &lookup {
                Lookup::Load(load) => {
                    self.load(load)?;
                    continue;
                }
                Lookup::Data { count, .. }
                | Lookup::Zero { count }
                | Lookup::Parent { count }
                | Lookup::Packed { count, .. } => *count,
            };
            let Some((part, rest)) = left.split_at_mut_checked(bytes(count)).filter(|_| count > 0) else {
                return Err(Error::Stuck);
            };
            match lookup {
                Lookup::Data { offset, .. } => self.read_data(sector, offset, part)?,
                Lookup::Packed { packed, first, .. } => self.read_packed(&packed, first, part)?,
                Lookup::Parent { .. } => below(sector, part)?,
                Lookup::Zero { .. } | Lookup::Load(_) => part.fill(0),
            }
            sector = sector.saturating_add(count.into());
            left = rest;
        }
        Ok(())
    }

    fn read_data(&self, sector: Sector, offset: u64, into: &mut [u8]) -> Result<(), Error<F::Error>> {
        self.storage.read_at(offset, into)?;
        if let Some(cipher) = self.core.cipher() {
            cipher.decrypt(sector, into);
        }
        Ok(())
    }

    fn read_packed(&mut self, packed: &Packed, first: u32, into: &mut [u8]) -> Result<(), Error<F::Error>> {
        let unit = match self.unpacked.take() {
            Some((of, unit)) if of == *packed => unit,
            _ => {
                let mut unit = vec![0; bytes(packed.sectors)];
                let raw = read_padded(&self.storage, packed.offset, packed.len)?;
                self.core.unpack(packed, &raw, &mut unit).map_err(Error::Core)?;
                unit
            }
        };
        let part = unit.get(bytes(first)..).and_then(|from| from.get(..into.len())).ok_or(Error::Stuck)?;
        into.copy_from_slice(part);
        self.unpacked = Some((*packed, unit));
        Ok(())
    }

    pub(crate) fn load(&mut self, load: &Load) -> Result<(), Error<F::Error>> {
        let mut bytes = vec![0; load.len as usize];
        match self.storage.read_at(load.offset, &mut bytes) {
            Ok(()) => self.core.loaded(load, &bytes).map_err(Error::Core),
            Err(error) => {
                self.core.load_failed(load);
                Err(error.into())
            }
        }
    }

    /// Writes from `sector` on, and commits.
    ///
    /// # Errors
    /// What [`Format::plan_write`] says, and those of the storage and of `below`. Any part of the data may have been written
    /// then.
    pub fn write(
        &mut self,
        sector: Sector,
        data: &[u8],
        below: &mut Below<'_>,
    ) -> Result<(), Error<F::Error>> {
        if !whole_sectors(data.len()) {
            return Err(Error::Askew);
        }
        let (mut sector, mut left) = (sector, data);
        let mut publish = false;
        while !left.is_empty() {
            let wanted = sectors(left.len());
            let count = match self.core.overwrite(sector, wanted) {
                Some(offset) => {
                    self.dirty = true;
                    self.unpacked = None;
                    self.write_data(sector, offset, left.get(..bytes(wanted)).unwrap_or(left).to_vec())?;
                    wanted
                }
                None => match self.core.plan_write(sector, wanted).map_err(Error::Core)? {
                    Plan::Load(load) => {
                        self.load(&load)?;
                        continue;
                    }
                    Plan::Wait => {
                        self.commit_something()?;
                        continue;
                    }
                    Plan::Write(write) => {
                        let part = left.get(..bytes(write.count)).filter(|part| !part.is_empty());
                        self.write_planned(sector, &write, part.ok_or(Error::Stuck)?, below)?;
                        publish |= write.publish;
                        write.count
                    }
                },
            };
            sector = sector.saturating_add(count.into());
            left = left.get(bytes(count)..).unwrap_or_default();
        }
        if publish { self.commit().map(drop) } else { Ok(()) }
    }

    fn write_planned(
        &mut self,
        sector: Sector,
        write: &Write,
        data: &[u8],
        below: &mut Below<'_>,
    ) -> Result<(), Error<F::Error>> {
        self.dirty = true;
        self.unpacked = None;
        let done = self.write_steps(sector, write, data, below);
        if write.publish {
            self.core.written(sector, write.count, done.is_ok());
        }
        done
    }

    fn write_steps(
        &mut self,
        sector: Sector,
        write: &Write,
        data: &[u8],
        below: &mut Below<'_>,
    ) -> Result<(), Error<F::Error>> {
        if let Some(prepare) = &write.prepare {
            let done = carry_out(&mut self.storage, &prepare.steps);
            self.core.prepared(prepare.key, done.is_ok());
            done?;
        }
        let (from, offset, data) = self.surround(sector, write, data, below)?;
        self.write_data(from, offset, data)
    }

    /// The data with what is to be copied around it: its first sector, its place in the file, and all of it.
    pub(crate) fn surround(
        &mut self,
        sector: Sector,
        write: &Write,
        data: &[u8],
        below: &mut Below<'_>,
    ) -> Result<(Sector, u64, Vec<u8>), Error<F::Error>> {
        let before = bytes(write.copy_before);
        let from = sector.saturating_sub(write.copy_before.into());
        let offset = write.offset.saturating_sub(before as u64);
        let mut all = vec![0; before];
        self.read(from, &mut all, below)?;
        all.extend_from_slice(data);
        // Behind the end of the disk its last unit holds zeros.
        let behind = sector.saturating_add(write.count.into());
        let there = self.core.sectors().saturating_sub(behind).min(write.copy_after.into());
        let start = all.len();
        all.resize(start.saturating_add(bytes(write.copy_after)), 0);
        let there = bytes(u32::try_from(there).unwrap_or(u32::MAX));
        let copy = all.get_mut(start..).and_then(|copy| copy.get_mut(..there)).unwrap_or_default();
        self.read(behind, copy, below)?;
        Ok((from, offset, all))
    }

    /// Writes what the disk is to hold from `sector` on.
    pub(crate) fn write_data(
        &mut self,
        sector: Sector,
        offset: u64,
        mut data: Vec<u8>,
    ) -> Result<(), Error<F::Error>> {
        if let Some(cipher) = self.core.cipher() {
            cipher.encrypt(sector, &mut data);
        }
        Ok(self.storage.write_at(offset, &data)?)
    }

    /// Discards sectors as far as the format can, and commits. They read as zeros afterwards or as before.
    ///
    /// # Errors
    /// What [`Format::plan_discard`] says, and those of the storage.
    pub fn discard(&mut self, sector: Sector, count: u64) -> Result<(), Error<F::Error>> {
        let (mut sector, mut left) = (sector, count);
        let mut publish = false;
        while left > 0 {
            let wanted = u32::try_from(left).unwrap_or(u32::MAX);
            let count = match self.core.plan_discard(sector, wanted).map_err(Error::Core)? {
                DiscardPlan::Load(load) => {
                    self.load(&load)?;
                    continue;
                }
                DiscardPlan::Wait => {
                    self.commit_something()?;
                    continue;
                }
                DiscardPlan::Skip { count } => count,
                DiscardPlan::Punch { offset, count } => {
                    self.dirty = true;
                    self.unpacked = None;
                    let end = offset.saturating_add(u64::from(count).saturating_mul(SECTOR_SIZE));
                    self.storage.punch(offset..end)?;
                    count
                }
                DiscardPlan::Publish { count } => {
                    self.dirty = true;
                    publish = true;
                    count
                }
            };
            if count == 0 {
                return Err(Error::Stuck);
            }
            sector = sector.saturating_add(count.into());
            left = left.saturating_sub(count.into());
        }
        if publish { self.commit().map(drop) } else { Ok(()) }
    }

    /// Commits what is pending; false if there is nothing.
    fn commit(&mut self) -> Result<bool, Error<F::Error>> {
        let Some(steps) = self.core.begin_commit() else {
            return if self.core.is_poisoned() { Err(Error::Poisoned) } else { Ok(false) };
        };
        self.unpacked = None;
        let done = carry_out(&mut self.storage, &steps);
        self.core.commit_ended(done.is_ok());
        done?;
        Ok(true)
    }

    /// The core waits: the one thing that can be under way is what this request itself has left to a commit.
    fn commit_something(&mut self) -> Result<(), Error<F::Error>> {
        if self.commit()? { Ok(()) } else { Err(Error::Stuck) }
    }

    /// Makes the disk this many sectors large, durably.
    ///
    /// # Errors
    /// What [`Format::begin_resize`] says, and those of the storage.
    pub fn resize(&mut self, sectors: u64) -> Result<(), Error<F::Error>> {
        let steps = loop {
            match self.core.begin_resize(sectors).map_err(Error::Core)? {
                Some(steps) => break steps,
                None => self.commit_something()?,
            }
        };
        self.dirty = true;
        self.unpacked = None;
        let done = carry_out(&mut self.storage, &steps);
        self.core.resize_ended(done.is_ok());
        Ok(done?)
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn flush(&mut self) -> Result<(), Error<F::Error>> {
        Ok(self.storage.sync()?)
    }

    /// Brings a written image into its resting state, durably. An image that was only read is not touched.
    ///
    /// # Errors
    /// Those of the storage; [`Error::Poisoned`].
    pub fn close(&mut self) -> Result<(), Error<F::Error>> {
        if !self.dirty {
            return Ok(());
        }
        // What a failed request has left.
        while self.commit()? {}
        carry_out(&mut self.storage, &self.core.close_steps())?;
        self.storage.sync()?;
        self.dirty = false;
        Ok(())
    }
}

/// Reads a range of which a part may lie behind the end: zeros.
fn read_padded<S: Storage>(storage: &S, offset: u64, len: u32) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    let there = storage.size()?.saturating_sub(offset).min(len.into());
    if let Some(part) = usize::try_from(there).ok().and_then(|there| bytes.get_mut(..there)) {
        storage.read_at(offset, part)?;
    }
    Ok(bytes)
}

fn whole_sectors(len: usize) -> bool {
    (len as u64).is_multiple_of(SECTOR_SIZE)
}

/// Sectors of a buffer, as many as one lookup can tell of.
fn sectors(len: usize) -> u32 {
    u32::try_from(len as u64 / SECTOR_SIZE).unwrap_or(u32::MAX)
}

/// Bytes of so many sectors.
fn bytes(sectors: u32) -> usize {
    usize::try_from(u64::from(sectors).saturating_mul(SECTOR_SIZE)).unwrap_or(usize::MAX)
}
