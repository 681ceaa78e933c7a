//! The files.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use cbt::{HEADER_LEN, Header, Log};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

/// Why a command failed: for people, and the exit code.
#[derive(Debug)]
pub struct Failure {
    pub errno: Errno,
    pub message: Option<String>,
}

impl Failure {
    /// It was told already.
    pub fn quiet(errno: Errno) -> Failure {
        Failure { errno, message: None }
    }

    /// A system call that failed.
    pub fn io(what: &str, error: &io::Error) -> Failure {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        Failure { errno, message: Some(format!("{what}: {error}")) }
    }
}

/// What is meant to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// An open log.
#[derive(Debug)]
pub struct LogFile {
    path: PathBuf,
    file: File,
}

impl LogFile {
    /// Opens a log. For writing it is locked: a tapdisk that writes it would undo our change, as it keeps the whole log in
    /// memory.
    pub fn open(path: &Path, access: Access) -> Result<LogFile, Failure> {
        let log = LogFile::with(path, File::options().read(true).write(access == Access::Write).open(path))?;
        if access == Access::Write {
            log.lock()?;
        }
        Ok(log)
    }

    /// Makes an empty file, also of one that is there.
    pub fn create(path: &Path) -> Result<LogFile, Failure> {
        let opened = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let log = LogFile::with(path, opened)?;
        log.lock()?;
        log.file.set_len(0).map_err(|error| log.failed("cannot be emptied", &error))?;
        Ok(log)
    }

    fn with(path: &Path, opened: io::Result<File>) -> Result<LogFile, Failure> {
        let named = format!("{}: cannot be opened", path.display());
        let file = opened.map_err(|error| Failure::io(&named, &error))?;
        Ok(LogFile { path: path.to_owned(), file })
    }

    fn lock(&self) -> Result<(), Failure> {
        let lock = libc::flock {
            l_type: i16::try_from(libc::F_WRLCK).unwrap_or(0),
            l_whence: 0,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&lock)) {
            Ok(_) => Ok(()),
            Err(Errno::EAGAIN | Errno::EACCES) => {
                Err(self.refuse(Errno::EBUSY, &"is in use by another process: pause or close its disk first"))
            }
            Err(errno) => Err(self.failed("cannot be locked", &errno.into())),
        }
    }

    /// Reads the header only.
    pub fn read_header(&self) -> Result<Header, Failure> {
        let mut bytes = Vec::new();
        self.read_to(&mut bytes, Some(HEADER_LEN))?;
        Header::parse(&bytes).map_err(|error| self.refuse(Errno::EIO, &error))
    }

    /// Reads all of it.
    pub fn read(&self) -> Result<Log, Failure> {
        let mut bytes = Vec::new();
        self.read_to(&mut bytes, None)?;
        Log::parse(&bytes).map_err(|error| self.refuse(Errno::EIO, &error))
    }

    fn read_to(&self, bytes: &mut Vec<u8>, most: Option<u64>) -> Result<(), Failure> {
        let mut file = &self.file;
        file.seek(SeekFrom::Start(0))
            .and_then(|_| file.take(most.unwrap_or(u64::MAX)).read_to_end(bytes))
            .map(drop)
            .map_err(|error| self.failed("cannot be read", &error))
    }

    /// Writes all of it, the bits before the header: a header never promises bits that are not there.
    pub fn write(&self, log: &Log) -> Result<(), Failure> {
        self.file
            .write_all_at(&log.bytes(HEADER_LEN..u64::MAX), HEADER_LEN)
            .and_then(|()| self.file.sync_data())
            .and_then(|()| self.file.write_all_at(&log.bytes(0..HEADER_LEN), 0))
            .and_then(|()| self.file.sync_data())
            .map_err(|error| self.failed("cannot be written", &error))
    }

    fn failed(&self, what: &str, error: &io::Error) -> Failure {
        Failure::io(&format!("{}: {what}", self.path.display()), error)
    }

    /// A log that cannot be used as asked.
    pub fn refuse(&self, errno: Errno, why: &impl Display) -> Failure {
        Failure { errno, message: Some(format!("{}: {why}", self.path.display())) }
    }
}
