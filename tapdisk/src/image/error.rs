//! Why an image cannot be opened.

use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::file::Mode;
use super::holders::Holder;
use crate::confine;
use crate::io::errno_of;

/// An image that cannot be opened: a sentence for people that names the file, and an errno for programs.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct OpenError {
    path: PathBuf,
    message: String,
    errno: Errno,
}

impl OpenError {
    /// Any failure: `message` completes "PATH: ".
    pub fn new(path: &Path, errno: Errno, message: impl Into<String>) -> OpenError {
        OpenError { path: path.to_owned(), message: message.into(), errno }
    }

    /// A system call that failed.
    pub fn file(path: &Path, what: &str, errno: Errno) -> OpenError {
        let hint = if errno == Errno::EACCES { confine::why_refused() } else { "" };
        OpenError::new(path, errno, format!("{what}: {}{hint}", errno.desc()))
    }

    /// An I/O error.
    pub fn io(path: &Path, what: &str, error: &std::io::Error) -> OpenError {
        match error.raw_os_error() {
            Some(_) => OpenError::file(path, what, errno_of(error)),
            // Its words say more than its number.
            None => OpenError::new(path, errno_of(error), format!("{what}: {error}")),
        }
    }

    /// Somebody else holds the lock.
    pub fn in_use(path: &Path, mode: Mode, holder: &Holder) -> OpenError {
        let who = match holder {
            Holder::Process(pid, program) => format!("{program} (process {pid})"),
            Holder::Unknown => "another process".to_owned(),
            Holder::InFlight => {
                let message = "still has I/O of a dead process in flight, which its storage has not ended (the lock is held, \
                               and no process has it open): try again when the storage answers";
                return OpenError::new(path, Errno::EBUSY, message);
            }
        };
        let message = match mode {
            Mode::Exclusive => format!(
                "is in use by {who} (its lock is held); an image can be written by one disk only: stop the other \
                 user, or attach both read-only"
            ),
            Mode::Shared => {
                format!("is being written by {who} (its lock is held), so it cannot be read meanwhile")
            }
        };
        OpenError::new(path, Errno::EBUSY, message)
    }

    /// There is nothing to serve.
    pub fn empty(path: &Path) -> OpenError {
        OpenError::new(
            path,
            Errno::EINVAL,
            "is empty (shorter than one sector of 512 bytes); a disk needs a size",
        )
    }

    /// The errno for programs.
    pub fn errno(&self) -> Errno {
        self.errno
    }
}
