//! A storage in memory.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;

use crate::blocking::Storage;

/// What was done to a storage. Offsets and lengths are in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Bytes were written, from an offset on.
    Write(u64, Vec<u8>),
    /// Bytes were made zeros, by a hole or otherwise.
    Zero(Range<u64>),
    /// The length was set.
    SetLen(u64),
    /// Everything before was made durable.
    Flush,
}

/// How an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// With this errno, and nothing is done.
    Error(i32),
    /// With `EIO`; a write has written half of its sectors before.
    Short,
}

/// A file or block device in memory.
#[derive(Debug)]
pub struct Memory {
    /// What it holds.
    pub bytes: Vec<u8>,
    /// True for a file, false for a device, whose length never changes.
    pub regular: bool,
    /// All changes and flushes so far.
    pub log: Vec<Op>,
    /// The file cannot become longer than this: `ENOSPC`. At first 1 GiB, so that a wild offset costs no memory.
    pub room: u64,
    /// Operations (reads too) until faults, the next one first.
    faults: RefCell<Vec<(usize, Fault)>>,
    failed: Cell<bool>,
}

impl Clone for Memory {
    /// A copy that fails no more.
    fn clone(&self) -> Self {
        Self { log: self.log.clone(), ..Self::of(self.bytes.clone(), self.regular) }
    }
}

impl Memory {
    /// An empty file.
    pub fn file() -> Self {
        Self::of(Vec::new(), true)
    }

    /// A device full of old data.
    pub fn device(len: usize) -> Self {
        Self::of(vec![0xa5; len], false)
    }

    /// A storage with these contents.
    pub fn of(bytes: Vec<u8>, regular: bool) -> Self {
        let (faults, failed) = (RefCell::default(), Cell::new(false));
        Self { bytes, regular, log: Vec::new(), room: 1 << 30, faults, failed }
    }

    /// Lets the operation behind the next `after` ones fail.
    pub fn fail(&mut self, after: usize, fault: Fault) {
        self.faults.get_mut().push((after, fault));
    }

    /// Whether an operation has failed since this was asked last; forgets the faults that are still to come.
    pub fn heal(&mut self) -> bool {
        self.faults.get_mut().clear();
        self.failed.replace(false)
    }

    /// Does it without noting it.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Write(offset, bytes) => {
                let range = self.reach(*offset, bytes.len());
                self.bytes[range].copy_from_slice(bytes);
            }
            Op::Zero(range) => {
                let range = self.reach(range.start, at(range.end - range.start));
                self.bytes[range].fill(0);
            }
            Op::SetLen(len) => {
                assert!(self.regular, "length of a device");
                self.bytes.resize(at(*len), 0);
            }
            Op::Flush => {}
        }
    }

    fn reach(&mut self, offset: u64, len: usize) -> Range<usize> {
        let range = at(offset)..at(offset) + len;
        if range.end > self.bytes.len() {
            assert!(self.regular, "{range:?} is beyond the end of the device");
            self.bytes.resize(range.end, 0);
        }
        range
    }

    fn run(&mut self, op: Op) -> io::Result<()> {
        let end = match &op {
            Op::Write(offset, bytes) => offset.saturating_add(bytes.len() as u64),
            Op::Zero(range) => range.end,
            Op::SetLen(len) => *len,
            Op::Flush => 0,
        };
        let room = if self.regular { self.room } else { 0 };
        if end > room.max(self.bytes.len() as u64) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let fault = self.fault();
        match (fault, op) {
            (None, op) => {
                self.apply(&op);
                self.log.push(op);
                Ok(())
            }
            (Some(Fault::Error(errno)), _) => Err(io::Error::from_raw_os_error(errno)),
            (Some(Fault::Short), op) => {
                if let Op::Write(offset, mut bytes) = op {
                    bytes.truncate(bytes.len() / 1024 * 512);
                    let op = Op::Write(offset, bytes);
                    self.apply(&op);
                    self.log.push(op);
                }
                Err(io::Error::from_raw_os_error(libc::EIO))
            }
        }
    }

    /// Counts an operation; the fault that it runs into.
    fn fault(&self) -> Option<Fault> {
        let mut faults = self.faults.borrow_mut();
        let (after, fault) = faults.first_mut()?;
        if *after > 0 {
            *after -= 1;
            return None;
        }
        let fault = *fault;
        faults.remove(0);
        self.failed.set(true);
        Some(fault)
    }
}

impl Storage for Memory {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.fault().is_some() {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let from = usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..));
        let bytes = from.and_then(|from| from.get(..buf.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(
            offset.is_multiple_of(512) && bytes.len().is_multiple_of(512),
            "no whole sectors at {offset}"
        );
        self.run(Op::Write(offset, bytes.to_vec()))
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.len() as u64)
    }

    fn is_regular(&self) -> io::Result<bool> {
        Ok(self.regular)
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        self.run(Op::SetLen(len))
    }

    fn sync(&mut self) -> io::Result<()> {
        self.run(Op::Flush)
    }

    fn punch(&mut self, range: Range<u64>) -> io::Result<()> {
        // A hole does not make a file longer.
        let end = range.end.min(self.bytes.len() as u64);
        if range.start < end { self.run(Op::Zero(range.start..end)) } else { Ok(()) }
    }

    fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        if range.start < range.end { self.run(Op::Zero(range)) } else { Ok(()) }
    }
}

fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}
