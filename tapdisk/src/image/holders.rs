//! Who has a file open that cannot be locked, so that the message can say it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Who may hold the lock of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Holder {
    /// A process that has it open: its id, and the name of its program.
    Process(i32, String),
    /// No process has it open: what a dead one had in flight has not ended.
    InFlight,
    /// Not every process may be looked at.
    Unknown,
}

/// Looks for a process other than this one, and the one it asks for, that has the same file open. Names are compared, and nothing is
/// asked of the file's store, which may hang.
pub fn holder(file: BorrowedFd<'_>, asks: u32) -> Holder {
    let own = Path::new("/proc/self/fd").join(file.as_raw_fd().to_string());
    match fs::read_link(own).and_then(|name| look(name.as_os_str(), [std::process::id(), asks])) {
        Ok(holder) => holder,
        Err(_) => Holder::Unknown,
    }
}

fn look(name: &OsStr, own: [u32; 2]) -> io::Result<Holder> {
    let own = own.map(|pid| pid.to_string());
    let mut all = true;
    for process in fs::read_dir("/proc")?.flatten() {
        let pid = process.file_name();
        let Some(number) = pid.to_str().and_then(|pid| pid.parse().ok()) else { continue };
        if own.iter().any(|own| pid == OsStr::new(own)) {
            continue;
        }
        match has_open(&process.path(), name) {
            Ok(false) => {}
            Ok(true) => {
                let program = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Ok(Holder::Process(number, program.trim().to_owned()));
            }
            // It has ended meanwhile.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => {}
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(_) => all = false,
        }
    }
    Ok(if all { Holder::InFlight } else { Holder::Unknown })
}

/// Whether a thread of the process has the file open: of one that was killed, threads may be left that wait for the store.
fn has_open(process: &Path, name: &OsStr) -> io::Result<bool> {
    for thread in fs::read_dir(process.join("task"))? {
        let open = fs::read_dir(thread?.path().join("fd"))?.flatten();
        let mut names = open.filter_map(|entry| fs::read_link(entry.path()).ok());
        if names.any(|open| open.as_os_str() == name) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn another_process_that_has_the_file_open_is_found_and_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let free = holder(file.as_file().as_fd(), std::process::id());
        assert!(matches!(free, Holder::InFlight | Holder::Unknown), "{free:?}");
        let input = fs::File::open(file.path()).unwrap();
        let mut other = Command::new("cat").arg("-").stdin(Stdio::piped()).stdout(input).spawn().unwrap();
        let pid = i32::try_from(other.id()).unwrap();
        assert_eq!(
            holder(file.as_file().as_fd(), std::process::id()),
            Holder::Process(pid, "cat".to_owned())
        );
        let asks = other.id();
        assert!(!matches!(holder(file.as_file().as_fd(), asks), Holder::Process(..)), "it asks itself");
        drop(other.stdin.take());
        other.wait().unwrap();
    }
}
