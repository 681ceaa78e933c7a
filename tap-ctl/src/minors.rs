//! Minor numbers: which VBDs exist on this host, and who serves them.
//!
//! A minor is allocated while its marker file exists, and in use while a tapdisk holds an exclusive flock on the
//! marker. The lock dies with its holder, so a crashed tapdisk leaves an orphan marker, which `free` removes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::client::Client;
use crate::dir::ControlDir;
use crate::error::Error;
use crate::inflight::Folder;
use crate::proto::Minor;

fn file_error(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Error {
    Error::File { action, path: path.to_owned(), source: source.into() }
}

/// Allocates the lowest free minor by creating its marker.
///
/// # Errors
///
/// [`Error::NoFreeMinor`], or [`Error::File`] when the runtime folder cannot be made or used.
pub fn allocate(dir: &ControlDir) -> Result<Minor, Error> {
    let folder = dir.markers();
    dir.create().map_err(|error| file_error("create", &folder, error))?;
    let turn = File::open(&folder).map_err(|error| file_error("open", &folder, error))?;
    // Serialises allocations: held until the end of this function.
    flock(&turn, FlockOperation::LockExclusive).map_err(|errno| file_error("lock", &folder, errno))?;
    for minor in (0..=Minor::MAX.0).map(Minor) {
        let marker = dir.marker(minor);
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&marker) {
            Ok(_) => return Ok(minor),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(file_error("create", &marker, error)),
        }
    }
    Err(Error::NoFreeMinor)
}

/// Frees a minor that no tapdisk serves, and forgets what a dead one has left of its disk.
///
/// # Errors
///
/// [`Error::NoSuchMinor`] (ENOENT), [`Error::MinorInUse`] (EAGAIN).
pub fn free(dir: &ControlDir, minor: Minor) -> Result<(), Error> {
    // The lock is held over the removal, so that no tapdisk can claim the marker in between.
    let _claim = claim(dir, minor)?;
    clean_up(dir, minor);
    let left = Folder::of(dir, minor);
    left.remove().map_err(|error| file_error("remove", left.path(), error))?;
    let marker = dir.marker(minor);
    fs::remove_file(&marker).map_err(|error| file_error("remove", &marker, error))
}

/// Removes the sockets that tapdisks have left that were killed. Who has the claim knows that nobody serves the minor.
fn clean_up(dir: &ControlDir, minor: Minor) {
    let names =
        fs::read_dir(dir.root()).into_iter().flatten().filter_map(Result::ok).map(|entry| entry.path());
    for path in names {
        let Some((pid, _)) = dir.parse_vbd_path(&path).filter(|(_, served)| *served == minor) else {
            continue;
        };
        // Whether it can be removed or not, it says nothing any more.
        let _ = fs::remove_file(path);
        if matches!(Client::connect(dir, pid), Err(error) if error.is_dead()) {
            let _ = fs::remove_file(dir.control_socket(pid));
        }
    }
}

/// A minor in use by this process, until dropped or given away.
#[derive(Debug)]
pub struct Claim {
    /// `None`: given away.
    marker: Option<OwnedFd>,
}

impl Claim {
    /// What another process has claimed and given away.
    pub fn over(marker: OwnedFd) -> Claim {
        Claim { marker: Some(marker) }
    }

    /// The descriptor that holds it, to be given away.
    pub fn into_marker(mut self) -> Option<OwnedFd> {
        self.marker.take()
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Closing alone would leave it to a process that was being started meanwhile, and has the descriptor until its exec.
        if let Some(Err(errno)) = self.marker.as_ref().map(|marker| flock(marker, FlockOperation::Unlock)) {
            log::warn!("giving up the lock of a minor failed: {errno}");
        }
    }
}

/// Takes a minor into use: what a tapdisk does at attach. Never waits.
///
/// # Errors
///
/// [`Error::NoSuchMinor`] (ENOENT), [`Error::MinorInUse`] (EAGAIN).
pub fn claim(dir: &ControlDir, minor: Minor) -> Result<Claim, Error> {
    let path = dir.marker(minor);
    let missing = || Error::NoSuchMinor { minor, path: path.clone() };
    let file = match OpenOptions::new().write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(missing()),
        Err(error) => return Err(file_error("open", &path, error)),
    };
    // The lock is the open file's, and not the process's: it goes with the descriptor.
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(Error::MinorInUse { minor }),
        Err(errno) => return Err(file_error("lock", &path, errno)),
    }
    // Between open and lock somebody may have freed the minor, and a third allocated it anew: then the lock is on a
    // file without a name, which protects nothing.
    let locked = file.metadata().map_err(|error| file_error("examine", &path, error))?;
    match fs::metadata(&path) {
        Ok(named) if (named.dev(), named.ino()) == (locked.dev(), locked.ino()) => {
            Ok(Claim::over(file.into()))
        }
        Ok(_) => Err(Error::MinorInUse { minor }),
        Err(error) if error.kind() == ErrorKind::NotFound => Err(missing()),
        Err(error) => Err(file_error("examine", &path, error)),
    }
}

