//! What a disk leaves behind when its tapdisk dies: enough for another one to be it.
//!
//! | in the runtime folder | what |
//! |---|---|
//! | `inflight<minor>/record` | a [`Record`], as JSON |
//! | `inflight<minor>/ring-<domid>-<vdev>-<port>` | the journal of a ring (`tapdisk::journal`) |
//!
//! The runtime folder is in memory and is as old as the running system, which is just as long as rings live. The folder is
//! there from the moment an image is open until it is closed in an orderly way, or has failed: a tapdisk that is gone while
//! its folder is there has died, or has made room for another release. The record may hold a key, so only root may enter.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::dir::ControlDir;
use crate::proto::{DiskInfo, Minor, OpenParams, QueueParams, RingParams};

/// What a tapdisk needs to be another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Who serves the disk, or did last.
    pub pid: i32,
    /// Where the first tapdisk of the disk let NBD clients in: the name that they know.
    pub socket: PathBuf,
    /// The word for `--engine`.
    pub engine: String,
    /// The size for `--parent-cache`, in bytes.
    #[serde(default)]
    pub parent_cache: Option<u64>,
    /// How the image is open, changes since included.
    pub params: OpenParams,
    /// The disk as it was told to guests.
    pub info: DiskInfo,
    /// The administrator has paused it.
    #[serde(default)]
    pub paused: bool,
    /// The frontends being served.
    #[serde(default)]
    pub rings: Vec<RingParams>,
    /// Of the tapdisks so far.
    #[serde(default)]
    pub history: History,
}

/// What is to be known of the tapdisks that served a disk, to tell a disk that makes progress from one that cannot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// So many in a row ended without having answered anything.
    pub fruitless: u32,
    /// A sum of the rings' counters of responses when the last one began.
    pub responses: u64,
    /// When it began, in milliseconds of the system's uptime.
    pub began_ms: u64,
    /// No other is to try.
    #[serde(default)]
    pub hopeless: bool,
}

/// The folder of one disk.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// The folder of a minor, which may not exist.
    pub fn of(dir: &ControlDir, minor: Minor) -> Folder {
        Folder { path: dir.root().join(format!("inflight{minor}")) }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the journal of one of a frontend's rings is.
    pub fn journal(&self, ring: &RingParams, queue: &QueueParams) -> PathBuf {
        self.path.join(format!("ring-{}-{}-{}", ring.domid, ring.vdev, queue.port))
    }

    /// The record; `None`: there is nothing to go on with.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn read(&self) -> io::Result<Option<Record>> {
        match fs::read(self.record()) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the folder, if there is none.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(&self) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    }

    /// Writes the record, as a whole or not at all.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let draft = self.path.join("draft");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
        file.write_all(&serde_json::to_vec(record)?)?;
        fs::rename(draft, self.record())
    }

    /// Removes the record: nobody is to go on with the disk.
    ///
    /// # Errors
    /// What the system says; that there is none is no error.
    pub fn forget(&self) -> io::Result<()> {
        missing_is_fine(fs::remove_file(self.record()))
    }

    /// Removes it with all that is in it.
    ///
    /// # Errors
    /// As [`Folder::forget`].
    pub fn remove(&self) -> io::Result<()> {
        // First what would make somebody go on.
        self.forget()?;
        missing_is_fine(fs::remove_dir_all(&self.path))
    }

    fn record(&self) -> PathBuf {
        self.path.join("record")
    }
}

fn missing_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::proto::{Key, Polling};

    fn record() -> Record {
        let params =
            OpenParams { key: Some(Key::new(vec![7; 32])), ..OpenParams::new("vhd:/a".parse().unwrap()) };
        let info = DiskInfo {
            sectors: 8,
            sector_size: 512,
            physical_sector_size: 4096,
            readonly: false,
            discard: None,
        };
        let ring = RingParams {
            domid: 5,
            vdev: 51712,
            protocol: "x86_64-abi".into(),
            queues: vec![QueueParams { ring_refs: vec![8], port: 9 }],
            readonly: false,
            persistent: true,
            discard: false,
            polling: Polling::default(),
        };
        Record {
            pid: 77,
            socket: "/run/x/nbd77.3".into(),
            engine: "auto".into(),
            parent_cache: None,
            params,
            info,
            paused: false,
            rings: vec![ring],
            history: History::default(),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_only_its_owner_may_look() {
        let folder = tempfile::tempdir().unwrap();
        let place = Folder::of(&ControlDir::at(folder.path()), Minor(3));
        assert_eq!(place.read().unwrap(), None);
        place.remove().unwrap();
        place.create().unwrap();
        place.create().unwrap();
        let first = record();
        place.write(&first).unwrap();
        assert_eq!(place.read().unwrap(), Some(first.clone()));
        let second = Record { pid: 78, paused: true, ..first };
        place.write(&second).unwrap();
        assert_eq!(place.read().unwrap(), Some(second.clone()));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(place.path()), mode(&place.record())), (0o700, 0o600));
        fs::write(place.journal(&second.rings[0], &second.rings[0].queues[0]), b"x").unwrap();
        place.remove().unwrap();
        assert!(!place.path().exists());
    }

    #[test]
    fn what_is_no_record_is_an_error_and_not_none() {
        let folder = tempfile::tempdir().unwrap();
        let place = Folder::of(&ControlDir::at(folder.path()), Minor(3));
        fs::create_dir(place.path()).unwrap();
        fs::write(place.record(), b"{\"pid\":1").unwrap();
        assert!(place.read().is_err());
    }
}