/// All allocated minors in ascending order. An absent runtime folder holds none.
///
/// # Errors
///
/// [`Error::File`] when the folder cannot be read.
pub fn allocated(dir: &ControlDir) -> Result<Vec<Minor>, Error> {
    let folder = dir.markers();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(file_error("read", &folder, error)),
    };
    let mut minors: Vec<Minor> = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix("tapdisk-")?.parse().ok())
        .collect();
    minors.sort_unstable();
    Ok(minors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dir() -> (tempfile::TempDir, ControlDir) {
        let folder = tempfile::tempdir().unwrap();
        let dir = ControlDir::at(folder.path().join("blktap-control"));
        (folder, dir)
    }

    #[test]
    fn the_lowest_free_minor_is_taken() {
        let (_folder, dir) = dir();
        let minors: Vec<_> = (0..3).map(|_| allocate(&dir).unwrap()).collect();
        assert_eq!(minors, [Minor(0), Minor(1), Minor(2)]);
        free(&dir, Minor(1)).unwrap();
        assert_eq!(allocate(&dir).unwrap(), Minor(1));
        assert_eq!(allocate(&dir).unwrap(), Minor(3));
    }

    #[test]
    fn parallel_allocations_never_share_a_minor() {
        let (_folder, dir) = dir();
        let dir = &dir;
        let mut minors: Vec<Minor> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| (0..25).map(|_| allocate(dir).unwrap()).collect::<Vec<_>>()))
                .collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        minors.sort_unstable();
        assert_eq!(minors, (0..100).map(Minor).collect::<Vec<_>>());
        assert_eq!(allocated(dir).unwrap(), minors);
    }

    #[test]
    fn a_claimed_minor_cannot_be_freed_or_claimed_until_dropped() {
        let (_folder, dir) = dir();
        let minor = allocate(&dir).unwrap();
        let held = claim(&dir, minor).unwrap();
        assert_eq!(free(&dir, minor).unwrap_err().errno(), 11);
        assert_eq!(claim(&dir, minor).unwrap_err().errno(), 11);
        drop(held);
        free(&dir, minor).unwrap();
        assert_eq!(free(&dir, minor).unwrap_err().errno(), 2);
        assert_eq!(claim(&dir, minor).unwrap_err().errno(), 2);
    }

    #[test]
    fn sockets_of_the_dead_go_with_the_minor_and_those_of_the_living_stay() {
        use std::os::unix::net::UnixListener;
        let (_folder, dir) = dir();
        let minors = [allocate(&dir).unwrap(), allocate(&dir).unwrap()];
        let dead = [dir.vbd_path(7, minors[0]), dir.vbd_path(8, minors[0]), dir.control_socket(7)];
        for path in &dead {
            drop(UnixListener::bind(path).unwrap());
        }
        let living = [dir.vbd_path(8, minors[1]), dir.control_socket(8)];
        let _listening: Vec<_> = living.iter().map(|path| UnixListener::bind(path).unwrap()).collect();
        free(&dir, minors[0]).unwrap();
        assert_eq!(dead.map(|path| path.exists()), [false; 3]);
        assert_eq!(living.map(|path| path.exists()), [true; 2]);
    }

    #[test]
    fn foreign_files_among_the_markers_are_no_minors() {
        let (_folder, dir) = dir();
        allocate(&dir).unwrap();
        for name in ["tapdisk-", "tapdisk-x", "tapdisk-99999", "other-1", "tapdisk-+1"] {
            fs::write(dir.markers().join(name), b"").unwrap();
        }
        assert_eq!(allocated(&dir).unwrap(), [Minor(0)]);
    }

    #[test]
    fn an_absent_folder_holds_no_minors() {
        let (_folder, dir) = dir();
        assert!(allocated(&dir).unwrap().is_empty());
    }
}
